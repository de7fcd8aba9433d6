"""The golden files are complete: what the dialects' tables and the vendors' documents name has a case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from llm.providers import anthropic, openai, openai_base, openai_responses
from llm.providers.base import Provider
from llm.utils.http_errors import ERROR_BY_STATUS
from tests.providers.corpus import ASKED, DIALECTS, GOLDEN, Case, cases, provider

TABLES = {"anthropic": anthropic, "openai": openai}
every_dialect = pytest.mark.parametrize("name", DIALECTS)


def golden(name: str, kind: str) -> dict[str, Case]:
    found: dict[str, Case] = msgspec.json.decode((GOLDEN / name / f"{kind}.json").read_bytes())
    return found


def streams(name: str) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (GOLDEN / name / "streams").iterdir()}


def json(text: bytes | str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def events(name: str) -> Iterator[Any]:
    """Every event of every stream that is a JSON object."""
    for data in streams(name).values():
        for line in data.splitlines():
            event = json(line.removeprefix(b"data:"))
            if isinstance(event, dict):
                yield event


def values(of: Any, key: str) -> Iterator[Any]:
    """What stands under *key* anywhere in *of*."""
    if isinstance(of, dict):
        if key in of:
            yield of[key]
        for inner in of.values():
            yield from values(inner, key)
    elif isinstance(of, list):
        for inner in of:
            yield from values(inner, key)


def words(of: Any, key: str) -> set[str]:
    return {value for value in values(of, key) if isinstance(value, str)}


def errors(name: str) -> list[tuple[int, Any]]:
    """Status and error object of every golden error that has one."""
    found = []
    for case in golden(name, "errors").values():
        body = json(case["body"])
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            found.append((case["status"], body["error"]))
    return found


# ---------------------------------------------------------------------------------------------------- stop reasons


@pytest.mark.parametrize("name", TABLES)
def test_every_stop_reason_has_a_reply_and_a_stream(name: str) -> None:
    key = {"anthropic": "stop_reason", "openai": "finish_reason"}[name]
    known = set(TABLES[name].STOP_REASON)
    replies = words([case["body"] for case in golden(name, "replies").values()], key)
    streamed = words(list(events(name)), key)
    assert known <= replies
    assert known <= streamed
    for found in (replies, streamed):
        assert found - known - openai.BROKEN_OFF, "and one that nobody knows"
    nothing = [case for case in golden(name, "replies").values() if None in values(case["body"], key)]
    assert nothing, "and none"


def test_every_state_of_a_response_has_a_reply_and_its_ends_a_stream() -> None:
    replies = words([case["body"] for case in golden("openai_responses", "replies").values()], "status")
    assert replies >= {"completed", "incomplete", "failed", "in_progress"}
    reasons = words([case["body"] for case in golden("openai_responses", "replies").values()], "reason")
    assert reasons > set(openai_responses.INCOMPLETE), "and one that nobody knows"
    assert words(list(events("openai_responses")), "reason") >= set(openai_responses.INCOMPLETE)


def test_every_way_of_breaking_off_has_a_case() -> None:
    replies = words([case["body"] for case in golden("openai", "replies").values()], "finish_reason")
    assert replies | words(list(events("openai")), "finish_reason") >= openai.BROKEN_OFF


# ---------------------------------------------------------------------------------------------------- usage

USAGE = {
    "anthropic": {
        "input_tokens",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
        "cache_creation",
        "ephemeral_5m_input_tokens",
        "ephemeral_1h_input_tokens",
        "output_tokens",
        "output_tokens_details",
        "thinking_tokens",
        "server_tool_use",
        "service_tier",
        "speed",
        "inference_geo",
    },
    "openai": {
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        "prompt_tokens_details",
        "cached_tokens",
        "cache_write_tokens",
        "audio_tokens",
        "image_tokens",
        "text_tokens",
        "completion_tokens_details",
        "reasoning_tokens",
        "accepted_prediction_tokens",
        "rejected_prediction_tokens",
    },
    "openai_responses": {
        "input_tokens",
        "input_tokens_details",
        "cached_tokens",
        "cache_write_tokens",
        "output_tokens",
        "output_tokens_details",
        "reasoning_tokens",
        "total_tokens",
    },
}
"""What the vendors' documents name in a usage."""


def keys(of: Any) -> set[str]:
    found = set(of) if isinstance(of, dict) else set()
    for inner in of.values() if isinstance(of, dict) else of if isinstance(of, list) else ():
        found |= keys(inner)
    return found


@every_dialect
def test_every_figure_of_a_usage_has_a_reply_and_a_stream(name: str) -> None:
    replies = [case["body"] for case in golden(name, "replies").values()]
    in_replies = keys(list(values(replies, "usage")))
    in_streams = keys(list(values(list(events(name)), "usage")))
    assert in_replies >= USAGE[name]
    # A stream tells the tier once, in its start.
    assert in_streams >= USAGE[name]
    module = openai_responses if name == "openai_responses" else TABLES[name]
    assert set(module._Usage.__struct_fields__) - {"prompt_cache_hit_tokens"} <= USAGE[name]


