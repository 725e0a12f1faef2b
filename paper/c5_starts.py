"""C5, second half: vectors of one concept differ between seeds, if their starts do.

    python paper/c5_starts.py

The paper (§5.2): vectors that were learned with different seeds have a low cosine to each other.

train.py begins at zero. Here the same loop begins at random, at several lengths (in units of the
stream's root mean square). For names the authors train a direction and a scale whose product is the
vector, from a random direction of length 1 and the scale 0: that is the last row. (At our rate the
direction forgets its start in a few steps, so the row says little of theirs.)
"""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from common import joined, read_args, report, spread, train, trained_and_held_out

from data import encode_question
from eval import evaluate, frozen_streams, load_run
from train import adam_step, add_gradients, draw_batches, train_loop, typical_size

TASKS = ["locations", "functions", "risk"]
STARTS = [0, 0.1, 1, 3]


def train_authors_way(loaded, flags, questions: list, streams: list):
    """Trains the run's vector anew as a direction times a scale; `flags` are the run's."""
    vector = loaded.parameters[0]
    rate = flags.lr * typical_size(streams)
    direction = F.normalize(torch.randn(vector.shape), dim=0)
    scale = torch.zeros(1)
    state = []
    for parameter in [direction, scale]:
        state.append((parameter, torch.zeros_like(parameter), torch.zeros_like(parameter)))

    batches = draw_batches(len(questions), flags)
    for step in range(flags.steps):
        batch = batches[step]
        vector.data = scale * direction
        add_gradients(loaded.model, [questions[i] for i in batch], [streams[i] for i in batch])

        # The chain rule: the vector is the product of the two.
        direction.grad = scale * vector.grad
        scale.grad = (direction * vector.grad).sum()[None]
        vector.grad = None
        adam_step(state, step + 1, rate * (1 - step / flags.steps))
    vector.data = scale * direction


def train_from(folder, start) -> tuple:
    """(the vector (d,), (trained kind, held out)) with a run's flags, but from another start."""
    loaded = load_run(folder)
    flags = SimpleNamespace(**loaded.flags)
    vector = loaded.parameters[0]
    encoded = [encode_question(loaded.tokenizer, question) for question in loaded.task.train]
    questions = [replace(question, choices=[question.completion]) for question in encoded]
    streams = frozen_streams(loaded.model, questions, flags.layer + 1)

    torch.manual_seed(flags.seed)
    if start == "direction × scale":
        train_authors_way(loaded, flags, questions, streams)
    else:
        vector.data = start * typical_size(streams) * torch.randn(vector.shape)
        train_loop(flags, loaded.model, questions, [vector])

    trained = vector.detach().clone()
    results = evaluate(loaded, {"trained": [trained]})
    return trained, trained_and_held_out(results)


def try_start(args, task: str, start) -> str:
    """How alike the vectors of one concept are / the trained kind / held out."""
    vectors = []
    pairs = []
    for seed in range(args.seeds):
        vector, pair = train_from(train(args, task, "vector", seed), start)
        vectors.append(vector)
        pairs.append(pair)

    cosines = []
    for i, j in combinations(range(args.seeds), 2):
        if i % 2 == j % 2:  # every second seed is about the same concept
            cosine = F.cosine_similarity(vectors[i], vectors[j], dim=0)
            cosines.append(cosine.item())
    return f"{spread(cosines)} / {joined(pairs)}"


def main():
    args = read_args(__doc__, TASKS, seeds=6)
    rows = []
    for start in [*STARTS, "direction × scale"]:
        row = [start]
        for task in args.tasks:
            no_name = task == "risk" and start == "direction × scale"
            row.append(None if no_name else try_start(args, task, start))
        rows.append(row)
    headings = ["start: cosine between seeds / trained kind / held out", *args.tasks]
    report(args, __file__, {"starts": (headings, rows)})


if __name__ == "__main__":
    main()
