"""Secrets: planted wherever one can be configured, echoed in every form by the vendor, and looked for everywhere."""

from __future__ import annotations

import asyncio
import base64
import copy
import html
import json
import logging
import pickle
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import pytest

import llm
from llm import LLMClient, LLMConfigurationError, LLMException, LLMManager
from llm.core.events import CallStarted
from llm.testing.clock import FakeClock
from llm.testing.transport import Answer, Scripted, ScriptedTransport
from llm.transports.base import HTTPRequest
from tests.core.rig import JSON, SSE, answer, delta, is_probe

SECRETS = {
    # With characters that are written differently in JSON, in HTML and in a URL.
    "literal": "sk-planted-LITERAL/aB+cD&eF==0001",
    "variable": "sk-planted-VARIABLE-Zz9Yy8Xx7Ww6-0002",
    "file": "sk-planted-FILE-Vv5Uu4Tt3Ss2-0003",
    "header": "gw-planted-HEADER-Rr1Qq0Pp9Oo8-0004",
    "call header": "gw-planted-CALL-Nn7Mm6Ll5Kk4-0005",
    "proxy": "pw-planted-PROXY-Jj3Ii2Hh1Gg0-0006",
}


# ---------------------------------------------------------------- looking


def forms(secret: str) -> dict[str, str]:
    """How a secret may be written: as it is, encoded, and in parts long enough to be of use."""
    return {
        "plain": secret,
        "beginning": secret[:20],
        "end": secret[-12:],
        "url": quote(secret, safe=""),
        "json": secret.replace("/", "\\/"),
        "html": html.escape(secret),
        "base64": base64.b64encode(secret.encode()).decode().rstrip("="),
        "bearer in base64": base64.b64encode(f"Bearer {secret}".encode()).decode().rstrip("="),
        "basic": base64.b64encode(f"user:{secret}".encode()).decode().rstrip("="),
        "reversed": secret[::-1],
    }


NEEDLES = [(f"{name}, {form}", text) for name, secret in SECRETS.items() for form, text in forms(secret).items()]


def leaks(surface: str, text: str) -> list[str]:
    """What of the secrets *text* shows."""
    return [f"{surface}: {name}" for name, needle in NEEDLES if needle in text]


def shown(thing: object) -> Iterator[tuple[str, str]]:
    """All the ways in which a thing is shown, by a debugger, a log, a dump or a tracker."""
    yield "repr", repr(thing)
    yield "str", str(thing)
    yield "format", f"{thing}"
    yield "collection", f"{[thing]} { {'x': thing} }"
    yield "attributes", repr(getattr(thing, "__dict__", {}))
    for name in getattr(type(thing), "__slots__", ()) or getattr(type(thing), "__struct_fields__", ()):
        yield f"slot {name}", repr(getattr(thing, name, None))
    dumps: list[tuple[str, Callable[[], str]]] = [
        ("copy", lambda: repr(copy.copy(thing))),
        ("pickle", lambda: pickle.dumps(thing).decode("latin-1")),
        ("json", lambda: json.dumps(thing, default=repr)),
        ("msgspec", lambda: msgspec.json.encode(thing, enc_hook=repr).decode()),
        ("builtins", lambda: repr(msgspec.to_builtins(thing, enc_hook=repr))),
    ]
    for name, dump in dumps:
        try:
            yield name, dump()
        except Exception as error:
            yield f"{name} refused", str(error)


DUMPS = ("pickle", "json", "msgspec", "builtins")


def told(error: BaseException) -> Iterator[tuple[str, str]]:
    """An exception and its whole chain, as error trackers send them: with the local variables of every frame."""
    yield "traceback", "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    chain: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        found = queue.pop()
        if found is not None and found not in chain:
            chain.append(found)
            queue += [found.__cause__, found.__context__]
            yield from shown(found)
            yield "args", repr(found.args)
            yield "fields", repr(vars(found))
            for frame, _ in traceback.walk_tb(found.__traceback__):
                if "tests" not in Path(frame.f_code.co_filename).parts:
                    yield f"locals of {frame.f_code.co_qualname}", repr(list(frame.f_locals.values()))


