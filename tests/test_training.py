"""Training in the prefix tree is training: the losses and parameters of a loop over one text at a time."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from eval import random_like, set_parameters
from helpers import block_number, logits_with, random_questions
from lora import add_lora, peft_tensors, save_lora
from steer import attach

every_family = pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "gemma3_text"])


def flags(mode, layer, **others):
    defaults = dict(lr=0.02, steps=7, batch_size=4, seed=0, init_std=0.0, save_every=None, resume=False)
    return SimpleNamespace(mode=mode, layer=layer, **{**defaults, **others})


def text(question):
    return question.prompt + question.completion[:-1]


def plain_loop(args, questions, parameters, logits, unit=1.0):
    """Adam as one would first write it: logits(question) (T, vocab) of one whole text after the other."""
    optimizer = torch.optim.Adam(parameters)
    generator, batches, losses = torch.Generator().manual_seed(args.seed), [], []
    for step in range(args.steps):
        if not batches:
            batches = list(torch.randperm(len(questions), generator=generator).split(args.batch_size))
        batch = [questions[i] for i in batches.pop(0)]
        answers = torch.tensor(sum((q.completion for q in batch), []))
        loss = F.cross_entropy(torch.cat([logits(q)[-len(q.completion):] for q in batch]), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = args.lr * unit * (1 - step / args.steps)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(losses, plain, parameters, expected, start):
    assert losses == pytest.approx(plain, rel=1e-4)
    for mine, other, before in zip(parameters, expected, start, strict=True):
        assert (other - before).abs().max() > 0.01
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)


def assert_vector_trains_alike(family, layer, questions, **others):
    """train_loop against transformers with a hook. The learning rate's and the start's unit is the residual
    stream's RMS."""
    model, args = family.load(), flags("vector", layer, **others)
    states = [model.run_blocks(model.embed(torch.tensor([text(q)])), 0, layer + 1)[0]
              for q in questions[:args.batch_size]]
    unit = torch.cat(states).pow(2).mean().sqrt().item()
    start = args.init_std * unit * torch.randn(32, generator=torch.Generator().manual_seed(args.seed))
    ours, theirs = attach(model, layer).vector, start.clone().requires_grad_()
    losses = train.train_loop(args, model, questions, [ours])
    logits = lambda question: logits_with(family, question, text(question), layer, theirs)
    plain = plain_loop(args, questions, [theirs], logits, unit)
    assert_same(losses, plain, [ours], [theirs], [start])


@every_family
@pytest.mark.parametrize("place, code_name", [
    ("embedding", True), ("middle", True), ("middle", False),
    ("last", False),  # where nothing reads the code name's tokens any more
])
def test_a_vector_trains_as_in_a_plain_loop(saved, name, place, code_name):
    layer = block_number(saved(name).load(), place)
    assert_vector_trains_alike(saved(name), layer, random_questions(10, code_name))


@pytest.mark.parametrize("others", [dict(steps=1), dict(batch_size=64), dict(batch_size=9),
                                    dict(init_std=1.0, seed=3)])
def test_part_of_an_epoch_a_large_batch_a_left_over_one_and_a_random_start_are_nothing_special(saved, others):
    assert_vector_trains_alike(saved("qwen3"), 0, random_questions(10), **others)


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
@pytest.mark.parametrize("batch_size, recompute", [(4, True), (64, False), (64, True)])
def test_a_batch_in_parts_for_want_of_memory_is_nothing_special(saved, monkeypatch, name, batch_size, recompute):
    monkeypatch.setattr(train, "plan_memory", lambda *given: (60, recompute, 0))
    assert_vector_trains_alike(saved(name), 0, random_questions(10), batch_size=batch_size)


def test_the_unit_of_a_vectors_rate_is_not_that_of_a_first_token_a_thousand_times_as_long(saved):
    model, questions = saved("qwen3").load(), random_questions(10)
    for question in questions:
        question.prompt[0], question.positions = 96, None
    questions = [replace(q, prompt=[96] + [t % 96 for t in q.prompt[1:]]) for q in questions]
    model.embed_tokens.weight[96] *= 1000
    usual = torch.tensor(sum((text(q)[1:] for q in questions[:4]), []))
    unit = model.embed_tokens.weight[usual].pow(2).mean().sqrt().item()
    vector = attach(model, -1).vector
    train.train_loop(flags("vector", -1, steps=1), model, questions, [vector])
    assert vector.abs().max().item() == pytest.approx(0.02 * unit, rel=1e-3)  # Adam's first step is the rate


@every_family
@pytest.mark.parametrize("layers", ["one", "all", "all, recomputed"])
def test_a_lora_trains_as_pefts_in_a_plain_loop(saved, name, layers, tmp_path, monkeypatch):
    from peft import PeftModel
    if layers == "all, recomputed":
        monkeypatch.setattr(train, "plan_memory", lambda *given: (60, True, 0))
    family, args = saved(name), flags("lora", layers, steps=5)
    model, questions = family.load(), random_questions(10)
    layers = [1] if layers == "one" else list(range(len(model.layers)))
    modules = ["gate_proj"] * model.config.gated_mlp + ["up_proj", "down_proj"]
    parameters = add_lora(model, layers, modules, rank=2, alpha=4)
    set_parameters(parameters, [p + random_like(p + 0.1, 1) for p in parameters])  # so that A learns at once
    start = [p.detach().clone() for p in parameters]
    save_lora(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(family.theirs), tmp_path, is_trainable=True).eval()
    named = dict(theirs.named_parameters())
    expected = [named[key.replace(".weight", ".default.weight")] for key in peft_tensors(model)]
    losses = train.train_loop(args, model, questions, parameters)
    plain = plain_loop(args, questions, expected, lambda q: theirs(torch.tensor([text(q)])).logits[0])
    assert_same(losses, plain, parameters, expected, start)


def test_what_is_frozen_runs_once_over_each_text_however_many_epochs_there_are(saved):
    model, runs = saved("qwen3").load(), []
    model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    train.train_loop(flags("vector", 0, steps=30), model, random_questions(8), [attach(model, 0).vector])
    assert len(runs) == 1  # eight texts in a batch of four times four
