"""Admission as a caller sees it: who goes when, on which key, at what price, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from math import inf
from typing import Any, cast

import pytest

from llm.core.events import CallAdmitted, CallQueued
from llm.core.exceptions import (
    LLMAuthenticationError,
    LLMConnectionError,
    LLMDeadlineExceededError,
    LLMException,
    LLMOverloadedError,
    LLMPoolExhaustedError,
    LLMRateLimitError,
    LLMRequestTooLargeError,
)
from llm.core.types import Cost, SettledCallback, Settlement, Usage
from llm.middleware.base import Call, Reply
from llm.middleware.rate_limiter import OVERTAKERS
from llm.testing.journal import check_window

from .fakes import GUARD, SPAN, WINDOW, Bench, Hold, answer, ask, limited, outcome

# -- order -----------------------------------------------------------------------------------------------------------


async def test_first_come_first_served() -> None:
    bench = Bench(limited(1, 2))
    await bench.fill(2)
    tasks = [bench.start(ask(name=name)) for name in "abcde"]
    await bench.clock.advance(SPAN - 0.01)
    assert bench.order == []
    await bench.clock.advance(0.02)
    assert bench.order == ["a", "b"]
    await bench.clock.advance(2 * SPAN)
    assert bench.order == ["a", "b", "c", "d", "e"]
    await asyncio.gather(*tasks)


async def test_a_newcomer_does_not_overtake_the_queue_when_capacity_is_free_for_a_moment() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    old = bench.start(ask(name="old"))
    await bench.clock.settle()
    bench.clock._now += SPAN  # the window is empty, and the timer has not run yet
    new = bench.start(ask(name="new"))
    await bench.clock.advance(SPAN)
    await asyncio.gather(old, new)
    assert bench.order == ["old", "new"]


async def test_calls_that_need_not_wait_rotate_over_the_keys() -> None:
    bench = Bench(limited(1, 9), limited(2, 9), limited(3, 9))
    await bench.fill(7)
    assert bench.pool.admitted == [1, 2, 3, 1, 2, 3, 1]


async def test_full_paused_and_parked_keys_are_skipped() -> None:
    full, paused, parked, free = keys = [limited(1, 1), limited(2, 9), limited(3, 9), limited(4, 9)]
    bench = Bench(*keys)
    await bench.fill(1)
    bench.pool.pause(paused, 30.0)
    bench.pool.park(parked, LLMAuthenticationError("revoked"))
    await bench.fill(3)
    assert bench.pool.admitted == [full.ref.number] + [free.ref.number] * 3


async def test_the_key_is_chosen_when_the_call_can_go_and_not_when_it_comes() -> None:
    first, second = limited(1, 1), limited(2, 1)
    bench = Bench(first, second)
    await bench.fill(2)
    task = bench.start(ask())
    await bench.clock.advance(10.0)
    bench.pool.pause(first, 1000.0)
    await bench.clock.advance(SPAN)
    await task
    assert bench.pool.admitted[-1] == 2


async def test_a_call_goes_out_as_soon_as_a_paused_key_may_be_used_again() -> None:
    key = limited(1, 9)
    bench = Bench(key)
    bench.pool.pause(key, 7.0)
    task = bench.start(ask(name="a"))
    await bench.clock.advance(6.9)
    assert bench.order == []
    await bench.clock.advance(0.2)
    await task
    assert bench.sent[-1][0] == 1007.0


async def test_a_call_for_a_model_goes_only_to_keys_that_have_it() -> None:
    bench = Bench(limited(1, 1, "small"), limited(2, 1, "large"))
    large = [bench.start(ask(model="large", name=f"large {n}")) for n in range(3)]
    small = bench.start(ask(model="small", name="small"))
    await bench.clock.settle()
    assert [(key, name) for _, key, name in bench.sent] == [(2, "large 0"), (1, "small")], (
        "routes that share no key do not wait for each other"
    )
    await bench.clock.advance(2 * SPAN)
    await asyncio.gather(*large, small)
    assert {key for _, key, name in bench.sent if name.startswith("large")} == {2}


async def test_the_model_is_the_calls_own_or_else_the_keys_or_else_the_default() -> None:
    bench = Bench(limited(1, 9, "of the key"), limited(2, 9))
    models = []

    async def provider(call: Call) -> Reply:
        assert call.admission is not None
        models.append(call.admission.model)
        return answer()

    for asked in (None, None, "of the key"):
        await bench.limiter(ask(model=asked), provider)
    assert models == ["of the key", "default", "of the key"]


async def test_an_older_head_that_waits_claims_its_keys() -> None:
    """Else small calls for one model would eat, bit by bit, what a large one is waiting for."""
    bench = Bench(
        limited(1, None, "a", input_tokens_per_minute=100),
        limited(2, None, "b", input_tokens_per_minute=100),
        estimate=lambda request: len(request.messages[0].content),
    )

    async def exact(call: Call) -> Reply:
        bench.leave(call)
        return answer(len(call.request.messages[0].content), 0)

    for model in "ab":
        await bench.limiter(ask("x" * 50, model=model, name="filler"), exact)
    older = bench.start(ask("x" * 80, name="any"), exact)
    younger = bench.start(ask("x" * 40, name="for a", model="a"), exact)
    await bench.clock.advance(SPAN - 0.01)
    assert bench.order == []
    await bench.clock.advance(2 * SPAN)
    await asyncio.gather(older, younger)
    assert bench.order == ["any", "for a"]


async def test_a_younger_call_on_other_keys_passes_an_older_one_that_waits() -> None:
    bench = Bench(limited(1, 1, "a"), limited(2, 5, "b"))
    await bench.fill(1)
    older = bench.start(ask(name="for a", model="a"))
    younger = bench.start(ask(name="for b", model="b"))
    await younger
    assert bench.order == ["for b"]
    older.cancel()
    await bench.clock.settle()


async def test_all_dimensions_are_kept_at_once() -> None:
    bench = Bench(limited(1, 100, input_tokens_per_minute=100), cost=Cost(1, 40, 0))
    bench.usage = Usage(40, 0)
    hold = Hold(bench)
    tasks = [bench.start(ask(name=name), hold) for name in "abc"]
    await bench.clock.settle()
    assert bench.order == ["a", "b"]
    await hold.let_go()
    assert bench.order == ["a", "b"], "of a hundred tokens eighty are used, and c needs forty"
    await bench.clock.advance(SPAN)
    await hold.let_go()
    await asyncio.gather(*tasks)
    assert bench.order == ["a", "b", "c"]


# -- one timer -------------------------------------------------------------------------------------------------------


async def test_a_thousand_waiters_have_one_timer_and_cause_no_work_while_they_wait() -> None:
    bench = Bench(limited(1, 50))
    await bench.fill(50)
    tasks = [bench.start(ask()) for _ in range(1000)]
    await bench.clock.settle()
    assert bench.clock.timers <= 2, "one for the capacity, one for the reports of long waits"
    before = bench.pool.looked_at
    await bench.clock.advance(SPAN - 1.0)
    assert bench.pool.looked_at - before <= 2
    for task in tasks:
        task.cancel()
    await bench.clock.advance(0.0)


async def test_capacity_that_trickles_wakes_at_most_twenty_times_a_second() -> None:
    """1,000 small pieces of input come back in one second, and the head needs all of them."""
    costs = iter([Cost(1, 1)] * 1000 + [Cost(1, 1000)] * 1000)
    bench = Bench(limited(1, None, input_tokens_per_minute=1000), estimate=lambda request: next(costs).input_tokens)

    async def one(call: Call) -> Reply:
        bench.leave(call)
        return answer(1, 0)

    for _ in range(1000):
        await bench.limiter(ask(), one)
        await bench.clock.advance(0.001)
    tasks = [bench.start(ask()) for _ in range(1000)]
    await bench.clock.advance(SPAN - 1.0)
    before = bench.pool.looked_at
    assert len(bench.sent) == 1000
    await bench.clock.advance(1.1)
    assert 4 <= bench.pool.looked_at - before <= 8, "each wake-up looks at the head and at nobody else"
    assert len(bench.sent) == 1001
    for task in tasks:
        task.cancel()
    await bench.clock.settle()


async def test_the_timer_is_set_again_after_a_wake_up_that_admitted_nobody() -> None:
    costs = iter([Cost(1, 50), Cost(1, 50), Cost(1, 100)])
    bench = Bench(limited(1, None, input_tokens_per_minute=100), estimate=lambda request: next(costs).input_tokens)

    async def exact(call: Call) -> Reply:
        bench.leave(call)
        return answer(50, 0)

    await bench.limiter(ask(), exact)
    await bench.clock.advance(20.0)
    await bench.limiter(ask(), exact)
    task = bench.start(ask(name="large"))
    await bench.clock.advance(SPAN - 1.0)
    assert not task.done()
    await bench.clock.advance(1.1)
    await task
    assert bench.sent[-1][0] == 1020.0 + SPAN


# -- deadlines -------------------------------------------------------------------------------------------------------


async def test_a_deadline_that_cannot_be_met_is_refused_on_arrival_and_one_that_can_just_be_is_not() -> None:
    bench = Bench(limited(1, 2), limited(2, 2))
    await bench.fill(4)
    queue = [bench.start(ask(name=f"queue {n}")) for n in range(5)]
    await bench.clock.advance(10.0)
    # Four of the queue go when the window is over; the fifth and then this call go a window later.
    eta = 1000.0 + 2 * SPAN
    with pytest.raises(LLMDeadlineExceededError) as caught:
        await bench.limiter(ask(deadline=eta), bench.provider)
    assert caught.value.retry_after == eta - bench.clock.now()
    assert bench.clock.now() == 1010.0, "told at once"
    just = bench.start(ask(name="just", deadline=eta + 0.01))
    await bench.clock.advance(2 * SPAN)
    await asyncio.gather(just, *queue)
    assert bench.order[-1] == "just"


async def test_a_deadline_may_count_on_a_call_ahead_that_uses_other_keys() -> None:
    bench = Bench(limited(1, 1, "a"), limited(2, 1, "b"))
    await bench.fill(2)
    for_b = [bench.start(ask(model="b")) for _ in range(50)]
    await bench.clock.settle()
    task = bench.start(ask(model="a", name="a", deadline=1000.0 + SPAN + 0.01))
    await bench.clock.advance(SPAN)
    await task
    for other in for_b:
        other.cancel()
    await bench.clock.settle()


async def test_output_that_others_have_only_guessed_refuses_nobody() -> None:
    """Ten calls ahead reserve half a window of output each, and will use next to nothing of it."""
    bench = Bench(limited(1, None, output_tokens_per_minute=1024))
    hold = Hold(bench)
    tasks = [bench.start(ask(name=f"call {n}", deadline=1030.0), hold) for n in range(12)]
    for _ in range(15):
        await bench.clock.advance(1.0)
        await hold.let_go()
    assert len(await asyncio.gather(*tasks)) == 12


async def test_a_deadline_within_a_pause_of_the_only_key_is_refused_on_arrival() -> None:
    key = limited(1, 9)
    bench = Bench(key)
    bench.pool.pause(key, 30.0)
    with pytest.raises(LLMDeadlineExceededError) as caught:
        await bench.limiter(ask(deadline=1010.0), bench.provider)
    assert caught.value.retry_after == 30.0


async def test_a_deadline_that_has_passed_is_refused_although_there_is_capacity() -> None:
    bench = Bench(limited(1, 9))
    with pytest.raises(LLMDeadlineExceededError):
        await bench.limiter(ask(deadline=999.0), bench.provider)
    assert bench.sent == []


async def test_a_deadline_that_passes_in_the_queue_ends_the_wait_at_that_instant() -> None:
    """A refund was hoped for, and nobody gave one."""
    bench = Bench(limited(1, None, output_tokens_per_minute=100), cost=Cost(1, 1, 100))
    hold = Hold(bench)
    holder = bench.start(ask(name="holder"), hold)
    await bench.clock.settle()
    task = bench.start(ask(name="late", deadline=1025.0))
    behind = bench.start(ask(name="behind"))
    await bench.clock.advance(24.9)
    assert not task.done()
    await bench.clock.advance(0.1)
    error = await outcome(task)
    assert isinstance(error, LLMDeadlineExceededError)
    assert "25.0 s in the queue" in str(error)
    await hold.let_go()
    await bench.clock.advance(SPAN)
    await asyncio.gather(holder, behind)
    assert bench.order == ["holder", "behind"]


async def test_capacity_that_returns_shortly_before_a_deadline_is_not_handed_out_after_it() -> None:
    bench = Bench(limited(1, 1), limited(2, 9), clients=1_000_000)
    bench.pool.pause(bench.pool.keys[1], inf)
    await bench.fill()
    task = bench.start(ask(name="a", deadline=1000.0 + SPAN + 0.03))
    # Something happens shortly before: the timer may not be put off beyond the deadline for it.
    await bench.clock.advance(SPAN - 0.01)
    bench.pool.changed()
    await bench.clock.advance(1.0)
    await task


async def test_the_queue_of_a_cancelled_crowd_does_not_count_against_a_deadline() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    crowd = [bench.start(ask()) for _ in range(50)]
    await bench.clock.settle()
    for task in crowd[1:]:
        task.cancel()
    await bench.clock.settle()
    task = bench.start(ask(name="late", deadline=1000.0 + 2 * SPAN + 1.0))
    await bench.clock.advance(2 * SPAN)
    await asyncio.gather(crowd[0], task)


# -- too large, and out of use ---------------------------------------------------------------------------------------


async def test_a_call_larger_than_every_key_is_refused_with_the_figures() -> None:
    bench = Bench(
        limited(1, 9, input_tokens_per_minute=100), limited(2, 9, input_tokens_per_minute=300), cost=Cost(1, 301)
    )
    with pytest.raises(LLMRequestTooLargeError) as caught:
        await bench.limiter(ask(), bench.provider)
    assert (caught.value.dimension, caught.value.need, caught.value.limit) == ("input_tokens", 301, 300)


async def test_a_key_too_small_for_a_call_is_skipped() -> None:
    bench = Bench(
        limited(1, 9, input_tokens_per_minute=100), limited(2, 2, input_tokens_per_minute=300), cost=Cost(1, 101)
    )
    tasks = [bench.start(ask()) for _ in range(3)]
    await bench.clock.advance(SPAN)
    await asyncio.gather(*tasks)
    assert bench.pool.admitted == [2, 2, 2]


async def test_a_large_call_does_not_keep_small_ones_from_a_key_that_it_cannot_use() -> None:
    sizes = {"large": Cost(1, 300), "small": Cost(1, 10)}
    bench = Bench(
        limited(1, 9, input_tokens_per_minute=100),
        limited(2, 9, input_tokens_per_minute=300),
        estimate=lambda request: sizes[request.messages[0].content].input_tokens,
    )
    bench.pool.pause(bench.pool.keys[1], 600.0)
    large = bench.start(ask("large", name="large"))
    small = bench.start(ask("small", name="small"))
    await small
    assert bench.order == ["small"]
    await bench.clock.advance(600.0)
    await large


async def test_a_large_call_whose_only_keys_are_parked_is_told_so_and_blocks_nobody() -> None:
    sizes = {"large": Cost(1, 300), "small": Cost(1, 10)}
    bench = Bench(
        limited(1, 9, input_tokens_per_minute=100),
        limited(2, 1, input_tokens_per_minute=300),
        estimate=lambda request: sizes[request.messages[0].content].input_tokens,
    )
    await bench.fill(0)
    first = bench.start(ask("large"))
    waiting = bench.start(ask("large"))
    await first
    bench.pool.park(bench.pool.keys[1], LLMAuthenticationError("revoked"))
    with pytest.raises(LLMAuthenticationError):
        await waiting
    with pytest.raises(LLMAuthenticationError):
        await bench.limiter(ask("large"), bench.provider)
    await bench.limiter(ask("small"), bench.provider)


async def test_with_all_keys_parked_those_who_wait_and_those_who_come_fail_at_once_with_the_cause() -> None:
    bench = Bench(limited(1, 1), limited(2, 1))
    await bench.fill(2)
    tasks = [bench.start(ask()) for _ in range(3)]
    await bench.clock.settle()
    bench.pool.park(bench.pool.keys[0], LLMAuthenticationError("revoked"))
    await bench.clock.settle()
    assert not any(task.done() for task in tasks)
    bench.pool.park(bench.pool.keys[1], LLMAuthenticationError("revoked too"))
    await bench.clock.settle()
    errors = [await outcome(task) for task in tasks]
    assert [str(error) for error in errors] == ["out of use: revoked too"] * 3
    assert len({id(error) for error in errors}) == 3, "each call has an error of its own"
    with pytest.raises(LLMAuthenticationError):
        await bench.limiter(ask(), bench.provider)
    assert bench.clock.now() == 1000.0


async def test_a_key_that_comes_back_takes_those_who_wait() -> None:
    bench = Bench(limited(1, 1), limited(2, 9))
    bench.pool.park(bench.pool.keys[1], LLMAuthenticationError("revoked"))
    await bench.fill()
    task = bench.start(ask(name="a"))
    await bench.clock.advance(5.0)
    bench.pool.restore(bench.pool.keys[1])
    await task
    assert bench.clock.now() == 1005.0


# -- cancellation ----------------------------------------------------------------------------------------------------


async def test_cancelled_in_the_queue_costs_nothing() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    task = bench.start(ask())
    await bench.clock.settle()
    task.cancel()
    assert isinstance(await outcome(task), asyncio.CancelledError)
    assert bench.queued == 0
    await bench.clock.advance(SPAN)
    assert len(bench.sent) == 1
    await bench.fill()


async def test_a_cancelled_head_wakes_the_next() -> None:
    sizes = {"large": Cost(1, 100), "small": Cost(1, 10)}
    bench = Bench(
        limited(1, None, input_tokens_per_minute=100),
        estimate=lambda request: sizes[request.messages[0].content].input_tokens,
    )
    await bench.limiter(ask("small"), bench.provider)
    large = bench.start(ask("large", name="large"))
    await bench.clock.settle()
    # Nobody may overtake it any more.
    next(iter(bench.limiter._routes.values())).arrived[0].overtaken = OVERTAKERS
    small = bench.start(ask("small", name="small"))
    await bench.clock.settle()
    assert not small.done()
    large.cancel()
    await small
    assert bench.clock.now() == 1000.0


@pytest.mark.parametrize("passes", [0, 1, 2, 3, 4, 5])
async def test_cancelled_at_any_pass_of_the_loop_around_the_grant_gives_everything_back(passes: int) -> None:
    """Granted and cancelled in the same tick, in either order, and every tick before and after."""
    bench = Bench(limited(1, 1, output_tokens_per_minute=1000), clients=1)
    hold = Hold(bench)
    holder = bench.start(ask(name="holder"), hold)
    await bench.clock.settle()
    tasks = [bench.start(ask(name=name)) for name in ("victim", "next")]
    await bench.clock.settle()
    await bench.clock.advance(SPAN - 0.5)
    await hold.let_go()
    assert not bench.pool.in_use
    bench.clock._now += 1.0
    bench.pool.changed()
    for _ in range(passes):
        await asyncio.sleep(0)
    tasks[0].cancel()
    await bench.clock.advance(0.0)
    await bench.clock.advance(SPAN + 1.0)
    await asyncio.gather(holder, tasks[1])
    await outcome(tasks[0])
    ledger = bench.ledger()
    assert bench.queued == 0
    assert not bench.pool.in_use
    assert ledger.open_output == 0
    if "victim" not in bench.order:
        at = next(at for at, _, name in bench.sent if name == "next")
        assert at == 1000.0 + SPAN + 0.5, "what the victim had was handed on at once"
    assert {error for _, error in bench.pool.released} <= {None, asyncio.CancelledError}


async def test_granted_and_cancelled_is_not_reported_to_the_pool_as_a_success() -> None:
    """A key on its way to be given up must not be cleared by a call that it never served."""
    bench = Bench(limited(1, 1))
    await bench.fill()
    task = bench.start(ask())
    await bench.clock.settle()
    bench.clock._now += SPAN
    bench.limiter._pump()
    task.cancel()
    await bench.clock.settle()
    assert bench.pool.released[-1][1] is asyncio.CancelledError
    assert bench.ledger().requests_used == 0


async def test_cancelled_after_it_was_sent_is_paid_and_frees_the_client() -> None:
    bench = Bench(limited(1, 5, input_tokens_per_minute=100), cost=Cost(1, 40), clients=1)
    hold = Hold(bench)
    task = bench.start(ask(), hold)
    await bench.clock.settle()
    task.cancel()
    await outcome(task)
    ledger = bench.ledger()
    assert (ledger.requests_used, ledger.input_used) == (1, 40)
    assert not bench.pool.in_use


@pytest.mark.parametrize("seed", range(20))
async def test_a_random_life_leaves_nothing_behind(seed: int) -> None:
    """Calls of all kinds, cancelled at random, keys that come and go, few clients: the sums are nothing at the end."""
    chance = random.Random(seed)
    bench = Bench(
        limited(1, 5, "a", output_tokens_per_minute=2000), limited(2, 3, "b"), limited(3, 4),
        clients=3, acquire_timeout=20.0,
    )  # fmt: skip

    async def provider(call: Call) -> Reply:
        await bench.clock.sleep(chance.random() * 3)
        reply = bench.leave(call)
        await bench.clock.sleep(chance.random() * 10)
        if chance.random() < 0.3:
            raise chance.choice([LLMOverloadedError("", status=529), LLMConnectionError("")])
        return reply

    tasks = []
    for number in range(150):
        deadline = bench.clock.now() + chance.random() * 200 if chance.random() < 0.5 else None
        tasks.append(
            bench.start(ask(name=f"{number}", model=chance.choice([None, "a", "b"]), deadline=deadline), provider)
        )
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
        if chance.random() < 0.1:
            key = chance.choice(bench.pool.keys)
            key.available_at = bench.clock.now() + chance.random() * 30
            bench.pool.changed()
        await bench.clock.advance(chance.random() * 4)
    await bench.clock.advance(40 * SPAN)
    results = [await outcome(task) for task in tasks]
    assert {type(result).__name__ for result in results} >= {"LLMResponse", "CancelledError"}
    assert_empty(bench)
    for number, limit in ((1, 5), (2, 3), (3, 4)):
        assert check_window([at for at, key, _ in bench.sent if key == number], limit, WINDOW) == 0


def assert_empty(bench: Bench) -> None:
    """Nobody waits, nothing is held, no container and no timer remembers anybody."""
    limiter = bench.limiter
    assert limiter.statistics()["queued"] == 0
    assert not bench.pool.in_use
    assert not limiter._routes
    assert not limiter._deadlines
    assert not limiter._long_waits._pending
    assert not limiter._longer_waits._pending
    assert limiter._timer is None
    for key in bench.pool.keys:
        ledger = bench.ledger(key)
        ledger.expire(bench.clock.now())
        assert (ledger.requests_used, ledger.input_used, ledger.output_used, ledger.open_output) == (0, 0, 0, 0)


async def test_ten_thousand_waiters_that_are_cancelled_leave_nothing_behind() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    tasks = [bench.start(ask(deadline=1_000_000.0 + number)) for number in range(10_000)]
    await bench.clock.advance(5.0)
    assert bench.queued == 10_000
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await bench.clock.advance(SPAN)
    assert_empty(bench)
    await bench.clock.advance(SPAN)
    assert bench.clock.timers == 0


async def test_those_who_were_cancelled_behind_a_living_head_do_not_pile_up() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    bench.pool.pause(bench.pool.keys[0], 1_000_000.0)
    head = bench.start(ask(name="head"))
    for _ in range(100):
        tasks = [bench.start(ask(deadline=3_000_000.0)) for _ in range(100)]
        await bench.clock.settle()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert len(bench.limiter._deadlines) < 300
    assert sum(len(line.waiters) for route in bench.limiter._routes.values() for line in route.lines.values()) < 300
    head.cancel()
    await bench.clock.settle()


async def test_those_who_were_admitted_long_before_their_deadline_do_not_pile_up() -> None:
    bench = Bench(limited(1, 50))
    await bench.fill(50)
    tasks = [bench.start(ask(deadline=1_000_000.0)) for _ in range(1000)]
    await bench.clock.advance(10 * SPAN)
    assert len(bench.order) == 500
    assert len(bench.limiter._deadlines) <= 1100
    await bench.clock.advance(9 * SPAN)
    assert bench.queued == 50
    assert len(bench.limiter._deadlines) <= 120
    await bench.clock.advance(SPAN)
    await asyncio.gather(*tasks)
    assert_empty_queues(bench)


def assert_empty_queues(bench: Bench) -> None:
    assert not bench.limiter._routes
    assert not bench.limiter._deadlines


# -- what attempts cost ----------------------------------------------------------------------------------------------


async def test_an_answers_usage_corrects_what_was_reserved() -> None:
    bench = Bench(limited(1, None, input_tokens_per_minute=100, output_tokens_per_minute=100), cost=Cost(1, 60, 60))

    async def frugal(call: Call) -> Reply:
        bench.leave(call)
        return answer(20, 30)

    await bench.limiter(ask(name="first"), frugal)
    usage = bench.limiter.statistics()["quotas"]["fake/1"]["*"]
    assert usage["requests"] == {"used": 1, "foreign": 0, "limit": None}
    assert usage["input_tokens"] == {"used": 20, "foreign": 0, "limit": 100}
    assert usage["output_tokens"] == {"used": 30, "foreign": 0, "limit": 100, "reserved": 0}
    await bench.limiter(ask(name="second"), frugal)
    assert bench.clock.now() == 1000.0, "what the first did not use is free at once"


async def test_output_stays_reserved_until_the_answers_end_however_long_it_takes() -> None:
    bench = Bench(limited(1, None, output_tokens_per_minute=100), cost=Cost(1, 0, 60))
    hold = Hold(bench)
    first = bench.start(ask(name="first"), hold)
    second = bench.start(ask(name="second"))
    await bench.clock.advance(10 * SPAN)
    assert bench.order == ["first"]
    await hold.let_go()
    await asyncio.gather(first, second)
    assert bench.sent[-1][0] == 1000.0 + 10 * SPAN


async def test_a_request_that_never_left_is_given_back_at_once() -> None:
    bench = Bench(limited(1, 1))

    async def unreachable(call: Call) -> Reply:
        raise LLMConnectionError("refused")

    for _ in range(100):
        with pytest.raises(LLMConnectionError):
            await bench.limiter(ask(), unreachable)
    await bench.limiter(ask(), bench.provider)
    assert bench.clock.now() == 1000.0


async def test_the_window_begins_when_the_request_leaves() -> None:
    """Fifty seconds for a connection, and the vendor counts from then."""
    bench = Bench(limited(1, 1))

    async def slow(call: Call) -> Reply:
        await bench.clock.sleep(50.0)
        return bench.leave(call)

    task = bench.start(ask(name="slow"), slow)
    await bench.clock.settle()
    other = bench.start(ask(name="other"))
    await bench.clock.advance(3 * SPAN)
    await asyncio.gather(task, other)
    assert [at for at, _, _ in bench.sent] == [1050.0, 1050.0 + SPAN]


# -- renewal ---------------------------------------------------------------------------------------------------------


async def test_a_renewal_goes_before_everybody_who_came_later() -> None:
    """Also that of a call which did not have to wait for its first permit."""
    bench = Bench(limited(1, 1))

    async def twice(call: Call) -> Reply:
        assert call.admission is not None
        bench.leave(call)
        call.admission.settle(Settlement(error=LLMOverloadedError("", status=529)))
        await bench.clock.sleep(5.0)
        await call.admission.renew(call)
        return bench.leave(call)

    first = bench.start(ask(name="first"), twice)
    await bench.clock.settle()
    others = [bench.start(ask(name=f"other {n}")) for n in range(3)]
    await bench.clock.advance(4 * SPAN)
    await asyncio.gather(first, *others)
    assert bench.order == ["first", "first", "other 0", "other 1", "other 2"]


async def test_renewals_among_themselves_keep_the_order_of_their_tickets() -> None:
    bench = Bench(limited(1, 3))
    await bench.clock.settle()
    delays = {"a": 3.0, "b": 1.0, "c": 2.0}

    async def twice(call: Call) -> Reply:
        assert call.admission is not None
        bench.leave(call)
        call.admission.settle(Settlement(error=LLMOverloadedError("", status=529)))
        await bench.clock.sleep(delays[call.id])
        await call.admission.renew(call)
        return bench.leave(call)

    tasks = [bench.start(ask(name=name), twice) for name in "abc"]
    await bench.clock.settle()
    tasks += [bench.start(ask(name=name)) for name in "de"]
    await bench.clock.advance(2 * SPAN)
    await asyncio.gather(*tasks)
    assert bench.order == ["a", "b", "c", "a", "b", "c", "d", "e"]


async def test_settling_is_idempotent_also_after_a_renewal_that_failed() -> None:
    bench = Bench(limited(1, 5), clients=1)

    async def handler(call: Call) -> Reply:
        admission = call.admission
        assert admission is not None
        bench.leave(call)
        admission.settle(Settlement(error=LLMAuthenticationError("revoked", status=401)))
        admission.settle(Settlement(error=LLMAuthenticationError("revoked", status=401)))
        await admission.renew(call)
        raise AssertionError("the only key is parked")

    with pytest.raises(LLMAuthenticationError, match="out of use"):
        await bench.limiter(ask(), handler)
    assert len(bench.pool.released) == 1, "the client was given back once"
    assert bench.ledger().requests_used == 1


async def test_a_renewal_that_was_not_settled_before_gives_back_what_it_held() -> None:
    """A layer of the user's that repeats in its own way must not use the pool up."""
    bench = Bench(limited(1, 50), clients=1)

    async def careless(call: Call) -> Reply:
        assert call.admission is not None
        for _ in range(3):
            bench.leave(call)
            await call.admission.renew(call)
        return bench.leave(call)

    await bench.limiter(ask(), careless)
    assert not bench.pool.in_use
    assert bench.ledger().requests_used == 4, "each attempt pays"


