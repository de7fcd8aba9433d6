"""Journeys: a manager, the simulator, and real HTTP between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from llm import (
    LLMAuthenticationError,
    LLMClient,
    LLMDeadlineExceededError,
    LLMException,
    LLMManager,
    LLMOverloadedError,
    LLMQuotaExhaustedError,
    LLMStreamInterruptedError,
    Message,
    MessageRole,
)
from llm.core.events import AttemptFailed, KeyPaused
from llm.testing.journal import Arrival, check_window, usage_events
from llm.testing.simulator import Simulator, SimulatorSettings
from llm.testing.window import Limits
from tests.quotas import quotas

DIALECTS = ("anthropic", "openai")
THREE = ["key1", "key2", "key3"]
HASTE: dict[str, Any] = {"retry": {"base_delay": 0.01, "max_delay": 0.02}}
"""Backoff of hundredths of a second: real time passes here, and none of it is what is being tested."""


@asynccontextmanager
async def journey(
    dialect: str = "openai",
    *,
    keys: list[str] | None = None,
    middleware: dict[str, Any] | None = None,
    settings: SimulatorSettings | None = None,
    **provider: Any,
) -> AsyncIterator[tuple[LLMManager, LLMClient, Simulator]]:
    """A manager of one provider, whose vendor is a simulator."""
    async with Simulator(settings) as simulator:
        config = {
            "providers": {
                dialect: {
                    "base_url": getattr(simulator, f"{dialect}_url"),
                    "api_keys": keys or ["key1"],
                    "models": "m",
                    **provider,
                }
            },
            "middleware": {**HASTE, **(middleware or {})},
        }
        # It reads files: not on the loop.
        async with await asyncio.to_thread(LLMManager.from_config, config, environ={}) as manager:
            yield manager, manager.get_client(), simulator


def keys(simulator: Simulator) -> list[str]:
    """The keys of the requests that asked for an answer, in the order of their arrival."""
    return [arrival.key for arrival in generating(simulator)]


def generating(simulator: Simulator) -> list[Arrival]:
    return [arrival for arrival in simulator.journal if arrival.method == "POST"]


async def ask(client: LLMClient, streaming: bool, text: str = "hello there", **options: Any) -> str:
    if streaming:
        return "".join([chunk.text async for chunk in client.stream_complete(text, **options)])
    return await client.chat(text, **options)


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def streaming(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# ---------------------------------------------------------------- the plain way


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_both_dialects_answer_whole_and_streamed(dialect: str, streaming: bool) -> None:
    async with journey(dialect) as (manager, client, simulator):
        text = await ask(client, streaming, "What is the answer?")
        metrics = manager.get_status()["metrics"]
        [arrival] = simulator.journal
    assert text
    assert (arrival.dialect, arrival.status, arrival.stream, arrival.model) == (dialect, 200, streaming, "m")
    assert arrival.key == "key1"
    assert metrics["tokens"] == {
        "input": arrival.input_tokens,
        "output": arrival.output_tokens,
        "total": arrival.input_tokens + arrival.output_tokens,
    }
    assert metrics["latency"]["max"] > 0.0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_conversation_reaches_the_vendor_in_its_own_words(dialect: str) -> None:
    messages = [
        Message(MessageRole.SYSTEM, "You are a helpful assistant"),
        Message(MessageRole.USER, "What is Python?"),
    ]
    async with journey(dialect) as (_, client, simulator):
        response = await client.complete(messages=messages, temperature=0.7, max_tokens=200)
        body = simulator.journal[0].body
    assert str(response) == response.text
    assert body["temperature"] == 0.7
    assert body["max_tokens"] == 200
    assert body["messages"][-1]["content"] == "What is Python?"
    assert response.usage.total_tokens > 0
    assert response.raw["model"] == "m"


async def test_connections_are_kept_and_used_again(streaming: bool) -> None:
    async with journey() as (manager, client, simulator):
        for _ in range(10):
            await ask(client, streaming)
        connections = manager.get_status()["providers"]["openai"]["connections"]
    assert connections["opened"] == 1
    assert len({arrival.connection for arrival in simulator.journal}) == 1


# ---------------------------------------------------------------- keys


async def test_four_concurrent_calls_go_out_on_keys_one_two_three_one_with_their_models() -> None:
    """The user's own configuration: three keys, three models, one limit for each."""
    limit = {"requests_per_minute": 50, "input_tokens_per_minute": 50_000, "output_tokens_per_minute": 10_000}
    models = ["claude-3-5-haiku-20241022", "claude-3-5-sonnet-20241022", "claude-3-opus-20240229"]
    # Longer than a slow start keeps the second call of a key waiting.
    settings = SimulatorSettings(latency=1.5)
    async with journey(
        "anthropic", keys=THREE, models=models, rate_limits=[limit], pool={"max_size": 4}, settings=settings
    ) as (manager, client, simulator):
        await asyncio.gather(*(client.chat(f"call {number}") for number in range(4)))
        clients = manager.get_status()["providers"]["anthropic"]["clients"]
        # Four sockets are opened at once, and which of them the server reads first is chance.
        sent = sorted(simulator.journal, key=lambda arrival: arrival.body["messages"][0]["content"])
    assert [arrival.key for arrival in sent] == ["key1", "key2", "key3", "key1"]
    assert [arrival.model for arrival in sent] == [*models, models[0]]
    assert (clients["created"], clients["max_size"]) == (4, 4)


