"""The store of a single process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llm.stores.base import Store
from llm.stores.memory import MemoryStore
from llm.testing.clock import FakeClock
from tests.stores.conformance import StoreConformance


class TestMemoryStore(StoreConformance):
    @asynccontextmanager
    async def opened(self, clock: FakeClock) -> AsyncIterator[Store]:
        store = MemoryStore(clock=clock)
        yield store
        await store.close()


async def test_at_its_bound_the_entry_used_longest_ago_makes_room() -> None:
    store = MemoryStore(clock=FakeClock(), max_entries=2)
    await store.set("a", b"1")
    await store.set("b", b"2")
    await store.get("a")
    await store.set("c", b"3")
    assert [await store.get(key) for key in "abc"] == [b"1", None, b"3"]


async def test_it_never_holds_more_than_its_bound() -> None:
    store = MemoryStore(clock=FakeClock(), max_entries=3)
    for number in range(100):
        await store.set(str(number), b"")
        await store.set("same", b"")
    assert repr(store) == "<MemoryStore: 3 of 3 entries>"


async def test_a_closed_store_has_forgotten() -> None:
    store = MemoryStore(clock=FakeClock())
    await store.set("a", b"1")
    await store.close()
    assert await store.get("a") is None
