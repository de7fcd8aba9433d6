"""What a call costs, beside the least one could write: ``make bench``.

Everything is measured in one process against ``server.py`` in another, pinned to different cores where there are two.
CPU is the process's own (``time.process_time``); (a) the bare transport and (b) our client take turns, round by round,
and medians of rounds are shown with their ratio. On a noisy machine trust the ratios. ``docs/performance.md`` explains
each figure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import gc
import io
import json
import logging
import os
import platform
import pstats
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import bare
import openai
import server as canned

import brimful
from llm.transports.base import Exchange

PROMPT = "Say something about foxes and dogs, please."
BODY = {"model": "gpt-6.1-terra", "messages": [{"role": "user", "content": PROMPT}]}
STREAM_BODY = BODY | {"stream": True, "stream_options": {"include_usage": True}}
ROUNDS = 11

Work = Callable[[], Awaitable[object]]


class CannedServer:
    """``server.py`` as a process of its own."""

    def __enter__(self) -> CannedServer:
        script = Path(__file__).with_name("server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()

    def url(self, mode: str = "") -> str:
        return f"http://127.0.0.1:{self.port}{mode}/v1"


def configuration(base_url: str, requests: int | None = None, max_size: int = 1000) -> dict[str, Any]:
    """Three keys with three limits each; unless *requests* says otherwise they do not bind."""
    limits = {
        "requests_per_minute": requests or 50_000_000,
        "input_tokens_per_minute": 50_000_000_000,
        "output_tokens_per_minute": 10_000_000_000,
    }
    provider = {
        "dialect": "openai",
        "base_url": base_url,
        "api_keys": ["bench-key-1", "bench-key-2", "bench-key-3"],
        "models": "gpt-6.1-terra",
        "rate_limits": limits,
        "pool": {"max_size": max_size},
    }
    return {"providers": {"openai": provider}}


async def spend(work: Work, *, calls: int, concurrency: int) -> float:
    """Microseconds of CPU a call, with *concurrency* callers in closed loops."""

    async def caller() -> None:
        for _ in range(calls // concurrency):
            await work()

    started = time.process_time()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return (time.process_time() - started) / (calls // concurrency * concurrency) * 1e6


async def interleaved(works: dict[str, Work], *, calls: int, concurrency: int, rounds: int) -> dict[str, list[float]]:
    """The costs of each of *works*, round by round, taking turns."""
    for work in works.values():
        await spend(work, calls=max(concurrency, calls // 4), concurrency=concurrency)
    costs: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        # Who goes first changes, so that neither always runs on the other's warm or littered heap.
        order = list(works.items())
        for name, work in order if number % 2 else reversed(order):
            gc.collect()
            costs[name].append(await spend(work, calls=calls, concurrency=concurrency))
    return costs


def compare(costs: dict[str, list[float]], ours: str, theirs: str, *, per: int = 1) -> dict[str, float]:
    """Medians, and the median of the rounds' ratios."""
    ratios = [a / b for a, b in zip(costs[ours], costs[theirs], strict=True)]
    return {
        "bare_us": round(statistics.median(costs[theirs]) / per, 2),
        "brimful_us": round(statistics.median(costs[ours]) / per, 2),
        "ratio": round(statistics.median(ratios), 3),
    }


async def whole(base: CannedServer, rounds: int) -> dict[str, Any]:
    """(b) over (a): answers in one piece."""
    url = base.url() + "/chat/completions"
    found: dict[str, Any] = {}
    async with bare.session() as http, brimful.LLMManager.from_config(configuration(base.url())) as manager:
        client = manager.get_client()

        async def ours() -> None:
            response = await client.complete(PROMPT)
            assert response.text
            assert response.usage.output_tokens

        async def theirs() -> None:
            text, tokens = await bare.complete(http, url, BODY)
            assert text
            assert tokens

        for concurrency, calls in ((1, 500), (64, 2560), (500, 4000)):
            costs = await interleaved(
                {"bare": theirs, "brimful": ours}, calls=calls, concurrency=concurrency, rounds=rounds
            )
            found[f"concurrency {concurrency}"] = compare(costs, "brimful", "bare")
    return found


