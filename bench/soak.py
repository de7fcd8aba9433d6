"""Ten minutes of everything at once, and nothing may be left of it: ``python bench/soak.py --seconds 600 --rate 200``.

Calls arrive at random instants (a Poisson process, whether or not the earlier ones have ended) at a simulator in a
process of its own. Both dialects, whole and streamed, read to the end, left in the middle or cancelled at any moment;
six keys a dialect, with limits that bind now and then; and one request in twenty meets a fault, every kind as often as
the next. The dialects fall back to each other, circuits open and close, one call in twenty may have a second leg, and a
part of the streams begins anew when it breaks off. Then the exit code is 1 if one of these does not hold:

* Every call ended, as an answer that says what it was asked to say, or as a typed ``LLMException``.
* Resident memory has grown by less than 5 MB between the end of the warm-up (a minute, or a third of a shorter run)
  and the end. Both are medians over some seconds. The harness keeps counters and no lists, so all growth is ours.
* After the last call nothing is taken: no client of the pool, no reserved output, nobody in the queue, nothing in
  flight; and after closing, no task and no file descriptor more than before.
* The server's count is the client's. On our side a *written* attempt is a POST whose ``Exchange.written`` is true when
  the transport has answered or raised; on the server's a *received* one is a POST whose whole body was read. Every
  attempt carries its number in a header, so sets are compared and not sums: each received attempt was written, once;
  and each written one was received, with two exceptions, in which the last byte was handed to the kernel and what then
  became of it nobody can know:

  - the caller left (cancelled, or out of time) before a byte of the answer had come: the closing may overtake the
    server's reading;
  - the attempt was sent on a kept connection that was lost without a byte of an answer: the server had closed it in
    the same moment. As the simulator does so only by the fault ``close_after_answer``, there are no more of these than
    of that.

  A reset after the request was read, a silence, a stall or a cut is no exception: those requests are received.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import io
import json
import logging
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from llm.core.exceptions import LLMException
from llm.core.manager import LLMManager
from llm.core.settings import ProviderSettings
from llm.core.types import Cost
from llm.testing.faults import FAULTS, MEGABYTE
from llm.testing.simulator import Simulator, SimulatorSettings
from llm.testing.window import Limits
from llm.transports.base import Exchange, HTTPRequest, Transport, TransportResponse
from llm.transports.http import HTTPTransport
from llm.utils.clock import Clock

FAULT_SHARE = 0.05
UNENDING = {"retry_after_day"}  # takes its key out for a day: six of them, and all that is left is refusals
CALL_TIMEOUT = 10.0
MOST_OUTSTANDING = 2000
KEYS = 6
WINDOW = 10.0
HEDGE_AFTER = 0.15
"""Seconds: few answers take longer to begin, but for those that meet a fault."""
HEADER = "x-client-request-id"
MODELS = {"anthropic": "claude-haiku-5-5", "openai": "gpt-6-luna"}
MANNERS = {"whole": 0.47, "streamed": 0.22, "iterated": 0.22, "left": 0.03, "whole, cancelled": 0.03, "cancelled": 0.03}
PLANTS = ("permit", "task", "socket", "request", "error", "memory")

WRITTEN, CALLER_LEFT, LOST = 1, 2, 4


# -- the server's side, in its own process --------------------------------------------------------------------------


class Line(msgspec.Struct):
    """What is looked at of a line of the journal: the first of each pair has a method, the second tells the end."""

    method: str | None = None
    received: bool = True
    headers: dict[str, str] = {}
    status: int | None = None
    fault: str | None = None


class Tally:
    """The journal, reduced to counters as it is written."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.count: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._decode = msgspec.json.Decoder(Line).decode

    def __call__(self, text: bytes) -> None:
        line = self._decode(text)
        if line.method is None:
            self.faults.update([line.fault] if line.fault is not None else [])
            self.count["refused by a window"] += line.status == 429 and line.fault is None
        elif line.method != "POST":
            self.count["probes"] += 1
        elif not line.received:
            self.count["in part"] += 1
        else:
            self.count["received"] += 1
            number = int(line.headers.get(HEADER, 0))  # 0: not one of ours
            grow(self.seen, number)
            self.seen[number] = min(255, self.seen[number] + 1)


