"""What a client sees of the simulator, over real sockets."""

from __future__ import annotations

import ast
import asyncio
import email.utils
import io
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import msgspec
import pytest

from llm.testing import exchange, faults, journal, simulator, window, wire, wire_anthropic, wire_openai
from llm.testing.faults import FAULTS
from llm.testing.journal import Arrival, peak
from llm.testing.simulator import Simulator, SimulatorSettings
from llm.testing.window import Limits
from llm.testing.wire import count_input
from llm.testing.wire_openai import go_duration
from tests.testing.client import DIALECTS, ECHO, QUESTION, Client, Reply, deltas, error_type, read_partly, text

TICK = 0.003
"""A few milliseconds, in which uvloop's clock counts."""


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session)


# -- answers ----------------------------------------------------------------------------------------------------------


async def test_a_message_is_answered_in_the_words_of_anthropic(client: Client) -> None:
    async with Simulator() as simulator:
        reply = await client.ask(simulator, "anthropic")
    body = reply.json()
    assert reply.status == 200
    assert body["type"] == "message"
    assert body["content"] == [{"type": "text", "text": ECHO, "citations": None}]
    assert body["stop_reason"] == "end_turn"
    assert body["usage"]["input_tokens"] == 10
    assert body["usage"]["output_tokens"] == 7
    assert reply.headers["request-id"].startswith("req_")
    assert reply.headers["anthropic-organization-id"]
    assert email.utils.parsedate_to_datetime(reply.headers["date"]).year >= 2026


async def test_a_chat_completion_is_answered_in_the_words_of_openai(client: Client) -> None:
    async with Simulator() as simulator:
        reply = await client.ask(simulator, "openai")
    body = reply.json()
    assert reply.status == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == ECHO
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["prompt_tokens"] == 10
    assert body["usage"]["total_tokens"] == 17
    assert reply.headers["x-request-id"].startswith("req_")
    assert reply.headers["openai-organization"].startswith("org-")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_keys_of_one_organisation_share_its_limits_and_say_so(client: Client, dialect: str) -> None:
    limits = {"acme": Limits(requests=2), "*": Limits(requests=1)}
    settings = SimulatorSettings(limits=limits, organizations={"one": "acme", "two": "acme"})
    async with Simulator(settings) as simulator:
        replies = {
            name: await client.ask(simulator, dialect, key=key)
            for name, key in {"first": "one", "second": "two", "third": "one", "other": "three"}.items()
        }
    assert {name: reply.status for name, reply in replies.items()} == {
        "first": 200,
        "second": 200,
        "third": 429,
        "other": 200,
    }
    owners = ("anthropic-organization-id", "anthropic-workspace-id", "openai-organization")
    said = {name: [reply.headers.get(owner) for owner in owners] for name, reply in replies.items()}
    assert said["first"] == said["second"] == said["third"]
    assert all(one != other for one, other in zip(said["first"], said["other"], strict=True) if one is not None)


async def test_a_message_stream_has_the_events_and_order_of_anthropic(client: Client) -> None:
    async with Simulator() as simulator:
        reply = await client.ask(simulator, "anthropic", stream=True)
    events = reply.events()
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert [name for name, _ in events] == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * 7,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(name == data["type"] for name, data in events)
    assert events[0][1]["message"]["usage"]["input_tokens"] == 10
    assert events[-2][1]["delta"]["stop_reason"] == "end_turn"
    assert events[-2][1]["usage"]["output_tokens"] == 7
    assert "".join(deltas("anthropic", reply)) == ECHO


