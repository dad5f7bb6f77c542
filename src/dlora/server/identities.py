"""Who may use a server: tenants with their limits, and their tokens and certificates.

One JSON file, written by `dlora keys` and read again when it changes, so that nothing needs a
restart:

{"tenants":      {NAME: {LIMIT: VALUE, ...}, ...},
 "tokens":       {ID: {"tenant": NAME, "sha256": DIGEST, "expires": ISO TIME}, ...},
 "certificates": {FINGERPRINT: {"tenant": NAME, "expires": ISO TIME}, ...}}

A token is 32 random bytes, so a plain SHA-256 of it cannot be turned back. Whoever is not in the
file is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from dlora.errors import UsageError
from dlora.files import check_private

__all__ = ["LOCAL", "Credential", "Identities", "TenantLimits", "hash_token"]

log = logging.getLogger(__name__)

_KINDS: Final = ("tokens", "certificates")
_STALE_S: Final = 60.0
"""For so long the last good identities are in force when the file cannot be read."""


_MOST: Final = 2.0**40
"""No limit is larger, and none is infinite or no number."""


@dataclass(frozen=True, kw_only=True)
class TenantLimits:
    """What one tenant may have at the same time; the server's own limits apply as well."""

    max_streams: int = 16
    """Micro-batches and answers in flight."""
    max_inflight_mib: int = 4096
    """Activations and KV caches, in MiB."""
    mib_per_hour: float = 0.0
    """Traffic in both directions, in MiB an hour, with an hour's worth of burst; 0: no limit."""
    adapter_mib: int = 256
    """Frozen modules that the cloud keeps for the tenant, in MiB."""
    weight: float = 1.0
    """Share of compute against other tenants that want it at the same time."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        for name, value in asdict(self).items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= _MOST:
                raise UsageError(
                    f"tenant limit {name}: got {value!r}, want a number from 0 to {_MOST:g}"
                )
        if self.weight == 0:
            raise UsageError("tenant limit weight: got 0, want more")


@dataclass(frozen=True)
class Credential:
    """Who calls, and by what token or certificate."""

    tenant: str
    id: str
    """Name of the token, or fingerprint of the certificate: never the secret itself."""
    certificate: str = ""
    """Fingerprint of the certificate that was shown beside a token."""


LOCAL: Final = Credential("local", "none")
"""Everybody, on a server without identities."""


def hash_token(token: str) -> str:
    """SHA-256 of a token, in hex: all of it that is kept."""
    return hashlib.sha256(token.encode()).hexdigest()


class Identities:
    """The file in memory; `refresh` takes up its changes.

    All methods may be called from any thread.
    """

    def __init__(self, file: Path) -> None:
        """Raises UsageError for a file that cannot be read, is open to others, or is none."""
        self.file = file
        self._lock = threading.Lock()
        self._read_at: tuple[int, int, int] | None = None
        self._looked_at = time.monotonic()  # with success
        self._names: frozenset[str] = frozenset()
        self._complaint = ""  # about the file as it is now; logged already
        self._tenants: dict[str, TenantLimits] = {}
        self._entries: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
        check_private(file)
        self._read()

    def refresh(self) -> None:
        """Read the file again if it has changed.

        A file that cannot be read, is gone, or is open to others changes nothing at first: revoking
        is done by changing it. The log says so once. After a minute `is_stale` says that nobody can
        be trusted any longer.
        """
        try:
            if self._stamp() != self._read_at:
                check_private(self.file)
                self._read()
            self._complaint, self._looked_at = "", time.monotonic()
        except Exception as error:  # whatever a file can do to a parser: nobody may be locked out
            complaint = str(error) or type(error).__name__
            if complaint != self._complaint:
                log.error(
                    "identities are as they were: %s; in %.0f s nobody is let in",
                    complaint,
                    _STALE_S,
                )
            self._complaint = complaint

    @property
    def is_stale(self) -> bool:
        """Whether the file could not be looked at for so long that a revocation may be missed."""
        return time.monotonic() - self._looked_at > _STALE_S

    def tenants(self) -> frozenset[str]:
        """Everybody who has a token or a certificate."""
        return self._names

    def expiring(self, before: datetime) -> list[tuple[datetime, str, str, str]]:
        """(end, kind, id, tenant) of tokens and certificates that end by then, soonest first."""
        with self._lock:
            return sorted(
                (entry["expires"], kind.removesuffix("s"), name, entry["tenant"])
                for kind, entries in self._entries.items()
                for name, entry in entries.items()
                if entry["expires"] < before
            )

    def limits(self, tenant: str) -> TenantLimits:
        """A tenant's limits; defaults for one that has none of its own."""
        with self._lock:
            return self._tenants.get(tenant, TenantLimits())

    def authenticate(self, token: str | None, certificate_pem: bytes | None) -> Credential | None:
        """Whose token or client certificate this is; None if it is nobody's, revoked or expired.

        Where both are shown both have to be valid, and of the same tenant: a certificate that was
        revoked lets nobody in, whatever comes with it.
        """
        with self._lock:
            shown = fingerprint(certificate_pem) if certificate_pem else ""
            listed = self._entries["certificates"].get(shown)
            if shown and (listed is None or not _alive(listed)):
                return None
            if token is None:
                return None if listed is None else Credential(listed["tenant"], shown)

            digest = hash_token(token).encode()
            for name, entry in self._entries["tokens"].items():
                # As bytes: text that is not ASCII cannot be compared, whoever wrote it.
                if hmac.compare_digest(entry["sha256"].encode(), digest) and _alive(entry):
                    if listed is not None and listed["tenant"] != entry["tenant"]:
                        return None
                    return Credential(entry["tenant"], name, shown)
        return None

    def is_valid(self, credential: Credential) -> bool:
        """Whether it still is: not revoked, not expired, and of the same tenant."""
        with self._lock:
            entries = [self._entries[kind].get(credential.id) for kind in _KINDS]
            beside = self._entries["certificates"].get(credential.certificate)
        if credential.certificate and not _belongs(beside, credential.tenant):
            return False
        return any(_belongs(entry, credential.tenant) for entry in entries)

    def _stamp(self) -> tuple[int, int, int]:
        stat = self.file.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> None:
        stamp = self._stamp()
        try:
            tenants, entries = parse(json.loads(self.file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{self.file} is no identities file: {type(error).__name__}: {error}"
            ) from error
        with self._lock:
            self._tenants, self._entries, self._read_at = tenants, entries, stamp
            self._names = frozenset(
                entry["tenant"] for found in entries.values() for entry in found.values()
            )


def parse(content: Mapping[str, Any]) -> tuple[dict[str, TenantLimits], dict[str, dict[str, Any]]]:
    """Check what an identities file holds; return (tenants, kind -> entries).

    Raises UsageError, ValueError, TypeError, KeyError or AttributeError.
    """
    known = {field.name for field in fields(TenantLimits)}
    tenants = {}
    for name, values in content["tenants"].items():
        if unknown := values.keys() - known:
            raise UsageError(
                f"tenant {name}: no such limit: {', '.join(sorted(unknown))}; there are "
                f"{sorted(known)}"
            )
        tenants[name] = TenantLimits(**values)

    entries: dict[str, dict[str, Any]] = {}
    for kind in _KINDS:
        entries[kind] = {
            name: {
                "tenant": str(entry["tenant"]),
                "expires": _time(entry["expires"]),
                "sha256": str(entry.get("sha256", "")),
            }
            for name, entry in content[kind].items()
        }
    return tenants, entries


def fingerprint(certificate_pem: bytes) -> str:
    """SHA-256 of a certificate, in hex."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate_pem.decode())).hexdigest()


def _time(text: str) -> datetime:
    """A moment; without a zone it is UTC."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _belongs(entry: Mapping[str, Any] | None, tenant: str) -> bool:
    return entry is not None and entry["tenant"] == tenant and _alive(entry)


def _alive(entry: Mapping[str, Any]) -> bool:
    expires: datetime = entry["expires"]
    return datetime.now(UTC) < expires
