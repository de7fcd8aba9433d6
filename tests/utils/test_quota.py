"""A quota's books: any life of a reservation against what it should weigh, and what answers and refusals teach."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import deepcopy
from enum import Enum
from math import inf
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from llm.core.exceptions import LLMConnectionError, LLMException, LLMProviderError, LLMRateLimitError, LLMTimeoutError
from llm.core.settings import LimitSettings
from llm.core.types import Cost, Counting, LimitState, ObservedLimits, Settlement, Usage
from llm.testing.journal import check_window
from llm.utils.appraisal import charge
from llm.utils.quota import SHARED_SECONDS, Quota
from llm.utils.sliding_window import DIMENSIONS, NOTHING, Dimension, Ledger, Reservation

WINDOW, BURST, DAY = 8.0, 2.0, 86_400.0
ticks = st.integers(0, 12).map(lambda quarters: quarters / 4)
limits = st.none() | st.integers(1, 12)
costs = st.builds(Cost, st.just(1), st.integers(0, 5), st.integers(0, 6), st.integers(0, 5))

# -- the life of a reservation ---------------------------------------------------------------------------------------


class State(Enum):
    """How far an attempt is. One that is QUEUED has no reservation yet."""

    GRANTED = "granted"
    SENT = "sent"
    STREAMING = "streaming"
    SETTLED = "settled"


ENDS: dict[str, BaseException | None] = {
    "success": None,
    "success without figures": None,
    "refused": LLMRateLimitError("slow down", status=429, sent=True),
    "invalid": LLMProviderError("no", status=400, sent=True),
    "unknown key": LLMProviderError("no", status=401, sent=True),
    "overloaded": LLMProviderError("later", status=529, sent=True),
    "broken": LLMProviderError("oh", status=500, sent=True),
    "no connection": LLMConnectionError("nobody there"),
    "too slow": LLMTimeoutError("enough", sent=True),
    "cancelled": asyncio.CancelledError(),
}


class Attempt:
    """One attempt as the oracle remembers it."""

    def __init__(self, reservation: Reservation, cost: Cost) -> None:
        self.reservation = reservation
        self.cost = cost
        self.state = State.GRANTED
        self.sent_at = 0.0
        self.produced = 0
        self.costs = cost
        self.until = -inf


def has(*states: State) -> Callable[[Any], bool]:
    """Whether there is an attempt in one of *states*."""
    return lambda machine: any(attempt.state in states for attempt in machine.all)


LIVE = (State.GRANTED, State.SENT, State.STREAMING)


class QuotaMachine(RuleBasedStateMachine):
    """Attempts that are granted, sent, streamed, cancelled, failed and renewed in every state, in several windows."""

    @initialize(
        limits=st.tuples(limits, limits, limits, limits),
        day=st.tuples(st.none() | st.integers(1, 20), st.none() | st.integers(1, 40)),
        burst=st.sampled_from([None, BURST]),
        concurrent=st.none() | st.integers(1, 3),
        counting=st.builds(Counting, reserve_max=st.booleans(), rejected=st.booleans()),
        slow_start=st.booleans(),
    )
    def begin(
        self,
        limits: tuple[int | None, int | None, int | None, int | None],
        day: tuple[int | None, int | None],
        burst: float | None,
        concurrent: int | None,
        counting: Counting,
        slow_start: bool,
    ) -> None:
        self.limits = LimitSettings(
            requests_per_minute=limits[0],
            input_tokens_per_minute=limits[1],
            output_tokens_per_minute=limits[2],
            tokens_per_minute=limits[3],
            window_seconds=WINDOW,
            requests_per_day=day[0],
            tokens_per_day=day[1],
            concurrent_requests=concurrent,
            burst_seconds=burst,
        )
        self.counting = counting
        self.quota = Quota("q", self.limits, counting=counting, slow_start=slow_start)
        self.now = 100.0
        self.all: list[Attempt] = []

    @property
    def windows(self) -> list[Ledger]:
        return [self.quota.ledger, *self.quota._others]

    def under_way(self, *states: State) -> list[Attempt]:
        return [attempt for attempt in self.all if attempt.state in states]

    def pick(self, data: st.DataObject, *states: State) -> Attempt:
        return data.draw(st.sampled_from(self.under_way(*states)))

    def taken(self) -> list[tuple[object, ...]]:
        for ledger in self.windows:
            ledger.expire(self.now)
        return [
            (*(ledger.used(dimension) for dimension in DIMENSIONS), ledger.open_count, ledger.open_output)
            for ledger in self.windows
        ]

    @rule(seconds=ticks | st.sampled_from([8.0, 8.25, 61.0, DAY / 2]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(cost=costs)
    def reserve(self, cost: Cost) -> None:
        self.ask(cost)

    def ask(self, cost: Cost) -> None:
        quota, before, under_way = self.quota, self.taken(), self.quota.in_flight
        held_up = self.now < quota.paused_until or not quota.open
        held_up |= self.limits.concurrent_requests is not None and under_way >= self.limits.concurrent_requests
        fits = deepcopy(quota.ledger).reserve(cost, now=self.now) is not None
        for ledger in deepcopy(self.windows[1:]):
            fits &= ledger.reserve(at_most(cost, ledger), now=self.now) is not None
        reservation = quota.reserve(cost, now=self.now)
        if reservation is None:
            assert held_up or not fits
            assert self.taken() == before, "all of it in every window, or nothing"
            assert quota.in_flight == under_way
            return
        assert fits
        assert self.now >= quota.paused_until
        self.all.append(Attempt(reservation, cost))

    @precondition(has(State.GRANTED))
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        attempt = self.pick(data, State.GRANTED)
        attempt.reservation.sent(self.now)
        attempt.state, attempt.sent_at = State.SENT, self.now

    @precondition(has(State.SENT))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """The first token has come, and with it the vendor's count of the prompt."""
        attempt = self.pick(data, State.SENT)
        self.quota.began(attempt.reservation, attempt.sent_at, now=self.now)
        counted = data.draw(st.integers(0, attempt.cost.input_tokens))
        attempt.reservation.correct(input_tokens=counted, tokens=attempt.cost.tokens, now=self.now)
        attempt.state = State.STREAMING

    @precondition(has(State.STREAMING))
    @rule(data=st.data())
    def stream(self, data: st.DataObject) -> None:
        attempt = self.pick(data, State.STREAMING)
        attempt.produced = data.draw(st.integers(attempt.produced, attempt.cost.output_tokens))
        left = attempt.cost.output_tokens - attempt.produced
        attempt.reservation.produced(attempt.produced, mean=left, variance=0.0, now=self.now)

    @precondition(has(*LIVE))
    @rule(data=st.data(), end=st.sampled_from(sorted(ENDS)), seconds=ticks)
    def end(self, data: st.DataObject, end: str, seconds: float) -> None:
        self.settle(data, self.pick(data, *LIVE), end, seconds)

    @precondition(has(*LIVE))
    @rule(data=st.data(), end=st.sampled_from(sorted(ENDS)), seconds=ticks)
    def renew(self, data: st.DataObject, end: str, seconds: float) -> None:
        """A retry: it settles what it held and asks again, like anybody."""
        attempt = self.pick(data, *LIVE)
        self.settle(data, attempt, end, seconds)
        self.ask(attempt.cost)

    @precondition(has(State.SETTLED))
    @rule(data=st.data(), end=st.sampled_from(sorted(ENDS)))
    def end_again(self, data: st.DataObject, end: str) -> None:
        """A second settlement, or a word that comes after it, changes nothing."""
        attempt = self.pick(data, State.SETTLED)
        before = self.taken(), self.quota.in_flight
        self.quota.settle(attempt.reservation, attempt.cost, now=self.now)
        attempt.reservation.sent(self.now)
        attempt.reservation.produced(99, mean=9, variance=9.0, now=self.now)
        assert (self.taken(), self.quota.in_flight) == before

    def settle(self, data: st.DataObject, attempt: Attempt, end: str, seconds: float) -> None:
        quota, error, cost = self.quota, ENDS[end], attempt.cost
        sent = attempt.state is not State.GRANTED
        usage, until = None, None
        if error is None and end == "success":
            usage = Usage(
                data.draw(st.integers(0, cost.input_tokens)),
                data.draw(st.integers(attempt.produced, max(attempt.produced, cost.output_tokens))),
            )
        settlement = Settlement(usage=usage, error=error)
        actual = charge(cost, settlement, sent=sent, produced=attempt.produced, counting=self.counting)
        assert actual == expected(end, cost, sent, attempt.produced, usage, self.counting)
        if sent and end == "refused":
            quota.refused(attempt.sent_at, retry_after=seconds, told=False, ramp=False, now=self.now)
            assert quota.paused_until > self.now
        elif sent and error is None:
            quota.accepted(attempt.sent_at)
        elif sent and (not isinstance(error, LLMException) or error.status is None):
            until = attempt.until = self.now + seconds
        quota.settle(attempt.reservation, actual, now=self.now, until=until)
        attempt.state, attempt.costs = State.SETTLED, actual

    @invariant()
    def as_many_are_under_way_as_have_not_ended(self) -> None:
        live = self.under_way(*LIVE)
        tails = [attempt for attempt in self.all if attempt.until > self.now]
        assert self.quota.in_flight == len(live)
        assert self.limits.concurrent_requests is None or len(live) <= self.limits.concurrent_requests
        self.taken()
        for ledger in [self.quota.ledger, *self.quota._spans]:
            assert ledger.open_count == len(live) + len(tails)

    @invariant()
    def no_window_is_overfull(self) -> None:
        sent = [
            (attempt.sent_at, attempt.costs.requests)
            for attempt in self.all
            if attempt.state is not State.GRANTED and attempt.costs.requests
        ]
        sent.sort()
        for limit, window in ((self.limits.requests_per_minute, WINDOW), (self.limits.requests_per_day, DAY)):
            if limit is not None:
                assert check_window(sent, limit, window) == 0

    def teardown(self) -> None:
        if not hasattr(self, "quota"):
            return
        for attempt in self.under_way(*LIVE):
            self.quota.settle(attempt.reservation, attempt.cost, now=self.now)
        self.now += 2 * DAY
        assert self.quota.in_flight == 0
        assert self.taken() == [(0, 0, 0, 0, 0, 0)] * len(self.windows), "nothing is left at the end"


