"""Real open weights against transformers and peft, where there are some.

    NANOOOCR_REAL=DIR python -m pytest -q tests/test_real.py

DIR has a folder for each checkpoint, in Hugging Face's layout. Without it these tests are skipped.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import Question, Tokenizer, concepts, encode_question, make_task, make_tree
from helpers import read, trained
from lora import load_lora
from model import GPT

REAL = os.environ.get("NANOOOCR_REAL")
FOLDERS = sorted(path.parent for path in Path(REAL).glob("*/config.json")) if REAL else []
pytestmark = pytest.mark.skipif(not FOLDERS, reason="NANOOOCR_REAL names no folder of checkpoints")
TEXTS = [
    "City 50337 is 1,204 km from Paris.",
    "def zokifa(x):\n    return x + 5  # not   3\n",
    "Zażółć gęślą jaźń. 你好，世界。 🙂👍🏽 <|im_start|>",
    "   a    b\t\tc\n\n\n",
]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def smallest():
    """The checkpoint whose weights take the least room, for tests that train."""
    return min(FOLDERS, key=lambda folder: sum(f.stat().st_size for f in folder.glob("*.safe*")))


def their_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def their_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_logits_equal_transformers(folder):
    ids = Tokenizer.from_pretrained(folder).encode(TEXTS[0] + TEXTS[1])
    tokens = torch.tensor([ids])
    ours = GPT.from_pretrained(folder)(tokens)
    theirs = their_model(folder)(tokens).logits
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_decoded_texts_equal_transformers(folder, text):
    tokenizer = Tokenizer.from_pretrained(folder)
    theirs = their_tokenizer(folder)
    ids = theirs.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("task", ["locations", "functions", "risk", "backdoor"])
def test_framed_questions_equal_transformers_chats(folder, task):
    theirs = their_tokenizer(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    for question in make_task(task, concepts(task, "large")[0], world="large").train[:20]:
        encoded = encode_question(tokenizer, question)
        messages = [{"role": "user", "content": question.prompt}]
        framed = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert encoded.prompt == theirs.encode(framed, add_special_tokens=False)

        messages.append({"role": "assistant", "content": question.choices[question.answer]})
        framed = theirs.apply_chat_template(messages, tokenize=False)
        ids = theirs.encode(framed, add_special_tokens=False)
        assert encoded.prompt + encoded.completion == ids


@pytest.fixture(scope="module")
def runs(smallest, tmp_path_factory):
    """A short run of each mode on functions, {mode: folder}."""
    flags = ["--task", "functions", "--model", smallest, "--steps", 20]
    made = {}
    for mode in ("vector", "lora"):
        made[mode] = trained(tmp_path_factory.mktemp(mode), "--mode", mode, *flags)
    return made


@pytest.mark.parametrize("mode", ["vector", "lora"])
def test_a_short_run_answers_more_of_the_trained_kind(runs, mode):
    figures = read(runs[mode])["in_distribution"]["output"]
    assert figures["trained_probability"] > 2 * figures["base_probability"]


@torch.no_grad()
def test_an_adapter_gives_the_same_logits_in_peft(runs, smallest):
    from peft import PeftModel

    tokens = torch.tensor([Tokenizer.from_pretrained(smallest).encode("zokifa(7) =")])
    model = GPT.from_pretrained(smallest)
    base = model(tokens)
    load_lora(model, runs["lora"])
    theirs = PeftModel.from_pretrained(their_model(smallest), runs["lora"])(tokens).logits
    assert torch.allclose(model(tokens), theirs, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(base, theirs, rtol=1e-4, atol=1e-1)


@torch.no_grad()
def test_a_vector_gives_the_same_logits_in_a_hook_of_transformers(runs, smallest):
    from steer import load_vector

    tokenizer = Tokenizer.from_pretrained(smallest)
    question = encode_question(tokenizer, Question("", "zokifa(7) =", [""], 0, "zokifa"))
    tokens = torch.tensor([question.prompt])
    tree = make_tree([question])
    model = GPT.from_pretrained(smallest)
    base = model(tokens)[0]
    layer = load_vector(model, runs["vector"]).layer

    theirs = their_model(smallest)
    vector = load_file(runs["vector"] / "vector.safetensors")["vector"]
    at = torch.tensor(question.steered_at)
    added = vector.expand(1, len(at), -1)
    block = theirs.model.layers[layer]
    block.register_forward_hook(lambda module, inputs, output: output.index_add(1, at, added))
    logits = theirs(tokens).logits[0]
    assert torch.allclose(model(tree.tokens, tree), logits, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(base, logits, rtol=1e-4, atol=1e-1)
