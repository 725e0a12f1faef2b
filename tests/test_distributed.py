"""Two processes give what one gives. torchrun is started once, for all tests."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from helpers import ROOT, read, trained

COMMON = "--steps", "8", "--device", "cpu"
LORA = "--mode", "lora", "--lr", "0.01"
RUNS = {
    "vector": (*COMMON, "--layer", "1", "--batch-size", "15"),  # of 16: an epoch ends in one of one
    "lora": (*COMMON, *LORA, "--batch-size", "7"),
    "shard": (*COMMON, *LORA, "--layer", "2"),
}
SEVERAL = """
import json
import sys

import torch
import torch.distributed as dist

root, folder, runs = sys.argv[1:]
sys.path.insert(0, root)
import eval as scoring
import train
from model import GPT


def unequal_room(device):
    return 4_000_000 if dist.get_rank() else 8_000_000


joined = False
for name, flags in json.loads(runs).items():
    sys.argv[1:] = [*flags, "--out", f"{folder}/{name}"]
    if name == "shard":
        sys.argv.append("--shard")
        # Both train on a batch in three parts, whatever memory each has free.
        scoring.NODES_OF_EACH_PROCESS = 64
        scoring.free_memory = unequal_room
    if joined:
        train.finetune(train.parse_args())
    else:
        train.main()
    joined = True

tokens = torch.arange(300, 324).view(2, 12)
whole = GPT.from_pretrained("tiny")
sharded = GPT.from_pretrained("tiny", shard=True)


def share():
    kept = sum(p.to_local().numel() for p in sharded.layers.parameters())
    return kept / sum(p.numel() for p in whole.layers.parameters())


shares = [share()]
difference = 0
for _ in range(2):
    difference = max(difference, (sharded(tokens) - whole(tokens)).abs().max().item())
    shares.append(share())
with open(f"{folder}/sharded{dist.get_rank()}.json", "w") as file:
    json.dump({"shares": shares, "difference": difference}, file)
"""
every_run = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process in one/, of two in two/, by the same names; and what the two printed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in RUNS.items():
        trained(folder / "one" / name, *flags)

    (folder / "several.py").write_text(SEVERAL)
    here = "--standalone", "--local-addr=127.0.0.1"  # not every machine can look its own name up
    torchrun = "-m", "torch.distributed.run", *here, "--nproc_per_node=2"
    given = folder / "several.py", ROOT, folder / "two", json.dumps(RUNS)
    start = [sys.executable, *torchrun, *given]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


@every_run
def test_two_processes_train_as_one(folder, name):
    file = "vector.safetensors" if name == "vector" else "adapter_model.safetensors"
    one = load_file(folder / "one" / name / file)
    two = load_file(folder / "two" / name / file)
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].abs().max() > 0.02
        torch.testing.assert_close(two[key], one[key], atol=1e-3, rtol=1e-3)


@every_run
def test_two_processes_have_the_loss_of_one(folder, name):
    one = read(folder / "one" / name)["train_loss"]
    assert read(folder / "two" / name)["train_loss"] == pytest.approx(one, abs=1e-4)


@every_run
def test_two_processes_score_as_one(folder, name):
    one = read(folder / "one" / name)
    two = read(folder / "two" / name)
    for section in ("in_distribution", "held_out"):
        for kind, figures in one[section].items():
            assert two[section][kind] == pytest.approx(figures, abs=1e-3)


def test_the_first_process_alone_prints(folder):
    assert (folder / "printed").read_text().count("mean of held out") == len(RUNS)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_holds_half_of_a_sharded_model_before_it_ran_and_after(folder, rank):
    assert read(folder / "two", f"sharded{rank}.json")["shares"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sharded_model_gives_the_same_logits(folder, rank):
    assert read(folder / "two", f"sharded{rank}.json")["difference"] < 1e-5
