"""Readers of settings: a value in, what it stands for out, or :class:`~.reading.Wrong` with the mend."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from .reading import LARGEST, Absent, Given, Reader, T, Wrong, kind, seen, unknown
from .settings import Secret

_SECRET_BYTES = 16 * 1024


def nullable(read: Reader[T]) -> Reader[T | None]:
    """A reader that also takes ``null``, for None."""
    return lambda value: None if value is None else read(value)


def one_of(what: str, known: Collection[str]) -> Reader[Any]:
    """A reader of one word of a known list."""

    def read(value: Any) -> str:
        word = text(value)
        if word not in known:
            raise Wrong(unknown(what, value, known))
        return word

    return read


def text(value: Any) -> str:
    """Text on one line that is not blank."""
    if not isinstance(value, str):
        raise Wrong(f"expected text, got {kind(value)}{_quote(value)}")
    if not value.strip():
        raise Wrong("is empty: give a value, or remove the line")
    if not value.isprintable():
        raise Wrong("holds a line break or a control character")
    return str(value)


def flag(value: Any) -> bool:
    """``true`` or ``false``; from a variable also 1, 0, yes, no, on, off."""
    if isinstance(value, Given):
        value = _FLAGS.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise Wrong(f"expected true or false, got {seen(value)}")
    return value


_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def count(value: Any) -> int:
    """A whole number above zero."""
    number = _whole(value)
    if number <= 0:
        raise Wrong(f"must be a whole number above zero, got {seen(number)}")
    return number


def count_or_zero(value: Any) -> int:
    """A whole number, zero included."""
    number = _whole(value)
    if number < 0:
        raise Wrong(f"must not be negative, got {seen(number)}")
    return number


def limit(value: Any) -> int:
    """What a rate limit allows: a whole number above zero."""
    number = _whole(value)
    if number == 0:
        raise Wrong("0 would block every call for ever: write null, or remove the line, for no limit")
    if number < 0:
        raise Wrong(f"a limit must be above zero, got {seen(number)}")
    return number


def seconds(value: Any) -> float:
    """A time in seconds, above zero."""
    number = seconds_or_zero(value)
    if number == 0:
        raise Wrong("must be a number of seconds above zero, got 0")
    return number


def seconds_or_zero(value: Any) -> float:
    """A time in seconds."""
    number = _number(value, "a number of seconds")
    if number < 0:
        raise Wrong(f"must not be negative, got {seen(number)}")
    return float(number)


def weight(value: Any) -> float:
    """A share, in proportion to the other shares: a number above zero."""
    number = _number(value, "a number")
    if number <= 0:
        raise Wrong(f"must be a number above zero, got {seen(number)}")
    return float(number)


def share(value: Any) -> float:
    """A share of a whole: a number from 0 to 1, or per cent as in ``5 %``."""
    percent = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%", value) if isinstance(value, str) else None
    number = float(percent[1]) / 100 if percent is not None else _number(value, "a number from 0 to 1, or per cent")
    if not 0 <= number <= 1:
        raise Wrong(f"must be from 0 to 1, got {seen(number)}")
    return float(number)


def p95_or_seconds(value: Any) -> str | float:
    """The word ``p95``, or a time in seconds above zero."""
    if value == "p95":
        return "p95"
    try:
        return seconds(value)
    except Wrong:
        raise Wrong(f"expected `p95` or a number of seconds above zero, got {seen(value)}") from None


def amount(value: Any) -> float:
    """A number that is not negative."""
    number = _number(value, "a number")
    if number < 0:
        raise Wrong(f"must not be negative, got {seen(number)}")
    return float(number)


def _number(value: Any, what: str) -> float:
    number = _bare(value, r"[+-]?([0-9]{1,15}(\.[0-9]*)?|\.[0-9]+)", float)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= LARGEST:
        raise Wrong(f"expected {what}, got {seen(value)}{_unquote(value)}")
    return number


def _whole(value: Any) -> int:
    number = _bare(value, r"[+-]?[0-9]{1,15}", int)
    if isinstance(number, bool) or not isinstance(number, int):
        raise Wrong(f"expected a whole number, got {seen(value)}{_unquote(value)}")
    if abs(number) > LARGEST:
        raise Wrong(f"must be a whole number up to {LARGEST}, got a larger one")
    return number


def _bare(value: Any, pattern: str, convert: Callable[[str], float]) -> Any:
    # Variables are always text; what a person wrote in quotes was meant to be text.
    return convert(value) if isinstance(value, Given) and re.fullmatch(pattern, value.strip()) else value


def _quote(value: Any) -> str:
    return ": put it in quotes" if isinstance(value, (int, float)) else ""


def _unquote(value: Any) -> str:
    return ": remove the quotes" if isinstance(value, str) and re.fullmatch(r"[0-9.]+", value) else ""


def url(value: Any) -> str:
    """An http or https URL with a host, without a trailing slash. It is never shown: it may hold a password."""
    address = text(value)
    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or any(character.isspace() for character in address):
        raise Wrong("expected a URL such as https://host/path")
    return address.rstrip("/")


def proxy(value: Any) -> str:
    """A proxy's URL, ``environment`` or ``none``."""
    if isinstance(value, str) and value in ("environment", "none"):
        return str(value)
    try:
        return url(value)
    except Wrong as wrong:
        raise Wrong(f"{wrong}, `environment` or `none`") from None


