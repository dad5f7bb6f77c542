"""Recordings of training micro-batches: what crosses the wire, with what only the edge knows.

    recording/0000.edge, 0000.cloud     frames in each direction, length-delimited protobuf
    recording/0000.safetensors          input_ids, attention_mask, labels; A and scaled B of modules
    recording/0000.json                 fingerprint, loss, where each module sits; written last

`dlora train --record` writes them, `dlora audit` reads them. The truth is private data: folder and
files are open to their user alone.

On the way there: a `RecordingLink` between model and server collects the frames of a micro-batch.
Hooks on the model note the truth of the same micro-batch. When the cloud is done a `Recorder`
writes both; a `Recording` reads them back. Between its forward and its backward other passes may
run, as those of a reference do under DPO: the truth is kept with the first frame that it is of.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import hashlib
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
from dlora.privacy.cloud_view import CloudView
from dlora.proto import dlora_pb2 as pb
from dlora.runs import RunFolder

__all__ = ["Module", "Recorder", "Recording", "RecordingLink", "Truth"]

_FORMAT: Final = 1
_TOKENS: Final = ("input_ids", "attention_mask", "labels")
_MOST_BEGUN: Final = 16
"""Micro-batches between forward and backward whose truth is kept: those that never come to a
backward would stay for ever."""

Keep = Callable[[list[pb.EdgeFrame], list[pb.CloudFrame]], None]
"""What is called with the frames of a whole micro-batch, of the edge and of the cloud."""


# ----------------------------------------------------------------- frames


class RecordingLink:
    """A `Link` that hands the frames of every whole micro-batch to `keep`.

    With `training` those of training, else those of forward passes alone. Frames stay in memory
    until their micro-batch is done. A micro-batch that was cut is left out: it runs again.
    """

    def __init__(
        self,
        link: Link,
        keep: Keep,
        wanted: Callable[[], bool] = lambda: True,
        *,
        training: bool = True,
        begun: Callable[[pb.Begin], None] = lambda _: None,
    ) -> None:
        """`begun` is called with the first frame of each, also where it runs again."""
        self.link, self.keep, self.wanted, self.training = link, keep, wanted, training
        self.begun = begun
        self.description = link.description

    @property
    def address(self) -> str:
        """Where the cloud is."""
        return self.link.address

    def open(self) -> Stream:
        """Start a micro-batch, recorded if it is wanted."""
        stream = self.link.open()
        return _RecordingStream(stream, self) if self.wanted() else stream

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
    """A stream of which `keep` gets all frames, once the cloud is done."""

    def __init__(self, stream: Stream, link: RecordingLink) -> None:
        self.stream, self.link = stream, link
        self.edge: list[pb.EdgeFrame] = []
        self.cloud: list[pb.CloudFrame] = []
        self.wanted = False

    def send(self, frame: pb.EdgeFrame) -> None:
        if frame.WhichOneof("kind") == "begin":
            begin = frame.begin
            self.wanted = begin.training == self.link.training and not begin.cache_length
            if self.wanted:
                self.link.begun(begin)
        if self.wanted:
            self.edge.append(frame)
        self.stream.send(frame)

    def receive(self) -> pb.CloudFrame:
        frame = self.stream.receive()
        if self.wanted:
            self.cloud.append(frame)
            if frame.WhichOneof("kind") == "done":
                self.link.keep(self.edge, self.cloud)
        return frame

    def close(self) -> None:
        self.edge, self.cloud = [], []
        self.stream.close()


# ----------------------------------------------------------------- truth


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

    @property
    def supervised(self) -> Tensor:
        """Mask of the positions whose hidden state has a label to predict, [B, T]."""
        return self.next_labels != IGNORE


# ----------------------------------------------------------------- writing


class Recorder:
    """Writes the first `count` training micro-batches of a run into a folder.

    `link` goes between the model and its server, then `watch` the model: whatever trains it, trl's
    preference trainers too. Where a run is resumed, set `number` to the micro-batches that its
    checkpoint has seen: those that the run repeats are written once more, over the same files.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.number = 0
        """Micro-batches of the run until now."""
        self.fingerprint = ""
        self._noted: Truth | None = None
        """Of a forward call whose micro-batch has not begun yet."""
        self._called: Truth | None = None
        """Of the newest forward call, for its loss."""
        self._begun: dict[bytes, Truth] = {}
        """By what a micro-batch begins with, the newest last."""

    @property
    def active(self) -> bool:
        """There is more to record."""
        return self.number < self.count

    @property
    def written(self) -> int:
        """Micro-batches that are in the folder."""
        return len(list(self.folder.glob("[0-9]*.json")))

    def link(self, link: Link) -> RecordingLink:
        """The link for the model."""
        self.fingerprint = link.description.fingerprint
        return RecordingLink(link, self._write, lambda: self.active, begun=self._begin)

    def watch(self, model: SplitModel) -> None:
        """Make the folder, and note the truth of every training micro-batch.

        Where the run has no run.json, as with a trainer of your own, it gets one with what an audit
        wants to know. Raises UsageError for a model over another link, and for one that does not
        send micro-batches whole.
        """
        if not isinstance(model.link, RecordingLink):
            raise UsageError("record: build the model over `recorder.link(link)`, then watch it")
        if model.options.in_flight != 1 or model.options.cache_prefix:
            raise UsageError("record keeps whole micro-batches: in_flight 1, and no cache_prefix")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        _write_settings(self.folder, model)

        # Before the model's own hook, which gathers the labels.
        model.register_forward_pre_hook(self._note_truth, with_kwargs=True, prepend=True)
        model.register_forward_hook(self._note_loss, with_kwargs=True)

    def _note_truth(
        self, model: SplitModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._noted = self._called = None
        ids = kwargs.get("input_ids", args[0] if args else None)
        training = model.training and torch.is_grad_enabled()
        if not self.active or not training or ids is None:
            return

        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        self._noted = self._called = Truth(
            input_ids=_copy(ids),
            attention_mask=_copy(torch.ones_like(ids) if mask is None else mask),
            labels=_copy(torch.full_like(ids, IGNORE) if labels is None else labels),
            modules=list(_modules(model)),
        )

    def _begin(self, begin: pb.Begin) -> None:
        """Keep what was noted, by what the micro-batch sends if it runs again, too."""
        truth, self._noted = self._noted, None
        if truth is not None:
            self._begun[_name(begin)] = truth
        while len(self._begun) > _MOST_BEGUN:
            del self._begun[next(iter(self._begun))]

    def _note_loss(
        self, model: SplitModel, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        truth, loss = self._called, getattr(output, "loss", None)
        if truth is None or loss is None:
            return

        # With accumulation the trainer divides by the labels of all micro-batches of a step.
        items = kwargs.get("num_items_in_batch")
        own = max(1, int(truth.supervised.sum()))
        truth.loss = float(loss.detach()) * (1.0 if items is None else float(items) / own)

    def _write(self, edge: list[pb.EdgeFrame], cloud: list[pb.CloudFrame]) -> None:
        """Write what was seen and noted; nothing if no truth was."""
        truth = self._begun.pop(_name(edge[0].begin), None)
        if truth is None or not self.active:
            return
        if not truth.supervised.any():
            truth.labels = _learned_labels(truth.input_ids, CloudView(edge, cloud))
        stem = f"{self.number:04d}"

        frame_files: list[tuple[str, Sequence[Any]]] = [("edge", edge), ("cloud", cloud)]
        for suffix, frames in frame_files:
            out = io.BytesIO()
            for frame in frames:
                serialize_length_prefixed(frame, out)
            write_private(self.folder / f"{stem}.{suffix}", out.getvalue())

        tensors = {name: getattr(truth, name).contiguous() for name in _TOKENS}
        for one in truth.modules:
            tensors |= {f"A.{one.name}": one.A.contiguous(), f"B.{one.name}": one.B.contiguous()}
        write_private(self.folder / f"{stem}.safetensors", save(tensors))

        # Last: a micro-batch without this file is unfinished, and is not read.
        manifest = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "loss": truth.loss,
            "modules": [
                {"name": one.name, "site": one.site, "module": one.module} for one in truth.modules
            ],
        }
        write_private(self.folder / f"{stem}.json", json.dumps(manifest).encode())
        self.number += 1


def _write_settings(folder: Path, model: SplitModel) -> None:
    run, noise = RunFolder(folder.parent), model.options.noise
    if run.recording == folder and not run.run_file.exists():
        values = {"noise_entry": noise.entry, "noise_tail": noise.tail, "noise_clip": noise.clip}
        run.write({"settings": values})


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _name(begin: pb.Begin) -> bytes:
    """What tells micro-batches apart; of one that runs again it is the same."""
    parts = begin.embeddings.data, begin.attention_mask, bytes(str(list(begin.keep)), "ascii")
    return hashlib.blake2b(b"".join(map(_digest, parts))).digest()


def _digest(part: bytes) -> bytes:
    return hashlib.blake2b(part).digest()


def _learned_labels(ids_BT: Tensor, view: CloudView) -> Tensor:
    """The labels of a trainer that hands none to the model, as trl's on-policy ones do, [B, T].

    They score the token behind a hidden state, so that token is the label where the state gets a
    gradient.
    """
    learned_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    learned_BT.view(-1)[view.keep] = view.exit_grad.any(1)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    labels_BT[:, 1:] = ids_BT[:, 1:].masked_fill(~learned_BT[:, :-1], IGNORE)
    return labels_BT


def _modules(model: SplitModel) -> Iterator[Module]:
    """Copies of all LoRA modules that are exchanged; several active adapters of a layer summed."""
    if isinstance(model.peft_config["default"], BottleneckConfig):
        return  # not linear: there is no product to solve for
    for site in model.sites:
        if site.is_fused:
            continue  # the hosted wire hands A and B over: there is nothing to solve for
        for name, index, layer in zip(site.names, site.modules, site.layers, strict=True):
            active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
            if active and not layer.disable_adapters:
                a, b = product_of(layer)
                yield Module(name=name, site=site.index, module=index, A=_copy(a), B=_copy(b))


# ----------------------------------------------------------------- reading


class Recording:
    """A folder that a `Recorder` wrote. Raises UsageError if it holds nothing that can be read."""

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
        """Active modules of each site of one micro-batch that was asked for; hosted: of none.

        Reads its first frame alone.
        """
        file = self.folder / f"{self.stems[number]}.edge"
        try:
            with file.open("rb") as stream:
                frame = parse_length_prefixed(pb.EdgeFrame, cast(io.BytesIO, stream))
        except (OSError, ValueError, DecodeError) as error:
            raise UsageError(f"{file} cannot be read: {error}") from error
        if frame is None or frame.begin.hosted:
            return {}
        return {one.site: tuple(one.modules) for one in frame.begin.sites}

    def read(self, number: int) -> tuple[CloudView, Truth, str]:
        """One micro-batch: what the cloud saw, the truth, and the fingerprint of the model."""
        stem = self.folder / self.stems[number]
        try:
            manifest = json.loads(stem.with_suffix(".json").read_bytes())
            if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
                raise WireError(f"want format {_FORMAT}")

            edge = list(_frames(stem.with_suffix(".edge").read_bytes(), pb.EdgeFrame))
            cloud = list(_frames(stem.with_suffix(".cloud").read_bytes(), pb.CloudFrame))
            view = CloudView(edge, cloud)

            truth = _truth(manifest, load(stem.with_suffix(".safetensors").read_bytes()))
            got, want = list(truth.input_ids.shape), list(view.attended_BT.shape)
            if got != want:
                raise WireError(f"{got} ids for {want} tokens")
        except (OSError, ValueError, KeyError, TypeError, DecodeError, SafetensorError) as error:
            raise UsageError(
                f"{stem}: this part of the recording cannot be read: {error}"
            ) from error
        return view, truth, str(manifest.get("fingerprint"))


def _truth(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Truth:
    return Truth(
        **{name: tensors[name] for name in _TOKENS},
        loss=manifest["loss"],
        modules=[
            Module(**one, A=tensors[f"A.{one['name']}"], B=tensors[f"B.{one['name']}"])
            for one in manifest["modules"]
        ],
    )


def _frames(data: bytes, kind: Any) -> Iterator[Any]:
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        yield parse_length_prefixed(kind, stream)
