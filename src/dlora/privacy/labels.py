"""Attacks on labels: from the gradient at the exit in closed form, and by linear maps of gradients.

Shapes: K supervised positions, D width of the exit, V vocabulary, R directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dlora.privacy.attacks import before_norm, label_map, labels_from_exit, unit_rows
from dlora.privacy.findings import Attackers, Finding, finding, fitted, learned_from
from dlora.privacy.samples import Samples, validation_rows
from dlora.proto import dlora_pb2 as pb

__all__ = ["attack_labels"]

_CHUNK = 512  # rows that go through the head at a time


def attack_labels(
    attacked: Samples,
    attackers: Attackers,
    head: nn.Linear,
    norm: Callable[[Tensor], Tensor],
    begin: pb.Begin,
    places: dict[int, str],
    seed: int,
) -> Iterator[Finding]:
    """Every attack on labels; nothing where no attacked row has one.

    `norm`: what the edge computes between the exit and the head, where it runs no last layers.
    """
    if not len(attacked.labels_K):
        return

    # With last layers on the edge, their weights and other tokens lie between exit and head.
    if not begin.edge_last:
        yield from _closed_form(attacked, head, norm if begin.edge_first else None)

    # Factored gradients are in coordinates of a B that changes: no map holds for two steps.
    top = [] if begin.factored else list(places)[-1:]
    top_grads = [(f"site {site}", places[site], "top_grad_KD") for site in top]
    inputs = [("exit", "exit", "exit_grad_KD"), *top_grads]
    weight_VD = head.weight.detach().float()
    for place, where, rows in tqdm(inputs, desc="labels", unit="place"):
        for name, own in attackers.items():
            validation_K = validation_rows(own.row_K, seed)
            inverter = label_map(getattr(own, rows), own.labels_K, weight_VD, validation_K)
            scores = _scores(inverter(unit_rows(getattr(attacked, rows))), attacked)

            by = f"by a linear map from gradients learned from {learned_from(name)}"
            says = f"{scores['labels']:.1%} of the labels, {by}"
            fit = fitted(inverter, weight_VD)
            yield finding("label map", place, where, says, name, **scores, **fit)


def _closed_form(
    attacked: Samples, head: nn.Linear, norm: Callable[[Tensor], Tensor] | None
) -> Iterator[Finding]:
    """The model's own guess, and what the gradient adds to it; nothing where neither applies."""
    weight_VD = head.weight.detach().float()
    bias_V = None if head.bias is None else head.bias.detach().float()

    # From the exit to what the head reads, and the gradient of that.
    exit_KD, exit_grad_KD = attacked.exit_KD, attacked.exit_grad_KD
    at_head: tuple[Tensor, Tensor, Tensor | None] | None = None
    if norm is not None:
        at_head = before_norm(norm, exit_KD, exit_grad_KD)
    elif exit_KD.shape[1] == weight_VD.shape[1]:
        at_head = exit_KD, exit_grad_KD, None
    if at_head is None:
        return
    hidden_KD, grad_KD, blind_KRD = at_head

    parts = hidden_KD.to(head.weight.dtype).split(_CHUNK)
    scores = _scores(torch.cat([head(part).argmax(1) for part in parts]), attacked)
    says = f"{scores['labels']:.1%} of the labels, by the model's own guess"
    yield finding("guess", "exit", "exit", says, **scores)

    # Each micro-batch has a scale of its own.
    guess_K = torch.zeros_like(attacked.labels_K)
    for number in attacked.batch_K.unique():
        k = attacked.batch_K == number
        blind = None if blind_KRD is None else blind_KRD[k]
        guess_K[k] = labels_from_exit(hidden_KD[k], grad_KD[k], weight_VD, bias_V, blind)
    scores = _scores(guess_K, attacked)
    says = f"{scores['labels']:.1%} of the labels, computed from the gradient at the exit"
    yield finding("labels", "exit", "exit", says, **scores)


def _scores(guess_K: Tensor, attacked: Samples) -> dict[str, Any]:
    """Share of labels, and what always guessing the most frequent label gets."""
    want_K = attacked.labels_K
    return {
        "labels": float((guess_K == want_K).float().mean()),
        "chance": float(want_K.bincount().max() / len(want_K)),
    }
