"""A manager on a clock that only the test moves and a transport that plays a script, for whoever tests above them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from llm.core.client import LLMClient
from llm.core.manager import LLMManager
from llm.testing.clock import FakeClock
from llm.testing.transport import Script, Scripted, ScriptedTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from llm.transports.base import HTTPRequest

BASE_URL = "http://vendor.test/v1"
JSON = {"content-type": "application/json"}
SSE = {"content-type": "text/event-stream"}
PROMPT = "a prompt that nobody else may read"


def secret(number: int) -> str:
    """The key that stands at *number* of the configuration."""
    return f"sk-very-secret-{number}"


def configuration(keys: int = 1, *, middleware: Mapping[str, Any] | None = None, **provider: Any) -> dict[str, Any]:
    """A configuration of one provider ``vendor``, speaking Chat Completions, with *keys* keys.

    Without a slow start: what a test offers together is to go together.
    """
    provider.setdefault("models", "m")
    layers = dict(middleware or {})
    layers["rate_limiter"] = {"slow_start": False, **layers.get("rate_limiter", {})}
    return {
        "providers": {
            "vendor": {
                "dialect": "openai",
                "base_url": BASE_URL,
                "api_keys": [secret(number) for number in range(1, keys + 1)],
                **provider,
            }
        },
        "middleware": layers,
    }


def answer(text: str = "hello", *, model: str = "m", tokens: tuple[int, int] = (3, 2), **more: Any) -> Scripted:
    """A good whole answer."""
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
    }
    return Scripted(200, JSON | {"x-request-id": "req-1"}, msgspec.json.encode(body), **more)


def asking(*calls: tuple[str, Any], text: str | None = None, reason: str = "tool_calls") -> Scripted:
    """An answer that asks for tools: their names, and their arguments or what stands in their place."""
    wired = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": given if isinstance(given, str) else msgspec.json.encode(given).decode(),
            },
        }
        for number, (name, given) in enumerate(calls, 1)
    ]
    message = {"role": "assistant", "content": text, "tool_calls": wired}
    body = {
        "id": "chatcmpl-1",
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    return Scripted(200, JSON, msgspec.json.encode(body))


def delta(text: str) -> bytes:
    """One event of a stream."""
    chunk = {"id": "chatcmpl-1", "model": "m", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


END = (
    b'data: {"id":"chatcmpl-1","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"id":"chatcmpl-1","model":"m","choices":[],'
    b'"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
    b"data: [DONE]\n\n"
)
"""How a stream ends well."""


def stream(*pieces: bytes | float | BaseException, **more: Any) -> Scripted:
    """A streamed answer; it ends where the pieces do."""
    return Scripted(200, SSE | {"x-request-id": "req-1"}, pieces=pieces, **more)


def failure(status: int, message: str = "no", *, code: str | None = None, **headers: str) -> Scripted:
    """An answer that is an error."""
    error = {"message": message, "type": None, "code": code}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Scripted(status, JSON | {"x-request-id": "req-e"} | named, msgspec.json.encode({"error": error}))


def key_of(request: HTTPRequest) -> int:
    """The number of the key that *request* was sent with."""
    return int(request.headers["authorization"].rpartition("-")[2])


def model_of(request: HTTPRequest) -> str:
    return str(msgspec.json.decode(request.body)["model"])


def is_probe(request: HTTPRequest) -> bool:
    return request.method == "GET"


class Rig(NamedTuple):
    """What a test holds of it."""

    manager: LLMManager
    client: LLMClient
    clock: FakeClock
    transport: ScriptedTransport

    @property
    def keys(self) -> list[int]:
        """The keys of the requests that were sent, in order, without probes."""
        return [key_of(request) for request in self.transport.requests if not is_probe(request)]

    @property
    def probes(self) -> list[int]:
        """The keys that were probed."""
        return [key_of(request) for request in self.transport.requests if is_probe(request)]

    @property
    def states(self) -> list[str]:
        """What the status says of each key."""
        return [key["state"] for key in self.manager.get_status()["providers"]["vendor"]["keys"]]


def build(script: Script = (), *, config: Mapping[str, Any] | None = None, **more: Any) -> Rig:
    """A rig; chance is always 0.0, so that backoff takes no time and pauses are what was asked."""
    clock = FakeClock()
    transport = ScriptedTransport(script, clock=clock)
    manager = LLMManager.from_config(
        config if config is not None else configuration(),
        environ={},
        clock=clock,
        random=more.pop("random", lambda: 0.0),
        transport=lambda settings, clock: transport,
        **more,
    )
    return Rig(manager, manager.get_client(), clock, transport)


@asynccontextmanager
async def rig(script: Script = (), *, config: Mapping[str, Any] | None = None, **more: Any) -> AsyncIterator[Rig]:
    """A rig that is closed at the end, and then has left no timer and no connection."""
    # It reads files: not on the loop.
    built = await asyncio.to_thread(build, script, config=config, **more)
    async with built.manager:
        yield built
    assert built.clock.timers == 0, "a closed manager leaves no timer"
    assert built.transport.statistics()["open"] == 0, "a closed manager leaves no connection"