def at_most(cost: Cost, ledger: Ledger) -> Cost:
    """What a further window is asked for: no more than it could ever hold."""
    input_tokens, tokens = ledger.limit("input_tokens"), ledger.limit("tokens")
    return Cost(
        cost.requests,
        min(cost.input_tokens, input_tokens) if input_tokens is not None else cost.input_tokens,
        cost.output_tokens,
        min(cost.tokens, tokens) if tokens is not None else cost.tokens,
    )


def expected(end: str, cost: Cost, sent: bool, produced: int, usage: Usage | None, counting: Counting) -> Cost:
    """The refund table (RATE_LIMITING §3.4), in words of its own."""
    if not sent:
        return NOTHING
    if end in {"invalid", "unknown key", "overloaded", "broken"}:
        return Cost(1, 0, 0, 0)
    if end == "refused":
        return Cost(1, 0, 0, 0) if counting.rejected else NOTHING
    if usage is not None and usage.total_tokens:
        counted = usage.input_tokens or cost.input_tokens
        return Cost(1, counted, usage.output_tokens, cost.tokens if counting.reserve_max else counted)
    if end.startswith("success"):
        return Cost(1, cost.input_tokens, produced or cost.output_tokens, cost.tokens)
    return Cost(1, cost.input_tokens, produced, cost.tokens)


QuotaMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestQuota = QuotaMachine.TestCase


# -- what a call takes -----------------------------------------------------------------------------------------------


class Rig:
    """A quota, and what it has told."""

    def __init__(
        self, limits: LimitSettings, *, slow_start: bool = False, guard: float = 0.25, reserve_max: bool = False
    ) -> None:
        self.told: list[tuple[Dimension | None, int]] = []
        self.quota = Quota(
            "pool group",
            limits,
            counting=Counting(reserve_max=reserve_max),
            guard=guard,
            slow_start=slow_start,
            told=lambda _, dimension, limit: self.told.append((dimension, limit)),
        )

    def send(self, now: float, cost: Cost = Cost()) -> Reservation:  # noqa: B008  a frozen value
        reservation = self.quota.reserve(cost, now=now)
        assert reservation is not None
        reservation.sent(now)
        return reservation

    def fill(self, now: float, most: int = 10_000) -> int:
        """Send as many as there is room for, and say how many."""
        for number in range(most):
            reservation = self.quota.reserve(Cost(), now=now)
            if reservation is None:
                return number
            reservation.sent(now)
        return most

    def hear(self, sent_at: float, now: float, **told: tuple[int, int | None]) -> None:
        """A request that left at *sent_at* is answered, with limits and what remains of them."""
        probe = self.quota.probe(now, since=sent_at) if sent_at != now else self.quota.probe(now)
        states = {dimension: LimitState(limit, remaining) for dimension, (limit, remaining) in told.items()}
        self.quota.observe(probe, replace(ObservedLimits(), **states), speed=0.0, now=now)

    def refuse(
        self, sent_at: float, now: float, *, retry_after: float = 0.0, told: bool = False, ramp: bool = False
    ) -> None:
        self.quota.refused(sent_at, retry_after=retry_after, told=told, ramp=ramp, now=now)

    def pass_minutes(self, now: float, minutes: int) -> float:
        """Let time pass with a probe a minute."""
        for _ in range(minutes):
            now += 60.0
            self.quota.probe(now)
        return now


def rig(*, slow_start: bool = False, guard: float = 0.25, reserve_max: bool = False, **numbers: float | None) -> Rig:
    return Rig(
        LimitSettings(**numbers),  # type: ignore[arg-type]  # counts are whole in every test
        slow_start=slow_start,
        guard=guard,
        reserve_max=reserve_max,
    )


def test_a_quota_shows_its_books_and_how_many_calls_are_under_way() -> None:
    limited = rig(requests_per_minute=5)
    limited.send(0.0, Cost(1, 10, 20))
    assert repr(limited.quota) == "<Quota pool group: <Ledger requests 1/5, input 10, output 0 + 20 open>, 1 under way>"