async def test_cancelled_while_it_waits_for_a_renewal_gives_back_nothing_twice() -> None:
    bench = Bench(limited(1, 1), clients=1)

    async def handler(call: Call) -> Reply:
        assert call.admission is not None
        bench.leave(call)
        call.admission.settle(Settlement(error=LLMOverloadedError("", status=529)))
        await call.admission.renew(call)
        raise AssertionError

    task = bench.start(ask(), handler)
    await bench.clock.advance(1.0)
    task.cancel()
    await outcome(task)
    assert len(bench.pool.released) == 1
    await bench.clock.advance(SPAN)
    assert_empty(bench)


# -- clients ---------------------------------------------------------------------------------------------------------


async def test_calls_wait_for_a_free_client_and_go_in_order() -> None:
    bench = Bench(limited(1), clients=2)
    hold = Hold(bench)
    tasks = [bench.start(ask(name=name), hold) for name in "abcd"]
    await bench.clock.settle()
    assert bench.order == ["a", "b"]
    await hold.let_go("b")
    assert bench.order == ["a", "b", "c"]
    await hold.let_go("a", "c")
    await hold.let_go()
    await asyncio.gather(*tasks)
    assert bench.order == ["a", "b", "c", "d"]


async def test_switched_off_no_limit_binds_and_calls_still_wait_for_clients() -> None:
    bench = Bench(limited(1, 1, input_tokens_per_minute=1), clients=2, enabled=False)
    hold = Hold(bench)
    tasks = [bench.start(ask("x" * 1000, name=name), hold) for name in "abc"]
    await bench.clock.settle()
    assert bench.order == ["a", "b"]
    await hold.let_go()
    assert bench.order == ["a", "b", "c"]
    await hold.let_go()
    await asyncio.gather(*tasks)


