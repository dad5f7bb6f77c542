"""Bottleneck adapters on the split model, against a reference that shares no code with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NO_DRAIN, adapter, batches, lora, make_base, make_split
from helpers import FlopCount, assert_same_after_twenty_steps
from peft import PeftModel

import dlora
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.bottleneck import BottleneckConfig, apply_bottleneck
from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.formulas import step_traffic
from dlora.kill_revive.apply import KillAndRevive
from dlora.kill_revive.config import KillReviveConfig
from dlora.server.server import Server

TARGETS = {
    "llama": ["o_proj", "down_proj"],
    "opt": ["out_proj", "fc2"],
    "bloom": ["dense", "dense_4h_to_h"],
    "gpt2": ["c_proj"],
}


def config(family: str = "llama", kind: str = "series", **options: Any) -> BottleneckConfig:
    """A bottleneck whose W_up is not zero."""
    defaults = {"r": 6, "target_modules": TARGETS[family], "init_lora_weights": False, "scale": 0.7}
    return BottleneckConfig(kind=kind, **(defaults | options))


def random_biases(model: Any) -> None:
    """Biases start at zero; here they should matter."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name and name.endswith("bias"):
            parameter.data.normal_(std=0.1)


@contextmanager
def by_hooks(
    base: Any, model: Any, kind: str, activation: Any = torch.relu
) -> Iterator[dict[str, torch.Tensor]]:
    """The reference: plain hooks on a plain model add s W_up f(W_down h + b) + s b'. Yields its own
    leaf weights.
    """
    weights = {
        name.removeprefix("base_model.model."): p.detach().clone().requires_grad_(True)
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    handles = []
    for name in {name.split(".lora_")[0] for name in weights}:

        def hook(module: Any, args: Any, output: torch.Tensor, name: str = name) -> torch.Tensor:
            h = output if kind == "series" else args[0]
            down, up = (weights[f"{name}.lora_{one}.default.weight"] for one in "AB")
            low, high = (weights[f"{name}.lora_{one}.default.bias"] for one in "AB")
            return output + 0.7 * (activation(h @ down.T + low) @ up.T + high)

        handles.append(base.get_submodule(name).register_forward_hook(hook))
    yield weights
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("wire", ["plain", "factored", "hosted"])
@pytest.mark.parametrize("kind", ["series", "parallel"])
@pytest.mark.parametrize("family", TARGETS)
def test_gradients_equal_a_plain_reference(
    cloud_models: Any, family: str, kind: str, wire: str
) -> None:
    """Were the activation, a bias or the place of an adapter wrong, loss or gradients would
    differ.
    """
    link = InProcessLink(cloud_models(family))
    consent = wire == "hosted"
    model = make_split(link, config(family, kind), wire=wire, upload_consent=consent).train()
    random_biases(model)
    base = make_base(family)
    (batch,) = batches()
    with by_hooks(base, model, kind) as weights:
        want = base(**batch).loss
        want.backward()
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    got = {name.removeprefix("base_model.model."): p.grad for name, p in adapter(model).items()}
    assert got.keys() == weights.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, weights[name].grad, rtol=1e-3, atol=1e-6, msg=name)
    link.close()


@pytest.mark.parametrize("kind", ["series", "parallel"])
def test_twenty_hosted_steps_match_local(cloud_models: Any, kind: str) -> None:
    """Trained where the cloud computes them, their weights and biases change as those of the same
    adapters on a local model.
    """
    link = InProcessLink(cloud_models("gpt2"))
    split = make_split(link, config("gpt2", kind), wire="hosted", upload_consent=True).train()
    random_biases(split)
    local = apply_bottleneck(make_base("gpt2"), config("gpt2", kind)).train()
    weights = {name: value for name, value in split.state_dict().items() if "lora_" in name}
    assert not local.load_state_dict(weights, strict=False).unexpected_keys
    assert_same_after_twenty_steps(local, split)
    link.close()


