"""FLOPs and bytes in closed form: what either half can know before a step has run.

FLOPs count 2 per multiply-add of matrix products; look-ups, norms and softmax count nothing.
Bytes are those of tensors on the wire, without the framing around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from dlora.protocol.codecs import Codecs, mix
from dlora.protocol.sites import Site
from dlora.protocol.wire import payload_bytes

__all__ = [
    "adapter_flops",
    "attention_flops",
    "backward_flops",
    "forward_flops",
    "pass_bytes",
    "round_trips",
    "seconds_in_flight",
    "step_traffic",
]

_NO_ATTENTION: Final = frozenset(("linear_attention", "conv", "mamba", "moe", "mlp", "recurrent"))
"""Kinds of layers, as configurations name them, that compute no Q K^T."""
_PART_OVERHEAD: Final = 0.04
"""Share of all work that each part in flight beyond the first adds."""


# ----------------------------------------------------------------- the frozen model, in the cloud


def forward_flops(sites: Sequence[Site], tokens: int) -> int:
    """FLOPs of the linear modules of `sites` for `tokens` rows: 2 per multiply-add."""
    return sum(
        2 * tokens * site.in_features * module.out_features
        for site in sites
        for module in site.modules
    )


def backward_flops(sites: Sequence[Site], lowest: int | None, tokens: int, attention: int) -> int:
    """FLOPs of a backward pass through `sites`: input gradients only, as the weights are frozen.

    It ends at site `lowest`; None: at the input of the first layer. `attention` is one layer's
    forward, whose backward is twice that.
    """
    layers = {module.layer for site in sites for module in site.modules} - {-1}
    if lowest is None:
        return forward_flops(sites, tokens) + 2 * attention * len(layers)
    bottom = next(site for site in sites if site.index == lowest)
    layer = bottom.modules[0].layer

    # The first site of a layer feeds its attention; from any later one attention gets no gradient.
    reads_layer_input = all(site.modules[0].layer != layer for site in sites if site.index < lowest)
    num_attentions = sum(other > layer for other in layers) + (
        layer in layers and reads_layer_input
    )

    return (
        forward_flops([site for site in sites if site.index > lowest], tokens)
        + 2 * attention * num_attentions
    )


def attention_flops(config: Any, batch: int, length: int, past: int = 0) -> int:
    """FLOPs of Q K^T and P V of one layer, counted densely (no discount for the causal mask).

    `length` new tokens look at themselves and at `past` cached ones. Where layers differ it is the
    mean of all; layers without attention count nothing.
    """
    config = config.get_text_config()
    layers = list(getattr(config, "per_layer_config", None) or [config])
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    widths = [
        _attention_width(layer)
        for layer, kind in zip(layers, kinds, strict=False)
        if kind not in _NO_ATTENTION
    ]
    return int(2 * batch * length * (past + length) * sum(widths) / max(1, len(layers)))


def _attention_width(config: Any) -> int:
    """Summed widths of all heads' keys and values in a layer."""
    heads = getattr(config, "num_attention_heads", None) or 0
    if not isinstance(heads, int) or not heads:
        return 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_dim, value_dim = (
        getattr(config, name, None) or head_dim for name in ("qk_head_dim", "v_head_dim")
    )
    return heads * (key_dim + value_dim)


def pass_bytes(
    batch: int, length: int, per_token: float, per_token_squared: float, past: int = 0
) -> float:
    """Memory in which the cloud runs forward and backward over [batch, length] tokens.

    `past` tokens of each sequence are cached. `per_token` and `per_token_squared` are what the
    cloud measured at load; its limits give both.
    """
    return batch * length * (per_token + per_token_squared * (past + length))


# ----------------------------------------------------------------- adapters, on the edge


def adapter_flops(
    rows: int, d: int, r: int, o: int, *, training: bool, input_grad: bool, factored: bool = False
) -> int:
    """FLOPs of one LoRA module x A^T B^T on [rows, d] -> [rows, o] with rank r.

    Backward adds dB and the gradient at the rank (2 r o each), dA (d r) and, where the site
    asks for it, dx (d r). Factored, all that has B in it is the cloud's.
    """
    o = 0 if factored else o
    macs = r * (d + o)
    if training:
        macs += 2 * r * o + d * r + (d * r if input_grad else 0)
    return 2 * rows * macs


