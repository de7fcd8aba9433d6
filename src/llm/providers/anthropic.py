"""Anthropic's Messages API as pure functions.

What this dialect decides where the vendor leaves a choice:

* *System messages.* Those that open the conversation become ``system``, joined by a blank line. One in its midst stays
  in its place for the models that take it there; for all others it is moved to ``system``: the instruction is kept, its
  place is not.
* *max_tokens* is required by the vendor. Unasked, ``DEFAULT_MAX_TOKENS`` bounded by what the model can write.
* *Version.* ``2023-06-01`` unless configured: the last one that takes sampling parameters at all.
* *The end of a stream* is ``message_stop`` and nothing else.

Sources: the vendor's API reference for both versions, and the errors it was seen to answer with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final
from urllib.parse import quote

import msgspec

from ..core.content import Opaque, Part, Text, Thinking, ToolCall
from ..core.exceptions import (
    LLMContentFilteredError,
    LLMException,
    LLMInvalidRequestError,
    LLMModelNotFoundError,
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
    ModelInfo,
    ObservedLimits,
    Options,
    Request,
    StopReason,
    StreamChunk,
    ToolCallDelta,
    Usage,
)
from ..transports.base import HTTPRequest
from ..utils.error_body import UNREADABLE, ErrorBody, read_error_body
from ..utils.http_errors import build_error, error_for_status, unreadable
from ..utils.json_body import encode_body
from .anthropic_messages import (
    CACHE,
    DIALECT,
    ask_for_format,
    ask_for_thinking,
    ask_for_tools,
    how_to_format,
    wire_messages,
    wire_system,
)
from .base import Encoded
from .catalog import Family, Refuse, asked, catalog, leave_out, rules_for
from .event_stream import EventStream
from .listing import only, read_count, read_models
from .quota import Groups, count, merged, owners, seconds_until

BASE_URL: Final = "https://api.anthropic.com"
API_VERSION: Final = "2023-06-01"

DEFAULT_MAX_TOKENS: Final = 16_384
"""Some 12,000 words, thinking included. An unstreamed answer that may take longer than ten minutes (21,333 tokens by
the vendor's reckoning) is better streamed, so what nobody asked for stays below that."""
MAX_UNSTREAMED: Final = 21_333
"""Tokens of an answer that is waited for in one piece: by the vendor's reckoning (128,000 in an hour) ten minutes."""
CUSTOM_MAX_TOKENS: Final = 4_096
"""The same under a custom address, where the model may have a small context that answer and prompt share."""

COUNTED: Final = frozenset(
    ("messages", "model", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control")
)
"""Members of a request that its tokens are counted by."""

STOP_REASON: Final = {
    "end_turn": StopReason.STOP,
    "stop_sequence": StopReason.STOP,
    "max_tokens": StopReason.LENGTH,
    "model_context_window_exceeded": StopReason.LENGTH,
    "tool_use": StopReason.TOOL_CALLS,
    "pause_turn": StopReason.PAUSED,
    "refusal": StopReason.CONTENT_FILTER,
}

STATUS_BY_TYPE: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""The status an error would have had if it had not come under 200, in a stream or a body."""

ERROR_BY_CODE: Final[dict[str, type[LLMException]]] = {
    "billing_error": LLMQuotaExhaustedError,
    "enforced_spend_limit_reached": LLMQuotaExhaustedError,
    "contract_spend_limit_reached": LLMQuotaExhaustedError,
}
"""Types and ``details.error_code`` that mean the same under any status: the vendor's spend limits are 400 and 429."""

ERROR_BY_OPENING: Final[dict[str, type[LLMException]]] = {
    "You have reached your specified API usage limits": LLMQuotaExhaustedError,
    "Your credit balance is too low": LLMQuotaExhaustedError,
    "Output blocked by content filtering policy": LLMContentFilteredError,
}
"""First words of an ``invalid_request_error``, where the vendor has no code."""

_LIMIT_HEADERS: Final = tuple(
    (f"anthropic-ratelimit-{name}-limit", f"anthropic-ratelimit-{name}-remaining", f"anthropic-ratelimit-{name}-reset")
    for name in ("requests", "input-tokens", "output-tokens", "tokens")
)
# The dialect has no word for these, at any address.
_NO_WORD: Final = frozenset(("frequency_penalty", "presence_penalty", "seed", "n"))
# Versions after 2023-06-01 have lost these, for every model.
_SAMPLING: Final = frozenset(("temperature", "top_p", "top_k"))
_NOTHING_ASKED: Final = Options()
_SYSTEM: Final = MessageRole.SYSTEM

_NOTHING: Final = msgspec.Raw()

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class _CacheCreation(msgspec.Struct, gc=False):
    ephemeral_5m_input_tokens: _Tokens | None = None
    ephemeral_1h_input_tokens: _Tokens | None = None


class _OutputDetails(msgspec.Struct, gc=False):
    thinking_tokens: _Tokens | None = None


class _Usage(msgspec.Struct, gc=False):
    input_tokens: _Tokens | None = None
    cache_creation_input_tokens: _Tokens | None = None
    cache_read_input_tokens: _Tokens | None = None
    cache_creation: _CacheCreation | None = None
    output_tokens: _Tokens | None = None
    output_tokens_details: _OutputDetails | None = None


class _StopDetails(msgspec.Struct, gc=False):
    category: str | None = None
    explanation: str | None = None


class _Block(msgspec.Struct, gc=False):
    """A content block or a delta: of what we do not know, only the type is read."""

    type: str = ""
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = _NOTHING


class _PlainReply(msgspec.Struct, gc=False):
    """A message without its usage, which must not spoil a good answer if it cannot be read."""

    type: str | None = None
    id: str | None = None
    model: str | None = None
    content: list[_Block] | None = None
    stop_reason: str | None = None
    stop_details: _StopDetails | None = None


class _Reply(_PlainReply, gc=False):
    usage: _Usage | None = None


class _Delta(msgspec.Struct, gc=False):
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    signature: str | None = None
    stop_reason: str | None = None
    stop_details: _StopDetails | None = None


class _PlainEvent(msgspec.Struct, gc=False):
    """Any event of a stream, without usage."""

    type: str = ""
    delta: _Delta | None = None
    content_block: _Block | None = None
    message: _PlainReply | None = None


class _Event(_PlainEvent, gc=False):
    message: _Reply | None = None
    usage: _Usage | None = None


class _RawReply(msgspec.Struct):
    """The blocks as they came, for those that have to go back so."""

    content: list[msgspec.Raw] = []


class _RawStart(msgspec.Struct):
    content_block: dict[str, Any] = {}


class _Named(msgspec.Struct, gc=False):
    type: str = ""


_decode_reply: Final = msgspec.json.Decoder(_Reply).decode
_decode_plain_reply: Final = msgspec.json.Decoder(_PlainReply).decode
_decode_event: Final = msgspec.json.Decoder(_Event).decode
_decode_plain_event: Final = msgspec.json.Decoder(_PlainEvent).decode
_decode_raw_reply: Final = msgspec.json.Decoder(_RawReply).decode
_decode_raw_start: Final = msgspec.json.Decoder(_RawStart).decode
_decode_named: Final = msgspec.json.Decoder(_Named).decode

# The events whose loss would change the answer; whatever else cannot be read is ignored like an unknown one.
_ESSENTIAL: Final = frozenset(("message_start", "content_block_start", "content_block_delta", "message_delta"))


class AnthropicProvider:
    """The Messages dialect at one address. It implements ``providers.base.Provider``."""

    def __init__(self, settings: ProviderSettings) -> None:
        vendor = catalog().anthropic
        self.name = settings.name
        self.default_model: str | None = vendor.default
        self._vendor = vendor
        self._custom = settings.custom
        self._settings = settings
        self._strict = settings.unsupported == "raise"
        self._extra_body = settings.extra_body
        version = settings.api_version or API_VERSION
        self._refused = _NO_WORD if version == API_VERSION else _NO_WORD | _SAMPLING
        # The vendor's base URL has no /v1, OpenAI's has; who writes it here anyway means the same address.
        base, mark, query = (settings.base_url or BASE_URL).partition("?")
        base = base.rstrip("/").removesuffix("/v1")
        self._url = f"{base}/v1/messages{mark}{query}"
        self._probe_url = f"{base}/v1/models{mark}{query}"
        self._extra_headers = {name.lower(): value for name, value in settings.extra_headers.items()}
        self._headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "anthropic-version": version,
        }
        self._stream_headers = self._headers | {"accept": "text/event-stream"}
        self._families: dict[str, Family] = {}
        self._groups = Groups(settings, vendor)
        # What is produced counts, as it is, and `max_tokens` not at all. Whether refused requests do is not documented.
        known = Counting(
            reserve_max=False,
            cache_reads=False,
            rejected=True,
            cache_reads_of=frozenset() if settings.custom else vendor.cache_reads_of,
        )
        self.counting = merged(known, settings.counting)

    def __repr__(self) -> str:
        return f"<AnthropicProvider {self.name}>"

    def encode(self, request: Request, key: str) -> Encoded:
        """The HTTP request for *request*.

        Raises LLMInvalidRequestError, naming option and model, for what the model or the dialect is known to refuse.
        """
        options = request.options
        model = request.model
        family = self._families.get(model) or self._learn(model)
        limit = options.max_tokens
        messages = request.messages
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": family.max_output if limit is None else limit,
            "messages": messages,
        }
        for message in messages:
            if message.role is _SYSTEM or message.cache or type(message.content) is not str:
                system, turns = _split_system(messages, in_place=family.system_turns)
                body["messages"] = wire_messages(turns)
                if system:
                    body["system"] = wire_system(system)
                break
        if not family.prefill and messages and _is_prefill(messages[-1]):
            raise LLMInvalidRequestError(
                f"messages[{len(messages) - 1}]: {model} does not continue an assistant's message; end with the user's",
                provider=self.name,
                model=model,
            )
        if not body["messages"]:
            raise LLMInvalidRequestError(
                "messages: there is nothing to answer; add a message of the user's", provider=self.name, model=model
            )
        # Longer answers may take more than the ten minutes after which the vendor closes a silent connection.
        streamed = request.stream or body["max_tokens"] > MAX_UNSTREAMED
        if streamed:
            body["stream"] = True
        dropped: tuple[str, ...] = ()
        if options != _NOTHING_ASKED:
            dropped = self._ask(body, options, family, model)
        headers = {**(self._stream_headers if streamed else self._headers), "x-api-key": key}
        if self._extra_headers or options.extra_headers:
            self._merge_headers(headers, options.extra_headers)
        encoded = encode_body(body, self._extra_body, options.extra_body, provider=self.name, model=model)
        return Encoded(HTTPRequest("POST", self._url, headers, encoded), dropped, streamed and not request.stream)

    def decode(self, request: Request, status: int, headers: Headers, body: bytes) -> LLMResponse:
        """The answer in a complete *body*. Raises what ``classify`` says for a failure, under whatever status."""
        if not 200 <= status < 300:
            raise self.classify(request, status, headers, body)
        try:
            reply = _decode_reply(body)
        except UNREADABLE:
            reply = self._reply_without_usage(request, status, headers, body)
        if reply.type == "error" or (reply.content is None and reply.stop_reason is None):
            raise self.classify(request, status, headers, body)
        text = thinking = ""
        content: tuple[Part, ...] = ()
        for block in reply.content or ():
            if block.type == "text":
                text += block.text or ""
            else:
                try:
                    content = _parts(reply.content or (), body)
                except UNREADABLE:
                    # What was skipped before may hold bytes that are no text.
                    raise self.classify(request, status, headers, body) from None
                break
        reason = reply.stop_reason
        stop = STOP_REASON.get(reason or "", StopReason.UNKNOWN)
        if content:
            if (name := self.format_tool(request)) is not None:
                content, stop = _without_format(content, name, stop)
            text = "".join([part.text for part in content if type(part) is Text])
            thinking = "".join([part.text for part in content if type(part) is Thinking])
            if all(type(part) is Text for part in content):
                content = ()
        return LLMResponse(
            text=text,
            model=reply.model or request.model,
            usage=_usage(reply.usage) if reply.usage is not None else Usage(),
            stop_reason=stop,
            refusal=_refusal(reply.stop_details) if reason == "refusal" else None,
            thinking=thinking,
            content=content,
            id=reply.id or "",
            provider=self.name,
            request_id=headers.get("request-id"),
            body=body,
        )

    def stream_decoder(self, request: Request) -> AnthropicStream:
        return AnthropicStream(self, request)

    def classify(self, request: Request, status: int, headers: Headers, body: bytes) -> LLMException:
        """The error that *body* means under *status*; of a status 2xx, the error the body tells of."""
        said = read_error_body(body)
        code = said.details.get("error_code")
        code = code if isinstance(code, str) else ""
        if status < 300:
            if not said.is_error:
                return unreadable(
                    f"status {status} and a body that is no message", body, provider=self.name, model=request.model
                )
            status = STATUS_BY_TYPE.get(said.type, 500)
        error = ERROR_BY_CODE.get(code) or ERROR_BY_CODE.get(said.type) or error_for_status(status)
        if error is LLMInvalidRequestError:
            error = self._invalid(request, status, said)
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
            code=code or said.type or None,
            request_id=headers.get("request-id") or said.request_id,
            obey_retry=not self._custom,
            hint=hint,
        )

    def limits(self, headers: Headers) -> ObservedLimits | None:
        """The ``anthropic-ratelimit-*`` headers. Resets are dates and so count from the response's own ``Date``."""
        date = headers.get("date")
        requests, given, made, tokens = [_limit(headers, names, date) for names in _LIMIT_HEADERS]
        named = owners(headers.get("anthropic-organization-id"), headers.get("anthropic-workspace-id"), None)
        if requests is given is made is tokens is None and not named:
            return None
        return ObservedLimits(requests, given, made, tokens, named)

    def group(self, model: str) -> str:
        """The configured group of *model*, or what the vendor is known to limit together."""
        return self._groups[model]

    def goes_on(self, model: str) -> bool:
        """As models.toml says of *model*; behind another address, yes."""
        return (self._families.get(model) or self._learn(model)).prefill

    def probe(self, key: str) -> HTTPRequest:
        """The list of models: free, and refused like any other request if the key is."""
        headers = {**self._headers, "x-api-key": key}
        self._merge_headers(headers, None)
        del headers["content-type"]
        return HTTPRequest("GET", self._probe_url, headers)

    def models_request(self, key: str, after: str | None) -> HTTPRequest:
        """A page of the list of models."""
        probe = self.probe(key)
        mark = "&" if "?" in probe.url else "?"
        following = f"&after_id={quote(after, safe='')}" if after is not None else ""
        return HTTPRequest("GET", f"{probe.url}{mark}limit=1000{following}", probe.headers)

    def read_models(self, body: bytes) -> tuple[list[ModelInfo], str | None]:
        """The models of a page, and the last of them if more follow."""
        return read_models(body, None if self._custom else self._vendor, provider=self.name)

    def count_request(self, request: Request, key: str) -> HTTPRequest:
        """The request that asks how many tokens *request* has."""
        asked = self.encode(request, key).request
        address, mark, query = asked.url.partition("?")
        headers = asked.headers | {"accept": "application/json"}
        return HTTPRequest("POST", f"{address}/count_tokens{mark}{query}", headers, only(asked.body, COUNTED))

    def read_count(self, body: bytes) -> int:
        """The number in its answer."""
        return read_count(body, provider=self.name)

    def replacement(self, model: str) -> str | None:
        """The successor of a model that had retired when ``models.toml`` was last checked."""
        gone = None if self._custom else self._vendor.retirement(model)
        return gone.use if gone is not None and gone.on <= catalog().as_of else None

    def format_tool(self, request: Request) -> str | None:
        """The name of the tool that stands for the answer's form, None if none does."""
        wanted = request.options.output_format
        if wanted is None:
            return None
        family = self._families.get(request.model) or self._learn(request.model)
        return wanted.name if how_to_format(wanted, family) == "tool" else None

    def _learn(self, model: str) -> Family:
        """The rules for *model*, remembered."""
        family = rules_for(model, self._settings, self._vendor)
        least = CUSTOM_MAX_TOKENS if self._custom else DEFAULT_MAX_TOKENS
        most = min(family.max_output or least, DEFAULT_MAX_TOKENS)
        family = msgspec.structs.replace(family, max_output=most)
        if len(self._families) >= 256:
            # Names may come from the application's own users.
            self._families.clear()
        self._families[model] = family
        return family

    def _ask(self, body: dict[str, Any], options: Options, family: Family, model: str) -> tuple[str, ...]:
        """Put what *options* ask into *body*; the names of the hints that the model refuses."""
        wishes = asked(options)
        refused = self._refused | family.refuses
        refuse = Refuse(self.name, model)
        ask_for_tools(body, options, family, refuse=refuse)
        if ask_for_thinking(body, options, family, refuse=refuse) and not self._custom:
            refused |= _SAMPLING
        if options.output_format is not None:
            how = how_to_format(options.output_format, family)
            ask_for_format(body, options.output_format, how, refuse=refuse)
        if options.cache:
            body["cache_control"] = CACHE
        if family.temperature_or_top_p and "temperature" in wishes:
            refused |= {"top_p"}
        strict = options.unsupported == "raise" if options.unsupported is not None else self._strict
        dropped = leave_out(wishes, refused, strict=strict, provider=self.name, model=model)
        stop = wishes.pop("stop", None)
        if stop:
            body["stop_sequences"] = (stop,) if isinstance(stop, str) else stop
        body.update(wishes)
        return dropped

    def _merge_headers(self, headers: dict[str, str], extra: dict[str, str] | None) -> None:
        headers.update(self._extra_headers)
        if extra:
            headers.update({name.lower(): value for name, value in extra.items()})
        # The vendor takes the key in one header or the other, and some proxies refuse both.
        if "authorization" in headers:
            headers.pop("x-api-key", None)

    def _reply_without_usage(self, request: Request, status: int, headers: Headers, body: bytes) -> _Reply:
        try:
            plain = _decode_plain_reply(body)
        except UNREADABLE:
            raise self.classify(request, status, headers, body) from None
        return _Reply(plain.type, plain.id, plain.model, plain.content, plain.stop_reason, plain.stop_details)

    def _invalid(self, request: Request, status: int, said: ErrorBody) -> type[LLMException]:
        """What kind of invalid: the vendor has a code for hardly any."""
        # At the vendor's own address the path is right, so all that can be missing is the model.
        if status == 404 and said.type == "not_found_error" and (not self._custom or request.model in said.message):
            return LLMModelNotFoundError
        for opening, error in ERROR_BY_OPENING.items():
            if said.message.startswith(opening):
                return error
        return LLMInvalidRequestError