async def test_a_chat_stream_has_the_chunks_and_order_of_openai(client: Client) -> None:
    async with Simulator() as simulator:
        reply = await client.ask(simulator, "openai", stream=True)
    events = reply.events()
    assert all(name is None for name, _ in events)
    assert events[0][1]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert events[-2][1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert events[-1][1] == "[DONE]"
    assert all("usage" not in data for _, data in events[:-1])
    assert "".join(deltas("openai", reply)) == ECHO


async def test_usage_of_a_chat_stream_comes_in_a_last_chunk_without_choices_if_asked_for(client: Client) -> None:
    async with Simulator() as simulator:
        reply = await client.ask(simulator, "openai", stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = [data for _, data in reply.events()]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 7
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("burst", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_answer_is_cut_at_max_tokens_and_says_so(
    client: Client, dialect: str, burst: bool, stream: bool
) -> None:
    async with Simulator(SimulatorSettings(burst=burst)) as simulator:
        reply = await client.ask(simulator, dialect, max_tokens=3, stream=stream)
    assert b'"max_tokens"' in reply.body if dialect == "anthropic" else b'"length"' in reply.body
    said = "".join(deltas(dialect, reply)) if stream else text(dialect, reply)
    assert said == "You said: tell"
    assert simulator.journal[0].output_tokens == 3
    assert sum(tokens for _, tokens in simulator.journal[0].produced) == 3


async def test_an_answer_ends_before_a_stop_sequence(client: Client) -> None:
    async with Simulator() as simulator:
        message = await client.ask(simulator, "anthropic", stop_sequences=["the sea", " about"])
        chat = await client.ask(simulator, "openai", stop=" about")
    assert message.json()["stop_reason"] == "stop_sequence"
    assert message.json()["stop_sequence"] == " about"
    assert text("anthropic", message) == text("openai", chat) == "You said: tell me"
    assert chat.json()["choices"][0]["finish_reason"] == "stop"


async def test_the_reply_can_be_written_by_the_test(client: Client) -> None:
    settings = SimulatorSettings(reply=lambda body: f"  {body['model']}, 100 % sûr \n")
    async with Simulator(settings) as simulator:
        whole = await client.ask(simulator, "openai", model="m%d")
        stream = await client.ask(simulator, "openai", model="m%d", stream=True)
    assert text("openai", whole) == "".join(deltas("openai", stream)) == "  m%d, 100 % sûr \n"


async def test_the_length_of_the_reply_can_be_set(client: Client) -> None:
    async with Simulator(SimulatorSettings(reply_words=50)) as simulator:
        reply = await client.ask(simulator, "openai")
    assert len(text("openai", reply).split()) == reply.json()["usage"]["completion_tokens"] == 50


async def test_a_large_body_is_read(client: Client) -> None:
    async with Simulator(SimulatorSettings(reply_words=1)) as simulator:
        body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x" * 3_000_000}]}
        headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
        data = io.BytesIO(msgspec.json.encode(body))
        reply = await client.raw(simulator, "POST", "/v1/messages", headers=headers, data=data)
    assert reply.json()["usage"]["input_tokens"] == 750_004


def test_input_is_a_quarter_of_the_bytes_and_four_a_message() -> None:
    assert count_input({"messages": [{"role": "user", "content": "12345"}]}) == 2 + 4
    assert count_input({"system": "1234", "messages": [{"role": "user", "content": "é" * 4}]}) == (1 + 4) + (2 + 4)
    parts = [{"type": "text", "text": "1234"}, {"type": "text", "text": "1234"}]
    assert count_input({"messages": [{"role": "user", "content": parts}]}) == 2 + 4


async def test_models_are_listed_in_the_dialect_of_the_version_header(client: Client) -> None:
    async with Simulator(SimulatorSettings(models=["m-1", "m-2"])) as simulator:
        headers = {"authorization": "Bearer k"}
        openai = await client.raw(simulator, "GET", "/v1/models", headers=headers)
        headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
        anthropic = await client.raw(simulator, "GET", "/v1/models", headers=headers)
        one = await client.raw(simulator, "GET", "/v1/models/m-2", headers=headers)
        none = await client.raw(simulator, "GET", "/v1/models/m-3", headers=headers)
    assert [model["id"] for model in openai.json()["data"]] == ["m-1", "m-2"]
    assert openai.json()["object"] == "list"
    assert anthropic.json()["last_id"] == "m-2"
    assert one.json()["type"] == "model"
    assert none.status == 404


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["x-api-key", "authorization"])
async def test_a_key_is_taken_from_either_header(client: Client, dialect: str, name: str) -> None:
    async with Simulator(SimulatorSettings(keys=["good"])) as simulator:
        path = "/v1/messages" if dialect == "anthropic" else "/v1/chat/completions"
        value = "good" if name == "x-api-key" else "Bearer good"
        body = {"model": "m", "max_tokens": 9, "messages": QUESTION}
        headers = {name: value, "anthropic-version": "2026-10-21"}
        assert (await client.raw(simulator, "POST", path, headers=headers, json=body)).status == 200
        headers[name] = value + "?"
        assert (await client.raw(simulator, "POST", path, headers=headers, json=body)).status == 401
        del headers[name]
        assert (await client.raw(simulator, "POST", path, headers=headers, json=body)).status == 401


@pytest.mark.parametrize(
    ("attribute", "status", "anthropic", "openai"),
    [
        ("revoked", 401, "authentication_error", "invalid_request_error"),
        ("forbidden", 403, "permission_error", "invalid_request_error"),
        ("spend_limited", 429, "rate_limit_error", "insufficient_quota"),
        ("unpaid", 402, "billing_error", "unknown_error"),
    ],
)
async def test_a_key_can_be_disabled_while_the_server_runs(
    client: Client, attribute: str, status: int, anthropic: str, openai: str
) -> None:
    async with Simulator() as simulator:
        getattr(simulator, attribute).add("key-1")
        for dialect, expected in (("anthropic", anthropic), ("openai", openai)):
            reply = await client.ask(simulator, dialect)
            assert (reply.status, error_type(reply)) == (status, expected)
            assert "retry-after" not in reply.headers
            assert (await client.ask(simulator, dialect, "key-2")).status == 200
        getattr(simulator, attribute).clear()
        assert (await client.ask(simulator, "anthropic")).status == 200


async def test_spend_limits_carry_the_code_that_tells_them_from_rate_limits(client: Client) -> None:
    async with Simulator(SimulatorSettings(spend_limited=["key-1"])) as simulator:
        message = await client.ask(simulator, "anthropic")
        chat = await client.ask(simulator, "openai")
    assert message.json()["error"]["details"]["error_code"] == "enforced_spend_limit_reached"
    assert chat.json()["error"]["code"] == "organization_spend_limit_exceeded"


async def test_an_unknown_model_is_not_found(client: Client) -> None:
    async with Simulator(SimulatorSettings(models=["m"])) as simulator:
        message = await client.ask(simulator, "anthropic", model="claude-3-opus-20240229")
        chat = await client.ask(simulator, "openai", model="gpt-4")
    assert (message.status, error_type(message)) == (404, "not_found_error")
    assert message.json()["error"]["message"] == "model: claude-3-opus-20240229"
    assert message.json()["request_id"] == message.headers["request-id"]
    assert (chat.status, chat.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": ...}, "max_tokens: Field required"),
        ({"max_tokens": "9"}, "max_tokens: "),
        ({"model": ...}, "model: Field required"),
        ({"messages": []}, "messages: at least one message is required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: "),
        ({"temperature": 1.5}, "temperature: "),
        ({"stream": "yes"}, "stream: "),
        ({"stop_sequences": "x"}, "stop_sequences: "),
    ],
)
async def test_anthropic_refuses_what_is_not_a_message_request(
    client: Client, change: dict[str, Any], message: str
) -> None:
    async with Simulator() as simulator:
        reply = await client.ask(simulator, "anthropic", **change)
    assert (reply.status, error_type(reply)) == (400, "invalid_request_error")
    assert reply.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k"])
async def test_the_newer_version_of_anthropic_knows_no_sampling(client: Client, field: str) -> None:
    hint: dict[str, Any] = {field: 1}
    async with Simulator() as simulator:
        older = await client.ask(simulator, "anthropic", **hint)
        newer = await client.ask(simulator, "anthropic", headers={"anthropic-version": "2026-10-21"}, **hint)
    assert older.status == 200
    assert newer.json()["error"]["message"] == f"{field}: Extra inputs are not permitted"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": ...}, None),
        ({"messages": ...}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
async def test_openai_refuses_what_is_not_a_chat_request(
    client: Client, change: dict[str, Any], param: str | None
) -> None:
    async with Simulator() as simulator:
        reply = await client.ask(simulator, "openai", **change)
    assert (reply.status, error_type(reply)) == (400, "invalid_request_error")
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'"\xff"', b"\x80"])
async def test_a_body_that_is_no_object_is_a_bad_request(client: Client, path: str, raw: bytes) -> None:
    async with Simulator() as simulator:
        headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
        reply = await client.raw(simulator, "POST", path, headers=headers, data=raw)
    assert (reply.status, error_type(reply)) == (400, "invalid_request_error")


