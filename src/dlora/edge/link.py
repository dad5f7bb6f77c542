"""How an edge reaches a cloud: what every transport offers, and when to try again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from dlora.errors import PeerLost
from dlora.proto import dlora_pb2 as pb

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig

__all__ = ["Link", "Outage", "RetryPolicy", "SharesWeights", "Stream", "is_back", "shown"]

log = logging.getLogger(__name__)

# Not the global generator: its state is in checkpoints, and a pause must not change what it draws.
_JITTER: Final = random.Random()


class Stream(Protocol):
    """One micro-batch's frames, in order."""

    def send(self, frame: pb.EdgeFrame) -> None:
        """Queue a frame for the cloud."""

    def receive(self) -> pb.CloudFrame:
        """Wait for the next frame. Raises PeerLost (try again) or PeerError (do not)."""

    def close(self) -> None:
        """End the stream, finished or not. Never raises; may be called twice."""


class Link(Protocol):
    """A cloud within reach: over gRPC or in this process."""

    description: pb.Description

    @property
    def address(self) -> str:
        """Where the cloud is, for messages."""

    def open(self) -> Stream:
        """Start a micro-batch."""

    def put_adapter(self, modules: Sequence[pb.FrozenModule]) -> None:
        """Let the cloud hold frozen modules, for streams that refer to them by hash."""

    def ping(self) -> None:
        """A call that does nothing. Raises PeerLost if nobody answers."""

    def edge_files(self) -> Path:
        """A folder with embedding, head and tokenizer; fetched on first use."""

    def layer_files(self, names: Sequence[str]) -> Path:
        """A folder with these files of decoder layers; fetched on first use."""

    def close(self) -> None:
        """Give the connection back."""


@runtime_checkable
class SharesWeights(Protocol):
    """A link within one process: what is in `edge.safetensors` needs no file."""

    def edge_weights(self) -> dict[str, Tensor]:
        """The tensors by their names in that file, in the cloud's own memory: not to be changed."""

    def generation_config(self) -> GenerationConfig | None:
        """A copy of the model's own, where it has one."""


def shown(link: Link) -> str:
    """A link as a person wants to see it, for its `repr`."""
    served = link.description
    return (
        f"<link to {link.address}: {served.model_id}, {served.layers.count} layers, "
        f"{len(served.sites)} sites>"
    )


@dataclass(frozen=True, kw_only=True)
class Outage:
    """A cloud that is waited for: `outage` of the log records that say so, for who shows them."""

    reason: str
    lasted_s: float
    left_s: float | None = None
    """Seconds until it is given up; None: it has answered again."""


def is_back(lasted_s: float) -> None:
    """Say that a cloud that was waited for has answered."""
    outage = Outage(reason="", lasted_s=lasted_s)
    log.warning("the server is back after %.0f s", lasted_s, extra={"outage": outage})


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long a lost cloud is waited for."""

    give_up_after_s: float = 600.0
    """Seconds without one finished micro-batch after which the loss is final."""
    first_delay_s: float = 0.2
    longest_delay_s: float = 10.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def attempts(self) -> Iterator[Callable[[PeerLost], None]]:
        """Yield once an attempt; call what is yielded with the error to wait before the next.

        Delays double from `first_delay_s`, with up to half of jitter so that many edges do not
        come back at once. The cloud's own hint is kept to. Raises the error when time is up.
        """
        start = self.clock()
        delay = self.first_delay_s
        while True:

            def wait(error: PeerLost) -> None:
                nonlocal delay
                pause = max(error.retry_after_s or 0.0, delay * _JITTER.uniform(0.5, 1.0))
                lasted_s = self.clock() - start
                if lasted_s + pause > self.give_up_after_s:
                    raise PeerLost(
                        f"{error} (gave up after {lasted_s:.0f} s; nothing saved so far is lost)"
                    ) from error
                left_s = self.give_up_after_s - lasted_s
                outage = Outage(reason=str(error), lasted_s=lasted_s, left_s=left_s)
                text = "waiting for the server, for another %.0f s: %s"
                log.warning(text, left_s, error, extra={"outage": outage})
                self.sleep(pause)
                delay = min(2 * delay, self.longest_delay_s)

            yield wait
