"""Tools made of what people have: functions, types, and what the vendors' own documentation shows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import msgspec

from ..utils.schema import Shape, is_pydantic, shape_of, strict_schema
from .exceptions import LLMInvalidRequestError
from .tools import Tool

NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What both vendors take for a tool's name."""

_GOOGLE: Final = re.compile(r"^(?:Args|Arguments|Parameters):\s*$")
_REST: Final = re.compile(r"^:param (?:[^:]*\s)?(\w+):\s*(.*)$")
_ITEM: Final = re.compile(r"^(\w+)(?:\s*\([^)]*\))?\s*:\s*(.*)$")
_NUMPY_ITEM: Final = re.compile(r"^(\w+)\s*(?::.*)?$")


def tool(
    value: object,
    *,
    name: str | None = None,
    description: str | None = None,
    strict: bool | None = None,
    cache: bool | None = None,
) -> Tool:
    """*value* as a tool with some of it said otherwise: ``tools=[tool(weather, strict=True)]``.

    Raises:
        LLMInvalidRequestError: no tool can be made of it.
    """
    said = {"name": name, "description": description, "strict": strict, "cache": cache}
    made = tool_of(value)
    return _sound(msgspec.structs.replace(made, **{field: each for field, each in said.items() if each is not None}))


def tool_of(value: object) -> Tool:
    """*value* as a tool: a Tool, a function, a type, or a mapping in either vendor's words.

    Raises:
        LLMInvalidRequestError: no tool can be made of it.
    """
    if isinstance(value, Tool):
        return _sound(value)
    if isinstance(value, Mapping):
        return _sound(_from_mapping(value))
    if isinstance(value, type):
        return _from_type(value)
    if callable(value):
        return _from_function(value)
    raise LLMInvalidRequestError(f"expected a function, a type or a Tool, got {type(value).__name__}")


def _sound(made: Tool) -> Tool:
    """*made*, whose name the vendors take, and whose schema their strict modes do if it is to be strict."""
    if not NAME.fullmatch(made.name):
        raise LLMInvalidRequestError(
            f"{made.name!r} is no name for a tool: it has up to 64 letters, digits, _ and -; say tool(…, name=…)"
        )
    if not made.strict:
        return made
    schema = strict_schema(made.parameters or {"type": "object", "properties": {}})
    if schema is None:
        raise LLMInvalidRequestError(
            f"{made.name}: an object of free keys, or what may be anything, cannot be kept to strictly; "
            "say what it holds, or leave strict out"
        )
    return msgspec.structs.replace(made, parameters=schema)


def _from_mapping(value: Mapping[str, Any]) -> Tool:
    inner = value.get("function", value)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise LLMInvalidRequestError(
            'expected {"name": …, "parameters": …} as the vendors write it, got another mapping'
        )
    parameters = inner.get("parameters", inner.get("input_schema", {}))
    strict = inner.get("strict")
    if not isinstance(parameters, Mapping) or not isinstance(strict, bool | None):
        raise LLMInvalidRequestError(f"{inner['name']}: its parameters are no JSON schema, or strict is no flag")
    return Tool(
        name=inner["name"],
        description=str(inner.get("description") or ""),
        parameters=dict(parameters),
        strict=strict,
        cache="cache_control" in value,
    )


def _from_type(kind: type) -> Tool:
    """The fields are the arguments; there is nothing to run."""
    try:
        shape: Shape[Any] = shape_of(kind)
    except TypeError as error:
        raise LLMInvalidRequestError(str(error)) from None
    return Tool(name=shape.name, description=_summary(inspect.getdoc(kind) or ""), parameters=_plain(shape.schema))


