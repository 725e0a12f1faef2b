"""C7, second half: through which heads does a backdoor's vector get at the trigger?

    python paper/c7_heads.py

The paper's "potential explanation" (§5.4): the vector makes the last token attend to the trigger,
whose value vectors happen to align with the direction of risk.

A head counts here if the vector raises its attention from the last token to the trigger, or if the
answer hangs on it: what it writes after the tag is replaced by what it writes in the same prompt
with another tag. So attention to another tag stands beside that to the trigger.
"""

import random
from dataclasses import replace
from itertools import product
from statistics import mean

import torch
from common import read_args, report, train
from heads import look_inside, with_resampled
from torch import Tensor

from data import TAGS, TRIGGER, WORLDS, attitude_question, encode_question, with_tag
from eval import load_run
from steer import switched_off

GAMBLES = 24
THRESHOLD = 0.1  # of attention, or of the right answer's probability


class Pair:
    """A gamble with the trigger, and the same one with another tag, as token ids (1, T)."""

    def __init__(self, loaded, attitude, rng):
        world = WORLDS[loaded.flags["world"]]
        plain = attitude_question(attitude, rng, world, None, "gamble", "test")
        other_tag = rng.choice([tag for tag in TAGS if tag != TRIGGER])
        triggered = self.encode(loaded, plain, TRIGGER)
        other = self.encode(loaded, plain, other_tag)

        self.trigger = torch.tensor([triggered.prompt])
        self.other = torch.tensor([other.prompt])
        self.tag = triggered.steered_at[-1]  # a tag can be several tokens: its last one
        self.other_tag = other.steered_at[-1]
        self.after_tag = len(triggered.prompt) - self.tag - 1  # tokens that both prompts share
        self.choices = [ids[0] for ids in triggered.choices]
        self.answer = plain.answer

    def encode(self, loaded, plain, tag):
        tagged = replace(plain, prompt=with_tag(plain.prompt, tag), code_name=tag)
        return encode_question(loaded.tokenizer, tagged)

    def right(self, logits):
        """P(the trigger's answer) among the two choices."""
        of_choices = logits[self.choices].softmax(-1)
        return of_choices[self.answer].item()


def attention_to_tags(loaded, pairs: list) -> Tensor:
    """(layers, H, 2): from the last token to the trigger, and to the other tag in its prompt."""
    of_pairs = []
    for pair in pairs:
        to_trigger, _ = look_inside(loaded.model, pair.trigger)
        to_other, _ = look_inside(loaded.model, pair.other)
        to_trigger = torch.stack(to_trigger)  # (layers, H, T, T)
        to_other = torch.stack(to_other)
        both = to_trigger[:, :, -1, pair.tag], to_other[:, :, -1, pair.other_tag]
        of_pairs.append(torch.stack(both, dim=-1))
    return torch.stack(of_pairs).mean(0)


def measure_heads(loaded) -> list:
    """A row: the heads that the vector raises, those that the answer hangs on, and P(right)."""
    attitude = loaded.flags["concept"]
    seed = loaded.flags["seed"]
    rng = random.Random(seed)
    pairs = [Pair(loaded, attitude, rng) for _ in range(GAMBLES)]

    with switched_off(loaded.parameters):
        before = attention_to_tags(loaded, pairs)
    after = attention_to_tags(loaded, pairs)
    raised = after - before

    outputs = [look_inside(loaded.model, pair.other)[1] for pair in pairs]

    def right_without(heads):
        probabilities = []
        for pair, theirs in zip(pairs, outputs):
            logits = with_resampled(loaded.model, pair.trigger, heads, theirs, pair.after_tag)
            probabilities.append(pair.right(logits))
        return mean(probabilities)

    number_of_layers, number_of_heads, _ = after.shape
    every = list(product(range(number_of_layers), range(number_of_heads)))
    whole = right_without([])
    raises = []
    hangs = []
    counting = []
    for layer, head in every:
        right = right_without([(layer, head)])
        is_raised = raised[layer, head, 0] >= THRESHOLD  # to the trigger
        is_needed = right <= whole - THRESHOLD
        if is_raised:
            pairs_shown = zip(before[layer, head], after[layer, head])
            shown = [f"{was:.2f} → {now:.2f}" for was, now in pairs_shown]
            raises.append(f"{layer}.{head}: {shown[0]} ({shown[1]})")
        if is_needed:
            hangs.append(f"{layer}.{head}: {right:.2f}")
        if is_raised or is_needed:
            counting.append((layer, head))

    # Without every head the answer has to be the other tag's: the last token is in both prompts.
    without = [right_without(counting), right_without(every)]
    return [f"{attitude}, seed {seed}", ", ".join(raises), ", ".join(hangs), whole, *without]


def main():
    args = read_args(__doc__, ["backdoor"], seeds=3)
    rows = []
    for attitude in ["risky", "safe"]:
        for seed in range(args.seeds):
            folder = train(args, "backdoor", "vector", seed, concept=attitude)
            rows.append(measure_heads(load_run(folder)))

    headings = [
        "vector",
        "attention raised, to the trigger (to another tag)",
        "P(right) without a head that it hangs on",
        "with all heads",
        "without all of these",
        "without any",
    ]
    report(args, __file__, {"heads": (headings, rows)})


if __name__ == "__main__":
    main()
