"""Recordings of real micro-batches, and every attack on them: where it must succeed, and where it
must fail.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, batches, lora, make_base, make_split
from helpers import same

from dlora.cli.demo import data_file, serving
from dlora.cli.main import main
from dlora.cloud.limits import Limits
from dlora.cloud.load import DEMO_MODEL
from dlora.cloud.model import CloudModel
from dlora.edge.link import RetryPolicy
from dlora.edge.model import SplitModel
from dlora.embedded import InProcessLink
from dlora.errors import PeerLost, UsageError
from dlora.privacy.attacks import (
    before_norm,
    fit_inverter,
    label_map,
    labels_from_exit,
    nearest_tokens,
    relative_error,
    solve_adapters,
    unit_rows,
)
from dlora.privacy.audit import audit, read_recording
from dlora.privacy.cloud_view import CloudView
from dlora.privacy.lengths import LengthCounts, attack_lengths
from dlora.privacy.matching import match_rows
from dlora.privacy.page import write_audit
from dlora.privacy.recording import Module, Recorder, Recording, RecordingLink, Truth
from dlora.privacy.samples import Samples, collect, split_rows
from dlora.privacy.scores import rouge_l, token_scores
from dlora.privacy.settings import AuditSettings
from dlora.server.server import Server
from dlora.training import run as training
from dlora.training.run import train
from dlora.training.settings import TrainSettings

WORDS = "gate lift ward bed door lamp pump tray cart desk line seal vent rack".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows of prompt and completion, all different."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "prompt": f"the {WORDS[n % 14]} of {WORDS[n * 5 % 13]} {n * 37 % 91}:",
            "completion": f" {WORDS[n % 5]}",
        }
        for n in range(48)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def settings(data: Path, output: Path, **changes: Any) -> TrainSettings:
    """A run of 6 steps of 2 micro-batches of 4 rows."""
    values: dict[str, Any] = {
        "server": "in-process",
        "data": str(data),
        "output": output,
        "report_to": [],
    }
    values |= {
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "epochs": 1.0,
        "learning_rate": 1e-2,
        "save_steps": 1,
    }
    return TrainSettings(**(values | changes))


@pytest.fixture(scope="module")
def run(link: InProcessLink, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run."""
    folder = tmp_path_factory.mktemp("runs") / "recorded"
    train(settings(data, folder, record=12), link)
    return folder


def watched(
    link: Any, model_for: Callable[[Any], SplitModel], rows: list[dict[str, torch.Tensor]]
) -> Any:
    """Run micro-batches and look at the wire: pairs of what the cloud sees and the truth."""
    seen: list[CloudView] = []
    model = model_for(RecordingLink(link, lambda edge, cloud: seen.append(CloudView(edge, cloud))))
    model.train()
    found = []
    for batch in rows:
        model(**batch).loss.backward()
        modules = [
            Module(
                name=name,
                site=site.index,
                module=index,
                A=a.detach().clone(),
                B=b.detach() * layer.scaling[one],
            )
            for site in model.sites
            for name, index, layer in zip(site.names, site.modules, site.layers, strict=True)
            for one in layer.active_adapters
            for a, b in [(layer.lora_A[one].weight, layer.lora_B[one].weight)]
        ]
        truth = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        found.append((seen.pop(), Truth(**truth, modules=modules)))
    return model, found


@pytest.fixture(scope="module")
def samples(link: InProcessLink) -> tuple[SplitModel, Samples, list[int]]:
    """A split model with an adapter, and what the cloud sees of 40 random micro-batches."""
    rows = batches(40, rows=8, length=14)
    model, seen = watched(link, lambda to: make_split(to, lora()), rows)
    sites = sorted(seen[0][0].sites)
    return model, collect(seen, sites), sites


