"""Admission at its ends: closed, started afresh on another loop, and several things in one tick."""

from __future__ import annotations

import asyncio

from llm.core.exceptions import LLMDeadlineExceededError, LLMPoolExhaustedError
from llm.core.types import Settlement
from llm.middleware.base import Call, Reply

from .fakes import SPAN, Bench, Hold, answer, ask, limited, outcome


def used(bench: Bench) -> int:
    ledger = bench.ledger()
    ledger.expire(bench.clock.now())
    return ledger.requests_used


async def test_it_shows_how_many_wait_for_how_many_keys() -> None:
    bench = Bench(limited(1, 1), limited(2, 1))
    await bench.fill(2)
    task = bench.start(ask("a private matter"))
    await bench.clock.settle()
    assert repr(bench.limiter) == "<RateLimitMiddleware: 1 queued, 2 quotas>"
    await bench.clock.advance(SPAN)
    await task


# -- closing ---------------------------------------------------------------------------------------------------------


async def test_closing_passes_over_those_who_have_left_the_queue() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    first, second, third = (bench.start(ask(name=name)) for name in "abc")
    await bench.clock.settle()
    second.cancel()
    await bench.clock.settle()
    bench.limiter.close()
    assert [type(await outcome(task)) for task in (first, second, third)] == [
        LLMPoolExhaustedError,
        asyncio.CancelledError,
        LLMPoolExhaustedError,
    ]
    assert bench.queued == 0


async def test_nobody_is_admitted_after_closing_although_a_key_has_just_come_back() -> None:
    key = limited(1, 9)
    bench = Bench(key)
    bench.pool.pause(key, 100.0)
    task = bench.start(ask())
    await bench.clock.settle()
    bench.pool.restore(key)
    bench.limiter.close()
    assert isinstance(await outcome(task), LLMPoolExhaustedError)
    await bench.clock.advance(SPAN)
    assert bench.sent == []
    assert bench.clock.timers == 0


# -- another loop ----------------------------------------------------------------------------------------------------


async def test_started_afresh_nobody_waits_and_what_was_used_stays_used() -> None:
    bench = Bench(limited(1, 2), acquire_timeout=5.0)
    await bench.fill()
    hold = Hold(bench)
    flying = bench.start(ask(name="flying"), hold)
    waiting = [bench.start(ask(name="old", deadline=1e6)) for _ in range(3)]
    await bench.clock.settle()
    assert repr(bench.limiter) == "<RateLimitMiddleware: 3 queued, 1 quotas>"
    bench.limiter.start_afresh()
    assert bench.queued == 0
    assert bench.clock.timers == 0
    assert used(bench) == 2
    await bench.clock.advance(10.0)
    new = bench.start(ask(name="new"))
    await bench.clock.advance(SPAN - 10.1)
    assert bench.order == ["flying"], "the new one pays for what the old loop has sent"
    await bench.clock.advance(0.2)
    await new
    assert bench.order == ["flying", "new"]
    # On a loop that has really gone these would never run again; here they do, and do no harm.
    await hold.let_go()
    await flying
    for task in waiting:
        task.cancel()
    await bench.clock.settle()
    assert bench.queued == 0
    assert used(bench) == 1


# -- in one tick -----------------------------------------------------------------------------------------------------


async def test_capacity_that_returns_in_the_tick_of_another_change_is_given_out_once() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    bench.clock.call_at(1000.0 + SPAN, bench.pool.changed)
    tasks = [bench.start(ask(name=name)) for name in "ab"]
    await bench.clock.advance(SPAN)
    assert bench.order == ["a"]
    await bench.clock.advance(SPAN)
    await asyncio.gather(*tasks)
    assert bench.order == ["a", "b"]


async def test_a_deadline_that_passes_while_the_loop_is_blocked_fails_only_who_still_waits() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    # One that has no deadline keeps the queue alive.
    deadlines = {"a": 1000.0 + SPAN + 50.0, "b": 1000.0 + 2 * SPAN + 50.0, "c": None}
    gone, late, patient = (bench.start(ask(name=name, deadline=at)) for name, at in deadlines.items())
    await bench.clock.settle()
    bench.clock._now += 2 * SPAN + 100.0
    gone.cancel()
    await bench.clock.settle()
    assert isinstance(await outcome(gone), asyncio.CancelledError)
    assert isinstance(await outcome(late), LLMDeadlineExceededError)
    await patient
    assert bench.order == ["c"]


async def test_who_says_that_it_was_sent_after_it_was_settled_pays_nothing_more() -> None:
    bench = Bench(limited(1, 2))

    async def given_up(call: Call) -> Reply:
        assert call.admission is not None
        call.admission.settle(Settlement(error=asyncio.CancelledError()))
        call.admission.sent()
        return answer(10, 10)

    await bench.limiter(ask(), given_up)
    assert used(bench) == 0
    assert bench.pool.released == [(1, asyncio.CancelledError)]
