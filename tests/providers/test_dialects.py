"""What every dialect must do: the golden files, however the bytes arrive, and nothing that makes it raise."""

import re
from collections.abc import Callable
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.core.exceptions import LLMException, LLMInvalidRequestError, LLMProtocolError, LLMRateLimitError, Scope
from llm.core.types import Message, MessageRole, ObservedLimits, Options, Request
from tests.providers.corpus import (
    ASKED,
    DIALECTS,
    Case,
    assert_facts,
    cases,
    outcome,
    provider,
    request,
    shown,
    streams,
    used,
)

every_dialect = pytest.mark.parametrize("name", DIALECTS)


# ---------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(("name", "case"), cases("requests"))
def test_a_request_is_sent_as_its_golden_file_says(name: str, case: Case) -> None:
    dialect, asked, expect = provider(name, case), request(name, case), case["expect"]
    if "error" in expect:
        with pytest.raises(LLMInvalidRequestError) as caught:
            dialect.encode(asked, "the-key")
        assert_facts(caught.value, expect["error"])
        return
    encoded = dialect.encode(asked, "the-key")
    assert msgspec.json.decode(encoded.request.body) == expect["body"]
    assert sorted(encoded.dropped) == expect.get("dropped", [])
    assert encoded.request.headers == expect.get("headers", encoded.request.headers)
    assert encoded.request.url == expect.get("url", encoded.request.url)
    assert encoded.request.method == "POST"
    assert not re.search(rb":null[,}]", encoded.request.body), "no vendor wants a null"


@every_dialect
def test_a_prompt_that_has_no_utf8_is_refused_before_it_is_sent(name: str) -> None:
    with pytest.raises(LLMInvalidRequestError, match="JSON"):
        provider(name).encode(Request((Message(MessageRole.USER, "\ud800"),), "m"), "key")


@every_dialect
def test_an_extra_body_that_is_no_json_is_refused_before_it_is_sent(name: str) -> None:
    options = Options(extra_body={"tools": object()})
    with pytest.raises(LLMInvalidRequestError, match="JSON"):
        provider(name).encode(Request(ASKED[name].messages, "m", options), "key")


@every_dialect
def test_the_key_is_in_one_header_and_nowhere_else(name: str) -> None:
    dialect = provider(name)
    for sent in (dialect.encode(ASKED[name], "sk-secret").request, dialect.probe("sk-secret")):
        assert len([value for value in sent.headers.values() if "sk-secret" in value]) == 1
        assert "sk-secret" not in f"{sent.body!r}{sent.url}{sent!r}{dialect!r}"


@every_dialect
def test_encoding_leaves_nothing_behind_for_the_next_request(name: str) -> None:
    dialect = provider(name, {"settings": {"extra_body": {"metadata": {"a": "b"}}, "extra_headers": {"X-Team": "a"}}})
    before = dialect.encode(ASKED[name], "one").request
    other = Options(max_tokens=1, extra_body={"metadata": None}, extra_headers={"x-team": "b"})
    dialect.encode(Request(ASKED[name].messages, "m", other, stream=True), "two")
    after = dialect.encode(ASKED[name], "one").request
    assert (before.headers, before.body) == (after.headers, after.body)


@every_dialect
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_about_the_call_and_not_for_the_vendor_is_not_sent(name: str, streaming: bool) -> None:
    asked = {"temperature": 0.5, "max_tokens": 5}
    own = {"priority": "high", "tenant": "acme-tenant", "tag": "acme-tag", "timeout": 7.0}
    said, silent = (
        provider(name).encode(Request(ASKED[name].messages, "m", msgspec.convert(options, Options), streaming), "key")
        for options in (asked | own, asked)
    )
    assert (said.request.body, said.request.url, said.request.headers, said.dropped) == (
        silent.request.body,
        silent.request.url,
        silent.request.headers,
        silent.dropped,
    )
    alone = provider(name).encode(Request(ASKED[name].messages, "m", msgspec.convert(own, Options), streaming), "key")
    assert not re.search(rb"priority|tenant|tag|acme|timeout", alone.request.body)


@every_dialect
def test_a_request_for_a_thousandth_model_is_encoded_like_the_first(name: str) -> None:
    """Model names may come from the application's users; what is remembered of them is bounded."""
    dialect = provider(name)
    bodies = [dialect.encode(Request(ASKED[name].messages, f"m{i}"), "key").request.body for i in range(1000)]
    assert [body.replace(f'"m{i}"'.encode(), b'"m0"') for i, body in enumerate(bodies)] == [bodies[0]] * 1000


