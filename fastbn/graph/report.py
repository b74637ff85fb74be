"""Results as text: lines, columns, widths."""

import re
import textwrap
from collections.abc import Iterable, Sequence

from fastbn.graph.reasons import FORWARDS
from fastbn.graph.results import Explanation, Fold, Kept, Parity, Rewritten

__all__ = ["explanation_rows", "parity_rows", "result_rows", "size_text", "size_texts", "table", "wrapped"]

# Columns of a line that is not printed to a terminal; columns of joined names above which they are listed below the row.
WIDTH, LONGEST_NAMES = 160, 72

# Columns by which a question is indented at most.
DEEPEST_INDENT = 24

# What a wrapped line is indented by: the width of its label (up to 8 characters) and the blanks after it, in a row also of the name that
# follows; or of its own indent.
HANGING = re.compile(r" {2}(?:folded|kept|rewrote) +\S(?: ?\S)* {2,}| {2}\S{1,8} +|\S{1,8} {2,}| +")


def parity_rows(parity: Parity | None) -> list[str]:
    """Return the lines of a comparison, none where nothing was compared."""
    return [] if parity is None else [f"parity  {parity}", *(f"        {note}" for note in parity.notes)]


def result_rows(folded: Sequence[Fold], kept: Sequence[Kept], rewritten: Sequence[Rewritten]) -> list[str]:
    """Return the lines of a report, some for each fold and each node that stayed, in columns that all of them share."""
    rows = [*map(_fold_rows, folded), *map(_rewritten_rows, rewritten), *map(_kept_rows, kept)]
    return table(row for each in rows for row in each)


def _fold_rows(fold: Fold) -> list[list[str]]:
    bn, bn_names = _counted(fold.bn, len(fold.ops))
    into, into_names = _counted(fold.into, fold.op.count("+") + 1)
    below = [*_if_any(bn_names), *_if_any(into_names and f"into {into_names}")]
    return [["  folded", bn, f"into {into}", *_measured(fold)], *below]


def _rewritten_rows(each: Rewritten) -> list[list[str]]:
    bn, names = _counted(each.bn, 1)
    return [["  rewrote", bn, f"as {each.op}", *_measured(each)], *_if_any(names), *_reason_rows(each)]


def _kept_rows(each: Kept) -> list[list[str]]:
    bn, names = _counted(each.bn, len(each.ops))
    (_, _, first), *rest = _reason_rows(each)
    if each.not_rewritten not in (None, each.reason):
        rest.append(["", "", f"not rewritten: {each.not_rewritten}"])
    return [["  kept", bn, first], *rest, *_if_any(names)]


def _reason_rows(each: Kept | Rewritten) -> list[list[str]]:
    """Return why a node is not folded, below the column of its row that follows its name."""
    first, *rest = each.reason.split(FORWARDS)
    return [["", "", f"{first}   [{each.code}]"], *(["", "", f"{FORWARDS[2:]}{sentence}"] for sentence in rest)]


def _if_any(names: str) -> list[list[str]]:
    """Return the row below that lists names, if there are any."""
    return [["", names]] if names else []


def _measured(entry: Fold | Rewritten) -> list[str]:
    """Return the last cells of a row: the number of channels, and what its verification gave."""
    measured = f"error {entry.error:.1e} of {entry.bound:.1e} allowed" if entry.error is not None else ""
    note = f"[{'; '.join(dict.fromkeys(entry.note.split('; ')))}]" if entry.note else ""  # one weight may be duplicated many times
    return [f"{entry.channels} channel{'s' if entry.channels > 1 else ''}", "  ".join(filter(None, [measured, note]))]


def explanation_rows(explanations: Iterable[Explanation]) -> list[str]:
    """Return the lines of explanations: the questions of a search, each indented below the one that it follows from.

    What the report says above, and what a line would repeat of the one before or of its own answer, is left out.
    """
    lines = []
    for explanation in explanations:
        lines.append(f"  explain {explanation.bn}: {'folded' if explanation.outcome == 'folded' else 'stays, for the reason above'}")
        before = ("", "")
        for step in explanation.steps:
            if (step.strategy, step.asked) != before:
                lines.append(f"          {step.strategy}: {step.asked}")
            before = (step.strategy, step.asked)
            code = f"   [{step.code}]" if step.code else ""
            node = "" if step.node in step.answer else f"{step.node}: "
            lines.append(f"            {' ' * min(2 * step.depth, DEEPEST_INDENT)}{step.direction:<8}  {node}{step.answer}{code}")
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
