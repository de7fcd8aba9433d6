"""The command line: one subcommand for each thing that is worth doing without writing Python.

A subcommand is a function that adds its parser and names the function that runs it; add it to `COMMANDS`. What is
expensive to import is imported when the command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .testing.simulator import SimulatorSettings

# Any object with add_parser(): argparse's own type for it is private.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

PROGRAM = "brimful"
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="An asynchronous layer between an application and its LLM vendors.",
        epilog=f"'{PROGRAM} COMMAND --help' explains a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


# -- simulate -----------------------------------------------------------------------------------------------------


def _add_simulate(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "simulate",
        help="serve a local imitation of the vendors' APIs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Serve a local imitation of the Anthropic Messages and OpenAI Chat Completions APIs: both dialects,\n"
            "streaming and not, strict rate limits for each key, and failures on demand. Any key is accepted.\n"
            "The first line printed says where it listens; Ctrl-C or SIGTERM ends it."
        ),
        epilog=(
            "base URLs:\n"
            "  Anthropic   http://HOST:PORT\n"
            "  OpenAI      http://HOST:PORT/v1\n\n"
            "example:\n"
            f"  {PROGRAM} simulate --port 8080 --requests-per-minute 50 --latency 0.4:0.3 --tokens-per-second 80 \\\n"
            "      --fault 529:0.05 --fault cut_stream:0.01 --fault 429:0.5@my-second-key --script ok,500,reset"
        ),
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port, default=0, help="port to listen on; 0, the default, takes a free one")

    limits = parser.add_argument_group("limits of each key (default: none)")
    limits.add_argument("--requests-per-minute", type=whole_number, metavar="N", help="requests in any window")
    limits.add_argument("--input-tokens-per-minute", type=whole_number, metavar="N", help="input tokens in any window")
    limits.add_argument("--output-tokens-per-minute", type=whole_number, metavar="N", help="output tokens, likewise")
    limits.add_argument(
        "--window-seconds", type=positive_number, default=60.0, metavar="S", help="length of the window (default: 60)"
    )
    limits.add_argument(
        "--output-counting",
        choices=("produced", "reserve_max"),
        default="produced",
        help="count output as it is generated (default), or reserve max_tokens at admission",
    )
    limits.add_argument(
        "--count-rejected",
        choices=("vendor", "yes", "no"),
        default="vendor",
        help="do refused requests use up the request limit (default: as the vendor does: OpenAI's do)",
    )

    manner = parser.add_argument_group("answers")
    manner.add_argument("--key", action="append", metavar="KEY", help="accept only this key (repeatable)")
    manner.add_argument("--model", action="append", metavar="MODEL", help="serve only this model (repeatable)")
    manner.add_argument(
        "--latency",
        type=latency,
        default=0.0,
        metavar="S[:SPREAD]",
        help="seconds to the first byte; with a spread, the median of a lognormal distribution",
    )
    manner.add_argument(
        "--tokens-per-second", type=number, default=0.0, metavar="N", help="speed of the answer; 0: at once"
    )
    manner.add_argument("--reply-words", type=whole_number, metavar="N", help="length of each answer (default: echo)")
    manner.add_argument("--burst", action="store_true", help="write all events of a stream in one segment")

    trouble = parser.add_argument_group("trouble")
    trouble.add_argument(
        "--fault",
        action="append",
        type=fault,
        default=[],
        metavar="KIND:PROBABILITY[@WHOM]",
        help="let requests fail by chance (repeatable); WHOM is a key or a path, else all that have no faults of their "
        "own; an unknown KIND lists the known ones",
    )
    trouble.add_argument(
        "--script",
        action="append",
        type=script,
        default=[],
        metavar="KIND,KIND,...[@WHOM]",
        help="what meets the first requests, one after the other; 'ok' is an answer",
    )
    trouble.add_argument(
        "--fault-seconds",
        type=number,
        default=1.0,
        metavar="S",
        help="how long a fault that waits does so, and between two bytes of a slow drip (default: %(default)s)",
    )
    trouble.add_argument(
        "--fault-deltas", type=count, default=2, metavar="N", help="deltas before a stream breaks (default: 2)"
    )
    trouble.add_argument(
        "--fault-bytes", type=count, metavar="N", help="size of an oversized body or unpacked bomb (default: 10 MB)"
    )
    trouble.add_argument(
        "--stalled-port", type=port, metavar="PORT", help="accept connections there too, and never say a word; 0: any"
    )
    trouble.add_argument("--seed", type=int, default=0, help="of the chances (default: %(default)s)")

    record = parser.add_argument_group("record")
    record.add_argument("--journal", metavar="FILE", help="write what arrives to FILE, a line of JSON at a time")
    record.add_argument("--no-bodies", action="store_true", help="leave the requests' bodies out of the journal")
    # For a parent that wants no orphans: it holds the other end of the pipe.
    record.add_argument("--end-with-stdin", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    from .testing.faults import FAULTS, MEGABYTE
    from .testing.simulator import SimulatorSettings
    from .testing.window import Limits

    chances: dict[str, dict[str, float]] = {}
    for kind, chance, whom in arguments.fault:
        chances.setdefault(whom, {})[kind] = chance
    scripts: dict[str, list[str | None]] = {}
    for kinds, whom in arguments.script:
        scripts.setdefault(whom, []).extend(kinds)
    for option, asked in (("--fault", chances.values()), ("--script", scripts.values())):
        unknown = [kind for kinds in asked for kind in kinds if kind is not None and kind not in FAULTS]
        if unknown:
            return _complain("simulate", f"{option}: unknown kind {unknown[0]!r}; known are {', '.join(FAULTS)}")
    settings = SimulatorSettings(
        host=arguments.host,
        port=arguments.port,
        limits=Limits(
            requests=arguments.requests_per_minute,
            input_tokens=arguments.input_tokens_per_minute,
            output_tokens=arguments.output_tokens_per_minute,
            window_seconds=arguments.window_seconds,
        ),
        output_counting=arguments.output_counting,
        count_rejected={"vendor": None, "yes": True, "no": False}[arguments.count_rejected],
        keys=arguments.key,
        models=arguments.model,
        latency=arguments.latency,
        tokens_per_second=arguments.tokens_per_second,
        burst=arguments.burst,
        reply_words=arguments.reply_words,
        faults=chances,
        script=scripts,
        fault_seconds=arguments.fault_seconds,
        fault_deltas=arguments.fault_deltas,
        fault_bytes=10 * MEGABYTE if arguments.fault_bytes is None else arguments.fault_bytes,
        stalled_port=arguments.stalled_port,
        seed=arguments.seed,
        keep_bodies=not arguments.no_bodies,
        keep_journal=False,
    )
    try:
        asyncio.run(_serve(settings, journal=arguments.journal, end_with_stdin=arguments.end_with_stdin))
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        if error.filename is not None:
            return _complain("simulate", f"cannot write {error.filename}: {os.strerror(error.errno or 0)}")
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        return _complain("simulate", f"cannot listen on {arguments.host}:{arguments.port}: {reason}")
    return 0


async def _serve(settings: SimulatorSettings, *, journal: str | None, end_with_stdin: bool) -> None:
    from .testing.simulator import Simulator

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, ended.set)
        except NotImplementedError:  # Windows: Ctrl-C arrives as KeyboardInterrupt
            break
    # Unbuffered: whoever reads the journal while it grows sees whole lines.
    file = open(journal, "wb", buffering=0) if journal is not None else None  # noqa: ASYNC230, SIM115
    try:
        async with Simulator(settings, record=file.write if file is not None else None) as simulator:
            print(f"listening on {simulator.url}", flush=True)
            if settings.stalled_port is not None:
                print(f"stalling on {simulator.stalled_url}", flush=True)
            if end_with_stdin:
                loop.add_reader(sys.stdin.fileno(), _read_stdin, ended)
            await ended.wait()
            if end_with_stdin:
                loop.remove_reader(sys.stdin.fileno())
    finally:
        if file is not None:
            file.close()


def _read_stdin(ended: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        ended.set()


def _complain(command: str, message: str) -> int:
    print(f"{PROGRAM} {command}: {message}", file=sys.stderr)
    return USAGE_ERROR


# -- arguments: the name of the function is the word in argparse's complaint ----------------------------------------


def port(text: str) -> int:
    found = int(text)
    if not 0 <= found <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return found


def whole_number(text: str) -> int:
    found = int(text)
    if found <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return found


def positive_number(text: str) -> float:
    found = float(text)
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return found


def number(text: str) -> float:
    found = float(text)
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return found


def latency(text: str) -> float | tuple[float, float]:
    median, colon, spread = text.partition(":")
    return (number(median), number(spread)) if colon else number(median)


def count(text: str) -> int:
    found = int(text)
    if found < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return found


def fault(text: str) -> tuple[str, float, str]:
    what, _, whom = text.partition("@")
    kind, colon, chance = what.rpartition(":")
    if not colon or not 0 <= float(chance) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND:PROBABILITY[@WHOM] with a probability between 0 and 1")
    return kind, float(chance), whom or "*"


def script(text: str) -> tuple[list[str | None], str]:
    kinds, _, whom = text.partition("@")
    return [None if kind == "ok" else kind for kind in kinds.split(",")], whom or "*"


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (_add_simulate,)
