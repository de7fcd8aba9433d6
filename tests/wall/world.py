"""What one case has: its vendors, a manager with scaled timeouts, and the switch that takes its protection away."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from llm import LLMManager
from llm.core.client import LLMClient
from llm.core.exceptions import LLMException
from llm.core.types import LLMResponse
from tests.wall.servers import Street, Vendor

TIMEOUT = 3.0
TIMEOUTS = {"connect": 0.5, "first_byte": 1.0, "first_token": 1.0, "idle": 0.5, "attempt": 3.0}
PROMPT = "a prompt that nobody else may read"
KEY = "sk-wall-key-"


class World:
    """*off*: without the protection that the case is about."""

    def __init__(self, street: Street, *, off: bool) -> None:
        self.street = street
        self.off = off
        self.middleware: dict[str, dict[str, Any]] = {"retry": {"base_delay": 0.05, "max_delay": 0.2}}
        self.timeouts: dict[str, Any] = dict(TIMEOUTS)
        self.provider: dict[str, Any] = {}
        self.target: dict[str, Any] = {}
        self.unsent = 0
        """Attempts that reached no server."""
        self.options: dict[str, Any] = {"timeout": TIMEOUT}

    def vendor(self, *script: Any, **more: Any) -> Vendor:
        return self.street.open(Vendor(*script, **more))

    def fallback(self, *script: Any) -> Vendor:
        return self.street.open(Vendor(*script, name="F"))

    def config(self, p: Vendor | str, f: Vendor | None, keys: int = 1) -> dict[str, Any]:
        common = {"dialect": "openai", "models": "m", "timeouts": self.timeouts}
        url = p if isinstance(p, str) else p.url
        first = common | {"base_url": url, "api_keys": [f"{KEY}{n}" for n in range(1, keys + 1)]} | self.provider
        providers = {"p": first}
        config: dict[str, Any] = {"providers": providers, "default_provider": "p", "middleware": self.middleware}
        if f is not None:
            providers["f"] = common | {"base_url": f.url, "api_keys": f"{KEY}f"} | self.target
            first["fallback"] = "others"
            config["fallbacks"] = {"others": [{"provider": "f"}]}
        return config

    @contextlib.asynccontextmanager
    async def manager(
        self, p: Vendor | str, f: Vendor | None, keys: int = 1, **more: Any
    ) -> AsyncIterator[tuple[LLMManager, LLMClient]]:
        """A manager, and at its end what holds in every row: nothing is left, and the books agree."""
        built = LLMManager.from_config(self.config(p, f, keys), environ={}, **more)
        async with built:
            yield built, built.get_client()
            # Whoever was cancelled has had its turn of the loop.
            await asyncio.sleep(0)
            status = built.get_status()
            for name, line in status["providers"].items():
                check(line["clients"]["in_use"] == 0, f"{name}: a client is still taken")
                check(line["connections"]["in_flight"] == 0, f"{name}: a request is still in flight")
                check(line["queued"] == 0, f"{name}: somebody waits")
            vendors = [vendor for vendor in (p, f) if isinstance(vendor, Vendor)]
            sent, attempts = sum(len(vendor.journal) for vendor in vendors), status["metrics"]["attempts"]
            check(attempts - self.unsent == sent, f"{attempts} attempts, {self.unsent} unsent, {sent} requests")
            tokens = status["metrics"]["tokens"]
            told = (sum(v.told[0] for v in vendors), sum(v.told[1] for v in vendors))
            check((tokens["input"], tokens["output"]) == told, f"usage {tokens}, the vendors told {told}")
            check(status["faults"] == {}, f"faults: {status['faults']}")
        gc.collect()
        for _ in range(100):
            if not any(vendor.open for vendor in self.street.vendors):
                break
            await asyncio.sleep(0.02)
        check(not any(vendor.open for vendor in self.street.vendors), "a socket is left")
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        check(not left, f"tasks are left: {left}")

    async def ask(self, client: LLMClient, **options: Any) -> LLMResponse | LLMException:
        """The answer, or the error."""
        try:
            return await client.complete(PROMPT, **{**self.options, **options})
        except LLMException as error:
            return error.with_traceback(None)

    async def read(self, client: LLMClient, **options: Any) -> tuple[list[str], LLMResponse | LLMException]:
        """The pieces of a stream (a restart shows as ``↺``), and how it ended."""
        seen: list[str] = []
        try:
            async with client.stream_complete(PROMPT, **{**self.options, **options}) as stream:
                async for chunk in stream:
                    if chunk.restart or chunk.text:
                        seen.append("↺" if chunk.restart else chunk.text)
                return seen, stream.response()
        except LLMException as error:
            return seen, error.with_traceback(None)


class Fallen(AssertionError):
    """A row does not hold."""


def check(holds: object, what: str) -> None:
    if not holds:
        raise Fallen(what)


def answered(outcome: object, by: str) -> LLMResponse:
    """That it is a whole answer of the vendor *by*."""
    check(isinstance(outcome, LLMResponse), f"no answer, but {type(outcome).__name__}: {outcome}")
    assert isinstance(outcome, LLMResponse)
    check(outcome.text.startswith(f"{by}: ") and outcome.text.endswith("word59 "), f"answered: {outcome.text[:20]!r}…")
    return outcome


def failed(outcome: object, kind: type[LLMException]) -> LLMException:
    check(type(outcome) is kind, f"expected {kind.__name__}, got {type(outcome).__name__}: {outcome}")
    assert isinstance(outcome, LLMException)
    return outcome


def asked(vendor: Vendor, count: int, *, at_most: bool = False) -> None:
    found = len(vendor.journal)
    check(found <= count if at_most else found == count, f"{vendor.name} was sent {found} requests, expected {count}")


class Took:
    """How long a block takes."""

    def __enter__(self) -> Took:
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self.began


def patched(owner: Any, name: str, value: Callable[..., Any]) -> None:
    """For good: each case has a process of its own."""
    setattr(owner, name, value)
