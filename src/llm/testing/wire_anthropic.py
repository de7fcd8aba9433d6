"""Anthropic Messages as the vendor's server speaks it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from .saying import Block, Wishes, seal
from .window import Account, Window
from .wire import Answer, Name, Problem, text_of, whole_seconds

STOP_REASON = {
    "end": "end_turn",
    "length": "max_tokens",
    "stop_sequence": "stop_sequence",
    "tool_calls": "tool_use",
}
VERSIONS = ("2023-06-01", "2026-10-21")
ROLES = ("user", "assistant", "system")
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
TERMINAL = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

BLOCKS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "image": ("source",),
    "document": ("source",),
    "thinking": ("thinking", "signature"),
    "redacted_thinking": ("data",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
    "server_tool_use": ("id", "name", "input"),
    "web_search_tool_result": ("tool_use_id", "content"),
}
"""Kinds of blocks that are understood, and what each must have."""
CUMULATIVE = (
    "input_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
    "output_tokens_details",
    "server_tool_use",
)
"""What the end of a stream tells of its usage, for the whole of it."""
DELTA_HEAD = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":'
DELTA: Mapping[str, bytes] = {
    "text": b'"text_delta","text":%b',
    "thinking": b'"thinking_delta","thinking":%b',
    "call": b'"input_json_delta","partial_json":%b',
}

_json = msgspec.json.encode


class AnthropicWire:
    """The Messages dialect. `Dialect` says what each method is for."""

    name: Name = "anthropic"
    counts_rejected = False
    problems: Mapping[str, Problem] = {
        "invalid_request": Problem(400, "invalid_request_error", "The simulator refuses this request."),
        "invalid_json": Problem(400, "invalid_request_error", "The request body is not valid JSON."),
        "no_key": Problem(401, "authentication_error", "x-api-key header is required"),
        "authentication": Problem(401, "authentication_error", "invalid x-api-key"),
        "billing": Problem(402, "billing_error", "Your credit balance is too low to access the API."),
        "permission": Problem(403, "permission_error", "Your API key does not have permission to use this resource."),
        "not_found": Problem(404, "not_found_error", "Not found"),
        "method": Problem(405, "invalid_request_error", "Method Not Allowed"),
        "timeout": Problem(504, "timeout_error", "Request timed out."),
        "conflict": Problem(409, "conflict_error", "Conflict"),
        "rate_limit": Problem(429, "rate_limit_error", "This request would exceed your account's rate limit."),
        "spend_limit": Problem(
            429, "rate_limit_error", "This request would exceed your spend limit.", code="enforced_spend_limit_reached"
        ),
        "server_error": Problem(500, "api_error", "Internal server error"),
        "unavailable": Problem(503, "api_error", "Service unavailable"),
        "overloaded": Problem(529, "overloaded_error", "Overloaded"),
    }

    def check(self, body: Any, headers: Mapping[str, str]) -> Problem | None:
        version = headers.get("anthropic-version")
        if version is None:
            return _invalid("anthropic-version: header is required")
        if version not in VERSIONS:
            return _invalid(f'anthropic-version: "{version}" is not a valid version')
        if not isinstance(body, dict):
            return _invalid("Input should be a valid dictionary")
        for field in ("model", "max_tokens", "messages"):
            if field not in body:
                return _invalid(f"{field}: Field required")
        if not isinstance(body["model"], str) or not body["model"]:
            return _invalid("model: Input should be a valid string")
        if type(body["max_tokens"]) is not int or body["max_tokens"] < 0:
            return _invalid("max_tokens: Input should be a valid integer greater than or equal to 0")
        messages = body["messages"]
        if not isinstance(messages, list):
            return _invalid("messages: Input should be a valid list")
        if not messages:
            return _invalid("messages: at least one message is required")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                return _invalid(f"messages.{i}.role: Input should be 'user', 'assistant' or 'system'")
            content = message.get("content")
            if not isinstance(content, (str, list)):
                return _invalid(f"messages.{i}.content: Input should be a valid string or list")
            if content in ("", []) and i < len(messages) - 1:
                return _invalid(f"messages.{i}: all messages must have non-empty content")
        if not isinstance(body.get("system", ""), (str, list)):
            return _invalid("system: Input should be a valid list")
        if type(body.get("stream", False)) is not bool:
            return _invalid("stream: Input should be a valid boolean")
        for field, highest in (("temperature", 1.0), ("top_p", 1.0), ("top_k", float("inf"))):
            if field not in body:
                continue
            if version != "2023-06-01":
                return _invalid(f"{field}: Extra inputs are not permitted")
            value = body[field]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= highest:
                return _invalid(f"{field}: Input should be a number between 0 and {highest:g}")
        if (problem := _check_content(messages) or _check_wishes(body)) is not None:
            return problem
        stops = body.get("stop_sequences", [])
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            return _invalid("stop_sequences: each stop sequence must be a non-empty string")
        return None

    def asked(self, body: dict[str, Any]) -> tuple[int | None, list[str]]:
        return body["max_tokens"], body.get("stop_sequences", [])

    def wishes(self, body: dict[str, Any]) -> Wishes:
        choice = body.get("tool_choice", {})
        kind = choice.get("type", "auto")
        last = body["messages"][-1]
        results = [b for b in last.get("content", ()) if isinstance(b, dict) and b.get("type") == "tool_result"]
        wanted = body.get("output_config", {}).get("format") or {}
        return Wishes(
            tools={tool["name"]: tool.get("input_schema", {}) for tool in body.get("tools", ())},
            choice={"any": "required", "tool": choice.get("name", "")}.get(kind, kind),
            results=tuple(text_of(result.get("content", "")) for result in results),
            schema=wanted.get("schema"),
            thinks=body.get("thinking", {}).get("type") in ("enabled", "adaptive"),
        )

    def prefix(self, body: dict[str, Any]) -> Any:
        if "cache_control" in body:
            return [body.get("tools"), body.get("system"), body["messages"]]
        # Up to the last mark, in the order in which the vendor reads.
        parts: list[Any] = [*body.get("tools", ())]
        system = body.get("system", [])
        parts += system if isinstance(system, list) else [system]
        for message in body["messages"]:
            content = message.get("content")
            parts += content if isinstance(content, list) else [content]
        marked = [at for at, part in enumerate(parts) if isinstance(part, dict) and "cache_control" in part]
        return parts[: marked[-1] + 1] if marked else None

    def complete(self, answer: Answer) -> bytes:
        return _json(
            _message(answer)
            | {
                "content": [_whole(block) for block in answer.blocks],
                "stop_reason": STOP_REASON[answer.stop],
                "stop_sequence": answer.stop_sequence,
                "usage": _usage(answer, answer.output_tokens),
            }
        )

    def stream(self, answer: Answer) -> tuple[bytes, list[bytes], bytes, bytes]:
        start = _message(answer) | {"usage": _usage(answer, min(1, answer.output_tokens))}
        opening = _event({"type": "message_start", "message": start}) + PING
        deltas: list[bytes] = []
        between = b""
        for index, block in enumerate(answer.blocks):
            begin = between + _event({"type": "content_block_start", "index": index, "content_block": _begun(block)})
            if index == 0:
                opening, begin = opening + begin, b""
            head = (
                b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":' % index
            )
            for token in block.tokens:
                deltas.append(begin + head + DELTA[block.kind] % _json(token) + b"}}\n\n")
                begin = b""
            between = b""
            if block.kind == "thinking":
                signature = {"type": "signature_delta", "signature": seal(block.text)}
                between = _event({"type": "content_block_delta", "index": index, "delta": signature})
            between += _event({"type": "content_block_stop", "index": index})
        closing = between + _event(
            {
                "type": "message_delta",
                "delta": {
                    "stop_reason": STOP_REASON[answer.stop],
                    "stop_sequence": answer.stop_sequence,
                    "stop_details": None,
                    "container": None,
                },
                "usage": {
                    name: value for name, value in _usage(answer, answer.output_tokens).items() if name in CUMULATIVE
                },
            }
        )
        return opening, deltas, closing, TERMINAL

    def counted(self, tokens: int) -> bytes:
        return _json({"input_tokens": tokens})

    def error(self, problem: Problem, request_id: str) -> bytes:
        error: dict[str, Any] = {"type": problem.type, "message": problem.message}
        if problem.code is not None:
            error["details"] = {"error_code": problem.code}
        return _json({"type": "error", "error": error, "request_id": request_id})

    def error_event(self, problem: Problem, request_id: str) -> bytes:
        return b"event: error\ndata: %b\n\n" % self.error(problem, request_id)

    def refused(self, dimension: str) -> Problem:
        words = dimension.replace("_", " ")
        return Problem(
            429, "rate_limit_error", f"This request would exceed your organization's rate limit of {words} per minute."
        )

    def unknown_model(self, model: str) -> Problem:
        return Problem(404, "not_found_error", f"model: {model}")

    def headers(self, account: Account, owner: str, request_id: str, now: float) -> dict[str, str]:
        headers = {
            "request-id": request_id,
            "anthropic-organization-id": organization(owner),
            "anthropic-workspace-id": workspace(owner),
        }
        windows = {
            "requests": account.requests,
            "input-tokens": account.input_tokens,
            "output-tokens": account.output_tokens,
        }
        tightest: tuple[float, Window] | None = None
        wall = time.time()
        for name, window in windows.items():
            if not window.limit:
                continue
            remaining = window.remaining(now)
            if name != "requests":
                share = remaining / window.limit
                if tightest is None or share < tightest[0]:
                    tightest = (share, window)
            _put(headers, name, window, now, wall)
        if tightest is not None:
            _put(headers, "tokens", tightest[1], now, wall)
        return headers

    def retry_after(self, seconds: float) -> dict[str, str]:
        return {"retry-after": whole_seconds(seconds)}

    def models(self, models: tuple[str, ...]) -> bytes:
        return _json(
            {
                "data": [_model(model) for model in models],
                "has_more": False,
                "first_id": models[0] if models else None,
                "last_id": models[-1] if models else None,
            }
        )

    def model(self, model: str) -> bytes:
        return _json(_model(model))


@lru_cache(maxsize=1024)
def organization(owner: str) -> str:
    """A stable id for an organisation, which is the key's own unless it was given to one."""
    digest = hashlib.sha256(owner.encode("utf-8", "replace")).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"


