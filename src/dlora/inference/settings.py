"""Settings of `dlora generate`, `chat`, `eval` and `api`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, TypedDict

from dlora.edge.data_forms import check_columns
from dlora.edge.options import InFlight
from dlora.edge.settings import EdgeSettings
from dlora.errors import UsageError

__all__ = [
    "ApiSettings",
    "ChatSettings",
    "EvalSettings",
    "GenerateSettings",
    "GenerationTexts",
    "SamplingSettings",
]

_SETTINGS: Final = {
    "max_new_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "do_sample": "temperature",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "prompt_lookup_num_tokens": "prompt_lookup",
}
"""Options of `generation` that are settings of their own -> the setting."""


# Of `dlora eval`: settings that go with one of its forms alone -> what they are if not given.
_OF_DATA: Final[dict[str, Any]] = {"columns": {}, "exact_match": False, "max_new_tokens": 32}
_OF_TASKS: Final[dict[str, Any]] = {"tasks_path": None, "num_fewshot": None, "chat": False}
_DATA_ROWS: Final = 8


class GenerationTexts(TypedDict, total=False):
    """Options of `generation` that are text, whatever the text looks like."""

    stop_strings: list[str] | str
    cache_implementation: str | None
    num_assistant_tokens_schedule: str
    speculation_type: str | None


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(EdgeSettings):
    """How answers are made."""

    GROUPS: ClassVar[dict[str, str]] = {
        "connection": EdgeSettings.GROUPS["connection"],
        "adapter": "adapter",
        "answers": "max_new_tokens temperature top_p top_k repetition_penalty stop seed "
        "prompt_lookup generation",
        "privacy": EdgeSettings.GROUPS["privacy"],
        "computing": EdgeSettings.GROUPS["computing"],
    }

    adapter: Path | None = None
    """Adapter folder, as `dlora train` or peft writes it; default: the served model as it is."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0: always the likeliest token (greedy). Over 0: sample, more freely the higher."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens. 0: no limit."""
    repetition_penalty: float = 1.0
    """Over 1: make tokens that were there already less likely."""
    stop: list[str] | str = field(default_factory=list)
    """A text that ends an answer. Several are given as a JSON list: '["a", "b"]'."""
    seed: int = 0
    """Seed of sampling."""
    prompt_lookup: int = 0
    """Over 0: draft this many tokens at a time from the text so far, and check them in one pass.
    The answers are the same. Where they repeat the prompt there are fewer round trips. A file's
    prompts are then answered one at a time."""
    generation: dict[str, Any] = field(default_factory=dict)
    """More options of transformers.GenerationConfig, by name, such as num_beams."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: got {self.max_new_tokens}, want at least 1")
        if self.temperature < 0:
            raise UsageError(f"temperature: got {self.temperature}, want 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p: got {self.top_p}, want a value in (0, 1]")
        if self.repetition_penalty <= 0:
            raise UsageError(f"repetition_penalty: got {self.repetition_penalty}, want more than 0")
        for name in ("top_k", "prompt_lookup"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}: got {getattr(self, name)}, want 0 or more")

        # Of two values for one thing one would count for nothing, and settings alone are checked.
        if twice := sorted(_SETTINGS.keys() & self.generation.keys()):
            name = twice[0]
            raise UsageError(
                f"generation: {name} is a setting of its own: give {_SETTINGS[name]} instead"
            )
        if self.stop and "stop_strings" in self.generation:
            raise UsageError("generation: give stop or stop_strings, not both")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.stop:
            options["stop_strings"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.prompt_lookup:
            options["prompt_lookup_num_tokens"] = self.prompt_lookup
        return options | self.generation


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(SamplingSettings):
    """Settings of `dlora generate`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "prompts": "prompt prompts output chat batch_size",
        **SamplingSettings.GROUPS,
    }

    prompt: str | None = None
    """The prompt. Default: what comes on standard input."""
    prompts: Path | None = None
    """A file of prompts instead: .jsonl with `prompt` or `messages` in each row, or text with a
    prompt on each line."""
    output: Path | None = None
    """With `prompts`: a .jsonl file for prompts and completions. The same command continues it
    where it was stopped. Default: standard output."""
    chat: bool = False
    """Put text prompts into the model's chat template, as a user's message."""
    batch_size: int = 8
    """Prompts of a file that are answered together."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        if self.prompt is not None and self.prompts is not None:
            raise UsageError("give prompt or prompts, not both")
        if self.output is not None and self.prompts is None:
            raise UsageError("output needs prompts: a single answer goes to standard output")
        if (
            self.output is not None
            and self.prompts is not None
            and self.output.resolve() == self.prompts.resolve()
        ):
            raise UsageError(f"output: {self.output} is the file of the prompts")
        if self.batch_size < 1:
            raise UsageError(f"batch_size: got {self.batch_size}, want at least 1")


@dataclass(frozen=True, kw_only=True)
class ChatSettings(SamplingSettings):
    """Settings of `dlora chat`."""

    GROUPS: ClassVar[dict[str, str]] = {"chat": "system", **SamplingSettings.GROUPS}

    system: str | None = None
    """System prompt. Default: what the model's chat template brings."""
    temperature: float = 0.7
    """0: always the likeliest token (greedy). Over 0: sample, more freely the higher."""
    top_p: float = 0.9
    """Sample among the likeliest tokens of this total probability."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings(EdgeSettings):
    """Settings of `dlora eval`: of data, or of tasks of lm-eval."""

    GROUPS: ClassVar[dict[str, str]] = {
        "connection": EdgeSettings.GROUPS["connection"],
        "adapter": "adapter",
        "data of your own": "data columns exact_match max_new_tokens",
        "or tasks of lm-eval": "tasks tasks_path num_fewshot chat",
        "rows": "limit batch_size",
        "result": "output predictions",
        "privacy": EdgeSettings.GROUPS["privacy"],
        "computing": EdgeSettings.GROUPS["computing"],
    }

    data: str | None = None
    """Files, or a Hugging Face data set, as for training. Rows as there, or with `prompt`,
    `choices` and `answer` (the right choice, as text or as a number from 0)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns in the data, as for training: prompt=question,answer=label."""
    exact_match: bool = False
    """Also answer every prompt, greedily, and count answers that equal the completion."""
    max_new_tokens: int = 32
    """With exact_match and predictions: longest answer in tokens."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of EleutherAI's lm-evaluation-harness by name, or groups, or patterns such as mmlu_*.
    The results are kept with the adapter, too, and stand in its README."""
    tasks_path: Path | None = None
    """Folder with tasks of your own, as the harness has them: YAML files. Python that they name is
    run here."""
    num_fewshot: int | None = None
    """Examples in front of a question. Default: as the task has it. A task that says 0 keeps 0."""
    chat: bool = False
    """Put what is asked into the model's chat template."""
    adapter: Path | None = None
    """Adapter folder, as `dlora train` or peft writes it; default: the served model as it is."""
    batch_size: InFlight = "auto"
    """Rows of a micro-batch. auto: with tasks as many as the server takes by its own limits, with
    data 8."""
    limit: int | None = None
    """Only the first N rows, of each task."""
    output: Path | None = None
    """File for the result as JSON."""
    predictions: Path | None = None
    """File that gets a JSON line for every row: prompt, what was wanted, what the model says, and
    whether that is right. Answers are then made, as for exact_match. It holds the data's text."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        check_columns(self.columns)
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{name}: got {value}, want at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"num_fewshot: got {self.num_fewshot}, want 0 or more")

        # What is of the other kind would count for nothing.
        if (self.data is None) == (not self.tasks):
            also = ", not both: run the command twice" if self.tasks else ""
            raise UsageError(f"give data or tasks{also}")
        others, wanted = (_OF_DATA, "data") if self.tasks else (_OF_TASKS, "tasks")
        for name, unset in others.items():
            if getattr(self, name) != unset:
                raise UsageError(f"{name}: goes with {wanted} alone: leave it out")

    @property
    def data_rows(self) -> int:
        """Rows of a micro-batch of data."""
        return _DATA_ROWS if self.batch_size == "auto" else self.batch_size


@dataclass(frozen=True, kw_only=True)
class ApiSettings(EdgeSettings):
    """Settings of `dlora api`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "connection": EdgeSettings.GROUPS["connection"],
        "adapter": "adapter adapters",
        "the API": "name host port api_key max_new_tokens prompt_lookup",
        "privacy": EdgeSettings.GROUPS["privacy"],
        "computing": EdgeSettings.GROUPS["computing"],
    }

    adapter: Path | None = None
    """Adapter folder, as `dlora train` or peft writes it; default: the served model as it is."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """Several adapters by name instead, name=folder,name=folder: `model` of a request picks one."""
    name: str | None = None
    """Model name that apps use. Default: the adapter's folder name, or the served model's id."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches it can use the private adapter: keep it on loopback."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    api_key: str | None = None
    """Key that apps must send. It is better given as $DLORA_API_KEY than on a command line, which
    others can see."""
    max_new_tokens: int = 1024
    """Longest answer in tokens, where a request does not say."""
    prompt_lookup: int = 0
    """Over 0: draft this many tokens at a time from the text so far, and check them in one pass."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        if self.adapters and (self.adapter is not None or self.name is not None):
            raise UsageError("adapters: they have names; leave adapter and name out")
        if not 0 <= self.port < 65536:
            raise UsageError(f"port: got {self.port}, want 0 to 65535")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: got {self.max_new_tokens}, want at least 1")
        if self.prompt_lookup < 0:
            raise UsageError(f"prompt_lookup: got {self.prompt_lookup}, want 0 or more")
