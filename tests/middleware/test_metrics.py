"""Metrics: calls, attempts, tokens and times, checked to the number."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from llm.core.exceptions import LLMConnectionError, LLMException
from llm.core.types import KeyRef, LLMResponse, Message, MessageRole, Request, Usage
from llm.middleware.base import Call
from llm.middleware.metrics import MAX_NAMES, MetricsMiddleware
from llm.testing.clock import FakeClock
from llm.testing.transport import Scripted
from tests.core.rig import (
    END,
    JSON,
    PROMPT,
    Rig,
    answer,
    configuration,
    delta,
    failure,
    key_of,
    model_of,
    rig,
    secret,
    stream,
)


def metrics(r: Rig) -> dict[str, Any]:
    found: dict[str, Any] = r.manager.get_status()["metrics"]
    return found


async def test_before_the_first_call_everything_is_zero() -> None:
    async with rig() as r:
        assert metrics(r) == {
            "requests": {"total": 0, "successful": 0, "failed": 0, "cancelled": 0, "in_progress": 0},
            "attempts": 0,
            "retries": 0,
            "tokens": {"input": 0, "output": 0, "total": 0},
            "latency": dict.fromkeys(("min", "max", "average", "p50", "p95", "p99"), 0.0),
            "time_to_first_token": dict.fromkeys(("min", "max", "average", "p50", "p95", "p99"), 0.0),
            "errors_by_type": {},
            "usage_by_model": {},
            "by_key": {},
        }


async def test_requests_are_calls_and_not_attempts() -> None:
    script = [failure(500), failure(529), answer(tokens=(10, 20)), failure(400), answer(tokens=(1, 2))]
    async with rig(script) as r:
        await r.client.complete(PROMPT)
        with pytest.raises(LLMException):
            await r.client.complete(PROMPT)
        await r.client.complete(PROMPT)
        got = metrics(r)
    assert got["requests"] == {"total": 3, "successful": 2, "failed": 1, "cancelled": 0, "in_progress": 0}
    assert (got["attempts"], got["retries"]) == (5, 2)
    assert got["tokens"] == {"input": 11, "output": 22, "total": 33}
    assert got["errors_by_type"] == {"LLMInvalidRequestError": 1}
    assert got["usage_by_model"] == {"m": {"attempts": 5, "failed": 3, "input": 11, "output": 22}}


async def test_usage_is_told_by_model_and_by_key_without_the_key() -> None:
    def script(request: Any) -> Scripted:
        return answer(model=model_of(request), tokens=(key_of(request), 10 * key_of(request)))

    async with rig(script, config=configuration(keys=3, models=["a", "b", "a"])) as r:
        for _ in range(6):
            await r.client.complete(PROMPT)
        got = metrics(r)
    assert got["by_key"] == {
        "vendor/1": {"attempts": 2, "failed": 0, "input": 2, "output": 20},
        "vendor/2": {"attempts": 2, "failed": 0, "input": 4, "output": 40},
        "vendor/3": {"attempts": 2, "failed": 0, "input": 6, "output": 60},
    }
    assert got["usage_by_model"]["a"] == {"attempts": 4, "failed": 0, "input": 8, "output": 80}
    assert secret(1) not in json.dumps(got)


async def test_latency_is_that_of_answered_calls_from_start_to_last_byte() -> None:
    delays = iter([1.0, 2.0, 3.0, 4.0, 90.0])
    async with rig(lambda _: answer(delay=next(delays))) as r:
        for _ in range(5):
            call = asyncio.create_task(r.client.complete(PROMPT))
            await r.clock.advance(100.0)
            await call
        latency = metrics(r)["latency"]
    assert (latency["min"], latency["max"], latency["average"]) == (1.0, 90.0, 20.0)
    assert latency["p50"] == pytest.approx(3.0, rel=0.011)
    assert latency["p95"] == latency["p99"] == pytest.approx(90.0, rel=0.011)


async def test_latency_has_the_wait_in_the_queue_and_every_attempt_in_it() -> None:
    config = configuration(rate_limits={"requests_per_minute": 1, "window_seconds": 10})
    script = [answer(), failure(500), answer()]
    async with rig(script, config=config) as r:
        await r.client.complete(PROMPT)
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.advance(30.0)
        await call
        assert metrics(r)["latency"]["max"] == pytest.approx(20.5, abs=0.1), "each attempt has waited for the window"


async def test_of_a_stream_first_token_and_end_are_told_apart() -> None:
    async with rig([stream(1.5, delta("hel"), 2.0, delta("lo"), END)]) as r:

        async def use() -> None:
            async for _ in r.client.stream_complete(PROMPT):
                pass

        call = asyncio.create_task(use())
        await r.clock.advance(1.6)
        assert metrics(r)["requests"]["in_progress"] == 1
        await r.clock.advance(2.0)
        await call
        got = metrics(r)
    assert got["time_to_first_token"]["max"] == 1.5
    assert got["latency"]["max"] == 3.5
    assert got["tokens"] == {"input": 3, "output": 2, "total": 5}
    assert got["requests"]["successful"] == 1


async def test_a_stream_that_breaks_off_has_failed_and_one_that_was_left_was_cancelled() -> None:
    script = [stream(delta("hel"), LLMConnectionError("lost", sent=True)), stream(delta("hel"), math.inf)]
    async with rig(script) as r:
        with pytest.raises(LLMException):
            _ = [chunk async for chunk in r.client.stream_complete(PROMPT)]
        async for _ in r.client.stream_complete(PROMPT):
            break
        got = metrics(r)
    assert got["requests"] == {"total": 2, "successful": 0, "failed": 1, "cancelled": 1, "in_progress": 0}
    assert got["errors_by_type"] == {"LLMStreamInterruptedError": 1}
    assert (got["attempts"], got["retries"], got["usage_by_model"]["m"]["failed"]) == (2, 0, 2)


async def test_a_cancelled_call_is_neither_success_nor_failure() -> None:
    async with rig([Scripted(200, JSON, b"", delay=math.inf)]) as r:
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.settle()
        assert metrics(r)["requests"]["in_progress"] == 1
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert metrics(r)["requests"] == {
            "total": 1,
            "successful": 0,
            "failed": 0,
            "cancelled": 1,
            "in_progress": 0,
        }
        assert metrics(r)["latency"]["max"] == 0.0


async def test_a_call_that_never_got_a_permit_has_failed_without_an_attempt() -> None:
    async with rig(config=configuration(rate_limits={"input_tokens_per_minute": 2})) as r:
        with pytest.raises(LLMException):
            await r.client.complete(PROMPT)
        got = metrics(r)
    assert (got["requests"]["failed"], got["attempts"]) == (1, 0)
    assert got["errors_by_type"] == {"LLMRequestTooLargeError": 1}


async def test_a_thousand_concurrent_calls_add_up() -> None:
    async with rig(lambda _: answer(delay=1.0), config=configuration(keys=3)) as r:
        calls = [asyncio.create_task(r.client.complete(PROMPT)) for _ in range(1000)]
        await r.clock.advance(5.0)
        await asyncio.gather(*calls)
        got = metrics(r)
    assert got["requests"]["successful"] == got["attempts"] == 1000
    assert got["tokens"]["total"] == 5000
    assert sorted(total["attempts"] for total in got["by_key"].values()) == [333, 333, 334]


# ---------------------------------------------------------------- alone


class Permit:
    def __init__(self, model: str = "m", key: KeyRef | None = None) -> None:
        self.model = model
        self.key = key if key is not None else KeyRef("p", 1)


def call(clock: FakeClock, permit: Any = None) -> Call:
    made = Call("1", Request((Message(MessageRole.USER, "x"),), "m"), provider="p", model="m", started=clock.now())
    made.admission = permit if permit is not None else Permit()  # type: ignore[assignment]
    return made


async def answered(call: Call) -> LLMResponse:
    return LLMResponse(text="x", model="m", usage=Usage(1, 2))


async def test_it_works_alone_and_then_counts_calls_and_attempts() -> None:
    clock = FakeClock()
    layer = MetricsMiddleware(clock=clock)
    await layer(call(clock), answered)
    got = layer.snapshot()
    assert (got["requests"]["successful"], got["attempts"], got["tokens"]["total"]) == (1, 1, 3)


async def test_it_costs_constant_memory_whatever_it_is_told() -> None:
    clock = FakeClock()
    layer = MetricsMiddleware(clock=clock)

    def size() -> int:
        tables: list[dict[Any, Any]] = [layer._models, layer._keys, layer._errors, layer._latency._buckets]
        return sum(len(table) for table in tables)

    async def failing(call: Call) -> LLMResponse:
        raise type(f"Error{call.model}", (Exception,), {})

    async def many(start: int) -> None:
        for number in range(start, start + 2 * MAX_NAMES):
            one = call(clock, Permit(f"model-{number}", KeyRef("p", number)))
            one.model = str(number)
            one.started = clock.now() - 1.02 ** (number % 1000)
            await layer(one, answered)
            with pytest.raises(Exception, match=r"^$"):
                await layer(one, failing)

    await many(0)
    before = size()
    await many(2 * MAX_NAMES)
    got = layer.snapshot()
    assert len(got["usage_by_model"]) == len(got["by_key"]) == len(got["errors_by_type"]) == MAX_NAMES + 1
    assert got["usage_by_model"]["other"]["attempts"] == 6 * MAX_NAMES
    assert size() == before
    assert len(layer._latency._buckets) < 1400


async def test_a_fault_of_its_own_is_counted_and_fails_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig([answer(), stream(delta("hello"), END)]) as r:
        layer = r.manager._metrics
        assert layer is not None
        monkeypatch.setattr(type(layer._latency), "add", lambda self, value: 1 / 0)
        assert await r.client.chat(PROMPT) == "hello"
        _ = [chunk async for chunk in r.client.stream_complete(PROMPT)]
        assert r.manager.get_status()["faults"]["metrics: ZeroDivisionError"] >= 2


async def test_figures_that_cannot_be_counted_fail_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig([answer()]) as r:
        layer = r.manager._metrics
        assert layer is not None
        monkeypatch.setattr(type(layer), "_count", lambda self, *given: 1 / 0)
        assert await r.client.chat(PROMPT) == "hello"
        assert r.manager.get_status()["faults"]["metrics: ZeroDivisionError"] == 1


async def test_switched_off_there_are_none() -> None:
    config = configuration(middleware={"metrics": {"enabled": False}})
    async with rig([answer()], config=config) as r:
        await r.client.complete(PROMPT)
        assert metrics(r) == {}
