"""Our messages, tools and options in the words of Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from ..core.content import Document, Image, Opaque, Part, Refusal, Text, Thinking, ToolCall, ToolResult
from ..core.tools import Tool
from ..core.types import Message, MessageRole, Options, OutputFormat
from .catalog import Family, Refuse, effort_for, in_words

DIALECT: Final = "anthropic"
CACHE: Final = {"type": "ephemeral"}
LEAST_BUDGET: Final = 1024
"""Tokens of thinking that the vendor takes at the least."""
SHARE: Final = {"minimal": 0.0, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.9, "max": 0.95}
"""How much of ``max_tokens`` may be thought, for the models that count thinking and know no words for it."""

_SYSTEM: Final = MessageRole.SYSTEM
_TOOL_CHOICE: Final = {"auto": "auto", "required": "any", "none": "none"}
_NO_SCHEMA: Final[dict[str, Any]] = {"type": "object", "properties": {}}


def wire_messages(messages: Sequence[Message]) -> list[object]:
    """*messages* without the system's, as the vendor writes them; those that nothing is left of are left out."""
    found: list[object] = []
    for message in messages:
        if isinstance(message.content, str) and not message.cache:
            found.append(message)
            continue
        blocks = _blocks(message)
        if blocks:
            # Results come from the user; the vendor joins turns of one role.
            role = MessageRole.USER if message.role is MessageRole.TOOL else message.role
            found.append({"role": role, "content": blocks})
    return found


def wire_system(messages: Sequence[Message]) -> str | list[object]:
    """The system's messages joined by a blank line; as blocks if one of them ends what is to be cached."""
    if not any(message.cache or not isinstance(message.content, str) for message in messages):
        return "\n\n".join(message.text for message in messages)
    return [block for message in messages for block in _blocks(message)]


def wire_tools(tools: Sequence[Tool]) -> list[object]:
    return [_tool(tool.name, tool.parameters, tool.description, strict=tool.strict, cache=tool.cache) for tool in tools]


def ask_for_tools(body: dict[str, Any], options: Options, family: Family, *, refuse: Refuse) -> None:
    """Put tools and their choice into *body*."""
    if options.tools is None:
        return
    body["tools"] = wire_tools(options.tools)
    choice = options.tool_choice
    if choice in _TOOL_CHOICE:
        body["tool_choice"] = {"type": _TOOL_CHOICE[choice]}
    elif choice is not None:
        body["tool_choice"] = {"type": "tool", "name": choice}
    forced = choice is not None and choice not in ("auto", "none")
    if forced and not family.forced_tools:
        raise refuse("tool_choice", choice, "it cannot be made to call a tool; ask for it in the prompt")
    if options.parallel_tool_calls is not None and choice != "none":
        body.setdefault("tool_choice", {"type": "auto"})["disable_parallel_tool_use"] = not options.parallel_tool_calls


def ask_for_thinking(body: dict[str, Any], options: Options, family: Family, *, refuse: Refuse) -> bool:
    """Put how hard to think into *body*; whether the model is told to think."""
    wish = options.reasoning
    if wish is None:
        return False
    kinds = family.thinking
    if not kinds:
        raise refuse("reasoning", wish, "it does not think")
    if wish == "none":
        if "disabled" not in kinds:
            raise refuse("reasoning", wish, "it always thinks; 'low' is the least")
        body["thinking"] = {"type": "disabled"}
        return False
    if isinstance(wish, int):
        if "enabled" not in kinds:
            raise refuse("reasoning", wish, f"it counts no tokens of thinking; say one of {', '.join(family.efforts)}")
        _think(body, wish, options, refuse)
        return True
    if "adaptive" in kinds:
        body["thinking"] = {"type": "adaptive"}
        body.setdefault("output_config", {})["effort"] = effort_for(wish, family.efforts)
        return True
    if family.efforts:
        body.setdefault("output_config", {})["effort"] = effort_for(wish, family.efforts)
    _think(body, max(LEAST_BUDGET, int(SHARE[wish] * body["max_tokens"])), options, refuse)
    return True


def how_to_format(wanted: OutputFormat, family: Family) -> Literal["native", "tool", "prompt"]:
    """How an answer is kept to its form. The vendor's own way takes strict schemas alone."""
    if wanted.strict and family.formats == "native":
        return "native"
    return "tool" if family.forced_tools else "prompt"


