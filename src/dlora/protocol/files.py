"""Files that every edge gets from a cloud: embedding, LM head, tokenizer. Data only, no code."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Final

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlora.proto import dlora_pb2 as pb
from dlora.protocol.decoder import decoder_of, edge_parameters
from dlora.protocol.weights import weight_of

__all__ = ["ALLOWED_FILES", "OUTSIDE", "describe_files", "edge_weights", "write_edge_files"]

OUTSIDE: Final = "outside."
"""Before the names of what is neither embedding nor head, and runs on the edge."""

# Written by save_pretrained of tokenizers, minus everything that can carry code or pickles.
ALLOWED_FILES: Final = frozenset(
    "edge.safetensors generation_config.json tokenizer.json tokenizer_config.json "
    "special_tokens_map.json added_tokens.json chat_template.jinja vocab.json vocab.txt merges.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model".split()
)


def edge_weights(model: PreTrainedModel, called: set[str] | None = None) -> dict[str, Tensor]:
    """What an edge holds of a model, on the CPU, where it is there already without a copy.

    That is embedding.*, head.* where not tied, and outside.* for all else that one forward calls
    outside the decoder. `called`: names of the modules that one forward calls there; None: whatever
    is there.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = {
        f"embedding.{name}": _plain(_inner_weight(embedding, name))
        for name, _ in embedding.named_parameters()
    }
    written = {id(value) for value in embedding.parameters()}
    for name, value in [] if head is None else head.named_parameters():
        if value is not embedding.weight:
            weights[f"head.{name}"] = _plain(_inner_weight(head, name))
        written.add(id(value))
    for name, value in edge_parameters(model, decoder_of(model), called):
        if id(value) not in written:
            weights[f"{OUTSIDE}{name}"] = _plain(_inner_weight(model, name))
            written.add(id(value))
    return weights


def write_edge_files(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    called: set[str] | None = None,
) -> None:
    """Write what an edge needs beside decoder layers.

    That is `edge.safetensors`, with what `edge_weights` says, generation config and tokenizer.
    """
    save_file(edge_weights(model, called), folder / "edge.safetensors")

    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)

    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            for file in Path(scratch).iterdir():
                if file.name in ALLOWED_FILES:
                    (folder / file.name).write_bytes(file.read_bytes())


def _inner_weight(module: nn.Module, name: str) -> Tensor:
    """A tensor of a module, or of one inside it."""
    place, _, own = name.rpartition(".")
    return weight_of(module.get_submodule(place), own)


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu").contiguous()


def describe_files(folder: Path) -> list[pb.FileInfo]:
    """Name, size and SHA-256 of every file in the folder, sorted by name."""
    infos = []
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        infos.append(pb.FileInfo(name=file.name, size=file.stat().st_size, sha256=digest))
    return infos