@pytest.mark.parametrize("kind", ["series", "parallel"])
@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_round_trip_through_a_folder(
    cloud_models: Any, tmp_path: Path, family: str, kind: str
) -> None:
    """A saved adapter gives the same logits on a full local model, and on a split one again."""
    link = InProcessLink(cloud_models(family))
    model = make_split(link, config(family, kind, activation="gelu")).eval()
    random_biases(model)
    model.save_pretrained(str(tmp_path))
    (batch,) = batches()
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        want = model(**batch).logits[seen]
        local = apply_bottleneck(make_base(family), tmp_path).eval()
        torch.testing.assert_close(local(**batch).logits[seen], want, rtol=1e-4, atol=1e-4)
        again = dlora.load_adapter(link, tmp_path, wire_dtype="fp32", is_trainable=False)
        torch.testing.assert_close(again(**batch).logits[seen], want, rtol=1e-6, atol=1e-6)
    assert not adapter(again)
    with pytest.raises((ValueError, OSError)):
        PeftModel.from_pretrained(
            make_base(family), str(tmp_path)
        )  # it would leave the activation out
    link.close()


def test_greedy_tokens_equal_local(cloud_models: Any) -> None:
    """Generation with a KV cache exchanges outputs too."""
    link = InProcessLink(cloud_models("llama"))
    model = make_split(link, config()).eval()
    local = apply_bottleneck(make_base("llama"), config()).eval()
    local.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False
    )
    ids = torch.randint(5, 300, (2, 6), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids, **options).tolist() == local.generate(ids, **options).tolist()
    link.close()


@pytest.mark.parametrize("kind", ["series", "parallel"])
def test_layers_held_on_the_edge(kind: str) -> None:
    """In a held layer the adapter runs in place, with the same gradients."""
    cloud = CloudModel(make_base("llama"), model_id="x", limits=Limits(edge_first=1, edge_last=1))
    link = InProcessLink(cloud)
    (batch,) = batches()
    found = []
    for split in ((0, 0), (1, 1)):
        model = make_split(link, config(kind=kind), edge_layers=split).train()
        model(**batch).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in adapter(model).values()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)
    link.close()


@pytest.mark.parametrize("kind", ["series", "parallel"])
def test_any_active_set_trains_as_alone(cloud_models: Any, kind: str) -> None:
    """Killed adapters are gone from function and wire; the others get the gradients of a model
    without them.
    """
    link = InProcessLink(cloud_models("llama"))
    model = make_split(link, config(kind=kind)).train()
    random_biases(model)
    names = model.adapted_modules
    model.set_active(names[1::2])
    base = make_base("llama")
    (batch,) = batches()
    with by_hooks(base, model, kind) as weights:
        want = base(**batch).loss
        want.backward()
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    trained = adapter(model)
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained} == set(
        names[1::2]
    )
    for name, parameter in trained.items():
        torch.testing.assert_close(
            parameter.grad,
            weights[name.removeprefix("base_model.model.")].grad,
            rtol=1e-3,
            atol=1e-6,
            msg=name,
        )
    with pytest.raises(UsageError, match="products of two matrices, and no bottleneck adapters"):
        model.set_active(names[:1], "cloud")
    link.close()


@pytest.mark.parametrize("policy", ["kr", "output", "sensitivity", "gradient"])
def test_kill_and_revive_runs_on_them(cloud_models: Any, policy: str) -> None:
    """Kill and Revive scores, kills and revives bottlenecks; bytes fall to the budget."""
    link = InProcessLink(cloud_models("llama"))
    model = make_split(link, config()).train()
    options = KillReviveConfig(
        policy=policy, budget=0.5, warmup=1, interval=2, revive="random", average=False
    )
    reviver = KillAndRevive(model, options, 8)
    optimizer = torch.optim.AdamW(adapter(model).values(), lr=1e-3)
    sent = []
    for step, batch in enumerate(batches(8)):
        before = model.meter.copy()
        reviver.before_step(step)
        model(**batch).loss.backward()
        reviver.before_update(optimizer)
        optimizer.step()
        reviver.after_update()
        optimizer.zero_grad()
        cost = model.meter - before
        sent.append((cost.sent_bytes + cost.received_bytes) / cost.tokens)
    assert sent[-1] < 0.65 * sent[0]
    assert 0 < len(reviver.active) < len(reviver.units)
    link.close()


