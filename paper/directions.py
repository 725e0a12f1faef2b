"""Do vectors that were trained on one thing point the same way? The cosines of several runs (C5).

    python paper/directions.py out/open_weights/*-functions-vector-*

The paper (§5.2) says that vectors of different seeds have a low cosine to each other. What to
compare it with are vectors of other functions or cities, and of shuffled answers: a direction that
all of them share is about the way of answering, and not about what was learned.
"""

import argparse
from pathlib import Path

from common import table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from data import blame
from eval import run_main


def compare(folders: list) -> tuple:
    """(headings, rows): the length of each run's vector, and its cosine with every other one."""
    vectors = {}
    for folder in folders:
        with blame(f"{folder}: no run of a vector, or a damaged one", OSError, SafetensorError):
            vectors[folder] = load_file(folder / "vector.safetensors")["vector"]  # (d,)

    rows = []
    for number, (folder, vector) in enumerate(vectors.items()):
        with blame("these runs are of models of different sizes", RuntimeError):
            cosines = [cosine_similarity(vector, v, dim=0).item() for v in vectors.values()]
        rows.append([f"{number}: {folder.name}", vector.norm().item(), *cosines])
    return ["run", "length", *range(len(rows))], rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.py wrote")
    args = parser.parse_args()
    print(table(*compare(args.runs)))


if __name__ == "__main__":
    run_main(main)
