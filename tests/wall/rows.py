"""The rows S01 to S30, and beside each its switch: what takes its protection away, so that the row must fall."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llm import LLMManager
from llm.core import endpoint
from llm.core.exceptions import (
    LLMAuthenticationError,
    LLMContentFilteredError,
    LLMContextLengthError,
    LLMException,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMProtocolError,
    LLMQuotaExhaustedError,
    LLMRateLimitError,
    LLMStreamInterruptedError,
    LLMTimeoutError,
)
from llm.core.pool import ProviderPool
from llm.core.types import LLMResponse
from llm.middleware.hedge import _Race
from llm.middleware.resume import _Parts
from llm.providers.anthropic import AnthropicProvider
from llm.providers.event_stream import EventStream
from llm.providers.openai_base import OpenAIBase
from llm.transports import http
from llm.transports.connections import Connector, Protocol
from llm.transports.response import HTTPResponse
from llm.utils.clock import SystemClock
from tests.wall import servers
from tests.wall.servers import (
    WORDS,
    Reply,
    Vendor,
    answers,
    cut,
    drips,
    ends,
    event,
    fails,
    keeps_silent,
    resets,
    says,
    streams,
)
from tests.wall.world import KEY, TIMEOUTS, Fallen, Took, World, answered, asked, check, failed, patched

Way = tuple[Callable[..., Coroutine[Any, Any, Any]], servers.Script]
"""How a call is made, and what F does first."""
Case = Callable[[World], Awaitable[None]]
FORTY = "".join(WORDS[:40])
OVERLOADED = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'


# -- switches ---------------------------------------------------------------------------------------------------


def without(layer: str, **settings: Any) -> Case:
    """A layer switched off, or set to *settings*."""

    async def switch(world: World) -> None:
        world.middleware[layer] = {**world.middleware.get(layer, {}), **(settings or {"enabled": False})}

    return switch


def untimed(*names: str) -> Case:
    """Without these timeouts."""

    async def switch(world: World) -> None:
        world.timeouts.update(dict.fromkeys(names))

    return switch


async def no_fallback(world: World) -> None:
    world.options["fallback"] = ()


async def ends_are_believed(world: World) -> None:
    """Whatever ends a stream ends it well."""

    async def read_some(self: HTTPResponse) -> bytes:
        try:
            return await original(self)
        except LLMException:
            return b""

    def end_early(self: EventStream, pending: bytes, chunks: list[Any]) -> None:
        self.done = True

    original = HTTPResponse.read_some
    patched(HTTPResponse, "read_some", read_some)
    patched(EventStream, "_end_early", end_early)


def broken(owner: Any, name: str, value: Callable[..., Any]) -> Case:
    """A function of ours that does something else."""

    async def switch(world: World) -> None:
        patched(owner, name, value)

    return switch


# -- the rows --------------------------------------------------------------------------------------------------------


async def s01(w: World) -> None:
    p, f = w.vendor(fails(429, retry_after="1"), answers), w.fallback()
    async with w.manager(p, f) as (_, client):
        answered(await w.ask(client), "P")
    asked(p, 2)
    asked(f, 0)
    check(p.journal[1].at - p.journal[0].at >= 0.99, "it came back before Retry-After")


async def for_ever(w: World, status: int) -> None:
    p, f = w.vendor(fails(status)), w.fallback()
    async with w.manager(p, f) as (_, client):
        response = answered(await w.ask(client), "F")
        check([failure.status for failure in response.failures] == [status], "the answer does not say why")
    asked(p, 3, at_most=True)
    asked(f, 1)


async def once(w: World, script: servers.Script) -> None:
    p, f = w.vendor(script, answers), w.fallback()
    async with w.manager(p, f) as (_, client):
        answered(await w.ask(client), "P")
    asked(p, 2)
    asked(f, 0)


async def s06(w: World) -> None:
    p, f = w.vendor(keeps_silent), w.fallback()
    with Took() as took:
        async with w.manager(p, f) as (_, client):
            response = answered(await w.ask(client), "F")
            check(response.failures[0].error == "LLMTimeoutError", response.failures[0].error)
    check(took.seconds < 3.5, f"it took {took.seconds:.1f} s")
    for seen in p.journal:
        check(seen.gone_at is not None and seen.gone_at - seen.at < 1.5, "P's socket was not closed")


async def s07(w: World) -> None:
    async def late(reply: Reply) -> None:
        await reply.head(200, servers.SSE)
        # Events come, and no content.
        for _ in range(100):
            await reply.chunk(b'data: {"id":"c","model":"m","choices":[]}\n\n')
            await asyncio.sleep(0.2)

    p, f = w.vendor(late), w.fallback()
    async with w.manager(p, f) as (_, client):
        _, outcome = await w.read(client)
        answered(outcome, "F")


async def s08(w: World) -> None:
    p = w.vendor(streams(40, cut), streams(40, cut), answers)
    async with w.manager(p, w.fallback()) as (_, client):
        seen, outcome = await w.read(client)
        check(seen == WORDS[:40], f"{len(seen)} pieces")
        check(failed(outcome, LLMStreamInterruptedError).partial == FORTY, "not the partial text")
        seen, outcome = await w.read(client, on_interrupt="restart")
        check(seen == [*WORDS[:40], "↺", "P: ", *WORDS], f"{len(seen)} pieces")
        check(answered(outcome, "P").resumed == "restart", "the answer does not say so")
    asked(p, 3)


async def s09(w: World) -> None:
    p = w.vendor(streams(40, keeps_silent))
    async with w.manager(p, w.fallback()) as (_, client):
        with Took() as took:
            seen, outcome = await w.read(client)
        error = failed(outcome, LLMStreamInterruptedError)
        check((seen, error.partial) == (WORDS[:40], FORTY), "not the forty")
        # Ten per cent, and what a busy machine may take to notice.
        check(took.seconds < 0.55 + 0.4, f"it took {took.seconds:.2f} s")


async def s10(w: World) -> None:
    p = w.vendor(streams(0, event(b"{nonsense")), answers, streams(40, event(b"{nonsense")))
    async with w.manager(p, w.fallback()) as (_, client):
        _, outcome = await w.read(client)
        answered(outcome, "P")
        asked(p, 2)
        seen, outcome = await w.read(client)
        error = failed(outcome, LLMProtocolError)
        check((seen, error.partial) == (WORDS[:40], FORTY), "not the forty")
    asked(p, 3)


async def s11(w: World) -> None:
    p = w.vendor(streams(60, ends))
    async with w.manager(p, w.fallback()) as (_, client):
        seen, outcome = await w.read(client)
        check(seen == WORDS, f"{len(seen)} pieces")
        check(failed(outcome, LLMStreamInterruptedError).partial == "".join(WORDS), "not the partial text")


async def its_own_error(w: World, code: str, kind: type[LLMException]) -> None:
    w.middleware["circuit_breaker"] = {"consecutive": 1}
    p, f = w.vendor(fails(400, "the request is at fault", code)), w.fallback()
    async with w.manager(p, f) as (manager, client):
        failed(await w.ask(client), kind)
        check(manager.get_status()["providers"]["p"]["circuit"]["state"] == "closed", "the breaker was touched")
    asked(p, 1)
    asked(f, 0)


async def s14(w: World) -> None:
    w.provider["capabilities"] = {"*": {"prefill": True}}
    w.unsent = 0 if w.off else 1
    p, f = w.vendor(streams(40, cut), fails(503)), w.fallback()
    async with w.manager(p, f) as (_, client):
        seen, outcome = await w.read(client, on_interrupt="continue")
        check(seen == WORDS[:40], f"{len(seen)} pieces")
        check(failed(outcome, LLMStreamInterruptedError).partial == FORTY, "not the partial text")
    check(p.journal[1].body["messages"][-1] == {"role": "assistant", "content": FORTY.rstrip()}, "P was not continued")
    asked(f, 0)


async def s15(w: World) -> None:
    w.middleware["circuit_breaker"] = {
        "open_seconds": 0.3,
        "max_open_seconds": 0.6,
        "ramp_seconds": 0.3,
        **w.middleware.get("circuit_breaker", {}),
    }
    began = time.monotonic()
    recovered = 1.8
    dead: dict[str, int] = {}
    alive: list[float] = []

    async def flapping(reply: Reply) -> None:
        now = time.monotonic() - began
        if now < 0.7 or 1.0 <= now < recovered:
            name = reply.seen.body["messages"][0]["content"]
            dead[name] = dead.get(name, 0) + 1
            await fails(503)(reply)
        else:
            alive.append(now)
            await answers(reply)

    p, f = w.vendor(flapping), w.fallback()
    async with w.manager(p, f) as (_, client):

        async def call(number: int) -> object:
            await asyncio.sleep(0.15 * number)
            return await client.complete(f"call {number}", **w.options)

        outcomes = await asyncio.gather(*(call(number) for number in range(20)), return_exceptions=True)
    check(all(isinstance(outcome, LLMResponse) for outcome in outcomes), f"not answered: {outcomes}")
    few = sum(dead.get(f"call {number}", 0) <= 1 for number in range(20))
    check(few >= 15, f"only {few} calls made at most one attempt at a dead P: {dead}")
    back = [at - recovered for at in alive if at >= recovered]
    check(back and back[0] < 1.0, f"P did not serve again soon: {back[:1]}")


async def message_start(reply: Reply) -> None:
    usage = {"input_tokens": 7, "output_tokens": 1}
    start = {
        "type": "message_start",
        "message": {"id": "m", "model": "m", "role": "assistant", "content": [], "usage": usage},
    }
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    await reply.head(200, servers.SSE)
    reply.tell((7, 1))
    await messages_event(reply, start)
    await messages_event(reply, block)


async def messages_event(reply: Reply, data: dict[str, Any]) -> None:
    await reply.chunk(f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode())


def messages(count: int, then: servers.Script) -> servers.Script:
    """A stream of the Messages API, which tells the prompt's tokens at once."""

    async def script(reply: Reply) -> None:
        await message_start(reply)
        for word in WORDS[:count]:
            delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
            await messages_event(reply, delta)
        await then(reply)

    return script


