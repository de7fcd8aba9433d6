"""Quantiles in constant memory: near the truth, whatever the series."""

from __future__ import annotations

from math import ceil

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llm.utils.quantiles import Quantiles

durations = st.floats(1e-6, 1e6)


def filled(values: list[float]) -> Quantiles:
    quantiles = Quantiles()
    for value in values:
        quantiles.add(value)
    return quantiles


@given(st.lists(durations, min_size=1, max_size=200), st.sampled_from([0.0, 0.25, 0.5, 0.95, 0.99, 1.0]))
def test_a_quantile_is_off_by_one_per_cent_at_most(values: list[float], q: float) -> None:
    truth = sorted(values)[max(1, ceil(q * len(values))) - 1]
    assert filled(values).quantile(q) == pytest.approx(truth, rel=0.0101)


@given(st.lists(durations, min_size=1, max_size=50))
def test_the_summary_is_in_order_and_within_what_was_seen(values: list[float]) -> None:
    summary = filled(values).summary()
    assert summary["min"] == min(values) <= summary["p50"] <= summary["p95"] <= summary["p99"] <= summary["max"]
    assert summary["max"] == max(values)
    assert summary["average"] == pytest.approx(sum(values) / len(values))


def test_nothing_seen_is_zero() -> None:
    assert Quantiles().summary() == dict.fromkeys(("min", "max", "average", "p50", "p95", "p99"), 0.0)


def test_one_value_is_every_quantile() -> None:
    assert set(filled([0.7]).summary().values()) == {0.7}


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e9])
def test_what_is_out_of_range_is_counted_at_its_edge(value: float) -> None:
    summary = filled([value, value]).summary()
    assert (summary["min"], summary["p50"], summary["max"]) == (value, value, value)


@given(st.lists(st.floats(0.0, allow_nan=False, allow_infinity=False), max_size=100))
def test_memory_is_bounded_by_the_range_and_not_by_the_series(values: list[float]) -> None:
    quantiles = filled(values)
    assert quantiles.count == len(values)
    assert all(-698 <= bucket <= 698 for bucket in quantiles._buckets)


def test_the_whole_range_has_as_many_buckets_as_the_docstring_says() -> None:
    assert len(filled([1e-6 * 1.01**step for step in range(2780)])._buckets) <= 1396


def test_a_share_above_one_is_the_largest() -> None:
    assert filled([1.0, 2.0, 3.0]).quantile(1.5) == 3.0
