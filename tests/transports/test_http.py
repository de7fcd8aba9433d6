"""The HTTP transport over real sockets: the port's sentences, requests, errors, and its end."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llm.core.exceptions import (
    LLMConfigurationError,
    LLMConnectionError,
    LLMException,
)
from llm.testing.clock import FakeClock
from llm.transports.base import Exchange, HTTPRequest, Transport
from llm.transports.response import HTTPResponse
from tests.transports.conformance import Play, TransportConformance
from tests.transports.server import CHUNKED, MOMENT, Peer, answering, ask, http, post, serve, talking, until


class TestHTTPTransport(TransportConformance):
    @asynccontextmanager
    async def playing(self, plays: Sequence[Play]) -> AsyncIterator[tuple[Transport, str]]:
        left = iter(plays)

        async def handler(peer: Peer) -> None:
            while True:
                await peer.request()
                play = next(left)
                if play.ending == "mute":
                    return await peer.gone()
                if play.ending == "refuse":
                    return peer.close()
                head = "".join(f"{name}: {value}\r\n" for name, value in play.headers.items())
                peer.send(f"HTTP/1.1 {play.status} X\r\n{head}transfer-encoding: chunked\r\n\r\n".encode())
                for piece in play.pieces:
                    peer.send(b"%x\r\n%s\r\n" % (len(piece), piece))
                    await asyncio.sleep(0)
                if play.ending == "cut":
                    return peer.close()
                if play.ending == "stall":
                    return await peer.gone()
                peer.send(b"0\r\n\r\n")

        async with serve(handler) as server:
            transport = http()
            yield transport, server.url
            await transport.close()


async def test_a_request_that_was_not_wholly_taken_is_not_called_written() -> None:
    async def deaf(peer: Peer) -> None:
        await asyncio.Event().wait()

    exchange = Exchange()
    async with talking(deaf) as (transport, server):
        task = asyncio.create_task(transport.send(post(server.url, bytes(32 << 20)), exchange))
        await until(lambda: exchange.connected)
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not exchange.written
        await until(lambda: transport.statistics()["open"] == 0)


async def test_an_early_refusal_of_a_long_request_is_still_an_answer() -> None:
    async def handler(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.answer(b"too large", status="413 X")
        await peer.gone()

    async with talking(handler) as (transport, server):
        response = await transport.send(post(server.url, bytes(8 << 20)), Exchange())
        assert (response.status, await response.read()) == (413, b"too large")


async def test_what_the_server_reads_is_what_was_asked_and_who_asks() -> None:
    heads: list[bytes] = []
    bodies: list[bytes] = []

    async def handler(peer: Peer) -> None:
        while True:
            head, body = await peer.request()
            heads.append(head)
            bodies.append(body)
            peer.answer()

    async with talking(handler) as (transport, server):
        await ask(transport, server.url)
        response = await transport.send(HTTPRequest("GET", server.url + "?page=2", {}), exchange := Exchange())
        await response.read()
    lines = heads[0].decode().lower().split("\r\n")
    assert lines[0] == "post /v1/messages http/1.1"
    assert f"host: 127.0.0.1:{server.port}" in lines
    assert "x-api-key: sk-planted" in lines
    assert "content-type: application/json" in lines
    assert "accept-encoding: gzip, deflate" in lines
    assert [line for line in lines if line.startswith("user-agent: brimful/")]
    assert bodies == [b'{"model": "m"}', b""]
    assert heads[1].startswith(b"GET /v1/messages?page=2 HTTP/1.1\r\n")
    assert b"content-length" not in heads[1].lower()
    assert exchange.written


async def test_a_proxy_that_cannot_be_read_is_a_mistake_of_the_configuration_and_keeps_its_password() -> None:
    transport = http(environ={"http_proxy": "http://user:planted@proxy.test:port"}, proxy="environment")
    with pytest.raises(LLMConfigurationError, match="proxy") as caught:
        await transport.send(post("http://vendor.test/"), Exchange())
    assert "planted" not in str(caught.value)
    assert caught.value.__cause__ is None
    await transport.close()


async def test_addresses_without_number_are_served_and_not_remembered_without_bound() -> None:
    async with talking() as (transport, server):
        for number in range(300):
            assert await ask(transport, f"{server.url}?page={number}") == b"ok"
        assert server.connections == 1
        assert len(transport._routes) <= 256


async def test_a_listener_that_raises_when_the_connection_is_there_costs_its_own_request_only() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    async with talking() as (transport, server):
        with pytest.raises(ZeroDivisionError):
            await transport.send(post(server.url), Exchange(broken))
        assert await ask(transport, server.url) == b"ok"
        assert transport.statistics()["in_flight"] == 0
        assert transport.statistics()["open"] == transport.statistics()["idle"] == 1


@pytest.mark.parametrize(
    "url", ["not a url", "http://", "ftp://vendor.test/", "http://[::1/", "/v1/messages", "http://h:x/"]
)
async def test_a_url_that_leads_nowhere_is_a_mistake_of_the_configuration(url: str) -> None:
    transport = http()
    with pytest.raises(LLMConfigurationError, match="base_url"):
        await transport.send(post(url), Exchange())
    await transport.close()


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified", "200 OK"])
async def test_an_answer_without_a_body_ends_at_once_and_keeps_its_connection(status: str) -> None:
    async def handler(peer: Peer) -> None:
        while True:
            await peer.request()
            length = b"content-length: 0\r\n" if status.startswith("200") else b""
            peer.send(f"HTTP/1.1 {status}\r\n".encode(), length, b"\r\n")

    async with talking(handler) as (transport, server):
        for _ in range(2):
            response = await transport.send(post(server.url), Exchange())
            assert await response.read_some() == b""
            assert await response.read() == b""
            response.close()
        assert server.connections == 1


async def test_a_failed_request_is_not_kept_by_its_error() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.close()

    async with talking(handler) as (transport, server):
        gc.collect()
        gc.disable()
        try:
            # Other tests' tables hold errors of their own.
            before = {id(thing) for thing in gc.get_objects() if isinstance(thing, Exchange | LLMConnectionError)}
            with pytest.raises(LLMConnectionError) as caught:
                await transport.send(post(server.url), Exchange())
            assert caught.value.__context__ is None
            del caught
            after = {id(thing) for thing in gc.get_objects() if isinstance(thing, Exchange | LLMConnectionError)}
            assert after <= before
        finally:
            gc.enable()


async def test_a_kept_connection_keeps_nothing_of_the_call_that_opened_it() -> None:
    async with talking() as (transport, server):
        await ask(transport, server.url)
        assert transport.statistics()["idle"] == 1
        gc.collect()
        assert [thing for thing in gc.get_objects() if isinstance(thing, Exchange | HTTPResponse)] == []


async def test_a_header_that_breaks_the_line_never_leaves() -> None:
    async with talking() as (transport, server):
        request = HTTPRequest("POST", server.url, {"x-api-key": "sk-planted\r\nx-evil: 1"}, b"{}")
        with pytest.raises(LLMConfigurationError) as caught:
            await transport.send(request, Exchange())
        assert "sk-planted" not in repr(caught.value)


async def test_an_error_names_the_host_and_neither_the_key_nor_the_query() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.reset()

    async with talking(handler) as (transport, server):
        url = f"http://user:sk-userinfo@127.0.0.1:{server.port}/v1?key=sk-query"
        with pytest.raises(LLMConnectionError, match=f"127.0.0.1:{server.port}") as caught:
            await transport.send(post(url), Exchange())
        error: BaseException | None = caught.value
        while error is not None:
            assert "sk-" not in f"{error} {error!r} {error.args}"
            error = error.__cause__ or error.__context__


async def test_nobody_listening_is_an_error_of_a_request_that_never_left() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        transport = http()
        with pytest.raises(LLMConnectionError, match=f"no connection to 127.0.0.1:{port}") as caught:
            await transport.send(post(f"http://127.0.0.1:{port}/"), Exchange())
        await transport.close()
    assert not caught.value.sent
    assert caught.value.retryable
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


async def test_a_name_that_does_not_resolve_is_named() -> None:
    transport = http()
    with pytest.raises(LLMConnectionError, match="nowhere.invalid") as caught:
        await transport.send(post("http://nowhere.invalid/"), Exchange())
    await transport.close()
    assert not caught.value.sent


async def test_closing_while_connecting_does_not_wait_for_the_timeout() -> None:
    async def silent(peer: Peer) -> None:
        await peer.gone()

    async with talking(silent, connect=None) as (transport, server):
        task = asyncio.create_task(transport.send(post(server.url.replace("http:", "https:")), Exchange()))
        await until(lambda: server.connections)
        async with asyncio.timeout(20 * MOMENT):
            await transport.close()
        with pytest.raises(LLMConnectionError, match="closed") as caught:
            await task
        assert not caught.value.sent


async def test_closing_under_load_ends_every_call_with_a_clear_error() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        if peer.number % 2:
            peer.send(CHUNKED, b"4\r\ngood\r\n")
        await peer.gone()

    async with talking(handler) as (transport, server):
        tasks = [asyncio.create_task(ask(transport, server.url)) for _ in range(20)]
        await until(lambda: server.connections == 20)
        await asyncio.sleep(MOMENT)
        await transport.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {LLMConnectionError}
        assert transport.statistics() == {"open": 0, "idle": 0, "opened": 20, "in_flight": 0}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors under /proc")
def test_after_close_no_socket_task_or_timer_is_left() -> None:
    clock = FakeClock()

    async def use() -> int:
        async with serve(answering) as server:
            transport = http(clock=clock)
            await asyncio.gather(*(ask(transport, server.url) for _ in range(10)))
            given_up = await transport.send(post(server.url), Exchange())
            given_up.close()
            await transport.close()
            sockets = sum(len(generation.connector.protocols) for generation in transport._generations())
            assert sockets == 0
            tasks = [
                task for task in asyncio.all_tasks() if "run" not in repr(task) and task is not asyncio.current_task()
            ]
            assert tasks == []
            return clock.timers

    before = descriptors()
    assert asyncio.run(use()) == 0
    assert descriptors() == before


def test_it_may_be_built_outside_a_loop_and_used_in_one_after_the_other() -> None:
    transport = http()

    async def use() -> bytes:
        async with serve(answering) as server:
            answer = await ask(transport, server.url)
            assert transport.statistics()["opened"] == 1
            await transport.close() if last else None
            return answer

    last = False
    assert asyncio.run(use()) == b"ok"
    last = True
    assert asyncio.run(use()) == b"ok"


async def test_another_loop_is_told_so_while_the_first_is_alive() -> None:
    async with talking() as (transport, server):
        await ask(transport, server.url)
        caught: list[BaseException] = []

        def elsewhere() -> None:
            try:
                asyncio.run(ask(transport, server.url))
            except LLMException as error:
                caught.append(error)

        await asyncio.to_thread(elsewhere)
        (error,) = caught
        assert isinstance(error, LLMConfigurationError)
        assert "another event loop" in str(error)
        assert await ask(transport, server.url) == b"ok", "the first loop is not disturbed"


async def test_a_response_can_be_closed_from_another_thread() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED)
        await peer.gone()

    async with talking(handler) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        await asyncio.to_thread(response.close)
        await server.peers[0].lost.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
# Whoever runs the tests in several processes has a thread in each of them that listens to the others.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_afresh_and_leaves_the_parents_connections_alone() -> None:
    transport = http()

    async def use(url: str) -> Exchange:
        exchange = Exchange()
        assert await ask(transport, url, exchange) == b"ok"
        return exchange

    async def use_and_close(url: str) -> bool | None:
        exchange = await use(url)
        await transport.close()
        return exchange.reused

    def child(url: str) -> None:
        code = 1
        try:
            code = 0 if asyncio.run(use_and_close(url)) is False else 2
        finally:
            os._exit(code)

    with asyncio.Runner() as runner:
        serving = serve(answering)
        server = runner.run(serving.__aenter__())
        runner.run(use(server.url))
        pid = os.fork()
        if not pid:
            child(server.url)
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            # The parent's loop is also the child's server.
            runner.run(asyncio.sleep(0.005))
        assert os.waitstatus_to_exitcode(ended[1]) == 0
        assert runner.run(use(server.url)).reused, "the parent's connection is still good"
        assert server.connections == 2
        runner.run(transport.close())
        runner.run(serving.__aexit__(None, None, None))


async def test_a_request_has_nothing_of_the_one_before_it() -> None:
    seen: list[tuple[dict[str, str], bytes]] = []

    async def handler(peer: Peer) -> None:
        while True:
            head, body = await peer.request()
            lines = head.decode().split("\r\n")[1:]
            seen.append((dict(line.split(": ", 1) for line in lines if line), body))
            peer.answer()

    async with talking(handler) as (transport, server):
        for number, more in enumerate([{"x-once": "1", "user-agent": "mine"}, {}, {"content-type": "text/plain"}]):
            body = b"x" * (number + 1)
            request = HTTPRequest("POST", server.url, {"x-api-key": f"sk-planted-{number}", **more}, body)
            await (await transport.send(request, Exchange())).read()
    names = [{name.lower(): value for name, value in headers.items()} for headers, _ in seen]
    assert [body for _, body in seen] == [b"x", b"xx", b"xxx"]
    assert [found["content-length"] for found in names] == ["1", "2", "3"]
    assert [found["x-api-key"] for found in names] == ["sk-planted-0", "sk-planted-1", "sk-planted-2"]
    assert [found.get("x-once") for found in names] == ["1", None, None]
    assert names[0]["user-agent"] == "mine"
    assert names[1]["user-agent"].startswith("brimful/")
    assert [found["content-type"] for found in names] == ["application/octet-stream"] * 2 + ["text/plain"]
    assert len({found["host"] for found in names}) == 1


async def test_a_body_that_is_to_wait_for_the_servers_word_waits() -> None:
    async def handler(peer: Peer) -> None:
        head = await peer.reader.readuntil(b"\r\n\r\n")
        assert b"100-continue" in head
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(peer.reader.read(1), MOMENT)
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await peer.reader.readexactly(5) == b"hello"
        peer.answer()

    async with talking(handler) as (transport, server):
        request = HTTPRequest("POST", server.url, {"expect": "100-continue"}, b"hello")
        assert await (await transport.send(request, Exchange())).read() == b"ok"
