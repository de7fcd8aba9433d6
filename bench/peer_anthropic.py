"""Anthropic's own SDK, on the server's Anthropic path: one client, one key, no limits to keep."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import peer
from anthropic import AsyncAnthropic

REQUEST: dict[str, Any] = {
    "model": "claude-haiku-5-5",
    "max_tokens": 1024,
    "messages": [{"role": "user", "content": peer.PROMPT}],
}


@asynccontextmanager
async def connect(root: str) -> AsyncIterator[tuple[peer.Whole, peer.Burst]]:
    async with (
        AsyncAnthropic(api_key="bench-key-1", base_url=root, max_retries=0) as client,
        AsyncAnthropic(api_key="bench-key-1", base_url=f"{root}/burst", max_retries=0) as streamer,
    ):

        async def whole() -> tuple[str, int]:
            reply = await client.messages.create(**REQUEST)
            return reply.content[0].text, reply.usage.output_tokens

        async def burst() -> int:
            stream = await streamer.messages.create(**REQUEST, stream=True)
            return len([event async for event in stream if event.type == "content_block_delta" and event.delta.text])

        yield whole, burst


if __name__ == "__main__":
    peer.run("anthropic", connect)