def test_no_more_calls_than_allowed_are_under_way_at_once() -> None:
    limited = rig(concurrent_requests=2)
    first = limited.send(0.0)
    limited.send(0.0)
    assert limited.quota.reserve(Cost(), now=0.0) is None
    assert limited.quota.opens_at(0.0) == inf, "only somebody's settling opens it"
    limited.quota.settle(first, Cost(), now=1.0)
    assert limited.quota.reserve(Cost(), now=1.0) is not None


def test_what_one_window_refuses_is_taken_of_no_other() -> None:
    limited = rig(requests_per_minute=10, requests_per_day=2, tokens_per_day=1000)
    limited.fill(0.0, 2)
    before = repr(limited.quota)
    assert limited.quota.reserve(Cost(), now=0.0) is None
    assert repr(limited.quota) == before
    assert limited.quota.opens_at(61.0) == 86_400.25
    assert limited.quota.reserve(Cost(), now=86_400.25) is not None


def test_a_day_counts_input_and_output_together() -> None:
    limited = rig(tokens_per_day=100)
    limited.quota.settle(limited.send(0.0, Cost(1, 40, 30, 40)), Cost(1, 40, 50, 40), now=1.0)
    assert limited.quota.reserve(Cost(1, 11, 0, 11), now=2.0) is None
    assert limited.quota.reserve(Cost(1, 10, 0, 10), now=2.0) is not None


def test_a_vendor_that_enforces_by_the_second_gets_a_seconds_share() -> None:
    limited = rig(requests_per_minute=600, burst_seconds=1.0)
    assert limited.fill(0.0) == 10
    assert limited.fill(0.5) == 0
    assert limited.fill(1.1) == 10


def test_less_than_one_request_in_a_burst_is_one_in_so_many_seconds() -> None:
    limited = rig(requests_per_minute=20, burst_seconds=1.0)
    assert [limited.fill(now) for now in (0.0, 1.0, 3.0, 3.2)] == [1, 0, 0, 1]


def test_a_share_that_is_no_whole_number_wastes_nothing() -> None:
    """100 a minute are 1.67 in a second: one in 0.6 s, and not one in a second."""
    limited = rig(requests_per_minute=100, burst_seconds=1.0)
    assert [limited.fill(now) for now in (0.0, 0.5, 0.7, 1.0, 1.4)] == [1, 0, 1, 0, 1]


def test_a_prompt_above_a_bursts_share_waits_until_the_burst_is_empty() -> None:
    """It fits a minute, so it must go at some time."""
    limited = rig(input_tokens_per_minute=600, tokens_per_minute=600, burst_seconds=1.0)
    limited.send(0.0, Cost(1, 1, 0, 1))
    assert limited.quota.reserve(Cost(1, 300, 0, 300), now=0.5) is None
    assert limited.quota.reserve(Cost(1, 300, 0, 300), now=1.1) is not None


def test_what_no_window_could_hold_is_said() -> None:
    limited = rig(input_tokens_per_minute=100)
    assert limited.quota.too_large(Cost(1, 101)) == ("input_tokens", 101, 100)
    assert limited.quota.too_large(Cost(1, 100)) is None
    daily = rig(tokens_per_day=100)
    assert daily.quota.too_large(Cost(1, 101, 0, 101)) == ("tokens", 101, 100)


def test_it_opens_when_the_first_thing_of_any_window_expires() -> None:
    limited = rig(requests_per_minute=600, burst_seconds=1.0)
    assert limited.quota.opens_at(0.0) == inf
    limited.send(0.0)
    assert 1.0 < limited.quota.opens_at(0.0) < 1.1
    assert limited.quota.opens_at(2.0) == 60.25


def test_who_may_pass_a_head_is_for_the_minute_to_say() -> None:
    limited = rig(requests_per_minute=10, input_tokens_per_minute=100)
    limited.send(0.0, Cost(1, 60))
    assert limited.quota.leaves_room(Cost(1, 60), Cost(1, 40), now=0.0)
    assert not limited.quota.leaves_room(Cost(1, 61), Cost(1, 40), now=0.0)


# -- limits that headers tell ----------------------------------------------------------------------------------------


def test_a_limit_that_nobody_configured_is_the_vendors() -> None:
    limited = rig()
    limited.hear(0.0, 0.0, requests=(50, 49), input_tokens=(1000, None))
    assert (limited.quota.ledger.limit("requests"), limited.quota.ledger.limit("input_tokens")) == (50, 1000)
    assert limited.told == [("requests", 50), ("input_tokens", 1000)]
    limited.hear(0.0, 0.0, requests=(60, 59))
    assert limited.quota.ledger.limit("requests") == 60
    assert limited.told[2:] == [("requests", 60)]


def test_a_configured_limit_is_lowered_to_the_vendors_and_never_raised() -> None:
    limited = rig(requests_per_minute=50)
    seen = []
    for told in (80, 40, 50, 80):
        limited.hear(0.0, 0.0, requests=(told, told))
        seen.append(limited.quota.ledger.limit("requests"))
    assert seen == [50, 40, 50, 50]
    assert limited.told == [("requests", 40), ("requests", 50)], "what stays the same is not told"


