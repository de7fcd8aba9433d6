"""Configuration in, settings out; and whatever is wrong in one error, which never holds a secret."""

import os
import re
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.core import config
from llm.core.exceptions import LLMConfigurationError
from llm.core.reading import Table
from llm.core.settings import (
    CountingSettings,
    LimitSettings,
    LLMSettings,
    LoggingSettings,
    MetricsSettings,
    PoolSettings,
    RateLimiterSettings,
    RetrySettings,
    TimeoutSettings,
    TransportSettings,
    Weights,
)
from llm.core.types import Target

KEY = "sk-ant-api03-planted-0123456789abcdefghijklmnopqrstuvwxyz"
ROOT = Path(__file__).parents[2]


def load(source: Any, environ: Mapping[str, str] | None = None, **known: Any) -> LLMSettings:
    return config.load(source, environ=environ or {}, warn=unexpected, **known)


def unexpected(warning: str) -> None:
    raise AssertionError(warning)


def refusal(source: Any, environ: Mapping[str, str] | None = None) -> str:
    """The message that *source* is refused with."""
    with pytest.raises(LLMConfigurationError) as refused:
        load(source, environ)
    assert KEY not in repr(refused.value) + str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None
    return str(refused.value)


Write: TypeAlias = Callable[..., Path]


def provider(**settings: Any) -> dict[str, Any]:
    return {"providers": {"openai": {"api_keys": [KEY], **settings}}}


def shared(**settings: Any) -> dict[str, Any]:
    """Two keys of one quota pool."""
    return provider(**{"api_keys": ["a", "b"], "quota_pools": "org", **settings})


def limiter(**settings: Any) -> dict[str, Any]:
    return {**provider(), "middleware": {"rate_limiter": settings}}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes, mode: int = 0o600) -> Path:
        path = tmp_path / "llm.yaml"
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        path.chmod(mode)
        return path

    return write


# -- what is read

DESCRIBED = """\
providers:
  anthropic:
    api_keys:
      - key1
      - key2
      - key3
    models:
      - claude-3-5-haiku-20241022
      - claude-3-5-sonnet-20241022
      - claude-3-opus-20240229
    rate_limits:
      - requests_per_minute: 50
        input_tokens_per_minute: 50000
        output_tokens_per_minute: 10000
"""
FRAGMENT = """\
rate_limits:
  requests_per_minute: 50
  input_tokens_per_minute: 50000
  output_tokens_per_minute: 10000
"""
LIMITS = LimitSettings(requests_per_minute=50, input_tokens_per_minute=50_000, output_tokens_per_minute=10_000)


def test_three_keys_with_three_models_share_one_entry_of_limits(write: Write) -> None:
    anthropic = load(write(DESCRIBED)).providers["anthropic"]

    assert [(key.number, key.secret.reveal(), key.model, key.limits) for key in anthropic.keys] == [
        (1, "key1", "claude-3-5-haiku-20241022", LIMITS),
        (2, "key2", "claude-3-5-sonnet-20241022", LIMITS),
        (3, "key3", "claude-3-opus-20240229", LIMITS),
    ]


def test_limits_may_be_one_mapping() -> None:
    openai = load(provider(api_keys=["a", "b"], **yaml.safe_load(FRAGMENT))).providers["openai"]

    assert [key.limits for key in openai.keys] == [LIMITS, LIMITS]


def test_the_description_itself_is_read(write: Write) -> None:
    """The user's own page, byte for byte, where it is at hand."""
    page = os.environ.get("BRIMFUL_SPEC", "")
    text = Path(page).read_text(encoding="utf-8") if page else f"```yaml\n{DESCRIBED}```\n```yaml\n{FRAGMENT}```\n"

    whole, fragment = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)

    assert [key.limits for key in load(write(whole)).providers["anthropic"].keys] == [LIMITS] * 3
    assert load(provider(**yaml.safe_load(fragment))).providers["openai"].keys[0].limits == LIMITS


def test_a_key_is_enough() -> None:
    settings = load({"providers": {"openai": {"api_keys": "k"}}})

    (key,) = settings.providers["openai"].keys
    assert (settings.default_provider, settings.store, settings.source) == ("openai", "memory", "mapping")
    assert (key.model, key.limits) == (None, LimitSettings())
    assert settings.providers["openai"].pool == PoolSettings()
    assert not settings.providers["openai"].custom


def test_the_first_provider_is_the_default_unless_one_is_named() -> None:
    both = {"anthropic": {"api_keys": "a"}, "openai": {"api_keys": "b"}}

    assert load({"providers": both}).default_provider == "anthropic"
    assert load({"providers": both, "default_provider": "openai"}).default_provider == "openai"


def test_a_list_may_hold_null_for_a_key_without_model_or_limits() -> None:
    openai = load(
        provider(api_keys=["a", "b"], models=[None, "m"], rate_limits=[{"requests_per_minute": 5}, None])
    ).providers["openai"]

    assert [key.model for key in openai.keys] == [None, "m"]
    assert [key.limits.requests_per_minute for key in openai.keys] == [5, None]


def test_a_limit_has_more_dimensions_than_three() -> None:
    every: dict[str, Any] = {
        "tokens_per_minute": 90_000,
        "window_seconds": 10,
        "requests_per_day": 1_000,
        "tokens_per_day": 2_000_000,
        "concurrent_requests": 8,
        "burst_seconds": 10,
    }

    assert load(provider(rate_limits=every)).providers["openai"].keys[0].limits == LimitSettings(**every)
    nothing = load(provider(rate_limits=dict.fromkeys(every, None) | {"window_seconds": 60})).providers["openai"]
    assert nothing.keys[0].limits == LimitSettings()


@pytest.mark.parametrize(
    ("written", "read"),
    [("org", ["org", "org"]), (["org", "other"], ["org", "other"]), (["org", None], ["org", None]), (None, [None] * 2)],
)
def test_a_quota_pool_is_named_for_each_key_or_once_for_all(written: Any, read: list[str | None]) -> None:
    openai = load(provider(api_keys=["a", "b"], quota_pools=written)).providers["openai"]

    assert [key.quota_pool for key in openai.keys] == read


