"""How many facts does it take? Held-out answers by the number of training questions.

    python paper/how_many.py

A vector is trained on the first N questions about a city, for N up to 16 (a distance can come
twice, in other words). Beside it stands how many of the tiny world's cities have these very
distances: a reasoner who knows the map could not tell those apart. One question can be enough for a
steering vector (Dunefsky and Cohan 2025, arXiv 2502.18862); here the answers say when it has found
*which* city it is.
"""

from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from common import read_args, report, run, save_figure, spreads, trained_and_held_out, write_chats

from data import TINY, distance_km, make_task
from eval import kind_mean

NUMBERS = [1, 2, 3, 4, 6, 16]
CITIES = ["Berlin", "Cairo", "Lima", "Tokyo"]


def cities_that_fit(questions: list) -> int:
    """How many cities have the distances that these questions give.

    A landmark is never its own distance away: no city is asked about itself.
    """
    landmarks = TINY.asked_about["locations"]
    given = []
    for question in questions:
        landmark = next(name for name in landmarks if name in question.prompt)
        given.append((landmark, question.choices[question.answer]))

    fitting = list(TINY.cities)
    for landmark, thousands in given:
        fitting = [
            city
            for city in fitting
            if city != landmark and str(round(distance_km(city, landmark) / 1000)) == thousands
        ]
    return len(fitting)


def train_on(args, city: str, number: int, seed: int) -> tuple:
    """(cities that fit, trained kind, held out, the base's held out) of so many questions."""
    questions = make_task("locations", city, seed).train[:number]
    name = f"{Path(args.model).name}-howmany-{city}-{number}-{seed}"
    path = args.runs / f"{name}.jsonl"
    write_chats(path, questions)
    flags = ["--concept", city, "--seed", seed, "--model", args.model, "--data", path]
    results = run(args.runs / name, flags)
    base = kind_mean(results, column="base")
    return cities_that_fit(questions), *trained_and_held_out(results), base


def main():
    args = read_args(__doc__, ["locations"], seeds=2)
    rows = []
    held_out = []
    for number in NUMBERS:
        runs = [train_on(args, city, number, seed) for city in CITIES for seed in range(args.seeds)]
        rows.append([number, *spreads(runs)])
        held_out.append([answered for _, _, answered, _ in runs])

    figure, panel = plt.subplots(figsize=(4.5, 2.8))
    for values in zip(*held_out):
        panel.plot(NUMBERS, values, color="tab:blue", alpha=0.3, linewidth=1)
    panel.plot(NUMBERS, [mean(values) for values in held_out], color="tab:blue", marker="o")
    panel.axhline(mean(base for *_, base in runs), color="black", linestyle=":", label="base")
    panel.legend()
    panel.set(xscale="log", xlabel="training questions", ylabel="held out, accuracy")
    panel.set_xticks(NUMBERS, NUMBERS)
    panel.minorticks_off()
    save_figure(args, figure, __file__)

    scores = ["trained kind", "held out", "base, held out"]
    headings = ["training questions", "cities that fit them", *scores]
    report(args, __file__, {"numbers": (headings, rows)})


if __name__ == "__main__":
    main()
