"""One attempt: what it says when it fails, what it leaves out, and how long it may take."""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
import traceback
from typing import Any

import msgspec
import pytest

from llm.core.endpoint import PROBE_SECONDS
from llm.core.exceptions import (
    LLMAuthenticationError,
    LLMConfigurationError,
    LLMConnectionError,
    LLMDeadlineExceededError,
    LLMException,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMProtocolError,
    LLMTimeoutError,
)
from llm.core.types import Message, MessageRole, Request
from llm.middleware.base import Call
from llm.testing.transport import Scripted
from tests.core.rig import (
    END,
    JSON,
    PROMPT,
    SSE,
    answer,
    configuration,
    delta,
    failure,
    is_probe,
    rig,
    secret,
    stream,
)
from tests.quotas import quotas

ONCE = {"retry": {"enabled": False}}
PARAMETERS: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9}


def once(**provider: Any) -> dict[str, Any]:
    return configuration(middleware=ONCE, **provider)


def vendors_own() -> dict[str, Any]:
    """The vendor's own address, where it is known which model refuses what."""
    config = configuration(middleware=ONCE, models="gpt-5")
    del config["providers"]["vendor"]["base_url"]
    return config


# ---------------------------------------------------------------- secrets


async def test_an_error_that_echoes_the_key_does_not_show_it() -> None:
    refusal = failure(400, f"Incorrect API key provided: {secret(1)}", code=f"bad_{secret(1)}")
    async with rig([refusal], config=once()) as r:
        with pytest.raises(LLMInvalidRequestError) as caught:
            await r.client.complete(PROMPT)
    error = caught.value
    assert "Incorrect API key provided: ***" in str(error)
    assert secret(1).encode() not in pickle.dumps(error)
    assert b"***" in error.body


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_error_tracker_that_prints_local_variables_finds_no_key(streaming: bool) -> None:
    lost = LLMConnectionError("lost", sent=True)
    lost.__cause__ = OSError("reset")
    script = [stream(delta("hel"), lost)] if streaming else [lost]
    async with rig(script, config=once()) as r:
        with pytest.raises(LLMConnectionError) as caught:
            await _use(r, streaming)
        shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "reset" in shown
    assert secret(1) not in shown


async def test_an_error_before_sending_does_not_show_the_key_either() -> None:
    async with rig(config=vendors_own()) as r:
        with pytest.raises(LLMInvalidRequestError) as caught:
            await r.client.complete(PROMPT, extra_body={"x": object()})
        shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "cannot be written as JSON" in shown
    assert secret(1) not in shown
    assert not caught.value.sent


# ---------------------------------------------------------------- what an error tells


async def test_an_error_tells_provider_model_key_request_and_attempts() -> None:
    async with rig([failure(500, "oops"), failure(503, "again"), failure(529, "more")]) as r:
        with pytest.raises(LLMOverloadedError) as caught:
            await r.client.complete(PROMPT)
    error = caught.value
    assert (error.provider, error.model, error.key_id) == ("vendor", "m", "vendor/1")
    assert (error.status, error.request_id, error.sent) == (529, "req-e", True)
    assert [(a.number, a.status, a.error, a.sent) for a in error.attempts] == [
        (1, 500, "LLMOverloadedError", True),
        (2, 503, "LLMOverloadedError", True),
        (3, 529, "LLMOverloadedError", True),
    ]
    assert "3 attempts" in str(error)


async def test_attempts_say_where_the_time_went() -> None:
    slow = Scripted(500, JSON, b"{}", delay=3.0)
    async with rig([slow, failure(400)], config=configuration()) as r:
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.advance(10.0)
        with pytest.raises(LLMInvalidRequestError) as caught:
            await call
    assert [(a.duration, a.waited) for a in caught.value.attempts] == [(3.0, 0.0), (0.0, 0.0)]


async def test_whether_it_was_sent_is_the_transports_word() -> None:
    async with rig([LLMConnectionError("refused"), LLMConnectionError("reset", sent=True)], config=once()) as r:
        for sent in (False, True):
            with pytest.raises(LLMConnectionError) as caught:
                await r.client.complete(PROMPT)
            assert caught.value.sent is sent
            assert caught.value.attempts[0].sent is sent


