"""Streams never lie: what was decoded is delivered, then the truth about the end, once."""

from __future__ import annotations

import asyncio
import gc
import math
import pickle
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.core.config import load
from llm.core.exceptions import (
    LLMConnectionError,
    LLMDeadlineExceededError,
    LLMException,
    LLMOverloadedError,
    LLMProtocolError,
    LLMStreamInterruptedError,
    LLMTimeoutError,
)
from llm.core.stream import ResponseStream
from llm.core.types import Message, MessageRole, Request, Settlement, StopReason
from llm.providers.base import StreamDecoder
from llm.providers.openai import OpenAIProvider
from llm.testing.clock import FakeClock
from tests.core.rig import END, PROMPT, answer, configuration, delta, key_of, rig, secret, stream

PROVIDER = OpenAIProvider(load(configuration(), environ={}, warn=print).providers["vendor"])
IN_STREAM_ERROR = b'data: {"error": {"message": "overloaded", "type": "server_error", "code": 503}}\n\n'


class Body:
    """A body that plays pieces as ScriptedResponse does, and whose blocked read ends when it is closed, as HTTP's."""

    def __init__(self, *pieces: bytes | float | BaseException) -> None:
        self.pieces = iter(pieces)
        self.closed = False
        self.reads = 0
        self.blocked: asyncio.Future[None] | None = None

    async def read_some(self) -> bytes:
        self.reads += 1
        if self.closed:
            raise LLMConnectionError("closed")
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            if isinstance(piece, bytes):
                return piece
            self.blocked = asyncio.get_running_loop().create_future()
            await self.blocked
        return b""

    def close(self) -> None:
        self.closed = True
        if self.blocked is not None and not self.blocked.done():
            self.blocked.set_exception(LLMConnectionError("closed"))


def opened(*pieces: bytes | float | BaseException, clock: FakeClock | None = None, **more: Any) -> ResponseStream:
    request = Request((Message(MessageRole.USER, PROMPT),), "m", stream=True)
    decoder: StreamDecoder = PROVIDER.stream_decoder(request)
    body = more.pop("body", None) or Body(*pieces)
    return ResponseStream(body, decoder, clock=clock or FakeClock(), provider="vendor", key_id="vendor/1", **more)


def body_of(stream: ResponseStream) -> Body:
    body = stream._body
    assert isinstance(body, Body)
    return body


async def read(stream: ResponseStream) -> tuple[str, BaseException | None]:
    """All there is, and how it ended."""
    pieces = []
    try:
        async for chunk in stream:
            pieces.append(chunk.text)
    except LLMException as error:
        return "".join(pieces), error.with_traceback(None)
    return "".join(pieces), None


def lost() -> LLMConnectionError:
    return LLMConnectionError("the connection was lost", sent=True)


# ---------------------------------------------------------------- content in hand


async def test_starting_ends_when_content_is_in_hand_and_keeps_what_came_before() -> None:
    role = b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    stream = opened(role, delta("hel"), delta("lo"), END)
    await stream.start()
    assert body_of(stream).reads == 2
    assert stream.text == "hel"
    assert await read(stream) == ("hello", None)


async def test_starting_ends_at_the_terminal_event_of_an_answer_without_words() -> None:
    stream = opened(END)
    await stream.start()
    assert await read(stream) == ("", None)
    assert stream.stop_reason is StopReason.STOP


