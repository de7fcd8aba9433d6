"""Our messages, tools and options in the words of Chat Completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ..core.content import Document, Image, Opaque, Part, Refusal, Text, Thinking, ToolCall, ToolResult
from ..core.tools import Tool
from ..core.types import Message, MessageRole, Options, OutputFormat
from .catalog import Refuse, in_words

DIALECT: Final = "openai"
CACHE: Final = {"mode": "explicit"}
NO_PARAMETERS: Final[dict[str, Any]] = {"type": "object", "properties": {}}

_SYSTEM: Final = MessageRole.SYSTEM
_WORDS: Final = frozenset(("auto", "required", "none"))


def wire_messages(
    messages: Sequence[Message], system_role: str, *, marks: bool, custom: bool, refuse: Refuse
) -> list[object]:
    """*messages* as the vendor writes them. *marks* says whether it takes marks of what is to be cached."""
    found: list[object] = []
    for message in messages:
        role: str = system_role if message.role is _SYSTEM else message.role
        content = message.content
        if message.role is MessageRole.TOOL and not isinstance(content, str):
            found += [_result(part, refuse) for part in content if isinstance(part, ToolResult)]
        elif message.role is MessageRole.ASSISTANT and not isinstance(content, str):
            found.append(_answer(content, custom=custom))
        elif isinstance(content, str) and not (message.cache and marks):
            found.append(message if role == message.role and not message.cache else {"role": role, "content": content})
        else:
            parts = (Text(content),) if isinstance(content, str) else content
            wired = [wired for part in parts if (wired := _part(part, marks, refuse)) is not None]
            if message.cache and marks and wired:
                wired[-1]["prompt_cache_breakpoint"] = CACHE
            found.append({"role": role, "content": wired})
    return found


def ask_for_tools(body: dict[str, Any], options: Options) -> None:
    """Put tools and their choice into *body*."""
    if options.tools is None:
        return
    body["tools"] = [_tool(tool) for tool in options.tools]
    choice = options.tool_choice
    if choice is not None:
        body["tool_choice"] = choice if choice in _WORDS else {"type": "function", "function": {"name": choice}}
    if options.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = options.parallel_tool_calls


def ask_for_format(body: dict[str, Any], wanted: OutputFormat, how: str, *, refuse: Refuse) -> None:
    """Put the answer's form into *body*: natively, as a tool that must be called, or in words."""
    if how == "native":
        form = {"name": wanted.name, "schema": wanted.schema, "strict": wanted.strict}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    elif how == "tool":
        if "tools" in body:
            raise refuse("output_format", wanted.name, "it cannot be given tools and a format at once")
        function = {"name": wanted.name, "parameters": wanted.schema, "description": "Give the answer by calling this."}
        body["tools"] = [{"type": "function", "function": function}]
        body["tool_choice"] = {"type": "function", "function": {"name": wanted.name}}
    else:
        body["messages"] = [{"role": "system", "content": in_words(wanted)}, *body["messages"]]


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters or NO_PARAMETERS}
    if tool.description:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _answer(content: Sequence[Part], *, custom: bool) -> dict[str, Any]:
    """An assistant's turn: its words in one, its calls beside them."""
    words: list[Any] = []
    calls = []
    found: dict[str, Any] = {"role": "assistant"}
    for part in content:
        match part:
            case Text(text=text) if text:
                words.append({"type": "text", "text": text})
            case Refusal():
                words.append({"type": "refusal", "refusal": part.text})
            case ToolCall():
                calls.append(_call(part))
    if len(words) == 1 and words[0]["type"] == "text":
        found["content"] = words[0]["text"]
    elif words:
        found["content"] = words
    elif not calls:
        found["content"] = ""
    if calls:
        found["tool_calls"] = calls
        if custom:
            # DeepSeek wants its thinking back, with its calls alone; the vendor itself has no word for it.
            for part in content:
                if isinstance(part, Thinking) and part.dialect == DIALECT and part.raw:
                    found |= msgspec.json.decode(part.raw)
    return found


def _call(call: ToolCall) -> dict[str, Any]:
    wired: dict[str, Any] = {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
    if call.extra:
        wired |= msgspec.json.decode(call.extra)
    return wired


def _result(result: ToolResult, refuse: Refuse) -> dict[str, Any]:
    """A tool's result. That it is an error only its words can say."""
    content: Any = result.content
    if not isinstance(content, str):
        for part in content:
            if not isinstance(part, Text) and not (isinstance(part, Document) and part.text):
                raise refuse(
                    "messages",
                    type(part).__name__,
                    "a tool's result is text in Chat Completions; send it as the user's",
                )
        content = [{"type": "text", "text": part.text} for part in content if isinstance(part, (Text, Document))]
    return {"role": "tool", "tool_call_id": result.id, "content": content}


def _part(part: Part, marks: bool, refuse: Refuse) -> dict[str, Any] | None:
    """*part* of a system's or user's message, None if the vendor has no use for it."""
    wired: dict[str, Any]
    match part:
        case Text():
            wired = {"type": "text", "text": part.text}
        case Image():
            image: dict[str, Any] = {"url": part.url or f"data:{part.media_type};base64,{part.data}"}
            if part.detail is not None:
                image["detail"] = part.detail
            wired = {"type": "image_url", "image_url": image}
        case Document(text=text) if text:
            wired = {"type": "text", "text": text}
        case Document():
            if part.url:
                raise refuse("messages", "Document", "Chat Completions fetches no documents; send it with from_bytes")
            data = f"data:{part.media_type};base64,{part.data}"
            wired = {"type": "file", "file": {"filename": part.name or "document.pdf", "file_data": data}}
        case Opaque() if part.dialect == DIALECT:
            wired = msgspec.json.decode(part.raw)
        case _:
            return None
    if marks and getattr(part, "cache", False):
        wired["prompt_cache_breakpoint"] = CACHE
    return wired
