"""Cancellation: one call, given up at every point where it waits, leaves nothing and pays what it must."""

from __future__ import annotations

import asyncio
import gc
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from llm import (
    LLMClient,
    LLMConnectionError,
    LLMException,
    LLMManager,
    LLMStreamInterruptedError,
    Message,
    MessageRole,
)
from llm.core.client import StreamingCall
from llm.core.settings import ProviderSettings
from llm.core.stream import ResponseStream
from llm.core.types import Cost, Request
from llm.middleware.base import Call, Handler, Reply
from llm.testing.clock import FakeClock
from llm.testing.simulator import Simulator, SimulatorSettings
from llm.testing.transport import Answer, Scripted, ScriptedTransport
from llm.transports.base import HTTPRequest
from llm.transports.http import HTTPTransport
from llm.utils.clock import Clock, SystemClock
from tests.core.rig import END, PROMPT, answer, configuration, delta, failure, is_probe, stream
from tests.middleware.fakes import Counted, Guessed, a_quarter_of_the_bytes
from tests.quotas import quotas
from tests.stepping import MOMENTS, Steps, Watched, other_tasks, until

OPTIONS: dict[str, Any] = {"max_tokens": 50}
RESERVED = Cost(1, a_quarter_of_the_bytes(Request((Message(MessageRole.USER, PROMPT),), "m")), 50)
TAIL = 1.0
"""Seconds after which nothing can be left of an answer of 50 tokens that was given up: it would have ended."""
USED = Cost(1, 3, 2)
WINDOW = 60.25
Way = Callable[..., Coroutine[Any, Any, str]]
OTHERS = re.compile(rb'"content":"(before|holding)"')
"""The prompts of calls that are not the one under test."""
LIMITS = {"requests_per_minute": 10, "input_tokens_per_minute": 100_000, "output_tokens_per_minute": 100_000}
ONE = LIMITS | {"requests_per_minute": 1}


async def whole(client: LLMClient, **options: Any) -> str:
    return await client.chat(PROMPT, **OPTIONS, **options)


async def streamed(client: LLMClient, **options: Any) -> str:
    return "".join([chunk.text async for chunk in client.stream_complete(PROMPT, **OPTIONS, **options)])


async def entered(client: LLMClient, **options: Any) -> str:
    async with client.stream_complete(PROMPT, **OPTIONS, **options) as chunks:
        return "".join([chunk.text async for chunk in chunks])


