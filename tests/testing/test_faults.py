"""Every fault of the table, as it reaches a client; and for whom, how often and in what order they strike."""

from __future__ import annotations

import asyncio
import email.utils
import random
import ssl
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
import msgspec
import pytest

from llm.testing.faults import BODIES, FAULTS, MEGABYTE, FaultPlan, Strike, gzip_bomb
from llm.testing.journal import Arrival, peak, usage_events
from llm.testing.simulator import Simulator, SimulatorSettings
from llm.testing.wire_anthropic import AnthropicWire
from llm.testing.wire_openai import OpenAIWire
from tests.testing.client import DIALECTS, ECHO, QUESTION, Client, Reply, deltas, read_partly, text

PATHS = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions"}


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session)


async def one(client: Client, kind: str, dialect: str = "anthropic", *, stream: bool = False, **order: Any) -> Reply:
    """The answer of a fresh simulator to a request that meets *kind*."""
    async with Simulator() as simulator:
        simulator.fail(kind, **order)
        return await client.ask(simulator, dialect, stream=stream)


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_entry_of_the_table_names_what_there_is() -> None:
    for name, fault in FAULTS.items():
        assert fault.body in BODIES, name
        for dialect in (AnthropicWire(), OpenAIWire()):
            assert fault.problem is None or fault.problem in dialect.problems, name
        if fault.act == "answer":
            assert fault.status is not None, name
            assert (fault.problem is None) == (fault.body in ("page", "empty", "oversized_page", "bomb")), name


# -- retry-after ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_the_wait_of_a_429_is_the_one_that_was_ordered(client: Client, dialect: str) -> None:
    reply = await one(client, "429", dialect, seconds=7)
    assert reply.headers["retry-after"] == "7"
    assert reply.headers.get("retry-after-ms") == ("7000.000" if dialect == "openai" else None)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("kind", "written"),
    [("retry_after_day", "86400"), ("retry_after_negative", "-30"), ("retry_after_garbage", "soon; maybe")],
)
async def test_a_wait_can_be_told_that_nobody_should_obey(
    client: Client, dialect: str, kind: str, written: str
) -> None:
    reply = await one(client, kind, dialect)
    assert (reply.status, reply.headers["retry-after"]) == (429, written)
    assert "retry-after-ms" not in reply.headers


async def test_a_wait_can_be_a_date_that_is_past(client: Client) -> None:
    reply = await one(client, "retry_after_past")
    assert email.utils.parsedate_to_datetime(reply.headers["retry-after"]) < datetime.now(UTC)


# -- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_proxy_answers_with_a_page_and_none_of_the_vendors_headers(
    client: Client, dialect: str, stream: bool
) -> None:
    for kind, status in (("html", 503), ("html_under_200", 200), ("502", 502)):
        reply = await one(client, kind, dialect, stream=stream)
        assert reply.status == status
        assert reply.body.startswith(b"<html><head><title>%d" % status)
        assert reply.headers["content-type"].startswith("text/html")
        assert not {"request-id", "x-request-id"} & set(reply.headers)


