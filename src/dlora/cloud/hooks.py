"""Hooks on the served model's modules, which ask the pass of their thread, if there is one.

They know nothing of who serves the model: with another `CloudModel` on it they are put on anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dlora.cloud.experts import FusedForward, forward_place
from dlora.cloud.low_rank import LowRank
from dlora.cloud.passes import current_pass
from dlora.protocol.lookups import Lookups
from dlora.protocol.sites import Site

__all__ = ["install_hooks"]


def install_hooks(
    model: nn.Module, sites: Sequence[Site], all_sites: Sequence[Site], lookups: Lookups
) -> None:
    """Put a pair of hooks on each module at a site, and one on tables beside the embedding.

    `all_sites` are those that read outputs as well. Hooks that are there already are replaced.
    """
    for module in model.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()):
                if isinstance(getattr(hook, "__self__", None), _SiteHooks | _LookupHook):
                    del table[key]

    output_site = {site.modules[0].name: site.index for site in all_sites if site.reads_output}
    for site in sites:
        for index, info in enumerate(site.modules):
            hooks = _SiteHooks(site.index, index, output_site[info.name])
            module = model.get_submodule(info.name)
            module.register_forward_pre_hook(hooks.before)
            module.register_forward_hook(hooks.after)
    _hook_experts(model, [site for site in all_sites if site.experts])
    if lookups.tables:
        for index, module in enumerate(lookups.modules):
            module.register_forward_hook(_LookupHook(index).after)


def _hook_experts(model: nn.Module, sites: Sequence[Site]) -> None:
    """Let modules with fused weights find in their place what the pass of their thread has."""
    fused: dict[str, dict[str, int]] = {}
    for site in sites:
        name, _, parameter = site.modules[0].name.rpartition(".")
        fused.setdefault(name, {})[parameter] = site.index
    for name, module in model.named_modules():
        place = forward_place(module)
        if isinstance(earlier := vars(module).get(place), FusedForward):  # of another `CloudModel`
            if place == "forward":  # in front of the class's own
                delattr(module, place)
            else:
                setattr(module, place, earlier.own)
        if name in fused:
            found = _Fused(fused[name])
            setattr(module, place, FusedForward(module, getattr(module, place), found.weights))


@dataclass(frozen=True)
class _Fused:
    """Sites of a module's fused weights, by parameter."""

    sites: Mapping[str, int]

    def weights(self, module: nn.Module) -> Mapping[str, LowRank]:
        """What the pass of this thread puts in their place."""
        current = current_pass()
        return {} if current is None else current.fused(module, self.sites)


@dataclass(frozen=True)
class _SiteHooks:
    """Of the module number `index` of a site; its output is read at `output_site`."""

    site: int
    index: int
    output_site: int

    def before(self, module: nn.Module, args: tuple[Tensor]) -> None:
        """Before the first active module of a site its input is exchanged."""
        if (current := current_pass()) is not None:
            current.before(self.site, self.index, args[0])

    def after(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """The output with the module's delta."""
        if (current := current_pass()) is None:
            return output
        return current.after(self.site, self.index, args[0], output, self.output_site)


@dataclass(frozen=True)
class _LookupHook:
    """Of the table number `index`: what the edge has looked up is put in the place of its own."""

    index: int

    def after(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """What the edge has looked up."""
        current = current_pass()
        return output if current is None else current.looked_up(self.index, output)
