"""What each model family accepts, and when models retire: the typed view of ``models.toml``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Final, Literal

import msgspec

from ..core.exceptions import LLMInvalidRequestError
from ..core.settings import ProviderSettings
from ..core.types import Options, OutputFormat

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
    (
        *("max_tokens", "timeout", "unsupported", "extra_body", "extra_headers", "priority", "tenant", "tag"),
        *("fallback", "on_interrupt"),
    )
)
RICH: Final = frozenset(("tools", "tool_choice", "parallel_tool_calls", "reasoning", "output_format", "cache"))
"""Options for which each dialect has a shape of its own."""

_SCALARS: Final = frozenset(Options.__struct_fields__) - _NOT_ASKED_OF_THE_MODEL - RICH

EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""How hard a model thinks, from not at all on."""


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
    thinking: tuple[str, ...] = ()
    efforts: tuple[str, ...] = ()
    responses_efforts: tuple[str, ...] = ()
    forced_tools: bool = True
    chat_tools: Literal["always", "at_no_effort", "never"] = "always"
    formats: Literal["native", "tool", "prompt"] = "native"
    cache_marks: bool = False


ANYTHING: Final = Family(
    token_field="max_tokens",
    system_role="system",
    prefill=True,
    thinking=("adaptive", "enabled", "disabled"),
    efforts=EFFORTS,
)
"""The rules for a model of which nothing is known, behind an address that is not the vendor's: nothing is refused, and
the words are those that all compatible servers understand."""


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
    wishes = {name: value for name, value in said.items() if value is not None and name in _SCALARS}
    if not options.stop:
        # No stop sequences are no wish.
        wishes.pop("stop", None)
    return wishes


class Refuse:
    """Makes the error for what the model is known to refuse."""

    __slots__ = ("_model", "_provider")

    def __init__(self, provider: str, model: str) -> None:
        self._provider = provider
        self._model = model

    def __call__(self, option: str, value: object, reason: str) -> LLMInvalidRequestError:
        return LLMInvalidRequestError(
            f"{option}={value!r}: {self._model} does not take it: {reason}", provider=self._provider, model=self._model
        )


def rules_for(model: str, settings: ProviderSettings, vendor: Vendor) -> Family:
    """What *model* accepts: by the configuration, else by the table, or nothing under a custom address."""
    family = ANYTHING if settings.custom else vendor.family(model)
    said = settings.rules(model)
    if said is None:
        return family
    given = {name: value for name in said.__struct_fields__ if (value := getattr(said, name)) is not None}
    return msgspec.structs.replace(family, **given)


def effort_for(wish: str, known: Sequence[str]) -> str:
    """The word among *known* for *wish*: the same, else the next lower one, else the lowest of all."""
    known = sorted((word for word in known if word != "none"), key=EFFORTS.index)
    lower = [word for word in known if EFFORTS.index(word) <= EFFORTS.index(wish)]
    return lower[-1] if lower else known[0]


def in_words(wanted: OutputFormat) -> str:
    """What a model is told that has neither formats nor tools."""
    schema = msgspec.json.encode(wanted.schema).decode()
    return f"Answer with JSON alone, without any words around it. It must fit this JSON schema:\n{schema}"


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