@pytest.mark.parametrize("end", [b"", None, IN_STREAM_ERROR])
async def test_a_failure_before_content_is_raised_by_starting(end: bytes | None) -> None:
    pieces: list[Any] = [b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n']
    stream = opened(*pieces, *([lost()] if end is None else [end]))
    with pytest.raises(LLMException) as caught:
        await stream.start()
    kinds = {b"": LLMStreamInterruptedError, None: LLMConnectionError, IN_STREAM_ERROR: LLMOverloadedError}
    assert type(caught.value) is kinds[end]
    assert caught.value.retryable
    assert body_of(stream).closed


async def test_the_error_in_the_read_that_brought_content_waits_for_its_reader() -> None:
    stream = opened(delta("hel") + IN_STREAM_ERROR)
    await stream.start()
    text, error = await read(stream)
    assert text == "hel"
    assert type(error) is LLMOverloadedError


# ---------------------------------------------------------------- the outcome does not depend on how bytes are cut

ENDINGS: dict[str, tuple[Any, type[LLMException] | None]] = {
    "whole": (END, None),
    "cut": (lost, LLMStreamInterruptedError),
    "no terminal": (b"", LLMStreamInterruptedError),
    "error": (IN_STREAM_ERROR, LLMOverloadedError),
    "poison": (b"data: {nonsense\n\n", LLMProtocolError),
    "idle": (lambda: LLMTimeoutError("nothing came", phase="idle"), LLMStreamInterruptedError),
}


@pytest.mark.parametrize("ending", ENDINGS)
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
async def test_what_a_reader_sees_is_a_function_of_the_events(ending: str, cuts: list[int]) -> None:
    end, kind = ENDINGS[ending]
    end = end() if callable(end) else end
    data = delta("Grüß ") + delta("dich, ") + delta("Welt")
    data += end if isinstance(end, bytes) else b""
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    # (An empty read is the end of a body.)
    pieces: list[Any] = [data[a:b] for a, b in pairwise(places) if a < b]
    if isinstance(end, LLMException):
        pieces.append(end)
    settled: list[Settlement] = []
    stream = opened(*pieces)
    stream.on_settled(settled.append)
    await stream.start()
    text, error = await read(stream)
    assert text == "Grüß dich, Welt"
    assert (type(error) if error is not None else None) is kind
    assert len(settled) == 1
    if isinstance(error, LLMException):
        assert error.partial == text
        assert error.sent
        assert type(settled[0].error) is kind
    else:
        assert settled[0].error is None
        assert settled[0].exact
        assert settled[0].usage is not None
        assert settled[0].usage.total_tokens == 5
        assert stream.response().text == text


async def test_a_failed_stream_goes_on_failing() -> None:
    stream = opened(delta("hel"), lost())
    await stream.start()
    first = await read(stream)
    second = await read(stream)
    assert (first[0], second[0]) == ("hel", "")
    assert isinstance(second[1], LLMStreamInterruptedError)
    assert second[1] is not first[1]
    assert second[1].partial == "hel"
    with pytest.raises(LLMStreamInterruptedError):
        stream.response()


async def test_a_whole_stream_goes_on_having_ended() -> None:
    stream = opened(delta("hello"), END)
    await stream.start()
    assert await read(stream) == ("hello", None)
    assert await read(stream) == ("", None)
    stream.close()
    assert await read(stream) == ("", None)


async def test_a_failure_that_is_no_lost_connection_keeps_its_class_and_is_not_kept_alive() -> None:
    stream = opened(delta("hel"), LLMProtocolError("too large"))
    await stream.start()
    text, error = await read(stream)
    assert (text, type(error)) == ("hel", LLMProtocolError)


async def test_a_decoder_that_raises_leaves_nothing_open() -> None:
    settled: list[Settlement] = []
    stream = opened(delta("hel"))
    stream.on_settled(settled.append)

    def broken(data: bytes) -> Any:
        raise ZeroDivisionError

    decoder: Any = PROVIDER.stream_decoder(Request((), "m", stream=True))
    stream._decoder = Mock(wraps=decoder, done=False, error=None, usage=None, feed=broken)
    with pytest.raises(ZeroDivisionError):
        await stream.start()
    assert body_of(stream).closed
    assert len(settled) == 1


# ---------------------------------------------------------------- settlement


async def test_callbacks_run_once_in_order_and_at_once_when_they_come_late() -> None:
    order: list[str] = []
    stream = opened(delta("hel"), END)
    stream.on_settled(lambda _: order.append("first"))
    stream.on_settled(lambda _: order.append("second"))
    await stream.start()
    assert order == []
    await read(stream)
    stream.close()
    stream.close()
    stream.on_settled(lambda _: order.append("late"))
    assert order == ["first", "second", "late"]


async def test_it_settles_when_the_end_is_decoded_and_not_when_the_reader_gets_there() -> None:
    settled: list[Settlement] = []
    stream = opened(delta("hel") + delta("lo") + END)
    stream.on_settled(settled.append)
    await stream.start()
    assert len(settled) == 1
    assert settled[0].exact
    assert await read(stream) == ("hello", None)


@pytest.mark.parametrize("kind", [ZeroDivisionError, asyncio.CancelledError])
async def test_a_callback_that_raises_is_reported_and_the_others_still_run(kind: type[BaseException]) -> None:
    shown: list[Any] = []
    faults: list[tuple[str, type[BaseException]]] = []
    order: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: shown.append(type(context["exception"])))
    stream = opened(delta("hello"), END, report=lambda where, error: faults.append((where, type(error))))

    def broken(settlement: Settlement) -> None:
        raise kind

    stream.on_settled(broken)
    stream.on_settled(lambda _: order.append("other"))
    await stream.start()
    assert await read(stream) == ("hello", None)
    stream.on_settled(broken)
    assert order == ["other"]
    assert faults == [("on_settled", kind)] * 2
    assert shown == [kind] * 2


