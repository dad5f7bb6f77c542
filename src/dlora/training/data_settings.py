"""Settings of `dlora data`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dlora.edge.options import SplitOptions, Wire, check_consent
from dlora.edge.settings import AccessSettings, target_names
from dlora.edge.task_forms import Task, check_task_columns
from dlora.errors import UsageError
from dlora.training.link_speed import link_speed

__all__ = ["DataSettings"]


@dataclass(frozen=True, kw_only=True)
class DataSettings(AccessSettings):
    """Settings of `dlora data`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "task data columns show max_length batch_size",
        "connection": f"server {AccessSettings.GROUPS['connection']}",
        "cost of an epoch": "link target_modules r wire wire_dtype upload_consent",
    }

    task: Task = "sft"
    """What the rows are for, as for training. Those of other tasks are shown without a server."""
    data: str
    """Files, a folder or a Hugging Face data set, as for training."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns in the data, as for training."""
    show: int = 2
    """Rows that are shown."""
    max_length: int = 512
    """Longest row in tokens, as for training."""
    batch_size: int = 8
    """Rows of a micro-batch, as for training."""
    server: str | None = None
    """Address of `dlora serve`, as host:port: rows are then counted and shown in tokens of its
    model, and an epoch has a price. Default: characters, and no server is asked."""
    link: str = "here"
    """The link of the epoch: here, lan, fibre, home, mobile, or UP/DOWN/RTT in Mbit/s, Mbit/s and
    ms."""
    target_modules: list[str] | str | None = None
    """Linear modules to adapt, as for training."""
    r: int = 8
    """LoRA rank."""
    wire: Wire = SplitOptions.wire
    """How deltas travel, as for training."""
    wire_dtype: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp16"
    """How tensors travel, as for training."""
    upload_consent: bool = False
    """Agree that the cloud sees weights of the adapter, as `--wire hosted` needs it."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        check_task_columns(self.columns, self.task)
        if self.task != "sft" and self.server is not None:
            raise UsageError(
                f"server: got {self.server} with task {self.task}, whose rows are shown in "
                "characters: leave it out. `dlora train` counts their tokens at its beginning"
            )
        check_consent(self.wire, self.upload_consent)
        link_speed(self.link)
        for name, least in (("show", 0), ("max_length", 1), ("batch_size", 1), ("r", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}: got {getattr(self, name)}, want at least {least}")

    @property
    def targets(self) -> list[str] | str | None:
        """`target_modules` as peft takes it."""
        return target_names(self.target_modules)
