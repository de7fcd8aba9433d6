"""LiteLLM's Router: three deployments of one model with rpm and tpm limits that do not bind, ``simple-shuffle``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import peer
from litellm import Router  # type: ignore[import-not-found]  # installed in this peer's environment alone

MESSAGES: Any = [{"role": "user", "content": peer.PROMPT}]


def router(base_url: str) -> Any:
    deployments = [
        {
            "model_name": "bench",
            "litellm_params": {
                "model": f"openai/{peer.MODEL}",
                "api_key": f"bench-key-{number}",
                "api_base": base_url,
                "rpm": 50_000_000,
                "tpm": 50_000_000_000,
            },
        }
        for number in (1, 2, 3)
    ]
    return Router(model_list=deployments, routing_strategy="simple-shuffle", num_retries=0)


@asynccontextmanager
async def connect(root: str) -> AsyncIterator[tuple[peer.Whole, peer.Burst]]:
    client, streamer = router(f"{root}/v1"), router(f"{root}/burst/v1")

    async def whole() -> tuple[str, int]:
        reply = await client.acompletion(model="bench", messages=MESSAGES)
        return reply.choices[0].message.content, reply.usage.completion_tokens

    async def burst() -> int:
        stream = await streamer.acompletion(
            model="bench", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        return len([chunk async for chunk in stream if chunk.choices and chunk.choices[0].delta.content])

    yield whole, burst


if __name__ == "__main__":
    peer.run("litellm", connect)
