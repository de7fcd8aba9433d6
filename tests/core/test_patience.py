"""What a stream must bring, and by when: events, a first token, so many tokens a second."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm.core.exceptions import LLMException, LLMStreamInterruptedError, LLMTimeoutError
from tests.core.rig import END, PROMPT, Rig, answer, configuration, delta, rig, stream

COMMENT = b": still here\n\n"
NAMELESS = b'data: {"id":"c","model":"m","choices":[]}\n\n'


def config(**timeouts: Any) -> dict[str, Any]:
    return configuration(timeouts=timeouts, middleware={"retry": {"enabled": False}})


async def read(r: Rig) -> tuple[str, LLMException | None]:
    """What came, and what it ended with."""
    seen = []
    try:
        async for chunk in r.client.stream_complete(PROMPT):
            seen.append(chunk.text)
    except LLMException as error:
        return "".join(seen), error
    return "".join(seen), None


async def after(r: Rig, seconds: float) -> tuple[str, LLMException | None]:
    """The same, once *seconds* have passed, which it must have needed."""
    task = asyncio.ensure_future(read(r))
    await r.clock.advance(seconds - 0.01)
    assert not task.done()
    await r.clock.advance(0.02)
    return await asyncio.wait_for(task, 5)


async def test_bytes_that_complete_no_event_do_not_keep_a_stream_alive() -> None:
    drip = [piece for _ in range(100) for piece in (COMMENT, 0.3)]
    async with rig([stream(delta("hel"), *drip, END)], config=config(idle=2)) as r:
        text, error = await after(r, 2.0)
    assert text == "hel"
    assert isinstance(error, LLMStreamInterruptedError)
    assert isinstance(error.__cause__, LLMTimeoutError)
    assert error.__cause__.phase == "idle"
    assert error.partial == "hel"


async def test_an_event_cut_into_single_bytes_is_none_until_it_is_whole() -> None:
    drip = [piece for byte in delta("lo") for piece in (bytes([byte]), 0.3)]
    async with rig([stream(delta("hel"), *drip, END)], config=config(idle=2)) as r:
        text, error = await after(r, 2.0)
    assert text == "hel"
    assert isinstance(error, LLMStreamInterruptedError)


async def test_before_content_it_is_a_timeout_which_may_be_repeated() -> None:
    drip = [piece for _ in range(100) for piece in (COMMENT, 0.3)]
    async with rig([stream(*drip)], config=config(idle=2)) as r:
        text, error = await after(r, 2.0)
    assert text == ""
    assert type(error) is LLMTimeoutError
    assert (error.phase, error.retryable, error.sent) == ("idle", True, True)


async def test_an_event_of_any_kind_keeps_it_alive() -> None:
    drip = [piece for _ in range(10) for piece in (1.5, COMMENT, NAMELESS)]
    async with rig([stream(delta("hel"), *drip, delta("lo"), END)], config=config(idle=2)) as r:
        text, error = await after(r, 15.0)
    assert (text, error) == ("hello", None)


async def test_a_slow_reader_is_no_slow_vendor() -> None:
    async with (
        rig([stream(delta("hel"), COMMENT + delta("lo"), END)], config=config(idle=2)) as r,
        r.client.stream_complete(PROMPT) as streamed,
    ):
        seen = [str(await anext(streamed))]
        await r.clock.advance(100)
        seen += [str(chunk) async for chunk in streamed]
    assert "".join(seen) == "hello"


async def test_a_stream_slower_than_its_minimum_is_cut_off() -> None:
    # A token a second, where two are the least.
    drip = [piece for _ in range(60) for piece in (delta("word"), 1.0)]
    async with rig([stream(*drip, END)], config=config(min_tokens_per_second=2)) as r:
        text, error = await after(r, 10.0)
    assert text == "word" * 11
    assert isinstance(error, LLMStreamInterruptedError)
    assert isinstance(error.__cause__, LLMTimeoutError)
    assert error.__cause__.phase == "rate"
    assert "min_tokens_per_second (2)" in str(error)


async def test_one_that_is_fast_enough_is_not() -> None:
    drip = [piece for _ in range(60) for piece in (delta("word" * 3), 1.0)]
    async with rig([stream(*drip, END)], config=config(min_tokens_per_second=2)) as r:
        text, error = await after(r, 60.0)
    assert (len(text), error) == (60 * 12, None)


@pytest.mark.parametrize("attempt", [None, 600])
async def test_the_first_token_has_a_time_of_its_own(attempt: float | None) -> None:
    async with rig([stream(NAMELESS, 30.0, delta("late"), END)], config=config(first_token=3, attempt=attempt)) as r:
        text, error = await after(r, 3.0)
    assert text == ""
    assert type(error) is LLMTimeoutError
    assert (error.phase, error.retryable) == ("first_token", True)


async def test_whole_answers_have_none() -> None:
    async with rig([answer(delay=30.0)], config=config(first_token=3)) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT))
        await r.clock.advance(31)
        assert (await task).text == "hello"
