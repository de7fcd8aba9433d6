"""Health for a platform's probes, keys that fall together, and a close that lets calls end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm.core.exceptions import LLMConnectionError, LLMException, LLMStreamInterruptedError
from llm.transports.base import HTTPRequest
from tests.core.rig import END, PROMPT, answer, configuration, delta, failure, is_probe, key_of, rig, secret, stream


async def test_a_manager_is_live_and_ready_until_it_is_closed() -> None:
    async with rig([answer()]) as r:
        await r.client.chat(PROMPT)
        assert r.manager.health() == {
            "live": True,
            "ready": True,
            "providers": {"vendor": {"ready": True, "circuit": "closed", "keys": {"vendor/1": {"state": "healthy"}}}},
        }
    assert (r.manager.health()["live"], r.manager.health()["ready"]) == (False, False)


async def test_it_is_ready_while_one_key_may_be_asked() -> None:
    def vendor(request: HTTPRequest) -> Any:
        if is_probe(request) or key_of(request) == 1:
            return failure(401, f"bad key {secret(1)}")
        return failure(429, retry_after="5")

    async with rig(vendor, config=configuration(2, middleware={"retry": {"enabled": False}})) as r:
        for _ in range(2):
            with pytest.raises(LLMException):
                await r.client.chat(PROMPT)
        health = r.manager.health()
        keys = health["providers"]["vendor"]["keys"]
        assert keys["vendor/1"] == {"state": "parked", "reason": "LLMAuthenticationError: bad key ***"}
        assert (keys["vendor/2"]["state"], keys["vendor/2"]["for"]) == ("paused", pytest.approx(5.0))
        assert health["ready"], "it comes back by itself"


async def test_it_is_not_ready_while_all_keys_are_parked_or_the_circuit_is_open() -> None:
    async with rig(lambda _: failure(401)) as r:
        with pytest.raises(LLMException):
            await r.client.chat(PROMPT)
        assert not r.manager.health()["ready"]
    layers = {"retry": {"enabled": False}, "circuit_breaker": {"consecutive": 1}}
    async with rig(lambda _: failure(503), config=configuration(middleware=layers)) as r:
        with pytest.raises(LLMException):
            await r.client.chat(PROMPT)
        health = r.manager.health()
        assert (health["live"], health["ready"]) == (True, False)
        assert health["providers"]["vendor"]["circuit"] == "open"
        await r.clock.advance(1.0)
        assert r.manager.health()["ready"], "the next call finds out"


async def test_a_chain_that_leads_to_a_provider_that_is_able_keeps_it_ready() -> None:
    config = configuration()
    config["providers"]["second"] = {**config["providers"]["vendor"], "base_url": "http://second.test/v1"}
    config["providers"]["vendor"]["fallback"] = "others"
    config["fallbacks"] = {"others": [{"provider": "second"}]}

    def vendors(request: HTTPRequest) -> Any:
        return answer() if "second" in request.url else failure(401)

    async with rig(vendors, config=config) as r:
        await r.client.chat(PROMPT)
        health = r.manager.health()
    assert (health["ready"], health["providers"]["vendor"]["ready"]) == (True, False)


async def test_keys_of_one_quota_pool_fall_together_when_it_is_spent() -> None:
    def vendor(request: HTTPRequest) -> Any:
        return failure(402, "no credit") if key_of(request) == 1 else answer()

    config = configuration(3, quota_pools=["team", "team", "other"])
    async with rig(vendor, config=config) as r:
        assert await r.client.chat(PROMPT) == "hello"
        assert r.keys == [1, 3]
        assert r.states == ["parked", "parked", "healthy"]


async def test_keys_of_no_pool_fall_alone() -> None:
    def vendor(request: HTTPRequest) -> Any:
        return failure(402, "no credit") if key_of(request) == 1 else answer()

    async with rig(vendor, config=configuration(3)) as r:
        await r.client.chat(PROMPT)
        assert r.states == ["parked", "healthy", "healthy"]


# -- draining ----------------------------------------------------------------------------------------------------------


async def test_a_drain_lets_calls_and_streams_end_and_refuses_new_ones() -> None:
    script = [answer(delay=5.0), stream(delta("hel"), 8.0, delta("lo"), END)]
    async with rig(script) as r:
        call = asyncio.create_task(r.client.chat(PROMPT))
        await r.clock.settle()
        reading = asyncio.create_task(whole(r.client))
        await r.clock.settle()
        closing = asyncio.create_task(r.manager.close(drain=60.0))
        await r.clock.settle()
        with pytest.raises(LLMConnectionError, match="closed"):
            await r.client.chat(PROMPT)
        assert not r.manager.health()["ready"]
        assert r.manager.health()["live"]
        await r.clock.advance(7.9)
        assert (call.done(), reading.done(), closing.done()) == (True, False, False)
        await r.clock.advance(0.2)
        assert (await call, await reading) == ("hello", "hello")
        await closing
        assert r.clock.now() < 1_010.0


async def whole(client: Any) -> str:
    return "".join([chunk.text async for chunk in client.stream_complete(PROMPT)])


async def test_a_drain_ends_with_its_time_and_what_is_left_is_cut_in_order() -> None:
    async with rig([stream(delta("hel"), 600.0, END)]) as r:
        reading = asyncio.create_task(whole(r.client))
        await r.clock.settle()
        closing = asyncio.create_task(r.manager.close(drain=10.0))
        await r.clock.advance(10.0)
        await closing
        with pytest.raises(LLMStreamInterruptedError) as caught:
            await reading
    assert (caught.value.partial, caught.value.message) == ("hel", "the manager was closed")


async def test_a_drain_waits_for_those_in_the_queue_and_between_two_attempts() -> None:
    config = configuration(rate_limits={"requests_per_minute": 2})
    async with rig([failure(503, retry_after="3"), answer(), answer()], config=config) as r:
        calls = [asyncio.create_task(r.client.chat(PROMPT)) for _ in range(2)]
        await r.clock.settle()
        closing = asyncio.create_task(r.manager.close(drain=100.0))
        await r.clock.advance(61.0)
        assert await asyncio.gather(*calls) == ["hello", "hello"]
        await r.clock.advance(1.0)
        await closing


async def test_who_does_nothing_is_closed_at_once() -> None:
    async with rig() as r:
        await r.manager.close(drain=60.0)
        assert r.clock.now() == 1_000.0
        await r.manager.close(drain=60.0)
