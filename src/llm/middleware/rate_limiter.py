"""Admission: where a call waits for a key with capacity and for a free client, in fair order, and pays for both.

Theory of operation. There is one queue per *route* (the set of keys that could take a call) and one ticket counter for
all of them; a key whose limit is smaller than the call is no part of its route. The key is chosen late: when a call
stands at the head and can go. ``_pump`` goes through the heads in the order of their tickets and admits what fits; a
head that must wait claims its keys, so that nobody younger takes what it is waiting for. Nothing polls: the pump runs
when something was given back, when a key has changed, and by one timer at the earliest instant at which capacity
returns by itself.

A permit reserves requests, input and output tokens in the key's ledger and holds a pooled client. Settling it corrects
the ledger by what the attempt turned out to cost, and gives the client back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum
from heapq import heapify, heappop, heappush
from math import inf
from typing import NamedTuple, TypeAlias

from ..core.events import CallAdmitted, CallQueued, Events
from ..core.exceptions import (
    LLMDeadlineExceededError,
    LLMException,
    LLMPoolExhaustedError,
    LLMRequestTooLargeError,
)
from ..core.types import Cost, KeyRef, LLMResponse, ObservedLimits, Request, Settlement, Usage
from ..utils.alarms import Alarms
from ..utils.clock import Clock, TimerHandle
from ..utils.sliding_window import NOTHING, Ledger, Reservation, time_until
from ..utils.waiting import Line, Waiter
from .base import Call, Handler, KeyPool, Lease, PoolKey, Reply

OUTPUT_GUESS = 512
"""Output tokens reserved for an answer whose length nobody knows; corrected at its end."""
MESSAGE_OVERHEAD = 4
"""Tokens that a message costs beside its text."""
LONG_WAIT = 2.0
"""Seconds in the queue after which a call is reported; then every ``LONG_WAIT_AGAIN`` seconds."""
LONG_WAIT_AGAIN = 60.0
MIN_COMPACT = 64
"""Waiters that may have left before the containers are swept."""
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
        if usage is None or not usage.total_tokens:
            # Some compatible servers do not count, or say nothing but zeros.
            return reserved
        return Cost(reserved.requests, usage.input_tokens or reserved.input_tokens, usage.output_tokens)
    if isinstance(error, LLMException) and error.status is not None and error.status >= 400 and usage is None:
        return Cost(reserved.requests, 0, 0)
    return Cost(
        reserved.requests,
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
        self._ledgers: dict[PoolKey, Ledger] = {}
        self._queues: dict[tuple[PoolKey, ...], _Queue] = {}
        self._waiting = 0
        self._left = 0
        """Waiters that have gone since the containers were last swept."""
        self._tickets = 0
        self._arrivals = 0
        self._deadlines: list[tuple[float, int, _Waiter]] = []
        self._timer: TimerHandle | None = None
        self._timer_at = inf
        self._pump_handle: asyncio.Handle | None = None
        self._closed = False
        self._long_waits = Alarms(LONG_WAIT, clock)
        self._longer_waits = Alarms(LONG_WAIT_AGAIN, clock)
        pool.on_change(self._schedule)

    def __repr__(self) -> str:
        return f"<RateLimitMiddleware: {self._waiting} queued, {len(self._ledgers)} keys>"

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        permit = _Permit(self, self._estimate(call.request))
        permit.take(call, self._admit(call, permit.cost) or await self._wait(call, permit.cost))
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
        ledger = self._ledgers.get(key)
        if ledger is None:
            limits = key.limits
            ledger = self._ledgers[key] = (
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
        for key, ledger in self._ledgers.items():
            ledger.expire(now)
            keys[key.ref.id] = {
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
        """Fail whoever waits and whoever still comes, and let go of every timer."""
        self._closed = True
        for queue in self._queues.values():
            for waiter in queue.waiters:
                if waiter.alive:
                    self._finish(waiter, _closed(waiter.provider))
        self._tidy()
        self._long_waits.close()
        self._longer_waits.close()
        if self._pump_handle is not None:
            self._pump_handle.cancel()
            self._pump_handle = None

    def start_afresh(self) -> None:
        """On another event loop: whoever waited on the old one is gone, and what was used stays used."""
        for queue in self._queues.values():
            for waiter in queue.waiters:
                waiter.alive = False
        self._waiting = 0
        self._tidy()
        self._long_waits.close()
        self._longer_waits.close()
        self._pump_handle = None
        now = self._clock.now()
        self._ledgers = {ref: ledger.successor(now) for ref, ledger in self._ledgers.items()}

    # -- one call's way in ---------------------------------------------------------------------------------------

    def _admit(self, call: Call, cost: Cost) -> _Grant | None:
        """The permit of one attempt if nobody waits and a key can take it now.

        Raises:
            LLMException: every key that could take the call is out of use; of the class of the cause.
        """
        if self._closed:
            raise _closed(call.provider)
        route = tuple(self._pool.route(call.model))
        self._raise_refusal(route)
        if call.ticket is None:
            self._tickets += 1
            call.ticket = self._tickets
        now = self._clock.now()
        if not self._waiting and (call.deadline is None or now < call.deadline):
            grant = self._grant(route, cost, now, ())
            if isinstance(grant, _Grant):
                self._announce(call, grant.key, 0.0, now)
                return grant
        return None

    async def _wait(self, call: Call, cost: Cost) -> _Grant:
        """Wait for the permit of one attempt.

        Raises:
            LLMDeadlineExceededError: the call's deadline cannot be met (told on arrival), or has passed.
            LLMRequestTooLargeError: no key could ever take the call.
            LLMPoolExhaustedError: no client became free within the acquire timeout.
            LLMException: every key that could take the call is out of use; of the class of the cause.
        """
        now = self._clock.now()
        waiter = self._enqueue(call, cost, now)
        self._schedule()
        try:
            await waiter.future
        except asyncio.CancelledError:
            if isinstance(waiter.outcome, _Grant):
                # Granted and cancelled in the same tick: nobody but us knows of the permit.
                self._give_back(waiter.outcome)
            raise
        finally:
            self._leave(waiter)
            waited = self._clock.now() - now
            call.queued += waited
        outcome, waiter.outcome = waiter.outcome, None
        assert outcome is not None
        if isinstance(outcome, LLMException):
            try:
                raise outcome
            finally:
                # Its traceback holds this frame; what the frame holds would live in a cycle, the prompt with it.
                del outcome, waiter
        self._announce(call, outcome.key, waited, now + waited)
        return outcome

    def _raise_refusal(self, route: Sequence[PoolKey]) -> None:
        refusal = self._pool.refusal(route)
        if refusal is not None:
            try:
                raise refusal
            finally:
                del refusal

    def _fitting(self, call: Call, route: tuple[PoolKey, ...], cost: Cost) -> tuple[PoolKey, ...]:
        """The keys of *route* whose limits are not smaller than the call."""
        excess = [self.ledger(key).too_large(cost) for key in route]
        if not any(excess):
            return route
        fitting = tuple(key for key, too_large in zip(route, excess, strict=True) if too_large is None)
        if fitting:
            self._raise_refusal(fitting)
            return fitting
        dimension, need, limit = max((e for e in excess if e is not None), key=lambda e: e[2])
        raise LLMRequestTooLargeError(
            f"the call needs {need} {dimension} and no key may use more than {limit} in one window",
            provider=call.provider,
            model=call.model,
            dimension=dimension,
            need=need,
            limit=limit,
        )

    def _refuse_the_hopeless(
        self, call: Call, ticket: int, deadline: float, route: tuple[PoolKey, ...], cost: Cost, now: float
    ) -> None:
        """Raise at once if the deadline will have passed before the call can be admitted."""
        wait = time_until([self.ledger(key) for key in route], cost, self._ahead(route, ticket), now=now)
        wait = max(wait, min(key.available_at for key in route) - now)
        if now + wait >= deadline:
            raise LLMDeadlineExceededError(
                f"the deadline in {max(0.0, deadline - now):.1f} s cannot be met: capacity returns in {wait:.1f} s",
                provider=call.provider,
                model=call.model,
                retry_after=wait,
            )

    def _ahead(self, route: tuple[PoolKey, ...], ticket: int) -> Cost:
        """What stands before *ticket*: everybody older who can go nowhere but to *route*'s keys.

        Without their output, which is reserved as a guess and mostly given back long before a window is over.
        """
        requests = input_tokens = 0
        keys = frozenset(route)
        for queue in self._queues.values():
            if keys.issuperset(queue.route):
                need = queue.need_before(ticket)
                requests += need[0]
                input_tokens += need[1]
        return Cost(requests, input_tokens)

    def _announce(self, call: Call, key: PoolKey, waited: float, now: float) -> None:
        if CallAdmitted in self._events.wanted:
            self._events.publish(
                CallAdmitted(
                    at=now,
                    provider=call.provider,
                    call_id=call.id,
                    key_id=key.ref.id,
                    model=self._model(call, key),
                    waited=waited,
                )
            )

    def _model(self, call: Call, key: PoolKey) -> str:
        return call.model or key.model or self._pool.default_model or ""

    # -- the queues ----------------------------------------------------------------------------------------------

    def _enqueue(self, call: Call, cost: Cost, now: float) -> _Waiter:
        """Put the call into the queue of the keys that it fits, unless that is hopeless."""
        ticket = call.ticket
        assert ticket is not None
        route = self._fitting(call, tuple(self._pool.route(call.model)), cost)
        if call.deadline is not None:
            self._refuse_the_hopeless(call, ticket, call.deadline, route, cost, now)
        queue = self._queues.get(route)
        if queue is None:
            queue = self._queues[route] = Line(route, self._report_wait)
        self._arrivals += 1
        waiter: _Waiter = Waiter(
            queue,
            call_id=call.id,
            provider=call.provider,
            model=call.model,
            ticket=ticket,
            arrival=self._arrivals,
            cost=cost,
            since=now,
        )
        queue.add(waiter)
        self._waiting += 1
        if call.deadline is not None:
            heappush(self._deadlines, (call.deadline, waiter.arrival, waiter))
        self._long_waits.set(waiter)
        return waiter

    def _leave(self, waiter: _Waiter) -> None:
        """The waiter's task goes on, for whatever reason; whoever stood behind it may now be able to go."""
        waiter.cancel()
        if waiter.alive:
            self._remove(waiter)
            self._tidy()
            self._schedule()

    def _finish(self, waiter: _Waiter, outcome: _Grant | LLMException) -> None:
        self._remove(waiter)
        if waiter.future.cancelled():
            # Its task has been cancelled in this very tick, and has not run yet.
            if isinstance(outcome, _Grant):
                self._give_back(outcome)
            return
        waiter.outcome = outcome
        waiter.future.set_result(None)

    def _remove(self, waiter: _Waiter) -> None:
        waiter.alive = False
        waiter.line.subtract(waiter)
        self._waiting -= 1
        self._left += 1

    def _tidy(self) -> None:
        """Sweep the containers when most of what they hold has left."""
        if not self._waiting:
            self._left = 0
            self._queues.clear()
            self._deadlines.clear()
            self._set_timer(inf)
        elif self._left > MIN_COMPACT and self._left > self._waiting:
            self._left = 0
            for queue in list(self._queues.values()):
                queue.sweep()
                if not queue.waiters:
                    del self._queues[queue.route]
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
        claimed: set[PoolKey] = set()
        blocked: list[_Queue] = []
        heads: list[tuple[int, int, _Queue]] = []
        for queue in list(self._queues.values()):
            self._push_head(queue, heads)
        while heads:
            queue = heappop(heads)[2]
            waiter = queue.waiters[0]
            outcome = self._pool.refusal(queue.route) or self._grant(queue.route, waiter.cost, now, claimed)
            queue.starve(outcome is _Blocked.BY_CLIENTS, now)
            if not isinstance(outcome, _Blocked):
                queue.waiters.popleft()
                self._finish(waiter, outcome)
                self._push_head(queue, heads)
            elif outcome is _Blocked.BY_CLIENTS and self._fail_the_starved(queue, now):
                self._push_head(queue, heads)
            else:
                blocked.append(queue)
                if outcome is _Blocked.BY_LIMITS:
                    claimed.update(queue.route)
        self._tidy()
        self._arm(blocked, now)

    def _push_head(self, queue: _Queue, heads: list[tuple[int, int, _Queue]]) -> None:
        waiters = queue.waiters
        while waiters and not waiters[0].alive:
            waiters.popleft()
        if waiters:
            heappush(heads, (waiters[0].ticket, waiters[0].arrival, queue))
        else:
            del self._queues[queue.route]

    def _grant(
        self, route: tuple[PoolKey, ...], cost: Cost, now: float, claimed: set[PoolKey] | tuple[()]
    ) -> _Grant | _Blocked:
        """A permit on the first key in rotation that can take *cost* now."""
        for key in self._pool.rotation(route):
            if key.available_at > now or key in claimed:
                continue
            reservation = self.ledger(key).reserve(cost, now=now)
            if reservation is None:
                continue
            lease = self._pool.lease(key)
            if lease is None:
                reservation.settle(NOTHING, now=now)
                return _Blocked.BY_CLIENTS
            return _Grant(key, lease, reservation)
        return _Blocked.BY_LIMITS

    def _give_back(self, grant: _Grant) -> None:
        grant.reservation.settle(NOTHING, now=self._clock.now())
        # Not a success: the key has not shown that it works.
        self._pool.release(grant.lease, asyncio.CancelledError())
        self._schedule()

    # -- time ----------------------------------------------------------------------------------------------------

    def _arm(self, blocked: list[_Queue], now: float) -> None:
        """Set the one timer to the earliest instant at which anything can change by itself."""
        earliest = inf
        for queue in blocked:
            if queue.starved_since is not None:
                continue
            for key in queue.route:
                at = key.available_at
                if at <= now:
                    at = self.ledger(key).next_expiry(now) or inf
                earliest = min(earliest, at)
        when = max(earliest, now + MIN_WAKE)
        while self._deadlines and not self._deadlines[0][2].alive:
            heappop(self._deadlines)
        if self._deadlines and self._deadlines[0][0] <= when:
            # Capacity that comes before a deadline must not be handed out after it.
            when = min(earliest, self._deadlines[0][0])
        if self._acquire_timeout is not None:
            when = min(when, min((now + queue.patience(self._acquire_timeout, now) for queue in blocked), default=inf))
        self._set_timer(when)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            if when == self._timer_at:
                return
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
                        provider=waiter.provider,
                        model=waiter.model,
                    ),
                )

    def _fail_the_starved(self, queue: _Queue, now: float) -> bool:
        """Fail those who have waited for nothing but a client for too long; say whether there were any."""
        timeout = self._acquire_timeout
        failed = False
        # A hundredth of a second is the timer's own inaccuracy.
        while timeout is not None and queue.patience(timeout, now) <= 0.01:
            waiter = queue.arrived.popleft()
            self._finish(
                waiter,
                LLMPoolExhaustedError(
                    f"no client became free within {timeout:g} s; raise pool.max_size or pool.acquire_timeout",
                    provider=waiter.provider,
                    model=waiter.model,
                ),
            )
            failed = True
        return failed

    def _report_wait(self, waiter: _Waiter) -> None:
        self._longer_waits.set(waiter)
        now = self._clock.now()
        if CallQueued in self._events.wanted:
            self._events.publish(
                CallQueued(
                    at=now,
                    provider=waiter.provider,
                    call_id=waiter.call_id,
                    waited=now - waiter.since,
                    ahead=waiter.line.position(waiter),
                )
            )