async def test_one_dead_key_of_three_costs_no_call(streaming: bool) -> None:
    settings = SimulatorSettings(revoked=["key2"])
    async with journey(keys=THREE, settings=settings) as (manager, client, simulator):
        await asyncio.gather(*(ask(client, streaming) for _ in range(20)))
        for _ in range(4):
            await ask(client, streaming)
        status = manager.get_status()
    assert status["metrics"]["requests"]["successful"] == 24
    assert status["metrics"]["requests"]["failed"] == 0
    assert [key["state"] for key in status["providers"]["openai"]["keys"]] == ["healthy", "parked", "healthy"]
    assert "key2" not in keys(simulator)[-4:]


async def test_a_429_pauses_its_key_and_the_retry_goes_out_on_another(streaming: bool) -> None:
    async with journey(keys=THREE) as (manager, client, simulator):
        simulator.fail("429", key="key1", seconds=30.0)
        with manager.events.subscribe() as told:
            await ask(client, streaming)
            events = told.drain()
        for _ in range(4):
            await ask(client, streaming)
        state = manager.get_status()["providers"]["openai"]["keys"][0]
    assert keys(simulator) == ["key1", "key2", "key3", "key2", "key3", "key2"]
    [paused] = [event for event in events if isinstance(event, KeyPaused)]
    [failed] = [event for event in events if isinstance(event, AttemptFailed)]
    assert (paused.key_id, failed.key_id, failed.status, failed.retry_in) == ("openai/1", "openai/1", 429, 0.0)
    assert 30.0 <= paused.seconds <= 33.0
    assert state["state"] == "paused"


@pytest.mark.parametrize(("field", "kind"), [("revoked", LLMAuthenticationError), ("unpaid", LLMQuotaExhaustedError)])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_with_all_keys_of_no_use_calls_fail_at_once_with_the_cause(
    dialect: str, field: str, kind: type[LLMException]
) -> None:
    settings = msgspec.structs.replace(SimulatorSettings(), **{field: THREE})
    async with journey(dialect, keys=THREE, settings=settings) as (_, client, simulator):
        for _ in range(3):
            with pytest.raises(kind):
                await client.chat("hello")
    assert keys(simulator) == THREE, "each was tried once, and then nobody asked again"


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_forbidden_request_is_told_from_a_forbidden_key_by_a_probe(dialect: str) -> None:
    async with journey(dialect, keys=THREE) as (manager, client, simulator):
        simulator.fail("403", key="key1")
        with pytest.raises(LLMAuthenticationError) as caught:
            await client.chat("hello")
        assert caught.value.scope == "request"
        simulator.forbidden.add("key2")
        await client.chat("hello")
        states = [key["state"] for key in manager.get_status()["providers"][dialect]["keys"]]
    assert states == ["healthy", "parked", "healthy"]
    assert [a.key for a in simulator.journal if a.method == "GET"] == ["key1", "key2"]