async def layers(base: CannedServer, rounds: int) -> dict[str, Any]:
    """What goes when layers are switched off, one more in each row, with 64 callers."""
    url = base.url() + "/chat/completions"
    off = {"enabled": False}
    rows: dict[str, dict[str, Any]] = {
        "all layers": {},
        "without logging": {"logging": off},
        "and without metrics": {"logging": off, "metrics": off},
        "and without retry": {"logging": off, "metrics": off, "retry": off},
    }
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(bare.session())
        works: dict[str, Work] = {"bare": lambda: bare.complete(http, url, BODY)}
        for name, chosen in rows.items():
            config = configuration(base.url()) | {"middleware": chosen}
            manager = await stack.enter_async_context(brimful.LLMManager.from_config(config))
            works[name] = partial(manager.get_client().complete, PROMPT)
        costs = await interleaved(works, calls=1920, concurrency=64, rounds=rounds)
    return {name: compare(costs, name, "bare") for name in rows}


class Canned:
    """A transport that has answered before it is asked."""

    status = 200
    headers: Mapping[str, str] = {"content-type": "application/json"}

    def __init__(self, body: bytes) -> None:
        self.body = body

    async def send(self, request: object, exchange: Exchange) -> Canned:
        if exchange.on_connection is not None:
            exchange.on_connection()
        exchange.written = exchange.started = True
        return self

    async def read(self) -> bytes:
        return self.body

    async def read_some(self) -> bytes:
        return b""

    def close(self) -> object:
        return asyncio.sleep(0)

    def statistics(self) -> dict[str, int]:
        return {}


RESILIENCE = ("resume", "fallback", "hedge", "circuit_breaker")


async def resilience(base: CannedServer, rounds: int) -> dict[str, Any]:
    """What the layers that survive failures add to a call that meets none: without I/O, and over HTTP."""
    found: dict[str, Any] = {}
    url = base.url()

    def chained(hedged: bool) -> dict[str, Any]:
        config = configuration(url)
        config["providers"]["openai"]["fallback"] = "others"
        config["fallbacks"] = {"others": [{"provider": "openai", "model": "gpt-6-luna"}]}
        config["middleware"] = {"logging": {"enabled": False}, "hedge": {"enabled": hedged, "after": 60}}
        return config

    def without(layers: list[Any]) -> list[Any]:
        return [layer for layer in layers if layer.name not in RESILIENCE]

    async with (
        bare.session() as http,
        http.post(url + "/chat/completions", json=BODY, headers=bare.HEADERS) as response,
    ):
        body = await response.read()
    for place, concurrency, calls in (("without I/O", 1, 4000), ("over HTTP", 64, 1920)):
        more: dict[str, Any] = {} if concurrency > 1 else {"transport": lambda settings, clock: Canned(body)}
        async with contextlib.AsyncExitStack() as stack:
            works: dict[str, Work] = {}
            for name, hedged, arrange in (("none", False, without), ("all", False, None), ("hedged", True, None)):
                config = chained(hedged)
                if name == "none":
                    config["middleware"]["circuit_breaker"] = {"enabled": False}
                manager = await stack.enter_async_context(
                    brimful.LLMManager.from_config(config, arrange=arrange, **more)
                )
                works[name] = partial(manager.get_client().complete, PROMPT)
            costs = await interleaved(works, calls=calls, concurrency=concurrency, rounds=rounds)
        for name, label in (("all", "breaker, chain, resume"), ("hedged", "and hedge")):
            added = statistics.median(a - b for a, b in zip(costs[name], costs["none"], strict=True))
            found[f"{place}: {label}"] = {
                "added_us": round(added, 2),
                "of_us": round(statistics.median(costs["none"]), 1),
            }
    return found


async def streamed(base: CannedServer, rounds: int) -> dict[str, Any]:
    """(c) the same as streams, per event."""
    found: dict[str, Any] = {}
    for mode, concurrency, calls in (("burst", 1, 20), ("burst", 32, 96), ("paced", 32, 32)):
        url = base.url("/" + mode)
        async with bare.session() as http, brimful.LLMManager.from_config(configuration(url)) as manager:
            client = manager.get_client()

            async def ours(client: brimful.LLMClient = client) -> None:
                pieces = 0
                async for chunk in client.stream_complete(PROMPT):
                    pieces += bool(chunk.text)
                assert pieces == canned.EVENTS

            async def theirs(http: aiohttp.ClientSession = http, url: str = url + "/chat/completions") -> None:
                pieces = 0
                async for text in bare.stream(http, url, STREAM_BODY):
                    pieces += bool(text)
                assert pieces == canned.EVENTS

            costs = await interleaved(
                {"bare": theirs, "brimful": ours}, calls=calls, concurrency=concurrency, rounds=rounds
            )
        found[f"{mode}, concurrency {concurrency}"] = compare(costs, "brimful", "bare", per=len(canned.PIECES))
    return found


