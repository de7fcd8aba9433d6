"""The values a call is made of: messages in, answers out, and what they cost. All of them are frozen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from enum import StrEnum
from typing import Any, Literal, TypeAlias, TypedDict

import msgspec

from .content import Part, Text, ToolCall
from .exceptions import TargetFailure
from .tools import Tool

SettledCallback = Callable[["Settlement"], None]
FaultReporter = Callable[[str, BaseException], None]
"""Told of an exception in something that must not fail a call: where it was, and what it was."""


class MessageRole(StrEnum):
    """Who speaks. Each dialect has its own word for these (OpenAI's newer models call SYSTEM ``developer``)."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    """The results of tools, one :class:`~llm.core.content.ToolResult` for each call of the turn before."""


class Message(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One turn of a conversation: ``Message(MessageRole.USER, "What is Python?")``."""

    role: MessageRole
    content: str | tuple[Part, ...]
    """Text, or parts: pictures and documents from the user, tool calls and thinking from the assistant."""
    cache: bool = False
    """Ask the vendor to keep the request up to this message, so that the next one that begins alike is cheaper.
    Anthropic keeps nothing unasked; OpenAI does, and is told only where. Vendors without a word for it ignore it."""

    @property
    def text(self) -> str:
        """Its words, without anything else."""
        content = self.content
        return content if isinstance(content, str) else "".join([p.text for p in content if isinstance(p, Text)])


class StopReason(StrEnum):
    """Why the model stopped, in one vocabulary for all dialects."""

    STOP = "stop"
    """The model finished, or met a stop sequence."""
    LENGTH = "length"
    """``max_tokens`` or the context ran out: the text is cut."""
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"
    """The vendor's filter or the model itself refused."""
    PAUSED = "paused"
    """Anthropic's ``pause_turn``: send the answer back to have it continued."""
    UNKNOWN = "unknown"
    """A word we do not know; ``raw`` has it."""


class Priority(StrEnum):
    """Who goes first when not all can: each class gets its share by weight (8, 3 and 1 unless configured)."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class Counting(msgspec.Struct, frozen=True, gc=False):
    """How a vendor counts against its limits, where vendors differ."""

    reserve_max: bool = False
    """Combined tokens are charged on arrival with the larger of ``max_tokens`` and the prompt, and not given back
    (OpenAI); else with what was really used, as it is produced (Anthropic)."""
    cache_reads: bool = True
    """Whether input that came from a prompt cache counts."""
    rejected: bool = True
    """Whether a request that was answered with 429 counts as one."""
    cache_reads_of: frozenset[str] = frozenset()
    """Groups of models for which cache reads count although they do not for the others (Anthropic's Haiku 3.5)."""

    def counts_cache_reads(self, group: str) -> bool:
        """Whether input from a prompt cache counts for the models of *group*."""
        return self.cache_reads or group in self.cache_reads_of


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one call. ``input_tokens`` and ``output_tokens`` are inclusive totals; the others are parts of them."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    """Part of the input that came from a prompt cache."""
    cache_write_tokens: int = 0
    """Part of the input that was written to a prompt cache, for any lifetime."""
    cache_write_1h_tokens: int = 0
    """Part of ``cache_write_tokens`` that was written for an hour (Anthropic prices it apart)."""
    reasoning_tokens: int = 0
    """Part of the output that was thinking."""

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""How hard a model thinks, in the vendors' words; which of them a model knows is in ``models.toml``."""


class Cost(msgspec.Struct, frozen=True, gc=False):
    """What a call takes, or is expected to take, of a rate limit."""

    requests: int = 1
    input_tokens: int = 0
    output_tokens: int = 0
    tokens: int = 0
    """Of a limit on input and output together."""


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """What a call would take, and when it could begin, if it were made now."""

    input_tokens: int
    """With a margin: enough for nine of ten."""
    output_tokens: int
    """As many as answers like it have on average."""
    wait: float
    """Seconds until a key could admit it, at the least."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a vendor says of one of its models; None where it says nothing."""

    id: str
    name: str = ""
    """For people."""
    lifecycle: Literal["active", "deprecated", "retired"] | None = None
    retires_on: date | None = None
    """The day from which requests for it fail; what the vendor does not say is from ``models.toml``."""
    replacement: str | None = None
    """What to use instead once it retires, by ``models.toml``."""
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None


class Settlement(msgspec.Struct, frozen=True):
    """How an attempt ended: what it used, and why it failed if it did.

    *error* is None for a success and a ``CancelledError`` for an answer that was abandoned. *exact* is False when
    *usage* is a lower bound: the vendor had not told the final figures.
    """

    usage: Usage | None = None
    error: BaseException | None = None
    exact: bool = False


def run_settled(callback: SettledCallback, settlement: Settlement, report: FaultReporter | None) -> None:
    """Run *callback*; an exception in it reaches the loop's exception handler and *report*, never the call."""
    try:
        callback(settlement)
    except (Exception, asyncio.CancelledError) as error:
        if report is not None:
            report("on_settled", error)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            # A finaliser may run after the loop's end; then the count has to do.
            return
        loop.call_exception_handler({"message": "an on_settled callback raised", "exception": error})


class LimitState(msgspec.Struct, frozen=True, gc=False):
    """One dimension of a vendor's rate-limit headers: limit, what remains, and seconds until it is full again."""

    limit: int | None = None
    remaining: int | None = None
    reset_after: float | None = None


class ObservedLimits(msgspec.Struct, frozen=True):
    """What a response's headers say of the key's limits. A dimension the vendor did not mention is None."""

    requests: LimitState | None = None
    input_tokens: LimitState | None = None
    output_tokens: LimitState | None = None
    tokens: LimitState | None = None
    """Input and output together (OpenAI), or the most restrictive of Anthropic's limits."""
    owners: tuple[str, ...] = ()
    """Organisation, workspace and project that the vendor says the key belongs to, as ``workspace wrkspc_1``."""


class KeyRef(msgspec.Struct, frozen=True, gc=False):
    """A key by its place in the configuration. It is safe to log: it does not hold the key."""

    provider: str
    number: int
    """Counted from 1, as in the list ``api_keys``."""
    id: str = ""
    """Both in one word, as in ``anthropic/2``."""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "id", f"{self.provider}/{self.number}")


class OutputFormat(msgspec.Struct, frozen=True):
    """The answer has to be JSON of this *schema* (``client.parse`` makes one of a type)."""

    schema: dict[str, Any]
    name: str = "answer"
    strict: bool = True
    """Whether the vendor must hold the model to it, where the vendor can."""


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One place of a fallback chain: a provider, perhaps a model of it, and options that differ there."""

    provider: str
    model: str | None = None
    """None: the provider's own default."""
    options: dict[str, Any] = {}
    """Over those of the call, by the names of :class:`CallOptions`."""

    def __repr__(self) -> str:
        # As in Options: a gateway's token is a header like any other.
        shown = {**self.options, **({"extra_headers": "***"} if "extra_headers" in self.options else {})}
        return f"Target(provider={self.provider!r}, model={self.model!r}, options={shown!r})"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one call asks of the model beyond its messages. None means: not said, the vendor's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    n: int | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: str | None = None
    """``auto``, ``required``, ``none``, or the name of the tool that must be called."""
    parallel_tool_calls: bool | None = None
    """Whether one answer may ask for several tools."""
    reasoning: Effort | int | None = None
    """How hard to think: a word, or how many tokens it may take where the model counts them."""
    output_format: OutputFormat | None = None
    cache: bool | Literal["auto"] | None = None
    """``"auto"`` or True: the vendor keeps the whole prompt for the next call that begins with it."""
    timeout: float | None = None
    """Seconds for the whole call: queue, attempts, backoff and stream. None: as long as it takes."""
    unsupported: Literal["drop", "raise"] | None = None
    """What to do with a sampling hint that the model refuses; None: as the configuration says."""
    extra_body: dict[str, Any] | None = None
    """Merged into the request's JSON body last, as it is."""
    extra_headers: dict[str, str] | None = None
    priority: Priority = Priority.NORMAL
    """Who goes first when not all can."""
    tenant: str = ""
    """On whose behalf: tenants of one priority share what there is equally."""
    tag: str = ""
    """The place in your program that calls: sizes are learnt for each model and tag."""
    fallback: str | tuple[Target, ...] | None = None
    """Who is asked when the provider cannot answer: a chain's name in the configuration, or targets; ``()`` for nobody.
    None: as the configuration says."""
    on_interrupt: Literal["raise", "restart", "continue"] | None = None
    """What becomes of a stream that breaks off after content: an error; the whole answer once more, after a piece with
    ``restart``; or, of text, its rest. None: as the configuration says."""

    def __repr__(self) -> str:
        unsaid = zip(self.__struct_fields__, self.__struct_defaults__, strict=True)
        said = {name: value for name, default in unsaid if (value := getattr(self, name)) != default}
        # A gateway's token is a header like any other.
        if self.extra_headers is not None:
            said["extra_headers"] = dict.fromkeys(self.extra_headers, "***")
        return f"Options({', '.join(f'{name}={value!r}' for name, value in said.items())})"


class CallOptions(TypedDict, total=False):
    """The keyword arguments of ``chat``, ``complete`` and ``stream_complete``; :class:`Options` explains them."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    frequency_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    stop: str | list[str] | tuple[str, ...] | None
    n: int | None
    tools: Sequence[Any] | None
    tool_choice: str | None
    parallel_tool_calls: bool | None
    reasoning: Effort | int | None
    output_format: OutputFormat | None
    cache: bool | Literal["auto"] | None
    timeout: float | None
    unsupported: Literal["drop", "raise"] | None
    extra_body: dict[str, Any] | None
    extra_headers: dict[str, str] | None
    priority: Priority | Literal["high", "normal", "low"] | None
    tenant: str | None
    tag: str | None
    fallback: str | Sequence[Target] | None
    on_interrupt: Literal["raise", "restart", "continue"] | None


class Request(msgspec.Struct, frozen=True):
    """What one attempt asks: the same for every dialect. *model* is settled when a key admits the call."""

    messages: tuple[Message, ...]
    model: str
    options: Options = Options()
    stream: bool = False


class LLMResponse(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A complete answer. ``print(response)`` prints its text."""

    text: str
    model: str
    """The model that answered, as the vendor names it."""
    usage: Usage
    stop_reason: StopReason = StopReason.UNKNOWN
    refusal: str | None = None
    """The model's own words when it declined to answer."""
    thinking: str = ""
    content: tuple[Part, ...] = ()
    """The answer in parts, if it has any beside text: tool calls, thinking, blocks we have no word for."""
    alternatives: tuple[str, ...] = ()
    """The texts of the further answers when ``n`` was more than one."""
    id: str = ""
    provider: str = ""
    key_id: str = ""
    """The key's place in the configuration, as ``anthropic/2``."""
    request_id: str | None = None
    """The vendor's name for the request: quote it to their support."""
    warnings: tuple[str, ...] = ()
    """What was asked and not sent because the model refuses it."""
    failures: tuple[TargetFailure, ...] = ()
    """The targets of a fallback chain that were asked before, or passed over, or whose stream broke off, and why."""
    resumed: Literal["restart", "continue"] | None = None
    """How a stream that broke off was made whole; None for one that came in one go. *usage* is of all its parts."""
    body: bytes = b""
    """The vendor's reply, byte for byte (of a stream: empty)."""

    def tell_failures(self, failures: tuple[TargetFailure, ...]) -> None:
        """Complete an answer that nobody has seen yet."""
        msgspec.structs.force_setattr(self, "failures", failures)

    @property
    def raw(self) -> Any:
        """The vendor's reply as decoded JSON, None for a stream's."""
        return msgspec.json.decode(self.body) if self.body else None

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """What the model asks to have called, in its order."""
        return tuple([part for part in self.content if isinstance(part, ToolCall)])

    @property
    def message(self) -> Message:
        """The answer as the next request's assistant message: whatever the vendor must get back is in it."""
        return Message(MessageRole.ASSISTANT, self.content or self.text)

    def on_settled(self, callback: SettledCallback) -> None:
        """Call *callback* at once: a complete answer is settled. What it raises is reported, not passed on."""
        # The endpoint leaves its reporter outside the fields, so that answers can be compared, copied and encoded.
        run_settled(callback, Settlement(usage=self.usage, exact=True), self.__dict__.get("report"))

    def __str__(self) -> str:
        return self.text


class ToolCallDelta(msgspec.Struct, frozen=True, gc=False):
    """A piece of a tool call under way; the whole call comes as ``StreamChunk.part`` when it is complete."""

    index: int
    """Which of the answer's calls, counted from 0."""
    id: str = ""
    name: str = ""
    """Both on the call's first piece."""
    arguments: str = ""
    """More of the JSON."""


class StreamChunk(msgspec.Struct, frozen=True, gc=False):
    """A piece of a streamed answer. ``print(chunk, end="")`` prints its text; the last piece has ``stop_reason``."""

    text: str = ""
    thinking: str = ""
    refusal: str = ""
    stop_reason: StopReason | None = None
    usage: Usage | None = None
    """Cumulative, on the pieces where the vendor sent it."""
    tool_call: ToolCallDelta | None = None
    part: Part | None = None
    """Something other than text is complete: a tool call, thinking with its signature, an unknown block."""
    restart: bool = False
    """The stream broke off and begins anew with the next piece (``on_interrupt="restart"``); forget the rest."""

    @property
    def has_content(self) -> bool:
        """Whether the caller would miss something if this piece were lost."""
        return bool(self.text or self.thinking or self.refusal or self.tool_call is not None or self.part is not None)

    def __str__(self) -> str:
        return self.text


Headers = Mapping[str, str]
"""Response headers; names are lower case."""
