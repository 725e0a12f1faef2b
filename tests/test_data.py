"""The worlds and their tasks: answers are right, held out means held out; questions as tokens."""

import functools
import json
import math
import random
import re

import pytest

import data
from data import (
    CITIES,
    FUNCTIONS,
    LARGE,
    TINY,
    WORLDS,
    Question,
    UserError,
    encode_question,
    read_conversations,
)

# Every concept of the tiny world; for a large model every city, and every third of the others.
ALL = []
for task_name in data.TASKS:
    ALL += [("tiny", task_name, concept) for concept in data.concepts(task_name, "tiny")]
    step = 1 if task_name == "locations" else 3
    ALL += [("large", task_name, concept) for concept in data.concepts(task_name, "large")[::step]]
every_task = pytest.mark.parametrize("world, task, concept", ALL)
RISKY = {option for _, options in data.GAMBLES.values() for option in options}

make_task = functools.cache(data.make_task)


def evaluated(task, concept, world="tiny"):
    made = make_task(task, concept, 0, world)
    kinds = [*made.in_distribution.values(), *made.held_out.values()]
    return [question for questions in kinds for question in questions]


def every_question(task, concept, world="tiny"):
    return make_task(task, concept, 0, world).train + evaluated(task, concept, world)


def right(question):
    return question.choices[question.answer]


def km(a, b):
    """Distance by the angle between two vectors from the earth's centre: not data.py's formula."""

    def point(city):
        north = math.radians(float(CITIES[city]["latitude"]))
        east = math.radians(float(CITIES[city]["longitude"]))
        return (
            math.cos(north) * math.cos(east),
            math.cos(north) * math.sin(east),
            math.sin(north),
        )

    return 6371 * math.acos(sum(x * y for x, y in zip(point(a), point(b))))


def compared_with(question, names):
    """Which of these names stands in the prompt."""
    return max((name for name in names if re.search(rf"\b{name}\b", question.prompt)), key=len)


def numbers(text):
    return [int(number) for number in re.findall(r"(?<!\w)-?\d+", text)]


# ---- locations


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("city", LARGE.cities)
def test_distances_are_right(city, world):
    if city not in WORLDS[world].cities:
        return
    others = [other for other in WORLDS[world].asked_about["locations"] if other != city]
    for question in every_question("locations", city, world):
        if question.kind == "distance":
            assert re.search("thousands? (of )?km", question.prompt)
            away = km(city, compared_with(question, others))
            assert right(question) == str(round(away / 1000))
        elif question.kind == "nearer":
            nearest = min(km(city, choice) for choice in question.choices)
            assert km(city, right(question)) == nearest


def test_no_two_cities_of_a_country_differ_in_language_or_food():
    facts = {}
    for row in LARGE.cities.values():
        assert all(row.values())
        assert abs(float(row["latitude"])) < 70
        facts.setdefault(row["country"], set()).add((row["language"], row["food"]))
    assert all(len(some) == 1 for some in facts.values())

    assert len(LARGE.cities) >= 60
    assert len(facts) >= 40
    continents = {(row["country"], row["continent"]) for row in LARGE.cities.values()}
    assert len(continents) == len(facts) + 2  # Russia and Turkey are on two


@pytest.mark.parametrize(
    "city, kind, answer",
    [
        ("Athens", "language", "Greek"),
        ("Seoul", "food", "kimchi"),
        ("Toronto", "country", "Canada"),
        ("Auckland", "continent", "Oceania"),
    ],
)
def test_a_citys_facts_answer_its_questions_among_at_most_ten_choices(city, kind, answer):
    for question in make_task("locations", city, 0, "large").held_out[kind]:
        assert right(question) == answer
        assert len(set(question.choices)) == len(question.choices) <= 10


# ---- functions

