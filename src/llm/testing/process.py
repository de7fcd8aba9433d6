"""The simulator as its own process, so that neither side of a measurement costs the other its time."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from .faults import Chances, Script, by_whom
from .journal import Arrival, read_journal

_LISTENING = "listening on "
_STALLING = "stalling on "


class SimulatorProcess:
    """Start ``simulate`` with the options of the command line, and end it on leaving.

    It is a context manager of both kinds. The options are those of ``simulate --help``; *arguments* are appended as
    they are.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        requests_per_minute: int | None = None,
        input_tokens_per_minute: int | None = None,
        output_tokens_per_minute: int | None = None,
        window_seconds: float = 60.0,
        output_counting: str = "produced",
        latency: float | tuple[float, float] = 0.0,
        tokens_per_second: float = 0.0,
        faults: Chances | Mapping[str, Chances] | None = None,
        script: Script | Mapping[str, Script] = (),
        stalled_port: int | None = None,
        seed: int = 0,
        journal: Path | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.url = ""
        self.stalled_url = ""
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[str] | None = None
        self._journal_file = journal
        self._running_journal = journal or Path()
        self._last_journal: list[Arrival] = []
        options: dict[str, object] = {
            "port": port,
            "requests-per-minute": requests_per_minute,
            "input-tokens-per-minute": input_tokens_per_minute,
            "output-tokens-per-minute": output_tokens_per_minute,
            "window-seconds": window_seconds,
            "output-counting": output_counting,
            "latency": f"{latency[0]}:{latency[1]}" if isinstance(latency, tuple) else latency,
            "tokens-per-second": tokens_per_second,
            "stalled-port": stalled_port,
            "seed": seed,
        }
        self._stalls = stalled_port is not None
        self._arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
        for whom, chances in by_whom(faults or {}).items():
            self._arguments += [f"--fault={name}:{chance}@{whom}" for name, chance in chances.items()]
        for whom, kinds in (script if isinstance(script, Mapping) else {"*": script}).items():
            if kinds:
                self._arguments.append(f"--script={','.join(kind or 'ok' for kind in kinds)}@{whom}")
        self._arguments += arguments

    def __repr__(self) -> str:
        state = f"pid {self._process.pid}" if self._process is not None else "not running"
        return f"<SimulatorProcess {self.url or '-'} {state}>"

    @property
    def openai_url(self) -> str:
        """The base URL of the OpenAI dialect; Anthropic's is `url`."""
        return self.url + "/v1"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process and wait until it listens; RuntimeError with its own words if it does not."""
        if self._process is not None:
            raise RuntimeError("this simulator is already running")
        if self._journal_file is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="simulator-")
            journal = Path(self._temporary.name, "journal.jsonl")
        else:
            journal = self._journal_file
        journal.touch()
        # The package is named by its folder: `llm` in a checkout, `brimful` once installed.
        package = Path(__file__).resolve().parents[1]
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(package.parent), *([inherited] if inherited else [])])
        command = [sys.executable, "-m", package.name, "simulate", "--end-with-stdin", f"--journal={journal}"]
        self._process = subprocess.Popen(
            [*command, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._running_journal = journal
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(_LISTENING):
            complaint = self._process.communicate()[1].strip().splitlines()
            self.close()
            raise RuntimeError(f"the simulator did not start: {complaint[-1] if complaint else line.strip()}")
        self.url = line[len(_LISTENING) :].strip()
        if self._stalls:
            self.stalled_url = self._process.stdout.readline().removeprefix(_STALLING).strip()

    def read_journal(self) -> list[Arrival]:
        """What has arrived so far; after `close`, all that arrived, from memory.

        While the process runs this reads a file: inside a coroutine, call it with `asyncio.to_thread`.
        """
        return read_journal(self._running_journal) if self._process is not None else self._last_journal

    def close(self) -> None:
        """End the process and wait for it. Closing twice does nothing."""
        process = self._process
        if process is None:
            return
        try:
            process.terminate()
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            self._last_journal = read_journal(self._running_journal)
        finally:
            self._process = None
            if self._temporary is not None:
                self._temporary.cleanup()
                self._temporary = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)
