"""What aiohttp does not tell about its connections: whether one is stale, how far a request got, when all are back.

What is used of aiohttp without being documented: of the connector ``connect``, ``_create_connection``,
``_release_acquired``, ``_acquired`` and ``_factory``; of ``ResponseHandler`` ``set_exception``, ``should_close``,
``writing_paused``, ``_payload``, ``_reading_paused`` and ``_buffer_paused``; in response.py ``_buffer`` and
``_read_nowait`` of ``StreamReader``; in http.py ``_retry_connection`` of the session.
tests/transports fails when one of them changes.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError

from ..utils.alarms import Alarm, Alarms, Limit
from .base import Exchange
from .request import TRIP, Request, Trip

if TYPE_CHECKING:
    import ssl

    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace
    from yarl import URL

_KEEP_ALIVE = tuple(
    (socket.IPPROTO_TCP, getattr(socket, name), seconds)
    # Seconds of silence before the first probe and between probes, and probes until the connection is given up: an
    # answer may take minutes, and a NAT on the way forgets silent connections sooner.
    for name, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 60), ("TCP_KEEPCNT", 5))
    if hasattr(socket, name)
)


class Protocol(ResponseHandler):
    """A connection that knows whether it has served, and tells the exchange when the first byte comes back."""

    owner: Connector | None = None
    served = False
    awaiting: Exchange | None = None
    """The exchange whose first byte of response is still to come."""
    flushing: Trip | None = None
    """The trip whose last bytes the kernel has not taken yet."""
    readable: Callable[[int], list[tuple[int, int]]]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        # From the first byte that the kernel does not take, so that resuming means: all of it was taken.
        self.transport.set_write_buffer_limits(0)
        channel = self.transport.get_extra_info("socket")
        self.readable = _watch(channel.fileno())
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for level, name, value in _KEEP_ALIVE:
            channel.setsockopt(level, name, value)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.flushing = self.awaiting = None
        if self.owner is not None:
            self.owner.protocols.discard(self)

    def data_received(self, data: bytes) -> None:
        if (exchange := self.awaiting) is not None:
            exchange.started = True
            self.awaiting = None
        super().data_received(data)

    def resume_reading(self, resume_parser: bool = True) -> None:
        # Asked after every piece that was read; unless something was paused, there is nothing left to parse.
        if self._reading_paused or self._buffer_paused:
            super().resume_reading(resume_parser)

    def resume_writing(self) -> None:
        super().resume_writing()
        if (trip := self.flushing) is not None:
            self.flushing = None
            trip.written()
            trip.wait_anew()

    def close(self) -> None:
        # At once: closing politely would first flush the rest of a request that nobody wants any more, and under TLS
        # wait up to 30 s for the other side's goodbye.
        payload = self._payload
        self.abort()
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            # aiohttp forgets whoever is reading: closing the session would leave them waiting for ever.
            payload.set_exception(aiohttp.ClientConnectionError("closed"))

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:
        super().set_exception(exc, *(() if exc_cause is None else (exc_cause,)))
        if isinstance(exc, HttpProcessingError) and self._payload is not None and self._payload.exception() is None:
            # Broken framing in the middle of a body: aiohttp's parser has let go of the body, and its reader would
            # wait for ever. (Not for other errors: an early refusal is still readable when the request cannot be sent.)
            self._payload.set_exception(exc)

    def wait_for_answer(self) -> Alarm | None:
        """Start the time for the first byte."""
        limit = None if self.owner is None else self.owner.first_byte
        return None if limit is None else limit.start(self.expire)

    def expire(self) -> None:
        """No answer in time: whoever waits for it gets the error and closes the connection."""
        self.set_exception(aiohttp.SocketTimeoutError())

    def is_stale(self) -> bool:
        """Whether an idle connection has something to say: its end, or what nobody asked for. Neither can serve again.

        Asks the kernel: when the loop was blocked, the server's FIN waits there unseen.
        """
        return self.should_close or bool(self.readable(0))


class Connector(aiohttp.TCPConnector):
    """A pool without an upper limit (the pool of clients is the limit), whose connections are :class:`Protocol`."""

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | bool,
        keepalive_seconds: float,
        connect: Alarms | None,
        first_byte: Alarms | None,
    ) -> None:
        keep: dict[str, Any] = (
            {"keepalive_timeout": keepalive_seconds} if keepalive_seconds > 0 else {"force_close": True}
        )
        # The resolver by name: the default depends on whether aiodns happens to be installed.
        super().__init__(limit=0, ssl=tls, resolver=aiohttp.ThreadedResolver(), **keep)
        self._factory = partial(Protocol, loop=self._loop)  # type: ignore[assignment]  # partial is invariant
        self._connect = connect
        self.first_byte = first_byte
        self.models: dict[tuple[str, URL], Request] = {}
        """By method and URL, requests of which those that follow are copied."""
        self.protocols: set[Protocol] = set()
        """The open connections that have been handed out at least once."""
        self.opened = 0
        self.connecting: set[Limit] = set()
        self.on_drained: Callable[[], object] | None = None
        """Called whenever the last connection has come back."""

    def alarms(self) -> list[Alarms]:
        return [alarms for alarms in (self._connect, self.first_byte) if alarms is not None]

    @property
    def in_flight(self) -> int:
        """Requests that are connecting, waiting for their answer, or reading it."""
        return len(self._acquired)

    def idle(self) -> list[Protocol]:
        return [protocol for protocol in self.protocols if protocol not in self._acquired]

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout) -> Connection:
        trip = TRIP.get()
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol = connection.protocol
            assert isinstance(protocol, Protocol)
            if not protocol.served:
                self.opened += 1
                self.protocols.add(protocol)
                protocol.owner = self
                break
            if not protocol.is_stale():
                break
            connection.close()
        exchange = trip.exchange
        assert exchange is not None, "a trip ends after its request"
        exchange.reused = protocol.served
        try:
            if exchange.on_connection is not None:
                exchange.on_connection()
        except BaseException:
            connection.release()
            raise
        protocol.served = True
        protocol.awaiting = exchange
        trip.protocol = protocol
        trip.alarm = protocol.wait_for_answer()
        return connection

    async def _create_connection(
        self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        limit = Limit(self._connect)
        self.connecting.add(limit)
        try:
            with limit:
                return await super()._create_connection(req, traces, timeout)
        finally:
            self.connecting.discard(limit)

    def _release_acquired(self, key: Any, proto: ResponseHandler) -> None:
        super()._release_acquired(key, proto)
        if self.on_drained is not None and not self._acquired:
            self.on_drained()


def _watch(descriptor: int) -> Callable[[int], list[tuple[int, int]]]:
    """A function that says without waiting whether the socket has something to read."""
    if not hasattr(select, "poll"):  # pragma: no cover - Windows
        return lambda _: [(descriptor, 1)] if select.select([descriptor], [], [], 0)[0] else []
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return poller.poll
