"""What an audit comes to, in a sentence, and which flags would change it. Figures alone.

What layers on the edge would leave is told from what was read at the sites behind them; what other
flags do was measured in whole runs (docs/privacy.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from dlora.privacy.findings import Finding

__all__ = ["verdict"]

_READS: Final = ("look-up", "inverter", "matching")
_LABELS: Final = ("labels", "label map")
_LITTLE: Final = 0.2
"""Shares under this are called little, and nothing against them is proposed."""


def verdict(attacks: Sequence[Finding], setting: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of text, labels and adapter that are recovered at best, the sentence, and the ways.

    `text` is with any attacker, `text_public` with public text alone, `adapter` the share of the
    attacked sites at which B A is known; None where nothing was attacked.
    """
    readers = [one for one in attacks if one["attack"] in _READS]
    public = [one for one in readers if one["attacker"] != "in-domain"]
    known = [one["known"] for one in attacks if one["attack"] == "adapter"]
    found = {
        "text": _best(readers, "tokens"),
        "text_public": _best(public, "tokens"),
        "rows": _best(readers, "rows_exact"),
        "labels": _best([one for one in attacks if one["attack"] in _LABELS], "labels"),
        "lengths": _best(
            [one for one in attacks if one["attack"] in ("masks", "zeros")], "lengths"
        ),
        "adapter": sum(known) / len(known) if known else None,
    }
    ways = [{"flags": flags, "says": says} for flags, says in _ways(found, readers, setting)]
    return {**found, "says": _sentence(found), "ways": ways}


def _best(attacks: Iterable[Finding], name: str) -> float | None:
    return max((one[name] for one in attacks if one.get(name) is not None), default=None)


def _sentence(found: Mapping[str, float | None]) -> str:
    text, public = found["text"], found["text_public"]
    if text is None:
        return "Nothing of the text was attacked."
    says = f"With these settings a recording cloud reads {text:.0%} of the text"
    if public is not None and public < text:
        says += f", and {public:.0%} if it knows nothing like it"
    if found["rows"]:
        says += f" ({found['rows']:.0%} of the rows word for word)"
    if found["labels"] is not None:
        says += f". It computes {found['labels']:.0%} of the labels"
    if found["adapter"] is not None:
        says += f". It knows the adapter at {found['adapter']:.0%} of the attacked sites"
    return f"{says}."


def _ways(
    found: Mapping[str, float | None], readers: Sequence[Finding], setting: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """(flags of `dlora train`, what they change), for what is high and not yet set."""
    if (found["text"] or 0.0) > _LITTLE:
        yield from _for_text(readers, setting)
    if (found["labels"] or 0.0) > _LITTLE and not setting.get("edge_last"):
        yield (
            "--edge_last 2",
            "labels cannot be computed any more, only guessed by a map, which still gets most",
        )
    if (found["lengths"] or 0.0) > _LITTLE and not setting.get("pad_to"):
        yield (
            "--pad_to 64 --noise_tail 1",
            "lengths of rows; padding alone hides them from masks and not from gradients",
        )
    if found["adapter"]:
        yield from _for_adapter(setting)


def _for_text(readers: Sequence[Finding], setting: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Layers on the edge as deep as they make a difference, then noise."""
    by_layer: dict[int, list[Finding]] = {}
    for one in readers:
        if match := re.match(r"layer (\d+)", one["where"]):
            by_layer.setdefault(int(match[1]), []).append(one)
    deeper = [layer for layer in sorted(by_layer) if layer > int(setting.get("edge_first") or 0)]
    for layer in dict.fromkeys(deeper[:1] + deeper[len(deeper) // 2 :][:1]):
        left = _best((one for at in deeper if at >= layer for one in by_layer[at]), "tokens")
        yield (
            f"--edge_first {layer}",
            f"about {left or 0.0:.0%} of the text is left, which is what was read from layer "
            f"{layer} on; the edge computes these layers, and the server has to allow it",
        )
    if not setting.get("noise_entry"):
        yield "--noise_entry 1", "text, a little; it costs accuracy"


def _for_adapter(setting: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What keeps B A from being solved for."""
    if setting.get("wire") == "hosted":
        yield "--wire plain", "the adapter is not sent, though it can be solved for"
    elif setting.get("wire") == "plain" and setting.get("wire_dtype") not in ("int8", "int4"):
        yield "--wire_dtype int8", "rounding spoils the solution for B A, and halves the traffic"
