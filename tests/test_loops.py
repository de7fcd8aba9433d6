"""Loops, threads, forks: a clear error or a fresh start, never a dead connection and never another loop's future."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm import LLMConfigurationError, LLMException, LLMManager
from llm.core.client import LLMClient
from llm.core.types import Cost
from llm.testing.process import SimulatorProcess
from llm.utils.sliding_window import Ledger
from tests.core.rig import END, PROMPT, Rig, answer, build, configuration, delta, failure, stream
from tests.quotas import quotas

ROOT = Path(__file__).parent.parent
LIMITS = {"requests_per_minute": 4, "input_tokens_per_minute": 10_000, "output_tokens_per_minute": 10_000}


@pytest.fixture(scope="module")
def vendor() -> Iterator[SimulatorProcess]:
    """In a process of its own, since here loops come and go."""
    with SimulatorProcess(tokens_per_second=50.0) as simulator:
        yield simulator


@pytest.fixture
def forgetful() -> Iterator[None]:
    """For tests that leave sockets behind with their loop: they are collected, with the warning that this deserves."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def made(vendor: SimulatorProcess, **provider: Any) -> LLMManager:
    config = {"providers": {"openai": {"base_url": vendor.openai_url, "api_keys": ["key1"], "models": "m", **provider}}}
    return LLMManager.from_config(config, environ={})


async def streamed(client: LLMClient) -> str:
    return "".join([chunk.text async for chunk in client.stream_complete(PROMPT)])


