"""Whether what we send and read is what the vendors specify: ``make wire SPECS=folder``.

The folder has the vendors' OpenAPI files, ``openai.yml`` and ``anthropic.yaml``. Every feature is asked for in every
dialect of a model of every family (``wire_corpus.py``); what a dialect does not refuse is sent by the shipped transport
to a server that checks requests against the specification (npm's ``@stdy/cli``), and must come back without an error.
Beside that, every key at any depth must be one that the specification names (``wire_schema.py``). Requests with planted
faults must be found out, by one or the other. Golden replies and events must fit the specifications of answers.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012
from wire_corpus import Feature, families, features, requests
from wire_schema import Specification

from llm.core.exceptions import LLMInvalidRequestError
from llm.core.settings import ProviderSettings, TimeoutSettings, TransportSettings
from llm.core.types import Request
from llm.providers.anthropic import AnthropicProvider
from llm.providers.base import Provider
from llm.providers.openai import OpenAIProvider
from llm.providers.openai_responses import OpenAIResponses
from llm.transports.base import Exchange, HTTPRequest
from llm.transports.http import HTTPTransport
from llm.utils.clock import SystemClock

STEADY: Final = "@stdy/cli@0.22.2"
GOLDEN: Final = Path(__file__).resolve().parent.parent / "tests" / "providers" / "golden"
FILES: Final = {"openai": "openai.yml", "anthropic": "anthropic.yaml"}
DIALECTS: Final[dict[str, type[AnthropicProvider | OpenAIProvider | OpenAIResponses]]] = {
    "anthropic": AnthropicProvider,
    "openai": OpenAIProvider,
    "openai_responses": OpenAIResponses,
}
ANSWERS: Final = {
    "anthropic": ("Message", "MessageStreamEvent"),
    "openai": ("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"),
    "openai_responses": ("Response", "ResponseStreamEvent"),
}
"""The schemas of a whole answer and of one event of a stream."""


def vendor_of(dialect: str) -> str:
    return "anthropic" if dialect == "anthropic" else "openai"


def path_of(request: HTTPRequest) -> str:
    """Where the specification has the address of *request*: OpenAI's paths are without ``/v1``."""
    return request.url.removeprefix("https://api.openai.com/v1").removeprefix("https://api.anthropic.com")


# -- the server that checks --------------------------------------------------------------------------------------------


def install(cache: Path) -> Path:
    """The command ``steady``, fetched from npm's registry if need be."""
    command = cache / "node_modules" / ".bin" / "steady"
    if not command.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise SystemExit("npm is missing: it is needed for the server that checks requests")
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run([npm, "install", "--silent", "--prefix", str(cache), STEADY], check=True, cwd=cache)
    return command


@contextmanager
def steady(command: Path, specification: Path) -> Iterator[str]:
    """The address of a server for *specification*."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [str(command), "--host", "127.0.0.1", "-p", str(port), str(specification)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 60.0
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            except OSError:
                if time.monotonic() > give_up or process.poll() is not None:
                    raise SystemExit(f"the server for {specification.name} does not start") from None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


class Judge:
    """Sends requests to one vendor's server and says what is wrong with them."""

    def __init__(self, address: str, specification: Specification, transport: HTTPTransport) -> None:
        self._address = address
        self._specification = specification
        self._transport = transport

    async def faults(self, request: HTTPRequest) -> list[str]:
        """What the server and the specification have against *request*."""
        path = path_of(request)
        sent = HTTPRequest(request.method, self._address + path, request.headers, request.body)
        response = await self._transport.send(sent, Exchange())
        try:
            headers = response.headers
            await response.read()
        finally:
            response.close()
        count = headers.get("x-steady-error-count")
        found = []
        if count is None or response.status >= 300:
            found.append(f"no verdict: status {response.status}")
        elif count != "0":
            found += [
                f"{headers.get(f'x-steady-error-{n}-path')}: {headers.get(f'x-steady-error-{n}-message')}"
                for n in range(1, int(count) + 1)
            ]
        body = json.loads(request.body)
        found += [
            f"{place}: no such key" for place in self._specification.unknown(body, self._specification.request(path))
        ]
        return found


