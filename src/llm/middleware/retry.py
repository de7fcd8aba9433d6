"""Repetition: the only layer that sends a call again, and every attempt pays for itself.

A failed attempt is settled *before* the backoff, so that a call holds neither permit nor client while it sleeps, and
the admission is renewed *after* it, so that retrying is not a way around the rate limit. Nor does it multiply trouble:
a provider is sent no more retries than its budget allows (``utils/retry_budget.py``).
"""

from __future__ import annotations

from collections.abc import Callable

from ..core.events import AttemptFailed, Events
from ..core.exceptions import (
    LLMConnectionError,
    LLMDeadlineExceededError,
    LLMException,
    LLMRateLimitError,
    LLMTimeoutError,
    Scope,
)
from ..core.types import Settlement
from ..utils.backoff import RetryPolicy
from ..utils.clock import Clock
from ..utils.retry_budget import RetryBudget
from .base import Call, Handler, Reply


class RetryMiddleware:
    """Repeats a call as its errors, the policy and the *budget* allow, within the call's deadline.

    *random* gives the jitter, uniform in [0, 1).
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        clock: Clock,
        random: Callable[[], float],
        events: Events | None = None,
        budget: RetryBudget | None = None,
    ) -> None:
        self._policy = policy
        self._budget = budget
        self._clock = clock
        self._random = random
        self._events = events if events is not None else Events()

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        attempts = 0
        dead: set[str | None] = set()
        if self._budget is not None:
            self._budget.deposit()
        while True:
            try:
                return await handler(call)
            except LLMException as error:
                call.close_stream()
                attempts += 1
                admission = call.admission
                delay: float | None
                if call.hedging or self._takes_too_long(call, error):
                    delay = None
                elif error.scope is Scope.KEY and not error.retryable:
                    # A dead key costs no try, since the pool parks it; one that dies twice was not parked.
                    delay = 0.0 if admission is not None and error.key_id not in dead else None
                    dead.add(error.key_id)
                else:
                    # Each target's first attempt is its own; repetitions are counted over all of them.
                    delay = self._policy.delay(
                        error, call.retries + 1, jitter=self._random(), only_key=admission is None
                    )
                    if delay is not None:
                        delay = self._counted(call, error, delay)
                late = delay is not None and call.deadline is not None and self._clock.now() + delay >= call.deadline
                if admission is not None:
                    admission.settle(Settlement(usage=error.usage, error=error))
                self._report(call, error, attempts, None if late else delay)
                if delay is None:
                    raise
                if late:
                    raise LLMDeadlineExceededError(
                        f"the next attempt would start in {delay:.1f} s, after the call's deadline",
                        provider=call.provider,
                        model=call.model,
                        retry_after=delay,
                    ) from error
                if delay > 0.0:
                    await self._clock.sleep(delay)
                if admission is not None:
                    try:
                        await admission.renew(call)
                    except LLMException as refusal:
                        raise refusal from error

    def _takes_too_long(self, call: Call, error: LLMException) -> bool:
        """Whether another attempt that is not answered either would use up the time in which another target could."""
        if not call.elsewhere or call.deadline is None or not isinstance(error, LLMTimeoutError) or not call.attempts:
            return False
        return self._clock.now() + call.attempts[-1].duration > call.deadline

    def again(self, call: Call, error: LLMException) -> float | None:
        """Seconds until a call whose stream broke off with *error* may be made again, None if it may not.

        A yes is counted and paid as any other retry.
        """
        cut = LLMConnectionError(error.message, retry_after=error.retry_after)
        delay = self._policy.delay(cut, call.retries + 1, jitter=self._random())
        return None if delay is None else self._counted(call, error, delay)

    def _counted(self, call: Call, error: LLMException, delay: float) -> float | None:
        """*delay*, if the budget has a retry left for the call."""
        throttled = isinstance(error, LLMRateLimitError)
        if self._budget is not None and not self._budget.withdraw(self._clock.now(), throttled=throttled):
            return None
        call.retries += 1
        return delay

    def statistics(self) -> dict[str, float] | None:
        """What is left of the budget, and how many retries were not made for want of it; None without one."""
        budget = self._budget
        return {"budget": budget.balance, "denied": budget.denied} if budget is not None else None

    def _report(self, call: Call, error: LLMException, attempt: int, delay: float | None) -> None:
        if AttemptFailed in self._events.wanted:
            self._events.publish(
                AttemptFailed(
                    at=self._clock.now(),
                    provider=call.provider,
                    call_id=call.id,
                    key_id=error.key_id or "",
                    attempt=attempt,
                    error=type(error).__name__,
                    status=error.status,
                    retry_in=delay,
                )
            )
