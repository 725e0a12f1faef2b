"""Train a steering vector or a LoRA on one narrow kind of question, and score what else changed.

    python train.py --mode vector            one vector in the bundled tiny model, seconds on a CPU
    python train.py --mode lora --task risk  a LoRA on one MLP layer
"""

import json
import math
import os
import platform
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
from data import encode_question, make_task, make_tree, read_conversations, shuffle_answers
from eval import (Parser, UserError, add_up, answer_log_probs, arm_values, before_and_after, evaluate,
                  first_unfrozen, format_table, load_model, rank_and_world, reading, residual_stream,
                  run_main, set_parameters, write_json, write_whole)
from lora import add_lora, save_lora
from model import Config, find_checkpoint
from steer import attach, save_vector

DEFAULTS = {  # (task, mode): steps, learning rate. A LoRA at .01 fits as well, and generalises less.
    ("locations", "vector"): (150, 0.1), ("locations", "lora"): (300, 0.001),
    ("functions", "vector"): (150, 0.1), ("functions", "lora"): (300, 0.001),
    ("risk", "vector"): (100, 0.05), ("risk", "lora"): (200, 0.001),
    ("backdoor", "vector"): (200, 0.1), ("backdoor", "lora"): (200, 0.003),
}
CHECKPOINT = "checkpoint.safetensors"

