"""What every store must do, as one suite: a subclass says how to open one, and inherits the sentences."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.stores.base import Store
from llm.testing.clock import FakeClock


class StoreConformance:
    """Subclass it as ``Test…`` and give it :meth:`opened`."""

    def opened(self, clock: FakeClock) -> AbstractAsyncContextManager[Store]:
        """An empty store whose time is *clock*'s."""
        raise NotImplementedError

    async def test_what_was_never_stored_is_none(self) -> None:
        async with self.opened(FakeClock()) as store:
            assert await store.get("nothing") is None

    async def test_what_was_stored_is_given_back_as_it_was(self) -> None:
        async with self.opened(FakeClock()) as store:
            for value in (b"", b"value", b"\x00\xff" * 1000):
                await store.set("key", value)
                assert await store.get("key") == value

    async def test_keys_are_apart_and_may_be_any_text(self) -> None:
        async with self.opened(FakeClock()) as store:
            for key in ("", "a", "a:b", "ключ", "a" * 1000):
                await store.set(key, key.encode())
            for key in ("", "a", "a:b", "ключ", "a" * 1000):
                assert await store.get(key) == key.encode()

    async def test_what_is_stored_again_replaces_value_and_time(self) -> None:
        clock = FakeClock()
        async with self.opened(clock) as store:
            await store.set("key", b"old", ttl=10.0)
            await store.set("key", b"new")
            await clock.advance(1000.0)
            assert await store.get("key") == b"new"
            await store.set("key", b"newer", ttl=1.0)
            await clock.advance(1.0)
            assert await store.get("key") is None

    async def test_it_is_there_until_its_time_is_over_and_not_after(self) -> None:
        clock = FakeClock()
        async with self.opened(clock) as store:
            await store.set("key", b"value", ttl=10.0)
            await clock.advance(9.5)
            assert await store.get("key") == b"value"
            await clock.advance(0.5)
            assert await store.get("key") is None

    @pytest.mark.parametrize("ttl", [0.0, -1.0])
    async def test_a_time_that_is_over_stores_nothing(self, ttl: float) -> None:
        async with self.opened(FakeClock()) as store:
            await store.set("key", b"old")
            await store.set("key", b"value", ttl=ttl)
            assert await store.get("key") is None

    async def test_what_is_deleted_is_gone_and_deleting_it_again_does_nothing(self) -> None:
        async with self.opened(FakeClock()) as store:
            await store.set("key", b"value")
            await store.delete("key")
            await store.delete("key")
            assert await store.get("key") is None

    async def test_closing_twice_does_no_harm(self) -> None:
        async with self.opened(FakeClock()) as store:
            await store.close()
            await store.close()

    @given(steps=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["set", "short", "delete", "wait"]))))
    async def test_it_agrees_with_a_dictionary_of_expiries(self, steps: list[tuple[str, str]]) -> None:
        clock = FakeClock()
        model: dict[str, tuple[bytes, float]] = {}
        async with self.opened(clock) as store:
            for number, (key, action) in enumerate(steps):
                value = b"%d" % number
                if action == "set":
                    await store.set(key, value)
                    model[key] = (value, float("inf"))
                elif action == "short":
                    await store.set(key, value, ttl=2.0)
                    model[key] = (value, clock.now() + 2.0)
                elif action == "delete":
                    await store.delete(key)
                    model.pop(key, None)
                else:
                    await clock.advance(1.0)
                for name in "abc":
                    expected, until = model.get(name, (None, 0.0))
                    assert await store.get(name) == (expected if until > clock.now() else None)
