"""The HTML report of a re-estimation: one file, no network, every name in it escaped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastbn.deployment.provenance import versions
from fastbn.deployment.report import style, template

if TYPE_CHECKING:
    from fastbn.reestimation.result import Reestimation

__all__ = ["render"]

# Batch normalizations that are shown; the JSON report has all of them.
MOST_ROWS = 400


def render(result: Reestimation, far: float, command: str = "") -> str:
    """Return the report of a Reestimation as HTML; a batch normalization that moved farther than `far` saw other data than before.

    Raises
    ------
    FastbnError
        jinja2 is not installed.
    """
    page = template("reestimation.html.j2", Path(__file__).parent)
    flow = sorted(result.moved, key=lambda each: each.level)
    return page.render(
        made=result,
        far=far,
        flow=flow[:MOST_ROWS],
        scale=max([far, *(each.distance for each in flow if each.distance < float("inf"))]),
        left=result.left[:MOST_ROWS],
        hidden=max(0, len(flow) - MOST_ROWS) + max(0, len(result.left) - MOST_ROWS),
        name=Path(result.name).name,
        command=command,
        style=style(),
        versions=versions(),
    )
