"""A run that is killed, starved or fed nonsense: what it leaves on disk, and that it goes on from there."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from helpers import ROOT, command, error_line, fail_after, read, trained

FLAGS = "--task", "functions", "--steps", 30


def outcome(folder):
    """Everything that a run must give again: its weights to the last bit, and its figures."""
    weights = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    return weights, {**read(folder), "train_seconds": 0}


def steps_saved(folder):
    return len(load_file(folder / train.CHECKPOINT)["losses"])


def cut(folder, *flags):
    """A run with a checkpoint every 5 steps that breaks off in its 18th, by no mistake of the user's."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        fail_after(patch, 17, RuntimeError("power cut"))
        command("train.py", *FLAGS, "--save-every", 5, *flags, "--out", folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end."""
    return trained(tmp_path_factory.mktemp("whole"), *FLAGS)


def test_a_resumed_vector_ends_in_the_same_bits(whole, tmp_path):
    cut(tmp_path)
    assert steps_saved(tmp_path) == 15
    assert outcome(trained(tmp_path, *FLAGS, "--resume")) == outcome(whole)


def test_a_resumed_lora_ends_in_the_same_bits(tmp_path):
    flags = *FLAGS, "--mode", "lora"
    cut(tmp_path / "cut", "--mode", "lora")
    resumed = trained(tmp_path / "cut", *flags, "--resume")
    assert outcome(resumed) == outcome(trained(tmp_path / "whole", *flags))


def test_a_killed_process_resumes_to_the_same_bits(whole, tmp_path):
    flags = map(str, (*FLAGS, "--save-every", 1, "--device", "cpu", "--out", tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], env=environment, **quiet)
    while not (tmp_path / train.CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= steps_saved(tmp_path) < 30  # the file is whole, and it is not the end
    assert outcome(trained(tmp_path, *FLAGS, "--resume")) == outcome(whole)


def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    original = train.save_file

    def half_a_file(tensors, path, **options):
        original(tensors, path, **options)
        if len(tensors["losses"]) == 10:
            path.write_bytes(path.read_bytes()[:50])
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_file", half_a_file)
    assert command("train.py", *FLAGS, "--save-every", 5, "--out", tmp_path)[0] == 130
    assert steps_saved(tmp_path) == 5


def test_a_finished_run_leaves_no_checkpoint_and_resume_without_one_starts_afresh(whole, tmp_path):
    _, out, _ = command("train.py", *FLAGS, "--save-every", 5, "--resume", "--out", tmp_path)
    assert "from the beginning" in out
    assert outcome(tmp_path) == outcome(whole)  # all that is there


@pytest.fixture
def cut_again(whole, tmp_path):
    """The folder of a finished run in which a second one was cut."""
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cut(tmp_path)
    return tmp_path


@pytest.mark.parametrize("flag, value, content, named", [
    ("--lr", 0.5, None, "lr"), ("--task", "risk", None, "task"), ("--seed", 1, None, "seed"),
    ("--seed", 0, b"garbage", ""), ("--seed", 0, b"", "")])
def test_a_checkpoint_of_other_flags_or_a_damaged_one_is_refused_and_spoils_nothing(
        cut_again, whole, flag, value, content, named):
    checkpoint = cut_again / train.CHECKPOINT
    if content is not None:
        checkpoint.write_bytes(content)
    status, _, err = command("train.py", *FLAGS, flag, value, "--resume", "--out", cut_again)
    assert status == 2
    assert named in error_line(err) and train.CHECKPOINT in err
    checkpoint.unlink()
    assert outcome(cut_again) == outcome(whole)


def test_a_full_device_ends_in_one_line_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    fail_after(monkeypatch, 12, torch.OutOfMemoryError("CUDA out of memory"))
    status, _, err = command("train.py", *FLAGS, "--save-every", 5, "--out", tmp_path)
    assert status == 2
    assert "--batch-size" in error_line(err) and "--shard" in err
    assert steps_saved(tmp_path) == 10
