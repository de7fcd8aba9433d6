"""The retry budget: a share of the calls, a few by time, and never more than was saved."""

from __future__ import annotations

import pytest

from llm.utils.retry_budget import RetryBudget, RetryBudgetPolicy


def budget(share: float = 0.1, per_second: float = 0.0, most: float = 2.0) -> RetryBudget:
    return RetryBudget(RetryBudgetPolicy(share=share, per_second=per_second, most=most))


def spent(budget: RetryBudget, now: float = 0.0, *, throttled: bool = False) -> int:
    """How many retries it allows now."""
    count = 0
    while budget.withdraw(now, throttled=throttled):
        count += 1
    return count


def test_what_may_be_saved_is_there_at_first() -> None:
    assert spent(budget(most=3.0)) == 3


def test_each_call_pays_in_its_share() -> None:
    found = budget(share=0.1)
    spent(found)
    for _ in range(15):
        found.deposit()
    assert spent(found) == 1
    for _ in range(5):
        found.deposit()
    assert spent(found) == 1, "the rest of before was kept"


def test_however_many_calls_there_were_no_more_is_saved_than_the_most() -> None:
    found = budget(share=0.5, most=2.0)
    for _ in range(1000):
        found.deposit()
    assert spent(found) == 2


def test_some_come_back_by_time_alone() -> None:
    found = budget(share=0.0, per_second=0.5)
    assert spent(found, 10.0) == 2
    assert spent(found, 11.0) == 0
    assert spent(found, 12.0) == 1
    assert spent(found, 10_000.0) == 2


def test_a_clock_that_stands_or_goes_back_brings_nothing() -> None:
    found = budget(share=0.0, per_second=1.0)
    spent(found, 10.0)
    assert spent(found, 5.0) == 0


def test_a_retry_after_a_429_costs_a_tenth() -> None:
    assert spent(budget(most=2.0), throttled=True) == 20


def test_what_was_denied_is_counted() -> None:
    found = budget(most=1.0)
    assert [found.withdraw(0.0) for _ in range(3)] == [True, False, False]
    assert found.denied == 2
    assert repr(found) == "<RetryBudget: 0.0 left, 2 denied>"


@pytest.mark.parametrize("share", [0.1, 0.2, 1.0])
def test_over_many_failing_calls_retries_are_their_share(share: float) -> None:
    found, retries = budget(share=share, most=10.0), 0
    for _ in range(1000):
        found.deposit()
        retries += found.withdraw(0.0)
    assert retries == pytest.approx(1000 * share, abs=10)
