"""One adapter in training: a split model of its own, summed gradients, and an AdamW.

Rows go through the split model as those of any training do: with labels where log-probabilities are
wanted, so that only those hidden states come back. Log-probabilities, losses, gradients and the
optimizer are here.

Shapes: N tokens of a row, M wanted positions of it, K targets at each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from dlora.edge.model import SplitModel
from dlora.edge.wanted_logits import wanted_logits
from dlora.errors import DivergedError, UsageError
from dlora.formulas import pass_bytes
from dlora.proto import dlora_pb2 as pb
from dlora.tinker.losses import Loss, wanted
from dlora.tinker.rows import Row

__all__ = ["Adapter", "Output", "StepSettings", "logits_of", "micro_batches", "without_loss"]

_STATE: Final = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""


@dataclass(frozen=True)
class StepSettings:
    """Settings of one optimizer step, as torch's AdamW has them."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float
    """Largest norm of all gradients; 0: any."""


@dataclass
class Output:
    """What a pass over rows gave: the loss, and for each row values in the shape of its targets."""

    loss: float = 0.0
    logprobs: list[Tensor] = field(default_factory=list)
    terms: list[Tensor] = field(default_factory=list)


class Adapter:
    """An adapter, its gradients since the last step, and its optimizer."""

    def __init__(self, model: SplitModel, *, batch_size: int, everywhere: bool) -> None:
        self.model, self.batch_size, self.everywhere = model, batch_size, everywhere
        self._spent = model.meter.copy()
        model.set_options(head_positions="supervised")
        self.parameters: dict[str, nn.Parameter] = {
            name: one for name, one in model.named_parameters() if one.requires_grad
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values())

    # ----------------------------------------------------------------- passes

    def forward(self, rows: Sequence[Row], loss: Loss, config: Mapping[str, float]) -> Output:
        """Loss and log-probabilities of every target, without gradients."""
        self.model.eval()
        output = Output()
        with torch.no_grad():
            for batch in self._batches(rows, training=False):
                self._pass(batch, loss, config, output, everywhere=True)
        return output

    def forward_backward(
        self, rows: Sequence[Row], loss: Loss, config: Mapping[str, float]
    ) -> Output:
        """The same, and add the gradients of the loss to those since the last step.

        All of it, or where it raises nothing.
        """
        self.model.train()
        output, before = Output(), self._take_gradients()
        try:
            for batch in self._batches(rows, training=True):
                total = self._pass(batch, loss, config, output, everywhere=self.everywhere)
                total.backward()
        except BaseException:
            self._put_gradients(before)
            raise
        for parameter, known in zip(self.parameters.values(), before, strict=True):
            if known is not None:
                parameter.grad = known if parameter.grad is None else known.add_(parameter.grad)
        return output

    def _batches(self, rows: Sequence[Row], *, training: bool) -> list[Sequence[Row]]:
        limits = self.model.link.description.limits
        return list(micro_batches(rows, limits, self.batch_size, training=training))

    def _pass(
        self,
        rows: Sequence[Row],
        loss: Loss,
        config: Mapping[str, float],
        output: Output,
        *,
        everywhere: bool,
    ) -> Tensor:
        """The summed loss of one micro-batch; what it gave is added to the output."""
        places = [wanted(row, everywhere=everywhere) for row in rows]
        total = torch.zeros((), device=self.model.device)
        for row, asked_N, logits in zip(
            rows, places, logits_of(self.model, rows, places), strict=True
        ):
            targets_MK = row.targets_NK[asked_N].to(logits.device)
            found_MK = logits.gather(-1, targets_MK) - logits.logsumexp(-1, keepdim=True)
            places_N = asked_N.nonzero()[:, 0].to(logits.device)
            logprobs_NK = found_MK.new_zeros(row.targets_NK.shape)
            logprobs = row.shaped(logprobs_NK.index_put((places_N,), found_MK))

            terms = loss.terms(logprobs, row, config)
            total = total + terms.sum()
            output.logprobs.append(logprobs.detach().cpu())
            output.terms.append(terms.detach().cpu())
        output.loss += float(total.detach())
        return total

    # ----------------------------------------------------------------- gradients and steps

    def _take_gradients(self) -> list[Tensor | None]:
        taken = [one.grad for one in self.parameters.values()]
        self._put_gradients([None] * len(taken))
        return taken

    def _put_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient

    def step(self, settings: StepSettings) -> dict[str, float]:
        """One step of AdamW with the gradients since the last; they are then forgotten.

        Returns the norm of all gradients before clipping, and the traffic since the last step.
        Raises DivergedError where the norm is not finite; nothing is then updated.
        """
        limit = settings.clip_norm if settings.clip_norm > 0 else float("inf")
        with_gradient = [one for one in self.parameters.values() if one.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(with_gradient, limit)) if with_gradient else 0.0
        try:
            if not torch.isfinite(torch.tensor(norm)):
                raise DivergedError(f"the gradients' norm is {norm}: nothing was updated")
            for group in self.optimizer.param_groups:
                group["lr"], group["betas"] = settings.learning_rate, settings.betas
                group["eps"], group["weight_decay"] = settings.eps, settings.weight_decay
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        spent, self._spent = self._spent, self.model.meter.copy()
        cost = self._spent - spent
        return {
            "unclipped_grad_l2:mean": norm,
            "dlora/sent_mib": cost.sent_bytes / 2**20,
            "dlora/received_mib": cost.received_bytes / 2**20,
            "dlora/round_trips": float(cost.round_trips),
        }

    # ----------------------------------------------------------------- state

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by parameter and kind; none before its first step."""
        return {
            f"{name}.{kind}": self.optimizer.state[one][kind].contiguous()
            for name, one in self.parameters.items()
            for kind in _STATE
            if one in self.optimizer.state
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take this state, or a new optimizer's where it is empty; gradients are forgotten.

        Raises UsageError for a state of other parameters.
        """
        known = {f"{name}.{kind}": one for name, one in self.parameters.items() for kind in _STATE}
        for name, tensor in state.items():
            one = known.get(name)
            if one is None or tensor.shape != (() if name.endswith(".step") else one.shape):
                raise UsageError(f"the optimizer state is of another adapter: {name}")

        self.optimizer = torch.optim.AdamW(self.parameters.values())
        for name, one in self.parameters.items():
            if f"{name}.step" not in state:
                continue
            kept = {kind: state[f"{name}.{kind}"] for kind in _STATE}
            self.optimizer.state[one] = {
                kind: value if kind == "step" else value.to(one.device)
                for kind, value in kept.items()
            }
        self.optimizer.zero_grad(set_to_none=True)


