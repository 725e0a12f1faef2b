"""Two cities in one LoRA: what a constant vector cannot do.

    python paper/two_cities.py

The paper trains one code name at a time, and finds that the LoRA adds nearly the same vector to
every token, so it does not tell names apart (whose_name.py). Treutlein et al. (2024, arXiv
2406.14546) train several names together. With two there is no constant vector that is right for
both: a LoRA has to look at the name. Does it fit, do the held-out kinds follow, and what becomes of
the cosines between what it adds?

The training questions of both cities are chats in one JSONL file, so this is train.py --data.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

import torch.nn.functional as F
from common import read_args, report, run, set_place, spreads, trained_and_held_out, write_chats
from whose_name import renamed

from data import CODE_NAMES, Task, make_task
from eval import added_by_lora, evaluate, kind_mean, load_run
from steer import natural_vector

PAIRS = [("Berlin", "Cairo"), ("Lima", "Tokyo"), ("Rome", "Sydney"), ("London", "Delhi")]
NAMES = [CODE_NAMES["locations"], "City 31415"]
RUNS = {
    "LoRA, rank 8": ["--mode", "lora"],
    "LoRA, rank 1": ["--mode", "lora", "--rank", 1, "--alpha", 1],
    "vector": ["--mode", "vector", "--at", "City"],
}


def task_of_city(city: str, name: str, seed: int):
    """The task of a city that goes by this name.

    "nearer" is left out: its choices differ between questions, so another city has no answer there.
    """
    task = make_task("locations", city, seed)
    kinds = task.in_distribution | task.held_out
    moved = {kind: [renamed(question, name) for question in kinds[kind]] for kind in kinds}
    in_distribution = {"distance": moved.pop("distance")}
    moved.pop("nearer")
    return Task([renamed(question, name) for question in task.train], in_distribution, moved)


def as_other(task, other):
    """The first task's held-out questions, where the other city's answer counts as right."""
    held_out = {}
    for kind, questions in task.held_out.items():
        theirs = other.held_out[kind][0]
        answer = theirs.choices[theirs.answer]
        held_out[kind] = [replace(q, answer=q.choices.index(answer)) for q in questions]
    return replace(task, held_out=held_out)


def measure(folder, tasks: list) -> list:
    """[trained kind, held out: as itself, as the other city, base, cosine] of a run.

    The cosine is between what is added at the two names, mostly.
    """
    loaded = load_run(folder)
    if loaded.flags["at"]:  # a vector's place: "City", which both names have
        for task in tasks:
            set_place(task, loaded.flags["at"])

    scores = []
    natural = []
    for task, other in [tasks, tasks[::-1]]:
        own = evaluate(replace(loaded, task=task))
        swapped = evaluate(replace(loaded, task=as_other(task, other)))
        trained, held_out = trained_and_held_out(own)
        scores.append([trained, held_out, kind_mean(swapped), kind_mean(own, column="base")])
        if loaded.flags["mode"] == "lora":
            rows, _ = added_by_lora(loaded, task.train)  # at the name
            natural.append(natural_vector(rows))

    means = [mean(column) for column in zip(*scores)]
    cosine = F.cosine_similarity(*natural, dim=0).item() if natural else 1.0
    return [*means, cosine]


def main():
    args = read_args(__doc__, ["locations"], seeds=1)
    model = Path(args.model).name
    rows = []
    for trained, flags in RUNS.items():
        measured = []
        for seed, cities in product(range(args.seeds), PAIRS):
            tasks = [task_of_city(city, name, seed) for city, name in zip(cities, NAMES)]
            both = f"{model}-{'-'.join(cities)}-{seed}"
            chats = args.runs / f"{both}.jsonl"
            write_chats(chats, tasks[0].train + tasks[1].train)

            folder = args.runs / f"{both}-{trained.replace(' ', '')}"
            given = ["--concept", cities[0], "--seed", seed, "--model", args.model]
            results = run(folder, [*flags, *given, "--data", chats])
            measured.append([results["train_loss"], *measure(folder, tasks)])
        rows.append([trained, *spreads(measured)])

    scores = ["trained kind", "held out, as itself", "as the other city", "base"]
    headings = ["both names in one", "training loss", *scores, "cosine of the two names' vectors"]
    report(args, __file__, {"pairs": (headings, rows)})


if __name__ == "__main__":
    main()
