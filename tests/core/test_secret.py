"""A key shows itself to nobody but the one who asks for it by name."""

import copy
import json
import logging
import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from llm.core.settings import KeySettings, ProviderSettings, Secret, TransportSettings

KEY = "sk-ant-api03-planted"


@pytest.fixture
def secret() -> Secret:
    return Secret(KEY)


@pytest.mark.parametrize(
    "shown",
    [
        repr,
        str,
        lambda secret: f"{secret}",
        lambda secret: f"{secret!r:>40}",
        lambda secret: f"{secret:>40}",
        lambda secret: "%s %r" % (secret, secret),  # noqa: UP031 (logging formats so)
        lambda secret: repr([{"key": secret}]),
        lambda secret: json.dumps(secret, default=str),
        lambda secret: msgspec.json.encode(secret, enc_hook=str).decode(),
        lambda secret: repr(msgspec.to_builtins(secret, enc_hook=repr)),
        lambda secret: pickle.dumps(secret).decode("latin-1"),
        lambda secret: repr(KeySettings(number=1, secret=secret, model=None)),
        lambda secret: repr(logging.makeLogRecord({"msg": "key %s", "args": (secret,)}).getMessage()),
        lambda secret: repr(hash(secret)),
    ],
)
def test_no_way_of_showing_it_shows_it(secret: Secret, shown: Callable[[Secret], str]) -> None:
    assert KEY not in shown(secret)


@pytest.mark.parametrize("encode", [json.dumps, msgspec.json.encode, msgspec.msgpack.encode])
def test_json_refuses_it_unless_told_how(secret: Secret, encode: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError) as refused:
        encode(secret)

    assert KEY not in str(refused.value)


def test_it_reveals_itself_when_asked(secret: Secret) -> None:
    assert secret.reveal() == KEY


def test_what_comes_back_from_a_pickle_is_blank(secret: Secret) -> None:
    assert pickle.loads(pickle.dumps(secret)).reveal() == "***"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_still_works(secret: Secret, duplicate: Callable[[Secret], Secret]) -> None:
    assert duplicate(secret).reveal() == KEY


def test_it_has_no_attributes_to_look_through(secret: Secret) -> None:
    assert not hasattr(secret, "__dict__")
    with pytest.raises(AttributeError):
        _ = secret.value  # type: ignore[attr-defined]


def test_equal_keys_are_equal_secrets(secret: Secret) -> None:
    assert secret == Secret(KEY)
    assert len({secret, Secret(KEY)}) == 1
    assert secret != Secret("another")
    assert secret != KEY


def test_settings_do_not_show_what_headers_and_proxies_may_hold() -> None:
    transport = TransportSettings(proxy=f"http://user:{KEY}@proxy:3128")
    provider = ProviderSettings(
        name="gateway", dialect="openai", keys=(), transport=transport, extra_headers={"x-token": KEY}
    )

    assert KEY not in repr(provider)
    assert "proxy:3128" in repr(provider)
    assert "x-token" in repr(provider)
