"""Settings of a server, and of `dlora serve`, `keys` and `status`. No torch here.

`ServerOptions` is what a `Server` takes; `ServeSettings` is what the command takes, with the same
defaults.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Literal

from dlora.cloud.limits import Limits
from dlora.errors import UsageError
from dlora.files import expand_homes
from dlora.protocol.address import LOOPBACK_ADDRESS, LOOPBACK_NAME, is_loopback

__all__ = ["KeysSettings", "ServeSettings", "ServerOptions", "StatusSettings"]

_MOST_S: Final = 31.0 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Limits of the server as a whole; those of one micro-batch are `cloud.Limits`."""

    max_streams: int = 64
    """Micro-batches in flight."""
    compute_slots: int = 1
    """Micro-batches that compute at the same moment; the others wait or talk with their edge."""
    edge_timeout_s: float = 120.0
    """How long a micro-batch waits for its edge before it is dropped, in seconds."""
    drain_s: float = 30.0
    """How long shutdown lets streams in flight go on while it refuses new ones, in seconds; 0: not
    at all."""
    grace_s: float = 5.0
    """How long shutdown then waits for the last streams to end with a status, in seconds."""

    def __post_init__(self) -> None:
        """Raises UsageError for times that are none."""
        for name in ("edge_timeout_s", "drain_s", "grace_s"):
            check_seconds(name, getattr(self, name))
        if self.edge_timeout_s == 0:
            raise UsageError("edge_timeout_s: got 0, want more")


