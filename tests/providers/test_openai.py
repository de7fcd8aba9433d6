"""What only OpenAI's dialect has; the rest is in test_dialects.py and the golden files."""

import msgspec
import pytest

from llm.core.content import Document, Opaque, Part, Refusal, Text, ToolCall
from llm.core.exceptions import LLMInvalidRequestError, LLMProtocolError
from llm.core.types import (
    LimitState,
    Message,
    MessageRole,
    ObservedLimits,
    Request,
    StopReason,
    StreamChunk,
    ToolCallDelta,
)
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


def told(*deltas: dict[str, object]) -> bytes:
    """A stream of *deltas*."""
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    return b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks)


def test_a_second_answer_is_no_part_of_the_streams_text(openai: OpenAIProvider) -> None:
    other = {"choices": [{"index": 1, "delta": {"content": "other"}}, {"index": 0, "delta": {"content": "one"}}]}
    assert openai.stream_decoder(ASKED).feed(b"data: " + msgspec.json.encode(other) + b"\n\n") == [StreamChunk("one")]


def test_words_and_calls_of_one_event_are_chunks_of_their_own(openai: OpenAIProvider) -> None:
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    decoder = openai.stream_decoder(ASKED)
    assert decoder.feed(told({"content": "so", "tool_calls": [call]}, {"reasoning": "hm", "tool_calls": []})) == [
        StreamChunk("so"),
        StreamChunk(tool_call=ToolCallDelta(0, "a", "f", "{}")),
        StreamChunk(thinking="hm"),
    ]


def test_pieces_of_calls_find_their_call_by_place_by_id_or_by_order(openai: OpenAIProvider) -> None:
    def piece(arguments: object, **more: object) -> dict[str, object]:
        return {"tool_calls": [{"function": {"name": more.pop("name", None), "arguments": arguments}, **more}]}

    pieces: tuple[dict[str, object], ...] = (
        piece('{"a"', index=0, id="a", name="f"),
        piece(":1}", index=0),
        # Another id at the same place is another call.
        piece('{"b"', index=0, id="b", name="g"),
        piece(":2}", id="b"),
        # Neither place nor id: more of the last.
        piece(" "),
        # Some servers send arguments as an object.
        piece({"c": 3}, id="c", name="h"),
        # And some send a call without anything but its name.
        {"tool_calls": [{"index": 3, "id": "d"}]},
    )
    end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n'
    chunks = openai.stream_decoder(ASKED).feed(told(*pieces) + end)
    assert [chunk.part for chunk in chunks if chunk.part is not None] == [
        ToolCall("a", "f", '{"a":1}'),
        ToolCall("b", "g", '{"b":2} '),
        ToolCall("c", "h", '{"c":3}'),
        ToolCall("d", "", "{}"),
    ]


def test_calls_without_an_id_are_named_by_their_order(openai: OpenAIProvider) -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in "fg"]
    body = {"choices": [{"index": 0, "message": {"tool_calls": calls}, "finish_reason": "stop"}]}
    answer = openai.decode(ASKED, 200, {}, msgspec.json.encode(body))
    assert [(call.id, call.name) for call in answer.tool_calls] == [("call_0", "f"), ("call_1", "g")]
    assert answer.stop_reason is StopReason.TOOL_CALLS, "Gemini says stop of these too"


DOCUMENTS = [
    (Document(text="words"), {"type": "text", "text": "words"}),
    (
        Document(data="QQ==", media_type="application/pdf"),
        {"type": "file", "file": {"filename": "document.pdf", "file_data": "data:application/pdf;base64,QQ=="}},
    ),
    (Opaque("odd", b'{"type":"odd"}', "openai"), {"type": "odd"}),
    (Opaque("odd", b'{"type":"odd"}', "anthropic"), None),
]


@pytest.mark.parametrize(("part", "wired"), DOCUMENTS)
def test_documents_go_out_as_words_or_files(openai: OpenAIProvider, part: Part, wired: object) -> None:
    asked = Request((Message(MessageRole.USER, (Text("Hi"), part)),), "gpt-test")
    sent = msgspec.json.decode(openai.encode(asked, "k").request.body)["messages"][0]["content"]
    assert sent[1:] == ([wired] if wired is not None else [])


def test_a_document_by_its_address_goes_to_the_other_api_or_is_refused_with_the_mend(openai: OpenAIProvider) -> None:
    asked = Request((Message(MessageRole.USER, (Document(url="https://example.org/a.pdf"),)),), "gpt-test")
    assert openai.encode(asked, "k").request.url.endswith("/responses")
    elsewhere = OpenAIProvider(settings("openai", {"settings": {"base_url": "http://127.0.0.1:8000/v1"}}))
    with pytest.raises(LLMInvalidRequestError, match="send it with from_bytes"):
        elsewhere.encode(asked, "k")


def test_a_refusal_goes_back_as_one(openai: OpenAIProvider) -> None:
    answered = Message(MessageRole.ASSISTANT, (Text("Well,"), Refusal("no")))
    body = msgspec.json.decode(openai.encode(Request((*ASKED.messages, answered), "gpt-test"), "k").request.body)
    assert body["messages"][1]["content"] == [{"type": "text", "text": "Well,"}, {"type": "refusal", "refusal": "no"}]


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
