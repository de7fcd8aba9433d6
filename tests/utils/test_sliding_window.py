"""The ledger against an oracle that keeps every reservation for ever and adds them all up each time."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from math import ceil, inf, sqrt

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm.core.types import Cost
from llm.testing.journal import check_window
from llm.utils.sliding_window import DIMENSIONS, GONE, MIN_COMPACT, NOTHING, Dimension, Ledger, Reservation, time_until

WINDOW, GUARD = 8.0, 0.25
SPAN = WINDOW + GUARD

# Times are multiples of a quarter second, which floats add without error: "exact" can mean equal.
ticks = st.integers(0, 12).map(lambda quarters: quarters / 4)
limits = st.one_of(st.none(), st.integers(1, 12))
costs = st.builds(Cost, st.integers(0, 3), st.integers(0, 5), st.integers(0, 6))
four_costs = st.builds(Cost, st.integers(1, 3), st.integers(0, 5), st.integers(0, 6), st.integers(0, 5))
grains = st.sampled_from([0.0, 0.0, 0.5])
# Squares and their sums: floats add these without error too.
variances = st.sampled_from([0.0, 0.0, 1.0, 4.0, 9.0])


def of_limits(
    limits: tuple[int | None, int | None, int | None, int | None],
    *,
    output_counts: bool = False,
    grain: float = 0.0,
    output_grain: float = 0.0,
    z: float = 0.0,
) -> Ledger:
    requests, input_tokens, output_tokens, tokens = limits
    return Ledger(
        requests=requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        tokens=tokens,
        window=WINDOW,
        guard=GUARD,
        grain=grain,
        output_grain=output_grain,
        output_counts=output_counts,
        z=z,
    )


def of_one(dimension: Dimension, limit: int) -> Ledger:
    """A ledger of one limit."""
    ledger = Ledger(window=WINDOW, guard=GUARD)
    ledger.set_limit(dimension, limit)
    return ledger


class Held:
    """One reservation as the oracle remembers it."""

    def __init__(self, reservation: Reservation, cost: Cost, now: float) -> None:
        self.reservation = reservation
        self.cost = cost
        """What it takes of requests, input and combined tokens, as far as it is known."""
        self.mean = self.most = reservation.mean
        self.variance = reservation.variance
        self.reserved = now
        self.left: float | None = None
        self.arrived = -inf
        """When the vendor counted it, if that was not when it left."""
        self.gone_from = self.gone_at = inf
        """It counts until the first of these instants for sure, and from the second no more."""
        self.output = 0
        self.produced: list[tuple[float, int]] = []
        self.settled = False
        self.until = -inf


class LedgerMachine(RuleBasedStateMachine):
    """Any life of a ledger: what attempts do, early or late, what others use, a guard that changes, and time going on.

    Where everything is kept apart the sums are known exactly. Entries that share a grain may count a grain longer, and
    so may those that a longer guard stands before, or that were postponed.
    """

    @initialize(
        limits=st.tuples(limits, limits, limits, limits),
        output_counts=st.booleans(),
        grain=grains,
        output_grain=grains,
        z=st.sampled_from([0.0, 1.0]),
        honest=st.booleans(),
    )
    def begin(
        self,
        limits: tuple[int | None, int | None, int | None, int | None],
        output_counts: bool,
        grain: float,
        output_grain: float,
        z: float,
        honest: bool,
    ) -> None:
        self.limits = limits
        self.ledger = of_limits(limits, output_counts=output_counts, grain=grain, output_grain=output_grain, z=z)
        self.output_counts, self.grain, self.output_grain = output_counts, grain, output_grain
        self.honest = honest
        """Nobody uses more than was reserved, or sends twice."""
        self.guard = self.longest_guard = GUARD
        self.foreign = Cost(0)
        self.held_long = False
        """Somebody was in the log for a whole window without leaving, and kept those of its grain there."""
        self.now = 100.0
        self.all: list[Held] = []

    # -- the oracle ------------------------------------------------------------------------------------------------

    def sums(self, *, most: bool) -> tuple[int, ...]:
        """What counts just now by :data:`DIMENSIONS`, of our own, at least or at most."""
        requests = input_tokens = output = tokens = 0
        late = self.output_grain if most else 0.0
        for held in self.all:
            if self.now < (held.gone_at if most else held.gone_from):
                requests += held.cost.requests
                input_tokens += held.cost.input_tokens
                tokens += held.cost.tokens
            produced = sum(amount for at, amount in held.produced if self.now < at + WINDOW + late)
            output += produced
            tokens += produced if self.output_counts else 0
        return requests, input_tokens, output, tokens

    def open(self) -> list[Held]:
        return [held for held in self.all if not held.settled or held.until > self.now]

    def has_room(self, free: int, limit: int, held: int, spread: float) -> bool:
        if free < 0:
            return False
        opened = sum(each.mean for each in self.open())
        variance = spread + sum(each.variance for each in self.open())
        need = opened + held + int(self.ledger.z * sqrt(variance))
        return (need if opened else min(need, limit)) <= free

    def expected(self, cost: Cost, variance: float) -> int | None:
        """The output that a reservation holds, or None if there is no room for it."""
        used = {dimension: self.ledger.used(dimension) for dimension in DIMENSIONS}
        requests, input_tokens, output, tokens = self.limits
        if requests is not None and cost.requests > max(0, requests - used["requests"]):
            return None
        if input_tokens is not None and cost.input_tokens > max(0, input_tokens - used["input_tokens"]):
            return None
        mean = cost.output_tokens
        if output is not None:
            mean = min(mean, output)
            if mean and not self.has_room(output - used["output_tokens"], output, mean, variance):
                return None
        if tokens is not None:
            free = tokens - used["tokens"]
            if not self.output_counts:
                return mean if cost.tokens <= max(0, free) else None
            mean = min(mean, max(0, tokens - cost.tokens))
            if (mean or cost.tokens) and not self.has_room(free - cost.tokens, tokens - cost.tokens, mean, variance):
                return None
        return mean

    # -- what happens ----------------------------------------------------------------------------------------------

    @rule(seconds=ticks | st.sampled_from([7.75, 8.0, 8.25, 8.5]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        waiting = [held for held in self.all if held.left is None and not held.settled]
        self.held_long |= self.grain > 0.0 and any(self.now >= held.reserved + WINDOW for held in waiting)

    @rule(cost=four_costs, variance=variances)
    def reserve(self, cost: Cost, variance: float) -> None:
        self.ledger.expire(self.now)
        expected = self.expected(cost, variance)
        reservation = self.ledger.reserve(cost, now=self.now, variance=variance)
        assert (reservation is not None) == (expected is not None), "all of it or nothing, whenever there is room"
        if reservation is not None:
            assert reservation.mean == expected
            self.all.append(Held(reservation, cost, self.now))

    def pick(self, data: st.DataObject) -> Held:
        return data.draw(st.sampled_from(self.all))

    def leaves(self, held: Held) -> None:
        held.left = self.now
        held.gone_from = self.now + WINDOW + self.guard
        held.gone_at = self.now + WINDOW + self.longest_guard + self.grain

    def produces(self, held: Held, total: int) -> None:
        amount = total - held.output
        if amount <= 0:
            return
        held.output = total
        # Where nobody asks for it, it is not written down.
        if self.limits[2] is not None or (self.limits[3] is not None and self.output_counts):
            held.produced.append((self.now, amount))

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        held = self.pick(data)
        assume(not self.honest or held.left is None)
        held.reservation.sent(self.now)
        if not held.settled:
            self.leaves(held)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def correct(self, data: st.DataObject) -> None:
        """The vendor has counted the prompt."""
        held = self.pick(data)
        assume(held.left is not None)
        low, more = (0, 0) if self.honest else (-4, 4)
        input_tokens = data.draw(st.integers(low, held.cost.input_tokens + more))
        tokens = data.draw(st.integers(low, held.cost.tokens + more))
        held.reservation.correct(input_tokens=input_tokens, tokens=tokens, now=self.now)
        if not held.settled:
            held.cost = Cost(held.cost.requests, max(0, input_tokens), 0, max(0, tokens))

    @precondition(lambda self: self.all)
    @rule(data=st.data(), mean=st.integers(0, 6), variance=variances)
    def stream(self, data: st.DataObject, mean: int, variance: float) -> None:
        """Some of an answer has come, and another guess is made of the rest."""
        held = self.pick(data)
        assume(held.left is not None)
        total = data.draw(st.integers(0, held.most if self.honest else 9))
        if self.honest:
            mean = min(mean, held.most - max(total, held.output))
        held.reservation.produced(total, mean=mean, variance=variance, now=self.now)
        if not held.settled:
            self.produces(held, total)
            held.mean, held.variance = mean, variance

    @precondition(lambda self: self.all)
    @rule(data=st.data(), seconds=ticks)
    def postpone(self, data: st.DataObject, seconds: float) -> None:
        """The answer began so late that the request probably arrived late."""
        held = self.pick(data)
        arrived = self.now - seconds
        assume(held.left is not None and held.left <= arrived and self.now < held.gone_from)
        held.reservation.postpone(arrived, now=self.now)
        if not held.settled:
            held.arrived = arrived
            held.gone_from = max(held.gone_from, arrived + WINDOW)
            held.gone_at = self.now + WINDOW + self.longest_guard + self.grain

    @precondition(lambda self: self.all)
    @rule(data=st.data(), refund=st.booleans(), given_up=st.booleans(), seconds=ticks)
    def settle(self, data: st.DataObject, refund: bool, given_up: bool, seconds: float) -> None:
        held = self.pick(data)
        actual = NOTHING
        if not refund:
            low, more = (0, 0) if self.honest else (-4, 4)
            actual = Cost(
                held.cost.requests,
                data.draw(st.integers(low, held.cost.input_tokens + more)),
                data.draw(st.integers(low, held.most + more)),
                data.draw(st.integers(low, held.cost.tokens + more)),
            )
        until = self.now + seconds if given_up else None
        held.reservation.settle(actual, now=self.now, until=until)
        if held.settled:
            return
        held.settled = True
        if held.left is None and not refund:
            self.leaves(held)
        if refund and held.left is None:
            held.gone_from = held.gone_at = -inf
        held.cost = Cost(actual.requests, max(0, actual.input_tokens), 0, max(0, actual.tokens))
        self.produces(held, actual.output_tokens)
        if until is not None:
            held.until = until

    @rule(dimension=st.sampled_from(DIMENSIONS), change=st.integers(-8, 8))
    def learn_of_others(self, dimension: Dimension, change: int) -> None:
        before = deepcopy(self.ledger.foreign)
        self.ledger.expire(self.now)
        known = {each: getattr(self.ledger.foreign, each) for each in DIMENSIONS}
        assert all(0 <= known[each] <= getattr(before, each) for each in DIMENSIONS)
        self.ledger.add_foreign(dimension, change, now=self.now)
        known[dimension] = max(0, known[dimension] + change)
        assert {each: getattr(self.ledger.foreign, each) for each in DIMENSIONS} == known

    @rule(guard=st.sampled_from([GUARD, 0.5, 1.5]))
    def change_the_guard(self, guard: float) -> None:
        self.ledger.guard = self.guard = guard
        self.longest_guard = max(self.longest_guard, guard)

    # -- what holds --------------------------------------------------------------------------------------------------

    @invariant()
    def nothing_expires_late(self) -> None:
        ledger = self.ledger
        expiries = [entry.expiry for entry in chain(ledger._log, ledger._produced, ledger._foreign)]
        expiries += [until for until, _, _ in ledger._tails]
        assert ledger._due <= min((expiry for expiry in expiries if expiry != GONE), default=inf)
        ledger.expire(self.now)
        for log in (ledger._log, ledger._produced, ledger._foreign):
            left = [entry.expiry for entry in log if entry.expiry != GONE]
            assert left == sorted(left)
            assert all(expiry > self.now for expiry in left)
        assert len([entry for entry in ledger._log if entry.expiry == GONE]) == ledger._withdrawn

    @invariant()
    def the_sums_are_those_of_the_logs(self) -> None:
        ledger = self.ledger
        ledger.expire(self.now)
        for dimension in DIMENSIONS:
            own = [getattr(entry, dimension) for entry in chain(ledger._log, ledger._produced)]
            others = [getattr(entry, dimension) for entry in ledger._foreign]
            assert min([0, *own, *others]) == 0, "nothing is negative"
            assert sum(others) == getattr(ledger.foreign, dimension)
            assert sum(own) + sum(others) == ledger.used(dimension)

    @invariant()
    def what_counts_is_what_was_sent_and_produced_in_the_last_window(self) -> None:
        ledger = self.ledger
        if not ledger.bounded:
            assert not ledger._log, "a ledger without limits keeps no log"
            return
        own = tuple(ledger.used(each) - getattr(ledger.foreign, each) for each in DIMENSIONS)
        assert all(least <= used for least, used in zip(self.sums(most=False), own, strict=True))
        if not self.held_long:
            assert all(used <= most for used, most in zip(own, self.sums(most=True), strict=True))

    @invariant()
    def what_is_open_is_what_was_not_settled_and_the_tails(self) -> None:
        ledger, opened = self.ledger, self.open()
        assert ledger.open_count == len(opened)
        assert ledger.open_output == sum(held.mean for held in opened)
        assert ledger.open_variance == sum(held.variance for held in opened)

    @invariant()
    def no_window_is_overfull(self) -> None:
        if not self.honest:
            return
        sent = [(max(held.left, held.arrived), held) for held in self.all if held.left is not None]
        produced = [event for held in self.all for event in held.produced]
        tokens = [(at, held.cost.tokens) for at, held in sent] + (produced if self.output_counts else [])
        for limit, events in zip(
            self.limits,
            (
                [(at, held.cost.requests) for at, held in sent],
                [(at, held.cost.input_tokens) for at, held in sent],
                sorted(produced),
                tokens,
            ),
            strict=True,
        ):
            if limit is not None:
                assert check_window(sorted(events), limit, WINDOW) == 0


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLedger = LedgerMachine.TestCase


def full(*, requests: int, at: float, guard: float = GUARD) -> Ledger:
    """A ledger whose requests all left at one instant."""
    ledger = Ledger(requests=requests, window=WINDOW, guard=guard)
    for _ in range(requests):
        send(ledger, Cost(), at)
    return ledger


def send(ledger: Ledger, cost: Cost, now: float) -> Reservation:
    reservation = ledger.reserve(cost, now=now)
    assert reservation is not None
    reservation.sent(now)
    return reservation


def test_a_full_window_admits_again_when_its_oldest_request_is_a_window_and_a_guard_old() -> None:
    ledger = full(requests=2, at=10.0)
    assert ledger.next_expiry(10.0) == 10.0 + SPAN
    assert ledger.reserve(Cost(), now=10.0 + SPAN - 0.001) is None
    assert ledger.reserve(Cost(), now=10.0 + SPAN) is not None


def test_a_refused_reservation_takes_nothing_of_any_dimension() -> None:
    ledger = Ledger(requests=5, input_tokens=100, output_tokens=10)
    assert ledger.reserve(Cost(1, 50, 10), now=0.0) is not None
    before = repr(ledger)
    assert ledger.reserve(Cost(1, 51, 0), now=0.0) is None
    assert ledger.reserve(Cost(1, 10, 1), now=0.0) is None
    assert ledger.reserve(Cost(5, 10, 0), now=0.0) is None
    assert repr(ledger) == before == "<Ledger requests 1/5, input 50/100, output 0/10 + 10 open>"


def test_a_request_that_left_late_expires_late() -> None:
    ledger = Ledger(requests=1, window=WINDOW, guard=GUARD)
    reservation = ledger.reserve(Cost(), now=0.0)
    assert reservation is not None
    reservation.sent(5.0)
    assert ledger.next_expiry(SPAN) == 5.0 + SPAN
    assert ledger.reserve(Cost(), now=SPAN) is None
    assert ledger.reserve(Cost(), now=5.0 + SPAN) is not None


def test_a_request_that_has_not_left_counts_however_long_it_waits_for_its_connection() -> None:
    """Else it would be sent after its place was given to another."""
    ledger = Ledger(requests=1, window=WINDOW, guard=GUARD)
    reservation = ledger.reserve(Cost(), now=0.0)
    assert reservation is not None
    assert ledger.reserve(Cost(), now=10 * SPAN) is None
    reservation.sent(10 * SPAN)
    assert ledger.reserve(Cost(), now=11 * SPAN - 0.25) is None
    assert ledger.reserve(Cost(), now=11 * SPAN) is not None


def test_a_moment_between_permit_and_departure_is_left_to_the_guard() -> None:
    ledger = Ledger(requests=1, window=WINDOW, guard=GUARD)
    reservation = ledger.reserve(Cost(), now=0.0)
    assert reservation is not None
    reservation.sent(0.005)
    assert ledger.next_expiry(1.0) == SPAN


def test_more_than_a_moment_between_permit_and_departure_is_not_left_to_the_guard() -> None:
    ledger = Ledger(requests=1, window=WINDOW, guard=GUARD)
    reservation = ledger.reserve(Cost(), now=0.0)
    assert reservation is not None
    reservation.sent(0.015)
    assert ledger.next_expiry(1.0) == 0.015 + SPAN


def test_unless_told_otherwise_a_window_is_a_minute_and_a_quarter_second() -> None:
    ledger = Ledger(requests=1)
    send(ledger, Cost(), 0.0)
    assert ledger.next_expiry(0.0) == 60.25


def test_unless_told_otherwise_nothing_is_one_and_no_margin_is_held() -> None:
    ledger = Ledger(requests=9, output_tokens=100)
    for at in (0.0, 0.125, 0.25):
        reservation = ledger.reserve(Cost(1, 0, 10), now=at, variance=100.0)
        assert reservation is not None
        reservation.sent(at)
        reservation.produced(10, mean=0, variance=100.0, now=at)
    assert [entry.expiry for entry in ledger._log] == [60.25, 60.375, 60.5]
    assert [entry.expiry for entry in ledger._produced] == [60.0, 60.125, 60.25]
    assert ledger.reserve(Cost(1, 0, 70), now=1.0, variance=100.0) is not None


def test_without_a_guard_there_is_nothing_to_leave_to_it() -> None:
    ledger = Ledger(requests=1, window=WINDOW, guard=0.0)
    reservation = ledger.reserve(Cost(), now=0.0)
    assert reservation is not None
    reservation.sent(0.005)
    assert ledger.next_expiry(1.0) == 0.005 + WINDOW


def test_only_the_first_settlement_counts() -> None:
    ledger = Ledger(requests=5, input_tokens=100, output_tokens=100)
    reservation = ledger.reserve(Cost(1, 50, 50), now=0.0)
    assert reservation is not None
    reservation.sent(0.0)
    reservation.settle(Cost(1, 20, 30), now=1.0)
    reservation.settle(Cost(1, 90, 90), now=2.0)
    reservation.settle(NOTHING, now=3.0)
    reservation.sent(4.0)
    assert repr(ledger) == "<Ledger requests 1/5, input 20/100, output 30/100 + 0 open>"
    assert reservation.settled


def test_a_settlement_after_the_window_changes_only_the_output() -> None:
    ledger = Ledger(requests=5, input_tokens=100, output_tokens=100, window=WINDOW, guard=GUARD)
    reservation = send(ledger, Cost(1, 50, 50), 0.0)
    reservation.settle(Cost(1, 90, 40), now=3 * SPAN)
    assert repr(ledger) == "<Ledger requests 0/5, input 0/100, output 40/100 + 0 open>"
    ledger.expire(4 * SPAN)
    assert repr(ledger) == "<Ledger requests 0/5, input 0/100, output 0/100 + 0 open>"


def test_figures_below_nothing_make_no_capacity() -> None:
    ledger = Ledger(requests=10, input_tokens=10, output_tokens=10)
    send(ledger, Cost(1, 5, 5), 0.0).settle(Cost(-100, -100, -100), now=0.0)
    assert repr(ledger) == "<Ledger requests 0/10, input 0/10, output 0/10 + 0 open>"


@pytest.mark.parametrize(
    ("used", "free"),
    [(Cost(9, 0, 0), Cost(0, 1, 1)), (Cost(1, 9, 0), Cost(1, 0, 1)), (Cost(1, 0, 9), Cost(1, 1, 0))],
)
def test_a_dimension_that_is_overdrawn_keeps_out_only_who_needs_more_of_it(used: Cost, free: Cost) -> None:
    ledger = Ledger(requests=5, input_tokens=5, output_tokens=5)
    send(ledger, Cost(1, 1, 1), 0.0).settle(used, now=0.0)
    assert ledger.reserve(Cost(1, 1, 1), now=0.0) is None
    assert ledger.reserve(free, now=0.0) is not None


def test_a_guess_of_output_never_asks_for_more_than_the_limit() -> None:
    ledger = Ledger(output_tokens=100)
    assert ledger.reserve(Cost(1, 0, 4096), now=0.0) is not None
    assert ledger.open_output == 100
    assert ledger.too_large(Cost(1, 0, 4096)) is None


@pytest.mark.parametrize(
    ("cost", "found"),
    [
        (Cost(1, 100), None),
        (Cost(1, 101), ("input_tokens", 101, 100)),
        (Cost(6, 1), ("requests", 6, 5)),
    ],
)
def test_what_no_window_could_hold_is_said(cost: Cost, found: tuple[str, int, int] | None) -> None:
    assert Ledger(requests=5, input_tokens=100).too_large(cost) == found


def test_without_limits_nothing_is_refused_and_nothing_kept() -> None:
    ledger = Ledger()
    for _ in range(1000):
        send(ledger, Cost(1, 10**9, 10**9), 0.0).settle(Cost(1, 10**9, 10**9), now=0.0)
    assert not ledger.bounded
    assert ledger.next_expiry(0.0) is None
    assert time_until([ledger], Cost(10**9), now=0.0) == 0.0


def test_refunds_do_not_make_the_log_longer_than_the_limits() -> None:
    """A server that refuses connections is asked again and again, and costs nothing."""
    ledger = Ledger(requests=10)
    for _ in range(10_000):
        held = [ledger.reserve(Cost(), now=0.0) for _ in range(10)]
        for reservation in held:
            assert reservation is not None
            reservation.settle(NOTHING, now=0.0)
    assert len(ledger._log) <= 100
    assert ledger.requests_used == 0


def test_refunds_behind_a_request_that_stays_do_not_make_the_log_longer() -> None:
    """What is withdrawn lies in the middle of the log, where it cannot simply be popped."""
    ledger = Ledger(requests=10, window=WINDOW, guard=GUARD)
    send(ledger, Cost(), 0.0)
    for _ in range(1000):
        held = [ledger.reserve(Cost(), now=1.0) for _ in range(9)]
        assert ledger.reserve(Cost(), now=1.0) is None
        for reservation in held:
            assert reservation is not None
            reservation.settle(NOTHING, now=1.0)
    assert len(ledger._log) <= 2 * MIN_COMPACT + 10
    assert ledger.requests_used == 1
    assert ledger.next_expiry(1.0) == SPAN
    for _ in range(9):
        send(ledger, Cost(), 2.0)
    assert ledger.next_expiry(SPAN) == 2.0 + SPAN
    assert ledger.requests_used == 9


def test_refunds_one_by_one_behind_a_request_that_stays_leave_nothing_at_all() -> None:
    ledger = Ledger(requests=10, window=WINDOW, guard=GUARD)
    send(ledger, Cost(), 0.0)
    for _ in range(1000):
        reservation = ledger.reserve(Cost(), now=1.0)
        assert reservation is not None
        reservation.settle(NOTHING, now=1.0)
    assert len(ledger._log) == 1


def test_refunds_that_expired_with_their_window_do_not_keep_later_ones_in_the_log() -> None:
    ledger = Ledger(requests=100, window=WINDOW, guard=GUARD)
    now = 0.0
    for _ in range(100):
        now += 2 * SPAN
        held = [ledger.reserve(Cost(), now=now) for _ in range(20)]
        for _ in range(60):
            send(ledger, Cost(), now)
        for reservation in held:
            assert reservation is not None
            reservation.settle(NOTHING, now=now)
    assert ledger.requests_used == 60
    for _ in range(100):
        held = [ledger.reserve(Cost(), now=now) for _ in range(40)]
        for reservation in held:
            assert reservation is not None
            reservation.settle(NOTHING, now=now)
    assert len(ledger._log) <= 60 + 2 * MIN_COMPACT + 100


def test_what_left_late_is_gone_a_window_later_and_leaves_nothing_in_the_log() -> None:
    ledger = Ledger(requests=10, window=WINDOW, guard=GUARD)
    early, other = ledger.reserve(Cost(), now=0.0), send(ledger, Cost(), 0.0)
    assert early is not None
    early.sent(5.0)
    assert ledger.requests_used == 2
    assert ledger.next_expiry(SPAN) == 5.0 + SPAN
    assert ledger.next_expiry(5.0 + SPAN) is None
    early.settle(Cost(), now=6.0 + SPAN)
    other.settle(Cost(), now=6.0 + SPAN)
    assert ledger.next_expiry(6.0 + SPAN) is None


@pytest.mark.parametrize("actual", [Cost(1, 0), Cost(0, 1), Cost(1, 1)])
def test_who_is_settled_without_a_word_of_when_it_left_has_left_only_now(actual: Cost) -> None:
    ledger = Ledger(requests=5, input_tokens=5, window=WINDOW, guard=GUARD)
    reservation = ledger.reserve(Cost(1, 1), now=0.0)
    assert reservation is not None
    reservation.settle(actual, now=5.0)
    assert ledger.next_expiry(5.0) == 5.0 + SPAN
    assert (ledger.requests_used, ledger.input_used) == (actual.requests, actual.input_tokens)
    assert ledger.next_expiry(5.0 + SPAN) is None


# -- another loop ----------------------------------------------------------------------------------------------------


def test_a_successor_counts_what_was_sent_and_keeps_its_time() -> None:
    ledger = Ledger(requests=3, input_tokens=100, output_tokens=50, window=WINDOW, guard=GUARD)
    send(ledger, Cost(1, 10, 20), 0.0).settle(Cost(1, 8, 5), now=1.0)
    successor = ledger.successor(2.0)
    assert repr(successor) == repr(ledger) == "<Ledger requests 1/3, input 8/100, output 5/50 + 0 open>"
    assert successor.span == SPAN
    assert successor.next_expiry(2.0) == SPAN
    assert successor.next_expiry(SPAN) == 1.0 + WINDOW
    assert successor.next_expiry(1.0 + WINDOW) is None
    assert repr(successor) == "<Ledger requests 0/3, input 0/100, output 0/50 + 0 open>"


def test_a_successor_counts_what_was_open_as_spent_now_and_hears_of_it_no_more() -> None:
    ledger = Ledger(requests=3, input_tokens=100, output_tokens=50, window=WINDOW, guard=GUARD)
    flying, waiting = send(ledger, Cost(1, 10, 20), 0.0), ledger.reserve(Cost(1, 30, 5), now=1.0)
    assert waiting is not None
    successor = ledger.successor(2.0)
    spent = "<Ledger requests 2/3, input 40/100, output 25/50 + 0 open>"
    assert repr(successor) == spent
    flying.settle(Cost(1, 90, 50), now=3.0)
    waiting.settle(NOTHING, now=3.0)
    assert repr(successor) == spent
    assert [successor.next_expiry(now) for now in (3.0, SPAN, 1.0 + SPAN, 2.0 + SPAN)] == [
        SPAN,
        1.0 + SPAN,
        2.0 + WINDOW,
        None,
    ], "also what was waiting to leave goes after a window: nobody will say that it left"


def test_a_successor_takes_over_nothing_that_was_given_back_or_is_over() -> None:
    ledger = Ledger(requests=3, window=WINDOW, guard=GUARD)
    send(ledger, Cost(), 0.0)
    refunded = ledger.reserve(Cost(), now=5.0)
    assert refunded is not None
    send(ledger, Cost(), 5.0)
    refunded.settle(NOTHING, now=5.0)
    successor = ledger.successor(SPAN)
    assert len(successor._log) == 1
    assert successor.requests_used == 1


def test_a_successor_leaves_as_little_to_the_guard_as_its_predecessor() -> None:
    def stamped(ledger: Ledger, sent: float) -> float | None:
        reservation = ledger.reserve(Cost(), now=0.0)
        assert reservation is not None
        reservation.sent(sent)
        return ledger.next_expiry(0.0)

    assert stamped(Ledger(requests=1, window=WINDOW, guard=GUARD).successor(0.0), 0.005) == SPAN
    assert stamped(Ledger(requests=1, window=WINDOW, guard=0.0).successor(0.0), 0.005) == WINDOW + 0.005


def test_a_successor_without_limits_keeps_no_log() -> None:
    ledger = Ledger()
    send(ledger, Cost(1, 10, 10), 0.0)
    assert ledger.successor(1.0).next_expiry(1.0) is None


# -- time_until ------------------------------------------------------------------------------------------------------

sends = st.lists(
    st.tuples(ticks, st.builds(Cost, st.integers(0, 3), *([st.integers(0, 5)] * 3)), st.integers(0, 8)),
    max_size=14,
)


def fill(ledger: Ledger, plan: list[tuple[float, Cost, int]]) -> float:
    """Send what can be sent, settled at once with other figures than were reserved, and return the time."""
    now = 0.0
    for gap, cost, input_tokens in plan:
        now += gap
        reservation = ledger.reserve(cost, now=now)
        if reservation is not None:
            reservation.sent(now)
            reservation.settle(Cost(cost.requests, input_tokens, cost.output_tokens, cost.tokens), now=now)
    return now


@given(
    limits=st.tuples(limits, limits, limits, limits),
    output_counts=st.booleans(),
    grains=st.tuples(grains, grains),
    plan=sends,
    foreign=st.lists(st.tuples(st.sampled_from(DIMENSIONS), st.integers(-3, 9)), max_size=3),
    speed=st.sampled_from([0.0, 0.0, 1.0, 4.0]),
    later=ticks,
    cost=four_costs,
)
def test_the_wait_of_a_single_call_is_exact(
    limits: tuple[int | None, int | None, int | None, int | None],
    output_counts: bool,
    grains: tuple[float, float],
    plan: list[tuple[float, Cost, int]],
    foreign: list[tuple[Dimension, int]],
    speed: float,
    later: float,
    cost: Cost,
) -> None:
    """With others' usage, with grains, and where output is promised before there is room for it."""
    ledger = of_limits(limits, output_counts=output_counts, grain=grains[0], output_grain=grains[1])
    now = fill(ledger, plan)
    for dimension, change in foreign:
        ledger.add_foreign(dimension, change, now=now)
    now += later
    ledger.speed, ledger.lead = speed, 0.5
    wait = time_until([ledger], cost, now=now)
    if ledger.too_large(cost):
        assert wait == inf
        return
    assert wait <= SPAN + 2 * WINDOW / 60
    # Step by step, on copies: it is refused at every quarter second before, and admitted then.
    for step in range(ceil(wait * 4 - 1e-6)):
        assert deepcopy(ledger).reserve(cost, now=now + step / 4) is None
    # Of combined tokens it is not exact how far the ledger looks ahead.
    if not (speed and output_counts and limits[3] is not None):
        assert deepcopy(ledger).reserve(cost, now=now + wait + 1e-9) is not None


