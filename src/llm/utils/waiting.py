"""Those who wait, by what they wait for and by whose turn it is.

A *route* is what a call waits for: the keys that could take it. On a route there is a *line* for each flow (a tenant at
a priority), in the order of tickets; which line's head goes next is a matter of fairness. Those who leave are taken out
of the sums at once and out of the containers later: when they come to the head, or when the route is swept. A waiter
holds nothing of its call but words and figures, because containers hold it longer than it waits.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from itertools import islice
from math import inf
from operator import attrgetter
from typing import Generic, TypeVar

from ..core.types import Cost
from .alarms import Alarm
from .fairness import Flow

R = TypeVar("R")
"""What a route is made of."""
N = TypeVar("N")
"""What a waiter needs, in the words of whoever grants it."""
O = TypeVar("O")  # noqa: E741  the field's letter
"""What waiting comes to."""

MANY = 64
"""Lines of a route above which only the own one is reckoned with."""


class Waiter(Alarm, Generic[R, N, O]):
    """One who waits. *outcome* is set before the future is."""

    __slots__ = (
        "alive",
        "arrival",
        "blocked_since",
        "call_id",
        "cost",
        "flow",
        "future",
        "model",
        "need",
        "outcome",
        "overtaken",
        "provider",
        "route",
        "since",
        "starved_before",
        "ticket",
    )

    def __init__(
        self,
        route: Route[R, N, O],
        flow: Flow,
        *,
        call_id: str,
        provider: str,
        model: str | None,
        ticket: int,
        arrival: int,
        need: N,
        cost: Cost,
        since: float,
    ) -> None:
        self.route = route
        self.flow = flow
        self.call_id = call_id
        self.provider = provider
        self.model = model
        self.ticket = ticket
        self.arrival = arrival
        self.need = need
        self.cost = cost
        """What it was expected to take when it came."""
        self.since = since
        self.starved_before = route.starved(since)
        self.blocked_since: float | None = None
        """When it stood at the head and could not go."""
        self.overtaken = 0
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.outcome: O | None = None
        self.alive = True

    def ring(self) -> None:
        """It waits long."""
        self.route.report(self)


_TICKET = attrgetter("ticket")


class Line(Generic[R, N, O]):
    """Those of one flow who wait for one route, the oldest ticket first, with the sums of what they need."""

    __slots__ = ("flow", "input_tokens", "requests", "tokens", "waiters")

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.waiters: deque[Waiter[R, N, O]] = deque()
        self.requests = self.input_tokens = self.tokens = 0

    def add(self, waiter: Waiter[R, N, O]) -> None:
        waiters = self.waiters
        if not waiters or waiter.ticket > waiters[-1].ticket:
            waiters.append(waiter)
        else:
            # A renewal: it keeps the place that its ticket gives it.
            insort(waiters, waiter, key=_TICKET)
        self._count(waiter.cost, 1)

    def subtract(self, waiter: Waiter[R, N, O]) -> None:
        """Of the sums; the waiter itself stays where it is until it is at the head, or swept."""
        self._count(waiter.cost, -1)

    def need_before(self, ticket: int) -> Cost:
        """What those take who are older than *ticket*, but for their output: it is a guess and mostly given back."""
        if not self.waiters or self.waiters[-1].ticket < ticket:
            return Cost(self.requests, self.input_tokens, 0, self.tokens)
        older = [waiter.cost for waiter in self.waiters if waiter.alive and waiter.ticket < ticket]
        return Cost(
            sum(cost.requests for cost in older),
            sum(cost.input_tokens for cost in older),
            0,
            sum(cost.tokens for cost in older),
        )

    def _count(self, cost: Cost, sign: int) -> None:
        self.requests += sign * cost.requests
        self.input_tokens += sign * cost.input_tokens
        self.tokens += sign * cost.tokens


class Route(Generic[R, N, O]):
    """Those who wait for the same keys. *report* is told of whoever has waited long."""

    __slots__ = ("_starved", "_turns", "arrived", "keys", "lines", "report", "scarce", "starved_since")

    def __init__(
        self,
        keys: tuple[R, ...],
        report: Callable[[Waiter[R, N, O]], None],
        scarce: frozenset[Hashable] = frozenset(),
    ) -> None:
        self.keys = keys
        self.scarce = scarce
        """What a head of it waits for, and nobody else may take meanwhile."""
        self.report = report
        self.lines: dict[Flow, Line[R, N, O]] = {}
        self._turns: list[tuple[float, float, float, int, int, Line[R, N, O]]] = []
        """A heap of every line with what its turn was when somebody looked: turns only ever become later."""
        self.arrived: deque[Waiter[R, N, O]] = deque()
        """In the order in which they came: a renewal comes late with an old ticket."""
        self._starved = 0.0
        self.starved_since: float | None = None

    def add(self, waiter: Waiter[R, N, O]) -> None:
        line = self.lines.get(waiter.flow)
        if line is None:
            line = self.lines[waiter.flow] = Line(waiter.flow)
            line.add(waiter)
            heappush(self._turns, _turn(line))
        else:
            line.add(waiter)
        self.arrived.append(waiter)

    def subtract(self, waiter: Waiter[R, N, O]) -> None:
        """It waits no more."""
        self.lines[waiter.flow].subtract(waiter)
        while self.arrived and not self.arrived[0].alive:
            self.arrived.popleft()

    def head(self) -> Waiter[R, N, O] | None:
        """Whoever's turn it is; None if nobody waits."""
        turns = self._turns
        while turns:
            line = turns[0][5]
            waiters = line.waiters
            while waiters and not waiters[0].alive:
                waiters.popleft()
            if not waiters:
                heappop(turns)
                del self.lines[line.flow]
                continue
            turn = _turn(line)
            if turn[:5] > turns[0][:5]:
                heapreplace(turns, turn)
                continue
            return waiters[0]
        return None

    def turn(self) -> tuple[float, float, float, int, int]:
        """Of the head that was looked at last: the smaller, the sooner."""
        return self._turns[0][:5]

    def behind(self, head: Waiter[R, N, O], most: int) -> Iterator[Waiter[R, N, O]]:
        """Some of those who stand behind *head*: the next of its line, and the first of other lines."""
        own = islice(self.lines[head.flow].waiters, 1, 1 + most)
        others = islice((turn[5].waiters[0] for turn in self._turns if turn[5].waiters), most)
        found = [waiter for waiter in (*own, *others) if waiter.alive and waiter is not head]
        return iter(found)

    def sweep(self) -> None:
        """Drop whoever has left."""
        for line in self.lines.values():
            line.waiters = deque(waiter for waiter in line.waiters if waiter.alive)
        self.lines = {flow: line for flow, line in self.lines.items() if line.waiters}
        self._turns = [_turn(line) for line in self.lines.values()]
        heapify(self._turns)
        self.arrived = deque(waiter for waiter in self.arrived if waiter.alive)

    def ahead(self, flow: Flow, ticket: int) -> Cost:
        """What is taken before *ticket* of *flow* has its turn, at the least."""
        own = self.lines[flow].need_before(ticket) if flow in self.lines else Cost(0)
        if len(self.lines) > MANY:
            return own
        requests, input_tokens, tokens = own.requests, own.input_tokens, own.tokens
        for line in self.lines.values():
            if line.flow is not flow:
                # In the time in which its own line's share is served, another's is: by their weights.
                share = line.flow.group.weight / flow.group.weight
                requests += min(line.requests, int(share * own.requests))
                input_tokens += min(line.input_tokens, int(share * own.input_tokens))
                tokens += min(line.tokens, int(share * own.tokens))
        return Cost(requests, input_tokens, 0, tokens)

    def position(self, waiter: Waiter[R, N, O]) -> int:
        """How many stand before *waiter* in its line."""
        waiters = self.lines[waiter.flow].waiters
        return sum(1 for other in islice(waiters, bisect_left(waiters, waiter.ticket, key=_TICKET)) if other.alive)

    def starve(self, starving: bool, now: float) -> None:
        """Count the time in which the head is held up by nothing but the lack of a client."""
        if starving and self.starved_since is None:
            self.starved_since = now
        elif not starving and self.starved_since is not None:
            self._starved = self.starved(now)
            self.starved_since = None

    def starved(self, now: float) -> float:
        """Seconds of such time, in all."""
        return self._starved if self.starved_since is None else self._starved + (now - self.starved_since)

    def patience(self, timeout: float, now: float) -> float:
        """Seconds until somebody has waited *timeout* seconds of such time; infinite while none is passing."""
        if self.starved_since is None or not self.arrived:
            return inf
        return timeout - (self.starved(now) - self.arrived[0].starved_before)


def _turn(line: Line[R, N, O]) -> tuple[float, float, float, int, int, Line[R, N, O]]:
    head = line.waiters[0]
    flow = line.flow
    # Of those whose turn it is alike, the more important goes first.
    return flow.group.start, -flow.group.weight, flow.start, head.ticket, head.arrival, line
