"""HTTP/1.1 to one provider, on aiohttp: timeouts, proxies, bounds, and the truth about how far a request got."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
from yarl import URL

from ..core.exceptions import (
    LLMConfigurationError,
    LLMConnectionError,
    LLMException,
    LLMProtocolError,
)
from ..core.settings import TimeoutSettings, TransportSettings
from ..core.types import Headers
from ..utils.alarms import Alarms
from ..utils.clock import Clock
from .base import Exchange, HTTPRequest
from .connections import TRIP, Body, Connector, Trip
from .failures import FOREIGN, explain
from .proxies import ProxyRules
from .tls import tls_context

if TYPE_CHECKING:
    import ssl

try:
    _VERSION = metadata.version("brimful")
except metadata.PackageNotFoundError:  # a checkout that was not installed
    _VERSION = "0"

USER_AGENT = "brimful/{} python/{}.{} aiohttp/{}".format(_VERSION, *sys.version_info[:2], aiohttp.__version__)

_ROUTES = 256
"""How many URLs are remembered; a provider has a handful, but a dialect may put the model into the path."""
_MAX_FIELD = 32 * 1024
_INHERITED: list[_Generation] = []
"""What a forked child got of its parent's: kept for ever, because letting go would close the parent's sockets."""


class Route(NamedTuple):
    """Where a URL leads. *peer* is what messages call it: without userinfo, path and query."""

    url: URL
    proxy: URL | None
    peer: str


class HTTPTransport:
    """Implements :class:`llm.transports.base.Transport`.

    It belongs to the event loop it first sends on; when that loop is closed, or after a fork, it starts afresh. With
    *max_age* (seconds) a set of connections older than that gets no new requests, and is closed when its last response
    ends. Nothing is opened in the constructor, which may run outside a loop; the files of *settings* are read there.

    Raises:
        LLMConfigurationError: a file or the proxy in *settings* cannot be used.
    """

    def __init__(
        self,
        settings: TransportSettings,
        timeouts: TimeoutSettings,
        *,
        clock: Clock,
        environ: Mapping[str, str] | None = None,
        max_age: float | None = None,
    ) -> None:
        self._settings = settings
        self._timeouts = timeouts
        self._clock = clock
        self._max_age = max_age
        self._tls = tls_context(settings)
        self._proxies = ProxyRules.of(settings.proxy, os.environ if environ is None else environ)
        self._routes: dict[str, Route] = {}
        self._current: _Generation | None = None
        self._retired: set[_Generation] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._opened = 0
        self._closed = False

    def __repr__(self) -> str:
        facts = ", ".join(f"{value} {name}" for name, value in self.statistics().items())
        return f"<HTTPTransport{' closed' if self._closed else ''}: {facts}>"

    async def send(self, request: HTTPRequest, exchange: Exchange) -> HTTPResponse:
        """As the port says; a status of any kind is a response, and a redirect is not followed."""
        generation = self._generation()
        route = self._routes.get(request.url) or self._route(request.url)
        trip = Trip(exchange)
        token = TRIP.set(trip)
        try:
            response = await generation.session.request(
                request.method,
                route.url,
                headers=request.headers,
                data=Body(request.body, trip) if request.body else None,
                proxy=route.proxy,
                allow_redirects=False,
            )
        except FOREIGN as error:
            failure = self._failure(error, route, exchange)
        else:
            exchange.written = exchange.written or not request.body
            return HTTPResponse(response, generation, route.peer, exchange, self._settings.max_response_bytes)
        finally:
            TRIP.reset(token)
            if trip.alarm is not None:
                trip.alarm.cancel()
                trip.alarm = None
        # Outside the handler, so that aiohttp's error, which knows the request's headers, is not this one's context.
        try:
            raise failure
        finally:
            del failure

    async def close(self) -> None:
        """Close every connection and wait until that is done; what is still pending ends with an LLMConnectionError."""
        self._closed = True
        current, self._current = self._current, None
        generations = [*self._retired, *([] if current is None else [current])]
        self._retired.clear()
        for generation in generations:
            if self._is_usable(generation):
                self._opened += generation.connector.opened
                await generation.close()
        while self._closing:
            await asyncio.wait(self._closing)

    def prune(self) -> int:
        """Close the idle connections that the server has closed, without traffic; returns how many there were."""
        stale = [
            protocol
            for generation in self._generations()
            for protocol in generation.connector.idle()
            if protocol.is_stale()
        ]
        for protocol in stale:
            protocol.close()
        return len(stale)

    def statistics(self) -> dict[str, int]:
        """``open`` and ``idle`` connections, how many were ever ``opened``, and requests ``in_flight``."""
        connectors = [generation.connector for generation in self._generations()]
        return {
            "open": sum(len(connector.protocols) for connector in connectors),
            "idle": sum(len(connector.idle()) for connector in connectors),
            "opened": self._opened + sum(connector.opened for connector in connectors),
            "in_flight": sum(connector.in_flight for connector in connectors),
        }

    def _generations(self) -> Iterator[_Generation]:
        if self._current is not None:
            yield self._current
        yield from self._retired

    def _generation(self) -> _Generation:
        """The connections that a new request uses."""
        if self._closed:
            raise LLMConnectionError("the transport is closed", retryable=False)
        current = self._current
        if current is not None and self._is_usable(current):
            if self._max_age is None or self._clock.now() - current.born < self._max_age:
                return current
            self._retire(current)
        self._current = _Generation(self._settings, self._timeouts, self._tls, self._clock)
        return self._current

    def _is_usable(self, generation: _Generation) -> bool:
        """Whether *generation* belongs to this process and loop; what is dead is dropped, what is foreign raises."""
        if generation.pid != os.getpid():
            _INHERITED.append(generation)
        elif generation.loop is asyncio.get_running_loop():
            return True
        elif generation.loop.is_closed():
            generation.abandon()
        else:
            raise LLMConfigurationError(
                "the transport was opened on another event loop, which is still open: use one manager per event loop"
            )
        self._retired.clear()
        return False

    def _retire(self, generation: _Generation) -> None:
        """No new requests for *generation*; it is closed when the last response has ended."""
        self._retired.add(generation)

        def drained() -> None:
            generation.connector.on_drained = None
            # Not here: the connection that came back is still on its way into the pool.
            generation.loop.call_soon(self._close_retired, generation)

        generation.connector.on_drained = drained
        if not generation.connector.in_flight:
            drained()

    def _close_retired(self, generation: _Generation) -> None:
        if generation in self._retired:
            self._retired.discard(generation)
            self._opened += generation.connector.opened
            task = generation.loop.create_task(generation.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _route(self, text: str) -> Route:
        try:
            url = URL(text)
            host, port = url.host, url.port
        except ValueError:
            host = port = None
        if not host or port is None or url.scheme not in ("http", "https"):
            raise LLMConfigurationError("base_url: not a URL of the form https://host or http://host:port")
        peer = f"{host}:{port}"
        proxy = self._proxies.proxy_for(url.scheme, host, port)
        proxy_url = None
        if proxy is not None:
            try:
                proxy_url = URL(proxy)
                peer = f"{peer} through the proxy {proxy_url.host}:{proxy_url.port}"
            except ValueError:
                # Without its cause, which repeats the URL with its password.
                raise LLMConfigurationError("the proxy's URL is malformed; write http://host:port") from None
        if len(self._routes) >= _ROUTES:
            self._routes.clear()
        route = self._routes[text] = Route(url, proxy_url, peer)
        return route

    def _failure(self, error: Exception, route: Route, exchange: Exchange) -> LLMException:
        if self._closed:
            error.__traceback__ = None
            return LLMConnectionError("the transport was closed", sent=exchange.connected, retryable=False)
        return explain(error, peer=route.peer, exchange=exchange)


class _Generation:
    """One aiohttp session with its connections and timers, all of one loop."""

    __slots__ = ("born", "clock", "connector", "idle", "loop", "pid", "session")

    def __init__(
        self, settings: TransportSettings, timeouts: TimeoutSettings, tls: ssl.SSLContext | bool, clock: Clock
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.pid = os.getpid()
        self.clock = clock
        self.born = clock.now()
        connect, first_byte, self.idle = (
            None if seconds is None else Alarms(seconds, clock)
            for seconds in (timeouts.connect, timeouts.first_byte, timeouts.idle)
        )
        self.connector = Connector(
            tls=tls, keepalive_seconds=settings.keepalive_seconds, connect=connect, first_byte=first_byte
        )
        self.session = aiohttp.ClientSession(
            connector=self.connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            # br and zstd only come with further packages, whose decoders are not all bounded.
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "gzip, deflate"},
            timeout=aiohttp.ClientTimeout(total=None),
            max_field_size=_MAX_FIELD,
            max_headers=256,
        )
        # aiohttp sends a GET again by itself when a reused connection breaks. Repetition belongs to the retry layer.
        self.session._retry_connection = False

    async def close(self) -> None:
        for limit in tuple(self.connector.connecting):
            limit.expire()
        await self.session.close()
        for alarms in self.connector.alarms():
            alarms.close()
        if self.idle is not None:
            self.idle.close()
        # Connections that were given up just before are still being closed by the loop.
        for _ in range(100):
            if not self.connector.protocols and not self.connector.connecting:
                break
            await self.clock.sleep(0)

    def abandon(self) -> None:
        """The loop is closed, so nothing can be closed on it any more: only keep aiohttp from complaining."""
        self.session.detach()
        try:
            self.connector.close().send(None)
        except (StopIteration, RuntimeError):
            pass


class ResponseHeaders(Mapping[str, str]):
    """aiohttp's headers as the port wants them: names in lower case, of several fields of one name the first."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        return self._fields[name]

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter({name.lower(): None for name in self._fields})

    def __len__(self) -> int:
        return len({name.lower() for name in self._fields})

    def __repr__(self) -> str:
        return f"<ResponseHeaders {', '.join(self)}>"


