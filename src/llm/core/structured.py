"""Answers as values: a schema is asked for, the answer is read and checked, and what does not fit is sent back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

import msgspec

from ..utils.partial_json import NOTHING, PartialJSON
from ..utils.schema import Shape, resolved, shape_of, strict_schema
from .exceptions import LLMContentFilteredError, LLMException, LLMInvalidRequestError, LLMProtocolError
from .types import LLMResponse, Message, MessageRole, OutputFormat, StopReason

T = TypeVar("T")
E = TypeVar("E", bound=LLMException)

MAX_COMPLAINT: Final = 1000
"""Characters of what is wrong that the model is told."""


class Ask(Protocol):
    """What an attempt asks: ``LLMClient.complete``."""

    async def __call__(self, messages: Sequence[Message], **options: Any) -> LLMResponse: ...


def shape_for(into: type[T] | Mapping[str, Any]) -> tuple[Shape[T], OutputFormat]:
    """How *into* is asked for and read.

    A schema that the vendors' strict modes take is asked for strictly; another one as well as the vendor can.

    Raises:
        LLMInvalidRequestError: nobody knows how to read it.
    """
    try:
        shape: Shape[T] = shape_of(into)
    except TypeError as error:
        raise LLMInvalidRequestError(f"into: {error}") from None
    strict = strict_schema(shape.schema)
    if strict is None:
        return shape, OutputFormat(shape.schema, shape.name, strict=False)
    return shape, OutputFormat(strict, shape.name)


async def parse(
    ask: Ask, messages: tuple[Message, ...], into: type[T] | Mapping[str, Any], *, repairs: int, options: Any
) -> T:
    """The answer as a value of *into*; ``LLMClient.parse`` explains the rest."""
    if repairs < 0:
        raise LLMInvalidRequestError(f"repairs: expected 0 or more, got {repairs!r}")
    shape, wanted = shape_for(into)
    for left in range(repairs, -1, -1):
        response = await ask(messages, **{**options, "output_format": wanted})
        try:
            return read(shape, response)
        except ValueError as error:
            complaint = str(error)
            if not left:
                raise misfit(response, complaint) from None
        told = f"That does not fit: {complaint[:MAX_COMPLAINT]}\nAnswer again, with JSON that fits the schema."
        messages = (*messages, _shown(response), Message(MessageRole.USER, told))
    raise AssertionError("the last attempt returns or raises")


def read(shape: Shape[T], response: LLMResponse) -> T:
    """The value in *response*.

    Raises:
        ValueError: it does not fit; the model may do better.
        LLMContentFilteredError: the model declined.
        LLMProtocolError: the answer was cut: it cannot fit, and would be cut again.
    """
    if response.refusal or response.stop_reason is StopReason.CONTENT_FILTER:
        raise _of(LLMContentFilteredError(f"the model declined: {response.refusal or 'no reason given'}"), response)
    try:
        value = _decoded(response.text)
        return shape.read(_without_nulls(value, shape.schema))
    except RecursionError:
        raise ValueError("this is nested too deeply") from None
    except ValueError:
        if response.stop_reason is StopReason.LENGTH:
            cut = LLMProtocolError("the answer was cut before its JSON was complete; allow more max_tokens")
            cut.retryable = False
            raise _of(cut, response) from None
        raise


def misfit(response: LLMResponse, complaint: str) -> LLMProtocolError:
    error = LLMProtocolError(f"the answer does not fit what was asked for: {complaint}")
    error.retryable = False
    return _of(error, response)


async def growing(chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """What can be told of the answer's value, each time that there is more of it."""
    grown = PartialJSON()
    begun = False
    last: Any = NOTHING
    async for chunk in chunks:
        piece = chunk.text
        if not begun:
            # Some models say a word before it.
            _, brace, rest = piece.partition("{")
            piece, begun = brace + rest, bool(brace)
        if not piece:
            continue
        value = grown.feed(piece)
        if value is not NOTHING and value != last:
            last = value
            yield value


def _decoded(text: str) -> Any:
    """The JSON in *text*, which some models wrap in a fence or in words."""
    complaint = ""
    for each in (text, text[text.find("{") : text.rfind("}") + 1]):
        try:
            return msgspec.json.decode(each)
        except (msgspec.DecodeError, RecursionError) as error:
            complaint = complaint or str(error)
    raise ValueError(f"this is no JSON: {complaint}")


def _without_nulls(value: Any, schema: Any, root: dict[str, Any] | None = None) -> Any:
    """*value* without the nulls by which a strict answer says that something optional is not there."""
    if not isinstance(schema, dict):
        return value
    root = schema if root is None else root
    schema = resolved(schema, root)
    if isinstance(value, dict) and "properties" in schema:
        required = schema.get("required", ())
        named = schema["properties"]
        return {
            key: _without_nulls(inner, named.get(key, {}), root)
            for key, inner in value.items()
            if inner is not None or key in required or key not in named
        }
    if isinstance(value, list) and "items" in schema:
        return [_without_nulls(item, schema["items"], root) for item in value]
    return value


def _shown(response: LLMResponse) -> Message:
    """The answer that did not fit, as what was said before; an empty one would be refused."""
    if response.tool_calls or not response.text:
        # A call that nobody answers would be refused, and so would the thinking that led to it without it.
        return Message(MessageRole.ASSISTANT, response.text or "(nothing)")
    return response.message


def _of(error: E, response: LLMResponse) -> E:
    """*error* with what is known of the answer."""
    error.provider, error.model, error.key_id = response.provider, response.model, response.key_id
    error.partial, error.usage, error.request_id = response.text, response.usage, response.request_id
    error.sent = True
    return error