def test_the_figures_in_other_places_and_by_other_names_have_streams() -> None:
    for title, word in {
        "cached_tokens_deepseek": b"prompt_cache_hit_tokens",
        "usage_of_its_own_name_groq": b"x_groq",
        "usage_in_the_choice_moonshot": b'"usage"',
        "output_without_thinking_xai": b"reasoning_tokens",
    }.items():
        assert word in streams("openai")[title]
    vllm = [event for event in streams("openai")["usage_on_every_chunk_vllm"].split(b"\n\n") if b"{" in event]
    assert all(b'"prompt_tokens"' in event for event in vllm)


@every_dialect
@pytest.mark.parametrize("kind", ["no usage", "usage that cannot be read"])
def test_a_usage_that_is_missing_or_unreadable_has_a_reply(name: str, kind: str) -> None:
    assert golden(name, "replies")[kind]["expect"]["usage"] == {}


# ---------------------------------------------------------------------------------------------------- errors

ROWS: dict[str, list[tuple[int, str | None, str | None]]] = {
    "anthropic": [
        (400, "invalid_request_error", None),
        (401, "authentication_error", None),
        (402, "billing_error", None),
        (403, "permission_error", None),
        (404, "not_found_error", None),
        (408, None, None),
        (409, "conflict_error", None),
        (413, "request_too_large", None),
        (429, "rate_limit_error", None),
        (429, "rate_limit_error", "ramp_limit_exceeded"),
        (429, "rate_limit_error", "enforced_spend_limit_reached"),
        (429, "rate_limit_error", "contract_spend_limit_reached"),
        (500, "api_error", None),
        (503, "api_error", "cmek_key_unreachable"),
        (504, "timeout_error", None),
        (529, "overloaded_error", None),
    ],
    "openai": [
        (400, "invalid_request_error", None),
        (400, "invalid_request_error", "context_length_exceeded"),
        (400, "invalid_request_error", "unsupported_value"),
        (400, "invalid_request_error", "content_policy_violation"),
        (401, "invalid_request_error", "invalid_api_key"),
        (403, "invalid_request_error", None),
        (404, "invalid_request_error", "model_not_found"),
        (408, None, None),
        (409, "invalid_request_error", None),
        (413, None, None),
        (422, None, None),
        (429, "requests", "rate_limit_exceeded"),
        (429, "tokens", "rate_limit_exceeded"),
        (429, "rate_limit_error", "slow_down"),
        (429, "insufficient_quota", "credit_balance_exhausted"),
        (429, "insufficient_quota", "organization_spend_limit_exceeded"),
        (429, "insufficient_quota", "project_spend_limit_exceeded"),
        (429, "insufficient_quota", "organization_usage_limit_exceeded"),
        (429, "insufficient_quota", "insufficient_quota"),
        (500, "server_error", None),
        (503, "service_unavailable_error", "server_is_overloaded"),
    ],
}
"""The vendors' own tables of errors: status, type, and code; None where any will do."""


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_every_error_of_the_vendors_table_has_a_case(name: str, row: tuple[int, str | None, str | None]) -> None:
    status, kind, code = row
    if kind is None:
        assert status in {case["status"] for case in golden(name, "errors").values()}
        return
    found = []
    for their_status, error in errors(name):
        details = error.get("details")
        if name == "openai":
            their_code = error.get("code")
        else:
            their_code = details.get("error_code") if isinstance(details, dict) else None
        found.append((their_status, error.get("type"), their_code))
    assert [each for each in found if each[:2] == (status, kind) and code in (None, each[2])], row


