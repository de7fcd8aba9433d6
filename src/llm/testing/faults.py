"""What can go wrong at the simulator: a table of faults, and the plan that says when they strike."""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec

Act = Literal["answer", "reset", "close", "hang", "wait", "drip", "error", "malform", "omit"]
Point = Literal["start", "first", "middle", "end"]

PROXY_PAGE = b"<html><head><title>%d</title></head><body><center><h1>%d</h1></center></body></html>\r\n"
MEGABYTE = 1024 * 1024


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One way of failing: *act* happens *at* a point of the exchange.

    ``answer`` replies with *status* and *body*. ``reset`` is a TCP RST. ``close`` is a FIN: without a word at the
    start, in the middle of the body, or at the end of an answer that promised to keep the connection. ``hang`` says
    nothing more, ``wait`` goes on after a pause, ``drip`` sends the rest a byte at a time. ``error`` sends the
    dialect's error event, ``malform`` one that is no JSON; ``omit`` ends the stream in good HTTP order but without
    its terminal event.
    """

    act: Act
    at: Point = "start"
    status: int | None = None
    problem: str | None = None  # a name in the dialect's table of problems; None: nothing of the vendor's
    body: str = "problem"  # a name in `BODIES`
    retry_after: str | None = None  # as it is written; "seconds": the strike's, as the dialect writes them
    padding: int = 0  # bytes of further headers
    streams_only: bool = False


FAULTS: Mapping[str, Fault] = {
    # A status, in the vendor's words or a proxy's.
    "400": Fault(act="answer", status=400, problem="invalid_request"),
    "401": Fault(act="answer", status=401, problem="authentication"),
    "402": Fault(act="answer", status=402, problem="billing"),
    "403": Fault(act="answer", status=403, problem="permission"),
    "404": Fault(act="answer", status=404, problem="not_found"),
    "408": Fault(act="answer", status=408, problem="timeout"),
    "409": Fault(act="answer", status=409, problem="conflict"),
    "413": Fault(act="answer", status=413, body="page"),
    "429": Fault(act="answer", status=429, problem="rate_limit", retry_after="seconds"),
    "429_without_retry_after": Fault(act="answer", status=429, problem="rate_limit"),
    "spend_limit": Fault(act="answer", status=429, problem="spend_limit"),
    "500": Fault(act="answer", status=500, problem="server_error"),
    "502": Fault(act="answer", status=502, body="page"),
    "503": Fault(act="answer", status=503, problem="unavailable"),
    "504": Fault(act="answer", status=504, problem="timeout"),
    "529": Fault(act="answer", status=529, problem="overloaded"),
    # A retry-after that nobody should obey to the letter.
    "retry_after_day": Fault(act="answer", status=429, problem="rate_limit", retry_after="86400"),
    "retry_after_negative": Fault(act="answer", status=429, problem="rate_limit", retry_after="-30"),
    "retry_after_past": Fault(
        act="answer", status=429, problem="rate_limit", retry_after="Thu, 01 Jan 2026 00:00:00 GMT"
    ),
    "retry_after_garbage": Fault(act="answer", status=429, problem="rate_limit", retry_after="soon; maybe"),
    # A body that is not what the status and the dialect promise.
    "html": Fault(act="answer", status=503, body="page"),
    "html_under_200": Fault(act="answer", status=200, body="page"),
    "empty": Fault(act="answer", status=500, body="empty"),
    "empty_under_200": Fault(act="answer", status=200, body="empty"),
    "array": Fault(act="answer", status=500, problem="server_error", body="array"),
    "error_under_200": Fault(act="answer", status=200, problem="overloaded"),
    "oversized": Fault(act="answer", status=500, problem="server_error", body="oversized"),
    "oversized_html": Fault(act="answer", status=502, body="oversized_page"),
    "gzip_bomb": Fault(act="answer", status=200, body="bomb"),
    "large_headers": Fault(act="answer", status=500, problem="server_error", padding=MEGABYTE),
    # The connection, or the time it takes.
    "reset": Fault(act="reset"),
    "request_lost": Fault(act="close"),
    "silence": Fault(act="hang"),
    "slow_first_byte": Fault(act="wait"),
    "slow_first_token": Fault(act="wait", at="first", streams_only=True),
    "cut_stream": Fault(act="close", at="middle"),
    "reset_stream": Fault(act="reset", at="middle"),
    "stall": Fault(act="hang", at="middle"),
    "pause": Fault(act="wait", at="middle"),
    "slow_drip": Fault(act="drip", at="middle"),
    "close_after_answer": Fault(act="close", at="end"),
    # The stream itself.
    "stream_error": Fault(act="error", at="middle", problem="overloaded", streams_only=True),
    "malformed_event": Fault(act="malform", at="middle", streams_only=True),
    "missing_terminal": Fault(act="omit", at="end", streams_only=True),
}

BODIES: Mapping[str, Callable[[int, bytes, int], Iterable[bytes]]] = {
    "problem": lambda status, said, size: [said],
    "page": lambda status, said, size: [_page(status)],
    "empty": lambda status, said, size: [],
    "array": lambda status, said, size: [b"[", said, b"]"],
    "oversized": lambda status, said, size: [said[:-1], b',"padding":"', *_much(b"x", size), b'"}'],
    "oversized_page": lambda status, said, size: [_page(status), b"<!--", *_much(b"x", size), b"-->"],
    "bomb": lambda status, said, size: gzip_bomb(size),
}
"""Bodies from the status, the vendor's words for the problem, and the size of what is meant to be large."""


