"""Architectures of every kind, tiny and random: the split against local peft.

What a record is checked for stands in `benchmarks/families.py`, which also makes the table of all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# What people use most beside those of `conftest.FAMILIES`, one of each kind: a rotation that
# depends on length, fused experts of four makes, latent attention, layers that differ, states in
# place of keys and values, alone and between attention.
USUAL = [
    "phi3",
    "mixtral",
    "qwen3_moe",
    "qwen3_next",
    "gpt_oss",
    "deepseek_v3",
    "granitemoehybrid",
    "gemma4_text",
    "mamba",
    "jamba",
]
MORE = [
    "olmoe",
    "qwen2_moe",
    "granitemoe",
    "phimoe",
    "deepseek_v2",
    "glm4_moe",
    "llama4_text",
    "falcon_h1",
    "nemotron_h",
    "kimi_linear",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "gemma",
    "cohere",
    "cohere2",
    "falcon",
    "gpt_neox",
    "gptj",
    "gpt_bigcode",
    "mpt",
    "phi",
    "starcoder2",
    "stablelm",
    "olmo2",
    "smollm3",
    "ernie4_5",
    "hunyuan_v1_dense",
    "minimax_m2",
    "mamba2",
    "bert",
]


@pytest.fixture(scope="module")
def families() -> Iterator[Any]:
    """The sweep over all architectures, as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module("families")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("architecture", USUAL)
def test_architecture_trains_and_answers_as_local_peft(families: Any, architecture: str) -> None:
    """All linears, padding on each side, cached answers and the saved adapter are local peft's."""
    record = families.check(architecture)
    assert record["status"] == "right", record
    assert record["cache"], record


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MORE)
def test_more_architectures_do(families: Any, architecture: str) -> None:
    """The same holds for those that are used less, or stand for a kind of their own."""
    record = families.check(architecture)
    assert record["status"] == "right", record
