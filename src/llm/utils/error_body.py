"""What an error response says, whatever it is: a vendor's JSON, a gateway's array, a proxy's HTML, or nothing."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

MAX_MESSAGE: Final = 2048
"""Characters of a vendor's message that an exception repeats."""
MAX_BODY: Final = 64 * 1024
"""Bytes of a body that an exception keeps."""
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the JSON they should be; RecursionError when they nest too deep."""

_TITLE: Final = re.compile(rb"<(title|h1)[^>]{0,200}>([^<]{1,500})", re.IGNORECASE)
_TAG: Final = re.compile(r"<[^>]{0,500}>")
# A server's words go into logs: they may neither begin a line there nor command somebody's terminal.
_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class ErrorBody(msgspec.Struct, frozen=True):
    """The words of an error. A word that the body does not have is empty."""

    message: str = ""
    type: str = ""
    code: str = ""
    request_id: str | None = None
    details: dict[str, Any] = {}
    """Anthropic's ``error.details``."""
    structured: bool = False
    """Whether the body was a JSON object, and not a page or a text."""
    is_error: bool = False
    """Whether the object calls itself an error, which is what counts under status 200."""


def read_error_body(body: bytes) -> ErrorBody:
    """Read *body*; never raises.

    Understood are ``{"error": {…}}``, ``{"error": "text"}``, an array of these (Gemini), ``{"detail": …}`` (FastAPI),
    ``{"message": …}``, and text or HTML, of which the title is kept.
    """
    try:
        found = msgspec.json.decode(body)
    except UNREADABLE:
        return ErrorBody(message=_plain(body))
    while isinstance(found, list):
        found = found[0] if found else None
    if not isinstance(found, dict):
        return ErrorBody(message=_text(found))
    error = found.get("error")
    if not isinstance(error, dict):
        # A flat body carries the words itself; its ``error`` may be the message (Ollama) or a title (Spring).
        error = {"message": found.get("error")} | {k: v for k, v in found.items() if v and k != "error"}
    details = error.get("details")
    return ErrorBody(
        message=_text(error.get("message") or error.get("detail") or found.get("detail") or found.get("message")),
        type=_text(error.get("type") or error.get("status")),
        code=_text(error.get("code")),
        request_id=_text(found.get("request_id")) or None,
        details=details if isinstance(details, dict) else {},
        structured=True,
        is_error=bool(found.get("error")) or "error" in (found.get("type"), found.get("object")),
    )


def _text(value: Any) -> str:
    """A JSON value as a line for people: pydantic's lists of ``{loc, msg}`` and nested messages are unwrapped."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, (str, int, float)):
        return _UNPRINTABLE.sub(" ", str(value)[:MAX_MESSAGE])
    if isinstance(value, list):
        return "; ".join(_text(item) for item in value[:20])[:MAX_MESSAGE]
    # An object is all that is left.
    words = value.get("msg") or value.get("message") or value.get("detail")
    where = value.get("loc")
    if isinstance(words, str):
        place = ".".join(str(part) for part in where[:20]) + ": " if isinstance(where, list) else ""
        return _UNPRINTABLE.sub(" ", (place + words)[:MAX_MESSAGE])
    return _text(words)


def _plain(body: bytes) -> str:
    """The title of a page, or a text's first words."""
    head = body[:MAX_BODY]
    title = _TITLE.search(head)
    text = (title[2] if title else head[:MAX_MESSAGE]).decode("utf-8", "replace")
    return " ".join(_UNPRINTABLE.sub(" ", _TAG.sub(" ", text)).split())[:MAX_MESSAGE]
