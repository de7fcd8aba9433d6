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
)
from ..core.settings import TimeoutSettings, TransportSettings
from ..utils.alarms import Alarms
from ..utils.clock import Clock
from .base import Exchange, HTTPRequest
from .connections import Connector
from .failures import FOREIGN, explain
from .proxies import ProxyRules
from .request import DIRECT, TRIP, Body, Request, Trip, fetch
from .response import HTTPResponse
from .tls import tls_context

if TYPE_CHECKING:
    import ssl

try:
    _VERSION = metadata.version("brimful")
except metadata.PackageNotFoundError:  # a checkout that was not installed
    _VERSION = "0"

USER_AGENT = "brimful/{} python/{}.{} aiohttp/{}".format(_VERSION, *sys.version_info[:2], aiohttp.__version__)

# br and zstd only come with further packages, whose decoders are not all bounded.
_HEADERS = {"user-agent": USER_AGENT, "accept-encoding": "gzip, deflate"}
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
    direct: bool
    """Whether :func:`~.request.fetch` may be used for it."""


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
            if request.body and route.direct:
                response = await fetch(
                    generation.session,
                    generation.connector,
                    request.method,
                    route.url,
                    request.headers,
                    Body(request.body, trip),
                )
            else:
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
            return HTTPResponse(
                response, route.peer, exchange, idle=generation.idle, max_bytes=self._settings.max_response_bytes
            )
        finally:
            TRIP.reset(token)
            trip.end()
        # Outside the handler, so that aiohttp's error, which knows the request's headers, is not this one's context.
        try:
            raise failure
        finally:
            del failure

    async def close(self) -> None:
        """Close every connection and wait until that is done; what is still pending ends with an LLMConnectionError."""
        generations = list(self._generations())
        mine = not generations or self._is_mine(generations[0])
        self._closed = True
        if not mine:
            self._forget_all()
            return
        self._current = None
        self._retired.clear()
        for generation in generations:
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
        if current is not None:
            if not self._is_mine(current):
                self._forget_all()
            elif self._max_age is None or self._clock.now() - current.born < self._max_age:
                return current
            else:
                self._retire(current)
        self._current = _Generation(self._settings, self._timeouts, self._tls, self._clock)
        return self._current

    def _is_mine(self, generation: _Generation) -> bool:
        """Whether *generation* belongs to this process and loop; False when it never can again."""
        if generation.pid != os.getpid():
            return False
        if generation.loop is asyncio.get_running_loop():
            return True
        if generation.loop.is_closed():
            return False
        raise LLMConfigurationError(
            "the transport was opened on another event loop, which is still open: use one manager per event loop"
        )

    def _forget_all(self) -> None:
        """Let go of connections that are another process's, or whose loop is closed."""
        for generation in self._generations():
            if generation.pid != os.getpid():
                _INHERITED.append(generation)
            else:
                generation.abandon()
        self._current = None
        self._retired.clear()
        self._closing.clear()

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
        route = self._routes[text] = Route(
            url, proxy_url, peer, DIRECT and proxy_url is None and url.user is url.password is None
        )
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
            headers=_HEADERS,
            timeout=aiohttp.ClientTimeout(total=None),
            request_class=Request if DIRECT else aiohttp.ClientRequest,
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
