"""One request to the simulator and its answer: what is decided about it, and how that is done to the connection."""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgspec
from aiohttp import web

from .faults import BODIES, Strike
from .journal import Arrival
from .saying import Block, Said, blocks_of, tokenize, unscripted
from .wire import Answer, Dialect, Problem, Stop, text_of
from .wire_anthropic import AnthropicWire
from .wire_openai import OpenAIWire
from .wire_responses import ResponsesWire

if TYPE_CHECKING:
    from .simulator import Simulator

ANTHROPIC: Dialect = AnthropicWire()
OPENAI: Dialect = OpenAIWire()
RESPONSES: Dialect = ResponsesWire()
GENERATES: Mapping[str, Dialect] = {
    "/v1/messages": ANTHROPIC,
    "/v1/chat/completions": OPENAI,
    "/v1/responses": RESPONSES,
}
COUNTS: Mapping[str, Dialect] = {"/v1/messages/count_tokens": ANTHROPIC, "/v1/responses/input_tokens": RESPONSES}
CACHED_FROM = 1024  # tokens: shorter prompts are cached by no vendor
MODELS = "/v1/models"
DEFAULT_MODELS = ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "gpt-6.1-sol", "gpt-6-luna")
JSON = "application/json"
NOTHING = Problem(500, "", "")
PADDINGS = 64


class Verdict(NamedTuple):
    """An admitted request: what to say (None: the list of models), and the fault that meets it on the way."""

    answer: Answer | None
    strike: Strike | None


