"""Frozen modules that edges let the cloud apply: kept for their owner by the hash of their content.

The longest unused are dropped: an owner's own beyond its share, and of whoever holds most beyond
the whole.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from dlora.errors import UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import content_hash, decode, largest

__all__ = ["AdapterStore"]


class AdapterStore:
    """At most `max_bytes` of modules as float32 pairs (A [r, in], B [out, r]) on the model's
    device.
    """

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self.max_bytes, self.device = max_bytes, device
        self.stored_bytes = 0
        self._modules: OrderedDict[tuple[str, bytes], tuple[Tensor, Tensor]] = OrderedDict()
        self._owned: dict[str, int] = {}
        self._lock = threading.Lock()

    def put(
        self, message: pb.FrozenModule, owner: str = "local", owner_bytes: int | None = None
    ) -> bytes:
        """Keep a module; return its hash. An owner keeps up to `owner_bytes`, if that is given.

        Raises WireError for tensors that do not fit together, UsageError for one that never has
        room.
        """
        if (
            len(message.a.shape) != 2
            or len(message.b.shape) != 2
            or message.a.shape[0] != message.b.shape[1]
        ):
            raise WireError(
                f"frozen module: got shapes {list(message.a.shape)[:8]} and "
                f"{list(message.b.shape)[:8]}"
            )
        size = 4 * (
            message.a.shape[0] * message.a.shape[1] + message.b.shape[0] * message.b.shape[1]
        )
        most = self.max_bytes if owner_bytes is None else min(owner_bytes, self.max_bytes)
        if size > most:
            raise UsageError(
                f"a frozen module of {size} bytes is over this server's limit of {most}"
            )
        a, b = (decode(one, tuple(one.shape), "frozen module") for one in (message.a, message.b))
        if not largest(a) < float("inf") or not largest(b) < float("inf"):
            raise WireError("frozen module: got values that are not finite")
        key = (owner, content_hash(message))
        with self._lock:
            if key not in self._modules:
                self._modules[key] = (a.to(self.device), b.to(self.device))
                self.stored_bytes += size
                self._owned[owner] = self._owned.get(owner, 0) + size
            self._modules.move_to_end(key)
            while self._owned[owner] > most:
                self._drop(next(other for other in self._modules if other[0] == owner))
            while self.stored_bytes > self.max_bytes:
                largest_owner = max(self._owned, key=lambda name: self._owned[name])
                self._drop(next(other for other in self._modules if other[0] == largest_owner))
        return key[1]

    def get(self, key: bytes, owner: str = "local") -> tuple[Tensor, Tensor] | None:
        """The owner's module with this hash, if it is still there."""
        with self._lock:
            found = self._modules.get((owner, key))
            if found is not None:
                self._modules.move_to_end((owner, key))
            return found

    def _drop(self, key: tuple[str, bytes]) -> None:
        a, b = self._modules.pop(key)
        self.stored_bytes -= a.nbytes + b.nbytes
        self._owned[key[0]] -= a.nbytes + b.nbytes
