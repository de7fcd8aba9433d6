"""Fallback chains: who is asked next, when, with what, and what is told of it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from llm.core.content import Image
from llm.core.events import Event, FellBack
from llm.core.exceptions import (
    LLMAuthenticationError,
    LLMConfigurationError,
    LLMContentFilteredError,
    LLMContextLengthError,
    LLMDeadlineExceededError,
    LLMException,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMQuotaExhaustedError,
    LLMStreamInterruptedError,
)
from llm.core.types import Message, MessageRole, Options, Target
from llm.middleware.base import Call, Handler, Middleware, Reply
from llm.middleware.stack import Layer
from llm.transports.base import HTTPRequest
from tests.core.rig import END, PROMPT, Rig, answer, configuration, delta, failure, rig, stream

OTHERS = [{"provider": "second", "model": "m2"}, {"provider": "third"}]


def three(**more: Any) -> dict[str, Any]:
    """A configuration of three providers, the first of which falls back to the others."""
    config = configuration(middleware=more.pop("middleware", None), **more)
    vendor = config["providers"]["vendor"]
    for name in ("second", "third"):
        config["providers"][name] = {**vendor, "base_url": f"http://{name}.test/v1", "models": None}
    config["providers"]["third"]["models"] = "m3"
    config["fallbacks"] = {"others": OTHERS}
    vendor["fallback"] = "others"
    return config


class Vendors:
    """Three vendors: what each says, and the requests that each was sent."""

    def __init__(self, **said: Any) -> None:
        self.said = said
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: HTTPRequest) -> Any:
        name = request.url.split("//")[1].split(".")[0]
        self.asked.append(name)
        self.bodies.append(msgspec.json.decode(request.body))
        found = self.said.get(name, answer(name))
        return found.pop(0) if isinstance(found, list) else found


async def test_the_next_target_is_asked_when_retries_are_used_up_and_the_answer_says_why() -> None:
    vendors = Vendors(vendor=failure(503, "down"))
    async with rig(vendors, config=three()) as r:
        response = await r.client.complete(PROMPT)
    assert vendors.asked == ["vendor"] * 3 + ["second"]
    assert (response.text, response.provider, response.key_id) == ("second", "second", "second/1")
    (why,) = response.failures
    assert (why.provider, why.model, why.error, why.message, why.status) == (
        *("vendor", "m", "LLMOverloadedError", "down", 503),
    )
    assert vendors.bodies[-1]["model"] == "m2"


async def test_an_answer_at_once_has_nothing_to_tell() -> None:
    async with rig(Vendors(), config=three()) as r:
        response = await r.client.complete(PROMPT)
    assert (response.text, response.failures) == ("vendor", ())


async def test_repetitions_are_counted_over_all_targets() -> None:
    vendors = Vendors(vendor=failure(503), second=failure(503), third=failure(503))
    async with rig(vendors, config=three()) as r:
        with pytest.raises(LLMOverloadedError) as caught:
            await r.client.complete(PROMPT)
    assert vendors.asked == ["vendor", "vendor", "vendor", "second", "third"]
    assert [record.provider for record in caught.value.attempts] == vendors.asked
    assert [record.number for record in caught.value.attempts] == [1, 2, 3, 4, 5]


async def test_when_nobody_answers_the_error_tells_what_each_said() -> None:
    vendors = Vendors(vendor=failure(503), second=failure(401, "who are you"), third=failure(500, "oh"))
    async with rig(vendors, config=three()) as r:
        with pytest.raises(LLMOverloadedError) as caught:
            await r.client.complete(PROMPT)
    error = caught.value
    assert [(f.provider, f.error, f.status) for f in error.failures] == [
        ("vendor", "LLMOverloadedError", 503),
        ("second", "LLMAuthenticationError", 401),
        ("third", "LLMOverloadedError", 500),
    ]
    assert (error.provider, error.status) == ("third", 500)
    assert "3 targets failed: vendor: LLMOverloadedError, second: LLMAuthenticationError" in str(error)


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        (failure(402, "no credit"), ["vendor", "second"]),
        (failure(401), ["vendor", "second"]),
        (failure(429, retry_after="86400"), ["vendor", "second"]),
        (failure(400), ["vendor"]),
        (failure(404), ["vendor"]),
        (failure(413), ["vendor"]),
    ],
)
async def test_it_moves_on_where_another_may_answer_and_only_there(said: Any, asked: list[str]) -> None:
    vendors = Vendors(vendor=said)
    async with rig(vendors, config=three()) as r:
        found = (await asyncio.gather(r.client.complete(PROMPT), return_exceptions=True))[0]
    assert vendors.asked == asked
    assert isinstance(found, LLMInvalidRequestError) == (len(asked) == 1)


@pytest.mark.parametrize(
    ("code", "name", "error"),
    [
        ("context_length_exceeded", "context_length", LLMContextLengthError),
        ("content_filter", "content_filter", LLMContentFilteredError),
    ],
)
async def test_context_length_and_content_filter_move_on_only_if_that_is_asked_for(
    code: str, name: str, error: type[LLMException]
) -> None:
    vendors = Vendors(vendor=failure(400, code=code))
    async with rig(vendors, config=three()) as r:
        with pytest.raises(error):
            await r.client.complete(PROMPT)
    async with rig(vendors, config=three(middleware={"fallback": {"moves_on": [name]}})) as r:
        assert await r.client.chat(PROMPT) == "second"
    assert vendors.asked == ["vendor", "vendor", "second"]


async def test_an_open_circuit_is_passed_at_once() -> None:
    vendors = Vendors(vendor=failure(503))
    async with rig(vendors, config=three()) as r:
        for _ in range(10):
            assert await r.client.chat(PROMPT) == "second"
    assert vendors.asked.count("vendor") == 5
    assert vendors.asked.count("second") == 10


async def test_a_deadline_that_cannot_be_met_here_may_be_met_elsewhere() -> None:
    vendors = Vendors()
    async with rig(vendors, config=three(rate_limits={"requests_per_minute": 1})) as r:
        texts = [await r.client.chat(PROMPT, timeout=5.0) for _ in range(3)]
        assert texts == ["vendor", "second", "third"]
        with pytest.raises(LLMDeadlineExceededError) as caught:
            await r.client.chat(PROMPT, timeout=5.0)
        assert len(caught.value.failures) == 3
        assert caught.value.retry_after == pytest.approx(60.25)


async def test_a_deadline_that_has_passed_has_passed_everywhere() -> None:
    vendors = Vendors(vendor=answer(delay=60.0))
    async with rig(vendors, config=three()) as r:
        call = asyncio.create_task(r.client.chat(PROMPT, timeout=5.0))
        await r.clock.advance(5.0)
        with pytest.raises(LLMDeadlineExceededError):
            await call
    assert vendors.asked == ["vendor"]


async def test_a_target_has_options_of_its_own_over_those_of_the_call() -> None:
    config = three()
    config["fallbacks"] = {"others": [{"provider": "second", "model": "m2", "options": {"max_tokens": 7}}]}
    vendors = Vendors(vendor=failure(402))
    async with rig(vendors, config=config) as r:
        await r.client.complete(PROMPT, max_tokens=99, temperature=0.5)
    assert [body.get("max_tokens", body.get("max_completion_tokens")) for body in vendors.bodies] == [99, 7]
    assert [body["temperature"] for body in vendors.bodies] == [0.5, 0.5]


async def test_a_target_that_cannot_take_the_request_is_passed_over_and_named() -> None:
    config = three()
    config["providers"]["second"]["dialect"] = "anthropic"
    config["providers"]["second"]["capabilities"] = {"*": {"prefill": False}}
    vendors = Vendors(vendor=failure(402))
    messages = [Message(MessageRole.USER, "Hi"), Message(MessageRole.ASSISTANT, "Well,")]
    async with rig(vendors, config=config) as r:
        response = await r.client.complete(messages)
    assert vendors.asked == ["vendor", "third"]
    assert [(f.provider, f.error) for f in response.failures] == [
        ("vendor", "LLMQuotaExhaustedError"),
        ("second", "LLMInvalidRequestError"),
    ]
    assert "does not continue an assistant's message" in response.failures[1].message


async def test_pictures_go_to_the_target_that_is_next_as_they_are() -> None:
    vendors = Vendors(vendor=failure(402))
    picture = Image.from_url("https://example.org/a.png")
    async with rig(vendors, config=three()) as r:
        await r.client.complete([Message(MessageRole.USER, (picture,))])
    assert vendors.bodies[0]["messages"] == vendors.bodies[1]["messages"]


async def test_two_providers_that_fall_back_to_each_other_are_asked_once_each_also_when_layers_are_wrapped() -> None:
    config = three()
    config["fallbacks"]["back"] = [{"provider": "vendor", "model": "m"}]
    config["providers"]["second"]["fallback"] = "back"
    vendors = Vendors(vendor=failure(402), second=failure(402), third=failure(402))

    def wrapped(layers: list[Layer]) -> list[Layer]:
        return [Layer(layer.name, _through(layer.middleware)) for layer in layers]

    async with rig(vendors, config=config, arrange=wrapped) as r:
        with pytest.raises(LLMQuotaExhaustedError):
            await r.client.complete(PROMPT)
    assert vendors.asked == ["vendor", "second", "third"]


def _through(layer: Middleware) -> Middleware:
    async def through(call: Call, handler: Handler, /) -> Reply:
        return await layer(call, handler)

    return through


def test_a_target_does_not_show_a_gateways_token() -> None:
    target = Target("second", None, {"extra_headers": {"x-token": "t0ken"}, "max_tokens": 7})
    assert "t0ken" not in repr(target) + repr(Options(fallback=(target,)))
    assert "max_tokens" in repr(target)


# -- by call ---------------------------------------------------------------------------------------------------------


async def test_a_call_may_bring_a_chain_of_its_own_or_none() -> None:
    vendors = Vendors(vendor=failure(402))
    async with rig(vendors, config=three()) as r:
        assert await r.client.chat(PROMPT, fallback=[Target("third")]) == "third"
        assert vendors.bodies[-1]["model"] == "m3"
        with pytest.raises(LLMQuotaExhaustedError):
            await r.client.chat(PROMPT, fallback=[])


async def test_a_chain_is_asked_for_by_its_name_and_a_client_may_have_one() -> None:
    config = three()
    del config["providers"]["vendor"]["fallback"]
    vendors = Vendors(vendor=failure(402))
    async with rig(vendors, config=config) as r:
        assert await r.client.chat(PROMPT, fallback="others") == "second"
        client = r.manager.get_client("vendor", fallback="others")
        assert await client.chat(PROMPT) == "second"
        with pytest.raises(LLMQuotaExhaustedError):
            await r.client.chat(PROMPT)


@pytest.mark.parametrize(
    ("fallback", "error", "complaint"),
    [
        ("otters", LLMConfigurationError, "no chain is called 'otters'; configured: others"),
        ([Target("fourth")], LLMConfigurationError, "no provider is called 'fourth'; configured: vendor, second"),
        ([Target("third", None, {"max_tokns": 1})], LLMInvalidRequestError, r"fallback\[0\].options: .*max_tokens"),
        (7, LLMInvalidRequestError, "fallback: "),
    ],
)
async def test_what_leads_nowhere_is_told_before_anything_is_sent(
    fallback: Any, error: type[LLMException], complaint: str
) -> None:
    vendors = Vendors()
    async with rig(vendors, config=three()) as r:
        with pytest.raises(error, match=complaint):
            await r.client.chat(PROMPT, fallback=fallback)
    assert vendors.asked == []


async def test_a_target_that_is_the_call_itself_is_not_asked_again() -> None:
    vendors = Vendors(vendor=failure(402))
    async with rig(vendors, config=three()) as r:
        chain = [Target("vendor", "m"), Target("second", "m2"), Target("second", "m2")]
        client = r.manager.get_client("vendor", "m")
        assert (await client.complete(PROMPT, fallback=chain)).text == "second"
    assert vendors.asked == ["vendor", "second"]


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_a_stream_begins_at_the_next_target_as_long_as_nothing_has_come() -> None:
    vendors = Vendors(vendor=stream(), second=stream(delta("hel"), delta("lo"), END))
    config = three(middleware={"retry": {"enabled": False}})
    async with rig(vendors, config=config) as r, r.client.stream_complete(PROMPT) as answered:
        assert "".join([chunk.text async for chunk in answered]) == "hello"
        assert [f.error for f in answered.failures] == ["LLMStreamInterruptedError"]
        assert answered.response().failures == answered.failures
        assert answered.provider == "second"


async def test_a_stream_that_has_begun_is_not_begun_again_elsewhere() -> None:
    vendors = Vendors(vendor=stream(delta("hel")))
    async with rig(vendors, config=three()) as r:
        with pytest.raises(LLMStreamInterruptedError) as caught:
            _ = [chunk async for chunk in r.client.stream_complete(PROMPT)]
    assert (caught.value.partial, vendors.asked) == ("hel", ["vendor"])


# -- what is seen ------------------------------------------------------------------------------------------------------


async def test_events_and_metrics_tell_of_one_call_that_went_on(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Event] = []
    vendors = Vendors(vendor=failure(402))
    async with rig(vendors, config=three()) as r:
        r.manager.events.listen(told.append, FellBack)
        await r.client.complete(PROMPT)
        status = r.manager.get_status()
    (event,) = told
    assert isinstance(event, FellBack)
    assert (event.provider, event.error, event.target, event.model) == (
        *("vendor", "LLMQuotaExhaustedError", "second", "m2"),
    )
    assert (status["metrics"]["requests"]["total"], status["metrics"]["requests"]["successful"]) == (1, 1)
    assert "goes on at second (m2) after LLMQuotaExhaustedError" in caplog.text


async def test_each_target_pays_from_its_own_limits() -> None:
    vendors = Vendors(vendor=failure(402))
    async with rig(vendors, config=three(rate_limits={"requests_per_minute": 10})) as r:
        await r.client.complete(PROMPT)
        limits = r.manager.get_status()["limits"]
    used = {
        name: sum(group["requests"]["used"] for quota in limit["quotas"].values() for group in quota.values())
        for name, limit in limits.items()
    }
    assert used == {"vendor": 1, "second": 1, "third": 0}


async def test_cancelled_at_the_second_target_nothing_is_left() -> None:
    vendors = Vendors(vendor=failure(402), second=answer(delay=60.0))
    async with rig(vendors, config=three()) as r:
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.settle()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert_idle(r)


def assert_idle(r: Rig) -> None:
    for provider in r.manager.get_status()["providers"].values():
        assert (provider["clients"]["in_use"], provider["queued"]) == (0, 0)


async def test_switched_off_nobody_else_is_asked() -> None:
    vendors = Vendors(vendor=failure(401))
    async with rig(vendors, config=three(middleware={"fallback": {"enabled": False}})) as r:
        with pytest.raises(LLMAuthenticationError):
            await r.client.complete(PROMPT)


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "complaint"),
    [
        ([], "fallbacks.others: names no target"),
        ([{"model": "m"}], r"fallbacks.others\[0\]: names no provider"),
        ([{"provider": "secnd"}], "second"),
        ([{"provider": "second"}, {"provider": "second"}], "asked a second time"),
        ([{"provider": "second", "options": {"max_tokens": 0}}], r"fallbacks.others\[0\].options: max_tokens"),
        ([{"provider": "vendor"}, {"provider": "second"}], "comes back to vendor"),
        ([{"provider": "second", "modle": "m"}], "modle"),
    ],
)
async def test_a_chain_that_leads_nowhere_or_back_is_refused(chain: Any, complaint: str) -> None:
    config = three()
    config["fallbacks"] = {"others": chain}
    with pytest.raises(LLMConfigurationError, match=complaint):
        async with rig(config=config):
            pass


async def test_a_providers_chain_has_to_be_there() -> None:
    config = three()
    config["providers"]["vendor"]["fallback"] = "otters"
    with pytest.raises(LLMConfigurationError, match=r"vendor.fallback: no chain of fallbacks is called 'otters'"):
        async with rig(config=config):
            pass


async def test_silence_is_not_waited_out_again_when_that_would_leave_no_time_for_the_next_target() -> None:
    vendors = Vendors(vendor=answer(delay=60.0))
    async with rig(vendors, config=three(timeouts={"attempt": 10})) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT, timeout=25))
        await r.clock.advance(21)
        assert (await task).provider == "second"
    assert vendors.asked == ["vendor", "vendor", "second"]


async def test_the_last_target_is_asked_as_long_as_there_is_time() -> None:
    vendors = Vendors(vendor=answer(delay=60.0), second=answer(delay=60.0), third=answer(delay=60.0))
    async with rig(vendors, config=three(timeouts={"attempt": 10})) as r:
        task = asyncio.ensure_future(r.client.complete(PROMPT, timeout=45))
        await r.clock.advance(46)
        with pytest.raises(LLMDeadlineExceededError):
            await task
    assert vendors.asked == ["vendor"] * 3 + ["second", "third"]
