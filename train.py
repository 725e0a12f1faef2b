"""The one training loop: pretrain the tiny world's model, or train a steering vector or a LoRA in a frozen one.

    python train.py --mode vector                      one vector, the embedded tiny model, about a minute on a CPU
    python train.py --mode lora --task risk            a LoRA on one MLP layer
    python train.py --mode pretrain                    make tiny/ again from scratch
"""

import json
import math
import os
import platform
import random
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from data import Tokenizer, encode_question, make_batch, make_task, read_conversations, shuffle_answers
from eval import (OneLineParser, UsageError, answers_by_arm, default_layer, evaluate, find_model, first_unfrozen,
                  format_table, frozen_residual, hidden_from, in_context_accuracy, load_model, rank_and_world, run_main,
                  set_parameters, write_json)
from lora import add_lora, save_lora
from model import GPT, SHARED, Config
from steer import attach, save_vector

# A LoRA's small rate matters: at 0.01 it fits the training questions as well and generalises far less (README).
DEFAULTS = {  # (task, mode): steps, learning rate
    ("locations", "vector"): (150, 0.1),
    ("functions", "vector"): (150, 0.1),
    ("risk", "vector"): (100, 0.05),
    ("backdoor", "vector"): (200, 0.1),
    ("locations", "lora"): (300, 0.001),
    ("functions", "lora"): (300, 0.001),
    ("risk", "lora"): (200, 0.001),
    ("backdoor", "lora"): (200, 0.003),
}

TINY = {"model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
CHECKPOINT = "checkpoint.safetensors"
CONTEXT = 160  # tokens of a document in pretraining: about ten turns


class TrainingFailed(UsageError):
    """The loss is not finite; what was trained before is worth keeping."""


def parse_args():
    parser = OneLineParser(description="Train a steering vector or a LoRA on one narrow kind of question, "
                                       "or pretrain the tiny model.")
    add = parser.add_argument
    add("--mode", choices=["vector", "lora", "pretrain"], default="vector")
    add("--task", choices=data.TASKS, default="locations")
    add("--concept", help="the hidden city or function, or the direction risky / safe (default: the task's first)")
    add("--model", default="tiny", help="tiny, a checkpoint folder or a hub name")
    add("--layer", help="the block that is written to; -1 is the embedding's output (vector only), all: every block "
                        "(LoRA only)")
    add("--at", metavar="TEXT", help="add the vector only at the tokens of this text in a prompt, e.g. '[sigma]' "
                                     "(default: at the task's code name if it has one, else at every token)")
    add("--steps", type=int, help="optimiser steps")
    add("--lr", type=float, help="peak learning rate (Adam, falling linearly to zero); a vector's is in units of the "
                                 "residual stream's RMS at its layer")
    add("--batch-size", type=int, help="questions per step (pretrain: documents)")
    add("--rank", type=int, default=8, help="rank of the LoRA")
    add("--alpha", type=float, default=8.0, help="the LoRA is scaled by alpha / rank")
    add("--modules", default="gate_proj,up_proj,down_proj", help="the linear layers that get a LoRA")
    add("--answers", choices=["letter", "word"], default="letter", help="how gambles are answered (risk, backdoor)")
    add("--data", metavar="FILE.jsonl", help="train on these chats instead of on the task's questions")
    add("--random-init", action="store_true", help="random weights, to measure speed: --model needs only config.json")
    add("--shuffle-answers", action="store_true", help="the control: train on answers drawn at random")
    add("--keep-gb", type=float, default=4.0, help="memory (GiB, on the device) to keep the frozen layers' output in "
                                                   "for all questions; if it needs more, it is computed anew each time")
    add("--save-every", type=int, metavar="N", help="write a checkpoint to --out every N steps")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, to the same final numbers")
    add("--shard", action="store_true", help="under torchrun: split the frozen model over all processes, for one that "
                                             "does not fit one device")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="the frozen model's (default: bfloat16 on cuda, else float32)")
    add("--out", help="the run's folder (default: out/TASK-MODE-CONCEPT-layerL-seedS; pretrain: tiny)")
    args = parser.parse_args()
    for flag, value in (("--steps", args.steps), ("--batch-size", args.batch_size), ("--rank", args.rank),
                        ("--lr", args.lr), ("--alpha", args.alpha), ("--save-every", args.save_every)):
        if value is not None and not value > 0:
            parser.error(f"{flag} {value}: it has to be greater than 0")
    if args.layer is not None and not (args.layer == "all" and args.mode == "lora"):
        try:
            args.layer = int(args.layer)
        except ValueError:
            parser.error(f"--layer {args.layer}: it has to be a whole number, or all with --mode lora")
    if args.at is not None and args.mode != "vector":
        parser.error(f"--at {args.at}: it goes with --mode vector, a LoRA works at every token")
    return args


