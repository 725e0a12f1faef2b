"""Scoring: does the model answer kinds of question that it was not trained on? What was added to it?"""

import argparse
import json
import os
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

import data
from data import Question, Task, Tokenizer, encode_question, make_task, make_tree
from lora import load_lora, lora_layers
from model import GPT, find_checkpoint
from steer import (SteeringVector, load_vector, logit_lens, pairwise_cosines, principal_component,
                   save_vector)

SECTIONS = "in_distribution", "held_out"  # of a task and its results

# ---- mistakes and files

class UserError(ValueError):
    """A user's mistake, in one line: the flag or file at fault, and what would be right."""

@contextmanager
def reading(source):
    """What goes wrong in here is the fault of `source`, the user's file, folder or flag."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = "" if type(error) is ValueError else f"unexpected content, {type(error).__name__}: "
        raise UserError(f"{source}: {kind}{' '.join(str(error).split())[:400]}") from error

def run_main(main):
    """A user's mistake ends in one line and exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not all print an arrow
    try:
        main()
    except UserError as error:
        # Of torchrun's processes one says it; the others wait, as one's end ends all.
        time.sleep(3) if os.environ.get("RANK", "0") != "0" else print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)

def read_json(path):
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))

def write_json(path, content):
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

def write_whole(path, write):
    """write(temporary file), then rename it: a file of this name is always whole."""
    with reading(path):
        temporary = path.with_suffix(".tmp")
        write(temporary)
        os.replace(temporary, path)

def load_model(name, device, dtype, shard=False):
    with reading(f"--device {device}"):
        torch.empty(0, device=device)
    with reading(name):
        folder = find_checkpoint(name)
    with reading(f"{folder}, config.json, weights or tokenizer"):
        tokenizer = Tokenizer.from_pretrained(folder)  # first: weights fill what it frees
        return GPT.from_pretrained(folder, device, getattr(torch, dtype), shard), tokenizer

# ---- scoring

def rank_and_world():
    """This process's number, how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def add_up(*tensors):
    """Sums over processes in place."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)

def first_unfrozen(model):
    """The first block with a LoRA, or after the vector: before it all arms are alike."""
    if model.steering is not None:
        return model.steering.layer + 1
    return min((int(name.split(".")[1]) for name in lora_layers(model)), default=0)

def plan_memory(model, tree, blocks=0):
    """(How many of a tree's nodes to run at once if `blocks` blocks keep what a gradient needs, whether they
    should recompute it, the bytes in all), as measured on GPT-2 and Qwen."""
    config, weight, count = model.config, model.embed_tokens.weight, len(tree.tokens)
    inner = (3 if config.gated_mlp else 1) * config.intermediate_size
    block, stream = weight.itemsize * (inner + 10 * config.hidden_size), weight[0].nbytes  # of a node
    logits = 12 * config.vocab_size * len(tree.predicting[tree.answers >= 0].unique()) / count
    weights = sum(p.nbytes for p in model.parameters())
    room, working = max(48e6, weights / 40), 2 * block + logits
    # Fewer than 256 nodes at once are slow.
    recompute = blocks > 0 and 4 * room < 256 * (working + blocks * block)
    room, kept = (room, stream) if recompute else ((4 if blocks else 2) * room, block)
    return int(room / (working + blocks * kept)), recompute, weights + room + count * stream

@torch.no_grad()
def frozen_batches(model, tree, last, rank=0, world=1):
    """Yields process `rank`'s share of a tree's texts in batches: (texts, their nodes' numbers, their tree,
    the residual stream (n, d) before block `last`)."""
    device = model.embed_tokens.weight.device
    for texts in tree.parts(torch.arange(len(tree.row_of)), plan_memory(model, tree)[0])[rank::world]:
        used, part = tree.select(texts)
        part = part.to(device)
        yield texts, used, part, model.run_blocks(model.embed(part.tokens, part), 0, last, part)

