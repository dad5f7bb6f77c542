"""How much a recorded run tells an honest-but-curious cloud: every attack of `attacks.py`, counted
against the truth.

The attacker's own text takes the same way as the victim's: through a split model with a fresh
adapter on the same server. So the audit needs no decoder weights, and holds for whatever the edge
does before the entry and after the exit.

Shapes: N rows (tokens), K supervised rows, D width, V vocabulary.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.data import load_rows
from dlora.edge.labels import IGNORE
from dlora.edge.link import Link, RetryPolicy
from dlora.edge.load import get_peft_model, load_tokenizer
from dlora.edge.model import SplitModel
from dlora.edge.noise import Noise
from dlora.edge.sites import shared_sites
from dlora.errors import UsageError
from dlora.files import write_json
from dlora.privacy.attacks import (
    Inverter,
    before_norm,
    fit_inverter,
    label_map,
    labels_from_exit,
    nearest_tokens,
    relative_error,
    rouge_l,
    solve_adapters,
    unit_rows,
)
from dlora.privacy.recording import CloudView, Recording, RecordingLink, Truth
from dlora.privacy.settings import AuditSettings
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.layers import EdgeLayers, layer_of
from dlora.protocol.sites import output_sites
from dlora.protocol.wire import WIRE_DTYPES
from dlora.runs import load_run

__all__ = ["audit", "check_drawing", "collect", "match_rows", "token_scores", "write_audit"]

_PUBLIC_ROWS: Final = 512
_PUBLIC_LENGTH: Final = 128
_PUBLIC_BATCH: Final = 16
_CANDIDATES: Final = 8  # of the inverter, and as many of the model's own
_EXACT: Final = 1e-3  # relative error up to which a module counts as known

Attackers = dict[str, "Samples"]
Finding = dict[str, Any]


def audit(settings: AuditSettings, link: Link) -> dict[str, Any]:
    """Run every attack on the recording of a run; return what audit.json holds: figures alone, no
    text.

    Raises UsageError for a run without recording, and for a server with another model.
    """
    run = load_run(settings.run)
    given = run.values.get("settings", {})
    recording = Recording(settings.run / "recording")
    first, truth, fingerprint = recording.read(0)
    if fingerprint != link.description.fingerprint:
        raise UsageError(
            f"the run was recorded with a model of fingerprint {fingerprint[:12]}, {link.address} "
            "serves "
            f"{link.description.model_id} ({link.description.fingerprint[:12]}): start the model "
            "of the run"
        )
    inputs = shared_sites(link.description)
    known_sites = {site.index: site for site in (*inputs, *output_sites(inputs))}
    sites = _spread(recording, settings.sites)
    active = {
        site: [known_sites[site].modules[i].name for i in first.sites[site].modules]
        for site in sites
    }
    places = {site: _place(names) for site, names in active.items()}
    # Without a site that is attacked there is still an adapter to sit somewhere.
    names = [name for at_site in active.values() for name in at_site]
    names = names or [one.name for one in truth.modules[:1]] or _any_module(link, first.begin)
    series = any(known_sites[site].reads_output for site in sites)
    notes: list[dict[str, Any]] = []
    victim = collect(_recorded(recording, notes), sites)
    known, attacked = _split(victim, settings.rows, settings.seed)
    model = _attackers_model(link, names, first.begin, settings.give_up_after_s, series=series)
    # Who knows that there is noise learns from text with such noise.
    noise = Noise(
        entry=given.get("noise_entry") or 0.0,
        tail=given.get("noise_tail") or 0.0,
        clip=given.get("noise_clip") or Noise.clip,
    )
    model.set_options(noise=noise)
    texts, source = _public_texts(settings.public, load_tokenizer(link))
    public = collect(_public(model, texts), sites)
    attackers = {"in-domain": known, "out-of-domain": public}
    with torch.no_grad():
        table = model.get_input_embeddings()(
            torch.arange(model.get_input_embeddings().weight.shape[0])
        ).float()
        findings = [
            *_shapes(notes),
            *_tokens(attacked, attackers, table, places, settings.seed),
            *_labels(attacked, attackers, model, first, places, settings.seed),
            *_matching(link, model, attacked, public, table, places, settings.match, settings.seed),
            *_adapters(recording, places),
        ]
    begin = first.begin
    return {
        "run": run.name,
        "model_id": link.description.model_id,
        "fingerprint": fingerprint,
        "setting": {
            "edge_first": begin.edge_first,
            "edge_last": begin.edge_last,
            "wire": "factored" if begin.factored else "plain",
            "wire_dtype": next(
                name for name, dtype in WIRE_DTYPES.items() if dtype == begin.wire_dtype
            ),
            **{
                name: given.get(name)
                for name in ("lora_dropout", "noise_entry", "noise_tail", "pad_to")
            },
        },
        "loss": {
            "recorded_first": notes[0]["loss"],
            "recorded_last": notes[-1]["loss"],
            "train": run.values.get("train_loss"),
            "eval": run.values.get("eval_loss"),
        },
        "recording": {
            "micro_batches": len(recording),
            "rows": victim.num_rows,
            "tokens": len(victim.ids_N),
            "supervised": len(victim.labels_K),
        },
        "attacked": {
            "rows": attacked.num_rows,
            "tokens": len(attacked.ids_N),
            "supervised": len(attacked.labels_K),
        },
        "attackers": {
            name: {
                "text": source if name == "out-of-domain" else "other rows of the recording",
                "rows": one.num_rows,
                "tokens": len(one.ids_N),
            }
            for name, one in attackers.items()
        },
        "sites": {str(site): place for site, place in places.items()},
        "seed": settings.seed,
        "attacks": findings,
    }


# -------------------------------------- what attackers and victim have in common


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Rows at every place of the wire, beside what they came from."""

    ids_N: Tensor
    row_N: Tensor
    """Which row of data a token is of."""
    entry_ND: Tensor
    sites: dict[int, Tensor]
    """x [N, D] of each attacked site."""
    labels_K: Tensor
    row_K: Tensor
    batch_K: Tensor
    """Which micro-batch a supervised position is of."""
    exit_KD: Tensor
    exit_grad_KD: Tensor
    top_grad_KD: Tensor
    """Gradients of the deltas of the highest attacked site, all modules side by side."""

    @property
    def num_rows(self) -> int:
        """Rows of data."""
        return len(self.row_N.unique())

    def of_rows(self, rows: Tensor) -> Samples:
        """Those of some rows of data."""
        n, k = torch.isin(self.row_N, rows), torch.isin(self.row_K, rows)
        return Samples(
            sites={site: x[n] for site, x in self.sites.items()},
            **{name: getattr(self, name)[n] for name in ("ids_N", "row_N", "entry_ND")},
            **{
                name: getattr(self, name)[k]
                for name in (
                    "labels_K",
                    "row_K",
                    "batch_K",
                    "exit_KD",
                    "exit_grad_KD",
                    "top_grad_KD",
                )
            },
        )


