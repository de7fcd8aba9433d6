"""The rows of ``bench/quota.py``: who asks for how much, of which server, and what is expected of the client.

Nothing here is a setting of the client. A row says what its world is like; the client is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from random import Random
from typing import Literal, NamedTuple, TypeAlias

from quota_servers import DIMENSIONS, WINDOW, Admitted, Dimension, Kind, Quota, Server

TOKENS_PER_SECOND = 75.0
PIECE_SECONDS = 0.4
"""Between two events of a stream, and between two countings of its output."""
READING_SECONDS, READING_SPREAD = 0.3, 0.4
"""From a prompt's arrival to the beginning of its answer: the median, and the standard deviation of its logarithm. Were
it always the same, the answer would tell when the prompt arrived."""
ESTIMATE_ERROR = 0.06
"""Standard deviation of a prompt's true tokens around what a quarter of its bytes says."""
SERVER_ERROR = 0.02
"""The same of the server's own estimate around the truth, until the answer begins."""
LARGEST_PROMPT = 50_000
"""Tokens; the tail of the distribution is cut here."""

BASE = Quota(requests=300, input_tokens=200_000, output_tokens=30_000)
REQUEST_BOUND = Quota(requests=300, input_tokens=200_000, output_tokens=60_000)
"""With the base key 300 uniform answers of 100 tokens would use up the output limit as well."""

Importance: TypeAlias = Literal["high", "normal", "low"]


class Job:
    """One call to be made, and what became of it."""

    __slots__ = (
        "admitted_at",
        "arrived",
        "failed",
        "importance",
        "input_tokens",
        "max_tokens",
        "number",
        "output_tokens",
        "sent_at",
        "served",
        "server_estimate",
        "size",
    )

    def __init__(self, number: int, arrived: float, shape: Shape, importance: Importance, chance: Random) -> None:
        self.number = number
        self.arrived = arrived
        self.importance = importance
        self.size, self.output_tokens = shape.draw(chance)
        """Tokens of the prompt if four bytes were one token."""
        self.max_tokens = shape.max_tokens
        self.input_tokens = max(1, round(self.size * max(0.5, chance.gauss(1.0, ESTIMATE_ERROR))))
        self.server_estimate = max(1, round(self.input_tokens * max(0.5, chance.gauss(1.0, SERVER_ERROR))))
        self.sent_at = self.admitted_at = inf
        """Of the last attempt, by the client's sending and by the server."""
        self.served = False
        self.failed: str | None = None


class Shape(NamedTuple):
    """How large the calls are: a function that draws (prompt, answer) in tokens, and the ``max_tokens`` they ask."""

    draw: Callable[[Random], tuple[int, int]]
    max_tokens: int
    per_minute: float
    """How many of them the base key admits in a minute, on average."""


def _uniform(chance: Random) -> tuple[int, int]:
    return chance.randint(250, 350), chance.randint(60, 140)


def _heavy(chance: Random) -> tuple[int, int]:
    size = min(LARGEST_PROMPT, max(8, round(600 * chance.lognormvariate(0.0, 1.2))))
    return size, min(4096, max(1, round(150 * chance.lognormvariate(0.0, 1.0))))


UNIFORM = Shape(_uniform, 256, 300.0)
HEAVY = Shape(_heavy, 4096, 121.0)


class Steady(NamedTuple):
    """Calls that come at random, *per_minute* of them on average."""

    per_minute: float

    def arrivals(self, chance: Random) -> Iterator[float]:
        now = 0.0
        while True:
            now += chance.expovariate(self.per_minute / 60.0)
            yield now


class Bursts(NamedTuple):
    """*size* calls at once, every *seconds*."""

    size: int
    seconds: float

    def arrivals(self, chance: Random) -> Iterator[float]:
        now = 0.0
        while True:
            yield from (now,) * self.size
            now += self.seconds


class Target(NamedTuple):
    """What issue 4 asks of a row's mean over its seeds, over 25 minutes. Shares are of 1; None: only stated."""

    utilisation: float | None = None
    refused: int | None = None
    warm: float | None = None
    cold: float | None = None
    served: float | None = None
    p99: float | None = None
    low_p99: float | None = None
    low_share: float | None = None
    """How far (relative) the share of the low class may be from its due in any five minutes."""


