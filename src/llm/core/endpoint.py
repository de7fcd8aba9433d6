"""The end of the pipeline: one attempt, where a dialect and a transport meet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from msgspec.structs import force_setattr

from ..middleware.base import Call, Reply
from ..providers.base import Provider
from ..transports.base import Exchange, Transport, TransportResponse
from ..utils.alarms import Alarms, Limit
from ..utils.clock import Clock
from ..utils.redact import credentials, redact
from .events import Events
from .exceptions import (
    AttemptRecord,
    LLMAuthenticationError,
    LLMConfigurationError,
    LLMConnectionError,
    LLMDeadlineExceededError,
    LLMException,
    LLMInvalidRequestError,
    LLMProtocolError,
    LLMStreamInterruptedError,
    LLMTimeoutError,
    Scope,
)
from .pool import Key, ProviderPool
from .settings import TimeoutSettings
from .stream import ResponseStream
from .types import LLMResponse, Request, Settlement

PROBE_SECONDS = 10.0
TIMER_ERROR = 0.001
"""Seconds by which a loop may run a timer before its time."""
MAX_WARNED = 1000
"""Pairs of model and option that were warned about; a bound, since models are the user's strings."""

logger = logging.getLogger("brimful")


class Prober:
    """Asks the vendor, free of charge, whether a key works."""

    def __init__(self, provider: Provider, transport: Transport, clock: Clock) -> None:
        self._provider = provider
        self._transport = transport
        self._alarms = Alarms(PROBE_SECONDS, clock)

    async def __call__(self, secret: str) -> int:
        """The HTTP status of the answer. Raises LLMException when there was none."""
        try:
            with Limit(self._alarms):
                response = await self._transport.send(self._provider.probe(secret), Exchange())
                try:
                    await response.read()
                finally:
                    response.close()
                return response.status
        except TimeoutError:
            raise LLMTimeoutError("the probe was not answered in time") from None

    def close(self) -> None:
        """Let go of the timer."""
        self._alarms.close()


