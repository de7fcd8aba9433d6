"""The command line, as somebody at a terminal meets it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from llm import cli
from llm.testing.process import SimulatorProcess

SOURCE = Path(__file__).resolve().parents[1] / "src"


def ask(url: str, *, key: str = "k") -> int:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
    headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
    request = urllib.request.Request(url + "/v1/messages", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_simulator_says_where_it_listens_and_ends_cleanly(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "llm", "simulate"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("listening on http://127.0.0.1:")
    assert ask(line.removeprefix("listening on ").strip()) == 200
    process.send_signal(number)
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 0


def test_the_journal_is_written_while_it_runs_and_kept_after(tmp_path: Path) -> None:
    with SimulatorProcess(requests_per_minute=2, journal=tmp_path / "journal.jsonl") as simulator:
        assert [ask(simulator.url) for _ in range(3)] == [200, 200, 429]
        assert [arrival.status for arrival in simulator.read_journal()] == [200, 200, 429]
    assert [arrival.status for arrival in simulator.read_journal()] == [200, 200, 429]
    assert (tmp_path / "journal.jsonl").exists()


async def test_the_process_can_be_used_from_a_coroutine() -> None:
    async with SimulatorProcess(seed=1, faults={"529": 1.0}, latency=(0.001, 0.1)) as simulator:
        assert simulator.pid is not None
        assert simulator.openai_url.endswith("/v1")
    assert simulator.pid is None
    assert simulator.read_journal() == []


def test_faults_and_keys_can_be_set() -> None:
    with SimulatorProcess(faults={"529": 1.0}, arguments=("--key=good", "--model=m")) as simulator:
        assert ask(simulator.url, key="bad") == 401
        assert ask(simulator.url, key="good") == 529


def test_faults_can_be_one_keys_own_and_scripted() -> None:
    faults = {"key-1": {"529": 1.0}, "*": {"500": 0.0}}
    with SimulatorProcess(faults=faults, script={"key-2": ["503", None, "502"], "*": []}) as simulator:
        assert [ask(simulator.url, key="key-1") for _ in range(2)] == [529, 529]
        assert [ask(simulator.url, key="key-2") for _ in range(4)] == [503, 200, 502, 200]
    with SimulatorProcess(script=["429"], arguments=("--fault-bytes=7", "--fault-deltas=1")) as simulator:
        assert [ask(simulator.url) for _ in range(2)] == [429, 200]


def test_max_tokens_can_be_reserved() -> None:
    with SimulatorProcess(output_tokens_per_minute=17, output_counting="reserve_max") as simulator:
        assert [ask(simulator.url) for _ in range(2)] == [200, 429], "nine are asked for each time"


def test_a_second_port_can_accept_and_say_nothing() -> None:
    with SimulatorProcess(stalled_port=0) as simulator:
        host, _, port = simulator.stalled_url.removeprefix("https://").partition(":")
        with socket.create_connection((host, int(port)), timeout=0.1) as connection:
            connection.sendall(b"hello?")
            with pytest.raises(TimeoutError):
                connection.recv(1)
            assert ask(simulator.url) == 200


def test_a_process_that_does_not_start_says_why() -> None:
    simulator = SimulatorProcess(arguments=("--port=nonsense",))
    with pytest.raises(RuntimeError, match=r"did not start: .*nonsense"):
        simulator.start()
    assert simulator.pid is None


def test_the_simulator_ends_when_its_parent_is_gone() -> None:
    simulator = SimulatorProcess()
    with simulator:
        process = simulator._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=10) == 0
        process.stdin = None


def test_a_port_in_use_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["simulate", "--port", str(port)]) == 2
    complaint = capsys.readouterr().err
    assert complaint == f"brimful simulate: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_journal_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--journal", str(tmp_path / "no" / "file")]) == 2
    assert "no/file: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--fault=nonsense:0.1", "--fault=nonsense:0.1@key", "--script=ok,nonsense", "--script=nonsense@/v1/messages"],
)
def test_an_unknown_fault_is_told_with_the_known_ones(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", option]) == 2
    assert "unknown kind 'nonsense'; known are 400," in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["simulate", "--port", "70000"],
        ["simulate", "--requests-per-minute", "0"],
        ["simulate", "--window-seconds", "0"],
        ["simulate", "--latency", "-1"],
        ["simulate", "--latency", "1:x"],
        ["simulate", "--fault", "529"],
        ["simulate", "--fault", "529:2"],
        ["simulate", "--fault", "529@key"],
        ["simulate", "--fault-bytes", "-1"],
        ["simulate", "--stalled-port", "-1"],
    ],
)
def test_wrong_arguments_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: brimful" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "says"), [(["--help"], "simulate"), (["simulate", "--help"], "base URLs:")])
def test_help_is_helpful(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    assert says in capsys.readouterr().out


def test_the_command_line_imports_nothing_heavy_until_it_must() -> None:
    """Only what this module imports itself: the package's own page of names is another matter."""
    code = "import sys; before = set(sys.modules); import llm.cli; print('llm.testing.simulator' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "False"
