"""Logging: one record a call, one a noteworthy event, and the details of every attempt at DEBUG.

Records go to the logger ``brimful`` with their facts in ``extra``, so that a JSON formatter has them as fields. Prompts
and answers appear only when ``content`` is switched on, and then only at DEBUG. A handler that raises is counted and
never fails a call.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable
from functools import partial
from threading import get_ident
from typing import Any

from ..core.content import Text
from ..core.events import (
    AttemptFailed,
    CallHedged,
    CallQueued,
    CircuitClosed,
    CircuitOpened,
    Event,
    Events,
    FellBack,
    KeyParked,
    KeyPaused,
    KeyRestored,
    LimitAdopted,
    SharedOwner,
    StreamResumed,
)
from ..core.exceptions import LLMException
from ..core.stream import ResponseStream
from ..core.types import LLMResponse, Message, Settlement, Usage
from ..utils.clock import Clock
from .base import Call, Handler, Reply

NO_USAGE = Usage()
NOTEWORTHY = (
    AttemptFailed,
    CallHedged,
    CallQueued,
    CircuitClosed,
    CircuitOpened,
    FellBack,
    KeyPaused,
    KeyParked,
    KeyRestored,
    LimitAdopted,
    SharedOwner,
    StreamResumed,
)
MAX_MODELS = 64
"""Levels and threads of which a record is kept to be copied."""


class LoggingMiddleware:
    """``calls`` stands at the top of the stack and writes one record a call; ``attempts`` details each attempt.

    Used alone it is ``calls``. What happens between the two (retries, long waits, parked keys) comes as *events*.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        events: Events | None = None,
        content: bool = False,
        logger: logging.Logger | None = None,
    ) -> None:
        self._clock = clock
        self._events = events if events is not None else Events()
        self._content = content
        self._logger = logger if logger is not None else logging.getLogger("brimful")
        self._models: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._events.listen(self._on_event, *NOTEWORTHY)

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        return await self.calls(call, handler)

    async def calls(self, call: Call, handler: Handler, /) -> Reply:
        """One record a call: INFO when it was answered or given up, ERROR when it failed."""
        try:
            reply = await handler(call)
        except BaseException as error:
            self._record(call, error)
            raise
        if type(reply) is LLMResponse:
            if self._logger.isEnabledFor(logging.INFO):
                self._record(call, None, reply.usage)
        else:
            reply.on_settled(partial(self._settled, call))
        return reply

    def attempts(self, call: Call, handler: Handler, /) -> Awaitable[Reply]:
        """The details of each attempt, at DEBUG; at any other level the layer is not there at all."""
        if self._logger.isEnabledFor(logging.DEBUG):
            return self._detailed(call, handler)
        return handler(call)

    async def _detailed(self, call: Call, handler: Handler) -> Reply:
        started = self._clock.now()
        self._debug_request(call)
        try:
            reply = await handler(call)
        except BaseException as error:
            duration = self._clock.now() - started
            self._write(
                logging.DEBUG,
                "%s: attempt failed after %.3f s: %s: %s",
                (call.id, duration, type(error).__name__, str(error)),
                {"call_id": call.id, "duration": duration},
            )
            raise
        self._debug_reply(call, reply, self._clock.now() - started)
        if isinstance(reply, ResponseStream):
            reply.on_settled(partial(self._debug_end, call, reply, started))
        return reply

    def _settled(self, call: Call, settlement: Settlement) -> None:
        self._record(call, settlement.error, settlement.usage or NO_USAGE)

    def _record(self, call: Call, error: BaseException | None, usage: Usage = NO_USAGE) -> None:
        duration = self._clock.now() - call.started
        admission = call.admission
        if admission is None:
            model, key_id = call.model, None
        else:
            model, key_id = admission.model, admission.key.id
        attempts = len(call.attempts)
        facts: dict[str, object] = {
            "call_id": call.id,
            "provider": call.provider,
            "model": model,
            "key_id": key_id,
            "stream": call.request.stream,
            "attempts": attempts,
            "duration": duration,
            "queued": call.queued,
        }
        if error is None:
            tokens_in, tokens_out = usage.input_tokens, usage.output_tokens
            facts["input_tokens"] = tokens_in
            facts["output_tokens"] = tokens_out
            self._write(
                logging.INFO,
                "%s: answered by %s in %.3f s (%d tokens in, %d out, %d attempts)",
                (call.id, model, duration, tokens_in, tokens_out, attempts),
                facts,
            )
        elif isinstance(error, (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt)):
            self._write(logging.INFO, "%s: given up by the caller after %.3f s", (call.id, duration), facts)
        else:
            facts["error"] = type(error).__name__
            if isinstance(error, LLMException):
                facts["status"] = error.status
                facts["code"] = error.code
                facts["request_id"] = error.request_id
            # As text: a handler may keep its records, and an exception would keep the call with its prompt.
            self._write(
                logging.ERROR,
                "%s: failed after %.3f s and %d attempts: %s: %s",
                (call.id, duration, attempts, type(error).__name__, str(error)),
                facts,
            )

    def _on_event(self, event: Event) -> None:
        match event:
            case AttemptFailed(retry_in=None):
                # The call's own ERROR record follows.
                return
            case AttemptFailed():
                self._warn(event, f"attempt {event.attempt} failed with {event.error}, next in {event.retry_in:.2f} s")
            case CallQueued():
                self._warn(event, f"waiting for capacity for {event.waited:.0f} s, {event.ahead} other calls queued")
            case KeyPaused():
                self._warn(event, f"key {event.key_id} is paused for {event.seconds:.1f} s")
            case KeyParked():
                self._warn(event, f"key {event.key_id} is parked: {event.reason}")
            case FellBack():
                where = event.target if event.model is None else f"{event.target} ({event.model})"
                self._warn(event, f"call {event.call_id} goes on at {where} after {event.error}")
            case StreamResumed():
                self._warn(event, f"the stream of call {event.call_id} broke off with {event.error}: {event.how}")
            case CallHedged():
                text = f"a second attempt begins at {event.target}, the first has taken {event.after:.2f} s"
                self._tell(logging.INFO, event, text)
            case CircuitOpened():
                what = f"key {event.key_id}" if event.key_id is not None else "the provider"
                self._warn(event, f"{what} is left alone for {event.seconds:.1f} s: {event.reason}")
            case CircuitClosed(ramping=True):
                what = f"key {event.key_id}" if event.key_id is not None else "the provider"
                self._warn(event, f"{what} answers again")
            case CircuitClosed():
                # It was told when it answered again.
                return
            case KeyRestored():
                self._warn(event, f"key {event.key_id} works again")
            case LimitAdopted():
                text = f"{event.quota} is limited to {event.limit} {event.dimension} a window, as its vendor says"
                self._tell(logging.INFO, event, text)
            case SharedOwner():
                pools = " and ".join(event.pools)
                self._warn(
                    event,
                    f"{pools} answer in the name of {event.owner}, and probably share its limits: "
                    "give their keys one entry in quota_pools",
                )

    def _warn(self, event: Event, text: str) -> None:
        self._tell(logging.WARNING, event, text)

    def _tell(self, level: int, event: Event, text: str) -> None:
        if self._logger.isEnabledFor(level):
            facts = {name: getattr(event, name) for name in event.__struct_fields__}
            self._logger.log(level, "%s: %s", event.call_id or event.provider, text, extra=facts)

    def _debug_request(self, call: Call) -> None:
        request = call.request
        admission = call.admission
        model = admission.model if admission is not None else call.model
        attempt = len(call.attempts) + 1
        facts: dict[str, object] = {
            "call_id": call.id,
            "provider": call.provider,
            "model": model,
            "key_id": admission.key.id if admission is not None else None,
            "attempt": attempt,
        }
        if self._content:
            facts["messages"] = [{"role": str(m.role), "content": _words(m)} for m in request.messages]
        self._write(
            logging.DEBUG,
            "%s: attempt %d: %d messages to %s",
            (call.id, attempt, len(request.messages), model),
            facts,
        )

    def _debug_reply(self, call: Call, reply: Reply, duration: float) -> None:
        facts: dict[str, object] = {
            "call_id": call.id,
            "duration": duration,
            "request_id": reply.request_id,
            "key_id": reply.key_id,
        }
        if type(reply) is LLMResponse:
            facts["stop_reason"] = str(reply.stop_reason)
            if self._content:
                facts["text"] = reply.text
        what = "answer" if type(reply) is LLMResponse else "first content"
        self._write(logging.DEBUG, "%s: %s after %.3f s", (call.id, what, duration), facts)

    def _debug_end(self, call: Call, stream: ResponseStream, started: float, settlement: Settlement) -> None:
        error = settlement.error
        duration = self._clock.now() - started
        facts: dict[str, object] = {
            "call_id": call.id,
            "duration": duration,
            "stop_reason": str(stream.stop_reason),
        }
        if self._content:
            facts["text"] = stream.text
        what = "whole" if error is None else f"ended early by {type(error).__name__}"
        self._write(logging.DEBUG, "%s: stream %s after %.3f s", (call.id, what, duration), facts)

    def _write(self, level: int, message: str, args: tuple[object, ...], facts: dict[str, object]) -> None:
        logger = self._logger
        if logger.isEnabledFor(level):
            try:
                if logging.getLogRecordFactory() is logging.LogRecord:
                    record = self._record_like(level, message, args)
                else:
                    record = logger.makeRecord(logger.name, level, __file__, 0, message, args, None)
                # What Logger.log does, without looking for its caller, who is always here, and without asking of each
                # fact whether a record has it already: ours have names of their own.
                record.__dict__.update(facts)
                logger.handle(record)
            except Exception as error:
                self._events.fault("logging", error)

    def _record_like(self, level: int, message: str, args: tuple[object, ...]) -> logging.LogRecord:
        """A record as the standard library makes it, in a third of the time.

        Path, thread and process are looked up for the first record of a level and copied for those that follow.
        """
        here = (level, get_ident(), os.getpid())
        model = self._models.get(here)
        if model is None:
            made = self._logger.makeRecord(self._logger.name, level, __file__, 0, message, args, None)
            if len(self._models) >= MAX_MODELS:
                self._models.clear()
            self._models[here] = made.__dict__.copy()
            return made
        record = logging.LogRecord.__new__(logging.LogRecord)
        record.__dict__ = fields = model.copy()
        created = self._clock.wall()
        fields["msg"], fields["args"], fields["created"] = message, args, created
        fields["msecs"] = float(int(created % 1.0 * 1000.0))
        fields["relativeCreated"] += (created - model["created"]) * 1000.0
        if "taskName" in model:
            # From Python 3.12 on.
            task = _task()
            fields["taskName"] = task.get_name() if task is not None else None
        return record


def _task() -> asyncio.Task[object] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        # A stream may settle in a finaliser, on whatever thread.
        return None


def _words(message: Message) -> str | list[str]:
    """What *message* says; of what is not text, its kind."""
    if isinstance(message.content, str):
        return message.content
    return [part.text if isinstance(part, Text) else type(part).__name__ for part in message.content]
