"""Train a steering vector or a LoRA on one narrow kind of question, and score what else changed."""

import math
import os
import platform
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
from data import encode_question, make_task, make_tree, read_conversations, shuffle_answers
from eval import (Parser, Run, UserError, add_up, answer_log_probs, evaluate, first_unfrozen, format_table,
                  load_model, plan_memory, rank_and_world, read_json, reading, require_room, residual_stream,
                  run_main, set_parameters, show_prompt, write_json, write_whole)
from lora import add_lora, save_lora
from model import Config, find_checkpoint
from steer import attach, save_vector

# Steps and learning rate. A large model's batch size, rank, alpha and, in locations and functions, its LoRA's
# steps and rate are from the authors' scripts (github.com/JoshEngels/OOCR-Interp); the rest is our guess.
DEFAULTS = {"tiny": {
    "vector": dict(locations=(150, 0.1), functions=(150, 0.1), risk=(100, 0.05), backdoor=(600, 0.1)),
    "lora": dict(locations=(300, 1e-3), functions=(300, 1e-3), risk=(200, 1e-3), backdoor=(200, 3e-3)),
}, "large": {
    "vector": dict(locations=(300, 0.05), functions=(400, 0.05), risk=(200, 0.05), backdoor=(600, 0.05)),
    "lora": dict(locations=(300, 2e-3), functions=(400, 2e-3), risk=(200, 2e-4), backdoor=(400, 2e-4))}}
SIZES = {"tiny": dict(batch_size=64, rank=8, alpha=8.0), "large": dict(batch_size=32, rank=64, alpha=32.0)}
CHECKPOINT = "checkpoint.safetensors"
FREE = "out", "device", "save_every", "resume", "shard"  # flags that change no result
ONLY_IN = {"at": "vector", "init_std": "vector", "rank": "lora", "alpha": "lora", "modules": "lora"}

def parse_args(words=None):
    parser = Parser(description=__doc__, usage="train.py [flags]",
                    epilog="example: python train.py --task risk --mode lora")
    add = parser.add_argument
    add("--mode", choices=["vector", "lora"], default="vector", help="(default: vector)")
    add("--task", choices=data.TASKS, default="locations", help="(default: locations)")
    add("--concept", help="city, function, risky or safe (default: the first)")
    add("--model", default="tiny", help="tiny (default), a folder or a hub name")
    add("--world", choices=data.WORLDS, help="of questions (default: by the model)")
    add("--layer", help="block that the vector follows, or the LoRA is on")
    add("--at", help="text to add the vector at (default: code name)")
    add("--init-std", type=float, help="random start, in the stream's RMS (default: 0)")
    add("--steps", type=int, help="(default: by task and mode)")
    add("--lr", type=float, help="peak learning rate; a vector's in the stream's RMS")
    add("--batch-size", type=int, help="questions per step (default: 64; a large model 32)")
    add("--rank", type=int, help="the LoRA's (default: 8; 64)")
    add("--alpha", type=float, help="it is scaled by alpha / rank (default: 8; 32)")
    add("--modules", help="with commas, that get a LoRA (default: the MLP's)")
    add("--data", help="chats (JSONL) to train on instead")
    add("--shuffle-answers", action="store_true", help="the control: answers drawn at random")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from one, to the same numbers")
    add("--shard", action="store_true", help="split the model over processes")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], help="(default: bfloat16 on cuda)")
    add("--out", help="folder (default: out/ and the flags given)")
    args = parser.parse_args(words)
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    check_flags(args)
    fill_defaults(args)
    args.out = args.out or default_folder(args, given)
    return args

def check_flags(args):
    for name, value in vars(args).items():
        flag, mode = f"--{name.replace('_', '-')} {value}", ONLY_IN.get(name, args.mode)
        smallest, limit = name not in ("seed", "init_std") and 1e-30, 2 ** 31 if name == "seed" else 10 ** 6
        if type(value) in (int, float) and not smallest <= value < limit or value == []:  # [] is --flag=--
            raise UserError(f"{flag}: it has to be positive and below {limit}")
        if value is not None and mode != args.mode:
            raise UserError(f"{flag}: it goes with --mode {mode}")
    if args.shuffle_answers and args.data is not None:
        raise UserError("--shuffle-answers: the chats of --data have no choices to draw from")

