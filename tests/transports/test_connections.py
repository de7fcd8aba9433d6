"""Connections that are kept: reused only when they can serve, closed when they cannot, watched meanwhile."""

from __future__ import annotations

import asyncio
import socket

import pytest

from llm.core.exceptions import (
    LLMConnectionError,
)
from llm.testing.clock import FakeClock
from llm.transports.base import Exchange, HTTPRequest
from tests.transports.server import CHUNKED, MOMENT, Peer, ask, post, talking, until


async def test_a_connection_that_the_server_closed_between_requests_is_not_used_again() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.answer()
        peer.close()

    async with talking(handler) as (transport, server):
        for _ in range(3):
            exchange = Exchange()
            assert await ask(transport, server.url, exchange) == b"ok"
            await until(lambda: transport.statistics()["open"] == 0)
            assert exchange.reused is False
        assert server.connections == 3


async def test_a_close_that_the_blocked_loop_has_not_seen_is_noticed_before_reuse() -> None:
    async with talking() as (transport, server):
        await ask(transport, server.url)
        server.peers[0].hang_up_unseen()
        assert transport.statistics()["idle"] == 1
        exchange = Exchange()
        assert await ask(transport, server.url, exchange) == b"ok"
        assert exchange.reused is False
        assert transport.statistics()["opened"] == 2


async def test_prune_closes_only_what_the_server_has_closed() -> None:
    async with talking() as (transport, server):
        await asyncio.gather(*(ask(transport, server.url) for _ in range(3)))
        assert transport.statistics()["idle"] == 3
        server.peers[1].hang_up_unseen()
        assert transport.prune() == 1
        await until(lambda: transport.statistics()["open"] == 2)
        assert transport.prune() == 0


@pytest.mark.parametrize("when", ["with the answer", "later"])
async def test_bytes_that_nobody_asked_for_do_not_become_the_next_answer(when: str) -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.answer(b"first")
        if when == "later":
            await idle.wait()
        peer.answer(b"late nonsense")
        sent.set()
        await peer.gone()

    idle, sent = asyncio.Event(), asyncio.Event()
    async with talking(handler) as (transport, server):
        assert await ask(transport, server.url) == b"first"
        idle.set()
        await sent.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        exchange = Exchange()
        assert await ask(transport, server.url, exchange) == b"first"
        assert exchange.reused is False


async def test_written_means_that_the_kernel_has_taken_the_last_byte() -> None:
    """asyncio would by default keep 64 KB to itself and not say a word."""
    async with talking() as (transport, server):
        await ask(transport, server.url)
        assert transport._current is not None
        (protocol,) = transport._current.connector.protocols
        assert protocol.transport is not None
        assert protocol.transport.get_write_buffer_limits() == (0, 0)


async def test_a_reused_connection_that_dies_without_an_answer_says_so() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.answer()
        await peer.request()
        peer.close()

    async with talking(handler) as (transport, server):
        await ask(transport, server.url)
        exchange = Exchange()
        with pytest.raises(LLMConnectionError, match="had closed an idle connection") as caught:
            await ask(transport, server.url, exchange)
        assert (exchange.reused, exchange.written, exchange.started) == (True, True, False)
        assert caught.value.sent
        assert caught.value.retryable
        assert server.connections == 1, "nobody repeated it"


async def test_not_even_a_get_is_repeated_behind_our_back() -> None:
    calls: list[int] = []

    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.answer()
        await peer.request()
        peer.reset()

    async with talking(handler) as (transport, server):
        get = HTTPRequest("GET", server.url, {})
        response = await transport.send(get, Exchange())
        await response.read()
        exchange = Exchange(lambda: calls.append(1))
        with pytest.raises(LLMConnectionError):
            await transport.send(get, exchange)
        assert calls == [1]
        assert server.connections == 1


async def test_twenty_callers_have_twenty_connections_and_the_next_twenty_the_same() -> None:
    async with talking() as (transport, server):
        for _ in range(2):
            assert await asyncio.gather(*(ask(transport, server.url) for _ in range(20))) == [b"ok"] * 20
        assert server.connections == 20
        assert transport.statistics() == {"open": 20, "idle": 20, "opened": 20, "in_flight": 0}


async def test_the_operating_system_watches_over_silent_connections() -> None:
    async with talking() as (transport, server):
        await ask(transport, server.url)
        assert transport._current is not None
        (protocol,) = transport._current.connector.protocols
        assert protocol.transport is not None
        channel = protocol.transport.get_extra_info("socket")
        assert channel.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert channel.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert [channel.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [60, 60, 5]


async def test_idle_connections_are_closed_by_us_first() -> None:
    async with talking(keepalive_seconds=MOMENT) as (transport, server):
        await ask(transport, server.url)
        await until(lambda: transport.statistics()["open"] == 0)


async def test_connections_beyond_their_age_get_no_new_request_and_go_when_their_last_response_ends() -> None:
    release = asyncio.Event()

    async def handler(peer: Peer) -> None:
        await peer.request()
        if peer.number == 1:
            peer.send(CHUNKED, b"4\r\nold \r\n")
            await release.wait()
            peer.send(b"6\r\nstream\r\n0\r\n\r\n")
        else:
            peer.answer()
        await peer.gone()

    clock = FakeClock()
    async with talking(handler, clock=clock, max_age=60.0, connect=None, first_byte=None, idle=None) as (
        transport,
        server,
    ):
        old = await transport.send(post(server.url), Exchange())
        await clock.advance(61.0)
        exchange = Exchange()
        assert await ask(transport, server.url, exchange) == b"ok"
        assert transport.statistics() == {"open": 2, "idle": 1, "opened": 2, "in_flight": 1}
        assert not server.peers[0].lost.is_set()
        release.set()
        assert await old.read() == b"old stream", "what was under way is not disturbed"
        await server.peers[0].lost.wait()
        assert transport.statistics() == {"open": 1, "idle": 1, "opened": 2, "in_flight": 0}


async def test_idle_connections_beyond_their_age_go_at_once() -> None:
    clock = FakeClock()
    async with talking(clock=clock, max_age=60.0) as (transport, server):
        await ask(transport, server.url)
        await clock.advance(61.0)
        await ask(transport, server.url)
        await server.peers[0].lost.wait()
        assert transport.statistics()["opened"] == 2
