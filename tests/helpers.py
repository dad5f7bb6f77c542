"""What several test files use: comparisons, counters, and real processes."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import FAMILIES, adapter, batches, make_base
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForSequenceClassification


class FlopCount(TorchDispatchMode):
    """torch's flop formulas, without the module tracking that cannot be used around
    autograd.grad.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def local_classifier(family: str, split: Any, num_labels: int, *, bare: bool = False) -> Any:
    """The local classifier of a family's model with the split one's adapter and head, or `bare`."""
    config = copy.deepcopy(FAMILIES[family][0])
    config.num_labels = num_labels
    base = AutoModelForSequenceClassification.from_config(config)
    missing = base.load_state_dict(make_base(family).state_dict(), strict=False).missing_keys
    assert missing == ["score.weight"]
    if bare:
        return base
    config = copy.deepcopy(split.peft_config["default"])
    config.base_model_name_or_path = None
    local = get_peft_model(base, config)
    weights = get_peft_model_state_dict(split, save_embedding_layers=False)
    set_peft_model_state_dict(local, weights)
    return local


def assert_same_grads(
    local: torch.nn.Module, split: torch.nn.Module, tolerance: float = 1e-5
) -> None:
    """For every adapter tensor: max |difference| at most `tolerance` of max |reference
    gradient|.
    """
    want, got = adapter(local), adapter(split)
    assert want.keys() == got.keys()
    for name, parameter in want.items():
        scale = parameter.grad.abs().max().item()
        difference = (got[name].grad - parameter.grad).abs().max().item()
        assert scale > 0, name
        assert difference <= tolerance * scale, f"{name}: {difference} of {scale}"


def assert_same_after_twenty_steps(local: torch.nn.Module, split: torch.nn.Module) -> None:
    """The change of the adapter by 20 AdamW steps differs by at most 1e-4 of its norm."""
    changes = []
    for model in (local, split):
        start = {name: parameter.detach().clone() for name, parameter in adapter(model).items()}
        optimizer = torch.optim.AdamW(adapter(model).values(), lr=1e-3)
        for batch in batches(20):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        changes.append(
            torch.cat([(p.detach() - start[name]).flatten() for name, p in adapter(model).items()])
        )
    want, got = changes
    assert want.norm() > 0.01
    assert (got - want).norm() <= 1e-4 * want.norm()


def saved(output: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors."""
    return load_file(output / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the very same adapter."""
    a, b = saved(one), saved(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# A shell that starts a job in the background has it ignore SIGINT, and children inherit that.
_AT_A_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, "-m", "dlora", *sys.argv[1:]])
"""


def dlora_command(*words: str) -> list[str]:
    """`dlora` as a person at a terminal starts it: Ctrl-C reaches it, however the tests run."""
    return [sys.executable, "-c", _AT_A_TERMINAL, *words]


def cli(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`dlora` as a user starts it."""
    return subprocess.run(
        dlora_command(*words),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


@contextmanager
def serving(*words: str) -> Iterator[str]:
    """A real `dlora serve` on a free port; yields its address, and wants exit code 0 at the end."""
    process = subprocess.Popen(
        dlora_command("serve", "--port", "0", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    timer = threading.Timer(120, process.kill)
    timer.start()
    said: list[str] = []
    try:
        for line in process.stdout or ():
            said.append(line)
            if line.startswith("ready"):
                yield line.split()[1]
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, "".join(said)
    finally:
        timer.cancel()
        process.kill()
        process.communicate()
