"""Every setting of every command: the one list behind flags, YAML file and library."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from dlora.errors import UsageError
from dlora.kill_revive import KillReviveConfig, from_options
from dlora.private_files import read_secret

__all__ = [
    "LOOPBACK",
    "AccessSettings",
    "ApiSettings",
    "AuditSettings",
    "ChatSettings",
    "DemoSettings",
    "EdgeSettings",
    "EvalSettings",
    "GenerateSettings",
    "InfoSettings",
    "KeysSettings",
    "MergeSettings",
    "PlanSettings",
    "ReportSettings",
    "SamplingSettings",
    "ServeSettings",
    "StatusSettings",
    "TrainSettings",
]

LOOPBACK: Final = ("127.0.0.1", "localhost", "::1", "[::1]")
# Handed to the trainer by `TrainSettings.trainer_arguments`, or fixed because the split needs it.
_RESERVED: Final = frozenset(
    "output_dir fp16 bf16 gradient_checkpointing packing padding_free max_length remove_unused_columns "
    "resume_from_checkpoint completion_only_loss assistant_only_loss dataloader_num_workers push_to_hub".split()
)


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """How an edge shows who it is, and knows whom it talks to."""

    tls: bool = False
    """Encrypt, and trust the public authorities; tls_ca says so as well."""
    tls_ca: Path | None = None
    """Authority to trust instead, as a PEM file: ca.pem of `dlora keys`."""
    tls_cert: Path | None = None
    """Client certificate, as a PEM file, where the server asks for one."""
    tls_key: Path | None = None
    """Its key."""
    token_file: Path | None = None
    """File with the token that says who this is; or give the token as $DLORA_TOKEN."""

    @property
    def access(self) -> dict[str, Any]:
        """Keyword arguments of `client.Access`. Raises UsageError for a token file that others can read."""
        token = os.environ.get("DLORA_TOKEN") if self.token_file is None else read_secret(self.token_file)
        return {"tls": self.tls, "ca": self.tls_ca, "certificate": self.tls_cert, "key": self.tls_key, "token": token}


@dataclass(frozen=True, kw_only=True)
class EdgeSettings(AccessSettings):
    """What every command on the edge needs to reach a server."""

    server: str
    """Address of `dlora serve`, as host:port; or several of the same model, separated by commas: where one is lost the
    next is taken."""
    wire_dtype: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp16"
    """How tensors travel. fp32 is exact; fp16 and bf16 halve the traffic; int8 (a scale for each token) halves it
    again, and int4 (a scale for 32 values) almost once more, at the price of noise."""
    give_up_after_s: float = 600.0
    """How long a lost server is waited for, in seconds."""
    device: str = "cpu"
    """Device of the edge's half."""
    edge_first: int = 0
    """Run so many of the first decoder layers here, where the server allows it: tokens are then harder to read from
    what leaves. Costs their weights and compute."""
    edge_last: int = 0
    """The same for the last layers: labels are then harder to read from gradients."""
    noise_entry: float = 0.0
    """Normal noise on every row that goes into the cloud, as a share of the row's length. docs/privacy.md says what it
    hides and what it costs; it is no differential privacy."""
    noise_clip: float = 3.0
    """With noise: rows longer than so many times the median are shortened first."""

    @property
    def edge_layers(self) -> tuple[int, int]:
        """(first, last), as `get_peft_model` takes them."""
        return self.edge_first, self.edge_last


