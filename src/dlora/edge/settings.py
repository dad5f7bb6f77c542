"""Settings of every command that talks to a server, and of those on the edge. Loads no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dlora.edge.link import RetryPolicy
from dlora.edge.noise import Noise
from dlora.edge.options import SplitOptions, Wire, check_consent, check_edge_layers
from dlora.errors import UsageError
from dlora.files import expand_homes, read_secret

__all__ = ["AccessSettings", "EdgeSettings", "InfoSettings", "target_names"]


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """How an edge shows who it is, and knows whom it talks to."""

    GROUPS: ClassVar[dict[str, str]] = {
        "connection": "tls tls_ca tls_cert tls_key token_file",
    }
    """Headline of the help -> names of settings, for this class and for each that adds to it."""

    tls: bool = False
    """Encrypt, and trust the public authorities. Not needed with tls_ca."""
    tls_ca: Path | None = None
    """Encrypt, and trust this authority instead: a PEM file, ca.pem of `dlora keys`."""
    tls_cert: Path | None = None
    """Client certificate, as a PEM file, where the server asks for one."""
    tls_key: Path | None = None
    """Key of the client certificate, as a PEM file."""
    token_file: Path | None = None
    """File with the token that says who this is; it is read again when the server does not take the
    token any more. The token can also be in $DLORA_TOKEN."""

    def __post_init__(self) -> None:
        """Raises UsageError for paths in a home that is not there."""
        expand_homes(self)

    @property
    def access(self) -> dict[str, Any]:
        """Keyword arguments of `grpc_link.Access`.

        Raises UsageError for a token file that others can read.
        """
        token = (
            os.environ.get("DLORA_TOKEN")
            if self.token_file is None
            else read_secret(self.token_file)
        )
        return {
            "tls": self.tls,
            "ca": self.tls_ca,
            "certificate": self.tls_cert,
            "key": self.tls_key,
            "token": token,
            "token_file": self.token_file,
        }


@dataclass(frozen=True, kw_only=True)
class EdgeSettings(AccessSettings):
    """What every command on the edge needs to reach a server."""

    GROUPS: ClassVar[dict[str, str]] = {
        "connection": "server tls tls_ca tls_cert tls_key token_file wire wire_dtype "
        "give_up_after_s",
        "computing": "device",
        "privacy": "edge_first edge_last noise_entry noise_clip upload_consent",
    }

    server: str
    """Address of `dlora serve`, as host:port. Several servers of the same model are separated by
    commas: where one is lost the next is taken."""
    wire: Wire = SplitOptions.wire
    """How deltas travel. factored: in training as two exact factors, several times fewer bytes; the
    cloud then sees the factor B. hosted: not at all; the cloud gets the active modules and computes
    them, in two round trips a micro-batch. It sees the adapter: that needs upload_consent."""
    wire_dtype: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp16"
    """How tensors travel. fp32 is exact. fp16 and bf16 halve the traffic. int8 and int4 round what
    is large, int4 more. Factors keep 16 bits, and so does a hosted adapter, but with int4.
    docs/wire-protocol.md has the bytes and the errors."""
    give_up_after_s: float = RetryPolicy.give_up_after_s
    """How long to wait for a lost server, in seconds."""
    device: str = "cpu"
    """Device of the edge's half."""
    edge_first: int = 0
    """Run this many of the first decoder layers here, where the server allows it. Tokens are then
    harder to read from what leaves. It costs their weights and compute."""
    edge_last: int = 0
    """The same for the last layers. Labels are then harder to read from gradients."""
    noise_entry: float = Noise.entry
    """Normal noise on every row that goes into the cloud, as a share of the row's length. It is no
    differential privacy: docs/privacy.md says what it hides and what it costs."""
    noise_clip: float = Noise.clip
    """With noise: rows longer than this many times the median are shortened first."""

    upload_consent: bool = False
    """Agree that the cloud sees weights of the adapter. `--wire hosted` needs it, which sends the
    active modules, and so do kr_options '{idle: cloud}', which upload idle modules, frozen."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work with any server."""
        super().__post_init__()
        check_consent(self.wire, self.upload_consent)
        check_edge_layers(self.edge_first, self.edge_last)
        _ = self.noise  # checks itself

    @property
    def noise(self) -> Noise:
        """What is added to what leaves."""
        return Noise(entry=self.noise_entry, clip=self.noise_clip)

    @property
    def edge_layers(self) -> tuple[int, int]:
        """(first, last), as `get_peft_model` takes them."""
        return self.edge_first, self.edge_last


@dataclass(frozen=True, kw_only=True)
class InfoSettings(AccessSettings):
    """Settings of `dlora info`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "what to look at": "server adapter",
        **AccessSettings.GROUPS,
    }

    server: str | None = None
    """Address of `dlora serve`, as host:port."""
    adapter: Path | None = None
    """Adapter folder, as `dlora train` or peft writes it; with `server`, whether the two fit."""

    def __post_init__(self) -> None:
        """Raises UsageError if there is nothing to look at."""
        super().__post_init__()
        if self.server is None and self.adapter is None:
            raise UsageError("give --server, --adapter, or both")


def target_names(given: list[str] | str | None) -> list[str] | str | None:
    """Plain names as a list, a regular expression as it is."""
    if isinstance(given, str) and re.fullmatch(r"\w+(,\w+)*|\[\w+(, *\w+)*\]", given):
        return [name.strip() for name in given.strip("[]").split(",")]
    return given
