"""Two processes give what one gives."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.parametrize("flags", [
    ("--layer", "1", "--batch-size", "47"),  # an epoch ends in a batch of one: one process has no row
    ("--mode", "lora", "--batch-size", "7"),
    ("--mode", "lora", "--layer", "2", "--shard"),
])
def test_two_processes_train_and_score_as_one(tiny_folder, tmp_path, flags):
    weights, results = [], []
    for name, start in (("one", [sys.executable]), ("two", TORCHRUN)):
        own = [flag for flag in flags if name == "two" or flag != "--shard"]
        command = [*start, tiny_folder.parent / "train.py", "--task", "functions", "--steps", "12", *own, "--out",
                   tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("mean of held out") == 1  # the first process alone prints
        file = "adapter_model" if "lora" in flags else "vector"
        weights.append(load_file(tmp_path / name / f"{file}.safetensors"))
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-3, rtol=1e-3)
    assert abs(results[0]["train_loss"] - results[1]["train_loss"]) < 1e-4
    for section in ("in_distribution", "held_out"):
        for kind, figures in results[0][section].items():
            assert results[1][section][kind] == pytest.approx(figures, abs=1e-3)


SHARDED = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from model import GPT
dist.init_process_group("gloo")
tokens = torch.arange(300, 324).view(2, 12)
model, whole = GPT.from_pretrained(sys.argv[2], shard=True), GPT.from_pretrained(sys.argv[2])
local = sum(p.to_local().numel() for p in model.layers.parameters())
assert local == sum(p.numel() for p in whole.layers.parameters()) / 2, local
for _ in range(2):
    assert (model(tokens) - whole(tokens)).abs().max() < 1e-5
    assert local == sum(p.to_local().numel() for p in model.layers.parameters())
dist.destroy_process_group()
"""


def test_each_process_holds_half_of_a_sharded_model(tiny_folder, tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [*TORCHRUN, tmp_path / "sharded.py", tiny_folder.parent, tiny_folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shard_without_torchrun_is_one_line(tiny_folder, tmp_path):
    command = [sys.executable, tiny_folder.parent / "train.py", "--shard", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "torchrun" in done.stderr
