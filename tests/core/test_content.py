"""What messages hold besides text: made of bytes and addresses, checked, kept as it came, and written down."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest

from llm.core.arguments import read_messages
from llm.core.content import Document, Image, Opaque, Refusal, Text, Thinking, ToolCall, ToolResult, sniff
from llm.core.exceptions import LLMInvalidRequestError
from llm.core.types import LLMResponse, Message, MessageRole, StreamChunk, ToolCallDelta, Usage

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
PDF = b"%PDF-1.7\n"


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0JFIF", "image/jpeg"),
        (b"GIF87a...", "image/gif"),
        (b"GIF89a...", "image/gif"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image/webp"),
        (b"RIFX\x00\x00\x00\x00WEBPVP8 ", None),
        (b"<svg/>", None),
        (b"", None),
    ],
)
def test_a_picture_is_known_by_its_first_bytes(data: bytes, media_type: str | None) -> None:
    assert sniff(data) == media_type
    if media_type is not None:
        picture = Image.from_bytes(data)
        assert (picture.media_type, base64.b64decode(picture.data)) == (media_type, data)
    else:
        with pytest.raises(LLMInvalidRequestError, match="media_type"):
            Image.from_bytes(data)
        assert Image.from_bytes(data, media_type="image/svg+xml").media_type == "image/svg+xml"


def test_a_data_url_is_taken_apart() -> None:
    encoded = base64.b64encode(PNG).decode()
    assert Image.from_url(f"data:image/png;base64,{encoded}") == Image.from_bytes(PNG)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("ftp://example.org/a.png", "expected https://"),
        ("a.png", "expected https://"),
        ("data:image/png,abc", "expected data:<type>;base64"),
        ("data:;base64,abc", "expected data:<type>;base64"),
        ("data:image/png;base64", "expected data:<type>;base64"),
        ("data:image/png;base64,a*b", "no base64"),
    ],
)
def test_an_address_that_no_vendor_could_fetch_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(LLMInvalidRequestError, match=complaint):
        Image.from_url(url)


def test_documents_are_of_bytes_of_text_and_of_an_address() -> None:
    assert base64.b64decode(Document.from_bytes(PDF, name="a.pdf").data) == PDF
    assert Document.from_text("Lorem", cache=True) == Document(text="Lorem", media_type="text/plain", cache=True)
    assert Document.from_url("https://example.org/a.pdf").url == "https://example.org/a.pdf"
    with pytest.raises(LLMInvalidRequestError, match="no PDF"):
        Document.from_bytes(PNG)
    with pytest.raises(LLMInvalidRequestError, match="expected https://"):
        Document.from_url("a.pdf")


def test_a_calls_arguments_are_decoded_when_they_are_asked_for() -> None:
    assert ToolCall("1", "f", '{"a":1}').input == {"a": 1}
    assert ToolCall("1", "f", " ").input == {}
    for bad in ("{", "[" * 100_000):
        with pytest.raises(ValueError, match="the arguments of f are no JSON"):
            _ = ToolCall("1", "f", bad).input


@pytest.mark.parametrize(
    ("raw", "signature"),
    [
        (b'{"type":"thinking","thinking":"Hm.","signature":"c2ln"}', "c2ln"),
        (b'{"type":"redacted_thinking","data":"zz"}', "zz"),
        (b'{"type":"reasoning","encrypted_content":"eA=="}', "eA=="),
        (b'{"reasoning_content":"Hm."}', ""),
        (b"", ""),
    ],
)
def test_the_seal_of_what_was_thought_can_be_seen(raw: bytes, signature: str) -> None:
    assert Thinking("Hm.", raw, "any").signature == signature


def test_a_conversation_can_be_written_down_and_read_again() -> None:
    messages = [
        Message(MessageRole.SYSTEM, "Be short.", cache=True),
        Message(
            MessageRole.USER, (Text("See.", cache=True), Image.from_bytes(PNG, detail="low"), Document.from_bytes(PDF))
        ),
        Message(
            MessageRole.ASSISTANT,
            (
                Thinking("Hm.", b'{"signature":"\\u00e9"}', "anthropic"),
                Text("I look."),
                ToolCall("1", "f", '{"a": 1}', b'{"extra_content":1}'),
                Refusal("No."),
                Opaque("hologram", b'{"type":"hologram"}', "anthropic"),
            ),
        ),
        Message(MessageRole.TOOL, (ToolResult("1", (Text("42"),), error=True),)),
    ]
    data = msgspec.json.encode(messages)
    assert msgspec.json.decode(data, type=list[Message]) == messages
    assert read_messages(msgspec.json.decode(data, type=list[Message])) == tuple(messages)
    assert Opaque("hologram", b'{"type":"hologram"}', "anthropic").value == {"type": "hologram"}


def test_lists_of_parts_and_strings_among_them_are_taken() -> None:
    (read,) = read_messages([Message(MessageRole.USER, ["See.", Image.from_bytes(PNG)])])  # type: ignore[arg-type]
    assert read.content == (Text("See."), Image.from_bytes(PNG))
    assert read.text == "See."
    same = Message(MessageRole.USER, (Text("See."),))
    assert read_messages([same])[0] is same


@pytest.mark.parametrize(
    ("role", "content", "complaint"),
    [
        (MessageRole.USER, [], "messages[0].content: the list of parts is empty"),
        (MessageRole.USER, 7, "messages[0].content: expected a str or a list of parts, got int"),
        (MessageRole.USER, [7], "messages[0].content[0]: USER sends Text, Image, Document, Opaque, got int"),
        (MessageRole.USER, [ToolCall("1", "f")], "USER sends Text, Image, Document, Opaque, got ToolCall"),
        (MessageRole.SYSTEM, [Image(url="https://x.y/z")], "SYSTEM sends Text, got Image"),
        (MessageRole.ASSISTANT, [ToolResult("1", "x")], "ASSISTANT sends"),
        (MessageRole.TOOL, "42", "messages[0].content: expected the results of tools, got text"),
        (MessageRole.TOOL, [Text("42")], "TOOL sends ToolResult, got Text"),
        (MessageRole.TOOL, [ToolResult("1", [ToolCall("1", "f")])], "messages[0].content[0].content[0]: USER sends"),  # type: ignore[arg-type]
        (MessageRole.TOOL, [ToolResult("1", "\ud800")], "messages[0].content[0].content: the character at 0"),
        (MessageRole.USER, [Text("a\ud800")], "messages[0].content[0].text: the character at 1"),
    ],
)
def test_what_a_role_cannot_say_is_refused_by_its_place(role: MessageRole, content: Any, complaint: str) -> None:
    with pytest.raises(LLMInvalidRequestError) as caught:
        read_messages([Message(role, content)])
    assert complaint in str(caught.value)


def test_an_answer_is_the_next_requests_message() -> None:
    call = ToolCall("1", "f")
    plain = LLMResponse(text="hello", model="m", usage=Usage())
    rich = LLMResponse(text="hello", model="m", usage=Usage(), content=(Text("hello"), call))
    assert (plain.message, plain.tool_calls) == (Message(MessageRole.ASSISTANT, "hello"), ())
    assert (rich.message, rich.tool_calls) == (Message(MessageRole.ASSISTANT, (Text("hello"), call)), (call,))


@pytest.mark.parametrize(
    ("chunk", "has_content"),
    [
        (StreamChunk(), False),
        (StreamChunk(usage=Usage(1)), False),
        (StreamChunk("x"), True),
        (StreamChunk(thinking="x"), True),
        (StreamChunk(refusal="x"), True),
        (StreamChunk(tool_call=ToolCallDelta(0)), True),
        (StreamChunk(part=ToolCall("1", "f")), True),
    ],
)
def test_a_piece_of_a_call_is_content_like_a_piece_of_text(chunk: StreamChunk, has_content: bool) -> None:
    assert chunk.has_content is has_content
