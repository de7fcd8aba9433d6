"""Runs the wall: ``python -m tests.wall.run`` (``make wall``), or some of its rows by name.

Each case has a process of its own, forked from this one: patches, memory and sockets are nobody else's, and several
run at once. It prints a line of JSON a case.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
import traceback
from typing import Any

import llm.transports.http  # noqa: F401  # the children are not to import it each
from tests.wall.rows import ROWS, run
from tests.wall.servers import Street
from tests.wall.world import Fallen

AT_ONCE = 6


def child(name: str, off: bool) -> dict[str, Any]:
    """Run one case in this process."""
    logging.getLogger("brimful").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    began = time.monotonic()
    fell, trouble = None, None
    try:
        with Street() as street:
            asyncio.run(run(name, street, off=off))
    except Fallen as error:
        fell = str(error)
    except BaseException:
        trouble = traceback.format_exc()
    seconds = round(time.monotonic() - began, 2)
    return {"row": name, "off": off, "fell": fell, "trouble": trouble, "seconds": seconds}


def fork(name: str, off: bool) -> tuple[int, int]:
    """A child for one case, and the pipe that its verdict comes through."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    os.close(reading)
    code = 1
    try:
        verdict = child(name, off)
        os.write(writing, json.dumps(verdict).encode()[:60_000])
        code = 0
    finally:
        os._exit(code)


def verdicts(cases: list[tuple[str, bool]], at_once: int = AT_ONCE) -> list[dict[str, Any]]:
    """Run *cases*, so many at once."""
    waiting, found = list(cases), []
    running: dict[int, tuple[str, bool, int]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            name, off = waiting.pop(0)
            pid, pipe = fork(name, off)
            running[pid] = (name, off, pipe)
        pid, _ = os.wait()
        name, off, pipe = running.pop(pid)
        with os.fdopen(pipe, "rb") as verdict:
            text = verdict.read()
        lost = {"row": name, "off": off, "fell": None, "trouble": "the process died", "seconds": 0.0}
        found.append(json.loads(text) if text else lost)
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="row", help="all if none is named")
    parser.add_argument("--only", choices=["on", "off"], help="with its protection, or without")
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    options = parser.parse_args()
    modes = [off for off in (False, True) if options.only != ("on" if off else "off")]
    # The longest first.
    names = sorted(options.rows or ROWS, key=lambda name: name not in ("S25", "S15"))
    found = verdicts([(name, off) for off in modes for name in names], options.at_once)
    wrong = [each for each in found if each["trouble"] or bool(each["fell"]) != each["off"]]
    held, fell = (sum(each["off"] is off for each in found if each not in wrong) for off in (False, True))
    print(
        f"{held} rows hold, {fell} fall without their protection, {len(wrong)} do not as they should", file=sys.stderr
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