async def test_a_call_that_only_lacks_a_client_waits_no_longer_than_the_acquire_timeout() -> None:
    bench = Bench(limited(1), clients=1, acquire_timeout=10.0)
    hold = Hold(bench)
    holder = bench.start(ask(name="holder"), hold)
    await bench.clock.settle()
    first = bench.start(ask(name="first"))
    await bench.clock.advance(4.0)
    second = bench.start(ask(name="second"))
    await bench.clock.advance(5.9)
    assert not first.done()
    await bench.clock.advance(0.2)
    assert isinstance(await outcome(first), LLMPoolExhaustedError)
    assert not second.done()
    await bench.clock.advance(3.0)
    assert not second.done()
    await bench.clock.advance(1.0)
    assert isinstance(await outcome(second), LLMPoolExhaustedError)
    await hold.let_go()
    await holder
    await bench.fill()


async def test_time_spent_on_limits_does_not_count_as_waiting_for_a_client() -> None:
    bench = Bench(limited(1, 2), clients=1, acquire_timeout=10.0)
    hold = Hold(bench)
    await bench.fill(1)
    holder = bench.start(ask(name="holder"), hold)
    await bench.clock.settle()
    # Both requests of this window are used: there is no client, and no capacity either.
    task = bench.start(ask(name="patient"))
    await bench.clock.advance(SPAN + 9.0)
    assert not task.done(), "for nine seconds now nothing but the client is missing"
    await bench.clock.advance(0.9)
    assert not task.done()
    await bench.clock.advance(0.2)
    assert isinstance(await outcome(task), LLMPoolExhaustedError)
    await hold.let_go()
    await holder


