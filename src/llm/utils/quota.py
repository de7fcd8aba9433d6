"""One quota: what a pool of keys may use of one group of models, and what answers and refusals have taught of it.

Theory of operation. The limits' own window is a ledger; further windows (a day, the vendor's bursts) are ledgers beside
it, and a reservation holds all of them or none. What answers' headers say of the rest of a quota is compared with our
own books as an *interval*: a header was written at some time between our sending and our reading, and requests
under way may or may not be in it. What the vendor counts beyond the upper end of what can be ours was used by others;
what we had put down to others and the vendor cannot have counted is taken back. Inside the interval nothing is learnt.
To spare the common path, a request every :data:`OBSERVE_EVERY` seconds at most is a *probe*, which notes our books when
it leaves and has its headers read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, inf
from typing import Any, NamedTuple

from ..core.settings import LimitSettings
from ..core.types import Cost, Counting, LimitState, ObservedLimits
from .pacing import SPAN, Allowance, Guard, Ramp, SlowStart
from .sliding_window import DIMENSIONS, NOTHING, Dimension, Ledger, Reservation

OBSERVE_EVERY = 0.1
"""Seconds."""
COALESCE_ABOVE = 500
"""Requests a window above which the log is kept by grains: a shorter one is walked in 25 µs."""
GRAIN = 0.25
OUTPUT_GRAIN = 0.1
"""Seconds. Of 60 s this is 0.4 %, by which capacity may return late."""
DAY = 86_400.0
DAY_GRAIN = 300.0
NEARLY_FULL = 0.95
"""Of a limit, from which a refusal is a matter of moments: one request came late, or the window's edge was hit."""
STALE = 1.0
"""Seconds after which headers say little of a quota that others use as well."""
EVIDENT = 3.0
"""How many times the inaccuracy of books and headers a difference must be to show that others use the quota."""
OTHERS_AHEAD = 30
"""Part of what others use in a minute that they use until we hear of it: two seconds."""
UNHEARD_SHARE = 8
"""The part of a minute's requests that may go without a word of what is left, if nobody else was seen to use it."""
SHARED_SECONDS = 600.0
"""For how long a quota is taken to be shared, after somebody else was seen to use it."""
LATE = 2.0
"""Mean deviations above the mean after which a first token is late: its request probably arrived late too."""
LEARNING = 0.05
"""The weight of a new answer in the mean time to the first token."""
FIRST_PAUSE = 0.125
"""Seconds, half of what a quota rests at the least after a refusal; doubled with each in a row."""
ON_ITS_WAY = 0.2
"""Seconds that output may be under way to us."""
UNDER_WAY = 1.0
"""Seconds in which a request surely arrives; until then a header may or may not count it."""
ROUNDED = 500
"""Anthropic rounds remaining tokens to the nearest thousand."""
INPUT_ERROR = 0.1
"""Share by which our estimate of prompts under way and the vendor's may differ."""

CAPPED: tuple[Dimension, ...] = ("input_tokens", "tokens")
"""What a ramp is about."""
PREPAID: tuple[Dimension, ...] = ("requests", "input_tokens", "tokens")
"""What is known when a request is sent, and can be held back."""


class Probe(NamedTuple):
    """Our books when a request left: per dimension what the vendor had surely counted, and what it had at most."""

    at: float
    surely: tuple[int, ...]
    at_most: tuple[int, ...]


