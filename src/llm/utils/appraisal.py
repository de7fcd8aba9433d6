"""What a call takes of a quota: before it is sent by what earlier answers taught, and in the end by what it was.

A request is measured once; what it needs then stands for it, so that nothing has to hold the prompt. Which model
answers is known only when a key takes the call, so its cost is worked out key by key.
"""

from __future__ import annotations

from math import ceil, inf

import msgspec

from ..core.exceptions import LLMException
from ..core.types import Cost, Counting, Request, Settlement, Usage
from .output_predictor import OutputPredictor
from .sliding_window import NOTHING
from .tokens import TokenEstimator

CACHED_FROM = 1024
"""Tokens: shorter prompts are cached by no vendor."""
PER_BYTE = 0.22
LEAST_PER_BYTE, MOST_PER_BYTE = 0.1, 1.0
"""Output tokens in a byte of text, before anything is known; and what is believed."""
LEARN_ALL, LEARN_EVERY = 1000, 0.01
"""Answers of which each is learnt from, and the seconds between two lessons after them."""
COUNTS_ALL = Counting()


class Need(msgspec.Struct, frozen=True, gc=False):
    """What a call needs, apart from the model that will answer it."""

    measure: float
    """Its prompt in tokens, before anything learnt of the model."""
    max_tokens: int | None
    tag: str
    affinity: int
    """Says which calls begin with the same long text; 0 if that is of no use."""


class Appraiser:
    """Says what calls take, and learns from the answers. It has no clock and does no I/O."""

    __slots__ = ("_learnt", "_per_byte", "estimator", "learn_at", "predictor")

    def __init__(self, estimator: TokenEstimator | None = None, predictor: OutputPredictor | None = None) -> None:
        self.estimator = estimator if estimator is not None else TokenEstimator()
        self.predictor = predictor if predictor is not None else OutputPredictor()
        self._per_byte = PER_BYTE
        self._learnt = 0
        self.learn_at = -inf
        """The instant from which answers are learnt from again: a hundred a second tell all that there is to be told,
        and each costs as much as half an admission."""

    def need(self, request: Request) -> Need | None:
        """What *request* needs; None if its prompt is to be counted in a thread (``estimator.measure``)."""
        estimator = self.estimator
        if estimator.exact and estimator.is_slow(request):
            return None
        measure = estimator.measure(request)
        if measure < CACHED_FROM:
            # As nearly always: there is nothing to be cached.
            options = request.options
            return Need(measure, options.max_tokens, options.tag, 0)
        return self.measured(request, measure)

    def measured(self, request: Request, measure: float) -> Need:
        """What *request* needs, whose prompt has *measure* tokens before anything learnt."""
        options, messages = request.options, request.messages
        affinity = 0
        if measure >= CACHED_FROM and len(messages) > 1:
            # What a conversation begins with is what a vendor has cached; its last turn is new.
            affinity = hash((messages[0].content, messages[1].content if len(messages) > 2 else ""))
        return Need(measure, options.max_tokens, options.tag, affinity)

    def cost(self, need: Need, model: str, counting: Counting) -> tuple[Cost, float]:
        """What *need* takes if *model* answers, and the variance of the output in it."""
        tag, max_tokens = need.tag, need.max_tokens
        input_tokens = self.estimator.estimate(need.measure, model=model, tag=tag)
        mean, variance = self.predictor.expect(model=model, tag=tag, max_tokens=max_tokens)
        if not counting.cache_reads:
            input_tokens -= int(input_tokens * self.estimator.cached(model, tag))
        tokens, output_tokens = input_tokens, ceil(mean)
        if counting.reserve_max:
            tokens = max_tokens if max_tokens is not None else output_tokens
            if tokens < input_tokens:
                tokens = input_tokens
        return Cost(1, input_tokens, output_tokens, tokens), variance

    def learn(
        self,
        need: Need,
        usage: Usage,
        *,
        model: str,
        seconds: float | None,
        under_way: int,
        received: int,
        now: float,
    ) -> None:
        """An answer has ended: the next ones are estimated by it.

        It came in *seconds* from its first token to its end, if that is known, beside *under_way* others; *received* is
        how many bytes of it were seen coming, 0 if it came whole.
        """
        if now < self.learn_at:
            return
        self._learnt += 1
        if self._learnt > LEARN_ALL:
            self.learn_at = now + LEARN_EVERY
        tag, output = need.tag, usage.output_tokens
        if usage.input_tokens > 0:
            self.estimator.learn(
                need.measure, model=model, tag=tag, actual=usage.input_tokens, cached=usage.cache_read_tokens
            )
        if output > 0:
            self.predictor.learn(
                model=model,
                tag=tag,
                output_tokens=output,
                max_tokens=need.max_tokens,
                seconds=seconds,
                under_way=under_way,
            )
            if received:
                # Of an answer that thought unseen, what was seen says little: that is what the bounds are for.
                self._per_byte += 0.05 * (min(max(output / received, LEAST_PER_BYTE), MOST_PER_BYTE) - self._per_byte)

    def tokens_in(self, received: int) -> int:
        """Output tokens in so many bytes of text."""
        return int(received * self._per_byte)


def charge(
    reserved: Cost, settlement: Settlement, *, sent: bool, produced: int = 0, counting: Counting | None = None
) -> Cost:
    """What an attempt costs in the end, of what was *reserved* for it: the refund table (RATE_LIMITING §3.4).

    A request that never left costs nothing. One that was refused has cost a request, unless the vendor does not count
    those it answers with 429. One that broke off after it had been sent may have been worked on: its input is paid, and
    its output as far as it was seen (*produced* of a stream, or what the vendor said).
    """
    if not sent:
        return NOTHING
    counting = counting if counting is not None else COUNTS_ALL
    usage, error = settlement.usage, settlement.error
    if error is not None and usage is None and isinstance(error, LLMException):
        status = error.status
        if status is not None and status >= 400:
            return Cost(reserved.requests, 0, 0) if status != 429 or counting.rejected else NOTHING
    if usage is None or not usage.total_tokens:
        if error is None:
            # Some compatible servers do not count, or say nothing but zeros.
            return Cost(reserved.requests, reserved.input_tokens, produced or reserved.output_tokens, reserved.tokens)
        return Cost(reserved.requests, reserved.input_tokens, produced, reserved.tokens)
    input_tokens = usage.input_tokens - (0 if counting.cache_reads else usage.cache_read_tokens)
    if not usage.input_tokens:
        input_tokens = reserved.input_tokens
    output = usage.output_tokens if error is None else max(usage.output_tokens, produced)
    return Cost(reserved.requests, input_tokens, output, reserved.tokens if counting.reserve_max else input_tokens)
