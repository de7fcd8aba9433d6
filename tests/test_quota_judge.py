"""The judge of the quota is judged: its servers agree with a slow count, and it sees the faults it is there for."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from llm.core.exceptions import LLMOverloadedError
from llm.core.settings import LLMSettings
from llm.core.stream import ResponseStream
from llm.core.types import SettledCallback
from llm.middleware.base import Call, Handler, Reply
from llm.middleware.stack import Layer
from llm.utils.quota import Quota

BENCH = Path(__file__).parent.parent / "bench"
# The scripts of bench import each other by their bare names.
sys.path.append(str(BENCH))

import quota  # noqa: E402
import quota_servers as servers  # noqa: E402
import quota_workloads as workloads  # noqa: E402

# -- the servers and the slow count ------------------------------------------------------------------------------------


class SlowWindow:
    """Adds up everything anew for every question."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.events: list[list[float]] = []

    def used(self, now: float) -> float:
        return sum(amount for at, amount in self.events if at <= now < at + 60.0)

    def wait(self, need: float, now: float) -> float:
        if need > self.limit:
            return inf
        instants = [now, *(at + 60.0 for at, _ in self.events)]
        return min(at - now for at in instants if at >= now and self.used(at) + need <= self.limit)

    def add(self, amount: float, now: float) -> int:
        self.events.append([now, amount])
        return len(self.events) - 1

    def amend(self, number: int, amount: float, now: float) -> None:
        self.events[number][1] = amount


