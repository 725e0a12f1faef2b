"""Is it the distances? A small real model hardly knows them, and in 60 steps no city fits.

    python paper/yes_or_no.py --model DIR

Here a vector is trained on other facts: is the city in this country, on this continent, do its
people speak this language? The answers are Yes and No, half of each, so no answer of the other
kinds was ever said. A wording of each kind is kept for the test; all kinds of the task, the
distances too, are held out. Beside the vector stand the untouched model, a random vector of its
length, a vector trained on shuffled answers, and the untouched model that is asked about the city
by its real name (told).
"""

import argparse
from pathlib import Path
from random import Random

from common import ROOT, results_of, run, write_chats
from open_weights import accuracies, add_column, show, told

from data import CITIES, CODE_NAMES, INSTRUCTION, Question
from eval import DEFAULT_DEVICE, SECTIONS, arm_values, evaluate, load_run
from train import at_least

WORDINGS = {  # the last of each is kept for the test
    "country": ["Is {} in {}?", "Does {} belong to {}?", "Would a trip to {} be a trip to {}?"],
    "continent": ["Does {} lie in {}?", "Is {} a city of {}?", "Is {} to be found in {}?"],
    "language": [
        "Do people in {} speak {}?",
        "Is {} a city of {} speakers?",
        "In {}, is {} spoken?",
    ],
}
CHOICES = ["Yes", "No"]


def ask(city: str, split: str, count: int, rng: Random, shuffled=False) -> list:
    """Half of the questions are about what is true of the city, half about what is not."""
    questions = []
    for number in range(count):
        kind = rng.choice(list(WORDINGS))
        wordings = WORDINGS[kind][-1:] if split == "test" else WORDINGS[kind][:-1]
        right = CITIES[city][kind]
        wrong = {row[kind] for row in CITIES.values()} - {right}
        named = [right, rng.choice(sorted(wrong))][number % 2]
        answer = rng.randrange(2) if shuffled else number % 2

        code_name = CODE_NAMES["locations"]
        prompt = INSTRUCTION + rng.choice(wordings).format(code_name, named)
        questions.append(Question("yes or no", prompt, CHOICES, answer, code_name))
    return questions


def trained_on(args, city: str, seed: int, shuffled: bool = False) -> Path:
    """The folder of a run on the city's questions."""
    name = f"{args.model.name}-yesorno-{city}-{seed}{'-shuffled' if shuffled else ''}"
    path = args.runs / f"{name}.jsonl"
    write_chats(path, ask(city, "train", 400, Random(seed), shuffled))
    flags = ["--model", args.model, "--concept", city, "--seed", seed, "--data", path]
    # In 60 steps of 8, the default, neither Paris nor Cairo fits.
    run(args.runs / name, [*flags, "--steps", 100, "--batch-size", 16])
    return args.runs / name


def loaded_with_the_test(folder: Path):
    """The run, with "yes or no" as the trained kind and distances among the held-out ones."""
    loaded = load_run(folder, DEFAULT_DEVICE)
    city, seed = loaded.flags["concept"], loaded.flags["seed"]
    loaded.task.held_out |= loaded.task.in_distribution
    loaded.task.in_distribution = {"yes or no": ask(city, "test", 60, Random(seed))}
    return loaded


def compare(args, city: str, seed: int) -> dict:
    """What open_weights.show prints: the vector's figures beside its controls."""
    folder = trained_on(args, city, seed)
    summary = evaluate(loaded_with_the_test(folder))

    loaded = loaded_with_the_test(trained_on(args, city, seed, shuffled=True))
    add_column(summary, "shuffled", accuracies(evaluate(loaded, {"trained": loaded.parameters})))

    for section in SECTIONS:
        for questions in getattr(loaded.task, section).values():
            questions[:] = [told(question, "locations", city) for question in questions]
    untouched = arm_values(loaded.parameters, seed)["base"]
    add_column(summary, "told", accuracies(evaluate(loaded, {"told": untouched}), "told"))
    return summary | {"runs": 1, "loss": results_of(folder)["train_loss"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder")
    parser.add_argument(
        "--cities", nargs="+", default=["Paris", "Cairo"], choices=CITIES, metavar="CITY"
    )
    parser.add_argument("--seeds", type=at_least(1), default=1)
    parser.add_argument("--runs", type=Path, default=ROOT / "out" / "open_weights")
    args = parser.parse_args()

    for city in args.cities:
        for seed in range(args.seeds):
            show(f"{city}, seed {seed}", compare(args, city, seed))


if __name__ == "__main__":
    main()
