"""Each folder of the package is covered by its own tests alone: ``python tests/own_coverage.py``, some two minutes.

What a folder's tests leave out, the tests of those above it may run by chance, but nobody has said there what it must
do. So the tests of each folder run by themselves, and lines and branches of the folder are counted apart.

    python tests/own_coverage.py utils core        two folders; what is missing is listed in any case
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOUNDS = {"utils": 95, "providers": 95, "middleware": 95, "transports": 90, "core": 90}
"""Per cent of the lines, and per cent of the branches, that a folder's own tests have to run."""


def measure(folder: str) -> tuple[float, float, str]:
    """Per cent of lines and branches of *folder*, and the list of what is missing. Exits if its tests fail."""
    with tempfile.TemporaryDirectory() as scratch:
        data, report = f"{scratch}/data", f"{scratch}/report.json"
        coverage = [sys.executable, "-m", "coverage"]
        chosen = [f"--data-file={data}", f"--include=src/llm/{folder}/*"]
        run = ["run", "--branch", f"--data-file={data}", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        tests = subprocess.run([*coverage, *run, f"tests/{folder}"], cwd=ROOT, capture_output=True, text=True)
        if tests.returncode != 0:
            raise SystemExit(f"{tests.stdout}{tests.stderr}\nThe tests of {folder} fail when they run alone.")
        subprocess.run([*coverage, "json", *chosen, "-q", "-o", report], cwd=ROOT, check=True)
        listing = subprocess.run(
            [*coverage, "report", *chosen, "--fail-under=0"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        totals = json.loads(Path(report).read_bytes())["totals"]
    return (
        100 * totals["covered_lines"] / totals["num_statements"],
        100 * totals["covered_branches"] / max(1, totals["num_branches"]),
        listing.stdout,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="folder", help=f"of {', '.join(BOUNDS)}; all if none is named")
    asked = parser.parse_args()
    rows = []
    failed = False
    for folder in asked.folders or BOUNDS:
        lines, branches, listing = measure(folder)
        bound = BOUNDS[folder]
        short = min(lines, branches) < bound
        failed |= short
        rows.append(f"{folder:12} {lines:7.1f} % {branches:9.1f} % {bound:7} %{'  too little' if short else ''}")
        print(f"tests/{folder} alone\n{listing}", flush=True)
    print(f"{'folder':12} {'lines':>9} {'branches':>11} {'at least':>9}", *rows, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
