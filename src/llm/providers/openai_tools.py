"""Tool calls as Chat Completions tells them: whole, or in pieces that many servers number in ways of their own."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ..core.content import ToolCall
from ..core.types import ToolCallDelta

_NO_EXTRA: Final = msgspec.Raw()


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None
    """Text, but for some servers that write the object itself."""


class WireCall(msgspec.Struct, gc=False):
    """A tool call, or the delta of one."""

    index: int | None = None
    """Gemini's deltas have none."""
    id: str | None = None
    function: _Function | None = None
    extra_content: msgspec.Raw = _NO_EXTRA
    """Gemini's signature of what it thought, which has to go back."""


class _Open(msgspec.Struct):
    id: str
    name: str
    pieces: list[str] = []
    extra: bytes = b""


class Calls:
    """The tool calls of one answer, put together from their pieces.

    A piece belongs to the call of its index, unless it has an id that is not that call's: then, and where it has
    neither an index nor a known id, a new call begins.
    """

    __slots__ = ("_calls", "_places")

    def __init__(self) -> None:
        self._calls: list[_Open] = []
        self._places: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, piece: WireCall, *, whole: bool = False) -> ToolCallDelta:
        """Take *piece* in; a *whole* call is always a new one."""
        function = piece.function
        if not whole and piece.id is None and piece.index is not None and function is not None:
            # More arguments of a call that has begun: what nearly every piece is.
            known, more = self._places.get(piece.index), function.arguments
            if known is not None and type(more) is str and piece.extra_content is _NO_EXTRA:
                self._calls[known].pieces.append(more)
                return ToolCallDelta(known, "", "", more)
        function = function or _Function()
        arguments = function.arguments or ""
        if not isinstance(arguments, str):
            arguments = msgspec.json.encode(arguments).decode()
        at = None if whole else self._place(piece)
        begins = at is None
        if at is None:
            at = len(self._calls)
            # Results name the call they answer, also if the server gave it no id.
            self._calls.append(_Open(piece.id or f"call_{at}", function.name or ""))
            if piece.index is not None:
                self._places[piece.index] = at
        call = self._calls[at]
        call.name = call.name or function.name or ""
        call.pieces.append(arguments)
        if extra := bytes(piece.extra_content):
            call.extra = b'{"extra_content":' + extra + b"}"
        return ToolCallDelta(at, call.id if begins else "", (function.name or "") if begins else "", arguments)

    def name(self, index: int) -> str:
        """The name of the call at *index*."""
        return self._calls[index].name

    def parts(self) -> tuple[ToolCall, ...]:
        """All calls, complete."""
        return tuple([ToolCall(c.id, c.name, "".join(c.pieces) or "{}", c.extra) for c in self._calls])

    def _place(self, piece: WireCall) -> int | None:
        if piece.index is not None:
            at = self._places.get(piece.index)
            if at is None or (piece.id and piece.id != self._calls[at].id):
                return None
            return at
        if piece.id:
            return next((at for at, call in enumerate(self._calls) if call.id == piece.id), None)
        return len(self._calls) - 1 if self._calls else None
