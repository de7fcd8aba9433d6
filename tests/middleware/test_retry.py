"""Repetition as a caller and a vendor see it: how often, when, on which key, at what price, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import pytest

from llm.core.events import AttemptFailed, Event, Events
from llm.core.exceptions import (
    AttemptRecord,
    LLMAuthenticationError,
    LLMConnectionError,
    LLMDeadlineExceededError,
    LLMException,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMQuotaExhaustedError,
    LLMRateLimitError,
    LLMTimeoutError,
)
from llm.core.types import Cost, LLMResponse, Usage
from llm.middleware.base import Call, Handler, Reply, compose
from llm.middleware.retry import RetryMiddleware
from llm.testing.clock import FakeClock
from llm.utils.backoff import RetryPolicy
from llm.utils.retry_budget import RetryBudget, RetryBudgetPolicy

from .fakes import SPAN, Bench, Task, answer, ask, limited, outcome

POLICY = RetryPolicy(max_attempts=3, base_delay=1.0, max_delay=8.0, max_retry_after=60.0)


def overloaded(**facts: Any) -> LLMOverloadedError:
    return LLMOverloadedError("overloaded", status=529, sent=True, **facts)


def too_many(**facts: Any) -> LLMRateLimitError:
    return LLMRateLimitError("slow down", status=429, sent=True, **facts)


def revoked() -> LLMAuthenticationError:
    return LLMAuthenticationError("revoked", status=401, sent=True)


class Stack(Bench):
    """A limiter, repetition below it, and a vendor that plays a script: an error is raised, None is an answer."""

    def __init__(
        self,
        *keys: Any,
        script: Iterable[Callable[[], BaseException] | None] = (),
        policy: RetryPolicy = POLICY,
        jitter: float = 1.0,
        budget: RetryBudget | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*keys, **options)
        self.script: Iterator[Callable[[], BaseException] | None] = iter(script)
        self.retry = RetryMiddleware(policy, clock=self.clock, random=lambda: jitter, events=self.events, budget=budget)
        self.handler: Handler = compose([self.limiter, self.retry], self.vendor)

    async def vendor(self, call: Call) -> Reply:
        assert call.admission is not None
        reply = self.leave(call)
        error = next(self.script, None)
        if error is None:
            return reply
        failure = error()
        if isinstance(failure, LLMException):
            failure.key_id = call.admission.key.id
        try:
            raise failure
        finally:
            # As an endpoint that minds its cycles would.
            del failure

    def begin(self, call: Call) -> Task:
        async def run() -> Reply:
            return await self.handler(call)

        return asyncio.get_running_loop().create_task(run())

    @property
    def times(self) -> list[float]:
        """Seconds from the beginning at which requests left."""
        return [at - 1000.0 for at, _, _ in self.sent]

    @property
    def used_keys(self) -> list[int]:
        return [key for _, key, _ in self.sent]


async def test_a_failed_call_is_repeated_until_it_succeeds() -> None:
    stack = Stack(limited(1, 9), script=[overloaded, overloaded])
    task = stack.begin(ask())
    await stack.clock.advance(10.0)
    assert isinstance(await task, LLMResponse)
    assert stack.times == [0.0, 1.0, 3.0]


async def test_the_last_of_max_attempts_is_raised_as_it_is() -> None:
    stack = Stack(limited(1, 9), script=[overloaded, overloaded, lambda: LLMOverloadedError("the third", status=503)])
    task = stack.begin(ask())
    await stack.clock.advance(10.0)
    with pytest.raises(LLMOverloadedError, match="the third"):
        await task
    assert len(stack.sent) == 3


async def test_the_delay_is_a_random_share_of_the_bound() -> None:
    stack = Stack(limited(1, 9), script=[overloaded, overloaded], jitter=0.25)
    task = stack.begin(ask())
    await stack.clock.advance(10.0)
    await task
    assert stack.times == [0.0, 0.25, 0.75]


async def test_each_attempt_pays_for_itself() -> None:
    """Retrying is not a way around the rate limit."""
    stack = Stack(limited(1, 2), script=[overloaded, overloaded])
    task = stack.begin(ask())
    await stack.clock.advance(SPAN - 0.1)
    assert stack.times == [0.0, 1.0]
    await stack.clock.advance(0.2)
    await task
    assert stack.times == [0.0, 1.0, SPAN]


async def test_while_it_sleeps_a_call_holds_neither_client_nor_tokens() -> None:
    stack = Stack(
        limited(1, 9, input_tokens_per_minute=100), script=[lambda: overloaded(retry_after=30.0)],
        cost=Cost(1, 60), clients=1,
    )  # fmt: skip
    task = stack.begin(ask(name="failed"))
    await stack.clock.settle()
    assert not stack.pool.in_use
    await stack.handler(ask(name="other"))
    assert stack.order == ["failed", "other"]
    await stack.clock.advance(30.0 + SPAN)
    await task


async def test_the_vendors_wish_is_waited_for() -> None:
    stack = Stack(limited(1, 9), script=[lambda: overloaded(retry_after=30.0)])
    task = stack.begin(ask(deadline=1030.5))
    await stack.clock.advance(29.9)
    assert stack.times == [0.0]
    await stack.clock.advance(0.2)
    await task
    assert stack.times == [0.0, 30.0]


async def test_the_backoff_is_waited_for_where_it_is_longer_than_the_vendors_wish() -> None:
    stack = Stack(limited(1, 9), script=[lambda: overloaded(retry_after=0.2)])
    task = stack.begin(ask())
    await stack.clock.advance(5.0)
    await task
    assert stack.times == [0.0, 1.0]


async def test_a_wish_beyond_the_deadline_ends_the_call_at_once_with_the_wait_and_the_cause() -> None:
    stack = Stack(limited(1, 9), script=[lambda: overloaded(retry_after=30.0)])
    stack.listen(AttemptFailed)
    with pytest.raises(LLMDeadlineExceededError) as caught:
        await stack.handler(ask(deadline=1030.0))
    assert caught.value.retry_after == 30.0
    assert isinstance(caught.value.__cause__, LLMOverloadedError)
    assert stack.clock.now() == 1000.0
    assert not stack.pool.in_use
    assert [event.retry_in for event in stack.told if isinstance(event, AttemptFailed)] == [None], "no retry is told"


async def test_a_wish_that_nobody_wants_to_wait_for_ends_the_call_with_the_vendors_error() -> None:
    stack = Stack(limited(1, 9), script=[lambda: overloaded(retry_after=61.0)])
    with pytest.raises(LLMOverloadedError) as caught:
        await stack.handler(ask())
    assert caught.value.retry_after == 61.0


async def test_a_key_that_was_refused_is_not_slept_off_and_another_answers() -> None:
    stack = Stack(limited(1, 9), limited(2, 9), script=[lambda: too_many(retry_after=600.0)])
    await stack.handler(ask())
    assert stack.clock.now() == 1000.0
    assert stack.used_keys == [1, 2]


async def test_with_no_other_key_the_call_waits_for_the_refused_one() -> None:
    stack = Stack(limited(1, 9), script=[lambda: too_many(retry_after=20.0)])
    task = stack.begin(ask())
    await stack.clock.advance(21.0)
    await task
    assert stack.times == [0.0, 20.0]


async def test_with_no_other_key_a_deadline_before_the_refused_one_returns_is_told_at_once() -> None:
    stack = Stack(limited(1, 9), script=[lambda: too_many(retry_after=20.0)])
    with pytest.raises(LLMDeadlineExceededError) as caught:
        await stack.handler(ask(deadline=1010.0))
    assert caught.value.retry_after == 20.0
    assert isinstance(caught.value.__cause__, LLMRateLimitError)


async def test_dead_keys_cost_no_try() -> None:
    """Four dead keys, two overloads, and max_attempts is three."""
    keys = [limited(number, 9) for number in range(1, 7)]
    stack = Stack(*keys, script=[revoked, revoked, overloaded, revoked, revoked, overloaded])
    task = stack.begin(ask())
    await stack.clock.advance(10.0)
    await task
    assert stack.used_keys == [1, 2, 3, 4, 5, 6, 3]
    assert stack.times == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 3.0]


@pytest.mark.parametrize("error", [revoked, lambda: LLMQuotaExhaustedError("no credit", status=402)])
async def test_when_every_key_is_dead_the_call_ends_with_the_cause(error: Callable[[], LLMException]) -> None:
    stack = Stack(limited(1, 9), limited(2, 9), script=[error, error])
    with pytest.raises(type(error()), match="out of use") as caught:
        await stack.handler(ask())
    assert type(caught.value.__cause__) is type(error()), "the refused renewal names the attempt that failed"
    assert stack.used_keys == [1, 2]


async def test_a_dead_key_that_nobody_parks_is_not_asked_for_ever() -> None:
    stack = Stack(limited(1, 1000), script=[revoked] * 1000)
    stack.pool.park = lambda key, cause: None  # type: ignore[method-assign]  # a pool that does not learn
    with pytest.raises(LLMAuthenticationError):
        await stack.handler(ask())
    assert len(stack.sent) == 2


@pytest.mark.parametrize(
    "error",
    [
        lambda: LLMInvalidRequestError("wrong", status=400),
        lambda: LLMOverloadedError("not again", retryable=False),
        lambda: LLMDeadlineExceededError("too late"),
        lambda: ZeroDivisionError(),
    ],
)
async def test_what_a_repetition_does_not_mend_is_raised_at_once(error: Callable[[], BaseException]) -> None:
    stack = Stack(limited(1, 9), script=[error])
    with pytest.raises(type(error())):
        await stack.handler(ask())
    assert len(stack.sent) == 1
    assert not stack.pool.in_use


async def test_a_cancelled_attempt_is_not_repeated() -> None:
    stack = Stack(limited(1, 9), script=[asyncio.CancelledError])
    with pytest.raises(asyncio.CancelledError):
        await stack.handler(ask())
    assert len(stack.sent) == 1


async def test_cancelled_while_it_sleeps_leaves_nothing_behind() -> None:
    stack = Stack(limited(1, 9), script=[overloaded], clients=1)
    task = stack.begin(ask())
    await stack.clock.advance(0.5)
    task.cancel()
    assert isinstance(await outcome(task), asyncio.CancelledError)
    await stack.clock.advance(10.0)
    assert len(stack.sent) == 1
    assert len(stack.pool.released) == 1
    assert stack.clock.timers == 0


async def test_a_stream_that_a_failed_attempt_had_opened_is_closed_before_the_next() -> None:
    closed: list[float] = []
    stack = Stack(limited(1, 9), script=[overloaded])

    class Stream:
        def close(self) -> None:
            closed.append(stack.clock.now() - 1000.0)

    async def opening(call: Call) -> Reply:
        call.stream = Stream()  # type: ignore[assignment]  # all that is asked of it is to close
        return await stack.vendor(call)

    call = ask()
    task = asyncio.get_running_loop().create_task(_run(compose([stack.limiter, stack.retry], opening), call))
    await stack.clock.advance(5.0)
    await task
    assert closed == [0.0]
    assert call.stream is not None, "the one that answered stays open"


async def _run(handler: Handler, call: Call) -> Reply:
    return await handler(call)


async def test_a_renewed_call_goes_before_those_who_came_while_it_slept() -> None:
    stack = Stack(limited(1, 1), script=[overloaded])
    first = stack.begin(ask(name="first"))
    await stack.clock.settle()
    others = [stack.begin(ask(name=name)) for name in "ab"]
    await stack.clock.advance(4 * SPAN)
    await asyncio.gather(first, *others)
    assert stack.order == ["first", "first", "a", "b"]


async def test_each_failure_is_told_with_its_number_and_what_follows() -> None:
    stack = Stack(limited(1, 9), limited(2, 9), script=[too_many, overloaded, overloaded, overloaded])
    stack.listen(AttemptFailed)
    task = stack.begin(ask(name="c"))
    await stack.clock.advance(10.0)
    await outcome(task)
    told = [event for event in stack.told if isinstance(event, AttemptFailed)]
    assert [(e.attempt, e.key_id, e.error, e.status, e.retry_in) for e in told] == [
        (1, "fake/1", "LLMRateLimitError", 429, 0.0),
        (2, "fake/2", "LLMOverloadedError", 529, 2.0),
        (3, told[2].key_id, "LLMOverloadedError", 529, None),
    ]
    assert {e.call_id for e in told} == {"c"}


async def test_of_a_dead_key_it_is_told_that_another_follows_at_once() -> None:
    stack = Stack(limited(1, 9), limited(2, 9), script=[lambda: LLMAuthenticationError("revoked", status=401)])
    stack.listen(AttemptFailed)
    await stack.handler(ask())
    [told] = [event for event in stack.told if isinstance(event, AttemptFailed)]
    assert (told.key_id, told.error, told.retry_in) == ("fake/1", "LLMAuthenticationError", 0.0)


async def test_a_failure_that_no_key_had_a_part_in_is_told_without_one() -> None:
    told: list[Event] = []
    events = Events()
    events.listen(told.append, AttemptFailed)

    async def refusing(call: Call) -> Reply:
        raise LLMInvalidRequestError("no")

    layer = RetryMiddleware(POLICY, clock=FakeClock(), random=lambda: 1.0, events=events)
    with pytest.raises(LLMInvalidRequestError):
        await layer(ask(), refusing)
    [event] = told
    assert isinstance(event, AttemptFailed)
    assert (event.key_id, event.retry_in) == ("", None)


async def test_who_need_not_wait_does_not_sleep() -> None:
    class Watched(FakeClock):
        slept: ClassVar[list[float]] = []

        async def sleep(self, seconds: float) -> None:
            self.slept.append(seconds)

    failures = [overloaded(), LLMAuthenticationError("revoked", status=401, key_id="fake/1"), overloaded()]

    async def failing(call: Call) -> Reply:
        raise failures.pop()

    layer = RetryMiddleware(POLICY, clock=Watched(), random=lambda: 0.0)
    with pytest.raises(LLMException):
        await layer(ask(), failing)
    assert Watched.slept == []


async def test_what_a_failed_attempt_told_of_its_usage_is_paid() -> None:
    stack = Stack(
        limited(1, 9, input_tokens_per_minute=1000),
        script=[lambda: LLMConnectionError("cut", sent=True, usage=Usage(700, 5))],
        cost=Cost(1, 100, 1),
    )
    task = stack.begin(ask())
    await stack.clock.advance(2.0)
    await task
    assert stack.ledger().input_used == 700 + 10


async def test_an_attempt_that_never_left_costs_nothing_however_often_it_is_repeated() -> None:
    stack = Stack(limited(1, 1), policy=RetryPolicy(max_attempts=50, base_delay=0.01))
    failures = iter(range(49))

    async def unreachable(call: Call) -> Reply:
        if next(failures, None) is not None:
            raise LLMConnectionError("refused")
        return stack.leave(call)

    task = asyncio.get_running_loop().create_task(_run(compose([stack.limiter, stack.retry], unreachable), ask()))
    await stack.clock.advance(59.0 * 8)
    await task
    assert stack.ledger().requests_used == 1


# -- without a limiter ------------------------------------------------------------------------------------------------


async def alone(script: list[LLMException], call: Call) -> tuple[list[float], BaseException | Reply]:
    """When the attempts of a call without admission were made, and what came of it."""
    clock = FakeClock(start=0.0)
    retry = RetryMiddleware(POLICY, clock=clock, random=lambda: 1.0)
    times: list[float] = []

    async def vendor(call: Call) -> Reply:
        times.append(clock.now())
        if script:
            raise script.pop(0)
        return answer()

    task = asyncio.get_running_loop().create_task(_run(compose([retry], vendor), call))
    await clock.advance(100.0)
    return times, await outcome(task)


async def test_it_works_alone() -> None:
    times, reply = await alone([overloaded(), overloaded()], ask())
    assert times == [0.0, 1.0, 3.0]
    assert isinstance(reply, LLMResponse)


async def test_alone_a_refused_key_is_waited_for_since_nobody_chooses_another() -> None:
    times, reply = await alone([too_many(retry_after=7.0), too_many()], ask())
    assert times == [0.0, 7.0, 9.0]
    assert isinstance(reply, LLMResponse)


async def test_alone_a_dead_key_is_the_end() -> None:
    times, error = await alone([revoked()], ask())
    assert times == [0.0]
    assert isinstance(error, LLMAuthenticationError)


async def test_alone_it_keeps_the_deadline() -> None:
    times, error = await alone([overloaded(), overloaded()], ask(deadline=2.5))
    assert times == [0.0, 1.0]
    assert isinstance(error, LLMDeadlineExceededError)


# -- nothing keeps a prompt alive --------------------------------------------------------------------------------------


class Prompt(str):
    """A string that can be watched."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize(
    ("script", "facts", "ending"),
    [
        ([overloaded] * 3, {}, "LLMOverloadedError"),
        ([overloaded] * 2, {}, ""),
        ([lambda: overloaded(retry_after=30.0)], {"deadline": 1010.0}, "LLMDeadlineExceededError"),
        ([lambda: too_many(retry_after=30.0)], {"deadline": 1010.0}, "LLMDeadlineExceededError"),
        ([lambda: too_many(retry_after=3.0)], {"deadline": 1010.0}, ""),
        ([revoked], {}, "LLMAuthenticationError"),
        ([asyncio.CancelledError], {}, "CancelledError"),
        ([ZeroDivisionError], {}, "ZeroDivisionError"),
    ],
)
async def test_a_call_that_has_ended_leaves_its_prompt_to_nobody(
    script: list[Callable[[], BaseException]], facts: dict[str, Any], ending: str
) -> None:
    stack = Stack(limited(1, 9), script=script)
    prompt = Prompt("a prompt")
    watch = weakref.ref(prompt)
    call = ask(prompt, **facts)
    del prompt

    async def run(call: Call) -> str:
        try:
            await stack.handler(call)
        except BaseException as error:
            return type(error).__name__
        return ""

    gc.collect()
    gc.disable()
    try:
        task = asyncio.get_running_loop().create_task(run(call))
        del call
        await stack.clock.advance(30.0)
        assert await task == ending
        del task
        assert watch() is None
    finally:
        gc.enable()


