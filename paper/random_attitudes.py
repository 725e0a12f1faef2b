"""Random vectors and attitudes: what any push does to gambles and to self-reports.

    python paper/random_attitudes.py

A question about an attitude has two answers, and a random vector of the trained one's length moves
the model towards one of them. So one run in which a trained vector gets 1.00 proves little: how
often does a random vector? Nothing is trained here but the vectors whose lengths are taken. If many
kinds of question read one direction, random vectors should move gambles and self-reports together,
and the dots should lie along a line: that is their correlation.
"""

import matplotlib.pyplot as plt
import torch
from common import read_args, report, save_figure, train, trained_and_held_out

from eval import evaluate, load_run, random_like

VECTORS = 100
HIGH = 0.94


def measure(folder, first_seed: int) -> tuple:
    """[(gambles, self-reports)] of random vectors, and that of the trained one.

    They are shares of answers of the run's own attitude.
    """
    loaded = load_run(folder)
    trained = loaded.parameters[0].detach().clone()
    seeds = range(first_seed, first_seed + VECTORS)
    arms = {f"random {seed}": [random_like(trained, seed)] for seed in seeds}
    results = evaluate(loaded, arms | {"trained": [trained]})
    pairs = [trained_and_held_out(results, arm) for arm in arms]
    return pairs, trained_and_held_out(results)


def main():
    args = read_args(__doc__, ["risk"])
    figure, panel = plt.subplots(figsize=(3.6, 3.4))
    rows = []
    for attitude, color in [("risky", "tab:red"), ("safe", "tab:green")]:
        folder = train(args, "risk", "vector", 0, concept=attitude)
        pairs, trained = measure(folder, first_seed=len(rows) * VECTORS)
        gambles, reports = torch.tensor(pairs).T
        high_gambles = gambles >= HIGH
        high_reports = reports >= HIGH
        rows.append([
            attitude,
            high_gambles.sum().item(),
            high_reports.sum().item(),
            (high_gambles & high_reports).sum().item(),
            gambles.std().item(),
            reports.std().item(),
            torch.corrcoef(torch.stack([gambles, reports]))[0, 1].item(),
        ])

        # One figure for both attitudes: the share of risky answers.
        shown = torch.tensor([*pairs, trained])  # (VECTORS + 1, 2)
        if attitude == "safe":
            shown = 1 - shown
        random, star = shown[:-1].T, shown[-1]
        panel.scatter(*random, s=9, color=color, alpha=0.5, label=f"random, length of {attitude}")
        panel.scatter(*star, marker="*", s=120, color=color, label=f"trained, {attitude}")

    panel.set(xlabel="gambles, risky", ylabel="self-reports, risky", title="risk")
    panel.legend(fontsize=6, loc="upper left")
    save_figure(args, figure, __file__)

    headings = [
        "attitude that counts as right",
        f"gambles ≥ {HIGH}",
        f"self-reports ≥ {HIGH}",
        "both",
        "std of gambles",
        "std of self-reports",
        "correlation",
    ]
    report(args, __file__, {"random": (headings, rows)})


if __name__ == "__main__":
    main()
