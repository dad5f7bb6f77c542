"""DLoRA: fine-tune a language model in the cloud with data that stays on the edge.

    cloud = dlora.connect("127.0.0.1:50051")
    model = dlora.get_peft_model(cloud, peft.LoraConfig(r=8))
    tokenizer = dlora.load_tokenizer(cloud)

Implements the split of "DLoRA: Distributed Parameter-Efficient Fine-Tuning Solution for
Large Language Model" (Gao & Zhang, 2024, arXiv:2404.05182).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlora.errors import (
    DataError,
    DivergedError,
    DLoRAError,
    ModelError,
    PeerError,
    PeerLost,
    UsageError,
    WireError,
)
from dlora.version import __version__

if TYPE_CHECKING:
    from dlora.edge.bottleneck import BottleneckConfig, apply_bottleneck
    from dlora.edge.eva import initialize_eva
    from dlora.edge.grpc_link import connect
    from dlora.edge.kv_cache import CloudCache
    from dlora.edge.link import RetryPolicy
    from dlora.edge.load import get_peft_model, load_adapter, load_tokenizer
    from dlora.edge.model import SplitModel
    from dlora.edge.noise import Noise
    from dlora.edge.options import SplitOptions
    from dlora.edge.spectral import initialize_spectral
    from dlora.embedded import in_process
    from dlora.kill_revive.apply import KillAndRevive
    from dlora.kill_revive.callback import KillReviveCallback
    from dlora.kill_revive.config import KillReviveConfig

__all__ = [
    "BottleneckConfig",
    "CloudCache",
    "DLoRAError",
    "DataError",
    "DivergedError",
    "KillAndRevive",
    "KillReviveCallback",
    "KillReviveConfig",
    "ModelError",
    "Noise",
    "PeerError",
    "PeerLost",
    "RetryPolicy",
    "SplitModel",
    "SplitOptions",
    "UsageError",
    "WireError",
    "__version__",
    "apply_bottleneck",
    "connect",
    "get_peft_model",
    "in_process",
    "initialize_eva",
    "initialize_spectral",
    "load_adapter",
    "load_tokenizer",
]

_HOMES = {
    "BottleneckConfig": "dlora.edge.bottleneck",
    "apply_bottleneck": "dlora.edge.bottleneck",
    "CloudCache": "dlora.edge.kv_cache",
    "KillAndRevive": "dlora.kill_revive.apply",
    "KillReviveCallback": "dlora.kill_revive.callback",
    "KillReviveConfig": "dlora.kill_revive.config",
    "RetryPolicy": "dlora.edge.link",
    "Noise": "dlora.edge.noise",
    "SplitModel": "dlora.edge.model",
    "SplitOptions": "dlora.edge.options",
    "connect": "dlora.edge.grpc_link",
    "get_peft_model": "dlora.edge.load",
    "in_process": "dlora.embedded",
    "initialize_eva": "dlora.edge.eva",
    "initialize_spectral": "dlora.edge.spectral",
    "load_adapter": "dlora.edge.load",
    "load_tokenizer": "dlora.edge.load",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import dlora` and `dlora --help` need not wait for torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, whether imported yet or not."""
    return sorted(__all__)
