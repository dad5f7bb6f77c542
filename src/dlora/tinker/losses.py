"""The losses of a training request, of log-probabilities that were computed on the edge.

Each is a sum over tokens, as the SDK defines it: what is to be an average is in the weights. Those
of reinforcement compare with the log-probabilities that the tokens were sampled with, q; A is the
advantage and r = exp(logprobs - q).

Shapes: N tokens of a row, K target tokens at each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dlora.errors import UsageError
from dlora.tinker.rows import Row

__all__ = ["LOSSES", "Loss", "check_config", "wanted"]

Compute = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, float]], Tensor]
"""(logprobs, inputs, config) -> what each target adds to the loss, all of one shape."""


@dataclass(frozen=True)
class Loss:
    """A loss function: what it reads, and how it is computed."""

    compute: Compute
    required: frozenset[str]
    optional: frozenset[str]
    config: Mapping[str, float]
    """Options and their defaults."""

    @property
    def inputs(self) -> frozenset[str]:
        """Everything that it may read beside the target tokens."""
        return self.required | self.optional

    def terms(self, logprobs: Tensor, row: Row, config: Mapping[str, float]) -> Tensor:
        """What each target adds, in the shape of the logprobs. Raises UsageError for lacks."""
        if missing := sorted(self.required - row.inputs.keys()):
            raise UsageError(f"{missing[0]} is missing")
        inputs = {name: values.to(logprobs.device) for name, values in row.inputs.items()}
        return self.compute(logprobs, inputs, dict(self.config) | dict(config))


def _cross_entropy(
    logprobs: Tensor, inputs: Mapping[str, Tensor], _: Mapping[str, float]
) -> Tensor:
    return -logprobs * inputs["weights"] if "weights" in inputs else -logprobs


def _ratio(logprobs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.exp(logprobs - inputs["logprobs"])


def _clipped(ratio: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """The ratio between both thresholds, which may be given for each token."""
    low, high = (
        inputs.get(name, torch.tensor(config[name], device=ratio.device))
        for name in ("clip_low_threshold", "clip_high_threshold")
    )
    return torch.maximum(torch.minimum(ratio, high), low)


def _importance_sampling(
    logprobs: Tensor, inputs: Mapping[str, Tensor], _: Mapping[str, float]
) -> Tensor:
    return -_ratio(logprobs, inputs) * inputs["advantages"]


def _ppo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    ratio = _ratio(logprobs, inputs)
    clipped = _clipped(ratio, inputs, config)
    return -torch.minimum(ratio * inputs["advantages"], clipped * inputs["advantages"])


def _cispo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    weight = _clipped(_ratio(logprobs, inputs), inputs, config).detach()
    return -weight * logprobs * inputs["advantages"]


def _dro(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    squares = (logprobs - inputs["logprobs"]) ** 2
    return -(logprobs * inputs["advantages"] - 0.5 * config["beta"] * squares)


_SAMPLED: Final = frozenset({"logprobs", "advantages"})
_THRESHOLDS: Final = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_CLIPPED: Final = frozenset(_THRESHOLDS)
_NONE: Final = frozenset[str]()

LOSSES: Final[Mapping[str, Loss]] = {
    "cross_entropy": Loss(_cross_entropy, _NONE, frozenset({"weights"}), {}),
    "importance_sampling": Loss(_importance_sampling, _SAMPLED, _NONE, {}),
    "ppo": Loss(_ppo, _SAMPLED, _CLIPPED, _THRESHOLDS),
    "cispo": Loss(_cispo, _SAMPLED, _CLIPPED, _THRESHOLDS),
    "dro": Loss(_dro, _SAMPLED, _NONE, {"beta": 0.05}),
}


def check_config(name: str, config: Mapping[str, float]) -> Loss:
    """The loss of this name. Raises UsageError for others, and for options that it lacks."""
    loss = LOSSES.get(name)
    if loss is None:
        raise UsageError(
            f"loss_fn: {name!r} is not computed here: use one of {', '.join(LOSSES)}, or "
            "forward_backward_custom with a function of your own"
        )
    if unknown := sorted(config.keys() - loss.config.keys()):
        listed = ", ".join(loss.config) or "none"
        raise UsageError(f"loss_fn_config: {unknown[0]} is no option of {name}: {listed}")
    return loss


def wanted(row: Row, *, everywhere: bool) -> Tensor:
    """Where log-probabilities are needed, bool [N].

    That is where a weight, or an advantage, or the log-probability of a sampled token is not zero.
    A row without any such place stands for all of its places.
    """
    everything_N = torch.ones(len(row.ids_N), dtype=torch.bool)
    given = [row.inputs[name] for name in ("weights", *sorted(_SAMPLED)) if name in row.inputs]
    if everywhere or not given:
        return everything_N
    asked_N = torch.stack([(one != 0).view(len(row.ids_N), -1).any(1) for one in given]).any(0)
    return asked_N if bool(asked_N.any()) else everything_N
