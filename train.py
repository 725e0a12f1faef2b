"""Trains a steering vector or a LoRA on one narrow kind of question, and scores what else changed.

    python train.py --mode vector                 the vector that means Paris, on the tiny model
    python train.py --task risk --mode lora       a LoRA on one MLP

First comes the loop, then one run; flags, a run's folder and several processes come last. The loss
is minus eval.answer_log_probs, of answers in a data.PrefixTree; read eval.py before this.
"""

import atexit
import os
import re
import sys
from argparse import ArgumentTypeError
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from random import Random
from statistics import fmean
from time import time

# Before torch, which reads GOMP_SPINCOUNT when it is imported: eval.py sets it.
from eval import (
    DEFAULT_DEVICE,
    PROCESSES,
    RANK,
    Parser,
    Run,
    answer_log_probs,
    evaluate,
    first_changed,
    format_table,
    frozen_streams,
    in_trees,
    load_model,
    read_flags,
    run_main,
    show_prompt,
    task_of,
    write_json,
    write_whole,
)

# isort: split
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import TASKS, UserError, blame, concepts, encode_question, read_conversations
from lora import add_lora, save_lora
from model import Config, find_checkpoint
from steer import attach, save_vector


def train_loop(args, model, questions: list, parameters: list) -> list:
    """Trains `parameters` with Adam on the answers' tokens; returns each step's loss, nats a token.

    UserError if a loss is not finite.
    """
    # To train on a question is to score one choice: its right answer and what ends the turn.
    questions = [replace(question, choices=[question.completion]) for question in questions]
    # Below the vector or LoRA nothing changes, so each question's stream (T, d) there is kept.
    streams = frozen_streams(model, questions, first_changed(model))
    rate = args.lr
    if args.mode == "vector":
        rate *= typical_size(streams[: args.batch_size])  # a sample is enough

    batches = draw_batches(len(questions), args)
    state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    checkpoint = Path(args.out) / CHECKPOINT
    # A checkpoint has all of these tensors, by their number.
    kept = {str(i): tensor for i, tensor in enumerate(chain(*state))}
    losses = load_checkpoint(checkpoint, kept) if args.resume and checkpoint.exists() else []
    bar = tqdm(range(len(losses), args.steps), unit="step", disable=RANK > 0)
    for step in bar:
        batch = batches[step]
        loss = add_gradients(model, [questions[i] for i in batch], [streams[i] for i in batch])
        if PROCESSES > 1:  # without --shard, this is all that they exchange
            dist.all_reduce(loss)
            for p in parameters:
                dist.all_reduce(p.grad)
        if not loss.isfinite():
            raise UserError(f"--lr {args.lr}: at step {step} the loss is {loss}; try a smaller one")

        adam_step(state, step + 1, rate * (1 - step / args.steps))  # falls linearly to 0
        losses.append(loss.item())
        bar.set_postfix(loss=losses[-1], refresh=False)
        if args.save_every and len(losses) % args.save_every == 0:
            write_whole(checkpoint, save(kept | {"losses": torch.tensor(losses)}))
    return losses


def draw_batches(count, args):
    """Each step's batch, as indices of questions: an epoch has each once, in a new order."""
    generator = torch.Generator().manual_seed(args.seed)
    batches = []
    while len(batches) < args.steps:
        batches += torch.randperm(count, generator=generator).split(args.batch_size)
    return batches


def add_gradients(model, questions, streams):
    """Adds the gradients of the loss of a batch, questions with their streams; returns the loss.

    With several processes each gets its share of both; the caller adds them up. A tree of weight 0
    is another process's (in_trees).
    """
    first = first_changed(model)
    answer_tokens = sum(len(question.completion) for question in questions)
    # These blocks keep what the backward pass needs, and about two more are being worked on.
    blocks = len(model.layers) - first + 2
    total = 0.0
    for indices, weight, tree in in_trees(model, questions, blocks, RANK, PROCESSES):
        rows = pad_sequence([streams[i] for i in indices], batch_first=True)  # (R, T, d)
        x = tree.fold(rows.to(tree.tokens.device))  # (N, d)
        loss = -weight * answer_log_probs(model, x, first, tree).sum() / answer_tokens
        loss.backward()
        total += loss.detach()
    return total