class Slow:
    """A layer of the user's, which waits before and after, also after a failure."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        await self._clock.sleep(1.0)
        reply = await handler(call)
        await self._clock.sleep(1.0)
        return reply


class Scenario(NamedTuple):
    """A way for a call to go, with everything in it that takes time."""

    name: str
    call: Way
    answers: tuple[Answer, ...]
    limits: dict[str, int] = LIMITS
    keys: int = 1
    before: int = 0
    """Calls that were answered before, and have used up what they have."""
    holding: int = 0
    """Calls that hold a client for ten seconds."""
    slow: bool = False
    provider: dict[str, Any] = {}  # noqa: RUF012  # never changed
    options: dict[str, Any] = {}  # noqa: RUF012
    waits: int = 2
    """The least number of points at which it must wait."""


SLOW_BODY = (answer().body[:20], 0.5, answer().body[20:])
SLOWLY = Scripted(200, answer().headers, pieces=SLOW_BODY, delay=1.0)
PIECES = (b": hello\n\n", 0.5, delta("hel"), 0.5, delta("lo"), 0.5, END, 0.5)
STREAMED = stream(*PIECES, delay=1.0)
LOST = stream(b": hello\n\n", 0.5)
"""A stream whose connection is lost before its content; the error is another one each time, as its traceback is."""
FORBIDDEN = replace(failure(403), delay=1.0)
BUSY = failure(503, retry_after="2")

SCENARIOS = [
    Scenario("whole", whole, (SLOWLY,)),
    Scenario("whole with a deadline", whole, (SLOWLY,), options={"timeout": 500.0}),
    Scenario("streamed", streamed, (STREAMED,)),
    Scenario("streamed in async with", entered, (STREAMED,)),
    Scenario("streamed with a deadline", streamed, (STREAMED,), options={"timeout": 500.0}),
    Scenario("queued for capacity", whole, (SLOWLY,), limits=ONE, before=1),
    Scenario("queued with a deadline", entered, (STREAMED,), limits=ONE, before=1, options={"timeout": 500.0}),
    Scenario("queued for a client", whole, (SLOWLY,), holding=1, provider={"pool": {"max_size": 1}}),
    Scenario("backoff", whole, (BUSY, SLOWLY)),
    Scenario("backoff of a stream", streamed, (BUSY, STREAMED)),
    Scenario("a stream lost before its content", streamed, (LOST, STREAMED)),
    Scenario("renewal for capacity", whole, (BUSY, SLOWLY), limits=ONE),
    Scenario("renewal on another key", whole, (failure(429, retry_after="30"), SLOWLY), keys=2),
    Scenario("renewal when the key's pause is over", streamed, (failure(429, retry_after="30"), STREAMED)),
    Scenario("a refused key", whole, (failure(401), SLOWLY), keys=2),
    Scenario("a probe", whole, (FORBIDDEN,)),
    Scenario("layers of the user's", whole, (SLOWLY,), slow=True),
    Scenario("layers of the user's around a stream", streamed, (BUSY, STREAMED), slow=True),
]


class Run(NamedTuple):
    """A manager of one scenario, and what can be seen of it."""

    manager: LLMManager
    client: LLMClient
    clock: FakeClock
    watched: Watched

    def status(self) -> dict[str, Any]:
        [status] = self.manager.get_status()["providers"].values()
        return dict(status)

    def spent(self, *, tails: bool = False) -> Cost:
        """What the ledgers of all keys say. With *tails*, answers that were given up may still be produced."""
        keys = quotas(self.manager)
        for key in keys:
            assert key["under_way"] == 0
            assert key["output_tokens"]["reserved"] in ((0, RESERVED.output_tokens) if tails else (0,))
        return Cost(*(sum(key[name]["used"] for key in keys) for name in ("requests", "input_tokens", "output_tokens")))

    def expected(self, *, used: Cost = USED, answered: bool) -> Cost:
        """What they should say: what went over the wire, put through the refund table."""
        costs = []
        for attempt in self.watched.attempts:
            if attempt.at + WINDOW > self.clock.now():
                by_others = OTHERS.search(attempt.request.body) is not None
                costs.append(attempt.cost(RESERVED, USED if by_others else used, answered=answered or by_others))
        return Cost(*(sum(getattr(cost, name) for cost in costs) for name in Cost.__struct_fields__))


def build(scenario: Scenario) -> Run:
    clock = FakeClock()
    answers = list(scenario.answers)

    def reply(request: HTTPRequest) -> Answer:
        if is_probe(request):
            return Scripted(200, body=b"{}", delay=1.0)
        if match := OTHERS.search(request.body):
            return answer(tokens=(3, 2), delay=10.0 if match[1] == b"holding" else 0.0)
        found = answers.pop(0)
        return stream(*LOST.pieces or (), LLMConnectionError("lost", sent=True)) if found is LOST else found

    watched = Watched(ScriptedTransport(reply, clock=clock), clock)
    manager = LLMManager.from_config(
        configuration(scenario.keys, rate_limits=[scenario.limits] * scenario.keys, **scenario.provider),
        environ={},
        clock=clock,
        random=lambda: 0.5,
        transport=lambda settings, clock: watched,
        middleware={"slow": Slow(clock)} if scenario.slow else {},
    )
    count_plainly(manager)
    return Run(manager, manager.get_client(), clock, watched)


def count_plainly(manager: LLMManager) -> None:
    """Let every prompt and answer be reckoned at what :data:`RESERVED` says, whatever was learnt before."""
    for line in manager._lines.values():
        line.limiter._appraiser.estimator = Counted(a_quarter_of_the_bytes)
        line.limiter._appraiser.predictor = Guessed(RESERVED.output_tokens)


def is_failure(answer: Answer, status: int) -> bool:
    return isinstance(answer, Scripted) and answer.status == status


async def drive(clock: FakeClock, task: asyncio.Task[Any]) -> None:
    while not task.done():
        await clock.settle()
        if not task.done():
            await clock.advance(0.25)


async def run_scenario(scenario: Scenario, steps: Steps) -> None:
    """One call, whole or cancelled, and then a look into every corner."""
    # It reads files: not on the loop.
    run = await asyncio.to_thread(build, scenario)
    tasks = other_tasks()
    async with run.manager:
        for _ in range(scenario.before):
            await run.client.chat("before")
        holding = [asyncio.create_task(run.client.chat("holding")) for _ in range(scenario.holding)]
        await run.clock.settle()

        task = steps.start(scenario.call(run.client, **scenario.options))
        await drive(run.clock, task)

        assert task.cancelled() is steps.struck, "a cancellation is never swallowed"
        answered = not task.cancelled() and task.exception() is None
        for held in holding:
            await drive(run.clock, held)
        status = run.status()
        assert status["clients"]["in_use"] == 0
        assert status["queued"] == 0
        if not any(is_failure(a, 403) for a in scenario.answers):
            # A probe that was begun for this call may be answering others, and goes on.
            assert status["connections"]["in_flight"] == 0
        await run.clock.advance(TAIL)
        assert run.spent() == run.expected(answered=answered)
        requests = run.manager.get_status()["metrics"]["requests"]
        # Cancelled while the rest of a whole stream's body is read: the answer was there all the same.
        whole = any(b"[DONE]" in attempt.received for attempt in run.watched.attempts)
        assert (requests["in_progress"], requests["cancelled"]) == (0, int(steps.struck and not whole))

        # Whatever time would have brought it: a probe that others may be waiting for, a pause, a window.
        await run.clock.advance(1_000.0)
        assert other_tasks() == tasks
        assert run.clock.timers == 0
        assert run.status()["connections"]["in_flight"] == 0
        last = asyncio.create_task(run.client.chat("before"))
        await drive(run.clock, last)
        assert last.result() == "hello", "the next call is served"
    assert run.clock.timers == 0
    assert run.watched.statistics()["open"] == 0
    assert other_tasks() == tasks


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
async def test_a_call_given_up_at_any_point_leaves_nothing_and_pays_by_the_refund_table(
    scenario: Scenario,
) -> None:
    whole_way = Steps()
    await run_scenario(scenario, whole_way)
    assert whole_way.waits >= scenario.waits, "the scenario no longer waits where it is meant to"
    for moment in MOMENTS:
        for at in range(1, whole_way.waits + 1):
            steps = Steps(at, moment)
            await run_scenario(scenario, steps)
            assert steps.struck, steps


async def test_the_points_at_which_calls_are_given_up_are_many(tell: Callable[[str], None]) -> None:
    points = []
    for scenario in SCENARIOS:
        steps = Steps()
        await run_scenario(scenario, steps)
        points.append(steps.waits)
    tell(f"cancelled at {sum(points)} points of {len(points)} kinds of calls, each in {len(MOMENTS)} ways")
    assert sum(points) >= 60


# ---------------------------------------------------------------- real sockets


def descriptors() -> set[str]:
    """The sockets that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return {target for target in found if target.startswith("socket:")}


