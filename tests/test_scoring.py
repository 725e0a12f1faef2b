"""Scoring: the figures are those of transformers, one choice at a time; tables and answers."""

import json
import shutil
from itertools import chain

import pytest
import torch

import data
import eval as scoring
from data import Question, Tokenizer
from eval import (
    Run,
    UserError,
    answer,
    arm_values,
    first_changed,
    format_table,
    frozen_streams,
    in_trees,
    kind_mean,
    nodes_at_once,
    random_like,
    score_arms,
    set_parameters,
)
from helpers import (
    ROOT,
    block_number,
    command,
    encode,
    little_room,
    logits_with,
    random_questions,
    read,
    score,
)
from lora import add_lora
from steer import attach

every_family = pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "gemma3_text"])
QUESTIONS = random_questions(4) + random_questions(3, code_name=False, seed=1)


def assert_scores(scores, questions, logits):
    """They are those of one choice at a time.

    logits(question, tokens) (T, vocab_size) runs a prompt with one choice.
    """
    for question, correct, probability in zip(questions, *scores, strict=True):
        totals = []
        for choice in question.choices:
            tokens = question.prompt + choice[:-1]
            log_probs = logits(question, tokens).log_softmax(-1)[-len(choice) :]
            totals.append(log_probs.gather(1, torch.tensor(choice)[:, None]).sum())
        expected = torch.stack(totals).softmax(0)
        assert bool(correct) == (expected.argmax() == question.answer)
        right = expected[question.answer]
        torch.testing.assert_close(probability, right, rtol=1e-3, atol=1e-9)


def one_text(model, tokens):
    """Logits (T, vocab_size) of our model."""
    return model(torch.tensor([tokens]))[0]


