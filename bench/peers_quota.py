"""One workload through LiteLLM's Router and through this package, at servers with strict limits, in real time.

Both get the same calls at the same instants, of a Poisson process, and each has a simulator of its own
(``llm.testing``), a process that counts by a sliding window and answers 429 beyond it, in the OpenAI dialect, where
refused requests count. The Router is used as its documentation shows: ``usage-based-routing-v2`` with rpm and tpm of
each deployment, its retries and cooldowns left at their defaults; so are this package's. The requests are what binds.

A call's delay is from the instant at which it was due until its answer was there. *used* is what the servers admitted
while calls were being offered, as a share of what the limits allow in that time. After that, whoever still waits has
``--patience`` seconds to be answered. *refused* are answers of 429 in the servers' journals.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers import PEERS, NotInstalledError, environment, interpreter

from llm.testing.process import SimulatorProcess

HERE = Path(__file__).resolve().parent
CANDIDATES = tuple(peer for peer in PEERS if peer.name in ("litellm", "brimful"))
START = 2.0
"""Seconds between the plan and its first call: both workers are to be ready."""


def arrivals(seconds: float, rate: float, seed: int) -> list[float]:
    """When calls are due: a Poisson process of *rate* calls a second."""
    chance = random.Random(seed)
    at, due = chance.expovariate(rate), []
    while at < seconds:
        due.append(round(at, 6))
        at += chance.expovariate(rate)
    return due


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def judge(answer: dict[str, Any], server: SimulatorProcess, options: argparse.Namespace) -> dict[str, Any]:
    """What became of one worker's calls, by its own account and by the server's."""
    begun, ended = answer["begun"], answer["begun"] + options.seconds
    outcomes: list[tuple[float, str]] = [(seconds, error) for seconds, error in answer["calls"]]
    delays = [seconds for seconds, error in outcomes if not error]
    journal = [arrival for arrival in server.read_journal() if arrival.method == "POST"]
    admitted = sum(arrival.admitted and begun <= arrival.time < ended for arrival in journal)
    possible = options.keys * options.requests * options.seconds / 60.0
    return {
        "version": answer["version"],
        "offered": len(outcomes),
        "answered": len(delays),
        "failed": dict(Counter(error for _, error in outcomes if error).most_common()),
        "requests": len(journal),
        "refused": sum(arrival.status == 429 for arrival in journal),
        "used_percent": round(100.0 * admitted / possible, 1),
        "delay_p50_s": round(statistics.median(delays), 2) if delays else None,
        "delay_p99_s": round(quantile(delays, 0.99), 2) if delays else None,
    }


def show(result: dict[str, Any]) -> None:
    print("\n" + result["workload"])
    print(f"\n{'':<20}{'offered':>9}{'answered':>10}{'failed':>8}{'refused':>9}{'used':>8}{'p50 s':>8}{'p99 s':>8}")
    for name, row in result["peers"].items():
        failed = sum(row["failed"].values())
        print(
            f"{name + ' ' + row['version']:<20}{row['offered']:>9}{row['answered']:>10}{failed:>8}{row['refused']:>9}"
            f"{row['used_percent']:>7.1f}%{row['delay_p50_s'] or 0:>8.2f}{row['delay_p99_s'] or 0:>8.2f}"
        )
    for name, row in result["peers"].items():
        for error, times in row["failed"].items():
            print(f"{name}: {times} × {error}")
    for name, reason in result["not_installed"].items():
        print(f"{name:<20} not measured: {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="for how long calls are offered (default: 180)")
    parser.add_argument("--keys", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--requests", type=int, default=60, help="that each key may send in a minute (default: 60)")
    parser.add_argument(
        "--load", type=float, default=1.0, help="calls offered, as a share of what the keys may send (default: 1)"
    )
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for what is left (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "brimful-bench", help="where peers live")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    due = arrivals(options.seconds, options.load * options.keys * options.requests / 60.0, options.seed)
    plan: dict[str, Any] = {name: getattr(options, name) for name in ("keys", "requests", "patience")}
    result: dict[str, Any] = {
        "workload": (
            f"{len(due)} calls in {options.seconds:g} s to {options.keys} keys of {options.requests} requests a minute "
            f"each: {options.load:.0%} of the quota"
        ),
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "peers": {},
        "not_installed": {},
    }
    workers: dict[str, tuple[subprocess.Popen[str], SimulatorProcess]] = {}
    with ExitStack() as stack:
        for peer in CANDIDATES:
            try:
                python = interpreter(peer, options.venvs)
            except (NotInstalledError, subprocess.CalledProcessError) as error:
                result["not_installed"][peer.name] = str(error)
                continue
            server = stack.enter_context(
                SimulatorProcess(requests_per_minute=options.requests, latency=(0.4, 0.3), arguments=("--no-bodies",))
            )
            command = [python, str(HERE / "peer_quota.py"), peer.name, server.openai_url]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(peer)
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"the worker of {peer.name} has ended; what it said is above")
            workers[peer.name] = (process, server)
        plan |= {"due": due, "begin": time.monotonic() + START}
        for process, _ in workers.values():
            assert process.stdin is not None
            print(json.dumps(plan), file=process.stdin, flush=True)
        for name, (process, server) in workers.items():
            said, _ = process.communicate(timeout=START + options.seconds + options.patience + 60.0)
            if process.returncode:
                raise RuntimeError(f"the worker of {name} failed; what it said is above")
            result["peers"][name] = judge(json.loads(said), server, options)
    show(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
