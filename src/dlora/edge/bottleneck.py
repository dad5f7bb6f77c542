"""Bottleneck adapters: h + s W_up f(W_down h), in series with a linear module or parallel to it.

Series adapters (Houlsby et al., arXiv:1902.00751) read the output of the linear that they sit on:
for "after attention and after the MLP" target the two that end these, such as o_proj and down_proj.
Parallel ones (He et al., arXiv:2110.04366) read its input, and what they give is added to its
output.

They live in peft's LoRA layers, with biases and an activation between the two matrices, so that
everything that works on those (optimizers, trainers, Kill and Revive, accounting, checkpoints)
works on them.

The folder that `save_pretrained` writes holds `bottleneck_config.json` and
`adapter_model.safetensors`. In it lora_A is W_down [R, D], with a bias, and lora_B is W_up [O, R],
with a bias. peft itself cannot read the folder, by design, as it would leave the activation out.

Shapes: N rows, D width of what is read, R size of the bottleneck, O width of the linear's output.
"""

from __future__ import annotations

import json
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlora.errors import UsageError
from dlora.files import write_json
from dlora.protocol.activations import ACTIVATIONS

__all__ = [
    "BottleneckConfig",
    "apply_bottleneck",
    "is_series",
    "load_bottleneck_config",
    "make_bottleneck",
]

CONFIG_FILE: Final = "bottleneck_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
_SAVED: Final = (
    "base_model_name_or_path",
    "r",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "lora_dropout",
)


@dataclass
class BottleneckConfig(LoraConfig):
    """Bottleneck adapters on `target_modules`, each of size `r`.

    Raises UsageError for a kind or an activation that there is not.
    """

    kind: str = field(default="series", metadata={"help": "series or parallel"})
    activation: str = field(default="relu", metadata={"help": "between the two matrices"})
    scale: float = field(default=1.0, metadata={"help": "of what is added"})

    def __post_init__(self) -> None:
        if self.kind not in ("series", "parallel"):
            raise UsageError(f"kind: got {self.kind!r}, want series or parallel")
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"activation: got {self.activation!r}, want one of {', '.join(ACTIVATIONS)}"
            )
        self.lora_alpha = self.scale * self.r  # peft scales by alpha / r
        super().__post_init__()


class _Down(nn.Linear):
    """f(W_down x + b): [N, D] -> [N, R]."""

    def __init__(self, width: int, size: int, activation: str, like: Tensor) -> None:
        super().__init__(width, size, device=like.device, dtype=like.dtype)
        self.activation = activation
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](super().forward(x))


class _Series:
    """A variant of peft's LoRA layers that reads their base output."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """result [N, O] -> [N, O]."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        rows = module.lora_dropout[active_adapter](result.to(down.weight.dtype))
        return result + up(down(rows)) * module.scaling[active_adapter]


def is_series(config: LoraConfig) -> bool:
    """Whether adapters of this kind read outputs."""
    return isinstance(config, BottleneckConfig) and config.kind == "series"


def make_bottleneck(model: PeftModel, adapter: str) -> None:
    """Turn the fresh LoRA layers of a `BottleneckConfig` into bottlenecks; leave others alone.

    W_up keeps peft's initial value (zero by default, so that nothing changes at first), biases are
    zero.
    """
    config = model.peft_config[adapter]
    if not isinstance(config, BottleneckConfig):
        return
    for layer in model.get_base_model().modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            old_down, old_up = layer.lora_A[adapter], layer.lora_B[adapter]
            width = old_up.out_features if config.kind == "series" else old_down.in_features
            layer.lora_A[adapter] = _Down(
                width, old_up.in_features, config.activation, old_down.weight
            )

            up = nn.Linear(old_up.in_features, old_up.out_features).to(old_up.weight)
            up.weight.data.copy_(old_up.weight.data)
            nn.init.zeros_(up.bias)
            layer.lora_B[adapter] = up

            if config.kind == "series":
                layer.lora_variant[adapter] = _Series()
            if config.inference_mode:
                layer.lora_A[adapter].requires_grad_(False)
                layer.lora_B[adapter].requires_grad_(False)


def save_bottleneck(model: PeftModel, folder: Path) -> None:
    """Write `bottleneck_config.json` and `adapter_model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    values = {name: getattr(config, name) for name in (*_SAVED, "kind", "activation", "scale")}
    values = {
        name: sorted(value) if isinstance(value, set) else value for name, value in values.items()
    }
    write_json(folder / CONFIG_FILE, values)
    weights = {  # under the names that peft gives and takes: without the adapter's own
        name.replace(".default.", "."): value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if ".lora_A.default." in name or ".lora_B.default." in name
    }
    save_file(weights, folder / WEIGHTS_FILE)


def load_bottleneck_config(folder: str | Path) -> BottleneckConfig | None:
    """The configuration of a bottleneck adapter's folder; None if it holds none.

    Raises UsageError for a broken one.
    """
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return BottleneckConfig(**values)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def apply_bottleneck(model: PreTrainedModel, adapter: BottleneckConfig | str | Path) -> PeftModel:
    """Put a bottleneck adapter on a full local model: a fresh one, or that of a folder.

    Raises UsageError for a folder without one, or one that does not fit.
    """
    if not isinstance(adapter, BottleneckConfig):
        adapter = Path(adapter).expanduser()
    config = adapter if isinstance(adapter, BottleneckConfig) else load_bottleneck_config(adapter)
    if config is None:
        raise UsageError(f"{adapter} holds no bottleneck adapter: {CONFIG_FILE} is missing")

    config = copy(config)
    config.base_model_name_or_path, config.task_type = None, TaskType.CAUSAL_LM
    wrapped = get_peft_model(model, config)
    make_bottleneck(wrapped, "default")

    if not isinstance(adapter, BottleneckConfig):
        try:
            result = set_peft_model_state_dict(wrapped, load_file(adapter / WEIGHTS_FILE))
        except (RuntimeError, OSError) as error:
            raise UsageError(f"the adapter in {adapter} does not fit: {error}") from error
        missing = [name for name in result.missing_keys if "lora_" in name]
        if missing or result.unexpected_keys:
            raise UsageError(f"the adapter in {adapter} does not fit: it lacks {missing[:3]}")
    return wrapped
