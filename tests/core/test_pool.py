"""The pool: clients in round robin, and what keys learn from what they are told."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm.core.config import load
from llm.core.events import Event, Events, KeyParked, KeyPaused, KeyRestored
from llm.core.exceptions import (
    LLMAuthenticationError,
    LLMConnectionError,
    LLMException,
    LLMModelNotFoundError,
    LLMQuotaExhaustedError,
    LLMRateLimitError,
)
from llm.core.pool import FIRST_PAUSE, LONGEST_PAUSE, Key, PooledClient, ProviderPool
from llm.testing.clock import FakeClock
from llm.testing.transport import Answer
from llm.transports.base import HTTPRequest
from tests.core.rig import PROMPT, Rig, answer, build, configuration, failure, is_probe, key_of, model_of, rig, secret

NO_RETRY = {"retry": {"enabled": False}}


class Vendor:
    """Answers every request by what it thinks of the key, and probes likewise."""

    def __init__(self, refused: dict[int, Answer] | None = None, probes: dict[int, Answer] | None = None) -> None:
        self.refused: dict[int, Answer] = refused or {}
        self.probes: dict[int, Answer] = probes or {}

    def __call__(self, request: HTTPRequest) -> Answer:
        number = key_of(request)
        if is_probe(request):
            return self.probes.get(number) or self.refused.get(number) or answer()
        return self.refused.get(number) or answer(model=model_of(request))


class Probe:
    """A probe whose answers are set, and which counts."""

    def __init__(self, status: int | Exception = 401) -> None:
        self.status = status
        self.asked: list[str] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, secret: str) -> int:
        self.asked.append(secret)
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.status, Exception):
            raise self.status
        return self.status


class Bench:
    """A pool alone, with its clock, its probe and what it told."""

    def __init__(
        self, keys: int = 3, *, random: Callable[[], float] = lambda: 0.0, listen: bool = True, **provider: Any
    ) -> None:
        settings = load(configuration(keys, **provider), environ={}, warn=print).providers["vendor"]
        self.clock = FakeClock()
        self.probe = Probe()
        self.events = Events()
        self.told: list[Event] = []
        if listen:
            self.events.listen(self.told.append, KeyParked, KeyPaused, KeyRestored)
        self.pool = ProviderPool(
            settings, clock=self.clock, random=random, events=self.events, probe=self.probe, default_model="default"
        )

    def take(self, model: str | None = None) -> PooledClient | None:
        """What admission does when no limit binds: the first key in rotation that is available and has a client."""
        for key in self.pool.rotation(self.pool.route(model)):
            if key.available_at <= self.clock.now():
                return self.pool.lease(key)
        return None

    def must_take(self, model: str | None = None) -> PooledClient:
        client = self.take(model)
        assert client is not None
        return client

    def fail(self, error: LLMException, number: int = 1) -> None:
        """One attempt on key *number* ends with *error*."""
        error.key_id = f"vendor/{number}"
        lease = self.pool.lease(self.pool.keys[number - 1])
        assert lease is not None
        self.pool.release(lease, error)

    @property
    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.told]

    def state(self, number: int = 1) -> str:
        return self.pool.keys[number - 1].state(self.clock.now())


# ---------------------------------------------------------------- clients


def test_clients_are_made_in_round_robin() -> None:
    bench = Bench(pool={"max_size": 4})
    taken = [bench.must_take() for _ in range(4)]
    assert [client.key.ref.number for client in taken] == [1, 2, 3, 1]
    assert [client.number for client in taken] == [1, 2, 3, 4]
    assert bench.take() is None


def test_a_free_client_of_a_key_is_used_again_and_costs_nothing() -> None:
    bench = Bench(keys=1)
    first = bench.must_take()
    bench.pool.release(first, None)
    assert bench.take() is first
    assert bench.pool.statistics()["clients"]["created"] == 1


def test_a_full_pool_recycles_an_idle_client_of_another_key() -> None:
    bench = Bench(pool={"max_size": 2})
    one, two = bench.must_take(), bench.must_take()
    assert bench.take() is None, "both are busy"
    bench.pool.release(one, None)
    third = bench.must_take()
    assert third.key.ref.number == 3
    clients = bench.pool.statistics()["clients"]
    assert (clients["in_use"], clients["idle"], clients["created"], clients["recycled"]) == (2, 0, 3, 1)
    bench.pool.release(two, None)
    bench.pool.release(third, None)
    assert bench.pool.statistics()["clients"]["idle"] == 2


async def test_a_client_is_replaced_after_its_age() -> None:
    bench = Bench(keys=1, pool={"max_age": 10, "max_size": 1})
    first = bench.must_take()
    await bench.clock.advance(9.0)
    bench.pool.release(first, None)
    assert bench.must_take() is first
    bench.pool.release(first, None)
    await bench.clock.advance(1.0)
    second = bench.must_take()
    assert second is not first
    await bench.clock.advance(10.0)
    bench.pool.release(second, None)
    clients = bench.pool.statistics()["clients"]
    assert (clients["in_use"], clients["idle"], clients["created"]) == (0, 0, 2)


def test_a_client_is_replaced_after_its_number_of_requests() -> None:
    bench = Bench(keys=1, pool={"max_requests": 2})
    numbers = []
    for _ in range(5):
        client = bench.must_take()
        numbers.append(client.number)
        bench.pool.release(client, None)
    assert numbers == [1, 1, 2, 2, 3]


def test_what_the_pool_says_of_itself_is_true_and_holds_no_secret() -> None:
    bench = Bench()
    client = bench.must_take()
    bench.fail(LLMRateLimitError("slow down", retry_after=5.0), 2)
    said = f"{bench.pool!r} {client!r} {bench.pool.keys!r} {bench.pool.statistics()!r}"
    assert repr(bench.pool) == "<ProviderPool vendor: 1 of 2 clients in use, keys 1 healthy, 2 paused, 3 healthy>"
    assert repr(client) == "<PooledClient 1 on vendor/1, 0 served>"
    assert bench.pool.statistics()["keys"][1]["paused_for"] == 5.0
    for number in (1, 2, 3):
        assert secret(number) not in said


# ---------------------------------------------------------------- routes


def test_a_model_goes_to_the_keys_that_have_it_and_none_goes_to_all() -> None:
    bench = Bench(models=["a", "b", "a"])
    assert [key.ref.number for key in bench.pool.route("a")] == [1, 3]
    assert [key.ref.number for key in bench.pool.route("b")] == [2]
    assert [key.ref.number for key in bench.pool.route(None)] == [1, 2, 3]
    assert [bench.must_take("a").key.ref.number for _ in range(4)] == [1, 3, 1, 3]


def test_a_key_without_a_model_takes_any() -> None:
    bench = Bench(models=["a", None, "b"])
    assert [key.ref.number for key in bench.pool.route("a")] == [1, 2]
    assert [key.ref.number for key in bench.pool.route("whatever")] == [2]


def test_a_model_that_no_key_has_is_refused_by_the_nearest_name() -> None:
    bench = Bench(models=["claude-haiku", "claude-opus", "claude-opus"])
    with pytest.raises(LLMModelNotFoundError) as caught:
        bench.pool.route("claude-opos")
    assert "did you mean 'claude-opus'? Configured: claude-haiku, claude-opus." in str(caught.value)
    with pytest.raises(LLMModelNotFoundError, match=r"for model 'x'\. Configured: "):
        bench.pool.route("x")


async def test_the_key_that_was_granted_decides_the_model() -> None:
    async with rig(Vendor(), config=configuration(keys=3, models=["a", "b", "c"])) as r:
        assert [(await r.client.complete(PROMPT)).model for _ in range(4)] == ["a", "b", "c", "a"]
        assert (await r.client.complete(PROMPT, model="c")).model == "c"
        assert r.keys == [1, 2, 3, 1, 3]


# ---------------------------------------------------------------- pauses


async def test_a_429_with_retry_after_pauses_the_key_for_as_long() -> None:
    bench = Bench(random=lambda: 0.5)
    bench.fail(LLMRateLimitError("slow down", retry_after=10.0))
    assert bench.state() == "paused"
    assert bench.kinds == ["KeyPaused"]
    event = bench.told[0]
    assert isinstance(event, KeyPaused)
    assert event.seconds == pytest.approx(10.5), "a little at random, so that not all come back at once"
    await bench.clock.advance(10.4)
    assert bench.state() == "paused"
    await bench.clock.advance(0.2)
    assert bench.state() == "healthy"


@pytest.mark.parametrize("hint", [None, 0.0])
async def test_a_429_without_a_hint_backs_off_longer_each_time_until_one_succeeds(hint: float | None) -> None:
    bench = Bench()
    pauses = []
    for _ in range(10):
        bench.fail(LLMRateLimitError("slow down", retry_after=hint))
        pauses.append(bench.pool.keys[0].paused_until - bench.clock.now())
        await bench.clock.advance(pauses[-1])
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    lease = bench.must_take()
    bench.pool.release(lease, None)
    bench.fail(LLMRateLimitError("slow down", retry_after=hint), lease.key.ref.number)
    assert lease.key.paused_until - bench.clock.now() == FIRST_PAUSE


async def test_refusals_that_were_under_way_together_are_one_strike() -> None:
    bench = Bench(keys=1)
    leases = [bench.must_take() for _ in range(5)]
    for lease in leases:
        bench.pool.release(lease, LLMRateLimitError("slow down", key_id="vendor/1"))
    assert bench.pool.keys[0].paused_until - bench.clock.now() == FIRST_PAUSE
    assert bench.kinds == ["KeyPaused"]


async def test_a_shorter_pause_does_not_shorten_a_longer_one() -> None:
    bench = Bench(keys=1)
    leases = [bench.must_take() for _ in range(2)]
    for lease, seconds in zip(leases, (10.0, 1.0), strict=True):
        bench.pool.release(lease, LLMRateLimitError("slow down", key_id="vendor/1", retry_after=seconds))
    assert bench.pool.keys[0].paused_until - bench.clock.now() == 10.0


async def test_a_day_long_retry_after_parks_the_key_and_calls_are_told_at_once() -> None:
    async with rig(Vendor({1: failure(429, retry_after="86400")}), config=configuration(middleware=NO_RETRY)) as r:
        with pytest.raises(LLMRateLimitError):
            await r.client.complete(PROMPT)
        assert r.states == ["parked"]
        await r.clock.advance(3600.0)
        with pytest.raises(LLMRateLimitError) as caught:
            await r.client.complete(PROMPT)
        assert caught.value.retry_after == pytest.approx(82_800.0)
        assert not caught.value.retryable
        assert len(r.keys) == 1
        assert r.probes == [], "its vendor has said when to come back"


async def test_an_error_of_another_key_or_of_the_request_teaches_nothing() -> None:
    bench = Bench()
    lease = bench.must_take()
    bench.pool.release(lease, LLMRateLimitError("slow down", key_id="vendor/3"))
    bench.pool.release(bench.must_take(), LLMConnectionError("lost", key_id="vendor/2"))
    bench.pool.release(bench.must_take(), asyncio.CancelledError())
    bench.pool.release(bench.must_take(), ZeroDivisionError())
    assert [bench.state(number) for number in (1, 2, 3)] == ["healthy"] * 3


# ---------------------------------------------------------------- parking


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (failure(401, "bad key"), LLMAuthenticationError),
        (failure(402, "pay"), LLMQuotaExhaustedError),
        (failure(429, "no credit", code="insufficient_quota"), LLMQuotaExhaustedError),
    ],
)
async def test_a_key_that_is_of_no_use_is_parked_and_calls_fail_at_once_with_the_cause(
    refusal: Answer, kind: type[LLMException]
) -> None:
    async with rig(Vendor({1: refusal})) as r:
        with pytest.raises(kind):
            await r.client.complete(PROMPT)
        with pytest.raises(kind) as caught:
            await r.client.complete(PROMPT)
        assert type(caught.value) is kind
        assert "the only key of vendor that could take this call is out of use" in str(caught.value)
        assert not caught.value.retryable
        assert r.keys == [1]
        assert r.states == ["parked"]
        reason = r.manager.get_status()["providers"]["vendor"]["keys"][0]["reason"]
        assert kind.__name__ in reason


async def test_with_one_of_three_keys_dead_the_other_two_serve_every_call() -> None:
    async with rig(Vendor({2: failure(401)}), config=configuration(keys=3)) as r:
        with r.manager.events.subscribe() as told:
            for _ in range(12):
                assert await r.client.chat(PROMPT) == "hello"
            parked = [event for event in told.drain() if isinstance(event, KeyParked)]
        assert r.keys.count(2) == 1
        assert r.keys.count(1) == r.keys.count(3) == 6
        assert r.states == ["healthy", "parked", "healthy"]
        assert [event.key_id for event in parked] == ["vendor/2"]
        assert r.manager.get_status()["metrics"]["requests"]["failed"] == 0


async def test_with_a_dead_key_concurrent_calls_are_all_served() -> None:
    async with rig(Vendor({2: failure(401)}), config=configuration(keys=3)) as r:
        answers = await asyncio.gather(*(r.client.chat(PROMPT) for _ in range(30)))
        assert answers == ["hello"] * 30


async def test_with_all_keys_dead_one_call_tries_each_and_the_next_none() -> None:
    async with rig(Vendor(dict.fromkeys((1, 2, 3), failure(401, "revoked"))), config=configuration(keys=3)) as r:
        with pytest.raises(LLMAuthenticationError) as caught:
            await r.client.complete(PROMPT)
        assert r.keys == [1, 2, 3]
        assert [record.key_id for record in caught.value.attempts] == ["vendor/1", "vendor/2", "vendor/3"]
        with pytest.raises(LLMAuthenticationError, match="each of the 3 keys of vendor.*revoked"):
            await r.client.complete(PROMPT)
        assert len(r.keys) == 3


async def test_a_call_that_waits_is_told_when_its_last_key_is_parked() -> None:
    limits = {"requests_per_minute": 1}
    async with rig(Vendor({2: failure(401)}), config=configuration(keys=2, rate_limits=limits)) as r:
        await r.client.complete(PROMPT)
        first = asyncio.create_task(r.client.complete(PROMPT, timeout=500.0))
        await r.clock.settle()
        assert r.states == ["healthy", "parked"]
        await r.clock.advance(70.0)
        assert (await first).text == "hello"


# ---------------------------------------------------------------- 403 and probes


async def test_a_403_of_a_good_key_is_the_requests_error() -> None:
    vendor = Vendor({1: failure(403, "not for you")}, {1: answer()})
    async with rig(vendor, config=configuration(keys=2)) as r:
        with pytest.raises(LLMAuthenticationError) as caught:
            await r.client.complete(PROMPT)
        assert caught.value.scope == "request"
        assert (r.keys, r.probes) == ([1], [1])
        assert r.states == ["healthy", "healthy"]


async def test_a_403_of_a_key_whose_probe_is_refused_too_parks_it_and_the_call_goes_on() -> None:
    async with rig(Vendor({1: failure(403)}), config=configuration(keys=2)) as r:
        assert await r.client.chat(PROMPT) == "hello"
        assert (r.keys, r.probes) == ([1, 2], [1])
        assert r.states == ["parked", "healthy"]


async def test_a_probe_that_nobody_answers_says_nothing_against_the_key() -> None:
    vendor = Vendor({1: failure(403)}, {1: LLMConnectionError("lost")})
    async with rig(vendor) as r:
        with pytest.raises(LLMAuthenticationError):
            await r.client.complete(PROMPT)
        assert r.states == ["healthy"]


async def test_calls_that_ask_together_share_one_probe_and_its_answer_is_remembered_for_a_while() -> None:
    bench = Bench(keys=1)
    key = bench.pool.keys[0]
    bench.probe.gate = asyncio.Event()
    bench.probe.status = 200
    asking = [asyncio.create_task(bench.pool.works(key)) for _ in range(5)]
    await bench.clock.settle()
    asking[0].cancel()
    await bench.clock.settle()
    bench.probe.gate.set()
    assert await asyncio.gather(*asking[1:]) == [True] * 4, "the cancellation of one does not answer for the others"
    assert await bench.pool.works(key)
    assert bench.probe.asked == [secret(1)]
    bench.probe.status = 401
    await bench.clock.advance(5.0)
    assert not await bench.pool.works(key)


async def test_a_fault_in_the_probe_itself_is_counted_and_fails_no_call() -> None:
    bench = Bench(keys=1)
    bench.probe.status = ZeroDivisionError()
    assert await bench.pool.works(bench.pool.keys[0])
    assert bench.events.faults == {"probe: ZeroDivisionError": 1}


async def test_a_parked_key_is_probed_at_growing_intervals_until_it_works() -> None:
    bench = Bench(keys=1, pool={"probe_interval": 30, "probe_max_interval": 100})
    bench.fail(LLMAuthenticationError("revoked"))
    started = bench.clock.now()
    instants: list[float] = []
    for _ in range(400):
        before = len(bench.probe.asked)
        await bench.clock.advance(1.0)
        instants += [bench.clock.now() - started] * (len(bench.probe.asked) - before)
    assert instants == [30.0, 90.0, 190.0, 290.0, 390.0]
    bench.probe.status = 200
    await bench.clock.advance(100.0)
    assert bench.state() == "healthy"
    assert bench.kinds == ["KeyParked", "KeyRestored"]
    assert bench.clock.timers == 0


async def test_a_key_that_is_parked_again_and_again_is_asked_for_less_often_but_within_the_bound() -> None:
    bench = Bench(keys=1, pool={"probe_interval": 30, "probe_max_interval": 100})
    bench.probe.status = 200
    waits = []
    for _ in range(4):
        bench.fail(LLMQuotaExhaustedError("no credit"))
        started = bench.clock.now()
        while bench.state() == "parked":
            await bench.clock.advance(1.0)
        waits.append(bench.clock.now() - started)
    assert waits == [30.0, 60.0, 100.0, 100.0]


async def test_a_probe_that_fails_leaves_the_key_parked_and_the_next_one_set() -> None:
    bench = Bench(keys=1)
    bench.fail(LLMAuthenticationError("revoked"))
    for status in (LLMConnectionError("lost"), ZeroDivisionError(), 503):
        bench.probe.status = status
        assert bench.clock.timers == (0 if bench.state() == "healthy" else 1)
        await bench.clock.advance(1000.0)
    assert bench.state() == "healthy", "a vendor in trouble that lets the key in does not refuse the key"


async def test_a_restored_key_serves_again() -> None:
    vendor = Vendor({1: failure(401)})
    async with rig(vendor) as r:
        with pytest.raises(LLMAuthenticationError):
            await r.client.complete(PROMPT)
        del vendor.refused[1]
        await r.clock.advance(30.0)
        assert await r.client.chat(PROMPT) == "hello"
        assert r.states == ["healthy"]


async def test_what_a_key_learns_wakes_whoever_listens() -> None:
    bench = Bench(keys=1)
    changes: list[str] = []
    bench.pool.on_change(lambda: changes.append(bench.state()))
    bench.fail(LLMRateLimitError("slow down", retry_after=1.0))
    await bench.clock.advance(1.0)
    bench.fail(LLMAuthenticationError("revoked"))
    bench.probe.status = 200
    await bench.clock.advance(30.0)
    assert changes == ["paused", "parked", "healthy"]


# ---------------------------------------------------------------- the end


async def test_a_closed_pool_has_no_timer_and_no_task_and_refuses() -> None:
    bench = Bench(keys=2)
    bench.fail(LLMAuthenticationError("revoked"), 1)
    bench.probe.gate = asyncio.Event()
    await bench.clock.advance(30.0)
    bench.fail(LLMAuthenticationError("revoked"), 2)
    asking = asyncio.create_task(bench.pool.works(bench.pool.keys[0]))
    await bench.clock.settle()
    await bench.pool.close()
    assert await asking, "not a cancellation: nobody has cancelled the one who asked"
    assert bench.clock.timers == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    bench.fail(LLMAuthenticationError("revoked"), 2)
    assert bench.clock.timers == 0
    assert isinstance(bench.pool.refusal(bench.pool.route(None)), LLMConnectionError)
    await bench.pool.close()


@pytest.fixture
def collector() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


@pytest.mark.usefixtures("collector")
async def test_a_dropped_pool_with_a_probe_to_come_is_collected() -> None:
    bench = Bench(keys=1)
    clock = bench.clock
    bench.fail(LLMAuthenticationError("revoked"))
    assert clock.timers == 1
    pool = weakref.ref(bench.pool)
    del bench
    gc.collect()
    assert pool() is None
    await clock.advance(100.0)


@pytest.mark.usefixtures("collector")
async def test_a_dropped_manager_with_a_parked_key_is_collected() -> None:
    made: list[Rig] = []
    await asyncio.to_thread(lambda: made.append(build(Vendor({1: failure(401)}))))
    with pytest.raises(LLMAuthenticationError):
        await made[0].client.complete(PROMPT)
    manager, clock = weakref.ref(made[0].manager), made[0].clock
    made.clear()
    gc.collect()
    assert manager() is None
    await clock.advance(100.0)


def test_a_key_shows_its_place_and_model_alone() -> None:
    settings = load(configuration(1), environ={}, warn=print).providers["vendor"]
    key = Key(settings, settings.keys[0])
    assert repr(key) == "<Key vendor/1 m>"
    assert key.secret() == secret(1)


# ---------------------------------------------------------------- with nobody listening


async def test_keys_are_paused_parked_and_restored_also_when_nobody_is_told() -> None:
    bench = Bench(1, listen=False)
    bench.fail(LLMRateLimitError("slow down", retry_after=5.0))
    assert bench.state() == "paused"
    await bench.clock.advance(6.0)
    assert bench.state() == "healthy"
    bench.fail(LLMAuthenticationError("revoked"))
    assert bench.state() == "parked"
    bench.probe.status = 200
    await bench.clock.advance(3600.0)
    assert bench.state() == "healthy"
    assert bench.told == []
