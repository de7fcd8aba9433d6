"""The least one can write on aiohttp and msgspec, beside which the others are put."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import bare
import peer

BODY = {"model": peer.MODEL, "messages": [{"role": "user", "content": peer.PROMPT}]}
STREAMED = BODY | {"stream": True, "stream_options": {"include_usage": True}}


@asynccontextmanager
async def connect(root: str) -> AsyncIterator[tuple[peer.Whole, peer.Burst]]:
    async with bare.session() as http:

        async def whole() -> tuple[str, int]:
            return await bare.complete(http, f"{root}/v1/chat/completions", BODY)

        async def burst() -> int:
            return len(
                [text async for text in bare.stream(http, f"{root}/burst/v1/chat/completions", STREAMED) if text]
            )

        yield whole, burst


if __name__ == "__main__":
    peer.run("aiohttp", connect)