def grow(book: bytearray, number: int) -> None:
    """Make room for *number*, a page of numbers at a time."""
    if number >= len(book):
        book.extend(bytes(number + 4096 - len(book)))


def chances() -> dict[str, float]:
    """Each kind as likely as the next; one that only streams can have meets every second request alone."""
    kinds = {kind: 2 if fault.streams_only else 1 for kind, fault in FAULTS.items() if kind not in UNENDING}
    return {kind: FAULT_SHARE * weight / len(kinds) for kind, weight in kinds.items()}


async def serve(requests: int) -> None:
    """Be the simulator until standard input ends, then print the tally."""
    # Callers leave in the middle of answers all the time here; anything else that goes wrong is shown.
    logging.getLogger("aiohttp.server").addFilter(
        lambda record: record.exc_info is None or not isinstance(record.exc_info[1], ConnectionError)
    )
    tally = Tally()
    settings = SimulatorSettings(
        limits=Limits(requests=requests, window_seconds=WINDOW),
        latency=(0.02, 1.0),
        tokens_per_second=150.0,
        faults=chances(),
        fault_seconds=0.3,
        fault_bytes=MEGABYTE // 4,
        keep_bodies=False,
        keep_journal=False,
    )
    async with Simulator(settings, record=tally) as simulator:
        print(simulator.url, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    seen = base64.b64encode(zlib.compress(tally.seen)).decode()
    print(json.dumps({"seen": seen, "count": tally.count, "faults": tally.faults}), flush=True)


class Server:
    """This script, as the server."""

    def __init__(self, requests: int) -> None:
        command = [sys.executable, __file__, f"--serve={requests}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def finish(self) -> dict[str, Any]:
        """End it, and have its tally."""
        output, _ = self.process.communicate(timeout=60)
        tally: dict[str, Any] = json.loads(output)
        return tally | {"seen": zlib.decompress(base64.b64decode(tally["seen"]))}


# -- the client's side ----------------------------------------------------------------------------------------------


class Book:
    """What became of each attempt: a byte for each, whose bits are above."""

    def __init__(self) -> None:
        self.number = 0
        self.attempts = bytearray()
        self.ends = bytearray()
        self.endings: list[str] = []
        """How they ended: for each a byte that says where it stands in the list."""

    def next(self) -> int:
        self.number += 1
        grow(self.attempts, self.number)
        grow(self.ends, self.number)
        return self.number

    def ended(self, number: int, ending: str) -> None:
        if ending not in self.endings:
            self.endings.append(ending)
        self.ends[number] = self.endings.index(ending)


class Witness:
    """A transport that numbers the POSTs and writes down how far each got."""

    def __init__(self, inner: Transport, book: Book, plants: Collection[str]) -> None:
        self._inner = inner
        self._book = book
        self._plants = plants

    async def send(self, request: HTTPRequest, exchange: Exchange) -> TransportResponse:
        if request.method != "POST":
            return await self._inner.send(request, exchange)
        number = self._book.next()
        if number == 20 and "error" in self._plants:
            raise ZeroDivisionError("planted")
        headers = {**request.headers, HEADER: str(number)}
        outcome = 0
        ending = "otherwise"
        try:
            response = await self._inner.send(HTTPRequest(request.method, request.url, headers, request.body), exchange)
            ending = f"answered {response.status}"
            return response
        except asyncio.CancelledError:
            outcome = 0 if exchange.started else CALLER_LEFT
            ending = "cancelled"
            raise
        except LLMException as error:
            outcome = LOST if exchange.reused and not exchange.started else 0
            ending = type(error).__name__
            raise
        finally:
            began = "an answer had begun" if exchange.started else "no answer"
            self._book.ended(number, f"{ending}, {began}, {'kept' if exchange.reused else 'fresh'} connection")
            if exchange.written and not (number == 30 and "request" in self._plants):
                self._book.attempts[number] = WRITTEN | outcome

    async def close(self) -> None:
        await self._inner.close()

    def statistics(self) -> dict[str, int]:
        return self._inner.statistics()


def configuration(url: str, requests: int) -> dict[str, Any]:
    def provider(name: str, base_url: str) -> dict[str, Any]:
        return {
            "base_url": base_url,
            "api_keys": [f"{name}-key-{number}" for number in range(KEYS)],
            "models": MODELS[name],
            "rate_limits": {"requests_per_minute": requests, "window_seconds": WINDOW},
            "timeouts": {"connect": 2.0, "first_byte": 1.5, "idle": 1.0, "attempt": 5.0},
            "pool": {"probe_interval": 0.5, "probe_max_interval": 2.0, "max_age": 20.0},
            "transport": {"proxy": "none", "max_response_bytes": MEGABYTE // 8},
            "fallback": f"after {name}",
        }

    return {
        "providers": {"anthropic": provider("anthropic", url), "openai": provider("openai", url + "/v1")},
        "fallbacks": {"after anthropic": [{"provider": "openai"}], "after openai": [{"provider": "anthropic"}]},
        "middleware": {"hedge": {"enabled": True, "after": HEDGE_AFTER}},
    }


class Load:
    """The calls, and what became of them."""

    def __init__(self, manager: LLMManager, seed: int) -> None:
        self.clients = [manager.get_client(name, max_tokens=200, timeout=CALL_TIMEOUT) for name in MODELS]
        self.random = random.Random(seed)
        self.tasks: set[asyncio.Task[None]] = set()
        self.outcomes: Counter[str] = Counter()
        self.untyped: Counter[str] = Counter()
        self.number = self.turned_away = self.wrong = 0

    async def run(self, seconds: float, rate: float) -> None:
        """Start calls at random instants for *seconds*."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        end = due + seconds
        while (due := due + self.random.expovariate(rate)) < end:
            # An instant that has passed is made up for at once: a busy machine does not lower the rate.
            await asyncio.sleep(max(0.0, due - loop.time()))
            self.number += 1
            if len(self.tasks) >= MOST_OUTSTANDING:
                self.turned_away += 1
                continue
            manner = self.random.choices(list(MANNERS), list(MANNERS.values()))[0]
            task = loop.create_task(self._call(self.number, manner))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
            if "cancelled" in manner:
                loop.call_later(self.random.uniform(0.0, 0.25), task.cancel)

    async def _call(self, number: int, manner: str) -> None:
        client = self.clients[number % 2]
        prompt = f"This is call {number} of the soak, and nobody else's."
        expected = f"You said: {prompt}"
        text = ""
        try:
            if manner.startswith("whole"):
                text = await client.chat(prompt)
            elif manner == "iterated":
                async for chunk in client.stream_complete(prompt, on_interrupt="restart"):
                    text = "" if chunk.restart else text + chunk.text
            else:
                async with client.stream_complete(prompt) as stream:
                    async for chunk in stream:
                        text += chunk.text
                        if manner == "left":
                            break
        except asyncio.CancelledError:
            self.outcomes["cancelled by the caller"] += 1
        except LLMException as error:
            self.outcomes[type(error).__name__] += 1
        except BaseException as error:
            self.untyped[type(error).__name__] += 1
            self.outcomes[type(error).__name__] += 1
        else:
            self.outcomes["left by the caller" if manner == "left" else "answered"] += 1
            self.wrong += not expected.startswith(text) if manner == "left" else text != expected


class Memory:
    """Resident memory in MB, sampled twice a second."""

    def __init__(self, seconds: float) -> None:
        self.warm_up = min(60.0, seconds / 3)
        self.span = max(1.0, min(15.0, seconds / 6))
        # Written over, not appended to: a list that grows is growth.
        self._samples = array("d", bytes(8 * int(seconds * 2 + 100)))
        self._taken = 0

    async def watch(self) -> None:
        while True:
            if self._taken < len(self._samples):
                self._samples[self._taken] = resident()
                self._taken += 1
            await asyncio.sleep(0.5)

    def report(self) -> dict[str, Any]:
        width = max(1, int(self.span * 2))
        warm = int(self.warm_up * 2)
        start = statistics.median(self._samples[max(0, warm - width) : warm] or [0.0])
        samples = self._samples[: self._taken]
        end = statistics.median(samples[-width:])
        figures = {"after warm-up": start, "end": end, "growth": end - start, "peak": max(samples)}
        tenth = max(1, len(samples) // 10)
        course = [f"{statistics.median(samples[at : at + tenth]):.1f}" for at in range(0, len(samples), tenth)]
        return {name: round(value, 2) for name, value in figures.items()} | {"by tenths": " ".join(course)}


def resident() -> float:
    """Resident memory of this process in MB; where there is no /proc, the most it ever was."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / MEGABYTE
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MEGABYTE if sys.platform == "darwin" else 1024)


def taken(manager: LLMManager) -> dict[str, int]:
    """What is lent out, by the manager's own account."""
    found: Counter[str] = Counter()
    told = manager.get_status()
    for status in told["providers"].values():
        found["clients"] += status["clients"]["in_use"]
        found["in flight"] += status["connections"]["in_flight"]
        found["queued"] += status["queued"]
    for limits in told["limits"].values():
        for groups in limits["quotas"].values():
            found["reservations"] += sum(quota["under_way"] for quota in groups.values())
    return dict(found)


async def measure(url: str, options: argparse.Namespace, requests: int, book: Book) -> dict[str, Any]:
    """The load, and everything that can be said from this side."""
    plants: Collection[str] = options.plant

    def transport(settings: ProviderSettings, clock: Clock) -> Transport:
        inner = HTTPTransport(settings.transport, settings.timeouts, clock=clock, max_age=settings.pool.max_age)
        return Witness(inner, book, plants)

    descriptors = len(os.listdir("/dev/fd"))
    memory = Memory(options.seconds)
    kept: list[object] = []
    loop = asyncio.get_running_loop()
    async with LLMManager.from_config(configuration(url, requests), transport=transport, environ={}) as manager:
        load = Load(manager, options.seed)
        watch = loop.create_task(memory.watch())
        if "memory" in plants:
            loop.call_later(memory.warm_up + 0.2, lambda: kept.append(b"x" * (40 * MEGABYTE)))
        started, cpu = loop.time(), time.process_time()
        await load.run(options.seconds, options.rate)
        percent = (time.process_time() - cpu) / (loop.time() - started) * 100
        watch.cancel()
        outstanding = len(load.tasks)
        if load.tasks:
            await asyncio.wait(load.tasks, timeout=CALL_TIMEOUT + 5.0)
        hung = len(load.tasks)
        if "permit" in plants:
            line = manager._lines["openai"]
            line.pool.lease(line.pool.keys[0])
            line.limiter.quota(line.pool.keys[0], "m").reserve(Cost(1, 10, 10), now=loop.time())
        left = taken(manager)
        opened = sum(s["connections"]["opened"] for s in manager.get_status()["providers"].values())
    if "task" in plants:
        kept.append(loop.create_task(asyncio.Event().wait(), name="planted"))
    if "socket" in plants:
        kept.append(socket.socket())
    await asyncio.sleep(0.1)
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    gc.collect()
    report = {
        "calls": {"begun": load.number, **dict(load.outcomes.most_common()), "turned away": load.turned_away},
        "trouble": {"hung": hung, "untyped": sum(load.untyped.values()), "wrong answers": load.wrong},
        "memory (MB)": memory.report(),
        "taken after the last call": left,
        "left after closing": {"tasks": len(tasks), "descriptors": len(os.listdir("/dev/fd")) - descriptors},
        "client": {"cpu %": round(percent, 1), "outstanding at the end": outstanding, "connections opened": opened},
    }
    for task in tasks:
        task.cancel()
    return report


def compare(book: Book, seen: bytes) -> dict[str, int]:
    """The client's book beside the server's; of those that the server has not seen also how they ended."""
    attempts = book.attempts
    width = max(len(attempts), len(seen))
    pairs = zip(attempts.ljust(width, b"\0"), seen.ljust(width, b"\0"), strict=True)
    found: Counter[str] = Counter(
        dict.fromkeys(["written", "received", "uncounted", "twice", "unseen", "unseen, caller left", "unseen, lost"], 0)
    )
    for number, (outcome, times) in enumerate(pairs):
        found["written"] += bool(outcome & WRITTEN)
        found["received"] += times
        found["uncounted"] += bool(times) and not outcome & WRITTEN
        found["twice"] += times > 1
        if outcome & WRITTEN and not times:
            found[
                "unseen, caller left" if outcome & CALLER_LEFT else "unseen, lost" if outcome & LOST else "unseen"
            ] += 1
            found[f"unseen: {book.endings[book.ends[number]]}"] += 1
    return dict(found)


def violations(report: dict[str, Any], *, growth: float) -> list[str]:
    """What does not hold, a sentence each."""
    found = [f"{count} calls {name}" for name, count in report["trouble"].items() if count]
    calls = report["calls"]
    if sum(calls.values()) != 2 * calls["begun"]:
        found.append("the outcomes are not as many as the calls")
    if calls["turned away"] > calls["begun"] / 100:
        found.append(f"{calls['turned away']} calls could not begin: {MOST_OUTSTANDING} were outstanding")
    if report["memory (MB)"]["growth"] >= growth:
        found.append(f"memory has grown by {report['memory (MB)']['growth']} MB, {growth:g} are allowed")
    found += [
        f"{count} {name} taken after the last call"
        for name, count in report["taken after the last call"].items()
        if count
    ]
    found += [f"{count} {name} left after closing" for name, count in report["left after closing"].items() if count > 0]
    requests = report["requests"]
    found += [f"{requests[name]} requests {name}" for name in ("uncounted", "twice", "unseen") if requests[name]]
    if requests["unseen, lost"] > report["faults"].get("close_after_answer", 0):
        found.append("more requests lost on kept connections than were closed by the server")
    return found


def show(report: dict[str, Any], wrong: list[str]) -> None:
    for section, rows in report.items():
        print(f"\n{section}")
        for name, value in rows.items():
            print(f"  {name!s:<34} {value:>10}")
    print("\n" + ("\n".join(f"VIOLATED: {sentence}" for sentence in wrong) or "everything held"))


def soak(options: argparse.Namespace) -> int:
    handler = logging.StreamHandler(io.TextIOWrapper(io.FileIO(os.devnull, "w")))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("brimful")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    requests = int(options.rate / len(MODELS) / KEYS * WINDOW * 1.4) + 10
    server = Server(requests)
    book = Book()
    try:
        report = asyncio.run(measure(server.url, options, requests, book))
    finally:
        tally = server.finish()
    report["requests"] = compare(book, tally["seen"]) | tally["count"]
    report["faults"] = dict(sorted(tally["faults"].items()))
    wrong = violations(report, growth=options.growth)
    show(report, wrong)
    if options.json is not None:
        options.json.write_text(json.dumps(report | {"violations": wrong}, indent=2) + "\n")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rate", type=float, default=200.0, help="calls a second")
    parser.add_argument("--growth", type=float, default=5.0, help="MB of memory that may be gained after the warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument(
        "--plant", nargs="*", choices=PLANTS, default=[], help="leave something behind, to see that it is noticed"
    )
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
        return 0
    return soak(options)


if __name__ == "__main__":
    sys.exit(main())