# ---------------------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize(("name", "case"), cases("replies"))
def test_a_reply_means_what_its_golden_file_says(name: str, case: Case) -> None:
    body = msgspec.json.encode(case["body"])
    status, headers, expect = case.get("status", 200), case.get("headers", {}), dict(case["expect"])
    if "error" in expect:
        with pytest.raises(LLMException) as caught:
            provider(name, case).decode(ASKED[name], status, headers, body)
        assert_facts(caught.value, expect["error"])
        return
    reply = provider(name, case).decode(ASKED[name], status, headers, body)
    assert used(reply.usage) == expect.pop("usage")
    assert shown(reply.content) == expect.pop("content", [])
    assert {field: getattr(reply, field) for field in expect} == {
        field: tuple(value) if isinstance(value, list) else value for field, value in expect.items()
    }
    assert (reply.provider, reply.body, reply.raw) == (name, body, case["body"])


@pytest.mark.parametrize(("name", "case"), cases("replies"))
def test_a_reply_after_blank_lines_is_the_same_reply(name: str, case: Case) -> None:
    if "error" not in case["expect"]:
        body = msgspec.json.encode(case["body"])
        found = provider(name).decode(ASKED[name], 200, {}, b"\n\n \r\n" + body)
        assert found.text == provider(name).decode(ASKED[name], 200, {}, body).text


@every_dialect
@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b'{"content":[{"type":"text","te', b"\xff\xfe", b"[" * 100_000, b"x" * 200_000],
    ids=["empty", "a page", "cut", "no text", "nested too deep", "long"],
)
def test_a_body_that_cannot_be_read_is_worth_another_attempt(name: str, body: bytes) -> None:
    with pytest.raises(LLMProtocolError) as caught:
        provider(name).decode(ASKED[name], 200, {}, body)
    assert (caught.value.retryable, caught.value.sent, caught.value.provider) == (True, True, name)
    assert len(caught.value.message) < 1200
    assert len(caught.value.body) <= 64 * 1024


# ---------------------------------------------------------------------------------------------------- streams


def run(name: str, case: Case, pieces: list[bytes]) -> Case:
    return outcome(provider(name, case).stream_decoder(ASKED[name]), pieces)


@pytest.mark.parametrize(("name", "data", "case"), streams())
def test_a_stream_means_what_its_golden_file_says(name: str, data: bytes, case: Case) -> None:
    found, expect = run(name, case, [data]), case["expect"]
    assert {**found, "error": None} == {**expect, "error": None}
    decoder = provider(name, case).stream_decoder(ASKED[name])
    decoder.feed(data)
    decoder.end()
    assert_facts(decoder.error, expect["error"])


@pytest.mark.parametrize(("name", "data", "case"), streams())
def test_a_stream_means_the_same_byte_by_byte(name: str, data: bytes, case: Case) -> None:
    assert run(name, case, [data[i : i + 1] for i in range(len(data))]) == run(name, case, [data])


@pytest.mark.parametrize(("name", "data", "case"), streams())
def test_a_stream_means_the_same_cut_anywhere(name: str, data: bytes, case: Case) -> None:
    whole = run(name, case, [data])
    for i in range(len(data)):
        assert run(name, case, [data[:i], data[i:]]) == whole


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(lambda data: data.replace(b"\n", b"\r"), id="CR"),
        pytest.param(lambda data: b"\xef\xbb\xbf" + data, id="BOM"),
        pytest.param(lambda data: data.replace(b"data: ", b"data:"), id="no space"),
        pytest.param(lambda data: data.replace(b"\n\n", b"\n\n: keep-alive\n\n"), id="pings"),
        pytest.param(lambda data: data.replace(b"data: ", b": hm\nid: 7\nretry: 10\nodd\ndata: "), id="other fields"),
        pytest.param(lambda data: data.replace(b"\n\n", b"\n\n\n\n\n"), id="more blank lines"),
    ],
)
@pytest.mark.parametrize(("name", "data", "case"), streams())
def test_a_stream_means_the_same_however_it_is_written(
    name: str, data: bytes, case: Case, change: Callable[[bytes], bytes]
) -> None:
    whole, changed = run(name, case, [data]), change(data)
    if b"data" not in data:
        # A body that is no stream at all is quoted in its error.
        whole["error"], changed = run(name, case, [changed])["error"], changed
    assert run(name, case, [changed]) == whole
    assert run(name, case, [changed[i : i + 1] for i in range(len(changed))]) == whole


