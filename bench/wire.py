"""Whether what we send and read is what the vendors specify: ``make wire SPECS=folder``.

The folder has the vendors' OpenAPI files, ``openai.yml`` and ``anthropic.yaml``. Every feature is asked for in every
dialect of a model of every family (``wire_corpus.py``), and how many tokens that has is asked as well; what a dialect
does not refuse is sent by the shipped transport to a server that checks requests against the specification (npm's
``@stdy/cli``), and must come back without an error. So must the golden requests and the questions that cost nothing.
Beside that, every key at any depth must be one that the specification names (``wire_schema.py``). Requests with planted
faults (``wire_plants.py``) must be found out, by one or the other. Golden answers and events must fit the
specifications of answers (``wire_answers.py``).
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml
from wire_answers import GOLDEN, Answers
from wire_corpus import NEVER, families, features, requests
from wire_plants import PLANTED_IN, PLANTS
from wire_schema import Specification

from llm.core.exceptions import LLMInvalidRequestError
from llm.core.settings import ProviderSettings, TimeoutSettings, TransportSettings
from llm.core.types import Message, Options, Request
from llm.providers.anthropic import AnthropicProvider
from llm.providers.openai import OpenAIProvider
from llm.providers.openai_responses import OpenAIResponses
from llm.transports.base import Exchange, HTTPRequest
from llm.transports.http import HTTPTransport
from llm.utils.clock import SystemClock

STEADY: Final = "@stdy/cli@0.22.2"
FILES: Final = {"openai": "openai.yml", "anthropic": "anthropic.yaml"}
VENDORS: Final = {"anthropic": "anthropic", "openai": "openai", "openai_responses": "openai"}
ADDRESSES: Final = {"anthropic": "https://api.anthropic.com", "openai": "https://api.openai.com/v1"}
"""What the paths of a specification come after: OpenAI's are without ``/v1``."""
KEY: Final = "a-key"

Dialect = AnthropicProvider | OpenAIProvider | OpenAIResponses
DIALECTS: Final[dict[str, type[Dialect]]] = {
    "anthropic": AnthropicProvider,
    "openai": OpenAIProvider,
    "openai_responses": OpenAIResponses,
}

IN_THE_MIDST: Final = (
    r"^body\.messages(\.\d+\.role|\[\d+\]): ",
    "turns of the system's are newer than the specification",
)
EXCUSED: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "anthropic": {
        "system messages in the midst": IN_THE_MIDST,
        "golden: a system message in the midst stays where the model takes it there": IN_THE_MIDST,
        "golden: a system message in the midst alone": IN_THE_MIDST,
        "golden: a null in the extra body takes a key away": ("property: max_tokens", "the caller has taken it away"),
    },
    "openai": {},
    "openai_responses": {},
}
"""What may be said against which requests, and why."""


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

    def __init__(self, vendor: str, server: str, specification: Specification, transport: HTTPTransport) -> None:
        self._vendor = ADDRESSES[vendor]
        self._server = server
        self._specification = specification
        self._transport = transport

    def knows(self, request: HTTPRequest) -> bool:
        """Whether *request* goes to the vendor itself."""
        return request.url.startswith(f"{self._vendor}/")

    async def faults(self, request: HTTPRequest) -> list[str]:
        """What the server and the specification have against *request*."""
        path = request.url.removeprefix(self._vendor)
        sent = HTTPRequest(request.method, self._server + path, request.headers, request.body)
        response = await self._transport.send(sent, Exchange())
        try:
            headers = response.headers
            await response.read()
        finally:
            response.close()
        count = int(headers.get("x-steady-error-count", "-1"))
        found = [
            f"{headers.get(f'x-steady-error-{n}-path')}: {headers.get(f'x-steady-error-{n}-message')}"
            for n in range(1, count + 1)
        ]
        if count < 0 or (count == 0 and response.status >= 300):
            found.append(f"no verdict: status {response.status}")
        return found + self._unspecified(path.partition("?")[0], request.body) if request.body else found

    def _unspecified(self, path: str, sent: bytes) -> list[str]:
        try:
            body = json.loads(sent, object_pairs_hook=_each_once)
        except ValueError as error:
            return [f"body: {error}"]
        schema = self._specification.request(path)
        if schema is None:
            return [f"{path}: nothing is sent there"]
        return [f"{place}: no such key" for place in self._specification.unknown(body, schema)]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key is there twice, of {', '.join(key for key, _ in pairs)}")
    return found