def test_models_are_grouped_by_one_pattern_or_several() -> None:
    written = {"small": "m-?", "rest": ["m-*", "n-[12]"], "late": "m-*"}

    openai = load(provider(model_groups=written)).providers["openai"]

    assert openai.model_groups == {"small": ("m-?",), "rest": ("m-*", "n-[12]"), "late": ("m-*",)}
    groups = {"m-1": "small", "m-10": "rest", "n-2": "rest", "n-3": None, "M-1": None, "xm-1": None}
    assert {model: openai.group(model) for model in groups} == groups


def test_keys_of_one_pool_share_its_limits_but_only_for_the_models_that_they_share() -> None:
    five, six = {"requests_per_minute": 5}, {"requests_per_minute": 6}
    groups = {"x": "x-*"}
    for models, limits, pools in [
        (["x-1", "x-2"], [five, five], "org"),
        (["x-1", "x-2"], [five, six], None),
        (["x-1", "x-2"], [five, six], ["org", "other"]),
        (["x-1", "x-2"], [five, six], ["org", None]),
        (["x-1", "y-1"], [five, six], "org"),
        (None, [five, six], None),
    ]:
        load(provider(api_keys=["a", "b"], models=models, rate_limits=limits, quota_pools=pools, model_groups=groups))


def test_how_a_vendor_counts_can_be_said_in_part_or_in_full() -> None:
    counting: dict[str, Any] = {"model": "actual_as_produced", "cache_reads": False, "rejected": True}

    assert load(provider(counting=counting)).providers["openai"].counting == CountingSettings(**counting)
    assert load(provider(counting={"cache_reads": True})).providers["openai"].counting == CountingSettings(
        cache_reads=True
    )
    assert load(provider(counting=dict.fromkeys(counting, None))).providers["openai"].counting == CountingSettings()


def test_the_rate_limiter_is_told_how_to_share() -> None:
    written = {"output_reserve": "strict", "slow_start": False, "max_queue": 0, "weights": {"low": 0.5}}

    assert load(limiter(**written)).middleware.rate_limiter == RateLimiterSettings(
        output_reserve="strict", slow_start=False, max_queue=0, weights=Weights(high=8, normal=3, low=0.5)
    )
    assert load(limiter(weights=None, max_queue=None)).middleware.rate_limiter == RateLimiterSettings()


def test_blank_sections_are_empty(write: Write) -> None:
    path = write("""
        providers:
          openai:
            api_keys: k
            models:
            pool:
            extra_headers:
        middleware:
          retry:
    """)

    assert load(path).providers["openai"].pool == PoolSettings()


def test_what_is_said_above_holds_for_each_provider_unless_it_says_otherwise() -> None:
    settings = load(
        {
            "model_aliases": {"old": "new", "fast": "one"},
            "unsupported": "raise",
            "providers": {
                "openai": {"api_keys": "a", "model_aliases": {"fast": "two"}},
                "anthropic": {"api_keys": "b", "unsupported": "drop"},
            },
        }
    )

    assert settings.providers["openai"].model_aliases == {"old": "new", "fast": "two"}
    assert settings.providers["openai"].unsupported == "raise"
    assert settings.providers["anthropic"].unsupported == "drop"


def test_any_name_goes_with_a_dialect() -> None:
    local = load(
        {"providers": {"local": {"dialect": "openai", "api_keys": "k", "base_url": "http://localhost:8000/v1/"}}}
    ).providers["local"]

    assert (local.name, local.dialect, local.base_url, local.custom) == (
        "local",
        "openai",
        "http://localhost:8000/v1",
        True,
    )


def test_registered_names_are_known() -> None:
    settings = load(
        {
            "providers": {"mine": {"api_keys": "k"}},
            "middleware": {"stamp": {"colour": "red", "nested": [1, {"a": None}]}, "other": None},
            "store": "shelf",
        },
        known_dialects=["openai", "mine"],
        known_middleware=["stamp", "other"],
        known_stores=["memory", "shelf"],
    )

    assert settings.providers["mine"].dialect == "mine"
    assert settings.middleware.extensions == {
        "stamp": {"enabled": True, "colour": "red", "nested": [1, {"a": None}]},
        "other": {"enabled": True},
    }
    assert settings.store == "shelf"


def test_a_date_needs_no_quotes(write: Write) -> None:
    path = write("providers: {anthropic: {api_keys: [k], api_version: 2023-06-01}}")

    assert load(path).providers["anthropic"].api_version == "2023-06-01"


def test_files_are_found_beside_the_configuration(write: Write, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    (tmp_path / "ca.pem").write_text("")

    openai = load(write("providers: {openai: {api_keys: ['file:key'], transport: {ca_file: ca.pem}}}")).providers[
        "openai"
    ]

    assert openai.keys[0].secret.reveal() == "from-a-file"
    assert openai.transport.ca_file == str(tmp_path / "ca.pem")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("${A}", "alpha"),
        ("${A:-other}", "alpha"),
        ("${UNSET:-other}", "other"),
        ("${EMPTY:-other}", "other"),
        ("pre-${A}-${B}-post", "pre-alpha-beta-post"),
        ("$${A}", "${A}"),
        ("$A {A} $", "$A {A} $"),
        ("${TRICK}", "${A}"),
        ("${UNSET:-}x", "x"),
        ("${UNSET:-a:-b}", "a:-b"),
    ],
)
def test_variables_are_put_in_place(written: str, read: str) -> None:
    environ = {"A": "alpha", "B": "beta", "EMPTY": "", "TRICK": "${A}"}

    settings = load(provider(models=written, extra_body={"deep": [written]}), environ)

    assert settings.providers["openai"].keys[0].model == read
    assert settings.providers["openai"].extra_body == {"deep": [read]}


