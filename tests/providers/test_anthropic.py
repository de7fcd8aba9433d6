"""What only Anthropic's dialect has; the rest is in test_dialects.py and the golden files."""

import msgspec
import pytest

from llm.core.exceptions import LLMContentFilteredError, LLMQuotaExhaustedError, LLMStreamInterruptedError
from llm.core.types import LimitState, Message, MessageRole, ObservedLimits, Request, StopReason, StreamChunk
from llm.providers.anthropic import ERROR_BY_CODE, ERROR_BY_OPENING, STATUS_BY_TYPE, STOP_REASON, AnthropicProvider
from llm.utils.http_errors import error_for_status
from tests.providers.corpus import settings

ASKED = Request((Message(MessageRole.USER, "Hi"),), "claude-test")


@pytest.fixture
def anthropic() -> AnthropicProvider:
    return AnthropicProvider(settings("anthropic"))


def test_the_probe_asks_for_the_models_with_the_key() -> None:
    given = {"settings": {"base_url": "http://127.0.0.1:8000/", "extra_headers": {"X-Team": "a"}}}
    probe = AnthropicProvider(settings("anthropic", given)).probe("k")
    assert (probe.method, probe.url, probe.body) == ("GET", "http://127.0.0.1:8000/v1/models", b"")
    assert probe.headers == {
        "accept": "application/json",
        "anthropic-version": "2023-06-01",
        "x-api-key": "k",
        "x-team": "a",
    }


def test_chunks_arrive_before_the_error_that_was_read_with_them(anthropic: AnthropicProvider) -> None:
    decoder = anthropic.stream_decoder(ASKED)
    chunks = decoder.feed(
        b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}\n\n'
        b'data: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'
    )
    assert chunks == [StreamChunk("Hi")]
    assert decoder.error is not None


def test_an_interrupted_stream_tells_what_was_used(anthropic: AnthropicProvider) -> None:
    decoder = anthropic.stream_decoder(ASKED)
    decoder.feed(b'data: {"type":"message_start","message":{"usage":{"input_tokens":7,"output_tokens":1}}}\n\n')
    assert decoder.end() == []
    assert isinstance(decoder.error, LLMStreamInterruptedError)
    assert decoder.error.usage == decoder.usage
    assert decoder.usage is not None
    assert decoder.usage.input_tokens == 7


def test_a_hint_finds_its_place_after_a_long_message(anthropic: AnthropicProvider) -> None:
    asked = Request(ASKED.messages, "claude-3-opus-20240229")
    body = msgspec.json.encode({"error": {"type": "not_found_error", "message": "x" * 5000}})
    found = anthropic.classify(asked, 404, {}, body)
    assert found.message.endswith("use claude-opus-5-5)")
    assert len(found.message) == 2048


@pytest.mark.parametrize(("kind", "status"), STATUS_BY_TYPE.items())
def test_a_type_means_under_200_what_its_status_means(anthropic: AnthropicProvider, kind: str, status: int) -> None:
    body = msgspec.json.encode({"type": "error", "error": {"type": kind, "message": "m"}})
    under_200, told = anthropic.classify(ASKED, 200, {}, body), anthropic.classify(ASKED, status, {}, body)
    assert (type(under_200), under_200.status) == (type(told), status)
    assert issubclass(type(told), error_for_status(status))


def test_codes_that_override_a_status_are_about_money() -> None:
    assert set(ERROR_BY_CODE.values()) == {LLMQuotaExhaustedError}
    assert set(ERROR_BY_OPENING.values()) == {LLMQuotaExhaustedError, LLMContentFilteredError}


def test_models_without_end_do_not_fill_the_memory(anthropic: AnthropicProvider) -> None:
    for i in range(1000):
        anthropic.encode(Request(ASKED.messages, f"m{i}"), "key")
    assert len(anthropic._families) == 1000 % 256


def test_every_stop_reason_but_the_unknown_one_has_a_word() -> None:
    assert set(STOP_REASON.values()) == set(StopReason) - {StopReason.UNKNOWN}


NOON = {"date": "Sun, 22 Nov 2026 10:00:00 GMT"}


def test_limits_are_read_from_the_headers(anthropic: AnthropicProvider) -> None:
    headers = dict(NOON)
    for n, name in enumerate(("requests", "input-tokens", "output-tokens", "tokens")):
        headers[f"anthropic-ratelimit-{name}-limit"] = str(100 + n)
        headers[f"anthropic-ratelimit-{name}-remaining"] = str(n)
        headers[f"anthropic-ratelimit-{name}-reset"] = f"2026-11-22T10:00:{30 + n}Z"
    assert anthropic.limits(headers) == ObservedLimits(
        requests=LimitState(100, 0, 30.0),
        input_tokens=LimitState(101, 1, 31.0),
        output_tokens=LimitState(102, 2, 32.0),
        tokens=LimitState(103, 3, 33.0),
    )


@pytest.mark.parametrize(
    ("limit", "remaining", "reset", "other", "expected"),
    [
        ("100", "7", "2026-11-22T10:00:30+00:00", NOON, LimitState(100, 7, 30.0)),
        ("100", "7", "2026-11-22T09:00:00Z", NOON, LimitState(100, 7, 0.0)),
        ("100", "7", "soon", NOON, LimitState(100, 7, None)),
        ("100", "7", "2026-11-22T10:00:30", NOON, LimitState(100, 7, None)),
        ("100", "7", "2026-11-22T10:00:30Z", {}, LimitState(100, 7, None)),
        ("many", "7", "", NOON, LimitState(None, 7, None)),
        ("100", "-7", "", NOON, LimitState(100, None, None)),
        ("-1", "-1", "2026-11-22T10:00:30Z", NOON, None),
        ("", "x", "", NOON, None),
    ],
)
def test_what_cannot_be_read_of_the_limits_is_left_out(
    anthropic: AnthropicProvider,
    limit: str,
    remaining: str,
    reset: str,
    other: dict[str, str],
    expected: LimitState | None,
) -> None:
    prefix = "anthropic-ratelimit-input-tokens-"
    found = anthropic.limits(
        {prefix + "limit": limit, prefix + "remaining": remaining, prefix + "reset": reset} | other
    )
    assert (found.input_tokens if found else None) == expected


def test_representations_tell_the_state(anthropic: AnthropicProvider) -> None:
    decoder = anthropic.stream_decoder(ASKED)
    assert repr(anthropic) == "<AnthropicProvider anthropic>"
    assert repr(decoder) == "<AnthropicStream without an id, open>"
    decoder.end()
    assert repr(decoder) == "<AnthropicStream without an id, LLMStreamInterruptedError>"
