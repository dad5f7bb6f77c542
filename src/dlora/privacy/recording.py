"""What the cloud sees of training micro-batches: recorded on the edge, with the truth that only the
edge knows.

recording/0000.edge, 0000.cloud      frames in each direction, length-delimited protobuf
recording/0000.safetensors           input_ids, attention_mask, labels, and A and scaled B of every
module recording/0000.json                  fingerprint, loss, where each module sits; written last

For `dlora audit`. The truth is private data: folder and files are open to their user alone.

Shapes: B batch, T tokens, N rows that travel (attended tokens), K kept rows, D width.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import torch
from google.protobuf.message import DecodeError
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.labels import IGNORE
from dlora.edge.link import Link, Stream
from dlora.edge.lora import product_of
from dlora.edge.model import SplitModel
from dlora.errors import UsageError, WireError
from dlora.files import write_private
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.wire import decode, unpack_mask

__all__ = ["CloudView", "Module", "Recorder", "Recording", "RecordingLink", "SiteView", "Truth"]

_FORMAT: Final = 1


# ----------------------------------------------------------------- what the cloud sees


class SiteView:
    """One site of one micro-batch; tensors are float32, decoded when they are asked for."""

    def __init__(self, modules: tuple[int, ...]) -> None:
        self.modules = modules
        self._input = pb.SiteInput()
        self._deltas = pb.SiteDeltas()
        self._delta_grads = pb.DeltaGrads()
        self._input_grad: pb.InputGrad | None = None

    @property
    def x(self) -> Tensor:
        """Input of the site, [N, in]."""
        return _matrix(self._input.x)

    @property
    def deltas(self) -> list[Tensor]:
        """Of each active module [N, out]; factored: Z [N, r]."""
        return [_matrix(one) for one in self._deltas.deltas]

    @property
    def factors(self) -> list[Tensor]:
        """Factored: scaled B [out, r] of each active module."""
        return [_matrix(one) for one in self._deltas.factors]

    @property
    def delta_grads(self) -> list[Tensor]:
        """Gradients of `deltas`."""
        return [_matrix(one) for one in self._delta_grads.grads]

    @property
    def input_grad(self) -> Tensor | None:
        """dx [N, in] that the edge adds; None at the lowest site."""
        return None if self._input_grad is None else _matrix(self._input_grad.grad)


class CloudView:
    """What the cloud sees of one training micro-batch: every frame in both directions, by place.

    entry: the rows of `Begin`. A site: `SiteView`. exit: the rows of `Hidden`, and their gradient.
    Raises WireError for frames that are not those of one whole micro-batch.
    """

    def __init__(self, edge: Sequence[pb.EdgeFrame], cloud: Sequence[pb.CloudFrame]) -> None:
        if (
            not edge
            or edge[0].WhichOneof("kind") != "begin"
            or not cloud
            or cloud[-1].WhichOneof("kind") != "done"
        ):
            raise WireError("the frames are not those of a whole micro-batch, from begin to done")
        self.begin = edge[0].begin
        self.sites = {one.site: SiteView(tuple(one.modules)) for one in self.begin.sites}
        self._hidden, self._hidden_grad = pb.Tensor(), pb.Tensor()
        for frame in edge[1:]:
            if (kind := frame.WhichOneof("kind")) == "deltas":
                self._site(frame.deltas.site)._deltas = frame.deltas
            elif kind == "input_grad":
                self._site(frame.input_grad.site)._input_grad = frame.input_grad
            elif kind == "hidden_grad":
                self._hidden_grad = frame.hidden_grad.grad
        for reply in cloud:
            if (kind := reply.WhichOneof("kind")) == "input":
                self._site(reply.input.site)._input = reply.input
            elif kind == "delta_grads":
                self._site(reply.delta_grads.site)._delta_grads = reply.delta_grads
            elif kind == "hidden":
                self._hidden = reply.hidden.hidden
        batch, length = self.begin.batch, self.begin.length
        mask_BT = unpack_mask(self.begin.attention_mask, batch, length)
        self.attended_BT = (
            torch.ones(batch, length, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        )
        whole = torch.ones_like(self.attended_BT) if self.begin.dense else self.attended_BT
        self.positions = whole.reshape(-1).nonzero()[:, 0]
        """Flat position b * T + t of each row that travels, [N]."""
        self.keep = torch.tensor(list(self.begin.keep), dtype=torch.int64)
        """The same of each kept row, [K]."""
        if len(self.entry) != len(self.positions) or len(self.exit) != len(self.keep):
            raise WireError(
                f"{len(self.entry)} rows for {len(self.positions)} tokens, {len(self.exit)} kept"
            )

    def _site(self, index: int) -> SiteView:
        if index not in self.sites:
            raise WireError(f"a frame for site {index}, which is not active")
        return self.sites[index]

    @property
    def entry(self) -> Tensor:
        """What enters the cloud's layers, [N, D]."""
        return _matrix(self.begin.embeddings)

    @property
    def exit(self) -> Tensor:
        """What leaves the cloud's layers, [K, D]."""
        return _matrix(self._hidden)

    @property
    def exit_grad(self) -> Tensor:
        """Its gradient, [K, D]."""
        return _matrix(self._hidden_grad)


