"""OpenAI Chat Completions as the vendor's server speaks it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from .saying import Block, Wishes
from .window import Account
from .wire import Answer, Name, Problem, text_of, whole_seconds

FINISH_REASON = {"end": "stop", "length": "length", "stop_sequence": "stop", "tool_calls": "tool_calls"}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
ROLES = ("developer", "system", "user", "assistant", "tool", "function")
TERMINAL = b"data: [DONE]\n\n"

_json = msgspec.json.encode


class OpenAIWire:
    """The Chat Completions dialect. `Dialect` says what each method is for."""

    name: Name = "openai"
    counts_rejected = True
    problems: Mapping[str, Problem] = {
        "invalid_request": Problem(400, "invalid_request_error", "The simulator refuses this request."),
        "invalid_json": Problem(
            400, "invalid_request_error", "We could not parse the JSON body of your request. It is not valid JSON."
        ),
        "no_key": Problem(401, "invalid_request_error", "You didn't provide an API key."),
        "authentication": Problem(401, "invalid_request_error", "Incorrect API key provided.", "invalid_api_key"),
        # The vendor itself has no 402; DeepSeek has.
        "billing": Problem(402, "unknown_error", "Insufficient Balance", "invalid_request_error"),
        "permission": Problem(
            403,
            "invalid_request_error",
            "Country, region, or territory not supported",
            "unsupported_country_region_territory",
        ),
        "not_found": Problem(404, "invalid_request_error", "Unknown request URL.", "unknown_url"),
        "method": Problem(405, "invalid_request_error", "Method not allowed."),
        "timeout": Problem(504, "server_error", "Request timed out."),
        "conflict": Problem(409, "invalid_request_error", "The request conflicts with another."),
        "rate_limit": Problem(429, "requests", "Rate limit reached.", "rate_limit_exceeded"),
        "spend_limit": Problem(
            429, "insufficient_quota", "You exceeded your current quota.", "organization_spend_limit_exceeded"
        ),
        "server_error": Problem(500, "server_error", "The server had an error while processing your request."),
        "unavailable": Problem(503, "service_unavailable_error", "The server is overloaded.", "server_is_overloaded"),
        "overloaded": Problem(529, "service_unavailable_error", "The server is overloaded.", "server_is_overloaded"),
    }

    def check(self, body: Any, headers: Mapping[str, str]) -> Problem | None:
        if not isinstance(body, dict):
            return self.problems["invalid_json"]
        if not isinstance(body.get("model"), str) or not body["model"]:
            return _invalid("you must provide a model parameter")
        if "messages" not in body:
            return _invalid("Missing required parameter: 'messages'.", "messages", "missing_required_parameter")
        messages = body["messages"]
        if not isinstance(messages, list):
            return _invalid("Invalid type for 'messages': expected an array.", "messages", "invalid_type")
        if not messages:
            return _invalid(
                "Invalid 'messages': empty array. Expected an array with minimum length 1.", "messages", "empty_array"
            )
        for i, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            if role not in ROLES:
                return _invalid(f"Invalid value: {role!r}.", f"messages[{i}].role", "invalid_value")
            content = message.get("content")
            if not isinstance(content, (str, list)) and not (content is None and role == "assistant"):
                return _invalid(
                    f"Invalid value for 'content': expected a string, got {type(content).__name__}.",
                    f"messages[{i}].content",
                    "invalid_type",
                )
        if "max_tokens" in body and "max_completion_tokens" in body:
            return _invalid(
                "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.", "max_tokens"
            )
        for field in ("max_tokens", "max_completion_tokens"):
            if body.get(field) is not None and (type(body[field]) is not int or body[field] < 1):
                return _invalid(f"Invalid '{field}': expected an integer of at least 1.", field, "invalid_value")
        for field, lowest, highest in (
            ("temperature", 0, 2),
            ("top_p", 0, 1),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
        ):
            value = body.get(field)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value <= highest:
                return _invalid(
                    f"Invalid '{field}': expected a number from {lowest} to {highest}.", field, "invalid_value"
                )
        stop = body.get("stop")
        if not isinstance(stop, (str, list, type(None))) or (isinstance(stop, list) and len(stop) > 4):
            return _invalid("Invalid 'stop': expected a string or up to 4 of them.", "stop", "invalid_value")
        if (problem := _check_calls(messages) or _check_wishes(body)) is not None:
            return problem
        if type(body.get("stream") or False) is not bool:
            return _invalid("Invalid type for 'stream': expected a boolean.", "stream", "invalid_type")
        if body.get("stream_options") is not None and not body.get("stream"):
            return _invalid(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
            )
        return None

    def asked(self, body: dict[str, Any]) -> tuple[int | None, list[str]]:
        stop = body.get("stop") or []
        most = body.get("max_completion_tokens")
        return body.get("max_tokens") if most is None else most, [stop] if isinstance(stop, str) else stop

    def wishes(self, body: dict[str, Any]) -> Wishes:
        choice = body.get("tool_choice", "auto")
        results = []
        for message in reversed(body["messages"]):
            if message["role"] != "tool":
                break
            results.append(text_of(message["content"]))
        form = body.get("response_format") or {}
        return Wishes(
            tools={t["function"]["name"]: t["function"].get("parameters", {}) for t in body.get("tools") or ()},
            choice=choice if isinstance(choice, str) else choice.get("function", {}).get("name", "auto"),
            results=tuple(reversed(results)),
            schema=form.get("json_schema", {}).get("schema"),
            thinks=body.get("reasoning_effort", "none") != "none",
        )

    def prefix(self, body: dict[str, Any]) -> Any:
        # Without a mark the vendor keeps what is long enough, whatever it is.
        return [body.get("tools"), body["messages"]]

    def counted(self, tokens: int) -> bytes:
        raise NotImplementedError("Chat Completions has no such request")

    def complete(self, answer: Answer) -> bytes:
        calls = [_call(block) for block in answer.blocks if block.kind == "call"]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text if answer.text or not calls else None,
            "refusal": None,
            "annotations": [],
        }
        if calls:
            message["tool_calls"] = calls
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": FINISH_REASON[answer.stop],
            "logprobs": None,
        }
        return _json(
            {
                "id": "chatcmpl-" + answer.id,
                "object": "chat.completion",
                "created": answer.created,
                "model": answer.model,
                "choices": [choice],
                "usage": _usage(answer),
                "service_tier": "default",
                "system_fingerprint": "fp_simulator",
            }
        )

    def stream(self, answer: Answer) -> tuple[bytes, list[bytes], bytes, bytes]:
        head = (
            b'data: {"id":"chatcmpl-%b","object":"chat.completion.chunk","created":%d,"model":%b,'
            b'"service_tier":"default","system_fingerprint":"fp_simulator",'
            % (answer.id.encode(), answer.created, _json(answer.model))
        ).replace(b"%", b"%%")
        usage = b',"usage":null' if answer.include_usage else b""
        choice = head + b'"choices":[{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}]' + usage + b"}\n\n"
        opening = choice % (b'{"role":"assistant","content":"","refusal":null}', b"null")
        deltas: list[bytes] = []
        number = -1
        for block in answer.blocks:
            if block.kind == "text":
                deltas += [choice % (b'{"content":%b}' % _json(token), b"null") for token in block.tokens]
            elif block.kind == "call":
                number += 1
                function = {"name": block.name, "arguments": ""}
                call = {"index": number, "id": block.id, "type": "function", "function": function}
                begin = choice % (_json({"tool_calls": [call]}), b"null")
                for token in block.tokens:
                    more = {"tool_calls": [{"index": number, "function": {"arguments": token}}]}
                    deltas.append(begin + choice % (_json(more), b"null"))
                    begin = b""
            # What is thought is counted, and not shown.
        closing = choice % (b"{}", _json(FINISH_REASON[answer.stop]))
        if answer.include_usage:
            closing += (head + b'"choices":[],"usage":%b}\n\n') % _json(_usage(answer))
        return opening, deltas, closing, TERMINAL

    def error(self, problem: Problem, request_id: str) -> bytes:
        return _json(
            {
                "error": {
                    "message": problem.message,
                    "type": problem.type,
                    "param": problem.param,
                    "code": problem.code,
                }
            }
        )

    def error_event(self, problem: Problem, request_id: str) -> bytes:
        return b"data: %b\n\n" % self.error(problem, request_id)

    def refused(self, dimension: str) -> Problem:
        kind = "requests" if dimension == "requests" else "tokens"
        return Problem(429, kind, f"Rate limit reached on {kind} per min.", "rate_limit_exceeded")

    def unknown_model(self, model: str) -> Problem:
        return Problem(
            404,
            "invalid_request_error",
            f"The model `{model}` does not exist or you do not have access to it.",
            "model_not_found",
        )

    def headers(self, account: Account, owner: str, request_id: str, now: float) -> dict[str, str]:
        headers = {
            "x-request-id": request_id,
            "openai-organization": organization(owner),
            "openai-version": "2020-10-01",
        }
        window = account.requests
        if window.limit:
            _put(headers, "requests", window.limit, window.remaining(now), window.full_in(now))
        # The vendor's token limit is for input and output together.
        windows = [w for w in (account.input_tokens, account.output_tokens) if w.limit]
        if windows:
            _put(
                headers,
                "tokens",
                sum(w.limit or 0 for w in windows),
                sum(w.remaining(now) for w in windows),
                max(w.full_in(now) for w in windows),
            )
        return headers

    def retry_after(self, seconds: float) -> dict[str, str]:
        return {"retry-after": whole_seconds(seconds), "retry-after-ms": f"{math.ceil(seconds * 1e6) / 1e3:.3f}"}

    def models(self, models: tuple[str, ...]) -> bytes:
        return _json({"object": "list", "data": [_model(model) for model in models]})

    def model(self, model: str) -> bytes:
        return _json(_model(model))


@lru_cache(maxsize=1024)
def organization(owner: str) -> str:
    """A stable id for an organisation, which is the key's own unless it was given to one."""
    return "org-" + hashlib.sha256(owner.encode("utf-8", "replace")).hexdigest()[:24]


