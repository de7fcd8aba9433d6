"""What a message is made of besides plain text: images, documents, tool calls and their results, thinking.

All of them are frozen values that know no vendor's words. What a vendor must get back exactly as it was (signed
thinking, encrypted reasoning, blocks we have no word for) is kept as the bytes it came in, with the dialect that wrote
it: only that dialect is sent it again.

They can be written as JSON and read again: ``msgspec.json.decode(data, type=list[Message])``.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final, Literal, Self, TypeAlias

import msgspec

from .exceptions import LLMInvalidRequestError

Detail: TypeAlias = Literal["auto", "low", "high", "original"]

_SIGNATURES: Final = (
    (b"\x89PNG\r\n\x1a\n", 0, "image/png"),
    (b"\xff\xd8\xff", 0, "image/jpeg"),
    (b"GIF87a", 0, "image/gif"),
    (b"GIF89a", 0, "image/gif"),
    (b"WEBP", 8, "image/webp"),
)
"""The first bytes of what both vendors read; each format's own specification."""
PDF: Final = "application/pdf"


class _Part(msgspec.Struct, frozen=True, gc=False, tag_field="type", omit_defaults=True):
    """A leaf that the collector need not visit: its fields are text, bytes, flags, and tuples of the like."""


class Text(_Part, frozen=True, gc=False, tag="text"):
    """Words. *cache* asks the vendor to keep what the request holds up to here (``Message.cache`` explains it)."""

    text: str
    cache: bool = False


class Image(_Part, frozen=True, gc=False, tag="image"):
    """A picture by its address, or its bytes in base64: ``Image.from_bytes(data)``, ``Image.from_url(url)``."""

    url: str = ""
    data: str = ""
    """Base64; *media_type* says of what."""
    media_type: str = ""
    detail: Detail | None = None
    """How closely to look (OpenAI)."""
    cache: bool = False

    @classmethod
    def from_url(cls, url: str, *, detail: Detail | None = None, cache: bool = False) -> Self:
        """The picture at *url*; the vendor fetches it. A ``data:`` URL is taken apart.

        Raises:
            LLMInvalidRequestError: it is no ``https:``, ``http:`` or base64 ``data:`` URL.
        """
        if url.startswith("data:"):
            media_type, data = _data_url(url)
            return cls(data=data, media_type=media_type, detail=detail, cache=cache)
        _check_url(url)
        return cls(url=url, detail=detail, cache=cache)

    @classmethod
    def from_bytes(
        cls, data: bytes, *, media_type: str | None = None, detail: Detail | None = None, cache: bool = False
    ) -> Self:
        """The picture in *data*: PNG, JPEG, GIF or WebP, which its first bytes tell.

        Raises:
            LLMInvalidRequestError: it is none of these, and *media_type* was not given.
        """
        found = media_type or sniff(data)
        if found is None:
            raise LLMInvalidRequestError(
                "image: the bytes are no PNG, JPEG, GIF or WebP; say media_type=… if the model reads another format"
            )
        return cls(data=_base64(data), media_type=found, detail=detail, cache=cache)


class Document(_Part, frozen=True, gc=False, tag="document"):
    """A PDF or plain text to be read as a document: ``Document.from_bytes``, ``from_url``, ``from_text``."""

    url: str = ""
    data: str = ""
    """Base64 of a PDF."""
    text: str = ""
    media_type: str = PDF
    name: str = ""
    """What the document is called; OpenAI needs a file name and gets ``document.pdf`` without one."""
    cache: bool = False

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "", cache: bool = False) -> Self:
        """The PDF in *data*.

        Raises:
            LLMInvalidRequestError: it does not begin as a PDF does.
        """
        if not data.lstrip()[:5] == b"%PDF-":
            raise LLMInvalidRequestError("document: the bytes are no PDF; send plain text with Document.from_text")
        return cls(data=_base64(data), name=name, cache=cache)

    @classmethod
    def from_url(cls, url: str, *, name: str = "", cache: bool = False) -> Self:
        """The PDF at *url*; the vendor fetches it. Raises LLMInvalidRequestError for what is no web address."""
        _check_url(url)
        return cls(url=url, name=name, cache=cache)

    @classmethod
    def from_text(cls, text: str, *, name: str = "", cache: bool = False) -> Self:
        return cls(text=text, media_type="text/plain", name=name, cache=cache)


class ToolCall(_Part, frozen=True, gc=False, tag="tool_call"):
    """The model asks for a tool. Answer it with a :class:`ToolResult` of the same *id*."""

    id: str
    name: str
    arguments: str = "{}"
    """JSON as the model wrote it, which may be wrong."""
    extra: bytes = b""
    """JSON members of the vendor's own that have to go back with the call (Gemini's thought signatures)."""

    @property
    def input(self) -> Any:
        """The arguments, decoded; nothing written is ``{}``. Raises ValueError if they are no JSON."""
        try:
            return msgspec.json.decode(self.arguments) if self.arguments.strip() else {}
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"the arguments of {self.name} are no JSON: {error}") from None


class ToolResult(_Part, frozen=True, gc=False, tag="tool_result"):
    """What a tool has answered, as text or as parts with pictures and documents. It belongs into a TOOL message."""

    id: str
    """Of the :class:`ToolCall`."""
    content: str | tuple[Text | Image | Document, ...] = ""
    error: bool = False
    """Whether the tool has failed: the model is told so."""
    cache: bool = False


class Thinking(_Part, frozen=True, gc=False, tag="thinking"):
    """What the model thought before it answered. It goes back unchanged, or the vendor refuses the conversation."""

    text: str = ""
    """Empty where the vendor hides it."""
    raw: bytes = b""
    """The block as JSON, signature and all."""
    dialect: str = ""
    """Whose block it is; others leave it out."""

    @property
    def signature(self) -> str:
        """The vendor's seal on it (Anthropic), or the reasoning in its cipher (OpenAI, and redacted thinking)."""
        block = msgspec.json.decode(self.raw) if self.raw else {}
        return block.get("signature") or block.get("data") or block.get("encrypted_content") or ""


class Refusal(_Part, frozen=True, gc=False, tag="refusal"):
    """The model declined, in these words."""

    text: str


class Opaque(_Part, frozen=True, gc=False, tag="opaque"):
    """A block we have no word for (a vendor's own tools, and what is yet to be invented), kept as it came."""

    kind: str
    """The vendor's name for it."""
    raw: bytes
    dialect: str

    @property
    def value(self) -> Any:
        """The block as decoded JSON."""
        return msgspec.json.decode(self.raw)


Part: TypeAlias = Text | Image | Document | ToolCall | ToolResult | Thinking | Refusal | Opaque


def sniff(data: bytes) -> str | None:
    """The media type of a picture by its first bytes, None if it is none that the vendors read."""
    for signature, offset, media_type in _SIGNATURES:
        if data[offset : offset + len(signature)] == signature:
            return media_type if media_type != "image/webp" or data[:4] == b"RIFF" else None
    return None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _check_url(url: str) -> None:
    if not url.startswith(("https://", "http://")):
        raise LLMInvalidRequestError(f"url: expected https://… or http://…, got {url[:20]!r}")


def _data_url(url: str) -> tuple[str, str]:
    head, comma, data = url.partition(",")
    media_type, *flags = head.removeprefix("data:").split(";")
    if not comma or "base64" not in flags or not media_type:
        raise LLMInvalidRequestError("url: expected data:<type>;base64,<data>; write bytes with Image.from_bytes")
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise LLMInvalidRequestError("url: what follows the comma is no base64") from None
    return media_type, data
