"""Numbers and times as vendors write them in headers, read without a clock.

A date means something only beside another date by the same hand: it is compared with the response's own ``Date``
header, never with our wall clock, which may be wrong by hours. What cannot be read is None.
"""

from __future__ import annotations

import calendar
import math
import re
from datetime import datetime
from functools import lru_cache
from typing import Final

from ..core.types import Headers

_DURATION: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h|d)")
_UNIT: Final = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
# RFC 9110 §5.6.7: the preferred form, RFC 850's, and asctime's.
_HTTP_DATE: Final = re.compile(
    r"\w+, (?P<d1>\d\d)[ -](?P<b1>\w{3})[ -](?P<y1>\d{4}|\d\d) (?P<t1>\d\d:\d\d:\d\d) GMT"
    r"|\w{3} (?P<b2>\w{3}) (?P<d2>[ \d]\d) (?P<t2>\d\d:\d\d:\d\d) (?P<y2>\d{4})",
    re.ASCII,
)
_MONTH: Final = {name: number for number, name in enumerate(calendar.month_abbr) if name}


def number(text: str | None) -> float | None:
    """A finite number of at least 0, else None."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def whole_number(text: str | None) -> int | None:
    """A whole number of at least 0, else None (Azure has been seen to send ``-1``)."""
    try:
        value = int(text) if text else -1
    except ValueError:
        return None
    return value if value >= 0 else None


def go_duration(text: str | None) -> float | None:
    """Seconds of a duration as Go prints it (``12ms``, ``6m0s``); a bare number is seconds (Azure)."""
    if not text:
        return None
    total, end = 0.0, 0
    for match in _DURATION.finditer(text):
        if match.start() != end:
            return None
        total += float(match[1]) * _UNIT[match[2]]
        end = match.end()
    if not end:
        return number(text)
    return total if end == len(text) and total < math.inf else None


@lru_cache(maxsize=256)
def rfc3339(text: str | None) -> float | None:
    """Seconds since 1970 of a timestamp such as ``2026-11-22T10:00:00Z``; without an offset it is no instant.

    Cached, like ``http_date``: the headers of neighbouring responses name the same seconds.
    """
    if not text:
        return None
    try:
        instant = datetime.fromisoformat(text)
        return instant.timestamp() if instant.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


@lru_cache(maxsize=64)
def http_date(text: str | None) -> float | None:
    """Seconds since 1970 of an HTTP date in any of its three forms."""
    match = _HTTP_DATE.fullmatch(text.strip()) if text else None
    if match is None:
        return None
    day, name, year, clock = match.group(*(("d1", "b1", "y1", "t1") if match["d1"] else ("d2", "b2", "y2", "t2")))
    month = _MONTH.get(name)
    # RFC 850 has two digits for the year; a vendor's date is of our time.
    years = int(year) + (2000 if len(year) == 2 else 0)
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    if month is None or years < 1970 or hours > 23 or minutes > 59:
        return None
    if not 1 <= int(day) <= calendar.monthrange(years, month)[1]:
        return None
    return float(calendar.timegm((years, month, int(day), hours, minutes, seconds)))


def retry_after(headers: Headers) -> float | None:
    """Seconds to wait by ``retry-after-ms`` or ``retry-after`` (a number, or a date relative to ``Date``).

    Negative, past and unreadable values are None; a day stays a day: whoever retries decides what is too long.
    """
    milliseconds = number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if text is None:
        return None
    seconds = number(text)
    if seconds is not None:
        return seconds
    then, now = http_date(text), http_date(headers.get("date"))
    return then - now if then is not None and now is not None and then >= now else None
