"""An exact sliding window over several dimensions at once: requests, input tokens and output tokens of one key.

Theory of operation. A vendor counts what it received in the last *window* seconds. We count what we sent, in a log of
entries that each expire one window (and a *guard*, because a request is counted when it arrives and not when it
leaves) after it was sent. As long as the sums over the log stay within the limits, no window at any offset can hold
more than the limit; and a token bucket of the same size, refilled continuously, is satisfied as well.

A reservation takes all three dimensions or nothing. Its life:

    reserve ──► sent ──► settle(actual)
       └───────────────► settle(nothing)          the request never left

Requests and input are in the log from the start, stamped again when the request really leaves; as long as it has not
left, its entry does not expire. Output is *open* until the answer's end: it has no expiry, since nobody knows how long
the answer takes; when it is settled, what was really produced enters the log with the time of the settlement.

The machine does no I/O and reads no clock: it is told the time, which must not run backwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from heapq import merge
from math import inf
from typing import Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from ..core.types import Cost

Dimension: TypeAlias = Literal["requests", "input_tokens", "output_tokens"]

NOTHING = Cost(requests=0)

STAMP_SLACK = 0.01
"""Seconds between permit and departure that are left to the guard instead of being stamped again."""
MIN_COMPACT = 64
"""Withdrawn entries that may lie in the middle of the log before they are swept out."""
GONE = -inf
"""The expiry of an entry that was withdrawn."""


class Entry(msgspec.Struct, gc=False):
    """What leaves the sums together, at *expiry*, once it has *left*.

    A full window holds thousands of these; the collector need not look at what holds only numbers.
    """

    expiry: float
    requests: int
    input_tokens: int
    output_tokens: int
    left: bool


class Ledger:
    """The log of one key and its running sums. A limit of None does not bind."""

    __slots__ = (
        "_log",
        "_slack",
        "_withdrawn",
        "input_limit",
        "input_used",
        "open_output",
        "output_limit",
        "output_used",
        "request_limit",
        "requests_used",
        "span",
    )

    def __init__(
        self,
        *,
        requests: int | None = None,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        window: float = 60.0,
        guard: float = 0.25,
    ) -> None:
        self.request_limit = requests
        self.input_limit = input_tokens
        self.output_limit = output_tokens
        self.span = window + guard
        """Seconds for which an entry counts."""
        self._slack = max(0.0, min(STAMP_SLACK, guard))
        self._log: deque[Entry] = deque()
        self._withdrawn = 0
        self.requests_used = 0
        self.input_used = 0
        self.output_used = 0
        self.open_output = 0
        """Output tokens that are reserved for answers still to come."""

    def __repr__(self) -> str:
        def of(used: int, limit: int | None) -> str:
            return f"{used}/{limit}" if limit is not None else f"{used}"

        return (
            f"<Ledger requests {of(self.requests_used, self.request_limit)}, "
            f"input {of(self.input_used, self.input_limit)}, "
            f"output {of(self.output_used, self.output_limit)} + {self.open_output} open>"
        )

    @property
    def bounded(self) -> bool:
        """Whether there is any limit to keep."""
        return not (self.request_limit is None and self.input_limit is None and self.output_limit is None)

    def reserve(self, cost: Cost, *, now: float) -> Reservation | None:
        """Take *cost* in all dimensions, or nothing and return None.

        Output is a guess of what comes, so it never asks for more than the limit: a long answer waits for an empty
        window instead of for ever.
        """
        self.expire(now)
        # A dimension that is overdrawn keeps out only those who need more of it.
        limit = self.request_limit
        if limit is not None and cost.requests > max(0, limit - self.requests_used):
            return None
        limit = self.input_limit
        if limit is not None and cost.input_tokens > max(0, limit - self.input_used):
            return None
        limit = self.output_limit
        output = cost.output_tokens
        if limit is not None:
            output = min(output, limit)
            if output > max(0, limit - self.output_used - self.open_output):
                return None
        entry = self._append(now, cost.requests, cost.input_tokens, 0, left=False)
        self.open_output += output
        return Reservation(self, entry, output)

    def too_large(self, cost: Cost) -> tuple[str, int, int] | None:
        """The dimension, need and limit that keep *cost* out for ever, or None if an empty window could hold it."""
        for name, need, limit in (
            ("requests", cost.requests, self.request_limit),
            ("input_tokens", cost.input_tokens, self.input_limit),
        ):
            if limit is not None and need > limit:
                return name, need, limit
        return None

    def next_expiry(self, now: float) -> float | None:
        """The instant at which the oldest entry goes, None when the log is empty."""
        self.expire(now)
        return self._log[0].expiry if self._log else None

    def expire(self, now: float) -> None:
        """Let go of what is older than the window. Each entry is popped once a window, so this is O(1) amortised."""
        log = self._log
        while log and log[0].expiry <= now:
            entry = log.popleft()
            if not entry.left:
                # It waits for its connection to this moment, and will be counted a window from its departure.
                entry.expiry = now + self.span
                log.append(entry)
                continue
            if entry.expiry == GONE:
                self._withdrawn -= 1
            self.requests_used -= entry.requests
            self.input_used -= entry.input_tokens
            self.output_used -= entry.output_tokens

    def successor(self, now: float) -> Ledger:
        """The same log in another ledger, when nobody is left to settle what is open here: that counts as spent."""
        self.expire(now)
        ledger = Ledger(
            requests=self.request_limit,
            input_tokens=self.input_limit,
            output_tokens=self.output_limit,
            window=self.span,
            guard=0.0,
        )
        ledger._slack = self._slack
        for entry in self._log:
            if entry.expiry != GONE:
                ledger._log.append(replace(entry, left=True))
        ledger.requests_used, ledger.input_used, ledger.output_used = (
            self.requests_used,
            self.input_used,
            self.output_used,
        )
        if self.open_output:
            ledger._append(now, 0, 0, self.open_output, left=True)
        return ledger

    def _append(self, now: float, requests: int, input_tokens: int, output_tokens: int, *, left: bool) -> Entry:
        entry = Entry(now + self.span, requests, input_tokens, output_tokens, left)
        if self.bounded:
            self._log.append(entry)
            self.requests_used += requests
            self.input_used += input_tokens
            self.output_used += output_tokens
        return entry

    def _amend(self, entry: Entry, requests: int, input_tokens: int, now: float) -> None:
        """Correct an entry in place; one that has expired no longer counts and stays as it is."""
        if self.bounded and entry.expiry > now:
            self.requests_used += requests - entry.requests
            self.input_used += input_tokens - entry.input_tokens
            entry.requests = requests
            entry.input_tokens = input_tokens
            if not requests and not input_tokens:
                self._withdraw(entry)

    def _withdraw(self, entry: Entry) -> None:
        """Drop an entry that holds nothing: refunds must not make the log longer than the limits would."""
        log = self._log
        entry.left = True
        entry.expiry = GONE
        if log[-1] is entry:
            log.pop()
            return
        self._withdrawn += 1
        if self._withdrawn > MIN_COMPACT and self._withdrawn * 2 > len(log):
            self._log = deque(other for other in log if other.expiry != GONE)
            self._withdrawn = 0


class Reservation:
    """What one attempt holds of a ledger, until it is settled."""

    __slots__ = ("_entry", "_ledger", "_output", "settled")

    def __init__(self, ledger: Ledger, entry: Entry, output: int) -> None:
        self._ledger = ledger
        self._entry = entry
        self._output = output
        self.settled = False

    def sent(self, now: float) -> None:
        """The request leaves only now (it had to wait for its connection): its window starts now."""
        if self.settled:
            return
        ledger, entry = self._ledger, self._entry
        if entry.expiry + ledger._slack < now + ledger.span:
            requests, input_tokens = entry.requests, entry.input_tokens
            ledger.expire(now)
            ledger._amend(entry, 0, 0, now)
            self._entry = entry = ledger._append(now, requests, input_tokens, 0, left=True)
        entry.left = True

    def settle(self, actual: Cost, *, now: float) -> None:
        """Replace what was reserved by what was used. Idempotent: only the first settlement counts."""
        if self.settled:
            return
        if not self._entry.left and (actual.requests > 0 or actual.input_tokens > 0):
            # Nobody said when it left; now is the latest that it can have been.
            self.sent(now)
        self.settled = True
        ledger = self._ledger
        ledger.expire(now)
        self._entry.left = True
        # A vendor's figures are not always figures: what is below nothing would be capacity that does not exist.
        ledger._amend(self._entry, max(0, actual.requests), max(0, actual.input_tokens), now)
        ledger.open_output -= self._output
        if actual.output_tokens > 0:
            ledger._append(now, 0, 0, actual.output_tokens, left=True)


def time_until(ledgers: Sequence[Ledger], cost: Cost, ahead: Cost = NOTHING, *, now: float) -> float:
    """Seconds until one of *ledgers* can admit *cost*, after a queue that needs *ahead* of them all, at the earliest.

    Exact for a call that nobody is ahead of and an estimate from below for all others, so what it calls impossible is
    impossible. It can only be beaten by what gives back more than a window does: open output counts as free, and
    requests and input as used until they expire. Infinite if no ledger could ever take *cost*.
    """
    for ledger in ledgers:
        ledger.expire(now)
    seconds = min((_alone(ledger, cost, now) for ledger in ledgers), default=inf)
    if ahead.requests or ahead.input_tokens or ahead.output_tokens:
        pooled = (
            _together(ledgers, "requests", cost.requests + ahead.requests, now),
            _together(ledgers, "input_tokens", cost.input_tokens + ahead.input_tokens, now),
            _together(ledgers, "output_tokens", ahead.output_tokens, now),
        )
        seconds = max(seconds, *pooled)
    return seconds


def _alone(ledger: Ledger, cost: Cost, now: float) -> float:
    if ledger.too_large(cost):
        return inf
    output = cost.output_tokens if ledger.output_limit is None else min(cost.output_tokens, ledger.output_limit)
    return max(
        _together((ledger,), "requests", cost.requests, now),
        _together((ledger,), "input_tokens", cost.input_tokens, now),
        _together((ledger,), "output_tokens", output, now),
    )


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
    shortest = min(ledger.span for ledger in ledgers)
    seconds = windows * shortest
    rest += 1 - free
    if rest > 0:
        for expiry, amount in merge(*map(_returns, ledgers, (dimension,) * len(debts), debts)):
            rest -= amount
            if rest <= 0:
                seconds += expiry - now
                break
    if any(ledger.span != shortest for ledger in ledgers):
        # Of windows of several lengths the shortest come round more often than this has counted; but never does more
        # come back than each ledger's limit a window.
        rate = sum((_state(ledger, dimension)[0] or 0) / ledger.span for ledger in ledgers)
        seconds = max(min(seconds, (windows + 1) * shortest), (need - total) / rate)
    return seconds


def _state(ledger: Ledger, dimension: Dimension) -> tuple[int | None, int]:
    if dimension == "requests":
        return ledger.request_limit, ledger.requests_used
    if dimension == "input_tokens":
        return ledger.input_limit, ledger.input_used
    return ledger.output_limit, ledger.output_used


def _returns(ledger: Ledger, dimension: Dimension, debt: int) -> Iterator[tuple[float, int]]:
    """When how much of a dimension comes back, after the *debt* by which the ledger is over its limit."""
    for entry in ledger._log:
        amount: int = getattr(entry, dimension)
        if amount:
            paid = min(amount, debt)
            debt -= paid
            yield entry.expiry, amount - paid
