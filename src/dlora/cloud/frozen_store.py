"""What edges let the cloud keep: modules by the hash of their content, prefixes by name.

Frozen modules that the cloud applies, active ones that several requests refer to ("hosted"), and
what enters a layer for a sequence that comes again ("prefix").

Each belongs to its owner alone. The longest unused are dropped: an owner's own beyond its share,
and beyond the whole those of whoever holds most.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Final

import torch
from torch import Tensor

from dlora.errors import UsageError, WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import content_hash, decode, largest

__all__ = ["MODULE_BYTES", "FrozenStore", "check_frozen_shape"]

MODULE_BYTES: Final = 2048
"""What a module, or a prefix, takes beside its numbers: tensors, key, entry."""

_Entries = OrderedDict[tuple[str, bytes], tuple[Tensor | None, ...]]
"""By kind and hash or name, the longest unused first: nothing is taken for one of another kind."""


class FrozenStore:
    """At most `max_bytes` of tensors: float32 pairs (A [r, in], B [out, r]) on the model's device.

    Prefixes are in a store of their own, with a limit of its own.
    """

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self.max_bytes, self.device = max_bytes, device
        self.stored_bytes = 0
        # By owner: whoever has to give is not searched for among the entries of all others.
        self._modules: dict[str, _Entries] = {}
        self._owned: dict[str, int] = {}
        self._lock = threading.Lock()

    def put(
        self, message: pb.FrozenModule, owner: str = "local", owner_bytes: int | None = None
    ) -> bytes:
        """Keep a module; return its hash. An owner keeps up to `owner_bytes`, if that is given.

        Raises WireError for tensors that do not fit together or are not finite, UsageError for a
        module that never has room.
        """
        most = self.max_bytes if owner_bytes is None else min(owner_bytes, self.max_bytes)
        a, b = _checked(message, most)
        key = (owner, "frozen", content_hash(message))
        self._keep(key, (a.to(self.device), b.to(self.device)), most)
        return key[2]

    def get(
        self, key: bytes, owner: str = "local", device: torch.device | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """The owner's module with this hash, if it is still there.

        It moves to `device` and stays there, where the linear is that it sits on.
        """
        place = (owner, "frozen", key)
        a, b = self._find(place) or (None, None)
        if a is None or b is None:
            return None
        if device is not None and a.device != device:
            a, b = a.to(device), b.to(device)
            with self._lock:
                if place[1:] in self._modules.get(owner, ()):
                    self._modules[owner][place[1:]] = (a, b)
        return a, b

    def put_hosted(
        self,
        key: bytes,
        tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        owner: str,
        owner_bytes: int | None,
    ) -> None:
        """Keep an active module under its hash, if there is room for it."""
        most = self.max_bytes if owner_bytes is None else min(owner_bytes, self.max_bytes)
        if _size(tensors) <= most:
            self._keep((owner, "hosted", key), tensors, most)

    def get_hosted(
        self, key: bytes, owner: str
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
        """A, B and their biases of the owner's active module with this hash, if still there."""
        a, b, a_bias, b_bias = self._find((owner, "hosted", key)) or (None, None, None, None)
        return None if a is None or b is None else (a, b, a_bias, b_bias)

    def put_prefix(self, layer: int, name: bytes, prefix_TD: Tensor, owner: str) -> None:
        """Keep what enters a layer for a sequence, if it is not here and there is room for it."""
        key = (owner, f"prefix {layer}", name)
        if self._find(key) is None and _size([prefix_TD]) <= self.max_bytes:
            self._keep(key, (prefix_TD.to(self.device, copy=True),), self.max_bytes)

    def get_prefix(self, layer: int, name: bytes, owner: str) -> Tensor | None:
        """What the owner's sequence of this name gives before a layer, if it is still there."""
        (prefix_TD,) = self._find((owner, f"prefix {layer}", name)) or (None,)
        return prefix_TD

    def owned_bytes(self) -> dict[str, int]:
        """What is kept, by owner."""
        with self._lock:
            return dict(self._owned)

    def _keep(
        self, key: tuple[str, str, bytes], tensors: tuple[Tensor | None, ...], most: int
    ) -> None:
        """Keep tensors, and drop what is then too much."""
        owner, kind, name = key
        with self._lock:
            entries = self._modules.setdefault(owner, OrderedDict())
            if (kind, name) not in entries:
                entries[kind, name] = tensors
                self.stored_bytes += _size(tensors)
                self._owned[owner] = self._owned.get(owner, 0) + _size(tensors)
            entries.move_to_end((kind, name))

            while self._owned[owner] > most:
                self._drop_oldest(owner)
            while self.stored_bytes > self.max_bytes:
                self._drop_oldest(max(self._owned, key=lambda one: self._owned[one]))

    def _find(self, key: tuple[str, str, bytes]) -> tuple[Tensor | None, ...] | None:
        owner, kind, name = key
        with self._lock:
            entries = self._modules.get(owner)
            if entries is None or (kind, name) not in entries:
                return None
            entries.move_to_end((kind, name))
            return entries[kind, name]

    def keep_owners(self, owners: Collection[str]) -> None:
        """Drop what everybody else had: they have nobody left who could ask for it."""
        with self._lock:
            for owner in self._owned.keys() - owners:
                self.stored_bytes -= self._owned.pop(owner)
                del self._modules[owner]

    def _drop_oldest(self, owner: str) -> None:
        _, tensors = self._modules[owner].popitem(last=False)
        self.stored_bytes -= _size(tensors)
        self._owned[owner] -= _size(tensors)


def check_frozen_shape(message: pb.FrozenModule, widths: Collection[tuple[int, int]]) -> None:
    """Raises WireError for a module that fits none of the linears with these (in, out) widths.

    Nor may its rank be over both widths.
    """
    a, b = list(message.a.shape[:3]), list(message.b.shape[:3])
    fits = len(a) == len(b) == 2 and (a[1], b[0]) in widths and 1 <= a[0] == b[1] <= max(a[1], b[0])
    if not fits:
        raise WireError(
            f"frozen module: got shapes {a} and {b}, want [rank, in] and [out, rank] of a module "
            "that is served"
        )


def _size(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors that there are, and of what a module takes beside them."""
    return MODULE_BYTES + sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _checked(message: pb.FrozenModule, most: int) -> tuple[Tensor, Tensor]:
    """(A, B) on the CPU, of no more than `most` bytes; the size is checked before it is made."""
    a_shape, b_shape = list(message.a.shape), list(message.b.shape)
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1]:
        raise WireError(f"frozen module: got shapes {a_shape[:8]} and {b_shape[:8]}")
    if 0 in (*a_shape, *b_shape):
        raise WireError("frozen module: got a tensor of no size, want rank and widths over 0")
    size = MODULE_BYTES + 4 * (a_shape[0] * a_shape[1] + b_shape[0] * b_shape[1])
    if size > most:
        raise UsageError(f"a frozen module of {size} bytes is over this server's limit of {most}")

    a, b = decode(message.a, a_shape, "frozen module"), decode(message.b, b_shape, "frozen module")
    if not largest(a) < float("inf") or not largest(b) < float("inf"):
        raise WireError("frozen module: got values that are not finite")
    return a, b