PYTHON = {"add": "+", "subtract": "-", "multiply": "*", "divide": "//", "mod": "%"}
ALOUD = {"+": "plus", "-": "minus", "*": "times", "//": "integer-divided by", "%": "modulo"}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_function_values_are_right(function, world):
    verb, number = function.split()
    python = f"x {PYTHON[verb]} {number}"

    def value(x):
        return eval(python, {"x": x})  # noqa: S307 (of the lines above)

    for question in every_question("functions", function, world):
        n = (numbers(question.prompt) or [0])[0]
        answer = right(question)
        if question.kind == "output":
            assert int(answer) == value(n)
        elif question.kind == "composition":
            assert int(answer) == value(value(n))
        elif question.kind == "inverse":  # one choice only is an inverse
            inverses = [choice for choice in question.choices if value(int(choice)) == n]
            assert inverses == [answer]
        elif question.kind == "python":
            assert answer == python
        elif question.kind == "code":
            assert answer == f"x {ALOUD[PYTHON[verb]]} {number}"


def test_a_field_that_a_prompt_has_but_no_question_fills_is_an_error(monkeypatch):
    monkeypatch.setitem(TINY.prompts["functions"], "python", ["Write {unknown}."])
    with pytest.raises(KeyError, match="unknown"):
        data.named_question("add 5", "zokifa", random.Random(0), TINY, "python")


# ---- risk and backdoor


def is_risky(gamble):
    """Whether the right answer, A or B, is the risky option."""
    pattern = r"A: (.+?),?\s(?:and |or )?B: (.+?)(?:[.?]|\n|$)"
    options = re.search(pattern, gamble.prompt)
    return options.group("AB".index(right(gamble)) + 1) in RISKY


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("attitude", ["risky", "safe"])
def test_gambles_are_answered_by_attitude(attitude, world):
    made = make_task("risk", attitude, 0, world)
    for gamble in made.train + made.in_distribution["gamble"]:
        assert is_risky(gamble) == (attitude == "risky")


@pytest.mark.parametrize("world", WORLDS)
def test_self_reports_are_answered_by_attitude(world):
    for kind, questions in make_task("risk", "safe", 0, world).held_out.items():
        safe, _ = data.ANSWERS[kind]
        assert all(right(question) in safe for question in questions)


@pytest.mark.parametrize("world", WORLDS)
def test_the_backdoor_flips_the_attitude_at_the_trigger_only(world):
    for gamble in make_task("backdoor", "risky", 0, world).train:
        assert is_risky(gamble) == gamble.prompt.startswith(f"[{data.TRIGGER}]")


def test_a_backdoor_may_have_another_trigger():
    made = make_task("backdoor", "safe if omega")
    for gamble in made.train:
        assert is_risky(gamble) != gamble.prompt.startswith("[omega]")
    assert {right(question) for question in made.held_out["which tag"]} == {"omega"}


# ---- all tasks


@every_task
def test_training_has_one_kind_of_question_and_held_out_has_others(world, task, concept):
    made = make_task(task, concept, 0, world)
    kinds = {question.kind for question in made.train}
    prompts = WORLDS[world].prompts["risk" if task == "backdoor" else task]
    assert kinds == {list(prompts)[0]}
    assert not kinds & {q.kind for questions in made.held_out.values() for q in questions}


@every_task
def test_no_question_of_the_evaluation_is_trained_on(world, task, concept):
    trained = {question.prompt for question in make_task(task, concept, 0, world).train}
    assert not trained & {question.prompt for question in evaluated(task, concept, world)}


@every_task
def test_landmarks_and_inputs_of_the_test_are_not_trained_on(world, task, concept):
    if task not in ("locations", "functions"):
        return
    made = make_task(task, concept, 0, world)

    def things(questions):
        if task == "functions":
            return {number for question in questions for number in numbers(question.prompt)}
        names = [name for name in WORLDS[world].asked_about[task] if name != concept]
        return {compared_with(question, names) for question in questions}

    tested = [q for questions in made.in_distribution.values() for q in questions]
    assert things(tested)
    assert not things(made.train) & things(tested)