async def s16(w: World) -> None:
    w.provider["dialect"] = "anthropic"
    p, f = w.vendor(messages(40, cut), fails(503)), w.fallback()
    async with w.manager(p, f) as (_, client):
        _, outcome = await w.read(client, on_interrupt="restart")
        response = answered(outcome, "F")
    asked(p, 3)
    asked(f, 1)
    usage = response.usage
    both = (p.told[0] + f.told[0], p.told[1] + f.told[1])
    check((usage.input_tokens, usage.output_tokens) == both, f"{usage}, the journals say {both}")


async def s17(w: World) -> None:
    async def overloaded(reply: Reply) -> None:
        await messages_event(reply, json.loads(OVERLOADED))
        await reply.end()

    async def well(reply: Reply) -> None:
        await messages_event(reply, {"type": "content_block_stop", "index": 0})
        reply.tell((0, 59))
        usage = {"output_tokens": 60}
        await messages_event(reply, {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage})
        await messages_event(reply, {"type": "message_stop"})
        await reply.end()

    w.provider["dialect"] = "anthropic"
    p = w.vendor(messages(0, overloaded), messages(60, well), messages(40, overloaded))
    async with w.manager(p, w.fallback()) as (_, client):
        seen, outcome = await w.read(client)
        check(seen == WORDS and isinstance(outcome, LLMResponse), f"before content it was not retried: {outcome}")
        asked(p, 2)
        seen, outcome = await w.read(client)
        error = failed(outcome, LLMOverloadedError)
        check((seen, error.partial) == (WORDS[:40], FORTY), "not the forty")


