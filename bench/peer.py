"""What the workers of ``peers.py`` share: they take rounds from standard input and say what those cost, a line each.

Standard library alone: each worker runs in its peer's own environment.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from importlib import metadata
from typing import Any

PROMPT = "Say something about foxes and dogs, please."
EVENTS = 400
"""Pieces of text in a stream of ``server.py``."""
MODEL = "gpt-6.1-terra"

Whole = Callable[[], Awaitable[tuple[str, int]]]
"""One call; the text and the output tokens of its answer."""
Burst = Callable[[], Awaitable[int]]
"""One streamed call; how many pieces of text it had."""
Connect = Callable[[str], AbstractAsyncContextManager[tuple[Whole, Burst]]]
"""From the server's address, without a path."""


async def settle() -> None:
    """Wait until nothing is going on any more, five seconds at most."""
    for _ in range(100):
        started = time.process_time()
        await asyncio.sleep(0.05)
        if time.process_time() - started < 0.005:
            return


async def spend(whole: Whole, burst: Burst, *, mode: str, calls: int, concurrency: int) -> float:
    """Microseconds of CPU a call, with *concurrency* callers in closed loops."""

    async def caller(number: int) -> None:
        for _ in range(number):
            if mode == "whole":
                text, tokens = await whole()
                assert text
                assert tokens
            else:
                assert await burst() == EVENTS

    # Connections that have idled through the others' rounds are opened again outside the account.
    await asyncio.gather(*(caller(1) for _ in range(concurrency)))
    await settle()
    each = max(1, calls // concurrency)
    gc.collect()
    started = time.process_time()
    await asyncio.gather(*(caller(each) for _ in range(concurrency)))
    # What a peer puts off (some write their records in the background) belongs to the calls that made it.
    await settle()
    return (time.process_time() - started) / (each * concurrency) * 1e6


def resident() -> float:
    """Resident memory in MB; where there is no /proc, the most it ever was."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


async def work(connect: Connect, root: str, say: Callable[[dict[str, Any]], None]) -> None:
    async with connect(root) as (whole, burst):
        # Nothing else is to be done between two rounds, so waiting for a line may block the loop.
        for line in sys.stdin:
            cost = await spend(whole, burst, **json.loads(line))
            say({"us": cost, "rss": resident()})


def run(distribution: str, connect: Connect) -> None:
    """Be a worker: say that it is ready, then do rounds until standard input ends."""
    # What a peer prints goes to standard error: lines are for the driver.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=lines, flush=True)

    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        version = "checkout"
    say({"version": version})
    asyncio.run(work(connect, sys.argv[1], say))