async def test_one_routes_lack_of_clients_is_not_counted_against_another_route() -> None:
    bench = Bench(limited(1, 1, "full"), limited(2, None, "free"), clients=1, acquire_timeout=10.0)
    await bench.limiter(ask(model="full"), bench.provider)
    hold = Hold(bench)
    holder = bench.start(ask(model="free", name="holder"), hold)
    await bench.clock.settle()
    full = bench.start(ask(model="full", name="full"))
    starved = bench.start(ask(model="free", name="starved"))
    await bench.clock.advance(30.0)
    assert isinstance(await outcome(starved), LLMPoolExhaustedError)
    assert not full.done()
    await hold.let_go()
    await bench.clock.advance(SPAN)
    await asyncio.gather(holder, full)


async def test_a_renewal_at_the_head_does_not_hide_those_behind_it_whose_patience_is_over() -> None:
    bench = Bench(limited(1), clients=2, acquire_timeout=10.0)
    hold = Hold(bench)
    holder = bench.start(ask(name="holder"), hold)

    async def twice(call: Call) -> Reply:
        assert call.admission is not None
        bench.leave(call)
        await bench.clock.sleep(8.0)
        call.admission.settle(Settlement(error=LLMOverloadedError("", status=529)))
        # Its client is taken by the first in the queue; it comes back to the head, with all its patience.
        await bench.clock.sleep(1.0)
        await call.admission.renew(call)
        return bench.leave(call)

    renewed = bench.start(ask(name="renewed"), twice)
    await bench.clock.settle()
    third = bench.start(ask(name="third"), hold)
    fourth = bench.start(ask(name="fourth"))
    await bench.clock.advance(9.9)
    assert bench.order == ["holder", "renewed", "third"]
    assert not fourth.done()
    await bench.clock.advance(0.2)
    assert isinstance(await outcome(fourth), LLMPoolExhaustedError)
    assert not renewed.done()
    await hold.let_go()
    await asyncio.gather(holder, renewed, third)
    assert_empty_queues(bench)


