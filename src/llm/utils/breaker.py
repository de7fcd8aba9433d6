"""A circuit breaker: a machine that is told what became of attempts, and says when the next may go.

Theory of operation. Whoever asks a server that is down waits for nothing, and keeps it down. So when too much fails, no
more is sent for a while (*open*); then a single attempt finds out how things are (*half-open*), and while it is under
way nobody else goes. If it fails, the circuit is open again, for twice as long. If it succeeds, the rest follow, a few
at first (*ramping*): a server that has just come back has cold caches and a queue of its own.

    closed     -- too much fails -->            open
    open       -- its time is over, one goes --> half-open
    half-open  -- it succeeds -->               ramping
    half-open  -- it fails -->                  open, twice as long
    half-open  -- it was given up -->           half-open, another may go
    ramping    -- its time is over -->          closed
    ramping    -- too much fails -->            open, twice as long

An attempt counts only if it began after the last change: what was under way before tells of a time that is over.
"""

from __future__ import annotations

from enum import Enum
from math import inf

import msgspec

BUCKETS = 10
"""Parts of the window in which outcomes are counted: what is forgotten is forgotten a tenth at a time."""
RAMP_STEPS = 20
"""While it ramps, one more goes in each such part of the time, however long answers take."""


class BreakerState(Enum):
    """What may go through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    RAMPING = "ramping"


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a circuit opens, and for how long. Times in seconds."""

    consecutive: int = 5
    """Failures in a row that open it; of many attempts at once, at least *failure_rate* of these."""
    failure_rate: float = 0.5
    min_calls: int = 20
    """So large a share of at least so many attempts within *window* opens it as well."""
    window: float = 10.0
    open_seconds: float = 1.0
    max_open_seconds: float = 4.0
    """Doubled from the one to the other while it fails again and again. A server is not found dead for longer than that
    after it has come back."""
    ramp_seconds: float = 3.0


class Breaker:
    """One circuit. It has no clock: every method is told *now*, and *began*, the instant at which an attempt did."""

    __slots__ = (
        "_bad",
        "_bucket",
        "_counts",
        "_good",
        "_openings",
        "_policy",
        "_slots",
        "_streak",
        "_under_way",
        "changed_at",
        "ready_at",
        "reason",
        "state",
    )

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self.state = BreakerState.CLOSED
        self.changed_at = -inf
        self.ready_at = 0.0
        """The instant from which an attempt may go; infinite while that depends on one that is under way."""
        self.reason = ""
        """What failed last before it opened."""
        self._openings = 0
        """How often in a row it has opened without closing in between."""
        self._slots = self._under_way = 0
        self._forget()

    def __repr__(self) -> str:
        made = self._good + self._bad
        return f"<Breaker {self.state.value}: {self._bad} of {made} failed, {self._streak} in a row>"

    def blocked(self, now: float) -> bool:
        """Whether nothing may go, and nobody should wait for it."""
        return self.state in (BreakerState.OPEN, BreakerState.HALF_OPEN) and self.ready_at > now

    # -- attempts --------------------------------------------------------------------------------------------------

    def admit(self, now: float) -> None:
        """An attempt goes, now that it may; :meth:`leave` has to follow."""
        if self.state is BreakerState.OPEN:
            self._become(BreakerState.HALF_OPEN, now)
        self._under_way += 1
        if self.state is BreakerState.HALF_OPEN:
            self.ready_at = inf
        elif self.state is BreakerState.RAMPING and self._under_way >= self._slots:
            self.ready_at = now + self._policy.ramp_seconds / RAMP_STEPS

    def leave(self, began: float) -> None:
        """An attempt that was admitted is over, whatever became of it. One that was given up leaves its place."""
        if began < self.changed_at or not self._under_way:
            return
        self._under_way -= 1
        if self.state in (BreakerState.HALF_OPEN, BreakerState.RAMPING):
            self.ready_at = 0.0

    def succeeded(self, began: float, now: float) -> bool:
        """An attempt was answered. Returns whether the state has changed."""
        if began < self.changed_at:
            return False
        self._streak = 0
        if self.state is BreakerState.CLOSED:
            self._count(now, 0)
            return False
        if self.state is BreakerState.HALF_OPEN:
            self._become(BreakerState.RAMPING, now)
            self._forget()
            self._slots, self.ready_at = 2, 0.0
            return True
        if self.state is BreakerState.RAMPING:
            self._count(now, 0)
            # One more for each that succeeds: twice as many after each round trip.
            self._slots += 1
            self.ready_at = 0.0
            if now >= self.changed_at + self._policy.ramp_seconds:
                self._become(BreakerState.CLOSED, now)
                self._openings = 0
                return True
        return False

    def failed(self, began: float, now: float, reason: str, *, under_way: float = 0.0) -> bool:
        """An attempt was not answered, of so many *under way* at once. Returns whether the circuit has opened."""
        if began < self.changed_at or self.state is BreakerState.OPEN:
            return False
        policy = self._policy
        self._streak += 1
        self._count(now, 1)
        # Of many attempts that were sent together those that fail come back first: in a row, but no sign of anything.
        row = max(policy.consecutive, policy.failure_rate * under_way)
        if self.state is not BreakerState.HALF_OPEN and self._streak < row:
            made = self._good + self._bad
            if made < policy.min_calls or self._bad < policy.failure_rate * made:
                return False
        self._become(BreakerState.OPEN, now)
        self.ready_at = now + min(policy.max_open_seconds, policy.open_seconds * 2.0 ** min(self._openings, 60))
        self.reason = reason
        self._openings += 1
        self._forget()
        return True

    def reset(self, now: float) -> None:
        """Forget everything: what was told says nothing any more."""
        self._become(BreakerState.CLOSED, now)
        self._openings = 0
        self.ready_at = 0.0
        self._forget()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _become(self, state: BreakerState, now: float) -> None:
        self.state = state
        self.changed_at = now
        self._under_way = 0

    def _forget(self) -> None:
        self._streak = self._good = self._bad = 0
        self._counts = [[0, 0] for _ in range(BUCKETS)]
        self._bucket = 0

    def _count(self, now: float, kind: int) -> None:
        """One more success (0) or failure (1) in the window that ends now."""
        bucket = int(now * BUCKETS / self._policy.window)
        if bucket != self._bucket:
            counts = self._counts
            for passed in range(max(self._bucket + 1, bucket - BUCKETS + 1), bucket + 1):
                good, bad = counts[passed % BUCKETS]
                self._good -= good
                self._bad -= bad
                counts[passed % BUCKETS] = [0, 0]
            self._bucket = bucket
        self._counts[bucket % BUCKETS][kind] += 1
        if kind:
            self._bad += 1
        else:
            self._good += 1
