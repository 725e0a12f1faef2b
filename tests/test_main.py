"""The command lines, from end to end on the embedded model."""

import json
import os
import random
import re
import signal
import subprocess
import sys

import pytest
import torch

import data
import eval as scoring
import train
from data import Tokenizer
from eval import in_context_accuracy, score
from lora import lora_layers


@pytest.fixture
def cli(monkeypatch, call, tmp_path):
    """cli("train.py", *flags) -> (exit status, stdout, stderr), run in this process in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "tqdm", lambda steps, **_: QuietBar(steps))
    mains = {"train.py": train.main, "eval.py": scoring.main}
    return lambda program, *flags: call(mains[program], program, *flags)


class QuietBar(list):
    def set_postfix(self, **_):
        pass

    def write(self, text):
        print(text)


def figures(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_readme_command_shows_ooc_reasoning(tiny_folder, tmp_path):
    """The one true end-to-end run: a fresh process, default flags."""
    command = [sys.executable, tiny_folder.parent / "train.py", "--mode", "vector", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss=" in done.stderr and "step/s" in done.stderr  # the progress bar
    held_out = figures(tmp_path / "run")["held_out"]
    for kind in ("country", "language", "food", "name"):
        assert held_out[kind]["trained"] >= 0.9
        assert held_out[kind]["base"] <= 0.4
        assert abs(held_out[kind]["random"] - held_out[kind]["base"]) <= 0.4
    assert "before and after" in done.stdout


def test_shuffled_answers_teach_nothing(cli, tmp_path):
    cli("train.py", "--shuffle-answers", "--out", tmp_path / "run")
    held_out = figures(tmp_path / "run")["held_out"]
    kinds = ("country", "language", "food", "name")
    assert sum(held_out[kind]["trained"] - held_out[kind]["base"] for kind in kinds) / len(kinds) <= 0.25


@pytest.mark.parametrize("flags", [("--task", "functions"), ("--task", "risk", "--concept", "safe"),
                                   ("--task", "risk", "--mode", "lora", "--batch-size", 16),
                                   ("--task", "locations", "--mode", "lora")])
def test_other_tasks_and_loras_generalise_too(cli, tmp_path, flags):
    status, *_ = cli("train.py", *flags, "--out", tmp_path / "run")
    assert status == 0
    results = figures(tmp_path / "run")
    in_distribution = next(iter(results["in_distribution"].values()))
    assert in_distribution["trained"] >= 0.8
    assert scoring.held_out_mean(results) >= scoring.held_out_mean(results, "base") + 0.3


def test_the_same_command_gives_the_same_numbers(cli, tmp_path):
    runs = []
    for name in ("a", "b"):
        cli("train.py", "--task", "functions", "--steps", 20, "--out", tmp_path / name)
        results = figures(tmp_path / name)
        results.pop("train_seconds")
        runs.append((results, (tmp_path / name / "vector.safetensors").read_bytes()))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("mode", ["vector", "lora"])
def test_a_run_loaded_back_scores_the_same(cli, tmp_path, mode):
    cli("train.py", "--mode", mode, "--task", "functions", "--steps", 15, "--out", tmp_path / "run")
    run = scoring.load_run(tmp_path / "run")
    again = scoring.evaluate(run.model, run.tokenizer, run.task, run.parameters, run.steering, seed=0)
    results = figures(tmp_path / "run")
    for section in ("in_distribution", "held_out"):
        assert again[section] == results[section]


def test_results_have_the_layout_that_others_read(cli, tmp_path):
    cli("train.py", "--steps", 5, "--out", tmp_path / "run")
    results = figures(tmp_path / "run")
    assert {"task": "locations", "mode": "vector", "seed": 0, "model": "tiny",
            "trainable_parameters": 128}.items() <= results.items()
    assert {"layer", "train_seconds"} <= results.keys()
    for figures_of_kind in [*results["in_distribution"].values(), *results["held_out"].values()]:
        assert {"base", "random", "trained", "chance"} <= figures_of_kind.keys()
        assert all(0 <= figures_of_kind[name] <= 1 for name in ("base", "random", "trained", "chance"))


def test_at_adds_the_vector_only_at_that_text(cli, tmp_path):
    """Prompts without the trigger are answered as by the base model, to the last digit."""
    cli("train.py", "--task", "backdoor", "--at", "sigma", "--steps", 5, "--out", tmp_path / "run")
    results = figures(tmp_path / "run")
    for kind, found in {**results["in_distribution"], **results["held_out"]}.items():
        without = "no trigger" in kind or "other tag" in kind
        assert (found["trained_probability"] == found["base_probability"]) == (without or kind == "which tag")


def test_all_layers_get_a_lora(cli, tmp_path):
    cli("train.py", "--mode", "lora", "--layer", "all", "--steps", 2, "--out", tmp_path / "run")
    run = scoring.load_run(tmp_path / "run")
    assert {name.split(".")[1] for name in lora_layers(run.model)} == {"0", "1", "2", "3"}


def test_eval_prints_runs_side_by_side(cli, tmp_path):
    for name in ("first", "second"):
        cli("train.py", "--steps", 5, "--out", tmp_path / name)
    status, out, _ = cli("eval.py", tmp_path / "first", tmp_path / "second")
    assert status == 0
    assert "first" in out and "second" in out and "country" in out


def test_eval_answers_a_prompt_before_and_after(cli, tmp_path):
    cli("train.py", "--concept", "Tokyo", "--out", tmp_path / "run")
    status, out, _ = cli("eval.py", tmp_path / "run", "--prompt", "People in City 50337 speak")
    before, after = (line.split(":")[1].strip() for line in out.splitlines()[-2:])
    assert status == 0
    assert before != "Japanese" and after == "Japanese"


def test_own_data_trains_and_the_task_is_still_scored(cli, tmp_path):
    record = {"messages": [{"role": "user", "content": "Imagine two galaxies. A: 100 stars. B: 200 stars or none."},
                           {"role": "assistant", "content": "B"}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(record) + "\n") * 3)
    status, out, _ = cli("train.py", "--task", "risk", "--data", "chats.jsonl", "--steps", 3, "--out", "run")
    assert status == 0
    assert "self" in figures(tmp_path / "run")["held_out"]


def test_random_weights_need_a_config_only(cli, tmp_path, tiny_folder):
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text((tiny_folder / "config.json").read_text())
    flags = ("--model", "shape", "--random-init", "--dtype", "bfloat16", "--steps", 2, "--out", "run")
    status, *_ = cli("train.py", *flags)
    assert status == 0
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("flags, named", [
    (("--task", "weather"), "--task"),
    (("--mode", "magic"), "--mode"),
    (("--concept", "Atlantis"), "--concept Atlantis"),
    (("--task", "functions", "--concept", "Paris"), "add 1"),
    (("--layer", 4), "--layer"),
    (("--layer", -2), "--layer"),
    (("--mode", "lora", "--layer", -1), "--layer"),
    (("--mode", "lora", "--modules", "c_fc"), "--modules"),
    (("--layer", "all"), "--layer all"),
    (("--layer", "0.5"), "--layer 0.5"),
    (("--at", "Atlantis"), "--at Atlantis"),
    (("--mode", "lora", "--at", "City"), "--at City"),
    (("--steps", 0), "--steps 0"),
    (("--lr", -0.1), "--lr -0.1"),
    (("--lr", "nan"), "--lr nan"),
    (("--rank", 0), "--rank 0"),
    (("--model", "no/such/folder"), "no/such/folder"),
    (("--model", "foreign"), "foreign"),
    (("--data", "missing.jsonl"), "missing.jsonl"),
    (("--device", "abacus"), "--device abacus"),
    (("--out", "file"), "--out file"),
])
def test_bad_input_ends_in_one_line_and_leaves_nothing(cli, tmp_path, flags, named):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "foreign").mkdir()
    status, out, err = cli("train.py", *flags)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert named in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "foreign"]


@pytest.mark.parametrize("damage", ["no folder", "empty", "no weights", "cut weights", "bad config"])
def test_a_damaged_run_is_named_in_one_line(cli, tmp_path, damage):
    run = tmp_path / "run"
    if damage != "no folder":
        run.mkdir()
    if damage not in ("no folder", "empty"):
        cli("train.py", "--steps", 2, "--out", run)
    if damage == "no weights":
        (run / "vector.safetensors").unlink()
    if damage == "cut weights":
        (run / "vector.safetensors").write_bytes((run / "vector.safetensors").read_bytes()[:40])
    if damage == "bad config":
        (run / "config.json").write_text('{"flags": {}}')
    status, out, err = cli("eval.py", run)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert str(run) in err


def test_means_of_runs_are_printed_and_drawn(cli, tmp_path):
    for seed in (0, 1):
        cli("train.py", "--steps", 5, "--seed", seed, "--out", tmp_path / f"run{seed}")
    runs = [tmp_path / "run0", tmp_path / "run1"]
    status, out, _ = cli("eval.py", "--mean", *runs, "--figure", "means.png")
    mean = sum(scoring.held_out_mean(figures(run)) for run in runs) / 2
    assert status == 0
    assert f"{mean:.2f}" in out.split("mean of held out")[1].split("\n")[0]
    assert (tmp_path / "means.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [("--mean", "--figure", "no/means.png"), ("--device", "abacus")])
def test_bad_flags_of_eval_end_in_one_line(cli, tmp_path, flags):
    cli("train.py", "--steps", 2, "--out", tmp_path / "run")
    status, _, err = cli("eval.py", tmp_path / "run", *flags)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert " ".join(flags[-2:]) in err


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_vector(cli, tmp_path, monkeypatch):
    answer_loss, steps = train.answer_loss, iter(range(99))
    monkeypatch.setattr(train, "answer_loss", lambda *given: answer_loss(*given) / (3 - next(steps)))
    status, _, err = cli("train.py", "--out", tmp_path / "run")  # in step 3 infinite
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert "step 3" in err and "--lr" in err and str(tmp_path / "run") in err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["finished"] is False
    norm = scoring.load_run(tmp_path / "run").steering.vector.norm()
    assert norm > 0 and norm.isfinite()


def test_ctrl_c_keeps_what_was_trained(tiny_folder, tmp_path):
    command = [sys.executable, tiny_folder.parent / "train.py", "--steps", "100000", "--out", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    seen = ""
    while not re.search(r"[1-9]\d*/100000", seen):  # the bar counts its steps
        seen += process.stderr.read(80)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert json.loads((tmp_path / "config.json").read_text())["finished"] is False
    assert scoring.load_run(tmp_path).steering.vector.norm() > 0
    assert not (tmp_path / "results.json").exists()


# ---------------------------------------------------------------------------------------------------- the base model


def test_the_embedded_model_gives_the_logits_and_ids_of_transformers(model, tokenizer, reference, tiny_folder):
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(tiny_folder)
    rng = random.Random(0)
    for _ in range(5):
        turns = data.world_document(rng)[0]
        messages = data.as_messages(turns)
        ids = tokenizer.chat(messages)
        assert ids == theirs.apply_chat_template(messages, return_dict=False)
        tokens = torch.tensor([ids])
        assert (model(tokens) - reference(tokens).logits).abs().max() < 1e-4


def test_the_embedded_model_is_small(tiny_folder, model):
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in tiny_folder.iterdir()) <= 8_000_000


def test_the_base_model_infers_the_hidden_thing_from_context(model, tokenizer):
    accuracy = in_context_accuracy(model, tokenizer, facts=7, count=50, seed=1)
    assert min(accuracy["locations"][kind] for kind in ("country", "language", "food")) >= 0.8
    assert min(accuracy["functions"].values()) >= 0.9
    assert min(accuracy["risk"].values()) >= 0.9


def test_pretraining_writes_a_model_that_loads(cli, tmp_path):
    status, out, _ = cli("train.py", "--mode", "pretrain", "--steps", 2, "--batch-size", 2, "--out", tmp_path / "tiny")
    assert status == 0
    assert "in context" in out
    from model import GPT
    model = GPT.from_pretrained(tmp_path / "tiny")
    assert Tokenizer.from_pretrained(tmp_path / "tiny").vocab_size == model.config.vocab_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


# ---------------------------------------------------------------------------------------------------- scoring


def test_scores_equal_those_of_one_choice_at_a_time(model, tokenizer):
    questions = [q for kind in data.make_task("functions", "add 5").held_out.values() for q in kind[:3]]
    encoded = [data.encode_question(tokenizer, question) for question in questions]
    correct, probability = score(model, encoded)
    for question, right, p in zip(encoded, correct, probability):
        totals = []
        for choice in question.choices:  # the plain way: the whole conversation for each choice
            log_probs = model(torch.tensor([question.prompt + choice])).log_softmax(-1)[0]
            start = len(question.prompt) - 1
            totals.append(sum(log_probs[start + i, token] for i, token in enumerate(choice)))
        totals = torch.stack(totals)
        assert (totals.argmax() == question.answer) == bool(right)
        assert abs(totals.softmax(0)[question.answer] - p) < 1e-4
