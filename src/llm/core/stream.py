"""A streamed answer: a body that arrives, a decoder that reads it, and the promise that its end is never a lie.

Theory of operation. The decoder says when the answer is whole (``done``: its terminal event was decoded) and when it is
spoilt (``error``). Everything else that can end a stream — a cut connection, silence, a deadline, the reader going
away — ends it *not* whole. Chunks decoded before a failure are delivered first, then the failure is raised, so what a
reader sees depends on the events and never on how the network cut the bytes. A stream settles once: when the terminal
event is decoded, or when it fails or is given up, whichever comes first.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, NoReturn, Protocol, Self

from ..utils.clock import Clock, TimerHandle
from .content import Part, Text
from .exceptions import (
    LLMConnectionError,
    LLMDeadlineExceededError,
    LLMException,
    LLMStreamInterruptedError,
    LLMTimeoutError,
    TargetFailure,
)
from .patience import Patience
from .types import (
    FaultReporter,
    LLMResponse,
    SettledCallback,
    Settlement,
    StopReason,
    StreamChunk,
    Usage,
    run_settled,
)

DRAIN_READS = 8
DRAIN_SECONDS = 1.0
"""What is spent after the terminal event on reaching the body's end, so that the connection can be used again."""


class Body(Protocol):
    """The bytes of a stream; ``transports.base.TransportResponse`` is one."""

    async def read_some(self) -> bytes: ...

    def close(self) -> None: ...


