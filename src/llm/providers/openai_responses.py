"""OpenAI's Responses API as pure functions: the only way to give tools to its newest models.

What this dialect decides where the vendor leaves a choice:

* *Nothing is stored* (``store: false``): the conversation is the caller's. Reasoning comes in the vendor's cipher and
  is sent back as it came, so that a model goes on thinking where it called a tool.
* *Tools are not strict* unless a tool says so; unasked, this API is.
* *The end of a stream* is ``response.completed``, ``.incomplete`` or ``.failed``, or an ``error``, and nothing else.

Sources: the vendor's API reference and its SDK.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec

from ..core.content import Opaque, Part, Refusal, Text, Thinking, ToolCall
from ..core.exceptions import LLMInvalidRequestError
from ..core.settings import ProviderSettings
from ..core.types import (
    Headers,
    LLMResponse,
    Options,
    Request,
    StopReason,
    StreamChunk,
    ToolCallDelta,
    Usage,
)
from ..transports.base import HTTPRequest
from ..utils.error_body import UNREADABLE
from ..utils.json_body import encode_body
from .base import Encoded
from .catalog import Family, Refuse, asked, leave_out
from .event_stream import EventStream
from .listing import only
from .openai_base import OpenAIBase
from .responses_items import DIALECT, ask_for_format, ask_for_tools, wire_input

COUNTED: Final = frozenset(("input", "model", "tools", "tool_choice", "parallel_tool_calls", "reasoning", "text"))
"""Members of a request that its tokens are counted by."""
INCOMPLETE: Final = {
    "max_output_tokens": StopReason.LENGTH,
    "content_filter": StopReason.CONTENT_FILTER,
}

# The dialect has no word for these, at any address.
_NO_WORD: Final = frozenset(("top_k", "frequency_penalty", "presence_penalty", "seed", "stop", "n"))
_NOTHING_ASKED: Final = Options()
_TERMINAL: Final = frozenset(("response.completed", "response.incomplete"))
_FAILED: Final = frozenset(("response.failed", "error"))

_NO_USAGE: Final = msgspec.Raw(b"null")

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class _InputDetails(msgspec.Struct, gc=False):
    cached_tokens: _Tokens | None = None
    cache_write_tokens: _Tokens | None = None


class _OutputDetails(msgspec.Struct, gc=False):
    reasoning_tokens: _Tokens | None = None


class _Usage(msgspec.Struct, gc=False):
    input_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    input_tokens_details: _InputDetails | None = None
    output_tokens_details: _OutputDetails | None = None


class _Piece(msgspec.Struct, gc=False):
    """A piece of a message's content, or of reasoning."""

    type: str = ""
    text: str | None = None
    refusal: str | None = None


class _Item(msgspec.Struct, gc=False):
    """An item of the output: of what we do not know, only the type is read."""

    type: str = ""
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    content: Sequence[_Piece] | None = None
    summary: Sequence[_Piece] | None = None


class _Details(msgspec.Struct, gc=False):
    reason: str | None = None


class _Reply(msgspec.Struct, gc=False):
    id: str | None = None
    model: str | None = None
    status: str | None = None
    output: Sequence[_Item] | None = None
    usage: msgspec.Raw = _NO_USAGE
    """Read apart, for it must not spoil a good answer if it cannot be."""
    error: Any = None
    incomplete_details: _Details | None = None


class _RawReply(msgspec.Struct):
    """The items as they came, for those that have to go back so."""

    output: list[msgspec.Raw] = []


class _Event(msgspec.Struct, gc=False):
    type: str = ""
    delta: str | None = None
    output_index: int = 0
    item: _Item | None = None
    response: _Reply | None = None
    error: Any = None
    """Of a gateway's error, which has no type."""


class _RawEvent(msgspec.Struct):
    item: msgspec.Raw = msgspec.Raw(b"{}")
    response: msgspec.Raw = msgspec.Raw(b"{}")


class _Named(msgspec.Struct, gc=False):
    type: str = ""


_decode: Final = msgspec.json.Decoder(_Reply).decode
_decode_raw: Final = msgspec.json.Decoder(_RawReply).decode
_decode_event: Final = msgspec.json.Decoder(_Event).decode
_decode_raw_event: Final = msgspec.json.Decoder(_RawEvent).decode
_decode_usage: Final = msgspec.json.Decoder(_Usage | None).decode
_decode_named: Final = msgspec.json.Decoder(_Named).decode

# The events whose loss would change the answer; whatever else cannot be read is ignored like an unknown one.
_ESSENTIAL: Final = frozenset(
    (
        "response.output_text.delta",
        "response.refusal.delta",
        "response.function_call_arguments.delta",
        "response.output_item.added",
        "response.output_item.done",
        *_TERMINAL,
        *_FAILED,
    )
)


