"""Those who wait: their order and turns, the sums of what they need, and how long nothing but a client was missing."""

from __future__ import annotations

import asyncio
from math import inf
from random import Random
from typing import TypeAlias

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llm.core.types import Cost, Priority
from llm.utils.fairness import Fairness, Flow
from llm.utils.waiting import MANY, Line, Route, Waiter

OneWho: TypeAlias = Waiter[str, str, str]


class Rig:
    """A route, and whoever was reported to have waited long."""

    def __init__(self) -> None:
        self.fairness = Fairness({Priority.HIGH: 8.0, Priority.NORMAL: 2.0, Priority.LOW: 1.0})
        self.reported: list[OneWho] = []
        self.route: Route[str, str, str] = Route(("key",), self.reported.append)
        self._arrivals = 0

    def flow(self, tenant: str = "", priority: Priority = Priority.NORMAL) -> Flow:
        return self.fairness.flow(priority, tenant)

    @property
    def line(self) -> Line[str, str, str]:
        return self.route.lines[self.flow()]

    def enter(
        self,
        ticket: int,
        cost: Cost = Cost(1, 10),  # noqa: B008  a frozen value
        *,
        tenant: str = "",
        priority: Priority = Priority.NORMAL,
        now: float = 0.0,
    ) -> OneWho:
        self._arrivals += 1
        flow = self.flow(tenant, priority)
        waiter: OneWho = Waiter(
            self.route,
            flow,
            call_id=f"call {ticket}",
            provider="p",
            model=None,
            ticket=ticket,
            arrival=self._arrivals,
            need="need",
            cost=cost,
            since=now,
        )
        self.fairness.join(flow)
        self.route.add(waiter)
        return waiter

    def leave(self, *waiters: OneWho) -> None:
        for waiter in waiters:
            waiter.alive = False
            self.route.subtract(waiter)
            self.fairness.leave(waiter.flow)

    def serve(self, share: float = 0.1) -> OneWho:
        """Let whoever's turn it is go."""
        head = self.route.head()
        assert head is not None
        self.fairness.serve(head.flow, share)
        self.leave(head)
        return head


def need(cost: Cost) -> tuple[int, int, int, int]:
    return cost.requests, cost.input_tokens, cost.output_tokens, cost.tokens


# -- a line ----------------------------------------------------------------------------------------------------------


async def test_a_renewal_comes_late_and_stands_where_its_ticket_stands() -> None:
    rig = Rig()
    for ticket in (2, 5, 7, 3, 1):
        rig.enter(ticket)
    assert [waiter.ticket for waiter in rig.line.waiters] == [1, 2, 3, 5, 7]
    assert [waiter.ticket for waiter in rig.route.arrived] == [2, 5, 7, 3, 1]


async def test_the_need_before_a_ticket_is_that_of_the_older_ones_but_for_their_output() -> None:
    rig = Rig()
    for ticket, cost in ((1, Cost(1, 10, 5, 11)), (3, Cost(2, 20, 5, 22)), (5, Cost(1, 400, 5, 404))):
        rig.enter(ticket, cost)
    assert need(rig.line.need_before(1)) == (0, 0, 0, 0)
    assert need(rig.line.need_before(3)) == (1, 10, 0, 11)
    assert need(rig.line.need_before(4)) == (3, 30, 0, 33)
    assert need(rig.line.need_before(6)) == (4, 430, 0, 437)


async def test_who_has_left_needs_nothing_and_stands_before_nobody() -> None:
    rig = Rig()
    one, two, three, four = (rig.enter(ticket) for ticket in (1, 2, 3, 4))
    assert rig.route.position(four) == 3
    rig.leave(two)
    assert need(rig.line.need_before(9)) == (3, 30, 0, 0)
    assert need(rig.line.need_before(4)) == (2, 20, 0, 0)
    assert rig.route.position(four) == 2
    rig.leave(one, three)
    assert need(rig.line.need_before(4)) == (0, 0, 0, 0)
    assert rig.route.position(four) == 0


# -- turns -----------------------------------------------------------------------------------------------------------