@pytest.mark.parametrize(("kind", "status"), [("empty", 500), ("empty_under_200", 200)])
async def test_a_body_can_be_empty(client: Client, kind: str, status: int) -> None:
    reply = await one(client, kind)
    assert (reply.status, reply.body) == (status, b"")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_error_can_come_in_an_array(client: Client, dialect: str) -> None:
    reply = await one(client, "array", dialect)
    (only,) = reply.json()
    assert reply.status == 500
    assert only["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_error_can_come_under_200(client: Client, dialect: str, stream: bool) -> None:
    reply = await one(client, "error_under_200", dialect, stream=stream)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.json()["error"]["type"] in ("overloaded_error", "service_unavailable_error")


@pytest.mark.parametrize(("kind", "end"), [("oversized", b'"}'), ("oversized_html", b"-->")])
async def test_an_error_can_be_as_large_as_wanted(client: Client, kind: str, end: bytes) -> None:
    reply = await one(client, kind, size=3 * MEGABYTE + 17)
    assert 3 * MEGABYTE < len(reply.body) < 3 * MEGABYTE + 1000
    assert reply.body.endswith(end)
    assert Strike(name=kind).size == SimulatorSettings().fault_bytes == 10 * MEGABYTE


@pytest.mark.parametrize("size", [0, 1, MEGABYTE, 5 * MEGABYTE + 3])
def test_a_bomb_is_small_and_unpacks_to_its_size(size: int) -> None:
    packed = b"".join(gzip_bomb(size))
    assert len(packed) <= 64 + 2000 * (1 + size // MEGABYTE)
    assert zlib.decompress(packed, wbits=zlib.MAX_WBITS | 16) == b" " * size


async def test_a_bomb_reaches_a_client_that_unpacks_it(client: Client) -> None:
    reply = await one(client, "gzip_bomb", size=4 * MEGABYTE)
    assert reply.headers["content-encoding"] == "gzip"
    assert reply.body == b" " * 4 * MEGABYTE


async def test_a_client_may_leave_in_the_midst_of_a_bomb(client: Client) -> None:
    async with Simulator() as simulator:
        simulator.fail("gzip_bomb", size=200 * MEGABYTE)
        headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
        body = {"model": "m", "max_tokens": 100, "messages": QUESTION}
        async with client.session.post(simulator.url + "/v1/messages", headers=headers, json=body) as response:
            assert await response.content.readexactly(1000) == b" " * 1000
            response.close()
        assert (await client.ask(simulator, "anthropic")).status == 200


async def test_headers_can_be_larger_than_a_client_takes(client: Client) -> None:
    async with Simulator() as simulator:
        simulator.fail("large_headers")
        with pytest.raises(aiohttp.ClientResponseError):
            await client.ask(simulator, "openai")
        generous = aiohttp.ClientSession(max_line_size=MEGABYTE, max_field_size=MEGABYTE)
        async with generous:
            simulator.fail("large_headers")
            reply = await Client(generous).ask(simulator, "openai")
    assert reply.status == 500
    assert sum(map(len, reply.headers.values())) > MEGABYTE


# -- connections and time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_connection_can_be_lost_after_the_request_was_written(
    client: Client, dialect: str, stream: bool
) -> None:
    async with Simulator() as simulator:
        simulator.fail("request_lost")
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await client.ask(simulator, dialect, stream=stream)
    (arrival,) = simulator.journal
    assert (arrival.received, arrival.admitted, arrival.status, arrival.disconnected) == (True, True, None, False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_connection_can_be_closed_right_after_an_answer_that_promised_to_keep_it(
    dialect: str, stream: bool
) -> None:
    async with Simulator() as simulator:
        simulator.fail("close_after_answer")
        reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
        body = msgspec.json.encode({"model": "m", "max_tokens": 100, "messages": QUESTION, "stream": stream})
        head = f"POST {PATHS[dialect]} HTTP/1.1\r\nhost: h\r\nx-api-key: k\r\nanthropic-version: 2023-06-01\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        said, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
    assert b" 200 " in said
    assert b"connection:" not in said.lower()
    assert answer.endswith(b"\r\n0\r\n\r\n") if stream else text(dialect, Reply(200, {}, answer)) == ECHO
    (arrival,) = simulator.journal
    assert arrival.finished is not None
    assert not arrival.disconnected


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_the_first_token_can_be_slow_after_a_quick_head(client: Client, dialect: str) -> None:
    async with Simulator() as simulator:
        simulator.fail("slow_first_token", seconds=30)
        arrived, how = await read_partly(simulator, client, dialect, stream=True)
        assert how == "silence"
        assert b"message_start" in arrived or b'"role":"assistant"' in arrived
        assert deltas(dialect, Reply(200, {}, arrived)) == []
        simulator.fail("slow_first_token", seconds=0.001)
        assert "".join(deltas(dialect, await client.ask(simulator, dialect, stream=True))) == ECHO


@pytest.mark.parametrize("burst", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_answer_can_drip_and_is_whole_in_the_end(
    client: Client, dialect: str, stream: bool, burst: bool
) -> None:
    async with Simulator(SimulatorSettings(burst=burst)) as simulator:
        simulator.fail("slow_drip", seconds=0)
        reply = await client.ask(simulator, dialect, stream=stream)
        assert ("".join(deltas(dialect, reply)) if stream else text(dialect, reply)) == ECHO
        simulator.fail("slow_drip", seconds=0.02)
        arrived, how = await read_partly(simulator, client, dialect, stream=stream, patience=0.3)
        assert (how, len(arrived) < len(reply.body)) == ("slow", True)
    assert simulator.journal[0].output_tokens == 7


async def test_a_port_can_accept_and_never_answer(client: Client) -> None:
    async with Simulator(SimulatorSettings(stalled_port=0)) as simulator:
        timeout = aiohttp.ClientTimeout(total=0.1)
        with pytest.raises(TimeoutError):
            await client.session.get(simulator.stalled_url, timeout=timeout, ssl=ssl.create_default_context())
        reader, writer = await asyncio.open_connection("127.0.0.1", simulator.stalled_port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await writer.drain()
        async with asyncio.timeout(10):
            while not simulator.stalled:
                await asyncio.sleep(0)
        assert (await client.ask(simulator, "anthropic")).status == 200
    # Closing the simulator ends what would never have ended.
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert simulator.stalled == set()


def test_without_the_setting_there_is_no_such_port() -> None:
    with pytest.raises(RuntimeError, match="stalled_port=0"):
        _ = Simulator().stalled_url


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deltas_before", [0, 3, 99])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_one_event_of_a_stream_can_be_no_json(client: Client, dialect: str, deltas_before: int) -> None:
    reply = await one(client, "malformed_event", dialect, stream=True, deltas=deltas_before)
    bad = []
    for line in reply.body.split(b"\n"):
        if line.startswith(b"data: ") and line != b"data: [DONE]":
            try:
                msgspec.json.decode(line[6:])
            except msgspec.DecodeError:
                bad.append(line)
    assert len(bad) == 1
    assert reply.body.endswith(b'{"type":"message_stop"}\n\n' if dialect == "anthropic" else b"data: [DONE]\n\n")


# -- for whom ---------------------------------------------------------------------------------------------------------


async def statuses(client: Client, simulator: Simulator, *asks: tuple[str, str]) -> list[int]:
    return [(await client.ask(simulator, dialect, key)).status for dialect, key in asks]


async def test_a_script_is_a_keys_own_or_a_paths_or_everybodys(client: Client) -> None:
    script = {"key-2": ["503"], PATHS["openai"]: ["500"], "*": ["529", "502"]}
    async with Simulator(SimulatorSettings(script=script)) as simulator:
        asks = [("openai", "key-2"), ("openai", "key-1"), ("anthropic", "key-1"), ("openai", "key-1")]
        assert await statuses(client, simulator, *asks) == [503, 500, 529, 502]
        assert await statuses(client, simulator, *asks) == [200] * 4


async def test_chances_are_a_keys_own_or_a_paths_or_everybodys(client: Client) -> None:
    faults = {"key-2": {"503": 1.0}, PATHS["openai"]: {"500": 1.0}, "*": {"529": 1.0}}
    async with Simulator(SimulatorSettings(faults=faults)) as simulator:
        asks = [("openai", "key-2"), ("anthropic", "key-2"), ("openai", "key-1"), ("anthropic", "key-1")]
        assert await statuses(client, simulator, *asks) == [503, 503, 500, 529]
        simulator.heal()
        assert await statuses(client, simulator, *asks) == [200] * 4


def test_scripted_faults_and_those_of_chance_have_the_usual_particulars() -> None:
    usual = Strike(name="", deltas=5, seconds=0.5, size=9)
    for plan in (
        FaultPlan(script=["pause"], usual=usual, random=random.Random(0)),
        FaultPlan(chances={"pause": 1.0}, usual=usual, random=random.Random(0)),
    ):
        strike = plan.draw(key="k", path="/v1/messages", generates=True, stream=True)
        assert strike == Strike(name="pause", deltas=5, seconds=0.5, size=9)


@pytest.mark.parametrize("wrong", [{"script": {"key": ["nonsense"]}}, {"faults": {"key": {"nonsense": 0.1}}}])
def test_an_unknown_fault_of_one_key_is_refused_too(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown fault 'nonsense'"):
        Simulator(SimulatorSettings(**wrong))


# -- what did not arrive ----------------------------------------------------------------------------------------------


async def test_a_request_that_did_not_come_in_full_is_told_from_those_that_did(client: Client) -> None:
    recorded: asyncio.Queue[bytes] = asyncio.Queue()
    async with Simulator(record=recorded.put_nowait) as simulator:
        _, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
        head = b"POST /v1/messages HTTP/1.1\r\nhost: h\r\nx-api-key: key-1\r\ncontent-length: 100\r\n\r\n"
        writer.write(head + b'{"model"')
        await writer.drain()
        writer.close()
        begun, ended = [msgspec.json.decode(await recorded.get()) for _ in range(2)]
        assert (await client.ask(simulator, "anthropic")).status == 200
    partly, whole = simulator.journal
    assert (partly.received, partly.admitted, partly.status, partly.disconnected) == (False, False, None, True)
    assert (partly.key, partly.path) == ("key-1", "/v1/messages")
    assert whole.received
    assert whole.admitted
    assert msgspec.convert(begun | ended, Arrival) == partly
    assert peak(simulator.journal, "key-1", 60, rejected=True) == 1
    assert len(usage_events(simulator.journal, "key-1", rejected=True)) == 1


async def test_a_body_above_the_vendors_bound_was_not_received(client: Client) -> None:
    async with Simulator() as simulator:
        headers = {"x-api-key": "k", "anthropic-version": "2023-06-01", "content-length": str(33 * MEGABYTE)}
        sent = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            for _ in range(33):
                yield b"x" * MEGABYTE
            sent.set()

        reply = await client.raw(simulator, "POST", "/v1/messages", headers=headers, data=body())
    assert reply.status == 413
    assert (simulator.journal[0].received, simulator.journal[0].status) == (False, 413)
