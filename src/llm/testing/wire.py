"""The words that the simulator's two dialects share: an answer before it is spelled, a problem, and the port."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec

from .window import Account

Stop = Literal["end", "length", "stop_sequence"]


class Problem(msgspec.Struct, frozen=True):
    """An error in a vendor's words."""

    status: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What will be said, one string a token; joined they are the text."""

    id: str
    created: int
    model: str
    tokens: tuple[str, ...]
    stop: Stop
    stop_sequence: str | None
    input_tokens: int
    include_usage: bool


class Dialect(Protocol):
    """How one vendor spells requests, answers, errors and limits."""

    name: Literal["anthropic", "openai"]
    counts_rejected: bool
    problems: Mapping[str, Problem]

    def check(self, body: Any, headers: Mapping[str, str]) -> Problem | None:
        """What the vendor would object to in a request, or None."""
        ...

    def asked(self, body: dict[str, Any]) -> tuple[int | None, list[str]]:
        """The most output tokens and the stop sequences that the request allows."""
        ...

    def complete(self, answer: Answer) -> bytes: ...

    def stream(self, answer: Answer) -> tuple[bytes, list[bytes], bytes, bytes]:
        """The opening, the deltas, the closing without its terminal event, and the terminal event."""
        ...

    def error(self, problem: Problem, request_id: str) -> bytes: ...

    def error_event(self, problem: Problem, request_id: str) -> bytes: ...

    def refused(self, dimension: str) -> Problem:
        """The 429 for a full window."""
        ...

    def unknown_model(self, model: str) -> Problem: ...

    def headers(self, account: Account, owner: str, request_id: str, now: float) -> dict[str, str]:
        """Whose the key is, and what is left of the limits."""
        ...

    def retry_after(self, seconds: float) -> dict[str, str]:
        """How the vendor tells a wait: never shorter than the truth."""
        ...

    def models(self, models: tuple[str, ...]) -> bytes: ...

    def model(self, model: str) -> bytes: ...


_TOKEN = re.compile(r"\s*\S+")


def tokenize(text: str) -> list[str]:
    """Split text into the simulator's tokens: a word with the white space before it."""
    tokens = _TOKEN.findall(text)
    if tokens:
        tokens[-1] += text[sum(map(len, tokens)) :]
    return tokens


def text_of(content: Any) -> str:
    """The text of a message's content, be it a string or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""


def count_input(body: Mapping[str, Any]) -> int:
    """The simulator's input tokens: for each message ``ceil(bytes / 4) + 4``, the system prompt being one of them.

    Bytes are those of the text in UTF-8; a part that is not text counts with its JSON.
    """
    total = 0
    contents = [m.get("content") for m in body.get("messages", ()) if isinstance(m, dict)]
    if body.get("system"):
        contents.append(body["system"])
    for content in contents:
        size = 0
        if isinstance(content, str):
            size = len(content) if content.isascii() else len(content.encode("utf-8", "replace"))
        elif isinstance(content, list):
            for part in content:
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    size += len(part["text"].encode("utf-8", "replace"))
                else:
                    size += len(msgspec.json.encode(part))
        total += -(-size // 4) + 4
    return total


def whole_seconds(seconds: float) -> str:
    """Seconds rounded up, so that a client which obeys is never early."""
    return str(math.ceil(seconds))
