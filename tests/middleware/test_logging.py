"""Logging: one record a call, the noteworthy in between, and neither key nor prompt in any of it."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import llm.middleware.logging
from llm.core.content import Image, Text
from llm.core.events import Events, KeyParked, LimitAdopted, SharedOwner
from llm.core.exceptions import LLMConnectionError, LLMException
from llm.core.types import LLMResponse, Message, MessageRole, Request, Usage
from llm.middleware.base import Call
from llm.middleware.logging import LoggingMiddleware
from llm.testing.clock import FakeClock
from llm.testing.transport import Scripted
from tests.core.rig import END, JSON, PROMPT, answer, configuration, delta, failure, rig, secret, stream

ANSWER = "an answer that nobody else may read"


class Keep(logging.Handler):
    """Keeps the records themselves, as a queue or an error tracker would."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """Everything that is written to ``brimful``, at every level."""
    keep = Keep()
    with handling(keep):
        yield keep.records


def of(records: list[logging.LogRecord], level: int) -> list[logging.LogRecord]:
    return [record for record in records if record.name == "brimful" and record.levelno == level]


def shown(records: list[logging.LogRecord]) -> str:
    """All that a formatter could show: the message, and every field."""
    return "\n".join(f"{record.getMessage()} {vars(record)!r}" for record in records if record.name == "brimful")


def loud(**logging_settings: Any) -> dict[str, Any]:
    return configuration(keys=2, middleware={"logging": logging_settings} if logging_settings else None)


# ---------------------------------------------------------------- one record a call


async def test_an_answered_call_is_one_record_at_info_with_its_facts(records: list[logging.LogRecord]) -> None:
    async with rig([answer(delay=2.5)]) as r:
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.advance(3.0)
        await call
    [record] = of(records, logging.INFO)
    facts = vars(record)
    expected = {
        "provider": "vendor",
        "model": "m",
        "key_id": "vendor/1",
        "stream": False,
        "attempts": 1,
        "duration": 2.5,
        "queued": 0.0,
        "input_tokens": 3,
        "output_tokens": 2,
        "call_id": "0000-1",
    }
    assert {name: facts[name] for name in expected} == expected
    assert record.getMessage() == "0000-1: answered by m in 2.500 s (3 tokens in, 2 out, 1 attempts)"
    assert of(records, logging.WARNING) == of(records, logging.ERROR) == []


async def test_a_stream_is_one_record_when_it_ends(records: list[logging.LogRecord]) -> None:
    async with rig([stream(delta("hel"), 4.0, END)]) as r, r.client.stream_complete(PROMPT) as answered:
        assert of(records, logging.INFO) == []
        await anext(answered)
        reading = asyncio.create_task(anext(answered))
        await r.clock.advance(4.0)
        await reading
        [record] = of(records, logging.INFO)
    assert (vars(record)["stream"], vars(record)["duration"], vars(record)["output_tokens"]) == (True, 4.0, 2)


async def test_a_call_that_failed_is_one_record_at_error(records: list[logging.LogRecord]) -> None:
    async with rig([failure(400, "bad", code="odd")]) as r:
        with pytest.raises(LLMException):
            await r.client.complete(PROMPT)
    [record] = of(records, logging.ERROR)
    facts = vars(record)
    assert (facts["error"], facts["status"], facts["code"]) == ("LLMInvalidRequestError", 400, "odd")
    assert facts["request_id"] == "req-e"
    assert of(records, logging.INFO) == []
    assert of(records, logging.WARNING) == [], "the last failure is the error's own, not a warning too"


async def test_a_stream_that_breaks_off_is_one_record_at_error(records: list[logging.LogRecord]) -> None:
    async with rig([stream(delta("hel"), LLMConnectionError("lost", sent=True))]) as r:
        with pytest.raises(LLMException):
            _ = [chunk async for chunk in r.client.stream_complete(PROMPT)]
    [record] = of(records, logging.ERROR)
    assert vars(record)["error"] == "LLMStreamInterruptedError"
    assert "hel" not in record.getMessage()


async def test_a_call_that_was_given_up_is_no_error(records: list[logging.LogRecord]) -> None:
    async with rig([stream(delta("hel"), math.inf), Scripted(200, JSON, b"", delay=math.inf)]) as r:
        async for _ in r.client.stream_complete(PROMPT):
            break
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.settle()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    assert ["given up by the caller" in record.getMessage() for record in of(records, logging.INFO)] == [True, True]
    assert of(records, logging.ERROR) == []


async def test_a_call_that_never_got_a_permit_is_recorded_too(records: list[logging.LogRecord]) -> None:
    config = configuration(rate_limits={"input_tokens_per_minute": 2})
    async with rig(config=config) as r:
        with pytest.raises(LLMException):
            await r.client.complete(PROMPT)
    [record] = of(records, logging.ERROR)
    assert (vars(record)["error"], vars(record)["attempts"]) == ("LLMRequestTooLargeError", 0)


# ---------------------------------------------------------------- what happens in between


async def test_each_retry_is_a_warning(records: list[logging.LogRecord]) -> None:
    async with rig([failure(500), failure(529), answer()]) as r:
        await r.client.complete(PROMPT)
    warnings = of(records, logging.WARNING)
    assert [record.getMessage() for record in warnings] == [
        "0000-1: attempt 1 failed with LLMOverloadedError, next in 0.00 s",
        "0000-1: attempt 2 failed with LLMOverloadedError, next in 0.00 s",
    ]
    assert (vars(warnings[0])["status"], vars(warnings[1])["status"]) == (500, 529)
    assert vars(of(records, logging.INFO)[0])["attempts"] == 3


async def test_a_paused_a_parked_and_a_restored_key_are_warnings(records: list[logging.LogRecord]) -> None:
    script = [failure(429, retry_after="2"), failure(401, "revoked"), answer(), answer()]
    config = configuration(keys=2, middleware={"retry": {"max_attempts": 5}})
    async with rig(script, config=config) as r:
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.advance(40.0)
        await call
    text = shown(of(records, logging.WARNING))
    assert "key vendor/1 is paused for 2.0 s" in text
    assert "key vendor/2 is parked: LLMAuthenticationError: revoked" in text
    assert "key vendor/2 works again" in text


async def test_a_long_wait_is_said_after_two_seconds_and_then_once_a_minute(records: list[logging.LogRecord]) -> None:
    config = configuration(rate_limits={"requests_per_minute": 1, "window_seconds": 200})
    async with rig(lambda _: answer(), config=config) as r:
        await r.client.complete(PROMPT)
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.advance(1.9)
        assert of(records, logging.WARNING) == []
        await r.clock.advance(0.2)
        assert len(of(records, logging.WARNING)) == 1
        await r.clock.advance(125.0)
        assert [record.getMessage() for record in of(records, logging.WARNING)] == [
            "0000-2: waiting for capacity for 2 s, 0 other calls queued",
            "0000-2: waiting for capacity for 62 s, 0 other calls queued",
            "0000-2: waiting for capacity for 122 s, 0 other calls queued",
        ]
        await r.clock.advance(100.0)
        await call
    assert vars(of(records, logging.INFO)[-1])["queued"] == pytest.approx(200.25)


async def test_at_debug_every_attempt_has_its_details(records: list[logging.LogRecord]) -> None:
    async with rig([failure(500), answer()], config=loud()) as r:
        await r.client.complete(PROMPT)
    said = [record.getMessage().partition(": ")[2] for record in of(records, logging.DEBUG)]
    assert said[0] == "attempt 1: 1 messages to m"
    assert said[1].startswith("attempt failed after 0.000 s: LLMOverloadedError: no")
    assert said[2:] == ["attempt 2: 1 messages to m", "answer after 0.000 s"]
    assert [vars(record).get("key_id") for record in of(records, logging.DEBUG)] == [
        "vendor/1",
        None,
        "vendor/2",
        "vendor/2",
    ]


# ---------------------------------------------------------------- secrets and content


async def _everything(config: dict[str, Any]) -> None:
    """A call of every kind, each with a prompt, an answer and a key."""
    script = [
        failure(500, f"the key was {secret(1)}"),
        answer(ANSWER),
        stream(delta(ANSWER), END),
        stream(delta(ANSWER), LLMConnectionError("lost", sent=True)),
        failure(400, f"bad key {secret(1)}"),
        failure(401, f"bad key {secret(2)}"),
        failure(401, f"bad key {secret(1)}"),
    ]
    async with rig(script, config=config) as r:
        await r.client.complete(PROMPT, extra_headers={"x-token": "a-token-of-the-users"})
        _ = [chunk async for chunk in r.client.stream_complete(PROMPT)]
        for use in (r.client.stream_complete(PROMPT), None, None):
            with pytest.raises(LLMException):
                _ = [c async for c in use] if use is not None else await r.client.complete(PROMPT)


@pytest.mark.parametrize("content", [False, True])
async def test_no_level_shows_a_key_and_content_only_if_it_was_asked_for(
    records: list[logging.LogRecord], content: bool
) -> None:
    await _everything(loud(content=content))
    assert len(records) > 15
    text = shown(records)
    assert "sk-very-secret" not in text
    assert "a-token-of-the-users" not in text
    assert (PROMPT in text) is content
    assert (ANSWER in text) is content
    for level in (logging.INFO, logging.WARNING, logging.ERROR):
        assert PROMPT not in shown(of(records, level))
        assert ANSWER not in shown(of(records, level))


async def test_content_has_the_prompt_and_the_answer_of_whole_and_streamed_calls(
    records: list[logging.LogRecord],
) -> None:
    async with rig([answer(ANSWER), stream(delta("hel"), delta("lo"), END)], config=loud(content=True)) as r:
        await r.client.complete(PROMPT)
        _ = [chunk async for chunk in r.client.stream_complete(PROMPT)]
    facts = [vars(record) for record in of(records, logging.DEBUG)]
    assert [f["messages"] for f in facts if "messages" in f] == [[{"role": "user", "content": PROMPT}]] * 2
    assert [f["text"] for f in facts if "text" in f] == [ANSWER, "hello"]


async def test_a_record_that_is_kept_does_not_keep_the_call(records: list[logging.LogRecord]) -> None:
    async with rig([failure(400)]) as r:
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(LLMException) as caught:
                await r.client.complete(PROMPT)
            del caught
            gc.enable()
            gc.collect()
        finally:
            gc.enable()
        assert records
        assert [o for o in gc.get_objects() if isinstance(o, Call)] == []


# ---------------------------------------------------------------- faults of the user's


class Broken(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise ZeroDivisionError


class BadFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        raise ZeroDivisionError


@contextmanager
def handling(handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger("brimful")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


async def test_a_handler_that_raises_is_counted_and_fails_no_call() -> None:
    async with rig([failure(500), answer(), failure(400), stream(delta("hello"), END)]) as r:
        with handling(Broken()):
            assert await r.client.chat(PROMPT) == "hello"
            with pytest.raises(LLMException, match="no"):
                await r.client.chat(PROMPT)
            _ = [chunk async for chunk in r.client.stream_complete(PROMPT)]
        faults = r.manager.get_status()["faults"]
        assert faults["logging: ZeroDivisionError"] >= 8
        assert faults["listener: ZeroDivisionError"] == 1
        assert r.manager.get_status()["metrics"]["requests"]["successful"] == 2


@pytest.mark.parametrize("raise_exceptions", [True, False])
async def test_a_formatter_that_raises_is_the_handlers_affair_and_fails_no_call(
    raise_exceptions: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``logging.raiseExceptions`` only decides whether the standard handlers print what they swallow."""
    monkeypatch.setattr(logging, "raiseExceptions", raise_exceptions)
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(BadFormatter())
    async with rig([answer()]) as r:
        with handling(handler):
            assert await r.client.chat(PROMPT) == "hello"
    assert ("ZeroDivisionError" in capsys.readouterr().err) is raise_exceptions


