"""A tour of tools: functions that the model may call, run for it until it has its answer.

It needs no API key: without one it talks real HTTP to the simulator that comes with the package.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

SOURCE = Path(__file__).resolve().parents[1] / "src"
if importlib.util.find_spec("brimful") is None and (SOURCE / "brimful.py").exists():
    sys.path.insert(0, str(SOURCE))  # a checkout that is not installed

try:
    import aiohttp  # noqa: F401  the package imports it when it is needed; here it is better told at once
    import yaml  # noqa: F401

    from brimful import LLMClient, LLMException, LLMManager, ToolCall
    from brimful.testing.saying import Said
    from brimful.testing.simulator import Simulator, SimulatorSettings
except ImportError as missing:
    print(f"This example cannot run: {missing}.", file=sys.stderr)
    print("To mend it, in a checkout:  make setup\nor:  python -m pip install PATH_TO_THE_CHECKOUT", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)


def weather(city: str, unit: Literal["C", "F"] = "C") -> dict[str, Any]:
    """The weather in a city, now.

    Args:
        city: Its name, in English.
        unit: Of the temperature.
    """
    return {"city": city, "sky": "rain", "temperature": 7 if unit == "C" else 45}


async def book(city: str, nights: Annotated[int, "how many"] = 1) -> str:
    """Book a hotel. It costs money."""
    await asyncio.sleep(0.1)
    return f"booked in {city} for {nights} nights"


def approve(call: ToolCall) -> bool | str:
    """What costs money is not for a model to decide alone."""
    return "ask me again tomorrow" if call.name == "book" else True


def script(body: dict[str, Any]) -> Said:
    """What the simulator says: two calls at first, then what came of them."""
    results = [
        block for block in body["messages"][-1]["content"] if isinstance(block, dict) and block["type"] == "tool_result"
    ]
    if not results:
        calls = (("weather", {"city": "Oslo"}), ("book", {"city": "Oslo", "nights": 2}))
        return Said("I look, and book.", calls)
    told = "; ".join(f"{block['content']}" for block in results)
    return Said(f"This is what I found: {told}. So take an umbrella.")


@asynccontextmanager
async def connect() -> AsyncIterator[LLMClient]:
    """A client of whichever vendor has a key in the environment, else of the simulator, which plays a script."""
    if any(name in os.environ for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY")):
        async with await asyncio.to_thread(LLMManager.discover) as manager:
            yield manager.get_client()
        return
    async with Simulator(SimulatorSettings(reply=script)) as simulator:
        print("No API key in the environment: this is the simulator, and what it says is written beforehand.\n")
        config = {"providers": {"anthropic": {"api_keys": ["a-key"], "base_url": simulator.url}}}
        async with await asyncio.to_thread(LLMManager.from_config, config) as manager:
            yield manager.get_client()


async def main() -> None:
    async with connect() as client:
        run = await client.run_tools(
            "I am going to Oslo for two nights. How is the weather there? Book me a hotel, too.",
            tools=[weather, book],
            approve=approve,
            on_round=lambda response: print("the model:", response.text, *[f"→ {c.name}" for c in response.tool_calls]),
            max_rounds=5,
            tool_timeout=10.0,
            timeout=120.0,
        )
        print(f"\n{run}\n")
        print(f"{run.rounds} rounds, {run.usage.total_tokens} tokens, {len(run.messages)} messages in the conversation")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except LLMException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
