"""What has come of a JSON text is told early, and never contradicts what comes later."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.utils.partial_json import NOTHING, PartialJSON, partial_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def agrees(early: Any, late: Any) -> bool:
    """Whether *early* may become *late*: strings and lists grow, objects gain keys, all else is final."""
    if isinstance(early, dict) and isinstance(late, dict):
        return all(key in late and agrees(value, late[key]) for key, value in early.items())
    if isinstance(early, list) and isinstance(late, list):
        return len(early) <= len(late) and all(map(agrees, early, late))
    if isinstance(early, str) and isinstance(late, str):
        return late.startswith(early)
    return bool(early == late)


@given(value=VALUES, escaped=st.booleans(), indent=st.sampled_from([None, 1]))
def test_every_beginning_of_a_text_agrees_with_the_whole(value: Any, escaped: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=escaped, indent=indent)
    for end in range(len(text)):
        early = partial_json(text[:end])
        if early is not NOTHING and isinstance(value, (dict, list, str)):
            assert agrees(early, value), text[:end]
    assert partial_json(text) == value


SIGNS = st.text(st.sampled_from('{}[]",:\\ 1tue"ab'), max_size=20)


@given(text=SIGNS | VALUES.map(json.dumps), sizes=st.lists(st.integers(1, 7), min_size=1))
def test_a_text_in_pieces_is_what_it_is_in_one(text: str, sizes: list[int]) -> None:
    growing, end = PartialJSON(), 0
    while end < len(text):
        for size in sizes:
            found = growing.feed(text[end : end + size])
            end += size
            assert found == partial_json(text[:end]), text[:end]


@given(st.text())
def test_nothing_makes_it_raise(text: str) -> None:
    partial_json(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", NOTHING),
        ("  ", NOTHING),
        ("Sure! Here", NOTHING),
        ("}", NOTHING),
        ("[}", NOTHING),
        ("{", {}),
        ('{"a', {}),
        ('{"a":', {}),
        ('{"a":"x', {"a": "x"}),
        ('{"a":"x\\', {"a": "x"}),
        ('{"a":"\\ud83d\\ude', {"a": ""}),
        ('{"a":"\\ud83d\\ude00', {"a": "😀"}),
        ('{"a":1', {}),
        ('{"a":1,', {"a": 1}),
        ('{"a":[1,{"b":tr', {"a": [1, {}]}),
        ('{"a":{}}  and more', {"a": {}}),
        ('["a","b', ["a", "b"]),
        ('"ab', "ab"),
    ],
)
def test_what_is_told_of_a_beginning(text: str, value: Any) -> None:
    assert partial_json(text) == value


def test_depth_does_not_multiply_the_work() -> None:
    """Brackets without end from a model that has lost its way; if each were closed anew, this would take minutes."""
    assert partial_json("[" * 200_000) is NOTHING
