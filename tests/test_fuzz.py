"""The fuzz targets without their fuzzer: they hold for what they start from, and notice what they are there for."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from fuzz import targets
from fuzz.mutation import mutate
from fuzz.seeds import seeds
from fuzz.targets import HEAD, HEADERS_END, TARGETS, take_apart
from llm.core.exceptions import LLMProtocolError
from llm.core.types import StreamChunk
from llm.providers.base import StreamDecoder
from llm.utils.sse import Event, SSEDecoder


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_for_its_seeds(name: str) -> None:
    found = seeds(name)
    assert len(found) >= 25
    for seed in found:
        TARGETS[name](seed)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_for_seeds_that_were_mutated_and_cut(name: str) -> None:
    for number, seed in enumerate(seeds(name)):
        changed = mutate(seed, 10_000, number) or seed
        TARGETS[name](changed)
        TARGETS[name](changed[: len(changed) * 2 // 3])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("data", [b"", b"\0", b"\xff" * HEAD, b"\xff" * (HEAD + 1)])
def test_a_target_takes_inputs_that_are_too_short(name: str, data: bytes) -> None:
    TARGETS[name](data)


def test_an_input_is_cut_and_nothing_of_it_is_lost() -> None:
    given = take_apart(b"\x01\x02" + b"\x00\x05\x00\x00\x00\x09" + b"0123456789")
    assert (given.choice, given.body) == (1, b"0123456789")
    assert given.pieces == [b"", b"01234", b"5678", b"9"]


def test_a_mutation_is_json_where_json_was_and_fits() -> None:
    body = msgspec.json.encode({"a": [1, {"b": "c"}], "d": {"e": None}})
    changed = {mutate(b"12345678h: v" + HEADERS_END + body, 10_000, seed) for seed in range(50)}
    assert len(changed) > 20
    for data in changed:
        assert data is not None
        assert data.startswith(b"12345678h: v" + HEADERS_END)
        msgspec.json.decode(data.partition(HEADERS_END)[2])
    assert mutate(b"12345678" + body, 9, 1) is None
    assert mutate(b"12345678{", 1000, 1) is None


class CutsInTwo(SSEDecoder):
    """Forgets what it was given before, as a decoder without a buffer would."""

    def feed(self, data: bytes) -> list[Event]:
        return SSEDecoder().feed(data)


class KnowsNoIds(SSEDecoder):
    def feed(self, data: bytes) -> list[Event]:
        return [Event(event.data, event.event) for event in super().feed(data)]


@pytest.mark.parametrize("planted", [CutsInTwo, KnowsNoIds])
def test_a_planted_fault_of_the_event_decoder_is_noticed(
    planted: Callable[..., SSEDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "SSEDecoder", planted)
    with pytest.raises(AssertionError):
        targets.sse(bytes(2) + b"\x00\x03" * 3 + b"id: 7\ndata: x\n\n")


class LosesAByte:
    """A stream decoder that loses the first byte of every piece but the first."""

    def __init__(self, decoder: StreamDecoder) -> None:
        self.decoder = decoder
        self.fed = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.decoder, name)

    def feed(self, data: bytes) -> list[StreamChunk]:
        self.fed += 1
        return self.decoder.feed(data[self.fed > 1 :])


@pytest.mark.parametrize("name", ["anthropic_stream", "openai_stream"])
def test_a_planted_fault_of_a_stream_decoder_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = (targets.ANTHROPIC if name == "anthropic_stream" else targets.OPENAI)[0]
    real = provider.stream_decoder
    monkeypatch.setattr(provider, "stream_decoder", lambda request: LosesAByte(real(request)))
    with pytest.raises(AssertionError, match="means something else"):
        TARGETS[name](bytes(2) + b"\x00\x70" * 3 + max(seeds(name), key=len)[HEAD:])


def test_a_planted_long_message_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = targets.OPENAI[0]
    monkeypatch.setattr(provider, "classify", lambda *_: LLMProtocolError("x" * 2049, sent=True), raising=False)
    with pytest.raises(AssertionError, match="a line for people"):
        TARGETS["openai_classify"](bytes(HEAD))
