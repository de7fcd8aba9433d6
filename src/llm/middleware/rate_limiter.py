"""Admission: where a call waits for a key with capacity and for a free client, in fair order, and pays for both.

Theory of operation. There is one queue per *route* (the set of keys that could take a call) and one ticket counter for
all of them. The key is chosen late: when a call stands at the head and can go. ``_pump`` goes through the heads in the
order of their tickets and admits what fits; a head that must wait claims its keys, so that nobody younger takes what it
is waiting for. Nothing polls: the pump runs when something was given back, when a key has changed, and by one timer at
the earliest instant at which capacity returns by itself.

A permit reserves requests, input and output tokens in the key's ledger and holds a pooled client. Settling it corrects
the ledger by what the attempt turned out to cost, and gives the client back.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from heapq import heapify, heappop, heappush
from math import inf
from typing import NamedTuple

from ..core.events import CallAdmitted, CallQueued, Events
from ..core.exceptions import (
    LLMDeadlineExceededError,
    LLMException,
    LLMPoolExhaustedError,
    LLMRequestTooLargeError,
)
from ..core.types import Cost, KeyRef, LLMResponse, ObservedLimits, Request, Settlement, Usage
from ..utils.alarms import Alarm, Alarms
from ..utils.clock import Clock, TimerHandle
from ..utils.sliding_window import NOTHING, Ledger, Reservation, time_until
from .base import Call, Handler, KeyPool, Lease, PoolKey, Reply

OUTPUT_GUESS = 512
"""Output tokens reserved for an answer whose length nobody knows; corrected at its end."""
MESSAGE_OVERHEAD = 4
"""Tokens that a message costs beside its text."""
LONG_WAIT = 2.0
"""Seconds in the queue after which a call is reported; then every ``LONG_WAIT_AGAIN`` seconds."""
LONG_WAIT_AGAIN = 60.0
MIN_COMPACT = 64
"""Waiters that may have left the middle of the queues before they are swept out."""
MIN_WAKE = 0.05
"""Seconds between two wake-ups by the timer: at most twenty a second, however fast capacity trickles back."""


def estimate(request: Request) -> Cost:
    """What *request* is expected to cost: a quarter of its bytes as input, and a guess of the output."""
    tokens = 0
    for message in request.messages:
        content = message.content
        tokens += MESSAGE_OVERHEAD + (len(content) if content.isascii() else len(content.encode())) // 4
    asked = request.options.max_tokens
    return Cost(1, tokens, OUTPUT_GUESS if asked is None else min(asked, OUTPUT_GUESS))


def charge(reserved: Cost, settlement: Settlement, *, sent: bool) -> Cost:
    """What an attempt costs in the end, of what was *reserved* for it: the refund table.

    A request that never left costs nothing. One that was refused has cost a request (vendors count those, or do not
    say). One that broke off after it had been sent may have been worked on: its input is paid, and its output as far
    as it was reserved, or more if more was seen.
    """
    if not sent:
        return NOTHING
    usage, error = settlement.usage, settlement.error
    if error is None:
        return Cost(1, usage.input_tokens, usage.output_tokens) if usage is not None else reserved
    if isinstance(error, LLMException) and error.status is not None and error.status >= 400 and usage is None:
        return Cost(1, 0, 0)
    return Cost(
        1,
        (usage.input_tokens if usage is not None else 0) or reserved.input_tokens,
        max(usage.output_tokens if usage is not None else 0, reserved.output_tokens),
    )


class RateLimitMiddleware:
    """Lets calls through as the keys' limits allow, and makes the others wait their turn.

    With ``enabled=False`` no limit binds; calls still wait here for a free client of the pool.

    *acquire_timeout* is how long (seconds) a call may be held up by nothing but the lack of a free client.
    """

    def __init__(
        self,
        pool: KeyPool,
        *,
        clock: Clock,
        events: Events | None = None,
        enabled: bool = True,
        guard: float = 0.25,
        acquire_timeout: float | None = None,
        estimate: Callable[[Request], Cost] = estimate,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._events = events if events is not None else Events()
        self._enabled = enabled
        self._guard = guard
        self._acquire_timeout = acquire_timeout
        self._estimate = estimate
        self._ledgers: dict[KeyRef, Ledger] = {}
        self._queues: dict[Sequence[PoolKey], deque[_Waiter]] = {}
        self._waiting = 0
        self._tickets = 0
        self._deadlines: list[tuple[float, int, _Waiter]] = []
        self._timer: TimerHandle | None = None
        self._timer_at = inf
        self._pump_handle: asyncio.Handle | None = None
        self._dead = 0
        self._starving = False
        self._starved_since: float | None = None
        self._starved_total = 0.0
        self._long_waits = Alarms(LONG_WAIT, clock)
        self._longer_waits = Alarms(LONG_WAIT_AGAIN, clock)
        pool.on_change(self._schedule)

    def __repr__(self) -> str:
        return f"<RateLimitMiddleware: {self._waiting} queued, {len(self._ledgers)} keys>"

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        permit = _Permit(self, self._estimate(call.request))
        await permit.renew(call)
        call.admission = permit
        try:
            reply = await handler(call)
        except BaseException as error:
            # Retry has settled what it gave up; then this does nothing.
            permit.settle(Settlement(error=error, usage=error.usage if isinstance(error, LLMException) else None))
            raise
        if type(reply) is LLMResponse:
            permit.settle(Settlement(usage=reply.usage, exact=True))
        else:
            reply.on_settled(permit.settle)
        return reply

    def ledger(self, key: PoolKey) -> Ledger:
        """The ledger of *key*, made at its first use."""
        ledger = self._ledgers.get(key.ref)
        if ledger is None:
            limits = key.limits
            ledger = self._ledgers[key.ref] = (
                Ledger(
                    requests=limits.requests_per_minute,
                    input_tokens=limits.input_tokens_per_minute,
                    output_tokens=limits.output_tokens_per_minute,
                    window=limits.window_seconds,
                    guard=self._guard,
                )
                if self._enabled
                else Ledger()
            )
        return ledger

    def statistics(self) -> dict[str, object]:
        """Queue length, and per key what is used of each limit."""
        now = self._clock.now()
        keys: dict[str, dict[str, object]] = {}
        for ref, ledger in self._ledgers.items():
            ledger.expire(now)
            keys[ref.id] = {
                "requests": {"used": ledger.requests_used, "limit": ledger.request_limit},
                "input_tokens": {"used": ledger.input_used, "limit": ledger.input_limit},
                "output_tokens": {
                    "used": ledger.output_used,
                    "reserved": ledger.open_output,
                    "limit": ledger.output_limit,
                },
            }
        return {"queued": self._waiting, "keys": keys}

    def close(self) -> None:
        """Fail whoever waits, and let go of every timer."""
        for queue in self._queues.values():
            for waiter in queue:
                if waiter.alive:
                    self._finish(waiter, LLMPoolExhaustedError("the manager was closed while the call was waiting"))
        self._queues.clear()
        self._deadlines.clear()
        self._long_waits.close()
        self._longer_waits.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pump_handle is not None:
            self._pump_handle.cancel()
            self._pump_handle = None

    # -- one call's way in ---------------------------------------------------------------------------------------

    async def _admit(self, call: Call, cost: Cost) -> _Grant:
        """Wait for the permit of one attempt.

        Raises:
            LLMDeadlineExceededError: the call's deadline cannot be met (told on arrival), or has passed.
            LLMRequestTooLargeError: no key could ever take the call.
            LLMPoolExhaustedError: no client became free within the acquire timeout.
            LLMException: every key that could take the call is out of use; of the class of the cause.
        """
        route = self._pool.route(call.model)
        refusal = self._pool.refusal(route)
        if refusal is not None:
            raise refusal
        now = self._clock.now()
        if not self._waiting:
            grant = self._grant(route, cost, now, ())
            if grant is not None:
                self._announce(call, grant.key, 0.0, now)
                return grant
        self._refuse_the_hopeless(call, route, cost, now)
        if call.ticket is None:
            self._tickets += 1
            call.ticket = self._tickets
        waiter = _Waiter(call.ticket, call, cost, now, self._starved(now))
        waiter.alarm = self._long_waits.start(partial(self._report_wait, waiter))
        self._enqueue(route, waiter)
        self._schedule()
        try:
            await waiter.future
        except asyncio.CancelledError:
            if isinstance(waiter.outcome, _Grant):
                # Granted and cancelled in the same tick: nobody but us knows of the permit.
                self._give_back(waiter.outcome)
            raise
        finally:
            waiter.alarm.cancel()
            self._leave(waiter)
        outcome, waiter.outcome = waiter.outcome, None
        assert outcome is not None
        if isinstance(outcome, LLMException):
            try:
                raise outcome
            finally:
                # Its traceback holds this frame; what the frame holds would live in a cycle, the prompt with it.
                del outcome, waiter
        self._announce(call, outcome.key, self._clock.now() - now, now)
        return outcome

    def _refuse_the_hopeless(self, call: Call, route: Sequence[PoolKey], cost: Cost, now: float) -> None:
        """Raise at once what waiting cannot mend."""
        ledgers = [self.ledger(key) for key in route]
        excess = [ledger.too_large(cost) for ledger in ledgers]
        if all(excess):
            dimension, need, limit = max((e for e in excess if e is not None), key=lambda e: e[2])
            raise LLMRequestTooLargeError(
                f"the call needs {need} {dimension} and no key may use more than {limit} in one window",
                provider=call.provider,
                model=call.model,
                dimension=dimension,
                need=need,
                limit=limit,
            )
        if call.deadline is None:
            return
        able = [ledger for ledger, too_large in zip(ledgers, excess, strict=True) if too_large is None]
        wait = time_until(able, self._ahead(route, cost, call.ticket), now=now)
        wait = max(wait, min(key.available_at for key in route) - now, 0.0)
        if now + wait >= call.deadline:
            raise LLMDeadlineExceededError(
                f"the deadline in {max(0.0, call.deadline - now):.1f} s cannot be met: "
                f"capacity returns in {wait:.1f} s",
                provider=call.provider,
                model=call.model,
                retry_after=wait,
            )

    def _ahead(self, route: Sequence[PoolKey], cost: Cost, ticket: int | None) -> Cost:
        """What stands before a call, the call included: everybody older who can go nowhere but to *route*'s keys."""
        requests, input_tokens, output_tokens = cost.requests, cost.input_tokens, cost.output_tokens
        keys = set(route)
        for other, queue in self._queues.items():
            if other is route or keys.issuperset(other):
                for waiter in queue:
                    if waiter.alive and (ticket is None or waiter.ticket < ticket):
                        requests += waiter.cost.requests
                        input_tokens += waiter.cost.input_tokens
                        output_tokens += waiter.cost.output_tokens
        return Cost(requests, input_tokens, output_tokens)

    def _announce(self, call: Call, key: PoolKey, waited: float, now: float) -> None:
        call.queued += waited
        if CallAdmitted in self._events.wanted:
            self._events.publish(
                CallAdmitted(
                    at=now + waited,
                    provider=call.provider,
                    call_id=call.id,
                    key_id=key.ref.id,
                    model=call.model or key.model or "",
                    waited=waited,
                )
            )

    # -- the queue -----------------------------------------------------------------------------------------------

    def _enqueue(self, route: Sequence[PoolKey], waiter: _Waiter) -> None:
        queue = self._queues.setdefault(route, deque())
        if not queue or waiter.ticket > queue[-1].ticket:
            queue.append(waiter)
        else:
            # A renewal: it keeps the place that its ticket gives it.
            insort(queue, waiter, key=lambda other: other.ticket)
        self._waiting += 1
        deadline = waiter.call.deadline
        if deadline is not None:
            heappush(self._deadlines, (deadline, waiter.ticket, waiter))

    def _leave(self, waiter: _Waiter) -> None:
        """The waiter is gone, for whatever reason; whoever stood behind it may now be able to go."""
        if waiter.alive:
            waiter.alive = False
            self._waiting -= 1
            self._dead += 1
            if self._dead > MIN_COMPACT and self._dead > self._waiting:
                self._compact()
            self._schedule()

    def _compact(self) -> None:
        """Drop those who left from the middle of the queues, with the prompts that they hold."""
        self._dead = 0
        for route, queue in list(self._queues.items()):
            alive = deque(waiter for waiter in queue if waiter.alive)
            if alive:
                self._queues[route] = alive
            else:
                del self._queues[route]
        self._deadlines = [entry for entry in self._deadlines if entry[2].alive]
        heapify(self._deadlines)

    def _schedule(self) -> None:
        """Run the pump in this turn of the loop, once."""
        if self._waiting and self._pump_handle is None:
            self._pump_handle = asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Admit whoever can go, oldest ticket first, and set the timer for the rest."""
        self._pump_handle = None
        now = self._clock.now()
        self._fail_the_late(now)
        blocked: dict[Sequence[PoolKey], _Waiter] = {}
        claimed: set[PoolKey] = set()
        starved = False
        heads: list[tuple[int, Sequence[PoolKey]]] = []
        for route in list(self._queues):
            self._push_head(route, heads)
        while heads:
            _, route = heappop(heads)
            waiter = self._queues[route][0]
            refusal = self._pool.refusal(route)
            if refusal is not None:
                self._queues[route].popleft()
                self._finish(waiter, refusal)
            elif starved:
                blocked[route] = waiter
                continue
            else:
                grant = self._grant(route, waiter.cost, now, claimed)
                if grant is None:
                    blocked[route] = waiter
                    starved = self._starving
                    claimed.update(route)
                    continue
                self._queues[route].popleft()
                self._finish(waiter, grant)
            self._push_head(route, heads)
        self._note_starvation(starved, now)
        if starved:
            self._fail_the_starved(now)
        self._arm(blocked, now)

    def _push_head(self, route: Sequence[PoolKey], heads: list[tuple[int, Sequence[PoolKey]]]) -> None:
        queue = self._queues[route]
        while queue and not queue[0].alive:
            queue.popleft()
        if queue:
            heappush(heads, (queue[0].ticket, route))
        else:
            del self._queues[route]

    def _finish(self, waiter: _Waiter, outcome: _Grant | LLMException) -> None:
        waiter.alive = False
        self._waiting -= 1
        if waiter.future.cancelled():
            # Its task has been cancelled in this very tick, and has not run yet.
            if isinstance(outcome, _Grant):
                self._give_back(outcome)
            return
        waiter.outcome = outcome
        waiter.future.set_result(None)

    def _grant(
        self, route: Sequence[PoolKey], cost: Cost, now: float, claimed: set[PoolKey] | tuple[()]
    ) -> _Grant | None:
        """A permit on the first key in rotation that can take *cost* now, or None.

        ``_starving`` then says whether a key could have, had there been a free client.
        """
        self._starving = False
        for key in self._pool.rotation(route):
            if key.available_at > now or key in claimed:
                continue
            reservation = self.ledger(key).reserve(cost, now=now)
            if reservation is None:
                continue
            lease = self._pool.lease(key)
            if lease is None:
                reservation.settle(NOTHING, now=now)
                self._starving = True
                return None
            return _Grant(key, lease, reservation)
        return None

    def _give_back(self, grant: _Grant) -> None:
        grant.reservation.settle(NOTHING, now=self._clock.now())
        self._pool.release(grant.lease, None)
        self._schedule()

    # -- time ----------------------------------------------------------------------------------------------------

    def _arm(self, blocked: dict[Sequence[PoolKey], _Waiter], now: float) -> None:
        """Set the one timer to the earliest instant at which anything can change by itself."""
        when = inf
        for route in blocked:
            for key in route:
                at = key.available_at
                if at <= now:
                    expiry = self.ledger(key).next_expiry(now)
                    at = inf if expiry is None else expiry
                when = min(when, at)
        when = max(when, now + MIN_WAKE)
        while self._deadlines and not self._deadlines[0][2].alive:
            heappop(self._deadlines)
        if self._deadlines:
            when = min(when, self._deadlines[0][0])
        if self._starved_since is not None and self._acquire_timeout is not None and blocked:
            oldest = min(waiter.starved_before for waiter in blocked.values())
            when = min(when, now + max(0.0, self._acquire_timeout - (self._starved(now) - oldest)))
        if when == self._timer_at and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = when
        if when < inf:
            self._timer = self._clock.call_at(when, self._wake)

    def _wake(self) -> None:
        self._timer = None
        if self._waiting and self._pump_handle is None:
            self._pump()

    def _fail_the_late(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, waiter = heappop(self._deadlines)
            if waiter.alive:
                self._finish(
                    waiter,
                    LLMDeadlineExceededError(
                        f"the deadline passed after {now - waiter.since:.1f} s in the queue",
                        provider=waiter.call.provider,
                        model=waiter.call.model,
                    ),
                )

    def _starved(self, now: float) -> float:
        """Seconds, since the beginning, in which a key could admit and no client was free."""
        since = self._starved_since
        return self._starved_total + (now - since if since is not None else 0.0)

    def _note_starvation(self, starved: bool, now: float) -> None:
        if starved and self._starved_since is None:
            self._starved_since = now
        elif not starved and self._starved_since is not None:
            self._starved_total = self._starved(now)
            self._starved_since = None

    def _fail_the_starved(self, now: float) -> None:
        if self._acquire_timeout is None:
            return
        starved = self._starved(now)
        for queue in self._queues.values():
            for waiter in queue:
                if not waiter.alive:
                    continue
                # A hundredth of a second is the timer's own inaccuracy.
                if starved - waiter.starved_before < self._acquire_timeout - 0.01:
                    break
                self._finish(
                    waiter,
                    LLMPoolExhaustedError(
                        f"no client became free within {self._acquire_timeout:g} s; raise pool.max_size "
                        "or pool.acquire_timeout",
                        provider=waiter.call.provider,
                        model=waiter.call.model,
                    ),
                )

    def _report_wait(self, waiter: _Waiter) -> None:
        waiter.alarm = self._longer_waits.start(partial(self._report_wait, waiter))
        now = self._clock.now()
        if CallQueued in self._events.wanted:
            self._events.publish(
                CallQueued(
                    at=now,
                    provider=waiter.call.provider,
                    call_id=waiter.call.id,
                    waited=now - waiter.since,
                    ahead=self._waiting - 1,
                )
            )


class _Grant(NamedTuple):
    """What admission hands out: a key, with a client taken and a reservation made."""

    key: PoolKey
    lease: Lease
    reservation: Reservation


class _Waiter:
    """A call in the queue. *outcome* is set before the future is: a grant, or the error to raise."""

    __slots__ = ("alarm", "alive", "call", "cost", "future", "outcome", "since", "starved_before", "ticket")

    alarm: Alarm

    def __init__(self, ticket: int, call: Call, cost: Cost, since: float, starved_before: float) -> None:
        self.ticket = ticket
        self.call = call
        self.cost = cost
        self.since = since
        self.starved_before = starved_before
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.outcome: _Grant | LLMException | None = None
        self.alive = True


class _Permit:
    """The :class:`~.base.Admission` that this layer gives: a reservation in a ledger and a leased client."""

    __slots__ = ("_cost", "_lease", "_limiter", "_reservation", "_sent", "key", "model")

    key: KeyRef
    model: str

    def __init__(self, limiter: RateLimitMiddleware, cost: Cost) -> None:
        self._limiter = limiter
        self._cost = cost
        self._lease: Lease | None = None
        self._reservation: Reservation | None = None
        self._sent = False

    async def renew(self, call: Call) -> None:
        limiter = self._limiter
        key, self._lease, self._reservation = await limiter._admit(call, self._cost)
        self._sent = False
        self.key = key.ref
        self.model = call.model or key.model or limiter._pool.default_model or ""

    def sent(self) -> None:
        self._sent = True
        if self._reservation is not None:
            self._reservation.sent(self._limiter._clock.now())

    def observe(self, *, limits: ObservedLimits | None = None, usage: Usage | None = None) -> None:
        """Nothing is learnt from headers yet."""

    def settle(self, settlement: Settlement) -> None:
        lease, self._lease = self._lease, None
        if lease is None or self._reservation is None:
            return
        limiter = self._limiter
        actual = charge(self._cost, settlement, sent=self._sent)
        self._reservation.settle(actual, now=limiter._clock.now())
        self._reservation = None
        limiter._pool.release(lease, settlement.error)
        limiter._schedule()
