"""Output predictions: what is still to come of an answer, from the lengths of others, however few or odd these are."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from itertools import cycle, islice
from math import inf, isfinite, log, nan, sqrt
from random import Random
from typing import Protocol

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from llm.utils import output_predictor
from llm.utils.output_predictor import LONGEST, PRIOR, RECENT, REFRESH, Expectation, OutputPredictor, Reserve

lengths_seen = st.lists(st.integers(1, 5000), min_size=1, max_size=60)
# How many of them: none, some, a full ring, and one that has gone round.
amounts = st.sampled_from([0, 1, 3, 16, 24, 25, 150, 399, 400, 1000])
bounds = st.none() | st.integers(1, 8000)
anything = st.integers() | st.integers(-(10**400), 10**400)


def taught(lengths: Sequence[int], answers: int | None = None, reserve: Reserve = "balanced") -> OutputPredictor:
    """A predictor after that many answers, which go through *lengths* again and again."""
    predictor = OutputPredictor(reserve)
    for length in islice(cycle(lengths), len(lengths) if answers is None else answers):
        predictor.learn(model="m", output_tokens=length)
    return predictor


def spread(amount: int) -> list[int]:
    """Lengths as answers have them: lognormal with a median of 150 and s = 1, and a bound of 4096."""
    random = Random(amount)
    return [max(1, min(4096, round(random.lognormvariate(log(150), 1.0)))) for _ in range(amount)]


# -- what is still to come -------------------------------------------------------------------------------------------


@given(lengths_seen, st.sampled_from([400, 425, 1000]), bounds, st.integers(0, 5000))
@example([100], 400, 100, 99)
@example([7, 4000], 400, 300, 0)
def test_a_full_ring_says_what_a_count_of_all_its_lengths_says(
    lengths: list[int], answers: int, max_tokens: int | None, produced: int
) -> None:
    recent = list(islice(cycle(lengths), answers))[-RECENT:]
    bound = LONGEST if max_tokens is None else max_tokens
    left = [min(length, bound) - produced for length in recent if length > produced]
    if produced < bound and left:
        mean = sum(left) / len(left)
        variance = sum((tokens - mean) ** 2 for tokens in left) / len(left)
        expected = taught(lengths, answers).expect(model="m", max_tokens=max_tokens, produced=produced)
        assert expected.mean == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert expected.variance == pytest.approx(variance, rel=1e-9, abs=1e-6)


@given(lengths_seen, amounts, bounds, st.integers(0, 10_000), st.sampled_from(["strict", "balanced", "throughput"]))
def test_never_more_is_expected_than_may_come(
    lengths: list[int], answers: int, max_tokens: int | None, produced: int, reserve: Reserve
) -> None:
    mean, variance = taught(lengths, answers, reserve).expect(model="m", max_tokens=max_tokens, produced=produced)
    left = max(0, (LONGEST if max_tokens is None else max_tokens) - produced)
    assert 0.0 <= mean <= left
    # No quantity between 0 and that can vary by more than half of it.
    assert 0.0 <= variance <= left**2 / 4 * (1 + 1e-9)


@given(lengths_seen, amounts, st.integers(1, 8000), st.integers(0, 8000), st.integers(0, 8000))
def test_a_higher_bound_never_lets_less_be_expected(
    lengths: list[int], answers: int, max_tokens: int, more: int, produced: int
) -> None:
    predictor = taught(lengths, answers)
    low, high, unbound = (
        predictor.expect(model="m", max_tokens=bound, produced=produced).mean
        for bound in (max_tokens, max_tokens + more, None)
    )
    assert low <= high * (1 + 1e-12)
    assert high <= unbound * (1 + 1e-12)


@given(lengths_seen, amounts)
def test_what_comes_at_the_end_is_no_surprise(lengths: list[int], answers: int) -> None:
    predictor = taught(lengths, answers)
    assert predictor.expect(model="m", max_tokens=1000, produced=999).mean <= 1.0
    assert predictor.expect(model="m", max_tokens=1000, produced=1000) == (0.0, 0.0)
    assert predictor.expect(model="m", max_tokens=1000, produced=1001) == (0.0, 0.0)


def test_one_that_is_longer_than_any_before_has_a_half_of_its_length_still_to_come() -> None:
    predictor = taught([80, 120], 400)
    for produced in (120, 200, 1000):
        expected = predictor.expect(model="m", produced=produced)
        assert expected.mean == pytest.approx(produced / 2, rel=0.01)
        assert sqrt(expected.variance) > expected.mean
    assert predictor.expect(model="m", max_tokens=1010, produced=1000).mean == pytest.approx(10, rel=0.02)


def test_lognormal_lengths_are_predicted_to_the_end_as_they_are() -> None:
    """Their mean excess E[min(X, 4096) - k | X > k], integrated; behind the longest seen it is the tail's."""
    predictor = taught(spread(RECENT))
    for produced, excess in ((0, 247), (150, 265), (400, 365), (1000, 558)):
        assert predictor.expect(model="m", produced=produced).mean == pytest.approx(excess, rel=0.3)
    longest = max(spread(RECENT))
    assert 0.3 <= predictor.expect(model="m", produced=longest).mean / longest <= 0.7