class Records(logging.Handler):
    """Every record of every logger, formatted as a handler might, with everything that hangs on it."""

    def __init__(self) -> None:
        super().__init__(level=1)
        self.texts: list[str] = []
        self.levels: set[int] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.levels.add(record.levelno)
        self.texts += [record.getMessage(), repr(record.args), repr(vars(record)), self.format(record)]
        if record.exc_info and record.exc_info[1] is not None:
            self.texts += [text for _, text in told(record.exc_info[1])]


@pytest.fixture
def records() -> Iterator[Records]:
    root = logging.getLogger()
    handler, levels = (
        Records(),
        {name: logging.getLogger(name).level for name in ("brimful", "asyncio", "aiohttp", None)},
    )
    root.addHandler(handler)
    for name in levels:
        logging.getLogger(name).setLevel(1)
    yield handler
    root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


# ---------------------------------------------------------------- planting


class World(NamedTuple):
    manager: LLMManager
    client: LLMClient
    clock: FakeClock
    events: Any

    def surfaces(self) -> Iterator[tuple[str, str]]:
        manager = self.manager
        for thing in (manager, self.client, manager.events):
            yield from shown(thing)
        settings = manager.settings
        for provider in settings.providers.values():
            parts: list[object] = [settings, provider, *provider.keys, provider.transport, provider.pool]
            for part in parts:
                for surface, text in shown(part):
                    # Of the configuration's own values: asked for by name, or written out on purpose, headers and
                    # the proxy are what they are. A key is a Secret and is not.
                    if surface in DUMPS or surface in ("slot extra_headers", "slot proxy"):
                        for name in ("header", "proxy"):
                            for needle in forms(SECRETS[name]).values():
                                text = text.replace(needle, "")
                    yield surface, text
        for line in manager._lines.values():
            for part in (*line, *line.pool.keys, *line.layers):
                yield "part", repr(part)
        status = manager.get_status()
        yield "status", repr(status)
        yield "status as JSON", json.dumps(status)
        for event in self.events.drain():
            yield from shown(event)


def echoes(request: HTTPRequest, form: Callable[[str], str]) -> str:
    """Everything that was sent, as *form* writes it; the proxy's as a proxy would that sees it."""
    sent = [*request.headers.values(), *(value.removeprefix("Bearer ") for value in request.headers.values())]
    password = SECRETS["proxy"]
    sent += [password, "Basic " + base64.b64encode(f"user:{password}".encode()).decode()]
    return " ".join(map(form, sent))


FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "url": lambda text: quote(text, safe=""),
    "html": html.escape,
    "json": lambda text: text.replace("/", "\\/"),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
}


def written(echo: str, document: object) -> bytes:
    """*document* as JSON, with *echo* as it is in the place of ``@``."""
    return json.dumps(document).replace("@", echo).encode()


def as_json(status: int) -> Callable[[str], Answer]:
    def reply(echo: str) -> Answer:
        error = {"message": "bad key @", "type": "@", "code": "@", "param": "@"}
        headers = JSON | {"x-request-id": echo, "retry-after": echo, "www-authenticate": echo}
        return Scripted(status, headers, written(echo, {"error": error, "request_id": "@"}))

    return reply