def residual_stream(model, tree, last):
    """The residual stream (N, d) of a tree's nodes before block `last` and a vector there, in host memory:
    a GPU may have no room."""
    weight = model.embed_tokens.weight
    states = torch.zeros(len(tree.tokens), weight.shape[1], dtype=weight.dtype)
    for _, used, _, x in frozen_batches(model, tree, last):
        states[used] = x.cpu()
    return states

def answer_log_probs(model, x, first, tree):
    """The log-probability (texts,) float32, in nats, of each text's answer, from the residual stream x (N, d)
    before block `first`. The last block runs only where wanted."""
    real = tree.answers >= 0
    wanted, which = tree.predicting[real].unique(return_inverse=True)
    h = model.norm(model.run_blocks(x, first, tree=tree, wanted=wanted))  # (W, d)
    log_probs = model.unembed(h).float().log_softmax(-1)[which, tree.answers[real]]
    return torch.zeros(len(real), device=x.device).index_add(0, real.nonzero()[:, 0], log_probs)

@torch.no_grad()
def score_arms(model, questions, parameters, arms):
    """Scores questions with `parameters` set to each arm's values (the last stay). Returns {arm:
    (correct, probability)}, both (questions,) float32: 1 where the right choice is the likeliest, and its
    probability among the choices."""
    tree = make_tree(questions, [q.choices for q in questions])
    device, first = model.embed_tokens.weight.device, first_unfrozen(model)
    totals = torch.zeros(len(arms), len(tree.row_of), device=device)
    share = (0, 1) if model.sharded else rank_and_world()  # its blocks are run together
    for texts, _, part, x in frozen_batches(model, tree, first, *share):
        for total, values in zip(totals, arms.values()):
            set_parameters(parameters, values)
            total[texts.to(device)] = answer_log_probs(model, x, first, part)
    if not model.sharded:
        add_up(totals)
    results = {}
    for arm, total in zip(arms, totals.cpu()):
        choices = list(zip(total.split([len(q.choices) for q in questions]), questions))
        correct = torch.tensor([found.argmax().item() == q.answer for found, q in choices])
        probability = torch.stack([found.softmax(0)[q.answer] for found, q in choices])
        results[arm] = correct.float(), probability
    return results

def random_like(parameter, seed):
    """A random direction of the same norm: would any push do?"""
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return (direction * (parameter.norm().cpu() / direction.norm())).to(parameter.device)

@torch.no_grad()
def arm_values(parameters, seed):
    """What the vector, or A and B, hold in each arm. Zeros: the base model."""
    return {"base": [torch.zeros_like(p) for p in parameters],
            "random": [random_like(p, 1000 * seed + i) for i, p in enumerate(parameters)],
            "trained": [p.detach().clone() for p in parameters]}  # last: it stays

@torch.no_grad()
def set_parameters(parameters, values):
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)

@contextmanager
def switched_off(parameters):
    """In here the vector or LoRA holds zeros."""
    arms = arm_values(parameters, seed=0)
    set_parameters(parameters, arms["base"])
    yield
    set_parameters(parameters, arms["trained"])

def require_room(model, questions):
    """ValueError if a question has a token or a length that the model has not."""
    texts = [q.prompt + answer for q in questions for answer in (q.completion, *q.choices)]
    longest, top = max(map(len, texts)) - 1, max(map(max, texts))  # an answer's last token is not put in
    model.embed(torch.full((1, longest), top, device=model.embed_tokens.weight.device))

def encode_for(run, questions):
    """Token ids; UserError if the chat template refuses one or the model has no room."""
    with reading("the task's questions"):
        encoded = [encode_question(run.tokenizer, q) for q in questions]
        require_room(run.model, encoded)
    return encoded

def evaluate(run, arms=None):
    """{"in_distribution": {kind: figures}, "held_out": …}: each arm's accuracy and probability of the right
    answer, chance, the number of questions."""
    arms, results = arms or arm_values(run.parameters, run.flags["seed"]), {name: {} for name in SECTIONS}
    for section, kinds in results.items():
        for kind, questions in getattr(run.task, section).items():
            chance = sum(1 / len(q.choices) for q in questions) / len(questions)
            kinds[kind] = {"chance": round(chance, 4), "questions": len(questions)}
            scores = score_arms(run.model, encode_for(run, questions), run.parameters, arms)
            for arm, (correct, p) in scores.items():
                kinds[kind] |= {arm: round(correct.mean().item(), 4),
                                f"{arm}_probability": round(p.mean().item(), 4)}
    return results

