"""Checks and measurements of a model at load, before anything is served.

A model that can be traced may still not be one that can be split: here the split's results are
compared with the whole model's, on a few tokens and with adapters that are all zero.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dlora.cloud.layers import CloudLayers
from dlora.cloud.limits import Limits
from dlora.cloud.pass_request import PassRequest
from dlora.cloud.zero_edge import probe_request, run_with_zeros, sample_ids
from dlora.errors import ModelError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import CloudBetween, EdgeLayers, first_output
from dlora.protocol.sites import Site
from dlora.protocol.wire import encode

__all__ = [
    "can_begin_at_layers",
    "check_kind",
    "check_layers",
    "check_split",
    "measure_activations",
    "measure_cache",
]

log = logging.getLogger(__name__)

# Largest difference allowed at load between the full model's results and the split's, as a share
# of the largest. Equal arithmetic gives 0; 1e-4 leaves room for kernels that depend on shape.
_SPLIT_TOLERANCE: Final = 1e-4


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

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is not a decoder-only causal LM")
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no LM head: only decoder-only causal LMs can be served")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ModelError(
            "gradient checkpointing would run every exchange twice: disable it on the served model"
        )


def check_split(model: PreTrainedModel, sites: Sequence[Site], ids_BT: Tensor) -> int:
    """Compare split and full logits on padded input; return the width of the last hidden states.

    Raises ModelError if they differ.
    """
    decoder, embedding = model.get_decoder(), model.get_input_embeddings()
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[-1, ids_BT.shape[1] // 2 :] = 0
    with torch.no_grad():
        want = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits

        # The split's hidden states, where padding is zero, as an edge would have them.
        request = probe_request(model, sites, ids_BT, mask_BT, training=False)
        edge = run_with_zeros(model, request)
        hidden_width = edge.hidden.shape[1]
        output = decoder(inputs_embeds=embedding(ids_BT), attention_mask=mask_BT, use_cache=False)
        hidden = output.last_hidden_state
        hidden = hidden.new_zeros(hidden.shape).reshape(-1, hidden_width)
        hidden[request.keep_K] = edge.decoded_hidden().to(hidden)
        output.last_hidden_state = hidden.view(*ids_BT.shape, hidden_width)

        # The whole model on top of them: its head, and whatever else it does.
        with _replaced_forward(decoder, output):
            got = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits

    seen = mask_BT.bool()
    if gap := _gap((got - want)[seen], want[seen]):
        raise ModelError(
            f"{type(model).__name__} cannot be split: its logits differ from the full model's by "
            f"{gap}. It does more with token ids than embed them, or uses something other than the "
            "decoder's last hidden states."
        )
    return int(hidden_width)


def check_layers(
    model: PreTrainedModel,
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
    entries_BTD, exits_BTD, whole_BTD = _between_layers(model, layers, ids_BT)
    request = probe_request(model, sites, ids_BT, training=False)

    splits = {(k, 0) for k in range(1, first + 1)} | {(0, m) for m in range(1, last + 1)}
    for split in sorted(splits | {(first, last)}):
        edge_layers = EdgeLayers(*split, layers.count)
        entry_BTD, exit_BTD = entries_BTD[edge_layers.first], exits_BTD[edge_layers.end - 1]

        edge = run_with_zeros(model, _between(request, edge_layers, entry_BTD), layers.width)
        got = edge.decoded_hidden().to(exit_BTD)
        known = CloudBetween(edge_layers, partial(_known, exit_BTD))
        with layers.run_by(known):
            got_whole_BTD = _decode_all(model, ids_BT)

        for half, values, want in (
            ("cloud", got, exit_BTD.flatten(0, 1)),
            ("edge", got_whole_BTD, whole_BTD),
        ):
            if gap := _gap(values - want, want):
                raise ModelError(
                    f"edges cannot hold the first {edge_layers.first} and the last "
                    f"{edge_layers.last} layers of {type(model).__name__}: the {half}'s half "
                    f"differs by {gap}. Its layers share more than hidden states."
                )


def can_begin_at_layers(model: PreTrainedModel, layers: CloudLayers, ids_BT: Tensor) -> bool:
    """Whether hidden states of attended tokens are all that goes from layer to layer.

    Each layer runs alone, on what enters it in the whole model and on zeros for padding, on both
    sides; what leaves it has to be the whole model's. And what leaves one is what enters the next.
    """
    if layers.count < 2:
        return False
    mask_BT, quarter = torch.ones_like(ids_BT), ids_BT.shape[1] // 4
    mask_BT[0, ids_BT.shape[1] - quarter :] = 0
    mask_BT[-1, :quarter] = 0
    request = probe_request(model, (), ids_BT, mask_BT, training=False)

    # A model that cannot may fail in any way: it is served all the same, without prefixes.
    try:
        entries_BTD, exits_BTD, _ = _between_layers(model, layers, ids_BT, mask_BT)
        for index, (entry_BTD, exit_BTD) in enumerate(zip(entries_BTD, exits_BTD, strict=True)):
            alone = EdgeLayers(index, layers.count - 1 - index, layers.count)
            edge = run_with_zeros(model, _between(request, alone, entry_BTD), layers.width)
            want = exit_BTD.flatten(0, 1)[request.keep_K]
            if gap := _gap(edge.decoded_hidden().to(want) - want, want):
                raise ModelError(f"layer {index} alone differs by {gap}")
            for next_BTD in entries_BTD[index + 1 : index + 2]:
                if not torch.equal(next_BTD.flatten(0, 1)[request.keep_K], want):
                    raise ModelError(f"behind layer {index} more is done than in layers")
    except Exception as error:
        log.warning("%s is served without kept prefixes: %s", type(model).__name__, error)
        return False
    return True


def _between_layers(
    model: PreTrainedModel, layers: CloudLayers, ids_BT: Tensor, mask_BT: Tensor | None = None
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
        return entries_BTD, exits_BTD, _decode_all(model, ids_BT, mask_BT)


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
    model: PreTrainedModel, sites: Sequence[Site], max_length: int
) -> tuple[float, float]:
    """Bytes that a training step holds: (per token, per token squared) of a sequence.

    Counts what autograd saves in two small steps with every site active, weights excluded.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    lengths = [min(16, max_length), min(64, max_length)]
    sizes = []
    for length in lengths:
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids_BT = sample_ids(model, 1, length)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run_with_zeros(model, probe_request(model, sites, ids_BT, training=True))
        sizes.append(sum(saved.values()))

    (t0, t1), (s0, s1) = lengths, sizes
    if t0 == t1:
        return s0 / t0, 0.0
    # Solve size = a T + b T^2 from two points; b cannot be negative.
    b = max(0.0, (s1 / t1 - s0 / t0) / (t1 - t0))
    return max(s0 / t0, s1 / t1) - b * (t0 if s0 / t0 > s1 / t1 else t1), b


