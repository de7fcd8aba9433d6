"""What a caller hands over, read and checked: conversations and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from typing import Any, Final, cast

import msgspec

from .content import Document, Image, Opaque, Refusal, Text, Thinking, ToolCall, ToolResult
from .exceptions import LLMInvalidRequestError
from .toolmaking import tool_of
from .tools import Tool
from .types import CallOptions, Message, MessageRole, Options, Priority, Request

NO_OPTIONS: Final = Options()
OPTION_NAMES: Final = Options.__struct_fields__
NUMBERS: Final = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "timeout")
OWN: Final = ("priority", "tenant", "tag")
"""Options that have a default of their own; None says nothing, as everywhere."""

_ALLOWED: Final[dict[MessageRole, tuple[type, ...]]] = {
    MessageRole.SYSTEM: (Text,),
    MessageRole.USER: (Text, Image, Document, Opaque),
    MessageRole.ASSISTANT: (Text, ToolCall, Thinking, Refusal, Opaque),
    MessageRole.TOOL: (ToolResult,),
}
"""What each role's messages may hold."""


def read_messages(messages: Sequence[Message] | str) -> tuple[Message, ...]:
    """The conversation as a tuple of messages.

    Raises:
        LLMInvalidRequestError: it is empty, or something in it is not a message.
    """
    if type(messages) is str and messages.isascii():
        return (Message(MessageRole.USER, messages),)
    if isinstance(messages, str):
        messages = (Message(MessageRole.USER, messages),)
    if isinstance(messages, (Message, Mapping)):
        raise LLMInvalidRequestError("messages: expected a list of messages, got a single one: put it in a list")
    try:
        result = tuple(messages)
    except TypeError:
        raise LLMInvalidRequestError(
            f"messages: expected a string or a list of messages, got {type(messages).__name__}"
        ) from None
    if not result:
        raise LLMInvalidRequestError("messages: the list is empty, and a model answers at least one message")
    for index, message in enumerate(result):
        if type(message) is not Message:
            raise LLMInvalidRequestError(
                f"messages[{index}]: expected a Message, got {type(message).__name__}: "
                'write Message(MessageRole.USER, "…")'
            )
        if type(message.role) is not MessageRole:
            roles = ", ".join(f"MessageRole.{role.name}" for role in MessageRole)
            raise LLMInvalidRequestError(
                f"messages[{index}].role: expected one of {roles}, got {type(message.role).__name__}"
            )
        content = message.content
        if type(content) is not str:
            parts = _read_parts(content, message.role, f"messages[{index}].content")
            if parts is not content:
                result = (*result[:index], Message(message.role, parts, message.cache), *result[index + 1 :])
        elif message.role is MessageRole.TOOL:
            raise LLMInvalidRequestError(
                f"messages[{index}].content: expected the results of tools, got text: "
                "write Message(MessageRole.TOOL, [ToolResult(call.id, …)])"
            )
        elif not content.isascii():
            _check_text(content, f"messages[{index}].content")
    return result


def _read_parts(content: Any, role: MessageRole, place: str) -> tuple[Any, ...]:
    """*content* as a tuple of parts that *role* may send; a string among them is text."""
    if not isinstance(content, (list, tuple)):
        raise LLMInvalidRequestError(f"{place}: expected a str or a list of parts, got {type(content).__name__}")
    if not content:
        raise LLMInvalidRequestError(f"{place}: the list of parts is empty")
    allowed = _ALLOWED[role]
    parts: list[Any] = []
    for number, part in enumerate(content):
        if type(part) is str and Text in allowed:
            part = Text(part)
        if type(part) not in allowed:
            words = ", ".join(kind.__name__ for kind in allowed)
            raise LLMInvalidRequestError(f"{place}[{number}]: {role.name} sends {words}, got {type(part).__name__}")
        if type(part) is ToolResult:
            part = _read_result(part, f"{place}[{number}].content")
        elif type(part) is Text and not part.text.isascii():
            _check_text(part.text, f"{place}[{number}].text")
        parts.append(part)
    if type(content) is tuple and all(new is old for new, old in zip(parts, content, strict=True)):
        return content
    return tuple(parts)


def _read_result(result: ToolResult, place: str) -> ToolResult:
    content = result.content
    if type(content) is str:
        if not content.isascii():
            _check_text(content, place)
        return result
    parts = _read_parts(content, MessageRole.USER, place)
    return result if parts is content else msgspec.structs.replace(result, content=parts)


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LLMInvalidRequestError(
            f"{place}: the character at {error.start} is half of a surrogate pair, and cannot be written as JSON"
        ) from None


