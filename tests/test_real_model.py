"""SmolLM2-135M-Instruct, over a real socket. Slow: minutes on two cores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import adapter
from peft import LoraConfig, get_peft_model
from test_parity import assert_same_grads

import dlora
from dlora.__main__ import main
from dlora.client import GrpcLink
from dlora.demo import data_file, serving
from dlora.load import DEMO_MODEL, DEMO_MODEL_ID, load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcLink]:
    """A server process with the real model."""
    with serving(DEMO_MODEL) as address:
        made = dlora.connect(address, cache=tmp_path_factory.mktemp("cache"))
        yield made
        made.close()


def test_real_model_matches_local(link: GrpcLink) -> None:
    """Loss to 1e-6 and gradients to 1e-5 of local peft's also hold with 30 layers and trained weights."""
    config = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    local = get_peft_model(load_model(DEMO_MODEL).model, config)
    torch.manual_seed(0)
    split = dlora.get_peft_model(link, config, wire_dtype="fp32")
    for model in (local, split):
        for name, parameter in adapter(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01, generator=torch.Generator().manual_seed(len(name)))
    rows = [json.loads(line) for line in data_file("train.jsonl").read_text().splitlines()[:3]]
    texts = [row["prompt"] + row["completion"] for row in rows]
    batch = dlora.load_tokenizer(link)(texts, return_tensors="pt", padding=True)
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    want, got = local(**batch, labels=labels).loss, split(**batch, labels=labels).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    want.backward()
    got.backward()
    assert_same_grads(local, split)
    assert split.peft_config["default"].base_model_name_or_path == DEMO_MODEL_ID


def test_real_run_learns(link: GrpcLink, tmp_path: Path) -> None:
    """A dozen steps of `dlora train` at the defaults' wire already halve the loss of the first step."""
    words = ["--server", link.address, "--data", str(data_file("train.jsonl")), "--output", str(tmp_path / "run")]
    assert main(["train", *words, "--max-steps", "12", "--learning-rate", "3e-3", "--warmup-steps", "2"]) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    state = next((tmp_path / "run/checkpoints").glob("*/trainer_state.json"))
    losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert record["train_loss"] < 0.5 * losses[0]
