"""What the simulator says is what the golden files say the vendors say: same keys and types at each depth, same order.

A thing is compared with two sets of golden ones: it must have what each of the *least* has, and nothing that is in none
of them. The words in between, an answer's text and figures, are its own.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from itertools import groupby
from typing import Any

import aiohttp
import msgspec
import pytest

from llm.testing.faults import FAULTS
from llm.testing.simulator import Simulator, SimulatorSettings
from llm.testing.window import Limits
from llm.testing.wire import Dialect
from llm.testing.wire_anthropic import AnthropicWire
from llm.testing.wire_openai import OpenAIWire
from tests.providers.corpus import GOLDEN
from tests.testing.client import DIALECTS, Client, Reply

Shape = dict[str, set[str]]

# Strings that are words of the protocol: not only that they are strings is compared, but which.
PROTOCOL = {"type", "object", "role", "stop_reason", "finish_reason", "service_tier", "error_code"}


# -- comparing --------------------------------------------------------------------------------------------------------


def shape(value: Any, path: str = "", into: Shape | None = None) -> Shape:
    """The types in *value* by path: ``content[].text`` is a string."""
    found: Shape = {} if into is None else into
    if isinstance(value, dict):
        kind = "object"
        for name, inner in value.items():
            shape(inner, f"{path}.{name}", found)
    elif isinstance(value, list):
        kind = "array"
        for inner in value:
            shape(inner, f"{path}[]", found)
    elif isinstance(value, str):
        kind = repr(value) if path.rpartition(".")[2] in PROTOCOL else "string"
    else:
        kind = "null" if value is None else "boolean" if isinstance(value, bool) else "number"
    found.setdefault(path, set()).add(kind)
    return found


def differences(found: list[Any], least: list[Any], most: list[Any]) -> list[str]:
    """How the shape of *found* differs: what it lacks of any of *least*, and has that none of *most* has."""
    has: Shape = {}
    known: Shape = {}
    for value in found:
        shape(value, into=has)
    for value in (*least, *most):
        shape(value, into=known)
    wrong = [f"{path} is missing" for value in least for path in shape(value) if path not in has]
    for path, kinds in has.items():
        if path not in known:
            wrong.append(f"{path} is not the vendor's")
        elif kinds - known[path]:
            wrong.append(f"{path} is {', '.join(sorted(kinds - known[path]))}, not {', '.join(sorted(known[path]))}")
    return sorted(set(wrong))


def kinds(dialect: str, events: list[tuple[str | None, Any]]) -> list[tuple[str, Any]]:
    """The events of a stream with what each is; a ping may come anywhere, so it is left out."""
    found = []
    for name, data in events:
        if dialect == "anthropic":
            assert name == data["type"], "the name is in the event as well"
            kind = data["type"] + (" " + data["delta"]["type"] if name == "content_block_delta" else "")
        elif data == "[DONE]":
            kind = data
        elif "error" in data:
            kind = "error"
        elif not data["choices"]:
            kind = "usage"
        else:
            (choice,) = data["choices"]
            kind = "finish" if choice["finish_reason"] else "role" if "role" in choice["delta"] else "content"
        if kind != "ping":
            found.append((kind, data))
    return found


def stream_differences(
    dialect: str, found: list[tuple[str | None, Any]], least: list[tuple[str | None, Any]], most: list[Any]
) -> list[str]:
    """How a stream differs in the order of its events and in the shape of each kind of event."""
    ours, theirs, further = (kinds(dialect, events) for events in (found, least, most))
    order = [[kind for kind, _ in groupby(events, lambda event: event[0])] for events in (ours, theirs)]
    wrong = [] if order[0] == order[1] else [f"the order is {order[0]}, not {order[1]}"]
    for kind in order[0]:
        of_kind = [[data for name, data in events if name == kind] for events in (ours, theirs, further)]
        wrong += [f"{kind}: {difference}" for difference in differences(*of_kind)]
    return wrong


# -- what is compared -------------------------------------------------------------------------------------------------


def golden(dialect: str, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode((GOLDEN / dialect / f"{kind}.json").read_bytes())
    return found


def golden_stream(dialect: str, title: str) -> list[tuple[str | None, Any]]:
    return Reply(200, {}, (GOLDEN / dialect / "streams" / f"{title}.sse").read_bytes()).events()


REPLIES = {dialect: golden(dialect, "replies") for dialect in DIALECTS}
ERRORS = {dialect: golden(dialect, "errors") for dialect in DIALECTS}
HEADERS = {dialect: golden(dialect, "headers") for dialect in DIALECTS}
STREAMS = {
    (dialect, title): golden_stream(dialect, title)
    for dialect in DIALECTS
    for title in ("text", "every_field", "stop_length" if dialect == "openai" else "stop_max_tokens")
}
MIDWAY = {
    "anthropic": golden_stream("anthropic", "overloaded_midway"),
    "openai": [event for event in golden_stream("openai", "error_midway") if event[1] != "[DONE]"],
}
WIRES: dict[str, Dialect] = {"anthropic": AnthropicWire(), "openai": OpenAIWire()}
USAGE_ASKED: dict[str, Any] = {"stream_options": {"include_usage": True}}


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session)


ENDINGS: dict[str, dict[str, Any]] = {
    "text": {},
    "length": {"max_tokens": 3},
    "stop_sequence": {"stop": " about", "stop_sequences": [" about"]},
}
GOLDEN_ENDING = {
    ("anthropic", "text"): "text",
    ("anthropic", "length"): "stop reason max_tokens",
    ("anthropic", "stop_sequence"): "stop reason stop_sequence",
    ("openai", "text"): "text",
    ("openai", "length"): "stop reason length",
    ("openai", "stop_sequence"): "text",
}


def asked(dialect: str, ending: str) -> dict[str, Any]:
    unknown = "stop" if dialect == "anthropic" else "stop_sequences"
    return {name: value for name, value in ENDINGS[ending].items() if name != unknown}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_reply_has_the_vendors_shape(client: Client, dialect: str, ending: str) -> None:
    async with Simulator() as simulator:
        reply = await client.ask(simulator, dialect, **asked(dialect, ending))
    least, most = REPLIES[dialect][GOLDEN_ENDING[dialect, ending]]["body"], REPLIES[dialect]["every field"]["body"]
    if (dialect, ending) == ("anthropic", "stop_sequence"):
        # The golden file tells the reason without the sequence; that one is a string goes without a file.
        least = least | {"stop_sequence": " about"}
    assert differences([reply.json()], [least], [most]) == []


@pytest.mark.parametrize("burst", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_has_the_vendors_events_in_their_order(client: Client, dialect: str, burst: bool) -> None:
    async with Simulator(SimulatorSettings(burst=burst)) as simulator:
        options: dict[str, Any] = USAGE_ASKED if dialect == "openai" else {}
        whole = await client.ask(simulator, dialect, stream=True, **options)
        short = await client.ask(simulator, dialect, stream=True, max_tokens=3, **options)
    least, most = STREAMS[dialect, "text"], STREAMS[dialect, "every_field"]
    assert stream_differences(dialect, whole.events(), least, most) == []
    cut_short = STREAMS[dialect, "stop_length" if dialect == "openai" else "stop_max_tokens"]
    assert stream_differences(dialect, short.events(), cut_short, [*least, *most]) == []


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_error_in_a_stream_has_the_vendors_shape(client: Client, dialect: str) -> None:
    async with Simulator() as simulator:
        simulator.fail("stream_error")
        options: dict[str, Any] = USAGE_ASKED if dialect == "openai" else {}
        reply = await client.ask(simulator, dialect, stream=True, **options)
    # Which error it is, the bodies of errors tell.
    further = [(None if dialect == "openai" else "error", body) for body in error_bodies(dialect)]
    most = [*further, *STREAMS[dialect, "every_field"]]
    assert stream_differences(dialect, reply.events(), MIDWAY[dialect], most) == []


def error_bodies(dialect: str, status: int | None = None, said: tuple[Any, Any] | None = None) -> list[Any]:
    """The golden errors that are objects with an object: of *status*, and of that type and code."""
    found = []
    for case in ERRORS[dialect].values():
        try:
            body = msgspec.json.decode(case["body"])
        except (msgspec.DecodeError, RecursionError):
            continue
        if isinstance(body, dict) and isinstance(body.get("error"), dict) and status in (None, case["status"]):
            error = body["error"]
            details = error.get("details")
            if isinstance(error.get("type"), str) and said in (None, (error["type"], code_of(dialect, error, details))):
                found.append(body)
    return found


def code_of(dialect: str, error: dict[str, Any], details: Any) -> Any:
    if dialect == "openai":
        return error.get("code")
    return details.get("error_code") if isinstance(details, dict) else None


@pytest.mark.parametrize(
    ("dialect", "name"), [(dialect, name) for dialect, wire in WIRES.items() for name in wire.problems]
)
def test_every_problem_is_one_that_the_golden_errors_have(dialect: str, name: str) -> None:
    wire = WIRES[dialect]
    problem = wire.problems[name]
    body = msgspec.json.decode(wire.error(problem, "req_1"))
    theirs = error_bodies(dialect, problem.status, (problem.type, problem.code))
    assert theirs, f"no golden error has status {problem.status}, type {problem.type} and code {problem.code}"
    assert differences([body], theirs[:1], error_bodies(dialect)) == []


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_refusals_are_the_vendors_too(client: Client, dialect: str) -> None:
    """Those that no table has: a full window, a model and a parameter that are unknown."""
    limits = Limits(requests=1, input_tokens=100, output_tokens=100)
    async with Simulator(SimulatorSettings(limits=limits, models=["m"], count_rejected=False)) as simulator:
        await client.ask(simulator, dialect, model="m")
        replies = [
            await client.ask(simulator, dialect, model="m"),
            await client.ask(simulator, dialect, "key-2", model="m", messages=[{"role": "user", "content": "x" * 500}]),
            await client.ask(simulator, dialect, model="another"),
            await client.ask(simulator, dialect, model="m", temperature=9),
        ]
    assert [reply.status for reply in replies] == [429, 429, 404, 400]
    for reply in replies:
        error = reply.json()["error"]
        assert error_bodies(dialect, reply.status, (error["type"], code_of(dialect, error, error.get("details")))) or (
            # The vendor has a code for each way of being wrong; ours need not all be on file.
            reply.status == 400
        )
        assert differences([reply.json()], error_bodies(dialect, reply.status)[:1], error_bodies(dialect)) == []


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_fault_that_speaks_for_the_vendor_has_its_envelope(client: Client, dialect: str) -> None:
    named = [name for name, fault in FAULTS.items() if fault.act == "answer" and fault.body == "problem"]
    async with Simulator() as simulator:
        for name in named:
            if FAULTS[name].padding:
                continue
            simulator.fail(name)
            reply = await client.ask(simulator, dialect)
            assert differences([reply.json()], error_bodies(dialect)[:1], error_bodies(dialect)) == [], name
            assert set(HEADERS[dialect]["limits"]["headers"]) & {"request-id", "x-request-id"} <= set(reply.headers)


# -- headers ----------------------------------------------------------------------------------------------------------

KINDS = {
    "a date": r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT",
    "an instant": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
    "a day": r"\d{4}-\d\d-\d\d",
    "a number": r"\d+(\.\d+)?",
    "a duration": r"(\d+h)?(\d+m)?(\d+(\.\d+)?m?s)?",
    "a name": r"[\w.-]+",
}
# How long the vendor worked is not simulated.
NOT_SIMULATED = {"openai-processing-ms"}
OF_THE_SERVER = {"content-type", "content-length", "server", "date", "cache-control", "transfer-encoding"}


def header_kinds(headers: dict[str, str]) -> dict[str, str]:
    return {
        name: next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, value))
        for name, value in headers.items()
        if name not in OF_THE_SERVER | NOT_SIMULATED
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_headers_have_the_vendors_names_and_ways_of_writing(client: Client, dialect: str, stream: bool) -> None:
    limits = Limits(requests=1, input_tokens=40_000, output_tokens=8000)
    async with Simulator(SimulatorSettings(limits=limits)) as simulator:
        answered = await client.ask(simulator, dialect, stream=stream)
        refused = await client.ask(simulator, dialect, stream=stream)
    assert (answered.status, refused.status) == (200, 429)
    assert header_kinds(answered.headers) == header_kinds(HEADERS[dialect]["limits"]["headers"])
    assert header_kinds(refused.headers) == header_kinds(HEADERS[dialect]["a wait"]["headers"])


# -- and drift is noticed ---------------------------------------------------------------------------------------------


def renamed(value: Any, old: str, new: str) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value).replace(f'"{old}":'.encode(), f'"{new}":'.encode()))


@pytest.mark.parametrize(
    ("dialect", "key"),
    [
        ("anthropic", "stop_reason"),
        ("anthropic", "input_tokens"),
        ("anthropic", "text"),
        ("openai", "finish_reason"),
        ("openai", "completion_tokens"),
        ("openai", "content"),
        ("openai", "cached_tokens"),
    ],
)
def test_a_renamed_key_is_noticed_at_any_depth(dialect: str, key: str) -> None:
    theirs = REPLIES[dialect]["text"]["body"]
    assert differences([theirs], [theirs], []) == []
    (missing, unknown) = differences([renamed(theirs, key, key + "s")], [theirs], [])
    assert missing.endswith(f".{key} is missing") or unknown.endswith(f".{key} is missing")
    assert missing.endswith(f".{key}s is not the vendor's") or unknown.endswith(f".{key}s is not the vendor's")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body | {"id": 7}, ".id is number, not string"),
        (lambda body: body | {"stop_reason": "ended"}, ".stop_reason is 'ended', not 'end_turn'"),
        (lambda body: body | {"content": {}}, " is object, not array"),
        (lambda body: body | {"content": []}, ".content[].text is missing"),
        (lambda body: body | {"usage": None}, ".usage is null, not object"),
    ],
)
def test_another_type_or_word_is_noticed(change: Callable[[Any], Any], says: str) -> None:
    theirs = REPLIES["anthropic"]["text"]["body"]
    assert [found for found in differences([change(theirs)], [theirs], []) if says in found]


def test_another_order_of_events_is_noticed_and_so_is_one_that_is_left_out() -> None:
    for dialect in DIALECTS:
        theirs = STREAMS[dialect, "text"]
        assert stream_differences(dialect, theirs, theirs, []) == []
        for ours in (theirs[:-1], [theirs[-1], *theirs[:-1]], [*theirs, theirs[0]]):
            assert [found for found in stream_differences(dialect, ours, theirs, []) if "order" in found]
    changed = [(name, renamed(data, "delta", "change") if name == "message_delta" else data) for name, data in
               STREAMS["anthropic", "text"]]  # fmt: skip
    assert stream_differences("anthropic", changed, STREAMS["anthropic", "text"], [])


def test_another_way_of_writing_a_header_is_noticed() -> None:
    theirs = HEADERS["openai"]["limits"]["headers"]
    assert header_kinds(theirs | {"x-ratelimit-reset-requests": "7"}) != header_kinds(theirs)
    theirs = HEADERS["anthropic"]["limits"]["headers"]
    assert header_kinds(theirs | {"anthropic-ratelimit-tokens-reset": "6m0s"}) != header_kinds(theirs)
