"""Decoder layers that run on the edge: their run, their FLOPs, the gradients of their adapters.

The edge runs the decoder's own forward over all of its layers. At the first layer that is not here
the hidden states go to the cloud; what comes back stands for the output of all of the cloud's
layers, each of which hands it on. So masks, positions and rotary embeddings are made by the model's
own code. Adapters in edge layers need no exchange: autograd makes their gradients.

Shapes: B batch, T tokens, N rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlora.edge.kv_cache import CloudCache
from dlora.edge.lora import layer_flops
from dlora.edge.meter import Meter
from dlora.edge.micro_batch import check_finite
from dlora.edge.sites import shared_sites
from dlora.errors import ModelError
from dlora.formulas import attention_flops, backward_flops, forward_flops
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.decoder import decoder_of, last_hidden, run_decoder
from dlora.protocol.layers import EdgeLayers, LayerRunner, find_layers, layer_of, wrap_layers

__all__ = ["EdgeDecoder"]


class EdgeDecoder:
    """A decoder of which the edge has some layers."""

    def __init__(
        self,
        base: PreTrainedModel,
        edge_layers: EdgeLayers,
        description: pb.Description,
        runner: Callable[[], LayerRunner],
    ) -> None:
        self.base, self.decoder = base, decoder_of(base)
        self.edge_layers, self.running = edge_layers, False
        self.sites = [
            site
            for site in shared_sites(description)
            if not edge_layers.in_cloud(site.modules[0].layer)
        ]
        self._adapters: Mapping[str, LoraLayer] = {}

        if edge_layers:
            layers = find_layers(self.decoder, base.get_input_embeddings(), edge_layers.count)
            if layers is None:
                raise ModelError(
                    f"found no list of {edge_layers.count} layers in {type(self.decoder).__name__}"
                )
            wrap_layers(layers, runner, description.layers.in_tuple)

    # -------------------------------------- adapters in edge layers

    def is_running(self) -> bool:
        """Whether layers that are here run now."""
        return self.running

    def use_adapters(self, adapters: Mapping[str, LoraLayer]) -> None:
        """Take these LoRA layers, by full name; their gradients are checked from now on."""
        self._adapters = adapters
        for name, layer in adapters.items():
            for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
                _check_gradients(parameter, name)

    def adapters(self) -> Iterator[tuple[str, LoraLayer]]:
        """LoRA layers in use, by full name."""
        for name, layer in self._adapters.items():
            if not layer.disable_adapters:
                yield name, layer

    def trains_before_cloud(self) -> bool:
        """Whether anything is trained here before the cloud's first layer."""
        first = [
            layer for name, layer in self.adapters() if layer_of(name) < self.edge_layers.first
        ]
        return any(
            parameter.requires_grad
            for module in (self.base.get_input_embeddings(), *first)
            for parameter in module.parameters()
        )

    # -------------------------------------- a forward pass

    def run(
        self,
        embeddings_BTD: Tensor,
        mask_BT: Tensor | None,
        position_ids: Tensor | None,
        cache: CloudCache | None,
        meter: Meter,
        trained_below: bool,
    ) -> Tensor:
        """The decoder's own forward over embeddings; last hidden states [B, T, D].

        What becomes of each layer is asked of the runner. Where anything fails, the cache is left
        as long as it was. `trained_below`: adapters in the cloud's layers are trained.
        """
        inputs: dict[str, Any] = {"inputs_embeds": embeddings_BTD}
        if mask_BT is not None:
            inputs["attention_mask"] = mask_BT.to(embeddings_BTD.device)
        if position_ids is not None:
            inputs["position_ids"] = position_ids

        past = 0 if cache is None else cache.get_seq_length()
        local = None if cache is None else cache.local_cache(self.base.config)
        try:
            hidden_BTD = self._own_forward(local, **inputs)
        except BaseException:
            if cache is not None:
                cache.restore(past)
            raise

        batch, length, _ = embeddings_BTD.shape
        training = hidden_BTD.requires_grad
        self._count(meter, batch, length, past, training=training, trained_below=trained_below)
        return hidden_BTD

    def finish(self, num_rows: int) -> Tensor:
        """What the decoder does behind its layers, in float32, to rows by themselves: [N, D].

        The runner must hand on the rows, [N, 1, D], in place of all layers.
        """
        ids_N1 = torch.zeros(num_rows, 1, dtype=torch.int64, device=self.base.device)
        embeddings_N1D = self.base.get_input_embeddings()(ids_N1).detach().float()
        weights = [
            (module, name, parameter)
            for module in _outside_layers(self.decoder)
            for name, parameter in module.named_parameters(recurse=False)
        ]

        try:
            for module, name, parameter in weights:  # not in place: a backward pass may follow
                module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)
            return self._own_forward(None, inputs_embeds=embeddings_N1D)[:, 0]
        finally:
            for module, name, parameter in weights:
                module._parameters[name] = parameter

    def _own_forward(self, cache: Any, **inputs: Any) -> Tensor:
        """The forward of the decoder's class, which the split model replaced on the object."""
        self.running = True
        try:
            return last_hidden(run_decoder(self.decoder, cache=cache, as_class=True, **inputs))
        finally:
            self.running = False

    # -------------------------------------- accounting

    def _count(
        self,
        meter: Meter,
        batch: int,
        length: int,
        past: int,
        *,
        training: bool,
        trained_below: bool,
    ) -> None:
        """Add the FLOPs of a pass in edge layers and in their adapters; padding is computed too.

        `trained_below`: the cloud's layers have adapters that are trained, so that gradients run
        through all of the last layers.
        """
        attention = attention_flops(self.base.config, batch, length, past)
        tokens, num_layers = batch * length, self.edge_layers.first + self.edge_layers.last
        meter.edge_layer_flops += forward_flops(self.sites, tokens) + attention * num_layers

        adapted = dict(self.adapters())
        trained = [
            site for site in self.sites if any(module.name in adapted for module in site.modules)
        ]
        if training:
            # Below the lowest adapter here nothing asks for gradients; above it, and above the
            # cloud's, everything does.
            first = [s for s in self.sites if s.modules[0].layer < self.edge_layers.first]
            last = [s for s in self.sites if s.modules[0].layer >= self.edge_layers.end]
            through_last = trained_below or any(site in first for site in trained)
            for part, through in ((first, False), (last, through_last)):
                trained_here = [site.index for site in trained if site in part]
                if part and (through or trained_here):
                    lowest = None if through else trained_here[0]
                    meter.edge_layer_flops += backward_flops(part, lowest, tokens, attention)

        for site in trained:
            for module in site.modules:
                if (layer := adapted.get(module.name)) is not None:
                    # The lowest adapter of all reads what needs no gradient.
                    meter.adapter_flops += layer_flops(
                        layer, tokens, training=training, input_grad=site.index != trained[0].index
                    )


def _outside_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a decoder that are in no list of layers and no embedding."""
    for child in module.children():
        if not isinstance(child, nn.ModuleList | nn.Embedding):
            yield child
            yield from _outside_layers(child)


def _check_gradients(parameter: nn.Parameter, name: str) -> None:
    """Let autograd raise PeerError where a gradient is not finite; once for each parameter."""
    if getattr(parameter, "dlora_checks_gradient", False):
        return
    parameter.dlora_checks_gradient = True  # type: ignore[attr-defined]

    # A hook needs a parameter that asks for gradients. One that does not may do so later.
    trained = parameter.requires_grad
    parameter.requires_grad_(True)
    parameter.register_hook(lambda grad: check_finite(grad, f"a gradient of {name}"))
    parameter.requires_grad_(trained)
