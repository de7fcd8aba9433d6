"""A request's JSON body, with what the user adds to it."""

from __future__ import annotations

from typing import Any

import pytest

from llm.core.exceptions import LLMInvalidRequestError
from llm.utils.json_body import encode_body


def encoded(body: dict[str, Any], *extras: dict[str, Any] | None) -> bytes:
    return encode_body(body, *extras, provider="p", model="m")


def test_later_extras_are_laid_over_earlier_ones_and_over_the_body() -> None:
    assert encoded({"a": 1, "b": 1, "c": 1}, {"b": 2, "c": 2}, {"c": 3, "d": 3}) == b'{"a":1,"b":2,"c":3,"d":3}'


def test_an_extra_replaces_a_value_as_a_whole() -> None:
    assert encoded({"a": {"x": 1}}, {"a": {"y": 2}}) == b'{"a":{"y":2}}'


def test_none_in_an_extra_removes_a_key_and_is_never_sent() -> None:
    assert encoded({"a": 1, "b": 1}, {"a": None, "c": None}) == b'{"b":1}'


def test_without_extras_the_body_is_sent_as_it_is() -> None:
    assert encoded({"a": None}, None, {}) == b'{"a":null}'


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize("value", [object(), "\ud800", endless()], ids=["an object", "a lone surrogate", "endless"])
def test_what_is_no_json_is_the_requests_fault(value: Any) -> None:
    with pytest.raises(LLMInvalidRequestError, match="cannot be written as JSON") as caught:
        encoded({"a": value})
    assert (caught.value.provider, caught.value.model) == ("p", "m")
    assert caught.value.__cause__ is not None
    assert not caught.value.sent