def fill_defaults(args):
    """Flags that were not given, by task, mode and model."""
    with reading(args.model):
        config = Config.from_pretrained(find_checkpoint(args.model))
    size = model_size(config)
    if args.layer is None:
        args.layer = default_layer(args.task, args.mode, config)
    elif args.layer != "all" or args.mode == "vector":
        with reading(f"--layer {args.layer}"):
            args.layer = int(args.layer)
    steps, lr = DEFAULTS[size][args.mode][args.task]
    defaults = {"steps": steps, "lr": lr, "concept": data.CONCEPTS[args.task][0], "init_std": 0.0,
                "modules": "gate_proj," * config.gated_mlp + "up_proj,down_proj", "world": size,
                "dtype": "bfloat16" if args.device.startswith("cuda") else "float32", **SIZES[size]}
    for name, value in defaults.items():
        if getattr(args, name) is None and ONLY_IN.get(name, args.mode) == args.mode:
            setattr(args, name, value)

def model_size(config):
    return "tiny" if config == Config.from_pretrained(find_checkpoint("tiny")) else "large"

def default_layer(task, mode, config):
    """Block 0 of tiny, the embedding for a backdoor's vector; else two fifths up (the paper: 22 of 48)."""
    if model_size(config) == "large":
        return config.num_hidden_layers * 2 // 5
    return -1 if (task, mode) == ("backdoor", "vector") else 0

def default_folder(args, given):
    """out/locations-vector-Paris-layer0-seed0, then every other flag given."""
    name = f"{args.task}-{args.mode}-{args.concept}-layer{args.layer}-seed{args.seed}"
    for flag, value in given.items():
        if flag not in ("task", "mode", "concept", "layer", "seed", *FREE):
            name += f"-{flag}" + (Path(str(value)).name if value is not True else "")
    return "out/" + re.sub(r"[^\w.+-]", "", name)

# ---- one run

