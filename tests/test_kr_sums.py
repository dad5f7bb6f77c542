"""Kill and Revive: what is summed between decisions counts for one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import adapter, batches, lora, make_split

from dlora.cloud.model import CloudModel
from dlora.embedded import InProcessLink
from dlora.kill_revive.apply import KillAndRevive
from dlora.kill_revive.config import KillReviveConfig

OPTIONS: dict[str, Any] = {"warmup": 2, "interval": 3, "final": 0.0, "revive": "none"}


@pytest.fixture(scope="module")
def link(cloud_models: Callable[[str], CloudModel]) -> Iterator[InProcessLink]:
    """A tiny Llama in this process."""
    made = InProcessLink(cloud_models("llama"))
    yield made
    made.close()


def test_an_interval_is_scored_by_its_own_gradients(link: InProcessLink) -> None:
    """What was summed up to one decision does not count for the next."""
    split = make_split(link, lora())
    config = KillReviveConfig(signal="gradient", budget=1.0, average=False, **OPTIONS)
    reviver = KillAndRevive(split, config, 20)
    for step in range(9):
        reviver.before_step(step)
        for parameter in adapter(split).values():
            parameter.grad = torch.full_like(parameter, float(step < 5))
        reviver.before_update(None)
    scores = {line["step"]: line["score"] for line in reviver.state_dict()["records"]}
    assert scores.keys() == {2, 5, 8} and min(scores[2], scores[5]) > 0 and scores[8] == 0


def test_outputs_are_summed_up_to_the_decision_alone(link: InProcessLink) -> None:
    """The output policy measures up to its decision; what it summed is neither kept nor saved
    beyond.
    """
    split = make_split(link, lora())
    reviver = KillAndRevive(split, KillReviveConfig(policy="output", **OPTIONS), 20)
    for step, batch in enumerate(batches(2)):
        reviver.before_step(step)
        split(**batch).loss.backward()
    assert len(reviver.state_dict()["outputs"]) == len(split.adapted_modules)
    reviver.before_step(2)
    assert all(line["score"] > 0 for line in reviver.state_dict()["records"])
    assert reviver.state_dict()["outputs"] == []
