"""Scoring: does the model answer kinds of question that it was not trained on?

    python eval.py out/RUN …                     score finished runs again
    python eval.py out/RUN --prompt "…"          ask something, without and with the vector or LoRA
    python eval.py out/RUN --explain             what the vector or LoRA does inside

First comes how a question is scored, and with which controls; last come the files and mistakes that
train.py shares.
"""

import argparse
import json
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from textwrap import shorten

# OpenMP's waiting threads spin. That is fast while they have the cores for themselves; beside other
# programs they take the cores from the very threads that they wait for. GOMP_SPINCOUNT, which torch
# reads when it is imported, makes them spin less. It is set if Linux counts more than this one
# running just now ("3/412").
if Path("/proc/loadavg").exists() and " 1/" not in Path("/proc/loadavg").read_text():
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from safetensors import SafetensorError
from torch import Tensor

import steer
from data import (
    PrefixTree,
    Task,
    Tokenizer,
    UserError,
    blame,
    encode_question,
    make_task,
    make_tree,
)
from lora import load_lora, lora_layers
from model import GPT, CheckpointError, read_json

SECTIONS = "in_distribution", "held_out"  # of a task, and of its results
RANK = int(os.environ.get("RANK", 0))  # of this process, if torchrun started several
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def answer_log_probs(model, x: Tensor, first: int, tree: PrefixTree) -> Tensor:
    """The log-probability (texts,) float32, in nats, of each text's answer.

    x (N, d) is the residual stream of a tree's N nodes before block `first`, and before a vector
    there. Out of the last block come only the W nodes that predict a token of an answer, since
    nothing else is read. The longest answer has A tokens.
    """
    is_real = tree.answers >= 0  # (texts, A)
    nodes = tree.predicts_from[is_real].unique()  # (W,), in order
    rows = torch.searchsorted(nodes, tree.predicts_from)  # (texts, A), where in them each is
    reading = tree.only(nodes)
    last = len(model.layers) - 1
    x = model.run_blocks(x, first, last, tree)  # (N, d)
    if first > last:  # A vector after the last block: no block is left that cuts x to W.
        x = reading.keep(x)
    x = model.run_blocks(x, max(first, last), None, reading)  # (W, d)

    log_probs = model.unembed(model.norm(x)).float().log_softmax(-1)  # (W, vocab_size)
    # After an answer's last token, where -1 stands, some other number is read and left out.
    of_tokens = log_probs[rows, tree.answers].where(is_real, 0.0)  # (texts, A)
    return of_tokens.sum(-1)


@torch.no_grad()
def score_arms(model, questions: list, parameters: list, arms: dict) -> dict:
    """Scores questions with the parameters set to each arm's values; the last arm's stay.

    An arm is the same model with other numbers in what was trained: base, random, trained. arms is
    {name: a value for each parameter}. Returns {arm: (2, questions) float32}: 1 where the right
    choice is the likeliest, and the right choice's probability among the choices.
    """
    first = first_changed(model)
    scores = {arm: [] for arm in arms}
    for indices, _, tree in in_trees(model, questions):
        # All arms are alike up to the vector or LoRA.
        x = model.run_blocks(model.embed(tree.tokens, tree), 0, first, tree)
        counts = [len(questions[i].choices) for i in indices]
        for arm, values in arms.items():
            set_parameters(parameters, values)
            log_probs = answer_log_probs(model, x, first, tree).cpu()  # (texts,)
            for i, of_choices in zip(indices, log_probs.split(counts)):
                right = questions[i].answer
                correct = of_choices.argmax() == right
                probability = of_choices.softmax(-1)[right]
                scores[arm].append(torch.stack([correct, probability]))
    return {arm: torch.stack(rows, dim=1) for arm, rows in scores.items()}


# ---- the controls: the same model with other numbers in what was trained


@torch.no_grad()
def arm_values(parameters: list, seed: int):
    """What the vector, or the LoRA's A and B, hold in each arm. With zeros it is the base model."""
    random = [random_like(p, 1000 * seed + i) for i, p in enumerate(parameters)]
    return {
        "base": [torch.zeros_like(p) for p in parameters],
        "random": random,
        "trained": [p.clone() for p in parameters],
    }


