"""Requests with a fault in them, each of which ``bench/wire.py`` must find out."""

from __future__ import annotations

from typing import Any, Final, NamedTuple


class Plant(NamedTuple):
    """A fault in a request of *feature*: *change* is done to its body."""

    name: str
    feature: str
    change: Any


def _set(*steps: Any) -> Any:
    *path, last, value = steps

    def change(body: Any) -> None:
        for step in path:
            body = body[step]
        body[last] = value

    return change


def _drop(*steps: Any) -> Any:
    *path, last = steps

    def change(body: Any) -> None:
        for step in path:
            body = body[step]
        del body[last]

    return change


def _rename(old: str, new: str, *path: Any) -> Any:
    def change(body: Any) -> None:
        for step in path:
            body = body[step]
        body[new] = body.pop(old)

    return change


PLANTS: Final[dict[str, tuple[Plant, ...]]] = {
    "anthropic": (
        Plant("an unknown kind of block", "a picture", _set("messages", 0, "content", 0, "type", "hologram")),
        Plant("a misspelt key at the top", "tools", _rename("tools", "tolls")),
        Plant("a misspelt key inside a tool", "tools", _rename("description", "desciption", "tools", 0)),
        Plant("a misspelt key inside a block", "a picture", _rename("source", "sauce", "messages", 0, "content", 1)),
        Plant(
            "a misspelt key inside a mark",
            "marks within turns",
            _set("messages", 0, "content", 0, "cache_control", "tll", "1h"),
        ),
        Plant(
            "a misspelt key inside what the answer is to be",
            "a form",
            _rename("schema", "shcema", "output_config", "format"),
        ),
        Plant("text for a number", "text", _set("max_tokens", "many")),
        Plant("no max_tokens", "text", _drop("max_tokens")),
        Plant("no messages", "text", _drop("messages")),
        Plant("a number out of range", "text", _set("temperature", 7.5)),
        Plant("an unknown role", "text", _set("messages", 0, "role", "narrator")),
        Plant("an unknown choice of tools", "some tool", _set("tool_choice", "type", "perhaps")),
        Plant("a tool without its schema", "tools", _drop("tools", 0, "input_schema")),
        Plant("a result without its call", "calls and results", _drop("messages", 2, "content", 0, "tool_use_id")),
    ),
    "openai": (
        Plant("an unknown kind of part", "a picture", _set("messages", 0, "content", 0, "type", "hologram")),
        Plant("a misspelt key at the top", "text", _set("mesages", [])),
        Plant("a misspelt key inside a tool", "tools", _rename("description", "desciption", "tools", 0, "function")),
        Plant(
            "a misspelt key inside a part", "a picture", _set("messages", 0, "content", 1, "image_url", "detial", "low")
        ),
        Plant("text for a number", "max_tokens", _set("max_completion_tokens", "many")),
        Plant("no messages", "text", _drop("messages")),
        Plant("no model", "text", _drop("model")),
        Plant("a number out of range", "text", _set("temperature", 7.5)),
        Plant("an unknown role", "text", _set("messages", 0, "role", "narrator")),
        Plant("an unknown word for effort", "low reasoning", _set("reasoning_effort", "furious")),
        Plant("a form without its schema's name", "a form", _drop("response_format", "json_schema", "name")),
        Plant("a result without its call", "calls and results", _drop("messages", 2, "tool_call_id")),
    ),
    "openai_responses": (
        Plant("an unknown kind of item", "calls and results", _set("input", 2, "type", "hologram")),
        Plant("a misspelt key at the top", "max_tokens", _rename("max_output_tokens", "max_tokens")),
        Plant("a misspelt key inside a tool", "tools", _rename("description", "desciption", "tools", 0)),
        Plant("a misspelt key inside a part", "a picture", _set("input", 0, "content", 1, "detial", "low")),
        Plant("text for a number", "max_tokens", _set("max_output_tokens", "many")),
        Plant("a number out of range", "text", _set("temperature", 7.5)),
        Plant("an unknown role", "text", _set("input", 0, "role", "narrator")),
        Plant("an unknown word for effort", "low reasoning", _set("reasoning", "effort", "furious")),
        Plant("a form without its schema's name", "a form", _drop("text", "format", "name")),
        Plant("a call without its id", "calls and results", _drop("input", 2, "call_id")),
        Plant("a chat's key", "text", _set("messages", [])),
    ),
}
"""Made of requests for the models named in ``PLANTED_IN``."""
PLANTED_IN: Final = {"anthropic": "claude-sonnet-5-5", "openai": "gpt-5", "openai_responses": "gpt-6.1-sol"}
