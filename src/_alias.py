"""The names of a checkout: `src.llm` and `brimful` are `llm`, the same module objects at every depth.

A wheel carries the tree as `brimful`; in a checkout it is the package `llm` in the folder `src`, and the documentation
says `from src.llm import …`. Two names for one file would make two modules, with two sets of classes that `except` and
`isinstance` tell apart. So whoever asks for an alias is handed the real module. This file is never shipped in a wheel.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

REAL = "llm"
ALIASES = ("src.llm", "brimful")


class CheckoutNames:
    """Finds `llm` beside this file, even where only the checkout's root is on the path, and both aliases as `llm`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if name == REAL:
            return PathFinder.find_spec(name, [str(Path(__file__).parent)], target)
        for alias in ALIASES:
            if name == alias or name.startswith(alias + "."):
                real = REAL + name.removeprefix(alias)
                found = importlib.util.find_spec(real)
                if found is not None:
                    is_package = found.submodule_search_locations is not None
                    loader: Any = RealModule(real)  # no subclass of Loader: importlib.abc brings 26 modules with it
                    return ModuleSpec(name, loader, origin=found.origin, is_package=is_package)
        return None


class RealModule:
    """Loads an alias by importing the module it stands for."""

    def __init__(self, real: str) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.real)
        self.real_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just put the alias's spec on the real module. Left there, `__spec__.parent` and
        # `__package__` would differ, and every later relative import would warn.
        module.__spec__ = self.real_spec

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the real module's code: `python -m src.llm` asks for it."""
        from importlib.abc import InspectLoader

        found = importlib.util.find_spec(self.real)
        return found.loader.get_code(self.real) if found and isinstance(found.loader, InspectLoader) else None


def install() -> None:
    """Put the finder before the others, which would find `src/llm/core` a second time as `src.llm.core`."""
    sys.meta_path.insert(0, CheckoutNames())