@pytest.mark.parametrize(("name", "data", "case"), streams())
def test_what_follows_the_end_of_a_stream_changes_nothing(name: str, data: bytes, case: Case) -> None:
    decoder = provider(name, case).stream_decoder(ASKED[name])
    decoder.feed(data)
    decoder.end()
    before = (decoder.error, decoder.done, decoder.usage, decoder.stop_reason)
    assert decoder.feed(b'event: error\ndata: {"type":"error","error":{}}\n\ndata: {"ty') == []
    assert decoder.end() == []
    assert (decoder.error, decoder.done, decoder.usage, decoder.stop_reason) == before


@pytest.mark.parametrize(("name", "data", "case"), streams())
def test_bytes_after_the_terminal_event_are_nobodys(name: str, data: bytes, case: Case) -> None:
    if case["expect"]["done"] and data.endswith(b"\n\n") and "settings" not in case:
        assert run(name, case, [data + b'data: {"type":"error","error":{"type":"server_error"}}\n\ndata: {']) == run(
            name, case, [data]
        )


@every_dialect
def test_an_event_without_end_is_given_up(name: str) -> None:
    decoder = provider(name).stream_decoder(ASKED[name])
    for _ in range(9):
        assert decoder.feed(b"data: " + b"x" * 1024 * 1024) == []
    assert isinstance(decoder.error, LLMProtocolError)
    assert "larger" in decoder.error.message


PIECES = st.sampled_from(
    [
        b'data: {"type":"message_delta","delta":{"stop_reason":',
        b'data: {"type":"content_block_delta","delta":{"text":"a"}}\n\n',
        b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":',
        b'data: {"error":',
        b'"stop"}',
        b"null",
        b"}]}",
        b"}}\n\n",
        b"data: [DONE]\n\n",
        b"\xff\xfe",
        b"\n\n",
        b"\r",
        b"[" * 3000,
    ]
)


@every_dialect
@given(pieces=st.lists(PIECES | st.binary(max_size=20), max_size=12))
def test_no_bytes_make_a_stream_decoder_raise(name: str, pieces: list[bytes]) -> None:
    found = run(name, {}, pieces)
    assert found["done"] != (found["error"] is not None), "a stream is whole or has failed"


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("name", "case"), cases("errors"))
def test_an_error_means_what_its_golden_file_says(name: str, case: Case) -> None:
    asked = Request(ASKED[name].messages, case.get("model", ASKED[name].model))
    body = case["body"].encode()
    found = provider(name, case).classify(asked, case["status"], case.get("headers", {}), body)
    assert_facts(found, case["expect"])
    assert (found.provider, found.model, found.body) == (name, asked.model, body)


@every_dialect
@given(body=st.binary(max_size=200), status=st.integers(100, 999))
def test_no_body_makes_classify_raise(name: str, body: bytes, status: int) -> None:
    assert provider(name).classify(ASKED[name], status, {}, body).sent


