"""What the scripts of the claims share: runs of train.py that are made once, and tables."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run(folder: Path, flags: list) -> dict:
    """The results of a run of train.py with these flags, which is made if it is not there."""
    results = folder / "results.json"
    if not results.exists():
        command = [sys.executable, ROOT / "train.py", *flags, "--out", folder]
        subprocess.run([str(word) for word in command], check=True, cwd=ROOT)
    return json.loads(results.read_text())


def print_table(headings: list, rows: list):
    """Prints rows of texts and numbers as a table in Markdown. None is an empty cell."""
    print(f"\n| {' | '.join(headings)} |")
    print("|---" * len(headings) + "|")
    for row in rows:
        print(f"| {' | '.join(cell(value) for value in row)} |")
    print()


def cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
