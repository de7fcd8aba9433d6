"""A local HTTP server that behaves like the vendors: both dialects, strict limits, faults on demand, a journal.

It is the judge of everything else here, so it uses nothing of the package. A request passes, in this order:

    key → body → due fault? → windows → reply

Everything that decides runs synchronously once the body has been read; an arrival, its admission and its place in the
journal therefore share one instant.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import struct
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NoReturn, Self

import msgspec
from aiohttp import web

from .faults import FAULTS, FaultPlan, Strike
from .journal import Arrival
from .window import Account, Limits
from .wire import Answer, Dialect, Problem, Stop, count_input, text_of, tokenize
from .wire_anthropic import AnthropicWire
from .wire_openai import OpenAIWire

ANTHROPIC: Dialect = AnthropicWire()
OPENAI: Dialect = OpenAIWire()
GENERATES: Mapping[str, Dialect] = {"/v1/messages": ANTHROPIC, "/v1/chat/completions": OPENAI}
MODELS = "/v1/models"
DEFAULT_MODELS = ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "gpt-6.1-sol", "gpt-6-luna")
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
PROXY_PAGE = b"<html><head><title>%d</title></head><body><center><h1>%d</h1></center></body></html>\r\n"
JSON = "application/json"


class SimulatorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the simulator behaves; everything has a default that answers at once and limits nothing."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one

    limits: Limits | Mapping[str, Limits] = Limits()  # for each key, or by key ("*" for all others)
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
    reply: Callable[[dict[str, Any]], str] | None = None  # request body to text; None: an echo of the last user message
    reply_words: int | None = None  # the echo is repeated or cut to this many words
    count_input: Callable[[Mapping[str, Any]], int] = count_input

    script: Sequence[str | None] | Mapping[str, Sequence[str | None]] = ()  # one entry a request, maybe by key
    faults: Mapping[str, float] = {}  # probability by fault
    fault_deltas: int = 2  # deltas sent before a fault in the middle of a stream
    fault_seconds: float = 1.0  # the pause of slow_first_byte and pause, and the retry-after of a 429 by fault
    seed: int = 0

    keep_bodies: bool = True  # in the journal; False saves memory under load


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
        self._clock = clock
        self._random = random or _seeded(settings.seed)
        self._record = record
        self._accounts: dict[str, Account] = {}
        self._sequence = 0
        self._runner: web.ServerRunner | None = None
        self._server: web.Server | None = None
        self._plan = FaultPlan(
            script=settings.script,
            chances=settings.faults,
            deltas=settings.fault_deltas,
            seconds=settings.fault_seconds,
            random=self._random,
        )

    def __repr__(self) -> str:
        state = "listening" if self._runner is not None else "closed"
        return f"<Simulator {self.url} {state}: {self._sequence} arrivals, {len(self._accounts)} keys>"

    # -- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._runner is not None:
            raise RuntimeError("this simulator is already listening")
        if self._clock is None:
            self._clock = asyncio.get_running_loop().time
        # A client that leaves must end its handler, or a silent reply would outlive it.
        self._server = web.Server(
            self._serve, request_factory=self._request, handler_cancellation=True, access_log=None
        )
        self._runner = web.ServerRunner(self._server, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, self.settings.host, self.settings.port, backlog=4096)
            await site.start()
        except BaseException:
            await self._runner.cleanup()
            self._runner = self._server = None
            raise
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        runner, server = self._runner, self._server
        self._runner = self._server = None
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
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.port}"

    @property
    def anthropic_url(self) -> str:
        return self.url

    @property
    def openai_url(self) -> str:
        return self.url + "/v1"

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
    ) -> None:
        """Let the next *times* requests (None: all until `heal`) meet the fault *kind*, a name in `FAULTS`.

        *key* and *path* narrow it; *deltas* and *seconds* override the settings' ``fault_deltas`` and
        ``fault_seconds``.
        """
        self._plan.fail(
            Strike(
                name=kind,
                times=times,
                key=key,
                path=path,
                deltas=self.settings.fault_deltas if deltas is None else deltas,
                seconds=self.settings.fault_seconds if seconds is None else seconds,
            )
        )

    def heal(self) -> None:
        """Forget every fault, ordered, scripted or left to chance. Revoked keys stay revoked."""
        self._plan.heal()

    def account(self, key: str) -> Account:
        """The windows of *key*."""
        account = self._accounts.get(key)
        if account is None:
            limits = self.settings.limits
            if not isinstance(limits, Limits):
                limits = limits.get(key) or limits.get("*") or Limits()
            account = Account(limits, reserve_output=self.settings.output_counting == "reserve_max")
            self._accounts[key] = account
        return account

    # -- one request ---------------------------------------------------------------------------------------------

    def _request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=LARGEST_BODY)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            raw = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return web.Response(status=413, body=PROXY_PAGE % (413, 413), content_type="text/html")
        exchange = self._arrive(request, raw)
        try:
            return await exchange.answer(raw)
        except (asyncio.CancelledError, ConnectionError):
            # Only the peer's leaving and the simulator's closing get here: a fault ends its exchange before.
            exchange.arrival.disconnected = exchange.arrival.finished is None
            raise
        finally:
            exchange.finish()

    def _arrive(self, request: web.BaseRequest, raw: bytes) -> Exchange:
        headers = request.headers
        path = request.path
        dialect = GENERATES.get(path) or (ANTHROPIC if "anthropic-version" in headers else OPENAI)
        key = headers.get("x-api-key")
        if key is None:
            scheme, _, credentials = headers.get("authorization", "").partition(" ")
            key = credentials.strip() if scheme.lower() == "bearer" else ""
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        assert self._clock is not None
        arrival = Arrival(
            sequence=self._sequence,
            time=self._clock(),
            key=key,
            dialect=dialect.name,
            method=request.method,
            path=path,
            connection=peer[1] if peer else 0,
            headers={name: headers[name] for name in HEADERS_OF_INTEREST if name in headers},
        )
        self._sequence += 1
        self.journal.append(arrival)
        return Exchange(self, request, dialect, arrival)


class Exchange:
    """One request and its answer."""

    __slots__ = ("_clock", "_request", "_simulator", "account", "arrival", "dialect", "request_id")

    def __init__(self, simulator: Simulator, request: web.BaseRequest, dialect: Dialect, arrival: Arrival) -> None:
        assert simulator._clock is not None
        self._simulator = simulator
        self._request = request
        self._clock = simulator._clock
        self.dialect = dialect
        self.arrival = arrival
        self.account = simulator.account(arrival.key)
        self.request_id = f"req_{arrival.sequence:024x}"

    async def answer(self, raw: bytes) -> web.StreamResponse:
        """Decide what becomes of the request, then do it."""
        arrival, simulator = self.arrival, self._simulator
        problem, body = self._examine(raw)
        if body is not None:
            arrival.model = body.get("model") if isinstance(body.get("model"), str) else None
            arrival.stream = body.get("stream") is True
            arrival.input_tokens = simulator.settings.count_input(body) if problem is None else 0
            if simulator.settings.keep_bodies:
                arrival.body = body
        self._write_down(msgspec.json.encode(arrival))
        if problem is not None:
            self._count_refusal()
            return self._refuse(problem)
        if body is None:
            return await self._list_models()
        answer = self._compose(body)
        most, _ = self.dialect.asked(body)
        need = (arrival.input_tokens, len(answer.tokens) if most is None else most)
        wait, dimension = self.account.wait(*need, arrival.time)
        if wait > 0:
            if self._count_refusal():
                # The refusal may itself be what the next attempt has to wait for.
                wait, dimension = self.account.wait(*need, arrival.time)
            return self._refuse(self.dialect.refused(dimension), wait)
        strike = self._draw(generates=True)
        fault = FAULTS[strike.name] if strike is not None else None
        if strike is not None and fault is not None and fault.status is not None and fault.status < 500:
            self._count_refusal()
            return self._fail(strike)
        arrival.admitted = True
        self.account.admit(*need, arrival.time)
        if strike is not None and fault is not None and fault.at == "start":
            await self._strike(strike)
            if fault.act == "answer":
                return self._fail(strike)
        latency = self._latency()
        if latency > 0:
            await asyncio.sleep(latency)
        return await (self._stream if arrival.stream else self._complete)(answer, strike)

    def finish(self) -> None:
        """Close the journal's entry."""
        arrival = self.arrival
        if arrival.finished is None:
            arrival.finished = self._clock()
        if self._simulator._record is not None:
            fields = ("sequence", "admitted", "status", "fault", "retry_after", "output_tokens", "produced")
            rest = ("finished", "disconnected")
            self._write_down(msgspec.json.encode({name: getattr(arrival, name) for name in (*fields, *rest)}))

    def _write_down(self, line: bytes) -> None:
        if self._simulator._record is not None:
            self._simulator._record(line + b"\n")

    # -- decisions -----------------------------------------------------------------------------------------------

    def _examine(self, raw: bytes) -> tuple[Problem | None, dict[str, Any] | None]:
        """What the vendor objects to, if anything, and the body of a request that generates."""
        simulator, arrival = self._simulator, self.arrival
        problems = self.dialect.problems
        key = arrival.key
        generates = arrival.path in GENERATES
        body: Any = None
        problem: Problem | None = None
        if generates and arrival.method == "POST":
            try:
                body = msgspec.json.decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError):
                problem = problems["invalid_json"]
            else:
                problem = self.dialect.check(body, self._request.headers)
        elif generates or arrival.method != "GET":
            problem = problems["method"] if generates or arrival.path == MODELS else problems["not_found"]
        elif arrival.path != MODELS and not arrival.path.startswith(MODELS + "/"):
            problem = problems["not_found"]
        body = body if isinstance(body, dict) else None
        if not key:
            problem = problems["no_key"]
        elif key in simulator.revoked or (simulator.settings.keys is not None and key not in simulator.settings.keys):
            problem = problems["authentication"]
        elif key in simulator.forbidden:
            problem = problems["permission"]
        elif key in simulator.unpaid:
            problem = problems["billing"]
        elif key in simulator.spend_limited and generates:
            problem = problems["spend_limit"]
        elif problem is None and body is not None and not self._serves(body["model"]):
            problem = self.dialect.unknown_model(body["model"])
        return problem, body

    def _serves(self, model: str) -> bool:
        models = self._simulator.settings.models
        return models is None or model in models

    def _draw(self, *, generates: bool) -> Strike | None:
        arrival = self.arrival
        strike = self._simulator._plan.draw(
            key=arrival.key, path=arrival.path, generates=generates, stream=arrival.stream
        )
        arrival.fault = strike.name if strike is not None else None
        return strike

    def _compose(self, body: dict[str, Any]) -> Answer:
        settings = self._simulator.settings
        if settings.reply is not None:
            tokens = tokenize(settings.reply(body))
        else:
            tokens = _echo(body, settings.reply_words)
        most, stops = self.dialect.asked(body)
        stop: Stop = "end"
        stop_sequence = None
        if stops:
            text = "".join(tokens)
            found = min(((text.find(s), s) for s in stops if s in text), default=None)
            if found is not None:
                tokens, stop, stop_sequence = tokenize(text[: found[0]]), "stop_sequence", found[1]
        if most is not None and len(tokens) > most:
            tokens, stop, stop_sequence = tokens[:most], "length", None
        options = body.get("stream_options")
        return Answer(
            id=f"{self.arrival.sequence:024x}",
            created=int(time.time()),
            model=body["model"],
            tokens=tuple(tokens),
            stop=stop,
            stop_sequence=stop_sequence,
            input_tokens=self.arrival.input_tokens,
            include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        )

    def _latency(self) -> float:
        latency = self._simulator.settings.latency
        if isinstance(latency, tuple):
            median, spread = latency
            return median * math.exp(spread * self._simulator._random.gauss(0.0, 1.0))
        return latency

    # -- answers -------------------------------------------------------------------------------------------------

    def _headers(self) -> dict[str, str]:
        return self.dialect.headers(self.account, self.arrival.key, self.request_id, self._clock())

    def _refuse(self, problem: Problem, wait: float | None = None) -> web.Response:
        """An error in the vendor's words; *wait* is told as retry-after, in seconds."""
        self.arrival.status = problem.status
        headers = self._headers()
        if wait is not None:
            self.arrival.retry_after = wait
            headers |= self.dialect.retry_after(wait)
        body = self.dialect.error(problem, self.request_id)
        return web.Response(status=problem.status, body=body, headers=headers, content_type=JSON)

    def _count_refusal(self) -> bool:
        """Let a refused request use up the request limit, if this vendor does so."""
        counts = self._simulator.settings.count_rejected
        if self.arrival.path not in GENERATES or not (self.dialect.counts_rejected if counts is None else counts):
            return False
        self.account.reject(self.arrival.time)
        return True

    def _fail(self, strike: Strike) -> web.Response:
        """The answer of a fault that is one."""
        fault = FAULTS[strike.name]
        status = fault.status or 500
        if fault.problem is None:
            self.arrival.status = status
            return web.Response(status=status, body=PROXY_PAGE % (status, status), content_type="text/html")
        problem = msgspec.structs.replace(self.dialect.problems[fault.problem], status=status)
        return self._refuse(problem, strike.seconds if fault.retry_after else None)

    async def _list_models(self) -> web.StreamResponse:
        strike = self._draw(generates=False)
        if strike is not None:
            await self._strike(strike)
            if FAULTS[strike.name].act == "answer":
                return self._fail(strike)
        known = tuple(self._simulator.settings.models or DEFAULT_MODELS)
        wanted = self.arrival.path[len(MODELS) + 1 :]
        if wanted and not self._serves(wanted):
            return self._refuse(self.dialect.unknown_model(wanted))
        self.arrival.status = 200
        body = self.dialect.model(wanted) if wanted else self.dialect.models(known)
        return web.Response(body=body, headers=self._headers(), content_type=JSON)

    async def _complete(self, answer: Answer, strike: Strike | None) -> web.StreamResponse:
        speed = self._simulator.settings.tokens_per_second
        if speed > 0 and answer.tokens:
            await asyncio.sleep(len(answer.tokens) / speed)
        self._produce(len(answer.tokens))
        self.arrival.status = 200
        body = self.dialect.complete(answer)
        if strike is not None and FAULTS[strike.name].at == "middle":
            half = len(body) // 2
            response = web.StreamResponse(headers=self._headers() | {"content-length": str(len(body))})
            response.content_type = JSON
            await response.prepare(self._request)
            await response.write(body[:half])
            await self._strike(strike)
            await response.write(body[half:])
            await response.write_eof()
            return response
        return web.Response(body=body, headers=self._headers(), content_type=JSON)

    async def _stream(self, answer: Answer, strike: Strike | None) -> web.StreamResponse:
        settings = self._simulator.settings
        fault = FAULTS[strike.name] if strike is not None else None
        at = -1
        if strike is not None and fault is not None and fault.at == "middle":
            at = min(strike.deltas, len(answer.tokens))
        opening, deltas, closing, terminal = self.dialect.stream(answer)
        response = web.StreamResponse(headers=self._headers() | {"cache-control": "no-cache"})
        response.content_type = "text/event-stream"
        self.arrival.status = 200
        await response.prepare(self._request)
        pending = [opening]
        if not settings.burst:
            await response.write(pending.pop())
        loop = asyncio.get_running_loop()
        begun = loop.time()
        unpaid = 0
        for index in range(len(deltas) + 1):
            if index == at and strike is not None and fault is not None:
                self._produce(unpaid)
                unpaid = 0
                if pending:
                    await response.write(b"".join(pending))
                    pending.clear()
                if fault.act == "error":
                    problem = self.dialect.problems[fault.problem or "server_error"]
                    await response.write(self.dialect.error_event(problem, self.request_id))
                    await response.write_eof()
                    return response
                await self._strike(strike)
            if index == len(deltas):
                break
            if settings.tokens_per_second > 0:
                due = begun + (index + 1) / settings.tokens_per_second - loop.time()
                if due > 0:
                    await asyncio.sleep(due)
            if settings.burst:
                pending.append(deltas[index])
                unpaid += 1
            else:
                self._produce(1)
                await response.write(deltas[index])
        self._produce(unpaid)
        pending.append(closing)
        if fault is None or fault.act != "omit":
            pending.append(terminal)
        await response.write(b"".join(pending))
        await response.write_eof()
        return response

    def _produce(self, tokens: int) -> None:
        if not tokens:
            return
        now = self._clock()
        arrival = self.arrival
        arrival.output_tokens += tokens
        arrival.produced.append((now, tokens))
        self.account.produce(tokens, now)

    async def _strike(self, strike: Strike) -> None:
        """Do what the fault does to the connection; return if the exchange goes on."""
        match FAULTS[strike.name].act:
            case "wait":
                await asyncio.sleep(strike.seconds)
            case "reset":
                await self._hang_up(rudely=True)
            case "close":
                await self._hang_up(rudely=False)
            case "hang":
                await asyncio.get_running_loop().create_future()
            case "answer" | "error" | "omit":
                pass

    async def _hang_up(self, *, rudely: bool) -> NoReturn:
        """Close the connection under the client: RST if *rudely*, else FIN after what was written."""
        self.arrival.finished = self._clock()
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client left first")
        if rudely:
            # Linger for no time at all: the kernel then answers with a reset.
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()
        # The loss of the connection cancels this handler.
        await asyncio.get_running_loop().create_future()
        raise AssertionError("unreachable")


def _echo(body: Mapping[str, Any], words: int | None) -> list[str]:
    """The default reply: the last user message, so that a test can recognise its own question."""
    last = ""
    for message in reversed(body["messages"]):
        if message.get("role") == "user":
            last = text_of(message.get("content"))
            break
    tokens = tokenize("You said: " + last)
    if words is None:
        return tokens
    if words > len(tokens):
        tokens = tokens + [" " + tokens[i % len(tokens)].strip() for i in range(len(tokens), words)]
    return tokens[:words]


def _seeded(seed: int) -> random.Random:
    return random.Random(seed)
