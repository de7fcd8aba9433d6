"""What keeping the limits costs: ``make limits`` prints the table of issue 4, each figure beside its target.

CPU is the process's own (``time.process_time``) with the collector off but where it is said to be on. Candidates take
turns, and medians over the rounds are shown. The machines are told the time, so a minute of a ledger takes as long as
its work, and what is measured does not depend on how fast the machine is.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from llm.core.events import Events
from llm.core.pool import ProviderPool
from llm.core.settings import (
    KeySettings,
    LimitSettings,
    MiddlewareSettings,
    PoolSettings,
    ProviderSettings,
    Secret,
)
from llm.core.types import (
    Cost,
    LimitState,
    LLMResponse,
    Message,
    MessageRole,
    ObservedLimits,
    Options,
    Priority,
    Request,
    Usage,
)
from llm.middleware.base import Call, Handler, Reply
from llm.middleware.rate_limiter import RateLimitMiddleware
from llm.testing.clock import FakeClock
from llm.utils.clock import Clock, SystemClock
from llm.utils.output_predictor import OutputPredictor
from llm.utils.quota import GRAIN, OUTPUT_GRAIN, Quota
from llm.utils.sliding_window import Ledger, Reservation, time_until
from llm.utils.tokens import TokenEstimator

ROUNDS = 7
LIVE = 10_000
"""Entries of a full window."""
WINDOW, GUARD = 60.0, 0.25
SPAN = WINDOW + GUARD
MODEL = "claude-sonnet-5-5"
PROMPT = "Say something about foxes and dogs, please."
COST, ACTUAL = Cost(1, 400, 200), Cost(1, 380, 150)


class Figure(NamedTuple):
    """A row of the table. *most* is the target, None for what only explains the others."""

    name: str
    value: float
    unit: str
    most: float | None = None


def spent(work: Callable[[], object]) -> float:
    """Seconds of CPU."""
    started = time.process_time()
    work()
    return time.process_time() - started


def medians(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Of what each of *works* returns, taking turns; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        # Who goes first changes, so that neither always runs on the other's warm or littered heap.
        for name, work in list(works.items()) if number % 2 else reversed(works.items()):
            gc.collect()
            gc.disable()
            value = work()
            gc.enable()
            if number:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


# -- the ledger --------------------------------------------------------------------------------------------------------


def ledger(live: int = LIVE, *, coalesce: bool = False) -> Ledger:
    """One with *live* requests in its window, or as many entries of them as its grain leaves, and nearly full."""
    made = Ledger(
        requests=live + live // 50,
        input_tokens=2 * live * COST.input_tokens,
        output_tokens=2 * live * COST.output_tokens,
        window=WINDOW,
        guard=GUARD,
        output_counts=True,
        z=1.645,
        grain=GRAIN if coalesce else 0.0,
        output_grain=OUTPUT_GRAIN if coalesce else 0.0,
    )
    step = SPAN / live
    for number in range(live):
        now = number * step
        held = made.reserve(COST, now=now, variance=100.0)
        assert held is not None
        held.sent(now)
        held.settle(ACTUAL, now=now)
    return made


class Turnover:
    """A ledger at its limit in the long run: with each request that comes an old one goes."""

    def __init__(self, live: int = LIVE, *, coalesce: bool = False) -> None:
        self.ledger = ledger(live, coalesce=coalesce)
        self.step = SPAN / live
        self.number = live

    def __call__(self, calls: int = 20_000) -> float:
        """Microseconds of a reservation and its settlement, its departure between them, and what expires meanwhile."""
        book, step, first = self.ledger, self.step, self.number
        self.number += calls
        loop = spent(lambda: _idle(first, calls, step))
        return (spent(lambda: _turn_over(book, first, calls, step)) - loop) / calls * 1e6


def _turn_over(book: Ledger, first: int, calls: int, step: float) -> None:
    for number in range(first, first + calls):
        now = number * step
        held = book.reserve(COST, now=now, variance=100.0)
        assert held is not None
        held.sent(now)
        held.settle(ACTUAL, now=now)


def _idle(first: int, calls: int, step: float) -> None:
    for number in range(first, first + calls):
        number * step


def ledgers(rounds: int) -> list[Figure]:
    exact, coalesced = Turnover(), Turnover(coalesce=True)
    costs = medians({"exact": exact, "coalesced": coalesced}, rounds)
    assert len(exact.ledger._log) > 0.99 * LIVE
    return [
        Figure(f"ledger: reserve, sent, settle at {LIVE:,} live entries", costs["exact"], "µs", 2.0),
        Figure(f"the same, coalesced to {len(coalesced.ledger._log)} entries", costs["coalesced"], "µs", 2.0),
    ]


# -- the wait answer ---------------------------------------------------------------------------------------------------


def full_quota() -> Quota:
    """With :data:`LIVE` requests in its window, evenly over it; requests and input are all but used up."""
    quota = Quota("bench", LimitSettings(requests_per_minute=LIVE, input_tokens_per_minute=LIVE * COST.input_tokens))
    for number in range(LIVE):
        now = number * SPAN / LIVE
        held = quota.reserve(COST, now=now)
        assert held is not None
        held.sent(now)
        quota.settle(held, COST, now=now)
    return quota


def answers(rounds: int) -> list[Figure]:
    """How long a wait answer takes: of the log that a quota of so many requests keeps, and of an exact one."""
    quotas = [full_quota().ledger for _ in range(3)]
    kept, exact = quotas[0], ledger()
    now = SPAN * (1 - 1 / LIVE)

    def ahead(calls: int) -> Cost:
        return Cost(calls, calls * COST.input_tokens)

    def answer(books: Sequence[Ledger], queue: Cost, calls: int) -> Callable[[], float]:
        def work() -> None:
            for _ in range(calls):
                time_until(books, COST, queue, now=now)

        return lambda: spent(work) / calls * 1e6

    costs = medians(
        {
            "first": answer((kept,), ahead(0), 2000),
            "half": answer((kept,), ahead(LIVE // 2), 500),
            "last": answer((kept,), ahead(LIVE - 1), 500),
            "three": answer(quotas, ahead(LIVE * 3 // 2), 100),
            "exact": answer((exact,), ahead(0), 2000),
            "exact, last": answer((exact,), ahead(LIVE - 1), 10),
        },
        rounds,
    )
    return [
        Figure(
            f"wait answer, {LIVE:,} requests as a quota keeps them, {len(kept._log)} entries",
            costs["first"],
            "µs",
            50.0,
        ),
        Figure("the same behind half a window of calls", costs["half"], "µs", 50.0),
        Figure("the same behind a whole window, the worst", costs["last"], "µs", 50.0),
        Figure("of three such quotas together, behind half a window of each", costs["three"], "µs"),
        Figure(f"wait answer of an exact log of {len(exact._log):,} entries", costs["exact"], "µs", 50.0),
        Figure("the same behind a whole window; no quota keeps such a log", costs["exact, last"], "µs"),
    ]


# -- memory ------------------------------------------------------------------------------------------------------------


def traced(make: Callable[[], object]) -> int:
    """Bytes that what *make* returns holds."""
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    kept = make()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return after - before


def memory() -> list[Figure]:
    def under_way() -> tuple[Ledger, list[Reservation | None]]:
        """Every request of a window is still being answered."""
        book = Ledger(requests=LIVE, input_tokens=LIVE * COST.input_tokens, window=WINDOW, guard=GUARD)
        held = [book.reserve(COST, now=number * SPAN / LIVE) for number in range(LIVE)]
        assert None not in held
        return book, held

    pointer = 8
    exact = traced(under_way) / LIVE - pointer
    settled = traced(ledger) / LIVE
    few = traced(lambda: ledger(LIVE, coalesce=True))
    many = traced(lambda: ledger(10 * LIVE, coalesce=True))
    return [
        Figure("memory of a live request under way: reservation and entry", exact, "B", 300.0),
        Figure("memory of one that was answered: its entries of the logs", settled, "B", 300.0),
        Figure(f"memory of a coalesced window of {LIVE:,} requests", few / 1024, "KB"),
        # Not quite the same: Python keeps one copy of each integer up to 256.
        Figure(f"memory of one of {10 * LIVE:,}, as a share of that", many / few, "×", 1.1),
    ]


# -- the layer ---------------------------------------------------------------------------------------------------------


class Ticking(SystemClock):
    """A clock that is some time later whenever somebody looks, and costs what the real one does."""

    def __init__(self, step: float) -> None:
        self.now = count(1000.0, step).__next__


def pool(clock: Clock, limits: LimitSettings, keys: int = 3) -> ProviderPool:
    """The shipped pool, of *keys* with *limits* each."""

    async def works(secret: str) -> int:
        return 200

    settings = ProviderSettings(
        name="bench",
        dialect="anthropic",
        base_url="http://127.0.0.1",
        keys=tuple(
            KeySettings(number=number, secret=Secret(f"key-{number}"), model=MODEL, limits=limits)
            for number in range(1, keys + 1)
        ),
        pool=PoolSettings(max_size=1000),
    )
    return ProviderPool(settings, clock=clock, random=lambda: 0.5, events=Events(), probe=works)


def layer(clock: Clock, limits: LimitSettings, *, slow_start: bool = True) -> RateLimitMiddleware:
    """The shipped layer with its default settings, estimator and predictor, as a manager builds it."""
    chosen = MiddlewareSettings().rate_limiter
    return RateLimitMiddleware(
        pool(clock, limits),
        clock=clock,
        name="bench",
        guard=chosen.guard_seconds,
        max_queue=chosen.max_queue,
        weights={priority: getattr(chosen.weights, priority) for priority in Priority},
        slow_start=slow_start,
        estimator=TokenEstimator(),
        predictor=OutputPredictor(chosen.output_reserve),
    )


def told(limits: LimitSettings) -> ObservedLimits:
    """Headers of a vendor with those limits, of which nobody else uses anything."""
    requests, tokens, output = (
        limits.requests_per_minute,
        limits.input_tokens_per_minute,
        limits.output_tokens_per_minute,
    )
    return ObservedLimits(LimitState(requests, requests), LimitState(tokens, tokens), LimitState(output, output))


class Vendor:
    """The least that a provider does with its admission; and, without one, the bare handler."""

    def __init__(self, limits: LimitSettings) -> None:
        self.headers = told(limits)
        self.answer = LLMResponse(text="Hello yourself.", model=MODEL, usage=Usage(14, 12))
        self.probed = 0

    async def __call__(self, call: Call) -> Reply:
        admission = call.admission
        if admission is not None:
            admission.sent()
            if admission.wants_limits:
                self.probed += 1
                admission.observe(limits=self.headers)
        return self.answer


UNBOUND = LimitSettings(
    requests_per_minute=50_000_000, input_tokens_per_minute=50_000_000_000, output_tokens_per_minute=10_000_000_000
)
LOOKS = 4.0
"""Of the layer at its clock, in a call."""
REQUEST = Request((Message(MessageRole.USER, PROMPT),), "", Options(max_tokens=1000))


def ask() -> Call:
    return Call("bench", REQUEST, provider="bench", model=None, started=0.0)


async def repeat(limiter: RateLimitMiddleware | None, handler: Handler, calls: int) -> float:
    """Microseconds of one call of *handler*, through *limiter* if there is one."""
    started = time.process_time()
    if limiter is None:
        for _ in range(calls):
            await handler(ask())
    else:
        for _ in range(calls):
            await limiter(ask(), handler)
    return (time.process_time() - started) / calls * 1e6


def uncontended(rounds: int, calls: int = 10_000) -> list[Figure]:
    """The layer around a handler that does nothing, minus that handler, at 1,000 and at 10 calls a second."""
    works: dict[str, Callable[[], float]] = {}
    vendors: dict[str, Vendor] = {}
    for name, rate in (("busy", 1000.0), ("idle", 10.0)):
        limiter, vendor = layer(Ticking(1.0 / (LOOKS * rate)), UNBOUND), Vendor(UNBOUND)
        vendors[name] = vendor
        works[name] = lambda limiter=limiter, vendor=vendor: asyncio.run(  # type: ignore[misc]  # bound early
            repeat(limiter, vendor, calls)
        )
    bare = Vendor(UNBOUND)
    works["bare"] = lambda: asyncio.run(repeat(None, bare, calls))
    keys = pool(Ticking(1e-3), UNBOUND)
    works["pool"] = lambda: spent(lambda: _lease(keys, calls)) / calls * 1e6
    costs = medians(works, rounds)
    shares = {name: vendor.probed / (calls * (rounds + 1)) for name, vendor in vendors.items()}
    return [
        Figure(
            f"layer, uncontended, 1,000 calls/s ({shares['busy']:.1%} of the answers' headers in)",
            costs["busy"] - costs["bare"],
            "µs",
            6.0,
        ),
        Figure(
            f"the same at 10 calls/s ({shares['idle']:.0%} of the answers' headers in)",
            costs["idle"] - costs["bare"],
            "µs",
        ),
        Figure("of both: the pool's choice of a key and its client", costs["pool"], "µs"),
    ]


def _lease(keys: ProviderPool, calls: int) -> None:
    for _ in range(calls):
        route = keys.route(None)
        keys.refusal(route)
        for key in keys.rotation(route):
            lease = keys.lease(key)
            assert lease is not None
            keys.release(lease, None)
            break


# -- those who wait ----------------------------------------------------------------------------------------------------

RATE = 150
"""Admissions a second, over three keys."""
FULL = LimitSettings(
    requests_per_minute=RATE * 20, input_tokens_per_minute=50_000_000, output_tokens_per_minute=50_000_000
)


class Crowd:
    """Callers who ask again as soon as they are answered, at keys that are full and give back evenly."""

    def __init__(self, waiting: int) -> None:
        self._waiting = waiting
        self._clock = FakeClock()
        self._limiter = layer(self._clock, FULL, slow_start=False)
        self._vendor = Vendor(FULL)
        self.admitted = 0

    async def run(self, seconds: float) -> float:
        """Microseconds of CPU for each admission, when as many wait as there are to wait."""
        clock = self._clock
        for _ in range(int(RATE * WINDOW * 0.98)):
            # The windows fill evenly, and will empty evenly.
            clock._now += 1.0 / RATE
            await self._limiter(ask(), self._vendor)
        tasks = [asyncio.ensure_future(self._call_on()) for _ in range(self._waiting)]
        await clock.advance(5.0)
        gc.collect()
        before, started = self.admitted, time.process_time()
        await clock.advance(seconds)
        used, served = time.process_time() - started, self.admitted - before
        assert abs(served / (RATE * seconds) - 1) < 0.05, f"{served} were admitted"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._limiter.close()
        return used / served * 1e6

    async def _call_on(self) -> None:
        while True:
            await self._limiter(ask(), self._vendor)
            self.admitted += 1


def waiting(rounds: int, sizes: Sequence[int] = (100, 10_000), seconds: float = 60.0) -> list[Figure]:
    """The same admissions a second, with few and with many in the queue; ratios are of rounds, as for all others."""
    found: dict[tuple[int, bool], list[float]] = {(size, on): [] for size in sizes for on in (True, False)}
    for number in range(rounds + 1):
        for on in (True, False):
            for size in sizes if number % 2 else reversed(sizes):
                gc.collect()
                (gc.enable if on else gc.disable)()
                cost = asyncio.run(Crowd(size).run(seconds))
                gc.enable()
                if number:
                    found[size, on].append(cost)
    few, many = sizes

    def ratio(on: bool) -> float:
        return statistics.median(m / f for m, f in zip(found[many, on], found[few, on], strict=True))

    return [
        Figure(f"an admission at {RATE} a second with {few} waiting", statistics.median(found[few, True]), "µs"),
        Figure(f"with {many:,} waiting, as a share of that", ratio(True), "×", 1.25),
        Figure("the same without the garbage collector", ratio(False), "×", 1.25),
    ]


def show(figures: Sequence[Figure]) -> None:
    print(f"{'':<78}{'seen':>10}{'target':>12}")
    for name, value, unit, most in figures:
        target = f"≤ {most:g} {unit}" if most is not None else ""
        verdict = "" if most is None or value <= most else "   missed"
        print(f"{name:<78}{value:>7.2f} {unit:<2}{target:>12}{verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rounds = options.rounds
    figures = [
        *ledgers(rounds),
        *uncontended(rounds),
        *answers(rounds),
        *memory(),
        *waiting(max(3, rounds // 2)),
    ]
    show(figures)
    if options.json is not None:
        machine: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
        rows = [figure._asdict() for figure in figures]
        options.json.write_text(json.dumps({"machine": machine, "figures": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
