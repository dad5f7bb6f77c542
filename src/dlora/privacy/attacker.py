"""The out-of-domain attacker: public text, and its way through the run's own server.

It takes the same way as the victim's: through a split model with a fresh adapter. So the audit
needs no decoder weights, and holds for whatever the edge does before the entry and after the exit.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Final

import torch
from peft import LoraConfig
from tqdm.auto import tqdm

from dlora.edge.bottleneck import BottleneckConfig
from dlora.edge.data import load_rows
from dlora.edge.labels import IGNORE
from dlora.edge.link import Link, RetryPolicy
from dlora.edge.load import get_peft_model, load_tokenizer
from dlora.edge.model import SplitModel
from dlora.edge.noise import Noise
from dlora.privacy.cloud_view import CloudView
from dlora.privacy.recording import RecordingLink, Truth
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.codecs import codecs_of
from dlora.protocol.layers import EdgeLayers, layer_of

__all__ = ["any_module", "attackers_model", "public_texts", "run_texts", "wire_of"]

_PUBLIC_ROWS: Final = 512
_PUBLIC_LENGTH: Final = 128
_PUBLIC_BATCH: Final = 16


def public_texts(source: str | None, link: Link) -> tuple[list[list[int]], str]:
    """Token ids of public rows, and what to call them; without a file the demo's messages."""
    name = "the demo's messages" if source is None else Path(source).name
    tokenizer = load_tokenizer(link)
    rows, _ = load_rows(source or str(files("dlora") / "demo_data" / "train.jsonl"))
    if len(rows) > _PUBLIC_ROWS:
        rows = rows.select(range(_PUBLIC_ROWS))

    texts: list[list[int]] = []
    for row in rows:
        parts = [row[part] for part in ("text", "prompt", "completion") if row.get(part)]
        if isinstance(parts[0], list):
            parts = [message["content"] + "\n" for part in parts for message in part]
        texts.append(tokenizer("".join(parts))["input_ids"][:_PUBLIC_LENGTH])
    return [ids for ids in texts if len(ids) > 1], name


def any_module(link: Link, begin: pb.Begin) -> list[str]:
    """A module of the cloud's layers, where the run had no adapter there."""
    edge_layers = EdgeLayers(begin.edge_first, begin.edge_last, link.description.layers.count)
    modules = [
        module for site in link.description.sites for module in site.modules if module.allowed
    ]
    return [module.name for module in modules if edge_layers.in_cloud(layer_of(module.name))][:1]


def attackers_model(
    link: Link,
    names: list[str],
    begin: pb.Begin,
    *,
    series: bool,
    noise: Noise,
    give_up_after_s: float,
) -> SplitModel:
    """A fresh adapter on the run's own modules, with the run's own layers on the edge and noise.

    As B = 0, what comes to its sites is the frozen model's own. Who knows that there is noise
    learns from text with such noise. `series`: a site reads an output, as bottlenecks in series do.
    """
    config_class = BottleneckConfig if series else LoraConfig
    return get_peft_model(
        link,
        config_class(r=1, target_modules=names),
        wire_dtype=codecs_of(begin),
        retry=RetryPolicy(give_up_after_s=give_up_after_s),
        edge_layers=(begin.edge_first, begin.edge_last),
        head_positions="supervised",
        noise=noise,
    )


def wire_of(begin: pb.Begin) -> str:
    """The name of the wire of a recorded run."""
    return "hosted" if begin.hosted else "factored" if begin.factored else "plain"


def run_texts(model: SplitModel, texts: list[list[int]]) -> Iterator[tuple[CloudView, Truth]]:
    """Run the attacker's text, every token supervised, and look at its own wire."""
    seen: list[CloudView] = []
    model.link = RecordingLink(model.link, lambda edge, cloud: seen.append(CloudView(edge, cloud)))
    model.train()

    for start in tqdm(range(0, len(texts), _PUBLIC_BATCH), desc="public text", unit="micro-batch"):
        part = texts[start : start + _PUBLIC_BATCH]
        ids_BT = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for i, text in enumerate(part):
            ids_BT[i, : len(text)] = torch.tensor(text)
            mask_BT[i, : len(text)] = 1
        labels_BT = ids_BT.masked_fill(mask_BT == 0, IGNORE)

        # Gradients travel as well; nothing is learned.
        model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss.backward()
        model.zero_grad()
        yield seen.pop(), Truth(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT)