async def s18(w: World) -> None:
    spent = fails(429, "You exceeded your current quota", "insufficient_quota")

    async def first_key(reply: Reply) -> None:
        await (spent if reply.seen.key == f"{KEY}1" else answers)(reply)

    p = w.vendor(first_key)
    async with w.manager(p, None, 2) as (manager, client):
        for _ in range(4):
            answered(await w.ask(client), "P")
        key = manager.health()["providers"]["p"]["keys"]["p/1"]
        check(key["state"] == "parked" and "LLMQuotaExhaustedError" in key["reason"], f"the key is {key}")
    check([seen.key for seen in p.journal].count(f"{KEY}1") == 1, "the spent key was asked again")
    p, f = w.vendor(spent), w.fallback()
    async with w.manager(p, f) as (_, client):
        answered(await w.ask(client), "F")
        answered(await w.ask(client), "F")
    asked(p, 1)
    p = w.vendor(spent)
    async with w.manager(p, None) as (_, client):
        failed(await w.ask(client), LLMQuotaExhaustedError)
        failed(await w.ask(client), LLMQuotaExhaustedError)
    asked(p, 1)


async def s19(w: World) -> None:
    async def and_closes(reply: Reply) -> None:
        await answers(reply)
        asyncio.get_running_loop().call_later(0.05, reply.writer.close)

    p = w.vendor(and_closes, answers)
    async with w.manager(p, w.fallback()) as (_, client):
        answered(await w.ask(client), "P")
        # The loop is blocked while the server closes: nobody tells it.
        time.sleep(0.2)  # noqa: ASYNC251  # that is the fault
        answered(await w.ask(client), "P")
    asked(p, 2)


