"""What arrived at the simulator, and the check that no window was ever overfull.

The check is the obvious one: for each event, add up all events of the window that ends with it. It is O(n²) and shares
nothing with the windows that the simulator or the package keep, so it can judge both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

Dimension = Literal["requests", "input_tokens", "output_tokens"]


class Arrival(msgspec.Struct, kw_only=True):
    """One request as the simulator saw it; the second half is filled in while it is answered.

    Times are seconds of the simulator's clock (`time.monotonic` on Linux, also when it is its own process).
    """

    sequence: int
    time: float
    key: str
    dialect: Literal["anthropic", "openai", "openai_responses"]
    method: str
    path: str
    connection: int = 0  # the peer's port: equal for requests that reused a connection
    headers: dict[str, str] = {}
    model: str | None = None
    stream: bool = False
    input_tokens: int = 0
    body: Any = None
    received: bool = True  # all of it; a part cannot have been answered, so it counts for nothing

    admitted: bool = False  # it took its share of the windows
    status: int | None = None  # None: no status line was sent (yet)
    fault: str | None = None
    retry_after: float | None = None  # the true wait, unrounded, where one was told
    output_tokens: int = 0
    produced: list[tuple[float, int]] = []  # (time, output tokens) as they were generated
    finished: float | None = None  # when the last byte was handed to the socket, or the exchange was abandoned
    disconnected: bool = False  # the client left before the answer was complete


def check_window(events: Iterable[float | tuple[float, int]], limit: int, window: float) -> int:
    """How many windows of *window* seconds, at any offset, hold more than *limit*: 0 when the limit was kept.

    An event is a time, worth one, or a pair of a time and an amount. Windows are half open, ``(end - window, end]``,
    and only those that end with an event are looked at: no other can hold more.
    """
    return sum(1 for usage in _usages(events, window) if usage > limit)


def peak_usage(events: Iterable[float | tuple[float, int]], window: float) -> int:
    """The largest sum in any window of *window* seconds at any offset."""
    return max(_usages(events, window), default=0)


def peak(
    journal: Iterable[Arrival], key: str, window: float, dimension: Dimension = "requests", *, rejected: bool = False
) -> int:
    """The most that *key* used of *dimension* in any window; refused requests count only if *rejected*."""
    return peak_usage(usage_events(journal, key, dimension, rejected=rejected), window)


def usage_events(
    journal: Iterable[Arrival], key: str, dimension: Dimension = "requests", *, rejected: bool = False
) -> list[tuple[float, int]]:
    """The journal of one key as (time, amount) pairs: input at arrival, output as it was produced."""
    events: list[tuple[float, int]] = []
    for arrival in journal:
        if arrival.key != key or not arrival.received or not (arrival.admitted or rejected):
            continue
        match dimension:
            case "requests":
                events.append((arrival.time, 1))
            case "input_tokens":
                events.append((arrival.time, arrival.input_tokens))
            case "output_tokens":
                events.extend(arrival.produced)
    return events


def read_journal(path: Path) -> list[Arrival]:
    """Read a journal file, which may still be growing: a line per arrival, then a line that completes it."""
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        entry = msgspec.json.decode(line)
        found.setdefault(entry["sequence"], {}).update(entry)
    return [msgspec.convert(found[sequence], Arrival) for sequence in sorted(found)]


def _usages(events: Iterable[float | tuple[float, int]], window: float) -> Iterable[int]:
    pairs: Sequence[tuple[float, int]] = [e if isinstance(e, tuple) else (e, 1) for e in events]
    for end, _ in pairs:
        yield sum(amount for time, amount in pairs if time <= end < time + window)
