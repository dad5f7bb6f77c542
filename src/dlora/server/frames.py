"""How large a peer's message may be, and how much it may hold: known before it is parsed.

Two bytes on the wire can become fifty in memory, so a message is looked over first: which fields it
has, at every depth, and how many of each. And the server asks for every frame, so it knows the
largest one that can come.   Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb

__all__ = ["Awaited", "Most", "Rules", "check_message", "rules_of"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; groups (3, 4) are never ours
_SKIPPED: Final = {_FIXED64: 8, _FIXED32: 4}
_MOST_UNKNOWN: Final = 16
"""Fields of a later version that one message may hold."""
_VALUE_BYTES: Final = 5
"""A uint32 takes at most so many bytes."""
_TENSOR_BYTES: Final = 128
"""Everything of a tensor but its data."""
_ROW_BYTES: Final = 34
"""What the widest codec adds to a row: rotated int4, which fills a row up to 64 values."""
_FIXED_BYTES: Final = 4096
"""Everything of a frame that does not grow with tokens, sites or modules."""
_SITE_BYTES: Final = 20
"""An entry of `Begin.sites` without its modules."""
_IDLE_BYTES: Final = 64
"""An entry of `Begin.idle`."""
_MOST_DROPOUTS: Final = 64
"""Adapters whose sum one hosted module may be."""


@dataclass(frozen=True)
class Most:
    """How often a field may stand in its message, and what may be inside."""

    count: int
    values: int = 1
    """Numbers in it, where it is a list of them."""
    inside: Rules = field(default_factory=dict)


Rules = Mapping[int, Most]
"""Field number -> how much of it; fields that are not listed may stand there once."""

_ONCE: Final = Most(1)
_TENSOR: Final = Most(1, inside={2: Most(8, 8)})


@dataclass(frozen=True)
class _Rules:
    """Those of the two messages that edges send."""

    frame: Rules
    put: Rules


def rules_of(description: pb.Description) -> _Rules:
    """What edges of the described model have a reason to send."""
    tokens = description.limits.max_tokens
    modules = sum(len(site.modules) for site in description.sites)
    widest = max((len(site.modules) for site in description.sites), default=1)
    # Every module has an output, which is a site as well.
    sites = Most(len(description.sites) + modules, inside={2: Most(widest, widest)})
    tensors = Most(widest, inside=_TENSOR.inside)

    # The fields of each frame that may be there more than once, or that hold such.
    begin = {
        8: Most(tokens, tokens),
        10: Most(tokens, tokens),
        11: sites,
        12: _TENSOR,
        16: Most(modules),
        17: sites,
        22: Most(modules, inside=dict.fromkeys((3, 4, 5, 6), _TENSOR) | {10: Most(_MOST_DROPOUTS)}),
        24: Most(1, inside={1: _ONCE}),
    }
    extend = {2: Most(tokens, tokens), 5: Most(tokens, tokens), 7: Most(tokens, tokens), 8: _TENSOR}

    # By the kind of the frame.
    return _Rules(
        frame={
            1: Most(1, inside=begin),
            2: Most(1, inside={2: tensors, 3: tensors}),
            3: Most(1, inside={1: _TENSOR}),
            4: Most(1, inside={2: _TENSOR}),
            5: Most(1, inside=extend),
        },
        put={2: Most(modules, inside={1: _TENSOR, 2: _TENSOR})},
    )


def check_message(data: bytes, rules: Rules, what: str) -> None:
    """Raises WireError for a message that is none, or that holds more than its rules say."""
    _check(memoryview(data), 0, len(data), rules, what)


def _check(data: memoryview, at: int, end: int, rules: Rules, what: str) -> None:
    counts: dict[int, int] = {}
    unknown = 0
    while at < end:
        tag, at = _varint(data, at, end, what)
        number, kind = tag >> 3, tag & 7
        start = at
        if kind == _VARINT:
            _, at = _varint(data, at, end, what)
        elif kind == _BYTES:
            size, start = _varint(data, at, end, what)
            at = start + size
        elif kind in _SKIPPED:
            at += _SKIPPED[kind]
        else:
            raise WireError(f"{what}: got wire type {kind}, want protobuf without groups")
        if at > end:
            raise WireError(f"{what}: a field ends {at - end} bytes behind its message")

        # Above the highest field of today stands what a later version may add.
        most = rules.get(number, _ONCE)
        counts[number] = counts.get(number, 0) + 1
        unknown += number > 64
        if counts[number] > most.count or unknown > _MOST_UNKNOWN:
            raise WireError(f"{what}: got more than {most.count} of field {number}")
        if kind == _BYTES and most.inside:
            _check(data, start, at, most.inside, what)
        elif kind == _BYTES and most.values > 1 and at - start > most.values * _VALUE_BYTES:
            raise WireError(
                f"{what}: got {at - start} bytes of numbers in field {number}, want at most "
                f"{most.values} numbers"
            )


def _varint(data: memoryview, at: int, end: int, what: str) -> tuple[int, int]:
    """(value, where the next byte is)."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise WireError(f"{what}: got a number without end")


