"""The clock that only a test moves."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from llm.testing.clock import FakeClock
from llm.utils.alarms import Alarms
from llm.utils.clock import Clock


def test_it_is_a_clock() -> None:
    clock: Clock = FakeClock()
    assert clock.now() == clock.now()


async def test_time_stands_still_until_it_is_moved() -> None:
    clock = FakeClock(start=50.0, wall=1_000.0)
    await asyncio.sleep(0)
    assert (clock.now(), clock.wall()) == (50.0, 1_000.0)
    await clock.advance(2.5)
    assert (clock.now(), clock.wall()) == (52.5, 1_002.5)


async def test_timers_run_in_order_of_their_instants_and_see_their_own_time() -> None:
    clock = FakeClock(start=0.0)
    seen: list[tuple[str, float]] = []

    def note(name: str) -> None:
        seen.append((name, clock.now()))

    for name, when in (("late", 3.0), ("early", 1.0), ("early too", 1.0), ("never", 9.0)):
        clock.call_at(when, partial(note, name))
    await clock.advance(5.0)
    assert seen == [("early", 1.0), ("early too", 1.0), ("late", 3.0)]
    assert clock.now() == 5.0
    assert clock.timers == 1


async def test_a_timer_of_the_past_runs_without_an_advance() -> None:
    clock = FakeClock(start=10.0)
    seen: list[int] = []
    clock.call_at(9.0, lambda: seen.append(1))
    assert not seen, "it runs on the loop, never inside the call that sets it"
    await asyncio.sleep(0)
    assert seen == [1]


async def test_what_a_timer_sets_in_motion_runs_before_time_goes_on() -> None:
    clock = FakeClock(start=0.0)
    times: list[float] = []

    async def walk() -> None:
        for _ in range(4):
            await clock.sleep(1.0)
            await asyncio.sleep(0)
            times.append(clock.now())

    task = asyncio.create_task(walk())
    await clock.advance(10.0)
    assert task.done()
    assert times == [1.0, 2.0, 3.0, 4.0]


async def test_a_cancelled_timer_does_not_run_even_at_its_own_instant() -> None:
    clock = FakeClock(start=0.0)
    seen: list[str] = []
    second = None

    def first() -> None:
        seen.append("first")
        assert second is not None
        second.cancel()

    clock.call_at(1.0, first)
    second = clock.call_at(1.0, lambda: seen.append("second"))
    third = clock.call_at(2.0, lambda: seen.append("third"))
    third.cancel()
    third.cancel()
    await clock.advance(3.0)
    assert seen == ["first"]
    assert clock.timers == 0


async def test_a_cancelled_sleep_leaves_no_timer() -> None:
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep(100.0))
    await clock.settle()
    assert clock.timers == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.timers == 0


async def test_ten_thousand_cancelled_timers_are_forgotten() -> None:
    clock = FakeClock()
    seen: list[int] = []
    clock.call_at(clock.now() + 5.0, lambda: seen.append(1))
    for _ in range(10_000):
        clock.call_at(clock.now() + 600.0, lambda: seen.append(2)).cancel()
    assert clock.timers == 1
    assert len(clock._timers) < 200
    await clock.advance(1_000.0)
    assert seen == [1]


async def test_sleeping_for_no_time_needs_no_advance() -> None:
    clock = FakeClock()
    await clock.sleep(0.0)
    await clock.sleep(-1.0)
    assert clock.timers == 0


async def test_code_that_spins_does_not_hang_the_clock() -> None:
    clock = FakeClock()

    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    task = asyncio.create_task(spin())
    await clock.advance(1.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_half_an_hour_of_alarms_takes_no_time() -> None:
    clock = FakeClock(start=0.0)
    alarms = Alarms(60.0, clock)
    rung: list[float] = []
    alarms.start(lambda: rung.append(clock.now()))
    for _ in range(30):
        await clock.advance(60.0)
        alarms.start(lambda: rung.append(clock.now()))
    alarms.close()
    assert rung == [60.0 * minute for minute in range(1, 31)]
    assert clock.timers == 0
