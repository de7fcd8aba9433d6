"""Keeping secrets out of what is shown: a vendor's error may echo the key that it was sent."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from urllib.parse import quote, unquote, urlsplit

from ..core.exceptions import LLMException

MASK = "***"
SHORTEST = 4
"""A shorter "key" is a test's; masking every "a" in a message would help nobody."""
CUT = 12
"""Characters of a secret at a text's end that are taken for one that was cut off in its middle."""

# html.escape does the same, but html brings its table of 2,231 names.
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})
_CREDENTIAL = re.compile("auth|cookie|credential|key|passw|secret|session|token", re.IGNORECASE)


def redact(error: LLMException, *secrets: str) -> None:
    """Blank *secrets* wherever *error* or one of its causes may show them: in message, code, request id, body and text.

    Also as URLs, JSON, HTML and base64 write them. Their tracebacks are dropped: error trackers print the local
    variables of frames, and those of the frames that send a request hold its headers. What was known there is in the
    message.
    """
    written = [form for secret in secrets if len(secret) >= SHORTEST for form in _forms(secret)]
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        found.__traceback__ = None
        if isinstance(found, LLMException):
            _blank(found, written)
            if found.__cause__ is None and found.__suppress_context__:
                # Raised `from None`: nobody shows it, and its frames hold the vendor's answer.
                found.__context__ = None
        # Not __context__: that may be what the caller was handling, which is none of our business.
        found = found.__cause__


def credentials(headers: Mapping[str, str] | None, proxy: str | None = None) -> tuple[str, ...]:
    """The values of *headers* whose names say that they are secret, and the password in *proxy*'s URL."""
    found = [value for name, value in (headers or {}).items() if _CREDENTIAL.search(name)]
    if proxy is not None and "@" in proxy:
        userinfo = unquote(urlsplit(proxy).netloc.rpartition("@")[0])
        # As it is configured, and as Basic authentication sends it.
        found += [userinfo.partition(":")[2], _base64(userinfo)]
    return tuple(found)


def _forms(secret: str) -> list[str]:
    """*secret* as it is, and as it is written in other languages, the longest first."""
    escaped = quote(secret, safe="")
    forms = {secret, escaped, re.sub("%..", lambda code: code[0].lower(), escaped)}
    forms |= {secret.replace("/", "\\/"), secret.translate(_HTML)}
    forms |= {form for form in (_base64(secret), _base64(f"Bearer {secret}")) if len(form) >= CUT}
    return sorted(forms, key=len, reverse=True)


def _base64(text: str) -> str:
    """The part that does not depend on what follows *text*."""
    data = text.encode()
    return base64.b64encode(data[: len(data) // 3 * 3]).decode()


def _blank(error: LLMException, written: list[str]) -> None:
    message = _mask(error.message, written)
    if message != error.message:
        error.message = message
        error.args = (message,)
    if error.code is not None:
        error.code = _mask(error.code, written)
    if error.request_id is not None:
        error.request_id = _mask(error.request_id, written)
    error.partial = _mask(error.partial, written)
    if error.body:
        # Latin-1 maps every byte to itself, whatever the body is.
        error.body = _mask(error.body.decode("latin-1"), [form.encode().decode("latin-1") for form in written]).encode(
            "latin-1"
        )


def _mask(text: str, written: list[str]) -> str:
    for form in written:
        text = text.replace(form, MASK)
        start = text.rfind(form[:CUT], max(0, len(text) - len(form))) if len(form) > CUT else -1
        if start >= 0 and form.startswith(text[start:]):
            text = text[:start] + MASK
    return text