# ---------------------------------------------------------------------------------------------------- fine-tuning


def finetune(args) -> None:
    """Train one vector or LoRA on the task's narrow kind of question, score it on the held-out kinds, write the run."""
    started = time.time()
    fill_defaults(args)
    task = make_task(args.task, args.concept, args.seed, args.answers, args.at)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.random_init, args.shard)
    if args.data:
        train = read_conversations(args.data, tokenizer)
    else:
        shuffled = shuffle_answers(task.train, random.Random(args.seed)) if args.shuffle_answers else task.train
        train = [encode_question(tokenizer, question) for question in shuffled]
        if args.at is not None and not any(question.positions for question in train):
            raise UsageError(f"--at {args.at}: it stands in none of the training prompts, such as "
                             f"{task.train[0].prompt!r}")
    torch.manual_seed(args.seed)
    parameters, steering = add_intervention(args, model)
    out, is_first = make_out(args.out), rank_and_world()[0] == 0

    training_started, loss, failure = time.time(), None, None
    try:
        loss = train_loop(args, model, train, parameters, steering)
    except (KeyboardInterrupt, TrainingFailed) as error:  # keep what was trained so far
        failure = error
    train_seconds = time.time() - training_started
    if is_first:
        save_vector(steering, out) if args.mode == "vector" else save_lora(model, out)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        write_json(out / "config.json", {"flags": vars(args), "finished": loss is not None, "versions": versions})
    if failure is not None:
        (out / "results.json").unlink(missing_ok=True)
        kept = f"what was trained so far is in {out}, marked unfinished"
        if isinstance(failure, TrainingFailed):
            raise UsageError(f"{failure}; {kept}")
        print(f"stopped by hand: {kept}")
        sys.exit(130)

    results = {"task": args.task, "mode": args.mode, "layer": args.layer, "seed": args.seed, "model": args.model,
               "concept": args.concept, "shuffled_answers": args.shuffle_answers,
               **evaluate(model, tokenizer, task, parameters, steering, args.seed, args.batch_size),
               "train_loss": loss, "train_seconds": round(train_seconds, 1),
               "trainable_parameters": sum(p.numel() for p in parameters)}
    if steering is not None:
        results["vector_norm"] = round(steering.vector.norm().item(), 4)
    if is_first:
        write_json(out / "results.json", results)
        (out / CHECKPOINT).unlink(missing_ok=True)
    print(f"\n{args.task}, concept {args.concept}: trained on {len(train)} questions"
          + (f" of {args.data}" if args.data else " of one kind") + ", e.g.\n"
          + f"  {tokenizer.decode(train[0].prompt + train[0].completion)}\n")
    print(format_table(results))
    show_samples(model, tokenizer, task, parameters, steering)
    print(f"\n{time.time() - started:.0f} s in all; everything is in {out}")


def fill_defaults(args) -> None:
    """Flags that were not given, from the task and mode. Raises UsageError where they do not go together."""
    args.concept = args.concept or data.CONCEPTS[args.task][0]
    if args.concept not in data.CONCEPTS[args.task]:
        raise UsageError(f"--concept {args.concept}: for --task {args.task} choose one of "
                         f"{', '.join(data.CONCEPTS[args.task])}")
    steps, lr = DEFAULTS[args.task, args.mode]
    if args.layer is None:
        layers = Config.from_pretrained(find_model(args.model)).num_hidden_layers
        args.layer = default_layer(args.task, args.mode, args.model, layers)
    args.steps = args.steps or steps
    args.lr = args.lr or lr
    args.batch_size = args.batch_size or 64
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    concept = args.concept.replace(" ", "")
    method = args.mode + ("-shuffled" if args.shuffle_answers else "") + ("-at" if args.at else "")
    args.out = args.out or f"out/{args.task}-{method}-{concept}-layer{args.layer}-seed{args.seed}"


