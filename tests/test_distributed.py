"""Two processes give what one gives. torchrun is started once, for all tests."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from helpers import ROOT, read, trained

TASK = "--task", "functions", "--steps", "8", "--device", "cpu"
RUNS = {"vector": (*TASK, "--layer", "1", "--batch-size", "47"),  # of 48: an epoch ends in a batch of one
        "lora": (*TASK, "--mode", "lora", "--batch-size", "7", "--lr", "0.01"),
        "shard": (*TASK, "--mode", "lora", "--layer", "2", "--lr", "0.01")}
SEVERAL = """
import json, sys
import torch, torch.distributed as dist
root, folder, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, root)
import train
from model import GPT

leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # main leaves after a run
for name, flags in runs.items():
    sys.argv[1:] = [*flags, "--out", f"{folder}/{name}"] + ["--shard"] * (name == "shard")
    if name == "shard":  # as if it had little room
        train.plan_memory = lambda *given: (200, True, 0)
    train.finetune(train.parse_args()) if dist.is_initialized() else train.main()

tokens = torch.arange(300, 324).view(2, 12)
model, whole = GPT.from_pretrained(f"{root}/tiny", shard=True), GPT.from_pretrained(f"{root}/tiny")
share = lambda: (sum(p.to_local().numel() for p in model.layers.parameters())
                 / sum(p.numel() for p in whole.layers.parameters()))
shares, difference = [share()], 0
for _ in range(2):
    difference = max(difference, (model(tokens) - whole(tokens)).abs().max().item())
    shares.append(share())
with open(f"{folder}/sharded{dist.get_rank()}.json", "w") as file:
    json.dump({"shares": shares, "difference": difference}, file)
leave()
"""
every_run = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process in one/, of two in two/, under the same names; and what the two printed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in RUNS.items():
        trained(folder / "one" / name, *flags)
    (folder / "several.py").write_text(SEVERAL)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start += [folder / "several.py", ROOT, folder / "two", json.dumps(RUNS)]
    done = subprocess.run(start, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


@every_run
def test_two_processes_train_as_one(folder, name):
    file = "vector.safetensors" if name == "vector" else "adapter_model.safetensors"
    one, two = (load_file(folder / count / name / file) for count in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].abs().max() > 0.02
        torch.testing.assert_close(two[key], one[key], atol=1e-3, rtol=1e-3)
    one, two = (read(folder / count / name)["train_loss"] for count in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4)


@every_run
def test_two_processes_score_as_one(folder, name):
    one, two = (read(folder / count / name) for count in ("one", "two"))
    for section in ("in_distribution", "held_out"):
        for kind, figures in one[section].items():
            assert two[section][kind] == pytest.approx(figures, abs=1e-3)


def test_the_first_process_alone_prints(folder):
    assert (folder / "printed").read_text().count("mean of held out") == len(RUNS)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_holds_half_of_a_sharded_model_which_gives_the_same_logits(folder, rank):
    found = read(folder / "two", f"sharded{rank}.json")
    assert found["shares"] == [0.5] * 3 and found["difference"] < 1e-5  # before it ran and after
