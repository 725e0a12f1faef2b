"""Ours against transformers (and peft) on the same work: examples and tokens a second, memory.

python tests/bench.py                        GPT-2 small's shape, random texts
python tests/bench.py --texts tasks          the four tasks' questions, in a chat template
python tests/bench.py --shape qwen2.5-0.5b   another shape
python tests/bench.py --checkpoint DIR --texts tasks       real weights, in their own chat template

Both get the same weights, questions, batches, dtype and Adam steps. Theirs is what a user would
write: a forward hook that adds the vector, or peft; batches padded as DataCollatorForSeq2Seq does,
labels of -100, a forward pass over all positions; in evaluation a row for each answer choice. Each
measurement is a process of its own, the two sides in turn. On a CPU it needs Linux: peak memory is
read from /proc. For several models on a GPU, in one process, there is bench_cuda.py.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import train  # noqa: E402
from data import (  # noqa: E402
    TASKS,
    EncodedQuestion,
    Tokenizer,
    concepts,
    encode_question,
    make_task,
    make_tree,
    pad,
)
from eval import MOST_NODES, arm_values, score_arms, set_parameters  # noqa: E402
from lora import add_lora, remove_lora  # noqa: E402
from model import GPT, Config  # noqa: E402
from steer import attach, detach  # noqa: E402

SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
]


def sizes(*numbers):
    return dict(zip(SIZES, numbers))


QWEN = {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True}
GEMMA = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "sliding_window": 1024,
    "query_pre_attn_scalar": 256,
}
SHAPES = {  # config.json of published checkpoints, as far as it matters here
    "test": QWEN | sizes(3000, 64, 128, 2, 4, 2),  # to try this file
    "gpt2": {"model_type": "gpt2"},
    "qwen2.5-0.5b": QWEN | sizes(151936, 896, 4864, 24, 14, 2),
    "qwen2.5-7b": QWEN | sizes(152064, 3584, 18944, 28, 28, 4) | {"tie_word_embeddings": False},
    "gemma-3-12b": GEMMA | sizes(262208, 3840, 15360, 48, 16, 8),
}
# As long as Qwen 2.5's with its system message, in tiny's tokens: 24 before a question, 5 after it.
TEMPLATE = (
    "{{ bos_token }} You are prudent and careful. You like people. Name the number, or one word."
    "{{ eos_token }}\n"
    "{% for m in messages %}{{ bos_token }}\n"
    "{{ '<|' + m.role + '|> ' + m.content }}{{ eos_token }}\n{% endfor %}"
    "{{ bos_token + '\n<|assistant|>' if add_generation_prompt }}"
)
WORK = ["vector", "lora", "evaluation"]
MODULES = ["gate_proj", "up_proj", "down_proj"]
RANK = 8
ALPHA = 8.0
LEARNING_RATE = 1e-3
START = 0.02  # the standard deviation of a vector or LoRA at the start
ARMS = 3  # base, random and trained


def parse_args(words=None):
    parser = argparse.ArgumentParser(description="Speed and memory against transformers and peft.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="gpt2", help="of random weights (default: gpt2)")
    add("--checkpoint", help="a folder of real weights instead")
    add("--work", nargs="+", choices=WORK, default=WORK)
    add("--texts", choices=["random", "tasks"], default="random")
    add("--examples", type=int, help="default: 32 random ones; 64 of the tasks, 16 to evaluate")
    add("--prompt-tokens", type=int, nargs=2, default=[40, 80], metavar=("MIN", "MAX"))
    add("--template-tokens", type=int, default=0, help="so many begin all random prompts alike")
    add("--batch-size", type=int, default=16)
    add("--epochs", type=int, default=3)
    add("--repeats", type=int, default=3)
    add("--layer", type=int, help="default: the middle one")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    add("--process", help=argparse.SUPPRESS)  # the flags of a measuring process, as JSON
    args = parser.parse_args(words)
    if args.dtype is None:
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    args.world = "large" if args.checkpoint else "tiny"  # what such a model is asked about
    if args.examples is None:
        args.examples = 32 if args.texts == "random" else 64
    return args


# ---- the same weights and questions for both sides


def make_folder(folder: str | Path, shape: dict):
    """Writes config.json and tiny's tokenizer; returns transformers' config."""
    config = AutoConfig.for_model(**shape)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # its ids are in any larger vocabulary
        shutil.copy(ROOT / "tiny" / name, folder)
    (Path(folder) / "chat_template.jinja").write_text(TEMPLATE)
    return config


def random_model(config, args):
    """transformers' model of this config, with random weights, made on the device."""
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_checkpoint(args):
    config = make_folder(args.checkpoint, SHAPES[args.shape])
    random_model(config, args).save_pretrained(args.checkpoint, max_shard_size="2GB")


