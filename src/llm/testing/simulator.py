"""A local HTTP server that behaves like the vendors: both dialects, strict limits, faults on demand, a journal.

It is the judge of everything else here, so it uses nothing of the package. A request passes, in this order:

    key → body → due fault? → windows → reply

Everything that decides runs synchronously once the body has been read; an arrival, its admission and its place in the
journal therefore share one instant. A request whose body never came in full is in the journal as not received, and no
more becomes of it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Self, cast

import msgspec
from aiohttp import web

from .exchange import ANTHROPIC, COUNTS, GENERATES, OPENAI, Exchange
from .faults import MEGABYTE, PROXY_PAGE, Chances, FaultPlan, Script, Strike
from .journal import Arrival
from .saying import Said
from .window import Account, Limits
from .wire import count_input

HEADERS_OF_INTEREST = (
    "user-agent",
    "anthropic-version",
    "anthropic-beta",
    "openai-organization",
    "openai-project",
    "x-client-request-id",
    "traceparent",
)
LARGEST_BODY = 32 * 1024 * 1024


class SimulatorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the simulator behaves; everything has a default that answers at once and limits nothing."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one

    limits: Limits | Mapping[str, Limits] = Limits()  # for each key, or by key or organisation ("*" for all others)
    organizations: Mapping[str, str] = {}  # by key: keys of one organisation share its limits; of none: its own
    output_counting: Literal["produced", "reserve_max"] = "produced"  # as Anthropic does, or as OpenAI does
    count_rejected: bool | None = None  # do refused requests use up the request limit; None: OpenAI's do

    keys: Collection[str] | None = None  # None: any key that is not empty
    models: Collection[str] | None = None  # None: any model is served
    revoked: Collection[str] = ()  # keys answered with 401
    forbidden: Collection[str] = ()  # 403
    spend_limited: Collection[str] = ()  # the 429 that no waiting cures
    unpaid: Collection[str] = ()  # 402

    latency: float | tuple[float, float] = 0.0  # seconds to the first byte, or (median, spread) of a lognormal
    tokens_per_second: float = 0.0  # 0: all at once
    burst: bool = False  # write all events of a stream in one segment
    # Request body to text, or to text, thinking and tool calls; None: a call of the first tool, JSON by the schema that
    # is asked for, or else an echo of the last user message.
    reply: Callable[[dict[str, Any]], str | Said] | None = None
    reply_words: int | None = None  # the echo is repeated or cut to this many words
    count_input: Callable[[Mapping[str, Any]], int] = count_input

    # One entry a request, and a probability by fault: for all, or by key or path ("*" for all others).
    script: Script | Mapping[str, Script] = ()
    faults: Chances | Mapping[str, Chances] = {}
    fault_deltas: int = 2  # deltas sent before a fault in the middle of a stream
    fault_seconds: float = 1.0  # the pause of a fault that waits, the retry-after of a 429 by fault, a drip's interval
    fault_bytes: int = 10 * MEGABYTE  # size of an oversized body, and of a gzip bomb once it is unpacked
    seed: int = 0

    stalled_port: int | None = None  # a second port, which accepts and never answers; 0: any free one, None: none

    keep_bodies: bool = True  # in the journal; False saves memory under load
    keep_journal: bool = True  # in memory; False where `record` keeps it


class Simulator:
    """The server; it listens from `__aenter__` to `__aexit__`.

    *clock* dates the journal and the windows, *random* draws latencies and faults. *record* is given each journal
    line as it is written: the arrival, and later what became of it.
    """

    def __init__(
        self,
        settings: SimulatorSettings | None = None,
        *,
        clock: Callable[[], float] | None = None,
        random: random.Random | None = None,
        record: Callable[[bytes], object] | None = None,
    ) -> None:
        self.settings = settings = settings or SimulatorSettings()
        self.journal: list[Arrival] = []
        self.revoked = set(settings.revoked)
        self.forbidden = set(settings.forbidden)
        self.spend_limited = set(settings.spend_limited)
        self.unpaid = set(settings.unpaid)
        self.port = settings.port
        self.stalled_port = settings.stalled_port
        self.stalled: set[asyncio.Transport] = set()  # the connections that are open there
        self.cached: dict[str, set[int]] = {}  # prompts in the vendor's cache, by key
        self.clock = clock or time.monotonic
        self.random = random or _seeded(settings.seed)
        self.record = record
        self._follow_loop = clock is None
        self._accounts: dict[str, Account] = {}  # by key
        self._shared: dict[str, Account] = {}  # by organisation
        self._sequence = 0
        self._runner: web.ServerRunner | None = None
        self._server: web.Server | None = None
        self._stalled: asyncio.Server | None = None
        self._usual = Strike(
            name="", deltas=settings.fault_deltas, seconds=settings.fault_seconds, size=settings.fault_bytes
        )
        self.plan = FaultPlan(script=settings.script, chances=settings.faults, usual=self._usual, random=self.random)

    def __repr__(self) -> str:
        state = "listening" if self._runner is not None else "closed"
        return f"<Simulator {self.url} {state}: {self._sequence} arrivals, {len(self._accounts)} keys>"

    # -- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._runner is not None:
            raise RuntimeError("this simulator is already listening")
        if self._follow_loop:
            self.clock = asyncio.get_running_loop().time
        # A client that leaves must end its handler, or a silent reply would outlive it.
        self._server = web.Server(
            self._serve, request_factory=self._request, handler_cancellation=True, access_log=None
        )
        self._runner = web.ServerRunner(self._server, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, self.settings.host, self.settings.port, backlog=4096)
            await site.start()
            if self.stalled_port is not None:
                loop = asyncio.get_running_loop()
                host, port = self.settings.host, self.settings.stalled_port
                self._stalled = await loop.create_server(lambda: _Silence(self.stalled), host, port, backlog=4096)
                self.stalled_port = self._stalled.sockets[0].getsockname()[1]
        except BaseException:
            await self._runner.cleanup()
            self._runner = self._server = None
            raise
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        runner, server, stalled = self._runner, self._server, self._stalled
        self._runner = self._server = self._stalled = None
        if stalled is not None:
            stalled.close()
            for transport in list(self.stalled):
                transport.abort()
            await stalled.wait_closed()
        if runner is None or server is None:
            return
        for site in list(runner.sites):
            await site.stop()
        for connection in server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    @property
    def url(self) -> str:
        """Where it listens, without a path: Anthropic's base URL. OpenAI's is this plus ``/v1``."""
        return f"http://{self._host}:{self.port}"

    @property
    def _host(self) -> str:
        return f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host

    @property
    def anthropic_url(self) -> str:
        return self.url

    @property
    def openai_url(self) -> str:
        return self.url + "/v1"

    @property
    def stalled_url(self) -> str:
        """Where a TLS handshake is accepted and never answered; only with the setting ``stalled_port``."""
        if self.stalled_port is None:
            raise RuntimeError("this simulator has no stalled port; set stalled_port=0")
        return f"https://{self._host}:{self.stalled_port}"

    # -- orders --------------------------------------------------------------------------------------------------

    def fail(
        self,
        kind: str,
        *,
        times: int | None = 1,
        key: str | None = None,
        path: str | None = None,
        deltas: int | None = None,
        seconds: float | None = None,
        size: int | None = None,
    ) -> None:
        """Let the next *times* requests (None: all until `heal`) meet the fault *kind*, a name in `FAULTS`.

        *key* and *path* narrow it; *deltas*, *seconds* and *size* override the settings' ``fault_deltas``,
        ``fault_seconds`` and ``fault_bytes``.
        """
        particulars: dict[str, Any] = {"deltas": deltas, "seconds": seconds, "size": size}
        given = {name: value for name, value in particulars.items() if value is not None}
        self.plan.fail(msgspec.structs.replace(self._usual, name=kind, times=times, key=key, path=path, **given))

    def heal(self) -> None:
        """Forget every fault, ordered, scripted or left to chance. Revoked keys stay revoked."""
        self.plan.heal()

    def owner(self, key: str) -> str:
        """The organisation of *key*: one of its own, by its name, unless the settings name another."""
        return self.settings.organizations.get(key, key)

    def account(self, key: str) -> Account:
        """The windows of *key*, which are those of its organisation."""
        account = self._accounts.get(key)
        if account is None:
            organization = self.settings.organizations.get(key)
            account = self._shared.get(organization) if organization is not None else None
            if account is None:
                limits = self.settings.limits
                if not isinstance(limits, Limits):
                    limits = limits.get(self.owner(key)) or limits.get("*") or Limits()
                account = Account(limits, reserve_output=self.settings.output_counting == "reserve_max")
            self._accounts[key] = account
            if organization is not None:
                self._shared[organization] = account
        return account

    # -- one request ---------------------------------------------------------------------------------------------

    def _request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=LARGEST_BODY)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            raw = await request.read()
        except web.HTTPRequestEntityTooLarge:
            exchange = self._arrive(request)
            exchange.arrival.status = 413
            exchange.give_up()
            return web.Response(status=413, body=PROXY_PAGE % (413, 413), content_type="text/html")
        except (asyncio.CancelledError, ConnectionError, web.RequestPayloadError):
            exchange = self._arrive(request)
            exchange.arrival.disconnected = True
            exchange.give_up()
            raise
        exchange = self._arrive(request)
        try:
            return await exchange.answer(raw)
        except (asyncio.CancelledError, ConnectionError):
            # Only the peer's leaving and the simulator's closing get here: a fault ends its exchange before.
            exchange.arrival.disconnected = exchange.arrival.finished is None
            raise
        finally:
            exchange.finish()

    def _arrive(self, request: web.BaseRequest) -> Exchange:
        headers = request.headers
        path = request.path
        dialect = GENERATES.get(path) or COUNTS.get(path) or (ANTHROPIC if "anthropic-version" in headers else OPENAI)
        key = headers.get("x-api-key")
        if key is None:
            scheme, _, credentials = headers.get("authorization", "").partition(" ")
            key = credentials.strip() if scheme.lower() == "bearer" else ""
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        arrival = Arrival(
            sequence=self._sequence,
            time=self.clock(),
            key=key,
            dialect=dialect.name,
            method=request.method,
            path=path,
            connection=peer[1] if peer else 0,
            headers={name: headers[name] for name in HEADERS_OF_INTEREST if name in headers},
        )
        self._sequence += 1
        if self.settings.keep_journal:
            self.journal.append(arrival)
        return Exchange(self, request, dialect, arrival)


class _Silence(asyncio.Protocol):
    """A connection that hears and says nothing."""

    def __init__(self, open_ones: set[asyncio.Transport]) -> None:
        self._open_ones = open_ones
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are of no class of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._open_ones.add(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._open_ones.discard(self._transport)


def _seeded(seed: int) -> random.Random:
    return random.Random(seed)
