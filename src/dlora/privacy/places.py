"""Which places of the wire are attacked, beside entry and exit: sites, and what to call them."""

from __future__ import annotations

from collections.abc import Iterable

from dlora.edge.link import Link
from dlora.edge.sites import shared_sites
from dlora.privacy.recording import Recording
from dlora.protocol.sites import Site, output_sites

__all__ = ["attacked_modules", "in_words", "read_outputs"]


def attacked_modules(recording: Recording, link: Link, most: int) -> dict[int, list[str]]:
    """Names of the active modules of every attacked site, the lowest site first.

    At most `most` sites, evenly spread, of those where the same modules are active all through the
    recording.
    """
    first, *others = [recording.sites(number) for number in range(len(recording))]
    steady = sorted(
        site for site, modules in first.items() if all(one.get(site) == modules for one in others)
    )
    if len(steady) > most:
        steady = [steady[round(i * (len(steady) - 1) / max(1, most - 1))] for i in range(most)]

    known = _known_sites(link)
    return {site: [known[site].modules[i].name for i in first[site]] for site in steady}


def read_outputs(link: Link, sites: Iterable[int]) -> bool:
    """Whether any of these sites reads an output, as bottleneck adapters in series do."""
    known = _known_sites(link)
    return any(known[site].reads_output for site in sites)


def in_words(names: list[str]) -> str:
    """A site's modules, "model.layers.3.self_attn.q_proj" and so on, as "layer 3: q_proj, ..."."""
    layer = next((part for part in names[0].split(".") if part.isdigit()), None)
    kinds = ", ".join(name.rpartition(".")[2] for name in names)
    return kinds if layer is None else f"layer {layer}: {kinds}"


def _known_sites(link: Link) -> dict[int, Site]:
    """Every site of the served model, those that read an output too, by index."""
    inputs = shared_sites(link.description)
    return {site.index: site for site in (*inputs, *output_sites(inputs))}
