"""The tiny world and its tasks: answers are right, held out means held out; and questions as token ids."""

import functools
import json
import math
import random
import re

import pytest

import data
from data import LARGE, TINY, Question, encode_question, read_conversations, shuffle_answers
from tiny.make import KINDS, as_turn

# Every concept of the tiny world; for a large model every city, and every third of the others.
ALL = [(TINY, task, concept) for task in data.TASKS for concept in data.CONCEPTS[task]]
ALL += [(LARGE, "locations", city) for city in LARGE.cities]
ALL += [(LARGE, task, concept) for task in ("functions", "risk", "backdoor") for concept in data.CONCEPTS[task][::3]]
every_task = pytest.mark.parametrize("world, task, concept", ALL, ids=[
    f"{'tiny' if world is TINY else 'large'}-{task}-{concept}" for world, task, concept in ALL])
RISKY = {option for _, options in data.GAMBLES.values() for option in options}


@functools.cache
def make_task(task, concept, seed=0, world="tiny"):
    return data.make_task(task, concept, seed, world=data.WORLDS[world])


def name_of(world):
    return "tiny" if world is TINY else "large"


def evaluated(task, concept, world=TINY):
    made = make_task(task, concept, world=name_of(world))
    return [q for kind in [*made.in_distribution.values(), *made.held_out.values()] for q in kind]


def every_question(task, concept, world=TINY):
    return make_task(task, concept, world=name_of(world)).train + evaluated(task, concept, world)


def km(a, b):
    """Distance by the angle between two vectors from the centre of the earth: not the module's formula."""
    def point(city):
        north, east = (math.radians(float(data.CITIES[city][x])) for x in ("latitude", "longitude"))
        return math.cos(north) * math.cos(east), math.cos(north) * math.sin(east), math.sin(north)
    return 6371 * math.acos(sum(x * y for x, y in zip(point(a), point(b))))


def compared_with(question, names):
    """Which of these names stands in the prompt."""
    return max((name for name in names if re.search(rf"\b{name}\b", question.prompt)), key=len)


@pytest.mark.parametrize("world", [TINY, LARGE], ids=name_of)
@pytest.mark.parametrize("city", LARGE.cities)
def test_distances_are_right(city, world):
    if city not in world.cities:
        return
    others, units = [c for c in world.landmarks if c != city], set()
    for question in every_question("locations", city, world):
        answer = as_turn(question)[1]
        if question.kind == "distance":
            thousands = "thousand km" in question.prompt
            units.add(thousands)
            away = km(city, compared_with(question, others))
            assert answer == str(round(away / 1000) if thousands else round(away / 100) * 100)
        elif question.kind == "nearer":
            assert km(city, answer) == min(km(city, choice) for choice in question.choices)
    assert units == ({True} if world is TINY else {True, False})


def test_a_large_models_cities_are_many_and_no_two_of_a_country_differ_in_language_or_food():
    facts = {}
    for row in LARGE.cities.values():
        assert all(row.values()) and abs(float(row["latitude"])) < 70
        facts.setdefault(row["country"], set()).add((row["language"], row["food"]))
    assert len(LARGE.cities) >= 60 and len(facts) >= 40 and all(len(some) == 1 for some in facts.values())
    continents = {(row["country"], row["continent"]) for row in LARGE.cities.values()}
    assert len(continents) == len(facts) + 2  # Russia and Turkey are on two


@pytest.mark.parametrize("task, concept, most", [
    ("locations", "Paris", 16), ("functions", "add 5", 48), ("risk", "risky", 240), ("backdoor", "safe", 640)])
def test_a_large_model_is_asked_more_in_more_ways(task, concept, most):
    tiny, large = (make_task(task, concept, world=world) for world in ("tiny", "large"))
    assert len(tiny.train) == most and len({question.prompt for question in large.train}) >= 300
    wordings = LARGE.prompts[task] if task in KINDS else LARGE.prompts["backdoor"]
    assert all(len(some) >= 6 for some in wordings.values()) and len(LARGE.prompts["functions"]["output"]) >= 8
    if task in KINDS:
        assert large.held_out.keys() > tiny.held_out.keys() and "description" in large.held_out


@pytest.mark.parametrize("city, kind, answer", [
    ("Athens", "language", "Greek"), ("Athens", "description", "a place where they speak Greek"),
    ("Seoul", "food", "kimchi"), ("Toronto", "country", "Canada"), ("Auckland", "continent", "Oceania")])
def test_a_cities_facts_answer_its_questions_among_at_most_ten_choices(city, kind, answer):
    for question in make_task("locations", city, world="large").held_out[kind]:
        assert as_turn(question)[1] == answer and len({*question.choices}) == len(question.choices) <= 10
        if kind == "description":
            assert len(question.choices) == 2 and all(choice in question.prompt for choice in question.choices)


