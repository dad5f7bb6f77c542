"""Faults on the way and in the server: after each the work ends with exactly the result of a run
without faults.

    python benchmarks/faults.py run      # about ten minutes; goes on where it was interrupted
    python benchmarks/faults.py table    # the tables of docs/security.md

A tiny Llama is used in several ways: LoRA training with dropout on both wires, bottleneck adapters,
noise, edge layers, Kill and Revive, sampled answers. A relay does things to the bytes, at random
places in both directions; a server process is killed, stays away, or hangs, at random frames.
Compared bit for bit: adapters, losses, decisions, tokens, and all random states.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hurting import HurtingLink, MortalServer
from peft import LoraConfig
from relay import Relay
from transformers import AutoModelForCausalLM, LlamaConfig

import dlora
from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.grpc_link import Access
from dlora.edge.link import RetryPolicy
from dlora.edge.noise import Noise
from dlora.kill_revive.apply import KillAndRevive
from dlora.kill_revive.config import KillReviveConfig
from dlora.server import keys
from dlora.server.server import Server, ServerOptions, TlsFiles

RESULT = Path(__file__).parent / "results" / "faults.json"
PARTIAL = RESULT.with_suffix(".partial.jsonl")
STEPS = 12
FRAME_TIMEOUT_S = 1.5  # where a connection hangs; else that of the library

# name -> (what the relay does all the time, what it does once a step, TLS)
ON_THE_WAY: dict[str, tuple[dict[str, float], str | None, bool]] = {
    "delay of 20 ms each way": ({"delay_s": 0.02}, None, False),
    "delay of 10 ms with jitter up to 30 ms": ({"delay_s": 0.01, "jitter_s": 0.03}, None, False),
    "bandwidth of 1 MB/s": ({"bytes_per_s": 1e6}, None, False),
    "cut at a random byte": ({}, "cut", False),
    "cut at a random byte, under TLS": ({}, "cut", True),
    "half-open: bytes vanish, the connection stays": ({}, "swallow", False),
    "a corrupted byte, under TLS": ({}, "corrupt", True),
}


@dataclass(frozen=True)
class ServerFault:
    """What happens to the server process in every step, at a random frame."""

    signal: int
    away_s: Sequence[float] = (0.0,)
    """How long, step by step and then from the start; 0: it comes back at once."""
    times: int = 1
    """In a step: the same again when the step is repeated."""


IN_THE_SERVER: dict[str, ServerFault] = {
    "SIGKILL of the server at a random frame": ServerFault(signal.SIGKILL),
    "SIGKILL three times, twice while the step is repeated": ServerFault(signal.SIGKILL, times=3),
    "the server is away for 0.1 to 2 s": ServerFault(
        signal.SIGKILL, (0.1, 2.0, 0.2, 0.5, 1.0, 0.3, 1.5, 0.1, 0.7)
    ),
    "the server is away for 5, 10 and 30 s": ServerFault(signal.SIGKILL, (5.0, 10.0, 30.0)),
    "the server hangs for 2 s": ServerFault(signal.SIGSTOP, (2.0,)),
}
LONG = "the server is away for 5, 10 and 30 s"
AGAIN = "SIGKILL three times, twice while the step is repeated"
HANGS = "the server hangs for 2 s"
FEWER = {LONG: 3, HANGS: 4, AGAIN: 3}  # steps of these


@dataclass(frozen=True)
class Work:
    """A way to use the model."""

    config: LoraConfig
    options: dict[str, Any] = field(default_factory=dict)
    kr: KillReviveConfig | None = None
    answers: bool = False
    """Sampled answers in place of training."""


def _lora(**options: Any) -> LoraConfig:
    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(
        r=4,
        **({"lora_dropout": 0.1, "target_modules": targets, "init_lora_weights": False} | options),
    )


WORKS: dict[str, Work] = {
    "LoRA with dropout": Work(_lora()),
    "the same, factored": Work(_lora(), {"wire": "factored"}),
    "bottlenecks with dropout": Work(
        BottleneckConfig(kind="series", r=4, target_modules=["down_proj"], lora_dropout=0.1)
    ),
    "noise and hidden lengths": Work(
        _lora(), {"noise": Noise(entry=0.1, tail=0.3), "hide_lengths": True}
    ),
    "edge layers with dropout": Work(_lora(), {"edge_layers": (1, 1)}),
    "Kill and Revive, idle modules in the cloud": Work(
        _lora(),
        kr=KillReviveConfig(
            unit="module", interval=2, budget=0.5, idle="cloud", revive="scored", final=0.0
        ),
    ),
    "Kill and Revive by outputs": Work(
        _lora(), kr=KillReviveConfig(policy="output", warmup=0.5, interval=2, budget=0.5)
    ),
    "sampled answers": Work(_lora(), answers=True),
}


def tiny(seed: int = 0) -> Any:
    """A small random Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config)