@lru_cache(maxsize=1024)
def workspace(owner: str) -> str:
    """The organisation's only workspace."""
    return "wrkspc_" + hashlib.sha256(owner.encode("utf-8", "replace")).hexdigest()[32:56]


def _put(headers: dict[str, str], name: str, window: Window, now: float, wall: float) -> None:
    limit = window.limit or 0
    remaining = window.remaining(now)
    if name != "requests":
        # The vendor rounds what is left of tokens to the nearest thousand.
        remaining = min(limit, (remaining + 500) // 1000 * 1000)
    prefix = f"anthropic-ratelimit-{name}-"
    headers[prefix + "limit"] = str(limit)
    headers[prefix + "remaining"] = str(remaining)
    headers[prefix + "reset"] = _rfc3339(-int(-(wall + window.full_in(now)) // 1))


@lru_cache(maxsize=256)
def _rfc3339(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _invalid(message: str) -> Problem:
    return Problem(400, "invalid_request_error", message)


def _event(payload: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (payload["type"].encode(), _json(payload))


def _message(answer: Answer) -> dict[str, Any]:
    return {
        "id": "msg_" + answer.id,
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
    }


def _usage(answer: Answer, output_tokens: int) -> dict[str, Any]:
    return {
        # Only what comes after the last mark.
        "input_tokens": answer.input_tokens - answer.cache_read - answer.cache_written,
        "cache_creation_input_tokens": answer.cache_written,
        "cache_read_input_tokens": answer.cache_read,
        "cache_creation": None,
        "output_tokens": output_tokens,
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
    } | ({"output_tokens_details": {"thinking_tokens": answer.thought_tokens}} if answer.thought_tokens else {})


def _whole(block: Block) -> dict[str, Any]:
    if block.kind == "thinking":
        return {"type": "thinking", "thinking": block.text, "signature": seal(block.text)}
    if block.kind == "text":
        return {"type": "text", "text": block.text, "citations": None}
    return _tool_use(block, msgspec.json.decode(block.text))


def _tool_use(block: Block, given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": given, "caller": {"type": "direct"}}


def _begun(block: Block) -> dict[str, Any]:
    """A block before anything of it has come."""
    if block.kind == "thinking":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if block.kind == "text":
        return {"type": "text", "text": "", "citations": None}
    return _tool_use(block, {})


def _check_content(messages: list[Any]) -> Problem | None:
    """What the vendor objects to in blocks: kinds, signatures, and results that answer no call."""
    called: set[str] = set()
    for i, message in enumerate(messages):
        content = message["content"]
        blocks = content if isinstance(content, list) else []
        answered = {b.get("tool_use_id") for b in blocks if isinstance(b, dict) and b.get("type") == "tool_result"}
        if called - answered:
            return _invalid(f"messages.{i}: `tool_use` ids were found without `tool_result` blocks immediately after")
        if answered - called:
            return _invalid(f"messages.{i}: unexpected `tool_use_id` found in `tool_result` blocks")
        called = set()
        for j, block in enumerate(blocks):
            place = f"messages.{i}.content.{j}"
            kind = str(block.get("type")) if isinstance(block, dict) else ""
            if kind not in BLOCKS:
                return _invalid(f"{place}: Input tag '{kind}' does not match any of the expected tags")
            missing = [field for field in BLOCKS[kind] if field not in block]
            if missing:
                return _invalid(f"{place}.{kind}.{missing[0]}: Field required")
            if kind == "text" and not block["text"]:
                return _invalid(f"{place}: text content blocks must be non-empty")
            if kind == "thinking" and block["signature"] != seal(block["thinking"]):
                return _invalid(f"{place}: Invalid `signature` in `thinking` block")
            if kind == "tool_use":
                called.add(block["id"])
    return None


def _check_wishes(body: dict[str, Any]) -> Problem | None:
    """What the vendor objects to in tools, thinking and formats."""
    tools = body.get("tools", [])
    for i, tool in enumerate(tools):
        for field in ("name", "input_schema"):
            if "type" not in tool and field not in tool:
                return _invalid(f"tools.{i}.custom.{field}: Field required")
    choice = body.get("tool_choice", {})
    if choice and not tools:
        return _invalid("tool_choice: may only be specified while providing `tools`")
    if choice.get("type", "auto") not in ("auto", "any", "tool", "none"):
        return _invalid("tool_choice: Input tag does not match any of the expected tags")
    thinking = body.get("thinking", {})
    kind = thinking.get("type", "disabled")
    if kind not in ("adaptive", "enabled", "disabled", "between_tools"):
        return _invalid("thinking: Input tag does not match any of the expected tags")
    if kind == "enabled" and not 1024 <= thinking.get("budget_tokens", 0) < body["max_tokens"]:
        return _invalid("`max_tokens` must be greater than `thinking.budget_tokens`, which must be at least 1024")
    if kind == "enabled" and choice.get("type") in ("any", "tool"):
        return _invalid("Thinking may not be enabled when tool_choice forces tool use.")
    effort = body.get("output_config", {}).get("effort", "high")
    if effort not in ("low", "medium", "high", "xhigh", "max"):
        return _invalid("output_config.effort: Input should be 'low', 'medium', 'high', 'xhigh' or 'max'")
    return None


def _model(model: str) -> dict[str, Any]:
    return {
        "id": model,
        "type": "model",
        "display_name": model,
        "created_at": "2026-01-01T00:00:00Z",
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "max_input_tokens": 1_000_000,
        "max_tokens": 128_000,
    }
