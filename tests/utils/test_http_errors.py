"""From a status, its headers and the vendor's words to an exception. Whole replies are in tests/providers/golden."""

from __future__ import annotations

from typing import Any

import pytest

from llm.core.exceptions import (
    LLMAuthenticationError,
    LLMContextLengthError,
    LLMException,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMProtocolError,
    LLMQuotaExhaustedError,
    LLMRateLimitError,
    LLMRequestTooLargeError,
    LLMTimeoutError,
    Scope,
)
from llm.utils.error_body import MAX_BODY, MAX_MESSAGE, ErrorBody
from llm.utils.http_errors import build_error, error_for_status, unreadable

SAID = ErrorBody(message="No.", structured=True)


def built(
    error: type[LLMException] = LLMOverloadedError,
    said: ErrorBody = SAID,
    *,
    status: int = 503,
    headers: dict[str, str] | None = None,
    obey_retry: bool = True,
    **more: Any,
) -> LLMException:
    facts = {"body": b"{}", "code": None, "request_id": None} | more
    return build_error(
        error, said, provider="p", model="m", status=status, headers=headers or {}, obey_retry=obey_retry, **facts
    )


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, LLMInvalidRequestError),
        (401, LLMAuthenticationError),
        (402, LLMQuotaExhaustedError),
        (403, LLMAuthenticationError),
        (404, LLMInvalidRequestError),
        (408, LLMTimeoutError),
        (409, LLMOverloadedError),
        (413, LLMRequestTooLargeError),
        (422, LLMInvalidRequestError),
        (425, LLMOverloadedError),
        (429, LLMRateLimitError),
        (498, LLMOverloadedError),
        (500, LLMOverloadedError),
        (504, LLMTimeoutError),
        (529, LLMOverloadedError),
        (599, LLMOverloadedError),
        (302, LLMProtocolError),
        (101, LLMProtocolError),
        (700, LLMProtocolError),
    ],
)
def test_a_status_without_words_means_an_error(status: int, error: type[LLMException]) -> None:
    assert error_for_status(status) is error


def test_an_error_knows_all_that_was_said() -> None:
    error = built(
        LLMRateLimitError, status=429, headers={"retry-after": "7"}, body=b"{...}", code="slow_down", request_id="r1"
    )
    assert type(error) is LLMRateLimitError
    assert (error.message, error.provider, error.model, error.status) == ("No.", "p", "m", 429)
    assert (error.code, error.request_id, error.retry_after, error.body) == ("slow_down", "r1", 7.0, b"{...}")
    assert error.sent, "who has an answer has sent the request"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (ErrorBody(message="No.", structured=True), "No."),
        (ErrorBody(message="Bad Gateway"), "status 502: Bad Gateway"),
        (ErrorBody(code="broken", type="kind", structured=True), "status 502: broken"),
        (ErrorBody(type="kind", structured=True), "status 502: kind"),
        (ErrorBody(), "status 502: the body is empty"),
    ],
)
def test_a_message_is_the_vendors_or_else_begins_with_the_status(said: ErrorBody, message: str) -> None:
    assert built(said=said, status=502).message == message


def test_a_long_message_is_cut_and_its_hint_is_not() -> None:
    said = ErrorBody(message="x" * 10_000, structured=True)
    assert len(built(said=said).message) == MAX_MESSAGE
    hinted = built(said=said, hint="try another").message
    assert hinted.endswith("x (try another)")
    assert len(hinted) == MAX_MESSAGE


def test_a_large_body_is_kept_in_part() -> None:
    assert len(built(body=b"x" * (MAX_BODY + 1)).body) == MAX_BODY


@pytest.mark.parametrize(
    "message",
    [
        "prompt is too long: 210000 tokens > 200000 maximum",
        "input length and `max_tokens` exceed context limit: 1 + 2 > 3",
        "This model's maximum context length is 4096 tokens",
        "the request exceeds the available context size",
        "Your input exceeds the model's maximum context window",
    ],
)
def test_a_prompt_that_does_not_fit_is_known_by_the_vendors_words(message: str) -> None:
    said = ErrorBody(message=message, structured=True)
    assert type(built(LLMInvalidRequestError, said, status=400)) is LLMContextLengthError
    assert type(built(LLMOverloadedError, said, status=500)) is LLMOverloadedError, "of a 500 nobody knows"


def test_a_timeout_that_a_server_tells_of_is_the_servers() -> None:
    error = built(LLMTimeoutError, status=504)
    assert isinstance(error, LLMTimeoutError)
    assert error.phase == "server"


@pytest.mark.parametrize(
    ("error", "header", "obey", "retryable"),
    [
        (LLMOverloadedError, "false", True, False),
        (LLMOverloadedError, "false", False, False),
        (LLMOverloadedError, None, True, True),
        (LLMInvalidRequestError, "true", True, True),
        (LLMInvalidRequestError, "true", False, False),
        (LLMInvalidRequestError, "maybe", True, False),
        (LLMQuotaExhaustedError, "true", True, False),
        (LLMAuthenticationError, "true", True, False),
    ],
)
def test_who_may_say_whether_to_repeat(
    error: type[LLMException], header: str | None, obey: bool, retryable: bool
) -> None:
    headers = {"x-should-retry": header} if header is not None else {}
    assert built(error, headers=headers, obey_retry=obey).retryable is retryable


@pytest.mark.parametrize(("error", "scope"), [(LLMInvalidRequestError, Scope.PROVIDER), (LLMRateLimitError, Scope.KEY)])
def test_a_request_that_may_be_repeated_was_not_at_fault(error: type[LLMException], scope: Scope) -> None:
    assert built(error, headers={"x-should-retry": "true"}).scope is scope


def test_what_cannot_be_read_is_not_quoted_unless_it_is_a_page() -> None:
    answer = unreadable("a body that is no message", b'{"text":"a private matter"', provider="p", model="m")
    assert answer.message == "a body that is no message (26 bytes)"
    assert answer.retryable
    page = unreadable("no message", b" <html><title>Sign in</title>private</html>", provider="p", model="m")
    assert page.message == "no message (43 bytes, a page: Sign in)"
    assert page.body == b" <html><title>Sign in</title>private</html>"
