"""The keys of one provider and the clients bound to them: who can be used now, and what each key has learnt.

Theory of operation. A *key* is free, paused until an instant (its vendor said 429), or parked (its vendor said that it
is of no use: 401, 402, a spent quota, 403 confirmed by a probe, or a pause too long to wait for). A parked key comes
back only when a probe of it succeeds; probes go to the vendor's free models endpoint, at growing intervals, and to
parked keys alone. Beside that there is a *circuit* for each key and one for the whole provider, which opens when too
much fails: what is behind it is left alone for seconds, then one attempt finds out (``utils/breaker.py``). A *pooled
client* is a provider bound to one key, carrying one call at a time; it holds no socket (those belong to the transport),
so making one costs nothing and recycling one for another key is a bookkeeping entry.

Everything here decides at once; only the probe awaits.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Sequence
from difflib import get_close_matches
from math import inf
from typing import Any, NamedTuple

from ..middleware.base import Lease, PoolKey
from ..utils.breaker import Breaker, BreakerPolicy, BreakerState
from ..utils.clock import Clock, TimerHandle
from .events import CircuitClosed, CircuitOpened, Events, KeyParked, KeyPaused, KeyRestored
from .exceptions import (
    LLMCircuitOpenError,
    LLMConnectionError,
    LLMException,
    LLMModelNotFoundError,
    LLMQuotaExhaustedError,
    Scope,
)
from .settings import KeySettings, LimitSettings, PoolSettings, ProviderSettings
from .types import Headers, KeyRef

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 60.0
"""Seconds that a key rests after a 429 without retry-after: doubled with each in a row, up to the longest."""
PAUSE_SPREAD = 0.1
"""Share of a pause that is added at random, so that not everybody comes back in the same instant."""
LONGEST_PROBE_WAIT = 86_400.0
"""Seconds: whatever a vendor promised, its key is asked for once a day."""
PROBE_MEMORY = 5.0
"""Seconds for which a probe's result answers for the next one."""

Probe = Callable[[str], Awaitable[int]]
"""Asks the vendor, free of charge, whether a key works; returns the HTTP status."""


class Parked(NamedTuple):
    """Why a key is out of use. It holds facts and not the exception, whose traceback would keep a call alive."""

    kind: type[LLMException]
    message: str
    status: int | None
    code: str | None
    until: float | None
    """The instant at which its vendor promised it back, if it did."""


class Key:
    """One API key and its state."""

    __slots__ = (
        "_secret",
        "available_at",
        "breaker",
        "headers",
        "limits",
        "model",
        "parked",
        "parkings",
        "paused_until",
        "probe_result",
        "probed_at",
        "quota_pool",
        "ref",
        "strikes",
    )

    def __init__(self, provider: ProviderSettings, settings: KeySettings, breaker: BreakerPolicy | None = None) -> None:
        self.ref = KeyRef(provider.name, settings.number)
        model = settings.model
        self.model: str | None = provider.model_aliases.get(model, model) if model is not None else None
        self.limits: LimitSettings = settings.limits
        self.quota_pool: str | None = settings.quota_pool
        self._secret = settings.secret
        self.paused_until = 0.0
        self.available_at = 0.0
        """The instant from which it may be used, by its pause and the circuits; infinite while it is parked."""
        self.breaker = Breaker(breaker) if breaker is not None else None
        self.parked: Parked | None = None
        self.parkings = 0
        """How often in a row it was parked without serving a call in between."""
        self.strikes = 0
        """Answers of 429 in a row."""
        self.probed_at = -inf
        self.probe_result = True
        self.headers: Headers | None = None
        """Of its last response: what the vendor says of its limits, read when somebody asks."""

    def __repr__(self) -> str:
        return f"<Key {self.ref.id} {self.model or 'any model'}{', parked' if self.parked is not None else ''}>"

    def secret(self) -> str:
        """The key itself: for a request's headers and nothing else."""
        return self._secret.reveal()

    def state(self, now: float) -> str:
        """One word for the status page."""
        if self.parked is not None:
            return "parked"
        if self.breaker is not None and self.breaker.state is BreakerState.HALF_OPEN:
            return "probing"
        if self.breaker is not None and self.breaker.blocked(now):
            return "open"
        return "paused" if self.paused_until > now else "healthy"


