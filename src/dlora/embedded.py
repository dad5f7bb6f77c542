"""Cloud and edge in one process, for notebooks, sweeps and tests: the same frames, in queues."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.description import read_description
from dlora.edge.link import shown
from dlora.errors import DLoRAError, PeerError, PeerLost, clear_frames
from dlora.files import ScratchFolder
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.files import edge_weights, write_edge_files
from dlora.protocol.layer_files import write_layer_files
from dlora.trial import try_model

__all__ = ["InProcessLink", "in_process", "try_in_process"]


class InProcessLink:
    """A `Link` to a `CloudModel` of this process: its frames are those that would travel."""

    def __init__(self, cloud: CloudModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.cloud = cloud
        self.address = "in process"
        self.description = read_description(cloud.describe().SerializeToString(), self.address)
        self._tokenizer = tokenizer
        self._files: ScratchFolder | None = None
        self._layers: ScratchFolder | None = None

    __repr__ = shown

    def __deepcopy__(self, memo: object) -> InProcessLink:
        """Copies of a model share its link."""
        return self

    def open(self) -> _QueueStream:
        """Start a micro-batch on a thread of its own."""
        stream = _QueueStream()
        # A daemon: a loss that never sees its backward must not keep the interpreter from ending.
        threading.Thread(
            target=stream.serve, args=(self.cloud,), name="dlora-cloud", daemon=True
        ).start()
        return stream

    def put_adapter(self, modules: Sequence[pb.FrozenModule]) -> None:
        """Give the cloud frozen modules to apply."""
        self.cloud.put_adapter(
            pb.PutAdapterRequest(fingerprint=self.description.fingerprint, modules=modules)
        )

    def ping(self) -> None:
        """Nothing is in between."""

    def edge_weights(self) -> dict[str, Tensor]:
        """Embedding, head, and what else the edge runs, in the cloud's own memory."""
        return edge_weights(self.cloud.model, self.cloud.called_outside)

    def generation_config(self) -> GenerationConfig | None:
        """A copy of the model's."""
        return copy.deepcopy(self.cloud.model.generation_config)

    def edge_files(self) -> Path:
        """The folder with embedding, head and tokenizer; written on first use."""
        if self._files is None:
            self._files = ScratchFolder("dlora-edge-")
            cloud, folder = self.cloud, Path(self._files.name)
            write_edge_files(cloud.model, self._tokenizer, folder, cloud.called_outside)
        return Path(self._files.name)

    def layer_files(self, names: Sequence[str]) -> Path:
        """The folder with all layers that the edge may run; written on first use."""
        if self._layers is None:
            self._layers = ScratchFolder("dlora-layers-")
            model, limits, folder = self.cloud.model, self.cloud.limits, Path(self._layers.name)
            write_layer_files(model, limits.edge_first, limits.edge_last, folder)
        return Path(self._layers.name)

    def close(self) -> None:
        """Remove the folders."""
        for folder in (self._files, self._layers):
            if folder is not None:
                folder.cleanup()


class _QueueStream:
    """Both ends of one stream: the edge's `Stream`, and in `serve` the cloud's `Pipe`."""

    def __init__(self) -> None:
        self.to_cloud: queue.SimpleQueue[pb.EdgeFrame | None] = queue.SimpleQueue()
        self.to_edge: queue.SimpleQueue[pb.CloudFrame | DLoRAError | BaseException] = (
            queue.SimpleQueue()
        )

    def send(self, frame: pb.EdgeFrame) -> None:
        self.to_cloud.put(frame)

    def receive(self) -> pb.CloudFrame:
        frame = self.to_edge.get()
        if isinstance(frame, DLoRAError) and not isinstance(frame, PeerLost):
            raise PeerError(str(frame)) from frame
        if isinstance(frame, BaseException):
            raise frame
        return frame

    def close(self) -> None:
        self.to_cloud.put(None)

    def serve(self, cloud: CloudModel) -> None:
        """Check and compute what the edge sends; its thread gets whatever is raised."""
        pipe = _CloudEnd(self)
        try:
            cloud.run(cloud.check(pipe.receive().begin), pipe)
        except BaseException as error:  # the edge's thread raises it
            clear_frames(error)
            self.to_edge.put(error)


class _CloudEnd:
    """The cloud's `Pipe` to a stream."""

    def __init__(self, stream: _QueueStream) -> None:
        self.stream = stream

    def admit(self, cost_bytes: int) -> None:
        """One process, one user: whatever was within the limits is admitted."""

    def breathe(self) -> float:
        """One process, one user: nobody waits."""
        return 0.0

    def expect(self, frames: int) -> None:
        """All frames come at once."""

    def send(self, frame: pb.CloudFrame) -> None:
        self.stream.to_edge.put(frame)

    def receive(self) -> pb.EdgeFrame:
        frame = self.stream.to_cloud.get()
        if frame is None:
            raise PeerLost("the edge closed the stream")
        return frame


def in_process(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    model_id: str | None = None,
    limits: Limits | None = None,
) -> InProcessLink:
    """Use a loaded transformers model as the cloud, in this process, in place of `connect`.

    Raises ModelError for a model that cannot be split, or that an edge would get wrong.
    """
    cloud = CloudModel(model, model_id=model_id or model.name_or_path, limits=limits)
    try_in_process(cloud)
    return InProcessLink(cloud, tokenizer)


def try_in_process(cloud: CloudModel) -> None:
    """Let an edge in this process train on the model and generate. Raises ModelError."""
    try_model(cloud, InProcessLink)
