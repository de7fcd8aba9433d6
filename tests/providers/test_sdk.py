"""Each golden answer means to us what it means to the vendors' own SDKs."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from anthropic.types import Message as AnthropicMessage
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from llm.core.content import Thinking, ToolCall
from llm.core.types import LLMResponse, StopReason
from llm.providers import anthropic, openai
from tests.providers.corpus import ASKED, GOLDEN, Case, provider

EXEMPT = {
    # Wrong on purpose, or another server's: the SDKs' types have no place for it.
    "anthropic": {
        "nulls",
        "no content",
        "no usage",
        "usage that cannot be read",
        "usage of the output alone",
        "usage of the input alone",
        "unknown blocks",
        "stop reason compaction",
    },
    "openai": {
        "stop reason eos",
        "stop reason model_length",
        "stop reason mystery",
        "stop reason None",
        "further answers",
        "nulls",
        "no message",
        "usage that cannot be read",
        "parts",
        "thinking by its other name",
        "tool calls without ids, with arguments that are no text",
    },
    "openai_responses": {
        "nulls",
        "usage that cannot be read",
        "usage without its parts",
        "incomplete by mystery",
    },
}


def golden() -> list[Any]:
    found = []
    for name, exempt in EXEMPT.items():
        cases = json.loads((GOLDEN / name / "replies.json").read_text("utf-8"))
        assert exempt <= set(cases)
        for title, case in cases.items():
            if "error" not in case["expect"] and title not in exempt and "settings" not in case:
                found.append(pytest.param(name, case, id=f"{name}: {title}"))
    return found


def calls_of(response: LLMResponse) -> list[tuple[str, str, Any]]:
    return [(call.id, call.name, call.input) for call in response.tool_calls]


def ours(name: str, case: Case) -> LLMResponse:
    return provider(name, case).decode(ASKED[name], 200, {}, msgspec.json.encode(case["body"]))


def by_anthropic(body: Any, found: LLMResponse) -> None:
    theirs = AnthropicMessage.model_validate(body)
    assert found.text == "".join(block.text for block in theirs.content if block.type == "text")
    called = [(block.id, block.name, block.input) for block in theirs.content if block.type == "tool_use"]
    assert calls_of(found) == called
    sealed = [part.signature for part in found.content if isinstance(part, Thinking)]
    assert sealed == [
        block.signature if block.type == "thinking" else block.data
        for block in theirs.content
        if block.type in ("thinking", "redacted_thinking")
    ]
    assert found.thinking == "".join(block.thinking for block in theirs.content if block.type == "thinking")
    usage = theirs.usage
    read, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens
    if written is None:
        lifetimes = usage.cache_creation
        written = lifetimes.ephemeral_5m_input_tokens + lifetimes.ephemeral_1h_input_tokens if lifetimes else 0
    assert found.usage.input_tokens == (usage.input_tokens or 0) + read + written
    assert (found.usage.cache_read_tokens, found.usage.cache_write_tokens) == (read, written)
    assert found.usage.output_tokens == (usage.output_tokens or 0)
    assert found.model == theirs.model
    assert found.stop_reason == anthropic.STOP_REASON.get(theirs.stop_reason or "", StopReason.UNKNOWN)


def by_openai(body: Any, found: LLMResponse) -> None:
    theirs = ChatCompletion.model_validate(body)
    message = theirs.choices[0].message
    assert found.text == (message.content or "")
    called = [
        (call.id, call.function.name, json.loads(call.function.arguments))
        for call in message.tool_calls or ()
        if call.type == "function"
    ]
    assert calls_of(found) == called
    assert found.refusal == (message.refusal or None)
    usage = theirs.usage
    if usage is not None:
        before, after = usage.prompt_tokens_details, usage.completion_tokens_details
        assert (found.usage.input_tokens, found.usage.output_tokens) == (usage.prompt_tokens, usage.completion_tokens)
        assert found.usage.cache_read_tokens == ((before.cached_tokens if before else 0) or 0)
        assert found.usage.reasoning_tokens == ((after.reasoning_tokens if after else 0) or 0)
    assert (found.model, found.id) == (theirs.model, theirs.id)
    reason = openai.STOP_REASON[theirs.choices[0].finish_reason]
    if called and reason is StopReason.STOP:
        reason = StopReason.TOOL_CALLS
    assert found.stop_reason == (StopReason.CONTENT_FILTER if message.refusal else reason)


def by_responses(body: Any, found: LLMResponse) -> None:
    theirs = Response.model_validate(body)
    assert found.text == theirs.output_text
    called = [
        (item.call_id, item.name, json.loads(item.arguments)) for item in theirs.output if item.type == "function_call"
    ]
    assert calls_of(found) == called
    thought = [item for item in theirs.output if item.type == "reasoning"]
    sealed = [part.signature for part in found.content if isinstance(part, Thinking)]
    assert sealed == [item.encrypted_content or "" for item in thought]
    told = [part.text for item in thought for part in (*item.summary, *(item.content or ()))]
    assert found.thinking == "".join(told)
    refusals = [
        part.refusal
        for item in theirs.output
        if item.type == "message"
        for part in item.content
        if part.type == "refusal"
    ]
    assert (found.refusal or "") == "".join(refusals)
    usage = theirs.usage
    if usage is not None and usage.input_tokens_details is not None:
        details = usage.input_tokens_details
        assert (found.usage.input_tokens, found.usage.output_tokens) == (usage.input_tokens, usage.output_tokens)
        assert found.usage.cache_read_tokens == details.cached_tokens
        assert found.usage.cache_write_tokens == (details.cache_write_tokens or 0)
        assert found.usage.reasoning_tokens == usage.output_tokens_details.reasoning_tokens
    assert (found.model, found.id) == (theirs.model, theirs.id)


COMPARE = {"anthropic": by_anthropic, "openai": by_openai, "openai_responses": by_responses}


@pytest.mark.parametrize(("name", "case"), golden())
def test_a_golden_reply_is_read_as_the_vendors_sdk_reads_it(name: str, case: Case) -> None:
    COMPARE[name](case["body"], ours(name, case))


def test_the_golden_replies_have_all_that_is_compared() -> None:
    found = [ours(*param.values) for param in golden()]
    assert any(len(response.tool_calls) > 1 for response in found)
    assert any(call.input for response in found for call in response.tool_calls)
    assert any(isinstance(part, Thinking) and part.signature for response in found for part in response.content)
    assert any(response.refusal for response in found)
    assert any(response.usage.cache_write_tokens for response in found)
    assert any(isinstance(part, ToolCall) for response in found for part in response.content)
