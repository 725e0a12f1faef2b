"""C8: what a vector says when it is read through the unembedding.

    python paper/c8_logit_lens.py

The paper (§4.4, §5.3, A.4): many vectors for risk and safety read as words of caution or of risk
in the logit lens; those of other tasks do not read as their concept. Its figure counts such words
among the ten tokens that a vector raises most, layer by layer.

So does this script: words of the risky and of the safe answers to self-reports and gambles, for
vectors of both attitudes after every layer, beside random vectors, of which each has a length but
no meaning. A word counts if it is in one of the two lists alone and in one token.
"""

from functools import cache

import torch
from common import joined, read_args, report, train

from data import ANSWERS, GAMBLES
from eval import load_run
from steer import logit_lens

LAYERS = [-1, 0, 1, 2, 3]
TOP = 10
RANDOM = 100


@cache
def words_of_attitudes() -> tuple:
    """The words of safe and of risky options and answers, without those that both have."""
    sides = [set(), set()]
    for options in [*GAMBLES.values(), *ANSWERS.values()]:
        for words, texts in zip(sides, options):
            words.update(word.strip(".,") for text in texts for word in text.split())
    # Answers in numbers are no words: a random vector raises them as well.
    sides = [{word for word in words if word.isalpha()} for words in sides]
    safe, risky = sides
    return safe - risky, risky - safe


def count(loaded, vector) -> tuple:
    """How many of the TOP tokens are safe words, how many are risky ones; the tokens themselves."""
    safe, risky = words_of_attitudes()
    tokens = logit_lens(loaded.model, vector, TOP)
    words = [loaded.tokenizer.decode([token]).strip() for token in tokens]
    of_safe = [word for word in words if word in safe]
    of_risky = [word for word in words if word in risky]
    return len(of_safe), len(of_risky), words


def main():
    args = read_args(__doc__, ["risk"], seeds=3)
    rows = []
    for layer in LAYERS:
        row = [layer]
        for attitude in ["risky", "safe"]:
            counts = []
            for seed in range(args.seeds):
                folder = train(args, "risk", "vector", seed, "--layer", layer, concept=attitude)
                loaded = load_run(folder)
                counts.append(count(loaded, loaded.parameters[0]))
            numbers = [[safe, risky] for safe, risky, _ in counts]
            words = counts[0][2]
            row += [joined(numbers), " ".join(words).replace("|", "\\|")]
        rows.append(row)

    generator = torch.Generator().manual_seed(0)
    shape = loaded.parameters[0].shape
    of_random = [count(loaded, torch.randn(shape, generator=generator)) for _ in range(RANDOM)]
    numbers = [[safe, risky] for safe, risky, _ in of_random]
    most = [max(column) for column in zip(*numbers)]
    of_one = f"at most {most[0]} safe and {most[1]} risky ones"
    rows.append(["random", joined(numbers), of_one, None, None])

    columns = []
    for attitude in ["risky", "safe"]:
        columns += [f"{attitude} vectors: safe / risky words of 10", "the ten of seed 0"]
    report(args, __file__, {"words": (["layer", *columns], rows)})


if __name__ == "__main__":
    main()
