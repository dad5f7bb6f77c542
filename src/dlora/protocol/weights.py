"""Weights of a model wherever they are: on a device, or left in memory or on disk by accelerate."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["is_offloaded", "weight_of"]


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights are loaded each time it is called."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A tensor of a module, where it is kept."""
    value: Tensor = getattr(module, name)
    if value.device.type != "meta" or not is_offloaded(module):
        return value
    kept: Tensor = module._hf_hook.weights_map[name]  # type: ignore[union-attr,index]
    return kept
