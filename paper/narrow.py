"""Narrow on purpose: can a vector learn the trained kind alone?

    python paper/narrow.py

A vector for gambles also changes what the model says of itself. Is that the only vector that fits?
Here a second term of the loss pins some held-out kinds where they were: the KL divergence from the
untouched model's probabilities of their choices. If a vector still fits as well, the trained kind
does not force the others along, and the question is why the general vector is found first. Soligo
et al. (2026, arXiv 2602.07852) argue: it is the easier one, with a lower loss for its length, and
stable to noise. So both are shown: the loss at the vector's length, and after noise of a half of
that length.

The other held-out kinds are free, and tell whether they are bound to the trained kind or to the
pinned ones.
"""

from dataclasses import replace
from statistics import mean

import torch
from common import CONCEPTS, read_args, report, spreads
from torch import Tensor

from data import encode_question, make_task, make_tree
from eval import Run, answer_log_probs, evaluate, kind_mean, load_model
from steer import attach
from train import adam_step, typical_size

LAYER = 0  # the vector is added after this block
PINNED = {
    "locations": ["country", "language", "name"],
    "functions": ["definition", "python", "inverse"],
    "risk": ["self", "score", "animal"],
}
RATE = {"locations": 0.1, "functions": 0.1, "risk": 0.05}  # train.py's, in the stream's RMS
STEPS = 400
TRAINED = 96  # training questions, all of them in every step
ASKED = 40  # pinned questions of a kind
NOISE = 0.5  # of the vector's length


class FixedBatch:
    """Questions as a tree, and the residual stream below the vector, which never changes."""

    @torch.no_grad()
    def __init__(self, model, questions: list):
        self.model = model
        self.tree = make_tree(questions, [question.choices for question in questions])
        x = model.embed(self.tree.tokens, self.tree)
        self.x = model.run_blocks(x, 0, LAYER + 1, self.tree)  # (N, d)
        self.counts = [len(question.choices) for question in questions]
        self.answer_tokens = sum(len(question.completion) for question in questions)

    def log_probs(self) -> Tensor:
        """Of each choice of each question (texts,), with the vector as it is."""
        return answer_log_probs(self.model, self.x, LAYER + 1, self.tree)

    def loss(self) -> Tensor:
        """Nats a token, of questions whose only choice is the right answer."""
        return -self.log_probs().sum() / self.answer_tokens

    def among_choices(self) -> Tensor:
        """Log-probabilities (texts,) among the choices of each question."""
        split = self.log_probs().split(self.counts)
        return torch.cat([of_choices.log_softmax(-1) for of_choices in split])


def train_vector(vector, trained: FixedBatch, pinned: FixedBatch | None, rate: float):
    """Trains the vector (d,) on a batch, while the answers to `pinned` ones stay as they are."""
    rate = rate * typical_size([trained.x])
    if pinned:
        with torch.no_grad():
            before = pinned.among_choices()

    state = [(vector, torch.zeros_like(vector), torch.zeros_like(vector))]
    for step in range(STEPS):
        loss = trained.loss()
        if pinned:
            after = pinned.among_choices()
            divergence = (before.exp() * (before - after)).sum() / len(pinned.counts)
            loss = loss + divergence
        loss.backward()
        adam_step(state, step + 1, rate * (1 - step / STEPS))


@torch.no_grad()
def loss_with_noise(vector, trained: FixedBatch) -> float:
    """The mean training loss with random vectors of NOISE times its length on the vector."""
    kept = vector.clone()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(8):
        noise = torch.randn(vector.shape, generator=generator)
        vector.copy_(kept + NOISE * kept.norm() * noise / noise.norm())
        losses.append(trained.loss().item())
    vector.copy_(kept)
    return mean(losses)


def measure(args, task: str, seed: int, narrow: bool) -> list:
    """[loss, with noise, length, trained kind, pinned kinds: base, with it, free kinds: both]."""
    model, tokenizer = load_model(args.model, "cpu", "float32")
    asked = make_task(task, CONCEPTS[task][seed % 2], seed)
    vector = attach(model, LAYER).vector

    questions = [encode_question(tokenizer, question) for question in asked.train[:TRAINED]]
    only = [replace(question, choices=[question.completion]) for question in questions]
    trained = FixedBatch(model, only)
    pinned = None
    if narrow:
        some = [question for kind in PINNED[task] for question in asked.held_out[kind][:ASKED]]
        pinned = FixedBatch(model, [encode_question(tokenizer, question) for question in some])
    train_vector(vector, trained, pinned, RATE[task])

    results = evaluate(Run({"seed": seed}, model, tokenizer, asked, [vector]))
    with torch.no_grad():
        loss = trained.loss().item()
    row = [loss, loss_with_noise(vector, trained), vector.norm().item()]
    row.append(kind_mean(results, "in_distribution"))

    of_kinds = results["held_out"]
    free = [kind for kind in of_kinds if kind not in PINNED[task] and kind != "nearer"]
    for kinds in [PINNED[task], free]:
        for arm in ["base", "trained"]:
            row.append(mean(of_kinds[kind][arm] for kind in kinds))
    return row


def main():
    args = read_args(__doc__, list(PINNED), seeds=2)
    rows = []
    for task in args.tasks:
        for name in ["general", "narrow"]:
            runs = [measure(args, task, seed, name == "narrow") for seed in range(args.seeds)]
            rows.append([task, name, *spreads(runs)])

    losses = ["training loss", "with noise", "length", "trained kind"]
    kinds = ["pinned kinds: base", "with the vector", "free kinds: base", "with the vector"]
    report(args, __file__, {"narrow": (["task", "vector", *losses, *kinds], rows)})


if __name__ == "__main__":
    main()