async def test_unknown_paths_and_methods_are_refused_in_the_dialect_of_the_client(client: Client) -> None:
    async with Simulator() as simulator:
        headers = {"x-api-key": "k"}
        assert (await client.raw(simulator, "GET", "/v2/else", headers=headers)).status == 404
        assert (await client.raw(simulator, "GET", "/v1/messages", headers=headers)).status == 405
        headers["anthropic-version"] = "2023-06-01"
        assert error_type(await client.raw(simulator, "POST", "/v1/else", headers=headers)) == "not_found_error"


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_the_window_admits_again_exactly_one_window_later(client: Client, dialect: str) -> None:
    clock = Clock()
    settings = SimulatorSettings(limits=Limits(requests=2, window_seconds=25), count_rejected=False)
    async with Simulator(settings, clock=clock) as simulator:
        assert (await client.ask(simulator, dialect)).status == 200
        clock.now += 10.25
        assert (await client.ask(simulator, dialect)).status == 200
        refused = await client.ask(simulator, dialect)
        assert refused.status == 429
        assert refused.headers["retry-after"] == "15"
        assert simulator.journal[-1].retry_after == 14.75
        clock.now += 14.749
        assert (await client.ask(simulator, dialect)).status == 429
        clock.now += 0.001
        assert (await client.ask(simulator, dialect)).status == 200
        assert (await client.ask(simulator, dialect, "another key")).status == 200
    assert peak(simulator.journal, "key-1", 25) == 2
    assert [arrival.admitted for arrival in simulator.journal] == [True, True, False, False, True, True]


