"""How many output tokens an answer is still going to have, learnt from the answers before it.

Theory of operation. ``max_tokens`` is a bound and no guess: who holds it for every answer uses half of a quota, or a
twentieth. So the lengths of the last ``RECENT`` answers of each model and tag are kept, sorted, with running sums of
them and of their squares. What is still to come when k tokens have come is the mean of ``min(length, max_tokens) - k``
over all lengths above k: one search, and a few differences. Means are there to be added up over all open answers, and
so are variances, which tell how far off that sum may be.

The first answers to end are the short ones, while the long ones, which hold most of the tokens, are still being written
(survivor bias). Believed, they let in far too many, of which again the short ones end first. Against that, two things:

- A *prior* that has seen long answers is mixed in, and fades until the ring is full. When k tokens have come, it counts
  for as many answers as would be that long, just as the answers themselves do.
- Of many answers under way at once only every second, third, … that ends is learnt, so that what is learnt always spans
  several times what is under way. A key ten times as large then learns as a small one does.

The prior, and what lies beyond the longest answer seen, have a tail by Lomax (a shifted Pareto) with exponent 3: longer
than k with the chance ``(scale / (scale + k)) ** 3``, and each token that has come lets half a token more be expected.
A lognormal with s = 1, which lengths are like, is not far from that: where a 400th part of it is left, one more token
for 2.4 that have come. And what this tail has up to a bound takes neither a power nor a logarithm.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from itertools import accumulate
from math import inf, sqrt
from operator import mul
from typing import Literal, NamedTuple, TypeAlias

Reserve: TypeAlias = Literal["strict", "balanced", "throughput"]

QUANTILE: dict[Reserve, float] = {"strict": 0.0, "balanced": 1.645, "throughput": 0.0}
"""Standard deviations to hold on top of the mean: 1.645 is enough for 19 of 20, if many answers are added up."""

RECENT = 400
"""Answers of one model and tag that are looked at."""
REFRESH = 25
"""Answers until they are sorted anew. The first few each change too much to wait that long: 1, 2, 4, 8, 16."""
LONGEST = 1_000_000
"""Tokens that no answer exceeds; a vendor that counts more is mistaken. Sums of squares fit into 64 bits with it."""

PRIOR = 768
"""Mean of the prior, in tokens.

The figures here are of a saturated key of 30,000 output tokens a minute, lengths lognormal(150, s=1), max_tokens 4096,
75 tokens a second, means of 2 to 6 seeds; the tests have a small one of that kind. Used of the first five minutes, and
the fullest minute of them: with 512 97 % and 103 %, with 768 96 % and 101 %, with 1024 94 % and 99 %.
"""
SCALE = 2.0 * PRIOR
"""Of its tail: that of exponent 3 has half its scale for a mean."""
PRIOR_WEIGHT = 60.0
"""How many answers the prior counts for at first; each takes away its 400th part, so a full ring has it gone.

Without it the fullest minute has 248 %: all that the limit on requests lets in. If it never fades, 3 % of the key are
left unused for ever; ``60 / (60 + n)`` would still be 13 % of the mixture when the ring is full.
"""
TOGETHER = 33
"""Answers under way of which all are learnt; of twice as many every second is, and so on.