def halves(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the first and the second half."""
    first = torch.arange(count) < count // 2
    return first, ~first


def held(count: int) -> torch.Tensor:
    """Every fifth row."""
    return torch.arange(count) % 5 == 0


# ----------------------------------------------------------------- recording


def test_recording_changes_nothing(link: InProcessLink, data: Path, tmp_path: Path) -> None:
    """A recorded run ends with the very same adapter, and only its user can read the recording."""
    for name, count in (("plain", 0), ("recorded", 5)):
        train(settings(data, tmp_path / name, record=count, lora_dropout=0.2), link)
    assert same(tmp_path / "plain", tmp_path / "recorded")
    folder = tmp_path / "recorded/recording"
    assert not (tmp_path / "plain/recording").exists()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    assert len(Recording(folder)) == 5 and len(list(folder.iterdir())) == 20


def test_recording_holds_frames_and_truth(run: Path, link: InProcessLink) -> None:
    """The truth of a micro-batch is that of its frames: the edge's own embeddings, deltas, loss and
    labels.
    """
    recording = Recording(run / "recording")
    model = make_split(link, lora())
    assert len(recording) == 12
    for number in (0, 7, 11):
        view, truth, fingerprint = recording.read(number)
        assert fingerprint == link.description.fingerprint and list(
            recording.sites(number)
        ) == list(view.sites)
        ids = truth.input_ids.reshape(-1)[view.positions]
        embeddings = model.get_input_embeddings()(ids)
        assert torch.allclose(view.entry, embeddings, rtol=1e-3, atol=1e-4)
        one = truth.modules[-1]
        seen = view.sites[one.site]
        want = seen.x @ one.A.T @ one.B.T
        assert torch.allclose(
            seen.deltas[seen.modules.index(one.module)], want, rtol=2e-3, atol=1e-5
        )
        assert bool(want.any()) == (number > 1)  # B is zero up to the first step
        labels = truth.next_labels.reshape(-1)[view.keep]
        logits = model.get_output_embeddings()(view.exit)
        assert truth.loss == pytest.approx(
            torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-3
        )


def test_resumed_run_records_the_same(
    link: InProcessLink, data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed and resumed leaves the recording of one that was not, without
    micro-batches twice.
    """
    with monkeypatch.context() as patch:
        build = training.build_trainer

        def breaking(*args: Any) -> Any:
            trainer = build(*args)
            step = trainer.training_step
            calls = iter(range(100))

            def training_step(*args: Any, **kwargs: Any) -> Any:
                if (
                    next(calls) == 5
                ):  # the first micro-batch of step 3 is recorded, but no checkpoint has it
                    raise KeyboardInterrupt
                return step(*args, **kwargs)

            trainer.training_step = training_step
            return trainer

        patch.setattr(training, "build_trainer", breaking)
        with pytest.raises(KeyboardInterrupt):
            train(settings(data, tmp_path / "run", record=12), link)
    assert len(Recording(tmp_path / "run/recording")) == 5
    train(settings(data, tmp_path / "run", record=12, resume=True), link)
    files = sorted(file.name for file in (run / "recording").iterdir())
    assert sorted(file.name for file in (tmp_path / "run/recording").iterdir()) == files
    for name in files:
        if not name.endswith("cloud"):  # which tells how long the cloud took
            one, other = (folder / "recording" / name for folder in (run, tmp_path / "run"))
            assert one.read_bytes() == other.read_bytes(), name


class _Dropping:
    """A link that loses its stream in the middle of the first micro-batch."""

    def __init__(self, link: Any) -> None:
        self.link, self.frames = link, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def open(self) -> Any:
        stream = self.link.open()
        receive = stream.receive

        def counted() -> Any:
            self.frames += 1
            if self.frames == 3:
                raise PeerLost("lost")
            return receive()

        stream.receive = counted
        return stream


def test_a_micro_batch_that_ran_twice_is_recorded_once(link: InProcessLink, tmp_path: Path) -> None:
    """Frames of a stream that was lost are left out: the recording has the whole micro-batch
    alone.
    """
    recorder = Recorder(tmp_path / "recording", 3)
    model = make_split(recorder.link(_Dropping(link)), lora())
    model.set_options(retry=RetryPolicy(sleep=lambda _: None))
    recorder.watch(model)
    model(**batches()[0]).loss.backward()
    assert model.meter.retries == 1
    recording = Recording(tmp_path / "recording")
    view, truth, _ = recording.read(0)
    assert len(recording) == 1 and len(view.entry) == int(truth.attention_mask.sum())


@pytest.mark.parametrize("suffix", ["edge", "cloud", "safetensors", "json"])
@pytest.mark.parametrize("harm", ["missing", "cut", "noise"])
def test_a_broken_recording_is_refused(run: Path, tmp_path: Path, suffix: str, harm: str) -> None:
    """Each file of a recording that is missing, cut or changed is an error for the user that names
    it.
    """
    folder = tmp_path / "recording"
    shutil.copytree(run / "recording", folder)
    file = folder / f"0003.{suffix}"
    whole = file.read_bytes()
    changed = {"cut": whole[: len(whole) // 2], "noise": b"\x07" * 40 + whole}
    file.unlink() if harm == "missing" else file.write_bytes(changed[harm])
    if (suffix, harm) == ("json", "missing"):
        assert len(Recording(folder)) == 11  # it is written last: an unfinished micro-batch
    else:
        with pytest.raises(UsageError, match="0003: this part of the recording cannot be read"):
            Recording(folder).read(3)
    with pytest.raises(UsageError, match="none holds no recording: make one with"):
        Recording(tmp_path / "none")


# ----------------------------------------------------------------- attacks on tokens


def test_look_up_finds_all_tokens_of_embeddings_and_none_of_noise(samples: Any) -> None:
    """A look-up names every token of raw embeddings, at chance it names those of vectors without
    any.
    """
    model, seen, _ = samples
    table = model.get_input_embeddings().weight.detach()
    assert torch.equal(nearest_tokens(seen.entry_ND, table), seen.ids_N)
    noise = (
        torch.randn(seen.entry_ND.shape, generator=torch.Generator().manual_seed(0)) * table.std()
    )
    assert (nearest_tokens(noise, table) == seen.ids_N).float().mean() < 5 / VOCAB


@pytest.mark.parametrize(("place", "least"), [("entry", 0.99), (0, 0.99), (1, 0.5)])
def test_inverter_recovers_tokens_and_learns_nothing_from_shuffled_ones(
    samples: Any, place: Any, least: float
) -> None:
    """A linear map from known text recovers most tokens of unknown text, and not if its text was
    shuffled.
    """
    model, seen, sites = samples
    x = seen.entry_ND if place == "entry" else seen.sites[sites[place]]
    table = model.get_input_embeddings().weight.detach()
    known, unknown = halves(len(x))
    count = int(known.sum())
    inverter = fit_inverter(x[known], seen.ids_N[known], table, held(count))
    assert (inverter(x[unknown]) == seen.ids_N[unknown]).float().mean() > least
    shuffled = seen.ids_N[known][torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    blind = fit_inverter(x[known], shuffled, table, held(count))
    assert (blind(x[unknown]) == seen.ids_N[unknown]).float().mean() < 6 / VOCAB


def test_inverter_finds_tokens_that_its_text_lacks(samples: Any) -> None:
    """Where a site is close to the embedding, tokens come back that the attacker never saw."""
    model, seen, sites = samples
    table, ids = model.get_input_embeddings().weight.detach(), seen.ids_N
    known = ids % 3 > 0
    x = seen.sites[sites[0]]
    inverter = fit_inverter(x[known], ids[known], table, held(int(known.sum())))
    assert (inverter(x[~known]) == ids[~known]).float().mean() > 0.9


def test_matching_spells_rows_out_and_nothing_from_strange_inputs(link: InProcessLink) -> None:
    """Tokens tried in the model itself give more than the linear map alone; inputs of other rows
    give nothing.
    """
    fresh = lora(init_lora_weights=True)
    model, views = watched(link, lambda to: make_split(to, fresh), batches(30, rows=8, length=14))
    site = sorted(views[0][0].sites)[2]
    seen = collect(views, [site])
    known, unknown = seen.of_rows(torch.arange(100)), seen.of_rows(torch.arange(200, 208))
    table = model.get_input_embeddings().weight.detach()
    inverter = fit_inverter(known.sites[site], known.ids_N, table, held(len(known.ids_N)))
    x, want = unknown.sites[site], unknown.ids_N
    found = match_rows(link, model, inverter, site, x, unknown.row_N)
    linear = float((inverter(x) == want).float().mean())
    assert (found == want).float().mean() > linear + 0.2
    blind = match_rows(link, model, inverter, site, x.flip(0), unknown.row_N)
    assert (blind == want).float().mean() < 0.1


# ----------------------------------------------------------------- attacks on labels


def test_labels_come_from_the_gradient_of_the_head(samples: Any) -> None:
    """Every label follows from its row of the exit's gradient, at any scale; none from noise."""
    model, seen, _ = samples
    head = model.get_output_embeddings().weight.detach()
    for number in range(3):
        one = seen.batch_K == number
        hidden, grad, want = seen.exit_KD[one], seen.exit_grad_KD[one], seen.labels_K[one]
        for scale in (1.0, 1e-3, 37.0):
            assert torch.equal(labels_from_exit(hidden, grad * scale, head), want)
    noise = torch.randn(seen.exit_grad_KD.shape, generator=torch.Generator().manual_seed(0))
    guess = labels_from_exit(seen.exit_KD, noise * seen.exit_grad_KD.std(), head)
    assert (guess == seen.labels_K).float().mean() < 6 / VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3"])
def test_labels_come_from_the_gradient_below_the_last_norm(family: str, dtype: torch.dtype) -> None:
    """With the first layer and the final norm on the edge every label still follows; none does from
    noise.
    """
    cloud = CloudModel(make_base(family).to(dtype), model_id=family, limits=Limits(edge_first=1))
    with closing(InProcessLink(cloud)) as link:
        rows = batches(3, rows=8, length=14)
        model, seen = watched(
            link, lambda to: make_split(to, lora(family), edge_layers=(1, 0)), rows
        )
        own = collect(seen, sorted(seen[0][0].sites))
        head = model.get_output_embeddings().weight.detach().float()
        assert {p.dtype for p in model.get_base_model().parameters() if not p.requires_grad} == {
            dtype
        }
        for number in range(3):
            one = own.batch_K == number
            hidden, grad, blind = before_norm(
                model.last_hidden, own.exit_KD[one].float(), own.exit_grad_KD[one]
            )
            assert torch.equal(
                labels_from_exit(hidden, grad * 37.0, head, None, blind), own.labels_K[one]
            )
            noise = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0)) * grad.std()
            guess = labels_from_exit(hidden, noise, head, None, blind)
            assert (guess == own.labels_K[one]).float().mean() < 6 / VOCAB


def test_labels_come_from_gradients_by_a_linear_map(samples: Any) -> None:
    """Gradients of known micro-batches teach to read labels off those of unknown ones; shuffled
    ones do not.
    """
    model, seen, _ = samples
    head = model.get_output_embeddings().weight.detach()
    rows, labels = seen.exit_grad_KD, seen.labels_K
    known, unknown = halves(len(rows))
    count = int(known.sum())
    read = label_map(rows[known], labels[known], head, held(count))
    assert (read(unit_rows(rows[unknown])) == labels[unknown]).float().mean() > 0.9
    shuffled = labels[known][torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    blind = label_map(rows[known], shuffled, head, held(count))
    assert (blind(unit_rows(rows[unknown])) == labels[unknown]).float().mean() < 6 / VOCAB


def test_a_projection_behind_the_norm_is_no_norm() -> None:
    """Where the last norm's output is projected (OPT), or mixed, there is no closed form, and none
    is pretended.
    """
    cloud = CloudModel(make_base("opt"), model_id="opt", limits=Limits(edge_first=1))
    with closing(InProcessLink(cloud)) as link:
        model = make_split(link, lora("opt"), edge_layers=(1, 0))
        width = link.description.layers.width
        rows = torch.randn(4, width)
        assert before_norm(model.last_hidden, rows, rows) is None
    mixing = torch.randn(width, width)
    assert (
        before_norm(lambda x: torch.nn.functional.layer_norm(x, (width,)) @ mixing, rows, rows)
        is None
    )
    assert (
        before_norm(lambda x: torch.nn.functional.layer_norm(x, (width,)), rows, rows) is not None
    )


@pytest.mark.parametrize(("noise", "told"), [(0.0, 1.0), (1.0, 0.0)])
def test_zero_gradients_tell_lengths_behind_padding(
    link: InProcessLink, data: Path, tmp_path: Path, noise: float, told: float
) -> None:
    """Padding hides lengths and labels from masks, and gradients that are zero tell both, unless
    noise covers them.
    """
    train(
        settings(data, tmp_path / "run", record=4, max_steps=2, pad_to=64, noise_tail=noise), link
    )
    counts: list[LengthCounts] = []
    assert len(list(read_recording(Recording(tmp_path / "run/recording"), counts))) == 4
    masks, zeros = attack_lengths(counts)
    assert masks["lengths"] == masks["supervised"] == 0
    assert zeros["lengths"] == zeros["supervised"] == told


# ----------------------------------------------------------------- attacks on the adapter


def solved(
    view: CloudView, truth: Truth, site: int, rows: slice = slice(None), noise: float = 0.0
) -> Any:
    """Solutions of a site from some rows of a micro-batch, and what is right."""
    one = view.sites[site]
    generator = torch.Generator().manual_seed(0)
    deltas = [d + noise * d.std() * torch.randn(d.shape, generator=generator) for d in one.deltas]
    solutions = solve_adapters(
        one.x[rows],
        [delta[rows] for delta in deltas],
        factors=one.factors,
        delta_grads=[grad[rows] for grad in one.delta_grads],
        input_grad_ND=None if one.input_grad is None else one.input_grad[rows],
    )
    modules = [
        next(m for m in truth.modules if (m.site, m.module) == (site, index))
        for index in one.modules
    ]
    return solutions, [module.B @ module.A for module in modules]


@pytest.mark.parametrize("wire", ["plain", "factored"])
@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16"])
def test_adapter_is_solved_from_one_micro_batch(
    link: InProcessLink, wire: str, wire_dtype: str
) -> None:
    """B A of every module follows from one micro-batch with enough rows, to 1e-3, at every site."""
    ids = torch.randint(5, VOCAB, (16, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    _, [(view, truth)] = watched(
        link, lambda to: make_split(to, lora(), wire=wire, wire_dtype=wire_dtype), [batch]
    )
    assert len(view.sites) == 3 and len(view.entry) == 384
    for site in view.sites:
        for solution, want in zip(*solved(view, truth, site), strict=True):
            assert solution.determined and solution.rank == 4
            assert relative_error(solution.product_OD, want) < (
                1e-3 if wire_dtype == "fp16" else 1e-4
            )


def test_adapter_is_not_solved_from_noise_or_too_few_rows(link: InProcessLink) -> None:
    """With noise on the deltas B A comes out wrong and the residual tells; with few rows it holds
    for those alone.
    """
    _, [(view, truth)] = watched(
        link, lambda to: make_split(to, lora()), batches(1, rows=16, length=24)
    )
    low, *_, high = sorted(view.sites)
    for solution, want in zip(*solved(view, truth, high, noise=1.0), strict=True):
        assert relative_error(solution.product_OD, want) > 0.3 and solution.residual > 0.3
    few = slice(0, 20)
    assert view.sites[low].input_grad is None
    for number, (solution, want) in enumerate(zip(*solved(view, truth, low, few), strict=True)):
        assert not solution.determined and relative_error(solution.product_OD, want) > 0.3
        rows, delta = view.sites[low].x[few], view.sites[low].deltas[number][few]
        assert relative_error(rows @ solution.product_OD.T, delta) < 1e-3
    # Higher up what the edge sends back needs no more rows than all ranks together.
    for solution, want in zip(*solved(view, truth, high, few), strict=True):
        assert solution.determined and relative_error(solution.product_OD, want) < 1e-3


# ----------------------------------------------------------------- measures


def test_rouge_l_equals_the_textbook_recursion() -> None:
    """ROUGE-L is twice the longest common subsequence over both lengths, also for unequal
    lengths.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 20, (2,), generator=generator).tolist()
        a, b = (torch.randint(0, 5, (length,), generator=generator).tolist() for length in lengths)
        best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, one in enumerate(a):
            for j, other in enumerate(b):
                best[i + 1][j + 1] = (
                    best[i][j] + 1 if one == other else max(best[i][j + 1], best[i + 1][j])
                )
        assert rouge_l(a, b) == pytest.approx(2 * best[-1][-1] / (len(a) + len(b)))
    assert rouge_l([], []) == 1 and rouge_l([1], []) == 0


def test_token_scores_count_what_they_say() -> None:
    """Shares of seen, unseen and own tokens, whole rows, and chance are those of an example counted
    by hand.
    """
    want = torch.tensor([1, 7, 8, 1, 7, 9, 1, 5, 6])
    found = torch.tensor([1, 7, 8, 1, 0, 9, 1, 5, 5])
    row = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    scores = token_scores(found, want, row, seen=torch.tensor([1, 6, 8]))
    assert scores["tokens"] == pytest.approx(7 / 9) and scores["rows_exact"] == pytest.approx(1 / 3)
    assert scores["own"] == pytest.approx(3 / 4)  # 1 and 7 are in most rows: 8, 9, 5, 6 are not
    assert scores["seen"] == pytest.approx(4 / 5) and scores["unseen"] == pytest.approx(3 / 4)
    assert scores["num_unseen"] == 4 and scores["chance"] == pytest.approx(3 / 9)


# ----------------------------------------------------------------- the command


def test_audit_of_a_run(
    run: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command finds what the plain wire gives away, and writes figures alone, on one page that
    needs nothing.
    """
    output, flags = tmp_path / "audit", ["--sites", "2", "--match", "2"]
    assert (
        main(["audit", str(run), "--server", server.address, "--output", str(output), *flags]) == 0
    )
    found = json.loads((output / "audit.json").read_text())
    assert str(output / "audit.html") in capsys.readouterr().out
    by = {(one["attack"], one["place"], one["attacker"]): one for one in found["attacks"]}
    first, last = sorted(map(int, found["sites"]))
    assert by["masks", "begin", None]["lengths"] == by["masks", "begin", None]["supervised"] == 1
    assert by["look-up", "entry", None]["tokens"] == by["look-up", "entry", None]["rows_exact"] == 1
    assert by["labels", "exit", None]["labels"] == 1 > by["guess", "exit", None]["labels"]
    assert by["inverter", f"site {first}", "in-domain"]["tokens"] > 0.8
    assert by["inverter", f"site {first}", "out-of-domain"]["unseen"] is not None
    assert by["adapter", f"site {last}", None]["known"] == 1
    assert by["matching", f"site {last}", "out-of-domain"]["rows"] == 2
    assert {name for _, _, name in by} == {None, "in-domain", "out-of-domain"}
    assert found["recording"] == {"micro_batches": 12, "rows": 48} | {
        key: found["recording"][key] for key in ("tokens", "supervised")
    }
    assert found["loss"]["recorded_last"] < found["loss"]["recorded_first"]
    page = (output / "audit.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and not re.search(
        r'(src|href)="(?!data:)', page
    )
    for text in (page, (output / "audit.json").read_text()):
        assert not any(f" {word} of" in text for word in WORDS)


def test_audit_where_the_active_set_changes(
    link: InProcessLink, data: Path, tmp_path: Path
) -> None:
    """With Kill and Revive on the factored wire the audit still runs, at the places that stay."""
    options = {
        "budget": 0.5,
        "average": False,
        "warmup": 2,
        "interval": 1,
        "final": 0,
        "revive": "random",
        "drop_steps": 0,
    }
    train(
        settings(data, tmp_path / "run", record=12, kr="on", kr_options=options, wire="factored"),
        link,
    )
    found = audit(AuditSettings(run=tmp_path / "run", server="in-process"), link)
    places = {one["place"] for one in found["attacks"]}
    assert (
        {"entry", "exit"}
        <= places
        <= {"begin", "entry", "exit", *(f"site {site}" for site in found["sites"])}
    )
    assert found["setting"]["wire"] == "factored" and len(found["sites"]) < 3


def test_audit_of_the_hosted_wire(link: InProcessLink, data: Path, tmp_path: Path) -> None:
    """Nothing is asked at sites; the audit says that the cloud was sent the adapter, and attacks
    the two ends as ever.
    """
    options: dict[str, Any] = {"record": 12, "wire": "hosted", "upload_consent": True}
    train(settings(data, tmp_path / "run", **options), link)
    found = audit(AuditSettings(run=tmp_path / "run", server="in-process"), link)
    assert found["setting"]["wire"] == "hosted" and not found["sites"]
    by = {one["attack"]: one for one in found["attacks"]}
    assert by["adapter"]["says"] == "the adapter itself, sent by --wire hosted"
    assert by["look-up"]["tokens"] == by["labels"]["labels"] == 1
    write_audit(found, tmp_path / "audit")


def test_attacker_and_victim_share_no_text(link: InProcessLink, data: Path, tmp_path: Path) -> None:
    """Rows with the same text, here from a second epoch, are never in both halves, nor counted
    twice.
    """
    train(settings(data, tmp_path / "run", record=24, epochs=2.0), link)
    recording = Recording(tmp_path / "run/recording")
    seen = collect((recording.read(number)[:2] for number in range(24)), [])
    known, attacked = split_rows(seen, 100, seed=0)

    def texts(one: Samples) -> list[tuple[int, ...]]:
        return [tuple(one.ids_N[one.row_N == row].tolist()) for row in one.row_N.unique()]

    assert seen.num_rows == 96 and attacked.num_rows == 24 == len(set(texts(attacked)))
    assert not set(texts(known)) & set(texts(attacked))


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("series", "o_proj"), pytest.param("parallel", "q_proj", marks=pytest.mark.slow)],
)
def test_audit_of_bottlenecks(
    link: InProcessLink, data: Path, tmp_path: Path, kind: Any, targets: str
) -> None:
    """What comes to bottleneck adapters is attacked as what comes to LoRA is; there is no product
    to solve for.
    """
    options: dict[str, Any] = {
        "record": 12,
        "kind": kind,
        "target_modules": targets,
        "max_steps": 6,
    }
    train(settings(data, tmp_path / "run", **options), link)
    found = audit(AuditSettings(run=tmp_path / "run", server="in-process", match=2), link)
    by = {(one["attack"], one["place"], one["attacker"]): one for one in found["attacks"]}
    assert len(found["sites"]) == 3
    for site in found["sites"]:
        own = by["inverter", f"site {site}", "in-domain"]
        assert own["tokens"] > 2 * own["chance"]
    assert by["labels", "exit", None]["labels"] == 1
    assert {one["attack"] for one in found["attacks"]} == {
        *("masks", "zeros", "look-up", "inverter", "guess", "labels", "label map", "matching"),
    }


def test_audit_refuses_what_it_cannot_use(
    run: Path, link: InProcessLink, cloud_models: Callable[[str], CloudModel], tmp_path: Path
) -> None:
    """No run, no recording, another model, or settings that make no sense are errors that say what
    to do.
    """
    with pytest.raises(UsageError, match=r"holds no run of `dlora train`: there is no run\.json"):
        audit(AuditSettings(run=tmp_path, server="in-process"), link)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(
        UsageError, match="holds no recording: make one with `dlora train --record 24"
    ):
        audit(AuditSettings(run=tmp_path, server="in-process"), link)
    other = InProcessLink(cloud_models("qwen2"))
    with pytest.raises(
        UsageError, match="recorded with a model of fingerprint .* serves example-org/qwen2"
    ):
        audit(AuditSettings(run=run, server="in-process"), other)
    other.close()
    with pytest.raises(UsageError, match="rows: got 0, want at least 1"):
        AuditSettings(run=run, server="in-process", rows=0)
    with pytest.raises(UsageError, match="record: got -1, want 0 or more"):
        TrainSettings(server="in-process", data="x", output=tmp_path / "new", record=-1)


@pytest.mark.slow
def test_plain_setting_of_a_real_model(tmp_path: Path) -> None:
    """SmolLM2 without protection: all tokens at the entry, nine in ten at layer 4, all labels, B A
    to 1e-3.
    """
    run, output = tmp_path / "run", tmp_path / "audit"
    layers = r".*layers\.(0|4|16|29)\.self_attn\.(q|k|v)_proj"
    flags = [
        "--batch_size",
        "16",
        "--max_steps",
        "14",
        "--record",
        "14",
        "--target_modules",
        layers,
        "--report_to",
        "[]",
    ]
    with serving(DEMO_MODEL) as address:
        common = ["--server", address]
        assert (
            main(
                [
                    "train",
                    *common,
                    "--data",
                    str(data_file("train.jsonl")),
                    "--output",
                    str(run),
                    *flags,
                ]
            )
            == 0
        )
        public = ["--public", str(data_file("heldout.jsonl"))]
        assert (
            main(["audit", str(run), *common, *public, "--rows", "160", "--output", str(output)])
            == 0
        )
    found = json.loads((output / "audit.json").read_text())
    by = {
        (one["attack"], one["where"].partition(":")[0], one["attacker"]): one
        for one in found["attacks"]
    }
    assert by["look-up", "entry", None]["tokens"] == 1
    assert by["inverter", "layer 4", "in-domain"]["tokens"] > 0.9
    assert by["labels", "exit", None]["labels"] == 1
    for layer in (4, 16, 29):
        assert by["adapter", f"layer {layer}", None]["error"] <= 1e-3