def _closed(provider: str) -> LLMPoolExhaustedError:
    return LLMPoolExhaustedError("the manager was closed before the call was admitted", provider=provider)


class _Grant(NamedTuple):
    """What admission hands out: a key, with a client taken and a reservation made."""

    key: PoolKey
    lease: Lease
    reservation: Reservation


class _Blocked(Enum):
    """What keeps the head of a queue from going."""

    BY_LIMITS = "limits"
    """Or by pauses, or by an older head's claim."""
    BY_CLIENTS = "clients"
    """A key could admit it, and no client is free."""


_Waiter: TypeAlias = Waiter[PoolKey, _Grant | LLMException]
_Queue: TypeAlias = Line[PoolKey, _Grant | LLMException]


class _Permit:
    """The :class:`~.base.Admission` that this layer gives: a reservation in a ledger and a leased client."""

    __slots__ = ("_lease", "_limiter", "_reservation", "_sent", "cost", "key", "model")

    key: KeyRef
    model: str

    def __init__(self, limiter: RateLimitMiddleware, cost: Cost) -> None:
        self._limiter = limiter
        self.cost = cost
        self._lease: Lease | None = None
        self._reservation: Reservation | None = None
        self._sent = False

    async def renew(self, call: Call) -> None:
        if self._lease is not None:
            # A layer that repeats should have settled; what it forgot to give back would be gone for good.
            self.settle(Settlement(error=asyncio.CancelledError()))
        limiter = self._limiter
        self.take(call, limiter._admit(call, self.cost) or await limiter._wait(call, self.cost))

    def take(self, call: Call, grant: _Grant) -> None:
        """Hold what was granted."""
        key, self._lease, self._reservation = grant
        self._sent = False
        self.key = key.ref
        self.model = self._limiter._model(call, key)

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
        actual = charge(self.cost, settlement, sent=self._sent)
        self._reservation.settle(actual, now=limiter._clock.now())
        self._reservation = None
        limiter._pool.release(lease, settlement.error)
        limiter._schedule()
