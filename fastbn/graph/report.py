"""Results as text: lines, columns, widths."""

import re
import textwrap
from collections.abc import Iterable, Sequence

from fastbn.graph.reasons import FORWARDS
from fastbn.graph.results import Explanation, Fold, Kept, Rewritten

__all__ = ["explanation_rows", "result_rows", "size_text", "size_texts", "table", "wrapped"]

# Columns of a line that is not printed to a terminal; columns of joined names above which they are listed below the row.
WIDTH, LONGEST_NAMES = 160, 72

# Columns by which a question is indented at most.
DEEPEST_INDENT = 24

# What a wrapped line is indented by: the width of its label (up to 8 characters) and the blanks after it, or of its own indent.
HANGING = re.compile(r" {2}\S{1,8} +|\S{1,8} {2,}| +")


def result_rows(folded: Sequence[Fold], kept: Sequence[Kept], rewritten: Sequence[Rewritten]) -> list[str]:
    """Return the lines of a report, one for each fold and each node that stayed, and a line more where its names are long."""
    return [*_fold_rows(folded), *_rewritten_rows(rewritten), *_kept_rows(kept)]


def _fold_rows(folded: Sequence[Fold]) -> list[str]:
    rows, below = [], []
    for fold in folded:
        bn, bn_names = _counted(fold.bn, len(fold.ops))
        into, into_names = _counted(fold.into, fold.op.count("+") + 1)
        rows.append(["  folded", bn, f"into {into}", *_measured(fold)])
        below.append([f"          {bn_names}"] * bool(bn_names) + [f"          into {into_names}"] * bool(into_names))
    return [line for row, names in zip(table(rows), below, strict=True) for line in (row, *names)]


def _rewritten_rows(rewritten: Sequence[Rewritten]) -> list[str]:
    labels = [_counted(each.bn, 1) for each in rewritten]
    rows = [["  rewrote", bn, f"as {each.op}", *_measured(each)] for each, (bn, _) in zip(rewritten, labels, strict=True)]
    lines = []
    for row, each, (_, names) in zip(table(rows), rewritten, labels, strict=True):
        lines += [row, *[f"           {names}"] * bool(names)]
        first, *rest = each.reason.split(FORWARDS)
        lines += [f"           {first}   [{each.code}]", *(f"           {FORWARDS[2:]}{sentence}" for sentence in rest)]
    return lines


def _measured(entry: Fold | Rewritten) -> list[str]:
    """Return the last cells of a row: the number of channels, and what its verification gave."""
    measured = f"error {entry.error:.1e} of {entry.bound:.1e} allowed" if entry.error is not None else ""
    note = f"[{'; '.join(dict.fromkeys(entry.note.split('; ')))}]" if entry.note else ""  # one weight may be duplicated many times
    return [f"{entry.channels} channel{'s' if entry.channels > 1 else ''}", "  ".join(filter(None, [measured, note]))]


def _kept_rows(kept: Sequence[Kept]) -> list[str]:
    lines = []
    labels = [_counted(entry.bn, len(entry.ops)) for entry in kept]
    width = max((len(label) for label, _ in labels), default=0)
    for entry, (label, names) in zip(kept, labels, strict=True):
        first, *rest = entry.reason.split(FORWARDS)
        lines.append(f"  kept    {label:<{width}}  {first}   [{entry.code}]")
        lines.extend(f"          {'':<{width}}  {FORWARDS[2:]}{sentence}" for sentence in rest)
        if entry.not_rewritten not in (None, entry.reason):
            lines.append(f"          {'':<{width}}  not rewritten: {entry.not_rewritten}")
        lines.extend([f"          {names}"] * bool(names))
    return lines


def explanation_rows(explanations: Iterable[Explanation]) -> list[str]:
    """Return the lines of explanations: the questions of a search, each indented below the one that it follows from."""
    lines = []
    for explanation in explanations:
        lines.append(f"  explain {explanation.bn}: {explanation.outcome}")
        for step in explanation.steps:
            code = f"   [{step.code}]" if step.code else ""
            indent = " " * min(2 * step.depth, DEEPEST_INDENT)
            lines.append(f"          {step.strategy:<9}  {indent}{step.direction}  {step.node}, {step.asked}: {step.answer}{code}")
    return lines


def _counted(names: str, count: int) -> tuple[str, str]:
    """Return (joined names as the row shows them, as the line below lists them): where they are long, the row has their number."""
    if len(names) <= LONGEST_NAMES:
        return names, ""
    if count == 1:
        return f"{names[: LONGEST_NAMES - 3]}...", names
    each = names.split("+")
    return f"{count} nodes", ", ".join(each) if len(each) == count else names


def wrapped(lines: Iterable[str], width: int | None = None) -> list[str]:
    """Return lines wrapped at a width, 160 columns by default; the rest of a line is indented to its text."""
    rows: list[str] = []
    for line in lines:
        hanging = HANGING.match(line)
        indent = min(len(hanging[0]) if hanging else 4, (width or WIDTH) // 2)
        rows += textwrap.wrap(line, width or WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False) or [""]
    return rows


def size_text(size: int) -> str:
    """Return a number of bytes as text, in kB or MB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def size_texts(sizes: Sequence[int]) -> list[str]:
    """Return numbers of bytes as text, in one unit, with two more digits where the sizes would look the same without them."""
    unit, scale = ("MB", 1e6) if max(sizes, default=0) >= 1e5 else ("kB", 1e3)
    for digits in (1, 3):
        texts = [f"{size / scale:.{digits}f} {unit}" for size in sizes]
        if len(set(texts)) == len(set(sizes)):
            return texts
    return [f"{size:,} bytes" for size in sizes]


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines with aligned columns; the last cell of a row is not padded."""
    rows = list(rows)
    widths: dict[int, int] = {}
    for row in rows:
        for column, cell in enumerate(row[:-1]):
            widths[column] = max(widths.get(column, 0), len(cell))
    return ["  ".join([*(cell.ljust(widths[i]) for i, cell in enumerate(row[:-1])), row[-1]]).rstrip() for row in rows]
