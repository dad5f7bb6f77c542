"""What a pass gave, as the SDK's protobuf; and the options of a loss, out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from tinker.proto import tinker_public_pb2 as public
from torch import Tensor

from dlora.errors import UsageError
from dlora.tinker.adapter import Output

__all__ = ["config_of", "output_message"]

_TYPE: Final = "ArrayRecord"


def config_of(message: public.ForwardBackwardRequest) -> dict[str, float]:
    """Options of the loss. Raises UsageError for one that is no number."""
    newer = message.loss_fn_config_v2
    if not newer:
        return dict(message.loss_fn_config)
    for name, value in newer.items():
        if value.WhichOneof("value") != "number":
            raise UsageError(f"loss_fn_config: {name} is no number")
    return {name: value.number for name, value in newer.items()}


def output_message(output: Output) -> public.ForwardBackwardOutput:
    """Log-probabilities and terms of the loss for every row, and the loss.

    Rows of one width make a record; where widths differ there are several, in order.
    """
    message = public.ForwardBackwardOutput(loss_fn_output_type=_TYPE)
    message.metrics["loss:sum"] = output.loss
    start = 0
    for end in range(1, len(output.logprobs) + 1):
        if end < len(output.logprobs) and _width(output, end) == _width(output, start):
            continue
        record = message.loss_fn_outputs.add(type_tag=_TYPE, num_datums=end - start)
        for name, values in (
            ("logprobs", output.logprobs[start:end]),
            ("elementwise_loss", output.terms[start:end]),
        ):
            record.fields[name].CopyFrom(_batched(values))
        start = end
    return message


def _width(output: Output, row: int) -> tuple[int, ...]:
    return tuple(output.logprobs[row].shape[1:])


def _batched(values: Sequence[Tensor]) -> public.BatchedTensor:
    """Rows of different lengths, one after another."""
    sizes = [0, *(4 * one.numel() for one in values)]
    return public.BatchedTensor(
        data=torch.cat([one.flatten() for one in values]).float().numpy().tobytes(),
        offsets=np.cumsum(sizes, dtype=np.int64).tobytes(),
        dtype=public.DTYPE_FLOAT32,
        trailing_shape=list(values[0].shape[1:]),
    )
