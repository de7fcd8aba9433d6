"""What admission learns of answers and refusals, and tells of it."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from llm.core.events import LimitAdopted, SharedOwner, SlowStarted
from llm.core.exceptions import LLMRateLimitError, Scope
from llm.core.types import Cost, Counting, LimitState, Message, MessageRole, ObservedLimits, Options, Request, Usage
from llm.middleware.base import Call, Reply
from llm.middleware.logging import LoggingMiddleware
from llm.utils.tokens import TokenEstimator

from .fakes import Bench, Hold, answer, ask, limited, outcome


def told(limit: int, remaining: int, **more: Any) -> ObservedLimits:
    return ObservedLimits(requests=LimitState(limit, remaining), **more)


def telling(bench: Bench, limits: ObservedLimits) -> Any:
    """A provider whose answers' headers say *limits*."""

    async def provider(call: Call) -> Reply:
        reply = bench.leave(call)
        assert call.admission is not None
        if call.admission.wants_limits:
            call.admission.observe(limits=limits)
        return reply

    return provider


def refused(*, retry_after: float | None = 1.0, code: str | None = None) -> LLMRateLimitError:
    return LLMRateLimitError(
        "429", status=429, code=code, retryable=True, retry_after=retry_after, scope=Scope.KEY, key_id="fake/1"
    )


# -- limits ----------------------------------------------------------------------------------------------------------


async def test_a_key_without_limits_adopts_its_vendors_and_says_so_once() -> None:
    bench = Bench(limited(1))
    bench.listen(LimitAdopted)
    for _ in range(3):
        await bench.limiter(ask(), telling(bench, told(5, 4)))
        await bench.clock.advance(1.0)
    assert [(event.dimension, event.limit) for event in bench.told if isinstance(event, LimitAdopted)] == [
        ("requests", 5)
    ]
    assert bench.ledger().request_limit == 5
    tasks = [bench.start(ask(name=str(number))) for number in range(9)]
    await bench.clock.settle()
    assert len(bench.order) <= 5 + 3
    for task in tasks:
        task.cancel()
    await bench.clock.settle()


async def test_what_is_configured_is_lowered_to_what_the_vendor_says_and_never_raised() -> None:
    bench = Bench(limited(1, 10))
    await bench.limiter(ask(), telling(bench, told(1000, 999)))
    assert bench.ledger().request_limit == 10
    await bench.clock.advance(1.0)
    await bench.limiter(ask(), telling(bench, told(4, 2)))
    assert bench.ledger().request_limit == 4


async def test_with_the_layer_switched_off_no_limit_is_learnt_either() -> None:
    bench = Bench(limited(1, 2), enabled=False)
    for _ in range(20):
        await bench.limiter(ask(), telling(bench, told(1, 0)))
    assert bench.clock.now() == 1000.0


async def test_keys_that_share_an_owner_and_not_a_pool_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(limited(1, 9), limited(2, 9), limited(3, 9))
    bench.pool.keys[2].quota_pool = "elsewhere"
    bench.listen(SharedOwner)
    LoggingMiddleware(clock=bench.clock, events=bench.events)
    owner = told(9, 8, owners=("organization org-1",))
    with caplog.at_level(logging.WARNING, "brimful"):
        for _ in range(9):
            await bench.limiter(ask(), telling(bench, owner))
            await bench.clock.advance(1.0)
    pools = [event.pools for event in bench.told if isinstance(event, SharedOwner)]
    assert pools == [("fake/1", "fake/2"), ("fake/1", "elsewhere")]
    assert len(caplog.records) == 2
    assert "organization org-1" in caplog.text


# -- slow starts -------------------------------------------------------------------------------------------------------


async def test_the_first_answer_is_waited_for_before_all_go() -> None:
    bench = Bench(limited(1, 60), slow_start=True)
    bench.listen(SlowStarted)
    hold = Hold(bench)
    tasks = [bench.start(ask(name=str(number)), hold) for number in range(40)]
    await bench.clock.settle()
    assert bench.order == ["0"]
    await bench.clock.advance(0.5)
    assert len(bench.order) == 2, "nobody has answered: twice as many in half a second"
    await hold.let_go("0")
    assert len(bench.order) == 40
    await hold.let_go()
    await asyncio.gather(*tasks)
    assert [type(event) for event in bench.told] == [SlowStarted]


