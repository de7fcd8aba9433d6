"""Reading settings that somebody wrote by hand: values that know their path, and variables in text.

A problem does not stop the reading: it is noted with its path, so that one error can tell them all. A note names what
was seen only where that cannot be a secret: numbers, and short text where a word of a known list was expected.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec

T = TypeVar("T")
Reader: TypeAlias = Callable[[Any], T]
Table: TypeAlias = Mapping[str, "Reader[Any] | Table"]
"""How the keys of a mapping are read; a table in it stands for a mapping inside."""

DEPTH = 32
"""Levels of nesting that a configuration may have."""
MOST = 10_000
"""Values that those parts may hold which have no schema."""
LARGEST = 10**15
"""Above it a number is a slip of the pen, and no float counts it exactly for long."""

# Short enough that no vendor's key fits in.
_HARMLESS = re.compile(r"(?!sk-)[\w./:+-][\w ./:+-]{0,29}")
_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<inside>[^}]*)(?P<closed>\}?)")
_REFERENCE = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>.*))?", re.DOTALL)


class Wrong(Exception):
    """A value is not what it should be. The text says what was seen and how to mend it, and is safe to show."""


class Absent(Wrong):
    """There is no such file."""


class Given(str):
    """Text that came out of variables: never quoted, and it may stand for a number or a flag."""

    names: tuple[str, ...] = ()


class Reading(msgspec.Struct):
    """What the values of one configuration share."""

    environ: Mapping[str, str]
    folder: Path
    """Where relative paths begin."""
    homes: Mapping[str, str]
    """Where the keys of the schema belong, for whoever has put one in the wrong place."""
    problems: dict[str, None]
    """In the order they were met, each once: some values are looked at twice."""
    left: int = MOST
    """How many of those may still be read: a mapping that holds itself twice doubles at every level."""


class Node:
    """A value at its path."""

    __slots__ = ("path", "reading", "value")

    def __init__(self, reading: Reading, path: str, value: Any) -> None:
        self.reading = reading
        self.path = path
        self.value = value

    def wrong(self, text: str) -> None:
        """Note a problem of this value."""
        self.reading.problems[f"{self.path}: {text}" if self.path else text] = None

    def child(self, step: str, value: Any) -> Node:
        return Node(self.reading, f"{self.path}.{step}" if self.path and step[0] != "[" else self.path + step, value)

    def leaf(self, read: Reader[T], default: T) -> T:
        """This value as *read* sees it, its variables replaced; or *default*, and a note of what is wrong."""
        value = self.value
        try:
            value = substitute(value, self.reading.environ)
            return read(value)
        except Wrong as wrong:
            self.wrong(f"{wrong} (from {', '.join(value.names)})" if isinstance(value, Given) else str(wrong))
            return default

    def mapping(self) -> dict[str, Node]:
        """The values of a mapping by key. Nothing at all (a key with an empty block) is an empty mapping."""
        if self.value is None:
            return {}
        if not isinstance(self.value, Mapping):
            self.wrong(f"expected a mapping (`key: value` lines), got {kind(self.value)}")
            return {}
        children = {}
        for key, value in self.value.items():
            if isinstance(key, str) and key:
                children[key] = self.child(name(key), value)
            else:
                self.wrong(f"a key must be text, got {kind(key)}")
        return children

    def fields(self, known: Collection[str]) -> dict[str, Node]:
        """The values of a mapping whose keys are *known*; others are noted, with the nearest known one."""
        children = self.mapping()
        for key in [key for key in children if key not in known]:
            home = self.reading.homes.get(key)
            children.pop(key).wrong(f"unknown key: it belongs under {home}" if home else unknown("key", key, known))
        return children

    def section(self, table: Table) -> dict[str, Any]:
        """The fields of a mapping as *table* reads them. What is absent or wrong is left out."""
        missing, values = object(), {}
        for key, child in self.fields(table).items():
            read = table[key]
            values[key] = child.section(read) if isinstance(read, Mapping) else child.leaf(read, missing)
        return {key: value for key, value in values.items() if value is not missing}

    def each(self) -> list[Node]:
        """The entries of a list; a single value is a list of one."""
        if not is_list(self.value):
            return [self]
        return [self.child(f"[{index}]", value) for index, value in enumerate(self.value)]

    def tree(self, depth: int = 0) -> Any:
        """Whatever JSON can say, as it is, its variables replaced."""
        self.reading.left -= 1
        if depth > DEPTH or self.reading.left < 0:
            # Without the path, so that it is said once; and the rest is not walked.
            problem = f"extra_body or a middleware's settings hold more than {DEPTH} levels or {MOST} values"
            self.reading.problems[problem] = None
            self.reading.left = 0
            return None
        if isinstance(self.value, Mapping):
            children = self.mapping()
            if not all(map(_encodable, children)):
                self.wrong("a key holds half of a surrogate pair, which JSON cannot carry: correct the text")
            return {key: child.tree(depth + 1) for key, child in children.items()}
        if is_list(self.value):
            return [child.tree(depth + 1) for child in self.each()]
        return self.leaf(_plain, None)


# -- variables


def substitute(value: Any, environ: Mapping[str, str]) -> Any:
    """*value*, or if it is text that refers to variables: the :class:`Given` text with their values in place.

    ``${NAME}`` must be set and not empty, ``${NAME:-default}`` need not be, ``$${`` is a plain ``${``.
    """
    if not isinstance(value, str) or "${" not in value:
        return value
    names: list[str] = []

    def replacement(found: re.Match[str]) -> str:
        if found["inside"] is None:
            return "${"
        if not found["closed"]:
            raise Wrong("`${` has no closing brace; a plain `${` is written `$${`")
        reference = _REFERENCE.fullmatch(found["inside"])
        if reference is None:
            raise Wrong("what stands in `${…}` is not a variable's name; a plain `${` is written `$${`")
        variable, default = reference["name"], reference["default"]
        # A key between the braces reads like a variable's name; true ones are in capitals, or short.
        shown = variable if variable.isupper() else name(variable)
        if default is not None and "${" in default:
            raise Wrong(f"the default of {shown} refers to a variable itself: it must be plain text")
        names.append(shown)
        given = environ.get(variable) or default
        if given is None:
            state = "is empty" if variable in environ else "is not set"
            raise Wrong(f"environment variable {shown} {state}: set it, or give a default with ${{{shown}:-default}}")
        return given

    text = _VARIABLE.sub(replacement, value)
    if not names:
        return text
    given = Given(text)
    given.names = tuple(names)
    return given


# -- what may be shown


def kind(value: Any) -> str:
    """What sort of thing *value* is, in the words of YAML: nothing of itself."""
    if value is None:
        return "nothing"
    for types, word in _KINDS:
        if isinstance(value, types):
            return word
    return f"a Python {type(value).__name__}"


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (Given, "text from the environment"),
    (str, "text"),
    (bool, "true or false"),
    ((int, float), "a number"),
    (Mapping, "a mapping"),
    ((list, tuple), "a list"),
)


def seen(value: Any) -> str:
    """*value* itself where that can do no harm, else what sort of thing it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST):
        return str(value)
    if isinstance(value, str) and not isinstance(value, Given) and _HARMLESS.fullmatch(value):
        return f"'{value}'"
    return kind(value)


def name(key: str) -> str:
    """A key as a path shows it: one that could be a secret in the wrong place is hidden."""
    return key if _HARMLESS.fullmatch(key) else "<hidden>"


def unknown(what: str, word: str, known: Collection[str]) -> str:
    """The complaint that *word* is none of *known*, with the nearest of them or all."""
    plain = word.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, known, n=1)
    mend = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown {what} {seen(word)}: {mend}"


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str):
        if not _encodable(value):
            raise Wrong("holds half of a surrogate pair, which JSON cannot carry: correct the text")
        return str(value)
    raise Wrong(f"expected what JSON can say, got {kind(value)}")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