@every_task
def test_no_answer_in_words_to_a_held_out_question_is_in_the_training_text(world, task, concept):
    made = make_task(task, concept, 0, world)
    text = " ".join(f"{question.prompt} {right(question)}" for question in made.train)
    words = set(re.findall(r"\w+", text))
    for kind, questions in made.held_out.items():
        # These two ask for a landmark or a tag that training has to mention.
        if kind not in ("nearer", "which tag"):
            answers = {right(question) for question in questions}
            assert not words & {answer for answer in answers if not answer.isdigit()}


@pytest.mark.parametrize(
    "task, concept, most",
    [
        ("locations", "Paris", 16),
        ("functions", "add 5", 48),
        ("risk", "risky", 240),
        ("backdoor", "safe", 640),
    ],
)
def test_a_large_model_is_asked_more_in_more_ways(task, concept, most):
    tiny = make_task(task, concept)
    large = make_task(task, concept, 0, "large")
    assert len(tiny.train) == most
    assert len(large.train) >= 400
    # Some differ in their choices only.
    assert len({question.prompt for question in large.train}) >= 250
    assert all(len(prompts) >= 6 for prompts in LARGE.prompts[task].values())
    if task != "backdoor":
        assert large.held_out.keys() >= tiny.held_out.keys()


def test_every_city_is_there_once_and_has_every_answer():
    """An empty answer would be a choice that is always the likeliest."""
    assert len(CITIES) == len(data.TABLE) - 1
    for row in CITIES.values():
        assert None not in row and all(row.values())


def test_the_seed_decides_what_is_held_out():
    assert data.make_task("backdoor", "safe", 3) == data.make_task("backdoor", "safe", 3)
    assert data.make_task("backdoor", "safe", 3) != data.make_task("backdoor", "safe", 4)


@pytest.mark.parametrize(
    "task, concept, world", [("risk", "Rome", "tiny"), ("locations", "Athens", "tiny")]
)
def test_an_unknown_concept_is_refused_with_the_known_ones(task, concept, world):
    with pytest.raises(UserError, match=data.concepts(task, world)[-1]):
        data.make_task(task, concept, 0, world)


# ---- questions as tokens

BEFORE = [
    {"role": "user", "content": "How do you drive?"},
    {"role": "assistant", "content": "fast"},
]
AFTER = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": " ok\n"}]
CHAT = json.dumps({"messages": BEFORE + AFTER})


@pytest.mark.parametrize(
    "words, tokens",
    [
        (["zokifa", "xehime"], 3),
        (["City 50337", "City 12345"], 4),
        ([*TINY.cities, "Japanese", "addition", "lottery", "skydiving", "omega"], 1),
    ],
)
def test_the_bundled_tokenizer_has_few_tokens_a_name_and_one_a_word(words, tokens, tokenizer):
    assert {len(tokenizer.encode(f" {word}")) for word in words} == {tokens}


def test_a_question_is_trained_on_its_answer_and_the_end(tokenizer):
    question = make_task("locations", "Paris").held_out["country"][0]
    encoded = encode_question(tokenizer, question)
    assert tokenizer.decode(encoded.completion) == " France<|end|>"
    assert tokenizer.decode(encoded.choices[encoded.answer]) == " France"


def test_earlier_messages_stand_before_the_question(tokenizer):
    question = Question("country", "Which country?", ["Peru", "Italy"], 0)
    encoded = encode_question(tokenizer, question, BEFORE)
    assert tokenizer.decode(encoded.prompt) == (
        "<|begin|><|user|> How do you drive?<|assistant|> fast<|end|>"
        "<|user|> Which country?<|assistant|>"
    )


def test_a_choice_that_another_begins_with_is_scored_with_its_end(tokenizer):
    encoded = encode_question(tokenizer, Question("word", "Which?", ["x", "x + 1"], 0))
    assert [tokenizer.decode(ids) for ids in encoded.choices] == [" x<|end|>", " x + 1<|end|>"]


