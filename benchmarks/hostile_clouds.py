"""What a hostile cloud does to an edge, and how the edge's command ends.

    python benchmarks/hostile_clouds.py run      # rows that are not there yet, half a minute each
    python benchmarks/hostile_clouds.py table    # the second table of docs/security.md

Between a real `dlora serve` and a real `dlora generate` or `dlora train` stands a cloud that passes
bytes on and changes some of the answers: from the start, or after five steps of training. Noted are
the command's exit code, its lines that are errors, its time and its highest memory, and for
training the step that is kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from load import serving, tiny_folder
from provenance import provenance

from dlora.proto import dlora_pb2 as pb
from dlora.protocol.channel import channel_options
from dlora.protocol.files import describe_files

RESULT = Path(__file__).parent / "results" / "hostile_clouds.json"
HONEST_STEPS = 5
MIB = 2**20


class HostileCloud(grpc.GenericRpcHandler):
    """Passes every call on to a server; `change` makes of its answers what it likes."""

    def __init__(self, target: str, change: Change, folder: Path) -> None:
        self.target = grpc.insecure_channel(target, channel_options(2**30))
        self.change, self.folder, self.steps = change, folder, itertools.count()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Any call, as a stream of bytes in both directions."""
        method = handler_call_details.method
        name = method.rpartition("/")[2]

        def answer(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            answers = self.target.stream_stream(method)(requests)
            if name == "Step" and next(self.steps) < HONEST_STEPS:
                return answers
            if name == "FetchEdgeFiles" and any(self.folder.iterdir()):
                return self._files()
            return self.change(self, name, answers, context)

        return grpc.stream_stream_rpc_method_handler(answer)

    def _files(self) -> Iterator[bytes]:
        for path in sorted(self.folder.iterdir()):
            yield pb.FileChunk(name=path.name, data=path.read_bytes()).SerializeToString()


Change = Callable[[HostileCloud, str, Iterator[bytes], Any], Iterator[bytes]]


@contextmanager
def between(target: str, change: Change, folder: Path) -> Iterator[str]:
    """The hostile cloud's address; `folder` holds files to hand out instead of the server's."""
    server = grpc.server(ThreadPoolExecutor(8), options=channel_options(2**30))
    server.add_generic_rpc_handlers((HostileCloud(target, change, folder),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


# ------------------------------------------------------------------------------ what it does


def describing(edit: Callable[[pb.Description, Path], None], more: bytes = b"") -> Change:
    """Another description than the server's."""

    def change(cloud: HostileCloud, name: str, answers: Any, _: Any) -> Iterator[bytes]:
        for answer in answers:
            if name != "Describe":
                yield answer
                continue
            description = pb.Description.FromString(answer)
            edit(description, cloud.folder)
            yield description.SerializeToString() + more

    return change


def config(**changes: Any) -> Change:
    """Another configuration of the model."""

    def edit(description: pb.Description, _: Path) -> None:
        description.config_json = json.dumps(json.loads(description.config_json) | changes)

    return describing(edit)


def nested(description: pb.Description, _: Path) -> None:
    """A configuration that no parser reads."""
    description.config_json = "[" * 100_000


def layers(description: pb.Description, _: Path) -> None:
    """Ten million layers."""
    description.layers.count = 10_000_000


def announced(description: pb.Description, _: Path) -> None:
    """40 GiB of files."""
    next(f for f in description.edge_files if f.name == "edge.safetensors").size = 40 * 2**30


def names(description: pb.Description, _: Path) -> None:
    """Escape sequences where a name is shown."""
    description.fingerprint = "\x1b[2J\x1b]0;owned\x07" * 3


def offering(name: str, content: str) -> Change:
    """One of the server's files replaced by another."""

    def edit(description: pb.Description, folder: Path) -> None:
        del description.edge_files[:]
        (folder / name).write_text(content)
        description.edge_files.extend(describe_files(folder))

    return describing(edit)


def growing_tokenizer() -> str:
    """Rules that double a text forty times."""
    from tokenizers import Tokenizer, models, normalizers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Replace("e", "ee")] * 40)
    return made.to_str()


GROWING_TEMPLATE = (
    "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}"
    "{% endfor %}{{ ns.t }}"
)


def stalling(_: HostileCloud, name: str, answers: Any, __: Any) -> Iterator[bytes]:
    """Files a byte at a time."""
    if name != "FetchEdgeFiles":
        yield from answers
        return
    for _ in range(600):
        time.sleep(0.5)
        yield pb.FileChunk(name="edge.safetensors", data=b"x").SerializeToString()


def frames(make: Callable[[bytes], list[bytes]]) -> Change:
    """Other frames than the server's in every stream."""

    def change(_: HostileCloud, name: str, answers: Any, __: Any) -> Iterator[bytes]:
        for answer in answers:
            yield from make(answer) if name == "Step" else [answer]

    return change


def not_finite(answer: bytes) -> list[bytes]:
    """The same frame with numbers that are none."""
    frame = pb.CloudFrame.FromString(answer)
    if frame.WhichOneof("kind") == "hidden":
        tensor = frame.hidden.hidden
        tensor.data = b"\xff" * len(tensor.data)
    return [frame.SerializeToString()]


EMPTY_PARTS = b"\n\x82\x89\x7a" + b"\n\x00" * 1_000_001
"""A frame of one field with a million empty parts."""
JUNK = pb.CloudFrame(hidden=pb.Hidden(hidden=pb.Tensor(data=bytes(MIB)))).SerializeToString()


def refusing(_: HostileCloud, name: str, answers: Any, context: Any) -> Iterator[bytes]:
    """Every stream ends with escape sequences."""
    if name == "Step":
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "\x1b[2J\nowned " * 100)
    yield from answers


