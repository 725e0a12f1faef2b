"""C2: what a LoRA adds to the residual stream is nearly one direction at every token.

    python paper/c2_constant.py

The paper (§4.2): what a one-layer LoRA adds at any two tokens has a cosine near one in absolute
value, in training examples and in unrelated text. Here it is measured within one text at a time, at
all of its tokens, so that no token is compared with a copy of itself in another text; and between
training prompts and unrelated ones. The signed cosine says more than the absolute one: is it one
vector, or one line in both directions? And a cosine says nothing of lengths: they stand beside it.

Two controls show how much of it comes with training at all: a LoRA that was trained on shuffled
answers, and one with random A and B. The training loss says what the former could learn by heart.
"""

from statistics import mean

import torch
from common import (
    added_to,
    joined,
    read_args,
    report,
    results_of,
    spread,
    spreads,
    train,
    unrelated_questions,
)
from torch.nn.functional import normalize

from eval import arm_values, load_run, set_parameters
from steer import constancy

TASKS = ["locations", "functions", "risk", "backdoor"]
TEXTS = 16  # of each kind of prompt
FIGURES = [
    "training prompts: cosine",
    "absolute",
    "unrelated prompts: cosine",
    "absolute",
    "between the two",
    "length",
    "its deviation / mean",
]


def how_constant(loaded, unrelated: list) -> list:
    """The FIGURES. A cosine within a text is a mean over texts, each measured by itself."""
    figures = []
    directions = []
    for questions in [loaded.task.train, unrelated]:
        texts = [added_to(loaded, question) for question in questions[:TEXTS]]
        for name in ["cosine", "abs_cosine"]:
            figures.append(mean(constancy(rows)[name] for rows in texts))
        directions.append(normalize(torch.cat(texts), dim=-1).mean(0))
        if questions is loaded.task.train:
            lengths = torch.cat(texts).norm(dim=-1)

    # The mean cosine of every token of one kind of prompt with every one of the other.
    between = directions[0] @ directions[1]
    deviation = lengths.std() / lengths.mean()
    return [*figures, between.item(), lengths.mean().item(), deviation.item()]


def measure(folder) -> dict:
    """{"trained" or "random": figures} of a run's LoRA, and of random A and B."""
    loaded = load_run(folder)
    unrelated = unrelated_questions(loaded.flags["task"])

    measured = {}
    for arm, values in arm_values(loaded.parameters, loaded.flags["seed"]).items():
        if arm != "base":  # which adds nothing
            set_parameters(loaded.parameters, values)
            measured[arm] = how_constant(loaded, unrelated)
    return measured


def compare_with_nulls(args) -> list:
    """Rows of the main table: each task's LoRA at the default layer, and its two nulls."""
    rows = []
    for task in args.tasks:
        of_lora = {"trained": [], "shuffled answers": [], "random": []}
        for seed in range(args.seeds):
            folder = train(args, task, "lora", seed)
            control = train(args, task, "lora", seed, "--shuffle-answers")
            loss = results_of(folder)["train_loss"]
            loss_of_control = results_of(control)["train_loss"]

            measured = measure(folder)
            of_lora["trained"].append([loss, *measured["trained"]])
            of_lora["random"].append([None, *measured["random"]])
            of_lora["shuffled answers"].append([loss_of_control, *measure(control)["trained"]])

        for lora, runs in of_lora.items():
            losses = [run[0] for run in runs]
            loss = None if lora == "random" else spread(losses)
            rows.append([task, lora, loss, *spreads([run[1:] for run in runs])])
    return rows


def go_through_layers(args) -> list:
    """Rows of the second table: the LoRA on each block of the model, in unrelated prompts."""
    rows = []
    for layer in range(4):  # tiny's blocks
        row = [layer]
        for task in args.tasks:
            runs = []
            for seed in range(args.seeds):
                folder = train(args, task, "lora", seed, "--layer", layer)
                runs.append(measure(folder)["trained"][2:4])
            row.append(joined(runs))
        rows.append(row)
    return rows


def main():
    args = read_args(__doc__, TASKS, seeds=2, one_concept=True)
    tables = {
        "nulls": (["task", "LoRA", "training loss", *FIGURES], compare_with_nulls(args)),
        "layers": (
            ["layer: cosine / absolute, unrelated prompts", *args.tasks],
            go_through_layers(args),
        ),
    }
    report(args, __file__, tables)


if __name__ == "__main__":
    main()
