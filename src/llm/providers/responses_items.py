"""Our messages, tools and options as the items of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ..core.content import Document, Image, Opaque, Part, Refusal, Text, Thinking, ToolCall, ToolResult
from ..core.tools import Tool
from ..core.types import Message, MessageRole, Options, OutputFormat
from .openai_messages import CACHE, NO_PARAMETERS

DIALECT: Final = "openai_responses"

_SYSTEM: Final = MessageRole.SYSTEM
_WORDS: Final = frozenset(("auto", "required", "none"))


def wire_input(messages: Sequence[Message], system_role: str, *, marks: bool) -> list[object]:
    """*messages* as input items. *marks* says whether the vendor takes marks of what is to be cached."""
    found: list[object] = []
    for message in messages:
        role: str = system_role if message.role is _SYSTEM else message.role
        content = message.content
        if isinstance(content, str) and not (message.cache and marks):
            found.append({"role": role, "content": content})
        elif message.role is MessageRole.ASSISTANT and not isinstance(content, str):
            found += _answer(content)
        elif message.role is MessageRole.TOOL and not isinstance(content, str):
            found += [_result(part, marks) for part in content if isinstance(part, ToolResult)]
        elif message.role is MessageRole.ASSISTANT:
            found.append({"role": role, "content": message.text})
        else:
            parts = (Text(content),) if isinstance(content, str) else content
            wired = [wired for part in parts if (wired := _part(part, marks)) is not None]
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
        body["tool_choice"] = choice if choice in _WORDS else {"type": "function", "name": choice}
    if options.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = options.parallel_tool_calls


def ask_for_format(body: dict[str, Any], wanted: OutputFormat) -> None:
    """Put the answer's form into *body*."""
    form = {"type": "json_schema", "name": wanted.name, "schema": wanted.schema, "strict": wanted.strict}
    body["text"] = {"format": form}


def needs_items(parts: Sequence[Part]) -> bool:
    """Whether *parts* hold what only this API takes: its own items, documents by address, results with pictures."""
    for part in parts:
        match part:
            case Thinking() | Opaque():
                if part.dialect == DIALECT:
                    return True
            case Document():
                if part.url:
                    return True
            case ToolResult(content=content):
                if not isinstance(content, str) and any(isinstance(each, Image) or not each.text for each in content):
                    return True
    return False


def _tool(tool: Tool) -> dict[str, Any]:
    # Unlike Chat Completions this API is strict unless told otherwise, and then refuses schemas that are not.
    wired: dict[str, Any] = {
        "type": "function",
        "name": tool.name,
        "parameters": tool.parameters or NO_PARAMETERS,
        "strict": bool(tool.strict),
    }
    if tool.description:
        wired["description"] = tool.description
    return wired


def _answer(content: Sequence[Part]) -> list[object]:
    """An assistant's turn: its words, its calls and its reasoning are items of their own, in their order."""
    found: list[object] = []
    for part in content:
        match part:
            case Text(text=text) | Refusal(text=text) if text:
                found.append({"role": "assistant", "content": text})
            case ToolCall():
                call = {"type": "function_call", "call_id": part.id, "name": part.name, "arguments": part.arguments}
                found.append(call)
            case Thinking() | Opaque() if part.dialect == DIALECT:
                found.append(msgspec.Raw(part.raw))
    return found


def _result(result: ToolResult, marks: bool) -> dict[str, Any]:
    """A tool's result. That it is an error only its words can say."""
    output: Any = result.content
    if not isinstance(output, str):
        output = [wired for part in output if (wired := _part(part, marks)) is not None]
    return {"type": "function_call_output", "call_id": result.id, "output": output}


def _part(part: Part, marks: bool) -> dict[str, Any] | None:
    """*part* of what is told to the model, None if the vendor has no use for it."""
    wired: dict[str, Any]
    match part:
        case Text():
            wired = {"type": "input_text", "text": part.text}
        case Image():
            wired = {"type": "input_image", "image_url": part.url or f"data:{part.media_type};base64,{part.data}"}
            wired["detail"] = part.detail or "auto"
        case Document(text=text) if text:
            wired = {"type": "input_text", "text": text}
        case Document(url=url) if url:
            wired = {"type": "input_file", "file_url": url}
        case Document():
            data = f"data:{part.media_type};base64,{part.data}"
            wired = {"type": "input_file", "filename": part.name or "document.pdf", "file_data": data}
        case Opaque() if part.dialect == DIALECT:
            wired = msgspec.json.decode(part.raw)
        case _:
            return None
    if marks and getattr(part, "cache", False):
        wired["prompt_cache_breakpoint"] = CACHE
    return wired