async def test_a_call_cancelled_while_it_sleeps_leaves_its_prompt_to_nobody() -> None:
    stack = Stack(limited(1, 9), script=[overloaded])
    prompt = Prompt("a prompt")
    watch = weakref.ref(prompt)
    gc.collect()
    gc.disable()
    try:
        task = stack.begin(ask(prompt))
        del prompt
        await stack.clock.advance(0.5)
        task.cancel()
        await asyncio.wait([task])
        del task
        assert watch() is None
    finally:
        gc.enable()


# -- the budget --------------------------------------------------------------------------------------------------------


def saved(retries: float, *, share: float = 0.0) -> RetryBudget:
    """A budget of so many retries, to which each call adds its *share* and time nothing."""
    return RetryBudget(RetryBudgetPolicy(share=share, per_second=0.0, most=retries))


async def failing(bench: Stack) -> LLMException:
    try:
        await bench.handler(ask())
    except LLMException as error:
        return error
    raise AssertionError("it was answered")


async def test_without_a_retry_left_the_first_failure_is_the_calls() -> None:
    bench = Stack(limited(1), script=[overloaded] * 9, jitter=0.0, budget=saved(3.0))
    for _ in range(3):
        assert isinstance(await failing(bench), LLMOverloadedError)
    assert len(bench.sent) == 3 + 2 + 1, "two retries, one, none"
    assert bench.retry.statistics() == {"budget": 0.0, "denied": 2}


