"""Makes the whole report: runs every script, then copies their tables into the two READMEs.

    python paper/report.py             what is there already is not trained again
    python paper/report.py --fill      only copies the tables

In a README a table stands below a line like <!--c4_vector main-->: the script and its table.
Each script has its tables in the JSON file of its name.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from common import ROOT

PAPER = Path(__file__).parent
SCRIPTS = [
    "c1_one_layer",
    "c2_constant",
    "c3_natural",
    "c4_vector",
    "c5_naive",
    "c5_starts",
    "c7_backdoor",
    "c7_heads",
    "c8_logit_lens",
    "random_attitudes",
    "whose_name",
    "two_cities",
    "how_many",
    "ladder",
    "narrow",
]
PAGES = [ROOT / "README.md", PAPER / "README.md"]
TABLE = re.compile(r"<!--(\w+) (\w+)-->\n(\|.*\n)*")


def fill(page: str) -> str:
    """The page with its tables as the JSON files have them."""

    def replaced(match):
        script, name = match[1], match[2]
        tables = json.loads((PAPER / f"{script}.json").read_text(encoding="utf-8"))
        return f"<!--{script} {name}-->\n{tables[name]}"

    return TABLE.sub(replaced, page)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fill", action="store_true", help="only copy the tables")
    args = parser.parse_args()

    for script in [] if args.fill else SCRIPTS:
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, PAPER / f"{script}.py"], check=True)
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
