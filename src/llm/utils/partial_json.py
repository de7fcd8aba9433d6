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
    return PartialJSON().feed(text)


class PartialJSON:
    """:func:`partial_json` of a text that comes in pieces, each of which is looked through once."""

    __slots__ = ("_bare", "_escaped", "_in_string", "_is_key", "_keep", "_open", "_over", "_text")

    def __init__(self) -> None:
        self._text = ""
        self._open: list[str] = []
        self._is_key: list[bool] = []
        """Of each that is open, whether the next string is a key."""
        self._in_string = False
        self._escaped = False
        self._keep = 0
        """How much of the text can be closed as it is: no bracket stands after it."""
        self._bare = False
        """Whether a number or a word stands outside of all brackets."""
        self._over = False

    def feed(self, piece: str) -> Any:
        """The value that the text has begun once *piece* is added to it, or :data:`NOTHING`."""
        if not self._over:
            start = len(self._text)
            self._text += piece
            self._scan(piece, start)
        if self._in_string and not self._at_key and (found := self._string_so_far()) is not NOTHING:
            return found
        if self._bare and not self._open and not self._keep:
            return _decoded(self._text)
        return _decoded(self._text[: self._keep] + self._closed()) if self._keep else NOTHING

    @property
    def _at_key(self) -> bool:
        return bool(self._is_key) and self._is_key[-1]

    def _scan(self, piece: str, start: int) -> None:
        """Go through *piece*, which stands at *start* of the text."""
        in_string, escaped = self._in_string, self._escaped
        for at, sign in enumerate(piece, start):
            if in_string:
                if escaped:
                    escaped = False
                elif sign == "\\":
                    escaped = True
                elif sign == '"':
                    in_string = False
                    if not self._at_key:
                        self._keep = at + 1
            elif sign == '"':
                in_string = True
            elif sign in "{[":
                self._open.append(sign)
                self._is_key.append(sign == "{")
                self._keep = at + 1
            elif sign in "}]":
                if not self._open or _CLOSING[self._open.pop()] != sign:
                    self._keep, self._over, self._bare = 0, True, False
                    break
                self._is_key.pop()
                self._keep = at + 1
                if not self._open:
                    self._over = True
                    break
            elif sign == ":":
                if self._is_key:
                    self._is_key[-1] = False
            elif sign == ",":
                # What stood before it is complete.
                self._keep = at
                if self._open and self._open[-1] == "{":
                    self._is_key[-1] = True
            elif sign not in " \t\r\n" and not self._open:
                self._bare = True
        self._in_string, self._escaped = in_string, escaped

    def _string_so_far(self) -> Any:
        """The text, which ends within a string, with that string closed; an escape at its end may be half written."""
        # A pair of surrogates is two escapes of six signs, and half of one is no text.
        for cut in range(12):
            found = _decoded(self._text[: len(self._text) - cut] + '"' + self._closed())
            if found is not NOTHING:
                return found
        return NOTHING

    def _closed(self) -> str:
        return "".join([_CLOSING[sign] for sign in reversed(self._open)])


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return NOTHING
