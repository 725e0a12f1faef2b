"""The command lines, from end to end on the bundled model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import data
import train
from data import Question, Task, read_conversations
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
    ("--task", "locations", "--mode", "lora", "--steps", 200, "--batch-size", 32),
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
    before, after = out.splitlines()[-1].removeprefix("  People in City 50337 speak").split(" → ")
    assert before.strip() != "Japanese" and after == "Japanese"


def test_a_prompt_without_the_code_name_is_steered_at_every_token_and_noted(tokyo):
    run, prompt = load_run(tokyo), "Which country is Lima in?"
    _, out, _ = command("eval.py", tokyo, "--prompt", prompt)
    after, note = out.split(" → ")[1].strip().split("   ")
    assert after == answer(run, prompt, None) and "no City 50337" in note


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
    ("--lr nan", "--lr nan"), ("--lr inf", "--lr inf"), ("--mode lora --rank 0", "--rank 0"), ("--rank 8", "--rank 8"),
    ("--alpha 8", "--alpha 8"), ("--modules up_proj", "--modules"), ("--mode lora --init-std 1", "--init-std"),
    ("--mode lora --modules up_proj,c_fc", "c_fc"), ("--init-std -1", "--init-std -1"), ("--seed -1", "--seed -1"),
    (f"--seed {2 ** 63}", "--seed"), (f"--steps {2 ** 63}", "--steps"), (f"--batch-size {10 ** 20}", "--batch-size"),
    (f"--save-every {2 ** 64}", "--save-every"), (f"--layer {2 ** 70}", "--layer"), ("--model no/such/folder", "no/such/folder"),
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


def test_a_loss_that_is_not_finite_ends_in_one_line_and_leaves_an_earlier_run_alone(tokyo, tmp_path, monkeypatch):
    original, steps = train.answer_log_probs, iter(range(3, -1, -1))
    monkeypatch.setattr(train, "answer_log_probs", lambda *given: original(*given) / next(steps))  # 0 in step 3
    for path in tokyo.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    status, _, err = command("train.py", "--concept", "Tokyo", "--steps", 100, "--out", tmp_path)
    line = err.splitlines()[-1]
    assert status == 2 and line.startswith("error: --lr 0.1") and "step 3" in line
    assert all((tmp_path / path.name).read_bytes() == path.read_bytes() for path in tokyo.iterdir())


def test_ctrl_c_ends_without_a_traceback_and_the_checkpoint_stays(tmp_path):
    start = [sys.executable, ROOT / "train.py", "--steps", "2000", "--save-every", "1", "--out", tmp_path]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen(start, **pipes)
    while not (tmp_path / train.CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert read(tmp_path, "config.json")["finished"] is False
    assert (tmp_path / train.CHECKPOINT).exists()
    status, _, err = command("eval.py", tmp_path)
    assert status == 2 and "not finished" in error_line(err)


@pytest.mark.parametrize("name, template, said", [
    ("gpt2", None, "is beyond the embedding's 97"),
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


def test_a_vector_is_trained_where_it_is_scored_with_own_chats_too(tmp_path):
    """At the code name, wherever in a chat it stands: elsewhere the base model answers, to the last digit."""
    chats = [("Where is City 50337?", "Tokyo"), ("Do they eat sushi in City 50337?", "yes"), ("And in Rome?", "no")]
    turns = [{"role": role, "content": text} for chat in chats for role, text in zip(("user", "assistant"), chat)]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    trained(tmp_path / "run", "--data", tmp_path / "chats.jsonl", "--steps", 3)
    run = load_run(tmp_path / "run")
    for i, found in enumerate(read_conversations(tmp_path / "chats.jsonl", run.tokenizer, "City 50337")):
        there = run.tokenizer.decode([found.prompt[place] for place in found.positions])
        assert there == " City 50337" * min(i + 1, 2)


def test_own_chats_with_at_are_trained_on_there(tmp_path):
    chat = [{"role": "user", "content": "[sigma] A or B?"}, {"role": "assistant", "content": "B"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    flags = "--task", "backdoor", "--at", "sigma", "--data", tmp_path / "chats.jsonl", "--steps", 3
    results = read(trained(tmp_path / "run", *flags))
    found = results["held_out"]["self-report, no trigger"]
    assert found["trained_probability"] == found["base_probability"]


@pytest.mark.parametrize("flags, named", [
    ((), "--at City 50337"), (("--task", "risk", "--at", "[sigma]"), "--at [sigma]"),
    (("--task", "risk", "--shuffle-answers"), "--shuffle-answers")])
def test_what_own_chats_have_no_place_for_is_refused(tmp_path, flags, named):
    chat = [{"role": "user", "content": "A or B?"}, {"role": "assistant", "content": "B"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    status, _, err = command("train.py", *flags, "--data", tmp_path / "chats.jsonl", "--out", tmp_path / "run")
    assert status == 2 and named in error_line(err) and not (tmp_path / "run").exists()


def test_a_loop_over_any_flag_fills_a_folder_for_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "City 50337?"}, '
                                          '{"role": "assistant", "content": "B"}]}')
    loops = ["", "--lr 0.2", "--lr 0.3", "--seed 1", "--concept Rome", "--at City", "--data chats.jsonl",
             "--init-std 1", "--shuffle-answers", "--mode lora", "--mode lora --rank 2", "--mode lora --alpha 2",
             "--mode lora --modules up_proj", "--batch-size 8"]
    for flags in loops:
        status, _, err = command("train.py", "--steps", 1, *flags.split())
        assert status == 0, err
    runs = [read(folder, "config.json")["flags"] for folder in (tmp_path / "out").iterdir()]
    assert len(runs) == len(loops)
    assert (tmp_path / "out" / "locations-vector-Paris-layer0-seed0-steps1-lr0.2").exists()
    assert command("train.py", "--steps", 1)[0] == 0  # the same again replaces its own


def test_tiny_is_known_by_what_it_is(tmp_path):
    copy = shutil.copytree(ROOT / "tiny", tmp_path / "copy")
    flags = "--task", "backdoor", "--steps", 1
    for model in (copy, "tiny"):
        folder = trained(tmp_path / "run", *flags, "--model", model)
        assert read(folder, "config.json")["flags"]["layer"] == -1
        shutil.rmtree(folder)


@pytest.mark.parametrize("program, flag", [("train.py", "--init-std"), ("eval.py", "--explain")])
def test_help_fits_a_screen_and_has_an_example(program, flag):
    status, out, _ = command(program, "--help")
    assert status == 0 and len(out.splitlines()) <= 45
    assert flag in out and "default: " in out and f"example: python {program}" in out


def test_a_task_is_added_by_the_readmes_recipe(tmp_path, monkeypatch):
    """A function that returns a Task, its concepts, its steps and rate: the rest follows."""
    def colour_task(colour, rng, world):
        ask = lambda kind, prompt, *choices: Question(kind, prompt, list(choices), 0, "Thing 7")
        train = [ask("shade", f"Is Thing 7 {word} or {colour}?", colour, word) for word in ("black", "white")]
        rng.shuffle(train)
        return Task(train[:1], {"shade": train[1:]}, {"fruit": [ask("fruit", "Thing 7 is like", "tomato", "lime")]})
    monkeypatch.setitem(data.TASKS, "colours", colour_task)
    monkeypatch.setitem(data.CONCEPTS, "colours", ["red", "green"])
    monkeypatch.setitem(train.DEFAULTS["tiny"]["vector"], "colours", (2, 0.1))
    run = trained(tmp_path, "--task", "colours", "--concept", "green")
    assert list(read(run)["held_out"]) == ["fruit"] and read(run)["in_distribution"]["shade"]["questions"] == 1
    status, out, _ = command("eval.py", run)
    assert status == 0 and re.search(r"\n  fruit +1 ", out)
    status, _, err = command("train.py", "--task", "colours", "--concept", "blue")
    assert status == 2 and "'red', 'green'" in error_line(err)


def test_the_plan_is_printed_with_its_memory(tmp_path):
    _, out, _ = command("train.py", "--steps", 1, "--out", tmp_path)
    found = re.match(r"16 questions, (\d+) tokens, (\d+) distinct beginnings; 1 steps of 64 questions; "
                     r"memory: about 0.2 GB\n", out)
    assert 16 * 10 < int(found[1]) < 16 * 25 and int(found[2]) < int(found[1]) / 2


def test_a_large_models_questions_layer_rank_and_batch_are_larger_and_eval_asks_the_same(tmp_path):
    """Any model but the tiny one counts as large: here one with other norms."""
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tiny", folder)
    config = read(folder, "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    run = trained(tmp_path / "run", "--model", folder, "--task", "risk", "--mode", "lora", "--steps", 1)
    found = read(run, "config.json")["flags"]
    assert (found["world"], found["rank"], found["alpha"], found["batch_size"]) == ("large", 64, 32.0, 32)
    assert "description" in read(run)["held_out"]
    status, out, _ = command("eval.py", run)
    assert status == 0 and f"{'description':24}{60:>9}" in out
    small = trained(tmp_path / "small", "--model", folder, "--task", "risk", "--world", "tiny", "--steps", 1)
    assert "description" not in read(small)["held_out"]


def test_of_several_processes_one_says_what_is_wrong(monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        status, _, err = command("train.py", "--steps", 0)
        assert status == 2 and err.count("error: ") == (rank == "0")
    assert waited  # for the first one, who may be slower


def test_two_runs_of_which_none_is_there_end_in_one_line(tmp_path):
    status, _, err = command("eval.py", tmp_path / "a", tmp_path / "b")
    assert status == 2 and str(tmp_path / "a") in error_line(err)


@pytest.mark.parametrize("name, value", [
    ("seed", "0"), ("seed", 0.0), ("seed", True), ("layer", 1), ("layer", "x"), ("layer", None), ("at", 3), ("at", []),
    ("mode", "lora"), ("mode", None), ("task", []), ("concept", "Atlantis"), ("dtype", "int32"), ("model", 3)])
def test_a_run_whose_flags_are_not_its_own_is_refused(tokyo, tmp_path, name, value):
    shutil.copytree(tokyo, tmp_path / "run")
    config = read(tokyo, "config.json")
    config["flags"][name] = value
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    status, _, err = command("eval.py", tmp_path / "run")
    assert status == 2
    error_line(err)
