"""The tour of brimful: each function below shows one thing, and is short enough to copy.

With OPENAI_API_KEY or ANTHROPIC_API_KEY in the environment it asks the real vendor, small and cheap; without one, or
with --simulator, it talks real HTTP to the simulator that comes with the package.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
if importlib.util.find_spec("brimful") is None and (SOURCE / "brimful.py").exists():
    sys.path.insert(0, str(SOURCE))  # a checkout that is not installed

try:
    import aiohttp  # noqa: F401  the package imports it when it is needed; here it is better told at once
    import yaml  # noqa: F401

    from brimful import (
        Call,
        Handler,
        LLMClient,
        LLMException,
        LLMManager,
        Message,
        MessageRole,
        Reply,
    )
    from brimful.testing.journal import peak
    from brimful.testing.simulator import Simulator, SimulatorSettings
    from brimful.testing.window import Limits
except ImportError as missing:
    print(f"This example cannot run: {missing}.", file=sys.stderr)
    if (missing.name or "").partition(".")[0] == "brimful":
        print("To mend it, in a checkout:  make demo\nor:  python -m pip install PATH_TO_THE_CHECKOUT", file=sys.stderr)
    else:
        print("To mend it:  python -m pip install aiohttp msgspec PyYAML", file=sys.stderr)
        print("or, in a checkout, which does all its own set-up:  make demo", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)

VENDORS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
MODELS = {"key-1": "claude-haiku-5-5", "key-2": "claude-sonnet-5-5", "key-3": "claude-opus-5-5"}
REQUESTS = {"key-1": 10, "key-2": 20, "key-3": 30}
"""What each key may send in any window: the simulator insists on it, and the configuration tells the client."""
WINDOW = 3.0
"""Seconds. Vendors count by the minute; a tour has less time."""
BURST = 150


# -- five things to do with a client ---------------------------------------------------------------------------------


async def chat(client: LLMClient) -> None:
    """Ask one question, get text."""
    heading("Chat")
    print(await client.chat("Hello, how are you?"))


async def conversation(client: LLMClient) -> None:
    """Send a whole conversation, with options, and see what the answer cost."""
    heading("Conversation")
    messages = [
        Message(MessageRole.SYSTEM, "You are a helpful assistant. Answer in one sentence."),
        Message(MessageRole.USER, "What is Python?"),
    ]
    response = await client.complete(messages, temperature=0.7, max_tokens=200, timeout=30)
    print(response)
    usage = response.usage
    print(f"  {response.model} by key {response.key_id}: {usage.input_tokens} tokens in, {usage.output_tokens} out")
    for warning in response.warnings:
        print(f"  note: {warning}")


async def streaming(client: LLMClient) -> None:
    """Print an answer while it is being written; leaving the block early would close the connection."""
    heading("Streaming")
    async with client.stream_complete("Tell me, word by word, why streams are pleasant.", max_tokens=200) as stream:
        async for chunk in stream:
            print(chunk, end="", flush=True)
    print(f"\n  {stream.model}, ended by: {stream.stop_reason}")


async def burst(client: LLMClient, simulator: Simulator) -> None:
    """Offer far more calls than the quota allows: they wait their turn, rotate over the keys, and all are answered."""
    heading(f"A burst: {BURST} calls at once, {sum(REQUESTS.values())} allowed in any {WINDOW:g} s")
    for key, model in MODELS.items():
        print(f"  {key}  {model:18} {REQUESTS[key]} requests")
    before, started = len(simulator.journal), time.monotonic()

    async def timed(number: int) -> tuple[int, str]:
        response = await client.complete(f"Question {number}")
        return int(time.monotonic() - started), response.key_id

    answers = await asyncio.gather(*(timed(number) for number in range(BURST)))
    print()
    show_waits(answers)

    arrived = simulator.journal[before:]
    refused = sum(arrival.status == 429 for arrival in arrived)
    print(f"  at the server: {len(arrived)} requests, {refused} answered with 429")
    for key, limit in REQUESTS.items():
        print(f"  {key}: at most {peak(arrived, key, WINDOW, rejected=True)} of {limit} in any {WINDOW:g} s")


async def outage(client: LLMClient, simulator: Simulator) -> None:
    """Let the vendor fail in four ways at once; retries see to it that the caller does not notice."""
    heading("An outage: the next four requests fail, each in another way")
    for fault in ("529", "500", "503", "reset"):
        simulator.fail(fault)
    answers = await asyncio.gather(*(client.complete(f"Are you there, number {n}?") for n in range(1, 7)))
    print(f"  {len(answers)} of {len(answers)} calls were answered:")
    for answer in answers:
        print(f"    {answer.key_id}: {answer}")


# -- and one to do with the pipeline ---------------------------------------------------------------------------------


class FailureTeller:
    """A middleware of your own: it sees every attempt on its way down, and what became of it on its way up."""

    def __init__(self) -> None:
        self.attempts = 0

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        self.attempts += 1
        try:
            return await handler(call)
        except LLMException as error:
            print(f"  call {call.id}, attempt {len(call.attempts)} by key {error.key_id}: {error.message}")
            raise


# -- what all of it has come to --------------------------------------------------------------------------------------


def status(manager: LLMManager, teller: FailureTeller) -> None:
    """What monitoring would read: every figure here is in `manager.get_status()`."""
    heading("Status")
    report = manager.get_status()
    metrics = report["metrics"]
    rows: list[Sequence[object]] = [("key", "state", "model", "attempts", "failed", "tokens in", "tokens out")]
    for provider in report["providers"].values():
        for key in provider["keys"]:
            done: dict[str, Any] = metrics["by_key"].get(key["id"], {})
            figures = (done.get(name, 0) for name in ("attempts", "failed", "input", "output"))
            rows.append((key["id"], key["state"], key["model"] or "-", *figures))
    table(rows)
    calls, latency = metrics["requests"], metrics["latency"]
    print(f"\n  calls     {calls['total']}: {calls['successful']} successful, {calls['failed']} failed")
    retries = metrics["retries"]
    print(f"  attempts  {metrics['attempts']}, {retries} of them retries; my middleware saw {teller.attempts}")
    if calls["successful"]:
        print(f"  latency   median {latency['p50']:.2f} s, 95 % within {latency['p95']:.2f} s (waits included)")


# -- printing --------------------------------------------------------------------------------------------------------


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def table(rows: Iterable[Sequence[object]]) -> None:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(("  " + "  ".join(padded)).rstrip())


def show_waits(answers: Iterable[tuple[int, str]]) -> None:
    """In which second how many calls were answered, by key: the gaps are the waits."""
    answers = list(answers)
    found = Counter(answers)
    keys = sorted({key for _, key in answers})
    rows: list[Sequence[object]] = [("answered after", *keys)]
    for second in range(max(second for second, _ in answers) + 1):
        rows.append((f"{second} to {second + 1} s", *(found[second, key] or "." for key in keys)))
    table(rows)
    print()


# -- running it ------------------------------------------------------------------------------------------------------


def simulated() -> Simulator:
    """A vendor of one's own: it insists on its limits, takes its time, and fails when it is told to."""
    limits = {key: Limits(requests=requests, window_seconds=WINDOW) for key, requests in REQUESTS.items()}
    return Simulator(SimulatorSettings(limits=limits, latency=(0.15, 0.2), tokens_per_second=25))


