"""JSON schemas of Python types, and values of those types out of JSON.

Understood are pydantic models, msgspec Structs, dataclasses, TypedDicts, whatever else msgspec reads (``list[int]``, a
Literal, an Enum), and a JSON schema as it is. Pydantic is never imported: its models bring what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

import msgspec

T = TypeVar("T")
Schema = dict[str, Any]

_KEPT: Final = frozenset(
    ("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const", "$ref", "$defs")
)
"""What both vendors' strict modes understand, beside the description and a few formats."""
_FORMATS: Final = frozenset(
    ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
_SILENT: Final = frozenset(("title", "default", "examples", "description", "format", "oneOf", "allOf", "discriminator"))
"""Keywords that are dropped or rewritten without a word; of all others the description tells."""
_WORDS: Final = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


class Shape(NamedTuple, Generic[T]):
    """A type as JSON: its schema, of an object always, and its reader."""

    name: str
    schema: Schema
    read: Callable[[Any], T]
    """Makes the value. Raises ValueError naming the place and what is wrong."""


def shape_of(into: type[T] | Mapping[str, Any] | Any) -> Shape[T]:
    """The shape of a type or of a JSON schema; what is no object is wrapped in one, under ``value``.

    Raises:
        TypeError: nobody knows how to read it.
    """
    if isinstance(into, Mapping):
        schema = dict(into)
        _resolve_all(schema, schema)
        return _object(Shape(_name(schema.get("title"), "answer"), flat(schema), cast(Any, _checked(schema))))
    if is_pydantic(into):
        model = cast(Any, into)
        return _object(Shape(_name(model.__name__, "answer"), flat(model.model_json_schema()), _pydantic(model)))
    foreign: Schema = {}
    try:
        schema = msgspec.json.schema(into, schema_hook=partial(_foreign_schema, foreign))
        _define(foreign, schema.get("$defs", {}))
    except TypeError as error:
        raise TypeError(f"{into!r} cannot be read from JSON: {error}") from None
    if foreign:
        schema["$defs"] = foreign

    def read(value: Any) -> T:
        try:
            return cast(T, msgspec.convert(value, into, dec_hook=_foreign_value))
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None

    return _object(Shape(_name(getattr(into, "__name__", None), "answer"), flat(schema), read))


def is_pydantic(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "model_json_schema") and hasattr(kind, "model_validate")


def flat(schema: Schema) -> Schema:
    """*schema* with an object at its root, and not a reference to one: no vendor takes that."""
    reference = schema.get("$ref", "")
    if not reference.startswith("#/$defs/"):
        return schema
    definitions = dict(schema["$defs"])
    name = reference.removeprefix("#/$defs/")
    root = dict(definitions[name])
    # It may be needed there all the same, by a type that holds itself.
    if f'"{reference}"'.encode() not in msgspec.json.encode(definitions):
        del definitions[name]
    if definitions:
        root["$defs"] = definitions
    return root


def strict_schema(schema: Schema) -> Schema | None:
    """*schema* as the vendors' strict modes want it, None if it cannot be.

    Every object is closed, everything in it required, and what was optional may be null; every value says its type.
    Keywords that one of them refuses move into the description: the reader still checks them. An object of free keys
    cannot be closed, and what may be anything has no type.

    Source: both vendors' pages on structured outputs, and OpenAI's 400 "schema must have a 'type' key", which a bare
    ``const`` is answered with too.
    """
    try:
        return _strict(schema)
    except _FreeFormError:
        return None


def resolved(schema: Schema, root: Schema) -> Schema:
    """What *schema* refers to in *root*, or itself.

    Raises:
        TypeError: it is not there, or refers back.
    """
    seen: set[str] = set()
    while "$ref" in schema:
        target: Any = root
        reference = str(schema["$ref"])
        steps = reference.split("/")
        for step in steps[1:]:
            target = target.get(step) if isinstance(target, dict) else None
        if steps[0] != "#" or not isinstance(target, dict) or reference in seen:
            raise TypeError(f"{reference!r} leads to no schema")
        seen.add(reference)
        schema = target
    return schema


def check(value: Any, schema: Schema | bool, place: str = "$", root: Schema | None = None) -> None:
    """Hold *value* against the keywords that describe shape: types, enums, properties, items, alternatives, references.

    Raises:
        ValueError: it does not fit; the message names the place.
    """
    if isinstance(schema, bool):
        if not schema:
            raise ValueError(f"{place}: nothing is expected here")
        return
    root = schema if root is None else root
    schema = resolved(schema, root)
    for each in schema.get("allOf", ()):
        check(value, each, place, root)
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    if alternatives and not any(_fits(value, each, place, root) for each in alternatives):
        raise ValueError(f"{place}: fits none of {len(alternatives)} alternatives")
    if "enum" in schema and value not in schema["enum"]:
        raise ValueError(f"{place}: expected one of {schema['enum']}, got {value!r}")
    if "const" in schema and value != schema["const"]:
        raise ValueError(f"{place}: expected {schema['const']!r}, got {value!r}")
    kinds = schema.get("type")
    if kinds is not None and not any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        raise ValueError(f"{place}: expected {kinds}, got {type(value).__name__}")
    if isinstance(value, dict):
        named = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                raise ValueError(f"{place}: {name} is missing")
        for name, inner in value.items():
            if name in named:
                check(inner, named[name], f"{place}.{name}", root)
            elif schema.get("additionalProperties") is False:
                raise ValueError(f"{place}: {name} is not expected")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict | bool) and "prefixItems" not in schema:
        for at, item in enumerate(value):
            check(item, schema["items"], f"{place}[{at}]", root)