async def test_after_a_refusal_that_nothing_explains_it_goes_slowly_again() -> None:
    bench = Bench(limited(1, 100), limited(2, 0), slow_start=True)
    await bench.fill()

    async def refusing(call: Call) -> Reply:
        bench.leave(call)
        raise refused(retry_after=3.0)

    assert isinstance(await outcome(bench.start(ask(name="refused"), refusing)), LLMRateLimitError)
    hold = Hold(bench)
    tasks = [bench.start(ask(name=str(number)), hold) for number in range(10)]
    await bench.clock.advance(2.9)
    assert bench.order == ["refused"], "the quota rests as long as its vendor asks"
    await bench.clock.advance(0.2)
    assert len(bench.order) == 2
    await hold.let_go()
    await hold.let_go()
    await asyncio.gather(*tasks)


async def test_a_refused_key_rests_with_all_keys_of_its_pool() -> None:
    bench = Bench(limited(1, 100), limited(2, 100), limited(3, 100))
    for key in bench.pool.keys[:2]:
        key.quota_pool = "org"

    async def refusing(call: Call) -> Reply:
        bench.leave(call)
        raise refused(retry_after=10.0)

    await outcome(bench.start(ask(name="refused"), refusing))
    for number in range(6):
        await bench.limiter(ask(name=str(number)), bench.provider)
    assert {key for _, key, name in bench.sent if name != "refused"} == {3}


# -- others who use the quota ------------------------------------------------------------------------------------------


async def test_what_others_use_is_left_to_them_and_comes_back_over_a_window() -> None:
    bench = Bench(limited(1, 100))
    await bench.limiter(ask(), telling(bench, told(100, 39)))
    quota = bench.limiter.statistics()["quotas"]["fake/1"]["*"]
    assert quota["requests"]["foreign"] == pytest.approx(60, abs=1)
    tasks = [bench.start(ask(name=str(number))) for number in range(60)]
    await bench.clock.settle()
    assert len(bench.order) == pytest.approx(39, abs=1)
    await bench.clock.advance(35.0)
    assert len(bench.order) >= 60
    await asyncio.gather(*tasks)


# -- what calls take ---------------------------------------------------------------------------------------------------


async def test_a_prompts_true_size_counts_as_soon_as_it_is_known() -> None:
    bench = Bench(limited(1, None, input_tokens_per_minute=100), cost=Cost(1, 60))
    hold = Hold(bench)

    async def streaming(call: Call) -> Reply:
        assert call.admission is not None
        call.admission.sent()
        call.admission.observe(usage=Usage(20, 0))
        return await hold(call)

    first = bench.start(ask(name="first"), streaming)
    await bench.clock.settle()
    assert bench.ledger().input_used == 20
    await bench.limiter(ask(name="second"), bench.provider)
    await hold.let_go()
    await first


async def test_what_came_from_a_cache_counts_only_where_the_vendor_counts_it() -> None:
    for counting, used in ((Counting(cache_reads=False), 10), (Counting(), 100)):
        bench = Bench(limited(1, None, input_tokens_per_minute=1000), cost=Cost(1, 100), counting=counting)

        async def cached(call: Call, bench: Bench = bench) -> Reply:
            bench.leave(call)
            return answer(100, 0).__class__(text="", model="m", usage=Usage(100, 5, cache_read_tokens=90))

        await bench.limiter(ask(), cached)
        assert bench.ledger().input_used == used


async def test_a_vendor_that_holds_max_tokens_is_charged_with_them() -> None:
    bench = Bench(limited(1, None, tokens_per_minute=1000), cost=Cost(1, 50, 10), counting=Counting(reserve_max=True))
    await bench.limiter(ask(max_tokens=600), bench.provider)
    assert bench.ledger().tokens_used == 600
    late = bench.start(ask(max_tokens=600, name="late"))
    await bench.clock.settle()
    assert not late.done()
    late.cancel()
    await bench.clock.settle()


async def test_an_exact_tokenizer_counts_long_prompts_in_a_thread() -> None:
    class Words:
        def __init__(self) -> None:
            self.threads: list[bool] = []

        def count(self, text: str) -> int:
            self.threads.append(threading.current_thread() is threading.main_thread())
            return len(text.split())

    words = Words()
    bench = Bench(limited(1, None, input_tokens_per_minute=1_000_000), estimator=TokenEstimator(words))
    bench.usage = Usage(0, 0)
    for content in ("three short words", "word " * 10_000):
        call = ask(content)
        await bench.limiter(call, bench.provider)
    assert words.threads == [True, False]
    found = await bench.limiter.estimate(Request((Message(MessageRole.USER, "word " * 10_000),), "", Options()), None)
    assert found.input_tokens > 9_000
