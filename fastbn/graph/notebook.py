"""What a notebook shows of a result: its lines, the graph with what was taken out, what took it in and what stayed, and a data frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from fastbn.errors import FastbnError
from fastbn.graph.drawing import Drawing, draw_model
from fastbn.graph.planner.planning import Planning
from fastbn.graph.results import Fold, Kept, Rewritten

if TYPE_CHECKING:
    import pandas

__all__ = ["frame_of", "lines_html", "result_html"]

# Kind of a box -> its color, which is seen on white and on black; the others are gray.
COLORS = {"absorber": "#2e8b57", "passes": "#3a7ca5", "removed": "#c0392b", "kept": "#d68910"}
GRAY = "#808080"

# Kinds of boxes -> what they stand for.
LEGEND = {"removed": "folded away", "absorber": "takes it in", "passes": "lets it pass", "kept": "stays"}


def result_html(lines: Iterable[str], planning: Planning) -> str:
    """Return a result as a piece of HTML: its lines of text, and the drawing of the model that it was made of; every name is escaped."""
    drawing = draw_model(planning)
    kinds = {box.kind for box in drawing.boxes}
    legend = ", ".join(f'<span style="color:{COLORS[kind]}">{words}</span>' for kind, words in LEGEND.items() if kind in kinds)
    more = f", {drawing.hidden} nodes more" if drawing.hidden else ""
    return (
        f"{lines_html(lines)}<p>{escape(drawing.title)}{more}{': ' if legend else ''}{legend}</p>"
        f'<div style="overflow:auto;max-height:40em">{_svg(drawing)}</div>'
    )


def _svg(drawing: Drawing) -> str:
    parts = [
        f'<svg viewBox="0 0 {drawing.width} {drawing.height}" width="{drawing.width}" height="{drawing.height}" role="img">',
        f"<title>{escape(drawing.title)}</title><desc>{escape(drawing.text)}</desc>",
        *(f'<path d="{path}" fill="none" stroke="{GRAY}"/>' for path in drawing.paths),
    ]
    for box in drawing.boxes:
        if box.is_bend:
            continue
        color = COLORS.get(box.kind, GRAY)
        parts.append(f"<g><title>{escape(box.title)}</title>")
        frame = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="5"'
        parts.append(f'<rect {frame} fill="{color}" fill-opacity="0.15" stroke="{color}"/>')
        for number, line in enumerate(box.lines):
            place = f'x="{box.middle:.1f}" y="{box.y + 17 + 14 * number:.1f}" text-anchor="middle" font-size="{12 if number else 13}"'
            parts.append(f'<text {place} font-family="sans-serif" fill="currentColor">{escape(line)}</text>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def lines_html(lines: Iterable[str]) -> str:
    """Return lines of text as a piece of HTML."""
    text = escape("\n".join(lines))
    return f'<pre style="overflow-x:auto">{text}</pre>'


# The columns of a data frame, of which an entry has some.
COLUMNS = ("bn", "outcome", "ops", "into", "op", "channels", "error", "bound", "code", "reason", "note")


def frame_of(folded: Sequence[Fold], kept: Sequence[Kept], rewritten: Sequence[Rewritten] = ()) -> pandas.DataFrame:
    """Return one row for each entry, in the order of the report.

    Raises
    ------
    FastbnError
        pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise FastbnError("Cannot make a data frame: pandas is not installed (pip install pandas)") from error
    entries = [("folded", each) for each in folded], [("kept", each) for each in kept], [("rewritten", each) for each in rewritten]
    rows = [
        {"outcome": outcome, **{name: getattr(each, name, None) for name in COLUMNS if name != "outcome"}}
        for part in entries
        for outcome, each in part
    ]
    frame = pandas.DataFrame(rows, columns=list(COLUMNS))
    frame["ops"] = frame["ops"].map(", ".join, na_action="ignore")
    return frame
