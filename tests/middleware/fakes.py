"""A pool without providers, a handler that a test decides about, and a bench that puts a limiter between the two."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from math import inf
from typing import Any

from llm.core.events import Event, Events
from llm.core.exceptions import LLMException, Scope
from llm.core.settings import LimitSettings
from llm.core.types import Cost, KeyRef, LLMResponse, Message, MessageRole, Options, Request, Usage
from llm.middleware.base import Call, Lease, PoolKey, Reply
from llm.middleware.rate_limiter import RateLimitMiddleware
from llm.testing.clock import FakeClock
from llm.utils.output_predictor import Expectation, OutputPredictor
from llm.utils.quota import Quota
from llm.utils.sliding_window import Ledger
from llm.utils.tokens import TokenEstimator

WINDOW = 60.0
GUARD = 0.25
SPAN = WINDOW + GUARD


class FakeKey:
    """A key whose state a test sets."""

    def __init__(self, number: int, model: str | None = None, limits: LimitSettings | None = None) -> None:
        self.ref = KeyRef("fake", number)
        self.model = model
        self.limits = limits if limits is not None else LimitSettings()
        self.quota_pool: str | None = None
        self.available_at = 0.0
        self.cause: LLMException | None = None

    def __repr__(self) -> str:
        return f"<FakeKey {self.ref.number}>"


class FakeLease:
    """One client in use."""

    def __init__(self, key: FakeKey) -> None:
        self.key = key


class FakePool:
    """Implements :class:`llm.middleware.base.KeyPool`: keys, a number of clients, and a record of what was released."""

    default_model: str | None = "default"

    def __init__(self, keys: Sequence[FakeKey], clients: int = 1_000_000) -> None:
        self.keys = tuple(keys)
        self.clients = clients
        self.in_use: set[FakeLease] = set()
        self.released: list[tuple[int, type[BaseException] | None]] = []
        """(key, class of the error): the error itself would keep its call alive."""
        self.admitted: list[int] = []
        self.looked_at = 0
        """How often somebody looked for a key: the work that a wake-up causes."""
        self._next = 0
        self._callbacks: list[Callable[[], None]] = []

    def route(self, model: str | None) -> tuple[FakeKey, ...]:
        return self.keys if model is None else tuple(key for key in self.keys if key.model in (None, model))

    def rotation(self, route: Sequence[PoolKey]) -> Sequence[PoolKey]:
        self.looked_at += 1
        return (
            *(key for key in route if key.ref.number > self._next),
            *(key for key in route if key.ref.number <= self._next),
        )

    def lease(self, key: PoolKey) -> FakeLease | None:
        assert isinstance(key, FakeKey)
        if len(self.in_use) >= self.clients:
            return None
        lease = FakeLease(key)
        self.in_use.add(lease)
        self.admitted.append(key.ref.number)
        self._next = key.ref.number
        return lease

    def release(self, lease: Lease, error: BaseException | None) -> None:
        assert isinstance(lease, FakeLease)
        self.in_use.remove(lease)
        self.released.append((lease.key.ref.number, type(error) if error is not None else None))
        if isinstance(error, LLMException) and error.scope is Scope.KEY:
            if error.retryable:
                self.pause(lease.key, error.retry_after or 1.0, after=0.0)
            else:
                self.park(lease.key, error)

    def refusal(self, route: Sequence[PoolKey]) -> LLMException | None:
        for key in route:
            if key.available_at < inf:
                return None
        key = route[-1]
        assert isinstance(key, FakeKey)
        assert key.cause is not None
        return type(key.cause)(f"out of use: {key.cause.message}", retryable=False, scope=Scope.PROVIDER)

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    # -- what a test does to it --------------------------------------------------------------------------------------

    now: Callable[[], float] = staticmethod(lambda: 0.0)

    def pause(self, key: FakeKey, seconds: float, *, after: float = 0.0) -> None:
        key.available_at = self.now() + after + seconds
        self.changed()

    def park(self, key: FakeKey, cause: LLMException) -> None:
        key.available_at = inf
        key.cause = type(cause)(cause.message)
        self.changed()

    def restore(self, key: FakeKey) -> None:
        key.available_at = 0.0
        self.changed()

    def changed(self) -> None:
        for callback in self._callbacks:
            callback()


def ask(
    content: str = "hello",
    *,
    model: str | None = None,
    deadline: float | None = None,
    name: str = "call",
    max_tokens: int | None = None,
) -> Call:
    """The record of a call. *deadline* is an instant."""
    request = Request((Message(MessageRole.USER, content),), "", Options(max_tokens=max_tokens))
    return Call(name, request, provider="fake", model=model, started=0.0, deadline=deadline)


def answer(input_tokens: int = 0, output_tokens: int = 0) -> LLMResponse:
    return LLMResponse(text="hello yourself", model="m", usage=Usage(input_tokens, output_tokens))


def a_quarter_of_the_bytes(request: Request) -> int:
    return sum(4 + len(message.text.encode()) // 4 for message in request.messages)


class Counted(TokenEstimator):
    """Knows what each request has, and learns nothing: so a test can name what a call takes."""

    def __init__(self, count: Callable[[Request], int]) -> None:
        super().__init__()
        self.count = count

    def measure(self, request: Request) -> float:
        return float(self.count(request))

    def estimate(self, request: Request | float, *, model: str, tag: str = "") -> int:
        return int(request if isinstance(request, float) else self.measure(request))

    def learn(self, request: Request | float, *, model: str, tag: str = "", actual: int, cached: int = 0) -> None:
        """What comes changes nothing."""


class Guessed(OutputPredictor):
    """Expects the same of every answer, and learns nothing."""

    def __init__(self, guess: int) -> None:
        super().__init__("throughput")
        self.guess = guess

    def expect(self, *, model: str, tag: str = "", max_tokens: int | None = None, produced: int = 0) -> Expectation:
        whole = self.guess if max_tokens is None else min(self.guess, max_tokens)
        return Expectation(float(max(0, whole - produced)), 0.0)


class Bench:
    """A limiter on a fake clock over a fake pool; calls are held at the provider until a test lets them go."""

    def __init__(
        self,
        *keys: FakeKey,
        clients: int = 1_000_000,
        cost: Cost | None = None,
        **options: Any,
    ) -> None:
        self.clock = FakeClock(start=1000.0)
        self.pool = FakePool(keys, clients)
        self.pool.now = self.clock.now
        self.events = Events()
        self.told: list[Event] = []
        if cost is not None:
            options["estimate"] = lambda request: cost.input_tokens
        options.setdefault("estimator", Counted(options.pop("estimate", a_quarter_of_the_bytes)))
        options.setdefault("predictor", Guessed(cost.output_tokens if cost is not None else 512))
        self.limiter = RateLimitMiddleware(self.pool, clock=self.clock, name="fake", events=self.events, **options)
        self.sent: list[tuple[float, int, str]] = []
        """(time, key, call) of everything that left."""
        self.usage = Usage(10, 10)
        """What every answer tells."""

    def quota(self, key: FakeKey | None = None, model: str | None = None) -> Quota:
        """The books of *key*, else of the first."""
        key = key if key is not None else self.pool.keys[0]
        return self.limiter.quota(key, model or key.model or "default")

    def ledger(self, key: FakeKey | None = None, model: str | None = None) -> Ledger:
        return self.quota(key, model).ledger

    def listen(self, *kinds: type[Event]) -> None:
        self.events.listen(self.told.append, *kinds)

    async def provider(self, call: Call) -> Reply:
        """Answers at once."""
        return self.leave(call)

    def leave(self, call: Call) -> LLMResponse:
        assert call.admission is not None
        call.admission.sent()
        self.sent.append((self.clock.now(), call.admission.key.number, call.id))
        return answer(self.usage.input_tokens, self.usage.output_tokens)

    def start(self, call: Call, handler: Callable[[Call], Coroutine[Any, Any, Reply]] | None = None) -> Task:
        return asyncio.get_running_loop().create_task(self._run(call, self.provider if handler is None else handler))

    async def _run(self, call: Call, handler: Callable[[Call], Coroutine[Any, Any, Reply]]) -> Reply:
        return await self.limiter(call, handler)

    async def fill(self, calls: int = 1) -> None:
        """Use up capacity now."""
        for number in range(calls):
            await self.limiter(ask(name=f"filler {number}"), self.provider)

    @property
    def order(self) -> list[str]:
        """The names of the calls in the order in which they left, the fillers apart."""
        return [name for _, _, name in self.sent if not name.startswith("filler")]

    @property
    def queued(self) -> object:
        return self.limiter.statistics()["queued"]


Task = asyncio.Task[Reply]


class Hold:
    """A provider at which calls stay until they are let go, or fail."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._held: dict[str, asyncio.Future[LLMResponse]] = {}

    async def __call__(self, call: Call) -> Reply:
        reply = self._bench.leave(call)
        future = self._held[call.id] = asyncio.get_running_loop().create_future()
        try:
            await future
        finally:
            del self._held[call.id]
        return reply

    async def let_go(self, *names: str) -> None:
        for name in names or tuple(self._held):
            self._held[name].set_result(answer())
        await self._bench.clock.settle()


def limited(number: int, requests: int | None = None, model: str | None = None, **limits: Any) -> FakeKey:
    """A key with *requests* a minute, and perhaps other limits."""
    return FakeKey(number, model, LimitSettings(requests_per_minute=requests, window_seconds=WINDOW, **limits))


async def outcome(task: Task) -> BaseException | Reply:
    """What became of a task, as a value."""
    try:
        return await task
    except BaseException as error:
        return error
