"""What users hold: a light handle that turns messages into calls and sends them down the pipeline."""

from __future__ import annotations

import os
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

from ..middleware.base import Call, Handler, Reply
from ..utils.clock import Clock
from .arguments import read_messages, read_options, read_tools
from .events import CallFinished, CallStarted, Events
from .exceptions import LLMConfigurationError, LLMException, LLMInvalidRequestError
from .inquiry import Inquiry
from .stream import ResponseStream
from .structured import growing, misfit, parse, read, shape_for
from .tool_loop import Approve, OnRound, ToolRun, run_tools
from .types import (
    CallOptions,
    Estimate,
    LLMResponse,
    Message,
    ModelInfo,
    Request,
    Settlement,
    StreamChunk,
    Usage,
)

T = TypeVar("T")
NO_USAGE = Usage()


class Home:
    """The event loop of one manager: that of its first call, until it is closed or the process has forked.

    *afresh* is called when the manager moves on to another loop: whatever waits on the old one will not come back.
    """

    __slots__ = ("_afresh", "_pid", "loop")

    def __init__(self, afresh: Callable[[], None]) -> None:
        self._afresh = afresh
        self._pid = 0
        self.loop: AbstractEventLoop | None = None

    def enter(self, loop: AbstractEventLoop) -> None:
        """Make *loop* the manager's, unless it has another one that is still open.

        Raises:
            LLMConfigurationError: it has.
        """
        if self.loop is not None and self.loop is not loop:
            if self._pid == os.getpid() and not self.loop.is_closed():
                raise LLMConfigurationError(
                    "the manager is in use on another event loop, which is still open: use one manager for each loop, "
                    "as get_llm_manager() does, or send the work there with asyncio.run_coroutine_threadsafe"
                )
            self._afresh()
        self.loop = loop
        self._pid = os.getpid()


class Pipeline:
    """One provider's layers as a client sees them: a handler, and what it takes to make a call of a request."""

    __slots__ = ("_estimate", "_inquiry", "aliases", "clock", "events", "handler", "home", "name", "new_id")

    def __init__(
        self,
        name: str,
        handler: Handler,
        *,
        clock: Clock,
        events: Events,
        new_id: Callable[[], str],
        aliases: Mapping[str, str],
        home: Home,
        estimate: Callable[[Request, str | None], Awaitable[Estimate]],
        inquiry: Inquiry,
    ) -> None:
        self._estimate = estimate
        self._inquiry = inquiry
        self.name = name
        self.handler = handler
        self.clock = clock
        self.events = events
        self.new_id = new_id
        self.aliases = aliases
        self.home = home

    def estimate(self, request: Request, model: str | None) -> Awaitable[Estimate]:
        """What *request* would take, on the loop that is running."""
        if (loop := get_running_loop()) is not self.home.loop:
            self.home.enter(loop)
        return self._estimate(request, self.aliases.get(model, model) if model is not None else None)

    def models(self) -> Awaitable[tuple[ModelInfo, ...]]:
        """The vendor's models, asked for on the loop that is running."""
        self.home.enter(get_running_loop())
        return self._inquiry.models()

    def count_tokens(self, request: Request, model: str | None) -> Awaitable[int]:
        """The tokens of *request*, asked for on the loop that is running."""
        self.home.enter(get_running_loop())
        return self._inquiry.count_tokens(request, self.aliases.get(model, model) if model is not None else None)

    def call(self, request: Request, model: str | None) -> Call:
        """The record of a new call, on the loop that is running."""
        if (loop := get_running_loop()) is not self.home.loop:
            self.home.enter(loop)
        started = self.clock.now()
        timeout = request.options.timeout
        if model is not None:
            model = self.aliases.get(model, model)
        call = Call(
            self.new_id(),
            request,
            provider=self.name,
            model=model,
            started=started,
            deadline=started + timeout if timeout is not None else None,
        )
        if CallStarted in self.events.wanted:
            self.events.publish(
                CallStarted(at=started, provider=self.name, call_id=call.id, model=model, stream=request.stream)
            )
        return call

    def answered(self, call: Call, reply: Reply) -> None:
        """The layers have returned *reply*."""
        if CallFinished in self.events.wanted:
            reply.on_settled(lambda settlement: self._finished(call, settlement))

    def failed(self, call: Call, error: BaseException) -> None:
        """The layers have raised *error*: it is to tell of the attempts, and no stream may stay open."""
        call.close_stream()
        if isinstance(error, LLMException):
            error.attempts = call.attempts
        self._finished(call, Settlement(error=error))

    def _finished(self, call: Call, settlement: Settlement) -> None:
        if CallFinished not in self.events.wanted:
            return
        now = self.clock.now()
        usage = settlement.usage or NO_USAGE
        self.events.publish(
            CallFinished(
                at=now,
                provider=call.provider,
                call_id=call.id,
                model=call.admission.model if call.admission is not None else call.model,
                error=type(settlement.error).__name__ if settlement.error is not None else None,
                duration=now - call.started,
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
            )
        )


