"""The commented settings files of `examples/`, each run as a user would run it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import cli, serving

from dlora.cli.main import main

EXAMPLES = Path(__file__).parent.parent / "examples"
SERVE = ["serve.yaml", "serve-others.yaml"]
TRAIN = sorted(file.name for file in EXAMPLES.glob("*.yaml") if file.name not in SERVE)
SMALLER = {"max_steps": 2, "edge_first": 1, "edge_last": 1, "eval_steps": 1, "save_steps": 1}
"""In place of what an example has, for a tiny model and a short run."""
ROWS: dict[str, dict[str, str]] = {
    "sft": {"completion": " the north desk"},
    "dpo": {"chosen": " the north desk", "rejected": " who knows"},
    "grpo": {"wanted": "north"},
}
"""What rows have beside the prompt, by task."""
ELSEWHERE = ("tls_ca", "token_file")  # files that the provider of an example gives


@pytest.fixture(scope="module")
def address(model_folder: Path) -> Iterator[str]:
    """The first example's server, of a tiny model; it lets edges run a layer at either end."""
    flags = ["--model", str(model_folder), "--edge_first", "1", "--edge_last", "1"]
    with serving("--config", str(EXAMPLES / "serve.yaml"), *flags) as address:
        yield address


@pytest.mark.parametrize("name", TRAIN)
def test_an_example_trains(
    address: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example is a whole run: its settings are known, fit each other, and end in an adapter;
    `run.json` has them as they stand in the file.
    """
    settings = yaml.safe_load((EXAMPLES / name).read_text())
    monkeypatch.chdir(EXAMPLES.parent)  # where the paths in an example begin
    smaller = {key: value for key, value in SMALLER.items() if key in settings}
    kept = {key: value for key, value in settings.items() if key not in ELSEWHERE}
    file, data = tmp_path / name, tmp_path / "rows.jsonl"
    file.write_text(yaml.safe_dump(kept | smaller | {"max_steps": 2, "server": address}))
    more = ROWS[settings.get("task", "sft")]
    rows = [{"prompt": f"parcel {n}:", **more} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    output = tmp_path / "mine"
    words = ["--config", str(file), "--data", str(data), "--output", str(output)]
    assert main(["train", *words, "--report_to", "none"]) == 0
    assert (output / "adapter_model.safetensors").is_file()
    written = json.loads((output / "run.json").read_text())["settings"]
    for key in kept.keys() - smaller.keys() - {"server", "epochs", "target_modules"}:
        assert written[key] == ("on" if kept[key] is True and key == "kr" else kept[key]), key


def test_the_others_example_serves(model_folder: Path, tmp_path: Path) -> None:
    """With keys as its comment makes them it serves on every interface, with TLS and a token."""
    done = cli("keys", "init", "--folder", str(tmp_path / "keys"), "--hosts", "localhost,127.0.0.1")
    assert done.returncode == 0, done.stderr
    token = tmp_path / "alice.token"
    words = ["--folder", str(tmp_path / "keys"), "--tenant", "alice", "--output", str(token)]
    assert cli("keys", "token", *words).returncode == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    flags = ["--model", str(model_folder), "--keys", str(tmp_path / "keys")]
    flags += ["--metrics_port", port, "--access_log", str(tmp_path / "access.jsonl")]
    with serving("--config", str(EXAMPLES / "serve-others.yaml"), *flags) as address:
        server = address.replace("0.0.0.0", "127.0.0.1")
        asks = ["info", "--server", server, "--tls_ca", str(tmp_path / "keys/ca.pem")]
        assert main(asks) == 1
        assert main([*asks, "--token_file", str(token)]) == 0
        assert main(["status", "--metrics_port", port]) == 0
