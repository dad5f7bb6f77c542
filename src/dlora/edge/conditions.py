"""What a forward pass on the edge depends on beside its input and weights.

A pass that the cloud lost runs again under the same conditions, and so gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

__all__ = ["Conditions"]


class Conditions:
    """Random states and autocast of a device, as they are now.

    Where all numbers come from one `generator`, its state stands for those of the process.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.device, self._generator = device, generator
        if generator is not None:
            self._own_rng = generator.get_state()
        else:
            self._cpu_rng, self._device_rng = torch.get_rng_state(), _device_rng_state(device)
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", device.type}
        }

    def restore_rng(self) -> None:
        """Let what follows draw the same random numbers."""
        if self._generator is not None:
            self._generator.set_state(self._own_rng)
            return
        torch.set_rng_state(self._cpu_rng)
        if self._device_rng is not None:
            _set_device_rng_state(self._device_rng, self.device)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The same autocast, also where backward has left it."""
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


def _device_rng_state(device: torch.device) -> Tensor | None:
    """That of an accelerator; None on the CPU, whose state is another."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def _set_device_rng_state(state: Tensor, device: torch.device) -> None:
    module = torch.get_device_module(device)
    if device.type == "mps":  # there is one of them, and no number
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)
