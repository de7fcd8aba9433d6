"""One table from what aiohttp raises to our own words."""

from __future__ import annotations

import ssl
from typing import NamedTuple

import aiohttp
from aiohttp import http_exceptions

from ..core.exceptions import (
    LLMConfigurationError,
    LLMConnectionError,
    LLMException,
    LLMProtocolError,
    LLMTimeoutError,
)
from .base import Exchange

FOREIGN: tuple[type[Exception], ...] = (aiohttp.ClientError, http_exceptions.HttpProcessingError, OSError, ValueError)
"""What may come out of aiohttp. TimeoutError and ssl.SSLError are OSErrors. Anything else is a bug, and stays one."""


class Fault(NamedTuple):
    """What an error of aiohttp means. *says* is completed with ``peer`` and ``reason``."""

    kind: type[LLMException]
    says: str
    retryable: bool
    phase: str | None = None


IDLE_CLOSED = Fault(LLMConnectionError, "{peer} had closed an idle connection before the request reached it", True)
LOST = Fault(LLMConnectionError, "the connection to {peer} was lost: {reason}", True)

FAULTS: tuple[tuple[type[Exception], Fault], ...] = (
    # The first entry that fits counts, so subclasses stand before their bases.
    (aiohttp.ConnectionTimeoutError, Fault(LLMTimeoutError, "no connection to {peer} in time", True, "connect")),
    (aiohttp.ServerTimeoutError, Fault(LLMTimeoutError, "nothing came from {peer} in time", True, "idle")),
    (
        aiohttp.ClientConnectorCertificateError,
        Fault(LLMConnectionError, "the certificate of {peer} is not to be trusted: {reason}", False),
    ),
    # A handshake that fails for another reason than the certificate: versions, ciphers, a client certificate that
    # is missing, or plain HTTP on the other side. It will fail again.
    (aiohttp.ClientConnectorSSLError, Fault(LLMConnectionError, "no TLS with {peer}: {reason}", False)),
    (
        aiohttp.ClientConnectorDNSError,
        Fault(LLMConnectionError, "the name of {peer} could not be resolved: {reason}", True),
    ),
    (aiohttp.ClientProxyConnectionError, Fault(LLMConnectionError, "no connection to {peer}: {reason}", True)),
    (aiohttp.ClientHttpProxyError, Fault(LLMConnectionError, "no tunnel to {peer}: status {reason}", False)),
    (aiohttp.ClientConnectorError, Fault(LLMConnectionError, "no connection to {peer}: {reason}", True)),
    (
        aiohttp.ServerDisconnectedError,
        Fault(LLMConnectionError, "{peer} closed the connection without an answer", True),
    ),
    (aiohttp.ClientOSError, LOST),
    (aiohttp.InvalidURL, Fault(LLMConfigurationError, "the URL for {peer} is not one that can be used", False)),
    (aiohttp.NonHttpUrlClientError, Fault(LLMConfigurationError, "the URL for {peer} is not an HTTP one", False)),
    # aiohttp tells both a head beyond its bounds and bytes that are no HTTP as a 400 of its own making.
    (aiohttp.ClientResponseError, Fault(LLMProtocolError, "the answer of {peer} is not usable HTTP: {reason}", False)),
    (
        http_exceptions.HttpProcessingError,
        Fault(LLMProtocolError, "the answer of {peer} is not usable HTTP: {reason}", False),
    ),
    (aiohttp.ClientPayloadError, Fault(LLMConnectionError, "the answer of {peer} was cut", True)),
    (aiohttp.ClientError, LOST),
    # TLS alerts after the handshake: under TLS 1.3 a refused client certificate shows only here.
    (ssl.SSLError, Fault(LLMConnectionError, "TLS with {peer} failed: {reason}", False)),
    (TimeoutError, Fault(LLMTimeoutError, "nothing came from {peer} in time", True, "idle")),
    (OSError, LOST),
    (ValueError, Fault(LLMConfigurationError, "the request to {peer} cannot be written: a header is malformed", False)),
)

_GARBLED = (http_exceptions.ContentEncodingError, http_exceptions.TransferEncodingError)


def explain(error: Exception, *, peer: str, exchange: Exchange, reading: bool = False) -> LLMException:
    """Our word for *error*; *reading* says that the head had arrived and the body failed.

    The message holds no foreign text but the operating system's and OpenSSL's: aiohttp's own has URLs and header values
    in it. For the same reason aiohttp's error does not become the cause, only the operating system's error inside it.
    """
    fault = next(fault for kind, fault in FAULTS if isinstance(error, kind))
    cause = _cause(error)
    if isinstance(error, aiohttp.ClientPayloadError) and _is_garbled(error):
        fault = Fault(LLMProtocolError, "the body from {peer} is not what its headers say", False)
    elif fault.phase == "idle" and not reading:
        fault = fault._replace(phase="first_byte")
    elif (
        exchange.reused
        and not exchange.started
        and fault.kind is LLMConnectionError
        and not isinstance(cause, ssl.SSLError)
    ):
        fault = IDLE_CLOSED
    elif isinstance(error, aiohttp.ClientHttpProxyError) and error.status >= 500:
        fault = fault._replace(retryable=True)
    message = fault.says.format(peer=peer, reason=_reason(error, cause))
    sent = exchange.connected
    if fault.phase is not None:
        ours: LLMException = LLMTimeoutError(message, phase=fault.phase, sent=sent, retryable=fault.retryable)
    else:
        ours = fault.kind(message, sent=sent, retryable=fault.retryable)
    if cause is not None:
        # Its traceback leads through aiohttp's frames, which hold the request's headers.
        ours.__cause__ = cause.with_traceback(None)
        cause.__context__ = cause.__cause__ = None
    # aiohttp keeps the error on the stream it raised it from; with its traceback that would be a cycle.
    error.__traceback__ = None
    return ours


def _cause(error: Exception) -> OSError | None:
    for candidate in (
        getattr(error, "certificate_error", None),
        getattr(error, "os_error", None),
        error.__cause__,
        error,
    ):
        if isinstance(candidate, OSError) and not isinstance(candidate, aiohttp.ClientError):
            return candidate
    return None


def _reason(error: Exception, cause: OSError | None) -> str:
    if isinstance(error, aiohttp.ClientResponseError):
        if isinstance(error, aiohttp.ClientHttpProxyError):
            return str(error.status)
        return _class_of(error.__cause__)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return cause.verify_message
    if isinstance(cause, ssl.SSLError) and cause.reason:
        return cause.reason.lower().replace("_", " ")
    return (cause.strerror if cause is not None else None) or getattr(error, "strerror", None) or "it was closed"


def _class_of(error: BaseException | None) -> str:
    """What aiohttp's parser disliked; its messages quote the bytes, so only the names of its errors are told."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return "headers beyond the bounds" if isinstance(error, http_exceptions.LineTooLong) else type(error).__name__


def _is_garbled(error: Exception) -> bool:
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, _GARBLED) and not isinstance(inner, http_exceptions.ContentLengthError):
            return "not enough data" not in str(inner.args).lower()
        inner = inner.__cause__
    return False
