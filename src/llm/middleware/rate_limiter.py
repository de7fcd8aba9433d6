"""Admission: where a call waits for a key with capacity and for a free client, in fair order, and pays for both.

Theory of operation. Limits belong to a *quota*: a pool of keys and a group of models (``utils/quota.py``). A call's
*route* is the set of keys that could take it; a key whose limit is smaller than the call is no part of it. The key is
chosen late: when a call is the one whose turn it is (``utils/waiting.py``, ``utils/fairness.py``) and can go. ``_pump``
goes through the routes' heads by their turns and admits what fits; a head that must wait claims its keys, so that
nobody else takes what it is waiting for, except as :meth:`RateLimitMiddleware._overtake` says. Nothing polls: the pump
runs when something was given back, when a key has changed, and by one timer at the earliest instant at which capacity
returns by itself.

A permit reserves requests, input and output tokens and holds a pooled client. While the answer streams, what has come
of it is moved from what is reserved to what is used. Settling corrects the books by what the attempt turned out to
cost, teaches the estimates, and gives the client back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence, Set
from enum import Enum
from heapq import heapify, heappop, heappush, nsmallest
from math import ceil, inf
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias, cast

import msgspec

from ..core.events import CallAdmitted, CallQueued, Events, LimitAdopted, SharedOwner, SlowStarted
from ..core.exceptions import (
    LLMDeadlineExceededError,
    LLMException,
    LLMPoolExhaustedError,
    LLMRateLimitError,
    LLMRequestTooLargeError,
)
from ..core.settings import LimitSettings
from ..core.stream import ResponseStream
from ..core.types import (
    Cost,
    Counting,
    Estimate,
    KeyRef,
    LLMResponse,
    ObservedLimits,
    Priority,
    Request,
    Settlement,
    Usage,
)
from ..utils.alarms import Alarms
from ..utils.appraisal import COUNTS_ALL, Appraiser, Need, charge
from ..utils.clock import Clock, TimerHandle
from ..utils.fairness import Fairness, Flow
from ..utils.output_predictor import OutputPredictor
from ..utils.quota import Probe, Quota
from ..utils.sliding_window import DIMENSIONS, NOTHING, Dimension, Reservation, time_until
from ..utils.tokens import TokenEstimator
from ..utils.waiting import Route, Waiter
from .base import Call, Handler, KeyPool, Lease, PoolKey, Reply

LONG_WAIT = 2.0
"""Seconds in the queue after which a call is reported; then every ``LONG_WAIT_AGAIN`` seconds."""
LONG_WAIT_AGAIN = 60.0
MIN_COMPACT = 64
"""Waiters that may have left before the containers are swept."""
MIN_WAKE = 0.05
"""Seconds between two wake-ups by the timer: at most twenty a second, however fast capacity trickles back."""
OVERTAKERS = 16
OVERTAKING_SECONDS = 30.0
"""How often, and for how long, a head may be overtaken by calls that delay it."""
LOOK_BEHIND = 64
"""Calls behind a blocked head that are looked at."""
RECHECK_SECONDS = 1.0
RECHECKED = 16
"""Waiting calls whose deadlines are held against the latest state, the nearest ones, and how often."""
MAX_AFFINITIES = 1024
"""Conversations whose keys are remembered."""
RAMP_CODES = frozenset(("slow_down", "ramp_limit_exceeded"))
"""OpenAI's and Anthropic's words for traffic that grew too fast (WIRE §1.6, §2.6)."""
PULL_SECONDS = 0.25
"""Between two looks at how far the streams are."""
WEIGHTS: Mapping[Priority, float] = {Priority.HIGH: 8.0, Priority.NORMAL: 3.0, Priority.LOW: 1.0}


def _together(model: str) -> str:
    """All models share one limit."""
    return "*"


class RateLimitMiddleware:
    """Lets calls through as the quotas allow, and makes the others wait their turn.

    With ``enabled=False`` no limit binds; calls still wait here for a free client of the pool.

    *acquire_timeout* is how long (seconds) a call may be held up by nothing but the lack of a free client, *max_queue*
    how many may wait, *weights* the shares of the priorities. *group* names the models that share a limit with one, and
    *counting* is how the vendor counts. *slow_start* begins gently where nothing is known yet.
    """

    def __init__(
        self,
        pool: KeyPool,
        *,
        clock: Clock,
        name: str = "",
        events: Events | None = None,
        enabled: bool = True,
        guard: float = 0.25,
        acquire_timeout: float | None = None,
        max_queue: int | None = None,
        weights: Mapping[Priority, float] = WEIGHTS,
        counting: Counting = COUNTS_ALL,
        group: Callable[[str], str] = _together,
        slow_start: bool = False,
        estimator: TokenEstimator | None = None,
        predictor: OutputPredictor | None = None,
    ) -> None:
        self._pool = pool
        self._name = name
        self._clock = clock
        self._events = events if events is not None else Events()
        self._enabled = enabled
        self._guard = guard
        self._acquire_timeout = acquire_timeout
        self._max_queue = max_queue
        self._counting = counting
        self._group = group
        self._slow_start = slow_start
        self._appraiser = Appraiser(estimator, predictor)
        self._quotas: dict[tuple[str, str], Quota] = {}
        self._quota_of: dict[tuple[PoolKey, str], Quota] = {}
        self._keys_of: dict[Quota, list[str]] = {}
        self._owners: dict[str, str] = {}
        self._affinities: dict[int, PoolKey] = {}
        self._fairness = Fairness(weights)
        self._routes: dict[tuple[tuple[PoolKey, ...], frozenset[Quota]], _Route] = {}
        self._waiting = 0
        self._left = 0
        """Waiters that have gone since the containers were last swept."""
        self._tickets = 0
        self._arrivals = 0
        self._deadlines: list[tuple[float, int, _Waiter]] = []
        self._recheck_at = -inf
        self._timer: TimerHandle | None = None
        self._timer_at = inf
        self._pump_handle: asyncio.Handle | None = None
        self._closed = False
        self._long_waits = Alarms(LONG_WAIT, clock)
        self._longer_waits = Alarms(LONG_WAIT_AGAIN, clock)
        pool.on_change(self._schedule)

    def __repr__(self) -> str:
        return f"<RateLimitMiddleware: {self._waiting} queued, {len(self._quotas)} quotas>"

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        need = self._appraiser.need(call.request) or await self._count(call.request)
        # Thousands may wait here: a permit is made only for those who have got one.
        permit = _Permit(self, need, self._admit(call, need) or await self._wait(call, need))
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
            permit.follow(cast(ResponseStream, reply))
            reply.on_settled(permit.settle)
        return reply

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return self._waiting

    def _counting_of(self, group: str) -> Counting:
        """How the vendor counts of *group*."""
        counting = self._counting
        return msgspec.structs.replace(counting, cache_reads=counting.counts_cache_reads(group))

    # -- seen from outside ---------------------------------------------------------------------------------------------

    def quota(self, key: PoolKey, model: str) -> Quota:
        """The books that a call for *model* with *key* is entered in, made at their first use."""
        quota = self._quota_of.get((key, model))
        if quota is None:
            pool, group = key.quota_pool or key.ref.id, self._group(model)
            quota = self._quotas.get((pool, group))
            if quota is None:
                quota = self._quotas[pool, group] = Quota(
                    f"{pool} {group}",
                    key.limits if self._enabled else _UNLIMITED,
                    counting=self._counting_of(group),
                    guard=self._guard,
                    slow_start=self._slow_start and self._enabled,
                    z=self._appraiser.predictor.z,
                    told=self._tell,
                )
                self._keys_of[quota] = []
            self._keys_of[quota].append(key.ref.id)
            if len(self._quota_of) >= MAX_AFFINITIES:
                # Models are the user's strings: what is forgotten is found again by pool and group.
                self._quota_of.clear()
            self._quota_of[key, model] = quota
        return quota

    async def estimate(self, request: Request, model: str | None) -> Estimate:
        """What *request* would take and how long it would wait if it were made now; nothing is reserved.

        Raises:
            LLMException: no key can take it, as the call itself would be told.
        """
        need = self._appraiser.need(request) or await self._count(request)
        route = tuple(self._pool.route(model))
        self._raise_refusal(route)
        keys = self._fitting(self._name, model, route, need)
        now, options = self._clock.now(), request.options
        flow = self._fairness.flow(options.priority, options.tenant)
        name = self._model(model, keys[0])
        cost, _ = self._appraiser.cost(need, name, self.quota(keys[0], name).counting)
        wait = self._time_until(model, flow, self._tickets + 1, keys, need, now)
        return Estimate(input_tokens=cost.input_tokens, output_tokens=cost.output_tokens, wait=wait)

    async def _count(self, request: Request) -> Need:
        """What *request* needs, by an exact tokenizer that would hold up everybody else for milliseconds."""
        measure = await asyncio.to_thread(self._appraiser.estimator.measure, request)
        return self._appraiser.measured(request, measure)

    def statistics(self) -> dict[str, Any]:
        """Who waits, by priority and tenant; and of each quota what is used, reserved, foreign, and what may be."""
        now = self._clock.now()
        quotas: dict[str, Any] = {}
        for (pool, group), quota in self._quotas.items():
            ledger = quota.ledger
            ledger.expire(now)
            shown: dict[str, Any] = {
                dimension: {
                    "used": ledger.used(dimension),
                    "foreign": getattr(ledger.foreign, dimension),
                    "limit": ledger.limit(dimension),
                }
                for dimension in DIMENSIONS
            }
            shown["output_tokens"]["reserved"] = ledger.open_output
            at = quota.opens_at(now)
            shown["next_capacity"] = max(0.0, at - now) if at < inf else None
            shown["paused_for"] = max(0.0, quota.paused_until - now)
            shown["under_way"] = quota.in_flight
            shown["keys"] = list(dict.fromkeys(self._keys_of[quota]))
            quotas.setdefault(pool, {})[group] = shown
        return {
            "queued": self._waiting,
            "queue": {str(priority): tenants for priority, tenants in self._fairness.backlog().items()},
            "quotas": quotas,
        }

    def close(self) -> None:
        """Fail whoever waits and whoever still comes, and let go of every timer."""
        self._closed = True
        for route in self._routes.values():
            for waiter in tuple(route.arrived):
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
        for route in self._routes.values():
            for waiter in route.arrived:
                waiter.alive = False
        self._waiting = 0
        self._tidy()
        self._long_waits.close()
        self._longer_waits.close()
        self._pump_handle = None
        now = self._clock.now()
        for quota in self._quotas.values():
            quota.start_afresh(now)

    # -- one call's way in ---------------------------------------------------------------------------------------------

    def _admit(self, call: Call, need: Need) -> _Grant | None:
        """The permit of one attempt if nobody waits and a key can take it now.

        Raises:
            LLMException: every key that could take the call is out of use; of the class of the cause.
        """
        if self._closed:
            raise _closed(call.provider)
        route = self._pool.route(call.model)
        if call.avoid is not None:
            route = tuple(key for key in route if key.ref != call.avoid)
        if call.ticket is None:
            self._tickets += 1
            call.ticket = self._tickets
        if not self._waiting:
            now = self._clock.now()
            if call.deadline is None or now < call.deadline:
                grant = self._grant(route, call.model, need, now)
                if type(grant) is _Grant:
                    if CallAdmitted in self._events.wanted:
                        self._announce(call, grant, 0.0, now)
                    return grant
        self._raise_refusal(route)
        if call.hedging:
            raise LLMPoolExhaustedError("there is no capacity for a second attempt", provider=call.provider)
        return None

    async def _wait(self, call: Call, need: Need) -> _Grant:
        """Wait for the permit of one attempt.

        Raises:
            LLMDeadlineExceededError: the call's deadline cannot be met (told on arrival), or has passed.
            LLMRequestTooLargeError: no key could ever take the call.
            LLMPoolExhaustedError: no client became free within the acquire timeout, or the queue is full.
            LLMException: every key that could take the call is out of use; of the class of the cause.
        """
        now = self._clock.now()
        waiter = self._enqueue(call, need, now)
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
        if CallAdmitted in self._events.wanted:
            self._announce(call, outcome, waited, now + waited)
        return outcome

    def _raise_refusal(self, route: Sequence[PoolKey]) -> None:
        refusal = self._pool.refusal(route)
        if refusal is not None:
            try:
                raise refusal
            finally:
                del refusal

    def _fitting(self, provider: str, asked: str | None, route: tuple[PoolKey, ...], need: Need) -> tuple[PoolKey, ...]:
        """The keys of *route* whose limits are not smaller than the call."""
        excess = []
        for key in route:
            model = self._model(asked, key)
            quota = self.quota(key, model)
            excess.append(quota.too_large(self._appraiser.cost(need, model, quota.counting)[0]))
        if not any(excess):
            return route
        fitting = tuple(key for key, too_large in zip(route, excess, strict=True) if too_large is None)
        if fitting:
            self._raise_refusal(fitting)
            return fitting
        dimension, need_of_it, limit = max((e for e in excess if e is not None), key=lambda e: e[2])
        raise LLMRequestTooLargeError(
            f"the call needs {need_of_it} {dimension} and no key may use more than {limit} in one window",
            provider=provider,
            model=asked,
            dimension=dimension,
            need=need_of_it,
            limit=limit,
        )

    def _time_until(
        self, model: str | None, flow: Flow, ticket: int, keys: tuple[PoolKey, ...], need: Need, now: float
    ) -> float:
        """Seconds until a call with *ticket* can be admitted, at the earliest."""
        quotas = dict.fromkeys(self.quota(key, self._model(model, key)) for key in keys)
        cost, _ = self._appraiser.cost(need, self._model(model, keys[0]), next(iter(quotas)).counting)
        wait = time_until([quota.ledger for quota in quotas], cost, self._ahead(quotas.keys(), flow, ticket), now=now)
        opens = min(max(key.available_at, self.quota(key, self._model(model, key)).paused_until) - now for key in keys)
        return max(wait, opens)

    def _hopeless(self, provider: str, model: str | None, *, within: float, wait: float) -> LLMDeadlineExceededError:
        return LLMDeadlineExceededError(
            f"the deadline in {max(0.0, within):.1f} s cannot be met: capacity returns in {wait:.1f} s",
            provider=provider,
            model=model,
            retry_after=wait,
        )

    def _ahead(self, scarce: Set[Quota], flow: Flow, ticket: int) -> Cost:
        """What stands before *ticket*: everybody who goes before it, and needs nothing but what it needs."""
        requests = input_tokens = tokens = 0
        for route in self._routes.values():
            if route.scarce <= scarce:
                need = route.ahead(flow, ticket)
                requests += need.requests
                input_tokens += need.input_tokens
                tokens += need.tokens
        return Cost(requests, input_tokens, 0, tokens)

    def _announce(self, call: Call, grant: _Grant, waited: float, now: float) -> None:
        self._events.publish(
            CallAdmitted(
                at=now,
                provider=call.provider,
                call_id=call.id,
                key_id=grant.key.ref.id,
                model=grant.model,
                waited=waited,
            )
        )

    def _model(self, model: str | None, key: PoolKey) -> str:
        return model or key.model or self._pool.default_model or ""

    # -- the queues ----------------------------------------------------------------------------------------------------

    def _enqueue(self, call: Call, need: Need, now: float) -> _Waiter:
        """Let the call wait for the keys that it fits, unless that is hopeless."""
        ticket, options = call.ticket, call.request.options
        assert ticket is not None
        keys = self._fitting(call.provider, call.model, tuple(self._pool.route(call.model)), need)
        flow = self._fairness.flow(options.priority, options.tenant)
        if call.deadline is not None:
            wait = self._time_until(call.model, flow, ticket, keys, need, now)
            if now + wait >= call.deadline:
                raise self._hopeless(call.provider, call.model, within=call.deadline - now, wait=wait)
        if self._max_queue is not None and self._waiting >= self._max_queue:
            self._make_room(call, options.priority)
        # Calls for other models may have the same keys, and limits of their own.
        scarce = frozenset(self.quota(key, self._model(call.model, key)) for key in keys)
        route = self._routes.get((keys, scarce))
        if route is None:
            route = self._routes[keys, scarce] = Route(keys, self._report_wait, scarce)
        self._arrivals += 1
        waiter: _Waiter = Waiter(
            route,
            flow,
            call_id=call.id,
            provider=call.provider,
            model=call.model,
            ticket=ticket,
            arrival=self._arrivals,
            need=need,
            cost=self._appraiser.cost(need, self._model(call.model, keys[0]), self._counting)[0],
            since=now,
        )
        self._fairness.join(flow)
        route.add(waiter)
        self._waiting += 1
        if call.deadline is not None:
            heappush(self._deadlines, (call.deadline, waiter.arrival, waiter))
        self._long_waits.set(waiter)
        return waiter

    def _make_room(self, call: Call, priority: Priority) -> None:
        """The queue is full: the youngest of the lowest priority gives way to a higher one.

        Raises:
            LLMPoolExhaustedError: there is none below *priority*.
        """
        lowest = self._fairness.lowest()
        order = tuple(Priority)
        if lowest is None or order.index(lowest) <= order.index(priority):
            raise _full(call.provider, call.model, self._waiting)
        youngest = max(
            (
                waiter
                for route in self._routes.values()
                for line in route.lines.values()
                if line.flow.group.priority is lowest
                for waiter in line.waiters
                if waiter.alive
            ),
            key=_ARRIVAL,
        )
        self._finish(youngest, _full(youngest.provider, youngest.model, self._waiting))

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
        waiter.route.subtract(waiter)
        self._fairness.leave(waiter.flow)
        self._waiting -= 1
        self._left += 1

    def _tidy(self) -> None:
        """Sweep the containers when most of what they hold has left."""
        if not self._waiting:
            self._left = 0
            self._routes.clear()
            self._deadlines.clear()
            self._fairness.clear()
            self._set_timer(inf)
        elif self._left > MIN_COMPACT and self._left > self._waiting:
            self._left = 0
            for route in list(self._routes.values()):
                route.sweep()
                if not route.lines:
                    del self._routes[route.keys, cast(frozenset[Quota], route.scarce)]
            self._deadlines = [entry for entry in self._deadlines if entry[2].alive]
            heapify(self._deadlines)

    def _schedule(self) -> None:
        """Run the pump in this turn of the loop, once."""
        if self._waiting and self._pump_handle is None:
            self._pump_handle = asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Admit whoever can go, by their turns, and set the timer for the rest."""
        self._pump_handle = None
        now = self._clock.now()
        self._fail_the_late(now)
        claimed: set[Hashable] = set()
        blocked: list[_Route] = []
        turns: list[_Turn] = []
        for route in list(self._routes.values()):
            self._push(route, turns)
        while turns:
            turn = heappop(turns)
            route = turn[-1]
            waiter = route.head()
            if waiter is None or route.turn() > turn[:-1]:
                # Others of its flow have gone since.
                self._push(route, turns)
                continue
            outcome = self._pool.refusal(route.keys) or self._grant(route.keys, waiter.model, waiter.need, now, claimed)
            route.starve(outcome is _Blocked.BY_CLIENTS, now)
            if not isinstance(outcome, _Blocked):
                self._let_go(waiter, outcome)
                self._push(route, turns)
            elif outcome is _Blocked.BY_CLIENTS and self._fail_the_starved(route, now):
                self._push(route, turns)
            else:
                blocked.append(route)
                if outcome is _Blocked.BY_LIMITS:
                    self._overtake(route, waiter, now, claimed)
                    claimed.update(route.scarce)
        self._tidy()
        self._arm(blocked, now)

    def _push(self, route: _Route, turns: list[_Turn]) -> None:
        if route.head() is not None:
            heappush(turns, (*route.turn(), route))
        else:
            del self._routes[route.keys, cast(frozenset[Quota], route.scarce)]

    def _let_go(self, waiter: _Waiter, outcome: _Grant | LLMException) -> None:
        """The waiter's turn has come."""
        if isinstance(outcome, _Grant):
            self._fairness.serve(waiter.flow, self._share(outcome.cost, waiter.route.keys, outcome.quota))
        self._finish(waiter, outcome)

    def _share(self, cost: Cost, keys: tuple[PoolKey, ...], quota: Quota) -> float:
        """The largest share that *cost* takes of any limit of *quota*'s; of one without limits, all take the same."""
        ledger = quota.ledger
        share = 0.0
        if ledger.request_limit:
            share = cost.requests / ledger.request_limit
        if ledger.input_limit:
            share = max(share, cost.input_tokens / ledger.input_limit)
        if ledger.output_limit:
            share = max(share, cost.output_tokens / ledger.output_limit)
        if ledger.token_limit:
            share = max(share, cost.tokens / ledger.token_limit)
        return share or 1.0

    def _overtake(self, route: _Route, head: _Waiter, now: float, claimed: set[Hashable]) -> None:
        """Let smaller calls pass a *head* that must wait for tokens.

        Without limits on that a large call would starve, without it what is left of a window would be wasted (3 to 7
        points of it, RATE_LIMITING §3.3). So whoever will be no delay may always pass, and others a few times.
        """
        if head.blocked_since is None:
            head.blocked_since = now
        cost = head.cost
        keys = [key for key in route.keys if key.available_at <= now]
        room = max((self._room(key, head.model) for key in keys), default=0)
        if room <= 0:
            return
        for waiter in route.behind(head, LOOK_BEHIND):
            other = waiter.cost
            if other.input_tokens > room or (
                other.input_tokens >= cost.input_tokens and other.output_tokens >= cost.output_tokens
            ):
                continue
            delaying = head.overtaken < OVERTAKERS and now - head.blocked_since < OVERTAKING_SECONDS
            outcome = self._grant(keys, waiter.model, waiter.need, now, claimed, None if delaying else cost)
            if isinstance(outcome, _Grant):
                head.overtaken += delaying
                self._let_go(waiter, outcome)
            elif outcome is _Blocked.BY_CLIENTS:
                return

    def _room(self, key: PoolKey, model: str | None) -> float:
        """Input tokens that may be used now, as far as they are limited; 0 if not even a request may be sent."""
        ledger = self.quota(key, self._model(model, key)).ledger
        if ledger.request_limit is not None and ledger.requests_used >= ledger.request_limit:
            return 0
        return min(
            inf if ledger.input_limit is None else ledger.input_limit - ledger.input_used,
            inf if ledger.token_limit is None else ledger.token_limit - ledger.tokens_used,
        )

    def _grant(
        self,
        route: Sequence[PoolKey],
        model: str | None,
        need: Need,
        now: float,
        claimed: Collection[Hashable] = (),
        beside: Cost | None = None,
    ) -> _Grant | _Blocked:
        """A permit on the first key in rotation that can take *need* now, and still lets *beside* go as soon."""
        affinity = need.affinity
        keys = self._pool.rotation(route)
        if affinity:
            favourite = self._affinities.get(affinity)
            if favourite is not None and favourite in route:
                keys = (favourite, *(key for key in keys if key is not favourite))
        # Among several, one that has room goes before one that can only promise it.
        for sure in (True, False) if len(keys) > 1 else (False,):
            for key in keys:
                if key.available_at > now:
                    continue
                name = model or key.model or self._pool.default_model or ""
                quota = self._quota_of.get((key, name)) or self.quota(key, name)
                if claimed and quota in claimed:
                    continue
                if quota.streams and now >= quota.pulled_at + PULL_SECONDS:
                    self._pull(quota, name, now)
                cost, variance = self._appraiser.cost(need, name, quota.counting)
                if beside is not None and not quota.leaves_room(beside, cost, now=now):
                    continue
                reservation = quota.reserve(cost, now=now, variance=variance, sure=sure)
                if reservation is None:
                    continue
                lease = self._pool.lease(key)
                if lease is None:
                    quota.settle(reservation, NOTHING, now=now)
                    return _Blocked.BY_CLIENTS
                if affinity and favourite is not key:
                    self._remember(affinity, key)
                return _new(_Grant, (key, name, quota, lease, reservation, cost))
        return _Blocked.BY_LIMITS

    def _remember(self, affinity: int, key: PoolKey) -> None:
        if len(self._affinities) >= MAX_AFFINITIES:
            del self._affinities[next(iter(self._affinities))]
        self._affinities[affinity] = key

    def _pull(self, quota: Quota, model: str, now: float) -> None:
        """Ask the streams how far they are, once a second at most, and only when somebody wants capacity."""
        quota.pulled_at = now
        for permit in tuple(quota.streams):
            permit.progress(now)
        ledger = quota.ledger
        ledger.seen_at = now
        if self._appraiser.predictor.look_ahead and not quota.shared(now):
            ledger.lead, ledger.speed = quota.first_token, self._appraiser.predictor.speed(model)

    def _give_back(self, grant: _Grant) -> None:
        grant.quota.settle(grant.reservation, NOTHING, now=self._clock.now())
        # Not a success: the key has not shown that it works.
        self._pool.release(grant.lease, asyncio.CancelledError())
        self._schedule()

    # -- what is learnt ------------------------------------------------------------------------------------------------

    def _tell(self, quota: Quota, dimension: Dimension | None, limit: int) -> None:
        """A limit was adopted, or a slow start has begun: who waits may go now, or not yet."""
        now, name = self._clock.now(), quota.name
        provider = self._keys_of[quota][0].partition("/")[0]
        if dimension is None:
            if SlowStarted in self._events.wanted:
                self._events.publish(SlowStarted(at=now, provider=provider, quota=name))
        elif LimitAdopted in self._events.wanted:
            self._events.publish(LimitAdopted(at=now, provider=provider, quota=name, dimension=dimension, limit=limit))

    def _note_owners(self, key: PoolKey, quota: Quota, owners: Sequence[str]) -> None:
        """Warn once of keys that share an owner, and so limits, but not a pool."""
        pool = key.quota_pool or key.ref.id
        for owner in owners:
            other = self._owners.setdefault(owner, pool)
            if other != pool and (note := f"{owner} {other} {pool}") not in self._owners:
                self._owners[note] = pool
                if SharedOwner in self._events.wanted:
                    self._events.publish(
                        SharedOwner(at=self._clock.now(), provider=key.ref.provider, owner=owner, pools=(other, pool))
                    )

    # -- time ----------------------------------------------------------------------------------------------------------

    def _arm(self, blocked: list[_Route], now: float) -> None:
        """Set the one timer to the earliest instant at which anything can change by itself."""
        earliest = inf
        for route in blocked:
            if route.starved_since is not None:
                continue
            waiter = route.head()
            model = waiter.model if waiter is not None else None
            for key in route.keys:
                at = key.available_at
                if at <= now:
                    at = self.quota(key, self._model(model, key)).opens_at(now)
                earliest = min(earliest, at)
        when = max(earliest, now + MIN_WAKE)
        while self._deadlines and not self._deadlines[0][2].alive:
            heappop(self._deadlines)
        if self._deadlines and self._deadlines[0][0] <= when:
            # Capacity that comes before a deadline must not be handed out after it.
            when = min(earliest, self._deadlines[0][0])
        if self._acquire_timeout is not None:
            when = min(when, min((now + route.patience(self._acquire_timeout, now) for route in blocked), default=inf))
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
        """Fail those whose deadline has passed, and those who can be seen to miss it."""
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
        if self._deadlines and now >= self._recheck_at:
            self._recheck_at = now + RECHECK_SECONDS
            for deadline, _, waiter in nsmallest(RECHECKED, self._deadlines):
                if waiter.alive:
                    wait = self._time_until(
                        waiter.model, waiter.flow, waiter.ticket, waiter.route.keys, waiter.need, now
                    )
                    # Keys that are out of use for good have a better reason.
                    if deadline <= now + wait < inf:
                        error = self._hopeless(waiter.provider, waiter.model, within=deadline - now, wait=wait)
                        self._finish(waiter, error)
                        del error

    def _fail_the_starved(self, route: _Route, now: float) -> bool:
        """Fail those who have waited for nothing but a client for too long; say whether there were any."""
        timeout = self._acquire_timeout
        failed = False
        # A hundredth of a second is the timer's own inaccuracy.
        while timeout is not None and route.patience(timeout, now) <= 0.01:
            waiter = route.arrived.popleft()
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
                    ahead=waiter.route.position(waiter),
                )
            )


