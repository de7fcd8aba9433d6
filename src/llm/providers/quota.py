"""Whose limit a call uses up, and how: the models that share one, what the vendor counts, and what its headers tell.

The readers of headers run for every answer, and their caches serve the words that neighbouring answers repeat: limits,
remainders that are rounded to thousands, the same second, the same owner. All of them are bounded, and none raises.
"""

from __future__ import annotations

from functools import lru_cache

from ..core.settings import CountingSettings, ProviderSettings
from ..core.types import Counting
from ..utils.header_values import go_duration, http_date, rfc3339, whole_number
from .catalog import Vendor

EVERY = "*"
"""The group of all models."""
_LARGEST = 10**15
"""Above it a limit is none, and arithmetic with floats would go wrong."""


class Groups(dict[str, str]):
    """The group of each model, learnt when it is first looked up.

    What is configured comes first, then what is known of the vendor; a model of which neither speaks is its own group.
    Under another address than the vendor's all models are one.
    """

    __slots__ = ("_settings", "_vendor")

    def __init__(self, settings: ProviderSettings, vendor: Vendor) -> None:
        super().__init__()
        self._settings = settings
        self._vendor = vendor

    def __missing__(self, model: str) -> str:
        group = self._settings.group(model)
        if group is None:
            # Of what stands behind another address nothing is known: the key's limits are taken to be for all it does.
            group = EVERY if self._settings.custom else self._vendor.group(model)
        if len(self) >= 256:
            # Names may come from the application's own users.
            self.clear()
        self[model] = group
        return group


def merged(vendors: Counting, said: CountingSettings) -> Counting:
    """How the vendor counts by what is *said* of it, and where nothing is, by what is known of it."""
    return Counting(
        reserve_max=vendors.reserve_max if said.model is None else said.model == "reserve_max",
        cache_reads=vendors.cache_reads if said.cache_reads is None else said.cache_reads,
        rejected=vendors.rejected if said.rejected is None else said.rejected,
        cache_reads_of=vendors.cache_reads_of if said.cache_reads is None else frozenset(),
    )


@lru_cache(maxsize=1024)
def count(text: str | None) -> int | None:
    """A limit or what remains of it, None if there is no such number."""
    found = whole_number(text)
    return found if found is not None and found <= _LARGEST else None


@lru_cache(maxsize=256)
def seconds_until(instant: str | None, date: str | None) -> float | None:
    """Seconds from an HTTP *date* until the *instant* of an RFC 3339 timestamp, 0 if it has passed."""
    then, now = rfc3339(instant), http_date(date)
    return max(0.0, then - now) if then is not None and now is not None else None


@lru_cache(maxsize=256)
def seconds(duration: str | None) -> float | None:
    """Seconds of a duration as Go prints it."""
    return go_duration(duration)


@lru_cache(maxsize=256)
def owners(organization: str | None, workspace: str | None, project: str | None) -> tuple[str, ...]:
    """Those of a key's owners that an answer names, in the vendors' words: ``organization org-1``."""
    given = (("organization", organization), ("workspace", workspace), ("project", project))
    named = ((what, name.strip()) for what, name in given if name is not None)
    # They are shown to people, and a server may send anything.
    return tuple(f"{what} {name}" for what, name in named if 0 < len(name) <= 128 and name.isprintable())
