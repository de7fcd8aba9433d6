"""Admission at its ends: closed, started afresh on another loop, and several things in one tick."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from llm.core.exceptions import LLMDeadlineExceededError, LLMException, LLMPoolExhaustedError, LLMQuotaExhaustedError
from llm.core.types import Cost, LimitState, ObservedLimits, Settlement, Usage
from llm.middleware import rate_limiter
from llm.middleware.base import Call, Reply
from llm.utils.output_predictor import OutputPredictor

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


# -- memory ----------------------------------------------------------------------------------------------------------


async def test_models_without_end_are_forgotten_and_their_books_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limiter, "MAX_AFFINITIES", 3)
    bench = Bench(limited(1, 5))
    for number in range(5):
        await bench.limiter(ask(model=f"model-{number}"), bench.provider)
    assert len(bench.limiter._quota_of) <= 3
    assert used(bench) == 5, "one limit for all of them"
    late = bench.start(ask(model="model-0"))
    await bench.clock.settle()
    assert not late.done()
    await bench.clock.advance(SPAN)
    await late


async def test_routes_that_everybody_has_left_are_swept_while_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limiter, "MIN_COMPACT", 8)
    bench = Bench(limited(1, 1, model="a"), limited(2, 1, model="b"))
    for model in "ab":
        await bench.limiter(ask(model=model, name="filler"), bench.provider)
    head = bench.start(ask(model="a", name="head"))
    left = [bench.start(ask(model="b", name=str(number))) for number in range(40)]
    await bench.clock.settle()
    assert len(bench.limiter._routes) == 2
    for task in left:
        task.cancel()
    await bench.clock.settle()
    for _ in range(20):
        extra = bench.start(ask(model="a"))
        await bench.clock.settle()
        extra.cancel()
        await bench.clock.settle()
    assert len(bench.limiter._routes) == 1
    await bench.clock.advance(SPAN)
    await head
    assert bench.order == ["head"]


# -- overtaking ------------------------------------------------------------------------------------------------------


async def test_nobody_overtakes_while_there_is_no_client() -> None:
    sizes = {"filler 0": 60, "large": 90, "small": 10}
    bench = Bench(
        limited(1, 100, input_tokens_per_minute=100),
        clients=1,
        estimate=lambda request: sizes[request.messages[0].content],
    )
    bench.usage = Usage(0, 0)
    hold = Hold(bench)
    first = bench.start(ask("filler 0", name="filler 0"), hold)
    await bench.clock.settle()
    large, small = (bench.start(ask(name, name=name)) for name in ("large", "small"))
    await bench.clock.settle()
    assert bench.order == []
    await hold.let_go()
    await first
    await bench.clock.settle()
    assert bench.order == ["small"], "it fits beside what was used, and the large one does not"
    await bench.clock.advance(SPAN)
    await asyncio.gather(large, small)


# -- what an attempt tells, early and late -----------------------------------------------------------------------------


class Stream:
    """An answer under way of which a test says how far it is."""

    def __init__(self, *, settled: bool = False) -> None:
        self.settled = settled
        self.received = 0
        self.usage: Usage | None = None
        self.callbacks: list[Any] = []

    def on_settled(self, callback: Any) -> None:
        self.callbacks.append(callback)


async def streaming(bench: Bench, stream: Stream) -> Any:
    """The permit of a call whose answer is *stream*."""
    permits = []

    async def provider(call: Call) -> Reply:
        bench.leave(call)
        permits.append(call.admission)
        return cast(Reply, stream)

    await bench.limiter(ask(), provider)
    return permits[0]


async def test_a_stream_is_counted_while_it_comes_by_its_text_or_by_what_the_vendor_says() -> None:
    bench = Bench(limited(1, 9, output_tokens_per_minute=1000), cost=Cost(1, 10, 100))
    stream = Stream()
    permit = await streaming(bench, stream)
    permit.observe(usage=Usage(10, 1))
    ledger = bench.ledger()
    stream.received = 100
    permit.progress(bench.clock.now())
    assert ledger.output_used == 22, "so many tokens as its text has by experience"
    stream.usage = Usage(10, 70)
    permit.progress(bench.clock.now())
    assert ledger.output_used == 70
    stream.callbacks[0](Settlement(usage=Usage(10, 80), exact=True))
    permit.progress(bench.clock.now())
    assert (ledger.output_used, ledger.open_output) == (80, 0), "what comes after its end changes nothing"


async def test_a_stream_that_ended_before_it_was_followed_is_not_waited_for() -> None:
    bench = Bench(limited(1, 9, output_tokens_per_minute=1000), cost=Cost(1, 10, 100))
    stream = Stream(settled=True)
    permit = await streaming(bench, stream)
    assert bench.quota().streams == set()
    permit.settle(Settlement(usage=Usage(10, 5)))
    assert bench.ledger().output_used == 5


async def test_an_answers_headers_find_what_the_streams_have_made_until_then() -> None:
    bench = Bench(limited(1, 9, output_tokens_per_minute=1000), cost=Cost(1, 10, 100))
    stream = Stream()
    await streaming(bench, stream)
    stream.received = 100
    await bench.clock.advance(2.0)
    told = ObservedLimits(requests=LimitState(9, 7))

    async def answering(call: Call) -> Reply:
        reply = bench.leave(call)
        assert call.admission is not None
        call.admission.observe(limits=told)
        return reply

    await bench.limiter(ask(), answering)
    assert bench.ledger().output_used == 22 + 10


async def test_with_the_layer_switched_off_headers_and_refusals_teach_nothing() -> None:
    bench = Bench(limited(1, 9), enabled=False)

    async def refusing(call: Call) -> Reply:
        bench.leave(call)
        assert call.admission is not None
        call.admission.observe(limits=ObservedLimits(requests=LimitState(3, 0)))
        raise LLMException("429", status=429)

    for _ in range(5):
        with pytest.raises(LLMException):
            await bench.limiter(ask(), refusing)
    assert len(bench.sent) == 5


async def test_a_429_that_is_about_money_starts_nobody_slowly() -> None:
    bench = Bench(limited(1, 9))

    async def refusing(call: Call) -> Reply:
        bench.leave(call)
        raise LLMQuotaExhaustedError("no credit", status=429, retryable=True)

    with pytest.raises(LLMQuotaExhaustedError):
        await bench.limiter(ask(name="filler"), refusing)
    await bench.clock.advance(2.0)
    tasks = [bench.start(ask(name=str(number))) for number in range(8)]
    await bench.clock.settle()
    assert len(bench.order) == 8
    await asyncio.gather(*tasks)


async def test_a_permit_that_has_settled_takes_no_news() -> None:
    bench = Bench(limited(1, 9, input_tokens_per_minute=100), cost=Cost(1, 10))
    stream = Stream()
    permit = await streaming(bench, stream)
    permit.settle(Settlement(usage=Usage(10, 0)))
    permit.observe(usage=Usage(90, 0))
    permit.observe(limits=ObservedLimits(requests=LimitState(1, 0)))
    permit.follow(stream)
    assert (bench.ledger().input_used, bench.ledger().request_limit) == (10, 9)
    assert bench.quota().streams == set()


async def test_a_prompt_that_is_told_before_the_request_was_said_to_have_left_counts_at_once() -> None:
    bench = Bench(limited(1, 9, input_tokens_per_minute=100), cost=Cost(1, 10))

    async def provider(call: Call) -> Reply:
        assert call.admission is not None
        call.admission.observe(usage=Usage(25, 0))
        assert bench.ledger().input_used == 25
        return bench.leave(call)

    bench.usage = Usage(25, 0)
    await bench.limiter(ask(), provider)
    assert bench.ledger().input_used == 25


async def test_where_nobody_else_takes_of_it_output_is_promised_ahead() -> None:
    bench = Bench(limited(1, 99, output_tokens_per_minute=100_000), predictor=OutputPredictor("balanced"))
    stream = Stream()
    permit = await streaming(bench, stream)
    permit.observe(usage=Usage(10, 1))
    await bench.clock.advance(2.0)
    await bench.limiter(ask(), bench.provider)
    ledger = bench.ledger()
    assert (ledger.lead, ledger.speed) == (bench.quota().first_token, bench.limiter._appraiser.predictor.speed("m"))
