"""What an attack found: one entry of audit.json, a sentence and its numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dlora.privacy.attacks import Inverter
from dlora.privacy.samples import Samples

__all__ = ["Attackers", "Finding", "finding", "fitted", "learned_from"]

Finding = dict[str, Any]
"""attack, place, where (the place in words), attacker, says (the sentence), and numbers."""

Attackers = dict[str, Samples]
"""What each attacker learns from: "in-domain" and "out-of-domain"."""


def finding(
    attack: str, place: str, where: str, says: str, attacker: str | None = None, **numbers: Any
) -> Finding:
    """What one attack got at one place; `attacker` is None where there is nothing to learn."""
    return {
        "attack": attack,
        "place": place,
        "where": where,
        "attacker": attacker,
        "says": says,
        **numbers,
    }


def learned_from(attacker: str) -> str:
    """What an attacker's text is, in words."""
    return "other rows of the same data" if attacker == "in-domain" else "public text"


def fitted(inverter: Inverter, table_VE: Tensor) -> dict[str, Any]:
    """Which targets and which ridge term the validation rows chose."""
    target = "embedding" if len(inverter.ids_V) == len(table_VE) else "type"
    return {"target": target, "ridge": inverter.map.strength}
