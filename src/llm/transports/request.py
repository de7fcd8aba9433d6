"""One request under way in aiohttp: what its sender, its body and its connection know of each other, and its short way.

What is used of aiohttp without being documented: ``Payload.write_with_length``; and, in the versions that it was tried
with, ``_serialize_headers`` and what :class:`Request` and :func:`fetch` do in place of ``ClientRequest`` and of the
session. tests/transports fails when one of them changes.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import http_writer
from aiohttp.client_reqrep import ClientRequest, ClientResponse
from aiohttp.hdrs import CONTENT_LENGTH, CONTENT_TYPE, EXPECT, TRANSFER_ENCODING
from aiohttp.http_writer import StreamWriter
from aiohttp.payload import Payload
from multidict import CIMultiDict

from ..utils.alarms import Alarm
from .base import Exchange

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.connector import Connection
    from yarl import URL

    from .connections import Connector, Protocol

_SMALL = 1 << 15
"""Bytes of a body that aiohttp's writer takes without waiting, with room to spare."""
_MODELS = 256
"""How many requests are kept to be copied; a provider has a handful of URLs, unless its models stand in them."""
_SLICE = 1 << 18
"""Bytes of a body given to the transport at once: what the kernel does not take is copied."""


class Trip:
    """One request under way: what the connection, the body and the sender know of each other."""

    __slots__ = ("alarm", "exchange", "protocol")

    def __init__(self, exchange: Exchange) -> None:
        self.exchange: Exchange | None = exchange
        self.protocol: Protocol | None = None
        self.alarm: Alarm | None = None

    def end(self) -> None:
        """The answer has begun, or will not. Whatever aiohttp and asyncio set going meanwhile keeps the context it was
        started in, a connection's for its whole life: nothing of the call may hang on that."""
        if self.alarm is not None:
            self.alarm.cancel()
        self.alarm = self.protocol = self.exchange = None

    def handed_over(self) -> None:
        """The last byte of the request was given to the transport."""
        protocol = self.protocol
        if protocol is None or protocol.transport is None or protocol.transport.is_closing():
            return
        if protocol.writing_paused:
            protocol.flushing = self
        else:
            self.written()

    def written(self) -> None:
        """The last byte of the request was taken by the kernel."""
        if self.exchange is not None:
            self.exchange.written = True

    def wait_anew(self) -> None:
        """The time for the first byte counts from the request's end, and this request took long to send."""
        protocol = self.protocol
        if self.alarm is not None and protocol is not None:
            self.alarm.cancel()
            self.alarm = protocol.wait_for_answer()


TRIP: ContextVar[Trip] = ContextVar("brimful_trip")
"""aiohttp has no way to hand anything of a request's own to the connector without its tracing machinery."""


class Body(Payload):
    """A request's body, which knows when it has been written. (aiohttp's own warns from 1 MB on.)"""

    _autoclose = True

    _encoding = _filename = None

    def __init__(self, value: bytes, trip: Trip) -> None:
        # Without aiohttp's own, which makes headers that hardly any request takes.
        self._value = value
        self._size = len(value)
        self.is_small = len(value) <= _SMALL
        """Whether it can be written without waiting."""
        self.trip = trip

    @property
    def _headers(self) -> CIMultiDict[str]:  # type: ignore[override]
        return CIMultiDict({CONTENT_TYPE: self._default_content_type})

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return str(self._value, encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        value = self._value
        if len(value) <= _SLICE:
            await writer.write(value)
        else:
            for start in range(0, len(value), _SLICE):
                await writer.write(value[start : start + _SLICE])
            self.trip.wait_anew()
        self.trip.handed_over()


class _Written(StreamWriter):
    """The writer of a request that was written at once: responses ask it only how much."""

    def __init__(self) -> None:
        pass


_WRITTEN = _Written()


class Request(ClientRequest):
    """A request whose body, if that is small, leaves together with its head.

    For each body aiohttp makes a task, which before Python 3.12 is started a turn of the loop later: a tenth of what a
    whole call costs.
    """

    @classmethod
    def like(cls, model: Request, headers: dict[str, str], body: Body) -> Request | None:
        """*model* with *headers* and *body* added: a quarter of what making it anew costs.

        None where *headers* say how the body is framed, which aiohttp then has to know.
        """
        own = model.headers.copy()
        own.update(headers)
        if TRANSFER_ENCODING in own or EXPECT in own:
            return None
        own[CONTENT_LENGTH] = str(body.size)
        if CONTENT_TYPE not in own:
            own.update(body.headers)
        request = cls.__new__(cls)
        request.__dict__.update(model.__dict__)
        request.headers, request._body = own, body
        return request

    async def send(self, conn: Connection) -> ClientResponse:
        body, protocol = self._body, conn.protocol
        if (
            type(body) is not Body
            or not body.is_small
            or protocol is None
            or protocol.writing_paused
            or self.proxy is not None
            or self.chunked
            or self._continue is not None
            or conn._connector.force_close
        ):
            return await super().send(conn)
        transport = protocol.transport
        if transport is None or transport.is_closing():
            raise aiohttp.ClientConnectionResetError("the connection was closed before the request was written")
        transport.write(
            http_writer._serialize_headers(f"{self.method} {self.url.raw_path_qs} HTTP/1.1", self.headers) + body._value
        )
        body.trip.handed_over()
        protocol.start_timeout()
        self.response = self.response_class(
            self.method,
            self.original_url,
            writer=None,
            continue100=None,
            timer=self._timer,
            request_info=self.request_info,
            traces=self._traces,
            loop=self.loop,
            session=self._session,
            stream_writer=_WRITTEN,
        )
        return self.response


DIRECT = aiohttp.__version__.startswith("3.14.")
"""Whether :class:`Request` and :func:`fetch` have been tried with this aiohttp; else all is left to its session."""
_PARTS: dict[str, Any] = {
    "skip_payload": False,
    "read_until_eof": True,
    "auto_decompress": True,
    "read_timeout": None,
    "read_bufsize": 1 << 16,
    "timeout_ceil_threshold": 5,
    "max_line_size": 8190,
}
NO_TIMEOUT = aiohttp.ClientTimeout(total=None)


async def fetch(
    session: aiohttp.ClientSession, connector: Connector, method: str, url: URL, headers: dict[str, str], body: Body
) -> ClientResponse:
    """The response to a POST, as ``session.request`` gives it.

    It leaves out what the session does for redirects, cookies, timers, proxies and its own middleware, which would be a
    tenth of what a whole call costs.
    """
    model = connector.models.get((method, url))
    if model is None:
        model = Request(method, url, headers=session.headers, loop=connector._loop, session=session)
        if len(connector.models) >= _MODELS:
            connector.models.clear()
        connector.models[method, url] = model
    request = Request.like(model, headers, body)
    if request is None:
        merged = {**session.headers, **headers}
        request = Request(method, url, headers=merged, data=body, loop=connector._loop, session=session)
    try:
        connection = await connector.connect(request, [], NO_TIMEOUT)
    except TimeoutError as error:
        raise aiohttp.ConnectionTimeoutError(f"Connection timeout to host {url}") from error
    try:
        protocol = connection.protocol
        assert protocol is not None
        protocol.set_response_params(
            timer=request._timer, max_field_size=session._max_field_size, max_headers=session._max_headers, **_PARTS
        )
        response = await request.send(connection)
        try:
            await response.start(connection)
        except BaseException:
            response.close()
            raise
    except BaseException:
        connection.close()
        raise
    return response