async def test_openai_tells_the_wait_in_milliseconds_and_counts_the_refusal(client: Client) -> None:
    clock = Clock()
    async with Simulator(SimulatorSettings(limits=Limits(requests=1)), clock=clock) as simulator:
        await client.ask(simulator, "openai")
        clock.now += 20.5
        refused = await client.ask(simulator, "openai")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        # The refusal is itself in the window now, so the wait is from now on.
        assert refused.headers["retry-after-ms"] == "60000.000"
        clock.now += 39.5
        assert (await client.ask(simulator, "openai")).status == 429
        clock.now += 60
        assert (await client.ask(simulator, "openai")).status == 200


async def test_anthropic_does_not_count_the_refusal(client: Client) -> None:
    clock = Clock()
    async with Simulator(SimulatorSettings(limits=Limits(requests=1)), clock=clock) as simulator:
        await client.ask(simulator, "anthropic")
        clock.now += 59
        refused = await client.ask(simulator, "anthropic")
        assert (refused.status, error_type(refused)) == (429, "rate_limit_error")
        assert refused.headers["retry-after"] == "1"
        clock.now += 1
        assert (await client.ask(simulator, "anthropic")).status == 200


async def test_input_is_charged_on_arrival_and_output_when_it_is_produced(client: Client) -> None:
    clock = Clock()
    settings = SimulatorSettings(limits={"key-1": Limits(input_tokens=25), "*": Limits(output_tokens=10)})
    async with Simulator(settings, clock=clock) as simulator:
        statuses = [(await client.ask(simulator, "anthropic")).status for _ in range(3)]
        assert statuses == [200, 200, 429]
        statuses = [(await client.ask(simulator, "anthropic", "key-2")).status for _ in range(3)]
        assert statuses == [200, 200, 429], "seven tokens leave room, fourteen do not"
    assert peak(simulator.journal, "key-1", 60, "input_tokens") == 20
    assert peak(simulator.journal, "key-2", 60, "output_tokens") == 14


async def test_max_tokens_are_reserved_where_the_vendor_does_so(client: Client) -> None:
    settings = SimulatorSettings(limits=Limits(output_tokens=150), output_counting="reserve_max")
    async with Simulator(settings) as simulator:
        assert (await client.ask(simulator, "openai", max_completion_tokens=100)).status == 200
        assert (await client.ask(simulator, "openai", max_completion_tokens=100)).status == 429
        assert (await client.ask(simulator, "openai", max_completion_tokens=50)).status == 200


async def test_anthropic_headers_say_what_is_left_and_when_it_is_all_back(client: Client) -> None:
    limits = Limits(requests=50, input_tokens=40_000, output_tokens=8_000)
    async with Simulator(SimulatorSettings(limits=limits)) as simulator:
        reply = await client.ask(simulator, "anthropic", messages=[{"role": "user", "content": "x" * 40_000}])
    headers = {name.removeprefix("anthropic-ratelimit-"): value for name, value in reply.headers.items()}
    assert (headers["requests-limit"], headers["requests-remaining"]) == ("50", "49")
    assert (headers["input-tokens-limit"], headers["input-tokens-remaining"]) == ("40000", "30000")
    assert (headers["output-tokens-limit"], headers["output-tokens-remaining"]) == ("8000", "8000")
    assert (headers["tokens-limit"], headers["tokens-remaining"]) == ("40000", "30000")
    reset = datetime.fromisoformat(headers["requests-reset"])
    date = email.utils.parsedate_to_datetime(reply.headers["date"])
    assert 59 <= (reset - date).total_seconds() <= 62