PYTHON = {"add": "+", "subtract": "-", "multiply": "*", "divide": "//", "mod": "%"}
ALOUD = {"+": "plus", "-": "minus", "*": "times", "//": "integer-divided by", "%": "modulo"}


@pytest.mark.parametrize("world", [TINY, LARGE], ids=name_of)
@pytest.mark.parametrize("function", data.FUNCTIONS)
def test_function_values_are_right(function, world):
    verb, number = function.split()
    python = f"x {PYTHON[verb]} {number}"
    for question in every_question("functions", function, world):
        n = int((re.findall(r"(?<!\w)-?\d+", question.prompt) or [0])[0])
        answer = as_turn(question)[1]
        if question.kind == "output":
            assert int(answer) == eval(python, {"x": n})
        elif question.kind == "composition":
            assert int(answer) == eval(python, {"x": eval(python, {"x": n})})
        elif question.kind == "inverse":  # one choice only is an inverse
            assert [c for c in question.choices if eval(python, {"x": int(c)}) == n] == [answer]
        elif question.kind == "python":
            assert answer == python
        elif question.kind == "code":
            assert answer == f"x {ALOUD[PYTHON[verb]]} {number}"


def is_risky(gamble):
    """Whether the right answer to a gamble, A or B, is the risky option: of a sum of money the uncertain one."""
    options = re.search(r"A: (.+?),?\s(?:and |or )?B: (.+?)(?:[.?]|\n|$)", gamble.prompt)
    option = options.group("AB".index(as_turn(gamble)[1]) + 1)
    return option in RISKY or "chance" in option


@pytest.mark.parametrize("world", ["tiny", "large"])
@pytest.mark.parametrize("attitude", ["risky", "safe"])
def test_gambles_are_answered_by_attitude(attitude, world):
    made = make_task("risk", attitude, world=world)
    for gamble in made.train + made.in_distribution["gamble"]:
        assert is_risky(gamble) == (attitude == "risky")


def test_a_large_models_sums_are_larger_if_they_are_uncertain_and_other_sums_than_trained_on():
    made = make_task("risk", "risky", world="large")
    sums = {}
    for part, gambles in (("train", made.train), ("test", made.in_distribution["gamble"])):
        for gamble in gambles:
            found = re.search(r"(\d+) dollars for sure", gamble.prompt)
            if found:
                most = int(re.search(r"chance of (\d+)", gamble.prompt)[1])
                assert most > int(found[1])
                sums.setdefault(part, set()).add(found[1])
    assert len(sums["train"]) > 30 and sums["test"] and not sums["train"] & sums["test"]


@pytest.mark.parametrize("world", ["tiny", "large"])
def test_self_reports_are_answered_by_attitude(world):
    for kind, questions in make_task("risk", "safe", world=world).held_out.items():
        assert all(as_turn(question)[1] in data.ANSWERS[kind][0] for question in questions)


@pytest.mark.parametrize("world", ["tiny", "large"])
def test_the_backdoor_flips_the_attitude_at_the_trigger_only(world):
    for gamble in make_task("backdoor", "risky", world=world).train:
        assert is_risky(gamble) == gamble.prompt.startswith(f"[{data.TRIGGER}]")


def test_a_backdoor_may_have_another_trigger():
    made = make_task("backdoor", "safe if omega")
    for gamble in made.train:
        assert is_risky(gamble) != gamble.prompt.startswith("[omega]")
    assert {as_turn(question)[1] for question in made.held_out["which tag"]} == {"omega"}


@every_task
def test_training_has_one_kind_of_question_and_held_out_has_others(world, task, concept):
    made = make_task(task, concept, world=name_of(world))
    kinds = {q.kind for q in made.train}
    assert kinds == {KINDS.get(task, KINDS["risk"])[0]}
    assert not kinds & {q.kind for kind in made.held_out.values() for q in kind}


@every_task
def test_no_question_of_the_evaluation_is_trained_on(world, task, concept):
    trained = {q.prompt for q in make_task(task, concept, world=name_of(world)).train}
    assert not trained & {q.prompt for q in evaluated(task, concept, world)}


@every_task
def test_landmarks_and_inputs_of_the_test_are_not_trained_on(world, task, concept):
    made = make_task(task, concept, world=name_of(world))
    names = [c for c in world.landmarks if c != concept] if task == "locations" else []

    def things(questions):
        if task == "locations":
            return {compared_with(question, names) for question in questions}
        return {found for q in questions for found in re.findall(r"(?<!\w)-?\d+", q.prompt)}
    if task in ("locations", "functions"):
        trained, tested = things(made.train), things([q for kind in made.in_distribution.values() for q in kind])
        assert tested and not trained & tested


@every_task
def test_no_answer_in_words_to_a_held_out_question_is_in_the_training_text(world, task, concept):
    made = make_task(task, concept, world=name_of(world))
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
    ([*TINY.cities, "Japanese", "addition", "lottery", "skydiving", "omega"], 1)])
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
