"""The judge of the wire finds what no specification has a place for, and asks for all that can be asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from llm.core.content import Part
from llm.core.types import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from wire_answers import Answers
from wire_corpus import features
from wire_schema import Specification

DOCUMENT: dict[str, Any] = {
    "paths": {
        "/talk": {"post": {"requestBody": {"content": {"application/json": {"schema": {"$ref": "#/schemas/Talk"}}}}}}
    },
    "schemas": {
        "Talk": {
            "type": "object",
            "properties": {
                "model": {"type": "string"},
                "parts": {
                    "type": "array",
                    "items": {"anyOf": [{"$ref": "#/schemas/Text"}, {"$ref": "#/schemas/Picture"}]},
                },
                "tool": {"allOf": [{"$ref": "#/schemas/Named"}, {"properties": {"schema": {"type": "object"}}}]},
                "labels": {"type": "object", "additionalProperties": {"$ref": "#/schemas/Named"}},
                "choice": {"oneOf": [{"type": "string"}, {"$ref": "#/schemas/Named"}]},
                "nothing": {"type": "object", "additionalProperties": False},
                "free": {"type": "object", "properties": {"name": {}}, "additionalProperties": True},
            },
        },
        "Text": {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}},
        "Picture": {"type": "object", "properties": {"type": {"enum": ["picture"]}, "url": {"type": "string"}}},
        "Named": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ({"model": "m", "parts": [{"type": "text", "text": "Hi"}, {"type": "picture", "url": "u"}]}, []),
        ({"modle": "m"}, ["body.modle"]),
        ({"parts": [{"type": "text", "txt": "Hi"}]}, ["body.parts[0].txt"]),
        ({"parts": [{"type": "picture", "text": "Hi"}]}, ["body.parts[0].text"]),
        ({"parts": [{"type": "hologram"}]}, ["body.parts[0]"]),
        ({"tool": {"name": "t", "schema": {"anything": {"at": ["all"]}}}}, []),
        ({"tool": {"name": "t", "shcema": {}}}, ["body.tool.shcema"]),
        ({"labels": {"whatever": {"name": "n"}}}, []),
        ({"labels": {"whatever": {"nmae": "n"}}}, ["body.labels.whatever.nmae"]),
        ({"choice": "auto"}, []),
        ({"choice": {"name": "t"}}, []),
        ({"choice": {"nmae": "t"}}, ["body.choice.nmae"]),
        ({"parts": {"type": "text"}}, ["body.parts"]),
        ({"nothing": {}, "free": {"name": 1, "whatever": {"at": "all"}}}, []),
        ({"nothing": {"something": 1}}, ["body.nothing.something"]),
    ],
)
def test_a_key_that_the_specification_has_no_place_for_is_named(body: Any, places: list[str]) -> None:
    specification = Specification(DOCUMENT)
    schema = specification.request("/talk")
    assert schema is not None
    assert specification.unknown(body, schema) == places


def test_what_is_sent_where_the_specification_has_no_address_has_no_schema() -> None:
    assert Specification(DOCUMENT).request("/walk") is None


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ({"text": "Hi", "reason": None, "usage": {"tokens": 1}}, True),
        ({"text": "Hi", "reason": "end", "usage": None}, True),
        ({"text": "Hi", "reason": "mystery"}, False),
        ({"reason": "end"}, False),
        ({"text": "Hi", "reason": "end", "usage": {"tokens": "many"}}, False),
        ("Hi", False),
    ],
)
def test_an_answer_fits_its_schema_with_the_nulls_that_vendors_send(answer: Any, fits: bool) -> None:
    said = {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "reason": {"type": "string", "enum": ["end"], "nullable": True},
            "usage": {"type": "object", "properties": {"tokens": {"type": "integer"}}},
        },
        "required": ["text", "reason"],
    }
    complaint = Answers({"components": {"schemas": {"Answer": said}}}).complaint("Answer", answer)
    assert (complaint is None) == fits


def test_whatever_can_be_asked_of_a_model_is_asked_in_the_corpus() -> None:
    """Options that say nothing to the vendor are left out; what a program adds to the body is its own."""
    ours = {
        "timeout",
        "unsupported",
        "extra_body",
        "extra_headers",
        "priority",
        "tenant",
        "tag",
        "fallback",
        "on_interrupt",
    }
    default = Options()
    asked = {
        name
        for feature in features("anthropic").values()
        for name in Options.__struct_fields__
        if getattr(feature.options, name) != getattr(default, name)
    }
    assert asked == set(Options.__struct_fields__) - ours


@pytest.mark.parametrize("dialect", ["anthropic", "openai", "openai_responses"])
def test_whatever_a_message_can_hold_is_in_the_corpus(dialect: str) -> None:
    parts = {
        type(part)
        for feature in features(dialect).values()
        for message in feature.messages
        if not isinstance(message.content, str)
        for part in message.content
    }
    # Chat Completions has no blocks of a kind that we do not know.
    assert {kind.__name__ for kind in set(get_args(Part)) - parts} == ({"Opaque"} if dialect == "openai" else set())
