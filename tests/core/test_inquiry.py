"""Questions that cost nothing: the vendor's models, and its own count of a request's tokens."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from llm.core.exceptions import (
    LLMAuthenticationError,
    LLMConnectionError,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMProtocolError,
    LLMTimeoutError,
)
from llm.core.types import Message, MessageRole, ModelInfo
from llm.testing.transport import Scripted
from tests.core.rig import JSON, PROMPT, answer, configuration, failure, rig, secret


def vendor(dialect: str, **more: Any) -> Mapping[str, Any]:
    """A provider at its vendor's own address: nothing is sent there but by the script."""
    config = configuration(2, dialect=dialect, models=None, **more)
    del config["providers"]["vendor"]["base_url"]
    return config


def page(*models: dict[str, Any], **more: Any) -> Scripted:
    return Scripted(200, JSON, msgspec.json.encode({"data": models, **more}))


async def test_a_vendors_models_are_told_with_their_lives() -> None:
    told = {
        "id": "claude-sonnet-4-5",
        "type": "model",
        "display_name": "Claude Sonnet 4.5",
        "lifecycle": "deprecated",
        "retires_at": "2026-11-30T00:00:00Z",
        "max_input_tokens": 200_000,
        "max_tokens": 64_000,
    }
    pages = [page(told, has_more=True, last_id="claude-sonnet-4-5"), page({"id": "claude-next"}, has_more=False)]
    async with rig(pages, config=vendor("anthropic")) as r:
        models = await r.client.models()
        urls = [request.url for request in r.transport.requests]
    assert models == (
        ModelInfo(
            id="claude-sonnet-4-5",
            name="Claude Sonnet 4.5",
            lifecycle="deprecated",
            retires_on=datetime.date(2026, 11, 30),
            replacement="claude-sonnet-5-5",
            max_input_tokens=200_000,
            max_output_tokens=64_000,
        ),
        ModelInfo(id="claude-next"),
    )
    assert urls == [
        "https://api.anthropic.com/v1/models?limit=1000",
        "https://api.anthropic.com/v1/models?limit=1000&after_id=claude-sonnet-4-5",
    ]


async def test_a_day_alone_tells_of_a_life_as_well() -> None:
    models: list[dict[str, Any]] = [
        {"id": "gpt-4", "shutdown_date": "2026-10-23"},
        {"id": "gpt-4.1", "shutdown_date": "2027-01-14T00:00:00"},
        {"id": "gpt-5.1", "shutdown_date": None},
        {"id": "gpt-6.1-sol", "shutdown_date": "soon"},
    ]
    async with rig([page(*models)], config=vendor("openai")) as r:
        found = await r.client.models()
    assert [(m.id, m.lifecycle, str(m.retires_on), m.replacement) for m in found] == [
        ("gpt-4", "retired", "2026-10-23", "gpt-6.1-sol"),
        ("gpt-4.1", "deprecated", "2027-01-14", "gpt-6.1-sol"),
        ("gpt-5.1", "deprecated", "2027-04-01", "gpt-6.1-sol"),
        ("gpt-6.1-sol", None, "None", None),
    ]


@pytest.mark.parametrize(
    ("dialect", "url", "keys"),
    [
        ("anthropic", "https://api.anthropic.com/v1/messages/count_tokens", {"model", "messages", "system", "tools"}),
        ("openai", "https://api.openai.com/v1/responses/input_tokens", {"model", "input", "tools"}),
        ("openai_responses", "https://api.openai.com/v1/responses/input_tokens", {"model", "input", "tools"}),
    ],
)
async def test_the_vendor_counts_what_a_call_would_have(dialect: str, url: str, keys: set[str]) -> None:
    counted = Scripted(200, JSON, b'{"input_tokens":42}')
    messages = [Message(MessageRole.SYSTEM, "Be short."), Message(MessageRole.USER, PROMPT)]
    async with rig([counted], config=vendor(dialect)) as r:
        assert await r.client.count_tokens(messages, tools=[{"name": "f"}], max_tokens=50_000, temperature=1) == 42
        (request,) = r.transport.requests
        assert r.manager.get_status()["limits"]["vendor"]["quotas"] == {}, "it is nobody's quota"
    assert request.url == url
    assert set(msgspec.json.decode(request.body)) == keys


async def test_what_the_counting_api_has_no_word_for_does_not_stop_it() -> None:
    async with rig([Scripted(200, JSON, b'{"input_tokens":42}')], config=vendor("openai")) as r:
        assert await r.client.count_tokens(PROMPT, model="gpt-4.1", stop="x", n=2) == 42


async def test_who_has_no_way_to_count_says_so() -> None:
    async with rig([]) as r:
        with pytest.raises(LLMInvalidRequestError, match=r"estimate\(\) guesses them"):
            await r.client.count_tokens(PROMPT)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (failure(401, "no sk-very-secret-1", code="invalid_api_key"), LLMAuthenticationError),
        (failure(500), LLMOverloadedError),
        (Scripted(200, JSON, b"<html>"), LLMProtocolError),
        ("cut", LLMConnectionError),
    ],
)
async def test_what_goes_wrong_is_told_with_the_key_and_without_its_secret(said: Any, error: Any) -> None:
    # An error that outlived the test would hold what it was raised through.
    answers = [LLMConnectionError("cut") if said == "cut" else said for _ in range(2)]
    async with rig(answers, config=vendor("openai")) as r:
        for ask in (r.client.models, lambda: r.client.count_tokens(PROMPT)):
            with pytest.raises(error) as caught:
                await ask()
            assert caught.value.provider == "vendor"
            assert secret(1) not in f"{caught.value}{caught.value.body!r}"


async def test_a_vendor_that_says_nothing_is_given_up() -> None:
    async with rig([answer(delay=1e9)], config=vendor("openai")) as r:
        task = asyncio.create_task(r.client.models())
        await r.clock.advance(31.0)
        with pytest.raises(LLMTimeoutError):
            await task


async def test_a_closed_manager_asks_nobody() -> None:
    async with rig([], config=vendor("openai")) as r:
        await r.manager.close()
        with pytest.raises(LLMConnectionError, match="closed"):
            await r.client.models()
