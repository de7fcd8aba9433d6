"""The handle that users hold."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import msgspec
import pytest

from llm.core.exceptions import LLMException, LLMInvalidRequestError, LLMModelNotFoundError
from llm.core.types import Message, MessageRole
from llm.testing.transport import Scripted
from llm.transports.base import HTTPRequest
from tests.core.rig import END, JSON, PROMPT, answer, configuration, delta, model_of, rig, secret, stream


def sent(r: Any, index: int = -1) -> dict[str, Any]:
    """The body of a request, as the vendor got it."""
    body: dict[str, Any] = msgspec.json.decode(r.transport.requests[index].body)
    return body


async def test_a_chat_is_a_string_in_and_a_string_out() -> None:
    async with rig([answer("I am fine")]) as r:
        assert await r.client.chat("How are you?") == "I am fine"
        assert sent(r)["messages"] == [{"role": "user", "content": "How are you?"}]


async def test_a_conversation_is_sent_in_its_order() -> None:
    messages = [
        Message(MessageRole.SYSTEM, "You are helpful"),
        Message(MessageRole.USER, "What is Python?"),
        Message(MessageRole.ASSISTANT, "A snake"),
        Message(MessageRole.USER, "The other one"),
    ]
    async with rig([answer()]) as r:
        await r.client.complete(messages, temperature=0.7, max_tokens=200, stop=["x", "y"])
        body = sent(r)
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert (body["temperature"], body["max_tokens"], body["stop"]) == (0.7, 200, ["x", "y"])


async def test_a_stream_is_a_loop_or_a_block() -> None:
    async with rig(lambda _: stream(delta("hel"), delta("lo"), END)) as r:
        assert "".join([str(chunk) async for chunk in r.client.stream_complete(PROMPT)]) == "hello"
        async with r.client.stream_complete(PROMPT) as answered:
            assert "".join([str(chunk) async for chunk in answered]) == "hello"
            assert answered.usage is not None
            assert answered.usage.total_tokens == 5


async def test_a_handle_needs_no_await_and_works_with_and_without_a_block() -> None:
    async with rig(lambda _: answer()) as r:
        assert await r.manager.get_client().chat(PROMPT) == "hello"
        async with r.manager.get_client() as client:
            assert await client.chat(PROMPT) == "hello"
        assert await client.chat(PROMPT) == "hello", "leaving the block has closed nothing"
    assert repr(client) == "<LLMClient vendor any model>"
    assert repr(r.manager.get_client(model="m")) == "<LLMClient vendor m>"


async def test_a_clients_defaults_hold_for_every_call_and_a_call_may_differ() -> None:
    async with rig(lambda _: answer()) as r:
        client = r.manager.get_client(temperature=0.1, max_tokens=5)
        await client.chat(PROMPT)
        assert (sent(r)["temperature"], sent(r)["max_tokens"]) == (0.1, 5)
        await client.chat(PROMPT, temperature=0.9)
        assert (sent(r)["temperature"], sent(r)["max_tokens"]) == (0.9, 5)
        await client.chat(PROMPT, temperature=None)
        assert "temperature" not in sent(r)


async def test_a_wrong_default_is_refused_when_the_handle_is_made() -> None:
    wrong: dict[str, Any] = {"temprature": 1}
    async with rig() as r:
        with pytest.raises(LLMInvalidRequestError, match="did you mean 'temperature'"):
            r.manager.get_client(**wrong)


async def test_a_misspelt_option_is_refused_before_anything_is_sent_or_counted() -> None:
    wrong: dict[str, Any] = {"max_token": 1}
    async with rig() as r:
        with pytest.raises(LLMInvalidRequestError, match="did you mean 'max_tokens'"):
            await r.client.complete(PROMPT, **wrong)
        with pytest.raises(LLMInvalidRequestError, match="did you mean 'max_tokens'"):
            r.client.stream_complete(PROMPT, **wrong)
        assert r.transport.requests == []


async def test_a_model_named_by_the_call_comes_before_the_clients() -> None:
    def echo(request: HTTPRequest) -> Scripted:
        return answer(model=model_of(request))

    config = configuration(keys=2, models=["a", "b"], model_aliases={"fast": "b"})
    async with rig(echo, config=config) as r:
        client = r.manager.get_client(model="a")
        assert (await client.complete(PROMPT)).model == "a"
        assert (await client.complete(PROMPT, model="b")).model == "b"
        assert (await client.complete(PROMPT, model="fast")).model == "b"
        assert (await r.manager.get_client(model="fast").complete(PROMPT)).model == "b"
        with pytest.raises(LLMModelNotFoundError):
            await client.complete(PROMPT, model="c")
        with pytest.raises(LLMModelNotFoundError):
            r.manager.get_client(model="c")


async def test_extra_body_and_headers_of_provider_and_call_are_sent_as_they_are() -> None:
    config = configuration(extra_body={"tier": "flex", "a": 1}, extra_headers={"X-Team": "research"})
    async with rig([answer()], config=config) as r:
        await r.client.complete(PROMPT, extra_body={"a": 2, "b": [3]}, extra_headers={"X-Trace": "t"})
        body = sent(r)
        headers = r.transport.requests[0].headers
    assert (body["tier"], body["a"], body["b"]) == ("flex", 2, [3])
    assert (headers["x-team"], headers["x-trace"]) == ("research", "t")


async def test_an_answer_says_who_gave_it_and_keeps_the_vendors_reply() -> None:
    async with rig([answer()]) as r:
        got = await r.client.complete(PROMPT)
    assert (got.provider, got.key_id, got.request_id, got.id) == ("vendor", "vendor/1", "req-1", "chatcmpl-1")
    assert got.raw["choices"][0]["message"]["content"] == "hello"
    assert got.usage.total_tokens == 5
    assert secret(1) not in repr(got)


async def test_calls_have_names_of_their_own() -> None:
    async with rig(lambda _: answer()) as r:
        with r.manager.events.subscribe() as told:
            await asyncio.gather(*(r.client.chat(PROMPT) for _ in range(10)))
            assert len({event.call_id for event in told.drain()}) == 10


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_cancelled_call_gives_everything_back(streaming: bool) -> None:
    script = stream(delta("hel"), math.inf) if streaming else Scripted(200, JSON, b"", delay=math.inf)
    async with rig([script, answer()], config=configuration(pool={"max_size": 1})) as r:

        async def use() -> None:
            if streaming:
                async for _ in r.client.stream_complete(PROMPT):
                    pass
            else:
                await r.client.complete(PROMPT)

        call = asyncio.create_task(use())
        await r.clock.settle()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert r.transport.statistics()["open"] == 0
        assert await r.client.chat(PROMPT) == "hello", "the only client is free again"
        metrics = r.manager.get_status()["metrics"]["requests"]
        assert (metrics["cancelled"], metrics["successful"], metrics["failed"]) == (1, 1, 0)


async def test_a_layer_that_raises_after_a_stream_was_opened_leaves_it_closed() -> None:
    class Broken:
        async def __call__(self, call: Any, handler: Any) -> Any:
            await handler(call)
            raise ZeroDivisionError

    async with rig([stream(delta("hel"), math.inf)], middleware={"broken": Broken()}) as r:
        with pytest.raises(ZeroDivisionError):
            await anext(aiter(r.client.stream_complete(PROMPT)))
        assert r.transport.statistics()["open"] == 0
        assert r.manager.get_status()["providers"]["vendor"]["clients"]["in_use"] == 0


async def test_a_lone_surrogate_is_the_requests_fault() -> None:
    async with rig() as r:
        with pytest.raises(LLMInvalidRequestError, match="cannot be written as JSON"):
            await r.client.chat("\ud800")


async def test_a_stream_whose_opening_failed_raises_what_failed() -> None:
    async with rig([Scripted(400, JSON, b'{"error": {"message": "bad"}}')]) as r:
        with pytest.raises(LLMException, match="bad"):
            async with r.client.stream_complete(PROMPT):
                raise AssertionError("not reached")


async def test_the_iterator_of_a_plain_loop_is_an_iterator_and_can_be_handed_on() -> None:
    async with rig([stream(delta("hel"), delta("lo"), END)]) as r:
        chunks = aiter(r.client.stream_complete(PROMPT))
        assert (await anext(chunks)).text == "hel"
        assert "".join([chunk.text async for chunk in chunks]) == "lo"
