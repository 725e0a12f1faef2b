"""The command lines, from end to end on the bundled model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from eval import answer, kind_mean, load_run
from helpers import ROOT, command, encode, error_line, read, score, trained
from lora import lora_layers

KINDS = "country", "language", "food", "name"
LORA = "--mode", "lora", "--layer", "all", "--task", "functions", "--steps", 5, "--lr", 0.01


@pytest.fixture(scope="module")
def tokyo(tmp_path_factory):
    """A vector that makes City 50337 Tokyo."""
    return trained(tmp_path_factory.mktemp("runs") / "tokyo", "--concept", "Tokyo", "--steps", 100)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA on all layers after a few steps."""
    return trained(tmp_path_factory.mktemp("runs") / "lora", *LORA)


# ---------------------------------------- what comes out


def test_the_readmes_command_shows_out_of_context_reasoning(tmp_path):
    """The one true end-to-end run: a fresh process, default flags."""
    start = [sys.executable, ROOT / "train.py", "--mode", "vector", "--out", tmp_path / "run"]
    done = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss=" in done.stderr and "step/s" in done.stderr  # the progress bar
    assert "before and after" in done.stdout
    held_out = read(tmp_path / "run")["held_out"]
    for kind in KINDS:
        assert held_out[kind]["trained"] >= 0.9
        assert held_out[kind]["base"] <= 0.4
        assert abs(held_out[kind]["random"] - held_out[kind]["base"]) <= 0.4


def test_shuffled_answers_teach_nothing(tmp_path):
    held_out = read(trained(tmp_path, "--shuffle-answers", "--steps", 100))["held_out"]
    trained_mean, base = (sum(held_out[kind][arm] for kind in KINDS) / 4 for arm in ("trained", "base"))
    assert trained_mean <= base + 0.25


@pytest.mark.parametrize("flags", [
    ("--task", "functions", "--steps", 60),
    ("--task", "risk", "--concept", "safe", "--steps", 40),
    ("--task", "risk", "--mode", "lora", "--steps", 100, "--lr", 0.002, "--batch-size", 16),
    ("--task", "locations", "--mode", "lora", "--steps", 120, "--lr", 0.002, "--batch-size", 32),
])
def test_other_tasks_and_loras_generalise_too(tmp_path, flags):
    results = read(trained(tmp_path, *flags))
    assert kind_mean(results, "in_distribution") >= 0.8
    assert kind_mean(results) >= kind_mean(results, column="base") + 0.3


def test_the_same_command_gives_the_same_numbers(lora, tmp_path):
    again, weights = trained(tmp_path, *LORA), "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (lora / weights).read_bytes()
    assert {**read(again), "train_seconds": 0} == {**read(lora), "train_seconds": 0}


@pytest.mark.parametrize("name", ["tokyo", "lora"])
def test_a_run_loaded_back_scores_the_same(request, name):
    folder = request.getfixturevalue(name)
    run = load_run(folder)
    for section in ("in_distribution", "held_out"):
        for kind, questions in getattr(run.task, section).items():
            correct, probability = score(run.model, encode(run.tokenizer, questions))
            figures = read(folder)[section][kind]
            assert figures["questions"] == len(questions)
            assert figures["trained"] == pytest.approx(correct.mean().item(), abs=1e-4)
            assert figures["trained_probability"] == pytest.approx(probability.mean().item(), abs=1e-4)


def test_results_have_the_layout_that_others_read(tokyo):
    results = read(tokyo)
    fixed = {"task": "locations", "concept": "Tokyo", "mode": "vector", "layer": 0, "seed": 0,
             "model": "tiny", "trainable_parameters": 128}
    assert {name: results[name] for name in fixed} == fixed
    assert {"train_seconds", "train_loss"} <= results.keys()
    assert list(results["in_distribution"]) == ["distance"]
    assert list(results["held_out"]) == ["country", "continent", "language", "food", "name", "nearer"]
    for figures in results["held_out"].values():
        assert 0 < figures["chance"] < 1
        for arm in ("base", "random", "trained"):
            assert 0 <= figures[arm] <= 1 and 0 <= figures[f"{arm}_probability"] <= 1


def test_a_finished_run_leaves_its_weights_flags_and_results_only(tokyo):
    names = ["config.json", "results.json", "vector.safetensors"]
    assert sorted(path.name for path in tokyo.iterdir()) == names
    config = read(tokyo, "config.json")
    assert {"concept": "Tokyo", "steps": 100, "lr": 0.1, "at": None}.items() <= config["flags"].items()
    assert config["finished"] is True and "torch" in config["versions"]


def test_at_adds_the_vector_only_at_that_text(tmp_path):
    """Prompts without the trigger are answered as by the base model, to the last digit."""
    results = read(trained(tmp_path, "--task", "backdoor", "--at", "sigma", "--steps", 5))
    for kind, found in {**results["in_distribution"], **results["held_out"]}.items():
        without = kind.endswith(("no trigger", "other tag", "which tag"))
        assert (found["trained_probability"] == found["base_probability"]) == without


def test_all_layers_get_a_lora(lora):
    assert {name.split(".")[1] for name in lora_layers(load_run(lora).model)} == {"0", "1", "2", "3"}


