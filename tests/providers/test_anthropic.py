"""What only Anthropic's dialect has; the rest is in test_dialects.py and the golden files."""

import msgspec
import pytest

from llm.core.content import Opaque, Thinking, ToolCall
from llm.core.exceptions import (
    LLMContentFilteredError,
    LLMException,
    LLMModelNotFoundError,
    LLMProtocolError,
    LLMQuotaExhaustedError,
    LLMStreamInterruptedError,
)
from llm.core.types import (
    LimitState,
    Message,
    MessageRole,
    ObservedLimits,
    Options,
    Request,
    StopReason,
    StreamChunk,
    ToolCallDelta,
)
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
        b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"after it"}}\n\n'
    )
    assert chunks == [StreamChunk("Hi")]
    assert decoder.error is not None


def test_an_interrupted_stream_tells_what_was_used(anthropic: AnthropicProvider) -> None:
    decoder = anthropic.stream_decoder(ASKED)
    decoder.feed(b'data: {"type":"message_start","message":{"usage":{"input_tokens":7,"output_tokens":1}}}\n\n')
    assert decoder.end() == []
    assert isinstance(decoder.error, LLMStreamInterruptedError)
    assert decoder.error.message == "the stream ended without message_stop"
    assert decoder.error.usage == decoder.usage
    assert decoder.usage is not None
    assert decoder.usage.input_tokens == 7


def test_a_hint_finds_its_place_after_a_long_message(anthropic: AnthropicProvider) -> None:
    asked = Request(ASKED.messages, "claude-3-opus-20240229")
    body = msgspec.json.encode({"error": {"type": "not_found_error", "message": "x" * 5000}})
    found = anthropic.classify(asked, 404, {}, body)
    assert found.message.endswith("use claude-opus-5-5)")
    assert len(found.message) == 2048


def test_a_model_that_was_never_heard_of_gets_the_vendors_words_and_no_hint(anthropic: AnthropicProvider) -> None:
    body = msgspec.json.encode({"error": {"type": "not_found_error", "message": "model: claude-test"}})
    found = anthropic.classify(ASKED, 404, {}, body)
    assert isinstance(found, LLMModelNotFoundError)
    assert found.message == "model: claude-test"


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


GOOD = {
    "type": "message",
    "id": "msg_1",
    "model": "claude-test",
    "content": [{"type": "text", "text": "Hi"}],
    "stop_reason": "end_turn",
}


def good(**more: object) -> bytes:
    return msgspec.json.encode(GOOD | more)


@pytest.mark.parametrize("status", [300, 301, 400, 500])
def test_a_good_message_under_a_bad_status_is_no_answer(anthropic: AnthropicProvider, status: int) -> None:
    with pytest.raises(LLMException) as caught:
        anthropic.decode(ASKED, status, {}, good())
    assert caught.value.status == status


@pytest.mark.parametrize(("status", "body"), [(199, good()), (200, b"{}"), (299, b"{}"), (200, b"[]")])
def test_what_is_neither_a_message_nor_an_error_cannot_be_read(
    anthropic: AnthropicProvider, status: int, body: bytes
) -> None:
    with pytest.raises(LLMProtocolError, match="a body that is no message") as caught:
        anthropic.decode(ASKED, status, {}, body)
    assert caught.value.retryable


@pytest.mark.parametrize("status", [200, 201, 299])
def test_any_status_of_success_is_an_answer(anthropic: AnthropicProvider, status: int) -> None:
    assert anthropic.decode(ASKED, status, {}, good()).text == "Hi"


def test_a_block_without_words_says_nothing(anthropic: AnthropicProvider) -> None:
    blocks = [{"type": "text", "text": None}, {"type": "thinking"}, {"type": "unheard_of", "text": "x"}, {"text": "y"}]
    answer = anthropic.decode(ASKED, 200, {}, good(content=blocks))
    assert (answer.text, answer.thinking) == ("", "")


@pytest.mark.parametrize(
    ("max_tokens", "stream", "streamed", "gather"),
    [
        (21_333, False, False, False),
        (21_334, False, True, True),
        (21_333, True, True, False),
        (21_334, True, True, False),
    ],
)
def test_an_answer_that_may_take_ten_minutes_is_streamed_and_gathered(
    anthropic: AnthropicProvider, max_tokens: int, stream: bool, streamed: bool, gather: bool
) -> None:
    asked = Request(ASKED.messages, ASKED.model, Options(max_tokens=max_tokens), stream=stream)
    encoded = anthropic.encode(asked, "k")
    assert msgspec.json.decode(encoded.request.body).get("stream", False) is streamed
    assert (encoded.request.headers["accept"] == "text/event-stream") is streamed
    assert encoded.gather is gather


def events(*each: dict[str, object]) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in each)


def start(**block: object) -> dict[str, object]:
    return {"type": "content_block_start", "index": 0, "content_block": block}


