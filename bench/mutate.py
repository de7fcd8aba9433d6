"""Mutation testing: would the tests notice if a line meant something else?

    .venv/bin/python bench/mutate.py                all four modules, an hour and a half on two cores
    .venv/bin/python bench/mutate.py sse retry      two of them

A mutant is the module with one small change, and it is killed when the module's own tests fail, raise or hang. Nothing
is written: each mutant is compiled from the changed syntax tree, in a forked child that hands it to the import system
in place of the file. Prints what survived and a table; ``docs/mutation.md`` has the reasons. Not part of CI.

Left alone, because no user could see it: docstrings, annotations, ``__slots__``, ``__repr__``, the words of errors and
the ``gc=`` of structs.
"""

from __future__ import annotations

import argparse
import ast
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
TARGETS: Final = {
    "sliding_window": ("llm.utils.sliding_window", ["tests/utils/test_sliding_window.py"]),
    "retry": ("llm.middleware.retry", ["tests/middleware/test_retry.py"]),
    "sse": ("llm.utils.sse", ["tests/utils/test_sse.py"]),
    "anthropic": ("llm.providers.anthropic", ["tests/providers", "-k", "not openai"]),
}
"""Each module and its own tests."""

PATIENCE: Final = 6
"""A mutant hangs when its tests take so many times what they take without one."""
MEMORY: Final = 4 * 1024**3
"""Bytes of address space: a mutant whose loop never ends may fill a list meanwhile."""

SWAPS: Final[dict[type[ast.AST], type[ast.AST]]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.Break: ast.Continue,
    ast.Continue: ast.Break,
}
ORDER: Final = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
REMOVED: Final = (ast.Assign, ast.AugAssign, ast.Expr, ast.Raise, ast.Delete)


class Mutant(NamedTuple):
    """One change: what stands in *holder* at *slot* (an attribute, or a place in a list) becomes *new*."""

    where: str
    line: int
    holder: Any
    slot: str | int
    old: ast.AST
    new: ast.AST

    def __str__(self) -> str:
        return f"{self.line:4} {self.where}: {_text(self.old)}  →  {_text(self.new)}"

    def compile(self, tree: ast.Module, path: str) -> CodeType:
        try:
            self._put(self.new)
            return compile(ast.fix_missing_locations(tree), path, "exec")
        finally:
            self._put(self.old)

    def _put(self, node: ast.AST) -> None:
        if isinstance(self.slot, int):
            self.holder[self.slot] = node
        else:
            setattr(self.holder, self.slot, node)


def _text(node: ast.AST) -> str:
    words = type(node).__name__.lower() if isinstance(node, (ast.operator, ast.boolop)) else ast.unparse(node)
    words = " ".join(words.split())
    return words if len(words) <= 90 else words[:89] + "…"


def mutants(node: ast.AST, where: str = "", *, inside: bool = False) -> Iterator[Mutant]:
    """All mutants of *node*; *inside* a function statements are removed too."""
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns"}:
            continue
        places: list[tuple[Any, str | int, Any]] = [(node, name, value)]
        if isinstance(value, list):
            places = [(value, number, child) for number, child in enumerate(value)]
        for holder, slot, child in places:
            if not isinstance(child, ast.AST) or _left_alone(node, child):
                continue
            line = getattr(child, "lineno", getattr(node, "lineno", 0))
            for new in _changes(child, inside=inside):
                yield Mutant(where or "module", line, holder, slot, child, ast.copy_location(new, child))
            if name in {"test", "ifs"} and (opposite := _negated(child)):
                yield Mutant(where or "module", line, holder, slot, child, ast.copy_location(opposite, child))
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = not isinstance(child, ast.ClassDef)
                yield from mutants(child, f"{where}.{child.name}".lstrip("."), inside=inner)
            else:
                yield from mutants(child, where, inside=inside)


def _left_alone(parent: ast.AST, node: ast.AST) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.expr_context():
            return True
        case ast.FunctionDef(name="__repr__"):
            return True
        case ast.Expr(value=ast.Constant()):  # a docstring
            return True
        case ast.Assign(targets=[ast.Name(id="__slots__")]) | ast.AnnAssign(annotation=ast.Name(id="TypeAlias")):
            return True
        case ast.keyword(arg="gc"):
            return True
        case ast.Constant(value=str()):  # the words of errors
            return isinstance(parent, ast.JoinedStr) or getattr(parent, "words", False)
        case ast.Raise(exc=ast.Call() as call):
            call.words = True  # type: ignore[attr-defined]  # a mark of ours, read above
    return False


