"""What a notebook shows of a result: its lines, and the graph with what was taken out, what took it in and what stayed."""

from collections.abc import Iterable
from html import escape

from fastbn.graph.drawing import Drawing, draw_model
from fastbn.graph.planner.planning import Planning

__all__ = ["result_html"]

# Kind of a box -> its color, which is seen on white and on black; the others are gray.
COLORS = {"absorber": "#2e8b57", "passes": "#3a7ca5", "removed": "#c0392b", "kept": "#d68910"}
GRAY = "#808080"

# Kinds of boxes -> what they stand for.
LEGEND = {"removed": "folded away", "absorber": "takes it in", "passes": "lets it pass", "kept": "stays"}


def result_html(lines: Iterable[str], planning: Planning) -> str:
    """Return a result as a piece of HTML: its lines of text, and the drawing of the model that it was made of; every name is escaped."""
    drawing = draw_model(planning)
    text = escape("\n".join(lines))
    kinds = {box.kind for box in drawing.boxes}
    legend = ", ".join(f'<span style="color:{COLORS[kind]}">{words}</span>' for kind, words in LEGEND.items() if kind in kinds)
    more = f", {drawing.hidden} nodes more" if drawing.hidden else ""
    return (
        f'<pre style="overflow-x:auto">{text}</pre><p>{escape(drawing.title)}{more}{": " if legend else ""}{legend}</p>'
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
