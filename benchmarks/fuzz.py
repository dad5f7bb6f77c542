"""Mutated frames against both halves: neither may crash, hang, grow, or answer an honest peer
otherwise afterwards.

    python benchmarks/fuzz.py run --frames 200000   # in each direction; some 15 minutes
    python benchmarks/fuzz.py table                   # the table of docs/security.md

Frames are those of real streams with a tiny Llama: training on the plain wire, on the factored wire
with idle modules and a probe, on the hosted wire with dropout, with a layer on the edge, with
prefixes that are kept and that are named, and generation with a KV cache that is rolled back. One
frame of a stream is changed, in its bytes or in a field, or takes another's place; the rest follows
as recorded. A half may refuse with an error of its own, or go on where the change is within what it
must accept (another number). All else is a failure and is kept with its seed.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError, Message
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

import dlora
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.link import RetryPolicy
from dlora.embedded import InProcessLink
from dlora.errors import DLoRAError, PeerLost
from dlora.proto import dlora_pb2 as pb

RESULT = Path(__file__).parent / "results" / "fuzz.json"
HONEST_EVERY = 500  # mutated frames between two honest streams
SLOW_S = 10.0  # a stream that takes longer counts as hung
MOST_GROWTH = 1.05  # of memory, from a tenth of the frames to the last
INTERESTING = (
    0,
    1,
    2,
    3,
    7,
    255,
    256,
    65_535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    -1,
    -(2**31),
)


# ----------------------------------------------------------------- recording


class Recorder:
    """A link that keeps the frames of its streams, or plays recorded ones with one exchanged."""

    def __init__(self, link: Any) -> None:
        self.link, self.description, self.address = link, link.description, "a recording"
        self.streams: list[list[pb.EdgeFrame]] = []
        self.cloud: list[pb.CloudFrame] | None = []
        self.played: Iterator[pb.CloudFrame] = iter(())

    def open(self) -> Any:
        if self.cloud is None:
            return _Stream(self, None)
        self.streams.append([])
        return _Stream(self, self.link.open())

    def put_adapter(self, modules: Any) -> None:
        self.link.put_adapter(modules)

    def edge_files(self) -> Path:
        found: Path = self.link.edge_files()
        return found

    def layer_files(self, names: Any) -> Path:
        return self.link.layer_files(names)

    def ping(self) -> None: ...

    def close(self) -> None: ...


class _Stream:
    def __init__(self, owner: Recorder, stream: Any) -> None:
        self.owner, self.stream = owner, stream

    def send(self, frame: pb.EdgeFrame) -> None:
        if self.stream is not None:
            self.owner.streams[-1].append(frame)
            self.stream.send(frame)

    def receive(self) -> pb.CloudFrame:
        if self.stream is None:
            frame = next(self.owner.played, None)
            if frame is None:
                raise PeerLost("the recording is over")
            return frame
        frame = self.stream.receive()
        self.owner.cloud.append(frame)
        return frame

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()


class Pipe:
    """The cloud's end of a recorded stream."""

    def __init__(self, frames: list[pb.EdgeFrame]) -> None:
        self.inbox: queue.SimpleQueue[pb.EdgeFrame] = queue.SimpleQueue()
        for frame in frames:
            self.inbox.put(frame)
        self.sent: list[bytes] = []

    def admit(self, cost_bytes: int) -> None: ...

    def breathe(self) -> float:
        return 0.0

    def expect(self, frames: int) -> None: ...

    def send(self, frame: pb.CloudFrame) -> None:
        copy = pb.CloudFrame.FromString(frame.SerializeToString())
        copy.compute_s = 0.0
        self.sent.append(copy.SerializeToString(deterministic=True))

    def receive(self) -> pb.EdgeFrame:
        try:
            return self.inbox.get_nowait()
        except queue.Empty:
            raise PeerLost("the recording is over") from None