class AnthropicStream(EventStream):
    """Decodes one streamed message. It implements ``providers.base.StreamDecoder``.

    ``message_start`` → (``content_block_start`` → ``content_block_delta``… → ``content_block_stop``)… →
    ``message_delta``… → ``message_stop``; ``ping`` and ``error`` may come anywhere. The last chunk comes with
    ``message_stop``: until then neither the stop reason nor the usage is final.
    """

    __slots__ = ("_block", "_calls", "_format", "_refusal", "_usage")

    terminal = "message_stop"

    def __init__(self, provider: AnthropicProvider, request: Request) -> None:
        super().__init__(provider, request)
        self._usage: _Usage | None = None
        self._refusal = ""
        self._block: _Open | None = None
        """The block under way, if it is not text."""
        self._calls = 0
        self._format = provider.format_tool(request)

    def _take(self, payloads: list[bytes], chunks: list[StreamChunk]) -> None:
        # This loop runs for every token of every stream: what does not change is looked up once.
        decode, say = _decode_event, chunks.append
        for data in payloads:
            try:
                event = decode(data)
            except UNREADABLE:
                try:
                    event = _without_usage(data)
                except UNREADABLE:
                    self._fail("an event of the stream cannot be read", data)
                    return
            kind = event.type
            # Nearly all events are deltas.
            if kind == "content_block_delta":
                delta = event.delta
                if delta is None:
                    continue
                block = self._block
                if delta.text:
                    self._content = True
                    say(StreamChunk(delta.text))
                elif delta.thinking:
                    self._content = True
                    say(StreamChunk("", delta.thinking))
                    if block is not None:
                        block.pieces.append(delta.thinking)
                elif block is not None:
                    if delta.partial_json:
                        self._write(block, delta.partial_json, say)
                    elif delta.signature:
                        block.signature = delta.signature
            elif kind == "content_block_start":
                begun = event.content_block
                if begun is not None:
                    if begun.type != "text":
                        self._begin(begun, data, chunks)
                        if self.error is not None:
                            return
                    elif begun.text:
                        self._content = True
                        say(StreamChunk(begun.text))
            elif kind == "content_block_stop":
                if self._block is not None:
                    self._complete(self._block, chunks)
            elif kind == "message_start":
                if event.message is not None:
                    self.id = event.message.id or self.id
                    self.model = event.message.model or self.model
                    self._count(event.message.usage)
            elif kind == "message_delta":
                delta = event.delta
                if delta is not None and delta.stop_reason is not None:
                    self.stop_reason = STOP_REASON.get(delta.stop_reason, StopReason.UNKNOWN)
                    if self._format is not None and not self._calls and self.stop_reason is StopReason.TOOL_CALLS:
                        # The tool was the form of the answer.
                        self.stop_reason = StopReason.STOP
                    if delta.stop_reason == "refusal":
                        self._refusal = _refusal(delta.stop_details) or ""
                self._count(event.usage)
            elif kind == "message_stop":
                if self._block is not None:
                    self._complete(self._block, chunks)
                self.done = True
                self.stop_reason = self.stop_reason or StopReason.UNKNOWN
                chunks.append(StreamChunk(refusal=self._refusal, stop_reason=self.stop_reason, usage=self.usage))
                return
            elif kind == "error":
                self.error = self._provider.classify(self._request, 200, {}, data)
                return

    def _write(self, block: _Open, piece: str, say: Callable[[StreamChunk], None]) -> None:
        """More of a tool's arguments, or of the answer itself where a tool stands for its form."""
        block.pieces.append(piece)
        if block.call >= 0:
            self._content = True
            say(StreamChunk("", "", "", None, None, ToolCallDelta(block.call, "", "", piece)))
        elif block.is_format:
            self._content = True
            say(StreamChunk(piece))

    def _begin(self, block: _Block, data: bytes, chunks: list[StreamChunk]) -> None:
        """A block that is not text has begun."""
        if self._block is not None:
            self._complete(self._block, chunks)
        try:
            start = _decode_raw_start(data).content_block
        except UNREADABLE:
            # What was skipped before may hold bytes that are no text.
            self._fail("an event of the stream cannot be read", data)
            return
        self._block = opened = _Open(start)
        if block.type == "tool_use":
            if self._format is not None and block.name == self._format:
                opened.is_format = True
                return
            opened.call, self._calls = self._calls, self._calls + 1
            self._content = True
            chunks.append(StreamChunk(tool_call=ToolCallDelta(opened.call, block.id or "", block.name or "")))
        elif block.thinking:
            self._content = True
            opened.pieces.append(block.thinking)
            chunks.append(StreamChunk("", block.thinking))

    def _complete(self, block: _Open, chunks: list[StreamChunk]) -> None:
        self._block = None
        if block.is_format:
            return
        self._content = True
        chunks.append(StreamChunk(part=block.part()))

    def _count(self, usage: _Usage | None) -> None:
        """Overwrite what *usage* tells and keep what it does not: the figures are cumulative."""
        if usage is None:
            return
        if self._usage is not None:
            for name, value in msgspec.structs.asdict(self._usage).items():
                if getattr(usage, name) is None:
                    setattr(usage, name, value)
        self._usage = usage
        self.usage = _usage(usage)


