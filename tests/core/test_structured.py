"""Answers as values of the caller's type: asked for by schema, checked, and sent back when they do not fit."""

from __future__ import annotations

import dataclasses
from contextlib import aclosing
from typing import Any, Literal

import msgspec
import pydantic
import pytest

from llm.core.exceptions import LLMContentFilteredError, LLMInvalidRequestError, LLMProtocolError
from llm.testing.transport import Scripted
from tests.core.rig import END, JSON, PROMPT, Rig, answer, asking, delta, rig, stream


@dataclasses.dataclass
class City:
    name: str
    people: int
    river: str | None = None


class Order(pydantic.BaseModel):
    item: str
    count: int = pydantic.Field(ge=1)


GOOD = '{"name":"Oslo","people":700000,"river":null}'
OSLO = City("Oslo", 700_000)


def asked(r: Rig, index: int = 0) -> dict[str, Any]:
    body: dict[str, Any] = msgspec.json.decode(r.transport.requests[index].body)
    return body


async def test_an_answer_is_a_value_of_the_type_that_was_asked_for() -> None:
    async with rig([answer(GOOD)]) as r:
        assert await r.client.parse(PROMPT, into=City) == OSLO
        form = asked(r)["response_format"]
    assert form["type"] == "json_schema"
    assert (form["json_schema"]["name"], form["json_schema"]["strict"]) == ("City", True)
    assert form["json_schema"]["schema"]["required"] == ["name", "people", "river"]


@pytest.mark.parametrize(
    ("into", "text", "value"),
    [
        (Order, '{"item":"tea","count":2}', Order(item="tea", count=2)),
        (list[int], '{"value":[1,2]}', [1, 2]),
        ({"type": "object", "properties": {"n": {"type": "integer"}}}, '{"n":1}', {"n": 1}),
        (dict[str, int], '{"a":1}', {"a": 1}),
        (City, f"Here it is:\n```json\n{GOOD}\n```\nAnything else?", OSLO),
    ],
)
async def test_every_kind_of_type_is_read(into: Any, text: str, value: Any) -> None:
    async with rig([answer(text)]) as r:
        assert await r.client.parse(PROMPT, into=into) == value


async def test_a_schema_of_free_keys_is_asked_for_without_strictness() -> None:
    async with rig([answer('{"a":1}')]) as r:
        await r.client.parse(PROMPT, into=dict[str, int])
        assert asked(r)["response_format"]["json_schema"]["strict"] is False


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ('{"name":"Oslo","people":"many"}', "Expected `int`, got `str` - at `$.people`"),
        ("Oslo has a lot of people", "this is no JSON"),
        ("", "this is no JSON"),
    ],
)
async def test_what_does_not_fit_is_sent_back_with_what_is_wrong(bad: str, complaint: str) -> None:
    async with rig([answer(bad), answer(GOOD)]) as r:
        assert await r.client.parse(PROMPT, into=City) == OSLO
        first, second = asked(r, 0)["messages"], asked(r, 1)["messages"]
    assert second[: len(first)] == first
    assert second[-2]["content"] == (bad or "(nothing)")
    assert complaint in second[-1]["content"]


async def test_repairs_are_bounded_and_the_last_answer_is_kept() -> None:
    async with rig(lambda _: answer("{}")) as r:
        with pytest.raises(LLMProtocolError, match="missing required field `name`") as caught:
            await r.client.parse(PROMPT, into=City, repairs=2)
        assert len(r.transport.requests) == 3
    assert (caught.value.partial, caught.value.provider, caught.value.retryable) == ("{}", "vendor", False)
    async with rig(lambda _: answer("{}")) as r:
        with pytest.raises(LLMProtocolError):
            await r.client.parse(PROMPT, into=City, repairs=0)
        assert len(r.transport.requests) == 1


async def test_fewer_than_no_repairs_are_refused() -> None:
    async with rig([]) as r:
        with pytest.raises(LLMInvalidRequestError, match="repairs: expected 0 or more, got -1"):
            await r.client.parse(PROMPT, into=City, repairs=-1)
        assert r.transport.requests == []


async def test_a_call_of_a_tool_in_place_of_an_answer_is_not_sent_back_unanswered() -> None:
    """A vendor refuses a conversation in which a call has no result."""

    def look_up(name: str) -> str:
        return name

    async with rig([asking(("look_up", {"name": "Oslo"}), text="Let me see."), answer(GOOD)]) as r:
        assert await r.client.parse(PROMPT, into=City, tools=[look_up]) == OSLO
        said = asked(r, 1)["messages"][1]
    assert said == {"role": "assistant", "content": "Let me see."}


