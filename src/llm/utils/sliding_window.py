"""An exact sliding window over several dimensions at once: requests, input, output and combined tokens of one quota.

Theory of operation. A vendor counts what it received in the last *window* seconds. We count what we sent, in a log of
entries that each expire one window (and a *guard*, because a request is counted when it arrives and not when it
leaves) after it was sent. As long as the sums over the log stay within the limits, no window at any offset can hold
more than the limit; and a token bucket of the same size, refilled continuously, is satisfied as well.

A reservation takes all dimensions or nothing. Its life:

    reserve ──► sent ──► produced … ──► settle(actual)
       └──────────────────────────────► settle(nothing)          the request never left

Requests and input are in the log from the start, stamped again when the request really leaves; as long as it has not
left, its entry does not expire. Output is *open* until it is produced: it has no expiry, since nobody knows how long
the answer takes. What is open is reserved by its mean and, once for all answers together, by *z* standard deviations;
what is produced enters a log of its own with the time at which it was seen. A window may *look ahead*: what is reserved
now will be produced a while from now, and what will have expired by then is free for it.

Where limits are large, entries that follow each other within a *grain* are one, with the later expiry: the log stays
short, no window holds more than it may, and capacity returns a grain later at most. What others use of the quota
(known only from the vendor's headers) counts as *foreign*, in a third log.

The machine does no I/O and reads no clock: it is told the time, which must not run backwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush, merge
from math import inf, sqrt
from operator import attrgetter
from typing import Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from ..core.types import Cost

Dimension: TypeAlias = Literal["requests", "input_tokens", "output_tokens", "tokens"]
DIMENSIONS: tuple[Dimension, ...] = ("requests", "input_tokens", "output_tokens", "tokens")

NOTHING = Cost(requests=0)

STAMP_SLACK = 0.01
"""Seconds between permit and departure that are left to the guard instead of being stamped again."""
MIN_COMPACT = 64
"""Withdrawn entries that may lie in the middle of the log before they are swept out."""
GONE = -inf
"""The expiry of an entry that was withdrawn."""
OVERBOOKED = 0.03
"""Of the output limit, by which more may be promised than is free while less than the limit has been produced.

Promises hold a margin against long answers that is mostly given back. Without this, a key on which output and requests
run out together is used to 98.6 %, with it to 99.2 % (`make quota`, row strict-both); peaks stay at 102 %.
"""
ARRIVING = 0.3
"""Seconds that a request is on its way, and a stream's tokens to us: what streams produce until then counts before."""
KEPT_FREE = 0.02
"""Of the output limit, that must be free before more is promised: a vendor whose limit is used up refuses everything.

Who comes late to a limit that is just used up is refused: in row two-classes of `make quota` (7,500 calls) five of
twenty seeds had a refusal with 0.005, one with 0.01, one with 0.015, and none with 0.02. It costs 0.3 % of a key on
which output and requests run out together, and nothing where output alone does.
"""
FOREIGN_STEPS = 60
"""Steps in which foreign usage expires over a window: nobody tells when it was used, so it goes evenly."""


class Entry(msgspec.Struct, gc=False):
    """What leaves the sums together, at *expiry*, once nothing in it is *held* back any more.

    A full window holds thousands of these; the collector need not look at what holds only numbers.
    """

    expiry: float
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    tokens: int = 0
    held: int = 0
    """Reservations in it that have not left yet."""


