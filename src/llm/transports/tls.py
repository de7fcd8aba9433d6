"""The TLS side of the transport's settings: whom to trust, and which certificate to show."""

from __future__ import annotations

import ssl

from ..core.exceptions import LLMConfigurationError
from ..core.settings import TransportSettings


def tls_context(settings: TransportSettings) -> ssl.SSLContext | bool:
    """The context for *settings*, or True for the system's authorities without a client certificate.

    Reads the files at once: whoever builds a transport is reading configuration anyway, and a wrong path is a mistake
    in it. So nothing is read later, on the event loop. True stands for the context that aiohttp makes when it is
    imported; a second one would cost 20 ms for the same content.

    Raises:
        LLMConfigurationError: a file cannot be read or does not hold what it should; the message names the setting.
    """
    if settings.client_key is not None and settings.client_cert is None:
        raise LLMConfigurationError("transport.client_key is set without transport.client_cert: set both")
    if settings.ca_file is None and settings.client_cert is None:
        return True
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ValueError) as error:
        raise _refused("ca_file", settings.ca_file, "a PEM file of certificates", error) from error
    context.set_alpn_protocols(("http/1.1",))
    if settings.client_cert is not None:
        try:
            # The empty password: without one, OpenSSL would ask on the terminal and wait there.
            context.load_cert_chain(settings.client_cert, settings.client_key, password="")
        except (OSError, ValueError) as error:
            place, path = (
                ("client_key", settings.client_key) if settings.client_key else ("client_cert", settings.client_cert)
            )
            raise _refused(place, path, "a PEM file with the certificate and its unencrypted key", error) from error
    return context


def _refused(place: str, path: str | None, wanted: str, error: Exception) -> LLMConfigurationError:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "it does not hold what it should"
    return LLMConfigurationError(f"transport.{place}: cannot use {path!r} ({reason}); it must be {wanted}")
