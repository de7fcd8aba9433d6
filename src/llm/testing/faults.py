"""What can go wrong at the simulator: a table of faults, and the plan that says when they strike."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

Act = Literal["answer", "reset", "close", "hang", "wait", "error", "omit"]


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One way of failing: *act* happens *at* a point of the exchange.

    ``answer`` refuses with *status*; ``reset`` is a TCP RST, ``close`` a FIN in the middle of the body; ``hang`` says
    nothing more; ``wait`` goes on after a pause; ``error`` sends the dialect's error event; ``omit`` ends the stream
    in good HTTP order but without its terminal event.
    """

    act: Act
    at: Literal["start", "middle", "end"] = "start"
    status: int | None = None
    problem: str | None = None  # a name in the dialect's table of problems; None: HTML, as a proxy sends it
    retry_after: bool = False
    streams_only: bool = False


FAULTS: Mapping[str, Fault] = {
    "400": Fault(act="answer", status=400, problem="invalid_request"),
    "401": Fault(act="answer", status=401, problem="authentication"),
    "402": Fault(act="answer", status=402, problem="billing"),
    "403": Fault(act="answer", status=403, problem="permission"),
    "404": Fault(act="answer", status=404, problem="not_found"),
    "408": Fault(act="answer", status=408, problem="timeout"),
    "409": Fault(act="answer", status=409, problem="conflict"),
    "413": Fault(act="answer", status=413),
    "429": Fault(act="answer", status=429, problem="rate_limit", retry_after=True),
    "429_without_retry_after": Fault(act="answer", status=429, problem="rate_limit"),
    "spend_limit": Fault(act="answer", status=429, problem="spend_limit"),
    "500": Fault(act="answer", status=500, problem="server_error"),
    "502": Fault(act="answer", status=502),
    "503": Fault(act="answer", status=503, problem="unavailable"),
    "504": Fault(act="answer", status=504, problem="timeout"),
    "529": Fault(act="answer", status=529, problem="overloaded"),
    "reset": Fault(act="reset"),
    "silence": Fault(act="hang"),
    "slow_first_byte": Fault(act="wait"),
    "cut_stream": Fault(act="close", at="middle"),
    "reset_stream": Fault(act="reset", at="middle"),
    "stall": Fault(act="hang", at="middle"),
    "pause": Fault(act="wait", at="middle"),
    "stream_error": Fault(act="error", at="middle", problem="overloaded", streams_only=True),
    "missing_terminal": Fault(act="omit", at="end", streams_only=True),
}


class Strike(msgspec.Struct, kw_only=True):
    """A fault that is due: how often still (None: until healed), for whom, and its particulars."""

    name: str
    times: int | None = 1
    key: str | None = None
    path: str | None = None  # None: the two paths that generate, not the list of models
    deltas: int = 2  # how many deltas of a reply are sent before a fault in its middle
    seconds: float = 1.0  # how long a fault that waits does so; the retry-after of a 429

    @property
    def fault(self) -> Fault:
        return FAULTS[self.name]


class FaultPlan:
    """Decides which fault, if any, meets a request: first those ordered by `fail`, then the script, then chance."""

    def __init__(
        self,
        *,
        script: Sequence[str | None] | Mapping[str, Sequence[str | None]] = (),
        chances: Mapping[str, float] | None = None,
        deltas: int = 2,
        seconds: float = 1.0,
        random: random.Random,
    ) -> None:
        by_key = script if isinstance(script, Mapping) else {"*": script}
        self._scripts = {key: deque(names) for key, names in by_key.items()}
        self._chances = dict(chances or {})
        self._deltas = deltas
        self._seconds = seconds
        self._random = random
        self._ordered: list[Strike] = []
        known(name for names in by_key.values() for name in names if name is not None)
        known(self._chances)

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
        script = self._scripts.get(key) or self._scripts.get("*")
        if script and (script[0] is None or _possible(script[0], stream)):
            return self._strike(script.popleft())
        if self._chances:
            point = self._random.random()
            for name, chance in self._chances.items():
                point -= chance
                if point < 0:
                    return self._strike(name) if _possible(name, stream) else None
        return None

    def _strike(self, name: str | None) -> Strike | None:
        return None if name is None else Strike(name=name, deltas=self._deltas, seconds=self._seconds)


def known(names: Iterable[str]) -> None:
    """Raise ValueError for a fault that is not in the table."""
    for name in names:
        if name not in FAULTS:
            raise ValueError(f"unknown fault {name!r}; known are {', '.join(FAULTS)}")


def _possible(name: str, stream: bool) -> bool:
    return stream or not FAULTS[name].streams_only