class _FreeFormError(Exception):
    """Something may hold what no schema names."""


def _strict(schema: Any) -> Schema:
    if not isinstance(schema, dict):
        raise _FreeFormError
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) == 1:
        # How pydantic writes a reference with a description.
        schema = {**schema["allOf"][0], **{key: value for key, value in schema.items() if key != "allOf"}}
    if "allOf" in schema or "prefixItems" in schema or "patternProperties" in schema:
        raise _FreeFormError
    if "$ref" in schema and not (schema["$ref"] == "#" or schema["$ref"].startswith("#/$defs/")):
        # What else it may refer to is left out.
        raise _FreeFormError
    if "oneOf" in schema:
        schema = {**schema, "anyOf": schema["oneOf"]}
    found: Schema = {key: value for key, value in schema.items() if key in _KEPT}
    if not found.keys() & {"type", "anyOf", "$ref", "properties"}:
        found["type"] = _type_of(found.get("enum") or ([found["const"]] if "const" in found else []))
    if "anyOf" in found:
        found["anyOf"] = [_strict(each) for each in found["anyOf"]]
    if "$defs" in found:
        found["$defs"] = {name: _strict(each) for name, each in found["$defs"].items()}
    if "items" in found or found.get("type") == "array":
        found["items"] = _strict(found.get("items", True))
    if found.get("type") == "object" or "properties" in found:
        if "properties" not in found or found.get("additionalProperties") not in (None, False):
            raise _FreeFormError
        required = set(schema.get("required", ()))
        found["properties"] = {
            name: _strict(each) if name in required else _nullable(_strict(each))
            for name, each in found["properties"].items()
        }
        found["required"] = list(found["properties"])
        found.setdefault("type", "object")
        found["additionalProperties"] = False
    told = [f"{key}: {schema[key]}" for key in schema if key not in _KEPT and key not in _SILENT]
    if schema.get("format") in _FORMATS:
        found["format"] = schema["format"]
    elif "format" in schema:
        told.append(f"format: {schema['format']}")
    words = " ".join([*([schema["description"]] if schema.get("description") else []), *(f"({each})" for each in told)])
    if words:
        found["description"] = words
    return found


def _type_of(values: Sequence[Any]) -> str | list[str]:
    """The word for the type of *values*, which are all there may be, or the words if they differ."""
    words = list(dict.fromkeys([_WORDS.get(type(value), "") for value in values]))
    if not words or "" in words:
        raise _FreeFormError
    return words[0] if len(words) == 1 else words


def _nullable(schema: Schema) -> Schema:
    if any(each.get("type") == "null" for each in schema.get("anyOf", ())) or schema.get("type") == "null":
        return schema
    return {"anyOf": [schema, {"type": "null"}]}


def _object(shape: Shape[T]) -> Shape[T]:
    """*shape*, of which the vendors' tools and formats want that it is an object."""
    schema = shape.schema
    if schema.get("type") == "object" or "properties" in schema:
        return shape
    definitions = schema.get("$defs")
    inner = {key: value for key, value in schema.items() if key != "$defs"}
    wrapped: Schema = {"type": "object", "properties": {"value": inner}, "required": ["value"]}
    if definitions:
        wrapped["$defs"] = definitions

    def read(value: Any) -> T:
        if not isinstance(value, dict) or "value" not in value:
            raise ValueError("$: value is missing")
        return shape.read(value["value"])

    return Shape(shape.name, wrapped, read)


def _checked(schema: Schema) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        check(value, schema)
        return value

    return read


def _pydantic(model: Any) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        try:
            return model.model_validate(value)
        except ValueError as error:
            errors = getattr(error, "errors", None)
            if errors is None:
                raise
            # Its own words would repeat the value, and name a web page.
            lines = ["$" + "".join(f".{step}" for step in each["loc"]) + f": {each['msg']}" for each in errors()]
            raise ValueError("; ".join(lines)) from None

    return read


def _foreign_schema(definitions: Schema, kind: type) -> Schema:
    """The schema of a type that msgspec does not know; what it refers to is added to *definitions*."""
    if not is_pydantic(kind):
        raise NotImplementedError
    found: Schema = cast(Any, kind).model_json_schema()
    _define(definitions, found.pop("$defs", {}))
    return found


def _define(definitions: Schema, more: Schema) -> None:
    for name, schema in more.items():
        if definitions.setdefault(name, schema) != schema:
            raise TypeError(f"two types in it are called {name}")


def _resolve_all(schema: Any, root: Schema) -> None:
    """Raise TypeError if something in *schema* refers to what is not in *root*."""
    if isinstance(schema, list):
        for each in schema:
            _resolve_all(each, root)
    elif isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            resolved(schema, root)
        for each in schema.values():
            _resolve_all(each, root)


def _foreign_value(kind: type, value: Any) -> Any:
    if is_pydantic(kind):
        return _pydantic(kind)(value)
    raise NotImplementedError


def _fits(value: Any, schema: Schema, place: str, root: Schema) -> bool:
    try:
        check(value, schema, place, root)
    except ValueError:
        return False
    return True


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES.get(kind, (object,)))


def _name(said: str | None, default: str) -> str:
    """A name that the vendors take: up to 64 letters, digits, ``_`` and ``-``."""
    cleaned = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in said or default)
    return cleaned[:64].strip("_") or default