def _matrix(message: pb.Tensor) -> Tensor:
    if len(message.shape) != 2:
        raise WireError(f"got shape {list(message.shape)[:8]}, want two dimensions")
    return decode(message, list(message.shape), "a recorded tensor")


# ----------------------------------------------------------------- recording


class RecordingLink:
    """A `Link` that hands every whole micro-batch to `keep`, as `CloudView`'s frames: those of
    training, or the others.

    Frames of one micro-batch are held in memory until it is done. One that was cut is left out: it
    runs again.
    """

    def __init__(
        self,
        link: Link,
        keep: Callable[[list[pb.EdgeFrame], list[pb.CloudFrame]], None],
        wanted: Callable[[], bool] = lambda: True,
        *,
        training: bool = True,
    ) -> None:
        self.link, self.keep, self.wanted, self.training = link, keep, wanted, training
        self.description = link.description

    @property
    def address(self) -> str:
        """Where the cloud is."""
        return self.link.address

    def open(self) -> Stream:
        """Start a micro-batch, recorded if it is wanted."""
        stream = self.link.open()
        return _RecordingStream(stream, self.keep, self.training) if self.wanted() else stream

    def put_adapter(self, modules: Sequence[pb.FrozenModule]) -> None:
        """Hand it on."""
        self.link.put_adapter(modules)

    def ping(self) -> None:
        """Hand it on."""
        self.link.ping()

    def edge_files(self) -> Path:
        """Hand it on."""
        return self.link.edge_files()

    def layer_files(self, names: Sequence[str]) -> Path:
        """Hand it on."""
        return self.link.layer_files(names)

    def close(self) -> None:
        """Hand it on."""
        self.link.close()


class _RecordingStream:
    def __init__(
        self,
        stream: Stream,
        keep: Callable[[list[pb.EdgeFrame], list[pb.CloudFrame]], None],
        training: bool,
    ) -> None:
        self.stream, self.keep, self.training = stream, keep, training
        self.edge: list[pb.EdgeFrame] = []
        self.cloud: list[pb.CloudFrame] = []
        self.wanted = False

    def send(self, frame: pb.EdgeFrame) -> None:
        if frame.WhichOneof("kind") == "begin":
            self.wanted = frame.begin.training == self.training and not frame.begin.cache_length
        if self.wanted:
            self.edge.append(frame)
        self.stream.send(frame)

    def receive(self) -> pb.CloudFrame:
        frame = self.stream.receive()
        if self.wanted:
            self.cloud.append(frame)
            if frame.WhichOneof("kind") == "done":
                self.keep(self.edge, self.cloud)
        return frame

    def close(self) -> None:
        self.edge, self.cloud = [], []
        self.stream.close()


@dataclass(frozen=True, kw_only=True)
class Module:
    """One adapted module, as the edge had it before the step."""

    name: str
    site: int
    module: int
    """Index into the site's modules."""
    A: Tensor
    """[r, in]"""
    B: Tensor
    """[out, r], scaled: the module adds x A^T B^T."""


@dataclass(kw_only=True)
class Truth:
    """What only the edge knows of a micro-batch."""

    input_ids: Tensor
    """[B, T]"""
    attention_mask: Tensor
    """[B, T]"""
    labels: Tensor
    """[B, T]; -100: no supervision."""
    modules: list[Module] = field(default_factory=list)
    loss: float | None = None
    """Mean over the supervised tokens, in nats."""

    @property
    def next_labels(self) -> Tensor:
        """The label that the hidden state at each position is to predict, [B, T]."""
        nothing = self.labels.new_full((len(self.labels), 1), IGNORE)
        return torch.cat([self.labels[:, 1:], nothing], dim=1)


