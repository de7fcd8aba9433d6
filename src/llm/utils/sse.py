"""Server-sent events, sans I/O: bytes in, events out.

The rules are the WHATWG's (HTML, "Interpreting an event stream"). By them an event that the end of the stream leaves
without its blank line is discarded; who wants it, because a server forgets that line, feeds ``b"\\n\\n"`` at the end.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

MAX_EVENT_BYTES: Final = 8 * 1024 * 1024
"""Far above any text event, below what a hostile server needs to exhaust memory."""

_BOM: Final = b"\xef\xbb\xbf"
_NAMED: Final = re.compile(rb"^event: [^\n]*\ndata: ([^\n]*)$", re.MULTILINE).findall
"""The data of each event of two lines, its name and its data: the other shape of a vendor's."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """One event. *data* stays bytes: who reads it decodes JSON from bytes."""

    data: bytes
    event: str = "message"
    id: str = ""
    """The last id the stream has named, in this event or before it."""


class SSEDecoder:
    """Cuts a byte stream into events; however the bytes were split, the events are the same.

    *overflow* is set once an event is larger than *max_event_bytes*: what came before it was returned, nothing comes
    after. *retry* is the reconnection time in milliseconds, if the stream has named one.
    """

    __slots__ = ("_after_cr", "_at_start", "_buffer", "_last_id", "_max", "overflow", "retry")

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.overflow = False
        self.retry: int | None = None
        self._max = max_event_bytes
        self._buffer = bytearray()
        self._last_id = ""
        self._at_start = True
        self._after_cr = False

    def __repr__(self) -> str:
        return f"<SSEDecoder: {len(self._buffer)} bytes pending{', overflow' if self.overflow else ''}>"

    @property
    def pending(self) -> bytes:
        """The bytes of the event that has begun and not ended. Of a body that is no stream: all of it."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> list[Event]:
        """The events that *data* completes."""
        events: list[Event] = []
        for block in self._blocks(data):
            self._parse(block, events)
        return events

    def payloads(self, data: bytes) -> list[bytes]:
        """The data of the events that *data* completes: all that most readers want, at half the price."""
        buffer = self._buffer
        end = data.rfind(b"\n\n")
        payloads: list[bytes]
        if end >= 0 and len(buffer) + len(data) <= self._max and not (self._after_cr or self.overflow):
            # Most reads bring events of one line each and nothing else, but for the cut ones at their edges. Then there
            # are as many pairs of newlines as events, less one.
            head = bytes(buffer) + data[:end] if buffer else data[:end]
            if head[:6] == b"data: ":
                payloads = head[6:].split(b"\n\ndata: ")
                plain = head.count(b"\n") == 2 * len(payloads) - 2
            else:
                # With a line for the name each event has one newline more. Blank lines are counted as well: one that
                # is missing and a line that is too many would make up for each other.
                payloads = _NAMED(head)
                count = len(payloads)
                plain = head.count(b"\n\n") == count - 1 and head.count(b"\n") == 3 * count - 2
            if plain and b"\r" not in data:
                buffer[:] = data[end + 2 :]
                self._at_start = False
                return payloads
        payloads = []
        for block in self._blocks(data):
            events: list[Event] = []
            self._parse(block, events)
            payloads += [event.data for event in events]
        return payloads

    def _blocks(self, data: bytes) -> list[bytes]:
        """The blocks, each an event without its blank line, that *data* completes."""
        if self.overflow:
            return []
        # Lines are cut on bytes, before UTF-8 decoding: U+2028 and its kind never end one.
        if self._after_cr or b"\r" in data:
            data = self._one_newline(data)
        buffer = self._buffer
        if buffer or self._at_start:
            # Only the new bytes are searched, so that an event fed byte by byte costs O(n).
            start = 0 if self._at_start else len(buffer) - 1
            buffer += data
            if self._at_start and not self._skip_bom():
                return []
            if buffer.find(b"\n\n", start) < 0 and len(buffer) <= self._max:
                return []
            data = bytes(buffer)
            buffer.clear()
        blocks = data.split(b"\n\n")
        rest = blocks.pop()
        if len(data) > self._max:
            for number, block in enumerate(blocks):
                if len(block) > self._max:
                    self.overflow = True
                    return blocks[:number]
            # The newline may turn out to be the first of the blank line's two: it is not the event's.
            if len(rest) - rest.endswith(b"\n") > self._max:
                self.overflow = True
                return blocks
        buffer += rest
        return blocks

    def _skip_bom(self) -> bool:
        """Whether it is known by now that no byte-order mark is pending; one that is there is removed."""
        buffer = self._buffer
        if len(buffer) < 3 and _BOM.startswith(buffer):
            return False
        if buffer.startswith(_BOM):
            del buffer[:3]
        self._at_start = False
        return True

    def _one_newline(self, data: bytes) -> bytes:
        """*data* with LF for every CRLF and CR, also for a CRLF that was cut in two."""
        if not data:
            return data
        if self._after_cr and data[0] == 0x0A:
            data = data[1:]
            self._after_cr = False
            if not data:
                return data
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _parse(self, block: bytes, events: list[Event]) -> None:
        """Read one block line by line; without a data line it is no event."""
        name = b""
        data: bytes | None = None
        more: list[bytes] | None = None
        for line in block.split(b"\n"):
            field, _, value = line.partition(b":")
            if value.startswith(b" "):
                value = value[1:]
            if field == b"data":
                if data is None:
                    data = value
                elif more is None:
                    more = [data, value]
                else:
                    more.append(value)
            elif field == b"event":
                name = value
            elif field == b"id":
                if b"\0" not in value:
                    self._last_id = value.decode("utf-8", "replace")
            elif field == b"retry" and value.isdigit():
                # Longer numbers are no times, and int() of thousands of digits raises.
                self.retry = int(value[:18])
        if data is not None:
            if more is not None:
                data = b"\n".join(more)
            events.append(Event(data, name.decode("utf-8", "replace") or "message", self._last_id))
