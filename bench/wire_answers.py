"""Whether the golden answers and events are what the vendors specify: part of ``bench/wire.py``.

All of them must fit, but for those that ``ODD`` names with a reason, and none of these may: each is a planted fault,
which shows that others would be found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

GOLDEN: Final = Path(__file__).resolve().parent.parent / "tests" / "providers" / "golden"
SCHEMAS: Final = {
    "anthropic": ("Message", "MessageStreamEvent"),
    "openai": ("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"),
    "openai_responses": ("Response", "ResponseStreamEvent"),
}
"""Of a whole answer and of one event of a stream."""

ODD: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "anthropic": {
        "wrong or incomplete on purpose": (
            "replies/content that is no list",
            "replies/no content",
            "replies/no usage",
            "replies/nulls",
            "replies/unknown blocks",
            "replies/usage of the input alone",
            "replies/usage of the output alone",
            "replies/usage that cannot be read",
            "streams/cut_within_an_event",
            "streams/data_alone",
            "streams/data_in_two_lines",
            "streams/figures_that_are_none",
            "streams/malformed_block",
            "streams/malformed_end",
            "streams/malformed_event",
            "streams/malformed_start",
            "streams/nulls",
            "streams/text_that_is_no_text",
            "streams/unknown_events_and_blocks",
        ),
        "an error, of which the specification has no event, or not under this status": (
            "replies/an array",
            "replies/error under 200",
            "replies/error under 529",
            "replies/something else",
            "streams/overloaded_midway",
            "streams/rate_limited_at_once",
            "streams/spend_limit_midway",
            "streams/unknown_error_type",
        ),
        "a reason that is newer than the specification": (
            "replies/stop reason compaction",
            "replies/stop reason model_context_window_exceeded",
            "streams/stop_compaction",
            "streams/stop_model_context_window_exceeded",
        ),
    },
    "openai": {
        "wrong or incomplete on purpose": (
            "replies/a number for a text",
            "replies/further answers",
            "replies/no message",
            "replies/nulls",
            "replies/stop reason None",
            "replies/stop reason mystery",
            "replies/usage that cannot be read",
            "streams/cut_within_an_event",
            "streams/figures_that_are_none",
            "streams/malformed_event",
            "streams/nulls",
            "streams/stop_mystery",
        ),
        "an error, of which the specification has no event, or not under this status": (
            "replies/an answer broken off",
            "replies/an answer broken off with its reason",
            "replies/error in an array under 200",
            "replies/error under 200",
            "replies/error under 200 beside null choices",
            "replies/error under 400",
            "replies/something else",
            "streams/error_midway",
            "streams/quota_midway",
            "streams/rate_limited_at_once",
        ),
        "another server's, which only resembles the vendor's": (
            "replies/parts",
            "replies/stop reason eos",
            "replies/stop reason model_length",
            "replies/tool calls without ids, with arguments that are no text",
            "streams/stop_eos",
            "streams/stop_model_length",
            "streams/tool_calls_without_ids",
            "streams/tool_calls_without_index_gemini",
        ),
    },
    "openai_responses": {
        "wrong or incomplete on purpose": (
            "replies/incomplete by mystery",
            "replies/nulls",
            "replies/output that is no list",
            "replies/usage that cannot be read",
            "replies/usage without its parts",
            "streams/cut_within_an_event",
            "streams/figures_that_are_none",
            "streams/malformed_event",
            "streams/unknown_events",
        ),
        "an error, of which the specification has no event, or not under this status": (
            "replies/error under 200",
            "replies/error under 400",
            "replies/something else",
            "streams/nested_error_quota",
        ),
    },
}
"""Golden answers that do not fit, by folder and name, each with its reason."""


class Answers:
    """Checks answers against a vendor's specification of them."""

    def __init__(self, document: dict[str, Any]) -> None:
        resource = Resource.from_contents(_with_nulls(document), default_specification=DRAFT202012)
        self._registry: Registry[Any] = Registry().with_resource("urn:spec", resource)

    def judge(self, dialect: str) -> tuple[int, int, list[str]]:
        """How many golden answers and events *dialect* has, how many are known not to fit, and what is wrong."""
        odd = {name for names in ODD[dialect].values() for name in names}
        checked = 0
        failures: list[str] = []
        unfit: set[str] = set()
        for name, schema, value in golden(dialect):
            checked += 1
            if (complaint := self.complaint(schema, value)) is not None:
                unfit.add(name)
                if name not in odd:
                    failures.append(f"{dialect}: golden {name}: {complaint}")
        failures += [f"{dialect}: golden {name} fits, or is gone: it is not odd" for name in sorted(odd - unfit)]
        return checked, len(odd), failures

    def complaint(self, schema: str, value: Any) -> str | None:
        """The first thing that is wrong with *value*, None if nothing is."""
        validator = Draft202012Validator({"$ref": f"urn:spec#/components/schemas/{schema}"}, registry=self._registry)
        errors = sorted(validator.iter_errors(_as_specified(value)), key=lambda error: len(error.path))
        if not errors:
            return None
        return f"{'/'.join(map(str, errors[0].path))}: {errors[0].message[:150]}"


def golden(dialect: str) -> Iterator[tuple[str, str, Any]]:
    """Name, schema and value of every golden answer and event of the vendor's own address."""
    folder = GOLDEN / dialect
    whole, event = SCHEMAS[dialect]
    for name, case in json.loads((folder / "replies.json").read_text("utf-8")).items():
        if "settings" not in case:
            yield f"replies/{name}", whole, case["body"]
    for name, case in json.loads((folder / "streams.json").read_text("utf-8")).items():
        if "settings" not in case:
            for data in _payloads((folder / "streams" / f"{name}.sse").read_text("utf-8-sig")):
                yield f"streams/{name}", event, _json(data)


def _payloads(stream: str) -> Iterator[str]:
    """The data of each event; of one that has several lines, joined."""
    lines: list[str] = []
    for line in (*stream.splitlines(), ""):
        if line.startswith("data:"):
            lines.append(line[5:].removeprefix(" "))
        elif not line and lines:
            data = "\n".join(lines)
            lines.clear()
            if data.strip() and not data.startswith("[DONE]"):
                yield data


def _json(data: str) -> Any:
    """The value in *data*; what is none is a text, which fits nowhere."""
    try:
        return json.loads(data)
    except ValueError:
        return data


def _with_nulls(schema: Any) -> Any:
    """*schema* with what OpenAPI 3.0 called nullable in the words of JSON Schema: the files use both."""
    if isinstance(schema, list):
        return [_with_nulls(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_nulls(value) for key, value in schema.items()}
    return {"anyOf": [found, {"type": "null"}]} if found.pop("nullable", False) is True else found


def _as_specified(value: Any) -> Any:
    """*value* without the one null that vendors send and no specification has: the usage of what has not ended."""
    if isinstance(value, dict):
        return {key: _as_specified(inner) for key, inner in value.items() if not (key == "usage" and inner is None)}
    return value
