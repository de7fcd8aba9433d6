"""Circuits in the pipeline: who is left alone, who finds out, and what callers are told meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm.core.events import CircuitClosed, CircuitOpened, Event
from llm.core.exceptions import (
    LLMCircuitOpenError,
    LLMConnectionError,
    LLMException,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMRateLimitError,
    LLMStreamInterruptedError,
)
from llm.testing.transport import Scripted
from llm.transports.base import HTTPRequest
from tests.core.rig import END, PROMPT, Rig, answer, configuration, delta, failure, key_of, rig, stream

ONCE = {"retry": {"enabled": False}}


def alone(keys: int = 1, **breaker: Any) -> dict[str, Any]:
    """A configuration in which nothing is repeated, with three failures in a row to open a circuit."""
    return configuration(keys, middleware={**ONCE, "circuit_breaker": {"consecutive": 3, **breaker}})


class Vendor:
    """Answers, or fails while it is down."""

    def __init__(self) -> None:
        self.down: Any = None
        self.asked = 0
        self.delay = 0.0

    def __call__(self, request: HTTPRequest) -> Any:
        self.asked += 1
        return self.down if self.down is not None else answer(delay=self.delay)


def circuit(r: Rig) -> dict[str, Any]:
    found: dict[str, Any] = r.manager.get_status()["providers"]["vendor"]["circuit"]
    return found


async def attempt(r: Rig) -> str:
    """The answer's text, or the name of what it failed with."""
    try:
        return await r.client.chat(PROMPT)
    except LLMException as error:
        return type(error).__name__


async def test_a_provider_that_fails_in_a_row_is_asked_no_more_and_callers_are_told_when_again() -> None:
    vendor = Vendor()
    async with rig(vendor, config=alone()) as r:
        vendor.down = failure(503)
        assert [await attempt(r) for _ in range(3)] == ["LLMOverloadedError"] * 3
        with pytest.raises(LLMCircuitOpenError, match=r"left alone for 1\.0 s more.*LLMOverloadedError: no") as caught:
            await r.client.chat(PROMPT)
        assert (caught.value.retry_after, caught.value.retryable, caught.value.attempts) == (1.0, False, ())
        assert vendor.asked == 3
        assert circuit(r) == {"state": "open", "reason": "LLMOverloadedError: no", "next_probe_in": 1.0}
        assert r.states == ["healthy"]


async def test_one_call_finds_out_and_the_others_are_refused_meanwhile() -> None:
    vendor = Vendor()
    async with rig(vendor, config=alone()) as r:
        vendor.down = failure(503)
        for _ in range(3):
            await attempt(r)
        await r.clock.advance(1.0)
        vendor.down, vendor.delay = None, 5.0
        calls = [asyncio.create_task(attempt(r)) for _ in range(5)]
        await r.clock.settle()
        assert vendor.asked == 4
        assert circuit(r)["state"] == "half_open"
        await r.clock.advance(5.0)
        assert sorted(await asyncio.gather(*calls)) == ["LLMCircuitOpenError"] * 4 + ["hello"]
        assert circuit(r) == {"state": "ramping", "reason": "LLMOverloadedError: no", "next_probe_in": None}
        vendor.delay = 0.0
        await r.clock.advance(3.0)
        assert await attempt(r) == "hello"
        assert circuit(r) == {"state": "closed", "reason": None, "next_probe_in": None}


async def test_a_caller_that_leaves_while_it_finds_out_leaves_that_to_the_next() -> None:
    vendor = Vendor()
    async with rig(vendor, config=alone()) as r:
        vendor.down = failure(503)
        for _ in range(3):
            await attempt(r)
        await r.clock.advance(1.0)
        vendor.down, vendor.delay = None, 5.0
        first = asyncio.create_task(attempt(r))
        await r.clock.settle()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        vendor.delay = 0.0
        assert await attempt(r) == "hello"


async def test_while_it_ramps_callers_wait_their_turn_and_all_are_answered() -> None:
    vendor = Vendor()
    async with rig(vendor, config=alone()) as r:
        vendor.down = failure(503)
        for _ in range(3):
            await attempt(r)
        await r.clock.advance(1.0)
        vendor.down = None
        assert await attempt(r) == "hello"
        vendor.delay = 0.5
        before = vendor.asked
        calls = [asyncio.create_task(attempt(r)) for _ in range(30)]
        await r.clock.settle()
        assert vendor.asked - before == 2, "two at first"
        for _ in range(8):
            await r.clock.advance(0.5)
        assert await asyncio.gather(*calls) == ["hello"] * 30
        vendor.delay = 0.0
        assert await attempt(r) == "hello"
        assert circuit(r)["state"] == "closed"


async def test_those_who_wait_are_told_as_well_when_it_opens() -> None:
    vendor = Vendor()
    config = configuration(middleware=alone()["middleware"], rate_limits={"requests_per_minute": 3})
    async with rig(vendor, config=config) as r:
        vendor.down = failure(503)
        calls = [asyncio.create_task(attempt(r)) for _ in range(5)]
        await r.clock.settle()
        assert await asyncio.gather(*calls) == ["LLMOverloadedError"] * 3 + ["LLMCircuitOpenError"] * 2


