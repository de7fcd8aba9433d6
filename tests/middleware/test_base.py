"""What all layers share: the record of a call, and how layers become one handler."""

from __future__ import annotations

from collections.abc import Awaitable

from llm.core.types import LLMResponse
from llm.middleware.base import Call, Handler, Reply, compose

from .fakes import answer, ask


def test_a_call_shows_itself_without_its_prompt() -> None:
    assert repr(ask("a private matter", model="m", name="7")) == "<Call 7 fake m, 0 attempts>"
    assert repr(ask("a private matter", name="8")) == "<Call 8 fake any model, 0 attempts>"


async def test_the_first_layer_is_the_outermost_and_sees_the_reply_last() -> None:
    seen: list[str] = []

    class Layer:
        def __init__(self, name: str) -> None:
            self.name = name

        async def __call__(self, call: Call, handler: Handler, /) -> Reply:
            seen.append(f"{self.name} down")
            reply = await handler(call)
            seen.append(f"{self.name} up")
            return reply

    async def vendor(call: Call) -> Reply:
        seen.append("vendor")
        return answer()

    reply = await compose([Layer("outer"), Layer("inner")], vendor)(ask())
    assert isinstance(reply, LLMResponse)
    assert seen == ["outer down", "inner down", "vendor", "inner up", "outer up"]


async def test_a_layer_may_be_a_plain_function_that_hands_on_what_is_awaited() -> None:
    def through(call: Call, handler: Handler, /) -> Awaitable[Reply]:
        return handler(call)

    async def vendor(call: Call) -> Reply:
        return answer(3)

    reply = await compose([through], vendor)(ask())
    assert isinstance(reply, LLMResponse)
    assert reply.usage.input_tokens == 3


def test_what_an_attempt_has_not_opened_need_not_be_closed() -> None:
    call = ask()
    call.close_stream()
    call.close_stream()
    assert call.stream is None
