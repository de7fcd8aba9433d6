"""The words for failure: one tree, whose members say who is at fault and what may be done about it.

    LLMException
    ├── LLMConfigurationError            what is wrong, where in the file, how to mend it
    ├── LLMConnectionError               nobody answered: DNS, connect, TLS, reset
    │   └── LLMStreamInterruptedError        the stream ended without its terminal event
    ├── LLMTimeoutError                  connect, first byte, idle, attempt; 408, 504
    │   └── LLMDeadlineExceededError         the call's own deadline, met or foreseen
    ├── LLMRateLimitError                429, or a local refusal
    ├── LLMAuthenticationError           401, 403
    ├── LLMPoolExhaustedError            no client was free in time, or the queue is full
    │   └── LLMCircuitOpenError
    ├── LLMBudgetExceededError           a money or token budget of the user's
    └── LLMProviderError                 the provider answered, and the answer was no
        ├── LLMInvalidRequestError           400, 404, 413, 422
        │   ├── LLMContextLengthError
        │   ├── LLMModelNotFoundError
        │   ├── LLMContentFilteredError
        │   └── LLMRequestTooLargeError      also local: no key could ever take it
        ├── LLMQuotaExhaustedError           402, a spend limit, a credit balance
        ├── LLMOverloadedError               409, 425, 498, 500, 502, 503, 529
        └── LLMProtocolError                 what came back is not the dialect

Every error carries what a retry decision needs (``scope``, ``retryable``, ``retry_after``, ``sent``), so that
whoever decides reads attributes and never asks for a class.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

import msgspec


class Scope(StrEnum):
    """Whom an error is about, and so what another attempt would have to change."""

    REQUEST = "request"
    """The request itself: the same request fails everywhere."""
    KEY = "key"
    """One API key: another key may answer."""
    PROVIDER = "provider"
    """The provider or the way to it: waiting may help."""


class AttemptRecord(msgspec.Struct, frozen=True, gc=False):
    """One attempt of a call, as the final error and the response tell it. It holds no exception and no key."""

    number: int
    provider: str
    model: str
    key_id: str
    waited: float
    """Seconds between the call's start, or the end of the attempt before, and this attempt's permit."""
    duration: float
    """Seconds from permit to outcome (of a stream: to its first content)."""
    error: str | None = None
    """Class name of the error, None for the attempt that answered."""
    status: int | None = None
    sent: bool = False
    """Whether the vendor may have seen the request, and so may bill it."""


class TargetFailure(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Why one target of a fallback chain did not answer. It holds no exception and no key."""

    provider: str
    model: str | None
    error: str
    """Class name of the error."""
    message: str
    status: int | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, error: LLMException, provider: str, model: str | None) -> TargetFailure:
        """What *error* says of the target that was asked."""
        return cls(
            provider=provider,
            model=error.model or model,
            error=type(error).__name__,
            message=error.message,
            status=error.status,
            retry_after=error.retry_after,
        )


class LLMException(Exception):
    """Base of everything this package raises on purpose.

    *retryable* says whether the same request may be repeated with the same key, *scope* whom the error is about,
    *retry_after* (seconds) when capacity returns if anybody said so, *sent* whether the request may have reached the
    vendor. *key_id* names a key's place in the configuration (``anthropic/2``), never the key. *body* is the vendor's
    reply, at most 64 KiB of it. Of a stream that failed, *partial* is the text that had arrived and *usage* what the
    vendor had told of its cost.
    """

    default_scope: ClassVar[Scope] = Scope.REQUEST
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        provider: str | None = None,
        model: str | None = None,
        key_id: str | None = None,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        sent: bool = False,
        retryable: bool | None = None,
        retry_after: float | None = None,
        scope: Scope | None = None,
        body: bytes = b"",
        partial: str = "",
        usage: Any = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.provider = provider
        self.model = model
        self.key_id = key_id
        self.status = status
        self.code = code
        self.request_id = request_id
        self.sent = sent
        self.retryable = self.default_retryable if retryable is None else retryable
        self.retry_after = retry_after
        self.scope = self.default_scope if scope is None else scope
        self.body = body
        self.partial = partial
        self.usage = usage
        self.attempts: tuple[AttemptRecord, ...] = ()
        self.failures: tuple[TargetFailure, ...] = ()
        """Of a fallback chain: what each of its targets said, this error last or next to last."""

    def __str__(self) -> str:
        facts = [
            f"{name} {value}"
            for name, value in (
                # A key's id begins with its provider's name.
                ("provider", self.provider if self.key_id is None else None),
                ("key", self.key_id),
                ("model", self.model),
                ("status", self.status),
                ("code", self.code),
                ("request", self.request_id),
                ("retry after", f"{self.retry_after:.1f} s" if self.retry_after is not None else None),
            )
            if value is not None
        ]
        if len(self.attempts) > 1:
            facts.append(f"{len(self.attempts)} attempts")
        if len(self.failures) > 1:
            others = ", ".join(f"{f.provider}: {f.error}" for f in self.failures)
            facts.append(f"{len(self.failures)} targets failed: {others}")
        return f"{self.message} [{', '.join(facts)}]" if facts else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process borders (multiprocessing, task queues); keyword-only arguments need help to do so.
        return (_rebuild, (type(self), self.message, self.__dict__.copy()))


