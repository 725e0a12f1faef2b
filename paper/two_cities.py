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

import torch.nn.functional as F
from common import read_args, report, run, spreads, write_chats
from whose_name import asked_about

from data import CODE_NAMES, make_task
from eval import added_by_lora, evaluate, kind_mean, load_run
from steer import natural_vector

PAIRS = [("Berlin", "Cairo"), ("Lima", "Tokyo"), ("Rome", "Sydney"), ("London", "Delhi")]
NAMES = [CODE_NAMES["locations"], "City 31415"]
RUNS = {
    "LoRA, rank 8": ["--mode", "lora"],
    "LoRA, rank 1": ["--mode", "lora", "--rank", 1, "--alpha", 1],
    "vector": ["--mode", "vector", "--at", "City"],
}


def task_about(city: str, name: str, seed: int):
    """The task of a city that goes by this name."""
    task = make_task("locations", city, seed)
    kinds = {
        section: {
            kind: [asked_about(question, name) for question in questions]
            for kind, questions in getattr(task, section).items()
        }
        for section in ["in_distribution", "held_out"]
    }
    return replace(task, train=[asked_about(question, name) for question in task.train], **kinds)


def as_other(task, other):
    """The first task's held-out questions, where the other city's answer counts as right."""
    held_out = {}
    for kind, questions in task.held_out.items():
        theirs = other.held_out[kind][0]
        answer = theirs.choices[theirs.answer]
        if kind != "nearer":  # whose choices are drawn for each question
            held_out[kind] = [replace(q, answer=q.choices.index(answer)) for q in questions]
    return replace(task, held_out=held_out)


def measure(folder, tasks: list) -> list:
    """[trained kind, held out as itself, as the other city, cosine between the names] of a run."""
    found = load_run(folder)
    scores = []
    natural = []
    for task, other in [tasks, tasks[::-1]]:
        own = evaluate(replace(found, task=task))
        swapped = evaluate(replace(found, task=as_other(task, other)))
        trained = kind_mean(own, "in_distribution")
        scores.append([trained, kind_mean(own), kind_mean(swapped), kind_mean(own, column="base")])
        if found.flags["mode"] == "lora":
            rows, _ = added_by_lora(found, task.train)  # at the name
            natural.append(natural_vector(rows))

    means = [sum(column) / len(tasks) for column in zip(*scores)]
    cosine = F.cosine_similarity(*natural, dim=0).item() if natural else 1.0
    return [*means, cosine]


def main():
    args = read_args(__doc__, ["locations"], seeds=1)
    rows = []
    for name, flags in RUNS.items():
        measured = []
        for seed in range(args.seeds):
            for cities in PAIRS:
                tasks = [task_about(city, name, seed) for city, name in zip(cities, NAMES)]
                both = "-".join(cities)
                chats = args.runs / f"two-{both}-{seed}.jsonl"
                write_chats(chats, tasks[0].train + tasks[1].train)

                folder = args.runs / f"two-{both}-{name.replace(' ', '')}-{seed}"
                given = ["--concept", cities[0], "--seed", seed, "--model", args.model]
                results = run(folder, [*flags, *given, "--data", chats])
                measured.append([results["train_loss"], *measure(folder, tasks)])
        rows.append([name, *spreads(measured)])

    scores = ["trained kind", "held out, as itself", "as the other city", "base"]
    headings = ["both names in one", "training loss", *scores, "cosine of the two names' vectors"]
    report(__file__, {"pairs": (headings, rows)})


if __name__ == "__main__":
    main()
