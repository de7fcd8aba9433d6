"""The simulator asks for tools, keeps to schemas, thinks, caches, and objects like the vendors to what they refuse."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import jsonschema  # type: ignore[import-untyped]  # it has no types
import msgspec
import pytest

from llm.testing.saying import Said, sample
from llm.testing.simulator import Simulator, SimulatorSettings

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "array", "items": {"$ref": "#/$defs/Day"}},
        "unit": {"anyOf": [{"type": "null"}, {"enum": ["C", "F"]}]},
        "n": {"type": "integer", "minimum": 5},
        "x": {"type": "number"},
        "ok": {"type": ["boolean", "null"]},
        "when": {"type": "string", "format": "date"},
        "kind": {"const": "k"},
    },
    "required": ["city", "days", "unit"],
    "$defs": {
        "Day": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Day"}, {"type": "null"}]}}}
    },
}
PATHS = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions", "openai_responses": "/v1/responses"}
every_dialect = pytest.mark.parametrize("dialect", PATHS)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def body(dialect: str, **more: Any) -> dict[str, Any]:
    """A request with the tool ``weather``."""
    asked = [{"role": "user", "content": "Weather?"}]
    tools: list[dict[str, Any]]
    if dialect == "anthropic":
        tools = [{"name": "weather", "input_schema": SCHEMA}]
        return {"model": "m", "max_tokens": 2000, "messages": asked, "tools": tools} | more
    if dialect == "openai":
        tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
        return {"model": "m", "messages": asked, "tools": tools} | more
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}]
    return {"model": "m", "input": asked, "tools": tools} | more


async def post(session: aiohttp.ClientSession, simulator: Simulator, path: str, data: Any) -> tuple[int, Any]:
    headers = {"authorization": "Bearer k", "anthropic-version": "2023-06-01"}
    async with session.post(simulator.url + path, json=data, headers=headers) as response:
        return response.status, await response.json()


def test_a_sample_fits_its_schema_and_is_always_the_same() -> None:
    value = sample(SCHEMA)
    jsonschema.validate(value, SCHEMA)
    assert sample(SCHEMA) == value
    assert (value["unit"], value["n"], value["kind"], value["when"]) == ("C", 5, "k", "2026-11-26")


def call_of(dialect: str, reply: Any) -> tuple[str, str, Any]:
    """Id, name and arguments of the one call in *reply*."""
    if dialect == "anthropic":
        (block,) = reply["content"]
        return block["id"], block["name"], block["input"]
    if dialect == "openai":
        (call,) = reply["choices"][0]["message"]["tool_calls"]
        return call["id"], call["function"]["name"], msgspec.json.decode(call["function"]["arguments"])
    (item,) = reply["output"]
    return item["call_id"], item["name"], msgspec.json.decode(item["arguments"])


def with_result(
    dialect: str, asked: dict[str, Any], reply: Any, result: str, *, name: str | None = None
) -> dict[str, Any]:
    """The next request: *reply*, and what the tool has answered."""
    asked = copy.deepcopy(asked)
    given = name or call_of(dialect, reply)[0]
    if dialect == "anthropic":
        answer = {"type": "tool_result", "tool_use_id": given, "content": result}
        asked["messages"] += [{"role": "assistant", "content": reply["content"]}, {"role": "user", "content": [answer]}]
    elif dialect == "openai":
        message = reply["choices"][0]["message"]
        asked["messages"] += [message, {"role": "tool", "tool_call_id": given, "content": result}]
    else:
        asked["input"] += [*reply["output"], {"type": "function_call_output", "call_id": given, "output": result}]
    return asked


def text_of(dialect: str, reply: Any) -> str:
    if dialect == "anthropic":
        return str(reply["content"][-1]["text"])
    if dialect == "openai":
        return str(reply["choices"][0]["message"]["content"])
    return str(reply["output"][-1]["content"][0]["text"])


@every_dialect
async def test_a_tool_is_asked_for_and_its_result_is_told(session: aiohttp.ClientSession, dialect: str) -> None:
    async with Simulator() as simulator:
        asked = body(dialect)
        status, reply = await post(session, simulator, PATHS[dialect], asked)
        assert status == 200
        _, name, arguments = call_of(dialect, reply)
        assert name == "weather"
        jsonschema.validate(arguments, SCHEMA)
        status, final = await post(session, simulator, PATHS[dialect], with_result(dialect, asked, reply, "rain"))
        assert status == 200
        assert text_of(dialect, final) == "The tools said: rain"
        # A result of a call that nobody made, and a call without its result.
        wrong = with_result(dialect, asked, reply, "rain", name="another")
        assert (await post(session, simulator, PATHS[dialect], wrong))[0] == 400
        key = "input" if dialect == "openai_responses" else "messages"
        lost = with_result(dialect, asked, reply, "rain")
        lost[key][-1] = {"role": "user", "content": "And?"}
        assert (await post(session, simulator, PATHS[dialect], lost))[0] == 400


@every_dialect
async def test_no_tool_is_asked_for_when_none_may_be(session: aiohttp.ClientSession, dialect: str) -> None:
    choice: Any = {"type": "none"} if dialect == "anthropic" else "none"
    async with Simulator() as simulator:
        status, reply = await post(session, simulator, PATHS[dialect], body(dialect, tool_choice=choice))
    assert (status, text_of(dialect, reply)) == (200, "You said: Weather?")


@every_dialect
async def test_an_answer_keeps_to_the_form_that_is_asked_for(session: aiohttp.ClientSession, dialect: str) -> None:
    form = {"type": "json_schema", "name": "forecast", "schema": SCHEMA}
    more: Any = {
        "anthropic": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "openai": {"response_format": {"type": "json_schema", "json_schema": {"name": "forecast", "schema": SCHEMA}}},
        "openai_responses": {"text": {"format": form}},
    }[dialect]
    asked = body(dialect, **more)
    del asked["tools"]
    async with Simulator() as simulator:
        _, reply = await post(session, simulator, PATHS[dialect], asked)
    jsonschema.validate(msgspec.json.decode(text_of(dialect, reply)), SCHEMA)


@pytest.mark.parametrize("dialect", ["anthropic", "openai_responses"])
async def test_what_was_thought_goes_back_unaltered_or_not_at_all(session: aiohttp.ClientSession, dialect: str) -> None:
    more: dict[str, Any] = (
        {"thinking": {"type": "adaptive"}} if dialect == "anthropic" else {"reasoning": {"effort": "low"}}
    )
    asked = body(dialect, **more)
    del asked["tools"]
    async with Simulator() as simulator:
        _, reply = await post(session, simulator, PATHS[dialect], asked)
        key, parts = ("messages", "content") if dialect == "anthropic" else ("input", "output")
        thought = reply[parts][0]
        said = [{"role": "assistant", "content": reply[parts]}] if dialect == "anthropic" else reply[parts]
        asked[key] += [*said, {"role": "user", "content": "Go on"}]
        assert (await post(session, simulator, PATHS[dialect], asked))[0] == 200
        if dialect == "anthropic":
            thought["thinking"] += "!"
        else:
            thought["summary"][0]["text"] += "!"
        status, problem = await post(session, simulator, PATHS[dialect], asked)
    assert status == 400
    assert "signature" in problem["error"]["message"] or "encrypted" in problem["error"]["message"]


async def test_chat_completions_has_no_tools_for_the_newest_models(session: aiohttp.ClientSession) -> None:
    async with Simulator() as simulator:
        status, problem = await post(session, simulator, PATHS["openai"], body("openai", model="gpt-6.1-sol"))
        assert (status, problem["error"]["param"]) == (400, "reasoning_effort")
        assert "use /v1/responses" in problem["error"]["message"]
        found = await post(session, simulator, PATHS["openai_responses"], body("openai_responses", model="gpt-6.1-sol"))
        assert found[0] == 200


@every_dialect
async def test_what_is_scripted_is_said(session: aiohttp.ClientSession, dialect: str) -> None:
    said = Said("I look.", (("weather", {"city": "Oslo"}), ("clock", {})), "Hm.")
    async with Simulator(SimulatorSettings(reply=lambda _: said)) as simulator:
        _, reply = await post(session, simulator, PATHS[dialect], body(dialect))
    words = msgspec.json.encode(reply).decode()
    for word in ("I look.", "weather", "Oslo", "clock"):
        assert word in words
    assert ("Hm." in words) == (dialect != "openai"), "Chat Completions counts what was thought, and does not show it"


@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/v1/responses/input_tokens"])
async def test_tokens_are_counted_for_nothing(session: aiohttp.ClientSession, path: str) -> None:
    dialect = "anthropic" if "messages" in path else "openai_responses"
    asked = body(dialect)
    asked.pop("max_tokens", None)
    async with Simulator() as simulator:
        status, found = await post(session, simulator, path, asked)
        assert status == 200
        assert found["input_tokens"] > 10
        assert not any(arrival.admitted for arrival in simulator.journal)


async def test_a_prompt_that_begins_alike_is_read_from_the_cache(session: aiohttp.ClientSession) -> None:
    long = "word " * 2000
    asked: dict[str, Any] = body(
        "anthropic", system=[{"type": "text", "text": long, "cache_control": {"type": "ephemeral"}}]
    )
    async with Simulator() as simulator:
        _, first = await post(session, simulator, PATHS["anthropic"], asked)
        _, second = await post(session, simulator, PATHS["anthropic"], asked)
    written, read = first["usage"]["cache_creation_input_tokens"], second["usage"]["cache_read_input_tokens"]
    assert written == read > 1024
    assert first["usage"]["cache_read_input_tokens"] == second["usage"]["cache_creation_input_tokens"] == 0


@pytest.mark.parametrize(
    ("dialect", "more"),
    [
        ("anthropic", {"tool_choice": {"type": "perhaps"}}),
        ("anthropic", {"thinking": {"type": "hard"}}),
        ("anthropic", {"thinking": {"type": "enabled", "budget_tokens": 5000}}),
        ("anthropic", {"thinking": {"type": "enabled", "budget_tokens": 1024}, "tool_choice": {"type": "any"}}),
        ("anthropic", {"output_config": {"effort": "furious"}}),
        ("anthropic", {"tools": [{"name": "t"}]}),
        ("anthropic", {"tools": [], "tool_choice": {"type": "auto"}}),
        ("anthropic", {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}),
        ("anthropic", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("anthropic", {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}),
        ("openai", {"reasoning_effort": "furious"}),
        ("openai", {"tools": None, "tool_choice": "auto"}),
        ("openai", {"tools": [{"type": "function", "function": {}}]}),
        ("openai", {"response_format": {"type": "json_schema", "json_schema": {}}}),
        ("openai", {"messages": [{"role": "assistant", "content": None}]}),
        ("openai_responses", {"messages": []}),
        ("openai_responses", {"stop": ["x"]}),
        ("openai_responses", {"input": []}),
        ("openai_responses", {"input": [7]}),
        ("openai_responses", {"input": [{"type": "hologram"}]}),
        ("openai_responses", {"input": [{"role": "narrator", "content": "x"}]}),
        ("openai_responses", {"max_output_tokens": 0}),
        ("openai_responses", {"reasoning": {"effort": "furious"}}),
        ("openai_responses", {"tools": [{"type": "function"}]}),
        ("openai_responses", {"text": {"format": {"type": "json_schema"}}}),
        ("openai_responses", {"model": ""}),
    ],
)
async def test_what_the_vendors_refuse_is_refused(
    session: aiohttp.ClientSession, dialect: str, more: dict[str, Any]
) -> None:
    async with Simulator() as simulator:
        status, problem = await post(session, simulator, PATHS[dialect], body(dialect, **more))
    assert status == 400
    assert problem["error"]["type"] == "invalid_request_error"