def _rebuild(cls: type[LLMException], message: str, state: dict[str, Any]) -> LLMException:
    error = cls.__new__(cls, message)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class LLMConfigurationError(LLMException):
    """The configuration is wrong. The message names the place, what was seen there and how to mend it."""


class LLMConnectionError(LLMException):
    """Nobody answered: name resolution, connect, TLS, or the connection was lost."""

    default_scope = Scope.PROVIDER
    default_retryable = True


class LLMStreamInterruptedError(LLMConnectionError):
    """A stream ended without its terminal event; ``partial`` holds the text that had arrived.

    Repeated only as long as no content was delivered; from then on the caller decides.
    """


class LLMTimeoutError(LLMException):
    """Something took too long; *phase* says what: connect, first_byte, first_token, idle, rate, attempt or server (408,
    504)."""

    default_scope = Scope.PROVIDER
    default_retryable = True

    def __init__(self, message: str, *, phase: str = "attempt", **facts: Any) -> None:
        super().__init__(message, **facts)
        self.phase = phase


class LLMDeadlineExceededError(LLMTimeoutError):
    """The call's own deadline has passed, or cannot be met; then *retry_after* says when capacity returns."""

    default_scope = Scope.REQUEST
    default_retryable = False

    def __init__(self, message: str, *, phase: str = "deadline", **facts: Any) -> None:
        super().__init__(message, phase=phase, **facts)


class LLMRateLimitError(LLMException):
    """The vendor said 429, or a local limit refused; *retry_after* is set when it is known."""

    default_scope = Scope.KEY
    default_retryable = True


class LLMAuthenticationError(LLMException):
    """401 or 403: the key is wrong, revoked, or not allowed to do this."""

    default_scope = Scope.KEY


class LLMPoolExhaustedError(LLMException):
    """No pooled client became free in time, or the queue is full."""


class LLMCircuitOpenError(LLMPoolExhaustedError):
    """Every key that could take the call has an open circuit."""


class LLMBudgetExceededError(LLMException):
    """A budget that the user has set, in money or tokens, does not allow the call."""


class LLMProviderError(LLMException):
    """The provider answered, and the answer was no."""


class LLMInvalidRequestError(LLMProviderError):
    """The request is at fault: 400, 404, 413 or 422, or a local refusal before anything was sent."""


class LLMContextLengthError(LLMInvalidRequestError):
    """Prompt and answer do not fit the model's context."""


class LLMModelNotFoundError(LLMInvalidRequestError):
    """The provider does not know the model, or has retired it; the message names a replacement when one is known."""


class LLMContentFilteredError(LLMInvalidRequestError):
    """A content policy refused the request."""


class LLMRequestTooLargeError(LLMInvalidRequestError):
    """The request is larger than a limit: no waiting helps. Local refusals set *dimension*, *need* and *limit*."""

    def __init__(
        self,
        message: str,
        *,
        dimension: str | None = None,
        need: int | None = None,
        limit: int | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(message, **facts)
        self.dimension = dimension
        self.need = need
        self.limit = limit


class LLMQuotaExhaustedError(LLMProviderError):
    """A spend limit or credit balance is used up: waiting does not help, whatever the status was."""

    default_scope = Scope.KEY


class LLMOverloadedError(LLMProviderError):
    """The provider is in trouble, and says so: 409, 425, 498, 500, 502, 503, 529."""

    default_scope = Scope.PROVIDER
    default_retryable = True


class LLMProtocolError(LLMProviderError):
    """What came back is not the dialect, or an unexpected redirect."""

    default_scope = Scope.PROVIDER