class Scene:
    """One kind of stream: how an edge runs it, and its recorded frames."""

    def __init__(self, name: str, link: Any) -> None:
        self.name, self.recorder = name, Recorder(link)
        torch.manual_seed(0)
        config = LoraConfig(
            r=2,
            target_modules=["q_proj", "v_proj", "up_proj"],
            init_lora_weights=False,
            lora_dropout=0.1 if name == "hosted" else 0.0,
            layers_to_transform=[1] if name in ("kept", "named") else None,
        )
        wire: Any = name if name in ("factored", "hosted") else "plain"
        dtype = {"factored": "fp32", "hosted": "fp32", "int8": "int8", "int4": "int4"}.get(
            name, "fp16"
        )
        self.model = dlora.get_peft_model(
            self.recorder,
            config,
            wire=wire,
            wire_dtype=dtype,
            upload_consent=wire == "hosted",
            input_grad="drop" if name == "int4" else "exact",
            retry=RetryPolicy(give_up_after_s=0.0),
            edge_layers=(1, 0) if name == "held" else (0, 0),
            cache_prefix=name in ("kept", "named"),
        )
        self.model.eval() if name == "generation" else self.model.train()
        if name == "factored":
            names = self.model.adapted_modules
            self.model.set_active(names[:2], "cloud")
            self.model.probe_modules = list(names)
        if name == "named":  # what it is kept by
            self.run()
            self.recorder.streams, self.recorder.cloud = [], []
        self.honest = self.run()
        # The cloud gets the longest stream; the edge goes through all, also those that had to begin
        # again.
        self.edge, self.cloud = max(self.recorder.streams, key=len), list(self.recorder.cloud or [])
        self.recorder.cloud = None

    def run(self) -> Any:
        """One stream of the edge; the result by which an honest one is known."""
        ids = torch.arange(1, 15).view(2, 7)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        if self.name == "generation":
            with torch.no_grad(), closing(dlora.CloudCache(expected_length=24)) as cache:
                self.model(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True
                )
                found = self.model(ids[:, :2], past_key_values=cache, use_cache=True).logits
                for length in (3, 2, 1):
                    cache.crop(-1)
                    found = (
                        found.sum()
                        + self.model(
                            ids[:, :length], past_key_values=cache, use_cache=True
                        ).logits.sum()
                    )
                return found
        self.model.zero_grad()
        self.model.probe_norms.clear()
        self.model.forget_kept()
        labels = ids.masked_fill(mask == 0, -100)
        self.model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def replay(self, frames: list[pb.CloudFrame]) -> Any:
        """The edge against recorded frames."""
        self.recorder.played = iter(frames)
        return self.run()


