"""Token estimates: counted from the text alone, bounded in cost and memory, and brought right by the answers."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from types import FrameType

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llm.core.content import Document, Image, Opaque, Part, Text, Thinking, ToolCall, ToolResult
from llm.core.tools import Tool
from llm.core.types import Message, MessageRole, Options, OutputFormat, Request
from llm.utils import tokens
from llm.utils.tokens import COEFFICIENTS, Overheads, TokenEstimator, features, rough_count, sampled

WHOLE = tokens.SAMPLES * tokens.SAMPLE
PROSE = "The quick brown fox jumps over the lazy dog, and 12 more. "
# Any code point, halves of surrogate pairs included.
texts = st.text(st.characters(), max_size=200)


def request(*contents: str) -> Request:
    return Request(tuple(Message(MessageRole.USER, content) for content in contents), "m")


def taught(ratios: list[float], measure: float = 1000.0) -> TokenEstimator:
    estimator = TokenEstimator()
    for ratio in ratios:
        estimator.learn(measure, model="m", actual=round(ratio * measure))
    return estimator


def calls(work: Callable[[], object]) -> int:
    """How many functions *work* calls, those written in C included."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    # What others have asked to be called at a collection (hypothesis does) is not ours.
    gc.collect()
    gc.disable()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


# -- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 0, 0, 0, 0)),
        ("one two", (6, 0, 2, 0, 0)),
        ("f(x)", (2, 2, 4, 0, 0)),
        ("a == 10.25\n\n", (1, 3, 3, 2, 1)),
        ("naïve", (4, 0, 1, 0, 0, 1, 0, 0, 0, 0)),
        ("Привет", (0, 0, 0, 0, 0, 0, 6, 0, 0, 0)),
        ("你好，world", (5, 0, 1, 0, 0, 0, 0, 2, 0, 1)),
        ("すし 김치 🍣", (0, 0, 0, 0, 0, 0, 0, 0, 4, 1)),
    ],
)
def test_a_text_is_counted_by_its_runs_and_kinds(text: str, expected: tuple[int, ...]) -> None:
    assert features(text) == expected


@pytest.mark.parametrize(
    ("text", "o200k"),
    [
        (PROSE * 3, 46),
        ("def area(r: float) -> float:\n    return 3.14159 * r ** 2\n", 22),
        ('{"id":17,"name":"fox","tags":["red","quick"],"weight":6.25}', 22),
        ("今天天气很好，我们一起去公园散步，然后回家吃晚饭。", 18),
    ],
)
def test_the_count_is_near_a_tokenizers(text: str, o200k: int) -> None:
    assert rough_count(text) == pytest.approx(o200k, rel=0.25)


@given(texts)
def test_a_count_is_never_negative_and_no_text_is_refused(text: str) -> None:
    assert all(number >= 0 for number in features(text))
    assert rough_count(text) >= 0.0


@given(texts, texts)
def test_more_text_never_counts_less_and_two_parts_at_least_as_much_as_the_whole(first: str, second: str) -> None:
    whole, parts = rough_count(first + second), rough_count(first) + rough_count(second)
    assert rough_count(first) - 1e-9 <= whole <= parts + 1e-9
    # Where they were cut, one run has become two.
    assert parts - whole <= max(COEFFICIENTS) + 1e-9


def test_no_coefficient_is_negative() -> None:
    assert min(COEFFICIENTS) > 0.0


# -- samples ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=60))
def test_samples_are_as_long_as_they_should_be_however_the_text_is_cut(lengths: list[int]) -> None:
    parts = ["x" * length for length in lengths]
    if sum(lengths) >= WHOLE:
        assert len(sampled(parts)) == WHOLE


@given(st.lists(st.integers(0, 5000), max_size=20))
def test_samples_do_not_depend_on_how_the_text_is_cut(cuts: list[int]) -> None:
    text = "".join(chr(0x100 + number) for number in range(5000))
    edges = [0, *sorted(cuts), 5000]
    parts = [text[start:end] for start, end in pairwise(edges)]
    assert sampled(parts) == sampled([text])


def test_samples_are_spread_evenly() -> None:
    text = "".join(chr(0x100 + number) for number in range(16 * WHOLE))
    places = [ord(character) - 0x100 for character in sampled([text])[:: tokens.SAMPLE]]
    assert {later - earlier for earlier, later in pairwise(places)} == {WHOLE}