def test_a_block_that_begins_with_all_it_holds_is_told_as_it_is(anthropic: AnthropicProvider) -> None:
    chunks = anthropic.stream_decoder(ASKED).feed(
        events(
            start(type="thinking", thinking="so", signature="s"),
            start(type="redacted_thinking", data="x"),
            {"type": "content_block_stop", "index": 0},
        )
    )
    assert [chunk.thinking for chunk in chunks if chunk.thinking] == ["so"]
    whole, hidden = [chunk.part for chunk in chunks if chunk.part is not None]
    assert whole == Thinking("so", b'{"type":"thinking","thinking":"so","signature":"s"}', "anthropic")
    assert hidden == Thinking("", b'{"type":"redacted_thinking","data":"x"}', "anthropic")


@pytest.mark.parametrize(("pieces", "read"), [(['{"q":', "1}"], {"q": 1}), (['{"q":'], '{"q":')])
def test_arguments_of_a_tool_of_the_vendors_own_are_kept_in_its_block(
    anthropic: AnthropicProvider, pieces: list[str], read: object
) -> None:
    deltas = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": piece}}
        for piece in pieces
    ]
    begun = start(type="server_tool_use", id="t", name="web_search", input={})
    chunks = anthropic.stream_decoder(ASKED).feed(events(begun, *deltas, {"type": "message_stop"}))
    (part,) = [chunk.part for chunk in chunks if chunk.part is not None]
    assert isinstance(part, Opaque)
    assert msgspec.json.decode(part.raw) == {"type": "server_tool_use", "id": "t", "name": "web_search", "input": read}
    assert all(chunk.tool_call is None for chunk in chunks), "it is not for the caller to run"


def test_what_begins_no_block_or_changes_none_says_nothing(anthropic: AnthropicProvider) -> None:
    decoder = anthropic.stream_decoder(ASKED)
    nothing = events({"type": "content_block_start", "index": 0}, {"type": "content_block_stop", "index": 0})
    empty = events({"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta"}})
    assert decoder.feed(nothing + empty) == []
    assert decoder.error is None


def test_what_calls_itself_an_error_is_one_whatever_else_it_holds(anthropic: AnthropicProvider) -> None:
    with pytest.raises(LLMException):
        anthropic.decode(ASKED, 200, {}, good(type="error"))


@pytest.mark.parametrize(
    ("tokens", "counted"), [(0, 0), (7, 7), (10**12, 10**12), (10**12 + 1, 0), (-1, 0), ("7", 0), (None, 0)]
)
def test_figures_that_cannot_be_are_left_out_and_the_answer_is_kept(
    anthropic: AnthropicProvider, tokens: object, counted: int
) -> None:
    answer = anthropic.decode(ASKED, 200, {}, good(usage={"input_tokens": tokens, "output_tokens": 0}))
    assert (answer.text, answer.usage.input_tokens) == ("Hi", counted)