def measure_cache(model: PreTrainedModel, ids_BT: Tensor) -> int:
    """Bytes of a KV cache for each token; 0 where it changes results, or cannot be measured.

    Two passes with the cache are compared with one without. A cache that is not made of keys and
    values alone is not used either: edges then generate without it.
    """
    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()(ids_BT)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[-1, :2] = 0  # on the left, where batches of prompts are padded
    half = ids_BT.shape[1] // 2
    cache = DynamicCache(config=model.config)
    if not half or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return 0

    with torch.no_grad():
        want = decoder(
            inputs_embeds=embeddings, attention_mask=mask_BT, use_cache=False
        ).last_hidden_state
        for start, end in ((0, half), (half, ids_BT.shape[1])):
            got = decoder(
                inputs_embeds=embeddings[:, start:end],
                attention_mask=mask_BT[:, :end],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
    if _gap(got - want[:, half:], want):
        log.warning("%s is served without KV cache: with it, results differ", type(model).__name__)
        return 0

    cached_bytes = sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized
    )
    return cached_bytes // ids_BT.numel()


def _known(exit_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
    """What leaves the cloud's layers, whatever enters them."""
    return exit_BTD


def _decode_all(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """The last hidden states of the decoder's own forward, [B, T, D]."""
    with torch.no_grad():
        output: Tensor = model.get_decoder()(
            inputs_embeds=model.get_input_embeddings()(ids_BT),
            attention_mask=mask_BT,
            use_cache=False,
        ).last_hidden_state
    return output


def _gap(difference: Tensor, values: Tensor) -> str:
    """How far results are apart, if equal arithmetic does not explain it or one is no number.

    Empty where they are near enough.
    """
    largest, scale = difference.abs().max().item(), values.abs().max().item()
    if largest <= _SPLIT_TOLERANCE * max(scale, 1e-6):
        return ""
    return f"{largest:.3g} (largest value {scale:.3g})"


@contextmanager
def _replaced_forward(module: nn.Module, output: Any) -> Iterator[None]:
    """Let the module return `output`, whatever it is called with."""
    module.forward = lambda *args, **kwargs: output  # shadows the class's method
    try:
        yield
    finally:
        del module.forward
