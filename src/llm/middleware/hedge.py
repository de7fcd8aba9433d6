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
from typing import Literal

from msgspec.structs import replace

from ..core.arguments import with_options
from ..core.events import CallHedged, Events
from ..core.exceptions import AttemptRecord
from ..core.types import Target
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
        delay = self._delay(call)
        if delay is None:
            reply = await handler(call)
            self._learn(call)
            return reply
        legs = _Legs(self._clock, call)
        try:
            legs.start(call, handler)
            await legs.wait(delay)
            if legs.undecided and (second := self._second(call, handler)) is not None:
                legs.start(*second)
            reply = await legs.answer()
        finally:
            await legs.end()
        if legs.winner is not call:
            self.won += 1
        self._learn(call, legs.lost)
        return reply

    def _delay(self, call: Call) -> float | None:
        """Seconds after which *call* would be hedged, None if that is not known yet."""
        if self._after != "p95":
            return self._after
        taken = self._taken.get(call.model or "")
        return taken.p95 if taken is not None else None

    def _learn(self, call: Call, lost: float | None = None) -> None:
        """From the attempt that was answered; or from the *lost* one, which had taken so long when the other was."""
        if self._after != "p95" or not call.attempts:
            return
        model = call.model or ""
        taken = self._taken.get(model)
        if taken is None:
            if len(self._taken) >= MAX_MODELS:
                self._taken.clear()
            taken = self._taken[model] = _Recent()
        # The lost one would have taken longer still: without it, the tail that hedging cuts would be forgotten.
        taken.add(lost if lost is not None else call.attempts[-1].duration)

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
            self.p95 = ordered[len(ordered) * 95 // 100]


class _Legs:
    """The one or two legs of a call, each a task; the first that is answered wins."""

    def __init__(self, clock: Clock, call: Call) -> None:
        self._clock = clock
        self._call = call
        self._tasks: dict[asyncio.Task[Reply], Call] = {}
        self._timer: TimerHandle | None = None
        self.winner: Call | None = None
        self.lost: float | None = None
        """Seconds that the first leg had taken when the second was answered."""

    @property
    def undecided(self) -> bool:
        return not any(task.done() for task in self._tasks)

    def start(self, call: Call, handler: Handler) -> None:
        self._tasks[asyncio.ensure_future(_run(call, handler))] = call

    async def wait(self, delay: float) -> None:
        """Until the first leg is over, or *delay* has passed since its attempt had a connection."""
        (first,) = self._tasks
        while not first.done():
            admission = self._call.admission
            sent = admission.sent_at if admission is not None else None
            now = self._clock.now()
            left = delay if sent is None else sent + delay - now
            if left <= 0.0:
                return
            woken = asyncio.get_running_loop().create_future()

            def wake(_: object = None, woken: asyncio.Future[None] = woken) -> None:
                if not woken.done():
                    woken.set_result(None)

            first.add_done_callback(wake)
            timer = self._clock.call_at(now + left, wake)
            try:
                await woken
            finally:
                timer.cancel()
                first.remove_done_callback(wake)

    async def answer(self) -> Reply:
        """The first answer; the first leg's error if there is none.

        Raises:
            LLMException: no leg was answered.
        """
        waiting = set(self._tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            # In the order of the legs, so that two that end together are no matter of chance.
            for task, leg in self._tasks.items():
                if task in done and not task.cancelled() and task.exception() is None:
                    self.winner = leg
                    return task.result()
        error = next(iter(self._tasks)).exception()
        assert error is not None
        try:
            raise error
        finally:
            # The tasks hold it, and its traceback this frame.
            del error, task, done

    async def end(self) -> None:
        """Cancel who is still under way, and wait for it: permits and sockets are free when the call returns."""
        call = self._call
        tasks, self._tasks = self._tasks, {}
        admission = call.admission
        if self.winner is not call and admission is not None and admission.sent_at is not None:
            self.lost = self._clock.now() - admission.sent_at
        for task in tasks:
            task.cancel()
        try:
            if not all(task.done() for task in tasks):
                await asyncio.wait(tasks)
        finally:
            for task, leg in tasks.items():
                if leg is self.winner or not task.done() or task.cancelled():
                    continue
                if task.exception() is None:
                    # Both were answered: of this one nobody will hear.
                    leg.close_stream()
            if self.winner is not None and self.winner is not call:
                call.adopt(self.winner)
            call.attempts = _together(call, *(leg for leg in tasks.values() if leg is not call), last=self.winner)


async def _run(call: Call, handler: Handler) -> Reply:
    return await handler(call)


def _together(call: Call, *others: Call, last: Call | None) -> tuple[AttemptRecord, ...]:
    """The attempts of all legs, those of the one that was answered at the end."""
    legs = sorted((call, *others), key=lambda leg: leg is last)
    records = [record for leg in legs for record in leg.attempts]
    return tuple(replace(record, number=number) for number, record in enumerate(records, 1))
