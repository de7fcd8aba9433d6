"""Resume: what becomes of a stream that breaks off after content, ``raise``, ``restart`` or ``continue``.

Until its content is in hand a stream is repeated like any call, by the layers below. Afterwards its reader has seen a
part, so repeating it has to be asked for. *restart* yields a piece that says so and then the whole answer. *continue*
hands the model the text so far as the beginning of its answer; only text can be handed over like that (no thinking, no
tool call), and only to a target that takes it. What cannot be resumed is raised as without this layer.

A resumption is a retry: it counts among the call's, and is paid from its provider's budget. It goes through everything
below again: the call's own provider first, then its chain.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal, TypeAlias, cast

from msgspec.structs import replace

from ..core.events import Events, StreamResumed
from ..core.exceptions import LLMException, Scope, TargetFailure
from ..core.stream import ResponseStream
from ..core.types import FaultReporter, LLMResponse, Message, MessageRole, Request, StopReason, StreamChunk, Usage
from ..utils.clock import Clock
from .base import Call, Handler, Reply

How: TypeAlias = Literal["restart", "continue"]
Again: TypeAlias = Callable[[Call, LLMException], "float | None"]
"""Whether the call may be repeated, and after how many seconds; a yes is counted and paid."""


class ResumeMiddleware:
    """Watches over streams after their content has begun. *again* is the retry layer's word."""

    def __init__(
        self,
        default: Literal["raise", "restart", "continue"],
        *,
        again: Again,
        clock: Clock,
        events: Events | None = None,
    ) -> None:
        self._default = default
        self._again = again
        self._clock = clock
        self._events = events if events is not None else Events()

    def __call__(self, call: Call, handler: Handler, /) -> Awaitable[Reply]:
        request = call.request
        if not request.stream:
            return handler(call)
        how = request.options.on_interrupt or self._default
        return handler(call) if how == "raise" else self._watched(call, handler, how)

    async def _watched(self, call: Call, handler: Handler, how: How) -> Reply:
        origin = (call.provider, call.model, call.request)
        reply = await handler(call)
        if type(reply) is LLMResponse:
            return reply
        resume = partial(self._resume, call, handler, how, origin)
        return ResumingStream(cast(ResponseStream, reply), resume, clock=self._clock, report=self._events.fault)

    async def _resume(
        self,
        call: Call,
        handler: Handler,
        how: How,
        origin: tuple[str, str | None, Request],
        error: LLMException,
        stream: ResumingStream,
    ) -> tuple[How, ResponseStream] | None:
        """The stream that goes on where *stream* broke off with *error*, or None if none may."""
        provider, model, request = origin
        if error.scope is Scope.REQUEST or (call.deadline is not None and self._clock.now() >= call.deadline):
            return None
        if how == "continue":
            beginning = stream.beginning()
            continued = _continued(request, beginning) if beginning else None
            if continued is None:
                return None
            request = continued
        delay = self._again(call, error)
        if delay is None:
            return None
        if StreamResumed in self._events.wanted:
            self._events.publish(
                StreamResumed(
                    at=self._clock.now(), provider=call.provider, call_id=call.id, how=how, error=type(error).__name__
                )
            )
        if delay > 0.0:
            await self._clock.sleep(delay)
        call.turn_to(provider, model, request)
        call.continues = how == "continue"
        return how, cast(ResponseStream, await handler(call))


Resume: TypeAlias = Callable[[LLMException, "ResumingStream"], Awaitable["tuple[How, ResponseStream] | None"]]


