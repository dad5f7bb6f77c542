"""Every architecture that the installed transformers maps to a causal LM, split and whole.

    python benchmarks/families.py run      # goes on where it was; --again: from the beginning
    python benchmarks/families.py table    # the table of docs/models.md

Each is built tiny and random (`tiny_models.py`), in a process of its own with a time limit, and
becomes one line of results/families.jsonl. Both halves run in that process, over the frames that
would travel. What is compared with peft on the whole model: the adapter at its start, loss and
every gradient with all linear modules adapted, padding on each side, greedy answers with a cache,
the saved adapter, edge layers; loss and gradients on a base in 4 bits, with peft on the same
weights dequantised (the kinds of `--quantize` differ in how a weight is coded, and int4 needs no
package); and the same of fused experts on the hosted wire.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "families.jsonl"
TIME_LIMIT_S = 300.0
TOLERANCE = 1e-4
RIGHT, REFUSED, WRONG, CRASH, NOT_BUILT = "right", "refused", "wrong", "crash", "not built"
NEW_TOKENS = 6


class Wrong(Exception):
    """A result that differs from the whole model's, without a word."""


# ----------------------------------------------------------------- one architecture


def check(model_type: str, *, thorough: bool = True) -> dict[str, Any]:
    """One line of the result: what became of an architecture.

    Unless `thorough`, the saved adapter, edge layers, low bits and fused experts are left out.
    """
    import torch
    from tiny_models import NotBuilt, build

    torch.set_num_threads(1)
    start, stage = time.process_time(), ["build"]
    record: dict[str, Any] = {"architecture": model_type}
    try:
        base = build(model_type)
        record["class"] = type(base).__name__
        record["status"] = RIGHT
        _compare(base, record, stage, thorough)
    except NotBuilt as error:
        record |= {"status": NOT_BUILT, "why": str(error)}
    except Wrong as error:
        record |= {"status": WRONG, "stage": stage[0], "why": str(error)}
    except Exception as error:
        refused = stage[0] == "load" and type(error).__name__ == "ModelError"
        text = " ".join(str(error).split())[:300]
        record |= {
            "status": REFUSED if refused else CRASH,
            "stage": stage[0],
            "why": text if refused else f"{type(error).__name__}: {text}",
        }
    record["seconds"] = round(time.process_time() - start, 2)
    return record


def _compare(base: Any, record: dict[str, Any], stage: list[str], thorough: bool) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    import dlora

    stage[0] = "load"
    started = time.process_time()
    link = dlora.in_process(copy.deepcopy(base), model_id=f"tiny/{record['architecture']}")
    record["load_s"] = round(time.process_time() - started, 2)

    stage[0] = "all linear"
    config = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    split = dlora.get_peft_model(
        link, LoraConfig(**config, target_modules="all-linear"), wire_dtype="fp32"
    )
    targets = sorted(split.peft_config["default"].target_modules)
    torch.manual_seed(1)
    whole = get_peft_model(copy.deepcopy(base), LoraConfig(**config, target_modules=targets))
    record["modules"] = len(split.adapted_modules)
    record["left_out"] = len(getattr(link.cloud, "unusable", ()))
    for name, parameter in _adapter(whole).items():
        if not torch.equal(parameter, _adapter(split)[name]):
            raise Wrong(f"{name} starts with other values")

    for side in ("right", "left"):
        stage[0] = f"train, padded on the {side}"
        record[f"gap_{side}"] = _train(whole, split, _batch(side))
    for padded in (False, True):
        stage[0] = "generate, padded" if padded else "generate"
        record["cache"] = _generate(whole.eval(), split.eval(), padded)
    if thorough:
        stage[0] = "save"
        _save(base, link, split)
        stage[0] = "edge layers"
        record["edge_layers"] = _edge_layers(base, split, targets)
        stage[0] = "low bits"
        record["low_bit"] = _low_bit(base, config)
        stage[0] = "experts"
        record["experts_hosted"] = _experts(base, link)
    record["experts"] = any(
        parameter.dim() == 3 and "conv" not in name for name, parameter in base.named_parameters()
    )
    link.close()


