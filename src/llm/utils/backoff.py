"""When to try again: a frozen policy that answers, and never sleeps."""

from __future__ import annotations

import msgspec

from ..core.exceptions import LLMException, Scope

MAX_DOUBLINGS = 60
"""More than any bound needs, and fewer than a float can count."""


class RetryPolicy(msgspec.Struct, frozen=True):
    """Exponential backoff with full jitter, and the vendor's ``retry-after`` where it says more.

    Full jitter (a uniform share of the exponential bound) because a fleet that failed together must not return
    together. *max_retry_after* bounds what of a vendor's wish is waited for.
    """

    max_attempts: int = 3
    base_delay: float = 0.5
    max_delay: float = 8.0
    max_retry_after: float | None = 120.0

    def delay(self, error: LLMException, attempt: int, *, jitter: float, only_key: bool = False) -> float | None:
        """Seconds to sleep before the next attempt, or None to give up.

        *attempt* counts the attempts made so far, *jitter* is uniform in [0, 1). An error about one key is not slept
        off: the pool leaves that key alone for as long as it must, and the next attempt asks for any. With *only_key*
        nobody chooses another, and the error is waited for like the provider's.
        """
        if not error.retryable or error.scope is Scope.REQUEST or attempt >= self.max_attempts:
            return None
        if error.scope is Scope.KEY and not only_key:
            return 0.0
        wish = error.retry_after or 0.0
        if self.max_retry_after is not None and wish > self.max_retry_after:
            return None
        doublings = min(max(0, attempt - 1), MAX_DOUBLINGS)
        return max(wish, jitter * min(self.max_delay, self.base_delay * 2.0**doublings))
