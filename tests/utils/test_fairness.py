"""Whose turn it is: shares by weight and among tenants in every span, and nothing to be gained by staying away."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from llm.core.types import Priority
from llm.utils.fairness import MIN_SWEEP, Fairness, Flow

WEIGHTS = {Priority.HIGH: 8.0, Priority.NORMAL: 3.0, Priority.LOW: 1.0}
SHARE = 0.01
"""Of the scarcest limit, that a call takes unless said otherwise."""


def turn(flow: Flow) -> tuple[float, float]:
    """The smaller, the sooner."""
    return flow.group.start, flow.start


class Queues:
    """Those who wait, by flow, with a number each; whose turn it is goes."""

    def __init__(self, weights: dict[Priority, float] | None = None) -> None:
        self.fairness = Fairness(weights or WEIGHTS)
        self.waiting: dict[Flow, deque[tuple[int, float]]] = {}
        self.served: list[tuple[Priority, str, int, float]] = []
        self.number = 0

    def join(self, priority: Priority, tenant: str = "", share: float = SHARE) -> None:
        flow = self.fairness.flow(priority, tenant)
        self.fairness.join(flow)
        self.number += 1
        self.waiting.setdefault(flow, deque()).append((self.number, share))

    def serve(self) -> None:
        flow = min((flow for flow in self.waiting if self.waiting[flow]), key=lambda each: (turn(each), each.tenant))
        number, share = self.waiting[flow].popleft()
        self.fairness.serve(flow, share)
        self.fairness.leave(flow)
        self.served.append((flow.group.priority, flow.tenant, number, share))

    def run(self, calls: int, always: Sequence[tuple[Priority, str]], shares: Iterable[float] = ()) -> None:
        """Serve *calls* calls; of each flow in *always* there is always one that waits."""
        drawn = iter(shares)
        for _ in range(calls):
            for priority, tenant in always:
                flow = self.fairness.flow(priority, tenant)
                while len(self.waiting.get(flow, ())) < 2:
                    self.join(priority, tenant, next(drawn, SHARE))
            self.serve()


def by_priority(served: Iterable[tuple[Priority, str, int, float]]) -> dict[Priority, float]:
    """The part that each priority got of all that was taken."""
    parts: Counter[Priority] = Counter()
    for priority, _, _, share in served:
        parts[priority] += share  # type: ignore[assignment]  # a counter counts shares as well
    total = sum(parts.values())
    return {priority: parts[priority] / total for priority in Priority}


def test_the_first_of_each_class_goes_before_the_second_of_any() -> None:
    queues = Queues()
    for priority in (Priority.LOW, Priority.LOW, Priority.HIGH, Priority.HIGH):
        queues.join(priority)
    queues.serve()
    queues.serve()
    assert {priority for priority, *_ in queues.served} == {Priority.LOW, Priority.HIGH}


@pytest.mark.parametrize("low", [1.0, 3.0])
def test_each_class_gets_its_share_by_weight_in_every_span(low: float) -> None:
    """Spans of 240 calls: a share of a twelfth is 20 of them, and one more or less is 5 %."""
    weights = {**WEIGHTS, Priority.LOW: low}
    queues = Queues(weights)
    queues.run(2400, [(priority, "") for priority in Priority])
    for begin in range(0, 2400 - 240, 37):
        parts = by_priority(queues.served[begin : begin + 240])
        for priority in Priority:
            assert parts[priority] == pytest.approx(weights[priority] / sum(weights.values()), rel=0.1)


def test_shares_are_of_what_calls_take_and_not_of_their_number() -> None:
    """Between a tenth and ten times as much, at random: in spans of a thousand calls shares are within 10 %."""
    random = Random(7)
    queues = Queues()
    queues.run(8000, [(p, "") for p in Priority], (SHARE * 10 ** random.uniform(-1, 1) for _ in range(20_000)))
    for begin in range(0, 7000, 500):
        parts = by_priority(queues.served[begin : begin + 1000])
        assert parts[Priority.HIGH] == pytest.approx(8 / 12, rel=0.1)
        assert parts[Priority.NORMAL] == pytest.approx(3 / 12, rel=0.1)
        assert parts[Priority.LOW] == pytest.approx(1 / 12, rel=0.1)


def test_what_a_class_does_not_use_goes_to_the_others_by_their_weights() -> None:
    queues = Queues()
    queues.run(400, [(Priority.HIGH, ""), (Priority.LOW, "")])
    assert by_priority(queues.served)[Priority.LOW] == pytest.approx(1 / 9, rel=0.1)


def test_the_tenants_of_a_class_share_it_equally_however_many_calls_they_have() -> None:
    queues = Queues()
    for _ in range(1000):
        queues.join(Priority.NORMAL, "many")
    queues.run(400, [(Priority.NORMAL, "few"), (Priority.NORMAL, "other"), (Priority.HIGH, "many")])
    for begin in range(0, 300, 20):
        got = Counter(tenant for priority, tenant, _, _ in queues.served[begin : begin + 100] if priority == "normal")
        assert max(got.values()) - min(got.values()) <= 1
        assert len(got) == 3


def test_within_a_flow_whoever_came_first_goes_first() -> None:
    queues = Queues()
    random = Random(3)
    for _ in range(500):
        queues.join(random.choice(tuple(Priority)), random.choice("abc"), random.uniform(0.001, 0.1))
    for _ in range(500):
        queues.serve()
    for flow in {(priority, tenant) for priority, tenant, _, _ in queues.served}:
        numbers = [number for priority, tenant, number, _ in queues.served if (priority, tenant) == flow]
        assert numbers == sorted(numbers)


def test_who_had_nothing_to_ask_for_has_saved_up_nothing() -> None:
    """A class that comes back after a thousand calls of others gets its share from then on, and not what it left."""
    queues = Queues()
    queues.run(1000, [(Priority.LOW, "")])
    begin = len(queues.served)
    queues.run(90, [(Priority.HIGH, ""), (Priority.LOW, "")])
    assert by_priority(queues.served[begin:])[Priority.LOW] == pytest.approx(1 / 9, rel=0.2)


def test_a_tenant_that_had_nothing_to_ask_for_has_saved_up_nothing() -> None:
    queues = Queues()
    queues.run(10, [(Priority.LOW, "a"), (Priority.LOW, "b")])
    queues.run(1000, [(Priority.LOW, "b")])
    begin = len(queues.served)
    queues.run(20, [(Priority.LOW, "a"), (Priority.LOW, "b")])
    assert 9 <= Counter(tenant for _, tenant, _, _ in queues.served[begin:])["a"] <= 11


def test_a_tenant_that_comes_and_goes_gets_no_more_than_one_that_stays() -> None:
    """Else many short calls one by one would be a way around one's share."""
    queues = Queues()
    for _ in range(300):
        queues.run(1, [(Priority.LOW, "stays")])
        if not queues.waiting.get(queues.fairness.flow(Priority.LOW, "comes")):
            queues.join(Priority.LOW, "comes")
    got = Counter(tenant for _, tenant, _, _ in queues.served)
    assert got["comes"] <= got["stays"] + 2