class _Open(msgspec.Struct):
    """A block under way that is not text: what it began with, and what has come since."""

    start: dict[str, Any]
    pieces: list[str] = []
    signature: str = ""
    call: int = -1
    """Which of the answer's tool calls it is."""
    is_format: bool = False
    """Whether it stands for the answer itself."""

    def part(self) -> Part:
        """The block as it is when it has ended."""
        start, pieces = self.start, "".join(self.pieces)
        kind = start.get("type", "")
        if kind == "tool_use":
            arguments = pieces or msgspec.json.encode(start.get("input") or {}).decode()
            return ToolCall(str(start.get("id", "")), str(start.get("name", "")), arguments)
        if kind == "thinking":
            start = {**start, "thinking": pieces}
            if self.signature:
                start["signature"] = self.signature
            return Thinking(pieces, msgspec.json.encode(start), DIALECT)
        if kind == "redacted_thinking":
            return Thinking("", msgspec.json.encode(start), DIALECT)
        if pieces:
            # A tool of the vendor's own: its arguments came as ours do.
            try:
                start = {**start, "input": msgspec.json.decode(pieces)}
            except msgspec.DecodeError:
                start = {**start, "input": pieces}
        return Opaque(str(kind), msgspec.json.encode(start), DIALECT)


def _parts(blocks: Sequence[_Block], body: bytes) -> tuple[Part, ...]:
    """The blocks of an answer that is not all text."""
    found: list[Part] = []
    for block, raw in zip(blocks, _decode_raw_reply(body).content, strict=True):
        kind = block.type
        if kind == "text":
            if block.text:
                found.append(Text(block.text))
        elif kind == "thinking" or kind == "redacted_thinking":
            found.append(Thinking(block.thinking or "", bytes(raw), DIALECT))
        elif kind == "tool_use":
            arguments = bytes(block.input).decode()
            found.append(
                ToolCall(block.id or "", block.name or "", arguments if arguments not in ("", "null") else "{}")
            )
        else:
            found.append(Opaque(kind, bytes(raw), DIALECT))
    return tuple(found)