# -- planted faults ----------------------------------------------------------------------------------------------------


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


# -- golden answers ----------------------------------------------------------------------------------------------------

ODD: Final[dict[str, dict[str, str]]] = {
    "anthropic": dict.fromkeys(
        (
            "nulls",
            "figures_that_are_none",
            "usage that cannot be read",
            "usage of the output alone",
            "usage of the input alone",
            "no usage",
            "no content",
            "unknown blocks",
            "unknown_events_and_blocks",
            "data_in_two_lines",
            "data_alone",
        ),
        "wrong or incomplete on purpose",
    )
    | dict.fromkeys(
        (
            "stop reason model_context_window_exceeded",
            "stop_model_context_window_exceeded",
            "stop reason compaction",
            "stop_compaction",
        ),
        "a reason that is newer than the specification",
    ),
    "openai": dict.fromkeys(
        (
            "nulls",
            "figures_that_are_none",
            "usage that cannot be read",
            "no message",
            "further answers",
            "stop reason mystery",
            "stop_mystery",
            "stop reason None",
            "unknown_fields",
        ),
        "wrong or incomplete on purpose",
    )
    | dict.fromkeys(
        (
            "parts",
            "stop reason eos",
            "stop_eos",
            "stop reason model_length",
            "stop_model_length",
            "tool_calls_without_index_gemini",
            "tool_calls_without_ids",
            "tool calls without ids, with arguments that are no text",
        ),
        "another server's, which only resembles the vendor's",
    ),
    "openai_responses": dict.fromkeys(
        (
            "nulls",
            "figures_that_are_none",
            "usage that cannot be read",
            "usage without its parts",
            "incomplete by mystery",
            "unknown_events",
        ),
        "wrong or incomplete on purpose",
    ),
}
"""Golden answers that need not fit, each with its reason."""

NEWER: Final = {("anthropic", "system messages in the midst"): "turns of the system's are newer than the specification"}
"""Features of which requests need not fit, each with its reason (WIRE: only some models take such turns)."""


class Answers:
    """Checks answers against a vendor's specification of them."""

    def __init__(self, document: dict[str, Any]) -> None:
        resource = Resource.from_contents(_with_nulls(document), default_specification=DRAFT202012)
        self._registry: Registry[Any] = Registry().with_resource("urn:spec", resource)

    def complaint(self, schema: str, value: Any) -> str | None:
        """The first thing that is wrong with *value*, None if nothing is."""
        validator = Draft202012Validator({"$ref": f"urn:spec#/components/schemas/{schema}"}, registry=self._registry)
        errors = sorted(validator.iter_errors(value), key=lambda error: len(error.path))
        if not errors:
            return None
        return f"{'/'.join(map(str, errors[0].path))}: {errors[0].message[:150]}"


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


def golden(dialect: str) -> Iterator[tuple[str, str, Any]]:
    """Name, schema and value of every golden answer and event that is the vendor's own and no error."""
    whole, event = ANSWERS[dialect]
    for name, case in json.loads((GOLDEN / dialect / "replies.json").read_text("utf-8")).items():
        if "error" not in case["expect"] and "settings" not in case and name not in ODD[dialect]:
            yield name, whole, case["body"]
    for name, case in json.loads((GOLDEN / dialect / "streams.json").read_text("utf-8")).items():
        if case["expect"]["error"] is not None or "settings" in case or name in ODD[dialect]:
            continue
        for data in _payloads((GOLDEN / dialect / "streams" / f"{name}.sse").read_text("utf-8-sig")):
            yield name, event, json.loads(data)


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


# -- all of it ---------------------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """What was sent of one dialect."""

    sent: int
    refused: int
    excused: int
    features: int
    families: int
    planted: int
    answers: int
    failures: list[str]


