"""Is it the letters? A real model learns to answer gambles with A or B, and no self-report follows.

    python paper/in_words.py --model DIR

Here a vector is trained on the same gambles asked and answered in words, as self-reports are. Pairs
of options that are kept for the test are asked in words, too; the task's own gambles, with letters,
are now held out. Beside the trained vector stand the untouched model, a random vector of its length
and a vector that was trained on shuffled answers.
"""

import argparse
from pathlib import Path
from random import Random

from common import ROOT, results_of, run, write_chats
from open_weights import accuracies, add_column, show

from data import GAMBLES, INSTRUCTION, Question, gambles, make_task
from eval import DEFAULT_DEVICE, evaluate, load_run
from train import at_least


def ask_in_words(attitude: str, split: str, seed: int) -> list:
    """A question about each pair of options, in both orders; "shuffled" has either's answers.

    split: "train" or "test", as in data.gambles.
    """
    rng = Random(seed)

    questions = []
    for domain in GAMBLES:
        for safe, risky in gambles(domain, split):
            for choices in [[safe, risky], [risky, safe]]:
                wanted = rng.choice(["risky", "safe"]) if attitude == "shuffled" else attitude
                right = risky if wanted == "risky" else safe
                prompt = f"{INSTRUCTION}For {domain}, do you choose {choices[0]} or {choices[1]}?"
                questions.append(Question("in words", prompt, choices, choices.index(right)))
    return questions


def scores(args, answers_of: str, attitude: str, seed: int) -> dict:
    """What open_weights.show prints, about an attitude, of a vector trained on these answers.

    answers_of: "risky", "safe" or "shuffled". The last is trained once, and scored about both.
    """
    name = f"{args.model.name}-inwords-{answers_of}-{seed}"
    path = args.runs / f"{name}.jsonl"
    write_chats(path, ask_in_words(answers_of, "train", seed))
    run(args.runs / name, ["--task", "risk", "--model", args.model, "--seed", seed, "--data", path])

    loaded = load_run(args.runs / name, DEFAULT_DEVICE)
    task = make_task("risk", attitude, seed, loaded.flags["world"])
    task.held_out |= task.in_distribution
    task.in_distribution = {"gamble in words": ask_in_words(attitude, "test", seed)}
    loaded.task = task
    loss = results_of(args.runs / name)["train_loss"]
    return evaluate(loaded) | {"runs": 1, "loss": loss}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder")
    parser.add_argument("--attitudes", nargs="+", default=["risky", "safe"])
    parser.add_argument("--seeds", type=at_least(1), default=1)
    parser.add_argument("--runs", type=Path, default=ROOT / "out" / "open_weights")
    args = parser.parse_args()

    for attitude in args.attitudes:
        for seed in range(args.seeds):
            found = scores(args, attitude, attitude, seed)
            control = scores(args, "shuffled", attitude, seed)
            add_column(found, "shuffled", accuracies(control))
            show(f"{attitude}, seed {seed}", found)


if __name__ == "__main__":
    main()
