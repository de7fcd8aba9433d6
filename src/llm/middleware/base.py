"""The contracts of the pipeline: a handler answers a call, a middleware wraps a handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from ..core.events import Events
from ..core.exceptions import AttemptRecord, LLMException
from ..core.settings import LimitSettings
from ..core.stream import ResponseStream
from ..core.types import KeyRef, LLMResponse, ObservedLimits, Request, Settlement, Usage
from ..stores.base import Store
from ..utils.clock import Clock

Reply: TypeAlias = "LLMResponse | ResponseStream"


class Admission(Protocol):
    """The permit of one attempt: which key and model it may use, and what it turned out to cost."""

    key: KeyRef
    model: str

    @property
    def sent_at(self) -> float | None:
        """The instant at which the attempt had a connection, None until then."""
        ...

    @property
    def wants_limits(self) -> bool:
        """Whether this attempt's headers are to be read and told to :meth:`observe`: that costs, so not all are."""
        ...

    def sent(self) -> None:
        """A connection is in hand: from here on the attempt may be billed."""
        ...

    def observe(self, *, limits: ObservedLimits | None = None, usage: Usage | None = None) -> None:
        """What the vendor has said before the attempt is over.

        *limits* is what the headers say. Without it, the answer has begun, with *usage* as far as it is known.
        """
        ...

    def settle(self, settlement: Settlement) -> None:
        """The attempt is over: give back what it did not use. Idempotent, synchronous."""
        ...

    async def renew(self, call: Call) -> None:
        """Wait for the next attempt's permit, perhaps on another key, keeping the call's place in the queue."""
        ...


class PoolKey(Protocol):
    """A key as admission sees it."""

    @property
    def ref(self) -> KeyRef: ...

    @property
    def model(self) -> str | None:
        """The key's own model; None if the call has to name one."""
        ...

    @property
    def limits(self) -> LimitSettings: ...

    @property
    def quota_pool(self) -> str | None:
        """Whose limits these are, if other keys have them too."""
        ...

    @property
    def available_at(self) -> float:
        """The instant from which the key may be used: past if now, infinity while it is parked."""
        ...


class Lease(Protocol):
    """A pooled client, taken for one attempt."""

    @property
    def key(self) -> PoolKey: ...


class KeyPool(Protocol):
    """What admission needs of the pool. Nothing here waits."""

    default_model: str | None

    def route(self, model: str | None) -> Sequence[PoolKey]:
        """The keys that could take a call for *model*, in the order of the configuration."""
        ...

    def rotation(self, route: Sequence[PoolKey]) -> Sequence[PoolKey]:
        """*route* in the order in which its keys should be tried now."""
        ...

    def lease(self, key: PoolKey) -> Lease | None:
        """A client for *key*, or None while all clients are busy."""
        ...

    def release(self, lease: Lease, error: BaseException | None) -> None:
        """The attempt is over, with *error* if it failed: the client is free, and the key learns from the error."""
        ...

    def refusal(self, route: Sequence[PoolKey]) -> LLMException | None:
        """Why no key of *route* will be of use however long one waits, or None."""
        ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call *callback* whenever a key's state has changed."""
        ...


class Circuits(Protocol):
    """What is told of attempts, to see which key or provider is down. *began* is the instant at which one did."""

    def succeeded(self, ref: KeyRef, began: float, /) -> None:
        """It was answered, if only with a no."""
        ...

    def failed(self, ref: KeyRef, began: float, error: LLMException, /) -> None:
        """It was not, and the request was not to blame."""
        ...


class Call:
    """Everything one call knows of itself; the one mutable record, owned by one task."""

    __slots__ = (
        "admission",
        "attempts",
        "avoid",
        "continues",
        "deadline",
        "elsewhere",
        "hedging",
        "id",
        "idle_since",
        "model",
        "provider",
        "queued",
        "request",
        "retries",
        "started",
        "stream",
        "ticket",
    )

    def __init__(
        self,
        id: str,
        request: Request,
        *,
        provider: str,
        model: str | None,
        started: float,
        deadline: float | None = None,
    ) -> None:
        self.id = id
        self.request = request
        self.provider = provider
        self.model = model
        """The model that was asked for; None lets the admitted key decide."""
        self.started = started
        self.idle_since = started
        """The instant at which the last attempt ended, or the call began."""
        self.deadline = deadline
        """The instant by which the whole call must have ended, on the manager's clock."""
        self.attempts: tuple[AttemptRecord, ...] = ()
        self.retries = 0
        """Attempts that were repetitions, over all targets."""
        self.admission: Admission | None = None
        self.stream: ResponseStream | None = None
        """The stream that the current attempt has opened, so that whoever gives the attempt up can close it."""
        self.ticket: int | None = None
        """Its place in the queue, kept over all attempts."""
        self.queued = 0.0
        """Seconds spent waiting for permits."""
        self.continues = False
        """Whether its last message is the beginning of an answer that broke off."""
        self.elsewhere = False
        """Whether somebody else can be asked, for whom time is to be left."""
        self.hedging = False
        """Whether it is the second leg of a call: it goes at once or not at all, and is not repeated."""
        self.avoid: KeyRef | None = None
        """The key that its other leg has."""

    def __repr__(self) -> str:
        return f"<Call {self.id} {self.provider} {self.model or 'any model'}, {len(self.attempts)} attempts>"

    def turn_to(self, provider: str, model: str | None, request: Request) -> None:
        """Go on with another target, where nothing is known of the call yet."""
        self.close_stream()
        self.provider, self.model, self.request = provider, model, request
        self.admission = self.ticket = None

    def fork(self) -> Call:
        """A second leg: the same call with a permit, attempts and a stream of its own."""
        other = Call(
            self.id,
            self.request,
            provider=self.provider,
            model=self.model,
            started=self.started,
            deadline=self.deadline,
        )
        other.continues, other.hedging = self.continues, True
        return other

    def adopt(self, other: Call) -> None:
        """Go on as the leg *other*, whose attempts come after this one's."""
        self.provider, self.model, self.request = other.provider, other.model, other.request
        self.admission, self.stream, self.idle_since = other.admission, other.stream, other.idle_since

    def close_stream(self) -> None:
        """Close what the attempt had opened, if it had."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.close()


class Context(NamedTuple):
    """What a registered middleware is built with, beside its own settings."""

    provider: str
    clock: Clock
    random: Callable[[], float]
    events: Events
    store: Store


Handler: TypeAlias = Callable[[Call], Awaitable[Reply]]


class Line(NamedTuple):
    """The way to one provider, below the layers that see a call wherever it is answered."""

    handler: Handler
    model: Callable[[str | None], str | None]
    """The model that a name stands for."""
    objection: Callable[[Request, str | None], LLMException | None]
    """Why the provider would not send a request, if it would not."""


class Middleware(Protocol):
    """Wraps a handler: sees the call on its way down and the reply on its way up. Mostly a coroutine function."""

    def __call__(self, call: Call, handler: Handler, /) -> Awaitable[Reply]: ...


def compose(middleware: Iterable[Middleware], handler: Handler) -> Handler:
    """One handler out of *handler* and the *middleware* around it, the first outermost."""
    for layer in reversed(tuple(middleware)):
        handler = _around(layer, handler)
    return handler


def _around(layer: Middleware, handler: Handler) -> Handler:
    # A method is called faster than an instance.
    enter = layer.__call__ if not callable(getattr(layer, "__get__", None)) else layer

    def through(call: Call) -> Awaitable[Reply]:
        return enter(call, handler)

    return through
