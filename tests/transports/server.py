"""A raw server whose every byte a test decides, and the transport that talks to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from llm.core.settings import TimeoutSettings, TransportSettings
from llm.transports.base import Exchange, HTTPRequest
from llm.transports.http import HTTPTransport
from llm.utils.clock import Clock, SystemClock

MOMENT = 0.05
"""Seconds, where time is the behaviour; what must not take that long is given twenty times as much."""
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number
        """Counted from 1 in the order of arrival."""
        self.lost = asyncio.Event()
        """Set when the client has closed its side."""

    async def request(self) -> tuple[bytes, bytes]:
        """The next request: its head, and its body by content-length. Raises IncompleteReadError at the end."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        return head, await self.reader.readexactly(length)

    def send(self, *pieces: bytes) -> None:
        self.writer.write(b"".join(pieces))

    def answer(self, body: bytes = b"ok", *, status: str = "200 OK", headers: bytes = b"") -> None:
        self.send(b"HTTP/1.1 ", status.encode(), b"\r\ncontent-length: %d\r\n" % len(body), headers, b"\r\n", body)

    def close(self) -> None:
        self.writer.close()

    def hang_up_unseen(self) -> None:
        """Send a FIN straight from the socket, with no turn of the loop: only the client's kernel knows of it."""
        with socket.socket(fileno=os.dup(self.writer.get_extra_info("socket").fileno())) as double:
            double.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the client has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        self.lost.set()


Handler = Callable[[Peer], Awaitable[None]]


class Server:
    def __init__(self, port: int, scheme: str) -> None:
        self.port = port
        self.scheme = scheme
        self.peers: list[Peer] = []
        self.failures: list[BaseException] = []

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/v1/messages"

    @property
    def connections(self) -> int:
        return len(self.peers)


@asynccontextmanager
async def serve(handler: Handler, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Run *handler* for every connection. A client's leaving ends it; anything else that it raises fails the test."""
    tasks: set[asyncio.Task[None]] = set()

    async def run(peer: Peer) -> None:
        try:
            await handler(peer)
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass
        except Exception as error:  # the test's own mistake, told at the end
            server.failures.append(error)
        finally:
            peer.lost.set()
            peer.writer.transport.abort()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer, len(server.peers) + 1)
        server.peers.append(peer)
        task = asyncio.create_task(run(peer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls, limit=1 << 22)
    server = Server(listener.sockets[0].getsockname()[1], "http" if tls is None else "https")
    try:
        yield server
    finally:
        listener.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(5):
            await asyncio.sleep(0)
    assert not server.failures, server.failures


async def answering(peer: Peer) -> None:
    """The plainest server: answers every request, keeps the connection."""
    while True:
        await peer.request()
        peer.answer()


def http(
    *,
    connect: float | None = 5.0,
    first_byte: float | None = 5.0,
    idle: float | None = 5.0,
    clock: Clock | None = None,
    max_age: float | None = None,
    environ: dict[str, str] | None = None,
    **settings: Any,
) -> HTTPTransport:
    return HTTPTransport(
        TransportSettings(**settings),
        TimeoutSettings(connect=connect, first_byte=first_byte, idle=idle),
        clock=clock or SystemClock(),
        environ=environ or {},
        max_age=max_age,
    )


@asynccontextmanager
async def talking(
    handler: Handler = answering, *, tls: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[tuple[HTTPTransport, Server]]:
    """A server that does what *handler* says, and a transport to it."""
    async with serve(handler, tls=tls) as server:
        transport = http(**options)
        try:
            yield transport, server
        finally:
            await transport.close()


def post(url: str, body: bytes = b'{"model": "m"}') -> HTTPRequest:
    return HTTPRequest("POST", url, {"content-type": "application/json", "x-api-key": "sk-planted"}, body)


async def ask(transport: HTTPTransport, url: str, exchange: Exchange | None = None) -> bytes:
    response = await transport.send(post(url), exchange or Exchange())
    return await response.read()


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until *condition* holds, for a second at most."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came true")
