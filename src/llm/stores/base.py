"""The port of shared state: bytes under a key, for a time. What one process knows, its neighbours may read."""

from __future__ import annotations

from typing import Protocol


class Store(Protocol):
    """A key-value store. Layers that share state over processes (caches, budgets) are handed one."""

    async def get(self, key: str) -> bytes | None:
        """What was stored under *key*, None if nothing was or its time is over."""
        ...

    async def set(self, key: str, value: bytes, *, ttl: float | None = None) -> None:
        """Store *value* for *ttl* seconds, or for as long as the store keeps things."""
        ...

    async def delete(self, key: str) -> None:
        """Forget *key*; does nothing if it is not there."""
        ...

    async def close(self) -> None: ...