# -- what is sent ------------------------------------------------------------------------------------------------------


class Trial:
    """What is sent in one dialect, and what was found."""

    def __init__(self, dialect: str, judge: Judge) -> None:
        self.dialect = dialect
        self.sent: Counter[str] = Counter()
        self.features: Counter[str] = Counter()
        self.refused = 0
        self.excused: Counter[str] = Counter()
        self.planted = 0
        self.failures: list[str] = []
        self._judge = judge
        self._provider = DIALECTS[dialect](ProviderSettings(name=dialect, dialect=dialect, keys=()))

    async def features_and_counts(self, only: str) -> None:
        """Every feature with every family whose name holds *only*, and how many tokens each of these requests has."""
        asked = [case for case in requests(self.dialect) if only in case[0]]
        for feature, family, request in asked:
            try:
                encoded = self._provider.encode(request, KEY)
            except LLMInvalidRequestError:
                # By the one rule: told before it is sent. Whether rightly, a table test knows.
                self.refused += 1
                continue
            self.features[feature] += 1
            await self._send("features", feature, encoded.request, f", {family}")
            try:
                counted = self._provider.count_request(request, KEY)
            except LLMInvalidRequestError as error:
                self._fail([f"{feature}, {family}, is not counted: {error}"])
                continue
            await self._send("counts", feature, counted, f", {family}, counted")
        unsent = {feature for feature, _, _ in asked} - set(self.features)
        never = NEVER[self.dialect]
        self._fail(f"{name}: refused for every family" for name in sorted(unsent - never))
        self._fail(f"{name}: is sent, and was said never to be" for name in sorted(never & set(self.features)))

    async def golden(self) -> None:
        """The golden requests that go to the vendor's own address."""
        for name, case in json.loads((GOLDEN / self.dialect / "requests.json").read_text("utf-8")).items():
            said = {"name": self.dialect, "dialect": self.dialect, "keys": []} | case.get("settings", {})
            provider = DIALECTS[self.dialect](msgspec.convert(said, ProviderSettings))
            try:
                made = provider.encode(_golden(case, provider.default_model or ""), KEY).request
            except LLMInvalidRequestError:
                continue
            if self._judge.knows(made):
                await self._send("golden", f"golden: {name}", made)

    async def questions(self) -> None:
        """Those that cost nothing and have no body: whether a key works, and which models there are."""
        provider = self._provider
        await self._send("questions", "a probe", provider.probe(KEY))
        await self._send("questions", "the models", provider.models_request(KEY, None))
        await self._send("questions", "the models that follow", provider.models_request(KEY, "a-model"))

    async def plants(self) -> None:
        """Requests that are sound, each of them again with a fault."""
        for plant in PLANTS[self.dialect]:
            feature = features(self.dialect)[plant.feature]
            request = Request(feature.messages, PLANTED_IN[self.dialect], feature.options, feature.stream)
            made = self._provider.encode(request, KEY).request
            changed = copy.deepcopy(json.loads(made.body))
            plant.change(changed)
            bad = HTTPRequest(made.method, made.url, made.headers, json.dumps(changed).encode())
            if await self._judge.faults(made):
                self._fail([f"{plant.name}: what it is planted in is not sound"])
            elif await self._judge.faults(bad):
                self.planted += 1
            else:
                self._fail([f"{plant.name} was not found out"])

    def stale(self) -> None:
        """An excuse that nothing needs is a failure: it would hide one."""
        self._fail(
            f"{name}: has an excuse and needs none" for name in EXCUSED[self.dialect].keys() - self.excused.keys()
        )

    async def _send(self, kind: str, name: str, request: HTTPRequest, of: str = "") -> None:
        self.sent[kind] += 1
        pattern, _ = EXCUSED[self.dialect].get(name, (None, ""))
        faults = await self._judge.faults(request)
        grave = [fault for fault in faults if pattern is None or re.search(pattern, fault) is None]
        if faults and not grave:
            self.excused[name] += 1
        self._fail(f"{name}{of}: {fault}" for fault in grave)

    def _fail(self, found: Iterable[str]) -> None:
        self.failures += [f"{self.dialect}: {failure}" for failure in found]