def read_options(defaults: CallOptions, options: CallOptions) -> Options:
    """The options of one call over the defaults of its client, checked.

    Raises:
        LLMInvalidRequestError: an unknown option, or a value of the wrong type or out of range.
    """
    if not options and not defaults:
        return NO_OPTIONS
    merged: dict[str, Any] = {**defaults, **options}
    for name in OWN:
        if name in merged and merged[name] is None:
            del merged[name]
    if merged.get("tools") is not None:
        merged["tools"] = read_tools(merged["tools"])
    try:
        result = msgspec.convert(merged, Options)
    except msgspec.ValidationError as error:
        raise _wrong_option(merged, str(error)) from None
    for name in NUMBERS:
        value = getattr(result, name)
        if value is not None and not isfinite(value):
            # JSON has no word for it: the vendor would get a null.
            raise LLMInvalidRequestError(f"{name}: expected a finite number, got {value!r}")
    if result.timeout is not None and not result.timeout > 0.0:
        raise LLMInvalidRequestError(f"timeout: expected a positive number of seconds, got {result.timeout!r}")
    if result.max_tokens is not None and result.max_tokens < 1:
        raise LLMInvalidRequestError(f"max_tokens: expected a positive number, got {result.max_tokens!r}")
    if result.n is not None and result.n < 1:
        raise LLMInvalidRequestError(f"n: expected a positive number, got {result.n!r}")
    if result.fallback and not isinstance(result.fallback, str):
        for number, target in enumerate(result.fallback):
            try:
                read_options({}, cast(CallOptions, target.options))
            except LLMInvalidRequestError as error:
                raise LLMInvalidRequestError(f"fallback[{number}].options: {error.message}") from None
    if result.tool_choice is not None:
        _check_choice(result.tool_choice, result.tools)
    if isinstance(result.reasoning, int) and result.reasoning < 1:
        raise LLMInvalidRequestError(
            f"reasoning: expected a word or a positive number of tokens, got {result.reasoning}"
        )
    return result


def with_options(request: Request, options: Mapping[str, Any]) -> Request:
    """*request* with *options* in place of its own, as of a target in a chain."""
    if not options:
        return request
    given = read_options({}, cast(CallOptions, options))
    changed = {name: getattr(given, name) for name in options}
    return msgspec.structs.replace(request, options=msgspec.structs.replace(request.options, **changed))


def read_tools(tools: Any) -> tuple[Tool, ...] | None:
    if isinstance(tools, (str, Mapping, Tool)) or not hasattr(tools, "__iter__"):
        raise LLMInvalidRequestError(f"tools: expected a list of tools, got {type(tools).__name__}: put it in a list")
    found: dict[str, Tool] = {}
    for index, each in enumerate(tools):
        try:
            tool = tool_of(each)
        except LLMInvalidRequestError as error:
            raise LLMInvalidRequestError(f"tools[{index}]: {error.message}") from None
        if tool.name in found:
            raise LLMInvalidRequestError(f"tools[{index}]: there are two of the name {tool.name!r}")
        found[tool.name] = tool
    return tuple(found.values()) or None


def _check_choice(choice: str, tools: tuple[Tool, ...] | None) -> None:
    names = [tool.name for tool in tools or ()]
    if not names:
        raise LLMInvalidRequestError(f"tool_choice={choice!r}: there are no tools to choose from; give tools=[…]")
    if choice not in ("auto", "required", "none", *names):
        raise LLMInvalidRequestError(
            f"tool_choice={choice!r}: expected 'auto', 'required', 'none' or one of the tools: {', '.join(names)}"
        )


def _wrong_option(options: Mapping[str, Any], complaint: str) -> LLMInvalidRequestError:
    for name in options:
        if name not in OPTION_NAMES:
            close = get_close_matches(name, OPTION_NAMES, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(OPTION_NAMES))}"
            return LLMInvalidRequestError(f"{name}: unknown option; {hint} (extra_body passes anything on)")
    if not isinstance(priority := options.get("priority", Priority.NORMAL), str) or priority not in set(Priority):
        words = ", ".join(repr(priority.value) for priority in Priority)
        return LLMInvalidRequestError(f"priority: expected a Priority or its word, one of {words}")
    # msgspec names the place as `$.temperature`; the value itself might be a prompt and is not shown.
    what, _, where = complaint.partition(" - at `$.")
    return LLMInvalidRequestError(f"{where.rstrip('`') or 'options'}: {what[:1].lower()}{what[1:]}")