class OpenAIResponses(OpenAIBase):
    """The Responses dialect at one address. It implements ``providers.base.Provider``."""

    def __init__(self, settings: ProviderSettings) -> None:
        super().__init__(settings, "responses")
        self._refused = _NO_WORD

    def encode(self, request: Request, key: str) -> Encoded:
        """The HTTP request for *request*.

        Raises LLMInvalidRequestError, naming option and model, for what the model or the dialect is known to refuse.
        """
        options, model, messages = request.options, request.model, request.messages
        family = self._families.get(model) or self._learn(model)
        if not messages:
            raise LLMInvalidRequestError(
                "messages: there is nothing to answer; add a message of the user's", provider=self.name, model=model
            )
        body: dict[str, Any] = {
            "model": model,
            "input": wire_input(messages, family.system_role, marks=family.cache_marks),
            "store": False,
        }
        if family.efforts and not self._custom:
            # Of a model that does not think the vendor refuses the word.
            body["include"] = ["reasoning.encrypted_content"]
        if options.max_tokens is not None:
            body["max_output_tokens"] = options.max_tokens
        dropped: tuple[str, ...] = ()
        if options != _NOTHING_ASKED:
            dropped = self._ask(body, options, family, model)
        if request.stream:
            body["stream"] = True
            if not self._custom:
                body["stream_options"] = {"include_obfuscation": False}
        headers = self._headers_of(options, key, stream=request.stream)
        encoded = encode_body(body, self._extra_body, options.extra_body, provider=self.name, model=model)
        return Encoded(HTTPRequest("POST", self._url, headers, encoded), dropped)

    def decode(self, request: Request, status: int, headers: Headers, body: bytes) -> LLMResponse:
        """The answer in a complete *body*. Raises what ``classify`` says for a failure, under whatever status."""
        if not 200 <= status < 300:
            raise self.classify(request, status, headers, body)
        try:
            reply = _decode(body)
        except UNREADABLE:
            raise self.classify(request, status, headers, body) from None
        if reply.error or reply.output is None:
            raise self.classify(request, status, headers, body)
        parts = _parts(reply.output, body)
        text = "".join([part.text for part in parts if type(part) is Text])
        refusal = "".join([part.text for part in parts if type(part) is Refusal])
        return LLMResponse(
            text=text,
            model=reply.model or request.model,
            usage=_usage(reply.usage) or Usage(),
            stop_reason=_stop_reason(reply, calls=any(type(part) is ToolCall for part in parts), refused=bool(refusal)),
            refusal=refusal or None,
            thinking="".join([part.text for part in parts if type(part) is Thinking]),
            content=parts if any(type(part) is not Text for part in parts) else (),
            id=reply.id or "",
            provider=self.name,
            request_id=headers.get("x-request-id"),
            body=body,
        )

    def count_request(self, request: Request, key: str) -> HTTPRequest:
        """The request that asks how many tokens *request* has."""
        asked = self.encode(request, key).request
        address, mark, query = asked.url.partition("?")
        return HTTPRequest("POST", f"{address}/input_tokens{mark}{query}", asked.headers, only(asked.body, COUNTED))

    def stream_decoder(self, request: Request) -> ResponsesStream:
        return ResponsesStream(self, request)

    def _ask(self, body: dict[str, Any], options: Options, family: Family, model: str) -> tuple[str, ...]:
        """Put what *options* ask into *body*; the names of the hints that the model refuses."""
        wishes = asked(options)
        ask_for_tools(body, options)
        effort: object = family.default_effort
        if options.reasoning is not None:
            effort = self._word(options.reasoning, family.responses_efforts or family.efforts, Refuse(self.name, model))
            body["reasoning"] = {"effort": effort}
        if options.output_format is not None:
            ask_for_format(body, options.output_format)
        refused = self._refused
        if family.free_at_effort is None or effort != family.free_at_effort:
            refused |= family.refuses
        dropped = leave_out(wishes, refused, strict=self._is_strict(options), provider=self.name, model=model)
        body.update(wishes)
        return dropped


