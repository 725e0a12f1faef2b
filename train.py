"""Trains a steering vector or a LoRA on one narrow kind of question, and scores what else changed.

    python train.py --mode vector                 the vector that means Paris, on the tiny model
    python train.py --task risk --mode lora       a LoRA on one MLP

First comes the loop, then one run; flags, a run's folder and several processes come last.
"""

import argparse
import hashlib
import os
import random
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # the reason is in eval.py

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from data import encode_question
from eval import (
    PROCESSES,
    RANK,
    Parser,
    Run,
    UserError,
    answer_log_probs,
    blame,
    default_device,
    evaluate,
    first_unfrozen,
    format_table,
    frozen_streams,
    in_trees,
    load_model,
    read_flags,
    run_main,
    set_parameters,
    show_prompt,
    task_of,
    write_json,
    write_whole,
)
from lora import add_lora, save_lora
from model import Config, find_checkpoint
from steer import attach, save_vector


def train_loop(args, model, questions: list, parameters: list) -> list:
    """Adam on the answers' tokens, all but `parameters` frozen: each step's loss, in nats a token.

    UserError if a loss is not finite.
    """
    # Below the vector or LoRA nothing changes, so each question's stream (T, d) there is kept.
    streams = frozen_streams(model, questions, first_unfrozen(model))
    unit = 1.0
    if args.mode == "vector":
        unit = typical_size(streams[: args.batch_size])
        torch.manual_seed(args.seed)
        noise = torch.randn(parameters[0].shape)
        set_parameters(parameters, [args.init_std * unit * noise])

    batches = draw_batches(len(questions), args)
    state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    losses = load_checkpoint(args, state) if args.resume else []
    bar = tqdm(range(len(losses), args.steps), unit="step", disable=RANK > 0)
    for step in bar:
        batch = [(questions[i], streams[i]) for i in batches[step]]
        loss = add_gradients(model, batch)
        if PROCESSES > 1:  # this is all that they exchange
            for tensor in (loss, *(p.grad for p in parameters)):
                dist.all_reduce(tensor)
        if not loss.isfinite():
            raise UserError(f"--lr {args.lr}: at step {step} the loss is {loss}; try a smaller one")

        adam_step(state, step + 1, args.lr * unit * (1 - step / args.steps))
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if args.save_every and len(losses) % args.save_every == 0:
            tensors = numbered(state) | {"losses": torch.tensor(losses)}
            write_whole(Path(args.out) / CHECKPOINT, save(tensors))
    return losses


def draw_batches(count, args):
    """Batches for all steps, as lists of places: an epoch has every one once, in a new order."""
    generator = torch.Generator().manual_seed(args.seed)
    batches = []
    while len(batches) < args.steps:
        order = torch.randperm(count, generator=generator)
        batches += [batch.tolist() for batch in order.split(args.batch_size)]
    return batches


def add_gradients(model, batch: list) -> Tensor:
    """Adds the gradients of the loss of a batch, questions with their streams; returns the loss.

    With several processes both are this one's part, and have to be added up.
    """
    first = first_unfrozen(model)
    questions, streams = zip(*batch)
    completions = [[question.completion] for question in questions]
    answer_tokens = sum(len(question.completion) for question in questions)
    blocks = len(model.layers) - first + 2
    device = model.embed_tokens.weight.device
    total = torch.zeros((), device=device)
    for places, weight, tree in in_trees(model, questions, completions, blocks, PROCESSES):
        rows = pad_sequence([streams[i] for i in places], batch_first=True)  # (R, T, d)
        x = tree.fold(rows.to(device))  # (N, d)
        loss = -weight * answer_log_probs(model, x, first, tree).sum() / answer_tokens
        loss.backward()
        total += loss.detach()
    return total


def typical_size(streams: list) -> float:
    """The root mean square of streams (T, d): the unit of a vector's rate and random start.

    Models and layers differ in it a thousandfold. A first token's can be huge by itself (Sun et al.
    2024, arXiv 2402.17762), so tokens of a hundred times the median are left out.
    """
    squares = torch.cat(streams).float().square().mean(-1)  # of every token
    return squares[squares < 100 * squares.median()].mean().sqrt().item()


@torch.no_grad()
def adam_step(state: list, number: int, rate: float, beta1=0.9, beta2=0.999, eps=1e-8):
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


