"""The retry policy as a table: error, attempt and chance in, seconds or None out."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llm.core.exceptions import (
    LLMAuthenticationError,
    LLMConnectionError,
    LLMDeadlineExceededError,
    LLMException,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMPoolExhaustedError,
    LLMProtocolError,
    LLMQuotaExhaustedError,
    LLMRateLimitError,
    LLMStreamInterruptedError,
    LLMTimeoutError,
    Scope,
)
from llm.utils.backoff import RetryPolicy

POLICY = RetryPolicy(max_attempts=5, base_delay=0.5, max_delay=3.0, max_retry_after=60.0)


@pytest.mark.parametrize(
    ("error", "attempt", "jitter", "delay"),
    [
        # The bound doubles from attempt to attempt, up to the longest; the delay is a share of it.
        (LLMOverloadedError(""), 1, 1.0, 0.5),
        (LLMOverloadedError(""), 2, 1.0, 1.0),
        (LLMOverloadedError(""), 3, 1.0, 2.0),
        (LLMOverloadedError(""), 4, 1.0, 3.0),
        (LLMOverloadedError(""), 3, 0.25, 0.5),
        (LLMOverloadedError(""), 3, 0.0, 0.0),
        (LLMConnectionError(""), 1, 1.0, 0.5),
        (LLMStreamInterruptedError(""), 1, 1.0, 0.5),
        (LLMTimeoutError(""), 1, 1.0, 0.5),
        # The last attempt is the last.
        (LLMOverloadedError(""), 5, 1.0, None),
        (LLMRateLimitError(""), 5, 1.0, None),
        # The vendor's wish is a lower bound, and too long a wish ends the call.
        (LLMOverloadedError("", retry_after=10.0), 1, 1.0, 10.0),
        (LLMOverloadedError("", retry_after=0.1), 3, 1.0, 2.0),
        (LLMOverloadedError("", retry_after=-5.0), 1, 1.0, 0.5),
        (LLMOverloadedError("", retry_after=60.0), 1, 0.0, 60.0),
        (LLMOverloadedError("", retry_after=60.1), 1, 0.0, None),
        # A key's trouble is not slept off: another key may answer, however long this one has to rest.
        (LLMRateLimitError(""), 1, 1.0, 0.0),
        (LLMRateLimitError("", retry_after=3600.0), 1, 1.0, 0.0),
        # What repeating does not mend.
        (LLMInvalidRequestError(""), 1, 1.0, None),
        (LLMAuthenticationError(""), 1, 1.0, None),
        (LLMQuotaExhaustedError(""), 1, 1.0, None),
        (LLMPoolExhaustedError(""), 1, 1.0, None),
        (LLMDeadlineExceededError(""), 1, 1.0, None),
        (LLMProtocolError(""), 1, 1.0, None),
        (LLMOverloadedError("", retryable=False), 1, 1.0, None),
        (LLMOverloadedError("", scope=Scope.REQUEST), 1, 1.0, None),
    ],
)
def test_delay(error: LLMException, attempt: int, jitter: float, delay: float | None) -> None:
    assert POLICY.delay(error, attempt, jitter=jitter) == delay


def test_a_wish_without_a_bound_is_always_granted() -> None:
    policy = RetryPolicy(max_retry_after=None)
    assert policy.delay(LLMOverloadedError("", retry_after=7200.0), 1, jitter=0.0) == 7200.0


@pytest.mark.parametrize(
    ("facts", "jitter", "delay"),
    [({}, 1.0, 0.5), ({"retry_after": 7.0}, 1.0, 7.0), ({"retry_after": 61.0}, 1.0, None)],
)
def test_where_nobody_chooses_another_key_its_trouble_is_slept_off(
    facts: dict[str, Any], jitter: float, delay: float | None
) -> None:
    assert POLICY.delay(LLMRateLimitError("", **facts), 1, jitter=jitter, only_key=True) == delay


@given(attempt=st.integers(1, 10**6), jitter=st.floats(0.0, 1.0, exclude_max=True))
def test_the_delay_is_bounded_at_any_attempt(attempt: int, jitter: float) -> None:
    delay = RetryPolicy(max_attempts=10**9, max_delay=8.0).delay(LLMOverloadedError(""), attempt, jitter=jitter)
    assert delay is not None
    assert 0.0 <= delay <= 8.0