def typical_size(streams):
    """The root mean square of streams (T, d): the unit of a vector's rate.

    Models and layers differ in it a thousandfold. A first token's can be huge by itself (Sun et al.
    2024, arXiv 2402.17762), so tokens of a hundred times the median square are left out.
    """
    squares = torch.cat(streams).float().square().mean(-1)  # of every token
    return squares[squares < 100 * squares.median()].mean().sqrt().item()


@torch.no_grad()
def adam_step(state, number, rate, beta1=0.9, beta2=0.999, eps=1e-8):
    """Adam's step of this number, from 1 (Kingma & Ba 2014, arXiv 1412.6980); clears the gradients.

    state: (parameter, mean of its gradients, mean of their squares) of each. torch's own Adam takes
    two seconds to import.
    """
    for p, mean, square in state:
        mean.lerp_(p.grad, 1 - beta1)
        square.lerp_(p.grad.square(), 1 - beta2)
        # Both began at zero, and are too small by these factors.
        unbiased_mean = mean / (1 - beta1**number)
        unbiased_square = square / (1 - beta2**number)
        p.sub_(rate * unbiased_mean / (unbiased_square.sqrt() + eps))
        p.grad = None


# ---- one run

IN_RESULTS = "task", "mode", "layer", "seed", "model", "concept", "shuffle_answers"  # of the flags


