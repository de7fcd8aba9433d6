"""Fixtures of the transports' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.transports.authority import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture(params=["short", "long"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds by our own short way through aiohttp, and by its session, for a version not tried yet."""
    if request.param == "long":
        monkeypatch.setattr("llm.transports.http.DIRECT", False)