def step_traffic(
    rows: int,
    kept: int,
    embedding_width: int,
    hidden_width: int,
    sites: Iterable[tuple[int, Sequence[tuple[int, int]]]],
    wire_dtype: str | Codecs,
    *,
    factored: bool = False,
    hosted: bool = False,
    input_grad: bool = False,
    drop_input_grads: bool = False,
    by_name: bool = False,
    training: bool = True,
) -> tuple[int, int]:
    """(sent, received) payload bytes of one micro-batch, as the edge sees them.

    One that is evaluated (`training` false) is a training one without its way back.

    `sites` has, for each active site in calling order, its input width d and (o, r) of its active
    modules: output width and rank. The first site sends no input gradient unless it is wanted. On
    the plain wire a module sends deltas of width o and gets their gradients; factored it sends Z of
    width r and B once, and gets the gradients of both. Hosted, A and B of every module go up and
    their gradients come back, and sites send nothing. With `drop_input_grads` no site sends one.
    With `by_name` the cloud has the prefixes of all sequences, and no embeddings are sent. Each
    kind of tensor has its own codec. Framing adds under 1 % from some hundred tokens on.

    Where the edge runs layers, `embedding_width` and `hidden_width` are those between layers,
    `kept` is all rows if it runs the last, and `input_grad` means that adapters in the first want
    the gradient of what was sent.
    """

    codecs = mix(wire_dtype, "hosted" if hosted else "plain")
    size = payload_bytes

    # Embeddings and last hidden states, and their gradients.
    entry, exit = size(codecs.ends, rows, embedding_width), size(codecs.ends, kept, hidden_width)
    sent = exit * training + (0 if by_name else entry)
    received = exit + (entry if input_grad and training else 0)

    if hosted:  # as much both ways
        adapter = sum(
            size(codecs.factors, r, d) + size(codecs.factors, r, o)
            for d, modules in sites
            for o, r in modules
        )
        return sent + adapter, received + adapter * training

    for index, (d, modules) in enumerate(sites):
        if factored:  # as much both ways, too
            up = down = sum(
                size(codecs.factors, rows, r) + size(codecs.factors, o, r) for o, r in modules
            )
        else:
            up = sum(size(codecs.deltas, rows, o) for o, _ in modules)
            down = sum(size(codecs.delta_grads, rows, o) for o, _ in modules)

        asked = training and (index or input_grad) and not drop_input_grads
        sent += up + (size(codecs.dx, rows, d) if asked else 0)
        received += down * training + size(codecs.x, rows, d)
    return sent, received


def round_trips(
    sites: int, *, hosted: bool = False, input_grad: bool = False, drop_input_grads: bool = False
) -> int:
    """Round trips that follow each other in one training micro-batch with so many active sites.

    Arguments are as of `step_traffic`.
    """
    has_backward = bool(sites or input_grad)
    if hosted:
        return 1 + has_backward
    if drop_input_grads:  # backward goes one way
        return sites + 1 + has_backward
    return 2 * sites + 1 + input_grad


def seconds_in_flight(parts: int, round_trips_s: float, work: Sequence[float]) -> float:
    """Seconds of a micro-batch that goes in so many parts at once.

    `round_trips_s` is what all its round trips take, and `work` what each that works for it takes
    for all of it: the cloud, the edge, the line. One part after the other takes the sum. With more
    each makes its round trips beside the others and does its share of the work, but finds another
    part there for the share of the time in which that one is (Schweitzer's approximation of a
    closed queueing network, one step). Each part more costs a little of all work, as its matrices
    are smaller.
    """
    alone_s = round_trips_s + sum(work)
    if parts == 1 or alone_s == 0:
        return alone_s
    shares_s = sum(one / parts * (1 + (parts - 1) * one / alone_s) for one in work)
    return round_trips_s + shares_s + _PART_OVERHEAD * (parts - 1) * sum(work)
