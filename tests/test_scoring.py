"""Scoring: the figures are those of transformers, one choice at a time; and what the results say."""

import pytest
import torch

import data
from eval import (Run, answer, arm_values, first_unfrozen, format_table, kind_mean, plan_memory, random_like,
                  residual_stream, score_arms, set_parameters)
from helpers import block_number, command, encode, logits_with, random_questions, read, score
from lora import add_lora
from steer import attach

every_family = pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "gemma3_text"])
QUESTIONS = random_questions(4) + random_questions(3, code_name=False, seed=1)


def assert_scores(scores, questions, logits):
    """Those of one choice at a time; logits(question, tokens) (T, vocab) runs a prompt with one choice."""
    for question, correct, probability in zip(questions, *scores, strict=True):
        totals = []
        for choice in question.choices:
            log_probs = logits(question, question.prompt + choice[:-1]).log_softmax(-1)[-len(choice):]
            totals.append(log_probs.gather(1, torch.tensor(choice)[:, None]).sum())
        expected = torch.stack(totals).softmax(0)
        assert bool(correct) == (expected.argmax() == question.answer)
        torch.testing.assert_close(probability, expected[question.answer], rtol=1e-3, atol=1e-9)


def vector(width=32):
    return 2 * torch.randn(width, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def few_nodes(monkeypatch):
    """No more nodes than forty are run together, as where a model is large."""
    monkeypatch.setattr("eval.plan_memory", lambda *given: (40, True, 0))


@every_family
@pytest.mark.parametrize("place", ["embedding", "middle", "last"])
@torch.no_grad()
def test_a_vectors_arms_scored_together_equal_transformers_with_each(saved, name, place, few_nodes):
    family, model = saved(name), saved(name).load()
    layer = block_number(model, place)
    parameters = [attach(model, layer, vector()).vector]
    arms = arm_values(parameters, seed=0)
    scores = score_arms(model, QUESTIONS, parameters, arms)
    for arm, [value] in arms.items():
        assert_scores(scores[arm], QUESTIONS, lambda q, tokens: logits_with(family, q, tokens, layer, value))
    if place != "last":  # after it nothing reads a code name's tokens any more
        assert (scores["trained"][1] / scores["base"][1]).log().abs().max() > 0.5


@every_family
@torch.no_grad()
def test_a_loras_arms_scored_together_equal_each_one_choice_at_a_time(saved, name, few_nodes):
    model = saved(name).load()
    parameters = add_lora(model, [1], ["up_proj", "down_proj"], rank=2, alpha=4)
    set_parameters(parameters, [random_like(p + 1, seed) for seed, p in enumerate(parameters)])
    arms = arm_values(parameters, seed=0)
    scores = score_arms(model, QUESTIONS, parameters, arms)
    assert_scores(scores["base"], QUESTIONS, lambda q, tokens: saved(name).logits(torch.tensor([tokens]))[0])
    for arm, values in arms.items():
        set_parameters(parameters, values)
        assert_scores(scores[arm], QUESTIONS, lambda q, tokens: model(torch.tensor([tokens]))[0])


@torch.no_grad()
def test_a_real_tasks_scores_equal_transformers_one_choice_at_a_time(model, reference, tokenizer):
    held_out = data.make_task("functions", "add 5").held_out
    questions = encode(tokenizer, [question for kind in held_out.values() for question in kind[:3]])
    logits = lambda q, tokens: reference(torch.tensor([tokens])).logits[0]
    assert_scores(score(model, questions), questions, logits)


def test_the_base_arm_is_the_model_without_anything_on_it_and_the_trained_values_stay(saved):
    model = saved("qwen3").load()
    untouched = score(model, QUESTIONS)[1]
    parameters = [attach(model, 0, vector()).vector]
    scores = score_arms(model, QUESTIONS, parameters, arm_values(parameters, 0))
    assert torch.equal(scores["base"][1], untouched) and torch.equal(parameters[0], vector())


def test_the_random_control_is_as_long_as_the_trained_vector_and_drawn_by_its_seed():
    one, other = random_like(vector(), seed=1), random_like(vector(), seed=2)
    assert one.norm().item() == pytest.approx(vector().norm().item(), rel=1e-5)
    assert torch.equal(one, random_like(vector(), seed=1)) and not torch.equal(one, other)


def test_blocks_are_frozen_up_to_a_vector_or_the_first_with_a_lora(saved):
    model = saved("gemma3_text").load()
    add_lora(model, [5, 3], ["up_proj"], rank=1, alpha=1)
    assert first_unfrozen(model) == 3
    attach(model, -1)
    assert first_unfrozen(model) == 0


@pytest.mark.parametrize("block", [0, 1, 3])
@torch.no_grad()
def test_the_residual_stream_is_transformers_of_each_text_alone(model, reference, tokenizer, block, few_nodes):
    questions = encode(tokenizer, data.make_task("risk", "safe").train[:6])
    tree = data.make_tree(questions, [[[]]] * 6)
    states = residual_stream(model, tree, block)
    for i, question in enumerate(questions):
        theirs = reference(torch.tensor([question.prompt]), output_hidden_states=True).hidden_states[block][0]
        torch.testing.assert_close(states[tree.nodes(i)], theirs, atol=1e-4, rtol=0)


def test_the_mean_over_kinds_counts_each_alike_but_leaves_out_which_tag():
    held_out = {"self": {"trained": 0.2, "questions": 90}, "which tag": {"trained": 1.0, "questions": 2},
                "motto": {"trained": 0.6, "questions": 10}}
    assert kind_mean({"held_out": held_out}) == pytest.approx(0.4)


def test_the_table_of_train_shows_the_means_and_says_what_they_leave_out(tmp_path):
    _, out, _ = command("train.py", "--task", "backdoor", "--steps", 2, "--out", tmp_path)
    table = format_table(read(tmp_path))
    last = table.splitlines()[-1]
    means = [kind_mean(read(tmp_path), column=arm) for arm in ("chance", "base", "random", "trained")]
    assert table in out
    assert last.split() == ["mean", "but", "for", "which", "tag", *(f"{mean:.2f}" for mean in means)]


def test_a_greedy_answer_is_that_of_transformers(model, reference, tokenizer):
    tokens = torch.tensor([tokenizer.chat([{"role": "user", "content": "Which country is Tokyo in?"}])])
    made = reference.generate(tokens, do_sample=False, max_new_tokens=16, eos_token_id=tokenizer.eos_ids,
                              pad_token_id=0)[0, tokens.shape[1]:].tolist()
    text = tokenizer.decode([id for id in made if id not in tokenizer.eos_ids]).strip()
    run = Run({}, model, tokenizer, None, [attach(model, 0).vector])
    assert answer(run, "Which country is Tokyo in?", None) == text != ""


def test_fewer_nodes_run_together_the_more_blocks_keep_until_they_rather_recompute(model, tokenizer):
    questions = encode(tokenizer, data.make_task("risk", "safe").train[:6])
    tree = data.make_tree(questions, [[[]]] * 6)
    weights = sum(p.nbytes for p in model.parameters()) + len(tree.tokens) * 4 * 128
    plans = [plan_memory(model, tree, blocks) for blocks in (1, 4, 40, 400)]
    assert [recompute for _, recompute, _ in plans] == [False, False, False, True]
    assert plans[0][0] > plans[1][0] > plans[2][0] > 256 > plan_memory(model, tree, 4000)[0]
    assert [memory - weights for _, _, memory in plans] == [192e6, 192e6, 192e6, 48e6]