async def test_where_nobody_waits_there_is_no_head() -> None:
    rig = Rig()
    assert rig.route.head() is None
    rig.leave(rig.enter(1))
    assert rig.route.head() is None
    assert rig.route.lines == {}


async def test_of_a_flow_the_oldest_ticket_goes_first() -> None:
    rig = Rig()
    for ticket in (2, 3, 1):
        rig.enter(ticket)
    assert [rig.serve().ticket for _ in range(3)] == [1, 2, 3]


async def test_of_flows_that_are_level_the_oldest_ticket_goes_first() -> None:
    rig = Rig()
    for ticket, tenant in ((3, "a"), (1, "b"), (2, "c")):
        rig.enter(ticket, tenant=tenant)
    assert [rig.serve().ticket for _ in range(3)] == [1, 2, 3]


async def test_the_head_is_of_the_flow_that_has_had_least() -> None:
    rig = Rig()
    for ticket in range(1, 5):
        rig.enter(ticket, tenant="many")
    rig.enter(5, tenant="few")
    assert [rig.serve().ticket for _ in range(5)] == [1, 5, 2, 3, 4]


async def test_whoever_has_left_is_not_the_head() -> None:
    rig = Rig()
    first, second, third = rig.enter(1), rig.enter(2, tenant="other"), rig.enter(3)
    assert rig.route.head() is first
    rig.leave(first)
    assert rig.route.head() is second
    rig.leave(second)
    assert rig.route.head() is third
    assert list(rig.route.lines) == [rig.flow()]


async def test_a_turn_says_which_of_two_routes_comes_first() -> None:
    rig, other = Rig(), Rig()
    rig.enter(2)
    other.enter(1)
    assert rig.route.head() is not None
    assert other.route.head() is not None
    assert other.route.turn() < rig.route.turn()


def turn_of(waiter: OneWho) -> tuple[float, float, float, int]:
    group = waiter.flow.group
    return group.start, -group.weight, waiter.flow.start, waiter.ticket


@given(st.integers(0, 2**32))
def test_the_head_is_whoever_a_look_at_everybody_would_choose(seed: int) -> None:
    """Whatever comes, goes and is served in between."""

    async def play() -> None:
        random, rig = Random(seed), Rig()
        waiting: list[OneWho] = []
        for ticket in range(1, 60):
            if random.random() < 0.6:
                waiting.append(rig.enter(ticket, tenant=random.choice("abc"), priority=random.choice(tuple(Priority))))
            if waiting and random.random() < 0.2:
                rig.leave(gone := random.choice(waiting))
                waiting.remove(gone)
            if random.random() < 0.05:
                rig.route.sweep()
            best = min(map(turn_of, waiting)) if waiting else None
            head = rig.route.head()
            assert (None if head is None else turn_of(head)) == best
            if waiting and random.random() < 0.5:
                waiting.remove(rig.serve(random.random()))

    asyncio.run(play())


async def test_behind_a_head_are_the_next_of_its_line_and_the_first_of_others() -> None:
    rig = Rig()
    waiters = [rig.enter(ticket, tenant=tenant) for ticket, tenant in enumerate(("a", "a", "a", "b", "b", "c"), 1)]
    rig.leave(waiters[1])
    head = rig.route.head()
    assert head is waiters[0]
    assert {waiter.ticket for waiter in rig.route.behind(head, 16)} == {3, 4, 6}
    assert {waiter.ticket for waiter in rig.route.behind(head, 1)} <= {3, 4, 6}
    rig.leave(waiters[5])
    assert {waiter.ticket for waiter in rig.route.behind(head, 16)} == {3, 4}


# -- what is ahead ---------------------------------------------------------------------------------------------------


async def test_ahead_of_whoever_waits_alone_there_is_nothing() -> None:
    rig = Rig()
    assert need(rig.route.ahead(rig.flow(), 5)) == (0, 0, 0, 0)
    rig.enter(5)
    assert need(rig.route.ahead(rig.flow(), 5)) == (0, 0, 0, 0)
    assert need(rig.route.ahead(rig.flow("new"), 6)) == (0, 0, 0, 0), "who comes first of its flow may go first"


