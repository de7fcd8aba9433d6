"""What an error response says, whatever it is. Vendors' bodies are in tests/providers/golden."""

import msgspec
import pytest

from llm.utils.error_body import ErrorBody, read_error_body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", ""),
        (b"upstream request timeout", "upstream request timeout"),
        (b"<html><head><title>502 Bad\n Gateway</title></head><body>x</body></html>", "502 Bad Gateway"),
        (b"<html><body><H1 class=a>Oops</H1>more</body></html>", "Oops"),
        (b"<p>Some <b>words</b></p>", "Some words"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"[" * 100_000, "[" * 2048),
        (b"null", ""),
        (b"true", ""),
        (b"[]", ""),
        (b"[[]]", ""),
        (b'"text"', "text"),
        (b"42", "42"),
        (b"{}", ""),
        (b'{"error":"text"}', "text"),
        (b'{"error":"Not Found","message":"No such path","status":404}', "No such path"),
        (b'{"error":{"message":"text"}}', "text"),
        (b'{"error":{"detail":"text"}}', "text"),
        (b'[{"error":{"message":"text"}}]', "text"),
        (b'{"detail":"text"}', "text"),
        (b'{"detail":[{"loc":["body","n"],"msg":"a"},{"msg":"b"},5]}', "body.n: a; b; 5"),
        (b'{"message":{"detail":[{"loc":["body"],"msg":"a"}]}}', "body: a"),
        (b'{"message":{"other":1}}', ""),
        (b'{"error":{"message":["a","b"]}}', "a; b"),
    ],
)
def test_a_body_has_a_message(body: bytes, message: str) -> None:
    assert read_error_body(body).message == message


def test_a_body_has_its_other_words() -> None:
    found = read_error_body(
        b'{"error":{"message":"m","type":"t","code":7,"details":{"error_code":"e"}},"request_id":"r"}'
    )
    assert found == ErrorBody("m", "t", "7", "r", {"error_code": "e"}, structured=True, is_error=True)


@pytest.mark.parametrize(
    ("body", "structured", "is_error"),
    [
        (b'{"error":"x"}', True, True),
        (b'{"type":"error"}', True, True),
        (b'{"object":"error","message":"x"}', True, True),
        (b'{"error":null,"choices":[]}', True, False),
        (b'{"type":"message"}', True, False),
        (b"error", False, False),
    ],
)
def test_a_body_is_an_error_if_it_says_so(body: bytes, structured: bool, is_error: bool) -> None:
    found = read_error_body(body)
    assert (found.structured, found.is_error) == (structured, is_error)


@pytest.mark.parametrize("value", ["x" * 10_000, ["x" * 10_000], [{"loc": ["y" * 3000], "msg": "x" * 10_000}]])
def test_a_message_has_an_end(value: object) -> None:
    assert len(read_error_body(msgspec.json.encode({"error": {"message": value}})).message) == 2048


def test_a_page_of_a_megabyte_is_read_at_its_beginning() -> None:
    assert read_error_body(b"<" * 1_000_000).message
    assert read_error_body(b"<html>" + b" " * 1_000_000 + b"<title>late</title>").message == ""


@pytest.mark.parametrize("value", ["a\r\nb", ["a\x1b[31mb"], {"loc": ["a\u2028"], "msg": "b"}, {"message": "a\x9bb"}])
def test_a_servers_words_neither_begin_a_line_nor_command_a_terminal(value: object) -> None:
    body = msgspec.json.encode({"error": {"message": value, "type": "t\nu", "code": "c\x07d"}, "request_id": "r\ns"})
    found = read_error_body(body)
    assert all(word.isprintable() for word in (found.message, found.type, found.code, found.request_id or ""))
    assert found.message.startswith("a")
    assert read_error_body(b"plain\x1b[2J words").message == "plain [2J words"
