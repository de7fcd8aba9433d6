"""How many input tokens a request is going to cost: counted roughly, corrected by what the vendor has told before.

Theory of operation. A tokenizer cuts a text where its kind changes (letters, digits, signs, line ends) and cuts what is
long or rare again. So a text is counted by its *runs* and by how many bytes of each kind they have, ten numbers at
most, and a token count is a weighted sum of those (``COEFFICIENTS``). The runs of all kinds are found at once: every
byte becomes one bit that says its kind, the text becomes one big integer, and a run begins where a bit is set that the
byte before does not have. Letters outside ASCII are counted by the first byte of their UTF-8 form, which tells the
script. Above 4 KB, sixteen samples stand for the whole.

What that leaves to be wrong is much the same for all texts of one use: another tokenizer, the vendor's own frame around
the messages, the language. Each answer tells the true number, so a factor is learnt for each model and tag, and with it
how far single requests stray from it: an estimate is high enough for nine of ten.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from operator import mul
from typing import Protocol

import msgspec

from ..core.content import Document, Image, Opaque, Part, ToolCall, ToolResult
from ..core.types import Request

COEFFICIENTS = (0.126, 0.209, 0.473, 2.041, 1.338, 1.147, 0.372, 0.728, 0.621, 2.602)
"""Tokens for each of the numbers of :func:`features`. ``bench/estimator.py --fit`` prints them, for o200k."""
_LETTER, _SIGN, _WORD, _DIGIT, _LINE = COEFFICIENTS[:5]

SAMPLES = 16
SAMPLE = 256
"""Characters of one sample. A text of up to ``SAMPLES * SAMPLE`` characters is counted whole.

Sixteen short samples cost what eight long ones do, and are nearer to the whole of code: 2.0 % off instead of 3.6 %.
"""
LARGE = 16_384
"""Characters above which an exact tokenizer (60 to 200 µs per KB) would hold up the event loop for milliseconds."""

BYTES_OF_PAGE = 100_000
"""Of a PDF in base64: most pages are smaller, scanned ones larger. What answers teach corrects it."""

SLOWEST = 0.05
"""The least weight of a new answer in the learnt factor: after 14 answers it has forgotten half."""
LOWEST, HIGHEST = 0.25, 4.0
"""No tokenizer in use is further from another than that; what is, is a vendor's mistake in counting."""
FEW = 20
"""Answers until a quantile of them says something."""
PAD = 1.05
"""How much is added to an estimate until then."""
QUANTILE = 0.9
RECENT = 64
"""Answers of which the quantile is taken."""
MAX_LEARNT = 512
"""Pairs of model and tag that are remembered, 4 kB each; the one that was longest without an answer goes first."""

LETTER, SIGN, DIGIT, LINE = 1, 2, 4, 8
_LETTERS = bytes([*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1)])
_SIGNS = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_KINDS = bytes(
    LETTER if byte in _LETTERS else SIGN if byte in _SIGNS else DIGIT if byte in b"0123456789" else LINE * (byte == 10)
    for byte in range(256)
)
# The bit of a kind in every byte of the longest text that is counted.
_EVERY = int.from_bytes(b"\x01" * (SAMPLES * SAMPLE), "little")
_EVERY_WORD = _EVERY * (LETTER | SIGN)
_EVERY_LETTER, _EVERY_SIGN, _EVERY_DIGIT, _EVERY_LINE = (_EVERY * kind for kind in (LETTER, SIGN, DIGIT, LINE))

# By the first byte: accented Latin; the other alphabets, in two or three bytes; Chinese characters; the syllables of
# Japanese, and of Korean; and typography, and full-width signs, pictures and rare characters.
_SCRIPTS = ((0xC2, 0xCB), (0xCC, 0xE1), (0xE4, 0xE9), (0xE3, 0xE3), (0xEA, 0xED), (0xE2, 0xE2), (0xEE, 0xF4))
_SCRIPT_CODES = b"\x00\x01\x02\x03\x03\x04\x04"
_BEYOND_ASCII = bytes(range(0x80, 0x100))
_NO_FIRST_BYTE = bytes(byte for byte in range(256) if not any(low <= byte <= high for low, high in _SCRIPTS))
_SCRIPT_OF = bytes(
    next((code for (low, high), code in zip(_SCRIPTS, _SCRIPT_CODES, strict=True) if low <= byte <= high), 0)
    for byte in range(256)
)


class Tokenizer(Protocol):
    """An exact tokenizer that the user brings, as ``tiktoken`` or a vendor's own; none is shipped or downloaded."""

    def count(self, text: str) -> int:
        """Tokens of *text*. Must be safe to call from a thread."""
        ...


