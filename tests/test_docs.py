"""What README.md and docs/ show is true: their Python runs, their YAML loads, their commands exist.

- ```python blocks of a page run in order, in one namespace, with `await` at the top level, against the simulator and
  the configuration below.
- ```yaml blocks load as a configuration; one whose first line is `# fragment of <path>`, say
  `# fragment of providers.anthropic`, as the inside of that mapping. Variables and secret files it names exist.
- ```bash and ```console blocks (there: the lines after `$ `) use commands from the table below, and every make target,
  file, subcommand and option they name exists. They are not executed.
- Any other word after the fence is a mistake; a bare fence is a drawing.
- A block under `<!-- not run: reason -->` is left alone; its reason stands in the name of its test.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from blockbuster import BlockBuster

from llm import LLMConfigurationError, LLMManager
from llm.testing.process import SimulatorProcess
from tests.snippets import Block, blocks, offline, run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
CONFIG = """\
providers:
  anthropic:
    api_keys: [key-1, key-2, key-3]
    models: [claude-haiku-5-5, claude-sonnet-5-5, claude-opus-5-5]
    rate_limits:
      requests_per_minute: 50
    base_url: {url}
  openai:
    api_keys: key-4
    base_url: {url}/v1
"""
PYTHON, YAML, SHELL, DRAWING = ("python",), ("yaml",), ("bash", "sh", "console"), ("", "text")


# -- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulator() -> Iterator[SimulatorProcess]:
    with SimulatorProcess() as simulator:
        yield simulator


@pytest.fixture
def execute(
    simulator: SimulatorProcess, no_blocking_calls: BlockBuster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[list[Block], str], None]]:
    """Runs blocks as a reader's program, which may read its configuration when it starts: blocking is its affair."""
    offline(monkeypatch, tmp_path, simulator.url, CONFIG.format(url=simulator.url))
    no_blocking_calls.deactivate()

    def execute(page: list[Block], name: str) -> None:
        run(page, name=name)

    yield execute
    no_blocking_calls.activate()


# -- YAML ------------------------------------------------------------------------------------------------------------


def load(block: Block, folder: Path) -> LLMManager:
    """Load a block as the configuration that it is, or is a fragment of."""
    text = block.text
    fragment = re.match(r"# fragment of (\S+)\n", text)
    if fragment:
        path = fragment[1].split(".")
        if path[0] == "providers" and len(path) == 2 and not re.search(r"^api_keys:", text, re.MULTILINE):
            text += "api_keys: key\n"
        for name in reversed(path):
            text = f"{name}:\n" + "".join(f"  {line}" for line in text.splitlines(keepends=True))
    for secret in re.findall(r"\bfile:([\w./-]+)", text):
        (folder / secret).parent.mkdir(parents=True, exist_ok=True)
        (folder / secret).write_text("key", encoding="utf-8")
    environ = {name: f"set-{name}" for name in re.findall(r"\$\{(\w+)\}", text)}
    if not re.search(r"^providers:", text, re.MULTILINE):
        environ["ANTHROPIC_API_KEY"] = "key"
    file = folder / "llm.yaml"
    file.write_text(text, encoding="utf-8")
    return LLMManager.from_config(file, environ=environ)


# -- commands --------------------------------------------------------------------------------------------------------


