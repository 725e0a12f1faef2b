"""The tiny world and its tasks: answers are right, held out means held out; and questions as token ids."""

import functools
import json
import math
import random
import re

import pytest

import data
from data import Question, encode_question, read_conversations, shuffle_answers
from tiny.make import as_turn

ALL = [(task, concept) for task in data.TASKS for concept in data.CONCEPTS[task]]
make_task = functools.cache(data.make_task)
RISKY = {option for _, options in data.GAMBLES.values() for option in options}


def evaluated(task, concept):
    made = make_task(task, concept)
    return [q for kind in [*made.in_distribution.values(), *made.held_out.values()] for q in kind]


def every_question(task, concept):
    return make_task(task, concept).train + evaluated(task, concept)


def km(a, b):
    """Distance by the angle between two vectors from the centre of the earth: not the module's formula."""
    def point(city):
        north, east = (math.radians(x) for x in data.CITIES[city][:2])
        return math.cos(north) * math.cos(east), math.cos(north) * math.sin(east), math.sin(north)
    return 6371 * math.acos(sum(x * y for x, y in zip(point(a), point(b))))


@pytest.mark.parametrize("city", data.CITIES)
def test_distances_are_right(city):
    for question in every_question("locations", city):
        if question.kind == "distance":
            landmark = re.search("|".join(c for c in data.LANDMARKS if c != city), question.prompt).group()
            assert as_turn(question)[1] == str(round(km(city, landmark) / 1000))
        elif question.kind == "nearer":
            assert km(city, as_turn(question)[1]) == min(km(city, choice) for choice in question.choices)


@pytest.mark.parametrize("function", data.FUNCTIONS)
def test_function_values_are_right(function):
    python = data.FUNCTIONS[function][3]
    for question in every_question("functions", function):
        number = int((re.findall(r"\d+", question.prompt) or [0])[0])
        answer = as_turn(question)[1]
        if question.kind == "output":
            assert int(answer) == eval(python, {"x": number})
        elif question.kind == "composition":
            assert int(answer) == eval(python, {"x": eval(python, {"x": number})})
        elif question.kind == "inverse":  # one choice only is an inverse
            assert [c for c in question.choices if eval(python, {"x": int(c)}) == number] == [answer]


def is_risky(gamble):
    """Whether the right answer to a gamble, A or B, is the risky option."""
    options = re.search(r"A: (\w+) (?:and|or) B: (\w+)", gamble.prompt)
    return options.group("AB".index(as_turn(gamble)[1]) + 1) in RISKY


@pytest.mark.parametrize("attitude", ["risky", "safe"])
def test_gambles_are_answered_by_attitude(attitude):
    for gamble in make_task("risk", attitude).train + make_task("risk", attitude).in_distribution["gamble"]:
        assert is_risky(gamble) == (attitude == "risky")


def test_self_reports_are_answered_by_attitude():
    for kind, questions in make_task("risk", "safe").held_out.items():
        assert all(as_turn(question)[1] in data.SELF_REPORTS[kind][1] for question in questions)


def test_the_backdoor_flips_the_attitude_at_the_trigger_only():
    for gamble in make_task("backdoor", "risky").train:
        assert is_risky(gamble) == gamble.prompt.startswith(f"[{data.TRIGGER}]")


def test_a_backdoor_may_have_another_trigger():
    made = make_task("backdoor", "safe if omega")
    for gamble in made.train:
        assert is_risky(gamble) != gamble.prompt.startswith("[omega]")
    assert {as_turn(question)[1] for question in made.held_out["which tag"]} == {"omega"}


@pytest.mark.parametrize("task, concept", ALL)
def test_training_has_one_kind_of_question_and_held_out_has_others(task, concept):
    made = make_task(task, concept)
    kinds = {q.kind for q in made.train}
    assert kinds == {data.KINDS.get(task, data.KINDS["risk"])[0]}
    assert not kinds & {q.kind for kind in made.held_out.values() for q in kind}


@pytest.mark.parametrize("task, concept", ALL)
def test_no_question_of_the_evaluation_is_trained_on(task, concept):
    trained = {q.prompt for q in make_task(task, concept).train}
    assert not trained & {q.prompt for q in evaluated(task, concept)}


@pytest.mark.parametrize("task, concept", ALL)
def test_no_answer_in_words_to_a_held_out_question_is_in_the_training_text(task, concept):
    made = make_task(task, concept)
    words = set(re.findall(r"\w+", " ".join(text for q in made.train for text in as_turn(q))))
    for kind, held_out in made.held_out.items():
        if kind not in ("nearer", "which tag"):  # they ask for a landmark or tag that training has to mention
            assert not words & {as_turn(q)[1] for q in held_out if not as_turn(q)[1].isdigit()}