def kind_mean(results, section="held_out", column="trained"):
    """Mean over the kinds, without "which tag", which is not about the self."""
    kept = [figures[column] for kind, figures in results[section].items() if kind != "which tag"]
    return sum(kept) / len(kept)

def format_table(results):
    arms = "chance", "base", "random", "trained"
    lines = [f"{'':26}{'questions':>9}" + "".join(f"{arm:>9}" for arm in arms)]
    for section in SECTIONS:
        lines.append(section.replace("_", " "))
        for kind, figures in results[section].items():
            cells = "".join(f"{figures[arm]:9.2f}" for arm in arms)
            lines.append(f"  {kind:24}{figures['questions']:>9}{cells}")
    label = "mean but for which tag" if "which tag" in results["held_out"] else "mean of held out"
    lines.append(f"  {label:33}" + "".join(f"{kind_mean(results, column=arm):9.2f}" for arm in arms))
    return "\n".join(lines)

# ---- finished runs

@dataclass
class Run:
    """The model with a vector or LoRA on it, and the questions."""
    flags: dict
    model: GPT
    tokenizer: Tokenizer
    task: Task
    parameters: list

def load_run(folder, device="cpu") -> Run:
    """What train.py wrote; UserError if no run, unfinished or damaged."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    with reading(folder / "config.json"):
        if config["finished"] is not True:
            raise ValueError("the run is not finished: train again, or go on with --resume")
        flags = config["flags"]
        is_vector, seed, at = {"vector": True, "lora": False}[flags["mode"]], flags["seed"], flags["at"]
        good = type(seed) is int and 0 <= seed < 2 ** 31 and (at is None or is_vector and isinstance(at, str))
        if not good:
            raise ValueError(f"seed {seed!r} or at {at!r} is out of range")
        task = make_task(flags["task"], flags["concept"], seed, at, data.WORLDS[flags["world"]])
        model, tokenizer = load_model(flags["model"], device, flags["dtype"])
    with reading(f"{folder}, {flags['mode']}"):
        parameters = [load_vector(model, folder).vector] if is_vector else load_lora(model, folder)
        if flags["layer"] not in ("all", first_unfrozen(model) - is_vector):
            raise ValueError(f"config.json has another layer, {flags['layer']}")
    return Run(flags, model, tokenizer, task, parameters)

@torch.no_grad()
def answer(run, prompt, code_name, max_new_tokens=16):
    """The greedy answer; the vector at code_name's tokens, or (None) at all."""
    with reading(f"the prompt {prompt!r}"):
        question, made = encode_question(run.tokenizer, Question("", prompt, [""], 0, code_name)), []
        while len(made) < max_new_tokens:
            tree = make_tree([replace(question, prompt=question.prompt + made)], [[[]]])
            tree = tree.to(run.parameters[0].device)
            token = run.model(tree.tokens, tree)[-1].argmax().item()
            if token in run.tokenizer.eos_ids:
                break
            made.append(token)
    return run.tokenizer.decode(made).strip()

def show_prompt(run, prompt, code_name, note=""):
    """Prints the answers without and with it."""
    with switched_off(run.parameters):
        before = answer(run, prompt, code_name)
    print(f"  {prompt}  {before} → {answer(run, prompt, code_name)}{note}")

# ---- explaining a run

