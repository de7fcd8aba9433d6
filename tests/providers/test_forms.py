"""Answers kept to a form by a tool that stands for it: read as the answer's text, whole and in a stream."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llm.core.content import Text, ToolCall
from llm.core.exceptions import LLMInvalidRequestError
from llm.core.settings import ModelRules, ProviderSettings
from llm.core.tools import Tool
from llm.core.types import Message, MessageRole, Options, OutputFormat, Request, StopReason, StreamChunk
from llm.providers.anthropic import AnthropicProvider
from llm.providers.openai import OpenAIProvider
from tests.providers.corpus import outcome

HI = (Message(MessageRole.USER, "Hi"),)
FORM = OutputFormat({"type": "object", "properties": {"n": {"type": "integer"}}}, strict=False)
KINDS: dict[str, Any] = {"anthropic": AnthropicProvider, "openai": OpenAIProvider}
BY_TOOL = {"*": ModelRules(formats="tool", forced_tools=True, chat_tools="always")}
JSON = {"content-type": "application/json"}
FIRST, SECOND = '{"n":', "7}"


def provider(dialect: str) -> Any:
    return KINDS[dialect](ProviderSettings(name=dialect, dialect=dialect, keys=(), capabilities=BY_TOOL))


def asked(**options: Any) -> Request:
    return Request(HI, "some-model", Options(output_format=FORM, **options))


def reply(dialect: str, name: str = "answer") -> bytes:
    """A whole answer that calls the tool *name*."""
    if dialect == "anthropic":
        block = {"type": "tool_use", "id": "t", "name": name, "input": {"n": 7}}
        return msgspec.json.encode({"type": "message", "content": [block], "stop_reason": "tool_use"})
    call = {"id": "t", "type": "function", "function": {"name": name, "arguments": FIRST + SECOND}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    return msgspec.json.encode({"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})


def stream(dialect: str, name: str = "answer") -> list[bytes]:
    """The same in pieces."""
    if dialect == "anthropic":
        block = {"type": "tool_use", "id": "t", "name": name, "input": {}}
        events: list[dict[str, Any]] = [{"type": "content_block_start", "index": 0, "content_block": block}]
        for piece in (FIRST, SECOND):
            delta = {"type": "input_json_delta", "partial_json": piece}
            events.append({"type": "content_block_delta", "index": 0, "delta": delta})
        events.append({"type": "content_block_stop", "index": 0})
        events.append({"type": "message_delta", "delta": {"stop_reason": "tool_use"}})
        events.append({"type": "message_stop"})
        return [b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events]
    functions = [{"name": name, "arguments": ""}, {"arguments": FIRST}, {"arguments": SECOND}]
    deltas: list[dict[str, Any]] = [{"tool_calls": [{"index": 0, "function": each}]} for each in functions]
    deltas[0]["tool_calls"][0]["id"] = "t"
    choices = [{"index": 0, "delta": delta} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls"})
    return [*(b"data: " + msgspec.json.encode({"choices": [c]}) + b"\n\n" for c in choices), b"data: [DONE]\n\n"]


@pytest.mark.parametrize("dialect", KINDS)
def test_the_tool_that_stands_for_the_form_is_read_as_the_answers_text(dialect: str) -> None:
    answer = provider(dialect).decode(asked(), 200, JSON, reply(dialect))
    assert msgspec.json.decode(answer.text) == {"n": 7}
    assert (answer.stop_reason, answer.content, answer.tool_calls) == (StopReason.STOP, (), ())


@pytest.mark.parametrize("dialect", KINDS)
def test_it_is_streamed_as_text_while_it_is_written(dialect: str) -> None:
    decoder = provider(dialect).stream_decoder(asked())
    chunks = [chunk for piece in stream(dialect) for chunk in decoder.feed(piece)]
    assert chunks == [StreamChunk(FIRST), StreamChunk(SECOND), StreamChunk(stop_reason=StopReason.STOP)]


@pytest.mark.parametrize("dialect", KINDS)
def test_a_call_of_another_tool_is_a_call_although_nobody_asked_for_it(dialect: str) -> None:
    answer = provider(dialect).decode(asked(), 200, JSON, reply(dialect, "other"))
    (call,) = answer.tool_calls
    assert (call.name, msgspec.json.decode(call.arguments)) == ("other", {"n": 7})
    assert (answer.text, answer.stop_reason) == ("", StopReason.TOOL_CALLS)
    streamed = outcome(provider(dialect).stream_decoder(asked()), stream(dialect, "other"))
    assert (streamed["text"], streamed["stop_reason"]) == ("", "tool_calls")
    assert len(streamed["parts"]) == 1


def test_what_is_said_before_the_form_is_kept_apart_from_it() -> None:
    blocks = [
        {"type": "text", "text": "Here: "},
        {"type": "tool_use", "id": "t", "name": "answer", "input": {"n": 7}},
        {"type": "tool_use", "id": "u", "name": "other", "input": {}},
    ]
    body = msgspec.json.encode({"type": "message", "content": blocks, "stop_reason": "tool_use"})
    answer = provider("anthropic").decode(asked(), 200, JSON, body)
    assert answer.text == 'Here: {"n":7}'
    assert answer.content == (Text("Here: "), Text('{"n":7}'), ToolCall("u", "other", "{}"))
    assert answer.stop_reason is StopReason.TOOL_CALLS, "the other call has to be answered"


@pytest.mark.parametrize("dialect", KINDS)
def test_tools_and_a_tool_for_the_form_cannot_be_had_at_once(dialect: str) -> None:
    with pytest.raises(LLMInvalidRequestError, match=r"^output_format='answer'.*some-model"):
        provider(dialect).encode(asked(tools=(Tool(name="f"),)), "k")


def test_an_empty_form_in_a_stream_says_nothing() -> None:
    first, *_ = stream("openai")
    decoder = provider("openai").stream_decoder(asked())
    assert decoder.feed(first) == []
