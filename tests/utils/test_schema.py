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


class Node(pydantic.BaseModel):
    value: int
    next: Node | None = None


@dataclasses.dataclass
class Route:
    start: Inner
    stops: list[Model]


class Foreign:
    """A class of which nobody knows the fields."""

    __slots__ = ()


class Entry(TypedDict):
    key: str
    note: NotRequired[str]


STR = {"type": "string"}
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
        (Node, "Node", {"value": 1, "next": {"value": 2}}, Node(value=1, next=Node(value=2))),
        (
            Route,
            "Route",
            {"start": {"model": {"city": "Oslo"}}, "stops": [{"city": "Bergen"}]},
            Route(Inner(model=Model(city="Oslo")), [Model(city="Bergen")]),
        ),
        (Entry, "Entry", {"key": "k"}, {"key": "k"}),
        ({"$ref": "#/$defs/N", "$defs": {"N": PLAIN}}, "answer", {"n": 1}, {"n": 1}),
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


def _other_model() -> type:
    class Model(pydantic.BaseModel):
        size: int

    class Inner(pydantic.BaseModel):
        model: Model

    return Inner


@pytest.mark.parametrize(
    ("into", "complaint"),
    [
        (object(), "cannot be read"),
        (Foreign, "cannot be read"),
        (list[Foreign], "cannot be read"),
        (tuple[Inner, _other_model()], "two types in it are called Model"),  # type: ignore[misc]  # made at run time
        ({"properties": {"a": {"$ref": "#/$defs/A"}}}, "'#/$defs/A' leads to no schema"),
        ({"properties": {"a": {"$ref": "https://example.org/a"}}}, "leads to no schema"),
        ({"$ref": "#"}, "'#' leads to no schema"),
    ],
)
def test_a_type_that_nobody_reads_is_refused(into: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=re.escape(complaint)):
        shape_of(into)


@pytest.mark.parametrize(
    ("value", "schema", "complaint"),
    [
        (1, {"anyOf": [{"type": "string"}, {"type": "null"}]}, "$: fits none of 2 alternatives"),
        ("b", {"const": "a"}, "$: expected 'a', got 'b'"),
        ([{"n": "x"}], {"items": {"$ref": "#/$defs/N"}, "$defs": {"N": PLAIN}}, "$[0].n: expected integer"),
        (None, {"type": ["string", "integer"]}, "expected ['string', 'integer']"),
        (1, {"allOf": [{"type": "integer"}, {"type": "string"}]}, "$: expected string, got int"),
        ({"a": {"a": 1}}, {"type": "object", "properties": {"a": {"$ref": "#"}}}, "$.a.a: expected object, got int"),
        ({"a": 1}, {"properties": {"a": False}}, "$.a: nothing is expected here"),
        ([1], {"items": False}, "$[0]: nothing is expected here"),
        ([[1, "x"]], {"items": {"items": {"type": "integer"}}}, "$[0][1]: expected integer, got str"),
    ],
)
def test_a_schema_is_checked_as_far_as_it_describes_shape(value: Any, schema: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        check(value, schema)


@pytest.mark.parametrize("schema", [True, {}, {"items": True}, {"items": [{"type": "string"}]}, {"prefixItems": [{}]}])
def test_a_schema_that_asks_for_nothing_takes_anything(schema: Any) -> None:
    check([1], schema)


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
        {"type": "object", "properties": {"a": {"type": "array"}}},
        {"type": "object", "properties": {"a": {"type": "array", "items": [{"type": "string"}]}}},
        {"type": "object", "properties": {"a": {}}},
        {"type": "object", "properties": {"a": True}},
        {"type": "object", "properties": {"a": {"const": {"b": 1}}}},
        {"type": "object", "properties": {"a": {"$ref": "#/definitions/A"}}, "definitions": {"A": {"type": "string"}}},
    ],
)
def test_what_may_hold_anything_cannot_be_strict(schema: Any) -> None:
    assert strict_schema(schema) is None


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"enum": ["a", "b"]}, "string"),
        ({"enum": [1, 2.5, None]}, ["integer", "number", "null"]),
        ({"const": True}, "boolean"),
    ],
)
def test_what_is_one_of_a_few_says_its_type_when_strict(schema: Any, kind: Any) -> None:
    strict = strict_schema({"properties": {"a": schema}, "required": ["a"]})
    assert strict is not None
    assert strict["type"] == "object"
    assert strict["properties"]["a"] == {**schema, "type": kind}


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


def test_one_of_several_forms_is_any_of_them_when_strict_and_null_is_not_added_twice() -> None:
    forms = [{"type": "string"}, {"type": "null"}]
    strict = strict_schema(
        {"properties": {"a": {"oneOf": forms}, "b": {"type": "null"}, "c": {"format": "uri", **STR}}}
    )
    assert strict is not None
    assert strict["properties"] == {
        "a": {"anyOf": forms},
        "b": {"type": "null"},
        "c": {"anyOf": [{"type": "string", "format": "uri"}, {"type": "null"}]},
    }


class Picky:
    """A model after pydantic's manner whose errors have no places."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return {"type": "object"}

    @staticmethod
    def model_validate(value: Any) -> None:
        raise ValueError("it is never right")


def test_a_reader_that_names_no_places_is_quoted() -> None:
    with pytest.raises(ValueError, match="it is never right"):
        shape_of(Picky).read({})


def test_msgspecs_own_bounds_are_kept_by_its_reader() -> None:
    shape: Shape[int] = shape_of(Annotated[int, msgspec.Meta(ge=1)])
    assert shape.read({"value": 1}) == 1
    with pytest.raises(ValueError, match="Expected `int` >= 1"):
        shape.read({"value": 0})
