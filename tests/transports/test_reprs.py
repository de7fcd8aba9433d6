"""What the transport shows of itself: enough to find a fault by, and nothing that was said."""

from __future__ import annotations

from llm.transports.base import Exchange, HTTPRequest
from tests.transports.server import ask, post, talking


def test_a_request_shows_neither_its_headers_nor_its_body() -> None:
    request = HTTPRequest("POST", "https://vendor.test/v1", {"x-api-key": "sk-planted"}, b"private")
    assert repr(request) == "<HTTPRequest POST https://vendor.test/v1, 7 bytes>"


async def test_an_answer_shows_its_peer_and_the_names_of_its_headers() -> None:
    async with talking() as (transport, server):
        response = await transport.send(post(server.url), Exchange())
        assert repr(response) == f"<HTTPResponse 200 from 127.0.0.1:{server.port}>"
        assert repr(response.headers) == "<ResponseHeaders content-length>"
        await response.read()


async def test_a_transport_shows_its_connections() -> None:
    async with talking() as (transport, server):
        await ask(transport, server.url)
        assert repr(transport) == "<HTTPTransport: 1 open, 1 idle, 1 opened, 0 in_flight>"
    assert repr(transport) == "<HTTPTransport closed: 0 open, 0 idle, 1 opened, 0 in_flight>"
