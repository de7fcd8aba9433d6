"""What each model family accepts, and when models retire: the typed view of ``models.toml``."""

from __future__ import annotations

import re
import tomllib
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Final

import msgspec

from ..core.exceptions import LLMInvalidRequestError
from ..core.types import Options

HINTS: Final = frozenset(("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed"))
"""Options that colour an answer. A model that refuses one is asked without it; everything else changes the question."""

PLAIN: Final[dict[str, object]] = {
    "temperature": 1,
    "top_p": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "n": 1,
}
"""What every vendor does unasked: leaving one of these out changes nothing, so nobody is told."""

_NOT_ASKED_OF_THE_MODEL: Final = frozenset(
    ("max_tokens", "timeout", "unsupported", "extra_body", "extra_headers", "priority", "tenant", "tag")
)


class Family(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rules of the models whose names fit one of *models*; ``models.toml`` explains each."""

    models: tuple[str, ...] = ("*",)
    refuses: frozenset[str] = frozenset()
    free_at_effort: str | None = None
    default_effort: str | None = None
    temperature_or_top_p: bool = False
    max_output: int | None = None
    token_field: str = "max_completion_tokens"
    system_role: str = "developer"
    system_turns: bool = False
    prefill: bool = False


class Retirement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The day a model went or will go, and its successor."""

    on: date
    use: str


class Vendor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One vendor's models."""

    default: str
    """What is asked for when neither call nor key names a model."""
    families: tuple[Family, ...]
    retired: dict[str, Retirement]
    snapshot: str
    """Regular expression for what the name of a dated snapshot adds to its model's."""
    groups: dict[str, tuple[str, ...]] = {}
    """Models that share one limit, beyond a model and its snapshots: patterns by the group's name."""
    cache_reads_of: frozenset[str] = frozenset()
    """Groups whose limit counts input from a prompt cache although the vendor's others do not."""

    def family(self, model: str) -> Family:
        """The rules for *model*: the first family that fits; of an unknown name, the newest one's."""
        return next((family for family in self.families if _fits(model, family.models)), self.families[-1])

    def group(self, model: str) -> str:
        """The models that share one limit with *model*: the first group that fits, or the model without its date."""
        fits = (name for name, patterns in self.groups.items() if _fits(model, patterns))
        return next(fits, None) or re.sub(rf"(?:{self.snapshot})\Z", "", model)

    def retirement(self, model: str) -> Retirement | None:
        """When *model* goes, None if no date is known; the past and the future alike."""
        return self.retired.get(model) or next(
            (row for name, row in self.retired.items() if _fits(model, (name,))), None
        )


class Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    as_of: date
    """The day the file was checked: what was to retire by then has retired."""
    anthropic: Vendor
    openai: Vendor


@cache
def catalog() -> Catalog:
    """``models.toml``, read when the first provider is made."""
    text = files(__package__).joinpath("models.toml").read_text("utf-8")
    return msgspec.convert(tomllib.loads(text), Catalog)


def asked(options: Options) -> dict[str, object]:
    """What *options* ask of the model by name, without ``max_tokens``, which each dialect treats in its own way."""
    said = msgspec.structs.asdict(options)
    wishes = {name: value for name, value in said.items() if value is not None and name not in _NOT_ASKED_OF_THE_MODEL}
    if not options.stop:
        # No stop sequences are no wish.
        wishes.pop("stop", None)
    return wishes


def leave_out(
    wishes: dict[str, object], refused: frozenset[str], *, strict: bool, provider: str, model: str
) -> tuple[str, ...]:
    """Take what is *refused* out of *wishes* and name it.

    Raises LLMInvalidRequestError for what is no mere hint, and for hints as well if *strict*.
    """
    dropped = []
    for name in [name for name in wishes if name in refused]:
        value = wishes.pop(name)
        if name in PLAIN and value == PLAIN[name]:
            continue
        if strict or name not in HINTS:
            raise LLMInvalidRequestError(
                f"{name}={value!r}: {model} does not take it; leave {name} out or choose another model",
                provider=provider,
                model=model,
            )
        dropped.append(name)
    return tuple(dropped)


def _fits(model: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in patterns)
