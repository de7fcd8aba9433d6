"""Every feature in every dialect works on the simulator, or is refused before it is sent: with feature and model named.

The vendors' own rules hold, because the providers are configured at the vendors' own addresses; the transport carries
what is sent there to the simulator.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llm import LLMClient, LLMManager, Message, MessageRole
from llm.core.content import Thinking, ToolCall
from llm.core.exceptions import LLMInvalidRequestError
from llm.core.settings import ProviderSettings
from llm.core.types import LLMResponse, StopReason
from llm.providers.catalog import catalog
from llm.testing.simulator import Simulator, SimulatorSettings
from llm.transports.base import Exchange, HTTPRequest
from llm.transports.http import HTTPTransport
from llm.transports.response import HTTPResponse
from llm.utils.clock import Clock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from wire_corpus import NEVER, SCHEMA, families, features  # it lies beside the benches, and is data

DIALECTS = ("anthropic", "openai", "openai_responses")
VENDORS = ("https://api.anthropic.com", "https://api.openai.com")


class Diverted(HTTPTransport):
    """Carries what is sent to a vendor to the simulator."""

    target = ""

    async def send(self, request: HTTPRequest, exchange: Exchange) -> HTTPResponse:
        url = request.url
        for vendor in VENDORS:
            url = url.replace(vendor, self.target)
        return await super().send(HTTPRequest(request.method, url, request.headers, request.body), exchange)


@asynccontextmanager
async def vendors(**settings: Any) -> AsyncIterator[tuple[LLMManager, Simulator]]:
    """A manager of all dialects at their vendors' own addresses, where the simulator answers."""
    async with Simulator(SimulatorSettings(**settings)) as simulator:

        def transport(configured: ProviderSettings, clock: Clock) -> HTTPTransport:
            carried = Diverted(configured.transport, configured.timeouts, clock=clock, environ={})
            carried.target = simulator.url
            return carried

        config: Mapping[str, Any] = {
            "providers": {name: {"dialect": name, "api_keys": [f"key-{name}"]} for name in DIALECTS},
            "middleware": {"rate_limiter": {"slow_start": False}},
        }
        # Trusted certificates are read from the disk.
        made = await asyncio.to_thread(LLMManager.from_config, config, environ={}, transport=transport)
        async with made as manager:
            yield manager, simulator


def options_of(feature: Any) -> dict[str, Any]:
    """What a feature asks, as a caller would write it."""
    said = feature.options
    return {
        name: value for name in said.__struct_fields__ if (value := getattr(said, name)) not in (None, "", "normal")
    }


async def answer(client: LLMClient, feature: Any) -> LLMResponse:
    if not feature.stream:
        return await client.complete(feature.messages, **options_of(feature))
    async with client.stream_complete(feature.messages, **options_of(feature)) as stream:
        async for _ in stream:
            pass
        return stream.response()


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_every_feature_works_with_every_family_or_is_refused_before_it_is_sent(dialect: str) -> None:
    worked: set[str] = set()
    refused: set[str] = set()
    async with vendors() as (manager, simulator):
        for model in families(dialect).values():
            client = manager.get_client(dialect, model)
            for name, feature in features(dialect).items():
                before = len(simulator.journal)
                refusal, response = None, None
                try:
                    response = await answer(client, feature)
                except LLMInvalidRequestError as error:
                    refusal = error
                if response is not None:
                    worked.add(name)
                    check(name, response, feature.options.tools is not None)
                else:
                    refused.add(name)
                    assert len(simulator.journal) == before, f"{name}, {model}: {refusal}"
                    assert model in str(refusal), f"{name}: {refusal}"
    everything = set(features(dialect))
    assert worked | refused == everything
    # What works with no family at all is refused by the dialect itself, and known here.
    assert everything - worked == NEVER[dialect]


def check(name: str, response: LLMResponse, has_tools: bool) -> None:
    """The answer is one to what was asked."""
    if name in ("tools", "tools, streamed", "some tool", "this tool", "one tool at a time", "reasoning with tools"):
        assert response.stop_reason is StopReason.TOOL_CALLS, name
        (call,) = response.tool_calls
        assert set(call.input) == set(SCHEMA["properties"]), name
    elif name in ("a form", "a form, streamed"):
        assert ToolCall("", "", response.text).input.keys() == SCHEMA["properties"].keys(), name
        assert response.tool_calls == (), name
    elif name in ("calls and results", "calls, results and thinking"):
        assert "rain" in response.text, name
    elif not has_tools:
        assert response.text, name


async def test_chat_completions_gives_tools_for_the_newest_models_to_the_other_api() -> None:
    async with vendors() as (manager, simulator):
        client = manager.get_client("openai", catalog().openai.default)
        run = await client.run_tools("Weather?", tools=[weather], reasoning="low")
        assert (run.finished, run.rounds) == (True, 2)
        assert {arrival.path for arrival in simulator.journal} == {"/v1/responses"}
        assert await client.chat("Hello") == "You said: Hello"
        assert simulator.journal[-1].path == "/v1/chat/completions"


def weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


@pytest.mark.parametrize("dialect", ["anthropic", "openai_responses"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_what_was_thought_survives_into_the_next_request(dialect: str, streamed: bool) -> None:
    """The simulator refuses a seal that is not its own for this very text."""
    async with vendors() as (manager, simulator):
        client = manager.get_client(dialect)
        if streamed:
            async with client.stream_complete("Weather?", tools=[weather], reasoning="low") as stream:
                async for _ in stream:
                    pass
                response = stream.response()
        else:
            response = await client.complete("Weather?", tools=[weather], reasoning="low")
        assert [type(part) for part in response.content] == [Thinking, ToolCall]
        assert response.thinking == "Let me think about this."
        assert response.usage.reasoning_tokens == 5
        run = await client.run_tools("Weather?", tools=[weather], reasoning="low")
        assert run.finished
        assert [arrival.status for arrival in simulator.journal] == [200, 200, 200]


async def test_a_long_answer_of_anthropics_is_streamed_and_comes_whole() -> None:
    async with vendors() as (manager, simulator):
        client = manager.get_client("anthropic")
        long = await client.complete("Hello", max_tokens=32_000)
        short = await client.complete("Hello", max_tokens=2_000)
        assert [arrival.stream for arrival in simulator.journal] == [True, False]
    assert (long.text, long.usage, long.stop_reason, long.key_id) == (
        short.text,
        short.usage,
        short.stop_reason,
        short.key_id,
    )
    assert long.request_id


async def test_a_long_answer_that_breaks_off_is_asked_for_again() -> None:
    async with vendors() as (manager, simulator):
        simulator.fail("cut_stream")
        response = await manager.get_client("anthropic").complete("Hello you out there", max_tokens=32_000)
        assert response.text == "You said: Hello you out there"
        assert len(simulator.journal) == 2
        assert manager.get_status()["providers"]["anthropic"]["clients"]["in_use"] == 0


async def test_a_cached_prompt_is_seen_in_the_usage() -> None:
    messages = [Message(MessageRole.SYSTEM, "word " * 2000, cache=True), Message(MessageRole.USER, "Hello")]
    async with vendors() as (manager, _):
        client = manager.get_client("anthropic")
        first, second = [(await client.complete(messages)).usage for _ in range(2)]
    assert first.cache_write_tokens == second.cache_read_tokens > 1000
    assert first.input_tokens == second.input_tokens
