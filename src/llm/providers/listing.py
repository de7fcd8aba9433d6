"""Lists of models and counts of tokens, as both vendors answer them."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any, Final, Literal

import msgspec

from ..core.types import ModelInfo
from ..utils.error_body import UNREADABLE
from ..utils.http_errors import unreadable
from .catalog import Vendor, catalog


class _Model(msgspec.Struct):
    """One entry: of Anthropic's words and OpenAI's, whichever it has."""

    id: str
    display_name: str | None = None
    lifecycle: str | None = None
    retires_at: str | None = None
    shutdown_date: str | None = None
    max_input_tokens: int | None = None
    max_tokens: int | None = None


class _Page(msgspec.Struct):
    data: list[_Model]
    has_more: bool = False
    last_id: str | None = None


class _Count(msgspec.Struct):
    input_tokens: int


_decode_page: Final = msgspec.json.Decoder(_Page).decode
_decode_count: Final = msgspec.json.Decoder(_Count).decode
_LIFECYCLES: Final[dict[str, Literal["active", "deprecated", "retired"]]] = {
    "active": "active",
    "deprecated": "deprecated",
    "retired": "retired",
}


def read_models(body: bytes, vendor: Vendor | None, *, provider: str) -> tuple[list[ModelInfo], str | None]:
    """The models of a page, and the last of them if more follow. What the vendor does not say *vendor* knows."""
    try:
        page = _decode_page(body)
    except UNREADABLE:
        raise unreadable("this is no list of models", body, provider=provider, model="") from None
    return [_info(model, vendor) for model in page.data], page.last_id if page.has_more else None


def read_count(body: bytes, *, provider: str) -> int:
    """The number of input tokens."""
    try:
        return _decode_count(body).input_tokens
    except UNREADABLE:
        raise unreadable("this is no count of tokens", body, provider=provider, model="") from None


def only(body: bytes, names: frozenset[str]) -> bytes:
    """A request's *body* with nothing but the members of these *names*."""
    asked: dict[str, Any] = msgspec.json.decode(body)
    return msgspec.json.encode({name: value for name, value in asked.items() if name in names})


def _info(model: _Model, vendor: Vendor | None) -> ModelInfo:
    known = vendor.retirement(model.id) if vendor is not None else None
    on = _day(model.retires_at or model.shutdown_date) or (known.on if known is not None else None)
    lifecycle = _LIFECYCLES.get(model.lifecycle or "")
    if lifecycle is None and on is not None:
        # OpenAI tells the day alone.
        lifecycle = "retired" if on <= catalog().as_of else "deprecated"
    return ModelInfo(
        id=model.id,
        name=model.display_name or "",
        lifecycle=lifecycle,
        retires_on=on,
        replacement=known.use if known is not None else None,
        max_input_tokens=model.max_input_tokens,
        max_output_tokens=model.max_tokens,
    )


def _day(text: str | None) -> date | None:
    """A day, or the day of an instant in UTC."""
    if not text:
        return None
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (instant.astimezone(UTC) if instant.tzinfo is not None else instant).date()
