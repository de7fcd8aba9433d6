"""Second legs: when they begin, where they go, who wins, and what of the loser is left."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest

from llm.core.events import CallHedged, Event
from llm.core.exceptions import LLMConfigurationError, LLMConnectionError, LLMException, LLMOverloadedError
from llm.middleware.base import Call, Handler, Reply
from llm.testing.transport import Scripted
from llm.transports.base import HTTPRequest
from tests.core.rig import END, PROMPT, Rig, answer, configuration, delta, failure, key_of, rig, stream
from tests.middleware.test_fallback import Vendors, three

ALL = {"after": 1, "max_share": 1}


def hedged(keys: int = 2, *, hedge: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A configuration in which every call may have a second leg after a second."""
    middleware = {"hedge": {"enabled": True, **(ALL if hedge is None else hedge)}, **more.pop("middleware", {})}
    return configuration(keys, middleware=middleware, **more)


class Keys:
    """What each key says."""

    def __init__(self, *said: Scripted) -> None:
        self.said = said

    def __call__(self, request: HTTPRequest) -> Scripted:
        return self.said[key_of(request) - 1]


def idle(r: Rig) -> bool:
    """Whether nothing is taken: no client, no permit, no connection in use."""
    status = r.manager.get_status()
    quotas = [
        quota
        for limits in status["limits"].values()
        for groups in limits["quotas"].values()
        for quota in groups.values()
    ]
    return all(
        line["clients"]["in_use"] == line["connections"]["in_flight"] == 0 for line in status["providers"].values()
    ) and all(quota["under_way"] == 0 for quota in quotas)


async def test_a_call_that_takes_long_is_made_on_another_key_too_and_the_first_answer_counts() -> None:
    told: list[Event] = []
    async with rig(Keys(answer("slow", delay=30.0), answer("quick")), config=hedged()) as r:
        r.manager.events.listen(told.append, CallHedged)
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(0.99)
        assert r.keys == [1]
        await r.clock.advance(0.02)
        response = await task
        assert (response.text, response.key_id, r.keys) == ("quick", "vendor/2", [1, 2])
        assert idle(r)
        status = r.manager.get_status()
    (event,) = told
    assert isinstance(event, CallHedged)
    assert event.after == pytest.approx(1.0)
    assert event.target == "vendor"
    assert status["providers"]["vendor"]["hedges"] == {"hedged": 1, "won": 1}
    requests = status["metrics"]["requests"]
    assert (requests["total"], requests["successful"], requests["failed"], requests["cancelled"]) == (1, 1, 0, 0)


async def test_the_loser_is_paid_for() -> None:
    config = hedged(rate_limits={"requests_per_minute": 100, "input_tokens_per_minute": 1000})
    async with rig(Keys(answer("slow", delay=30.0), answer("quick")), config=config) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(1.5)
        await task
        quotas = r.manager.get_status()["limits"]["vendor"]["quotas"]
        used = {pool: group["requests"]["used"] for pool, groups in quotas.items() for group in groups.values()}
        tokens = {pool: group["input_tokens"]["used"] for pool, groups in quotas.items() for group in groups.values()}
    assert used == {"vendor/1": 1, "vendor/2": 1}
    assert tokens["vendor/1"] > 0


async def test_the_first_may_still_win_and_the_second_is_the_loser() -> None:
    async with rig(Keys(answer("first", delay=2.0), answer("second", delay=30.0)), config=hedged()) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(2.5)
        response = await task
        assert (response.text, r.keys) == ("first", [1, 2])
        assert idle(r)
        assert r.manager.get_status()["providers"]["vendor"]["hedges"] == {"hedged": 1, "won": 0}


async def test_a_quick_call_has_one_leg() -> None:
    async with rig(lambda _: answer(delay=0.5), config=hedged()) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(0.6)
        await task
        await r.clock.advance(5)
        assert r.keys == [1]


async def test_the_time_in_the_queue_does_not_count() -> None:
    config = three(middleware={"hedge": {"enabled": True, **ALL}}, rate_limits={"requests_per_minute": 1})
    vendors = Vendors()
    async with rig(vendors, config=config) as r:
        tasks = [asyncio.ensure_future(r.client.complete(PROMPT)) for _ in range(2)]
        # The second waits for the next window, though the next target of its chain is free.
        await r.clock.advance(61)
        await asyncio.gather(*tasks)
    assert vendors.asked == ["vendor", "vendor"]


async def test_a_call_that_has_queued_is_hedged_once_its_attempt_takes_long() -> None:
    config = three(middleware={"hedge": {"enabled": True, **ALL}}, rate_limits={"requests_per_minute": 1})
    vendors = Vendors(vendor=[answer("first"), answer("slow", delay=30.0)])
    async with rig(vendors, config=config) as r:
        tasks = [asyncio.ensure_future(r.client.complete(PROMPT)) for _ in range(2)]
        await r.clock.advance(60.5)
        assert vendors.asked == ["vendor", "vendor"]
        await r.clock.advance(2.0)
        assert [response.text for response in await asyncio.gather(*tasks)] == ["first", "second"]
    assert vendors.asked == ["vendor", "vendor", "second"]


SPAN: ContextVar[str] = ContextVar("span", default="none")


async def test_both_legs_see_what_the_caller_has_set() -> None:
    seen: list[str] = []

    async def tracing(call: Call, handler: Handler) -> Reply:
        seen.append(SPAN.get())
        return await handler(call)

    script = Keys(answer("slow", delay=30.0), answer("quick"))
    async with rig(script, config=hedged(), middleware={"tracing": tracing}) as r:
        SPAN.set("the caller's")
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(1.5)
        assert (await task).text == "quick"
    assert seen == ["the caller's"] * 2


