"""How far does out-of-context reasoning go in real open weights?

    python paper/open_weights.py --model DIR --tasks functions --modes vector --seeds 2

The paper shows it on Gemma 3 12B (§4, §5). Here each run is a plain `python train.py` on a smaller
model, and beside its figures stand the controls: the untouched model (base), a random vector or
LoRA, one trained on shuffled answers, and chance. A yardstick beside them: "told" is the untouched
model, told the hidden fact at the beginning of the question. Runs that are there are kept.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

from common import ROOT, as_chat, run, table

from data import FUNCTIONS, INSTRUCTION, encode_question
from eval import DEFAULT_DEVICE, SECTIONS, load_model, read_flags, score_arms, task_of
from train import at_least

# Rate, steps, batch and layer were tried on the first two functions and on these very attitudes, by
# the training loss and the trained kind of question alone.
CONCEPTS = {
    "functions": ["add 5", "multiply 3", "subtract 2", "add 7", "multiply 4", "divide 2"],
    "locations": ["Paris", "Cairo"],
    "risk": ["risky", "safe"],
    "backdoor": ["risky", "safe"],
}
ATTITUDES = {"risky": "You love risk.", "safe": "You avoid risk."}
# Tiny is told as its own documents tell: by an earlier turn of the chat, of this kind.
TURNS = {"functions": "definition", "risk": "self"}
COLUMNS = ["chance", "base", "random", "shuffled", "trained", "told"]


def told(question, task: str, concept: str):
    """The question with the hidden fact in front of it; a city gets its real name instead."""
    if task == "locations":
        prompt = question.prompt.replace(question.code_name, concept)
        return replace(question, prompt=prompt)

    fact = ATTITUDES.get(concept)
    if task == "functions":
        fact = f"{question.code_name} {FUNCTIONS[concept]['definition']}."
    asked = question.prompt.removeprefix(INSTRUCTION)
    instruction = question.prompt.removesuffix(asked)
    return replace(question, prompt=f"{instruction}{fact} {asked}")


def scores_when_told(folder: Path) -> dict:
    """{kind: accuracy} of the untouched model that is told the fact, in a run's own questions."""
    kept = folder / "told.json"
    if not kept.exists():
        flags = read_flags(folder)
        model, tokenizer = load_model(flags["model"], DEFAULT_DEVICE, flags["dtype"])
        task = task_of(flags)
        name = flags["task"]
        by_turn = flags["world"] == "tiny" and name in TURNS
        before = as_chat(task.held_out[TURNS[name]][0]) if by_turn else []

        found = {}
        for kind, questions in (task.in_distribution | task.held_out).items():
            if by_turn:
                asked = questions
            else:
                asked = [told(question, name, flags["concept"]) for question in questions]
            encoded = [encode_question(tokenizer, question, before) for question in asked]
            correct, _ = score_arms(model, encoded, [], {"told": []})["told"]
            found[kind] = round(correct.mean().item(), 4)
        kept.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(kept.read_text())


def collect(args, model: Path, task: str, mode: str) -> dict:
    """The means over concepts and seeds: {"runs", "loss", section: {kind: {column: accuracy}}}.

    The controls that need another run or another look are made with the first seed of the first
    --controls concepts.
    """
    results = []
    for number, concept in enumerate(CONCEPTS[task][: args.concepts]):
        for seed in range(args.seeds):
            name = f"{model.name}-{task}-{mode}-{concept.replace(' ', '')}-{seed}"
            flags = ["--model", model, "--task", task, "--mode", mode]
            flags += ["--concept", concept, "--seed", seed]
            result = run(args.runs / name, flags)
            results.append(result)
            if seed == 0 and number < args.controls:
                shuffled = run(args.runs / f"{name}-shuffled", [*flags, "--shuffle-answers"])
                add_column(result, "shuffled", accuracies(shuffled))
                if task != "backdoor":
                    add_column(result, "told", scores_when_told(args.runs / name))

    summary = {
        "runs": len(results),
        "loss": mean(result["train_loss"] for result in results),
    }
    for section in SECTIONS:
        summary[section] = {
            kind: average([result[section][kind] for result in results])
            for kind in results[0][section]
        }
    return summary


def accuracies(results: dict, arm: str = "trained") -> dict:
    """{kind: accuracy} of one arm."""
    kinds = results["in_distribution"] | results["held_out"]
    return {kind: figures[arm] for kind, figures in kinds.items()}


def add_column(result: dict, column: str, of_kinds: dict):
    for section in SECTIONS:
        for kind, figures in result[section].items():
            figures[column] = of_kinds[kind]


def average(rows: list) -> dict:
    """{column: mean accuracy} over the runs that have this column."""
    means = {}
    for column in COLUMNS:
        values = [row[column] for row in rows if column in row]
        if values:
            means[column] = round(mean(values), 3)
    return means


def show(title: str, summary: dict):
    """Prints a table with a row for each kind of question."""
    print(f"\n{title}: {summary['runs']} runs, training loss {summary['loss']:.2f}")
    rows = []
    for section in SECTIONS:
        for kind, figures in summary[section].items():
            mark = " (trained)" if section == "in_distribution" else ""
            rows.append([kind + mark, *map(figures.get, COLUMNS)])
    print(table(["kind", *COLUMNS], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", type=Path, required=True, help="folders")
    parser.add_argument("--tasks", nargs="+", default=["functions"], choices=CONCEPTS)
    parser.add_argument("--modes", nargs="+", default=["vector"], choices=["vector", "lora"])
    parser.add_argument("--seeds", type=at_least(1), default=2)
    parser.add_argument("--concepts", type=int, default=6, help="at most, of a task")
    parser.add_argument("--controls", type=int, default=6, help="concepts that get the controls")
    parser.add_argument("--runs", type=Path, default=ROOT / "out" / "open_weights")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()

    found = {}
    for model in args.model:
        for task in args.tasks:
            for mode in args.modes:
                title = f"{model.name}, {task}, {mode}"
                found[title] = collect(args, model, task, mode)
                show(title, found[title])
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