async def s20(w: World) -> None:
    w.timeouts["connect"] = 2.0
    p = w.vendor(answers)
    dead, clients = [], []
    for last in (2, 3):
        full = socket.socket()
        full.bind((f"127.0.0.{last}", p.port))
        full.listen(0)
        dead.append(full)
        for _ in range(3):
            # Who comes when its queue is full is not answered.
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(full.getsockname())
            clients.append(one)
    hosts = ["127.0.0.2", "127.0.0.1", "127.0.0.3"]

    async def addresses(self: object, host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, p.port)) for each in hosts]

    patched(asyncio.BaseEventLoop, "getaddrinfo", addresses)
    w.unsent = 0
    p_url = p.url
    Vendor.url = property(lambda self: p_url.replace("127.0.0.1", "wall.test"))  # type: ignore[assignment,method-assign]
    with Took() as took:
        async with w.manager(p, None) as (_, client):
            answered(await w.ask(client), "P")
    # One stagger is a quarter of a second.
    check(took.seconds < 0.25 + 0.5, f"it took {took.seconds:.2f} s")
    asked(p, 1)
    for each in (*dead, *clients):
        each.close()


async def s21(w: World) -> None:
    # It reads the client's hello, and waits for the rest of a request.
    p, f = w.vendor(answers), w.fallback()
    url = p.url.replace("http:", "https:")
    async with w.manager(url, f) as (manager, client):
        response = answered(await w.ask(client), "F")
        check(
            "connect" in response.failures[0].message or "TLS" in response.failures[0].message,
            response.failures[0].message,
        )
        w.unsent = manager.get_status()["metrics"]["attempts"] - 1
        check(w.unsent <= 3, f"{w.unsent} attempts")


async def s22(w: World) -> None:
    w.timeouts["attempt"] = None if w.off else 1.0
    w.options["fallback"] = ()

    async def byte_by_byte(reply: Reply) -> None:
        reply.keep = False
        await reply.head(200, length=1000)
        while True:
            await reply.raw(b" ")
            await asyncio.sleep(0.1)

    p = w.vendor(streams(0, drips))
    async with w.manager(p, None) as (_, client):
        _, outcome = await w.read(client)
        failed(outcome, LLMTimeoutError)
    p = w.vendor(byte_by_byte)
    async with w.manager(p, None) as (_, client):
        failed(await w.ask(client, timeout=5), LLMTimeoutError)


async def s23(w: World) -> None:
    echo = f"we know your key {KEY}1"
    big = json.dumps({"error": {"message": echo + "x" * 10_000_000, "type": "server_error"}}).encode()
    bodies: list[tuple[int, bytes, str, type[LLMException]]] = [
        (503, f"<html><title>Bad {echo}</title></html>".encode(), "text/html", LLMOverloadedError),
        (400, b"", "application/json", LLMInvalidRequestError),
        (401, json.dumps([{"error": {"message": echo}}]).encode(), "application/json", LLMAuthenticationError),
        (500, big, "application/json", LLMOverloadedError),
    ]
    for status, body, kind, expected in bodies:
        p = w.vendor(says(status, body, kind))
        async with w.manager(p, None) as (_, client):
            error = failed(await w.ask(client, timeout=10), expected)
            check(error.status == status, f"status {error.status}")
            check(len(error.message) <= 2048 and len(error.body) <= 65536, "too much of it is kept")
            check(KEY not in f"{error}{error!r}{error.message}" and KEY.encode() not in error.body, "the key is shown")


