"""The real clock. Nothing here measures how long anything took."""

from __future__ import annotations

import asyncio
import time

from llm.utils.clock import SystemClock


async def test_a_timer_for_an_instant_that_has_passed_rings_as_soon_as_it_can() -> None:
    clock, rung = SystemClock(), asyncio.Event()
    clock.call_at(clock.now() - 1000.0, rung.set)
    assert not rung.is_set(), "not before whoever set it has gone on"
    await rung.wait()


async def test_timers_ring_in_the_order_of_their_instants() -> None:
    clock, rung, last = SystemClock(), list[str](), asyncio.Event()
    now = clock.now()
    clock.call_at(now + 0.02, last.set)
    clock.call_at(now + 0.01, lambda: rung.append("second"))
    clock.call_at(now, lambda: rung.append("first"))
    clock.call_at(now, lambda: rung.append("never")).cancel()
    await last.wait()
    assert rung == ["first", "second"]


def test_it_tells_the_monotonic_time_and_the_date() -> None:
    clock = SystemClock()
    before, day = time.monotonic(), time.time()
    assert clock.now() >= before
    assert abs(clock.wall() - day) < 3600.0, "seconds since 1970"