@pytest.mark.parametrize(
    ("down", "error"),
    [
        (failure(400), LLMInvalidRequestError),
        (failure(429, retry_after="0.1"), LLMRateLimitError),
    ],
)
async def test_what_the_request_or_the_quota_is_to_blame_for_opens_nothing(down: Scripted, error: type) -> None:
    vendor = Vendor()
    async with rig(vendor, config=alone()) as r:
        vendor.down = down
        for _ in range(3):
            with pytest.raises(error):
                await r.client.chat(PROMPT)
            await r.clock.advance(1.0)
        vendor.down = None
        assert await attempt(r) == "hello"
        assert circuit(r)["state"] == "closed"


async def test_an_attempt_that_the_calls_own_deadline_cut_opens_nothing() -> None:
    vendor = Vendor()
    async with rig(vendor, config=alone()) as r:
        vendor.delay = 9.0
        for _ in range(4):
            call = asyncio.create_task(r.client.chat(PROMPT, timeout=1.0))
            await r.clock.advance(1.0)
            assert "Deadline" in type((await asyncio.gather(call, return_exceptions=True))[0]).__name__
        assert circuit(r)["state"] == "closed"


async def test_of_several_keys_only_the_one_that_fails_is_left_alone() -> None:
    def vendor(request: HTTPRequest) -> Any:
        return LLMConnectionError("reset") if key_of(request) == 1 else answer()

    async with rig(vendor, config=alone(3)) as r:
        found = [await attempt(r) for _ in range(12)]
        assert found.count("LLMConnectionError") == 3
        assert r.keys.count(1) == 3
        assert r.states == ["open", "healthy", "healthy"]
        keys = r.manager.get_status()["providers"]["vendor"]["keys"]
        assert [key["circuit"]["state"] for key in keys] == ["open", "closed", "closed"]
        assert circuit(r)["state"] == "closed"


async def test_when_the_provider_is_down_its_keys_have_nothing_against_them() -> None:
    vendor = Vendor()
    async with rig(vendor, config=alone(2)) as r:
        vendor.down = failure(500)
        for _ in range(3):
            await attempt(r)
        assert circuit(r)["state"] == "open"
        keys = r.manager.get_status()["providers"]["vendor"]["keys"]
        assert [key["circuit"]["state"] for key in keys] == ["closed", "closed"]
        assert await attempt(r) == "LLMCircuitOpenError"


async def test_a_stream_counts_as_answered_when_its_first_content_is_there() -> None:
    down = True

    def vendor(request: HTTPRequest) -> Any:
        return failure(503) if down else stream(delta("hel"), 60.0, END)

    async with rig(vendor, config=alone()) as r:
        for _ in range(3):
            await attempt(r)
        await r.clock.advance(1.0)
        down = False
        async with r.client.stream_complete(PROMPT) as answered:
            await anext(answered)
            assert circuit(r)["state"] == "ramping"


async def test_what_happens_is_told_as_events() -> None:
    vendor = Vendor()
    told: list[Event] = []
    async with rig(vendor, config=alone()) as r:
        r.manager.events.listen(told.append, CircuitOpened, CircuitClosed)
        vendor.down = failure(503)
        for _ in range(3):
            await attempt(r)
        vendor.down = None
        for seconds in (1.0, 3.0):
            await r.clock.advance(seconds)
            await attempt(r)
    opened, answering, closed = told
    assert isinstance(opened, CircuitOpened)
    assert (opened.provider, opened.key_id, opened.seconds) == ("vendor", None, 1.0)
    assert opened.reason == "LLMOverloadedError: no"
    assert [event.ramping for event in (answering, closed) if isinstance(event, CircuitClosed)] == [True, False]


async def test_switched_off_a_provider_is_asked_however_often_it_fails() -> None:
    vendor = Vendor()
    async with rig(vendor, config=alone(enabled=False)) as r:
        vendor.down = failure(503)
        assert [await attempt(r) for _ in range(20)] == [LLMOverloadedError.__name__] * 20
        assert circuit(r) is None
        assert r.manager.get_status()["providers"]["vendor"]["keys"][0]["circuit"] is None


async def test_a_provider_that_cuts_its_streams_is_down_as_well() -> None:
    lost = LLMConnectionError("the connection was lost")
    async with rig(lambda _: stream(delta("hel"), lost), config=alone(min_calls=6, consecutive=100)) as r:
        for _ in range(3):
            assert circuit(r)["state"] == "closed"
            with pytest.raises(LLMStreamInterruptedError):
                async for _ in r.client.stream_complete(PROMPT):
                    pass
        assert circuit(r)["state"] == "open"


async def test_a_stream_that_its_reader_leaves_says_nothing() -> None:
    async with rig(lambda _: stream(delta("hel"), 60.0, END), config=alone(min_calls=2, consecutive=1)) as r:
        for _ in range(5):
            async with r.client.stream_complete(PROMPT) as left:
                await anext(left)
        assert circuit(r)["state"] == "closed"
