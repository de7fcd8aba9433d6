"""What holds for every test: nothing blocks the event loop, nothing is skipped unseen, CI leaves nothing to chance."""

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest
from blockbuster import BlockBuster, blockbuster_ctx

HERE = Path(__file__).parent
ONCE = (
    "test_soak.py",
    "test_wall.py",
    "test_strict_window.py",
    "test_examples.py",
    "test_house.py",
    "test_quota_judge.py",
)
"""They take half of the time, mostly by waiting, and start processes or loops of their own. The longest is first."""

# No deadline: a busy machine is not a bug. In CI the same examples every time: a red run must be repeatable.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session", autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call while an event loop is running raises BlockingError, wherever it comes from.

    It covers tests with a loop of their own (`asyncio.run`) too, hence the whole session. Blockbuster itself lets
    imports and tracebacks read their files; nothing else has needed an allowance. One that does belongs here, with its
    reason: `blockbuster.functions["os.stat"].can_block_in("file.py", {"function"})`.
    """
    with blockbuster_ctx() as blockbuster:
        yield blockbuster


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Puts a sentence below the results; what a test prints itself is lost when it runs in a worker."""
    return lambda sentence: record_property("told", sentence)


def allowed_skips(text: str) -> dict[str, str]:
    """Read allowed_skips.txt: test identifiers and the reason why each may be skipped."""
    allowed = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            test, _, reason = line.partition("  ")
            if not reason.strip():
                raise pytest.UsageError(f"allowed_skips.txt: {test} is listed without a reason")
            allowed[test.strip()] = reason.strip()
    return allowed


class SkipWatch:
    """Names every skipped test at the end, and makes the run fail for one that allowed_skips.txt does not list."""

    def __init__(self, allowed: dict[str, str]) -> None:
        self.allowed = allowed
        self.skipped: list[str] = []

    def unlisted(self) -> list[str]:
        return [test for test in self.skipped if test.partition("[")[0] not in self.allowed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        unlisted = self.unlisted()
        for test in self.skipped:
            if test in unlisted:
                terminalreporter.write_line(f"skipped, and not in allowed_skips.txt: {test}", red=True)
            else:
                terminalreporter.write_line(f"skipped: {test} ({self.allowed[test.partition('[')[0]]})")


class Told:
    """Shows at the end what the tests had to tell."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.sentences += [str(value) for name, value in report.user_properties if name == "told"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for sentence in self.sentences:
            terminalreporter.write_line(sentence)


class OtherLoop:
    """Runs every coroutine test on another kind of event loop; `asyncio.run` in a test keeps the standard one."""

    def __init__(self, name: str, factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.factories = {name: factory}

    def pytest_asyncio_loop_factories(self) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
        return self.factories

    def pytest_report_header(self) -> str:
        return f"event loop: {', '.join(self.factories)}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--loop", choices=["asyncio", "uvloop"], default="asyncio", help="the kind of event loop")
    parser.addoption("--again", action="store_true", help="without the slow files whose second run would tell nothing")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--again") and collection_path.name in ONCE else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers begin with what takes longest: the others fill the time, and none is left alone at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: ONCE.index(item.path.name) if item.path.name in ONCE else len(ONCE))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--loop") == "uvloop":
        import uvloop

        config.pluginmanager.register(OtherLoop("uvloop", uvloop.new_event_loop), "other-loop")
    allowed = allowed_skips((HERE / "allowed_skips.txt").read_text(encoding="utf-8"))
    config.pluginmanager.register(SkipWatch(allowed), "skip-watch")
    config.pluginmanager.register(Told(), "told")
