"""Which proxy, by the environment; and what then goes over the wire."""

from __future__ import annotations

import asyncio
import base64
import contextlib

import pytest

from llm.core.exceptions import LLMConfigurationError, LLMConnectionError
from llm.transports.base import Exchange
from llm.transports.proxies import ProxyRules
from tests.transports.authority import Authority
from tests.transports.server import Peer, answering, ask, http, post, serve

PROXY = "http://proxy.test:3128"


@pytest.mark.parametrize(
    ("no_proxy", "host", "port", "direct"),
    [
        ("", "api.vendor.test", 443, False),
        ("*", "api.vendor.test", 443, True),
        ("other.test, *", "api.vendor.test", 443, True),
        ("api.vendor.test", "api.vendor.test", 443, True),
        ("API.Vendor.TEST", "api.vendor.test", 443, True),
        ("vendor.test", "API.vendor.test.", 443, True),
        ("vendor.test", "evilvendor.test", 443, False),
        (".vendor.test", "api.vendor.test", 443, True),
        (".vendor.test", "vendor.test", 443, True),
        ("*.vendor.test", "api.vendor.test", 443, True),
        ("vendor.test:443", "api.vendor.test", 443, True),
        ("vendor.test:8443", "api.vendor.test", 443, False),
        ("one.test two.test,vendor.test", "vendor.test", 443, True),
        ("10.0.0.0/8", "10.1.2.3", 443, True),
        ("10.0.0.0/8", "11.1.2.3", 443, False),
        ("10.1.2.3/8", "10.9.9.9", 443, True),
        ("10.0.0.0/8", "10.vendor.test", 443, False),
        ("10.0.0.0/8:8443", "10.1.2.3", 8443, True),
        ("10.0.0.0/8:8443", "10.1.2.3", 443, False),
        ("127.0.0.1", "127.0.0.1", 80, True),
        ("127.0.0.1:81", "127.0.0.1", 80, False),
        ("127.0.0.0/8", "::ffff:127.0.0.1", 80, True),
        ("fd00::/8", "fd12::1", 443, True),
        ("::1", "::1", 443, True),
        ("[::1]:443", "::1", 443, True),
        ("[::1]:80", "::1", 443, False),
        ("fd00::/8", "10.1.2.3", 443, False),
        ("0.0", "10.0.0.0", 443, False),
    ],
)
def test_no_proxy_exempts_names_suffixes_ports_and_networks(no_proxy: str, host: str, port: int, direct: bool) -> None:
    rules = ProxyRules.of("environment", {"ALL_PROXY": PROXY, "NO_PROXY": no_proxy})
    assert rules.proxy_for("https", host, port) == (None if direct else PROXY)


@pytest.mark.parametrize(
    ("environ", "https", "plain"),
    [
        ({}, None, None),
        ({"HTTPS_PROXY": "http://a:1"}, "http://a:1", None),
        ({"HTTP_PROXY": "http://a:1"}, None, "http://a:1"),
        ({"ALL_PROXY": "http://a:1"}, "http://a:1", "http://a:1"),
        ({"ALL_PROXY": "http://a:1", "HTTPS_PROXY": "http://b:2"}, "http://b:2", "http://a:1"),
        ({"HTTPS_PROXY": "http://a:1", "https_proxy": "http://b:2"}, "http://b:2", None),
        ({"ALL_PROXY": "http://a:1", "https_proxy": ""}, None, "http://a:1"),
        ({"all_proxy": "a:1"}, "http://a:1", "http://a:1"),
        ({"HTTP_PROXY": "http://a:1", "REQUEST_METHOD": "GET"}, None, None),
        ({"http_proxy": "http://a:1", "REQUEST_METHOD": "GET"}, None, "http://a:1"),
        ({"HTTPS_PROXY": "http://a:1", "no_proxy": "vendor.test"}, None, None),
    ],
)
def test_the_environment_is_read_as_curl_reads_it(
    environ: dict[str, str], https: str | None, plain: str | None
) -> None:
    rules = ProxyRules.of("environment", environ)
    assert rules.proxy_for("https", "vendor.test", 443) == https
    assert rules.proxy_for("http", "vendor.test", 80) == plain


def test_a_proxy_of_the_configuration_knows_no_exemptions_and_none_is_none() -> None:
    environ = {"HTTPS_PROXY": "http://other:1", "NO_PROXY": "*"}
    assert ProxyRules.of(PROXY, environ).proxy_for("https", "vendor.test", 443) == PROXY
    assert ProxyRules.of("none", environ).proxy_for("https", "vendor.test", 443) is None


