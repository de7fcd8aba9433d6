"""A tour of priorities: people who wait for an answer go before a job that has all night, and tenants share alike.

It takes some twelve seconds, needs no API key, and talks real HTTP to the simulator that comes with the package.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
if importlib.util.find_spec("brimful") is None and (SOURCE / "brimful.py").exists():
    sys.path.insert(0, str(SOURCE))  # a checkout that is not installed

try:
    import aiohttp  # noqa: F401  the package imports it when it is needed; here it is better told at once
    import yaml  # noqa: F401

    from brimful import LLMClient, LLMException, LLMManager, Priority
    from brimful.testing.simulator import Simulator, SimulatorSettings
    from brimful.testing.window import Limits
except ImportError as missing:
    print(f"This example cannot run: {missing}.", file=sys.stderr)
    print("To mend it, in a checkout:  make setup\nor:  python -m pip install PATH_TO_THE_CHECKOUT", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)

KEYS = ("key-1", "key-2")
REQUESTS = 20
"""What each key may send in any window."""
WINDOW = 3.0
"""Seconds. Vendors count by the minute; a tour has less time."""
BURST = 0.3
"""Seconds of the window's requests that may go at once: so capacity comes back in drops and not in one wave."""
JOB = {"a": 90, "b": 30}
"""Calls of the background job, by tenant."""
VISITORS = 12
PAUSE = 0.6
"""Seconds between two of them."""


class Board:
    """Who was answered when."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self._answered: dict[str, list[tuple[float, float]]] = {}

    def note(self, who: str, asked: float) -> None:
        now = time.monotonic()
        self._answered.setdefault(who, []).append((now - asked, now - self.started))

    def rows(self) -> Iterable[Sequence[object]]:
        yield "who", "calls", "median wait", "longest wait", "last answered after"
        for who, answered in sorted(self._answered.items()):
            waits = [wait for wait, _ in answered]
            last = max(at for _, at in answered)
            median, longest = f"{statistics.median(waits):.1f} s", f"{max(waits):.1f} s"
            yield who, len(waits), median, longest, f"{last:.1f} s"


async def job(client: LLMClient, board: Board) -> None:
    """All of it at once, tenant by tenant: whoever comes later has as much of the quota as whoever came first."""

    async def one(tenant: str, number: int) -> None:
        asked = time.monotonic()
        await client.complete(f"Summarise document {number}", priority=Priority.LOW, tenant=tenant)
        board.note(f"low, tenant {tenant}", asked)

    await asyncio.gather(*(one(tenant, number) for tenant, calls in JOB.items() for number in range(calls)))


async def visitors(client: LLMClient, board: Board) -> None:
    """Somebody asks something every now and then, and waits for the answer."""

    async def one(number: int) -> None:
        await asyncio.sleep(number * PAUSE)
        asked = time.monotonic()
        await client.complete(f"Question {number}", priority=Priority.HIGH)
        board.note("high", asked)

    await asyncio.gather(*(one(number) for number in range(1, VISITORS + 1)))


async def foresight(client: LLMClient) -> None:
    """What a call would cost, and when it could go: nothing is sent and nothing is reserved."""
    for priority in (Priority.HIGH, Priority.LOW):
        estimate = await client.estimate("One more question", priority=priority, tenant="a")
        print(
            f"  {priority:4}  {estimate.input_tokens} tokens in, {estimate.output_tokens} out, "
            f"goes in {estimate.wait:.1f} s at the earliest"
        )


def limits(manager: LLMManager) -> None:
    """What monitoring would read."""
    for provider, found in manager.get_status()["limits"].items():
        queue = ", ".join(
            f"{count} {priority} of {tenant or 'nobody in particular'}"
            for priority, tenants in found["queue"].items()
            for tenant, count in tenants.items()
        )
        print(f"  {provider}: {found['queued']} waiting{f' ({queue})' if queue else ''}")
        for groups in found["quotas"].values():
            for quota in groups.values():
                requests = quota["requests"]
                opens = quota["next_capacity"]
                print(
                    f"    {', '.join(quota['keys'])}: {requests['used']} of {requests['limit']} requests used, "
                    f"{quota['under_way']} under way" + (f", more in {opens:.2f} s" if opens is not None else "")
                )


async def halfway(manager: LLMManager, client: LLMClient) -> None:
    """How it looks while the job waits."""
    await asyncio.sleep(WINDOW)
    print(f"  after {WINDOW:g} s one more call would have these prospects:")
    await foresight(client)
    print("\n  and the limits stand like this:")
    limits(manager)


async def tour() -> None:
    allowed = {key: Limits(requests=REQUESTS, window_seconds=WINDOW) for key in KEYS}
    async with Simulator(SimulatorSettings(limits=allowed, latency=(0.1, 0.1))) as simulator:
        print(f"No API key is used: this runs against the built-in simulator at {simulator.url}")
        async with LLMManager.from_config(configuration(simulator)) as manager:
            client = manager.get_client()
            heading("Before: nobody waits")
            await foresight(client)

            total = len(KEYS) * REQUESTS
            heading(
                f"A job of {sum(JOB.values())} calls, and visitors; {total} requests are allowed in any {WINDOW:g} s"
            )
            board = Board()
            await asyncio.gather(job(client, board), visitors(client, board), halfway(manager, client))
            print()
            table(board.rows())

            heading("After")
            limits(manager)
        refused = sum(arrival.status == 429 for arrival in simulator.journal)
        print(f"  at the server: {len(simulator.journal)} requests, {refused} answered with 429")


def configuration(simulator: Simulator) -> dict[str, Any]:
    """Two keys with the same limits. The weights are the defaults: of what there is, high has 8 parts and low has 1."""
    return {
        "providers": {
            "anthropic": {
                "base_url": simulator.url,
                "api_keys": list(KEYS),
                "models": "claude-haiku-5-5",
                "rate_limits": {
                    "requests_per_minute": REQUESTS,
                    "window_seconds": WINDOW,
                    "burst_seconds": BURST,
                },
            }
        },
        "middleware": {"rate_limiter": {"weights": {"high": 8, "normal": 3, "low": 1}}},
    }


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def table(rows: Iterable[Sequence[object]]) -> None:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(("  " + "  ".join(padded)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(
            "A tour of priorities in under 20 seconds, against the built-in simulator: a background job of two tenants "
            "that takes what is left, visitors who hardly wait, what a call would cost and how long it would wait, and "
            "the state of the limits."
        )
    )
    parser.add_argument("--verbose", action="store_true", help="also show what the package logs")
    arguments = parser.parse_args()
    # Long waits are logged as warnings; here they are the show itself.
    logging.basicConfig(format="  log: %(message)s")
    logging.getLogger("brimful").setLevel(logging.INFO if arguments.verbose else logging.ERROR)
    try:
        asyncio.run(tour())
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