@pytest.mark.parametrize("state", [LimitState(), LimitState(0, 0), LimitState(None, 5)])
def test_headers_without_a_limit_teach_nothing(state: LimitState) -> None:
    limited = rig(requests_per_minute=50)
    assert not limited.quota.observe(limited.quota.probe(0.0), ObservedLimits(requests=state), speed=0.0, now=0.0)
    assert repr(limited.quota) == repr(rig(requests_per_minute=50).quota)


def test_combined_tokens_are_not_adopted_where_input_and_output_are_told_apart() -> None:
    """Anthropic's "tokens" is whichever of its other limits is the tightest."""
    limited = rig()
    limited.hear(0.0, 0.0, tokens=(1000, 1000), input_tokens=(1000, 1000), output_tokens=(500, 500))
    assert limited.quota.ledger.limit("tokens") is None
    other = rig()
    other.hear(0.0, 0.0, tokens=(1000, 1000))
    assert other.quota.ledger.limit("tokens") == 1000
    configured = rig(input_tokens_per_minute=1000, tokens_per_minute=1500)
    configured.hear(0.0, 0.0, tokens=(1200, 1200))
    assert configured.quota.ledger.limit("tokens") == 1200


def test_an_adopted_limit_stays_when_something_else_is_learnt() -> None:
    limited = rig(input_tokens_per_minute=1000)
    limited.hear(0.0, 0.0, input_tokens=(800, 800))
    limited.refuse(0.0, 1.0)
    limited.pass_minutes(1.0, 2)
    assert limited.quota.ledger.limit("input_tokens") == 800


# -- what others use -------------------------------------------------------------------------------------------------


def foreign(limited: Rig, dimension: Dimension = "requests") -> int:
    return int(getattr(limited.quota.ledger.foreign, dimension))


def test_a_header_that_our_own_books_can_explain_teaches_nothing() -> None:
    """Five left ten seconds ago, and three just now: the vendor may have counted these or not."""
    for used in (5, 6, 8):
        limited = rig(requests_per_minute=100)
        limited.fill(0.0, 5)
        limited.fill(10.0, 3)
        limited.hear(10.0, 10.5, requests=(100, 100 - used))
        assert foreign(limited) == 0
        assert not limited.quota.shared(10.5)


def test_what_is_beyond_our_own_books_was_used_by_others() -> None:
    limited = rig(requests_per_minute=100)
    limited.fill(0.0, 5)
    limited.hear(10.0, 10.0, requests=(100, 75))
    assert foreign(limited) == 20
    assert limited.quota.ledger.used("requests") == 25
    assert limited.fill(10.0) == 75
    assert limited.quota.shared(10.0)
    assert not limited.quota.shared(10.0 + SHARED_SECONDS)


def test_what_others_cannot_have_used_is_taken_back() -> None:
    limited = rig(requests_per_minute=100)
    limited.hear(0.0, 0.0, requests=(100, 60))
    assert foreign(limited) == 40
    limited.fill(1.0, 10)
    limited.hear(5.0, 5.0, requests=(100, 80))
    assert foreign(limited) == 10
    limited.hear(6.0, 6.0, requests=(100, 90))
    assert foreign(limited) == 0


def test_who_shares_a_quota_goes_on_until_we_hear_of_it_again() -> None:
    """Of 60 a minute, two in two seconds."""
    limited = rig(requests_per_minute=1000)
    limited.hear(0.0, 0.0, requests=(1000, 940))
    assert foreign(limited) == 60
    limited.hear(0.0, 0.0, requests=(1000, 939))
    assert foreign(limited) == 61 + 2


def test_tokens_are_rounded_by_vendors() -> None:
    limited = rig(input_tokens_per_minute=100_000)
    limited.send(0.0, Cost(1, 10_200))
    limited.hear(5.0, 5.0, input_tokens=(100_000, 89_500))
    assert foreign(limited, "input_tokens") == 0
    limited.hear(5.0, 5.0, input_tokens=(100_000, 85_000))
    assert foreign(limited, "input_tokens") == 15_000 - 10_200 - 500


def test_nothing_left_is_nothing_left() -> None:
    """And may be less than that: it is not rounded, and nothing is taken back by it."""
    limited = rig(input_tokens_per_minute=10_000)
    limited.hear(0.0, 0.0, input_tokens=(10_000, 0))
    assert limited.quota.ledger.used("input_tokens") == 10_000
    limited.quota.ledger.add_foreign("input_tokens", 5000, now=0.0)
    limited.hear(0.0, 0.0, input_tokens=(10_000, 0))
    assert limited.quota.ledger.used("input_tokens") == 15_000