class PooledClient:
    """A provider bound to one key, carrying one call at a time."""

    __slots__ = ("created_at", "guarded", "key", "number", "served")

    def __init__(self, number: int, key: Key, created_at: float) -> None:
        self.number = number
        self.key = key
        self.created_at = created_at
        self.guarded: float | None = None
        """Since when it carries an attempt that a circuit which is not closed has let through."""
        self.served = 0

    def __repr__(self) -> str:
        return f"<PooledClient {self.number} on {self.key.ref.id}, {self.served} served>"


class ProviderPool:
    """Implements :class:`~..middleware.base.KeyPool` for one provider.

    *random* is uniform in [0, 1) and spreads pauses. *max_pause* is the longest ``retry-after`` (seconds) that is a
    pause; a longer one parks the key, so that calls are told instead of left waiting.
    """

    def __init__(
        self,
        settings: ProviderSettings,
        *,
        clock: Clock,
        random: Callable[[], float],
        events: Events,
        probe: Probe,
        default_model: str | None = None,
        max_pause: float | None = 120.0,
        breaker: BreakerPolicy | None = None,
    ) -> None:
        self.name = settings.name
        self.default_model = default_model
        # Of a single key, its circuit would be the provider's a second time.
        self.keys = tuple(Key(settings, key, breaker if len(settings.keys) > 1 else None) for key in settings.keys)
        self.breaker = Breaker(breaker) if breaker is not None else None
        self._guarded = False
        """Whether any circuit is not closed: only then does anything have to be asked of them."""
        self._settings: PoolSettings = settings.pool
        self._clock = clock
        self._random = random
        self._events = events
        self._probe = probe
        self._max_pause = max_pause
        self._callbacks: list[Callable[[], None]] = []
        self._routes: dict[str | None, tuple[Key, ...]] = {None: self.keys}
        self._any_model = tuple(key for key in self.keys if key.model is None)
        for key in self.keys:
            if key.model is not None and key.model not in self._routes:
                self._routes[key.model] = tuple(k for k in self.keys if k.model in (None, key.model))
        self._next = 0
        self._idle: dict[Key, list[PooledClient]] = {key: [] for key in self.keys}
        self._wears = self._settings.max_requests is not None or self._settings.max_age is not None
        self._size = 0
        self._created = 0
        self._recycled = 0
        self._in_use = 0
        self._past = 0
        """Clients up to this number were made on an event loop that is gone, and are not taken back."""
        self._probing: dict[Key, asyncio.Task[bool]] = {}
        self._probe_timers: dict[Key, TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        now = self._clock.now()
        keys = ", ".join(f"{key.ref.number} {key.state(now)}" for key in self.keys)
        return f"<ProviderPool {self.name}: {self._in_use} of {self._size} clients in use, keys {keys}>"

    # -- the port of admission -----------------------------------------------------------------------------------

    def route(self, model: str | None) -> Sequence[Key]:
        """The keys that could take a call for *model*; every key when the call names none.

        Raises:
            LLMModelNotFoundError: no key is configured for it.
        """
        route = self._routes.get(model, self._any_model)
        if not route:
            raise self._no_key_for(model)
        return route

    def rotation(self, route: Sequence[PoolKey]) -> Sequence[PoolKey]:
        """*route* from the key that follows the last one used: round robin, while all are able."""
        first = self._next
        if len(route) == len(self.keys):
            # Numbers count from 1.
            return route if first == len(route) else (*route[first:], *route[:first])
        return (*(key for key in route if key.ref.number > first), *(key for key in route if key.ref.number <= first))

    def lease(self, key: PoolKey) -> PooledClient | None:
        """A client for *key*: an idle one, a new one while there is room, else an idle one of another key recycled."""
        assert type(key) is Key
        idle = self._idle[key]
        client = idle.pop() if idle else None
        if client is not None and self._wears and self._worn(client):
            self._size -= 1
            client = None
        if client is None:
            if self._size >= self._settings.max_size and not self._recycle():
                return None
            self._size += 1
            self._created += 1
            client = PooledClient(self._created, key, self._clock.now())
        self._in_use += 1
        self._next = key.ref.number
        if self._guarded:
            self._pass_circuits(client)
        return client

    def release(self, lease: Lease, error: BaseException | None) -> None:
        assert type(lease) is PooledClient
        if lease.number <= self._past:
            return
        key = lease.key
        lease.served += 1
        self._in_use -= 1
        if lease.guarded is not None:
            self._leave_circuits(lease)
        if self._wears and self._worn(lease):
            self._size -= 1
        else:
            self._idle[key].append(lease)
        if error is None:
            key.strikes = key.parkings = 0
        else:
            self._learn(key, error)

    @property
    def in_use(self) -> int:
        """How many clients carry an attempt."""
        return self._in_use

    def refusal(self, route: Sequence[PoolKey]) -> LLMException | None:
        if self._closed:
            return LLMConnectionError("the manager is closed", provider=self.name, retryable=False)
        if self._guarded:
            return self._blocked(route)
        for key in route:
            if key.available_at < inf:
                return None
        return self._all_parked(route)

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    # -- circuits ------------------------------------------------------------------------------------------------

    def succeeded(self, ref: KeyRef, began: float) -> None:
        """An attempt with a key, which *began* at an instant, was answered."""
        now = self._clock.now()
        for breaker in (self.breaker, self.keys[ref.number - 1].breaker):
            if breaker is not None and breaker.succeeded(began, now):
                self._turned(breaker, ref)
        if self._guarded:
            self._settle_circuits()

    def failed(self, ref: KeyRef, began: float, error: LLMException) -> None:
        """An attempt with a key, which *began* at an instant, was not answered, and not through the request's fault."""
        now = self._clock.now()
        reason = f"{type(error).__name__}: {error.message}"
        if self.breaker is not None and self.breaker.failed(began, now, reason, under_way=self._in_use):
            for key in self.keys:
                if key.breaker is not None:
                    # What the keys have seen is the provider's trouble.
                    key.breaker.reset(now)
            self._turned(self.breaker, ref)
        else:
            breaker = self.keys[ref.number - 1].breaker
            if breaker is not None and breaker.failed(began, now, reason, under_way=self._in_use / len(self.keys)):
                self._turned(breaker, ref)
        if self._guarded:
            self._settle_circuits()

    def _turned(self, breaker: Breaker, ref: KeyRef) -> None:
        """Tell of a circuit that has opened, or lets through again."""
        self._guarded = True
        now, key_id = self._clock.now(), ref.id if breaker is not self.breaker else None
        if breaker.state is BreakerState.OPEN:
            if CircuitOpened in self._events.wanted:
                seconds, reason = breaker.ready_at - now, breaker.reason
                self._events.publish(
                    CircuitOpened(at=now, provider=self.name, key_id=key_id, seconds=seconds, reason=reason)
                )
        elif CircuitClosed in self._events.wanted:
            ramping = breaker.state is BreakerState.RAMPING
            self._events.publish(CircuitClosed(at=now, provider=self.name, key_id=key_id, ramping=ramping))

    def _pass_circuits(self, client: PooledClient) -> None:
        """An attempt goes while not every circuit is closed."""
        client.guarded = now = self._clock.now()
        for breaker in (self.breaker, client.key.breaker):
            if breaker is not None and breaker.state is not BreakerState.CLOSED:
                breaker.admit(now)
        self._apply_circuits()

    def _leave_circuits(self, client: PooledClient) -> None:
        began, client.guarded = client.guarded, None
        assert began is not None
        for breaker in (self.breaker, client.key.breaker):
            if breaker is not None:
                breaker.leave(began)
        self._settle_circuits()

    def _settle_circuits(self) -> None:
        """Something has changed: whoever waits may go now, or waits in vain."""
        self._apply_circuits()
        self._changed()

    def _apply_circuits(self) -> None:
        whole = self.breaker.ready_at if self.breaker is not None else 0.0
        self._guarded = self.breaker is not None and self.breaker.state is not BreakerState.CLOSED
        for key in self.keys:
            at = whole
            if (breaker := key.breaker) is not None:
                at = max(at, breaker.ready_at)
                self._guarded |= breaker.state is not BreakerState.CLOSED
            key.available_at = inf if key.parked is not None else max(key.paused_until, at)

    def _blocked(self, route: Sequence[PoolKey]) -> LLMException | None:
        """Why no key of *route* is of use now, if circuits or parking keep all of them."""
        now = self._clock.now()
        whole = self.breaker is not None and self.breaker.blocked(now)
        found: list[Breaker] = []
        for key in route:
            assert type(key) is Key
            breaker = self.breaker if whole else key.breaker
            if breaker is not None and breaker.blocked(now):
                found.append(breaker)
            elif key.parked is None:
                return None
        if not found:
            return self._all_parked(route)
        soonest = min(found, key=lambda breaker: breaker.ready_at)
        wait = soonest.ready_at - now
        when = f"for {wait:.1f} s more" if wait < inf else "until an attempt that is under way has found out"
        return LLMCircuitOpenError(
            f"{self.name} is left alone {when}, because too much failed; the last: {soonest.reason}",
            provider=self.name,
            retry_after=wait if wait < inf else None,
            retryable=False,
            scope=Scope.PROVIDER,
        )

    # -- what keys learn -----------------------------------------------------------------------------------------

    def key(self, ref: KeyRef) -> Key:
        """The key that *ref* names."""
        return self.keys[ref.number - 1]

    def _learn(self, key: Key, error: BaseException) -> None:
        if isinstance(error, LLMException) and error.scope is Scope.KEY and error.key_id == key.ref.id:
            if error.retryable:
                self._pause(key, error)
                return
            self._park(key, error)
            if isinstance(error, LLMQuotaExhaustedError) and key.quota_pool is not None:
                # What is spent is the organisation's, whoever of its keys asks.
                for other in self.keys:
                    if other.quota_pool == key.quota_pool and other.parked is None:
                        self._park(other, error)

    def _pause(self, key: Key, error: LLMException) -> None:
        now = self._clock.now()
        seconds = error.retry_after
        if seconds is not None and self._max_pause is not None and seconds > self._max_pause:
            self._park(key, error, until=now + seconds)
            return
        if key.paused_until <= now:
            # Refusals that were under way together are one strike.
            key.strikes += 1
        if not seconds:
            # No hint, or "0" as some endpoints say while they go on refusing.
            seconds = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(max(key.strikes - 1, 0), 20))
        seconds *= 1.0 + PAUSE_SPREAD * self._random()
        if now + seconds > key.paused_until:
            key.paused_until = now + seconds
            if key.parked is None:
                key.available_at = max(key.available_at, key.paused_until)
            if KeyPaused in self._events.wanted:
                self._events.publish(KeyPaused(at=now, provider=self.name, key_id=key.ref.id, seconds=seconds))
        self._changed()

    def _park(self, key: Key, error: LLMException, *, until: float | None = None) -> None:
        first = key.parked is None
        key.parked = Parked(type(error), error.message, error.status, error.code, until)
        key.available_at = inf
        if not first:
            return
        now = self._clock.now()
        if KeyParked in self._events.wanted:
            reason = f"{type(error).__name__}: {error.message}"
            self._events.publish(KeyParked(at=now, provider=self.name, key_id=key.ref.id, reason=reason))
        # A key without credit may well list models: it comes back by the probe and is parked again, ever longer.
        wait = min(self._settings.probe_interval * 2.0 ** min(key.parkings, 20), self._settings.probe_max_interval)
        key.parkings += 1
        self._probe_in(key, until - now if until is not None else wait, wait)
        self._changed()

    def _restore(self, key: Key) -> None:
        key.parked = None
        key.paused_until = key.available_at = 0.0
        if self._guarded:
            self._apply_circuits()
        if KeyRestored in self._events.wanted:
            self._events.publish(KeyRestored(at=self._clock.now(), provider=self.name, key_id=key.ref.id))
        self._changed()

    def _changed(self) -> None:
        for callback in self._callbacks:
            callback()

    # -- probes --------------------------------------------------------------------------------------------------

    async def works(self, key: Key) -> bool:
        """Whether a probe of *key* is accepted just now. Calls that ask together share one probe."""
        if self._clock.now() - key.probed_at < PROBE_MEMORY:
            return key.probe_result
        task = self._probing.get(key)
        if task is None:
            task = self._probing[key] = asyncio.get_running_loop().create_task(self._ask(key))
            task.add_done_callback(lambda _: self._probing.pop(key, None))
        # Waited for, not awaited: the cancellation of one call must not answer for the others, and that of the probe,
        # when the pool is closed, must not look like the call's own.
        await asyncio.wait((task,))
        return task.cancelled() or task.result()

    async def _ask(self, key: Key) -> bool:
        try:
            status = await self._probe(key.secret())
        except Exception as error:
            # Nobody answered: that says nothing about the key. Anything else is a fault in a dialect or a transport.
            if not isinstance(error, LLMException):
                self._events.fault("probe", error)
            return key.parked is None
        key.probed_at = self._clock.now()
        key.probe_result = status not in (401, 402, 403)
        return key.probe_result

    def _probe_in(self, key: Key, seconds: float, interval: float) -> None:
        if self._closed:
            return
        # The timer may be the last to know this pool; it must not be what keeps it alive.
        pool = weakref.ref(self)

        def due() -> None:
            alive = pool()
            if alive is not None and key.parked is not None:
                alive._probe_timers.pop(key, None)
                task = asyncio.get_running_loop().create_task(alive._revive(key, interval))
                alive._tasks.add(task)
                task.add_done_callback(alive._tasks.discard)

        self._probe_timers[key] = self._clock.call_at(self._clock.now() + min(seconds, LONGEST_PROBE_WAIT), due)

    async def _revive(self, key: Key, interval: float) -> None:
        if await self.works(key):
            self._restore(key)
        else:
            interval = min(interval * 2.0, self._settings.probe_max_interval)
            self._probe_in(key, interval, interval)

    # -- clients -------------------------------------------------------------------------------------------------

    def _worn(self, client: PooledClient) -> bool:
        settings = self._settings
        return (settings.max_requests is not None and client.served >= settings.max_requests) or (
            settings.max_age is not None and self._clock.now() - client.created_at >= settings.max_age
        )

    def _recycle(self) -> bool:
        """Give up one idle client, of whichever key has most of them."""
        idle = max(self._idle.values(), key=len)
        if not idle:
            return False
        idle.pop(0)
        self._size -= 1
        self._recycled += 1
        return True

    # -- words ---------------------------------------------------------------------------------------------------

    def _no_key_for(self, model: str | None) -> LLMException:
        configured = sorted({key.model for key in self.keys if key.model is not None})
        close = get_close_matches(model or "", configured, 1)
        return LLMModelNotFoundError(
            f"no key of {self.name} is configured for model {model!r}"
            + (f"; did you mean {close[0]!r}?" if close else ".")
            + f" Configured: {', '.join(configured) or 'none'}. Add it under providers.{self.name}.models.",
            provider=self.name,
            model=model,
        )

    def _all_parked(self, route: Sequence[PoolKey]) -> LLMException:
        reasons = [key.parked for key in route if isinstance(key, Key) and key.parked is not None]
        soonest = min((r.until for r in reasons if r.until is not None), default=None)
        last = reasons[-1]
        which = "the only key" if len(reasons) == 1 else f"each of the {len(reasons)} keys"
        return last.kind(
            f"{which} of {self.name} that could take this call is out of use; the last one said: {last.message}",
            provider=self.name,
            status=last.status,
            code=last.code,
            retry_after=max(0.0, soonest - self._clock.now()) if soonest is not None else None,
            # Repeating asks the same parked keys.
            retryable=False,
            scope=Scope.PROVIDER,
        )

    def statistics(self) -> dict[str, Any]:
        """Clients, and the state of every key; no secret in it."""
        now = self._clock.now()
        return {
            "clients": {
                "in_use": self._in_use,
                "idle": self._size - self._in_use,
                "max_size": self._settings.max_size,
                "created": self._created,
                "recycled": self._recycled,
            },
            "circuit": _circuit(self.breaker, now),
            "keys": [
                {
                    "id": key.ref.id,
                    "model": key.model,
                    "state": key.state(now),
                    "circuit": _circuit(key.breaker, now),
                    "paused_for": max(0.0, key.paused_until - now),
                    "reason": f"{key.parked.kind.__name__}: {key.parked.message}" if key.parked is not None else None,
                }
                for key in self.keys
            ],
        }

    def health(self) -> dict[str, Any]:
        """Whether any key may be asked, and the state of each, by its place in the configuration."""
        now = self._clock.now()
        blocked = self.breaker is not None and self.breaker.blocked(now)
        keys: dict[str, dict[str, Any]] = {}
        for key in self.keys:
            facts: dict[str, Any] = {"state": key.state(now)}
            if key.parked is not None:
                facts["reason"] = f"{key.parked.kind.__name__}: {key.parked.message}"
            elif key.paused_until > now:
                facts["for"] = key.paused_until - now
            keys[key.ref.id] = facts
        usable = any(facts["state"] in ("healthy", "paused") for facts in keys.values())
        circuit = self.breaker.state.value if self.breaker is not None else None
        return {"ready": usable and not blocked and not self._closed, "circuit": circuit, "keys": keys}

    def start_afresh(self) -> None:
        """Forget the clients and probes of an event loop that is gone; what the keys have learnt stays."""
        self._past = self._created
        self._in_use = self._size = 0
        for breaker in (self.breaker, *(key.breaker for key in self.keys)):
            if breaker is not None:
                # Nobody is left to tell what became of the attempt that was to find out.
                breaker.reset(self._clock.now())
        self._apply_circuits()
        for clients in self._idle.values():
            clients.clear()
        self._probing.clear()
        self._tasks.clear()
        timers, self._probe_timers = self._probe_timers, {}
        for timer in timers.values():
            timer.cancel()
        for key in self.keys:
            if key.parked is not None:
                self._probe_in(key, self._settings.probe_interval, self._settings.probe_interval)

    def refuse(self) -> None:
        """From here on no call is admitted, and no probe begins."""
        self._closed = True
        timers, self._probe_timers = self._probe_timers, {}
        for timer in timers.values():
            timer.cancel()
        self._changed()

    async def close(self) -> None:
        """End the probes."""
        self.refuse()
        tasks = [*self._tasks, *self._probing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _circuit(breaker: Breaker | None, now: float) -> dict[str, Any] | None:
    """A circuit for the status page: its state, why it is not closed, and the seconds until an attempt may go."""
    if breaker is None:
        return None
    wait = breaker.ready_at - now
    return {
        "state": breaker.state.value,
        "reason": breaker.reason if breaker.state is not BreakerState.CLOSED else None,
        "next_probe_in": max(0.0, wait) if breaker.state is BreakerState.OPEN else None,
    }
