"""A tour of structured answers: values of your own types, checked, repaired, and seen while they grow.

It needs no API key: without one it talks real HTTP to the simulator that comes with the package.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
if importlib.util.find_spec("brimful") is None and (SOURCE / "brimful.py").exists():
    sys.path.insert(0, str(SOURCE))  # a checkout that is not installed

try:
    import aiohttp  # noqa: F401  the package imports it when it is needed; here it is better told at once
    import yaml  # noqa: F401

    from brimful import LLMClient, LLMException, LLMManager
    from brimful.testing.saying import Said
    from brimful.testing.simulator import Simulator, SimulatorSettings
except ImportError as missing:
    print(f"This example cannot run: {missing}.", file=sys.stderr)
    print("To mend it, in a checkout:  make setup\nor:  python -m pip install PATH_TO_THE_CHECKOUT", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)


@dataclass
class Ingredient:
    name: str
    grams: int


@dataclass
class Recipe:
    title: str
    minutes: int
    ingredients: list[Ingredient] = field(default_factory=list)


GOOD = '{"title":"Porridge","minutes":10,"ingredients":[{"name":"oats","grams":80},{"name":"milk","grams":250}]}'
BAD = '{"title":"Porridge","minutes":"about ten","ingredients":[]}'


def script(body: dict[str, Any]) -> Said:
    """What the simulator says: wrong at first, then what was asked for."""
    return Said(BAD if len(body["messages"]) == 1 and not body.get("stream") else GOOD)


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
        recipe = await client.parse("A recipe for porridge, for one.", into=Recipe, repairs=2)
        print(f"{recipe.title}, {recipe.minutes} minutes")
        for ingredient in recipe.ingredients:
            print(f"  {ingredient.grams:>4} g {ingredient.name}")

        print("\nand while it is written:")
        async for value in client.stream_parse("Another one.", into=Recipe):
            print("\r", value, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except LLMException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
