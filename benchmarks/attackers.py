"""Hostile peers of a cloud, each a process of its own: `attacks.py` starts them against a server.

    python benchmarks/attackers.py KIND ADDRESS KEYS TOKEN[,TOKEN...]

They speak gRPC in raw bytes, so that nothing on their side keeps them from what the edge's own code
would never send. All are bounded: so many calls at a time, and none that outlives this process.
They print a line when they are under way, and then how their calls ended whenever they are asked.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import PROTOCOL_VERSION, channel_options

SERVICE, HEALTH = "dlora.v1.DLoRA", "grpc.health.v1.Health"
MIB = 2**20
BOMB = b"\x12\x00" * 4_000_000
"""Empty submessages: 8 MB here, some 200 MB where they are parsed."""


class Peer:
    """Calls of raw bytes, with a token or without."""

    def __init__(self, address: str, keys: Path, token: str) -> None:
        self.address, self.answers = address, Counter[str]()
        # Without probes HTTP/2's window stays at 64 KiB: more than that is there to be not read.
        options = [*channel_options(), ("grpc.http2.bdp_probe", 0)]
        credentials = grpc.ssl_channel_credentials((keys / "ca.pem").read_bytes())
        self.channel = grpc.secure_channel(address, credentials, options)
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def call(self, name: str, *messages: bytes, service: str = SERVICE, **options: Any) -> Any:
        """Send these, and then neither more nor an end. Answers are there for who reads them."""
        over = threading.Event()

        def requests() -> Iterator[bytes]:
            yield from messages
            over.wait()

        method = self.channel.stream_stream(f"/{service}/{name}")
        made = method(requests(), metadata=self.metadata, **options)
        made.add_callback(over.set)
        return made

    def end(self, call: Any) -> None:
        """Read a call to its end, and count how it ended."""
        try:
            for _ in call:
                pass
            self.answers["OK"] += 1
        except grpc.RpcError as error:
            self.answers[error.code().name] += 1

    def describe(self) -> pb.Description:
        """What the server serves."""
        request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION).SerializeToString()
        return pb.Description.FromString(next(iter(self.call("Describe", request))))


def loops(count: int, act: Callable[[], None]) -> None:
    """Do it again and again, so many times at once."""

    def again() -> None:
        while True:
            act()

    for _ in range(count):
        threading.Thread(target=again, daemon=True).start()


def begin(peer: Peer, **changes: Any) -> bytes:
    """A training step of one row of two tokens at the first site, as a first frame."""
    description = peer.describe()
    width = description.embedding_width
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "fingerprint": description.fingerprint,
        "wire_dtype": pb.FP32,
        "training": True,
        "batch": 1,
        "length": 2,
        "keep": [1],
        "sites": [pb.ActiveSite(site=0, modules=[0])],
        "embeddings": pb.Tensor(dtype=pb.FP32, shape=[2, width], data=bytes(8 * width)),
    }
    return pb.EdgeFrame(begin=pb.Begin(**(fields | changes))).SerializeToString()


# ------------------------------------------------------------------------------ strangers


def bombs(peer: Peer) -> None:
    """Eight at a time upload empty submessages by the million, plain and compressed."""
    loops(4, lambda: peer.end(peer.call("PutAdapter", BOMB)))
    loops(4, lambda: peer.end(peer.call("PutAdapter", BOMB, compression=grpc.Compression.Gzip)))


def watches(peer: Peer) -> None:
    """Health watched under long names, and calls that never say anything."""
    name = b"\n\xa0\x8d\x06" + b"x" * 100_000
    loops(8, lambda: peer.end(peer.call("Watch", name, service=HEALTH)))
    loops(8, lambda: peer.end(peer.call("Describe")))


def silent(peer: Peer) -> None:
    """1,024 connections that say nothing."""
    host, _, port = peer.address.rpartition(":")
    held = [socket.create_connection((host, int(port))) for _ in range(1024)]
    peer.answers["connections"] = len(held)
    loops(1, lambda: time.sleep(1 + 0 * len(held)))


def resets(peer: Peer) -> None:
    """Calls that are cancelled as soon as they are made."""

    def act() -> None:
        peer.call("Describe").cancel()
        peer.answers["cancelled"] += 1
        time.sleep(0.001)

    loops(4, act)


def logins(peer: Peer) -> None:
    """One question without a valid token after another, eight at a time."""
    loops(8, lambda: peer.end(peer.call("Describe")))


# ------------------------------------------------------------------------------ tenants


def downloads(peer: Peer) -> None:
    """1,080 downloads that are not read."""
    fingerprint = peer.describe().fingerprint
    request = pb.FetchEdgeFilesRequest(fingerprint=fingerprint).SerializeToString()
    held = [peer.call("FetchEdgeFiles", request) for _ in range(1080)]
    peer.answers["calls"] = len(held)
    loops(1, lambda: time.sleep(1 + 0 * len(held)))


def unread(peer: Peer) -> None:
    """Streams whose answers are never read; a new one for each that ends."""
    width = peer.describe().embedding_width
    rows = pb.Tensor(dtype=pb.FP32, shape=[512, width], data=bytes(4 * 512 * width))
    frame = begin(peer, batch=8, length=64, embeddings=rows)

    def act() -> None:
        call, over = peer.call("Step", frame), threading.Event()
        call.add_callback(over.set)
        over.wait()
        peer.answers[call.code().name] += 1

    loops(8, act)


def large(peer: Peer) -> None:
    """Streams of four frames of 60 MiB that nobody asked for, and a first frame of 200 MiB for two
    tokens.
    """
    small = begin(peer)
    frame = pb.EdgeFrame(deltas=pb.SiteDeltas(deltas=[pb.Tensor(data=bytes(60 * MIB))]))
    more = frame.SerializeToString()
    huge = begin(peer, embeddings=pb.Tensor(dtype=pb.FP32, shape=[2, 64], data=bytes(200 * MIB)))
    loops(2, lambda: peer.end(peer.call("Step", small, more, more, more, more)))
    loops(1, lambda: peer.end(peer.call("Step", huge)))


def numbers(peer: Peer) -> None:
    """First frames with module numbers by the million, two loops."""
    frame = begin(peer, sites=[pb.ActiveSite(site=0, modules=[0] * 4_000_000)])
    loops(2, lambda: peer.end(peer.call("Step", frame)))


def empty_modules(peer: Peer) -> None:
    """Uploads of 1,000 modules of no size, two loops."""
    empty = pb.FrozenModule(
        a=pb.Tensor(dtype=pb.FP32, shape=[0, 64]), b=pb.Tensor(dtype=pb.FP32, shape=[64, 0])
    )
    request = pb.PutAdapterRequest(
        fingerprint=peer.describe().fingerprint, modules=[empty] * 1000
    ).SerializeToString()
    loops(2, lambda: peer.end(peer.call("PutAdapter", request)))


def describes(peer: Peer) -> None:
    """One `Describe` after another, eight at a time."""
    request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION).SerializeToString()
    loops(8, lambda: peer.end(peer.call("Describe", request)))


def crowd(*peers: Peer) -> None:
    """Many tenants, each with streams that it begins and then leaves as they are."""
    frame = begin(peers[0])

    def hold(peer: Peer) -> None:
        peer.end(peer.call("Step", frame))
        time.sleep(0.2)

    for peer in peers:
        loops(4, partial(hold, peer))


STRANGERS: dict[str, Callable[..., None]] = {
    "uploads of empty submessages, plain and gzip": bombs,
    "health watches with long names, half-open calls": watches,
    "1,024 silent connections": silent,
    "calls cancelled at once": resets,
    "wrong logins, eight at a time": logins,
}
TENANTS: dict[str, Callable[..., None]] = {
    "1,080 downloads that are not read": downloads,
    "streams that are never read": unread,
    "frames of 60 and 200 MiB": large,
    "module numbers by the million": numbers,
    "modules of no size": empty_modules,
    "Describe, eight at a time": describes,
    "ten small tenants that hold four streams each": crowd,
}


def main(kind: str, address: str, keys: str, tokens: str) -> None:
    """Attack, and say what the answers were so far for each line of standard input."""
    peers = [Peer(address, Path(keys), token) for token in tokens.split(",")]
    (STRANGERS | TENANTS)[kind](*peers)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(dict(sum((peer.answers for peer in peers), Counter()))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
