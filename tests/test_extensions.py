"""A provider, a middleware and a store of a user's own: written here, registered by object and by entry point."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llm import (
    Call,
    Context,
    Events,
    Handler,
    LLMConfigurationError,
    LLMException,
    LLMManager,
    LLMProviderError,
    LLMResponse,
    LLMStreamInterruptedError,
    ProviderSettings,
    Reply,
    Request,
    StopReason,
    StreamChunk,
    Usage,
)
from llm.core.types import Counting
from llm.providers.base import Encoded
from llm.testing.clock import FakeClock
from llm.testing.transport import Script, Scripted, ScriptedTransport
from llm.transports.base import HTTPRequest
from llm.utils.clock import Clock

# ---------------------------------------------------------------- what a user writes


class ParrotStream:
    """Reads lines; the line ``.`` is the end."""

    def __init__(self, model: str) -> None:
        self.error: LLMException | None = None
        self.usage: Usage | None = None
        self.stop_reason: StopReason | None = None
        self.done, self.id, self.model, self.events, self._rest = False, "", model, 0, b""

    def feed(self, data: bytes) -> list[StreamChunk]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.events += len(lines)
        self.done = b"." in lines
        self.usage = Usage(1, len(lines))
        self.stop_reason = StopReason.STOP if self.done else None
        return [StreamChunk(text=line.decode()) for line in lines if line != b"."]

    def end(self) -> list[StreamChunk]:
        if not self.done:
            self.error = LLMStreamInterruptedError("the parrot fell silent")
        return []


class ParrotProvider:
    """A dialect in which a prompt is the body and the body is the answer."""

    default_model: str | None = "parrot-1"
    counting = Counting()

    def __init__(self, settings: ProviderSettings) -> None:
        self.name = settings.name
        self.url = settings.base_url or "http://parrot.test"

    def encode(self, request: Request, key: str) -> Encoded:
        body = request.messages[-1].text.encode()
        return Encoded(HTTPRequest("POST", f"{self.url}/{request.model}", {"x-seed": key}, body))

    def decode(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> LLMResponse:
        return LLMResponse(text=body.decode(), model=request.model, usage=Usage(1, 2), stop_reason=StopReason.STOP)

    def stream_decoder(self, request: Request) -> ParrotStream:
        return ParrotStream(request.model)

    def classify(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> LLMException:
        return LLMProviderError(body.decode(), status=status, retryable=status >= 500)

    def limits(self, headers: Mapping[str, str]) -> None:
        return None

    def probe(self, key: str) -> HTTPRequest:
        return HTTPRequest("GET", self.url, {"x-seed": key})

    def replacement(self, model: str) -> str | None:
        return None

    def goes_on(self, model: str) -> bool:
        return False

    def group(self, model: str) -> str:
        return model


class ShoutMiddleware:
    """Counts the calls in the store, and refuses a word."""

    def __init__(self, settings: Mapping[str, Any], context: Context) -> None:
        self.forbidden = settings.get("forbidden", "")
        self.context = context

    async def __call__(self, call: Call, handler: Handler, /) -> Reply:
        if self.forbidden and self.forbidden in call.request.messages[-1].content:
            raise LLMProviderError(f"{self.forbidden!r} is not said here")
        store, key = self.context.store, f"{self.context.provider}:calls"
        await store.set(key, str(int(await store.get(key) or 0) + 1).encode())
        return await handler(call)


class ListStore:
    """Keeps everything in a list, newest last, and never forgets."""

    def __init__(self, clock: Clock) -> None:
        self.entries: list[tuple[str, bytes]] = []
        self.closed = 0
        STORES.append(self)

    async def get(self, key: str) -> bytes | None:
        return next((value for name, value in reversed(self.entries) if name == key), None)

    async def set(self, key: str, value: bytes, *, ttl: float | None = None) -> None:
        self.entries.append((key, value))

    async def delete(self, key: str) -> None:
        self.entries = [entry for entry in self.entries if entry[0] != key]

    async def close(self) -> None:
        self.closed += 1


STORES: list[ListStore] = []

# ---------------------------------------------------------------- the tests

CONFIG = {
    "providers": {"parrot": {"base_url": "http://cage.test", "api_keys": ["seed-one", "seed-two"]}},
    "middleware": {"shout": {"forbidden": "cracker"}},
}
ENTRY_POINTS = f"""\
[brimful.providers]
parrot = {__name__}:ParrotProvider
broken = {__name__}:NoSuchThing
missing = no_such_module_anywhere:Thing

[brimful.middleware]
shout = {__name__}:ShoutMiddleware

