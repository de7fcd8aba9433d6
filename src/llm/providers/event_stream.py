"""What the dialects' stream decoders share: the life of an answer that arrives as server-sent events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from ..core.exceptions import LLMException, LLMProtocolError, LLMStreamInterruptedError
from ..core.types import Request, StopReason, StreamChunk, Usage
from ..utils.http_errors import unreadable
from ..utils.sse import SSEDecoder
from .base import Provider


class EventStream(ABC):
    """Decodes one streamed answer; a dialect says in ``_take`` what an event means.

    Open → done, by the terminal event; open → failed, by an error event, by an event that cannot be read, or by the end
    of the body before the terminal event. Neither is ever left again: later bytes are nobody's.
    """

    __slots__ = (
        "_content",
        "_provider",
        "_request",
        "_sse",
        "done",
        "error",
        "events",
        "id",
        "model",
        "stop_reason",
        "usage",
    )

    terminal: ClassVar[str]
    """The vendor's name for the terminal event, for messages."""

    def __init__(self, provider: Provider, request: Request) -> None:
        self.error: LLMException | None = None
        self.done = False
        self.events = 0
        self.usage: Usage | None = None
        self.stop_reason: StopReason | None = None
        self.id = ""
        self.model = request.model
        self._provider = provider
        self._request = request
        self._sse = SSEDecoder()
        self._content = False

    def __repr__(self) -> str:
        state = "done" if self.done else type(self.error).__name__ if self.error else "open"
        return f"<{type(self).__name__} {self.id or 'without an id'}, {state}>"

    @property
    def _open(self) -> bool:
        return not self.done and self.error is None

    def feed(self, data: bytes) -> list[StreamChunk]:
        """The chunks that *data* completes."""
        chunks: list[StreamChunk] = []
        if not self._open:
            return chunks
        payloads = self._sse.payloads(data)
        self.events += len(payloads)
        self._take(payloads, chunks)
        if self._sse.overflow and self._open:
            self._fail("an event of the stream is larger than any answer")
        return chunks

    def end(self) -> list[StreamChunk]:
        """The body has ended; without the terminal event that is an error."""
        if not self._open:
            return []
        pending = self._sse.pending.lstrip()
        # Some servers forget the blank line after the last event.
        chunks = self.feed(b"\n\n")
        if not self._is_over():
            self.error = None
            self._end_early(pending, chunks)
        return chunks

    def _is_over(self) -> bool:
        """Whether the last event decided; one that cannot be read was cut in two, which is no breach of the dialect."""
        return self.done or not (self.error is None or isinstance(self.error, LLMProtocolError))

    @abstractmethod
    def _take(self, payloads: list[bytes], chunks: list[StreamChunk]) -> None:
        """Take events in, up to the one that ends the stream or spoils it."""

    def _end_early(self, pending: bytes, chunks: list[StreamChunk]) -> None:
        """The body has ended before the terminal event, with *pending* begun and not finished."""
        if pending[:1] in (b"{", b"[", b"<"):
            # No stream, but a body, as of an error under status 200.
            self.error = self._provider.classify(self._request, 200, {}, pending)
        else:
            self._interrupt(f"the stream ended without {self.terminal}")

    def _interrupt(self, message: str) -> None:
        self.error = LLMStreamInterruptedError(
            message,
            provider=self._provider.name,
            model=self.model,
            sent=True,
            retryable=not self._content,
            usage=self.usage,
        )

    def _fail(self, what: str, data: bytes = b"") -> None:
        self.error = unreadable(what, data, provider=self._provider.name, model=self.model)
