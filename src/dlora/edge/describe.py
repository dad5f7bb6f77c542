"""What a server serves, what an adapter folder holds, and whether the two fit: lines for a
person.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dlora.edge.adapter_config import read_adapter_config
from dlora.edge.bottleneck import BottleneckConfig, is_series
from dlora.edge.sites import allowed_names
from dlora.errors import UsageError
from dlora.proto import dlora_pb2 as pb

__all__ = ["describe_adapter", "describe_server"]


def describe_server(address: str, description: pb.Description) -> Iterator[tuple[str, str]]:
    """(name, value) pairs: model, sites, limits."""
    limits = description.limits
    modules = [module for site in description.sites for module in site.modules]
    allowed = sum(module.allowed for module in modules)
    config = json.loads(description.config_json)
    cache = limits.cache_bytes_per_token
    yield (
        "server",
        f"{address}, software {description.software_version}, protocol "
        f"{description.protocol_version}",
    )
    yield (
        "model",
        f"{description.model_id} ({config.get('model_type')}), {description.compute_dtype}",
    )
    yield "fingerprint", description.fingerprint
    yield "widths", f"embedding {description.embedding_width}, hidden {description.hidden_width}"
    yield (
        "adapters",
        f"{allowed} of {len(modules)} modules at {len(description.sites)} sites may be adapted",
    )
    yield "targets", allowed_names(description)
    yield "lengths", f"{limits.max_length} tokens a sequence, {limits.max_tokens} a micro-batch"
    yield (
        "memory",
        (
            f"{limits.max_inflight_bytes / 2**20:.0f} MiB for all streams; "
            f"{limits.bytes_per_token / 2**10:.0f} KiB a "
            "training token"
        ),
    )
    yield (
        "KV cache",
        f"{cache / 2**10:.1f} KiB a token"
        if cache
        else "none: generation computes every token anew",
    )
    yield "messages", f"up to {limits.max_message_bytes / 2**20:.0f} MiB"
    files = ", ".join(sorted(file.name for file in description.edge_files))
    layers = description.layers
    if layers.max_first or layers.max_last:
        size = sum(file.size for file in layers.files) / 2**20
        yield (
            "edge layers",
            f"edges may hold up to the first {layers.max_first} and the last {layers.max_last} of "
            f"{layers.count} "
            f"({size:.0f} MiB)",
        )
    else:
        yield "edge layers", f"none: all {layers.count} stay in the cloud"
    yield (
        "edge files",
        f"{sum(file.size for file in description.edge_files) / 2**20:.1f} MiB: {files}",
    )


def describe_adapter(
    folder: Path, description: pb.Description | None = None
) -> Iterator[tuple[str, str]]:
    """(name, value) pairs: base, modules, size, the run that made it; with a server, whether they
    fit.

    Raises UsageError for a folder without adapter.
    """
    config = read_adapter_config(folder)
    shapes = _shapes(folder)
    names = sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in shapes})
    parameters = sum(math.prod(shape) for shape in shapes.values())
    kinds = sorted({name.rpartition(".")[2] for name in names})
    scale = "alpha / sqrt(r)" if config.use_rslora else "alpha / r"
    if isinstance(config, BottleneckConfig):
        what = f"bottleneck in {config.kind}" if config.kind == "series" else "parallel bottleneck"
        yield (
            "adapter",
            f"{folder}, {what}, size {config.r}, {config.activation}, scaled by {config.scale:g}",
        )
    else:
        yield (
            "adapter",
            f"{folder}, LoRA, rank {config.r}, alpha {config.lora_alpha}, scaled by {scale}",
        )
    yield "base", config.base_model_name_or_path or "not named"
    yield "modules", f"{len(names)}: {', '.join(kinds)}"
    yield (
        "size",
        f"{parameters} parameters, "
        f"{sum(f.stat().st_size for f in folder.glob('adapter_model.*')) / 2**20:.1f} MiB",
    )
    if description is not None:
        series = is_series(config)
        sites = [
            site
            for site in description.sites
            if any(module.name in names for module in site.modules)
        ]
        num_sites = len(names) if series else len(sites)
        found = {
            module.name: (module.out_features if series else site.in_features, module.out_features)
            for site in description.sites
            for module in site.modules
            if module.allowed
        }
        missing = [name for name in names if name not in found]
        other = [name for name in names if name in found and _widths(shapes, name) != found[name]]
        yield "sites", f"{num_sites} active: {num_sites + 1} round trips a generated token"
        if config.base_model_name_or_path != description.model_id:
            yield (
                "note",
                f"made for {config.base_model_name_or_path}, this server has "
                f"{description.model_id}",
            )
        if missing:
            yield (
                "fit",
                f"no: this server has no {missing[0]} that may be adapted ({len(missing)} such)",
            )
        elif other:
            yield (
                "fit",
                f"no: {other[0]} has widths {_widths(shapes, other[0])}, here {found[other[0]]}",
            )
        else:
            yield "fit", "yes"
    yield from _describe_run(folder)


def _describe_run(folder: Path) -> Iterator[tuple[str, str]]:
    file = folder / "run.json"
    if not file.is_file():
        yield "run", "unknown: no run.json beside it"
        return
    try:
        run: dict[str, Any] = json.loads(file.read_text())
        yield (
            "run",
            f"{run['status']}, started {run['started']}, {run.get('steps', 0)} steps, "
            f"{run.get('seconds', 0):.0f} s",
        )
        loss = run.get("train_loss")
        yield (
            "loss",
            ("none yet" if loss is None else f"{loss:.4f}")
            + (f", eval {run['eval_loss']:.4f}" if run.get("eval_loss") is not None else ""),
        )
        settings = run["settings"]
        yield "data", str(settings["data"])
        yield "trained on", f"{run['model_id']}, fingerprint {run['fingerprint']}"
        yield "versions", ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} cannot be read: {type(error).__name__} {error}") from error


def _widths(shapes: dict[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    """(in, out) of a module by its two factors."""
    a = next(shape for key, shape in shapes.items() if key.endswith(f"{name}.lora_A.weight"))
    b = next(shape for key, shape in shapes.items() if key.endswith(f"{name}.lora_B.weight"))
    return a[1], b[0]


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors, without loading them."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UsageError(
            f"{folder} holds no adapter_model.safetensors: other formats are not looked into"
        )
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {
                name: tuple(tensors.get_slice(name).get_shape()) for name in list(tensors.keys())
            }
    except SafetensorError as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
