"""The edge half: a peft model whose decoder lives in the cloud.

`get_peft_model(link, LoraConfig(...))` gives a real `PeftModel` around the architecture's own
`...ForCausalLM` class. Embedding, LM head and LoRA weights are here; the decoder is an empty shell
whose forward drives a stream to the cloud. Training loops, `Trainer`, `SFTTrainer` and
`save_pretrained` see what they know.

One forward call, `model(input_ids=..., labels=...)`:

1. A hook sees the labels before anything runs. It makes a `ForwardCall`, which notes where hidden
   states are wanted, and hands on the labels of those positions alone (`forward_call.py`,
   `labels.py`).
2. The architecture's own forward embeds the ids and calls the decoder, whose forward is
   `remote_forward`. That refuses arguments which would change the result unnoticed, and calls
   `SplitModel.run_decoder`.
3. `run_decoder` settles which tokens travel and which hidden states come back (`ForwardCall.rows`).
   Where layers run here, the decoder's own forward runs, with the cloud in the middle
   (`edge_layers.py`).
4. `_through_cloud` sends the rows (`cloud_layers.py`). In training the whole decoder is one node
   of autograd, whose backward talks to the cloud again (`micro_batch.py`); with a KV cache, the
   cache sends (`kv_cache.py`). At every active site the cloud asks for deltas (`responder.py`,
   `lora.py`); on the hosted wire it computes them, of what travelled with the tokens (`hosted.py`).
5. Hidden states come back, and the call is over. The architecture's own head and loss, which are
   here, do the rest.

Shapes: B batch, T tokens, P cached tokens, N rows that travel, K kept positions, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from peft import LoraConfig, PeftConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from dlora.edge.active_set import ActiveSet, Idle
from dlora.edge.adapter_card import refuse_merging, write_card
from dlora.edge.adapter_config import checked_lora
from dlora.edge.bottleneck import BottleneckConfig, make_bottleneck, save_bottleneck
from dlora.edge.cloud_layers import CloudLayers, Kept
from dlora.edge.description import has_cache
from dlora.edge.edge_layers import EdgeDecoder
from dlora.edge.ends import check_trained, has_own_ends, head_flops, head_of, show_bias
from dlora.edge.forward_call import ForwardCall, ForwardCalls
from dlora.edge.hosted import KeptVersions, check_hosted
from dlora.edge.in_flight import PartCount
from dlora.edge.kv_cache import CloudCache, cache_for
from dlora.edge.labels import spread
from dlora.edge.link import Link
from dlora.edge.meter import Meter
from dlora.edge.micro_batch import as_node
from dlora.edge.options import OPTION_NAMES, OptionArguments, SplitOptions, check_experts
from dlora.edge.passes import PassInput, fill_padding, is_right_padded
from dlora.edge.prompt import trains_prompt, virtual_tokens
from dlora.edge.remote_forward import stand_in
from dlora.edge.responder import Wait
from dlora.edge.sites import ActiveSite, match_sites
from dlora.errors import UsageError
from dlora.protocol.codecs import MIXES, Codecs, name_of
from dlora.protocol.decoder import cache_name, decoder_of
from dlora.protocol.layers import CloudBetween, EdgeLayers
from dlora.protocol.lookups import Lookups

__all__ = ["SplitModel", "check_options"]


class SplitModel(PeftModelForCausalLM):
    """A `PeftModel` whose decoder runs in the cloud. `dlora.get_peft_model` makes one."""

    def __init__(
        self,
        base: PreTrainedModel,
        config: PeftConfig,
        link: Link,
        options: SplitOptions,
        edge_layers: EdgeLayers,
    ) -> None:
        super().__init__(base, config, adapter_name="default")
        make_bottleneck(self, "default")
        show_bias(base)
        self.link = link
        self.options = options
        """What was chosen when the model was built; `set_options` changes it."""
        self.part_count = PartCount.asked(options.in_flight)
        """How many parts of a micro-batch are in flight now."""
        self.edge_layers = edge_layers
        """Decoder layers that run here; their adapters need no exchange and are always trained."""

        self.active_set = ActiveSet(())
        self._kept = Kept()
        description = link.description
        self._calls = ForwardCalls(self)
        self._edge_decoder = EdgeDecoder(base, edge_layers, description, self._calls.runner)
        self.match_sites()

        self.meter = Meter()
        self.waits: list[Wait] = []
        """Of the newest training micro-batch: where its time went."""
        self.probe_modules: Sequence[str] = ()
        """Modules whose norm of g^T x every training micro-batch asks for, into `probe_norms`."""
        self.probe_norms: list[dict[str, float]] = []
        self.output_squares: dict[tuple[int, int], float] | None = None
        """If not None: sums of squared deltas by (site, module), over finished micro-batches."""

        self.lookups = Lookups.named(base, link.description.tables)
        arguments = inspect.signature(type(decoder_of(base)).forward).parameters
        self.accepts_position_ids = "position_ids" in arguments
        stand_in(self, base, self._edge_decoder.is_running)
        # generate() calls the base model and not this one; peft may call the base model's forward
        # and not the model. So hook both; but a prompt makes the text longer between the two.
        self._calls.hook(*([] if config.is_prompt_learning else [self]), base)

    # -------------------------------------- options

    def set_options(self, **changes: Unpack[OptionArguments]) -> None:
        """Change `options`, by name, from the next forward call on.

        Raises UsageError for values that cannot work, and for edge layers, which are loaded once.
        """
        if "edge_layers" in changes:
            raise UsageError("edge_layers are loaded when the model is built: build another one")
        options = self.options.changed(**changes)
        check_options(self.link, options)
        check_experts(options.wire, self._fused_names())
        self.options = options
        if {"in_flight", "wire"} & changes.keys():
            self.part_count = PartCount.asked(options.in_flight)

    def __setattr__(self, name: str, value: Any) -> None:
        # A module takes any attribute, so `model.noise = ...` would be taken, and add no noise.
        if name in OPTION_NAMES and name != "edge_layers":
            raise UsageError(f"{name} is an option: call model.set_options({name}=...)")
        super().__setattr__(name, value)

    # -------------------------------------- a forward call

    def run_decoder(
        self,
        embeddings_BTD: Tensor,
        mask_BT: Tensor | None,
        position_ids: Tensor | None,
        cache: CloudCache | None = None,
    ) -> Tensor:
        """Run the remote decoder; end the forward call.

        Returns hidden states [B, T, D], zero at positions that were not asked for; or those with
        labels alone, in the places of `HeadRequest.labels`. With a `cache` the tokens follow those
        in it, and the mask covers both: [B, P + T].
        """
        try:
            call = self._calls.current
            return self._run_decoder(call, embeddings_BTD, mask_BT, position_ids, cache)
        finally:
            self._calls.current = ForwardCall()

    def _run_decoder(
        self,
        call: ForwardCall,
        embeddings_BTD: Tensor,
        mask_BT: Tensor | None,
        position_ids: Tensor | None,
        cache: CloudCache | None,
    ) -> Tensor:
        batch, length, _ = embeddings_BTD.shape
        hide_lengths = self.options.hide_lengths
        if hide_lengths and cache is None and mask_BT is not None and is_right_padded(mask_BT):
            embeddings_BTD, mask_BT = fill_padding(embeddings_BTD, mask_BT), None

        if position_ids is not None and not self.accepts_position_ids:
            raise UsageError(f"{type(self.get_base_model()).__name__} takes no position_ids")
        columns_BT = mask_BT if cache is None else cache.new_columns(mask_BT, batch, length)
        # The last layers look at every token; without any, only what is asked for comes back.
        everything = bool(self.edge_layers.last) or hide_lengths
        rows = call.rows(batch, length, columns_BT, position_ids, everything=everything)
        all_rows = self.part_count.wants_all_rows(self.link.description)

        def cloud(entry_BTD: Tensor) -> Tensor:
            entry_BTD = self.options.noise.on_entry(entry_BTD)
            return self._through_cloud(rows.pass_input(entry_BTD, all_rows=all_rows), cache)

        if not self.edge_layers:
            kept_KD = rows.only_kept(cloud(embeddings_BTD))
        else:
            call.layers = CloudBetween(
                self.edge_layers,
                lambda entry_BTD: spread(cloud(entry_BTD).to(entry_BTD.dtype), rows.wanted_BT),
            )
            trained_below = bool(self.active_set.exchanged())
            hidden_BTD = self._edge_decoder.run(
                embeddings_BTD, mask_BT, position_ids, cache, self.meter, trained_below
            )
            kept_KD = hidden_BTD[rows.keep_BT.to(hidden_BTD.device)]

        kept_KD = kept_KD.to(embeddings_BTD.dtype)
        labels = call.request.labels
        head_rows = batch * length if labels is None else labels.numel()
        training = kept_KD.requires_grad
        head = head_of(self.get_base_model())
        self.meter.head_flops += head_flops(head, head_rows, training=training)
        return call.request.arrange(kept_KD, rows.keep_BT)

    def _through_cloud(self, new: PassInput, cache: CloudCache | None) -> Tensor:
        """Run the cloud's layers over new tokens; return the kept hidden states, float32 [K, D]."""
        measures = self.output_squares is not None
        check_hosted(self.options.wire, self.active_set.idle, measures=measures)
        with_grad, parameters, wants_input_grad = torch.is_grad_enabled(), [], False
        sites = self.active_set.exchanged()
        if with_grad:
            parameters = [parameter for site in sites for parameter in site.parameters]
            # Trainers let inputs ask for gradients without need: backward would go to the bottom.
            wants_input_grad = new.entry_ND.requires_grad and self.trains_before_cloud
        training = bool(parameters) or wants_input_grad

        cloud = _cloud_layers(self, sites)
        if cache is not None:
            if training:
                raise UsageError("a KV cache keeps no gradients: use torch.no_grad(), or no cache")
            return cloud.extend(new, cache, [layer for _, layer in self.edge_layer_adapters()])

        micro_batch = cloud.micro_batch(
            new,
            training=training,
            wants_input_grad=wants_input_grad,
            probe_modules=self.probe_modules,
        )
        if not training:
            return micro_batch.forward()
        self.waits = []
        micro_batch.measure(self.waits, self.probe_norms, self.output_squares)
        entry_ND = new.entry_ND if wants_input_grad else new.entry_ND.detach()
        return as_node(micro_batch, entry_ND, parameters)

    @property
    def trains_before_cloud(self) -> bool:
        """Whether anything is trained here of which the cloud has to send a gradient."""
        return self._edge_decoder.trains_before_cloud() or trains_prompt(self)

    def forget_kept(self) -> None:
        """Send the hosted wire's adapter whole the next time, as after an optimizer step."""
        self._kept.versions = KeptVersions()

    @property
    def has_cache(self) -> bool:
        """Whether the model is served with a KV cache."""
        return has_cache(self.link.description.limits)

    def last_hidden(self, exit_ND: Tensor) -> Tensor:
        """What the decoder makes of rows that leave the cloud, [N, D], each by itself.

        Where layers run here that is the final norm, in float32; else the rows themselves. Raises
        UsageError where last layers run here: they look at more than one row.
        """
        if self.edge_layers.last:
            raise UsageError("last_hidden: last layers run here, and look at all of a sequence")
        if not self.edge_layers:
            return exit_ND
        known, no_layer_here = exit_ND[:, None].float(), EdgeLayers(count=self.edge_layers.count)
        self._calls.current = ForwardCall(layers=CloudBetween(no_layer_here, lambda _: known))
        try:
            return self._edge_decoder.finish(len(exit_ND))
        finally:
            self._calls.current = ForwardCall()

    # -------------------------------------- active and idle modules

    def match_sites(self) -> None:
        """Find where the adapters sit: at sites of the cloud, or in edge layers."""
        self.active_set.sites, adapters = match_sites(self, self.link.description, self.edge_layers)
        self._edge_decoder.use_adapters(adapters)
        check_experts(self.options.wire, self._fused_names())

    def _fused_names(self) -> list[str]:
        """Full names of adapted experts, which the hosted wire alone can have."""
        return [name for site in self.sites if site.is_fused for name in site.names]

    @property
    def sites(self) -> tuple[ActiveSite, ...]:
        """The cloud's sites that have adapters, in its calling order."""
        return self.active_set.sites

    @property
    def adapted_modules(self) -> list[str]:
        """Full names of all modules with an adapter at these sites, in the same order."""
        return self.active_set.adapted_modules

    @property
    def active_modules(self) -> list[str]:
        """Those that are trained and exchanged."""
        return self.active_set.active_modules

    def edge_layer_adapters(self) -> Iterator[tuple[str, LoraLayer]]:
        """LoRA layers inside edge layers, those in use, by full name."""
        return self._edge_decoder.adapters()

    def set_active(self, modules: Iterable[str], idle: Idle = "drop") -> None:
        """Train and exchange only these modules, from the next micro-batch on.

        The others become idle. "drop" removes them: their B becomes zero, so that the saved adapter
        is what was trained, and nothing of them leaves the edge. "cloud" uploads them, frozen, for
        the cloud to apply. "edge" applies them here, at the full price of an exchange. A module
        that becomes active again goes on with the weights that it has. Raises UsageError for
        modules without adapter.
        """
        if idle == "cloud" and isinstance(self.peft_config["default"], BottleneckConfig):
            raise UsageError(
                "idle=cloud: the cloud applies products of two matrices, and no bottleneck adapters"
            )
        check_hosted(self.options.wire, idle, measures=self.output_squares is not None)
        self.active_set.choose(modules, idle)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Use the base model inside the context; afterwards idle modules are idle again."""
        try:
            with super().disable_adapter():
                yield
        finally:
            self.active_set.train_active_only()

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Use this adapter from now on; idle modules of the one in use before stay idle."""
        super().set_adapter(adapter_name, inference_mode)
        self.active_set.train_active_only()

    # -------------------------------------- as transformers and peft have it
    merge_and_unload = merge_adapter = staticmethod(refuse_merging)
    create_or_update_model_card = write_card

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of transformers, with a KV cache in the cloud that is freed at the end.

        To keep the cache for a next turn pass your own: `past_key_values=dlora.CloudCache()`.
        Raises UsageError for cache implementations that need keys and values here.
        """
        config = kwargs.get("generation_config") or self.generation_config
        ahead = virtual_tokens(self)
        cache = cache_for(args, kwargs, config, ahead) if self.has_cache else None
        if not self.has_cache and kwargs.get("use_cache"):
            kwargs["use_cache"] = False  # the same answers, in more time
        if cache is None:
            return super().generate(*args, **kwargs)
        try:
            return super().generate(*args, **kwargs, **{cache_name(self.get_base_model()): cache})
        finally:
            cache.close()

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any
    ) -> None:
        """Add another adapter, under the same rules as the first."""
        if not self.peft_config:  # a prompt, which peft adds while the model is built
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)
            return
        config = _checked_other(self, peft_config, has_experts=bool(self._fused_names()))
        super().add_adapter(adapter_name, config, *args, **kwargs)
        self.match_sites()

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Write a standard adapter folder. Unlike peft's own default this never asks a hub."""
        if isinstance(self.peft_config["default"], BottleneckConfig):
            save_bottleneck(self, Path(save_directory).expanduser())
            return
        own = has_own_ends(self.get_base_model(), self.link.description)
        kwargs.setdefault("save_embedding_layers", own)
        super().save_pretrained(str(Path(save_directory).expanduser()), *args, **kwargs)


