"""Settings of `dlora train` and `dlora report`. No torch here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from dlora.edge.noise import Noise
from dlora.edge.options import (
    InFlight,
    InputGrad,
    SplitOptions,
    check_cache_prefix,
    check_experts,
    check_in_flight,
    check_input_grad,
)
from dlora.edge.settings import AccessSettings, EdgeSettings, target_names
from dlora.edge.task_forms import check_task_columns
from dlora.errors import UsageError
from dlora.files import expand_homes
from dlora.kill_revive.config import OF_LORA, KillReviveConfig, check_linear, from_options
from dlora.training.tasks import Task, check_task
from dlora.training.trainer_settings import check_trainer

__all__ = ["ReportSettings", "TrainSettings", "check_spectral_start"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings(EdgeSettings):
    """Settings of `dlora train`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "connection": f"{EdgeSettings.GROUPS['connection']} input_grad in_flight cache_prefix",
        "task": "task reward",
        "data": "data columns val_size max_length overlong batch_size",
        "adapter": "adapter kind r lora_alpha lora_dropout target_modules target_parameters "
        "modules_to_save trainable_token_indices use_rslora rank_pattern alpha_pattern "
        "spectral_start activation scale",
        "optimizer": "learning_rate epochs max_steps gradient_accumulation_steps optim "
        "lr_scheduler_type warmup_steps weight_decay max_grad_norm seed trainer",
        "evaluation": "eval_data eval_batch_size eval_steps keep_best early_stopping_patience",
        "privacy": f"{EdgeSettings.GROUPS['privacy']} noise_tail pad_to record",
        "Kill and Revive": "kr kr_options",
        "run folder": "output resume save_steps save_minutes save_total_limit logging_steps "
        "report_to",
        "computing": EdgeSettings.GROUPS["computing"],
    }

    task: Task = "sft"
    """What is learned: answers (sft), preferences between two (dpo; rows have `prompt`, `chosen`,
    `rejected`) or of one at a time (kto; `prompt`, `completion`, `label`), or what a reward likes
    (grpo; `prompt`). docs/trainers.md says what each sends."""
    reward: list[str] = field(default_factory=list)
    """Functions that rate answers, with task grpo: FILE.py:NAME, several with commas. The file is
    run here."""
    data: str
    """Training data: JSON lines or an array, .csv, .tsv, .parquet or .txt; several files with
    commas, or a folder; or a Hugging Face data set (org/name or org/name:split). Rows have `prompt`
    and `completion`, `messages`, `text`, or the columns of Alpaca or ShareGPT."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns in the data, where they are others: prompt=question,completion=answer."""
    val_size: float = 0.0
    """Rows of `data` to hold out in place of eval_data: a share (under 1), or a number."""
    output: Path
    """Folder for the adapter, run.json and checkpoints."""
    in_flight: InFlight = SplitOptions.in_flight
    """Parts of a micro-batch that travel at the same time, so that their waits for a distant server
    overlap. Each takes one of the streams that the server allows. auto: 1, 2 or 4, as the link and
    two passes over the first micro-batch say."""
    cache_prefix: bool = SplitOptions.cache_prefix
    """Let the cloud keep what its layers below all adapters make of each row. From the second epoch
    on rows that it still has travel as names, and these layers are not computed again; results are
    the same up to rounding. It helps most where adapters sit in the upper layers."""
    eval_data: str | None = None
    """Held-out data in the same forms, measured every `eval_steps`."""
    adapter: Path | None = None
    """An existing LoRA adapter folder to start from. Its own LoRA settings then hold."""
    kind: Literal["lora", "series", "parallel"] = "lora"
    """LoRA, or bottleneck adapters behind the outputs of target_modules (series) or beside the
    modules (parallel)."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Nonlinearity of bottleneck adapters."""
    scale: float = 1.0
    """Factor on what bottleneck adapters add."""
    r: int = 8
    """LoRA rank, or size of the bottleneck."""
    lora_alpha: float = 16
    """Deltas are multiplied by alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of the LoRA modules, in [0, 1)."""
    target_modules: list[str] | str | None = None
    """Linear modules to adapt: names such as q_proj,v_proj (or a list), all-linear, or a regular
    expression over full names. Default: peft's for this architecture."""
    target_parameters: list[str] | None = None
    """Fused weights of experts to adapt beside target_modules, which may then be []: names such as
    mlp.experts.gate_up_proj; `dlora info` has the server's. On the hosted wire alone."""
    modules_to_save: list[str] | None = None
    """Embedding or LM head, to be trained whole and saved with the adapter: embed_tokens,lm_head.
    They stay here."""
    trainable_token_indices: dict[str, list[int]] = field(default_factory=dict)
    """Rows of embedding and LM head to train, by the module's name: '{embed_tokens: [5, 7]}'. Where
    the two are tied the embedding's are both."""
    use_rslora: bool = False
    """Multiply deltas by alpha / sqrt(r) instead."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks for modules whose name matches a pattern."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas for modules whose name matches a pattern."""
    spectral_start: bool = False
    """Begin LoRA's A with the directions in which the first micro-batch wants change, for the price
    of one micro-batch more. Few modules learn faster by it. Over the plain wire."""
    noise_tail: float = Noise.tail
    """Normal noise on the gradient of the last hidden states, as a share of its rows' median
    length. It blurs labels."""
    pad_to: int = 0
    """Over 0: pad rows to a multiple of this many tokens, fill the padding with other tokens of the
    batch, and let all positions travel. Masks then reveal no lengths. Gradients still do, without
    noise_tail. Results stay the same."""
    kr: Literal["off", "on", "paper"] = "off"
    """Train few modules at a time, and send little. paper: the paper's words taken literally."""
    kr_options: dict[str, Any] = field(default_factory=dict)
    """Settings of Kill and Revive by name: budget, interval, idle, policy and others.
    docs/kill-and-revive.md lists them."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    optim: str = "adamw_torch"
    """Optimizer, by its name in transformers."""
    lr_scheduler_type: str = "linear"
    """Schedule, by its name in transformers."""
    warmup_steps: float = 0.0
    """Steps of rising learning rate. Under 1: a share of all steps."""
    weight_decay: float = 0.0
    """Weight decay."""
    max_grad_norm: float = 1.0
    """Gradient clipping. 0 turns it off."""
    epochs: float = 3.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps, in place of `epochs`. -1: as many as the epochs have."""
    batch_size: int = 8
    """Rows of a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step."""
    eval_batch_size: int = 8
    """Rows of a micro-batch in evaluation."""
    max_length: int = 512
    """Longest row in tokens, prompt and completion together."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with longer rows."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations. Default: once an epoch."""
    save_steps: int | None = None
    """Optimizer steps between checkpoints. Default: with each evaluation."""
    save_minutes: float = 10.0
    """Also save a checkpoint after this many minutes without one. 0: never by time."""
    save_total_limit: int = 2
    """Checkpoints kept, the best among them."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a better eval loss."""
    keep_best: bool = True
    """With eval data: end with the adapter of the best evaluation, not the last."""
    logging_steps: int = 1
    """Optimizer steps between log entries."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where logs go: tensorboard, wandb, mlflow and others, separated by commas; or none."""
    input_grad: InputGrad = SplitOptions.input_grad
    """What the adapters add to the gradient of their inputs. exact: it travels, as in local
    training. drop: it is left out, an approximation that halves a site's traffic, and backward does
    not wait at the sites. Not for the hosted wire."""
    seed: int = 0
    """Seed of adapter initialisation, data order and dropout."""
    resume: bool = False
    """Continue the run in `output` from its last checkpoint."""
    record: int = 0
    """Record what crosses the wire in the first N micro-batches, for `dlora audit`. It goes into
    `output`/recording, with the text it came from: the folder holds private data. 24 batches of 16
    rows are enough."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """More arguments for trl's configuration of the task (SFTConfig, DPOConfig and so on), by name,
    such as beta; what is a setting is given as one."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work, all checks here and nowhere else."""
        super().__post_init__()
        check_input_grad(self.wire, self.input_grad)
        check_in_flight(self.in_flight, self.wire)
        check_cache_prefix(
            self.cache_prefix, self.noise, fills_padding=self.pad_to > 0, record=bool(self.record)
        )
        self._check_adapter()
        self._check_amounts()
        check_task(self.task, vars(self))
        check_task_columns(self.columns, self.task)
        _check_held_out(self.val_size, self.eval_data)
        self._check_evaluation()
        _check_kill_revive(self)
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"output: {self.output} is a file, want a folder")
        check_trainer(self.trainer, self.task)

    def _check_adapter(self) -> None:
        self._check_least("r", 1)
        for name in ("lora_alpha", "scale"):
            if getattr(self, name) == 0:
                raise UsageError(f"{name}: got 0, with which the adapter does nothing")
        if zero := [key for key, alpha in self.alpha_pattern.items() if alpha == 0]:
            raise UsageError(f"alpha_pattern: {zero[0]}: got 0, with which it does nothing")
        check_experts(self.wire, self.target_parameters or ())
        check_spectral_start(self)
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout: got {self.lora_dropout}, want a value in [0, 1)")
        if self.kind == "lora":
            return

        if self.adapter is None and self.target_modules is None:
            raise UsageError(
                f"kind={self.kind} wants target_modules: the linears that end attention and MLP "
                "are o_proj,down_proj in Llama, out_proj,fc2 in OPT, dense,dense_4h_to_h in "
                "BLOOM, c_proj in GPT-2"
            )
        of_lora = (*OF_LORA, "use_rslora", "rank_pattern", "alpha_pattern")
        if given := [name for name in of_lora if getattr(self, name)]:
            raise UsageError(f"kind={self.kind}: {given[0]} is of LoRA")

    def _check_amounts(self) -> None:
        """Rows, tokens and steps."""
        self._check_least("batch_size", 1)
        self._check_least("gradient_accumulation_steps", 1)
        self._check_least("eval_batch_size", 1)
        self._check_least("max_length", 1)
        self._check_least("logging_steps", 1)
        if self.record < 0:
            raise UsageError(f"record: got {self.record}, want 0 or more")
        if self.record and self.in_flight not in (1, "auto"):
            raise UsageError(
                f"record keeps whole micro-batches: got in_flight {self.in_flight}, want 1, or "
                "auto, which is then 1"
            )
        if self.pad_to < 0:
            raise UsageError(f"pad_to: got {self.pad_to}, want 0 or more")

        if self.max_steps < 1 and self.max_steps != -1:
            raise UsageError(f"max_steps: got {self.max_steps}, want at least 1, or -1 for epochs")
        if self.max_steps < 1 and not 0 < self.epochs < math.inf:
            raise UsageError(f"epochs: got {self.epochs}, want more than 0, or give max_steps")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate: got {self.learning_rate}, want a positive number")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name}: got {getattr(self, name)}, want 0 or more")

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out rows."""
        return self.eval_data is not None or self.val_size > 0

    def _check_evaluation(self) -> None:
        """Evaluations, the checkpoints that go with them, and stopping by them."""
        self._check_least("eval_steps", 1)
        self._check_least("save_steps", 1)
        self._check_least("save_total_limit", 1)
        if not 0 <= self.save_minutes < math.inf:
            raise UsageError(f"save_minutes: got {self.save_minutes}, want 0 or more")
        self._check_least("early_stopping_patience", 1)
        if self.early_stopping_patience is not None and not self.evaluates:
            raise UsageError("early_stopping_patience needs eval_data or val_size")

        # The best adapter can only be kept of evaluations at which one is saved.
        if not self.evaluates or not self.keep_best or not self.save_steps:
            return
        if self.eval_steps is None or self.save_steps % self.eval_steps:
            raise UsageError(
                f"save_steps: got {self.save_steps} with eval_steps {self.eval_steps}; keep_best "
                "needs checkpoints at evaluations: give eval_steps, and a multiple of it as "
                "save_steps, or keep_best false"
            )

    def _check_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise UsageError(f"{name}: got {value}, want at least {least}")

    @property
    def noise(self) -> Noise:
        """What is added to what leaves."""
        return Noise(entry=self.noise_entry, tail=self.noise_tail, clip=self.noise_clip)

    @property
    def kill_revive(self) -> KillReviveConfig | None:
        """Settings of Kill and Revive; None: all modules are trained all the time."""
        return None if self.kr == "off" else from_options(self.kr, self.kr_options)

    @property
    def targets(self) -> list[str] | str | None:
        """`target_modules` as peft takes it."""
        return target_names(self.target_modules)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Names of settings whose value in `other`, a saved `as_dict`, is another."""
        return _differences(self, other)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they go into run.json."""
        values = dataclasses.asdict(self)
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in values.items()
        }


def _differences(settings: TrainSettings, other: dict[str, Any]) -> list[str]:
    """Where the run may go on elsewhere or wait longer, a difference does not count."""
    free = {"resume", "server", "give_up_after_s", "output", "report_to", "device", "record"}
    free |= {"save_minutes"}
    free |= {field.name for field in dataclasses.fields(AccessSettings)}
    # A run of an earlier version lacks what came later, and ran as the default says.
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in dataclasses.fields(settings)
    }
    return [
        name
        for name, value in settings.as_dict().items()
        if name not in free and other.get(name, defaults[name]) != value
    ]


_FOR_SPECTRAL: Final = {
    "wire": "plain",
    "kind": "lora",
    "task": "sft",
    "adapter": None,
    "record": 0,
}


def check_spectral_start(settings: Any) -> None:
    """Raises UsageError for settings of a run, or of its plan, with which there is none."""
    for name, wanted in _FOR_SPECTRAL.items() if settings.spectral_start else ():
        if (value := getattr(settings, name, wanted)) != wanted:
            raise UsageError(
                "spectral_start is for fresh LoRA over the plain wire, with task sft, and is not "
                f"recorded: got {name} {value}"
            )


def _check_held_out(val_size: float, eval_data: str | None) -> None:
    """Raises UsageError for rows to hold out that cannot be."""
    if val_size < 0 or (val_size > 1 and val_size % 1):
        raise UsageError(
            f"val_size: got {val_size:g}, want a share under 1 or a whole number of rows"
        )
    if val_size and eval_data is not None:
        raise UsageError("val_size: rows are held out in place of eval_data: give one of them")


def _check_kill_revive(settings: TrainSettings) -> None:
    """Raises UsageError for what cannot be together with Kill and Revive."""
    if settings.kr == "off":
        if settings.kr_options:
            raise UsageError("kr_options need kr on or paper")
        return
    check_linear(settings)
    config = settings.kill_revive
    if config is not None and config.idle == "cloud" and not settings.upload_consent:
        raise UsageError(
            "kr_options idle=cloud uploads killed modules to the cloud, which then holds part "
            "of the adapter: agree with --upload_consent true, or use idle=drop"
        )
    if config is not None and settings.wire == "hosted":
        if config.idle == "edge":
            raise UsageError(
                "kr_options idle=edge: on the hosted wire the edge computes no module: use "
                "idle=drop or cloud"
            )
        if config.policy == "output":
            raise UsageError(
                "kr_options policy=output measures deltas, which the hosted wire leaves to the "
                "cloud: use another policy, or wire=factored or plain"
            )


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of `dlora report`."""

    GROUPS: ClassVar[dict[str, str]] = {"report": "runs output"}

    runs: list[Path]
    """Folders of runs, as `dlora train` writes them. Others are compared with the first."""
    output: Path = Path("report")
    """Folder for report.html and the figures as PNG files."""

    def __post_init__(self) -> None:
        """Raises UsageError for paths in a home that is not there."""
        expand_homes(self)
