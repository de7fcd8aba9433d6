"""What attempts cost, by the refund table, and what calls are expected to."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from llm.core.exceptions import (
    LLMAuthenticationError,
    LLMConnectionError,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMRateLimitError,
    LLMStreamInterruptedError,
    LLMTimeoutError,
)
from llm.core.types import Cost, Counting, Message, MessageRole, Options, Request, Settlement, Usage
from llm.utils.appraisal import CACHED_FROM, LEARN_ALL, LEARN_EVERY, Appraiser, Need, charge
from llm.utils.sliding_window import NOTHING
from llm.utils.tokens import TokenEstimator

RESERVED = Cost(1, 100, 50, 100)
HALF = Usage(input_tokens=70, output_tokens=20)
CANCELLED = asyncio.CancelledError()


@pytest.mark.parametrize(
    ("sent", "settlement", "cost"),
    [
        # It never left: nothing.
        (False, Settlement(error=LLMConnectionError("")), NOTHING),
        (False, Settlement(error=CANCELLED), NOTHING),
        (False, Settlement(error=ValueError()), NOTHING),
        # 429 and refusals: the request is counted, the tokens are not.
        (True, Settlement(error=LLMRateLimitError("", status=429)), Cost(1, 0, 0)),
        (True, Settlement(error=LLMInvalidRequestError("", status=400)), Cost(1, 0, 0)),
        (True, Settlement(error=LLMAuthenticationError("", status=401)), Cost(1, 0, 0)),
        (True, Settlement(error=LLMInvalidRequestError("", status=422)), Cost(1, 0, 0)),
        # So are 500, 503 and 529.
        (True, Settlement(error=LLMOverloadedError("", status=529)), Cost(1, 0, 0)),
        (True, Settlement(error=LLMOverloadedError("", status=500)), Cost(1, 0, 0)),
        # Broken off after it had left: its input is paid, and what was seen of its output.
        (True, Settlement(error=LLMTimeoutError("")), Cost(1, 100, 0)),
        (True, Settlement(error=LLMConnectionError("")), Cost(1, 100, 0)),
        (True, Settlement(error=CANCELLED), Cost(1, 100, 0)),
        (True, Settlement(error=RuntimeError("a bug")), Cost(1, 100, 0)),
        (True, Settlement(error=LLMStreamInterruptedError(""), usage=HALF), Cost(1, 70, 20)),
        (True, Settlement(error=CANCELLED, usage=Usage(0, 80)), Cost(1, 100, 80)),
        (True, Settlement(error=LLMOverloadedError("", status=529), usage=HALF), Cost(1, 70, 20)),
        # Success: what it really was.
        (True, Settlement(usage=HALF, exact=True), Cost(1, 70, 20)),
        (True, Settlement(usage=Usage(170, 900), exact=True), Cost(1, 170, 900)),
        (True, Settlement(usage=Usage(70, 0), exact=True), Cost(1, 70, 0)),
        # A server that does not count its tokens used them all the same.
        (True, Settlement(usage=None, exact=True), Cost(1, 100, 50)),
        (True, Settlement(usage=Usage(0, 0), exact=True), Cost(1, 100, 50)),
        (True, Settlement(usage=Usage(0, 20), exact=True), Cost(1, 100, 20)),
    ],
)
def test_the_refund_table(sent: bool, settlement: Settlement, cost: Cost) -> None:
    charged = charge(RESERVED, settlement, sent=sent)
    assert replace(charged, tokens=0) == cost
    assert charged.tokens == charged.input_tokens, "output counts of the combined tokens as it is produced"


def test_what_was_seen_of_a_stream_counts_where_the_vendor_has_told_less() -> None:
    broken = Settlement(error=LLMStreamInterruptedError(""), usage=HALF)
    assert charge(RESERVED, broken, sent=True, produced=35) == Cost(1, 70, 35, 70)
    assert charge(RESERVED, Settlement(error=CANCELLED), sent=True, produced=35) == Cost(1, 100, 35, 100)
    whole = Settlement(usage=HALF, exact=True)
    assert charge(RESERVED, whole, sent=True, produced=35) == Cost(1, 70, 20, 70), "in the end the vendor's word counts"


@pytest.mark.parametrize(
    ("counting", "settlement", "cost"),
    [
        (Counting(rejected=False), Settlement(error=LLMRateLimitError("", status=429)), NOTHING),
        (Counting(rejected=False), Settlement(error=LLMOverloadedError("", status=529)), Cost(1, 0, 0)),
        (Counting(cache_reads=False), Settlement(usage=Usage(100, 20, cache_read_tokens=90)), Cost(1, 10, 20, 10)),
        (Counting(), Settlement(usage=Usage(100, 20, cache_read_tokens=90)), Cost(1, 100, 20, 100)),
        (Counting(reserve_max=True), Settlement(usage=HALF), Cost(1, 70, 20, 4096)),
        (Counting(reserve_max=True), Settlement(error=LLMOverloadedError("", status=500)), Cost(1, 0, 0)),
    ],
)
def test_vendors_count_differently(counting: Counting, settlement: Settlement, cost: Cost) -> None:
    assert charge(Cost(1, 100, 50, 4096), settlement, sent=True, counting=counting) == cost


# -- what calls are expected to take -----------------------------------------------------------------------------------

NEED = Need(100.0, 200, "", 0)


def lesson(appraiser: Appraiser, usage: Usage, *, now: float = 0.0, received: int = 0) -> None:
    appraiser.learn(NEED, usage, model="m", seconds=1.0, under_way=0, received=received, now=now)


def test_the_second_call_is_reckoned_by_what_the_first_one_was() -> None:
    appraiser = Appraiser()
    before, _ = appraiser.cost(NEED, "m", Counting())
    lesson(appraiser, Usage(200, 50))
    after, _ = appraiser.cost(NEED, "m", Counting())
    assert before.input_tokens == 105
    assert after.input_tokens == 210
    assert after.tokens == after.input_tokens


def test_what_probably_comes_from_a_cache_is_not_reckoned_where_it_does_not_count() -> None:
    appraiser = Appraiser()
    for _ in range(200):
        lesson(appraiser, Usage(100, 50, cache_read_tokens=90))
    counted, _ = appraiser.cost(NEED, "m", Counting())
    uncounted, _ = appraiser.cost(NEED, "m", Counting(cache_reads=False))
    assert counted.input_tokens == pytest.approx(100, abs=5)
    assert uncounted.input_tokens == pytest.approx(10, abs=3)


def test_where_max_tokens_are_held_the_larger_of_them_and_the_prompt_is_reckoned() -> None:
    appraiser, counting = Appraiser(), Counting(reserve_max=True)
    assert appraiser.cost(NEED, "m", counting)[0].tokens == 200
    assert appraiser.cost(Need(1000.0, 200, "", 0), "m", counting)[0].tokens == 1050
    unsaid, _ = appraiser.cost(Need(1.0, None, "", 0), "m", counting)
    assert unsaid.tokens == unsaid.output_tokens


def test_text_is_reckoned_in_tokens_as_earlier_answers_had_them() -> None:
    appraiser = Appraiser()
    assert appraiser.tokens_in(1000) == 220
    for _ in range(200):
        lesson(appraiser, Usage(10, 500), received=1000)
    assert appraiser.tokens_in(1000) == pytest.approx(500, abs=5)
    for _ in range(400):
        lesson(appraiser, Usage(10, 100_000), received=10)
    assert appraiser.tokens_in(1000) <= 1000, "an answer that thought unseen tells nothing of its text"


def test_after_many_answers_not_each_is_a_lesson() -> None:
    appraiser = Appraiser()
    for _ in range(LEARN_ALL + 1):
        lesson(appraiser, Usage(100, 50))
    lesson(appraiser, Usage(400, 50))
    assert appraiser.estimator.ratio("m") == pytest.approx(1.0)
    lesson(appraiser, Usage(400, 50), now=LEARN_EVERY)
    assert appraiser.estimator.ratio("m") > 1.1


def test_an_answer_without_figures_teaches_nothing() -> None:
    appraiser = Appraiser()
    lesson(appraiser, Usage())
    assert appraiser.cost(NEED, "m", Counting())[0].input_tokens == 105


class Letters:
    """A tokenizer for which a token is a letter."""

    def count(self, text: str) -> int:
        return len(text)


def test_a_prompt_is_counted_here_unless_that_would_take_long() -> None:
    appraiser, exact = Appraiser(), Appraiser(TokenEstimator(Letters()))
    options = Options(max_tokens=9, tag="t")
    turns = tuple(Message(MessageRole.USER, content) for content in ("word " * CACHED_FROM, "question"))
    short, long = Request(turns[1:], "", options), Request(turns * 20, "", options)
    assert appraiser.need(short) == Need(appraiser.estimator.measure(short), 9, "t", 0)
    found = appraiser.need(long)
    assert found is not None
    assert found == appraiser.measured(long, found.measure)
    assert found.affinity != 0
    assert exact.need(long) is None, "a thread counts it"
    assert exact.need(short) is not None


def test_conversations_with_a_long_common_beginning_are_alike_and_others_are_not() -> None:
    appraiser = Appraiser()

    def affinity(*contents: str, measure: float = CACHED_FROM) -> int:
        messages = tuple(Message(MessageRole.USER, content) for content in contents)
        return appraiser.measured(Request(messages, "", Options()), measure).affinity

    assert affinity("book", "one") == affinity("book", "another") != 0
    assert affinity("book", "one", "more") == affinity("book", "one", "less") != affinity("book", "two", "more")
    assert affinity("book", "one") != affinity("other", "one")
    assert affinity("book", "one", measure=CACHED_FROM - 1.0) == 0
    assert affinity("book") == 0, "what is asked only once has no beginning in common"