class Endpoint:
    """Sends one attempt with the key that was admitted, and decodes the answer.

    Of *timeouts* those of an attempt and of a stream are kept here, the others by the transport. *credentials* are
    secrets beside the key, which no error may repeat.
    """

    def __init__(
        self,
        provider: Provider,
        transport: Transport,
        pool: ProviderPool,
        *,
        clock: Clock,
        events: Events,
        timeouts: TimeoutSettings,
        credentials: Sequence[str] = (),
    ) -> None:
        self._provider = provider
        self._transport = transport
        self._pool = pool
        self._clock = clock
        self._events = events
        self._timeouts = timeouts
        self._alarms = Alarms(timeouts.attempt, clock) if timeouts.attempt is not None else None
        self._first_token = self._alarms
        if timeouts.first_token is not None and (timeouts.attempt is None or timeouts.first_token < timeouts.attempt):
            self._first_token = Alarms(timeouts.first_token, clock)
        self._credentials = credentials
        self._warned: set[tuple[str, str]] = set()
        self._streams: set[ResponseStream] = set()
        """Those that are open, so that closing reaches also those that nobody is reading."""
        self._closed = False

    async def __call__(self, call: Call) -> Reply:
        """One attempt.

        Raises:
            LLMException: whatever went wrong, told with provider, model and key.
        """
        admission = call.admission
        if admission is None:
            raise LLMConfigurationError(
                "no layer has admitted the call: keep RateLimitMiddleware in the stack "
                "(`middleware.rate_limiter.enabled: false` lifts the limits), or set call.admission in your own"
            )
        if self._closed:
            raise LLMConnectionError("the manager is closed", provider=call.provider, retryable=False)
        key = self._pool.key(admission.key)
        asked = call.request
        request = Request(asked.messages, admission.model, asked.options, asked.stream)
        exchange = Exchange(admission.sent)
        started = self._clock.now()
        deadline = late = None
        try:
            if call.continues and not self._provider.goes_on(request.model):
                raise LLMInvalidRequestError(f"{request.model} does not go on with an answer that broke off")
            encoded = self._provider.encode(request, key.secret())
            with Limit(self._first_token if request.stream else self._alarms) as limit:
                if call.deadline is not None:
                    deadline = self._clock.call_at(call.deadline, limit.expire)
                response = await self._transport.send(encoded.request, exchange)
                try:
                    key.headers = response.headers
                    if admission.wants_limits or response.status == 429:
                        limits = self._provider.limits(response.headers)
                        if limits is not None:
                            admission.observe(limits=limits)
                    stream = None
                    if (request.stream or encoded.gather) and 200 <= response.status < 300:
                        stream = await self._stream(call, key, request, response, encoded.dropped)
                    reply: Reply
                    if stream is None:
                        reply = self._whole(key, request, response, await response.read(), encoded.dropped)
                    else:
                        reply = await self._gather(call, stream) if encoded.gather else stream
                except BaseException:
                    # A body that was read to its end keeps its connection all the same.
                    response.close()
                    raise
        except TimeoutError:
            # To be raised outside: here this one would be its context, with a traceback that knows the prompt.
            late = self._late(call)
        except LLMException as error:
            await self._failed(call, key, request.model, started, exchange, error)
            raise
        except asyncio.CancelledError as gone:
            # The leg that lost, or a call that was given up: the vendor may have had it all the same.
            self._note(call, key, request.model, started, exchange, gone)
            raise
        finally:
            if deadline is not None:
                deadline.cancel()
        if late is not None:
            await self._failed(call, key, request.model, started, exchange, late)
            try:
                raise late
            finally:
                del late
        self._note(call, key, request.model, started, exchange, None)
        return reply

    def _late(self, call: Call) -> LLMException:
        """The error for an attempt whose time was up, or its call's."""
        if call.deadline is not None and self._clock.now() >= call.deadline - TIMER_ERROR:
            return LLMDeadlineExceededError("the call's deadline passed while it was being answered")
        if call.request.stream and self._first_token is not self._alarms:
            seconds = self._timeouts.first_token
            return LLMTimeoutError(f"no content within the first-token timeout of {seconds:g} s", phase="first_token")
        return LLMTimeoutError(f"no answer within the attempt timeout of {self._timeouts.attempt:g} s", phase="attempt")

    async def _failed(
        self, call: Call, key: Key, model: str, started: float, exchange: Exchange, error: LLMException
    ) -> None:
        """Complete the *error* that the attempt ends with, and note the attempt."""
        self._describe(call, key, model, error)
        error.sent = error.sent or exchange.connected
        if error.status == 403 and isinstance(error, LLMAuthenticationError):
            try:
                works = await self._works(key, call)
            except BaseException:
                # The caller left; the refusal was there before: it is paid as one, and proves nothing of the key.
                error.scope = Scope.REQUEST
                if call.admission is not None:
                    call.admission.settle(Settlement(error=error))
                raise
            if works:
                # The key is good: it is this request that is not allowed.
                error.scope = Scope.REQUEST
        self._note(call, key, model, started, exchange, error)
        error.attempts = call.attempts

    def objection(self, request: Request, model: str | None) -> LLMException | None:
        """Why *request* would not be sent to *model*, None if it would."""
        model = model or self._pool.default_model or ""
        try:
            self._provider.encode(Request(request.messages, model, request.options, request.stream), "")
        except LLMException as error:
            return error.with_traceback(None)
        return None

    def close(self) -> None:
        """End the open streams, also those that nobody is reading, and let go of the timers."""
        self._closed = True
        for stream in tuple(self._streams):
            stream.abort(_closed())
        for alarms in (self._alarms, self._first_token):
            if alarms is not None:
                alarms.close()

    @property
    def streaming(self) -> bool:
        """Whether a stream is open."""
        return bool(self._streams)

    def start_afresh(self) -> None:
        """Forget the streams and timers of an event loop that is gone."""
        self._streams.clear()
        for alarms in (self._alarms, self._first_token):
            if alarms is not None:
                alarms.close()

    async def _works(self, key: Key, call: Call) -> bool:
        """Whether a probe of *key* is accepted; if that cannot be known within the call's deadline, it is believed."""
        if call.deadline is None:
            return await self._pool.works(key)
        deadline = None
        try:
            with Limit(None) as limit:
                deadline = self._clock.call_at(call.deadline, limit.expire)
                return await self._pool.works(key)
        except TimeoutError:
            return True
        finally:
            if deadline is not None:
                deadline.cancel()

    def _whole(
        self, key: Key, request: Request, response: TransportResponse, body: bytes, dropped: tuple[str, ...]
    ) -> LLMResponse:
        status, headers = response.status, response.headers
        if not 200 <= status < 300:
            raise self._provider.classify(request, status, headers, body)
        answer = self._provider.decode(request, status, headers, body)
        if request.stream:
            raise LLMProtocolError("a stream was asked for, and a whole answer came", status=status)
        # Nobody has seen the answer yet, so it may still be completed; a copy would cost more than decoding it.
        force_setattr(answer, "provider", key.ref.provider)
        force_setattr(answer, "key_id", key.ref.id)
        if dropped:
            force_setattr(answer, "warnings", self._warn(request.model, dropped))
        answer.__dict__["report"] = self._events.fault
        return answer

    async def _gather(self, call: Call, stream: ResponseStream) -> LLMResponse:
        """The whole answer out of *stream*, of which the caller does not know."""
        try:
            async for _ in stream:
                pass
        except LLMStreamInterruptedError as error:
            # Nobody has seen a piece of it, so the call may be made again.
            error.retryable = True
            raise
        finally:
            stream.close()
            call.stream = None
        answer = stream.response()
        answer.__dict__["report"] = self._events.fault
        return answer

    async def _stream(
        self, call: Call, key: Key, request: Request, response: TransportResponse, dropped: tuple[str, ...]
    ) -> ResponseStream | None:
        """The stream with its content in hand; None if what comes is no stream."""
        headers = response.headers
        if "json" in headers.get("content-type", "") and "event-stream" not in headers.get("content-type", ""):
            # Some gateways answer an error, or everything, as plain JSON under status 200.
            return None
        stream = ResponseStream(
            response,
            self._provider.stream_decoder(request),
            clock=self._clock,
            provider=key.ref.provider,
            key_id=key.ref.id,
            request_id=headers.get("request-id") or headers.get("x-request-id"),
            warnings=self._warn(request.model, dropped) if dropped else (),
            describe=partial(self._describe, call, key, request.model),
            report=self._events.fault,
            idle=self._timeouts.idle,
            min_rate=self._timeouts.min_tokens_per_second,
        )
        call.stream = stream
        await stream.start()
        if call.admission is not None:
            call.admission.observe(usage=stream.usage)
        if self._closed:
            # While its first content was on its way: nobody else would end it now.
            stream.abort(_closed())
        elif not stream.settled:
            self._streams.add(stream)
            stream.on_settled(partial(self._ended, stream))
        if call.deadline is not None:
            stream.set_deadline(call.deadline)
        return stream

    def _ended(self, stream: ResponseStream, settlement: Settlement) -> None:
        self._streams.discard(stream)

    def _describe(self, call: Call, key: Key, model: str, error: LLMException) -> None:
        error.provider = key.ref.provider
        error.model = error.model or model
        error.key_id = key.ref.id
        error.attempts = call.attempts
        redact(error, key.secret(), *self._credentials, *credentials(call.request.options.extra_headers))

    def _note(
        self, call: Call, key: Key, model: str, started: float, exchange: Exchange, error: BaseException | None
    ) -> None:
        now = self._clock.now()
        record = AttemptRecord(
            number=len(call.attempts) + 1,
            provider=key.ref.provider,
            model=model,
            key_id=key.ref.id,
            waited=started - call.idle_since,
            duration=now - started,
            error=type(error).__name__ if error is not None else None,
            status=error.status if isinstance(error, LLMException) else None,
            sent=exchange.connected,
        )
        call.attempts = (*call.attempts, record)
        call.idle_since = now

    def _warn(self, model: str, dropped: tuple[str, ...]) -> tuple[str, ...]:
        warnings = tuple(f"{option} was not sent: {model} does not accept it" for option in dropped)
        for option, warning in zip(dropped, warnings, strict=True):
            if (model, option) not in self._warned and len(self._warned) < MAX_WARNED:
                self._warned.add((model, option))
                try:
                    logger.warning("%s", warning, extra={"model": model, "option": option})
                except Exception as error:
                    # A handler of the user's: it must not fail the call.
                    self._events.fault("logging", error)
        return warnings


def _closed() -> LLMStreamInterruptedError:
    # No fault of the provider's, whose circuit is not to hear of it.
    return LLMStreamInterruptedError("the manager was closed", retryable=False, scope=Scope.REQUEST)
