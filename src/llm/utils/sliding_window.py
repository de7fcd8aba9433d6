"""An exact sliding window over several dimensions at once: requests, input tokens and output tokens of one key.

Theory of operation. A vendor counts what it received in the last *window* seconds. We count what we sent, in a log of
entries that each expire one window (and a *guard*, because a request is counted when it arrives and not when it
leaves) after it was sent. As long as the sums over the log stay within the limits, no window at any offset can hold
more than the limit; and a token bucket of the same size, refilled continuously, is satisfied as well.

A reservation takes all three dimensions or nothing. Its life:

    reserve ──► sent ──► settle(actual)
       └───────────────► settle(nothing)          the request never left

Requests and input are in the log from the start, stamped again when the request really leaves. Output is *open* until
the answer's end: it has no expiry, since nobody knows how long the answer takes; when it is settled, what was really
produced enters the log with the time of the settlement.

The machine does no I/O and reads no clock: it is told the time, which must not run backwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import merge

from ..core.types import Cost

NOTHING = Cost(requests=0)

STAMP_SLACK = 0.01
"""Seconds between permit and departure that are left to the guard instead of being stamped again."""


class Entry:
    """What leaves the sums together, at *expiry*."""

    __slots__ = ("expiry", "input_tokens", "output_tokens", "requests")

    def __init__(self, expiry: float, requests: int, input_tokens: int, output_tokens: int) -> None:
        self.expiry = expiry
        self.requests = requests
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens


class Ledger:
    """The log of one key and its running sums. A limit of None does not bind."""

    __slots__ = (
        "_log",
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
        self._log: deque[Entry] = deque()
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
        limit = self.request_limit
        if limit is not None and self.requests_used + cost.requests > limit:
            return None
        limit = self.input_limit
        if limit is not None and self.input_used + cost.input_tokens > limit:
            return None
        limit = self.output_limit
        output = cost.output_tokens
        if limit is not None:
            output = min(output, limit)
            if self.output_used + self.open_output + output > limit:
                return None
        entry = self._append(now, cost.requests, cost.input_tokens, 0)
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
        """Let go of what is older than the window. Each entry is popped once, so this is O(1) amortised."""
        log = self._log
        while log and log[0].expiry <= now:
            entry = log.popleft()
            self.requests_used -= entry.requests
            self.input_used -= entry.input_tokens
            self.output_used -= entry.output_tokens

    def _append(self, now: float, requests: int, input_tokens: int, output_tokens: int) -> Entry:
        entry = Entry(now + self.span, requests, input_tokens, output_tokens)
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
        ledger, entry = self._ledger, self._entry
        if self.settled or entry.expiry + STAMP_SLACK >= now + ledger.span:
            return
        requests, input_tokens = entry.requests, entry.input_tokens
        ledger.expire(now)
        ledger._amend(entry, 0, 0, now)
        self._entry = ledger._append(now, requests, input_tokens, 0)

    def settle(self, actual: Cost, *, now: float) -> None:
        """Replace what was reserved by what was used. Idempotent: only the first settlement counts."""
        if self.settled:
            return
        self.settled = True
        ledger = self._ledger
        ledger.expire(now)
        ledger._amend(self._entry, actual.requests, actual.input_tokens, now)
        ledger.open_output -= self._output
        if actual.output_tokens:
            ledger._append(now, 0, 0, actual.output_tokens)


def time_until(ledgers: Sequence[Ledger], need: Cost, *, now: float) -> float:
    """Seconds until *ledgers* together can have admitted *need*, a queue's total, at the earliest.

    Optimistic on purpose: open output may be given back at any time, so it counts as free. What this calls
    impossible is impossible.
    """
    for ledger in ledgers:
        ledger.expire(now)
    return max(
        _until(ledgers, need.requests, [(x.request_limit, x.requests_used) for x in ledgers], "requests", now),
        _until(ledgers, need.input_tokens, [(x.input_limit, x.input_used) for x in ledgers], "input_tokens", now),
        _until(ledgers, need.output_tokens, [(x.output_limit, x.output_used) for x in ledgers], "output_tokens", now),
    )


def _until(
    ledgers: Sequence[Ledger], need: int, state: list[tuple[int | None, int]], dimension: str, now: float
) -> float:
    total = free = 0
    for limit, used in state:
        if limit is None:
            return 0.0
        total += limit
        free += max(0, limit - used)
    if need <= free:
        return 0.0
    # Whole windows first: in each, everything that was admitted goes, and as much can be admitted again.
    windows, rest = divmod(need, total)
    if rest == 0:
        windows, rest = windows - 1, total
    seconds = windows * min(ledger.span for ledger in ledgers)
    rest -= free
    if rest <= 0:
        return seconds
    for entry in merge(*(ledger._log for ledger in ledgers), key=lambda entry: entry.expiry):
        rest -= getattr(entry, dimension)
        if rest <= 0:
            return seconds + max(0.0, entry.expiry - now)
    return seconds
