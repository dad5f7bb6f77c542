"""The architecture's own class on the edge, without most of its weights.

Embedding, LM head and the layers that run here are real. All other parameters are stand-ins: while
peft puts its adapter on the model they have shapes and no memory; afterwards they are empty.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from dlora.edge.classifier import draw_head, empty_classifier, empty_head
from dlora.edge.description import has_cache
from dlora.edge.link import Link, SharesWeights
from dlora.edge.model_config import read_config
from dlora.edge.options import check_edge_layers
from dlora.edge.wall import bounded_building, wall
from dlora.errors import ModelError, UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.decoder import decoder_of
from dlora.protocol.files import OUTSIDE
from dlora.protocol.layer_files import check_weights, files_for, fill, values_by_file
from dlora.protocol.layers import EdgeLayers

__all__ = ["build_skeleton", "drop_stand_ins", "edge_layers_of"]

log = logging.getLogger(__name__)


def edge_layers_of(link: Link, edge_layers: tuple[int, int]) -> EdgeLayers:
    """The layers that run here, of (first, last). Raises UsageError for more than are allowed."""
    check_edge_layers(*edge_layers)
    first, last = edge_layers
    offer = link.description.layers
    if first > offer.max_first or last > offer.max_last:
        raise UsageError(
            f"edge layers: got the first {first} and the last {last}, {link.address} lets edges "
            f"hold up to the first {offer.max_first} and the last {offer.max_last}: its provider "
            "decides (`dlora serve --edge_first ... --edge_last ...`)"
        )
    if (first or last) and first + last >= offer.count:
        raise UsageError(
            f"edge layers: got {first} and {last} of {offer.count}, want one at least left in the "
            "cloud"
        )
    return EdgeLayers(first, last, offer.count)


def build_skeleton(
    link: Link, edge_layers: EdgeLayers, num_labels: int | None = None
) -> PreTrainedModel:
    """The architecture's own class: real embedding, head and edge layers, the rest without memory.

    What lies between decoder and head is real, too. With `num_labels` it is a classifier, whose new
    head is drawn. No other random number is: an adapter starts as it would on the full model.

    Raises ModelError for a model type or for weights that do not fit, PeerError for what cannot be
    built.
    """
    folder = Path() if isinstance(link, SharesWeights) else link.edge_files()
    with wall("the model", link.address), torch.random.fork_rng(devices=[]):
        model = _build(link, folder, edge_layers, num_labels)
    if num_labels is not None:
        draw_head(model)
    return model


def _build(
    link: Link, folder: Path, edge_layers: EdgeLayers, num_labels: int | None
) -> PreTrainedModel:
    description = link.description
    model = _empty_model(description, num_labels, for_edge_layers=bool(edge_layers))
    weights, generation_config = _served(link, folder)
    model.generation_config = generation_config or model.generation_config or GenerationConfig()
    if not has_cache(description.limits):
        log.warning("%s is served without KV cache: generation is slow", description.model_id)
        model.generation_config.use_cache = False
    _without_router_loss(model)
    model.config._name_or_path = description.model_id
    model.name_or_path = description.model_id

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    _fill(embedding, weights, "embedding.")
    if head is not None:
        tied = "head.weight" not in weights
        if tied:
            head.weight = embedding.weight
        _fill(head, weights, "head.", skip=("weight",) if tied else ())

    dtype = embedding.weight.dtype
    real = [*embedding.parameters(), *([] if head is None else head.parameters())]
    if num_labels is None:
        real += _fill_outside(link, model, weights)
    else:
        real += empty_head(model, description.hidden_width, dtype)
    tables = [_table(model, name) for name in description.tables]
    _check_widths(description, embedding, head, tables)
    if edge_layers:
        real += _fill_edge_layers(link, model, edge_layers, dtype)
    _put_stand_ins(model, {id(parameter) for parameter in real}, dtype)
    model.requires_grad_(False)
    return model


def _served(link: Link, folder: Path) -> tuple[Mapping[str, Tensor], GenerationConfig | None]:
    """Weights and generation config, of this process if the link has them, else of the folder."""
    if isinstance(link, SharesWeights):
        return link.edge_weights(), link.generation_config()
    config = None
    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    try:
        return load_file(folder / "edge.safetensors"), config
    except SafetensorError as error:
        raise ModelError(f"edge.safetensors from {link.address} cannot be read: {error}") from error


def _empty_model(
    description: pb.Description, num_labels: int | None, *, for_edge_layers: bool
) -> PreTrainedModel:
    """The served architecture; buffers have their values, parameters no memory."""
    config = read_config(description, dropout=not for_edge_layers)
    # Buffers keep their values (Gemma scales its embedding with one).
    with bounded_building(), init_empty_weights(include_buffers=False):
        if num_labels is not None:
            return empty_classifier(config, num_labels)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _table(model: PreTrainedModel, name: str) -> nn.Module:
    """A table beside the embedding. Raises ModelError for what is none."""
    try:
        table = model.get_submodule(name)
    except AttributeError:
        table = None
    if not isinstance(table, nn.Embedding):
        raise ModelError(f"the cloud's description names {name!r}, which is no table of this model")
    return table


def _without_router_loss(model: PreTrainedModel) -> None:
    """Let trainers add no loss of a mixture's routers, which are in the cloud, on their own."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "router_aux_loss_coef", None):
            config.router_aux_loss_coef = 0.0


