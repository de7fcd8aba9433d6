"""TLS: whom we trust, which certificate we show, and how it ends."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from pathlib import Path
from typing import Any

import pytest

from llm.core.exceptions import LLMConfigurationError, LLMConnectionError
from llm.core.settings import TransportSettings
from llm.transports.base import Exchange
from llm.transports.tls import tls_context
from tests.transports.authority import Authority
from tests.transports.server import CHUNKED, Peer, ask, http, post, serve, talking, until


async def test_a_custom_authority_is_trusted_and_connections_are_kept(authority: Authority) -> None:
    async with talking(tls=authority.server(), ca_file=authority.ca_file) as (transport, server):
        for reused in (False, True):
            exchange = Exchange()
            assert await ask(transport, server.url, exchange) == b"ok"
            assert (exchange.reused, exchange.written, exchange.started) == (reused, True, True)
        assert server.connections == 1


@pytest.mark.parametrize(("names", "trusted"), [((), False), (("other.test",), True)])
async def test_a_certificate_that_is_not_to_be_trusted_is_final_and_says_so(
    authority: Authority, names: tuple[str, ...], trusted: bool
) -> None:
    exchange = Exchange(lambda: pytest.fail("there was no connection"))
    settings: dict[str, Any] = {"ca_file": authority.ca_file} if trusted else {}
    async with talking(tls=authority.server(names[0] if names else "127.0.0.1"), **settings) as (transport, server):
        with pytest.raises(LLMConnectionError, match=r"certificate of 127\.0\.0\.1:\d+ is not to be trusted") as caught:
            await transport.send(post(server.url), exchange)
        assert not caught.value.retryable
        assert not caught.value.sent
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)


@pytest.mark.parametrize("files", ["one", "two"])
async def test_a_client_certificate_is_shown(authority: Authority, files: str) -> None:
    settings: dict[str, Any] = {"client_cert": authority.client_file}
    if files == "two":
        settings = {"client_cert": authority.cert_file, "client_key": authority.key_file}
    tls = authority.server(client_required=True)
    async with talking(tls=tls, ca_file=authority.ca_file, **settings) as (transport, server):
        assert await ask(transport, server.url) == b"ok"


async def test_without_the_client_certificate_the_call_fails_as_a_connection(authority: Authority) -> None:
    tls = authority.server(client_required=True)
    async with talking(tls=tls, ca_file=authority.ca_file) as (transport, server):
        # TLS 1.3 lets the client believe that all is well until it reads.
        with pytest.raises(LLMConnectionError, match="127.0.0.1"):
            await ask(transport, server.url)


async def test_plain_http_on_the_other_side_is_no_tls(authority: Authority) -> None:
    async def plain(peer: Peer) -> None:
        await peer.reader.read(1)
        peer.answer(status="400 Bad Request")

    async with serve(plain) as server:
        transport = http(ca_file=authority.ca_file)
        with pytest.raises(LLMConnectionError, match="no TLS with") as caught:
            await transport.send(post(f"https://127.0.0.1:{server.port}/"), Exchange())
        assert not caught.value.retryable
        assert not caught.value.sent
        await transport.close()


async def test_a_close_that_the_blocked_loop_has_not_seen_is_noticed_under_tls_too(authority: Authority) -> None:
    async with talking(tls=authority.server(), ca_file=authority.ca_file) as (transport, server):
        await ask(transport, server.url)
        for _ in range(10):
            await asyncio.sleep(0)
        server.peers[0].hang_up_unseen()
        exchange = Exchange()
        assert await ask(transport, server.url, exchange) == b"ok"
        assert exchange.reused is False


async def test_cancelling_under_tls_does_not_wait_for_a_goodbye(authority: Authority) -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.send(CHUNKED)
        await peer.gone()

    async with talking(handler, tls=authority.server(), ca_file=authority.ca_file) as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        task = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: transport.statistics()["open"] == 0)
        async with asyncio.timeout(1.0):
            await server.peers[0].lost.wait()


async def test_closing_under_tls_leaves_no_socket(authority: Authority) -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        if peer.number % 2:
            peer.answer()
        await peer.gone()

    async with talking(handler, tls=authority.server(), ca_file=authority.ca_file) as (transport, server):
        tasks = [asyncio.create_task(ask(transport, server.url)) for _ in range(10)]
        await until(lambda: sum(task.done() for task in tasks) == 5)
        await transport.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(result, LLMConnectionError) for result in results) == 5
        assert transport.statistics()["open"] == 0


async def test_a_long_compressed_answer_under_tls_arrives_whole(authority: Authority) -> None:
    text = b"".join(b"data: %d\n\n" % number for number in range(200_000))

    async def handler(peer: Peer) -> None:
        await peer.request()
        peer.answer(gzip.compress(text), headers=b"content-encoding: gzip\r\n")
        await peer.gone()

    async with talking(handler, tls=authority.server(), ca_file=authority.ca_file) as (transport, server):
        assert await ask(transport, server.url) == text


@pytest.mark.parametrize("setting", ["ca_file", "client_cert", "client_key"])
@pytest.mark.parametrize("content", [None, "no certificate", ""])
def test_a_file_that_cannot_be_used_is_named_with_its_setting(
    authority: Authority, tmp_path: Path, setting: str, content: str | None
) -> None:
    path = tmp_path / "wrong.pem"
    if content is not None:
        path.write_text(content)
    settings: dict[str, Any] = {"client_cert": authority.cert_file} if setting == "client_key" else {}
    with pytest.raises(LLMConfigurationError, match=rf"transport\.{setting}: .*wrong\.pem"):
        http(**{**settings, setting: str(path)})


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(authority: Authority, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(authority.key_file).read_bytes(), None)
    path = tmp_path / "encrypted.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(LLMConfigurationError, match=r"transport\.client_key"):
        http(client_cert=authority.cert_file, client_key=str(path))


def test_a_key_without_its_certificate_is_a_mistake(authority: Authority) -> None:
    with pytest.raises(LLMConfigurationError, match="client_cert"):
        http(client_key=authority.key_file)


def test_without_files_of_its_own_it_trusts_whom_the_system_trusts() -> None:
    assert tls_context(TransportSettings()) is True
