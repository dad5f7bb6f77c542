"""What passes of a model will cost in memory, measured at load."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dlora.cloud.caches import CacheCost
from dlora.cloud.costs import MemoryCost
from dlora.cloud.layers import CloudLayers
from dlora.cloud.limits import Limits
from dlora.cloud.load_checks import measure_activations
from dlora.cloud.parts import Parts
from dlora.cloud.recompute import check_recompute, measure_recompute
from dlora.protocol.sites import Site

__all__ = ["measure_memory"]


def measure_memory(
    parts: Parts,
    sites: Sequence[Site],
    num_layers: int,
    layers: CloudLayers,
    cache: CacheCost,
    limits: Limits,
    ids_BT: Tensor,
) -> MemoryCost:
    """What passes will cost; `num_layers` have sites.

    Raises ModelError where layers that are to run again cannot.
    """
    per_token, per_token_squared = measure_activations(parts, sites, limits.max_length)
    recompute = None
    if limits.recompute:
        check_recompute(parts, sites, ids_BT)
        recompute = measure_recompute(parts, sites, layers.modules, limits.max_length)
    return MemoryCost(
        bytes_per_token=per_token,
        bytes_per_token_squared=per_token_squared,
        cache_bytes_per_token=cache.bytes_per_token,
        cache_bytes_per_sequence=cache.bytes_per_sequence,
        num_layers=num_layers,
        recompute=recompute,
    )
