"""The audit on paper: audit.json, and audit.html with one figure, a page that needs nothing else.

The page is `audit.html` beside this file, a template of jinja2; the figure is drawn by matplotlib.
"""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from dlora.extras import missing_extra
from dlora.files import write_json

__all__ = ["check_drawing", "draw_recovery", "write_audit"]

_COLOURS: Final = ("#d95f02", "#1f78b4")  # of the in-domain and the out-of-domain attacker


def check_drawing() -> None:
    """Raises UsageError if matplotlib or jinja2 are not installed: before anything is computed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib
    except ImportError as error:
        raise missing_extra("report", "`dlora audit`") from error
    matplotlib.use("agg")


def write_audit(audit: dict[str, Any], output: Path) -> list[Path]:
    """Write output/audit.json and output/audit.html; return both.

    `audit` is what `dlora.privacy.audit.audit` returns. Raises UsageError if matplotlib or jinja2
    are missing.
    """
    check_drawing()
    from jinja2 import Environment

    output.mkdir(parents=True, exist_ok=True)
    values, page = output / "audit.json", output / "audit.html"
    write_json(values, audit)

    template = files("dlora.privacy").joinpath("audit.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True)
    html = environment.from_string(template).render(
        audit=audit,
        figure=base64.b64encode(draw_recovery(audit)).decode(),
        share=lambda value: f"{value:.1%}" if isinstance(value, float) else "",
        loss=lambda value: f"{value:.3f}" if isinstance(value, float) else "not known",
    )
    page.write_text(html, encoding="utf-8")
    return [values, page]


def draw_recovery(audit: dict[str, Any]) -> bytes:
    """Token recovery by place, a line for each attacker, as PNG."""
    from matplotlib import pyplot

    places = ["entry", *(f"site {site}" for site in audit["sites"])]
    figure, panel = pyplot.subplots(figsize=(10, 4), layout="constrained")
    for colour, name in zip(_COLOURS, audit["attackers"], strict=True):
        _draw_inverters(panel, audit, places, name, colour)
    _draw_other_attacks(panel, audit, places)

    panel.set_xticks(range(len(places)), _labels(audit), fontsize=8)
    panel.set_ylim(0, 1.03)
    panel.set_ylabel("tokens recovered")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)

    out = io.BytesIO()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return out.getvalue()


def _draw_inverters(
    panel: Any, audit: dict[str, Any], places: list[str], attacker: str, colour: str
) -> None:
    """All tokens as a line; dashed those whose type the attacker's text did not have."""
    by_place = {
        attack["place"]: attack
        for attack in audit["attacks"]
        if attack["attack"] == "inverter" and attack["attacker"] == attacker
    }
    all_tokens = {"marker": "o", "label": attacker}
    unseen_types = {"marker": ".", "ls": "--", "alpha": 0.7}
    for key, style in (("tokens", all_tokens), ("unseen", unseen_types)):
        points = [
            (i, by_place[place][key])
            for i, place in enumerate(places)
            if place in by_place and by_place[place][key] is not None
        ]
        panel.plot([i for i, _ in points], [y for _, y in points], color=colour, **style)


def _draw_other_attacks(panel: Any, audit: dict[str, Any], places: list[str]) -> None:
    """A star for matching; a square for the look-up, with chance as a dotted line."""
    for attack in audit["attacks"]:
        if attack["attack"] == "matching":
            at, label = places.index(attack["place"]), f"matching, {attack['rows']} rows"
            panel.plot(at, attack["tokens"], "*", color=_COLOURS[1], ms=12, label=label)
        if attack["attack"] == "look-up":
            square = {"color": "#222222", "ms": 9, "fillstyle": "none"}
            panel.plot([0], [attack["tokens"]], "s", label="look-up", **square)
            panel.axhline(attack["chance"], color="#888888", ls=":", lw=1)


def _labels(audit: dict[str, Any]) -> list[str]:
    """The layer of each place, and its modules where these are not the same everywhere."""
    parts = [where.partition(": ") for where in audit["sites"].values()]
    if len({modules for _, _, modules in parts}) == 1:
        return ["entry", *(layer for layer, _, _ in parts)]
    lines = ((layer, modules.replace(", ", "\n")) for layer, _, modules in parts)
    return ["entry", *(f"{layer}\n{modules}" for layer, modules in lines)]