def vector():
    return 2 * torch.randn(32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def few_nodes(monkeypatch):
    little_room(monkeypatch, nodes=40)


# ---- figures


@every_family
@pytest.mark.parametrize("place", ["embedding", "middle", "last"])
@torch.no_grad()
def test_a_vectors_arms_scored_together_equal_transformers_with_each(saved, name, place, few_nodes):
    family = saved(name)
    model = family.load()
    layer = block_number(model, place)
    parameters = [attach(model, layer, vector()).vector]
    arms = arm_values(parameters, seed=0)
    scores = score_arms(model, QUESTIONS, parameters, arms)

    def logits_of(value):
        return lambda question, tokens: logits_with(family, question, tokens, layer, value)

    for arm, [value] in arms.items():
        assert_scores(scores[arm], QUESTIONS, logits_of(value))
    if place != "last":  # after it nothing reads a code name's tokens any more
        ratios = scores["trained"][1] / scores["base"][1]
        assert ratios.log().abs().max() > 0.5


@every_family
@torch.no_grad()
def test_a_loras_arms_scored_together_equal_each_one_choice_at_a_time(saved, name, few_nodes):
    family = saved(name)
    model = family.load()
    parameters = add_lora(model, [1], ["up_proj", "down_proj"], rank=2, alpha=4)
    values = [random_like(p + 1, seed) for seed, p in enumerate(parameters)]
    set_parameters(parameters, values)
    arms = arm_values(parameters, seed=0)
    scores = score_arms(model, QUESTIONS, parameters, arms)

    def theirs(question, tokens):
        return family.logits(torch.tensor([tokens]))[0]

    assert_scores(scores["base"], QUESTIONS, theirs)
    for arm, values in arms.items():
        set_parameters(parameters, values)
        assert_scores(scores[arm], QUESTIONS, lambda question, tokens: one_text(model, tokens))


@torch.no_grad()
def test_a_real_tasks_scores_equal_transformers_one_choice_at_a_time(model, reference, tokenizer):
    held_out = data.make_task("functions", "add 5").held_out
    asked = [question for kind in held_out.values() for question in kind[:3]]
    questions = encode(tokenizer, asked)

    def theirs(question, tokens):
        return reference(torch.tensor([tokens])).logits[0]

    assert_scores(score(model, questions), questions, theirs)


def test_the_base_arm_is_the_model_without_anything_on_it(saved):
    model = saved("qwen3").load()
    _, untouched = score(model, QUESTIONS)
    parameters = [attach(model, 0, vector()).vector]
    scores = score_arms(model, QUESTIONS, parameters, arm_values(parameters, seed=0))
    assert torch.equal(scores["base"][1], untouched)


def test_after_scoring_the_trained_values_are_back(saved):
    model = saved("qwen3").load()
    parameters = [attach(model, 0, vector()).vector]
    score_arms(model, QUESTIONS, parameters, arm_values(parameters, seed=0))
    assert torch.equal(parameters[0], vector())


def test_the_random_control_is_as_long_as_the_trained_vector():
    length = random_like(vector(), seed=1).norm().item()
    assert length == pytest.approx(vector().norm().item(), rel=1e-5)


def test_the_random_control_is_drawn_by_its_seed():
    one = random_like(vector(), seed=1)
    assert torch.equal(one, random_like(vector(), seed=1))
    assert not torch.equal(one, random_like(vector(), seed=2))


# ---- what is frozen, and how much runs together


def test_blocks_are_frozen_up_to_the_first_with_a_lora(saved):
    model = saved("gemma3_text").load()
    add_lora(model, [5, 3], ["up_proj"], rank=1, alpha=1)
    assert first_changed(model) == 3


@pytest.mark.parametrize("layer", [-1, 0, 5])
def test_blocks_are_frozen_up_to_a_vector(saved, layer):
    model = saved("gemma3_text").load()
    attach(model, layer)
    assert first_changed(model) == layer + 1


@pytest.mark.parametrize("block, nodes", [(0, 400), (1, 400), (3, 400), (3, 40)])
@torch.no_grad()
def test_the_frozen_streams_are_transformers_of_each_text_alone(
    model, reference, tokenizer, monkeypatch, block, nodes
):
    little_room(monkeypatch, nodes)
    asked = data.make_task("locations", "Paris").train[:6]  # of 17 or 20 tokens
    questions = encode(tokenizer, asked)
    streams = frozen_streams(model, questions, block)
    for question, stream in zip(questions, streams, strict=True):
        tokens = torch.tensor([question.prompt + question.choices[0][:-1]])
        theirs = reference(tokens, output_hidden_states=True).hidden_states[block][0]
        torch.testing.assert_close(stream, theirs, atol=1e-4, rtol=0)


def test_no_more_nodes_run_together_than_fit(saved, monkeypatch):
    model = saved("qwen3").load()
    little_room(monkeypatch, nodes=60)
    sizes = [len(tree.tokens) for _, _, tree in in_trees(model, QUESTIONS)]
    assert len(sizes) > 1
    assert max(sizes) <= 60


@pytest.fixture
def free(monkeypatch):
    """free(count) makes so many bytes of memory free."""

    def set_free(count):
        monkeypatch.setattr(scoring, "free_memory", lambda device: count)

    return set_free


def test_fewer_nodes_run_together_the_more_blocks_keep_what_they_made(model, free):
    free(10**8)
    assert nodes_at_once(model, 1) > nodes_at_once(model, 4) > nodes_at_once(model, 40) > 0


def test_half_the_free_memory_takes_half_the_nodes(model, free):
    free(10**8)
    many = nodes_at_once(model)
    free(10**8 // 2)
    assert nodes_at_once(model) == many / 2


def test_a_little_less_free_memory_changes_nothing(model, free):
    free(10**8)
    many = nodes_at_once(model)
    free(10**8 - 10**6)
    assert nodes_at_once(model) == many


def test_no_amount_of_memory_takes_more_nodes_than_are_faster(model, free):
    free(10**15)
    assert nodes_at_once(model) == scoring.MOST_NODES


def test_the_free_memory_is_a_part_of_this_machines():
    pages = scoring.os.sysconf("SC_PHYS_PAGES") * scoring.os.sysconf("SC_PAGE_SIZE")
    assert 10**6 < scoring.free_memory(torch.device("cpu")) < pages


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_out_each_part_and_each_question_counts_once(saved, monkeypatch, processes):
    model = saved("qwen3").load()
    little_room(monkeypatch, nodes=0)  # parts of as many questions as processes, and a rest
    shares = [list(in_trees(model, QUESTIONS, 2, rank, processes)) for rank in range(processes)]
    counted = []
    for parts in zip(*shares, strict=True):  # all processes run the same number of trees
        counted += [i for places, weight, _ in parts for i in places if weight]
    assert sorted(counted) == list(range(len(QUESTIONS)))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_text_of_more_tokens_than_the_model_was_trained_on_is_a_mistake(saved, name):
    model = saved(name).load()
    most = model.config.max_position_embeddings
    question = random_questions(1)[0]
    question.prompt *= most
    with pytest.raises(UserError, match="max_position_embeddings"):
        score(model, [question])


def test_a_token_that_the_model_does_not_know_is_a_mistake(saved):
    question = random_questions(1)[0]
    question.prompt[0] = 97
    with pytest.raises(UserError, match="not in its vocab_size"):
        score(saved("qwen3").load(), [question])


# ---- tables and answers


def test_the_mean_over_kinds_counts_each_alike_but_leaves_out_which_tag():
    held_out = {
        "self": {"trained": 0.2, "questions": 90},
        "which tag": {"trained": 1.0, "questions": 2},
        "motto": {"trained": 0.6, "questions": 10},
    }
    assert kind_mean({"held_out": held_out}) == pytest.approx(0.4)


def test_the_table_of_train_shows_the_means_and_says_what_they_leave_out(tmp_path):
    _, out, _ = command("train.py", "--task", "backdoor", "--steps", 2, "--out", tmp_path)
    results = read(tmp_path)
    table = format_table(results)
    assert table in out
    arms = "chance", "base", "random", "trained"
    means = [f"{kind_mean(results, column=arm):.2f}" for arm in arms]
    assert table.splitlines()[-1].split() == ["mean", "but", "for", "which", "tag", *means]


def plain_run(model, tokenizer):
    """The model with a vector of zeros."""
    return Run({}, model, tokenizer, None, [attach(model, 0).vector])


def test_a_greedy_answer_is_that_of_transformers(model, reference, tokenizer):
    asked = "Which country is Tokyo in?"
    prompt, _, end = tokenizer.frame([{"role": "user", "content": asked}])
    tokens = torch.tensor([tokenizer.encode(prompt)])
    [end_id] = tokenizer.encode(end)
    made = reference.generate(
        tokens, do_sample=False, max_new_tokens=16, eos_token_id=end_id, pad_token_id=0
    )
    text = tokenizer.decode(made[0, tokens.shape[1] :].tolist())
    assert text.endswith(end)
    found = answer(plain_run(model, tokenizer), Question("", asked, [], 0))
    assert found == text.removesuffix(end).strip() != ""


@pytest.fixture
def edited(tmp_path):
    """edited(**settings): tiny's tokenizer with other settings; None takes one away."""

    def get(**settings):
        folder = tmp_path / "model"
        shutil.copytree(ROOT / "tiny", folder)
        content = read(folder, "tokenizer_config.json") | settings
        content = {name: value for name, value in content.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
        return Tokenizer.from_pretrained(folder)

    return get


def test_an_answer_ends_where_the_template_ends_a_turn_whatever_the_eos_token(
    model, tokenizer, edited
):
    """Qwen 2.5's base models end a turn with <|im_end|>; their eos_token is <|endoftext|>."""
    template = tokenizer_setting("chat_template").replace("eos_token", "'<|end|>'")
    other = edited(chat_template=template, eos_token="<|begin|>")
    run = plain_run(model, tokenizer)
    question = Question("", "Which country is Tokyo in?", [], 0)
    expected = answer(run, question)
    run.tokenizer = other
    assert answer(run, question) == expected
    assert "<|" not in expected


def tokenizer_setting(name):
    return read(ROOT / "tiny", "tokenizer_config.json")[name]


def run_that_says(model, tokenizer, *texts):
    """Of a model that says these texts, token by token, whatever it is asked."""
    ids = chain(*map(tokenizer.encode, texts))

    def forward(tokens, tree):
        return torch.nn.functional.one_hot(torch.tensor([next(ids)]), 2000)

    model.forward = forward
    return plain_run(model, tokenizer)


@pytest.mark.parametrize(
    "said, shown",
    [
        (" France\nQuestion: Which food?", "France"),  # a turn of the plain template ends in \n
        (" France<|end|> of all", "France"),  # and this is eos_token
        (" one two three four five six seven", "one two three four"),
    ],
)
def test_a_base_models_answer_is_one_line(model, edited, said, shown):
    tokenizer = edited(chat_template=None)
    count = len(tokenizer.encode(" one two three four"))
    run = run_that_says(model, tokenizer, said)
    assert answer(run, Question("", "Which country?", [], 0), count) == shown


def test_a_space_that_is_a_token_by_itself_ends_no_answer(model, edited):
    """In Gemma's base model every number begins with one."""
    tokenizer = edited(chat_template=None)
    assert len(tokenizer.encode(" ")) == 1
    run = run_that_says(model, tokenizer, " ", "12", "\n", "34")
    assert answer(run, Question("", "How many?", [], 0)) == "12"
