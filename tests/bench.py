"""Ours against transformers (and peft) on the same work: examples and tokens a second, memory.

    python tests/bench.py                        GPT-2 small's shape, random texts
    python tests/bench.py --texts tasks          the four tasks' questions, in a chat template
    python tests/bench.py --shape qwen2.5-0.5b   others; with --device cuda also qwen2.5-7b and gemma-3-12b
    python tests/bench.py --scaling              ours alone: how the cost of training a vector grows

Both get the same random weights, questions, batches, dtype and Adam steps. Theirs is what a user would write:
a forward hook that adds the vector, or peft; batches padded as DataCollatorForSeq2Seq does, labels of -100,
a forward pass over all positions; in evaluation a row for each answer choice. Each measurement is a process
of its own, the two sides in turn. Linux only: peak memory is read from /proc.
"""

import argparse
import ctypes
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as scoring  # noqa: E402
import train  # noqa: E402
from data import CONCEPTS, EncodedQuestion, Tokenizer, encode_question, make_task, make_tree  # noqa: E402
from lora import add_lora  # noqa: E402
from model import GPT, Config  # noqa: E402
from steer import attach  # noqa: E402

SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads"]
QWEN = dict(model_type="qwen2", rope_theta=1e6, tie_word_embeddings=True)
GEMMA = dict(model_type="gemma3_text", head_dim=256, sliding_window=1024, query_pre_attn_scalar=256)
SHAPES = {  # config.json of published checkpoints, as far as it matters here; "test" is to try this file
    "test": QWEN | dict(zip(SIZES, (3000, 64, 128, 2, 4, 2))),
    "gpt2": dict(model_type="gpt2"),
    "qwen2.5-0.5b": QWEN | dict(zip(SIZES, (151936, 896, 4864, 24, 14, 2))),
    "qwen2.5-7b": QWEN | dict(zip(SIZES, (152064, 3584, 18944, 28, 28, 4)), tie_word_embeddings=False),
    "gemma-3-12b": GEMMA | dict(zip(SIZES, (262208, 3840, 15360, 48, 16, 8))),
}
# As long as Qwen 2.5's with its system message, in tiny's tokens: 24 before a question and 5 after it.
TEMPLATE = ("{{ bos_token }} You are prudent and careful. You like people. Name the number, or one word."
            "{{ eos_token }}\n{% for m in messages %}{{ bos_token }}\n{{ '<|' + m.role + '|> ' + m.content }}"
            "{{ eos_token }}\n{% endfor %}{{ bos_token + '\n<|assistant|>' if add_generation_prompt }}")
WORK = ["vector", "lora", "evaluation"]
MODULES, RANK, ALPHA, LEARNING_RATE = ["gate_proj", "up_proj", "down_proj"], 8, 8.0, 1e-3


