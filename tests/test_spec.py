"""The user's own description of this module, run as it is written.

The page is not part of the project: BRIMFUL_SPEC names it, and .ci/run sets that where it lies beside the checkout.
test_usage.py makes the same calls and always runs.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llm import LLMManager
from llm.testing.process import SimulatorProcess
from tests.snippets import Block, blocks, offline, run

SPEC = os.environ.get("BRIMFUL_SPEC", "")
pytestmark = pytest.mark.skipif(not SPEC, reason="BRIMFUL_SPEC names no page")

LIMITS = (50, 50000, 10000, 60.0)


@pytest.fixture(scope="module")
def page() -> list[Block]:
    return blocks(Path(SPEC).read_text(encoding="utf-8"))


@pytest.fixture
def simulator() -> Iterator[SimulatorProcess]:
    with SimulatorProcess(requests_per_minute=50) as simulator:
        yield simulator


def read_limits(manager: LLMManager, provider: str) -> list[tuple[object, ...]]:
    limits = [key.limits for key in manager.settings.providers[provider].keys]
    return [
        (of.requests_per_minute, of.input_tokens_per_minute, of.output_tokens_per_minute, of.window_seconds)
        for of in limits
    ]


def test_the_configuration_is_read_byte_for_byte(page: list[Block], tmp_path: Path) -> None:
    whole = next(block.text for block in page if block.language == "yaml")
    path = tmp_path / "llm.yaml"
    path.write_text(whole, encoding="utf-8")
    manager = LLMManager.from_config(path, environ={})
    keys = manager.settings.providers["anthropic"].keys
    assert [key.secret.reveal() for key in keys] == ["key1", "key2", "key3"]
    assert [key.model for key in keys] == [
        "claude-3-5-haiku-20241022",
        "claude-3-5-sonnet-20241022",
        "claude-3-opus-20240229",
    ]
    assert read_limits(manager, "anthropic") == [LIMITS] * 3


def test_the_fragment_is_read_byte_for_byte(page: list[Block]) -> None:
    _, fragment = (block.text for block in page if block.language == "yaml")
    provider = {"api_keys": ["key1", "key2", "key3"], **yaml.safe_load(fragment)}
    manager = LLMManager.from_config({"providers": {"anthropic": provider}}, environ={})
    assert read_limits(manager, "anthropic") == [LIMITS] * 3


def test_the_python_blocks_run_as_they_are_written(
    page: list[Block],
    simulator: SimulatorProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the page's own configuration, and one line after it: where the vendor is."""
    whole = next(block.text for block in page if block.language == "yaml")
    offline(monkeypatch, tmp_path, simulator.url, f"{whole}    base_url: {simulator.url}\n")
    # The tree of exceptions is a drawing, though its fence says python.
    code = [block for block in page if block.language == "python" and "├──" not in block.text]
    assert len(code) == 3

    run(code, name=SPEC)

    answer, streamed, rest = capsys.readouterr().out.partition("You said: What is Python?")
    assert answer == "You said: Hello, how are you?\n"
    assert streamed
    metrics = ast.literal_eval(rest.splitlines()[0])
    assert [metrics["requests"][name] for name in ("total", "successful", "failed")] == [3, 3, 0]
    assert metrics["tokens"]["total"] == metrics["tokens"]["input"] + metrics["tokens"]["output"] > 0
    assert 0 < metrics["latency"]["min"] <= metrics["latency"]["average"] <= metrics["latency"]["max"]
    assert metrics["errors_by_type"] == {}
    assert len(metrics["usage_by_model"]) == 3

    journal = simulator.read_journal()
    assert [arrival.key for arrival in journal] == ["key1", "key2", "key3"]
    assert [arrival.stream for arrival in journal] == [False, False, True]
    assert {name: journal[1].body[name] for name in ("temperature", "max_tokens")} == {
        "temperature": 0.7,
        "max_tokens": 200,
    }


def test_every_exception_of_the_drawing_is_a_child_of_the_base(page: list[Block]) -> None:
    import src.llm as module

    (drawing,) = (block.text for block in page if "├──" in block.text and "LLMException" in block.text)
    names = [word for word in drawing.replace("─", " ").split() if word.startswith("LLM")]
    assert names[0] == "LLMException"
    assert len(names) == 8
    assert all(getattr(module, name).__bases__ == (module.LLMException,) for name in names[1:])