def check_seconds(name: str, value: float) -> None:
    """Raises UsageError for a time that is negative, infinite or no number."""
    if not 0 <= value <= _MOST_S:
        raise UsageError(f"{name}: got {value}, want seconds from 0 to {_MOST_S:.0f}")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of `dlora serve`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "model": "model model_id device device_map max_memory dtype quantize threads allow_modules "
        "edge_first edge_last",
        "address": "host port metrics_port",
        "who may call": "keys tls_cert tls_key client_ca identities insecure access_log",
        "limits": "max_tokens max_length max_message_mib max_inflight_mib recompute prefix_mib "
        "max_streams "
        "compute_slots edge_timeout_s",
        "shutdown": "drain_s",
        "replicas": "replicas max_replicas replica_ports ray_address replica_cpus replica_gpus",
    }
    """Headline of the help -> names of settings."""

    model: str
    """Hugging Face id, local folder, .gguf file, or smollm2 (the model of the demo)."""
    model_id: str | None = None
    """Public name that adapters will carry; default: the hub id, or the name of the file or folder.
    """
    host: str = LOOPBACK_ADDRESS
    """Address to listen on. Anything but loopback wants TLS, or `insecure`."""
    port: int = 50051
    """Port to listen on; 0 picks a free one."""
    device: str = "cpu"
    """Device of the model, for example cuda."""
    device_map: str | None = None
    """In place of `device`: spread the model over several. auto, balanced or sequential find places
    by each device's memory; a JSON file names modules and their devices. What finds no room stays
    in memory or on disk and is read for each use."""
    max_memory: dict[str, str] = field(default_factory=dict)
    """With device_map: the most that weights may take of each device, such as '{0: 20GiB, 1: 20GiB,
    cpu: 60GiB}'; default: what is free."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Compute dtype of the model."""
    quantize: Literal["none", "int8", "int4", "nf4"] = "none"
    """Keep the decoder's linear weights in 8 or 4 bits, for less memory (int8 and nf4 need the
    extra `quantize`). Another function than the full model, with a fingerprint of its own."""
    allow_modules: str = ".*"
    """Regular expression over full names of modules, and of fused weights of experts: what edges
    may adapt."""
    edge_first: int = Limits.edge_first
    """Let edges have the weights of this many of the first decoder layers, and run these layers.
    They get more privacy; you keep less of the model to yourself."""
    edge_last: int = Limits.edge_last
    """The same for the last layers."""
    max_tokens: int = Limits.max_tokens
    """Tokens of one micro-batch, padding included."""
    max_length: int = Limits.max_length
    """Tokens of one sequence; the model's own limit applies too."""
    max_message_mib: int = Limits.max_message_bytes >> 20
    """Largest message in MiB."""
    max_inflight_mib: int = Limits.max_inflight_bytes >> 20
    """Activations kept for all micro-batches in flight, in MiB."""
    recompute: bool = Limits.recompute
    """Keep of every layer its input and what its edge answered, and run it again in backward: less
    memory for each micro-batch that waits, more compute. Gradients stay what they are."""
    prefix_mib: int = Limits.max_prefix_bytes >> 20
    """What the layers below all adapters made of rows, in MiB of the host's memory, kept for edges
    that train with cache_prefix. When it is full the longest unused goes, of whoever has most. 0:
    nothing is kept."""
    max_streams: int = ServerOptions.max_streams
    """Micro-batches in flight."""
    compute_slots: int = ServerOptions.compute_slots
    """Micro-batches that compute at the same moment."""
    edge_timeout_s: float = ServerOptions.edge_timeout_s
    """How long a micro-batch waits for its edge, in seconds."""
    threads: int | None = None
    """CPU threads for computing; default: PyTorch's."""
    keys: Path | None = None
    """Folder of `dlora keys`: its server certificate and its identities."""
    tls_cert: Path | None = None
    """Server certificate, as a PEM file, in place of that of `keys`. A changed file is taken up
    without restart."""
    tls_key: Path | None = None
    """Its key."""
    client_ca: Path | None = None
    """Authority of client certificates, as a PEM file: every edge then has to show a certificate
    (mutual TLS)."""
    identities: Path | None = None
    """File of tenants, tokens and certificates, in place of that of `keys`. Changes are taken up
    within a second."""
    insecure: bool = False
    """Agree that anybody on the network can read what travels, and use the server: only inside a
    tunnel."""
    access_log: Path | None = None
    """File that gets a JSON line for every call: who, how much, how it ended; never content. Open
    to its user alone; SIGHUP opens it anew."""
    drain_s: float = ServerOptions.drain_s
    """After Ctrl-C or SIGTERM: how long streams in flight may go on while new ones are refused."""
    metrics_port: int | None = None
    """Port for Prometheus metrics and readiness, on loopback (needs the extra `server`)."""
    replicas: int = 0
    """Over 0: this many servers of the model, placed and supervised by Ray (needs the extra `ray`),
    behind this address. SIGHUP replaces them one by one."""
    max_replicas: int | None = None
    """With replicas: up to this many while streams wait for compute slots; default: no more than
    `replicas`."""
    replica_ports: str = "0-0"
    """With replicas: their ports, as FIRST-LAST, which edges have to reach; 0-0: any."""
    ray_address: str | None = None
    """With replicas: address of a Ray cluster, or auto; default: Ray on this machine alone."""
    replica_cpus: float = 1.0
    """With replicas: CPUs that Ray reserves for each."""
    replica_gpus: float = 0.0
    """With replicas: GPUs that Ray reserves for each; give device cuda as well."""

    @property
    def ports(self) -> tuple[int, int]:
        """`replica_ports` as numbers. Raises UsageError."""
        numbers = re.fullmatch(r"(\d{1,5})-(\d{1,5})", self.replica_ports)
        first, last = map(int, numbers.groups()) if numbers else (1, 0)
        if not 0 <= first <= last < 65536:
            raise UsageError(
                f"replica_ports: got {self.replica_ports!r}, want FIRST-LAST, for example "
                "50100-50199"
            )
        return first, last

    @property
    def tls_files(self) -> tuple[Path, Path] | None:
        """(certificate, key) of the server; None: plaintext."""
        if self.tls_cert is not None and self.tls_key is not None:
            return self.tls_cert, self.tls_key
        if self.keys is not None:
            return self.keys / "server.pem", self.keys / "server.key"
        return None

    @property
    def identities_file(self) -> Path | None:
        """The file of tenants, tokens and certificates; None: everybody may use the server."""
        return self.identities or (self.keys and self.keys / "identities.json")

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        expand_homes(self)
        self._check_replicas()
        self._check_protection()
        self._check_numbers()

    def _check_replicas(self) -> None:
        _ = self.ports
        most = self.max_replicas
        if self.replicas < 0 or (most is not None and most < max(1, self.replicas)):
            raise UsageError(
                f"replicas: got {self.replicas}, max_replicas {most}; want 0 or more, and no less"
            )

        if self.replicas and self.metrics_port is not None:
            raise UsageError(
                "metrics_port is of a single server: with replicas Ray's own metrics and the "
                "access log remain"
            )

    def _check_protection(self) -> None:
        """Plaintext, or access for everybody, beyond loopback has to be asked for."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("tls_cert and tls_key go together: give both or neither")
        encrypted = self.keys is not None or self.tls_cert is not None
        if self.client_ca is not None and not encrypted:
            raise UsageError("client_ca needs TLS: give keys, or tls_cert and tls_key")

        lists_tenants = self.keys is not None or self.identities is not None
        if not is_loopback(self.host) and not self.insecure:
            if not encrypted:
                raise UsageError(
                    f"host: {self.host} is not loopback, and everybody on the way could read and "
                    "change what travels: give keys (make them with `dlora keys init`) or tls_cert "
                    "and tls_key; or agree with --insecure"
                )
            if not lists_tenants and self.client_ca is None:
                raise UsageError(
                    f"host: {self.host} is not loopback, and anybody could use the server: give "
                    "keys, identities or client_ca; or agree with --insecure"
                )

        if self.client_ca is not None and not lists_tenants:
            raise UsageError(
                "client_ca needs identities: a certificate counts only if it is listed there"
            )

    def _check_numbers(self) -> None:
        check_seconds("drain_s", self.drain_s)
        check_seconds("edge_timeout_s", self.edge_timeout_s)
        for name in ("replica_cpus", "replica_gpus"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}: got {getattr(self, name)}, want 0 or more")
        for name in (
            "max_tokens",
            "max_length",
            "max_message_mib",
            "max_inflight_mib",
            "max_streams",
            "compute_slots",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, want at least 1")
        if self.prefix_mib < 0:
            raise UsageError(f"prefix_mib: got {self.prefix_mib}, want 0 or more")

        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads: got {self.threads}, want at least 1")
        if not 0 <= self.port < 65536:
            raise UsageError(f"port: got {self.port}, want 0 to 65535")
        if self.max_message_mib > 2047:
            raise UsageError(f"max_message_mib: got {self.max_message_mib}, gRPC allows up to 2047")


@dataclass(frozen=True, kw_only=True)
class KeysSettings:
    """Settings of `dlora keys`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "keys": "action folder tenant hosts days id limits output",
    }

    action: Literal["init", "server", "tenant", "token", "certificate", "revoke", "list"]
    """init: a new folder with authority and server certificate. server: a new server certificate.
    tenant: set a tenant's limits. token, certificate: give a tenant a new one. revoke: take back
    one, or all of a tenant. list: show what there is."""
    folder: Path = Path("keys")
    """Folder of keys. Keep it on the server, and open to nobody else."""
    tenant: str | None = None
    """Name of the tenant."""
    hosts: str = f"{LOOPBACK_NAME},{LOOPBACK_ADDRESS}"
    """With init and server: names and addresses by which edges reach the server, separated by
    commas."""
    days: int = 90
    """How many days a certificate or token is valid."""
    id: str | None = None
    """With revoke: id of a token or certificate; default: everything of `tenant`."""
    output: Path | None = None
    """With token: file that gets it, open to its user alone, in place of the screen."""
    limits: dict[str, float] = field(default_factory=dict)
    """With tenant: max_streams, max_inflight_mib, mib_per_hour, adapter_mib, weight."""

    def __post_init__(self) -> None:
        """Raises UsageError for actions that lack what they need."""
        expand_homes(self)
        if self.action in ("tenant", "token", "certificate") and self.tenant is None:
            raise UsageError(f"keys {self.action} needs --tenant NAME")
        if self.output is not None and self.action != "token":
            raise UsageError("output is of keys token")
        if self.action == "revoke" and (self.id is None) == (self.tenant is None):
            raise UsageError("keys revoke needs --id or --tenant, one of the two")


@dataclass(frozen=True, kw_only=True)
class StatusSettings:
    """Settings of `dlora status`."""

    GROUPS: ClassVar[dict[str, str]] = {"status": "metrics_port watch json"}

    metrics_port: int = 9464
    """The server's metrics port, on this machine."""
    watch: bool = False
    """Show it again every two seconds, until Ctrl-C."""
    json: bool = False
    """One JSON object in place of the table; with watch one a line."""
