"""The edge half: a peft model whose decoder lives in the cloud.

`get_peft_model(link, LoraConfig(...))` gives a real `PeftModel` around the architecture's own
`...ForCausalLM` class. Embedding, LM head and LoRA weights are here; the decoder is an empty
shell whose forward drives a stream to the cloud. Training loops, `Trainer`, `SFTTrainer` and
`save_pretrained` see what they know.

Shapes: B batch, T tokens, K kept positions, D width.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import torch
from peft import LoraConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from dlora.edge.adapter_config import checked_config, read_adapter_config
from dlora.edge.bottleneck import BottleneckConfig, make_bottleneck, save_bottleneck
from dlora.edge.kv_cache import CloudCache, Pass
from dlora.edge.link import Link, RetryPolicy
from dlora.edge.meter import Meter
from dlora.edge.micro_batch import MicroBatch, SplitForward, check_finite
from dlora.edge.noise import Noise, fill_padding, is_right_padded
from dlora.edge.responder import (
    ActiveSite,
    FrozenModule,
    Responder,
    Wait,
    begin,
    freeze,
    layer_flops,
)
from dlora.edge.sites import allowed_names, match_sites, shared_sites
from dlora.edge.skeleton import build_skeleton, decoder_of, drop_stand_ins, edge_layers_of
from dlora.errors import DLoRAError, ModelError, UsageError
from dlora.formulas import attention_flops, backward_flops, forward_flops
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import EdgeLayers, KnownCloud, find_layers, layer_of, wrap_layers
from dlora.protocol.wire import WIRE_DTYPES

__all__ = [
    "SplitModel",
    "get_peft_model",
    "load_adapter",
    "load_base",
    "load_tokenizer",
]

log = logging.getLogger(__name__)

Idle = Literal["drop", "cloud", "edge"]

IGNORE: Final = -100  # the label of a position without supervision, as in PyTorch and transformers


# Arguments of a decoder's forward that change nothing here, or are honoured before it is called.
_HARMLESS_ARGUMENTS: Final = frozenset(
    "return_dict num_items_in_batch logits_to_keep cache_position fused_lm_head tokenizer".split()
)


@dataclasses.dataclass(frozen=True)
class _Request:
    """Which last hidden states the next forward needs; noted by hooks outside the decoder."""

    keep_BT: Tensor | None = None
    """Bool mask of positions; None: all."""
    compact_labels: Tensor | None = None
    """Labels to match; then the kept positions return alone, [1, K + 1, D], with a last row of
    zeros.
    """


class SplitModel(PeftModelForCausalLM):
    """A `PeftModel` whose decoder runs in the cloud.

    `head_positions` says where logits are computed: "supervised" (only where a label asks for
    it; logits then have shape [1, K + 1, vocab]), "all", or "auto": supervised while training,
    all otherwise. Without labels it is always all.

    `wire` says how deltas travel in training: "plain", or as exact factors ("factored"), which
    takes several times fewer bytes and shows B to the cloud, which it could solve for anyway.
    """

    head_positions: Literal["auto", "supervised", "all"] = "auto"

    def __init__(
        self,
        base: PreTrainedModel,
        config: LoraConfig,
        link: Link,
        wire_dtype: str,
        retry: RetryPolicy,
        edge_layers: EdgeLayers | None = None,
    ) -> None:
        super().__init__(base, config, adapter_name="default")
        make_bottleneck(self, "default")
        self.edge_layers = edge_layers or EdgeLayers()
        """Decoder layers that run here; their adapters need no exchange and are always trained."""
        self.link = link
        self.retry = retry
        self.wire_dtype = wire_dtype
        self.wire: Literal["plain", "factored"] = "plain"
        self.noise = Noise()
        """What is added to what leaves."""
        self.hide_lengths = False
        """Let right padding travel as other tokens of the batch and ask for every position's hidden
        state, so that masks tell neither lengths nor which tokens have a label; zero gradients
        still do, without noise on the tail. Left padding and KV caches are as ever."""
        self.meter = Meter()
        self._match_sites()
        self._edge_layer_sites = [
            site
            for site in shared_sites(link.description)
            if not self.edge_layers.in_cloud(site.modules[0].layer)
        ]
        self._request = _Request()
        self.idle: Idle = "drop"
        """What becomes of adapted modules that are not active."""
        self._active: frozenset[str] | None = None  # None: all
        self._frozen: dict[str, FrozenModule] = {}
        self.probe_modules: Sequence[str] = ()
        """Modules whose norm of g^T x every training micro-batch asks for, into `probe_norms`."""
        self.probe_norms: list[dict[str, float]] = []
        self.output_squares: dict[tuple[int, int], float] | None = None
        """If not None: sums of squared deltas by (site, module), over training micro-batches."""
        self.waits: list[Wait] = []
        """Of the newest training micro-batch: where its time went."""
        self.accepts_position_ids = (
            "position_ids" in inspect.signature(type(decoder_of(base)).forward).parameters
        )
        self._signature = inspect.signature(self.forward)
        self._cloud_pass: Callable[[Tensor], Tensor] | None = (
            None  # of the forward that runs now, with layers on the edge
        )
        self._known: KnownCloud | None = None  # instead of the cloud
        if self.edge_layers:
            layers = find_layers(decoder_of(base), self.edge_layers.count)
            if layers is None:
                raise ModelError(
                    f"found no list of {self.edge_layers.count} layers in "
                    f"{type(decoder_of(base)).__name__}"
                )
            wrap_layers(layers, lambda: self._known or self, link.description.layers.in_tuple)
        decoder_of(base).forward = types.MethodType(_remote_forward, self)
        # generate() calls the base model and not this one; peft may call the base model's forward
        # and not the model. So hook both.
        self.register_forward_pre_hook(SplitModel._note_request, with_kwargs=True)
        base.register_forward_pre_hook(
            lambda _, args, kwargs: self._note_request(args, kwargs), with_kwargs=True
        )

    # ----------------------------------------------------------------- what is asked of the decoder

    def _note_request(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note the positions whose hidden states matter; with labels, gather those labels to match.

        The next-token losses of transformers and trl pair hidden state i with label i + 1. Kept
        rows with a row of zeros behind them, and kept labels with an ignored one before them,
        keep that pairing in every loss function.
        """
        labels: Tensor | None = kwargs.get("labels")
        if labels is not None and labels is self._request.compact_labels:
            return args, kwargs  # the outer of the two hooks has been here
        self._request = _Request()
        if labels is None and len(args) > 3:
            labels = self._signature.bind_partial(*args).arguments.get("labels")
            if labels is not None:
                raise UsageError("pass labels by name: model(input_ids=..., labels=...)")
        keep_last = kwargs.get("logits_to_keep", 0)
        if labels is None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(keep_last, int) and keep_last > 0 and ids is not None:
                keep_BT = torch.zeros_like(ids, dtype=torch.bool)
                keep_BT[:, -keep_last:] = True
                self._request = _Request(keep_BT)
            return args, kwargs
        everywhere = self.head_positions == "all" or (
            self.head_positions == "auto" and not self.training
        )
        if everywhere or kwargs.get("shift_labels") is not None:
            return args, kwargs
        keep_BT = torch.zeros_like(labels, dtype=torch.bool)
        keep_BT[:, :-1] = labels[:, 1:] != IGNORE
        kept = labels[:, 1:][keep_BT[:, :-1]]
        compact = torch.cat([kept.new_full((1,), IGNORE), kept])[None]
        self._request = _Request(keep_BT, compact)
        return args, {**kwargs, "labels": compact}

    def run_decoder(
        self,
        embeddings_BTD: Tensor,
        mask_BT: Tensor | None,
        position_ids: Tensor | None,
        cache: CloudCache | None = None,
    ) -> Tensor:
        """Run the remote decoder; return hidden states [B, T, D], or [1, K + 1, D] if only labels
        were asked for.

        Positions that were not asked for, padding among them, are zero. With a `cache` the
        tokens follow those in it, and the mask covers both: [B, P + T].
        """
        request, self._request = self._request, _Request()
        batch, length, _ = embeddings_BTD.shape
        if self.hide_lengths and cache is None and mask_BT is not None and is_right_padded(mask_BT):
            embeddings_BTD, mask_BT = fill_padding(embeddings_BTD, mask_BT), None
        columns_BT = mask_BT if cache is None else _new_columns(cache, mask_BT, batch, length)
        attended_BT = (
            torch.ones(batch, length, dtype=torch.bool)
            if columns_BT is None
            else columns_BT.bool().cpu()
        )
        if request.keep_BT is None:
            keep_BT = attended_BT
        elif request.keep_BT.shape == attended_BT.shape:
            keep_BT = request.keep_BT.cpu()
        else:
            raise UsageError(
                f"labels have shape {list(request.keep_BT.shape)}, input_ids "
                f"{list(attended_BT.shape)}"
            )
        positions_BT = self._position_ids(position_ids, batch, length)
        # The last layers look at every token; without any, only what is asked for comes back.
        wanted_BT = attended_BT | keep_BT if self.edge_layers.last or self.hide_lengths else keep_BT

        def cloud(entry_BTD: Tensor) -> Tensor:
            new = Pass(self.noise.on_entry(entry_BTD), columns_BT, positions_BT, wanted_BT)
            return self._through_cloud(new, cache)

        if not self.edge_layers:
            kept_KD = cloud(embeddings_BTD)
            if wanted_BT is not keep_BT:
                kept_KD = kept_KD[keep_BT[wanted_BT].to(kept_KD.device)]
        else:
            hidden_BTD = self._run_edge_layers(
                embeddings_BTD,
                mask_BT,
                position_ids,
                cache,
                lambda entry_BTD: _spread(cloud(entry_BTD).to(entry_BTD.dtype), wanted_BT),
            )
            kept_KD = hidden_BTD[keep_BT.to(hidden_BTD.device)]
        kept_KD = kept_KD.to(embeddings_BTD.dtype)
        compact = request.compact_labels is not None
        self._count_head(
            len(kept_KD) + 1 if compact else batch * length, training=kept_KD.requires_grad
        )
        if compact:
            return torch.cat([kept_KD, kept_KD.new_zeros(1, kept_KD.shape[1])])[None]
        return _spread(kept_KD, keep_BT)

    def _through_cloud(self, new: Pass, cache: CloudCache | None) -> Tensor:
        """Run the cloud's layers over new tokens; return the kept hidden states, float32 [K, D]."""
        sites, frozen = self._active_sites(), self._applied_by_cloud()
        parameters = (
            [p for site in sites for p in site.parameters] if torch.is_grad_enabled() else []
        )
        # An input that trainers let ask for gradients without any need would drag backward to the
        # bottom.
        wants_input_grad = (
            torch.is_grad_enabled() and new.entry_ND.requires_grad and self._trains_below()
        )
        training = bool(parameters) or wants_input_grad
        wire_dtype, device = WIRE_DTYPES[self.wire_dtype], new.entry_ND.device
        if cache is not None:
            if training:
                raise UsageError(
                    "a KV cache in the cloud keeps no gradients: use torch.no_grad(), or no cache"
                )
            responder = Responder(
                self.link,
                self.meter,
                sites,
                wire_dtype,
                device,
                frozen=frozen,
                edge_layers=self.edge_layers,
            )
            cache.bind(responder, [layer for _, layer in self.edge_layer_adapters()])
            return cache.forward(new, self.retry)
        first = begin(
            self.link,
            sites,
            frozen,
            self.edge_layers,
            wire_dtype,
            training=training,
            batch=new.keep_BT.shape[0],
            factored=self.wire == "factored",
            probe=self._probed() if training else [],
            wants_input_grad=wants_input_grad,
            **new.fields(wire_dtype),
        )
        micro_batch = MicroBatch(
            self.link, self.retry, self.meter, first, sites, device, frozen, self.edge_layers
        )
        if first.probe:
            micro_batch.on_probe = self._note_probe
        if not training:
            return micro_batch.forward()
        micro_batch.output_squares = self.output_squares
        micro_batch.waits = self.waits = []
        micro_batch.noise = self.noise
        entry_ND = new.entry_ND if wants_input_grad else new.entry_ND.detach()
        run: Callable[..., Tensor] = SplitForward.apply
        return run(micro_batch, entry_ND, *parameters)

    # ----------------------------------------------------------------- layers that run here

    def _run_edge_layers(
        self,
        embeddings_BTD: Tensor,
        mask_BT: Tensor | None,
        position_ids: Tensor | None,
        cache: CloudCache | None,
        cloud: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The decoder's own forward over embeddings [B, T, D], with the cloud in the middle; [B, T,
        D].
        """
        decoder = decoder_of(self.get_base_model())
        inputs: dict[str, Any] = {"inputs_embeds": embeddings_BTD, "use_cache": cache is not None}
        if mask_BT is not None:
            inputs["attention_mask"] = mask_BT.to(embeddings_BTD.device)
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        batch, length, _ = embeddings_BTD.shape
        past = 0 if cache is None else cache.get_seq_length()
        if cache is not None:
            inputs["past_key_values"] = cache.local_cache(self.config)
        self._cloud_pass = cloud
        try:
            hidden_BTD: Tensor = type(decoder).forward(decoder, **inputs).last_hidden_state
        except BaseException:
            if cache is not None:
                cache.restore(past)
            raise
        finally:
            self._cloud_pass = None
        self._count_edge_layers(batch, length, past, training=hidden_BTD.requires_grad)
        return hidden_BTD

    def run_layer(
        self,
        index: int,
        hidden_BTD: Tensor,
        run: Callable[[Tensor], Any],
        skip: Callable[[Tensor], Any],
    ) -> Any:
        """Run an edge layer; at the first of the others go through the cloud, which runs them
        all.
        """
        if not self.edge_layers.in_cloud(index):
            return run(hidden_BTD)
        if index == self.edge_layers.first:
            if self._cloud_pass is None:
                raise AssertionError("layers run inside a forward of the decoder")
            hidden_BTD = self._cloud_pass(hidden_BTD)
        return skip(hidden_BTD)

    def last_hidden(self, exit_ND: Tensor) -> Tensor:
        """What the decoder makes of rows that leave the cloud, [N, D], each by itself.

        Where the edge holds layers that is the final norm, in float32; else the rows themselves.
        Raises UsageError where last layers run here: they look at more than one row.
        """
        if self.edge_layers.last:
            raise UsageError(
                "last_hidden: the last layers run here, and look at all tokens of a sequence"
            )
        if not self.edge_layers:
            return exit_ND
        decoder = decoder_of(self.get_base_model())
        embedding = self.get_input_embeddings()
        embeddings = embedding(
            torch.zeros(len(exit_ND), 1, dtype=torch.int64, device=self.device)
        ).detach()
        others = [
            one for one in decoder.children() if not isinstance(one, nn.ModuleList | nn.Embedding)
        ]
        modules = [module for one in others for module in one.modules()]
        weights = [
            (module, name, p)
            for module in modules
            for name, p in module.named_parameters(recurse=False)
        ]
        self._known = KnownCloud(
            EdgeLayers(count=self.edge_layers.count), exit_ND[:, None].float()
        )  # and no layer runs
        try:
            for module, name, p in weights:  # not in place: a backward pass may follow
                module._parameters[name] = nn.Parameter(p.float(), requires_grad=False)
            output = type(decoder).forward(
                decoder, inputs_embeds=embeddings.float(), use_cache=False
            )
            hidden: Tensor = output.last_hidden_state
        finally:
            self._known = None
            for module, name, p in weights:
                module._parameters[name] = p
        return hidden[:, 0]

    def _count_edge_layers(self, batch: int, length: int, past: int, *, training: bool) -> None:
        """FLOPs of edge layers and of the LoRA modules in them; padding is computed too."""
        sites = self._edge_layer_sites
        attention = attention_flops(self.config, batch, length, past)
        tokens, layers = batch * length, self.edge_layers.first + self.edge_layers.last
        self.meter.edge_layer_flops += forward_flops(sites, tokens) + attention * layers
        adapted = dict(self.edge_layer_adapters())
        trained = [site for site in sites if any(one.name in adapted for one in site.modules)]
        lowest = trained[0].index if trained else None
        if training:
            # Below the lowest adapter here nothing asks for gradients; above it, and above the
            # cloud's, all does.
            first = [site for site in sites if site.modules[0].layer < self.edge_layers.first]
            last = [site for site in sites if site.modules[0].layer >= self.edge_layers.end]
            from_below = bool(self._active_sites()) or any(site in first for site in trained)
            for part, below in ((first, False), (last, from_below)):
                if part and (below or any(site in part for site in trained)):
                    bottom = None if below else next(site.index for site in trained if site in part)
                    self.meter.edge_layer_flops += backward_flops(part, bottom, tokens, attention)
        for site in trained:
            for one in site.modules:
                if (layer := adapted.get(one.name)) is not None:
                    self.meter.adapter_flops += layer_flops(
                        layer, tokens, training=training, input_grad=site.index != lowest
                    )

    def _trains_below(self) -> bool:
        """Whether anything before the cloud's first layer is trained here."""
        adapters = (
            one
            for name, one in self.edge_layer_adapters()
            if layer_of(name) < self.edge_layers.first
        )
        embedding = self.get_input_embeddings()
        return any(
            p.requires_grad for module in (embedding, *adapters) for p in module.parameters()
        )

    def _match_sites(self) -> None:
        """Find where the adapters sit: at sites of the cloud, or in edge layers, whose gradients
        autograd makes.
        """
        self.sites, self._edge_layer_adapters = match_sites(
            self, self.link.description, self.edge_layers
        )
        for name, layer in self._edge_layer_adapters.items():
            for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
                if not getattr(parameter, "dlora_checks_gradient", False):
                    parameter.dlora_checks_gradient = True
                    trained = (
                        parameter.requires_grad
                    )  # without, there can be no hook; it may be trained later
                    parameter.requires_grad_(True)
                    parameter.register_hook(
                        lambda grad, name=name: check_finite(grad, f"a gradient of {name}")
                    )
                    parameter.requires_grad_(trained)

    def edge_layer_adapters(self) -> Iterator[tuple[str, LoraLayer]]:
        """LoRA layers inside edge layers, those in use."""
        for name, layer in self._edge_layer_adapters.items():
            if not layer.disable_adapters:
                yield name, layer

    def _position_ids(self, position_ids: Tensor | None, batch: int, length: int) -> Tensor | None:
        if position_ids is None:
            return None
        if not self.accepts_position_ids:
            raise UsageError(f"{type(self.get_base_model()).__name__} takes no position_ids")
        return position_ids.expand(batch, length).cpu()

    # ----------------------------------------------------------------- active and idle modules

    @property
    def adapted_modules(self) -> list[str]:
        """Full names of all modules with an adapter, in the cloud's calling order."""
        return [name for site in self.sites for name in site.names]

    @property
    def active_modules(self) -> list[str]:
        """Those that are trained and exchanged."""
        return [
            name for name in self.adapted_modules if self._active is None or name in self._active
        ]

    def set_active(self, modules: Iterable[str], idle: Idle = "drop") -> None:
        """Train and exchange only these modules, from the next micro-batch on.

        The others become idle: "drop" removes them (their B becomes zero, so that the saved adapter
        is what was trained; nothing of them leaves the edge), "cloud" uploads them, frozen, for the
        cloud to apply, "edge" applies them here, at the full price of an exchange. A module that
        becomes active again goes on with the weights that it has. Raises UsageError for
        modules without adapter.
        """
        active = frozenset(modules)
        if idle == "cloud" and isinstance(self.peft_config["default"], BottleneckConfig):
            raise UsageError(
                "idle=cloud: the cloud applies products of two matrices, and no bottleneck adapters"
            )
        if unknown := sorted(active - set(self.adapted_modules)):
            raise UsageError(
                f"set_active: {unknown[0]} has no adapter; those that have: "
                f"{self.adapted_modules[:3]} ..."
            )
        self._active, self.idle, self._frozen = active, idle, {}
        for site in self.sites:
            for name, index, layer in zip(site.names, site.modules, site.layers, strict=True):
                if name in active:
                    continue
                if idle == "drop":
                    for adapter in layer.active_adapters:
                        if adapter in layer.lora_B:
                            for parameter in layer.lora_B[adapter].parameters():
                                parameter.data.zero_()
                elif idle == "cloud":
                    frozen = freeze(site.index, index, layer)
                    if any(frozen.message.b.data):  # a module that was never trained adds nothing
                        self._frozen[name] = frozen
        self._train_active_only()

    def _train_active_only(self) -> None:
        for site in self.sites:
            for name, layer in zip(site.names, site.layers, strict=True):
                wanted = self._active is None or name in self._active
                for adapter in layer.active_adapters:
                    for modules in (layer.lora_A, layer.lora_B):
                        if adapter in modules:
                            modules[adapter].requires_grad_(wanted)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Use the base model inside the context; afterwards idle modules are idle again."""
        try:
            with super().disable_adapter():
                yield
        finally:
            if self._active is not None:
                self._train_active_only()

    def _active_sites(self) -> list[ActiveSite]:
        """What is exchanged now: active modules, idle ones too with idle="edge"; none in
        `disable_adapter()`.
        """
        active = []
        for site in self.sites:
            used = [
                (module, layer, name)
                for name, module, layer in zip(site.names, site.modules, site.layers, strict=True)
                if not layer.disable_adapters
                and any(adapter in layer.lora_A for adapter in layer.active_adapters)
                and (self._active is None or self.idle == "edge" or name in self._active)
            ]
            if any(layer.merged for _, layer, _ in used):
                raise UsageError(
                    "adapters cannot be merged on the edge, which has no base weights: use `dlora "
                    "merge`"
                )
            if used:
                modules, layers, names = zip(*used, strict=True)
                active.append(
                    dataclasses.replace(site, modules=modules, layers=layers, names=names)
                )
        return active

    def _applied_by_cloud(self) -> list[FrozenModule]:
        """Idle modules that the cloud applies now, in its order."""
        return [
            self._frozen[name]
            for site in self.sites
            for name, layer in zip(site.names, site.layers, strict=True)
            if name in self._frozen and not layer.disable_adapters
        ]

    def _probed(self) -> list[pb.ActiveSite]:
        wanted = set(self.probe_modules)
        found = []
        for index, site in enumerate(self.link.description.sites):
            if modules := [
                number for number, module in enumerate(site.modules) if module.name in wanted
            ]:
                found.append(pb.ActiveSite(site=index, modules=modules))
        return found

    def _note_probe(self, entries: Sequence[pb.ActiveSite], norms: Sequence[float]) -> None:
        sites = self.link.description.sites
        names = [
            sites[entry.site].modules[module].name for entry in entries for module in entry.modules
        ]
        self.probe_norms.append(dict(zip(names, norms, strict=True)))

    # ----------------------------------------------------------------- accounting

    def _count_head(self, rows: int, *, training: bool) -> None:
        head = self.get_output_embeddings()
        if head is not None:
            vocab, width = head.weight.shape
            self.meter.head_flops += 2 * rows * vocab * width * (2 if training else 1)

    # ----------------------------------------------------------------- generation

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of transformers, with a KV cache in the cloud that is freed at the end.

        To keep the cache for a next turn pass your own: `past_key_values=dlora.CloudCache()`.
        Raises UsageError for cache implementations that need keys and values here.
        """
        config = kwargs.get("generation_config") or self.generation_config
        implementation = kwargs.get("cache_implementation", config.cache_implementation)
        if implementation not in (None, "dynamic"):
            raise UsageError(
                f"cache_implementation={implementation!r} is not supported: keys and values stay "
                "in the cloud"
            )
        cached = kwargs.get("past_key_values")
        drafts = kwargs.get("assistant_model") or kwargs.get(
            "prompt_lookup_num_tokens", config.prompt_lookup_num_tokens
        )
        if drafts and cached is not None and cached.get_seq_length():
            raise UsageError(
                "transformers' drafting reads the whole prompt: it cannot continue a KV cache"
            )
        use_cache = kwargs.get("use_cache", config.use_cache)
        if cached is not None or use_cache is False:
            return super().generate(*args, **kwargs)
        cache = CloudCache(_expected_length(args, kwargs, config))
        try:
            return super().generate(*args, **kwargs, past_key_values=cache)
        finally:
            cache.close()

    # -------------------------------------- adapters: adding, saving, loading

    def add_adapter(
        self, adapter_name: str, peft_config: LoraConfig, *args: Any, **kwargs: Any
    ) -> None:
        """Add another adapter, under the same rules as the first."""
        if isinstance(peft_config, BottleneckConfig) or isinstance(
            self.peft_config["default"], BottleneckConfig
        ):
            raise UsageError("bottleneck adapters stand alone: load each on a model of its own")
        super().add_adapter(adapter_name, checked_config(peft_config), *args, **kwargs)
        self._match_sites()

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Write a standard adapter folder. Unlike peft's own default this never asks a hub."""
        if isinstance(self.peft_config["default"], BottleneckConfig):
            save_bottleneck(self, Path(save_directory))
            return
        kwargs.setdefault("save_embedding_layers", False)
        super().save_pretrained(save_directory, *args, **kwargs)


