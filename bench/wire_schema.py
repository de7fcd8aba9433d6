"""Which keys a specification has a place for: OpenAI's schemas admit any, so a validator finds no misspelt one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]


class Specification:
    """An OpenAPI document, of which the schemas refer to each other."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def request(self, path: str) -> Schema | None:
        """The schema of what is posted to *path*, None if nothing is."""
        posted = self.document["paths"].get(path, {}).get("post", {}).get("requestBody", {}).get("content", {})
        found: Schema | None = posted.get("application/json", {}).get("schema")
        return found

    def unknown(self, value: Any, schema: Schema, place: str = "body") -> list[str]:
        """The places in *value* that *schema* does not name: of its alternatives, those of the one that fits best."""
        if not isinstance(value, (dict, list)):
            return []
        found = [self._unknown(value, each, place) for each in self._alternatives(schema) if self._may_be(value, each)]
        # No alternative is a list or an object of this kind: the whole is nowhere.
        return min(found, key=len) if found else [place]

    def _unknown(self, value: Any, schema: Schema, place: str) -> list[str]:
        if isinstance(value, list):
            items = schema.get("items", {})
            return [
                name for at, item in enumerate(value) for name in self.unknown(item, items, f"{place}[{at}]") if items
            ]
        named: dict[str, Schema] = schema.get("properties", {})
        others = schema.get("additionalProperties")
        found: list[str] = []
        for key, inner in value.items():
            if key in named:
                found += self.unknown(inner, named[key], f"{place}.{key}")
            elif isinstance(others, dict) and others:
                found += self.unknown(inner, others, f"{place}.{key}")
            elif others is False or (named and others is not True and others != {}):
                found.append(f"{place}.{key}")
            # An object of which nothing is said is free, as a tool's schema is.
        return found

    def _may_be(self, value: Any, schema: Schema) -> bool:
        """Whether *schema* is for such a value: of its type, and of the kind that its ``type`` names."""
        kinds = schema.get("type")
        if kinds is not None:
            wanted = "array" if isinstance(value, list) else "object"
            if wanted not in (kinds if isinstance(kinds, list) else [kinds]):
                return False
        if isinstance(value, dict):
            for key in ("type", "role"):
                said = value.get(key)
                allowed = self._words(schema.get("properties", {}).get(key, {}))
                if isinstance(said, str) and allowed and said not in allowed:
                    return False
        return True

    def _words(self, schema: Schema) -> set[str]:
        words: set[str] = set()
        for each in self._alternatives(schema):
            if "const" in each:
                words.add(str(each["const"]))
            elif "enum" in each:
                words.update(str(word) for word in each["enum"])
            elif each.get("type") == "string":
                return set()
        return words

    def _alternatives(self, schema: Schema) -> Iterator[Schema]:
        """*schema* without references, choices and conjunctions: each way in which it can be met."""
        if "$ref" in schema:
            target: Any = self.document
            for step in schema["$ref"].removeprefix("#/").split("/"):
                target = target[step]
            yield from self._alternatives(target)
            return
        choices = schema.get("oneOf") or schema.get("anyOf")
        base = {key: value for key, value in schema.items() if key not in ("oneOf", "anyOf", "allOf")}
        variants = [base]
        if choices:
            variants = [_both(base, each) for choice in choices for each in self._alternatives(choice)]
        for part in schema.get("allOf", ()):
            variants = [_both(variant, each) for variant in variants for each in self._alternatives(part)]
        yield from variants


def _both(one: Schema, other: Schema) -> Schema:
    """What meets both: the properties of either."""
    merged = {**one, **other}
    if "properties" in one or "properties" in other:
        merged["properties"] = {**one.get("properties", {}), **other.get("properties", {})}
    if one.get("additionalProperties") is True or other.get("additionalProperties") is True:
        merged["additionalProperties"] = True
    return merged
