"""Checks and measurements of a model at load, before anything is served.

A model that can be traced may still not be one that can be split: here the split's results are
compared with the whole model's, on a few tokens and with adapters that are all zero.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Final

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from dlora.cloud.frozen_store import FrozenStore
from dlora.cloud.layers import CloudLayers
from dlora.cloud.limits import Limits
from dlora.cloud.parts import Parts
from dlora.cloud.pass_request import PassRequest
from dlora.cloud.recompute import per_token, saved_by_layer
from dlora.cloud.zero_edge import probe_request, run_with_zeros, sample_ids
from dlora.errors import INSTEAD, ModelError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.decoder import decoder_of, embedding_of
from dlora.protocol.layers import CloudBetween, EdgeLayers, first_output
from dlora.protocol.sites import Site
from dlora.protocol.wire import encode

__all__ = [
    "check_kind",
    "check_layers",
    "check_rounded",
    "gap_between",
    "measure_activations",
    "prefix_store",
]

log = logging.getLogger(__name__)

# Largest difference allowed at load between the full model's results and the split's, as a share
# of the largest. Equal arithmetic gives 0; 1e-4 leaves room for kernels that depend on shape.
_SPLIT_TOLERANCE: Final = 1e-4
_ROUNDED_TOLERANCE: Final = 0.1
"""The same of a row of hidden states where embeddings are rounded to fp16."""


# ----------------------------------------------------------------- checks


def check_kind(model: PreTrainedModel) -> None:
    """Raises ModelError for a model of a kind that cannot be split."""
    name = type(model).__name__
    built_by_edges = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    if built_by_edges is not type(model):
        raise ModelError(
            f"{name} cannot be split: edges build {getattr(built_by_edges, '__name__', 'nothing')} "
            "from its configuration. "
            "Only decoder-only causal LMs that transformers itself brings can be served."
        )

    decoder_of(model)
    inner = [one for one, _ in embedding_of(model).named_parameters() if "." in one]
    if inner:  # those that were tried have modules whose saved adapter peft does not load again
        raise ModelError(
            f"{name} cannot be split: its token embedding is more than a table ({inner[0]}). "
            f"{INSTEAD}"
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ModelError(
            f"{name}: output_router_logits=True adds a loss of the routers, which are in the cloud:"
            " set it to false in config.json"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ModelError(
            f"{name}: gradient checkpointing would run every exchange twice: disable it on the "
            "served model, and serve with recompute to the same end"
        )


def check_rounded(parts: Parts, ids_BT: Tensor, hidden_BTD: Tensor) -> None:
    """Embeddings may be rounded on the wire. Raises ModelError for a decoder that needs every bit.

    `hidden_BTD` are the last hidden states without rounding. The median row has to stay: a router
    may send a token elsewhere for a rounded bit.
    """
    hidden_ND = hidden_BTD.float().cpu().flatten(0, 1)
    request = probe_request(parts, (), ids_BT, training=False, dtype=pb.FP16)
    rounded_ND = run_with_zeros(parts, request).decoded_hidden()
    off_N = (rounded_ND - hidden_ND).norm(dim=1) / hidden_ND.norm(dim=1).clamp(min=1e-6)
    if not off_N.median() <= _ROUNDED_TOLERANCE:
        raise ModelError(
            f"{parts.name} cannot be split: with embeddings that are rounded to fp16 its hidden "
            f"states are others: it reads token ids back from them. {INSTEAD}"
        )


def check_layers(
    parts: Parts,
    sites: Sequence[Site],
    layers: CloudLayers,
    limits: Limits,
    ids_BT: Tensor,
) -> None:
    """Compare both halves with the whole model, where edges may run layers.

    Some decoders pass more than hidden states from layer to layer. Every border is tried, from
    below and from above, and the two farthest ones together. Raises ModelError.
    """
    first, last = limits.edge_first, limits.edge_last
    if not (first or last):
        return
    entries_BTD, exits_BTD, whole_BTD = _between_layers(parts, layers, ids_BT)
    if entries_BTD[first].dim() != 3:
        raise ModelError(
            f"edges cannot hold layers of {parts.name}: between them are tensors of shape "
            f"{list(entries_BTD[first].shape)}, not one row for each token"
        )
    request = probe_request(parts, sites, ids_BT, training=False)

    splits = {(k, 0) for k in range(1, first + 1)} | {(0, m) for m in range(1, last + 1)}
    for split in sorted(splits | {(first, last)}):
        edge_layers = EdgeLayers(*split, layers.count)
        entry_BTD, exit_BTD = entries_BTD[edge_layers.first], exits_BTD[edge_layers.end - 1]

        edge = run_with_zeros(parts, _between(request, edge_layers, entry_BTD), layers.width)
        got = edge.decoded_hidden().to(exit_BTD)
        known = CloudBetween(edge_layers, partial(_known, exit_BTD))
        with layers.run_by(known):
            got_whole_BTD = parts.hidden(ids_BT)

        for half, values, want in (
            ("cloud", got, exit_BTD.flatten(0, 1)),
            ("edge", got_whole_BTD, whole_BTD),
        ):
            if gap := gap_between(values - want, want):
                raise ModelError(
                    f"edges cannot hold the first {edge_layers.first} and the last "
                    f"{edge_layers.last} layers of {parts.name}: the {half}'s half "
                    f"differs by {gap}. Its layers share more than hidden states."
                )


def prefix_store(
    parts: Parts, layers: CloudLayers, limits: Limits, ids_BT: Tensor
) -> FrozenStore | None:
    """Where prefixes are kept; None for a model that cannot begin with them, or no room."""
    most_bytes = limits.max_prefix_bytes
    can = most_bytes and _can_begin_at_layers(parts, layers, ids_BT)
    return FrozenStore(most_bytes, torch.device("cpu")) if can else None


def _can_begin_at_layers(parts: Parts, layers: CloudLayers, ids_BT: Tensor) -> bool:
    """Whether hidden states of attended tokens are all that goes from layer to layer.

    Each layer runs alone, on what enters it in the whole model and on zeros for padding, on both
    sides; what leaves it has to be the whole model's. And what leaves one is what enters the next.
    """
    if layers.count < 2:
        return False
    mask_BT, quarter = torch.ones_like(ids_BT), ids_BT.shape[1] // 4
    mask_BT[0, ids_BT.shape[1] - quarter :] = 0
    mask_BT[-1, :quarter] = 0
    request = probe_request(parts, (), ids_BT, mask_BT, training=False)

    # A model that cannot may fail in any way: it is served all the same, without prefixes.
    try:
        entries_BTD, exits_BTD, _ = _between_layers(parts, layers, ids_BT, mask_BT)
        for index, (entry_BTD, exit_BTD) in enumerate(zip(entries_BTD, exits_BTD, strict=True)):
            alone = EdgeLayers(index, layers.count - 1 - index, layers.count)
            edge = run_with_zeros(parts, _between(request, alone, entry_BTD), layers.width)
            want = exit_BTD.flatten(0, 1)[request.keep_K]
            if gap := gap_between(edge.decoded_hidden().to(want) - want, want):
                raise ModelError(f"layer {index} alone differs by {gap}")
            for next_BTD in entries_BTD[index + 1 : index + 2]:
                if not torch.equal(next_BTD.flatten(0, 1)[request.keep_K], want):
                    raise ModelError(f"behind layer {index} more is done than in layers")
    except Exception as error:
        log.info("%s is served without kept prefixes: %s", parts.name, error)
        return False
    return True


def _between_layers(
    parts: Parts, layers: CloudLayers, ids_BT: Tensor, mask_BT: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What goes into each layer of the whole model, what comes out, and the last hidden states."""
    entries_BTD: list[Tensor] = []
    exits_BTD: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in layers.modules:
            hooks.enter_context(
                layer.register_forward_pre_hook(lambda _, args: entries_BTD.append(args[0]))
            )
            hooks.enter_context(
                layer.register_forward_hook(
                    lambda _, args, output: exits_BTD.append(first_output(output))
                )
            )
        return entries_BTD, exits_BTD, parts.hidden(ids_BT, mask=mask_BT)