async def test_a_filter_that_raises_is_counted_too() -> None:
    def broken(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError

    handler = logging.NullHandler()
    logger = logging.getLogger("brimful")
    logger.addFilter(broken)
    try:
        async with rig([answer()]) as r:
            with handling(handler):
                assert await r.client.chat(PROMPT) == "hello"
            assert r.manager.get_status()["faults"]["logging: ZeroDivisionError"] >= 1
    finally:
        logger.removeFilter(broken)


# ---------------------------------------------------------------- alone


REQUEST = Request((Message(MessageRole.USER, "x"),), "m")


@contextmanager
def own(level: int, events: Events | None = None) -> Iterator[tuple[LoggingMiddleware, Keep]]:
    """The layer with a logger of its own, which writes from *level* on."""
    keep = Keep()
    logger = logging.getLogger("tests.own")
    before = logger.level
    logger.addHandler(keep)
    logger.setLevel(level)
    try:
        yield LoggingMiddleware(clock=FakeClock(), logger=logger, events=events), keep
    finally:
        logger.removeHandler(keep)
        logger.setLevel(before)


async def test_it_works_alone_with_a_logger_of_its_own() -> None:
    keep = Keep()
    logger = logging.getLogger("tests.own")
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    layer = LoggingMiddleware(clock=FakeClock(), logger=logger)
    call = Call("7", Request((Message(MessageRole.USER, "x"),), "m"), provider="p", model="m", started=1_000.0)

    async def answering(call: Call) -> Any:
        raise LLMConnectionError("lost")

    with pytest.raises(LLMConnectionError):
        await layer(call, answering)
    assert [record.getMessage() for record in keep.records] == [
        "7: failed after 0.000 s and 0 attempts: LLMConnectionError: lost"
    ]


async def test_an_error_of_the_users_own_is_recorded_without_what_only_ours_have() -> None:
    with own(logging.INFO) as (layer, keep):

        async def answering(call: Call) -> Any:
            raise ZeroDivisionError("a layer of the user's")

        with pytest.raises(ZeroDivisionError):
            await layer(Call("7", REQUEST, provider="p", model="m", started=1_000.0), answering)
    [record] = keep.records
    assert record.getMessage() == "7: failed after 0.000 s and 0 attempts: ZeroDivisionError: a layer of the user's"
    assert vars(record)["error"] == "ZeroDivisionError"
    assert not hasattr(record, "status")


def test_a_logger_that_wants_errors_only_hears_of_no_warning() -> None:
    parked = KeyParked(at=0.0, provider="p", key_id="p/1", reason="revoked")
    for level, expected in ((logging.ERROR, []), (logging.WARNING, ["p: key p/1 is parked: revoked"])):
        events = Events()
        with own(level, events) as (_, keep):
            events.publish(parked)
        assert [record.getMessage() for record in keep.records] == expected


def test_an_adopted_limit_and_a_shared_owner_are_told_in_words() -> None:
    events = Events()
    adopted = LimitAdopted(at=0.0, provider="p", quota="p/1 *", dimension="requests", limit=50)
    with own(logging.INFO, events) as (_, keep):
        events.publish(adopted)
        events.publish(SharedOwner(at=0.0, provider="p", owner="organization o", pools=("p/1", "p/2")))
    assert [(record.levelname, record.getMessage()) for record in keep.records] == [
        ("INFO", "p: p/1 * is limited to 50 requests a window, as its vendor says"),
        (
            "WARNING",
            "p: p/1 and p/2 answer in the name of organization o, and probably share its limits: "
            "give their keys one entry in quota_pools",
        ),
    ]


async def test_a_record_factory_of_the_users_own_makes_the_records() -> None:
    """As libraries set one to add a field to every record."""
    before = logging.getLogRecordFactory()

    def factory(*given: Any, **more: Any) -> logging.LogRecord:
        record = before(*given, **more)
        record.rack = "r7"
        return record

    logging.setLogRecordFactory(factory)
    try:
        with own(logging.INFO) as (layer, keep):
            await layer(Call("7", REQUEST, provider="p", model="m", started=1_000.0), answering)
    finally:
        logging.setLogRecordFactory(before)
    [record] = keep.records
    assert vars(record)["rack"] == "r7"
    assert record.getMessage() == "7: answered by m in 0.000 s (0 tokens in, 0 out, 0 attempts)"


async def answering(call: Call) -> Any:
    return LLMResponse(text="x", model="m", usage=Usage())


def test_records_of_many_threads_are_alike_and_not_each_thread_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.middleware.logging, "MAX_MODELS", 4)
    together = threading.Barrier(10)
    with own(logging.INFO) as (layer, keep):

        def once() -> None:
            # All are alive at once, so that no two have one identity.
            together.wait(timeout=30.0)
            asyncio.run(layer(Call("7", REQUEST, provider="p", model="m", started=1_000.0), answering))

        threads = [threading.Thread(target=once) for _ in range(together.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(layer._models) <= 4
    assert [record.getMessage() for record in keep.records] == [keep.records[0].getMessage()] * together.parties
    assert len({record.thread for record in keep.records}) == together.parties


async def test_of_what_is_no_text_a_record_names_the_kind(records: list[logging.LogRecord]) -> None:
    parts = (Text("look"), Image.from_url("https://example.org/a.png"))
    async with rig([answer()], config=loud(content=True)) as r:
        await r.client.complete([Message(MessageRole.USER, parts)])
    assert "['look', 'Image']" in shown(of(records, logging.DEBUG))


async def test_switched_off_it_writes_nothing(records: list[logging.LogRecord]) -> None:
    async with rig([failure(500), answer()], config=loud(enabled=False)) as r:
        await r.client.complete(PROMPT)
        assert "logging.calls" not in r.manager.get_status()["providers"]["vendor"]["layers"]
    assert [record for record in records if record.name == "brimful"] == []