def test_variables_may_stand_for_numbers_and_flags() -> None:
    settings = load(
        {
            **provider(pool={"max_size": "${SIZE:-10}", "acquire_timeout": "${WAIT}"}),
            "middleware": {"logging": {"content": "${YES}"}, "retry": {"enabled": "${NO:-off}"}},
        },
        {"WAIT": "1.5", "YES": "True"},
    )

    assert settings.providers["openai"].pool == PoolSettings(max_size=10, acquire_timeout=1.5)
    assert settings.middleware.logging.content
    assert not settings.middleware.retry.enabled


@pytest.mark.parametrize(
    ("struct", "table"),
    [
        (LimitSettings, config.LIMITS),
        (PoolSettings, config.POOL),
        (TimeoutSettings, config.TIMEOUTS),
        (TransportSettings, config.transport_table(Path())),
        (CountingSettings, config.COUNTING),
        (RateLimiterSettings, config.RATE_LIMITER),
        (Weights, config.WEIGHTS),
        (RetrySettings, config.RETRY),
        (LoggingSettings, config.LOGGING),
        (MetricsSettings, config.METRICS),
    ],
)
def test_every_setting_can_be_configured(struct: type[msgspec.Struct], table: Table) -> None:
    assert list(table) == list(struct.__struct_fields__)


# -- the file that documents it


def commented_out(text: str) -> str:
    """The text with its commented settings (`#` without a space, or with more than one) switched on."""
    return re.sub(r"^( *)#(?=[^\s#]|  )", r"\1", text, flags=re.MULTILINE)


