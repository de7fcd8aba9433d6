"""The port of events: typed, bounded, and never in a call's way."""

from __future__ import annotations

import asyncio

import pytest

from llm.core.events import (
    ALL_EVENTS,
    MAX_FAULT_NAMES,
    CallAdmitted,
    CallFinished,
    CallStarted,
    Event,
    Events,
    KeyParked,
    KeyRestored,
)
from tests.core.rig import PROMPT, answer, configuration, failure, rig, secret


def restored(number: int) -> KeyRestored:
    return KeyRestored(at=float(number), provider="vendor", key_id=f"vendor/{number}")


def test_when_nobody_listens_nothing_is_wanted() -> None:
    assert Events().wanted == frozenset()


def test_a_subscription_wants_everything_and_its_end_wants_nothing() -> None:
    events = Events()
    with events.subscribe():
        assert events.wanted == frozenset(ALL_EVENTS)
    assert events.wanted == frozenset()


def test_a_listener_is_called_at_once_for_its_kinds_alone() -> None:
    events = Events()
    heard: list[Event] = []
    events.listen(heard.append, KeyRestored)
    assert events.wanted == {KeyRestored}
    events.publish(restored(1))
    events.publish(KeyParked(at=0.0, provider="vendor", key_id="vendor/1", reason="no"))
    assert heard == [restored(1)]


def test_a_subscription_keeps_the_order_and_drain_empties_it() -> None:
    events = Events()
    with events.subscribe() as subscription:
        for number in (1, 2, 3):
            events.publish(restored(number))
        assert subscription.drain() == [restored(1), restored(2), restored(3)]
        assert subscription.drain() == []


def test_a_full_queue_drops_the_oldest_and_counts_what_it_dropped() -> None:
    events = Events()
    slow, quick = events.subscribe(capacity=2), events.subscribe(capacity=10)
    for number in range(5):
        events.publish(restored(number))
    assert slow.drain() == [restored(3), restored(4)]
    assert len(quick.drain()) == 5
    assert (slow.dropped, quick.dropped, events.dropped, events.published) == (3, 0, 3, 5)
    slow.close()
    slow.close()
    assert events.dropped == 3, "what was lost stays lost when the loser has gone"


def test_a_listener_that_raises_is_counted_and_the_others_still_hear() -> None:
    events = Events()
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise ZeroDivisionError

    events.listen(broken, KeyRestored)
    events.listen(heard.append, KeyRestored)
    events.publish(restored(1))
    assert heard == [restored(1)]
    assert events.faults == {"listener: ZeroDivisionError": 1}


def test_different_faults_are_bounded() -> None:
    events = Events()
    for number in range(2 * MAX_FAULT_NAMES):
        events.fault("there", type(f"Error{number}", (Exception,), {})())
    events.fault("there", type("Error0", (Exception,), {})())
    assert len(events.faults) == MAX_FAULT_NAMES
    assert events.faults["there: Error0"] == 2


async def test_a_reader_waits_for_what_comes_and_ends_after_what_was_left() -> None:
    events = Events()
    subscription = events.subscribe()

    async def read() -> list[Event]:
        return [event async for event in subscription]

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    events.publish(restored(1))
    await asyncio.sleep(0)
    events.publish(restored(2))
    subscription.close()
    assert await reader == [restored(1), restored(2)]


async def test_two_readers_of_one_subscription_share_what_comes_and_both_end() -> None:
    events = Events()
    subscription = events.subscribe()
    read: list[Event] = []

    async def follow() -> None:
        async for event in subscription:
            read.append(event)

    async with asyncio.timeout(5):
        async with asyncio.TaskGroup() as group:
            group.create_task(follow())
            group.create_task(follow())
            await asyncio.sleep(0)
            for number in (1, 2, 3):
                events.publish(restored(number))
            await asyncio.sleep(0)
            subscription.close()
    assert read == [restored(1), restored(2), restored(3)]


async def test_a_reader_that_was_cancelled_does_not_spoil_the_next() -> None:
    events = Events()
    subscription = events.subscribe()
    reader = asyncio.create_task(anext(subscription))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    events.publish(restored(1))
    assert await anext(subscription) == restored(1)


def test_a_reader_whose_loop_is_gone_is_a_fault_and_not_an_exception() -> None:
    events = Events()
    subscription = events.subscribe()
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(anext(subscription))
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    events.publish(restored(1))
    assert events.faults == {"subscription: RuntimeError": 1}
    assert subscription.drain() == [restored(1)]
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]  # the loop was closed under it on purpose


async def test_a_call_tells_its_life_without_prompt_or_secret() -> None:
    async with rig([failure(500), answer(PROMPT)]) as r:
        with r.manager.events.subscribe() as subscription:
            await r.client.complete(PROMPT)
            told = subscription.drain()
    names = [type(event).__name__ for event in told]
    assert names == ["CallStarted", "CallAdmitted", "AttemptFailed", "CallAdmitted", "CallFinished"]
    assert len({event.call_id for event in told}) == 1
    started, admitted, finished = told[0], told[1], told[-1]
    assert isinstance(started, CallStarted)
    assert isinstance(admitted, CallAdmitted)
    assert isinstance(finished, CallFinished)
    assert (started.model, started.stream) == (None, False)
    assert (admitted.key_id, admitted.model) == ("vendor/1", "m")
    assert (finished.error, finished.input_tokens, finished.output_tokens) == (None, 3, 2)
    assert PROMPT not in repr(told)
    assert secret(1) not in repr(told)


async def test_a_slow_subscriber_costs_events_and_no_call() -> None:
    async with rig(lambda _: answer(), config=configuration()) as r:
        with r.manager.events.subscribe(capacity=1):
            for _ in range(5):
                await r.client.complete(PROMPT)
        status = r.manager.get_status()["events"]
        assert status["dropped"] == status["published"] - 1