def _without_format(parts: tuple[Part, ...], name: str, stop: StopReason) -> tuple[tuple[Part, ...], StopReason]:
    """*parts* with the tool that stands for the answer's form read as the answer's text."""
    read = tuple(Text(p.arguments) if type(p) is ToolCall and p.name == name else p for p in parts)
    called = any(type(part) is ToolCall for part in read)
    return read, StopReason.STOP if stop is StopReason.TOOL_CALLS and not called else stop


def _is_prefill(message: Message) -> bool:
    """Whether *message* is an answer's beginning; one that the vendor paused is not, and is sent back as it was."""
    if message.role is not MessageRole.ASSISTANT:
        return False
    return isinstance(message.content, str) or not any(type(part) is Opaque for part in message.content)


def _split_system(messages: tuple[Message, ...], *, in_place: bool) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """What goes into ``system`` and what stays: of the system's messages, those after the first turn if *in_place*."""
    if in_place:
        first = next((i for i, message in enumerate(messages) if message.role != _SYSTEM), len(messages))
        moved, stay = messages[:first], messages[first:]
    else:
        moved = tuple(message for message in messages if message.role == _SYSTEM)
        stay = tuple(message for message in messages if message.role != _SYSTEM)
    return moved, stay


def _without_usage(data: bytes) -> _Event:
    """The event of which the figures cannot be read; or, of one that we do not know, its name alone."""
    try:
        plain = _decode_plain_event(data)
    except msgspec.ValidationError:
        named = _decode_named(data)
        if named.type in _ESSENTIAL:
            raise
        return _Event(named.type)
    message = plain.message
    reply = _Reply(message.type, message.id, message.model) if message is not None else None
    return _Event(plain.type, plain.delta, plain.content_block, reply)


