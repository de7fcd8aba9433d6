"""Answers that are none: too large, garbled, redirected, cut. None of them is a short answer in disguise."""

from __future__ import annotations

import asyncio
import gc
import gzip
import tracemalloc

import pytest

from llm.core.exceptions import (
    LLMConnectionError,
    LLMException,
    LLMProtocolError,
)
from llm.transports.base import Exchange
from llm.transports.response import HTTPResponse
from tests.transports.server import CHUNKED, Peer, answering, ask, post, serve, talking, until


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
async def test_an_answer_larger_than_the_bound_is_refused_and_its_socket_closed(framing: str) -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        if framing == "chunked":
            peer.send(CHUNKED)
            for _ in range(64):
                peer.send(b"10000\r\n", bytes(65536), b"\r\n")
        else:
            peer.answer(bytes(1 << 22))
        await peer.gone()

    async with talking(handler, max_response_bytes=1 << 20) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        with pytest.raises(LLMProtocolError, match="max_response_bytes") as caught:
            await response.read()
        assert not caught.value.retryable
        assert caught.value.sent
        await server.peers[0].lost.wait()


async def test_an_answer_as_large_as_the_bound_is_read() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.answer(bytes(1 << 20))
        await peer.gone()

    async with talking(handler, max_response_bytes=1 << 20) as (transport, server):
        assert len(await ask(transport, server.url)) == 1 << 20


@pytest.mark.parametrize("read", ["read", "read_some"])
async def test_a_gzip_bomb_takes_no_more_memory_than_the_bound(read: str) -> None:
    bomb = gzip.compress(bytes(256 << 20), 9)

    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.answer(bomb, headers=b"content-encoding: gzip\r\n")
        await peer.gone()

    async with talking(handler, max_response_bytes=1 << 20) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        tracemalloc.start()
        try:
            if read == "read":
                with pytest.raises(LLMProtocolError, match="max_response_bytes"):
                    await response.read()
            else:
                for _ in range(20):
                    assert await response.read_some()
                response.close()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 9 << 20
        await server.peers[0].lost.wait()


async def test_a_long_compressed_stream_arrives_whole() -> None:
    text = b"".join(b"data: %d\n\n" % number for number in range(200_000))

    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.answer(gzip.compress(text), headers=b"content-encoding: gzip\r\nconnection: close\r\n")
        peer.close()

    async with talking(handler) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        pieces = []
        while piece := await response.read_some():
            pieces.append(piece)
            await asyncio.sleep(0)
        assert b"".join(pieces) == text


@pytest.mark.parametrize(
    "headers",
    [b"x-long: " + b"a" * (1 << 20) + b"\r\n", b"".join(b"x-%d: %s\r\n" % (n, b"a" * 1000) for n in range(1000))],
    ids=["one", "many"],
)
async def test_a_megabyte_of_headers_is_refused(headers: bytes) -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.answer(headers=headers)
        await peer.gone()

    exchange = Exchange()
    async with talking(handler) as (transport, server):
        with pytest.raises(LLMProtocolError) as caught:
            await transport.send(post(server.url), exchange)
        assert not caught.value.retryable
        assert caught.value.sent
        assert exchange.started
        assert len(str(caught.value)) < 200
        await server.peers[0].lost.wait()


async def test_a_redirect_is_a_response_and_the_key_goes_nowhere_else() -> None:
    async with serve(answering) as elsewhere:

        async def handler(peer: Peer) -> None:
            await peer.request()
            peer.answer(b"", status="307 Temporary Redirect", headers=b"location: %s\r\n" % elsewhere.url.encode())
            await peer.gone()

        async with talking(handler) as (transport, server):
            response = await transport.send(post(server.url), Exchange())
            assert response.status == 307
            assert await response.read() == b""
            assert response.headers["location"] == elsewhere.url
            assert elsewhere.connections == 0


@pytest.mark.parametrize(
    "answer", [b"220 smtp.test ESMTP\r\n\r\n", b"\x16\x03\x01\x00\xa5" * 9, b"HTTP/1.1 abc\r\n\r\n"]
)
async def test_what_is_no_http_is_a_protocol_error(answer: bytes) -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(answer)
        await peer.gone()

    async with talking(handler) as (transport, server):
        with pytest.raises(LLMProtocolError, match=f"127.0.0.1:{server.port}") as caught:
            await transport.send(post(server.url), Exchange())
        assert not caught.value.retryable


async def test_a_body_that_is_not_what_its_headers_say_is_a_protocol_error() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.answer(b"this is not gzip at all", headers=b"content-encoding: gzip\r\n")
        await peer.gone()

    async with talking(handler) as (transport, server):
        with pytest.raises(LLMProtocolError):
            await ask(transport, server.url)


async def test_broken_chunks_end_the_body_after_what_was_good() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED)
        await arrived.wait()
        peer.send(b"4\r\ngood\r\n", b"nonsense\r\n")
        await peer.gone()

    arrived = asyncio.Event()
    async with talking(handler) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        arrived.set()
        assert await response.read_some() == b"good"
        with pytest.raises(LLMException) as caught:
            await response.read_some()
        assert isinstance(caught.value, LLMProtocolError | LLMConnectionError)
        assert caught.value.sent


async def test_a_cut_that_came_while_the_reader_was_busy_loses_nothing() -> None:
    """aiohttp raises the error it has stored before it gives out its buffer; we take the buffer first."""

    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED, b"4\r\none \r\n", b"3\r\ntwo\r\n")
        peer.close()

    async with talking(handler) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        await until(lambda: response._content.exception() is not None)
        assert await response.read_some() == b"one two"
        for _ in range(2):
            with pytest.raises(LLMConnectionError, match="was cut"):
                await response.read_some()


async def test_a_body_shorter_than_its_length_is_delivered_and_then_an_error() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n", b"half")
        peer.close()

    async with talking(handler) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        assert await response.read_some() == b"half"
        with pytest.raises(LLMConnectionError):
            await response.read_some()


async def test_a_body_without_a_length_ends_with_its_connection() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n", b"until the end")
        peer.close()

    async with talking(handler) as (transport, server):
        assert await ask(transport, server.url) == b"until the end"


async def test_the_failed_response_is_not_kept_by_its_error() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED)
        peer.close()

    async with talking(handler) as (transport, server):
        gc.collect()
        gc.disable()
        try:
            # Other tests' tables hold errors of their own.
            before = {id(thing) for thing in gc.get_objects() if isinstance(thing, HTTPResponse | LLMConnectionError)}
            response: HTTPResponse | None = await transport.send(post(server.url), Exchange())
            assert response is not None
            with pytest.raises(LLMConnectionError) as caught:
                await response.read_some()
            assert caught.value.__context__ is None
            del caught, response
            after = {id(thing) for thing in gc.get_objects() if isinstance(thing, HTTPResponse | LLMConnectionError)}
            assert after <= before
        finally:
            gc.enable()
