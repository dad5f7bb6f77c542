"""The demo: a server process and this one, a private data set, answers before and after.

The task: route a message of hospital staff to one of twelve desks whose code names no
base model can know. Training and held-out messages were written separately.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from dlora.cli.settings import DemoSettings
from dlora.cli.train_screen import shown
from dlora.cloud.load import DEMO_MODEL
from dlora.edge.grpc_link import connect
from dlora.edge.load import load_adapter, load_tokenizer
from dlora.edge.model import SplitModel
from dlora.errors import PeerLost
from dlora.files import write_json
from dlora.inference.answer import complete
from dlora.inference.prompts import Prompt
from dlora.training.run import train
from dlora.training.settings import TrainSettings

__all__ = ["SHARED_CORES", "answers", "data_file", "run_demo", "serving"]

_MAX_NEW_TOKENS = 6
SHARED_CORES: Final = {"OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP settings for two halves on one machine, read when torch is loaded. The halves take turns;
unbound, the threads of the half that wakes up often begin on the same core, at a cost of a
quarter of the speed. Not for a server of its own: binding would crowd its other threads."""


def data_file(name: str) -> Path:
    """Path of the demo's train.jsonl or heldout.jsonl inside the package."""
    return Path(str(files("dlora") / "demo_data" / name))


def run_demo(settings: DemoSettings) -> int:
    """Train against a server in a process of its own and compare; return the exit code."""
    earlier = settings.output / "run.json"
    transformers_logging.set_verbosity_error()
    lines = data_file("heldout.jsonl").read_text(encoding="utf-8").split("\n")
    heldout = [json.loads(line) for line in lines if line]
    print(
        "starting a server process with SmolLM2-135M-Instruct (the first start unpacks the model: "
        "about a minute)"
    )
    with serving(DEMO_MODEL) as address:
        link = connect(address)
        print(f"connected to {address}: {link.description.model_id}")
        training = _training(settings, address, resume=earlier.exists())
        with shown(training) as screen:
            run = train(training, link, screen)
        if run["status"] != "finished":
            print(f"stopped after {run['steps']} steps; the same command continues")
            return 130

        # The same model answers twice: without its adapter, and with it.
        model = load_adapter(link, settings.output, is_trainable=False)
        prompts = [row["prompt"] for row in heldout]
        with model.disable_adapter():
            before = answers(model, prompts, "answers before")
        after = answers(model, prompts, "answers after")
        link.close()

    want = [row["completion"].strip() for row in heldout]
    run["demo"] = {
        "heldout_rows": len(want),
        "exact_match_before": _exact_match(before, want),
        "exact_match_after": _exact_match(after, want),
    }
    write_json(settings.output / "run.json", run)
    _show_answers(settings, heldout, before, after)
    show_end(settings, run)
    return 0


def _training(settings: DemoSettings, address: str, *, resume: bool) -> TrainSettings:
    """The demo's run, as `dlora train` would take it."""
    return TrainSettings(
        server=address,
        data=str(data_file("train.jsonl")),
        output=settings.output,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        warmup_steps=0.1,
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj"],
        batch_size=12,
        report_to=[],
        seed=settings.seed,
        resume=resume,
    )


@contextmanager
def serving(model: str, *flags: str) -> Iterator[str]:
    """A `dlora serve` process on a free port; yields its address and ends it afterwards."""
    command = [sys.executable, "-m", "dlora", "serve", "--model", model, "--port", "0", *flags]
    environment = os.environ | SHARED_CORES
    # A session of its own: Ctrl-C is for the edge, which finishes its step and then ends the
    # server.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            for line in process.stdout or ():
                if line.startswith("ready"):
                    yield line.split()[1]
                    break
            else:
                raise PeerLost(
                    f"the server process ended with code {process.wait()}; its message stands above"
                )
        finally:
            process.terminate()
            process.communicate(timeout=30)


def answers(model: SplitModel, prompts: list[str], title: str, batch_size: int = 24) -> list[str]:
    """Greedy completions of the prompts, up to the end of text, stripped."""
    tokenizer = load_tokenizer(model.link)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # less padding
    completions: list[str] = []

    for start in tqdm(range(0, len(prompts), batch_size), desc=title):
        batch: list[Prompt] = [prompts[index] for index in order[start : start + batch_size]]
        texts, _ = complete(
            model, tokenizer, batch, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False
        )
        completions += [text.strip() for text in texts]

    # Back into the order in which they were asked.
    return [text for _, text in sorted(zip(order, completions, strict=True))]


def _exact_match(got: list[str], want: list[str]) -> float:
    return sum(one == other for one, other in zip(got, want, strict=True)) / len(want)


def _show_answers(
    settings: DemoSettings, heldout: list[dict[str, str]], before: list[str], after: list[str]
) -> None:
    """Some held-out messages with both answers."""
    print(f"\nHeld-out messages (never trained on), {settings.examples} of {len(heldout)}:")
    examples = list(zip(heldout, before, after, strict=True))[: settings.examples]
    for row, old, new in examples:
        message = row["prompt"].removeprefix("Message: ").removesuffix("\nDesk:")
        want = row["completion"].strip()
        mark = "right" if new == want else f"wrong, want {want}"
        old = " ".join(old.split())[:60]
        print(f"  {message}\n      before: {old!r:64} after: {new!r} ({mark})")


def show_end(settings: DemoSettings, run: dict[str, Any]) -> None:
    """The last lines of the demo: what it reached, what it cost, what to do next."""
    demo, cost = run["demo"], run["cost"]
    sent_mb, received_mb = cost["sent_bytes"] / 1e6, cost["received_bytes"] / 1e6
    before, after = demo["exact_match_before"], demo["exact_match_after"]

    print(f"\nexact match    before {before:.1%}, after {after:.1%}")
    print(f"crossed        {sent_mb:.0f} MB up, {received_mb:.0f} MB down in {run['steps']} steps:")
    print("               activations and gradients, no text and no labels (which is not")
    print("               confidentiality against a cloud that records them: see the README)")
    print(f"adapter        {settings.output}: PeftModel.from_pretrained(base, '{settings.output}')")
    print(f"use it         dlora serve --model {DEMO_MODEL}, and in another terminal:")
    print("               dlora generate --server 127.0.0.1:50051 \\")
    print(f"                   --adapter {settings.output} --prompt ...")
