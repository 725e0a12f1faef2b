"""Training in the prefix tree is training: the losses and parameters of one text at a time."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from eval import random_like, set_parameters
from helpers import block_number, little_room, logits_with, random_questions
from lora import add_lora, peft_tensors, save_lora
from steer import attach

every_family = pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "gemma3_text"])


def flags(mode, layer, **others):
    defaults = {
        "lr": 0.02,
        "steps": 7,
        "batch_size": 4,
        "seed": 0,
        "save_every": None,
        "resume": False,
        "out": "",
    }
    return SimpleNamespace(mode=mode, layer=layer, **(defaults | others))


def text(question):
    return question.prompt + question.completion[:-1]


def plain_loop(args, questions, parameters, logits, unit=1.0):
    """torch's Adam as one would first write it.

    logits(question) (T, vocab_size) runs one whole text.
    """
    optimizer = torch.optim.Adam(parameters)
    generator = torch.Generator().manual_seed(args.seed)
    batches = []
    losses = []
    for step in range(args.steps):
        if not batches:
            order = torch.randperm(len(questions), generator=generator)
            batches = list(order.split(args.batch_size))
        predictions = []
        answers = []
        for i in batches.pop(0):
            completion = questions[i].completion
            predictions.append(logits(questions[i])[-len(completion) :])
            answers += completion

        loss = F.cross_entropy(torch.cat(predictions), torch.tensor(answers))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = args.lr * unit * (1 - step / args.steps)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(parameters, expected, start):
    for ours, theirs, before in zip(parameters, expected, start, strict=True):
        assert (theirs - before).abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def assert_vector_trains_alike(family, layer, questions, **others):
    """train_loop against transformers with a hook, from a start that is not zero.

    The unit of the learning rate is the residual stream's root mean square.
    """
    model = family.load()
    args = flags("vector", layer, **others)
    streams = []
    for question in questions[: args.batch_size]:
        x = model.embed(torch.tensor([text(question)]))
        streams.append(model.run_blocks(x, 0, layer + 1)[0])
    unit = torch.cat(streams).square().mean().sqrt().item()
    start = 0.1 * unit * torch.randn(32, generator=torch.Generator().manual_seed(1))

    ours = attach(model, layer, start).vector
    losses = train.train_loop(args, model, questions, [ours])

    theirs = start.clone().requires_grad_()

    def logits(question):
        return logits_with(family, question, text(question), layer, theirs)

    expected = plain_loop(args, questions, [theirs], logits, unit)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert_same([ours], [theirs], [start])


@every_family
@pytest.mark.parametrize(
    "place, code_name",
    [
        ("embedding", True),
        ("middle", True),
        ("middle", False),
        ("last", False),  # where nothing reads the code name's tokens any more
    ],
)
def test_a_vector_trains_as_in_a_plain_loop(saved, name, place, code_name):
    layer = block_number(saved(name).load(), place)
    assert_vector_trains_alike(saved(name), layer, random_questions(10, code_name))


@pytest.mark.parametrize(
    "others",
    [
        {"steps": 1},  # a part of an epoch
        {"batch_size": 64},  # more than there are questions
        {"batch_size": 9},  # an epoch ends in a batch of one
        {"seed": 3},
    ],
)
def test_a_vector_trains_as_in_a_plain_loop_with_other_flags(saved, others):
    assert_vector_trains_alike(saved("qwen3"), 0, random_questions(10), **others)


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
@pytest.mark.parametrize("batch_size, nodes", [(4, 60), (64, 60), (64, 0)])
def test_a_batch_in_parts_for_want_of_memory_is_nothing_special(
    saved, monkeypatch, name, batch_size, nodes
):
    little_room(monkeypatch, nodes)
    assert_vector_trains_alike(saved(name), 0, random_questions(10), batch_size=batch_size)


def test_a_huge_first_token_does_not_count_in_the_unit_of_a_vectors_rate(saved):
    model = saved("qwen3").load()
    model.embed_tokens.weight[96] *= 1000
    questions = []
    for question in random_questions(10):
        usual = [token % 96 for token in question.prompt[1:]]
        questions.append(replace(question, prompt=[96, *usual], steered_at=None))

    tokens = [token for question in questions[:4] for token in text(question)[1:]]
    unit = model.embed_tokens.weight[torch.tensor(tokens)].square().mean().sqrt().item()
    vector = attach(model, -1).vector
    train.train_loop(flags("vector", -1, steps=1), model, questions, [vector])
    assert vector.abs().max().item() == pytest.approx(0.02 * unit, rel=1e-3)  # Adam's first step


@every_family
@pytest.mark.parametrize("layers", ["one", "all", "all, in parts"])
def test_a_lora_trains_as_pefts_in_a_plain_loop(saved, name, layers, tmp_path, monkeypatch):
    from peft import PeftModel

    if layers == "all, in parts":
        little_room(monkeypatch, nodes=60)
    family = saved(name)
    model = family.load()
    questions = random_questions(10)
    args = flags("lora", layers, steps=5)

    numbers = [1] if layers == "one" else list(range(len(model.layers)))
    modules = ["up_proj", "down_proj"]
    if model.config.gated_mlp:
        modules.append("gate_proj")
    parameters = add_lora(model, numbers, modules, rank=2, alpha=4)
    # With B at zero A would not learn in the first step.
    set_parameters(parameters, [p + random_like(p + 0.1, seed=1) for p in parameters])
    start = [p.detach().clone() for p in parameters]

    save_lora(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(family.theirs), tmp_path, is_trainable=True)
    theirs.eval()
    named = dict(theirs.named_parameters())
    names = [key.replace(".weight", ".default.weight") for key in peft_tensors(model)]
    expected = [named[key] for key in names]

    def logits(question):
        return theirs(torch.tensor([text(question)])).logits[0]

    losses = train.train_loop(args, model, questions, parameters)
    assert losses == pytest.approx(plain_loop(args, questions, expected, logits), rel=1e-4)
    assert_same(parameters, expected, start)


def test_what_is_frozen_runs_once_over_each_text_however_many_epochs_there_are(saved):
    model = saved("qwen3").load()
    runs = []
    model.layers[0].register_forward_hook(lambda *given: runs.append(given))
    args = flags("vector", 0, steps=30)
    train.train_loop(args, model, random_questions(8), [attach(model, 0).vector])
    assert len(runs) == 1  # with eight texts at once, in 15 epochs of two batches


def test_every_epoch_has_every_question_once_in_another_order():
    args = flags("vector", 0, steps=6, batch_size=4)
    batches = train.draw_batches(10, args)  # of 4, 4 and 2
    first = torch.cat(batches[:3]).tolist()
    second = torch.cat(batches[3:]).tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