def admitted(ledger: Ledger, cost: Cost, now: float) -> bool:
    reservation = ledger.reserve(cost, now=now)
    if reservation is not None:
        reservation.sent(now)
    return reservation is not None


@given(data=st.data(), windows=st.lists(st.sampled_from([2.0, 4.0, 8.0]), min_size=1, max_size=3))
def test_what_a_queue_is_told_is_never_more_than_it_has_to_wait(data: st.DataObject, windows: list[float]) -> None:
    """Also with windows of several lengths, and however the queue is spread over the keys."""
    pairs = []
    for window in windows:
        ledger = Ledger(requests=data.draw(limits), input_tokens=data.draw(limits), window=window, guard=GUARD)
        pairs.append((ledger, fill(ledger, data.draw(sends))))
    ledgers = [ledger for ledger, _ in pairs]
    now = start = max(then for _, then in pairs)
    queue = data.draw(st.lists(st.builds(Cost, st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=25))
    queue = [cost for cost in queue if any(not ledger.too_large(cost) for ledger in ledgers)]
    assume(queue)
    ahead = Cost(sum(cost.requests for cost in queue[:-1]), sum(cost.input_tokens for cost in queue[:-1]))
    told = time_until(ledgers, queue[-1], ahead, now=now)
    while queue:
        order = data.draw(st.permutations(ledgers))
        while queue and any(admitted(ledger, queue[0], now) for ledger in order):
            del queue[0]
        if queue:
            now += 0.25
    assert told <= now - start


def test_a_long_queue_waits_whole_windows() -> None:
    ledgers = [full(requests=50, at=0.0), full(requests=50, at=4.0)]
    assert time_until(ledgers, Cost(), now=5.0) == SPAN - 5.0
    assert time_until(ledgers, Cost(), Cost(49), now=5.0) == SPAN - 5.0
    assert time_until(ledgers, Cost(), Cost(50), now=5.0) == SPAN - 1.0
    assert time_until(ledgers, Cost(), Cost(100), now=5.0) == 2 * SPAN - 5.0
    assert time_until(ledgers, Cost(), Cost(1050), now=5.0) == 11 * SPAN - 1.0


@pytest.mark.parametrize("dimension", ["requests", "input_tokens"])
def test_the_wait_behind_a_queue_is_exact_for_windows_of_one_length(dimension: Dimension) -> None:
    """Two keys of five, spent at 0 and at 4: at each return five go."""
    ledgers = [of_one(dimension, 5) for _ in range(2)]
    for ledger, at in zip(ledgers, (0.0, 4.0), strict=True):
        send(ledger, Cost(5, 5), at)
    one = Cost(1, 1)
    for ahead in range(40):
        window, place = divmod(ahead, 10)
        expected = window * SPAN + (0.0 if place < 5 else 4.0) + SPAN - 5.0
        queue = Cost(ahead, 0) if dimension == "requests" else Cost(0, ahead)
        assert time_until(ledgers, one, queue, now=5.0) == expected


def test_what_is_free_is_counted_once_and_what_comes_back_one_by_one() -> None:
    ledger = Ledger(requests=5, window=WINDOW, guard=GUARD)
    for at in (0.0, 1.0, 2.0):
        send(ledger, Cost(), at)
    waits = [time_until([ledger], Cost(), Cost(ahead), now=3.0) for ahead in range(8)]
    # Two at once; one at each return; then the first two again, a window after they went.
    assert waits == [0.0, 0.0, SPAN - 3.0, SPAN - 2.0, SPAN - 1.0, SPAN, SPAN, 2 * SPAN - 3.0]


def test_a_key_with_room_in_every_dimension_takes_a_call_at_once() -> None:
    ledger = Ledger(requests=5, input_tokens=5, output_tokens=5)
    assert time_until([ledger], Cost(5, 5, 5), now=0.0) == 0.0
    assert time_until([ledger], Cost(1, 1, 1), Cost(4, 4, 4), now=0.0) == 0.0


def test_a_limit_of_nothing_keeps_out_only_who_needs_some() -> None:
    assert time_until([Ledger(requests=5, output_tokens=0)], Cost(1, 1, 0), now=0.0) == 0.0
    assert time_until([Ledger(requests=5, input_tokens=0)], Cost(1, 0, 0), Cost(1, 0, 0), now=0.0) == 0.0


def test_output_ahead_is_waited_for_too() -> None:
    ledger = Ledger(output_tokens=10, window=WINDOW, guard=GUARD)
    send(ledger, Cost(1, 0, 10), 0.0).settle(Cost(1, 0, 10), now=0.0)
    assert time_until([ledger], Cost(1, 0, 0), Cost(0, 0, 0), now=1.0) == 0.0
    assert time_until([ledger], Cost(1, 0, 0), Cost(0, 0, 10), now=1.0) == WINDOW - 1.0
    assert time_until([ledger], Cost(1, 0, 0), Cost(0, 0, 11), now=1.0) == 2 * WINDOW - 1.0


def test_a_key_that_is_over_its_limit_pays_its_debt_before_it_takes_anybody() -> None:
    """Its limit was lowered to 2 when 4 were used: the first two that come back are nobody's."""
    over, other = Ledger(requests=4, window=WINDOW, guard=GUARD), full(requests=1, at=4.0)
    for at in (0.0, 1.0, 2.0, 3.0):
        send(over, Cost(), at)
    over.set_limit("requests", 2)
    waits = [time_until([over, other], Cost(), Cost(ahead), now=4.5) for ahead in range(3)]
    assert waits == [SPAN + 2.0 - 4.5, SPAN + 3.0 - 4.5, SPAN + 4.0 - 4.5]
    alone = [time_until([over], Cost(), Cost(ahead), now=4.5) for ahead in range(2)]
    assert alone == [SPAN + 2.0 - 4.5, SPAN + 3.0 - 4.5]


def test_a_debt_larger_than_an_entry_takes_all_of_it_and_some_of_the_next() -> None:
    over, other = of_one("input_tokens", 10), of_one("input_tokens", 1)
    for at, tokens in ((0.0, 4), (1.0, 0), (2.0, 6)):
        send(over, Cost(1, tokens), at)
    send(other, Cost(1, 1), 3.0)
    over.set_limit("input_tokens", 5)
    for ahead, at in enumerate([2.0, 2.0, 2.0, 2.0, 2.0, 3.0]):
        assert time_until([over, other], Cost(1, 1), Cost(0, ahead), now=3.5) == SPAN + at - 3.5


def test_what_has_expired_is_waited_for_no_more() -> None:
    assert time_until([full(requests=2, at=0.0)], Cost(), Cost(1), now=SPAN + 5.0) == 0.0


def test_a_key_without_a_limit_takes_any_queue_at_once() -> None:
    ledgers = [full(requests=1, at=0.0), Ledger(input_tokens=5)]
    assert time_until(ledgers, Cost(1, 1), Cost(1000), now=0.0) == 0.0


def test_a_key_with_a_short_window_comes_round_while_one_with_a_long_window_does_not() -> None:
    short, long = Ledger(requests=10, window=10.0, guard=0.0), Ledger(requests=100, window=100.0, guard=0.0)
    for ledger, requests in ((short, 10), (long, 100)):
        for _ in range(requests):
            send(ledger, Cost(), 0.0)
    # The short one alone takes fifty until then: 10, 20, 30, 40, 50.
    assert time_until([short, long], Cost(), Cost(49), now=0.0) <= 50.0
    # And it is not far below the truth for a long queue: 1,000 a 100 s for each ten seconds, or 20 a second less 110.
    assert time_until([short, long], Cost(), Cost(1999), now=0.0) >= 900.0


def test_windows_of_several_lengths_are_estimated_from_below() -> None:
    """Ten a ten seconds and a hundred a hundred seconds: two a second, and never more at once than 110."""
    short, long = Ledger(requests=10, window=10.0, guard=0.0), Ledger(requests=100, window=100.0, guard=0.0)
    send(short, Cost(10), 0.0)
    send(long, Cost(40), 0.0)
    queue = [time_until([short, long], Cost(), Cost(ahead), now=0.0) for ahead in (59, 60, 70, 110, 1999)]
    # 60 are free; then the short one's window decides, as long as the rate does not.
    assert queue == [0.0, 10.0, 10.0, 10.0, (2000 - 110) / 2.0]


def test_a_key_that_never_admits_does_not_count_in_the_rate() -> None:
    short, closed = Ledger(requests=10, window=10.0, guard=0.0), Ledger(requests=0, window=100.0, guard=0.0)
    send(short, Cost(10), 0.0)
    assert time_until([short, closed], Cost(), Cost(1000), now=0.0) == 1010.0


def test_a_call_waits_for_one_key_that_holds_it_whole() -> None:
    """Two halves on two keys are of no use to it."""
    ledgers = [Ledger(input_tokens=100, window=WINDOW, guard=GUARD) for _ in range(2)]
    send(ledgers[0], Cost(1, 60), 0.0)
    send(ledgers[1], Cost(1, 60), 2.0)
    assert time_until(ledgers, Cost(1, 80), now=4.0) == SPAN - 4.0
    assert time_until(ledgers, Cost(1, 40), now=4.0) == 0.0
    assert time_until(ledgers, Cost(1, 101), now=4.0) == inf


def test_output_that_is_open_may_come_back_at_any_time() -> None:
    ledger = Ledger(output_tokens=100, window=WINDOW, guard=GUARD)
    reservation = send(ledger, Cost(1, 0, 100), 0.0)
    assert time_until([ledger], Cost(1, 0, 100), now=1.0) == 0.0
    reservation.settle(Cost(1, 0, 100), now=1.0)
    assert time_until([ledger], Cost(1, 0, 1), now=1.0) == WINDOW


def test_an_overdraft_is_paid_before_anybody_is_let_in() -> None:
    """Usage told more than was reserved: 30 tokens of 10."""
    ledger = Ledger(input_tokens=10, window=WINDOW, guard=GUARD)
    first, second = send(ledger, Cost(1, 5), 0.0), send(ledger, Cost(1, 5), 3.0)
    first.settle(Cost(1, 15, 0), now=3.0)
    second.settle(Cost(1, 15, 0), now=3.0)
    assert time_until([ledger], Cost(1, 1), now=3.0) == SPAN
    assert time_until([ledger], Cost(1, 0), now=3.0) == 0.0


@pytest.mark.parametrize("dimension", ["requests", "input_tokens"])
def test_a_limit_of_nothing_keeps_everything_out(dimension: Dimension) -> None:
    ledger = of_one(dimension, 0)
    assert ledger.reserve(Cost(1, 1), now=0.0) is None
    assert time_until([ledger], Cost(1, 1), now=0.0) == inf
    assert time_until([ledger], Cost(1, 1), Cost(1, 1), now=0.0) == inf


def test_without_any_key_a_call_waits_for_ever() -> None:
    assert time_until([], Cost(), now=0.0) == inf


# -- combined tokens, and output as it comes -------------------------------------------------------------------------


def test_output_counts_of_the_combined_tokens_as_it_is_produced() -> None:
    """Anthropic's way: the prompt at once, the answer token by token."""
    ledger = Ledger(tokens=100, window=WINDOW, guard=GUARD, output_counts=True)
    reservation = send(ledger, Cost(1, 40, 30, 40), 0.0)
    assert ledger.reserve(Cost(1, 10, 21, 10), now=0.0) is None, "70 are used or promised"
    reservation.produced(20, mean=10, variance=0.0, now=1.0)
    assert (ledger.used("tokens"), ledger.open_output) == (60, 10)
    reservation.settle(Cost(1, 40, 25, 40), now=2.0)
    assert (ledger.used("tokens"), ledger.open_output) == (65, 0)
    assert [ledger.next_expiry(now) for now in (2.0, SPAN)] == [SPAN, 1.0 + WINDOW]


def test_where_the_vendor_holds_max_tokens_output_costs_nothing_more() -> None:
    """OpenAI's way: the cost says at once what the vendor will hold, whatever is produced."""
    ledger = Ledger(tokens=100, window=WINDOW, guard=GUARD)
    reservation = send(ledger, Cost(1, 10, 50, 90), 0.0)
    reservation.produced(50, mean=10, variance=0.0, now=1.0)
    reservation.settle(Cost(1, 10, 60, 90), now=2.0)
    assert ledger.used("tokens") == 90
    assert ledger.reserve(Cost(1, 5, 5, 11), now=2.0) is None
    assert ledger.reserve(Cost(1, 5, 500, 10), now=2.0) is not None


def test_a_guess_of_output_does_not_keep_out_a_prompt_that_fits() -> None:
    ledger = Ledger(tokens=100, output_counts=True)
    assert ledger.reserve(Cost(1, 60, 4096, 60), now=0.0) is not None
    assert ledger.open_output == 40, "what the prompt leaves of the limit"
    assert ledger.reserve(Cost(1, 0, 0, 1), now=0.0) is None


def test_a_long_answer_waits_for_an_empty_window() -> None:
    ledger = Ledger(output_tokens=100, window=WINDOW, guard=GUARD)
    send(ledger, Cost(1, 0, 5), 0.0).settle(Cost(1, 0, 5), now=0.0)
    assert ledger.reserve(Cost(1, 0, 4096), now=WINDOW - 0.25) is None
    assert ledger.reserve(Cost(1, 0, 4096), now=WINDOW) is not None
    assert ledger.reserve(Cost(1, 0, 1), now=WINDOW) is None, "nothing goes beside it"


def test_one_answer_that_may_be_longer_than_the_limit_goes_alone() -> None:
    """The margin for long answers must not keep out for ever whoever is the first."""
    ledger = Ledger(output_tokens=100, z=1.645)
    assert ledger.reserve(Cost(1, 0, 90), now=0.0, variance=10_000.0) is not None
    assert ledger.reserve(Cost(1, 0, 1), now=0.0) is None


def test_the_margin_is_held_once_for_all_answers_together() -> None:
    """Four with a deviation of 10 are off by 20 together, and not by 40."""
    ledger = Ledger(output_tokens=100, z=1.0)
    for _ in range(4):
        assert ledger.reserve(Cost(1, 0, 20), now=0.0, variance=100.0) is not None
    assert ledger.reserve(Cost(1, 0, 1), now=0.0) is None
    other = Ledger(output_tokens=99, z=1.0)
    admitted = [other.reserve(Cost(1, 0, 20), now=0.0, variance=100.0) is not None for _ in range(4)]
    assert admitted == [True, True, True, False]


def test_output_goes_a_window_after_it_came_whatever_goes_before_the_last_of_it() -> None:
    ledger = Ledger(requests=10, output_tokens=100, window=WINDOW, guard=GUARD)
    reservation = send(ledger, Cost(1, 0, 20), 1.0)
    for at, total in ((1.0, 5), (2.0, 9)):
        reservation.produced(total, mean=0, variance=0.0, now=at)
        ledger.expire(at)
    seen = [(ledger.next_expiry(now), ledger.output_used) for now in (2.0, 1.0 + WINDOW, 1.0 + SPAN)]
    assert seen == [(1.0 + WINDOW, 9), (1.0 + SPAN, 4), (2.0 + WINDOW, 4)]


def test_what_has_come_is_promised_no_more() -> None:
    ledger = Ledger(output_tokens=100, window=WINDOW, z=1.0)
    reservation = send(ledger, Cost(1, 0, 50), 0.0)
    reservation.produced(30, mean=10, variance=16.0, now=1.0)
    reservation.produced(20, mean=10, variance=16.0, now=1.5)
    assert (ledger.output_used, ledger.open_output, ledger.open_variance) == (30, 10, 16.0), "what has come, has come"
    assert ledger.reserve(Cost(1, 0, 57), now=2.0) is None
    assert ledger.reserve(Cost(1, 0, 56), now=2.0) is not None


def test_nothing_is_heard_of_an_answer_after_it_was_settled() -> None:
    ledger = Ledger(input_tokens=100, output_tokens=100)
    reservation = send(ledger, Cost(1, 10, 50), 0.0)
    reservation.settle(Cost(1, 10, 20), now=1.0)
    reservation.produced(90, mean=5, variance=1.0, now=2.0)
    reservation.correct(input_tokens=90, tokens=90, now=2.0)
    reservation.postpone(2.0, now=2.0)
    assert repr(ledger) == "<Ledger requests 1, input 10/100, output 20/100 + 0 open>"
    assert ledger.next_expiry(2.0) == 60.25


def test_an_answer_that_was_given_up_stays_open_for_as_long_as_it_may_be_produced() -> None:
    ledger = Ledger(output_tokens=100, window=WINDOW)
    reservation = send(ledger, Cost(1, 0, 60), 0.0)
    reservation.produced(10, mean=50, variance=0.0, now=1.0)
    reservation.settle(Cost(1, 0, 10), now=2.0, until=5.0)
    assert (ledger.open_count, ledger.open_output) == (1, 50)
    assert ledger.reserve(Cost(1, 0, 41), now=5.0 - 0.25) is None
    assert ledger.next_expiry(2.0) == 5.0
    assert ledger.reserve(Cost(1, 0, 41), now=5.0) is not None
    assert ledger.open_count == 1


def test_of_several_answers_that_were_given_up_each_stays_open_until_its_own_end() -> None:
    ledger = Ledger(output_tokens=100, window=WINDOW)
    for until in (9.0, 2.0, 4.0):
        send(ledger, Cost(1, 0, 10), 0.0).settle(Cost(1, 0, 0), now=0.0, until=until)
    assert [(ledger.next_expiry(now), ledger.open_output) for now in (0.0, 2.0, 4.0, SPAN, 9.0)] == [
        (2.0, 30),
        (4.0, 20),
        (SPAN, 10),
        (9.0, 10),
        (None, 0),
    ]


def test_an_answer_that_must_have_ended_by_now_leaves_nothing_open() -> None:
    ledger = Ledger(output_tokens=100)
    send(ledger, Cost(1, 0, 60), 0.0).settle(Cost(1, 0, 10), now=2.0, until=2.0)
    assert (ledger.open_count, ledger.open_output) == (0, 0)


def test_the_vendors_count_of_a_prompt_takes_the_place_of_ours() -> None:
    ledger = Ledger(input_tokens=100, tokens=200)
    reservation = send(ledger, Cost(1, 40, 0, 50), 0.0)
    reservation.correct(input_tokens=60, tokens=70, now=1.0)
    assert (ledger.input_used, ledger.tokens_used) == (60, 70)
    reservation.settle(Cost(1, 30, 0, 30), now=1.0)
    assert (ledger.requests_used, ledger.input_used, ledger.tokens_used) == (1, 30, 30)


def test_the_vendors_count_changes_nothing_after_the_window() -> None:
    ledger = Ledger(input_tokens=100, window=WINDOW, guard=GUARD)
    reservation = send(ledger, Cost(1, 40), 0.0)
    reservation.correct(input_tokens=90, tokens=0, now=SPAN)
    assert ledger.next_expiry(SPAN) is None
    assert ledger.input_used == 0


def test_the_vendors_count_also_reaches_what_is_held_by_another_beyond_its_window() -> None:
    """Both are one entry; as long as one of them has not left, it counts, and what is changed of it must add up."""
    ledger = Ledger(input_tokens=100, window=WINDOW, guard=GUARD, grain=0.5)
    left, held = send(ledger, Cost(1, 10), 0.0), ledger.reserve(Cost(1, 5), now=0.0)
    assert held is not None
    left.correct(input_tokens=20, tokens=0, now=SPAN)
    left.settle(NOTHING, now=SPAN)
    held.settle(NOTHING, now=SPAN)
    assert (ledger.requests_used, ledger.input_used) == (0, 0)


def test_a_count_of_the_prompt_below_nothing_makes_no_capacity() -> None:
    ledger = Ledger(input_tokens=100, tokens=200)
    send(ledger, Cost(1, 40, 0, 50), 0.0).correct(input_tokens=-5, tokens=-5, now=1.0)
    assert (ledger.input_used, ledger.tokens_used) == (0, 0)


# -- when a request arrived ------------------------------------------------------------------------------------------


def test_a_request_that_arrived_late_counts_a_window_from_then() -> None:
    ledger = Ledger(requests=1, window=WINDOW, guard=GUARD)
    reservation = send(ledger, Cost(), 0.0)
    reservation.postpone(2.0, now=3.0)
    assert ledger.reserve(Cost(), now=2.0 + WINDOW - 0.25) is None
    ledger.expire(3.0 + SPAN)
    assert ledger.requests_used == 0


def test_a_request_that_arrived_late_counts_with_those_that_left_then() -> None:
    ledger = Ledger(requests=5, input_tokens=100, window=WINDOW, guard=GUARD)
    reservation = send(ledger, Cost(1, 10), 0.0)
    for at in (1.0, 2.0, 3.0):
        send(ledger, Cost(1, 20), at)
    reservation.postpone(2.25, now=3.0)
    assert (ledger.next_expiry(3.0), ledger.requests_used) == (1.0 + SPAN, 4)
    assert (ledger.next_expiry(1.0 + SPAN), ledger.requests_used) == (2.0 + SPAN, 3)
    ledger.expire(2.0 + SPAN)
    assert (ledger.requests_used, ledger.input_used) == (1, 20)
    reservation.settle(Cost(1, 90), now=2.0 + SPAN)
    assert ledger.input_used == 20, "its window is over"


@pytest.mark.parametrize("arrived", [-1.0, 0.0, 0.25])
def test_a_request_that_arrived_within_the_guard_keeps_its_place(arrived: float) -> None:
    ledger = Ledger(requests=1, window=WINDOW, guard=GUARD)
    send(ledger, Cost(), 0.0).postpone(arrived, now=1.0)
    assert ledger.next_expiry(1.0) == SPAN


def test_a_request_whose_window_is_over_is_not_postponed() -> None:
    ledger = Ledger(requests=1, window=WINDOW, guard=GUARD)
    send(ledger, Cost(), 0.0).postpone(5.0, now=SPAN)
    assert ledger.next_expiry(SPAN) is None
    assert ledger.requests_used == 0


def test_a_request_that_has_not_left_is_not_postponed() -> None:
    ledger = Ledger(requests=1, window=WINDOW, guard=GUARD)
    reservation = ledger.reserve(Cost(), now=0.0)
    assert reservation is not None
    reservation.postpone(2.0, now=2.0)
    assert ledger.next_expiry(2.0) == SPAN


def test_a_request_that_arrived_late_did_so_in_every_window() -> None:
    minute, burst = Ledger(requests=5, window=WINDOW, guard=GUARD), Ledger(requests=5, window=4.0, guard=0.0)
    reservation, reservation_of_burst = send(minute, Cost(), 0.0), send(burst, Cost(), 0.0)
    reservation.also = reservation_of_burst
    reservation.postpone(2.0, now=2.0)
    assert (minute.next_expiry(2.0), burst.next_expiry(2.0)) == (2.0 + SPAN, 6.0)


def test_a_request_that_waits_under_a_guard_made_shorter_stands_behind_those_before_it() -> None:
    """Else what is behind it would expire before it, and be seen late."""
    ledger = Ledger(requests=5, window=WINDOW, guard=GUARD)
    waiting = ledger.reserve(Cost(), now=0.0)
    assert waiting is not None
    ledger.guard = 3.0
    send(ledger, Cost(), 8.0)
    ledger.guard = GUARD
    ledger.expire(SPAN)
    expiries = [entry.expiry for entry in ledger._log]
    assert expiries == sorted(expiries)


# -- what others use -------------------------------------------------------------------------------------------------


def test_what_others_used_goes_evenly_over_a_window() -> None:
    ledger = Ledger(requests=100, window=60.0, guard=GUARD)
    ledger.add_foreign("requests", 60, now=0.0)
    known = []
    for second in range(0, 65, 5):
        ledger.expire(float(second))
        known.append(ledger.foreign.requests)
        assert ledger.requests_used == ledger.foreign.requests
    # The first at 1 s: a guard late, and rounded to steps of a second.
    assert known == [60, 55, 50, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0]
    ledger.expire(62.0)
    assert ledger.foreign.requests == 0


@given(st.lists(st.tuples(ticks, st.sampled_from(DIMENSIONS), st.integers(1, 200), st.floats(0.0, 3.0)), max_size=20))
def test_what_is_learnt_of_others_adds_up_and_is_gone_a_window_later(
    plan: list[tuple[float, Dimension, int, float]],
) -> None:
    """However long the guard is meanwhile."""
    ledger = Ledger(requests=100, window=WINDOW, guard=GUARD)
    now = 0.0
    for seconds, dimension, change, guard in plan:
        now += seconds
        ledger.guard = guard
        ledger.expire(now)
        before = getattr(ledger.foreign, dimension)
        ledger.add_foreign(dimension, change, now=now)
        assert getattr(ledger.foreign, dimension) == before + change
        assert len(ledger._foreign) <= 90
    ledger.expire(now + WINDOW + 3.0 + 2 * WINDOW / 60)
    assert ledger.foreign == type(ledger.foreign)(inf)
    assert [ledger.used(dimension) for dimension in DIMENSIONS] == [0, 0, 0, 0]


def test_what_others_used_counts_a_guard_longer_too() -> None:
    ledger = Ledger(requests=100, window=60.0, guard=0.75)
    ledger.add_foreign("requests", 60, now=10.0)
    assert ledger.next_expiry(10.0) == 12.0, "a second and the guard, rounded to steps of a second"
    assert ledger.next_expiry(70.75) == 71.0
    assert ledger.next_expiry(71.0) is None


def test_what_others_used_is_let_go_of_when_it_is_the_first_to_go() -> None:
    """Also while something of our own goes before the last of it."""
    ledger = Ledger(requests=100, window=60.0, guard=0.0)
    ledger.add_foreign("requests", 60, now=0.0)
    send(ledger, Cost(), 0.0)
    ledger.expire(0.5)
    assert ledger.next_expiry(0.5) == 1.0


def test_less_is_taken_off_everything_that_was_known_of_others() -> None:
    ledger = Ledger(requests=1000, window=60.0, guard=0.0)
    ledger.add_foreign("requests", 600, now=0.0)
    ledger.add_foreign("requests", -300, now=0.0)
    assert ledger.foreign.requests == 300
    ledger.expire(30.0)
    assert 145 <= ledger.foreign.requests <= 160, "it still goes evenly"
    ledger.add_foreign("requests", -1000, now=30.0)
    assert ledger.foreign.requests == ledger.requests_used == 0


def test_of_others_nothing_can_be_taken_that_was_not_known() -> None:
    ledger = Ledger(requests=10, input_tokens=10)
    ledger.add_foreign("input_tokens", 5, now=0.0)
    ledger.add_foreign("requests", -5, now=0.0)
    assert repr(ledger) == "<Ledger requests 0/10, input 5/10, output 0 + 0 open>"


# -- what was sent of late -------------------------------------------------------------------------------------------


def test_what_was_sent_and_produced_of_late_is_told() -> None:
    ledger = Ledger(requests=10, output_tokens=100, window=WINDOW, guard=GUARD, output_counts=True)
    first, refunded, second = (send(ledger, Cost(1, 10, 5, 10), at) for at in (0.0, 1.0, 2.0))
    first.produced(7, mean=0, variance=0.0, now=1.0)
    second.produced(9, mean=0, variance=0.0, now=3.0)
    refunded.settle(NOTHING, now=3.0)
    ledger.add_foreign("requests", 5, now=3.0)
    assert ledger.recent(-1.0) == (2, 20, 16, 36)
    assert ledger.recent(0.0) == (1, 10, 16, 26)
    assert ledger.recent(0.75) == (1, 10, 16, 26), "output counts no guard"
    assert ledger.recent(1.0) == (1, 10, 9, 19)
    assert ledger.recent(3.0) == (0, 0, 0, 0)


# -- looking ahead ---------------------------------------------------------------------------------------------------


def ahead(*, lead: float = 0.0, speed: float = 10.0) -> Ledger:
    """A ledger of 1000 output tokens, 500 of them produced at 0 and 400 at 4."""
    ledger = Ledger(output_tokens=1000, window=WINDOW, guard=GUARD)
    send(ledger, Cost(1, 0, 500), 0.0).settle(Cost(1, 0, 500), now=0.0)
    send(ledger, Cost(1, 0, 400), 4.0).settle(Cost(1, 0, 400), now=4.0)
    ledger.lead, ledger.speed = lead, speed
    return ledger


def test_what_will_have_expired_when_output_is_produced_is_free_for_it() -> None:
    """Of 140 tokens at 100 a second the last comes 1.4 s from now."""
    assert ahead(speed=100.0).reserve(Cost(1, 0, 140), now=WINDOW - 1.5) is None
    assert ahead(speed=100.0).reserve(Cost(1, 0, 140), now=WINDOW - 1.25) is not None
    assert ahead(speed=100.0, lead=0.25).reserve(Cost(1, 0, 140), now=WINDOW - 1.5) is not None
    assert ahead(speed=0.0).reserve(Cost(1, 0, 140), now=WINDOW - 0.25) is None, "a speed of 0 does not look ahead"


@pytest.mark.parametrize(("open_output", "speed"), [(30, 600.0), (430, 100.0)])
def test_only_as_much_is_promised_as_will_have_expired(open_output: int, speed: float) -> None:
    """600 are free a second from now, and 1000 five seconds from now; and 30 may be overbooked."""
    for mean, fits in ((600, True), (601, False)):
        ledger = ahead(speed=speed)
        ledger.open_output = open_output
        assert (ledger.reserve(Cost(1, 0, mean), now=WINDOW - 1.0) is not None) == fits


def test_a_little_more_is_promised_than_is_free() -> None:
    """Promises hold a margin that is mostly given back."""
    assert ahead(speed=1e9).reserve(Cost(1, 0, 130), now=5.0) is not None
    assert ahead(speed=1e9).reserve(Cost(1, 0, 131), now=5.0) is None
    assert ahead(speed=0.0).reserve(Cost(1, 0, 101), now=5.0) is None


def test_nothing_is_promised_while_nothing_at_all_is_free() -> None:
    ledger = ahead(speed=1e9)
    send(ledger, Cost(1, 0, 100), 5.0).settle(Cost(1, 0, 100), now=5.0)
    assert ledger.reserve(Cost(1, 0, 1), now=5.0) is None


@pytest.mark.parametrize(("seen_at", "admitted"), [(0.0, False), (1.0, False), (1.4, True)])
def test_what_streams_have_produced_since_somebody_looked_may_have_used_up_what_is_free(
    seen_at: float, admitted: bool
) -> None:
    """100 are free, 20 of them for good. Two streams have 10 tokens a second, also in 0.3 s of the request's way."""
    ledger = ahead(speed=10.0)
    ledger.producing, ledger.seen_at = 2, seen_at
    assert (ledger.reserve(Cost(1, 0, 110), now=4.9) is not None) == admitted


def test_what_others_produced_and_will_have_expired_is_free_too() -> None:
    ledger = Ledger(output_tokens=1000, window=60.0, guard=0.0)
    ledger.add_foreign("output_tokens", 900, now=0.0)
    ledger.speed, ledger.lead = 1e9, 20.0
    assert ledger.reserve(Cost(1, 0, 450), now=0.0) is None
    assert ledger.reserve(Cost(1, 0, 400), now=0.0) is not None, "30 are overbooked, and some 280 gone in 20 s"


def test_the_wait_is_that_until_output_may_be_promised() -> None:
    """Else a deadline would be called hopeless that can be met."""
    ledger = ahead(speed=100.0)
    assert time_until([ledger], Cost(1, 0, 140), now=5.0) == pytest.approx(WINDOW - 1.4 - 5.0)
    assert time_until([ledger], Cost(1, 0, 130), now=5.0) == 0.0
    send(ledger, Cost(1, 0, 100), 5.0).settle(Cost(1, 0, 100), now=5.0)
    assert time_until([ledger], Cost(1, 0, 140), now=5.0) == WINDOW - 5.0, "something has to be free"


# -- coalescing ------------------------------------------------------------------------------------------------------


def test_entries_of_a_grain_are_one_with_the_later_expiry() -> None:
    ledger = Ledger(requests=1000, input_tokens=1000, window=WINDOW, guard=GUARD, grain=0.5)
    for at in (0.0, 0.25, 0.5, 0.75):
        send(ledger, Cost(1, 10), at)
    assert [(entry.expiry, entry.requests, entry.input_tokens) for entry in ledger._log] == [
        (0.25 + SPAN, 2, 20),
        (0.75 + SPAN, 2, 20),
    ]


def test_a_log_with_a_grain_has_a_bounded_length_however_much_goes_through() -> None:
    ledger = Ledger(requests=10**9, output_tokens=10**9, window=WINDOW, grain=0.25, output_grain=0.125)
    for number in range(10_000):
        send(ledger, Cost(1, 10, 10), number / 500).settle(Cost(1, 10, 10), now=number / 500)
    assert len(ledger._log) <= (WINDOW + GUARD) / 0.25 + 2
    assert len(ledger._produced) <= WINDOW / 0.125 + 2


def test_a_refund_of_all_that_is_in_a_grain_ends_it() -> None:
    """What comes next has an entry of its own, and not one that was taken out."""
    ledger = Ledger(requests=10, window=WINDOW, guard=GUARD, grain=0.5)
    send(ledger, Cost(), 0.0).settle(NOTHING, now=0.0)
    send(ledger, Cost(), 0.25)
    assert ledger.next_expiry(0.25) == 0.25 + SPAN
    assert ledger.requests_used == 1


# -- limits and guards that change -----------------------------------------------------------------------------------


def test_a_limit_that_is_learnt_binds_from_then_on() -> None:
    ledger = Ledger()
    early = send(ledger, Cost(1, 10, 10), 0.0)
    ledger.set_limit("requests", 1)
    assert ledger.bounded
    early.settle(Cost(1, 90, 5), now=1.0)
    assert (ledger.requests_used, ledger.output_used) == (0, 0), "what went before was not written down"
    assert send(ledger, Cost(), 1.0) is not None
    assert ledger.reserve(Cost(), now=1.0) is None
    ledger.set_limit("requests", None)
    assert not ledger.bounded
    assert ledger.reserve(Cost(), now=1.0) is not None


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_each_limit_can_be_read_and_set(dimension: Dimension) -> None:
    ledger = Ledger()
    ledger.set_limit(dimension, 7)
    assert {each: ledger.limit(each) for each in DIMENSIONS} == dict.fromkeys(DIMENSIONS, None) | {dimension: 7}


def test_a_longer_guard_counts_for_what_is_sent_from_then_on() -> None:
    ledger = Ledger(requests=5, window=WINDOW, guard=GUARD)
    send(ledger, Cost(), 0.0)
    ledger.guard = 1.0
    send(ledger, Cost(), 0.5)
    ledger.guard = GUARD
    send(ledger, Cost(), 1.0)
    assert ledger.guard == GUARD
    assert ledger.next_expiry(1.0) == SPAN
    assert ledger.next_expiry(SPAN) == 0.5 + WINDOW + 1.0
    assert ledger.requests_used == 2, "whoever is behind a longer one waits for it"


# -- who may pass ----------------------------------------------------------------------------------------------------


@given(
    limits=st.tuples(limits, limits, limits, limits),
    output_counts=st.booleans(),
    plan=sends,
    foreign=st.integers(0, 6),
    head=four_costs,
    cost=four_costs,
)
def test_who_may_pass_does_not_delay_the_head_and_who_may_not_would(
    limits: tuple[int | None, int | None, int | None, int | None],
    output_counts: bool,
    plan: list[tuple[float, Cost, int]],
    foreign: int,
    head: Cost,
    cost: Cost,
) -> None:
    ledger = of_limits(limits, output_counts=output_counts)
    now = fill(ledger, plan)
    ledger.add_foreign("tokens", foreign, now=now)
    wait = time_until([ledger], head, now=now)
    passed = deepcopy(ledger)
    reservation = passed.reserve(cost, now=now)
    assume(wait < inf and reservation is not None)
    # Until it has ended it counts as what it was expected to be.
    on_time = passed.reserve(head, now=now + wait + 1e-9) is not None
    assert ledger.leaves_room(head, cost, now=now) == on_time


def test_whoever_can_never_go_is_not_waited_for() -> None:
    assert Ledger(requests=1).leaves_room(Cost(2), Cost(1), now=0.0)


# -- every dimension in its own log ----------------------------------------------------------------------------------


def books(ledger: Ledger, now: float) -> tuple[int, ...]:
    """What is used of every dimension, and what the logs add up to: the same."""
    ledger.expire(now)
    used = tuple(ledger.used(dimension) for dimension in DIMENSIONS)
    entries = [entry for entry in chain(ledger._log, ledger._produced, ledger._foreign) if entry.expiry != GONE]
    assert used == tuple(sum(getattr(entry, dimension) for entry in entries) for dimension in DIMENSIONS)
    return used


@pytest.mark.parametrize("grain", [0.0, 0.5])
def test_a_request_that_leaves_late_takes_all_that_it_holds_along(grain: float) -> None:
    ledger = of_limits((9, 99, 99, 99), grain=grain)
    early = ledger.reserve(Cost(1, 3, 0, 4), now=0.0)
    late = ledger.reserve(Cost(1, 5, 0, 7), now=0.0)
    assert early is not None
    assert late is not None
    early.sent(0.0)
    late.sent(4.0)
    assert books(ledger, 4.0) == (2, 8, 0, 11)
    assert books(ledger, SPAN + grain) == (1, 5, 0, 7)
    assert books(ledger, 4.0 + SPAN + grain) == (0, 0, 0, 0)


def test_output_of_one_grain_goes_together_and_counts_in_both_of_its_dimensions() -> None:
    ledger = of_limits((None, None, 999, 999), output_counts=True, output_grain=0.5)
    reservation = send(ledger, Cost(1, 0, 10, 2), 0.0)
    for now, total in ((1.0, 3), (1.25, 10), (1.75, 11)):
        reservation.produced(total, mean=5, variance=1.0, now=now)
    assert books(ledger, 1.75) == (1, 0, 11, 13)
    assert len(ledger._produced) == 2
    # Whatever came in a grain goes when its last did.
    assert books(ledger, 1.0 + WINDOW) == (0, 0, 11, 11)
    assert books(ledger, 1.25 + WINDOW) == (0, 0, 1, 1)
    assert books(ledger, 1.75 + WINDOW) == (0, 0, 0, 0)


def test_an_attempt_that_counts_in_two_windows_is_the_same_in_both() -> None:
    pair = [of_limits((9, 99, 99, 99), output_counts=True) for _ in range(2)]
    one, other = (ledger.reserve(Cost(1, 5, 8, 5), now=0.0) for ledger in pair)
    assert one is not None
    assert other is not None
    one.also = other
    steps: tuple[Callable[[], None], ...] = (
        lambda: one.sent(1.0),
        lambda: one.correct(input_tokens=7, tokens=6, now=2.0),
        lambda: one.produced(3, mean=4, variance=2.0, now=3.0),
        lambda: one.postpone(3.5, now=4.0),
        lambda: one.settle(Cost(1, 6, 9, 6), now=5.0),
    )
    seen = []
    for now, step in enumerate(steps, 1):
        step()
        first, second = ((*books(ledger, now), ledger.open_output, ledger.open_variance) for ledger in pair)
        assert first == second
        seen.append(first)
    assert seen == [
        (1, 5, 0, 5, 8, 0.0),
        (1, 7, 0, 6, 8, 0.0),
        (1, 7, 3, 9, 4, 2.0),
        (1, 7, 3, 9, 4, 2.0),
        (1, 6, 9, 15, 0, 0.0),
    ]
    assert [books(ledger, 3.5 + WINDOW - 0.01)[0] for ledger in pair] == [1, 1], "it counts from when it arrived"


def test_what_is_open_of_several_answers_is_their_sum_until_the_last_ends() -> None:
    ledger = of_limits((None, None, 999, None))
    first, second = (ledger.reserve(Cost(1, 0, mean), now=0.0, variance=float(mean)) for mean in (10, 20))
    assert first is not None
    assert second is not None
    assert (ledger.open_output, ledger.open_variance) == (30, 30.0)
    first.settle(Cost(1, 0, 1), now=1.0)
    assert (ledger.open_output, ledger.open_variance) == (20, 20.0)
    second.settle(Cost(1, 0, 1), now=1.0)
    assert (ledger.open_output, ledger.open_variance) == (0, 0.0)


def test_a_successor_keeps_what_others_used_and_forgets_each_when_its_time_is_over() -> None:
    ledger = of_limits((9, 99, None, None))
    send(ledger, Cost(1, 5), 0.0)
    ledger.add_foreign("input_tokens", 30, now=2.0)
    heir = ledger.successor(3.0)
    used = books(heir, 3.0)
    assert used == books(ledger, 3.0)
    assert used[1] > 30, "it comes back over a window"
    assert heir.foreign == ledger.foreign
    assert books(heir, SPAN)[0] == 0
    assert books(heir, 2.0 + SPAN + WINDOW) == (0, 0, 0, 0)
    assert books(ledger, 3.0) == used, "the old one is none the poorer"


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_a_wait_is_for_what_comes_back_of_its_own_dimension(dimension: Dimension) -> None:
    """Of three requests the second holds nearly all of the dimension, and the others of everything else."""
    much, little = {name: (9 if name == dimension else 1) for name in DIMENSIONS}, dict.fromkeys(DIMENSIONS, 1)
    ledger = of_one(dimension, 12)
    for sent_at, cost in ((0.0, little), (1.0, much), (2.0, little)):
        made = Cost(cost["requests"], cost["input_tokens"], cost["output_tokens"], cost["tokens"])
        send(ledger, made, sent_at).settle(made, now=sent_at)
    span = WINDOW if dimension == "output_tokens" else SPAN
    # One is free; one more is so when the first goes, and nine when the second does.
    returns: tuple[tuple[int, float | None], ...] = ((1, None), (2, 0.0), (3, 1.0), (11, 1.0), (12, 2.0))
    for need, at in returns:
        asked = Cost(**{"requests": 0, "input_tokens": 0, "output_tokens": 0, "tokens": 0, dimension: need})
        assert time_until([ledger], asked, now=3.0) == (0.0 if at is None else span + at - 3.0), need