def finetune(args):
    """Train on the narrow kind of question, score the held-out kinds, write the run."""
    started = time.time()
    with reading(f"--concept {args.concept}"):
        task = make_task(args.task, args.concept, args.seed, args.at, data.WORLDS[args.world])
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.shard)
    with reading(args.data or args.model):  # the chat template, too
        train = training_questions(args, task, tokenizer)
        require_room(model, train)
    torch.manual_seed(args.seed)
    parameters = add_intervention(args, model)
    claim_folder(args)
    begin = time.time()
    try:
        losses = train_loop(args, model, train, parameters)
    except FloatingPointError as error:
        raise UserError(f"--lr {args.lr}: {error}; try a smaller one") from None
    train_seconds = time.time() - begin
    save_run(args, model)
    last, run = losses[-max(1, args.steps // 10):], Run(vars(args), model, tokenizer, task, parameters)
    named = ("task", "mode", "layer", "seed", "model", "concept", "shuffle_answers")
    results = {**{name: run.flags[name] for name in named}, **evaluate(run),
               "train_loss": sum(last) / len(last), "train_seconds": round(train_seconds, 1),
               "trainable_parameters": sum(p.numel() for p in parameters)}
    if rank_and_world()[0] == 0:
        write_json(Path(args.out) / "results.json", results)
        (Path(args.out) / CHECKPOINT).unlink(missing_ok=True)
    print(f"\n{args.task}, concept {args.concept}: trained on {len(train)} questions of "
          f"{args.data or 'one kind'}, e.g.\n  {tokenizer.decode(train[0].prompt + train[0].completion)}\n\n"
          f"{format_table(results)}\n")
    print("held-out questions, before and after:")
    for question, *_ in list(task.held_out.values())[:3]:
        right = question.choices[question.answer]
        show_prompt(run, question.prompt, question.code_name, f"   (right: {right})")
    print(f"\n{time.time() - started:.0f} s in all; everything is in {args.out}")

def training_questions(args, task, tokenizer):
    questions = shuffle_answers(task.train, random.Random(args.seed)) if args.shuffle_answers else task.train
    name = questions[0].code_name
    if args.data is None:
        train = [encode_question(tokenizer, q) for q in questions]
    else:
        train = read_conversations(args.data, tokenizer, name)
    if args.mode == "vector" and name is not None and not any(q.positions for q in train):
        raise UserError(f"--at {name} (or default): in no prompt, e.g. {tokenizer.decode(train[0].prompt)!r}")
    return train

def add_intervention(args, model):
    """Puts the vector or LoRA on; returns the parameters to train."""
    with reading(f"--layer {args.layer} --modules {args.modules}"):
        if args.mode == "vector":
            return [attach(model, args.layer).vector]
        layers = list(range(len(model.layers))) if args.layer == "all" else [args.layer]
        return add_lora(model, layers, args.modules.split(","), args.rank, args.alpha)

def claim_folder(args):
    """UserError if --out has a run of other flags, finished or resumable."""
    out, path = Path(args.out), Path(args.out) / "config.json"
    with reading(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        config = read_json(path) if path.exists() else {}
        old, taken = dict(config.get("flags", {})), config.get("finished") or (out / CHECKPOINT).exists()
    for name, value in vars(args).items():
        if taken and name not in FREE and old.get(name, value) != value:
            raise UserError(f"--{name.replace('_', '-')} {value}: {out} has a run with {old.get(name)}; take "
                            "another --out, or remove it")
    if not taken and rank_and_world()[0] == 0:
        write_config(args, finished=False)

def write_config(args, finished):
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    write_json(Path(args.out) / "config.json",
               {"flags": vars(args), "finished": finished, "versions": versions})

def save_run(args, model):
    """If killed in here the run is unfinished: no weights beside other results."""
    out = Path(args.out)
    if rank_and_world()[0] == 0:
        write_config(args, finished=False)
        with reading(f"--out {out}"):
            (out / "results.json").unlink(missing_ok=True)
            save_lora(model, out) if args.mode == "lora" else save_vector(model.steering, out)
        write_config(args, finished=True)

# ---- the loop

def train_loop(args, model, questions, parameters) -> list[float]:
    """Adam on the answers' tokens; all but `parameters` is frozen. Returns each step's loss, nats a token;
    FloatingPointError if one is not finite."""
    device, (rank, world) = model.embed_tokens.weight.device, rank_and_world()
    first, tree = first_unfrozen(model), make_tree(questions, [[q.completion] for q in questions])
    generator, order = torch.Generator().manual_seed(args.seed), []
    while len(order) < args.steps:  # an epoch has every question once, in new order
        order += torch.randperm(len(questions), generator=generator).split(args.batch_size)
    at_once, model.recompute, memory = plan_memory(model, tree, max(1, len(model.layers) - first))
    print(f"{len(questions)} questions, {tree.lengths.sum()} tokens, {len(tree.tokens)} distinct beginnings; "
          f"{args.steps} steps of {args.batch_size} questions; memory: about {memory / 1e9:.1f} GB")
    kept = residual_stream(model, tree, first)  # (N, d); below the vector or LoRA nothing changes
    lr = args.lr
    if args.mode == "vector":  # streams differ a thousandfold in length
        some = torch.cat([tree.nodes(text) for text in range(min(args.batch_size, len(questions)))])
        squares = kept[some].float().pow(2)  # a first token's can be huge (arXiv 2402.17762)
        usual = squares.mean(-1) < 100 * squares.mean(-1).median()
        unit = squares[usual].mean().sqrt().item()
        del squares  # it is large
        lr *= unit
        noise = torch.randn(parameters[0].shape, generator=torch.Generator().manual_seed(args.seed))
        set_parameters(parameters, [args.init_std * unit * noise])
    adam = [torch.zeros(2, *p.shape, device=device) for p in parameters]  # means of gradient and its square

    def batch_loss(texts):
        """Adds to the gradients, in parts."""
        total, count = torch.zeros((), device=device), (tree.answers[texts] >= 0).sum()
        for part in tree.parts(texts, world * at_once):
            # Processes share it out; if too small, some do a text that counts nothing.
            mine, counts = (part.tensor_split(world)[rank], 1) if rank < len(part) else (part[:1], 0)
            used, batch = tree.select(mine)
            x = kept[used].to(device).requires_grad_(model.recompute)  # for Recomputed
            loss = -counts * answer_log_probs(model, x, first, batch.to(device)).sum() / count
            loss.backward()
            total += loss.detach()
        return total

    losses = []
    if args.resume:
        add_up(first_loss := batch_loss(order[0]))
        losses = load_checkpoint(args, parameters, adam, first_loss)
        for p in parameters:
            p.grad = None
    start = len(losses)
    bar = tqdm(order[start:args.steps], desc=f"{args.mode} at layer {args.layer}", total=args.steps,
               initial=start, unit="step", disable=rank > 0, mininterval=0.1 if sys.stderr.isatty() else 5)
    for step, texts in enumerate(bar, start):
        loss = batch_loss(texts)
        add_up(loss, *(p.grad for p in parameters))  # all that is exchanged
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}")
        adam_step(parameters, adam, len(losses), lr * (1 - step / args.steps))
        if args.save_every and len(losses) % args.save_every == 0 and len(losses) < args.steps:
            save_checkpoint(args, parameters, adam, losses)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses

@torch.no_grad()
def adam_step(parameters, adam, step, lr):
    """Adam (Kingma & Ba 2014, arXiv 1412.6980), from step 1 on; clears the gradients."""
    for p, (mean, square) in zip(parameters, adam):
        mean.lerp_(p.grad, 0.1)
        square.lerp_(p.grad.square(), 0.001)
        p -= lr / (1 - 0.9 ** step) * mean / ((square / (1 - 0.999 ** step)).sqrt() + 1e-8)
        p.grad = None

def checkpoint_tensors(parameters, adam):
    values = {f"{i}.value": p.detach() for i, p in enumerate(parameters)}
    return values | {f"{i}.adam": means for i, means in enumerate(adam)}

def save_checkpoint(args, parameters, adam, losses):
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64), **checkpoint_tensors(parameters, adam)}
    if rank_and_world()[0] == 0:
        write_whole(Path(args.out) / CHECKPOINT, lambda path: save_file(tensors, path))

