"""Tools: what a model may ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function the model may ask to have called: its name, what it is for, and a JSON schema of its arguments.

    Seldom written by hand: wherever tools are asked for, a Python function will do, a type whose fields are the
    arguments, or a tool in a vendor's own words.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    """JSON schema of an object; without one the tool takes nothing."""
    strict: bool | None = None
    """Whether the vendor must hold the model to the schema; None leaves it to the vendor."""
    cache: bool = False
    """Ask the vendor to keep all tools up to this one (``Message.cache`` explains it)."""
    run: Callable[..., Any] | None = None
    """What ``run_tools`` calls with the arguments; it may be a coroutine function. A tool without one ends the run."""
