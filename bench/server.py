"""The bench's server: canned answers as cheaply as Python can give them, in a process of its own.

It imports nothing of the package. What it sends is realistic (a vendor's headers, a reply of 1 KB, events of 300
bytes), and how it sends is the path's business: ``/v1/…`` answers at once, a streamed request under ``/burst/v1/…``
gets all events in one segment, one under ``/paced/v1/…`` one event a segment, one under ``/rich/v1/…`` a burst of
thinking and of a tool's arguments. ``…/v1/messages`` is Anthropic's dialect (at once or in a burst), any other path
OpenAI's.

Run as a script it prints its port and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

EVENTS = 400
PACE = 0.005
"""Seconds between two events of a paced stream."""

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 6
USAGE = {
    "prompt_tokens": 21,
    "completion_tokens": 97,
    "total_tokens": 118,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0},
}
REPLY = json.dumps(
    {
        "id": "chatcmpl-CqXy2bVt0pZ7Yh3KcD9eFgHiJkLmN",
        "object": "chat.completion",
        "created": 1795350000,
        "model": "gpt-6.1-terra",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "service_tier": "default",
        "system_fingerprint": "fp_3f2a9c81d0",
    }
).encode()

HEADERS = (
    b"date: Sun, 22 Nov 2026 10:00:00 GMT\r\nserver: cloudflare\r\n"
    b"x-request-id: req_5f8a1c2e9b7d4f60a1b2c3d4e5f60718\r\n"
    b"openai-organization: org-bench\r\nopenai-processing-ms: 412\r\nopenai-version: 2020-10-01\r\n"
    b"x-ratelimit-limit-requests: 50000000\r\nx-ratelimit-limit-tokens: 50000000000\r\n"
    b"x-ratelimit-remaining-requests: 49999999\r\nx-ratelimit-remaining-tokens: 49999999970\r\n"
    b"x-ratelimit-reset-requests: 6ms\r\nx-ratelimit-reset-tokens: 0s\r\n"
    b"strict-transport-security: max-age=31536000; includeSubDomains; preload\r\nx-content-type-options: nosniff\r\n"
    b'cf-cache-status: DYNAMIC\r\ncf-ray: 9a1b2c3d4e5f6071-FRA\r\nalt-svc: h3=":443"; ma=86400\r\n'
)
WHOLE = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    + HEADERS
    + b"content-length: %d\r\n\r\n" % len(REPLY)
    + REPLY
)
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    + HEADERS
    + b"transfer-encoding: chunked\r\n\r\n"
)


def event(delta: dict[str, object], finish: str | None = None, usage: object = None) -> bytes:
    """One chunk of a stream as the vendor frames it: about 300 bytes."""
    chunk: dict[str, object] = {
        "id": "chatcmpl-CqXy2bVt0pZ7Yh3KcD9eFgHiJkLmN",
        "object": "chat.completion.chunk",
        "created": 1795350000,
        "model": "gpt-6.1-terra",
        "service_tier": "default",
        "system_fingerprint": "fp_3f2a9c81d0",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}] if usage is None else [],
        "usage": usage,
    }
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


PIECES = [
    event({"role": "assistant", "content": "", "refusal": None}),
    *(event({"content": f" piece number {number:04d} of the text"}) for number in range(EVENTS)),
    event({}, "stop"),
    event({}, usage=USAGE),
    b"data: [DONE]\n\n",
]
BURST = HEAD + chunked(b"".join(PIECES)) + b"0\r\n\r\n"
SEGMENTS = [HEAD + chunked(PIECES[0]), *map(chunked, PIECES[1:-1]), chunked(PIECES[-1]) + b"0\r\n\r\n"]


ARGUMENT = '"piece %04d", '
"""A piece of a tool's arguments, which are a list of such words."""
RICH_PIECES = [
    event({"role": "assistant", "content": None, "refusal": None}),
    *(event({"reasoning_content": f" piece number {number:04d} of the thought"}) for number in range(EVENTS // 2)),
    event(
        {
            "tool_calls": [
                {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": ['}}
            ]
        }
    ),
    *(
        event({"tool_calls": [{"index": 0, "function": {"arguments": ARGUMENT % number}}]})
        for number in range(EVENTS // 2)
    ),
    event({"tool_calls": [{"index": 0, "function": {"arguments": '"end"]}'}}]}),
    event({}, "tool_calls"),
    event({}, usage=USAGE),
    b"data: [DONE]\n\n",
]
RICH_BURST = HEAD + chunked(b"".join(RICH_PIECES)) + b"0\r\n\r\n"

MESSAGE_USAGE = {
    "input_tokens": 21,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 97,
    "service_tier": "standard",
}


def message(text: str | None = None) -> dict[str, object]:
    """Anthropic's answer: whole with *text*, without it as a stream begins."""
    return {
        "id": "msg_01XqCy2bVt0pZ7Yh3KcD9eFg",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-5-5",
        "content": [] if text is None else [{"type": "text", "text": text}],
        "stop_reason": None if text is None else "end_turn",
        "stop_sequence": None,
        "usage": MESSAGE_USAGE,
    }


def message_event(kind: str, **fields: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), json.dumps({"type": kind, **fields}).encode())


MESSAGE = json.dumps(message(TEXT)).encode()
MESSAGE_WHOLE = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    + HEADERS
    + b"content-length: %d\r\n\r\n" % len(MESSAGE)
    + MESSAGE
)
MESSAGE_PIECES = [
    message_event("message_start", message=message()),
    message_event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    *(
        message_event(
            "content_block_delta",
            index=0,
            delta={"type": "text_delta", "text": f" piece number {number:04d} of the text"},
        )
        for number in range(EVENTS)
    ),
    message_event("content_block_stop", index=0),
    message_event(
        "message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 97}
    ),
    message_event("message_stop"),
]
RICH_MESSAGE_PIECES = [
    message_event("message_start", message=message()),
    message_event("content_block_start", index=0, content_block={"type": "thinking", "thinking": "", "signature": ""}),
    *(
        message_event(
            "content_block_delta",
            index=0,
            delta={"type": "thinking_delta", "thinking": f" piece number {number:04d} of the thought"},
        )
        for number in range(EVENTS // 2)
    ),
    message_event("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "c2ln" * 64}),
    message_event("content_block_stop", index=0),
    message_event(
        "content_block_start", index=1, content_block={"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
    ),
    *(
        message_event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": piece})
        for piece in ('{"a": [', *(ARGUMENT % number for number in range(EVENTS // 2)), '"end"]}')
    ),
    message_event("content_block_stop", index=1),
    message_event(
        "message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage={"output_tokens": 97}
    ),
    message_event("message_stop"),
]
RICH_MESSAGE_BURST = HEAD + chunked(b"".join(RICH_MESSAGE_PIECES)) + b"0\r\n\r\n"
MESSAGE_BURST = HEAD + chunked(b"".join(MESSAGE_PIECES)) + b"0\r\n\r\n"


class Server(asyncio.Protocol):
    """HTTP/1.1 for the one client there is: requests have a content-length and are never pipelined."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self.buffer) < end + 4 + length:
            return
        self.buffer = b""
        if b"/rich/" in head[:64]:
            self.transport.write(RICH_MESSAGE_BURST if b"/v1/messages" in head[:64] else RICH_BURST)
        elif b"/v1/messages" in head[:64]:
            self.transport.write(MESSAGE_BURST if b"/burst/" in head[:64] else MESSAGE_WHOLE)
        elif b"/burst/" in head[:64]:
            self.transport.write(BURST)
        elif b"/paced/" in head[:64]:
            self.send(0)
        else:
            self.transport.write(WHOLE)

    def send(self, number: int) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(SEGMENTS[number])
        if number + 1 < len(SEGMENTS):
            asyncio.get_running_loop().call_later(PACE, self.send, number + 1)


async def main() -> None:
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Server, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
