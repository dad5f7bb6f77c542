"""The README's ways, walked by real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import cli, serving

import dlora
from dlora.cli.main import main
from dlora.edge.grpc_link import Access

LOG = "access_log"  # the setting that names the server's log of calls


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows to train on."""
    file = tmp_path / "private.jsonl"
    rows = [{"prompt": f"parcel {n}:", "completion": " the north desk"} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_from_keys_to_an_adapter(
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Keys, a token, a server and a training run, each a command in a process of its own: TLS and
    the token are asked for and enough, limits and the log of calls are the server's own.
    """
    folder, cache = tmp_path / "keys", {"DLORA_CACHE": str(tmp_path / "cache")}
    done = cli("keys", "init", "--folder", str(folder), "--hosts", "localhost,127.0.0.1")
    assert done.returncode == 0, done.stderr
    done = cli("keys", "token", "--folder", str(folder), "--tenant", "alice")
    assert done.returncode == 0, done.stderr
    token, file = done.stdout.strip(), tmp_path / "token"
    file.write_text(done.stdout)
    file.chmod(0o600)

    flags = ["--model", str(model_folder), "--keys", str(folder), "--max_tokens", "999"]
    flags += [f"--{LOG}", str(tmp_path / "calls.jsonl"), "--allow_modules", "q_proj|v_proj"]
    with serving(*flags) as address:
        ca = ["--server", address, "--tls_ca", str(folder / "ca.pem")]
        words = ["--data", str(data), "--output", str(tmp_path / "mine"), "--max_steps", "2"]
        done = cli("train", *ca, "--token_file", str(file), *words, **cache)
        assert done.returncode == 0, done.stderr
        assert "finished   after 2 steps" in done.stdout

        # Whoever lacks the authority or the token is sent away.
        monkeypatch.delenv("DLORA_TOKEN", raising=False)
        assert main(["info", *ca]) == 1
        assert "does not know this edge" in capsys.readouterr().err
        monkeypatch.setenv("DLORA_TOKEN", token)
        assert main(["info", *ca]) == 0
        assert "model" in capsys.readouterr().out
        assert main(["info", "--server", address]) == 1
        assert "does not answer as a DLoRA server" in capsys.readouterr().err

        access = Access(ca=folder / "ca.pem", token=token)
        link = dlora.connect(address, access=access, cache=tmp_path / "cache")
        assert link.description.limits.max_tokens == 999
        modules = [one for site in link.description.sites for one in site.modules]
        allowed = {one.name.rpartition(".")[2] for one in modules if one.allowed}
        assert allowed == {"q_proj", "v_proj"}
        link.close()

    run = json.loads((tmp_path / "mine/run.json").read_text())
    assert (run["status"], run["model_id"]) == ("finished", model_folder.name)
    assert (tmp_path / "mine/adapter_model.safetensors").is_file()
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert {(one["tenant"], one["status"]) for one in calls} == {("alice", "OK")}
    assert [one["call"] for one in calls].count("Step") == 2
    assert sum(one["tokens"] for one in calls) == run["cost"]["tokens"]
    assert token not in json.dumps([run, calls])
