"""Providers, stores and layers that another distribution has registered."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llm.core.exceptions import LLMConfigurationError
from llm.core.manager import LLMManager
from llm.testing.clock import FakeClock
from llm.testing.transport import ScriptedTransport
from tests.core.rig import PROMPT, answer, configuration

MODULE = """
from llm.providers.openai import OpenAIProvider
from llm.stores.memory import MemoryStore

stores, layers = [], []

def store(clock):
    stores.append(MemoryStore(clock=clock))
    return stores[-1]

class Layer:
    def __init__(self, settings, context):
        self.settings, self.context = settings, context
        layers.append(self)

    async def __call__(self, call, handler, /):
        return await handler(call)
"""
POINTS = """
[brimful.providers]
seed-dialect = seed_extension:OpenAIProvider
seed-broken = seed_extension:Missing

[brimful.stores]
seed-store = seed_extension:store

[brimful.middleware]
seed-layer = seed_extension:Layer
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution ``seed-extension`` on the path."""
    (tmp_path / "seed_extension.py").write_text(MODULE)
    metadata = tmp_path / "seed_extension-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: seed-extension\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(POINTS)
    monkeypatch.delitem(sys.modules, "seed_extension", raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def made(config: Mapping[str, Any]) -> LLMManager:
    clock = FakeClock()
    transport = ScriptedTransport([answer()], clock=clock)
    return LLMManager.from_config(config, environ={}, clock=clock, transport=lambda settings, clock: transport)


@pytest.mark.usefixtures("installed")
def test_what_is_registered_is_found_by_its_name() -> None:
    config = configuration(
        dialect="seed-dialect", middleware={"seed-layer": {"colour": "red"}, "logging": {"enabled": False}}
    )
    manager = made(config | {"store": "seed-store"})
    import seed_extension  # type: ignore[import-not-found]  # written by the fixture

    async def used() -> str:
        async with manager:
            return await manager.get_client().chat(PROMPT)

    assert asyncio.run(used()) == "hello"
    [layer], [store] = seed_extension.layers, seed_extension.stores
    assert layer.settings == {"colour": "red"}
    assert layer.context.provider == "vendor"
    assert layer.context.store is store


@pytest.mark.usefixtures("installed")
def test_what_is_registered_and_cannot_be_loaded_is_said_with_its_place_and_cause() -> None:
    with pytest.raises(LLMConfigurationError, match="seed-broken.*seed_extension:Missing.*cannot be loaded") as caught:
        made(configuration(dialect="seed-broken"))
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.usefixtures("installed")
def test_a_registered_name_is_suggested_for_one_that_is_nearly_it() -> None:
    with pytest.raises(LLMConfigurationError, match="seed-dialect"):
        made(configuration(dialect="seed-dialekt"))