class Ledger:
    """The logs of one quota and their running sums. A limit of None does not bind.

    *grain* and *output_grain* are the seconds within which entries are one; 0 keeps each apart. With *output_counts*
    output counts of the combined tokens as it is produced; else a cost says itself what it takes of them.
    """

    __slots__ = (
        "_bounded",
        "_counts_output",
        "_due",
        "_foreign",
        "_grain",
        "_grain_ends",
        "_log",
        "_output_grain",
        "_output_grain_ends",
        "_produced",
        "_slack",
        "_tails",
        "_window",
        "_withdrawn",
        "foreign",
        "input_limit",
        "input_used",
        "lead",
        "open_count",
        "open_output",
        "open_variance",
        "output_counts",
        "output_limit",
        "output_used",
        "producing",
        "request_limit",
        "requests_used",
        "seen_at",
        "span",
        "speed",
        "token_limit",
        "tokens_used",
        "z",
    )

    def __init__(
        self,
        *,
        requests: int | None = None,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        tokens: int | None = None,
        window: float = 60.0,
        guard: float = 0.25,
        grain: float = 0.0,
        output_grain: float = 0.0,
        output_counts: bool = False,
        z: float = 0.0,
    ) -> None:
        self.request_limit = requests
        self.input_limit = input_tokens
        self.output_limit = output_tokens
        self.token_limit = tokens
        self._window = window
        self.span = window + guard
        """Seconds for which an entry counts."""
        self.output_counts = output_counts
        self.z = z
        self.lead = self.speed = 0.0
        """Seconds to an answer's first token, and tokens a second from there; a speed of 0 does not look ahead."""
        self.producing = 0
        self.seen_at = 0.0
        """How many answers are known to be streaming, and when they were last asked how far they are."""
        self._grain = grain
        self._output_grain = output_grain
        self._grain_ends = self._output_grain_ends = -inf
        self._slack = max(0.0, min(STAMP_SLACK, guard))
        self._look()
        self._log: deque[Entry] = deque()
        self._produced: deque[Entry] = deque()
        self._foreign: deque[Entry] = deque()
        self._tails: list[tuple[float, int, float]] = []
        """(until, mean, variance) of what may still be produced for answers that were given up."""
        self._due = inf
        """No entry expires before this instant."""
        self._withdrawn = 0
        self.requests_used = self.input_used = self.output_used = self.tokens_used = 0
        self.foreign = Entry(inf)
        """The part of what is used that was not ours."""
        self.open_count = 0
        self.open_output = 0
        """Output tokens that answers under way will probably still have; ``open_variance`` is that of their sum."""
        self.open_variance = 0.0

    def __repr__(self) -> str:
        def of(used: int, limit: int | None) -> str:
            return f"{used}/{limit}" if limit is not None else f"{used}"

        combined = f", tokens {of(self.tokens_used, self.token_limit)}" if self.token_limit is not None else ""
        return (
            f"<Ledger requests {of(self.requests_used, self.request_limit)}, "
            f"input {of(self.input_used, self.input_limit)}, "
            f"output {of(self.output_used, self.output_limit)} + {self.open_output} open{combined}>"
        )

    @property
    def bounded(self) -> bool:
        """Whether there is any limit to keep."""
        return self._bounded

    @property
    def guard(self) -> float:
        """Seconds that an entry counts beyond the window."""
        return self.span - self._window

    @guard.setter
    def guard(self, seconds: float) -> None:
        self.span = self._window + seconds

    def limit(self, dimension: Dimension) -> int | None:
        """What may be used of *dimension* in a window, None if that is not limited."""
        return _state(self, dimension)[0]

    def set_limit(self, dimension: Dimension, limit: int | None) -> None:
        """From now on *limit* binds. What was used while there was no limit at all is not known here."""
        name = {"requests": "request_limit", "input_tokens": "input_limit", "output_tokens": "output_limit"}
        setattr(self, name.get(dimension, "token_limit"), limit)
        self._look()

    def _look(self) -> None:
        """Note which limits there are."""
        self._bounded = not self.request_limit is self.input_limit is self.output_limit is self.token_limit is None
        # Whether there is a limit that what is produced counts of.
        self._counts_output = self.output_limit is not None or (self.output_counts and self.token_limit is not None)

    def used(self, dimension: Dimension) -> int:
        """What counts of *dimension* just now, without what is open."""
        return _state(self, dimension)[1]

    def reserve(self, cost: Cost, *, now: float, variance: float = 0.0, sure: bool = False) -> Reservation | None:
        """Take *cost* in all dimensions, or nothing and return None; if *sure*, only what is free already.

        Output is a guess of what comes, with its *variance*, so it never asks for more than the limit: a long answer
        waits for an empty window instead of for ever.
        """
        if now >= self._due:
            self.expire(now)
        # A dimension that is overdrawn keeps out only those who need more of it.
        limit = self.request_limit
        if limit is not None and (need := cost.requests) > limit - self.requests_used and need > 0:
            return None
        limit = self.input_limit
        if limit is not None and (need := cost.input_tokens) > limit - self.input_used and need > 0:
            return None
        mean = cost.output_tokens
        limit = self.output_limit
        if limit is not None:
            if mean > limit:
                mean = limit
            if mean > 0:
                free = limit - self.output_used
                spread = self.open_variance + variance
                need = self.open_output + mean + (int(self.z * sqrt(spread)) if spread > 0.0 else 0)
                if need > free and (sure or not self._has_room(free, limit, mean, variance, now)):
                    return None
        limit = self.token_limit
        if limit is not None:
            free = limit - self.tokens_used
            if not self.output_counts:
                if (need := cost.tokens) > free and need > 0:
                    return None
            elif (need := cost.tokens + mean) > 0:
                if need > limit:
                    # As above: the guess must not keep out what the prompt does not.
                    mean = max(0, limit - cost.tokens)
                if not self._has_room(free - cost.tokens, limit - cost.tokens, mean, variance, now, combined=True):
                    return None
        entry = self._append(now, cost.requests, cost.input_tokens, cost.tokens, 1) if self._bounded else _UNCOUNTED
        self.open_count += 1
        self.open_output += mean
        self.open_variance += variance
        return Reservation(self, entry, cost.requests, cost.input_tokens, cost.tokens, mean, variance)

    def _has_room(
        self, free: int, limit: int, mean: int, variance: float, now: float, *, combined: bool = False
    ) -> bool:
        """Whether what is open and *mean* more fit into *free*, or into what will be free when it is produced."""
        if free < 0:
            return False
        need = self.open_output + mean
        spread = self.open_variance + variance
        if spread > 0.0:
            need += int(self.z * sqrt(spread))
        if need <= free:
            return True
        if not self.open_output and min(need, limit) <= free:
            return True
        unseen = self.speed * self.producing * (now - self.seen_at + ARRIVING)
        if not self.speed or free <= unseen + KEPT_FREE * limit:
            # What streams have produced since somebody looked may have used it up.
            return False
        then = now + self.lead + mean / self.speed
        free += int(limit * OVERBOOKED)
        if need <= free:
            return True
        for log in (self._log, self._produced, self._foreign) if combined else (self._produced, self._foreign):
            for entry in log:
                if entry.expiry > then:
                    break
                free += entry.tokens if combined else entry.output_tokens
                if need <= free:
                    return True
        return False

    def too_large(self, cost: Cost) -> tuple[str, int, int] | None:
        """The dimension, need and limit that keep *cost* out for ever, or None if an empty window could hold it."""
        for name, need, limit in (
            ("requests", cost.requests, self.request_limit),
            ("input_tokens", cost.input_tokens, self.input_limit),
            ("tokens", cost.tokens, self.token_limit),
        ):
            if limit is not None and need > limit:
                return name, need, limit
        return None

    def next_expiry(self, now: float) -> float | None:
        """The instant at which the oldest entry goes, None when nothing is going to."""
        self.expire(now)
        return self._due if self._due < inf else None

    def expire(self, now: float) -> None:
        """Let go of what is older than the window. Each entry is popped once a window, so this is O(1) amortised."""
        log = self._log
        while log and log[0].expiry <= now:
            entry = log.popleft()
            if entry.held:
                # It waits for its connection to this moment, and will be counted a window from its departure.
                # After what was sent under a longer guard: the order is kept.
                entry.expiry = max(now + self.span, log[-1].expiry if log else -inf)
                log.append(entry)
                continue
            if entry.expiry == GONE:
                self._withdrawn -= 1
            self.requests_used -= entry.requests
            self.input_used -= entry.input_tokens
            self.tokens_used -= entry.tokens
        due = log[0].expiry if log else inf
        if log := self._produced:
            while log and log[0].expiry <= now:
                entry = log.popleft()
                self.output_used -= entry.output_tokens
                self.tokens_used -= entry.tokens
            if log and log[0].expiry < due:
                due = log[0].expiry
        if log := self._foreign:
            while log and log[0].expiry <= now:
                self._count_foreign(log.popleft(), -1)
            if log and log[0].expiry < due:
                due = log[0].expiry
        if tails := self._tails:
            while tails and tails[0][0] <= now:
                _, mean, variance = heappop(tails)
                self._close(mean, variance)
            if tails and tails[0][0] < due:
                due = tails[0][0]
        self._due = due

    def add_foreign(self, dimension: Dimension, change: int, *, now: float) -> None:
        """Others turn out to have used *change* more of *dimension* (less, if negative) than was known.

        More is taken to have been used evenly over the last window, and goes over the next; less is taken off
        everything that was known of, as far as it goes.
        """
        self.expire(now)
        log = self._foreign
        known: int = getattr(self.foreign, dimension)
        if change < 0 < known:
            keep = max(0, known + change)
            seen = 0
            for entry in log:
                # By running totals, so that roundings do not add up.
                before, seen = seen, seen + getattr(entry, dimension)
                amount = seen * keep // known - before * keep // known
                self._count_foreign(entry, -1)
                setattr(entry, dimension, amount)
                self._count_foreign(entry, 1)
        elif change > 0:
            # Of the window and not of the span: when the guard changes, what is in the log stays in its slots.
            step = self._window / FOREIGN_STEPS
            # Like everything else it counts a guard longer, and half a step, for what rounding to steps may gain.
            first = int((now + self.guard) / step + 0.5) + 1
            slots = {round(entry.expiry / step): entry for entry in log}
            for number in range(FOREIGN_STEPS):
                amount = change * (number + 1) // FOREIGN_STEPS - change * number // FOREIGN_STEPS
                if amount:
                    entry = slots.setdefault(first + number, Entry((first + number) * step))
                    self._count_foreign(entry, -1)
                    setattr(entry, dimension, getattr(entry, dimension) + amount)
                    self._count_foreign(entry, 1)
            self._foreign = deque(sorted(slots.values(), key=_EXPIRY))
            self._due = min(self._due, self._foreign[0].expiry)

    def _count_foreign(self, entry: Entry, sign: int) -> None:
        foreign = self.foreign
        foreign.requests += sign * entry.requests
        foreign.input_tokens += sign * entry.input_tokens
        foreign.output_tokens += sign * entry.output_tokens
        foreign.tokens += sign * entry.tokens
        self.requests_used += sign * entry.requests
        self.input_used += sign * entry.input_tokens
        self.output_used += sign * entry.output_tokens
        self.tokens_used += sign * entry.tokens

    def recent(self, since: float) -> tuple[int, int, int, int]:
        """What has been sent, or produced, after the instant *since*, by :data:`DIMENSIONS`."""
        requests = input_tokens = output_tokens = tokens = 0
        expiry = since + self.span
        for entry in reversed(self._log):
            if GONE < entry.expiry <= expiry:
                break
            requests += entry.requests
            input_tokens += entry.input_tokens
            tokens += entry.tokens
        for entry in reversed(self._produced):
            # These count no guard.
            if entry.expiry <= since + self._window:
                break
            output_tokens += entry.output_tokens
            tokens += entry.tokens
        return requests, input_tokens, output_tokens, tokens

    def leaves_room(self, head: Cost, cost: Cost, *, now: float) -> bool:
        """Whether *head*, which must wait, could go just as soon if *cost* went before it."""
        wait = _alone(self, head, now)
        if wait == inf:
            return True
        then = now + wait
        for dimension, of_head, of_cost in zip(DIMENSIONS, _asked(self, head), _asked(self, cost), strict=True):
            limit, used = _state(self, dimension)
            if limit is None or not of_cost:
                continue
            back = sum(amount for expiry, amount in _returns(self, dimension, 0) if expiry <= then)
            if of_cost > limit - used + back - of_head:
                return False
        return True

    def successor(self, now: float) -> Ledger:
        """The same logs in another ledger, when nobody is left to settle what is open here: that counts as spent."""
        self.expire(now)
        ledger = Ledger(
            requests=self.request_limit,
            input_tokens=self.input_limit,
            output_tokens=self.output_limit,
            tokens=self.token_limit,
            window=self._window,
            guard=self.guard,
            grain=self._grain,
            output_grain=self._output_grain,
            output_counts=self.output_counts,
            z=self.z,
        )
        ledger._slack = self._slack
        ledger._log = deque(replace(entry, held=0) for entry in self._log if entry.expiry != GONE)
        ledger._produced = deque(map(replace, self._produced))
        ledger._foreign, ledger.foreign = deque(map(replace, self._foreign)), replace(self.foreign)
        ledger.requests_used, ledger.input_used = self.requests_used, self.input_used
        ledger.output_used, ledger.tokens_used = self.output_used, self.tokens_used
        ledger._due = self._due
        if self.open_output:
            ledger._produce(now, self.open_output)
        return ledger

    def _append(self, now: float, requests: int, input_tokens: int, tokens: int, held: int) -> Entry:
        log = self._log
        expiry = now + self.span
        if log:
            last = log[-1]
            if last.expiry > expiry:
                # The guard has been made shorter since: the order is kept.
                expiry = last.expiry
            if now < self._grain_ends:
                last.expiry = expiry
                last.requests += requests
                last.input_tokens += input_tokens
                last.tokens += tokens
                last.held += held
                self.requests_used += requests
                self.input_used += input_tokens
                self.tokens_used += tokens
                return last
        if self._grain:
            self._grain_ends = now + self._grain
        entry = Entry(expiry, requests, input_tokens, 0, tokens, held)
        log.append(entry)
        if expiry < self._due:
            self._due = expiry
        self.requests_used += requests
        self.input_used += input_tokens
        self.tokens_used += tokens
        return entry

    def _produce(self, now: float, amount: int) -> None:
        if not self._counts_output:
            # Nobody asks for it, and its expiry would wake people for nothing.
            return
        log = self._produced
        # No guard: a vendor has counted what we see before we see it.
        expiry = now + self._window
        combined = amount if self.output_counts else 0
        self.output_used += amount
        self.tokens_used += combined
        if log:
            last = log[-1]
            if now < self._output_grain_ends:
                last.expiry = expiry
                last.output_tokens += amount
                last.tokens += combined
                return
        self._output_grain_ends = now + self._output_grain
        log.append(Entry(expiry, 0, 0, amount, combined))
        if expiry < self._due:
            self._due = expiry

    def _close(self, mean: int, variance: float) -> None:
        """What was open is so no more."""
        self.open_count -= 1
        if self.open_count:
            self.open_output -= mean
            self.open_variance -= variance
        else:
            self.open_output, self.open_variance = 0, 0.0

    def _amend(self, entry: Entry, requests: int, input_tokens: int, tokens: int) -> None:
        """Change an entry that still counts by so much."""
        entry.requests += requests
        entry.input_tokens += input_tokens
        entry.tokens += tokens
        self.requests_used += requests
        self.input_used += input_tokens
        self.tokens_used += tokens
        if not (entry.requests or entry.input_tokens or entry.tokens or entry.held):
            self._withdraw(entry)

    def _withdraw(self, entry: Entry) -> None:
        """Drop an entry that holds nothing: refunds must not make the log longer than the limits would."""
        log = self._log
        entry.expiry = GONE
        if log[-1] is entry:
            log.pop()
            self._grain_ends = -inf
            return
        if log[0] is entry:
            self._due = -inf
        self._withdrawn += 1
        if self._withdrawn > MIN_COMPACT and self._withdrawn * 2 > len(log):
            self._log = deque(other for other in log if other.expiry != GONE)
            self._withdrawn = 0


