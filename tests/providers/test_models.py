"""The data about models, and the one rule for what a model refuses."""

from typing import Any

import msgspec
import pytest

from llm.core.exceptions import LLMInvalidRequestError
from llm.core.types import Counting, Options, Priority
from llm.providers.catalog import HINTS, PLAIN, Vendor, asked, catalog, leave_out
from llm.providers.quota import Groups
from tests.providers.corpus import DIALECTS, Case, provider, settings

VENDORS = [pytest.param(catalog().anthropic, id="anthropic"), pytest.param(catalog().openai, id="openai")]


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_last_family_takes_every_model(vendor: Vendor) -> None:
    assert vendor.families[-1].models == ("*",)
    assert vendor.family("a model of next year") == vendor.families[-1]


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_default_and_a_successor_are_models_that_stay(vendor: Vendor) -> None:
    for model in (vendor.default, *(row.use for row in vendor.retired.values())):
        assert vendor.retirement(model) is None, model


@pytest.mark.parametrize("vendor", VENDORS)
def test_what_a_family_refuses_are_options(vendor: Vendor) -> None:
    for family in vendor.families:
        assert family.refuses <= set(Options.__struct_fields__)
        assert (family.free_at_effort is None) == (family.default_effort is None)


@pytest.mark.parametrize(
    ("model", "successor"),
    [
        ("claude-3-5-haiku-20241022", "claude-haiku-5-5"),
        ("claude-3-5-sonnet-20241022", "claude-sonnet-5-5"),
        ("claude-3-opus-20240229", "claude-opus-5-5"),
        ("claude-sonnet-4-20250514", "claude-sonnet-5-5"),
        ("claude-opus-4-1-20250805", "claude-opus-5-5"),
        # It goes eight days after the file was checked.
        ("claude-sonnet-4-5", None),
        ("claude-sonnet-4-6", None),
        ("claude-sonnet-5-5", None),
        ("claude-haiku-4-5-20251001", None),
        ("unheard-of", None),
    ],
)
def test_a_retired_claude_has_a_successor(model: str, successor: str | None) -> None:
    assert provider("anthropic").replacement(model) == successor


@pytest.mark.parametrize(
    ("model", "successor"),
    [
        ("gpt-4", "gpt-6.1-sol"),
        ("gpt-3.5-turbo", "gpt-6-luna"),
        ("o1", "gpt-6.1-sol"),
        ("o4-mini", "gpt-6.1-terra"),
        ("gpt-4o-2024-05-13", "gpt-6.1-sol"),
        # They go later.
        ("gpt-4o", None),
        ("gpt-4o-mini", None),
        ("gpt-5", None),
        ("o3", None),
        ("gpt-6.1-sol", None),
        ("gpt-5.5", None),
    ],
)
def test_a_retired_gpt_has_a_successor(model: str, successor: str | None) -> None:
    assert provider("openai").replacement(model) == successor


@pytest.mark.parametrize("name", DIALECTS)
def test_nothing_is_known_of_a_model_under_a_custom_address(name: str) -> None:
    dialect = provider(name, {"settings": {"base_url": "http://127.0.0.1:8000"}})
    assert dialect.replacement("claude-3-opus-20240229") is None
    assert dialect.replacement("gpt-4") is None


@pytest.mark.parametrize(
    ("model", "refuses", "most"),
    [
        ("claude-3-5-haiku-20241022", set(), 4096),
        ("claude-opus-4-1", set(), 32000),
        ("claude-haiku-4-5", set(), 64000),
        ("claude-sonnet-4-5-20250929", set(), 64000),
        ("claude-opus-4-6", set(), 64000),
        ("claude-opus-4-7", {"temperature", "top_p", "top_k"}, 128000),
        ("claude-sonnet-5-5", {"temperature", "top_p", "top_k"}, 128000),
        ("claude-haiku-5-5", {"temperature", "top_p", "top_k"}, 128000),
    ],
)
def test_a_claude_has_the_rules_of_its_family(model: str, refuses: set[str], most: int) -> None:
    family = catalog().anthropic.family(model)
    assert (set(family.refuses), family.max_output) == (refuses, most)


@pytest.mark.parametrize(
    ("model", "system_turns"),
    [
        ("claude-fable-5", True),
        ("claude-mythos-5", True),
        ("claude-opus-4-8", True),
        ("claude-opus-5", True),
        ("claude-opus-5-5", True),
        ("claude-opus-4-7", False),
        ("claude-sonnet-5", False),
        ("claude-haiku-4-5", False),
    ],
)
def test_some_claudes_take_system_messages_anywhere(model: str, system_turns: bool) -> None:
    assert catalog().anthropic.family(model).system_turns is system_turns


SAMPLING = {"temperature", "top_p", "frequency_penalty", "presence_penalty"}


