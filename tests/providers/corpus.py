"""The golden files: what is sent, what comes back, and what it must mean.

``golden/<dialect>/requests.json``, ``replies.json`` and ``errors.json`` hold cases by name; a stream is the bytes of
``streams/<name>.sse``, and ``streams.json`` says what must become of it. ``expect`` lists only what the case is about.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llm.core.content import Part
from llm.core.exceptions import LLMException
from llm.core.settings import ProviderSettings
from llm.core.types import Message, MessageRole, Options, Request, StreamChunk, Usage
from llm.providers.anthropic import AnthropicProvider
from llm.providers.base import Provider, StreamDecoder
from llm.providers.openai import OpenAIProvider
from llm.providers.openai_responses import OpenAIResponses

GOLDEN = Path(__file__).parent / "golden"

Case = dict[str, Any]


DIALECTS: dict[str, Callable[[ProviderSettings], Provider]] = {
    "anthropic": AnthropicProvider,
    "openai": OpenAIProvider,
    "openai_responses": OpenAIResponses,
}
ASKED = {
    "anthropic": Request((Message(MessageRole.USER, "Hi"),), "claude-test"),
    "openai": Request((Message(MessageRole.USER, "Hi"),), "gpt-test"),
    "openai_responses": Request((Message(MessageRole.USER, "Hi"),), "gpt-test"),
}


def cases(kind: str) -> list[Any]:
    """The cases of one kind of golden file, of all dialects, as parameters (dialect, case) named after them."""
    return [pytest.param(name, case, id=f"{name}: {title}") for name in DIALECTS for title, case in _read(name, kind)]


def streams() -> list[Any]:
    """The streams of all dialects as parameters (dialect, bytes, case)."""
    found = []
    for name in DIALECTS:
        folder = GOLDEN / name / "streams"
        expected = _read(name, "streams")
        assert {path.stem for path in folder.iterdir()} == {title for title, _ in expected}
        for title, case in expected:
            data = (folder / f"{title}.sse").read_bytes()
            found.append(pytest.param(name, data, case, id=f"{name}: {title}"))
    return found


def _read(name: str, kind: str) -> list[tuple[str, Case]]:
    return list(msgspec.json.decode((GOLDEN / name / f"{kind}.json").read_bytes()).items())


def settings(name: str, case: Case | None = None) -> ProviderSettings:
    """The settings of *case* for the dialect *name*."""
    return msgspec.convert(
        {"name": name, "dialect": name, "keys": []} | (case or {}).get("settings", {}), ProviderSettings
    )


def provider(name: str, case: Case | None = None) -> Provider:
    """The dialect *name* with the settings of *case*."""
    return DIALECTS[name](settings(name, case))


def used(usage: Usage) -> dict[str, int]:
    """The figures that are not zero."""
    return {field: n for field, n in msgspec.structs.asdict(usage).items() if n}


def shown(parts: Sequence[Part]) -> list[Case]:
    """*parts* as JSON, with what is kept byte for byte in plain sight."""
    found: list[Case] = msgspec.to_builtins(list(parts))
    for part, built in zip(parts, found, strict=True):
        for name in ("raw", "extra"):
            if raw := getattr(part, name, b""):
                built[name] = msgspec.json.decode(raw)
    return found


def request(name: str, case: Case) -> Request:
    """The request that *case* is about; of the dialect's default model unless it names one.

    A message is a role, a text or parts as JSON, and whether it is to be cached.
    """
    return Request(
        tuple(
            msgspec.convert(dict(zip(("role", "content", "cache"), message, strict=False)), Message)
            for message in case.get("messages", [["user", "Hi"]])
        ),
        case.get("model") or provider(name).default_model or "",
        msgspec.convert(case.get("options", {}), Options),
        case.get("stream", False),
    )


def facts(error: LLMException | None) -> Case | None:
    """What an error says, in the words of the golden files."""
    if error is None:
        return None
    found = {
        "class": type(error).__name__,
        "message": error.message,
        "status": error.status,
        "code": error.code,
        "scope": error.scope.value,
        "retryable": error.retryable,
        "retry_after": error.retry_after,
        "request_id": error.request_id,
        "sent": error.sent,
        "phase": getattr(error, "phase", None),
    }
    return {name: value for name, value in found.items() if value is not None}


def assert_facts(error: LLMException | None, expected: Case | None) -> None:
    """*error* is what *expected* says, where it says something; a message need only contain what is expected."""
    found = facts(error)
    if found is None or expected is None:
        assert found == expected
        return
    said = {"sent": True} | expected
    assert said.pop("message", "") in found["message"]
    assert {name: found.get(name) for name in said} == said


def outcome(decoder: StreamDecoder, pieces: list[bytes]) -> Case:
    """What becomes of a stream that arrives in *pieces*: texts joined, and how it ended."""
    chunks: list[StreamChunk] = []
    for piece in pieces:
        chunks += decoder.feed(piece)
    chunks += decoder.end()
    last = chunks[-1] if chunks else None
    assert (last is not None and last.stop_reason is not None) == decoder.done, "the last chunk has the stop reason"
    assert all(chunk.stop_reason is None for chunk in chunks[:-1])
    if decoder.done and last is not None:
        assert (last.stop_reason, last.usage) == (decoder.stop_reason, decoder.usage)
    parts = shown([chunk.part for chunk in chunks if chunk.part is not None])
    return {
        **({"parts": parts} if parts else {}),
        "text": "".join(chunk.text for chunk in chunks),
        "thinking": "".join(chunk.thinking for chunk in chunks),
        "refusal": "".join(chunk.refusal for chunk in chunks),
        "stop_reason": decoder.stop_reason.value if decoder.stop_reason else None,
        "usage": used(decoder.usage) if decoder.usage else None,
        "done": decoder.done,
        "error": facts(decoder.error),
        "id": decoder.id,
        "model": decoder.model,
    }