def _golden(case: dict[str, Any], model: str) -> Request:
    """The request of a golden file, as ``tests/providers/corpus.py`` reads it."""
    messages = case.get("messages", [["user", "Hi"]])
    return Request(
        tuple(
            msgspec.convert(dict(zip(("role", "content", "cache"), message, strict=False)), Message)
            for message in messages
        ),
        case.get("model") or model,
        msgspec.convert(case.get("options", {}), Options),
        case.get("stream", False),
    )


# -- all of it ---------------------------------------------------------------------------------------------------------

HEAD: Final = (
    "dialect           features  families  sent  refused  counts  golden  questions  excused  faults found"
    "  answers  odd  failures"
)


async def run(specs: Path, cache: Path, only: str) -> int:
    documents = {
        vendor: yaml.load((specs / name).read_text("utf-8"), Loader=yaml.CSafeLoader) for vendor, name in FILES.items()
    }
    answers = {vendor: Answers(document) for vendor, document in documents.items()}
    command = install(cache)
    transport = HTTPTransport(TransportSettings(proxy="none"), TimeoutSettings(), clock=SystemClock(), environ={})
    failures: list[str] = []
    print(HEAD)
    with steady(command, specs / FILES["openai"]) as openai, steady(command, specs / FILES["anthropic"]) as anthropic:
        servers = {"openai": openai, "anthropic": anthropic}
        try:
            for dialect, vendor in VENDORS.items():
                judge = Judge(vendor, servers[vendor], Specification(documents[vendor]), transport)
                failures += await one(Trial(dialect, judge), answers[vendor], only)
        finally:
            await transport.close()
    for failure in failures:
        print(failure)
    return 1 if failures else 0


async def one(trial: Trial, answers: Answers, only: str) -> list[str]:
    """The failures of one dialect; a line about it is printed."""
    await trial.features_and_counts(only)
    await trial.golden()
    await trial.questions()
    await trial.plants()
    if not only:
        trial.stale()
    checked, odd, unfit = answers.judge(trial.dialect)
    sent = trial.sent
    nothing = [kind for kind in ("features", "counts", "golden", "questions") if not sent[kind]]
    failures = trial.failures + unfit + [f"{trial.dialect}: no {kind}: that is a failure" for kind in nothing]
    if not checked:
        failures.append(f"{trial.dialect}: no answers: that is a failure")
    print(
        f"{trial.dialect:<17}{len(trial.features):>9}{len(families(trial.dialect)):>10}{sent['features']:>6}"
        f"{trial.refused:>9}{sent['counts']:>8}{sent['golden']:>8}{sent['questions']:>11}{trial.excused.total():>9}"
        f"{f'{trial.planted} of {len(PLANTS[trial.dialect])}':>14}{checked:>9}{odd:>5}{len(failures):>10}"
    )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("specs", type=Path, help="the folder with openai.yml and anthropic.yaml")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "brimful-bench" / "steady")
    parser.add_argument("--only", default="", help="only features whose name holds this")
    options = parser.parse_args()
    missing = [name for name in FILES.values() if not (options.specs / name).is_file()]
    if missing:
        parser.error(f"{options.specs} has no {' and no '.join(missing)}")
    return asyncio.run(run(options.specs, options.cache, options.only))


if __name__ == "__main__":
    sys.exit(main())
