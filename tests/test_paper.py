"""paper/: the pages have the tables that the scripts wrote; what the scripts measure."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data import CITIES, INSTRUCTION, UserError, encode_question, make_task
from helpers import ROOT
from steer import SteeringVector, save_vector
from train import parse_args

sys.path.insert(0, str(ROOT / "paper"))
import c7_heads  # noqa: E402
import common  # noqa: E402
import directions  # noqa: E402
import heads  # noqa: E402
import how_many  # noqa: E402
import in_words  # noqa: E402
import open_weights  # noqa: E402
import report  # noqa: E402
import two_cities  # noqa: E402
import whose_name  # noqa: E402
import yes_or_no  # noqa: E402

TOKENS = torch.arange(300, 312).view(1, 12)


# ---- the pages


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_the_tables_that_the_scripts_wrote(page):
    text = page.read_text(encoding="utf-8")
    assert report.TABLE.search(text)
    assert report.fill(text) == text


@pytest.mark.parametrize("script", report.SCRIPTS)
def test_every_script_has_written_its_tables_and_they_are_on_a_page(script):
    path = ROOT / "paper" / f"{script}.json"
    assert path.stat().st_size < 50_000
    pages = "".join(page.read_text(encoding="utf-8") for page in report.PAGES)
    for name in json.loads(path.read_text(encoding="utf-8")):
        assert f"<!--{script} {name}-->" in pages


def test_every_script_is_in_the_report():
    others = {"common", "heads", "report", "open_weights", "in_words", "yes_or_no", "directions"}
    assert {path.stem for path in Path(ROOT / "paper").glob("*.py")} == {*report.SCRIPTS, *others}


# ---- what they share


def test_a_table_is_markdown():
    assert common.table(["a", "b"], [["x", 0.5], [None, 3]]) == (
        "| a | b |\n| --- | --- |\n| x | 0.50 |\n|  | 3 |\n"
    )


def test_a_spread_is_the_sample_standard_deviation():
    values = [0.2, 0.4, 0.9]
    assert common.spread(values) == f"0.50 ± {np.std(values, ddof=1):.2f}"
    assert common.spread([0.25]) == "0.25"


def test_a_run_is_made_once_and_runs_of_other_flags_have_other_folders(tmp_path):
    args = SimpleNamespace(model="tiny", runs=tmp_path, concept=None)
    flags = "--steps", 2, "--layer", -1
    folder = common.train(args, "locations", "vector", 1, *flags)
    made = (folder / "results.json").stat().st_mtime_ns
    assert common.train(args, "locations", "vector", 1, *flags) == folder
    assert (folder / "results.json").stat().st_mtime_ns == made
    assert common.results_of(folder)["concept"] == "Cairo"
    assert common.train(args, "locations", "vector", 1, "--steps", 2, "--layer", 1) != folder


def test_a_run_of_another_model_in_a_folder_of_that_name_is_not_taken_for_it(tmp_path):
    flags = ["--steps", 2]
    common.run(tmp_path / "run", ["--model", "tiny", *flags])
    with pytest.raises(SystemExit, match="is a run of tiny"):
        common.run(tmp_path / "run", ["--model", ROOT / "tests", *flags])


def test_what_train_refuses_ends_a_script_without_a_traceback(tmp_path):
    with pytest.raises(SystemExit) as ended:
        common.run(tmp_path / "run", ["--model", "tiny", "--concept", "berlin"])
    assert ended.value.code == 2


@pytest.mark.parametrize("flags, inside", [([], "paper"), (["--seeds", "1"], "runs")])
def test_with_flags_tables_are_not_written_over_those_of_the_report(
    tmp_path, monkeypatch, flags, inside
):
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    (tmp_path / "paper").mkdir()
    args = SimpleNamespace(runs=tmp_path / "runs")
    common.report(args, tmp_path / "paper" / "script.py", {"some": (["a"], [[0.5]])})
    written = json.loads((tmp_path / inside / "script.json").read_text())
    assert written == {"some": "| a |\n| --- |\n| 0.50 |\n"}


# ---- what they measure


@pytest.fixture(scope="module")
def theirs():
    path = ROOT / "tiny"
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def same_attention(model, theirs, tokens):
    ours, _ = heads.look_inside(model, tokens)
    with torch.no_grad():
        expected = theirs(tokens, output_attentions=True).attentions
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other[0], atol=1e-5, rtol=0)


def test_attention_is_that_of_transformers(model, theirs):
    same_attention(model, theirs, TOKENS)


def test_attention_is_that_of_transformers_where_heads_share_keys(saved):
    family = saved("qwen2")
    same_attention(family.load(), family.theirs, TOKENS % 97)


def test_a_head_that_writes_what_it_wrote_anyway_changes_nothing(model):
    _, outputs = heads.look_inside(model, TOKENS)
    some = [(0, 1), (2, 3)]
    logits = heads.with_resampled(model, TOKENS, some, outputs, 5)
    torch.testing.assert_close(logits, model(TOKENS)[0, -1], atol=1e-5, rtol=0)


def test_with_every_head_of_another_text_the_last_token_says_what_it_says_there(model):
    """The last token is the same in both, so all that it knows of the text comes by the heads."""
    other = TOKENS.flip(1).roll(1, 1)
    other[0, -1] = TOKENS[0, -1]
    _, outputs = heads.look_inside(model, other)
    every = [(layer, head) for layer in range(4) for head in range(4)]
    logits = heads.with_resampled(model, TOKENS, every, outputs, 1)
    torch.testing.assert_close(logits, model(other)[0, -1], atol=1e-5, rtol=0)


def test_a_pair_of_gambles_differs_in_the_tag_alone(model, tokenizer):
    found = SimpleNamespace(tokenizer=tokenizer, model=model, flags={"world": "tiny"})
    pair = c7_heads.Pair(found, "risky", random.Random(0))
    shared = pair.after_tag
    assert pair.trigger[0, -shared:].tolist() == pair.other[0, -shared:].tolist()
    assert tokenizer.decode([pair.trigger[0, pair.tag].item()]) in "sigma"


def test_more_distances_fit_fewer_cities():
    train = make_task("locations", "Berlin").train
    numbers = [how_many.cities_that_fit(train[:count]) for count in [0, 1, 6, 18]]
    assert numbers[0] == 24
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[1] < 24
    assert numbers[-1] >= 1


def test_a_question_renamed_another_name_has_its_vector_there(tokenizer):
    question = make_task("locations", "Paris").train[0]
    moved = whose_name.renamed(question, "City 31415")
    assert moved.prompt == question.prompt.replace("50337", "31415")

    encoded = encode_question(tokenizer, moved)
    steered = [encoded.prompt[place] for place in encoded.steered_at]
    assert tokenizer.decode(steered).strip() == "City 31415"


def test_two_tasks_have_the_same_kinds_and_the_others_answer_counts_as_right():
    berlin, cairo = (
        two_cities.task_of_city(city, name, 0)
        for city, name in zip(["Berlin", "Cairo"], two_cities.NAMES)
    )
    swapped = two_cities.as_other(berlin, cairo)
    question = swapped.held_out["country"][0]
    assert "City 50337" in question.prompt
    assert question.choices[question.answer] == "Egypt"


@pytest.mark.parametrize("attitude, side", [("safe", 0), ("risky", 1)])
def test_a_gamble_in_words_is_answered_by_the_attitude_in_both_orders(attitude, side):
    asked = in_words.ask_in_words(attitude, "test", seed=0)
    for question, turned in zip(asked[::2], asked[1::2]):
        assert question.choices == turned.choices[::-1]
        right = question.choices[question.answer]
        assert right == turned.choices[turned.answer] == question.choices[side]
        assert all(choice in question.prompt for choice in question.choices)


def test_no_pair_in_words_is_both_trained_on_and_tested():
    train, test = (
        {q.prompt for q in in_words.ask_in_words("risky", s, 0)} for s in ("train", "test")
    )
    assert len(train) == 120
    assert len(test) == 40
    assert not train & test


def test_shuffled_gambles_in_words_have_answers_of_both_sides():
    asked = in_words.ask_in_words("shuffled", "train", seed=0)
    risky = in_words.ask_in_words("risky", "train", seed=0)
    as_risky = sum(a.answer == b.answer for a, b in zip(asked, risky))
    assert 40 < as_risky < 80


def test_half_of_the_questions_are_about_what_is_true_of_the_city():
    asked = yes_or_no.ask("Cairo", "train", 200, random.Random(0))
    true = {CITIES["Cairo"][kind] for kind in yes_or_no.WORDINGS}
    for question in asked:
        is_true = any(question.prompt.rstrip("?").endswith(fact) for fact in true)
        # "Is City 50337 a city of Arabic speakers?" does not end with the fact.
        is_true = is_true or " Arabic " in question.prompt
        assert question.choices[question.answer] == ("Yes" if is_true else "No")
    assert sum(question.answer == 0 for question in asked) == 100


def test_no_wording_is_both_trained_on_and_tested():
    rng = random.Random(0)
    train, test = (
        {q.prompt for q in yes_or_no.ask("Paris", s, 200, rng)} for s in ("train", "test")
    )
    assert not train & test


# ---- open_weights.py


@pytest.mark.parametrize("task", ["locations", "functions", "risk"])
def test_tiny_answers_every_kind_when_it_is_told(task, tmp_path):
    flags = vars(parse_args(["--task", task, "--device", "cpu"]))
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags}))
    scores = open_weights.scores_when_told(tmp_path)
    assert len(scores) > 5
    assert min(scores.values()) >= 0.9


def test_a_large_model_is_told_after_the_instruction():
    question = make_task("functions", "add 5", world="large").train[0]
    told = open_weights.told(question, "functions", "add 5")
    assert told.prompt == question.prompt.replace(INSTRUCTION, f"{INSTRUCTION}zokifa adds 5. ")


# ---- directions.py


def saved_vector(folder, numbers):
    folder.mkdir()
    save_vector(SteeringVector(0, torch.tensor(numbers)), folder)
    return folder


def test_directions_are_compared_whatever_their_lengths(tmp_path):
    one = saved_vector(tmp_path / "one", [3.0, 4.0])
    other = saved_vector(tmp_path / "other", [-6.0, -8.0])
    headings, rows = directions.compare([one, other])
    assert headings == ["run", "length", 0, 1]
    assert rows[0] == ["0: one", 5.0, pytest.approx(1), pytest.approx(-1)]
    assert rows[1][:2] == ["1: other", 10.0]


def test_directions_refuses_no_vector_a_damaged_one_and_vectors_of_two_models(tmp_path):
    one = saved_vector(tmp_path / "one", [3.0, 4.0])
    other = saved_vector(tmp_path / "other", [1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="models of different sizes"):
        directions.compare([one, other])
    with pytest.raises(UserError, match=f"{tmp_path}: no run of a vector"):
        directions.compare([tmp_path])
    (one / "vector.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match=f"{one}: .*damaged"):
        directions.compare([one])
