"""The words that the simulator's two dialects share: an answer before it is spelled, a problem, and the port."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec

from .saying import Block, Wishes
from .window import Account

Stop = Literal["end", "length", "stop_sequence", "tool_calls"]
Name = Literal["anthropic", "openai", "openai_responses"]


class Problem(msgspec.Struct, frozen=True):
    """An error in a vendor's words."""

    status: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What will be said, and what is told with it."""

    id: str
    created: int
    model: str
    blocks: tuple[Block, ...]
    stop: Stop
    stop_sequence: str | None
    input_tokens: int
    include_usage: bool
    cache_read: int = 0
    cache_written: int = 0
    """Parts of the input."""

    @property
    def output_tokens(self) -> int:
        return sum(len(block.tokens) for block in self.blocks)

    @property
    def thought_tokens(self) -> int:
        return sum(len(block.tokens) for block in self.blocks if block.kind == "thinking")

    @property
    def text(self) -> str:
        return "".join(block.text for block in self.blocks if block.kind == "text")


class Dialect(Protocol):
    """How one vendor spells requests, answers, errors and limits."""

    name: Name
    counts_rejected: bool
    problems: Mapping[str, Problem]

    def check(self, body: Any, headers: Mapping[str, str]) -> Problem | None:
        """What the vendor would object to in a request, or None."""
        ...

    def asked(self, body: dict[str, Any]) -> tuple[int | None, list[str]]:
        """The most output tokens and the stop sequences that the request allows."""
        ...

    def wishes(self, body: dict[str, Any]) -> Wishes:
        """What the request asks for beyond text."""
        ...

    def prefix(self, body: dict[str, Any]) -> Any:
        """The part of the request that a prompt cache keeps, None if there is none."""
        ...

    def complete(self, answer: Answer) -> bytes: ...

    def stream(self, answer: Answer) -> tuple[bytes, list[bytes], bytes, bytes]:
        """The opening, the deltas, the closing without its terminal event, and the terminal event."""
        ...

    def counted(self, tokens: int) -> bytes:
        """The answer to a request that only wants to know how many tokens it has."""
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


def text_of(content: Any) -> str:
    """The text of a message's content, be it a string or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""


def count_input(body: Mapping[str, Any]) -> int:
    """The simulator's input tokens: for each message ``ceil(bytes / 4) + 4``, the system prompt being one of them.

    Bytes are those of the text in UTF-8; a part that is not text, an item that is no message, and the tools count with
    their JSON.
    """
    total = 0
    asked = body.get("input", ()) if "input" in body else body.get("messages", ())
    items = [{"content": asked}] if isinstance(asked, str) else asked
    contents: list[Any] = [item.get("content", [item]) for item in items if isinstance(item, dict)]
    for name in ("system", "instructions"):
        if body.get(name):
            contents.append(body[name])
    if body.get("tools"):
        contents.append(body["tools"])
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