def test_an_answer_that_max_tokens_cut_off_counts_with_its_length() -> None:
    predictor = OutputPredictor()
    for _ in range(RECENT):
        predictor.learn(model="m", output_tokens=100, max_tokens=100)
    assert predictor.expect(model="m", max_tokens=100) == (100.0, 0.0)
    assert predictor.expect(model="m", max_tokens=4096) == (100.0, 0.0)
    assert predictor.statistics()["m"][""]["cut"] == RECENT


# -- the prior -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_tokens", "mean"), [(None, 768), (4096, 711), (768, 427), (100, 91), (1, 1)])
def test_before_anything_is_learnt_the_prior_speaks_within_the_bound(max_tokens: int | None, mean: int) -> None:
    assert OutputPredictor().expect(model="m", max_tokens=max_tokens).mean == pytest.approx(mean, abs=1)


def test_the_prior_is_as_spread_as_its_tail_says() -> None:
    """Drawn from the tail by its inverse, and cut at what may still come."""
    for produced, bound in ((0, 4096), (500, 2000), (3000, 3100)):
        scale = 2 * PRIOR + produced
        drawn = [min(scale * ((1 - (i + 0.5) / 20_000) ** (-1 / 3) - 1), bound - produced) for i in range(20_000)]
        mean = sum(drawn) / len(drawn)
        variance = sum((tokens - mean) ** 2 for tokens in drawn) / len(drawn)
        expected = OutputPredictor().expect(model="m", max_tokens=bound, produced=produced)
        assert expected == pytest.approx((mean, variance), rel=0.001)


def test_the_first_answers_hardly_move_what_is_expected_and_a_full_ring_decides_alone() -> None:
    means = [taught([20], answers).expect(model="m").mean for answers in (0, 1, 8, 50, 200, 375, RECENT)]
    assert means == sorted(means, reverse=True)
    assert means[2] > 0.85 * PRIOR
    assert means[4] == pytest.approx(20 + (PRIOR - 20) * 30 / 230, rel=1e-4)
    assert means[5] < 30
    assert means[6] == 20.0


def test_the_prior_counts_for_as_many_as_it_would_have_left_by_then() -> None:
    """After 768 tokens eight twenty-sevenths of it are left, so it yields to answers that have been as long."""
    expected = taught([1000], 200).expect(model="m", produced=PRIOR).mean
    weight = 30 * (2 / 3) ** 3
    assert expected == pytest.approx((200 * (1000 - PRIOR) + weight * 1.5 * PRIOR) / (200 + weight), rel=1e-4)


def test_lengths_are_looked_at_as_soon_as_they_matter() -> None:
    predictor = OutputPredictor()
    changed, before = [], predictor.expect(model="m")
    for answer in range(1, 101):
        predictor.learn(model="m", output_tokens=5)
        if (now := predictor.expect(model="m")) != before:
            changed.append(answer)
        before = now
    assert changed == [1, 2, 4, 8, 16, REFRESH, 2 * REFRESH, 3 * REFRESH, 4 * REFRESH]


# -- a key that is used to the full ----------------------------------------------------------------------------------


class Predictor(Protocol):
    """What the key below asks; also the one that lacks the prior."""

    z: float
    look_ahead: bool

    def expect(self, *, model: str, max_tokens: int, produced: int = 0) -> Expectation: ...
    def learn(self, *, model: str, output_tokens: int, under_way: int) -> None: ...
    def speed(self, model: str) -> float: ...