class Overheads(msgspec.Struct, frozen=True, gc=False):
    """Tokens beside those of the text. What else a request may come to hold has its row here."""

    request: int = 3
    """The opening of the answer."""
    message: int = 4
    """A message's frame and its role."""
    tools: int = 250
    """What a vendor says of tools when there are any (Anthropic's page on pricing: 264 to 530, by model and choice)."""
    tool: int = 12
    """A tool's frame, beside its name, description and schema."""
    call: int = 12
    """The frame of a tool call, or of a result."""
    image: int = 1100
    """A picture of about a megapixel: width times height by 750 (Anthropic), 765 for 1024 by 1024 (OpenAI)."""
    page: int = 2000
    """A page of a PDF (Anthropic: 1,500 to 3,000)."""


def features(text: str) -> tuple[int, ...]:
    """What is counted of *text*, at most ``SAMPLES * SAMPLE`` characters: five numbers, ten if it is not all ASCII.

    Letters, signs, runs of either, runs of digits, runs of line ends; then characters by script.
    """
    if text.isascii():
        return _ascii_features(text.encode().translate(_KINDS))
    # Half of a surrogate pair is no valid text, but JSON can hold one, and an estimate must not fail.
    data = text.encode("utf-8", "surrogatepass")
    scripts = data.translate(_SCRIPT_OF, _NO_FIRST_BYTE)
    return (*_ascii_features(data.translate(_KINDS, _BEYOND_ASCII)), *map(scripts.count, range(5)))


def _ascii_features(kinds: bytes) -> tuple[int, int, int, int, int]:
    bits = int.from_bytes(kinds, "little")
    starts = bits ^ (bits & (bits << 8))
    return (
        (bits & _EVERY_LETTER).bit_count(),
        (bits & _EVERY_SIGN).bit_count(),
        (starts & _EVERY_WORD).bit_count(),
        (starts & _EVERY_DIGIT).bit_count(),
        (starts & _EVERY_LINE).bit_count(),
    )


def rough_count(text: str) -> float:
    """Tokens of *text*, at most ``SAMPLES * SAMPLE`` characters, by :data:`COEFFICIENTS`."""
    if text.isascii():
        # The same sum, written out: most prompts are short, and looping would take as long as counting.
        letters, signs, words, digits, lines = _ascii_features(text.encode().translate(_KINDS))
        return _LETTER * letters + _SIGN * signs + _WORD * words + _DIGIT * digits + _LINE * lines
    tokens: float = sum(map(mul, COEFFICIENTS, features(text)))
    return tokens