async def test_a_client_that_a_failed_call_held_is_free() -> None:
    bench = Bench(limited(1), clients=1)

    async def bug(call: Call) -> Reply:
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await bench.limiter(ask(), bug)
    assert not bench.pool.in_use


async def test_a_stream_holds_its_client_until_it_has_settled() -> None:
    """It may settle in the reader's own time, in a timer or in a finaliser."""
    bench = Bench(limited(1, 9, output_tokens_per_minute=1000), clients=1)
    callbacks: list[SettledCallback] = []

    class Stream:
        settled = False
        received = 0
        usage = None

        def on_settled(self, callback: SettledCallback) -> None:
            callbacks.append(callback)

    async def streaming(call: Call) -> Reply:
        bench.leave(call)
        return cast(Reply, Stream())

    await bench.limiter(ask(name="stream"), streaming)
    waiting = bench.start(ask(name="next"))
    await bench.clock.advance(5.0)
    assert bench.order == ["stream"]
    ledger = bench.ledger()
    assert ledger.open_output == 512
    for _ in range(2):
        callbacks[0](Settlement(usage=Usage(7, 70), exact=True))
    await waiting
    assert (ledger.input_used, ledger.output_used, ledger.open_output) == (17, 80, 0)


async def test_many_attempts_that_found_no_client_leave_no_trace_in_the_ledger() -> None:
    bench = Bench(limited(1, 100), clients=1)
    hold = Hold(bench)
    tasks = [bench.start(ask(name=f"{n}"), hold) for n in range(3)]
    await bench.clock.settle()
    for _ in range(1000):
        bench.pool.changed()
        await asyncio.sleep(0)
    ledger = bench.ledger()
    assert len(ledger._log) == 1
    for _ in tasks:
        await hold.let_go()
    await asyncio.gather(*tasks)


