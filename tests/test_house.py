"""The house: its names, its wheel, its layers, and what must not be in it."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from itertools import permutations
from pathlib import Path

import pytest

import llm

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAMES = ("src.llm", "llm", "brimful")
DEPTHS = ("", ".core", ".core.types", ".providers.base")


def python(code: str, cwd: Path, *path: Path) -> str:
    """Run *code* in a bare interpreter, where warnings are errors and only *path* is added to what can be imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("order", list(permutations(NAMES)), ids=" ".join)
def test_three_names_are_one_module_at_every_depth_whichever_is_imported_first(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    code = f"""
import importlib, sys
for depth in {DEPTHS}:
    first, second, third = (importlib.import_module(name + depth) for name in {order})
    assert first is second is third
    assert first.__name__ == first.__spec__.name == "llm" + depth
    assert first.__package__ == first.__spec__.parent
from llm.core.types import Message
from src.llm.core.types import Message as Second
from brimful.core.types import Message as Third
assert Message is Second is Third
"""
    python(code, tmp_path, ROOT, ROOT / "src")


@pytest.mark.parametrize("depth", [".providers.base", ".core.types"])
def test_a_deep_module_may_be_what_is_imported_first(depth: str, tmp_path: Path) -> None:
    for first in NAMES:
        code = f"""
import importlib
modules = {{importlib.import_module(name + {depth!r}) for name in {(first, *NAMES)}}}
assert len(modules) == 1, modules
"""
        python(code, tmp_path, ROOT, ROOT / "src")


def test_with_only_the_root_on_the_path_the_examples_of_the_specification_import(tmp_path: Path) -> None:
    code = """
from src.llm import core
from src.llm.core import exceptions
import brimful.core.exceptions, llm
assert llm.core is core is brimful.core
assert llm.core.exceptions is exceptions is brimful.core.exceptions
"""
    python(code, tmp_path, ROOT)


def test_with_only_the_source_folder_on_the_path_the_installed_name_imports(tmp_path: Path) -> None:
    python("import brimful.core.types, llm; assert brimful is llm", tmp_path, ROOT / "src")


def test_a_module_that_is_not_there_is_missed_under_the_name_that_was_asked_for() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'src\.llm\.nowhere'"):
        importlib.import_module("src.llm.nowhere")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'brimful\.core\.nowhere'"):
        importlib.import_module("brimful.core.nowhere")


@pytest.mark.parametrize("name", NAMES)
def test_the_package_runs_as_a_module_under_each_name(name: str, tmp_path: Path) -> None:
    code = f"""
import runpy, sys
sys.argv = [{name!r}, "--help"]
try:
    runpy.run_module({name!r}, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
"""
    assert "simulate" in python(code, tmp_path, ROOT, ROOT / "src")


# ---------------------------------------------------------------- the public page


def test_importing_the_package_loads_neither_the_http_library_nor_the_yaml_reader(tmp_path: Path) -> None:
    code = """
import sys, llm
print(*[name for name in ("aiohttp", "yaml", "sqlite3") if name in sys.modules])
"""
    assert python(code, tmp_path, ROOT / "src").split() == []


def test_the_public_names_are_sorted_and_all_there() -> None:
    assert list(llm.__all__) == sorted(llm.__all__)
    assert [name for name in llm.__all__ if not hasattr(llm, name)] == []


def test_inner_packages_are_empty_files() -> None:
    inner = [path for path in (ROOT / "src" / "llm").rglob("__init__.py") if path.parent != ROOT / "src" / "llm"]
    assert len(inner) >= 7
    assert [path for path in inner if path.stat().st_size] == []


# ---------------------------------------------------------------- what is built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    done = subprocess.run(command, cwd=target, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_brimful_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"brimful", "brimful-0.1.0.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith("_alias.py")]


def test_the_wheel_holds_all_of_the_package_with_its_data(wheel: Path) -> None:
    source = ROOT / "src" / "llm"
    expected = {f"brimful/{path.relative_to(source).as_posix()}" for path in source.rglob("*") if path.is_file()}
    expected = {name for name in expected if "__pycache__" not in name}
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("brimful/")}
    assert shipped == expected
    assert {"brimful/py.typed", "brimful/providers/models.toml"} <= shipped


