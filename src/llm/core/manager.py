"""The composition root: the only module that chooses implementations, and the one documented accessor.

A manager builds, for each configured provider, a dialect, a transport, a pool and a pipeline, and owns them until it is
closed. Building connects nothing and touches no event loop; the first call does.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random as randomness
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias, Unpack
from weakref import WeakKeyDictionary

import msgspec

from ..middleware.base import Call, Context, Line, Middleware, Reply, compose
from ..middleware.circuit_breaker import CircuitBreakerMiddleware
from ..middleware.fallback import FallbackMiddleware
from ..middleware.hedge import HedgeMiddleware
from ..middleware.logging import LoggingMiddleware
from ..middleware.metrics import MetricsMiddleware
from ..middleware.rate_limiter import RateLimitMiddleware
from ..middleware.resume import ResumeMiddleware, once
from ..middleware.retry import RetryMiddleware
from ..middleware.stack import Layer, default_stack
from ..providers.base import Provider
from ..stores.base import Store
from ..stores.memory import MemoryStore
from ..transports.base import Transport
from ..utils.backoff import RetryPolicy
from ..utils.breaker import BreakerPolicy
from ..utils.clock import Clock, SystemClock
from ..utils.output_predictor import OutputPredictor
from ..utils.redact import credentials
from ..utils.retry_budget import RetryBudget, RetryBudgetPolicy
from ..utils.tokens import TokenEstimator, Tokenizer
from . import config
from .client import Home, LLMClient, Pipeline
from .endpoint import Endpoint, Prober
from .events import Events
from .exceptions import LLMConfigurationError, LLMConnectionError
from .inquiry import Inquiry
from .pool import ProviderPool
from .settings import CircuitBreakerSettings, LLMSettings, ProviderSettings
from .types import CallOptions, Priority

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

logger = logging.getLogger("brimful")

ProviderFactory: TypeAlias = Callable[[ProviderSettings], Provider]
TransportFactory: TypeAlias = Callable[[ProviderSettings, Clock], Transport]
MiddlewareFactory: TypeAlias = Callable[[Mapping[str, Any], Context], Middleware]
StoreFactory: TypeAlias = Callable[[Clock], Store]
Arrange: TypeAlias = Callable[[list[Layer]], Sequence[Layer]]

PROVIDERS_GROUP = "brimful.providers"
MIDDLEWARE_GROUP = "brimful.middleware"
STORES_GROUP = "brimful.stores"

DRAIN_STEP = 0.05
"""Seconds between two looks at whether the last call is over."""


class _Line(NamedTuple):
    """Everything that belongs to one provider."""

    provider: Provider
    transport: Transport
    pool: ProviderPool
    limiter: RateLimitMiddleware
    retry: RetryMiddleware | None
    hedge: HedgeMiddleware | None
    layers: tuple[Layer, ...]
    prober: Prober
    endpoint: Endpoint
    inquiry: Inquiry
    pipeline: Pipeline


class LLMManager:
    """Owns the providers' pools and pipelines. Use it in ``async with``, or close it when you are done.

    *providers*, *middleware* and *store* register implementations by object: a factory ``(ProviderSettings) ->
    Provider`` by dialect name, a middleware by the name it has in the configuration, a store. What is not given is
    looked for among the entry points ``brimful.providers``, ``brimful.middleware`` and ``brimful.stores``.
    *arrange* is handed the default layers of each provider, outermost first, and returns those to use.
    *tokenizer* counts prompts exactly (``utils.tokens.Tokenizer``); without one they are estimated.
    *clock*, *random* (uniform in [0, 1)) and *transport* are for tests and simulations.
    """

    def __init__(
        self,
        settings: LLMSettings,
        *,
        providers: Mapping[str, ProviderFactory] | None = None,
        middleware: Mapping[str, Middleware] | None = None,
        store: Store | None = None,
        arrange: Arrange | None = None,
        clock: Clock | None = None,
        random: Callable[[], float] = randomness.random,
        transport: TransportFactory | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.settings = settings
        self.events = Events()
        """What happens in the calls' lives: ``manager.events.subscribe()``."""
        self._clock: Clock = clock if clock is not None else SystemClock()
        self._backoff = _Backoff(self._clock)
        self._home = Home(self._start_afresh)
        self._random = random
        self._tokenizer = tokenizer
        self._store = store if store is not None else _store(settings.store, self._clock)
        self._closed = self._store_closed = self._draining = False
        self._prefix = f"{int(random() * 0x10000):04x}"
        self._numbers = itertools.count(1)
        chosen = settings.middleware
        self._metrics = MetricsMiddleware(clock=self._clock, events=self.events) if chosen.metrics.enabled else None
        self._logging = (
            LoggingMiddleware(clock=self._clock, events=self.events, content=chosen.logging.content)
            if chosen.logging.enabled
            else None
        )
        self._targets: dict[str, Line] = {}
        """The way to each provider, below the layers that see a call wherever it is answered."""
        self._lines: dict[str, _Line] = {
            name: self._line(provider, providers or {}, middleware or {}, arrange, transport or _http_transport)
            for name, provider in settings.providers.items()
        }

    @classmethod
    def from_config(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        environ: Mapping[str, str] | None = None,
        providers: Mapping[str, ProviderFactory] | None = None,
        middleware: Mapping[str, Middleware] | None = None,
        store: Store | None = None,
        arrange: Arrange | None = None,
        clock: Clock | None = None,
        random: Callable[[], float] = randomness.random,
        transport: TransportFactory | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Self:
        """A manager from a YAML file's path, or from a mapping of the same shape (``config/llm.yaml`` explains it).

        *environ* answers ``${NAME}`` (default: the process's environment). It reads files: in a coroutine, call it
        with ``asyncio.to_thread``, or use ``get_llm_manager``.

        Raises:
            LLMConfigurationError: something is wrong; the message names the place, what was seen and the mend.
        """
        settings = config.load(
            source,
            environ=environ if environ is not None else os.environ,
            warn=logger.warning,
            **_known(providers, middleware),
        )
        return cls(
            settings,
            providers=providers,
            middleware=middleware,
            store=store,
            arrange=arrange,
            clock=clock,
            random=random,
            transport=transport,
            tokenizer=tokenizer,
        )

    @classmethod
    def discover(cls, *, environ: Mapping[str, str] | None = None, cwd: str | os.PathLike[str] | None = None) -> Self:
        """A manager from what is found: ``LLM_CONFIG``, ``config/llm.yaml``, or the vendors' keys in the environment.

        Raises:
            LLMConfigurationError: nothing is found (the message lists the ways), or what is found is wrong.
        """
        settings = config.discover(
            environ=environ if environ is not None else os.environ,
            cwd=Path(cwd) if cwd is not None else Path.cwd(),
            warn=logger.warning,
            **_known(None, None),
        )
        return cls(settings)

    def __repr__(self) -> str:
        return f"<LLMManager: {', '.join(self._lines)}{', closed' if self._closed else ''}>"

    def get_client(
        self, provider: str | None = None, model: str | None = None, **defaults: Unpack[CallOptions]
    ) -> LLMClient:
        """A light handle on *provider* (else the default one), and on *model* if one is named.

        *defaults* are the options of every call made with it.

        Raises:
            LLMConfigurationError: no such provider is configured.
            LLMModelNotFoundError: no key of it is configured for *model*.
            LLMInvalidRequestError: one of *defaults* is not an option.
        """
        line = self._lines.get(provider or self.settings.default_provider)
        if line is None:
            close = get_close_matches(provider or "", self._lines, 1)
            raise LLMConfigurationError(
                f"provider {provider!r} is not configured"
                + (f"; did you mean {close[0]!r}?" if close else ".")
                + f" Configured: {', '.join(self._lines)}."
            )
        if model is not None:
            line.pool.route(line.pipeline.aliases.get(model, model))
        return LLMClient(line.pipeline, model=model, defaults=defaults)

    def get_status(self) -> dict[str, Any]:
        """Where everything stands: ``providers`` (clients, keys, connections), ``limits``, ``metrics``, ``events``.

        ``limits`` tells of each provider who waits, and of each quota what is used, reserved, foreign and allowed.
        A key's ``vendor_limits`` are what the headers of its last answer said.
        Keys appear by their place in the configuration (``anthropic/2``); no secret and no prompt is in it.
        """
        return {
            "closed": self._closed,
            "default_provider": self.settings.default_provider,
            "providers": {name: self._provider_status(line) for name, line in self._lines.items()},
            "limits": {name: line.limiter.statistics() for name, line in self._lines.items()},
            "metrics": self._metrics.snapshot() if self._metrics is not None else {},
            "events": {"published": self.events.published, "dropped": self.events.dropped},
            "faults": dict(self.events.faults),
        }

    def health(self) -> dict[str, Any]:
        """For the probes of a platform: ``live``, ``ready``, and of each provider its ``circuit`` and its ``keys``.

        *live* until the manager is closed. *ready* while the default provider, or one that its chain of fallbacks
        leads to, has a key that may be asked: neither parked nor behind an open circuit; a paused one comes back by
        itself. A key is ``healthy``, ``paused`` (``for`` so many seconds), ``parked`` (with its ``reason``), ``open``,
        or ``probing`` (one attempt finds out).
        """
        providers = {name: line.pool.health() for name, line in self._lines.items()}
        first = self.settings.default_provider
        chain = self.settings.providers[first].fallback
        targets = [first, *(target.provider for target in self.settings.fallbacks.get(chain or "", ()))]
        ready = not self._draining and any(providers[name]["ready"] for name in targets)
        return {"live": not self._closed, "ready": ready and not self._closed, "providers": providers}

    async def close(self, *, drain: float = 0.0) -> None:
        """Close everything: waiting calls fail, calls under way lose their connections, later calls are refused.

        With *drain* (seconds), calls that have begun may end first, for so long; new ones are refused at once.

        Raises:
            LLMConfigurationError: the manager is in use on another event loop, which is still open.
        """
        self._home.enter(asyncio.get_running_loop())
        if drain > 0.0 and not self._closed:
            await self._drain(drain)
        self._closed = True
        # First whatever decides at once, so that nothing new begins while connections are being closed. Closing again
        # does no harm, and finishes what a cancelled close has left.
        for line in self._lines.values():
            line.pipeline.handler = _refuse
            line.pool.refuse()
            line.limiter.close()
            line.endpoint.close()
            if line.hedge is not None:
                line.hedge.close()
        self._backoff.end()
        for line in self._lines.values():
            await line.pool.close()
            await line.transport.close()
            line.prober.close()
            line.inquiry.close()
        if not self._store_closed:
            await self._store.close()
            self._store_closed = True
        self._home.loop = None

    async def _drain(self, seconds: float) -> None:
        """Refuse new calls, and wait until those that have begun are over, or the time is."""
        self._draining = True
        for line in self._lines.values():
            line.pipeline.handler = _refuse
        until = self._clock.now() + seconds
        while self._busy and (left := until - self._clock.now()) > 0.0:
            await self._clock.sleep(min(DRAIN_STEP, left))

    @property
    def _busy(self) -> bool:
        return self._backoff.sleeping or any(
            line.pool.in_use or line.limiter.waiting or line.endpoint.streaming for line in self._lines.values()
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # -- building ------------------------------------------------------------------------------------------------

    def _line(
        self,
        settings: ProviderSettings,
        factories: Mapping[str, ProviderFactory],
        objects: Mapping[str, Middleware],
        arrange: Arrange | None,
        transport_factory: TransportFactory,
    ) -> _Line:
        clock, chosen = self._clock, self.settings.middleware
        provider = _provider_factory(settings.dialect, factories)(settings)
        transport = transport_factory(settings, clock)
        prober = Prober(provider, transport, clock)
        pool = ProviderPool(
            settings,
            clock=clock,
            random=self._random,
            events=self.events,
            probe=prober,
            default_model=provider.default_model,
            max_pause=chosen.retry.max_retry_after,
            breaker=_breaker_policy(chosen.circuit_breaker),
        )
        _warn_of_retired(pool, provider)
        limiter = RateLimitMiddleware(
            pool,
            name=settings.name,
            clock=clock,
            events=self.events,
            enabled=chosen.rate_limiter.enabled,
            guard=chosen.rate_limiter.guard_seconds,
            acquire_timeout=settings.pool.acquire_timeout,
            max_queue=chosen.rate_limiter.max_queue,
            weights={priority: getattr(chosen.rate_limiter.weights, priority) for priority in Priority},
            counting=provider.counting,
            group=provider.group,
            slow_start=chosen.rate_limiter.slow_start,
            estimator=TokenEstimator(self._tokenizer),
            predictor=OutputPredictor(chosen.rate_limiter.output_reserve),
        )
        retry = (
            RetryMiddleware(
                RetryPolicy(
                    max_attempts=chosen.retry.max_attempts,
                    base_delay=chosen.retry.base_delay,
                    max_delay=chosen.retry.max_delay,
                    max_retry_after=chosen.retry.max_retry_after,
                ),
                clock=self._backoff,
                random=self._random,
                events=self.events,
                budget=RetryBudget(
                    RetryBudgetPolicy(
                        share=chosen.retry.budget_share,
                        per_second=chosen.retry.budget_per_second,
                        most=chosen.retry.budget_most,
                    )
                ),
            )
            if chosen.retry.enabled
            else None
        )
        fallback = (
            FallbackMiddleware(
                self.settings.fallbacks,
                settings.fallback,
                self._targets,
                clock=clock,
                moves_on=chosen.fallback.moves_on,
                events=self.events,
            )
            if chosen.fallback.enabled
            else None
        )
        hedge = (
            HedgeMiddleware(
                pool,
                after=chosen.hedge.after,
                max_share=chosen.hedge.max_share,
                chain=fallback.targets if fallback is not None else lambda _: (),
                lines=self._targets,
                clock=clock,
                events=self.events,
            )
            if chosen.hedge.enabled
            else None
        )
        resume = ResumeMiddleware(
            chosen.resume.on_interrupt,
            again=retry.again if retry is not None else once,
            clock=self._backoff,
            events=self.events,
        )
        layers: Sequence[Layer] = default_stack(
            rate_limiter=limiter,
            retry=retry,
            logging=self._logging,
            metrics=self._metrics,
            circuit_breaker=CircuitBreakerMiddleware(pool, clock=clock) if chosen.circuit_breaker.enabled else None,
            resume=resume,
            fallback=fallback,
            hedge=hedge,
            extensions=self._extensions(settings.name, objects),
        )
        if arrange is not None:
            layers = arrange(list(layers))
        endpoint = Endpoint(
            provider,
            transport,
            pool,
            clock=clock,
            events=self.events,
            timeouts=settings.timeouts,
            credentials=_credentials(settings),
        )
        inquiry = Inquiry(settings.name, provider, transport, pool, clock=clock, secrets=_credentials(settings))
        # By its name: whoever arranges the layers may have wrapped it.
        place = next((at for at, layer in enumerate(layers, 1) if layer.name == "fallback"), 0)
        below = compose([layer.middleware for layer in layers[place:]], endpoint)
        aliases = settings.model_aliases
        self._targets[settings.name] = Line(
            below, lambda model: aliases.get(model, model) if model is not None else None, endpoint.objection
        )
        pipeline = Pipeline(
            settings.name,
            compose([layer.middleware for layer in layers[:place]], below),
            clock=clock,
            events=self.events,
            new_id=self._new_id,
            aliases=aliases,
            home=self._home,
            estimate=limiter.estimate,
            inquiry=inquiry,
        )
        return _Line(
            provider, transport, pool, limiter, retry, hedge, tuple(layers), prober, endpoint, inquiry, pipeline
        )

    def _extensions(self, provider: str, objects: Mapping[str, Middleware]) -> list[Layer]:
        """The registered layers: those of the configuration in its order, then objects it does not mention."""
        context = Context(
            provider=provider, clock=self._clock, random=self._random, events=self.events, store=self._store
        )
        layers = []
        configured = self.settings.middleware.extensions
        for name, settings in configured.items():
            if not settings.get("enabled", True):
                continue
            if name in objects:
                layers.append(Layer(name, objects[name]))
            else:
                factory: MiddlewareFactory = _load(MIDDLEWARE_GROUP, name)
                own = {key: value for key, value in settings.items() if key != "enabled"}
                layers.append(Layer(name, factory(own, context)))
        layers.extend(Layer(name, layer) for name, layer in objects.items() if name not in configured)
        return layers

    def _start_afresh(self) -> None:
        """On another event loop: whoever waited on the old one is gone. What the keys have used and learnt stays."""
        self._backoff.forget()
        for line in self._lines.values():
            line.pool.start_afresh()
            line.limiter.start_afresh()
            line.endpoint.start_afresh()
            if line.hedge is not None:
                line.hedge.close()
            line.prober.close()
            line.inquiry.close()

    def _new_id(self) -> str:
        return f"{self._prefix}-{next(self._numbers)}"

    def _provider_status(self, line: _Line) -> dict[str, Any]:
        status = line.pool.statistics()
        for key, shown in zip(line.pool.keys, status["keys"], strict=True):
            told = line.provider.limits(key.headers) if key.headers is not None else None
            shown["vendor_limits"] = msgspec.to_builtins(told)
        status["queued"] = line.limiter.waiting
        status["retries"] = line.retry.statistics() if line.retry is not None else None
        status["hedges"] = line.hedge.statistics() if line.hedge is not None else None
        status["connections"] = line.transport.statistics()
        status["layers"] = [layer.name for layer in line.layers]
        return status


class _Backoff:
    """The clock of the retry layer: whoever sleeps by it wakes when the manager is closed, and is refused then."""

    def __init__(self, clock: Clock) -> None:
        self.now = clock.now
        self.wall = clock.wall
        self.call_at = clock.call_at
        self._sleepers: set[asyncio.Future[None]] = set()

    async def sleep(self, seconds: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.call_at(self.now() + seconds, partial(_wake, woken))
        self._sleepers.add(woken)
        try:
            await woken
        finally:
            self._sleepers.discard(woken)
            timer.cancel()

    @property
    def sleeping(self) -> bool:
        """Whether a call is between two attempts."""
        return bool(self._sleepers)

    def forget(self) -> None:
        self._sleepers.clear()

    def end(self) -> None:
        for sleeper in self._sleepers:
            _wake(sleeper)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


async def _refuse(call: Call) -> Reply:
    raise LLMConnectionError("the manager is closed", provider=call.provider, retryable=False)


def _credentials(settings: ProviderSettings) -> list[str]:
    """The secrets beside the keys that a request may carry past somebody who could echo them."""
    proxies = [settings.transport.proxy]
    if settings.transport.proxy == "environment":
        proxies += [value for name, value in os.environ.items() if name.lower().endswith("_proxy")]
    found = {*credentials(settings.extra_headers)}
    for proxy in proxies:
        found.update(credentials(None, proxy))
    return [secret for secret in found if secret]


def _http_transport(settings: ProviderSettings, clock: Clock) -> Transport:
    # Not at the top: aiohttp costs more to import than everything else here together.
    from ..transports.http import HTTPTransport

    return HTTPTransport(
        settings.transport, settings.timeouts, clock=clock, environ=os.environ, max_age=settings.pool.max_age
    )


def _provider_factory(dialect: str, factories: Mapping[str, ProviderFactory]) -> ProviderFactory:
    if dialect in factories:
        return factories[dialect]
    if dialect == "anthropic":
        from ..providers.anthropic import AnthropicProvider

        return AnthropicProvider
    if dialect == "openai":
        from ..providers.openai import OpenAIProvider

        return OpenAIProvider
    if dialect == "openai_responses":
        from ..providers.openai_responses import OpenAIResponses

        return OpenAIResponses
    factory: ProviderFactory = _load(PROVIDERS_GROUP, dialect)
    return factory


def _store(name: str, clock: Clock) -> Store:
    if name == "memory":
        return MemoryStore(clock=clock)
    factory: StoreFactory = _load(STORES_GROUP, name)
    return factory(clock)


def _registered(group: str) -> dict[str, EntryPoint]:
    # Half of what importing this package would cost; a manager is made once.
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=group)}


def _load(group: str, name: str) -> Any:
    point = _registered(group).get(name)
    if point is None:
        raise LLMConfigurationError(f"{name!r} is not registered under the entry points {group}")
    try:
        return point.load()
    except Exception as error:
        raise LLMConfigurationError(
            f"{name!r}, registered as {point.value} under the entry points {group}, cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def _known(
    providers: Mapping[str, ProviderFactory] | None, middleware: Mapping[str, Middleware] | None
) -> dict[str, Collection[str]]:
    """The names that a configuration may use: ours, those registered by object, and those by entry point."""
    return {
        "known_dialects": _Names((*config.DIALECTS, *(providers or ())), PROVIDERS_GROUP),
        "known_middleware": _Names((*config.MIDDLEWARE, *(middleware or ())), MIDDLEWARE_GROUP),
        "known_stores": _Names(config.STORES, STORES_GROUP),
    }


class _Names(Collection[str]):
    """The names at hand and those of a group of entry points, which are looked up only when the former do not do.

    Looking them up reads the metadata of everything that is installed.
    """

    def __init__(self, at_hand: Sequence[str], group: str) -> None:
        self._at_hand = at_hand
        self._group = group

    def __contains__(self, name: object) -> bool:
        return name in self._at_hand or name in _registered(self._group)

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._at_hand, *_registered(self._group)))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _warn_of_retired(pool: ProviderPool, provider: Provider) -> None:
    for key in pool.keys:
        replacement = provider.replacement(key.model) if key.model is not None else None
        if replacement is not None:
            logger.warning(
                "%s: model %s is retired or about to be, and is sent as configured; %s replaces it "
                "(model_aliases maps one to the other)",
                key.ref.id,
                key.model,
                replacement,
            )


