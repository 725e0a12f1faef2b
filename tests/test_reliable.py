"""A run that is killed, starved or fed nonsense: what it leaves on disk, and that it goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from test_main import cli  # noqa: F401 (a fixture)

FLAGS = ("--task", "functions", "--steps", 30)


def outcome(folder):
    """Everything that a run must give again: its weights to the last bit, and its figures."""
    results = json.loads((folder / "results.json").read_text())
    results.pop("train_seconds")
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))], results


def fail_after(monkeypatch, calls, error):
    """The loss of call number `calls` ends in this error; None: in none any more."""
    original, count = train.answer_loss, iter(range(10 ** 6))

    def answer_loss(*given):
        if next(count) == calls:
            raise error
        return original(*given)
    monkeypatch.setattr(train, "answer_loss", answer_loss)


@pytest.mark.parametrize("flags", [("--layer", 1), ("--layer", 1, "--keep-gb", 0.0), ("--mode", "lora")])
def test_a_resumed_run_ends_in_the_same_bits(cli, tmp_path, monkeypatch, flags):  # noqa: F811
    with monkeypatch.context() as patch:
        fail_after(patch, 17, RuntimeError("power cut"))
        with pytest.raises(RuntimeError):
            cli("train.py", *FLAGS, *flags, "--save-every", 5, "--out", tmp_path / "cut")
    assert len(load_file(tmp_path / "cut" / train.CHECKPOINT)["losses"]) == 15
    assert cli("train.py", *FLAGS, *flags, "--resume", "--out", tmp_path / "cut")[0] == 0
    cli("train.py", *FLAGS, *flags, "--out", tmp_path / "whole")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_killed_process_resumes_to_the_same_bits(tiny_folder, tmp_path):
    def command(out, *more):
        return [sys.executable, tiny_folder.parent / "train.py", *map(str, FLAGS), "--out", tmp_path / out, *more]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command("cut", "--save-every", "1"), **quiet)
    checkpoint = tmp_path / "cut" / train.CHECKPOINT
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(load_file(checkpoint)["losses"]) < 30  # whole, and not the end
    for out, more in (("cut", ["--resume"]), ("whole", [])):
        assert subprocess.run(command(out, *more), **quiet).returncode == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(cli, tmp_path, monkeypatch):  # noqa: F811
    original = train.save_file

    def half_a_file(tensors, path, **options):
        original(tensors, path, **options)
        if len(tensors["losses"]) == 10:
            path.write_bytes(path.read_bytes()[:50])
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_file", half_a_file)
    cli("train.py", *FLAGS, "--save-every", 5, "--out", tmp_path / "run")
    assert len(load_file(tmp_path / "run" / train.CHECKPOINT)["losses"]) == 5


def test_a_finished_run_leaves_no_checkpoint_and_resume_without_one_starts_afresh(cli, tmp_path):  # noqa: F811
    status, out, _ = cli("train.py", *FLAGS, "--save-every", 5, "--resume", "--out", tmp_path / "run")
    assert status == 0 and "from the beginning" in out
    assert not (tmp_path / "run" / train.CHECKPOINT).exists()


@pytest.mark.parametrize("flags, named", [(("--lr", 0.5), "lr"), (("--task", "risk"), "task")])
def test_a_checkpoint_of_other_flags_is_refused_and_spoils_nothing(cli, tmp_path, monkeypatch, flags,  # noqa: F811
                                                                   named):
    cli("train.py", *FLAGS, "--out", tmp_path / "run")
    before = outcome(tmp_path / "run")
    with monkeypatch.context() as patch:
        fail_after(patch, 7, RuntimeError("power cut"))
        with pytest.raises(RuntimeError):
            cli("train.py", *FLAGS, "--save-every", 5, "--out", tmp_path / "run")
    status, _, err = cli("train.py", *FLAGS, *flags, "--resume", "--out", tmp_path / "run")
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert named in err and train.CHECKPOINT in err
    (tmp_path / "run" / train.CHECKPOINT).write_bytes(b"garbage")
    status, _, err = cli("train.py", *FLAGS, "--resume", "--out", tmp_path / "run")
    assert status == 2 and len(err.strip().splitlines()) == 1
    os.remove(tmp_path / "run" / train.CHECKPOINT)
    assert outcome(tmp_path / "run") == before


def test_a_full_gpu_ends_in_one_line_and_keeps_the_checkpoint(cli, tmp_path, monkeypatch):  # noqa: F811
    fail_after(monkeypatch, 12, torch.OutOfMemoryError("CUDA out of memory"))
    status, _, err = cli("train.py", *FLAGS, "--save-every", 5, "--out", tmp_path / "run")
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert "--batch-size" in err and "--shard" in err
    assert len(load_file(tmp_path / "run" / train.CHECKPOINT)["losses"]) == 10
