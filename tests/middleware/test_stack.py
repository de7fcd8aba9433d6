"""The order of the layers: as it is drawn, and as a user may change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from llm.core.exceptions import LLMConfigurationError, LLMException, LLMOverloadedError
from llm.core.types import KeyRef, Settlement
from llm.middleware.base import Call, Handler, Middleware, Reply, compose
from llm.middleware.stack import Layer, default_stack
from llm.transports.base import HTTPRequest
from tests.core.rig import END, PROMPT, answer, configuration, delta, failure, rig, stream

PER_CALL = ["logging.calls", "metrics.calls"]
PER_ATTEMPT = ["logging.attempts", "metrics.attempts", "circuit_breaker"]
DEFAULT = [*PER_CALL, "resume", "fallback", "rate_limiter", "retry", *PER_ATTEMPT]


class Journal:
    """Writes down when a call enters a layer from above and when its reply leaves it."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def wrap(self, layers: list[Layer]) -> list[Layer]:
        """The same layers, each wrapped."""
        return [Layer(layer.name, self._recorded(layer)) for layer in layers]

    def _recorded(self, layer: Layer) -> Middleware:
        async def recorded(call: Call, handler: Handler, /) -> Reply:
            self.lines.append(f"→ {layer.name}")
            try:
                return await layer.middleware(call, handler)
            except LLMException as error:
                self.lines.append(f"× {layer.name} {type(error).__name__}")
                raise
            finally:
                self.lines.append(f"← {layer.name}")

        return recorded

    def vendor(self, *answers: Any) -> Any:
        """A script whose answers are in the journal too."""
        script = iter(answers)

        def answering(request: HTTPRequest) -> Any:
            self.lines.append("provider")
            return next(script)

        return answering


class Adds:
    """A layer of the user's."""

    def __init__(self, seen: list[str], name: str = "own") -> None:
        self.seen = seen
        self.name = name

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        assert call.admission is not None
        self.seen.append(f"{self.name} {call.admission.key.id} {call.admission.model}")
        return await handler(call)


# ---------------------------------------------------------------- the order


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_calls_journal_is_the_drawing_down_and_up_again(streaming: bool) -> None:
    journal = Journal()
    script = journal.vendor(stream(delta("hello"), END) if streaming else answer())
    async with rig(script, arrange=journal.wrap) as r:
        if streaming:
            async with r.client.stream_complete(PROMPT) as answered:
                assert [chunk.text async for chunk in answered if chunk.text] == ["hello"]
        else:
            await r.client.complete(PROMPT)
    assert journal.lines == [
        *(f"→ {name}" for name in DEFAULT),
        "provider",
        *(f"← {name}" for name in reversed(DEFAULT)),
    ]
    # The drawing's own words: RateLimit → Retry → Logging → Metrics → provider.
    drawn = ["→ rate_limiter", "→ retry", "→ logging.attempts", "→ metrics.attempts", "provider"]
    assert [line for line in journal.lines if line in drawn] == drawn


async def test_what_stands_below_retry_sees_each_attempt_and_what_stands_above_sees_the_call() -> None:
    journal = Journal()
    async with rig(journal.vendor(failure(500), answer()), arrange=journal.wrap) as r:
        await r.client.complete(PROMPT)
    down = [line for line in journal.lines if line.startswith(("→", "provider"))]
    attempt = [f"→ {name}" for name in PER_ATTEMPT] + ["provider"]
    assert down == [
        *(f"→ {name}" for name in [*PER_CALL, "resume", "fallback", "rate_limiter", "retry"]),
        *attempt,
        *attempt,
    ]
    assert [line for line in journal.lines if line.startswith("×")] == [
        "× circuit_breaker LLMOverloadedError",
        "× metrics.attempts LLMOverloadedError",
        "× logging.attempts LLMOverloadedError",
    ]


async def test_extensions_stand_between_retry_and_the_attempts_records_with_the_key_settled() -> None:
    seen: list[str] = []
    config = configuration(keys=2, models=["a", "b"])
    async with rig([failure(500), answer()], config=config, middleware={"own": Adds(seen)}) as r:
        await r.client.complete(PROMPT)
        layers = r.manager.get_status()["providers"]["vendor"]["layers"]
    assert layers == [*PER_CALL, "resume", "fallback", "rate_limiter", "retry", "own", *PER_ATTEMPT]
    assert seen == ["own vendor/1 a", "own vendor/2 b"]


def test_composing_puts_the_first_outermost_and_nothing_is_nothing() -> None:
    async def handler(call: Call) -> Reply:
        raise NotImplementedError

    assert compose([], handler) is handler


def test_a_layer_that_is_none_is_left_out() -> None:
    limiter: Any = object()
    layers = default_stack(rate_limiter=limiter, retry=None, logging=None, metrics=None)
    assert layers == [Layer("rate_limiter", limiter)]


# ---------------------------------------------------------------- switched off by configuration


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("retry", ["retry"]),
        ("logging", ["logging.calls", "logging.attempts"]),
        ("metrics", ["metrics.calls", "metrics.attempts"]),
    ],
)
async def test_a_layer_is_switched_off_by_its_name(name: str, gone: list[str]) -> None:
    config = configuration(middleware={name: {"enabled": False}})
    async with rig([answer(), stream(delta("hello"), END)], config=config) as r:
        assert await r.client.chat(PROMPT) == "hello"
        assert [c.text async for c in r.client.stream_complete(PROMPT) if c.text] == ["hello"]
        status = r.manager.get_status()
    assert status["providers"]["vendor"]["layers"] == [layer for layer in DEFAULT if layer not in gone]


