"""The values a call is made of, and what their types refuse, at run time and before."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

from llm.core.arguments import read_messages, read_options
from llm.core.exceptions import LLMInvalidRequestError
from llm.core.types import (
    CallOptions,
    KeyRef,
    LLMResponse,
    Message,
    MessageRole,
    Options,
    Priority,
    Settlement,
    StopReason,
    StreamChunk,
    Usage,
    run_settled,
)
from tests.core.rig import PROMPT, answer, rig, secret

ROOT = Path(__file__).parent.parent.parent


def response(**more: Any) -> LLMResponse:
    return LLMResponse(**{"text": "hello", "model": "m", "usage": Usage(3, 2), **more})


# ---------------------------------------------------------------- values


def test_a_message_is_written_as_it_is_spoken() -> None:
    message = Message(MessageRole.USER, "What is Python?")
    assert (message.role, message.content) == ("user", "What is Python?")


def test_printing_a_response_prints_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    print(response())
    for chunk in (StreamChunk("hel"), StreamChunk("lo"), StreamChunk(stop_reason=StopReason.STOP)):
        print(chunk, end="")
    assert capsys.readouterr().out == "hello\nhello"


def test_usage_totals_are_inclusive() -> None:
    usage = Usage(100, 50, cache_read_tokens=80, reasoning_tokens=30)
    assert usage.total_tokens == 150


def test_raw_is_the_vendors_reply_and_none_where_there_is_none() -> None:
    assert response(body=b'{"id": "x", "new": [1]}').raw == {"id": "x", "new": [1]}
    assert response().raw is None


@pytest.mark.parametrize("empty", [StreamChunk(), StreamChunk(stop_reason=StopReason.STOP), StreamChunk(usage=Usage())])
def test_a_chunk_without_words_is_no_content(empty: StreamChunk) -> None:
    assert not empty.has_content


@pytest.mark.parametrize("field", ["text", "thinking", "refusal"])
def test_words_of_every_kind_are_content(field: str) -> None:
    assert msgspec.structs.replace(StreamChunk(), **{field: "x"}).has_content


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (Message(MessageRole.USER, "x"), "content"),
        (Usage(), "input_tokens"),
        (response(), "text"),
        (StreamChunk("x"), "text"),
        (Settlement(), "error"),
        (Options(), "n"),
        (KeyRef("vendor", 1), "number"),
    ],
)
def test_values_do_not_change(value: Any, field: str) -> None:
    with pytest.raises(AttributeError):
        setattr(value, field, None)


def test_a_key_is_shown_by_its_place() -> None:
    assert KeyRef("anthropic", 2).id == "anthropic/2"


async def test_an_answer_can_be_compared_copied_pickled_and_encoded() -> None:
    async with rig([answer()]) as r:
        got = await r.client.complete(PROMPT)
    assert copy.copy(got) == copy.deepcopy(got) == pickle.loads(pickle.dumps(got)) == got
    assert msgspec.json.decode(msgspec.json.encode(got))["text"] == "hello"
    assert secret(1) not in repr(got)


# ---------------------------------------------------------------- settlement


def test_a_whole_answer_is_settled_at_once_and_exactly() -> None:
    told: list[Settlement] = []
    response().on_settled(told.append)
    assert told == [Settlement(usage=Usage(3, 2), exact=True)]


async def test_a_callback_that_raises_is_counted_and_shown_to_the_loop_and_fails_nothing() -> None:
    shown: list[dict[str, Any]] = []

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: shown.append(context))

    def broken(settlement: Settlement) -> None:
        raise ZeroDivisionError

    async with rig([answer()]) as r:
        (await r.client.complete(PROMPT)).on_settled(broken)
        assert r.manager.get_status()["faults"] == {"on_settled: ZeroDivisionError": 1}
    assert [type(context["exception"]) for context in shown] == [ZeroDivisionError]


def test_a_callback_that_raises_outside_a_loop_is_counted() -> None:
    faults: list[str] = []

    def broken(settlement: Settlement) -> None:
        raise ZeroDivisionError

    run_settled(broken, Settlement(), lambda where, error: faults.append(where))
    assert faults == ["on_settled"]


# ---------------------------------------------------------------- options


def test_the_typed_dictionary_and_the_struct_name_the_same_options() -> None:
    assert set(get_type_hints(CallOptions)) == set(Options.__struct_fields__)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temprature": 0.5}, "temprature: unknown option; did you mean 'temperature'?"),
        ({"maxtokens": 5}, "did you mean 'max_tokens'?"),
        ({"colour": "red"}, "colour: unknown option; known are cache, extra_body,"),
        ({"temperature": "hot"}, "temperature: expected `float | null`, got `str`"),
        ({"temperature": float("nan")}, "temperature: expected a finite number, got nan"),
        ({"timeout": float("inf")}, "timeout: expected a finite number"),
        ({"max_tokens": 1.5}, "max_tokens: expected `int | null`, got `float`"),
        ({"max_tokens": True}, "max_tokens: expected `int | null`, got `bool`"),
        ({"max_tokens": 0}, "max_tokens: expected a positive number, got 0"),
        ({"n": 0}, "n: expected a positive number"),
        ({"timeout": 0}, "timeout: expected a positive number of seconds, got 0"),
        ({"timeout": -1.0}, "timeout: expected a positive number of seconds"),
        ({"stop": [1]}, "stop[0]: expected `str`, got `int`"),
        ({"unsupported": "ignore"}, "unsupported: invalid enum value"),
        ({"extra_headers": {"x": 1}}, "extra_headers"),
        ({"priority": "urgent"}, "priority: expected a Priority or its word, one of 'high', 'normal', 'low'"),
        ({"priority": 1}, "priority: expected a Priority or its word"),
        ({"priority": ["high"]}, "priority: expected a Priority or its word"),
        ({"tenant": 7}, "tenant: expected `str`, got `int`"),
        ({"tag": b"x", "priority": "low"}, "tag: expected `str`, got `bytes`"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_its_name(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LLMInvalidRequestError) as caught:
        read_options({}, options)  # type: ignore[arg-type]  # what a type checker would refuse
    assert complaint in str(caught.value)
    assert not caught.value.retryable


def test_a_calls_options_come_before_its_clients() -> None:
    assert read_options({"temperature": 0.1, "n": 2}, {"temperature": 0.9}) == Options(temperature=0.9, n=2)
    assert read_options({"stop": ["a", "b"]}, {}).stop == ("a", "b")
    assert read_options({"temperature": 1}, {"temperature": None}).temperature is None


@pytest.mark.parametrize("said", [Priority.HIGH, "high"])
def test_a_priority_may_be_said_by_its_word(said: Any) -> None:
    read = read_options({}, {"priority": said}).priority
    assert (read, type(read)) == (Priority.HIGH, Priority)


def test_none_takes_back_what_the_client_says_about_its_calls() -> None:
    defaults: CallOptions = {"priority": "low", "tenant": "acme", "tag": "summary"}
    assert read_options(defaults, {}) == Options(priority=Priority.LOW, tenant="acme", tag="summary")
    assert read_options(defaults, {"priority": None, "tenant": None, "tag": None}) == Options()
    assert defaults == {"priority": "low", "tenant": "acme", "tag": "summary"}


NOTHING: Any = None
ROLE: Any = "usr"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "the list is empty"),
        (None, "expected a string or a list of messages, got NoneType"),
        (7, "expected a string or a list of messages, got int"),
        (Message(MessageRole.USER, "x"), "got a single one: put it in a list"),
        ({"role": "user"}, "got a single one"),
        ([{"role": "user", "content": "x"}], "messages[0]: expected a Message, got dict"),
        (b"bytes", "messages[0]: expected a Message, got int"),
        ([Message(MessageRole.USER, "x"), Message(MessageRole.USER, NOTHING)], "messages[1].content: expected a str"),
        ([Message(ROLE, "x")], "messages[0].role: expected one of MessageRole.SYSTEM"),
    ],
)
def test_messages_that_cannot_be_are_refused_by_their_place(messages: Any, complaint: str) -> None:
    with pytest.raises(LLMInvalidRequestError) as caught:
        read_messages(messages)
    assert complaint in str(caught.value)


def test_a_string_is_one_message_of_the_user_and_any_iterable_a_conversation() -> None:
    hello = Message(MessageRole.USER, "hello")
    assert read_messages("hello") == (hello,)
    assert read_messages(iter([hello, hello])) == (hello, hello)  # type: ignore[arg-type]


# ---------------------------------------------------------------- before run time

GOOD = """
from typing import assert_type
from llm import LLMManager, LLMResponse, Message, MessageRole, Priority, ResponseStream, StreamChunk