@pytest.mark.parametrize(
    ("model", "refuses", "field", "role"),
    [
        ("gpt-4o", set(), "max_tokens", "system"),
        ("gpt-4.1-mini", set(), "max_tokens", "system"),
        ("o3", SAMPLING | {"stop"}, "max_completion_tokens", "developer"),
        ("o3-mini", SAMPLING | {"stop"}, "max_completion_tokens", "developer"),
        ("o4-mini", SAMPLING | {"stop"}, "max_completion_tokens", "developer"),
        ("o1", SAMPLING, "max_completion_tokens", "developer"),
        ("gpt-5", SAMPLING, "max_completion_tokens", "developer"),
        ("gpt-5-mini", SAMPLING, "max_completion_tokens", "developer"),
        ("gpt-5.2-pro", SAMPLING, "max_completion_tokens", "developer"),
        ("gpt-5.3-chat-latest", SAMPLING, "max_completion_tokens", "developer"),
        ("gpt-6-astra", SAMPLING | {"stop"}, "max_completion_tokens", "developer"),
        ("gpt-6.2-sol", SAMPLING | {"stop"}, "max_completion_tokens", "developer"),
    ],
)
def test_a_gpt_has_the_rules_of_its_family(model: str, refuses: set[str], field: str, role: str) -> None:
    family = catalog().openai.family(model)
    assert (set(family.refuses), family.token_field, family.system_role) == (refuses, field, role)
    assert family.free_at_effort is None


@pytest.mark.parametrize(
    ("model", "effort"), [("gpt-5.1", "none"), ("gpt-5.2", "none"), ("gpt-5.4-mini", "none"), ("gpt-5.5", "medium")]
)
def test_some_gpts_refuse_nothing_while_they_do_not_reason(model: str, effort: str) -> None:
    family = catalog().openai.family(model)
    assert (family.free_at_effort, family.default_effort) == ("none", effort)


# ---------------------------------------------------------------------------------------------------- shared limits


@pytest.mark.parametrize(
    ("name", "group", "models"),
    [
        ("anthropic", "claude-opus-4.x", "claude-opus-4 claude-opus-4-1 claude-opus-4-5-20251101 claude-opus-4-8"),
        ("anthropic", "claude-sonnet-4.x", "claude-sonnet-4-20250514 claude-sonnet-4-5 claude-sonnet-4-6"),
        ("anthropic", "claude-haiku-4-5", "claude-haiku-4-5 claude-haiku-4-5-20251001"),
        ("anthropic", "claude-3-5-haiku", "claude-3-5-haiku-20241022 claude-3-5-haiku-latest"),
        ("anthropic", "claude-opus-5", "claude-opus-5"),
        ("anthropic", "claude-opus-5-5", "claude-opus-5-5"),
        ("anthropic", "claude-opus-40", "claude-opus-40"),
        ("openai", "gpt-5.5", "gpt-5.5 gpt-5.5-2026-04-23"),
        ("openai", "gpt-4o", "gpt-4o gpt-4o-2024-05-13 gpt-4o-2024-08-06"),
        ("openai", "gpt-4o-mini", "gpt-4o-mini gpt-4o-mini-2024-07-18"),
        ("openai", "gpt-6.1-sol", "gpt-6.1-sol"),
        ("openai", "gpt-5.5-2026-04-23-pro", "gpt-5.5-2026-04-23-pro"),
        ("openai", "", ""),
    ],
)
def test_models_that_share_a_limit_are_one_group(name: str, group: str, models: str) -> None:
    dialect = provider(name)
    assert {dialect.group(model) for model in models.split(" ")} == {group}


@pytest.mark.parametrize("name", DIALECTS)
def test_what_is_configured_comes_before_what_is_known(name: str) -> None:
    groups = {"mine": ["claude-opus-4-8", "gpt-4o-*"], "rest": ["claude-opus-*"]}
    for address in (None, "http://127.0.0.1:8000"):
        dialect = provider(name, {"settings": {"model_groups": groups, "base_url": address}})
        assert [dialect.group(model) for model in ("gpt-4o-2024-08-06", "claude-opus-4-8")] == ["mine", "mine"]
        assert dialect.group("claude-opus-4-5") == "rest"
        assert dialect.group("gpt-4") == ("gpt-4" if address is None else "*")


@pytest.mark.parametrize("name", DIALECTS)
def test_all_models_share_a_limit_under_a_custom_address(name: str) -> None:
    dialect = provider(name, {"settings": {"base_url": "http://127.0.0.1:8000"}})
    for model in ("claude-opus-4-8", "claude-haiku-4-5-20251001", "gpt-4o-2024-08-06"):
        assert dialect.group(model) == "*"