_EXPIRY = attrgetter("expiry")
_UNCOUNTED = Entry(GONE)
"""Of reservations where nothing is limited."""


class Reservation(msgspec.Struct, gc=False):
    """What one attempt holds of a ledger, until it is settled."""

    ledger: Ledger
    entry: Entry
    requests: int
    input_tokens: int
    tokens: int
    mean: int
    """Output tokens that are still to come, probably."""
    variance: float
    output: int = 0
    """Output tokens that have come, and are in the log."""
    left: bool = False
    settled: bool = False
    also: Reservation | None = None
    """What the same attempt holds of another window, which lives and ends with this one."""

    def sent(self, now: float) -> None:
        """The request leaves only now (it had to wait for its connection): its window starts now."""
        if self.settled:
            return
        ledger, entry = self.ledger, self.entry
        if entry is not _UNCOUNTED:
            if not self.left:
                entry.held -= 1
            if entry.expiry + ledger._slack < now + ledger.span:
                ledger.expire(now)
                if self.entry.expiry > now:
                    ledger._amend(entry, -self.requests, -self.input_tokens, -self.tokens)
                self.entry = ledger._append(now, self.requests, self.input_tokens, self.tokens, 0)
        self.left = True
        if self.also is not None:
            self.also.sent(now)

    def correct(self, *, input_tokens: int, tokens: int, now: float) -> None:
        """The vendor has counted the prompt: this is what it takes."""
        ledger, entry = self.ledger, self.entry
        if self.settled:
            return
        # As in a settlement: a figure below nothing would be capacity that does not exist.
        input_tokens, tokens = max(0, input_tokens), max(0, tokens)
        if now >= ledger._due:
            # What is held by others beyond its time still counts, and is to be corrected.
            ledger.expire(now)
        if entry.expiry > now:
            ledger._amend(entry, 0, input_tokens - self.input_tokens, tokens - self.tokens)
        self.input_tokens, self.tokens = input_tokens, tokens
        if self.also is not None:
            self.also.correct(input_tokens=input_tokens, tokens=tokens, now=now)

    def produced(self, total: int, *, mean: int, variance: float, now: float) -> None:
        """*total* output tokens have come so far; of those still to come, *mean* and *variance*."""
        if self.settled:
            return
        ledger = self.ledger
        if total > self.output:
            ledger._produce(now, total - self.output)
            self.output = total
        ledger.open_output += mean - self.mean
        ledger.open_variance += variance - self.variance
        self.mean, self.variance = mean, variance
        if self.also is not None:
            self.also.produced(total, mean=mean, variance=variance, now=now)

    def postpone(self, arrived: float, *, now: float) -> None:
        """The request may have arrived only at the instant *arrived*: it counts a window from then."""
        if self.also is not None:
            self.also.postpone(arrived, now=now)
        ledger, entry = self.ledger, self.entry
        expiry = arrived + ledger._window
        if self.settled or not self.left or not now < entry.expiry < expiry:
            return
        log = ledger._log
        # Late ones are near the end: from there, the first that is late enough takes it in.
        place = len(log)
        while place and log[place - 1].expiry >= expiry:
            place -= 1
        ledger._amend(entry, -self.requests, -self.input_tokens, -self.tokens)
        if place < len(log):
            self.entry = log[place]
            ledger._amend(self.entry, self.requests, self.input_tokens, self.tokens)
        else:
            self.entry = ledger._append(now, self.requests, self.input_tokens, self.tokens, 0)

    def settle(self, actual: Cost, *, now: float, until: float | None = None) -> None:
        """Replace what was reserved by what was used. Idempotent: only the first settlement counts.

        *until*: an answer that was given up may be produced further; what is open of it stays so until that instant.
        """
        if self.settled:
            return
        if not self.left and (actual.requests > 0 or actual.input_tokens > 0):
            # Nobody said when it left; now is the latest that it can have been.
            self.sent(now)
        self.settled = True
        ledger, entry = self.ledger, self.entry
        if now >= ledger._due:
            ledger.expire(now)
        if not self.left and entry is not _UNCOUNTED:
            entry.held -= 1
        if entry.expiry > now:
            # A vendor's figures are not always figures: what is below nothing would be capacity that does not exist.
            requests, input_tokens, tokens = actual.requests, actual.input_tokens, actual.tokens
            if requests == self.requests > 0 and input_tokens >= 0 and tokens >= 0:
                # As almost always: a request that was sent is one.
                if input_tokens != self.input_tokens:
                    entry.input_tokens += input_tokens - self.input_tokens
                    ledger.input_used += input_tokens - self.input_tokens
                if tokens != self.tokens:
                    entry.tokens += tokens - self.tokens
                    ledger.tokens_used += tokens - self.tokens
            else:
                ledger._amend(
                    entry,
                    (requests if requests > 0 else 0) - self.requests,
                    (input_tokens if input_tokens > 0 else 0) - self.input_tokens,
                    (tokens if tokens > 0 else 0) - self.tokens,
                )
        output = actual.output_tokens - self.output
        if output > 0:
            ledger._produce(now, output)
        if until is not None and until > now:
            heappush(ledger._tails, (until, self.mean, self.variance))
            ledger._due = min(ledger._due, until)
        else:
            ledger._close(self.mean, self.variance)
        if self.also is not None:
            self.also.settle(actual, now=now, until=until)


