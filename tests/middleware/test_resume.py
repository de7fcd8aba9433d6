"""Streams that break off after content: raised, made anew, or gone on with."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llm.core.events import Event, StreamResumed
from llm.core.exceptions import (
    LLMConfigurationError,
    LLMConnectionError,
    LLMDeadlineExceededError,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMStreamInterruptedError,
)
from llm.core.stream import ResponseStream
from llm.core.types import Message, MessageRole, StopReason
from llm.testing.transport import Scripted
from tests.core.rig import END, PROMPT, Rig, answer, configuration, delta, failure, rig, stream
from tests.middleware.test_fallback import Vendors, three

CUT = LLMConnectionError("the connection was lost")


def broken(*texts: str) -> Scripted:
    """A stream that is cut after *texts*."""
    return stream(*(delta(text) for text in texts), CUT)


def whole(*texts: str) -> Scripted:
    return stream(*(delta(text) for text in texts), END)


async def read(streamed: ResponseStream, seen: list[str] | None = None) -> list[str]:
    """The pieces' texts, which *seen* has as far as they came; a restart shows as ``↺``."""
    seen = [] if seen is None else seen
    async for chunk in streamed:
        if chunk.text or chunk.restart:
            seen.append("↺" if chunk.restart else chunk.text)
    return seen


def sent(r: Rig, number: int = -1) -> list[dict[str, Any]]:
    """The messages of one request."""
    messages: list[dict[str, Any]] = json.loads(r.transport.requests[number].body)["messages"]
    return messages


# ---------------------------------------------------------------- raise


async def test_unless_asked_otherwise_a_cut_stream_is_an_error_with_what_had_come() -> None:
    seen: list[str] = []
    async with rig([broken("one ", "two "), whole("other")]) as r:
        async with r.client.stream_complete(PROMPT) as streamed:
            with pytest.raises(LLMStreamInterruptedError) as caught:
                await read(streamed, seen)
        assert len(r.transport.requests) == 1
    assert (seen, caught.value.partial) == (["one ", "two "], "one two ")


# ---------------------------------------------------------------- restart


async def test_restart_says_so_and_then_gives_the_whole_answer() -> None:
    async with (
        rig([broken("one ", "two "), whole("eins ", "zwei")]) as r,
        r.client.stream_complete(PROMPT, on_interrupt="restart") as streamed,
    ):
        assert await read(streamed) == ["one ", "two ", "↺", "eins ", "zwei"]
        response = streamed.response()
    assert (response.text, response.resumed, response.stop_reason) == ("eins zwei", "restart", StopReason.STOP)
    (why,) = response.failures
    assert (why.provider, why.error) == ("vendor", "LLMStreamInterruptedError")
    assert response.usage.output_tokens == 2


async def test_it_can_be_the_configurations_choice_and_a_call_may_still_refuse() -> None:
    config = configuration(middleware={"resume": {"on_interrupt": "restart"}})
    async with rig([broken("a"), whole("b"), broken("c")], config=config) as r:
        assert [str(c) async for c in r.client.stream_complete(PROMPT) if c.text] == ["a", "b"]
        with pytest.raises(LLMStreamInterruptedError):
            async for _ in r.client.stream_complete(PROMPT, on_interrupt="raise"):
                pass


async def test_the_usage_is_that_of_all_parts() -> None:
    def told(tokens: tuple[int, int]) -> bytes:
        usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
        return b"data: " + json.dumps({"id": "c", "model": "m", "choices": [], "usage": usage}).encode() + b"\n\n"

    async with rig([stream(delta("a"), told((3, 1)), CUT), whole("b")]) as r:
        async with r.client.stream_complete(PROMPT, on_interrupt="restart") as streamed:
            await read(streamed)
            usage = streamed.response().usage
        totals = r.manager.get_status()["metrics"]["tokens"]
    assert (usage.input_tokens, usage.output_tokens) == (6, 3)
    assert (totals["input"], totals["output"]) == (6, 3)