def test_what_streams_may_have_produced_since_they_were_asked_is_our_own() -> None:
    limited = rig(output_tokens_per_minute=100_000)
    limited.send(0.0, Cost(1, 0, 5000))
    limited.quota.pulled_at = 0.0
    for speed, others in ((2000.0, 0), (0.0, 900)):
        copy = deepcopy(limited.quota)
        probe = copy.probe(0.5)
        headers = ObservedLimits(output_tokens=LimitState(100_000, 98_600))
        copy.observe(probe, headers, speed=speed, now=0.5)
        assert copy.ledger.foreign.output_tokens == others


# -- slow start ------------------------------------------------------------------------------------------------------


def test_where_nothing_is_known_the_first_goes_alone_and_then_twice_as_many_every_half_second() -> None:
    limited = rig(slow_start=True)
    went = 0
    sums = []
    for step in range(9):
        went += limited.fill(step / 4)
        sums.append(went)
    assert sums == [1, 1, 2, 2, 4, 5, 8, 11, 16]
    assert not limited.quota.open
    assert limited.told == [(None, 0)]


def test_a_slow_start_says_when_the_next_may_go() -> None:
    limited = rig(slow_start=True)
    limited.send(10.0)
    assert limited.quota.opens_at(10.0) == 10.5
    assert limited.quota.reserve(Cost(), now=10.4) is None
    limited.send(10.5)


def test_a_slow_start_is_never_slower_than_the_limits_themselves() -> None:
    """What returns of a quota that was used up returns at that rate."""
    limited = rig(slow_start=True, requests_per_minute=6025)
    limited.send(0.0)
    assert limited.quota.opens_at(0.0) == pytest.approx(0.01)


def test_a_slow_start_ends_with_the_first_request_of_it_that_is_not_refused() -> None:
    limited = rig(slow_start=True)
    reservation = limited.send(10.0)
    limited.quota.accepted(9.0)
    assert not limited.quota.open
    limited.quota.began(reservation, 10.0, now=10.1)
    assert limited.quota.open
    assert limited.fill(10.1, 100) == 100


def test_a_request_that_did_not_go_after_all_is_not_counted_by_a_slow_start() -> None:
    limited = rig(slow_start=True)
    reservation = limited.quota.reserve(Cost(), now=0.0)
    assert reservation is not None
    limited.quota.settle(reservation, NOTHING, now=0.0)
    assert limited.fill(0.0) == 1


def test_a_slow_start_takes_no_harm_from_requests_of_before_it_that_do_not_go() -> None:
    limited = rig(slow_start=True)
    limited.send(0.0)
    limited.quota.accepted(0.0)
    waiting = [limited.quota.reserve(Cost(), now=1.0) for _ in range(3)]
    limited.refuse(0.5, 2.0)
    for reservation in waiting:
        assert reservation is not None
        limited.quota.settle(reservation, NOTHING, now=2.0)
    assert limited.quota.opens_at(2.5) > 2.5
    assert limited.fill(limited.quota.paused_until) == 1


def test_a_slow_start_begins_again_after_a_refusal_that_the_books_do_not_explain() -> None:
    limited = rig(slow_start=True, requests_per_minute=100)
    limited.send(0.0)
    limited.quota.accepted(0.0)
    limited.fill(1.0, 10)
    limited.refuse(1.0, 2.0, retry_after=3.0)
    assert limited.fill(4.9) == 0
    assert limited.fill(5.0) == 1
    assert limited.told == [(None, 0), (None, 0)]


def test_a_slow_start_does_not_begin_again_when_the_limit_was_all_but_used_up() -> None:
    limited = rig(slow_start=True, requests_per_minute=100)
    limited.send(0.0)
    limited.quota.accepted(0.0)
    limited.fill(1.0, 95)
    limited.refuse(1.0, 2.0)
    assert limited.quota.open
    assert limited.fill(3.0) == 4


def test_without_slow_start_there_is_none() -> None:
    limited = rig(requests_per_minute=100)
    limited.fill(0.0, 5)
    limited.refuse(0.0, 1.0)
    assert limited.quota.open
    assert limited.fill(2.0) > 1


def test_with_old_news_only_a_part_of_a_minutes_requests_goes_before_there_is_some() -> None:
    """An eighth; then one goes alone, and whatever it brings lets the others go."""
    limited = rig(slow_start=True, requests_per_minute=80)
    limited.send(0.0)
    limited.hear(0.0, 0.1, requests=(80, 79))
    limited.quota.accepted(0.0)
    assert limited.fill(5.0, 50) == 12
    assert not limited.quota.open
    assert limited.quota.reserve(Cost(), now=5.25) is None
    limited.hear(5.0, 5.3, requests=(80, 67))
    assert limited.quota.open
    assert limited.fill(5.3, 50) == 50


