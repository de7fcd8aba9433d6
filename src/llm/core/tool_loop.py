"""The loop of an agent: ask, run the tools that are asked for, tell the results, ask again.

Every round is an ordinary call, which waits for its turn and pays for itself. One deadline holds over all. What goes
wrong in a tool is told to the model, which may know better; what goes wrong in a call is the caller's, as always.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import msgspec

from ..utils.clock import Clock
from .content import Document, Image, Text, ToolCall, ToolResult
from .exceptions import LLMDeadlineExceededError
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
            results = await _run_all(calls, known, slots, approve, tool_timeout, deadline, clock)
            messages = (*messages, Message(MessageRole.TOOL, results))


async def _run_all(
    calls: Sequence[ToolCall],
    known: dict[str, Tool],
    slots: asyncio.Semaphore,
    approve: Approve | None,
    tool_timeout: float | None,
    deadline: float | None,
    clock: Clock,
) -> tuple[ToolResult, ...]:
    """The results of *calls*, in their order. When this is cancelled, so are the tools."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_run_one(call, known.get(call.name), slots, approve, tool_timeout, deadline, clock))
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
    deadline: float | None,
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
        seconds, late = tool_timeout, "the tool took too long"
        if deadline is not None:
            left = _left(deadline, clock)
            if left is not None and (seconds is None or left < seconds):
                seconds, late = left, ""
        try:
            return _result(call, await _bounded(_called(tool.run, arguments), seconds, clock))
        except TimeoutError:
            if not late:
                raise LLMDeadlineExceededError("the run's deadline passed while a tool was running") from None
            return _failed(call, late)
        except Exception as error:
            return _failed(
                call, f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            )


async def _called(run: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    if inspect.iscoroutinefunction(run):
        return await run(**arguments)
    # It may take its time, or ask others for something.
    found = await asyncio.to_thread(run, **arguments)
    return await found if inspect.isawaitable(found) else found


async def _bounded(work: Awaitable[Any], seconds: float | None, clock: Clock) -> Any:
    """What *work* gives, or TimeoutError after *seconds* by *clock*."""
    if seconds is None:
        return await work
    task = asyncio.ensure_future(work)
    late = False

    def give_up() -> None:
        nonlocal late
        late = not task.done()
        task.cancel()

    timer = clock.call_at(clock.now() + seconds, give_up)
    try:
        return await task
    except asyncio.CancelledError:
        if late:
            raise TimeoutError from None
        task.cancel()
        raise
    finally:
        timer.cancel()


def _result(call: ToolCall, value: Any) -> ToolResult:
    """What a tool has returned, as text or as parts."""
    if isinstance(value, str):
        return ToolResult(call.id, value)
    if isinstance(value, ToolResult):
        return msgspec.structs.replace(value, id=call.id)
    parts = value if isinstance(value, (list, tuple)) else (value,)
    if parts and all(isinstance(part, (Text, Image, Document)) for part in parts):
        return ToolResult(call.id, tuple(parts))
    if value is None:
        return ToolResult(call.id, "done")
    if hasattr(value, "model_dump_json"):
        return ToolResult(call.id, value.model_dump_json())
    try:
        return ToolResult(call.id, msgspec.json.encode(value).decode())
    except (TypeError, ValueError):
        return ToolResult(call.id, str(value))


def _failed(call: ToolCall, complaint: str) -> ToolResult:
    return ToolResult(call.id, complaint[:MAX_COMPLAINT], error=True)


def _left(deadline: float | None, clock: Clock) -> float | None:
    if deadline is None:
        return None
    left = deadline - clock.now()
    if left <= 0.0:
        raise LLMDeadlineExceededError("the run's deadline has passed")
    return left


def _added(one: Usage, other: Usage) -> Usage:
    return Usage(*[getattr(one, name) + getattr(other, name) for name in Usage.__struct_fields__])