def go_duration(seconds: float) -> str:
    """Seconds as Go prints a duration, rounded up to a millisecond: ``17ms``, ``1.5s``, ``6m0s``, ``1h0m0s``."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if milliseconds <= 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _put(headers: dict[str, str], name: str, limit: int, remaining: int, reset: float) -> None:
    headers["x-ratelimit-limit-" + name] = str(limit)
    headers["x-ratelimit-remaining-" + name] = str(remaining)
    headers["x-ratelimit-reset-" + name] = go_duration(reset)


def _invalid(message: str, param: str | None = None, code: str | None = None) -> Problem:
    return Problem(400, "invalid_request_error", message, code, param)


def _call(block: Block) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.text}}


def _check_calls(messages: list[Any]) -> Problem | None:
    """What the vendor objects to in calls and results: each call is answered, and nothing else is."""
    open_ones: set[str] = set()
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            if message.get("tool_call_id") not in open_ones:
                return _invalid(
                    "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with "
                    "'tool_calls'.",
                    f"messages[{i}].role",
                )
            open_ones.discard(message["tool_call_id"])
            continue
        if open_ones:
            return _invalid(
                "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
                f"'tool_call_id'. Missing: {', '.join(sorted(open_ones))}",
                f"messages[{i}].role",
            )
        open_ones = {call["id"] for call in message.get("tool_calls") or ()}
        if message.get("content") is None and not open_ones and not message.get("refusal"):
            return _invalid("Invalid value for 'content': expected a string, got null.", f"messages[{i}].content")
    return None


def _check_wishes(body: dict[str, Any]) -> Problem | None:
    """What the vendor objects to in tools, effort and formats."""
    tools = body.get("tools")
    for i, tool in enumerate(tools or ()):
        if tool.get("type") == "function" and "name" not in tool.get("function", {}):
            place = f"tools[{i}].function.name"
            return _invalid(f"Missing required parameter: '{place}'.", place, "missing_required_parameter")
    if "tool_choice" in body and not tools:
        return _invalid("'tool_choice' is only allowed when 'tools' are specified.", "tool_choice")
    effort = body.get("reasoning_effort")
    if effort is not None and effort not in EFFORTS:
        return _invalid(f"Invalid value: {effort!r}.", "reasoning_effort", "invalid_value")
    model = body["model"]
    if tools and model.startswith("gpt-6"):
        return _invalid(
            f"Function tools with reasoning_effort are not supported for {model} in /v1/chat/completions. "
            "To use function tools, use /v1/responses or set reasoning_effort to 'none'.",
            "reasoning_effort",
        )
    form = body.get("response_format")
    if form is not None and form.get("type") == "json_schema" and "name" not in form.get("json_schema", {}):
        place = "response_format.json_schema.name"
        return _invalid(f"Missing required parameter: '{place}'.", place, "missing_required_parameter")
    return None


def _usage(answer: Answer) -> dict[str, Any]:
    output = answer.output_tokens
    return {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": output,
        "total_tokens": answer.input_tokens + output,
        "prompt_tokens_details": {"cached_tokens": answer.cache_read, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": answer.thought_tokens, "audio_tokens": 0},
    }


def _model(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 1_767_225_600, "owned_by": "simulator", "shutdown_date": None}