def test_the_documented_file_holds_every_key_and_its_settings_can_be_switched_on(tmp_path: Path) -> None:
    text = commented_out((ROOT / "config" / "llm.yaml").read_text(encoding="utf-8"))
    (tmp_path / "llm.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "anthropic_3").write_text("three\n")
    environ = {"ANTHROPIC_API_KEY": "one", "ANTHROPIC_API_KEY_2": "two", "GATEWAY_API_KEY": "four"}

    settings = load(tmp_path / "llm.yaml", environ, known_middleware=[*config.MIDDLEWARE, "my_middleware"])

    anthropic, gateway = settings.providers.values()
    assert [key.secret.reveal() for key in anthropic.keys] == ["one", "two", "three"]
    assert (anthropic.pool, anthropic.timeouts) == (PoolSettings(), TimeoutSettings())
    assert gateway.transport == TransportSettings()
    assert settings.middleware.extensions == {"my_middleware": {"enabled": True}}
    assert [key.quota_pool for key in anthropic.keys] == ["research", "research", None]
    assert anthropic.counting == CountingSettings()
    tables = (
        *(config.LIMITS, config.POOL, config.TIMEOUTS, config.RETRY, config.RATE_LIMITER, config.LOGGING),
        *(config.COUNTING, config.WEIGHTS, config.CIRCUIT_BREAKER, config.FALLBACK, config.TARGET, config.RESUME),
        config.HEDGE,
    )
    assert anthropic.fallback == "others"
    assert settings.fallbacks == {"others": (Target("gateway", "llama-4", {"max_tokens": 1000}),)}
    for key in {*config.TOP, *config.PROVIDER, *config.transport_table(Path()), *(key for t in tables for key in t)}:
        assert re.search(rf"^[ -]*{key}:", text, re.MULTILINE), key


def test_the_documented_file_works_as_it_stands_with_a_key_in_the_environment() -> None:
    settings = load(ROOT / "config" / "llm.yaml", {"OPENAI_API_KEY": "k"})

    assert list(settings.providers) == ["openai"]
    assert settings.middleware == load(provider()).middleware
    assert settings.source == str(ROOT / "config" / "llm.yaml")


# -- what is refused

LONG = "0123456789" * 4
REFUSED: list[tuple[Any, list[str]]] = [
    # keys of the schema
    ({**provider(), "provider": 1}, ["provider: unknown key 'provider'", "did you mean providers?"]),
    (provider(api_key=KEY), ["providers.openai.api_key: unknown key 'api_key'", "did you mean api_keys?"]),
    (provider(base_URL="x"), ["unknown key", "did you mean base_url?"]),
    (provider(max_size=1), ["providers.openai.max_size", "belongs under providers.<name>.pool"]),
    ({**provider(), "rate_limits": {}}, ["rate_limits", "belongs under providers.<name>"]),
    (provider(rate_limits={"rpm": 1}), ["providers.openai.rate_limits.rpm", "known: ", "requests_per_minute"]),
    (provider(**{KEY: 1}), ["providers.openai.<hidden>: unknown key text"]),
    ({"providers": {"openai": {"api_keys": "k", 7: 1}}}, ["providers.openai: a key must be text, got a number"]),
    ({**provider(), "middleware": {"retrys": {}}}, ["middleware.retrys: unknown key", "did you mean retry?"]),
    # types
    ({"providers": ["openai"]}, ["providers: expected a mapping", "got a list"]),
    ({"providers": {}}, ["providers: names no provider", "OPENAI_API_KEY"]),
    ({"providers": {"openai": KEY}}, ["providers.openai: expected a mapping", "got text"]),
    (provider(pool=[]), ["providers.openai.pool: expected a mapping", "got a list"]),
    (provider(pool={"max_size": True}), ["pool.max_size: expected a whole number, got true"]),
    (provider(pool={"max_size": 1.5}), ["pool.max_size: expected a whole number, got 1.5"]),
    (provider(pool={"max_size": "10"}), ["pool.max_size: expected a whole number, got '10': remove the quotes"]),
    (provider(pool={"max_size": KEY}), ["pool.max_size: expected a whole number, got text"]),
    (provider(pool={"max_size": 0}), ["pool.max_size: must be a whole number above zero, got 0"]),
    (provider(pool={"max_size": 10**400}), ["pool.max_size: must be a whole number up to"]),
    (provider(pool={"max_size": None}), ["pool.max_size: expected a whole number, got nothing"]),
    (provider(pool={"max_age": 0}), ["pool.max_age: must be a number of seconds above zero, got 0"]),
    (provider(pool={"max_age": 10**400}), ["pool.max_age: expected a number of seconds"]),
    (provider(pool={"acquire_timeout": -1}), ["pool.acquire_timeout: must not be negative, got -1"]),
    (provider(pool={"probe_interval": 60, "probe_max_interval": 5}), ["probe_interval (60 s)", "(5 s)"]),
    (provider(timeouts={"connect": float("nan")}), ["timeouts.connect: expected a number of seconds, got nan"]),
    (provider(timeouts={"connect": float("inf")}), ["timeouts.connect: expected a number of seconds, got inf"]),
    (provider(timeouts={"idle": "5s"}), ["timeouts.idle: expected a number of seconds, got '5s'"]),
    (provider(models=7), ["providers.openai.models: expected text, got a number: put it in quotes"]),
    (provider(models=" "), ["providers.openai.models: is empty"]),
    (provider(unsupported="ignore"), ["providers.openai.unsupported: unknown word 'ignore'", "drop, raise"]),
    (provider(extra_body=[1]), ["extra_body: expected a mapping"]),
    (provider(extra_body={"a": {"b": {1, 2}}}), ["extra_body.a.b: expected what JSON can say, got a Python set"]),
    (provider(extra_body={"a": float("inf")}), ["extra_body.a: expected what JSON can say"]),
    (provider(extra_body={"a": ["\ud800"]}), ["extra_body.a[0]: holds half of a surrogate pair", "correct the text"]),
    (provider(extra_body={"a": {"\udfff": 1}}), ["extra_body.a: a key holds half of a surrogate pair"]),
    (provider(extra_headers={"x-number": 1}), ["extra_headers.x-number: expected text, got a number"]),
    (provider(extra_headers={"x": f"a\r\nb: {KEY}"}), ["extra_headers.x: holds a line break"]),
    (provider(extra_headers={"x y": "z"}), ["extra_headers.x y: a header's name"]),
    ({**provider(), "middleware": {"retry": {"enabled": "yes"}}}, ["retry.enabled: expected true or false, got 'yes'"]),
    ({**provider(), "middleware": {"retry": {"base_delay": 9}}}, ["base_delay (9 s) is above max_delay (8 s)"]),
    ({**provider(), "middleware": {"rate_limiter": {"guard_seconds": -1}}}, ["guard_seconds: must not be negative"]),
    # limits
    (provider(rate_limits={"requests_per_minute": 0}), ["requests_per_minute: 0 would block every call for ever"]),
    (provider(rate_limits=[{"requests_per_minute": -5}]), ["rate_limits[0].requests_per_minute: ", "got -5"]),
    (provider(rate_limits={"window_seconds": 0}), ["window_seconds: must be a number of seconds above zero"]),
    (provider(rate_limits=50), ["rate_limits: expected a mapping", "got a number"]),
    (provider(rate_limits={"tokens_per_minute": 0}), ["rate_limits.tokens_per_minute: 0 would block every call"]),
    (provider(rate_limits={"requests_per_day": "9"}), ["requests_per_day: expected a whole", "remove the quotes"]),
    (provider(rate_limits={"tokens_per_day": -1}), ["tokens_per_day: a limit must be above zero, got -1"]),
    (provider(rate_limits=[{"concurrent_requests": 0.5}]), ["rate_limits[0].concurrent_requests: ", "got 0.5"]),
    (provider(rate_limits={"burst_seconds": 0}), ["burst_seconds: must be a number of seconds above zero, got 0"]),
    (
        provider(rate_limits=[{"burst_seconds": 11, "window_seconds": 10}]),
        ["providers.openai.rate_limits[0]: burst_seconds (11 s) is above window_seconds (10 s)"],
    ),
    (provider(rate_limits={"tokens_per_hour": 1}), ["unknown key 'tokens_per_hour'", "did you mean tokens_per_"]),
    (provider(tokens_per_day=1), ["providers.openai.tokens_per_day", "belongs under providers.<name>.rate_limits"]),
    # quota pools
    (provider(quota_pools=7), ["providers.openai.quota_pools: expected text, got a number: put it in quotes"]),
    (provider(quota_pools=[""]), ["providers.openai.quota_pools[0]: is empty"]),
    (provider(api_keys=["a", "b", "c"], quota_pools=["x", "x"]), ["quota_pools: 2 entries for 3 api_keys"]),
    (provider(quota_pool="x"), ["unknown key 'quota_pool'", "did you mean quota_pools?"]),
    (
        shared(models="m", rate_limits=[{"requests_per_minute": 5}, {"requests_per_minute": 6}]),
        [
            "providers.openai.rate_limits: limits belong to the pool: api_keys[0] and [1] share the quota pool 'org' "
            "and the models of 'm', but not their requests_per_minute (5 and 6): give both the same"
        ],
    ),
    (
        shared(models=[None, "m"], rate_limits=[{"tokens_per_day": 5}, None]),
        ["the models of 'm', but not their tokens_per_day (5 and nothing)"],
    ),
    (shared(rate_limits=[{"window_seconds": 5}, {}]), ["all models, but not their window_seconds (5.0 and 60.0)"]),
    (
        shared(
            models=["x-1", "y"],
            model_aliases={"y": "x-2"},
            model_groups={"x": ["x-*"]},
            rate_limits=[{"burst_seconds": 5}, {"burst_seconds": 6}],
        ),
        ["share the quota pool 'org' and the models of 'x', but not their burst_seconds (5.0 and 6.0)"],
    ),
    (
        shared(
            api_keys=["a", "b", "c"],
            models=["m", "n", None],
            rate_limits=[{"requests_per_minute": 5}, {"requests_per_minute": 6}, {"requests_per_minute": 5}],
        ),
        ["api_keys[1] and [2] share the quota pool 'org' and the models of 'n'"],
    ),
    (shared(quota_pools=KEY, models="m", rate_limits=[{"requests_per_minute": 5}, None]), ["the quota pool text"]),
    # What cannot be read is not compared.
    (shared(models="m", rate_limits=[{"requests_per_minute": 0}, {"requests_per_minute": 6}]), ["0 would block"]),
    # groups of models
    (provider(model_groups=["m*"]), ["providers.openai.model_groups: expected a mapping", "got a list"]),
    (provider(model_groups={"x": 1}), ["providers.openai.model_groups.x: expected text, got a number"]),
    (provider(model_groups={"x": ["m", None]}), ["model_groups.x[1]: expected text, got nothing"]),
    (provider(model_groups={"x": []}), ["model_groups.x: names no model: give a pattern such as `claude-opus-4*`"]),
    (provider(model_group={}), ["did you mean model_groups?"]),
    # how the vendor counts
    (provider(counting="reserve_max"), ["providers.openai.counting: expected a mapping", "got text"]),
    (provider(counting={"model": "reserve-mx"}), ["counting.model: unknown word 'reserve-mx': did you mean reserve_"]),
    (provider(counting={"model": "used"}), ["known: actual_as_produced, reserve_max"]),
    (provider(counting={"cache_reads": 1}), ["counting.cache_reads: expected true or false, got 1"]),
    (provider(counting={"reject": True}), ["counting.reject: unknown key 'reject': did you mean rejected?"]),
    (provider(rejected=True), ["providers.openai.rejected", "belongs under providers.<name>.counting"]),
    (provider(model="m"), ["providers.openai.model: unknown key 'model': did you mean models?"]),
    # the rate limiter
    (limiter(output_reserve="strickt"), ["output_reserve: unknown word 'strickt': did you mean strict?"]),
    (limiter(slow_start=1), ["middleware.rate_limiter.slow_start: expected true or false, got 1"]),
    (limiter(max_queue=-1), ["middleware.rate_limiter.max_queue: must not be negative, got -1"]),
    (limiter(max_queue=1.5), ["max_queue: expected a whole number, got 1.5"]),
    (limiter(weights=[8, 3, 1]), ["middleware.rate_limiter.weights: expected a mapping", "got a list"]),
    (limiter(weights={"high": 0}), ["rate_limiter.weights.high: must be a number above zero, got 0"]),
    (limiter(weights={"low": -0.5}), ["rate_limiter.weights.low: must be a number above zero, got -0.5"]),
    (limiter(weights={"low": float("nan")}), ["weights.low: expected a number, got nan"]),
    (limiter(weights={"normal": "3"}), ["weights.normal: expected a number, got '3': remove the quotes"]),
    (limiter(weights={"urgent": 1}), ["weights.urgent: unknown key 'urgent': known: high, low, normal"]),
    (limiter(high=1), ["rate_limiter.high: unknown key: it belongs under middleware.rate_limiter.weights"]),
    # one for each key
    (provider(models=["a", "b"]), ["providers.openai.models: 2 entries for 1 api_keys"]),
    (provider(api_keys=["a", "b", "c"], models=["a", "b"]), ["models: 2 entries for 3 api_keys", "a single one"]),
    (provider(api_keys=["a", "b"], rate_limits=[{}, {}, {}]), ["rate_limits: 3 entries for 2 api_keys"]),
    (provider(models=[]), ["models: 0 entries for 1 api_keys"]),
    # keys
    ({"providers": {"openai": {}}}, ["providers.openai: api_keys is missing"]),
    (provider(api_keys=[]), ["providers.openai: api_keys is missing"]),
    (provider(api_keys=None), ["providers.openai: api_keys is missing"]),
    (provider(api_keys=""), ["providers.openai.api_keys: the API key is empty"]),
    (provider(api_keys=["a", "  "]), ["providers.openai.api_keys[1]: the API key is empty"]),
    (provider(api_keys=["a", "${UNSET:-}"]), ["providers.openai.api_keys[1]: the API key is empty (from UNSET)"]),
    (provider(api_keys=[None]), ["api_keys[0]: expected an API key as text, got nothing"]),
    (provider(api_keys=[int(LONG)]), ["api_keys[0]: expected an API key as text, got a number: put it in quotes"]),
    (provider(api_keys=[{KEY: KEY}]), ["api_keys[0]: expected an API key as text, got a mapping"]),
    (provider(api_keys={KEY: KEY}), ["api_keys: expected an API key as text, got a mapping"]),
    (provider(api_keys=[[KEY]]), ["api_keys[0]: expected an API key as text, got a list"]),
    (provider(api_keys=f"{KEY} {KEY}"), ["api_keys: the API key holds white space"]),
    (provider(api_keys=f"{KEY}ü"), ["api_keys: the API key holds white space or a character that a header"]),
    (provider(api_keys=[KEY, "b", KEY]), ["providers.openai.api_keys: entries [0] and [2] are the same key"]),
    (provider(api_keys="file:nowhere/at-all"), ["api_keys: the file that should hold the API key does not exist"]),
    (provider(api_keys="file:"), ["api_keys: the file that should hold the API key cannot be read: is a directory"]),
    (provider(api_keys="file:\0"), ["api_keys: the file that should hold the API key cannot be read"]),
    # variables
    (provider(models="${NOT_THERE}"), ["models: environment variable NOT_THERE is not set", "${NOT_THERE:-default}"]),
    (provider(models="${EMPTY}"), ["models: environment variable EMPTY is empty"]),
    (provider(models="${NOT_THERE"), ["models: `${` has no closing brace", "$${"]),
    (provider(models=f"${{{KEY}}}"), ["models: what stands in `${…}` is not a variable's name"]),
    (provider(models="${AizaSyPlanted0123456789abcdefghijklm}"), ["environment variable <hidden> is not set"]),
    (provider(models="${A:-${B}}"), ["models: the default of A refers to a variable itself"]),
    (
        provider(pool={"max_size": "${TEN}"}),
        ["expected a whole number, got text from the environment", "TEN"],
    ),
    (provider(base_url="${LEAK}"), ["base_url: expected a URL", "(from LEAK)"]),
    # addresses
    (provider(base_url="localhost:8000"), ["base_url: expected a URL such as https://"]),
    (provider(base_url="ftp://host"), ["base_url: expected a URL"]),
    (provider(base_url="https://"), ["base_url: expected a URL"]),
    (provider(base_url="https://[::1"), ["base_url: expected a URL"]),
    (provider(base_url="https://host:99999"), ["base_url: expected a URL"]),
    (provider(base_url="https://a b"), ["base_url: expected a URL"]),
    (provider(base_url=f"https://user:{KEY}@host"), ["base_url: must not hold a user name or password"]),
    (provider(base_url=f"https://host/?key={KEY}"), ["base_url: must end with its path"]),
    (provider(transport={"proxy": KEY}), ["transport.proxy: expected a URL", "`environment` or `none`"]),
    (provider(transport={"ca_file": "no/such.pem"}), ["transport.ca_file: names a file that does not exist"]),
    (provider(transport={"ca_file": "x" * 5000}), ["transport.ca_file: names a file that does not exist"]),
    (provider(transport={"client_key": __file__}), ["providers.openai.transport: client_key needs client_cert"]),
    (provider(transport={"ca_file": "\0"}), ["transport.ca_file: holds a line break or a control character"]),
    # names
    ({**provider(), "default_provider": "opanai"}, ["default_provider: unknown provider 'opanai'", "mean openai?"]),
    ({**provider(), "store": "redis"}, ["store: unknown store 'redis'", "known: memory"]),
    (provider(dialect="open-ai"), ["dialect: unknown dialect 'open-ai'", "did you mean openai?"]),
    ({"providers": {"local": {"api_keys": "k"}}}, ["providers.local: ", "needs `dialect:`", "anthropic, openai"]),
    ({"providers": {"a/b": {"api_keys": "k", "dialect": "openai"}}}, ["providers.a/b: a provider's name is"]),
    # neither file nor mapping
    (None, ["a file's path or a mapping, not nothing"]),
    (7, ["a file's path or a mapping, not a number"]),
    (f"providers:\n  openai:\n    api_keys: {KEY}", ["expected a file's path, got text of several lines"]),
    (f"{{providers: {{openai: {{api_keys: {KEY}}}}}}}", ["expected a file's path, got what looks like its content"]),
    (f"api_keys: {KEY}", ["expected a file's path, got what looks like its content"]),
    ("x" * 5000, ["expected a file's path, got what looks like its content"]),
    ("", ["the path of the configuration is empty: name a file, or pass a mapping"]),
    ("\ud800.yaml", ["its path holds half of a surrogate pair"]),
    ("no/such/llm.yaml", ["no/such/llm.yaml: does not exist: create it", "OPENAI_API_KEY"]),
]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_no_configuration_and_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "llm.yaml")
    assert "is not a regular file" in refusal(str(tmp_path / "llm.yaml"), {})
    provider = {"api_keys": [f"file:{tmp_path / 'llm.yaml'}"]}
    assert "is not a regular file" in refusal({"providers": {"openai": provider}}, {})