@dataclass(frozen=True)
class Row:
    """What a cloud does, and beside which command."""

    command: str
    change: Change


ROWS = {
    "honest": Row("generate", frames(lambda answer: [answer])),
    "10 million layers": Row("generate", describing(layers)),
    "20 million sites": Row("generate", describing(lambda *_: None, b"\x4a\x00" * 20_000_000)),
    "a configuration nested 100,000 deep": Row("generate", describing(nested)),
    "a layer of 2^31 features": Row("generate", config(intermediate_size=2**31 - 1)),
    "an activation that names code": Row("generate", config(hidden_act="evil/repo")),
    "escape sequences in names": Row("generate", describing(names)),
    "40 GiB of files": Row("generate", describing(announced)),
    "a download that stalls": Row("generate", stalling),
    "a tokenizer that grows": Row("generate", offering("tokenizer.json", growing_tokenizer())),
    "a chat template that grows": Row(
        "generate", offering("chat_template.jinja", GROWING_TEMPLATE)
    ),
    "honest, training": Row("train", frames(lambda answer: [answer])),
    "numbers that are none, after 5 steps": Row("train", frames(not_finite)),
    "a million empty parts, after 5 steps": Row("train", frames(lambda _: [EMPTY_PARTS])),
    "1,000 frames of 1 MiB, after 5 steps": Row("train", frames(lambda a: [a, *[JUNK] * 1000])),
    "refusals with escape sequences, after 5 steps": Row("train", refusing),
}


# ------------------------------------------------------------------------------ one row


def served_folder(folder: Path) -> str:
    """A tiny Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny_folder(folder, 1024)
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    made.save_pretrained(folder)
    return str(folder)


def row(one: Row, address: str, scratch: Path) -> dict[str, Any]:
    """Run the command against this cloud, with an empty cache."""
    offered = scratch / "offered"
    offered.mkdir()
    words = ["generate", "--prompt", "a b", "--max_new_tokens", "4"]
    if one.command == "train":
        data = scratch / "rows.jsonl"
        data.write_text(
            "".join(json.dumps({"prompt": f"{i} ", "completion": "a b"}) + "\n" for i in range(40))
        )
        words = ["train", "--data", str(data), "--output", str(scratch / "run"), "--max_steps", "8"]
        words += ["--batch_size", "2", "--target_modules", "q_proj,v_proj"]

    with between(address, one.change, offered) as hostile:
        started = time.monotonic()
        command = [sys.executable, "-m", "dlora", *words, "--server", hostile]
        environment = os.environ | {"DLORA_CACHE": str(scratch / "cache")}
        with (scratch / "errors").open("w+") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=environment
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            said = errors.read()

    lines = [line for line in said.splitlines() if line.startswith("dlora: ")]
    kept = sorted(scratch.glob("run/checkpoints/checkpoint-*"))
    return {
        "command": f"dlora {one.command}",
        "exit_code": process.returncode,
        "lines": lines,
        "traceback": "Traceback" in said,
        "controls": "\x1b[2J" in said or "\x1b]0" in said,
        "seconds": time.monotonic() - started,
        "memory_mib": usage.ru_maxrss / 1024,
        "kept_step": int(kept[-1].name.rpartition("-")[2]) if kept else None,
    }


def run(words: list[str]) -> None:
    """Every row with these words that the result does not have; written after each."""
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = served_folder(folder / "tiny")
        address, _ = stack.enter_context(serving(model, "--threads", "1"))
        for name, one in ROWS.items():
            if name in found or not set(words) <= set(name.split()):
                continue
            scratch = folder / str(len(found))
            scratch.mkdir()
            found[name] = row(one, address, scratch) | {"provenance": provenance("grpcio")}
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
            RESULT.write_text(json.dumps(found, indent=2) + "\n")


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| what the cloud does | command | exit code | lines of error | seconds | highest memory, "
        "MiB | step kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        errors = f"{len(one['lines'])}{' and a traceback' if one['traceback'] else ''}"
        kept = "" if one["kept_step"] is None else one["kept_step"]
        lines.append(
            f"| {name} | {one['command']} | {one['exit_code']} | {errors} | {one['seconds']:.0f} "
            f"| {one['memory_mib']:.0f} | {kept} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.words)
    print(table(json.loads(RESULT.read_text())))
