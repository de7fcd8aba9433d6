"""Fallback: when one provider or model cannot answer, the next of a chain is asked.

It stands above admission: each target has a queue, limits and retries of its own. It moves on when the error is not
the request's: retries are used up, a circuit is open, a quota is spent, a deadline cannot be met here but perhaps
elsewhere. What is wrong with the request is wrong everywhere, but for what *moves_on* names besides (context length,
content filter). A target that could not take the request as it is (tools, images, a prefill) is passed over.
"""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Iterator, Mapping, Sequence

from ..core.arguments import with_options
from ..core.events import Events, FellBack
from ..core.exceptions import (
    LLMConfigurationError,
    LLMContentFilteredError,
    LLMContextLengthError,
    LLMDeadlineExceededError,
    LLMException,
    LLMInvalidRequestError,
    Scope,
    TargetFailure,
)
from ..core.types import Request, Target
from ..utils.clock import Clock
from .base import Call, Handler, Line, Reply

OPT_IN: Mapping[str, type[LLMException]] = {
    "context_length": LLMContextLengthError,
    "content_filter": LLMContentFilteredError,
}
"""Errors of the request that another target may well not have."""


class FallbackMiddleware:
    """Asks the targets of a chain in turn: the call's own, or that of its provider.

    *chains* by name; *default* is the name of the one of this layer's provider. *lines* leads to each provider, and may
    be filled after this was built. *moves_on* are names of :data:`OPT_IN`.
    """

    def __init__(
        self,
        chains: Mapping[str, tuple[Target, ...]],
        default: str | None,
        lines: Mapping[str, Line],
        *,
        clock: Clock,
        moves_on: Collection[str] = (),
        events: Events | None = None,
    ) -> None:
        self._chains = chains
        self._default = chains[default] if default is not None else ()
        self._lines = lines
        self._clock = clock
        self._moves_on = tuple(OPT_IN[name] for name in moves_on)
        self._events = events if events is not None else Events()

    def __call__(self, call: Call, handler: Handler, /) -> Awaitable[Reply]:
        # No coroutine for those without a chain: thousands of calls may wait below.
        targets = self.targets(call)
        return handler(call) if not targets else self._through(call, handler, targets)

    def targets(self, call: Call) -> tuple[Target, ...]:
        """The chain of *call*.

        Raises:
            LLMConfigurationError: it names what is not configured.
        """
        asked = call.request.options.fallback
        return self._default if asked is None else self._chain(asked)

    async def _through(self, call: Call, handler: Handler, targets: Sequence[Target]) -> Reply:
        request, remaining = call.request, iter(targets)
        tried = {(call.provider, call.model)}
        failures: list[TargetFailure] = []
        while True:
            call.elsewhere = len(tried) <= len(targets)
            try:
                reply = await handler(call)
            except LLMException as error:
                call.close_stream()
                failures.append(TargetFailure.of(error, call.provider, call.model))
                following = self._next(call, request, remaining, tried, failures, error)
                if following is None:
                    error.failures = tuple(failures)
                    waits = [failure.retry_after for failure in failures if failure.retry_after is not None]
                    error.retry_after = min(waits, default=None)
                    raise
                handler = following
            else:
                reply.tell_failures(tuple(failures))
                return reply

    def _next(
        self,
        call: Call,
        request: Request,
        remaining: Iterator[Target],
        tried: set[tuple[str, str | None]],
        failures: list[TargetFailure],
        error: LLMException,
    ) -> Handler | None:
        """Turn *call* to the next target that is fit for it, and return the way there; None if there is none."""
        if not self._may_move_on(call, error):
            return None
        for target in remaining:
            line = self._lines[target.provider]
            model = line.model(target.model)
            if (target.provider, model) in tried:
                continue
            tried.add((target.provider, model))
            fitted = with_options(request, target.options)
            objection = line.objection(fitted, model)
            if objection is not None:
                failures.append(TargetFailure.of(objection, target.provider, model))
                continue
            if FellBack in self._events.wanted:
                self._events.publish(
                    FellBack(
                        at=self._clock.now(),
                        provider=call.provider,
                        call_id=call.id,
                        error=type(error).__name__,
                        target=target.provider,
                        model=model,
                    )
                )
            call.turn_to(target.provider, model, fitted)
            return line.handler
        return None

    def _chain(self, asked: str | tuple[Target, ...]) -> tuple[Target, ...]:
        if isinstance(asked, str):
            if asked not in self._chains:
                known = ", ".join(self._chains) or "none"
                raise LLMConfigurationError(f"fallback: no chain is called {asked!r}; configured: {known}")
            return self._chains[asked]
        for target in asked:
            if target.provider not in self._lines:
                known = ", ".join(self._lines)
                raise LLMConfigurationError(f"fallback: no provider is called {target.provider!r}; configured: {known}")
        return asked

    def _may_move_on(self, call: Call, error: LLMException) -> bool:
        if call.deadline is not None and self._clock.now() >= call.deadline:
            return False
        if isinstance(error, LLMDeadlineExceededError):
            # Foreseen: there is still time, and this target would have needed more.
            return True
        if call.continues and isinstance(error, LLMInvalidRequestError) and not error.sent:
            # It does not take the beginning of an answer that it is to go on with; the next may.
            return True
        return error.scope is not Scope.REQUEST or isinstance(error, self._moves_on)
