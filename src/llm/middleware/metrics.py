"""Metrics: what the calls and their attempts came to, in constant memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ..core.events import Events
from ..core.exceptions import LLMException
from ..core.types import LLMResponse, Settlement, Usage
from ..utils.clock import Clock
from ..utils.quantiles import Quantiles
from .base import Call, Handler, Reply

T = TypeVar("T")

MAX_NAMES = 1000
"""Models, keys and error classes counted apart; what comes later is counted under ``other``."""


NO_USAGE = Usage()


class _Sum:
    """Calls and tokens of one model or one key."""

    __slots__ = ("attempts", "failed", "input", "output")

    def __init__(self) -> None:
        self.attempts = 0
        self.failed = 0
        self.input = 0
        self.output = 0

    def add(self, usage: Usage, failed: bool) -> None:
        self.attempts += 1
        self.failed += failed
        self.input += usage.input_tokens
        self.output += usage.output_tokens

    def show(self) -> dict[str, int]:
        return {"attempts": self.attempts, "failed": self.failed, "input": self.input, "output": self.output}


class MetricsMiddleware:
    """``calls`` counts calls and their latency, ``attempts`` counts attempts, tokens and the time to a first token.

    Used alone it is both. A fault in it is counted and never fails a call.
    """

    def __init__(self, *, clock: Clock, events: Events | None = None) -> None:
        self._clock = clock
        self._events = events if events is not None else Events()
        self._total = 0
        self._successful = 0
        self._failed = 0
        self._cancelled = 0
        self._attempts = 0
        self._retries = 0
        self._latency = Quantiles()
        self._first_token = Quantiles()
        self._errors: Counter[str] = Counter()
        self._models: dict[str, _Sum] = {}
        self._keys: dict[str, _Sum] = {}
        self._input = 0
        self._output = 0

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        return await self.calls(call, partial(self._inner, handler))

    async def _inner(self, handler: Handler, call: Call) -> Reply:
        return await self.attempts(call, handler)

    async def calls(self, call: Call, handler: Handler, /) -> Reply:
        """Count a call when its outcome is known; the latency is that of answered calls."""
        self._total += 1
        try:
            reply = await handler(call)
        except BaseException as error:
            self._guarded(self._end_call, call, Settlement(error=error))
            raise
        if type(reply) is LLMResponse:
            try:
                self._successful += 1
                self._latency.add(self._clock.now() - call.started)
            except Exception as error:
                self._events.fault("metrics", error)
        else:
            reply.on_settled(partial(self._guarded, self._end_call, call))
        return reply

    async def attempts(self, call: Call, handler: Handler, /) -> Reply:
        """Count an attempt, and its tokens when they are known."""
        self._attempts += 1
        if call.attempts:
            self._retries += 1
        started = self._clock.now()
        try:
            reply = await handler(call)
        except BaseException as error:
            usage = error.usage if isinstance(error, LLMException) else None
            self._guarded(self._end_attempt, call, Settlement(usage=usage, error=error))
            raise
        if type(reply) is LLMResponse:
            try:
                self._count(call, reply.usage, False)
            except Exception as error:
                self._events.fault("metrics", error)
        else:
            self._guarded(self._begin_stream, call, started)
            reply.on_settled(partial(self._guarded, self._end_attempt, call))
        return reply

    def snapshot(self) -> dict[str, Any]:
        """All figures; durations in seconds, of answered calls from their start to their last byte."""
        return {
            "requests": {
                "total": self._total,
                "successful": self._successful,
                "failed": self._failed,
                "cancelled": self._cancelled,
                "in_progress": self._total - self._successful - self._failed - self._cancelled,
            },
            "attempts": self._attempts,
            "retries": self._retries,
            "tokens": {"input": self._input, "output": self._output, "total": self._input + self._output},
            "latency": self._latency.summary(),
            "time_to_first_token": self._first_token.summary(),
            "errors_by_type": dict(self._errors),
            "usage_by_model": {name: total.show() for name, total in self._models.items()},
            "by_key": {name: total.show() for name, total in self._keys.items()},
        }

    def _guarded(self, count: Callable[[Call, T], None], call: Call, fact: T) -> None:
        try:
            count(call, fact)
        except Exception as error:
            self._events.fault("metrics", error)

    def _begin_stream(self, call: Call, started: float) -> None:
        self._first_token.add(self._clock.now() - started)

    def _end_call(self, call: Call, settlement: Settlement) -> None:
        error = settlement.error
        if error is None:
            self._successful += 1
            self._latency.add(self._clock.now() - call.started)
        elif isinstance(error, (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt)):
            self._cancelled += 1
        else:
            self._failed += 1
            name = type(error).__name__
            self._errors[name if name in self._errors or len(self._errors) < MAX_NAMES else "other"] += 1

    def _end_attempt(self, call: Call, settlement: Settlement) -> None:
        self._count(call, settlement.usage or NO_USAGE, settlement.error is not None)

    def _count(self, call: Call, usage: Usage, failed: bool) -> None:
        admission = call.admission
        self._input += usage.input_tokens
        self._output += usage.output_tokens
        if admission is not None:
            model, key = admission.model, admission.key.id
            (self._models.get(model) or _sum(self._models, model)).add(usage, failed)
            (self._keys.get(key) or _sum(self._keys, key)).add(usage, failed)


def _sum(table: dict[str, _Sum], name: str) -> _Sum:
    """The sum of a *name* that has none yet."""
    return table.setdefault(name if len(table) < MAX_NAMES else "other", _Sum())