async def test_restarts_are_retries_and_come_to_an_end_with_them() -> None:
    seen: list[str] = []
    async with rig([broken("a"), broken("b"), broken("c"), whole("d")]) as r:
        async with r.client.stream_complete(PROMPT, on_interrupt="restart") as streamed:
            with pytest.raises(LLMStreamInterruptedError) as caught:
                await read(streamed, seen)
        assert seen == ["a", "↺", "b", "↺", "c"]
        assert len(r.transport.requests) == 3
        assert caught.value.partial == "c"
        assert len(caught.value.attempts) == 3
        status = r.manager.get_status()
    assert status["providers"]["vendor"]["clients"]["in_use"] == 0
    assert (status["metrics"]["requests"]["failed"], status["metrics"]["attempts"]) == (1, 3)


async def test_a_provider_that_has_no_retries_left_is_not_asked_again() -> None:
    config = configuration(middleware={"retry": {"budget_share": 0, "budget_per_second": 0, "budget_most": 0}})
    async with rig([broken("a"), whole("b")], config=config) as r:
        with pytest.raises(LLMStreamInterruptedError):
            async for _ in r.client.stream_complete(PROMPT, on_interrupt="restart"):
                pass
        assert len(r.transport.requests) == 1


async def test_without_a_retry_layer_a_stream_is_resumed_once() -> None:
    config = configuration(middleware={"retry": {"enabled": False}})
    async with rig([broken("a"), broken("b"), whole("c")], config=config) as r:
        with pytest.raises(LLMStreamInterruptedError):
            async for _ in r.client.stream_complete(PROMPT, on_interrupt="restart"):
                pass
        assert len(r.transport.requests) == 2


async def test_the_whole_way_is_gone_again_retries_and_chain_included() -> None:
    told: list[Event] = []
    vendors = Vendors(vendor=[broken("from one"), failure(503), failure(503)], second=whole("from two"))
    async with rig(vendors, config=three()) as r:
        r.manager.events.listen(told.append, StreamResumed)
        async with r.client.stream_complete(PROMPT, on_interrupt="restart") as streamed:
            assert await read(streamed) == ["from one", "↺", "from two"]
            response = streamed.response()
    assert vendors.asked == ["vendor", "vendor", "vendor", "second"]
    assert (response.provider, response.key_id) == ("second", "second/1")
    assert [why.error for why in response.failures] == ["LLMStreamInterruptedError", "LLMOverloadedError"]
    (event,) = told
    assert isinstance(event, StreamResumed)
    assert (event.how, event.error, event.provider) == ("restart", "LLMStreamInterruptedError", "vendor")


async def test_when_the_restart_fails_the_interruption_is_raised_with_the_reason() -> None:
    async with rig([broken("a"), failure(400, "no more")]) as r:
        with pytest.raises(LLMStreamInterruptedError) as caught:
            async for _ in r.client.stream_complete(PROMPT, on_interrupt="restart"):
                pass
    assert caught.value.partial == "a"
    assert isinstance(caught.value.__cause__, LLMInvalidRequestError)
    assert [record.status for record in caught.value.attempts] == [None, 400]


async def test_an_error_in_the_stream_is_a_reason_as_well() -> None:
    error = b'data: {"error":{"message":"busy","type":"server_error","code":503}}\n\n'
    async with (
        rig([stream(delta("a"), error), whole("b")]) as r,
        r.client.stream_complete(PROMPT, on_interrupt="restart") as streamed,
    ):
        assert await read(streamed) == ["a", "↺", "b"]


async def test_a_deadline_is_none() -> None:
    async with rig([stream(delta("a"), 100.0), whole("b")]) as r:
        task = asyncio.ensure_future(_all(r, on_interrupt="restart", timeout=5))
        await r.clock.advance(5)
        with pytest.raises(LLMDeadlineExceededError):
            await task
        assert len(r.transport.requests) == 1