def _limit(headers: Headers, names: tuple[str, str, str], date: str | None) -> LimitState | None:
    of_limit, of_remaining, of_reset = names
    limit, remaining = count(headers.get(of_limit)), count(headers.get(of_remaining))
    if limit is None and remaining is None:
        return None
    return LimitState(limit, remaining, seconds_until(headers.get(of_reset), date))


def _usage(usage: _Usage) -> Usage:
    """Inclusive totals: the vendor's ``input_tokens`` are only those after the last cache breakpoint."""
    read = usage.cache_read_input_tokens or 0
    written = usage.cache_creation_input_tokens
    hour = 0
    if usage.cache_creation is not None:
        hour = usage.cache_creation.ephemeral_1h_input_tokens or 0
        if written is None:
            written = hour + (usage.cache_creation.ephemeral_5m_input_tokens or 0)
    written = written or 0
    details = usage.output_tokens_details
    return Usage(
        input_tokens=(usage.input_tokens or 0) + read + written,
        output_tokens=usage.output_tokens or 0,
        cache_read_tokens=read,
        cache_write_tokens=written,
        cache_write_1h_tokens=hour,
        reasoning_tokens=(details.thinking_tokens or 0) if details is not None else 0,
    )


def _refusal(details: _StopDetails | None) -> str | None:
    """The model's words on why it declined, else the category it declined for."""
    return details.explanation or details.category if details is not None else None
