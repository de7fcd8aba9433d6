"""The transport that plays a script."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from llm.core.exceptions import LLMConnectionError, LLMTimeoutError
from llm.testing.clock import FakeClock
from llm.testing.transport import Answer, Scripted, ScriptedTransport
from llm.transports.base import Exchange, HTTPRequest, Transport
from tests.transports.conformance import Play, TransportConformance

GET = HTTPRequest("GET", "http://vendor.test/v1/models", {})


def scripted(play: Play) -> Answer:
    """The suite's words in this transport's."""
    lost = LLMConnectionError("lost", sent=True)
    if play.ending == "refuse":
        return lost
    pieces: list[bytes | float | BaseException] = [*play.pieces]
    if play.ending == "cut":
        pieces.append(lost)
    elif play.ending == "stall":
        pieces.append(math.inf)
    return Scripted(play.status, play.headers, pieces=tuple(pieces), delay=math.inf if play.ending == "mute" else 0.0)


class TestScriptedTransport(TransportConformance):
    @asynccontextmanager
    async def playing(self, plays: Sequence[Play]) -> AsyncIterator[tuple[Transport, str]]:
        transport = ScriptedTransport([scripted(play) for play in plays])
        yield transport, "http://vendor.test/v1/messages"
        await transport.close()


async def test_it_keeps_what_it_was_sent() -> None:
    transport = ScriptedTransport([Scripted(), Scripted()])
    first, second = Exchange(), Exchange()
    await transport.send(GET, first)
    await transport.send(GET, second)
    assert transport.requests == [GET, GET]
    assert transport.exchanges == [first, second]


async def test_a_function_answers_by_what_it_is_asked_even_later() -> None:
    async def answer(request: HTTPRequest) -> Answer:
        await asyncio.sleep(0)
        return Scripted(body=request.url.encode())

    response = await ScriptedTransport(answer).send(GET, Exchange())
    assert await response.read() == GET.url.encode()


async def test_delays_pass_on_its_clock() -> None:
    clock = FakeClock()
    transport = ScriptedTransport([Scripted(delay=30.0, pieces=(b"a", 10.0, b"b"))], clock=clock)

    async def call() -> tuple[float, float]:
        response = await transport.send(GET, Exchange())
        head = clock.now()
        await response.read()
        return head, clock.now()

    start = clock.now()
    task = asyncio.create_task(call())
    await clock.advance(100.0)
    assert task.result() == (start + 30.0, start + 40.0)
    assert clock.timers == 0


async def test_an_error_that_was_not_sent_had_no_connection() -> None:
    exchange = Exchange()
    transport = ScriptedTransport([LLMTimeoutError("no connection", phase="connect")])
    with pytest.raises(LLMTimeoutError):
        await transport.send(GET, exchange)
    assert not exchange.connected
    assert transport.statistics()["opened"] == 0


async def test_a_script_that_is_too_short_says_so() -> None:
    with pytest.raises(AssertionError, match="no answer left for request 1"):
        await ScriptedTransport([]).send(GET, Exchange())


async def test_a_failing_callback_gives_the_connection_back() -> None:
    def refuse() -> None:
        raise ZeroDivisionError

    transport = ScriptedTransport([Scripted()])
    with pytest.raises(ZeroDivisionError):
        await transport.send(GET, Exchange(refuse))
    assert transport.statistics() == {"open": 1, "idle": 1, "opened": 1, "in_flight": 0}