async def test_a_second_leg_does_not_wait_for_capacity() -> None:
    config = hedged(rate_limits={"requests_per_minute": 1})
    async with rig(lambda _: answer(delay=10.0), config=config) as r:
        tasks = [asyncio.ensure_future(r.client.complete(PROMPT)) for _ in range(2)]
        await r.clock.advance(11)
        await asyncio.gather(*tasks)
        assert sorted(r.keys) == [1, 2]


async def test_a_failure_of_the_second_leg_is_nobodys() -> None:
    async with rig(Keys(answer("slow", delay=5.0), failure(500)), config=hedged()) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(6)
        assert (await task).text == "slow"
        assert r.keys == [1, 2]


async def test_when_both_fail_the_first_legs_error_is_raised_with_the_attempts_of_both() -> None:
    late = failure(503, "late")
    config = hedged(middleware={"retry": {"enabled": False}})
    script = Keys(Scripted(late.status, late.headers, late.body, delay=5.0), failure(500, "quick"))
    async with rig(script, config=config) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(6)
        with pytest.raises(LLMOverloadedError, match="late") as caught:
            await task
        assert idle(r)
    assert sorted((record.key_id, record.status) for record in caught.value.attempts) == [
        *(("vendor/1", 503), ("vendor/2", 500)),
    ]


async def test_with_one_key_the_first_fit_target_of_the_chain_is_asked() -> None:
    vendors = Vendors(vendor=answer("slow", delay=30.0))
    async with rig(vendors, config=three(middleware={"hedge": {"enabled": True, **ALL}})) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(1.5)
        response = await task
        assert idle(r)
    assert vendors.asked == ["vendor", "second"]
    assert (response.text, response.provider, response.failures) == ("second", "second", ())


async def test_with_one_key_and_no_chain_nobody_else_is_asked() -> None:
    async with rig(lambda _: answer(delay=5.0), config=hedged(1)) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(6)
        await task
        assert r.keys == [1]


async def test_no_more_than_its_share_of_the_calls_has_a_second_leg() -> None:
    config = hedged(hedge={"after": 1, "max_share": 0.25})
    async with rig(lambda _: answer(delay=2.0), config=config) as r:
        for _ in range(20):
            task = asyncio.ensure_future(r.client.complete(PROMPT))
            await r.clock.advance(3)
            await task
        assert len(r.keys) == 25


async def test_p95_is_learnt_first() -> None:
    config = hedged(hedge={"max_share": 1})
    slow = [answer(delay=0.1) for _ in range(20)]
    async with rig(lambda _: slow.pop() if slow else answer("late", delay=9.0), config=config) as r:
        for _ in range(20):
            task = asyncio.ensure_future(r.client.complete(PROMPT))
            await r.clock.advance(0.2)
            await task
        assert len(r.keys) == 20
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(0.09)
        assert len(r.keys) == 21
        await r.clock.advance(0.03)
        assert len(r.keys) == 22
        await r.clock.advance(10)
        await task


async def test_a_stream_is_raced_to_its_first_content() -> None:
    script = Keys(stream(30.0, delta("slow"), END), stream(delta("quick"), 1.0, delta(" answer"), END))
    async with rig(script, config=hedged()) as r:
        task = asyncio.ensure_future(_read(r))
        await r.clock.advance(3)
        assert await task == "quick answer"
        assert r.keys == [1, 2]
        assert idle(r)


async def _read(r: Rig, **options: Any) -> str:
    return "".join([chunk.text async for chunk in r.client.stream_complete(PROMPT, **options)])


async def test_two_streams_that_begin_together_are_one_and_the_other_is_closed() -> None:
    script = Keys(stream(2.0, delta("first"), END), stream(1.0, delta("second"), END))
    async with rig(script, config=hedged()) as r:
        task = asyncio.ensure_future(_read(r))
        await r.clock.advance(3)
        assert await task == "first"
        assert idle(r)


async def test_given_up_both_legs_end_before_the_call_does() -> None:
    async with rig(lambda _: answer(delay=30.0), config=hedged()) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(2)
        assert r.keys == [1, 2]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert idle(r)


async def test_the_deadline_is_that_of_both() -> None:
    async with rig(lambda _: answer(delay=30.0), config=hedged()) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT, timeout=3))
        await r.clock.advance(3.1)
        with pytest.raises(LLMException, match="deadline"):
            await task
        assert idle(r)


async def test_it_is_off_unless_it_is_asked_for() -> None:
    async with rig(lambda _: answer(delay=100.0), config=configuration(2)) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(101)
        await task
        assert r.keys == [1]
        assert r.manager.get_status()["providers"]["vendor"]["hedges"] is None


@pytest.mark.parametrize("after", ["p99", 0, -1, True])
async def test_what_is_no_time_is_refused(after: Any) -> None:
    with pytest.raises(LLMConfigurationError, match=r"hedge\.after: .*`p95` or a number of seconds"):
        async with rig(config=hedged(hedge={"after": after})):
            pass


async def test_a_second_leg_goes_on_with_a_stream_only_where_that_is_possible() -> None:
    config = three(capabilities={"*": {"prefill": True}}, middleware={"hedge": {"enabled": True, **ALL}})
    config["providers"]["second"]["capabilities"] = {}
    lost = LLMConnectionError("the connection was lost")
    vendors = Vendors(
        vendor=[stream(delta("one "), lost), stream(30.0, delta("two"), END)], third=stream(delta("three"), END)
    )
    config["providers"]["third"]["capabilities"] = {}
    async with rig(vendors, config=config) as r:
        task = asyncio.ensure_future(_read(r, on_interrupt="continue"))
        await r.clock.advance(35)
        assert await task == "one two"
        assert idle(r)
    assert vendors.asked == ["vendor", "vendor"]
