"""The order of the layers, and why each stands where it stands.

A call goes down this list and its reply comes up again. Above ``rate_limiter`` things happen once a call, below
``retry`` once an attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .base import Middleware
from .circuit_breaker import CircuitBreakerMiddleware
from .fallback import FallbackMiddleware
from .hedge import HedgeMiddleware
from .logging import LoggingMiddleware
from .metrics import MetricsMiddleware
from .rate_limiter import RateLimitMiddleware
from .resume import ResumeMiddleware
from .retry import RetryMiddleware


class Layer(NamedTuple):
    """One place in the stack: a name to find it by, and the middleware that stands there."""

    name: str
    middleware: Middleware


def default_stack(
    *,
    rate_limiter: RateLimitMiddleware,
    retry: RetryMiddleware | None,
    logging: LoggingMiddleware | None,
    metrics: MetricsMiddleware | None,
    circuit_breaker: CircuitBreakerMiddleware | None = None,
    resume: ResumeMiddleware | None = None,
    fallback: FallbackMiddleware | None = None,
    hedge: HedgeMiddleware | None = None,
    extensions: Sequence[Layer] = (),
) -> list[Layer]:
    """The layers of one provider, outermost first; those that are None are left out."""
    stack: list[Layer] = []

    # One record a call, also of calls that never got a permit: above everything that can refuse or repeat.
    if logging is not None:
        stack.append(Layer("logging.calls", logging.calls))

    # Calls, not attempts; below the record, so that a record is written even if counting should fail.
    if metrics is not None:
        stack.append(Layer("metrics.calls", metrics.calls))

    # Above whatever can answer a call, since a stream that breaks off may go on anywhere; below what counts calls, to
    # which it is one answer.
    if resume is not None:
        stack.append(Layer("resume", resume))

    # Above admission, because each target has a queue, limits and retries of its own; below what counts calls, because
    # it is one call wherever it is answered. What stands below is built once for each provider.
    if fallback is not None:
        stack.append(Layer("fallback", fallback))

    # Below the chain, whose targets each have one; above admission, because the second leg needs a permit of its own.
    if hedge is not None:
        stack.append(Layer("hedge", hedge))

    # Admission comes before repetition: a call queues once, keeps its ticket, and every attempt renews its permit
    # here. Nothing above holds a key or a client while the call waits.
    stack.append(Layer("rate_limiter", rate_limiter))

    # The only layer that repeats; everything below it sees one attempt.
    if retry is not None:
        stack.append(Layer("retry", retry))

    # The user's own layers see every attempt, with its key and model settled.
    stack.extend(extensions)

    # The details of an attempt: what was really asked, of whom, and what came back.
    if logging is not None:
        stack.append(Layer("logging.attempts", logging.attempts))

    # As far in as it can be, so that its times are the provider's alone, without what other layers do.
    if metrics is not None:
        stack.append(Layer("metrics.attempts", metrics.attempts))

    # Innermost, below every layer that could fail an attempt for reasons of its own: it sees what the server did.
    if circuit_breaker is not None:
        stack.append(Layer("circuit_breaker", circuit_breaker))

    return stack
