"""What a server serves, what an adapter folder holds, and whether the two fit: lines to read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open

from dlora.edge.adapter_config import read_any_config
from dlora.edge.bottleneck import BottleneckConfig, is_series
from dlora.edge.description import has_cache
from dlora.edge.ends import token_indices
from dlora.edge.experts import layer_widths, offered_experts
from dlora.edge.model_config import read_config
from dlora.edge.sites import allowed_names
from dlora.edge.wall import wall
from dlora.errors import UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.codecs import MIXES
from dlora.protocol.text import clean_text

__all__ = ["describe_adapter", "describe_server"]

_HEADS: Final = ("lm_head", "embed_out")
"""What architectures call the LM head."""
_PROMPT: Final = "prompt_embeddings"
"""What peft calls the rows of a prompt."""


def describe_server(address: str, description: pb.Description) -> Iterator[tuple[str, str]]:
    """(name, value) pairs: model, sites, limits."""
    with wall("the configuration", address):
        model_type = clean_text(json.loads(description.config_json).get("model_type"), 80)
    software, protocol = description.software_version, description.protocol_version
    yield "server", f"{address}, software {software}, protocol {protocol}"
    yield "model", f"{description.model_id} ({model_type}), {description.compute_dtype}"
    yield "fingerprint", description.fingerprint
    yield "widths", f"embedding {description.embedding_width}, hidden {description.hidden_width}"

    modules = [module for site in description.sites for module in site.modules]
    allowed = sum(module.allowed for module in modules)
    num_sites = len(description.sites)
    yield "adapters", f"{allowed} of {len(modules)} modules at {num_sites} sites may be adapted"
    yield "targets", allowed_names(description)
    if fused := sum(one.allowed for one in description.experts):
        kinds = offered_experts(description)
        yield "experts", f"{fused} fused weights, on the hosted wire (target_parameters): {kinds}"

    limits = description.limits
    yield "lengths", f"{limits.max_length} tokens a sequence, {limits.max_tokens} a micro-batch"
    per_token = f"{limits.bytes_per_token / 2**10:.0f} KiB a training token"
    yield "memory", f"{limits.max_inflight_bytes / 2**20:.0f} MiB for all streams; {per_token}"
    if has_cache(limits):
        states = limits.cache_bytes_per_sequence
        more = f", {states / 2**10:.1f} KiB a sequence" if states else ""
        yield "KV cache", f"{limits.cache_bytes_per_token / 2**10:.1f} KiB a token{more}"
    else:
        yield "KV cache", "none: generation computes every token anew"
    offered = set(description.wire_dtypes)
    yield "wire dtypes", ", ".join(name for name, mix in MIXES.items() if mix.dtypes <= offered)
    yield "messages", f"up to {limits.max_message_bytes / 2**20:.0f} MiB"
    yield from _describe_files(description)


def _describe_files(description: pb.Description) -> Iterator[tuple[str, str]]:
    """What an edge may fetch."""
    layers = description.layers
    if layers.max_first or layers.max_last:
        size = sum(file.size for file in layers.files) / 2**20
        yield (
            "edge layers",
            f"edges may hold up to the first {layers.max_first} and the last {layers.max_last} of "
            f"{layers.count} ({size:.0f} MiB)",
        )
    else:
        yield "edge layers", f"none: all {layers.count} stay in the cloud"

    names = ", ".join(sorted(file.name for file in description.edge_files))
    size = sum(file.size for file in description.edge_files) / 2**20
    yield "edge files", f"{size:.1f} MiB: {names}"


def describe_adapter(
    folder: Path, description: pb.Description | None = None
) -> Iterator[tuple[str, str]]:
    """(name, value) pairs: base, modules, size, the run that made it; whether it fits.

    Raises UsageError for a folder without adapter.
    """
    config = read_any_config(folder)
    shapes = _shapes(folder)
    if not isinstance(config, LoraConfig):
        yield from _describe_prompt(folder, config, shapes, description)
        yield from _describe_run(folder)
        return
    names = sorted(
        {
            name.split(".lora_")[0].removeprefix("base_model.model.")
            for name in shapes
            if ".lora_" in name
        }
    )
    yield "adapter", f"{folder}, {_kind_of(config)}"
    yield "base", config.base_model_name_or_path or "not named"

    kinds = {name.replace(".base_layer", "").rpartition(".")[2] for name in names}
    fused = sorted(config.target_parameters or ())
    of_experts = f"; fused weights of experts: {', '.join(fused)}" if fused else ""
    yield "modules", f"{len(names)}: {', '.join(sorted(kinds))}{of_experts}"
    if whole := config.modules_to_save:
        yield "trained whole", ", ".join(sorted(whole))
    for module, tokens in token_indices(config).items():
        yield "trained rows", f"{len(tokens)} of {module or 'the embedding'}"
    parameters = sum(math.prod(shape) for shape in shapes.values())
    size = sum(file.stat().st_size for file in folder.glob("adapter_model.*"))
    yield "size", f"{parameters} parameters, {size / 2**20:.1f} MiB"

    if description is not None:
        yield from _describe_fit(config, names, shapes, description)
    yield from _describe_run(folder)


def _describe_prompt(
    folder: Path,
    config: PeftConfig,
    shapes: dict[str, tuple[int, ...]],
    description: pb.Description | None,
) -> Iterator[tuple[str, str]]:
    """Virtual tokens, and whether they are as wide as the server's embedding."""
    shape = shapes.get(_PROMPT, (0, 0))
    yield "adapter", f"{folder}, {config.peft_type.value}, {shape[0]} virtual tokens"
    yield "base", config.base_model_name_or_path or "not named"
    if description is not None:
        width = description.embedding_width
        fits = "yes" if shape[-1] == width else f"no: width {shape[-1]}, here {width}"
        yield "sites", "none: 1 round trip a generated token"
        yield "fit", fits


