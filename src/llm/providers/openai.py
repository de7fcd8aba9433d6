"""OpenAI's Chat Completions as pure functions, for the vendor itself and for every server that speaks them.

What differs by address (``base_url``): the vendor's own models follow the rules of ``models.toml``. Of what stands
behind any other address nothing is known, so nothing is held back, the token limit is ``max_tokens`` and the system's
role ``system``, which all compatible servers understand, and the end of a stream is what the many servers make of it:

* the vendor's own: ``[DONE]`` after a ``finish_reason``;
* any other: ``[DONE]``, or a ``finish_reason`` and then the end of the body.

Sources: the vendor's API reference, and what compatible servers were seen to send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import msgspec

from ..core.content import Part, Text, Thinking
from ..core.exceptions import (
    LLMException,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMProtocolError,
)
from ..core.settings import ProviderSettings
from ..core.types import (
    Headers,
    LLMResponse,
    MessageRole,
    Options,
    Request,
    StopReason,
    StreamChunk,
    Usage,
)
from ..transports.base import HTTPRequest
from ..utils.error_body import MAX_BODY, UNREADABLE
from ..utils.json_body import encode_body
from .base import Encoded
from .catalog import Family, Refuse, asked, leave_out
from .event_stream import EventStream
from .openai_base import OpenAIBase
from .openai_messages import DIALECT, ask_for_format, ask_for_tools, wire_messages
from .openai_responses import OpenAIResponses, ResponsesStream
from .openai_tools import Calls, WireCall
from .responses_items import needs_items

STOP_REASON: Final = {
    "stop": StopReason.STOP,
    "length": StopReason.LENGTH,
    "tool_calls": StopReason.TOOL_CALLS,
    "function_call": StopReason.TOOL_CALLS,
    "content_filter": StopReason.CONTENT_FILTER,
    # Together and Mistral have words of their own.
    "eos": StopReason.STOP,
    "model_length": StopReason.LENGTH,
}

BROKEN_OFF: Final = frozenset(("error", "insufficient_system_resource"))
"""A ``finish_reason`` that says the server gave up (OpenRouter, Mistral; DeepSeek): the answer is not whole."""

_NOTHING_ASKED: Final = Options()
_SYSTEM: Final = MessageRole.SYSTEM
_STOPS: Final = 4
"""Stop sequences that the vendor takes at most."""

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class _InputDetails(msgspec.Struct, gc=False):
    cached_tokens: _Tokens | None = None
    cache_write_tokens: _Tokens | None = None


class _OutputDetails(msgspec.Struct, gc=False):
    reasoning_tokens: _Tokens | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    total_tokens: _Tokens | None = None
    prompt_tokens_details: _InputDetails | None = None
    completion_tokens_details: _OutputDetails | None = None
    prompt_cache_hit_tokens: _Tokens | None = None
    """DeepSeek's word for cached tokens."""


class _Part(msgspec.Struct, gc=False):
    """A part of an answer in parts, as Mistral's thinking models write them."""

    text: str | None = None
    thinking: list[_Part] | None = None


