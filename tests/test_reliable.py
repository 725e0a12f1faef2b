"""A run that is killed, starved or fed nonsense: what it leaves, and that it goes on from there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import train
from helpers import ROOT, command, fail_after, mistake, read, trained, write_chats

FLAGS = "--steps", 30, "--batch-size", 5  # of 16 questions
LORA = *FLAGS, "--mode", "lora"


def outcome(folder):
    """Everything that a run must give again: its weights to the last bit, and its figures."""
    weights = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    return weights, read(folder) | {"train_seconds": 0}


def steps_saved(folder):
    return len(load_file(folder / train.CHECKPOINT)["losses"])


def cut(folder, *flags):
    """A run with a checkpoint every 5 steps that breaks off in its 18th: a bug, no mistake."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        fail_after(patch, 17, RuntimeError("power cut"))
        command("train.py", *flags, "--save-every", 5, "--out", folder)


def start(folder, *flags):
    """A process that trains; it has written a checkpoint."""
    words = map(str, (*flags, "--save-every", 1, "--device", "cpu", "--out", folder))
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A job in the background would have been told to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (folder / train.CHECKPOINT).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end."""
    return trained(tmp_path_factory.mktemp("whole"), *FLAGS)


@pytest.fixture
def again(whole, tmp_path):
    """A copy of its folder, in which it may be run again."""
    return shutil.copytree(whole, tmp_path / "again")


# ---- going on


def test_a_checkpoint_has_the_steps_up_to_it(tmp_path):
    cut(tmp_path, *FLAGS)
    assert steps_saved(tmp_path) == 15


def test_a_resumed_vector_ends_in_the_same_bits(whole, tmp_path):
    cut(tmp_path, *FLAGS)
    assert outcome(trained(tmp_path, *FLAGS, "--resume")) == outcome(whole)


def test_a_resumed_lora_ends_in_the_same_bits(tmp_path):
    cut(tmp_path / "cut", *LORA)
    resumed = trained(tmp_path / "cut", *LORA, "--resume")
    assert outcome(resumed) == outcome(trained(tmp_path / "whole", *LORA))


def test_a_run_that_broke_off_while_it_was_scored_trains_no_more(whole, tmp_path, monkeypatch):
    def fail(run):
        raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(train, "evaluate", fail)
        command("train.py", *FLAGS, "--save-every", 30, "--out", tmp_path)
    fail_after(monkeypatch, 0, AssertionError("this trains"))
    assert outcome(trained(tmp_path, *FLAGS, "--resume")) == outcome(whole)


def test_a_killed_process_resumes_to_the_same_bits(whole, tmp_path):
    process = start(tmp_path, *FLAGS)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 1 <= steps_saved(tmp_path) < 30  # the file is whole, and it is not the end
    assert outcome(trained(tmp_path, *FLAGS, "--resume")) == outcome(whole)


def test_ctrl_c_ends_a_run_and_the_checkpoint_stays(tmp_path):
    process = start(tmp_path, "--steps", 2000)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err
    assert steps_saved(tmp_path) >= 1
    assert "not finished" in mistake("eval.py", tmp_path)


def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    original = Path.write_bytes

    def half_a_file(path, content):
        original(path, content[:50])
        raise KeyboardInterrupt

    def break_off_later(path, content):
        original(path, content)
        if path.name == "checkpoint.tmp":
            monkeypatch.setattr(Path, "write_bytes", half_a_file)

    monkeypatch.setattr(Path, "write_bytes", break_off_later)
    with pytest.raises(KeyboardInterrupt):
        command("train.py", *FLAGS, "--save-every", 5, "--out", tmp_path)
    assert steps_saved(tmp_path) == 5


def test_a_finished_run_leaves_no_checkpoint(tmp_path):
    trained(tmp_path, *FLAGS, "--save-every", 5)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "results.json", "vector.safetensors"]


def test_resume_without_a_checkpoint_starts_from_the_beginning(whole, tmp_path):
    command("train.py", *FLAGS, "--resume", "--out", tmp_path)
    assert outcome(tmp_path) == outcome(whole)


# ---- a folder belongs to one run


@pytest.mark.parametrize(
    "flag, value, named",
    [("--lr", 0.5, "lr"), ("--steps", 40, "steps"), ("--seed", 1, "seed, training texts")],
)
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_folder_with_a_run_of_other_flags_is_not_written_to(whole, flag, value, named, resume):
    before = outcome(whole)
    line = mistake("train.py", *FLAGS, flag, value, *resume, "--out", whole)
    assert f"--out {whole}: its run has other {named};" in line
    assert outcome(whole) == before


def test_nor_is_one_with_a_checkpoint_of_other_flags(tmp_path):
    cut(tmp_path, *FLAGS)
    before = (tmp_path / train.CHECKPOINT).read_bytes()
    line = mistake("train.py", *FLAGS, "--batch-size", 8, "--out", tmp_path)
    assert "other batch_size;" in line
    assert (tmp_path / train.CHECKPOINT).read_bytes() == before


def test_nor_is_one_with_a_checkpoint_of_other_training_texts(tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", ["Hi", "Boldly"])
    flags = "--task", "risk", "--data", chats, "--steps", 30
    cut(tmp_path / "run", *flags)
    write_chats(chats, ["Hi", "no"])
    line = mistake("train.py", *flags, "--resume", "--out", tmp_path / "run")
    assert "its run has other training texts;" in line


def test_nor_is_one_with_results_of_other_training_texts(tmp_path, again, monkeypatch):
    """The flags are the same, but somebody changed the questions."""
    prompts = data.TINY.prompts["locations"]
    monkeypatch.setitem(prompts, "distance", ["How many thousand km is it from {x} to {o}?"])
    line = mistake("train.py", *FLAGS, "--out", again)
    assert "its run has other training texts;" in line


def test_nor_is_one_whose_run_broke_off_while_it_was_scored(again):
    """Its weights would stay beside the new run's config.json, if that broke off, too."""
    (again / "results.json").unlink()
    assert "its run has other lr;" in mistake("train.py", *FLAGS, "--lr", 0.5, "--out", again)


