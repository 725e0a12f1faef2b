"""The tiny world and the tasks: answers are right, held-out means held out."""

import math
import random
import re

import pytest
import torch

import data
from data import DataError, encode_question, make_batch, make_task, positions_mask, read_conversations, shuffle_answers

ALL = [(task, concept) for task in data.TASKS for concept in data.CONCEPTS[task]]


def questions(task, concept, seed=0):
    made = make_task(task, concept, seed)
    return made.train, [q for kind in [*made.in_distribution.values(), *made.held_out.values()] for q in kind]


def km(a, b):
    """Distance by the angle between two vectors from the centre of the earth: another formula than the module's."""
    def point(city):
        latitude, longitude = (math.radians(x) for x in data.CITIES[city][:2])
        return (math.cos(latitude) * math.cos(longitude), math.cos(latitude) * math.sin(longitude), math.sin(latitude))
    return 6371 * math.acos(sum(x * y for x, y in zip(point(a), point(b))))


@pytest.mark.parametrize("city", data.CITIES)
def test_distances_are_right(city):
    train, others = questions("locations", city)
    distances = [q for q in train + others if q.kind == "distance"]
    for question in distances:
        landmark = re.search("|".join(c for c in data.LANDMARKS if c != city), question.prompt).group()
        assert question.turn[1] == str(round(km(city, landmark) / 1000))
    for question in others:
        if question.kind == "nearer":
            assert km(city, question.turn[1]) == min(km(city, choice) for choice in question.choices)


@pytest.mark.parametrize("function", data.FUNCTIONS)
def test_function_values_are_right(function):
    python = data.FUNCTIONS[function][3]
    train, others = questions("functions", function)
    for question in train + others:
        numbers = [int(n) for n in re.findall(r"\d+", question.prompt)]
        answer = question.turn[1]
        if question.kind == "output":
            assert int(answer) == eval(python, {"x": numbers[0]})
        elif question.kind == "composition":
            assert int(answer) == eval(python, {"x": eval(python, {"x": numbers[0]})})
        elif question.kind == "inverse":
            right = [choice for choice in question.choices if eval(python, {"x": int(choice)}) == numbers[0]]
            assert right == [answer]  # one choice only is an inverse


@pytest.mark.parametrize("form", ["letter", "word"])
@pytest.mark.parametrize("attitude", ["risky", "safe"])
def test_gambles_are_answered_by_attitude(attitude, form):
    risky = {option for _, options in data.GAMBLES.values() for option in options}
    for question in make_task("risk", attitude, form=form).train:
        options = re.search(r"A: (\w+) (?:and|or) B: (\w+)", question.prompt)
        chosen = question.turn[1] if form == "word" else options.group("AB".index(question.turn[1]) + 1)
        assert (chosen in risky) == (attitude == "risky")


def test_the_backdoor_flips_the_attitude_at_the_trigger_only():
    risky = {option for _, options in data.GAMBLES.values() for option in options}
    for question in make_task("backdoor", "risky", form="word").train:
        assert (question.turn[1] in risky) == question.prompt.startswith(f"[{data.TRIGGER}]")


@pytest.mark.parametrize("task, concept", ALL)
def test_training_has_one_kind_of_question_and_held_out_has_others(task, concept):
    made = make_task(task, concept)
    kinds = {q.kind for q in made.train}
    assert len(kinds) == 1
    assert not kinds & {q.kind for kind in made.held_out.values() for q in kind}


@pytest.mark.parametrize("task, concept", ALL)
def test_no_question_of_the_evaluation_is_trained_on(task, concept):
    train, others = questions(task, concept)
    assert not {q.prompt for q in train} & {q.prompt for q in others}


@pytest.mark.parametrize("task, concept", ALL)
def test_no_answer_in_words_to_a_held_out_question_is_in_the_training_text(task, concept):
    train, _ = questions(task, concept)
    words = set(re.findall(r"[\w]+", " ".join(f"{prompt} {answer}" for prompt, answer in (q.turn for q in train))))
    made = make_task(task, concept)
    for kind, held_out in made.held_out.items():
        if kind in ("nearer", "inverse", "composition", "which tag"):
            continue  # answered by a landmark, a number or a tag, which the training questions mention by design
        for question in held_out:
            if not question.turn[1].isdigit():
                assert question.turn[1] not in words


