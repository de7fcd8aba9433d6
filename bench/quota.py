"""How much of a quota is used, and how often it is tripped: ``make quota`` prints the table of issue 4.

A discrete-event simulation in virtual time. What is judged is what is shipped: a whole manager with its pool,
admission, retries, dialect and streams, with its default settings in every row. Only the clock, the wire and the vendor
are simulated; the vendor is ``quota_servers.py``, its callers are ``quota_workloads.py``, and neither imports the
package.

Utilisation is what the servers let through of the limit that binds: the mean over every 60 seconds, at all offsets,
between the fifth minute and the end. (Of a client that sends once a minute all it may, a plain sum would tell when the
clock was stopped.) After a restart it is the sum over the three minutes, beside three times the limit. A peak is the
fullest 60 seconds at any offset, of the fullest key, as a share of its limit: *cold* in the first two minutes, *warm*
after them. A delay is the time between a call's beginning and the departure of its last attempt; it says nothing where
the queue never ends, so it is left out there. *failed* are the calls whose caller saw an error, *left* the clients and
reservations that are still held three minutes after the last call has gone. Means over the seeds, the worst in
parentheses; *misses* says which of the issue's targets the means miss.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from email.utils import formatdate
from functools import lru_cache, partial
from math import inf
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import msgspec
from quota_servers import Dimension, one_way
from quota_workloads import ROWS, Answer, Job, Row, Used, Vendor, jobs

from llm.core import types
from llm.core.exceptions import LLMException
from llm.core.manager import Arrange, LLMManager
from llm.core.settings import (
    KeySettings,
    LimitSettings,
    LLMSettings,
    LoggingSettings,
    MetricsSettings,
    MiddlewareSettings,
    ProviderSettings,
    Secret,
)
from llm.transports.base import Exchange, HTTPRequest

MINUTES = 25.0
WARM_UP = 5.0
COLD = 120.0
SETTLING = 180.0
"""Virtual seconds that are given to whatever is still held when the last call has gone."""
SEEDS = {"tune": range(10), "report": range(100, 110)}
EPOCH = 1_790_000_000.0
"""The wall clock at a row's beginning."""

T = TypeVar("T")


# -- time --------------------------------------------------------------------------------------------------------------


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without sockets, on which time passes only while nobody has anything to do."""

    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()
        self._instant = 0.0
        self._selector = self

    def time(self) -> float:
        return self._instant

    def select(self, timeout: float | None) -> list[object]:
        """What the loop does when it has nothing to run: let the time of its next timer come."""
        if timeout is None:
            raise RuntimeError("everybody waits, and nobody for a timer")
        if timeout > 0.0:
            # Not by adding up: the timer would find itself early by a rounding error.
            self._instant = self._scheduled[0].when()
        return []

    def _process_events(self, events: list[object]) -> None:
        """There are none."""

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run *main* to its end, then close the loop."""
        try:
            result = self.run_until_complete(main)
            self.run_until_complete(self.shutdown_asyncgens())
            return result
        finally:
            self.close()