async def test_without_retry_the_first_failure_is_the_calls() -> None:
    config = configuration(middleware={"retry": {"enabled": False}})
    async with rig([failure(500)], config=config) as r:
        with pytest.raises(LLMOverloadedError):
            await r.client.complete(PROMPT)


async def test_a_limiter_that_is_switched_off_lifts_the_limits_and_still_hands_out_clients() -> None:
    config = configuration(
        rate_limits={"requests_per_minute": 1, "input_tokens_per_minute": 1},
        middleware={"rate_limiter": {"enabled": False}},
        pool={"max_size": 2},
    )
    async with rig(lambda _: answer(), config=config) as r:
        for _ in range(5):
            await r.client.complete(PROMPT)
        assert r.clock.now() == 1_000.0
        assert r.manager.get_status()["providers"]["vendor"]["clients"]["created"] == 1


async def test_everything_off_still_answers() -> None:
    names = ("rate_limiter", "retry", "circuit_breaker", "fallback", "logging", "metrics")
    config = configuration(middleware={name: {"enabled": False} for name in names})
    async with rig([answer()], config=config) as r:
        assert await r.client.chat(PROMPT) == "hello"
        assert r.manager.get_status()["providers"]["vendor"]["layers"] == ["resume", "rate_limiter"]


async def test_an_extension_is_switched_off_by_its_name_though_it_is_given_as_an_object() -> None:
    seen: list[str] = []
    config = configuration(middleware={"own": {"enabled": False}})
    async with rig([answer()], config=config, middleware={"own": Adds(seen)}) as r:
        await r.client.complete(PROMPT)
    assert seen == []


async def test_extensions_stand_in_the_order_of_the_configuration_and_others_after_them() -> None:
    seen: list[str] = []
    own: dict[str, Middleware] = {name: Adds(seen, name) for name in ("a", "b", "c")}
    config = configuration(middleware={"c": {}, "a": {}})
    async with rig([answer()], config=config, middleware=own) as r:
        await r.client.complete(PROMPT)
    assert [line.partition(" ")[0] for line in seen] == ["c", "a", "b"]


# ---------------------------------------------------------------- rearranged in code


async def test_a_layer_can_be_taken_out_replaced_and_put_anywhere() -> None:
    seen: list[str] = []

    class Outermost:
        async def __call__(self, call: Call, handler: Handler, /) -> Reply:
            seen.append("outermost")
            return await handler(call)

    def arrange(layers: list[Layer]) -> Sequence[Layer]:
        kept = [layer for layer in layers if not layer.name.startswith("logging")]
        swapped = [Layer("retry", Adds(seen, "instead of retry")) if x.name == "retry" else x for x in kept]
        return [Layer("outermost", Outermost()), *swapped]

    async with rig([failure(500)], arrange=arrange) as r:
        with pytest.raises(LLMOverloadedError):
            await r.client.complete(PROMPT)
        layers = r.manager.get_status()["providers"]["vendor"]["layers"]
    assert layers == [
        *("outermost", "metrics.calls", "resume", "fallback", "rate_limiter", "retry", "metrics.attempts"),
        "circuit_breaker",
    ]
    assert seen == ["outermost", "instead of retry vendor/1 m"]


async def test_without_any_admission_there_is_a_clear_error() -> None:
    def arrange(layers: list[Layer]) -> Sequence[Layer]:
        return [layer for layer in layers if layer.name != "rate_limiter"]

    async with rig(arrange=arrange) as r:
        with pytest.raises(LLMConfigurationError, match=r"no layer has admitted the call: keep RateLimitMiddleware"):
            await r.client.complete(PROMPT)
        assert r.transport.requests == []


async def test_admission_can_be_the_users_own() -> None:
    settled: list[Settlement] = []

    class Permit:
        key = KeyRef("vendor", 2)
        model = "chosen"
        wants_limits = False
        sent_at = None

        def sent(self) -> None: ...

        def observe(self, **_: Any) -> None: ...

        def settle(self, settlement: Settlement) -> None:
            settled.append(settlement)

        async def renew(self, call: Call) -> None: ...

    class Admit:
        async def __call__(self, call: Call, handler: Handler, /) -> Reply:
            call.admission = Permit()
            reply = await handler(call)
            reply.on_settled(call.admission.settle)
            return reply

    def arrange(layers: list[Layer]) -> Sequence[Layer]:
        return [Layer("own", Admit()) if layer.name == "rate_limiter" else layer for layer in layers]

    async with rig([answer()], config=configuration(keys=2), arrange=arrange) as r:
        got = await r.client.complete(PROMPT)
        assert (got.key_id, r.keys) == ("vendor/2", [2])
    assert [s.error for s in settled] == [None]


async def test_each_provider_has_a_stack_of_its_own() -> None:
    provider = configuration()["providers"]["vendor"]
    arranged: list[list[str]] = []

    def arrange(layers: list[Layer]) -> Sequence[Layer]:
        arranged.append([layer.name for layer in layers])
        return layers

    async with rig(config={"providers": {"one": provider, "two": provider}}, arrange=arrange):
        pass
    assert arranged == [DEFAULT, DEFAULT]
