"""The port of a dialect: pure functions between our values and a vendor's HTTP. No socket, clock or environment."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import msgspec

from ..core.exceptions import LLMException
from ..core.types import (
    Counting,
    Headers,
    LLMResponse,
    ModelInfo,
    ObservedLimits,
    Request,
    StopReason,
    StreamChunk,
    Usage,
)
from ..transports.base import HTTPRequest


class Encoded(msgspec.Struct, frozen=True):
    """A request ready to be sent, and what had to be left out of it."""

    request: HTTPRequest
    dropped: tuple[str, ...] = ()
    """Names of the sampling hints that the model refuses and that were therefore not sent."""
    gather: bool = False
    """A whole answer was asked for and comes as a stream: it is put together on arrival."""


class StreamDecoder(Protocol):
    """Bytes of one streamed answer in, chunks out; however the bytes were cut, the chunks are the same.

    It never raises: when the stream says something is wrong, what came before is delivered and ``error`` is set.
    """

    error: LLMException | None
    """Set once the stream has failed; feeding on does nothing."""
    done: bool
    """Whether the terminal event was decoded: only then the answer is whole."""
    usage: Usage | None
    """What the vendor has told so far, cumulative."""
    stop_reason: StopReason | None
    id: str
    model: str
    events: int
    """How many events have come, of whatever kind: a stream in which none comes is stalled, whatever its bytes say."""

    def feed(self, data: bytes) -> list[StreamChunk]:
        """The chunks that *data* completes."""
        ...

    def end(self) -> list[StreamChunk]:
        """The body has ended. Sets ``error`` to an LLMStreamInterruptedError unless the terminal event was seen."""
        ...


class Provider(Protocol):
    """A dialect bound to one configured provider (base URL, versions, headers), but to no key."""

    name: str
    """The provider's name in the configuration."""
    default_model: str | None
    """What a key without a model of its own sends when the call names none; data, not code (``models.toml``)."""
    counting: Counting
    """How the vendor counts against its limits; ``Counting()`` if nobody knows."""

    def group(self, model: str) -> str:
        """The name of the models that share one limit with *model*; the model itself if none do.

        Asked for every call: it does not raise, whatever the name, and what it remembers is bounded.
        """
        ...

    def goes_on(self, model: str) -> bool:
        """Whether *model*, handed the beginning of its answer as the last message, gives the rest of it."""
        ...

    def encode(self, request: Request, key: str) -> Encoded:
        """The HTTP request for *request*. Raises LLMInvalidRequestError for what the model is known to refuse."""
        ...

    def decode(self, request: Request, status: int, headers: Headers, body: bytes) -> LLMResponse:
        """The answer in a complete body. Raises what ``classify`` says for a failure, under whatever status."""
        ...

    def stream_decoder(self, request: Request) -> StreamDecoder: ...

    def classify(self, request: Request, status: int, headers: Headers, body: bytes) -> LLMException:
        """The error that a status other than 2xx means; never raises, whatever the body holds."""
        ...

    def limits(self, headers: Headers) -> ObservedLimits | None:
        """The rate-limit headers, None without any. What cannot be read is left out; never raises."""
        ...

    def probe(self, key: str) -> HTTPRequest:
        """A free request that shows whether *key* works."""
        ...

    def replacement(self, model: str) -> str | None:
        """The successor of a model that the vendor has retired, None if *model* is not known to be retired."""
        ...


@runtime_checkable
class Inquirable(Protocol):
    """What a dialect has beside that if its vendor answers questions for nothing."""

    def models_request(self, key: str, after: str | None) -> HTTPRequest:
        """The request for a page of the list of models: the one that follows *after*."""
        ...

    def read_models(self, body: bytes) -> tuple[list[ModelInfo], str | None]:
        """The models of a page, and after which of them the next begins; None if there is none.

        Raises LLMProtocolError for what is no list.
        """
        ...

    def count_request(self, request: Request, key: str) -> HTTPRequest:
        """The request that asks how many tokens *request* has. Raises LLMInvalidRequestError if nobody can tell."""
        ...

    def read_count(self, body: bytes) -> int:
        """The number in its answer. Raises LLMProtocolError if there is none."""
        ...
