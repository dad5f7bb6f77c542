"""Speed of decoding: against local peft on loopback, and over distance by the number of active
sites.

    python benchmarks/decoding.py run      # about 10 minutes on 2 slow cores
    python benchmarks/decoding.py table    # the tables of docs/benchmarks.md

Batch 1, greedy, KV cache. Both halves run on this machine, in two processes; threads are bound to
cores in all arms. For a round trip time a relay between them holds every byte back for half
of it in each direction. The answers with and without drafts are compared token by token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from relay import link_to

HERE = Path(__file__).parent
RESULT = HERE / "results" / "decoding.json"
CONFIG = {
    "model": "smollm2",
    "r": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
    "wire_dtype": "fp16",
    "compute_dtype": "fp32",
    "prompt_tokens": 32,
    "loopback_tokens": 64,
    "rounds": 3,
    "distance_tokens": 16,
    "sites": [
        ["plain", 0],
        ["plain", 1],
        ["plain", 4],
        ["plain", 8],
        ["plain", 30],
        ["hosted", 30],
    ],
    "rtt_ms": [0, 20, 80],
    "draft_tokens": 8,
    "draft_sites": 4,
    "draft_rtt_ms": 80,
    "draft_new_tokens": 64,
    "seed": 0,
}
# One answer repeats most of its prompt, the other hardly any of it.
TASKS = {
    "copies its prompt": (
        "Copy this list exactly, and change nothing but the price of the lamp, which is now 45 "
        "euros.\n"
        "oak table, 210 euros; desk lamp, 39 euros; blue armchair, 180 euros; book shelf, 95 "
        "euros; clock, 28 euros"
    ),
    "free answer": "Why do leaves change their colour in autumn?",
}


def measured(model: Any, num_tokens: int, **options: Any) -> dict[str, Any]:
    """One answer of exactly so many tokens: seconds, and what it cost."""
    import torch

    generator = torch.Generator().manual_seed(CONFIG["seed"])
    ids = torch.randint(100, 40_000, (1, CONFIG["prompt_tokens"]), generator=generator)
    options = {
        "max_new_tokens": num_tokens,
        "min_new_tokens": num_tokens,
        "do_sample": False,
    } | options
    meter = getattr(model, "meter", None)
    before = meter.copy() if meter else None
    start = time.perf_counter()
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
    )
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {"seconds": seconds, "tokens": num_tokens, "ids": found[0].tolist()}
    if before is not None:
        cost = meter - before
        result |= {
            "round_trips": cost.round_trips,
            "passes": cost.passes,
            "wait_seconds": cost.wait_s,
        }
        result["bytes"] = cost.sent_bytes + cost.received_bytes
    return result


def make(link: Any, num_sites: int | None = None, wire: str = "plain") -> Any:
    """A split model with adapters at all sites, or at so many, evenly spread."""
    import torch
    from peft import LoraConfig

    import dlora
    from dlora.edge.load import load_base

    if num_sites == 0:
        return load_base(link, wire_dtype=CONFIG["wire_dtype"])
    depth = json.loads(link.description.config_json)["num_hidden_layers"]
    layers = (
        None
        if num_sites is None
        else [round((i + 0.5) * depth / num_sites - 0.5) for i in range(num_sites)]
    )
    config = LoraConfig(
        r=CONFIG["r"], target_modules=CONFIG["target_modules"], layers_to_transform=layers
    )
    torch.manual_seed(CONFIG["seed"])
    return dlora.get_peft_model(
        link,
        config,
        wire=wire,
        wire_dtype=CONFIG["wire_dtype"],
        upload_consent=wire == "hosted",
    ).eval()


def arm_loopback(kind: str, address: str) -> dict[str, Any]:
    """One turn of the loopback comparison, in this process."""
    import torch
    from peft import LoraConfig, get_peft_model

    import dlora
    from dlora.cloud.load import load_model

    if kind == "local":
        config = LoraConfig(
            r=CONFIG["r"], target_modules=CONFIG["target_modules"], task_type="CAUSAL_LM"
        )
        torch.manual_seed(CONFIG["seed"])
        model = get_peft_model(load_model(CONFIG["model"]).model, config).eval()
    else:
        model = make(dlora.connect(address))
    measured(model, 4)  # not counted
    return measured(model, CONFIG["loopback_tokens"])


def arm_distance(address: str) -> list[dict[str, Any]]:
    """Every wire and number of sites at every round trip time."""
    import dlora

    found = []
    for rtt_ms in CONFIG["rtt_ms"]:
        with link_to(address, rtt_ms) as through:
            link = dlora.connect(through)
            for wire, num_sites in CONFIG["sites"]:
                model = make(link, num_sites, wire)
                measured(model, 2)
                found.append(
                    {
                        "rtt_ms": rtt_ms,
                        "wire": wire,
                        "sites": num_sites,
                        **measured(model, CONFIG["distance_tokens"]),
                    }
                )
                print(
                    rtt_ms,
                    wire,
                    num_sites,
                    f"{found[-1]['seconds']:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
            link.close()
    return found


def arm_drafts(address: str) -> list[dict[str, Any]]:
    """Real prompts with and without drafts at the longest round trip time."""
    import torch

    import dlora

    found = []
    with link_to(address, CONFIG["draft_rtt_ms"]) as through:
        link = dlora.connect(through)
        tokenizer = dlora.load_tokenizer(link)
        model = make(link, CONFIG["draft_sites"])
        for task, prompt in TASKS.items():
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            for drafts in (0, CONFIG["draft_tokens"]):
                options = {"prompt_lookup_num_tokens": drafts} if drafts else {}
                before = model.meter.copy()
                start = time.perf_counter()
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=CONFIG["draft_new_tokens"],
                    do_sample=False,
                    pad_token_id=0,
                    **options,
                )
                seconds, cost = time.perf_counter() - start, model.meter - before
                new = out[0, ids.shape[1] :].tolist()
                found.append(
                    {
                        "task": task,
                        "drafts": drafts,
                        "seconds": seconds,
                        "tokens": len(new),
                        "ids": new,
                        "round_trips": cost.round_trips,
                        "passes": cost.passes,
                        "bytes": cost.sent_bytes + cost.received_bytes,
                    }
                )
                print(task, drafts, f"{seconds:.1f} s", file=sys.stderr, flush=True)
        link.close()
    return found


# ----------------------------------------------------------------- all of it


def run() -> None:
    """All arms; write the result file."""
    from dlora.cli.demo import SHARED_CORES, serving

    def arm(*words: str) -> Any:
        environment = os.environ | SHARED_CORES  # for both, so that they differ in nothing else
        command = [sys.executable, __file__, "arm", *words]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=environment
        )
        return json.loads(done.stdout.splitlines()[-1])

    turns = []
    with serving(CONFIG["model"]) as address:
        for number in range(CONFIG["rounds"]):
            for kind in ("local", "split"):
                turns.append(
                    {"round": number, "kind": kind, **arm("--kind", kind, "--address", address)}
                )
                print(
                    number,
                    kind,
                    f"{turns[-1]['tokens'] / turns[-1]['seconds']:.2f} tokens/s",
                    flush=True,
                )
        distance = arm("--kind", "distance", "--address", address)
        drafts = arm("--kind", "drafts", "--address", address)
    from provenance import provenance

    record = {
        "command": "python benchmarks/decoding.py run",
        "config": CONFIG,
        **provenance("grpcio"),
        "loopback": turns,
        "distance": distance,
        "drafts": drafts,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def table(record: dict[str, Any]) -> str:
    """Markdown of the result: loopback, distance, drafts."""
    config = record["config"]

    def speeds(kind: str) -> list[float]:
        return [
            turn["tokens"] / turn["seconds"] for turn in record["loopback"] if turn["kind"] == kind
        ]

    local, split = speeds("local"), speeds("split")
    ratios = [b / a for a, b in zip(local, split, strict=True)]
    same = all(turn["ids"] == record["loopback"][0]["ids"] for turn in record["loopback"])
    lines = [
        "| local peft, tokens/s | split on loopback, tokens/s | ratio (each round) | same tokens |",
        "|---|---|---|---|",
        f"| {statistics.median(local):.1f} | {statistics.median(split):.1f} | "
        f"**{statistics.median(ratios):.2f}** "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {'yes' if same else 'no'} |",
        "",
        "| wire | active sites | round trips a token | KiB a token | "
        + " | ".join(f"{rtt} ms, tokens/s" for rtt in config["rtt_ms"])
        + " | same tokens as plain |",
        "|---" * (5 + len(config["rtt_ms"])) + "|",
    ]
    for wire, sites in config["sites"]:
        row = [one for one in record["distance"] if [one["wire"], one["sites"]] == [wire, sites]]
        speed = [f"{one['tokens'] / one['seconds']:.2f}" for one in row]
        trips = row[0]["round_trips"] / row[0]["tokens"]
        size = row[0]["bytes"] / row[0]["tokens"] / 1024
        plain = {tuple(one["ids"]) for one in record["distance"] if one["wire"] == "plain"}
        alike = "yes" if {tuple(one["ids"]) for one in row} <= plain else "no"
        lines.append(
            f"| {wire} | {sites} | {trips:.0f} | {size:.0f} | {' | '.join(speed)} | {alike} |"
        )
    lines += [
        "",
        f"| answer ({config['draft_sites']} sites, {config['draft_rtt_ms']} ms) | drafts | tokens "
        "| passes | "
        "round trips a token | tokens/s | gain | same answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(one["task"] for one in record["drafts"]):
        plain, drafted = (one for one in record["drafts"] if one["task"] == task)
        for one in (plain, drafted):
            speed = one["tokens"] / one["seconds"]
            gain = "" if one is plain else f"**{speed / (plain['tokens'] / plain['seconds']):.2f}**"
            same = "" if one is plain else "yes" if one["ids"] == plain["ids"] else "no"
            lines.append(
                f"| {task} | {one['drafts'] or 'none'} | {one['tokens']} | {one['passes']} | "
                f"{one['round_trips'] / one['tokens']:.1f} | {speed:.2f} | {gain} | {same} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table", "arm"))
    parser.add_argument(
        "--kind", choices=("local", "split", "distance", "drafts"), help=argparse.SUPPRESS
    )
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run()
    elif arguments.what == "table":
        print(table(json.loads(RESULT.read_text())))
    elif arguments.kind == "distance":
        print(json.dumps(arm_distance(arguments.address)))
    elif arguments.kind == "drafts":
        print(json.dumps(arm_drafts(arguments.address)))
    else:
        print(json.dumps(arm_loopback(arguments.kind, arguments.address)))