def _checked_other(model: SplitModel, config: PeftConfig, *, has_experts: bool) -> LoraConfig:
    """The configuration of one more adapter. Raises UsageError for what cannot stand beside."""
    first = model.peft_config["default"]
    if isinstance(config, BottleneckConfig) or isinstance(first, BottleneckConfig):
        raise UsageError("bottleneck adapters stand alone: load each on a model of its own")
    if not isinstance(config, LoraConfig) or not isinstance(first, LoraConfig):
        raise UsageError("prompts stand alone: load each on a model of its own")
    if config.target_parameters and not has_experts:
        raise UsageError(
            "target_parameters: an adapter on experts has to be the model's first: build "
            "another one with it"
        )
    config = checked_lora(config)
    if config.task_type != first.task_type:
        raise UsageError(f"task_type {config.task_type}: the model was built for another")
    check_trained(config, model.get_base_model())
    return config


def _cloud_layers(model: SplitModel, sites: Sequence[ActiveSite]) -> CloudLayers:
    """The cloud's layers with these sites active, as a call finds them."""
    return CloudLayers(
        link=model.link,
        meter=model.meter,
        options=model.options,
        edge_layers=model.edge_layers,
        sites=sites,
        frozen=model.active_set.applied_by_cloud(),
        kept=model._kept,
        part_count=model.part_count,
    )


def check_options(link: Link, options: SplitOptions) -> None:
    """Raises UsageError for options that the server cannot serve."""
    _check_codecs(link, options.codecs)
    if options.cache_prefix and not link.description.limits.prefix_bytes:
        raise UsageError(
            f"cache_prefix: {link.address} keeps no prefixes: it was started with prefix_mib 0, is "
            "of an earlier version, or its model's layers share more than hidden states. Leave "
            "cache_prefix out, or use another server"
        )


def _check_codecs(link: Link, codecs: Codecs) -> None:
    offered = set(link.description.wire_dtypes)
    if not codecs.dtypes <= offered:
        known = [name for name, named in MIXES.items() if named.dtypes <= offered]
        raise UsageError(
            f"wire dtype: {link.address} does not know {name_of(codecs)!r}, only {', '.join(known)}"
        )
