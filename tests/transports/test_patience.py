"""Timeouts and cancellation: how long the transport waits, and that it lets go at once."""

from __future__ import annotations

import asyncio

import pytest

from llm.core.exceptions import (
    LLMTimeoutError,
)
from llm.testing.clock import FakeClock
from llm.transports.base import Exchange
from llm.transports.http import HTTPTransport
from tests.transports.server import CHUNKED, MOMENT, Peer, ask, post, talking, until


async def test_a_connection_that_is_not_made_in_time_is_a_connect_timeout() -> None:
    """A TLS server that never says a word: the TCP connection alone is no connection."""

    async def silent(peer: Peer) -> None:
        await peer.gone()

    exchange = Exchange(lambda: pytest.fail("there was no connection"))
    async with talking(silent, connect=MOMENT) as (transport, server):
        with pytest.raises(LLMTimeoutError) as caught:
            await transport.send(post(server.url.replace("http:", "https:")), exchange)
        assert caught.value.phase == "connect"
        assert not caught.value.sent
        assert caught.value.retryable
        assert not exchange.connected
        assert caught.value.__context__ is None
        await server.peers[0].lost.wait()
        assert transport.statistics()["in_flight"] == 0


async def test_an_answer_that_does_not_begin_in_time_is_a_first_byte_timeout() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        await peer.gone()

    exchange = Exchange()
    async with talking(handler, first_byte=MOMENT) as (transport, server):
        with pytest.raises(LLMTimeoutError) as caught:
            await transport.send(post(server.url), exchange)
        assert caught.value.phase == "first_byte"
        assert caught.value.sent
        assert (exchange.written, exchange.started) == (True, False)
        await server.peers[0].lost.wait()


async def test_half_a_head_is_not_a_head() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n")
        await peer.gone()

    exchange = Exchange()
    async with talking(handler, first_byte=MOMENT) as (transport, server):
        with pytest.raises(LLMTimeoutError):
            await transport.send(post(server.url), exchange)
        assert exchange.started


@pytest.mark.parametrize("read", ["read", "read_some"])
async def test_a_body_that_stalls_is_an_idle_timeout(read: str) -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED, b"4\r\ngood\r\n")
        await peer.gone()

    async with talking(handler, idle=MOMENT) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        if read == "read_some":
            assert await response.read_some() == b"good"
        with pytest.raises(LLMTimeoutError) as caught:
            await getattr(response, read)()
        assert caught.value.phase == "idle"
        assert caught.value.sent
        await server.peers[0].lost.wait()


async def test_a_slow_reader_is_not_an_idle_server() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED, b"4\r\ngood\r\n")
        await asyncio.sleep(MOMENT)
        peer.send(b"0\r\n\r\n")
        await peer.gone()

    clock = FakeClock()
    async with talking(handler, clock=clock, idle=10.0, first_byte=None) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        await clock.advance(1_000.0)
        assert await response.read() == b"good"
        assert clock.timers <= 2


async def test_without_timeouts_no_timer_is_set() -> None:
    clock = FakeClock()
    async with talking(clock=clock, connect=None, first_byte=None, idle=None) as (transport, server):
        assert await ask(transport, server.url) == b"ok"
        assert clock.timers == 0


async def test_the_time_for_the_first_byte_counts_from_the_end_of_a_long_request() -> None:
    ready = asyncio.Event()

    async def handler(peer: Peer) -> None:
        await ready.wait()
        await peer.request()
        await answer.wait()
        peer.answer()
        await peer.gone()

    answer = asyncio.Event()
    clock = FakeClock()
    async with talking(handler, clock=clock, first_byte=10.0, idle=None) as (transport, server):
        exchange = Exchange()
        task = asyncio.create_task(transport.send(post(server.url, bytes(32 << 20)), exchange))
        await until(lambda: exchange.connected)
        await clock.advance(9.0)
        assert not exchange.written
        ready.set()
        await until(lambda: exchange.written)
        await clock.advance(9.0)
        answer.set()
        response = await task
        assert await response.read() == b"ok"


@pytest.mark.parametrize("moment", ["before the head", "in the body", "in the stream"])
async def test_cancelling_closes_the_socket_at_once(moment: str) -> None:
    heard = asyncio.Event()

    async def handler(peer: Peer) -> None:
        await peer.request()
        if moment != "before the head":
            peer.send(CHUNKED, b"4\r\ngood\r\n")
        heard.set()
        await peer.gone()

    async def call(transport: HTTPTransport, url: str) -> None:
        response = await transport.send(post(url), Exchange())
        if moment == "in the body":
            await response.read()
        while True:
            await response.read_some()

    async with talking(handler) as (transport, server):
        task = asyncio.create_task(call(transport, server.url))
        await heard.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(20 * MOMENT):
            await server.peers[0].lost.wait()
        assert transport.statistics() == {"open": 0, "idle": 0, "opened": 1, "in_flight": 0}


async def test_cancelling_while_connecting_leaves_no_socket() -> None:
    async def silent(peer: Peer) -> None:
        await peer.gone()

    async with talking(silent) as (transport, server):
        task = asyncio.create_task(transport.send(post(server.url.replace("http:", "https:")), Exchange()))
        await until(lambda: server.connections)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.peers[0].lost.wait()
        assert transport.statistics()["in_flight"] == 0