def _changes(node: ast.AST, *, inside: bool) -> Iterator[ast.AST]:
    match node:
        case ast.Compare():
            for number, op in enumerate(node.ops):
                ops = [*node.ops[:number], SWAPS[type(op)](), *node.ops[number + 1 :]]
                yield ast.Compare(node.left, ops, node.comparators)  # type: ignore[arg-type]  # a table of all kinds
        case ast.operator() | ast.boolop() | ast.Break() | ast.Continue():
            yield SWAPS[type(node)]()
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=(int() | float()) as number):
            yield ast.Constant(number + 1)
            yield ast.Constant(number - 1)
        case ast.Constant(value=str(text)):
            yield ast.Constant(text + "X")
        case ast.Constant(value=bytes(data)):
            yield ast.Constant(data + b"X")
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.Return(value=None):
            yield ast.Pass()
    if inside and isinstance(node, REMOVED):
        yield ast.Pass()


def _negated(test: ast.AST) -> ast.AST | None:
    """The opposite of a condition, unless another mutant is that already."""
    match test:
        case ast.Constant() | ast.UnaryOp(op=ast.Not()):
            return None
        case ast.Compare(ops=[op]) if not isinstance(op, ORDER):
            return None
        case ast.expr():
            return ast.UnaryOp(ast.Not(), test)
    return None


class Planted(MetaPathFinder, Loader):
    """Has the import system run *code* where *name* is imported."""

    def __init__(self, name: str, path: str, code: CodeType) -> None:
        self.name = name
        self.path = path
        self.code = code
        self.loaded = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self, origin=self.path) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        self.loaded = True
        exec(self.code, module.__dict__)


def fork(planted: Planted, tests: list[str]) -> int:
    """Start a child that runs *tests*: it ends with 0 if they pass, 1 if not, 2 if they never saw the mutant."""
    if pid := os.fork():
        return pid
    status = 2
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.meta_path.insert(0, planted)
        import pytest

        options = ["-x", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
        # Hypothesis has been imported too early for its assertions to be rewritten, which are not of interest.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        failed = pytest.main([*options, *tests]) != pytest.ExitCode.OK
        status = int(failed) if planted.loaded else 2
    finally:
        os._exit(status)


def survivors(name: str, *, again: str | None, jobs: int) -> tuple[int, list[str]]:
    """The number of mutants of one module, and those that its tests let live; with *again*, of those that it names."""
    module, tests = TARGETS[name]
    path = ROOT / "src" / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [(str(mutant), mutant) for mutant in mutants(tree)]
    planned = [(text, mutant.compile(tree, str(path))) for text, mutant in found if again is None or text[4:] in again]
    children = Children(Planted(module, str(path), compile(tree, str(path), "exec")), tests, jobs)
    for text, code in planned:
        children.start(text, Planted(module, str(path), code))
    return len(found), children.wait()


class Children:
    """The runs under way, and what survived them."""

    def __init__(self, unchanged: Planted, tests: list[str], jobs: int) -> None:
        self.tests = tests
        self.jobs = jobs
        self.alive: list[str] = []
        self.running: dict[int, tuple[str, float]] = {}
        begin = time.monotonic()
        _, status = os.waitpid(fork(unchanged, tests), 0)
        if status != 0:
            raise SystemExit("the tests fail without any mutant, or do not import the module")
        self.longest = max(10.0, PATIENCE * (time.monotonic() - begin))

    def start(self, text: str, planted: Planted) -> None:
        """Run the tests against a mutant, as soon as there is a place."""
        while len(self.running) >= self.jobs:
            self._reap()
        self.running[fork(planted, self.tests)] = (text, time.monotonic() + self.longest)

    def wait(self) -> list[str]:
        """The survivors, when all have run."""
        while self.running:
            self._reap()
        return self.alive

    def _reap(self) -> None:
        """Look whether a child has ended, or put an end to one that hangs."""
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            text, _ = self.running.pop(pid)
            if os.waitstatus_to_exitcode(status) == 2:
                raise SystemExit(f"the tests do not import the module: {text}")
            if status == 0:
                self.alive.append(text)
                print(f"  {text}", flush=True)
            return
        for pid, (_, latest) in self.running.items():
            if time.monotonic() > latest:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="module", help=f"of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument(
        "--again", type=Path, help="only what survived in this output of an earlier run, after tests were added"
    )
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    asked = parser.parse_args()
    again = asked.again.read_text(encoding="utf-8") if asked.again is not None else None
    os.chdir(ROOT)
    os.nice(15)
    # What all children need is loaded once. No thread may run yet, and nothing of the package may be imported.
    import aiohttp  # noqa: F401
    import hypothesis
    import pytest  # noqa: F401

    # No shrinking: that there is a counterexample is enough. The same examples for every mutant.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, database=None, phases=phases)
    rows = []
    for name in asked.modules or TARGETS:
        print(name, flush=True)
        total, alive = survivors(name, again=again, jobs=asked.jobs)
        killed = total - len(alive)
        rows.append(f"{name:16} {total:8} {killed:8} {100 * killed / max(1, total):7.1f} %")
    print(f"\n{'module':16} {'mutants':>8} {'killed':>8} {'':>9}", *rows, sep="\n")


if __name__ == "__main__":
    main()
