"""What happens in a call's life, told to whoever listens, in bounded queues that never make a call wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, gc=False):
    """Base of all events. *at* is in seconds of the manager's clock, *call_id* is empty when no call is meant."""

    at: float
    provider: str
    call_id: str = ""


class CallStarted(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A call entered the pipeline."""

    model: str | None
    stream: bool


class CallQueued(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A call has waited long for its permit; *ahead* calls stood before it. Told after 2 s, then once a minute."""

    waited: float
    ahead: int


class CallAdmitted(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A call got the permit for one attempt."""

    key_id: str
    model: str
    waited: float


class AttemptFailed(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """An attempt failed. *retry_in* is the seconds until the next one, None if there is none."""

    key_id: str
    attempt: int
    error: str
    status: int | None
    retry_in: float | None


class FellBack(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A call's provider has not answered; *target* is asked next."""

    call_id: str
    error: str
    """Class name of what the provider failed with."""
    target: str
    model: str | None


class StreamResumed(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A stream broke off and is made whole: *how* is ``restart`` or ``continue``."""

    call_id: str
    how: str
    error: str
    """Class name of what it broke off with."""


class CallHedged(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A call's attempt takes long: a second one begins beside it, at *target*."""

    call_id: str
    after: float
    """Seconds that the first has taken."""
    target: str


class CallFinished(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A call ended, well (*error* is None) or not."""

    model: str | None
    error: str | None
    duration: float
    input_tokens: int
    output_tokens: int


class KeyPaused(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A key is left alone for *seconds*, as its vendor asked."""

    key_id: str
    seconds: float


class KeyParked(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A key is out of use until a probe of it succeeds."""

    key_id: str
    reason: str


class KeyRestored(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A parked key works again."""

    key_id: str


class CircuitOpened(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """Too much has failed: the provider, or one key of it, is left alone for *seconds*."""

    key_id: str | None
    """None: the whole provider."""
    seconds: float
    reason: str
    """What failed last."""


class CircuitClosed(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """An attempt has found that it answers again. *ramping*: the others follow by and by; not: as many as before."""

    key_id: str | None
    ramping: bool


class LimitAdopted(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A quota's limit is now what its vendor says in headers: none was configured, or a higher one."""

    quota: str
    dimension: str
    limit: int


class SlowStarted(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """A quota is used gently until its next answer: nothing is known of it yet, or a 429 was not to be expected."""

    quota: str


class SharedOwner(Event, frozen=True, kw_only=True, tag=True, gc=False):
    """Keys of two quota pools have answered in the name of the same *owner*, whose limits they probably share."""

    owner: str
    pools: tuple[str, str]


ALL_EVENTS: tuple[type[Event], ...] = (
    CallStarted,
    CallQueued,
    CallAdmitted,
    AttemptFailed,
    FellBack,
    CallFinished,
    KeyPaused,
    KeyParked,
    KeyRestored,
    CircuitOpened,
    CircuitClosed,
    LimitAdopted,
    SlowStarted,
    SharedOwner,
)

MAX_FAULT_NAMES = 64
"""Different faults that are counted apart; a bound, since exception classes are the user's."""


class Events:
    """The port: layers ``publish``, listeners ``subscribe`` (a bounded queue) or ``listen`` (called at once).

    Ask ``wanted`` before building an event: when nobody listens, nothing is spent. It also counts the *faults* of
    whatever must not fail a call: listeners, callbacks, logging, metrics.
    """

    __slots__ = ("_dropped", "_listeners", "_subscriptions", "faults", "published", "wanted")

    def __init__(self) -> None:
        self._listeners: tuple[tuple[Callable[[Event], object], frozenset[type[Event]]], ...] = ()
        self._subscriptions: tuple[Subscription, ...] = ()
        self.wanted: frozenset[type[Event]] = frozenset()
        self._dropped = 0
        self.published = 0
        self.faults: dict[str, int] = {}

    @property
    def dropped(self) -> int:
        """Events that subscriptions have lost because they were read too slowly."""
        return self._dropped + sum(subscription.dropped for subscription in self._subscriptions)

    def publish(self, event: Event) -> None:
        """Hand *event* to everyone who wants it; never blocks, never raises."""
        self.published += 1
        for subscription in self._subscriptions:
            try:
                subscription._put(event)
            except RuntimeError as error:
                # Whoever waited for it did so on a loop that is closed by now.
                self.fault("subscription", error)
        for listener, kinds in self._listeners:
            if type(event) in kinds:
                try:
                    listener(event)
                except Exception as error:
                    self.fault("listener", error)

    def fault(self, where: str, error: BaseException) -> None:
        """Count an exception that was kept from failing a call."""
        name = f"{where}: {type(error).__name__}"
        if name in self.faults or len(self.faults) < MAX_FAULT_NAMES:
            self.faults[name] = self.faults.get(name, 0) + 1

    def subscribe(self, *, capacity: int = 1024) -> Subscription:
        """Listen to everything from now on, keeping at most *capacity* unread events (the oldest are dropped)."""
        subscription = Subscription(self, capacity)
        self._subscriptions = (*self._subscriptions, subscription)
        self._count_wanted()
        return subscription

    def listen(self, listener: Callable[[Event], object], *kinds: type[Event]) -> None:
        """Call *listener* with every event of *kinds* the moment it happens. It must be quick, and not block."""
        self._listeners = (*self._listeners, (listener, frozenset(kinds)))
        self._count_wanted()

    def _remove(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._dropped += subscription.dropped
        self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)
        self._count_wanted()

    def _count_wanted(self) -> None:
        wanted = frozenset(ALL_EVENTS) if self._subscriptions else frozenset()
        self.wanted = wanted.union(*(kinds for _, kinds in self._listeners))


class Subscription:
    """A bounded queue of events: read it with ``async for``, or all at once with ``drain``."""

    __slots__ = ("_arrived", "_closed", "_events", "_queue", "dropped")

    def __init__(self, events: Events, capacity: int) -> None:
        self._events = events
        self._queue: deque[Event] = deque(maxlen=capacity)
        self._arrived = asyncio.Event()
        self._closed = False
        self.dropped = 0

    def drain(self) -> list[Event]:
        """All unread events, oldest first."""
        events = list(self._queue)
        self._queue.clear()
        return events

    def close(self) -> None:
        """Listen no more; an ``async for`` ends when it has read what was left."""
        self._closed = True
        self._events._remove(self)
        self._arrived.set()

    def _put(self, event: Event) -> None:
        if len(self._queue) == self._queue.maxlen:
            self.dropped += 1
        self._queue.append(event)
        self._arrived.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._queue.popleft()
