"""Certificates and tokens for a server of one's own: what `dlora keys` does.

FOLDER/ca.pem, ca.key           the authority that edges trust; they are given ca.pem
FOLDER/server.pem, server.key   the server's; `dlora keys server` makes new ones, and a running
                                server takes them up
FOLDER/identities.json          tenants, hashed tokens, certificates
FOLDER/edges/NAME.pem, .key     a tenant's client certificate, to be handed over

`dlora serve --keys FOLDER` reads server.pem, server.key and identities.json.

For a real deployment take server certificates from an authority that your users trust already.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from filelock import FileLock

from dlora.errors import UsageError
from dlora.files import write_private
from dlora.server.identities import fingerprint, hash_token, parse

__all__ = [
    "add_certificate",
    "add_token",
    "listing",
    "make_authority",
    "make_server_certificate",
    "revoke",
    "set_tenant",
]

_AUTHORITY_DAYS = 3650
_EMPTY: dict[str, Any] = {"tenants": {}, "tokens": {}, "certificates": {}}


def make_authority(folder: Path, hosts: Sequence[str], days: int) -> None:
    """A new folder with authority, server certificate and no identities.

    `hosts` are names and addresses by which edges reach the server; `days` is how long its
    certificate is valid. Raises UsageError if the folder already holds keys.
    """
    if (folder / "ca.key").exists():
        raise UsageError(
            f"{folder} already holds keys: use another folder, or `dlora keys server` for a new "
            "certificate"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    # It signs certificates, and none that could sign further ones (path length 0).
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "DLoRA development authority")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )

    certificate = (
        _builder(name, name, key.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )

    pem = certificate.public_bytes(serialization.Encoding.PEM)
    write_private(folder / "ca.key", _private(key))
    write_private(folder / "ca.pem", pem, 0o644)
    make_server_certificate(folder, hosts, days)
    write_private(folder / "identities.json", json.dumps(_EMPTY, indent=2).encode())


def make_server_certificate(folder: Path, hosts: Sequence[str], days: int) -> None:
    """A new key and certificate for the server's names and addresses.

    A running server takes it up.
    """
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))

    if not names:
        raise UsageError(
            "hosts: got none, want the names and addresses by which edges reach the server"
        )
    _issue(folder, folder / "server", hosts[0], days, ExtendedKeyUsageOID.SERVER_AUTH, names)


def set_tenant(folder: Path, tenant: str, limits: dict[str, float]) -> None:
    """Add a tenant, or change its limits."""
    with _changing(folder) as content:
        content["tenants"][_checked(tenant)] = content["tenants"].get(tenant, {}) | limits


def add_token(folder: Path, tenant: str, days: int) -> tuple[str, str]:
    """(id, token) of a new token; only its hash is kept."""
    token, name = secrets.token_urlsafe(32), secrets.token_hex(4)
    with _changing(folder) as content:
        content["tenants"].setdefault(_checked(tenant), {})
        content["tokens"][name] = {
            "tenant": tenant,
            "sha256": hash_token(token),
            "expires": _end(days).isoformat(),
        }
    return name, token


def add_certificate(folder: Path, tenant: str, days: int) -> tuple[str, Path]:
    """(fingerprint, file without ending) of a new client certificate and its key."""
    file = folder / "edges" / f"{_checked(tenant)}-{secrets.token_hex(4)}"
    file.parent.mkdir(exist_ok=True, mode=0o700)
    pem = _issue(
        folder, file, tenant, days, ExtendedKeyUsageOID.CLIENT_AUTH, [x509.DNSName(tenant)]
    )
    name = fingerprint(pem)
    with _changing(folder) as content:
        content["tenants"].setdefault(tenant, {})
        content["certificates"][name] = {"tenant": tenant, "expires": _end(days).isoformat()}
    return name, file


def revoke(folder: Path, which: str) -> int:
    """Take back a token or certificate by its id, or everything of a tenant; return how many.

    Raises UsageError if there is none.
    """
    count = 0
    with _changing(folder) as content:
        for kind in ("tokens", "certificates"):
            gone = [
                name for name, entry in content[kind].items() if which in (name, entry["tenant"])
            ]
            count += len(gone)
            for name in gone:
                del content[kind][name]
    if not count:
        raise UsageError(f"{folder}: no token, certificate or tenant is called {which!r}")
    return count


def listing(folder: Path) -> list[tuple[str, str, str, str]]:
    """(kind, tenant, id, expires) of every token and certificate."""
    content = _load(folder)
    return [
        (kind.removesuffix("s"), entry["tenant"], name, entry["expires"])
        for kind in ("tokens", "certificates")
        for name, entry in content[kind].items()
    ]


def _issue(
    folder: Path,
    file: Path,
    name: str,
    days: int,
    usage: x509.ObjectIdentifier,
    names: list[x509.GeneralName],
) -> bytes:
    """Make FILE.key and FILE.pem, signed by the authority; return the certificate as PEM."""
    try:
        authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} holds no authority ({error}): make one with `dlora keys init`"
        ) from error
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise UsageError(f"{folder}/ca.key is not a key of `dlora keys`")

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    certificate = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(authority_id, critical=False)
        .sign(signer, hashes.SHA256())
    )

    pem = certificate.public_bytes(serialization.Encoding.PEM)
    write_private(file.with_name(file.name + ".key"), _private(key))
    write_private(file.with_name(file.name + ".pem"), pem, 0o644)
    return pem


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> Any:
    """What all certificates have in common."""
    start = datetime.now(UTC) - timedelta(minutes=5)  # clocks differ
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(_end(days))
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _end(days: int) -> datetime:
    """When something that is made now and valid for `days` ends. Raises UsageError."""
    if days < 1:
        raise UsageError(f"days: got {days}, want at least 1")
    return datetime.now(UTC) + timedelta(days=days)


def _checked(tenant: str) -> str:
    """A name that is safe as part of a file name. Raises UsageError for another."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", tenant):
        raise UsageError(
            f"tenant: got {tenant!r}, want letters, digits, and . _ - between them, up to 63"
        )
    return tenant


def _load(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(
            (folder / "identities.json").read_text(encoding="utf-8")
        )
        parse(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{folder} holds no identities ({error}): begin with `dlora keys init`"
        ) from error
    return content


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[dict[str, Any]]:
    """Change identities.json at once or not at all, one writer at a time. Raises UsageError."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: begin with `dlora keys init`")
    with FileLock(folder / ".lock"):
        content = _load(folder)
        yield content
        parse(content)
        write_private(folder / "identities.json", json.dumps(content, indent=2).encode())