async def s24(w: World) -> None:
    day = fails(429, retry_after="86400")
    # A deadline would end the wait for another reason.
    w.options.pop("timeout")

    async def first_key(reply: Reply) -> None:
        await (day if reply.seen.key == f"{KEY}1" else answers)(reply)

    with Took() as took:
        async with w.manager(w.vendor(first_key), None, 2) as (_, client):
            answered(await w.ask(client), "P")
        async with w.manager(w.vendor(day), w.fallback()) as (_, client):
            answered(await asyncio.wait_for(w.ask(client), 3), "F")
        async with w.manager(w.vendor(day), None) as (_, client):
            error = failed(await asyncio.wait_for(w.ask(client), 3), LLMRateLimitError)
            check(error.retry_after is not None and error.retry_after > 80_000, f"retry_after {error.retry_after}")
    check(took.seconds < 3.0, f"it took {took.seconds:.1f} s")
    for word in ("-5", "Fri, 01 Jan 2021 00:00:00 GMT", "soon"):
        p = w.vendor(fails(503, retry_after=word), answers)
        with Took() as took:
            async with w.manager(p, w.fallback()) as (_, client):
                answered(await w.ask(client), "P")
        check(took.seconds < 1.5, f"{word}: it took {took.seconds:.1f} s")


async def s25(w: World) -> None:
    """A call with two keys, of which the first is silent, so that a second leg begins, fails, and the chain goes on."""
    limits = {"requests_per_minute": 1_000_000, "input_tokens_per_minute": 10**9, "output_tokens_per_minute": 10**9}
    w.provider |= {"rate_limits": limits, "timeouts": {**TIMEOUTS, "first_byte": 0.06}}
    w.target["rate_limits"] = limits
    w.middleware["hedge"] = {"enabled": True, "after": 0.03, "max_share": 1}
    w.middleware["circuit_breaker"] = {"enabled": False}
    w.middleware["rate_limiter"] = {"slow_start": False}
    w.middleware["retry"] |= {"base_delay": 0.0, "budget_most": 1_000_000}

    async def slow(reply: Reply) -> None:
        if reply.seen.key == f"{KEY}1":
            await reply.silence()
        else:
            await asyncio.sleep(0.02)
            await fails(503)(reply)

    ways: list[Way] = [
        (w.ask, answers),
        (w.read, answers),
        (partial(w.read, on_interrupt="restart"), streams(40, cut)),
    ]
    points = sum([await _given_up_everywhere(w, slow, way) for way in ways])
    check(points >= 30, f"only {points} points were found")


async def _given_up_everywhere(w: World, slow: servers.Script, way: Way) -> int:
    """Cancel one call at each point at which a task of it waits; returns how many there were."""
    for at in range(1, 400):
        ask, first = way
        p, f = w.vendor(slow), w.fallback(first, answers)
        steps = _Steps(at)
        asyncio.get_running_loop().set_task_factory(steps.factory)
        # The books of attempts and usage are not those of a call that was given up: what was sent is compared below.
        config = w.config(p, f, 2)
        built = await asyncio.to_thread(LLMManager.from_config, config, environ={})
        async with built:
            steps.main = asyncio.ensure_future(ask(built.get_client()))
            try:
                await steps.main
            except asyncio.CancelledError:
                pass
            struck = steps.struck
            asyncio.get_running_loop().set_task_factory(None)
            await asyncio.sleep(0)
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            check(not left, f"cancelled at {at}, tasks are left: {left}")
            status = built.get_status()
            for name, vendor in (("p", p), ("f", f)):
                line = status["providers"][name]
                check(line["clients"]["in_use"] == 0, f"cancelled at {at}: a client of {name} is taken")
                check(line["connections"]["in_flight"] == 0, f"cancelled at {at}: {name} has a request in flight")
                quotas = [group for pool in status["limits"][name]["quotas"].values() for group in pool.values()]
                check(
                    not any(quota["under_way"] for quota in quotas), f"cancelled at {at}: a permit of {name} is taken"
                )
                used = sum(quota["requests"]["used"] for quota in quotas)
                # What had a connection is paid. Closing may overtake the server's reading of one request a leg.
                check(len(vendor.journal) <= used <= len(vendor.journal) + 2, f"cancelled at {at}: {name} used {used}")
        for _ in range(100):
            if not (p.open or f.open):
                break
            await asyncio.sleep(0.01)
        check(not p.open and not f.open, f"cancelled at {at}: a socket is left")
        if not struck:
            return at - 1
    raise Fallen("it waits more often than can be")


