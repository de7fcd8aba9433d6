"""OpenAI's Chat Completions as pure functions, for the vendor itself and for every server that speaks them.

What differs by address (``base_url``): the vendor's own models follow the rules of ``models.toml``. Of what stands
behind any other address nothing is known, so nothing is held back, the token limit is ``max_tokens`` and the system's
role ``system``, which all compatible servers understand, and the end of a stream is what the many servers make of it:

* the vendor's own: ``[DONE]`` after a ``finish_reason``;
* any other: ``[DONE]``, or a ``finish_reason`` and then the end of the body.

Sources: the vendor's API reference, and what compatible servers were seen to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Annotated, Any, Final

import msgspec

from ..core.exceptions import (
    LLMContentFilteredError,
    LLMContextLengthError,
    LLMException,
    LLMInvalidRequestError,
    LLMModelNotFoundError,
    LLMOverloadedError,
    LLMProtocolError,
    LLMQuotaExhaustedError,
)
from ..core.settings import ProviderSettings
from ..core.types import (
    Counting,
    Headers,
    LimitState,
    LLMResponse,
    Message,
    MessageRole,
    ObservedLimits,
    Options,
    Request,
    StopReason,
    StreamChunk,
    Usage,
)
from ..transports.base import HTTPRequest
from ..utils.error_body import MAX_BODY, UNREADABLE, ErrorBody, read_error_body
from ..utils.header_values import whole_number
from ..utils.http_errors import build_error, error_for_status, unreadable
from ..utils.json_body import encode_body
from .base import Encoded
from .catalog import Family, asked, catalog, leave_out
from .event_stream import EventStream
from .quota import Groups, count, merged, owners, seconds

BASE_URL: Final = "https://api.openai.com/v1"

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

STATUS_BY_TYPE: Final = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "invalid_prompt": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "model_not_found": 404,
    "requests": 429,
    "tokens": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "slow_down": 429,
    "server_error": 500,
    "server_is_overloaded": 503,
    "service_unavailable_error": 503,
}
"""The status an error would have had if it had not come under 200, by its code or its type."""

ERROR_BY_CODE: Final[dict[str, type[LLMException]]] = {
    "insufficient_quota": LLMQuotaExhaustedError,
    "credit_balance_exhausted": LLMQuotaExhaustedError,
    "organization_spend_limit_exceeded": LLMQuotaExhaustedError,
    "project_spend_limit_exceeded": LLMQuotaExhaustedError,
    "organization_usage_limit_exceeded": LLMQuotaExhaustedError,
    "billing_hard_limit_reached": LLMQuotaExhaustedError,
    "context_length_exceeded": LLMContextLengthError,
    "exceed_context_size_error": LLMContextLengthError,
    "model_not_found": LLMModelNotFoundError,
    "content_filter": LLMContentFilteredError,
    "content_policy_violation": LLMContentFilteredError,
    "invalid_prompt": LLMContentFilteredError,
    "bio_policy": LLMContentFilteredError,
    "cyber_policy": LLMContentFilteredError,
    "misalignment_policy_violation": LLMContentFilteredError,
}
"""Codes and types that mean the same under any status: a spent quota comes as 429, 400 and 403."""

_LIMIT_HEADERS: Final = tuple(
    (f"x-ratelimit-limit-{name}", f"x-ratelimit-remaining-{name}", f"x-ratelimit-reset-{name}")
    for name in ("requests", "tokens", "project-tokens")
)
_NOTHING_ASKED: Final = Options()
_SYSTEM: Final = MessageRole.SYSTEM
# The vendor has no word for it; compatible servers do.
_NO_WORD: Final = frozenset(("top_k",))
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


class OpenAIProvider:
    """The Chat Completions dialect at one address. It implements ``providers.base.Provider``."""

    def __init__(self, settings: ProviderSettings) -> None:
        vendor = catalog().openai
        self.name = settings.name
        self.default_model: str | None = vendor.default
        self._custom = settings.custom
        self._vendor = vendor
        self._refused = frozenset() if settings.custom else _NO_WORD
        self._strict = settings.unsupported == "raise"
        self._extra_body = settings.extra_body
        # Azure's classic addresses end in a query.
        base, mark, query = (settings.base_url or BASE_URL).partition("?")
        base = base.rstrip("/")
        self._url = f"{base}/chat/completions{mark}{query}"
        self._probe_url = f"{base}/models{mark}{query}"
        self._extra_headers = {name.lower(): value for name, value in settings.extra_headers.items()}
        self._headers = {"content-type": "application/json", "accept": "application/json"}
        self._stream_headers = self._headers | {"accept": "text/event-stream"}
        self._stream_options = {"include_usage": True}
        if not self._custom:
            # Padding against eavesdroppers who measure packets; it is bandwidth, and a strict server refuses the word.
            self._stream_options["include_obfuscation"] = False
        self._families: dict[str, Family] = {}
        self._groups = Groups(settings, vendor)
        # The vendor says that cached input and refused requests count. Compatible servers may differ (`counting`).
        known = Counting(reserve_max=True, cache_reads=True, rejected=True)
        self.counting = merged(known, settings.counting)

    def __repr__(self) -> str:
        return f"<OpenAIProvider {self.name}>"

    def encode(self, request: Request, key: str) -> Encoded:
        """The HTTP request for *request*.

        Raises LLMInvalidRequestError, naming option and model, for what the model is known to refuse.
        """
        options = request.options
        model = request.model
        family = self._families.get(model) or self._learn(model)
        messages = request.messages
        if not messages:
            raise LLMInvalidRequestError(
                "messages: there is nothing to answer; add a message of the user's", provider=self.name, model=model
            )
        body: dict[str, Any] = {"model": model, "messages": messages}
        if family.system_role != "system":
            for message in messages:
                if message.role == _SYSTEM:
                    body["messages"] = _renamed(messages, family.system_role)
                    break
        if options.max_tokens is not None:
            body[family.token_field] = options.max_tokens
        dropped: tuple[str, ...] = ()
        if options != _NOTHING_ASKED:
            dropped = self._ask(body, request, family)
        if request.stream:
            body["stream"] = True
            body["stream_options"] = self._stream_options
            headers = {**self._stream_headers, "authorization": f"Bearer {key}"}
        else:
            headers = {**self._headers, "authorization": f"Bearer {key}"}
        if self._extra_headers or options.extra_headers:
            self._merge_headers(headers, options.extra_headers)
        encoded = encode_body(body, self._extra_body, options.extra_body, provider=self.name, model=model)
        return Encoded(HTTPRequest("POST", self._url, headers, encoded), dropped)

    def decode(self, request: Request, status: int, headers: Headers, body: bytes) -> LLMResponse:
        """The answer in a complete *body*. Raises what ``classify`` says for a failure, under whatever status."""
        if not 200 <= status < 300:
            raise self.classify(request, status, headers, body)
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
        return LLMResponse(
            text=_text(words.content),
            model=reply.model or request.model,
            usage=_usage(reply.usage) if reply.usage is not None else Usage(),
            stop_reason=StopReason.CONTENT_FILTER if words.refusal and reason is StopReason.STOP else reason,
            refusal=words.refusal or None,
            thinking=_thinking(words),
            alternatives=tuple(_text(other.message.content) for other in reply.choices[1:] if other.message)
            if len(reply.choices) > 1
            else (),
            id=reply.id or "",
            provider=self.name,
            request_id=headers.get("x-request-id"),
            body=body,
        )

    def stream_decoder(self, request: Request) -> OpenAIStream:
        return OpenAIStream(self, request, custom=self._custom)

    def classify(self, request: Request, status: int, headers: Headers, body: bytes) -> LLMException:
        """The error that *body* means under *status*; of a status 2xx, the error the body tells of."""
        said = read_error_body(body)
        if status < 300:
            if not said.is_error:
                return unreadable(
                    f"status {status} and a body that is no completion", body, provider=self.name, model=request.model
                )
            status = _status(said)
        error = ERROR_BY_CODE.get(said.code) or ERROR_BY_CODE.get(said.type) or error_for_status(status)
        if status == 404 and error is LLMInvalidRequestError and said.structured and request.model in said.message:
            # Compatible servers have no code for it; a wrong path does not know the model's name.
            error = LLMModelNotFoundError
        hint = ""
        if error is LLMModelNotFoundError:
            gone = self._vendor.retirement(request.model)
            hint = f"the vendor's date for its retirement is {gone.on}; use {gone.use}" if gone else ""
        return build_error(
            error,
            said,
            provider=self.name,
            model=request.model,
            status=status,
            headers=headers,
            body=body,
            code=said.code or said.type or None,
            request_id=headers.get("x-request-id") or said.request_id,
            obey_retry=not self._custom,
            hint=hint,
        )

    def limits(self, headers: Headers) -> ObservedLimits | None:
        """The ``x-ratelimit-*`` headers; their resets are durations. ``tokens`` is input and output together.

        Of the organisation's tokens and the project's, which are limits of their own, the one with less left is told.
        """
        requests, tokens, of_project = (_limit(headers, names) for names in _LIMIT_HEADERS)
        if of_project is not None and (tokens is None or _left(of_project) < _left(tokens)):
            tokens = of_project
        named = owners(headers.get("openai-organization"), None, headers.get("openai-project"))
        if requests is None and tokens is None and not named:
            return None
        return ObservedLimits(requests=requests, tokens=tokens, owners=named)

    def group(self, model: str) -> str:
        """The configured group of *model*, or the model of which it is a dated snapshot."""
        return self._groups[model]

    def probe(self, key: str) -> HTTPRequest:
        """The list of models: free, and refused like any other request if the key is."""
        headers = {"accept": "application/json", "authorization": f"Bearer {key}", **self._extra_headers}
        return HTTPRequest("GET", self._probe_url, headers)

    def replacement(self, model: str) -> str | None:
        """The successor of a model that had retired when ``models.toml`` was last checked."""
        gone = None if self._custom else self._vendor.retirement(model)
        return gone.use if gone is not None and gone.on <= catalog().as_of else None

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

    def _learn(self, model: str) -> Family:
        """The rules for *model*, remembered; none are known under a custom address."""
        family = _ANY if self._custom else self._vendor.family(model)
        if len(self._families) >= 256:
            # Names may come from the application's own users.
            self._families.clear()
        self._families[model] = family
        return family

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
        refused = self._refused | family.refuses
        if family.free_at_effort is not None:
            effort = (self._extra_body | (options.extra_body or {})).get("reasoning_effort") or family.default_effort
            if effort == family.free_at_effort:
                refused = self._refused
        strict = options.unsupported == "raise" if options.unsupported is not None else self._strict
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

    def _merge_headers(self, headers: dict[str, str], extra: dict[str, str] | None) -> None:
        headers.update(self._extra_headers)
        if extra:
            headers.update({name.lower(): value for name, value in extra.items()})


class OpenAIStream(EventStream):
    """Decodes one streamed completion. It implements ``providers.base.StreamDecoder``.

    The last chunk comes with ``[DONE]``, because the usage arrives after the stop reason.
    """

    __slots__ = ("_broken_off", "_custom", "_refused")

    terminal = "[DONE]"

    def __init__(self, provider: OpenAIProvider, request: Request, *, custom: bool) -> None:
        super().__init__(provider, request)
        self._broken_off = provider.broken_off
        self._custom = custom
        self._refused = False

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
                    if type(text) is str and delta.reasoning_content is delta.reasoning is delta.refusal is None:
                        # Text and nothing else: what nearly every event of a stream is.
                        if text:
                            self._content = True
                            say(StreamChunk(text))
                    else:
                        self._say(delta, chunks)
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
        thinking = _thinking(delta)
        if thinking:
            self._content = True
            chunks.append(StreamChunk("", thinking))
        if delta.content:
            text = _text(delta.content)
            if text:
                self._content = True
                chunks.append(StreamChunk(text))
        if delta.refusal:
            chunks.append(StreamChunk("", "", delta.refusal))
            self._content = self._refused = True

    def _finish(self, chunks: list[StreamChunk]) -> None:
        reason = self.stop_reason or StopReason.UNKNOWN
        if self._refused and reason is StopReason.STOP:
            reason = StopReason.CONTENT_FILTER
        self.stop_reason = reason
        self.done = True
        chunks.append(StreamChunk(stop_reason=reason, usage=self.usage))


_ANY: Final = Family(token_field="max_tokens", system_role="system")
"""What is known of a model under a custom address: nothing."""


def _renamed(messages: tuple[Message, ...], role: str) -> list[object]:
    """*messages* with the system's role by the name its model has for it."""
    return [{"role": role, "content": m.content} if m.role == _SYSTEM else m for m in messages]


def _text(content: str | list[_Part] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text or "" for part in content or ())


def _thinking(words: _Words) -> str:
    thinking = words.reasoning_content or words.reasoning or ""
    if isinstance(words.content, list):
        thinking += "".join(_text(part.thinking) for part in words.content)
    return thinking


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


def _status(said: ErrorBody) -> int:
    """The status of an error that came under 200. OpenRouter and Gemini give it as the code."""
    code = whole_number(said.code)
    if code is not None and 400 <= code < 600:
        return code
    return STATUS_BY_TYPE.get(said.code) or STATUS_BY_TYPE.get(said.type, 500)


def _limit(headers: Headers, names: tuple[str, str, str]) -> LimitState | None:
    of_limit, of_remaining, of_reset = names
    text = headers.get(of_limit)
    limit, remaining = count(text), count(headers.get(of_remaining))
    # A limit that is no number (Azure: -1) makes "0 remaining" no fact either.
    if limit is None and (text is not None or remaining is None):
        return None
    return LimitState(limit, remaining, seconds(headers.get(of_reset)))


def _left(state: LimitState) -> float:
    return inf if state.remaining is None else state.remaining
