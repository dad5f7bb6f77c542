"""Settings of `dlora tinker`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal

from dlora.edge.options import InFlight, SplitOptions, check_in_flight
from dlora.edge.settings import EdgeSettings
from dlora.errors import UsageError

__all__ = ["KEY_PREFIX", "TinkerSettings"]

KEY_PREFIX: Final = "tml-"
"""How every API key begins that the SDK sends."""


@dataclass(frozen=True, kw_only=True)
class TinkerSettings(EdgeSettings):
    """Settings of `dlora tinker`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "connection": f"{EdgeSettings.GROUPS['connection']} in_flight",
        "the interface": "name port api_key",
        "adapters": "output lora_alpha max_adapters",
        "passes": "batch_size head_positions",
        "privacy": f"{EdgeSettings.GROUPS['privacy']} record",
        "computing": EdgeSettings.GROUPS["computing"],
    }

    in_flight: InFlight = SplitOptions.in_flight
    """Parts of a training micro-batch that travel at the same time, so that their waits overlap."""
    output: Path = Path("runs/tinker")
    """Folder for what clients save, as tinker://RUN/weights/NAME and
    tinker://RUN/sampler_weights/NAME: each is a standard adapter folder."""
    name: str | None = None
    """Base model name that clients ask for. Default: the served model's id."""
    port: int = 8001
    """Port on 127.0.0.1 to listen on; 0 picks a free one."""
    api_key: str | None = None
    """Key that clients must send, beginning with tml-. Default: any. It is better given as
    $DLORA_API_KEY than on a command line, which others can see."""
    lora_alpha: int = 32
    """LoRA alpha of new adapters, whatever their rank: the SDK has no field for it."""
    max_adapters: int = 8
    """Adapters in training at once. Each has its weights, gradients and optimizer in memory."""
    batch_size: int = 8
    """Rows of a micro-batch, in training and in sampling. Requests may be longer."""
    head_positions: Literal["supervised", "all"] = "supervised"
    """Where log-probabilities are computed in forward_backward: where a weight or an advantage asks
    for them (others come back as 0), or at every token, which costs the edge more."""
    record: int = 0
    """Record this many micro-batches of the first adapter for `dlora audit`, with the text they
    came from, in `output`/recording: the folder then holds private data."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        if not 0 <= self.port < 65536:
            raise UsageError(f"port: got {self.port}, want 0 to 65535")
        for name in ("lora_alpha", "max_adapters", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, want at least 1")
        check_in_flight(self.in_flight, self.wire)
        if self.record < 0:
            raise UsageError(f"record: got {self.record}, want 0 or more")
        if self.record and self.in_flight != 1:
            raise UsageError(f"record keeps whole micro-batches: got in_flight {self.in_flight}")
        if self.api_key is not None and not self.api_key.startswith(KEY_PREFIX):
            raise UsageError(f"api_key: the SDK sends only keys that begin with {KEY_PREFIX}")