def _adapter(model: Any) -> dict[str, Any]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def _batch(side: str) -> dict[str, Any]:
    import torch
    from tiny_models import VOCAB

    ids = torch.randint(5, VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    columns, lengths = torch.arange(11)[None], torch.tensor([[11], [8], [5]])
    mask = (columns < lengths if side == "right" else columns >= 11 - lengths).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def _train(whole: Any, split: Any, batch: dict[str, Any]) -> float:
    """The largest relative difference of the loss and of any gradient. Raises Wrong."""
    import torch

    losses = []
    for model in (whole, split):
        model.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
    worst = abs(losses[0].item() - losses[1].item()) / abs(losses[0].item())
    if not worst <= TOLERANCE:
        raise Wrong(f"the loss differs by {worst:.2g} of itself")

    wanted = {name: one.grad for name, one in _adapter(whole).items()}
    scale = max(grad.norm().item() for grad in wanted.values() if grad is not None)
    for name, parameter in _adapter(split).items():
        want = torch.zeros_like(parameter) if wanted[name] is None else wanted[name]
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gap = ((got - want).norm() / max(want.norm().item(), 1e-3 * scale)).item()
        if not gap <= TOLERANCE:
            raise Wrong(f"the gradient of {name} differs by {gap:.2g} of its norm")
        worst = max(worst, gap)
    return float(f"{worst:.2g}")


def _generate(whole: Any, split: Any, padded: bool) -> bool:
    """Whether the split answered with a cache. Raises Wrong for other tokens."""
    import torch
    from tiny_models import VOCAB

    ids = torch.randint(5, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    options = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    with torch.no_grad():
        want, got = (model.generate(**batch, **options) for model in (whole, split))
    if torch.equal(want.sequences, got.sequences):
        return split.meter.passes > 0

    # Two best tokens may be as good as each other: up to there all numbers have to agree.
    for step, (one, other) in enumerate(zip(want.logits, got.logits, strict=False)):
        gap = ((one - other).abs().max() / one.abs().max()).item()
        if not gap <= TOLERANCE:
            raise Wrong(f"logits of new token {step} differ by {gap:.2g} of the largest")
        if not torch.equal(one.argmax(-1), other.argmax(-1)):
            break
    return split.meter.passes > 0


def _save(base: Any, link: Any, split: Any) -> None:
    """The saved adapter loads in peft and here, and gives the same loss."""
    import torch
    from peft import PeftModel

    import dlora

    batch = _batch("right")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        split.save_pretrained(folder)
        want = split(**batch).loss.item()
        for model in (
            PeftModel.from_pretrained(copy.deepcopy(base), folder).eval(),
            dlora.load_adapter(link, folder, wire_dtype="fp32").eval(),
        ):
            got = model(**batch).loss.item()
            if not abs(got - want) <= TOLERANCE * abs(want):
                raise Wrong(f"the saved adapter has loss {got}, not {want}")


def _edge_layers(base: Any, split: Any, targets: list[str]) -> bool:
    """Whether edges may run the first and the last layer. Raises Wrong for another loss."""
    import torch
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    import dlora
    from dlora.cloud.limits import Limits
    from dlora.cloud.model import CloudModel
    from dlora.embedded import InProcessLink
    from dlora.errors import ModelError, UsageError

    limits = Limits(edge_first=1, edge_last=1)
    try:
        cloud = CloudModel(copy.deepcopy(base), model_id="tiny/model", limits=limits)
    except (ModelError, UsageError):
        return False
    link = InProcessLink(cloud)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    options = {"edge_layers": (1, 1), "wire_dtype": "fp32"}
    other = dlora.get_peft_model(link, config, **options).eval()
    set_peft_model_state_dict(other, get_peft_model_state_dict(split, save_embedding_layers=False))
    with torch.no_grad():
        want, got = (model(**_batch("right")).loss.item() for model in (split, other))
    if not abs(got - want) <= TOLERANCE * abs(want):
        raise Wrong(f"with edge layers the loss is {got}, not {want}")
    link.close()
    return True


def _low_bit(base: Any, config: dict[str, Any]) -> bool:
    """Whether the model is served with weights in 4 bits. Raises Wrong for another loss or gradient
    than of peft on these weights.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    import dlora
    from dlora.cloud.quantize import QuantizedLinear, quantize
    from dlora.errors import ModelError

    low, full = copy.deepcopy(base), copy.deepcopy(base)
    try:
        quantize(low, "int4")
    except ModelError:
        return False
    with torch.no_grad():
        for name, module in low.named_modules():
            if isinstance(module, QuantizedLinear):
                full.get_submodule(name).weight.copy_(module.weight)
    try:
        link = dlora.in_process(low, model_id="tiny/model")
    except ModelError:
        return False
    torch.manual_seed(1)
    options = LoraConfig(**config, target_modules="all-linear")
    split = dlora.get_peft_model(link, options, wire_dtype="fp32")
    targets = sorted(split.peft_config["default"].target_modules)
    torch.manual_seed(1)
    whole = get_peft_model(full, LoraConfig(**config, target_modules=targets))
    _train(whole, split, _batch("right"))
    link.close()
    return True


def _experts(base: Any, link: Any) -> bool:
    """Whether fused experts can be adapted on the hosted wire. Raises Wrong for other results."""
    import torch
    from peft import LoraConfig, get_peft_model

    import dlora

    names = sorted(one.name for one in link.description.experts)
    if not names:
        return False
    config = {"r": 3, "lora_alpha": 7, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    config |= {"target_modules": [], "target_parameters": names}
    options = {"wire": "hosted", "upload_consent": True, "wire_dtype": "fp32"}
    torch.manual_seed(1)
    split = dlora.get_peft_model(link, LoraConfig(**config), **options)
    torch.manual_seed(1)
    whole = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    for side in ("right", "left"):
        _train(whole, split, _batch(side))
    for padded in (False, True):
        _generate(whole.eval(), split.eval(), padded)
    return True


# ----------------------------------------------------------------- all of them


def run(names: list[str], result: Path, jobs: int) -> None:
    """Check what is not in the result yet, each in a process forked from this one."""
    _import_once()
    from tiny_models import architectures

    result.parent.mkdir(exist_ok=True)
    kept = load_results(result)
    result.write_text("".join(json.dumps(one) + "\n" for one in kept))
    done = {one["architecture"] for one in kept}
    waiting = [name for name in names or architectures() if name not in done]
    running: dict[int, tuple[str, int, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            reader, pid = _fork(lambda name=name: check(name))
            running[reader] = (name, pid, time.monotonic())
        ready, _, _ = select.select(list(running), [], [], 0.5)
        for reader, (name, pid, since) in list(running.items()):
            if reader not in ready and time.monotonic() - since < TIME_LIMIT_S:
                continue
            record = _take(reader, pid, name, timed_out=reader not in ready)
            del running[reader]
            with result.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{name:28} {record['status']:10} {record.get('why', '')[:90]}", flush=True)
    rows = load_results(result)
    print(f"{summary(rows)}; {took(rows)}")


def _import_once() -> None:
    """What every check needs, so that a forked process begins at once."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import peft  # noqa: F401
    import tiny_models  # noqa: F401
    import torch

    import dlora.edge.load
    import dlora.embedded  # noqa: F401

    torch.set_num_threads(1)


def _fork(work: Callable[[], dict[str, Any]]) -> tuple[int, int]:
    """Do the work in a process of its own; (where its result can be read, the process)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return reader, pid
    os.close(reader)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(null, stream)
    with os.fdopen(writer, "w") as pipe:
        pipe.write(json.dumps(work()))
    os._exit(0)


def _take(reader: int, pid: int, name: str, *, timed_out: bool) -> dict[str, Any]:
    """The result of a process that has one, is dead, or took too long."""
    if timed_out:
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    if text:
        return json.loads(text)
    why = f"no answer within {TIME_LIMIT_S:.0f} s" if timed_out else "the process died"
    return {"architecture": name, "status": CRASH, "stage": "?", "why": why}


# ----------------------------------------------------------------- what came of it


def load_results(result: Path = RESULT) -> list[dict[str, Any]]:
    """The lines of a result, by architecture; what was cut off while it was written is none."""
    rows = []
    for line in result.read_text().splitlines() if result.is_file() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return sorted(rows, key=lambda one: one["architecture"])


def summary(rows: list[dict[str, Any]]) -> str:
    """How many of each, in one line."""
    counts = Counter(one["status"] for one in rows)
    return ", ".join(f"{counts[s]} {s}" for s in (RIGHT, REFUSED, WRONG, CRASH, NOT_BUILT))


def took(rows: list[dict[str, Any]]) -> str:
    """The processor time of all checks."""
    return f"{sum(one.get('seconds', 0.0) for one in rows) / 60:.0f} minutes of one core"


def table(rows: list[dict[str, Any]]) -> str:
    """What works, by architecture, and in what words the others are refused."""
    lines = [
        "| architecture | cached answers | linears left out | has fused experts | edge layers "
        "| low-bit |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows:
        if one["status"] == RIGHT:
            lines.append(
                f"| {one['architecture']} | {_yes(one['cache'])} | {one['left_out'] or ''} | "
                f"{_experts_in_words(one)} | {_yes(one['edge_layers'])} | "
                f"{_yes(one['low_bit']) if 'low_bit' in one else ''} |"
            )
    lines += ["", "| refused | why |", "|---|---|"]
    for one in rows:
        if one["status"] != RIGHT:
            reason = one["why"].replace("|", "/")
            lines.append(f"| {one['architecture']} | {one['status']}: {reason} |")
    return "\n".join([f"{summary(rows)}.", "", *lines])


def _experts_in_words(one: dict[str, Any]) -> str:
    """Whether there are any, and whether they can be adapted, where that was tried."""
    tried = {True: ", adapted", False: ", not adapted", None: ""}[one.get("experts_hosted")]
    return f"yes{tried}" if one["experts"] else "no"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("names", nargs="*", help="architectures; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--again", action="store_true", help="forget what the result has")
    arguments = parser.parse_args()
    if arguments.what == "table":
        print(table(load_results(arguments.result)))
    else:
        if arguments.again:
            arguments.result.unlink(missing_ok=True)
        run(arguments.names, arguments.result, arguments.jobs)
