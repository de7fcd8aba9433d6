"""What can be told of a JSON text that is still being written."""

from __future__ import annotations

from typing import Any, Final

import msgspec

NOTHING: Final = object()
"""So little has come that there is no value yet."""

_CLOSING: Final = {"{": "}", "[": "]"}


def partial_json(text: str) -> Any:
    """The value that *text* has begun, or :data:`NOTHING`. Linear in its length; never raises.

    Strings are as long as they are by now; a number, a word or a key that may go on is left out. What is no JSON at all
    is NOTHING as well.
    """
    open_ones: list[str] = []
    in_string = escaped = False
    keep = 0
    """How much of the text can be closed as it is: no bracket stands after it."""
    awaiting_value = False
    is_key: list[bool] = []
    for at, sign in enumerate(text):
        if in_string:
            if escaped:
                escaped = False
            elif sign == "\\":
                escaped = True
            elif sign == '"':
                in_string = False
                if not (is_key and is_key[-1]):
                    keep = at + 1
            continue
        if sign == '"':
            in_string = True
        elif sign in "{[":
            open_ones.append(sign)
            is_key.append(sign == "{")
            keep = at + 1
        elif sign in "}]":
            if not open_ones or _CLOSING[open_ones.pop()] != sign:
                return NOTHING
            is_key.pop()
            keep = at + 1
            if not open_ones:
                break
        elif sign == ":":
            if is_key:
                is_key[-1] = False
        elif sign == ",":
            # What stood before it is complete.
            keep = at
            if is_key and open_ones[-1] == "{":
                is_key[-1] = True
        elif sign in " \t\r\n":
            continue
        elif not open_ones:
            awaiting_value = True
    if in_string and not (is_key and is_key[-1]) and (found := _string_so_far(text, open_ones)) is not NOTHING:
        return found
    if awaiting_value and not open_ones and not keep:
        return _decoded(text)
    return _decoded(text[:keep] + _close(open_ones)) if keep else NOTHING


def _string_so_far(text: str, open_ones: list[str]) -> Any:
    """*text*, which ends within a string, with that string closed; an escape at its end may be half written."""
    # A pair of surrogates is two escapes of six signs, and half of one is no text.
    for cut in range(12):
        candidate = text[: len(text) - cut] if cut else text
        found = _decoded(candidate + '"' + _close(open_ones))
        if found is not NOTHING:
            return found
    return NOTHING


def _close(open_ones: list[str]) -> str:
    return "".join([_CLOSING[sign] for sign in reversed(open_ones)])


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return NOTHING
