"""SIGTERM while streams run: they end in order, or are told that they did not, and the process goes quietly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import asyncio, json, logging, signal, sys
from llm import LLMException, LLMManager
from llm.testing.simulator import Simulator, SimulatorSettings

# Errors that are raised are written as records as well; here nothing else may be written.
logging.getLogger("brimful").setLevel(logging.CRITICAL)

async def read(client, number, begun):
    count = 0
    try:
        async for chunk in client.stream_complete(f"call {number}: " + "word " * 30):
            count += bool(chunk.text)
            begun.set()
        return "whole"
    except LLMException as error:
        return type(error).__name__

async def main(drain):
    async with Simulator(SimulatorSettings(latency=(0.0, 0.0), tokens_per_second=40.0)) as simulator:
        provider = {"base_url": simulator.url + "/v1", "api_keys": "key", "models": "gpt-6-luna"}
        manager = await asyncio.to_thread(LLMManager.from_config, {"providers": {"openai": provider}})
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        begun = [asyncio.Event() for _ in range(5)]
        client = manager.get_client(max_tokens=1000)
        calls = [asyncio.ensure_future(read(client, number, each)) for number, each in enumerate(begun)]
        await asyncio.gather(*(each.wait() for each in begun))
        print("streaming", flush=True)
        await stop.wait()
        closing = asyncio.ensure_future(manager.close(drain=drain))
        await asyncio.sleep(0)
        try:
            late = await client.chat("too late")
        except LLMException as error:
            late = type(error).__name__
        await closing
        outcomes = await asyncio.gather(*calls)
        status = manager.get_status()["providers"]["openai"]
        facts = {"outcomes": outcomes, "late": late, "circuit": status["circuit"]["state"]}
        facts |= {"open": status["connections"]["open"], "taken": status["clients"]["in_use"]}
        print(json.dumps(facts), flush=True)

asyncio.run(main(float(sys.argv[1])))
"""


REST = {"late": "LLMConnectionError", "circuit": "closed", "open": 0, "taken": 0}


def terminated(drain: float) -> dict[str, Any]:
    """Run the program, end it with SIGTERM in the middle of its streams, and return what it says."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(drain)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "streaming\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    found: dict[str, Any] = json.loads(output)
    return found


@pytest.mark.timeout(90)
def test_with_time_to_drain_streams_end_whole_and_new_calls_are_refused() -> None:
    facts = terminated(40.0)
    assert facts == {"outcomes": ["whole"] * 5, **REST}


@pytest.mark.timeout(90)
def test_when_the_time_is_up_streams_are_told_that_they_did_not_end() -> None:
    facts = terminated(0.2)
    assert facts == {"outcomes": ["LLMStreamInterruptedError"] * 5, **REST}