def check_commands(block: Block) -> None:
    """Every command of the block is one of `COMMANDS`, and that finds nothing wrong with its words."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while words:
            ends = [index for index, word in enumerate(words) if word in ("&&", "||", ";", "|", "&")]
            command, words = (words[: ends[0]], words[ends[0] + 1 :]) if ends else (words, [])
            check_command([word for word in command if not re.match(r"[A-Z_0-9]+=", word)])


def check_command(words: list[str]) -> None:
    if words:
        name = re.sub(r"^python3?(\.\d+)?$", "python", words[0].rpartition("/")[2])
        assert name in COMMANDS, f"{words[0]}: no command that this test knows; teach it, or say `not run`"
        COMMANDS[name](words[1:])


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in words:
        assert "=" in target or target in targets, f"make {target}: there is no such target"


def check_python(words: list[str]) -> None:
    match words:
        case ["-m", "brimful" | "llm" | "src.llm", *rest]:
            check_brimful(rest)
        case ["-m", "pytest", *rest]:
            check_pytest(rest)
        case ["-m", "pip" | "venv", *_]:
            pass
        case [script, *_] if not script.startswith("-"):
            check_file(script)
        case _:
            raise AssertionError(f"python {shlex.join(words)}: this test cannot tell whether that works")


def check_brimful(words: list[str]) -> None:
    """The options are compared with what the help of the subcommand says."""
    command = [word for word in words if not word.startswith("-")][:1]
    asked = [sys.executable, "-m", "llm", *command, "--help"]
    helped = subprocess.run(asked, cwd=ROOT / "src", capture_output=True, text=True)
    assert helped.returncode == 0, f"brimful {shlex.join(words)}: {helped.stderr}"
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", helped.stdout), f"brimful {shlex.join(words)}: there is no {option}"


def check_pytest(words: list[str]) -> None:
    for word in words:
        if word.startswith("tests"):
            check_file(word.partition("::")[0])


def check_file(path: str) -> None:
    assert (ROOT / path).exists(), f"{path}: there is no such file"


def check_files(words: list[str]) -> None:
    for word in words:
        check_file(word)


def accept(words: list[str]) -> None:
    """Nothing of the project's is named."""


COMMANDS: Mapping[str, Callable[[list[str]], None]] = {
    "bash": check_files,
    "brimful": check_brimful,
    "cd": accept,
    "curl": accept,
    "export": accept,
    "git": accept,
    "make": check_make,
    "pip": accept,
    "pytest": check_pytest,
    "python": check_python,
    "sh": check_files,
}


# -- the pages -------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is checked at once: the fences of a page, all its Python, or one other block."""

    name: str
    kind: tuple[str, ...]
    found: list[Block]


def cases(page: str, found: list[Block]) -> Iterator[Case]:
    yield Case(f"{page}: fences", DRAWING, found)
    python = [block for block in found if block.language in PYTHON and block.not_run is None]
    if python:
        yield Case(f"{page}: python", PYTHON, python)
    for block in found:
        name = f"{page}:{block.line}: "
        if block.not_run is not None:
            yield Case(f"{name}not run: {block.not_run}", DRAWING, [])
        elif block.language in YAML:
            yield Case(name + "yaml", YAML, [block])
        elif block.language in SHELL:
            yield Case(name + "commands", SHELL, [block])