async def test_a_callback_that_closes_the_stream_does_not_settle_it_again() -> None:
    settled: list[Settlement] = []
    stream = opened(delta("hel"), lost())
    stream.on_settled(lambda _: stream.close())
    stream.on_settled(settled.append)
    await stream.start()
    assert isinstance((await read(stream))[1], LLMStreamInterruptedError)
    assert len(settled) == 1


# ---------------------------------------------------------------- giving up


async def test_closing_is_idempotent_closes_the_body_at_once_and_settles_as_abandoned() -> None:
    settled: list[Settlement] = []
    stream = opened(delta("hel"), delta("lo"), END)
    stream.on_settled(settled.append)
    await stream.start()
    stream.close()
    stream.close()
    assert body_of(stream).closed
    assert [type(s.error) for s in settled] == [asyncio.CancelledError]
    assert not settled[0].exact


async def test_reading_a_closed_stream_never_ends_cleanly() -> None:
    stream = opened(delta("hel"), delta("lo"), END)
    await stream.start()
    stream.close()
    text, error = await read(stream)
    assert text == "hel"
    assert isinstance(error, LLMStreamInterruptedError)
    assert not error.retryable
    assert error.partial == "hel"


async def test_leaving_the_block_of_a_stream_that_is_open_already_closes_it() -> None:
    async with opened(delta("hel"), delta("lo"), END) as answered:
        assert (await anext(answered)).text == "hel"
    assert body_of(answered).closed
    with pytest.raises(LLMStreamInterruptedError):
        await anext(answered)


async def test_what_arrives_in_the_tick_of_the_closing_is_not_delivered() -> None:
    class Late(Body):
        async def read_some(self) -> bytes:
            data = await super().read_some()
            if self.reads == 2:
                answered.close()
            return data

    answered = opened(body=Late(delta("hel"), delta("lo"), END))
    assert (await anext(answered)).text == "hel"
    with pytest.raises(LLMStreamInterruptedError):
        await anext(answered)
    assert answered.text == "hel"


async def test_a_stream_closed_while_another_task_reads_it_ends_that_read() -> None:
    stream = opened(delta("hel"), math.inf)
    await stream.start()
    reader = asyncio.create_task(read(stream))
    await FakeClock().settle()
    stream.close()
    text, error = await reader
    assert text == "hel"
    assert isinstance(error, LLMStreamInterruptedError)


async def test_a_cancelled_reader_closes_the_stream_and_is_cancelled() -> None:
    settled: list[Settlement] = []
    stream = opened(delta("hel"), math.inf)
    stream.on_settled(settled.append)
    await stream.start()
    reader = asyncio.create_task(read(stream))
    await FakeClock().settle()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert body_of(stream).closed
    assert [type(s.error) for s in settled] == [asyncio.CancelledError]
    assert isinstance((await read(stream))[1], LLMStreamInterruptedError)


async def test_it_can_be_ended_from_outside_with_a_reason() -> None:
    stream = opened(delta("hel"), math.inf)
    await stream.start()
    stream.abort(LLMOverloadedError("enough"))
    stream.abort(LLMConnectionError("twice"))
    text, error = await read(stream)
    assert (text, type(error)) == ("hel", LLMOverloadedError)


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("reading", [True, False])
async def test_the_deadline_strikes_a_blocked_reader_and_a_stream_that_nobody_reads(reading: bool) -> None:
    clock = FakeClock()
    settled: list[Settlement] = []
    stream = opened(delta("hel"), math.inf, clock=clock)
    stream.on_settled(settled.append)
    await stream.start()
    stream.set_deadline(clock.now() + 5.0)
    reader = asyncio.create_task(read(stream)) if reading else None
    await clock.advance(4.9)
    assert settled == []
    await clock.advance(0.1)
    assert [type(s.error) for s in settled] == [LLMDeadlineExceededError]
    assert body_of(stream).closed
    text, error = await (reader or read(stream))
    assert text == "hel"
    assert isinstance(error, LLMDeadlineExceededError)
    assert error.partial == "hel"
    assert clock.timers == 0


