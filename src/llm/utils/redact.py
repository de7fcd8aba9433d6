"""Keeping secrets out of what is shown: a vendor's error may echo the key that it was sent."""

from __future__ import annotations

from ..core.exceptions import LLMException

MASK = "***"
SHORTEST = 4
"""A shorter "key" is a test's; masking every "a" in a message would help nobody."""


def redact(error: LLMException, secret: str) -> None:
    """Blank *secret* wherever *error* or one of its causes may show it: message, code, request id, body, partial text.

    Their tracebacks are dropped: error trackers print the local variables of frames, and those of the frames that send
    a request hold its headers. What was known there is in the message.
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        found.__traceback__ = None
        if isinstance(found, LLMException) and len(secret) >= SHORTEST:
            _blank(found, secret)
        # Not __context__: that may be what the caller was handling, which is none of our business.
        found = found.__cause__


def _blank(error: LLMException, secret: str) -> None:
    if secret in error.message:
        error.message = error.message.replace(secret, MASK)
        error.args = (error.message,)
    if error.code is not None and secret in error.code:
        error.code = error.code.replace(secret, MASK)
    if error.request_id is not None and secret in error.request_id:
        error.request_id = error.request_id.replace(secret, MASK)
    if secret in error.partial:
        error.partial = error.partial.replace(secret, MASK)
    if secret.encode() in error.body:
        error.body = error.body.replace(secret.encode(), MASK.encode())
