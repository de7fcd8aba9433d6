"""A key never stands in an error, however the vendor echoed it."""

from __future__ import annotations

import pickle
import traceback

import pytest

from llm.core.exceptions import LLMConnectionError, LLMException
from llm.utils.redact import MASK, redact

SECRET = "sk-very-secret-1"


def echoing() -> LLMException:
    return LLMException(
        f"no such key: {SECRET}!",
        code=f"bad_{SECRET}",
        request_id=f"req-{SECRET}",
        body=f'{{"key": "{SECRET}", "again": "{SECRET}"}}'.encode(),
        partial=f"you sent {SECRET}",
    )


def test_an_error_is_blanked_in_every_field_that_holds_text() -> None:
    error = echoing()
    redact(error, SECRET)
    assert (error.message, error.args) == (f"no such key: {MASK}!", (f"no such key: {MASK}!",))
    assert (error.code, error.request_id) == (f"bad_{MASK}", f"req-{MASK}")
    assert error.body == b'{"key": "***", "again": "***"}'
    assert error.partial == f"you sent {MASK}"
    assert SECRET.encode() not in pickle.dumps(error)


def test_a_cause_is_blanked_too_however_deep() -> None:
    error, middle, root = LLMException("no"), LLMConnectionError("lost"), echoing()
    error.__cause__, middle.__cause__ = middle, root
    redact(error, SECRET)
    assert SECRET not in "".join(traceback.format_exception(error))
    assert SECRET.encode() not in root.body


def test_causes_that_go_round_in_a_circle_end() -> None:
    one, other = echoing(), echoing()
    one.__cause__, other.__cause__ = other, one
    redact(one, SECRET)
    assert SECRET not in one.message + other.message


def test_the_frames_that_held_the_key_are_dropped_and_those_of_the_caller_are_not() -> None:
    def caller() -> None:
        raise KeyError("the caller's own")

    def send(key: str) -> None:
        raise LLMConnectionError("lost") from OSError(key.replace(key, "reset"))

    caught: LLMException | None = None
    try:
        try:
            caller()
        except KeyError:
            send(SECRET)
    except LLMException as error:
        redact(error, SECRET)
        caught = error
    assert caught is not None
    shown = "".join(traceback.TracebackException.from_exception(caught, capture_locals=True).format())
    assert SECRET not in shown
    assert isinstance(caught.__context__, OSError | KeyError)
    assert "lost" in shown


@pytest.mark.parametrize("short", ["", "k", "abc"])
def test_a_key_too_short_to_be_one_blanks_nothing(short: str) -> None:
    error = LLMException("abc k")
    redact(error, short)
    assert error.message == "abc k"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("sk-/a+b%c=1", "sk-/a+b%c=1"),
        ("sk-/a+b%c=1", "sk-%2Fa%2Bb%25c%3D1"),
        ("sk-/a+b%c=1", "sk-%2fa%2bb%25c%3d1"),
        ("sk-/a+b%c=1", "sk-\\/a+b%c=1"),
        ("sk<1>&'2\"", "sk&lt;1&gt;&amp;&#x27;2&quot;"),
        ("sk-very-secret-1", "c2stdmVyeS1zZWNyZXQt"),
    ],
)
def test_a_key_is_blanked_as_urls_json_html_and_base64_write_it(written: str, shown: str) -> None:
    error = LLMException(f"no such key: {shown}, sorry")
    redact(error, written)
    assert error.message == f"no such key: {MASK}, sorry"
