"""Settings of `dlora merge` and `dlora demo`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from dlora.files import expand_homes

__all__ = ["DemoSettings", "EnvSettings", "MergeSettings"]


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Settings of `dlora merge`."""

    GROUPS: ClassVar[dict[str, str]] = {"merge": "model adapter output dtype"}

    model: str
    """The base: Hugging Face id, local folder, .gguf file, or smollm2."""
    adapter: Path
    """Adapter folder, as `dlora train` or peft writes it."""
    output: Path
    """New folder for the full model."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Dtype of the merged weights."""

    def __post_init__(self) -> None:
        """Raises UsageError for paths in a home that is not there."""
        expand_homes(self)


@dataclass(frozen=True, kw_only=True)
class EnvSettings:
    """`dlora env` has none."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of `dlora demo`."""

    GROUPS: ClassVar[dict[str, str]] = {"demo": "output epochs learning_rate seed examples"}

    output: Path = Path("runs/demo")
    """Folder for the adapter and run.json."""
    epochs: float = 3.0
    """Passes over the demo's training rows."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of the run."""
    examples: int = 8
    """Held-out answers shown side by side."""

    def __post_init__(self) -> None:
        """Raises UsageError for paths in a home that is not there."""
        expand_homes(self)
