"""The store of a single process: a dictionary that forgets."""

from __future__ import annotations

from collections import OrderedDict

from ..utils.clock import Clock


class MemoryStore:
    """Implements :class:`~.base.Store`; at *max_entries* the entry that was used longest ago makes room."""

    def __init__(self, *, clock: Clock, max_entries: int = 10_000) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self._entries: OrderedDict[str, tuple[bytes, float | None]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<MemoryStore: {len(self._entries)} of {self._max_entries} entries>"

    async def get(self, key: str) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, expiry = entry
        if expiry is not None and expiry <= self._clock.now():
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return value

    async def set(self, key: str, value: bytes, *, ttl: float | None = None) -> None:
        self._entries[key] = (value, self._clock.now() + ttl if ttl is not None else None)
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    async def delete(self, key: str) -> None:
        self._entries.pop(key, None)

    async def close(self) -> None:
        self._entries.clear()
