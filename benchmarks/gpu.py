"""A GPU's first day: does every kind of path give on it what it gives on a CPU, and how fast?

    python benchmarks/gpu.py run                 # on a machine with a GPU; some minutes
    python benchmarks/gpu.py run --device cpu    # tiny models on a CPU: tries this file, no more
    python benchmarks/gpu.py table               # what benchmarks/results/gpu.json says

Needs nothing but this repository, installed, and a GPU: models are random, in shapes that are
written below. Says what passed, failed or was left out, one line each, and writes the result file.
Never run on a GPU by the authors: send the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "gpu.json"
WIRES = ("plain", "factored", "hosted")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Largest distance from local peft on the same device, as a share of the largest gradient. In bf16
# both sides round at every operation, and the split rounds a delta once more.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.1}
TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# About 1.1 billion parameters: large enough that a GPU is not idle between two kernels.
LARGE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


class Skipped(Exception):
    """This machine lacks what a check needs."""


@dataclass
class Bench:
    """Where checks run, how large, and what they found."""

    device: str
    quick: bool
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, tuple[str, str]]:
        """Name -> (device of the cloud, device of the edge)."""
        gpu = self.device
        if gpu == "cpu":
            return {"both": (gpu, gpu)}
        return {"cloud": (gpu, "cpu"), "edge": ("cpu", gpu), "both": (gpu, gpu)}

    def check(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run one check; note and print how it went."""
        start = time.perf_counter()
        try:
            one = {"outcome": "passed", **run()}
        except Skipped as reason:
            one = {"outcome": "left out", "reason": str(reason)}
        except Exception as error:
            one = {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
            one["trace"] = traceback.format_exc(limit=-4)
        one["seconds"] = round(time.perf_counter() - start, 2)
        self.found[name] = one
        shown = {k: v for k, v in one.items() if k not in ("outcome", "seconds", "trace")}
        print(f"{one['outcome']:8} {name}: {shown}", flush=True)


# ----------------------------------------------------------------- models


def base(shape: dict[str, int], dtype: str) -> Any:
    """A random Llama on the CPU, its weights large enough that every path matters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
    if shape is TINY:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08)
    return model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()


def lora(**options: Any) -> Any:
    """A LoRA whose B is not zero."""
    from peft import LoraConfig

    defaults = {"r": 8, "target_modules": TARGETS, "init_lora_weights": False}
    return LoraConfig(**(defaults | {"task_type": "CAUSAL_LM"} | options))


@contextmanager
def served(model: Any, **limits: Any) -> Iterator[Any]:
    """A connection over a socket to a server of this process."""
    import dlora
    from dlora.cloud.limits import Limits
    from dlora.cloud.model import CloudModel
    from dlora.server.server import Server, ServerOptions

    cloud = CloudModel(model, model_id="random/llama", limits=Limits(**limits))
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(Server(cloud, options=ServerOptions(drain_s=0.0)))
        link = dlora.connect(server.address, cache=Path(cache))
        stack.callback(link.close)
        yield link


def split(link: Any, device: str, wire: Any = "plain", **options: Any) -> Any:
    """An adapter on the served model, the same one as `local` has."""
    import torch

    import dlora

    config = options.pop("config", None) or lora()
    torch.manual_seed(1)
    exact = {"wire_dtype": "fp32", "wire": wire, "upload_consent": wire == "hosted"}
    return dlora.get_peft_model(link, config, device=device, **(exact | options))


def local(model: Any, device: str) -> Any:
    """The reference: peft on the whole model."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, lora()).to(device)


def batch(device: str, vocab: int, rows: int = 3, length: int = 16) -> dict[str, Any]:
    """Random tokens, the last row padded."""
    import torch

    ids = torch.randint(5, vocab, (rows, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    values = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(device) for name, value in values.items()}


def step(model: Any, device: str) -> tuple[float, dict[str, Any]]:
    """Loss and gradients on the CPU of one micro-batch."""
    loss = model(**batch(device, TINY["vocab_size"])).loss
    loss.backward()
    grads = {
        name: parameter.grad.detach().float().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), grads


def gap(got: dict[str, Any], want: dict[str, Any]) -> float:
    """Largest distance of gradients, as a share of each tensor's largest value."""
    if not want or got.keys() != want.keys():
        raise ValueError(
            f"gradients of {sorted(got.keys() ^ want.keys())[:3]} are on one side only"
        )
    shares = [
        ((got[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-12)).item()
        for name, grad in want.items()
    ]
    return max(shares)


def within(value: float, limit: float) -> dict[str, Any]:
    """A gap that is small enough. Raises ValueError for another."""
    if not value <= limit:
        raise ValueError(f"gap {value:.3g}, want at most {limit:g}")
    return {"gap": value, "limit": limit}


# ----------------------------------------------------------------- right or wrong


def parity(bench: Bench) -> None:
    """Gradients against local peft: every wire, both dtypes, cloud and edge on either side."""
    for dtype in TOLERANCES:
        wanted: dict[str, Any] = {}

        def reference(dtype: str = dtype, wanted: dict[str, Any] = wanted) -> dict[str, Any]:
            wanted["loss"], wanted["grads"] = step(
                local(base(TINY, dtype), bench.device), bench.device
            )
            return {"loss": wanted["loss"]}

        bench.check(f"local peft {dtype}", reference)
        for place, (cloud, edge) in bench.places.items():
            for recompute in (False, True):
                again = ", layers run again" if recompute else ""
                try:
                    model = base(TINY, dtype).to(cloud)
                    with served(model, recompute=recompute) as link:
                        for wire in WIRES:
                            bench.check(
                                f"parity {dtype}, on the GPU: {place}, {wire}{again}",
                                partial(compared, link, edge, wire, wanted, TOLERANCES[dtype]),
                            )
                except Exception as error:
                    bench.check(f"serving {dtype} on {cloud}{again}", lambda e=error: throw(e))


def compared(
    link: Any, edge: str, wire: str, wanted: dict[str, Any], limit: float
) -> dict[str, Any]:
    """One step of the split against what local peft found."""
    return within(gap(step(split(link, edge, wire), edge)[1], wanted["grads"]), limit)


def throw(error: Exception) -> dict[str, Any]:
    """Let a check fail with this."""
    raise error


def options(bench: Bench) -> None:
    """What else a step may be: dropout, frozen modules, edge layers, parts in flight."""
    cases: dict[str, dict[str, Any]] = {
        "edge layers": {"edge_layers": (1, 1)},
        "parts in flight": {"in_flight": 2},
        "frozen modules": {},
    }
    for name, case in cases.items():

        def run(name: str = name, case: dict[str, Any] = case) -> dict[str, Any]:
            found = []
            for cloud, edge in (("cpu", "cpu"), (bench.device, bench.device)):
                with served(base(TINY, "fp32").to(cloud), edge_first=1, edge_last=1) as link:
                    model = split(link, edge, **case)
                    if name == "frozen modules":
                        model.set_active(model.adapted_modules[::2], "cloud")
                    found.append(step(model, edge)[1])
            return within(gap(found[1], found[0]), TOLERANCES["fp32"])

        bench.check(f"{name}, GPU against CPU", run)


def low_bit(bench: Bench) -> None:
    """Kernels of `--quantize`: dequantised weights, and gradients through them."""
    from dlora.cloud.quantize import KINDS, QuantizedLinear, quantize

    for kind in KINDS:

        def run(kind: str = kind) -> dict[str, Any]:
            here = base(TINY, "fp32")
            quantize(here, kind)
            weights = {
                name: module.weight
                for name, module in here.named_modules()
                if isinstance(module, QuantizedLinear)
            }
            with served(here) as link:
                want = step(split(link, "cpu"), "cpu")[1]
            there = base(TINY, "fp32")
            quantize(there, kind)
            there.to(bench.device)
            off = max(
                (there.get_submodule(name).weight.cpu() - weight).abs().max().item()
                for name, weight in weights.items()
            )
            with served(there) as link:
                got = step(split(link, "cpu"), "cpu")[1]
            return {"weights_off": off} | within(gap(got, want), TOLERANCES["fp32"])

        bench.check(f"quantize {kind}, GPU against CPU", run)


def placement(bench: Bench) -> None:
    """One model over two GPUs, over GPU and memory, over GPU and disk."""
    import torch

    count = torch.cuda.device_count() if bench.device != "cpu" else 0
    first: Any = 0 if count else "cpu"
    second: dict[str, Any] = {"two GPUs": 1, "memory": "cpu", "disk": "disk"}
    for name, other in second.items():

        def run(name: str = name, other: Any = other) -> dict[str, Any]:
            if (name == "two GPUs" and count < 2) or (name == "memory" and not count):
                raise Skipped(f"{count} GPUs are here")
            import dlora.cloud.load as loading

            with tempfile.TemporaryDirectory() as scratch:
                folder, file = Path(scratch) / "model", Path(scratch) / "map.json"
                base(TINY, "fp32").save_pretrained(folder)
                parts = dict.fromkeys(
                    ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"),
                    first,
                )
                parts |= {"lm_head": first, "model.layers.1": other, "model.layers.2": other}
                file.write_text(json.dumps(parts))
                found = []
                for device_map in (None, str(file)):
                    model = loading.load_model(str(folder), device_map=device_map).model
                    with served(model) as link:
                        found.append(step(split(link, "cpu"), "cpu")[1])
            return within(gap(found[1], found[0]), TOLERANCES["fp32"])

        bench.check(f"device_map over {name}", run)


def decoding_is_local(bench: Bench) -> None:
    """Greedy tokens with a KV cache, against local peft."""

    def run() -> dict[str, Any]:
        asked = {
            k: v for k, v in batch(bench.device, TINY["vocab_size"], 1).items() if k != "labels"
        }
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        asked["attention_mask"].fill_(1)
        want = local(base(TINY, "fp32"), bench.device).eval().generate(**asked, **options)
        with served(base(TINY, "fp32").to(bench.device)) as link:
            got = split(link, bench.device).eval().generate(**asked, **options)
        if got.tolist() != want.tolist():
            raise ValueError(f"got {got.tolist()}, want {want.tolist()}")
        return {"tokens": want.shape[1]}

    bench.check("greedy tokens are those of local peft", run)


# ----------------------------------------------------------------- how fast


def speed(bench: Bench) -> None:
    """Tokens per second of training, of many edges, and of decoding, beside local peft."""
    shape, rows, length = (TINY, 2, 16) if bench.quick else (LARGE, 8, 512)
    steps = 2 if bench.quick else 6
    dtype = "fp32" if bench.device == "cpu" else "bf16"
    config = lora(target_modules=TARGETS[:3])
    data = batch(bench.device, shape["vocab_size"], rows, length)

    def rate(model: Any) -> float:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            model(**data).loss.backward()
            synchronize(bench.device)
            times.append(time.perf_counter() - start)
        return rows * length / statistics.median(times[1:])

    def whole() -> dict[str, Any]:
        from peft import get_peft_model

        model = get_peft_model(base(shape, dtype), config).to(bench.device)
        return {"tokens_per_s": rate(model), "decoding": decoding(model, bench, shape)}

    bench.check(f"speed of local peft, {dtype}", whole)
    try:
        with served(base(shape, dtype).to(bench.device)) as link:
            for wire in WIRES:
                bench.check(
                    f"speed of the split, {wire}, {dtype}",
                    lambda wire=wire: {
                        "tokens_per_s": rate(
                            split(link, bench.device, wire, config=config, wire_dtype="bf16")
                        )
                    },
                )
            bench.check(
                "speed of decoding, split",
                lambda: {
                    "decoding": decoding(split(link, bench.device, config=config), bench, shape)
                },
            )
            for count in (1, 2) if bench.quick else (1, 4, 8):
                bench.check(
                    f"speed of {count} edges",
                    lambda count=count: edges(link.address, count, bench, config, data),
                )
    except Exception as error:
        bench.check("serving the large model", lambda e=error: throw(e))


def synchronize(device: str) -> None:
    """Wait for what a device was given to do."""
    import torch

    if device != "cpu":
        torch.get_device_module(device).synchronize()


def decoding(model: Any, bench: Bench, shape: dict[str, int]) -> float:
    """Tokens per second of one greedy answer, its first left out."""
    import torch

    ids = batch(bench.device, shape["vocab_size"], 1, 32)["input_ids"]
    seconds = []
    for tokens in (2, 6 if bench.quick else 66):
        options: dict[str, Any] = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        start = time.perf_counter()
        with torch.no_grad():
            model.eval().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        synchronize(bench.device)
        seconds.append(time.perf_counter() - start)
    model.train()
    return (4 if bench.quick else 64) / max(1e-9, seconds[1] - seconds[0])


def edges(
    address: str, count: int, bench: Bench, config: Any, data: dict[str, Any]
) -> dict[str, Any]:
    """Tokens per second of so many edges together, each a thread with its own connection."""
    import dlora

    steps = 1 if bench.quick else 4
    links = [dlora.connect(address) for _ in range(count)]
    models = [split(link, "cpu", "factored", config=config, wire_dtype="bf16") for link in links]
    here = {name: value.cpu() for name, value in data.items()}
    errors: list[BaseException] = []

    def train(model: Any) -> None:
        try:
            for _ in range(steps):
                model(**here).loss.backward()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(model,)) for model in models]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    for link in links:
        link.close()
    if errors:
        raise errors[0]
    return {"tokens_per_s": count * steps * here["input_ids"].numel() / took}


# ----------------------------------------------------------------- the command


def run(device: str, quick: bool) -> dict[str, Any]:
    """All checks; the outcome of each by its name."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"device {device}: torch finds no GPU; --device cpu tries this file only")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bench = Bench(device, quick or device == "cpu")
    for part in (parity, options, low_bit, placement, decoding_is_local, speed):
        part(bench)
    name = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "checks": bench.found}


def table(result: dict[str, Any]) -> str:
    """Markdown: how many passed, and every line that is not just that."""
    counts: dict[str, int] = {}
    for one in result["checks"].values():
        counts[one["outcome"]] = counts.get(one["outcome"], 0) + 1
    lines = [
        f"On {result['device']}: " + ", ".join(f"{n} {what}" for what, n in counts.items()) + ".",
        "",
        "| check | outcome | |",
        "|---|---|---|",
    ]
    for name, one in result["checks"].items():
        values = {k: v for k, v in one.items() if k not in ("outcome", "trace", "seconds")}
        shown = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
        )
        lines.append(f"| {name} | {one['outcome']} | {shown} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """The command; 1 where a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--device", default="cuda:0", help="cuda:0 by default")
    parser.add_argument("--quick", action="store_true", help="tiny models for speeds as well")
    parser.add_argument("--output", type=Path, default=RESULT, help="where the result goes")
    arguments = parser.parse_args(words)
    if arguments.what == "table":
        print(table(json.loads(arguments.output.read_text())))
        return 0

    from provenance import provenance

    result = run(arguments.device, arguments.quick) | provenance("accelerate")
    if arguments.device == "cpu" and arguments.output == RESULT:
        print("a CPU's result is not written; name a file with --output")
    else:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    failed = [name for name, one in result["checks"].items() if one["outcome"] == "failed"]
    print(f"{len(failed)} of {len(result['checks'])} failed", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