def test_flags_that_change_no_result_may_be_others(again, whole):
    trained(again, *FLAGS, "--save-every", 7)
    assert outcome(again) == outcome(whole)


def test_nor_is_a_models_folder(tmp_path):
    """Its config.json would be overwritten."""
    content = (ROOT / "tiny" / "config.json").read_text()
    (tmp_path / "config.json").write_text(content)
    line = mistake("train.py", *FLAGS, "--out", tmp_path)
    assert f"{tmp_path}: its config.json is not a run's" in line
    assert (tmp_path / "config.json").read_text() == content


def test_nor_is_one_with_somebody_elses_adapter(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"trained elsewhere")
    assert f"--out {tmp_path}: its run has other" in mistake("train.py", *LORA, "--out", tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"trained elsewhere"


def test_a_run_that_only_began_makes_room_for_another(tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        fail_after(patch, 1, RuntimeError("power cut"))
        command("train.py", *FLAGS, "--lr", 0.5, "--out", tmp_path)
    trained(tmp_path, *FLAGS, "--steps", 3)


# ---- what breaks


@pytest.mark.parametrize("damage", ["nothing", "garbage", "half", "a tensor less", "other shapes"])
def test_a_damaged_checkpoint_is_refused_and_spoils_nothing(again, whole, damage):
    cut(again, *FLAGS)
    checkpoint = again / train.CHECKPOINT
    tensors = load_file(checkpoint)
    content = checkpoint.read_bytes()
    if damage == "nothing":
        checkpoint.write_bytes(b"")
    elif damage == "garbage":
        checkpoint.write_bytes(b"garbage")
    elif damage == "half":
        checkpoint.write_bytes(content[: len(content) // 2])
    elif damage == "a tensor less":
        tensors.pop("1")
        save_file(tensors, checkpoint)
    else:
        save_file(tensors | {"1": torch.zeros(3)}, checkpoint)

    assert str(checkpoint) in mistake("train.py", *FLAGS, "--resume", "--out", again)
    checkpoint.unlink()
    assert outcome(again) == outcome(whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("power cut")])
def test_a_run_that_ends_before_its_end_leaves_the_one_before_as_it_was(again, whole, error):
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 17, error)
        with pytest.raises(type(error)):
            command("train.py", *FLAGS, "--out", again)
    assert outcome(again) == outcome(whole)


def test_no_folder_has_new_weights_beside_old_results(again, monkeypatch):
    def half(steering, folder):
        (folder / "vector.safetensors").write_bytes(b"half")
        raise RuntimeError("power cut")

    monkeypatch.setattr(train, "save_vector", half)
    with pytest.raises(RuntimeError):
        command("train.py", *FLAGS, "--out", again)
    assert not (again / "results.json").exists()
    assert "not finished" in mistake("eval.py", again)


def test_results_are_written_last(tmp_path, monkeypatch):
    def fail(run):
        raise RuntimeError("power cut")

    monkeypatch.setattr(train, "evaluate", fail)
    with pytest.raises(RuntimeError):
        command("train.py", *FLAGS, "--out", tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "vector.safetensors"]


def test_a_full_device_ends_in_one_line_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    fail_after(monkeypatch, 12, torch.OutOfMemoryError("CUDA out of memory"))
    line = mistake("train.py", *FLAGS, "--save-every", 5, "--out", tmp_path)
    assert "--batch-size 5:" in line
    assert steps_saved(tmp_path) == 10


def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch):
    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    line = mistake("train.py", *FLAGS, "--out", tmp_path)
    assert str(tmp_path) in line
    assert "No space left" in line
