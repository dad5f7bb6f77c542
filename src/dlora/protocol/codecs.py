"""Which codec what travels in: one for each kind of tensor, and the mixes that have a name.

Rounding costs not the same everywhere. What is small beside the rest keeps 16 bits, what an
optimizer step hardly depends on gets four. `benchmarks/codecs.py` measures the mixes;
docs/wire-protocol.md has them as a table. No torch here, so that settings can take their names from
it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from dlora.errors import UsageError
from dlora.proto import dlora_pb2 as pb

__all__ = ["MIXES", "Codecs", "begin_fields", "codecs_of", "mix", "name_of"]


@dataclass(frozen=True, kw_only=True)
class Codecs:
    """The codec of every kind of tensor."""

    x: pb.DType
    """Inputs of sites, down."""
    dx: pb.DType
    """What the edge adds to their gradients, up."""
    deltas: pb.DType
    """On the plain wire, up."""
    delta_grads: pb.DType
    """On the plain wire, down."""
    ends: pb.DType
    """Embeddings and last hidden states, and the gradients of both."""
    factors: pb.DType
    """Z and B of the factored wire, A and B of the hosted one, and their gradients."""

    @property
    def dtypes(self) -> set[pb.DType]:
        """All that are in use."""
        return set(asdict(self).values())


def _all(dtype: pb.DType) -> Codecs:
    return Codecs(**dict.fromkeys((kind.name for kind in fields(Codecs)), dtype))


MIXES: Final[dict[str, Codecs]] = {
    "fp32": _all(pb.FP32),
    "fp16": _all(pb.FP16),
    "bf16": _all(pb.BF16),
    "int8": Codecs(
        x=pb.INT8,
        dx=pb.ROTATED_INT4,
        deltas=pb.INT8,
        delta_grads=pb.INT8,
        ends=pb.FP16,
        factors=pb.FP16,
    ),
    "int4": Codecs(
        x=pb.ROTATED_INT4,
        dx=pb.ROTATED_INT4,
        deltas=pb.ROTATED_INT4,
        delta_grads=pb.ROTATED_INT4,
        ends=pb.INT8,
        factors=pb.FP16,
    ),
}
"""What `wire_dtype` may be, by name, where sites exchange."""

_HOSTED: Final[dict[str, dict[str, pb.DType]]] = {
    "int8": {"ends": pb.INT8},
    "int4": {"ends": pb.ROTATED_INT4, "factors": pb.ROTATED_INT4},
}
"""On the hosted wire no site does: ends and adapter are all there is."""


def mix(wire_dtype: str | Codecs, wire: str) -> Codecs:
    """The codecs that a name stands for on a wire. Raises UsageError for a name that is none."""
    if isinstance(wire_dtype, Codecs):
        return wire_dtype
    if wire_dtype not in MIXES:
        raise UsageError(f"wire dtype: got {wire_dtype!r}, want one of {', '.join(MIXES)}")
    hosted = _HOSTED.get(wire_dtype, {}) if wire == "hosted" else {}
    return replace(MIXES[wire_dtype], **hosted)


def name_of(codecs: Codecs) -> str:
    """The name of a mix, or its codecs kind by kind."""
    for name in MIXES:
        if codecs in (mix(name, "plain"), mix(name, "hosted")):
            return name
    return ", ".join(
        f"{kind} {pb.DType.Name(dtype).lower()}" for kind, dtype in asdict(codecs).items()
    )


def begin_fields(codecs: Codecs) -> dict[str, Any]:
    """The fields of `Begin` that say so to the cloud."""
    others = {kind: dtype for kind, dtype in asdict(codecs).items() if dtype != codecs.x}
    return {"wire_dtype": codecs.x, **({"codecs": pb.Codecs(**others)} if others else {})}


def codecs_of(begin: pb.Begin) -> Codecs:
    """The codecs that a `Begin` asks for; numbers that are no dtype stay what they are."""
    return Codecs(
        **{
            kind.name: getattr(begin.codecs, kind.name) or begin.wire_dtype
            for kind in fields(Codecs)
        }
    )
