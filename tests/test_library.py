"""The library as a person meets it: names, reprs, cards, and the blocks of the documents."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import NO_DRAIN, lora
from transformers import PreTrainedTokenizerFast

import dlora
from dlora.cli.commands import COMMANDS
from dlora.cli.parser import parse
from dlora.cloud.model import CloudModel
from dlora.edge.meter import Meter
from dlora.embedded import InProcessLink
from dlora.errors import UsageError
from dlora.server.server import Server
from dlora.training.run import train
from dlora.training.settings import TrainSettings

ROOT = Path(dlora.__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(file: Path, language: str) -> list[str]:
    """The fenced blocks of a document that are in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(), re.M | re.S)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `dlora` command in a block of a document: (document, words)."""
    for file in DOCUMENTS:
        for block in blocks(file, ""):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("dlora "):
                    line = re.sub(r"\[.*?\]", "", line.split("   #")[0])
                    words = shlex.split(line.partition(" <")[0], comments=True)[1:]
                    yield file.name, list(_given(words))


def _given(words: list[str]) -> Iterator[str]:
    """Words without the three dots that stand for more flags; those for a value stay."""
    for before, word in zip(["", *words], words, strict=False):
        if word != "..." or before.startswith("--"):
            yield word


# ----------------------------------------------------------------- names


def test_public_names_show_before_they_are_used() -> None:
    """`dir(dlora)`, and so completion, has every public name and nothing else; Kill and Revive is
    one import."""
    assert dir(dlora) == sorted(dlora.__all__)
    assert {"KillAndRevive", "KillReviveCallback", "KillReviveConfig"} <= set(dir(dlora))
    assert all(hasattr(dlora, name) for name in dir(dlora))


def test_reprs_are_for_people(link: InProcessLink) -> None:
    """A link says where and what it is, a meter what was spent, each on one line."""
    assert repr(link) == "<link to in process: example-org/llama, 3 layers, 12 sites>"
    shown = repr(Meter(sent_bytes=1_500_000, received_bytes=2_000, round_trips=3, tokens=7))
    assert shown == (
        "<1.500 MB up, 0.002 MB down, 3 round trips, 0.0 s waited; 7 tokens; "
        "edge 0.000 GFLOP, cloud 0.000 GFLOP>"
    )
    assert ", 2 retries," in repr(Meter(retries=2)) and str(Meter()) == repr(Meter())


def test_merging_says_what_to_use(link: InProcessLink) -> None:
    """The edge has no base weights: what would merge says which command does."""
    model = dlora.get_peft_model(link, lora())
    for name in ("merge_and_unload", "merge_adapter"):
        with pytest.raises(UsageError, match="the base weights are in the cloud.*`dlora merge"):
            getattr(model, name)()


# ----------------------------------------------------------------- cards


def test_an_adapter_saved_from_python_has_a_card(link: InProcessLink, tmp_path: Path) -> None:
    """The card has the base, the kind and how to load it, and nothing to be filled in; one that is
    there stays."""
    model = dlora.get_peft_model(link, lora())
    model.save_pretrained(str(tmp_path / "mine"))
    card = (tmp_path / "mine/README.md").read_text()
    assert card.startswith("---\nbase_model: example-org/llama\nlibrary_name: peft\n")
    assert "Rank 4, alpha 8, on k_proj, q_proj, v_proj." in card
    assert "PeftModel.from_pretrained(base, 'mine')" in card and "Needed" not in card
    (tmp_path / "mine/README.md").write_text("of a person")
    model.save_pretrained(str(tmp_path / "mine"))
    assert (tmp_path / "mine/README.md").read_text() == "of a person"


def test_a_run_has_a_card(link: InProcessLink, tmp_path: Path) -> None:
    """The README of a run's adapter says base, data, settings, figures, cost and privacy; it has no
    content of the data, no path and no server, and no file of the run asks for more."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "the secret", "completion": " x"}\n' * 4)
    run = train(
        TrainSettings(
            **{"server": "secret.example:1", "data": str(folder / "rows.jsonl"), "val_size": 1},
            **{"output": tmp_path / "mine", "max_steps": 2, "r": 3, "report_to": []},
            **{"batch_size": 2, "target_modules": ["q_proj"], "pad_to": 16},
        ),
        link,
    )
    card = (tmp_path / "mine/README.md").read_text()
    for said in (
        *("base_model: example-org/llama", "# mine", "PeftModel.from_pretrained(base, 'mine')"),
        *("trained on `rows.jsonl`, 3 rows", "evaluated on held out of the same data, 1 rows"),
        *("| r | 3 |", "| target_modules | q_proj |", "| max_steps | 2 |", "finished, 2 steps"),
        *(f"{run['train_loss']:.4f}", f"{run['eval_loss']:.4f}", "| round trips | "),
        *("(`--wire plain`, `--wire_dtype fp16`)", "rows padded to a multiple of: 16"),
        run["fingerprint"],
    ):
        assert said in card, said
    assert "epochs" not in card and "kr" not in card.split()
    assert "secret" not in card and str(tmp_path) not in card
    cards = list((tmp_path / "mine").rglob("README.md"))
    assert len(cards) > 1
    for file in cards:
        assert "Needed" not in file.read_text(), file


# ----------------------------------------------------------------- documents


@pytest.mark.filterwarnings("ignore")  # of the trainer, about what this machine lacks
def test_the_blocks_of_the_readme_run(
    cloud_models: Callable[[str], CloudModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Python in the README runs as it stands, against a server, and writes a peft adapter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLORA_CACHE", str(tmp_path / "cache"))
    found = blocks(ROOT / "README.md", "python")
    assert found
    with Server(cloud_models("llama"), tokenizer, options=NO_DRAIN) as server:
        for block in found:
            names: dict[str, Any] = {}
            exec(block.replace("127.0.0.1:50051", server.address), names)
            names["cloud"].close()
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    assert "MB up, " in capsys.readouterr().out


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_python_in_documents_is_python(file: Path) -> None:
    """No block has an error of syntax."""
    for block in blocks(file, "python"):
        compile(block, file.name, "exec")


def test_commands_in_documents_are_commands() -> None:
    """Every `dlora` command in a block of a document is taken by the parser, with what is missing
    left to the reader: a command that changed its flags is found in all of them."""
    wrong, seen = [], set()
    for name, words in commands():
        seen.add(words[0])
        if "--config" in words:
            continue
        try:
            parse(words, COMMANDS)
        except UsageError as error:
            if " missing; see" not in str(error) or "its value" in str(error):
                wrong.append(f"{name}: dlora {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)
    assert len(seen) > 10
