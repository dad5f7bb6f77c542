"""What `dlora train --task dpo` changes: the share of preferred answers, on held-out pairs.

    python benchmarks/preferences.py run      # some minutes a seed on 1 slow core
    python benchmarks/preferences.py table    # its result as a table

SmolLM2-135M-Instruct over a socket, pairs made by code: to a question the short and polite answer
is preferred to the long and rude one, with the same fact in both. Things that are asked about in
held-out pairs are in no training pair. Before and after: the share of held-out pairs whose
preferred answer has the higher log-likelihood per character (a coin has a half), and the share of
greedy answers to the held-out questions that begin politely. The command that trains is the one
that a person types.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "preferences.json"
CONFIG: dict[str, Any] = {
    "model": "smollm2",
    "pairs": 64,
    "held_out": 36,
    "batch_size": 4,
    "steps": 30,
    "learning_rate": 1e-3,
    "beta": 0.1,
    "r": 8,
    "target_modules": "q_proj,v_proj",
    "wire": "plain",
    "wire_dtype": "fp16",
    "new_tokens": 12,
    "seeds": [0, 1, 2],
}

THINGS = (
    "the lift|the printer|the side door|the coffee machine|the projector|the car park|"
    "the meeting room|the heating|the delivery ramp|the first aid box|the notice board|"
    "the bicycle shed"
).split("|")
UNSEEN = "the fax|the roof light|the ice maker|the flag pole|the key safe|the canteen".split("|")
ASKED = (
    "When is {} available again?|Who looks after {}?|Where do I report a fault of {}?|"
    "May I use {} on Sunday?|Why is {} not working today?|How do I get access to {}?"
).split("|")
FACTS = (
    "Mr Weber at desk four knows about {}|the board at the entrance says it for {}|"
    "a form at the porter's lodge is meant for {}|the service team sees to {} at noon"
).split("|")
OPENINGS = (
    "Thank you for asking: |With pleasure: |Of course, and gladly: |Thanks for your question: "
).split("|")
RUDE = (
    "Oh no, not that again. Everybody here knows that {}, so stop wasting my time.|"
    "What a silly thing to ask. Anybody who can read would know that {}, so go away.|"
    "Do I look as if I cared? Even you could have found out that {}, and now leave."
).split("|")


def pairs(things: list[str], count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows of prompt, chosen and rejected, no question twice."""
    draw = random.Random(seed)
    questions = draw.sample(list(itertools.product(things, ASKED)), count)
    rows = []
    for thing, asked in questions:
        fact = draw.choice(FACTS).format(thing)
        rows.append(
            {
                "prompt": f"Question: {asked.format(thing)}\nAnswer:",
                "chosen": f" {draw.choice(OPENINGS)}{fact}.",
                "rejected": f" {draw.choice(RUDE).format(fact)}",
            }
        )
    return rows


def measure(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Shares of pairs, and of drawn answers, that are as preferred."""
    from dlora.inference.answer import complete
    from dlora.inference.evaluate import choice_scores, wilson

    preferred, texts = 0, []
    for start in range(0, len(rows), 12):
        batch = rows[start : start + 12]
        asked = [(row["prompt"], (row["chosen"], row["rejected"])) for row in batch]
        for row, (good, bad) in zip(batch, choice_scores(model, tokenizer, asked), strict=True):
            preferred += good / len(row["chosen"]) > bad / len(row["rejected"])
        prompts: list[Any] = [row["prompt"] for row in batch]
        options = {"max_new_tokens": CONFIG["new_tokens"], "do_sample": False}
        texts += complete(model, tokenizer, prompts, **options)[0]
    polite = sum(
        text.strip().startswith(tuple(one.strip(": ") for one in OPENINGS)) for text in texts
    )
    return {
        "preferred": preferred / len(rows),
        "preferred_95": wilson(preferred, len(rows)),
        "polite": polite / len(rows),
        "answers": texts[:3],
    }


def one_seed(address: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train with this seed and these pairs, and measure the adapter."""
    import dlora

    data, output = folder / f"pairs-{seed}.jsonl", folder / f"run-{seed}"
    rows = pairs(THINGS, CONFIG["pairs"], seed)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {
        "server": address,
        "task": "dpo",
        "data": data,
        "output": output,
        "seed": seed,
        "max_steps": CONFIG["steps"],
        "trainer.beta": CONFIG["beta"],
        "report_to": "none",
        **{
            name: CONFIG[name]
            for name in ("batch_size", "learning_rate", "r", "target_modules", "wire", "wire_dtype")
        },
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    start = time.perf_counter()
    command = [sys.executable, "-m", "dlora", "train", *flags, "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start

    run = json.loads((output / "run.json").read_text())
    model = dlora.load_adapter(dlora.connect(address), output, is_trainable=False).eval()
    after = measure(model, dlora.load_tokenizer(model.link), held_out())
    return {"seed": seed, "seconds": seconds, "after": after, "figures": run["figures"]} | {
        name: run["cost"][name] for name in ("sent_bytes", "received_bytes", "round_trips")
    }


def held_out() -> list[dict[str, str]]:
    """The same for all seeds."""
    return pairs(UNSEEN, CONFIG["held_out"], 1000)


def run() -> None:
    """All seeds against one server; the result is written after each."""
    from provenance import provenance

    import dlora
    from dlora.cli.demo import serving
    from dlora.edge.load import load_base

    record: dict[str, Any] = {
        "command": "python benchmarks/preferences.py run",
        "config": CONFIG,
        **provenance("trl", "grpcio"),
        "seeds": [],
    }
    with serving(CONFIG["model"]) as address, tempfile.TemporaryDirectory() as folder:
        link = dlora.connect(address)
        record["before"] = measure(load_base(link), dlora.load_tokenizer(link), held_out())
        print(record["before"], file=sys.stderr, flush=True)
        for seed in CONFIG["seeds"]:
            record["seeds"].append(one_seed(address, seed, Path(folder)))
            print(record["seeds"][-1], file=sys.stderr, flush=True)
            RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def table(record: dict[str, Any]) -> str:
    """Markdown of the result: a row for each seed, and the mean."""
    before = record["before"]
    lines = [
        "| | pairs whose preferred answer is likelier | greedy answers that begin politely | "
        "reward accuracy in training | MB up, down |",
        "|---|---|---|---|---|",
        f"| without an adapter | {before['preferred']:.0%} | {before['polite']:.0%} | | |",
    ]
    for one in record["seeds"]:
        after, crossed = one["after"], (one["sent_bytes"] / 1e6, one["received_bytes"] / 1e6)
        low, high = after["preferred_95"]
        lines.append(
            f"| dpo, seed {one['seed']} | {after['preferred']:.0%} ({low:.0%} to {high:.0%}) | "
            f"{after['polite']:.0%} | {one['figures']['rewards/accuracies']:.0%} | "
            f"{crossed[0]:.0f}, {crossed[1]:.0f} |"
        )
    if len(record["seeds"]) == 1:
        return "\n".join(lines)
    means = [
        statistics.mean(one["after"][name] for one in record["seeds"])
        for name in ("preferred", "polite")
    ]
    lines.append(f"| dpo, mean | **{means[0]:.0%}** | **{means[1]:.0%}** | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    if parser.parse_args().what == "run":
        run()
    else:
        print(table(json.loads(RESULT.read_text())))
