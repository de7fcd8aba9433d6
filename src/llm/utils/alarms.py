"""Many timers of one length for the price of one: a queue in order of expiry and a single timer of the loop.

``asyncio.timeout`` leaves a cancelled handle in the loop's heap for every call that was in time; at some hundred
concurrent calls sorting those costs more than the call's own bookkeeping. Timers of equal length expire in the order
in which they were started, so no heap is needed.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from contextvars import Context
from types import TracebackType
from typing import Any

from .clock import Clock, TimerHandle


class Alarms:
    """Timers that all run *seconds* from their start."""

    __slots__ = ("_clock", "_pending", "_ringing", "_timer", "seconds")

    def __init__(self, seconds: float, clock: Clock) -> None:
        self.seconds = seconds
        self._clock = clock
        self._pending: OrderedDict[Alarm, None] = OrderedDict()
        self._timer: TimerHandle | None = None
        self._ringing = False

    def __len__(self) -> int:
        return len(self._pending)

    def start(self, callback: Callable[[], object]) -> Alarm:
        """Run *callback* once, *seconds* from now, unless the alarm is cancelled before."""
        alarm = _Callback(callback)
        self.set(alarm)
        return alarm

    def set(self, alarm: Alarm) -> None:
        """Let *alarm*, which is not running, ring once, *seconds* from now."""
        alarm.when = self._clock.now() + self.seconds
        alarm.pending = self._pending
        self._pending[alarm] = None
        if self._timer is None and not self._ringing:
            self._arm(alarm.when)

    def close(self) -> None:
        """Call off everything, the loop's timer included."""
        self._pending.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, when: float) -> None:
        # In a fresh context: the timer outlives the call that happens to start it, and would keep that call's.
        self._timer = Context().run(self._clock.call_at, when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._ringing = True
        now = self._clock.now()
        try:
            while self._pending:
                alarm = next(iter(self._pending))
                if alarm.when > now:
                    return
                del self._pending[alarm]
                alarm.ring()
        finally:
            # Also after a callback that raised, which is the loop's to report: the others must ring all the same.
            self._ringing = False
            if self._pending:
                # The timer of a cancelled alarm rings in vain, then follows the oldest that still matters.
                self._arm(next(iter(self._pending)).when)


class Alarm(ABC):
    """One timer of an :class:`Alarms`. What there are thousands of may be an alarm itself, instead of having one."""

    __slots__ = ("pending", "when")

    pending: OrderedDict[Alarm, None]
    """Those it runs with."""
    when: float

    @abstractmethod
    def ring(self) -> None: ...

    def cancel(self) -> None:
        """Call it off; does nothing when it has rung already."""
        self.pending.pop(self, None)


class _Callback(Alarm):
    """An alarm that calls a function."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback = callback

    def ring(self) -> None:
        self._callback()


class Limit(Alarm):
    """A block that is given up when it takes too long: ``with Limit(alarms): await …`` raises ``TimeoutError``.

    The same contract as ``asyncio.timeout``, on a shared timer: a cancellation from elsewhere passes untouched, and
    when both happen the cancellation wins. With None for *alarms* only :meth:`expire` ends the block.
    """

    __slots__ = ("_alarms", "_cancelling", "_task", "expired")

    def __init__(self, alarms: Alarms | None) -> None:
        self._alarms = alarms
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self.expired = False

    def __enter__(self) -> Limit:
        self._task = asyncio.current_task()
        assert self._task is not None, "a Limit needs a running task"
        self._cancelling = self._task.cancelling()
        if self._alarms is not None:
            self._alarms.set(self)
        return self

    def ring(self) -> None:
        self.expire()

    def expire(self) -> None:
        """End the block now, as if its time were up. Does nothing once it is over, or the second time."""
        if self._task is not None and not self.expired:
            self.expired = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._alarms is not None:
            self.pending.pop(self, None)
        task, self._task = self._task, None
        if self.expired and task is not None:
            uncancelled = task.uncancel() <= self._cancelling
            if uncancelled and kind is not None and issubclass(kind, asyncio.CancelledError):
                raise TimeoutError from error