@every_dialect
def test_every_status_and_word_of_our_tables_has_a_case(name: str) -> None:
    statuses = {case["status"] for case in golden(name, "errors").values()}
    assert set(ERROR_BY_STATUS) <= statuses
    assert {100 * (status // 100) for status in statuses - set(ERROR_BY_STATUS)} >= {300, 400, 500}
    said = {case["body"] for case in golden(name, "errors").values()}
    table = anthropic if name == "anthropic" else openai_base
    openings = anthropic.ERROR_BY_OPENING if name == "anthropic" else ()
    for word in (*table.STATUS_BY_TYPE, *table.ERROR_BY_CODE, *openings):
        assert [body for body in said if word in body], f"no golden error says {word}"
    under_200 = [case["body"] for case in golden(name, "errors").values() if case["status"] == 200]
    for word in table.STATUS_BY_TYPE:
        assert [body for body in under_200 if word in body], f"no golden error says {word} under status 200"


@every_dialect
def test_every_kind_of_body_that_is_no_error_object_has_a_case(name: str) -> None:
    bodies = [case["body"] for case in golden(name, "errors").values()]
    assert "" in bodies, "empty"
    assert [body for body in bodies if body.startswith("<")], "a page"
    assert [body for body in bodies if isinstance(json(body), list) and json(body)], "an array"
    assert "[]" in bodies, "an empty array"
    assert [body for body in bodies if body and json(body) is None and body[0] not in "<[{n"], "a text"
    assert [body for body in bodies if isinstance(json(body), dict) and isinstance(json(body).get("error"), str)]
    assert [error for _, error in errors(name) if None in error.values() and not any(error.values())], "nulls"


def test_codes_that_are_numbers_have_cases_in_bodies_and_streams() -> None:
    numbers = [status for status, error in errors("openai") if isinstance(error.get("code"), int)]
    assert 200 in numbers
    assert [status for status in numbers if status >= 400]
    assert [event for event in events("openai") for code in values(event.get("error"), "code") if isinstance(code, int)]


# ---------------------------------------------------------------------------------------------------- streams

ODDITIES: dict[str, dict[str, bytes]] = {
    "anthropic": {
        "a ping": b"event: ping",
        "an unknown event": b"event: weather",
        "thinking": b"thinking_delta",
        "a signature": b"signature_delta",
        "an error": b"event: error",
        "nulls": b'"delta":null',
    },
    "openai": {
        "no choices": b'"choices":[]',
        "a delta that is null": b'"delta":null',
        "a content that is null": b'"content":null',
        "a comment": b"\n: ",
        "an error": b'"error":{',
        "a refusal": b'"refusal":"',
        "an empty finish_reason": b'"finish_reason":""',
    },
}


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, odd in ODDITIES.items() for what in odd])
def test_every_oddity_of_a_stream_has_a_file(name: str, what: str) -> None:
    assert [data for data in streams(name).values() if ODDITIES[name][what] in b"\n" + data], what


@every_dialect
def test_every_event_of_a_stream_that_the_vendor_names_has_a_file(name: str) -> None:
    if name == "anthropic":
        named = {
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
            "ping",
            "error",
        }
        assert named <= {event.get("type") for event in events(name)}
        deltas = [event.get("delta") for event in events(name) if event.get("type") == "content_block_delta"]
        assert {"text_delta", "input_json_delta", "thinking_delta", "signature_delta", "citations_delta"} <= words(
            deltas, "type"
        )
    elif name == "openai_responses":
        named = {
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.output_item.done",
            "response.content_part.added",
            "response.content_part.done",
            "response.output_text.delta",
            "response.output_text.done",
            "response.refusal.delta",
            "response.refusal.done",
            "response.reasoning_text.delta",
            "response.reasoning_summary_part.added",
            "response.reasoning_summary_text.delta",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.web_search_call.in_progress",
            "response.completed",
            "response.incomplete",
            "response.failed",
            "error",
        }
        assert named <= {event.get("type") for event in events(name)}
    else:
        assert any(b"data: [DONE]" in data for data in streams(name).values())
        for field in ("role", "content", "refusal", "tool_calls", "function_call"):
            assert [event for event in events(name) for delta in values(event, "delta") if delta and field in delta]


@every_dialect
def test_every_end_that_a_stream_can_have_has_a_file(name: str) -> None:
    found = golden(name, "streams")
    ends = {(case["expect"]["error"] or {}).get("class") for case in found.values()}
    assert ends >= {
        None,
        "LLMStreamInterruptedError",
        "LLMProtocolError",
        "LLMOverloadedError",
        "LLMRateLimitError",
        "LLMQuotaExhaustedError",
    }
    assert {"empty", "no_last_blank_line", "cut_before_content", "cut_after_content", "cut_within_an_event"} <= set(
        found
    )
    if name == "openai":
        assert not any(b"[DONE]" in streams(name)[title] for title in ("cut_before_done", "empty"))
        assert found["no_done_from_a_compatible_server"]["expect"]["done"]


# ---------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(("name", "case"), cases("headers"))
def test_headers_mean_what_their_golden_file_says(name: str, case: Case) -> None:
    dialect: Provider = provider(name)
    expect = dict(case["expect"])
    if "retry_after" in expect:
        error = dialect.classify(ASKED[name], 429, case["headers"], b"")
        assert error.retry_after == expect.pop("retry_after")
    limits = dialect.limits(case["headers"])
    assert limits is not None
    assert list(limits.owners) == expect.pop("owners", list(limits.owners))
    for field, (limit, remaining, reset_after) in expect.items():
        state = getattr(limits, field)
        assert (state.limit, state.remaining, state.reset_after) == (limit, remaining, reset_after)


@every_dialect
def test_every_rate_limit_header_has_a_golden_file(name: str) -> None:
    headers = golden(name, "headers")["limits"]["headers"]
    anywhere = {header for case in golden(name, "headers").values() for header in case["headers"]}
    if name == "anthropic":
        named = {header for names in anthropic._LIMIT_HEADERS for header in names}
        owners = {"anthropic-organization-id", "anthropic-workspace-id"}
    else:
        named = {f"x-ratelimit-{a}-{b}" for a in ("limit", "remaining", "reset") for b in ("requests", "tokens")}
        owners = {"openai-organization", "openai-project"}
        assert {header for names in openai_base._LIMIT_HEADERS for header in names} <= anywhere
    assert named <= set(headers)
    assert owners <= anywhere