class Quota:
    """The books of one quota pool and model group.

    *told* is called with what has changed for the outside: a limit that was adopted, or a slow start.
    """

    __slots__ = (
        "_allowance",
        "_answered",
        "_configured",
        "_day",
        "_deviation",
        "_free",
        "_guard",
        "_limits",
        "_others",
        "_ramp",
        "_refused_at",
        "_shared_until",
        "_slow",
        "_spans",
        "_start",
        "_strikes",
        "_timed",
        "_told",
        "_told_at",
        "_unheard",
        "_unheard_limit",
        "_waits_for_news",
        "concurrent_limit",
        "counting",
        "first_token",
        "in_flight",
        "ledger",
        "name",
        "paused_until",
        "probe_at",
        "pulled_at",
        "slow_start",
        "streams",
    )

    def __init__(
        self,
        name: str,
        limits: LimitSettings,
        *,
        counting: Counting | None = None,
        guard: float = 0.25,
        slow_start: bool = False,
        z: float = 0.0,
        told: Callable[[Quota, Dimension | None, int], None] | None = None,
    ) -> None:
        self.name = name
        self.counting = counting if counting is not None else Counting()
        self._told = told
        window = limits.window_seconds
        requests = limits.requests_per_minute
        self.ledger = Ledger(
            requests=requests,
            input_tokens=limits.input_tokens_per_minute,
            output_tokens=limits.output_tokens_per_minute,
            tokens=limits.tokens_per_minute,
            window=window,
            guard=guard,
            grain=min(GRAIN, window / 240) if requests is None or requests > COALESCE_ABOVE else 0.0,
            output_grain=min(OUTPUT_GRAIN, window / 600),
            output_counts=not self.counting.reserve_max,
            z=z,
        )
        self._configured = {dimension: self.ledger.limit(dimension) for dimension in DIMENSIONS}
        self._limits = dict(self._configured)
        """What may be used, configured or adopted, when no ramp caps it."""
        self._spans: list[Ledger] = list(_further(limits, window, guard, self.counting.reserve_max))
        """Windows beside the limits' own that are configured."""
        self._day = self._spans[0] if limits.requests_per_day or limits.tokens_per_day else None
        self._others = self._spans
        """Those, and the one that was learnt."""
        self.concurrent_limit = limits.concurrent_requests
        self.in_flight = 0
        self.paused_until = -inf
        self._guard = Guard(guard)
        self._allowance = Allowance()
        self._ramp = Ramp()
        self._slow: Ledger | None = None
        """The window of the allowance, while it binds."""
        self.streams: set[Any] = set()
        """Whoever holds a reservation of an answer that streams."""
        self.pulled_at = -inf
        """When they were last asked how far they are."""
        self.slow_start = slow_start
        self._start: SlowStart | None = None
        self._answered = not slow_start
        self._free = self._answered and self.concurrent_limit is None
        """Nothing but the ledgers can hold a call back."""
        self.probe_at = -inf
        self._told_at = -inf
        """When headers last told what is left."""
        self._shared_until = -inf
        self._unheard = 0
        """Requests since headers were last looked at, and how many may go when those are old."""
        self._unheard_limit: float = 1
        self._waits_for_news = False
        self.first_token = self._deviation = 0.0
        """Seconds to the first token of a stream: their mean, and the mean deviation from it."""
        self._timed = 0
        self._refused_at = -inf
        self._strikes = 0
        """Refusals without an answer in between."""

    def __repr__(self) -> str:
        return f"<Quota {self.name}: {self.ledger!r}, {self.in_flight} under way>"

    # -- what a call takes ---------------------------------------------------------------------------------------------

    def reserve(self, cost: Cost, *, now: float, variance: float = 0.0, sure: bool = False) -> Reservation | None:
        """Take *cost* in every window, or nothing and return None; if *sure*, only what is free already."""
        if (not self._free or self._unheard >= self._unheard_limit) and not self._opens(now):
            return None
        reservation = self.ledger.reserve(cost, now=now, variance=variance, sure=sure)
        if reservation is None:
            return None
        if self._others:
            held = reservation
            for ledger in self._others:
                also = ledger.reserve(_clipped(cost, ledger), now=now, variance=variance)
                if also is None:
                    reservation.settle(NOTHING, now=now)
                    return None
                held.also = held = also
        self._unheard += 1
        if self._start is not None:
            self._start.sent()
        self.in_flight += 1
        return reservation

    def settle(self, reservation: Reservation, actual: Cost, *, now: float, until: float | None = None) -> None:
        """What was reserved has cost *actual*."""
        if reservation.settled:
            return
        if reservation.ledger is self.ledger:
            # One from before a fresh start was counted as spent then.
            if self._start is not None and not actual.requests:
                self._start.withdrawn()
            self.in_flight -= 1
        reservation.settle(actual, now=now, until=until)

    def too_large(self, cost: Cost) -> tuple[str, int, int] | None:
        """The dimension, need and limit that keep *cost* out for ever, or None."""
        excess = self.ledger.too_large(cost)
        if excess is None and self._day is not None:
            excess = self._day.too_large(cost)
        return excess

    def leaves_room(self, head: Cost, cost: Cost, *, now: float) -> bool:
        """Whether *head*, which must wait, could go just as soon if *cost* went before it."""
        return self.ledger.leaves_room(head, cost, now=now)

    def opens_at(self, now: float) -> float:
        """The instant at which more may be taken than now; infinite if that takes somebody's settling."""
        if now < self.paused_until:
            return self.paused_until
        if self._start is not None and self._start.opens_at() > now:
            return self._start.opens_at()
        at = self.ledger.next_expiry(now) or inf
        for ledger in self._others:
            at = min(at, ledger.next_expiry(now) or inf)
        return at

    def _opens(self, now: float) -> bool:
        if now < self.paused_until:
            return False
        if self._answered and self._unheard >= self._unheard_limit and self._is_stale(now):
            self._waits_for_news = True
            self._begin(now)
        if self._answered and self.concurrent_limit is None:
            self._free = True
            return True
        if self.concurrent_limit is not None and self.in_flight >= self.concurrent_limit:
            return False
        if self._answered:
            return True
        if self._start is None:
            self._begin(now)
        return self._start is None or self._start.opens_at() <= now

    def _is_stale(self, now: float) -> bool:
        """Whether so much has been sent without a word of what is left that the next may be too much."""
        limit = self.ledger.request_limit
        if now < self._shared_until:
            self._unheard_limit = 1
        else:
            self._unheard_limit = limit // UNHEARD_SHARE + 1 if limit is not None else inf
        if now <= self._told_at + STALE or self._told_at == -inf or not self.slow_start:
            # What is new is still on its way; and who never tells is not waited for.
            self._unheard = 0
            return False
        return self._unheard >= self._unheard_limit

    def _begin(self, at: float) -> None:
        self._answered = self._free = False
        limit = self.ledger.request_limit
        self._start = SlowStart(limit / self.ledger.span if limit is not None else 0.0, at)
        if self._told is not None:
            self._told(self, None, 0)

    # -- what is learnt ------------------------------------------------------------------------------------------------

    def probe(self, now: float, *, since: float | None = None) -> Probe:
        """Our books at the departure of a request whose headers are to be read; it has left *since*, or just now."""
        if since is None:
            if now < self._told_at + STALE or self._told_at == -inf:
                # Where news is old, whoever is answered first brings some.
                self.probe_at = now + OBSERVE_EVERY
            self._tick(now)
        ledger = self.ledger
        ledger.expire(now)
        recent = ledger.recent((since if since is not None else now) - UNDER_WAY)
        own = tuple(ledger.used(dimension) - getattr(ledger.foreign, dimension) for dimension in DIMENSIONS)
        return Probe(now, tuple(map(int.__sub__, own, recent)), own)

    def observe(self, probe: Probe, limits: ObservedLimits, *, speed: float, now: float) -> bool:
        """The answer to *probe* has begun, with *limits* in its headers; others come at *speed* tokens a second.

        Returns whether they tell what is left.
        """
        told = False
        for number, dimension in enumerate(DIMENSIONS):
            state: LimitState | None = getattr(limits, dimension)
            if state is not None and state.limit:
                self._adopt(dimension, state.limit)
                if state.remaining is not None and self.ledger.limit(dimension) is not None:
                    told = True
                    self._compare(dimension, number, state.limit, state.remaining, probe, speed, now)
        if told:
            self._told_at = now
            self._unheard = 0
            if self._waits_for_news:
                self._waits_for_news = False
                self._answered = True
                self._start = None
        return told

    def began(self, reservation: Reservation, sent_at: float, *, now: float) -> None:
        """The first token of an answer has come."""
        self.accepted(sent_at)
        seconds = now - sent_at
        self._timed += 1
        if self._timed == 1:
            self.first_token = self._deviation = seconds
            return
        late = seconds - self.first_token
        if late > LATE * self._deviation:
            # Somewhere on the way it lost time. If that was before it arrived, it counts from then.
            reservation.postpone(now - max(0.0, self.first_token - 2.0 * self._deviation), now=now)
            late = LATE * self._deviation
        weight = max(LEARNING, 1.0 / self._timed)
        self.first_token += weight * late
        self._deviation += weight * (abs(late) - self._deviation)

    @property
    def open(self) -> bool:
        """Whether it is known how much may be used: there is no slow start under way."""
        return self._answered

    def shared(self, now: float) -> bool:
        """Whether somebody else was seen to use the quota lately."""
        return now < self._shared_until

    def accepted(self, sent_at: float) -> None:
        """A request that left at *sent_at* was not refused: a slow start that it was part of is over."""
        if not self._answered and self._start is not None and sent_at >= self._start.began:
            self._answered = True
            self._waits_for_news = False
            self._start = None
        if sent_at > self._refused_at:
            self._strikes = 0

    def refused(self, sent_at: float, *, retry_after: float, told: bool, ramp: bool, now: float) -> None:
        """A request that left at *sent_at* was answered with 429, although the books had room for it.

        *told*: its headers have explained it (:meth:`observe`). *ramp*: the vendor says that traffic grew too fast.
        """
        # Those that were under way together are one refusal.
        again = sent_at > self._refused_at
        if again:
            self._strikes += 1
        self.paused_until = max(self.paused_until, now + max(retry_after, FIRST_PAUSE * 2.0 ** min(self._strikes, 6)))
        self._free = False
        if again:
            self._refused_at = now
            # By the limits of when it was sent: a cap that it brings about does not explain it.
            explained = self._nearly_full(now)
            if explained:
                self._guard.refused(now)
            elif not told:
                self._allowance.refused(now)
            if ramp:
                self._ramp.refused(now)
            self._apply()
            if self.slow_start and not explained:
                self._shared_until = now + SHARED_SECONDS
                self._unheard_limit = 1
                self._waits_for_news = False
                self._begin(self.paused_until)
        # Whatever goes next is to tell how things stand.
        self.probe_at = -inf

    def start_afresh(self, now: float) -> None:
        """Nobody is left to settle what is open: it counts as spent."""
        self.ledger = self.ledger.successor(now)
        self._spans = [ledger.successor(now) for ledger in self._spans]
        self._day = self._spans[0] if self._day is not None else None
        if self._slow is not None:
            self._slow = self._slow.successor(now)
        self._others = [*self._spans, *([self._slow] if self._slow is not None else ())]
        self.in_flight = 0
        self.streams.clear()

    def _nearly_full(self, now: float) -> bool:
        """Whether by our own books a limit was all but used up."""
        ledger = self.ledger
        ledger.expire(now)
        for dimension in DIMENSIONS:
            limit = ledger.limit(dimension)
            if limit and ledger.used(dimension) - getattr(ledger.foreign, dimension) >= NEARLY_FULL * limit:
                return True
        return False

    def _adopt(self, dimension: Dimension, told: int) -> None:
        """A limit that nobody configured is the vendor's; one that is above the vendor's is lowered to it."""
        configured, known = self._configured[dimension], self._limits[dimension]
        if dimension == "tokens" and configured is None and known is None and self._tells_apart():
            # Anthropic's "tokens" is whichever of its other limits is the tightest.
            return
        limit = told if configured is None else min(told, configured)
        if limit != known:
            self._limits[dimension] = limit
            self.ledger.set_limit(dimension, limit)
            self._apply()
            if self._told is not None:
                self._told(self, dimension, limit)

    def _tells_apart(self) -> bool:
        return self.ledger.input_limit is not None or self.ledger.output_limit is not None

    def _compare(
        self, dimension: Dimension, number: int, limit: int, remaining: int, probe: Probe, speed: float, now: float
    ) -> None:
        ledger, used = self.ledger, limit - remaining
        ledger.expire(now)
        foreign: int = getattr(ledger.foreign, dimension)
        surely = probe.surely[number]
        at_most = max(probe.at_most[number], ledger.used(dimension) - foreign)
        tolerance = 0.5 if dimension == "requests" else float(ROUNDED)
        if dimension == "input_tokens" or dimension == "tokens":
            tolerance += INPUT_ERROR * (probe.at_most[number] - surely)
        if dimension == "output_tokens" or (dimension == "tokens" and ledger.output_counts):
            # What streams have produced and not told yet.
            at_most += int(speed * ledger.open_count * (min(now - self.pulled_at, UNDER_WAY) + ON_ITS_WAY))
        # Nothing left is nothing left, and may be less than that.
        least = ceil(used - (tolerance if remaining else 0.0) - at_most)
        most = max(0, int(used + tolerance - surely))
        if used - EVIDENT * max(1.0, tolerance) > at_most:
            self._shared_until = now + SHARED_SECONDS
            self._unheard_limit = 1
        if now < self._shared_until and least > 0:
            # Whoever else is there goes on until we hear of it again.
            least += foreign // OTHERS_AHEAD
            ledger.speed = 0.0
        if foreign < least:
            ledger.add_foreign(dimension, least - foreign, now=now)
        elif foreign > most and remaining:
            ledger.add_foreign(dimension, most - foreign, now=now)

    def _tick(self, now: float) -> None:
        self.ledger.expire(now)
        used = self.ledger.input_used if self.ledger.input_limit is not None else self.ledger.tokens_used
        changed = self._guard.tick(now)
        changed |= self._allowance.tick(now)
        changed |= self._ramp.tick(now, used, self._limits["input_tokens"] or self._limits["tokens"])
        if changed:
            self._apply()

    def _apply(self) -> None:
        """Let the ledgers keep what was learnt."""
        ledger, share = self.ledger, self._allowance.share
        ledger.guard = self._guard.seconds
        cap = self._ramp.cap
        for dimension in CAPPED:
            limit = self._limits[dimension]
            if limit is not None:
                ledger.set_limit(dimension, limit if cap is None else min(limit, cap))
        if share >= 1.0:
            self._slow = None
        else:
            if self._slow is None:
                self._slow = Ledger(window=SPAN, guard=0.0)
            for dimension in PREPAID:
                limit = ledger.limit(dimension)
                self._slow.set_limit(dimension, ceil(limit * share) if limit is not None else None)
        self._others = [*self._spans, *([self._slow] if self._slow is not None else ())]


