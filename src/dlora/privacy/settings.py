"""Settings of `dlora audit`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dlora.edge.settings import AccessSettings
from dlora.errors import UsageError

__all__ = ["AuditSettings"]


@dataclass(frozen=True, kw_only=True)
class AuditSettings(AccessSettings):
    """Settings of `dlora audit`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "connection": f"server {AccessSettings.GROUPS['connection']} give_up_after_s",
        "attacks": "run public rows sites match seed",
        "result": "output",
    }

    run: Path
    """Folder of a run, made with `dlora train --record 24 ...`."""
    server: str
    """Address of `dlora serve` with the run's model, as host:port. The attacker's own text runs
    through it."""
    public: str | None = None
    """Text that an attacker could have, in the forms of training data. The closer to the run's own,
    the more it recovers. Default: the messages of the demo."""
    output: Path = Path("audit")
    """Folder for audit.json and audit.html. Both hold figures alone, no text."""
    rows: int = 128
    """At most this many recorded rows of data are attacked. An in-domain attacker learns from as
    many others."""
    sites: int = 8
    """At most this many sites are attacked, evenly spread, lowest and highest among them."""
    match: int = 0
    """Over 0: this many rows are also attacked by trying tokens in the model itself, one position
    after the other. That gets more than a linear map from public text does. It is slow: some
    minutes for 8 short rows."""
    seed: int = 0
    """Seed of which rows the attacker knows."""
    give_up_after_s: float = 600.0
    """How long to wait for a lost server, in seconds."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        for name in ("rows", "sites"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, want at least 1")