@pytest.mark.parametrize("name", DIALECTS)
def test_groups_of_models_without_end_do_not_fill_the_memory(name: str) -> None:
    groups = Groups(settings(name), catalog().openai)
    assert [groups[f"m{i}-2026-04-23"] for i in range(1000)] == [f"m{i}" for i in range(1000)]
    assert len(groups) == 1000 % 256


def test_the_vendors_count_differently() -> None:
    anthropic, openai = provider("anthropic").counting, provider("openai").counting
    assert (anthropic.reserve_max, anthropic.cache_reads, anthropic.rejected) == (False, False, True)
    assert openai == Counting(reserve_max=True, cache_reads=True, rejected=True)


def test_cache_reads_count_for_some_models_of_a_vendor_for_which_they_do_not() -> None:
    dialect = provider("anthropic")
    counted = {
        model: dialect.counting.counts_cache_reads(dialect.group(model))
        for model in ("claude-3-5-haiku-20241022", "claude-haiku-4-5", "claude-opus-5-5")
    }
    assert counted == {"claude-3-5-haiku-20241022": True, "claude-haiku-4-5": False, "claude-opus-5-5": False}
    assert provider("openai").counting.counts_cache_reads("gpt-5.5")


@pytest.mark.parametrize("vendor", VENDORS)
def test_groups_that_count_cache_reads_are_groups(vendor: Vendor) -> None:
    for group in vendor.cache_reads_of:
        assert group in vendor.groups or vendor.group(group) == group


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize(
    ("said", "changed"),
    [
        ({}, {}),
        ({"model": "reserve_max"}, {"reserve_max": True}),
        ({"model": "actual_as_produced"}, {"reserve_max": False}),
        ({"cache_reads": True}, {"cache_reads": True, "cache_reads_of": frozenset()}),
        ({"cache_reads": False}, {"cache_reads": False, "cache_reads_of": frozenset()}),
        ({"rejected": False}, {"rejected": False}),
    ],
)
def test_what_is_said_of_a_vendors_counting_is_believed(name: str, said: Case, changed: Case) -> None:
    found = provider(name, {"settings": {"counting": said}}).counting
    assert found == msgspec.structs.replace(provider(name).counting, **changed)


@pytest.mark.parametrize("name", DIALECTS)
def test_a_custom_address_counts_as_the_dialects_vendor_does(name: str) -> None:
    """For want of a better guess; the models that the vendor excepts are not known there."""
    found = provider(name, {"settings": {"base_url": "http://127.0.0.1:8000"}}).counting
    assert found == msgspec.structs.replace(provider(name).counting, cache_reads_of=frozenset())


# ---------------------------------------------------------------------------------------------------- the rule


def leave(refused: set[str], *, strict: bool = False, **options: Any) -> tuple[dict[str, object], tuple[str, ...]]:
    wishes = asked(Options(**options))
    return wishes, leave_out(wishes, frozenset(refused), strict=strict, provider="p", model="m")


def test_what_was_not_said_is_not_asked() -> None:
    assert asked(Options(timeout=3, max_tokens=5, unsupported="raise", extra_body={"a": 1})) == {}
    assert asked(Options(priority=Priority.HIGH, tenant="a", tag="b")) == {}
    assert asked(Options(stop=())) == {}
    assert asked(Options(stop="")) == {}
    assert asked(Options(temperature=0.0, seed=0)) == {"temperature": 0.0, "seed": 0}


def test_what_is_not_refused_is_asked() -> None:
    assert leave({"top_k"}, temperature=0.5, stop=("a",)) == ({"temperature": 0.5, "stop": ("a",)}, ())


@pytest.mark.parametrize("hint", sorted(HINTS))
def test_a_refused_hint_is_left_out_and_named(hint: str) -> None:
    said: dict[str, Any] = {hint: 0.3}
    assert leave({hint}, **said) == ({}, (hint,))


@pytest.mark.parametrize("hint", sorted(HINTS))
def test_a_refused_hint_is_an_error_to_who_wants_one(hint: str) -> None:
    said: dict[str, Any] = {hint: 0.3}
    with pytest.raises(LLMInvalidRequestError, match=rf"{hint}=0.3: m does not take it") as caught:
        leave({hint}, strict=True, **said)
    assert (caught.value.provider, caught.value.model, caught.value.sent) == ("p", "m", False)


@pytest.mark.parametrize(("option", "value"), [("stop", "END"), ("stop", ("END",)), ("n", 2)])
def test_what_changes_the_question_is_an_error_to_everybody(option: str, value: object) -> None:
    said: dict[str, Any] = {option: value}
    with pytest.raises(LLMInvalidRequestError, match=option):
        leave({option}, **said)


@pytest.mark.parametrize(("option", "value"), PLAIN.items())
def test_what_happens_unasked_is_missed_by_nobody(option: str, value: object) -> None:
    said: dict[str, Any] = {option: value}
    assert leave({option}, strict=True, **said) == ({}, ())