def test_of_a_quota_that_others_use_too_only_one_goes_with_old_news() -> None:
    limited = rig(slow_start=True, requests_per_minute=80)
    limited.send(0.0)
    limited.quota.accepted(0.0)
    limited.hear(0.0, 0.1, requests=(80, 40))
    assert limited.fill(0.5, 30) == 30, "what is new is on its way"
    assert limited.fill(5.0, 5) == 1


def test_who_never_tells_what_is_left_is_not_waited_for() -> None:
    limited = rig(slow_start=True, requests_per_minute=80)
    limited.send(0.0)
    limited.quota.accepted(0.0)
    assert limited.fill(100.0) == 80


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_refusal_is_a_pause_and_each_in_a_row_doubles_it() -> None:
    limited = rig()
    pauses = []
    for number in range(8):
        now = 100.0 * (number + 1)
        limited.refuse(now - 1.0, now)
        pauses.append(limited.quota.paused_until - now)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    limited.quota.accepted(850.0)
    limited.refuse(899.0, 900.0)
    assert limited.quota.paused_until == 900.25
    assert limited.quota.reserve(Cost(), now=900.2) is None
    assert limited.quota.opens_at(900.2) == 900.25
    assert limited.quota.reserve(Cost(), now=900.25) is not None


def test_a_vendor_that_says_how_long_is_believed() -> None:
    limited = rig()
    limited.refuse(0.0, 1.0, retry_after=20.0)
    limited.refuse(0.5, 1.5, retry_after=5.0)
    assert limited.quota.paused_until == 21.0


def test_an_answer_to_a_request_of_before_a_refusal_does_not_end_the_row() -> None:
    limited = rig()
    limited.refuse(0.0, 1.0)
    limited.quota.accepted(0.5)
    limited.refuse(2.0, 3.0)
    assert limited.quota.paused_until == 3.5


def test_several_refusals_of_what_was_under_way_together_are_one() -> None:
    one, several = rig(requests_per_minute=100), rig(requests_per_minute=100)
    one.refuse(0.0, 1.0)
    for at in (1.0, 1.0, 1.0, 1.0):
        several.refuse(0.5, at)
    assert several.quota.paused_until == one.quota.paused_until
    assert several.fill(10.0) == one.fill(10.0) == 50


def test_a_refusal_that_is_explained_by_nothing_halves_what_may_go_in_five_seconds() -> None:
    limited = rig(requests_per_minute=120, input_tokens_per_minute=1200)
    limited.refuse(0.0, 1.0)
    assert limited.fill(10.0) == 60
    assert limited.fill(14.9) == 0
    limited.refuse(10.5, 14.9)
    assert limited.fill(20.0) == 30
    assert limited.quota.reserve(Cost(1, 600), now=100.0) is not None, "above its share: it had to wait for the rest"
    assert limited.quota.reserve(Cost(1, 1), now=100.0) is None


def test_the_allowance_is_never_below_an_even_flow() -> None:
    limited = rig(requests_per_minute=120)
    for number in range(10):
        limited.refuse(number + 0.5, number + 1.0)
    assert limited.fill(100.0) == 10


def test_the_allowance_is_regained_by_a_twentieth_a_minute() -> None:
    limited = rig(requests_per_minute=100)
    limited.refuse(0.0, 1.0)
    now = limited.pass_minutes(1.0, 2)
    assert 60 <= limited.fill(now) <= 61, "a part of one is one"
    limited = rig(requests_per_minute=100)
    limited.refuse(0.0, 1.0)
    now = limited.pass_minutes(1.0, 10)
    assert limited.fill(now) == 100


def test_a_refusal_that_headers_have_explained_leaves_the_allowance() -> None:
    limited = rig(requests_per_minute=100)
    limited.refuse(0.0, 1.0, told=True)
    assert limited.fill(10.0) == 100


def test_a_refusal_when_a_limit_was_all_but_used_up_makes_the_guard_longer() -> None:
    """It was a matter of moments: one came late, or the window's edge was hit."""
    limited = rig(requests_per_minute=10)
    limited.fill(0.0)
    limited.refuse(0.0, 1.0)
    assert limited.quota.ledger.guard == pytest.approx(0.4)
    limited.refuse(2.0, 3.0)
    assert limited.quota.ledger.guard == pytest.approx(0.64)
    assert limited.fill(70.0) == 10, "all of them at once, as before"
    now = limited.pass_minutes(70.0, 20)
    assert limited.quota.ledger.guard == 0.25
    assert limited.quota.opens_at(now) == inf


def test_what_others_used_does_not_make_a_limit_nearly_full() -> None:
    limited = rig(requests_per_minute=100)
    limited.fill(0.0, 10)
    limited.quota.ledger.add_foreign("requests", 90, now=0.0)
    limited.refuse(0.0, 1.0)
    assert limited.quota.ledger.guard == pytest.approx(0.25)


