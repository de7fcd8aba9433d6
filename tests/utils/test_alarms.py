"""Many timers of one length for the price of one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar

import pytest

from llm.testing.clock import FakeClock
from llm.utils.alarms import Alarms, Limit


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(start=0.0)


@pytest.fixture
def alarms(clock: FakeClock) -> Alarms:
    return Alarms(10.0, clock)


async def test_an_alarm_rings_once_and_in_time(clock: FakeClock, alarms: Alarms) -> None:
    rung: list[float] = []
    alarms.start(lambda: rung.append(clock.now()))
    await clock.advance(9.9)
    assert rung == []
    await clock.advance(100.0)
    assert rung == [10.0]
    assert len(alarms) == 0


async def test_alarms_ring_in_the_order_of_their_start_with_one_timer_for_all(clock: FakeClock, alarms: Alarms) -> None:
    rung: list[tuple[int, float]] = []

    def note(number: int) -> Callable[[], None]:
        return lambda: rung.append((number, clock.now()))

    for number in range(5):
        alarms.start(note(number))
        await clock.advance(1.0)
    assert clock.timers == 1
    await clock.advance(100.0)
    assert rung == [(number, 10.0 + number) for number in range(5)]
    assert clock.timers == 0


async def test_a_cancelled_alarm_is_silent_and_the_next_still_rings(clock: FakeClock, alarms: Alarms) -> None:
    rung: list[float] = []
    first = alarms.start(lambda: rung.append(-1.0))
    await clock.advance(3.0)
    alarms.start(lambda: rung.append(clock.now()))
    first.cancel()
    first.cancel()
    await clock.advance(100.0)
    assert rung == [13.0]


async def test_an_alarm_that_raises_does_not_silence_the_others(clock: FakeClock, alarms: Alarms) -> None:
    rung: list[float] = []
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    alarms.start(lambda: 1 // 0)
    alarms.start(lambda: rung.append(clock.now()))
    await clock.advance(100.0)
    assert rung == [10.0]
    assert [type(error) for error in told] == [ZeroDivisionError]


async def test_an_alarm_started_by_an_alarm_rings_with_no_second_timer(clock: FakeClock, alarms: Alarms) -> None:
    rung: list[float] = []

    def again() -> None:
        rung.append(clock.now())
        if len(rung) < 3:
            alarms.start(again)

    alarms.start(again)
    await clock.advance(10.0)
    assert clock.timers == 1
    await clock.advance(100.0)
    assert rung == [10.0, 20.0, 30.0]
    assert clock.timers == 0


async def test_an_alarm_may_cancel_another_that_rings_with_it(clock: FakeClock, alarms: Alarms) -> None:
    rung: list[str] = []
    alarms.start(lambda: second.cancel())
    second = alarms.start(lambda: rung.append("second"))
    await clock.advance(100.0)
    assert rung == []


async def test_the_shared_timer_keeps_nothing_of_the_call_that_started_it(clock: FakeClock, alarms: Alarms) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="nobody's")
    variable.set("the call's")
    seen: list[str] = []
    alarms.start(lambda: seen.append(variable.get()))
    await clock.advance(100.0)
    assert seen == ["nobody's"]


async def test_closing_leaves_no_timer_and_starting_anew_works(clock: FakeClock, alarms: Alarms) -> None:
    rung: list[float] = []
    alarms.start(lambda: rung.append(-1.0))
    alarms.close()
    alarms.close()
    assert (len(alarms), clock.timers) == (0, 0)
    alarms.start(lambda: rung.append(clock.now()))
    await clock.advance(100.0)
    assert rung == [10.0]


async def test_a_block_that_takes_too_long_raises_timeout_error(clock: FakeClock, alarms: Alarms) -> None:
    async def work() -> None:
        with Limit(alarms):
            await clock.sleep(100.0)

    task = asyncio.create_task(work())
    await clock.advance(10.0)
    with pytest.raises(TimeoutError):
        await task
    assert task.cancelling() == 0
    assert clock.timers == 0


async def test_a_block_in_time_leaves_nothing_behind(clock: FakeClock, alarms: Alarms) -> None:
    async def work() -> str:
        with Limit(alarms):
            await clock.sleep(9.0)
        await clock.sleep(100.0)
        return "done"

    task = asyncio.create_task(work())
    await clock.advance(200.0)
    assert await task == "done"
    assert len(alarms) == 0


async def test_a_cancellation_from_elsewhere_passes_untouched(clock: FakeClock, alarms: Alarms) -> None:
    async def work() -> None:
        with Limit(alarms):
            await clock.sleep(100.0)

    task = asyncio.create_task(work())
    await clock.settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(alarms) == 0


@pytest.mark.parametrize("first", ["limit", "caller"])
async def test_when_both_happen_the_cancellation_wins(clock: FakeClock, alarms: Alarms, first: str) -> None:
    async def work() -> None:
        with Limit(alarms) as limit:
            limits.append(limit)
            await clock.sleep(100.0)

    limits: list[Limit] = []
    task = asyncio.create_task(work())
    await clock.settle()
    for actor in ("limit", "caller") if first == "limit" else ("caller", "limit"):
        if actor == "limit":
            limits[0].expire()
        else:
            task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_of_the_block_passes_even_when_the_time_is_up(clock: FakeClock, alarms: Alarms) -> None:
    async def work() -> None:
        with Limit(alarms):
            try:
                await clock.sleep(100.0)
            except asyncio.CancelledError:
                raise KeyError("while clearing up") from None

    task = asyncio.create_task(work())
    await clock.advance(10.0)
    with pytest.raises(KeyError):
        await task
    assert task.cancelling() == 0


async def test_limits_nest(clock: FakeClock, alarms: Alarms) -> None:
    longer = Alarms(20.0, clock)
    caught: list[str] = []

    async def work() -> None:
        try:
            with Limit(longer):
                try:
                    with Limit(alarms):
                        await clock.sleep(100.0)
                except TimeoutError:
                    caught.append("inner")
                await clock.sleep(100.0)
        except TimeoutError:
            caught.append("outer")

    task = asyncio.create_task(work())
    await clock.advance(50.0)
    await task
    assert caught == ["inner", "outer"]


async def test_without_alarms_only_expire_ends_a_block(clock: FakeClock) -> None:
    async def work() -> None:
        with Limit(None) as limit:
            limits.append(limit)
            await clock.sleep(1_000_000.0)

    limits: list[Limit] = []
    task = asyncio.create_task(work())
    await clock.advance(500_000.0)
    limits[0].expire()
    limits[0].expire()
    with pytest.raises(TimeoutError):
        await task
    limits[0].expire()
    await clock.settle()
    assert task.cancelling() == 0