async def test_limits_are_kept_so_that_the_vendor_never_refuses() -> None:
    """Three keys of five requests a second, and thirty calls at once. (The guard is for a busy machine.)"""
    limits = Limits(requests=5, window_seconds=1.0)
    async with journey(
        keys=THREE,
        rate_limits={"requests_per_minute": 5, "window_seconds": 1.0},
        middleware={"rate_limiter": {"guard_seconds": 0.5}},
        settings=SimulatorSettings(limits=limits),
    ) as (_, client, simulator):
        await asyncio.gather(*(client.chat("hello") for _ in range(30)))
    assert {arrival.status for arrival in simulator.journal} == {200}
    for key in THREE:
        assert check_window(usage_events(simulator.journal, key), 5, 1.0) == 0


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["500", "502", "503", "529", "reset", "408"])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_outage_is_survived_by_retries(dialect: str, fault: str, streaming: bool) -> None:
    async with journey(dialect) as (manager, client, simulator):
        simulator.fail(fault, times=2)
        assert await ask(client, streaming)
        metrics = manager.get_status()["metrics"]
    assert len(simulator.journal) == 3
    assert metrics["requests"] == {"total": 1, "successful": 1, "failed": 0, "cancelled": 0, "in_progress": 0}
    assert (metrics["attempts"], metrics["retries"]) == (3, 2)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_request_that_was_written_and_lost_is_sent_paid_and_counted_once_more(
    dialect: str, streaming: bool
) -> None:
    """POST is at least once: nobody knows whether the vendor has billed what was lost."""
    limits = {"requests_per_minute": 50, "input_tokens_per_minute": 1000}
    async with journey(dialect, rate_limits=limits) as (manager, client, simulator):
        simulator.fail("request_lost")
        assert await ask(client, streaming)
        [used] = quotas(manager)
        metrics = manager.get_status()["metrics"]
    assert [(arrival.received, arrival.fault) for arrival in simulator.journal] == [
        (True, "request_lost"),
        (True, None),
    ]
    assert used["requests"]["used"] == 2
    assert used["input_tokens"]["used"] > simulator.journal[1].input_tokens, "what was lost is paid as estimated"
    assert (metrics["attempts"], metrics["retries"]) == (2, 1)


async def test_an_outage_that_lasts_is_told_with_its_attempts() -> None:
    async with journey() as (_, client, simulator):
        simulator.fail("529", times=None)
        with pytest.raises(LLMOverloadedError) as caught:
            await client.chat("hello")
        assert [record.status for record in caught.value.attempts] == [529, 529, 529]
        simulator.heal()
        assert await client.chat("hello")


@pytest.mark.parametrize(
    ("dialect", "fault"),
    [
        *((dialect, fault) for dialect in DIALECTS for fault in ("cut_stream", "reset_stream", "stream_error")),
        # Of other servers that speak Chat Completions, many end well without the word [DONE].
        ("anthropic", "missing_terminal"),
    ],
)
async def test_a_stream_that_breaks_off_is_typed_and_has_its_beginning(dialect: str, fault: str) -> None:
    async with journey(dialect) as (manager, client, simulator):
        simulator.fail(fault, deltas=2)
        pieces: list[str] = []

        async def read() -> None:
            async for chunk in client.stream_complete("one two three four five six seven"):
                pieces.append(chunk.text)

        with pytest.raises(LLMException) as caught:
            await read()
        error = caught.value
        expected = LLMOverloadedError if fault == "stream_error" else LLMStreamInterruptedError
        assert type(error) is expected
        assert error.partial == "".join(pieces) != ""
        assert (error.key_id, error.sent) == (f"{dialect}/1", True)
        assert len(simulator.journal) == 1, "nothing is repeated once content was delivered"
        status = manager.get_status()
        assert status["metrics"]["errors_by_type"] == {expected.__name__: 1}
        assert status["providers"][dialect]["clients"]["in_use"] == 0
        assert await ask(client, True)