async def test_openai_headers_say_what_is_left_in_go_durations(client: Client) -> None:
    limits = Limits(requests=50, input_tokens=1000, output_tokens=500)
    async with Simulator(SimulatorSettings(limits=limits), clock=Clock()) as simulator:
        headers = (await client.ask(simulator, "openai")).headers
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("50", "49")
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("1500", "1483")
    assert headers["x-ratelimit-reset-requests"] == "1m0s"


async def test_without_limits_there_are_no_rate_limit_headers(client: Client) -> None:
    async with Simulator() as simulator:
        replies = [await client.ask(simulator, dialect) for dialect in DIALECTS]
    assert not [name for reply in replies for name in reply.headers if "ratelimit" in name]


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0, "0s"),
        (0.0121, "13ms"),
        (0.999, "999ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9991, "1m0s"),
        (360, "6m0s"),
        (61.25, "1m1.25s"),
        (3600, "1h0m0s"),
    ],
)
def test_durations_are_written_as_go_does_and_never_too_short(seconds: float, written: str) -> None:
    assert go_duration(seconds) == written


# -- faults -----------------------------------------------------------------------------------------------------------


STATUSES = [name for name, fault in FAULTS.items() if fault.act == "answer" and (fault.status or 0) >= 400]
# Their headers are more than this client takes.
STATUSES.remove("large_headers")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", STATUSES)
async def test_a_status_can_be_ordered_once(client: Client, dialect: str, kind: str) -> None:
    async with Simulator() as simulator:
        simulator.fail(kind, seconds=7, size=5000)
        reply = await client.ask(simulator, dialect)
        assert reply.status == FAULTS[kind].status
        assert ("retry-after" in reply.headers) == (FAULTS[kind].retry_after is not None)
        assert (await client.ask(simulator, dialect)).status == 200
    assert simulator.journal[0].fault == kind
    assert simulator.journal[0].status == reply.status
    assert simulator.journal[0].admitted == (reply.status >= 500)


async def test_an_outage_lasts_until_it_is_healed_and_may_be_one_keys_own(client: Client) -> None:
    async with Simulator() as simulator:
        simulator.fail("529", times=None, key="key-1")
        assert [(await client.ask(simulator, "anthropic")).status for _ in range(3)] == [529] * 3
        assert (await client.ask(simulator, "anthropic", "key-2")).status == 200
        simulator.heal()
        assert (await client.ask(simulator, "anthropic")).status == 200


async def test_a_script_is_consumed_one_entry_a_request(client: Client) -> None:
    async with Simulator(SimulatorSettings(script=["500", None, "429_without_retry_after"])) as simulator:
        assert [(await client.ask(simulator, "openai")).status for _ in range(4)] == [500, 200, 429, 200]
    async with Simulator(SimulatorSettings(script={"key-2": ["503"]})) as simulator:
        assert (await client.ask(simulator, "openai")).status == 200
        assert (await client.ask(simulator, "openai", "key-2")).status == 503


async def test_chance_is_repeatable(client: Client) -> None:
    async def statuses(seed: int) -> list[int]:
        async with Simulator(SimulatorSettings(faults={"500": 0.3, "529": 0.2}, seed=seed)) as simulator:
            return [(await client.ask(simulator, "anthropic")).status for _ in range(40)]

    first = await statuses(1)
    assert first == await statuses(1)
    assert first != await statuses(2)
    assert {200, 500, 529} == set(first)