def _fill_outside(
    link: Link, model: PreTrainedModel, weights: Mapping[str, Tensor]
) -> list[nn.Parameter]:
    """Put in what lies between decoder and head; return its parameters."""
    outside = {
        name.removeprefix(OUTSIDE): value
        for name, value in weights.items()
        if name.startswith(OUTSIDE)
    }
    try:
        return fill(model, outside)
    except (KeyError, ValueError, AttributeError) as error:
        raise ModelError(f"edge.safetensors from {link.address} does not fit: {error}") from error


def _check_widths(
    description: pb.Description,
    embedding: nn.Module,
    head: nn.Module | None,
    tables: Sequence[nn.Module],
) -> None:
    """Raises ModelError unless the widths that were described are those of the weights.

    Where something lies between decoder and head, the head's width is its own.
    """
    got = sum(table.get_parameter("weight").shape[-1] for table in (embedding, *tables))
    if got != description.embedding_width:
        raise ModelError(
            f"embedding width: described as {description.embedding_width}, the weights have {got}"
        )
    described = description.head_width or description.hidden_width
    if head is not None and (got := head.get_parameter("weight").shape[-1]) != described:
        raise ModelError(f"hidden width: described as {described}, the weights have {got}")


def _fill_edge_layers(
    link: Link, model: PreTrainedModel, edge_layers: EdgeLayers, dtype: torch.dtype
) -> list[nn.Parameter]:
    """Fetch and put in the weights of edge layers; return them."""
    filled: list[nn.Parameter] = []
    names = files_for(edge_layers)
    files, wanted = link.layer_files(names), values_by_file(model, decoder_of(model))
    for file in names:
        try:
            layer = load_file(files / file)
            check_weights(wanted.get(file, {}), dtype, layer)
            filled += fill(model, layer)
        except (KeyError, ValueError, AttributeError, SafetensorError) as error:
            raise ModelError(f"{file} from {link.address} does not fit: {error}") from error
    return filled


def _put_stand_ins(model: nn.Module, real: set[int], dtype: torch.dtype) -> None:
    """Give every parameter that is not real (by id) its shape with one element of memory.

    peft reads shape, dtype and device here, and so draws the very numbers it draws on the full
    model.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in real:
                stand_in = torch.zeros(1, dtype=dtype).expand(parameter.shape)
                setattr(module, name, nn.Parameter(stand_in, requires_grad=False))


def _fill(
    module: nn.Module, weights: Mapping[str, Tensor], prefix: str, skip: tuple[str, ...] = ()
) -> None:
    for name, parameter in list(module.named_parameters()):
        if name in skip:
            continue
        value = weights.get(prefix + name)
        if value is None or value.shape != parameter.shape:
            got = "nothing" if value is None else list(value.shape)
            raise ModelError(f"edge file {prefix}{name}: got {got}, want {list(parameter.shape)}")
        place, _, own = name.rpartition(".")  # an embedding may have a norm of its own
        setattr(module.get_submodule(place), own, nn.Parameter(value, requires_grad=False))


def drop_stand_ins(base: PreTrainedModel) -> None:
    """Replace the stand-ins by empty tensors: moving the model to a device then moves nothing."""
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.untyped_storage().nbytes() < parameter.numel() * parameter.element_size():
                setattr(module, name, nn.Parameter(parameter.new_empty(0), requires_grad=False))
