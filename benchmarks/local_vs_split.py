"""Split training against local peft: tokens per second and memory, same Trainer, same data, same
head policy.

    python benchmarks/local_vs_split.py run      # about 12 minutes on 2 slow cores
    python benchmarks/local_vs_split.py table    # the tables of docs/benchmarks.md

Both halves of the split run on this machine, in two processes over a loopback socket. Arms
take turns, each in a fresh process, so that drift of the machine hits all of them; threads are
bound to cores in all of them. The first step of each turn is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "local_vs_split.json"
CONFIG = {
    "model": "smollm2",
    "batch_size": 16,
    "length": 48,
    "supervised_tokens_per_row": 8,
    "r": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
    "wire_dtype": "fp16",
    "compute_dtype": "fp32",
    "steps": 4,
    "rounds": 3,
    "seed": 0,
}
HEADS = ("supervised", "all")


def arm(kind: str, head: str, address: str) -> dict[str, Any]:
    """One turn in this process: step times of a short run of transformers' Trainer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import dlora.training.run  # both arms pay for the same imports
    from dlora.cloud.load import load_model

    stack = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = LoraConfig(
        r=CONFIG["r"], lora_alpha=16, target_modules=CONFIG["target_modules"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(CONFIG["seed"])
    if kind == "local":
        model = get_peft_model(load_model(CONFIG["model"]).model, config)
    else:
        import dlora

        model = dlora.get_peft_model(
            dlora.connect(address), config, wire_dtype=CONFIG["wire_dtype"]
        )
        model.set_options(head_positions=head)
    generator = torch.Generator().manual_seed(CONFIG["seed"])
    ids = torch.randint(
        100, 40_000, (CONFIG["batch_size"] * CONFIG["steps"], CONFIG["length"]), generator=generator
    )
    labels = ids.clone()
    labels[:, : -CONFIG["supervised_tokens_per_row"]] = -100
    rows = [{"input_ids": one, "labels": other} for one, other in zip(ids, labels, strict=True)]

    class Times(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *args: Any, **_: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **_: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    class Same(Trainer):
        """The local arm's head on supervised positions alone, as the split model has it by
        itself.
        """

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if kind == "split" or head == "all":
                return super().compute_loss(model, inputs, *args, **kwargs)
            base = model.get_base_model()
            hidden = base.model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state[
                :, :-1
            ]
            wanted = inputs["labels"][:, 1:]
            kept = wanted != -100
            return torch.nn.functional.cross_entropy(base.lm_head(hidden[kept]), wanted[kept])

    arguments = TrainingArguments(
        output_dir="/tmp/unused",
        per_device_train_batch_size=CONFIG["batch_size"],
        num_train_epochs=1,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Same(model=model, args=arguments, train_dataset=rows, callbacks=[Times()])
    trainer.train()
    found = {
        "seconds": Times.seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "stack_mib": stack / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if kind == "split":
        found["sent_bytes"] = model.meter.sent_bytes
        found["received_bytes"] = model.meter.received_bytes
        found["wait_seconds"] = model.meter.wait_s
    return found


def command(kind: str, head: str, address: str) -> list[str]:
    """How to run a turn in a process of its own; its last line is what `arm` found, as JSON."""
    return [sys.executable, __file__, "arm", "--kind", kind, "--head", head, "--address", address]


def run() -> None:
    """All turns, in turn; write the result file."""
    from dlora.cli.demo import SHARED_CORES, serving

    turns = []
    with serving(CONFIG["model"]) as address:
        for number in range(CONFIG["rounds"]):
            for head in HEADS:
                for kind in ("local", "split"):
                    words = command(kind, head, address)
                    environment = (
                        os.environ | SHARED_CORES
                    )  # for both, so that they differ in nothing else
                    done = subprocess.run(
                        words, stdout=subprocess.PIPE, text=True, check=True, env=environment
                    )
                    found = json.loads(done.stdout.splitlines()[-1])
                    turns.append({"round": number, "head": head, "kind": kind, **found})
                    print(number, head, kind, [round(s, 2) for s in found["seconds"]], flush=True)
    from provenance import provenance

    record = {
        "command": "python benchmarks/local_vs_split.py run",
        "config": CONFIG,
        **provenance("grpcio"),
        "turns": turns,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def table(record: dict[str, Any]) -> str:
    """Markdown of the result: throughput, then memory."""
    config, turns = record["config"], record["turns"]
    tokens = config["batch_size"] * config["length"]

    def chosen(head: str, kind: str) -> list[dict[str, Any]]:
        return [turn for turn in turns if turn["head"] == head and turn["kind"] == kind]

    def speed(turn: dict[str, Any]) -> float:
        return tokens / statistics.median(turn["seconds"][1:])

    lines = [
        "| LM head on | local peft, tokens/s | split, tokens/s | ratio (each round) |",
        "|---|---|---|---|",
    ]
    for head in HEADS:
        local, split = ([speed(turn) for turn in chosen(head, kind)] for kind in ("local", "split"))
        ratios = [b / a for a, b in zip(local, split, strict=True)]
        lines.append(
            f"| {head} positions | {statistics.median(local):.0f} | {statistics.median(split):.0f} "
            "| "
            f"**{statistics.median(ratios):.2f}** "
            f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}) |"
        )
    lines += [
        "",
        "| process | peak MiB | of it Python and libraries | of it model and step |",
        "|---|---|---|---|",
    ]
    for head in HEADS:
        for kind, name in (("local", "local peft"), ("split", "edge")):
            peak = statistics.median(turn["peak_mib"] for turn in chosen(head, kind))
            stack = statistics.median(turn["stack_mib"] for turn in chosen(head, kind))
            lines.append(
                f"| {name}, head on {head} positions | {peak:.0f} | {stack:.0f} | "
                f"{peak - stack:.0f} |"
            )
    split = chosen("supervised", "split")[0]
    sent, received = (
        split[name] / config["steps"] / tokens / 1024 for name in ("sent_bytes", "received_bytes")
    )
    losses = max(
        abs(a - b)
        for head in HEADS
        for one, other in zip(chosen(head, "local"), chosen(head, "split"), strict=True)
        for a, b in zip(one["losses"], other["losses"], strict=True)
    )
    lines += ["", f"Traffic: {sent:.1f} KiB up and {received:.1f} KiB down a token. "]
    lines[-1] += f"Largest difference between the two arms' losses: {losses:.4f} nats/token."
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table", "arm"))
    parser.add_argument("--kind", choices=("local", "split"), help=argparse.SUPPRESS)
    parser.add_argument("--head", choices=HEADS, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run()
    elif arguments.what == "table":
        print(table(json.loads(RESULT.read_text())))
    else:
        print(json.dumps(arm(arguments.kind, arguments.head, arguments.address)))