async def test_without_admission_there_is_a_clear_error() -> None:
    async with rig() as r:
        endpoint = r.manager._lines["vendor"].endpoint
        request = Request((Message(MessageRole.USER, PROMPT),), "")
        call = Call("1", request, provider="vendor", model=None, started=0.0)
        with pytest.raises(LLMConfigurationError, match=r"no layer has admitted.*RateLimitMiddleware"):
            await endpoint(call)


# ---------------------------------------------------------------- what a model refuses


async def test_what_was_left_out_is_listed_and_logged_once_for_a_model_and_option(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with rig(lambda _: answer(), config=vendors_own()) as r:
        answers = [await r.client.complete(PROMPT, **PARAMETERS) for _ in range(3)]
        sent = msgspec.json.decode(r.transport.requests[0].body)
    assert "temperature" not in sent
    assert answers[0].warnings == (
        "temperature was not sent: gpt-5 does not accept it",
        "top_p was not sent: gpt-5 does not accept it",
    )
    assert answers[2].warnings == answers[0].warnings
    said = [record.getMessage() for record in caplog.records if "was not sent" in record.getMessage()]
    assert sorted(said) == sorted(answers[0].warnings)


async def test_a_streams_warnings_are_listed_too() -> None:
    async with (
        rig([stream(delta("hello"), END)], config=vendors_own()) as r,
        r.client.stream_complete(PROMPT, **PARAMETERS) as answered,
    ):
        pass
    assert len(answered.warnings) == 2


async def test_under_another_address_nothing_is_left_out() -> None:
    async with rig([answer()], config=once(models="gpt-5")) as r:
        got = await r.client.complete(PROMPT, **PARAMETERS)
        assert msgspec.json.decode(r.transport.requests[0].body)["temperature"] == 0.5
    assert got.warnings == ()


async def test_a_handler_that_raises_at_the_warning_is_counted_and_fails_no_call() -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise ZeroDivisionError

    handler = Broken(logging.WARNING)
    logging.getLogger("brimful").addHandler(handler)
    try:
        async with rig([answer()], config=vendors_own()) as r:
            assert (await r.client.complete(PROMPT, **PARAMETERS)).text == "hello"
            assert r.manager.get_status()["faults"]["logging: ZeroDivisionError"] >= 1
    finally:
        logging.getLogger("brimful").removeHandler(handler)


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["head", "body"])
async def test_an_attempt_that_takes_too_long_is_a_timeout_of_the_provider(streaming: bool, where: str) -> None:
    silent = Scripted(200, SSE if streaming else JSON, pieces=(math.inf,), delay=math.inf if where == "head" else 0.0)
    async with rig([silent], config=once(timeouts={"attempt": 20})) as r:
        call = asyncio.create_task(_use(r, streaming))
        await r.clock.advance(19.9)
        assert not call.done()
        await r.clock.advance(0.1)
        with pytest.raises(LLMTimeoutError, match="attempt timeout of 20 s") as caught:
            await call
        assert type(caught.value) is LLMTimeoutError
        assert (caught.value.phase, caught.value.retryable, caught.value.sent) == ("attempt", True, True)
        assert r.transport.statistics()["open"] == 0
        assert r.manager.get_status()["providers"]["vendor"]["clients"]["in_use"] == 0


async def test_of_a_stream_the_attempts_time_ends_with_its_first_content() -> None:
    async with rig([stream(delta("hel"), 100.0, delta("lo"), END)], config=once(timeouts={"attempt": 20})) as r:
        call = asyncio.create_task(_use(r, True))
        await r.clock.advance(100.0)
        assert await call == "hello"


@pytest.mark.parametrize("streaming", [False, True])
async def test_the_deadline_of_the_call_ends_its_attempt(streaming: bool) -> None:
    async with rig([Scripted(200, JSON, b"{}", delay=math.inf)]) as r:
        call = asyncio.create_task(_use(r, streaming, timeout=5.0))
        await r.clock.advance(5.0)
        with pytest.raises(LLMDeadlineExceededError) as caught:
            await call
        assert (caught.value.phase, caught.value.retryable, caught.value.sent) == ("deadline", False, True)
        assert len(caught.value.attempts) == 1
        assert len(r.transport.requests) == 1


