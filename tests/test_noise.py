"""Noise and padding: what the cloud then sees, and what it costs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import NO_DRAIN, adapter, batches, lora, make_base, make_split

from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.noise import Noise
from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import decode
from dlora.training.settings import TrainSettings


@pytest.fixture
def watched() -> Iterator[tuple[InProcessLink, list[pb.Begin]]]:
    """A cloud and every `Begin` that it gets."""
    cloud = CloudModel(
        make_base("llama"), model_id="llama", limits=Limits(edge_first=1, edge_last=1)
    )
    begins: list[pb.Begin] = []
    check = cloud.check

    def noted(begin: pb.Begin, *args: Any) -> Any:
        begins.append(begin)
        return check(begin, *args)

    cloud.check = noted
    link = InProcessLink(cloud)
    yield link, begins
    link.close()


def step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Loss and all adapter gradients."""
    model.train()
    model.set_options(head_positions="supervised")
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in adapter(model).values()])


@pytest.mark.parametrize("split", [(0, 0), (1, 0), (1, 1)])
def test_hidden_lengths_change_no_gradient(watched: Any, split: tuple[int, int]) -> None:
    """The cloud sees rows of one length and is asked for every position, and the adapter learns
    just the same.
    """
    link, begins = watched
    model = make_split(link, lora(), edge_layers=split)
    (batch,) = batches()
    want_loss, want = step(model, batch)
    assert 0 in begins[-1].attention_mask and len(begins[-1].keep) < batch["input_ids"].numel()
    model.set_options(hide_lengths=True)
    loss, got = step(model, batch)
    assert not begins[-1].attention_mask
    assert len(begins[-1].keep) == begins[-1].embeddings.shape[0] == batch["input_ids"].numel()
    assert loss == pytest.approx(want_loss, rel=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_padding_looks_like_tokens(watched: Any) -> None:
    """Were padding sent as the padding token, its embedding would tell the lengths after all."""
    link, begins = watched
    model = make_split(link, lora())
    model.set_options(hide_lengths=True)
    (batch,) = batches()
    step(model, batch)
    sent = decode(begins[-1].embeddings, begins[-1].embeddings.shape, "embeddings")
    real = model.get_input_embeddings()(batch["input_ids"])[batch["attention_mask"].bool()]
    assert torch.cdist(sent, real).amin(dim=1).max() < 1e-3


def test_left_padding_travels_as_it_is(watched: Any) -> None:
    """Tokens on the left are seen by all that follow: filling them in would change results."""
    link, begins = watched
    model = make_split(link, lora())
    (batch,) = batches()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    want = step(model, batch)
    model.set_options(hide_lengths=True)
    got = step(model, batch)
    assert got[0] == pytest.approx(want[0], rel=1e-6) and 0 in begins[-1].attention_mask


def test_noise_has_the_length_that_it_says() -> None:
    """A row is off by `entry` times its own length, whatever that is."""
    rows = torch.randn(2000, 64) * torch.logspace(-2, -1.5, 2000)[:, None]
    torch.manual_seed(0)
    off = (Noise(entry=0.5).on_entry(rows) - rows).norm(dim=1) / rows.norm(dim=1)
    assert off.mean() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(Noise().on_entry(rows), rows) and torch.equal(Noise().on_tail(rows), rows)


def test_long_rows_are_shortened() -> None:
    """A row far longer than others would stand out through any noise that is scaled to the
    others.
    """
    rows = torch.ones(9, 16)
    rows[3] *= 100
    found = Noise(entry=1e-6, clip=2.0).on_entry(rows).norm(dim=1)
    assert found[3].item() == pytest.approx(2 * found[0].item(), rel=1e-3)


def test_tail_noise_covers_rows_without_label() -> None:
    """A zero gradient says "no label here"; with noise such rows have about the length of the
    others' noise.
    """
    grads = torch.randn(400, 64)
    grads[::2] = 0
    found = Noise(tail=1.0).on_tail(grads)[::2].norm(dim=1)
    assert found.mean() == pytest.approx(grads[1::2].norm(dim=1).median().item(), rel=0.05)


@pytest.mark.parametrize("which", ["entry", "tail"])
def test_noise_reaches_the_wire_and_training_goes_on(watched: Any, which: str) -> None:
    """Noise that is asked for changes what is sent and the gradients, and leaves them near what
    they were.
    """
    link, begins = watched
    model = make_split(link, lora(), edge_layers=(1, 0))
    (batch,) = batches()
    _, want = step(model, batch)
    sent = begins[-1].embeddings.data
    model.set_options(noise=Noise(**{which: 0.05}))
    _, got = step(model, batch)
    assert (begins[-1].embeddings.data != sent) == (which == "entry")
    assert 0.001 < (got - want).norm() / want.norm() < 0.5


@pytest.mark.parametrize("values", [{"entry": -1.0}, {"tail": float("nan")}, {"clip": 0.5}])
def test_values_that_cannot_work_are_refused(values: dict[str, float]) -> None:
    """Noise without sense is an error, not silence."""
    ((name, value),) = values.items()
    with pytest.raises(UsageError, match=f"noise {name}: got {value}, want"):
        Noise(**values)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"noise_entry": -1.0}, "noise entry: got -1.0, want 0 or more"),
        ({"noise_tail": float("nan")}, "noise tail: got nan"),
        ({"noise_clip": 0.5}, "noise clip: got 0.5, want 1 or more"),
        ({"edge_first": -1}, "edge layers: got the first -1 and the last 0, want 0 or more"),
        ({"edge_last": -2}, "edge layers: got the first 0 and the last -2, want 0 or more"),
    ],
)
def test_settings_refuse_them_before_there_is_a_server(
    tmp_path: Any, values: dict[str, float], error: str
) -> None:
    """A command with such a value stops at once, with the error that the library gives."""
    with pytest.raises(UsageError, match=error):
        TrainSettings(server="x:1", data="rows.jsonl", output=tmp_path, **values)


