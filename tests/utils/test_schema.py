"""Types become schemas that vendors take, answers become values of the types, or a complaint that names the place."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import re
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import jsonschema  # type: ignore[import-untyped]  # it has no types
import msgspec
import pydantic
import pytest

from llm.utils.schema import Shape, check, shape_of, strict_schema


class Unit(enum.Enum):
    C = "C"
    F = "F"


class Model(pydantic.BaseModel):
    """A place."""

    city: str = pydantic.Field(description="its name", min_length=2)
    born: datetime.date | None = None
    tags: list[str] = []


class Inner(pydantic.BaseModel):
    model: Model
    other: Model | None = None


@dataclasses.dataclass
class Place:
    city: str
    days: int = 3
    unit: Unit = Unit.C


class Tree(msgspec.Struct):
    value: int
    left: Tree | None = None


class Entry(TypedDict):
    key: str
    note: NotRequired[str]


PLAIN = {
    "title": "count it",
    "type": "object",
    "properties": {"n": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("into", "name", "good", "value"),
    [
        (Model, "Model", {"city": "Oslo", "born": "2020-01-01"}, Model(city="Oslo", born=datetime.date(2020, 1, 1))),
        (Inner, "Inner", {"model": {"city": "Oslo"}}, Inner(model=Model(city="Oslo"))),
        (Place, "Place", {"city": "Oslo", "unit": "F"}, Place("Oslo", unit=Unit.F)),
        (Tree, "Tree", {"value": 1, "left": {"value": 2}}, Tree(1, Tree(2))),
        (Entry, "Entry", {"key": "k"}, {"key": "k"}),
        (PLAIN, "count_it", {"n": 1, "kind": "a"}, {"n": 1, "kind": "a"}),
        (list[int], "list", {"value": [1, 2]}, [1, 2]),
        (Literal["x", "y"], "Literal", {"value": "x"}, "x"),
        (int, "int", {"value": 7}, 7),
        (dict[str, int], "dict", {"a": 1}, {"a": 1}),
    ],
)
def test_a_type_has_a_schema_of_an_object_and_reads_what_fits(into: Any, name: str, good: Any, value: Any) -> None:
    shape = shape_of(into)
    assert shape.name == name
    assert shape.schema["type"] == "object"
    jsonschema.validate(good, shape.schema)
    assert shape.read(good) == value


@pytest.mark.parametrize(
    ("into", "bad", "complaint"),
    [
        (Model, {"city": "O"}, "$.city: String should have at least 2 characters"),
        (Model, {}, "$.city: Field required"),
        (Inner, {"model": {"city": "Oslo", "tags": [1]}}, "$.model.tags.0"),
        (Place, {"city": 1}, "Expected `str`, got `int` - at `$.city`"),
        (Place, {"city": "Oslo", "unit": "K"}, "Invalid enum value 'K' - at `$.unit`"),
        (Tree, {"left": {}}, "missing required field `value`"),
        (Entry, {}, "missing required field `key`"),
        (list[int], {"value": ["x"]}, "got `str` - at `$[0]`"),
        (list[int], [1], "$: value is missing"),
        (PLAIN, {}, "$: n is missing"),
        (PLAIN, {"n": "1"}, "$.n: expected integer, got str"),
        (PLAIN, {"n": True}, "$.n: expected integer, got bool"),
        (PLAIN, {"n": 1, "kind": "c"}, "$.kind: expected one of ['a', 'b'], got 'c'"),
        (PLAIN, {"n": 1, "m": 2}, "$: m is not expected"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(into: Any, bad: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        shape_of(into).read(bad)
    assert "pydantic.dev" not in str(caught.value)


def test_a_type_that_nobody_reads_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot be read"):
        shape_of(object())


@pytest.mark.parametrize(
    ("value", "schema", "complaint"),
    [
        (1, {"anyOf": [{"type": "string"}, {"type": "null"}]}, "$: fits none of 2 alternatives"),
        ("b", {"const": "a"}, "$: expected 'a', got 'b'"),
        ([{"n": "x"}], {"items": {"$ref": "#/$defs/N"}, "$defs": {"N": PLAIN}}, "$[0].n: expected integer"),
        (None, {"type": ["string", "integer"]}, "expected ['string', 'integer']"),
    ],
)
def test_a_schema_is_checked_as_far_as_it_describes_shape(value: Any, schema: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        check(value, schema)


# ------------------------------------------------------------------------------------------------------------ strict


def objects(schema: Any) -> list[dict[str, Any]]:
    """Every schema of an object in *schema*."""
    if isinstance(schema, list):
        return [each for inner in schema for each in objects(inner)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if schema.get("type") == "object" else []
    return own + [each for inner in schema.values() for each in objects(inner)]


@pytest.mark.parametrize("into", [Model, Inner, Place, Tree, Entry, PLAIN, list[int]])
def test_a_strict_schema_closes_and_requires_everything(into: Any) -> None:
    strict = strict_schema(shape_of(into).schema)
    assert strict is not None
    found = objects(strict)
    assert found
    for each in found:
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])
    assert not {"default", "title", "minLength"} & set(msgspec.json.encode(strict).decode().split('"'))


def test_what_strictness_cannot_say_is_said_in_words() -> None:
    strict = strict_schema(shape_of(Model).schema)
    assert strict is not None
    assert strict["properties"]["city"] == {"type": "string", "description": "its name (minLength: 2)"}
    born = strict["properties"]["born"]
    assert born == {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]}


@pytest.mark.parametrize(
    "schema",
    [
        shape_of(dict[str, int]).schema,
        {"type": "object"},
        {"type": "object", "properties": {"a": {"type": "object", "additionalProperties": True}}},
        {"type": "object", "properties": {"a": {"allOf": [{"type": "string"}, {"minLength": 1}]}}},
        {"type": "object", "properties": {"a": {"type": "array", "prefixItems": [{"type": "string"}]}}},
    ],
)
def test_what_may_hold_any_key_cannot_be_strict(schema: Any) -> None:
    assert strict_schema(schema) is None


def test_a_reference_with_a_description_is_one_still() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"allOf": [{"$ref": "#/$defs/A"}], "description": "the a"}},
        "$defs": {"A": {"type": "string", "format": "binary"}},
    }
    assert strict_schema(schema) == {
        "type": "object",
        "properties": {"a": {"anyOf": [{"$ref": "#/$defs/A", "description": "the a"}, {"type": "null"}]}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"A": {"type": "string", "description": "(format: binary)"}},
    }


def test_msgspecs_own_bounds_are_kept_by_its_reader() -> None:
    shape: Shape[int] = shape_of(Annotated[int, msgspec.Meta(ge=1)])
    assert shape.read({"value": 1}) == 1
    with pytest.raises(ValueError, match="Expected `int` >= 1"):
        shape.read({"value": 0})