def base_url(value: Any) -> str:
    """A URL to which paths are appended."""
    address = url(value)
    parts = urlsplit(address)
    if "@" in parts.netloc:
        raise Wrong("must not hold a user name or password: send credentials in api_keys or extra_headers")
    if "?" in address or "#" in address:
        raise Wrong("must end with its path: `?…` and `#…` cannot be kept when paths are appended")
    return address


def header(value: Any) -> str:
    """A header's value: visible characters, spaces and tabs. It may be empty, and is never shown."""
    if not isinstance(value, str):
        raise Wrong(f"expected text, got {kind(value)}{_quote(value)}")
    if not value.replace("\t", " ").isprintable():
        raise Wrong("holds a line break or a control character, which a header cannot carry")
    return str(value)


# -- files


class Content(NamedTuple):
    text: str
    mode: int
    """Permission bits."""


def content(path: Path, largest: int) -> Content:
    """A file's text, in UTF-8, of at most *largest* bytes. Raises :class:`Wrong`, :class:`Absent` if there is none."""
    try:
        # Opened without waiting: a pipe that nobody writes to would hold the program up for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise Wrong("is not a regular file")
            data = file.read(largest + 1)
        if len(data) > largest:
            raise Wrong(f"is larger than {largest} bytes")
        return Content(data.decode("utf-8-sig"), mode)
    except FileNotFoundError:
        raise Absent("does not exist") from None
    except UnicodeDecodeError:
        complaint = "is not text in UTF-8"
    except OSError as error:
        complaint = f"cannot be read: {os.strerror(error.errno).lower() if error.errno else 'input/output error'}"
    except UnicodeEncodeError:
        complaint = "cannot be read: its path holds half of a surrogate pair"
    except ValueError:
        complaint = "cannot be read: its path holds a null character"
    raise Wrong(complaint)


def file_under(folder: Path) -> Reader[str]:
    """A reader of a file's path, which may be relative to *folder*. The file must be there."""

    def read(value: Any) -> str:
        path = folder / text(value)
        try:
            found = path.is_file()
        except (OSError, ValueError):
            found = False
        if not found:
            raise Wrong("names a file that does not exist or cannot be reached")
        return str(path)

    return read


def secret_under(folder: Path) -> Reader[Secret]:
    """A reader of an API key: the key, or ``file:PATH`` for the one that a file holds (relative to *folder*)."""

    def read(value: Any) -> Secret:
        if not isinstance(value, str):
            raise Wrong(f"expected an API key as text, got {kind(value)}{_quote(value)}")
        key, what = value.strip(), "the API key"
        if key.startswith("file:"):
            what = "the file that should hold the API key"
            try:
                key = content(folder / key.removeprefix("file:"), _SECRET_BYTES).text.strip()
            except Wrong as wrong:
                raise Wrong(f"{what} {wrong}") from None
        if not key:
            raise Wrong(f"{what} is empty")
        if not re.fullmatch(r"[!-~]+", key):
            raise Wrong(f"{what} holds white space or a character that a header cannot carry")
        return Secret(str(key))

    return read


def is_literal(value: Any) -> bool:
    """Whether an entry of ``api_keys`` is the key itself."""
    return isinstance(value, str) and "${" not in value and not value.strip().startswith("file:")
