"""The loop of an agent: ask, run the tools that are asked for, tell the results, ask again.

Every round is an ordinary call, which waits for its turn and pays for itself. One deadline holds over all. What goes
wrong in a tool is told to the model, which may know better; what goes wrong in a call is the caller's, as always.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, cast

import msgspec

from ..utils.alarms import Limit
from ..utils.clock import Clock
from .content import Document, Image, Text, ToolCall, ToolResult
from .exceptions import LLMDeadlineExceededError, LLMInvalidRequestError
from .tools import Tool
from .types import CallOptions, LLMResponse, Message, MessageRole, StopReason, Usage

Approve: TypeAlias = Callable[[ToolCall], "bool | str | Awaitable[bool | str]"]
OnRound: TypeAlias = Callable[[LLMResponse], object]

MAX_COMPLAINT = 500
"""Characters of a tool's error that the model is told."""


class ToolRun(msgspec.Struct, frozen=True, kw_only=True):
    """How a run of tools ended. ``print(run)`` prints the answer's text."""

    response: LLMResponse
    """The last answer."""
    messages: tuple[Message, ...]
    """The whole conversation, with that answer and the results of its calls, ready to go on."""
    rounds: int
    usage: Usage
    """Of all rounds together."""
    finished: bool
    """Whether the model has given its answer. If not, it still asks for tools: the rounds were used up, or what it asks
    for is not ours to run."""

    def __str__(self) -> str:
        return self.response.text


class Ask(Protocol):
    """What a round asks: ``LLMClient.complete``."""

    async def __call__(self, messages: Sequence[Message], **options: Any) -> LLMResponse: ...


async def run_tools(
    ask: Ask,
    messages: tuple[Message, ...],
    tools: Sequence[Tool],
    *,
    clock: Clock,
    max_rounds: int,
    tool_timeout: float | None,
    max_concurrency: int,
    approve: Approve | None,
    on_round: OnRound | None,
    options: CallOptions,
) -> ToolRun:
    """Run *tools* for the model until it answers; ``LLMClient.run_tools`` explains the rest."""
    for name, number in (("max_rounds", max_rounds), ("max_concurrency", max_concurrency)):
        if number < 1:
            raise LLMInvalidRequestError(f"{name}: expected a positive number, got {number!r}")
    if tool_timeout is not None and not tool_timeout > 0.0:
        raise LLMInvalidRequestError(f"tool_timeout: expected a positive number of seconds, got {tool_timeout!r}")
    timeout = options.get("timeout")
    deadline = clock.now() + timeout if timeout is not None else None
    known = {tool.name: tool for tool in tools}
    slots = asyncio.Semaphore(max_concurrency)
    usage = Usage()
    choice = options.get("tool_choice")
    rounds = 0
    while True:
        rest: CallOptions = {**options, "tools": tools, "timeout": _left(deadline, clock)}
        if rounds and choice not in (None, "auto", "none"):
            # Whoever must call a tool each time would never answer.
            rest["tool_choice"] = "auto"
        response = await ask(messages, **cast(dict[str, Any], rest))
        rounds += 1
        usage = _added(usage, response.usage)
        messages = (*messages, response.message)
        if on_round is not None:
            told = on_round(response)
            if inspect.isawaitable(told):
                await told
        calls = response.tool_calls
        goes_on = bool(calls) or response.stop_reason is StopReason.PAUSED
        ours = all(call.name not in known or known[call.name].run is not None for call in calls)
        if not goes_on or not ours or rounds >= max_rounds:
            return ToolRun(response=response, messages=messages, rounds=rounds, usage=usage, finished=not goes_on)
        if calls:
            limit = Limit(None)
            try:
                with _until(deadline, limit, clock):
                    results = await _run_all(calls, known, slots, approve, tool_timeout, clock)
            except TimeoutError:
                if not limit.expired:
                    raise
                raise LLMDeadlineExceededError("the run's deadline passed while tools were running") from None
            messages = (*messages, Message(MessageRole.TOOL, results))