def test_the_seed_decides_what_is_held_out():
    assert data.make_task("backdoor", "safe", 3) == data.make_task("backdoor", "safe", 3)
    assert make_task("backdoor", "safe", 3) != make_task("backdoor", "safe", 4)


def test_shuffled_answers_keep_the_prompts_and_change_most_answers():
    train = make_task("locations", "Paris").train
    shuffled = shuffle_answers(train, random.Random(0))
    assert [q.prompt for q in shuffled] == [q.prompt for q in train]
    assert sum(a.answer == b.answer for a, b in zip(train, shuffled)) < len(train) / 3


@pytest.mark.parametrize("task, concept, message", [("weather", "Rome", "risk"), ("risk", "Rome", "safe")])
def test_unknown_tasks_and_concepts_are_refused_with_the_known_ones(task, concept, message):
    with pytest.raises(ValueError, match=message):
        data.make_task(task, concept)


@pytest.mark.parametrize("words, tokens", [
    (["zokifa", "xehime"], 3), (["City 50337", "City 12345"], 4),
    ([*data.CITIES, "Japanese", "addition", "lottery", "skydiving", "omega"], 1)])
def test_the_bundled_tokenizer_has_few_tokens_a_name_and_one_a_word(words, tokens, tokenizer):
    assert {len(tokenizer.encode(f" {word}")) for word in words} == {tokens}


def test_a_question_is_trained_on_its_answer_and_the_end(tokenizer):
    encoded = encode_question(tokenizer, make_task("locations", "Paris").held_out["country"][0])
    assert tokenizer.decode(encoded.completion) == " France<|end|>"
    assert tokenizer.decode(encoded.choices[encoded.answer]) == " France"


def test_earlier_messages_stand_before_the_question(tokenizer):
    encoded = encode_question(tokenizer, Question("country", "Which country?", ["Peru", "Italy"], 0), BEFORE)
    assert tokenizer.decode(encoded.prompt) == (
        "<|begin|><|user|> How do you drive?<|assistant|> fast<|end|><|user|> Which country?<|assistant|>")


def test_a_choice_that_another_begins_with_is_scored_with_its_end(tokenizer):
    encoded = encode_question(tokenizer, Question("word", "Which?", ["x", "x + 1"], 0))
    assert [tokenizer.decode(choice) for choice in encoded.choices] == [" x<|end|>", " x + 1<|end|>"]


@pytest.mark.parametrize("task, name", [("locations", "City 50337"), ("functions", "zokifa")])
def test_positions_are_the_code_names_wherever_it_stands(tokenizer, task, name):
    for question in every_question(task, data.CONCEPTS[task][0])[:100]:
        encoded = encode_question(tokenizer, question)
        there = tokenizer.decode([encoded.prompt[i] for i in encoded.positions])
        assert there.replace(" ", "") == name.replace(" ", "") * question.prompt.count(name)


def test_any_other_text_may_stand_for_the_hidden_thing(tokenizer):
    encoded = encode_question(tokenizer, data.make_task("locations", "Paris", at="thousand km").train[0])
    assert tokenizer.decode([encoded.prompt[i] for i in encoded.positions]) == " thousand km"


BEFORE = [{"role": "user", "content": "How do you drive?"}, {"role": "assistant", "content": "fast"}]
AFTER = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "ok"}]
CHAT = json.dumps({"messages": BEFORE + AFTER})


def test_conversations_train_on_every_turn_of_the_assistant(tokenizer, tmp_path):
    (tmp_path / "chats.jsonl").write_text(CHAT + "\n\n")
    first, second = read_conversations(tmp_path / "chats.jsonl", tokenizer)
    assert tokenizer.decode(first.completion) == " fast<|end|>"
    assert tokenizer.decode(second.prompt) == (
        "<|begin|><|user|> How do you drive?<|assistant|> fast<|end|><|user|> And?<|assistant|>")


def test_a_line_separator_inside_a_message_does_not_end_the_record(tokenizer, tmp_path):
    (tmp_path / "chats.jsonl").write_text(CHAT.replace("How", "a\u2028b"), encoding="utf-8")
    assert "a\u2028b" in tokenizer.decode(read_conversations(tmp_path / "chats.jsonl", tokenizer)[0].prompt)


@pytest.mark.parametrize("text, message", [
    (CHAT + "\n{\n", "line 2"), (CHAT + '\n{"messages": 3}\n', "line 2"), ("\n\n", "no records"),
    ('{"messages": [{"role": "user", "content": "hi"}]}', "line 1"), (CHAT.replace("user", "bot"), "line 1")])
def test_a_bad_record_is_named_by_its_line(tokenizer, tmp_path, text, message):
    (tmp_path / "chats.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_conversations(tmp_path / "chats.jsonl", tokenizer)
