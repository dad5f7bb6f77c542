"""Which adapted modules are trained and exchanged now, and what becomes of the others.

An active module is trained, and the cloud asks for its delta at every pass. The others are idle:
"drop" removes them, "cloud" lets the cloud apply them as frozen modules, "edge" exchanges them as
before without training them. The set may change between any two micro-batches. It is of the
adapters in use when it was chosen: while others are in use, such as the frozen copy that a
preference loss compares with, all of their modules are exchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from peft.tuners.lora import LoraLayer

from dlora.edge.lora import FrozenModule, active_names, freeze
from dlora.edge.sites import ActiveSite
from dlora.errors import UsageError

__all__ = ["ActiveSet", "Idle"]

Idle = Literal["drop", "cloud", "edge"]


class ActiveSet:
    """The adapted modules at the cloud's sites: active ones, idle ones, frozen ones."""

    def __init__(self, sites: tuple[ActiveSite, ...]) -> None:
        self.sites = sites
        """All sites with an adapter, in the cloud's calling order."""
        self.idle: Idle = "drop"
        """What becomes of adapted modules that are not active."""
        self.all_active = True
        """Whether no set was ever chosen."""
        self._active: frozenset[str] = frozenset()
        self._chosen_for: dict[str, list[str]] = {}
        self._frozen: dict[str, FrozenModule] = {}

    @property
    def adapted_modules(self) -> list[str]:
        """Full names of all modules with an adapter, in the cloud's calling order."""
        return [name for site in self.sites for name in site.names]

    @property
    def active_modules(self) -> list[str]:
        """Those that are trained and exchanged."""
        return [name for name in self.adapted_modules if self._is_active(name)]

    def _is_active(self, name: str) -> bool:
        return self.all_active or name in self._active

    def _is_other(self, name: str, layer: LoraLayer) -> bool:
        """Whether this layer has other adapters in use than those that the set was chosen for."""
        return not self.all_active and layer.active_adapters != self._chosen_for[name]

    def choose(self, modules: Iterable[str], idle: Idle) -> None:
        """Train and exchange only these modules.

        Raises UsageError for modules without adapter, and for experts that nobody could apply.
        """
        active = frozenset(modules)
        if unknown := sorted(active - set(self.adapted_modules)):
            raise UsageError(
                f"set_active: {unknown[0]} has no adapter; those that have: "
                f"{self.adapted_modules[:3]} ..."
            )

        fused = [name for site in self.sites if site.is_fused for name in site.names]
        if idle == "cloud" and (left := [name for name in fused if name not in active]):
            raise UsageError(
                f"idle=cloud: the cloud keeps no frozen experts: let {left[0]} be active, or use "
                "idle=drop"
            )

        self.all_active, self._active, self.idle, self._frozen = False, active, idle, {}
        self._chosen_for = {
            name: list(layer.active_adapters)
            for site in self.sites
            for name, layer in zip(site.names, site.layers, strict=True)
        }
        for site in self.sites:
            for name, index, layer in zip(site.names, site.modules, site.layers, strict=True):
                if name in active:
                    continue
                if idle == "drop":
                    _drop(layer)
                elif idle == "cloud":
                    frozen = freeze(site.index, index, layer)
                    if any(frozen.message.b.data):  # a module that was never trained adds nothing
                        self._frozen[name] = frozen
        self.train_active_only()

    def train_active_only(self) -> None:
        """Let active modules ask for gradients, and no others; nothing where no set was chosen."""
        if self.all_active:
            return
        for site in self.sites:
            for name, layer in zip(site.names, site.layers, strict=True):
                if self._is_other(name, layer):
                    continue
                for adapter in layer.active_adapters:
                    for modules in (layer.lora_A, layer.lora_B):
                        if adapter in modules:
                            modules[adapter].requires_grad_(self._is_active(name))

    def exchanged(self) -> list[ActiveSite]:
        """What is exchanged now: active modules, with idle="edge" all; none in `disable_adapter()`.

        Raises UsageError for merged adapters.
        """
        exchanged = []
        for site in self.sites:
            used = [
                (module, layer, name)
                for name, module, layer in zip(site.names, site.modules, site.layers, strict=True)
                if not layer.disable_adapters
                and active_names(layer)
                and (self.idle == "edge" or self._is_active(name) or self._is_other(name, layer))
            ]

            if any(layer.merged for _, layer, _ in used):
                raise UsageError(
                    "adapters cannot be merged on the edge, which has no base weights: use `dlora "
                    "merge`"
                )
            if used:
                modules, layers, names = zip(*used, strict=True)
                exchanged.append(
                    dataclasses.replace(site, modules=modules, layers=layers, names=names)
                )
        return exchanged

    def applied_by_cloud(self) -> list[FrozenModule]:
        """Idle modules that the cloud applies now, in its order."""
        return [
            self._frozen[name]
            for site in self.sites
            for name, layer in zip(site.names, site.layers, strict=True)
            if name in self._frozen
            and not layer.disable_adapters
            and not self._is_other(name, layer)
        ]


def _drop(layer: LoraLayer) -> None:
    """Set B to zero, so that the saved adapter is what was trained."""
    for adapter in layer.active_adapters:
        if adapter in layer.lora_B:
            for parameter in layer.lora_B[adapter].parameters():
                parameter.data.zero_()