async def sockets() -> set[str]:
    return await asyncio.to_thread(descriptors)


@asynccontextmanager
async def real(simulator: Simulator, **provider: Any) -> AsyncIterator[Run]:
    """A manager whose vendor is *simulator*, and at the end nothing is left of it."""
    clock = SystemClock()
    transports: list[Watched] = []

    def transport(settings: ProviderSettings, clock: Clock) -> Watched:
        http = HTTPTransport(settings.transport, settings.timeouts, clock=clock, environ={})
        transports.append(Watched(http, clock))
        return transports[-1]

    config = {
        "providers": {
            "openai": {
                "base_url": simulator.openai_url,
                "api_keys": ["key1", "key2"],
                "models": "m",
                "rate_limits": [LIMITS | {"requests_per_minute": 1000}] * 2,
                **provider,
            }
        },
        "middleware": {
            "retry": {"base_delay": 0.005, "max_delay": 0.01},
            "rate_limiter": {"slow_start": False},
            # Most answers are failures: with a breaker there would soon be nothing under way that could be ended.
            "circuit_breaker": {"enabled": False},
        },
    }
    tasks, before = other_tasks(), await sockets()
    async with await asyncio.to_thread(LLMManager.from_config, config, environ={}, transport=transport) as manager:
        count_plainly(manager)
        yield Run(manager, manager.get_client(), clock, transports[0])  # type: ignore[arg-type]  # this one nobody moves
    assert transports[0].statistics()["open"] == transports[0].statistics()["in_flight"] == 0
    # The simulator's side ends a little later.
    await until(lambda: other_tasks() <= tasks)
    while await sockets() - before:
        await asyncio.sleep(0)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts the descriptors in /proc")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("call", "faults"),
    [(whole, []), (whole, ["pause"]), (whole, ["503"]), (streamed, []), (streamed, ["pause"]), (entered, ["reset"])],
    ids=lambda value: value.__name__ if callable(value) else " ".join(value) or "well",
)
async def test_over_real_sockets_too(call: Way, faults: list[str], warm: bool) -> None:
    """Connect, write, head, body, stream: how many points there are is the machine's, so all are taken."""
    struck = 0
    async with Simulator(SimulatorSettings(latency=0.002, fault_seconds=0.002)) as simulator:
        async with real(simulator) as run:
            await call(run.client)
            used = run.spent()
        for moment in MOMENTS:
            steps = Steps(1, moment)
            while steps.at is not None:
                async with real(simulator) as run:
                    if warm:
                        await run.client.chat("before", max_tokens=1)
                        run.watched.attempts.clear()
                    before = run.spent() if warm else Cost(0, 0, 0)
                    for fault in faults:
                        simulator.fail(fault)
                    task = steps.start(call(run.client))
                    await asyncio.wait((task,))
                    assert task.cancelled() is steps.struck
                    status = run.status()
                    assert status["clients"]["in_use"] == 0
                    assert status["queued"] == 0
                    assert status["connections"]["in_flight"] == 0
                    cost = run.expected(used=used, answered=not task.cancelled())
                    spent = run.spent(tails=True)
                    assert spent == Cost(*(getattr(before, n) + getattr(cost, n) for n in Cost.__struct_fields__))
                    simulator.heal()
                    assert await run.client.chat("after")
                struck += steps.struck
                steps = Steps(steps.at + 1, moment) if steps.struck else Steps(None)
    assert struck >= 2


