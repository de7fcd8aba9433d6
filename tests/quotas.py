"""What a manager tells of its quotas, for tests that look whether the books are right."""

from __future__ import annotations

from typing import Any

from llm import LLMManager


def quotas(manager: LLMManager) -> list[dict[str, Any]]:
    """The status of every quota that is in use, in the order of their first use."""
    return [
        quota
        for limits in manager.get_status()["limits"].values()
        for groups in limits["quotas"].values()
        for quota in groups.values()
    ]
