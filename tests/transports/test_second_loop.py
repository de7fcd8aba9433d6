"""One transport, two event loops. Forks are in tests/test_loops.py."""

from __future__ import annotations

import asyncio

import pytest

from llm.core.exceptions import LLMConfigurationError, LLMConnectionError
from llm.transports.base import Exchange
from llm.transports.http import HTTPTransport
from llm.transports.response import HTTPResponse
from tests.transports.server import CHUNKED, Peer, answering, ask, http, post, serve, talking


async def unfinished(peer: Peer) -> None:
    """Begins an answer and does not end it."""
    await peer.request()
    peer.send(CHUNKED, b"3\r\none\r\n")
    await peer.gone()


async def used(transport: HTTPTransport) -> HTTPResponse:
    """An answer that was read on a loop that will be gone."""
    async with serve(answering) as server:
        response = await transport.send(post(server.url), Exchange())
        assert await response.read() == b"ok"
        return response


def test_on_a_second_loop_it_opens_connections_of_its_own_and_counts_on() -> None:
    transport = http()
    asyncio.run(used(transport))
    assert transport.statistics()["opened"] == 1

    async def again() -> None:
        async with serve(answering) as server:
            exchange = Exchange()
            assert await ask(transport, server.url, exchange) == b"ok"
            assert not exchange.reused
            assert transport.statistics()["open"] == 1
            await transport.close()

    asyncio.run(again())
    assert transport.statistics()["open"] == 0


def test_it_may_be_closed_on_another_loop_when_its_own_is_gone() -> None:
    transport = http()
    response = asyncio.run(used(transport))
    asyncio.run(transport.close())
    assert transport.statistics()["open"] == 0
    response.close()  # harmless

    async def after() -> None:
        with pytest.raises(LLMConnectionError, match="closed"):
            await transport.send(post("http://127.0.0.1:1/"), Exchange())

    asyncio.run(after())


async def test_while_its_loop_is_open_another_one_may_not_use_it() -> None:
    async with talking() as (transport, server):
        await ask(transport, server.url)
        with pytest.raises(LLMConfigurationError, match="one manager per event loop"):
            await asyncio.to_thread(asyncio.run, ask(transport, server.url))
        assert await ask(transport, server.url) == b"ok"


async def test_an_answer_may_be_closed_on_any_thread() -> None:
    """A finaliser runs where it likes."""
    async with talking(unfinished) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        await asyncio.to_thread(response.close)
        await server.peers[0].lost.wait()
        assert transport.statistics()["open"] == 0