def _further(limits: LimitSettings, window: float, guard: float, reserve_max: bool) -> Iterator[Ledger]:
    """The windows beside the limits' own."""
    if limits.requests_per_day is not None or limits.tokens_per_day is not None:
        yield Ledger(
            requests=limits.requests_per_day,
            tokens=limits.tokens_per_day,
            window=DAY,
            guard=guard,
            grain=DAY_GRAIN,
            output_grain=DAY_GRAIN,
            output_counts=not reserve_max,
        )
    burst = limits.burst_seconds
    if burst is not None and burst < window:
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        some = None
        if requests is not None:
            # A whole number of requests, at least one, in the time in which as many are allowed: 100 a minute are one
            # in 0.6 s, and not one in a second.
            some = max(1, int(requests * burst / window + 1e-9))
            burst = some * window / requests
        share = burst / window
        yield Ledger(
            requests=some,
            input_tokens=_part(limits.input_tokens_per_minute, share),
            tokens=_part(tokens, share),
            window=burst,
            # A guard of the usual length would be a quarter of a second's burst.
            guard=min(guard, burst / 20.0),
            grain=burst / 240.0,
        )


def _part(limit: int | None, share: float) -> int | None:
    return max(1, int(limit * share)) if limit is not None else None


def _clipped(cost: Cost, ledger: Ledger) -> Cost:
    """*cost*, of which a short window is asked no more than it could ever hold: then it must be empty."""
    input_tokens, tokens = cost.input_tokens, cost.tokens
    if ledger.input_limit is not None and input_tokens > ledger.input_limit:
        input_tokens = ledger.input_limit
    if ledger.token_limit is not None and tokens > ledger.token_limit:
        tokens = ledger.token_limit
    if input_tokens is cost.input_tokens and tokens is cost.tokens:
        return cost
    return Cost(cost.requests, input_tokens, cost.output_tokens, tokens)
