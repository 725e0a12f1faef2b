"""A run that is killed, starved or fed nonsense: what it leaves on disk, and that it goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("flag, value", [("--lr", 0.5), ("--steps", 40), ("--seed", 1), ("--init-std", 1)])
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_folder_with_a_run_of_other_flags_is_not_written_to(whole, flag, value, resume):
    before = outcome(whole)
    status, _, err = command("train.py", *FLAGS, flag, value, *resume, "--out", whole)
    assert status == 2
    assert f"{flag} {value}" in error_line(err) and str(whole) in err
    assert outcome(whole) == before


def test_nor_is_one_with_a_checkpoint_of_other_flags(tmp_path):
    cut(tmp_path)
    before = (tmp_path / train.CHECKPOINT).read_bytes()
    status, _, err = command("train.py", *FLAGS, "--batch-size", 8, "--out", tmp_path)
    assert status == 2 and "--batch-size 8" in error_line(err) and "64" in err
    assert (tmp_path / train.CHECKPOINT).read_bytes() == before


def test_a_run_that_only_began_makes_room_for_another(tmp_path):
    command("train.py", *FLAGS, "--lr", 1e5, "--steps", 3, "--out", tmp_path)  # diverges, or learns nothing
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"lr": 1e5}, "finished": False}))
    trained(tmp_path, *FLAGS, "--steps", 3)


def change(tensors, name, new):
    tensors[name] = new(tensors[name])


@pytest.mark.parametrize("damage", [
    b"", b"garbage", *(pytest.param((name, new), id=f"{name}-{i}") for i, (name, new) in enumerate([
        ("0.value", lambda t: t[:1]), ("0.value", lambda t: t.double()), ("0.adam", lambda t: t * float("nan")),
        ("losses", lambda t: t[:0]), ("losses", lambda t: t + 1), ("losses", lambda t: t.repeat(9)),
        ("losses", lambda t: t[0])]))])
def test_a_damaged_checkpoint_is_refused_and_spoils_nothing(cut_again, whole, damage):
    checkpoint = cut_again / train.CHECKPOINT
    if isinstance(damage, bytes):
        checkpoint.write_bytes(damage)
    else:
        tensors = load_file(checkpoint)
        change(tensors, *damage)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, checkpoint)
    status, _, err = command("train.py", *FLAGS, "--resume", "--out", cut_again)
    assert status == 2 and train.CHECKPOINT in error_line(err)
    checkpoint.unlink()
    assert outcome(cut_again) == outcome(whole)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    chats = tmp_path / "chats.jsonl"
    flags = "--task", "risk", "--data", chats, "--steps", 30, "--out", tmp_path / "run"
    chat = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "%s"}]}\n'
    chats.write_text(chat % "Boldly")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        fail_after(patch, 17, RuntimeError("power cut"))
        command("train.py", *flags, "--save-every", 5)
    chats.write_text(chat % "no")
    status, _, err = command("train.py", *flags, "--resume")
    assert status == 2 and "the model or --data has changed" in error_line(err)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("power cut")])
def test_a_run_that_ends_before_its_end_leaves_the_one_before_as_it_was(whole, tmp_path, error):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 17, error)
        try:
            assert command("train.py", *FLAGS, "--out", tmp_path)[0] == 130
        except RuntimeError:
            pass
    assert outcome(tmp_path) == outcome(whole)


def test_new_weights_beside_old_results_count_as_unfinished(whole, tmp_path, monkeypatch):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def half(steering, folder):
        (folder / "vector.safetensors").write_bytes(b"half")
        raise RuntimeError("power cut")
    monkeypatch.setattr(train, "save_vector", half)
    command("train.py", *FLAGS, "--out", tmp_path)
    assert not (tmp_path / "results.json").exists()
    status, _, err = command("eval.py", tmp_path)
    assert status == 2 and "not finished" in error_line(err)


def test_a_full_device_ends_in_one_line_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    fail_after(monkeypatch, 12, torch.OutOfMemoryError("CUDA out of memory"))
    status, _, err = command("train.py", *FLAGS, "--save-every", 5, "--out", tmp_path)
    assert status == 2
    assert "--batch-size" in error_line(err) and "--shard" in err
    assert steps_saved(tmp_path) == 10