def time_until(ledgers: Sequence[Ledger], cost: Cost, ahead: Cost = NOTHING, *, now: float) -> float:
    """Seconds until one of *ledgers* can admit *cost*, after a queue that needs *ahead* of them all, at the earliest.

    Exact for a call that nobody is ahead of and an estimate from below for all others, so what it calls impossible is
    impossible. It can only be beaten by what gives back more than a window does: open output counts as free, and
    requests and input as used until they expire. Infinite if no ledger could ever take *cost*.
    """
    for ledger in ledgers:
        ledger.expire(now)
    seconds = min((_alone(ledger, cost, now, looking_ahead=ledger.speed) for ledger in ledgers), default=inf)
    if ahead.requests or ahead.input_tokens or ahead.output_tokens or ahead.tokens:
        pooled = (
            _together(ledgers, "requests", cost.requests + ahead.requests, now),
            _together(ledgers, "input_tokens", cost.input_tokens + ahead.input_tokens, now),
            _together(ledgers, "output_tokens", ahead.output_tokens, now),
            _together(ledgers, "tokens", cost.tokens + ahead.tokens, now),
        )
        seconds = max(seconds, *pooled)
    return seconds


def _alone(ledger: Ledger, cost: Cost, now: float, *, looking_ahead: float = 0.0) -> float:
    """*looking_ahead* is the speed, in tokens a second, with which it is reckoned when output will be produced."""
    if ledger.too_large(cost):
        return inf
    asked = _asked(ledger, cost)
    seconds = 0.0
    for dimension, need in zip(DIMENSIONS, asked, strict=True):
        wait = _together((ledger,), dimension, need, now)
        if wait > seconds and looking_ahead and dimension in _PRODUCED:
            # More than what is kept free has to be so now, beside what is paid at once; the rest when it is produced.
            paid = cost.tokens if dimension == "tokens" else 0
            left = (ledger.limit(dimension) or 0) - paid
            promised = need - int(left * OVERBOOKED)
            ahead = ledger.lead + asked[2] / looking_ahead
            parts = (paid + int(left * KEPT_FREE) + 1, promised)
            some, most = (_together((ledger,), dimension, part, now) for part in parts)
            wait = min(wait, max(some, most - ahead))
        seconds = max(seconds, wait)
    return seconds