@given(
    st.lists(
        st.tuples(st.sampled_from(Priority), st.sampled_from("ab"), st.integers(1, 100), st.booleans()), max_size=80
    )
)
def test_nobody_who_always_waits_falls_behind_another_by_more_than_the_largest_calls(
    plan: list[tuple[Priority, str, int, bool]],
) -> None:
    """The bound of start-time fair queueing: between two that have both waited, the difference is one call of each."""
    queues = Queues()
    for priority, tenant, percent, _ in plan:
        queues.join(priority, tenant, percent / 1000)
    assume(queues.waiting)
    while sum(map(len, queues.waiting.values())):
        queues.serve()
        waiting = {flow.group.priority for flow in queues.waiting if queues.waiting[flow]}
        got = dict.fromkeys(Priority, 0.0)
        largest = dict.fromkeys(Priority, 0.0)
        for priority, _, _, share in queues.served:
            got[priority] += share / WEIGHTS[priority]
            largest[priority] = max(largest[priority], share / WEIGHTS[priority])
        for one in waiting:
            for other in Priority:
                assert got[other] - got[one] <= largest[other] + 1e-9


def test_who_waits_is_told_by_priority_and_tenant() -> None:
    queues = Queues()
    assert queues.fairness.backlog() == {}
    assert queues.fairness.lowest() is None
    for priority, tenant in ((Priority.HIGH, "a"), (Priority.HIGH, "a"), (Priority.HIGH, "b"), (Priority.NORMAL, "")):
        queues.join(priority, tenant)
    assert queues.fairness.backlog() == {Priority.HIGH: {"a": 2, "b": 1}, Priority.NORMAL: {"": 1}}
    assert queues.fairness.lowest() is Priority.NORMAL
    for _ in range(4):
        queues.serve()
    assert queues.fairness.backlog() == {}