@pytest.mark.parametrize("size", [WHOLE + 1, 20_000, 1_000_000])
def test_a_sampled_text_counts_like_its_parts(size: int) -> None:
    text = (PROSE * (size // len(PROSE) + 1))[:size]
    whole = rough_count(text[:WHOLE]) / WHOLE * size
    assert TokenEstimator().measure(request(text)) == pytest.approx(whole, rel=0.03)


def test_a_half_in_another_script_is_seen_by_the_samples() -> None:
    english, chinese = PROSE * 500, "我们一起去公园散步，" * 2000
    apart = TokenEstimator().measure(request(english)) + TokenEstimator().measure(request(chinese))
    assert TokenEstimator().measure(request(english, chinese)) == pytest.approx(apart, rel=0.05)


def test_however_long_a_text_is_it_costs_the_same() -> None:
    estimator = TokenEstimator()
    medium, huge = request(PROSE * 100), request(PROSE * 20_000)
    assert calls(lambda: estimator.measure(huge)) == calls(lambda: estimator.measure(medium)) <= 80


def test_a_measure_costs_a_few_calls() -> None:
    estimator, prompt = TokenEstimator(), request(PROSE)
    assert calls(lambda: estimator.measure(prompt)) <= 25
    assert calls(lambda: estimator.estimate(20.0, model="m")) <= 10


# -- requests --------------------------------------------------------------------------------------------------------


def test_messages_cost_beside_their_text() -> None:
    estimator = TokenEstimator(overheads=Overheads(request=100, message=10))
    assert estimator.measure(request("", "", "")) == 130.0
    assert estimator.measure(request(PROSE)) == 110.0 + rough_count(PROSE)


BESIDE = Overheads(request=0, message=0, tools=500, tool=50, call=7, image=1000, page=2000)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Text(PROSE), rough_count(PROSE)),
        (Thinking(PROSE, b"{}", "anthropic"), rough_count(PROSE)),
        (Image(url="https://example.org/a.png"), 1000),
        (Document(text=PROSE), rough_count(PROSE)),
        # Nobody knows how long it is.
        (Document(url="https://example.org/a.pdf"), 2000),
        (Document(data="A" * (tokens.BYTES_OF_PAGE - 1), media_type="application/pdf"), 2000),
        (Document(data="A" * tokens.BYTES_OF_PAGE, media_type="application/pdf"), 4000),
        (ToolCall("id", "look", PROSE), 7 + rough_count("look" + PROSE)),
        (ToolResult("id", PROSE), 7 + rough_count(PROSE)),
        (ToolResult("id", (Text(PROSE), Image(url="https://example.org/a.png"))), 1007 + rough_count(PROSE)),
        (Opaque("new", b'{"words":"\xff"}', "anthropic"), rough_count('{"words":"\ufffd"}')),
    ],
)
def test_each_part_of_a_message_counts_by_its_words_and_what_it_is(part: Part, expected: float) -> None:
    asked = Request((Message(MessageRole.USER, (part,)),), "m")
    # One run of letters more or less, where words meet.
    assert TokenEstimator(overheads=BESIDE).measure(asked) == pytest.approx(expected, abs=1.5)


def test_tools_and_the_answers_form_count_with_their_schemas() -> None:
    estimator = TokenEstimator(overheads=BESIDE)
    schema = {"type": "object", "properties": {"city": {"type": "string", "description": PROSE}}}
    schema_alone = rough_count(json.dumps(schema, separators=(",", ":")))
    tools = tuple(Tool(name=name, description=PROSE, parameters=schema) for name in ("one", "two"))
    formed = Options(output_format=OutputFormat(schema))
    empty = request("").messages
    with_tools = estimator.measure(Request(empty, "m", Options(tools=tools)))
    assert with_tools == pytest.approx(500 + 2 * (50 + rough_count(PROSE) + schema_alone), abs=10)
    assert estimator.measure(Request(empty, "m", formed)) == pytest.approx(schema_alone, abs=2)


def test_a_measure_stands_for_its_request() -> None:
    by_request, by_measure = TokenEstimator(), TokenEstimator()
    prompt = request(PROSE, PROSE)
    measure = by_measure.measure(prompt)
    by_request.learn(prompt, model="m", actual=40)
    by_measure.learn(measure, model="m", actual=40)
    assert by_request.estimate(prompt, model="m") == by_measure.estimate(measure, model="m")


class Words:
    """A tokenizer for which a token is a word."""

    def __init__(self) -> None:
        self.counted: list[str] = []

    def count(self, text: str) -> int:
        self.counted.append(text)
        return len(text.split())


def test_a_tokenizer_of_the_users_own_counts_all_of_the_text() -> None:
    words = Words()
    estimator = TokenEstimator(words, overheads=Overheads(request=0, message=1))
    assert estimator.measure(request("one two three", "four " * 10_000)) == 10_005.0
    assert [len(text) for text in words.counted] == [13, 50_000]


