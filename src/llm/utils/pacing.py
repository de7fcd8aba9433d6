"""How fast a quota may be used when its limits are not the whole truth: four small machines that are told the time.

A vendor may know of usage that we do not (another process, the one before a restart), may enforce its limits by shorter
spans than it says, and may refuse whoever grows too fast. None of that can be looked up; all of it shows as a 429 that
the ledger does not explain. RATE_LIMITING §4.4 to §4.6 has what each constant here gave in simulation.
"""

from __future__ import annotations

from collections import deque
from math import inf, log2

STEP = 0.5
"""Seconds in which a slow start doubles when nobody has answered yet."""
LONGEST_GUARD = 3.0
GUARD_GROWTH, GUARD_DECAY = 1.6, 0.85
"""A refusal makes the guard longer by so much, a minute without one shorter."""
SPAN = 5.0
"""Seconds of the allowance. Vendors that enforce by shorter spans do so by 1 to 10 s."""
LEAST_SHARE = SPAN / 60.0
"""Of the limit, in :data:`SPAN` seconds: an even flow."""
SHARE_GROWTH = 0.05
"""Of the limit, that the allowance gains in a minute without a refusal."""
RAMP_FLOOR = 1_000_000
"""Input tokens a minute below which no vendor minds how fast one grows (OpenAI's rate-limit guide)."""
RAMP_GROWTH, RAMP_MINUTES = 1.5, 15
"""The same page: at most half as much again every fifteen minutes."""


class SlowStart:
    """Lets 1, 2, 4, … requests go until the first answer has told what is left.

    The count doubles every :data:`STEP` seconds, and is never below what the limits' own steady *rate* (requests a
    second) would have let through: a process before this one may have used the quota, and then just that returns.
    """

    __slots__ = ("_rate", "_sent", "began")

    def __init__(self, rate: float, began: float) -> None:
        self._rate = rate
        self.began = began
        self._sent = 0

    def sent(self) -> None:
        """One more has gone."""
        self._sent += 1

    def withdrawn(self) -> None:
        """One has not gone after all; of those before the beginning nothing is known here."""
        self._sent = max(0, self._sent - 1)

    def opens_at(self) -> float:
        """The instant from which one more may go."""
        doubling = STEP * log2(self._sent + 1)
        return self.began + (min(doubling, self._sent / self._rate) if self._rate > 0.0 else doubling)


class Guard:
    """The seconds that are added to the window: *base*, and more for a while after refusals."""

    __slots__ = ("_base", "_decays_at", "seconds")

    def __init__(self, base: float) -> None:
        self._base = base
        self.seconds = base
        self._decays_at = inf

    def refused(self, now: float) -> None:
        self.seconds = max(self.seconds, min(LONGEST_GUARD, max(self.seconds, STEP / 2) * GUARD_GROWTH))
        self._decays_at = now + 60.0

    def tick(self, now: float) -> bool:
        """Let time pass; whether that has changed the guard."""
        changed = False
        while now >= self._decays_at:
            changed = True
            self.seconds *= GUARD_DECAY
            self._decays_at += 60.0
            if self.seconds <= self._base:
                self.seconds, self._decays_at = self._base, inf
        return changed


class Allowance:
    """The share of a minute's limit that may be used in :data:`SPAN` seconds: halved by refusals, and slowly regained.

    1.0 does not bind, and is where it begins.
    """

    __slots__ = ("_grows_at", "share")

    def __init__(self) -> None:
        self.share = 1.0
        self._grows_at = inf

    def refused(self, now: float) -> None:
        self.share = max(LEAST_SHARE, self.share / 2.0)
        self._grows_at = now + 60.0

    def tick(self, now: float) -> bool:
        """Let time pass; whether that has changed the share."""
        changed = False
        while now >= self._grows_at:
            changed = True
            self.share += SHARE_GROWTH
            self._grows_at += 60.0
            if self.share >= 1.0:
                self.share, self._grows_at = 1.0, inf
        return changed


class Ramp:
    """A cap on input tokens a minute, after the vendor has said that traffic grew too fast.

    It is half as much again as the mean of the last :data:`RAMP_MINUTES` minutes, grows by the same factor in as many
    minutes, and goes once it is above *limit*.
    """

    __slots__ = ("_grows_at", "_minutes", "_next", "cap")

    def __init__(self) -> None:
        self._minutes: deque[int] = deque(maxlen=RAMP_MINUTES)
        self._next = -inf
        self._grows_at = inf
        self.cap: int | None = None

    def tick(self, now: float, used: int, limit: int | None) -> bool:
        """Note that *used* input tokens count just now; whether that has changed the cap."""
        if now >= self._next:
            self._minutes.append(used)
            self._next = now + 60.0
        if self.cap is None or now < self._grows_at:
            return False
        self.cap = int(self.cap * RAMP_GROWTH)
        self._grows_at = now + 60.0 * RAMP_MINUTES
        if limit is not None and self.cap >= limit:
            self.cap, self._grows_at = None, inf
        return True

    def refused(self, now: float) -> None:
        mean = sum(self._minutes) / len(self._minutes) if self._minutes else 0.0
        cap = max(RAMP_FLOOR, int(RAMP_GROWTH * mean))
        self.cap = cap if self.cap is None else min(self.cap, cap)
        self._grows_at = now + 60.0 * RAMP_MINUTES
