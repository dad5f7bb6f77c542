"""What protects text on its way out is there when a command was asked for it: every command on the
edge runs against a real server, and what leaves is compared with what leaves unprotected.

Shapes: N rows of a message, D width.
"""

from __future__ import annotations

import io
import json
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dlora.cli.main import main
from dlora.cloud.model import CloudModel, Limits
from dlora.edge.grpc_link import GrpcLink
from dlora.inference.api import ApiServer
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import decode
from dlora.server.server import Server

LAYERS = ("--edge_first", "1", "--edge_last", "1")
NOISE = ("--noise_entry", "0.02", "--noise_clip", "1")
PROMPT = "the desk of the message"


@pytest.fixture(scope="module")
def server(tokenizer: PreTrainedTokenizerFast) -> Iterator[Server]:
    """A server that lets edges have a layer at each end."""
    cloud = CloudModel(
        make_base("llama"), model_id="llama", limits=Limits(edge_first=1, edge_last=1)
    )
    with Server(cloud, tokenizer) as running:
        yield running


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[pb.EdgeFrame]:
    """Every frame that leaves this process while the test runs."""
    frames: list[pb.EdgeFrame] = []
    open_stream = GrpcLink.open

    def watched(self: GrpcLink) -> Any:
        stream = open_stream(self)
        send = stream.send

        def noted(frame: pb.EdgeFrame) -> None:
            copy = pb.EdgeFrame()
            copy.CopyFrom(frame)
            frames.append(copy)
            send(frame)

        stream.send = noted  # type: ignore[method-assign]
        return stream

    monkeypatch.setattr(GrpcLink, "open", watched)
    monkeypatch.setenv("DLORA_CACHE", str(tmp_path / "cache"))
    return frames


# ----------------------------------------------------------------- the commands


