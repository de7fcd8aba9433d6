"""The wall's own vendors, on raw sockets in a thread of their own: whatever a server can do wrong is done byte by byte.

They import nothing of what they judge. A vendor's script says what it does with each request in turn, the last line
again and again; what it was sent, and what usage it told, is in its journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

SSE = "text/event-stream"
JSON = "application/json"
WORDS = [f"word{number:02d} " for number in range(60)]
"""An answer of sixty tokens."""
TOLD = (7, 60)
"""The usage that a whole answer tells: input and output tokens."""


class Seen:
    """A request that was read to its end."""

    def __init__(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> None:
        self.at = time.monotonic()
        self.path = path
        self.key = headers.get("authorization", "").removeprefix("Bearer ") or headers.get("x-api-key", "")
        self.body = body
        self.gone_at: float | None = None
        """When its connection was closed from the other side."""


class Reply:
    """What a script writes to."""

    def __init__(self, vendor: Vendor, seen: Seen, writer: asyncio.StreamWriter) -> None:
        self.vendor = vendor
        self.seen = seen
        self.writer = writer
        self.keep = True

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: int = 200, kind: str = JSON, *, length: int | None = None, **headers: str) -> None:
        """The head of a response; without *length* its body is chunked."""
        lines = [f"HTTP/1.1 {status} Said", f"content-type: {kind}"]
        lines.append(f"content-length: {length}" if length is not None else "transfer-encoding: chunked")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def chunk(self, data: bytes) -> None:
        await self.raw(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def whole(self, status: int, body: bytes, kind: str = JSON, **headers: str) -> None:
        await self.head(status, kind, length=len(body), **headers)
        await self.raw(body)

    def reset(self) -> None:
        """Cut the connection the hard way."""
        self.keep = False
        self.writer.transport.abort()

    def cut(self) -> None:
        """Close it in the middle of things."""
        self.keep = False
        self.writer.close()

    async def silence(self) -> None:
        """Say nothing more until the other side is gone."""
        self.keep = False
        await self.vendor.gone(self)

    def tell(self, usage: tuple[int, int]) -> None:
        """Enter the usage that this answer tells into the books."""
        self.vendor.told = (self.vendor.told[0] + usage[0], self.vendor.told[1] + usage[1])


Script = Callable[[Reply], Awaitable[None]]


class Vendor:
    """One of them. *script* is what it does with each request; without one it answers."""

    def __init__(self, *script: Script, tls: ssl.SSLContext | None = None, name: str = "P") -> None:
        self.name = name
        self.script: list[Script] = list(script)
        self.tls = tls
        self.journal: list[Seen] = []
        self.probes = 0
        self.told = (0, 0)
        self.open = 0
        """Connections."""
        self.accepted = 0
        self.port = 0
        self._gone: dict[Reply, asyncio.Event] = {}

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/v1"

    def says(self, *script: Script) -> None:
        """From now on."""
        self.script = list(script)

    async def gone(self, reply: Reply) -> None:
        await self._gone[reply].wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.accepted += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError, ssl.SSLError):
            pass
        finally:
            self.open -= 1
            writer.close()
            with contextlib.suppress(Exception):
                await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        data = await reader.readexactly(int(headers.get("content-length", "0")))
        seen = Seen(path, headers, json.loads(data) if data else {})
        reply = Reply(self, seen, writer)
        if method == "GET":
            # A probe of a key: parked keys stay parked.
            self.probes += 1
            await reply.whole(401, b'{"error":{"message":"no"}}')
            return True
        self.journal.append(seen)
        script = (self.script.pop(0) if len(self.script) > 1 else self.script[0]) if self.script else answers
        self._gone[reply] = gone = asyncio.Event()

        async def watch() -> None:
            # Whoever waits for its answer says nothing meanwhile: what comes is the end.
            with contextlib.suppress(ConnectionError):
                if await reader.read(1) == b"":
                    seen.gone_at = time.monotonic()
            gone.set()

        watching = asyncio.ensure_future(watch())
        try:
            await script(reply)
            if not reply.keep:
                return False
        finally:
            if not reply.keep:
                await asyncio.wait([watching], timeout=5)
            watching.cancel()
            await asyncio.wait([watching])
            del self._gone[reply]
        return not gone.is_set()


class Street:
    """The thread in which the vendors of one case live."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._servers: list[asyncio.Server] = []
        self.vendors: list[Vendor] = []
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Street:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run *coroutine* there, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    async def _open(self, vendor: Vendor, host: str, port: int) -> None:
        server = await asyncio.start_server(vendor.serve, host, port, ssl=vendor.tls, limit=1 << 22)
        vendor.port = server.sockets[0].getsockname()[1]
        self._servers.append(server)

    def open(self, vendor: Vendor, host: str = "127.0.0.1", port: int = 0) -> Vendor:
        self.call(self._open(vendor, host, port))
        self.vendors.append(vendor)
        return vendor