async def test_a_deadline_that_has_passed_strikes_at_once_and_one_after_the_end_never() -> None:
    clock = FakeClock()
    late = opened(delta("hel"), math.inf, clock=clock)
    await late.start()
    late.set_deadline(clock.now() - 1.0)
    await clock.settle()
    assert isinstance((await read(late))[1], LLMDeadlineExceededError)
    whole = opened(delta("hello") + END, clock=clock)
    await whole.start()
    whole.set_deadline(clock.now() + 1.0)
    assert clock.timers == 0
    await clock.advance(2.0)
    assert await read(whole) == ("hello", None)


async def test_what_follows_the_end_is_read_within_bounds() -> None:
    clock = FakeClock()
    endless = opened(delta("hello"), END, *[b": still here\n\n"] * 100, clock=clock)
    await endless.start()
    assert await read(endless) == ("hello", None)
    assert body_of(endless).reads < 20
    silent = opened(delta("hello"), END, math.inf, clock=clock)
    await silent.start()
    reader = asyncio.create_task(read(silent))
    await clock.advance(1.0)
    assert await reader == ("hello", None)
    assert clock.timers == 0


# ---------------------------------------------------------------- memory


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("ending", [*ENDINGS, "closed", "unread", "deadline"])
async def test_no_cycle_keeps_a_stream_alive(ending: str) -> None:
    clock = FakeClock()
    end = ENDINGS.get(ending, (math.inf, None))[0]
    end = end() if callable(end) else end
    with no_collector():
        stream = opened(delta("hel"), end, clock=clock)
        body = weakref.ref(body_of(stream))
        await stream.start()
        if ending == "closed":
            stream.close()
        elif ending == "deadline":
            stream.set_deadline(clock.now() + 1.0)
            await clock.advance(1.0)
        if ending != "unread":
            await read(stream)
        else:
            stream.close()
        del stream, end
        assert body() is None


@pytest.mark.parametrize("ending", ["whole", "cut", "error", "closed"])
async def test_no_cycle_keeps_a_call_and_its_prompt_alive(ending: str) -> None:
    end: Any = {"whole": END, "cut": lost(), "error": IN_STREAM_ERROR, "closed": math.inf}[ending]
    async with rig([stream(delta("hel"), end)]) as r:
        with no_collector():
            before = _alive()

            async def use() -> None:
                async with r.client.stream_complete(PROMPT) as answered:
                    if ending != "closed":
                        await read(answered)

            await use()
            assert _alive() == before


async def test_no_cycle_keeps_a_failed_call_alive() -> None:
    layers = {"retry": {"base_delay": 0}, "circuit_breaker": {"enabled": False}}
    async with rig(lambda _: lost(), config=configuration(middleware=layers)) as r:
        with no_collector():
            before = _alive()
            for _ in range(2):
                with pytest.raises(LLMConnectionError):
                    await r.client.complete(PROMPT)
            assert _alive() == before


def _alive() -> list[str]:
    """The calls and streams that live."""
    return sorted(type(o).__name__ for o in gc.get_objects() if type(o).__name__ in ("Call", "ResponseStream"))


# ---------------------------------------------------------------- as users hold them


async def test_breaking_out_of_a_plain_loop_closes_the_connection_at_once() -> None:
    async with rig([stream(delta("hel"), delta("lo"), math.inf)]) as r:
        with no_collector():
            async for chunk in r.client.stream_complete(PROMPT):
                assert chunk.text == "hel"
                break
            assert r.transport.statistics()["open"] == 0
        status = r.manager.get_status()
        assert status["providers"]["vendor"]["clients"]["in_use"] == 0
        assert status["metrics"]["requests"]["cancelled"] == 1


async def test_an_exception_in_a_plain_loop_closes_the_connection_at_once() -> None:
    async with rig([stream(delta("hel"), math.inf)]) as r:

        async def use() -> None:
            async for _ in r.client.stream_complete(PROMPT):
                raise ZeroDivisionError

        with no_collector(), pytest.raises(ZeroDivisionError):
            await use()
        assert r.transport.statistics()["open"] == 0