class VirtualClock:
    """Implements ``llm.utils.clock.Clock`` on a :class:`VirtualLoop`."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.now = loop.time
        self._loop = loop

    def wall(self) -> float:
        return EPOCH + self.now()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def call_at(self, when: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        return self._loop.call_at(when, callback)


# -- the wire ----------------------------------------------------------------------------------------------------------

TEXT = (
    "When the tide went out that morning the boats lay on the sand like tired animals, and the children walked between "
    "them with their buckets, looking for whatever the night had left behind: glass, rope, a shoe, once a letter. "
)
TEXT = TEXT * (4 * 60_000 // len(TEXT))
"""Some English, long enough for any prompt; about four bytes are a token."""
OVERHEAD = 4
"""Tokens that a message costs beside its text."""


def prompt(job: Job) -> str:
    return TEXT[: 4 * max(1, job.size - OVERHEAD)]


class Anthropic:
    """The Messages API's words: the events of a stream, an error's body, the headers."""

    NAMES: tuple[tuple[Dimension, str], ...] = (
        ("requests", "requests"),
        ("input_tokens", "input-tokens"),
        ("output_tokens", "output-tokens"),
    )

    @staticmethod
    def key(headers: dict[str, str]) -> str:
        return headers["x-api-key"]

    @staticmethod
    def opening(job: Job) -> bytes:
        usage = b'{"input_tokens":%d,"output_tokens":1}' % job.input_tokens
        return (
            b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message",'
            b'"role":"assistant","model":"m","content":[],"usage":' + usage + b"}}\n\n"
            b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
            b'"content_block":{"type":"text","text":""}}\n\n'
        )

    @staticmethod
    @lru_cache
    def piece(tokens: int) -> bytes:
        return (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
            b'"delta":{"type":"text_delta","text":"' + TEXT[: 4 * tokens].encode() + b'"}}\n\n'
        )

    @staticmethod
    def ending(job: Job) -> bytes:
        return (
            b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
            b'"usage":{"output_tokens":%d}}\n\n'
            b'event: message_stop\ndata: {"type":"message_stop"}\n\n' % job.output_tokens
        )

    @staticmethod
    def failure(status: int) -> bytes:
        kind = {429: b"rate_limit_error", 529: b"overloaded_error"}[status]
        return b'{"type":"error","error":{"type":"' + kind + b'","message":"come back later"}}'

    @classmethod
    def headers(cls, vendor: Vendor, key: int, now: float) -> dict[str, str]:
        """Tokens are told to the nearest thousand, resets as the instant at which the limit is whole again."""
        found = {}
        for dimension, name in cls.NAMES:
            meter = vendor.servers[key].meters.get(dimension)
            if meter is not None:
                remaining = max(0.0, meter.remaining(now))
                if dimension != "requests":
                    remaining = 1000 * round(remaining / 1000)
                prefix = f"anthropic-ratelimit-{name}-"
                found[prefix + "limit"] = str(meter.limit)
                found[prefix + "remaining"] = str(int(remaining))
                found[prefix + "reset"] = _timestamp(int(EPOCH + now + meter.full_in(now) + 0.999))
        return found


class OpenAI:
    """The same for Chat Completions."""

    NAMES: tuple[tuple[Dimension, str], ...] = (("requests", "requests"), ("tokens", "tokens"))

    @staticmethod
    def key(headers: dict[str, str]) -> str:
        return headers["authorization"]

    @staticmethod
    def opening(job: Job) -> bytes:
        return _choice(b'{"role":"assistant","content":""}', b"null")

    @staticmethod
    @lru_cache
    def piece(tokens: int) -> bytes:
        return _choice(b'{"content":"' + TEXT[: 4 * tokens].encode() + b'"}', b"null")

    @staticmethod
    def ending(job: Job) -> bytes:
        total = job.input_tokens + job.output_tokens
        usage = b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}'
        return (
            _choice(b"{}", b'"stop"')
            + b'data: {"id":"c","object":"chat.completion.chunk","model":"m","choices":[],"usage":'
            + usage % (job.input_tokens, job.output_tokens, total)
            + b"}\n\ndata: [DONE]\n\n"
        )

    @staticmethod
    def failure(status: int) -> bytes:
        return b'{"error":{"message":"come back later","type":"tokens","code":"rate_limit_exceeded"}}'

    @classmethod
    def headers(cls, vendor: Vendor, key: int, now: float) -> dict[str, str]:
        found = {}
        for dimension, name in cls.NAMES:
            meter = vendor.servers[key].meters.get(dimension)
            if meter is not None:
                found["x-ratelimit-limit-" + name] = str(meter.limit)
                found["x-ratelimit-remaining-" + name] = str(int(max(0.0, meter.remaining(now))))
                found["x-ratelimit-reset-" + name] = f"{round(meter.full_in(now) * 1000)}ms"
        return found


def _choice(delta: bytes, reason: bytes) -> bytes:
    return (
        b'data: {"id":"c","object":"chat.completion.chunk","model":"m","choices":[{"index":0,"delta":'
        + delta
        + b',"finish_reason":'
        + reason
        + b"}]}\n\n"
    )


@lru_cache
def _timestamp(wall: int) -> str:
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@lru_cache
def _date(wall: int) -> str:
    return formatdate(wall, usegmt=True)


class Idle:
    """How many connections are open and carry nothing."""

    count = 0


class Response:
    """An answer on its way: pieces of a body, and when each is here."""

    def __init__(
        self,
        status: int,
        headers: dict[str, str],
        pieces: Sequence[tuple[float, bytes]],
        clock: VirtualClock,
        idle: Idle,
    ) -> None:
        self.status = status
        self.headers = headers
        self.answer: Answer | None = None
        self._pieces = pieces
        self._read = 0
        self._clock = clock
        self._idle = idle
        self._closed = False

    async def read(self) -> bytes:
        body = b""
        while piece := await self.read_some():
            body += piece
        return body

    async def read_some(self) -> bytes:
        if self._closed or self._read == len(self._pieces):
            return b""
        at, piece = self._pieces[self._read]
        wait = at - self._clock.now()
        if wait > 0.0:
            await self._clock.sleep(wait)
        self._read += 1
        if self._read == len(self._pieces):
            # The connection is free for another request.
            self._idle.count += 1
        return piece

    def close(self) -> None:
        self._closed = True
        if self.answer is not None and self._read < len(self._pieces):
            self.answer.give_up()


class Wire:
    """Implements ``llm.transports.base.Transport``: carries calls to the vendor through a network with delays."""

    def __init__(self, vendor: Vendor, clock: VirtualClock, chance: Random, offered: dict[int, Job]) -> None:
        self._vendor = vendor
        self._clock = clock
        self._chance = chance
        self._offered = offered
        self._idle = Idle()
        self._dialect: type[Anthropic] | type[OpenAI] = Anthropic if vendor.row.dialect == "anthropic" else OpenAI

    async def send(self, request: HTTPRequest, exchange: Exchange) -> Response:
        clock = self._clock
        exchange.reused = self._idle.count > 0
        if exchange.reused:
            self._idle.count -= 1
        else:
            # Connections are kept, but have to be made: TCP and TLS 1.3 take a round trip each.
            await clock.sleep(sum(one_way(self._chance, self._vendor.row.spikes) for _ in range(4)))
        if exchange.on_connection is not None:
            exchange.on_connection()
        exchange.written = True
        key = int(self._dialect.key(request.headers).rpartition("-")[2]) - 1
        if request.method == "GET":
            return Response(200, {}, [(0.0, b"{}")], clock, self._idle)
        job = self._offered[int(request.headers["x-job"])]
        job.sent_at = clock.now()
        await clock.sleep(one_way(self._chance, self._vendor.row.spikes))
        answer = self._vendor.arrive(key, job)
        back = one_way(self._chance, self._vendor.row.spikes)
        if not isinstance(answer, Answer):
            headers = self._headers(key) | {"retry-after": f"{answer:.6f}"}
            await clock.sleep(back)
            exchange.started = True
            return Response(429, headers, [(0.0, self._dialect.failure(429))], clock, self._idle)
        answer.run()
        try:
            await clock.sleep(answer.pieces[0][0] - clock.now())
            headers = self._headers(key)
            await clock.sleep(back)
        except BaseException:
            answer.give_up()
            raise
        exchange.started = True
        if answer.overloaded:
            return Response(529, headers, [(0.0, self._dialect.failure(529))], clock, self._idle)
        pieces = [(at + back, self._dialect.piece(tokens)) for at, tokens in answer.pieces]
        pieces[0] = (pieces[0][0], self._dialect.opening(job))
        pieces.append((pieces[-1][0], self._dialect.ending(job)))
        response = Response(200, headers | {"content-type": "text/event-stream"}, pieces, clock, self._idle)
        response.answer = answer
        return response

    async def close(self) -> None:
        """Nothing is open."""

    def statistics(self) -> dict[str, int]:
        return {}

    def _headers(self, key: int) -> dict[str, str]:
        headers = self._dialect.headers(self._vendor, key, self._clock.now())
        headers["date"] = _date(int(self._clock.wall()))
        return headers


# -- one row -----------------------------------------------------------------------------------------------------------


class Outcome(msgspec.Struct, kw_only=True):
    """What became of one row with one seed. Shares are of 1, times in seconds."""

    row: str
    seed: int
    utilisation: float
    ours: float
    """The part of the utilisation that was not somebody else's."""
    refused: int
    others_refused: int
    warm: float
    cold: float
    delays: dict[str, tuple[float, float]]
    """Median and 99th percentile by importance; empty where there is always more to do than can be done."""
    served: float | None
    """Share of what was offered up to half a minute before the end."""
    failed: dict[str, int]
    """Calls that ended in an error, by its class."""
    low_share: float | None
    """The farthest (relative) that the low class was from its due in any five minutes after the warm-up."""
    left: int
    cpu: float