class _Words(msgspec.Struct, gc=False):
    """A message, or the delta of one."""

    content: str | list[_Part] | None = None
    refusal: str | None = None
    tool_calls: Sequence[WireCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """What vLLM, OpenRouter and Ollama call ``reasoning_content``."""


class _PlainChoice(msgspec.Struct, gc=False):
    index: int = 0
    message: _Words | None = None
    delta: _Words | None = None
    finish_reason: str | None = None


class _Choice(_PlainChoice, gc=False):
    usage: _Usage | None = None
    """Moonshot's place for it."""


class _Groq(msgspec.Struct, gc=False):
    usage: _Usage | None = None


class _PlainReply(msgspec.Struct, gc=False):
    """A completion, or a chunk of one, without usage, which must not spoil a good answer if it cannot be read."""

    id: str | None = None
    model: str | None = None
    choices: Sequence[_PlainChoice] | None = None
    error: Any = None


class _Reply(_PlainReply, gc=False):
    choices: Sequence[_Choice] | None = None
    usage: _Usage | None = None
    x_groq: _Groq | None = None


_decode: Final = msgspec.json.Decoder(_Reply).decode
_decode_plain: Final = msgspec.json.Decoder(_PlainReply).decode


class OpenAIProvider(OpenAIBase):
    """The Chat Completions dialect at one address. It implements ``providers.base.Provider``."""

    def __init__(self, settings: ProviderSettings) -> None:
        super().__init__(settings, "chat/completions")
        # Of another server it is not known whether it has the other API: there it is a dialect to be configured.
        self._responses = OpenAIResponses(settings) if not settings.custom else None
        self._stream_options = {"include_usage": True}
        if not self._custom:
            # Padding against eavesdroppers who measure packets; it is bandwidth, and a strict server refuses the word.
            self._stream_options["include_obfuscation"] = False

    def encode(self, request: Request, key: str) -> Encoded:
        """The HTTP request for *request*.

        Raises LLMInvalidRequestError, naming option and model, for what the model is known to refuse.
        """
        options = request.options
        model = request.model
        family = self._families.get(model) or self._learn(model)
        messages = request.messages
        if (other := self._other(request, family)) is not None:
            return other.encode(request, key)
        if not messages:
            raise LLMInvalidRequestError(
                "messages: there is nothing to answer; add a message of the user's", provider=self.name, model=model
            )
        body: dict[str, Any] = {"model": model, "messages": messages}
        renames = family.system_role != "system"
        for message in messages:
            if (renames and message.role is _SYSTEM) or message.cache or type(message.content) is not str:
                body["messages"] = wire_messages(
                    messages,
                    family.system_role,
                    marks=family.cache_marks,
                    custom=self._custom,
                    refuse=Refuse(self.name, model),
                )
                break
        if options.max_tokens is not None:
            body[family.token_field] = options.max_tokens
        dropped: tuple[str, ...] = ()
        if options != _NOTHING_ASKED:
            dropped = self._ask(body, request, family)
        if request.stream:
            body["stream"] = True
            body["stream_options"] = self._stream_options
        headers = self._headers_of(options, key, stream=request.stream)
        encoded = encode_body(body, self._extra_body, options.extra_body, provider=self.name, model=model)
        return Encoded(HTTPRequest("POST", self._url, headers, encoded), dropped)

    def decode(self, request: Request, status: int, headers: Headers, body: bytes) -> LLMResponse:
        """The answer in a complete *body*. Raises what ``classify`` says for a failure, under whatever status."""
        if not 200 <= status < 300:
            raise self.classify(request, status, headers, body)
        if (other := self._other(request)) is not None:
            return other.decode(request, status, headers, body)
        try:
            reply = _decode(body)
        except UNREADABLE:
            try:
                reply = _without_usage(body)
            except UNREADABLE:
                raise self.classify(request, status, headers, body) from None
        if not reply.choices:
            raise self.classify(request, status, headers, body)
        choice = reply.choices[0]
        if reply.error or choice.finish_reason in BROKEN_OFF:
            raise self.broken_off(request, choice.finish_reason, headers, body)
        words = choice.message or _Words()
        reason = STOP_REASON.get(choice.finish_reason or "", StopReason.UNKNOWN)
        text = _text(words.content)
        content: tuple[Part, ...] = ()
        if words.tool_calls:
            calls = Calls()
            for each in words.tool_calls:
                calls.add(each, whole=True)
            if calls.name(0) == self.format_tool(request):
                text, reason = calls.parts()[0].arguments, StopReason.STOP
            else:
                content = _content(words, text, calls)
                if reason is StopReason.STOP:
                    # As Gemini says of tool calls too.
                    reason = StopReason.TOOL_CALLS
        return LLMResponse(
            text=text,
            model=reply.model or request.model,
            usage=_usage(reply.usage) if reply.usage is not None else Usage(),
            stop_reason=StopReason.CONTENT_FILTER if words.refusal and reason is StopReason.STOP else reason,
            refusal=words.refusal or None,
            thinking=_thinking(words),
            content=content,
            alternatives=tuple(_text(other.message.content) for other in reply.choices[1:] if other.message)
            if len(reply.choices) > 1
            else (),
            id=reply.id or "",
            provider=self.name,
            request_id=headers.get("x-request-id"),
            body=body,
        )

    def stream_decoder(self, request: Request) -> OpenAIStream | ResponsesStream:
        if (other := self._other(request)) is not None:
            return other.stream_decoder(request)
        return OpenAIStream(self, request, custom=self._custom)

    def count_request(self, request: Request, key: str) -> HTTPRequest:
        """The request that asks how many tokens *request* has: the vendor counts them over its other API.

        Raises LLMInvalidRequestError under a custom address, where nobody knows of a way.
        """
        if self._responses is None:
            raise LLMInvalidRequestError(
                "Chat Completions has no way to count tokens; estimate() guesses them", provider=self.name
            )
        # What that API has no word for changes no count.
        options = msgspec.structs.replace(request.options, stop=None, n=None)
        return self._responses.count_request(msgspec.structs.replace(request, options=options), key)

    def _other(self, request: Request, family: Family | None = None) -> OpenAIResponses | None:
        """The Responses API, if *request* is one that Chat Completions refuses, or that only it can be sent."""
        other, options = self._responses, request.options
        if other is None:
            return None
        if options.tools is not None:
            family = family or self._family(request.model)
            if family.chat_tools == "never":
                return other
            if family.chat_tools == "at_no_effort":
                effort = options.reasoning or self._effort({}, options, family)
                if effort != "none":
                    return other
        for message in request.messages:
            if not isinstance(message.content, str) and needs_items(message.content):
                return other
        return None

    def format_tool(self, request: Request) -> str | None:
        """The name of the tool that stands for the answer's form, None if none does."""
        wanted = request.options.output_format
        return wanted.name if wanted is not None and self._family(request.model).formats == "tool" else None

    def broken_off(self, request: Request, reason: str | None, headers: Headers, body: bytes) -> LLMException:
        """The server gave up in the midst of an answer: its own error if it names one."""
        error = self.classify(request, 200, headers, body)
        if not isinstance(error, LLMProtocolError):
            return error
        return LLMOverloadedError(
            f"the provider broke the answer off: finish_reason {reason}",
            provider=self.name,
            model=request.model,
            code=reason,
            request_id=headers.get("x-request-id"),
            sent=True,
            body=body[:MAX_BODY],
        )

    def _ask(self, body: dict[str, Any], request: Request, family: Family) -> tuple[str, ...]:
        """Put what the options ask into *body*; the names of the hints that the model refuses."""
        options = request.options
        wishes = asked(options)
        if request.stream and (options.n or 1) > 1:
            raise LLMInvalidRequestError(
                f"n={options.n}: an answer is streamed alone; leave n out, or do not stream",
                provider=self.name,
                model=request.model,
            )
        refuse = Refuse(self.name, request.model)
        ask_for_tools(body, options)
        if options.reasoning is not None:
            body["reasoning_effort"] = self._word(options.reasoning, family.efforts, refuse)
        if options.output_format is not None:
            ask_for_format(body, options.output_format, family.formats, refuse=refuse)
        refused = self._refused | family.refuses
        if family.free_at_effort is not None and self._effort(body, options, family) == family.free_at_effort:
            refused = self._refused
        strict = self._is_strict(options)
        dropped = leave_out(wishes, refused, strict=strict, provider=self.name, model=request.model)
        stop = options.stop
        if not self._custom and isinstance(stop, tuple) and len(stop) > _STOPS:
            raise LLMInvalidRequestError(
                f"stop: {request.model} takes {_STOPS} of them, not {len(stop)}",
                provider=self.name,
                model=request.model,
            )
        body.update(wishes)
        return dropped


class OpenAIStream(EventStream):
    """Decodes one streamed completion. It implements ``providers.base.StreamDecoder``.

    The last chunk comes with ``[DONE]``, because the usage arrives after the stop reason.
    """

    __slots__ = ("_add", "_broken_off", "_calls", "_custom", "_format", "_refused", "_thought", "_thought_as")

    terminal = "[DONE]"

    def __init__(self, provider: OpenAIProvider, request: Request, *, custom: bool) -> None:
        super().__init__(provider, request)
        self._broken_off = provider.broken_off
        self._custom = custom
        self._refused = False
        self._calls = Calls()
        self._add = self._calls.add
        self._format = provider.format_tool(request)
        self._thought: list[str] = []
        self._thought_as = ""

    def _take(self, payloads: list[bytes], chunks: list[StreamChunk]) -> None:
        # This loop runs for every token of every stream: what does not change is looked up once.
        decode, say = _decode, chunks.append
        for data in payloads:
            try:
                reply = decode(data)
            except UNREADABLE:
                odd = self._take_odd(data, chunks)
                if odd is None:
                    if self.done or self.error is not None:
                        return
                    continue
                reply = odd
            if reply.error:
                self.error = self._broken_off(self._request, "error", {}, data)
                return
            if not self.id:
                self.id = reply.id or ""
            model, usage, groq = reply.model, reply.usage, reply.x_groq
            if model:
                self.model = model
            if usage is not None:
                self.usage = _usage(usage)
            elif groq is not None and groq.usage is not None:
                self.usage = _usage(groq.usage)
            for choice in reply.choices or ():
                # A second answer was not asked for: it cannot be told from the first in one stream of text.
                if choice.index != 0:
                    continue
                delta = choice.delta
                if delta is not None:
                    text = delta.content
                    calls, thought = delta.tool_calls, delta.reasoning_content
                    if delta.refusal is not None or delta.reasoning is not None or isinstance(text, list):
                        self._say(delta, chunks)
                    # One thing and nothing else is what nearly every event of a stream is.
                    elif thought is None and calls is None:
                        if text:
                            self._content = True
                            say(StreamChunk(text))
                    elif text or (thought and calls):
                        self._say(delta, chunks)
                    elif thought:
                        self._content = True
                        self._thought_as = "reasoning_content"
                        self._thought.append(thought)
                        say(StreamChunk("", thought))
                    elif calls and len(calls) == 1 and self._format is None:
                        self._content = True
                        say(StreamChunk("", "", "", None, None, self._add(calls[0])))
                    elif calls:
                        self._call(calls, say)
                if choice.usage is not None:
                    self.usage = _usage(choice.usage)
                reason = choice.finish_reason
                # Some servers say "" where the vendor says null.
                if reason:
                    if reason in BROKEN_OFF:
                        self.error = self._broken_off(self._request, reason, {}, data)
                        return
                    self.stop_reason = STOP_REASON.get(reason, StopReason.UNKNOWN)

    def _take_odd(self, data: bytes, chunks: list[StreamChunk]) -> _Reply | None:
        """Take in what is no chunk as the vendor makes them; what can be read of it, if it is one all the same."""
        if data[:6] == b"[DONE]":
            if self.stop_reason is None and not self._custom:
                self._interrupt("the stream ended without a finish_reason")
            else:
                self._finish(chunks)
            return None
        try:
            return _without_usage(data)
        except UNREADABLE:
            if data.strip():
                self._fail("an event of the stream cannot be read", data)
            return None

    def _end_early(self, pending: bytes, chunks: list[StreamChunk]) -> None:
        if self._custom and self.stop_reason is not None:
            self._finish(chunks)
        else:
            super()._end_early(pending, chunks)

    def _say(self, delta: _Words, chunks: list[StreamChunk]) -> None:
        say = chunks.append
        if delta.reasoning_content:
            self._think(delta.reasoning_content, "reasoning_content", say)
        elif delta.reasoning:
            self._think(delta.reasoning, "reasoning", say)
        if delta.content:
            thinking, text = _thought_in(delta.content), _text(delta.content)
            self._content = self._content or bool(thinking or text)
            if thinking:
                say(StreamChunk("", thinking))
            if text:
                say(StreamChunk(text))
        if delta.refusal:
            say(StreamChunk("", "", delta.refusal))
            self._content = self._refused = True
        if delta.tool_calls:
            self._call(delta.tool_calls, say)

    def _think(self, thought: str, name: str, say: Callable[[StreamChunk], None]) -> None:
        """More of what is thought, which the server calls *name*."""
        self._content = True
        self._thought.append(thought)
        self._thought_as = name
        say(StreamChunk("", thought))

    def _call(self, calls: Sequence[WireCall], say: Callable[[StreamChunk], None]) -> None:
        """More of the tool calls, or of the answer itself where a tool stands for its form."""
        self._content = True
        for call in calls:
            piece = self._add(call)
            if self._format is None or self._calls.name(piece.index) != self._format:
                say(StreamChunk("", "", "", None, None, piece))
            elif piece.arguments:
                say(StreamChunk(piece.arguments))

    def _finish(self, chunks: list[StreamChunk]) -> None:
        reason = self.stop_reason or StopReason.UNKNOWN
        if self._refused and reason is StopReason.STOP:
            reason = StopReason.CONTENT_FILTER
        if self._calls:
            reason = self._hand_out_calls(reason, chunks)
        self.stop_reason = reason
        self.done = True
        chunks.append(StreamChunk(stop_reason=reason, usage=self.usage))

    def _hand_out_calls(self, reason: StopReason, chunks: list[StreamChunk]) -> StopReason:
        """The calls are complete; what the answer stopped for, with them."""
        if self._calls.name(0) == self._format:
            return StopReason.STOP
        if self._thought:
            chunks.append(StreamChunk(part=_thought("".join(self._thought), self._thought_as)))
        chunks += [StreamChunk(part=call) for call in self._calls.parts()]
        # Gemini says of tool calls too that it has stopped.
        return StopReason.TOOL_CALLS if reason is StopReason.STOP else reason


def _content(words: _Words, text: str, calls: Calls) -> tuple[Part, ...]:
    """The parts of an answer that calls tools."""
    found: list[Part] = []
    if words.reasoning_content or words.reasoning:
        name = "reasoning_content" if words.reasoning_content else "reasoning"
        found.append(_thought(words.reasoning_content or words.reasoning or "", name))
    if text:
        found.append(Text(text))
    return (*found, *calls.parts())


def _thought(text: str, name: str) -> Thinking:
    """Thinking under the *name* in which the server wrote it, and wants it back."""
    return Thinking(text, msgspec.json.encode({name: text}), DIALECT)


def _text(content: str | list[_Part] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text or "" for part in content or ())


def _thinking(words: _Words) -> str:
    return (words.reasoning_content or words.reasoning or "") + _thought_in(words.content)


def _thought_in(content: str | list[_Part] | None) -> str:
    """What Mistral's models think, which they tell in parts of the content."""
    return "".join(_text(part.thinking) for part in content) if isinstance(content, list) else ""


def _without_usage(body: bytes) -> _Reply:
    """What *body* says when its figures cannot be read."""
    plain = _decode_plain(body)
    choices = [_Choice(each.index, each.message, each.delta, each.finish_reason) for each in plain.choices or ()]
    return _Reply(plain.id, plain.model, choices, plain.error)


def _usage(usage: _Usage) -> Usage:
    """Inclusive totals, as the vendor counts them."""
    given, made = usage.prompt_tokens or 0, usage.completion_tokens or 0
    # xAI leaves the thinking out of completion_tokens, and others leave completion_tokens out; the total has both.
    if usage.total_tokens is not None and usage.total_tokens > given + made:
        made = usage.total_tokens - given
    before, after = usage.prompt_tokens_details, usage.completion_tokens_details
    read = before.cached_tokens if before is not None else usage.prompt_cache_hit_tokens
    return Usage(
        input_tokens=given,
        output_tokens=made,
        cache_read_tokens=read or 0,
        cache_write_tokens=(before.cache_write_tokens or 0) if before is not None else 0,
        reasoning_tokens=(after.reasoning_tokens or 0) if after is not None else 0,
    )