def _closed(provider: str) -> LLMPoolExhaustedError:
    return LLMPoolExhaustedError("the manager was closed before the call was admitted", provider=provider)


def _full(provider: str, model: str | None, waiting: int) -> LLMPoolExhaustedError:
    return LLMPoolExhaustedError(
        f"the queue is full: {waiting} calls wait; raise middleware.rate_limiter.max_queue, or offer less",
        provider=provider,
        model=model,
    )


class _Grant(NamedTuple):
    """What admission hands out: a key, with a client taken and a reservation made."""

    key: PoolKey
    model: str
    quota: Quota
    lease: Lease
    reservation: Reservation
    cost: Cost


# Half of what calling the class takes.
_new = tuple.__new__


class _Blocked(Enum):
    """What keeps the head of a queue from going."""

    BY_LIMITS = "limits"
    """Or by pauses, or by another head's claim."""
    BY_CLIENTS = "clients"
    """A key could admit it, and no client is free."""


_Outcome: TypeAlias = _Grant | LLMException
_Waiter: TypeAlias = Waiter[PoolKey, Need, _Outcome]
_Route: TypeAlias = Route[PoolKey, Need, _Outcome]
_Turn: TypeAlias = tuple[float, float, float, int, int, _Route]
_ARRIVAL = attrgetter("arrival")
_UNLIMITED = LimitSettings()


