"""What the simulator says: text, thinking and tool calls, made up from what a request asks for.

Nothing here knows how a vendor spells it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

_TOKEN = re.compile(r"\s*\S+")
_SEAL = b"the simulator's own"


class Said(NamedTuple):
    """What a ``reply`` of the settings may give in place of text."""

    text: str = ""
    calls: tuple[tuple[str, Any], ...] = ()
    """Names and arguments of the tools to be called."""
    thinking: str = ""


class Block(msgspec.Struct, frozen=True, gc=False):
    """A part of an answer; joined, its tokens are its text, or a call's arguments as JSON."""

    kind: Literal["thinking", "text", "call"]
    tokens: tuple[str, ...]
    id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        return "".join(self.tokens)


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for beyond text."""

    tools: dict[str, Any] = {}
    """Schemas of the arguments by name."""
    choice: str = "auto"
    """``auto``, ``none``, ``required``, or a tool's name."""
    results: tuple[str, ...] = ()
    """What tools have answered since the user last spoke."""
    schema: dict[str, Any] | None = None
    """Of the answer."""
    thinks: bool = False


def tokenize(text: str) -> list[str]:
    """Split text into the simulator's tokens: a word with the white space before it."""
    tokens = _TOKEN.findall(text)
    if tokens:
        tokens[-1] += text[sum(map(len, tokens)) :]
    return tokens


def unscripted(wishes: Wishes) -> Said | None:
    """What is said when nobody has written it: a call of the first tool, JSON by the schema; None for an echo."""
    thinking = "Let me think about this." if wishes.thinks else ""
    forced = wishes.choice not in ("auto", "none")
    if wishes.tools and wishes.choice != "none" and (forced or not wishes.results):
        name = wishes.choice if wishes.choice in wishes.tools else next(iter(wishes.tools))
        return Said(calls=((name, sample(wishes.tools[name])),), thinking=thinking)
    if wishes.schema is not None:
        return Said(msgspec.json.encode(sample(wishes.schema)).decode(), thinking=thinking)
    if wishes.results:
        return Said("The tools said: " + "; ".join(wishes.results), thinking=thinking)
    return Said("", thinking=thinking) if thinking else None


def blocks_of(said: Said, sequence: int) -> tuple[Block, ...]:
    """*said* in the order in which vendors write it."""
    found = []
    if said.thinking:
        found.append(Block("thinking", tuple(tokenize(said.thinking))))
    if said.text:
        found.append(Block("text", tuple(tokenize(said.text))))
    for number, (name, arguments) in enumerate(said.calls):
        text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
        # A few characters a token, as JSON has few words.
        pieces = tuple(text[at : at + 4] for at in range(0, len(text), 4)) or ("{}",)
        found.append(Block("call", pieces, f"call_{sequence}_{number}", name))
    return tuple(found)


def sample(schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, depth: int = 0) -> Any:
    """A value that fits *schema*, always the same one. What nests without end is cut where it may be."""
    root = schema if root is None else root
    if "$ref" in schema:
        target: Any = root
        for step in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target[step]
        return sample(target, root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for choice in ("anyOf", "oneOf"):
        if schema.get(choice):
            options = sorted(schema[choice], key=lambda each: (each.get("type") == "null") != (depth > 4))
            return sample(options[0], root, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    match kind:
        case "object":
            named = schema.get("properties", {})
            wanted = named if depth < 4 else schema.get("required", ())
            return {name: sample(named.get(name, {}), root, depth + 1) for name in wanted}
        case "array":
            least = schema.get("minItems", 0 if depth > 4 else 1)
            return [sample(schema.get("items", {}), root, depth + 1) for _ in range(least)]
        case "integer":
            return int(schema.get("minimum", 1))
        case "number":
            return schema.get("minimum", 1.5)
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return _TEXTS.get(schema.get("format", ""), "sample")


_TEXTS = {
    "date": "2026-11-26",
    "date-time": "2026-11-26T12:00:00Z",
    "time": "12:00:00Z",
    "email": "someone@example.org",
    "uri": "https://example.org/",
    "uuid": "123e4567-e89b-42d3-a456-426614174000",
}


def seal(text: str) -> str:
    """The signature of what was thought."""
    return hmac.new(_SEAL, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()