SHAPES: dict[str, Callable[[str], Answer]] = {
    **{f"{status} as JSON": as_json(status) for status in (400, 401, 402, 403, 404, 413, 422, 429, 500, 503, 529, 302)},
    "an error under 200": as_json(200),
    "an array": lambda echo: Scripted(500, JSON, written(echo, [{"error": {"message": "@", "status": "@"}}])),
    "a detail": lambda echo: Scripted(422, JSON, written(echo, {"detail": [{"loc": ["@"], "msg": "@"}]})),
    "plain text": lambda echo: Scripted(500, {"content-type": "text/plain"}, echo.encode()),
    "a page": lambda echo: Scripted(502, {"content-type": "text/html"}, f"<title>{echo}</title><p>{echo}".encode()),
    "a page that is cut": lambda echo: Scripted(502, {}, f"<title>{'x' * 475}{echo}</title>".encode()),
    "a text that is cut": lambda echo: Scripted(500, {}, f"{'x' * 2020} {echo}".encode()),
    "a body that is cut": lambda echo: Scripted(500, {}, f"{'x' * (65536 - 30)}{echo}".encode()),
    "broken JSON": lambda echo: Scripted(200, JSON, b'{"choices": "' + echo.encode() + b'"'),
    "wrong JSON": lambda echo: Scripted(200, JSON, written(echo, {"choices": "@", "model": {"@": 1}})),
    "an error in a stream": lambda echo: Scripted(
        200,
        SSE,
        pieces=(delta("hi"), b"data: " + written(echo, {"error": {"message": "@", "code": "@"}}) + b"\n\n"),
    ),
    "an event that is no JSON": lambda echo: Scripted(200, SSE, pieces=(delta("hi"), f"data: {echo}\n\n".encode())),
    "a stream that says it and is cut": lambda echo: Scripted(
        200, SSE, pieces=(delta("your key is @").replace(b"@", echo.encode()), b"")
    ),
    "a stream that is lost": lambda echo: Scripted(
        200, SSE, pieces=(delta("hi"), llm.LLMConnectionError("lost", sent=True))
    ),
    "a connection that is lost": lambda echo: llm.LLMConnectionError("lost", sent=True),
    "nothing in time": lambda echo: Scripted(delay=1e6),
    "a fault of the transport's": lambda echo: ValueError("no error of ours"),
}


