"""What only OpenAI's dialect has; the rest is in test_dialects.py and the golden files."""

import msgspec
import pytest

from llm.core.exceptions import LLMProtocolError
from llm.core.types import LimitState, Message, MessageRole, ObservedLimits, Request, StopReason, StreamChunk
from llm.providers.openai import STOP_REASON, OpenAIProvider
from llm.providers.openai_base import ERROR_BY_CODE, STATUS_BY_TYPE
from llm.utils.http_errors import error_for_status
from tests.providers.corpus import settings

ASKED = Request((Message(MessageRole.USER, "Hi"),), "gpt-test")


@pytest.fixture
def openai() -> OpenAIProvider:
    return OpenAIProvider(settings("openai"))


def test_the_probe_asks_for_the_models_with_the_key() -> None:
    given = {"settings": {"base_url": "http://127.0.0.1:8000/v1/", "extra_headers": {"X-Team": "a"}}}
    probe = OpenAIProvider(settings("openai", given)).probe("k")
    assert (probe.method, probe.url, probe.body) == ("GET", "http://127.0.0.1:8000/v1/models", b"")
    assert probe.headers == {"accept": "application/json", "authorization": "Bearer k", "x-team": "a"}


def test_thinking_text_and_refusal_of_one_event_are_chunks_of_their_own(openai: OpenAIProvider) -> None:
    chunks = openai.stream_decoder(ASKED).feed(
        b'data: {"choices":[{"delta":{"reasoning_content":"hm","content":"so","refusal":"no"}}]}\n\n'
    )
    assert chunks == [StreamChunk(thinking="hm"), StreamChunk("so"), StreamChunk(refusal="no")]


def test_an_event_of_nothing_but_space_is_ignored(openai: OpenAIProvider) -> None:
    decoder = openai.stream_decoder(ASKED)
    assert decoder.feed(b"data:\n\ndata:  \n\n") == []
    assert decoder.error is None


@pytest.mark.parametrize(("word", "status"), STATUS_BY_TYPE.items())
def test_a_word_means_under_200_what_its_status_means(openai: OpenAIProvider, word: str, status: int) -> None:
    body = msgspec.json.encode({"error": {"message": "m", "type": word, "code": None}})
    under_200, told = openai.classify(ASKED, 200, {}, body), openai.classify(ASKED, status, {}, body)
    assert (type(under_200), under_200.status) == (type(told), status)
    assert issubclass(type(told), ERROR_BY_CODE.get(word, error_for_status(status)))


@pytest.mark.parametrize(("word", "error"), ERROR_BY_CODE.items())
@pytest.mark.parametrize("status", [200, 400, 403, 429])
def test_a_code_means_the_same_under_any_status(
    openai: OpenAIProvider, word: str, error: type[Exception], status: int
) -> None:
    for field in ("type", "code"):
        found = openai.classify(ASKED, status, {}, msgspec.json.encode({"error": {"message": "m", field: word}}))
        assert type(found) is error
        assert not found.retryable


def test_models_without_end_do_not_fill_the_memory(openai: OpenAIProvider) -> None:
    for i in range(1000):
        openai.encode(Request(ASKED.messages, f"m{i}"), "key")
    assert len(openai._families) == 1000 % 256


def test_every_stop_reason_the_vendor_can_mean_has_a_word() -> None:
    assert set(STOP_REASON.values()) == set(StopReason) - {StopReason.UNKNOWN, StopReason.PAUSED}


def test_limits_are_read_from_the_headers(openai: OpenAIProvider) -> None:
    found = openai.limits(
        {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-limit-tokens": "150000",
            "x-ratelimit-remaining-tokens": "149984",
            "x-ratelimit-reset-tokens": "6m0.5s",
        }
    )
    assert found == ObservedLimits(requests=LimitState(60, 59, 1.0), tokens=LimitState(150000, 149984, 360.5))


@pytest.mark.parametrize(
    ("limit", "remaining", "reset", "expected"),
    [
        ("100", "7", "12ms", LimitState(100, 7, 0.012)),
        ("100", "7", "30", LimitState(100, 7, 30.0)),
        ("100", "7", "soon", LimitState(100, 7, None)),
        ("100", "x", "1s", LimitState(100, None, 1.0)),
        (None, "7", "1s", LimitState(None, 7, 1.0)),
        # Azure has been seen to send this; nothing remaining of an unknown limit would stop a healthy key.
        ("-1", "0", "1s", None),
        ("", "", "", None),
    ],
)
def test_what_cannot_be_read_of_the_limits_is_left_out(
    openai: OpenAIProvider, limit: str | None, remaining: str, reset: str, expected: LimitState | None
) -> None:
    headers = {"x-ratelimit-remaining-tokens": remaining, "x-ratelimit-reset-tokens": reset}
    found = openai.limits(headers if limit is None else headers | {"x-ratelimit-limit-tokens": limit})
    assert (found.tokens if found else None) == expected


@pytest.mark.parametrize(
    ("tokens", "of_project", "expected"),
    [
        (("100", "7", "1s"), ("50", "8", "2s"), LimitState(100, 7, 1.0)),
        (("100", "7", "1s"), ("500", "6", "2s"), LimitState(500, 6, 2.0)),
        (("100", "7", "1s"), ("100", "7", "2s"), LimitState(100, 7, 1.0)),
        (("100", "", "1s"), ("500", "400", "2s"), LimitState(500, 400, 2.0)),
        (("100", "7", "1s"), ("50", "", "2s"), LimitState(100, 7, 1.0)),
        (("-1", "0", "1s"), ("50", "8", "2s"), LimitState(50, 8, 2.0)),
        (("100", "7", "1s"), ("-1", "0", "2s"), LimitState(100, 7, 1.0)),
    ],
)
def test_of_the_organisations_tokens_and_the_projects_those_with_less_left_count(
    openai: OpenAIProvider, tokens: tuple[str, ...], of_project: tuple[str, ...], expected: LimitState
) -> None:
    headers = {
        f"x-ratelimit-{word}-{name}": value
        for name, values in (("tokens", tokens), ("project-tokens", of_project))
        for word, value in zip(("limit", "remaining", "reset"), values, strict=True)
    }
    assert openai.limits(headers) == ObservedLimits(tokens=expected)


def test_an_answer_that_cannot_be_read_is_kept_but_not_quoted(openai: OpenAIProvider) -> None:
    """Messages reach the log; answers do not."""
    body = b'{"choices":[{"message":{"content":"my secret"},"index":"0"}]}'
    with pytest.raises(LLMProtocolError) as caught:
        openai.decode(ASKED, 200, {}, body)
    assert "secret" not in str(caught.value)
    assert caught.value.body == body


def test_representations_tell_the_state(openai: OpenAIProvider) -> None:
    decoder = openai.stream_decoder(ASKED)
    assert repr(openai) == "<OpenAIProvider openai>"
    assert repr(decoder) == "<OpenAIStream without an id, open>"
    decoder.feed(b'data: {"id":"c1","choices":[{"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')
    assert repr(decoder) == "<OpenAIStream c1, done>"
