"""The HTML report of a deployment: one file, no network, every name in it escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastbn.deployment.evidence import between
from fastbn.errors import FastbnError
from fastbn.graph.drawing import draw_fold, draw_model
from fastbn.graph.fold_result import planning_of
from fastbn.graph.reasons import FORWARDS, REASONS
from fastbn.graph.report import size_text, size_texts
from fastbn.graph.results import Fold
from fastbn.graph.timing import word_of

if TYPE_CHECKING:
    import jinja2

    from fastbn.deployment.result import Deployment
    from fastbn.graph.timing import Latency

__all__ = ["render", "style", "template"]

HERE = Path(__file__).parent

# Folds that are drawn one by one, and rows of a table; the JSON report has all of them.
MOST_DRAWN, MOST_ROWS = 40, 400

# Drawn folds that are seen at once; the others are shown on request.
OPEN_FOLDS = 12

STAGE_WORDS = {"original": "as it came", "folded": "batch normalization folded", "quantized": "folded, then int8"}


def style() -> str:
    """Return the style sheet of reports."""
    return (HERE / "report.css").read_text(encoding="utf-8")


def template(name: str = "report.html.j2", folder: Path = HERE) -> jinja2.Template:
    """Return the template of a report; raises FastbnError without jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise FastbnError("Cannot make a report: jinja2 is not installed (pip install jinja2)") from error
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, finalize=_printable, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "percent": _percent, "beside": _beside, "plural": _plural, "size": size_text}
    return environment.get_template(name)


def render(deployment: Deployment) -> str:
    """Return the report of a Deployment as HTML."""
    page = template()
    fold = deployment.fold
    planning = planning_of(fold)
    pairs = zip(fold.folded, planning.folds, strict=True)
    drawn = [(each, *draw_fold(plan, planning)) for each, plan in list(pairs)[:MOST_DRAWN]]
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    facts = fold.to_dict()
    return page.render(
        made=deployment,
        fold=fold,
        facts=facts,
        drawn=drawn,
        folds=fold.folded[:MOST_ROWS],
        kept=[(each, each.reason.split(FORWARDS)) for each in fold.kept[:MOST_ROWS]],
        rewritten=[(each, each.reason.split(FORWARDS)) for each in fold.rewritten[:MOST_ROWS]],
        reasons=REASONS,
        model=draw_model(planning),
        threads=sorted({row["threads"] for row in deployment.latency}),
        scales={row["threads"]: _scale(deployment.latency, row["threads"]) for row in deployment.latency},
        sides=_sides(deployment),
        sizes=dict(zip((stage.name for stage in deployment.stages), size_texts([stage.size for stage in deployment.stages]), strict=True)),
        largest=max((stage.size for stage in deployment.stages), default=0) or 1,
        words=STAGE_WORDS,
        name=re.split(r"[\\/]", facts["model"])[-1],
        style=style(),
        script=script,
        digest=digest,
        proofs=_proofs(fold.folded),
        open_folds=OPEN_FOLDS,
        most_rows=MOST_ROWS,
    )


def _proofs(folds: Sequence[Fold]) -> str:
    """Return how many of the folds were run before and after, as a line goes on."""
    count = sum(fold.error is not None for fold in folds)
    return "each verified" if count == len(folds) else f"{count or 'none'} verified"


def _sides(deployment: Deployment) -> list[tuple[str, str, list[str], list[str], list[str]]]:
    """Return (stage, the one beside it, what speaks for it, what against it, what is the same) of every pair of stages."""
    rows = []
    for stage, against in dict.fromkeys((each.stage, each.against) for each in deployment.comparisons):
        found = between(deployment.comparisons, stage, against)
        better, worse = [each for each in found if each.is_less], [each for each in found if each.is_more]
        same = [each for each in found if not each.is_less and not each.is_more]
        rows.append((stage, against, list(map(str, better)), list(map(str, worse)), list(map(str, same))))
    return rows


def _scale(latency: Sequence[Latency], threads: int) -> float:
    """Return the milliseconds at the right end of the bars: the largest 90th percentile, but at most 1.5 times the longest median."""
    rows = [row for row in latency if row["threads"] == threads]
    longest = max(row["median_ms"] for row in rows)
    return min(max(row["p90_ms"] for row in rows), 1.5 * longest)


def _printable(value: object) -> object:
    """Return a value as the page shows it: control characters, and what turns the direction of writing, become escapes."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return "".join(char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in value)
    return value


def _number(value: float | None, form: str = ".2g") -> str:
    return "-" if value is None else f"{value:{form}}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _beside(row: Latency) -> str:
    """Return how long a stage takes beside the original, with the interval and what that says, in words."""
    text = f"{row['ratio']:.2f} of the original's time"
    if row["low"] is None or row["high"] is None:
        return text
    return f"{text} ({row['low']:.2f} to {row['high']:.2f}): {word_of(row)}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
