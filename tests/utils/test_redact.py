"""A key never stands in an error, however the vendor echoed it."""

from __future__ import annotations

import base64
import pickle
import traceback

import pytest

from llm.core.exceptions import LLMConnectionError, LLMException
from llm.utils.redact import MASK, credentials, redact

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


@pytest.mark.parametrize("cut", [12, 15])
def test_a_key_that_the_end_of_a_message_cuts_off_is_blanked_too(cut: int) -> None:
    error = LLMException(f"no such key: {SECRET[:cut]}")
    redact(error, SECRET)
    assert error.message == f"no such key: {MASK}"


def test_what_is_shown_by_nobody_is_dropped() -> None:
    error = LLMException("no")
    try:
        try:
            raise ValueError(SECRET)
        except ValueError:
            raise error from None
    except LLMException:
        assert isinstance(error.__context__, ValueError)
    redact(error, SECRET)
    assert error.__context__ is None


def test_credentials_are_headers_that_are_named_so_and_a_proxys_password() -> None:
    headers = {"Authorization": "Bearer a-b-c", "X-Api-Key": "k-e-y", "X-Team": "blue"}
    assert credentials(headers) == ("Bearer a-b-c", "k-e-y")
    assert credentials(None) == credentials({}, "http://proxy.example:3128") == ()
    by_password = credentials(None, "http://me:p%40ss@proxy.example:3128")
    assert by_password == ("p@ss", base64.b64encode(b"me:p@ss").decode()[:8])
