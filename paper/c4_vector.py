"""C4: one vector that is trained from scratch induces out-of-context reasoning.

    python paper/c4_vector.py

The paper (§5.1): a steering vector trained at one layer, with everything else frozen, does what the
LoRA does (risk: a little under it; locations: far under it).

The first table has several seeds of two concepts a task, beside the controls: the untouched model,
a random vector of the trained one's length, a vector that was trained on shuffled answers, chance,
and the LoRA. The second has every city and every function of the tiny world. Where accuracy is at
its ceiling the probability of the right choice says more; and since choices can hide that an answer
would not have come by itself, the model is also asked without choices ("greedy": its own words have
to be the right answer's). "Told" is what the model knows: the untouched one, asked about the city
by its real name, or after a turn of the chat that tells it the function or the attitude.
"""

from statistics import mean

from common import read_args, report, results_of, spread, spreads, train, trained_and_held_out
from open_weights import scores_when_told

from data import ANSWERS, concepts
from eval import answer, kind_mean, load_run

TASKS = ["locations", "functions", "risk", "backdoor"]
ASKED = 12  # prompts of a kind, at most
SECTIONS = {"in_distribution": "trained kind", "held_out": "held out"}


def right_answers(question) -> list:
    """What counts as right without choices: for an attitude any answer of the right side."""
    right = question.choices[question.answer]
    for answers in ANSWERS.get(question.kind, []):  # of the safe side, of the risky side
        if right in answers:
            return answers
    return [right]


def greedy(folder) -> float:
    """The share of right greedy answers, a mean over held-out kinds; each prompt is asked once."""
    loaded = load_run(folder)
    of_kinds = []
    for kind, questions in loaded.task.held_out.items():
        if kind == "which tag":  # as in kind_mean
            continue
        prompts = {question.prompt: question for question in questions}
        right = []
        for question in list(prompts.values())[:ASKED]:
            said = answer(loaded, question)
            right.append(said in right_answers(question))
        of_kinds.append(mean(right))
    return mean(of_kinds)


def when_told(folder, section: str) -> float:
    """The untouched model's accuracy when it is told the hidden thing, a mean over kinds."""
    of_kinds = scores_when_told(folder)
    return mean(of_kinds[kind] for kind in results_of(folder)[section])


def compare(args, task: str, concept: str | None) -> list:
    """Two rows of the main table; concept: an attitude by itself, or None for the seeds' own."""
    vectors = []
    shuffled = []
    loras = []
    folders = []  # of the vectors
    for seed in range(args.seeds):
        vector = train(args, task, "vector", seed, concept=concept)
        control = train(args, task, "vector", seed, "--shuffle-answers", concept=concept)
        lora = train(args, task, "lora", seed, concept=concept)
        vectors.append(results_of(vector))
        shuffled.append(results_of(control))
        loras.append(results_of(lora))
        folders.append(vector)

    can_be_told = [] if task == "backdoor" else folders  # no turn of a chat tells a backdoor

    def means(runs, section, column="trained"):
        return spread([kind_mean(results, section, column) for results in runs])

    rows = []
    for section, name in SECTIONS.items():
        kinds = vectors[0][section]
        counted = [kind for kind in kinds if kind != "which tag"]  # as in kind_mean
        questions = sum(kinds[kind]["questions"] for kind in counted)
        rows.append([
            concept or task,
            name,
            questions,
            *(means(vectors, section, column) for column in ["chance", "base", "random"]),
            means(shuffled, section),
            means(vectors, section),
            means(vectors, section, "trained_probability"),
            spread([greedy(folder) for folder in folders]) if section == "held_out" else None,
            means(loras, section),
            spread([when_told(folder, section) for folder in can_be_told]),
        ])
    return rows


def every_concept(args, task: str) -> list:
    """A row of the second table: one run for each city or function."""
    found = {}
    bases = []
    for concept in concepts(task):
        results = results_of(train(args, task, "vector", 0, concept=concept))
        found[concept] = trained_and_held_out(results)
        bases.append(kind_mean(results, column="base"))

    trained, held_out = spreads(list(found.values()))
    worst_trained = min(trained for trained, _ in found.values())
    worst = sorted(found, key=lambda concept: found[concept][1])[:4]
    named = ", ".join(f"{concept} {found[concept][1]:.2f}" for concept in worst)
    return [task, len(found), trained, worst_trained, spread(bases), held_out, named]


def main():
    args = read_args(__doc__, TASKS, seeds=4)
    main_rows = []
    every = []
    for task in args.tasks:
        if task in ["locations", "functions"]:
            main_rows += compare(args, task, None)
            every.append(every_concept(args, task))
        else:  # two opposite attitudes would average to about a half by themselves
            for attitude in ["risky", "safe"]:
                rows = compare(args, task, attitude)
                main_rows += [[f"{task}, {row[0]}", *row[1:]] for row in rows]

    controls = ["chance", "base", "random vector", "shuffled answers"]
    methods = ["**vector**", "P(right)", "greedy", "**LoRA**", "told"]
    headings = ["task", "kinds", "questions", *controls, *methods]
    named = ["trained kind", "worst", "base, held out", "held out", "the worst, held out"]
    of_every = ["task", "concepts", *named]
    held_out = [[row[0], *row[2:]] for row in main_rows if row[1] == "held out"]  # for README
    tables = {
        "main": (headings, main_rows),
        "held_out": ([headings[0], *headings[2:]], held_out),
        "every": (of_every, every),
    }
    report(args, __file__, tables)


if __name__ == "__main__":
    main()