def get_peft_model(
    link: Link,
    config: LoraConfig,
    *,
    wire: Literal["plain", "factored"] = "plain",
    wire_dtype: str = "fp16",
    retry: RetryPolicy | None = None,
    device: str | torch.device = "cpu",
    edge_layers: tuple[int, int] = (0, 0),
) -> SplitModel:
    """Put a fresh adapter on the cloud's model: `peft.get_peft_model` for a model that is
    elsewhere.

    `config` is a peft.LoraConfig or a `dlora.BottleneckConfig`. `link` comes from `dlora.connect`
    or `dlora.in_process`. `wire_dtype` is fp32 (exact), fp16, bf16, int8 or int4; `wire` is plain
    or factored (see `SplitModel`). `edge_layers`: so many of the first and of the last decoder
    layers run here, where the server allows it: less of what leaves can be read. Raises UsageError
    for what cannot be supported, by name. At the same seed the adapter starts with the same values
    as `peft.get_peft_model` on the full model.
    """
    if wire not in ("plain", "factored"):
        raise UsageError(f"wire: got {wire!r}, want plain or factored")
    if wire_dtype not in WIRE_DTYPES:
        raise UsageError(f"wire dtype: got {wire_dtype!r}, want one of {', '.join(WIRE_DTYPES)}")
    config = checked_config(config)
    description = link.description
    if WIRE_DTYPES[wire_dtype] not in description.wire_dtypes:
        known = [name for name, number in WIRE_DTYPES.items() if number in description.wire_dtypes]
        raise UsageError(
            f"wire dtype: {link.address} does not know {wire_dtype!r}, only {', '.join(known)}"
        )
    here = edge_layers_of(link, edge_layers)
    base = build_skeleton(link, here)
    config.base_model_name_or_path = description.model_id
    try:
        model = SplitModel(base, config, link, wire_dtype, retry or RetryPolicy(), here)
    except ValueError as error:
        if isinstance(error, DLoRAError):
            raise
        # peft says which targets it did not find; say what there is.
        raise UsageError(f"{error} This server allows: {allowed_names(description)}.") from error
    model.wire = wire
    drop_stand_ins(base)
    model.eval() if config.inference_mode else model.train()
    return model.to(device)