def missing(row: Row) -> str | None:
    """What the package does not have yet and the row needs."""
    if row.high is not None and not hasattr(types, "Priority"):
        return "a call has no priority"
    if row.binding == "tokens" and "tokens_per_minute" not in LimitSettings.__struct_fields__:
        return "no limit of combined tokens can be configured"
    return None


def settings(row: Row) -> LLMSettings:
    """The defaults, with the limits of the row's keys."""
    keys = []
    for number, quota in enumerate(row.keys, 1):
        limits: dict[str, Any] = {}
        if quota.tokens is not None and "tokens_per_minute" in LimitSettings.__struct_fields__:
            limits["tokens_per_minute"] = quota.tokens
        limits["requests_per_minute"] = quota.requests
        limits["input_tokens_per_minute"] = quota.input_tokens
        limits["output_tokens_per_minute"] = quota.output_tokens
        keys.append(
            KeySettings(number=number, secret=Secret(f"quota-key-{number}"), model=None, limits=LimitSettings(**limits))
        )
    # Records and counters are nobody's quota; without them a row takes a third less time.
    quiet = MiddlewareSettings(logging=LoggingSettings(enabled=False), metrics=MetricsSettings(enabled=False))
    provider = ProviderSettings(name="vendor", dialect=row.dialect, keys=tuple(keys))
    return LLMSettings(providers={"vendor": provider}, default_provider="vendor", middleware=quiet)