def explain(run, folder):
    """Prints and writes to explain.json a vector's logit lens (C8), how constant what a LoRA adds is (C2).
    The LoRA's natural vector (C3), the first principal component of what it adds in training prompts at its
    mean length, becomes a run of its own."""
    vector, result = run.parameters[0].detach(), {}
    if run.model.steering is None:
        if run.flags["layer"] == "all":
            raise UserError(f"{folder}: only a LoRA on one layer can be explained, not on all")
        rows, result["adds"] = what_lora_adds(run)
        vector = principal_component(rows)[0] * rows.norm(dim=-1).mean()
        with reading(folder):
            (folder / "natural").mkdir(exist_ok=True)
            save_vector(SteeringVector(run.flags["layer"], vector), folder / "natural")
        flags = {**run.flags, "mode": "vector"}
        write_json(folder / "natural" / "config.json", {"flags": flags, "finished": True})
        print(f"  its natural vector instead of it: python eval.py {folder / 'natural'}")
    top, bottom = ([run.tokenizer.decode([id]) for id in ids] for ids in logit_lens(run.model, vector, 8))
    result["logit_lens"] = {"top": top, "bottom": bottom}
    write_json(folder / "explain.json", result)
    for text, figures in result.get("adds", {}).items():
        shown = (f"{name} {figures[name]:.2f}" for name in ("norm", "cosine", "abs_cosine", "share"))
        print(f"  added in {text} prompts: " + ", ".join(shown))
    print(f"  logit lens, top: {' '.join(top)}\n  logit lens, bottom: {' '.join(bottom)}")
    return result

def what_lora_adds(run):
    """What the LoRA adds in training prompts where a vector would be, (N, d); how constant it is in training,
    held-out and another task's prompts."""
    other = "functions" if run.flags["task"] == "locations" else "locations"
    unrelated = make_task(other, data.CONCEPTS[other][0])
    train = random.Random(run.flags["seed"]).sample(run.task.train, min(32, len(run.task.train)))
    texts = {"training": {"": train}, "held out": run.task.held_out, "unrelated": unrelated.held_out}
    figures = {}
    for text, kinds in texts.items():
        questions = encode_for(run, [q for questions in kinds.values() for q in questions[:32]])
        with switched_off(run.parameters):
            base = prompt_residuals(run, questions)
        added = [after - before for after, before in zip(prompt_residuals(run, questions), base)]
        figures[text] = constancy(torch.cat([rows[-20:] for rows in added]))  # as in the paper
        if text == "training":
            rows = torch.cat([r if q.positions is None else r[q.positions] for r, q in zip(added, questions)])
    return rows, figures

def prompt_residuals(run, questions):
    """The residual stream (T, d) float32 of each prompt after the run's layer."""
    tree = make_tree(questions, [[[]]] * len(questions))
    states = residual_stream(run.model, tree, run.flags["layer"] + 1).float()
    return [states[tree.nodes(i)] for i in range(len(questions))]

def constancy(rows):
    """Of rows (N, d): the mean cosine of two, as it is and (as in the paper) in absolute value, its histogram
    in 20 bins, and the first principal component's share."""
    cosines = pairwise_cosines(rows)
    return {"tokens": len(rows), "norm": rows.norm(dim=-1).mean().item(), "cosine": cosines.mean().item(),
            "abs_cosine": cosines.abs().mean().item(), "share": principal_component(rows)[1],
            "histogram": (cosines.abs().clamp(max=1).histc(20, 0, 1) / len(cosines)).tolist()}

def main():
    parser = Parser(description="Score finished runs again, ask them something or explain them.",
                    epilog='example: python eval.py out/risk-* --prompt "How do you drive?"')
    add, instead = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("runs", nargs="+", metavar="RUN_DIR", help="a run folder that train.py wrote")
    instead("--prompt", metavar="TEXT", help="answer this with and without the vector or LoRA")
    instead("--explain", action="store_true", help="what the vector or LoRA does inside; to explain.json")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args()
    for folder in args.runs:
        run = load_run(folder, args.device)
        print(folder)
        if args.explain:
            explain(run, Path(folder))
        elif args.prompt is not None:
            name = run.task.train[0].code_name
            place = name if name and name in args.prompt else None
            note = "" if place == name else f"   (no {name}: a vector is added everywhere)"
            show_prompt(run, args.prompt, place, note)
        else:
            print(format_table(evaluate(run)))

if __name__ == "__main__":
    run_main(main)
