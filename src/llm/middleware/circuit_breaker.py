"""Circuits: tells the pool what became of each attempt, so that nobody waits for a server that is down.

The pool leaves out keys whose circuit is open, so an open one costs neither a permit nor a wait; what opens and closes
a circuit is in ``utils/breaker.py``. What the request is to blame for tells nothing of the server, nor does a call that
was cancelled, or an attempt that the call's own deadline cut. Who says 429 or 401 works.
"""

from __future__ import annotations

from functools import partial

from ..core.exceptions import (
    LLMAuthenticationError,
    LLMDeadlineExceededError,
    LLMException,
    LLMQuotaExhaustedError,
    LLMRateLimitError,
    Scope,
)
from ..core.types import KeyRef, LLMResponse, Settlement
from ..utils.clock import Clock
from .base import Call, Circuits, Handler, Reply

_ANSWERED = (LLMRateLimitError, LLMAuthenticationError, LLMQuotaExhaustedError)
"""The server works, and says no to this key: the pool pauses or parks it."""


class CircuitBreakerMiddleware:
    """Reports attempts to *circuits*."""

    def __init__(self, circuits: Circuits, *, clock: Clock) -> None:
        self._circuits = circuits
        self._now = clock.now

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        admission = call.admission
        if admission is None:
            return await handler(call)
        began = self._now()
        try:
            reply = await handler(call)
        except LLMException as error:
            self._failed(admission.key, began, error)
            raise
        self._circuits.succeeded(admission.key, began)
        if type(reply) is not LLMResponse:
            # It was answered, and a probe is not to wait for a stream's end; but who cuts all streams is down as well.
            reply.on_settled(partial(self._ended, admission.key, began))
        return reply

    def _ended(self, key: KeyRef, began: float, settlement: Settlement) -> None:
        if isinstance(settlement.error, LLMException):
            self._failed(key, began, settlement.error)

    def _failed(self, key: KeyRef, began: float, error: LLMException) -> None:
        if isinstance(error, _ANSWERED):
            self._circuits.succeeded(key, began)
        elif error.scope is not Scope.REQUEST and not isinstance(error, LLMDeadlineExceededError):
            self._circuits.failed(key, began, error)
