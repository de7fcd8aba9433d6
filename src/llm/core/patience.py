"""How long the reader of a stream waits for what a stream has promised: the next event, and so many tokens a second.

It knows nothing of bytes: whether any come is the transport's affair. Time counts only while somebody waits for the
stream, so that a slow reader is not taken for a slow vendor.
"""

from __future__ import annotations

from collections.abc import Callable

from ..utils.clock import Clock, TimerHandle
from .exceptions import LLMTimeoutError

RATE_SECONDS = 10.0
"""Of waiting, over which the rate is measured."""
BYTES_PER_TOKEN = 4.0
"""About as many are a token of English; of other languages fewer, so that these seem faster than they are."""


class Patience:
    """That with one stream. *late* is called, once at most, with what the stream is to end with.

    Args:
        idle: seconds in which an event must come; None: whenever it likes.
        rate: tokens a second, at the least, once content has come; None: any.
    """

    __slots__ = ("_clock", "_idle", "_late", "_mark", "_rate", "_timer", "_waited")

    def __init__(
        self, clock: Clock, *, idle: float | None, rate: float | None, late: Callable[[LLMTimeoutError], None]
    ) -> None:
        self._clock = clock
        self._idle = idle
        self._rate = rate
        self._late = late
        self._timer: TimerHandle | None = None
        self._waited = 0.0
        self._mark = 0

    def event(self) -> None:
        """One has come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def nothing(self, began: float) -> None:
        """Bytes have come and completed no event; the wait for one *began* then, or with bytes before these."""
        if self._timer is None and self._idle is not None:
            self._timer = self._clock.call_at(began + self._idle, self._stalled)

    def measure(self, began: float, received: Callable[[], int]) -> None:
        """Content has come, for which the reader had waited since *began*; *received* tells its bytes until now."""
        if self._rate is None:
            return
        self._waited += self._clock.now() - began
        if self._waited < RATE_SECONDS:
            return
        count = received()
        rate = (count - self._mark) / BYTES_PER_TOKEN / self._waited
        self._waited, self._mark = 0.0, count
        if rate < self._rate:
            self._late(
                LLMTimeoutError(
                    f"the stream brings {rate:.2g} tokens a second, less than timeouts.min_tokens_per_second "
                    f"({self._rate:g})",
                    phase="rate",
                    sent=True,
                )
            )

    def stop(self) -> None:
        """The stream is over."""
        self.event()

    def _stalled(self) -> None:
        self._timer = None
        self._late(LLMTimeoutError(f"no event came for {self._idle:g} s", phase="idle", sent=True))