async def test_a_generator_of_the_users_that_is_closed_closes_the_connection() -> None:
    async with rig([stream(delta("hel"), math.inf)]) as r:

        async def words() -> AsyncGenerator[str, None]:
            async for chunk in r.client.stream_complete(PROMPT):
                yield chunk.text

        async with aclosing(words()) as own:
            assert await anext(own) == "hel"
        assert r.transport.statistics()["open"] == 0


async def test_leaving_the_block_early_closes_the_connection_at_once() -> None:
    async with rig([stream(delta("hel"), math.inf)]) as r:
        async with r.client.stream_complete(PROMPT) as answered:
            assert (await anext(answered)).text == "hel"
        assert r.transport.statistics()["open"] == 0
        assert isinstance((await read(answered))[1], LLMStreamInterruptedError)


async def test_a_stream_that_was_read_leaves_its_connection_for_the_next_call() -> None:
    async with rig([stream(delta("hello"), END), answer()]) as r:
        async for _ in r.client.stream_complete(PROMPT):
            pass
        await r.client.complete(PROMPT)
        assert [exchange.reused for exchange in r.transport.exchanges] == [False, True]


async def test_a_cut_stream_names_provider_model_key_and_attempts() -> None:
    async with rig([stream(delta("hel"), lost())]) as r, r.client.stream_complete(PROMPT) as answered:
        text, error = await read(answered)
    assert text == "hel"
    assert isinstance(error, LLMStreamInterruptedError)
    assert (error.provider, error.model, error.key_id) == ("vendor", "m", "vendor/1")
    assert [record.number for record in error.attempts] == [1]
    assert secret(1).encode() not in pickle.dumps(error)
    assert PROMPT.encode() not in pickle.dumps(error)


async def test_a_failure_before_content_is_repeated_and_after_it_is_not() -> None:
    script = [stream(lost()), stream(b""), stream(delta("hel"), lost())]
    async with rig(script, config=configuration(keys=2)) as r:
        async with r.client.stream_complete(PROMPT) as answered:
            text, error = await read(answered)
        assert text == "hel"
        assert isinstance(error, LLMStreamInterruptedError)
        assert len(r.transport.requests) == 3


async def test_a_streamed_call_is_used_once_and_sends_nothing_before() -> None:
    async with rig([stream(delta("hello"), END)]) as r:
        call = r.client.stream_complete(PROMPT)
        assert r.transport.requests == []
        assert "".join([chunk.text async for chunk in call]) == "hello"
        with pytest.raises(LLMException, match="used once"):
            await anext(aiter(call))


async def test_the_whole_answer_of_a_stream_has_everything_that_a_whole_answer_has() -> None:
    async with rig([stream(delta("hel"), delta("lo"), END)]) as r, r.client.stream_complete(PROMPT) as answered:
        with pytest.raises(LLMStreamInterruptedError, match="not been read"):
            answered.response()
        assert (await read(answered))[0] == "hello"
        whole = answered.response()
    assert (whole.text, whole.model, whole.usage.total_tokens) == ("hello", "m", 5)
    assert (whole.provider, whole.key_id, whole.request_id) == ("vendor", "vendor/1", "req-1")
    assert whole.stop_reason is StopReason.STOP
    assert repr(answered) == "<ResponseStream vendor m: whole, 3 chunks>"


async def test_a_short_stream_that_has_settled_before_the_layers_registered_is_paid_and_counted() -> None:
    async with rig([stream(delta("hello") + END)]) as r:
        async with r.client.stream_complete(PROMPT) as answered:
            pass
        assert answered.settled
        status = r.manager.get_status()
        assert status["metrics"]["tokens"] == {"input": 3, "output": 2, "total": 5}
        assert status["providers"]["vendor"]["clients"]["in_use"] == 0


async def test_many_streams_at_once_do_not_mix() -> None:
    def script(request: Any) -> Any:
        return stream(*(delta(f"{key_of(request)}") for _ in range(5)), END)

    async with rig(script, config=configuration(keys=3)) as r:

        async def one() -> list[str]:
            return [chunk.text async for chunk in r.client.stream_complete(PROMPT) if chunk.text]

        got = await asyncio.gather(*(one() for _ in range(9)))
    assert sorted(got) == sorted([str(key)] * 5 for key in (1, 2, 3) for _ in range(3))