def test_who_leaves_without_being_served_has_been_charged_nothing() -> None:
    fairness = Fairness(WEIGHTS)
    one, other = fairness.flow(Priority.LOW, "one"), fairness.flow(Priority.LOW, "other")
    for flow in (one, other, one):
        fairness.join(flow)
    fairness.leave(one)
    assert turn(one) == turn(other)
    assert fairness.backlog() == {Priority.LOW: {"one": 1, "other": 1}}


def test_tenants_who_were_here_once_are_forgotten() -> None:
    queues = Queues()
    for number in range(3000):
        queues.join(Priority.NORMAL, f"tenant {number}")
        queues.serve()
    assert len(queues.fairness._classes[Priority.NORMAL].tenants) <= 2 * MIN_SWEEP


def test_tenants_who_are_only_asked_about_are_forgotten() -> None:
    """An estimate asks for a flow and never waits."""
    fairness = Fairness(WEIGHTS)
    waiting = fairness.flow(Priority.NORMAL, "waits")
    fairness.join(waiting)
    for number in range(3000):
        fairness.flow(Priority.NORMAL, f"tenant {number}")
    assert len(fairness._classes[Priority.NORMAL].tenants) <= MIN_SWEEP + 1
    assert fairness.flow(Priority.NORMAL, "waits") is waiting


def test_a_tenant_is_not_kept_waiting_for_ever_by_ones_that_are_new() -> None:
    """However many names there are, each for a single call."""
    queues = Queues()
    for number in range(1000):
        queues.join(Priority.NORMAL, f"tenant {number}")
        queues.run(1, [(Priority.NORMAL, "stays")])
    assert Counter(tenant for _, tenant, _, _ in queues.served)["stays"] >= 10


def test_who_has_had_much_is_remembered_until_the_others_have_had_as_much() -> None:
    """Else a tenant would be level again by leaving."""
    queues = Queues()
    queues.join(Priority.NORMAL, "greedy", share=1000.0)
    queues.serve()
    greedy = queues.fairness.flow(Priority.NORMAL, "greedy")
    for number in range(1000):
        queues.join(Priority.NORMAL, f"tenant {number}")
        queues.serve()
    assert queues.fairness.flow(Priority.NORMAL, "greedy") is greedy


def test_when_nobody_waits_all_begin_level() -> None:
    queues = Queues()
    queues.run(100, [(Priority.HIGH, "a"), (Priority.LOW, "b")])
    queues.fairness.clear()
    assert queues.fairness.backlog() == {}
    keys = {turn(queues.fairness.flow(priority, "a")) for priority in Priority}
    assert keys == {(0.0, 0.0)}