class Believer:
    """Takes those that have ended for all there are."""

    z = 1.645
    look_ahead = True

    def __init__(self) -> None:
        self._ended: list[int] = []

    def expect(self, *, model: str, max_tokens: int, produced: int = 0) -> Expectation:
        if not self._ended:
            return Expectation(float(PRIOR), 0.0)
        longer = self._ended[bisect_right(self._ended, produced) :] or [2 * produced]
        mean = sum(longer) / len(longer) - produced
        return Expectation(mean, mean**2)

    def learn(self, *, model: str, output_tokens: int, under_way: int) -> None:
        insort(self._ended, output_tokens)

    def speed(self, model: str) -> float:
        return 75.0


class Unaware(OutputPredictor):
    """Is not told how many answers are under way."""

    def learn(self, **told: object) -> None:
        told["under_way"] = 0
        super().learn(**told)  # type: ignore[arg-type]  # as it was told


def minutes_of(predictor: Predictor, *, limit: int, seconds: int, seed: int) -> list[float]:
    """How full the minute before each second was, of a key that has always more to do than its *limit* allows.

    Lengths are lognormal(150, s=1) up to 4096, at 75 tokens a second. The limit on requests would let 2.5 times the
    output through. What is produced counts for a minute from when it came, and what is expected counts beside it; with
    look-ahead, without what leaves the window until the mean of the open answers is written.
    """
    random, step = Random(seed), 0.2
    open_answers: list[list[int]] = []
    window: deque[tuple[float, int]] = deque()
    sent: deque[float] = deque()
    used = 0
    fullness: list[float] = []
    for tick in range(round(seconds / step)):
        now = tick * step
        while window and window[0][0] <= now - 60:
            used -= window.popleft()[1]
        while sent and sent[0] <= now - 60:
            sent.popleft()
        came = 0
        for answer in open_answers:
            new = min(15, answer[0] - answer[1])
            answer[1] += new
            came += new
        for answer in open_answers:
            if answer[0] == answer[1]:
                predictor.learn(model="m", output_tokens=answer[0], under_way=len(open_answers))
        open_answers = [answer for answer in open_answers if answer[1] < answer[0]]
        window.append((now, came))
        used += came
        fullness.append(used / limit)
        mean = variance = 0.0
        for _, produced in open_answers:
            more = predictor.expect(model="m", max_tokens=4096, produced=produced)
            mean, variance = mean + more.mean, variance + more.variance
        one = predictor.expect(model="m", max_tokens=4096)
        while used < limit and len(sent) < limit // 100:
            mean, variance = mean + one.mean, variance + one.variance
            ahead = mean / (len(open_answers) + 1) / predictor.speed("m") if predictor.look_ahead else 0.0
            leaves = 0
            for came_at, amount in window:
                if came_at > now + ahead - 60:
                    break
                leaves += amount
            if used - leaves + mean + predictor.z * sqrt(variance) > limit:
                break
            length = max(1, min(4096, round(random.lognormvariate(log(150), 1.0))))
            open_answers.append([length, 0])
            sent.append(now)
    return fullness[:: round(1 / step)]


@pytest.mark.parametrize("seed", [1, 2])
def test_the_short_answers_that_end_first_are_not_taken_for_all(seed: int) -> None:
    """Without a prior the first minute is twice as full as it may be."""
    assert max(minutes_of(Believer(), limit=30_000, seconds=70, seed=seed)) > 2.0
    fullness = minutes_of(OutputPredictor(), limit=30_000, seconds=300, seed=seed)
    assert max(fullness[:180]) <= 1.08
    assert max(fullness[180:]) <= 1.02
    assert sum(fullness[180:]) / 120 >= 0.85


def test_a_large_key_learns_as_a_small_one_when_it_is_told_what_is_under_way() -> None:
    """The first 400 to end of 800 open answers are the short ones: a ring of 400 would hold no others."""
    assert max(minutes_of(Unaware(), limit=240_000, seconds=60, seed=1)) > 1.5
    assert max(minutes_of(OutputPredictor(), limit=240_000, seconds=90, seed=1)) <= 1.08


