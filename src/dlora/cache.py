"""Where downloads and conversions are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["default_cache"]


def default_cache() -> Path:
    """$DLORA_CACHE, or ~/.cache/dlora."""
    return Path(os.environ.get("DLORA_CACHE") or Path.home() / ".cache" / "dlora")