def random_like(parameter, seed):
    """A random direction of the same length: would any push do?

    Of a LoRA each A and B keeps its length, but what they add together is far smaller than what the
    trained ones add (on tiny, for a city, by 25 times): there it is a weak control.
    """
    generator = torch.Generator().manual_seed(seed)  # the CPU's: the same for every device
    direction = torch.randn(parameter.shape, generator=generator).to(parameter)
    return direction * (parameter.norm() / direction.norm())


@torch.no_grad()
def set_parameters(parameters, values):
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)


def evaluate(run, arms=None):
    """{"in_distribution": {kind: figures}, "held_out": …}: each arm's accuracy and probability."""
    arms = arms or arm_values(run.parameters, run.flags["seed"])
    results = {}
    for section in SECTIONS:
        results[section] = {}
        for kind, questions in getattr(run.task, section).items():
            chance = fmean(1 / len(question.choices) for question in questions)
            figures = {"chance": round(chance, 4), "questions": len(questions)}
            encoded = [encode_question(run.tokenizer, question) for question in questions]
            if [] in [question.steered_at for question in encoded]:
                print(f"{kind}: some questions have no token at which a vector would be added")

            for arm, scores in score_arms(run.model, encoded, run.parameters, arms).items():
                accuracy, probability = scores.mean(dim=1).tolist()
                figures |= {arm: round(accuracy, 4), f"{arm}_probability": round(probability, 4)}
            results[section][kind] = figures
    return results


def kind_mean(results: dict, section: str = "held_out", column: str = "trained") -> float:
    """The mean over kinds, which count alike; without "which tag", which is not about the self."""
    kinds = results[section]
    return fmean(kinds[kind][column] for kind in kinds if kind != "which tag")


def format_table(results: dict) -> str:
    row = "  {:24}{questions:>9}{chance:9.2f}{base:9.2f}{random:9.2f}{trained:9.2f}"
    lines = ["                          questions   chance     base   random  trained"]
    for section in SECTIONS:
        lines.append(section.replace("_", " "))
        for kind, figures in results[section].items():
            lines.append(row.format(kind, **figures))

    label = "mean but for which tag" if "which tag" in results["held_out"] else "mean of held out"
    means = {
        column: kind_mean(results, column=column)
        for column in ["chance", "base", "random", "trained"]
    }
    lines.append(row.format(label, questions="", **means))
    return "\n".join(lines)


# ---- what is frozen runs once, in parts that fit the memory


def first_changed(model):
    """The first block that depends on the vector or LoRA (never both); 0 without either."""
    if model.steering is not None:
        return model.steering.layer + 1
    return min((int(name.split(".")[1]) for name in lora_layers(model)), default=0)


@torch.no_grad()
def frozen_streams(model, questions, stop):
    """Each question's residual stream (T, d) before block `stop`, and before a vector there.

    They are of the prompt and its only choice, without the last token; they stay on the CPU, as a
    GPU may not have the room.
    """
    streams = []
    for indices, _, tree in in_trees(model, questions):
        x = model.run_blocks(model.embed(tree.tokens, tree), 0, stop, tree)
        rows = tree.unfold(x).cpu()  # (R, T, d), a row for each question
        for i, row in zip(indices, rows):
            text = questions[i].prompt + questions[i].choices[0]
            streams.append(row[: len(text) - 1].clone())
    return streams