@pytest.mark.parametrize(("under_way", "learnt"), [(0, 100), (33, 100), (34, 50), (66, 50), (67, 33), (3300, 1)])
def test_of_many_under_way_only_some_that_end_are_learnt(under_way: int, learnt: int) -> None:
    predictor = OutputPredictor()
    for _ in range(100):
        predictor.learn(model="m", output_tokens=10, under_way=under_way)
    assert predictor.statistics()["m"][""]["answers"] == learnt


# -- how much is held ------------------------------------------------------------------------------------------------


def test_the_reserve_says_how_many_deviations_are_held_and_whether_to_look_ahead() -> None:
    held = {reserve: OutputPredictor(reserve) for reserve in output_predictor.QUANTILE}
    assert {reserve: (predictor.z, predictor.look_ahead) for reserve, predictor in held.items()} == {
        "strict": (0.0, False),
        "balanced": (1.645, True),
        "throughput": (0.0, False),
    }


def test_strict_holds_all_that_may_come_whatever_was_learnt() -> None:
    predictor = taught([10], 400, "strict")
    assert predictor.expect(model="m", max_tokens=4096) == (4096.0, 0.0)
    assert predictor.expect(model="m", max_tokens=4096, produced=4000) == (96.0, 0.0)
    assert predictor.expect(model="m", max_tokens=4096, produced=5000) == (0.0, 0.0)
    unbound = OutputPredictor().expect(model="m", produced=100)
    assert predictor.expect(model="m", produced=100) == (unbound.mean, 0.0)


def test_throughput_expects_what_balanced_does() -> None:
    lengths = spread(50)
    balanced, throughput = taught(lengths), taught(lengths, reserve="throughput")
    for produced in (0, 100):
        assert throughput.expect(model="m", produced=produced) == balanced.expect(model="m", produced=produced)


# -- models and tags -------------------------------------------------------------------------------------------------


def test_models_and_tags_learn_apart() -> None:
    predictor = OutputPredictor()
    for _ in range(RECENT):
        predictor.learn(model="a", tag="title", output_tokens=8)
        predictor.learn(model="a", tag="essay", output_tokens=2000)
        predictor.learn(model="b", tag="title", output_tokens=12)
    assert predictor.expect(model="a", tag="title").mean == 8.0
    assert predictor.expect(model="a", tag="essay").mean == 2000.0
    assert predictor.expect(model="b", tag="title").mean == 12.0
    assert predictor.expect(model="b", tag="essay") == OutputPredictor().expect(model="b")


def test_a_new_tag_begins_with_what_the_models_untagged_calls_have_taught() -> None:
    predictor = taught([50], RECENT)
    assert predictor.expect(model="m", tag="new").mean == 50.0
    assert predictor.expect(model="m", tag="new", produced=20).mean == 30.0
    assert predictor.expect(model="other", tag="new").mean == pytest.approx(PRIOR, rel=0.01)


def test_what_an_answer_may_have_is_kept_for_each_bound_only_until_more_is_known() -> None:
    predictor = taught([50, 150], RECENT)
    assert [predictor.expect(model="m", max_tokens=bound).mean for bound in (None, 100, 40, 100)] == [100, 75, 40, 75]
    for _ in range(RECENT):
        predictor.learn(model="m", output_tokens=60)
    assert [predictor.expect(model="m", max_tokens=bound).mean for bound in (None, 100, 40)] == [60, 60, 40]


def test_only_so_many_tags_are_remembered_and_the_one_unused_for_longest_goes() -> None:
    predictor = OutputPredictor()
    for number in range(output_predictor.MAX_LEARNT):
        predictor.learn(model="m", tag=str(number), output_tokens=10)
    predictor.learn(model="m", tag="0", output_tokens=10)
    predictor.learn(model="m", tag="one more", output_tokens=10)
    remembered = predictor.statistics()["m"]
    assert len(remembered) == output_predictor.MAX_LEARNT
    assert {"0", "one more"} <= remembered.keys()
    assert "1" not in remembered


@given(st.integers(0, 1200), st.integers(0, 40))
def test_memory_does_not_grow_with_answers_or_with_bounds(answers: int, asked: int) -> None:
    predictor = taught([10, 20, 30], answers)
    for bound in range(asked):
        predictor.expect(model="m", max_tokens=bound)
    for learnt in (predictor._unknown, *predictor._learnt.values()):
        assert len(learnt._ring) <= RECENT
        assert len(learnt._sorted) + 1 == len(learnt._sums) == len(learnt._squares) <= RECENT + 1
        assert len(learnt.whole) <= output_predictor.MAX_BOUNDS