class Row(NamedTuple):
    """One world."""

    name: str
    kind: Kind
    shape: Shape
    binding: Dimension
    """The limit that is short."""
    keys: tuple[Quota, ...] = (BASE,)
    load: Steady | Bursts | None = None
    """None: there is always more to do than can be done."""
    high: float | None = None
    """Share of the calls that are of high importance, the others being of low; None: nobody says."""
    hidden: float = 0.0
    """Share of the key that somebody else uses, for two minutes of four."""
    prefilled: bool = False
    """Whether a process before this one has used the key up in the minute before."""
    overloads: float = 0.0
    """Share of the calls that are admitted and then answered with 529."""
    spikes: float = 0.005
    """Share of the messages that are late by 0.2 to 1.5 s."""
    minutes: float | None = None
    """Its own length, where the issue names one; measured from its beginning then."""
    target: Target = Target()

    @property
    def dialect(self) -> Literal["anthropic", "openai"]:
        return "openai" if self.kind == "reserve_max" else "anthropic"


FOUR = (1, 1, 2, 6)
SMALL = Quota(requests=100, input_tokens=66_667, output_tokens=10_000)

ROWS = (
    Row("strict-uniform", "strict", UNIFORM, "requests", keys=(REQUEST_BOUND,), target=Target(0.995, 0)),
    Row("strict-both", "strict", UNIFORM, "requests"),
    # With the base key's output limit both would bind at the same rate: 150,000 : 1,233 is 30,000 : 247.
    Row(
        "strict-input",
        "strict",
        HEAVY,
        "input_tokens",
        keys=(Quota(requests=300, input_tokens=150_000, output_tokens=60_000),),
        target=Target(0.98, 4),
    ),
    Row("strict-heavy", "strict", HEAVY, "output_tokens", target=Target(0.925, 3, warm=1.03, cold=1.12)),
    Row("strict-bursts", "strict", HEAVY, "output_tokens", load=Bursts(170, 90.0)),
    Row("bucket-uniform", "bucket", UNIFORM, "requests", keys=(REQUEST_BOUND,), target=Target(0.995, 0)),
    Row("bucket-heavy", "bucket", HEAVY, "output_tokens", target=Target(0.90, 2)),
    Row("burst5-uniform", "burst", UNIFORM, "requests", target=Target(0.94, 80)),
    Row("reserve-max", "reserve_max", HEAVY, "tokens", keys=(Quota(requests=300, tokens=200_000),)),
    Row("hidden-uniform", "strict", UNIFORM, "requests", hidden=0.4),
    Row("hidden-heavy", "strict", HEAVY, "output_tokens", hidden=0.4, target=Target(refused=30)),
    Row("restart-uniform", "strict", UNIFORM, "requests", prefilled=True, minutes=3.0, target=Target(0.95, 0)),
    Row("restart-heavy", "strict", HEAVY, "output_tokens", prefilled=True, minutes=3.0),
    # Every attempt must pay for itself: an unpaid one shows here as a 429.
    Row("overloads", "strict", UNIFORM, "requests", overloads=0.02),
    Row(
        "four-keys",
        "strict",
        UNIFORM,
        "requests",
        keys=tuple(BASE.times(factor) for factor in FOUR),
        load=Steady(0.9 * 300 * sum(FOUR)),
        target=Target(refused=0, served=1.0, p99=2.0),
    ),
    Row(
        "four-keys-bursts",
        "strict",
        UNIFORM,
        "requests",
        keys=tuple(SMALL.times(factor) for factor in FOUR),
        load=Bursts(400, 30.0),
    ),
    Row(
        "two-classes",
        "strict",
        UNIFORM,
        "requests",
        load=Steady(1.5 * 300),
        high=0.9,
        target=Target(refused=0, low_p99=400.0, low_share=0.1),
    ),
)


def jobs(row: Row, chance: Random) -> Iterator[Job]:
    """The calls of a row, without end; those of a load in the order and with the instants of their arrival."""
    arrivals = row.load.arrivals(chance) if row.load is not None else None
    number = 0
    while True:
        number += 1
        importance: Importance = "normal"
        if row.high is not None:
            importance = "high" if chance.random() < row.high else "low"
        yield Job(number, next(arrivals) if arrivals is not None else 0.0, row.shape, importance, chance)


class Used(NamedTuple):
    """What a key's server has admitted or produced, in the dimension that binds."""

    at: float
    amount: int
    ours: bool