_PRODUCED: tuple[Dimension, ...] = ("output_tokens", "tokens")


def _asked(ledger: Ledger, cost: Cost) -> tuple[int, int, int, int]:
    """What has to be free for *cost*, by :data:`DIMENSIONS`: a guess of output asks for no more than there can be."""
    output, tokens = cost.output_tokens, cost.tokens
    if ledger.output_limit is not None:
        output = min(output, ledger.output_limit)
    if ledger.output_counts and ledger.token_limit is not None:
        tokens = max(tokens, min(tokens + output, ledger.token_limit))
    return cost.requests, cost.input_tokens, output, tokens


def _together(ledgers: Sequence[Ledger], dimension: Dimension, need: int, now: float) -> float:
    """Seconds until *ledgers* have together taken *need* of one dimension, if each takes what it can at once."""
    total = free = 0
    debts = []
    for ledger in ledgers:
        limit, used = _state(ledger, dimension)
        if limit is None:
            return 0.0
        total += limit
        free += max(0, limit - used)
        debts.append(max(0, used - limit))
    if need <= free:
        return 0.0
    if total == 0:
        return inf
    # Whole windows first: in each, everything that was admitted goes, and as much can be admitted again.
    windows, rest = divmod(need - 1, total)
    spans = [ledger._window if dimension == "output_tokens" else ledger.span for ledger in ledgers]
    shortest = min(spans)
    seconds = windows * shortest
    rest += 1 - free
    if rest > 0:
        if len(ledgers) == 1:
            # What pays the debt comes back first, and counts for nobody.
            expiry = _given_back(ledgers[0], dimension, rest + debts[0])
            if expiry is not None:
                seconds += expiry - now
        else:
            # Each in its order: sorting merges them in a quarter of the time that heapq takes.
            returns: list[tuple[float, int]] = []
            for ledger, debt in zip(ledgers, debts, strict=True):
                returns.extend(_returns(ledger, dimension, debt))
            returns.sort()
            for expiry, amount in returns:
                rest -= amount
                if rest <= 0:
                    seconds += expiry - now
                    break
    if any(span != shortest for span in spans):
        # Of windows of several lengths the shortest come round more often than this has counted; but never does more
        # come back than each ledger's limit a window.
        rate = sum((_state(ledger, dimension)[0] or 0) / span for ledger, span in zip(ledgers, spans, strict=True))
        seconds = max(min(seconds, (windows + 1) * shortest), (need - total) / rate)
    return seconds


