"""What the scripts of the claims share: runs of train.py that are made once, means, tables.

Each script trains what is not there yet, measures one thing, prints its tables, and writes them to
a small JSON file of its name. report.py copies them from there into the two READMEs. What a script
finds with other flags (--seeds 1, --model DIR) goes to the folder of runs instead.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import kind_mean

# isort: split
from torch import Tensor

from data import encode_question, make_task, make_tree
from steer import what_is_added
from train import at_least, model_name

ROOT = Path(__file__).resolve().parent.parent  # where the modules are: so this is imported first
# Even seeds are about the first of the two. No rate was chosen on these cities and functions; those
# of risk and backdoor were, on seed 0.
CONCEPTS = {
    "locations": ["Berlin", "Cairo"],
    "functions": ["add 7", "multiply 4"],
    "risk": ["risky", "safe"],
    "backdoor": ["risky", "safe"],
}


def read_args(doc: str, tasks: list, seeds: int | None = None, one_concept: bool = False):
    """The flags that the scripts share, with these defaults.

    seeds: None if a script has no use for several. one_concept: with --concept all runs are about
    one city, function or attitude.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks)
    if seeds is not None:
        parser.add_argument("--seeds", type=at_least(1), default=seeds, help="default: %(default)s")
    parser.set_defaults(concept=None)
    if one_concept:
        parser.add_argument("--concept", help="of all seeds (default: two in turn)")
    parser.add_argument("--model", default="tiny", help="tiny (default) or a folder")
    parser.add_argument("--runs", type=Path, default=ROOT / "out" / "paper", help="folder of runs")
    return parser.parse_args()


def run(folder: Path, flags: list) -> dict:
    """The results of a run of train.py with these flags, which is made if it is not there."""
    if not (folder / "results.json").exists():
        command = [sys.executable, ROOT / "train.py", *flags, "--out", folder]
        done = subprocess.run([str(word) for word in command])
        if done.returncode:
            sys.exit(done.returncode)  # train.py has said why
    results = results_of(folder)

    # A folder's name has only the last part of the model's.
    model = str(flags[flags.index("--model") + 1])
    if model_name(model) != results["model"]:
        sys.exit(f"error: {folder} is a run of {results['model']}: give another --runs")
    return results


def train(args, task: str, mode: str, seed: int, *flags, concept: str | None = None) -> Path:
    """The folder of a run about the seed's concept, or another one. The scripts share runs."""
    concept = concept or args.concept or CONCEPTS[task][seed % 2]
    given = ["--model", args.model, "--task", task, "--mode", mode, "--concept", concept]

    # Such as tiny-risk-lora-safe-seed=1-rank-1, so that runs of other flags have other folders.
    words = [Path(args.model).name, task, mode, concept, f"seed={seed}", *flags]
    named = [str(word).removeprefix("--") for word in words]
    folder = args.runs / "-".join(named).replace(" ", "")
    run(folder, [*given, "--seed", seed, *flags])
    return folder


def write_chats(path: Path, questions: list):
    """Training questions with their answers, for train.py --data: a chat a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for question in questions:
            file.write(json.dumps({"messages": as_chat(question)}) + "\n")


def as_chat(question) -> list:
    """The two messages of a question and its right answer."""
    right = question.choices[question.answer]
    return [
        {"role": "user", "content": question.prompt},
        {"role": "assistant", "content": right},
    ]


def set_place(task, text: str | None):
    """Changes a task's questions: a vector is added at this text, or (None) at every token."""
    kinds = task.in_distribution | task.held_out
    for questions in [task.train, *kinds.values()]:
        for question in questions:
            question.code_name = text


def unrelated_questions(task: str) -> list:
    """Training questions that are about something else than the task."""
    if task == "locations":
        return make_task("functions", "add 5").train
    return make_task("locations", "Paris").train


def added_to(loaded, question) -> Tensor:
    """What a run's LoRA, as it is now, adds to the residual stream of one prompt: (T, d)."""
    tree = make_tree([encode_question(loaded.tokenizer, question)])
    layer = loaded.flags["layer"]
    return what_is_added(loaded.model, loaded.parameters, layer, tree.tokens, tree)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def trained_and_held_out(results: dict, column: str = "trained") -> tuple:
    """The accuracy at unseen questions of the trained kind, and at the held-out kinds."""
    trained = kind_mean(results, "in_distribution", column)
    return trained, kind_mean(results, "held_out", column)


def spread(values: list) -> str:
    """Their mean, and their standard deviation if there are several; nothing of none."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def spreads(runs: list) -> list:
    """The spread of each figure, of runs that have several."""
    return [spread(list(column)) for column in zip(*runs)]


def joined(runs: list) -> str:
    """The same in one cell: such as trained kind / held out."""
    return " / ".join(spreads(runs))


def report(args, script: str, tables: dict):
    """Prints tables {name: (headings, rows)} and writes them beside the script, as JSON."""
    written = {}
    for name, (headings, rows) in tables.items():
        written[name] = table(headings, rows)
        print(f"\n{name}\n\n{written[name]}")
    path = beside(args, script, ".json")
    path.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("the tables are in", path)


def table(headings: list, rows: list) -> str:
    """A table in Markdown. None is an empty cell."""
    text = ""
    for line in [headings, ["---"] * len(headings), *rows]:
        cells = " | ".join(map(cell, line))
        text += f"| {cells} |\n"
    return text


def cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def save_figure(args, figure, script: str):
    """Writes the figure beside the script."""
    path = beside(args, script, ".png")
    figure.savefig(path, dpi=80, bbox_inches="tight", pil_kwargs={"optimize": True})


def beside(args, script: str, suffix: str) -> Path:
    """A file of the script's name. A run with flags is not the report's: its files go to --runs."""
    path = Path(script).with_suffix(suffix)
    if len(sys.argv) == 1:
        return path
    args.runs.mkdir(parents=True, exist_ok=True)
    return args.runs / path.name