# ---------------------------------------------------------------- other ways of leaving


async def test_an_abandoned_stream_that_is_collected_has_given_back_everything() -> None:
    run = await asyncio.to_thread(build, Scenario("", streamed, (stream(delta("a"), 1e6, END),) * 4))
    async with run.manager:
        # Left by `break`, by an exception in the loop's body, by dropping its iterator, and by dropping the stream.
        async for _ in run.client.stream_complete(PROMPT, **OPTIONS):
            break
        assert run.watched.statistics()["in_flight"] == 0
        with pytest.raises(ZeroDivisionError):
            await divide(run.client.stream_complete(PROMPT, **OPTIONS))
        assert run.watched.statistics()["in_flight"] == 0
        pieces = aiter(run.client.stream_complete(PROMPT, **OPTIONS))
        assert (await anext(pieces)).text == "a"
        assert run.watched.statistics()["in_flight"] == 1
        del pieces
        gc.collect()
        assert run.watched.statistics()["in_flight"] == 0
        assert run.status()["clients"]["in_use"] == 0
        await run.clock.advance(TAIL)
        assert run.spent() == Cost(3, 3 * RESERVED.input_tokens, 0)
        assert run.manager.get_status()["metrics"]["requests"]["cancelled"] == 3
    assert run.clock.timers == 0


