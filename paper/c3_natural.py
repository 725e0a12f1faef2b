"""C3: one vector, taken out of a LoRA, does the LoRA's work alone.

    python paper/c3_natural.py

The paper (§4.3): the first principal component of what a LoRA adds, at its mean length and at every
token, induces out-of-context reasoning by itself (shown for functions), with less generalisation
than the LoRA. Two recipes for this "natural" vector are compared, both at scale 1 and with the sign
of the mean, so that nothing is fitted:

- the authors': what is added to all tokens of one text, centred, then its first component;
- ours (steer.natural_vector): what is added at the code name in training prompts (risk: at every
  token), not centred.

Then the same directions at other lengths. That is a sweep: its best point is not a result.
"""

from dataclasses import replace
from statistics import mean

import matplotlib.pyplot as plt
import torch
from common import (
    added_to,
    joined,
    read_args,
    report,
    save_figure,
    set_place,
    train,
    trained_and_held_out,
    unrelated_questions,
)
from torch import Tensor

from eval import added_by_lora, evaluate, load_run, random_like
from lora import remove_lora
from steer import attach, detach, natural_vector

TASKS = ["locations", "functions", "risk"]
SCALES = [0.25, 0.5, 1, 2, 4, 8]
PLACES = {"at the code name": "tab:blue", "at every token": "tab:green"}


def authors_vector(loaded) -> Tensor:
    """The first component (d,) of what the LoRA adds to one unrelated text, by the authors' recipe.

    Their code uses sklearn's PCA, which takes the mean away before it looks for a direction.
    """
    text = unrelated_questions(loaded.flags["task"])[0]
    rows = added_to(loaded, text)  # (T, d)
    center = rows.mean(0)
    direction = torch.linalg.svd(rows - center, full_matrices=False).Vh[0]
    if direction @ center < 0:
        direction = -direction
    return direction * rows.norm(dim=-1).mean()


def score(loaded, vectors: dict) -> dict:
    """{name: (trained kind, held out)} of vectors (d,) that are added instead of the LoRA."""
    steering = attach(loaded.model, loaded.flags["layer"])
    instead = replace(loaded, parameters=[steering.vector])
    arms = {name: [vector] for name, vector in vectors.items()}
    results = evaluate(instead, arms)
    detach(loaded.model)
    return {name: trained_and_held_out(results, name) for name in vectors}


def measure(folder) -> dict:
    """{"nothing", "the LoRA", (vector or scale, place): (trained kind, held out)} for one LoRA."""
    loaded = load_run(folder)
    seed = loaded.flags["seed"]
    rows, _ = added_by_lora(loaded, loaded.task.train)
    ours = natural_vector(rows)
    authors = authors_vector(loaded)

    results = evaluate(loaded)
    figures = {
        "nothing": trained_and_held_out(results, "base"),
        "the LoRA": trained_and_held_out(results),
    }
    remove_lora(loaded.model)

    vectors = {
        "authors' recipe": authors,
        "ours": ours,
        "random": random_like(ours, seed),
    }
    lengths = {scale: scale * ours for scale in SCALES}
    for place in PLACES:
        if place == "at every token":  # the last place, since this changes the task
            set_place(loaded.task, None)
        for name, pair in score(loaded, vectors | lengths).items():
            figures[name, place] = pair
    return figures


def draw(args, swept: dict):
    """swept: {task: the figures of each run}."""
    figure, panels = plt.subplots(1, len(swept), figsize=(9, 2.8), sharey=True, squeeze=False)
    for panel, (task, runs) in zip(panels[0], swept.items()):
        for place, color in PLACES.items():
            label = place
            for one in runs:
                held_out = [one[scale, place][1] for scale in SCALES]
                panel.plot(SCALES, held_out, color=color, marker="o", markersize=3, label=label)
                label = None  # in the legend once
        base = mean(one["nothing"][1] for one in runs)
        panel.axhline(base, color="black", linestyle=":", label="base")
        panel.set(xscale="log", title=task)
        panel.set_xlabel("length, 1 is what the LoRA adds")
        panel.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
        panel.minorticks_off()

    panels[0, 0].set_ylabel("held out, accuracy")
    panels[0, -1].legend(fontsize=8)
    save_figure(args, figure, __file__)


def main():
    args = read_args(__doc__, TASKS, seeds=4, one_concept=True)
    swept = {}
    for task in args.tasks:
        swept[task] = [measure(train(args, task, "lora", seed)) for seed in range(args.seeds)]
    draw(args, swept)

    rows = []
    for name in ["nothing", "the LoRA"]:
        rows.append([name, *(joined([one[name] for one in runs]) for runs in swept.values())])
    for place in PLACES:
        for name in ["authors' recipe", "ours", "random"]:
            row = [f"{name}, {place}"]
            for task, runs in swept.items():
                # An attitude has no code name: there both places are the same.
                no_place = task == "risk" and place == "at the code name"
                row.append(None if no_place else joined([one[name, place] for one in runs]))
            rows.append(row)
    report(args, __file__, {"recipes": (["added: trained kind / held out", *args.tasks], rows)})


if __name__ == "__main__":
    main()
