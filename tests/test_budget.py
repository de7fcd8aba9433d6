"""What a call may cost in function calls: the one figure of the bench that does not depend on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGET = 520
"""Of which the bare client makes about 350."""

MEASURE = """
import asyncio, json, run

async def measure(server):
    return await run.function_calls(server)

with run.CannedServer() as server:
    print(json.dumps(asyncio.run(measure(server))))
"""


def test_a_call_makes_at_most_520_function_calls() -> None:
    """One call after the other, in a fresh process, with the default layers, and the logger at WARNING."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("bench", "src"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["brimful"] <= BUDGET, figures
    assert figures["bare"] > 200, "what it is compared with is measured as well"
