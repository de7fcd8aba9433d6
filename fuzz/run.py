"""Coverage-guided fuzzing of what reads a server's bytes: ``python fuzz/run.py --seconds 600`` runs all targets.

It needs atheris, which the project does not: `README.md` beside this file says how to install and what to read off it.
Each target runs in a process of its own, one after another. The exit status is 0 if none has found anything.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

LONGEST_INPUT = 4096
SLOWEST_INPUT = 10
"""Seconds, for what takes microseconds: longer is a hang."""


def fuzz(target: str, seconds: int, folder: Path) -> None:
    """Fuzz *target* in this process; libFuzzer ends it."""
    import atheris  # type: ignore[import-untyped]  # not a requirement: README.md

    with atheris.instrument_imports(include=["llm"]):
        from fuzz.targets import TARGETS
    from fuzz.mutation import mutate

    def mutator(data: bytes, longest: int, seed: int) -> bytes:
        changed = mutate(data, longest, seed) if seed % 2 else None
        return atheris.Mutate(data, longest) if changed is None else changed

    arguments = [
        sys.argv[0],
        str(folder / "found"),
        str(folder / "seeds"),
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST_INPUT}",
        f"-timeout={SLOWEST_INPUT}",
        f"-artifact_prefix={folder}/finding-",
        "-rss_limit_mb=1024",
        "-print_final_stats=1",
    ]
    atheris.Setup(arguments, TARGETS[target], **({} if target == "sse" else {"custom_mutator": mutator}))
    atheris.Fuzz()


def start(target: str, seconds: int, corpus: Path) -> bool:
    """Fuzz *target* in a process of its own, print a line about it, and say whether nothing was found."""
    from fuzz.seeds import seeds

    folder = corpus / target
    for name in ("seeds", "found"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (folder / "seeds" / f"{number:04}").write_bytes(seed)
    command = [sys.executable, __file__, f"--one={target}", f"--seconds={seconds}", f"--corpus={corpus}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"})
    (folder / "log").write_text(done.stdout + done.stderr, encoding="utf-8")
    executions = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    coverage = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    blocks, features, inputs = coverage[-1] if coverage else ("?", "?", "?")
    count = f"{int(executions[1]):>10,}" if executions else "         ?"
    findings = sorted(path.name for path in folder.glob("finding-*"))
    verdict = ", ".join(findings) if findings else "nothing found" if done.returncode == 0 else "it did not end well"
    figures = f"{count} executions, {blocks} blocks, {features} features, {inputs} inputs"
    print(f"{target:<20} {seconds:>4} s {figures}: {verdict}", flush=True)
    if done.returncode != 0:
        print(done.stdout[-3000:] + done.stderr[-3000:], file=sys.stderr)
    return done.returncode == 0 and not findings


def main() -> int:
    from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description="Fuzz what reads a server's bytes; needs atheris.")
    parser.add_argument("--seconds", type=int, default=70, help="for all targets together (default: %(default)s)")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one (repeatable)")
    parser.add_argument("--corpus", type=Path, help="keep inputs, logs and findings here (default: a temporary folder)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one --target once on a finding")
    arguments = parser.parse_args()
    targets = arguments.target or list(TARGETS)
    if arguments.replay is not None:
        TARGETS[targets[0]](arguments.replay.read_bytes())
        return 0
    corpus = (arguments.corpus or Path(tempfile.mkdtemp(prefix="fuzz-"))).resolve()
    print(f"inputs, logs and findings: {corpus}")
    each = max(1, arguments.seconds // len(targets))
    fine = [start(target, each, corpus) for target in targets]
    return 0 if all(fine) else 1


def one() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one")
    parser.add_argument("--seconds", type=int)
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    fuzz(arguments.one, arguments.seconds, arguments.corpus / arguments.one)


if __name__ == "__main__":
    if any(argument.startswith("--one") for argument in sys.argv[1:]):
        one()
    else:
        sys.exit(main())