def sampled(texts: Sequence[str]) -> str:
    """``SAMPLES`` pieces of ``SAMPLE`` characters, evenly spread over *texts*, which must have that many in all.

    A piece may begin in one text and end in another, so that many short texts are sampled as well as a long one.
    """
    ends = list(accumulate(map(len, texts)))
    step = ends[-1] // SAMPLES
    pieces: list[str] = []
    for start in range((step - SAMPLE) // 2, SAMPLES * step, step):
        index = bisect_right(ends, start)
        at = start - (ends[index - 1] if index else 0)
        missing = SAMPLE
        while missing:
            piece = texts[index][at : at + missing]
            pieces.append(piece)
            missing -= len(piece)
            index += 1
            at = 0
    return "".join(pieces)


def _texts(request: Request, each: Overheads) -> tuple[list[str], int]:
    """All words of *request*, and the tokens of what has none."""
    texts: list[str] = []
    beside = 0
    for message in request.messages:
        if isinstance(message.content, str):
            texts.append(message.content)
        else:
            beside += _read(message.content, texts, each)
    options = request.options
    if options.tools:
        beside += each.tools + each.tool * len(options.tools)
        for tool in options.tools:
            texts += (tool.name, tool.description, _json(tool.parameters))
    if options.output_format is not None:
        texts.append(_json(options.output_format.schema))
    return texts, beside


def _read(parts: Sequence[Part], texts: list[str], each: Overheads) -> int:
    """Add the words of *parts* to *texts*; the tokens of what has none."""
    beside = 0
    for part in parts:
        match part:
            case Image():
                beside += each.image
            case Document(data="", text=""):
                beside += each.page
            case Document(text=""):
                beside += each.page * (1 + len(part.data) // BYTES_OF_PAGE)
            case ToolCall():
                texts += (part.name, part.arguments)
                beside += each.call
            case ToolResult():
                beside += each.call
                if isinstance(part.content, str):
                    texts.append(part.content)
                else:
                    beside += _read(part.content, texts, each)
            case Opaque():
                texts.append(part.raw.decode("utf-8", "replace"))
            case _:
                texts.append(part.text)
    return beside


def _json(schema: object) -> str:
    return msgspec.json.encode(schema).decode()


class TokenEstimator:
    """Estimates input tokens, and learns from the answers how to do it better. It has no clock and does no I/O.

    A request is measured once (:meth:`measure`), which does not depend on the model; its measure stands for it from
    there on, so that nothing has to hold the prompt until the answer tells the truth.
    """

    __slots__ = ("_learnt", "_overheads", "_tokenizer", "exact")

    def __init__(self, tokenizer: Tokenizer | None = None, *, overheads: Overheads | None = None) -> None:
        self._tokenizer = tokenizer
        self.exact = tokenizer is not None
        """Whether there is an exact tokenizer."""
        self._overheads = overheads if overheads is not None else Overheads()
        self._learnt: dict[tuple[str, str], _Learnt] = {}

    def __repr__(self) -> str:
        return f"<TokenEstimator: {len(self._learnt)} models and tags learnt>"

    def measure(self, request: Request) -> float:
        """Tokens of *request* before anything is learnt: at most 0.3 ms unless there is an exact tokenizer."""
        messages, options, each = request.messages, request.options, self._overheads
        overheads = each.request + each.message * len(messages)
        plain = options.tools is None and options.output_format is None
        if plain and len(messages) == 1 and self._tokenizer is None:
            text = messages[0].content
            if type(text) is str and len(text) <= SAMPLES * SAMPLE:
                return overheads + rough_count(text)
        texts, beside = _texts(request, each)
        overheads += beside
        if self._tokenizer is not None:
            return overheads + sum([self._tokenizer.count(text) for text in texts])
        length = sum(map(len, texts))
        if length <= SAMPLES * SAMPLE:
            return overheads + rough_count("".join(texts))
        return overheads + rough_count(sampled(texts)) * length / (SAMPLES * SAMPLE)

    def is_slow(self, request: Request) -> bool:
        """Whether :meth:`measure` belongs into a thread: there is an exact tokenizer, and much to count."""
        return self._tokenizer is not None and sum(map(len, _texts(request, self._overheads)[0])) > LARGE

    def estimate(self, request: Request | float, *, model: str, tag: str = "") -> int:
        """Input tokens to reserve for *request* or its measure, enough for about nine of ten."""
        measure = self.measure(request) if isinstance(request, Request) else request
        learnt = self._learnt.get((model, tag)) or self._learnt.get((model, ""))
        return ceil(measure * (learnt.factor if learnt is not None else PAD))

    def learn(self, request: Request | float, *, model: str, tag: str = "", actual: int, cached: int = 0) -> None:
        """The vendor has counted *actual* input tokens in *request*, or in what measured so, *cached* among them."""
        measure = self.measure(request) if isinstance(request, Request) else request
        if actual <= 0 or measure <= 0:
            # Some compatible servers do not count.
            return
        key = (model, tag)
        learnt = self._learnt.pop(key, None)
        if learnt is None:
            learnt = _Learnt()
            if len(self._learnt) >= MAX_LEARNT:
                del self._learnt[next(iter(self._learnt))]
        learnt.add(actual / measure)
        if cached or learnt.cached:
            learnt.cached += SLOWEST * (min(cached / actual, 1.0) - learnt.cached)
        self._learnt[key] = learnt

    def cached(self, model: str, tag: str = "") -> float:
        """The share of a prompt that probably comes from the vendor's cache; 0.0 until one has."""
        learnt = self._find(model, tag)
        return learnt.cached if learnt is not None else 0.0

    def ratio(self, model: str, tag: str = "") -> float:
        """What a measure is to be multiplied by for the expected number of tokens, without a margin."""
        learnt = self._find(model, tag)
        return learnt.ratio if learnt is not None else 1.0

    def statistics(self) -> dict[str, dict[str, dict[str, float]]]:
        """Per model and tag: answers learnt from, the factor, and the margin on top of it."""
        models: dict[str, dict[str, dict[str, float]]] = {}
        for (model, tag), learnt in self._learnt.items():
            models.setdefault(model, {})[tag] = {
                "answers": learnt.answers,
                "ratio": learnt.ratio,
                "margin": learnt.factor / learnt.ratio,
            }
        return models

    def _find(self, model: str, tag: str) -> _Learnt | None:
        """What is known of *tag*, else of the model's untagged calls: most of a factor is the model's tokenizer."""
        return self._learnt.get((model, tag)) or self._learnt.get((model, ""))


class _Learnt:
    """The factor of one model and tag, and how far single answers were from it."""

    __slots__ = ("_recent", "_sorted", "answers", "cached", "factor", "ratio")

    def __init__(self) -> None:
        self.answers = 0
        self.ratio = 1.0
        self.cached = 0.0
        self.factor = PAD
        """The ratio with its margin."""
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, ratio: float) -> None:
        """Learn from an answer of *ratio* times what was measured."""
        # Once for each answer there is: comparisons take a third of what min() and max() do.
        if not LOWEST <= ratio <= HIGHEST:
            ratio = LOWEST if ratio < LOWEST else HIGHEST
        if self.answers:
            # By how much the answer was over the expectation at its time; the first had none.
            self._remember(ratio / self.ratio)
        self.answers = answers = self.answers + 1
        self.ratio += (SLOWEST if answers * SLOWEST > 1.0 else 1 / answers) * (ratio - self.ratio)
        if answers < FEW:
            self.factor = self.ratio * PAD
        else:
            margin = self._sorted[ceil(QUANTILE * len(self._sorted)) - 1]
            self.factor = self.ratio * margin if margin > 1.0 else self.ratio

    def _remember(self, error: float) -> None:
        self._recent.append(error)
        insort(self._sorted, error)
        if len(self._recent) > RECENT:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
