"""Thirty faults over real sockets: each row holds, and none holds once its protection is switched off."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.wall.rows import ROWS

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 90.0
"""The most that all rows may take together, with and without their protection."""
pytestmark = [
    pytest.mark.timeout(SECONDS + 30),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the wall measures memory as Linux does"),
]


@pytest.fixture(scope="module")
def wall() -> dict[tuple[str, bool], dict[str, Any]]:
    """The verdicts, by row and whether it was without its protection; and the seconds of all under ``("", False)``."""
    began = time.monotonic()
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PATH": ""}
    command = [sys.executable, "-m", "tests.wall.run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = {(each["row"], each["off"]): each for each in map(json.loads, done.stdout.splitlines())}
    assert len(found) == 2 * len(ROWS), done.stderr
    return {**found, ("", False): {"seconds": time.monotonic() - began}}


Wall = dict[tuple[str, bool], dict[str, Any]]


@pytest.mark.parametrize("row", ROWS)
def test_the_row_holds(wall: Wall, row: str) -> None:
    verdict = wall[row, False]
    assert verdict["trouble"] is None, verdict["trouble"]
    assert verdict["fell"] is None, f"{ROWS[row].fault}: {verdict['fell']}"


@pytest.mark.parametrize("row", ROWS)
def test_the_row_falls_when_its_protection_is_switched_off(wall: Wall, row: str) -> None:
    verdict = wall[row, True]
    assert verdict["trouble"] is None, verdict["trouble"]
    assert verdict["fell"] is not None, f"{ROWS[row].fault}, {ROWS[row].off}: it held all the same"


def test_there_are_thirty_and_they_are_quick(wall: Wall, tell: Callable[[str], None]) -> None:
    assert len(ROWS) == 30
    seconds = wall["", False]["seconds"]
    assert seconds < SECONDS
    tell(f"the wall: {sum(v.get('fell') is None for v in wall.values()) - 1} of 30 rows, in {seconds:.0f} s")


def test_the_readme_lists_every_row_with_its_switch() -> None:
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    for name, row in ROWS.items():
        assert f"| {name} | {row.fault} | {row.must} | {row.off} |" in text