class _Permit:
    """The :class:`~.base.Admission` that this layer gives: a reservation in a quota's books and a leased client."""

    __slots__ = (
        "_cost",
        "_lease",
        "_limiter",
        "_pool_key",
        "_probe",
        "_reservation",
        "_sent_at",
        "_stream",
        "_told",
        "began",
        "key",
        "model",
        "need",
        "quota",
    )

    key: KeyRef
    model: str

    _lease: Lease | None
    _reservation: Reservation | None
    _probe: Probe | None
    _stream: ResponseStream | None
    _sent_at: float | None
    began: float | None

    def __init__(self, limiter: RateLimitMiddleware, need: Need, grant: _Grant) -> None:
        self._limiter = limiter
        self.need = need
        key, self.model, self.quota, self._lease, self._reservation, self._cost = grant
        self._pool_key = key
        self._sent_at = self.began = self._probe = self._stream = None
        self._told = False
        self.key = key.ref

    @property
    def sent_at(self) -> float | None:
        return self._sent_at

    @property
    def wants_limits(self) -> bool:
        return self._probe is not None

    async def renew(self, call: Call) -> None:
        if self._lease is not None:
            # A layer that repeats should have settled; what it forgot to give back would be gone for good.
            self.settle(Settlement(error=asyncio.CancelledError()))
        limiter, need = self._limiter, self.need
        _Permit.__init__(self, limiter, need, limiter._admit(call, need) or await limiter._wait(call, need))

    def sent(self) -> None:
        reservation = self._reservation
        self._sent_at = now = self._limiter._clock.now()
        if reservation is not None:
            reservation.sent(now)
            if now >= self.quota.probe_at and self._limiter._enabled:
                self._probe = self.quota.probe(now)

    def observe(self, *, limits: ObservedLimits | None = None, usage: Usage | None = None) -> None:
        """An answer's headers; or, once it has begun, what the vendor says of its prompt."""
        limiter, quota, reservation = self._limiter, self.quota, self._reservation
        if reservation is None:
            return
        now = limiter._clock.now()
        if limits is not None:
            if not limiter._enabled:
                return
            probe, self._probe = self._probe, None
            if probe is None:
                probe = quota.probe(now, since=self._sent_at)
            if quota.streams and now >= quota.pulled_at + PULL_SECONDS:
                limiter._pull(quota, self.model, now)
            self._told = quota.observe(probe, limits, speed=limiter._appraiser.predictor.speed(self.model), now=now)
            if limits.owners:
                limiter._note_owners(self._pool_key, quota, limits.owners)
        else:
            self.began = now
            if self._sent_at is not None:
                quota.began(reservation, self._sent_at, now=now)
            if usage is not None and usage.input_tokens:
                counting = quota.counting
                counted = usage.input_tokens - (0 if counting.cache_reads else usage.cache_read_tokens)
                tokens = self._cost.tokens if counting.reserve_max else counted
                reservation.correct(input_tokens=counted, tokens=tokens, now=now)
        limiter._schedule()

    def follow(self, stream: ResponseStream) -> None:
        """The answer is a stream: what comes of it is counted while it comes."""
        if self._reservation is not None and not stream.settled:
            self._stream = stream
            self.quota.streams.add(self)
            self.quota.ledger.producing = len(self.quota.streams)

    def progress(self, now: float) -> None:
        """Count what has come of the stream so far."""
        stream, reservation, limiter = self._stream, self._reservation, self._limiter
        if stream is None or reservation is None:
            return
        produced = limiter._appraiser.tokens_in(stream.received)
        usage = stream.usage
        if usage is not None and usage.output_tokens > produced:
            produced = usage.output_tokens
        mean, variance = limiter._appraiser.predictor.expect(
            model=self.model, tag=self.need.tag, max_tokens=self.need.max_tokens, produced=produced
        )
        reservation.produced(produced, mean=ceil(mean), variance=variance, now=now)

    def settle(self, settlement: Settlement) -> None:
        lease, self._lease = self._lease, None
        reservation, self._reservation = self._reservation, None
        if lease is None or reservation is None:
            return
        limiter, quota, stream, error = self._limiter, self.quota, self._stream, settlement.error
        now = limiter._clock.now()
        produced = 0
        if stream is not None:
            self._stream = None
            quota.streams.discard(self)
            quota.ledger.producing = len(quota.streams)
            produced = limiter._appraiser.tokens_in(stream.received)
        actual = charge(
            self._cost,
            settlement,
            sent=self._sent_at is not None,
            produced=produced,
            counting=quota.counting,
        )
        until = None
        sent_at = self._sent_at
        if error is None:
            if settlement.usage is not None and now >= limiter._appraiser.learn_at:
                limiter._appraiser.learn(
                    self.need,
                    settlement.usage,
                    model=self.model,
                    seconds=now - self.began if self.began is not None else None,
                    under_way=quota.ledger.open_count,
                    received=stream.received if stream is not None else 0,
                    now=now,
                )
            if sent_at is not None and not quota.open:
                quota.accepted(sent_at)
        elif sent_at is not None:
            status = error.status if isinstance(error, LLMException) else None
            if status == 429:
                if isinstance(error, LLMRateLimitError) and error.retryable and limiter._enabled:
                    quota.refused(
                        sent_at,
                        retry_after=error.retry_after or 0.0,
                        told=self._told,
                        ramp=error.code in RAMP_CODES,
                        now=now,
                    )
            elif status is not None:
                # Whatever was wrong, it was not the quota.
                quota.accepted(sent_at)
            else:
                # Given up or broken off: the vendor may go on with it for a while.
                until = now + reservation.mean / limiter._appraiser.predictor.speed(self.model)
        quota.settle(reservation, actual, now=now, until=until)
        limiter._pool.release(lease, error)
        if limiter._waiting:
            limiter._schedule()
