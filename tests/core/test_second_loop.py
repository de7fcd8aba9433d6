"""One manager, two event loops, one after the other. Real forks and threads are in tests/test_loops.py."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm.core.exceptions import LLMConfigurationError
from llm.testing.transport import Answer
from llm.transports.base import HTTPRequest
from tests.core.rig import (
    END,
    PROMPT,
    Rig,
    answer,
    build,
    configuration,
    delta,
    failure,
    is_probe,
    key_of,
    rig,
    stream,
)


def first_key_refused(request: HTTPRequest) -> Answer:
    """Until it is probed: then it works again."""
    return failure(401, "revoked") if key_of(request) == 1 and not is_probe(request) else answer()


def test_what_the_keys_have_learnt_stays_and_a_parked_one_is_probed_by_the_new_loop() -> None:
    r = build(first_key_refused, config=configuration(keys=2))
    assert asyncio.run(r.client.chat(PROMPT)) == "hello"
    assert r.states[0] == "parked"

    async def again() -> None:
        async with r.manager:
            await r.client.chat(PROMPT)
            assert r.keys == [1, 2, 2]
            await r.clock.advance(3600.0)
            assert r.probes == [1]
            assert r.states[0] == "healthy"

    asyncio.run(again())
    assert r.clock.timers == 0


def test_what_was_used_on_one_loop_is_paid_for_on_the_next() -> None:
    r = build([answer(), answer(), answer()], config=configuration(rate_limits={"requests_per_minute": 2}))

    async def twice() -> None:
        await r.client.chat(PROMPT)
        await r.client.chat(PROMPT)

    asyncio.run(twice())

    async def once_more() -> None:
        async with r.manager:
            waiting = asyncio.create_task(r.client.chat(PROMPT))
            await r.clock.advance(60.0)
            assert not waiting.done()
            await r.clock.advance(1.0)
            assert await waiting == "hello"

    asyncio.run(once_more())


def test_clients_that_streams_of_the_old_loop_held_are_free_on_the_new_one() -> None:
    config = configuration(pool={"max_size": 1}, timeouts={"attempt": 100.0})
    r = build([stream(delta("hel"), 1.0, END), answer()], config=config)

    held: list[Any] = []

    async def hold() -> None:
        reading = aiter(r.client.stream_complete(PROMPT))
        held.append(reading)
        assert (await anext(reading)).text == "hel"
        assert clients(r)["in_use"] == 1

    asyncio.run(hold())

    async def on_the_new_one() -> None:
        async with r.manager:
            assert await r.client.chat(PROMPT) == "hello"
            assert clients(r)["in_use"] == 0
            held.clear()
            assert clients(r)["in_use"] == 0, "what the old stream gives back is nobody's any more"

    asyncio.run(on_the_new_one())
    assert r.clock.timers == 0


def clients(r: Rig) -> dict[str, Any]:
    found: dict[str, Any] = r.manager.get_status()["providers"]["vendor"]["clients"]
    return found


async def test_while_one_loop_is_open_another_one_is_told_so() -> None:
    async with rig([answer(), answer()]) as r:
        await r.client.chat(PROMPT)
        with pytest.raises(LLMConfigurationError, match="in use on another event loop"):
            await asyncio.to_thread(asyncio.run, r.client.chat(PROMPT))
        assert await r.client.chat(PROMPT) == "hello", "and the first one is none the worse"