class Decoder(Protocol):
    """The reader of the bytes; ``providers.base.StreamDecoder`` is one."""

    error: LLMException | None

    @property
    def done(self) -> bool: ...

    @property
    def usage(self) -> Usage | None: ...

    @property
    def stop_reason(self) -> StopReason | None: ...

    @property
    def id(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def events(self) -> int: ...

    def feed(self, data: bytes) -> list[StreamChunk]: ...

    def end(self) -> list[StreamChunk]: ...


class ResponseStream:
    """One streamed answer: ``async for chunk in stream``. Close it, or use it in ``async with``.

    *describe* completes an error with what the endpoint knows (provider, key, model) before it is raised.
    """

    __slots__ = (
        "_body",
        "_bytes",
        "_callbacks",
        "_clock",
        "_content",
        "_counted",
        "_decoder",
        "_describe",
        "_error",
        "_patience",
        "_report",
        "_seen",
        "_settlement",
        "_timer",
        "failures",
        "key_id",
        "provider",
        "ready",
        "request_id",
        "resumed",
        "warnings",
    )

    def __init__(
        self,
        body: Body,
        decoder: Decoder,
        *,
        clock: Clock,
        provider: str = "",
        key_id: str = "",
        request_id: str | None = None,
        warnings: tuple[str, ...] = (),
        describe: Callable[[LLMException], object] | None = None,
        report: FaultReporter | None = None,
        idle: float | None = None,
        min_rate: float | None = None,
    ) -> None:
        self._body = body
        self._decoder = decoder
        self._clock = clock
        self._describe = describe
        self._report = report
        self.ready: deque[StreamChunk] = deque()
        """What was decoded and not read yet."""
        self._seen: list[StreamChunk] = []
        self._counted = self._bytes = 0
        self._callbacks: list[SettledCallback] = []
        self._content = False
        self._error: LLMException | None = None
        self._settlement: Settlement | None = None
        self._timer: TimerHandle | None = None
        self._patience = (
            Patience(clock, idle=idle, rate=min_rate, late=self._late)
            if idle is not None or min_rate is not None
            else None
        )
        self.provider = provider
        self.key_id = key_id
        self.request_id = request_id
        self.warnings = warnings
        self.failures: tuple[TargetFailure, ...] = ()
        """The targets of a fallback chain that were asked before, or passed over, and why."""
        self.resumed: Literal["restart", "continue"] | None = None
        """How it was made whole after it had broken off."""

    def __repr__(self) -> str:
        state = "open" if self._settlement is None else "whole" if self._decoder.done else "ended early"
        return f"<ResponseStream {self.provider} {self.model}: {state}, {len(self._seen)} chunks>"

    def tell_failures(self, failures: tuple[TargetFailure, ...]) -> None:
        """Complete a stream that nobody has seen yet."""
        self.failures = failures

    @property
    def usage(self) -> Usage | None:
        """What the vendor has told so far of the cost; final once the stream is whole."""
        return self._decoder.usage

    @property
    def id(self) -> str:
        return self._decoder.id

    @property
    def model(self) -> str:
        return self._decoder.model

    @property
    def stop_reason(self) -> StopReason | None:
        """Why the model stopped; None until it has."""
        return self._decoder.stop_reason

    @property
    def text(self) -> str:
        """The text that has arrived so far."""
        return "".join([chunk.text for chunk in self._seen])

    @property
    def received(self) -> int:
        """Bytes of text, thinking and arguments that have arrived so far. It is counted only when somebody asks."""
        seen, count = self._seen, self._counted
        if count < len(seen):
            self._counted = len(seen)
            new = "".join([_written(chunk) for chunk in seen[count:]])
            self._bytes += len(new) if new.isascii() else len(new.encode("utf-8", "surrogatepass"))
        return self._bytes

    @property
    def settled(self) -> bool:
        return self._settlement is not None

    @property
    def whole(self) -> bool:
        """Whether its terminal event has come, and all was well."""
        return self._decoder.done and self._error is None

    def response(self) -> LLMResponse:
        """The whole answer, once the stream has ended well.

        Raises:
            LLMStreamInterruptedError: it has not.
        """
        if not self.whole:
            raise LLMStreamInterruptedError("the stream has not been read to its end", partial=self.text)
        return LLMResponse(
            text=self.text,
            model=self.model,
            usage=self.usage or Usage(),
            stop_reason=self.stop_reason or StopReason.UNKNOWN,
            refusal="".join([chunk.refusal for chunk in self._seen]) or None,
            thinking="".join([chunk.thinking for chunk in self._seen]),
            content=_content(self._seen),
            id=self._decoder.id,
            provider=self.provider,
            key_id=self.key_id,
            request_id=self.request_id,
            warnings=self.warnings,
            failures=self.failures,
            resumed=self.resumed,
        )

    def on_settled(self, callback: SettledCallback) -> None:
        """Call *callback* once when the outcome is known, at once if it is. In order of registration.

        It is synchronous and may run in a timer or a finaliser; what it raises is reported, not passed on.
        """
        if self._settlement is not None:
            run_settled(callback, self._settlement, self._report)
        else:
            self._callbacks.append(callback)

    async def start(self) -> None:
        """Read until content is in hand, or the terminal event. A failure before that is raised: it may be repeated."""
        while not self._content and not self._decoder.done:
            if self._error is not None:
                self._raise()
            await self._read()

    def set_deadline(self, deadline: float) -> None:
        """End the stream with LLMDeadlineExceededError at the instant *deadline*, also while nobody reads it."""
        if self._settlement is None:
            self._timer = self._clock.call_at(deadline, self._expire)

    def close(self) -> None:
        """Give the answer up, unless it is whole. Synchronous and idempotent; the socket is closed at once."""
        if self._settlement is None:
            error = LLMStreamInterruptedError("the stream was closed before its end", retryable=False)
            self._complete(error)
            self._error = error
            self._settle(asyncio.CancelledError())
        self._body.close()

    def abort(self, error: LLMException) -> None:
        """End the stream with *error*, unless it is over: whoever reads it gets what was decoded, then the error."""
        if self._settlement is None:
            self._fail(error)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamChunk:
        while not self.ready:
            if self._error is not None:
                self._raise()
            if self._decoder.done:
                await self._drain()
                raise StopAsyncIteration
            await self._read()
        return self.ready.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def _read(self) -> None:
        """Take in what the next read brings: chunks, the end, or a failure."""
        patience, decoder = self._patience, self._decoder
        if patience is not None:
            began, events = self._clock.now(), decoder.events
        try:
            data = await self._body.read_some()
        except LLMException as error:
            if self._settlement is None:
                # Its traceback holds this frame, and so the stream that is to keep it.
                self._fail(self._interrupted(error.with_traceback(None)))
            return
        except BaseException:
            self.close()
            raise
        if self._settlement is not None:
            # The deadline struck, or somebody closed the stream, while the bytes were on their way.
            return
        try:
            chunks = decoder.feed(data) if data else decoder.end()
        except BaseException:
            # A decoder must not raise. One that does must not leave a connection and a permit behind.
            self.close()
            raise
        if chunks:
            self.ready += chunks
            self._seen += chunks
            if not self._content:
                self._content = any(chunk.has_content for chunk in chunks)
        if (failure := decoder.error) is not None:
            # Not kept there as well: once it is raised its traceback leads to this stream, and so to its decoder.
            decoder.error = None
            self._fail(failure)
        elif decoder.done:
            self._settle(None)
        elif patience is not None:
            if decoder.events == events:
                patience.nothing(began)
            else:
                patience.event()
            if self._content:
                patience.measure(began, self._count)

    def _count(self) -> int:
        return self.received

    def _late(self, error: LLMTimeoutError) -> None:
        if self._settlement is None:
            self._fail(self._interrupted(error))

    def _interrupted(self, error: LLMException) -> LLMException:
        """What a lost connection means: before content the call may be repeated, after it the answer is cut."""
        if not self._content or not isinstance(error, (LLMConnectionError, LLMTimeoutError)):
            return error
        interrupted = LLMStreamInterruptedError(f"the stream was cut: {error.message}", sent=True)
        interrupted.__cause__ = error
        return interrupted

    def _expire(self) -> None:
        self._timer = None
        if self._settlement is None:
            self._fail(LLMDeadlineExceededError("the call's deadline passed in the middle of its stream", sent=True))

    def _complete(self, error: LLMException) -> None:
        """Tell *error* what only the stream and the endpoint know."""
        error.partial = self.text
        error.sent = True
        if error.usage is None:
            error.usage = self._decoder.usage
        if self._describe is not None:
            self._describe(error)

    def _fail(self, error: LLMException) -> None:
        self._complete(error)
        self._error = error
        self._settle(error)
        # A blocked read ends here: closing the body makes it raise.
        self._body.close()

    def _settle(self, error: BaseException | None) -> None:
        if self._settlement is not None:
            return
        self._settlement = settlement = Settlement(usage=self._decoder.usage, error=error, exact=error is None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # They know this stream, and it knows them: together they would wait for the collector.
        self._describe = None
        patience, self._patience = self._patience, None
        if patience is not None:
            patience.stop()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            run_settled(callback, settlement, self._report)

    def _raise(self) -> NoReturn:
        error = self._error
        assert error is not None
        assert self._settlement is not None
        # A raised error's traceback holds the reader's frames, and so this stream: keeping a bare twin instead of the
        # error itself spares a cycle in which the prompt would live on.
        self._error = copy.copy(error)
        self._settlement = Settlement(usage=self._settlement.usage, error=self._error)
        try:
            raise error
        finally:
            del error

    async def _drain(self) -> None:
        """Read on to the end of a whole answer's body, within bounds, so that its connection can be used again."""
        body = self._body
        timer = self._clock.call_at(self._clock.now() + DRAIN_SECONDS, body.close)
        try:
            for _ in range(DRAIN_READS):
                if not await body.read_some():
                    return
        except LLMException:
            # The answer was whole: how its connection ends is of no interest to the reader.
            return
        finally:
            timer.cancel()
            body.close()


def _written(chunk: StreamChunk) -> str:
    """What the model wrote in *chunk*; a part that is complete was written before."""
    if chunk.tool_call is not None:
        return chunk.tool_call.arguments
    return chunk.text + chunk.thinking


def _content(chunks: Sequence[StreamChunk]) -> tuple[Part, ...]:
    """The parts of an answer in their order; none if it has but text."""
    parts: list[Part] = []
    text: list[str] = []
    for chunk in chunks:
        if chunk.text:
            text.append(chunk.text)
        if chunk.part is not None:
            if text:
                parts.append(Text("".join(text)))
                text.clear()
            parts.append(chunk.part)
    if parts and text:
        parts.append(Text("".join(text)))
    return tuple(parts)
