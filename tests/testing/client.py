"""A client that sees everything: what the simulator's tests ask it with."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import msgspec

from llm.testing.simulator import Simulator

QUESTION = [{"role": "user", "content": "tell me about the sea"}]
ECHO = "You said: tell me about the sea"
DIALECTS = ("anthropic", "openai")


class Reply(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    def events(self) -> list[tuple[str | None, Any]]:
        """The stream as pairs of event name and payload; ``[DONE]`` stays a string."""
        found = []
        for block in self.body.decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines())
            if "data" in lines:
                data = lines["data"]
                found.append((lines.get("event"), data if data == "[DONE]" else json.loads(data)))
        return found


class Client:
    """One aiohttp session that speaks both dialects."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def raw(self, simulator: Simulator, method: str, path: str, **options: Any) -> Reply:
        async with self.session.request(method, simulator.url + path, **options) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, headers, await response.read())

    async def ask(
        self, simulator: Simulator, dialect: str, key: str = "key-1", *, headers: Any = None, **body: Any
    ) -> Reply:
        if dialect == "anthropic":
            given = {"anthropic-version": "2023-06-01", "x-api-key": key}
            path, default = "/v1/messages", {"model": "claude-opus-5-5", "max_tokens": 100, "messages": QUESTION}
        else:
            given = {"authorization": f"Bearer {key}"}
            path, default = "/v1/chat/completions", {"model": "gpt-6-luna", "messages": QUESTION}
        sent = {name: value for name, value in (default | body).items() if value is not ...}
        return await self.raw(simulator, "POST", path, headers=given | (headers or {}), json=sent)


def text(dialect: str, reply: Reply) -> str:
    body = reply.json()
    return str(body["content"][0]["text"] if dialect == "anthropic" else body["choices"][0]["message"]["content"])


def deltas(dialect: str, reply: Reply) -> list[str]:
    found = []
    for _, data in reply.events():
        if dialect == "anthropic" and data["type"] == "content_block_delta":
            found.append(data["delta"]["text"])
        elif dialect == "openai" and data != "[DONE]" and data.get("choices"):
            found.append(data["choices"][0]["delta"].get("content", ""))
    return [delta for delta in found if delta]


def error_type(reply: Reply) -> Any:
    return reply.json()["error"]["type"]


async def read_partly(
    simulator: Simulator, client: Client, dialect: str, *, stream: bool, patience: float | None = None
) -> tuple[bytes, str]:
    """What arrived before the exchange ended, and how: *patience* is for the whole of it, in seconds."""
    path = "/v1/messages" if dialect == "anthropic" else "/v1/chat/completions"
    headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
    body = {"model": "m", "max_tokens": 100, "messages": QUESTION, "stream": stream}
    arrived = b""
    timeout = aiohttp.ClientTimeout(sock_read=0.1 if patience is None else None, total=patience)
    try:
        async with client.session.post(simulator.url + path, headers=headers, json=body, timeout=timeout) as response:
            assert response.status == 200
            async for chunk in response.content.iter_any():
                arrived += chunk
    except TimeoutError:
        return arrived, "silence" if patience is None else "slow"
    except aiohttp.ClientError as error:
        return arrived, type(error).__name__
    return arrived, "end"