@pytest.mark.parametrize(
    ("priority", "others"),
    [(Priority.NORMAL, 3), (Priority.LOW, 1), (Priority.HIGH, 12)],
)
async def test_while_a_line_has_its_share_others_have_theirs(priority: Priority, others: int) -> None:
    """Three stand before the fourth; by weights 8, 2 and 1 that is one of low priority, or twelve of high priority."""
    rig = Rig()
    for ticket in range(1, 4):
        rig.enter(ticket, Cost(1, 10, 7, 11))
    for ticket in range(11, 41):
        rig.enter(ticket, Cost(1, 10, 7, 11), tenant="other", priority=priority)
    assert rig.route.ahead(rig.flow(), 4).requests == 3 + others
    found = rig.route.ahead(rig.flow(), 4)
    assert found.output_tokens == 0
    assert 30 + 10 * others <= found.input_tokens <= 30 + 10 * others + 9
    assert 33 + 11 * others <= found.tokens <= 33 + 11 * others + 10


async def test_others_have_no_more_than_they_ask_for() -> None:
    rig = Rig()
    for ticket in range(1, 101):
        rig.enter(ticket)
    rig.enter(200, tenant="other")
    assert need(rig.route.ahead(rig.flow(), 101)) == (101, 1010, 0, 0)


async def test_of_very_many_lines_only_the_own_one_is_reckoned_with() -> None:
    """It is an estimate from below; looking at them all would cost more than it tells."""
    rig = Rig()
    rig.enter(1)
    for number in range(MANY):
        rig.enter(2 + number, tenant=f"tenant {number}")
    assert rig.route.ahead(rig.flow(), 1000).requests == 1


# -- leaving ---------------------------------------------------------------------------------------------------------


async def test_sweeping_keeps_those_who_wait_in_their_order() -> None:
    rig = Rig()
    waiters = [rig.enter(ticket) for ticket in (1, 2, 3, 4)]
    gone = rig.enter(5, tenant="gone")
    rig.leave(waiters[1], waiters[2], gone)
    assert len(rig.line.waiters) == 4, "they are taken out later"
    rig.route.sweep()
    assert list(rig.line.waiters) == list(rig.route.arrived) == [waiters[0], waiters[3]]
    assert list(rig.route.lines) == [rig.flow()]
    assert [rig.serve().ticket for _ in range(2)] == [1, 4]


async def test_a_line_that_all_have_left_can_be_joined_again() -> None:
    rig = Rig()
    rig.leave(rig.enter(1))
    again = rig.enter(2)
    assert rig.route.head() is again
    assert need(rig.line.need_before(3)) == (1, 10, 0, 0)


# -- patience --------------------------------------------------------------------------------------------------------


async def test_patience_is_counted_only_while_nothing_but_a_client_is_missing() -> None:
    rig = Rig()
    rig.enter(1, now=0.0)
    assert rig.route.patience(5.0, 1.0) == inf
    rig.route.starve(True, 10.0)
    rig.route.starve(True, 11.0)
    assert rig.route.patience(5.0, 12.0) == 3.0
    rig.route.starve(False, 13.0)
    rig.route.starve(False, 14.0)
    assert rig.route.patience(5.0, 20.0) == inf
    assert rig.route.starved(20.0) == 3.0
    rig.route.starve(True, 30.0)
    assert rig.route.patience(5.0, 31.0) == 1.0


async def test_patience_is_that_of_whoever_has_been_here_longest_and_counts_from_its_own_coming() -> None:
    rig = Rig()
    rig.route.starve(True, 0.0)
    assert rig.route.patience(5.0, 1.0) == inf, "nobody is here"
    first = rig.enter(1, now=2.0)
    rig.enter(2, now=4.0)
    assert rig.route.patience(5.0, 5.0) == 2.0
    rig.leave(first)
    assert rig.route.patience(5.0, 5.0) == 4.0


async def test_who_waits_long_is_reported() -> None:
    rig = Rig()
    rig.enter(1)
    waiter = rig.enter(2)
    waiter.ring()
    assert rig.reported == [waiter]