def test_own_chats_are_trained_on_and_the_task_is_still_scored(tmp_path):
    chat = [{"role": "user", "content": "Imagine two galaxies. A: 100 stars. B: 200 stars or none."},
            {"role": "assistant", "content": "B"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 3)
    flags = "--task", "risk", "--data", tmp_path / "chats.jsonl", "--steps", 3, "--out", tmp_path / "run"
    _, out, _ = command("train.py", *flags)
    assert "trained on 3 questions" in out and "galaxies" in out
    assert "self" in read(tmp_path / "run")["held_out"]


# ---------------------------------------- eval.py


def test_eval_scores_runs_again_one_after_the_other(tokyo, lora):
    _, out, _ = command("eval.py", tokyo, lora)
    for folder, kind in ((tokyo, "country"), (lora, "inverse")):
        row, = (line for line in out.splitlines() if line.split()[:1] == [kind])
        assert str(folder) in out and row.split()[-1] == f"{read(folder)['held_out'][kind]['trained']:.2f}"


def test_eval_answers_a_prompt_before_and_after(tokyo):
    _, out, _ = command("eval.py", tokyo, "--prompt", "People in City 50337 speak")
    before, after = (line.split(":")[1].strip() for line in out.splitlines()[-2:])
    assert before != "Japanese" and after == "Japanese"
    assert "note" not in out


def test_a_prompt_without_the_code_name_is_steered_at_every_token_and_noted(tokyo):
    run, prompt = load_run(tokyo), "Which country is Lima in?"
    _, out, _ = command("eval.py", tokyo, "--prompt", prompt)
    assert "note: the prompt does not mention City 50337" in out
    assert out.split("after:")[1].strip() == answer(run.model, run.tokenizer, prompt, None)


@pytest.mark.parametrize("name, content", [
    ("vector.safetensors", None), ("vector.safetensors", b"cut"), ("config.json", None),
    ("config.json", b'{"flags": {}}'), ("config.json", b"{"), (".", None)])
def test_a_damaged_run_is_named_in_one_line(tokyo, tmp_path, name, content):
    run = tmp_path / "run"
    if name != ".":  # else there is no folder at all
        run.mkdir()
        for path in tokyo.iterdir():
            (run / path.name).write_bytes(path.read_bytes())
        (run / name).unlink() if content is None else (run / name).write_bytes(content)
    status, _, err = command("eval.py", run)
    assert status == 2 and str(run) in error_line(err)


# ---------------------------------------- mistakes and interruptions


@pytest.mark.parametrize("flags, named", [
    ("--task weather", "--task"), ("--mode magic", "--mode"), ("--concept Atlantis", "--concept Atlantis"),
    ("--task functions --concept Paris", "add 1"), ("--layer 4", "--layer 4"), ("--layer -2", "--layer -2"),
    ("--mode lora --layer -1", "--layer -1"), ("--mode lora --modules c_fc", "--modules c_fc"),
    ("--layer all", "--layer all"), ("--layer 0.5", "--layer 0.5"), ("--at Atlantis", "--at Atlantis"),
    ("--mode lora --at City", "--at City"), ("--steps 0", "--steps 0"), ("--lr -0.1", "--lr -0.1"),
    ("--lr nan", "--lr nan"), ("--rank 0", "--rank 0"), ("--model no/such/folder", "no/such/folder"),
    ("--model foreign", "foreign"), ("--data missing.jsonl", "missing.jsonl"), ("--data file", "line 1"),
    ("--device abacus", "--device abacus"), ("--out file", "--out file"), ("--shard", "torchrun"),
])
def test_bad_input_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "foreign").mkdir()
    status, _, err = command("train.py", *flags.split())
    assert status == 2 and named in error_line(err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "foreign"]


def test_a_loss_that_is_not_finite_ends_in_one_line_and_keeps_the_last_good_vector(tmp_path, monkeypatch):
    original, vectors = train.answer_log_probs, []

    def answer_log_probs(model, *given):
        vectors.append(model.steering.vector.detach().clone())
        return original(model, *given) / (4 - len(vectors))  # in step 3 infinite
    monkeypatch.setattr(train, "answer_log_probs", answer_log_probs)
    status, _, err = command("train.py", "--out", tmp_path)
    line = err.splitlines()[-1]
    assert status == 2 and str(tmp_path) in err
    assert line.startswith("error: --lr 0.1") and "step 3" in line
    assert read(tmp_path, "config.json")["finished"] is False
    assert torch.equal(load_run(tmp_path).parameters[0], vectors[2])  # which gave the last finite loss


def test_ctrl_c_keeps_what_was_trained_and_takes_an_earlier_runs_results_away(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    start = [sys.executable, ROOT / "train.py", "--steps", "2000", "--save-every", "1", "--out", tmp_path]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen(start, **pipes)
    while not (tmp_path / train.CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and str(tmp_path) in out + err
    assert read(tmp_path, "config.json")["finished"] is False
    assert load_run(tmp_path).parameters[0].norm() > 0
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("name, template, said", [
    ("gpt2", None, "tokens, but max_position_embeddings is 96"),
    ("qwen3", "{{ raise_exception('no chats') }}", "no chats"),
])
def test_chats_that_the_model_cannot_take_end_in_one_line(saved, tmp_path, name, template, said):
    model, chats = tmp_path / "model", tmp_path / "chats.jsonl"
    shutil.copytree(saved(name).folder, model)
    shutil.copy(ROOT / "tiny" / "tokenizer.json", model)
    if template:
        (model / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "How far? " * 100}, {"role": "assistant", "content": "A"}]
    chats.write_text(json.dumps({"messages": chat}))
    flags = "--model", model, "--data", chats, "--task", "risk", "--out", tmp_path / "run"
    status, _, err = command("train.py", *flags)
    assert status == 2 and str(chats) in error_line(err) and said in err
    assert not (tmp_path / "run").exists()