def parse_args():
    parser = argparse.ArgumentParser(description="Speed and memory against transformers and peft.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="gpt2")
    add("--work", nargs="+", choices=WORK, default=WORK)
    add("--texts", choices=["random", "tasks"], default="random")
    add("--examples", type=int, help="default: 32 random ones, or 64 of the tasks (evaluation: a quarter)")
    add("--prompt-tokens", type=int, nargs=2, default=[40, 80], metavar=("MIN", "MAX"), help="if random")
    add("--template-tokens", type=int, default=0, help="if random: so many in front are the same in all")
    add("--batch-size", type=int, default=16)
    add("--epochs", type=int, default=3)
    add("--repeats", type=int, default=3)
    add("--layer", type=int, help="default: the middle one")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    add("--folder", help="where to keep the random checkpoint; one that is there already is used")
    add("--scaling", action="store_true", help="how the cost of training a vector grows")
    add("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)  # a measuring process
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.examples = args.examples or (32 if args.texts == "random" else 64)
    return args


def make_checkpoint(args, shape):
    """Random weights by transformers, and a tokenizer for the tasks."""
    import transformers
    torch.manual_seed(args.seed)
    config = transformers.AutoConfig.for_model(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model.save_pretrained(args.folder, max_shard_size="2GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # its ids are in any larger vocabulary
        shutil.copy(ROOT / "tiny" / name, args.folder)
    (Path(args.folder) / "chat_template.jinja").write_text(TEMPLATE)


def make_questions(args, work):
    """What both sides are asked, as EncodedQuestions; the vector is added at every token."""
    rng, questions = random.Random(args.seed), []
    if args.texts == "tasks":  # as many of each task: trained on, or a quarter as many held out
        for name, (concept, *_) in CONCEPTS.items():
            task, count = make_task(name, concept), args.examples // len(CONCEPTS)
            held_out = list(chain(*task.held_out.values()))
            pool, count = (held_out, count // 4) if work == "evaluation" else (task.train, count)
            questions += rng.sample(pool, min(count, len(pool)))
        tokenizer = Tokenizer.from_pretrained(args.folder)
        questions = [encode_question(tokenizer, q) for q in rng.sample(questions, len(questions))]
        return [replace(question, positions=None) for question in questions]
    vocab_size = Config.from_pretrained(args.folder).vocab_size
    ids = lambda count: [rng.randrange(1, vocab_size) for _ in range(count)]
    for _ in range(args.examples):  # a prompt, four choices of one to three tokens; 0 ends the answer
        prompt, choices = ids(rng.randint(*args.prompt_tokens)), [ids(rng.randint(1, 3)) for _ in range(4)]
        prompt[:args.template_tokens] = range(1, args.template_tokens + 1)
        questions.append(EncodedQuestion(prompt, choices, 0, choices[0] + [0], None))
    return questions


# ---------------------------------------- the two sides
# Each loads a frozen model and returns (its parameters to train, fit(steps) -> losses, evaluate(questions) ->
# mean probability of the right choice). Both have to find the same numbers.


def ours(args, work, questions):
    model = GPT.from_pretrained(args.folder, args.device, getattr(torch, args.dtype))
    if work == "lora":
        modules = MODULES if model.config.gated_mlp else MODULES[1:]  # GPT-2 has no gate_proj
        parameters = add_lora(model, [args.layer], modules, RANK, ALPHA)
    else:
        parameters = [attach(model, args.layer).vector]

    def fit(steps):
        # In mode "vector" the rate would be in units of the residual stream, of which theirs knows nothing.
        own = {"mode": "lora", "steps": steps, "lr": LEARNING_RATE, "save_every": None, "resume": False}
        return train.train_loop(argparse.Namespace(**vars(args), **own), model, questions, parameters)

    def evaluate(questions):
        arms = scoring.arm_values(parameters, seed=0)
        scores = scoring.score_arms(model, questions, parameters, arms)
        return scores["trained"][1].mean().item()
    return parameters, fit, evaluate


def theirs(args, work, questions):
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).requires_grad_(False).eval()
    if work == "lora":
        import peft
        gpt2 = model.config.model_type == "gpt2"
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, layers_to_transform=[args.layer], fan_in_fan_out=gpt2,
            target_modules=["mlp.c_fc", "mlp.c_proj"] if gpt2 else MODULES))
        parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    else:
        vector = torch.nn.Parameter(torch.zeros(model.config.hidden_size, device=args.device))
        parameters, base = [vector], model.base_model
        block = (base.h if hasattr(base, "h") else base.layers)[args.layer]
        block.register_forward_hook(lambda module, given, output: output + vector.to(output.dtype))

    def batch_of(texts):
        """What DataCollatorForSeq2Seq makes of (prompt, answer) pairs, on the device."""
        pad = lambda rows, value: pad_sequence([torch.tensor(x) for x in rows], True, value).to(args.device)
        return {"input_ids": pad([prompt + answer for prompt, answer in texts], 0),
                "attention_mask": pad([[1] * len(prompt + answer) for prompt, answer in texts], 0),
                "labels": pad([[-100] * len(prompt) + answer for prompt, answer in texts], -100)}

    def fit(steps):
        optimizer, losses = torch.optim.Adam(parameters, lr=LEARNING_RATE), []
        generator, order = torch.Generator().manual_seed(args.seed), []
        while len(order) < steps:
            order += torch.randperm(len(questions), generator=generator).split(args.batch_size)
        for step, batch in enumerate(order[:steps]):
            loss = model(**batch_of([(questions[i].prompt, questions[i].completion) for i in batch])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
            optimizer.step()
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def evaluate(questions):
        texts = [(q.prompt, choice) for q in questions for choice in q.choices]
        for values in scoring.arm_values(parameters, seed=0).values():  # base, random, trained
            scoring.set_parameters(parameters, values)
            totals = []
            for first in range(0, len(texts), args.batch_size):
                batch = batch_of(texts[first:first + args.batch_size])
                labels = batch.pop("labels")[:, 1:]
                log_probs = model(**batch).logits[:, :-1].float().log_softmax(-1)
                chosen = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
                totals.append((chosen * (labels != -100)).sum(1))
            totals = torch.cat(totals).split([len(q.choices) for q in questions])
        return statistics.mean(found.softmax(0)[q.answer].item() for found, q in zip(totals, questions))
    return parameters, fit, evaluate


# ---------------------------------------- measuring


def measure(args, work):
    """What a measuring process does; prints one line of JSON."""
    questions = make_questions(args, work)
    parameters, fit, evaluate = (ours if args.side == "ours" else theirs)(args, work, questions)

    def run(steps, count):
        generator = torch.Generator().manual_seed(args.seed)
        values = [0.02 * torch.randn(p.shape, generator=generator) for p in parameters]
        scoring.set_parameters(parameters, values)
        if work == "evaluation":
            return evaluate(questions[:count])
        return statistics.mean(fit(steps)[-max(1, steps // 10):])  # as in train.py's results

    run(1, 1)  # warms up
    before = peak_memory(args.device, reset=True)  # the weights, read in full by now
    begin, begin_cpu = time.perf_counter(), time.process_time()
    found = {"agreed": run(args.epochs * math.ceil(len(questions) / args.batch_size), len(questions))}
    found |= {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - begin_cpu}
    found |= {"memory": peak_memory(args.device) - before, "rate": matrix_rate(args, questions)}
    print(json.dumps(found))


def peak_memory(device, reset=False):
    """Bytes in use at most since the last reset."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as free
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def matrix_rate(args, questions):
    """Floating-point operations a second in the MLP's matrix product of a batch's tokens: the best of ten."""
    config, dtype = Config.from_pretrained(args.folder), getattr(torch, args.dtype)
    tokens = args.batch_size * sum(len(q.prompt) for q in questions) // len(questions)
    x = torch.randn(tokens, config.hidden_size, device=args.device, dtype=dtype)
    weight = torch.randn(config.intermediate_size, config.hidden_size, device=args.device, dtype=dtype)
    seconds = timeit.repeat(lambda: (x @ weight.T).sum().item(), number=1, repeat=10)  # .item() awaits a GPU
    return 2 * x.numel() * len(weight) / min(seconds)


def start_process(args, work, side):
    command = [sys.executable, __file__]
    for name, value in {**vars(args), "work": work, "side": side, "scaling": False}.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {side}, {work}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def arithmetic(args, work, questions):
    """(tokens of all texts, nodes in the trees of our batches of them, floating-point operations in all).

    Operations: two for each weight and node, as many again backwards. Frozen blocks once; of the last block
    only keys and values at all nodes. Attention's scores, a few per cent at these lengths, the norms and the
    LoRA itself are left out.
    """
    scored, config = work == "evaluation", Config.from_pretrained(args.folder)
    tree = make_tree(questions, [q.choices if scored else [q.completion] for q in questions])
    batches = torch.arange(len(tree.rows) if scored else len(questions)).split(args.batch_size)
    if scored:  # of rows, as score_arms takes them
        batches = [torch.isin(tree.row_of, rows).nonzero()[:, 0] for rows in batches]
    parts = [tree.select(texts)[1] for texts in batches]
    nodes, used = len(tree.tokens), sum(len(part.tokens) for part in parts)
    predict = sum(len(part.predicting[part.answers >= 0].unique()) for part in parts)

    d, D, above = config.hidden_size, config.head_dim, config.num_hidden_layers - args.layer - 1
    key_value, inner = 2 * d * config.num_key_value_heads * D, d * config.intermediate_size
    block = 2 * d * config.num_attention_heads * D + key_value + (3 if config.gated_mlp else 2) * inner
    after = config.vocab_size * d * predict
    if above > 0:
        after += (above - 1) * block * used + key_value * used + (block - key_value) * predict
    if scored:  # three arms
        weights = (args.layer + 1) * block * used + 3 * after
    elif work == "vector":
        weights = (args.layer + 1) * block * nodes + args.epochs * 2 * after
    else:  # its block is run every time, but backwards only from its output to the MLP's inner activations
        weights = args.layer * block * nodes + args.epochs * ((block + inner) * used + 2 * after)
    return tree.lengths.sum().item(), used, 2 * weights


def compare(args, work):
    """Print one table: the two sides in turn, `repeats` times."""
    questions, runs = make_questions(args, work), {"ours": [], "theirs": []}
    for _ in range(args.repeats):
        for side in runs:
            runs[side].append(start_process(args, work, side))
    a, b = (runs[side][0]["agreed"] for side in runs)
    if abs(a - b) > (1e-4 if args.dtype == "float32" else 0.05) * abs(b):
        sys.exit(f"error: {work}: not the same work: ours finds {a}, theirs {b}")
    tokens, used, flops = arithmetic(args, work, questions)
    print(f"\n{work}: {len(questions)} questions, {tokens} tokens, ours computes {used / tokens:.2f} of it; "
          f"both find {a:.5f}\n  {'median (range)':20}{'ours':>28}{'theirs':>28}{'ours / theirs':>28}")
    times = 3 if work == "evaluation" else args.epochs  # three arms
    rows = {"examples / s": lambda run: len(questions) * times / run["seconds"],
            "tokens / s": lambda run: tokens * times / run["seconds"],
            "processor seconds": lambda run: run["cpu"],  # says more if other programs run beside it
            "MiB beyond weights": lambda run: run["memory"] / 2 ** 20}
    for name, figure in rows.items():
        mine, other = ([figure(run) for run in runs[side]] for side in runs)
        columns = mine, other, [x / y for x, y in zip(mine, other)]
        cells = [f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in columns]
        print(f"  {name:20}" + "".join(f"{cell:>28}" for cell in cells))
    rate = max(run["rate"] for run in runs["ours"])
    seconds = statistics.median(run["seconds"] for run in runs["ours"])
    print(f"  the arithmetic: {flops / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s (measured) = "
          f"{flops / rate:.2f} s; ours took {seconds:.2f} s, {seconds * rate / flops:.2f} times that")


def show_scaling(args, small, growth):
    """What training a vector in a random Qwen 2 takes: `small`, with one of its sizes varied at a time."""
    print(f"else {small}, {args.epochs} epochs, batch {args.batch_size}, {args.device}, {args.dtype}, the "
          f"frozen part counted in\n{'':18}{'ms a step':>12}{'by arithmetic':>16}{'MiB beyond weights':>22}")
    for name, value in [(name, value) for name, values in growth.items() for value in values]:
        middle = {"layer": value // 2} if name == "depth" else {}
        width, depth, args.layer, args.examples = {**small, **middle, name: value}.values()
        sizes = 2048, width, 3 * width, depth, width // 32, width // 32
        with tempfile.TemporaryDirectory() as args.folder:
            make_checkpoint(args, QWEN | dict(zip(SIZES, sizes)))
            run = start_process(args, "vector", "ours")
            flops = arithmetic(args, "vector", make_questions(args, "vector"))[2]
        steps = args.epochs * math.ceil(args.examples / args.batch_size) / 1000
        figures = run["seconds"] / steps, flops / run["rate"] / steps, run["memory"] / 2 ** 20
        print("{:10}{:8}{:12.1f}{:16.1f}{:22.1f}".format(name, value, *figures), flush=True)


def main():
    args = parse_args()
    if args.side:
        return measure(args, args.work[0])
    if args.scaling:
        return show_scaling(args, {"width": 256, "depth": 8, "layer": 4, "examples": 64}, {
            "width": [128, 256, 512, 1024], "depth": [4, 8, 16, 32], "layer": [-1, 2, 4, 7],
            "examples": [32, 64, 128, 256]})
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or temporary
        if not (Path(args.folder) / "config.json").exists():
            make_checkpoint(args, SHAPES[args.shape])
        layers = Config.from_pretrained(args.folder).num_hidden_layers
        args.layer = layers // 2 if args.layer is None else args.layer
        where = args.device if args.device == "cpu" else torch.cuda.get_device_name()
        print(f"{args.shape} at random, layer {args.layer} of {layers}, {args.dtype}, {where}, "
              f"{torch.get_num_threads()} threads, torch {torch.__version__}; {args.texts} texts, "
              f"batch {args.batch_size}, {args.epochs} epochs, {args.repeats} repeats")
        for work in args.work:
            compare(args, work)


if __name__ == "__main__":
    main()