def _kind_of(config: LoraConfig) -> str:
    """What an adapter is, in words."""
    if isinstance(config, BottleneckConfig):
        series = config.kind == "series"
        kind = "bottleneck in series" if series else "parallel bottleneck"
        return f"{kind}, size {config.r}, {config.activation}, scaled by {config.scale:g}"
    scale = "alpha / sqrt(r)" if config.use_rslora else "alpha / r"
    return f"LoRA, rank {config.r}, alpha {config.lora_alpha}, scaled by {scale}"


def _describe_fit(
    config: LoraConfig,
    names: list[str],
    shapes: dict[str, tuple[int, ...]],
    description: pb.Description,
) -> Iterator[tuple[str, str]]:
    """Whether the modules of an adapter are on the server, or here, and as wide."""
    in_series = is_series(config)
    sites = [
        site for site in description.sites if any(module.name in names for module in site.modules)
    ]
    fused = {
        name: widths for name, widths in layer_widths(config, description).items() if name in names
    }
    num_sites = len(names) if in_series else len(sites) + len(fused)
    trips = "1 round trip, on the hosted wire," if fused else f"{num_sites + 1} round trips"
    yield "sites", f"{num_sites} active: {trips} a generated token"

    made_for, served = config.base_model_name_or_path, description.model_id
    if made_for != served:
        yield "note", f"made for {made_for}, this server has {served}"

    # (in, out) of what may be adapted; in series an adapter reads the output.
    offered = {
        module.name: (module.out_features if in_series else site.in_features, module.out_features)
        for site in description.sites
        for module in site.modules
        if module.allowed
    } | fused

    # The LM head is on the edge, and so is what is trained of it; tokens may have been added.
    reads = description.head_width or description.hidden_width
    rows = read_config(description).get_text_config().vocab_size
    for name in names:
        if name.rpartition(".")[2] in _HEADS:
            offered[name] = (reads, max(rows, _widths(shapes, name)[1]))
    missing = [name for name in names if name not in offered]
    misfits = [name for name in names if name in offered and _widths(shapes, name) != offered[name]]
    if missing:
        yield (
            "fit",
            f"no: this server has no {missing[0]} that may be adapted ({len(missing)} such)",
        )
    elif misfits:
        name = misfits[0]
        yield "fit", f"no: {name} has widths {_widths(shapes, name)}, here {offered[name]}"
    else:
        yield "fit", "yes"


def _describe_run(folder: Path) -> Iterator[tuple[str, str]]:
    """The run that made an adapter, where run.json is beside it."""
    file = folder / "run.json"
    if not file.is_file():
        yield "run", "unknown: no run.json beside it"
        return
    try:
        run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        yield (
            "run",
            f"{run['status']}, started {run['started']}, {run.get('steps', 0)} steps, "
            f"{run.get('seconds', 0):.0f} s",
        )

        loss, eval_loss = run.get("train_loss"), run.get("eval_loss")
        text = "none yet" if loss is None else f"{loss:.4f}"
        yield "loss", text if eval_loss is None else f"{text}, eval {eval_loss:.4f}"

        if (task := run["settings"].get("task", "sft")) != "sft":
            figures = sorted(run.get("figures", {}).items())
            yield "task", ", ".join([task, *(f"{name} {one:.4f}" for name, one in figures)])
        yield "data", str(run["settings"]["data"])
        yield "trained on", f"{run['model_id']}, fingerprint {run['fingerprint']}"
        yield "versions", ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} cannot be read: {type(error).__name__} {error}") from error


def _widths(shapes: dict[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    """(in, out) of a module by its two factors; 0 for one that is not there, or no matrix."""
    found = []
    for end, side in ((f"{name}.lora_A.weight", 1), (f"{name}.lora_B.weight", 0)):
        shape = next((shape for key, shape in shapes.items() if key.endswith(end)), ())
        found.append(shape[side] if len(shape) == 2 else 0)
    return found[0], found[1]


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors, without loading them."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UsageError(
            f"{folder} holds no adapter_model.safetensors: other formats are not looked into"
        )
    try:
        with safe_open(file, framework="numpy") as tensors:
            shapes = {
                name: tuple(tensors.get_slice(name).get_shape()) for name in list(tensors.keys())
            }
    except SafetensorError as error:
        raise UsageError(f"{file} cannot be read: {error}; is it a whole file?") from error
    if not any(".lora_" in name or name == _PROMPT for name in shapes):
        raise UsageError(f"the adapter in {folder} has no weights: {file.name} holds none of LoRA")
    return shapes
