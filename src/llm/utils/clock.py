"""Time as an argument: the one file that reads a clock, sleeps, or asks the loop for a timer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class TimerHandle(Protocol):
    """A timer that can be called off; calling it off twice, or too late, does nothing."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """What the package knows of time. All durations and instants are in seconds."""

    def now(self) -> float:
        """A monotonic instant: it never jumps, whatever is done to the wall clock."""
        ...

    def wall(self) -> float:
        """Seconds since 1970, only ever used to read dates that a vendor sent."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    def call_at(self, when: float, callback: Callable[[], object]) -> TimerHandle:
        """Run *callback* on the running loop at the instant *when*, or as soon as it can."""
        ...


class SystemClock:
    """The real clock, on whatever loop is running."""

    __slots__ = ()

    now = staticmethod(time.monotonic)
    wall = staticmethod(time.time)
    sleep = staticmethod(asyncio.sleep)

    def call_at(self, when: float, callback: Callable[[], object]) -> TimerHandle:
        # Not loop.call_at: uvloop's clock has another origin than time.monotonic. The delay to one that has passed is
        # negative, so that asyncio keeps it before those after it; uvloop takes it for 0.
        return asyncio.get_running_loop().call_later(when - time.monotonic(), callback)