def _from_function(function: Callable[..., Any]) -> Tool:
    bare = function.func if isinstance(function, partial) else function
    name = getattr(bare, "__name__", type(bare).__name__)
    docs = inspect.getdoc(bare) or ""
    described = _described(docs)
    hinted = bare if inspect.isroutine(bare) else type(bare).__call__
    try:
        hints = get_type_hints(hinted, include_extras=True)
    except NameError as error:
        raise LLMInvalidRequestError(f"{name}: an annotation cannot be found: {error}") from None
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    try:
        signature = inspect.signature(function)
    except ValueError:
        raise LLMInvalidRequestError(f"{name}: it has no signature to read; wrap it in a function") from None
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise LLMInvalidRequestError(
                f"{name}: a model gives arguments by their names, so {parameter} cannot be one"
            )
        hint = _with_description(hints.get(parameter.name, Any), described.get(parameter.name))
        if parameter.default is parameter.empty:
            fields.append((parameter.name, hint))
        else:
            fields.append((parameter.name, hint, msgspec.UNSET if _shared(parameter.default) else parameter.default))
    arguments = msgspec.defstruct(name if name.isidentifier() else "tool", fields, kw_only=True)
    try:
        shape: Shape[Any] = shape_of(arguments)
    except TypeError as error:
        raise LLMInvalidRequestError(f"{name}: {error}") from None

    required = {field[0] for field in fields if len(field) == 2}

    def read(given: dict[str, Any]) -> dict[str, Any]:
        # In strict mode a model says null for what it leaves out.
        given = {each: found for each, found in given.items() if found is not None or each in required}
        value = shape.read(given)
        # What was not given is the function's own affair.
        return {each: getattr(value, each) for each in value.__struct_fields__ if each in given}

    return Tool(
        name=name if NAME.fullmatch(name) else "tool",
        description=_summary(docs),
        parameters=_plain(shape.schema),
        run=_runner(function, read, is_async=inspect.iscoroutinefunction(hinted)),
    )


def _runner(
    function: Callable[..., Any], read: Callable[[dict[str, Any]], dict[str, Any]], *, is_async: bool
) -> Callable[..., Any]:
    """*function*, with its arguments made of JSON first."""
    if is_async:

        async def run_async(**given: Any) -> Any:
            return await function(**read(given))

        return run_async

    def run(**given: Any) -> Any:
        return function(**read(given))

    return run


def _shared(default: object) -> bool:
    """Whether a struct would refuse it as a default, since all would share it."""
    return isinstance(default, (list, dict, set, bytearray)) and bool(default)


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A type's *schema* without what only names it once more."""
    return {key: value for key, value in schema.items() if key not in ("title", "description")}


def _with_description(hint: Any, described: str | None) -> Any:
    """*hint* with what is said of it, in an annotation or in the docstring, where the schema shows it."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        words = [note for note in notes if isinstance(note, str)]
        others = [note for note in notes if isinstance(note, msgspec.Meta)]
        if words:
            return Annotated[inner, *others, msgspec.Meta(description=words[0])]
        if others:
            return Annotated[inner, *others]
        hint = inner
    if described and not is_pydantic(hint):
        return Annotated[hint, msgspec.Meta(description=described)]
    return hint


def _summary(docs: str) -> str:
    """What comes before the arguments."""
    lines = []
    for number, line in enumerate(docs.splitlines()):
        ahead = docs.splitlines()[number + 1 : number + 2]
        if (
            _GOOGLE.match(line)
            or _REST.match(line)
            or (line.strip() == "Parameters" and ahead and set(ahead[0]) == {"-"})
        ):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _described(docs: str) -> dict[str, str]:
    """What a docstring says of each argument, in Google's, NumPy's or reST's way of writing."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    section = ""
    lines = docs.splitlines()
    for number, line in enumerate(lines):
        stripped = line.strip()
        if rest := _REST.match(stripped):
            current = found.setdefault(rest[1], [rest[2]])
        elif _GOOGLE.match(line):
            section, current = "google", None
        elif stripped == "Parameters" and number + 1 < len(lines) and set(lines[number + 1].strip()) == {"-"}:
            section, current = "numpy", None
        elif not stripped:
            current = None
        elif section == "google" and line[:1].isspace():
            indented = len(line) - len(line.lstrip())
            item = _ITEM.match(stripped) if current is None or indented <= 4 else None
            if item:
                current = found.setdefault(item[1], [item[2]])
            elif current is not None:
                current.append(stripped)
        elif section == "numpy" and not line[:1].isspace() and set(stripped) != {"-"}:
            item = _NUMPY_ITEM.match(stripped)
            current = found.setdefault(item[1], []) if item else None
        elif current is not None and line[:1].isspace():
            current.append(stripped)
        elif set(stripped) != {"-"}:
            section, current = "", None
    return {name: " ".join(part for part in words if part) for name, words in found.items()}
