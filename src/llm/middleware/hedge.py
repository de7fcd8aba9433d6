"""Hedging: a call whose attempt takes unusually long is given a second one, elsewhere, and the first answer counts.

It trades a few more requests for a shorter tail, so it is opt-in. The time counts from the instant at which the attempt
had a connection, never while the call queues: what is full is not helped by more. The second leg has a permit of its
own, on another key or, where there is one key, at the first target of the call's chain that is fit for it. It goes at
once or not at all, and is not repeated. The loser is cancelled, and paid for like any cancelled attempt.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import copy_context
from typing import Literal

from msgspec.structs import replace

from ..core.arguments import with_options
from ..core.events import CallHedged, Events
from ..core.exceptions import AttemptRecord, LLMException
from ..core.types import Target
from ..utils.alarms import Alarms, Limit
from ..utils.clock import Clock, TimerHandle
from .base import Call, Handler, KeyPool, Line, Reply

MIN_SAMPLES = 20
"""Attempts of a model that must have been answered before ``p95`` says anything; and after so many it is told anew."""
SAMPLES = 200
"""So many of the last ones are looked at."""
MAX_MODELS = 256
MOST_SAVED = 10.0
"""Second legs that quiet times save up for a bad one."""


class HedgeMiddleware:
    """Starts second legs. *chain* tells the targets of a call, *lines* the way to each.

    Args:
        after: seconds from an attempt's connection to its second leg, or ``p95`` of what the model's attempts take.
        max_share: of the calls, how many may be given one.
    """

    def __init__(
        self,
        pool: KeyPool,
        *,
        after: Literal["p95"] | float,
        max_share: float,
        chain: Callable[[Call], Sequence[Target]],
        lines: Mapping[str, Line],
        clock: Clock,
        events: Events | None = None,
    ) -> None:
        self._pool = pool
        self._after = after
        self._share = max_share
        self._chain = chain
        self._lines = lines
        self._clock = clock
        self._events = events if events is not None else Events()
        self._taken: dict[str, _Recent] = {}
        self._alarms: dict[float, Alarms] = {}
        self._saved = 0.0
        self.hedged = 0
        """Second legs that were begun."""
        self.won = 0
        """Of these, how many answered first."""

    def __call__(self, call: Call, handler: Handler, /) -> Awaitable[Reply]:
        return handler(call) if call.hedging else self._hedged(call, handler)

    def statistics(self) -> dict[str, float]:
        """How many second legs there were, and how many of them answered first."""
        return {"hedged": self.hedged, "won": self.won}

    async def _hedged(self, call: Call, handler: Handler) -> Reply:
        self._saved = min(MOST_SAVED, self._saved + self._share)
        model = call.model or ""
        alarms = self._waiting(model)
        if alarms is None:
            reply = await handler(call)
            self._learn(model, call.attempts)
            return reply
        race = _Race(self._clock, call, handler, alarms, self._second)
        try:
            with race:
                reply = await handler(call)
            race.winner = call
        except (TimeoutError, LLMException) as error:
            reply = await race.other(error)
            self.won += 1
        finally:
            # Mostly there was no second leg: then this is all.
            race.timer.cancel()
            if race.leg is not None:
                await race.end()
        if self._after == "p95":
            self._learn(model, call.attempts, race.lost if race.winner is not call else None)
        return reply

    def _waiting(self, model: str) -> Alarms | None:
        """What counts the time until a call for *model* is hedged, None if that is not known yet.

        All that wait equally long share a timer; times are told apart by two digits.
        """
        if self._after != "p95":
            seconds = self._after
        else:
            taken = self._taken.get(model)
            if taken is None or taken.p95 is None:
                return None
            seconds = taken.p95
        alarms = self._alarms.get(seconds)
        if alarms is None:
            alarms = self._alarms[seconds] = Alarms(seconds, self._clock)
        return alarms

    def close(self) -> None:
        """Let go of the timers."""
        for alarms in self._alarms.values():
            alarms.close()
        self._alarms.clear()

    def _learn(self, model: str, attempts: Sequence[AttemptRecord], lost: float | None = None) -> None:
        """From the attempt that was answered; or from the *lost* one, which had taken so long when the other was."""
        if not attempts:
            return
        taken = self._taken.get(model)
        if taken is None:
            if len(self._taken) >= MAX_MODELS:
                self._taken.clear()
            taken = self._taken[model] = _Recent()
        # The lost one would have taken longer still: without it, the tail that hedging cuts would be forgotten.
        taken.add(lost if lost is not None else attempts[-1].duration)

    def _second(self, call: Call, handler: Handler) -> tuple[Call, Handler] | None:
        """A second leg and the way it goes, None if there is none or no more may be made."""
        # Sums of twentieths are not exact.
        if self._saved < 1.0 - 1e-9 or call.admission is None:
            return None
        other = call.fork()
        if len(self._pool.route(call.model)) > 1:
            other.avoid = call.admission.key
        else:
            way = self._elsewhere(call, other)
            if way is None:
                return None
            handler = way
        other.idle_since = now = self._clock.now()
        self._saved -= 1.0
        self.hedged += 1
        if CallHedged in self._events.wanted:
            sent = call.admission.sent_at
            self._events.publish(
                CallHedged(
                    at=now,
                    provider=call.provider,
                    call_id=call.id,
                    after=now - sent if sent is not None else 0.0,
                    target=other.provider,
                )
            )
        return other, handler

    def _elsewhere(self, call: Call, other: Call) -> Handler | None:
        """Turn *other* to the first target of the chain that is fit for it."""
        for target in self._chain(call):
            line = self._lines[target.provider]
            model = line.model(target.model)
            request = with_options(call.request, target.options)
            if (target.provider, model) != (call.provider, call.model) and line.objection(request, model) is None:
                other.turn_to(target.provider, model, request)
                return line.handler
        return None


class _Recent:
    """What the last attempts of a model took."""

    __slots__ = ("_durations", "_new", "p95")

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=SAMPLES)
        self._new = 0
        self.p95: float | None = None

    def add(self, duration: float) -> None:
        self._durations.append(duration)
        self._new += 1
        if self._new >= MIN_SAMPLES:
            self._new = 0
            ordered = sorted(self._durations)
            self.p95 = float(f"{ordered[len(ordered) * 95 // 100]:.2g}")


class _Race(Limit):
    """A call in its own task, and perhaps a second leg of it in another; who is answered first wins.

    The first leg runs in the block of this limit, which the second one's answer ends.
    """

    __slots__ = (
        "_call",
        "_clock",
        "_context",
        "_delay",
        "_handler",
        "_other",
        "_second",
        "leg",
        "lost",
        "timer",
        "winner",
    )

    def __init__(
        self,
        clock: Clock,
        call: Call,
        handler: Handler,
        alarms: Alarms,
        second: Callable[[Call, Handler], tuple[Call, Handler] | None],
    ) -> None:
        super().__init__(None)
        self._clock = clock
        self._call = call
        # The shared timer that begins the second leg runs in nobody's context: what the caller had set would be lost.
        self._context = copy_context()
        self._handler = handler
        self._delay = alarms.seconds
        self._second = second
        self._other: asyncio.Task[Reply] | None = None
        self.leg: Call | None = None
        self.timer: TimerHandle = alarms.start(self._look)
        self.winner: Call | None = None
        self.lost: float | None = None
        """Seconds that the first leg had taken when the second was answered."""

    async def other(self, error: Exception) -> Reply:
        """The answer of the second leg, now that the first has ended with *error*.

        Raises:
            LLMException: *error*, if there is none.
        """
        task = self._other
        if task is not None and not task.done():
            await asyncio.wait([task])
        try:
            if task is None or task.cancelled() or task.exception() is not None:
                raise error
        finally:
            # Its traceback holds this frame.
            del error
        self.winner = self.leg
        return task.result()

    async def end(self) -> None:
        """End the second leg, if it is under way: permits and sockets are free when the call returns."""
        call, leg, task = self._call, self.leg, self._other
        self._other = None
        assert leg is not None
        assert task is not None
        try:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        finally:
            if self.winner is leg:
                call.close_stream()
                call.adopt(leg)
            elif task.done() and not task.cancelled() and task.exception() is None:
                # Both were answered: of this one nobody will hear.
                leg.close_stream()
            call.attempts = _together(*((call, leg) if self.winner is leg else (leg, call)))

    def _look(self) -> None:
        """Begin the second leg, if the first has had a connection for long enough."""
        now, admission = self._clock.now(), self._call.admission
        sent = admission.sent_at if admission is not None else None
        due = sent + self._delay if sent is not None else now + self._delay
        if due > now:
            self.timer = self._clock.call_at(due, self._look)
            return
        second = self._second(self._call, self._handler)
        if second is not None:
            self.leg, handler = second
            self._other = asyncio.get_running_loop().create_task(_run(self.leg, handler), context=self._context)
            self._other.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[Reply]) -> None:
        if not task.cancelled() and task.exception() is None:
            admission = self._call.admission
            if admission is not None and admission.sent_at is not None:
                self.lost = self._clock.now() - admission.sent_at
            self.expire()


async def _run(call: Call, handler: Handler) -> Reply:
    return await handler(call)


def _together(first: Call, last: Call) -> tuple[AttemptRecord, ...]:
    """The attempts of both legs, numbered anew."""
    records = (*first.attempts, *last.attempts)
    return tuple(replace(record, number=number) for number, record in enumerate(records, 1))