async def rich(base: CannedServer, rounds: int) -> dict[str, Any]:
    """Streams of thinking and of a tool's arguments, per event, in bursts; and OpenAI's SDK, in the same rounds."""
    found: dict[str, Any] = {}
    url = base.url("/rich")
    dialects = {
        "openai": (url, url + "/chat/completions", len(canned.RICH_PIECES)),
        "anthropic": (url, url + "/messages", len(canned.RICH_MESSAGE_PIECES)),
    }
    for dialect, (ours_at, theirs_at, events) in dialects.items():
        config = configuration(ours_at)
        provider = config["providers"].pop("openai") | {"dialect": dialect}
        config["providers"]["vendor"] = provider
        async with bare.session() as http, brimful.LLMManager.from_config(config) as manager:
            client = manager.get_client()

            async def ours(client: brimful.LLMClient = client) -> None:
                pieces = 0
                async with client.stream_complete(PROMPT) as stream:
                    async for chunk in stream:
                        pieces += bool(chunk.thinking or (chunk.tool_call and chunk.tool_call.arguments))
                    (call,) = stream.response().tool_calls
                assert call.arguments.endswith("]}")
                assert pieces == canned.EVENTS + 2

            async def theirs(http: aiohttp.ClientSession = http, url: str = theirs_at) -> None:
                arguments = []
                pieces = 0
                async for thought, more in bare.rich(http, url, STREAM_BODY):
                    pieces += bool(thought or more)
                    if more:
                        arguments.append(more)
                assert "".join(arguments).endswith("]}")
                assert pieces == canned.EVENTS + 2

            works: dict[str, Work] = {"bare": theirs, "brimful": ours}
            async with openai.AsyncOpenAI(api_key="bench-key-1", base_url=url, max_retries=0) as sdk:

                async def vendors() -> None:
                    asked: Any = STREAM_BODY
                    stream = await sdk.chat.completions.create(**asked)
                    assert len([chunk async for chunk in stream if chunk.choices]) > canned.EVENTS

                if dialect == "openai":
                    works["sdk"] = vendors
                costs = await interleaved(works, calls=64, concurrency=32, rounds=rounds)
        found[f"{dialect}, concurrency 32"] = compare(costs, "brimful", "bare", per=events)
        if "sdk" in costs:
            ratios = [a / b for a, b in zip(costs["sdk"], costs["brimful"], strict=True)]
            found["OpenAI's SDK"] = {
                "sdk_us": round(statistics.median(costs["sdk"]) / events, 2),
                "over_brimful": round(statistics.median(ratios), 1),
            }
    return found


async def profiled(work: Work, requests: int = 200) -> float:
    """Function calls a request, sequential, under cProfile."""
    for _ in range(20):
        await work()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(requests):
        await work()
    profile.disable()
    return round(int(pstats.Stats(profile).total_calls) / requests, 1)  # type: ignore[attr-defined]


async def function_calls(base: CannedServer) -> dict[str, float]:
    """Deterministic, so it is what CI checks. The logger is at WARNING: formatting is the user's choice."""
    url = base.url() + "/chat/completions"
    level = logging.getLogger("brimful").level
    logging.getLogger("brimful").setLevel(logging.WARNING)
    try:
        async with bare.session() as http, brimful.LLMManager.from_config(configuration(base.url())) as manager:
            client = manager.get_client()
            return {
                "bare": await profiled(lambda: bare.complete(http, url, BODY)),
                "brimful": await profiled(lambda: client.complete(PROMPT)),
            }
    finally:
        logging.getLogger("brimful").setLevel(level)


def imports(rounds: int = 15) -> dict[str, float]:
    """Milliseconds of CPU that ``import brimful`` takes beyond ``import asyncio, msgspec``, byte code cached."""

    def cost(statement: str) -> float:
        code = f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
        return float(output.stdout) * 1e3

    # Where byte code may not be written, the time of compiling would be measured.
    environ = {name: value for name, value in ENVIRON.items() if name != "PYTHONDONTWRITEBYTECODE"}
    cost("import brimful")
    pairs = [(cost("import asyncio, msgspec"), cost("import asyncio, msgspec, brimful")) for _ in range(rounds)]
    return {
        "asyncio_msgspec_ms": round(statistics.median(base for base, _ in pairs), 1),
        "brimful_ms": round(statistics.median(ours - base for base, ours in pairs), 1),
    }


AT_ONCE = 64


