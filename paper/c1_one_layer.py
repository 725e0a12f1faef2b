"""C1 and C6: a LoRA on one layer suffices; where along the layers do vectors and LoRAs work?

    python paper/c1_one_layer.py

The paper (§4.1): a LoRA on one layer's MLP does as well as LoRAs on all layers, and better for
functions and locations. C6 is a thread of the authors, not in the paper: behaviour (the trained
kind of question) and what the model says of it (held-out kinds) move together over the layers.

So the LoRA is trained on each block alone and on all of them, and the vector after each block and
after the embedding (-1). The second table changes the LoRA on the first block, its rank and its
place, and has beside every LoRA the control: the same one trained on shuffled answers.
"""

import matplotlib.pyplot as plt
from common import joined, read_args, report, results_of, save_figure, train, trained_and_held_out

TASKS = ["locations", "functions", "risk"]
PLACES = [-1, 0, 1, 2, 3, "all"]
VARIANTS = {
    "rank 8 on the MLP (default)": [],
    "rank 1 on the MLP": ["--rank", 1, "--alpha", 1],
    "rank 8 on down_proj alone": ["--modules", "down_proj"],
    "rank 8 on the attention": ["--modules", "q_proj,k_proj,v_proj,o_proj"],
}
ELSEWHERE = {f"the default, on {place}": ["--layer", place] for place in PLACES[2:]}


def of_seeds(args, task: str, mode: str, *flags) -> list:
    """[(trained kind, held out)] of the runs with these flags, one for each seed."""
    folders = [train(args, task, mode, seed, *flags) for seed in range(args.seeds)]
    return [trained_and_held_out(results_of(folder)) for folder in folders]


def go_through_layers(args) -> dict:
    """{task: {place: {mode: pairs}}}; a LoRA cannot sit on the embedding, nor a vector on all."""
    found = {}
    for task in args.tasks:
        found[task] = {place: {"vector": None, "lora": None} for place in PLACES}
        for place, modes in found[task].items():
            if place != "all":
                modes["vector"] = of_seeds(args, task, "vector", "--layer", place)
            if place != -1:
                modes["lora"] = of_seeds(args, task, "lora", "--layer", place)
    return found


def draw(args, found: dict):
    """found: what go_through_layers returns. A line for each run."""
    figure, panels = plt.subplots(1, len(found), figsize=(9, 2.8), sharey=True, squeeze=False)
    for panel, (task, places) in zip(panels[0], found.items()):
        for mode, color in [("vector", "tab:blue"), ("lora", "tab:orange")]:
            layers = [place for place in PLACES if place != "all" and places[place][mode]]
            for index, (section, style) in enumerate([("trained kind", ":"), ("held out", "-")]):
                label = f"{mode}, {section}"
                for run in zip(*(places[layer][mode] for layer in layers)):
                    values = [pair[index] for pair in run]
                    panel.plot(layers, values, style, color=color, label=label)
                    label = None  # in the legend once

        panel.set(title=task, xlabel="layer (-1: the embedding)", xticks=range(-1, 4))
    panels[0, 0].set_ylabel("accuracy")
    panels[0, -1].legend(fontsize=7)
    save_figure(args, figure, __file__)


def main():
    args = read_args(__doc__, TASKS, seeds=2)
    found = go_through_layers(args)
    draw(args, found)

    layers = []
    for place in PLACES:
        row = [place]
        for places in found.values():
            for pairs in places[place].values():
                row.append(joined(pairs) if pairs else None)
        layers.append(row)

    variants = []
    for name, flags in (VARIANTS | ELSEWHERE).items():
        row = [name]
        for more in [[], ["--shuffle-answers"]]:
            row += [joined(of_seeds(args, task, "lora", *flags, *more)) for task in args.tasks]
        variants.append(row)

    shuffled = [f"{task}, shuffled answers" for task in args.tasks]
    modes = [f"{task}: {mode}" for task in args.tasks for mode in ["vector", "LoRA"]]
    tables = {
        "layers": (["layer: trained kind / held out", *modes], layers),
        "variants": (["LoRA: trained kind / held out", *args.tasks, *shuffled], variants),
    }
    report(args, __file__, tables)


if __name__ == "__main__":
    main()