def ramped(limited: Rig) -> list[int | None]:
    """The limit on input when traffic grew too fast, and every fifteen minutes from then."""
    now = limited.pass_minutes(0.0, 3)
    limited.refuse(now, now + 1.0, ramp=True)
    seen = [limited.quota.ledger.limit("input_tokens")]
    for _ in range(3):
        now = limited.pass_minutes(now, 16)
        seen.append(limited.quota.ledger.limit("input_tokens"))
    return seen


def test_who_grew_too_fast_may_grow_by_half_every_fifteen_minutes() -> None:
    assert ramped(rig(input_tokens_per_minute=2_000_000)) == [1_000_000, 1_500_000, 2_000_000, 2_000_000]


def test_a_ramp_also_caps_a_limit_that_was_adopted() -> None:
    limited = rig()
    limited.hear(0.0, 0.0, input_tokens=(2_000_000, 2_000_000))
    assert ramped(limited) == [1_000_000, 1_500_000, 2_000_000, 2_000_000]
    limited.hear(0.0, 0.0, input_tokens=(3_000_000, 3_000_000))
    assert limited.quota.ledger.limit("input_tokens") == 3_000_000


def test_a_limit_that_is_told_meanwhile_does_not_lift_the_cap_of_a_ramp() -> None:
    limited = rig(input_tokens_per_minute=5_000_000)
    limited.refuse(0.0, 1.0, ramp=True)
    limited.hear(2.0, 2.0, input_tokens=(4_000_000, None))
    assert limited.quota.ledger.limit("input_tokens") == 1_000_000
    limited.pass_minutes(2.0, 4 * 16)
    assert limited.quota.ledger.limit("input_tokens") == 4_000_000


def test_a_cap_begins_at_half_as_much_again_as_was_used() -> None:
    limited = rig(input_tokens_per_minute=10_000_000)
    for minute in range(4):
        limited.send(60.0 * minute + 1.0, Cost(1, 2_000_000))
        limited.quota.probe(60.0 * minute + 30.0)
    limited.refuse(240.0, 241.0, ramp=True)
    assert limited.quota.ledger.limit("input_tokens") == 3_000_000


def test_a_cap_does_not_itself_explain_the_refusal() -> None:
    limited = rig(slow_start=True, input_tokens_per_minute=10_000_000)
    limited.send(0.0, Cost(1, 2_000_000))
    limited.quota.accepted(0.0)
    limited.refuse(0.5, 1.0, ramp=True)
    assert not limited.quota.open, "it starts slowly"


# -- the first token -------------------------------------------------------------------------------------------------


def begin(limited: Rig, sent_at: float, seconds: float) -> None:
    reservation = limited.send(sent_at)
    limited.quota.began(reservation, sent_at, now=sent_at + seconds)


def test_the_time_to_the_first_token_is_a_mean() -> None:
    limited = rig(requests_per_minute=1000)
    seen = []
    for number, seconds in enumerate((0.5, 0.5, 0.75, 0.25)):
        begin(limited, float(number), seconds)
        seen.append(limited.quota.first_token)
    assert seen == pytest.approx([0.5, 0.5, 0.5 + 0.25 / 3, 0.5])


def test_a_request_whose_answer_began_very_late_counts_from_later() -> None:
    """Answers begin after half a second: one that took ten probably arrived nine and a half late."""
    limited = rig(requests_per_minute=1000)
    for number in range(50):
        begin(limited, number / 10, 0.5)
    assert limited.quota.first_token == pytest.approx(0.5)
    begin(limited, 100.0, 10.0)
    limited.quota.ledger.expire(165.0)
    assert limited.quota.ledger.used("requests") == 1, "it left 65 s ago"
    assert limited.quota.first_token < 0.6, "one late one says little of the others"
    limited.quota.ledger.expire(171.0)
    assert limited.quota.ledger.used("requests") == 0


# -- another loop ----------------------------------------------------------------------------------------------------


def test_on_another_loop_what_was_used_and_open_stays_used() -> None:
    limited = rig(requests_per_minute=100, output_tokens_per_minute=1000, requests_per_day=50, concurrent_requests=3)
    reservations = [limited.send(0.0, Cost(1, 0, 100)) for _ in range(3)]
    limited.refuse(0.0, 0.5)
    limited.quota.streams.add("somebody")
    limited.quota.start_afresh(1.0)
    assert (limited.quota.in_flight, limited.quota.streams) == (0, set())
    assert (limited.quota.ledger.used("requests"), limited.quota.ledger.used("output_tokens")) == (3, 300)
    assert [limited.quota.ledger.open_output, limited.quota.ledger.open_count] == [0, 0]
    # Whoever is settled late, by a finaliser, is not counted twice.
    for reservation in reservations:
        limited.quota.settle(reservation, Cost(1, 0, 900), now=2.0)
    assert limited.quota.in_flight == 0
    assert limited.quota.ledger.used("output_tokens") == 300
    assert limited.fill(2.0) == 3
    assert limited.quota.reserve(Cost(), now=2.0) is None, "three at once, as before"