def simulate(
    row: Row,
    seed: int,
    *,
    minutes: float = MINUTES,
    configured: LLMSettings | None = None,
    arrange: Arrange | None = None,
) -> Outcome:
    """Run *row* in virtual time. *configured* and *arrange* are for planting faults; the report gives neither."""
    started = time.process_time()
    loop = VirtualLoop()
    outcome = loop.run(_Run(row, seed, minutes, loop, configured or settings(row), arrange).drive())
    outcome.cpu = time.process_time() - started
    return outcome


class _Run:
    """One row with one seed."""

    def __init__(
        self, row: Row, seed: int, minutes: float, loop: VirtualLoop, configured: LLMSettings, arrange: Arrange | None
    ) -> None:
        self.row = row
        self.seed = seed
        self.end = 60.0 * (row.minutes or minutes)
        self.measured_from = 0.0 if row.minutes else 60.0 * min(WARM_UP, minutes / 5)
        self.clock = VirtualClock(loop)
        # Apart, so that a client that asks more or less often meets the same calls.
        self.vendor = Vendor(
            row, Random(f"{seed} vendor"), Random(f"{seed} others"), clock=loop.time, call_at=loop.call_at
        )
        self.jobs = jobs(row, Random(f"{seed} calls"))
        self.offered: dict[int, Job] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        clock = self.clock
        self.manager = LLMManager(
            configured,
            clock=clock,
            random=Random(f"{seed} client").random,
            transport=lambda settings, _: Wire(self.vendor, clock, Random(f"{seed} network"), self.offered),
            arrange=arrange,
        )
        self.client = self.manager.get_client()

    async def drive(self) -> Outcome:
        row, clock = self.row, self.clock
        if row.prefilled:
            self.vendor.prefill()
        if row.hidden:
            self.vendor.haunt(self.end)
        if row.load is None:
            # Twice what a minute can take: also while a full window is under way another one waits.
            for _ in range(2 * sum(quota.requests or 0 for quota in row.keys)):
                self._start(self._work())
        else:
            self._start(self._arrive())
        await clock.sleep(self.end - clock.now())
        for task in tuple(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await clock.sleep(SETTLING)
        left = _held(self.manager.get_status())
        await self.manager.close()
        return self._outcome(left)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _work(self) -> None:
        while True:
            job = next(self.jobs)
            job.arrived = self.clock.now()
            await self._call(job)

    async def _arrive(self) -> None:
        for job in self.jobs:
            wait = job.arrived - self.clock.now()
            if wait > 0.0:
                await self.clock.sleep(wait)
            self._start(self._call(job))

    async def _call(self, job: Job) -> None:
        self.offered[job.number] = job
        options: dict[str, Any] = {"max_tokens": job.max_tokens, "extra_headers": {"x-job": str(job.number)}}
        if job.importance != "normal":
            priority = getattr(types, "Priority", None)
            if priority is not None:
                options["priority"] = priority[job.importance.upper()]
        try:
            async with self.client.stream_complete(prompt(job), **options) as stream:
                async for _ in stream:
                    pass
            job.served = True
        except LLMException as error:
            job.failed = type(error).__name__

    def _outcome(self, left: int) -> Outcome:
        row, offered = self.row, self.offered.values()
        books = [entry for book in self.vendor.books for entry in book]
        limit = sum(self.vendor.limits)
        peaks = [_peaks(book, limit) for book, limit in zip(self.vendor.books, self.vendor.limits, strict=True)]
        due = [job for job in offered if job.arrived <= self.end - 30.0]
        return Outcome(
            row=row.name,
            seed=self.seed,
            utilisation=self._use(books) / limit,
            ours=self._use([entry for entry in books if entry.ours]) / limit,
            refused=self.vendor.refused,
            others_refused=self.vendor.others_refused,
            warm=max(warm for warm, _ in peaks),
            cold=max(cold for _, cold in peaks),
            delays=self._delays() if row.load is not None else {},
            served=sum(job.served for job in due) / max(1, len(due)) if row.load is not None else None,
            failed=dict(Counter(job.failed for job in offered if job.failed is not None)),
            low_share=self._low_share() if row.high is not None else None,
            left=left,
            cpu=0.0,
        )

    def _use(self, book: Sequence[Used]) -> float:
        """What was used in a minute, on average."""
        begin, end = self.measured_from, self.end
        if begin == 0.0 or end - begin <= 60.0:
            return sum(entry.amount for entry in book if begin <= entry.at < end) / (end - begin) * 60.0
        # Each entry counts in the minutes that end within the 60 s after it; of these, those that begin after `begin`.
        shares = (
            entry.amount * max(0.0, min(entry.at + 60.0, end) - max(entry.at, begin + 60.0))
            for entry in book
            if begin <= entry.at < end
        )
        return sum(shares) / (end - begin - 60.0)

    def _delays(self) -> dict[str, tuple[float, float]]:
        """Whoever still waits at the end has waited that long at least, and counts."""
        found: dict[str, list[float]] = {}
        for job in self.offered.values():
            if job.failed is None and job.arrived >= self.measured_from:
                found.setdefault(job.importance, []).append(min(job.sent_at, self.end) - job.arrived)
        return {
            importance: (quantile(delays, 0.5), quantile(delays, 0.99)) for importance, delays in sorted(found.items())
        }

    def _low_share(self) -> float:
        """Weights of 8 and 1: a ninth is due to the low class, and in any five minutes it must get about that."""
        admitted = sorted(
            (job.admitted_at, job.importance == "low") for job in self.offered.values() if job.admitted_at < inf
        )
        worst, span, low, first = 0.0, 300.0, 0, 0
        for number, (at, is_low) in enumerate(admitted):
            low += is_low
            while admitted[first][0] <= at - span:
                low -= admitted[first][1]
                first += 1
            if at >= self.measured_from + span:
                worst = max(worst, abs(low / (number - first + 1) * 9.0 - 1.0))
        return worst


def _held(status: dict[str, Any]) -> int:
    """Clients in use, and quotas with output reserved."""
    held: int = status["providers"]["vendor"]["clients"]["in_use"]
    quotas = status["limits"]["vendor"]["quotas"].values()
    return held + sum(1 for groups in quotas for quota in groups.values() if quota["output_tokens"]["reserved"])


def _peaks(book: Sequence[Used], limit: int) -> tuple[float, float]:
    """The fullest minute that ends after the first two minutes, and within them."""
    warm = cold = total = first = 0
    for entry in book:
        total += entry.amount
        while book[first].at <= entry.at - 60.0:
            total -= book[first].amount
            first += 1
        if entry.at <= COLD:
            cold = max(cold, total)
        else:
            warm = max(warm, total)
    return warm / limit, cold / limit


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that *share* of *values* do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


# -- the table ---------------------------------------------------------------------------------------------------------


class Summary(msgspec.Struct, kw_only=True):
    """A row over its seeds: of each figure the mean and the worst."""

    row: str
    utilisation: tuple[float, float]
    ours: float
    refused: tuple[float, float]
    others_refused: float
    warm: tuple[float, float]
    cold: tuple[float, float]
    delays: dict[str, tuple[float, float]]
    """By importance, of each quantile the mean over the seeds."""
    served: tuple[float, float] | None
    failed: float
    low_share: float | None
    left: int
    cpu: float
    misses: list[str]
    """Which of the row's targets its means miss."""


def summarise(row: Row, outcomes: Sequence[Outcome]) -> Summary:
    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(outcomes)

    def low(name: str) -> tuple[float, float]:
        values = [getattr(outcome, name) for outcome in outcomes]
        return mean(values), min(values)

    def high(name: str) -> tuple[float, float]:
        values = [getattr(outcome, name) for outcome in outcomes]
        return mean(values), max(values)

    shares = [outcome.low_share for outcome in outcomes if outcome.low_share is not None]
    classes = sorted({name for outcome in outcomes for name in outcome.delays})
    summary = Summary(
        row=row.name,
        utilisation=low("utilisation"),
        ours=low("ours")[0],
        refused=high("refused"),
        others_refused=high("others_refused")[0],
        warm=high("warm"),
        cold=high("cold"),
        delays={
            name: (
                mean(outcome.delays.get(name, (0.0, 0.0))[0] for outcome in outcomes),
                mean(outcome.delays.get(name, (0.0, 0.0))[1] for outcome in outcomes),
            )
            for name in classes
        },
        served=low("served") if row.load is not None else None,
        failed=mean(sum(outcome.failed.values()) for outcome in outcomes),
        low_share=max(shares) if shares else None,
        left=max(outcome.left for outcome in outcomes),
        cpu=mean(outcome.cpu for outcome in outcomes),
        misses=[],
    )
    summary.misses = list(_misses(row, summary))
    return summary


def _misses(row: Row, found: Summary) -> Iterable[str]:
    target = row.target
    p99 = max((delays[1] for delays in found.delays.values()), default=0.0)
    low_p99 = found.delays.get("low", (0.0, 0.0))[1]
    if target.utilisation is not None and found.utilisation[0] < target.utilisation:
        yield f"utilisation ≥ {target.utilisation:.1%}"
    for word, value, most in (
        ("429s", found.refused[0], target.refused),
        ("warm peak", found.warm[0], target.warm),
        ("cold peak", found.cold[0], target.cold),
        ("p99", p99, target.p99),
        ("p99 of low", low_p99, target.low_p99),
        ("share of low off by", found.low_share or 0.0, target.low_share),
    ):
        if most is not None and value > most:
            yield f"{word} ≤ {most:g}"
    if target.served is not None and found.served is not None and found.served[0] < target.served:
        yield f"served ≥ {target.served:.0%}"
    if found.left:
        yield "nothing left"


HEADINGS = ("row", "utilisation %", "429s", "warm %", "cold %", "p50/p99 s", "served %", "failed", "left", "misses")


def lines(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """The table's cells."""

    def share(pair: tuple[float, float] | None) -> str:
        return f"{pair[0] * 100:.1f} ({pair[1] * 100:.1f})" if pair is not None else "-"

    found: list[tuple[str, ...]] = [HEADINGS]
    for summary in summaries:
        used = share(summary.utilisation)
        if summary.ours < summary.utilisation[0]:
            used += f", ours {summary.ours * 100:.1f}"
        refused = f"{summary.refused[0]:.1f} ({summary.refused[1]:.0f})"
        if summary.others_refused:
            refused += f", theirs {summary.others_refused:.0f}"
        delays = ", ".join(
            f"{name + ' ' if name != 'normal' else ''}{p50:.1f}/{p99:.1f}"
            for name, (p50, p99) in summary.delays.items()
        )
        if summary.low_share is not None:
            delays += f", low ±{summary.low_share:.0%}"
        found.append(
            (
                summary.row,
                used,
                refused,
                share(summary.warm),
                share(summary.cold),
                delays or "-",
                share(summary.served),
                f"{summary.failed:.1f}",
                str(summary.left),
                "; ".join(summary.misses) or "none",
            )
        )
    return found


def seeds(text: str) -> list[int]:
    """``tune``, ``report``, or numbers and ranges as in ``0-2,7``."""
    if text in SEEDS:
        return list(SEEDS[text])
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _task(minutes: float, name: str, seed: int) -> Outcome:
    return simulate(next(row for row in ROWS if row.name == name), seed, minutes=minutes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=seeds, default="report", help="tune (0-9), report (100-109), or e.g. 0-2,7")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="virtual minutes a row; targets are for 25")
    parser.add_argument("--rows", help="names, with commas; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    names = options.rows.split(",") if options.rows else [row.name for row in ROWS]
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in ROWS)}")
    rows = [row for row in ROWS if row.name in names]
    built = [row for row in rows if missing(row) is None]
    tasks = [(row.name, seed) for row in built for seed in options.seeds]
    with ProcessPoolExecutor(options.jobs) as processes:
        outcomes = list(processes.map(partial(_task, options.minutes), *zip(*tasks, strict=True))) if tasks else []
    summaries = [summarise(row, [outcome for outcome in outcomes if outcome.row == row.name]) for row in built]
    table = lines(summaries)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"{options.minutes:g} virtual minutes a row, seeds {', '.join(map(str, options.seeds))}")
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    for row in rows:
        reason = missing(row)
        if reason is not None:
            print(f"{row.name:<{widths[0]}}  not built: {reason}")
    cpu = sum(outcome.cpu for outcome in outcomes)
    print(
        f"{cpu:.0f} s of CPU, the slowest row {max((summary.cpu for summary in summaries), default=0.0):.1f} s a seed"
    )
    if options.json is not None:
        report = {"minutes": options.minutes, "seeds": options.seeds, "rows": summaries, "outcomes": outcomes}
        options.json.write_text(json.dumps(msgspec.to_builtins(report), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
