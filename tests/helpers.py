"""What the tests of whole runs share: command lines in this process, and questions made of random tokens."""

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


def command(program, *flags):
    """(exit status, stdout, stderr) of a command line, run in this process and without a progress bar."""
    main = {"train.py": train.main, "eval.py": scoring.main}[program]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", [program, "--device", "cpu", *map(str, flags)])
        patch.setattr(train, "tqdm", lambda steps, **_: tqdm(steps, disable=True))
        try:
            scoring.run_main(main)
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def trained(folder, *flags):
    """The folder of a run that train.py finished."""
    status, _, err = command("train.py", *flags, "--out", folder)
    assert status == 0, err
    return folder


def error_line(err):
    """The one line that a user's mistake ends in."""
    line, = err.splitlines()
    assert line.startswith("error: ")
    return line


def read(folder, name="results.json"):
    return json.loads((Path(folder) / name).read_text())


def fail_after(patch, steps, error):
    """Training ends in this error after so many steps."""
    original, count = train.answer_log_probs, iter(range(10 ** 6))

    def answer_log_probs(*given):
        if next(count) == steps:
            raise error
        return original(*given)
    patch.setattr(train, "answer_log_probs", answer_log_probs)


def encode(tokenizer, questions):
    return [encode_question(tokenizer, question) for question in questions]


def score(model, questions):
    """(correct, probability) of the model as it is."""
    return scoring.score_arms(model, questions, [], {"as it is": []})["as it is"]


def random_questions(count, code_name=True, seed=0):
    """Prompts of 10 to 24 tokens (sliding windows see 8), half of which begin alike; three choices each."""
    rng = random.Random(seed)
    ids = lambda length: [rng.randrange(1, 97) for _ in range(length)]
    questions, start = [], ids(9)
    for i in range(count):
        prompt = (start if i % 2 else ids(9)) + ids(rng.randint(1, 15))
        choices = [ids(rng.randint(1, 4)) for _ in range(3)]
        positions = ([4, 7] if i % 4 else [5]) if code_name else None
        questions.append(EncodedQuestion(prompt, choices, 1, choices[1] + [0], positions))
    return questions


def block_number(model, place):
    """The layer of a vector: -1 after the embedding, and so on."""
    last = len(model.layers) - 1
    return {"embedding": -1, "middle": last // 2, "last": last}[place]


def logits_with(family, question, tokens, layer, vector):
    """transformers' logits (T, vocab) of a question's text; a hook adds the vector where it belongs."""
    places = range(len(tokens)) if question.positions is None else question.positions
    steered = torch.tensor([i in places for i in range(len(tokens))])
    return family.logits(torch.tensor([tokens]), layer, steered[:, None] * vector)[0]
