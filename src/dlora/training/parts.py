"""How many parts of a micro-batch were in flight: in run.json, and the same when a run goes on."""

from __future__ import annotations

from typing import Any

from dlora.edge.model import SplitModel
from dlora.runs import RunFolder

__all__ = ["follow_parts"]


def follow_parts(
    run: dict[str, Any], folder: RunFolder, model: SplitModel, *, resume: bool
) -> None:
    """Note the number in `run`, now and, with the file, whenever it changes.

    A resumed run takes that of its folder, picked or lowered: it is to go on bit for bit.
    """
    count = model.part_count
    if resume:
        earlier = folder.read().get("in_flight")
        if earlier and earlier["parts"]:
            count.number, count.why = earlier["parts"], earlier["why"]

    def note() -> None:
        run["in_flight"] = {"parts": count.number or None, "why": count.why}

    def changed() -> None:
        note()
        folder.write(run)

    note()
    count.changed = changed
