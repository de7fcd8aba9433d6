"""OpenAI's Responses as the vendor's server speaks it; errors, limits and models are those of Chat Completions."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import msgspec

from .saying import Block, Wishes, seal
from .wire import Answer, Name, Problem, text_of
from .wire_openai import EFFORTS, OpenAIWire

ROLES = ("developer", "system", "user", "assistant")
ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference", "web_search_call")

_json = msgspec.json.encode


class ResponsesWire(OpenAIWire):
    """The Responses dialect. `Dialect` says what each method is for."""

    name: Name = "openai_responses"

    def check(self, body: Any, headers: Mapping[str, str]) -> Problem | None:
        if not isinstance(body, dict):
            return self.problems["invalid_json"]
        if not isinstance(body.get("model"), str) or not body["model"]:
            return _invalid("you must provide a model parameter")
        if "messages" in body:
            return _invalid(
                "Unsupported parameter: 'messages'. In the Responses API, this parameter has moved to 'input'.",
                "messages",
                "unsupported_parameter",
            )
        asked = body.get("input")
        if not isinstance(asked, (str, list)) or not asked:
            return _invalid("Missing required parameter: 'input'.", "input", "missing_required_parameter")
        for name in ("stop", "n", "seed", "frequency_penalty", "presence_penalty", "max_tokens", "reasoning_effort"):
            if name in body:
                return _invalid(f"Unsupported parameter: '{name}'.", name, "unsupported_parameter")
        most = body.get("max_output_tokens")
        if most is not None and (type(most) is not int or most < 1):
            return _invalid("Invalid 'max_output_tokens': expected an integer.", "max_output_tokens", "invalid_value")
        effort = (body.get("reasoning") or {}).get("effort", "medium")
        if effort not in EFFORTS:
            return _invalid(f"Invalid value: {effort!r}.", "reasoning.effort", "invalid_value")
        for i, tool in enumerate(body.get("tools") or ()):
            if tool.get("type") == "function" and "name" not in tool:
                place = f"tools[{i}].name"
                return _invalid(f"Missing required parameter: '{place}'.", place, "missing_required_parameter")
        form = (body.get("text") or {}).get("format") or {}
        if form.get("type") == "json_schema" and "name" not in form:
            return _invalid("Missing required parameter: 'text.format.name'.", "text.format.name")
        return _check_items(asked) if isinstance(asked, list) else None

    def asked(self, body: dict[str, Any]) -> tuple[int | None, list[str]]:
        return body.get("max_output_tokens"), []

    def wishes(self, body: dict[str, Any]) -> Wishes:
        choice = body.get("tool_choice", "auto")
        results = []
        items: list[Any] = body["input"] if isinstance(body["input"], list) else []
        for item in reversed(items):
            if item.get("type") != "function_call_output":
                break
            results.append(text_of(item["output"]))
        return Wishes(
            tools={t["name"]: t.get("parameters") or {} for t in body.get("tools") or () if t["type"] == "function"},
            choice=choice if isinstance(choice, str) else choice.get("name", "auto"),
            results=tuple(reversed(results)),
            schema=((body.get("text") or {}).get("format") or {}).get("schema"),
            thinks=(body.get("reasoning") or {}).get("effort", "none") != "none",
        )

    def prefix(self, body: dict[str, Any]) -> Any:
        return [body.get("tools"), body.get("instructions"), body["input"]]

    def counted(self, tokens: int) -> bytes:
        return _json({"object": "response.input_tokens", "input_tokens": tokens})

    def complete(self, answer: Answer) -> bytes:
        return _json(_response(answer, [_item(block, at) for at, block in enumerate(answer.blocks)], ended=True))

    def stream(self, answer: Answer) -> tuple[bytes, list[bytes], bytes, bytes]:
        events = _Events()
        started = _response(answer, [], ended=False)
        opening = events("response.created", response=started) + events("response.in_progress", response=started)
        deltas: list[bytes] = []
        between = b""
        for at, block in enumerate(answer.blocks):
            begin = between + _begin(events, block, at)
            if at == 0:
                opening, begin = opening + begin, b""
            for token in block.tokens:
                deltas.append(begin + _delta(events, block, at, token))
                begin = b""
            between = _finish(events, block, at)
        output = [_item(block, at) for at, block in enumerate(answer.blocks)]
        kind = "response.incomplete" if answer.stop == "length" else "response.completed"
        return opening, deltas, between, events(kind, response=_response(answer, output, ended=True))

    def error_event(self, problem: Problem, request_id: str) -> bytes:
        event = {"type": "error", "code": problem.code or problem.type, "message": problem.message, "param": None}
        return b"event: error\ndata: %b\n\n" % _json(event | {"sequence_number": 0})


class _Events:
    """Writes events, and numbers them."""

    def __init__(self) -> None:
        self._number = -1

    def __call__(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (
            kind.encode(),
            _json({"type": kind} | fields | {"sequence_number": self._number}),
        )


def _begin(events: _Events, block: Block, at: int) -> bytes:
    item = _item(block, at) | {"status": "in_progress"}
    if block.kind == "thinking":
        item = {"id": item["id"], "type": "reasoning", "summary": []}
        part = {"type": "summary_text", "text": ""}
        added = events("response.output_item.added", output_index=at, item=item)
        where = {"item_id": item["id"], "output_index": at, "summary_index": 0}
        return added + events("response.reasoning_summary_part.added", **where, part=part)
    if block.kind == "call":
        return events("response.output_item.added", output_index=at, item=item | {"arguments": ""})
    added = events("response.output_item.added", output_index=at, item=item | {"content": []})
    where = {"item_id": item["id"], "output_index": at, "content_index": 0}
    return added + events("response.content_part.added", **where, part=_text_part(""))


def _delta(events: _Events, block: Block, at: int, token: str) -> bytes:
    where: dict[str, Any] = {"item_id": _id(block, at), "output_index": at}
    if block.kind == "thinking":
        return events("response.reasoning_summary_text.delta", **where, summary_index=0, delta=token)
    if block.kind == "call":
        return events("response.function_call_arguments.delta", **where, delta=token)
    return events("response.output_text.delta", **where, content_index=0, delta=token, logprobs=[])


def _finish(events: _Events, block: Block, at: int) -> bytes:
    where: dict[str, Any] = {"item_id": _id(block, at), "output_index": at}
    done = events
    if block.kind == "thinking":
        text = done("response.reasoning_summary_text.done", **where, summary_index=0, text=block.text)
        part = {"type": "summary_text", "text": block.text}
        text += done("response.reasoning_summary_part.done", **where, summary_index=0, part=part)
    elif block.kind == "call":
        text = done("response.function_call_arguments.done", **where, name=block.name, arguments=block.text)
    else:
        text = done("response.output_text.done", **where, content_index=0, text=block.text, logprobs=[])
        text += done("response.content_part.done", **where, content_index=0, part=_text_part(block.text))
    return text + events("response.output_item.done", output_index=at, item=_item(block, at))


def _id(block: Block, at: int) -> str:
    return {"thinking": "rs_", "call": "fc_", "text": "msg_"}[block.kind] + str(at)


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(block: Block, at: int) -> dict[str, Any]:
    item: dict[str, Any] = {"id": _id(block, at)}
    if block.kind == "thinking":
        summary = [{"type": "summary_text", "text": block.text}]
        return item | {"type": "reasoning", "summary": summary, "encrypted_content": _cipher(block.text)}
    if block.kind == "call":
        call = {"status": "completed", "call_id": block.id, "name": block.name, "arguments": block.text}
        return item | {"type": "function_call"} | call
    return item | {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [_text_part(block.text)],
    }


def _cipher(text: str) -> str:
    """Reasoning as only the vendor can read it; here, so that an altered one is found out."""
    return base64.b64encode(f"{seal(text)}{text}".encode()).decode()


def _response(answer: Answer, output: list[dict[str, Any]], *, ended: bool) -> dict[str, Any]:
    cut = ended and answer.stop == "length"
    spent = answer.output_tokens
    usage = {
        "input_tokens": answer.input_tokens,
        "input_tokens_details": {"cached_tokens": answer.cache_read, "cache_write_tokens": answer.cache_written},
        "output_tokens": spent,
        "output_tokens_details": {"reasoning_tokens": answer.thought_tokens},
        "total_tokens": answer.input_tokens + spent,
    }
    return {
        "id": "resp_" + answer.id,
        "object": "response",
        "created_at": answer.created,
        "status": ("incomplete" if cut else "completed") if ended else "in_progress",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None,
        "metadata": {},
        "model": answer.model,
        "output": output,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": usage if ended else None,
    }


def _check_items(items: list[Any]) -> Problem | None:
    """What the vendor objects to in items: kinds, reasoning that was altered, and results that answer no call."""
    called: set[str] = set()
    answered: set[str] = set()
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            return _invalid(f"Invalid type for 'input[{i}]': expected an object.", f"input[{i}]", "invalid_type")
        kind = item.get("type", "message")
        if kind not in ITEMS:
            return _invalid(f"Invalid value: {kind!r}.", f"input[{i}].type", "invalid_value")
        if kind == "message" and item.get("role") not in ROLES:
            return _invalid(f"Invalid value: {item.get('role')!r}.", f"input[{i}].role", "invalid_value")
        if kind == "function_call":
            called.add(item.get("call_id", ""))
        elif kind == "function_call_output":
            if item.get("call_id") not in called:
                said = f"No tool call found for function call output with call_id {item.get('call_id')}."
                return _invalid(said, "input")
            answered.add(item["call_id"])
        elif kind == "reasoning" and item.get("encrypted_content") is not None:
            text = "".join(part.get("text", "") for part in item.get("summary", ()))
            if item["encrypted_content"] != _cipher(text):
                return _invalid("The encrypted content could not be verified.", "input", "invalid_encrypted_content")
    if called - answered:
        return _invalid(f"No tool output found for function call {min(called - answered)}.", "input")
    return None


def _invalid(message: str, param: str | None = None, code: str | None = None) -> Problem:
    return Problem(400, "invalid_request_error", message, code, param)