@pytest.fixture
def configured(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A file that holds one key, names the file of another, and an environment with the third."""
    (tmp_path / "key").write_text(SECRETS["file"] + "\n")
    (tmp_path / "key").chmod(0o600)
    config = tmp_path / "llm.yaml"
    config.write_text(
        json.dumps(
            {
                "providers": {
                    "vendor": {
                        "dialect": "openai",
                        "base_url": "http://vendor.test/v1",
                        "models": "m",
                        "api_keys": [SECRETS["literal"], "${PLANTED}", "file:key"],
                        "extra_headers": {"X-Gateway-Token": SECRETS["header"]},
                        "transport": {"proxy": f"http://user:{SECRETS['proxy']}@proxy.test:3128"},
                    }
                },
            }
        )
    )
    config.chmod(0o600)
    return config, {"PLANTED": SECRETS["variable"], "OPENAI_API_KEY": SECRETS["variable"]}


def build(configured: tuple[Path, dict[str, str]], reply: Callable[[HTTPRequest], Answer]) -> World:
    clock = FakeClock()
    manager = LLMManager.from_config(
        configured[0],
        environ=configured[1],
        clock=clock,
        random=lambda: 0.0,
        transport=lambda settings, clock: ScriptedTransport(reply, clock=clock),
    )
    return World(manager, manager.get_client(), clock, manager.events.subscribe())


def call_headers() -> dict[str, str]:
    return {"X-Api-Token": SECRETS["call header"]}


async def asked(client: LLMClient) -> object:
    return await client.complete("hello", extra_headers=call_headers(), timeout=500.0)


async def read(client: LLMClient) -> object:
    async with client.stream_complete("hello", extra_headers=call_headers(), timeout=500.0) as stream:
        # What the model says is the reader's, and no local of this frame.
        while await anext(stream, None) is not None:
            pass
    return stream


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
async def test_no_surface_shows_a_secret_whatever_the_vendor_echoes(
    configured: tuple[Path, dict[str, str]], records: Records, shape: str, form: str
) -> None:
    """Calls of both kinds with each of the keys fail; then everything that can be seen is searched."""
    asyncio.get_running_loop().set_debug(True)

    def reply(request: HTTPRequest) -> Answer:
        echo = echoes(request, FORMS[form])
        return Scripted(401, body=echo.encode()) if is_probe(request) else SHAPES[shape](echo)

    world = await asyncio.to_thread(build, configured, reply)
    found: list[str] = []
    kinds: list[Callable[[LLMClient], Awaitable[object]]] = [asked, read]
    async with world.manager:
        for _ in range(3):
            for kind in kinds:
                task = asyncio.ensure_future(kind(world.client))
                while not task.done():
                    await world.clock.settle()
                    if not task.done():
                        await world.clock.advance(10.0)
                error = task.exception()
                assert error is not None, task.result()
                found += [leak for surface, text in told(error) for leak in leaks(surface, text)]
                found += [leak for surface, text in shown(task) for leak in leaks(f"task {surface}", text)]
        await world.clock.advance(100.0)
        found += [leak for surface, text in world.surfaces() for leak in leaks(surface, text)]
    found += [leak for text in records.texts for leak in leaks("log", text)]
    assert records.levels >= {logging.DEBUG, logging.ERROR}
    assert sorted(set(found)) == []


async def test_no_surface_shows_a_secret_when_all_goes_well(
    configured: tuple[Path, dict[str, str]], records: Records
) -> None:
    def reply(request: HTTPRequest) -> Answer:
        if b'"stream":true' not in request.body:
            return answer()
        return Scripted(200, SSE, pieces=(delta("hi"), b"data: [DONE]\n\n"))

    world = await asyncio.to_thread(build, configured, reply)
    found: list[str] = []
    async with world.manager:
        for thing in [await asked(world.client), await read(world.client)]:
            found += [leak for surface, text in shown(thing) for leak in leaks(surface, text)]
        pending = world.client.stream_complete("hello")
        found += [leak for surface, text in shown(pending) for leak in leaks(surface, text)]
        found += [leak for surface, text in world.surfaces() for leak in leaks(surface, text)]
    found += [leak for text in records.texts for leak in leaks("log", text)]
    assert sorted(set(found)) == []


def wrong(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        at = config
        *parents, last = path.split(".")
        for name in parents:
            at = at[name]
        at[last] = value

    return change


VENDOR = "providers.vendor."
WRONG = {
    "a key twice": wrong(VENDOR + "api_keys", [SECRETS["literal"], SECRETS["literal"]]),
    "a key with a line break": wrong(VENDOR + "api_keys", [SECRETS["literal"] + "\nx"]),
    "a key that is no text": wrong(VENDOR + "api_keys", [{SECRETS["literal"]: SECRETS["file"]}]),
    "a key in a deeper list": wrong(VENDOR + "api_keys", [[SECRETS["literal"]]]),
    "a header with a line break": wrong(VENDOR + "extra_headers", {"X-Token": SECRETS["header"] + "\r\nx"}),
    "a header that is a list": wrong(VENDOR + "extra_headers", {"X-Token": [SECRETS["header"]]}),
    "a password in the address": wrong(VENDOR + "base_url", f"http://user:{SECRETS['proxy']}@vendor.test"),
    "a proxy of an unknown kind": wrong(VENDOR + "transport", {"proxy": f"gopher://user:{SECRETS['proxy']}@p.test"}),
    "a proxy with a wrong port": wrong(VENDOR + "transport", {"proxy": f"http://user:{SECRETS['proxy']}@p.test:x"}),
    "a variable that is not set": wrong(VENDOR + "api_keys", ["${NOT_SET}" + SECRETS["literal"]]),
    "an unknown word": wrong(VENDOR + "api_kyes", [SECRETS["literal"]]),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_the_configuration_is_told_without_its_secrets(
    configured: tuple[Path, dict[str, str]], records: Records, mistake: str
) -> None:
    path, environ = configured
    config = json.loads(path.read_text())
    WRONG[mistake](config)
    path.write_text(json.dumps(config))
    error = load(path, environ)
    assert error is not None
    found = [leak for surface, text in told(error) if surface != "traceback" for leak in leaks(surface, text)]
    found += leaks("traceback", "".join(traceback.format_exception(error)))
    found += [leak for text in records.texts for leak in leaks("log", text)]
    assert [leak for leak in found if not leak.startswith("locals of")] == []


def load(path: Path, environ: dict[str, str]) -> LLMConfigurationError | None:
    try:
        LLMManager.from_config(path, environ=environ)
    except LLMConfigurationError as error:
        return error
    return None


# ---------------------------------------------------------------- and it would be found


def leaky_frame(key: str) -> LLMException:
    def send() -> None:
        headers = {"authorization": f"Bearer {key}"}
        raise LLMException(f"failed with {len(headers)} headers")

    try:
        send()
    except LLMException as error:
        return error
    raise AssertionError


def with_cause(key: str, *, context: bool) -> LLMException:
    try:
        try:
            raise ValueError(key)
        except ValueError as cause:
            if context:
                raise LLMException("failed")  # noqa: B904
            raise LLMException("failed") from cause
    except LLMException as error:
        return error


def logged(write: Callable[[logging.Logger], object]) -> list[tuple[str, str]]:
    handler, logger = Records(), logging.getLogger("planted")
    logger.addHandler(handler)
    logger.setLevel(1)
    logger.propagate = False
    try:
        write(logger)
    finally:
        logger.removeHandler(handler)
    return [("log", text) for text in handler.texts]


def log_exception(logger: logging.Logger, key: str) -> None:
    try:
        raise leaky_frame(key)
    except LLMException:
        logger.debug("failed", exc_info=True)


KEY = SECRETS["literal"]
PLANTED: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
    "a message": lambda: told(LLMException(f"bad key {KEY}")),
    "a code": lambda: told(LLMException("no", code=KEY)),
    "a request id": lambda: told(LLMException("no", request_id=KEY)),
    "a body": lambda: told(LLMException("no", body=KEY.encode())),
    "partial text": lambda: told(LLMException("no", partial=KEY)),
    "a local variable": lambda: told(leaky_frame(KEY)),
    "a cause": lambda: told(with_cause(KEY, context=False)),
    "a context": lambda: told(with_cause(KEY, context=True)),
    "a repr": lambda: shown(llm.Message(llm.MessageRole.USER, KEY)),
    "an event": lambda: shown(CallStarted(at=0.0, provider="p", model=KEY, stream=False)),
    "a warning": lambda: shown(
        llm.LLMResponse(text="", model="m", usage=llm.Usage(), stop_reason=llm.StopReason.STOP, warnings=(KEY,))
    ),
    "a log message": lambda: logged(lambda logger: logger.debug("sent %s", KEY)),
    "a record's extra": lambda: logged(lambda logger: logger.info("sent", extra={"header": KEY})),
    "a record's exception": lambda: logged(lambda logger: log_exception(logger, KEY)),
    "an attribute": lambda: shown(
        type("Thing", (), {"__repr__": lambda self: "<Thing>", "__init__": lambda self: setattr(self, "x", KEY)})()
    ),
    "a pickle": lambda: shown(llm.Options(extra_headers={"x": KEY})),
}


@pytest.mark.parametrize("form", forms(KEY))
def test_a_leak_in_any_form_is_found(form: str) -> None:
    assert leaks("text", f"… {forms(KEY)[form]} …")


@pytest.mark.parametrize("where", PLANTED)
def test_a_planted_leak_is_found(where: str) -> None:
    assert [leak for surface, text in PLANTED[where]() for leak in leaks(surface, text)]