def _state(ledger: Ledger, dimension: Dimension) -> tuple[int | None, int]:
    if dimension == "requests":
        return ledger.request_limit, ledger.requests_used
    if dimension == "input_tokens":
        return ledger.input_limit, ledger.input_used
    if dimension == "output_tokens":
        return ledger.output_limit, ledger.output_used
    return ledger.token_limit, ledger.tokens_used


def _entries(ledger: Ledger, dimension: Dimension) -> Iterable[Entry]:
    """Whatever holds some of *dimension*, in the order in which it goes."""
    logs: list[deque[Entry]] = [] if dimension == "output_tokens" else [ledger._log]
    if dimension == "output_tokens" or (dimension == "tokens" and ledger.output_counts):
        logs.append(ledger._produced)
    if ledger._foreign:
        logs.append(ledger._foreign)
    return logs[0] if len(logs) == 1 else merge(*logs, key=_EXPIRY)


def _given_back(ledger: Ledger, dimension: Dimension, amount: int) -> float | None:
    """The instant at which *amount* of what is used has expired; None if less is used."""
    entries = _entries(ledger, dimension)
    # A log has hundreds of entries, and an attribute that is written out is read in half the time of a named one.
    if dimension == "requests":
        for entry in entries:
            amount -= entry.requests
            if amount <= 0:
                return entry.expiry
    elif dimension == "input_tokens":
        for entry in entries:
            amount -= entry.input_tokens
            if amount <= 0:
                return entry.expiry
    else:
        amount_of = attrgetter(dimension)
        for entry in entries:
            amount -= amount_of(entry)
            if amount <= 0:
                return entry.expiry
    return None


def _returns(ledger: Ledger, dimension: Dimension, debt: int) -> Iterable[tuple[float, int]]:
    """When how much of a dimension comes back, after the *debt* by which the ledger is over its limit."""
    entries = _entries(ledger, dimension)
    if not debt:
        entries = tuple(entries)
        return zip(map(_EXPIRY, entries), map(attrgetter(dimension), entries), strict=True)
    found = []
    for entry in entries:
        amount: int = getattr(entry, dimension)
        if amount:
            paid = min(amount, debt)
            debt -= paid
            found.append((entry.expiry, amount - paid))
    return found