def load_adapter(
    link: Link,
    folder: str | Path,
    *,
    is_trainable: bool = True,
    wire: Literal["plain", "factored"] = "plain",
    wire_dtype: str = "fp16",
    retry: RetryPolicy | None = None,
    device: str | torch.device = "cpu",
    edge_layers: tuple[int, int] = (0, 0),
) -> SplitModel:
    """Put an existing adapter folder, made here or by peft, on the cloud's model.

    Raises UsageError if it does not fit: another kind of adapter, other modules, other shapes.
    """
    config = read_adapter_config(folder)
    config.inference_mode = not is_trainable
    model = get_peft_model(
        link,
        config,
        wire=wire,
        wire_dtype=wire_dtype,
        retry=retry,
        device=device,
        edge_layers=edge_layers,
    )
    try:
        weights = load_peft_weights(str(folder), device=str(device))
        result = set_peft_model_state_dict(model, weights)
    except (RuntimeError, OSError, ValueError) as error:
        raise UsageError(
            f"the adapter in {folder} does not fit {link.description.model_id}: {error}"
        ) from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise UsageError(
            f"the adapter in {folder} does not fit {link.description.model_id}: it lacks "
            f"{missing[:3]} and has "
            f"unknown {result.unexpected_keys[:3]}"
        )
    return model


