"""Keeping secrets out of what is shown: a vendor's error may echo the key that it was sent."""

from __future__ import annotations

from ..core.exceptions import LLMException

MASK = "***"
SHORTEST = 4
"""A shorter "key" is a test's; masking every "a" in a message would help nobody."""


def redact(error: LLMException, secret: str) -> None:
    """Blank *secret* wherever *error* may show it: message, code, body, partial text."""
    if len(secret) < SHORTEST:
        return
    if secret in error.message:
        error.message = error.message.replace(secret, MASK)
        error.args = (error.message,)
    if error.code is not None and secret in error.code:
        error.code = error.code.replace(secret, MASK)
    if error.request_id is not None and secret in error.request_id:
        error.request_id = error.request_id.replace(secret, MASK)
    if secret.encode() in error.body:
        error.body = error.body.replace(secret.encode(), MASK.encode())
    cause = error.__cause__
    if isinstance(cause, LLMException) and cause is not error:
        redact(cause, secret)
