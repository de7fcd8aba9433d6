"""A clock that stands still until it is told to move: hours of waiting in milliseconds of test."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from contextvars import Context, copy_context

_PASSES = 1000
"""How often the loop is let run at one instant; only code that spins on ``sleep(0)`` ever needs that many."""


class FakeTimer:
    """One timer of a :class:`FakeClock`."""

    __slots__ = ("_clock", "callback", "context", "handle", "order", "when")

    def __init__(self, clock: FakeClock, when: float, order: int, callback: Callable[[], object]) -> None:
        self._clock = clock
        self.when = when
        self.order = order
        self.callback: Callable[[], object] | None = callback
        self.context: Context | None = copy_context()
        self.handle: asyncio.Handle | None = None

    def __lt__(self, other: FakeTimer) -> bool:
        return (self.when, self.order) < (other.when, other.order)

    def __repr__(self) -> str:
        return f"<FakeTimer at {self.when}>"

    def cancel(self) -> None:
        """Call it off, also when its instant has come and the loop has not yet run it."""
        if self.handle is not None:
            self.handle.cancel()
        elif self.callback is not None:
            self.callback = self.context = None
            self._clock._forget()


class FakeClock:
    """Implements :class:`llm.utils.clock.Clock` without real time: only :meth:`advance` moves it.

    *start* is the first instant, in seconds; *wall* the seconds since 1970 that :meth:`wall` says at that instant.
    Timers run on the running loop in the order of their instants, those of one instant in the order they were set.
    """

    def __init__(self, start: float = 1_000.0, *, wall: float = 1_750_000_000.0) -> None:
        self._now = start
        self._wall = wall - start
        self._timers: list[FakeTimer] = []
        self._cancelled = 0
        self._order = 0

    def __repr__(self) -> str:
        return f"<FakeClock {self._now}: {self.timers} timers>"

    @property
    def timers(self) -> int:
        """How many timers are set: what a test for leaks asks."""
        return len(self._timers) - self._cancelled

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._wall + self._now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        timer = self.call_at(self._now + seconds, wake)
        try:
            await woken
        finally:
            timer.cancel()

    def call_at(self, when: float, callback: Callable[[], object]) -> FakeTimer:
        """Run *callback* when the clock gets to *when*; an instant that has passed needs no :meth:`advance`."""
        self._order += 1
        timer = FakeTimer(self, when, self._order, callback)
        if when <= self._now:
            self._hand_over(timer)
        else:
            heapq.heappush(self._timers, timer)
        return timer

    async def advance(self, seconds: float) -> None:
        """Move on by *seconds*, from timer to timer; at each instant everything that can run does."""
        target = self._now + seconds
        await self.settle()
        while self._timers and self._timers[0].when <= target:
            self._now = max(self._now, self._timers[0].when)
            while self._timers and self._timers[0].when <= self._now:
                timer = heapq.heappop(self._timers)
                if timer.callback is None:
                    self._cancelled -= 1
                else:
                    self._hand_over(timer)
            await self.settle()
        self._now = max(self._now, target)
        await self.settle()

    async def settle(self) -> None:
        """Let the loop run until nothing is left to do at this instant (sockets apart: they have their own time)."""
        await asyncio.sleep(0)
        # The standard loop's queue of callbacks is the only thing that knows; other loops get a fixed number of passes.
        ready = getattr(asyncio.get_running_loop(), "_ready", None)
        for _ in range(_PASSES if ready is not None else 25):
            if ready is not None and not ready:
                return
            await asyncio.sleep(0)

    def _hand_over(self, timer: FakeTimer) -> None:
        # Through the loop, as a real timer: no task is current in the callback, and what it raises goes to the loop.
        assert timer.callback is not None
        timer.handle = asyncio.get_running_loop().call_soon(timer.callback, context=timer.context)

    def _forget(self) -> None:
        self._cancelled += 1
        if self._cancelled > 64 and self._cancelled * 2 > len(self._timers):
            # In place: ``advance`` may be walking the same list.
            self._timers[:] = [timer for timer in self._timers if timer.callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0
