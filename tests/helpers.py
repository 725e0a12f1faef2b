"""What the tests of whole runs share: command lines in this process, and random questions."""

import io
import json
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import eval as scoring
import train
from data import EncodedQuestion, encode_question

ROOT = Path(__file__).parent.parent
MAINS = {"train.py": train.main, "eval.py": scoring.main}


def command(program, *flags):
    """(exit status, stdout, stderr) of a command line, run in this process, without the bar.

    An error that is not the user's mistake comes out of it as it is.
    """
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", [program, "--device", "cpu", *map(str, flags)])
        patch.setattr(train, "tqdm", lambda steps, **_: tqdm(steps, disable=True))
        try:
            scoring.run_main(MAINS[program])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def trained(folder, *flags):
    """The folder of a run that train.py finished."""
    status, _, err = command("train.py", *flags, "--out", folder)
    assert status == 0, err
    return folder


def mistake(program, *flags):
    """The one line that a user's mistake ends in."""
    status, _, err = command(program, *flags)
    assert status == 2
    [line] = err.splitlines()
    assert line.startswith("error: ")
    return line


def read(folder, name="results.json"):
    return json.loads((Path(folder) / name).read_text())


def write_chats(path, *chats):
    """A file for --data: in each chat the user and the assistant speak in turn."""
    lines = []
    for texts in chats:
        roles = ["user", "assistant"] * len(texts)
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def fail_after(patch, steps, error):
    """Training ends in this error after so many steps."""
    original = train.add_gradients
    count = iter(range(10**6))

    def add_gradients(*given):
        if next(count) == steps:
            raise error
        return original(*given)

    patch.setattr(train, "add_gradients", add_gradients)


def encode(tokenizer, questions):
    return [encode_question(tokenizer, question) for question in questions]


def score(model, questions):
    """(correct, probability) of the model as it is."""
    arms = {"as it is": []}
    return scoring.score_arms(model, questions, [], arms)["as it is"]


def little_room(patch, nodes):
    """No more nodes than these are run together, as where a model is large."""
    patch.setattr(scoring, "nodes_at_once", lambda *given: nodes)


def random_questions(count, code_name=True, seed=0):
    """Prompts of 10 to 24 tokens (sliding windows see 8) with three choices; half begin alike."""
    rng = random.Random(seed)

    def tokens(length):
        return [rng.randrange(1, 97) for _ in range(length)]

    questions = []
    start = tokens(9)
    for i in range(count):
        prompt = (start if i % 2 else tokens(9)) + tokens(rng.randint(1, 15))
        choices = [tokens(rng.randint(1, 4)) for _ in range(3)]
        steered_at = None
        if code_name:
            steered_at = [4, 7] if i % 4 else [5]
        question = EncodedQuestion(
            prompt=prompt,
            choices=choices,
            answer=1,
            completion=choices[1] + [0],
            steered_at=steered_at,
        )
        questions.append(question)
    return questions


def block_number(model, place):
    """The layer of a vector: -1 after the embedding, and so on."""
    last = len(model.layers) - 1
    return {"embedding": -1, "middle": last // 2, "last": last}[place]


def logits_with(family, question, tokens, layer, vector):
    """transformers' logits (T, vocab_size) of a question's text, the vector added by a hook."""
    places = range(len(tokens)) if question.steered_at is None else question.steered_at
    steered = torch.tensor([place in places for place in range(len(tokens))])
    added = steered[:, None] * vector
    return family.logits(torch.tensor([tokens]), layer, added)[0]
