"""Two recipes of tinker-cookbook, unchanged, against `dlora tinker`: supervised, and reinforcement.

    pip install "tinker-cookbook[math-rl]"
    python benchmarks/cookbook.py run      # about 20 minutes on 2 slow cores
    python benchmarks/cookbook.py table    # the figures of docs/tinker.md

The recipes load their data sets and a tokenizer by names of a hub. Here folders of these names are
made in the folder in which they run: the demo's messages in place of no_robots, one request, to
write a number, in place of gsm8k, SmolLM2's tokenizer as that of the model. `dlora tinker` serves
SmolLM2 under that model's name. Nothing else is changed but $TINKER_BASE_URL.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "cookbook.json"
NAME = "Qwen/Qwen3-8B-Base"  # one that the cookbook knows a renderer for: plain text with roles
CONFIG: dict[str, Any] = {
    "model": "smollm2",
    "serve": [],
    "tinker": ["--batch_size", "32"],
    "requests": 64,
    "recipes": {
        "sl_loop": {
            "batch_size": 16,
            "learning_rate": 5e-4,
            "lora_rank": 8,
            "max_length": 128,
            "max_steps": 10,
            "save_every": 5,
        },
        "rl_loop": {
            "batch_size": 2,
            "group_size": 8,
            "learning_rate": 1e-3,
            "lora_rank": 8,
            "max_steps": 6,
            "max_tokens": 10,
            "loss_fn": "importance_sampling",
            "save_every": 3,
        },
    },
}


def write_data(folder: Path) -> None:
    """The two data sets, in the columns of those that the recipes load."""
    from dlora.cli.demo import data_file

    talks = folder / "HuggingFaceH4" / "no_robots" / "data"
    talks.mkdir(parents=True)
    for ours, theirs in (("train.jsonl", "train.jsonl"), ("heldout.jsonl", "test.jsonl")):
        with (talks / theirs).open("w", encoding="utf-8") as out:
            for line in data_file(ours).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                says = (("user", row["prompt"]), ("assistant", row["completion"].strip()))
                messages = [{"role": role, "content": text} for role, text in says]
                out.write(json.dumps({"messages": messages}) + "\n")

    requests = folder / "openai" / "gsm8k" / "main"
    requests.mkdir(parents=True)
    row = {"question": "Write \\boxed{3}. What did you write?", "answer": "#### 3"}
    with (requests / "train.jsonl").open("w", encoding="utf-8") as out:
        for _ in range(CONFIG["requests"]):
            out.write(json.dumps(row) + "\n")
    (requests.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: main/train.jsonl\n---\n"
    )


def write_tokenizer(folder: Path, address: str) -> None:
    """The served model's tokenizer, where the recipes look for that of their model."""
    import dlora

    link = dlora.connect(address)
    dlora.load_tokenizer(link).save_pretrained(folder / NAME)
    link.close()


@contextmanager
def interface(address: str, folder: Path) -> Iterator[str]:
    """A `dlora tinker` process; yields its address and ends it afterwards."""
    command = [sys.executable, "-m", "dlora", "tinker", "--server", address, "--name", NAME]
    command += ["--port", "0", "--output", str(folder / "saved"), *CONFIG["tinker"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout or ():
                if "TINKER_BASE_URL=" in line:
                    yield line.strip().partition("=")[2]
                    break
            else:
                raise SystemExit(f"dlora tinker ended with code {process.wait()}")
        finally:
            process.terminate()
            process.communicate(timeout=30)


def recipe(name: str, url: str, folder: Path) -> dict[str, Any]:
    """Run a recipe; return its metrics, step by step."""
    options = [f"{key}={value}" for key, value in CONFIG["recipes"][name].items()]
    command = [sys.executable, "-m", f"tinker_cookbook.recipes.{name}", f"model_name={NAME}"]
    environment = os.environ | {
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": "tml-of-the-benchmark",
        "HF_HUB_OFFLINE": "1",
    }
    started = time.monotonic()
    log = folder / name
    subprocess.run([*command, f"log_path={log}", *options], cwd=folder, env=environment, check=True)
    lines = (log / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {"seconds": time.monotonic() - started, "metrics": [json.loads(one) for one in lines]}


def run(names: list[str]) -> None:
    """Both recipes against one server each; write the result file."""
    from provenance import provenance

    from dlora.cli.demo import serving

    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"recipes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder)
        with serving(CONFIG["model"], *CONFIG["serve"]) as address:
            write_tokenizer(folder, address)
            with interface(address, folder) as url:
                for name in names:
                    found["recipes"][name] = recipe(name, url, folder)
                    found |= {"config": CONFIG, **provenance("tinker", "tinker-cookbook")}
                    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def table() -> None:
    """What the recipes logged, as Markdown."""
    found = json.loads(RESULT.read_text())["recipes"]
    for name, key in (("sl_loop", "train_mean_nll"), ("rl_loop", "reward/total")):
        if name in found:
            values = [one[key] for one in found[name]["metrics"] if key in one]
            print(f"{name}: {key} " + " ".join(f"{value:.3f}" for value in values))


def main() -> None:
    """Run the benchmark or print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("recipes", nargs="*", default=list(CONFIG["recipes"]))
    chosen = parser.parse_args()
    run(chosen.recipes) if chosen.action == "run" else table()


if __name__ == "__main__":
    main()
