"""The one place that reads a model's weights: what is served is what the checkpoint holds.

transformers fills tensors that a checkpoint lacks with random numbers, puts an adapter that lies
beside the weights into the model, and leaves out what fits nowhere. Here all of that is refused.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dlora.cloud.device_map import Device
from dlora.cloud.gguf import unused_of_gguf
from dlora.errors import DLoRAError, ModelError
from dlora.files import ScratchFolder
from dlora.protocol.decoder import decoder_of

__all__ = ["check_files", "check_foreign_kernels", "first_line", "load_checkpoint", "reading"]

log = logging.getLogger(__name__)

_SUFFIXES: Final = (".safetensors", ".bin", ".gguf", ".json", ".model", ".jinja", ".tiktoken")
_TEXTS: Final = ("merges.txt", "vocab.txt")
_TEMPLATES: Final = "additional_chat_templates/*"
_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_SHOWN: Final = 3
"""Names of tensors in a message."""
_CONSTANT: Final = re.compile(r"(^|\.)(masked_bias|position_ids|rotary_emb\.\w+)$")
"""Constants that older versions saved, and that are no weights."""
_DRAFTING: Final = re.compile(r"(^|\.)(mtp|nextn)\b")
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")
"""Heads that draft tokens are modules, or layers behind the last one; no answer needs them."""
_PART: Final = re.compile(r"-\d{5}-of-\d{5}$")
"""How the files of a GGUF in parts end."""
_KERNEL_TOLERANCE: Final = 0.02
"""Largest share by which a low-bit kernel may differ from its dequantised weight: bf16 rounds to
0.4 %, and 8-bit kernels round activations as well. Wrong kernels are off by more than a half.
"""
_PROBE_ROWS: Final = 4


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a library raises about broken files into a ModelError of one line.

    The libraries have no common error, and those of Rust are no `Exception`.
    """
    try:
        yield
    except (DLoRAError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise ModelError(f"{what}: {first_line(error)}") from error


def load_checkpoint(
    source: str | Path,
    name: str,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    device_map: str | dict[str, Device] | None = None,
    max_memory: dict[Device, str] | None = None,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """The model in a folder, a hub's repository, or the GGUF file of a folder, on the CPU.

    With `device_map` it is on the devices that this gives its modules, or that are found for them.
    `name` is what messages call it, `device` where it will run. Code of a repository is never run.
    Raises ModelError for files that cannot be read, and unless every tensor of the model, and
    nothing else of its decoder, is in the checkpoint.
    """
    folder = Path(source)
    check_files(
        [folder / gguf_file] if gguf_file else [*folder.glob("*"), *folder.glob(_TEMPLATES)]
    )
    if gguf_file is None and (Path(source) / "adapter_config.json").is_file():
        raise _holds_adapter(name)
    what = f"cannot load model {name!r}" if gguf_file is None else f"cannot read {name}"
    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    scratch = None if device_map is None else ScratchFolder("dlora-offload-")
    if scratch is not None:
        options = {"device_map": device_map, "max_memory": max_memory}
        options["offload_folder"] = scratch.name
    with ExitStack() as stack, reading(what):
        if scratch is not None:
            stack.callback(scratch.cleanup)
        if gguf_file is None:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            _check_quantisation(config, name, device)
        model: PreTrainedModel
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are named below, and refused
            output_loading_info=True,
            **options,
        )
        unused = [] if gguf_file is None else unused_of_gguf(folder / gguf_file, model)
        # Weights on disk that are in no file of the checkpoint as they are: gone with the model.
        weakref.finalize(model, stack.pop_all().close)

    if getattr(model, "_hf_peft_config_loaded", False):
        raise _holds_adapter(name)
    _check_complete(model, found, name)
    if unused := [key for key in unused if not _DRAFTING.search(key)]:
        raise ModelError(
            f"{name} has {_listed(unused)}, and {type(model).__name__} as it is read from the file "
            "has no place for that: the model would not be the one that was trained. Serve it from "
            "safetensors"
        )
    return model


def check_files(files: Iterable[Path]) -> None:
    """Raises ModelError for files of a model that are empty, or not there but for a pointer."""
    for file in files:
        if not file.is_file() or (file.suffix not in _SUFFIXES and file.name not in _TEXTS):
            continue
        with file.open("rb") as stream:
            start = stream.read(len(_POINTER))
        if not start:
            raise ModelError(f"{file} is empty: get it again")
        if start == _POINTER:
            raise ModelError(f"{file} is a Git LFS pointer and not the file: run `git lfs pull`")


def _holds_adapter(name: str) -> ModelError:
    return ModelError(
        f"{name} holds an adapter (adapter_config.json), which would be served inside the model: "
        "serve its base, or a folder without adapter; `dlora merge` makes one model of both"
    )


def _check_complete(model: PreTrainedModel, found: dict[str, Any], name: str) -> None:
    """Raises ModelError for tensors that are missing, of another shape, or the decoder's surplus.

    `found` is transformers' `output_loading_info`.
    """
    if missing := sorted(found["missing_keys"]):
        part = " It is one file of several: join them with `llama-gguf-split --merge`."
        raise ModelError(
            f"{name} lacks {_listed(missing)} of {type(model).__name__}, which would be random "
            f"numbers.{part if _PART.search(Path(name).stem) else ' Get the whole checkpoint.'}"
        )

    if mismatched := sorted(found["mismatched_keys"]):
        key, got, want = mismatched[0]
        raise ModelError(
            f"{name}: {key} has shape {list(got)}, its configuration wants {list(want)}"
            f"{_more(len(mismatched) - 1)}: weights and config.json are not of one model"
        )

    # Heads of other tasks, towers of other inputs are left out; of the decoder nothing is.
    surplus = sorted(key for key in found["unexpected_keys"] if not _CONSTANT.search(key))
    if inside := [key for key in surplus if _in_decoder(key, model)]:
        raise ModelError(
            f"{name} has {_listed(inside)}, and {type(model).__name__} as config.json describes "
            "it has no place for that: the model would not be the one that was trained"
        )
    if surplus:
        log.warning("%s: %s are outside of the decoder, and not served", name, _listed(surplus))


def _in_decoder(key: str, model: PreTrainedModel) -> bool:
    """Whether a checkpoint's tensor is of the decoder, with or without the decoder's own name."""
    if _DRAFTING.search(key):
        return False
    layer, extra = _LAYER.search(key), getattr(model.config, "num_nextn_predict_layers", 0)
    if layer and extra and 0 <= int(layer[1]) - model.config.num_hidden_layers < extra:
        return False
    try:
        decoder: nn.Module = decoder_of(model)
    except ModelError:  # which loading it will say
        decoder = model
    prefix = next((path for path, one in model.named_modules() if path and one is decoder), "")
    children = {name for name, _ in decoder.named_children()}
    return not prefix or key.startswith(f"{prefix}.") or key.partition(".")[0] in children


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + _more(len(keys) - _SHOWN)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


# ----------------------------------------------------------------- checkpoints in low bits


def _check_quantisation(config: PreTrainedConfig, name: str, device: str) -> None:
    """Raises ModelError for a checkpoint in bits that this device would compute wrongly."""
    stored = getattr(config, "quantization_config", None)
    values = stored if isinstance(stored, dict) else getattr(stored, "to_dict", dict)()
    is_4bit = values.get("load_in_4bit") or values.get("_load_in_4bit")
    if device.startswith("cpu") and is_4bit:  # its method need not be named
        raise ModelError(
            f"{name} is quantised in bitsandbytes' 4 bits, whose kernels give wrong results on "
            "CPUs: serve the unquantised model with --quantize nf4, or this one on a GPU"
        )


def check_foreign_kernels(model: nn.Module, name: str) -> None:
    """Compare every low-bit linear of bitsandbytes with its dequantised weight, where it is.

    Outputs and gradients of the input: both halves of a split would be wrong alike, so that no
    comparison of the two shows it. Some kernels, such as those for CPUs with AVX512-BF16, have no
    gradient at all. Raises ModelError.
    """
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ not in ("Params4bit", "Int8Params"):
            continue
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        plain = dequantize_bnb_weight(weight, getattr(module, "state", None)).float()
        try:
            got = _with_gradient(module, plain)
        except RuntimeError as error:
            raise ModelError(
                f"{name}: {path} gives no result with a gradient on this device "
                f"({first_line(error)}): serve the unquantised model, with --quantize"
            ) from error
        off = _worst(got, _with_gradient(_Plain(plain, module), plain))
        if not off <= _KERNEL_TOLERANCE:
            raise ModelError(
                f"{name}: {path} gives results that differ by {off:.1%} from its dequantised "
                "weight on this device: serve the unquantised model, with --quantize"
            )


class _Plain:
    """The linear that a quantised one stands for."""

    def __init__(self, weight: torch.Tensor, module: nn.Module) -> None:
        self.weight, self.bias = weight, getattr(module, "bias", None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype)
        return functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def _with_gradient(linear: Any, plain: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs without and with gradient, and the gradient of the input, for fixed numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, plain.shape[1], generator=generator).to(plain.device)
    with torch.no_grad():
        quiet = linear(x)
    x.requires_grad_()
    y = linear(x)
    grad = torch.randn(y.shape, generator=generator).to(y)
    return quiet, y.detach(), torch.autograd.grad(y, x, grad)[0]


def _worst(got: Iterable[torch.Tensor], want: Iterable[torch.Tensor]) -> float:
    """Largest relative difference of pairs of tensors (2-norm)."""
    pairs = zip(got, want, strict=True)
    return max(((a - b).float().norm() / b.float().norm()).item() for a, b in pairs)


def first_line(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else ""
    known = isinstance(error, OSError | ValueError | RuntimeError | ImportError) and text
    return text if known else f"{type(error).__name__} {text}".strip()
