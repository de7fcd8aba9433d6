"""The loop of an agent: every call of a tool is answered, whatever becomes of it, and every round is a call."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import msgspec
import pydantic
import pytest

from llm.core.content import Image, Text, ToolCall, ToolResult
from llm.core.exceptions import LLMDeadlineExceededError, LLMInvalidRequestError, LLMOverloadedError
from llm.core.tools import Tool
from llm.core.types import LLMResponse, MessageRole
from tests.core.rig import PROMPT, Rig, answer, asking, configuration, failure, rig

PNG = b"\x89PNG\r\n\x1a\n"


def results(r: Rig, index: int = -1) -> list[str]:
    """What the tools have answered, as the vendor was told."""
    body = msgspec.json.decode(r.transport.requests[index].body)
    return [message["content"] for message in body["messages"] if message["role"] == "tool"]


def add(a: int, b: int = 1) -> int:
    """Adds."""
    return a + b


async def shout(text: str) -> str:
    return text.upper()


async def test_tools_are_run_until_the_model_answers() -> None:
    async with rig([asking(("add", {"a": 2}), ("shout", {"text": "hi"}), text="I work."), answer("3 and HI")]) as r:
        run = await r.client.run_tools(PROMPT, tools=[add, shout])
        assert results(r) == ["3", "HI"]
    assert (run.finished, run.rounds, str(run)) == (True, 2, "3 and HI")
    assert (run.usage.input_tokens, run.usage.output_tokens) == (6, 4)
    roles = [MessageRole.USER, MessageRole.ASSISTANT, MessageRole.TOOL, MessageRole.ASSISTANT]
    assert [message.role for message in run.messages] == roles
    assert run.messages[1].content == (
        Text("I work."),
        ToolCall("call_1", "add", '{"a":2}'),
        ToolCall("call_2", "shout", '{"text":"hi"}'),
    )


async def test_without_a_call_the_first_answer_is_the_last() -> None:
    async with rig([answer("no need")]) as r:
        run = await r.client.run_tools(PROMPT, tools=[add])
    assert (run.finished, run.rounds, str(run)) == (True, 1, "no need")


def fails(a: int) -> int:
    raise RuntimeError("out of order")


def runs_out() -> object:
    return next(iter(()))


async def gives_up() -> None:
    raise TimeoutError("the database did not answer")


def misses() -> None:
    raise FileNotFoundError("no \udcff.txt")


def _refuses(call: ToolCall) -> bool:
    return False


def _explains(call: ToolCall) -> str:
    return "not on Sundays"


async def _thinks_it_over(call: ToolCall) -> bool:
    await asyncio.sleep(0)
    return True


@pytest.mark.parametrize(
    ("name", "given", "approve", "told"),
    [
        ("fails", {"a": 1}, None, "RuntimeError: out of order"),
        ("runs_out", {}, None, "StopIteration"),
        ("gives_up", {}, None, "TimeoutError: the database did not answer"),
        ("misses", {}, None, "FileNotFoundError: no ?.txt"),
        ("add", {"a": "x"}, None, "Expected `int`, got `str` - at `$.a`"),
        ("add", '{"a":', None, "the arguments of add are no JSON"),
        ("add", "[1]", None, "the arguments are no JSON object"),
        ("multiply", {"a": 1}, None, "there is no tool 'multiply'"),
        ("add", {"a": 1}, _refuses, "the user does not allow this call"),
        ("add", {"a": 1}, _explains, "not on Sundays"),
        ("add", {"a": 1}, _thinks_it_over, "2"),
    ],
)
async def test_what_goes_wrong_in_a_tool_is_told_to_the_model(name: str, given: Any, approve: Any, told: str) -> None:
    async with rig([asking((name, given)), answer("well")]) as r:
        tools = [add, fails, runs_out, gives_up, misses]
        run = await r.client.run_tools(PROMPT, tools=tools, approve=approve, timeout=60.0, tool_timeout=60.0)
        assert len(results(r)) == 1
        assert told in results(r)[0]
    assert run.finished
    result = run.messages[2].content[0]
    assert isinstance(result, ToolResult)
    assert result.error == (told != "2")


async def test_a_tool_that_takes_too_long_is_given_up() -> None:
    stopped = asyncio.Event()

    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with rig([asking(("slow", {})), answer("well")]) as r:
        task = asyncio.create_task(r.client.run_tools(PROMPT, tools=[slow], tool_timeout=5.0))
        await r.clock.advance(4.9)
        assert not stopped.is_set()
        await r.clock.advance(0.2)
        assert (await task).finished
        assert stopped.is_set()
        assert results(r) == ["the tool took too long"]


async def test_one_deadline_holds_over_all_rounds() -> None:
    async def slow() -> None:
        await asyncio.Event().wait()

    async with rig([asking(("slow", {}))]) as r:
        task = asyncio.create_task(r.client.run_tools(PROMPT, tools=[slow], timeout=5.0, tool_timeout=60.0))
        await r.clock.advance(5.1)
        with pytest.raises(LLMDeadlineExceededError):
            await task
        assert len(r.transport.requests) == 1


async def test_the_deadline_holds_for_who_approves() -> None:
    async def never(call: ToolCall) -> bool:
        await asyncio.Event().wait()
        return True

    async with rig([asking(("add", {"a": 1}))]) as r:
        task = asyncio.create_task(r.client.run_tools(PROMPT, tools=[add], timeout=5.0, approve=never))
        await r.clock.advance(5.1)
        with pytest.raises(LLMDeadlineExceededError):
            await task


async def test_what_goes_wrong_in_approving_is_the_callers() -> None:
    def breaks(call: ToolCall) -> bool:
        raise TimeoutError("nobody at the desk")

    async with rig([asking(("add", {"a": 1}))]) as r:
        with pytest.raises(TimeoutError, match="nobody at the desk"):
            await r.client.run_tools(PROMPT, tools=[add], timeout=5.0, approve=breaks)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ({"max_rounds": 0}, "max_rounds: expected a positive number, got 0"),
        ({"max_concurrency": 0}, "max_concurrency: expected a positive number, got 0"),
        ({"tool_timeout": 0.0}, "tool_timeout: expected a positive number of seconds, got 0.0"),
    ],
)
async def test_bounds_that_let_nothing_happen_are_refused(option: dict[str, Any], complaint: str) -> None:
    async with rig([]) as r:
        with pytest.raises(LLMInvalidRequestError, match=complaint):
            await r.client.run_tools(PROMPT, tools=[add], **option)
        assert r.transport.requests == []


async def test_at_most_so_many_tools_run_at_a_time() -> None:
    running = most = 0
    gate = asyncio.Event()

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1
        return number

    async with rig([asking(*[("work", {"number": n}) for n in range(6)]), answer("done")]) as r:
        task = asyncio.create_task(r.client.run_tools(PROMPT, tools=[work], max_concurrency=2))
        for _ in range(20):
            await asyncio.sleep(0)
        assert running == 2
        gate.set()
        await task
        assert results(r) == [str(n) for n in range(6)], "in the order in which they were asked for"
    assert most == 2


async def test_plain_functions_run_in_a_thread() -> None:
    def where() -> bool:
        return threading.current_thread() is threading.main_thread()

    async with rig([asking(("where", {})), answer()]) as r:
        await r.client.run_tools(PROMPT, tools=[where])
        assert results(r) == ["false"]


async def test_cancelling_the_run_cancels_the_tools() -> None:
    ended: list[int] = []

    async def slow(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    async with rig([asking(("slow", {"number": 1}), ("slow", {"number": 2}))]) as r:
        task = asyncio.create_task(r.client.run_tools(PROMPT, tools=[slow]))
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert sorted(ended) == [1, 2]


async def test_an_error_of_a_round_is_the_callers() -> None:
    script = [asking(("add", {"a": 1})), failure(500), failure(500), failure(500)]
    async with rig(script, config=configuration(middleware={"retry": {"max_attempts": 3}})) as r:
        with pytest.raises(LLMOverloadedError):
            await r.client.run_tools(PROMPT, tools=[add])


async def test_rounds_are_bounded_and_the_rest_is_told() -> None:
    async with rig(lambda _: asking(("add", {"a": 1}))) as r:
        run = await r.client.run_tools(PROMPT, tools=[add], max_rounds=3)
    assert (run.finished, run.rounds) == (False, 3)
    assert run.response.tool_calls == (ToolCall("call_1", "add", '{"a":1}'),)


async def test_a_tool_that_nobody_can_run_ends_the_run() -> None:
    ask_user = Tool(name="ask_user", description="Ask the user.")
    async with rig([asking(("add", {"a": 1}), ("ask_user", {}))]) as r:
        run = await r.client.run_tools(PROMPT, tools=[add, ask_user])
        assert len(r.transport.requests) == 1
    assert not run.finished
    assert [call.name for call in run.response.tool_calls] == ["add", "ask_user"]


async def test_who_must_call_a_tool_must_do_so_once() -> None:
    async with rig([asking(("add", {"a": 1})), answer()]) as r:
        await r.client.run_tools(PROMPT, tools=[add], tool_choice="required")
        choices = [msgspec.json.decode(request.body).get("tool_choice") for request in r.transport.requests]
    assert choices == ["required", "auto"]


async def test_each_round_is_shown_while_it_goes() -> None:
    seen: list[LLMResponse] = []

    async def look(response: LLMResponse) -> None:
        await asyncio.sleep(0)
        seen.append(response)

    async with rig([asking(("add", {"a": 1})), answer("2")]) as r:
        await r.client.run_tools(PROMPT, tools=[add], on_round=look)
    assert [len(response.tool_calls) for response in seen] == [1, 0]


class Person(pydantic.BaseModel):
    name: str


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ({"a": [1]}, '{"a":[1]}'),
        (None, "done"),
        (1.5, "1.5"),
        (Person(name="Ann"), '{"name":"Ann"}'),
        ({"all": [Person(name="Ann")]}, '{"all":[{"name":"Ann"}]}'),
        ("half a \ud83d", "half a ?"),
        (Tool(name="t"), '{"name":"t"'),
        (object, "<class 'object'>"),
        ([Text("one"), Text("two")], [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]),
        (Text("one"), [{"type": "text", "text": "one"}]),
        (ToolResult("", "as it is", error=True), "as it is"),
    ],
)
async def test_whatever_a_tool_returns_is_told(returned: Any, told: Any) -> None:
    async def give() -> Any:
        return returned

    async with rig([asking(("give", {})), answer()]) as r:
        await r.client.run_tools(PROMPT, tools=[give])
        (found,) = results(r)
    assert found[: len(told)] == told


async def test_a_clients_own_tools_are_run_and_none_at_all_are_no_mistake() -> None:
    async with rig([asking(("add", {"a": 1})), answer("2"), answer("hello")]) as r:
        client = r.manager.get_client(tools=[add])
        assert str(await client.run_tools(PROMPT)) == "2"
        assert str(await r.client.run_tools(PROMPT)) == "hello"


async def test_a_picture_is_shown_to_those_who_can_see_it() -> None:
    async def draw() -> Image:
        return Image.from_bytes(PNG)

    async with rig([asking(("draw", {}))]) as r:
        with pytest.raises(LLMInvalidRequestError, match="Image"):
            await r.client.run_tools(PROMPT, tools=[draw])