class Vendor:
    """The keys' servers of one row, with a book of what they let through, kept apart from what they go by.

    *clock* tells the time and *call_at* sets a timer; all instants are seconds from the row's beginning. *others* is
    the chance by which somebody else calls: apart, so that our own calls do not change theirs.
    """

    def __init__(
        self,
        row: Row,
        chance: Random,
        others: Random,
        *,
        clock: Callable[[], float],
        call_at: Callable[..., object],
    ) -> None:
        self.row = row
        self.servers = [Server(row.kind, quota) for quota in row.keys]
        self.books: list[list[Used]] = [[] for _ in row.keys]
        self.refused = self.others_refused = 0
        self._chance = chance
        self._others = others
        self._clock = clock
        self._call_at = call_at

    @property
    def limits(self) -> list[int]:
        """Of the dimension that binds, key by key."""
        return [quota[DIMENSIONS.index(self.row.binding)] or 0 for quota in self.row.keys]

    def arrive(self, key: int, job: Job, *, ours: bool = True) -> Answer | float:
        """The request for *job* has arrived: it is let in, or told how many seconds to stay away."""
        now = self._clock()
        answer = self.servers[key].arrive(now, input_tokens=job.server_estimate, max_tokens=job.max_tokens)
        if not isinstance(answer, Admitted):
            if ours:
                self.refused += 1
            else:
                self.others_refused += 1
            return answer.retry_after
        job.admitted_at = now
        return Answer(self, key, job, answer, ours)

    def prefill(self) -> None:
        """Use up the limit that binds, evenly, in the minute before the beginning: the calls of a process before us."""
        needs: list[dict[Dimension, int]] = []
        used = 0
        while used < self.limits[0]:
            job = Job(0, 0.0, self.row.shape, "normal", self._others)
            need: dict[Dimension, int] = {
                "requests": 1,
                "input_tokens": job.input_tokens,
                "output_tokens": job.output_tokens,
            }
            needs.append(need)
            used += need[self.row.binding]
        for number, need in enumerate(needs):
            at = WINDOW * (number + 0.5) / len(needs) - WINDOW
            for dimension, meter in self.servers[0].meters.items():
                meter.add(min(need[dimension], max(0.0, meter.remaining(at))), at)

    def haunt(self, end: float) -> None:
        """Let somebody use the row's ``hidden`` share of the first key, two minutes on and two off."""
        shape, chance = self.row.shape, self._others
        rate = self.row.hidden * shape.per_minute / 60.0
        begin = chance.uniform(0.0, 240.0)

        def visit() -> None:
            now = self._clock()
            if (now + begin) % 240.0 < 120.0:
                answer = self.arrive(0, Job(0, now, shape, "normal", chance), ours=False)
                if isinstance(answer, Answer):
                    answer.run()
            then = now + chance.expovariate(rate)
            if then < end:
                self._call_at(then, visit)

        self._call_at(chance.expovariate(rate), visit)

    def book(self, key: int, dimension: Dimension, at: float, amount: int, ours: bool) -> None:
        if dimension == self.row.binding and amount:
            self.books[key].append(Used(at, amount, ours))


class Answer:
    """One admitted request, being answered: it counts on the server's side in the server's time."""

    __slots__ = ("_admitted", "_call_at", "_given_up", "_job", "_key", "_ours", "_vendor", "overloaded", "pieces")

    def __init__(self, vendor: Vendor, key: int, job: Job, admitted: Admitted, ours: bool) -> None:
        self._vendor = vendor
        self._key = key
        self._job = job
        self._admitted = admitted
        self._ours = ours
        self._call_at = vendor._call_at
        self._given_up = False
        self.overloaded = ours and vendor._chance.random() < vendor.row.overloads
        now = vendor._clock()
        vendor.book(key, "requests", now, 1, ours)
        if vendor.row.kind == "reserve_max":
            vendor.book(key, "tokens", now, max(job.max_tokens, job.server_estimate), ours)
        begin = now + READING_SECONDS * vendor._chance.lognormvariate(0.0, READING_SPREAD)
        piece = round(TOKENS_PER_SECOND * PIECE_SECONDS)
        whole, rest = divmod(job.output_tokens, piece)
        self.pieces = [(begin, 0)] + [(begin + PIECE_SECONDS * (number + 1), piece) for number in range(whole)]
        """When how many tokens are ready, the first being the answer's head."""
        if rest:
            self.pieces.append((self.pieces[-1][0] + rest / TOKENS_PER_SECOND, rest))

    def run(self) -> None:
        """Count on, piece by piece."""
        if not self.overloaded:
            self._vendor.book(self._key, "input_tokens", self._vendor._clock(), self._job.input_tokens, self._ours)
        self._next(0)

    def give_up(self) -> None:
        """The client has gone: nothing more is produced."""
        self._given_up = True

    def _next(self, number: int) -> None:
        if number < len(self.pieces):
            self._call_at(self.pieces[number][0], lambda: self._produce(number))

    def _produce(self, number: int) -> None:
        now, tokens = self.pieces[number]
        if number == 0:
            self._admitted.correct(now, 0 if self.overloaded else self._job.input_tokens)
            if self.overloaded:
                return
        elif self._given_up:
            return
        self._admitted.produce(now, tokens)
        self._vendor.book(self._key, "output_tokens", now, tokens, self._ours)
        self._next(number + 1)
