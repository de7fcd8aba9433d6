"""The strict window, and the check that judges it and everybody else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.testing.journal import Arrival, check_window, peak, peak_usage
from llm.testing.window import Account, Limits, Window


def test_what_was_taken_counts_until_exactly_one_window_later() -> None:
    window = Window(1, 60.0)
    window.add(1, 10.0)
    assert window.wait(1, 69.999) == pytest.approx(0.001)
    assert window.wait(1, 70.0) == 0.0


def test_the_wait_is_for_as_many_expiries_as_are_needed() -> None:
    """Not for the oldest entry, and not for the whole window."""
    window = Window(100, 60.0)
    for now, amount in ((0.0, 40), (10.0, 40), (20.0, 20)):
        assert window.wait(amount, now) == 0.0
        window.add(amount, now)
    assert window.wait(40, 30.0) == 30.0
    assert window.wait(41, 30.0) == 40.0
    assert window.wait(100, 30.0) == 50.0


def test_an_amount_that_can_never_fit_waits_a_whole_window() -> None:
    assert Window(10, 60.0).wait(11, 0.0) == 60.0


def test_without_a_limit_nothing_waits_and_nothing_is_kept() -> None:
    window = Window(None, 60.0)
    window.add(10**9, 0.0)
    assert window.wait(10**9, 0.0) == 0.0
    assert window.used == 0


def test_a_request_takes_all_dimensions_or_none() -> None:
    account = Account(Limits(requests=10, input_tokens=100))
    account.admit(90, 0, 0.0)
    assert account.wait(11, 0, 1.0) == (59.0, "input_tokens")
    assert account.requests.used == 1


def test_output_refuses_only_once_it_is_full_because_nobody_knows_it_beforehand() -> None:
    account = Account(Limits(output_tokens=100))
    account.produce(99, 0.0)
    assert account.wait(1, 4096, 1.0)[0] == 0.0
    account.produce(50, 1.0)
    assert account.wait(1, 1, 2.0) == (58.0, "output_tokens")


def test_reserved_output_is_held_from_admission() -> None:
    account = Account(Limits(output_tokens=100), reserve_output=True)
    account.admit(1, 80, 0.0)
    account.produce(5, 1.0)
    assert account.output_tokens.used == 80
    assert account.wait(1, 21, 1.0) == (59.0, "output_tokens")


steps = st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 12)), max_size=60)


@given(steps=steps, limit=st.integers(1, 12))
def test_whoever_asks_first_never_overfills_any_window(steps: list[tuple[int, int]], limit: int) -> None:
    """The window and the check share no code; here each vouches for the other. Times are milliseconds."""
    window = Window(limit, 5000)
    now = 0
    taken: list[tuple[float, int]] = []
    for pause, amount in steps:
        now += pause
        if window.wait(amount, now) == 0:
            window.add(amount, now)
            taken.append((now, amount))
    assert check_window(taken, limit, 5000) == 0


@given(steps=steps, limit=st.integers(12, 20))
def test_the_wait_is_exact(steps: list[tuple[int, int]], limit: int) -> None:
    """After the wait it fits; a millisecond earlier it does not."""
    window = Window(limit, 5000)
    now = 0
    for pause, amount in steps:
        now += pause
        wait = int(window.wait(amount, now))
        if wait:
            assert window.wait(amount, now + wait - 1) > 0
            now += wait
        assert window.wait(amount, now) == 0
        window.add(amount, now)


# -- the check ------------------------------------------------------------------------------------------------------


def test_the_check_sees_a_limit_exceeded_by_one() -> None:
    times = [float(i) for i in range(51)]
    assert check_window(times, 51, 60.0) == 0
    assert check_window(times, 50, 60.0) == 1


def test_the_check_sees_two_bursts_that_straddle_a_minute() -> None:
    """A counter per calendar minute would allow a hundred requests within two seconds."""
    times = [59.0 + i / 100 for i in range(50)] + [60.5 + i / 100 for i in range(50)]
    assert all(sum(1 for t in times if minute <= t < minute + 60) == 50 for minute in (0, 60))
    assert peak_usage(times, 60.0) == 100
    assert check_window(times, 50, 60.0) == 50


def test_the_check_does_not_depend_on_the_order_of_the_journal() -> None:
    times = [float(i) for i in range(100)]
    random.Random(1).shuffle(times)
    assert peak_usage(times, 30.0) == 30


def test_one_request_exactly_a_window_after_another_is_not_in_its_window() -> None:
    assert peak_usage([5.0, 65.0], 60.0) == 1
    assert peak_usage([5.0, 64.999], 60.0) == 2


def test_amounts_are_added_up() -> None:
    assert peak_usage([(0.0, 70), (30.0, 30), (61.0, 60)], 60.0) == 100
    assert peak_usage([], 60.0) == 0


def test_the_peak_of_a_key_is_of_that_key_and_of_what_was_admitted() -> None:
    def arrival(time: float, key: str, admitted: bool) -> Arrival:
        return Arrival(
            sequence=0,
            time=time,
            key=key,
            dialect="openai",
            method="POST",
            path="/",
            input_tokens=7,
            admitted=admitted,
            produced=[(time + 1, 2), (time + 100, 3)],
        )

    journal = [arrival(0.0, "a", True), arrival(1.0, "a", True), arrival(2.0, "b", True), arrival(3.0, "a", False)]
    assert peak(journal, "a", 60.0) == 2
    assert peak(journal, "a", 60.0, rejected=True) == 3
    assert peak(journal, "a", 60.0, "input_tokens") == 14
    assert peak(journal, "a", 60.0, "output_tokens") == 6
    assert peak(journal, "unheard of", 60.0) == 0
