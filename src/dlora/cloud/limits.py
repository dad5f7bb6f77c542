"""What one request may cost a cloud, and how much of its model an edge may get. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from dlora.protocol.channel import MAX_MESSAGE_BYTES

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one micro-batch may cost. Checked before anything is computed."""

    max_tokens: int = 16_384
    """Tokens of a micro-batch, padding included."""

    max_length: int = 8_192
    """Tokens of one sequence; the model's own limit applies too."""

    max_message_bytes: int = MAX_MESSAGE_BYTES
    """Bytes of one frame, in either direction."""

    max_inflight_bytes: int = 8 * 2**30
    """Activations held for all micro-batches in flight."""

    max_adapter_bytes: int = 2**30
    """Frozen modules that edges let the cloud apply; the longest unused go first."""

    max_prefix_bytes: int = 2**30
    """Prefixes of sequences that come again, in the memory of the host; the longest unused go
    first. 0: none are kept."""

    edge_first: int = 0
    """How many of the first decoder layers edges may get and run themselves, and ..."""

    edge_last: int = 0
    """... how many of the last."""

    recompute: bool = False
    """Keep less of every micro-batch that trains, and run its layers again in backward."""