class HTTPResponse:
    """Implements :class:`llm.transports.base.TransportResponse`.

    ``read`` is bounded by ``max_response_bytes``, counted after decompression. ``read_some`` is not: a stream may be as
    long as it likes, since no more of it than about half a megabyte is ever held here.
    """

    __slots__ = ("_content", "_exchange", "_generation", "_max_bytes", "_peer", "_response", "headers", "status")

    def __init__(
        self, response: aiohttp.ClientResponse, generation: _Generation, peer: str, exchange: Exchange, max_bytes: int
    ) -> None:
        self.status = response.status
        self.headers: Headers = ResponseHeaders(response.headers)
        self._response = response
        self._content = response.content
        self._generation = generation
        self._peer = peer
        self._exchange = exchange
        self._max_bytes = max_bytes

    def __repr__(self) -> str:
        return f"<HTTPResponse {self.status} from {self._peer}>"

    async def read(self) -> bytes:
        """As the port says.

        Raises:
            LLMProtocolError: the body is larger than ``max_response_bytes``; the socket is then closed.
        """
        pieces = []
        left = self._max_bytes
        while piece := await self.read_some():
            left -= len(piece)
            if left < 0:
                self.close()
                raise LLMProtocolError(
                    f"the answer of {self._peer} is larger than transport.max_response_bytes ({self._max_bytes})",
                    status=self.status,
                    sent=True,
                )
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_some(self) -> bytes:
        content = self._content
        if content._buffer:
            # readany() would raise a stored error first, and what had arrived before it would be lost.
            return content._read_nowait(-1)
        if content.is_eof():
            return b""
        idle = self._generation.idle
        alarm = None if idle is None else idle.start(self._expire)
        try:
            return await content.readany()
        except FOREIGN as error:
            failure = explain(error, peer=self._peer, exchange=self._exchange, reading=True)
        except BaseException:
            # Cancelled: a body that is half read is of no use to the next request.
            self.close()
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
        self.close()
        try:
            raise failure
        finally:
            del failure

    def close(self) -> None:
        response = self._response
        if response.closed:
            return
        loop = self._generation.loop
        try:
            here = asyncio.get_running_loop() is loop
        except RuntimeError:
            here = False
        if here:
            response.close()
        elif not loop.is_closed():
            # A finaliser may run anywhere, also on another thread.
            loop.call_soon_threadsafe(response.close)

    def _expire(self) -> None:
        self._content.set_exception(aiohttp.SocketTimeoutError())
