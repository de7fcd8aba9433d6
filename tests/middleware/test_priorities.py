"""Who goes when not all can: priorities, tenants, a full queue, large calls and small ones, and the key of a cache."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from llm.core.exceptions import LLMDeadlineExceededError, LLMPoolExhaustedError, LLMRequestTooLargeError
from llm.core.types import Message, MessageRole, Options, Priority, Request, Usage
from llm.middleware.base import Call
from llm.middleware.rate_limiter import OVERTAKERS, OVERTAKING_SECONDS

from .fakes import SPAN, Bench, FakeKey, Guessed, Task, ask, limited, outcome


def asking(
    name: str, *, priority: Priority = Priority.NORMAL, tenant: str = "", content: str = "hello", **more: Any
) -> Call:
    call = ask(content, name=name, **more)
    options = Options(priority=priority, tenant=tenant)
    call.request = Request(call.request.messages, "", options)
    return call


async def after(bench: Bench, seconds: float, tasks: list[Task]) -> list[str]:
    """Who has left by then; the others are given up."""
    await bench.clock.advance(seconds)
    left = bench.order
    for task in tasks:
        task.cancel()
    await bench.clock.settle()
    return left


# -- priorities and tenants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{}, {"weights": {Priority.HIGH: 2.0, Priority.NORMAL: 1.0, Priority.LOW: 1.0}}])
async def test_priorities_share_by_weight_and_nobody_starves(weights: dict[str, Any]) -> None:
    bench = Bench(limited(1, 12), **weights)
    await bench.fill(12)
    tasks = [
        bench.start(asking(priority.value, priority=priority)) for priority in reversed(Priority) for _ in range(60)
    ]
    left = Counter(await after(bench, 5 * SPAN, tasks))
    expected = {"high": 40, "normal": 15, "low": 5} if not weights else {"high": 30, "normal": 15, "low": 15}
    assert sum(left.values()) == 60
    for priority, count in expected.items():
        assert abs(left[priority] - count) <= 2, left


async def test_within_a_priority_and_tenant_it_is_first_come_first_served() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    tasks = [bench.start(asking(str(number), priority=Priority.LOW)) for number in range(5)]
    assert await after(bench, 5 * SPAN, tasks) == ["0", "1", "2", "3", "4"]


async def test_tenants_of_one_priority_share_alike_however_much_each_asks_for() -> None:
    bench = Bench(limited(1, 10))
    await bench.fill(10)
    tasks = [bench.start(asking("large", tenant="large")) for _ in range(100)]
    tasks += [bench.start(asking("small", tenant="small")) for _ in range(10)]
    left = Counter(await after(bench, 2 * SPAN, tasks))
    assert left == {"large": 10, "small": 10}


@pytest.mark.parametrize("scarce", [{"input_tokens_per_minute": 1200}, {"tokens_per_minute": 1200}])
async def test_a_tenants_share_is_by_the_scarcest_limit_and_not_by_calls(scarce: dict[str, Any]) -> None:
    bench = Bench(
        limited(1, None, **scarce),
        predictor=Guessed(0),
        estimate=lambda request: len(request.messages[0].content),
    )
    bench.usage = Usage(100, 0)
    await bench.fill(12)
    long, short = "x" * 300, "x" * 100
    tasks = [bench.start(asking("long", tenant="a", content=long)) for _ in range(20)]
    tasks += [bench.start(asking("short", tenant="b", content=short)) for _ in range(60)]

    left = Counter(await after(bench, 3 * SPAN, tasks))
    assert 2.0 <= left["short"] / left["long"] <= 4.0, left


async def test_who_comes_late_does_not_catch_up_what_it_never_asked_for() -> None:
    bench = Bench(limited(1, 10))
    await bench.fill(10)
    tasks = [bench.start(asking("first", tenant="first")) for _ in range(60)]
    await bench.clock.advance(2 * SPAN)
    tasks += [bench.start(asking("late", tenant="late")) for _ in range(60)]
    before = len(bench.order)
    left = Counter((await after(bench, 2 * SPAN, tasks))[before:])
    assert abs(left["late"] - left["first"]) <= 2


async def test_the_status_tells_who_waits_by_priority_and_tenant() -> None:
    bench = Bench(limited(1, 1))
    await bench.fill()
    tasks = [bench.start(asking("x", priority=Priority.HIGH, tenant="a")) for _ in range(2)]
    tasks += [bench.start(asking("x", priority=Priority.LOW, tenant="b")) for _ in range(3)]
    await bench.clock.settle()
    status = bench.limiter.statistics()
    assert status["queue"] == {"high": {"a": 2}, "low": {"b": 3}}
    assert status["queued"] == 5
    quota = status["quotas"]["fake/1"]["*"]
    assert quota["requests"] == {"used": 1, "foreign": 0, "limit": 1}
    assert quota["next_capacity"] == SPAN
    await after(bench, 0.0, tasks)


# -- a full queue ----------------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_the_lowest_priority_first_and_of_it_the_youngest() -> None:
    bench = Bench(limited(1, 1), max_queue=3)
    await bench.fill()
    low = [bench.start(asking(f"low {number}", priority=Priority.LOW)) for number in range(2)]
    normal = bench.start(asking("normal"))
    await bench.clock.settle()
    for priority in (Priority.LOW, Priority.LOW):
        with pytest.raises(LLMPoolExhaustedError, match="queue is full: 3 calls wait"):
            await bench.limiter(asking("more", priority=priority), bench.provider)
    high = bench.start(asking("high", priority=Priority.HIGH))
    await bench.clock.settle()
    assert isinstance(await outcome(low[1]), LLMPoolExhaustedError)
    another = bench.start(asking("another"))
    await bench.clock.settle()
    assert isinstance(await outcome(low[0]), LLMPoolExhaustedError)
    with pytest.raises(LLMPoolExhaustedError):
        await bench.limiter(asking("of the same"), bench.provider)
    await bench.clock.advance(3 * SPAN)
    await asyncio.gather(normal, high, another)
    assert bench.order[0] == "high"


async def test_nobody_waits_where_nobody_may() -> None:
    bench = Bench(limited(1, 1), max_queue=0)
    await bench.fill()
    with pytest.raises(LLMPoolExhaustedError):
        await bench.limiter(asking("x"), bench.provider)
    await bench.clock.advance(SPAN)
    await bench.limiter(asking("y"), bench.provider)


# -- large and small -------------------------------------------------------------------------------------------------

SIZES = {"large": 90, "small": 20}


def by_size() -> Bench:
    """A key of 100 tokens, 40 of them in use."""
    bench = Bench(
        limited(1, None, input_tokens_per_minute=100), estimate=lambda request: SIZES[request.messages[0].content]
    )
    bench.usage = Usage(20, 0)
    return bench


async def test_a_large_head_is_overtaken_only_so_often() -> None:
    bench = Bench(
        limited(1, None, input_tokens_per_minute=1000),
        estimate=lambda request: {"large": 990, "small": 10}[request.messages[0].content],
    )
    bench.usage = Usage(10, 0)
    for _ in range(2):
        await bench.limiter(asking("filler", content="small"), bench.provider)
    large = bench.start(asking("large", content="large"))
    tasks = []
    for _ in range(OVERTAKERS + 10):
        await bench.clock.advance(1.0)
        tasks.append(bench.start(asking("small", content="small")))
    await bench.clock.settle()
    assert bench.order == ["small"] * OVERTAKERS, "then it is its turn, however many small ones would fit"
    await bench.clock.advance(OVERTAKERS - 10.0 + SPAN)
    assert large.done(), "as soon as all but one of those have gone"
    await after(bench, 0.0, tasks)


async def test_a_large_head_is_overtaken_only_for_so_long() -> None:
    bench = by_size()
    await bench.limiter(asking("filler", content="small"), bench.provider)
    await bench.limiter(asking("filler", content="small"), bench.provider)
    large = bench.start(asking("large", content="large"))
    await bench.clock.advance(OVERTAKING_SECONDS + 1.0)
    small = bench.start(asking("small", content="small"))
    await bench.clock.settle()
    assert not small.done(), "it would be in the window when the large one could go"
    await bench.clock.advance(2 * SPAN)
    await asyncio.gather(large, small)
    assert bench.order == ["large", "small"]


async def test_who_delays_nobody_may_always_pass() -> None:
    sizes = {"half": 50, "large": 60, "small": 10}
    bench = Bench(
        limited(1, None, input_tokens_per_minute=100), estimate=lambda request: sizes[request.messages[0].content]
    )
    bench.usage = Usage(50, 0)
    await bench.limiter(asking("filler", content="half"), bench.provider)
    bench.usage = Usage(10, 0)
    large = bench.start(asking("large", content="large"))
    await bench.clock.advance(OVERTAKING_SECONDS + 1.0)
    # When the half goes, 100 are free: the large one takes 60 of them, and 40 are for whoever is still there.
    small = bench.start(asking("small", content="small"))
    await bench.clock.settle()
    assert small.done()
    await bench.clock.advance(SPAN)
    await large
    assert bench.sent[-1][0] <= 1000.0 + SPAN + 0.25


async def test_nobody_is_overtaken_where_requests_are_what_is_missing() -> None:
    bench = Bench(limited(1, 1), estimate=lambda request: SIZES[request.messages[0].content])
    await bench.limiter(asking("filler", content="small"), bench.provider)
    looked = bench.pool.looked_at
    tasks = [bench.start(asking("large", content="large"))]
    tasks += [bench.start(asking("small", content="small")) for _ in range(50)]
    await bench.clock.settle()
    assert bench.pool.looked_at - looked <= 3, "the head, and no other"
    await after(bench, 0.0, tasks)


# -- the same beginning, the same key ----------------------------------------------------------------------------------


def conversation(name: str, system: str) -> Call:
    call = ask(name=name)
    messages = (Message(MessageRole.SYSTEM, system), Message(MessageRole.USER, name))
    call.request = Request(messages, "", Options())
    return call


async def test_a_long_beginning_goes_to_the_key_that_has_it_cached_while_that_can_take_it() -> None:
    bench = Bench(limited(1, 3), limited(2, 3), limited(3, 3))
    long, other = "You know this book by heart. " * 400, "And this one. " * 800
    for number in range(3):
        await bench.limiter(conversation(f"a{number}", long), bench.provider)
        await bench.limiter(conversation(f"b{number}", other), bench.provider)
    assert [key for _, key, name in bench.sent if name.startswith("a")] == [1, 1, 1]
    assert [key for _, key, name in bench.sent if name.startswith("b")] == [2, 2, 2]
    await bench.limiter(conversation("a3", long), bench.provider)
    assert bench.sent[-1][1] == 3, "a hint: its own key is full"


async def test_short_beginnings_rotate() -> None:
    bench = Bench(limited(1, 3), limited(2, 3), limited(3, 3))
    for number in range(3):
        await bench.limiter(conversation(f"a{number}", "You are helpful."), bench.provider)
    assert [key for _, key, _ in bench.sent] == [1, 2, 3]


# -- deadlines ---------------------------------------------------------------------------------------------------------


async def test_a_waiting_call_is_told_as_soon_as_its_deadline_is_seen_to_be_missed() -> None:
    bench = Bench(limited(1, 2))
    await bench.fill(2)
    waiting = bench.start(asking("waiting", deadline=1000.0 + SPAN + 10.0))
    await bench.clock.advance(5.0)
    assert not waiting.done()
    bench.pool.pause(bench.pool.keys[0], 600.0, after=0.0)
    await bench.clock.advance(1.5)
    error = await outcome(waiting)
    assert isinstance(error, LLMDeadlineExceededError)
    assert error.retry_after is not None
    assert error.retry_after > 500.0
    assert bench.clock.now() < 1010.0


async def test_a_high_priority_does_not_wait_for_the_lower_ones_before_it() -> None:
    bench = Bench(limited(1, 10))
    await bench.fill(10)
    tasks = [bench.start(asking("low", priority=Priority.LOW)) for _ in range(100)]
    await bench.clock.settle()
    # Behind a hundred calls of its own priority it would be ten windows.
    high = bench.start(asking("high", priority=Priority.HIGH, deadline=1000.0 + SPAN + 1.0))
    with pytest.raises(LLMDeadlineExceededError):
        await bench.limiter(asking("low", priority=Priority.LOW, deadline=1000.0 + SPAN + 1.0), bench.provider)
    await bench.clock.advance(SPAN + 0.5)
    await high
    await after(bench, 0.0, tasks)


# -- what a call would cost -----------------------------------------------------------------------------------------


async def test_an_estimate_tells_tokens_and_wait_and_changes_nothing() -> None:
    bench = Bench(limited(1, 2, input_tokens_per_minute=1000))
    request = Request((Message(MessageRole.USER, "x" * 400),), "", Options(max_tokens=100))
    found = await bench.limiter.estimate(request, None)
    assert (found.input_tokens, found.output_tokens, found.wait) == (104, 100, 0.0)
    await bench.fill(2)
    await bench.clock.advance(10.0)
    assert (await bench.limiter.estimate(request, None)).wait == SPAN - 10.0
    assert bench.limiter.statistics()["queued"] == 0
    assert bench.ledger().requests_used == 2
    large = Request((Message(MessageRole.USER, "x" * 8000),), "", Options())
    with pytest.raises(LLMRequestTooLargeError):
        await bench.limiter.estimate(large, None)


# -- pools -------------------------------------------------------------------------------------------------------------


def pooled(number: int, pool: str | None, requests: int, model: str | None = None) -> FakeKey:
    key = limited(number, requests, model)
    key.quota_pool = pool
    return key


async def test_keys_of_one_pool_share_its_limits_and_others_have_their_own() -> None:
    bench = Bench(pooled(1, "org", 3), pooled(2, "org", 3), pooled(3, None, 2))
    tasks = [bench.start(asking(str(number))) for number in range(10)]
    await bench.clock.settle()
    assert len(bench.sent) == 5
    assert sorted(key for _, key, _ in bench.sent).count(3) == 2
    assert {name: list(groups) for name, groups in bench.limiter.statistics()["quotas"].items()} == {
        "org": ["*"],
        "fake/3": ["*"],
    }
    await after(bench, 0.0, tasks)


async def test_models_of_one_group_share_a_limit_and_other_models_have_theirs() -> None:
    bench = Bench(pooled(1, None, 2), group=lambda model: model[:4])
    tasks = [bench.start(asking("x", model=model)) for model in ("opus-1", "opus-2", "opus-3", "haiku-1", "haiku-2")]
    await bench.clock.settle()
    assert len(bench.sent) == 4
    await after(bench, 0.0, tasks)
