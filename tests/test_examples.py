"""The tours, as somebody at a terminal meets them: they run anywhere and say where, never with a traceback."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path

import pytest

from llm.testing.process import SimulatorProcess

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "llm_usage.py"
PRIORITIES = ROOT / "examples" / "priorities.py"
DEPENDENCIES = ("aiohttp", "msgspec", "yaml")


def environment(**changes: str) -> dict[str, str]:
    """The environment without what would choose a vendor, a configuration or another interpreter's ways."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI_", "ANTHROPIC_"))
    }
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **changes}


def tour(*arguments: str, cwd: Path, file: Path = EXAMPLE, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(file), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=50)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the tour prints, from a folder that is not the checkout's."""
    began = time.monotonic()
    done = tour(cwd=tmp_path_factory.mktemp("elsewhere"))
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 30
    return done.stdout


def test_the_first_line_says_that_it_is_the_simulator(shown: str) -> None:
    assert re.match(r".*the built-in simulator at http://127\.0\.0\.1:\d+\n", shown)


def test_it_goes_through_every_part_to_the_end(shown: str) -> None:
    headings = re.findall(r"\n(.+)\n-{4,}\n", shown)
    assert [re.split(r"\W", heading)[0] for heading in headings[:3]] == ["Chat", "Conversation", "Streaming"]
    assert [re.split(r":", heading)[0] for heading in headings[3:]] == ["A burst", "An outage", "Status"]
    assert shown.endswith("That was the tour.\n")


def test_the_burst_keeps_every_limit_and_uses_it(shown: str) -> None:
    """Twice the quota is offered at once: the server refuses nothing, and every key has its window full."""
    assert "at the server: 150 requests, 0 answered with 429" in shown
    peaks = re.findall(r"key-\d: at most (\d+) of (\d+) in any", shown)
    assert [int(limit) for _, limit in peaks] == [10, 20, 30]
    assert all(0.9 * int(limit) <= int(most) <= int(limit) for most, limit in peaks)


def test_the_outage_is_seen_by_the_middleware_and_not_by_the_caller(shown: str) -> None:
    assert len(re.findall(r"call \S+, attempt 1 by key", shown)) == 4
    assert "6 of 6 calls were answered" in shown
    assert re.search(r"calls +159: 159 successful, 0 failed", shown)
    assert re.search(r"attempts +(\d+), 4 of them retries; my middleware saw \1", shown)


def test_with_a_key_in_the_environment_it_asks_the_vendor_three_times(tmp_path: Path) -> None:
    with SimulatorProcess() as vendor:
        done = tour(cwd=tmp_path, ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=vendor.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Real vendor (anthropic)")
    assert "A burst" not in done.stdout
    assert [arrival.key for arrival in vendor.read_journal()] == ["k"] * 3


def test_a_vendor_that_refuses_the_key_gets_a_sentence(tmp_path: Path) -> None:
    with SimulatorProcess(arguments=("--key=another",)) as vendor:
        done = tour(cwd=tmp_path, OPENAI_API_KEY="k", OPENAI_BASE_URL=vendor.openai_url)
    assert done.returncode == 1
    assert "The tour ends here: LLMAuthenticationError" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", DEPENDENCIES)
def test_a_missing_dependency_gets_the_command_that_mends_it(missing: str, tmp_path: Path) -> None:
    """The finder stands in for an environment without *missing*: it answers as the import system would."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Without())\n",
        encoding="utf-8",
    )
    done = tour(cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert missing in done.stderr
    assert "python -m pip install aiohttp msgspec PyYAML" in done.stderr
    assert "make demo" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkout_need_not_be_installed(tmp_path: Path) -> None:
    """With -S no `.pth` is read, so the editable install is gone; the dependencies are named by path."""
    command = [sys.executable, "-S", "-W", "error", str(EXAMPLE), "--help"]
    variables = environment(PYTHONPATH=sysconfig.get_path("purelib"))
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_alone_and_without_the_package_it_says_what_is_missing(tmp_path: Path) -> None:
    copied = shutil.copy(EXAMPLE, tmp_path)
    command = [sys.executable, "-S", "-W", "error", str(copied)]
    variables = environment(PYTHONPATH=sysconfig.get_path("purelib"))
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No module named 'brimful'" in done.stderr
    assert "make demo" in done.stderr


def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-u", str(EXAMPLE), "--simulator"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores the signal, and so does whatever it starts: this run of the tests, perhaps.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("A burst"):
            break
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=20)
    assert (process.returncode, complaint) == (130, "\nInterrupted.\n")


def test_help_tells_what_it_shows(tmp_path: Path) -> None:
    done = tour("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--simulator" in done.stdout
    assert "30 seconds" in done.stdout


# -- priorities ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def priorities(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the tour of priorities prints, whatever the environment holds."""
    began = time.monotonic()
    done = tour(cwd=tmp_path_factory.mktemp("elsewhere"), file=PRIORITIES, ANTHROPIC_API_KEY="k")
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 20
    assert done.stdout.endswith("That was the tour.\n")
    return done.stdout


def test_the_first_line_about_priorities_says_that_it_is_the_simulator(priorities: str) -> None:
    assert re.match(r".*the built-in simulator at http://127\.0\.0\.1:\d+\n", priorities)


def test_visitors_hardly_wait_and_tenants_share_what_is_left(priorities: str) -> None:
    row = r"(high|low, tenant [ab]) +(\d+) +([\d.]+) s +([\d.]+) s +([\d.]+) s\n"
    found = {who: (int(calls), *map(float, figures)) for who, calls, *figures in re.findall(row, priorities)}
    calls = {who: figures[0] for who, figures in found.items()}
    assert calls == {"high": 12, "low, tenant a": 90, "low, tenant b": 30}
    _, _, longest, _ = found["high"]
    assert longest < found["low, tenant b"][1] < found["low, tenant a"][1]
    assert found["low, tenant b"][3] < found["low, tenant a"][3], "the one who asked for less is done sooner"


def test_prospects_and_limits_are_told_while_calls_wait(priorities: str) -> None:
    waits = [float(wait) for wait in re.findall(r"tokens in, \d+ out, goes in ([\d.]+) s", priorities)]
    assert len(waits) == 4
    assert waits[2] < waits[3], "a high one would go sooner than a low one"
    assert re.search(r"anthropic: \d+ waiting \(\d+ low of a, \d+ low of b\)", priorities)
    assert len(re.findall(r"anthropic/[12]: \d+ of 20 requests used, \d+ under way", priorities)) == 4
    assert "at the server: 132 requests, 0 answered with 429" in priorities


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tools.py", ["→ weather → book", "ask me again tomorrow", "So take an umbrella", "2 rounds"]),
        ("structured.py", ["Porridge, 10 minutes", "80 g oats", "Recipe(title='Porridge'"]),
    ],
)
def test_the_tours_of_tools_and_of_structured_answers_run_to_their_end(
    name: str, said: list[str], tmp_path: Path
) -> None:
    done = tour(cwd=tmp_path, file=ROOT / "examples" / name)
    assert (done.returncode, done.stderr) == (0, "")
    for words in said:
        assert words in done.stdout
