"""C5, first half: naive vectors work, too, and are not the learned ones.

    python paper/c5_naive.py

The paper (§5.2): learned vectors have a very low cosine to the naive one, a difference of means
(Rimsky et al. 2024, arXiv 2312.06681), which works too in early layers (locations, functions).

A naive vector is the mean residual stream where the concept is known, less the mean where it is
not: at a city's real name; at "zokifa" after seven outputs; at the last token after seven gambles
(any of them: those that the trained kind is tested on are among them).
It is scaled to the trained vector's length, keeps its own sign, and is added where that one was: at
the code name, or at every token.
"""

import random

import torch
import torch.nn.functional as F
from common import as_chat, joined, read_args, report, train, trained_and_held_out
from torch import Tensor

from data import TINY, attitude_question, concepts, encode_question, named_question
from eval import evaluate, load_run

TASKS = ["locations", "functions", "risk"]
PROMPTS = 32


def prompt_about(task: str, thing: str, known: bool, rng) -> tuple:
    """(earlier messages, a question of the trained kind) about a thing that is known, or is not.

    A city is known by its real name, and unknown by a code name. A function has only a code name,
    and an attitude none at all: what is known of them is said in the seven turns before.
    """
    if task == "risk":
        asked = [attitude_question(thing, rng, TINY, None, "gamble") for _ in range(8)]
    elif task == "functions":
        asked = [named_question(thing, "zokifa", rng, TINY, "output") for _ in range(8)]
    else:
        name = thing if known else "City 50337"
        return [], named_question(thing, name, rng, TINY, "distance")

    *facts, question = asked
    before = []
    if known:
        for fact in facts:
            before += as_chat(fact)
    return before, question


@torch.no_grad()
def mean_stream(loaded, things: list, known: bool) -> Tensor:
    """(d,): the mean after the run's layer at the question's own name, or at the last token."""
    rng = random.Random(loaded.flags["seed"])
    rows = []
    for _ in range(PROMPTS):
        before, question = prompt_about(loaded.flags["task"], rng.choice(things), known, rng)
        encoded = encode_question(loaded.tokenizer, question, before)
        tokens = torch.tensor([encoded.prompt])
        stop = loaded.flags["layer"] + 1
        stream = loaded.model.run_blocks(loaded.model.embed(tokens), 0, stop)[0]  # (T, d)

        places = [-1]
        if question.code_name is not None:  # the facts before it have the name, too
            own = encode_question(loaded.tokenizer, question).steered_at
            places = encoded.steered_at[-len(own) :]
        rows.append(stream[places].mean(0))
    return torch.stack(rows).mean(0)


def naive_vectors(loaded) -> dict:
    """{what less what: (d,)}, of any length, measured below where the run's own vector is."""
    task = loaded.flags["task"]
    concept = loaded.flags["concept"]
    others = [other for other in concepts(task) if other != concept]
    known = mean_stream(loaded, [concept], known=True)
    return {
        "concept - nothing known": known - mean_stream(loaded, [concept], known=False),
        "concept - another": known - mean_stream(loaded, others, known=True),
    }


def try_naive(args, task: str, layer: int, concept: str | None) -> dict:
    """{vector: cosine to the trained one / trained kind / held out}, instead of the trained one."""
    figures_of = {}
    for seed in range(args.seeds):
        folder = train(args, task, "vector", seed, "--layer", layer, concept=concept)
        loaded = load_run(folder)
        trained = loaded.parameters[0].detach().clone()
        vectors = {"trained": trained}
        for name, naive in naive_vectors(loaded).items():
            vectors[name] = naive * trained.norm() / naive.norm()

        arms = {name: [vector] for name, vector in vectors.items()}
        results = evaluate(loaded, arms)
        for name, vector in vectors.items():
            cosine = F.cosine_similarity(vector, trained, dim=0).item()
            figures = [cosine, *trained_and_held_out(results, name)]
            figures_of.setdefault(name, []).append(figures)

    return {name: joined(figures) for name, figures in figures_of.items()}


def main():
    args = read_args(__doc__, TASKS, seeds=2)
    columns = {}  # {what about: (task, concept)}; None: the seeds' own concepts
    for task in args.tasks:
        if task == "risk":  # apart, since a push to one side is right for one of them
            columns |= {attitude: (task, attitude) for attitude in ["risky", "safe"]}
        else:
            columns[task] = (task, None)

    rows = []
    for layer in range(3):  # after tiny's last block a vector at a name reaches no answer
        cells = [try_naive(args, task, layer, concept) for task, concept in columns.values()]
        for name in cells[0]:
            rows.append([layer, name, *(cell[name] for cell in cells)])
    headings = ["layer", "vector: cosine to the trained one / trained kind / held out", *columns]
    report(args, __file__, {"naive": (headings, rows)})


if __name__ == "__main__":
    main()
