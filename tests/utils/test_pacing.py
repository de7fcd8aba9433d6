"""How fast a quota may be used after what was not expected: what each of the four machines lets through, and when."""

from __future__ import annotations

from math import log2

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llm.utils.pacing import LEAST_SHARE, LONGEST_GUARD, RAMP_FLOOR, STEP, Allowance, Guard, Ramp, SlowStart

# -- a slow start ----------------------------------------------------------------------------------------------------


def went(start: SlowStart, until: float) -> list[float]:
    """When each of them went that wanted to go at once."""
    times = []
    while start.opens_at() <= until:
        times.append(start.opens_at())
        start.sent()
    return times


def test_the_first_goes_at_once_and_the_count_doubles_with_every_step() -> None:
    times = went(SlowStart(0.0, 10.0), 10.0 + 5 * STEP)
    assert times[0] == 10.0
    for doublings in range(6):
        assert len([at for at in times if at <= 10.0 + doublings * STEP]) == 2**doublings


def test_it_is_never_slower_than_the_steady_rate() -> None:
    """20 a second are more than doublings let through in the first second, and less than they do later."""
    times = went(SlowStart(20.0, 0.0), 3.0)
    for number, at in enumerate(times):
        assert at == pytest.approx(min(number / 20.0, STEP * log2(number + 1)))


def test_one_that_did_not_go_after_all_may_be_replaced() -> None:
    start = SlowStart(0.0, 0.0)
    start.sent()
    assert start.opens_at() == STEP
    start.withdrawn()
    start.withdrawn()
    assert start.opens_at() == 0.0
    start.sent()
    assert start.opens_at() == STEP, "of what it did not see go nothing is given back"


# -- the guard -------------------------------------------------------------------------------------------------------


def test_each_refusal_makes_the_guard_longer_up_to_a_bound() -> None:
    guard = Guard(0.25)
    seen = []
    for number in range(8):
        guard.refused(float(number))
        seen.append(guard.seconds)
    assert seen[:3] == pytest.approx([0.4, 0.64, 1.024])
    assert seen == sorted(seen)
    assert seen[-1] == LONGEST_GUARD


def test_the_guard_goes_back_minute_by_minute_to_what_it_was() -> None:
    guard = Guard(0.25)
    guard.refused(0.0)
    assert not guard.tick(59.9)
    assert guard.tick(60.0)
    assert guard.seconds == pytest.approx(0.34)
    assert not guard.tick(60.0)
    assert guard.tick(10_000.0), "however long nobody looked"
    assert guard.seconds == 0.25
    assert not guard.tick(1e9)


def test_without_a_guard_a_refusal_brings_one() -> None:
    guard = Guard(0.0)
    guard.refused(0.0)
    assert guard.seconds == pytest.approx(0.4)


def test_a_guard_that_is_configured_above_the_bound_stays() -> None:
    guard = Guard(10.0)
    guard.refused(0.0)
    assert guard.seconds == 10.0


# -- the allowance ---------------------------------------------------------------------------------------------------


def test_the_allowance_is_halved_and_never_below_an_even_flow() -> None:
    allowance = Allowance()
    seen = [allowance.share]
    for number in range(5):
        allowance.refused(float(number))
        seen.append(allowance.share)
    assert seen == [1.0, 0.5, 0.25, 0.125, LEAST_SHARE, LEAST_SHARE]


def test_the_allowance_grows_by_a_twentieth_a_minute_until_it_does_not_bind() -> None:
    allowance = Allowance()
    assert not allowance.tick(1e9)
    allowance.refused(0.0)
    assert not allowance.tick(59.9)
    assert allowance.tick(60.0)
    assert allowance.share == pytest.approx(0.55)
    assert allowance.tick(240.0)
    assert allowance.share == pytest.approx(0.7)
    assert allowance.tick(10_000.0)
    assert allowance.share == 1.0
    assert not allowance.tick(1e9)


@given(st.lists(st.tuples(st.floats(0.0, 500.0), st.booleans()), max_size=30))
def test_whatever_happens_guard_and_allowance_stay_within_their_bounds(events: list[tuple[float, bool]]) -> None:
    guard, allowance, now = Guard(0.25), Allowance(), 0.0
    for seconds, refused in events:
        now += seconds
        for machine in (guard, allowance):
            machine.tick(now)
            if refused:
                machine.refused(now)
        assert 0.25 <= guard.seconds <= LONGEST_GUARD
        assert LEAST_SHARE <= allowance.share <= 1.0


# -- the ramp --------------------------------------------------------------------------------------------------------


def test_a_ramp_begins_at_half_as_much_again_as_the_mean_of_the_last_minutes() -> None:
    ramp = Ramp()
    for minute in range(40):
        # One sample a minute, and the first 25 are forgotten.
        assert not ramp.tick(60.0 * minute, 10**9 if minute < 25 else 2_000_000, 10**7)
        assert not ramp.tick(60.0 * minute + 30.0, 10**9, 10**7)
    ramp.refused(2400.0)
    assert ramp.cap == 3_000_000


def test_a_ramp_is_never_below_what_no_vendor_minds() -> None:
    ramp = Ramp()
    ramp.refused(0.0)
    assert ramp.cap == RAMP_FLOOR


def test_a_ramp_grows_by_half_every_quarter_of_an_hour_and_goes_above_the_limit() -> None:
    ramp = Ramp()
    ramp.refused(0.0)
    assert not ramp.tick(899.0, 0, 2_500_000)
    caps = []
    for minute in (15, 30, 45):
        assert ramp.tick(60.0 * minute, 0, 2_500_000)
        caps.append(ramp.cap)
    assert caps == [1_500_000, 2_250_000, None]
    assert not ramp.tick(1e9, 0, 2_500_000)


def test_another_refusal_never_raises_a_cap_and_puts_off_its_growth() -> None:
    ramp = Ramp()
    ramp.refused(0.0)
    ramp.tick(0.0, 50_000_000, None)
    ramp.refused(800.0)
    assert ramp.cap == RAMP_FLOOR
    assert not ramp.tick(1000.0, 0, None)
    assert ramp.tick(1700.0, 0, None)
    assert ramp.cap == 1_500_000


def test_without_a_limit_a_cap_only_grows() -> None:
    ramp = Ramp()
    ramp.refused(0.0)
    for minute in range(15, 150, 15):
        assert ramp.tick(60.0 * minute, 0, None)
    assert ramp.cap is not None
    assert ramp.cap > 30_000_000
