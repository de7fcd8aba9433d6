"""What can be configured, as frozen values with their defaults. ``config.py`` reads them from files and environment."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Literal

import msgspec

from .types import Target


class Secret:
    """A string that shows itself to nobody but ``reveal()``."""

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        self.__value = value

    def reveal(self) -> str:
        """The secret itself: for the request's header, and nothing else."""
        return self.__value

    def __repr__(self) -> str:
        return "Secret('***')"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.__value == self.__value

    def __hash__(self) -> int:
        return hash((Secret, self.__value))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        # Without this, copies would be made like pickles: settings that were copied would send `***`.
        return self

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        # A pickle is a file somebody else may read; what comes back is as blank as the repr.
        return (Secret, ("***",))


def _shown(settings: msgspec.Struct, **masked: object) -> str:
    """A repr in which *masked* stand for fields that may hold a credential which is no :class:`Secret`."""
    fields = {name: masked.get(name, getattr(settings, name)) for name in settings.__struct_fields__}
    return f"{type(settings).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


class LimitSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What one key may use in any window; None is no limit."""

    requests_per_minute: int | None = None
    input_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Input and output together; ``ProviderSettings.counting`` says how."""
    window_seconds: float = 60.0
    """The window that the numbers above are per. The name "per minute" is the default."""
    requests_per_day: int | None = None
    tokens_per_day: int | None = None
    """Input and output together, in any 24 hours."""
    concurrent_requests: int | None = None
    burst_seconds: float | None = None
    """The vendor enforces the numbers above by shorter spans: so many seconds' share of them in any so many seconds."""


class KeySettings(msgspec.Struct, frozen=True, kw_only=True):
    """One API key with its model and limits. *number* counts from 1, as in ``api_keys``."""

    number: int
    secret: Secret
    model: str | None
    """None: the key has no model of its own; a call must name one or the dialect's default is used."""
    limits: LimitSettings = LimitSettings()
    quota_pool: str | None = None
    """The organisation, workspace or project whose limits these are; keys of one pool share them. None: its own."""


class CountingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the vendor counts; None is what the dialect knows of its vendor (:class:`~.types.Counting`)."""

    model: Literal["reserve_max", "actual_as_produced"] | None = None
    """Of combined tokens."""
    cache_reads: bool | None = None
    rejected: bool | None = None


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How many calls run at once, and how long a pooled client lives."""

    max_size: int = 1000
    acquire_timeout: float | None = None
    """Seconds a call may wait for a free client while a key could admit it. None: until the call's deadline."""
    max_age: float | None = 3600.0
    """Seconds after which a client and its connections are replaced."""
    max_requests: int | None = None
    """Calls after which a client is replaced."""
    probe_interval: float = 30.0
    """Seconds before a parked key is probed for the first time; the interval doubles up to ``probe_max_interval``."""
    probe_max_interval: float = 900.0


class TimeoutSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. None switches a timeout off."""

    connect: float | None = 5.0
    """Name resolution, TCP and TLS."""
    first_byte: float | None = 120.0
    """From the request's end to the response's head."""
    first_token: float | None = None
    """Of a stream: from the attempt's start to its first content, where ``attempt`` allows more."""
    idle: float | None = 60.0
    """Between two reads of a body, and between two events of a stream, whatever bytes come without completing one."""
    attempt: float | None = 600.0
    """One attempt as a whole; of a stream: until its first content."""
    min_tokens_per_second: float | None = None
    """Of a stream, once its content comes: less than this over ten seconds of waiting for it is too slow."""


class TransportSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The way to the provider."""

    proxy: Literal["environment", "none"] | str = "environment"
    """A proxy's URL; or ``environment`` for HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY; or ``none``."""
    ca_file: str | None = None
    """PEM file of the authorities to trust instead of the system's."""
    client_cert: str | None = None
    """PEM file with the client certificate (and the key, unless ``client_key`` names it)."""
    client_key: str | None = None
    max_response_bytes: int = 64 * 1024 * 1024
    keepalive_seconds: float = 30.0
    """How long an idle connection is kept. Shorter than any known server keeps it, so that it is us who close."""

    def __repr__(self) -> str:
        user, at, host = self.proxy.rpartition("@")
        return _shown(self, proxy=f"***{at}{host}" if user else self.proxy)


class ModelRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model accepts, where that is not what the table of models says; None leaves it to the table.

    ``providers/models.toml`` explains each.
    """

    refuses: frozenset[str] | None = None
    max_output: int | None = None
    token_field: str | None = None
    system_role: str | None = None
    system_turns: bool | None = None
    prefill: bool | None = None
    thinking: tuple[Literal["adaptive", "enabled", "disabled"], ...] | None = None
    efforts: tuple[str, ...] | None = None
    forced_tools: bool | None = None
    chat_tools: Literal["always", "at_no_effort", "never"] | None = None
    formats: Literal["native", "tool", "prompt"] | None = None
    cache_marks: bool | None = None


class ProviderSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One provider: a dialect at an address, with its keys."""

    name: str
    dialect: str
    """``anthropic``, ``openai``, or the name of a registered provider."""
    keys: tuple[KeySettings, ...]
    base_url: str | None = None
    """None: the vendor's own. Under any other address no model rule is applied (``custom`` is true)."""
    api_version: str | None = None
    """Anthropic's ``anthropic-version``; None: the dialect's default."""
    model_aliases: dict[str, str] = {}
    unsupported: Literal["drop", "raise"] = "drop"
    pool: PoolSettings = PoolSettings()
    timeouts: TimeoutSettings = TimeoutSettings()
    transport: TransportSettings = TransportSettings()
    extra_body: dict[str, Any] = {}
    extra_headers: dict[str, str] = {}
    model_groups: dict[str, tuple[str, ...]] = {}
    """Models that share one limit, by the group's name: patterns as ``claude-opus-4*``. Before the dialect's own."""
    counting: CountingSettings = CountingSettings()
    capabilities: dict[str, ModelRules] = {}
    """What models accept, by pattern; the first that fits counts, also under another address than the vendor's."""
    fallback: str | None = None
    """The chain of ``fallbacks`` that is asked when this provider cannot answer."""

    @property
    def custom(self) -> bool:
        """Whether the address is not the vendor's own, so that nothing is known of the models behind it."""
        return self.base_url is not None

    def rules(self, model: str) -> ModelRules | None:
        """The first of ``capabilities`` with a pattern that fits *model*, None without one."""
        return next((rules for pattern, rules in self.capabilities.items() if fnmatchcase(model, pattern)), None)

    def group(self, model: str) -> str | None:
        """The first of ``model_groups`` with a pattern that fits *model*, None without one."""
        for name, patterns in self.model_groups.items():
            if any(fnmatchcase(model, pattern) for pattern in patterns):
                return name
        return None

    def __repr__(self) -> str:
        # A gateway's token is a header like any other.
        return _shown(self, extra_headers=dict.fromkeys(self.extra_headers, "***"))


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """The shares of the priorities, when not all calls can go."""

    high: float = 8.0
    normal: float = 3.0
    low: float = 1.0


class RateLimiterSettings(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = True
    """False lifts the limits; calls still queue for a pooled client."""
    guard_seconds: float = 0.25
    """Added to every window: covers the difference between when a request leaves and when the vendor counts it."""
    output_reserve: Literal["strict", "balanced", "throughput"] = "balanced"
    """How much output is held for answers under way: ``max_tokens``, what they will probably need, or their mean."""
    slow_start: bool = True
    """Whether a key is used gently until its first answer, and after a 429 that its limits do not explain."""
    max_queue: int | None = None
    """Calls that may wait at one provider; one more is refused, the lowest priority first. None: any number."""
    weights: Weights = Weights()


class RetrySettings(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = True
    max_attempts: int = 3
    """Attempts in all, the first included. A key that turns out dead does not use one up."""
    base_delay: float = 0.5
    max_delay: float = 8.0
    max_retry_after: float | None = 120.0
    """A vendor's ``retry-after`` longer than this is not waited for (on another key the call goes on at once)."""
    budget_share: float = 0.1
    budget_per_second: float = 1.0
    budget_most: float = 50.0
    """Retries that one provider is sent: a share of its calls and so many a second, of which so many can be saved up. A
    retry after a 429 costs a tenth of one."""


class CircuitBreakerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When a provider, or one key of several, is left alone (``utils/breaker.py``). Times in seconds."""

    enabled: bool = True
    consecutive: int = 5
    """Failures in a row that open a circuit."""
    failure_rate: float = 0.5
    min_calls: int = 20
    """So large a share of at least so many attempts within *window* opens it too."""
    window: float = 10.0
    open_seconds: float = 1.0
    max_open_seconds: float = 4.0
    """How long it stays open before one attempt finds out: doubled from the one to the other."""
    ramp_seconds: float = 3.0
    """In which, after that, as many go as before."""


class FallbackSettings(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = True
    moves_on: tuple[Literal["context_length", "content_filter"], ...] = ()
    """Errors of the request itself after which the next target is asked all the same."""


class ResumeSettings(msgspec.Struct, frozen=True, kw_only=True):
    on_interrupt: Literal["raise", "restart", "continue"] = "raise"
    """What becomes of a stream that breaks off after content, unless the call says otherwise."""


class HedgeSettings(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = False
    after: Literal["p95"] | float = "p95"
    """Seconds an attempt may take to its first content before a second one begins beside it; ``p95`` is what nineteen
    of twenty have taken lately."""
    max_share: float = 0.05
    """Of the calls, how many may be given a second attempt."""


class LoggingSettings(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = True
    content: bool = False
    """Whether DEBUG records hold prompts and answers."""


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = True


class MiddlewareSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The pipeline's layers, by the names of their files."""

    rate_limiter: RateLimiterSettings = RateLimiterSettings()
    retry: RetrySettings = RetrySettings()
    circuit_breaker: CircuitBreakerSettings = CircuitBreakerSettings()
    fallback: FallbackSettings = FallbackSettings()
    resume: ResumeSettings = ResumeSettings()
    hedge: HedgeSettings = HedgeSettings()
    logging: LoggingSettings = LoggingSettings()
    metrics: MetricsSettings = MetricsSettings()
    extensions: dict[str, dict[str, Any]] = {}
    """Registered middleware by name, with its own settings (``enabled`` among them), in order: below the retry layer,
    above the attempt's log."""


class LLMSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration."""

    providers: dict[str, ProviderSettings]
    default_provider: str
    middleware: MiddlewareSettings = MiddlewareSettings()
    fallbacks: dict[str, tuple[Target, ...]] = {}
    """Chains of targets by name."""
    store: str = "memory"
    """Where shared state lives: ``memory``, or the name of a registered store."""
    source: str = "mapping"
    """Where the configuration came from, for messages: a path, ``environment`` or ``mapping``."""
