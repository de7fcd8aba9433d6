"""Certificates for tests."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme


class Authority:
    """A certificate authority with its files in *folder*: all written at once, since that blocks."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        client = authority.issue_cert("client.test")
        self.client_file = str(folder / "client.pem")
        client.private_key_and_cert_chain_pem.write_to_path(self.client_file)
        self.cert_file, self.key_file = str(folder / "cert.pem"), str(folder / "key.pem")
        client.cert_chain_pems[0].write_to_path(self.cert_file)
        client.private_key_pem.write_to_path(self.key_file)
        self._servers = {}
        for name in ("127.0.0.1", "other.test"):
            self._servers[name] = str(folder / f"{name}.pem")
            authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(self._servers[name])

    def server(self, name: str = "127.0.0.1", *, client_required: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._servers[name])
        if client_required:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca_file)
        return context
