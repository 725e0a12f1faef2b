"""From LoRA to vector: what is lost at each step?

    python paper/ladder.py

A LoRA adds B A h to what a layer writes: A reads the layer's input h, B writes to the stream. A
steering vector reads nothing. Between the two are steps, each with less to learn:

    LoRA, rank 8              A and B of the MLP's three matrices
    B only, rank 8            the same with A as it was drawn: random readers, learned writers
    down_proj, rank 1         a gated vector: one direction b, times a number (a · h) for each token
    down_proj, rank 1, B only the same with a random gate
    vector at every token     no gate
    vector at the code name   put where the name is

train.py makes the first and last ones; the others are its loop with other parameters. An attitude
has no code name, so there the last two are the same.
"""

from common import (
    CONCEPTS,
    both_kinds,
    joined,
    read_args,
    report,
    results_of,
    train,
    without_name,
)

from data import Tokenizer, make_task
from eval import Run, evaluate
from lora import lora_layers
from model import GPT
from train import add_intervention, parse_args, train_loop, training_questions

TASKS = ["locations", "functions", "risk"]
GATED = ["--modules", "down_proj", "--rank", 1, "--alpha", 1]
RUNGS = {
    "LoRA, rank 8": ("lora", []),
    "B only, rank 8": ("lora", []),
    "down_proj, rank 1": ("lora", GATED),
    "down_proj, rank 1, B only": ("lora", GATED),
    "vector at every token": ("vector", []),
    "vector at the code name": ("vector", []),
}


def train_here(args, task: str, rung: str, seed: int) -> tuple:
    """(numbers trained, loss, trained kind, held out) of a rung for which train.py has no flag."""
    mode, flags = RUNGS[rung]
    concept = CONCEPTS[task][seed % 2]
    words = ["--task", task, "--mode", mode, "--concept", concept, "--seed", seed, *flags]
    flags = parse_args([str(word) for word in [*words, "--model", args.model]])
    model, tokenizer = GPT.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
    asked = make_task(task, concept, seed)
    if rung == "vector at every token":
        asked = without_name(asked)

    parameters = add_intervention(flags, model)
    if "B only" in rung:
        layers = lora_layers(model).values()
        parameters = [layer.lora_B.weight for layer in layers]
        for layer in layers:
            layer.lora_A.weight.requires_grad_(False)

    questions = training_questions(flags, asked, tokenizer)
    losses = train_loop(flags, model, questions, parameters)
    results = evaluate(Run(vars(flags), model, tokenizer, asked, parameters))
    numbers = sum(parameter.numel() for parameter in parameters)
    return numbers, losses[-1], *both_kinds(results)


def train_there(args, task: str, rung: str, seed: int) -> tuple:
    """The same of one that train.py makes."""
    mode, flags = RUNGS[rung]
    results = results_of(train(args, task, mode, seed, *flags))
    return results["trainable_parameters"], results["train_loss"], *both_kinds(results)


def main():
    args = read_args(__doc__, TASKS, seeds=2)
    rows = []
    for rung in RUNGS:
        row = [rung]
        here = "B only" in rung or rung == "vector at every token"
        make = train_here if here else train_there
        for task in args.tasks:
            if task == "risk" and rung == "vector at every token":
                row.append(None)  # it is the one below
                continue
            runs = [make(args, task, rung, seed) for seed in range(args.seeds)]
            if task == args.tasks[0]:
                row.append(runs[0][0])
            row.append(joined([figures for _, *figures in runs]))
        rows.append(row)

    headings = ["trained: loss / trained kind / held out", "numbers", *args.tasks]
    report(__file__, {"rungs": (headings, rows)})


if __name__ == "__main__":
    main()