def collect(seen: Iterable[tuple[CloudView, Truth]], sites: Sequence[int]) -> Samples:
    """Line up what the cloud sees with the truth: attended tokens, and kept positions that have a
    label.
    """
    parts: list[Samples] = []
    num_rows = 0
    for number, (view, truth) in enumerate(seen):
        attended_N = truth.attention_mask.bool().reshape(-1)[
            view.positions
        ]  # padding may travel as other tokens do
        labels_K = truth.next_labels.reshape(-1)[view.keep]
        supervised_K = labels_K != IGNORE
        kept_rows = torch.searchsorted(view.positions, view.keep)[supervised_K]
        length = view.begin.length
        top = view.sites[sites[-1]].delta_grads if sites else []
        nothing = view.exit.new_zeros(int(supervised_K.sum()), 0)
        parts.append(
            Samples(
                ids_N=truth.input_ids.reshape(-1)[view.positions][attended_N],
                row_N=(view.positions // length + num_rows)[attended_N],
                entry_ND=view.entry[attended_N],
                sites={site: view.sites[site].x[attended_N] for site in sites},
                labels_K=labels_K[supervised_K],
                row_K=(view.keep // length + num_rows)[supervised_K],
                batch_K=torch.full((int(supervised_K.sum()),), number),
                exit_KD=view.exit[supervised_K],
                exit_grad_KD=view.exit_grad[supervised_K],
                top_grad_KD=torch.cat([nothing, *(one[kept_rows] for one in top)], 1),
            )
        )
        num_rows += view.begin.batch
    names = [name for name in Samples.__dataclass_fields__ if name != "sites"]
    return Samples(
        sites={site: torch.cat([part.sites[site] for part in parts]) for site in sites},
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
    )


def _recorded(
    recording: Recording, notes: list[dict[str, Any]]
) -> Iterator[tuple[CloudView, Truth]]:
    """Every micro-batch of the recording; notes of each its loss, and what its shapes tell."""
    for number in tqdm(range(len(recording)), desc="recording", unit="micro-batch"):
        view, truth, _ = recording.read(number)
        batch, length = view.attended_BT.shape
        lengths, labels = truth.attention_mask.sum(1), (truth.next_labels != IGNORE).sum(1)
        kept = torch.bincount(view.keep // length, minlength=batch)
        graded_BT = torch.zeros(batch * length, dtype=torch.bool)
        graded_BT[view.keep] = view.exit_grad.any(1)
        graded_BT = graded_BT.view(batch, length)
        # The last gradient of a row is where its last token is to be predicted.
        behind = torch.where(graded_BT.any(1), length - graded_BT.flip(1).int().argmax(1) + 1, 0)
        notes.append(
            {
                "loss": truth.loss,
                "rows": batch,
                "masks": (
                    int((view.attended_BT.sum(1) == lengths).sum()),
                    int((kept == labels).sum()),
                ),
                "zeros": (int((behind == lengths).sum()), int((graded_BT.sum(1) == labels).sum())),
            }
        )
        yield view, truth


def _spread(recording: Recording, most: int) -> list[int]:
    """Sites at which the same modules are active all through the recording, evenly spread."""
    first, *others = [recording.sites(number) for number in range(len(recording))]
    found = sorted(
        site for site, modules in first.items() if all(one.get(site) == modules for one in others)
    )
    if len(found) <= most:
        return found
    return [found[round(i * (len(found) - 1) / max(1, most - 1))] for i in range(most)]


def _split(victim: Samples, most: int, seed: int) -> tuple[Samples, Samples]:
    """Rows that the in-domain attacker knows, and rows that are attacked; never the same text in
    both.
    """
    texts: dict[tuple[int, ...], list[int]] = {}
    for row in victim.row_N.unique().tolist():
        texts.setdefault(tuple(victim.ids_N[victim.row_N == row].tolist()), []).append(row)
    groups = list(texts.values())
    if len(groups) < 4:
        raise UsageError(
            f"the recording has {len(groups)} different rows, too few to learn from some and "
            "attack others"
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    half = len(groups) // 2
    first = [row for i in order[:half][:most] for row in groups[i]]
    second = [groups[i][0] for i in order[half:][:most]]
    return victim.of_rows(torch.tensor(first)), victim.of_rows(torch.tensor(second))


def _held_out(rows: Tensor, seed: int) -> Tensor:
    """Mask of about a fifth of an attacker's rows, whole rows of data."""
    names = rows.unique()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return torch.isin(rows, names[order[: max(1, len(names) // 5)]])


# ----------------------------------------------------------------- the out-of-domain attacker


def _public_texts(
    source: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], str]:
    """Token ids of public rows, and what to call them."""
    name = "the demo's messages" if source is None else Path(source).name
    rows, _ = load_rows(source or str(files("dlora") / "demo_data" / "train.jsonl"))
    if len(rows) > _PUBLIC_ROWS:
        rows = rows.select(range(_PUBLIC_ROWS))
    found: list[list[int]] = []
    for row in rows:
        parts = [row[part] for part in ("text", "prompt", "completion") if row.get(part)]
        if isinstance(parts[0], list):
            parts = [message["content"] + "\n" for part in parts for message in part]
        found.append(tokenizer("".join(parts))["input_ids"][:_PUBLIC_LENGTH])
    return [ids for ids in found if len(ids) > 1], name


def _any_module(link: Link, begin: pb.Begin) -> list[str]:
    """A module of the cloud's layers, where the run had no adapter there."""
    edge_layers = EdgeLayers(begin.edge_first, begin.edge_last, link.description.layers.count)
    modules = [
        module for site in link.description.sites for module in site.modules if module.allowed
    ]
    return [module.name for module in modules if edge_layers.in_cloud(layer_of(module.name))][:1]


def _attackers_model(
    link: Link, names: list[str], begin: pb.Begin, give_up_after_s: float, *, series: bool
) -> SplitModel:
    """A fresh adapter (B = 0) on the same modules: what comes to its sites is the frozen model's
    own.
    """
    config = (
        BottleneckConfig(r=1, target_modules=names)
        if series
        else LoraConfig(r=1, target_modules=names)
    )
    dtype = next(name for name, dtype in WIRE_DTYPES.items() if dtype == begin.wire_dtype)
    retry = RetryPolicy(give_up_after_s=give_up_after_s)
    model = get_peft_model(
        link,
        config,
        wire_dtype=dtype,
        retry=retry,
        edge_layers=(begin.edge_first, begin.edge_last),
        head_positions="supervised",
    )
    return model


def _public(model: SplitModel, texts: list[list[int]]) -> Iterator[tuple[CloudView, Truth]]:
    """Run the attacker's text, every token supervised, and look at its own wire."""
    seen: list[CloudView] = []
    model.link = RecordingLink(model.link, lambda edge, cloud: seen.append(CloudView(edge, cloud)))
    model.train()
    for start in tqdm(range(0, len(texts), _PUBLIC_BATCH), desc="public text", unit="micro-batch"):
        part = texts[start : start + _PUBLIC_BATCH]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, one in enumerate(part):
            ids[i, : len(one)] = torch.tensor(one)
            mask[i, : len(one)] = 1
        labels = ids.masked_fill(mask == 0, IGNORE)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        model.zero_grad()
        yield seen.pop(), Truth(input_ids=ids, attention_mask=mask, labels=labels)


# ----------------------------------------------------------------- attacks on the recording


def _finding(
    attack: str, place: str, where: str, says: str, attacker: str | None = None, **numbers: Any
) -> Finding:
    return {
        "attack": attack,
        "place": place,
        "where": where,
        "attacker": attacker,
        "says": says,
        **numbers,
    }


def _shapes(notes: list[dict[str, Any]]) -> Iterator[Finding]:
    """Lengths and numbers of labels of rows: from what Begin says, and from where gradients at the
    exit are zero.
    """
    rows = sum(one["rows"] for one in notes)
    for attack, place, where, way in (
        ("masks", "begin", "masks", "read off"),
        ("zeros", "exit", "exit", "by where gradients end and which are zero"),
    ):
        lengths, supervised = (sum(one[attack][i] for one in notes) / rows for i in range(2))
        says = f"the length of {lengths:.0%} of the rows, and of {supervised:.0%} how many labels they have, {way}"
        yield _finding(attack, place, where, says, lengths=lengths, supervised=supervised)


def token_scores(
    found_N: Tensor, want_N: Tensor, row_N: Tensor, seen: Tensor | None = None
) -> dict[str, Any]:
    """Shares of tokens that were recovered, and how well whole rows were.

    `own`: tokens of types that are in less than half of the rows, so not of a prompt's template.
    `seen` and `unseen`: tokens whose type is, or is not, in the attacker's text; None where there
    are none. `chance`: what always guessing the most frequent token gets.
    """
    right_N = found_N == want_N
    rows = [(found_N[row_N == row], want_N[row_N == row]) for row in row_N.unique()]
    spread = Counter(token for _, want in rows for token in want.unique().tolist())
    common = torch.tensor(
        [token for token, count in spread.items() if 2 * count >= len(rows)], dtype=torch.int64
    )

    def share(mask: Tensor) -> float | None:
        return float(right_N[mask].float().mean()) if mask.any() else None

    known_N = torch.zeros_like(right_N) if seen is None else torch.isin(want_N, seen)
    return {
        "tokens": float(right_N.float().mean()),
        "own": share(~torch.isin(want_N, common)),
        "seen": None if seen is None else share(known_N),
        "unseen": None if seen is None else share(~known_N),
        "num_unseen": None if seen is None else int((~known_N).sum()),
        "rows_exact": sum(torch.equal(found, want) for found, want in rows) / len(rows),
        "rouge_l": sum(rouge_l(found.tolist(), want.tolist()) for found, want in rows) / len(rows),
        "chance": float(want_N.bincount().max() / len(want_N)),
    }


def _tokens(
    attacked: Samples, attackers: Attackers, table: Tensor, places: dict[int, str], seed: int
) -> Iterator[Finding]:
    """Look-up at the entry, and the linear inverter of both attackers at the entry and every
    attacked site.
    """
    want, row = attacked.ids_N, attacked.row_N

    def told(scores: dict[str, Any]) -> str:
        return f"{scores['tokens']:.1%} of the tokens, {scores['rows_exact']:.0%} of the rows word for word"

    if attacked.entry_ND.shape[1] == table.shape[1]:
        scores = token_scores(nearest_tokens(attacked.entry_ND, table), want, row)
        yield _finding(
            "look-up",
            "entry",
            "entry",
            f"{told(scores)}, by a look-up in the embedding table",
            **scores,
        )
    inputs = [
        ("entry", "entry", None),
        *((f"site {site}", place, site) for site, place in places.items()),
    ]
    for key, where, site in tqdm(inputs, desc="inverting", unit="place"):
        for name, own in attackers.items():
            x, target = (
                (own.entry_ND, attacked.entry_ND)
                if site is None
                else (own.sites[site], attacked.sites[site])
            )
            inverter = fit_inverter(x, own.ids_N, table, _held_out(own.row_N, seed))
            scores = token_scores(inverter(target), want, row, own.ids_N.unique())
            unseen = (
                ""
                if scores["unseen"] is None
                else f" ({scores['unseen']:.1%} of those it had never seen)"
            )
            says = f"{told(scores)}, by a linear map learned from {_text(name)}{unseen}"
            yield _finding("inverter", key, where, says, name, **scores, **_fit(inverter, table))


def _text(attacker: str) -> str:
    return "other rows of the same data" if attacker == "in-domain" else "public text"


def _fit(inverter: Inverter, table: Tensor) -> dict[str, Any]:
    by = "embedding" if len(inverter.ids_V) == len(table) else "type"
    return {"target": by, "ridge": inverter.map.strength}


def _labels(
    attacked: Samples,
    attackers: Attackers,
    model: SplitModel,
    view: CloudView,
    places: dict[int, str],
    seed: int,
) -> Iterator[Finding]:
    """Labels from the exit's gradient in closed form, and by linear maps from that gradient and the
    top site's.
    """
    want, head = attacked.labels_K, model.get_output_embeddings()
    if not len(want):
        return
    chance = float(want.bincount().max() / len(want))
    weight = head.weight.detach().float()
    bias = None if head.bias is None else head.bias.detach().float()

    def scores(found: Tensor) -> dict[str, Any]:
        return {"labels": float((found == want).float().mean()), "chance": chance}

    # With last layers on the edge, their weights and other tokens lie between exit and head.
    closed: tuple[Tensor, Tensor, Tensor | None] | None = None
    if view.begin.edge_first and not view.begin.edge_last:
        closed = before_norm(model.last_hidden, attacked.exit_KD, attacked.exit_grad_KD)
    elif not view.begin.edge_last and attacked.exit_KD.shape[1] == weight.shape[1]:
        closed = attacked.exit_KD, attacked.exit_grad_KD, None
    if closed is not None:
        hidden_KD, grad_KD, blind_KRD = closed
        guess = torch.cat(
            [head(part).argmax(1) for part in hidden_KD.to(head.weight.dtype).split(512)]
        )
        got = scores(guess)
        yield _finding(
            "guess",
            "exit",
            "exit",
            f"{got['labels']:.1%} of the labels, by the model's own guess",
            **got,
        )
        found = torch.zeros_like(want)
        for number in attacked.batch_K.unique():
            one = attacked.batch_K == number
            blind = None if blind_KRD is None else blind_KRD[one]
            found[one] = labels_from_exit(hidden_KD[one], grad_KD[one], weight, bias, blind)
        got = scores(found)
        yield _finding(
            "labels",
            "exit",
            "exit",
            f"{got['labels']:.1%} of the labels, computed from the gradient at the exit",
            **got,
        )
    top = (
        list(places)[-1:] if not view.begin.factored else []
    )  # factored: in coordinates of a B that changes
    inputs = [
        ("exit", "exit", "exit_grad_KD"),
        *((f"site {site}", places[site], "top_grad_KD") for site in top),
    ]
    for key, where, rows in tqdm(inputs, desc="labels", unit="place"):
        for name, own in attackers.items():
            held = _held_out(own.row_K, seed)
            inverter = label_map(getattr(own, rows), own.labels_K, weight, held)
            got = scores(inverter(unit_rows(getattr(attacked, rows))))
            says = f"{got['labels']:.1%} of the labels, by a linear map from gradients learned from {_text(name)}"
            yield _finding("label map", key, where, says, name, **got, **_fit(inverter, weight))


def _matching(
    link: Link,
    model: SplitModel,
    attacked: Samples,
    public: Samples,
    table: Tensor,
    places: dict[int, str],
    most: int,
    seed: int,
) -> Iterator[Finding]:
    """Some rows by `match_rows` at the middle site, with public text alone."""
    if not most or not places:
        return
    site = list(places)[len(places) // 2]
    part = attacked.of_rows(attacked.row_N.unique()[:most])
    inverter = fit_inverter(public.sites[site], public.ids_N, table, _held_out(public.row_N, seed))
    found = match_rows(link, model, inverter, site, part.sites[site], part.row_N)
    scores = token_scores(found, part.ids_N, part.row_N, public.ids_N.unique())
    says = f"{scores['tokens']:.1%} of the tokens, {scores['rows_exact']:.0%} of the rows word for word, of "
    says += f"{part.num_rows} rows that were spelled out by trying tokens in the model itself, with public text alone"
    yield _finding(
        "matching",
        f"site {site}",
        places[site],
        says,
        "out-of-domain",
        **scores,
        rows=part.num_rows,
    )


def match_rows(
    link: Link, model: SplitModel, inverter: Inverter, site: int, x_ND: Tensor, row_N: Tensor
) -> Tensor:
    """Spell rows out from left to right by what comes to a site: token ids [N].

    Candidates of a position are the inverter's and those that the model expects after what was
    found so far. Each runs through the model, with the attacker's adapter; the one whose x comes
    closest is taken.
    """
    rows = [(row_N == row).nonzero()[:, 0] for row in row_N.unique()]
    guesses = inverter.candidates(x_ND, _CANDIDATES)
    seen: list[CloudView] = []
    model.set_active([name for one in model.sites if one.index == site for name in one.names])
    model.link = RecordingLink(
        link, lambda edge, cloud: seen.append(CloudView(edge, cloud)), training=False
    )
    model.eval()
    found_N = torch.zeros_like(row_N)
    expected: dict[int, Tensor] = {}
    for t in tqdm(range(max(map(len, rows))), desc="matching", unit="token"):
        longer = [number for number, row in enumerate(rows) if len(row) > t]
        tries = [
            torch.cat([guesses[rows[n][t]], expected.get(n, guesses[0, :0])]).unique()
            for n in longer
        ]
        prefixes = [
            found_N[rows[n][:t]].expand(len(new), t) for n, new in zip(longer, tries, strict=True)
        ]
        ids = torch.cat(
            [torch.cat([one, new[:, None]], 1) for one, new in zip(prefixes, tries, strict=True)]
        )
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1
            ).logits[:, -1]
        x = seen.pop().sites[site].x.view(*ids.shape, -1)[:, -1]
        start = 0
        for n, new in zip(longer, tries, strict=True):
            end = start + len(new)
            best = start + int((x[start:end] - x_ND[rows[n][t]]).norm(dim=1).argmin())
            found_N[rows[n][t]] = ids[best, -1]
            expected[n] = logits[best].topk(_CANDIDATES).indices
            start = end
    return found_N


def _adapters(recording: Recording, places: dict[int, str]) -> Iterator[Finding]:
    """B A of every module of the attacked sites, from the last micro-batches with one and the same
    adapter.
    """
    views = [recording.read(len(recording) - 1)[:2]]
    truth = views[0][1]
    if not truth.modules:  # what a bottleneck adds is no product that could be solved for
        return
    enough = 2 * max((one.A.shape[1] for one in truth.modules), default=0)
    for number in range(len(recording) - 2, -1, -1):
        if sum(len(view.positions) for view, _ in views) >= enough:
            break
        other = recording.read(number)[:2]
        pairs = zip(other[1].modules, truth.modules, strict=False)
        if not all(torch.equal(one.A, two.A) and torch.equal(one.B, two.B) for one, two in pairs):
            break
        views.append(other)
    num_rows = sum(len(view.positions) for view, _ in views)
    for site, where in tqdm(places.items(), desc="adapters", unit="site"):
        seen = [view.sites[site] for view, _ in views]
        want = {one.module: one.B @ one.A for one in truth.modules if one.site == site}
        grads = [one.input_grad for one in seen]
        solutions = solve_adapters(
            torch.cat([one.x for one in seen]),
            [torch.cat(parts) for parts in zip(*(one.deltas for one in seen), strict=True)],
            factors=seen[0].factors,
            delta_grads=[
                torch.cat(parts) for parts in zip(*(one.delta_grads for one in seen), strict=True)
            ],
            input_grad_ND=None
            if any(one is None for one in grads)
            else torch.cat([g for g in grads if g is not None]),
        )
        errors = [
            relative_error(solution.product_OD, want[module])
            for module, solution in zip(seen[0].modules, solutions, strict=True)
            if want[module].any()
        ]
        if not errors:
            continue
        worst = max(errors)
        says = f"the adapter's product B A to a relative error of {worst:.1e} or better, from {num_rows} rows"
        if not all(one.determined for one in solutions):
            says += " (too few different ones for all of it: what it does to inputs like those seen is known exactly)"
        yield _finding(
            "adapter",
            f"site {site}",
            where,
            says,
            error=worst,
            errors=errors,
            rows=num_rows,
            in_features=seen[0].x.shape[1],
            ranks=[one.rank for one in solutions],
            determined=all(one.determined for one in solutions),
            known=sum(error <= _EXACT for error in errors) / len(errors),
        )


def _place(names: Iterable[str]) -> str:
    """ "model.layers.3.self_attn.q_proj" and so on as "layer 3: q_proj, ..."."""
    found = list(names)
    layer = next((part for part in found[0].split(".") if part.isdigit()), None)
    kinds = ", ".join(name.rpartition(".")[2] for name in found)
    return kinds if layer is None else f"layer {layer}: {kinds}"


# ----------------------------------------------------------------- the page

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>DLoRA audit</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: .9rem } td, th { padding: .3rem .7rem; border-bottom: 1px solid #ddd }
td, th { text-align: left; vertical-align: top } img { max-width: 100% }
figure { margin: 2rem 0 } figcaption { color: #555 } .wide { overflow-x: auto } .number { text-align: right }
</style></head><body>
<h1>What a curious cloud could recover: {{ found.run }}</h1>
<p>The first {{ found.recording.micro_batches }} micro-batches of this run were recorded on the edge:
{{ found.recording.rows }} rows of data, {{ found.recording.tokens }} tokens, {{ found.recording.supervised }} labels.
Below is what a cloud that keeps the rules but records everything computes from them, on {{ found.attacked.rows }} rows
({{ found.attacked.tokens }} tokens) of which no attacker knew the text. Everything here is a lower bound: others may
find better attacks.</p>
<div class="wide"><table>
<tr><td>model</td><td>{{ found.model_id }}</td></tr>
{% for name, value in found.setting.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
<tr><td>loss of the recorded micro-batches</td><td>{{ loss(found.loss.recorded_first) }} in the first,
{{ loss(found.loss.recorded_last) }} in the last</td></tr>
<tr><td>loss at the end of the run</td><td>{{ loss(found.loss.train) }} training, {{ loss(found.loss.eval) }}
evaluation</td></tr>
{% for name, one in found.attackers.items() %}<tr><td>{{ name }} attacker</td><td>learned from {{ one.text }}:
{{ one.rows }} rows, {{ one.tokens }} tokens</td></tr>{% endfor %}
</table></div>
<figure><h2>Tokens recovered, by place</h2>
<img src="data:image/png;base64,{{ figure }}" alt="tokens recovered at each place, for both attackers">
<figcaption>Share of all tokens that a linear map gets right; dashed: of tokens whose type the attacker's own text
did not have. Square: look-up in the embedding table. Star:
tokens tried in the model itself. Dotted: always guessing the most frequent token.</figcaption>
</figure>
<h2>Every attack</h2>
<div class="wide"><table><tr><th>where</th><th>a cloud that records gets</th><th class="number">own tokens</th>
<th class="number">ROUGE-L</th><th class="number">chance</th></tr>
{% for one in found.attacks %}<tr><td>{{ one.where }}</td><td>{{ one.says }}</td>
<td class="number">{{ share(one.own) }}</td><td class="number">{{ share(one.rouge_l) }}</td>
<td class="number">{{ share(one.chance) }}</td></tr>
{% endfor %}</table></div>
<p><em>Own tokens</em>: recovered of those that are not in most rows, so not of a prompt's template. <em>ROUGE-L</em>:
how much of a row's text comes out in order. <em>Chance</em>: always guessing the most frequent token or label.</p>
</body></html>
"""


def check_drawing() -> None:
    """Raises UsageError if matplotlib or jinja2 are not installed: before anything is computed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib
    except ImportError as error:
        raise UsageError(
            '`dlora audit` draws with matplotlib: pip install "dlora[report]"'
        ) from error
    matplotlib.use("agg")


def write_audit(found: dict[str, Any], output: Path) -> list[Path]:
    """Write output/audit.json and output/audit.html; return both. Raises UsageError if matplotlib
    is missing.
    """
    check_drawing()
    from jinja2 import Environment

    output.mkdir(parents=True, exist_ok=True)
    values, page = output / "audit.json", output / "audit.html"
    write_json(values, found)
    html = Environment(autoescape=True).from_string(_PAGE)
    page.write_text(
        html.render(
            found=found,
            figure=base64.b64encode(_figure(found)).decode(),
            share=lambda value: f"{value:.1%}" if isinstance(value, float) else "",
            loss=lambda value: f"{value:.3f}" if isinstance(value, float) else "not known",
        )
    )
    return [values, page]


def _figure(found: dict[str, Any]) -> bytes:
    """Token recovery by place, a line for each attacker, as PNG."""
    from matplotlib import pyplot

    places = ["entry", *(f"site {site}" for site in found["sites"])]
    where = [place.partition(": ") for place in found["sites"].values()]
    same = len({kinds for _, _, kinds in where}) == 1
    labels = [
        "entry",
        *(
            layer if same else f"{layer}\n{kinds.replace(', ', chr(10))}"
            for layer, _, kinds in where
        ),
    ]
    figure, panel = pyplot.subplots(figsize=(10, 4), layout="constrained")
    for colour, name in zip(("#d95f02", "#1f78b4"), found["attackers"], strict=True):
        inverters = [one for one in found["attacks"] if one["attack"] == "inverter"]
        mine = {one["place"]: one for one in inverters if one["attacker"] == name}
        for key, style in (
            ("tokens", {"marker": "o"}),
            ("unseen", {"marker": ".", "ls": "--", "alpha": 0.7}),
        ):
            points = [
                (i, mine[p][key])
                for i, p in enumerate(places)
                if p in mine and mine[p][key] is not None
            ]
            label = f"{name}" if key == "tokens" else None
            panel.plot(
                [i for i, _ in points], [y for _, y in points], color=colour, label=label, **style
            )
    for one in found["attacks"]:
        if one["attack"] == "matching":
            point = (places.index(one["place"]), one["tokens"])
            panel.plot(*point, "*", color="#1f78b4", ms=12, label=f"matching, {one['rows']} rows")
        if one["attack"] == "look-up":
            panel.plot(
                [0], [one["tokens"]], "s", color="#222222", ms=9, fillstyle="none", label="look-up"
            )
            panel.axhline(one["chance"], color="#888888", ls=":", lw=1)
    panel.set_xticks(range(len(places)), labels, fontsize=8)
    panel.set_ylim(0, 1.03)
    panel.set_ylabel("tokens recovered")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return out.getvalue()
