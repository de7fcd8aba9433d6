"""Which proxy a request goes through: the environment's variables, read as curl reads them, with CIDR in NO_PROXY."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

from ..core.exceptions import LLMConfigurationError

_SCHEMES = ("http", "https")


class Exemption(NamedTuple):
    """One entry of NO_PROXY. Exactly one of *network* and *name* is set, or neither for ``*``."""

    network: IPv4Network | IPv6Network | None = None
    name: str = ""
    port: int | None = None

    def covers(self, host: str, address: IPv4Address | IPv6Address | None, port: int) -> bool:
        if self.port is not None and self.port != port:
            return False
        if self.network is not None:
            return address is not None and address in self.network
        # Only names have subdomains: 10.0.0.0 is not below a host called "0.0".
        return not self.name or host == self.name or (address is None and host.endswith("." + self.name))


class ProxyRules:
    """Proxies by the scheme of the request's URL, and who is exempt from them."""

    __slots__ = ("_by_scheme", "_exemptions")

    def __init__(self, by_scheme: Mapping[str, str], exemptions: tuple[Exemption, ...] = ()) -> None:
        self._by_scheme = dict(by_scheme)
        self._exemptions = exemptions

    @classmethod
    def of(cls, setting: str, environ: Mapping[str, str]) -> ProxyRules:
        """The rules of the setting ``proxy``: ``environment``, ``none``, or a proxy's URL, which has no exemptions."""
        if setting == "none":
            return cls({})
        if setting != "environment":
            url = checked(setting, "transport.proxy")
            return cls(dict.fromkeys(_SCHEMES, url))
        by_scheme = {}
        for scheme in _SCHEMES:
            for name in (f"{scheme}_proxy", "all_proxy"):
                value = _variable(environ, name)
                if value is not None:
                    # Set to nothing is set: it switches ALL_PROXY off for this scheme.
                    if value:
                        by_scheme[scheme] = value
                    break
        return cls(by_scheme, exemptions(_variable(environ, "no_proxy") or ""))

    def proxy_for(self, scheme: str, host: str, port: int) -> str | None:
        """The proxy's URL, None to go straight there. *host* is an IP address without brackets, or a name.

        Raises:
            LLMConfigurationError: the proxy that would be used is of a kind that is not supported.
        """
        url = self._by_scheme.get(scheme)
        if url is None:
            return None
        host = host.rstrip(".").lower()
        address = _address(host)
        if any(exemption.covers(host, address, port) for exemption in self._exemptions):
            return None
        # Checked here and not when the variables are read: ALL_PROXY=socks5://… disturbs nobody who does not need it.
        return checked(url, f"the {scheme.upper()}_PROXY or ALL_PROXY of the environment")


def checked(url: str, place: str) -> str:
    """*url* as an HTTP proxy's URL; ``host:port`` alone is one too. The message never repeats the URL: it may hold a
    password."""
    scheme, separator, rest = url.strip().partition("://")
    if not separator:
        scheme, rest = "http", scheme
    if scheme.lower() not in _SCHEMES:
        raise LLMConfigurationError(f"{place}: a proxy of the kind {scheme!r} is not supported; use an http:// one")
    if not rest.rpartition("@")[2].strip("/"):
        raise LLMConfigurationError(f"{place}: names no host; write http://host:port")
    return f"{scheme.lower()}://{rest}"


def exemptions(text: str) -> tuple[Exemption, ...]:
    """The entries of NO_PROXY: names (with their subdomains), addresses and CIDR, each maybe with a port, or ``*``."""
    return tuple(_exemption(entry) for entry in text.replace(",", " ").split())


def _exemption(entry: str) -> Exemption:
    if entry == "*":
        return Exemption()
    host, port = entry.lower(), None
    if (network := _network(host)) is not None:
        return Exemption(network=network)
    # Only now a port: a bare IPv6 address is full of colons.
    name, colon, digits = host.rpartition(":")
    if colon and digits.isdecimal():
        host, port = name, int(digits)
    if (network := _network(host.strip("[]"))) is not None:
        return Exemption(network=network, port=port)
    return Exemption(name=host.removeprefix("*").strip("."), port=port)


def _network(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _variable(environ: Mapping[str, str], name: str) -> str | None:
    """The variable in lower case, else in upper case; None when neither is set."""
    if name in environ:
        return environ[name].strip()
    if name == "http_proxy" and "REQUEST_METHOD" in environ:
        # Under CGI a client sets HTTP_PROXY by sending a header "Proxy" (CVE-2016-5385).
        return None
    value = environ.get(name.upper())
    return None if value is None else value.strip()
