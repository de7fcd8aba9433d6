"""The words for failure: their tree, what they carry, and that they survive a journey."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import llm
from llm.core import exceptions
from llm.core.exceptions import AttemptRecord, LLMException, Scope
from llm.core.types import Usage

TREE = {
    "LLMConfigurationError": "LLMException",
    "LLMConnectionError": "LLMException",
    "LLMStreamInterruptedError": "LLMConnectionError",
    "LLMTimeoutError": "LLMException",
    "LLMDeadlineExceededError": "LLMTimeoutError",
    "LLMRateLimitError": "LLMException",
    "LLMAuthenticationError": "LLMException",
    "LLMPoolExhaustedError": "LLMException",
    "LLMCircuitOpenError": "LLMPoolExhaustedError",
    "LLMBudgetExceededError": "LLMException",
    "LLMProviderError": "LLMException",
    "LLMInvalidRequestError": "LLMProviderError",
    "LLMContextLengthError": "LLMInvalidRequestError",
    "LLMModelNotFoundError": "LLMInvalidRequestError",
    "LLMContentFilteredError": "LLMInvalidRequestError",
    "LLMRequestTooLargeError": "LLMInvalidRequestError",
    "LLMQuotaExhaustedError": "LLMProviderError",
    "LLMOverloadedError": "LLMProviderError",
    "LLMProtocolError": "LLMProviderError",
}
SEVEN = (
    "LLMProviderError",
    "LLMConnectionError",
    "LLMRateLimitError",
    "LLMAuthenticationError",
    "LLMTimeoutError",
    "LLMPoolExhaustedError",
    "LLMConfigurationError",
)
RETRYABLE = {
    "LLMConnectionError": Scope.PROVIDER,
    "LLMStreamInterruptedError": Scope.PROVIDER,
    "LLMTimeoutError": Scope.PROVIDER,
    "LLMRateLimitError": Scope.KEY,
    "LLMOverloadedError": Scope.PROVIDER,
}
FINAL = {
    "LLMAuthenticationError": Scope.KEY,
    "LLMQuotaExhaustedError": Scope.KEY,
    "LLMProtocolError": Scope.PROVIDER,
}


def kind(name: str) -> type[LLMException]:
    found: type[LLMException] = getattr(llm, name)
    return found


def full(name: str) -> LLMException:
    """An error with every fact that it can carry."""
    more: dict[str, Any] = {"dimension": "input_tokens", "need": 9, "limit": 5} if "TooLarge" in name else {}
    if issubclass(kind(name), exceptions.LLMTimeoutError):
        more["phase"] = "first_byte"
    error = kind(name)(
        "it failed",
        provider="vendor",
        model="m",
        key_id="vendor/2",
        status=429,
        code="slow_down",
        request_id="req-1",
        sent=True,
        retryable=True,
        retry_after=2.5,
        scope=Scope.KEY,
        body=b"{}",
        partial="half an ans",
        usage=Usage(3, 4),
        **more,
    )
    error.attempts = (AttemptRecord(1, "vendor", "m", "vendor/2", 0.0, 1.0, name, 429, True),)
    return error


@pytest.mark.parametrize("name", SEVEN)
def test_the_seven_have_the_base_as_their_only_base(name: str) -> None:
    assert kind(name).__bases__ == (LLMException,)


@pytest.mark.parametrize(("name", "base"), TREE.items())
def test_the_tree_is_the_drawing(name: str, base: str) -> None:
    assert kind(name).__bases__ == (kind(base),)
    assert name in llm.__all__
    drawing = exceptions.__doc__ or ""
    assert name in drawing


def test_the_tree_has_no_other_leaf() -> None:
    found: set[str] = set()
    pending = [LLMException]
    while pending:
        for child in pending.pop().__subclasses__():
            if child.__module__ == exceptions.__name__:
                found.add(child.__name__)
                pending.append(child)
    assert found == set(TREE)


def test_the_base_is_a_plain_exception_that_cancellation_is_not() -> None:
    assert LLMException.__bases__ == (Exception,)


@pytest.mark.parametrize("name", TREE)
def test_what_a_retry_decision_needs_has_a_default(name: str) -> None:
    error = kind(name)("no")
    assert error.retryable is (name in RETRYABLE)
    assert error.scope is (RETRYABLE.get(name) or FINAL.get(name) or Scope.REQUEST)
    assert (error.sent, error.retry_after, error.attempts) == (False, None, ())


def test_what_is_said_beats_the_default() -> None:
    error = exceptions.LLMRateLimitError("no", retryable=False, scope=Scope.PROVIDER)
    assert (error.retryable, error.scope) == (False, Scope.PROVIDER)


def test_the_deadline_is_a_timeout_that_is_not_repeated() -> None:
    error = exceptions.LLMDeadlineExceededError("too late")
    assert (error.phase, error.retryable, error.scope) == ("deadline", False, Scope.REQUEST)


@pytest.mark.parametrize("name", TREE)
@pytest.mark.parametrize("way", ["pickle", "copy", "deepcopy"])
def test_every_fact_survives_a_journey(name: str, way: str) -> None:
    error = full(name)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(error))
    else:
        twin = copy.copy(error) if way == "copy" else copy.deepcopy(error)
    assert type(twin) is kind(name)
    assert twin is not error
    assert vars(twin) == vars(error)
    assert (twin.args, str(twin), twin.attempts) == (error.args, str(error), error.attempts)
    assert twin.__traceback__ is None


class UsersOwnError(exceptions.LLMProviderError):
    """A provider of the user's may have words of its own, with arguments of its own."""

    def __init__(self, colour: str) -> None:
        super().__init__(f"it is {colour}")
        self.colour = colour


def test_a_users_own_error_survives_a_journey_too() -> None:
    twin = pickle.loads(pickle.dumps(UsersOwnError("red")))
    assert (type(twin), twin.colour, str(twin)) == (UsersOwnError, "red", "it is red")


def test_str_tells_the_facts_that_are_known() -> None:
    error = full("LLMRateLimitError")
    assert str(error) == (
        "it failed [key vendor/2, model m, status 429, code slow_down, request req-1, retry after 2.5 s]"
    )
    error.attempts *= 3
    assert str(error).endswith("retry after 2.5 s, 3 attempts]")


def test_str_without_facts_is_the_message_and_without_a_key_names_the_provider() -> None:
    assert str(LLMException("just that")) == "just that"
    assert str(LLMException("no", provider="vendor")) == "no [provider vendor]"


def test_str_shows_neither_body_nor_partial_text() -> None:
    error = LLMException("no", body=b"the body", partial="the text")
    assert "the body" not in str(error)
    assert "the text" not in repr(error)