def scenes() -> tuple[InProcessLink, list[Scene]]:
    """A link to a tiny cloud, to be closed in the end, and one scene of each kind."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    cloud = CloudModel(
        AutoModelForCausalLM.from_config(config),
        model_id="tiny",
        limits=Limits(max_tokens=64, max_length=64, edge_first=1),
    )
    link = InProcessLink(cloud)
    return link, [
        Scene(name, link)
        for name in (
            *("plain", "factored", "hosted", "held", "generation", "int8", "int4"),
            *("kept", "named"),
        )
    ]


# ----------------------------------------------------------------- mutating


def mutate(frame: Any, others: list[Any], lots: random.Random) -> Any | None:
    """A changed copy; None if its bytes are no message any more, which gRPC refuses by itself."""
    kind = lots.random()
    if kind < 0.1:
        return lots.choice(others)  # in the wrong place
    copy = type(frame)()
    copy.CopyFrom(frame)
    if kind < 0.4:
        data = bytearray(copy.SerializeToString())
        for _ in range(lots.choice((1, 1, 2, 8))):
            start = lots.randrange(len(data) + 1)
            match lots.randrange(5):
                case 0 if start < len(data):
                    data[start] ^= 1 << lots.randrange(8)
                case 1:
                    del data[start : start + lots.randrange(1, 9)]
                case 2:
                    data[start:start] = lots.randbytes(lots.randrange(1, 9))
                case 3:
                    data[start:start] = data[start : start + lots.randrange(1, 64)]
                case _:
                    data[start : start + 4] = bytes(
                        lots.choice((0, 255)) for _ in data[start : start + 4]
                    )
        try:
            return type(frame).FromString(bytes(data))
        except DecodeError:
            return None
    for _ in range(lots.choice((1, 1, 1, 3))):
        change(copy, lots)
    return copy


def change(message: Message, lots: random.Random) -> None:
    """Change one field somewhere in a message."""
    fields = list(message.DESCRIPTOR.fields)
    present = [field for field, _ in message.ListFields()]
    field = lots.choice(present if present and lots.random() < 0.9 else fields)
    value = getattr(message, field.name)
    if field.message_type is not None and not field.is_repeated:
        if lots.random() < 0.1:
            message.ClearField(field.name)
        else:
            change(value, lots)
    elif field.is_repeated:
        change_repeated(message, field, value, lots)
    else:
        try:
            setattr(message, field.name, scalar(field, value, lots))
        except (ValueError, TypeError):
            message.ClearField(field.name)


def change_repeated(message: Message, field: Any, value: Any, lots: random.Random) -> None:
    """Change a list: its length, its order, or one of its entries."""
    match lots.randrange(5):
        case 0:
            message.ClearField(field.name)
        case 1 if len(value):
            value.append(value[lots.randrange(len(value))])
        case 2 if len(value):
            del value[lots.randrange(len(value))]
        case 3 if field.message_type is None:
            value.extend([0] * lots.choice((1, 100, 10_000)))
        case _ if len(value):
            index = lots.randrange(len(value))
            if field.message_type is not None:
                change(value[index], lots)
                return
            try:
                value[index] = scalar(field, value[index], lots)
            except (ValueError, TypeError):
                del value[index]


def scalar(field: Any, value: Any, lots: random.Random) -> Any:
    """Another value for a field; it may not fit."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return lots.choice(
            (lots.choice(INTERESTING), value + 1, value - 1, value * 2, lots.getrandbits(16))
        )
    if isinstance(value, float):
        return lots.choice((math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30, lots.gauss(0, 1)))
    if isinstance(value, bytes):
        nan = b"\x00\x7e" * (len(value) // 2)
        return lots.choice(
            (
                b"",
                value[:-1],
                value + b"\0",
                value[::-1],
                nan,
                b"\xff" * len(value),
                lots.randbytes(32),
            )
        )
    return lots.choice(("", "../" + value, value[::-1], value + "\0", "x" * 10_000))


# ----------------------------------------------------------------- running


def fuzz(direction: str, frames: int, seed: int = 0) -> dict[str, Any]:
    """Send so many mutated frames to the `cloud` or the `edge`; what happened."""
    link, all_scenes = scenes()
    cloud = link.cloud
    want = {scene.name: replay_cloud(cloud, scene.edge).sent for scene in all_scenes}
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    memory, slowest, started = [], 0.0, time.monotonic()
    for number in range(frames):
        lots = random.Random(f"{seed}:{number}")
        scene = lots.choice(all_scenes)
        recorded = scene.edge if direction == "cloud" else scene.cloud
        index = lots.randrange(len(recorded))
        frame = mutate(recorded[index], recorded, lots)
        start, error = time.monotonic(), None
        if frame is None:
            outcome = "no message: refused by the parser"
        else:
            played = [*recorded[:index], frame, *recorded[index + 1 :]]
            try:
                outcome = "accepted"
                if direction == "cloud":
                    replay_cloud(cloud, played)
                elif not torch.isfinite(scene.replay(played)).all():
                    error = "gradients that are not finite"
            except DLoRAError as refusal:
                outcome = type(refusal).__name__
            except Exception as crash:
                error = f"{type(crash).__name__}: {crash}"
        seconds = time.monotonic() - start
        slowest = max(slowest, seconds)
        if seconds > SLOW_S:
            error = error or f"took {seconds:.0f} s"
        counts["failed" if error else outcome] += 1
        if error:
            failures.append(
                {"seed": f"{seed}:{number}", "scene": scene.name, "frame": index, "error": error}
            )
        if number % HONEST_EVERY == 0:
            honest = lots.choice(all_scenes)
            right = (
                replay_cloud(cloud, honest.edge).sent == want[honest.name]
                if direction == "cloud"
                else torch.equal(honest.replay(honest.cloud), honest.honest)
            )
            counts["honest streams"] += 1
            if not right:
                failures.append(
                    {
                        "seed": f"{seed}:{number}",
                        "error": f"an honest {honest.name} stream came out other",
                    }
                )
            memory.append(resident_mib())
    link.close()
    warm = len(memory) // 10
    if warm and memory[-1] > MOST_GROWTH * memory[warm]:
        failures.append(
            {"seed": str(seed), "error": f"grew from {memory[warm]} to {memory[-1]} MiB"}
        )
    return {
        "direction": direction,
        "frames": frames,
        "seed": seed,
        "outcomes": dict(counts),
        "failures": failures[:20],
        "num_failures": len(failures),
        "slowest_s": round(slowest, 3),
        "memory_mib": {"after a tenth": memory[warm], "at the end": memory[-1]},
        "seconds": round(time.monotonic() - started, 1),
    }


def replay_cloud(cloud: CloudModel, frames: list[pb.EdgeFrame]) -> Pipe:
    """Play an edge's frames to the cloud. Raises what the cloud raises, but for an edge that leaves
    at the end.
    """
    pipe = Pipe(frames)
    begin = pipe.receive()
    if begin.WhichOneof("kind") != "begin":
        raise dlora.WireError("not a begin")  # the server checks this before anything else
    request = cloud.check(begin.begin)
    try:
        cloud.run(request, pipe)
    except PeerLost:
        if not request.cache_length:  # an answer ends by the edge's leaving
            raise
    return pipe


def resident_mib() -> float:
    """Memory of this process now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


def table(result: dict[str, Any]) -> str:
    """Markdown of both directions."""
    lines = [
        "| frames sent to | mutated frames | refused | accepted | honest streams between, all "
        "equal | failures | "
        "slowest, s | memory after a tenth, at the end, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        outcomes = run["outcomes"]
        refused = run["frames"] - outcomes.get("accepted", 0) - outcomes.get("failed", 0)
        memory = run["memory_mib"]
        lines.append(
            f"| {run['direction']} | {run['frames']} | {refused} | {outcomes.get('accepted', 0)} | "
            f"{outcomes['honest streams']} | {run['num_failures']} | {run['slowest_s']} | "
            f"{memory['after a tenth']:.0f}, {memory['at the end']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--direction", choices=("cloud", "edge"), help="only this one, printed and not kept"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.direction:
        print(json.dumps(fuzz(arguments.direction, arguments.frames, arguments.seed), indent=2))
        sys.exit()
    if arguments.what == "run":
        from provenance import provenance

        with ProcessPoolExecutor(2) as pool:
            runs = list(
                pool.map(fuzz, ("cloud", "edge"), [arguments.frames] * 2, [arguments.seed] * 2)
            )
        found = {
            "runs": runs,
            **provenance("grpcio", "protobuf"),
        }
        RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(table(json.loads(RESULT.read_text())))