def generate(words: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """One answer to the prompt."""
    assert main(["generate", *words, "--prompt", PROMPT, "--max_new_tokens", "3"]) == 0


def chat(words: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """One turn of a chat."""
    patch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n/quit\n"))
    assert main(["chat", *words, "--temperature", "0", "--max_new_tokens", "3"]) == 0


def evaluate(words: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """The loss on one row."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT, "completion": " of the desk"}))
    assert main(["eval", *words, "--data", str(file)]) == 0


def api(words: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """One request to the API."""
    serve = ApiServer.run

    def asked_once(self: ApiServer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return serve(self)
        with self.running() as url:
            body = {"model": "llama", "prompt": PROMPT, "temperature": 0, "max_tokens": 3}
            request = urllib.request.Request(
                f"{url}/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            assert urllib.request.urlopen(request, timeout=60).status == 200

    patch.setattr(ApiServer, "run", asked_once)
    assert main(["api", *words, "--port", "0"]) == 0


def train(
    words: list[str],
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    lengths: tuple[int, ...] = (4, 4, 4),
) -> None:
    """One step on three rows."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "the desk " * length, "completion": " of the"} for length in lengths]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
    options = ["--data", str(file), "--output", str(output), "--report_to", "[]"]
    assert main(["train", *words, *options, "--max_steps", "1", "--batch_size", "3"]) == 0


def train_unequal(words: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """One step on rows that differ in length."""
    train(words, tmp_path, patch, lengths=(2, 3, 5))


ANSWERS = {"generate": generate, "chat": chat, "api": api}
COMMANDS = ANSWERS | {"eval": evaluate, "train": train, "train unequal": train_unequal}


@pytest.fixture
def left(
    server: Server, leaving: list[pb.EdgeFrame], tmp_path: Path
) -> Callable[..., list[pb.EdgeFrame]]:
    """What leaves when a command is given some flags."""

    def run(name: str, *flags: str) -> list[pb.EdgeFrame]:
        leaving.clear()
        words = ["--server", server.address, "--wire_dtype", "fp32", *flags]
        with pytest.MonkeyPatch.context() as patch:
            COMMANDS[name](words, tmp_path, patch)
        return list(leaving)

    return run


def entries(frames: list[pb.EdgeFrame]) -> list[Tensor]:
    """Rows [N, D] that went into the cloud, message by message."""
    kinds = (frame.WhichOneof("kind") for frame in frames)
    messages = [
        getattr(frame, kind).embeddings
        for frame, kind in zip(frames, kinds, strict=True)
        if kind in ("begin", "extend")
    ]
    return [decode(one, tuple(one.shape), "rows") for one in messages]


def off(got_ND: Tensor, want_ND: Tensor) -> Tensor:
    """How far rows are from what they were, as shares of their length [N]."""
    return (got_ND - want_ND).norm(dim=1) / want_ND.norm(dim=1)


# ----------------------------------------------------------------- what leaves


@pytest.mark.parametrize("name", [*ANSWERS, "eval", "train"])
def test_layers_and_noise_are_on_the_way_out(left: Any, name: str) -> None:
    """A command that is told to hold layers and to add noise sends hidden states in place of
    embeddings, shortened and noisy.
    """
    table = make_base("llama").get_input_embeddings().weight.detach()
    bare, layers, both = left(name), left(name, *LAYERS), left(name, *LAYERS, *NOISE)
    begins = [[f.begin for f in frames if f.HasField("begin")] for frames in (bare, layers, both)]
    assert {(b.edge_first, b.edge_last) for b in begins[0]} == {(0, 0)}
    assert {(b.edge_first, b.edge_last) for b in begins[1] + begins[2]} == {(1, 1)}

    # Unprotected, a row is an entry of the table: who sees it has the token.
    nearest = [torch.cdist(entries(frames)[0], table).amin(dim=1) for frames in (bare, layers)]
    assert nearest[0].max() < 1e-3 < 0.1 < nearest[1].min()

    want_ND, got_ND = entries(layers)[0], entries(both)[0]
    lengths_N = want_ND.norm(dim=1, keepdim=True)
    assert lengths_N.max() > 1.1 * lengths_N.median(), "or clipping would not show"
    clipped_ND = want_ND * (lengths_N.median() / lengths_N).clamp(max=1.0)
    assert off(got_ND, clipped_ND).min() > 0.01 and off(got_ND, clipped_ND).max() < 0.04


@pytest.mark.parametrize("name", ANSWERS)
def test_noise_is_on_every_later_token(left: Any, name: str) -> None:
    """An answer's own tokens leave one by one, each with noise; without, they are in the table."""
    table = make_base("llama").get_input_embeddings().weight.detach()
    bare, noisy = (
        [torch.cdist(rows_ND, table).amin() for rows_ND in entries(left(name, *noise))[1:]]
        for noise in ((), ("--noise_entry", "0.3"))
    )
    assert len(bare) > 1 and max(bare) < 1e-3 and min(noisy) > 0.05


def test_noise_on_the_tail_is_on_the_way_out(left: Any) -> None:
    """`train --noise_tail` sends the same hidden states and other gradients, also for rows that
    have no label.
    """
    plain, noisy = (left("train", *LAYERS, *tail) for tail in ((), ("--noise_tail", "0.5")))
    assert torch.equal(entries(plain)[0], entries(noisy)[0])
    grads = [
        next(f.hidden_grad.grad for f in frames if f.HasField("hidden_grad"))
        for frames in (plain, noisy)
    ]
    want_ND, got_ND = (decode(grad, tuple(grad.shape), "gradient") for grad in grads)
    lengths_N = want_ND.norm(dim=1)
    typical = lengths_N[lengths_N > 0].median()
    usual_N = lengths_N < 3 * typical  # longer ones are shortened as well
    noise_N = (got_ND - want_ND).norm(dim=1)[usual_N] / typical
    assert noise_N.min() > 0.3 and noise_N.mean().item() == pytest.approx(0.5, rel=0.2)


def test_padding_is_on_the_way_out(left: Any) -> None:
    """`train --pad_to` sends rows of one length, without a mask, and asks for every position."""
    (plain, *_), (padded, *_) = (left("train unequal", *pad) for pad in ((), ("--pad_to", "16")))
    assert 0 in plain.begin.attention_mask and len(plain.begin.keep) < plain.begin.length * 3
    begin = padded.begin
    assert begin.length % 16 == 0 and begin.length != plain.begin.length
    assert not begin.attention_mask
    assert list(begin.keep) == list(range(begin.batch * begin.length))
    assert begin.embeddings.shape[0] == begin.batch * begin.length