class LLMClient:
    """A handle on one provider, or on one model of it. Making one costs nothing and closing one is not needed.

    Every call is balanced over the provider's keys. The keyword arguments given to ``get_client`` are the defaults of
    every call.
    """

    __slots__ = ("_defaults", "_pipeline", "model")

    def __init__(self, pipeline: Pipeline, *, model: str | None, defaults: CallOptions) -> None:
        self._pipeline = pipeline
        self.model = model
        self._defaults = defaults
        read_options(defaults, {})

    def __repr__(self) -> str:
        return f"<LLMClient {self.provider} {self.model or 'any model'}>"

    @property
    def provider(self) -> str:
        """The provider's name in the configuration."""
        return self._pipeline.name

    async def chat(self, text: str, *, model: str | None = None, **options: Unpack[CallOptions]) -> str:
        """The answer to one message, as text. Raises as ``complete`` does."""
        return (await self.complete(text, model=model, **options)).text

    async def complete(
        self, messages: Sequence[Message] | str, *, model: str | None = None, **options: Unpack[CallOptions]
    ) -> LLMResponse:
        """The model's answer to a conversation; a string is one message of the user's.

        It waits for as long as the keys' limits demand, unless ``timeout`` (seconds, for everything together) says
        otherwise.

        Raises:
            LLMInvalidRequestError: the request itself is at fault, here or at the provider.
            LLMDeadlineExceededError: ``timeout`` has passed, or cannot be met; then ``retry_after`` tells the wait.
            LLMException: everything else, see its subclasses; ``attempts`` tells what was tried.
        """
        pipeline = self._pipeline
        request = Request(read_messages(messages), "", read_options(self._defaults, options), False)
        call = pipeline.call(request, model or self.model)
        # Thousands of calls may wait here: so there is no coroutine of the pipeline's own around the handler, and what
        # the call has of the arguments is not held twice.
        del messages, options
        try:
            reply = await pipeline.handler(call)
        except BaseException as error:
            pipeline.failed(call, error)
            raise
        pipeline.answered(call, reply)
        return cast(LLMResponse, reply)

    def stream_complete(
        self, messages: Sequence[Message] | str, *, model: str | None = None, **options: Unpack[CallOptions]
    ) -> StreamingCall:
        """The answer piece by piece: ``async for chunk in client.stream_complete(…)``.

        Better still ``async with client.stream_complete(…) as stream``, which closes the connection also when the
        loop is left early. Nothing is sent before the first piece is asked for. Raises as ``complete`` does, and
        LLMStreamInterruptedError when the answer breaks off.
        """
        request = Request(read_messages(messages), "", read_options(self._defaults, options), True)
        return StreamingCall(self._pipeline, request, model or self.model)

    async def run_tools(
        self,
        messages: Sequence[Message] | str,
        *,
        max_rounds: int = 10,
        tool_timeout: float | None = None,
        max_concurrency: int = 8,
        approve: Approve | None = None,
        on_round: OnRound | None = None,
        model: str | None = None,
        **options: Unpack[CallOptions],
    ) -> ToolRun:
        """Ask, run the ``tools`` that the model asks for, tell it the results, until it answers.

        Plain functions run in a thread, coroutine functions on the loop, at most *max_concurrency* at a time. An error
        in one, or more than *tool_timeout* seconds, is told to the model. *approve* sees each call first: False, or a
        reason, refuses it. *on_round* sees each answer. ``timeout`` (seconds) holds over all rounds together.

        Raises:
            LLMDeadlineExceededError: ``timeout`` has passed.
            LLMException: as ``complete`` does, of any round.
        """
        asked: CallOptions = {**self._defaults, **options}
        return await run_tools(
            partial(self.complete, model=model),
            read_messages(messages),
            read_tools(asked.get("tools") or ()) or (),
            clock=self._pipeline.clock,
            max_rounds=max_rounds,
            tool_timeout=tool_timeout,
            max_concurrency=max_concurrency,
            approve=approve,
            on_round=on_round,
            options=asked,
        )

    async def parse(
        self,
        messages: Sequence[Message] | str,
        into: type[T] | Mapping[str, Any],
        *,
        repairs: int = 1,
        model: str | None = None,
        **options: Unpack[CallOptions],
    ) -> T:
        """The answer as a value of *into*: a pydantic model, a msgspec Struct, a dataclass, a TypedDict, a JSON schema.

        The vendor is asked to keep to the schema, with its own means where it has some. An answer that does not fit is
        sent back with what is wrong, at most *repairs* times; each is a call that pays for itself.

        Raises:
            LLMProtocolError: no answer fits; ``partial`` is the last one.
            LLMContentFilteredError: the model declined.
            LLMException: as ``complete`` does.
        """
        return await parse(
            partial(self.complete, model=model), read_messages(messages), into, repairs=repairs, options=options
        )

    async def stream_parse(
        self,
        messages: Sequence[Message] | str,
        into: type[T] | Mapping[str, Any],
        *,
        model: str | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncGenerator[T | dict[str, Any], None]:
        """The answer's value as it grows: what has come of it as plain JSON values, and at last a value of *into*.

        Raises as ``parse`` does; nothing is repaired.
        """
        shape, wanted = shape_for(into)
        asked: CallOptions = {**options, "output_format": wanted}
        async with self.stream_complete(messages, model=model, **asked) as stream:
            async for value in growing(stream):
                yield value
            response = stream.response()
        try:
            found = read(shape, response)
        except ValueError as error:
            raise misfit(response, str(error)) from None
        yield found

    async def estimate(
        self, messages: Sequence[Message] | str, *, model: str | None = None, **options: Unpack[CallOptions]
    ) -> Estimate:
        """What a call would take and how long it would wait if it were made now. Nothing is sent or reserved.

        Raises:
            LLMInvalidRequestError: the request itself is at fault.
            LLMRequestTooLargeError: no key could ever take it.
            LLMException: every key that could take it is out of use.
        """
        request = Request(read_messages(messages), "", read_options(self._defaults, options), False)
        return await self._pipeline.estimate(request, model or self.model)

    async def count_tokens(
        self, messages: Sequence[Message] | str, *, model: str | None = None, **options: Unpack[CallOptions]
    ) -> int:
        """How many input tokens a call would have, by the vendor's own count. It costs nothing, but takes a request.

        Raises:
            LLMInvalidRequestError: the request is at fault, or the vendor has no way to count.
            LLMException: as ``complete`` does; nothing is repeated.
        """
        request = Request(read_messages(messages), "", read_options(self._defaults, options), False)
        return await self._pipeline.count_tokens(request, model or self.model)

    async def models(self) -> tuple[ModelInfo, ...]:
        """The vendor's models, with what it says of their lives. Raises as ``count_tokens`` does."""
        return await self._pipeline.models()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to release: clients hold nothing."""


class StreamingCall:
    """A streamed call that has not begun: iterate it, or enter it for the stream. It can be used once."""

    __slots__ = ("_model", "_pipeline", "_request", "_stream")

    def __init__(self, pipeline: Pipeline, request: Request, model: str | None) -> None:
        self._pipeline = pipeline
        self._request: Request | None = request
        self._model = model
        self._stream: ResponseStream | None = None

    def __aiter__(self) -> _Chunks:
        return _Chunks(self._open)

    async def __aenter__(self) -> ResponseStream:
        self._stream = await self._open()
        return self._stream

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    async def _open(self) -> ResponseStream:
        request, self._request = self._request, None
        if request is None:
            raise LLMInvalidRequestError("a streamed call is used once: call stream_complete again for another answer")
        pipeline = self._pipeline
        call = pipeline.call(request, self._model)
        try:
            reply = await pipeline.handler(call)
        except BaseException as error:
            pipeline.failed(call, error)
            raise
        pipeline.answered(call, reply)
        return cast(ResponseStream, reply)


class _Chunks:
    """The iterator of a plain ``async for``. Only the loop holds it: when the loop is left, the stream is closed."""

    __slots__ = ("_open", "_stream")

    def __init__(self, open: Callable[[], Awaitable[ResponseStream]]) -> None:
        self._open = open
        self._stream: ResponseStream | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamChunk:
        stream = self._stream
        if stream is None:
            stream = self._stream = await self._open()
        # What is there is handed out without a coroutine of the stream's own: a burst has many pieces to a read.
        return stream.ready.popleft() if stream.ready else await stream.__anext__()

    def __del__(self) -> None:
        if self._stream is not None:
            self._stream.close()
