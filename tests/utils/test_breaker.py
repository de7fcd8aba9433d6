"""The circuit breaker's table: every state, every event, and what lets the next attempt go."""

from __future__ import annotations

from math import inf

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm.utils.breaker import RAMP_STEPS, Breaker, BreakerPolicy, BreakerState

POLICY = BreakerPolicy(
    consecutive=3, failure_rate=0.5, min_calls=8, window=10.0, open_seconds=1.0, max_open_seconds=4.0, ramp_seconds=4.0
)


def opened(now: float = 0.0, policy: BreakerPolicy = POLICY) -> Breaker:
    """One that has just opened."""
    breaker = Breaker(policy)
    for _ in range(policy.consecutive):
        breaker.failed(now, now, "503")
    assert breaker.state is BreakerState.OPEN
    return breaker


def ramping(now: float = 1.0) -> Breaker:
    """One whose first attempt has just succeeded."""
    breaker = opened(now - 1.0)
    breaker.admit(now)
    assert breaker.succeeded(now, now)
    return breaker


def test_so_many_failures_in_a_row_open_it() -> None:
    breaker = Breaker(POLICY)
    assert [breaker.failed(0.0, 0.0, "503") for _ in range(3)] == [False, False, True]
    assert (breaker.state, breaker.ready_at, breaker.reason) == (BreakerState.OPEN, 1.0, "503")
    assert breaker.blocked(0.9)
    assert not breaker.blocked(1.0)


def test_of_many_at_once_a_few_that_fail_first_are_no_row() -> None:
    breaker = Breaker(POLICY)
    assert [breaker.failed(0.0, 0.0, "reset", under_way=14.0) for _ in range(7)] == [*[False] * 6, True]


def test_a_success_in_between_begins_the_row_anew() -> None:
    breaker = Breaker(POLICY)
    for _ in range(3):
        breaker.failed(0.0, 0.0, "503")
        breaker.succeeded(0.0, 0.0)
    assert breaker.state is BreakerState.CLOSED
    assert breaker.ready_at == 0.0


def test_a_share_of_failures_opens_it_once_there_are_enough_attempts() -> None:
    breaker = Breaker(POLICY)
    outcomes = []
    for number in range(8):
        breaker.succeeded(0.0, 0.0) if number % 2 == 0 else outcomes.append(breaker.failed(0.0, 0.0, "503"))
    assert outcomes == [False, False, False, True]


def test_what_was_longer_ago_than_the_window_counts_for_nothing() -> None:
    breaker = Breaker(POLICY)
    for number in range(4):
        breaker.failed(float(number), float(number), "503")
        breaker.succeeded(float(number), float(number))
    for now in (14.0, 14.0, 30.0):
        assert not breaker.failed(now, now, "503") or now == 30.0
        breaker.succeeded(now, now)
    assert breaker.state is BreakerState.CLOSED
    assert repr(breaker) == "<Breaker closed: 1 of 2 failed, 0 in a row>"


def test_a_single_attempt_goes_when_its_time_is_over_and_all_others_are_kept_out() -> None:
    breaker = opened()
    breaker.admit(1.0)
    assert (breaker.state, breaker.ready_at) == (BreakerState.HALF_OPEN, inf)
    assert breaker.blocked(100.0)


def test_an_attempt_that_was_given_up_leaves_its_place_to_another() -> None:
    breaker = opened()
    breaker.admit(1.0)
    breaker.leave(1.0)
    assert (breaker.state, breaker.ready_at) == (BreakerState.HALF_OPEN, 0.0)
    assert not breaker.blocked(1.0)
    breaker.admit(1.5)
    assert breaker.blocked(1.5)


def test_it_stays_open_twice_as_long_each_time_up_to_the_longest() -> None:
    breaker, now, waits = opened(), 0.0, []
    for _ in range(4):
        waits.append(breaker.ready_at - now)
        now = breaker.ready_at
        breaker.admit(now)
        assert breaker.failed(now, now, "503")
    assert waits == [1.0, 2.0, 4.0, 4.0]


def test_after_it_has_closed_it_opens_for_the_shortest_time_again() -> None:
    breaker = ramping(1.0)
    assert breaker.succeeded(1.0, 5.0)
    assert breaker.state is BreakerState.CLOSED
    for _ in range(3):
        breaker.failed(5.0, 5.0, "503")
    assert breaker.ready_at == 6.0


def test_what_began_before_the_last_change_tells_nothing() -> None:
    breaker = opened(10.0)
    assert not breaker.succeeded(9.0, 10.5)
    assert not breaker.failed(9.0, 10.5, "late")
    assert (breaker.state, breaker.reason) == (BreakerState.OPEN, "503")
    breaker.admit(11.0)
    assert not breaker.succeeded(9.0, 11.0), "it is not the attempt that was to find out"
    assert not breaker.failed(9.0, 11.0, "late")
    breaker.leave(9.0)
    assert breaker.blocked(11.0)


def test_while_it_ramps_each_success_lets_one_more_go_at_a_time() -> None:
    breaker = ramping(1.0)
    breaker.admit(1.0)
    assert breaker.ready_at == 0.0
    breaker.admit(1.0)
    assert breaker.ready_at == 1.0 + 4.0 / RAMP_STEPS, "both places are taken"
    assert not breaker.blocked(1.0), "and yet nobody is sent away"
    breaker.succeeded(1.0, 1.1)
    breaker.leave(1.0)
    assert breaker.ready_at == 0.0
    breaker.admit(1.1)
    breaker.admit(1.1)
    assert breaker.ready_at > 1.1


def test_while_it_ramps_too_many_failures_open_it_again_for_twice_as_long() -> None:
    breaker = ramping(1.0)
    for _ in range(3):
        breaker.failed(1.5, 2.0, "503")
    assert (breaker.state, breaker.ready_at) == (BreakerState.OPEN, 4.0)


def test_forgotten_it_is_as_new() -> None:
    breaker = opened()
    breaker.reset(0.5)
    assert (breaker.state, breaker.ready_at) == (BreakerState.CLOSED, 0.0)
    assert not breaker.failed(0.5, 0.5, "503")


class Life(RuleBasedStateMachine):
    """Attempts begin, end and are given up in any order; the promises hold at every moment."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(POLICY)
        self.now = 0.0
        self.under_way: list[tuple[float, bool]] = []
        """When each began, and whether it was the one to find out."""

    @rule(seconds=st.sampled_from([0.125, 0.5, 1.0, 5.0]))
    def passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.breaker.ready_at <= self.now)
    @rule()
    def begins(self) -> None:
        self.breaker.admit(self.now)
        self.under_way.append((self.now, self.breaker.state is BreakerState.HALF_OPEN))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "given up"]))
    def ends(self, data: st.DataObject, outcome: str) -> None:
        began, _ = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        if outcome == "succeeded":
            self.breaker.succeeded(began, self.now)
        elif outcome == "failed":
            self.breaker.failed(began, self.now, "503")
        self.breaker.leave(began)

    @invariant()
    def a_single_attempt_finds_out(self) -> None:
        if self.breaker.state is BreakerState.HALF_OPEN:
            assert sum(probe for began, probe in self.under_way if began >= self.breaker.changed_at) <= 1

    @invariant()
    def somebody_may_go_as_soon_as_nobody_is_under_way(self) -> None:
        if not self.under_way:
            assert self.breaker.ready_at <= self.now + POLICY.max_open_seconds

    @invariant()
    def closed_it_keeps_nobody_out(self) -> None:
        if self.breaker.state is BreakerState.CLOSED:
            assert self.breaker.ready_at == 0.0


TestLife = Life.TestCase
