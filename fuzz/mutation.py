"""Changes to JSON as JSON: flipped bytes alone hardly ever leave a body that a parser lets through."""

from __future__ import annotations

import random
from typing import Any, Final

import msgspec

from .targets import HEAD, HEADERS_END

ODD: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1.5, 429, 10**12, 10**13, 2**64, -(2**63), 1e308, "", "x", "stop", "error", "\u2028",
    [], {}, [[]], [None], [{}], {"error": None}, {"message": {"detail": []}}, {"loc": [1], "msg": "m"}, "y" * 3000,
)  # fmt: skip


def mutate(data: bytes, longest: int, seed: int) -> bytes | None:
    """*data* with one value of its JSON changed, or None if there is none that fits."""
    chance = random.Random(seed)
    head, body = data[:HEAD], data[HEAD:]
    before, end, after = body.partition(HEADERS_END)
    if end:
        head, body = head + before + end, after
    lines = body.split(b"\n")
    places = [i for i, line in enumerate(lines) if line.startswith(b"data:")]
    place = chance.choice(places) if places else None
    try:
        value = msgspec.json.decode(lines[place][5:] if place is not None else body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    changed = msgspec.json.encode(_change(value, chance))
    if place is not None:
        lines[place] = b"data: " + changed
        if chance.random() < 0.2:
            lines[place:place] = lines[place - 1 : place + 2]
        changed = b"\n".join(lines)
    return head + changed if len(head) + len(changed) <= longest else None


def _change(value: Any, chance: random.Random) -> Any:
    inner = list(_containers(value))
    if not inner or chance.random() < 0.05:
        return chance.choice((value, *ODD, [value]))
    container = chance.choice(inner)
    key = chance.choice(list(container) if isinstance(container, dict) else range(len(container)))
    other = chance.choice(inner)
    match chance.randrange(5):
        case 0:
            del container[key]
        case 1 if isinstance(container, list):
            container.append(_copy(container[key]))
        case 2 if isinstance(container, dict) and isinstance(other, dict):
            container[chance.choice(list(other))] = _copy(chance.choice(list(other.values())))
        case 3:
            container[key] = _copy(other)
        case _:
            container[key] = chance.choice(ODD)
    return value


def _containers(value: Any) -> list[Any]:
    """All objects and arrays in *value* that hold something."""
    found = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (dict, list)) and each:
            found.append(each)
            waiting += each.values() if isinstance(each, dict) else each
    return found


def _copy(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))