async def crowds(base: CannedServer, sizes: tuple[int, int] = (100, 10_000), rounds: int = 5) -> dict[str, Any]:
    """CPU a call when 100 and when 10,000 are offered at once and 64 may run: ours, and bare tasks at a semaphore."""
    url = base.url() + "/chat/completions"
    costs: dict[str, list[float]] = {}
    async with (
        bare.session() as http,
        brimful.LLMManager.from_config(configuration(base.url(), max_size=AT_ONCE)) as manager,
    ):
        client = manager.get_client()
        semaphore = asyncio.Semaphore(AT_ONCE)

        async def theirs() -> None:
            async with semaphore:
                await bare.complete(http, url, BODY)

        async def ours() -> None:
            await client.complete(PROMPT)

        async def crowd(work: Work, size: int) -> float:
            started = time.process_time()
            for _ in range(max(sizes) // size):
                await asyncio.gather(*(work() for _ in range(size)))
            return (time.process_time() - started) / max(sizes) * 1e6

        for number in range(rounds + 1):
            for collector in (True, False):
                for name, work in (("brimful", ours), ("bare", theirs)):
                    for size in sizes:
                        gc.collect()
                        (gc.enable if collector else gc.disable)()
                        cost = await crowd(work, size)
                        gc.enable()
                        if number:
                            key = f"{name} {size} {'collected' if collector else 'uncollected'}"
                            costs.setdefault(key, []).append(cost)
    medians = {key: statistics.median(values) for key, values in costs.items()}

    def growth(name: str, collector: str) -> float:
        few, many = (medians[f"{name} {size} {collector}"] for size in sizes)
        return many / few

    return {
        "brimful_growth_uncollected": round(growth("brimful", "uncollected"), 3),
        "brimful_growth": round(growth("brimful", "collected"), 3),
        "bare_growth": round(growth("bare", "collected"), 3),
        "growth_ratio": round(growth("brimful", "collected") / growth("bare", "collected"), 3),
    }


async def waiting(base: CannedServer) -> dict[str, Any]:
    """Calls in the queue: bytes each, and what their mere presence costs while its head is blocked."""
    config = configuration(base.url(), requests=1)
    messages = [brimful.Message(brimful.MessageRole.USER, PROMPT)]
    found: dict[str, Any] = {"cost by queue": await crowds(base)}
    async with brimful.LLMManager.from_config(config) as manager:
        client = manager.get_client()
        await asyncio.gather(*(client.complete(messages) for _ in range(3)))
        logging.getLogger("brimful").setLevel(logging.ERROR)
        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        tasks = [asyncio.ensure_future(client.complete(messages)) for _ in range(10_000)]
        await asyncio.sleep(0.5)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        found["bytes_each"] = round((after - before) / len(tasks))
        await asyncio.sleep(2.5)
        started, cpu = time.monotonic(), time.process_time()
        await asyncio.sleep(5.0)
        found["percent_of_a_core"] = round((time.process_time() - cpu) / (time.monotonic() - started) * 100, 3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        logging.getLogger("brimful").setLevel(logging.INFO)
    return found


ENVIRON = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


SECTIONS: dict[str, Callable[[CannedServer, int], Awaitable[dict[str, Any]]]] = {
    "function_calls": lambda base, _: function_calls(base),
    "whole": whole,
    "layers": layers,
    "resilience": resilience,
    "streamed": streamed,
    "rich": rich,
    "waiting": lambda base, _: waiting(base),
}


async def measure(rounds: int, chosen: Collection[str]) -> dict[str, Any]:
    machine = {"python": platform.python_version(), "aiohttp": aiohttp.__version__, "cores": os.cpu_count()}
    with CannedServer() as base:
        found = {name: await section(base, rounds) for name, section in SECTIONS.items() if name in chosen}
    return {"machine": machine, **found}


def show(result: dict[str, Any]) -> None:
    for section, rows in result.items():
        print(f"\n{section}")
        for name, value in rows.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"  {name:<28} {text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [*SECTIONS, "import"]
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(names)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    chosen = options.sections or names
    if unknown := set(chosen) - set(names):
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    handler = logging.StreamHandler(io.TextIOWrapper(io.FileIO(os.devnull, "w")))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.getLogger("brimful").addHandler(handler)
    logging.getLogger("brimful").setLevel(logging.INFO)
    logging.getLogger("brimful").propagate = False
    result = asyncio.run(measure(options.rounds, chosen))
    if "import" in chosen:
        result["import"] = imports()
    show(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
