"""A request's JSON body, with what the user adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from ..core.exceptions import LLMInvalidRequestError

_encode: Final = msgspec.json.Encoder().encode


def encode_body(
    body: dict[str, Any],
    *extras: Mapping[str, Any] | None,
    provider: str,
    model: str,
) -> bytes:
    """*body* as JSON after each of *extras* was laid over it, shallow and in order.

    A None in an extra removes the key: no vendor wants a null, and a strict server may refuse a key of ours.
    Raises LLMInvalidRequestError for what is no JSON.
    """
    for extra in extras:
        if extra:
            for name, value in extra.items():
                if value is None:
                    body.pop(name, None)
                else:
                    body[name] = value
    try:
        return _encode(body)
    except (TypeError, ValueError, RecursionError) as error:
        # A lone surrogate in a prompt is a ValueError too: it has no UTF-8.
        raise LLMInvalidRequestError(
            f"the request cannot be written as JSON: {error}", provider=provider, model=model
        ) from error
