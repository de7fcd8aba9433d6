"""Lists of models and counts of tokens, as the vendors are asked for them and as they answer."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec
import pytest

from llm.core.exceptions import LLMInvalidRequestError, LLMProtocolError
from llm.core.tools import Tool
from llm.core.types import Message, MessageRole, ModelInfo, Options, OutputFormat, Request
from llm.providers.anthropic import AnthropicProvider
from llm.providers.base import Inquirable
from llm.providers.openai import OpenAIProvider
from llm.providers.openai_responses import OpenAIResponses
from tests.providers.corpus import settings

KINDS: dict[str, Any] = {
    "anthropic": AnthropicProvider,
    "openai": OpenAIProvider,
    "openai_responses": OpenAIResponses,
}
MODELS = {"anthropic": "claude-sonnet-5-5", "openai": "gpt-5", "openai_responses": "gpt-5"}
OPENAI = ("openai", "openai_responses")
LOCAL = {"settings": {"base_url": "http://127.0.0.1:8000"}}


def vendor(dialect: str, *, custom: bool = False) -> Any:
    found = KINDS[dialect](settings(dialect, LOCAL if custom else None))
    assert isinstance(found, Inquirable)
    return found


def page(*models: dict[str, Any], **more: Any) -> bytes:
    return msgspec.json.encode({"object": "list", "data": models, **more})


# ----------------------------------------------------------------------------------------------------------- models


def test_anthropics_models_come_in_pages_that_name_the_last_before_them() -> None:
    anthropic = vendor("anthropic")
    first, next_page = (anthropic.models_request("k", after) for after in (None, "claude/1 & 2"))
    assert first.url == "https://api.anthropic.com/v1/models?limit=1000"
    assert next_page.url == first.url + "&after_id=claude%2F1%20%26%202"
    assert (first.method, first.headers["x-api-key"], first.body) == ("GET", "k", b"")


def test_a_query_in_the_address_stays_in_the_request_for_a_page() -> None:
    given = {"settings": {"base_url": "http://127.0.0.1:8000/v1?team=a"}}
    asked = AnthropicProvider(settings("anthropic", given)).models_request("k", "m")
    assert asked.url == "http://127.0.0.1:8000/v1/models?team=a&limit=1000&after_id=m"


@pytest.mark.parametrize("dialect", OPENAI)
def test_openais_models_come_in_one_page(dialect: str) -> None:
    asked = vendor(dialect).models_request("k", None)
    assert (asked.method, asked.url) == ("GET", "https://api.openai.com/v1/models")
    assert vendor(dialect).read_models(page({"id": "a"}, has_more=False)) == ([ModelInfo(id="a")], None)


def test_a_page_says_whether_another_follows() -> None:
    anthropic = vendor("anthropic")
    assert anthropic.read_models(page({"id": "a"}, has_more=True, last_id="a"))[1] == "a"
    assert anthropic.read_models(page({"id": "a"}, has_more=False, last_id="a"))[1] is None


def test_a_model_is_told_with_all_that_its_vendor_says_of_it() -> None:
    said = {
        "id": "claude-of-next-year",
        "display_name": "Claude, of next year",
        "lifecycle": "active",
        "retires_at": "2028-01-01T01:30:00+02:00",
        "max_input_tokens": 1_000_000,
        "max_tokens": 128_000,
    }
    (model,), _ = vendor("anthropic").read_models(page(said))
    assert model == ModelInfo(
        id="claude-of-next-year",
        name="Claude, of next year",
        lifecycle="active",
        # In UTC it is still the day before.
        retires_on=datetime.date(2027, 12, 31),
        max_input_tokens=1_000_000,
        max_output_tokens=128_000,
    )


@pytest.mark.parametrize(
    ("said", "lifecycle", "on"),
    [
        ({"shutdown_date": "2026-01-01"}, "retired", "2026-01-01"),
        ({"shutdown_date": "2999-01-01"}, "deprecated", "2999-01-01"),
        ({"lifecycle": "active", "shutdown_date": "2999-01-01"}, "active", "2999-01-01"),
        ({"lifecycle": "of a new kind"}, None, "None"),
        ({"shutdown_date": "one day"}, None, "None"),
        ({}, None, "None"),
    ],
)
def test_a_life_is_told_by_the_vendors_word_or_else_by_its_day(said: Any, lifecycle: str | None, on: str) -> None:
    (model,), _ = vendor("openai").read_models(page({"id": "unheard-of", **said}))
    assert (model.lifecycle, str(model.retires_on), model.replacement) == (lifecycle, on, None)


@pytest.mark.parametrize(("dialect", "model"), [("openai", "gpt-4.1"), ("anthropic", "claude-sonnet-4-5")])
def test_a_day_that_the_vendor_does_not_say_the_table_knows_but_not_for_another_address(
    dialect: str, model: str
) -> None:
    (known,), _ = vendor(dialect).read_models(page({"id": model}))
    (elsewhere,), _ = vendor(dialect, custom=True).read_models(page({"id": model}))
    assert known.retires_on is not None
    assert known.replacement
    assert elsewhere == ModelInfo(id=model)


# ----------------------------------------------------------------------------------------------------------- counts

ASKED = {
    "anthropic": ("https://api.anthropic.com/v1/messages/count_tokens", {"model", "messages", "system", "tools"}),
    "openai": ("https://api.openai.com/v1/responses/input_tokens", {"model", "input", "tools", "text"}),
    "openai_responses": ("https://api.openai.com/v1/responses/input_tokens", {"model", "input", "tools", "text"}),
}


@pytest.mark.parametrize("dialect", KINDS)
def test_a_count_is_asked_with_what_has_tokens_and_nothing_else(dialect: str) -> None:
    url, keys = ASKED[dialect]
    messages = (Message(MessageRole.SYSTEM, "Be short."), Message(MessageRole.USER, "Hi"))
    form = OutputFormat({"type": "object", "properties": {}, "additionalProperties": False})
    options = Options(tools=(Tool(name="f"),), max_tokens=100)
    if dialect in OPENAI:
        options = msgspec.structs.replace(options, output_format=form)
    if dialect == "openai":
        # It is counted over the other API, which has no word for these.
        options = msgspec.structs.replace(options, stop=("x",), n=2)
    asked = vendor(dialect).count_request(Request(messages, MODELS[dialect], options), "k")
    assert (asked.method, asked.url) == ("POST", url)
    assert set(msgspec.json.decode(asked.body)) == keys
    assert asked.headers["accept"] == "application/json"


def test_chat_completions_under_another_address_cannot_count() -> None:
    openai = vendor("openai", custom=True)
    with pytest.raises(LLMInvalidRequestError, match=r"estimate\(\) guesses them"):
        openai.count_request(Request((Message(MessageRole.USER, "Hi"),), "m"), "k")


@pytest.mark.parametrize("dialect", KINDS)
def test_a_count_is_read_and_what_is_none_is_told_without_being_quoted(dialect: str) -> None:
    assert vendor(dialect).read_count(b'{"input_tokens":42,"object":"count"}') == 42
    for body in (b"", b"[]", b'{"input_tokens":"many secrets"}', b"<html>", b'{"tokens":1}'):
        with pytest.raises(LLMProtocolError, match="this is no count of tokens") as caught:
            vendor(dialect).read_count(body)
        assert "secrets" not in str(caught.value)
        assert caught.value.body == body


@pytest.mark.parametrize("dialect", KINDS)
@pytest.mark.parametrize("body", [b"", b"{}", b'{"data":[{"name":"no id"}]}', b'{"data":{}}', b"<html>"])
def test_what_is_no_list_of_models_is_told(dialect: str, body: bytes) -> None:
    with pytest.raises(LLMProtocolError, match="this is no list of models") as caught:
        vendor(dialect).read_models(body)
    assert caught.value.body == body


# ------------------------------------------------------------------------------------------------- retired models


@pytest.mark.parametrize(("dialect", "model"), [("openai", "gpt-4"), ("anthropic", "claude-3-opus-20240229")])
def test_who_comes_after_a_retired_model_is_known_but_not_for_another_address(dialect: str, model: str) -> None:
    assert vendor(dialect).replacement(model)
    assert vendor(dialect, custom=True).replacement(model) is None
    assert vendor(dialect).replacement("unheard-of") is None