# -- reports, closing ------------------------------------------------------------------------------------------------


async def test_a_long_wait_is_reported_after_two_seconds_and_then_once_a_minute() -> None:
    bench = Bench(limited(1, 1))
    bench.listen(CallQueued)
    await bench.fill()
    tasks = [bench.start(ask(name=name)) for name in "abc"]
    await bench.clock.advance(1.9)
    assert bench.told == []
    await bench.clock.advance(0.2)
    reports = [(event.call_id, event.waited, event.ahead) for event in bench.told if isinstance(event, CallQueued)]
    assert reports == [("a", 2.0, 0), ("b", 2.0, 1), ("c", 2.0, 2)]
    tasks[0].cancel()
    bench.told.clear()
    await bench.clock.advance(2 * SPAN - 5.0)
    reports = [(event.call_id, event.waited, event.ahead) for event in bench.told if isinstance(event, CallQueued)]
    assert reports == [("c", 62.0, 0)]
    await bench.clock.advance(SPAN)
    await asyncio.gather(*tasks[1:])
    bench.told.clear()
    await bench.clock.advance(10 * SPAN)
    assert bench.told == []


async def test_an_admission_tells_how_long_the_call_has_waited() -> None:
    bench = Bench(limited(1, 1))
    bench.listen(CallAdmitted)
    await bench.fill()
    call = ask(name="a", model="m")
    task = bench.start(call)
    await bench.clock.advance(SPAN)
    await task
    first, second = bench.told
    assert isinstance(first, CallAdmitted)
    assert (first.at, first.waited) == (1000.0, 0.0)
    assert isinstance(second, CallAdmitted)
    assert (second.at, second.waited, second.key_id, second.model) == (1000.0 + SPAN, SPAN, "fake/1", "m")
    assert call.queued == SPAN