# ----------------------------------------------------------------- the work


def do(work: Work, link: Any, before_step: Callable[[int], None], steps: int) -> tuple[Any, Any]:
    """Some steps: everything by which two runs are compared, and what it cost."""
    torch.manual_seed(1)
    random.seed(1)
    retry = RetryPolicy(give_up_after_s=300.0, first_delay_s=0.05)
    model = dlora.get_peft_model(link, work.config, retry=retry, **work.options)
    found = (answer if work.answers else train)(work, model, before_step, steps)
    return [*found, torch.get_rng_state(), random.getstate()], model.meter


def train(work: Work, model: Any, before_step: Callable[[int], None], steps: int) -> list[Any]:
    """AdamW, two micro-batches a step: losses, adapter, and what Kill and Revive knows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    reviver = KillAndRevive(model, work.kr, steps) if work.kr else None
    found: list[Any] = []
    for step in range(steps):
        before_step(step)
        if reviver:
            reviver.before_step(step)
        generator = torch.Generator().manual_seed(step)
        for length in (24, 17):
            ids = torch.randint(0, 300, (4, 24), generator=generator)
            mask = torch.ones_like(ids)
            mask[1, length:] = 0
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            found.append(loss.detach())
        if reviver:
            reviver.before_update(optimizer)
        optimizer.step()
        if reviver:
            reviver.after_update()
        optimizer.zero_grad()
    found += [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    return [*found, reviver.state_dict()] if reviver else found


def answer(work: Work, model: Any, before_step: Callable[[int], None], steps: int) -> list[Any]:
    """A sampled answer of 16 tokens to two prompts, a step."""
    model.eval()
    found: list[Any] = []
    for step in range(steps):
        before_step(step)
        ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(step))
        found.append(
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=16,
                do_sample=True,
                pad_token_id=0,
            )
        )
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal, bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def row(
    fault: str, work: str, injected: int, started: float, want: Any, found: Any
) -> dict[str, Any]:
    """One run as it stands in the result file; `want` and `found` are what `do` gave."""
    return {
        "fault": fault,
        "work": work,
        "injected": injected,
        "retries": found[1].retries,
        "micro_batches_lost": want[1].micro_batches - found[1].micro_batches,
        "equal": same(want[0], found[0]),
        "seconds": round(time.monotonic() - started, 1),
    }


# ----------------------------------------------------------------- faults on the way


def relayed(name: str, work: str, cloud: CloudModel, folder: Path, steps: int) -> dict[str, Any]:
    """One work through the relay, and without it before."""
    always, once, encrypted = ON_THE_WAY[name]
    tls = (
        TlsFiles(certificate=folder / "server.pem", key=folder / "server.key")
        if encrypted
        else None
    )
    access = Access(ca=folder / "ca.pem") if encrypted else Access()
    with Server(cloud, tls=tls, options=ServerOptions(drain_s=0.0)) as server:
        link = dlora.connect(server.address, access=access, cache=folder / "cache")
        want = do(WORKS[work], link, lambda step: None, steps)
        link.close()

        relay = Relay(("127.0.0.1", server.port), **always)
        # Half-open connections are noticed by keepalive after 30 s; here a frame takes less.
        timeout_s = FRAME_TIMEOUT_S if once == "swallow" else 60.0
        link = dlora.connect(
            relay.address, access=access, frame_timeout_s=timeout_s, cache=folder / "cache"
        )
        link.edge_files()
        lots = random.Random(f"{name} {work}")
        sizes = {"up": want[1].sent_bytes // steps, "down": want[1].received_bytes // steps}

        def arm(step: int) -> None:
            if once is not None:
                direction = lots.choice(("up", "down"))
                relay.arm(once, lots.randrange(1, sizes[direction]), direction)

        started = time.monotonic()
        found = do(WORKS[work], link, arm, steps)
        link.close()
        injected = relay.injected if once else steps
        relay.close()
    return row(name, work, injected, started, want, found)


# ----------------------------------------------------------------- faults in the server


def hurt(name: str, work: str, server: MortalServer, folder: Path, steps: int) -> dict[str, Any]:
    """One work with a server that is killed, away or hanging in every step, and before without."""
    fault = IN_THE_SERVER[name]
    pauses = itertools.cycle(fault.away_s)
    timeout_s = FRAME_TIMEOUT_S if fault.signal == signal.SIGSTOP else 60.0
    connection = dlora.connect(
        f"127.0.0.1:{server.port}", timeout_s=60, frame_timeout_s=timeout_s, cache=folder / "cache"
    )
    link = HurtingLink(connection, lambda: server.hurt(fault.signal, next(pauses)))
    want = do(WORKS[work], link, lambda step: None, steps)
    frames, lots = link.longest, random.Random(f"{name} {work}")

    def plan(step: int) -> None:
        link.places = [lots.randrange(frames) for _ in range(fault.times)]

    started = time.monotonic()
    found = do(WORKS[work], link, plan, steps)
    link.close()
    server.settle()
    return row(name, work, link.injected, started, want, found)


# ----------------------------------------------------------------- all of them


@contextlib.contextmanager
def stage() -> Iterator[tuple[CloudModel, Path]]:
    """A tiny model to serve, and a folder with keys and the same model saved."""
    model = tiny()
    with tempfile.TemporaryDirectory() as scratch:
        keys.make_authority(Path(scratch), ["127.0.0.1"], 1)
        model.save_pretrained(Path(scratch) / "model")
        cloud = CloudModel(model, model_id="tiny", limits=Limits(edge_first=1, edge_last=1))
        yield cloud, Path(scratch)


def cases() -> Iterator[tuple[str, str, int]]:
    """(fault, work, steps) of the whole benchmark."""
    training = next(iter(WORKS))
    for fault in ON_THE_WAY:
        for work in WORKS if fault == "cut at a random byte" else [training]:
            yield fault, work, STEPS
    for fault in IN_THE_SERVER:
        works = list(WORKS)
        if fault == LONG:
            works = [training, "Kill and Revive, idle modules in the cloud"]
        for work in works:
            yield fault, work, FEWER.get(fault, STEPS)


def run(chosen: Sequence[tuple[str, str, int]], keep: Path | None = None) -> list[dict[str, Any]]:
    """Some cases: one row each, which is also appended to the file `keep`."""
    found = []
    with stage() as (cloud, folder), contextlib.ExitStack() as stack:
        server = None
        for fault, work, steps in chosen:
            if fault in ON_THE_WAY:
                found.append(relayed(fault, work, cloud, folder, steps))
            else:
                if server is None:
                    server = MortalServer(folder / "model")
                    stack.callback(server.end)
                found.append(hurt(fault, work, server, folder, steps))
            print(found[-1], file=sys.stderr, flush=True)
            if keep is not None:
                with keep.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    return found


def run_all(workers: int) -> list[dict[str, Any]]:
    """All cases, in their order; what an interrupted run has done is not done again."""
    done = (
        [json.loads(line) for line in PARTIAL.read_text().splitlines()] if PARTIAL.exists() else []
    )
    known = {(one["fault"], one["work"]): one for one in done}
    groups: dict[str, list[tuple[str, str, int]]] = {}
    for case in cases():
        if case[:2] not in known:
            groups.setdefault(case[0], []).append(case)
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for rows in pool.map(run, groups.values(), [PARTIAL] * len(groups)):
            known |= {(one["fault"], one["work"]): one for one in rows}
    return [known[case[:2]] for case in cases()]


def table(result: dict[str, Any]) -> str:
    """Markdown: by fault, and by work."""
    lines = []
    for key in ("fault", "work"):
        lines += [
            f"| {key} | injected | attempts again | micro-batches lost | runs compared | result |",
            "|---|---|---|---|---|---|",
        ]
        for name in dict.fromkeys(one[key] for one in result["runs"]):
            rows = [one for one in result["runs"] if one[key] == name]
            sums = [
                sum(one[column] for one in rows)
                for column in ("injected", "retries", "micro_batches_lost")
            ]
            different = sum(not one["equal"] for one in rows)
            word = f"{different} DIFFER" if different else "equal, bit for bit"
            lines.append(f"| {name} | {' | '.join(map(str, sums))} | {len(rows)} | {word} |")
        lines.append("")
    return "\n".join(lines).strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--workers", type=int, default=2, help="kinds of fault at a time")
    arguments = parser.parse_args()
    if arguments.what == "run":
        from provenance import provenance

        result = {"runs": run_all(arguments.workers), **provenance("grpcio")}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        PARTIAL.unlink(missing_ok=True)
    print(table(json.loads(RESULT.read_text())))
