"""What `dlora serve` says before it is ready: what is served, to whom, and how an edge gets it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from dlora.cli.lines import shell
from dlora.cloud.placement import places
from dlora.cloud.quantize import weight_bytes
from dlora.protocol.address import LOOPBACK_ADDRESS
from dlora.server.identities import Identities
from dlora.server.settings import ServeSettings
from dlora.training.readable import counted, readable_bytes

__all__ = ["reached", "served"]

_SOON: Final = timedelta(days=14)
_SHOWN: Final = 5
"""Names of tenants and of what expires; the rest is counted."""
_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104  # named here, not listened on


def served(settings: ServeSettings, cloud: Any, loaded: Any) -> Iterator[tuple[str, str]]:
    """(name, text) pairs: the model, what may be adapted, and what it takes."""
    weights = "" if settings.quantize == "none" else f", {settings.quantize} weights"
    on = places(loaded.model) or settings.device
    yield (
        "model",
        f"{loaded.model_id}, {settings.dtype}{weights} on {on}, "
        f"fingerprint {cloud.fingerprint[:12]}",
    )
    modules = sum(module.allowed for site in cloud.sites for module in site.modules)
    fused = sum(module.allowed for site in cloud.experts for module in site.modules)
    beside = f", and {counted(fused, 'fused weight')} of experts (hosted wire)" if fused else ""
    yield (
        "adapters",
        f"{counted(modules, 'module')} at {counted(len(cloud.sites), 'site')} may be adapted"
        f"{beside}",
    )
    beside = ", beside what its edge answers" if settings.recompute else ""
    yield (
        "memory",
        f"{readable_bytes(weight_bytes(loaded.model))} of weights, "
        f"{readable_bytes(cloud.memory.training[0])} of activations a training token{beside}",
    )


def reached(
    settings: ServeSettings, address: str, metrics_port: int | None
) -> Iterator[tuple[str, str]]:
    """(name, text) pairs: who may call, what ends soon, metrics, and what an edge types."""
    file = settings.identities_file
    wire = "TLS" if settings.tls_files else "plaintext"
    if file is None:
        yield "access", f"{wire}, everybody who reaches it: no identities are given"
    else:
        identities = Identities(file)
        yield "access", f"{wire}, identities: {file}"
        names = sorted(identities.tenants())
        yield "tenants", f"{len(names)}{': ' if names else ''}{_some(names)}"
        if not names:
            words = ["dlora", "keys", "token", *_folder(settings), "--tenant", "NAME"]
            yield "", f"nobody may call yet: {shell(words)}"
        yield from _expiring(settings, identities)

    if metrics_port is not None:
        yield "metrics", f"http://{LOOPBACK_ADDRESS}:{metrics_port}/metrics (and /readyz)"
        yield "", f"dlora status --metrics_port {metrics_port}"
    yield "edge", shell(_edge(settings, address))


def _expiring(settings: ServeSettings, identities: Identities) -> Iterator[tuple[str, str]]:
    """Tokens and certificates that have ended or will soon, and what makes new ones."""
    now = datetime.now(UTC)
    ending = identities.expiring(now + _SOON)
    for end, kind, name, tenant in ending[:_SHOWN]:
        days = (end - now).days
        when = "has ended" if end <= now else f"ends in {counted(days, 'day')}"
        yield "expires", f"{kind} {name[:16]} of {tenant} {when} ({end:%Y-%m-%d})"
    if len(ending) > _SHOWN:
        yield "", f"and {len(ending) - _SHOWN} more: dlora keys list"
    if ending:
        _, kind, _, tenant = ending[0]
        yield "", shell(["dlora", "keys", kind, *_folder(settings), "--tenant", tenant])


def _folder(settings: ServeSettings) -> list[str]:
    return [] if settings.keys is None else ["--folder", str(settings.keys)]


def _edge(settings: ServeSettings, address: str) -> list[str]:
    """The command of an edge; what only its user knows is in capitals."""
    host, _, port = address.rpartition(":")
    server = f"HOST:{port}" if host.strip("[]") in _EVERYWHERE else address
    words = ["dlora", "train", "--server", server]
    if settings.keys is not None:
        words += ["--tls_ca", "ca.pem"]
    elif settings.tls_files:
        words.append("--tls")
    if settings.client_ca is not None:
        words += ["--tls_cert", "NAME.pem", "--tls_key", "NAME.key"]
    elif settings.identities_file is not None:
        words += ["--token_file", "NAME.token"]
    return [*words, "--data", "private.jsonl", "--output", "runs/mine"]


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