async def test_each_call_earns_a_share_of_a_retry_answered_or_not() -> None:
    budget = saved(1.0, share=0.5)
    bench = Stack(limited(1), script=[overloaded, None, None, None, overloaded, None], jitter=0.0, budget=budget)
    for _ in range(4):
        await bench.handler(ask())
    assert len(bench.sent) == 6
    assert budget.denied == 0


async def test_a_refusal_for_want_of_capacity_costs_a_tenth_of_a_failure() -> None:
    bench = Stack(limited(1), limited(2), limited(3), script=[too_many, too_many, None], budget=saved(1.0))
    await bench.handler(ask())
    statistics = bench.retry.statistics()
    assert statistics is not None
    assert statistics["budget"] == pytest.approx(0.8)


async def test_a_dead_key_costs_nothing_of_it() -> None:
    bench = Stack(limited(1), limited(2), script=[revoked, None], budget=saved(0.0))
    await bench.handler(ask())
    assert len(bench.sent) == 2


async def test_without_a_budget_there_is_nothing_to_tell() -> None:
    assert Stack(limited(1)).retry.statistics() is None


async def test_repetitions_count_on_from_those_of_another_target() -> None:
    bench = Stack(limited(1), script=[overloaded] * 9, jitter=0.0)
    call = ask()
    call.retries = 1
    with pytest.raises(LLMOverloadedError):
        await bench.handler(call)
    assert (len(bench.sent), call.retries) == (2, 2)


