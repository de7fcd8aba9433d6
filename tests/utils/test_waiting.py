"""A line of those who wait: their order, the sums of what they need, and how long nothing but a client was missing."""

from __future__ import annotations

from math import inf
from typing import TypeAlias

from llm.core.types import Cost
from llm.utils.waiting import Line, Waiter

OneWho: TypeAlias = Waiter[str, str]


class Rig:
    """A line, and whoever was reported to have waited long."""

    def __init__(self) -> None:
        self.reported: list[OneWho] = []
        self.line: Line[str, str] = Line(("key",), self.reported.append)
        self._arrivals = 0

    def enter(self, ticket: int, cost: Cost = Cost(1, 10), *, now: float = 0.0) -> OneWho:  # noqa: B008  a frozen value
        self._arrivals += 1
        waiter: OneWho = Waiter(
            self.line,
            call_id=f"call {ticket}",
            provider="p",
            model=None,
            ticket=ticket,
            arrival=self._arrivals,
            cost=cost,
            since=now,
        )
        self.line.add(waiter)
        return waiter

    def leave(self, *waiters: OneWho) -> None:
        for waiter in waiters:
            waiter.alive = False
            self.line.subtract(waiter)


async def test_a_renewal_comes_late_and_stands_where_its_ticket_stands() -> None:
    rig = Rig()
    for ticket in (2, 5, 7, 3, 1):
        rig.enter(ticket)
    assert [waiter.ticket for waiter in rig.line.waiters] == [1, 2, 3, 5, 7]
    assert [waiter.ticket for waiter in rig.line.arrived] == [2, 5, 7, 3, 1]


async def test_the_need_before_a_ticket_is_that_of_the_older_ones() -> None:
    rig = Rig()
    assert rig.line.need_before(9) == (0, 0)
    for ticket, cost in ((1, Cost(1, 10)), (3, Cost(2, 20)), (5, Cost(1, 400))):
        rig.enter(ticket, cost)
    assert rig.line.need_before(1) == (0, 0)
    assert rig.line.need_before(3) == (1, 10)
    assert rig.line.need_before(4) == (3, 30)
    assert rig.line.need_before(6) == (4, 430)


async def test_who_has_left_needs_nothing_and_stands_before_nobody() -> None:
    rig = Rig()
    one, two, three, four = (rig.enter(ticket) for ticket in (1, 2, 3, 4))
    assert rig.line.position(four) == 3
    rig.leave(two)
    assert rig.line.need_before(9) == (3, 30)
    assert rig.line.need_before(4) == (2, 20)
    assert rig.line.position(four) == 2
    rig.leave(one, three)
    assert rig.line.need_before(4) == (0, 0)
    assert rig.line.position(four) == 0


async def test_sweeping_keeps_those_who_wait_in_their_order() -> None:
    rig = Rig()
    waiters = [rig.enter(ticket) for ticket in (1, 2, 3, 4)]
    rig.leave(waiters[1], waiters[2])
    assert len(rig.line.waiters) == 4, "they are taken out later"
    rig.line.sweep()
    assert list(rig.line.waiters) == list(rig.line.arrived) == [waiters[0], waiters[3]]


async def test_patience_is_counted_only_while_nothing_but_a_client_is_missing() -> None:
    rig = Rig()
    rig.enter(1, now=0.0)
    assert rig.line.patience(5.0, 1.0) == inf
    rig.line.starve(True, 10.0)
    rig.line.starve(True, 11.0)
    assert rig.line.patience(5.0, 12.0) == 3.0
    rig.line.starve(False, 13.0)
    rig.line.starve(False, 14.0)
    assert rig.line.patience(5.0, 20.0) == inf
    assert rig.line.starved(20.0) == 3.0
    rig.line.starve(True, 30.0)
    assert rig.line.patience(5.0, 31.0) == 1.0


async def test_patience_is_that_of_whoever_has_been_here_longest_and_counts_from_its_own_coming() -> None:
    rig = Rig()
    rig.line.starve(True, 0.0)
    assert rig.line.patience(5.0, 1.0) == inf, "nobody is here"
    first = rig.enter(1, now=2.0)
    rig.enter(2, now=4.0)
    assert rig.line.patience(5.0, 5.0) == 2.0
    rig.leave(first)
    assert rig.line.patience(5.0, 5.0) == 4.0


async def test_who_waits_long_is_reported() -> None:
    rig = Rig()
    rig.enter(1)
    waiter = rig.enter(2)
    waiter.ring()
    assert rig.reported == [waiter]