@pytest.mark.parametrize("fault", ["silence", "stall"])
async def test_the_deadline_ends_a_silent_vendor_and_a_stalled_answer(fault: str, streaming: bool) -> None:
    async with journey() as (manager, client, simulator):
        simulator.fail(fault, times=None)
        with pytest.raises(LLMDeadlineExceededError) as caught:
            await ask(client, streaming, "one two three four", timeout=0.2)
        assert caught.value.sent
        assert bool(caught.value.partial) is (fault == "stall" and streaming)
        assert manager.get_status()["providers"]["openai"]["connections"]["in_flight"] == 0


async def test_a_deadline_strikes_a_reader_who_dawdles() -> None:
    async with journey() as (_, client, simulator):
        simulator.fail("stall")
        settled = asyncio.Event()
        async with client.stream_complete("one two three four five", timeout=0.2) as stream:
            stream.on_settled(lambda _: settled.set())
            await settled.wait()

            async def rest() -> None:
                async for _ in stream:
                    pass

            with pytest.raises(LLMDeadlineExceededError):
                await rest()


# ---------------------------------------------------------------- leaving


async def test_a_call_cancelled_in_the_middle_of_its_stream_leaves_nothing() -> None:
    async with journey() as (manager, client, simulator):
        simulator.fail("stall")
        begun = asyncio.Event()

        async def use() -> None:
            async for _ in client.stream_complete("one two three four five six"):
                begun.set()

        call = asyncio.create_task(use())
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        status = manager.get_status()
        assert status["providers"]["openai"]["connections"]["in_flight"] == 0
        assert status["providers"]["openai"]["clients"]["in_use"] == 0
        assert status["metrics"]["requests"]["cancelled"] == 1
        while not simulator.journal[0].disconnected:
            await asyncio.sleep(0)
        assert await client.chat("hello"), "and the next call is served"


async def test_a_loop_that_is_left_early_hangs_up_at_once() -> None:
    async with journey() as (manager, client, simulator):
        simulator.fail("stall")
        async for _ in client.stream_complete("one two three four five six"):
            break
        assert manager.get_status()["providers"]["openai"]["connections"]["in_flight"] == 0
        while not simulator.journal[0].disconnected:
            await asyncio.sleep(0)


async def test_many_cancelled_calls_leave_every_client_free() -> None:
    settings = SimulatorSettings(latency=5.0)
    async with journey(keys=THREE, pool={"max_size": 10}, settings=settings) as (manager, client, _):
        calls = [asyncio.create_task(client.chat("hello")) for _ in range(50)]
        while manager.get_status()["providers"]["openai"]["connections"]["in_flight"] < 10:
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        status = manager.get_status()["providers"]["openai"]
    assert (status["clients"]["in_use"], status["queued"]) == (0, 0)
    assert status["connections"]["in_flight"] == 0


async def test_closing_in_the_middle_of_everything_ends_everything_with_typed_errors() -> None:
    async with journey(keys=THREE, pool={"max_size": 6}) as (manager, client, simulator):
        simulator.fail("stall", times=None)
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in client.stream_complete("one two three four"):
                begun.set()

        calls = [asyncio.create_task(read()) for _ in range(10)]
        await begun.wait()
        await manager.close()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        connections = manager.get_status()["providers"]["openai"]["connections"]
    assert [error for error in ended if not isinstance(error, LLMException)] == []
    assert (connections["open"], connections["in_flight"]) == (0, 0)