def without_loss(model: SplitModel) -> SplitModel:
    """The model, which computes no loss of its own where labels come along."""
    model.get_base_model().loss_function = _no_loss
    return model


def _no_loss(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_zeros(())


def logits_of(model: SplitModel, rows: Sequence[Row], places: Sequence[Tensor]) -> list[Tensor]:
    """Logits at those places of each row, float32 [places, V]."""
    following = [row.targets_NK[asked_N, 0] for row, asked_N in zip(rows, places, strict=True)]
    return wanted_logits(model, [row.ids_N for row in rows], places, following)


def micro_batches(
    rows: Sequence[Row], limits: pb.Limits, most_rows: int, *, training: bool
) -> Iterator[Sequence[Row]]:
    """The rows in order, as many at a time as are allowed and fit the server.

    Raises UsageError for a row that does not fit alone.
    """
    fits = _fits(limits, training=training)
    start, longest = 0, 0
    for end, row in enumerate(rows):
        length = len(row.ids_N) + 1
        if length > limits.max_length or not fits(1, length):
            raise UsageError(
                f"data[{end}] has {length - 1} tokens and the one after them: this server takes "
                f"sequences of up to {limits.max_length}, {limits.max_tokens} tokens a micro-batch"
            )
        if end > start and (
            end - start >= most_rows or not fits(end - start + 1, max(longest, length))
        ):
            yield rows[start:end]
            start, longest = end, 0
        longest = max(longest, length)
    yield rows[start:]


def _fits(limits: pb.Limits, *, training: bool) -> Callable[[int, int], bool]:
    """Whether the server takes so many rows of such a length."""

    def fits(count: int, length: int) -> bool:
        needed = 0.0
        if training:
            linear, quadratic = limits.bytes_per_token, limits.bytes_per_token_squared
            needed = pass_bytes(count, length, linear, quadratic)
        return count * length <= limits.max_tokens and needed <= limits.max_inflight_bytes

    return fits