def test_what_is_slow_to_count_is_known_without_counting_it() -> None:
    words = Words()
    half = "x" * (tokens.LARGE // 2)
    assert not TokenEstimator(words).is_slow(request(half, half))
    assert TokenEstimator(words).is_slow(request(half, half, "x"))
    assert not words.counted


def test_without_a_tokenizer_nothing_is_slow() -> None:
    assert not TokenEstimator().is_slow(request(PROSE * 10_000))


# -- learning --------------------------------------------------------------------------------------------------------


def test_an_estimate_has_a_pad_before_anything_is_learnt() -> None:
    assert TokenEstimator().estimate(1000.0, model="m") == 1050


@pytest.mark.parametrize("answers", range(1, tokens.FEW))
def test_the_pad_stays_while_there_are_few_answers(answers: int) -> None:
    assert taught([1.5] * answers).estimate(1000.0, model="m") == pytest.approx(1575, abs=1)


def test_the_pad_goes_when_the_answers_agree() -> None:
    assert taught([1.5] * tokens.FEW).estimate(1000.0, model="m") == 1500


@given(st.floats(0.3, 3.9), st.floats(0.3, 3.9))
def test_the_factor_finds_the_truth_and_follows_when_it_changes(before: float, after: float) -> None:
    assert taught([before]).ratio("m") == pytest.approx(before, rel=0.01)
    assert taught([before] * 50 + [after] * 200).ratio("m") == pytest.approx(after, rel=0.01)


@given(st.lists(st.integers(1, 10**9), max_size=80))
def test_whatever_a_vendor_counts_the_factor_stays_within_four(actuals: list[int]) -> None:
    estimator = TokenEstimator()
    for actual in actuals:
        estimator.learn(1000.0, model="m", actual=actual)
        assert tokens.LOWEST <= estimator.ratio("m") <= tokens.HIGHEST
        assert estimator.estimate(1000.0, model="m") >= 1000 * estimator.ratio("m")


def test_after_that_an_estimate_is_enough_for_nine_of_ten() -> None:
    ratios = [0.9 + 0.002 * (37 * number % 100) for number in range(400)]
    estimator = TokenEstimator()
    short = 0
    for number, ratio in enumerate(ratios):
        actual = round(1000 * ratio)
        short += number >= 100 and estimator.estimate(1000.0, model="m") < actual
        estimator.learn(1000.0, model="m", actual=actual)
    assert 0.07 <= short / 300 <= 0.13


def test_models_and_tags_learn_apart() -> None:
    estimator = TokenEstimator()
    estimator.learn(1000.0, model="a", tag="code", actual=1200)
    estimator.learn(1000.0, model="a", tag="chat", actual=900)
    estimator.learn(1000.0, model="b", tag="code", actual=2000)
    assert (estimator.ratio("a", "code"), estimator.ratio("a", "chat"), estimator.ratio("b", "code")) == (1.2, 0.9, 2.0)
    assert estimator.ratio("b", "chat") == 1.0


def test_a_new_tag_begins_with_what_the_model_has_taught() -> None:
    estimator = TokenEstimator()
    estimator.learn(1000.0, model="m", actual=1400)
    assert estimator.ratio("m", "new") == 1.4
    estimator.learn(1000.0, model="m", tag="new", actual=1300)
    assert (estimator.ratio("m", "new"), estimator.ratio("m")) == (1.3, 1.4)


@pytest.mark.parametrize(("measure", "actual"), [(1000.0, 0), (1000.0, -1), (0.0, 5)])
def test_a_server_that_does_not_count_teaches_nothing(measure: float, actual: int) -> None:
    estimator = TokenEstimator()
    estimator.learn(measure, model="m", actual=actual)
    assert estimator.statistics() == {}


def test_only_so_many_tags_are_remembered_and_the_one_unused_for_longest_goes() -> None:
    estimator = TokenEstimator()
    for number in range(tokens.MAX_LEARNT):
        estimator.learn(1000.0, model="m", tag=str(number), actual=1200)
    estimator.learn(1000.0, model="m", tag="0", actual=1200)
    estimator.learn(1000.0, model="m", tag="one more", actual=1200)
    remembered = estimator.statistics()["m"]
    assert len(remembered) == tokens.MAX_LEARNT
    assert "0" in remembered
    assert "one more" in remembered
    assert "1" not in remembered


def test_memory_does_not_grow_with_the_answers() -> None:
    (learnt,) = taught([1.0 + 0.001 * (7 * number % 100) for number in range(1000)])._learnt.values()
    assert len(learnt._recent) == len(learnt._sorted) == tokens.RECENT
    assert learnt._sorted == sorted(learnt._recent)


def test_learning_costs_the_same_however_much_was_learnt() -> None:
    new, old = taught([1.0, 1.1] * tokens.RECENT), taught([1.0, 1.1] * 2000)
    assert (
        calls(lambda: old.learn(1000.0, model="m", actual=1050))
        <= calls(lambda: new.learn(1000.0, model="m", actual=1050))
        <= 20
    )


def test_the_statistics_say_what_was_learnt() -> None:
    estimator = taught([1.5] * 3)
    assert estimator.statistics() == {"m": {"": {"answers": 3, "ratio": 1.5, "margin": pytest.approx(1.05)}}}
    assert repr(estimator) == "<TokenEstimator: 1 models and tags learnt>"
