import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def tiny_folder():
    return ROOT / "tiny"


@pytest.fixture
def model(tiny_folder):
    """The embedded model, loaded afresh for each test that puts something on it."""
    from model import GPT
    return GPT.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    from data import Tokenizer
    return Tokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def reference(tiny_folder):
    """The embedded model as transformers loads it."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, program, *flags) -> (exit status, stdout, stderr) of a command line, run in this process."""
    from eval import run_main

    def run(main, program, *flags):
        monkeypatch.setattr(sys, "argv", [program, *map(str, flags)])
        status = 0
        try:
            run_main(main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run