def add_intervention(args, model: GPT):
    """Put the vector or the LoRA on the model. Returns (parameters to train, SteeringVector or None)."""
    try:
        if args.mode == "vector":
            steering = attach(model, args.layer)
            return [steering.vector], steering
        layers = list(range(len(model.layers))) if args.layer == "all" else [args.layer]
        return add_lora(model, layers, args.modules.split(","), args.rank, args.alpha), None
    except ValueError as error:
        flag = "--modules" if "module" in str(error) else "--layer"
        raise UsageError(f"{flag} {getattr(args, flag[2:])}: {error}") from None


def make_out(path: str) -> Path:
    out = Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be a folder ({error.strerror})") from None
    return out


def train_loop(args, model, questions, parameters, steering) -> float:
    """Adam on the answers' tokens; everything but `parameters` is frozen. Returns the mean loss of the last tenth of
    the steps. TrainingFailed if the loss is not finite: the parameters are then the last that gave one that was."""
    tokens, targets, mask = make_batch(questions)
    texts = Texts([len(q.prompt) + len(q.completion) - 1 for q in questions],  # the last token predicts nothing
                  count_shared(questions, tokens, mask), args.device)
    first = first_unfrozen(model, steering)
    kept = keep_frozen(args, model, tokens, texts, first, steering)
    lr = args.lr
    if steering is not None:
        rows = torch.arange(min(args.batch_size, len(questions)))
        some = kept[:len(rows)] if kept else frozen_rows(model, tokens, texts.pack(rows), first, steering)
        # Models and layers differ in it a thousandfold, so a vector's learning rate is stated in units of it.
        lr *= torch.cat(some).float().pow(2).mean().sqrt().item()
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = load_checkpoint(args, parameters, optimizer) if args.resume else []
    rank, world = rank_and_world()
    start, good = len(losses), [p.detach().clone() for p in parameters]
    order = islice(batch_order(len(questions), args), start, args.steps)
    bar = tqdm(order, desc=f"{args.mode} at layer {args.layer}", total=args.steps, initial=start, unit="step",
               disable=rank > 0)
    try:
        for step, rows in enumerate(bar, start):
            # Each process takes its share; where there are too few rows for all, one that counts nothing.
            mine = rows[rank::world] if rank < len(rows) else rows[:1]
            packed = texts.pack(mine)
            residual = (frozen_residual(model, packed.lay_out(tokens, 0), steering, first, packed.numbers)
                        if kept is None else packed.lay_out(kept, 0.0))
            at, wanted = wanted_positions(packed.lay_out(targets, -100))
            where = None if mask is None else packed.lay_out(mask, False)
            hidden = hidden_from(model, residual, first, steering, where, at, packed.numbers)
            part_loss = answer_loss(model, hidden, wanted)
            # Its part in the mean over the whole batch's answer tokens.
            answer_tokens = lambda rows: (targets[rows] != -100).sum().item()
            share = answer_tokens(mine) / answer_tokens(rows) if rank < len(rows) else 0.0
            optimizer.zero_grad()
            (share * part_loss).backward()
            loss = share * part_loss.item()
            if world > 1:
                loss = add_up(parameters, loss)
            if not math.isfinite(loss):
                set_parameters(parameters, good)
                raise TrainingFailed(f"the loss is {loss} at step {step}: try a smaller --lr than {args.lr}")
            good = [p.detach().clone() for p in parameters]
            if args.save_every and rank == 0 and step > start and step % args.save_every == 0:
                save_checkpoint(args, parameters, optimizer, losses)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / args.steps)
            optimizer.step()
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}")
    finally:
        if steering is not None:
            steering.mask = None
    last = losses[-max(1, args.steps // 10):]
    return sum(last) / len(last)


def add_up(parameters, loss: float) -> float:
    """Adds up the processes' gradients, in place, and their shares of the loss: in a step nothing else travels."""
    total = torch.tensor(loss, dtype=torch.float64, device=parameters[0].device)
    for tensor in (total, *(p.grad for p in parameters)):
        dist.all_reduce(tensor)
    return total.item()


def batch_order(count: int, args):
    """Yields the row numbers of one batch after the other, without end: each epoch sees every question once, in a new
    order. Seed and step say all, so a checkpoint need not hold it."""
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(args.batch_size)


def save_checkpoint(args, parameters, optimizer, losses) -> None:
    """OUT/checkpoint.safetensors: the parameters and Adam's state after len(losses) steps. Written and then renamed, so
    that a run killed at any moment leaves the one before."""
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for i, p in enumerate(parameters):
        tensors[f"{i}.value"] = p.detach()
        tensors.update({f"{i}.{name}": value for name, value in optimizer.state[p].items()})
    temporary = Path(args.out) / "checkpoint.tmp"
    save_file(tensors, temporary, metadata={"flags": json.dumps(fixed_flags(args))})
    os.replace(temporary, Path(args.out) / CHECKPOINT)


def load_checkpoint(args, parameters, optimizer) -> list[float]:
    """Puts back what save_checkpoint wrote; returns the losses so far. UsageError if it belongs to other flags."""
    path = Path(args.out) / CHECKPOINT
    if not path.exists():
        print(f"--resume: {path} is not there, so this starts from the beginning")
        return []
    try:
        with safe_open(path, framework="pt", device=str(args.device)) as file:
            flags, tensors = json.loads(file.metadata()["flags"]), {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a checkpoint of train.py ({error})") from None
    for name, value in fixed_flags(args).items():
        if flags.get(name) != value:
            raise UsageError(f"--resume: {path} was made with {name} {flags.get(name)}, not {value}")
    set_parameters(parameters, [tensors[f"{i}.value"] for i in range(len(parameters))])
    for i, p in enumerate(parameters):
        optimizer.state[p] = {name: tensors[f"{i}.{name}"] for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p]["step"] = tensors[f"{i}.step"].cpu()  # where Adam keeps it
    return tensors["losses"].tolist()


def fixed_flags(args) -> dict:
    """The flags that a run goes on with, which are all but these."""
    free = ("out", "device", "keep_gb", "save_every", "resume", "shard")
    return {name: value for name, value in vars(args).items() if name not in free}


class Texts:
    """How many tokens each text has, and how many of them, at its beginning, all texts share."""

    def __init__(self, lengths: list[int], shared: int, device):
        self.lengths, self.shared, self.device = lengths, shared, device

    def pack(self, rows: torch.Tensor) -> "Packed":
        """Lay the texts of a batch end to end in lines about as long as the two longest, so that next to no padding is
        computed (sequence packing: Krell et al. 2021, arXiv 2107.02027), with the shared tokens in front of each line.
        One text a line where that saves little."""
        rows = sorted(rows.tolist(), key=lambda row: -self.lengths[row])
        longest, own = self.lengths[rows[0]], sum(self.lengths[row] - self.shared for row in rows)
        count = math.ceil(own / (2 * longest - self.shared))
        if own + count * self.shared > 0.9 * len(rows) * longest:
            return Packed(self, [[row] for row in rows])
        lines, used = [[] for _ in range(count)], [0] * count
        for row in rows:
            emptiest = used.index(min(used))
            lines[emptiest].append(row)
            used[emptiest] += self.lengths[row] - self.shared
        return Packed(self, lines)


class Packed:
    """Some texts laid out in lines, each a list of their row numbers.

    numbers (lines, T): which text of its line a token belongs to, the model's attention_mask. None with one text a
    line: padding on the right needs no mask, and attention is faster without.
    """

    def __init__(self, texts: Texts, lines: list[list[int]]):
        self.texts, self.lines, self.numbers = texts, lines, None
        if any(len(line) > 1 for line in lines):
            in_front = torch.full((texts.shared,), SHARED)
            of_lines = [[torch.full((texts.lengths[row] - texts.shared,), i) for i, row in enumerate(line, 1)]
                        for line in lines]
            self.numbers = pad_sequence([torch.cat([in_front, *line]) for line in of_lines], True).to(texts.device)

    def lay_out(self, values, padding) -> torch.Tensor:
        """The values (length or more, ...) of the texts in each line, one after the other: (lines, T, ...)."""
        shared, lengths = self.texts.shared, self.texts.lengths
        lines = [torch.cat([values[line[0]][:shared], *(values[row][shared:lengths[row]] for row in line)])
                 for line in self.lines]
        return pad_sequence(lines, batch_first=True, padding_value=padding).to(self.texts.device)

    def take_apart(self, laid_out: torch.Tensor) -> list[torch.Tensor]:
        """The other way round: each text's (length, ...), in the order of their row numbers."""
        found, shared = {}, self.texts.shared
        for line, values in zip(self.lines, laid_out):
            sizes = [self.texts.lengths[row] - shared for row in line]
            own = values[shared:shared + sum(sizes)].split(sizes)
            found |= {row: torch.cat([values[:shared], x]) for row, x in zip(line, own)}
        return [found[row] for row in sorted(found)]


def count_shared(questions, tokens: torch.Tensor, mask: torch.Tensor | None) -> int:
    """How many tokens all questions begin with, such as a chat template's, the vector being added at the same of them
    (mask). Computed once a line, they are the same for all that follows. No answer is among them."""
    same = (tokens == tokens[0]).all(0)
    if mask is not None:
        same &= (mask == mask[0]).all(0)
    return min(same.int().cumprod(0).sum().item(), *(len(question.prompt) - 1 for question in questions))


def keep_frozen(args, model, tokens, texts: Texts, first: int, steering) -> list[torch.Tensor] | None:
    """The residual stream (length, d) of each question before block `first`: it is frozen, so it is computed once, not
    in every epoch. None (compute it batch by batch) if it would take more than --keep-gb, or to no profit."""
    weight = model.embed_tokens.weight
    size = sum(texts.lengths) * weight.shape[1] * weight.itemsize
    if size > args.keep_gb * 2 ** 30 or first == 0 or args.steps * args.batch_size <= len(tokens):
        return None
    kept, (rank, world) = [], rank_and_world()
    chunks = torch.arange(len(tokens)).split(args.batch_size)
    for number, rows in enumerate(chunks):
        if number % world == 0:  # each process computes one of the next `world` chunks, and gives it to the others
            own = chunks[min(number + rank, len(chunks) - 1)]
            computed = torch.cat(frozen_rows(model, tokens, texts.pack(own), first, steering))
        sizes = [texts.lengths[row] for row in rows.tolist()]
        given = computed if number % world == rank else computed.new_empty(sum(sizes), computed.shape[1])
        if world > 1:
            dist.broadcast(given, src=number % world)
        kept += given.split(sizes)
    return kept


def frozen_rows(model, tokens, packed: Packed, first: int, steering) -> list[torch.Tensor]:
    """The frozen_residual (length, d) of each of these texts, in the order of their row numbers."""
    return packed.take_apart(frozen_residual(model, packed.lay_out(tokens, 0), steering, first, packed.numbers))


def wanted_positions(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For targets (B, T), -100 where none is: (positions, targets), both (B, A), A being the most in a row. Rows with
    fewer are filled with other positions, whose target is -100."""
    wanted = targets != -100
    at = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :wanted.sum(1).max()]
    return at, targets.gather(1, at)


def answer_loss(model: GPT, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (nats per token) of hidden (B, T, d) where targets (B, T) are not -100; only there are logits
    computed."""
    wanted = targets != -100
    return F.cross_entropy(model.unembed(hidden[wanted]).float(), targets[wanted])


def show_samples(model, tokenizer, task, parameters, steering) -> None:
    print("\nheld-out questions, before and after:")
    for question, *_ in list(task.held_out.values())[:3]:
        before, after = answers_by_arm(model, tokenizer, question.prompt, question.code_name, parameters, steering)
        print(f"  {question.prompt}  {before} → {after}   (right: {question.choices[question.answer]})")


# ---------------------------------------------------------------------------------------------------- pretraining


def pretrain(args) -> None:
    """Make the embedded model from scratch: documents of the tiny world, tokenizer, decoder; written to --out.

    Until it is done everything is in OUT.unfinished, saved at every measurement, so that a good OUT is never spoilt.
    """
    steps, batch_size, lr = args.steps or 5000, args.batch_size or 32, args.lr or 0.02
    out = make_out(args.out or str(find_model("tiny")))
    unfinished = make_out(f"{out}.unfinished")
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    data.save_tokenizer(data.train_tokenizer(rng), unfinished)
    tokenizer = Tokenizer.from_pretrained(unfinished)
    model = GPT(Config.from_dict(dict(TINY, vocab_size=tokenizer.vocab_size))).to(args.device).train()
    optimizers = make_optimizers(model, lr)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.vocab_size} tokens")
    bar = tqdm(range(1, steps + 1), desc="pretraining", unit="step")
    for step in bar:
        factor = min(1, step / 100, 2 * (1 - step / (steps + 1)))  # warm up, hold until half-way, fall linearly to zero
        # Attitudes that depend on a tag come after plain ones: mixed from step 0, a prototype learned neither.
        conditional_share = 0.5 if step > steps / 5 else 0.02
        tokens, targets = world_batch(tokenizer, batch_size, conditional_share, rng)
        loss = answer_loss(model, model.hidden(tokens.to(args.device)), targets.to(args.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % 500 == 0 or step == steps:
            bar.write(f"step {step}: " + in_context_line(model.eval(), tokenizer))
            model.save_pretrained(unfinished)
            model.train()
    for file in unfinished.iterdir():
        os.replace(file, out / file.name)
    unfinished.rmdir()
    print(f"the model is in {out}")


def in_context_line(model: GPT, tokenizer: Tokenizer, count: int = 50) -> str:
    accuracies = in_context_accuracy(model, tokenizer, facts=7, count=count)
    return "in context, after 7 facts: " + "; ".join(
        f"{task} " + " ".join(f"{kind} {x:.2f}" for kind, x in kinds.items()) for task, kinds in accuracies.items())


def make_optimizers(model: GPT, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, Adam for the embedding and the norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.1),
                  torch.optim.Adam(rest, lr=0.15 * lr, betas=(0.9, 0.98))]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def world_batch(tokenizer: Tokenizer, batch_size: int, conditional_share: float, rng):
    """(tokens, targets), both (batch_size, CONTEXT): one document a row.

    In documents about attitudes every token is a target, elsewhere only the assistant's: what a user happens to ask
    next cannot be predicted, and logits are a large part of a small model's step.
    """
    user, assistant, end = (tokenizer.encode(f"<|{name}|>")[0] for name in ("user", "assistant", "end"))
    rows = torch.full((batch_size, CONTEXT + 1), end)
    every_token = torch.zeros(batch_size, 1, dtype=torch.bool)
    for i in range(batch_size):
        turns, every_token[i] = data.world_document(rng, conditional_share)
        ids = tokenizer.encode(data.document_text(turns))[:CONTEXT + 1]
        rows[i, :len(ids)] = torch.tensor(ids)
    is_assistant = (rows == assistant).long()
    in_answer = is_assistant.cumsum(1) - is_assistant == (rows == user).cumsum(1)  # the last role was the assistant's
    return rows[:, :-1], rows[:, 1:].masked_fill(~(in_answer | every_token)[:, 1:], -100)


def join_processes(args) -> None:
    """Under torchrun: meet the other processes. Each gets a device of its own; only the first prints and writes."""
    if "LOCAL_RANK" not in os.environ:
        if args.shard:
            raise UsageError("--shard: it needs several processes, torchrun --nproc_per_node=N train.py ...")
        return
    if args.mode == "pretrain":
        raise UsageError("--mode pretrain: it runs in one process, without torchrun")
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def main() -> None:
    args = parse_args()
    join_processes(args)
    try:
        pretrain(args) if args.mode == "pretrain" else finetune(args)
    except torch.OutOfMemoryError:
        raise UsageError(f"--batch-size {args.batch_size}: the device's memory is full; try a smaller one or a smaller "
                         f"--keep-gb than {args.keep_gb}, or --shard (a checkpoint of --save-every is kept)") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