async def judge(dialect: str, judges: dict[str, Judge], answers: dict[str, Answers], only: str | None) -> Count:
    provider: Provider = DIALECTS[dialect](ProviderSettings(name=dialect, dialect=dialect, keys=()))
    failures: list[str] = []
    sent: Counter[str] = Counter()
    refused = excused = 0
    for feature, family, request in requests(dialect):
        if only is not None and only not in feature:
            continue
        try:
            encoded = provider.encode(request, "a-key")
        except LLMInvalidRequestError:
            # By the one rule: told before it is sent. Whether rightly, a table test knows.
            refused += 1
            continue
        faults = await judges[vendor_of(dialect)].faults(encoded.request)
        sent[feature] += 1
        if (dialect, feature) in NEWER:
            excused += bool(faults)
            continue
        failures += [f"{dialect}: {feature}, {family}: {fault}" for fault in faults]
    planted = 0
    for plant in PLANTS[dialect]:
        made = provider.encode(_request(features(dialect)[plant.feature], PLANTED_IN[dialect]), "a-key").request
        body = json.loads(made.body)
        changed = copy.deepcopy(body)
        plant.change(changed)
        bad = HTTPRequest(made.method, made.url, made.headers, json.dumps(changed).encode())
        if await judges[vendor_of(dialect)].faults(bad):
            planted += 1
        else:
            failures.append(f"{dialect}: {plant.name} was not found out")
    checked = 0
    for name, schema, value in golden(dialect):
        checked += 1
        complaint = answers[vendor_of(dialect)].complaint(schema, _as_specified(value))
        if complaint is not None:
            failures.append(f"{dialect}: golden {name}: {complaint}")
    return Count(sent.total(), refused, excused, len(sent), len(families(dialect)), planted, checked, failures)


def _request(feature: Feature, model: str) -> Request:
    return Request(feature.messages, model, feature.options, feature.stream)


async def run(specs: Path, cache: Path, only: str | None) -> int:
    documents = {
        vendor: yaml.load((specs / name).read_text("utf-8"), Loader=yaml.CSafeLoader) for vendor, name in FILES.items()
    }
    answers = {vendor: Answers(document) for vendor, document in documents.items()}
    command = install(cache)
    transport = HTTPTransport(TransportSettings(proxy="none"), TimeoutSettings(), clock=SystemClock(), environ={})
    counts: dict[str, Count] = {}
    with steady(command, specs / FILES["openai"]) as openai, steady(command, specs / FILES["anthropic"]) as anthropic:
        addresses = {"openai": openai, "anthropic": anthropic}
        judges = {
            vendor: Judge(addresses[vendor], Specification(document), transport)
            for vendor, document in documents.items()
        }
        try:
            for dialect in DIALECTS:
                counts[dialect] = await judge(dialect, judges, answers, only)
        finally:
            await transport.close()
    print("dialect            sent  refused  excused  features  families  faults found  answers checked  failures")
    for dialect, count in counts.items():
        found = f"{count.planted} of {len(PLANTS[dialect])}"
        print(
            f"{dialect:<17}{count.sent:>6}{count.refused:>9}{count.excused:>9}{count.features:>10}{count.families:>10}"
            f"{found:>14}{count.answers:>17}{len(count.failures):>10}"
        )
    failures = [failure for count in counts.values() for failure in count.failures]
    for failure in failures:
        print(failure)
    if not all(count.sent for count in counts.values()):
        print("nothing was sent in some dialect: that is a failure")
        return 1
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("specs", type=Path, help="the folder with openai.yml and anthropic.yaml")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "brimful-bench" / "steady")
    parser.add_argument("--only", help="features whose name holds this")
    options = parser.parse_args()
    missing = [name for name in FILES.values() if not (options.specs / name).is_file()]
    if missing:
        parser.error(f"{options.specs} has no {' and no '.join(missing)}")
    return asyncio.run(run(options.specs, options.cache, options.only))


if __name__ == "__main__":
    sys.exit(main())
