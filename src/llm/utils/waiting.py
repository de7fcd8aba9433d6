"""A line of callers who wait for the same thing: in order of their tickets, with the sums of what they need.

Those who leave are taken out of the sums at once and out of the containers later: when they come to the head, or when
the line is swept. A waiter holds nothing of its call but words, because containers hold it longer than it waits.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from math import inf
from operator import attrgetter
from typing import Generic, TypeVar

from ..core.types import Cost
from .alarms import Alarm

R = TypeVar("R")
"""What a route is made of."""
O = TypeVar("O")  # noqa: E741  the field's letter
"""What waiting comes to."""


class Waiter(Alarm, Generic[R, O]):
    """One who waits. *outcome* is set before the future is."""

    __slots__ = (
        "alive",
        "arrival",
        "call_id",
        "cost",
        "future",
        "line",
        "model",
        "outcome",
        "provider",
        "since",
        "starved_before",
        "ticket",
    )

    def __init__(
        self,
        line: Line[R, O],
        *,
        call_id: str,
        provider: str,
        model: str | None,
        ticket: int,
        arrival: int,
        cost: Cost,
        since: float,
    ) -> None:
        self.line = line
        self.call_id = call_id
        self.provider = provider
        self.model = model
        self.ticket = ticket
        self.arrival = arrival
        self.cost = cost
        self.since = since
        self.starved_before = line.starved(since)
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.outcome: O | None = None
        self.alive = True

    def ring(self) -> None:
        """It waits long."""
        self.line.report(self)


_TICKET = attrgetter("ticket")


class Line(Generic[R, O]):
    """Those who wait for one route, the oldest ticket first. *report* is told of whoever has waited long."""

    __slots__ = (
        "_alive",
        "_input_tokens",
        "_requests",
        "_starved",
        "arrived",
        "report",
        "route",
        "starved_since",
        "waiters",
    )

    def __init__(self, route: tuple[R, ...], report: Callable[[Waiter[R, O]], None]) -> None:
        self.route = route
        self.report = report
        self.waiters: deque[Waiter[R, O]] = deque()
        """In the order of their tickets."""
        self.arrived: deque[Waiter[R, O]] = deque()
        """In the order in which they came: a renewal comes late with an old ticket."""
        self._alive = self._requests = self._input_tokens = 0
        self._starved = 0.0
        self.starved_since: float | None = None

    def add(self, waiter: Waiter[R, O]) -> None:
        waiters = self.waiters
        if not waiters or waiter.ticket > waiters[-1].ticket:
            waiters.append(waiter)
        else:
            # A renewal: it keeps the place that its ticket gives it.
            insort(waiters, waiter, key=_TICKET)
        self.arrived.append(waiter)
        self._alive += 1
        self._requests += waiter.cost.requests
        self._input_tokens += waiter.cost.input_tokens

    def subtract(self, waiter: Waiter[R, O]) -> None:
        """Of the sums; the waiter itself stays where it is until it is at the head, or swept."""
        self._alive -= 1
        self._requests -= waiter.cost.requests
        self._input_tokens -= waiter.cost.input_tokens
        while self.arrived and not self.arrived[0].alive:
            self.arrived.popleft()

    def sweep(self) -> None:
        self.waiters = deque(waiter for waiter in self.waiters if waiter.alive)
        self.arrived = deque(waiter for waiter in self.arrived if waiter.alive)

    def need_before(self, ticket: int) -> tuple[int, int]:
        """Requests and input tokens of those who are older than *ticket*."""
        if not self.waiters or self.waiters[-1].ticket < ticket:
            return self._requests, self._input_tokens
        older = [waiter.cost for waiter in self.waiters if waiter.alive and waiter.ticket < ticket]
        return sum(cost.requests for cost in older), sum(cost.input_tokens for cost in older)

    def position(self, waiter: Waiter[R, O]) -> int:
        """How many stand before *waiter*."""
        if self._alive < len(self.waiters):
            self.sweep()
        return bisect_left(self.waiters, waiter.ticket, key=_TICKET)

    def starve(self, starving: bool, now: float) -> None:
        """Count the time in which the head is held up by nothing but the lack of a client."""
        if starving and self.starved_since is None:
            self.starved_since = now
        elif not starving and self.starved_since is not None:
            self._starved = self.starved(now)
            self.starved_since = None

    def starved(self, now: float) -> float:
        """Seconds of such time, in all."""
        return self._starved + (now - self.starved_since if self.starved_since is not None else 0.0)

    def patience(self, timeout: float, now: float) -> float:
        """Seconds until somebody has waited *timeout* seconds of such time; infinite while none is passing."""
        if self.starved_since is None or not self.arrived:
            return inf
        return timeout - (self.starved(now) - self.arrived[0].starved_before)