@pytest.mark.parametrize(("source", "said"), REFUSED, ids=[said[0][:60] for _, said in REFUSED])
def test_what_is_wrong_is_named_with_its_place_and_its_mend(source: Any, said: list[str]) -> None:
    message = refusal(source, {"EMPTY": "", "TEN": "ten", "LEAK": KEY})

    for part in said:
        assert part in message
    assert "\n" not in message, "one mistake makes one problem"


BAD_FILES: list[tuple[str | bytes, list[str]]] = [
    ("", ["is empty: write at least"]),
    ("# nothing but a comment\n", ["is empty"]),
    ("- providers\n", ["expected a mapping, got a list"]),
    (KEY, ["expected a mapping, got text"]),
    ("providers:\n  openai:\n    api_keys: [k\n", ["line 4, column 1: not valid YAML"]),
    ("a: [${ONE}]\n", ["line 1, column 6: not valid YAML: expected ',' or ']', but got '{'", "put ${…} in quotes"]),
    ("providers:\n\topenai: 1\n", ["line 2, column 1: not valid YAML", "cannot start any token"]),
    (f"providers: {{openai: {{api_keys: [!{KEY}!x k]}}}}\n", ["line 1", "not valid YAML", "'…'"]),
    (f"providers: {{openai: {{api_keys: [!{KEY} k]}}}}\n", ["line 1", "a tag or a merge key"]),
    (f"providers: {{openai: {{api_keys: [*{KEY}]}}}}\n", ["line 1, column 33: anchors (&) and aliases (*)"]),
    (f"providers: {{openai: {{api_keys: [&{KEY} k]}}}}\n", ["line 1, column 33: anchors (&) and aliases (*)"]),
    ("a: !!python/object/apply:os.system [echo]\n", ["line 1, column 4: a tag or a merge key"]),
    ("a: {<<: {b: 1}}\n", ["line 1, column 5: a key must be text"]),
    ("a: !!set {b}\n", ["line 1, column 4: a tag"]),
    ("a: !!int seven\n", ["line 1, column 4: cannot be read as int"]),
    ("a: !!bool seven\n", ["line 1, column 4: cannot be read as bool"]),
    ("a: " + "9" * 5000 + "\n", ["line 1, column 4: cannot be read as int"]),
    ("a: 1:30\n", ["line 1, column 4: a number with colons is to the base of 60: put text in quotes"]),
    ("a: 1" + ":1" * 120_000 + "\n", ["line 1, column 4: a number with colons"]),
    ("a: 1:30.5\n", ["line 1, column 4: a number with colons"]),
    ('a: "\\UFFFFFFFF"\n', ["not valid YAML"]),
    ("yes: 1\n", ["line 1, column 1: a key must be text: put it in quotes"]),
    ("? [a]\n: 1\n", ["line 1, column 3: a key must be text"]),
    ("store: memory\nproviders: {}\nstore: memory\n", ["line 3, column 1: the key store stands here again", "line 1"]),
    (f"{KEY}: 1\n{KEY}: 2\n", ["line 2, column 1: the key <hidden> stands here again"]),
    ("a: 1\n---\nb: 2\n", ["line 2, column 1: not valid YAML"]),
    ("a: " + "[" * 100, ["nested more than 32 levels deep"]),
    ("[" * 100_000, ["nested more than 32 levels deep"]),
    ("a: b\0c\n", ["line 1: holds a character that YAML does not allow"]),
    (b"a: \xff\xfe\n", ["is not text in UTF-8"]),
    (b"#" * (256 * 1024 + 1), ["is larger than 262144 bytes"]),
]