class Recorder:
    """Writes the first `count` training micro-batches of a run into a folder.

    `link` goes between the model and its server, then `watch` the model. Where a run is resumed
    `number` is to be set to the micro-batches that its checkpoint has seen: those that it repeats
    are written once more, over the same files.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.number = 0
        """Micro-batches of the run so far."""
        self.truth: Truth | None = None
        self.fingerprint = ""

    @property
    def active(self) -> bool:
        """There is more to record."""
        return self.number < self.count

    def link(self, link: Link) -> RecordingLink:
        """The link for the model."""
        self.fingerprint = link.description.fingerprint
        return RecordingLink(link, self._write, lambda: self.active)

    def watch(self, model: SplitModel) -> None:
        """Make the folder, and note the truth of every training micro-batch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)

        def before(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self.truth = None
            ids, labels = kwargs.get("input_ids"), kwargs.get("labels")
            if (
                self.active
                and model.training
                and torch.is_grad_enabled()
                and ids is not None
                and labels is not None
            ):
                mask = kwargs.get("attention_mask")
                self.truth = Truth(
                    input_ids=ids.detach().cpu().clone(),
                    attention_mask=(torch.ones_like(ids) if mask is None else mask)
                    .detach()
                    .cpu()
                    .clone(),
                    labels=labels.detach().cpu().clone(),
                    modules=list(_modules(model)),
                )

        def after(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            loss = getattr(output, "loss", None)
            if self.truth is not None and loss is not None:
                supervised = int((self.truth.next_labels != IGNORE).sum())
                items = kwargs.get(
                    "num_items_in_batch"
                )  # with accumulation the trainer divides by all of them
                self.truth.loss = float(loss.detach()) * (
                    1.0 if items is None else float(items) / max(1, supervised)
                )

        # Before the model's own hook, which gathers the labels.
        model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        model.register_forward_hook(after, with_kwargs=True)

    def _write(self, edge: list[pb.EdgeFrame], cloud: list[pb.CloudFrame]) -> None:
        truth, self.truth = self.truth, None
        if truth is None:
            return
        stem = f"{self.number:04d}"
        frame_files: list[tuple[str, Sequence[Any]]] = [("edge", edge), ("cloud", cloud)]
        for suffix, frames in frame_files:
            out = io.BytesIO()
            for frame in frames:
                serialize_length_prefixed(frame, out)
            write_private(self.folder / f"{stem}.{suffix}", out.getvalue())
        tensors = {
            name: getattr(truth, name).contiguous()
            for name in ("input_ids", "attention_mask", "labels")
        }
        for one in truth.modules:
            tensors |= {f"A.{one.name}": one.A.contiguous(), f"B.{one.name}": one.B.contiguous()}
        write_private(self.folder / f"{stem}.safetensors", save(tensors))
        record = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "loss": truth.loss,
            "modules": [
                {"name": one.name, "site": one.site, "module": one.module} for one in truth.modules
            ],
        }
        write_private(self.folder / f"{stem}.json", json.dumps(record).encode())
        self.number += 1


def _modules(model: SplitModel) -> Iterator[Module]:
    """Copies of all LoRA modules that are exchanged; several active adapters of a layer as their
    sum.
    """
    if isinstance(model.peft_config["default"], BottleneckConfig):
        return  # not linear: there is no product to solve for
    for site in model.sites:
        for name, index, layer in zip(site.names, site.modules, site.layers, strict=True):
            active = [one for one in layer.active_adapters if one in layer.lora_A]
            if active and not layer.disable_adapters:
                a, b = product_of(layer)
                yield Module(
                    name=name, site=site.index, module=index, A=a.cpu().clone(), B=b.cpu().clone()
                )


# ----------------------------------------------------------------- reading


class Recording:
    """A folder that a `Recorder` wrote. Raises UsageError if there is none, or if it cannot be
    read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stems = sorted(file.stem for file in folder.glob("*.json"))
        if not self.stems:
            raise UsageError(
                f"{folder} holds no recording: make one with `dlora train --record 24 ...`"
            )

    def __len__(self) -> int:
        return len(self.stems)

    def sites(self, number: int) -> dict[int, tuple[int, ...]]:
        """Active modules of each active site of one micro-batch. Reads no more than its first
        frame.
        """
        file = self.folder / f"{self.stems[number]}.edge"
        try:
            with file.open("rb") as stream:
                begin = parse_length_prefixed(pb.EdgeFrame, cast(io.BytesIO, stream))
        except (OSError, ValueError, DecodeError) as error:
            raise UsageError(f"{file} cannot be read: {error}") from error
        return {} if begin is None else {one.site: tuple(one.modules) for one in begin.begin.sites}

    def read(self, number: int) -> tuple[CloudView, Truth, str]:
        """One micro-batch: what the cloud saw, the truth, and the fingerprint of the model."""
        stem = self.folder / self.stems[number]
        try:
            record = json.loads(stem.with_suffix(".json").read_bytes())
            if not isinstance(record, dict) or record.get("format") != _FORMAT:
                raise WireError(f"want format {_FORMAT}")
            edge = list(_frames(stem.with_suffix(".edge").read_bytes(), pb.EdgeFrame))
            cloud = list(_frames(stem.with_suffix(".cloud").read_bytes(), pb.CloudFrame))
            tensors = load(stem.with_suffix(".safetensors").read_bytes())
            truth = Truth(
                **{name: tensors[name] for name in ("input_ids", "attention_mask", "labels")},
                loss=record["loss"],
                modules=[
                    Module(**one, A=tensors[f"A.{one['name']}"], B=tensors[f"B.{one['name']}"])
                    for one in record["modules"]
                ],
            )
            view = CloudView(edge, cloud)
            if truth.input_ids.shape != view.attended_BT.shape:
                raise WireError(
                    f"{list(truth.input_ids.shape)} ids for {list(view.attended_BT.shape)} tokens"
                )
        except (OSError, ValueError, KeyError, TypeError, DecodeError, SafetensorError) as error:
            raise UsageError(
                f"{stem}: this part of the recording cannot be read: {error}"
            ) from error
        return view, truth, str(record.get("fingerprint"))


def _frames(data: bytes, kind: Any) -> Iterator[Any]:
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        yield parse_length_prefixed(kind, stream)