# -- what a vendor can say, in the words of Chat Completions ----------------------------------------------------


def completion(text: str, told: tuple[int, int] = TOLD) -> bytes:
    usage = {"prompt_tokens": told[0], "completion_tokens": told[1], "total_tokens": sum(told)}
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return json.dumps(
        {"id": "c", "model": "m", "object": "chat.completion", "choices": choices, "usage": usage}
    ).encode()


def piece(text: str) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}}]
    return b"data: " + json.dumps({"id": "c", "model": "m", "choices": choices}).encode() + b"\n\n"


def finish(told: tuple[int, int] = TOLD) -> bytes:
    stop = {"id": "c", "model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    usage = {"prompt_tokens": told[0], "completion_tokens": told[1], "total_tokens": sum(told)}
    last = {"id": "c", "model": "m", "choices": [], "usage": usage}
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in (stop, last)) + b"data: [DONE]\n\n"


async def answers(reply: Reply) -> None:
    """A good answer, whole or streamed as it was asked for; its text is the vendor's name and the words."""
    name = reply.vendor.name
    reply.tell(TOLD)
    if not reply.seen.body.get("stream"):
        await reply.whole(200, completion(f"{name}: " + "".join(WORDS)))
        return
    await reply.head(200, SSE)
    await reply.chunk(piece(f"{name}: "))
    for word in WORDS:
        await reply.chunk(piece(word))
    await reply.chunk(finish())
    await reply.end()


def fails(status: int, message: str = "no", code: str | None = None, **headers: str) -> Script:
    """An error of the vendor's."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()

    async def script(reply: Reply) -> None:
        await reply.whole(status, body, **headers)

    return script


def says(status: int, body: bytes, kind: str = JSON, **headers: str) -> Script:
    """Any body."""

    async def script(reply: Reply) -> None:
        await reply.whole(status, body, kind, **headers)

    return script


async def resets(reply: Reply) -> None:
    reply.reset()


async def keeps_silent(reply: Reply) -> None:
    await reply.silence()


def streams(count: int, then: Script) -> Script:
    """So many words of a stream, then something else."""

    async def script(reply: Reply) -> None:
        await reply.head(200, SSE)
        for word in WORDS[:count]:
            await reply.chunk(piece(word))
        await then(reply)

    return script


async def cut(reply: Reply) -> None:
    # What was written has to arrive before the end does.
    await asyncio.sleep(0.02)
    reply.cut()


async def ends(reply: Reply) -> None:
    """The body ends as bodies do, without the terminal event."""
    await reply.end()


def event(data: bytes, then: Script | None = None) -> Script:
    """One event of any kind, and the body's end unless *then* says more."""

    async def script(reply: Reply) -> None:
        await reply.chunk(b"data: " + data + b"\n\n")
        await (then or ends)(reply)

    return script


async def drips(reply: Reply) -> None:
    """A comment, byte by byte, for ever."""
    reply.keep = False
    while True:
        await reply.chunk(b":")
        await asyncio.sleep(0.1)
