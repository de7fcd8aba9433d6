"""What must hold for any bytes a server may send: one function a target, which raises if it does not.

They need no fuzzer: `run.py` drives them with one, and the tests call them with the seeds. The first eight bytes of an
input choose settings, status and places to cut at; the rest is what the server sends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Final, NamedTuple

import msgspec

from llm.core.exceptions import LLMException
from llm.core.settings import ProviderSettings
from llm.core.types import LLMResponse, Message, MessageRole, Request, Usage
from llm.providers.anthropic import AnthropicProvider
from llm.providers.base import Provider
from llm.providers.openai import OpenAIProvider
from llm.providers.openai_responses import OpenAIResponses
from llm.utils.error_body import MAX_BODY, MAX_MESSAGE
from llm.utils.sse import SSEDecoder

HEAD: Final = 8
HEADERS_END: Final = b"\0\0"
"""Between the headers of a classified answer, a line each, and its body."""
STATUSES: Final = (200, 400, 401, 402, 403, 404, 408, 409, 413, 422, 425, 429, 498, 500, 502, 503, 504, 529, 302, 99)
SMALL_EVENT: Final = 64
BYTE_BY_BYTE: Final = 1500
"""Longer inputs are not fed byte by byte too: it would cost the fuzzer more than it could find."""


class Input(NamedTuple):
    """An input taken apart."""

    choice: int
    status: int
    pieces: list[bytes]
    body: bytes


def take_apart(data: bytes) -> Input:
    head, body = data[:HEAD].ljust(HEAD, b"\0"), data[HEAD:]
    cuts = sorted(int.from_bytes(head[i : i + 2], "big") % (len(body) + 1) for i in range(2, HEAD, 2))
    bounds = [0, *cuts, len(body)]
    pieces = [body[start:end] for start, end in pairwise(bounds)]
    return Input(head[0], STATUSES[head[1] % len(STATUSES)], pieces, body)


# ---------------------------------------------------------------- server-sent events


def sse(data: bytes) -> None:
    """However the bytes are cut, the events are the same; and they are those that the WHATWG's rules give."""
    given = take_apart(data)
    bounds = {"max_event_bytes": SMALL_EVENT} if given.choice % 2 else {}
    whole = _events([given.body], bounds)
    assert _events(given.pieces, bounds) == whole, "cut, the events are others"
    assert _events(_single_bytes(given.body), bounds) == whole, "byte by byte, the events are others"
    events, overflow, _ = whole
    for pieces in ([given.body], given.pieces, _single_bytes(given.body)):
        decoder = SSEDecoder(**bounds)
        payloads = [payload for piece in pieces for payload in decoder.payloads(piece)]
        assert payloads == [data for data, _, _ in events], "the payloads are not those of the events"
        assert decoder.overflow == overflow
    if overflow:
        assert events == _by_the_rules(given.body)[: len(events)]
    else:
        assert events == _by_the_rules(given.body)


def _events(pieces: Iterable[bytes], bounds: dict[str, int]) -> tuple[list[tuple[bytes, str, str]], bool, int | None]:
    decoder = SSEDecoder(**bounds)
    found = [event for piece in pieces for event in decoder.feed(piece)]
    return [(event.data, event.event, event.id) for event in found], decoder.overflow, decoder.retry


def _by_the_rules(stream: bytes) -> list[tuple[bytes, str, str]]:
    """The events of *stream*, a line at a time, as the standard's algorithm reads."""
    lines = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    events: list[tuple[bytes, str, str]] = []
    data, name, last_id = b"", b"", b""
    for line in lines[:-1]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                events.append((data[:-1], _text(name) or "message", _text(last_id)))
            data = name = b""
        elif field == b"data":
            data += value + b"\n"
        elif field == b"event":
            name = value
        elif field == b"id" and b"\0" not in value:
            last_id = value
    return events


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _single_bytes(body: bytes) -> list[bytes]:
    return [body[i : i + 1] for i in range(len(body))] if len(body) <= BYTE_BY_BYTE else [body]


# ---------------------------------------------------------------- dialects


def _providers(kind: Callable[[ProviderSettings], Provider], name: str) -> tuple[Provider, Provider]:
    """The dialect at its vendor's address, and at another."""
    base: dict[str, Any] = {"name": name, "dialect": name, "keys": []}
    there = msgspec.convert(base, ProviderSettings)
    elsewhere = msgspec.convert(base | {"base_url": "http://127.0.0.1:8000/v1"}, ProviderSettings)
    return kind(there), kind(elsewhere)