def test_the_wheel_requires_three_distributions_and_a_python(wheel: Path) -> None:
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA")]
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(re.split(r"[^A-Za-z]", line)[0] for line in required) == ["aiohttp", "msgspec", "pyyaml"]
    assert metadata["Requires-Python"] == ">=3.11"


def test_development_installs_what_the_package_requires() -> None:
    wanted = (ROOT / "requirements" / "dev.in").read_text(encoding="utf-8").splitlines()
    assert set(PYPROJECT["project"]["dependencies"]) <= set(wanted)


# ---------------------------------------------------------------- what must not be there


def tracked() -> list[Path]:
    """Files under version control, or of an unpacked source distribution, that hold text."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        files = [ROOT / name for name in listed if name]
    else:
        files = [path for path in ROOT.rglob("*") if not {".venv", "dist", "__pycache__"} & set(path.parts)]
    return [path for path in files if path.is_file() and b"\0" not in path.read_bytes()]


def test_no_file_names_an_index_host_or_a_path_of_somebodys_machine() -> None:
    # Put together here, or this file would be the first to fail.
    hosts = [left + right for left, right in [("py", "pi.org"), ("python", "hosted"), ("registry.npm", "js")]]
    machine = r"(?:^|[^A-Za-z0-9._/-])/(?:work|root|home|Users)/[A-Za-z.]"
    unwanted = re.compile("|".join([machine, *map(re.escape, hosts)]))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if unwanted.search(line)
    ]
    assert found == []


# ---------------------------------------------------------------- the layers


def test_every_module_has_its_place_in_the_layers() -> None:
    """The linter checks only what a layer names: a module that none names could import anything."""
    source = ROOT / "src" / "llm"
    modules = {path.stem for path in source.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    modules |= {f"core.{path.stem}" for path in (source / "core").glob("*.py")}
    (layers,) = [contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"] if contract["id"] == "layers"]
    placed = {name for layer in layers["layers"] for name in re.findall(r"[\w.]+", layer)}
    assert modules - {"__init__", "core", "core.__init__"} <= placed


PLANTED = {
    "Arrows point down": ("utils/planted.py", "from ..middleware import base\n"),
    "Folders meet only at their base": ("providers/planted.py", "from ..transports import planted_too\n"),
    "Middleware do not know each other": ("middleware/planted.py", "from . import planted_too\n"),
}


@pytest.mark.parametrize(("contract", "place", "line"), [(name, *rest) for name, rest in PLANTED.items()])
def test_an_import_against_the_layers_is_caught(contract: str, place: str, line: str, tmp_path: Path) -> None:
    """The contracts themselves are checked by `make lint`; here, that they can fail."""
    shutil.copytree(ROOT / "src" / "llm", tmp_path / "llm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("middleware", "transports"):
        (tmp_path / "llm" / folder / "planted_too.py").touch()
    (tmp_path / "llm" / place).write_text(line, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    verdicts = [row for row in done.stdout.splitlines() if "BROKEN" in row]
    assert [row for row in verdicts if row.startswith(contract)], done.stdout


# ---------------------------------------------------------------- what holds for every test

PLANTED_TESTS = """
import asyncio, time

async def test_sleeps():
    time.sleep(0.001)

async def test_opens_a_blocking_socket():
    import socket
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())

def test_sleeps_in_a_loop_of_its_own():
    async def main():
        time.sleep(0.001)
    asyncio.run(main())

async def test_reads_a_file():
    open(__file__).read()

async def test_warns():
    async def never_awaited(): ...
    never_awaited()
