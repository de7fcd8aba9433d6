"""What we are measured against: the least one can write on aiohttp and msgspec. It imports nothing of the package."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec


class Function(msgspec.Struct):
    arguments: str = ""


class Call(msgspec.Struct):
    index: int = 0
    function: Function | None = None


class Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class Choice(msgspec.Struct):
    message: Message | None = None
    delta: Message | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Reply(msgspec.Struct):
    choices: list[Choice]
    usage: Usage | None = None


HEADERS = {"authorization": "Bearer key1", "content-type": "application/json"}
decode = msgspec.json.Decoder(Reply).decode


def session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    timeout = aiohttp.ClientTimeout(total=600, sock_connect=5, sock_read=120)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), timeout=timeout)


async def complete(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[str, int]:
    data = msgspec.json.encode(body)
    async with http.post(url, data=data, headers=HEADERS, allow_redirects=False) as response:
        reply = decode(await response.read())
    message, usage = reply.choices[0].message, reply.usage
    assert message is not None
    assert usage is not None
    return message.content or "", usage.completion_tokens


async def stream(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> AsyncIterator[str]:
    data, rest = msgspec.json.encode(body), b""
    async with http.post(url, data=data, headers=HEADERS, allow_redirects=False) as response:
        async for piece in response.content.iter_any():
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                if event != b"data: [DONE]":
                    for choice in decode(event[6:]).choices:
                        if choice.delta is not None and choice.delta.content:
                            yield choice.delta.content


class Delta(msgspec.Struct):
    thinking: str | None = None
    partial_json: str | None = None


class Event(msgspec.Struct):
    type: str
    delta: Delta | None = None


decode_event = msgspec.json.Decoder(Event).decode


async def rich(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> AsyncIterator[tuple[str, str]]:
    """Pieces of thinking and of a tool's arguments; the path tells the dialect."""
    data, rest = msgspec.json.encode(body), b""
    theirs = url.endswith("/messages")
    async with http.post(url, data=data, headers=HEADERS, allow_redirects=False) as response:
        async for piece in response.content.iter_any():
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                if theirs:
                    said = decode_event(event.partition(b"\ndata: ")[2]).delta
                    if said is not None and (said.thinking or said.partial_json):
                        yield said.thinking or "", said.partial_json or ""
                elif event != b"data: [DONE]":
                    for choice in decode(event[6:]).choices:
                        delta = choice.delta
                        if delta is not None and delta.reasoning_content:
                            yield delta.reasoning_content, ""
                        elif delta is not None:
                            for call in delta.tool_calls or ():
                                if call.function is not None:
                                    yield "", call.function.arguments