@pytest.mark.parametrize(("text", "said"), BAD_FILES, ids=[said[0][:60] for _, said in BAD_FILES])
def test_a_file_that_is_no_configuration_is_refused_by_name(write: Write, text: str | bytes, said: list[str]) -> None:
    path = write(text)

    message = refusal(path)

    assert message.startswith(f"{path}: ")
    for part in said:
        assert part in message


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read: is a directory"


def test_a_file_that_may_not_be_read_is_refused(write: Write) -> None:
    path = write(DESCRIBED, mode=0)
    if os.access(path, os.R_OK):
        return  # nothing is closed to the superuser

    assert refusal(path) == f"{path}: cannot be read: permission denied"


def test_a_byte_order_mark_is_no_content(write: Write) -> None:
    assert list(load(write(b"\xef\xbb\xbf" + DESCRIBED.encode())).providers) == ["anthropic"]


def test_a_key_file_that_is_empty_binary_or_huge_is_refused(tmp_path: Path, write: Write) -> None:
    path = write("providers: {openai: {api_keys: ['file:key']}}")
    for content, said in ((b"\n", "is empty"), (b"\xff\xfe", "UTF-8"), (b"k" * 20_000, "larger than 16384 bytes")):
        (tmp_path / "key").write_bytes(content)

        assert f"{path}: providers.openai.api_keys[0]: the file that should hold the API key" in refusal(path)
        assert said in refusal(path)