async def _run_all(
    calls: Sequence[ToolCall],
    known: dict[str, Tool],
    slots: asyncio.Semaphore,
    approve: Approve | None,
    tool_timeout: float | None,
    clock: Clock,
) -> tuple[ToolResult, ...]:
    """The results of *calls*, in their order. When this is cancelled, so are the tools."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_run_one(call, known.get(call.name), slots, approve, tool_timeout, clock))
                for call in calls
            ]
    except BaseExceptionGroup as group_of_one:
        # Whatever is not told to the model ends the run, as itself.
        raise group_of_one.exceptions[0] from None
    return tuple([task.result() for task in tasks])


async def _run_one(
    call: ToolCall,
    tool: Tool | None,
    slots: asyncio.Semaphore,
    approve: Approve | None,
    tool_timeout: float | None,
    clock: Clock,
) -> ToolResult:
    if tool is None or tool.run is None:
        return _failed(call, f"there is no tool {call.name!r}")
    try:
        arguments = call.input
    except ValueError as error:
        return _failed(call, str(error))
    if not isinstance(arguments, dict):
        return _failed(call, "the arguments are no JSON object")
    if approve is not None:
        verdict = approve(call)
        said = await verdict if inspect.isawaitable(verdict) else verdict
        if said is not True:
            return _failed(call, said if isinstance(said, str) and said else "the user does not allow this call")
    async with slots:
        limit = Limit(None)
        try:
            with _until(None if tool_timeout is None else clock.now() + tool_timeout, limit, clock):
                return _result(call, await _called(tool.run, arguments))
        except Exception as error:
            if limit.expired:
                return _failed(call, "the tool took too long")
            return _failed(
                call, f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            )


async def _called(run: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    if inspect.iscoroutinefunction(run):
        return await run(**arguments)
    # It may take its time, or ask others for something.
    found = await asyncio.to_thread(_guarded, run, arguments)
    return await found if inspect.isawaitable(found) else found


def _guarded(run: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return run(**arguments)
    except StopIteration as error:
        # A future cannot hold it: up to Python 3.12 whoever waits for the thread would wait for ever.
        raise RuntimeError("the tool has raised StopIteration") from error


@contextmanager
def _until(when: float | None, limit: Limit, clock: Clock) -> Iterator[None]:
    """End the block by *limit*, which raises TimeoutError, at the instant *when*."""
    timer = clock.call_at(when, limit.expire) if when is not None else None
    try:
        with limit:
            yield
    finally:
        if timer is not None:
            timer.cancel()


def _result(call: ToolCall, value: Any) -> ToolResult:
    """What a tool has returned, as text or as parts."""
    if isinstance(value, str):
        return ToolResult(call.id, _sayable(value))
    if isinstance(value, ToolResult):
        return msgspec.structs.replace(value, id=call.id)
    parts = value if isinstance(value, (list, tuple)) else (value,)
    if parts and all(isinstance(part, (Text, Image, Document)) for part in parts):
        return ToolResult(call.id, tuple(parts))
    if value is None:
        return ToolResult(call.id, "done")
    try:
        return ToolResult(call.id, msgspec.json.encode(value, enc_hook=_dumped).decode())
    except (TypeError, ValueError, NotImplementedError):
        return ToolResult(call.id, _sayable(str(value)))


def _failed(call: ToolCall, complaint: str) -> ToolResult:
    return ToolResult(call.id, _sayable(complaint[:MAX_COMPLAINT]), error=True)


def _dumped(value: Any) -> Any:
    """A pydantic model as what JSON can say, wherever it stands in a result."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise NotImplementedError


def _sayable(text: str) -> str:
    """*text* without halves of surrogate pairs: file names have them, and no request can hold one."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _left(deadline: float | None, clock: Clock) -> float | None:
    if deadline is None:
        return None
    left = deadline - clock.now()
    if left <= 0.0:
        raise LLMDeadlineExceededError("the run's deadline has passed")
    return left


def _added(one: Usage, other: Usage) -> Usage:
    return Usage(*[getattr(one, name) + getattr(other, name) for name in Usage.__struct_fields__])
