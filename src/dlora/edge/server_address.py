"""Addresses of servers: host:port, of names and IP addresses, and which way they are reached.

What a server names as its replicas is a peer's word. gRPC itself would take `unix:`, `vsock:` and
other schemes; here all is DNS, and what a stranger's word must not reach is refused.
"""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from dlora.errors import PeerError, UsageError
from dlora.protocol.address import is_loopback
from dlora.protocol.text import clean_text

__all__ = ["check_address", "check_replica", "proxy_of", "target_of"]

# Schemes of gRPC's resolvers, which would be read in place of a host's name.
_SCHEMES: Final = frozenset(
    "unix unix-abstract vsock dns ipv4 ipv6 fd xds google-c2p passthrough binder inproc".split()
)
_HOST_PORT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}):(\d{1,5})")
_PROXY_VARIABLES: Final = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order


def check_address(address: str) -> None:
    """Raises UsageError for what is not host:port."""
    if _host(address) is None:
        raise UsageError(f"server: got {address!r}, want host:port, for example 127.0.0.1:50051")


def check_replica(address: str, front: str) -> None:
    """Raises PeerError for an address that the server at `front` must not send this edge to."""
    host = _host(address)
    shown = f"{front} names a replica {clean_text(address, 80)!r}, which is"
    if host is None:
        raise PeerError(f"{shown} no address: want host:port. Use another server.")

    ip = _ip(host)
    special = is_loopback(address) or _is_special(ip)
    if special and not (is_loopback(front) or _is_special(_ip(_host(front) or ""))):
        raise PeerError(f"{shown} an address of this machine or link alone. Use another server.")
    if ip is not None and _is_link_local(ip) and not _is_link_local(_ip(_host(front) or "")):
        raise PeerError(f"{shown} a link-local address. Use another server.")


def target_of(address: str) -> str:
    """host:port as gRPC's target: a name or an IP address and never another scheme."""
    return f"dns:///{address}"


def proxy_of(address: str, *, encrypted: bool) -> str | None:
    """The environment's variable by which gRPC would take a proxy, where it may; else None.

    To this machine there is none, and none without TLS: a proxy would read all that crosses.
    """
    if is_loopback(address) or _is_special(_ip(_host(address) or "")) or not encrypted:
        return None
    return next((name for name in _PROXY_VARIABLES if os.environ.get(name)), None)


def _host(address: str) -> str | None:
    """The host of host:port without brackets; None for anything else."""
    match = _HOST_PORT.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 2**16:
        return None
    host = match[1].strip("[]")
    if host.lower() in _SCHEMES:
        return None

    # What ends in a number is an IP address, in the one form that everybody reads alike.
    last = host.rstrip(".").rpartition(".")[2]
    numeric = ":" in host or re.fullmatch(r"\d+|0[xX][0-9A-Fa-f]*", last) is not None
    return None if numeric and _ip(host) is None else host


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    """The IP address that a host is; None for a name."""
    try:
        ip = ip_address(host)
    except ValueError:
        return None
    return (isinstance(ip, IPv6Address) and ip.ipv4_mapped) or ip


def _is_special(ip: IPv4Address | IPv6Address | None) -> bool:
    """Whether an address never leaves this machine, or belongs to no single one."""
    return ip is not None and (ip.is_loopback or ip.is_unspecified or ip.is_multicast)


def _is_link_local(ip: IPv4Address | IPv6Address | None) -> bool:
    """Whether an address is of one link: machines of clouds have their metadata there."""
    return ip is not None and ip.is_link_local