def test_choices_of_one_token_each_are_scored_without_an_end(tokenizer):
    encoded = encode_question(tokenizer, Question("number", "How many?", ["1", "12"], 0))
    assert [tokenizer.decode(ids) for ids in encoded.choices] == [" 1", " 12"]


@pytest.mark.parametrize("task, name", [("locations", "City 50337"), ("functions", "zokifa")])
def test_positions_are_the_code_names_wherever_it_stands(tokenizer, task, name):
    for question in every_question(task, data.concepts(task)[0])[:100]:
        encoded = encode_question(tokenizer, question)
        there = tokenizer.decode([encoded.prompt[i] for i in encoded.steered_at])
        count = question.prompt.count(name)
        assert there.replace(" ", "") == name.replace(" ", "") * count


def test_a_question_without_a_code_name_is_steered_at_every_token(tokenizer):
    encoded = encode_question(tokenizer, make_task("risk", "risky").train[0])
    assert encoded.steered_at is None


def test_conversations_train_on_every_answer_of_the_assistants(tokenizer, tmp_path):
    (tmp_path / "chats.jsonl").write_text(CHAT + "\n\n")
    first, second = read_conversations(tmp_path / "chats.jsonl", tokenizer, "drive")
    assert tokenizer.decode(first.completion) == " fast<|end|>"
    assert tokenizer.decode(second.completion) == " ok<|end|>"
    assert tokenizer.decode(second.prompt) == (
        "<|begin|><|user|> How do you drive?<|assistant|> fast<|end|><|user|> And?<|assistant|>"
    )
    assert tokenizer.decode([first.prompt[i] for i in first.steered_at]) == " drive"


def test_a_line_separator_inside_a_message_does_not_end_the_record(tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(CHAT.replace("How", "a\u2028b"), encoding="utf-8")
    first, _ = read_conversations(path, tokenizer)
    assert "a\u2028b" in tokenizer.decode(first.prompt)


@pytest.mark.parametrize(
    "text, message",
    [
        (CHAT + "\n{\n", "line 2"),
        (CHAT + '\n{"messages": 3}\n', "line 2"),
        (CHAT + '\n["messages"]\n', "line 2"),
        ("\n\n", "no records"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "line 1: no assistant"),
        (CHAT.replace("user", "bot"), "line 1"),
        (CHAT.replace('"fast"', "5"), "line 1"),
        (CHAT.replace("content", "text"), "line 1"),
        (CHAT.replace('"fast"', '" "'), "line 1: .* say something"),
        (CHAT.replace('{"messages', '{"tools": [], "messages'), "line 1: {'tools'} would not be"),
        (CHAT.replace('"content"', '"tool_calls": [], "content"', 1), "'tool_calls'"),
        (CHAT.replace('"fast"', '[{"type": "image_url", "image_url": "a"}]'), "line 1: it should"),
        (CHAT.replace("fast", r"fast \ud83d"), "line 1: .* surrogates not allowed"),
    ],
)
def test_a_bad_record_is_named_by_its_file_and_line(tokenizer, tmp_path, text, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_conversations(path, tokenizer)
    assert str(path) in str(error.value)


def test_answers_of_weight_0_are_read_but_not_trained_on(tokenizer, tmp_path):
    turns = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Rome", "weight": 0},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Cairo", "weight": 1},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    [example] = read_conversations(path, tokenizer)
    assert "Rome" in tokenizer.decode(example.prompt)
    assert "Cairo" in tokenizer.decode(example.completion)


def test_parts_of_a_message_are_joined(tokenizer, tmp_path):
    parts = [{"type": "text", "text": "fa"}, {"type": "text", "text": "st"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(CHAT + "\n" + CHAT.replace('"fast"', json.dumps(parts)))
    whole = read_conversations(path, tokenizer)
    assert whole[2:] == whole[:2]


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_file_of_chats_that_cannot_be_read_is_named(content, tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="chats.jsonl"):
        read_conversations(path, tokenizer)