# -- the speed -------------------------------------------------------------------------------------------------------


def test_a_model_has_an_ordinary_speed_until_it_has_told_its_own() -> None:
    predictor = taught([100])
    assert predictor.speed("m") == output_predictor.SPEED
    predictor.learn(model="m", output_tokens=300, seconds=2.0)
    assert predictor.speed("m") == 150.0
    assert predictor.speed("other") == output_predictor.SPEED


def test_the_speed_follows_when_it_changes() -> None:
    predictor = OutputPredictor()
    for speed in [30.0] * 100 + [90.0] * 100:
        predictor.learn(model="m", output_tokens=180, seconds=180 / speed)
    assert predictor.speed("m") == pytest.approx(90.0, rel=0.02)


def test_a_short_answer_tells_little_of_the_speed() -> None:
    predictor = OutputPredictor()
    predictor.learn(model="m", output_tokens=1000, seconds=20.0)
    predictor.learn(model="m", output_tokens=1, seconds=1e-6)
    assert predictor.speed("m") == pytest.approx(50.0, rel=0.01)


@pytest.mark.parametrize("seconds", [None, 0.0, -1.0, nan, inf])
def test_a_time_that_is_none_teaches_no_speed_but_the_length(seconds: float | None) -> None:
    predictor = OutputPredictor()
    predictor.learn(model="m", output_tokens=100, seconds=seconds)
    assert predictor.speed("m") == output_predictor.SPEED
    assert predictor.statistics()["m"][""]["answers"] == 1


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats()), max_size=40))
def test_whatever_is_measured_a_speed_stays_within_what_is_believed(measured: list[tuple[int, float]]) -> None:
    predictor = OutputPredictor()
    for length, seconds in measured:
        predictor.learn(model="m", output_tokens=length, seconds=seconds)
        assert output_predictor.SLOWEST * 0.999 <= predictor.speed("m") <= output_predictor.FASTEST * 1.001


def test_only_so_many_speeds_are_remembered() -> None:
    predictor = OutputPredictor()
    for number in range(output_predictor.MAX_LEARNT + 1):
        predictor.learn(model=str(number), output_tokens=100, seconds=10.0)
    assert predictor.speed("0") == output_predictor.SPEED
    assert predictor.speed("1") == 10.0


# -- what vendors count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_tokens", [0, -1])
def test_a_server_that_does_not_count_teaches_nothing(output_tokens: int) -> None:
    predictor = OutputPredictor()
    predictor.learn(model="m", output_tokens=output_tokens, seconds=1.0)
    assert predictor.statistics() == {}
    assert predictor.speed("m") == output_predictor.SPEED


@given(
    st.sampled_from(["strict", "balanced", "throughput"]),
    st.lists(st.tuples(anything, st.none() | anything, st.none() | st.floats(), anything), max_size=30),
    st.none() | anything,
    anything,
)
def test_no_figure_is_refused_and_none_becomes_infinite_or_negative(
    reserve: Reserve,
    answers: list[tuple[int, int | None, float | None, int]],
    max_tokens: int | None,
    produced: int,
) -> None:
    predictor = OutputPredictor(reserve)
    for output_tokens, bound, seconds, under_way in answers:
        predictor.learn(model="m", output_tokens=output_tokens, max_tokens=bound, seconds=seconds, under_way=under_way)
    figures = [
        *predictor.expect(model="m", max_tokens=max_tokens, produced=produced),
        *predictor.expect(model="m", max_tokens=max_tokens),
        *(figure for tags in predictor.statistics().values() for row in tags.values() for figure in row.values()),
    ]
    assert all(isfinite(figure) and figure >= 0 for figure in figures)


def test_the_statistics_say_what_was_learnt() -> None:
    predictor = taught([50, 150], RECENT)
    predictor.learn(model="m", output_tokens=100, max_tokens=100, seconds=2.0)
    row = {"answers": RECENT + 1, "cut": 1, "mean": 100.0, "deviation": 50.0, "speed": 50.0}
    assert predictor.statistics() == {"m": {"": row}}
    assert repr(predictor) == "<OutputPredictor: 1 models and tags learnt>"