async def test_closing_fails_those_who_wait_and_those_who_come_and_stops_every_timer() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    tasks = [bench.start(ask(deadline=1e6)) for _ in range(5)]
    await bench.clock.advance(3.0)
    bench.limiter.close()
    errors = [await outcome(task) for task in tasks]
    assert all(isinstance(error, LLMPoolExhaustedError) for error in errors)
    assert bench.clock.timers == 0
    with pytest.raises(LLMPoolExhaustedError, match="closed"):
        await bench.limiter(ask(), bench.provider)
    assert_empty_queues(bench)
    bench.limiter.close()


async def test_closing_in_the_tick_of_a_cancellation_is_quiet() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    task = bench.start(ask())
    await bench.clock.settle()
    task.cancel()
    bench.limiter.close()
    assert isinstance(await outcome(task), asyncio.CancelledError)


async def test_a_pool_that_reports_a_change_while_it_takes_a_client_back_loses_nobody() -> None:
    """The 429 of one call pauses its key from inside the release; the queue moves to the other."""
    bench = Bench(limited(1, 9), limited(2, 9), clients=1)
    hold = Hold(bench)

    async def refused(call: Call) -> Reply:
        await hold(call)
        raise LLMRateLimitError("slow down", status=429, retry_after=20.0)

    first = bench.start(ask(name="first"), refused)
    await bench.clock.settle()
    others = [bench.start(ask(name=name)) for name in "ab"]
    await bench.clock.settle()
    await hold.let_go()
    assert isinstance(await outcome(first), LLMRateLimitError)
    await asyncio.gather(*others)
    assert [key for _, key, _ in bench.sent] == [1, 2, 2]


