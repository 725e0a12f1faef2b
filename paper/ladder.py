"""From LoRA to vector: what is lost at each step?

    python paper/ladder.py

A LoRA adds B A h to what a linear layer writes: A reads its input h, and down_proj's B writes to
the stream. A steering vector reads nothing. Between the two are steps, each with less to learn:

    LoRA, rank 8              A and B of the MLP's three matrices
    B only, rank 8            the same with A as it was drawn: random readers, learned writers
    down_proj, rank 1         a gated vector: one direction b, times a number (a · h) for each token
    down_proj, rank 1, B only the same with a random gate
    vector at every token     no gate
    vector at the code name   put where the name is

train.py makes the first and last ones; the others are its loop with other parameters. An attitude
has no code name, so there the last two are the same.
"""

from statistics import mean

import torch
from common import (
    CONCEPTS,
    joined,
    read_args,
    report,
    results_of,
    set_place,
    train,
    trained_and_held_out,
)

from data import make_task
from eval import Run, evaluate, load_model
from lora import lora_layers
from train import add_intervention, parse_args, train_loop, training_questions

TASKS = ["locations", "functions", "risk"]
GATED = ["--modules", "down_proj", "--rank", 1, "--alpha", 1]
RUNGS = {  # mode, flags, and whether train.py can make it
    "LoRA, rank 8": ("lora", [], True),
    "B only, rank 8": ("lora", [], False),
    "down_proj, rank 1": ("lora", GATED, True),
    "down_proj, rank 1, B only": ("lora", GATED, False),
    "vector at every token": ("vector", [], False),
    "vector at the code name": ("vector", [], True),
}


def train_here(args, task: str, rung: str, seed: int) -> tuple:
    """(numbers trained, loss, trained kind, held out) of a rung for which train.py has no flag."""
    mode, extra, _ = RUNGS[rung]
    concept = CONCEPTS[task][seed % 2]
    words = ["--task", task, "--mode", mode, "--concept", concept, "--seed", seed, *extra]
    flags = parse_args([str(word) for word in [*words, "--model", args.model]])
    model, tokenizer = load_model(args.model, "cpu", "float32")
    asked = make_task(task, concept, seed)
    if rung == "vector at every token":
        set_place(asked, None)

    torch.manual_seed(seed)  # for A, as in train.py
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
    last = losses[-(flags.steps // 10) :]  # as in train.py
    return numbers, mean(last), *trained_and_held_out(results)


def train_there(args, task: str, rung: str, seed: int) -> tuple:
    """The same of one that train.py makes."""
    mode, extra, _ = RUNGS[rung]
    results = results_of(train(args, task, mode, seed, *extra))
    numbers = results["trainable_parameters"]
    return numbers, results["train_loss"], *trained_and_held_out(results)


def main():
    args = read_args(__doc__, TASKS, seeds=2)
    rows = []
    for rung, (_, _, by_train) in RUNGS.items():
        make = train_there if by_train else train_here
        numbers = None
        cells = []
        for task in args.tasks:
            if task == "risk" and rung == "vector at every token":
                cells.append(None)  # it is the one below
                continue
            runs = [make(args, task, rung, seed) for seed in range(args.seeds)]
            numbers = runs[0][0]
            cells.append(joined([figures for _, *figures in runs]))
        rows.append([rung, numbers, *cells])

    headings = ["trained: loss / trained kind / held out", "numbers", *args.tasks]
    report(args, __file__, {"rungs": (headings, rows)})


if __name__ == "__main__":
    main()
