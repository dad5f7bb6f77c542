"""Frozen modules that edges let the cloud apply: kept by the hash of their content, the oldest dropped first."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from dlora.errors import UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.wire import content_hash, decode, largest

__all__ = ["AdapterStore"]


class AdapterStore:
    """At most `max_bytes` of modules as float32 pairs (A [r, in], B [out, r]) on the model's device."""

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self.max_bytes, self.device = max_bytes, device
        self.held_bytes = 0
        self._modules: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, message: pb.FrozenModule) -> bytes:
        """Keep a module; return its hash. Raises WireError for tensors that do not fit together."""
        if len(message.a.shape) != 2 or len(message.b.shape) != 2 or message.a.shape[0] != message.b.shape[1]:
            raise WireError(f"frozen module: got shapes {list(message.a.shape)[:8]} and {list(message.b.shape)[:8]}")
        size = 4 * (message.a.shape[0] * message.a.shape[1] + message.b.shape[0] * message.b.shape[1])
        if size > self.max_bytes:
            raise UsageError(f"a frozen module of {size} bytes is over this server's limit of {self.max_bytes}")
        a, b = (decode(one, tuple(one.shape), "frozen module") for one in (message.a, message.b))
        if not largest(a) < float("inf") or not largest(b) < float("inf"):
            raise WireError("frozen module: got values that are not finite")
        key = content_hash(message)
        with self._lock:
            if key not in self._modules:
                self._modules[key] = (a.to(self.device), b.to(self.device))
                self.held_bytes += size
            self._modules.move_to_end(key)
            while self.held_bytes > self.max_bytes:
                _, (old_a, old_b) = self._modules.popitem(last=False)
                self.held_bytes -= old_a.nbytes + old_b.nbytes
        return key

    def get(self, key: bytes) -> tuple[Tensor, Tensor] | None:
        """The module with this hash, if it is still there."""
        with self._lock:
            found = self._modules.get(key)
            if found is not None:
                self._modules.move_to_end(key)
            return found
