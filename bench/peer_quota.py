"""The workers of ``peers_quota.py``: ``peer_quota.py NAME BASE_URL`` makes calls when they are due and says what came.

Each runs in its peer's own environment, which has one of the two packages and not the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

from peer import MODEL, PROMPT

Ask = Callable[[], Awaitable[str]]
TOKENS = 1_000_000
"""A minute, of each key: configured, and never reached."""


@asynccontextmanager
async def brimful(base_url: str, keys: int, requests: int) -> AsyncIterator[Ask]:
    import brimful

    provider = {
        "dialect": "openai",
        "base_url": base_url,
        "api_keys": [f"bench-key-{number}" for number in range(1, keys + 1)],
        "models": MODEL,
        "rate_limits": {"requests_per_minute": requests, "tokens_per_minute": TOKENS},
    }
    async with brimful.LLMManager.from_config({"providers": {"openai": provider}}) as manager:
        client = manager.get_client()

        async def ask() -> str:
            return await client.chat(PROMPT)

        yield ask


@asynccontextmanager
async def litellm(base_url: str, keys: int, requests: int) -> AsyncIterator[Ask]:
    from litellm import Router  # type: ignore[import-not-found]  # installed in this peer's environment alone

    deployments = [
        {
            "model_name": "bench",
            "litellm_params": {
                "model": f"openai/{MODEL}",
                "api_key": f"bench-key-{number}",
                "api_base": base_url,
                "rpm": requests,
                "tpm": TOKENS,
            },
        }
        for number in range(1, keys + 1)
    ]
    router: Any = Router(model_list=deployments, routing_strategy="usage-based-routing-v2")
    messages = [{"role": "user", "content": PROMPT}]

    async def ask() -> str:
        reply = await router.acompletion(model="bench", messages=messages)
        return str(reply.choices[0].message.content)

    yield ask


WAYS = {"brimful": brimful, "litellm": litellm}


async def call(ask: Ask, due: float) -> tuple[float, str]:
    """Seconds from *due* until the end, and the class of the error if it was one."""
    try:
        assert await ask()
    except asyncio.CancelledError:
        return time.monotonic() - due, "still waiting"
    except Exception as error:
        return time.monotonic() - due, type(error).__name__
    return time.monotonic() - due, ""


async def work(name: str, base_url: str, plan: dict[str, Any]) -> dict[str, Any]:
    begin: float = plan["begin"]
    async with WAYS[name](base_url, plan["keys"], plan["requests"]) as ask:
        tasks = []
        for offset in plan["due"]:
            await asyncio.sleep(max(0.0, begin + offset - time.monotonic()))
            tasks.append(asyncio.ensure_future(call(ask, begin + offset)))
        _, late = await asyncio.wait(tasks, timeout=plan["patience"])
        for task in late:
            task.cancel()
        calls = await asyncio.gather(*tasks)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        version = "checkout"
    return {"version": version, "begun": begin, "calls": calls}


def main() -> None:
    # What a peer prints goes to standard error: lines are for the driver.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, base_url = sys.argv[1:]
    __import__(name)
    print("ready", file=lines, flush=True)
    answer = asyncio.run(work(name, base_url, json.loads(sys.stdin.readline())))
    print(json.dumps(answer), file=lines, flush=True)


if __name__ == "__main__":
    main()