async def divide(chunks: StreamingCall) -> None:
    async for _ in chunks:
        raise ZeroDivisionError


KINDS = ["slow_first_byte", "stall", "503", "429", "403", "reset", None, None]


async def test_closing_under_load_ends_every_call_with_an_answer_or_a_typed_error() -> None:
    """Four hundred calls: queued for capacity and for clients, connecting, in bodies, streams, backoff and probes."""
    settings = SimulatorSettings(latency=(0.01, 1.0), script=KINDS * 200, fault_seconds=5.0)
    async with Simulator(settings) as simulator:
        forgotten: list[ResponseStream] = []

        async def forget(client: LLMClient) -> str:
            forgotten.append(await client.stream_complete(PROMPT).__aenter__())
            return "left open"

        limits = LIMITS | {"requests_per_minute": 90}
        async with real(simulator, pool={"max_size": 60}, rate_limits=[limits] * 2) as run:
            ways = [whole, streamed, entered, forget, whole]
            calls = [asyncio.ensure_future(ways[number % 5](run.client)) for number in range(400)]
            await until(lambda: sum(call.done() for call in calls) >= 20 and bool(forgotten))
            waiting = sum(not call.done() for call in calls)
            await run.manager.close()
            ended = await asyncio.gather(*calls, return_exceptions=True)
            status = run.status()
        assert waiting > 200
        assert [end for end in ended if not isinstance(end, (str, LLMException))] == []
        assert (status["clients"]["in_use"], status["queued"], status["connections"]["in_flight"]) == (
            0,
            0,
            0,
        )
        assert all(stream.settled for stream in forgotten)


async def test_closing_under_load_leaves_no_timer() -> None:
    """The same on a clock whose timers can be counted."""
    answers = [SLOWLY, STREAMED, BUSY, failure(429, retry_after="5"), FORBIDDEN, LOST] * 200
    scenario = Scenario("", whole, tuple(answers), provider={"pool": {"max_size": 40}}, keys=3, limits=LIMITS)
    run = await asyncio.to_thread(build, scenario)
    ways = [whole, streamed, entered]
    for seconds in (0.0, 0.5, 1.0, 2.0, 3.0, 40.0, 61.0):
        calls = [asyncio.ensure_future(ways[number % 3](run.client, timeout=200.0)) for number in range(200)]
        await run.clock.advance(seconds)
        await run.manager.close()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [end for end in ended if not isinstance(end, (str, LLMException))] == []
        assert run.clock.timers == 0
        assert run.status()["clients"]["in_use"] == 0
        assert run.watched.statistics()["open"] == 0
        assert other_tasks() == set()
        run = await asyncio.to_thread(build, scenario)


async def test_a_stream_whose_first_content_comes_while_the_manager_is_being_closed_is_ended_too() -> None:
    """Nobody may be reading it, and the manager does not know it yet."""
    run = await asyncio.to_thread(build, Scenario("", streamed, (stream(0.5, delta("a"), 1e6, END),)))
    closing: list[asyncio.Task[None]] = []
    # At the very instant at which the content comes, and before its reader hears of it.
    run.clock.call_at(run.clock.now() + 0.5, lambda: closing.append(asyncio.create_task(run.manager.close())))
    opening = asyncio.create_task(run.client.stream_complete(PROMPT).__aenter__())
    await run.clock.advance(1.0)
    await closing[0]
    opened = await opening
    assert opened.settled
    assert (await anext(opened)).text == "a"
    with pytest.raises(LLMStreamInterruptedError, match="closed"):
        await anext(opened)
    assert run.status()["clients"]["in_use"] == 0
    assert run.watched.statistics()["in_flight"] == 0
    assert run.clock.timers == 0