@pytest.mark.parametrize("wrong", [{"script": ["nonsense"]}, {"faults": {"nonsense": 0.1}}])
def test_an_unknown_fault_is_refused_with_the_known_ones(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown fault 'nonsense'; known are .*529.*"):
        Simulator(SimulatorSettings(**wrong))


async def test_the_models_are_listed_during_an_outage_unless_it_is_theirs(client: Client) -> None:
    async with Simulator() as simulator:
        simulator.fail("500", times=None)
        headers = {"x-api-key": "k"}
        assert (await client.raw(simulator, "GET", "/v1/models", headers=headers)).status == 200
        simulator.fail("503", path="/v1/models")
        assert (await client.raw(simulator, "GET", "/v1/models", headers=headers)).status == 503


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_reset_comes_before_any_answer(client: Client, dialect: str) -> None:
    async with Simulator() as simulator:
        simulator.fail("reset")
        with pytest.raises(aiohttp.ClientOSError, match="reset"):
            await client.ask(simulator, dialect)
    assert simulator.journal[0].status is None
    assert not simulator.journal[0].disconnected, "it was not the client who left"


@pytest.mark.parametrize("burst", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("kind", "ending", "heard"),
    [
        ("cut_stream", "ClientPayloadError", 3),
        ("reset_stream", "ClientPayloadError", None),  # a reset may overtake what was sent before it
        ("stall", "silence", 3),
        ("stream_error", "end", 3),
        ("missing_terminal", "end", 7),
    ],
)
async def test_a_stream_can_break_after_some_deltas(
    client: Client, dialect: str, kind: str, ending: str, heard: int | None, burst: bool
) -> None:
    async with Simulator(SimulatorSettings(burst=burst, fault_deltas=3)) as simulator:
        simulator.fail(kind)
        arrived, how = await read_partly(simulator, client, dialect, stream=True)
    assert how == ending
    assert b"message_stop" not in arrived
    assert b"[DONE]" not in arrived
    assert (b"error" in arrived) == (kind == "stream_error")
    if heard is not None:
        assert len(deltas(dialect, Reply(200, {}, arrived))) == heard
        assert simulator.journal[0].output_tokens == heard


@pytest.mark.parametrize("kind", ["silence", "stall", "cut_stream"])
async def test_a_whole_answer_can_break_too(client: Client, kind: str) -> None:
    async with Simulator() as simulator:
        simulator.fail(kind)
        arrived, how = await read_partly(simulator, client, "anthropic", stream=False)
    assert how == ("ClientPayloadError" if kind == "cut_stream" else "silence")
    assert bool(arrived) == (kind != "silence")


async def test_a_fault_of_streams_waits_for_a_stream(client: Client) -> None:
    async with Simulator() as simulator:
        simulator.fail("stream_error")
        assert (await client.ask(simulator, "openai")).status == 200
        assert b"server_is_overloaded" in (await client.ask(simulator, "openai", stream=True)).body


@pytest.mark.parametrize("kind", ["slow_first_byte", "pause"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_that_waits_ends_well(client: Client, kind: str, stream: bool) -> None:
    async with Simulator() as simulator:
        simulator.fail(kind, seconds=0.03)
        assert (await client.ask(simulator, "anthropic", stream=stream)).status == 200
    arrival = simulator.journal[0]
    assert arrival.finished is not None
    # uvloop's clock counts milliseconds.
    assert arrival.finished - arrival.time >= 0.029


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_latency_and_speed_make_an_answer_as_long_as_a_vendor_would(client: Client, stream: bool) -> None:
    settings = SimulatorSettings(latency=0.02, tokens_per_second=200, reply_words=10)
    async with Simulator(settings) as simulator:
        await client.ask(simulator, "openai", stream=stream)
    arrival = simulator.journal[0]
    assert arrival.finished is not None
    assert arrival.finished - arrival.time >= 0.02 + 10 / 200 - TICK
    assert len(arrival.produced) == (10 if stream else 1)
    assert arrival.produced[0][0] - arrival.time >= 0.02 - TICK


async def test_latency_can_be_spread(client: Client) -> None:
    async with Simulator(SimulatorSettings(latency=(0.005, 0.8), seed=3)) as simulator:
        await asyncio.gather(*(client.ask(simulator, "openai") for _ in range(8)))
    took = {round(arrival.finished - arrival.time, 4) for arrival in simulator.journal if arrival.finished}
    assert len(took) > 1


# -- the journal and the life of the server ---------------------------------------------------------------------------


async def test_the_journal_tells_what_arrived_and_survives_json(client: Client) -> None:
    async with Simulator() as simulator:
        await client.ask(simulator, "anthropic", "key-7", headers={"anthropic-beta": "b"}, stream=True)
        await client.ask(simulator, "anthropic", "key-8")
    first, second = simulator.journal
    assert (first.sequence, second.sequence) == (0, 1)
    assert (first.key, first.dialect, first.path, first.model) == (
        "key-7",
        "anthropic",
        "/v1/messages",
        "claude-opus-5-5",
    )
    assert (first.stream, second.stream) == (True, False)
    assert first.body["messages"] == QUESTION
    assert first.headers["anthropic-beta"] == "b"
    assert first.connection == second.connection > 0
    assert (first.status, first.admitted, first.input_tokens, first.output_tokens) == (200, True, 10, 7)
    assert msgspec.json.decode(msgspec.json.encode(simulator.journal), type=list[Arrival]) == simulator.journal


async def test_what_is_recorded_adds_up_to_the_journal(client: Client) -> None:
    lines: list[bytes] = []
    async with Simulator(record=lines.append) as simulator:
        await client.ask(simulator, "openai")
    assert all(line.endswith(b"\n") for line in lines)
    begun, ended = (msgspec.json.decode(line) for line in lines)
    assert msgspec.convert(begun | ended, Arrival) == simulator.journal[0]
    assert begun["admitted"], "so that the check counts what is still being answered"


async def test_under_load_the_journal_can_be_left_to_whoever_records_it(client: Client) -> None:
    lines: list[bytes] = []
    settings = SimulatorSettings(keep_journal=False, keep_bodies=False)
    async with Simulator(settings, record=lines.append) as simulator:
        await client.ask(simulator, "openai")
    assert simulator.journal == []
    assert len(lines) == 2
    assert msgspec.json.decode(lines[0])["body"] is None


async def test_a_client_that_leaves_is_noted_and_pays_for_what_was_produced(client: Client) -> None:
    settings = SimulatorSettings(tokens_per_second=100, reply_words=1000, limits=Limits(output_tokens=5000))
    lines: asyncio.Queue[bytes] = asyncio.Queue()
    async with Simulator(settings, record=lines.put_nowait) as simulator:
        await read_three_deltas_and_leave(client, simulator)
        begun, ended = await lines.get(), await lines.get()
        assert msgspec.json.decode(begun)["disconnected"] is False
        assert msgspec.json.decode(ended)["disconnected"] is True
        arrival = simulator.journal[0]
        assert 3 <= arrival.output_tokens < 1000
        assert simulator.account("k").output_tokens.used == arrival.output_tokens


async def read_three_deltas_and_leave(client: Client, simulator: Simulator) -> None:
    headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
    body = {"model": "m", "max_tokens": 2000, "messages": QUESTION, "stream": True}
    async with client.session.post(simulator.url + "/v1/messages", headers=headers, json=body) as response:
        seen = 0
        async for line in response.content:
            seen += b"text_delta" in line
            if seen == 3:
                return


@pytest.mark.parametrize("kind", ["silence", "stall"])
async def test_closing_ends_what_would_never_end_and_leaves_nothing_behind(kind: str) -> None:
    before = asyncio.all_tasks()
    async with aiohttp.ClientSession() as session:
        client = Client(session)
        arrived = asyncio.Event()
        async with Simulator(record=lambda _: arrived.set()) as simulator:
            simulator.fail(kind)
            question = asyncio.create_task(client.ask(simulator, "anthropic", stream=True))
            await arrived.wait()
        with pytest.raises(aiohttp.ClientError):
            await question
    assert asyncio.all_tasks() == before
    assert "closed" in repr(simulator)


async def test_a_port_in_use_is_an_os_error_and_leaves_the_simulator_usable() -> None:
    async with Simulator() as first:
        second = Simulator(SimulatorSettings(port=first.port))
        with pytest.raises(OSError, match="in use"):
            await second.__aenter__()
    async with second:
        assert second.url == first.url


async def test_many_at_once_are_each_admitted_or_refused_never_lost(client: Client) -> None:
    async with Simulator(SimulatorSettings(limits=Limits(requests=50))) as simulator:
        replies = await asyncio.gather(*(client.ask(simulator, "anthropic") for _ in range(200)))
    assert sorted(reply.status for reply in replies) == [200] * 50 + [429] * 150
    assert peak(simulator.journal, "key-1", 60) == 50
    assert peak(simulator.journal, "key-1", 60, rejected=True) == 200
    assert [arrival.sequence for arrival in simulator.journal] == list(range(200))


@pytest.mark.parametrize("module", [simulator, exchange, window, journal, faults, wire, wire_anthropic, wire_openai])
def test_the_judge_uses_nothing_of_what_it_judges(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "only its neighbours"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        assert not [name for name in names if name.partition(".")[0] in ("llm", "brimful", "src")]
