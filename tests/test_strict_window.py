"""Never over, never under, over real sockets: what arrives at the server is counted in every window, at any offset.

The simulator is a process of its own and writes down each arrival by its own clock. The check, `check_window`, is the
obvious O(n²) one and shares nothing with the limiter that it judges. Everything is offered at once, more than can be
served, so every key is saturated from the first moment to the last.

What the limiter is judged by is real time, and the guard allows for 0.25 s between a departure and its arrival. On a
machine that keeps a process waiting for longer, what was measured says nothing, and is measured again.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from llm import LLMManager
from llm.core import config
from llm.core.settings import LLMSettings, RateLimiterSettings
from llm.middleware.base import Call, Handler, Reply
from llm.testing.journal import Arrival, check_window, peak
from llm.testing.process import SimulatorProcess
from llm.utils.quota import Quota

KEYS = ("key-1", "key-2", "key-3")


def settings(url: str, *, limit: int, window: float, guard: float = 0.25) -> LLMSettings:
    """Three keys of *limit* requests. The configuration refuses a negative *guard*, so it is put in afterwards."""
    provider: dict[str, Any] = {
        "base_url": url,
        "api_keys": list(KEYS),
        "models": "claude-haiku-5-5",
        "rate_limits": {"requests_per_minute": limit, "window_seconds": window},
    }
    read = config.load({"providers": {"anthropic": provider}}, environ={}, warn=print)
    limiter = RateLimiterSettings(guard_seconds=guard)
    return msgspec.structs.replace(read, middleware=msgspec.structs.replace(read.middleware, rate_limiter=limiter))


class Departures:
    """Writes down when each attempt goes out, by the clock that all processes of a machine share."""

    def __init__(self) -> None:
        self.times: defaultdict[str, list[float]] = defaultdict(list)

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        assert call.admission is not None
        self.times[call.admission.key.id].append(time.monotonic())
        return await handler(call)

    def longest_way(self, journal: list[Arrival]) -> float:
        """Seconds between the n-th departure of a key and its n-th arrival, at most."""
        return max(
            arrived - departed
            for number, key in enumerate(KEYS, 1)
            for departed, arrived in zip(
                self.times[f"anthropic/{number}"], (a.time for a in journal if a.key == key), strict=False
            )
        )


async def offer(calls: int, manager: LLMManager, *, seconds: float) -> None:
    """Make all calls at once, and give those up that are not answered after *seconds*."""
    async with manager:
        client = manager.get_client()
        tasks = [asyncio.create_task(client.chat(f"Question {number}")) for number in range(calls)]
        _, waiting = await asyncio.wait(tasks, timeout=seconds)
        for task in waiting:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert not failures, f"{len(failures)} calls failed, the first with {failures[0]!r}"


def journal_of(
    *,
    limit: int,
    window: float,
    seconds: float,
    calls: int,
    ours: int | None = None,
    guard: float = 0.25,
    departures: Departures | None = None,
) -> list[Arrival]:
    """What arrived in *seconds* at a server that allows *limit*, from a client that thinks it allows *ours*."""
    with SimulatorProcess(
        requests_per_minute=limit, window_seconds=window, latency=0.02, arguments=("--no-bodies",)
    ) as simulator:
        chosen = settings(simulator.url, limit=ours or limit, window=window, guard=guard)
        manager = LLMManager(chosen, middleware={"departures": departures or Departures()})
        asyncio.run(offer(calls, manager, seconds=seconds))
    journal = simulator.read_journal()
    return [arrival for arrival in journal if arrival.time < journal[0].time + seconds]


def overfull(journal: list[Arrival], limit: int, window: float) -> int:
    """How many windows of any key, at any offset, hold more than *limit* requests, refused ones included."""
    return sum(check_window([a.time for a in journal if a.key == key], limit, window) for key in KEYS)


def refused(journal: list[Arrival]) -> int:
    return sum(arrival.status == 429 for arrival in journal)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_three_keys_of_fifty_are_full_and_never_overfull(tell: Callable[[str], None]) -> None:
    """1,200 calls at once, 150 s, windows of 25 s: six windows of 150 fit, and are used."""
    journal = journal_of(limit=50, window=25.0, seconds=150.0, calls=1200)

    peaks = [peak(journal, key, 25.0, rejected=True) for key in KEYS]
    tell(f"{len(journal)} of 900 requests, at most {peaks} in any window, {refused(journal)} refused")
    assert overfull(journal, 50, 25.0) == 0
    assert refused(journal) == 0
    assert len(journal) >= 0.98 * 900


@pytest.mark.timeout(150)
def test_short_windows_are_full_and_never_overfull() -> None:
    """The same in 8 s with windows of 2 s: four of 60 fit, also with the guard between them (0, 2.25, 4.5, 6.75)."""
    for _ in range(4):
        departures = Departures()
        journal = journal_of(limit=20, window=2.0, seconds=8.0, calls=320, departures=departures)
        print(f"the longest way took {departures.longest_way(journal):.3f} s")
        if departures.longest_way(journal) < 0.25:
            break

    assert overfull(journal, 20, 2.0) == 0
    assert refused(journal) == 0
    assert len(journal) >= 0.95 * 240


@pytest.mark.parametrize("mistake", [{"ours": 21}, {"guard": -0.5}], ids=["a limit one too high", "a guard below zero"])
def test_the_check_catches(mistake: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With headers kept from the client: they would tell it the limit."""
    monkeypatch.setattr(Quota, "observe", lambda *args, **facts: False)
    journal = journal_of(limit=20, window=2.0, seconds=3.0, calls=150, **mistake)

    assert overfull(journal, 20, 2.0) > 0
    assert refused(journal) > 0
