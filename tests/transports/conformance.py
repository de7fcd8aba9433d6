"""What every transport must do, as one suite: a subclass says how to serve a script, and inherits the sentences."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

import msgspec
import pytest

from llm.core.exceptions import LLMConnectionError
from llm.transports.base import Exchange, HTTPRequest, Transport


class Play(msgspec.Struct, frozen=True):
    """One answer as the suite wants it played, by a script or by a server of bytes."""

    status: int = 200
    headers: dict[str, str] = {}
    pieces: tuple[bytes, ...] = (b'{"ok": true}',)
    ending: str = "whole"
    """``whole``; ``cut``: the connection is lost after the pieces; ``stall``: nothing more comes; ``mute``: not even
    the head comes; ``refuse``: the connection is lost before the head."""


CUT = Play(pieces=(b"data: one\n\n", b"data: two\n\n"), ending="cut")
STALLED = Play(pieces=(b"data: one\n\n",), ending="stall")
MUTE = Play(ending="mute")
REFUSED = Play(ending="refuse")


class TransportConformance:
    """Subclass it as ``Test…`` and give it :meth:`playing`."""

    def playing(self, plays: Sequence[Play]) -> AbstractAsyncContextManager[tuple[Transport, str]]:
        """A transport and a URL where *plays* are answered, one a request, in order."""
        raise NotImplementedError

    def post(self, url: str) -> HTTPRequest:
        return HTTPRequest("POST", url, {"content-type": "application/json", "x-api-key": "key"}, b'{"model": "m"}')

    async def test_a_whole_answer_is_status_headers_and_body(self) -> None:
        async with self.playing([Play(201, {"Request-Id": "req_1"}, (b"one ", b"two"))]) as (transport, url):
            response = await transport.send(self.post(url), Exchange())
            assert response.status == 201
            assert response.headers["request-id"] == "req_1"
            assert "request-id" in response.headers
            assert response.headers.get("retry-after") is None
            assert "request-id" in list(response.headers), "names are lower case"
            assert await response.read() == b"one two"

    async def test_a_body_can_be_read_as_it_comes_and_its_end_is_empty_for_ever(self) -> None:
        async with self.playing([Play(pieces=(b"one ", b"two ", b"three"))]) as (transport, url):
            response = await transport.send(self.post(url), Exchange())
            pieces = []
            while piece := await response.read_some():
                pieces.append(piece)
            assert b"".join(pieces) == b"one two three"
            assert await response.read_some() == b""

    @pytest.mark.parametrize("status", [307, 401, 429, 500, 529])
    async def test_a_status_of_any_kind_is_a_response(self, status: int) -> None:
        play = Play(status, {"Location": "http://127.0.0.1:9/", "Retry-After": "3"}, (b"why",))
        async with self.playing([play]) as (transport, url):
            response = await transport.send(self.post(url), Exchange())
            assert (response.status, await response.read()) == (status, b"why")

    async def test_the_exchange_tells_of_a_fresh_and_of_a_reused_connection(self) -> None:
        async with self.playing([Play(), Play()]) as (transport, url):
            for reused in (False, True):
                exchange = Exchange()
                assert not exchange.connected
                response = await transport.send(self.post(url), exchange)
                await response.read()
                assert (exchange.reused, exchange.written, exchange.started) == (reused, True, True)
            assert transport.statistics()["opened"] == 1

    async def test_on_connection_is_called_once_and_before_anything_is_written(self) -> None:
        calls: list[tuple[bool, bool]] = []
        exchange = Exchange(lambda: calls.append((exchange.written, exchange.started)))
        async with self.playing([Play()]) as (transport, url):
            response = await transport.send(self.post(url), exchange)
            await response.read()
        assert calls == [(False, False)]

    async def test_what_arrived_before_a_cut_is_delivered_before_the_error(self) -> None:
        async with self.playing([CUT]) as (transport, url):
            response = await transport.send(self.post(url), Exchange())
            arrived = bytearray()

            async def follow() -> None:
                while piece := await response.read_some():
                    arrived.extend(piece)

            with pytest.raises(LLMConnectionError) as caught:
                await follow()
            assert arrived == b"data: one\n\ndata: two\n\n"
            assert caught.value.sent
            assert caught.value.retryable
            assert transport.statistics()["in_flight"] == 0

    async def test_a_whole_read_of_a_cut_body_raises(self) -> None:
        async with self.playing([CUT]) as (transport, url):
            response = await transport.send(self.post(url), Exchange())
            with pytest.raises(LLMConnectionError):
                await response.read()

    async def test_a_connection_lost_before_the_head_is_an_error_of_a_sent_request(self) -> None:
        exchange = Exchange()
        async with self.playing([REFUSED]) as (transport, url):
            with pytest.raises(LLMConnectionError) as caught:
                await transport.send(self.post(url), exchange)
            assert (exchange.connected, exchange.written, exchange.started) == (True, True, False)
            assert caught.value.sent
            assert caught.value.retryable
            assert transport.statistics()["in_flight"] == 0

    async def test_a_cancelled_send_leaves_nothing_in_flight(self) -> None:
        connected = asyncio.Event()
        async with self.playing([MUTE]) as (transport, url):
            task = asyncio.create_task(transport.send(self.post(url), Exchange(connected.set)))
            await connected.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            statistics = transport.statistics()
            assert (statistics["in_flight"], statistics["idle"]) == (0, 0)

    @pytest.mark.parametrize("read", ["read", "read_some"])
    async def test_a_cancelled_read_closes_the_connection(self, read: str) -> None:
        async with self.playing([STALLED]) as (transport, url):
            response = await transport.send(self.post(url), Exchange())
            if read == "read_some":
                await response.read_some()
            task = asyncio.create_task(getattr(response, read)())
            for _ in range(5):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            statistics = transport.statistics()
            assert (statistics["in_flight"], statistics["idle"]) == (0, 0)

    async def test_a_response_given_up_early_takes_its_connection_along(self) -> None:
        async with self.playing([STALLED, Play()]) as (transport, url):
            response = await transport.send(self.post(url), Exchange())
            response.close()
            response.close()
            exchange = Exchange()
            response = await transport.send(self.post(url), exchange)
            await response.read()
            response.close()
            assert exchange.reused is False
            assert transport.statistics()["opened"] == 2

    async def test_statistics_follow_a_response(self) -> None:
        async with self.playing([STALLED]) as (transport, url):
            response = await transport.send(self.post(url), Exchange())
            assert transport.statistics() == {"open": 1, "idle": 0, "opened": 1, "in_flight": 1}
            response.close()
            assert transport.statistics()["in_flight"] == 0

    async def test_closing_ends_what_is_pending_and_refuses_what_comes(self) -> None:
        connected = asyncio.Event()
        async with self.playing([MUTE]) as (transport, url):
            task = asyncio.create_task(transport.send(self.post(url), Exchange(connected.set)))
            await connected.wait()
            await transport.close()
            await transport.close()
            with pytest.raises(LLMConnectionError, match="closed") as pending:
                await task
            assert not pending.value.retryable
            assert pending.value.sent
            with pytest.raises(LLMConnectionError, match="closed") as refused:
                await transport.send(self.post(url), Exchange())
            assert not refused.value.retryable
            assert not refused.value.sent
            statistics = transport.statistics()
            assert (statistics["open"], statistics["in_flight"]) == (0, 0)
