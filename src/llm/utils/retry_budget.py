"""How many retries a provider is sent: a share of its calls, so that trouble is not multiplied.

Three attempts a call are three times the load, and that at the worst of times. So each call pays in a tenth of a
retry, and each retry takes one out: whatever fails, no more than that share is sent again. A few come back by time
alone, or who makes a call a minute could never repeat one. A refusal for want of capacity costs a tenth of a failure:
it was cheap for the server, and waits as long as the server said.

Source of the idea and of its figures: the retry budgets of Finagle and Tower (share, reserve by time), and the AWS
SDKs' retry quota, in which throttling costs less than a timeout.
"""

from __future__ import annotations

import msgspec

THROTTLE_COST = 0.1
"""Of a retry after a 429, where one after a failure costs 1."""


class RetryBudgetPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """*share* of the calls may be repeated, and *per_second* more; *most* can be saved up, which there is at first."""

    share: float = 0.1
    per_second: float = 1.0
    most: float = 50.0


class RetryBudget:
    """The retries that one provider may still be sent. It is told the time."""

    __slots__ = ("_at", "_policy", "balance", "denied")

    def __init__(self, policy: RetryBudgetPolicy) -> None:
        self._policy = policy
        self.balance = policy.most
        self.denied = 0
        """Retries that were not made for want of it."""
        self._at: float | None = None

    def __repr__(self) -> str:
        return f"<RetryBudget: {self.balance:.1f} left, {self.denied} denied>"

    def deposit(self) -> None:
        """A call was made."""
        balance = self.balance + self._policy.share
        self.balance = balance if balance < self._policy.most else self._policy.most

    def withdraw(self, now: float, *, throttled: bool = False) -> bool:
        """Whether a retry may be made; if so, it is paid. *throttled*: the vendor had said 429."""
        policy = self._policy
        if self._at is not None:
            self.balance = min(policy.most, self.balance + max(0.0, now - self._at) * policy.per_second)
        self._at = now
        cost = THROTTLE_COST if throttled else 1.0
        # Sums of tenths are not exact.
        if self.balance < cost - 1e-9:
            self.denied += 1
            return False
        self.balance -= cost
        return True