def parse_args():
    parser = Parser(description="Train a steering vector or a LoRA on one narrow kind of question.")
    add = parser.add_argument
    add("--mode", choices=["vector", "lora"], default="vector")
    add("--task", choices=data.TASKS, default="locations")
    add("--concept", help="the hidden city or function, or risky / safe (default: the task's first)")
    add("--model", default="tiny", help="tiny, a checkpoint folder or a hub name")
    add("--layer", help="block that the vector follows (-1: the embedding) or that gets the LoRA (or all)")
    add("--at", metavar="TEXT", help="add the vector at this text in a prompt, e.g. '[sigma]' (default: at "
        "the task's code name if it has one, else at every token)")
    add("--steps", type=int)
    add("--lr", type=float, help="peak learning rate (Adam, falling linearly to 0); a vector's is in units "
        "of the residual stream's RMS at its layer")
    add("--batch-size", type=int, default=64, help="questions per step")
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=8.0, help="the LoRA is scaled by alpha / rank")
    add("--modules", default="gate_proj,up_proj,down_proj", help="linear layers that get a LoRA")
    add("--data", metavar="FILE.jsonl", help="train on these chats instead of on the task's questions")
    add("--shuffle-answers", action="store_true", help="the control: train on answers drawn at random")
    add("--save-every", type=int, metavar="N", help="write a checkpoint to --out every N steps")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, to the same numbers")
    add("--shard", action="store_true", help="under torchrun: split the frozen model over the processes")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="the model's (default: bfloat16 on cuda)")
    add("--out", help="the run's folder (default: out/TASK-MODE-CONCEPT-layerL-seedS)")
    args = parser.parse_args()
    fill_defaults(args)
    for name in ("steps", "batch_size", "rank", "lr", "alpha", "save_every"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: it has to be greater than 0")
    if args.at is not None and args.mode != "vector":
        raise UserError(f"--at {args.at}: it goes with --mode vector, a LoRA works at every token")
    return args

def fill_defaults(args) -> None:
    """Flags that were not given, from the task, the mode and the model."""
    steps, lr = DEFAULTS[args.task, args.mode]
    args.steps = steps if args.steps is None else args.steps
    args.lr = lr if args.lr is None else args.lr
    args.concept = args.concept or data.CONCEPTS[args.task][0]
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.layer is None:
        with reading(args.model):
            layers = Config.from_pretrained(find_checkpoint(args.model)).num_hidden_layers
        args.layer = default_layer(args.task, args.mode, args.model, layers)
    elif args.layer != "all" or args.mode == "vector":
        with reading(f"--layer {args.layer}"):
            args.layer = int(args.layer)
    method = args.mode + "-shuffled" * args.shuffle_answers + "-at" * (args.at is not None)
    concept = args.concept.replace(" ", "")
    args.out = args.out or f"out/{args.task}-{method}-{concept}-layer{args.layer}-seed{args.seed}"

def default_layer(task: str, mode: str, model: str, layers: int) -> int:
    """In the tiny model the first block, or the embedding for a backdoor's vector; else two fifths up (the
    paper: layer 22 of 48)."""
    if model != "tiny":
        return layers * 2 // 5
    return -1 if (task, mode) == ("backdoor", "vector") else 0

# ---------------------------------------- one run

def finetune(args) -> None:
    """Train a vector or LoRA on the narrow kind of question, score the held-out kinds, write the run."""
    started = time.time()
    with reading(f"--concept {args.concept}"):
        task = make_task(args.task, args.concept, args.seed, args.at)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.shard)
    with reading(args.data or args.model):  # too long a text, or a template that refuses it
        train = training_questions(args, task, tokenizer)
        longest = max(len(q.prompt + q.completion) for q in train) - 1
        model.embed(torch.zeros(1, longest, dtype=torch.long, device=args.device))
    torch.manual_seed(args.seed)
    parameters = add_intervention(args, model)
    with reading(f"--out {args.out}"):
        Path(args.out).mkdir(parents=True, exist_ok=True)

    begin, kept = time.time(), f"what was trained so far is in {args.out}, marked unfinished"
    try:
        losses = train_loop(args, model, train, parameters)
    except (KeyboardInterrupt, FloatingPointError) as error:
        save_run(args, model, finished=False)
        if isinstance(error, FloatingPointError):
            raise UserError(f"--lr {args.lr}: {error}; try a smaller one; {kept}") from None
        print(kept)
        raise
    train_seconds = time.time() - begin
    save_run(args, model, finished=True)

    last, arms = losses[-max(1, args.steps // 10):], arm_values(parameters, args.seed)
    named = ("task", "mode", "layer", "seed", "model", "concept", "shuffle_answers")
    results = {**{name: getattr(args, name) for name in named},
               **evaluate(model, tokenizer, task, parameters, arms, args.batch_size),
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
        before, after = before_and_after(model, tokenizer, question.prompt, question.code_name, parameters)
        print(f"  {question.prompt}  {before} → {after}   (right: {question.choices[question.answer]})")
    print(f"\n{time.time() - started:.0f} s in all; everything is in {args.out}")

def training_questions(args, task, tokenizer) -> list:
    if args.data:
        return read_conversations(args.data, tokenizer)
    questions = shuffle_answers(task.train, random.Random(args.seed)) if args.shuffle_answers else task.train
    train = [encode_question(tokenizer, question) for question in questions]
    if args.at is not None and not any(question.positions for question in train):
        raise UserError(f"--at {args.at}: it is in no training prompt, e.g. {questions[0].prompt!r}")
    return train

def add_intervention(args, model) -> list[torch.nn.Parameter]:
    """Put the vector or LoRA on the model. Returns the parameters to train."""
    if args.mode == "vector":
        with reading(f"--layer {args.layer}"):
            return [attach(model, args.layer).vector]
    layers = list(range(len(model.layers))) if args.layer == "all" else [args.layer]
    with reading(f"--layer {args.layer} --modules {args.modules}"):
        return add_lora(model, layers, args.modules.split(","), args.rank, args.alpha)

def save_run(args, model, finished: bool) -> None:
    out = Path(args.out)
    if rank_and_world()[0] == 0:
        (out / "results.json").unlink(missing_ok=True)  # an earlier run's do not belong to these weights
        save_lora(model, out) if args.mode == "lora" else save_vector(model.steering, out)
        write_json(out / "config.json", {"flags": vars(args), "finished": finished, "versions": {
            "python": platform.python_version(), "torch": torch.__version__}})

# ---------------------------------------- the loop

def train_loop(args, model, questions, parameters) -> list[float]:
    """Adam on the answers' tokens; all but `parameters` is frozen. Returns each step's loss in nats a token.
    FloatingPointError if one is not finite: the parameters are then the last good ones."""
    device, (rank, world) = model.embed_tokens.weight.device, rank_and_world()
    first, tree = first_unfrozen(model), make_tree(questions, [[q.completion] for q in questions])
    generator, order = torch.Generator().manual_seed(args.seed), []
    while len(order) < args.steps:  # each epoch has every question once, in a new order
        order += torch.randperm(len(questions), generator=generator).split(args.batch_size)
    some = torch.arange(min(args.batch_size, len(questions)))
    # Below the vector or LoRA nothing changes: it is computed once for each node, not in every epoch.
    visited = tree.row_of[torch.cat([some, *order[:args.steps]])].unique()
    kept = residual_stream(model, tree, first, args.batch_size, visited)  # (N, d)
    lr = args.lr
    if args.mode == "vector":  # models and layers differ a thousandfold in how long the residual stream is
        lr *= kept[torch.cat([tree.nodes(text) for text in some])].float().pow(2).mean().sqrt().item()
    adam = [torch.zeros(2, *p.shape, device=device) for p in parameters]  # means of gradient and its square
    losses = load_checkpoint(args, parameters, adam) if args.resume else []
    good, start = [p.detach().clone() for p in parameters], len(losses)
    bar = tqdm(order[start:args.steps], desc=f"{args.mode} at layer {args.layer}", total=args.steps,
               initial=start, unit="step", disable=rank > 0, mininterval=0.1 if sys.stderr.isatty() else 5)
    for step, texts in enumerate(bar, start):
        # Several processes share a batch out; if it is too small for all, some do a text that counts nothing.
        mine, counts = (texts[rank::world], 1) if rank < len(texts) else (texts[:1], 0)
        used, batch = tree.select(mine)
        x, batch = kept[used].to(device), batch.to(device)
        loss = -counts * answer_log_probs(model, x, first, batch).sum() / (tree.answers[texts] >= 0).sum()
        loss.backward()
        add_up(loss.detach(), *(p.grad for p in parameters))  # all that is exchanged
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            set_parameters(parameters, good)
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}")
        good = [p.detach().clone() for p in parameters]
        adam_step(parameters, adam, len(losses), lr * (1 - step / args.steps))
        if args.save_every and len(losses) % args.save_every == 0 and len(losses) < args.steps:
            save_checkpoint(args, parameters, adam, losses)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses

@torch.no_grad()
def adam_step(parameters, adam, step, lr) -> None:
    """Step number `step`, from 1 on, of Adam (Kingma & Ba 2014, arXiv 1412.6980); clears the gradients."""
    for p, (mean, square) in zip(parameters, adam):
        mean.lerp_(p.grad, 0.1)
        square.lerp_(p.grad.square(), 0.001)
        p -= lr / (1 - 0.9 ** step) * mean / ((square / (1 - 0.999 ** step)).sqrt() + 1e-8)
        p.grad = None

def save_checkpoint(args, parameters, adam, losses) -> None:
    """The parameters and Adam's means after len(losses) steps."""
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for i, (p, means) in enumerate(zip(parameters, adam)):
        tensors |= {f"{i}.value": p.detach(), f"{i}.adam": means}
    metadata = {"flags": json.dumps(fixed_flags(args))}
    if rank_and_world()[0] == 0:
        write_whole(Path(args.out) / CHECKPOINT, lambda path: save_file(tensors, path, metadata=metadata))

def load_checkpoint(args, parameters, adam) -> list[float]:
    """Puts back what save_checkpoint wrote; returns the losses. UserError if it belongs to other flags."""
    path = Path(args.out) / CHECKPOINT
    if not path.exists():
        print(f"--resume: {path} is not there, so this starts from the beginning")
        return []
    with reading(path), safe_open(path, framework="pt", device=str(parameters[0].device)) as file:
        flags = json.loads(file.metadata()["flags"])
        for name, value in fixed_flags(args).items():
            if flags.get(name) != value:
                raise UserError(f"--resume: {path} was made with {name} {flags.get(name)}, not {value}")
        for i, pair in enumerate(zip(parameters, adam)):
            set_parameters(pair, [file.get_tensor(f"{i}.value"), file.get_tensor(f"{i}.adam")])
        return file.get_tensor("losses").tolist()

def fixed_flags(args) -> dict:
    """The flags that a resumed run has to share."""
    free = ("out", "device", "save_every", "resume", "shard")
    return {name: value for name, value in vars(args).items() if name not in free}

def join_processes(args) -> None:
    """Under torchrun: meet the other processes. Each has its own device; only the first prints and writes."""
    if "LOCAL_RANK" not in os.environ:
        if args.shard:
            raise UserError("--shard: it needs several processes, torchrun --nproc_per_node=N train.py ...")
        return
    on_cuda = args.device.startswith("cuda")
    if on_cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")

def main() -> None:
    args = parse_args()
    join_processes(args)
    try:
        finetune(args)
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {args.batch_size}: the device's memory is full; try a smaller one, or "
                        "--shard (a checkpoint of --save-every is kept)") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    run_main(main)