def test_all_that_is_wrong_is_told_at_once(write: Write) -> None:
    path = write("""
        default_provider: nobody
        providers:
          openai:
            api_keys: ["${ONE}", "${TWO}"]
            models: [a, b, c]
            pool: {max_size: 0, max_sise: 1}
    """)

    assert refusal(path).splitlines() == [
        f"{path}: 6 problems",
        "  - providers.openai.pool.max_sise: unknown key 'max_sise': did you mean max_size?",
        "  - providers.openai.pool.max_size: must be a whole number above zero, got 0",
        "  - providers.openai.api_keys[0]: environment variable ONE is not set:"
        " set it, or give a default with ${ONE:-default}",
        "  - providers.openai.api_keys[1]: environment variable TWO is not set:"
        " set it, or give a default with ${TWO:-default}",
        "  - providers.openai.models: 3 entries for 2 api_keys: give one for each key, or a single one for all",
        "  - default_provider: unknown provider 'nobody': known: openai",
    ]


def test_a_long_list_of_problems_is_cut() -> None:
    message = refusal(provider(pool={f"size{index}": index for index in range(100)}))

    assert message.startswith("configuration: 100 problems")
    assert message.endswith("and 70 more")


def test_a_configuration_that_holds_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless

    endless["too"] = endless

    message = refusal(provider(extra_body=endless))

    assert message == "extra_body or a middleware's settings hold more than 32 levels or 10000 values"


def test_a_configuration_without_end_is_refused() -> None:
    assert "10000 values" in refusal(provider(extra_body={"list": [0] * 20_000}))


def test_the_yaml_library_is_the_cost_of_those_who_keep_a_file() -> None:
    code = "import sys, llm.core.config; sys.exit('yaml' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "src")}).returncode == 0


# -- keys that others may read


def read_with_warnings(path: Path, environ: Mapping[str, str] | None = None) -> list[str]:
    warnings: list[str] = []
    config.load(path, environ=environ or {}, warn=warnings.append)
    return warnings


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permission bits")
def test_keys_in_a_file_that_everybody_may_read_are_warned_of_once(write: Write) -> None:
    path = write(DESCRIBED.replace("key1", KEY), mode=0o644)

    (warning,) = read_with_warnings(path)

    assert str(path) in warning
    assert f"chmod 600 {path}" in warning
    assert "${ENV}" in warning
    assert KEY not in warning


@pytest.mark.parametrize(
    ("keys", "mode"),
    [("[plain]", 0o600), ("[plain]", 0o640), ("['${ONE}']", 0o644), ("['file:key']", 0o644), ("'${ONE}'", 0o644)],
)
def test_no_warning_where_nobody_else_reads_a_key(write: Write, tmp_path: Path, keys: str, mode: int) -> None:
    (tmp_path / "key").write_text("k")
    path = write(f"providers: {{openai: {{api_keys: {keys}}}}}", mode)

    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert read_with_warnings(path, {"ONE": "1"}) == []


# -- where it is looked for