# ---------------------------------------------------------------- a second leg, another target, a stream that broke off


async def test_a_second_leg_is_not_repeated() -> None:
    stack = Stack(limited(1, 9), script=[overloaded])
    call = ask()
    call.hedging = True
    with pytest.raises(LLMOverloadedError):
        await stack.begin(call)
    assert len(stack.sent) == 1


def silent() -> LLMTimeoutError:
    return LLMTimeoutError("silence", phase="first_byte", sent=True)


def took(*seconds: float) -> tuple[AttemptRecord, ...]:
    """The records of attempts that were so long."""
    return tuple(
        AttemptRecord(number=n, provider="p", model="m", key_id="p/1", waited=0.0, duration=each)
        for n, each in enumerate(seconds, 1)
    )


@pytest.mark.parametrize(
    ("elsewhere", "left", "kind", "sent"),
    [
        (True, 9.9, silent, 1),
        (True, 10.0, silent, 2),
        (False, 9.9, silent, 2),
        (True, None, silent, 2),
        (True, 9.9, overloaded, 2),
    ],
)
async def test_silence_is_waited_out_again_unless_that_leaves_no_time_for_another_target(
    elsewhere: bool, left: float | None, kind: Callable[[], LLMException], sent: int
) -> None:
    stack = Stack(limited(1, 9), script=[kind], jitter=0.0)
    call = ask(deadline=1_000.0 + left if left is not None else None)
    call.elsewhere = elsewhere
    # The last one counts.
    call.attempts = took(1.0, 3.0, 10.0)
    task = stack.begin(call)
    await stack.clock.advance(0.0)
    await asyncio.wait([task])
    assert len(stack.sent) == sent
    assert (task.exception() is None) == (sent == 2)