WORDS = st.sampled_from(
    [
        "type",
        "error",
        "message",
        "details",
        "error_code",
        "request_id",
        "detail",
        "code",
        "loc",
        "msg",
        "content",
        "text",
        "usage",
        "stop_reason",
        "choices",
        "delta",
        "finish_reason",
        "index",
        "output_tokens",
        "total_tokens",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=12,
)


@every_dialect
@given(value=JSON)
def test_any_json_is_an_answer_or_an_error_of_ours(name: str, value: object) -> None:
    body = msgspec.json.encode(value)
    with suppress(LLMException):
        assert provider(name).decode(ASKED[name], 200, {}, body).body == body
    outcome(provider(name).stream_decoder(ASKED[name]), [b"data: " + body + b"\n\n", body])


@every_dialect
@given(value=JSON, status=st.sampled_from([200, 400, 404, 429, 500]))
def test_no_json_makes_classify_raise(name: str, value: object, status: int) -> None:
    found = provider(name).classify(ASKED[name], status, {}, msgspec.json.encode(value))
    assert found.message
    assert found.code is None or isinstance(found.code, str)


@every_dialect
def test_an_error_keeps_the_beginning_of_what_is_long(name: str) -> None:
    body = msgspec.json.encode({"error": {"message": "x" * 200_000}})
    found = provider(name).classify(ASKED[name], 500, {}, body)
    assert len(found.message) == 2048
    assert len(found.body) == 64 * 1024


@every_dialect
def test_headers_without_limits_are_no_limits(name: str) -> None:
    assert provider(name).limits({}) is None
    assert provider(name).limits({"date": "Sun, 22 Nov 2026 10:00:00 GMT", "x-request-id": "r"}) is None


@every_dialect
def test_an_answer_that_names_the_keys_owner_tells_that_alone(name: str) -> None:
    for headers, owners in OWNERS[name.removesuffix("_responses")]:
        assert provider(name).limits(headers) == (ObservedLimits(owners=owners) if owners else None)


OWNERS: dict[str, list[tuple[dict[str, str], tuple[str, ...]]]] = {
    "anthropic": [
        ({"anthropic-organization-id": "o1"}, ("organization o1",)),
        ({"anthropic-workspace-id": "wrkspc_1"}, ("workspace wrkspc_1",)),
        (
            {"anthropic-workspace-id": "wrkspc_1", "anthropic-organization-id": "o1"},
            ("organization o1", "workspace wrkspc_1"),
        ),
        ({"anthropic-organization-id": " "}, ()),
        ({"anthropic-organization-id": "x" * 129, "anthropic-workspace-id": "a\0b"}, ()),
        ({"openai-organization": "org-1"}, ()),
    ],
    "openai": [
        ({"openai-organization": "org-1"}, ("organization org-1",)),
        ({"openai-project": "proj_1", "openai-organization": "org-1"}, ("organization org-1", "project proj_1")),
        ({"openai-organization": "", "openai-project": "\tproj_1 "}, ("project proj_1",)),
        ({"anthropic-workspace-id": "wrkspc_1"}, ()),
    ],
}


@every_dialect
@pytest.mark.parametrize("digits", ["9" * 16, "9" * 400, "9" * 5000, "1e9", "-1"], ids=len)
def test_a_limit_that_cannot_be_is_no_limit_and_no_error(name: str, digits: str) -> None:
    names = "anthropic-ratelimit-requests-{}" if name == "anthropic" else "x-ratelimit-{}-requests"
    headers = {names.format(word): digits for word in ("limit", "remaining", "reset")}
    assert provider(name).limits(headers) is None
    sound = headers | {names.format("limit"): "50", names.format("remaining"): "49"}
    found = provider(name).limits(sound)
    assert found is not None
    assert found.requests is not None
    assert (found.requests.limit, found.requests.remaining) == (50, 49)


@every_dialect
@pytest.mark.parametrize("streamed", [False, True])
def test_a_429_for_too_steep_a_ramp_says_so_in_its_code(name: str, streamed: bool) -> None:
    """It is about the speed at which use grows: the limits themselves do not explain it."""
    code, body = {
        "anthropic": (
            "ramp_limit_exceeded",
            b'{"type":"error","error":{"type":"rate_limit_error","message":"m",'
            b'"details":{"error_code":"ramp_limit_exceeded"}}}',
        ),
        "openai": ("slow_down", b'{"error":{"message":"m","type":"rate_limit_error","param":null,"code":"slow_down"}}'),
    }[name.removesuffix("_responses")]
    found: LLMException | None
    if streamed:
        decoder = provider(name).stream_decoder(ASKED[name])
        decoder.feed(b"data: " + body + b"\n\n")
        found = decoder.error
    else:
        found = provider(name).classify(ASKED[name], 429, {"retry-after": "3"}, body)
        assert found.retry_after == 3.0
    assert isinstance(found, LLMRateLimitError)
    assert (found.code, found.status, found.retryable, found.scope) == (code, 429, True, Scope.KEY)


HEADER_NAMES = [
    f"{prefix}{name}"
    for prefix, names in (
        ("anthropic-ratelimit-", ("requests-limit", "tokens-remaining", "input-tokens-reset", "input-tokens-limit")),
        ("x-ratelimit-", ("limit-requests", "remaining-tokens", "reset-tokens", "limit-tokens")),
        ("x-ratelimit-", ("limit-project-tokens", "remaining-project-tokens", "reset-project-tokens")),
        ("anthropic-", ("organization-id", "workspace-id")),
        ("openai-", ("organization", "project")),
        ("", ("date", "retry-after", "retry-after-ms", "x-should-retry", "request-id")),
    )
    for name in names
]


@every_dialect
@given(headers=st.dictionaries(st.sampled_from(HEADER_NAMES), st.text(max_size=30) | st.from_regex(r"-?[0-9.]+[hms]*")))
def test_no_header_makes_a_dialect_raise(name: str, headers: dict[str, str]) -> None:
    provider(name).limits(headers)
    found = provider(name).classify(ASKED[name], 429, headers, b"")
    assert found.retry_after is None or found.retry_after >= 0
