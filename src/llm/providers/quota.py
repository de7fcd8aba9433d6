"""Whose limit a call uses up, and how: the models that share one, and what the vendor counts."""

from __future__ import annotations

from ..core.settings import CountingSettings, ProviderSettings
from ..core.types import Counting
from .catalog import Vendor


class Groups(dict[str, str]):
    """The group of each model, learnt when it is first looked up.

    What is configured comes first, then what is known of the vendor; a model of which neither speaks is its own group.
    """

    __slots__ = ("_settings", "_vendor")

    def __init__(self, settings: ProviderSettings, vendor: Vendor) -> None:
        super().__init__()
        self._settings = settings
        self._vendor = vendor

    def __missing__(self, model: str) -> str:
        group = self._settings.group(model)
        if group is None:
            # Of what stands behind another address nothing is known.
            group = model if self._settings.custom else self._vendor.group(model)
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