def in_a_thread(work: Callable[[], Coroutine[Any, Any, object]]) -> BaseException | object:
    """What *work* comes to on a loop of another thread: its result or its error."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(work()))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


# ---------------------------------------------------------------- another loop, while the first is open


async def test_a_manager_in_use_says_so_on_another_loop_and_is_not_disturbed() -> None:
    script = [answer(), stream(delta("a"), 5.0, delta("b"), END), answer("queued")]
    config = configuration(rate_limits=[LIMITS | {"requests_per_minute": 2}])
    r = await asyncio.to_thread(build, script, config=config)
    async with r.manager:
        await r.client.chat(PROMPT)
        reading, queued = asyncio.create_task(streamed(r.client)), asyncio.create_task(r.client.chat(PROMPT))
        await r.clock.settle()
        before = r.manager.get_status(), r.clock.timers
        for work in (lambda: r.client.chat(PROMPT), lambda: streamed(r.client), r.manager.close):
            error = await asyncio.to_thread(in_a_thread, work)
            assert isinstance(error, LLMConfigurationError), error
            assert "another event loop" in str(error)
            assert "get_llm_manager" in str(error)
        assert (r.manager.get_status(), r.clock.timers) == before
        await r.clock.advance(70.0)
        assert (await reading, await queued) == ("ab", "queued")
    assert r.clock.timers == 0


async def test_building_asking_for_clients_and_the_status_are_free_of_loops() -> None:
    r = await asyncio.to_thread(build, [answer(), answer()])

    async def look() -> dict[str, Any]:
        r.manager.get_client("vendor", "m")
        return r.manager.get_status()

    assert isinstance(await asyncio.to_thread(in_a_thread, look), dict)
    async with r.manager:
        assert await r.client.chat(PROMPT) == "hello", "it belongs to the loop of its first call"
        assert isinstance(await asyncio.to_thread(in_a_thread, look), dict)


async def test_a_closed_manager_may_be_closed_again_from_anywhere() -> None:
    r = await asyncio.to_thread(build, [answer()])
    await r.client.chat(PROMPT)
    await r.manager.close()
    assert await asyncio.to_thread(in_a_thread, r.manager.close) is None
    error = await asyncio.to_thread(in_a_thread, lambda: r.client.chat(PROMPT))
    assert isinstance(error, LLMException)
    assert "closed" in str(error)


def test_threads_may_send_their_work_to_the_managers_loop(vendor: SimulatorProcess) -> None:
    manager = made(vendor)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        for _ in range(3):
            assert asyncio.run_coroutine_threadsafe(manager.get_client().chat("hello"), loop).result(30)
        asyncio.run_coroutine_threadsafe(manager.close(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# ---------------------------------------------------------------- another loop, after the first


@pytest.mark.usefixtures("forgetful")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_one_manager_serves_one_loop_after_the_other_over_real_sockets(vendor: SimulatorProcess) -> None:
    manager = made(vendor)
    client = manager.get_client()

    async def use() -> str:
        texts = await asyncio.gather(client.chat("hello"), streamed(client))
        return texts[0]

    async def last() -> str:
        async with manager:
            return await use()

    assert asyncio.run(use()) == asyncio.run(use()) == asyncio.run(last())
    connections = manager.get_status()["providers"]["openai"]["connections"]
    assert connections["open"] == 0


def abandoned(r: Rig, *calls: Coroutine[Any, Any, object], seconds: float = 0.0) -> list[asyncio.Task[object]]:
    """Begin *calls* on a loop that is then closed under them, as a program does that forgets its tasks."""
    loop = asyncio.new_event_loop()

    async def begin() -> list[asyncio.Task[object]]:
        tasks = [loop.create_task(call) for call in calls]
        await r.clock.settle()
        await r.clock.advance(seconds)
        return tasks

    tasks = loop.run_until_complete(begin())
    loop.close()
    for task in tasks:
        # Its destructor would complain, and rightly.
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    return tasks


def test_what_waited_on_a_closed_loop_is_forgotten_and_what_was_used_stays_used() -> None:
    script = [
        answer(),
        stream(delta("a"), 1e6, END),  # the loop is closed while it is read
        answer(delay=1e6),  # and while this one is waited for
        failure(503, retry_after="100"),  # and this one sleeps until its next attempt
        answer("afresh"),
        answer("later"),
    ]
    config = configuration(rate_limits=[LIMITS], pool={"max_size": 3})
    r = build(script, config=config)
    calls = [r.client.chat(PROMPT, timeout=5000.0), streamed(r.client), r.client.chat(PROMPT), r.client.chat(PROMPT)]
    left = abandoned(r, *calls, *(r.client.chat(PROMPT) for _ in range(5)), seconds=1.0)
    status = r.manager.get_status()["providers"]["vendor"]
    assert status["clients"]["in_use"] >= 2
    assert status["queued"] > 0

    async def afresh() -> None:
        async with r.manager:
            call = asyncio.ensure_future(r.client.chat(PROMPT))
            await r.clock.settle()
            status = r.manager.get_status()["providers"]["vendor"]
            assert status["queued"] == 1, "the keys' windows are not forgotten"
            [quota] = quotas(r.manager)
            assert quota["requests"]["used"] == 4
            assert quota["output_tokens"]["reserved"] == 0
            await r.clock.advance(61.0)
            assert await call == "afresh"
            # As when the old loop's tasks are collected: what they held was given back already.
            for task in left:
                task.get_coro().close()
            assert await r.client.chat(PROMPT) == "later"
            status = r.manager.get_status()["providers"]["vendor"]
            assert (status["clients"]["in_use"], status["queued"]) == (0, 0)
            assert status["clients"]["idle"] == 1
        assert r.clock.timers == 0

    asyncio.run(afresh())


def test_a_parked_key_is_probed_on_the_new_loop() -> None:
    r = build([failure(401), answer("{}"), answer("works again")])

    async def refused() -> None:
        with pytest.raises(LLMException):
            await r.client.chat(PROMPT)

    asyncio.run(refused())
    assert r.states == ["parked"]

    async def later() -> None:
        async with r.manager:
            with pytest.raises(LLMException):
                await r.client.chat(PROMPT)
            await r.clock.advance(3_000.0)
            assert r.states == ["healthy"]
            assert await r.client.chat(PROMPT) == "works again"

    asyncio.run(later())
    assert r.clock.timers == 0


@pytest.mark.usefixtures("forgetful")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_an_unclosed_manager_of_a_closed_loop_can_still_be_closed(vendor: SimulatorProcess) -> None:
    manager = made(vendor)
    asyncio.run(manager.get_client().chat("hello"))
    asyncio.run(manager.close())
    assert manager.get_status()["closed"]
    assert manager.get_status()["providers"]["openai"]["connections"]["open"] == 0


# ---------------------------------------------------------------- after a fork

FORKED = """
import asyncio, os, sys
from llm import LLMException, LLMManager, get_llm_manager, close_llm_manager

