"""Numbers and times in headers: what is read, and that nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.utils.header_values import go_duration, http_date, number, retry_after, rfc3339, whole_number

NOON = 1_795_341_600.0
"""2026-11-22 10:00:00 UTC."""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12ms", 0.012),
        ("6m0s", 360.0),
        ("1s", 1.0),
        ("1h2m3.5s", 3723.5),
        ("1d", 86400.0),
        (".5s", 0.5),
        ("1.s", 1.0),
        ("100us", 1e-4),
        ("100µs", 1e-4),
        ("7ns", 7e-9),
        ("0s", 0.0),
        ("30", 30.0),
        ("", None),
        (None, None),
        ("-1s", None),
        ("1s ", None),
        ("1 s", None),
        ("s", None),
        ("1s2", None),
        ("1x", None),
        ("nan", None),
        ("9" * 400 + "s", None),
    ],
)
def test_a_duration_of_gos_is_seconds(text: str | None, seconds: float | None) -> None:
    assert go_duration(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-11-22T10:00:00Z", NOON),
        ("2026-11-22T10:00:00.5Z", NOON + 0.5),
        ("2026-11-22T11:00:00+01:00", NOON),
        ("2026-11-22T10:00:00", None),
        ("2026-13-22T10:00:00Z", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_a_timestamp_is_an_instant(text: str | None, instant: float | None) -> None:
    assert rfc3339(text) == instant


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("Sun, 22 Nov 2026 10:00:00 GMT", NOON),
        (" Sun, 22 Nov 2026 10:00:00 GMT ", NOON),
        ("Sunday, 22-Nov-26 10:00:00 GMT", NOON),
        ("Sun Nov 22 10:00:00 2026", NOON),
        ("Sun Nov  1 10:00:00 2026", NOON - 21 * 86400),
        ("Sun, 31 Nov 2026 10:00:00 GMT", None),
        ("Sun, 00 Nov 2026 10:00:00 GMT", None),
        ("Sun, 22 Nix 2026 10:00:00 GMT", None),
        ("Sun, 22 Nov 2026 24:00:00 GMT", None),
        ("Sun, 22 Nov 2026 10:60:00 GMT", None),
        ("Sun, 22 Nov 2026 10:00:00 CET", None),
        ("Sun, 22 Nov 0000 10:00:00 GMT", None),
        ("22 Nov 2026", None),
        ("", None),
        (None, None),
    ],
)
def test_a_date_of_http_is_an_instant(text: str | None, instant: float | None) -> None:
    assert http_date(text) == instant


DATE = "Sun, 22 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "86400"}, 86400.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3.0),
        ({"retry-after-ms": "-1", "retry-after": "3"}, 3.0),
        ({"retry-after": "Sun, 22 Nov 2026 10:00:30 GMT", "date": DATE}, 30.0),
        ({"retry-after": DATE, "date": DATE}, 0.0),
        # In the past, or no telling how far in the future.
        ({"retry-after": "Sun, 22 Nov 2026 09:59:59 GMT", "date": DATE}, None),
        ({"retry-after": "Sun, 22 Nov 2026 10:00:30 GMT"}, None),
        ({"retry-after": "Sun, 22 Nov 2026 10:00:30 GMT", "date": "yesterday"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon", "date": DATE}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_retry_after_is_seconds_from_now_or_nothing(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("50", 50), ("-1", None), ("1.5", None), ("", None), (None, None), ("x", None), ("9" * 5000, None)],
)
def test_a_whole_number_is_not_negative(text: str | None, value: int | None) -> None:
    assert whole_number(text) == value


@given(st.text(max_size=40) | st.from_regex(r"[-+]?[0-9._eE]{1,12}[a-zµ]{0,2}"))
def test_nothing_makes_a_reader_raise(text: str) -> None:
    for found in (
        number(text),
        whole_number(text),
        go_duration(text),
        retry_after({"retry-after": text, "date": text}),
    ):
        assert found is None or found >= 0
    http_date(text)
    rfc3339(text)