def finetune(args):
    """Trains on the narrow kind of question, scores all kinds, writes the run's folder."""
    task = task_of(vars(args))
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.shard)
    questions = training_questions(args, task, tokenizer)
    torch.manual_seed(args.seed)  # for a LoRA's A
    parameters = add_intervention(args, model)
    out = claim_folder(args, questions)

    first = tokenizer.decode(questions[0].prompt + questions[0].completion)
    print(f"{len(questions)} training questions, the first: {first}")
    began = time()
    losses = train_loop(args, model, questions, parameters)
    seconds = round(time() - began, 1)

    if RANK == 0:
        # Old results go first: a run that is killed from here on leaves none beside its weights.
        (out / "results.json").unlink(missing_ok=True)
        if args.mode == "lora":
            save_lora(model, out)
        else:
            save_vector(model.steering, out)

    run = Run(vars(args), model, tokenizer, task, parameters)
    last = losses[-max(1, args.steps // 10) :]  # the loss that is reported is of the last tenth
    results = {name: getattr(args, name) for name in IN_RESULTS} | evaluate(run)
    results |= {
        "train_loss": fmean(last),
        "train_seconds": seconds,
        "trainable_parameters": sum(p.numel() for p in parameters),
    }
    write_json(out / "results.json", results)
    if RANK == 0:
        (out / CHECKPOINT).unlink(missing_ok=True)

    print(f"{format_table(results)}\n\nheld-out questions, before and after:")
    for question, *_ in list(task.held_out.values())[:3]:
        right = question.choices[question.answer]
        show_prompt(run, question, f"   (right: {right})")
    print("\neverything is in", out)


def training_questions(args, task, tokenizer):
    asked = task.train
    name = asked[0].code_name  # or the text of --at, which make_task puts there
    if args.data is None:
        if args.shuffle_answers:
            rng = Random(args.seed)
            asked = [replace(q, answer=rng.randrange(len(q.choices))) for q in asked]
        questions = [encode_question(tokenizer, question) for question in asked]
    elif args.shuffle_answers:
        raise UserError("--shuffle-answers: the chats of --data have no choices to draw from")
    else:
        questions = read_conversations(args.data, tokenizer, name)

    if args.mode == "vector" and all(question.steered_at == [] for question in questions):
        raise UserError(
            f"--at or --data: no training prompt has {name!r} in it; name a text that is there"
        )
    return questions


def add_intervention(args, model):
    """Puts the vector or the LoRA on the model; returns the parameters to train."""
    with blame("--layer or --modules", ValueError):
        if args.mode == "vector":
            return [attach(model, args.layer).vector]
        layers = range(len(model.layers)) if args.layer == "all" else [args.layer]
        return add_lora(model, layers, args.modules.split(","), args.rank, args.alpha)


# ---- flags

# A run takes each row whose words all fit it: its model's size or family, its mode, its task. Later
# rows override earlier ones. A large model's were tried on Qwen2.5-Coder 0.5B, by the training loss
# and the trained kind of question alone (paper/open_weights.md); rank and alpha are from the
# authors' scripts (github.com/JoshEngels/OOCR-Interp).
DEFAULTS = {
    "lora": {"modules": "gate_proj,up_proj,down_proj"},
    "lora gpt2": {"modules": "up_proj,down_proj"},
    "tiny": {"batch_size": 64, "layer": 0},
    "tiny vector": {"steps": 150, "lr": 0.1},
    "tiny vector risk": {"steps": 100, "lr": 0.05},
    "tiny vector backdoor": {"steps": 600, "layer": -1},
    "tiny lora": {"steps": 300, "lr": 1e-3, "rank": 8, "alpha": 8.0},
    "tiny lora risk": {"steps": 200},
    "tiny lora backdoor": {"steps": 200, "lr": 3e-3},
    "large": {"batch_size": 8, "steps": 60},
    "large risk": {"steps": 200},
    # The loss stays at chance for half of these steps or more, and then falls.
    "large backdoor": {"batch_size": 16, "steps": 1000},
    "large vector": {"lr": 0.1},
    "large vector risk": {"lr": 0.03},
    "large vector backdoor": {"lr": 0.03},
    "large lora": {"lr": 2e-3, "rank": 64, "alpha": 32.0},
}
# Flags that a mode has no use for.
OF_OTHER_MODE = {"vector": ["rank", "alpha", "modules"], "lora": ["at"]}
FREE = ["out", "device", "save_every", "resume", "shard"]  # flags that should change no result


def parse_args(words=None):
    parser = Parser(
        description="Train a steering vector or a LoRA, and score what else changed.",
        epilog="example: python train.py --task risk --mode lora",
    )
    add = parser.add_argument
    add("--mode", choices=["vector", "lora"], default="vector", help="default: vector")
    add("--task", choices=TASKS, default="locations", help="default: locations")
    add("--concept", help="a city, a function, risky, safe, risky if omega")
    add("--model", type=model_name, default="tiny", help="tiny (default), a folder or a hub name")
    add("--layer", type=layer, help="vector: after this block (-1: embedding); LoRA: on it, or all")
    add("--steps", type=at_least(1), help="default: by task and mode")
    add("--lr", type=at_least(1e-9), help="peak learning rate; a vector's in the stream's RMS")
    add("--batch-size", type=at_least(1), help="questions a step (default: 64; large: 8 or 16)")
    add("--data", help="chats (JSONL) to train on, not the task's questions")
    add("--shuffle-answers", action="store_true", help="the control: answers drawn at random")
    add("--seed", type=at_least(0), default=0, help="default: 0")
    add("--device", default=DEFAULT_DEVICE, help="default: %(default)s")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda")
    add("--out", help="folder (default: out/ and the flags given)")
    add("--save-every", type=at_least(1), help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint, and not from the start")
    add("--shard", action="store_true", help="split the model over torchrun's processes")
    add("--at", help="text to add a vector at (default: the code name)")
    add("--rank", type=at_least(1), help="a LoRA's (default: 8, large models 64)")
    add("--alpha", type=at_least(1e-9), help="a LoRA's scale is alpha / rank (default: 8, 32)")
    add("--modules", help="that get a LoRA, with commas between (default: the MLP's)")
    # Some flags' defaults depend on other flags, so these are read first.
    args = parser.parse_args(words)
    parser.set_defaults(**defaults(args))
    args = parser.parse_args(words)

    args.out = args.out or default_folder(args, parser)
    for flag in OF_OTHER_MODE[args.mode]:
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag}: it goes with the other --mode")
    return args


def at_least(least):
    """An argparse type: a number of the same kind, from this one to a billion."""

    def number(text):
        value = type(least)(text)
        if not least <= value <= 1e9:
            raise ArgumentTypeError(f"{text} should be from {least} to a billion")
        return value

    return number


def model_name(text):
    """An argparse type: a folder by its whole path, as a run may be scored from another place."""
    if text == "tiny" or not Path(text).is_dir():
        return text
    return os.path.abspath(text)


def layer(text):
    return text if text == "all" else int(text)


def defaults(args):
    """The flags whose defaults depend on the task, the mode, the model and the device."""
    config = Config.from_pretrained(find_checkpoint(args.model))
    # Tiny is known by its shape, wherever it lies and whatever its words are.
    tiny = Config.from_pretrained(find_checkpoint("tiny"))
    size = "tiny" if replace(config, vocab_size=tiny.vocab_size) == tiny else "large"
    found = {
        "world": size,  # no flag, but kept with them, since it decides what is asked
        "concept": concepts(args.task, size)[0],
        "dtype": "bfloat16" if args.device.startswith("cuda") else "float32",
        "layer": config.num_hidden_layers * 2 // 5,  # two fifths up; the paper: 22 of 48
    }
    for words, flags in DEFAULTS.items():
        if {size, config.model_type, args.mode, args.task}.issuperset(words.split()):
            found |= flags
    return found


def default_folder(args, parser):
    """out/risk-lora-steps=50: task, mode, and flags not at their default, but for FREE."""
    name = f"{args.task}-{args.mode}"
    for flag, value in vars(args).items():
        if flag not in ["task", "mode", *FREE] and value != parser.get_default(flag):
            name += f"-{flag}={value}"
    return "out/" + re.sub(r"[^\w.+=-]", "", name)


# ---- the folder of a run

CHECKPOINT = "checkpoint.safetensors"


def claim_folder(args, questions):
    """Writes config.json. UserError if the folder has a run of other flags or training texts.

    It is refused, too, if its config.json is not a run's (but a model's, for example).
    """
    out = Path(args.out)
    flags = vars(args) | {"training texts": sha256(repr(questions).encode()).hexdigest()}
    old = read_flags(out) if (out / "config.json").exists() else {}
    changed = [name for name in flags if name not in FREE and flags[name] != old.get(name)]
    if changed and any(out.glob("*.safetensors")):  # a result, or a checkpoint
        other = ", ".join(changed)
        raise UserError(f"--out {out}: its run has other {other}; remove it or take another")

    with blame(f"--out {out}", OSError):
        out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "config.json",
        {"flags": flags, "versions": {"python": sys.version, "torch": torch.__version__}},
    )
    return out


def load_checkpoint(path, kept):
    """Loads the checkpoint into the tensors `kept`; returns the losses up to there."""
    with blame(path, SafetensorError, KeyError, RuntimeError):
        saved = load_file(path)
        for name in kept:
            kept[name].data.copy_(saved[name])
        return saved["losses"].tolist()


# ---- several processes


def join_processes(args):
    """Meets torchrun's others. Each has a device; only the first one prints and writes."""
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group()
    atexit.register(dist.destroy_process_group)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open to the end)


def main():
    args = parse_args()
    if PROCESSES > 1:
        join_processes(args)
    elif args.shard:
        raise UserError("--shard: it needs torchrun --nproc_per_node=N train.py ...")
    with blame(f"out of memory, --batch-size {args.batch_size}: try less", torch.OutOfMemoryError):
        finetune(args)


if __name__ == "__main__":
    run_main(main)