def _page(status: int) -> bytes:
    return PROXY_PAGE % (status, status)


def _much(filling: bytes, size: int) -> Iterator[bytes]:
    """*size* bytes, a megabyte of which is in memory."""
    whole, rest = divmod(size, MEGABYTE)
    block = filling * MEGABYTE
    for _ in range(whole):
        yield block
    yield block[:rest]


def gzip_bomb(size: int) -> Iterator[bytes]:
    """A gzip stream that expands to *size* spaces, and to a thousandth of that while it travels.

    One compressed block is repeated, so that the bomb costs its maker little time and a megabyte.
    """
    whole, rest = divmod(size, MEGABYTE)
    block = b" " * MEGABYTE
    press = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    # After a full flush nothing refers to what came before: the block can be repeated as it is.
    pressed = press.compress(block) + press.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    yield b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    for _ in range(whole):
        checksum = zlib.crc32(block, checksum)
        yield pressed
    checksum = zlib.crc32(block[:rest], checksum)
    yield press.compress(block[:rest]) + press.flush()
    yield checksum.to_bytes(4, "little") + (size % 2**32).to_bytes(4, "little")


class Strike(msgspec.Struct, kw_only=True):
    """A fault that is due: how often still (None: until healed), for whom, and its particulars."""

    name: str
    times: int | None = 1
    key: str | None = None
    path: str | None = None  # None: the two paths that generate, not the list of models
    deltas: int = 2  # how many deltas of a reply are sent before a fault in its middle
    seconds: float = 1.0  # how long a fault that waits does so; the retry-after of a 429; between two bytes of a drip
    size: int = 10 * MEGABYTE  # of an oversized body; of a bomb, once it is unpacked

    @property
    def fault(self) -> Fault:
        return FAULTS[self.name]


Script = Sequence[str | None]
Chances = Mapping[str, float]
_T = TypeVar("_T")


class FaultPlan:
    """Decides which fault, if any, meets a request: first those ordered by `fail`, then the script, then chance.

    *script* and *chances* are for all requests, or a mapping of them by key or path; ``*`` is for those that have none
    of their own. *usual* has the particulars of scripted and chance faults.
    """

    def __init__(
        self,
        *,
        script: Script | Mapping[str, Script] = (),
        chances: Chances | Mapping[str, Chances] | None = None,
        usual: Strike,
        random: random.Random,
    ) -> None:
        scripts = script if isinstance(script, Mapping) else {"*": script}
        self._scripts = {whose: deque(names) for whose, names in scripts.items()}
        self._chances = by_whom(chances or {})
        self._usual = usual
        self._random = random
        self._ordered: list[Strike] = []
        known(name for names in scripts.values() for name in names if name is not None)
        known(name for each in self._chances.values() for name in each)

    def fail(self, strike: Strike) -> None:
        """Order a fault; several are used up in the order in which they were given."""
        known([strike.name])
        self._ordered.append(strike)

    def heal(self) -> None:
        """Forget all that was ordered, scripted or left to chance."""
        self._ordered.clear()
        self._scripts.clear()
        self._chances.clear()

    def draw(self, *, key: str, path: str, generates: bool, stream: bool) -> Strike | None:
        """The fault that this request meets; one that only a stream can have is kept for the next stream."""
        for strike in self._ordered:
            wanted_path = path == strike.path if strike.path else generates
            if not wanted_path or strike.key not in (None, key) or not _possible(strike.name, stream):
                continue
            if strike.times is not None:
                strike.times -= 1
                if strike.times <= 0:
                    self._ordered.remove(strike)
            return strike
        if not generates:
            return None
        script = _own(self._scripts, key, path)
        if script and (script[0] is None or _possible(script[0], stream)):
            return self._strike(script.popleft())
        chances = _own(self._chances, key, path)
        if chances:
            point = self._random.random()
            for name, chance in chances.items():
                point -= chance
                if point < 0:
                    return self._strike(name) if _possible(name, stream) else None
        return None

    def _strike(self, name: str | None) -> Strike | None:
        return None if name is None else msgspec.structs.replace(self._usual, name=name)


def known(names: Iterable[str]) -> None:
    """Raise ValueError for a fault that is not in the table."""
    for name in names:
        if name not in FAULTS:
            raise ValueError(f"unknown fault {name!r}; known are {', '.join(FAULTS)}")


def _possible(name: str, stream: bool) -> bool:
    return stream or not FAULTS[name].streams_only


def _own(found: Mapping[str, _T], key: str, path: str) -> _T | None:
    """What is for this key, else for this path, else for all."""
    return found.get(key) or found.get(path) or found.get("*")


def by_whom(chances: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Probabilities by whom they are for, also where they are for all."""
    if any(isinstance(chance, Mapping) for chance in chances.values()):
        return {whose: dict(each) for whose, each in chances.items()}
    return {"*": dict(chances)}