def load_base(
    link: Link,
    *,
    wire_dtype: str = "fp16",
    retry: RetryPolicy | None = None,
    device: str | torch.device = "cpu",
    edge_layers: tuple[int, int] = (0, 0),
) -> SplitModel:
    """The served model as it is: no adapter is active, and a pass takes one round trip."""
    names = [
        module.name for site in link.description.sites for module in site.modules if module.allowed
    ]
    if not names:
        raise UsageError(f"{link.address} allows no adapters")
    # peft wants a module to sit on; it is switched off at once.
    config = LoraConfig(r=1, target_modules=names[:1])
    model = get_peft_model(
        link, config, wire_dtype=wire_dtype, retry=retry, device=device, edge_layers=edge_layers
    )
    model.base_model.disable_adapter_layers()
    return model.eval()


def load_tokenizer(link: Link) -> PreTrainedTokenizerBase:
    """The served model's tokenizer; only data files come from the peer, never code."""
    folder = link.edge_files()
    if not (folder / "tokenizer_config.json").is_file():
        raise UsageError(
            f"{link.address} serves no tokenizer with {link.description.model_id}: load one "
            "yourself"
        )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False
    )
    return tokenizer


def _spread(rows_KD: Tensor, keep_BT: Tensor) -> Tensor:
    """[K, D] -> [B, T, D], zero where nothing was kept."""
    full = rows_KD.new_zeros(keep_BT.numel(), rows_KD.shape[1])
    keep = keep_BT.reshape(-1).nonzero()[:, 0].to(rows_KD.device)
    return full.index_put((keep,), rows_KD).view(*keep_BT.shape, -1)