async def test_a_choice_of_words_is_asked_for_with_its_type() -> None:
    """OpenAI answers a strict schema without one with 400."""

    class Mood(msgspec.Struct):
        word: Literal["glad", "sad"]

    async with rig([answer('{"word":"glad"}')]) as r:
        assert await r.client.parse(PROMPT, into=Mood) == Mood("glad")
        form = asked(r)["response_format"]["json_schema"]
    assert (form["strict"], form["schema"]["properties"]) == (
        True,
        {"word": {"enum": ["glad", "sad"], "type": "string"}},
    )


TREE = {"type": "object", "properties": {"left": {"$ref": "#"}, "any": True}}


async def test_a_schema_that_holds_itself_is_read_to_its_depth() -> None:
    async with rig([answer('{"left":{"left":{}},"any":[null]}')]) as r:
        assert await r.client.parse(PROMPT, into=TREE) == {"left": {"left": {}}, "any": [None]}


@pytest.mark.parametrize("depth", [990, 50_000])
async def test_an_answer_nested_too_deeply_does_not_fit(depth: int) -> None:
    """Too deep for whoever checks it, or already for whoever decodes it; which, depends on the interpreter."""
    deep = '{"left":' * depth + "{}" + "}" * depth
    async with rig([answer(deep)]) as r:
        with pytest.raises(LLMProtocolError, match="does not fit"):
            await r.client.parse(PROMPT, into=TREE, repairs=0)


def ended(text: str, reason: str, refusal: str | None = None) -> Scripted:
    message = {"role": "assistant", "content": text, "refusal": refusal}
    body = {"id": "1", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": reason}]}
    return Scripted(200, JSON, msgspec.json.encode(body))


async def test_an_answer_that_was_cut_is_not_asked_for_again() -> None:
    async with rig([ended('{"name":"Os', "length")]) as r:
        with pytest.raises(LLMProtocolError, match="max_tokens"):
            await r.client.parse(PROMPT, into=City)


@pytest.mark.parametrize("said", [ended("", "stop", "I will not."), ended("", "content_filter")])
async def test_a_refusal_is_one(said: Scripted) -> None:
    async with rig([said]) as r:
        with pytest.raises(LLMContentFilteredError, match="the model declined"):
            await r.client.parse(PROMPT, into=City)


async def test_a_type_that_nobody_reads_is_refused_before_anything_is_sent() -> None:
    async with rig([]) as r:
        with pytest.raises(LLMInvalidRequestError, match="into: "):
            await r.client.parse(PROMPT, into=object)
        assert r.transport.requests == []


async def test_a_value_is_seen_growing() -> None:
    pieces = ['{"name":"Os', 'lo","people":7', "00000,", '"river":null}']
    async with rig([stream(*map(delta, pieces), END)]) as r:
        seen = [value async for value in r.client.stream_parse(PROMPT, into=City)]
    assert seen == [
        {"name": "Os"},
        {"name": "Oslo"},
        {"name": "Oslo", "people": 700_000},
        {"name": "Oslo", "people": 700_000, "river": None},
        OSLO,
    ]


async def test_words_around_a_growing_value_are_left_out() -> None:
    pieces = ["Here it is: ", '```{"name":"Os', 'lo","people":700000}``', "` Anything else?"]
    async with rig([stream(*map(delta, pieces), END)]) as r:
        seen = [value async for value in r.client.stream_parse(PROMPT, into=City)]
    assert seen == [{"name": "Os"}, {"name": "Oslo", "people": 700_000}, OSLO]


async def test_who_has_seen_enough_of_a_growing_value_can_leave() -> None:
    script = [stream(delta('{"name":"Os'), delta('lo"'), END)]
    async with rig(script) as r, aclosing(r.client.stream_parse(PROMPT, into=City)) as values:
        assert await anext(values) == {"name": "Os"}


async def test_a_streamed_value_that_does_not_fit_is_an_error_after_what_was_seen() -> None:
    async with rig([stream(delta('{"name":"Oslo"}'), END)]) as r:
        values = r.client.stream_parse(PROMPT, into=City)
        assert await anext(values) == {"name": "Oslo"}
        with pytest.raises(LLMProtocolError, match="missing required field `people`"):
            await anext(values)