# -- nothing keeps a prompt alive ------------------------------------------------------------------------------------


class Prompt(str):
    """A string that can be watched."""

    __slots__ = ("__weakref__",)


class Watch:
    """Calls whose prompts must be gone when the calls are, without a collection."""

    def __init__(self) -> None:
        self.prompts: list[weakref.ref[Prompt]] = []

    def ask(self, **facts: Any) -> Call:
        prompt = Prompt("a prompt")
        self.prompts.append(weakref.ref(prompt))
        return ask(prompt, **facts)

    @property
    def alive(self) -> int:
        return sum(1 for prompt in self.prompts if prompt() is not None)


async def failing(bench: Bench, call: Call) -> str:
    """The name of the error, with nothing kept of it."""
    try:
        await bench.limiter(call, bench.provider)
    except (LLMException, asyncio.CancelledError) as error:
        return type(error).__name__
    return ""


@pytest.fixture
def no_collector() -> Any:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
async def test_a_call_that_is_refused_leaves_its_prompt_to_nobody() -> None:
    watch = Watch()
    bench = Bench(limited(1, 1, input_tokens_per_minute=1000))
    await bench.fill()
    assert await failing(bench, watch.ask(deadline=1010.0)) == "LLMDeadlineExceededError"
    bench.pool.park(bench.pool.keys[0], LLMAuthenticationError("revoked"))
    assert await failing(bench, watch.ask()) == "LLMAuthenticationError"
    bench.pool.restore(bench.pool.keys[0])
    small = Bench(limited(1, 1, input_tokens_per_minute=1))
    assert await failing(small, watch.ask()) == "LLMRequestTooLargeError"
    bench.limiter.close()
    assert await failing(bench, watch.ask()) == "LLMPoolExhaustedError"
    assert watch.alive == 0


@pytest.mark.usefixtures("no_collector")
async def test_a_call_that_leaves_the_queue_takes_its_prompt_with_it() -> None:
    """Cancelled, too late, refused, starved or admitted: behind a head that stays, and with a deadline far away."""
    watch = Watch()
    bench = Bench(limited(1, 1, "a"), limited(2, 1, "b"), limited(3, None, "c"), clients=2, acquire_timeout=30.0)
    await bench.limiter(ask(model="a"), bench.provider)
    await bench.limiter(ask(model="b"), bench.provider)
    bench.pool.pause(bench.pool.keys[0], 70.0)
    hold = Hold(bench)
    heads = [bench.start(ask(model=model, name=f"head {model}")) for model in "ab"]
    holders = [bench.start(ask(model="c", name=f"holder {number}"), hold) for number in range(2)]
    await bench.clock.settle()

    async def run(call: Call) -> str:
        return await failing(bench, call)

    loop = asyncio.get_running_loop()
    cancelled = loop.create_task(run(watch.ask(model="a", deadline=1e6)))
    parked = loop.create_task(run(watch.ask(model="b", deadline=1e6)))
    starved = loop.create_task(run(watch.ask(model="c", deadline=1e6)))
    await bench.clock.advance(3.0)
    cancelled.cancel()
    bench.pool.park(bench.pool.keys[1], LLMAuthenticationError("revoked"))
    await bench.clock.advance(40.0)
    assert [await task for task in (cancelled, parked, starved)] == [
        "CancelledError",
        "LLMAuthenticationError",
        "LLMPoolExhaustedError",
    ]
    del cancelled, parked, starved
    assert watch.alive == 0
    admitted = loop.create_task(run(watch.ask(model="c", deadline=1e6)))
    await bench.clock.settle()
    await hold.let_go()
    assert await admitted == ""
    del admitted
    assert watch.alive == 0
    await bench.clock.advance(SPAN)
    assert [type(await outcome(head)).__name__ for head in heads] == ["LLMResponse", "LLMAuthenticationError"]
    await asyncio.gather(*holders)


# -- half an hour ----------------------------------------------------------------------------------------------------

KEYS, REQUESTS, MINUTES = 3, 50, 30


async def saturated(*, limit: int = REQUESTS, guard: float = GUARD) -> dict[int, list[float]]:
    """When each key was used in half an hour of more work than it can do; the vendor counts a little later."""
    chance = random.Random(7)
    bench = Bench(*(limited(number + 1, limit) for number in range(KEYS)), guard=guard)
    arrivals: dict[int, list[float]] = {number + 1: [] for number in range(KEYS)}

    async def provider(call: Call) -> Reply:
        reply = bench.leave(call)
        assert call.admission is not None
        arrivals[call.admission.key.number].append(bench.clock.now() + 0.03 + 0.1 * chance.random())
        await bench.clock.sleep(0.5 + chance.random())
        return reply

    async def worker() -> None:
        while True:
            await bench.limiter(ask(), provider)

    workers = [asyncio.get_running_loop().create_task(worker()) for _ in range(400)]
    await bench.clock.advance(MINUTES * 60.0)
    for task in workers:
        task.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    return arrivals


async def test_half_an_hour_at_the_limit_never_fills_a_window_and_hardly_leaves_one_unfilled() -> None:
    arrivals = await saturated()
    for times in arrivals.values():
        assert check_window(times, REQUESTS, WINDOW) == 0
    # All at once at 0, 60, … 1,740 seconds: no strict window admits more before the half hour is over.
    possible = KEYS * REQUESTS * MINUTES
    assert sum(map(len, arrivals.values())) >= 0.98 * possible


@pytest.mark.parametrize(
    "fault", [{"limit": REQUESTS + 1}, {"guard": -0.25}], ids=["one request more", "a negative guard"]
)
async def test_the_check_would_have_found_a_fault(fault: dict[str, Any]) -> None:
    arrivals = await saturated(**fault)
    assert all(check_window(times, REQUESTS, WINDOW) > 0 for times in arrivals.values())