async def use(manager: LLMManager) -> None:
    client = manager.get_client("openai", temperature=0.5)
    assert_type(await client.chat("hello", max_tokens=5), str)
    await client.chat("hello", priority=Priority.HIGH, tenant="acme", tag="greeting")
    await client.chat("hello", priority="low", tenant=None, tag=None)
    assert_type(await client.complete([Message(MessageRole.USER, "hello")], stop=["x"]), LLMResponse)
    async for chunk in client.stream_complete("hello", temperature=0.5):
        assert_type(chunk, StreamChunk)
    async with client.stream_complete("hello") as stream:
        assert_type(stream, ResponseStream)
"""
BAD = """
from llm import LLMManager

async def use(manager: LLMManager) -> None:
    client = manager.get_client(temprature=0.5)  # 1
    await client.chat("hello", temprature=0.5)  # 2
    await client.complete("hello", max_tokens="5")  # 3
    client.stream_complete("hello", max_token=5)  # 4
    await client.complete(5)  # 5
    await client.chat("hello", priority="urgent")  # 6
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own may be locked: `make test` checks the types while the tests run."""
    return tmp_path_factory.mktemp("mypy")


def mypy(code: str, folder: Path, cache: Path) -> tuple[int, list[str]]:
    (folder / "snippet.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), "snippet.py"],
        cwd=folder,
        env={"MYPYPATH": str(ROOT / "src"), "MYPY_CACHE_DIR": str(cache), "PATH": ""},
        capture_output=True,
        text=True,
    )
    return done.returncode, [line for line in done.stdout.splitlines() if line.startswith("snippet.py")]


def test_a_type_checker_knows_what_calls_take_and_give(tmp_path: Path, cache: Path) -> None:
    code, said = mypy(GOOD, tmp_path, cache)
    assert (code, said) == (0, [])


def test_a_type_checker_refuses_a_misspelt_option_and_a_wrong_value(tmp_path: Path, cache: Path) -> None:
    code, said = mypy(BAD, tmp_path, cache)
    lines = {int(line.split(":")[1]) for line in said if ": error:" in line}
    wanted = {number for number, line in enumerate(BAD.splitlines(), start=1) if "# " in line}
    assert (code, lines) == (1, wanted)


def test_a_callback_that_raises_where_nobody_wants_to_know_fails_nothing() -> None:
    def broken(settlement: Settlement) -> None:
        raise ZeroDivisionError

    run_settled(broken, Settlement(), None)


def test_options_show_what_was_asked_and_no_headers_value() -> None:
    shown = repr(Options(temperature=0.5, extra_headers={"x-gateway": "a token"}))
    assert shown == "Options(temperature=0.5, extra_headers={'x-gateway': '***'})"


def test_options_show_what_was_asked_whatever_its_words() -> None:
    asked = Options(stop="normal", priority=Priority.HIGH, tenant="a", tag="b")
    assert repr(asked) == "Options(stop='normal', priority=<Priority.HIGH: 'high'>, tenant='a', tag='b')"
    assert repr(Options(priority=Priority.NORMAL, tenant="", tag="")) == "Options()"
