"""The usage that the module was asked for, call by call: same names, same printing, three keys with a model each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llm.testing.simulator import Simulator, SimulatorSettings
from llm.testing.window import Limits
from src.llm import LLMClient, LLMManager, Message, MessageRole, get_llm_manager, set_llm_manager

KEYS = ["key1", "key2", "key3"]
MODELS = ["claude-3-5-haiku-20241022", "claude-3-5-sonnet-20241022", "claude-3-opus-20240229"]
LIMITS = {"requests_per_minute": 50, "input_tokens_per_minute": 50000, "output_tokens_per_minute": 10000}
CONVERSATION = [
    Message(MessageRole.SYSTEM, "You are a helpful assistant"),
    Message(MessageRole.USER, "What is Python?"),
]


def configuration(url: str, **provider: Any) -> dict[str, Any]:
    described = {"api_keys": KEYS, "models": MODELS, "rate_limits": [LIMITS], "base_url": url}
    return {"providers": {"anthropic": {**described, **provider}}}


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    limits = Limits(requests=50, input_tokens=50000, output_tokens=10000)
    async with Simulator(SimulatorSettings(limits=limits)) as simulator:
        yield simulator


@pytest.fixture
async def manager(simulator: Simulator) -> AsyncIterator[LLMManager]:
    # In a thread: it looks for registered extensions, which are files.
    async with await asyncio.to_thread(LLMManager.from_config, configuration(simulator.url)) as made:
        with set_llm_manager(made):
            yield await get_llm_manager()


@pytest.fixture
def client(manager: LLMManager) -> LLMClient:
    return manager.get_client()


async def test_a_chat_prints_as_its_text(client: LLMClient, capsys: pytest.CaptureFixture[str]) -> None:
    response = await client.chat("Hello, how are you?")
    print(response)
    assert type(response) is str
    assert capsys.readouterr().out == "You said: Hello, how are you?\n"


async def test_a_conversation_takes_options_and_prints_as_its_text(
    client: LLMClient, simulator: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    response = await client.complete(messages=CONVERSATION, temperature=0.7, max_tokens=200)
    print(response)
    assert capsys.readouterr().out == "You said: What is Python?\n"
    body = simulator.journal[0].body
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.7, 200, MODELS[0])
    assert body["messages"][0]["role"] == "user"
    assert "helpful" in str(body["system"])


async def test_a_stream_prints_piece_by_piece(client: LLMClient, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = 0
    async for chunk in client.stream_complete(CONVERSATION):
        print(chunk, end="")
        pieces += 1
    assert pieces > 2
    assert capsys.readouterr().out == "You said: What is Python?"


async def test_the_metrics_tell_requests_tokens_latency_errors_and_models(
    manager: LLMManager, client: LLMClient
) -> None:
    await client.chat("Hello, how are you?")
    await client.complete(messages=CONVERSATION, temperature=0.7, max_tokens=200)
    async for _ in client.stream_complete(CONVERSATION):
        pass

    status = manager.get_status()

    metrics = status["metrics"]
    assert {name: metrics["requests"][name] for name in ("total", "successful", "failed")} == {
        "total": 3,
        "successful": 3,
        "failed": 0,
    }
    tokens = metrics["tokens"]
    assert tokens["total"] == tokens["input"] + tokens["output"] > 0
    assert 0 < metrics["latency"]["min"] <= metrics["latency"]["average"] <= metrics["latency"]["max"]
    assert metrics["errors_by_type"] == {}
    assert set(metrics["usage_by_model"]) == set(MODELS)


async def test_four_clients_are_made_in_round_robin(simulator: Simulator) -> None:
    """Client 1 has key 1 and model 1, client 2 the second ones, client 3 the third, and client 4 cycles back."""
    small = configuration(simulator.url, pool={"max_size": 4})
    async with await asyncio.to_thread(LLMManager.from_config, small) as manager:
        client = manager.get_client()
        await asyncio.gather(*(client.chat(f"Question {number}") for number in range(1, 5)))
    # Concurrent requests may reach the server in any order: which question went out with which key is what counts.
    sent = {arrival.body["messages"][0]["content"]: (arrival.key, arrival.model) for arrival in simulator.journal}
    pairs = list(zip(KEYS, MODELS, strict=True))
    assert [sent[f"Question {number}"] for number in range(1, 5)] == [*pairs, pairs[0]]


async def test_a_model_that_is_asked_for_is_answered_by_its_key(manager: LLMManager, simulator: Simulator) -> None:
    client = manager.get_client(model=MODELS[2])
    for _ in range(3):
        await client.chat("Hello, how are you?")
    assert {(arrival.key, arrival.model) for arrival in simulator.journal} == {(KEYS[2], MODELS[2])}
