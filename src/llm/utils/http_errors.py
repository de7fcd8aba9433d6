"""From an HTTP status, its headers and the vendor's words to an exception: the part that all dialects share."""

from __future__ import annotations

import re
from typing import Final

from ..core.exceptions import (
    LLMAuthenticationError,
    LLMContextLengthError,
    LLMException,
    LLMInvalidRequestError,
    LLMOverloadedError,
    LLMProtocolError,
    LLMQuotaExhaustedError,
    LLMRateLimitError,
    LLMRequestTooLargeError,
    LLMTimeoutError,
    Scope,
)
from ..core.types import Headers
from .error_body import MAX_BODY, MAX_MESSAGE, ErrorBody, read_error_body
from .header_values import retry_after

ERROR_BY_STATUS: Final[dict[int, type[LLMException]]] = {
    401: LLMAuthenticationError,
    402: LLMQuotaExhaustedError,
    403: LLMAuthenticationError,
    408: LLMTimeoutError,
    409: LLMOverloadedError,
    413: LLMRequestTooLargeError,
    425: LLMOverloadedError,
    429: LLMRateLimitError,
    # Groq's "flex tier at capacity"; no RFC defines it.
    498: LLMOverloadedError,
    504: LLMTimeoutError,
    # Anthropic's "overloaded"; no RFC defines it.
    529: LLMOverloadedError,
}
"""The error that a status means by itself; a status without a row is judged by its hundred."""

ERROR_BY_HUNDRED: Final[dict[int, type[LLMException]]] = {
    3: LLMProtocolError,
    4: LLMInvalidRequestError,
    5: LLMOverloadedError,
}

# No vendor but OpenAI has a code for this. Anthropic: "prompt is too long: 210000 tokens > 200000 maximum" and "input
# length and `max_tokens` exceed context limit"; vLLM: "maximum context length is"; llama.cpp: "exceeds the available
# context size".
CONTEXT_WORDS: Final = re.compile(
    r"prompt is too long|exceeds? (?:the )?(?:model's |available )*(?:maximum )?context|maximum context length",
    re.IGNORECASE,
)


def error_for_status(status: int) -> type[LLMException]:
    """The class that *status* means when the body has no better word."""
    return ERROR_BY_STATUS.get(status) or ERROR_BY_HUNDRED.get(status // 100, LLMProtocolError)


def build_error(
    error: type[LLMException],
    said: ErrorBody,
    *,
    provider: str,
    model: str,
    status: int,
    headers: Headers,
    body: bytes,
    code: str | None,
    request_id: str | None,
    obey_retry: bool,
    hint: str = "",
) -> LLMException:
    """The exception *error* with what *said*, *status* and *headers* have to tell.

    ``x-should-retry: false`` is obeyed from anybody. ``true`` only with *obey_retry* (the vendor's own address), and
    never for a key without money or rights, which no repetition mends.
    """
    if error is LLMInvalidRequestError and CONTEXT_WORDS.search(said.message):
        error = LLMContextLengthError
    if said.structured and said.message:
        message = said.message
    else:
        message = f"status {status}: {said.message or said.code or said.type or 'the body is empty'}"
    if hint:
        message = f"{message[: MAX_MESSAGE - len(hint) - 3]} ({hint})"
    found = error(
        message[:MAX_MESSAGE],
        provider=provider,
        model=model,
        status=status,
        code=code,
        request_id=request_id,
        sent=True,
        retry_after=retry_after(headers),
        body=body[:MAX_BODY],
    )
    if isinstance(found, LLMTimeoutError):
        found.phase = "server"
    match headers.get("x-should-retry"):
        case "false":
            found.retryable = False
        case "true" if obey_retry and not isinstance(found, (LLMQuotaExhaustedError, LLMAuthenticationError)):
            found.retryable = True
            if found.scope is Scope.REQUEST:
                found.scope = Scope.PROVIDER
    return found


def unreadable(what: str, body: bytes, *, provider: str, model: str) -> LLMProtocolError:
    """What came back is not the dialect; the same request may well be answered properly next time.

    The message quotes no more than a page's title: the body may be an answer, which is nothing for a log.
    """
    title = f", a page: {read_error_body(body).message}" if body.lstrip()[:1] == b"<" else ""
    return LLMProtocolError(
        f"{what} ({len(body)} bytes{title})"[:MAX_MESSAGE],
        provider=provider,
        model=model,
        sent=True,
        retryable=True,
        body=body[:MAX_BODY],
    )
