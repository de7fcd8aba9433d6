"""The vendors' SDKs and LiteLLM's Router beside this package and the bare transport: ``python bench/peers.py``.

Each peer is a worker in an environment of its own, made under a cache folder outside the checkout (``--venvs``) and
filled from whatever index pip is configured with. All talk to one ``server.py``, on the other core where there are two.
Rounds are interleaved, so that only one worker does anything at a time; CPU is the worker's own. What a peer costs is
told as the median of rounds and as the median ratio to the bare transport in the same round. A peer that cannot be
installed is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from run import CannedServer
from server import MESSAGE_PIECES, PIECES

HERE = Path(__file__).resolve().parent
ROUNDS = 7
BUDGET = 0.5
"""Seconds of CPU a round, roughly: each peer makes as many calls as it manages in that."""
SETTINGS = (("whole", 1), ("whole", 64), ("whole", 500), ("burst", 1), ("burst", 32))


class Peer(NamedTuple):
    """*package* is what to install, None for what this interpreter has; *needs* is what a first call has imported."""

    name: str
    package: str | None
    version: str
    needs: str


PEERS = (
    Peer("bare", None, "", "aiohttp, msgspec"),
    # aiohttp is imported when a manager is made.
    Peer("brimful", None, "", "brimful, brimful.transports.http"),
    Peer("openai", "openai", "3.54.0", "openai"),
    Peer("anthropic", "anthropic", "2.12.0", "anthropic"),
    Peer("litellm", "litellm", "1.106.2", "litellm"),
)


class NotInstalledError(Exception):
    """pip could not install a peer; the message is its last word."""


def environment(peer: Peer) -> dict[str, str]:
    """For a worker: nothing of ours on the path of a peer, and no way to the outside."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    kept.pop("PYTHONPATH", None)
    if peer.package is None:
        kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path and path != str(HERE))
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    # LiteLLM would fetch its table of prices from the network when it is imported.
    return kept | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}


def interpreter(peer: Peer, venvs: Path) -> str:
    """The Python that has *peer*, which is installed first if need be: the version asked for, else the latest."""
    if peer.package is None:
        return sys.executable
    folder = venvs / f"{peer.package}-{peer.version}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for wanted in (f"{peer.package}=={peer.version}", peer.package):
            print(f"installing {wanted} ...", file=sys.stderr)
            done = subprocess.run([python, "-m", "pip", "install", "-q", wanted], capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            raise NotInstalledError((done.stderr.strip().splitlines() or ["pip failed"])[-1])
        (folder / "ready").touch()
    return python


class Worker:
    """One peer's process."""

    def __init__(self, peer: Peer, python: str, root: str) -> None:
        self.peer = peer
        self.python = python
        script = str(HERE / f"peer_{peer.name}.py")
        self.process = subprocess.Popen(
            [python, script, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(peer)
        )
        self.version = self._hear()["version"]
        self.rss = 0.0

    def round(self, mode: str, calls: int, concurrency: int) -> float:
        """Microseconds of CPU a call."""
        assert self.process.stdin is not None
        print(
            json.dumps({"mode": mode, "calls": calls, "concurrency": concurrency}), file=self.process.stdin, flush=True
        )
        answer = self._hear()
        self.rss = answer["rss"]
        return float(answer["us"])

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self.peer.name} has ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def imports(self, times: int = 5) -> float:
        """Milliseconds of CPU that importing it takes beyond ``import asyncio``, byte code cached."""

        def cost(modules: str) -> float:
            code = f"import time; t = time.process_time(); import {modules}; print(time.process_time() - t)"
            command = [self.python, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(self.peer))
            return float(done.stdout.split()[-1]) * 1e3

        cost(self.peer.needs)  # writes the byte code, if there is none yet
        return statistics.median(cost(f"asyncio, {self.peer.needs}") - cost("asyncio") for _ in range(times))

    def close(self) -> None:
        self.process.communicate(timeout=60)


@contextmanager
def workers(venvs: Path, root: str) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """Those that could be started, and why the others could not."""
    started: dict[str, Worker] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        for peer in PEERS:
            try:
                worker = Worker(peer, interpreter(peer, venvs), root)
            except (NotInstalledError, subprocess.CalledProcessError) as error:
                missing[peer.name] = str(error)
            else:
                stack.callback(worker.close)
                started[peer.name] = worker
        yield started, missing


def measure(found: dict[str, Worker], mode: str, concurrency: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians, of a call or of an event, and the median of each round's ratio to the bare transport."""
    calls = {}
    for name, worker in found.items():
        cost = worker.round(mode, concurrency, concurrency)
        calls[name] = max(concurrency, round(BUDGET / cost * 1e6 / concurrency) * concurrency)
    costs: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds):
        order = list(found) if number % 2 else list(reversed(found))
        for name in order:
            events = 1 if mode == "whole" else len(MESSAGE_PIECES if name == "anthropic" else PIECES)
            costs[name].append(found[name].round(mode, calls[name], concurrency) / events)
    return {
        name: {
            "us": round(statistics.median(values), 2),
            "ratio": round(statistics.median(v / b for v, b in zip(values, costs["bare"], strict=True)), 2),
        }
        for name, values in costs.items()
    }


def show(result: dict[str, Any]) -> None:
    names = list(result["peers"])
    columns = [key for key in result if key.startswith(("whole", "burst"))]
    print(f"\nCPU in µs (ratio to bare): a call for 'whole', an event for 'burst'; {result['machine']}\n")
    print(f"{'':<20}" + "".join(f"{column:>18}" for column in columns) + f"{'import ms':>12}{'RSS MB':>9}")
    for name in names:
        facts = result["peers"][name]
        cells = "".join(
            f"{result[c][name]['us']:>10.1f} {'(×' + format(result[c][name]['ratio'], '.1f') + ')':>7}" for c in columns
        )
        label = f"{name} {facts['version']}"
        print(f"{label:<20}{cells}{facts['import_ms']:>12.0f}{facts['rss_mb']:>9.0f}")
    for name, reason in result["not_installed"].items():
        print(f"{name:<20} not measured: {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "brimful-bench", help="where peers live")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    result: dict[str, Any] = {"machine": {"python": platform.python_version(), "cores": os.cpu_count()}}
    with CannedServer() as base, workers(options.venvs, f"http://127.0.0.1:{base.port}") as (found, missing):
        for mode, concurrency in SETTINGS:
            result[f"{mode}, {concurrency}"] = measure(found, mode, concurrency, options.rounds)
        result["peers"] = {
            name: {"version": worker.version, "import_ms": round(worker.imports(), 1), "rss_mb": round(worker.rss, 1)}
            for name, worker in found.items()
        }
    result["not_installed"] = missing
    show(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