class SlowBucket:
    """A bucket was last full at one of its events, and has since lost and gained what happened since."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.capacity = limit * seconds / 60.0
        self.rate = limit / 60.0
        self.changes: list[tuple[float, float]] = []
        self.amounts: list[float] = []

    def level(self, now: float) -> float:
        lowest = self.capacity
        for first in range(len(self.changes) + 1):
            spent = sum(amount for _, amount in self.changes[first:])
            for full in self.changes[max(0, first - 1) : first + 1]:
                lowest = min(lowest, self.capacity + self.rate * (now - full[0]) - spent)
        return lowest

    def wait(self, need: float, now: float) -> float:
        if need > self.capacity:
            return inf
        return max(0.0, (need - self.level(now)) / self.rate)

    def add(self, amount: float, now: float) -> int:
        self.changes.append((now, amount))
        self.amounts.append(amount)
        return len(self.amounts) - 1

    def amend(self, number: int, amount: float, now: float) -> None:
        self.changes.append((now, amount - self.amounts[number]))
        self.amounts[number] = amount


class SlowServer:
    """The rules of the four kinds, written down once more."""

    def __init__(self, kind: servers.Kind, limits: dict[str, int]) -> None:
        self.kind = kind
        self.counts: dict[str, SlowWindow | SlowBucket] = {
            name: SlowWindow(limit)
            if kind in ("strict", "reserve_max")
            else SlowBucket(limit, 5.0 if kind == "burst" else 60.0)
            for name, limit in limits.items()
        }

    def arrive(self, now: float, prompt: int, most: int) -> tuple[float, int]:
        """Seconds to stay away, 0.0 if it was let in; and how its input is numbered."""
        needs = {"requests": 1, "input_tokens": prompt, "output_tokens": 1, "tokens": max(prompt, most)}
        wait = max(count.wait(needs[name], now) for name, count in self.counts.items())
        number = -1
        for name, count in self.counts.items():
            if wait == 0.0:
                if name != "output_tokens":
                    added = count.add(needs[name], now)
                    number = added if name == "input_tokens" else number
            elif self.kind == "reserve_max" and name == "requests":
                count.add(1, now)
        return wait, number


LIMITS = {"requests": 60, "input_tokens": 120, "output_tokens": 180, "tokens": 240}
SOME = {
    "strict": ("requests", "input_tokens", "output_tokens"),
    "bucket": ("requests", "input_tokens", "output_tokens"),
    "burst": ("requests", "input_tokens", "output_tokens"),
    "reserve_max": ("requests", "tokens"),
}
KINDS: Sequence[servers.Kind] = ("strict", "bucket", "burst", "reserve_max")
# Quarters of a second and limits divisible by sixty: then floats are exact, and so is the comparison.
GAPS = st.sampled_from([0.0, 0.0, 0.25, 1.0, 2.5, 7.75, 30.0, 59.75, 60.0])
AMOUNTS = st.integers(0, 130)
STEPS = st.lists(
    st.tuples(GAPS, st.sampled_from(["arrive", "arrive", "correct", "produce"]), AMOUNTS, AMOUNTS), max_size=40
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(steps=STEPS)
def test_a_server_decides_and_tells_waits_as_the_slow_count_does(
    kind: servers.Kind, steps: list[tuple[float, str, int, int]]
) -> None:
    limits = {name: LIMITS[name] for name in SOME[kind]}
    server = servers.Server(kind, servers.Quota(**limits))
    slow = SlowServer(kind, limits)
    now = 0.0
    inside: list[tuple[servers.Admitted, int]] = []
    for gap, what, first, second in steps:
        now += gap
        if what == "arrive":
            answer = server.arrive(now, input_tokens=first, max_tokens=second)
            wait, number = slow.arrive(now, first, second)
            if isinstance(answer, servers.Admitted):
                assert wait == 0.0
                inside.append((answer, number))
            else:
                assert answer.retry_after == wait
        elif inside:
            admitted, number = inside[first % len(inside)]
            if what == "correct":
                admitted.correct(now, second)
                if "input_tokens" in slow.counts:
                    slow.counts["input_tokens"].amend(number, second, now)
            else:
                admitted.produce(now, second)
                if "output_tokens" in slow.counts and second:
                    slow.counts["output_tokens"].add(second, now)


def test_a_window_is_half_open_and_a_bucket_gives_back_all_the_time() -> None:
    for kind, wait in (("strict", 60.0), ("bucket", 1.0)):
        server = servers.Server(kind, servers.Quota(requests=60))  # type: ignore[arg-type]  # it is one of the kinds
        for _ in range(60):
            assert isinstance(server.arrive(0.0, input_tokens=1, max_tokens=1), servers.Admitted)
        assert server.arrive(0.0, input_tokens=1, max_tokens=1) == servers.Refusal(wait, "requests")
        assert isinstance(server.arrive(wait - 0.01, input_tokens=1, max_tokens=1), servers.Refusal)
        assert isinstance(server.arrive(wait, input_tokens=1, max_tokens=1), servers.Admitted)


def test_a_bucket_of_five_seconds_lets_a_twelfth_of_a_minute_through_at_once() -> None:
    server = servers.Server("burst", servers.Quota(requests=60))
    answers = [server.arrive(0.0, input_tokens=1, max_tokens=1) for _ in range(6)]
    assert [isinstance(answer, servers.Admitted) for answer in answers] == [True] * 5 + [False]


def test_output_refuses_only_those_who_come_when_it_is_used_up() -> None:
    server = servers.Server("strict", servers.Quota(output_tokens=100))
    first = server.arrive(0.0, input_tokens=1, max_tokens=4096)
    second = server.arrive(0.0, input_tokens=1, max_tokens=4096)
    assert isinstance(first, servers.Admitted)
    assert isinstance(second, servers.Admitted)
    first.produce(1.0, 100)
    second.produce(2.0, 50)
    # At 61 s the first hundred go, and the fifty that nobody could stop are within the limit.
    assert server.arrive(3.0, input_tokens=1, max_tokens=1) == servers.Refusal(58.0, "output_tokens")


@pytest.mark.parametrize("name", ["quota_servers", "quota_workloads"])
def test_the_vendor_and_its_callers_import_nothing_of_what_they_judge(name: str) -> None:
    tree = ast.parse((BENCH / f"{name}.py").read_text(encoding="utf-8"))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {module.partition(".")[0] for module in imported} <= {*sys.stdlib_module_names, "quota_servers"}


# -- the judge ---------------------------------------------------------------------------------------------------------

SMALL = workloads.Row("small", "strict", workloads.UNIFORM, "requests", keys=(servers.Quota(requests=60),), spikes=0.0)
"""Without late messages a sound client is never refused, so that one refusal is proof."""
MINUTES = 6.0


def judged(row: workloads.Row = SMALL, **planted: object) -> quota.Outcome:
    """By default a small key, bound by its requests alone; for a few minutes."""
    return quota.simulate(row, 1, minutes=MINUTES, **planted)  # type: ignore[arg-type]  # simulate's own keywords


def test_a_sound_client_is_found_sound() -> None:
    outcome = judged()
    assert (outcome.refused, outcome.failed, outcome.left) == (0, {}, 0)
    assert outcome.warm == 1.0
    assert 0.98 < outcome.utilisation <= 1.0


def test_the_same_seed_is_the_same_run_to_the_last_figure() -> None:
    first, second = judged(workloads.ROWS[2]), judged(workloads.ROWS[2])
    first.cpu = second.cpu = 0.0
    assert first == second


def one_too_high(configured: LLMSettings) -> LLMSettings:
    provider = configured.providers["vendor"]
    keys = tuple(
        replace(key, limits=replace(key.limits, requests_per_minute=(key.limits.requests_per_minute or 0) + 1))
        for key in provider.keys
    )
    return replace(configured, providers={"vendor": replace(provider, keys=keys)})


def negative_guard(configured: LLMSettings) -> LLMSettings:
    limiter = replace(configured.middleware.rate_limiter, guard_seconds=-0.25)
    return replace(configured, middleware=replace(configured.middleware, rate_limiter=limiter))


@pytest.mark.parametrize("fault", [one_too_high, negative_guard])
def test_a_client_that_counts_wrongly_is_caught_by_its_429s(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also headers are kept from it: they would tell it what is wrong with its limits."""
    monkeypatch.setattr(Quota, "observe", lambda *args, **facts: False)
    assert callable(fault)
    assert judged(configured=fault(quota.settings(SMALL))).refused > 0


class Deaf:
    """A stream that tells nobody when it is over."""

    def __init__(self, stream: ResponseStream) -> None:
        self._stream = stream

    def on_settled(self, callback: SettledCallback) -> None:
        """Forget it."""

    def close(self) -> None:
        self._stream.close()

    def __aiter__(self) -> ResponseStream:
        return self._stream