async def _all(r: Rig, **options: Any) -> list[str]:
    return [str(chunk) async for chunk in r.client.stream_complete(PROMPT, **options)]


async def test_left_in_the_middle_of_the_second_part_nothing_is_kept() -> None:
    async with rig([broken("a"), stream(delta("b"), 100.0)]) as r:
        async with r.client.stream_complete(PROMPT, on_interrupt="restart") as streamed:
            async for chunk in streamed:
                if chunk.text == "b":
                    break
        status = r.manager.get_status()["providers"]["vendor"]
        assert (status["clients"]["in_use"], status["connections"]["open"]) == (0, 0)


async def test_cancelled_while_it_waits_for_the_second_part_nothing_is_kept() -> None:
    async with rig([broken("a"), answer(delay=100.0)]) as r:
        task = asyncio.ensure_future(_all(r, on_interrupt="restart"))
        await r.clock.advance(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        status = r.manager.get_status()["providers"]["vendor"]
        assert (status["clients"]["in_use"], status["connections"]["open"]) == (0, 0)


# ---------------------------------------------------------------- continue


GOES_ON = {"*": {"prefill": True}}


async def test_continue_hands_the_model_its_beginning_and_gives_the_rest() -> None:
    config = configuration(capabilities=GOES_ON)
    async with rig([broken("one two "), whole(" three", " four")], config=config) as r:
        async with r.client.stream_complete(PROMPT, on_interrupt="continue") as streamed:
            pieces = await read(streamed)
            response = streamed.response()
        assert sent(r)[-1] == {"role": "assistant", "content": "one two"}
        assert sent(r)[0]["content"] == PROMPT
    # The blank at the seam, which vendors do not take, was there already.
    assert pieces == ["one two ", "three", " four"]
    assert (response.text, response.resumed) == ("one two three four", "continue")
    assert response.usage.input_tokens == 3


async def test_a_beginning_of_the_callers_stays_in_front() -> None:
    messages = [Message(MessageRole.USER, PROMPT), Message(MessageRole.ASSISTANT, "Once ")]
    config = configuration(capabilities=GOES_ON)
    async with rig([broken("upon"), whole(" a time")], config=config) as r:
        async for _ in r.client.stream_complete(messages, on_interrupt="continue"):
            pass
        assert [message["content"] for message in sent(r)] == [PROMPT, "Once upon"]


@pytest.mark.parametrize("what", ["reasoning_content", "tool_calls"])
async def test_thinking_and_tool_calls_are_never_gone_on_with(what: str) -> None:
    call = [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{"}}]
    more = {"reasoning_content": "hm"} if what == "reasoning_content" else {"tool_calls": call}
    piece = json.dumps({"id": "c", "model": "m", "choices": [{"index": 0, "delta": more}]}).encode()
    script = [stream(b"data: " + piece + b"\n\n", delta("text"), CUT), whole("b")]
    async with rig(script, config=configuration(capabilities=GOES_ON)) as r:
        with pytest.raises(LLMStreamInterruptedError):
            async for _ in r.client.stream_complete(PROMPT, on_interrupt="continue"):
                pass
        assert len(r.transport.requests) == 1


async def test_a_target_that_takes_no_beginning_is_passed_over() -> None:
    config = three()
    config["providers"]["second"]["capabilities"] = GOES_ON
    vendors = Vendors(vendor=[broken("one ")], second=whole("two"))
    async with (
        rig(vendors, config=config) as r,
        r.client.stream_complete(PROMPT, on_interrupt="continue") as streamed,
    ):
        assert await read(streamed) == ["one ", "two"]
        response = streamed.response()
    assert vendors.asked == ["vendor", "second"]
    assert response.provider == "second"


async def test_when_no_target_takes_a_beginning_the_interruption_is_raised_and_none_was_sent() -> None:
    vendors = Vendors(vendor=[broken("one ")])
    async with rig(vendors, config=three()) as r:
        with pytest.raises(LLMStreamInterruptedError) as caught:
            async for _ in r.client.stream_complete(PROMPT, on_interrupt="continue"):
                pass
    assert vendors.asked == ["vendor"]
    assert caught.value.partial == "one "
    assert [why.provider for why in caught.value.failures] == ["vendor", "vendor", "second", "third"]


# ---------------------------------------------------------------- the option itself


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "openai_responses"])
async def test_neither_the_chain_nor_this_option_is_told_to_the_vendor(dialect: str) -> None:
    async with rig([failure(400)], config=configuration(dialect=dialect)) as r:
        with pytest.raises(LLMInvalidRequestError):
            await r.client.complete(PROMPT, fallback=(), on_interrupt="restart")
        body = json.loads(r.transport.requests[0].body)
    assert not {"fallback", "on_interrupt"} & body.keys()


async def test_other_words_are_refused() -> None:
    with pytest.raises(LLMConfigurationError, match=r"on_interrupt.*raise"):
        async with rig(config=configuration(middleware={"resume": {"on_interrupt": "again"}})):
            pass
    async with rig() as r:
        with pytest.raises(LLMInvalidRequestError, match="on_interrupt"):
            r.client.stream_complete(PROMPT, on_interrupt="again")  # type: ignore[arg-type]


async def test_whole_answers_are_not_its_affair() -> None:
    async with rig([failure(503), answer()]) as r:
        assert (await r.client.complete(PROMPT, on_interrupt="restart")).resumed is None
    with pytest.raises(LLMOverloadedError):
        async with rig(lambda _: failure(503)) as r:
            await r.client.complete(PROMPT, on_interrupt="restart")


async def test_an_answer_without_words_is_whole_as_well() -> None:
    async with (
        rig([stream(END)]) as r,
        r.client.stream_complete(PROMPT, on_interrupt="restart") as streamed,
    ):
        assert await read(streamed) == []
        assert streamed.response().text == ""


async def test_cancelled_while_it_reads_a_part_nothing_is_kept() -> None:
    async with rig([stream(delta("a"), 100.0)]) as r:
        task = asyncio.ensure_future(_all(r, on_interrupt="restart"))
        await r.clock.advance(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        status = r.manager.get_status()["providers"]["vendor"]
        assert (status["clients"]["in_use"], status["connections"]["open"]) == (0, 0)


async def test_closed_by_another_task_while_it_waits_for_the_next_part_that_part_is_closed_too() -> None:
    async with rig([broken("a"), stream(5.0, delta("b"), 100.0)]) as r:
        async with r.client.stream_complete(PROMPT, on_interrupt="restart") as streamed:
            task = asyncio.ensure_future(read(streamed))
            await r.clock.advance(1)
            streamed.close()
            await r.clock.advance(5)
            with pytest.raises(LLMStreamInterruptedError):
                await task
        status = r.manager.get_status()["providers"]["vendor"]
        assert (status["clients"]["in_use"], status["connections"]["open"]) == (0, 0)


async def test_closed_while_it_reads_what_comes_is_nobodys() -> None:
    seen: list[str] = []
    async with (
        rig([stream(delta("a"), 5.0, delta("b"), END)]) as r,
        r.client.stream_complete(PROMPT, on_interrupt="restart") as streamed,
    ):
        task = asyncio.ensure_future(read(streamed, seen))
        await r.clock.advance(1)
        streamed.close()
        with pytest.raises(LLMStreamInterruptedError):
            await task
    assert seen == ["a"]


async def test_a_restart_waits_as_long_as_a_retry() -> None:
    error = b'data: {"error":{"message":"busy","type":"server_error","code":503}}\n\n'
    async with rig([stream(delta("a"), error), whole("b")], random=lambda: 0.5) as r:
        task = asyncio.ensure_future(_all(r, on_interrupt="restart"))
        await r.clock.advance(0.2)
        assert len(r.transport.requests) == 1
        await r.clock.advance(0.1)
        assert "".join(await task) == "ab"
