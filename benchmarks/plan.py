"""How far `dlora plan` is off: predictions beside steps that were run, over loopback and a distant
link.

    python benchmarks/plan.py run      # some minutes
    python benchmarks/plan.py table    # the table of docs/benchmarks.md

SmolLM2-135M-Instruct behind a server process on this machine; `relay.py` adds the
round trip time. Every case is predicted first, then run three times; the fastest step is compared,
as the prediction is made of fastest times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from relay import link_to

RESULT = Path(__file__).parent / "results" / "plan.json"
QKV, MLP = "q_proj,k_proj,v_proj", "gate_proj,up_proj"
# (target modules, wire, active sites, rows, tokens a row, labels a row, round trip time in ms)
CASES = (
    (QKV, "plain", None, 8, 64, 8, 0),
    (QKV, "plain", 4, 8, 64, 8, 0),
    (QKV, "factored", None, 8, 64, 8, 0),
    (MLP, "factored", 8, 8, 64, 8, 0),
    (QKV, "plain", 4, 4, 128, 128 - 1, 0),
    (QKV, "plain", 4, 8, 64, 8, 40),
    (QKV, "plain", None, 2, 64, 8, 40),
    (MLP, "factored", 8, 8, 64, 8, 40),
)


def run() -> dict[str, Any]:
    """Predict and run every case."""
    import dlora
    from dlora.cli.demo import serving
    from dlora.training.plan_settings import PlanSettings
    from dlora.training.planner import check, plan

    found = []
    with serving("smollm2") as address:
        for targets, wire, sites, rows, length, labels, rtt_ms in CASES:
            with link_to(address, rtt_ms) as through:
                link = dlora.connect(through)
                settings = PlanSettings(
                    server=through,
                    target_modules=targets,
                    wire=wire,
                    sites=sites,
                    batch_size=rows,
                    length=length,
                    supervised=labels,
                    rtt_ms=rtt_ms or None,
                )
                model, guess = plan(settings, link)
                cost, seconds = check(settings, model)
                link.close()
            found.append(
                {
                    "targets": targets,
                    "wire": wire,
                    "sites": guess.active_sites,
                    "rows": rows,
                    "length": length,
                    "labels": labels,
                    "rtt_ms": rtt_ms,
                    "bytes": [
                        guess.sent_bytes + guess.received_bytes,
                        cost.sent_bytes + cost.received_bytes,
                    ],
                    "round_trips": [guess.round_trips, cost.round_trips],
                    "seconds": [guess.seconds, seconds],
                    "parts": {
                        n: getattr(guess, f"{n}_s") for n in ("cloud", "edge", "wire", "link")
                    },
                    "waited": cost.wait_s,
                }
            )
            print(found[-1], file=sys.stderr, flush=True)
    from provenance import provenance

    return {
        "model": "smollm2",
        "cases": found,
        **provenance("grpcio"),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: how far off bytes and seconds are."""
    lines = [
        "| modules | wire | sites | rows x tokens (labels) | RTT, ms | bytes off by | round trips "
        "| "
        "seconds: predicted, run | off by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        guess, real = case["seconds"]
        lines.append(
            f"| {case['targets'].replace('_proj', '').replace(',', ', ')} | {case['wire']} | "
            f"{case['sites']} | "
            f"{case['rows']} x {case['length']} ({case['labels']}) | {case['rtt_ms']} | "
            f"{case['bytes'][0] / case['bytes'][1] - 1:+.2%} | {case['round_trips'][1]} | "
            f"{guess:.2f}, {real:.2f} | "
            f"{guess / real - 1:+.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    from dlora.cli.demo import SHARED_CORES

    if "OMP_PROC_BIND" not in os.environ:  # read when torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SHARED_CORES)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    if parser.parse_args().what == "run":
        RESULT.write_text(json.dumps(run(), indent=2) + "\n")
    print(table(json.loads(RESULT.read_text())))
