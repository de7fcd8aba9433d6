"""The judge of the wire finds keys that no specification names, and is not misled by alternatives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"

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
            },
        },
        "Text": {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}},
        "Picture": {"type": "object", "properties": {"type": {"enum": ["picture"]}, "url": {"type": "string"}}},
        "Named": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a body has that the small specification above does not name."""
    monkeypatch.syspath_prepend(str(BENCH))
    sys.modules.pop("wire_schema", None)
    from wire_schema import Specification

    specification = Specification(DOCUMENT)
    return lambda body: specification.unknown(body, specification.request("/talk"))


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
    ],
)
def test_a_key_that_the_specification_has_no_place_for_is_named(unknown: Any, body: Any, places: list[str]) -> None:
    assert unknown(body) == places