def configuration(simulator: Simulator) -> dict[str, Any]:
    """Three keys, each with its own model and limits. In an application this is `config/llm.yaml`."""
    return {
        "providers": {
            "anthropic": {
                "base_url": simulator.url,
                "api_keys": list(MODELS),
                "models": list(MODELS.values()),
                "rate_limits": [
                    {"requests_per_minute": requests, "window_seconds": WINDOW} for requests in REQUESTS.values()
                ],
            }
        }
    }


async def tour(*, real: bool) -> None:
    teller = FailureTeller()
    async with AsyncExitStack() as opened:
        if real:
            # Nothing but the environment: a file that is found under the working directory may say anything.
            manager = LLMManager.from_config({}, middleware={"failure_teller": teller})
            names = ", ".join(manager.get_status()["providers"])
            print(f"Real vendor ({names}), by the API key in the environment: three small calls.")
        else:
            simulator = await opened.enter_async_context(simulated())
            print(f"No API key is used: this runs against the built-in simulator at {simulator.url}")
            manager = LLMManager.from_config(configuration(simulator), middleware={"failure_teller": teller})
        await opened.enter_async_context(manager)

        client = manager.get_client()
        await chat(client)
        await conversation(client)
        await streaming(client)
        if real:
            heading("Left out")
            print("The burst and the outage cost money, and vendors do not fail on demand: see them with --simulator.")
        else:
            await burst(client, simulator)
            await outage(client, simulator)
        status(manager, teller)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(
            "A tour of brimful in under 30 seconds: a chat, a conversation, a stream; a burst larger than the quota of "
            "three keys, with its waits and without a single 429; an outage survived by retries, seen by a middleware "
            "of one's own; and the status. With OPENAI_API_KEY or ANTHROPIC_API_KEY in the environment it makes three "
            "small calls to the real vendor instead, and leaves out burst and outage."
        )
    )
    parser.add_argument("--simulator", action="store_true", help="ask the simulator, whatever the environment holds")
    parser.add_argument("--verbose", action="store_true", help="also show what the package logs")
    arguments = parser.parse_args()
    # Long waits and retries are logged as warnings; here they are the show itself.
    logging.basicConfig(format="  log: %(message)s")
    logging.getLogger("brimful").setLevel(logging.INFO if arguments.verbose else logging.ERROR)
    real = not arguments.simulator and any(os.environ.get(name) for name in VENDORS)
    try:
        asyncio.run(tour(real=real))
    except LLMException as error:
        print(f"\nThe tour ends here: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read along has gone (`| head`); what is still buffered must not complain when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    print("\nThat was the tour.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
