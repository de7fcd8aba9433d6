"""The judge of ``bench/storm.py`` lets a good storm pass, and catches each thing that could be wrong with one."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[1] / "bench" / "storm.py"


@pytest.fixture(scope="module")
def judge() -> Callable[..., dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("storm", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["storm"] = module
    spec.loader.exec_module(module)
    found: Callable[..., dict[str, Any]] = module.judge
    return found


def good() -> tuple[dict[str, Any], Counter[int], Counter[str]]:
    """A hundred calls a second, of which the primary is sent all but those of its bad minute."""
    calls = Counter(dict.fromkeys(range(120), 100))
    sent = {str(second): 100 for second in range(120) if second < 22 or second >= 83}
    return {"sent": sent, "first": 83.0}, calls, Counter({"answered by primary": 6000, "answered by fallback": 6000})


def test_a_good_storm_passes(judge: Callable[..., dict[str, Any]]) -> None:
    assert judge(*good())["beyond"] == []


def repeated(primary: dict[str, Any], outcomes: Counter[str]) -> None:
    primary["sent"] |= {str(second): 130 for second in range(20)}


def insisted(primary: dict[str, Any], outcomes: Counter[str]) -> None:
    primary["sent"] |= {str(second): 6 for second in range(22, 80)}


def late(primary: dict[str, Any], outcomes: Counter[str]) -> None:
    primary["first"] = 85.5


def never(primary: dict[str, Any], outcomes: Counter[str]) -> None:
    primary["first"] = 0.0


def rushed(primary: dict[str, Any], outcomes: Counter[str]) -> None:
    primary["sent"]["84"] = 121


def lost(primary: dict[str, Any], outcomes: Counter[str]) -> None:
    outcomes["answered by fallback"] -= 130
    outcomes["LLMOverloadedError"] = 130


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (repeated, "requests a call while healthy"),
        (insisted, "share of calls that tried the dead primary"),
        (late, "seconds until it serves again"),
        (never, "seconds until it serves again"),
        (rushed, "highest rate in the 5 s after"),
        (lost, "answered"),
    ],
)
def test_a_planted_fault_is_found(judge: Callable[..., dict[str, Any]], plant: Any, found: str) -> None:
    primary, calls, outcomes = good()
    plant(primary, outcomes)
    assert found in judge(primary, calls, outcomes)["beyond"]