@pytest.mark.parametrize("kind", ["series", "parallel"])
def test_accounting(cloud_models: Any, kind: str) -> None:
    """Traffic is the formula's, and edge FLOPs are those that torch counts."""
    link = InProcessLink(cloud_models("llama"))
    model = make_split(link, config(kind=kind)).train()
    (batch,) = batches(rows=16, length=48)
    with FlopCount() as count:
        model(**batch).loss.backward()
    rows, kept = int(batch["attention_mask"].sum()), int((batch["labels"][:, 1:] != -100).sum())
    shapes = [
        (site.in_features, [(layer.out_features, 6) for layer in site.layers])
        for site in model.sites
    ]
    sent, received = step_traffic(rows, kept, 64, 64, shapes, "fp32")
    assert model.meter.sent_bytes == pytest.approx(sent, rel=0.01)
    assert model.meter.received_bytes == pytest.approx(received, rel=0.01)
    assert model.meter.edge_flops == count.total
    link.close()


def test_command_line(
    cloud_models: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dlora train --kind series` trains, resumes and saves; `dlora info` says what it is; merging
    is refused.
    """
    from dlora.cli.main import main

    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": "the desk " * n, "completion": "of"}) + "\n" for n in (1, 2, 3, 4)
        )
    )
    with Server(cloud_models("llama"), tokenizer, options=NO_DRAIN) as server:
        words = [
            "train",
            "--server",
            server.address,
            "--data",
            str(data),
            "--output",
            str(tmp_path / "run"),
        ]
        words += ["--kind", "series", "--r", "4", "--batch_size", "2", "--save_steps", "1"]
        assert main([*words, "--max_steps", "2"]) == 2
        assert "target_modules" in capsys.readouterr().err
        words += ["--target_modules", "o_proj,down_proj"]
        assert main([*words, "--max_steps", "2"]) == 0
        weights = (tmp_path / "run/adapter_model.safetensors").read_bytes()
        # As if the run had been stopped after its first step.
        shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-2")
        record = json.loads((tmp_path / "run/run.json").read_text())
        (tmp_path / "run/run.json").write_text(json.dumps(record | {"status": "interrupted"}))
        assert main([*words, "--max_steps", "2", "--resume"]) == 0
        assert (tmp_path / "run/adapter_model.safetensors").read_bytes() == weights
        assert main(["info", "--adapter", str(tmp_path / "run"), "--server", server.address]) == 0
    out = capsys.readouterr().out
    assert "bottleneck in series, size 4, relu" in out and "fit" in out and "yes" in out
    assert (
        main(
            [
                "merge",
                "--model",
                "x",
                "--adapter",
                str(tmp_path / "run"),
                "--output",
                str(tmp_path / "m"),
            ]
        )
        == 2
    )
    assert "not linear" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sideways"}, "kind: got 'sideways', want series or parallel"),
        ({"activation": "step"}, "activation: got 'step', want one of .*relu"),
    ],
)
def test_unknown_kinds_are_refused(options: dict[str, Any], message: str) -> None:
    """A misspelt kind is an error, not a default."""
    with pytest.raises(UsageError, match=message):
        config(**options)


def test_bottlenecks_stand_alone(cloud_models: Any) -> None:
    """A second adapter beside a bottleneck would be read at other places than the first."""
    link = InProcessLink(cloud_models("llama"))
    with pytest.raises(UsageError, match="stand alone"):
        make_split(link, config()).add_adapter("other", lora())
    with pytest.raises(
        UsageError, match="bottleneck adapters have one size and one scale: no rank_pattern"
    ):
        make_split(link, config(rank_pattern={"o_proj": 2}))
    link.close()