ANTHROPIC: Final = _providers(AnthropicProvider, "anthropic")
OPENAI: Final = _providers(OpenAIProvider, "openai")
RESPONSES: Final = _providers(OpenAIResponses, "openai_responses")
ASKED: Final = Request((Message(MessageRole.USER, "Hi"),), "the-model")


def _stream(providers: tuple[Provider, Provider]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        """However a stream is cut, it means the same; it is whole or has failed, and never raises."""
        given = take_apart(data)
        provider = providers[given.choice % 2]
        whole = _outcome(provider, [given.body])
        assert _outcome(provider, given.pieces) == whole, "cut, the stream means something else"
        assert _outcome(provider, _single_bytes(given.body)) == whole, "byte by byte, it means something else"

    return target


def _outcome(provider: Provider, pieces: Iterable[bytes]) -> list[Any]:
    decoder = provider.stream_decoder(ASKED)
    chunks = [chunk for piece in pieces for chunk in decoder.feed(piece)]
    chunks += decoder.end()
    assert decoder.done != (decoder.error is not None), "a stream is whole or has failed"
    assert all(chunk.stop_reason is None for chunk in chunks[:-1]), "only the last chunk ends the answer"
    for chunk in chunks:
        _writable(chunk.text, chunk.thinking, chunk.refusal)
    if decoder.done:
        assert chunks[-1].stop_reason is decoder.stop_reason is not None
    if decoder.usage is not None:
        _plausible(decoder.usage)
    _writable(decoder.id, decoder.model)
    return [chunks, decoder.usage, decoder.stop_reason, decoder.id, decoder.model, _facts(decoder.error)]


def _decode(providers: tuple[Provider, Provider]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        """A body is an answer or an error of ours."""
        given = take_apart(data)
        # Mostly 200: all other statuses are `classify` at once.
        status = given.status if given.choice & 2 else 200
        try:
            reply = providers[given.choice % 2].decode(ASKED, status, {}, given.body)
        except LLMException as error:
            _facts(error)
            return
        _check_reply(reply, given.body)

    return target


def _check_reply(reply: LLMResponse, body: bytes) -> None:
    assert reply.body == body
    _writable(reply.text, reply.thinking, reply.refusal or "", reply.model, reply.id, *reply.alternatives)
    _plausible(reply.usage)
    assert repr(reply)
    assert msgspec.json.encode(reply)


def _classify(providers: tuple[Provider, Provider]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        """Any answer that is no success is an error with a short message; any header is a limit or nothing."""
        given = take_apart(data)
        provider = providers[given.choice % 2]
        written, end, body = given.body.partition(HEADERS_END)
        headers: dict[str, str] = {}
        if end:
            for line in written.decode("latin-1").split("\n"):
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
        else:
            body = given.body
        error = provider.classify(ASKED, given.status, headers, body)
        assert isinstance(error, LLMException)
        assert error.sent
        _facts(error)
        limits = provider.limits(headers)
        for limit in (limits.requests, limits.input_tokens, limits.output_tokens, limits.tokens) if limits else ():
            if limit is not None:
                assert limit.limit is None or limit.limit >= 0
                assert limit.remaining is None or limit.remaining >= 0
                assert limit.reset_after is None or 0 <= limit.reset_after < math.inf

    return target


def _facts(error: LLMException | None) -> list[Any] | None:
    """What an error says, after a look at whether it may say so."""
    if error is None:
        return None
    assert error.message, "an error without a word"
    assert len(error.message) <= MAX_MESSAGE, "a message is a line for people"
    assert len(error.body) <= MAX_BODY
    assert error.code is None or isinstance(error.code, str)
    assert error.request_id is None or isinstance(error.request_id, str)
    assert error.retry_after is None or 0 <= error.retry_after < math.inf
    _writable(str(error), repr(error))
    scope, retryable, retry_after = error.scope, error.retryable, error.retry_after
    return [type(error), error.message, error.status, error.code, scope, retryable, retry_after, error.usage]


def _plausible(usage: Usage) -> None:
    for name, count in msgspec.structs.asdict(usage).items():
        assert count is None or 0 <= count <= 10**13, name


def _writable(*texts: str) -> None:
    """A lone surrogate would make an application's log or answer fail long after."""
    for text in texts:
        text.encode()


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "sse": sse,
    "anthropic_stream": _stream(ANTHROPIC),
    "openai_stream": _stream(OPENAI),
    "openai_responses_stream": _stream(RESPONSES),
    "anthropic_decode": _decode(ANTHROPIC),
    "openai_decode": _decode(OPENAI),
    "openai_responses_decode": _decode(RESPONSES),
    "anthropic_classify": _classify(ANTHROPIC),
    "openai_classify": _classify(OPENAI),
}
