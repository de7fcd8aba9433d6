"""Vendors' admission, four ways, and the network before it: what ``bench/quota.py`` lets the client run against.

Nothing of the package is imported here: what judges must not share a line with what is judged. A server is told the
time, which must not run backwards, and answers at once. Four kinds are known:

* ``strict``       a sliding window: no 60 seconds, at any offset, may hold more than the limit;
* ``bucket``       a bucket as large as the limit, refilled continuously by a sixtieth of it a second;
* ``burst``        the same refill into a bucket of five seconds' worth;
* ``reserve_max``  a sliding window over requests and tokens, where a request holds the larger of ``max_tokens`` and
  its estimate from its arrival on, whatever it then uses, and where refused requests count (OpenAI's documentation).

In the first three, input counts from the arrival by the server's estimate and is corrected when the answer begins;
output counts as it is produced, and refuses newcomers only once the limit is reached (Anthropic's documentation).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import inf
from random import Random
from typing import Literal, NamedTuple, Protocol, TypeAlias

WINDOW = 60.0
BURST_SECONDS = 5.0
ROUNDING = 1e-6
"""Of a token: whoever comes back after exactly the seconds that were named is not refused for the sake of a float."""

Kind: TypeAlias = Literal["strict", "bucket", "burst", "reserve_max"]
Dimension: TypeAlias = Literal["requests", "input_tokens", "output_tokens", "tokens"]


class Quota(NamedTuple):
    """What one key may use in a minute; None is no limit. *tokens* are input and output together."""

    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    tokens: int | None = None

    def times(self, factor: float) -> Quota:
        return Quota(*(round(limit * factor) if limit is not None else None for limit in self))


class Refusal(NamedTuple):
    """A 429: the seconds after which the same request would be admitted if nothing else happened, and why it is not."""

    retry_after: float
    dimension: Dimension


class Mark:
    """Something that was counted, so that it can be corrected."""

    __slots__ = ("amount", "at")

    def __init__(self, at: float, amount: float) -> None:
        self.at = at
        self.amount = amount


class Meter(Protocol):
    """One dimension of one key."""

    limit: int

    def wait(self, amount: float, now: float) -> float:
        """Seconds until *amount* would fit: 0.0 now, infinite never."""
        ...

    def add(self, amount: float, now: float) -> Mark:
        """Count *amount*, whether or not it fits."""
        ...

    def amend(self, mark: Mark, amount: float, now: float) -> None:
        """What was counted as *mark* turns out to be *amount*."""
        ...

    def remaining(self, now: float) -> float:
        """What would fit now; less than nothing if more was produced than there was."""
        ...

    def full_in(self, now: float) -> float:
        """Seconds until nothing of what was used counts any more."""
        ...


class SlidingWindow:
    """What was counted at *t* counts until *t* + 60 s, and at that instant no longer."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._log: deque[Mark] = deque()
        self._used = 0.0

    def wait(self, amount: float, now: float) -> float:
        self._expire(now)
        excess = self._used + amount - self.limit
        if excess <= 0:
            return 0.0
        if amount > self.limit:
            return inf
        for mark in self._log:
            excess -= mark.amount
            if excess <= 0:
                return mark.at + WINDOW - now
        raise AssertionError("an amount within the limit fits an empty window")

    def add(self, amount: float, now: float) -> Mark:
        self._expire(now)
        mark = Mark(now, amount)
        self._log.append(mark)
        self._used += amount
        return mark

    def amend(self, mark: Mark, amount: float, now: float) -> None:
        self._expire(now)
        if mark.at + WINDOW > now:
            self._used += amount - mark.amount
            mark.amount = amount

    def remaining(self, now: float) -> float:
        self._expire(now)
        return self.limit - self._used

    def full_in(self, now: float) -> float:
        self._expire(now)
        return self._log[-1].at + WINDOW - now if self._log else 0.0

    def _expire(self, now: float) -> None:
        log = self._log
        while log and log[0].at + WINDOW <= now:
            self._used -= log.popleft().amount


