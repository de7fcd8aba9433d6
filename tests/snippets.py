"""Fenced blocks of Markdown pages: found, and run as a reader would run them. For test_spec.py and test_docs.py."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NOT_RUN = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->")


class Block(NamedTuple):
    """One fenced block. *line* is that of its first line of content, counted from 1."""

    language: str
    text: str
    line: int
    not_run: str | None = None
    """The reason, if the line before the block is `<!-- not run: reason -->`."""


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order; an unclosed one is a ValueError."""
    found: list[Block] = []
    lines = page.splitlines(keepends=True)
    before = ""
    opened: tuple[str, int] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            before = line if opened is None and line.strip() else before
        elif opened is None:
            opened = (line.removeprefix("```").strip(), number + 1)
        else:
            language, first = opened
            excuse = NOT_RUN.fullmatch(before.strip())
            found.append(Block(language, "".join(lines[first - 1 : number - 1]), first, excuse and excuse[1]))
            opened, before = None, ""
    if opened is not None:
        raise ValueError(f"the block that begins at line {opened[1]} is never closed")
    return found


def run(page: Iterable[Block], *, name: str) -> dict[str, Any]:
    """Run Python blocks one after the other in one namespace, with `await` at the top level; returns the namespace.

    All that awaits shares one event loop, whose manager is closed at the end. A block that awaits nothing runs outside
    of it, so that it may call `asyncio.run`.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with asyncio.Runner() as runner:
        try:
            for block in page:
                # As many empty lines as stand before it: a traceback then names the line of the page.
                source = "\n" * (block.line - 1) + block.text
                code = compile(source, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
                outcome = eval(code, namespace)
                if inspect.iscoroutine(outcome):
                    runner.run(outcome)
        finally:
            runner.run(_close())
    return namespace


async def _close() -> None:
    from llm import close_llm_manager

    await close_llm_manager()


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str, config: str | None = None) -> None:
    """Make *folder* the working directory, *config* its config/llm.yaml, and the server at *url* every vendor."""
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "LLM_CONFIG", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    for variable in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_API_KEY_2"):
        monkeypatch.setenv(variable, f"test-{variable}")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
    monkeypatch.setenv("OPENAI_BASE_URL", url + "/v1")
    monkeypatch.chdir(folder)
    if config is not None:
        (folder / "config").mkdir()
        (folder / "config" / "llm.yaml").write_text(config, encoding="utf-8")