class _Steps:
    """Counts every wait of every task, and cancels *main* at number *at*."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.waits = 0
        self.struck = False
        self.main: asyncio.Future[Any] | None = None

    def factory(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **more: Any) -> asyncio.Task[Any]:
        return asyncio.Task(self._stepping(coroutine), loop=loop, **more)

    async def _stepping(self, coroutine: Any) -> Any:
        return await _Step(self, coroutine)

    def wait(self) -> None:
        self.waits += 1
        if self.waits == self.at and self.main is not None:
            self.struck = True
            asyncio.get_running_loop().call_soon(self.main.cancel)


class _Step:
    def __init__(self, steps: _Steps, coroutine: Any) -> None:
        self._steps, self._coroutine = steps, coroutine

    def __await__(self) -> Any:
        error: BaseException | None = None
        while True:
            try:
                future = self._coroutine.send(None) if error is None else self._coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            error = None
            self._steps.wait()
            try:
                yield future
            except BaseException as thrown:
                error = thrown


async def s26(w: World) -> None:
    body = json.dumps(
        {"error": {"message": "You exceeded your quota", "type": "e", "code": "insufficient_quota"}}
    ).encode()
    p = w.vendor(says(200, body))
    async with w.manager(p, None) as (_, client):
        failed(await w.ask(client), LLMQuotaExhaustedError)


def low_water() -> float:
    """Megabytes of memory now, from which :func:`high_water` counts anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return high_water()


