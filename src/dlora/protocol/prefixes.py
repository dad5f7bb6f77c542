"""Prefixes: what the frozen layers below every adapter make of a sequence, and its name.

Nothing is trained below the lowest active site. So what enters its layer is the same whenever the
sequence comes again, and a cloud that has kept it need not be sent the sequence.
"""

from __future__ import annotations

from typing import Final

from dlora.proto import dlora_pb2 as pb

__all__ = ["NAME_BYTES", "num_rows"]

NAME_BYTES: Final = 16
"""Of a prefix's name: 2^64 of them before two are likely to be alike."""


def num_rows(message: pb.Begin | pb.Extend) -> int:
    """Rows that travel in the tensors of a pass: tokens that are attended to, as a rule.

    Nothing is checked here; a message without sense has a number without sense.
    """
    if shape := message.embeddings.shape:
        return int(shape[0])
    if isinstance(message, pb.Extend):
        return 0
    mask = message.attention_mask
    return mask.count(1) if mask else message.batch * message.length
