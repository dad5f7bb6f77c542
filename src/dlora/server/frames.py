"""What an edge's message may hold, and how large it may be: known before it is parsed.

The server asks for every frame, so it knows the largest one that can come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dlora.errors import WireError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PUT_BYTES
from dlora.protocol.message_parts import MODULE, ONCE, TENSOR, VALUE_BYTES, Most, Rules
from dlora.protocol.prefixes import NAME_BYTES

__all__ = ["Awaited", "largest_message", "rules_of"]

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
_HOSTED_BYTES: Final = 64 + 16 * _MOST_DROPOUTS
"""An entry of `Begin.modules`."""


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
    # Every module has an output, which is a site as well; so is every fused weight of experts.
    num_sites = len(description.sites) + modules + len(description.experts)
    sites, hosted = Most(num_sites, inside={2: Most(widest, widest)}), num_sites
    tensors = Most(widest, inside=TENSOR.inside)

    # The fields of each frame that may be there more than once, or that hold such.
    begin = {
        8: Most(tokens, tokens),
        10: Most(tokens, tokens),
        11: sites,
        12: TENSOR,
        16: Most(modules),
        17: sites,
        22: Most(hosted, inside={9: Most(_MOST_DROPOUTS)}),
        24: Most(1, inside={1: ONCE}),
        27: Most(1, inside={1: ONCE}),
    }
    extend = {2: Most(tokens, tokens), 5: Most(tokens, tokens), 7: Most(tokens, tokens), 8: TENSOR}

    # By the kind of the frame.
    return _Rules(
        frame={
            1: Most(1, inside=begin),
            2: Most(1, inside={2: tensors, 3: tensors}),
            3: Most(1, inside={1: TENSOR}),
            4: Most(1, inside={2: TENSOR}),
            5: Most(1, inside=extend),
            6: Most(1, inside={2: Most(hosted, inside=MODULE)}),
        },
        put={2: Most(modules, inside={1: TENSOR, 2: TENSOR})},
    )


def largest_message(description: pb.Description) -> int:
    """The largest message that an edge has a reason to send, in bytes, twice over: edges cut
    prompts so that a message is half of what is taken.
    """
    awaited = Awaited(description)
    modules = [
        _module_bytes(
            site.in_features, module.out_features, max(site.in_features, module.out_features)
        )
        for site in description.sites
        for module in site.modules
    ]
    put = min(sum(modules), PUT_BYTES + max(modules, default=0))
    fused = [
        one.experts
        * _module_bytes(one.in_features, one.out_features, max(one.in_features, one.out_features))
        for one in description.experts
    ]
    return 2 * max(awaited.most, awaited.largest_answer(), put, *fused)


def _module_bytes(inputs: int, out: int, rank: int) -> int:
    """A and B with their biases, in float32."""
    return 4 * (rank + 1) * (inputs + out) + 4 * _TENSOR_BYTES


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
        self._num_linear = len(self._sites)
        self._sites += [(one.in_features, [one.out_features]) for one in description.experts]
        self._experts = [one.experts for one in description.experts]
        self._num_modules = len(outputs) + len(self._experts)
        self._entry_width = max(description.embedding_width, description.layers.width)

        self._hidden_width = max(description.hidden_width, self._entry_width)
        self._most_tokens = description.limits.max_tokens

        # A first frame may announce the modules that the cloud is to compute.
        self.most = self.entry_bytes(self._most_tokens) + self._num_modules * _HOSTED_BYTES
        self.room = 0
        """The largest frame of a pass behind its first, or those that come at once; in bytes."""
        self._coming, self._coming_bytes = 0, 0
        """Frames of modules that were announced, and all of their bytes."""
        self._active: list[int] = []
        self._tokens = self._batch = 0
        self._is_training = self._is_factored = self._has_cache = False

    def entry_bytes(self, tokens: int) -> int:
        """A `Begin` or `Extend` of so many tokens: rows, and mask, position, kept, order, name."""
        listed = sum(_SITE_BYTES + VALUE_BYTES * len(outs) for _, outs in self._sites)
        entry = tokens * (4 * self._entry_width + _ROW_BYTES + 1 + 3 * VALUE_BYTES + NAME_BYTES)
        return entry + 2 * listed + _IDLE_BYTES * self._num_modules + _FIXED_BYTES

    def _hosted_bytes(self, begin: pb.Begin) -> int:
        """The tensors of all announced modules in float32, at most at the highest rank."""
        total = 0
        for entry in begin.modules:
            inputs, outs = self._sites[entry.site] if entry.site < len(self._sites) else (0, [])
            out = outs[entry.module] if entry.module < len(outs) else 0
            rank = min(entry.rank, max(inputs, out))
            fused = entry.site - self._num_linear
            experts = self._experts[fused] if 0 <= fused < len(self._experts) else 1
            total += experts * (_module_bytes(inputs, out, rank) + _ROW_BYTES * (rank + out + 2))
        return total

    def check(self, size: int) -> None:
        """Raises WireError for a frame of a size that cannot be the one that is awaited."""
        most = self._coming_bytes if self._coming else self.most
        if size > most:
            raise WireError(f"got a frame of {size} bytes, want at most {most} here")
        if self._coming:  # frames that nobody asks for share what was announced
            self._coming, self._coming_bytes = self._coming - 1, self._coming_bytes - size

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
            size -= sum(module.ByteSize() for module in begin.modules)  # there are few
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
        if kind == "begin" and begin.module_frames:  # what comes at once
            self._coming, self._coming_bytes = begin.module_frames, self._hosted_bytes(begin)
            self.room = max(self.room, self._coming_bytes)
        return True

    def largest_answer(self) -> int:
        """Of all sites, for as many tokens as a pass may have, on any wire. For a fresh one."""
        self._tokens, self._is_factored = self._most_tokens, True
        answers = [self._deltas(site) for site in range(self._num_linear)]
        self._is_factored = False
        answers += [self._deltas(site) for site in range(self._num_linear)]
        return max([*answers, self._rows(self._hidden_width)])

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