Sixty answers, the weight of the prior, are then twice as many as are under way, as in the key above. One ten times as
large has its fullest minute at 104 % instead of 223 %; and at 105 % instead of 194 % when it comes back from idling,
where no prior helps. With 16 and 66 it is the same within 1 %.
"""

MAX_LEARNT = 512
"""Pairs of model and tag that are remembered, 13 kB each; the one that was longest without an answer goes first."""
MAX_BOUNDS = 16
"""Values of max_tokens for which a pair keeps what it says of an answer that has not begun."""

SPEED = 60.0
"""Tokens per second of a model that has not told its own."""
SLOWEST, FASTEST = 1.0, 5000.0
"""Tokens per second that are believed. An answer that came in one piece took no time, and was still written in some."""
KEPT = 0.95
"""What an answer leaves of those before it in the speed: after 14 answers they count half."""


class Expectation(NamedTuple):
    """The tokens that are still to come of one answer."""

    mean: float
    variance: float


NOTHING = Expectation(0.0, 0.0)
# Half of what calling the class takes, and one is made for each open answer whenever they are added up.
_new = tuple.__new__


class OutputPredictor:
    """Says what is still to come of an answer, and learns from those that have ended. It has no clock and does no I/O.

    What to hold for all open answers is the sum of their means and *z* times the root of the sum of their variances.
    """

    __slots__ = ("_learnt", "_speeds", "_strict", "_unknown", "look_ahead", "z")

    def __init__(self, reserve: Reserve = "balanced") -> None:
        self.z = QUANTILE[reserve]
        """How many standard deviations are to be held on top of the mean."""
        self.look_ahead = reserve == "balanced"
        """Whether that may count on what leaves the window until the tokens come."""
        self._strict = reserve == "strict"
        self._learnt: dict[tuple[str, str], _Learnt] = {}
        self._unknown = _Learnt()
        # Tokens and seconds, of which older ones count less. A quotient of sums: short answers tell little of a speed.
        self._speeds: dict[str, tuple[float, float]] = {}

    def __repr__(self) -> str:
        return f"<OutputPredictor: {len(self._learnt)} models and tags learnt>"

    def expect(self, *, model: str, tag: str = "", max_tokens: int | None = None, produced: int = 0) -> Expectation:
        """What is still to come of an answer that may have *max_tokens*, given that *produced* have come.

        Strict holds all that may come; without max_tokens, what the others expect before they have learnt.
        """
        if self._strict:
            return self._all(max_tokens, max(0, produced))
        # A tag not seen before is taken to be like the model's untagged calls.
        learnt = self._learnt.get((model, tag)) or self._learnt.get((model, "")) or self._unknown
        if produced <= 0:
            return learnt.whole.get(max_tokens) or learnt.expect_whole(max_tokens)
        return learnt.expect(LONGEST if max_tokens is None or max_tokens > LONGEST else max_tokens, produced)

    def learn(
        self,
        *,
        model: str,
        tag: str = "",
        output_tokens: int,
        max_tokens: int | None = None,
        seconds: float | None = None,
        under_way: int = 0,
    ) -> None:
        """An answer has ended after *output_tokens*, the last of them *seconds* after the first.

        One that was cut off by *max_tokens* counts with the length it got. *under_way* is how many other answers of the
        model and tag are open; of more than ``TOGETHER``, not every one that ends is learnt.
        """
        if output_tokens <= 0:
            # Some compatible servers do not count.
            return
        length = min(output_tokens, LONGEST)
        key = (model, tag)
        learnt = self._learnt.pop(key, None)
        if learnt is None:
            learnt = _Learnt()
            if len(self._learnt) >= MAX_LEARNT:
                del self._learnt[next(iter(self._learnt))]
        self._learnt[key] = learnt
        learnt.ended += 1
        if learnt.ended * TOGETHER >= under_way:
            learnt.add(length, cut=max_tokens is not None and output_tokens >= max_tokens)
        if seconds is not None and 0.0 < seconds < inf:
            self._time(model, length, seconds)

    def speed(self, model: str) -> float:
        """Tokens per second of an answer of *model*, once they come."""
        known = self._speeds.get(model)
        return known[0] / known[1] if known is not None else SPEED

    def statistics(self) -> dict[str, dict[str, dict[str, float]]]:
        """Per model and tag: answers learnt from, how many of them max_tokens cut off, and what a new one may have.

        That is its expected length, the standard deviation of it, and the tokens per second of the model.
        """
        models: dict[str, dict[str, dict[str, float]]] = {}
        for (model, tag), learnt in self._learnt.items():
            mean, variance = learnt.expect(LONGEST, 0)
            models.setdefault(model, {})[tag] = {
                "answers": learnt.answers,
                "cut": learnt.cut,
                "mean": mean,
                "deviation": sqrt(variance),
                "speed": self.speed(model),
            }
        return models

    def _all(self, max_tokens: int | None, produced: int) -> Expectation:
        if max_tokens is None:
            return Expectation(self._unknown.expect(LONGEST, produced).mean, 0.0)
        return Expectation(float(max(0, min(max_tokens, LONGEST) - produced)), 0.0)

    def _time(self, model: str, length: int, seconds: float) -> None:
        tokens, spent = self._speeds.pop(model, (0.0, 0.0))
        if len(self._speeds) >= MAX_LEARNT:
            del self._speeds[next(iter(self._speeds))]
        seconds = min(max(seconds, length / FASTEST), length / SLOWEST)
        self._speeds[model] = (tokens * KEPT + length, spent * KEPT + seconds)


class _Learnt:
    """The lengths of one model and tag, and how much the prior counts beside them."""

    __slots__ = (
        "_lengths",
        "_ring",
        "_sorted",
        "_squares",
        "_streams",
        "_sums",
        "_weight",
        "answers",
        "cut",
        "ended",
        "whole",
    )

    def __init__(self) -> None:
        self.answers = 0
        self.cut = 0
        self.ended = 0
        """Answers that ended since the last that was learnt."""
        self.whole: dict[int | None, Expectation] = {}
        """By max_tokens, what is expected of an answer that has not begun: it is asked for whenever one waits."""
        self._weight = PRIOR_WEIGHT
        # As numbers in a row; lists of integers would be five times as large.
        self._ring = array("i")
        self._lengths = array("i")
        """The ring as it was at the last refresh."""
        self._streams = False
        """Whether answers under way are asked about: only then is it sorted and summed up."""
        self._sorted = array("i")
        self._sums = array("q", (0,))
        """Of the shortest, the two shortest, and so on."""
        self._squares = array("q", (0,))

    def add(self, length: int, *, cut: bool) -> None:
        """Learn from an answer of *length* tokens."""
        answers = self.answers
        if answers < RECENT:
            self._ring.append(length)
        else:
            self._ring[answers % RECENT] = length
        self.answers = answers = answers + 1
        self.cut += cut
        self.ended = 0
        if answers % REFRESH == 0 or (answers < REFRESH and answers & (answers - 1) == 0):
            self._refresh()

    def expect_whole(self, max_tokens: int | None) -> Expectation:
        """What is to come of an answer that has not begun, and keep it until the next refresh."""
        if len(self.whole) >= MAX_BOUNDS:
            self.whole.clear()
        found = self.whole[max_tokens] = self.expect(LONGEST if max_tokens is None else min(max_tokens, LONGEST), 0)
        return found

    def expect(self, bound: int, produced: int) -> Expectation:
        """What is to come after *produced* tokens of an answer that ends at *bound* at the latest."""
        left = bound - produced
        if left <= 0:
            return NOTHING
        size = len(self._lengths)
        count, total, squares = self._above(produced, bound) if size else (0, 0, 0)
        if count:
            mean = total / count - produced
            # In integers: differences of large squares would lose what they are about.
            variance = (squares * count - total * total) / (count * count)
        elif size:
            # Longer than any before: it counts as one that was seen, and has the tail with its own length for scale.
            count = 1
            share = produced / bound
            most = share * left
            mean = most * (1.0 + share) / 2
            variance = most * most - mean * mean
        else:
            mean = variance = 0.0
        weight = self._weight
        if weight:
            # After k tokens the tail is one of the same kind, with the scale SCALE + k. Up to the bound it has the
            # mean m * (1 + s) / 2 and the mean square m², where s = scale / (scale + left) and m = s * left.
            scale = SCALE + produced
            share = SCALE / scale
            weight *= share * share * share
            share = scale / (scale + left)
            most = share * left
            prior = most * (1.0 + share) / 2
            away = prior - mean
            part = weight / (weight + count)
            variance += part * (most * most - prior * prior - variance + (1.0 - part) * away * away)
            mean += part * away
        return _new(Expectation, (mean, variance))

    def _above(self, produced: int, bound: int) -> tuple[int, int, int]:
        """How many lengths are above *produced*, and the sums of them and of their squares.

        What reaches the *bound* would be no longer than that.
        """
        if not self._streams:
            if not produced:
                every = self._lengths if bound >= max(self._lengths) else [min(n, bound) for n in self._lengths]
                return len(every), sum(every), sum(map(mul, every, every))
            self._streams = True
            self._sort()
        lengths = self._sorted
        size = len(lengths)
        start = bisect_right(lengths, produced)
        end = size if start == size or bound >= lengths[-1] else bisect_left(lengths, bound, start)
        beyond = bound * (size - end)
        return (
            size - start,
            self._sums[end] - self._sums[start] + beyond,
            self._squares[end] - self._squares[start] + bound * beyond,
        )

    def _refresh(self) -> None:
        self._lengths = self._ring[:]
        if self._streams:
            self._sort()
        self._weight = PRIOR_WEIGHT * max(0.0, 1.0 - self.answers / RECENT)
        self.whole.clear()

    def _sort(self) -> None:
        lengths = sorted(self._lengths)
        self._sorted = array("i", lengths)
        self._sums = array("q", accumulate(lengths, initial=0))
        self._squares = array("q", accumulate(map(mul, lengths, lengths), initial=0))