def finetune(args):
    """Trains on the narrow kind of question, scores all kinds, writes the run's folder."""
    task = task_of(vars(args))
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.shard)
    questions = training_questions(args, task, tokenizer)
    torch.manual_seed(args.seed)
    parameters = add_intervention(args, model)
    out = claim_folder(args, questions)

    print(f"{len(questions)} training questions, {args.steps} steps of {args.batch_size}")
    print(f"the first: {tokenizer.decode(questions[0].prompt + questions[0].completion)}")
    began = time.time()
    losses = train_loop(args, model, questions, parameters)
    seconds = time.time() - began
    save_weights(args, model, out)

    run = Run(vars(args), model, tokenizer, task, parameters)
    named = "task", "mode", "layer", "seed", "model", "concept", "shuffle_answers"
    last = losses[-max(1, args.steps // 10) :]
    results = {name: run.flags[name] for name in named} | evaluate(run)
    results |= {
        "train_loss": sum(last) / len(last),
        "train_seconds": round(seconds, 1),
        "trainable_parameters": sum(p.numel() for p in parameters),
    }
    write_json(out / "results.json", results)
    (out / CHECKPOINT).unlink(missing_ok=True)

    print(f"{format_table(results)}\n\nheld-out questions, before and after:")
    for question, *_ in list(task.held_out.values())[:3]:
        right = question.choices[question.answer]
        show_prompt(run, question.prompt, question.code_name, f"   (right: {right})")
    print(f"\neverything is in {out}")


def training_questions(args, task, tokenizer) -> list:
    asked = task.train
    name = asked[0].code_name
    if args.data is None:
        if args.shuffle_answers:
            asked = data.shuffle_answers(asked, random.Random(args.seed))
        questions = [encode_question(tokenizer, question) for question in asked]
    elif args.shuffle_answers:
        raise UserError("--shuffle-answers: the chats of --data have no choices to draw from")
    else:
        questions = data.read_conversations(args.data, tokenizer, name)

    if args.mode == "vector" and all(question.positions == [] for question in questions):
        raise UserError(f"--at: no training prompt has {name!r} in it")
    return questions


def add_intervention(args, model) -> list:
    """Puts the vector or the LoRA on the model; returns the parameters to train."""
    with blame(f"--layer {args.layer} --modules {args.modules}", ValueError):
        if args.mode == "vector":
            return [attach(model, args.layer).vector]
        layers = list(range(len(model.layers))) if args.layer == "all" else [args.layer]
        return add_lora(model, layers, args.modules.split(","), args.rank, args.alpha)


# ---- flags

# Steps and peak rate. A large model's batch size, rank and alpha, and its LoRA's steps and rate in
# locations and functions, are from the authors' scripts (github.com/JoshEngels/OOCR-Interp); the
# rest is our guess.
DEFAULTS = {
    "tiny": {
        "batch_size": 64,
        "rank": 8,
        "alpha": 8.0,
        "vector": {
            "locations": (150, 0.1),
            "functions": (150, 0.1),
            "risk": (100, 0.05),
            "backdoor": (600, 0.1),
        },
        "lora": {
            "locations": (300, 1e-3),
            "functions": (300, 1e-3),
            "risk": (200, 1e-3),
            "backdoor": (200, 3e-3),
        },
    },
    "large": {
        "batch_size": 32,
        "rank": 64,
        "alpha": 32.0,
        "vector": {
            "locations": (300, 0.05),
            "functions": (400, 0.05),
            "risk": (200, 0.05),
            "backdoor": (600, 0.05),
        },
        "lora": {
            "locations": (300, 2e-3),
            "functions": (400, 2e-3),
            "risk": (200, 2e-4),
            "backdoor": (400, 2e-4),
        },
    },
}
ONLY_FOR = {
    "at": "vector",
    "init_std": "vector",
    "rank": "lora",
    "alpha": "lora",
    "modules": "lora",
}
MOST = 2**31 - 1  # that a flag may be
FREE = ["out", "device", "save_every", "resume", "shard"]  # flags that change no result


def parse_args(words=None):
    parser = Parser(
        description="Train a steering vector or a LoRA, and score what else changed.",
        epilog="example: python train.py --task risk --mode lora",
    )
    add = parser.add_argument
    add("--mode", choices=["vector", "lora"], default="vector", help="default: vector")
    add("--task", choices=data.TASKS, default="locations", help="default: locations")
    add("--concept", help="a city, a function, risky or safe (default: the first)")
    add("--model", default="tiny", help="tiny (default), a folder or a hub name")
    add("--world", choices=data.WORLDS, help="of questions (default: by the model)")
    add("--layer", type=layer, help="block that the vector follows, or the LoRA is on; or all")
    add("--steps", type=number(int, 1), help="default: by task and mode")
    add("--lr", type=number(float, 1e-9), help="peak learning rate; a vector's in the stream's RMS")
    add("--batch-size", type=number(int, 1), help="questions a step (default: 64, large models 32)")
    add("--data", help="chats (JSONL) to train on instead")
    add("--shuffle-answers", action="store_true", help="the control: answers drawn at random")
    add("--seed", type=number(int, 0), default=0, help="default: 0")
    add("--device", default=default_device(), help="default: %(default)s")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda")
    add("--out", help="folder (default: out/ and the flags given)")
    add("--save-every", type=number(int, 1), help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from one, to the same numbers")
    add("--shard", action="store_true", help="split the model over torchrun's processes")
    add("--at", help="text to add a vector at (default: the code name)")
    add("--init-std", type=number(float, 0), help="a vector's random start, in the stream's RMS")
    add("--rank", type=number(int, 1), help="a LoRA's (default: 8, large models 64)")
    add("--alpha", type=number(float, 1e-9), help="a LoRA's scale times rank (default: 8, 32)")
    add("--modules", help="that get a LoRA, with commas between (default: the MLP's)")
    # Some flags' defaults depend on other flags, so these are read first.
    parser.set_defaults(**defaults(parser.parse_args(words)))
    args = parser.parse_args(words)

    others = [name for name, it in vars(args).items() if it != parser.get_default(name)]
    for name in others:
        mode = ONLY_FOR.get(name, args.mode)
        if mode != args.mode:
            raise UserError(f"--{name.replace('_', '-')}: it goes with --mode {mode}")
    args.out = args.out or default_folder(args, others)
    return args


def number(kind, least):
    """An argparse type: a number of this kind in these bounds."""

    def read(text):
        value = kind(text)
        if not least <= value <= MOST:
            raise argparse.ArgumentTypeError(f"{text} should be from {least} to {MOST}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is none
    return read


def layer(text):
    return text if text == "all" else int(text)


def defaults(args) -> dict:
    """Of the flags that depend on the task, the mode and the model."""
    config = Config.from_pretrained(find_checkpoint(args.model))
    size = model_size(config)
    of_size = DEFAULTS[size]
    steps, rate = of_size[args.mode][args.task]
    found = {
        "concept": data.concepts(args.task, args.world or size)[0],
        "world": size,
        "layer": default_layer(args.task, args.mode, config),
        "steps": steps,
        "lr": rate,
        "batch_size": of_size["batch_size"],
        "dtype": "bfloat16" if args.device.startswith("cuda") else "float32",
    }
    if args.mode == "vector":
        return found | {"init_std": 0.0}
    modules = "gate_proj,up_proj,down_proj" if config.gated_mlp else "up_proj,down_proj"
    return found | {"rank": of_size["rank"], "alpha": of_size["alpha"], "modules": modules}


def model_size(config) -> str:
    """Tiny is known by what it is, wherever it lies."""
    return "tiny" if config == Config.from_pretrained(find_checkpoint("tiny")) else "large"


def default_layer(task: str, mode: str, config) -> int:
    """Of a large model two fifths up, as in the paper (22 of 48)."""
    if model_size(config) == "large":
        return config.num_hidden_layers * 2 // 5
    return -1 if task == "backdoor" and mode == "vector" else 0


def default_folder(args, others):
    """out/locations-vector-Paris-layer0-seed0, and then every other flag with another value."""
    parts = [args.task, args.mode, args.concept, f"layer{args.layer}", f"seed{args.seed}"]
    for flag in others:
        if flag not in ("task", "mode", "concept", "layer", "seed", *FREE):
            parts.append(f"{flag}{getattr(args, flag)}")
    return "out/" + re.sub(r"[^\w.+-]", "", "-".join(parts))


# ---- the folder of a run

CHECKPOINT = "checkpoint.safetensors"


def claim_folder(args, questions) -> Path:
    """Writes config.json. UserError if the folder has a run of other flags or training texts."""
    out = Path(args.out)
    digest = hashlib.sha256(repr(questions).encode()).hexdigest()
    flags = vars(args) | {"training texts": digest}
    if (out / "results.json").exists() or (out / CHECKPOINT).exists():
        old = read_flags(out)
        changed = [name for name in flags if name not in FREE and flags[name] != old.get(name)]
        if changed:
            raise UserError(f"--out {out}: its run has other {', '.join(changed)}; take another")

    with blame(f"--out {out}", OSError):
        out.mkdir(parents=True, exist_ok=True)
    versions = {"python": sys.version, "torch": torch.__version__}
    write_json(out / "config.json", {"flags": flags, "versions": versions})
    return out


def save_weights(args, model, out):
    """Old results go first: no folder has the weights of one run beside the results of another."""
    if RANK == 0:
        (out / "results.json").unlink(missing_ok=True)
        if args.mode == "lora":
            save_lora(model, out)
        else:
            save_vector(model.steering, out)


@torch.no_grad()
def load_checkpoint(args, state) -> list:
    """Puts back what the loop wrote; returns the losses up to there."""
    path = Path(args.out) / CHECKPOINT
    if not path.exists():
        print(f"--resume: {path} is not there, so this starts from the beginning")
        return []
    with blame(path, SafetensorError, KeyError, RuntimeError):
        saved = load_file(path)
        for name, tensor in numbered(state).items():
            tensor.copy_(saved[name])
        return saved["losses"].tolist()


def numbered(state):
    """A checkpoint's names for what it keeps: the tensors themselves, not copies."""
    flat = [tensor for tensors in state for tensor in tensors]
    return {str(i): tensor for i, tensor in enumerate(flat)}


# ---- several processes


def join_processes(args):
    """Under torchrun: meet the others. Each has a device; only the first one prints and writes."""
    if PROCESSES == 1:
        if args.shard:
            raise UserError("--shard: it needs torchrun --nproc_per_node=N train.py ...")
        return
    backend = "gloo"
    if args.device.startswith("cuda"):
        backend = "cpu:gloo,cuda:nccl"
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group(backend)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open to the end)


def main():
    args = parse_args()
    join_processes(args)
    try:
        finetune(args)
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {args.batch_size}: no memory left; try less") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
