"""This package with everything on: three keys with three limits each that do not bind, metrics, records formatted."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import peer

from brimful import LLMManager


def configuration(base_url: str) -> dict[str, Any]:
    limits = {
        "requests_per_minute": 50_000_000,
        "input_tokens_per_minute": 50_000_000_000,
        "output_tokens_per_minute": 10_000_000_000,
    }
    provider = {
        "dialect": "openai",
        "base_url": base_url,
        "api_keys": ["bench-key-1", "bench-key-2", "bench-key-3"],
        "models": peer.MODEL,
        "rate_limits": limits,
    }
    return {"providers": {"openai": provider}}


@asynccontextmanager
async def connect(root: str) -> AsyncIterator[tuple[peer.Whole, peer.Burst]]:
    async with (
        LLMManager.from_config(configuration(f"{root}/v1")) as manager,
        LLMManager.from_config(configuration(f"{root}/burst/v1")) as bursting,
    ):
        client, streamer = manager.get_client(), bursting.get_client()

        async def whole() -> tuple[str, int]:
            response = await client.complete(peer.PROMPT)
            return response.text, response.usage.output_tokens

        async def burst() -> int:
            return len([chunk async for chunk in streamer.stream_complete(peer.PROMPT) if chunk.text])

        yield whole, burst


if __name__ == "__main__":
    handler = logging.StreamHandler(io.TextIOWrapper(io.FileIO(os.devnull, "w")))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.getLogger("brimful").addHandler(handler)
    logging.getLogger("brimful").setLevel(logging.INFO)
    logging.getLogger("brimful").propagate = False
    peer.run("brimful", connect)
