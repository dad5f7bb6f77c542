"""Settings of `dlora audit`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dlora.edge.settings import AccessSettings
from dlora.errors import UsageError

__all__ = ["AuditSettings"]


@dataclass(frozen=True, kw_only=True)
class AuditSettings(AccessSettings):
    """Settings of `dlora audit`."""

    run: Path
    """Folder of a run, made with `dlora train --record 24 ...`."""
    server: str
    """Address of `dlora serve` with the run's model, as host:port: the attacker's own text runs
    through it.
    """
    public: str | None = None
    """Text that an attacker could have, in the forms of training data; the closer to the run's own,
    the more it recovers. Default: the messages of the demo."""
    output: Path = Path("audit")
    """Folder for audit.json and audit.html; both hold figures alone, no text."""
    rows: int = 128
    """At most this many recorded rows of data are attacked; an in-domain attacker learns from as
    many others."""
    sites: int = 8
    """At most this many sites are attacked, evenly spread, with the lowest and the highest."""
    match: int = 0
    """Over 0: this many rows are also attacked by trying tokens in the model itself, one position
    after the other. This recovers more than a linear map from public text does, and is slow: some
    minutes for 8 short rows."""
    seed: int = 0
    """Seed of which rows the attacker knows."""
    give_up_after_s: float = 600.0
    """How long a lost server is waited for, in seconds."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        for name in ("rows", "sites"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, want at least 1")