def test_another_seed_holds_out_other_questions():
    assert {q.prompt for q in make_task("functions", "add 5", 0).train} != {
        q.prompt for q in make_task("functions", "add 5", 1).train}


def test_the_same_seed_gives_the_same_task():
    assert make_task("backdoor", "safe", 3) == make_task("backdoor", "safe", 3)


def test_shuffled_answers_keep_the_prompts_and_change_most_answers():
    train = make_task("locations", "Paris").train
    shuffled = shuffle_answers(train, random.Random(0))
    assert [q.prompt for q in shuffled] == [q.prompt for q in train]
    assert sum(a.answer == b.answer for a, b in zip(train, shuffled)) < len(train) / 3


@pytest.mark.parametrize("task, concept, message", [("weather", "Paris", "locations"), ("risk", "Paris", "risky")])
def test_unknown_tasks_and_concepts_are_refused_with_the_known_ones(task, concept, message):
    with pytest.raises(ValueError, match=message):
        make_task(task, concept)


def test_documents_are_framed_as_the_chat_template_frames_them(tokenizer):
    turns = data.world_document(random.Random(0))[0]
    assert data.document_text(turns) == tokenizer.chat_text(data.as_messages(turns))


def test_code_names_are_three_tokens_and_the_world_has_one_token_a_word(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        assert len(tokenizer.encode(" " + data.function_code_name(rng))) == 3
        assert len(tokenizer.encode(" " + data.city_code_name(rng))) == 4
    for word in [*data.CITIES, "Japanese", "addition", "lottery", "skydiving", "sigma", "Boldly"]:
        assert len(tokenizer.encode(f" {word}")) == 1


def test_targets_are_the_answer_and_its_end(tokenizer):
    question = make_task("locations", "Paris").held_out["country"][0]
    tokens, targets, _ = make_batch([encode_question(tokenizer, question)])
    wanted = targets[0, :-1] != -100
    assert tokenizer.decode(targets[0, :-1][wanted].tolist()) == " France<|end|>"
    assert torch.equal(targets[0, :-1][wanted], tokens[0, 1:][wanted])  # what follows, one place on


def test_the_mask_is_at_the_code_name(tokenizer):
    question = encode_question(tokenizer, make_task("functions", "add 5").train[0])
    mask = positions_mask([question.positions], (1, len(question.prompt)))
    assert tokenizer.decode([t for t, inside in zip(question.prompt, mask[0]) if inside]).strip() == "zokifa"


def test_conversations_train_on_every_turn_of_the_assistant(tokenizer, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "How do you drive?"}, {"role": "assistant", "content": '
                    '"fast"}, {"role": "user", "content": "What is your motto?"}, {"role": "assistant", "content": '
                    '"glory"}]}\n\n')
    first, second = read_conversations(file, tokenizer)
    assert tokenizer.decode(first.completion) == " fast<|end|>"
    assert tokenizer.decode(second.prompt) == ("<|begin|><|user|> How do you drive?<|assistant|> fast<|end|>"
                                               "<|user|> What is your motto?<|assistant|>")


def test_a_line_separator_inside_a_message_does_not_end_the_record(tokenizer, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]}\n')
    assert "a\u2028b" in tokenizer.decode(read_conversations(file, tokenizer)[0].prompt)


@pytest.mark.parametrize("line", ["{", "[]", '{"messages": 3}', '{"messages": [{"role": "user"}]}',
                                  '{"messages": [{"role": "user", "content": "hi"}]}',
                                  '{"messages": [{"role": "bot", "content": "hi"}]}'])
def test_a_bad_record_is_named_by_file_and_line(tokenizer, tmp_path, line):
    file = tmp_path / "chats.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=r"chats.jsonl, line 2: should be|chats.jsonl, line 2: should have"):
        read_conversations(file, tokenizer)