"""
INNOCENT_TESTS = """
import asyncio, logging
import pytest

async def test_prints_logs_imports_and_talks(capsys):
    import aiohttp, yaml, sqlite3
    from aiohttp import web
    print("text")
    logging.getLogger("planted").warning("text")
    async def answer(request):
        return web.Response(text="yes")
    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "localhost", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session, session.get(f"http://localhost:{port}/") as response:
        assert await response.text() == "yes"
    await runner.cleanup()

async def test_formats_a_traceback():
    try:
        1 / 0
    except ZeroDivisionError:
        logging.getLogger("planted").exception("text")

@pytest.mark.parametrize("n", [1, 2])
def test_skipped(n):
    pytest.skip("because")
"""


def planted(tmp_path: Path, tests: str, *options: str, allowed: str = "") -> subprocess.CompletedProcess[str]:
    """Run *tests* in a folder of their own, under this project's conftest.py and settings."""
    (tmp_path / "tests").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "allowed_skips.txt").write_text(allowed, encoding="utf-8")
    (tmp_path / "tests" / "test_planted.py").write_text(tests, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


def test_what_blocks_the_event_loop_or_warns_fails_its_test(tmp_path: Path) -> None:
    done = planted(tmp_path, PLANTED_TESTS)
    assert "5 failed" in done.stdout.splitlines()[-1], done.stdout
    assert done.stdout.count("BlockingError: Blocking call to") >= 4


def test_a_skip_passes_only_with_a_reason_in_the_list(tmp_path: Path) -> None:
    for name, allowed, code in [
        ("unlisted", "", 1),
        ("listed", "tests/test_planted.py::test_skipped  there is no such machine here", 0),
        ("without-reason", "tests/test_planted.py::test_skipped", 4),
    ]:
        (tmp_path / name).mkdir()
        done = planted(tmp_path / name, INNOCENT_TESTS, allowed=allowed)
        assert done.returncode == code, done.stdout + done.stderr
        if code == 1:
            assert "not in allowed_skips.txt: tests/test_planted.py::test_skipped[1]" in done.stdout
        if code == 0:
            assert "test_skipped[2] (there is no such machine here)" in done.stdout


IN_A_WORKER = """
import asyncio
import pytest

def test_tells(tell):
    tell("a figure")

async def test_loop():
    assert type(asyncio.get_running_loop()).__module__ == "uvloop"

@pytest.mark.parametrize("n", [1, 2])
def test_skipped(n):
    pytest.skip("because")
"""
SKIPPED_FILE = """
import pytest

pytest.skip("because", allow_module_level=True)
"""
HANGING_TEST = """
import threading
import pytest

@pytest.mark.timeout(1)
def test_hangs():
    threading.Event().wait()
"""
# As the makefile has it, but for one worker instead of two: what crosses from one process to another is the same.
WORKER = ("-n", "1", "--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart", "0")


def test_what_a_worker_skips_and_tells_is_noticed_as_well(tmp_path: Path) -> None:
    """A skipped test, a skipped file, a figure, and which loop was asked for."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_file.py").write_text(SKIPPED_FILE, encoding="utf-8")
    done = planted(tmp_path, IN_A_WORKER, *WORKER, "--loop", "uvloop")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not in allowed_skips.txt: tests/test_planted.py::test_skipped[2]" in done.stdout
    assert "not in allowed_skips.txt: tests/test_file.py" in done.stdout
    assert "a figure" in done.stdout.splitlines()
    assert "2 passed, 3 skipped" in done.stdout.splitlines()[-1]


def test_what_hangs_in_a_worker_ends_the_run_and_is_named(tmp_path: Path) -> None:
    """By the way that works on uvloop, too: the worker is gone, and is not started again to hang once more."""
    done = planted(tmp_path, HANGING_TEST, *WORKER, "--timeout-method", "thread")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_planted.py::test_hangs" in done.stdout
    assert "1 failed" in done.stdout.splitlines()[-1]