class Bucket:
    """A bucket that holds *seconds* of the limit and is refilled all the time. What is post-paid may overdraw it."""

    def __init__(self, limit: int, seconds: float = WINDOW) -> None:
        self.limit = limit
        self.capacity = limit * seconds / WINDOW
        self._rate = limit / WINDOW
        self._level = self.capacity
        self._at = -inf

    def wait(self, amount: float, now: float) -> float:
        self._refill(now)
        if amount > self.capacity:
            return inf
        missing = amount - self._level
        return 0.0 if missing <= ROUNDING else missing / self._rate

    def add(self, amount: float, now: float) -> Mark:
        self._refill(now)
        self._level -= amount
        return Mark(now, amount)

    def amend(self, mark: Mark, amount: float, now: float) -> None:
        self._refill(now)
        self._level = min(self.capacity, self._level + mark.amount - amount)
        mark.amount = amount

    def remaining(self, now: float) -> float:
        self._refill(now)
        return self._level

    def full_in(self, now: float) -> float:
        self._refill(now)
        return (self.capacity - self._level) / self._rate

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._level = min(self.capacity, self._level + (now - self._at) * self._rate)
            self._at = now


class Server:
    """One key's admission. What it says of itself is true."""

    def __init__(self, kind: Kind, quota: Quota) -> None:
        self.kind = kind
        self.meters: dict[Dimension, Meter] = {}
        for dimension, limit in _limits(quota):
            if kind == "strict" or kind == "reserve_max":
                self.meters[dimension] = SlidingWindow(limit)
            else:
                self.meters[dimension] = Bucket(limit, BURST_SECONDS if kind == "burst" else WINDOW)

    def arrive(self, now: float, *, input_tokens: int, max_tokens: int) -> Admitted | Refusal:
        """A request that the server reckons to have *input_tokens* has arrived: it counts in all dimensions or in none.

        A refused one counts as a request where the kind says so.
        """
        need: dict[Dimension, int] = {
            "requests": 1,
            "input_tokens": input_tokens,
            # Nobody can know what will be produced: it is enough that there is something left.
            "output_tokens": 1,
            "tokens": max(max_tokens, input_tokens),
        }
        wait, dimension = max(
            ((meter.wait(need[dimension], now), dimension) for dimension, meter in self.meters.items()),
            default=(0.0, "requests"),
        )
        if wait > 0.0:
            if self.kind == "reserve_max" and "requests" in self.meters:
                self.meters["requests"].add(1, now)
            return Refusal(wait, dimension)
        marks: dict[Dimension, Mark] = {
            dimension: meter.add(need[dimension], now)
            for dimension, meter in self.meters.items()
            if dimension != "output_tokens"
        }
        return Admitted(self, marks)


class Admitted:
    """A request that was let in."""

    __slots__ = ("_marks", "_server")

    def __init__(self, server: Server, marks: dict[Dimension, Mark]) -> None:
        self._server = server
        self._marks = marks

    def correct(self, now: float, input_tokens: int) -> None:
        """The prompt was read: this is what it really has."""
        mark = self._marks.get("input_tokens")
        if mark is not None:
            self._server.meters["input_tokens"].amend(mark, input_tokens, now)

    def produce(self, now: float, output_tokens: int) -> None:
        """So much has been generated just now."""
        meter = self._server.meters.get("output_tokens")
        if meter is not None and output_tokens:
            meter.add(output_tokens, now)


def _limits(quota: Quota) -> Iterator[tuple[Dimension, int]]:
    for dimension, limit in zip(DIMENSIONS, quota, strict=True):
        if limit is not None:
            yield dimension, limit


DIMENSIONS: tuple[Dimension, ...] = ("requests", "input_tokens", "output_tokens", "tokens")


def one_way(chance: Random, spikes: float) -> float:
    """Seconds that a message is under way: 30 ms and an exponential 20 ms; a share of *spikes* is 0.2 to 1.5 s late."""
    delay = 0.03 + chance.expovariate(50.0)
    if chance.random() < spikes:
        delay += chance.uniform(0.2, 1.5)
    return delay
