"""The server's TLS: its PEM files, credentials that follow them, and the port.

Certificates expire, so a running server takes up changed files with the next handshake. A change
that cannot be read is logged, and the certificate in use stays.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import grpc

from dlora.errors import UsageError
from dlora.files import check_private

__all__ = ["TlsFiles", "add_port"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files of the server's TLS; read again when they change."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    """Authority of client certificates; given, every client has to show a certificate of it."""

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises UsageError for files that cannot be read, or a key that others can read."""
        check_private(self.key)
        try:
            pair = self.key.read_bytes(), self.certificate.read_bytes()
            roots = None if self.client_ca is None else self.client_ca.read_bytes()
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}") from error
        return grpc.ssl_server_certificate_configuration([pair], roots)

    def stamp(self) -> tuple[int, ...]:
        """Changes when a file does. Raises UsageError for a file that is not there."""
        files = [self.certificate, self.key]
        if self.client_ca is not None:
            files.append(self.client_ca)
        try:
            return tuple(file.stat().st_mtime_ns for file in files)
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}") from error


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that take up changed files with the next handshake."""
    # Before the files are read: a change in between is then seen as one.
    read_at = tls.stamp()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal read_at
        try:
            stamp = tls.stamp()
            if stamp != read_at:
                changed = tls.read()
                read_at = stamp
                log.info("took up the certificate in %s", tls.certificate)
                return changed
        except UsageError as error:
            log.error("the certificate is as it was: %s", error)
        return None

    return grpc.dynamic_ssl_server_credentials(
        tls.read(),
        fetch,  # type: ignore[arg-type]  # the stubs forget that None means "as it was"
        require_client_authentication=tls.client_ca is not None,
    )


def add_port(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    """Listen, encrypted or not; return the port.

    Raises UsageError if the port is taken or a file of `tls` cannot be read.
    """
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(tls))
    except RuntimeError as error:
        raise UsageError(
            f"cannot listen on {address}: is it in use? Try another --port."
        ) from error
