"""Where fuzzing starts: the golden files, laid out as the targets read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from .targets import HEADERS_END, STATUSES

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "providers" / "golden"

CUTS = b"\x00\x11\x00\x85\x02\x03"
"""Three places to cut at, the last somewhere in the midst of most files."""

SSE = (
    b"",
    b"data: x\n\n",
    b"\xef\xbb\xbfdata: x\r\n\r\n",
    b"event: a\ndata: b\nid: 7\nretry: 10\n\n: no event\n\ndata\ndata:\ndata: c\n\n",
    b"data: " + b"y" * 60 + b"\n\ndata: " + b"z" * 61 + b"\r\rdata: a\n\n",
    b"id: a\0b\n\nid\n\nid: c\ndata:x\n\nevent:\xff\ndata:\xe2\x80\xa8\n\n",
)


def seeds(target: str) -> list[bytes]:
    """The inputs that *target* starts from, in a fixed order."""
    if target == "sse":
        bodies = [*SSE, *_streams("anthropic"), *_streams("openai"), *_streams("openai_responses")]
        return [bytes([choice, 0]) + CUTS + body for body in bodies for choice in (0, 1)]
    dialect, _, kind = target.rpartition("_")
    if kind == "stream":
        return [bytes([choice, 0]) + CUTS + body for body in _streams(dialect) for choice in (0, 1)]
    if kind == "decode":
        return [bytes([0, 0]) + CUTS + msgspec.json.encode(case["body"]) for case in _cases(dialect, "replies")]
    return [
        bytes([1 if "settings" in case else 0, _status(case["status"])]) + CUTS + _headers(case) + case["body"].encode()
        for case in _cases(dialect, "errors")
    ]


def _streams(dialect: str) -> Iterator[bytes]:
    for path in sorted((GOLDEN / dialect / "streams").glob("*.sse")):
        yield path.read_bytes()


def _cases(dialect: str, kind: str) -> list[dict[str, Any]]:
    return list(msgspec.json.decode((GOLDEN / dialect / f"{kind}.json").read_bytes()).values())


def _status(status: int) -> int:
    return STATUSES.index(status) if status in STATUSES else 0


def _headers(case: dict[str, Any]) -> bytes:
    lines = [f"{name}: {value}" for name, value in case.get("headers", {}).items()]
    return "\n".join(lines).encode() + HEADERS_END if lines else b""
