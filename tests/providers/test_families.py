"""What each family of models takes, model by model, as the vendors' pages and the threads about them say (2026-11)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llm.core.exceptions import LLMInvalidRequestError
from llm.core.settings import ModelRules, ProviderSettings
from llm.core.tools import Tool
from llm.core.types import Message, MessageRole, Options, OutputFormat, Request
from llm.providers.anthropic import AnthropicProvider
from llm.providers.base import Provider
from llm.providers.openai import OpenAIProvider
from llm.providers.openai_responses import OpenAIResponses

HI = (Message(MessageRole.USER, "Hi"),)
PREFILL = (*HI, Message(MessageRole.ASSISTANT, "Well,"))
TOOLS = (Tool(name="f"),)


def sent(vendor: str, model: str, messages: tuple[Message, ...] = HI, *, rules: Any = None, **options: Any) -> Any:
    """The path and the body of a request; the name of the option for what is refused."""
    made: Any = {"anthropic": AnthropicProvider, "openai": OpenAIProvider, "responses": OpenAIResponses}[vendor]
    capabilities = {"*": ModelRules(**rules)} if rules else {}
    provider: Provider = made(ProviderSettings(name=vendor, dialect=vendor, keys=(), capabilities=capabilities))
    try:
        request = provider.encode(Request(messages, model, Options(**options)), "k").request
    except LLMInvalidRequestError as error:
        return str(error).partition("=")[0].partition("[")[0] if model in str(error) else "a model without its name"
    return request.url.rpartition("/")[2], msgspec.json.decode(request.body)


# ------------------------------------------------------------------------------------------------------- Anthropic

CLAUDE: dict[str, tuple[bool, bool, str, tuple[str, ...]]] = {
    # sampling, prefill; thinking by word; words for effort that go out as they are
    "claude-haiku-4-5": (True, True, "enabled", ()),
    "claude-sonnet-4-5-20250929": (True, True, "enabled", ()),
    "claude-opus-4-5": (True, True, "enabled", ("low", "medium", "high")),
    "claude-opus-4-6": (True, False, "adaptive", ("low", "medium", "high", "max")),
    "claude-sonnet-4-6": (True, False, "adaptive", ("low", "medium", "high", "max")),
    "claude-opus-4-7": (False, False, "adaptive", ("low", "medium", "high", "xhigh", "max")),
    "claude-opus-4-8": (False, False, "adaptive", ("low", "medium", "high", "xhigh", "max")),
    "claude-sonnet-5": (False, False, "adaptive", ("low", "medium", "high", "xhigh", "max")),
    "claude-opus-5": (False, False, "adaptive", ("low", "medium", "high", "xhigh", "max")),
    "claude-fable-5-1": (False, False, "adaptive", ("low", "medium", "high", "xhigh", "max")),
    "claude-mythos-5-2": (False, False, "adaptive", ("low", "medium", "high", "xhigh", "max")),
    "claude-haiku-5-5": (False, False, "adaptive", ("low", "medium", "high", "xhigh", "max")),
    "claude-opus-5-5": (False, False, "adaptive", ("low", "medium", "high", "xhigh", "max")),
    "claude-of-next-year": (False, False, "adaptive", ("low", "medium", "high", "xhigh", "max")),
}


@pytest.mark.parametrize("model", CLAUDE)
def test_what_a_claude_takes(model: str) -> None:
    sampling, prefill, thinking, efforts = CLAUDE[model]
    assert ("temperature" in sent("anthropic", model, temperature=0.5)[1]) == sampling
    assert isinstance(sent("anthropic", model, PREFILL), tuple) == prefill
    for word in ("low", "medium", "high", "xhigh", "max"):
        _, body = sent("anthropic", model, reasoning=word)
        assert body["thinking"]["type"] == thinking
        said = body.get("output_config", {}).get("effort")
        assert said == word if word in efforts else said in (None, *efforts)
        assert "temperature" not in sent("anthropic", model, reasoning=word, temperature=0.5)[1]
    budget = sent("anthropic", model, reasoning=2048)
    # Deprecated on 4.6, and refused from 4.7 on.
    assert isinstance(budget, tuple) == (sampling)
    if isinstance(budget, tuple):
        assert budget[1]["thinking"] == {"type": "enabled", "budget_tokens": 2048}


@pytest.mark.parametrize("model", ["claude-fable-5-1", "claude-fable-5-2", "claude-opus-5-5"])
def test_who_always_thinks_cannot_be_told_not_to(model: str) -> None:
    assert sent("anthropic", model, reasoning="none") == "reasoning"


@pytest.mark.parametrize("model", ["claude-opus-5", "claude-sonnet-5-5", "claude-haiku-4-5"])
def test_who_need_not_think_can(model: str) -> None:
    assert sent("anthropic", model, reasoning="none")[1]["thinking"] == {"type": "disabled"}


@pytest.mark.parametrize(("model", "forced"), [("claude-fable-5", False), ("claude-sonnet-5-5", True)])
def test_who_can_be_made_to_call_a_tool(model: str, forced: bool) -> None:
    for choice in ("required", "f"):
        assert isinstance(sent("anthropic", model, tools=TOOLS, tool_choice=choice), tuple) == forced
    assert isinstance(sent("anthropic", model, tools=TOOLS, tool_choice="auto"), tuple)


def test_thinking_by_a_budget_and_a_forced_tool_exclude_each_other() -> None:
    assert sent("anthropic", "claude-haiku-4-5", tools=TOOLS, tool_choice="required", reasoning="low") == "tool_choice"
    assert isinstance(sent("anthropic", "claude-sonnet-5-5", tools=TOOLS, tool_choice="f", reasoning="low"), tuple)


# ---------------------------------------------------------------------------------------------------------- OpenAI

GPT: dict[str, tuple[str, bool, bool, str, tuple[str, ...]]] = {
    # token field; sampling, stop; where tools go unasked; words for effort
    "gpt-4o": ("max_tokens", True, True, "completions", ()),
    "gpt-4.1-mini": ("max_tokens", True, True, "completions", ()),
    "o3": ("max_completion_tokens", False, False, "completions", ("low", "medium", "high")),
    "o4-mini": ("max_completion_tokens", False, False, "completions", ("low", "medium", "high")),
    "gpt-5": ("max_completion_tokens", False, True, "completions", ("minimal", "low", "medium", "high")),
    "gpt-5.2-pro": ("max_completion_tokens", False, True, "completions", ("medium", "high", "xhigh")),
    "gpt-5.1-chat-latest": ("max_completion_tokens", False, True, "completions", ()),
    "gpt-5.1": ("max_completion_tokens", True, True, "completions", ("none", "low", "medium", "high", "xhigh")),
    "gpt-5.2": ("max_completion_tokens", True, True, "completions", ("none", "low", "medium", "high", "xhigh")),
    "gpt-5.4": ("max_completion_tokens", True, True, "completions", ("none", "low", "medium", "high", "xhigh")),
    "gpt-5.5": (
        "max_completion_tokens",
        False,
        False,
        "responses",
        ("none", "minimal", "low", "medium", "high", "xhigh"),
    ),
    "gpt-5.6-sol": ("max_completion_tokens", False, False, "responses", ("none", "low", "medium", "high", "xhigh")),
    "gpt-6-astra": ("max_completion_tokens", False, False, "responses", ("low", "medium", "high", "xhigh")),
    "gpt-6.2-sol": ("max_completion_tokens", False, False, "responses", ("low", "medium", "high", "xhigh")),
    "gpt-of-next-year": ("max_completion_tokens", False, False, "responses", ("low", "medium", "high", "xhigh")),
}


@pytest.mark.parametrize("model", GPT)
def test_what_a_gpt_takes(model: str) -> None:
    token_field, sampling, stop, tools, efforts = GPT[model]
    assert sent("openai", model, max_tokens=10)[1][token_field] == 10
    assert ("temperature" in sent("openai", model, temperature=0.5)[1]) == sampling
    assert isinstance(sent("openai", model, stop="x"), tuple) == stop
    assert sent("openai", model, tools=TOOLS)[0] == tools
    for word in ("none", "minimal", "low", "medium", "high", "xhigh", "max"):
        found = sent("openai", model, reasoning=word)
        if not efforts or (word == "none" and word not in efforts):
            assert found == "reasoning"
        else:
            said = found[1]["reasoning_effort"]
            assert said == word if word in efforts else said in efforts
    assert sent("openai", model, reasoning=2048) == "reasoning"


@pytest.mark.parametrize("model", ["gpt-5.1", "gpt-5.4", "gpt-5.5", "gpt-5.6-sol"])
def test_without_thinking_sampling_and_tools_are_free(model: str) -> None:
    path, body = sent("openai", model, reasoning="none", temperature=0.5, stop="x", tools=TOOLS)
    assert (path, body["temperature"], body["stop"]) == ("completions", 0.5, "x")
    path, body = sent("openai", model, reasoning="low", temperature=0.5)
    assert "temperature" not in body


@pytest.mark.parametrize("model", ["gpt-5.4", "gpt-5.5", "gpt-5.6-sol"])
def test_thinking_and_tools_go_to_the_other_api(model: str) -> None:
    assert sent("openai", model, reasoning="low", tools=TOOLS)[0] == "responses"


@pytest.mark.parametrize("model", ["gpt-6-astra", "gpt-6.1-sol"])
def test_only_the_other_api_knows_the_hardest_thinking(model: str) -> None:
    assert sent("openai", model, reasoning="max")[1]["reasoning_effort"] == "xhigh"
    assert sent("responses", model, reasoning="max")[1]["reasoning"] == {"effort": "max"}


# --------------------------------------------------------------------------------------- the configuration's word

FORM = OutputFormat({"type": "object", "properties": {}, "required": [], "additionalProperties": False})
LOOSE = OutputFormat({"type": "object"}, strict=False)


def test_the_configuration_overrules_the_table() -> None:
    rules = {"efforts": ("low", "high"), "chat_tools": "always", "token_field": "max_tokens", "refuses": frozenset()}
    path, body = sent("openai", "gpt-6-astra", rules=rules, reasoning="max", tools=TOOLS, max_tokens=5, temperature=0.5)
    assert (path, body["reasoning_effort"], body["max_tokens"], body["temperature"]) == ("completions", "high", 5, 0.5)
    _, body = sent("anthropic", "claude-sonnet-5-5", PREFILL, rules={"prefill": True, "max_output": 100})
    assert body["max_tokens"] == 100


@pytest.mark.parametrize(("formats", "key"), [("native", "response_format"), ("tool", "tools"), ("prompt", "messages")])
def test_a_form_is_kept_to_natively_by_a_tool_or_in_words(formats: str, key: str) -> None:
    _, body = sent("openai", "gpt-5", rules={"formats": formats}, output_format=FORM)
    assert b"additionalProperties" in msgspec.json.encode(body[key]) or "schema" in str(body[key])
    assert ("response_format" in body, "tools" in body) == (formats == "native", formats == "tool")


def test_a_form_that_cannot_be_strict_is_a_tool_or_words_to_anthropic() -> None:
    _, by_tool = sent("anthropic", "claude-sonnet-5-5", output_format=LOOSE)
    assert by_tool["tool_choice"] == {"type": "tool", "name": "answer"}
    _, in_words = sent("anthropic", "claude-fable-5-2", output_format=LOOSE)
    assert "JSON schema" in in_words["system"]
    _, cached = sent(
        "anthropic",
        "claude-fable-5-2",
        (Message(MessageRole.SYSTEM, "Be short.", cache=True), *HI),
        output_format=LOOSE,
    )
    assert "JSON schema" in cached["system"][-1]["text"]