class Exchange:
    """One request and its answer."""

    __slots__ = ("_clock", "_request", "_simulator", "account", "arrival", "dialect", "request_id")

    def __init__(self, simulator: Simulator, request: web.BaseRequest, dialect: Dialect, arrival: Arrival) -> None:
        self._simulator = simulator
        self._request = request
        self._clock = simulator.clock
        self.dialect = dialect
        self.arrival = arrival
        self.account = simulator.account(arrival.key)
        self.request_id = f"req_{arrival.sequence:024x}"

    async def answer(self, raw: bytes) -> web.StreamResponse:
        """Decide what becomes of the request, write that down, then do it."""
        verdict = self._decide(raw)
        self._write_down(msgspec.json.encode(self.arrival))
        if isinstance(verdict, web.Response):
            return verdict
        if isinstance(verdict, Strike):
            return await self._fail(verdict)
        strike, answer = verdict.strike, verdict.answer
        if strike is not None and strike.fault.at == "start":
            await self._strike(strike)
            if strike.fault.act == "answer":
                return await self._fail(strike)
        if answer is None:
            return self._count() if self.arrival.path in COUNTS else self._list_models()
        latency = self._latency()
        if latency > 0:
            await asyncio.sleep(latency)
        return await (self._stream if self.arrival.stream else self._complete)(answer, strike)

    def give_up(self) -> None:
        """Write down a request that did not come in full."""
        self.arrival.received = False
        self._write_down(msgspec.json.encode(self.arrival))
        self.finish()

    def finish(self) -> None:
        """Close the journal's entry."""
        arrival = self.arrival
        if arrival.finished is None:
            arrival.finished = self._clock()
        if self._simulator.record is not None:
            fields = ("sequence", "admitted", "status", "fault", "retry_after", "output_tokens", "produced")
            rest = ("finished", "disconnected")
            self._write_down(msgspec.json.encode({name: getattr(arrival, name) for name in (*fields, *rest)}))

    def _write_down(self, line: bytes) -> None:
        if self._simulator.record is not None:
            self._simulator.record(line + b"\n")

    # -- decisions -----------------------------------------------------------------------------------------------

    def _decide(self, raw: bytes) -> web.Response | Strike | Verdict:
        """Refuse the request, be it by a fault, or take its share of the windows and say what it will get."""
        arrival, settings = self.arrival, self._simulator.settings
        problem, body = self._examine(raw)
        if body is not None:
            arrival.model = body.get("model") if isinstance(body.get("model"), str) else None
            arrival.stream = body.get("stream") is True
            arrival.input_tokens = settings.count_input(body) if problem is None else 0
            if settings.keep_bodies:
                arrival.body = body
        if problem is not None:
            self._count_refusal()
            return self._refuse(problem)
        if body is None or arrival.path in COUNTS:
            return Verdict(None, self._draw(generates=False))
        answer = self._compose(body)
        most, _ = self.dialect.asked(body)
        need = (arrival.input_tokens, answer.output_tokens if most is None else most)
        wait, dimension = self.account.wait(*need, arrival.time)
        if wait > 0:
            if self._count_refusal():
                # The refusal may itself be what the next attempt has to wait for.
                wait, dimension = self.account.wait(*need, arrival.time)
            return self._refuse(self.dialect.refused(dimension), wait)
        strike = self._draw(generates=True)
        if strike is not None and 400 <= (strike.fault.status or 0) < 500:
            self._count_refusal()
            return strike
        arrival.admitted = True
        self.account.admit(*need, arrival.time)
        return Verdict(answer, strike)

    def _examine(self, raw: bytes) -> tuple[Problem | None, dict[str, Any] | None]:
        """What the vendor objects to, if anything, and the body of a request that generates."""
        simulator, arrival = self._simulator, self.arrival
        problems = self.dialect.problems
        key = arrival.key
        counts = arrival.path in COUNTS
        generates = arrival.path in GENERATES or counts
        body: Any = None
        problem: Problem | None = None
        if generates and arrival.method == "POST":
            try:
                body = msgspec.json.decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError):
                problem = problems["invalid_json"]
            else:
                asked = {"max_tokens": 1} | body if counts and self.dialect is ANTHROPIC else body
                problem = self.dialect.check(asked, self._request.headers)
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
        strike = self._simulator.plan.draw(
            key=arrival.key, path=arrival.path, generates=generates, stream=arrival.stream
        )
        arrival.fault = strike.name if strike is not None else None
        return strike

    def _compose(self, body: dict[str, Any]) -> Answer:
        settings = self._simulator.settings
        said: Said | str | None
        if settings.reply is not None:
            said = settings.reply(body)
        else:
            said = unscripted(self.dialect.wishes(body))
            if said is None or (not said.text and not said.calls):
                text = "".join(_echo(body, settings.reply_words))
                said = text if said is None else Said(text, thinking=said.thinking)
        blocks = blocks_of(Said(said) if isinstance(said, str) else said, self.arrival.sequence)
        most, stops = self.dialect.asked(body)
        stop: Stop = "tool_calls" if any(block.kind == "call" for block in blocks) else "end"
        stop_sequence = None
        if stops and stop == "end":
            text = "".join(block.text for block in blocks if block.kind == "text")
            found = min(((text.find(s), s) for s in stops if s in text), default=None)
            if found is not None:
                stop, stop_sequence = "stop_sequence", found[1]
                kept = tuple(tokenize(text[: found[0]]))
                blocks = (*(b for b in blocks if b.kind != "text"), *((Block("text", kept),) if kept else ()))
        if most is not None and sum(len(block.tokens) for block in blocks) > most:
            blocks, stop, stop_sequence = _cut(blocks, most), "length", None
        options = body.get("stream_options")
        read, written = self._cached(body)
        return Answer(
            id=f"{self.arrival.sequence:024x}",
            created=int(time.time()),
            model=body["model"],
            blocks=blocks,
            stop=stop,
            stop_sequence=stop_sequence,
            input_tokens=self.arrival.input_tokens,
            include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
            cache_read=read,
            cache_written=written,
        )

    def _cached(self, body: dict[str, Any]) -> tuple[int, int]:
        """Tokens of the prompt that were read from the key's cache, and that were written to it."""
        prefix = self.dialect.prefix(body)
        if prefix is None:
            return 0, 0
        text = msgspec.json.encode(prefix)
        tokens = min(len(text) // 4, self.arrival.input_tokens)
        if tokens < CACHED_FROM:
            return 0, 0
        known = self._simulator.cached.setdefault(self.arrival.key, set())
        seen = hash(text) in known
        known.add(hash(text))
        return (tokens, 0) if seen else (0, tokens)

    def _latency(self) -> float:
        latency = self._simulator.settings.latency
        if isinstance(latency, tuple):
            median, spread = latency
            return median * math.exp(spread * self._simulator.random.gauss(0.0, 1.0))
        return latency

    # -- answers -------------------------------------------------------------------------------------------------

    def _headers(self) -> dict[str, str]:
        owner = self._simulator.owner(self.arrival.key)
        return self.dialect.headers(self.account, owner, self.request_id, self._clock())

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

    async def _fail(self, strike: Strike) -> web.StreamResponse:
        """The answer of a fault that is one."""
        fault = strike.fault
        status = fault.status or 500
        self.arrival.status = status
        headers: dict[str, str] = {}
        said = b""
        if fault.problem is not None:
            said = self.dialect.error(self.dialect.problems[fault.problem], self.request_id)
            headers = self._headers() | self._retry_after(strike)
        headers |= {
            f"x-padding-{i}": "x" * (fault.padding // PADDINGS) for i in range(PADDINGS if fault.padding else 0)
        }
        response = web.StreamResponse(status=status, headers=headers)
        response.content_type = JSON if fault.problem is not None else "text/html"
        if fault.body == "bomb":
            response.headers["content-encoding"] = "gzip"
        pieces = BODIES[fault.body](status, said, strike.size)
        if fault.body in ("problem", "page", "empty", "array"):
            pieces = list(pieces)
            response.content_length = sum(map(len, pieces))
        await response.prepare(self._request)
        for piece in pieces:
            await response.write(piece)
        await response.write_eof()
        return response

    def _retry_after(self, strike: Strike) -> dict[str, str]:
        said = strike.fault.retry_after
        if said is None:
            return {}
        if said != "seconds":
            return {"retry-after": said}
        self.arrival.retry_after = strike.seconds
        return self.dialect.retry_after(strike.seconds)

    def _list_models(self) -> web.Response:
        known = tuple(self._simulator.settings.models or DEFAULT_MODELS)
        wanted = self.arrival.path[len(MODELS) + 1 :]
        if wanted and not self._serves(wanted):
            return self._refuse(self.dialect.unknown_model(wanted))
        self.arrival.status = 200
        body = self.dialect.model(wanted) if wanted else self.dialect.models(known)
        return web.Response(body=body, headers=self._headers(), content_type=JSON)

    def _count(self) -> web.Response:
        self.arrival.status = 200
        body = self.dialect.counted(self.arrival.input_tokens)
        return web.Response(body=body, headers=self._headers(), content_type=JSON)

    async def _complete(self, answer: Answer, strike: Strike | None) -> web.StreamResponse:
        speed = self._simulator.settings.tokens_per_second
        if speed > 0 and answer.blocks:
            await asyncio.sleep(answer.output_tokens / speed)
        self._produce(answer.output_tokens)
        self.arrival.status = 200
        body = self.dialect.complete(answer)
        if strike is None:
            return web.Response(body=body, headers=self._headers(), content_type=JSON)
        response = web.StreamResponse(headers=self._headers() | {"content-length": str(len(body))})
        response.content_type = JSON
        await response.prepare(self._request)
        if strike.fault.at == "middle":
            half = len(body) // 2
            await response.write(body[:half])
            await self._strike(strike)
            if strike.fault.act == "drip":
                await self._drip(response, body[half:], strike)
            else:
                await response.write(body[half:])
        else:
            await response.write(body)
        await self._end(response, strike)
        return response

    async def _stream(self, answer: Answer, strike: Strike | None) -> web.StreamResponse:
        settings = self._simulator.settings
        act = strike.fault.act if strike is not None else None
        at = -1
        if strike is not None and strike.fault.at in ("first", "middle"):
            at = 0 if strike.fault.at == "first" else min(strike.deltas, answer.output_tokens)
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
        # What is thought is not shown by every vendor, and paid all the same.
        unpaid = answer.output_tokens - len(deltas)
        for index in range(len(deltas) + 1):
            if index == at and strike is not None:
                self._produce(unpaid)
                unpaid = 0
                if pending:
                    await response.write(b"".join(pending))
                    pending.clear()
                if act == "error":
                    problem = self.dialect.problems[strike.fault.problem or "server_error"]
                    await response.write(self.dialect.error_event(problem, self.request_id))
                    await response.write_eof()
                    return response
                if act == "drip":
                    self._produce(len(deltas) - index)
                    await self._drip(response, b"".join([*deltas[index:], closing, terminal]), strike)
                    await response.write_eof()
                    return response
                if act == "malform":
                    # Without its last brace the event is no JSON.
                    event = deltas[index] if index < len(deltas) else self.dialect.error_event(NOTHING, "")
                    await response.write(event.rstrip()[:-1] + b"\n\n")
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
        if act != "omit":
            pending.append(terminal)
        await response.write(b"".join(pending))
        await self._end(response, strike)
        return response

    async def _drip(self, response: web.StreamResponse, data: bytes, strike: Strike) -> None:
        for i in range(len(data)):
            await asyncio.sleep(strike.seconds)
            await response.write(data[i : i + 1])

    async def _end(self, response: web.StreamResponse, strike: Strike | None) -> None:
        """End a whole answer, and maybe the connection that the client believes it keeps."""
        await response.write_eof()
        if strike is not None and strike.fault.at == "end" and strike.fault.act == "close":
            self.arrival.finished = self._clock()
            if self._request.transport is not None:
                self._request.transport.close()

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
        match strike.fault.act:
            case "wait":
                await asyncio.sleep(strike.seconds)
            case "reset":
                await self._hang_up(rudely=True)
            case "close":
                await self._hang_up(rudely=False)
            case "hang":
                await asyncio.get_running_loop().create_future()
            case "answer" | "drip" | "error" | "malform" | "omit":
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


def _cut(blocks: tuple[Block, ...], most: int) -> tuple[Block, ...]:
    """The first *most* tokens of *blocks*. A call that is cut is left out: its arguments would be no JSON."""
    found: list[Block] = []
    for block in blocks:
        if len(block.tokens) <= most:
            found.append(block)
        elif block.kind != "call" and most:
            found.append(msgspec.structs.replace(block, tokens=block.tokens[:most]))
        most = max(0, most - len(block.tokens))
    return tuple(found)


def _echo(body: Mapping[str, Any], words: int | None) -> list[str]:
    """The default reply: the last user message, so that a test can recognise its own question."""
    last = ""
    asked = body.get("messages", body.get("input"))
    for message in reversed([{"role": "user", "content": asked}] if isinstance(asked, str) else asked or []):
        if message.get("role") == "user":
            last = text_of(message.get("content"))
            break
    tokens = tokenize("You said: " + last)
    if words is None:
        return tokens
    if words > len(tokens):
        tokens = tokens + [" " + tokens[i % len(tokens)].strip() for i in range(len(tokens), words)]
    return tokens[:words]
