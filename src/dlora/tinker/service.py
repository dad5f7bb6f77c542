"""What the interface does: sessions, adapters in training, what they save, and sampling sessions.

Methods that take a while submit a job and return its id; they may be called from any thread. Those
that begin with an underscore run as jobs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from tinker import types
from tinker.proto import tinker_public_pb2 as public

from dlora.errors import UsageError
from dlora.privacy.recording import Recorder
from dlora.tinker.adapter import Adapter, Output, StepSettings, without_loss
from dlora.tinker.checkpoints import (
    SAMPLER,
    STATE,
    Checkpoint,
    Checkpoints,
    Notes,
    read_optimizer,
)
from dlora.tinker.jobs import Jobs
from dlora.tinker.losses import check_config
from dlora.tinker.messages import config_of, output_message
from dlora.tinker.models import Models, Weights, weights_of
from dlora.tinker.rows import parse_request, rows_of
from dlora.tinker.sampler import Sampler, SamplingSession

__all__ = ["NotThere", "Run", "Service"]

_SILENT_S: Final = 600.0
"""A session that was not heard of for so long gives its adapters' room to others; the SDK sends a
sign of life every 10 s."""


class NotThere(LookupError):
    """A session, an adapter or a sampling session that is not there, or not any more."""


@dataclass
class Run:
    """An adapter in training."""

    run_id: str
    adapter: Adapter
    notes: Notes
    last_request: float = field(default_factory=time.time)


class Service:
    """Everything behind the addresses of the interface."""

    def __init__(
        self,
        models: Models,
        checkpoints: Checkpoints,
        *,
        name: str,
        lora_alpha: int,
        max_adapters: int,
        batch_size: int,
        everywhere: bool,
        recorder: Recorder | None = None,
    ) -> None:
        """`recorder`: of the first adapter's micro-batches; the models' link is then its own."""
        self.recorder = recorder
        self.models, self.checkpoints, self.name = models, checkpoints, name
        self.lora_alpha, self.max_adapters = lora_alpha, max_adapters
        self.batch_size, self.everywhere = batch_size, everywhere
        self.jobs, self.sampler = Jobs(), Sampler(models, batch_size)
        self.sessions: dict[str, float] = {}
        """Id -> when it was heard of last."""
        self.runs: dict[str, Run] = {}

    # ----------------------------------------------------------------- sessions

    def create_session(self) -> str:
        """A new session's id."""
        session_id = str(uuid.uuid4())
        self.sessions[session_id] = time.monotonic()
        return session_id

    def heard_of(self, session_id: str) -> None:
        """Note a sign of life. Raises NotThere for a session that is not there."""
        if session_id not in self.sessions:
            raise NotThere(f"session {session_id} is not there, or not any more")
        self.sessions[session_id] = time.monotonic()

    def finish_session(self, session_id: str) -> None:
        """End a session: its adapters and sampling sessions are forgotten, what it saved stays."""
        self.heard_of(session_id)
        del self.sessions[session_id]
        self.sampler.close(f"{session_id}:")
        self.jobs.submit(f"{session_id}:finish", partial(self._forget_session, session_id))

    def _forget_session(self, session_id: str) -> None:
        for run_id in [one for one in self.runs if one.startswith(f"{session_id}:")]:
            del self.runs[run_id]
        self.sampler.close(f"{session_id}:")

    def _make_room(self) -> None:
        """Raises UsageError if there are as many adapters as there may be."""
        for session_id, heard in list(self.sessions.items()):
            if time.monotonic() - heard > _SILENT_S:
                del self.sessions[session_id]
                self._forget_session(session_id)
        if len(self.runs) >= self.max_adapters:
            raise UsageError(
                f"there are {len(self.runs)} adapters in training, as many as may be: end one "
                "(ServiceClient.close), or start `dlora tinker` with a larger --max_adapters"
            )

    # ----------------------------------------------------------------- adapters

    def create(self, request: types.CreateModelRequest) -> str:
        """A fresh adapter."""
        self.heard_of(request.session_id)
        self._check_base(request.base_model)
        _check_optimizer(request.optimizer_config)
        if request.lora_config is None:
            raise UsageError("lora_config is missing: only LoRA adapters are trained here")
        run_id = f"{request.session_id}:train:{request.model_seq_id}"
        noted = {name: str(value) for name, value in (request.user_metadata or {}).items()}
        return self._submit(f"{run_id}:0", self._create, run_id, request.lora_config, noted)

    def _check_base(self, base_model: str | None) -> None:
        if base_model not in (None, self.name):
            raise UsageError(f"base_model: got {base_model!r}, this server has {self.name!r}")

    def _create(
        self, run_id: str, asked: types.LoraConfig, noted: dict[str, str]
    ) -> types.CreateModelResponse:
        self._make_room()
        model = self.models.fresh(asked, self.lora_alpha)
        flags = asked.model_dump(include={"rank", "train_attn", "train_mlp", "train_unembed"})
        self._add(run_id, model, Notes(base_model=self.name, run_metadata=noted, **flags))
        return types.CreateModelResponse(model_id=run_id)

    def _add(self, run_id: str, model: Any, notes: Notes) -> Run:
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.watch(model)  # and notes the loss that the model computes of itself
        else:
            without_loss(model)
        adapter = Adapter(model, batch_size=self.batch_size, everywhere=self.everywhere)
        self.runs[run_id] = Run(run_id, adapter, notes)
        return self.runs[run_id]

    def run(self, run_id: str) -> Run:
        """Raises NotThere for an adapter that is not in training."""
        if run_id not in self.runs:
            raise NotThere(f"model {run_id} is not in training here, or not any more")
        return self.runs[run_id]

    def unload(self, run_id: str) -> str:
        """Forget an adapter; what it saved stays."""
        self.run(run_id)
        return self._submit(f"{run_id}:unload", self._unload, run_id)

    def _unload(self, run_id: str) -> types.UnloadModelResponse:
        self.runs.pop(run_id, None)
        return types.UnloadModelResponse(model_id=run_id, type="unload_model")

    # ----------------------------------------------------------------- training

    def forward_backward(self, body: bytes) -> tuple[str, str]:
        """A pass over rows, with gradients or without: (id of the job, of the model)."""
        message = parse_request(body)
        self.run(message.model_id)
        number = self._submit(
            f"{message.model_id}:{message.seq_id}", self._forward_backward, message
        )
        return number, message.model_id

    def _forward_backward(self, message: public.ForwardBackwardRequest) -> bytes:
        adapter, config = self.run(message.model_id).adapter, config_of(message)
        loss = check_config(message.loss_fn, config)
        rows = rows_of(message.data, self.models.vocab, loss.inputs)
        run = adapter.forward if message.forward_only else adapter.forward_backward
        output: Output = run(rows, loss, config)
        return output_message(output).SerializeToString()

    def step(self, request: types.OptimStepRequest) -> str:
        """One step of the optimizer."""
        self.run(request.model_id)
        params = request.optim_params
        if not isinstance(params, types.AdamParams):
            raise UsageError(f"optim_params: {params.type} is not served here, want AdamParams")
        settings = StepSettings(
            learning_rate=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
            clip_norm=params.grad_clip_norm,
        )
        number = f"{request.model_id}:{request.seq_id}"
        return self._submit(number, self._step, request.model_id, settings)

    def _step(self, run_id: str, settings: StepSettings) -> types.OptimStepResponse:
        return types.OptimStepResponse(metrics=self.run(run_id).adapter.step(settings))

    # ----------------------------------------------------------------- saving and loading

    def save(self, request: types.SaveWeightsRequest) -> str:
        """Save an adapter and its optimizer."""
        run = self.run(request.model_id)
        path = f"tinker://{run.run_id}/{STATE}/{request.path or f'step-{request.seq_id}'}"
        self.checkpoints.at(path)
        notes = replace(run.notes, user_metadata=request.user_metadata)
        number = f"{run.run_id}:{request.seq_id}"
        return self._submit(number, self._save, run.run_id, path, notes, request.overwrite)

    def _save(
        self, run_id: str, path: str, notes: Notes, overwrite: bool
    ) -> types.SaveWeightsResponse:
        adapter = self.run(run_id).adapter
        state = adapter.optimizer_state()
        self._write(adapter, path, notes, state, overwrite=overwrite)
        return types.SaveWeightsResponse(path=path, type="save_weights")

    def _write(
        self,
        adapter: Adapter,
        path: str,
        notes: Notes,
        state: Mapping[str, Any] | None,
        *,
        overwrite: bool,
    ) -> Checkpoint:
        write = adapter.model.save_pretrained
        return self.checkpoints.save(
            path, lambda folder: write(str(folder)), notes, state, overwrite=overwrite
        )

    def save_for_sampler(self, request: types.SaveWeightsForSamplerRequest) -> str:
        """Save an adapter to sample with; without a name in memory, as a sampling session."""
        run = self.run(request.model_id)
        if request.kind != "snapshot":
            raise UsageError(f"kind: {request.kind} is not served here, want snapshot")
        path = None
        if request.path is not None:
            path = f"tinker://{run.run_id}/{SAMPLER}/{request.path}"
            self.checkpoints.at(path)
        elif request.sampling_session_seq_id is None:
            raise UsageError("give path, or sampling_session_seq_id")
        session_id = f"{run.run_id.split(':')[0]}:sample:{request.sampling_session_seq_id}"
        notes = replace(run.notes, user_metadata=request.user_metadata)
        number = f"{run.run_id}:{request.seq_id}"
        return self._submit(number, self._save_for_sampler, run.run_id, path, session_id, notes)

    def _save_for_sampler(
        self, run_id: str, path: str | None, session_id: str, notes: Notes
    ) -> types.SaveWeightsForSamplerResponseInternal:
        adapter = self.run(run_id).adapter
        if path is not None:
            self._write(adapter, path, notes, None, overwrite=False)
            return types.SaveWeightsForSamplerResponseInternal(path=path)
        self.sampler.open(session_id, None, weights_of(adapter.model))
        return types.SaveWeightsForSamplerResponseInternal(sampling_session_id=session_id)

    def load(self, request: types.LoadWeightsRequest) -> str:
        """Load a state onto an adapter, or as a new one."""
        checkpoint = self.checkpoints.found(request.path)
        if request.weights_access_token is not None:
            raise UsageError("weights_access_token: there is one user here, leave it out")
        if request.session_id is None:
            run_id, number = str(request.model_id), f"{request.model_id}:{request.seq_id}"
            self.run(run_id)
            return self._submit(number, self._load, run_id, checkpoint, request.optimizer)
        self.heard_of(request.session_id)
        self._check_base(request.base_model)
        _check_optimizer(request.optimizer_config)
        run_id = f"{request.session_id}:train:{request.model_seq_id}"
        return self._submit(f"{run_id}:0", self._load_new, run_id, checkpoint, request.optimizer)

    def _load_new(
        self, run_id: str, checkpoint: Checkpoint, optimizer: bool
    ) -> types.LoadWeightsResponse:
        self._make_room()
        state = read_optimizer(checkpoint) if optimizer else {}
        run = self._add(run_id, self.models.load(checkpoint.folder), checkpoint.notes())
        run.adapter.load_optimizer_state(state)
        return types.LoadWeightsResponse(path=checkpoint.path, model_id=run_id)

    def _load(
        self, run_id: str, checkpoint: Checkpoint, optimizer: bool
    ) -> types.LoadWeightsResponse:
        adapter, weights = self.run(run_id).adapter, Weights.read(checkpoint.folder)
        state = read_optimizer(checkpoint) if optimizer else {}
        self.models.put(adapter.model, weights)
        adapter.load_optimizer_state(state)
        return types.LoadWeightsResponse(path=checkpoint.path, model_id=run_id)

    # ----------------------------------------------------------------- sampling

    def create_sampling_session(self, request: types.CreateSamplingSessionRequest) -> str:
        """A session to sample with a saved adapter, or with the served model."""
        self.heard_of(request.session_id)
        self._check_base(request.base_model)
        weights = None
        if request.model_path is not None:
            weights = Weights.read(self.checkpoints.found(request.model_path).folder)
        session_id = f"{request.session_id}:sample:{request.sampling_session_seq_id}"
        self.sampler.open(session_id, request.model_path, weights)
        return session_id

    def sampling_session(self, session_id: str) -> SamplingSession:
        """Raises NotThere for a session that is not there."""
        try:
            return self.sampler.session(session_id)
        except KeyError:
            raise NotThere(
                f"sampling session {session_id} is not there, or not any more: of those without a "
                "saved path the newest are kept"
            ) from None

    def sample(self, request: types.SampleRequest) -> tuple[str, list[str]]:
        """Sample: (id of the job, ids of the sequences)."""
        if request.sampling_session_id is None:
            raise UsageError("sampling_session_id is missing: create a sampling client")
        session = self.sampling_session(request.sampling_session_id)
        number = f"{session.session_id}:{request.seq_id}"
        if not self.jobs.knows(number):
            asked = self.sampler.ask(session, request)
            self._submit(number, self.sampler.answer, session, asked)
        return number, [f"{number}:{one}" for one in range(request.num_samples)]

    def _submit(self, number: str, work: Any, *args: Any) -> str:
        run = self.runs.get(number.rpartition(":")[0])
        if run is not None:
            run.last_request = time.time()
        self.jobs.submit(number, partial(work, *args))
        return number


def _check_optimizer(config: Any) -> None:
    if config is not None and not isinstance(config, types.AdamOptimizerConfig):
        raise UsageError(f"optimizer: {config.type} is not served here, want AdamOptimizerConfig")