class ResumingStream(ResponseStream):
    """One answer out of several streams, each of which goes on where the one before broke off."""

    __slots__ = ("_parts", "_resume", "_skip")

    def __init__(
        self, first: ResponseStream, resume: Resume, *, clock: Clock, report: FaultReporter | None = None
    ) -> None:
        self._parts = parts = _Parts(first)
        super().__init__(parts, parts, clock=clock, report=report)
        self._resume = resume
        self._skip = False
        self._take_over(first)

    def beginning(self) -> str:
        """The text so far, if there is nothing else that would have to be handed over with it; else nothing."""
        if any(chunk.thinking or chunk.refusal or chunk.tool_call or chunk.part for chunk in self._seen):
            return ""
        # Vendors refuse a beginning that ends in blanks.
        return self.text.rstrip()

    async def _read(self) -> None:
        part = self._parts.current
        try:
            chunk = await part.__anext__()
        except StopAsyncIteration:
            self._parts.done = True
            self._settle(None)
            return
        except LLMException as error:
            if self._settlement is None:
                await self._go_on(error.with_traceback(None))
            return
        except BaseException:
            self.close()
            raise
        if self._settlement is None:
            self._deliver([chunk, *part.ready])
            part.ready.clear()
            if part.whole:
                self._parts.done = True
                self._settle(None)

    def _deliver(self, chunks: list[StreamChunk]) -> None:
        for chunk in chunks:
            if self._skip and chunk.text:
                # The blanks that the reader has and the model was not told of.
                text = chunk.text.lstrip()
                self._skip = not text
                chunk = replace(chunk, text=text)
            self.ready.append(chunk)
            self._seen.append(chunk)

    async def _go_on(self, error: LLMException) -> None:
        """Go on with another stream, or fail with *error*."""
        try:
            resumed = await self._resume(error, self)
        except LLMException as failure:
            error.__cause__ = failure.with_traceback(None)
            error.attempts = failure.attempts or error.attempts
            error.failures = (*self.failures, TargetFailure.of(error, error.provider or "", None), *failure.failures)
            resumed = None
        except BaseException:
            self.close()
            raise
        if self._settlement is not None:
            # It was closed meanwhile.
            if resumed is not None:
                resumed[1].close()
        elif resumed is None:
            self._fail(error)
        else:
            how, part = resumed
            self.failures = (*self.failures, TargetFailure.of(error, error.provider or "", None))
            self.resumed = how
            self._parts.follow(part)
            self._take_over(part)
            if how == "restart":
                self._seen.clear()
                self._counted = self._bytes = 0
                self.ready.append(StreamChunk(restart=True))
            else:
                self._skip = self.text[-1:].isspace()

    def _take_over(self, part: ResponseStream) -> None:
        self.provider, self.key_id, self.request_id = part.provider, part.key_id, part.request_id
        self.warnings = part.warnings
        self.failures = (*self.failures, *part.failures)

    def _complete(self, error: LLMException) -> None:
        super()._complete(error)
        error.usage = self.usage


class _Parts:
    """The parts of a :class:`ResumingStream`, as the body and the decoder that a stream has."""

    error: LLMException | None = None

    def __init__(self, first: ResponseStream) -> None:
        self.current = first
        self.done = False
        self.events = 0
        self._before: Usage | None = None

    def follow(self, part: ResponseStream) -> None:
        """Go on with *part*; what the one before has cost stays counted."""
        self._before = self.usage
        self.current = part

    @property
    def usage(self) -> Usage | None:
        before, now = self._before, self.current.usage
        if before is None or now is None:
            return now if before is None else before
        return Usage(**{name: getattr(before, name) + getattr(now, name) for name in Usage.__struct_fields__})

    @property
    def stop_reason(self) -> StopReason | None:
        return self.current.stop_reason

    @property
    def id(self) -> str:
        return self.current.id

    @property
    def model(self) -> str:
        return self.current.model

    def feed(self, data: bytes) -> list[StreamChunk]:
        return []

    def end(self) -> list[StreamChunk]:
        return []

    async def read_some(self) -> bytes:
        # The part has been read to its end; this lets it finish with its connection.
        async for _ in self.current:
            pass
        return b""

    def close(self) -> None:
        self.current.close()


def _continued(request: Request, beginning: str) -> Request | None:
    """*request* with the *beginning* of its answer; None if that has a beginning already that is no plain text."""
    messages, last = request.messages, request.messages[-1]
    if last.role is MessageRole.ASSISTANT:
        if not isinstance(last.content, str):
            return None
        messages, beginning = messages[:-1], last.content + beginning
    return replace(request, messages=(*messages, Message(MessageRole.ASSISTANT, beginning)))


def once(call: Call, error: LLMException) -> float | None:
    """The word of a retry layer where there is none: one resumption, at once."""
    if call.retries:
        return None
    call.retries += 1
    return 0.0
