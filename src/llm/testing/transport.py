"""A transport without a socket: it plays a script, keeps what it was sent, and tells the truth about how far it got."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial
from inspect import isawaitable

import msgspec

from ..core.exceptions import LLMConnectionError, LLMException
from ..transports.base import Exchange, HTTPRequest
from ..utils.clock import Clock, SystemClock


class Scripted(msgspec.Struct, frozen=True):
    """One answer of a script.

    *body* is the whole body at once; *pieces*, when given, is the body in its place: each ``bytes`` is one read, each
    ``float`` a pause in seconds (``math.inf``: for ever), an exception is raised when the reader gets to it.
    """

    status: int = 200
    headers: Mapping[str, str] = {}
    body: bytes = b""
    pieces: tuple[bytes | float | BaseException, ...] | None = None
    delay: float = 0.0
    """Seconds from the request to the head; ``math.inf``: it never comes."""


Answer = Scripted | BaseException
"""An exception is raised by ``send``. It stands for a connection that was lost after the request had left, unless it is
an LLMException with ``sent`` false: that one never had a connection."""

Script = Iterable[Answer] | Callable[[HTTPRequest], Answer | Awaitable[Answer]]


class ScriptedTransport:
    """Implements :class:`llm.transports.base.Transport` from a list of answers, or from a function that makes them.

    ``requests`` and ``exchanges`` hold what was sent, in order. Connections are counted as a real pool would: one that
    has served to its end is idle and serves again (``Exchange.reused``), one that was given up is gone.
    """

    def __init__(self, script: Script = (), *, clock: Clock | None = None) -> None:
        self._answer: Callable[[HTTPRequest], Answer | Awaitable[Answer]]
        if callable(script):
            self._answer = script
        else:
            self._answer = _reader(iter(script), self)
        self._clock = clock or SystemClock()
        self._waiting: set[asyncio.Future[None]] = set()
        self._idle = self._opened = self._in_flight = 0
        self.requests: list[HTTPRequest] = []
        self.exchanges: list[Exchange] = []
        self.closed = False

    def __repr__(self) -> str:
        return f"<ScriptedTransport: {len(self.requests)} requests, {self._in_flight} in flight>"

    async def send(self, request: HTTPRequest, exchange: Exchange) -> ScriptedResponse:
        self._refuse_when_closed()
        self.requests.append(request)
        self.exchanges.append(exchange)
        answer = self._answer(request)
        if isawaitable(answer):
            answer = await answer
            self._refuse_when_closed()
        if isinstance(answer, LLMException) and not answer.sent:
            raise answer
        self._connect(exchange)
        try:
            if isinstance(answer, BaseException):
                raise answer
            await self.pause(answer.delay)
        except BaseException:
            self._in_flight -= 1
            raise
        exchange.started = True
        return ScriptedResponse(self, answer)

    async def close(self) -> None:
        self.closed = True
        self._idle = 0
        for waiter in self._waiting:
            if not waiter.done() and not waiter.get_loop().is_closed():
                waiter.set_exception(
                    LLMConnectionError("the scripted transport was closed", sent=True, retryable=False)
                )
        await asyncio.sleep(0)

    def statistics(self) -> dict[str, int]:
        return {
            "open": self._idle + self._in_flight,
            "idle": self._idle,
            "opened": self._opened,
            "in_flight": self._in_flight,
        }

    async def pause(self, seconds: float, response: ScriptedResponse | None = None) -> None:
        """Wait on the transport's clock; closing it, or *response*, ends the wait with LLMConnectionError."""
        if seconds <= 0:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if response is not None:
            response.reading = waiter
        timer = (
            None if math.isinf(seconds) else self._clock.call_at(self._clock.now() + seconds, partial(_wake, waiter))
        )
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)
            # It holds the error that it raised, whose traceback holds this frame.
            del waiter
            if timer is not None:
                timer.cancel()

    def ended(self, *, reusable: bool) -> None:
        """A response has let go of its connection."""
        self._in_flight -= 1
        if reusable and not self.closed:
            self._idle += 1

    def _connect(self, exchange: Exchange) -> None:
        exchange.reused = self._idle > 0
        if exchange.reused:
            self._idle -= 1
        else:
            self._opened += 1
        self._in_flight += 1
        try:
            if exchange.on_connection is not None:
                exchange.on_connection()
        except BaseException:
            self.ended(reusable=True)
            raise
        exchange.written = True

    def _refuse_when_closed(self) -> None:
        if self.closed:
            raise LLMConnectionError("the transport is closed", retryable=False)


class ScriptedResponse:
    """The response of a :class:`ScriptedTransport`."""

    def __init__(self, transport: ScriptedTransport, answer: Scripted) -> None:
        self.status = answer.status
        self.headers: dict[str, str] = {name.lower(): value for name, value in answer.headers.items()}
        whole = (answer.body,) if answer.body else ()
        self._pieces = iter(whole if answer.pieces is None else answer.pieces)
        self._transport = transport
        self._failure: BaseException | None = None
        self.reading: asyncio.Future[None] | None = None
        """What a read waits for."""
        self.closed = False
        """Whether the connection has been let go, at the body's end or before."""

    async def read(self) -> bytes:
        pieces = []
        while piece := await self.read_some():
            pieces.append(piece)
        return b"".join(pieces)

    async def read_some(self) -> bytes:
        if self._failure is not None:
            raise self._failure
        if self.closed:
            return b""
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                self._failure = piece
                self._let_go(reusable=False)
                raise piece
            if isinstance(piece, bytes):
                if piece:
                    return piece
                continue
            try:
                await self._transport.pause(piece, self)
            except BaseException:
                self.close()
                raise
            finally:
                self.reading = None
        self._let_go(reusable=True)
        return b""

    def close(self) -> None:
        self._let_go(reusable=False)
        reading = self.reading
        if reading is not None and not reading.done() and not reading.get_loop().is_closed():
            reading.set_exception(LLMConnectionError("the response was closed", sent=True))

    def _let_go(self, *, reusable: bool) -> None:
        if not self.closed:
            self.closed = True
            self._transport.ended(reusable=reusable)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _reader(answers: Iterator[Answer], transport: ScriptedTransport) -> Callable[[HTTPRequest], Answer]:
    def answer(request: HTTPRequest) -> Answer:
        for found in answers:
            return found
        raise AssertionError(f"the script has no answer left for request {len(transport.requests)}: {request}")

    return answer
