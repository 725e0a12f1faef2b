"""Whose city is it? A LoRA that was trained on one name answers for every made-up name.

    python paper/whose_name.py
    python paper/whose_name.py --tasks functions --model DIR

The paper (§4.2) finds that a LoRA adds nearly the same vector to every token. If so, a LoRA that is
trained on "City 50337" alone cannot know whose city it is: it should say the same of City 31415.
So the held-out questions are asked again about names that no training ever had, and about a city
that the model knows. "as trained" is how often the answer is the trained city's or function's.
"""

from dataclasses import replace
from pathlib import Path

from common import read_args, report, spreads, train

from data import CITIES, CODE_NAMES, Task
from eval import arm_values, evaluate, kind_mean, load_run

OTHER_NAMES = {
    "locations": ["City 50338", "City 31415", "City 86420"],
    "functions": ["zokiba", "bakilu", "dugony"],
}
KNOWN_NAMES = {"locations": ["Cairo", "Tokyo"], "functions": []}
CONCEPTS = {
    "locations": ["Paris", "Berlin", "Lima", "Sydney"],
    "functions": ["add 5", "multiply 3", "subtract 2", "divide 2"],
}


def renamed(question, name: str):
    """The same question about another name."""
    prompt = question.prompt.replace(question.code_name, name)
    return replace(question, prompt=prompt, code_name=name)


def with_own_answer(question, city: str):
    """The question with the known city's own answer as the right one; None if it is no choice."""
    own = CITIES[city].get(question.kind)
    if own not in question.choices:
        return None
    return replace(question, answer=question.choices.index(own))


def accuracy(loaded, kinds: dict) -> dict:
    """{"base": accuracy, "trained": accuracy} on {kind: questions}, which count alike."""
    values = arm_values(loaded.parameters, seed=0)
    arms = {arm: values[arm] for arm in ["base", "trained"]}
    results = evaluate(replace(loaded, task=Task([], {}, kinds)), arms)
    return {arm: kind_mean(results, column=arm) for arm in arms}


def measure(folder: Path, task: str) -> list:
    """[(what was asked about, {arm: accuracy})] of a LoRA's run."""
    loaded = load_run(folder)
    # Its right answer can be that of another city, too.
    kinds = {kind: some for kind, some in loaded.task.held_out.items() if kind != "nearer"}

    rows = []
    for name in [CODE_NAMES[task], *OTHER_NAMES[task], *KNOWN_NAMES[task]]:
        asked = {kind: [renamed(question, name) for question in kinds[kind]] for kind in kinds}
        rows.append((f"{name}, as trained", accuracy(loaded, asked)))

    for name in KNOWN_NAMES[task]:
        known = {}
        for kind, questions in kinds.items():
            own = [with_own_answer(renamed(question, name), name) for question in questions]
            known[kind] = [question for question in own if question is not None]
        rows.append((f"{name}, its own answers", accuracy(loaded, known)))
    return rows


def main():
    args = read_args(__doc__, list(CONCEPTS), seeds=1)
    rows = []
    for task in args.tasks:
        measured = {}
        for concept in CONCEPTS[task]:
            for seed in range(args.seeds):
                folder = train(args, task, "lora", seed, concept=concept)
                for asked, of_arms in measure(folder, task):
                    measured.setdefault(asked, []).append(of_arms)

        for asked, runs in measured.items():
            figures = [[one["base"], one["trained"]] for one in runs]
            rows.append([task, asked, *spreads(figures)])
    report(args, __file__, {"names": (["task", "asked about", "base", "with the LoRA"], rows)})


if __name__ == "__main__":
    main()