async def test_the_deadline_ends_a_403s_probe_and_the_call_gets_its_own_error() -> None:
    def script(request: Any) -> Scripted:
        return Scripted(200, JSON, b"{}", delay=math.inf) if is_probe(request) else failure(403, "not for you")

    async with rig(script) as r:
        call = asyncio.create_task(r.client.complete(PROMPT, timeout=2.0))
        await r.clock.advance(2.0)
        with pytest.raises(LLMAuthenticationError, match="not for you"):
            await call


async def test_a_403s_probe_that_is_not_answered_is_given_up_and_the_call_gets_its_own_error() -> None:
    def script(request: Any) -> Scripted:
        return Scripted(200, JSON, b"{}", delay=math.inf) if is_probe(request) else failure(403, "not for you")

    async with rig(script) as r:
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.advance(PROBE_SECONDS - 0.1)
        assert not call.done()
        await r.clock.advance(0.2)
        with pytest.raises(LLMAuthenticationError, match="not for you"):
            await call


async def test_a_caller_who_leaves_during_a_403s_probe_pays_for_a_refusal_and_the_key_stays_in_use() -> None:
    def script(request: Any) -> Scripted:
        return Scripted(200, JSON, b"{}", delay=math.inf) if is_probe(request) else failure(403, "not for you")

    async with rig(script, config=configuration(rate_limits={"input_tokens_per_minute": 1000})) as r:
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.advance(1.0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        [quota] = quotas(r.manager)
        assert quota["input_tokens"]["used"] == 0
        assert r.manager.get_status()["providers"]["vendor"]["clients"]["in_use"] == 0
        assert r.states == ["healthy"]


async def test_a_callers_own_timeout_is_a_cancellation_and_leaves_nothing() -> None:
    async with rig([Scripted(200, JSON, b"{}", delay=math.inf)]) as r:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await r.client.complete(PROMPT)
        assert r.transport.statistics()["open"] == 0
        status = r.manager.get_status()
        assert status["providers"]["vendor"]["clients"]["in_use"] == 0
        assert status["metrics"]["requests"]["cancelled"] == 1


async def _use(r: Any, streaming: bool, **options: Any) -> str:
    if streaming:
        return "".join([chunk.text async for chunk in r.client.stream_complete(PROMPT, **options)])
    return str(await r.client.chat(PROMPT, **options))


# ---------------------------------------------------------------- answers that are not what was asked for


async def test_an_error_under_200_where_a_stream_was_asked_for_is_that_error() -> None:
    body = b'{"error": {"message": "overloaded", "type": "server_error", "code": "server_is_overloaded"}}'
    async with rig([Scripted(200, JSON, body)], config=once()) as r:
        with pytest.raises(LLMOverloadedError):
            await _use(r, True)


async def test_a_whole_answer_where_a_stream_was_asked_for_is_not_passed_off_as_one() -> None:
    async with rig([answer()], config=once()) as r:
        with pytest.raises(LLMProtocolError, match="a stream was asked for"):
            await _use(r, True)
        assert r.transport.statistics()["in_flight"] == 0


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{", b"null", b"\xff\xfe", b'{"choices": []}'])
@pytest.mark.parametrize("status", [200, 400, 429, 500])
async def test_no_body_whatever_it_is_makes_anything_but_a_typed_error(body: bytes, status: int) -> None:
    async with rig([Scripted(status, {}, body)], config=once()) as r:
        with pytest.raises(LLMException) as caught:
            await r.client.complete(PROMPT)
    assert caught.value.key_id == "vendor/1"


async def test_a_header_that_cannot_be_read_does_not_spoil_a_good_answer() -> None:
    good = answer()
    odd = {"x-ratelimit-remaining-requests": "many", "retry-after": "soon", "x-ratelimit-reset-tokens": "\x00"}
    async with rig([Scripted(200, {**good.headers, **odd}, good.body)]) as r:
        assert await r.client.chat(PROMPT) == "hello"


async def test_a_dialect_that_raises_after_the_head_leaves_no_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig([stream(math.inf)], config=once()) as r:
        provider = r.manager._lines["vendor"].provider
        monkeypatch.setattr(type(provider), "stream_decoder", lambda self, request: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await _use(r, True)
        assert r.transport.statistics()["open"] == 0