def _between(request: PassRequest, edge_layers: EdgeLayers, entry_BTD: Tensor) -> PassRequest:
    """`request` as an edge makes it that runs these layers, and sends what comes before others."""
    return dataclasses.replace(
        request,
        edge_layers=edge_layers,
        active=tuple(
            (site, modules)
            for site, modules in request.active
            if edge_layers.in_cloud(site.modules[0].layer)
        ),
        embeddings=encode(entry_BTD.flatten(0, 1)[request.keep_K], pb.FP32),
    )


# ----------------------------------------------------------------- measurements


def measure_activations(
    parts: Parts, sites: Sequence[Site], max_length: int
) -> tuple[float, float]:
    """Bytes that a training step holds: (per token, per token squared) of a sequence.

    Counts what autograd saves in two small steps with every site active, weights excluded.
    """
    lengths = [min(16, max_length), min(64, max_length)]
    sizes = []
    for length in lengths:
        request = probe_request(parts, sites, sample_ids(parts.model, 1, length), training=True)
        sizes.append(sum(saved_by_layer(parts, request).values()))
    return per_token(lengths, sizes)


def _known(exit_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
    """What leaves the cloud's layers, whatever enters them."""
    return exit_BTD


def gap_between(difference: Tensor, values: Tensor) -> str:
    """How far results are apart, if equal arithmetic does not explain it or one is no number.

    Empty where they are near enough.
    """
    largest, scale = difference.abs().max().item(), values.abs().max().item()
    if largest <= _SPLIT_TOLERANCE * max(scale, 1e-6):
        return ""
    return f"{largest:.3g} (largest value {scale:.3g})"