def ask_for_format(body: dict[str, Any], wanted: OutputFormat, how: str, *, refuse: Refuse) -> None:
    """Put the answer's form into *body*: natively, as a tool that must be called, or in words."""
    if how == "native":
        body.setdefault("output_config", {})["format"] = {"type": "json_schema", "schema": wanted.schema}
    elif how == "tool" and "tools" not in body and body.get("thinking", {}).get("type") != "enabled":
        body["tools"] = [_tool(wanted.name, wanted.schema, "Give the answer by calling this tool.")]
        body["tool_choice"] = {"type": "tool", "name": wanted.name}
    elif how == "tool":
        raise refuse("output_format", wanted.name, "it cannot keep to a form and have tools, or think by a budget")
    else:
        said = body.get("system", "")
        words = in_words(wanted)
        body["system"] = (
            [*said, {"type": "text", "text": words}] if isinstance(said, list) else f"{said}\n\n{words}".strip()
        )


def _think(body: dict[str, Any], tokens: int, options: Options, refuse: Refuse) -> None:
    """Ask for thinking of so many *tokens*."""
    most = body["max_tokens"]
    if not LEAST_BUDGET <= tokens < most:
        bounds = f"thinking takes at least {LEAST_BUDGET:,} tokens and must be less than max_tokens ({most:,})"
        raise refuse("reasoning", options.reasoning, bounds)
    if body.get("tool_choice", {}).get("type") in ("any", "tool"):
        raise refuse("tool_choice", options.tool_choice, "it cannot think by a budget and be made to call a tool")
    body["thinking"] = {"type": "enabled", "budget_tokens": tokens}


def _tool(
    name: str, schema: dict[str, Any], description: str = "", *, strict: bool | None = None, cache: bool = False
) -> dict[str, Any]:
    tool: dict[str, Any] = {"name": name, "input_schema": schema or _NO_SCHEMA}
    if description:
        tool["description"] = description
    if strict is not None:
        tool["strict"] = strict
    if cache:
        tool["cache_control"] = CACHE
    return tool


def _blocks(message: Message) -> list[object]:
    content = message.content
    parts: Sequence[Part] = (Text(content),) if isinstance(content, str) else content
    blocks = [block for part in parts if (block := _block(part)) is not None]
    if message.cache and blocks:
        last = blocks[-1]
        # What is kept byte for byte takes no mark; nor does thinking.
        if isinstance(last, dict):
            last["cache_control"] = CACHE
    return blocks


def _block(part: Part) -> object | None:
    """*part* as a block, None if the vendor has no use for it."""
    block: dict[str, Any]
    match part:
        case Text(text=text) | Refusal(text=text):
            if not text:
                # The vendor refuses text that is empty.
                return None
            block = {"type": "text", "text": text}
        case Image():
            block = {"type": "image", "source": _source(part.url, part.data, part.media_type)}
        case Document():
            block = {"type": "document", "source": _source(part.url, part.data, part.media_type, part.text)}
            if part.name:
                block["title"] = part.name
        case ToolCall():
            block = {"type": "tool_use", "id": part.id, "name": part.name, "input": _input(part)}
        case ToolResult():
            block = {"type": "tool_result", "tool_use_id": part.id}
            if isinstance(part.content, str):
                block["content"] = part.content
            else:
                block["content"] = [inner for each in part.content if (inner := _block(each)) is not None]
            if part.error:
                block["is_error"] = True
        case Thinking() | Opaque():
            return msgspec.Raw(part.raw) if part.dialect == DIALECT else None
    if getattr(part, "cache", False):
        block["cache_control"] = CACHE
    return block


def _source(url: str, data: str, media_type: str, text: str = "") -> dict[str, str]:
    if url:
        return {"type": "url", "url": url}
    if text:
        return {"type": "text", "media_type": "text/plain", "data": text}
    return {"type": "base64", "media_type": media_type, "data": data}


def _input(call: ToolCall) -> dict[str, Any]:
    """The vendor takes nothing but an object; what a model wrote that is none is told as it was."""
    try:
        value = call.input
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"invalid": call.arguments}
