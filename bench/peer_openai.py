"""OpenAI's own SDK: one client, one key, no limits to keep."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import peer
from openai import AsyncOpenAI

MESSAGES: Any = [{"role": "user", "content": peer.PROMPT}]


@asynccontextmanager
async def connect(root: str) -> AsyncIterator[tuple[peer.Whole, peer.Burst]]:
    async with (
        AsyncOpenAI(api_key="bench-key-1", base_url=f"{root}/v1", max_retries=0) as client,
        AsyncOpenAI(api_key="bench-key-1", base_url=f"{root}/burst/v1", max_retries=0) as streamer,
    ):

        async def whole() -> tuple[str, int]:
            reply = await client.chat.completions.create(model=peer.MODEL, messages=MESSAGES)
            usage = reply.usage
            return reply.choices[0].message.content or "", usage.completion_tokens if usage is not None else 0

        async def burst() -> int:
            stream = await streamer.chat.completions.create(
                model=peer.MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
            return len([chunk async for chunk in stream if chunk.choices and chunk.choices[0].delta.content])

        yield whole, burst


if __name__ == "__main__":
    peer.run("openai", connect)