@pytest.mark.parametrize(
    ("creation", "told", "written", "hour"),
    [
        ({"ephemeral_5m_input_tokens": 5}, None, 5, 0),
        ({"ephemeral_1h_input_tokens": 7}, None, 7, 7),
        ({"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 7}, None, 12, 7),
        ({"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 7}, 20, 20, 7),
        ({}, None, 0, 0),
        (None, 4, 4, 0),
    ],
)
def test_what_was_written_to_the_cache_is_its_sum_or_else_its_parts(
    anthropic: AnthropicProvider, creation: dict[str, int] | None, told: int | None, written: int, hour: int
) -> None:
    usage = {"input_tokens": 1, "cache_creation": creation, "cache_creation_input_tokens": told}
    found = anthropic.decode(ASKED, 200, {}, good(usage=usage)).usage
    assert (found.cache_write_tokens, found.cache_write_1h_tokens, found.input_tokens) == (written, hour, 1 + written)


@pytest.mark.parametrize(("details", "tokens"), [({"thinking_tokens": 9}, 9), ({}, 0), (None, 0)])
def test_what_was_thought_is_counted_where_it_is_told(
    anthropic: AnthropicProvider, details: dict[str, int] | None, tokens: int
) -> None:
    usage = {"input_tokens": 1, "output_tokens": 10, "output_tokens_details": details}
    assert anthropic.decode(ASKED, 200, {}, good(usage=usage)).usage.reasoning_tokens == tokens


def test_a_version_after_the_first_has_lost_sampling() -> None:
    wishes = {"temperature": 0.5, "top_p": 0.9, "top_k": 5}
    asked = Request(ASKED.messages, "claude-3-5-haiku-20241022", msgspec.convert(wishes, Options))
    later = AnthropicProvider(settings("anthropic", {"settings": {"api_version": "2099-01-01"}})).encode(asked, "k")
    assert set(later.dropped) == {"temperature", "top_p", "top_k"}
    assert not {"temperature", "top_p", "top_k"} & set(msgspec.json.decode(later.request.body))
    assert later.request.headers["anthropic-version"] == "2099-01-01"


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("https://host", "https://host/v1/messages"),
        ("https://host/X/", "https://host/X/v1/messages"),
        ("https://host/X", "https://host/X/v1/messages"),
        ("https://host/v1", "https://host/v1/messages"),
        ("https://host/v1/", "https://host/v1/messages"),
        ("https://host/api?key=a/b?c", "https://host/api/v1/messages?key=a/b?c"),
    ],
)
def test_an_address_may_be_written_with_and_without_its_end(base: str, url: str) -> None:
    provider = AnthropicProvider(settings("anthropic", {"settings": {"base_url": base}}))
    assert provider.encode(ASKED, "k").request.url == url
    assert provider.probe("k").url == url.replace("messages", "models")


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


@pytest.mark.parametrize(("status", "model"), [(401, "claude-3-opus"), (404, "claude-haiku-5-5")])
def test_an_error_that_needs_no_hint_says_what_the_vendor_said(
    anthropic: AnthropicProvider, status: int, model: str
) -> None:
    body = b'{"type":"error","error":{"type":"any","message":"as it is"}}'
    asked = Request(ASKED.messages, model)
    assert anthropic.classify(asked, status, {}, body).message == "as it is"


def test_a_block_whose_unread_part_is_no_text_is_told_as_unreadable(anthropic: AnthropicProvider) -> None:
    """Found by the fuzzer: what the first look skips, the second has to be able to refuse."""
    block = b'{"type":"tool_use","id":"t","name":"f","x":"\xff","input":{}}'
    decoder = anthropic.stream_decoder(ASKED)
    assert decoder.feed(b'data: {"type":"content_block_start","index":0,"content_block":' + block + b"}\n\n") == []
    assert isinstance(decoder.error, LLMProtocolError)
    body = b'{"type":"message","content":[{"type":"tool_use","id":"t","name":"f","input":{"a":"\xff"}}]}'
    with pytest.raises(LLMProtocolError) as caught:
        anthropic.decode(ASKED, 200, {}, body)
    assert caught.value.body == body


def arguments(piece: str) -> dict[str, object]:
    delta = {"type": "input_json_delta", "partial_json": piece}
    return {"type": "content_block_delta", "index": 0, "delta": delta}


STOP_BLOCK: dict[str, object] = {"type": "content_block_stop", "index": 0}


def test_calls_are_streamed_in_pieces_that_name_their_place_and_handed_out_whole(anthropic: AnthropicProvider) -> None:
    chunks = anthropic.stream_decoder(ASKED).feed(
        events(
            start(type="tool_use", id="a", name="f", input={}),
            arguments('{"x":'),
            arguments("1}"),
            STOP_BLOCK,
            start(type="tool_use", id="b", name="g", input={"y": 2}),
            STOP_BLOCK,
            start(type="tool_use"),
            arguments("{}"),
            STOP_BLOCK,
        )
    )
    assert chunks == [
        StreamChunk(tool_call=ToolCallDelta(0, "a", "f")),
        StreamChunk(tool_call=ToolCallDelta(0, arguments='{"x":')),
        StreamChunk(tool_call=ToolCallDelta(0, arguments="1}")),
        StreamChunk(part=ToolCall("a", "f", '{"x":1}')),
        StreamChunk(tool_call=ToolCallDelta(1, "b", "g")),
        # Some servers send all of it at the beginning.
        StreamChunk(part=ToolCall("b", "g", '{"y":2}')),
        StreamChunk(tool_call=ToolCallDelta(2)),
        StreamChunk(tool_call=ToolCallDelta(2, arguments="{}")),
        StreamChunk(part=ToolCall("", "", "{}")),
    ]


def test_a_call_without_words_is_a_call_all_the_same(anthropic: AnthropicProvider) -> None:
    body = (
        b'{"type":"message","content":[{"type":"tool_use"},{"type":"tool_use","input":null}],"stop_reason":"tool_use"}'
    )
    assert anthropic.decode(ASKED, 200, {}, body).tool_calls == (ToolCall("", "", "{}"),) * 2


@pytest.mark.parametrize(
    "event",
    [
        start(type="tool_use", id="a", name="f", input={}),
        start(type="thinking", thinking="hm"),
        start(type="text", text="So"),
    ],
)
def test_a_stream_that_ends_after_its_first_piece_has_begun(
    anthropic: AnthropicProvider, event: dict[str, object]
) -> None:
    """What has been handed out cannot be taken back, so a call whose stream breaks off then is not repeated."""
    decoder = anthropic.stream_decoder(ASKED)
    assert decoder.feed(events(event)) != []
    decoder.end()
    assert isinstance(decoder.error, LLMStreamInterruptedError)
    assert not decoder.error.retryable
