"""Configuration: a YAML file, a mapping or the environment in, frozen settings out.

``config/llm.yaml`` documents every key. Whatever is wrong is told in one :class:`LLMConfigurationError`, a line a
problem: the path, what was seen there and the mend; never a library's traceback, and never a secret.

``load`` and ``discover`` read files, so a coroutine calls them in a thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import msgspec

from . import readers
from .arguments import read_options
from .exceptions import LLMConfigurationError, LLMInvalidRequestError
from .reading import Absent, Node, Reader, Reading, Table, Wrong, kind, seen
from .settings import (
    CircuitBreakerSettings,
    CountingSettings,
    FallbackSettings,
    HedgeSettings,
    KeySettings,
    LimitSettings,
    LLMSettings,
    LoggingSettings,
    MetricsSettings,
    MiddlewareSettings,
    ModelRules,
    PoolSettings,
    ProviderSettings,
    RateLimiterSettings,
    ResumeSettings,
    RetrySettings,
    Secret,
    TimeoutSettings,
    TransportSettings,
    Weights,
)
from .types import CallOptions, Target

DIALECTS = ("anthropic", "openai", "openai_responses")
MIDDLEWARE = ("rate_limiter", "retry", "circuit_breaker", "fallback", "resume", "hedge", "logging", "metrics")
STORES = ("memory",)

_LARGEST_FILE = 256 * 1024
"""Bytes; as many lines as nobody writes. Naming the nearest of 90,000 unknown keys takes seconds."""
_LONGEST_PATH = 4096
_MOST_PROBLEMS = 30
_OTHERS_MAY_READ = 0o004
_PROVIDER_NAME = re.compile(r"[A-Za-z][\w.-]{0,29}", re.ASCII)
_MINIMAL = '`providers: {openai: {api_keys: ["${OPENAI_API_KEY}"]}}`'

# -- the schema: how each key is read. The settings' own defaults stand for whatever is absent.

LIMITS: Table = {
    "requests_per_minute": readers.nullable(readers.limit),
    "input_tokens_per_minute": readers.nullable(readers.limit),
    "output_tokens_per_minute": readers.nullable(readers.limit),
    "tokens_per_minute": readers.nullable(readers.limit),
    "window_seconds": readers.seconds,
    "requests_per_day": readers.nullable(readers.limit),
    "tokens_per_day": readers.nullable(readers.limit),
    "concurrent_requests": readers.nullable(readers.limit),
    "burst_seconds": readers.nullable(readers.seconds),
}
COUNTING: Table = {
    "model": readers.nullable(readers.one_of("word", ("reserve_max", "actual_as_produced"))),
    "cache_reads": readers.nullable(readers.flag),
    "rejected": readers.nullable(readers.flag),
}
POOL: Table = {
    "max_size": readers.count,
    "acquire_timeout": readers.nullable(readers.seconds_or_zero),
    "max_age": readers.nullable(readers.seconds),
    "max_requests": readers.nullable(readers.count),
    "probe_interval": readers.seconds,
    "probe_max_interval": readers.seconds,
}
TIMEOUTS: Table = {
    "connect": readers.nullable(readers.seconds),
    "first_byte": readers.nullable(readers.seconds),
    "first_token": readers.nullable(readers.seconds),
    "idle": readers.nullable(readers.seconds),
    "attempt": readers.nullable(readers.seconds),
    "min_tokens_per_second": readers.nullable(readers.amount),
}
WEIGHTS: Table = {"high": readers.weight, "normal": readers.weight, "low": readers.weight}
RATE_LIMITER: Table = {
    "enabled": readers.flag,
    "guard_seconds": readers.seconds_or_zero,
    "output_reserve": readers.one_of("word", ("strict", "balanced", "throughput")),
    "slow_start": readers.flag,
    "max_queue": readers.nullable(readers.count_or_zero),
    "weights": WEIGHTS,
}
RETRY: Table = {
    "enabled": readers.flag,
    "max_attempts": readers.count,
    "base_delay": readers.seconds_or_zero,
    "max_delay": readers.seconds_or_zero,
    "max_retry_after": readers.nullable(readers.seconds_or_zero),
    "budget_share": readers.share,
    "budget_per_second": readers.amount,
    "budget_most": readers.amount,
}
CIRCUIT_BREAKER: Table = {
    "enabled": readers.flag,
    "consecutive": readers.count,
    "failure_rate": readers.share,
    "min_calls": readers.count,
    "window": readers.seconds,
    "open_seconds": readers.seconds,
    "max_open_seconds": readers.seconds,
    "ramp_seconds": readers.seconds_or_zero,
}
FALLBACK = ("enabled", "moves_on")
RESUME: Table = {"on_interrupt": readers.one_of("word", ("raise", "restart", "continue"))}
HEDGE: Table = {"enabled": readers.flag, "after": readers.p95_or_seconds, "max_share": readers.share}
TARGET = ("provider", "model", "options")
LOGGING: Table = {"enabled": readers.flag, "content": readers.flag}
METRICS: Table = {"enabled": readers.flag}
_NAME = readers.nullable(readers.text)
UNSUPPORTED = readers.one_of("word", ("drop", "raise"))


def transport_table(folder: Path) -> Table:
    """How the keys of ``transport`` are read; its files may be relative to *folder*."""
    return {
        "proxy": readers.proxy,
        "ca_file": readers.nullable(readers.file_under(folder)),
        "client_cert": readers.nullable(readers.file_under(folder)),
        "client_key": readers.nullable(readers.file_under(folder)),
        "max_response_bytes": readers.count,
        "keepalive_seconds": readers.seconds_or_zero,
    }


_PROVIDER_LEAVES: Mapping[str, Reader[Any]] = {
    "base_url": readers.nullable(readers.base_url),
    "api_version": readers.nullable(readers.text),
    "unsupported": UNSUPPORTED,
}
PROVIDER = (
    *("api_keys", "models", "rate_limits", "quota_pools", "dialect", *_PROVIDER_LEAVES, "model_aliases"),
    *("model_groups", "counting", "capabilities", "extra_body", "extra_headers", "pool", "timeouts", "transport"),
    "fallback",
)
TOP = ("default_provider", "providers", "fallbacks", "middleware", "model_aliases", "store", "unsupported")

_HOMES: Mapping[str, str] = {
    **dict.fromkeys(WEIGHTS, "middleware.rate_limiter.weights"),
    # Not its `model`: who writes that elsewhere hardly means how the vendor counts.
    **dict.fromkeys(("cache_reads", "rejected"), "providers.<name>.counting"),
    **dict.fromkeys(HEDGE, "middleware.hedge"),
    **dict.fromkeys(RESUME, "middleware.resume"),
    **dict.fromkeys(FALLBACK, "middleware.fallback"),
    **dict.fromkeys(CIRCUIT_BREAKER, "middleware.circuit_breaker"),
    **dict.fromkeys(RETRY, "middleware.retry"),
    **dict.fromkeys(RATE_LIMITER, "middleware.rate_limiter"),
    **dict.fromkeys(transport_table(Path()), "providers.<name>.transport"),
    **dict.fromkeys(TIMEOUTS, "providers.<name>.timeouts"),
    **dict.fromkeys(POOL, "providers.<name>.pool"),
    **dict.fromkeys(LIMITS, "providers.<name>.rate_limits"),
    **dict.fromkeys(MIDDLEWARE, "middleware"),
    **dict.fromkeys(PROVIDER, "providers.<name>"),
    **dict.fromkeys(("default_provider", "providers", "fallbacks", "middleware", "store"), "the top level"),
}

# -- the doors


class Known(NamedTuple):
    """The names that a configuration may choose among: ours and whatever is registered."""

    dialects: Collection[str]
    middleware: Collection[str]
    stores: Collection[str]


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    warn: Callable[[str], None],
    known_dialects: Collection[str] = DIALECTS,
    known_middleware: Collection[str] = MIDDLEWARE,
    known_stores: Collection[str] = STORES,
) -> LLMSettings:
    """Read *source*, a YAML file's path or a mapping of the same shape.

    *environ* answers ``${NAME}``, and gives the providers if *source* has no ``providers``. Relative paths begin at the
    file's folder, or at the working directory for a mapping. *warn* is told of a key that others may read.

    Raises :class:`LLMConfigurationError`, and nothing else, for whatever is wrong with *source*.
    """
    known = Known(known_dialects, known_middleware, known_stores)
    if isinstance(source, Mapping):
        return _settings(source, "mapping", Path(), environ, known)[0]
    if not isinstance(source, (str, os.PathLike)):
        _refuse("", [f"a configuration is a file's path or a mapping, not {kind(source)}"])
    path = os.fsdecode(source)
    if not path:
        _refuse("", ["the path of the configuration is empty: name a file, or pass a mapping"])
    if "\n" in path or "{" in path or ": " in path or len(path) > _LONGEST_PATH:
        # It may well hold keys: it is not repeated.
        got = "text of several lines" if "\n" in path else "what looks like its content"
        _refuse("", [f"expected a file's path, got {got}: parse YAML first, and pass the mapping"])
    tree, mode = _document(path)
    settings, literal = _settings(tree, path, Path(path).parent, environ, known)
    # Windows has no such permission bits, and reports them as set.
    if literal and mode & _OTHERS_MAY_READ and os.name != "nt":
        warn(
            f"{path} holds API keys and every user of this machine may read it: "
            f"run `chmod 600 {path}`, or write the keys as ${{ENV}} or file:PATH"
        )
    return settings


def discover(
    *,
    environ: Mapping[str, str],
    cwd: Path,
    warn: Callable[[str], None],
    known_dialects: Collection[str] = DIALECTS,
    known_middleware: Collection[str] = MIDDLEWARE,
    known_stores: Collection[str] = STORES,
) -> LLMSettings:
    """Find the configuration: ``LLM_CONFIG``, ``config/llm.yaml`` under *cwd*, then the vendors' keys in *environ*.

    An empty variable counts as one that is not set. From the environment come the providers openai and anthropic, in
    this order, each with one key, no model of its own and no limits.

    Raises :class:`LLMConfigurationError` if what it finds is wrong, or listing these ways if it finds nothing.
    """
    named, usual = environ.get("LLM_CONFIG"), cwd / "config" / "llm.yaml"
    path = cwd / named if named else usual
    found = os.path.exists(path)
    if named and not found:
        _refuse("LLM_CONFIG", [f"names {named}, which does not exist or cannot be reached: correct it, or unset it"])
    if not found:
        return _settings({}, "environment", cwd, environ, Known(known_dialects, known_middleware, known_stores))[0]
    return load(
        path,
        environ=environ,
        warn=warn,
        known_dialects=known_dialects,
        known_middleware=known_middleware,
        known_stores=known_stores,
    )


_ENVIRONMENT: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "openai": {"api_keys": ("OPENAI_API_KEY",), "base_url": ("OPENAI_BASE_URL",)},
    "anthropic": {"api_keys": ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"), "base_url": ("ANTHROPIC_BASE_URL",)},
}


def _from_environment(environ: Mapping[str, str]) -> dict[str, dict[str, str]]:
    # Variables are referred to, not copied: what they hold is not searched for variables, and errors name them.
    providers: dict[str, dict[str, str]] = {}
    for provider, settings in _ENVIRONMENT.items():
        found = {
            key: next((f"${{{variable}}}" for variable in variables if environ.get(variable)), None)
            for key, variables in settings.items()
        }
        if found["api_keys"] is not None:
            providers[provider] = {key: reference for key, reference in found.items() if reference is not None}
    return providers


def _refuse(where: str, problems: list[str]) -> NoReturn:
    shown = problems[:_MOST_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    if len(problems) == 1:
        raise LLMConfigurationError(f"{where}: {problems[0]}" if where else problems[0])
    listed = "".join(f"\n  - {problem}" for problem in shown)
    raise LLMConfigurationError(f"{where or 'configuration'}: {len(problems)} problems{listed}")


def _document(path: str) -> tuple[Any, int]:
    try:
        text, mode = readers.content(Path(path), _LARGEST_FILE)
        # PyYAML is the cost of those who keep a file; a mapping or the environment does without.
        from . import document

        tree = document.parse(text)
    except Absent as absent:
        complaint = f"{absent}: create it with at least {_MINIMAL}"
    except Wrong as wrong:
        complaint = str(wrong)
    else:
        if isinstance(tree, Mapping):
            return tree, mode
        complaint = f"is empty: write at least {_MINIMAL}" if tree is None else f"expected a mapping, got {kind(tree)}"
    _refuse(path, [complaint])


# -- from the tree to the settings

S = TypeVar("S", bound=msgspec.Struct)


def _settings(
    tree: Mapping[str, Any], source: str, folder: Path, environ: Mapping[str, str], known: Known
) -> tuple[LLMSettings, bool]:
    """The settings that *tree* stands for, and whether it holds keys in clear; or all that is wrong with it."""
    root = Node(Reading(environ, folder, _HOMES, {}), "", tree)
    where = "" if source in ("mapping", "environment") else source
    fields = root.fields(TOP)
    named = fields.get("providers")
    if named is None or named.value is None:
        named = root.child("providers", _from_environment(environ))
        if not named.value and not root.reading.problems:
            _refuse(where, [_no_provider()])
    elif not named.mapping() and not root.reading.problems:
        named.wrong(f"names no provider: write at least {_MINIMAL}")

    aliases = _words(fields.get("model_aliases"), readers.text)
    unsupported = _leaf(fields, "unsupported", UNSUPPORTED, "drop")
    providers = {
        key: _provider(key, node, aliases=aliases, unsupported=unsupported, dialects=known.dialects)
        for key, node in named.mapping().items()
    }
    first = next(iter(providers), "")
    choice = readers.one_of("provider", list(providers)) if providers else readers.text
    fallbacks = {
        name: _chain(node, choice)
        for name, node in (fields["fallbacks"].mapping() if "fallbacks" in fields else {}).items()
    }
    for key, node in named.mapping().items():
        if (chain := providers[key].fallback) is not None:
            _check_fallback(node.mapping()["fallback"], key, chain, fallbacks)
    settings = LLMSettings(
        providers=providers,
        default_provider=_leaf(fields, "default_provider", choice, first),
        middleware=_middleware(fields.get("middleware"), known.middleware),
        fallbacks=fallbacks,
        store=_leaf(fields, "store", readers.one_of("store", known.stores), "memory"),
        source=source,
    )
    if root.reading.problems:
        _refuse(where, list(root.reading.problems))
    return settings, any(
        readers.is_literal(entry.value)
        for provider in named.mapping().values()
        for entry in provider.mapping()["api_keys"].each()
    )


def _no_provider() -> str:
    # The wheel carries this tree under another name than the checkout.
    package = "brimful" if __name__.startswith("brimful.") else "llm"
    return (
        "no provider is configured. Any of these does it:\n"
        "  - LLM_CONFIG=<path> in the environment, naming a YAML file\n"
        f"  - config/llm.yaml under the working directory, with at least {_MINIMAL}\n"
        "  - OPENAI_API_KEY or ANTHROPIC_API_KEY in the environment"
        " (OPENAI_BASE_URL and ANTHROPIC_BASE_URL for another address)\n"
        "  - LLMManager.from_config(<path or mapping>) in code\n"
        f"  - without a vendor: the simulator, `python -m {package} simulate`"
    )


def _provider(
    key: str, node: Node, *, aliases: Mapping[str, str], unsupported: Any, dialects: Collection[str]
) -> ProviderSettings:
    if not _PROVIDER_NAME.fullmatch(key):
        node.wrong("a provider's name is a letter and up to 29 letters, digits, `_`, `-` or `.`")
    before = len(node.reading.problems)
    fields = node.fields(PROVIDER)
    if "dialect" not in fields and key not in dialects:
        node.wrong(f"a provider of this name needs `dialect:`, one of {', '.join(sorted(dialects))}")
    given = {name: read for name, read in _PROVIDER_LEAVES.items() if name in fields}
    body = fields["extra_body"].tree() if "extra_body" in fields and fields["extra_body"].mapping() else {}
    pool = _section(fields.get("pool"), PoolSettings, POOL)
    if pool.probe_interval > pool.probe_max_interval:
        fields["pool"].wrong(
            f"probe_interval ({pool.probe_interval:g} s) is above probe_max_interval ({pool.probe_max_interval:g} s)"
        )
    transport = _section(fields.get("transport"), TransportSettings, transport_table(node.reading.folder))
    if transport.client_key is not None and transport.client_cert is None:
        fields["transport"].wrong("client_key needs client_cert, the certificate that it belongs to")
    settings = ProviderSettings(
        name=key,
        dialect=_leaf(fields, "dialect", readers.one_of("dialect", dialects), key),
        keys=_keys(node, fields),
        model_aliases={**aliases, **_words(fields.get("model_aliases"), readers.text)},
        pool=pool,
        timeouts=_section(fields.get("timeouts"), TimeoutSettings, TIMEOUTS),
        transport=transport,
        extra_body=body,
        extra_headers=_headers(fields.get("extra_headers")),
        model_groups=_groups(fields.get("model_groups")),
        counting=_section(fields.get("counting"), CountingSettings, COUNTING),
        capabilities=_capabilities(fields.get("capabilities")),
        fallback=_leaf(fields, "fallback", _NAME, None),
        **{"unsupported": unsupported, **{name: _leaf(fields, name, read, None) for name, read in given.items()}},
    )
    # What could not be read stands for a default, and would be found to differ.
    if "rate_limits" in fields and len(node.reading.problems) == before:
        _check_pools(fields["rate_limits"], settings)
    return settings


def _check_pools(node: Node, settings: ProviderSettings) -> None:
    """Note the keys that share a quota pool and a group of models, and have other limits than the first of them."""
    pools: dict[str, dict[str | None, KeySettings]] = {}
    for key in settings.keys:
        if key.quota_pool is None:
            continue
        group = None
        if key.model is not None:
            model = settings.model_aliases.get(key.model, key.model)
            group = settings.group(model) or model
        firsts = pools.setdefault(key.quota_pool, {})
        # A key without a model of its own takes calls of every group.
        for of, first in list(firsts.items()):
            if key.limits != first.limits and (of == group or of is None or group is None):
                one = next(name for name in LIMITS if getattr(first.limits, name) != getattr(key.limits, name))
                node.wrong(
                    f"limits belong to the pool: api_keys[{first.number - 1}] and [{key.number - 1}] share the quota "
                    f"pool {seen(key.quota_pool)} and {_shared(of, group)}, but not their {one} "
                    f"({seen(getattr(first.limits, one))} and {seen(getattr(key.limits, one))}): "
                    "give both the same limits, or pools of their own"
                )
                break
        firsts.setdefault(group, key)


def _shared(one: str | None, other: str | None) -> str:
    group = one if one is not None else other
    return "all models" if group is None else f"the models of {seen(group)}"


def _keys(node: Node, fields: Mapping[str, Node]) -> tuple[KeySettings, ...]:
    listed = fields.get("api_keys")
    entries = [] if listed is None or listed.value is None else listed.each()
    if listed is None or not entries:
        if node.value is None or isinstance(node.value, Mapping):
            node.wrong("api_keys is missing: give at least one key, best as `${ENV}` or `file:PATH`")
        return ()
    read = readers.secret_under(node.reading.folder)
    secrets = [entry.leaf(read, None) for entry in entries]
    first: dict[Secret, int] = {}
    for index, secret in enumerate(secrets):
        if secret is not None and first.setdefault(secret, index) != index:
            listed.wrong(f"entries [{first[secret]}] and [{index}] are the same key: its limits would count twice")
    models = _per_key(fields.get("models"), len(entries), lambda entry: entry.leaf(_NAME, None))
    limits = _per_key(fields.get("rate_limits"), len(entries), _limits)
    pools = _per_key(fields.get("quota_pools"), len(entries), lambda entry: entry.leaf(_NAME, None))
    return tuple(
        KeySettings(number=number, secret=secret, model=model, limits=limit or LimitSettings(), quota_pool=pool)
        for number, (secret, model, limit, pool) in enumerate(zip(secrets, models, limits, pools, strict=True), start=1)
        if secret is not None
    )


def _limits(node: Node) -> LimitSettings:
    limits = _section(node, LimitSettings, LIMITS)
    if limits.burst_seconds is not None and limits.burst_seconds > limits.window_seconds:
        node.wrong(f"burst_seconds ({limits.burst_seconds:g} s) is above window_seconds ({limits.window_seconds:g} s)")
    return limits


def _per_key(node: Node | None, keys: int, read: Callable[[Node], Any]) -> list[Any]:
    """One value a key, from a list of as many, or from one that applies to all."""
    if node is None or node.value is None:
        return [None] * keys
    values = [read(entry) for entry in node.each()]
    if len(values) not in (1, keys):
        node.wrong(f"{len(values)} entries for {keys} api_keys: give one for each key, or a single one for all")
        return [None] * keys
    return values if len(values) == keys else values * keys


def _middleware(node: Node | None, known: Collection[str]) -> MiddlewareSettings:
    if node is None:
        return MiddlewareSettings()
    fields = node.fields([*MIDDLEWARE, *(name for name in known if name not in MIDDLEWARE)])
    retry = _section(fields.get("retry"), RetrySettings, RETRY)
    if retry.base_delay > retry.max_delay:
        fields["retry"].wrong(f"base_delay ({retry.base_delay:g} s) is above max_delay ({retry.max_delay:g} s)")
    breaker = _section(fields.get("circuit_breaker"), CircuitBreakerSettings, CIRCUIT_BREAKER)
    if breaker.open_seconds > breaker.max_open_seconds:
        fields["circuit_breaker"].wrong(
            f"open_seconds ({breaker.open_seconds:g} s) is above max_open_seconds ({breaker.max_open_seconds:g} s)"
        )
    extensions = {}
    for name, extension in fields.items():
        if name not in MIDDLEWARE:
            own = extension.mapping()
            settings = {key: child.tree() for key, child in own.items() if key != "enabled"}
            extensions[name] = {"enabled": _leaf(own, "enabled", readers.flag, True), **settings}
    limiter = fields["rate_limiter"].section(RATE_LIMITER) if "rate_limiter" in fields else {}
    return MiddlewareSettings(
        rate_limiter=RateLimiterSettings(**{**limiter, "weights": Weights(**limiter.get("weights", {}))}),
        retry=retry,
        circuit_breaker=breaker,
        fallback=_fallback(fields.get("fallback")),
        resume=_section(fields.get("resume"), ResumeSettings, RESUME),
        hedge=_section(fields.get("hedge"), HedgeSettings, HEDGE),
        logging=_section(fields.get("logging"), LoggingSettings, LOGGING),
        metrics=_section(fields.get("metrics"), MetricsSettings, METRICS),
        extensions=extensions,
    )


def _fallback(node: Node | None) -> FallbackSettings:
    if node is None:
        return FallbackSettings()
    fields = node.fields(FALLBACK)
    word = readers.one_of("error", ("context_length", "content_filter"))
    words: list[Any] = [each.leaf(word, "") for each in fields["moves_on"].each()] if "moves_on" in fields else []
    return FallbackSettings(enabled=_leaf(fields, "enabled", readers.flag, True), moves_on=tuple(words))


def _chain(node: Node, provider: Reader[str]) -> tuple[Target, ...]:
    """The targets of one of ``fallbacks``."""
    targets: list[Target] = []
    for each in node.each():
        fields = each.fields(TARGET)
        if "provider" not in fields:
            each.wrong("names no provider: write `- provider: <name>`, and a model if it is not the provider's own")
            continue
        options = (
            {name: child.tree() for name, child in fields["options"].mapping().items()} if "options" in fields else {}
        )
        target = Target(_leaf(fields, "provider", provider, ""), _leaf(fields, "model", _NAME, None), options)
        try:
            read_options({}, cast(CallOptions, {**options, "fallback": None}))
        except LLMInvalidRequestError as error:
            fields["options"].wrong(error.message)
        if any((one.provider, one.model) == (target.provider, target.model) for one in targets):
            each.wrong(f"{target.provider} is asked a second time: a chain must not come back to where it was")
        targets.append(target)
    if not targets and not node.reading.problems:
        node.wrong("names no target: write `- provider: <name>`, or remove the chain")
    return tuple(targets)


def _check_fallback(node: Node, provider: str, chain: str, fallbacks: Mapping[str, tuple[Target, ...]]) -> None:
    if chain not in fallbacks:
        known = ", ".join(fallbacks) or "none: write one under `fallbacks`"
        node.wrong(f"no chain of fallbacks is called {seen(chain)}; known: {known}")
    elif any(target.provider == provider and target.model is None for target in fallbacks[chain]):
        node.wrong(f"the chain {chain} comes back to {provider}: give that target another model, or take it out")


def _section(node: Node | None, into: type[S], table: Table) -> S:
    return into() if node is None else into(**node.section(table))


def _leaf(fields: Mapping[str, Node], key: str, read: Callable[[Any], Any], default: Any) -> Any:
    return fields[key].leaf(read, default) if key in fields else default


def _words(node: Node | None, read: Callable[[Any], str]) -> dict[str, str]:
    return {} if node is None else {key: child.leaf(read, "") for key, child in node.mapping().items()}


def _groups(node: Node | None) -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    for name, child in (node.mapping() if node is not None else {}).items():
        groups[name] = tuple(pattern.leaf(readers.text, "") for pattern in child.each())
        if not groups[name]:
            child.wrong("names no model: give a pattern such as `claude-opus-4*`, or remove the line")
    return groups


def _capabilities(node: Node | None) -> dict[str, ModelRules]:
    found: dict[str, ModelRules] = {}
    for pattern, child in (node.mapping() if node is not None else {}).items():
        fields = child.fields(ModelRules.__struct_fields__)
        try:
            found[pattern] = msgspec.convert({name: field.tree() for name, field in fields.items()}, ModelRules)
        except msgspec.ValidationError as error:
            # msgspec names the place as `$.thinking[0]`.
            what, _, where = str(error).partition(" - at `$")
            child.wrong(f"{where.rstrip('`').lstrip('.') or 'rules'}: {what[:1].lower()}{what[1:]}")
    return found


def _headers(node: Node | None) -> dict[str, str]:
    if node is not None:
        for key, child in node.mapping().items():
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", key):
                child.wrong("a header's name has letters, digits and `-` only")
    return _words(node, readers.header)
