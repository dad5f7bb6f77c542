"""A model over several devices of one machine, as transformers and accelerate place it.

Every module has a device on which it computes; accelerate's hooks bring there what it reads. A
module whose weights are "on cpu" beside a GPU, or "on disk", is *offloaded*: they are loaded for
each call and dropped behind it. accelerate does that for one thread. Here passes of several threads
call a module at the same time, and one may end in its middle: `share_offloaded` takes care of both.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import _get_device_map

from dlora.cloud.device_map import Device
from dlora.errors import UsageError
from dlora.protocol.weights import is_offloaded

__all__ = ["device_of", "dispatch", "places", "plan", "share_offloaded"]

log = logging.getLogger(__name__)


class _Weights:
    """The weights of one offloaded module: there while any pass is in it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.hook: Any = module._hf_hook
        self.own: Any = module._old_forward
        self._users, self._lock = 0, threading.Lock()

    @contextmanager
    def _loaded(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self.hook.pre_forward(self.module)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self.hook.post_forward(self.module, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with its weights and what it reads on its device."""
        device = self.hook.execution_device
        with self._loaded():
            return self.own(
                *send_to_device(args, device),
                **send_to_device(kwargs, device, skip_keys=self.hook.skip_keys),
            )


def share_offloaded(model: PreTrainedModel) -> bool:
    """Let several threads call offloaded modules; return whether there are any.

    Raises UsageError for a placement that cannot be served.
    """
    for name, module in model.named_modules():
        hooks = getattr(getattr(module, "_hf_hook", None), "hooks", ())
        if any(getattr(hook, "offload", False) for hook in hooks):
            raise UsageError(f"device_map: {name} has more than one device: name each module once")
    if is_offloaded(model.get_input_embeddings()):
        raise UsageError(
            "device_map: the token embedding has to stay on a device: give the first one more "
            "max_memory, or name its module in a file"
        )

    modules = [module for module in model.modules() if is_offloaded(module)]
    for module in modules:
        module.forward = _Weights(module).forward
    if modules:
        log.warning(
            "%d modules are read each time they are used, which is slow: give the devices more "
            "max_memory if there is. Layers run again in backward, as with recompute",
            len(modules),
        )
    return bool(modules)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    hook = getattr(module, "_hf_hook", None)
    if is_offloaded(module) and hook is not None:
        return torch.device(hook.execution_device)
    return next(iter((*module.parameters(), *module.buffers()))).device


def places(model: nn.Module) -> str:
    """Where the model is, in words: how many modules of the map are on which device."""
    found = getattr(model, "hf_device_map", None)
    if not found:
        return ""
    counted = Counter(f"cuda:{one}" if isinstance(one, int) else str(one) for one in found.values())
    return ", ".join(f"{count} on {device}" for device, count in counted.items())


def dispatch(
    model: PreTrainedModel,
    device_map: str | dict[str, Device],
    max_memory: dict[Device, str] | None,
) -> None:
    """Spread a model that is in memory, with low-bit weights, over devices.

    Raises UsageError where some would be offloaded: that is for weights in full precision.
    """
    found = plan(model, device_map, max_memory)
    devices = set(found.values())
    if "disk" in devices or (len(devices) > 1 and "cpu" in devices):
        raise UsageError(
            "device_map: low-bit weights are not offloaded: give the devices more max_memory, or "
            "leave quantize out"
        )
    dispatch_model(model, found, skip_keys=model._skip_keys_device_placement)


def plan(
    model: PreTrainedModel,
    device_map: str | dict[str, Device],
    max_memory: dict[Device, str] | None,
) -> dict[str, Device]:
    """The device of every part of a model, which may be on `meta`: weights are not read.

    As transformers would place them, with the memory of this machine where none is given.
    """
    found: dict[str, Device] = _get_device_map(model, device_map, max_memory, None)
    return found
