"""A replica: a Ray actor around a plain `Server`.

Ray makes it on any node and starts it again when it dies; it then loads the model again and has
another port. Ray itself is needed in none of this but the actor's address.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlora.errors import UsageError
from dlora.protocol.address import is_loopback
from dlora.server.settings import ServerOptions
from dlora.server.tls import TlsFiles

__all__ = ["Replica", "ReplicaSettings"]


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """What a replica serves, in plain values that travel to any node."""

    load: dict[str, Any]
    """Arguments of `load_cloud`, but for the limits."""
    limits: dict[str, Any]
    """Arguments of `cloud.Limits`."""
    options: ServerOptions
    host: str
    """Address to listen on, on the replica's own node."""
    ports: tuple[int, int] = (0, 0)
    """The first free port of these, both included; 0: any."""
    public_host: str | None = None
    """Address that edges get; default: the node's, or loopback where `host` is loopback."""
    tls: TlsFiles | None = None
    identities: Path | None = None
    access_log: Path | None = None
    threads: int | None = None
    """CPU threads for computing; default: PyTorch's."""
    num_cpus: float = 1.0
    """CPUs that Ray reserves."""
    num_gpus: float = 0.0
    """GPUs that Ray reserves."""


class Replica:
    """Loads and serves from its construction on; a plain class, which the front hands to Ray."""

    def __init__(self, settings: ReplicaSettings) -> None:
        """Raises UsageError if no port is free, or as `load_cloud` and `Server` do."""
        # Only where the actor runs: the front itself needs no model, and no torch.
        import torch

        from dlora.cloud.limits import Limits
        from dlora.cloud.load import load_cloud

        if settings.threads:
            torch.set_num_threads(settings.threads)
        cloud, loaded = load_cloud(**settings.load, limits=Limits(**settings.limits))
        self.server = _serve(settings, cloud, loaded.tokenizer)
        self.address = f"{_public_host(settings)}:{self.server.port}"

    def describe(self) -> tuple[str, bytes]:
        """(address, description) of this replica; the description as protobuf bytes."""
        return self.address, self.server.description.SerializeToString()

    def load(self) -> tuple[str, int, int]:
        """(address, streams in flight, streams that wait for a slot): also a sign of life."""
        return self.address, self.server.tenancy.streams, self.server.queue_length

    def drain(self) -> None:
        """Let streams in flight finish, refuse new ones."""
        self.server.stop()


def _serve(settings: ReplicaSettings, cloud: Any, tokenizer: Any) -> Any:
    """A running `Server` on the first free port of the settings. Raises UsageError without one."""
    from dlora.server.identities import Identities
    from dlora.server.server import Server

    first, last = settings.ports
    for port in range(first, last + 1):
        server = Server(
            cloud,
            tokenizer,
            host=settings.host,
            port=port,
            options=settings.options,
            tls=settings.tls,
            identities=None if settings.identities is None else Identities(settings.identities),
            access_log=settings.access_log,
        )

        try:
            server.start()
        except UsageError:
            if port == last:
                raise
        else:
            return server
    raise UsageError(f"replica_ports: got {first}-{last}, want the first no higher than the last")


def _public_host(settings: ReplicaSettings) -> str:
    if settings.public_host is not None:
        return settings.public_host
    if is_loopback(settings.host):
        return settings.host
    import ray

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