@dataclass(frozen=True, kw_only=True)
class TrainSettings(EdgeSettings):
    """Settings of `dlora train`."""

    data: str
    """Training data: a .jsonl or .csv file, or a Hugging Face data set id (org/name or org/name:split). Rows have
    `prompt` and `completion`, or `messages`, or `text`."""
    output: Path
    """Folder for the adapter, run.json and checkpoints."""
    eval_data: str | None = None
    """Held-out data in the same forms; measured every `eval_steps`."""
    adapter: Path | None = None
    """An existing LoRA adapter folder to start from; its own LoRA settings then hold."""
    kind: Literal["lora", "series", "parallel"] = "lora"
    """LoRA, or bottleneck adapters: behind the outputs of target_modules (series), or beside these (parallel)."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Of bottleneck adapters."""
    scale: float = 1.0
    """Of what bottleneck adapters add."""
    r: int = 8
    """LoRA rank, or size of the bottleneck."""
    lora_alpha: float = 16
    """LoRA alpha: deltas are scaled by alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of the LoRA modules, in [0, 1)."""
    target_modules: list[str] | str | None = None
    """Linear modules to adapt: names such as q_proj,v_proj (or a list), all-linear, or a regular expression over full
    names. Default: peft's for this architecture."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks for modules whose name matches a pattern."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas for modules whose name matches a pattern."""
    noise_tail: float = 0.0
    """Normal noise on the gradient of the last hidden states, as a share of its rows' median length: blurs labels."""
    pad_to: int = 0
    """Over 0: pad rows to a multiple of so many tokens, fill the padding with other tokens of the batch, and let all
    positions travel. Masks then tell no lengths; gradients still do, without noise_tail. Results stay the same."""
    wire: Literal["plain", "factored"] = "plain"
    """How deltas travel. factored: as two exact factors, several times fewer bytes; shows the cloud the factor B of
    every module, which it could solve for on the plain wire too."""
    kr: Literal["off", "on", "paper"] = "off"
    """Kill and Revive: train few modules at a time, send little. paper: the paper's words taken literally."""
    kr_options: dict[str, Any] = field(default_factory=dict)
    """Settings of Kill and Revive by name: budget, interval, idle, policy, ... as in docs/kill-and-revive.md."""
    upload_consent: bool = False
    """Agree that idle modules are uploaded, frozen, for the cloud to apply: kr_options {idle: cloud} needs it."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    optim: str = "adamw_torch"
    """Optimizer, by its name in transformers."""
    lr_scheduler_type: str = "linear"
    """Schedule, by its name in transformers."""
    warmup_steps: float = 0.0
    """Steps of rising learning rate; under 1: a share of all steps."""
    weight_decay: float = 0.0
    """Weight decay."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 turns it off."""
    epochs: float = 3.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps; when positive it replaces `epochs`."""
    batch_size: int = 8
    """Rows of a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step."""
    eval_batch_size: int = 8
    """Rows of a micro-batch in evaluation."""
    max_length: int = 512
    """Longest row in tokens, prompt and completion."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with longer rows."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations; default: once an epoch."""
    save_steps: int | None = None
    """Optimizer steps between checkpoints; default: with each evaluation."""
    save_total_limit: int = 2
    """Checkpoints kept, the best among them."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a better eval loss."""
    keep_best: bool = True
    """With eval data: end with the adapter of the best evaluation, not the last."""
    logging_steps: int = 1
    """Optimizer steps between log records."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where logs go: tensorboard, wandb, mlflow, ... or none."""
    seed: int = 0
    """Seed of adapter initialisation, data order and dropout."""
    resume: bool = False
    """Continue the run in `output` from its last checkpoint."""
    record: int = 0
    """Record what crosses the wire in the first so many micro-batches, with the text they came from, into
    `output`/recording, for `dlora audit`. The folder holds private data. 24 batches of 16 rows are enough."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """More arguments for trl.SFTConfig, by name."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work, all checks here and nowhere else."""
        for name in (
            "r",
            "batch_size",
            "gradient_accumulation_steps",
            "eval_batch_size",
            "max_length",
            "logging_steps",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, want at least 1")
        if self.record < 0:
            raise UsageError(f"record: got {self.record}, want 0 or more")
        for name in ("eval_steps", "save_steps", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: got {value}, want at least 1")
        if self.kind != "lora" and self.adapter is None and self.target_modules is None:
            raise UsageError(
                f"kind={self.kind} wants target_modules: the linears that end attention and MLP are o_proj,down_proj "
                "in Llama, out_proj,fc2 in OPT, dense,dense_4h_to_h in BLOOM, c_proj in GPT-2"
            )
        if self.kind != "lora" and (self.use_rslora or self.rank_pattern or self.alpha_pattern):
            raise UsageError(f"kind={self.kind}: use_rslora, rank_pattern and alpha_pattern are of LoRA")
        if self.pad_to < 0:
            raise UsageError(f"pad_to: got {self.pad_to}, want 0 or more")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout: got {self.lora_dropout}, want a value in [0, 1)")
        if self.max_steps < 1 and self.epochs <= 0:
            raise UsageError("give epochs or max_steps: both are zero or negative")
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate: got {self.learning_rate}, want a positive number")
        if self.early_stopping_patience is not None and self.eval_data is None:
            raise UsageError("early_stopping_patience needs eval_data")
        best = self.eval_data is not None and self.keep_best
        if best and self.save_steps and (self.eval_steps is None or self.save_steps % self.eval_steps):
            raise UsageError(
                f"save_steps: got {self.save_steps} with eval_steps {self.eval_steps}; keep_best needs checkpoints at "
                "evaluations: give eval_steps, and a multiple of it as save_steps, or keep_best false"
            )
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"output: {self.output} is a file, want a folder")
        if self.kill_revive is not None and self.kill_revive.idle == "cloud" and not self.upload_consent:
            raise UsageError(
                "kr_options idle=cloud uploads killed modules to the cloud, which then holds part of the adapter: "
                "agree with --upload_consent true, or use idle=drop"
            )
        if self.kr == "off" and self.kr_options:
            raise UsageError("kr_options need kr on or paper")
        if reserved := sorted(_RESERVED & self.trainer.keys()):
            raise UsageError(f"trainer: {', '.join(reserved)} cannot be set here")

    @property
    def kill_revive(self) -> KillReviveConfig | None:
        """Settings of Kill and Revive; None: all modules are trained all the time."""
        return None if self.kr == "off" else from_options(self.kr, self.kr_options)

    @property
    def targets(self) -> list[str] | str | None:
        """`target_modules` as peft takes it."""
        return _targets(self.target_modules)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Names of settings whose value in `other`, a saved `as_dict`, is not this one's.

        Where the run may go on elsewhere or wait longer, a difference does not count.
        """
        free = {"resume", "server", "give_up_after_s", "output", "report_to", "device", "record"}
        free |= {field.name for field in dataclasses.fields(AccessSettings)}
        return [name for name, value in self.as_dict().items() if name not in free and other.get(name) != value]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they go into run.json."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of `dlora serve`."""

    model: str
    """Hugging Face id, local folder, .gguf file, or smollm2 (the model of the demo)."""
    model_id: str | None = None
    """Public name that adapters will carry; default: the hub id or the name of the file or folder."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback wants TLS, or `insecure`."""
    port: int = 50051
    """Port to listen on; 0 picks a free one."""
    device: str = "cpu"
    """Device of the model, for example cuda."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Compute dtype of the model."""
    quantize: Literal["none", "int8", "int4", "nf4"] = "none"
    """Keep the decoder's linear weights in 8 or 4 bits, for less memory (int8 and nf4 need the extra `quantize`).
    Another function than the full model, with a fingerprint of its own."""
    allow_modules: str = ".*"
    """Regular expression over full module names: what edges may adapt."""
    edge_first: int = 0
    """Let edges have the weights of so many of the first decoder layers, and run these themselves: more privacy for
    them, less of the model kept to yourself."""
    edge_last: int = 0
    """The same for the last layers."""
    max_tokens: int = 16_384
    """Tokens of one micro-batch, padding included."""
    max_length: int = 8_192
    """Tokens of one sequence; the model's own limit applies too."""
    max_message_mib: int = 256
    """Largest message in MiB."""
    max_inflight_mib: int = 8_192
    """Activations held for all micro-batches in flight, in MiB."""
    max_streams: int = 64
    """Micro-batches in flight."""
    compute_slots: int = 1
    """Micro-batches that compute at the same moment."""
    edge_timeout_s: float = 120.0
    """How long a micro-batch waits for its edge, in seconds."""
    threads: int | None = None
    """CPU threads for computing; default: PyTorch's."""
    keys: Path | None = None
    """Folder of `dlora keys`: its server certificate and its identities."""
    tls_cert: Path | None = None
    """Server certificate, as a PEM file, in place of that of `keys`. A changed file is taken up without restart."""
    tls_key: Path | None = None
    """Its key."""
    client_ca: Path | None = None
    """Authority of client certificates, as a PEM file: every edge then has to show one (mutual TLS)."""
    identities: Path | None = None
    """File of tenants, tokens and certificates, in place of that of `keys`. Changes are taken up within a second."""
    insecure: bool = False
    """Agree that anybody on the network can read what travels, and use the server: only inside a tunnel."""
    audit_log: Path | None = None
    """File that gets a JSON line for every stream: who, how much, how it ended; never content."""
    drain_s: float = 30.0
    """After Ctrl-C or SIGTERM: how long streams in flight may go on while new ones are refused."""
    metrics_port: int | None = None
    """Port for Prometheus metrics and readiness, on loopback (needs the extra `server`)."""
    replicas: int = 0
    """Over 0: so many servers of the model, placed and supervised by Ray (needs the extra `ray`), behind this address.
    SIGHUP replaces them one by one."""
    max_replicas: int | None = None
    """With replicas: up to so many while streams wait for compute slots; default: no more than `replicas`."""
    replica_ports: str = "0-0"
    """With replicas: their ports, as FIRST-LAST, which edges have to reach; 0-0: any."""
    ray_address: str | None = None
    """With replicas: address of a Ray cluster, or auto; default: Ray on this machine alone."""
    replica_cpus: float = 1.0
    """With replicas: CPUs that Ray reserves for each."""
    replica_gpus: float = 0.0
    """With replicas: GPUs that Ray reserves for each; give device cuda as well."""

    @property
    def ports(self) -> tuple[int, int]:
        """`replica_ports` as numbers. Raises UsageError."""
        found = re.fullmatch(r"(\d{1,5})-(\d{1,5})", self.replica_ports)
        first, last = map(int, found.groups()) if found else (1, 0)
        if not 0 <= first <= last < 65536:
            raise UsageError(f"replica_ports: got {self.replica_ports!r}, want FIRST-LAST, for example 50100-50199")
        return first, last

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        _ = self.ports
        if self.replicas < 0 or (self.max_replicas is not None and self.max_replicas < max(1, self.replicas)):
            raise UsageError(
                f"replicas: got {self.replicas}, max_replicas {self.max_replicas}; want 0 or more, and no less"
            )
        if self.replicas and self.metrics_port is not None:
            raise UsageError(
                "metrics_port is of a single server: with replicas Ray's own metrics and the audit log remain"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("tls_cert and tls_key go together: give both or neither")
        if self.drain_s < 0:
            raise UsageError(f"drain_s: got {self.drain_s}, want 0 or more")
        encrypted = self.keys is not None or self.tls_cert is not None
        if self.client_ca is not None and not encrypted:
            raise UsageError("client_ca needs TLS: give keys, or tls_cert and tls_key")
        if self.host not in LOOPBACK and not self.insecure:
            if not encrypted:
                raise UsageError(
                    f"host: {self.host} is not loopback, and everybody on the way could read and change what travels: "
                    "give keys (make them with `dlora keys init`) or tls_cert and tls_key; or agree with --insecure"
                )
            if self.keys is None and self.identities is None and self.client_ca is None:
                raise UsageError(
                    f"host: {self.host} is not loopback, and anybody could use the server: give keys, identities or "
                    "client_ca; or agree with --insecure"
                )
        if self.client_ca is not None and self.keys is None and self.identities is None:
            raise UsageError("client_ca needs identities: a certificate counts only if it is listed there")
        for name in ("max_tokens", "max_length", "max_message_mib", "max_inflight_mib", "max_streams", "compute_slots"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, want at least 1")
        if not 0 <= self.port < 65536:
            raise UsageError(f"port: got {self.port}, want 0 to 65535")
        if self.max_message_mib > 2047:
            raise UsageError(f"max_message_mib: got {self.max_message_mib}, gRPC allows up to 2047")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(EdgeSettings):
    """How answers are made."""

    adapter: Path | None = None
    """Adapter folder, as `dlora train` or peft writes it; default: the served model as it is."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0: always the likeliest token (greedy). Over 0: sample, more freely the higher."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability."""
    top_k: int = 0
    """Sample among so many of the likeliest tokens; 0: no limit."""
    repetition_penalty: float = 1.0
    """Over 1: make tokens that were there already less likely."""
    stop: list[str] | str = field(default_factory=list)
    """A text, or a list of texts, that ends an answer."""
    seed: int = 0
    """Seed of sampling."""
    prompt_lookup: int = 0
    """Over 0: draft so many tokens at a time from the text so far and check them in one pass. Same answers, fewer
    round trips where the answer repeats its prompt; one prompt at a time."""
    generation: dict[str, Any] = field(default_factory=dict)
    """More options of transformers.GenerationConfig, by name: num_beams, no_repeat_ngram_size, ..."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: got {self.max_new_tokens}, want at least 1")
        if self.temperature < 0:
            raise UsageError(f"temperature: got {self.temperature}, want 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p: got {self.top_p}, want a value in (0, 1]")
        for name in ("top_k", "prompt_lookup"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}: got {getattr(self, name)}, want 0 or more")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `generate`."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.repetition_penalty != 1:
            found["repetition_penalty"] = self.repetition_penalty
        if self.stop:
            found["stop_strings"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.prompt_lookup:
            found["prompt_lookup_num_tokens"] = self.prompt_lookup
        return found | self.generation


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(SamplingSettings):
    """Settings of `dlora generate`."""

    prompt: str | None = None
    """The prompt; default: what comes on standard input."""
    prompts: Path | None = None
    """A file of prompts instead: .jsonl with `prompt` or `messages` in each row, or text with one prompt a line."""
    output: Path | None = None
    """With `prompts`: a .jsonl file for prompts and completions, which the same command continues where it was
    stopped; default: standard output."""
    chat: bool = False
    """Put text prompts into the model's chat template, as a user's message."""
    batch_size: int = 8
    """Prompts of a file that are answered together."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        if self.prompt is not None and self.prompts is not None:
            raise UsageError("give prompt or prompts, not both")
        if self.output is not None and self.prompts is not None and self.output.resolve() == self.prompts.resolve():
            raise UsageError(f"output: {self.output} is the file of the prompts")
        if self.output is not None and self.prompts is None:
            raise UsageError("output needs prompts: a single answer goes to standard output")
        if self.batch_size < 1:
            raise UsageError(f"batch_size: got {self.batch_size}, want at least 1")


@dataclass(frozen=True, kw_only=True)
class ChatSettings(SamplingSettings):
    """Settings of `dlora chat`."""

    system: str | None = None
    """System prompt; default: what the model's chat template brings."""
    temperature: float = 0.7
    """0: always the likeliest token (greedy). Over 0: sample, more freely the higher."""
    top_p: float = 0.9
    """Sample among the likeliest tokens of this total probability."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings(EdgeSettings):
    """Settings of `dlora eval`."""

    data: str
    """A .jsonl or .csv file, or a Hugging Face data set id (org/name or org/name:split). Rows as for training, or
    with `prompt`, `choices` and `answer` (the right choice, as text or as a number from 0)."""
    adapter: Path | None = None
    """Adapter folder, as `dlora train` or peft writes it; default: the served model as it is."""
    exact_match: bool = False
    """Also answer every prompt, greedily, and count answers that equal the completion."""
    max_new_tokens: int = 32
    """With exact_match: longest answer in tokens."""
    batch_size: int = 8
    """Rows of a micro-batch."""
    limit: int | None = None
    """Only the first so many rows."""
    output: Path | None = None
    """Write the result as JSON, too."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: got {value}, want at least 1")


@dataclass(frozen=True, kw_only=True)
class ApiSettings(EdgeSettings):
    """Settings of `dlora api`."""

    adapter: Path | None = None
    """Adapter folder, as `dlora train` or peft writes it; default: the served model as it is."""
    name: str | None = None
    """Model name that apps use; default: the adapter's folder name, or the served model's id."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches it can use the private adapter: keep it on loopback."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    api_key: str | None = None
    """Key that apps must send; better given as $DLORA_API_KEY than on a command line that others can see."""
    max_new_tokens: int = 1024
    """Longest answer in tokens, where a request does not say."""
    prompt_lookup: int = 0
    """Over 0: draft so many tokens at a time from the text so far and check them in one pass."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        if not 0 <= self.port < 65536:
            raise UsageError(f"port: got {self.port}, want 0 to 65535")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: got {self.max_new_tokens}, want at least 1")
        if self.prompt_lookup < 0:
            raise UsageError(f"prompt_lookup: got {self.prompt_lookup}, want 0 or more")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(EdgeSettings):
    """Settings of `dlora plan`."""

    target_modules: list[str] | str | None = None
    """Linear modules to adapt, as for training. Default: peft's for this architecture."""
    r: int = 8
    """LoRA rank."""
    wire: Literal["plain", "factored"] = "plain"
    """How deltas travel."""
    sites: int | None = None
    """So many active sites, evenly spread; default: all. Kill and Revive at 1/8 of the bytes has about an eighth."""
    batch_size: int = 8
    """Rows of a micro-batch."""
    length: int = 128
    """Tokens of a row."""
    supervised: int = 16
    """Tokens of a row with a label."""
    rtt_ms: float | None = None
    """Round trip time of a link in place of the one there is; default: measured."""
    up_mbit: float | None = None
    """Bandwidth towards the server in Mbit/s, of a link that is slower than the one there is; default: as measured."""
    down_mbit: float | None = None
    """The same for what comes from the server."""
    steps: int = 1000
    """Steps of the run that is planned."""
    check: bool = False
    """Also run steps over random tokens and show how far off the prediction is."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        for name in ("r", "batch_size", "length", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, want at least 1")
        if not 0 <= self.supervised < self.length:
            raise UsageError(f"supervised: got {self.supervised}, want 0 to {self.length - 1}")
        for name in ("rtt_ms", "up_mbit", "down_mbit"):
            value = getattr(self, name)
            if value is not None and (value < 0 or (value == 0 and name != "rtt_ms")):
                raise UsageError(f"{name}: got {value}, want more than 0")

    @property
    def targets(self) -> list[str] | str | None:
        """`target_modules` as peft takes it."""
        return _targets(self.target_modules)


def _targets(given: list[str] | str | None) -> list[str] | str | None:
    """Plain names as a list, a regular expression as it is."""
    if isinstance(given, str) and re.fullmatch(r"\w+(,\w+)*", given) and given != "all-linear":
        return given.split(",")
    return given


@dataclass(frozen=True, kw_only=True)
class InfoSettings(AccessSettings):
    """Settings of `dlora info`."""

    server: str | None = None
    """Address of `dlora serve`, as host:port."""
    adapter: Path | None = None
    """Adapter folder, as `dlora train` or peft writes it; with `server`, whether the two fit."""

    def __post_init__(self) -> None:
        """Raises UsageError if there is nothing to look at."""
        if self.server is None and self.adapter is None:
            raise UsageError("give --server, --adapter, or both")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of `dlora report`."""

    runs: list[Path]
    """Folders of runs, as `dlora train` writes them; the first is the one that others are compared with."""
    output: Path = Path("report")
    """Folder for report.html and the figures as PNG files."""


@dataclass(frozen=True, kw_only=True)
class AuditSettings(AccessSettings):
    """Settings of `dlora audit`."""

    run: Path
    """Folder of a run, made with `dlora train --record 24 ...`."""
    server: str
    """Address of `dlora serve` with the run's model, as host:port: the attacker's own text runs through it."""
    public: str | None = None
    """Text that an attacker could have, in the forms of training data; the closer to the run's own, the more it
    recovers. Default: the messages of the demo."""
    output: Path = Path("audit")
    """Folder for audit.json and audit.html; both hold figures alone, no text."""
    rows: int = 128
    """At most so many recorded rows of data are attacked; an in-domain attacker learns from as many others."""
    sites: int = 8
    """At most so many sites are attacked, evenly spread, the lowest and the highest among them."""
    match: int = 0
    """Over 0: so many rows are also attacked by trying tokens in the model itself, one position after the other.
    Gets more than a linear map from public text does, and is slow: some minutes for 8 short rows."""
    seed: int = 0
    """Seed of which rows the attacker knows."""
    give_up_after_s: float = 600.0
    """How long a lost server is waited for, in seconds."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        for name in ("rows", "sites"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, want at least 1")


@dataclass(frozen=True, kw_only=True)
class KeysSettings:
    """Settings of `dlora keys`."""

    action: Literal["init", "server", "tenant", "token", "certificate", "revoke", "list"]
    """init: a new folder with authority and server certificate. server: a new server certificate. tenant: set a
    tenant's limits. token, certificate: give a tenant a new one. revoke: take back one, or all of a tenant. list."""
    folder: Path = Path("keys")
    """Folder of keys; keep it on the server, and open to nobody else."""
    tenant: str | None = None
    """Name of the tenant."""
    hosts: str = "localhost,127.0.0.1"
    """With init and server: names and addresses by which edges reach the server, separated by commas."""
    days: int = 90
    """How long certificate or token are valid."""
    id: str | None = None
    """With revoke: id of a token or certificate; default: everything of `tenant`."""
    limits: dict[str, float] = field(default_factory=dict)
    """With tenant: max_streams, max_inflight_mib, mib_per_hour, adapter_mib, weight."""

    def __post_init__(self) -> None:
        """Raises UsageError for actions that lack what they need."""
        if self.action in ("tenant", "token", "certificate") and self.tenant is None:
            raise UsageError(f"keys {self.action} needs --tenant NAME")
        if self.action == "revoke" and (self.id is None) == (self.tenant is None):
            raise UsageError("keys revoke needs --id or --tenant, one of the two")


@dataclass(frozen=True, kw_only=True)
class StatusSettings:
    """Settings of `dlora status`."""

    metrics_port: int = 9464
    """The server's metrics port, on this machine."""
    watch: bool = False
    """Show it again every two seconds, until Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Settings of `dlora merge`."""

    model: str
    """The base: Hugging Face id, local folder, .gguf file, or smollm2."""
    adapter: Path
    """Adapter folder, as `dlora train` or peft writes it."""
    output: Path
    """New folder for the full model."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Dtype of the merged weights."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of `dlora demo`."""

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