ALL_CASES = [
    case
    for path in PAGES
    for case in cases(path.relative_to(ROOT).as_posix(), blocks(path.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_what_a_page_shows_is_true(case: Case, execute: Callable[[list[Block], str], None], tmp_path: Path) -> None:
    if case.kind is PYTHON:
        execute(case.found, case.name)
    for block in case.found:
        if case.kind is YAML:
            load(block, tmp_path)
        elif case.kind is SHELL:
            check_commands(block)
        else:
            assert block.language in (*PYTHON, *YAML, *SHELL, *DRAWING), f"line {block.line}: {block.language}"


# -- the mechanism itself --------------------------------------------------------------------------------------------


def fenced(language: str, text: str) -> Block:
    return Block(language, text, 1)


def test_blocks_are_found_with_their_line_and_their_excuse() -> None:
    page = "# A\n```python\nx = 1\n```\n<!-- not run: costs money -->\n\n```bash\nmake\n```\nmore\n```\n---\n```\n"
    assert blocks(page) == [
        Block("python", "x = 1\n", 3),
        Block("bash", "make\n", 8, "costs money"),
        Block("", "---\n", 12),
    ]
    with pytest.raises(ValueError, match="line 2 is never closed"):
        blocks("```python\nx = 1\n")


def test_every_block_has_a_case_that_names_it() -> None:
    page = [Block("python", "", 2), Block("bash", "", 5), Block("python", "", 8, "costs money"), Block("yaml", "", 11)]
    assert [(case.name, len(case.found)) for case in cases("a.md", page)] == [
        ("a.md: fences", 4),
        ("a.md: python", 1),
        ("a.md:5: commands", 1),
        ("a.md:8: not run: costs money", 0),
        ("a.md:11: yaml", 1),
    ]


def test_python_blocks_share_a_namespace_a_loop_and_the_simulator(
    execute: Callable[[list[Block], str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    execute(
        [
            fenced("python", "from brimful import get_llm_manager\nmanager = await get_llm_manager()\n"),
            fenced("python", "print(await manager.get_client().chat('Hello'))\n"),
            fenced("python", "import asyncio\nasync def main():\n    print('own loop')\nasyncio.run(main())\n"),
        ],
        "planted.md",
    )
    assert capsys.readouterr().out == "You said: Hello\nown loop\n"


@pytest.mark.parametrize("text", ["manager.get_clinet()", "await nobody()", "from brimful import Nonsense", "x ="])
def test_broken_python_fails(text: str, execute: Callable[[list[Block], str], None]) -> None:
    start = fenced("python", "from brimful import get_llm_manager\nmanager = await get_llm_manager()\n")
    with pytest.raises((AttributeError, NameError, ImportError, SyntaxError)):
        execute([start, fenced("python", text + "\n")], "planted.md")


def test_yaml_loads_as_a_configuration_or_as_a_fragment_of_one(tmp_path: Path) -> None:
    whole = load(fenced("yaml", "providers: {openai: {api_keys: ['${A_KEY}', file:secrets/b]}}\n"), tmp_path)
    assert [key.secret.reveal() for key in whole.settings.providers["openai"].keys] == ["set-A_KEY", "key"]
    part = load(fenced("yaml", "# fragment of providers.openai\npool:\n  max_size: 4\n"), tmp_path)
    assert part.settings.providers["openai"].pool.max_size == 4
    layer = load(fenced("yaml", "# fragment of middleware\nretry:\n  max_attempts: 7\n"), tmp_path)
    assert layer.settings.middleware.retry.max_attempts == 7


@pytest.mark.parametrize(
    "text",
    [
        "providers: {openai: {api_keys: k, modles: m}}\n",
        "providers: [openai]\n",
        "# fragment of providers.openai\nrate_limits: {requests_per_minute: -1}\n",
        "# fragment of nowhere\na: b\n",
    ],
)
def test_broken_yaml_fails(text: str, tmp_path: Path) -> None:
    with pytest.raises(LLMConfigurationError):
        load(fenced("yaml", text), tmp_path)


def test_commands_that_exist_are_accepted() -> None:
    check_commands(fenced("bash", "git clone URL && cd brimful\nmake demo  # the tour\nA_KEY=x make test PYTHON=p\n"))
    check_commands(fenced("bash", "python -m brimful simulate --port 8080 \\\n    --fault 529:0.1\n"))
    check_commands(fenced("console", "$ .venv/bin/brimful --help\nand what it prints\n"))
    check_commands(
        fenced("bash", ".venv/bin/python -m pytest tests/test_docs.py::test_x\npython examples/llm_usage.py")
    )


@pytest.mark.parametrize(
    "text",
    [
        "make nonsense",
        "make test && make nonsense",
        "python examples/nowhere.py",
        "python -m brimful nonsense",
        "brimful simulate --no-such-option=1",
        "pytest tests/nowhere.py",
        "bash nowhere.sh",
        "nonsense",
    ],
)
def test_broken_commands_fail(text: str) -> None:
    with pytest.raises(AssertionError, match=r"nonsense|nowhere|no-such-option"):
        check_commands(fenced("bash", text + "\n"))


def test_the_page_of_providers_is_what_the_table_and_the_dialects_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from providers import page  # type: ignore[import-not-found]  # it lies beside its page

    assert (ROOT / "docs" / "providers.md").read_text("utf-8") == page(), "write it anew with `make providers`"