config = {
    "providers": {
        "openai": {"base_url": sys.argv[1], "api_keys": ["key1"], "models": "m", "pool": {"max_size": 2},
                   "rate_limits": {"requests_per_minute": 100}}
    }
}
manager = LLMManager.from_config(config, environ={})
client = manager.get_client()

async def in_the_child():
    status = manager.get_status()["providers"]["openai"]
    assert status["clients"]["in_use"] == 1, status       # the parent's stream, which nobody here will ever end
    assert await client.chat("hello there") == sys.argv[2]
    status = manager.get_status()["providers"]["openai"]
    assert status["clients"] | {"created": 0} == {"in_use": 0, "idle": 1, "max_size": 2, "created": 0, "recycled": 0}
    assert status["connections"]["opened"] == 1, status   # its own
    limits = manager.get_status()["limits"]["openai"]["quotas"]["openai/1"]["*"]
    assert limits["requests"]["used"] >= 3, limits
    await manager.close()
    other = await get_llm_manager(config)
    assert other is not manager
    assert await other.get_client().chat("hello there") == sys.argv[2]
    await close_llm_manager()

with asyncio.Runner() as runner:
    runner.run(client.chat("hello there"))
    mine = runner.run(get_llm_manager(config))
    runner.run(mine.get_client().chat("hello there"))
    stream = runner.run(client.stream_complete("hello there").__aenter__())
    child = os.fork()
    if not child:
        code = 1
        try:
            asyncio.run(in_the_child())
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    async def go_on():
        return "".join([chunk.text async for chunk in stream])

    assert runner.run(go_on()) == sys.argv[2], "the parent's stream goes on"
    opened = manager.get_status()["providers"]["openai"]["connections"]["opened"]
    assert runner.run(client.chat("hello there")) == sys.argv[2]
    assert manager.get_status()["providers"]["openai"]["connections"]["opened"] == opened, "its connections are good"
    runner.run(manager.close())
    runner.run(close_llm_manager())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_afresh_and_its_parent_goes_on(vendor: SimulatorProcess) -> None:
    expected = asyncio.run(hello_there(vendor))
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            textwrap.dedent(FORKED),
            vendor.openai_url,
            expected,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


async def hello_there(vendor: SimulatorProcess) -> str:
    async with await asyncio.to_thread(made, vendor) as manager:
        return await manager.get_client().chat("hello there")


def test_a_ledgers_successor_counts_what_was_open_as_spent_and_hears_of_it_no_more() -> None:
    ledger = Ledger(requests=5, input_tokens=100, output_tokens=100)
    settled, flying, gone = (ledger.reserve(Cost(1, 10, 20), now=0.0) for _ in range(3))
    assert settled
    assert flying
    assert gone
    settled.settle(Cost(1, 8, 5), now=1.0)
    gone.settle(Cost(0, 0, 0), now=1.0)
    successor = ledger.successor(2.0)
    expected = "<Ledger requests 2/5, input 18/100, output 25/100 + 0 open>"
    assert repr(successor) == expected
    flying.settle(Cost(1, 50, 50), now=3.0)
    assert repr(successor) == expected
    successor.expire(2.0 + 60.25)
    assert repr(successor) == "<Ledger requests 0/5, input 0/100, output 0/100 + 0 open>"
