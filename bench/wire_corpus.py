"""What ``bench/wire.py`` sends: every feature in neutral terms, and a model of every family.

Nothing in here knows a vendor's words: the dialects make requests of it. What was thought has the seal of our own
simulator, so that a test can send all of it there as well.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from llm.core.content import Document, Image, Opaque, Part, Refusal, Text, Thinking, ToolCall, ToolResult
from llm.core.tools import Tool
from llm.core.types import Message, MessageRole, Options, OutputFormat, Request
from llm.providers.catalog import Family, catalog
from llm.testing.saying import seal

SYSTEM, USER, ASSISTANT, TOOL = MessageRole.SYSTEM, MessageRole.USER, MessageRole.ASSISTANT, MessageRole.TOOL
PNG: Final = b"\x89PNG\r\n\x1a\n" + bytes(16)
PDF: Final = b"%PDF-1.7\n%%EOF"
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where"},
        "days": {"type": "array", "items": {"$ref": "#/$defs/Day"}},
        "unit": {"anyOf": [{"type": "string", "enum": ["C", "F"]}, {"type": "null"}]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
    "$defs": {
        "Day": {
            "type": "object",
            "properties": {"date": {"type": "string"}},
            "required": ["date"],
            "additionalProperties": False,
        }
    },
}
WEATHER: Final = Tool(name="weather", description="The weather in a city.", parameters=SCHEMA)
NOW: Final = Tool(name="now")
FORM: Final = OutputFormat(SCHEMA, "forecast")
HI: Final = (Message(USER, "Hi"),)

THOUGHT: Final[dict[str, dict[str, Any]]] = {
    "anthropic": {"type": "thinking", "thinking": "Hm.", "signature": seal("Hm.")},
    "openai": {"reasoning_content": "Hm."},
    "openai_responses": {
        "id": "rs_1",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "Hm."}],
        "encrypted_content": b64encode(f"{seal('Hm.')}Hm.".encode()).decode(),
    },
}
OWN_TOOL: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "anthropic": ({"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}},),
    "openai_responses": (
        {
            "id": "ws_1",
            "type": "web_search_call",
            "status": "completed",
            "action": {"type": "search", "query": "x", "queries": ["x"]},
        },
    ),
}

NEVER: Final = {
    "anthropic": {"several answers"},
    "openai": {"reasoning in tokens"},
    "openai_responses": {"one stop sequence", "stop sequences", "several answers", "reasoning in tokens"},
}
"""Features that a dialect has no word for, so that it refuses them whatever the model."""


class Feature(NamedTuple):
    """A request without its model."""

    messages: tuple[Message, ...] = HI
    options: Options = Options()
    stream: bool = False


def features(dialect: str) -> dict[str, Feature]:
    """By name; what a conversation has of the dialect's own making is in its words."""
    thought: Part = Thinking("Hm.", msgspec.json.encode(THOUGHT[dialect]), dialect)
    calls: tuple[Part, ...] = (
        ToolCall("call_1", "weather", '{"city":"Oslo","days":[],"unit":null}'),
        ToolCall("call_2", "now"),
    )
    results = (ToolResult("call_1", "rain"), ToolResult("call_2", (Text("no clock"),), error=True))
    own = tuple(Opaque(str(block["type"]), msgspec.json.encode(block), dialect) for block in OWN_TOOL.get(dialect, ()))
    asked = Message(USER, "Weather in Oslo?")
    tools = (WEATHER, NOW)
    found = {
        "text": Feature(),
        "text, streamed": Feature(stream=True),
        "a conversation": Feature((*HI, Message(ASSISTANT, "Hello"), Message(USER, "Go on"))),
        "a system message": Feature((Message(SYSTEM, "Be short."), *HI)),
        "system messages in the midst": Feature(
            (Message(SYSTEM, "Be short."), *HI, Message(SYSTEM, "In French."), Message(USER, "Again"))
        ),
        "max_tokens": Feature(options=Options(max_tokens=100)),
        "a long answer": Feature(options=Options(max_tokens=32_000)),
        "sampling": Feature(options=Options(temperature=0.5, top_p=0.9, top_k=5, seed=1)),
        "penalties": Feature(options=Options(frequency_penalty=0.5, presence_penalty=0.5)),
        "one stop sequence": Feature(options=Options(stop="END")),
        "stop sequences": Feature(options=Options(stop=("END", "FIN"))),
        "several answers": Feature(options=Options(n=2)),
        "a picture by its address": Feature(
            (Message(USER, (Text("What is this?"), Image.from_url("https://example.org/a.png", detail="low"))),)
        ),
        "a picture": Feature((Message(USER, (Text("What is this?"), Image.from_bytes(PNG))),)),
        "a PDF": Feature((Message(USER, (Document.from_bytes(PDF, name="a.pdf"), Text("Sum it up."))),)),
        "a PDF by its address": Feature(
            (Message(USER, (Document.from_url("https://example.org/a.pdf"), Text("Sum it up."))),)
        ),
        "a text as a document": Feature((Message(USER, (Document.from_text("Lorem", name="b.txt"), Text("Well?"))),)),
        "tools": Feature(options=Options(tools=tools)),
        "tools, streamed": Feature(options=Options(tools=tools), stream=True),
        "a strict tool": Feature(options=Options(tools=(msgspec.structs.replace(WEATHER, strict=True),))),
        "tools, if it likes": Feature(options=Options(tools=tools, tool_choice="auto")),
        "some tool": Feature(options=Options(tools=tools, tool_choice="required")),
        "this tool": Feature(options=Options(tools=tools, tool_choice="weather")),
        "no tool": Feature(options=Options(tools=tools, tool_choice="none")),
        "one tool at a time": Feature(options=Options(tools=tools, parallel_tool_calls=False)),
        "calls and results": Feature(
            (asked, Message(ASSISTANT, (Text("I look."), *calls)), Message(TOOL, results)), Options(tools=tools)
        ),
        "calls, results and thinking": Feature(
            (asked, Message(ASSISTANT, (thought, Text("I look."), *calls)), Message(TOOL, results)),
            Options(tools=tools),
        ),
        "a picture in a result": Feature(
            (
                asked,
                Message(ASSISTANT, calls[:1]),
                Message(TOOL, (ToolResult("call_1", (Text("See."), Image.from_bytes(PNG))),)),
            ),
            Options(tools=tools),
        ),
        "a document in a result": Feature(
            (
                asked,
                Message(ASSISTANT, calls[:1]),
                Message(TOOL, (ToolResult("call_1", (Text("See."), Document.from_bytes(PDF, name="a.pdf"))),)),
            ),
            Options(tools=tools),
        ),
        "thinking goes back": Feature((*HI, Message(ASSISTANT, (thought, Text("Hello"))), Message(USER, "Go on"))),
        "a refusal goes back": Feature((*HI, Message(ASSISTANT, (Refusal("I will not."),)), Message(USER, "Why?"))),
        "a form": Feature(options=Options(output_format=FORM)),
        "a form, streamed": Feature(options=Options(output_format=FORM), stream=True),
        "a form beside tools": Feature(options=Options(output_format=FORM, tools=tools)),
        "everything is cached": Feature(options=Options(cache="auto")),
        "marks of what is cached": Feature(
            (
                Message(SYSTEM, "Be short.", cache=True),
                Message(USER, (Document.from_text("Lorem", cache=True), Text("Well?"))),
                Message(ASSISTANT, "It is Latin."),
                Message(USER, "And?", cache=True),
            ),
            Options(tools=(NOW, msgspec.structs.replace(WEATHER, cache=True))),
        ),
        "marks within turns": Feature(
            (
                Message(USER, (Text("Lorem", cache=True), Image.from_bytes(PNG, cache=True), Text("Weather there?"))),
                Message(ASSISTANT, calls[:1]),
                Message(TOOL, (ToolResult("call_1", "rain", cache=True),)),
            ),
            Options(tools=tools),
        ),
    }
    for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max"):
        found[f"{effort} reasoning"] = Feature(options=Options(reasoning=effort))
    found["reasoning in tokens"] = Feature(options=Options(reasoning=2048))
    found["reasoning with tools"] = Feature(options=Options(reasoning="low", tools=tools))
    if own:
        found["the vendor's own tools go back"] = Feature(
            (*HI, Message(ASSISTANT, (*own, Text("Found."))), Message(USER, "Go on"))
        )
    return found


def families(dialect: str) -> dict[str, str]:
    """A model of each family by the family's first pattern."""
    vendor = catalog().anthropic if dialect == "anthropic" else catalog().openai
    return {family.models[0]: _model(family, vendor.default) for family in vendor.families}


def _model(family: Family, default: str) -> str:
    pattern = family.models[0]
    return default if pattern == "*" else pattern.replace("*-", "-").removesuffix("*")


def requests(dialect: str) -> Iterator[tuple[str, str, Request]]:
    """Feature, family and request: every feature with every family."""
    for family, model in families(dialect).items():
        for name, feature in features(dialect).items():
            yield name, family, Request(feature.messages, model, feature.options, feature.stream)
