"""The soak of ``bench/soak.py`` in half a minute instead of ten, and that it notices what it is there for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def soak(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run it in a process of its own, whose memory and descriptors are nobody else's; exit code and figures."""
    figures = folder / "soak.json"
    command = [sys.executable, str(ROOT / "bench" / "soak.py"), "--growth=20", f"--json={figures}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert figures.exists(), done.stderr
    return done.returncode, json.loads(figures.read_text(encoding="utf-8"))


@pytest.mark.timeout(150)
def test_nothing_is_left_of_half_a_minute_of_everything(tmp_path: Path) -> None:
    """Both dialects, faults of every kind, callers who leave; the server counts what was written."""
    code, figures = soak(tmp_path, "--seconds=28", "--rate=100")
    assert figures["violations"] == []
    assert code == 0
    assert figures["calls"]["answered"] > 2000
    assert figures["requests"]["received"] > figures["calls"]["answered"]
    assert len(figures["faults"]) > 20


@pytest.mark.timeout(100)
def test_each_thing_that_is_left_behind_is_noticed(tmp_path: Path) -> None:
    """A permit never returned, a task, a socket, a request nobody counted, an error without a type, memory kept."""
    code, figures = soak(
        tmp_path,
        *("--seconds=3", "--rate=60"),
        *("--plant", "permit", "task", "socket", "request", "error", "memory"),
    )
    assert code == 1
    grown = f"memory has grown by {figures['memory (MB)']['growth']} MB, 20 are allowed"
    assert figures["violations"] == [
        "1 calls untyped",
        grown,
        "1 clients taken after the last call",
        "1 reservations taken after the last call",
        "1 tasks left after closing",
        "1 descriptors left after closing",
        "1 requests uncounted",
    ]