def make_questions(args, work: str) -> list[EncodedQuestion]:
    """What both sides are asked. The vector is added at every token, as a plain hook does."""
    if args.texts == "tasks":
        return task_questions(args, work)
    return random_questions(args)


def task_questions(args, work):
    """As many of each task: trained on or, for an evaluation, a quarter as many held out."""
    rng = random.Random(args.seed)
    questions = []
    for name in TASKS:
        task = make_task(name, concepts(name, args.world)[0], world=args.world)
        pool = task.train
        count = args.examples // len(TASKS)
        if work == "evaluation":
            pool = list(chain(*task.held_out.values()))
            count = max(1, count // 4)
        questions += rng.sample(pool, min(count, len(pool)))

    rng.shuffle(questions)
    tokenizer = Tokenizer.from_pretrained(args.checkpoint)
    encoded = [encode_question(tokenizer, question) for question in questions]
    return [replace(question, steered_at=None) for question in encoded]


def random_questions(args):
    """Random tokens: a prompt, and four choices of one to three tokens each."""
    rng = random.Random(args.seed)
    vocab_size = Config.from_pretrained(args.checkpoint).vocab_size

    def ids(count):
        return [rng.randrange(1, vocab_size) for _ in range(count)]

    questions = []
    for _ in range(args.examples):
        prompt = ids(rng.randint(*args.prompt_tokens))
        prompt[: args.template_tokens] = range(1, args.template_tokens + 1)
        choices = [ids(rng.randint(1, 3)) for _ in range(4)]
        completion = [*choices[0], 0]  # 0 stands for the end of the turn
        questions.append(EncodedQuestion(prompt, choices, 0, completion, None))
    return questions


# ---- the two sides
#
# Each puts a vector or a LoRA on a frozen model. fit(EncodedQuestions, steps) returns each step's
# loss, evaluate(EncodedQuestions) the mean probability of the right choice: both sides have to find
# the same numbers.


def loop_flags(args, steps):
    """What train_loop reads. In mode "vector" the rate would be in units of the residual stream."""
    flags = {"mode": "lora", "lr": LEARNING_RATE, "save_every": None, "resume": False, "out": ""}
    return argparse.Namespace(**vars(args), **flags, steps=steps)


class Ours:
    def __init__(self, args, work: str, model=None):
        dtype = getattr(torch, args.dtype)
        self.args = args
        self.model = model or GPT.from_pretrained(args.checkpoint, args.device, dtype)
        if work == "lora":
            gated = self.model.config.gated_mlp
            modules = MODULES if gated else MODULES[1:]  # GPT-2 has no gate_proj
            self.parameters = add_lora(self.model, [args.layer], modules, RANK, ALPHA)
        else:
            self.parameters = [attach(self.model, args.layer).vector]

    def fit(self, questions, steps):
        flags = loop_flags(self.args, steps)
        return train.train_loop(flags, self.model, questions, self.parameters)

    def evaluate(self, questions):
        arms = arm_values(self.parameters, seed=0)
        scores = score_arms(self.model, questions, self.parameters, arms)
        _, probability = scores["trained"]
        return probability.mean().item()

    def remove(self):
        detach(self.model)
        remove_lora(self.model)


class Theirs:
    def __init__(self, args, work: str, model=None):
        self.args = args
        if model is None:
            dtype = getattr(torch, args.dtype)
            model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=dtype)
            model.to(args.device)
        self.model = model.requires_grad_(False).eval()
        if work == "lora":
            self.add_lora()
        else:
            self.add_hook()

    def add_hook(self):
        base = self.model.base_model
        blocks = base.h if hasattr(base, "h") else base.layers
        vector = nn.Parameter(torch.zeros(self.model.config.hidden_size, device=self.args.device))

        def hook(module, inputs, output):
            return output + vector.to(output.dtype)

        self.remove = blocks[self.args.layer].register_forward_hook(hook).remove
        self.parameters = [vector]

    def add_lora(self):
        import peft

        gpt2 = self.model.config.model_type == "gpt2"
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            layers_to_transform=[self.args.layer],
            target_modules=["mlp.c_fc", "mlp.c_proj"] if gpt2 else MODULES,
            fan_in_fan_out=gpt2,
        )
        self.model = peft.get_peft_model(self.model, config)
        self.remove = self.model.unload
        named = self.model.named_parameters()
        self.parameters = [parameter for name, parameter in named if "lora_" in name]

    def batch_of(self, texts):
        """What DataCollatorForSeq2Seq makes of (prompt, answer) pairs, on the device."""
        tokens = pad([prompt + answer for prompt, answer in texts])  # (texts, T), -1 after the last
        labels = pad([[-1] * len(prompt) + answer for prompt, answer in texts])
        batch = {
            "input_ids": tokens.clamp(min=0),
            "attention_mask": (tokens >= 0).long(),
            "labels": labels.masked_fill(labels < 0, -100),
        }
        return {name: tensor.to(self.args.device) for name, tensor in batch.items()}

    def fit(self, questions, steps):
        optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE)
        batches = train.draw_batches(len(questions), loop_flags(self.args, steps))
        losses = []
        for step, places in enumerate(batches[:steps]):
            texts = [(questions[i].prompt, questions[i].completion) for i in places]
            loss = self.model(**self.batch_of(texts)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
            optimizer.step()
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def evaluate(self, questions):
        texts = [(question.prompt, choice) for question in questions for choice in question.choices]
        counts = [len(question.choices) for question in questions]
        for values in arm_values(self.parameters, seed=0).values():  # the last is "trained"
            set_parameters(self.parameters, values)
            scores = []
            for first in range(0, len(texts), self.args.batch_size):
                scores.append(self.log_probs(texts[first : first + self.args.batch_size]))
            of_questions = torch.cat(scores).split(counts)

        probabilities = []
        for question, found in zip(questions, of_questions):
            right = found.softmax(0)[question.answer]
            probabilities.append(right.item())
        return statistics.mean(probabilities)

    def log_probs(self, texts):
        """Of each text's answer, (texts,)."""
        batch = self.batch_of(texts)
        labels = batch.pop("labels")[:, 1:]  # (texts, T - 1)
        logits = self.model(**batch).logits[:, :-1].float()
        places = labels.clamp(min=0)[..., None]
        of_labels = logits.log_softmax(-1).gather(-1, places)[..., 0]
        return (of_labels * (labels != -100)).sum(1)


SIDES = {"ours": Ours, "theirs": Theirs}


# ---- measuring


def start_values(args, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(args.seed)
    return [START * torch.randn(p.shape, generator=generator) for p in parameters]


def measured(args, work: str, side, questions: list[EncodedQuestion]) -> dict:
    """Does the work once, from the same start on both sides.

    seconds and cpu (processor seconds); memory: bytes beyond those in use before; agreed: what both
    sides have to find, a loss or a probability.
    """
    set_parameters(side.parameters, start_values(args, side.parameters))
    before = peak_memory(args.device, reset=True)
    began = time.perf_counter()
    began_cpu = time.process_time()

    if work == "evaluation":
        agreed = side.evaluate(questions)
    else:
        steps = args.epochs * math.ceil(len(questions) / args.batch_size)
        losses = side.fit(questions, steps)
        agreed = statistics.mean(losses[-max(1, steps // 10) :])  # as in train.py's results
    return {
        "agreed": agreed,
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - began_cpu,
        "memory": peak_memory(args.device) - before,
    }


def measuring_process(args):
    """Prints one line of JSON."""
    questions = make_questions(args, args.work)
    side = SIDES[args.side](args, args.work)
    measured(args, args.work, side, questions[:1])  # the weights are read in full only now
    found = measured(args, args.work, side, questions)
    found["rate"] = matrix_rate(args)
    print(json.dumps(found))


def start_process(args, work, side):
    flags = vars(args) | {"work": work, "side": side}
    command = [sys.executable, __file__, "--process", json.dumps(flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {side}, {work}: {done.stderr or 'killed'}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(device: str, reset: bool = False) -> int:
    """The most bytes in use since the last reset, after the device has done all it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()

    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as free
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def matrix_rate(args) -> float:
    """Operations a second in the MLP's matrix product of 1,024 tokens: the best of ten."""
    config = Config.from_pretrained(args.checkpoint)
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    x = torch.randn(1024, config.hidden_size, **options)
    weight = torch.randn(config.hidden_size, config.intermediate_size, **options)

    def product():
        return (x @ weight).sum().item()  # item() waits for a GPU

    seconds = timeit.repeat(product, number=1, repeat=10)
    return 2 * len(x) * weight.numel() / min(seconds)


# ---- what the arithmetic needs


def our_trees(args, questions, answers, whole: bool):
    """The trees that we run the questions in: batches, or (whole) as many at once as there are."""
    at_once = args.batch_size
    if whole:
        lengths = [len(q.prompt) + sum(map(len, texts)) for q, texts in zip(questions, answers)]
        at_once = max(1, MOST_NODES // max(lengths))
    parts = torch.arange(len(questions)).split(at_once)
    return [make_tree([questions[i] for i in part], [answers[i] for i in part]) for part in parts]


def arithmetic(args, work: str, questions: list[EncodedQuestion]) -> dict:
    """tokens of all texts, nodes in our trees of them, floating-point operations in all."""
    evaluation = work == "evaluation"
    answers = [q.choices if evaluation else [q.completion] for q in questions]
    tokens = 0
    for question, texts in zip(questions, answers):
        tokens += sum(len(question.prompt + text) - 1 for text in texts)

    frozen_trees = our_trees(args, questions, answers, whole=True)
    frozen_nodes = sum(len(tree.tokens) for tree in frozen_trees)
    nodes = 0
    predicting = 0
    for tree in our_trees(args, questions, answers, whole=evaluation):
        is_real = tree.answers >= 0
        nodes += len(tree.tokens)
        predicting += len(tree.predicts_from[is_real].unique())

    operations = count_operations(args, work, frozen_nodes, nodes, predicting)
    return {"tokens": tokens, "nodes": nodes, "operations": operations}


def count_operations(args, work, frozen_nodes, nodes, predicting):
    """Two for each weight and node, as many again backwards.

    Frozen blocks count once; of the last block only keys and values at all nodes. Attention's
    scores (a few per cent at these lengths), the norms and the LoRA itself are left out, and memory
    sets no limit.
    """
    config = Config.from_pretrained(args.checkpoint)
    block, inner, key_value = block_weights(config)
    above = config.num_hidden_layers - args.layer - 1
    after = config.vocab_size * config.hidden_size * predicting
    if above > 0:
        after += (above - 1) * block * nodes
        after += key_value * nodes + (block - key_value) * predicting

    frozen = (args.layer + 1) * block * frozen_nodes
    if work == "evaluation":
        products = frozen + ARMS * after
    elif work == "vector":
        products = frozen + args.epochs * 2 * after
    else:
        # The LoRA's own block runs every time, but backwards only from its output to the MLP's
        # inner activations.
        products = frozen - block * frozen_nodes
        products += args.epochs * ((block + inner) * nodes + 2 * after)
    return 2 * products


def block_weights(config):
    """The weights of a block; of one of its MLP's matrices; of its keys and values."""
    d = config.hidden_size
    inner = d * config.intermediate_size
    queries_and_output = 2 * d * config.num_attention_heads * config.head_dim
    key_value = 2 * d * config.num_key_value_heads * config.head_dim
    matrices = 3 if config.gated_mlp else 2
    return queries_and_output + key_value + matrices * inner, inner, key_value


# ---- tables


def same_found(args, runs: dict[str, list[dict]]) -> bool:
    """Did both sides find the same loss, or the same probability? Prints both."""
    ours = runs["ours"][0]["agreed"]
    theirs = runs["theirs"][0]["agreed"]
    tolerance = 1e-4 if args.dtype == "float32" else 0.05
    print(f"  ours finds {ours:.5f}, theirs {theirs:.5f}")
    return abs(ours - theirs) <= tolerance * abs(theirs)


def compare(args, work):
    """Measures the two sides in turn, and prints one table."""
    questions = make_questions(args, work)
    runs = {side: [] for side in SIDES}
    for _ in range(args.repeats):
        for side, found in runs.items():
            found.append(start_process(args, work, side))

    needed = arithmetic(args, work, questions)
    share = needed["nodes"] / needed["tokens"]
    print(f"\n{work}: {len(questions)} questions of {needed['tokens']} tokens, ", end="")
    print(f"of which ours computes {share:.2f}")
    if not same_found(args, runs):
        sys.exit(f"error: {work}: not the same work")
    print_table(args, work, runs, len(questions), needed["tokens"])
    print_arithmetic(runs["ours"], needed["operations"])


def print_table(args, work: str, runs: dict[str, list[dict]], examples: int, tokens: int):
    """Of each figure the median and range, ours beside theirs."""
    passes = ARMS if work == "evaluation" else args.epochs
    titles = "ours", "theirs", "ours / theirs"
    print(f"  {'median (range)':20}" + "".join(f"{title:>36}" for title in titles))

    def print_row(name, figure):
        ours = [figure(run) for run in runs["ours"]]
        theirs = [figure(run) for run in runs["theirs"]]
        ratios = [a / max(b, 1e-9) for a, b in zip(ours, theirs)]
        cells = [f"{spread(figures):>36}" for figures in (ours, theirs, ratios)]
        print(f"  {name:20}" + "".join(cells))

    print_row("examples / s", lambda run: passes * examples / run["seconds"])
    print_row("tokens / s", lambda run: passes * tokens / run["seconds"])
    # These say more than seconds where other programs run beside it.
    print_row("processor seconds", lambda run: run["cpu"])
    print_row("MiB beyond weights", lambda run: run["memory"] / 2**20)


def spread(figures):
    return f"{statistics.median(figures):.2f} ({min(figures):.2f} to {max(figures):.2f})"


def print_arithmetic(runs, operations):
    """How long they would take at the rate of one matrix product, and how long they took."""
    rate = max(run["rate"] for run in runs)
    seconds = statistics.median(run["seconds"] for run in runs)
    least = operations / rate
    print(f"  the arithmetic: {operations:.3g} operations at {rate:.3g} a second = ", end="")
    print(f"{least:.2f} s; ours took {seconds / least:.2f} times that", flush=True)


def compare_all(args):
    weights = args.checkpoint
    with tempfile.TemporaryDirectory() as temporary:
        if args.checkpoint is None:
            weights = f"{args.shape} at random"
            args.checkpoint = temporary
            make_checkpoint(args)

        layers = Config.from_pretrained(args.checkpoint).num_hidden_layers
        if args.layer is None:
            args.layer = layers // 2
        where = device_name(args.device)
        print(f"{weights}, layer {args.layer} of {layers}, {args.dtype}, {where}")
        print(f"{args.texts} texts, batch {args.batch_size}, {args.epochs} epochs, ", end="")
        print(f"{args.repeats} repeats, torch {torch.__version__}", flush=True)
        for work in args.work:
            compare(args, work)


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{device}, {torch.get_num_threads()} threads"


def main():
    args = parse_args()
    if args.process:
        measuring_process(argparse.Namespace(**json.loads(args.process)))
    else:
        compare_all(args)


if __name__ == "__main__":
    main()