def _expected_length(
    args: tuple[Any, ...], kwargs: dict[str, Any], config: GenerationConfig
) -> int:
    """Tokens that a call of `generate` may come to; 0 if it does not say."""
    prompt = next(
        (one for one in (*args, kwargs.get("inputs"), kwargs.get("input_ids")) if one is not None),
        None,
    )
    length: int = prompt.shape[1] if isinstance(prompt, Tensor) and prompt.dim() == 2 else 0
    new = kwargs.get("max_new_tokens", config.max_new_tokens)
    return length + new if new else kwargs.get("max_length", config.max_length) or 0


def _remote_forward(
    model: SplitModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **others: Any,
) -> BaseModelOutputWithPastAndCrossAttentions:
    """Stands in for the decoder's forward; refuses by name what would change the result
    unnoticed.
    """
    if past_key_values is None and use_cache:
        past_key_values = CloudCache()
    if past_key_values is not None and not isinstance(past_key_values, CloudCache):
        raise UsageError(
            f"past_key_values: got a {type(past_key_values).__name__}, want a dlora.CloudCache: "
            "keys and values stay "
            "in the cloud"
        )
    for name, value in others.items():
        if name not in _HARMLESS_ARGUMENTS and value is not None and value is not False:
            raise UsageError(f"argument {name} is not supported by a split model")
    if attention_mask is not None and (
        not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2
    ):
        raise UsageError("attention_mask: want a [batch, length] tensor of 0 and 1")
    if inputs_embeds is None:
        if input_ids is None:
            raise UsageError("got neither input_ids nor inputs_embeds")
        inputs_embeds = model.get_input_embeddings()(input_ids.view(-1, input_ids.shape[-1]))
    hidden = model.run_decoder(inputs_embeds, attention_mask, position_ids, past_key_values)
    return BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden, past_key_values=past_key_values
    )


def _new_columns(
    cache: CloudCache, mask_BT: Tensor | None, batch: int, length: int
) -> Tensor | None:
    """The mask of the new tokens alone. Raises UsageError if that of the cached ones has
    changed.
    """
    if mask_BT is None:
        return None
    past = cache.get_seq_length()
    if mask_BT.shape != (batch, past + length):
        raise UsageError(
            f"attention_mask: got shape {list(mask_BT.shape)}, want {[batch, past + length]}: "
            "cached and new tokens"
        )
    known_BT = cache.known_mask(batch)
    before_BT = mask_BT[:, :past].bool().cpu()
    same = (
        bool(before_BT.all()) if known_BT is None else torch.equal(before_BT, known_BT.bool().cpu())
    )
    if not same:
        raise UsageError(
            "attention_mask: other tokens than before are masked in the cached part: start a new "
            "cache"
        )
    return mask_BT[:, past:].cpu()