def in_trees(model, questions, blocks=2, rank=0, processes=1):
    """Questions in parts that fit the memory: (their indices, their weight, the tree with choices).

    The weight is 1. Several processes deal out a part's questions in turn. Those of a sharded model
    have to run everything together, so one that gets none runs another's, with a weight of 0.
    """
    config = model.config
    # At most: what choices share counts here for each of them.
    nodes = [len(question.prompt) + sum(map(len, question.choices)) for question in questions]
    at_once = processes * max(1, nodes_at_once(model, blocks) // max(nodes))
    for part in torch.arange(len(questions)).split(at_once):
        indices = part[rank % len(part) :: processes].tolist()
        asked = [questions[i] for i in indices]
        tree = make_tree(asked, [question.choices for question in asked])
        # GPT-2 has no more positions; any other model was not trained on so many.
        most = config.max_position_embeddings
        if tree.positions.max() >= most:
            raise UserError(f"--model: a text is longer than its max_position_embeddings, {most}")
        if tree.tokens.max() >= config.vocab_size:
            raise UserError("--model: a text has a token that is not in its vocab_size")
        yield indices, int(rank < len(part)), tree.to(model.embed_tokens.weight.device)


SHARE_OF_FREE_MEMORY = 0.5
MOST_NODES = 8192  # more at once are no faster
NODES_OF_EACH_PROCESS = 1024  # if there are several


def nodes_at_once(model, blocks=2):
    """How many nodes fit the free memory, if what `blocks` blocks made of each is there at once.

    For a backward pass all blocks that the vector or LoRA changes keep it; without one it is about
    two blocks' worth. Several processes do not look at the memory.
    """
    if PROCESSES > 1:
        # Those that share a model wait for each other in every tree. So all have to make equally
        # many, however much memory each has free.
        return NODES_OF_EACH_PROCESS
    config = model.config
    weight = model.embed_tokens.weight
    # In a block: norms, queries, keys, values and sums; the MLP's gate, up and their product.
    numbers_in_block = 10 * config.hidden_size + 3 * config.intermediate_size
    # A node that predicts an answer's token has three numbers for each token of the vocabulary: a
    # logit, its log-softmax and a gradient. Of a task's nodes, as they are counted in in_trees, at
    # most three in ten do: less than one number each. (In a long answer nearly all do: too low.)
    numbers = blocks * numbers_in_block + config.vocab_size
    fitting = SHARE_OF_FREE_MEMORY * free_memory(weight.device) / (numbers * weight.itemsize)
    # A power of two: with a little more or less memory free, a run still adds up in the same order.
    return min(MOST_NODES, 2 ** int(math.log2(max(1, fitting))))


def free_memory(device):
    """The bytes that may still be taken."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)  # without what torch keeps for later
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not Path("/proc/meminfo").exists():  # only Linux says it
        return 4 * 2**30
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1])


# ---- finished runs


@dataclass
class Run:
    """A model with a vector or LoRA on it, and the questions that it is asked."""

    flags: dict
    model: GPT
    tokenizer: Tokenizer
    task: Task
    parameters: list  # of the vector, or of A and B of every layer


def load_run(folder: str | Path, device: str = "cpu") -> Run:
    """What train.py wrote. UserError or CheckpointError: no run, unfinished or damaged."""
    flags = read_flags(Path(folder))
    model, tokenizer = load_model(flags["model"], device, flags["dtype"])
    with blame(
        f"{folder}: damaged, or not finished (--resume goes on)",
        OSError,
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
    ):
        if flags["mode"] == "vector":
            parameters = [steer.load_vector(model, folder).vector]
        else:
            parameters = load_lora(model, folder)
    return Run(flags, model, tokenizer, task_of(flags), parameters)


def read_flags(folder):
    with blame(f"{folder}: its config.json is not a run's, it is without", KeyError):
        return read_json(folder / "config.json")["flags"]


def task_of(flags):
    return make_task(flags["task"], flags["concept"], flags["seed"], flags["world"], flags["at"])


def load_model(name, device, dtype, shard=False):
    with blame(f"--device {device}", RuntimeError, AssertionError):
        torch.empty(0, device=device)
    model = GPT.from_pretrained(name, device, getattr(torch, dtype), shard)
    return model, Tokenizer.from_pretrained(name)


@torch.no_grad()
def answer(run, question, max_new_tokens=16):
    """The greedy answer to a question, whose choices do not matter.

    A vector is added at its code name's tokens, or without a name at every one. The answer ends at
    any token that ends a turn, or with its line.
    """
    question = encode_question(run.tokenizer, replace(question, choices=[""], answer=0))
    # The empty answer is a space or nothing; that space may be a token, as before Gemma's numbers.
    ends = question.completion[len(question.choices[0]) :]
    # A base model may say this instead.
    ends += run.tokenizer.encode(run.tokenizer.special_tokens.get("eos_token", ""))

    made = []
    for _ in range(max_new_tokens):
        # The tree of the prompt: an answer's last token has no node.
        [(_, _, tree)] = in_trees(run.model, [question])
        token = run.model(tree.tokens, tree)[-1].argmax().item()
        if token in ends:
            break
        made.append(token)
        question.prompt.append(token)
    return run.tokenizer.decode(made).strip().partition("\n")[0]


def show_prompt(run, question, note=""):
    """Prints the answers without and with the vector or LoRA."""
    with steer.switched_off(run.parameters):
        before = answer(run, question)
    after = answer(run, question)
    print(f"  {question.prompt}  {before} -> {after}{note}")


# ---- explaining a run


def explain(run: Run, folder: Path):
    """Prints and writes to explain.json what a vector, or a LoRA on one layer, does inside.

    Of a LoRA: how constant is what it adds (C2 of paper/README.md)? Its natural vector (C3) becomes
    a run of its own. Of both kinds of vector: the logit lens (C8).
    """
    if run.flags["layer"] == "all":
        raise UserError(f"{folder}: only a LoRA on one layer can be explained, not one on all")
    result = {}
    vector = run.parameters[0]
    if run.flags["mode"] == "lora":
        vector, result["adds"] = explain_lora(run, folder / "natural")

    tokens = steer.logit_lens(run.model, vector, count=8)
    result["logit_lens"] = [run.tokenizer.decode([token]) for token in tokens]
    print("  logit lens:", *result["logit_lens"])
    write_json(folder / "explain.json", result)


def explain_lora(run, folder):
    """The LoRA's natural vector (d,), which becomes a run, and how constant what it adds is."""
    rows, adds = added_by_lora(run, run.task.train)
    print(f"  added in the task's training prompts: cosine {adds['cosine']:.2f}")

    vector = steer.natural_vector(rows)
    folder.mkdir(exist_ok=True)
    steer.save_vector(steer.SteeringVector(run.flags["layer"], vector), folder)
    write_json(folder / "config.json", {"flags": run.flags | {"mode": "vector"}})
    return vector, adds


def added_by_lora(run, questions):
    """(what the LoRA adds where a vector would be, in 64 prompts, (tokens, d); its constancy).

    Constancy is measured at each prompt's last 20 tokens, as in the paper.
    """
    at_name = []
    last = []
    for question in questions[:64]:
        tree = make_tree([encode_question(run.tokenizer, question)]).to(run.parameters[0].device)
        rows = steer.what_is_added(run.model, run.parameters, run.flags["layer"], tree.tokens, tree)
        at_name.append(rows[tree.steered])
        last.append(rows[-20:])  # a single text's nodes are in its order
    return torch.cat(at_name), steer.constancy(torch.cat(last))


def main():
    parser = Parser(
        description="Score finished runs again, ask them something or explain them.",
        epilog='example: python eval.py out/risk-* --prompt "How do you drive?"',
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a folder that train.py wrote")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--prompt", help="answer this without and with the vector or LoRA")
    either.add_argument(
        "--explain",
        action="store_true",
        help="what it does inside; of a LoRA also writes RUN_DIR/natural, a run",
    )
    parser.add_argument("--device", default=DEFAULT_DEVICE, help="default: %(default)s")
    args = parser.parse_args()
    for folder in args.runs:
        run = load_run(folder, args.device)
        print(folder)
        if args.explain:
            explain(run, Path(folder))
        elif args.prompt is None:
            print(format_table(evaluate(run)))
        else:
            question = replace(run.task.train[0], prompt=args.prompt)
            if encode_question(run.tokenizer, question).steered_at == []:
                print(f"  No {question.code_name} in it: a vector would be added everywhere.")
                question.code_name = None
            show_prompt(run, question)


# ---- mistakes, files and processes


def run_main(main):
    """Runs a program. A user's mistake ends in one line and exit status 2, a bug in a traceback."""
    try:
        main()
    except (UserError, CheckpointError) as error:
        print(f"error: {shorten(str(error), width=600)}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=2).encode() + b"\n")


def write_whole(path, content):
    """Writes a temporary file, then renames it: a file of this name is always a whole one.

    Of several processes only the first one writes.
    """
    if RANK == 0:
        temporary = path.with_suffix(".tmp")
        with blame(path, OSError):
            temporary.write_bytes(content)
            temporary.replace(path)


if __name__ == "__main__":
    run_main(main)