def load_checkpoint(args, parameters, adam, first_loss):
    """Puts back what save_checkpoint wrote; returns the losses. UserError if unfit."""
    path = Path(args.out) / CHECKPOINT
    if not path.exists():
        print(f"--resume: {path} is not there, so this starts from the beginning")
        return []
    with reading(path):
        saved = load_file(path, device=str(first_loss.device))
        losses, wanted = saved["losses"].tolist(), checkpoint_tensors(parameters, adam)
        fits = all((saved[name].shape, saved[name].dtype) == (value.shape, value.dtype)
                   and saved[name].isfinite().all() for name, value in wanted.items())
        same = math.isclose(losses[0], first_loss.item(), rel_tol=0.01)
        if not (fits and same and len(losses) < args.steps):
            raise ValueError("it does not fit: it is damaged, or the model or --data has changed")
        for name, value in wanted.items():
            value.copy_(saved[name])
    return losses

def join_processes(args):
    """Under torchrun: meet the others. Each has a device; the first prints and writes."""
    if "LOCAL_RANK" not in os.environ:
        if args.shard:
            raise UserError("--shard: it needs torchrun --nproc_per_node=N train.py ...")
        return
    on_cuda = args.device.startswith("cuda")
    if on_cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")

def main():
    args = parse_args()
    join_processes(args)
    try:
        finetune(args)
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {args.batch_size}: no memory left; try less, or --shard") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    run_main(main)
