"""Leaks: no cyclic garbage a call, no prompt that outlives its call, nothing imported while calls are under way."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from llm import LLMClient, LLMException, LLMManager
from llm.testing.process import SimulatorProcess
from llm.testing.transport import Answer
from tests.core.rig import END, answer, build, configuration, delta, failure, stream

ROOT = Path(__file__).parent.parent
CALLS = 100

Work = Callable[[], Awaitable[object]]


@pytest.fixture(scope="module")
def vendor() -> Iterator[SimulatorProcess]:
    """In a process of its own, so that its garbage is not ours."""
    with SimulatorProcess() as simulator:
        yield simulator


async def garbage(work: Work) -> Counter[str]:
    """What only the collector could free after CALLS times *work*, by type."""
    for _ in range(10):
        await work()
    await asyncio.sleep(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(CALLS):
            await work()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return Counter(f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.collect()


async def streamed(client: LLMClient, **options: float) -> str:
    return "".join([chunk.text async for chunk in client.stream_complete("hello there", timeout=60.0)])


async def entered(client: LLMClient) -> None:
    async with client.stream_complete("hello there") as chunks:
        async for _ in chunks:
            pass


async def left_early(client: LLMClient) -> None:
    async for _ in client.stream_complete("hello there"):
        break


WORK: dict[str, Callable[[LLMClient], Work]] = {
    "whole": lambda client: lambda: client.chat("hello there"),
    "whole with a deadline": lambda client: lambda: client.chat("hello there", timeout=60.0),
    "streamed": lambda client: lambda: streamed(client),
    "streamed in async with": lambda client: lambda: entered(client),
}


@pytest.mark.parametrize("kind", WORK)
async def test_an_answered_call_leaves_no_cyclic_garbage(vendor: SimulatorProcess, kind: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello there"}], "stream": "streamed" in kind}
    headers = {"authorization": "Bearer key1", "content-type": "application/json"}

    async with aiohttp.ClientSession() as session:

        async def bare() -> None:
            url = vendor.openai_url + "/chat/completions"
            async with session.post(url, data=msgspec.json.encode(body), headers=headers) as response:
                await response.read()

        theirs = await garbage(bare)
    config = {"providers": {"openai": {"base_url": vendor.openai_url, "api_keys": ["key1"], "models": "m"}}}
    async with await asyncio.to_thread(LLMManager.from_config, config, environ={}) as manager:
        ours = await garbage(WORK[kind](manager.get_client()))
    # What comes once in a while, for a timer or a connection, is not a call's.
    assert {name: count for name, count in (ours - theirs).items() if count >= CALLS // 10} == {}


def without_frames(error: LLMException) -> LLMException:
    """As a log or a tracker keeps an error: its frames hold the user's own variables, which is no leak of ours."""
    found: BaseException | None = error
    while found is not None:
        found = found.with_traceback(None).__cause__
    return error


FAILURES: dict[str, tuple[list[Answer], bool]] = {
    "refused": ([failure(400)], False),
    "refused after retries": ([failure(503)] * 3, False),
    "a dead key": ([failure(401)], False),
    "a stream refused": ([failure(500)] * 3, True),
    "a stream cut": ([stream(delta("hel"), b"")], True),
    "a stream with an error": ([stream(delta("hel"), b'data: {"error": {"message": "no"}}\n\n')], True),
    "too late": ([answer(delay=1e6)], False),
    "too late in a stream": ([stream(delta("hel"), 1e6, END)], True),
    "nonsense": ([msgspec.structs.replace(answer(), body=b"{]")] * 3, False),
    "hopeless": ([], False),
}


@pytest.mark.parametrize("kept", [False, True], ids=["", "its error is kept"])
@pytest.mark.parametrize("kind", FAILURES)
async def test_a_failed_call_keeps_no_prompt_also_while_the_collector_is_off(kind: str, kept: bool) -> None:
    script, streaming = FAILURES[kind]
    config = configuration(rate_limits={"requests_per_minute": 1 if kind == "hopeless" else 100})
    r = await asyncio.to_thread(build, [answer(), *script], config=config)
    errors: list[LLMException] = []
    # A string's references can be counted, where a string cannot be referred to weakly.
    prompt = "".join(["a prompt ", "of its own"])
    async with r.manager:
        await r.client.chat("something else")
        await r.clock.settle()
        gc.collect()
        gc.disable()
        try:
            before = sys.getrefcount(prompt)

            async def fail() -> None:
                try:
                    if streaming:
                        async for _ in r.client.stream_complete(prompt, timeout=30.0):
                            pass
                    else:
                        await r.client.chat(prompt, timeout=30.0)
                except LLMException as error:
                    if kept:
                        errors.append(without_frames(error))

            task = asyncio.create_task(fail())
            while not task.done():
                await r.clock.advance(5.0)
            del task
            await r.clock.advance(100.0)
            assert sys.getrefcount(prompt) == before
            assert len(errors) == kept
        finally:
            gc.enable()


async def test_a_prompt_that_is_kept_would_be_noticed() -> None:
    prompt = "".join(["a prompt ", "of its own"])
    before = sys.getrefcount(prompt)
    r = await asyncio.to_thread(build, [answer(delay=1e6)])
    async with r.manager:
        call = asyncio.create_task(r.client.chat(prompt))
        await r.clock.settle()
        assert sys.getrefcount(prompt) > before
        call.cancel()


FIRST_CALLS = """
import asyncio, sys
from llm import LLMException, LLMManager
from llm.testing.simulator import Simulator

async def main():
    async with Simulator() as simulator:
        config = {"providers": {
            "openai": {"base_url": simulator.openai_url, "api_keys": ["a", "b", "c"], "models": "m"},
            "anthropic": {"base_url": simulator.anthropic_url, "api_keys": ["a", "b", "c"], "models": "m"},
        }, "middleware": {"retry": {"base_delay": 0.001, "max_delay": 0.001}}}
        async with LLMManager.from_config(config, environ={}) as manager:
            for provider in ("openai", "anthropic"):
                client = manager.get_client(provider)
                for fault in (None, "503", "400", "403", "401", "429", "reset", "stream_error", "cut_stream", "stall"):
                    for streaming in (False, True):
                        before = set(sys.modules)
                        if fault:
                            simulator.fail(fault)
                        try:
                            if streaming:
                                async for chunk in client.stream_complete("hello there", timeout=0.5):
                                    pass
                            else:
                                await client.chat("hello there", timeout=0.5)
                        except LLMException:
                            pass
                        simulator.heal()
                        for name in set(sys.modules) - before:
                            print(name)
                manager.get_status()

asyncio.run(main())
"""
ALLOWED: set[str] = set()


def test_no_call_imports_anything() -> None:
    """An import reads files and runs code, and meanwhile every other call stands still."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= ALLOWED