async def test_without_an_attempt_on_record_there_is_no_telling() -> None:
    stack = Stack(limited(1, 9), script=[silent], jitter=0.0)
    call = ask(deadline=1_005.0)
    call.elsewhere = True
    task = stack.begin(call)
    await stack.clock.advance(0.0)
    assert isinstance(await task, LLMResponse)


async def test_a_stream_that_broke_off_is_made_again_after_a_backoff_and_counted() -> None:
    budget = RetryBudget(RetryBudgetPolicy(share=0.0, per_second=0.0, most=5.0))
    stack = Stack(limited(1, 9), budget=budget)
    call = ask()
    assert [stack.retry.again(call, overloaded()) for _ in range(3)] == [1.0, 2.0, None]
    assert (call.retries, budget.balance) == (2, 3.0)


async def test_a_vendors_wish_holds_for_a_stream_as_well() -> None:
    stack = Stack(limited(1, 9))
    assert stack.retry.again(ask(), overloaded(retry_after=7.0)) == 7.0
    assert stack.retry.again(ask(), overloaded(retry_after=61.0)) is None


async def test_a_stream_is_not_made_again_when_the_budget_is_spent() -> None:
    budget = RetryBudget(RetryBudgetPolicy(share=0.0, per_second=0.0, most=1.0))
    stack = Stack(limited(1, 9), budget=budget)
    first, second = ask(), ask()
    assert stack.retry.again(first, overloaded()) == 1.0
    assert stack.retry.again(second, overloaded()) is None
    assert (second.retries, budget.denied) == (0, 1)


async def test_after_a_429_a_stream_costs_a_tenth() -> None:
    budget = RetryBudget(RetryBudgetPolicy(share=0.0, per_second=0.0, most=1.0))
    stack = Stack(limited(1, 9), budget=budget)
    stack.retry.again(ask(), too_many())
    assert budget.balance == pytest.approx(0.9)