def discover(cwd: Path, **environ: str) -> LLMSettings:
    return config.discover(environ=environ, cwd=cwd, warn=unexpected)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A working directory with one configuration in its usual place and another elsewhere."""
    for place, name in (("config/llm.yaml", "usual"), ("elsewhere.yaml", "named")):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"providers: {{{name}: {{dialect: openai, api_keys: k}}}}")
        path.chmod(0o600)
    return tmp_path


def test_the_file_that_the_environment_names_comes_first(workplace: Path) -> None:
    settings = discover(workplace, LLM_CONFIG="elsewhere.yaml", OPENAI_API_KEY="k")

    assert list(settings.providers) == ["named"]
    assert settings.source == str(workplace / "elsewhere.yaml")


def test_then_the_file_in_its_usual_place(workplace: Path) -> None:
    assert list(discover(workplace, LLM_CONFIG="", OPENAI_API_KEY="k").providers) == ["usual"]


def test_then_the_vendors_keys(tmp_path: Path) -> None:
    settings = discover(
        tmp_path,
        ANTHROPIC_API_KEY="a",
        ANTHROPIC_AUTH_TOKEN="unused",
        OPENAI_API_KEY="o",
        OPENAI_BASE_URL="http://127.0.0.1:8080/v1",
        ANTHROPIC_BASE_URL="",
    )

    openai, anthropic = settings.providers.values()
    assert (settings.default_provider, settings.source) == ("openai", "environment")
    assert (openai.dialect, openai.keys[0].secret.reveal(), openai.base_url) == (
        "openai",
        "o",
        "http://127.0.0.1:8080/v1",
    )
    assert (anthropic.dialect, anthropic.keys[0].secret.reveal(), anthropic.base_url) == ("anthropic", "a", None)
    assert (anthropic.keys[0].model, anthropic.keys[0].limits) == (None, LimitSettings())


def test_one_vendors_key_is_enough(tmp_path: Path) -> None:
    settings = discover(tmp_path, ANTHROPIC_AUTH_TOKEN="token", OPENAI_API_KEY="")

    assert list(settings.providers) == ["anthropic"]
    assert settings.providers["anthropic"].keys[0].secret.reveal() == "token"


def test_a_file_without_providers_takes_them_from_the_environment(write: Write) -> None:
    path = write("middleware: {retry: {max_attempts: 7}}")

    settings = load(path, {"OPENAI_API_KEY": "k"})

    assert list(settings.providers) == ["openai"]
    assert settings.middleware.retry.max_attempts == 7
    assert f"{path}: no provider is configured" in refusal(path)


def test_a_bad_address_in_the_environment_is_named(tmp_path: Path) -> None:
    with pytest.raises(LLMConfigurationError, match=r"base_url: expected a URL .* \(from OPENAI_BASE_URL\)"):
        discover(tmp_path, OPENAI_API_KEY="k", OPENAI_BASE_URL="localhost")


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(LLMConfigurationError, match=r"LLM_CONFIG: names gone\.yaml, which does not exist"):
        discover(tmp_path, LLM_CONFIG="gone.yaml", OPENAI_API_KEY="k")


@pytest.mark.parametrize("environ", [{}, {"OPENAI_API_KEY": "", "ANTHROPIC_API_KEY": ""}])
def test_whoever_has_nothing_is_told_all_the_ways(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(LLMConfigurationError) as refused:
        discover(tmp_path, **environ)

    for way in ("LLM_CONFIG", "config/llm.yaml", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "_BASE_URL", "from_config"):
        assert way in str(refused.value)
    assert "python -m llm simulate" in str(refused.value)


# -- whatever comes

KEYS = st.sampled_from(
    [
        *(*config.TOP, *config.PROVIDER, *config.MIDDLEWARE, *config.POOL, *config.LIMITS, *config.TIMEOUTS),
        *(*config.COUNTING, *config.RATE_LIMITER, *config.WEIGHTS, "openai", "x"),
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.sampled_from([KEY, f"${{LEAK:-{KEY}}}", "${LEAK}", "${UNSET}", f"file:{KEY}", f"https://{KEY}@host", int(LONG)]),
    st.dates(),
    st.sets(st.integers(), max_size=2),
)
JUNK = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS | st.text(max_size=5) | st.just(KEY), inner, max_size=5)
        | st.dictionaries(st.integers() | st.none(), inner, max_size=2)
    ),
    max_leaves=20,
)
PROVIDERS = st.dictionaries(
    st.sampled_from(["openai", "anthropic", "x"]),
    st.dictionaries(st.sampled_from(config.PROVIDER), JUNK, max_size=5) | JUNK,
    max_size=3,
)
CONFIGURATIONS = st.one_of(
    JUNK,
    st.fixed_dictionaries({"providers": PROVIDERS}, optional={key: JUNK for key in config.TOP if key != "providers"}),
    st.builds(lambda settings: provider(**settings), st.dictionaries(st.sampled_from(config.PROVIDER), JUNK)),
)


def outcome(source: Any, environ: Mapping[str, str]) -> str:
    """Everything that anybody gets to read of a configuration: its settings or its refusal, and the warnings."""
    told: list[str] = []
    try:
        told.append(repr(config.load(source, environ=environ, warn=told.append).providers.keys()))
    except LLMConfigurationError as error:
        told += [str(error), repr(error)]
    return "\n".join(told)


@given(source=CONFIGURATIONS)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_junk_is_read_or_refused_and_tells_no_secret(source: Any) -> None:
    if isinstance(source, (str, bytes)):
        source = {"providers": source}

    told = outcome(source, {"LEAK": KEY})

    assert KEY not in told
    assert LONG not in told


@given(text=st.text(alphabet=st.sampled_from("ab:-[]{}'\"#&*!|>%@`?,\n \t\\0123456789.$<=~/\0\x85é")) | st.text())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_text_is_read_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "llm.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    path.chmod(0o600)

    with pytest.raises(LLMConfigurationError):
        load(path)


@pytest.mark.parametrize(
    ("written", "read"), [(0.05, 0.05), ("5 %", 0.05), ("5%", 0.05), ("12.5 %", 0.125), ("100 %", 1.0)]
)
def test_a_share_may_be_written_per_cent(written: object, read: float) -> None:
    provider = {"dialect": "openai", "api_keys": "k"}
    tree = {"providers": {"v": provider}, "middleware": {"hedge": {"max_share": written}}}
    settings = config.load(tree, environ={}, warn=print)
    assert settings.middleware.hedge.max_share == pytest.approx(read)


@pytest.mark.parametrize("written", ["101 %", "-5 %", "5 percent", "%"])
def test_what_is_no_share_is_refused(written: object) -> None:
    tree = {"providers": {"v": {"dialect": "openai", "api_keys": "k"}}, "middleware": {"hedge": {"max_share": written}}}
    with pytest.raises(LLMConfigurationError, match=r"middleware\.hedge\.max_share: "):
        config.load(tree, environ={}, warn=print)