def high_water() -> float:
    """Megabytes of memory at the most, since the last :func:`low_water`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


async def bounded(w: World, p: Vendor, megabytes: float) -> None:
    w.options["timeout"] = 20
    w.options["fallback"] = ()
    async with w.manager(p, None) as (_, client):
        # The first call pays for what is imported and made once.
        answered(await w.ask(client), "P")
        before = low_water()
        failed(await w.ask(client), LLMProtocolError)
        grown = high_water() - before
    check(grown <= megabytes, f"memory grew by {grown:.1f} MB, {megabytes} are allowed")


async def s27(w: World) -> None:
    w.provider["transport"] = {"max_response_bytes": 10**9 if w.off else 1_000_000}
    bomb = gzip.compress(b" " * 100_000_000)
    await bounded(w, w.vendor(answers, says(200, bomb, content_encoding="gzip")), 1 + 8)


async def s28(w: World) -> None:
    async def large(reply: Reply) -> None:
        await reply.whole(200, servers.completion("x"), x_large="x" * 1_000_000)

    w.provider["transport"] = {"max_response_bytes": 1_000_000}
    await bounded(w, w.vendor(answers, large), 1 + 8)


async def s29(w: World) -> None:
    w.provider["rate_limits"] = {"requests_per_minute": 2}
    w.middleware["rate_limiter"] = {"slow_start": False}
    w.options["timeout"] = 100
    refused: list[float] = []

    async def revoked(reply: Reply) -> None:
        await asyncio.sleep(0.3)
        refused.append(time.monotonic())
        await fails(401)(reply)

    p, f = w.vendor(revoked), w.fallback()
    async with w.manager(p, f, 3) as (_, client):
        calls = [asyncio.ensure_future(w.ask(client)) for _ in range(106)]
        done, waiting = await asyncio.wait(calls, timeout=6)
        over = time.monotonic()
        for call in waiting:
            call.cancel()
        await asyncio.wait(calls)
        check(not waiting, f"{len(waiting)} calls still wait")
        for call in done:
            if not isinstance(call.result(), LLMAuthenticationError):
                answered(call.result(), "F")
        check(over - refused[0] < 1.0, f"it took {over - refused[0]:.1f} s")
    asked(p, 3 + 6, at_most=True)


class Jumping(SystemClock):
    """A clock whose wall time jumps."""

    def __init__(self) -> None:
        self.jumped = 0.0

    def wall(self) -> float:
        return time.time() + self.jumped


async def s30(w: World) -> None:
    w.provider["rate_limits"] = {"requests_per_minute": 1, "window_seconds": 0.8}
    w.middleware["rate_limiter"] = {"slow_start": False, "guard_seconds": 0.05}
    clock = Jumping()
    if w.off:
        patched(Jumping, "now", lambda self: time.monotonic() + self.jumped)
    p = w.vendor(answers, answers, fails(429, retry_after="1"), answers)
    async with w.manager(p, None, clock=clock) as (_, client):
        answered(await w.ask(client), "P")
        for jump in (3600.0, -3600.0):
            call = asyncio.ensure_future(w.ask(client, timeout=20))
            await asyncio.sleep(0.1)
            clock.jumped += jump
            answered(await asyncio.wait_for(call, 10), "P")
    gaps = [later.at - earlier.at for earlier, later in zip(p.journal, p.journal[1:], strict=False)]
    check(all(0.8 <= gap <= 1.6 for gap in gaps), f"seconds between the requests: {gaps}")


class Row(NamedTuple):
    """A fault, what must be, and the switch that takes its protection away."""

    fault: str
    must: str
    case: Case
    switch: Case
    off: str


def generic(self: OpenAIBase, request: Any, status: int, headers: Any, body: bytes) -> LLMException:
    return LLMProtocolError("something", status=status)


def unprotected(*_: Any, **__: Any) -> None: ...


async def nothing(*_: Any, **__: Any) -> None: ...


async def wide_headers(world: World) -> None:
    http._MAX_FIELD = 4_000_000


async def refused_prefill(world: World) -> None:
    world.target["capabilities"] = {"*": {"prefill": True}}


async def one_at_a_time(world: World) -> None:
    original = Connector.__init__

    def init(self: Connector, **more: Any) -> None:
        original(self, **more)
        self._happy_eyeballs_delay = None

    patched(Connector, "__init__", init)


async def as_is(world: World) -> None:
    """The case itself looks at ``off``."""


async def dumb_messages(world: World) -> None:
    patched(AnthropicProvider, "classify", generic)


ROWS: dict[str, Row] = {
    "S01": Row(
        "429 + Retry-After, one key",
        "answer from P, the second request not before",
        s01,
        without("retry"),
        "retry: off",
    ),
    "S02": Row("429 for ever", "answer from F, ≤ 3 at P", partial(for_ever, status=429), no_fallback, "no chain"),
    "S03": Row("500 once", "answer from P, 2 at P", partial(once, script=fails(500)), without("retry"), "retry: off"),
    "S04": Row("503 for ever", "answer from F, ≤ 3 at P", partial(for_ever, status=503), no_fallback, "no chain"),
    "S05": Row("TCP reset once", "answer from P, 2 at P", partial(once, script=resets), without("retry"), "retry: off"),
    "S06": Row(
        "no response",
        "first-byte timeout, answer from F in time; P's socket closed",
        s06,
        untimed("first_byte"),
        "timeouts.first_byte: null",
    ),
    "S07": Row(
        "first token too late",
        "first-token timeout, answer from F",
        s07,
        untimed("first_token"),
        "timeouts.first_token: null",
    ),
    "S08": Row(
        "cut at 40 of 60 tokens",
        "the 40, then LLMStreamInterruptedError; restart: all 60",
        s08,
        ends_are_believed,
        "ends of bodies are believed",
    ),
    "S09": Row(
        "stall in the stream", "ended within idle + 10 %, typed as S08", s09, untimed("idle"), "timeouts.idle: null"
    ),
    "S10": Row(
        "malformed chunk",
        "retried before content, LLMProtocolError after",
        s10,
        broken(EventStream, "_fail", unprotected),
        "malformed events are passed over",
    ),
    "S11": Row("no terminal event", "LLMStreamInterruptedError", s11, ends_are_believed, "ends of bodies are believed"),
    "S12": Row(
        "context length",
        "its own error, 1 request",
        partial(its_own_error, code="context_length_exceeded", kind=LLMContextLengthError),
        without("fallback", moves_on=["context_length"]),
        "fallback.moves_on: [context_length]",
    ),
    "S13": Row(
        "content filter",
        "its own error, 1 request",
        partial(its_own_error, code="content_filter", kind=LLMContentFilteredError),
        without("fallback", moves_on=["content_filter"]),
        "fallback.moves_on: [content_filter]",
    ),
    "S14": Row(
        "cut, and F refuses a prefill",
        "no prefill at F; LLMStreamInterruptedError",
        s14,
        refused_prefill,
        "F's capabilities: prefill: true",
    ),
    "S15": Row(
        "P flaps under 20 calls",
        "20 answered, ≥ 15 with at most one attempt at a dead P",
        s15,
        without("circuit_breaker"),
        "circuit_breaker: off",
    ),
    "S16": Row(
        "accounting over a failover",
        "usage and attempts are the sum of both journals",
        s16,
        broken(_Parts, "follow", lambda self, part: setattr(self, "current", part)),
        "the parts before are not counted",
    ),
    "S17": Row(
        "529 in the stream under 200",
        "retried before content, LLMOverloadedError after",
        s17,
        dumb_messages,
        "every error is a protocol error",
    ),
    "S18": Row(
        "spend-limit 429",
        "one request with that key, parked; another key or F",
        s18,
        broken(ProviderPool, "_park", unprotected),
        "keys are not parked",
    ),
    "S19": Row(
        "keep-alive closed between requests",
        "answer; the POST was read once",
        s19,
        broken(Protocol, "is_stale", lambda self: False),
        "idle connections are not looked at",
    ),
    "S20": Row(
        "half the addresses dead",
        "answer; one connect stagger each",
        s20,
        one_at_a_time,
        "addresses one after the other",
    ),
    "S21": Row("TLS handshake stalls", "connect timeout, then F", s21, untimed("connect"), "timeouts.connect: null"),
    "S22": Row(
        "one byte at a time",
        "LLMTimeoutError",
        s22,
        untimed("idle", "first_token"),
        "timeouts.idle, first_token, attempt: null",
    ),
    "S23": Row(
        "HTML, empty, array, 10 MB error",
        "class by status; bounded, no secret",
        s23,
        broken(endpoint, "redact", unprotected),
        "errors are not redacted",
    ),
    "S24": Row(
        "Retry-After of a day, negative, past, garbage",
        "elsewhere at once; own backoff",
        s24,
        without("retry", max_retry_after=None, base_delay=0.05),
        "retry.max_retry_after: null",
    ),
    "S25": Row(
        "cancelled at every await, with fallback and hedge",
        "the refund table holds",
        s25,
        broken(_Race, "end", nothing),
        "losers are not ended",
    ),
    "S26": Row(
        "200 with an error object",
        "class by the body",
        s26,
        broken(OpenAIBase, "classify", generic),
        "every error is a protocol error",
    ),
    "S27": Row("gzip bomb", "LLMProtocolError, memory bounded", s27, as_is, "transport.max_response_bytes: 1 GB"),
    "S28": Row("1 MB of headers", "LLMProtocolError, memory bounded", s28, wide_headers, "4 MB of headers are read"),
    "S29": Row(
        "all keys revoked while 100 calls wait",
        "all fail or move in < 1 s",
        s29,
        broken(ProviderPool, "_park", unprotected),
        "keys are not parked",
    ),
    "S30": Row("wall clock jumps ± 1 h", "no wait changes", s30, as_is, "the clock follows the wall's"),
}


async def run(name: str, street: servers.Street, *, off: bool) -> None:
    """One row.

    Raises:
        Fallen: it does not hold.
    """
    row = ROWS[name]
    world = World(street, off=off)
    if off:
        await row.switch(world)
    try:
        async with asyncio.timeout(40):
            await row.case(world)
    except TimeoutError:
        raise Fallen("it takes for ever") from None
