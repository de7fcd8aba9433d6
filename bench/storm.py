"""A storm: 1,000 callers in a closed loop for 120 s, whose primary fails from the 20th second to the 80th.

``python bench/storm.py refuse`` (it answers 503) or ``silent`` (it accepts and never answers); ``make storm`` is both.
Callers ask again as soon as they are answered; a fallback answers like the primary. The servers are a process of their
own, and count what they are sent, second by second. The exit code is 1 if one of these does not hold:

* While it is healthy, the primary is sent at most 1.2 requests a call.
* From 2 s after it fails until it recovers, at most 5 in a hundred calls.
* 99 of a hundred calls are answered.
* Within 5 s of its recovery it serves again, and is in these never sent more than 120 % of what it was sent before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from aiohttp import web

import brimful

FAILS, RECOVERS, ENDS = 20.0, 80.0, 120.0
NAMES = ("primary", "fallback")
BODY = {
    "id": "c",
    "object": "chat.completion",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


# -- the servers, in their own process -------------------------------------------------------------------------------


class Book:
    """What one server was sent and has served, by second."""

    def __init__(self) -> None:
        self.sent: Counter[int] = Counter()
        self.served: Counter[int] = Counter()
        self.first_after = 0.0
        """The instant at which it first served again."""


async def serve(mode: str, scale: float) -> None:
    """Be both servers until standard input ends; the clock starts with its first line."""
    began = 0.0
    chance = random.Random(1)
    books = {name: Book() for name in NAMES}

    def handler(name: str) -> Any:
        book = books[name]

        async def answer(request: web.Request) -> web.StreamResponse:
            await request.read()
            now = (time.monotonic() - began) / scale
            book.sent[int(now)] += 1
            if name == "primary" and FAILS <= now < RECOVERS:
                if mode == "silent":
                    await asyncio.sleep(3600)
                return web.json_response({"error": {"message": "down"}}, status=503)
            await asyncio.sleep(0.6 + 0.4 * chance.random())
            now = (time.monotonic() - began) / scale
            book.served[int(now)] += 1
            if now >= RECOVERS and not book.first_after:
                book.first_after = now
            return web.json_response(BODY)

        return answer

    runners = []
    for name in NAMES:
        app = web.Application()
        app.router.add_post("/{path:.*}", handler(name))
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        runners.append(runner)
        print(runner.addresses[0][1], flush=True)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, sys.stdin.readline)
    began = time.monotonic()
    await loop.run_in_executor(None, sys.stdin.read)
    for runner in runners:
        await runner.cleanup()
    told = {n: {"sent": dict(b.sent), "served": dict(b.served), "first": b.first_after} for n, b in books.items()}
    print(json.dumps(told), flush=True)


# -- the callers ------------------------------------------------------------------------------------------------------


def configuration(ports: list[int]) -> dict[str, Any]:
    common = {
        "dialect": "openai",
        "models": "m",
        "rate_limits": {"requests_per_minute": 50_000_000},
        "pool": {"max_size": 2000},
        "timeouts": {"first_byte": 1.5},
    }
    urls = [f"http://127.0.0.1:{port}/v1" for port in ports]
    return {
        "providers": {
            "primary": common | {"base_url": urls[0], "api_keys": ["storm-1", "storm-2"], "fallback": "others"},
            "fallback": common | {"base_url": urls[1], "api_keys": ["storm-3", "storm-4"]},
        },
        "fallbacks": {"others": [{"provider": "fallback"}]},
    }


def started(mode: str, scale: float) -> subprocess.Popen[str]:
    """This script, as the servers."""
    command = [sys.executable, str(Path(__file__).resolve()), mode, "--serve", f"--scale={scale}"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def storm(mode: str, callers: int, scale: float) -> dict[str, Any]:
    """All of it; *scale* shortens the seconds."""
    server = started(mode, scale)
    assert server.stdin is not None
    assert server.stdout is not None
    ports = [int(server.stdout.readline()) for _ in NAMES]
    calls: Counter[int] = Counter()
    outcomes: Counter[str] = Counter()
    async with brimful.LLMManager.from_config(configuration(ports)) as manager:
        client = manager.get_client("primary")
        # What the first call imports is not to delay a thousand.
        await manager.get_client("fallback").complete("hello")
        server.stdin.write("\n")
        server.stdin.flush()
        began = time.monotonic()

        async def caller(number: int) -> None:
            await asyncio.sleep(number / callers)
            while (now := (time.monotonic() - began) / scale) < ENDS:
                calls[int(now)] += 1
                try:
                    response = await client.complete("hello", timeout=60)
                    outcomes[f"answered by {response.provider}"] += 1
                except brimful.LLMException as error:
                    outcomes[type(error).__name__] += 1

        await asyncio.gather(*(caller(number) for number in range(callers)))
    output = await asyncio.to_thread(server.communicate)
    told = json.loads(output[0])
    return judge(told["primary"], calls, outcomes)


def judge(primary: dict[str, Any], calls: Counter[int], outcomes: Counter[str]) -> dict[str, Any]:
    """The figures, and what of them is beyond its bound."""
    sent = Counter({int(second): count for second, count in primary["sent"].items()})

    def total(of: Counter[int], start: float, end: float) -> int:
        return sum(count for second, count in of.items() if start <= second < end)

    answered = sum(count for kind, count in outcomes.items() if kind.startswith("answered"))
    former = total(sent, 5, FAILS) / (FAILS - 5)
    figures: dict[str, Any] = {
        "calls": sum(calls.values()),
        "outcomes": dict(outcomes),
        "requests a call while healthy": round(total(sent, 0, FAILS) / max(1, total(calls, 0, FAILS)), 3),
        "share of calls that tried the dead primary": round(
            total(sent, FAILS + 2, RECOVERS) / max(1, total(calls, FAILS + 2, RECOVERS)), 4
        ),
        "answered": round(answered / sum(calls.values()), 5),
        "seconds until it serves again": round(primary["first"] - RECOVERS, 2),
        "former rate": round(former, 1),
        "highest rate in the 5 s after": max(sent[int(RECOVERS) + second] for second in range(5)),
    }
    bounds = {
        "requests a call while healthy": 1.2,
        "share of calls that tried the dead primary": 0.05,
        "seconds until it serves again": 5.0,
        "highest rate in the 5 s after": 1.2 * former,
    }
    figures["beyond"] = [name for name, bound in bounds.items() if not 0 <= figures[name] <= bound]
    if figures["answered"] < 0.99:
        figures["beyond"].append("answered")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mode", choices=["refuse", "silent"])
    parser.add_argument("--callers", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=1.0, help="of the seconds; timeouts stay as they are")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("brimful").setLevel(logging.CRITICAL)
    if options.serve:
        asyncio.run(serve(options.mode, options.scale))
        return 0
    figures = asyncio.run(storm(options.mode, options.callers, options.scale))
    print(f"\n{options.mode}")
    for name, value in figures.items():
        print(f"  {name:<44} {value}")
    return bool(figures["beyond"])


if __name__ == "__main__":
    sys.exit(main())
