"""What streams leave in the cloud: nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
from conftest import batches, lora, make_base, make_split

import dlora
from dlora.cloud.hosted import HostedAdapter
from dlora.cloud.passes import Pass
from dlora.errors import DLoRAError

Links = Callable[[str], Any]


@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
def test_no_pass_stays_in_memory(links: Links, wire: str) -> None:
    """Once its stream is over, whether backward came, was refused, or never came, no pass is in
    memory, of a server or of both halves in one process: each holds all activations and a hosted
    adapter, and a server that keeps them grows with every edge that goes.
    """
    before = passes()
    with closing(dlora.in_process(make_base("llama"), model_id="x/y")) as inside:
        for link in (links("llama"), inside):
            split = make_split(link, lora(), wire=wire, upload_consent=wire == "hosted")
            split(**batches()[0]).loss.backward()
            for _ in range(3):
                del split(**batches()[0]).loss  # an edge that leaves between forward and backward
            with pytest.raises((DLoRAError, RuntimeError)):
                split(**batches()[0]).logits.backward(torch.tensor(torch.nan))
            with torch.no_grad():
                split(**batches()[0])
            del split

    deadline = time.monotonic() + 10  # a stream ends in a thread of its own
    while left := passes() - before:
        assert time.monotonic() < deadline, f"{len(left)} are still there"
        time.sleep(0.1)


def passes() -> set[int]:
    """All that are in memory now."""
    gc.collect()
    return {id(one) for one in gc.get_objects() if type(one) in (Pass, HostedAdapter)}