async def leaking(call: Call, handler: Handler, /) -> Reply:
    reply = await handler(call)
    if int(call.id.rpartition("-")[2]) % 10 == 0:
        return Deaf(reply)  # type: ignore[arg-type, return-value]  # all of a stream that anybody asks of it here
    return reply


async def unpaid(call: Call, handler: Handler, /) -> Reply:
    try:
        return await handler(call)
    except LLMOverloadedError:
        return await handler(call)


def test_a_leaked_permit_is_caught_by_what_is_left() -> None:
    def arrange(layers: list[Layer]) -> list[Layer]:
        place = [layer.name for layer in layers].index("rate_limiter") + 1
        return [*layers[:place], Layer("leaking", leaking), *layers[place:]]

    assert judged(arrange=arrange).left > 0


def test_a_leaked_permit_of_output_is_caught_by_the_utilisation_as_well() -> None:
    row = SMALL._replace(keys=(servers.Quota(requests=60, output_tokens=7_000),))

    def arrange(layers: list[Layer]) -> list[Layer]:
        place = [layer.name for layer in layers].index("rate_limiter") + 1
        return [*layers[:place], Layer("leaking", leaking), *layers[place:]]

    assert judged(row, arrange=arrange).utilisation < judged(row).utilisation - 0.05


def test_an_unpaid_retry_is_caught_by_its_429s() -> None:
    row = SMALL._replace(overloads=0.05)
    assert judged(row).refused == 0
    assert judged(row, arrange=lambda layers: [*layers, Layer("unpaid", unpaid)]).refused > 0


def test_a_client_without_limits_overruns_every_kind_of_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of server says no on the wire, in the words of its dialect, and the client hears it.

    But for the headers, by which it would learn the limits that it was not given.
    """
    monkeypatch.setattr(Quota, "observe", lambda *args, **facts: False)
    for kind in KINDS:
        row = SMALL._replace(kind=kind, load=workloads.Steady(600.0))
        free = quota.settings(row._replace(keys=(servers.Quota(),)))
        outcome = quota.simulate(row, 1, minutes=0.5, configured=free)
        assert outcome.refused > 0, kind
        assert set(outcome.failed) <= {"LLMRateLimitError"}, kind


def test_openais_words_are_understood() -> None:
    row = SMALL._replace(kind="reserve_max", load=workloads.Steady(30.0))
    outcome = judged(row)
    assert (outcome.served, outcome.refused, outcome.failed) == (1.0, 0, {})


def test_a_restart_finds_a_key_that_is_used_up() -> None:
    row = next(row for row in workloads.ROWS if row.name == "restart-uniform")
    vendor = workloads.Vendor(row, Random(1), Random(2), clock=lambda: 0.0, call_at=lambda when, callback: None)
    vendor.prefill()
    answer = vendor.servers[0].arrive(0.0, input_tokens=300, max_tokens=256)
    assert isinstance(answer, servers.Refusal)
    assert answer.retry_after < 0.2, "it was used evenly, so that something comes back at once"


def test_somebody_else_on_the_key_is_seen_apart_from_us() -> None:
    outcome = judged(next(row for row in workloads.ROWS if row.name == "hidden-heavy"))
    assert 0.0 < outcome.ours < outcome.utilisation


@given(
    gaps=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 20.0, 60.0]), st.integers(1, 9)), min_size=1, max_size=30),
)
def test_peaks_are_the_fullest_minutes_at_any_offset(gaps: list[tuple[float, int]]) -> None:
    book, now = [], 0.0
    for gap, amount in gaps:
        now += gap
        book.append(workloads.Used(now, amount, True))
    sums = [(end.at, sum(e.amount for e in book[: n + 1] if end.at - 60.0 < e.at)) for n, end in enumerate(book)]
    warm = max((total for at, total in sums if at > 120.0), default=0)
    cold = max((total for at, total in sums if at <= 120.0), default=0)
    assert quota._peaks(book, 1) == (warm, cold)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_row_has_a_name_of_its_own_and_no_settings() -> None:
    names = [row.name for row in workloads.ROWS]
    assert len(set(names)) == len(names)
    everyday = {repr(replace(quota.settings(row), providers={})) for row in workloads.ROWS}
    assert len(everyday) == 1


def test_the_table_names_the_targets_that_the_means_miss() -> None:
    row = SMALL._replace(target=workloads.Target(utilisation=0.99, refused=3))
    one = judged()
    two = replace(one, seed=2, utilisation=one.utilisation - 0.2, refused=8)
    summary = quota.summarise(row, [one, two])
    assert summary.misses == ["utilisation ≥ 99.0%", "429s ≤ 3"]
    assert summary.refused == (4.0, 8)
    (headings, cells) = quota.lines([summary])
    assert len(headings) == len(cells)
    assert cells[2] == "4.0 (8)"


def test_seeds_are_named_or_counted() -> None:
    assert quota.seeds("tune") == list(range(10))
    assert quota.seeds("report") == list(range(100, 110))
    assert quota.seeds("0-2,7") == [0, 1, 2, 7]