class Awaited:
    """The largest frame that an edge may send next on one stream, in bytes.

    Told of every frame in both directions: `sent`, `received`.
    """

    def __init__(self, description: pb.Description) -> None:
        self._sites = [
            (site.in_features, [module.out_features for module in site.modules])
            for site in description.sites
        ]
        outputs = [out for _, outs in self._sites for out in outs]
        self._sites += [(out, [out]) for out in outputs]
        self._num_modules = len(outputs)
        self._entry_width = max(description.embedding_width, description.layers.width)

        self._hidden_width = max(description.hidden_width, self._entry_width)
        self._most_tokens = description.limits.max_tokens

        # A first frame may bring the modules that the cloud is to compute, of any rank.
        self.most = self.entry_bytes(self._most_tokens) + self._hosted_bytes(description)
        self.room = 0
        """The largest frame of a pass behind its first, in bytes."""
        self._active: list[int] = []
        self._tokens = self._batch = 0
        self._is_training = self._is_factored = self._has_cache = False

    def entry_bytes(self, tokens: int) -> int:
        """A `Begin` or `Extend` of so many tokens: rows, and mask, position, kept and order."""
        listed = sum(_SITE_BYTES + _VALUE_BYTES * len(outs) for _, outs in self._sites)
        entry = tokens * (4 * self._entry_width + _ROW_BYTES + 1 + 3 * _VALUE_BYTES)
        return entry + 2 * listed + _IDLE_BYTES * self._num_modules + _FIXED_BYTES

    @staticmethod
    def _hosted_bytes(description: pb.Description) -> int:
        """All modules at the highest rank that a cloud takes, in float32."""
        pairs = [
            (site.in_features, m.out_features) for site in description.sites for m in site.modules
        ]
        values = sum((max(pair) + 1) * sum(pair) + max(pair) for pair in pairs)
        return int(
            min(4 * values + 8 * _TENSOR_BYTES * len(pairs), description.limits.max_message_bytes)
        )

    def check(self, size: int) -> None:
        """Raises WireError for a frame of a size that cannot be the one that is awaited."""
        if size > self.most:
            raise WireError(f"got a frame of {size} bytes, want at most {self.most} here")

    def received(self, frame: pb.EdgeFrame, size: int) -> bool:
        """Note a frame; return whether it is the first of a pass.

        Raises WireError for one that is larger than its own tokens explain.
        """
        kind = frame.WhichOneof("kind")
        if kind == "begin":
            begin = frame.begin
            self._batch, length = begin.batch, begin.length
            self._is_training, self._is_factored = begin.training, begin.factored
            self._has_cache = begin.cache_length > 0
            self._active = [entry.site for entry in begin.sites if entry.site < len(self._sites)]
            # Modules explain themselves: their shapes are checked before anything is allocated.
            size -= sum(module.ByteSize() for module in begin.modules)
            if begin.hosted:
                self._active = []  # no site is asked for
        elif kind == "extend":
            self._batch, length = len(frame.extend.order) or self._batch, frame.extend.length
        else:
            return False

        self._tokens = min(self._batch * length, self._most_tokens)
        if size > (most := self.entry_bytes(self._tokens)):
            raise WireError(
                f"got a frame of {size} bytes for {self._tokens} tokens, want at most {most}"
            )
        answers = [self._deltas(site) for site in self._active]
        if self._is_training:
            answers += [self._rows(self._sites[site][0]) for site in self._active]
            answers.append(self._rows(self._hidden_width))
        self.room = max(answers, default=0)
        return True

    def sent(self, frame: pb.CloudFrame) -> None:
        """A frame of the cloud, which the edge will answer."""
        kind = frame.WhichOneof("kind")
        if kind == "input":
            self.most = self._deltas(frame.input.site)
        elif kind == "delta_grads":
            self.most = self._rows(self._sites[frame.delta_grads.site][0])
        elif kind == "hidden" and self._has_cache:
            self.most = self.entry_bytes(self._most_tokens)
        elif kind == "hidden":
            shape = frame.hidden.hidden.shape
            self.most = self._rows(int(shape[1]) if len(shape) == 2 else 0)

    def _rows(self, width: int) -> int:
        """One tensor with a row for each token."""
        return self._tokens * (4 * width + _ROW_BYTES) + _TENSOR_BYTES * 2

    def _deltas(self, site: int) -> int:
        """The answer at a site; factored: ranks may go up to the larger width."""
        inputs, outs = self._sites[site]
        if not self._is_factored:
            return self._rows(sum(outs)) + _TENSOR_BYTES * len(outs)
        rank = [max(inputs, out) for out in outs]
        factors = sum(out * (4 * r + _ROW_BYTES) for out, r in zip(outs, rank, strict=True))
        rows = sum(self._rows(r) for r in rank)
        return rows + factors + 2 * _TENSOR_BYTES * len(outs)
