"""A response of the HTTP transport: bounded, and honest about how its body ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp

from ..core.exceptions import LLMProtocolError
from ..core.types import Headers
from ..utils.alarms import Alarms
from .base import Exchange
from .failures import FOREIGN, explain


class ResponseHeaders(Mapping[str, str]):
    """aiohttp's headers as the port wants them: names in lower case, of several fields of one name the first."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        return self._fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        # The mixin's would raise and catch a KeyError for each name that is not there; many are asked for of an answer.
        return self._fields.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter({name.lower(): None for name in self._fields})

    def __len__(self) -> int:
        return len({name.lower() for name in self._fields})

    def __repr__(self) -> str:
        return f"<ResponseHeaders {', '.join(self)}>"


class HTTPResponse:
    """Implements :class:`llm.transports.base.TransportResponse`.

    ``read`` is bounded by ``max_response_bytes``, counted after decompression. ``read_some`` is not: a stream may be as
    long as it likes, since no more of it than about half a megabyte is ever held here.
    """

    __slots__ = ("_content", "_exchange", "_idle", "_loop", "_max_bytes", "_peer", "_response", "headers", "status")

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        peer: str,
        exchange: Exchange,
        *,
        idle: Alarms | None,
        max_bytes: int,
    ) -> None:
        self.status = response.status
        self.headers: Headers = ResponseHeaders(response.headers)
        self._response = response
        self._content = response.content
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self._peer = peer
        self._exchange = exchange
        self._max_bytes = max_bytes

    def __repr__(self) -> str:
        return f"<HTTPResponse {self.status} from {self._peer}>"

    async def read(self) -> bytes:
        """As the port says.

        Raises:
            LLMProtocolError: the body is larger than ``max_response_bytes``; the socket is then closed.
        """
        pieces = []
        left = self._max_bytes
        while piece := await self.read_some():
            left -= len(piece)
            if left < 0:
                self.close()
                raise LLMProtocolError(
                    f"the answer of {self._peer} is larger than transport.max_response_bytes ({self._max_bytes})",
                    status=self.status,
                    sent=True,
                )
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_some(self) -> bytes:
        content = self._content
        if content.at_eof():
            return b""
        if content._buffer:
            # readany() would raise a stored error first, and what had arrived before it would be lost.
            return content._read_nowait(-1)
        alarm = None if self._idle is None else self._idle.start(self._expire)
        try:
            return await content.readany()
        except FOREIGN as error:
            failure = explain(error, peer=self._peer, exchange=self._exchange, reading=True)
        except BaseException:
            # Cancelled: a body that is half read is of no use to the next request.
            self.close()
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
        self.close()
        try:
            raise failure
        finally:
            del failure

    def close(self) -> None:
        response = self._response
        if response.closed:
            return
        loop = self._loop
        try:
            here = asyncio.get_running_loop() is loop
        except RuntimeError:
            here = False
        if here:
            response.close()
        elif not loop.is_closed():
            # A finaliser may run anywhere, also on another thread.
            loop.call_soon_threadsafe(response.close)

    def _expire(self) -> None:
        self._content.set_exception(aiohttp.SocketTimeoutError())
