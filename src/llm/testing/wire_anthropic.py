"""Anthropic Messages as the vendor's server speaks it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import msgspec

from .window import Account, Window
from .wire import Answer, Problem, whole_seconds

STOP_REASON = {"end": "end_turn", "length": "max_tokens", "stop_sequence": "stop_sequence"}
VERSIONS = ("2023-06-01", "2026-10-21")
ROLES = ("user", "assistant", "system")
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
TERMINAL = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

_json = msgspec.json.encode


class AnthropicWire:
    """The Messages dialect. `Dialect` says what each method is for."""

    name: Literal["anthropic", "openai"] = "anthropic"
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
        stops = body.get("stop_sequences", [])
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            return _invalid("stop_sequences: each stop sequence must be a non-empty string")
        return None

    def asked(self, body: dict[str, Any]) -> tuple[int | None, list[str]]:
        return body["max_tokens"], body.get("stop_sequences", [])

    def complete(self, answer: Answer) -> bytes:
        return _json(
            _message(answer)
            | {
                "content": [{"type": "text", "text": "".join(answer.tokens)}] if answer.tokens else [],
                "stop_reason": STOP_REASON[answer.stop],
                "stop_sequence": answer.stop_sequence,
                "usage": _usage(answer.input_tokens, len(answer.tokens)),
            }
        )

    def stream(self, answer: Answer) -> tuple[bytes, list[bytes], bytes, bytes]:
        start = _message(answer) | {"usage": _usage(answer.input_tokens, min(1, len(answer.tokens)))}
        opening = _event({"type": "message_start", "message": start}) + PING
        closing = b""
        if answer.tokens:
            opening += _event(
                {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
            )
            closing += _event({"type": "content_block_stop", "index": 0})
        deltas = [
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
            b'"delta":{"type":"text_delta","text":%b}}\n\n' % _json(token)
            for token in answer.tokens
        ]
        closing += _event(
            {
                "type": "message_delta",
                "delta": {"stop_reason": STOP_REASON[answer.stop], "stop_sequence": answer.stop_sequence},
                "usage": {"output_tokens": len(answer.tokens)},
            }
        )
        return opening, deltas, closing, TERMINAL

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


def _usage(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": output_tokens,
        "service_tier": "standard",
    }


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