@pytest.mark.parametrize("url", ["socks5://user:sk-planted@proxy.test:1", "http://", "http://user:sk-planted@/"])
def test_a_proxy_that_cannot_be_used_is_a_mistake_told_without_its_password(url: str) -> None:
    with pytest.raises(LLMConfigurationError, match=r"transport\.proxy") as caught:
        http(proxy=url)
    assert "sk-planted" not in str(caught.value)
    rules = ProxyRules.of("environment", {"ALL_PROXY": url, "NO_PROXY": "inside.test"})
    assert rules.proxy_for("https", "inside.test", 443) is None, "who does not need it is not disturbed by it"
    with pytest.raises(LLMConfigurationError, match="HTTPS_PROXY") as caught:
        rules.proxy_for("https", "vendor.test", 443)
    assert "sk-planted" not in str(caught.value)


async def test_a_plain_request_goes_to_the_proxy_in_absolute_form_with_its_password() -> None:
    heads: list[bytes] = []

    async def proxy(peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            heads.append(head)
            peer.answer(b"through the proxy")

    async with serve(proxy) as server:
        transport = http(environ={"HTTP_PROXY": f"http://user:pass@127.0.0.1:{server.port}"})
        assert await ask(transport, "http://vendor.test/v1/messages") == b"through the proxy"
        exchange = Exchange()
        assert await ask(transport, "http://vendor.test/v1/messages", exchange) == b"through the proxy"
        assert exchange.reused
        await transport.close()
    for head in heads:
        assert head.startswith(b"POST http://vendor.test/v1/messages HTTP/1.1\r\n")
        assert b"proxy-authorization: basic " + base64.b64encode(b"user:pass").lower() in head.lower()


async def test_no_proxy_with_a_network_sends_a_request_straight_there() -> None:
    async with serve(answering) as vendor, serve(answering) as proxy:
        environ = {"HTTP_PROXY": f"http://127.0.0.1:{proxy.port}", "NO_PROXY": "10.0.0.0/8,127.0.0.0/8"}
        transport = http(environ=environ)
        assert await ask(transport, vendor.url) == b"ok"
        await transport.close()
        assert (vendor.connections, proxy.connections) == (1, 0)


async def tunnel(peer: Peer) -> None:
    """A proxy that knows CONNECT, and nothing else."""
    head, _ = await peer.request()
    method, target, *_ = head.decode().split()
    assert method == "CONNECT"
    host, _, port = target.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
        sink.close()

    try:
        await asyncio.gather(copy(peer.reader, writer), copy(reader, peer.writer))
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)


async def test_https_goes_through_a_tunnel_that_sees_no_key(authority: Authority) -> None:
    calls: list[int] = []
    async with serve(answering, tls=authority.server()) as vendor, serve(tunnel) as proxy:
        transport = http(proxy=f"http://user:pass@127.0.0.1:{proxy.port}", ca_file=authority.ca_file)
        for reused in (False, True):
            exchange = Exchange(lambda: calls.append(1))
            assert await ask(transport, vendor.url, exchange) == b"ok"
            assert (exchange.reused, exchange.written, exchange.started) == (reused, True, True)
        assert transport.statistics() == {"open": 1, "idle": 1, "opened": 1, "in_flight": 0}
        assert calls == [1, 1]
        await transport.close()
        await proxy.peers[0].lost.wait()
        assert (vendor.connections, proxy.connections) == (1, 1)


@pytest.mark.parametrize(("status", "retryable"), [("407 Proxy Authentication Required", False), ("502 Bad", True)])
async def test_a_proxy_that_refuses_the_tunnel_is_named_without_its_password(status: str, retryable: bool) -> None:
    async def proxy(peer: Peer) -> None:
        await peer.request()
        peer.answer(status=status)
        await peer.gone()

    async with serve(proxy) as server:
        transport = http(environ={"HTTPS_PROXY": f"http://user:sk-planted@127.0.0.1:{server.port}"})
        exchange = Exchange(lambda: pytest.fail("there was no connection"))
        with pytest.raises(LLMConnectionError, match=f"proxy 127.0.0.1:{server.port}") as caught:
            await transport.send(post("https://vendor.test/v1"), exchange)
        await transport.close()
        await server.peers[0].lost.wait()
    assert status[:3] in str(caught.value)
    assert caught.value.retryable is retryable
    assert not caught.value.sent
    assert "sk-planted" not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"


async def test_a_proxy_that_is_not_there_is_named() -> None:
    transport = http(environ={"HTTPS_PROXY": "http://127.0.0.1:9"})
    with pytest.raises(LLMConnectionError, match=r"no connection to vendor\.test:443 through the proxy 127\.0\.0\.1:9"):
        await transport.send(post("https://vendor.test/v1"), Exchange())
    await transport.close()
