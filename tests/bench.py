"""Ours against transformers (and peft) on the same work: seconds, examples and tokens a second, memory.

    python tests/bench.py                            GPT-2 small's shape, 16 minutes on two CPU cores
    python tests/bench.py --shape qwen2.5-0.5b       the others: qwen2.5-7b, gemma-3-12b (with --device cuda)
    python tests/bench.py --scaling [FIGURE.png]     ours alone: how cost grows, and Gemma 3 12B on paper

Both sides get the same random weights (made by transformers, loaded by us), data, batches, dtype and number of Adam
steps. Theirs is what a user would write: a forward hook that adds the vector, or peft; batches padded as
DataCollatorForSeq2Seq does, labels of -100, a forward pass over all positions; in evaluation one row for each answer
choice. Each measurement is a process of its own, the two sides in turn. Linux only: peak memory is read from /proc.
"""

import argparse
import ctypes
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import eval as scoring  # noqa: E402
import train  # noqa: E402
from data import EncodedQuestion  # noqa: E402
from lora import add_lora  # noqa: E402
from model import GPT, Config  # noqa: E402
from steer import attach  # noqa: E402

QWEN = dict(model_type="qwen2", rope_theta=1e6, max_position_embeddings=32768)
SHAPES = {  # config.json of the published checkpoints, as far as it matters here
    "gpt2": dict(model_type="gpt2"),
    "qwen2.5-0.5b": dict(QWEN, vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2.5-7b": dict(QWEN, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                       num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False),
    "gemma-3-12b": dict(model_type="gemma3_text", vocab_size=262208, hidden_size=3840, intermediate_size=15360,
                        num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8, head_dim=256,
                        sliding_window=1024, query_pre_attn_scalar=256),
}
MODULES = ["gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LEARNING_RATE = 8, 8.0, 1e-3


def parse_args():
    parser = argparse.ArgumentParser(description="Speed and memory against transformers and peft.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="gpt2")
    add("--work", nargs="+", choices=["vector", "lora", "evaluation"], default=["vector", "lora", "evaluation"])
    add("--examples", type=int, default=32)
    add("--prompt-tokens", type=int, nargs=2, default=[40, 80], metavar=("MIN", "MAX"))
    add("--template-tokens", type=int, default=0, help="the first so many are the same in all, as a chat template's")
    add("--batch-size", type=int, default=16)
    add("--epochs", type=int, default=3)
    add("--repeats", type=int, default=3)
    add("--layer", type=int, help="default: the middle one")
    add("--device", default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    add("--scaling", nargs="?", const="", metavar="FIGURE.png", help="measure how the cost of training a vector grows")
    add("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)  # a measuring process, started by the command
    add("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def make_questions(args, vocab_size: int) -> list[EncodedQuestion]:
    """Random tokens: a prompt, and as the answer one of four choices of one to three tokens, and an end mark."""
    rng, questions = random.Random(0), []
    ids = lambda count: [rng.randrange(1, vocab_size) for _ in range(count)]
    for _ in range(args.examples):
        prompt, choices = ids(rng.randint(*args.prompt_tokens)), [ids(rng.randint(1, 3)) for _ in range(4)]
        prompt[:args.template_tokens] = range(1, args.template_tokens + 1)
        questions.append(EncodedQuestion(prompt, choices, 0, choices[0] + [0], None))
    return questions


def initial_values(shapes, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.02 * torch.randn(shape, generator=generator) for shape in shapes]


# ---------------------------------------------------------------------------------------------------- the two sides
# Each makes a model, loaded and frozen, and returns run(steps) -> a number that both sides must agree on.


def ours(args, work: str, questions):
    model = GPT.from_pretrained(args.folder, args.device, getattr(torch, args.dtype))
    if work == "lora":
        steering, parameters = None, add_lora(model, [args.layer], MODULES, RANK, ALPHA)
    else:
        steering = attach(model, args.layer)
        parameters = [steering.vector]
    flags = SimpleNamespace(mode=work, layer=args.layer, lr=LEARNING_RATE, steps=0, batch_size=args.batch_size, seed=0,
                            device=args.device, keep_gb=4.0, save_every=None, resume=False, shard=False)

    def run(steps):
        values = [value.to(args.device) for value in initial_values([p.shape for p in parameters])]
        scoring.set_parameters(parameters, values)
        if work == "evaluation":
            arms = scoring.arm_values(parameters, seed=0)
            scores = scoring.score_arms(model, questions[:steps], steering, parameters, arms, args.batch_size)
            return scores["trained"][1].mean().item()
        flags.steps = steps
        return train.train_loop(flags, model, questions, parameters, steering)
    return run


def theirs(args, work: str, questions):
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).requires_grad_(False).eval()
    if work == "lora":
        import peft
        is_gpt2 = model.config.model_type == "gpt2"
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, layers_to_transform=[args.layer], fan_in_fan_out=is_gpt2,
                                 target_modules=["mlp.c_fc", "mlp.c_proj"] if is_gpt2 else MODULES)
        model = peft.get_peft_model(model, config)
        parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    else:
        vector = torch.nn.Parameter(torch.zeros(model.config.hidden_size, device=args.device))
        parameters = [vector]
        base = model.base_model
        block = (base.h if hasattr(base, "h") else base.layers)[args.layer]
        add = lambda x: x + vector.to(x.dtype)
        block.register_forward_hook(lambda module, inputs, output: (add(output[0]), *output[1:])
                                    if isinstance(output, tuple) else add(output))

    def batch_of(ids, labels):
        """What DataCollatorForSeq2Seq makes of a list of examples, on the device."""
        pad = lambda rows, value: pad_sequence([torch.tensor(row) for row in rows], True, value).to(args.device)
        mask = pad([[1] * len(row) for row in ids], 0)
        return {"input_ids": pad(ids, 0), "attention_mask": mask, "labels": pad(labels, -100)}

    def fit(steps):
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        generator, batches, losses = torch.Generator().manual_seed(0), [], []
        for _ in range(steps):
            batches = batches or list(torch.randperm(len(questions), generator=generator).split(args.batch_size))
            rows = [questions[i] for i in batches.pop(0).tolist()]
            ids = [q.prompt + q.completion for q in rows]
            loss = model(**batch_of(ids, [[-100] * len(q.prompt) + q.completion for q in rows])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return statistics.mean(losses[-max(1, steps // 10):])

    @torch.no_grad()
    def evaluate(questions):
        rows = [(q.prompt, choice) for q in questions for choice in q.choices]
        for values in scoring.arm_values(parameters, seed=0).values():  # base, random, trained
            scoring.set_parameters(parameters, values)
            totals = []
            for first in range(0, len(rows), args.batch_size):
                part = rows[first:first + args.batch_size]
                batch = batch_of([p + c for p, c in part], [[-100] * len(p) + c for p, c in part])
                labels = batch.pop("labels")[:, 1:]
                log_probs = model(**batch).logits[:, :-1].float().log_softmax(-1)
                chosen = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
                totals.append((chosen * (labels != -100)).sum(1))
            probability = torch.cat(totals).view(-1, 4).softmax(1)[:, 0]
        return probability.mean().item()

    def run(steps):
        values = [value.to(args.device) for value in initial_values([p.shape for p in parameters])]
        scoring.set_parameters(parameters, values)
        return evaluate(questions[:steps]) if work == "evaluation" else fit(steps)
    return run


# ---------------------------------------------------------------------------------------------------- measuring


def memory(device: str, key: str) -> int:
    """Bytes in use ("now") or at most since reset_peak ("peak")."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated() if key == "now" else torch.cuda.max_memory_allocated()
    name = {"now": "VmRSS:", "peak": "VmHWM:"}[key]
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        return torch.cuda.reset_peak_memory_stats()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as free
    Path("/proc/self/clear_refs").write_text("5")


def matrix_rate(args, config: Config) -> float:
    """Floating-point operations a second in the MLP's matrix product, at the batch's size: the best of ten."""
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    tokens = args.batch_size * sum(args.prompt_tokens) // 2
    x = torch.randn(tokens, config.hidden_size, **options)
    weight = torch.randn(config.intermediate_size, config.hidden_size, **options)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        (x @ weight.T).sum().item()  # .item() waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return 2 * x.numel() * len(weight) / min(seconds)


def unavoidable_flops(args, config: Config, work: str, questions) -> float:
    """Floating-point operations of our way of doing it: two for each weight and token, as many again backwards.

    Frozen blocks once; of the last block only keys and values at all positions. Attention's scores, a few per cent at
    these lengths, the norms, the LoRA itself and what --template-tokens saves are left out.
    """
    d, D, n = config.hidden_size, config.head_dim, config.num_hidden_layers
    key_value = 2 * d * config.num_key_value_heads * D
    mlp = (3 if config.gated_mlp else 2) * d * config.intermediate_size
    block = 2 * d * config.num_attention_heads * D + key_value + mlp
    head = config.vocab_size * d
    if work == "evaluation":  # prompts, and the later tokens of the choices; three arms
        prompt, ends = sum(len(q.prompt) for q in questions), len(questions)
        later = sum(len(choice) - 1 for q in questions for choice in q.choices)
        once = (args.layer + 1) * block * prompt
        each = (n - args.layer - 2) * block * prompt + key_value * prompt + (block - key_value + head) * ends
        return 2 * (once + 3 * each + 3 * (n * block + head) * later)
    tokens = sum(len(q.prompt) + len(q.completion) - 1 for q in questions)
    ends = sum(len(q.completion) for q in questions)
    above = (n - args.layer - 2) * block * tokens + key_value * tokens + (block - key_value + head) * ends
    if work == "vector":
        return 2 * ((args.layer + 1) * block * tokens + args.epochs * 2 * above)
    # The LoRA's block is run every time, but backwards only from its output to the MLP's inner activations.
    own = (block + d * config.intermediate_size) * tokens
    return 2 * (args.layer * block * tokens + args.epochs * (own + 2 * above))


def measure(args, work: str) -> None:
    """What a measuring process does; prints one line of JSON."""
    config = Config.from_pretrained(args.folder)
    questions = make_questions(args, config.vocab_size)
    run = {"ours": ours, "theirs": theirs}[args.side](args, work, questions)
    steps = args.epochs * -(-args.examples // args.batch_size)
    agreed = run(args.batch_size if work == "evaluation" else 1)  # warms up too
    reset_peak(args.device)
    before = memory(args.device, "now")  # the weights, read in full by now
    begin, begin_cpu = time.perf_counter(), time.process_time()
    run(args.examples if work == "evaluation" else steps)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    print(json.dumps({"agreed": agreed, "seconds": seconds, "cpu": cpu, "memory": memory(args.device, "peak") - before,
                      "rate": matrix_rate(args, config) if args.side == "ours" else None}))


def start_process(args, work: str, side: str) -> dict:
    flags = {"--work": work, "--side": side, "--folder": args.folder, "--device": args.device, "--dtype": args.dtype,
             "--examples": args.examples, "--batch-size": args.batch_size, "--epochs": args.epochs,
             "--layer": args.layer, "--template-tokens": args.template_tokens}
    command = [sys.executable, __file__, *(str(x) for pair in flags.items() for x in pair)]
    command += ["--prompt-tokens", *map(str, args.prompt_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {side}, {work}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def compare(args, config: Config, work: str) -> None:
    """Print one table: the two sides in turn, `repeats` times."""
    runs = {"ours": [], "theirs": []}
    for repeat in range(args.repeats):
        for side in runs:
            runs[side].append(start_process(args, work, side))
        a, b = runs["ours"][-1]["agreed"], runs["theirs"][-1]["agreed"]
        if abs(a - b) > (1e-4 if args.dtype == "float32" else 0.05) * abs(b):
            sys.exit(f"error: {work}: not the same work: ours gives {a}, theirs {b} on the first batch")
        if repeat == 0:
            what = "probability of the right choice" if work == "evaluation" else "loss"
            print(f"\n{work}: {what} on the first batch {a:.6f} ours, {b:.6f} theirs")
    questions = make_questions(args, config.vocab_size)
    times = 3 if work == "evaluation" else args.epochs  # three arms
    tokens = sum(len(q.prompt) + len(q.completion) for q in questions) * times
    print(f"  {'median (range)':20}{'ours':>26}{'theirs':>26}{'ours / theirs':>26}")
    rows = {"examples / s": lambda run: args.examples * times / run["seconds"],
            "tokens / s": lambda run: tokens / run["seconds"],
            # These count what other programs on the machine do not take; where nothing else runs they add nothing.
            "processor seconds": lambda run: run["cpu"],
            "MiB beyond weights": lambda run: run["memory"] / 2 ** 20}
    for name, figure in rows.items():
        sides = [[figure(run) for run in runs[side]] for side in runs]
        ratio = spread([x / y for x, y in zip(*sides)])
        print(f"  {name:20}{spread(sides[0]):>26}{spread(sides[1]):>26}{ratio:>26}")
    flops, rate = unavoidable_flops(args, config, work, questions), max(run["rate"] for run in runs["ours"])
    seconds = statistics.median(run["seconds"] for run in runs["ours"])
    print(f"  the arithmetic: {flops / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s (measured) = {flops / rate:.2f} s; "
          f"ours took {seconds:.2f} s, {seconds * rate / flops:.2f} times that")


def make_checkpoint(args, folder: str) -> None:
    """Random weights in the shape that was asked for, written by transformers."""
    import transformers
    raw = dict(SHAPES[args.shape])
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model.save_pretrained(folder, max_shard_size="2GB")


# ---------------------------------------------------------------------------------------------------- how cost grows

SMALL = {"width": 256, "depth": 8, "layer": 4, "examples": 64}  # varied one at a time
GROWTH = {"width": [128, 256, 512, 1024], "depth": [4, 8, 16, 32], "layer": [-1, 2, 4, 7],
          "examples": [32, 64, 128, 256]}


def show_scaling(args) -> None:
    """Print, and draw if asked, seconds a step and memory against each of GROWTH; then the paper's model on paper."""
    print(f"{'':10}{'':>8}{'ms a step':>12}{'by arithmetic':>16}{'MiB beyond weights':>22}")
    measured = {}
    for name, values in GROWTH.items():
        for value in values:
            shape = dict(SMALL, **{name: value})
            if name == "depth":
                shape["layer"] = value // 2
            milliseconds, least, mib = measure_shape(args, **shape)
            measured.setdefault(name, []).append((milliseconds, mib))
            print(f"{name:10}{value:8}{milliseconds:12.1f}{least:16.1f}{mib:22.1f}", flush=True)
    print(f"({args.epochs} epochs, batch {args.batch_size}, {args.prompt_tokens[0]} to {args.prompt_tokens[1]} tokens, "
          f"{args.device}, {args.dtype}; else {SMALL}; computing and keeping the frozen part is counted in)")
    if args.scaling:
        draw_scaling(measured, args.scaling)
    print_paper_arithmetic()


def measure_shape(args, width: int, depth: int, layer: int, examples: int) -> tuple[float, float, float]:
    """(milliseconds a step, the same by arithmetic, MiB beyond the weights) of a vector in a random Qwen 3."""
    raw = dict(train.TINY, vocab_size=2048, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth,
               num_attention_heads=width // 32, num_key_value_heads=width // 32)
    with tempfile.TemporaryDirectory() as folder:
        GPT(Config.from_dict(raw)).save_pretrained(folder)
        point = SimpleNamespace(**dict(vars(args), folder=folder, layer=layer, examples=examples))
        result, config = start_process(point, "vector", "ours"), Config.from_pretrained(folder)
    steps = args.epochs * -(-examples // args.batch_size)
    least = unavoidable_flops(point, config, "vector", make_questions(point, 2048)) / result["rate"]
    return 1000 * result["seconds"] / steps, 1000 * least / steps, result["memory"] / 2 ** 20


def draw_scaling(measured: dict, path: str) -> None:
    figure, axes = scoring.load_pyplot().subplots(2, len(GROWTH), figsize=(11, 4.5), sharey="row")
    for column, (name, values) in enumerate(GROWTH.items()):
        for row, label in enumerate(("ms a step", "MiB beyond weights")):
            axes[row, column].plot(values, [point[row] for point in measured[name]], marker="o")
            axes[row, column].set(xlabel=name if row else None, ylabel=None if column else label, yscale="log")
            if name != "layer":
                axes[row, column].set_xscale("log", base=2)
    figure.savefig(path, dpi=130)


def print_paper_arithmetic() -> None:
    """Gemma 3 12B, 1,000 examples, 3 epochs, one vector at layer 22, on one H100: from its config's numbers alone."""
    config, tokens, answer = Config.from_dict(SHAPES["gemma-3-12b"]), 100, 2
    rate, used, batch = 989e12, 0.4, 16
    d, D, heads, n = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_hidden_layers
    block = 2 * d * D * (heads + config.num_key_value_heads) + 3 * d * config.intermediate_size
    weights = n * block + config.vocab_size * d
    question = EncodedQuestion([0] * (tokens - answer + 1), [], 0, [0] * answer, None)
    paper = SimpleNamespace(layer=22, epochs=3)
    flops = unavoidable_flops(paper, config, "vector", [question] * 1000)
    # Bytes kept for the backward pass, for each token and block above: four norms' inputs in float32 and outputs,
    # queries and keys around their norms and rope, values, attention's output, and four tensors of the MLP's width.
    saved = 6 * 4 * d + 12 * D * (heads + config.num_key_value_heads) + 2 * D * (config.num_key_value_heads + 2 * heads)
    saved += 2 * 4 * config.intermediate_size
    activations = (n - 23) * saved * batch * tokens
    kept = 1000 * tokens * d * 2
    print(f"\nOn paper, not run: Gemma 3 12B in bfloat16, 1,000 examples of {tokens} tokens, answers of {answer}, "
          f"3 epochs, batch {batch}, a vector at layer 22 of {n}:\n"
          f"  {flops / 1e15:.1f} PFLOP; at {used:.0%} of an H100's {rate / 1e12:.0f} TFLOP/s "
          f"{flops / rate / used:.0f} s\n"
          f"  weights {weights * 2 / 1e9:.1f} GB + frozen residuals kept {kept / 1e9:.2f} GB + activations of a batch "
          f"{activations / 1e9:.1f} GB = {(2 * weights + kept + activations) / 1e9:.0f} GB of 80")


def main() -> None:
    args = parse_args()
    if args.side:
        return measure(args, args.work[0])
    if args.scaling is not None:
        return show_scaling(args)
    with tempfile.TemporaryDirectory() as args.folder:
        make_checkpoint(args, args.folder)
        config = Config.from_pretrained(args.folder)
        args.layer = config.num_hidden_layers // 2 if args.layer is None else args.layer
        where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
        print(f"{args.shape} at random, layer {args.layer} of {config.num_hidden_layers}, {args.dtype}, {args.device} "
              f"({where}), torch {torch.__version__}; {args.examples} examples of {args.prompt_tokens[0]} to "
              f"{args.prompt_tokens[1]} tokens ({args.template_tokens} the same in all), batch "
              f"{args.batch_size}, {args.epochs} epochs, {args.repeats} repeats")
        for work in args.work:
            compare(args, config, work)


if __name__ == "__main__":
    main()
