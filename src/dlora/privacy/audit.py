"""How much a recorded run reveals to an honest-but-curious cloud: every attack, counted.

    recording --> victim's samples --+--> half of the rows: what the in-domain attacker knows
                                     +--> the other half: attacked
    public text, through the server ----> what the out-of-domain attacker knows

    lengths.py   masks, and gradients that are zero     tokens.py     look-up, linear inverter
    labels.py    closed form, linear map                matching.py   tokens tried in the model
    adapters.py  B A by least squares

Each of these runs functions of `attacks.py` on samples, compares with the truth, and puts what it
gets in words. `page.py` writes it down.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from dlora.edge.link import Link
from dlora.edge.model import SplitModel
from dlora.edge.noise import Noise
from dlora.errors import UsageError
from dlora.privacy.adapters import attack_adapters, sent_adapter
from dlora.privacy.attacker import any_module, attackers_model, public_texts, run_texts, wire_of
from dlora.privacy.cloud_view import CloudView
from dlora.privacy.findings import Attackers, Finding
from dlora.privacy.labels import attack_labels
from dlora.privacy.lengths import LengthCounts, attack_lengths, count_lengths
from dlora.privacy.matching import attack_by_matching
from dlora.privacy.places import attacked_modules, in_words, read_outputs
from dlora.privacy.recording import Recording, Truth
from dlora.privacy.samples import Samples, collect, split_rows
from dlora.privacy.settings import AuditSettings
from dlora.privacy.tokens import attack_tokens
from dlora.privacy.verdict import verdict
from dlora.protocol.codecs import codecs_of, name_of
from dlora.runs import Run, load_run

__all__ = ["audit", "read_recording"]


def audit(settings: AuditSettings, link: Link) -> dict[str, Any]:
    """Run every attack on the recording of a run; return what audit.json holds: figures, no text.

    Raises UsageError for a run without recording, and for a server with another model.
    """
    run = load_run(settings.run)
    recording = Recording(settings.run / "recording")
    first, truth, fingerprint = recording.read(0)
    _check_model(fingerprint, link)

    # Where: the modules of each attacked site, and each site in words.
    active = attacked_modules(recording, link, settings.sites)
    places = {site: in_words(names) for site, names in active.items()}
    sites = list(active)

    # The victim, and what the in-domain attacker knows of it.
    counts: list[LengthCounts] = []
    victim = collect(read_recording(recording, counts), sites)
    known, attacked = split_rows(victim, settings.rows, settings.seed)

    # The out-of-domain attacker. Without an attacked site its adapter still has to sit somewhere.
    names = [name for at_site in active.values() for name in at_site]
    names = names or [one.name for one in truth.modules[:1]] or any_module(link, first.begin)
    model = attackers_model(
        link,
        names,
        first.begin,
        series=read_outputs(link, sites),
        noise=_noise(run.values.get("settings", {})),
        give_up_after_s=settings.give_up_after_s,
    )
    texts, source = public_texts(settings.public, link)
    public = collect(run_texts(model, texts), sites)

    attackers = {"in-domain": known, "out-of-domain": public}
    attacks = _attack(recording, counts, attacked, attackers, link, model, places, settings)
    about = _about_run(run, recording, link)
    return {
        "verdict": verdict(attacks, about["setting"]),
        **about,
        "recording": {"micro_batches": len(recording), **_size(victim)},
        "attacked": _size(attacked),
        "attackers": {
            "in-domain": _learned_from("other rows of the recording", known),
            "out-of-domain": _learned_from(source, public),
        },
        "sites": {str(site): place for site, place in places.items()},
        "seed": settings.seed,
        "attacks": attacks,
    }


@torch.no_grad()
def _attack(
    recording: Recording,
    counts: list[LengthCounts],
    attacked: Samples,
    attackers: Attackers,
    link: Link,
    model: SplitModel,
    places: dict[int, str],
    settings: AuditSettings,
) -> list[Finding]:
    """Every attack, in the order of the page."""
    begin, seed = recording.read(0)[0].begin, settings.seed
    head, norm = model.get_output_embeddings(), model.last_hidden
    table = model.get_input_embeddings()
    table_VE = table(torch.arange(table.weight.shape[0])).float()
    public = attackers["out-of-domain"]

    return [
        *attack_lengths(counts),
        *attack_tokens(attacked, attackers, table_VE, places, seed),
        *attack_labels(attacked, attackers, head, norm, begin, places, seed),
        *attack_by_matching(
            link, model, attacked, public, table_VE, places, most=settings.match, seed=seed
        ),
        *(sent_adapter(recording) if begin.hosted else attack_adapters(recording, places)),
    ]


# ----------------------------------------------------------------- the recording


def _check_model(fingerprint: str, link: Link) -> None:
    if fingerprint != link.description.fingerprint:
        raise UsageError(
            f"the run was recorded with a model of fingerprint {fingerprint[:12]}, {link.address} "
            "serves "
            f"{link.description.model_id} ({link.description.fingerprint[:12]}): start the model "
            "of the run"
        )


def read_recording(
    recording: Recording, counts: list[LengthCounts]
) -> Iterator[tuple[CloudView, Truth]]:
    """Every micro-batch of the recording; `counts` gets what the shapes of each reveal."""
    for number in tqdm(range(len(recording)), desc="recording", unit="micro-batch"):
        view, truth, _ = recording.read(number)
        counts.append(count_lengths(view, truth))
        yield view, truth


# ----------------------------------------------------------------- what was audited


def _about_run(run: Run, recording: Recording, link: Link) -> dict[str, Any]:
    """The run, its setting and its losses."""
    first, first_truth, fingerprint = recording.read(0)
    _, last_truth, _ = recording.read(len(recording) - 1)
    begin, options = first.begin, run.values.get("settings", {})
    asked = ("lora_dropout", "noise_entry", "noise_tail", "pad_to")

    return {
        "run": run.name,
        "model_id": link.description.model_id,
        "fingerprint": fingerprint,
        # Frames reveal the wire, run.json what the run asked for.
        "setting": {
            "edge_first": begin.edge_first,
            "edge_last": begin.edge_last,
            "wire": wire_of(begin),
            "wire_dtype": name_of(codecs_of(begin)),
            "input_grad": "drop" if begin.drop_input_grads else "exact",
            **{name: options.get(name) for name in asked},
        },
        # None: not known, as of a run that was interrupted.
        "loss": {
            "recorded_first": first_truth.loss,
            "recorded_last": last_truth.loss,
            "train": run.values.get("train_loss"),
            "eval": run.values.get("eval_loss"),
        },
    }


def _noise(options: dict[str, Any]) -> Noise:
    """The noise of the run."""
    return Noise(
        entry=options.get("noise_entry") or 0.0,
        tail=options.get("noise_tail") or 0.0,
        clip=options.get("noise_clip") or Noise.clip,
    )


def _size(samples: Samples) -> dict[str, int]:
    num_labels = len(samples.labels_K)
    return {"rows": samples.num_rows, "tokens": len(samples.ids_N), "supervised": num_labels}


def _learned_from(text: str, samples: Samples) -> dict[str, Any]:
    return {"text": text, "rows": samples.num_rows, "tokens": len(samples.ids_N)}