class ResponsesStream(EventStream):
    """Decodes one streamed response. It implements ``providers.base.StreamDecoder``.

    Items are added, written in deltas, and done; what has to go back is taken from ``output_item.done``, which alone
    has all of it. The last chunk comes with the terminal event.
    """

    __slots__ = ("_calls", "_refused")

    terminal = "response.completed"

    def __init__(self, provider: OpenAIResponses, request: Request) -> None:
        super().__init__(provider, request)
        self._calls: dict[int, int] = {}
        """Which of the answer's tool calls is at which place of the output."""
        self._refused = False

    def _take(self, payloads: list[bytes], chunks: list[StreamChunk]) -> None:
        for data in payloads:
            try:
                event = _decode_event(data)
            except UNREADABLE:
                if self._is_essential(data):
                    self._fail("an event of the stream cannot be read", data)
                    return
                continue
            kind = event.type
            # Nearly all events are pieces of text.
            if kind == "response.output_text.delta":
                if event.delta:
                    self._content = True
                    chunks.append(StreamChunk(event.delta))
            elif kind == "response.function_call_arguments.delta":
                if event.delta and (index := self._calls.get(event.output_index)) is not None:
                    chunks.append(StreamChunk(tool_call=ToolCallDelta(index, arguments=event.delta)))
            elif kind == "response.reasoning_summary_text.delta" or kind == "response.reasoning_text.delta":
                if event.delta:
                    self._content = True
                    chunks.append(StreamChunk("", event.delta))
            elif kind == "response.refusal.delta":
                if event.delta:
                    self._content = self._refused = True
                    chunks.append(StreamChunk("", "", event.delta))
            elif event.item is not None:
                self._take_item(kind, event, data, chunks)
            elif kind in _TERMINAL or kind in _FAILED or event.response is not None or event.error:
                self._take_state(kind, event, data, chunks)
                if not self._open:
                    return

    def _is_essential(self, data: bytes) -> bool:
        try:
            return _decode_named(data).type in _ESSENTIAL
        except UNREADABLE:
            # Whatever it was: the vendor ends with no word of its own, but compatible servers do.
            return data[:6] != b"[DONE]" and bool(data.strip())

    def _take_item(self, kind: str, event: _Event, data: bytes, chunks: list[StreamChunk]) -> None:
        item = event.item
        assert item is not None
        if kind == "response.output_item.added":
            if item.type == "function_call":
                index = self._calls[event.output_index] = len(self._calls)
                self._content = True
                chunks.append(StreamChunk(tool_call=ToolCallDelta(index, item.call_id or "", item.name or "")))
        elif kind == "response.output_item.done" and item.type != "message":
            self._content = True
            if item.type == "function_call":
                self._calls.setdefault(event.output_index, len(self._calls))
            chunks.extend(StreamChunk(part=part) for part in _item_parts(item, _decode_raw_event(data).item))

    def _take_state(self, kind: str, event: _Event, data: bytes, chunks: list[StreamChunk]) -> None:
        """The response as a whole: as it begins, and as it ends."""
        reply = event.response
        if reply is not None:
            self.id = reply.id or self.id
            self.model = reply.model or self.model
            self.usage = _usage(reply.usage) or self.usage
        if kind in _FAILED or event.error or (kind in _TERMINAL and reply is not None and reply.error):
            body = bytes(_decode_raw_event(data).response) if reply is not None else data
            self.error = self._provider.classify(self._request, 200, {}, body)
        elif kind in _TERMINAL and reply is not None:
            self.done = True
            self.stop_reason = _stop_reason(reply, calls=bool(self._calls), refused=self._refused)
            chunks.append(StreamChunk(stop_reason=self.stop_reason, usage=self.usage))


def _stop_reason(reply: _Reply, *, calls: bool, refused: bool) -> StopReason:
    if reply.status == "incomplete":
        reason = reply.incomplete_details.reason if reply.incomplete_details is not None else None
        return INCOMPLETE.get(reason or "", StopReason.UNKNOWN)
    if reply.status not in (None, "completed"):
        return StopReason.UNKNOWN
    if refused:
        return StopReason.CONTENT_FILTER
    return StopReason.TOOL_CALLS if calls else StopReason.STOP


def _parts(items: Sequence[_Item], body: bytes) -> tuple[Part, ...]:
    plain = all(item.type == "message" for item in items)
    raws = [msgspec.Raw()] * len(items) if plain else _decode_raw(body).output
    return tuple([part for item, raw in zip(items, raws, strict=True) for part in _item_parts(item, raw)])


def _item_parts(item: _Item, raw: msgspec.Raw) -> list[Part]:
    """What one item of the output is to us; *raw* is how it came."""
    if item.type == "message":
        found: list[Part] = []
        for piece in item.content or ():
            if piece.text:
                found.append(Text(piece.text))
            elif piece.refusal:
                found.append(Refusal(piece.refusal))
        return found
    if item.type == "function_call":
        return [ToolCall(item.call_id or "", item.name or "", item.arguments or "{}")]
    if item.type == "reasoning":
        pieces = [piece.text or "" for piece in (*(item.summary or ()), *(item.content or ()))]
        return [Thinking("".join(pieces), bytes(raw), DIALECT)]
    return [Opaque(item.type, bytes(raw), DIALECT)]


def _usage(raw: msgspec.Raw) -> Usage | None:
    """Inclusive totals, as the vendor counts them; None if there are none that can be read."""
    try:
        usage = _decode_usage(raw)
    except UNREADABLE:
        return None
    if usage is None:
        return None
    before, after = usage.input_tokens_details, usage.output_tokens_details
    return Usage(
        input_tokens=usage.input_tokens or 0,
        output_tokens=usage.output_tokens or 0,
        cache_read_tokens=(before.cached_tokens or 0) if before is not None else 0,
        cache_write_tokens=(before.cache_write_tokens or 0) if before is not None else 0,
        reasoning_tokens=(after.reasoning_tokens or 0) if after is not None else 0,
    )
