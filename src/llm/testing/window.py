"""The simulator's own rate limits: a strict sliding window, exact at every offset.

This is the judge of the package's limiter, so it shares no line with it. An amount taken at *t* is in force
until exactly ``t + window``: it counts before that instant and no longer counts at it.
"""

from __future__ import annotations

from collections import deque

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one key may use in any window; None means unlimited."""

    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    window_seconds: float = 60.0


class Window:
    """A log of (expiry, amount) for one dimension; told the time, which must not run backwards."""

    __slots__ = ("_log", "limit", "seconds", "used")

    def __init__(self, limit: int | None, seconds: float) -> None:
        self.limit = limit
        self.seconds = seconds
        self.used = 0
        self._log: deque[tuple[float, int]] = deque()

    def __repr__(self) -> str:
        return f"<Window {self.used}/{self.limit} in {self.seconds:g} s>"

    def expire(self, now: float) -> None:
        """Forget what was taken a whole window ago."""
        log = self._log
        while log and log[0][0] <= now:
            self.used -= log.popleft()[1]

    def add(self, amount: int, now: float) -> None:
        """Record *amount* at *now*, whether or not it fits."""
        if amount and self.limit is not None:
            self._log.append((now + self.seconds, amount))
            self.used += amount

    def wait(self, amount: int, now: float) -> float:
        """Seconds until *amount* would fit: 0.0 if it does now, a whole window if it never could."""
        if self.limit is None:
            return 0.0
        self.expire(now)
        excess = self.used + amount - self.limit
        if excess <= 0:
            return 0.0
        if amount > self.limit:
            return self.seconds
        for expiry, taken in self._log:
            excess -= taken
            if excess <= 0:
                return expiry - now
        raise AssertionError("an amount within the limit fits an empty window")

    def remaining(self, now: float) -> int:
        """What is left of the limit; 0 when over it or unlimited."""
        self.expire(now)
        return max(0, (self.limit or 0) - self.used)

    def full_in(self, now: float) -> float:
        """Seconds until nothing is in force: the instant vendors report as the reset."""
        self.expire(now)
        return self._log[-1][0] - now if self._log else 0.0


class Account:
    """One key's three windows. A request takes all it needs or nothing."""

    __slots__ = ("input_tokens", "limits", "output_tokens", "requests", "reserve_output")

    def __init__(self, limits: Limits, *, reserve_output: bool = False) -> None:
        self.limits = limits
        self.reserve_output = reserve_output
        self.requests = Window(limits.requests, limits.window_seconds)
        self.input_tokens = Window(limits.input_tokens, limits.window_seconds)
        self.output_tokens = Window(limits.output_tokens, limits.window_seconds)

    def __repr__(self) -> str:
        return f"<Account requests {self.requests!r}, input {self.input_tokens!r}, output {self.output_tokens!r}>"

    def wait(self, input_tokens: int, output_tokens: int, now: float) -> tuple[float, str]:
        """Seconds until the request could be admitted, and the dimension that makes it wait.

        Without reservation an output window refuses only when it is already full: the vendor counts the tokens
        that were generated and cannot know those that will be.
        """
        need = output_tokens if self.reserve_output else 1
        return max(
            (self.requests.wait(1, now), "requests"),
            (self.input_tokens.wait(input_tokens, now), "input_tokens"),
            (self.output_tokens.wait(need, now), "output_tokens"),
        )

    def admit(self, input_tokens: int, output_tokens: int, now: float) -> None:
        """Take the request's share of every window."""
        self.requests.add(1, now)
        self.input_tokens.add(input_tokens, now)
        if self.reserve_output:
            self.output_tokens.add(output_tokens, now)

    def reject(self, now: float) -> None:
        """Count a refused request, as OpenAI does."""
        self.requests.add(1, now)

    def produce(self, output_tokens: int, now: float) -> None:
        """Count output as it is generated, unless it was reserved at admission."""
        if not self.reserve_output:
            self.output_tokens.add(output_tokens, now)
