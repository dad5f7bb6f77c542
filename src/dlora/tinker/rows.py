"""Rows of a training request: what the SDK sends as protobuf, checked, as tensors.

Shapes: N tokens of a row, K target tokens at each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as public
from torch import Tensor

from dlora.errors import UsageError

__all__ = ["Row", "parse_request", "rows_of"]

_DTYPES: Final = {public.DTYPE_FLOAT32: np.float32, public.DTYPE_INT64: np.int64}
_MOST_TARGETS: Final = 1024
"""At one position."""


@dataclass(frozen=True)
class Row:
    """One datum: tokens, the tokens that are to be predicted at each, and inputs of the loss."""

    ids_N: Tensor
    targets_NK: Tensor
    inputs: dict[str, Tensor]
    """By name, float32, [N] or [N, K] as the targets were given."""
    flat: bool
    """Whether targets were given as [N], and what is returned is [N] too."""

    def shaped(self, values_NK: Tensor) -> Tensor:
        """Values of the targets in the shape in which these were given."""
        return values_NK[:, 0] if self.flat else values_NK


def parse_request(body: bytes) -> public.ForwardBackwardRequest:
    """The message in a body. Raises UsageError for bytes that are none."""
    try:
        return public.ForwardBackwardRequest.FromString(body)
    except DecodeError as error:
        raise UsageError("the body is no ForwardBackwardRequest of the SDK") from error


def rows_of(data: Sequence[Any], vocab: int, known: frozenset[str]) -> list[Row]:
    """The rows of a request; `known` are the inputs that its loss reads.

    Raises UsageError for what cannot be computed: other inputs, images, shapes that do not fit,
    tokens outside the vocabulary.
    """
    if not data:
        raise UsageError("data: got no rows")
    rows = []
    for number, datum in enumerate(data):
        try:
            rows.append(_row(datum, vocab, known))
        except UsageError as error:
            raise UsageError(f"data[{number}]: {error}") from error
    return rows


def _row(datum: Any, vocab: int, known: frozenset[str]) -> Row:
    ids_N = _tokens(datum.model_input)
    _check_tokens("model_input", ids_N, vocab)
    given = datum.loss_fn_inputs
    if "target_tokens" not in given:
        raise UsageError("target_tokens are missing")
    targets = _tensor("target_tokens", given["target_tokens"], len(ids_N))
    if targets.dtype != torch.int64:
        raise UsageError("target_tokens: got float32, want int64")
    _check_tokens("target_tokens", targets, vocab)

    inputs = {}
    for name in sorted(set(given) - {"target_tokens"}):
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise UsageError(f"{name} is no input of this loss beside target_tokens: {listed}")
        values = _tensor(name, given[name], len(ids_N)).float()
        if values.shape != targets.shape:
            raise UsageError(
                f"{name} has shape {list(values.shape)}, target_tokens {list(targets.shape)}"
            )
        inputs[name] = values
    flat = targets.dim() == 1
    return Row(ids_N, targets[:, None] if flat else targets, inputs, flat)


def _tokens(chunks: Sequence[Any]) -> Tensor:
    """The token ids of a row's chunks, [N]. Raises UsageError for chunks of another kind."""
    parts = []
    for chunk in chunks:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise UsageError(f"model_input: {kind} is not served here, only tokens")
        parts.append(_numbers("model_input", chunk.encoded_text.tokens, np.int32))
    ids_N = torch.cat(parts).long() if parts else torch.zeros(0, dtype=torch.int64)
    if not len(ids_N):
        raise UsageError("model_input has no tokens")
    return ids_N


def _check_tokens(name: str, tokens: Tensor, vocab: int) -> None:
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
        raise UsageError(f"{name}: a token is outside of 0 to {vocab - 1}")


def _numbers(name: str, data: bytes, dtype: Any) -> Tensor:
    if len(data) % np.dtype(dtype).itemsize:
        raise UsageError(f"{name}: {len(data)} bytes are no whole number of {np.dtype(dtype)}")
    return torch.from_numpy(np.frombuffer(data, dtype=dtype).copy())


def _tensor(name: str, message: public.Tensor, length: int) -> Tensor:
    """A tensor of shape [N] or [N, K], dense or CSR; missing entries are 0."""
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise UsageError(f"{name}: dtype {message.dtype} is not known, want float32 or int64")
    shape = list(message.shape) or [length]
    if len(shape) > 2 or shape[0] != length or (len(shape) > 1 and shape[1] > _MOST_TARGETS):
        raise UsageError(
            f"{name} has shape {shape}, want [{length}] or [{length}, K] with K up to "
            f"{_MOST_TARGETS}: one for each token of model_input"
        )
    if message.HasField("sparse_csr"):
        return _from_csr(name, message.sparse_csr, shape, dtype)
    values = _numbers(name, message.dense, dtype)
    if values.numel() != int(np.prod(shape)):
        raise UsageError(f"{name}: got {values.numel()} values for shape {shape}")
    return values.view(shape)


def _from_csr(name: str, csr: Any, shape: list[int], dtype: Any) -> Tensor:
    """A dense tensor of compressed rows."""
    values = _numbers(name, csr.values, dtype)
    starts = _numbers(name, csr.crow_indices, np.int64)
    columns = _numbers(name, csr.col_indices, np.int64)
    fits = (
        len(shape) == 2
        and len(starts) == shape[0] + 1
        and len(columns) == len(values)
        and int(starts[0]) == 0
        and int(starts[-1]) == len(values)
        and bool((starts.diff() >= 0).all())
    )
    if not fits or (len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < shape[1]):
        raise UsageError(f"{name}: the sparse indices do not fit shape {shape}")
    places = torch.arange(shape[0]).repeat_interleave(starts.diff())
    return torch.zeros(shape, dtype=values.dtype).index_put((places, columns), values)