[brimful.stores]
list = {__name__}:ListStore
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that registers what stands above, as if it had been installed."""
    folder = tmp_path / "parrot_kit-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot-kit\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def parrot(request: HTTPRequest) -> Scripted:
    if b"stream" in request.body:
        return Scripted(200, {}, pieces=(b"pretty ", b"\npolly\n", b".\n"))
    return Scripted(200, {}, request.body.upper())


async def manager(config: Mapping[str, Any], script: Script = parrot, **more: Any) -> LLMManager:
    def make() -> LLMManager:
        clock = FakeClock()
        transport = ScriptedTransport(script, clock=clock)
        return LLMManager.from_config(
            config, environ={}, clock=clock, transport=lambda settings, clock: transport, **more
        )

    return await asyncio.to_thread(make)


@pytest.mark.parametrize("written", [ParrotProvider, ShoutMiddleware, ListStore])
def test_an_extension_is_short(written: type) -> None:
    assert len(inspect.getsource(written).splitlines()) <= 60


def test_a_provider_with_its_stream_is_short() -> None:
    assert len((inspect.getsource(ParrotProvider) + inspect.getsource(ParrotStream)).splitlines()) <= 60


async def _use(made: LLMManager, store: ListStore) -> None:
    """All three at work: the dialect encodes, the layer refuses and counts, the store remembers and is closed."""
    async with made:
        client = made.get_client()
        got = await client.complete("pretty polly")
        assert (got.text, got.model, got.key_id) == ("PRETTY POLLY", "parrot-1", "parrot/1")
        assert [c.text async for c in client.stream_complete("stream", model="grey")] == ["pretty ", "polly"]
        with pytest.raises(LLMProviderError, match="'cracker' is not said here"):
            await client.complete("have a cracker")
        assert await store.get("parrot:calls") == b"2"
        status = made.get_status()
        assert "shout" in status["providers"]["parrot"]["layers"]
        assert status["metrics"]["requests"]["successful"] == 2
        assert "seed-one" not in json.dumps(status)
    assert store.closed == 1


async def test_all_three_work_by_object() -> None:
    clock = FakeClock()
    store = ListStore(clock)
    context = Context("parrot", clock, lambda: 0.0, Events(), store)
    layer = ShoutMiddleware({"forbidden": "cracker"}, context)
    config = {**CONFIG, "middleware": {"shout": {}}}
    made = await manager(config, providers={"parrot": ParrotProvider}, middleware={"shout": layer}, store=store)
    await _use(made, store)


@pytest.mark.usefixtures("installed")
async def test_all_three_work_by_entry_point() -> None:
    STORES.clear()
    made = await manager({**CONFIG, "store": "list"})
    [store] = STORES
    await _use(made, store)


@pytest.mark.usefixtures("installed")
async def test_an_object_comes_before_an_entry_point_of_the_same_name() -> None:
    class Other(ParrotProvider):
        default_model = "other-1"

    async with await manager(CONFIG, providers={"parrot": Other}) as made:
        assert (await made.get_client().complete("hello")).model == "other-1"


async def test_nothing_of_it_is_known_without_being_registered() -> None:
    with pytest.raises(LLMConfigurationError, match="parrot"):
        await manager(CONFIG)
    with pytest.raises(LLMConfigurationError, match=r"shout"):
        await manager({**CONFIG, "store": "memory"}, providers={"parrot": ParrotProvider})
    with pytest.raises(LLMConfigurationError, match=r"store.*list"):
        await manager({"providers": CONFIG["providers"], "store": "list"}, providers={"parrot": ParrotProvider})


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("name", "why"), [("broken", "AttributeError"), ("missing", "ModuleNotFoundError")])
async def test_an_entry_point_that_cannot_be_loaded_is_a_configuration_error(name: str, why: str) -> None:
    config = {"providers": {name: {"api_keys": "seed-one"}}}
    with pytest.raises(LLMConfigurationError, match=rf"'{name}', registered as .* cannot be loaded: {why}"):
        await manager(config)


async def test_a_dialect_of_ones_own_has_everything_that_ours_have() -> None:
    """Retries, keys that are parked, streams that are cut: none of it knows the dialect."""
    script = [
        Scripted(503, {}, b"asleep"),
        Scripted(200, {}, b"awake"),
        Scripted(200, {}, pieces=(b"half\n", b"a sen")),
        Scripted(404, {}, b"flown, with seed-two"),
    ]
    config = {"providers": CONFIG["providers"]}
    async with await manager(config, script, providers={"parrot": ParrotProvider}, random=lambda: 0.0) as made:
        client = made.get_client()
        with pytest.raises(LLMProviderError, match="asleep"):
            await client.chat("hello")
        assert await client.chat("hello") == "awake"
        async with client.stream_complete("hello") as answered:
            assert (await anext(answered)).text == "half"
            with pytest.raises(LLMStreamInterruptedError, match="fell silent") as cut:
                await anext(answered)
        assert (cut.value.partial, cut.value.key_id) == ("half", "parrot/1")
        with pytest.raises(LLMProviderError, match=r"flown, with \*\*\*"):
            await client.chat("hello")