def test_options_are_given_at_construction_and_changed_in_one_way(watched: Any) -> None:
    """Noise that is assigned to the model, where nothing reads it, is an error and not silence."""
    link, _ = watched
    noise = Noise(tail=0.5)
    model = make_split(link, lora(), noise=noise, hide_lengths=True, head_positions="supervised")
    assert model.options.noise is noise and model.options.hide_lengths
    model.set_options(hide_lengths=False, wire_dtype="fp16")
    assert (model.options.hide_lengths, model.options.wire_dtype) == (False, "fp16")
    assert model.options.noise is noise and model.options.head_positions == "supervised"

    with pytest.raises(UsageError, match=r"noise is an option: call model.set_options\(noise"):
        model.noise = Noise()
    for wrong in ({"wire": "thin"}, {"wire_dtype": "fp8"}, {"head_positions": "few"}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong.values()))}"):
            model.set_options(**wrong)
    with pytest.raises(UsageError, match="loaded when the model is built"):
        model.set_options(edge_layers=(1, 0))


def test_command_line(
    watched: Any, tmp_path: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dlora train` with edge layers, noise and padding runs, and run.json says with which."""
    import json

    from dlora.cli.main import main
    from dlora.server.server import Server

    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": "the desk " * n, "completion": "of the"}) + "\n"
            for n in (1, 2, 3)
        )
    )
    with Server(watched[0].cloud, tokenizer, options=NO_DRAIN) as server:
        words = [
            "train",
            "--server",
            server.address,
            "--data",
            str(data),
            "--output",
            str(tmp_path / "run"),
        ]
        words += [
            "--edge_first",
            "1",
            "--edge_last",
            "1",
            "--noise_entry",
            "0.1",
            "--noise_tail",
            "0.1",
        ]
        words += ["--pad_to", "16", "--max_steps", "2", "--batch_size", "2"]
        assert main(words) == 0, capsys.readouterr().err
        assert (
            main(
                [
                    *words[:-4],
                    "--max_steps",
                    "2",
                    "--edge_first",
                    "2",
                    "--output",
                    str(tmp_path / "other"),
                ]
            )
            == 2
        )
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["edge_first"], settings["noise_tail"], settings["pad_to"]) == (1, 0.1, 16)
    assert all(begin.length % 16 == 0 for begin in watched[1][-2:])
