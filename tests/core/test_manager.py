"""The manager: how one is found, what it owns, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

import llm
from llm.core.exceptions import (
    LLMConfigurationError,
    LLMConnectionError,
    LLMException,
    LLMPoolExhaustedError,
    LLMStreamInterruptedError,
)
from llm.core.manager import LLMManager, close_llm_manager, get_llm_manager, set_llm_manager
from llm.stores.memory import MemoryStore
from llm.testing.clock import FakeClock
from llm.testing.simulator import Simulator
from llm.testing.transport import Scripted, ScriptedTransport
from tests.core.rig import (
    JSON,
    PROMPT,
    Rig,
    answer,
    build,
    configuration,
    delta,
    failure,
    rig,
    secret,
    stream,
)

TWO = {
    "default_provider": "second",
    "providers": {
        name: {"dialect": "openai", "base_url": f"http://{name}.test", "api_keys": f"key-{name}", "models": "m"}
        for name in ("first", "second")
    },
}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working directory without a configuration, and an environment without keys."""
    for name in tuple(os.environ):
        if name.startswith(("OPENAI_", "ANTHROPIC_", "LLM_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def real(simulator: Simulator, **more: Any) -> dict[str, Any]:
    """A configuration whose one provider is *simulator*, over real sockets."""
    provider = {"base_url": simulator.openai_url, "api_keys": ["a", "b"], "models": "m", **more}
    return {"providers": {"openai": provider}}


async def made(source: Any) -> LLMManager:
    return await asyncio.to_thread(LLMManager.from_config, source)


def descriptors() -> set[str]:
    """What the open files of this process are, sockets by number."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return {target for target in found if target.startswith("socket:")}


async def sockets() -> set[str]:
    return await asyncio.to_thread(descriptors)


def timers() -> int:
    """Timers of the running loop that would still do something. Only the standard loop tells."""
    scheduled: list[asyncio.TimerHandle] = getattr(asyncio.get_running_loop(), "_scheduled", [])
    return sum(1 for handle in scheduled if not handle.cancelled())


# ---------------------------------------------------------------- choosing a provider


async def test_a_client_is_of_the_default_provider_or_of_the_one_that_is_named() -> None:
    async with rig(config=TWO) as r:
        assert r.manager.get_client().provider == "second"
        assert r.manager.get_client("first").provider == "first"
        with pytest.raises(LLMConfigurationError) as caught:
            r.manager.get_client("fist")
        assert "did you mean 'first'? Configured: first, second." in str(caught.value)
        with pytest.raises(LLMConfigurationError, match=r"'x' is not configured\. Configured"):
            r.manager.get_client("x")


async def test_without_a_default_it_is_the_first() -> None:
    async with rig(config={"providers": TWO["providers"]}) as r:
        assert r.manager.get_client().provider == "first"


async def test_the_status_shows_everything_and_no_secret_and_is_json() -> None:
    async with rig([failure(401, f"bad key {secret(1)}"), answer(PROMPT)], config=configuration(keys=2)) as r:
        await r.client.complete(PROMPT)
        status = r.manager.get_status()
    text = json.dumps(status, allow_nan=False)
    assert secret(1) not in text
    assert secret(2) not in text
    assert PROMPT not in text
    assert set(status) == {"closed", "default_provider", "providers", "limits", "metrics", "events", "faults"}
    assert set(status["providers"]["vendor"]) == {
        *("clients", "keys", "circuit", "queued", "retries", "hedges", "connections", "layers")
    }
    assert status["providers"]["vendor"]["keys"][0]["state"] == "parked"
    assert status["metrics"]["requests"]["successful"] == 1
    assert repr(r.manager) == "<LLMManager: vendor, closed>"


# ---------------------------------------------------------------- closing


async def test_after_close_calls_are_refused_at_once() -> None:
    async with rig(config=configuration()) as r:
        await r.manager.close()
        await r.manager.close()
        for use in (r.client.chat(PROMPT), anext(aiter(r.client.stream_complete(PROMPT)))):
            with pytest.raises(LLMConnectionError, match="closed") as caught:
                await use
            assert not caught.value.retryable
            assert caught.value.provider == "vendor"
        assert r.manager.get_status()["closed"] is True


async def test_closing_fails_those_who_wait_and_those_who_are_under_way_with_typed_errors() -> None:
    silent = Scripted(200, JSON, b"", delay=math.inf)
    async with rig(lambda _: silent, config=configuration(pool={"max_size": 2})) as r:
        calls = [asyncio.create_task(r.client.complete(PROMPT)) for _ in range(5)]
        await r.clock.settle()
        await r.manager.close()
        ended = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(type(error).__name__ for error in ended) == [
        "LLMConnectionError",
        "LLMConnectionError",
        "LLMPoolExhaustedError",
        "LLMPoolExhaustedError",
        "LLMPoolExhaustedError",
    ]
    assert all(isinstance(error, LLMException) and not error.retryable for error in ended)
    assert r.clock.timers == 0


async def test_closing_ends_open_streams_also_one_that_nobody_reads() -> None:
    async with rig(lambda _: stream(delta("hel"), math.inf)) as r:
        idle = await r.client.stream_complete(PROMPT, timeout=50.0).__aenter__()
        assert r.clock.timers > 0
        await r.manager.close()
        assert idle.settled
        assert (await anext(idle)).text == "hel"
        with pytest.raises(LLMStreamInterruptedError, match="manager was closed") as caught:
            await anext(idle)
        assert (caught.value.partial, caught.value.key_id) == ("hel", "vendor/1")


async def test_a_call_that_would_be_repeated_is_not_repeated_after_close() -> None:
    config = configuration(keys=1, middleware={"retry": {"base_delay": 4, "max_attempts": 9}})
    async with rig(lambda _: failure(500, retry_after="3"), config=config) as r:
        call = asyncio.create_task(r.client.complete(PROMPT))
        await r.clock.settle()
        assert r.clock.timers > 0
        await r.manager.close()
        await r.clock.settle()
        assert call.done(), "who sleeps is not left sleeping"
        assert r.clock.timers == 0
        with pytest.raises(LLMException, match="closed") as caught:
            await call
        assert not caught.value.retryable
        assert len(r.transport.requests) == 1


async def test_a_close_that_was_cancelled_can_be_finished() -> None:
    class Slow(MemoryStore):
        closed = 0

        async def close(self) -> None:
            await gate.wait()
            self.closed += 1

    gate = asyncio.Event()
    store = Slow(clock=FakeClock())
    async with rig(store=store) as r:
        closing = asyncio.create_task(r.manager.close())
        await r.clock.settle()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        gate.set()
        await r.manager.close()
        await r.manager.close()
        assert store.closed == 1


async def test_after_close_no_socket_no_task_and_no_timer_is_left(clean: Path) -> None:
    async with Simulator() as simulator:
        await asyncio.sleep(0)
        tasks, before, ticking = asyncio.all_tasks(), await sockets(), timers()
        manager = await made(real(simulator))
        async with manager:
            client = manager.get_client(timeout=60.0)
            assert len(await asyncio.gather(*(client.chat("hello") for _ in range(10)))) == 10
            async for _ in client.stream_complete("hello there"):
                pass
            async for _ in client.stream_complete("hello there you"):
                break
            simulator.revoked.add("b")
            await asyncio.gather(*(client.chat("hello") for _ in range(4)))
            assert manager.get_status()["providers"]["openai"]["connections"]["open"] > 0
            assert await sockets() > before
        assert timers() == ticking
        ours = asyncio.all_tasks() - tasks
        assert {task for task in ours if "Simulator" not in repr(task) and "aiohttp/web" not in repr(task)} == set()
        assert manager.get_status()["providers"]["openai"]["connections"]["open"] == 0
    for _ in range(100):
        if await sockets() < before:
            break
    assert await sockets() < before, "also the simulator's own is gone"


# ---------------------------------------------------------------- dropping


@pytest.mark.parametrize("how", ["unused", "used", "closed"])
async def test_a_hundred_managers_created_and_dropped_leave_none_alive(how: str) -> None:
    rigs: list[Rig] = []

    def make() -> None:
        # Handed over in a list, because a result would live on in the thread's future for a moment.
        rigs.extend(build(lambda _: answer(), config=configuration(keys=3)) for _ in range(100))

    await asyncio.to_thread(make)
    for r in rigs:
        if how != "unused":
            await r.client.chat(PROMPT, timeout=100.0)
        if how == "closed":
            await r.manager.close()
    managers = [weakref.ref(r.manager) for r in rigs]
    clocks = [r.clock for r in rigs]
    rigs.clear()
    del r
    gc.collect()
    assert [manager for manager in managers if manager() is not None] == []
    assert len(clocks) == 100


@pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning")  # as a file that was not closed would say
@pytest.mark.parametrize("close", [True, False])
async def test_managers_that_used_real_sockets_leave_nothing_either(clean: Path, close: bool) -> None:
    async with Simulator() as simulator:
        source = real(simulator)
        managers = []
        for _ in range(5):
            manager = await made(source)
            await manager.get_client().chat("hello")
            if close:
                await manager.close()
            managers.append(weakref.ref(manager))
        del manager
        # The thread that made the last one may hold its result until it has something else to do.
        await asyncio.to_thread(int)
        gc.collect()
        assert [manager() for manager in managers] == [None] * 5
    for _ in range(10):
        # What is still connected ends with its server.
        await asyncio.sleep(0)
    gc.collect()


# ---------------------------------------------------------------- one manager for each loop


def test_each_loop_has_a_manager_of_its_own_and_an_old_loop_is_let_go(clean: Path) -> None:
    async def use() -> tuple[str, Any, Any]:
        async with Simulator() as simulator:
            manager = await get_llm_manager(real(simulator))
            assert await get_llm_manager() is manager
            text = await manager.get_client().chat("hello")
            await manager.close()
            return text, weakref.ref(asyncio.get_running_loop()), weakref.ref(manager)

    first, second = asyncio.run(use()), asyncio.run(use())
    assert first[0] == second[0]
    gc.collect()
    assert first[1]() is None
    assert first[2]() is None


async def test_asking_together_makes_one_manager(clean: Path) -> None:
    managers = await asyncio.gather(*(get_llm_manager(configuration()) for _ in range(20)))
    assert len({id(manager) for manager in managers}) == 1
    await close_llm_manager()


async def test_after_closing_the_next_one_is_new(clean: Path) -> None:
    first = await get_llm_manager(configuration())
    await close_llm_manager()
    await close_llm_manager()
    with pytest.raises(LLMConnectionError):
        await first.get_client().chat(PROMPT)
    second = await get_llm_manager(configuration())
    assert second is not first
    await second.close()
    third = await get_llm_manager(configuration())
    assert third is not second, "one that was closed by hand is not handed out again"
    await close_llm_manager()


async def test_a_manager_that_was_set_is_handed_out_and_the_one_before_is_restored(clean: Path) -> None:
    before = await get_llm_manager(configuration())
    async with rig([answer()]) as r:
        with set_llm_manager(r.manager):
            assert await get_llm_manager() is r.manager
            assert await (await get_llm_manager()).get_client().chat(PROMPT) == "hello"
        assert await get_llm_manager() is before
        set_llm_manager(r.manager)
        assert await get_llm_manager() is r.manager
        set_llm_manager(None)
    await before.close()


def test_loops_in_threads_do_not_disturb_each_other(clean: Path) -> None:
    problems: list[BaseException] = []

    def work() -> None:
        async def use() -> None:
            manager = await get_llm_manager(configuration())
            assert await get_llm_manager() is manager
            await close_llm_manager()

        try:
            for _ in range(5):
                asyncio.run(use())
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_outside_a_loop_there_is_none_to_ask_for() -> None:
    with pytest.raises(RuntimeError):
        set_llm_manager(None)


# ---------------------------------------------------------------- where a configuration is found


async def test_nothing_configured_lists_the_ways(clean: Path) -> None:
    with pytest.raises(LLMConfigurationError) as caught:
        await get_llm_manager()
    for way in ("LLM_CONFIG", "config/llm.yaml", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "simulat"):
        assert way in str(caught.value)
    await get_llm_manager(configuration())
    await close_llm_manager()


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
async def test_a_vendors_key_in_the_environment_alone_is_enough_to_work(
    clean: Path, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> None:
    async with Simulator() as simulator:
        monkeypatch.setenv(f"{dialect.upper()}_API_KEY", "from-the-environment")
        monkeypatch.setenv(f"{dialect.upper()}_BASE_URL", getattr(simulator, f"{dialect}_url"))
        client = (await llm.get_llm_manager()).get_client()
        assert client.provider == dialect
        assert "hello" in await client.chat("hello")
        await close_llm_manager()
        assert [(a.key, a.dialect, a.status) for a in simulator.journal] == [("from-the-environment", dialect, 200)]


@pytest.mark.parametrize("where", ["config/llm.yaml", "elsewhere.yaml"])
async def test_a_file_is_found_by_its_place_or_by_its_name(
    clean: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async with Simulator() as simulator:
        path = clean / where
        await asyncio.to_thread(path.parent.mkdir, exist_ok=True)
        await asyncio.to_thread(
            path.write_text,
            f"providers:\n  openai:\n    base_url: {simulator.openai_url}\n    api_keys: ${{THE_KEY}}\n    models: m\n",
        )
        monkeypatch.setenv("THE_KEY", "from-the-file")
        monkeypatch.setenv("OPENAI_API_KEY", "not-this-one")
        if where != "config/llm.yaml":
            monkeypatch.setenv("LLM_CONFIG", str(path))
        async with await asyncio.to_thread(LLMManager.discover) as manager:
            assert manager.settings.source.endswith(where)
            await manager.get_client().chat("hello")
        async with await made(path) as manager:
            await manager.get_client().chat("hello")
        async with await made(str(path)) as manager:
            await manager.get_client().chat("hello")
        assert [arrival.key for arrival in simulator.journal] == ["from-the-file"] * 3


async def test_the_projects_own_file_takes_its_providers_from_the_environment(
    clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Simulator() as simulator:
        path = Path(__file__).parent.parent.parent / "config" / "llm.yaml"
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        monkeypatch.setenv("OPENAI_BASE_URL", simulator.openai_url)
        async with await made(path) as manager:
            assert "hello" in await manager.get_client().chat("hello")


async def test_what_is_wrong_in_a_configuration_is_told_by_its_path_and_without_the_key() -> None:
    config = configuration(pool={"max_sise": 3})
    with pytest.raises(LLMConfigurationError, match=r"providers\.vendor\.pool\.max_sise.*max_size") as caught:
        await made(config)
    assert secret(1) not in str(caught.value)


async def test_a_retired_model_is_sent_as_configured_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = configuration(models="claude-3-opus-20240229", dialect="anthropic")
    del config["providers"]["vendor"]["base_url"]
    async with rig(config=config) as r:
        key = r.manager.get_status()["providers"]["vendor"]["keys"][0]
    assert key["model"] == "claude-3-opus-20240229"
    assert [r.getMessage() for r in caplog.records if "retired" in r.getMessage()]


async def test_limits_are_kept_by_the_manager_on_the_clock() -> None:
    limits = {"requests_per_minute": 2}
    async with rig(lambda _: answer(), config=configuration(keys=2, rate_limits=limits)) as r:
        calls = [asyncio.create_task(r.client.chat(PROMPT)) for _ in range(6)]
        await r.clock.settle()
        assert r.keys == [1, 2, 1, 2]
        await r.clock.advance(61.0)
        assert len(r.keys) == 6
        assert await asyncio.gather(*calls) == ["hello"] * 6


async def test_a_call_in_the_queue_when_the_manager_closes_is_told_so() -> None:
    limits = {"requests_per_minute": 1}
    async with rig(lambda _: answer(), config=configuration(rate_limits=limits)) as r:
        await r.client.chat(PROMPT)
        waiting = asyncio.create_task(r.client.chat(PROMPT))
        await r.clock.advance(5.0)
        await r.manager.close()
        with pytest.raises(LLMPoolExhaustedError, match="closed"):
            await waiting


async def test_a_transport_may_be_given_for_each_provider() -> None:
    transports = {name: ScriptedTransport([answer(name)]) for name in ("first", "second")}
    manager = await asyncio.to_thread(
        lambda: LLMManager.from_config(TWO, environ={}, transport=lambda settings, clock: transports[settings.name])
    )
    async with manager:
        assert await manager.get_client("first").chat(PROMPT) == "first"
        assert await manager.get_client("second").chat(PROMPT) == "second"