# -- the accessor: one manager for each running event loop -------------------------------------------------------------


class _Slot:
    """The manager of one event loop, and the lock under which it is made."""

    __slots__ = ("lock", "manager")

    def __init__(self) -> None:
        self.manager: LLMManager | None = None
        self.lock = asyncio.Lock()


_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, _Slot] = WeakKeyDictionary()


def _slot() -> _Slot:
    loop = asyncio.get_running_loop()
    slot = _slots.get(loop)
    if slot is None:
        # A manager knows its loop, so a weak key alone would never let go of either. (`keyrefs` is a copy: other
        # threads with loops of their own may be here too.)
        for reference in _slots.keyrefs():
            other = reference()
            if other is not None and other.is_closed():
                _slots.pop(other, None)
        slot = _slots.setdefault(loop, _Slot())
    return slot


async def get_llm_manager(source: str | os.PathLike[str] | Mapping[str, Any] | None = None) -> LLMManager:
    """The manager of the running event loop, made at the first call.

    Without *source* the configuration is looked for: ``LLM_CONFIG``, then ``config/llm.yaml`` under the working
    directory, then the vendors' keys in the environment. *source* counts only when the manager is made.

    Raises:
        LLMConfigurationError: nothing is configured (the message lists the ways), or what is configured is wrong.
    """
    slot = _slot()
    async with slot.lock:
        if slot.manager is None or slot.manager._closed:
            # Files are read and TLS contexts built: not on the loop.
            make = LLMManager.discover if source is None else lambda: LLMManager.from_config(source)
            slot.manager = await asyncio.to_thread(make)
        return slot.manager


class _Restore:
    """Puts the manager back that was there before, at the end of a ``with`` block."""

    __slots__ = ("_before", "_slot")

    def __init__(self, slot: _Slot, before: LLMManager | None) -> None:
        self._slot = slot
        self._before = before

    def __enter__(self) -> None:
        """The manager was set already."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._slot.manager = self._before


def set_llm_manager(manager: LLMManager | None) -> _Restore:
    """Make *manager* (or none) that of the running loop: for good, or as a context manager until its block ends."""
    slot = _slot()
    before, slot.manager = slot.manager, manager
    return _Restore(slot, before)


async def close_llm_manager() -> None:
    """Close the running loop's manager, if it has one; the next ``get_llm_manager`` makes a new one."""
    slot = _slot()
    manager, slot.manager = slot.manager, None
    if manager is not None:
        await manager.close()


def _breaker_policy(settings: CircuitBreakerSettings) -> BreakerPolicy | None:
    if not settings.enabled:
        return None
    return BreakerPolicy(**{name: getattr(settings, name) for name in BreakerPolicy.__struct_fields__})
