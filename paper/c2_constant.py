"""C2: what a LoRA adds to the residual stream is nearly the same vector at every token.

    python paper/c2_constant.py

The paper (§4.2): what a one-layer LoRA adds at any two tokens has a cosine near one in absolute
value, in training examples and in unrelated text. Here it is measured within one text at a time, at
all of its tokens, so that no token is compared with a copy of itself in another text. The signed
cosine says more than the absolute one: is it one vector, or one line in both directions?

Two nulls show how much of it comes with training at all: a LoRA that was trained on shuffled
answers, and one with random A and B. A cosine does not depend on the length of what is added.
"""

from statistics import mean

from common import joined, read_args, report, spreads, train

from data import encode_question, make_task, make_tree
from eval import arm_values, load_run, set_parameters
from steer import constancy, what_is_added

TASKS = ["locations", "functions", "risk", "backdoor"]
TEXTS = 16  # of each kind of prompt
FIGURES = ["cosine", "abs_cosine", "share", "norm"]


def how_constant(found, questions: list) -> dict:
    """{figure: mean over texts, each measured by itself} of a run's LoRA as it is now."""
    texts = []
    for question in questions[:TEXTS]:
        tree = make_tree([encode_question(found.tokenizer, question)])
        layer = found.flags["layer"]
        rows = what_is_added(found.model, found.parameters, layer, tree.tokens, tree)  # (T, d)
        texts.append(constancy(rows))
    return {name: mean(text[name] for text in texts) for name in FIGURES}


def measure(folder) -> dict:
    """{"trained" or "random": {prompts: figures}} of a run's LoRA, and of random A and B."""
    found = load_run(folder)
    unrelated = make_task("locations", "Paris")
    if found.flags["task"] == "locations":
        unrelated = make_task("functions", "add 5")
    asked = {"training": found.task.train, "unrelated": unrelated.train}

    measured = {}
    for arm, values in arm_values(found.parameters, found.flags["seed"]).items():
        if arm != "base":  # which adds nothing
            set_parameters(found.parameters, values)
            measured[arm] = {prompts: how_constant(found, some) for prompts, some in asked.items()}
    return measured


def compare_with_nulls(args) -> list:
    """Rows of the main table: each task's LoRA at the default layer, and its two nulls."""
    rows = []
    for task in args.tasks:
        of_lora = {"trained": [], "shuffled answers": [], "random": []}
        for seed in range(args.seeds):
            trained = measure(train(args, task, "lora", seed))
            shuffled = measure(train(args, task, "lora", seed, "--shuffle-answers"))
            of_lora["trained"].append(trained["trained"])
            of_lora["shuffled answers"].append(shuffled["trained"])
            of_lora["random"].append(trained["random"])

        for lora, runs in of_lora.items():
            row = [task, lora]
            for prompts in ["training", "unrelated"]:
                row += spreads([[one[prompts][name] for name in FIGURES] for one in runs])
            rows.append(row)
    return rows


def go_through_layers(args) -> list:
    """Rows of the second table: the LoRA on each block of the model, in unrelated prompts."""
    rows = []
    for layer in range(4):
        row = [layer]
        for task in args.tasks:
            runs = []
            for seed in range(args.seeds):
                folder = train(args, task, "lora", seed, "--layer", layer)
                figures = measure(folder)["trained"]["unrelated"]
                runs.append([figures["cosine"], figures["abs_cosine"]])
            row.append(joined(runs))
        rows.append(row)
    return rows


def main():
    args = read_args(__doc__, TASKS, seeds=2)
    names = ["cosine", "absolute", "share", "norm"]
    training = [f"training: {name}" for name in names]
    unrelated = [f"unrelated: {name}" for name in names]
    tables = {
        "nulls": (["task", "LoRA", *training, *unrelated], compare_with_nulls(args)),
        "layers": (["layer: cosine / absolute", *args.tasks], go_through_layers(args)),
    }
    report(__file__, tables)


if __name__ == "__main__":
    main()
