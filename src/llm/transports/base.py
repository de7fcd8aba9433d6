"""The port to the network: one request out, one response in, and the truth about how far the request got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from ..core.types import Headers


class HTTPRequest(msgspec.Struct, frozen=True):
    """A request as a dialect encodes it.

    *headers* hold the key, so this value must never be logged; their names are in lower case.
    """

    method: str
    url: str
    headers: dict[str, str]
    body: bytes = b""

    def __repr__(self) -> str:
        return f"<HTTPRequest {self.method} {self.url}, {len(self.body)} bytes>"


class Exchange:
    """How far one request got; the transport fills it in, whether it then answers or raises.

    *reused* says whether the connection had served before, *written* whether the whole request was handed to the
    kernel, *started* whether a byte of the response has arrived. *on_connection* is called when a connection is in
    hand, before the first byte is written: from then on the request may be billed.
    """

    __slots__ = ("on_connection", "reused", "started", "written")

    def __init__(self, on_connection: Callable[[], None] | None = None) -> None:
        self.on_connection = on_connection
        self.reused: bool | None = None
        self.written = False
        self.started = False

    @property
    def connected(self) -> bool:
        return self.reused is not None


class TransportResponse(Protocol):
    """A response whose head has arrived. Exactly one of ``read`` and ``close`` ends it, or reading it to its end."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Headers: ...

    async def read(self) -> bytes:
        """The whole body; the connection is then free for the next request."""
        ...

    async def read_some(self) -> bytes:
        """What has arrived of the body, at least one byte, or b"" at its regular end. A cut body raises, but only
        after everything that had arrived was returned."""
        ...

    def close(self) -> None:
        """Give the response up: at its end the connection is kept for reuse, before it the socket is closed.
        Synchronous, idempotent, and safe in a finaliser."""
        ...


class Transport(Protocol):
    """The only I/O between this package and a provider. One transport serves one provider origin."""

    async def send(self, request: HTTPRequest, exchange: Exchange) -> TransportResponse:
        """Send *request* and return when the response's head is there.

        Raises:
            LLMConnectionError: nobody answered, or the connection was lost.
            LLMTimeoutError: connecting or the first byte took too long (``phase`` says which).
            LLMProtocolError: an answer that is no answer (a redirect, headers beyond bounds).

        Cancelling the waiting task closes the socket at once.
        """
        ...

    async def close(self) -> None:
        """Close every connection; afterwards ``send`` raises."""
        ...

    def statistics(self) -> dict[str, int]:
        """Open and idle connections, and how many were ever opened."""
        ...
