"""Results as data and as text: folds, kept nodes, parity, and the one table of reasons."""

import re
import textwrap
from dataclasses import asdict, dataclass, field

__all__ = [
    "FORWARDS",
    "REASONS",
    "SCHEMA",
    "Fold",
    "Kept",
    "Parity",
    "Refusal",
    "first_few",
    "fold_dict",
    "json_number",
    "kept_dict",
    "result_rows",
    "size_text",
    "table",
    "wrapped",
]

# Columns of a line that goes to no terminal, and of a row's list of names before it is listed below the row.
WIDTH, LONGEST_NAMES = 160, 72

# Where the second line of a folded one begins: below the text behind its label or its indent; a label is short.
HANGING = re.compile(r" {2}\S{1,8} +|\S{1,8} {2,}| +")

# What parts the two halves of a reason: no way against the data flow, and none along it.
FORWARDS = "; forwards: "

# Version of the JSON report: it grows when a field changes its meaning or leaves, not when one is added.
SCHEMA = 1

# Code -> what it means. Codes are stable: scripts match on them.
REASONS = {
    # What the node itself is.
    "training": "it normalises with the statistics of the batch, or hands them out",
    "per-element": "spatial=0: its parameters are per element, not per channel",
    "dynamic-parameters": "a parameter is computed when the model runs",
    "overridable-parameters": "a parameter is also a graph input, which a caller may override; --freeze-inputs makes it a constant",
    "bad-parameters": "a parameter is Inf or NaN, or var + eps is not positive",
    "unsupported-type": "the type is none of float32, float64, float16, bfloat16",
    "in-function": "it stands in a model-local function, which several calls may share",
    "not-selected": "--only or --skip leaves it out",
    # Where its affine could not go.
    "reads-input": "nothing comes before it but a graph input",
    "reads-constant": "it reads a constant",
    "unused": "nothing reads it",
    "no-absorber": "a node on the way has no constants that could take the affine, and does not let it pass",
    "crosses-scope": "the way leads into another graph",
    "other-readers": "another node reads the value before it",
    "other-outputs": "a node on the way hands out more than one value",
    "other-branch": "a node on the way joins it with a value that does not have the affine",
    "reads-twice": "a node reads the value in two places, or two ways meet in one node",
    "graph-output": "a value on the way is a graph output",
    "dynamic-weight": "a weight on the way is computed when the model runs",
    "overridable-weight": "a weight on the way is also a graph input, which a caller may override; --freeze-inputs makes it a constant",
    "quantised": "a quantised weight or bias on the way cannot take it exactly",
    "dynamic-index": "a node on the way chooses or pads by values that are no constants",
    "axis": "its channels are not the channels that a node on the way could take",
    "axis-unknown": "a rank or size on the way is not known, so its axis cannot be placed; --input-shape may help",
    "padding": "a shift would have to change the padding of a node on the way",
    "shift-cannot-pass": "a shift cannot pass a node on the way",
    "shift-through-relu": "a shift cannot pass a Relu",
    "mixed-sign-through-relu": "a scale that is not positive in every channel cannot pass a Relu",
    "mixed-sign-through-maxpool": "a scale that is negative in a channel cannot pass a maximum",
    "interpolation": "a node on the way interpolates in a way that need not keep a shift",
    "training-dropout": "a Dropout on the way drops at random",
    "too-far": "the way is longer than the planner follows",
    # What the fold would do.
    "grows": "a folded constant would be larger than the node that it replaces",
    "overflow": "a folded constant would be Inf or NaN in the model's type",
    "flush-to-zero": "a folded weight would become zero in the model's type, beside nothing that hides it",
    "parity": "the fold was tried and differs from the original by more than rounding explains",
}


class Refusal(Exception):
    """Why an affine cannot be folded: a code of REASONS and a sentence about the nodes at hand."""

    def __init__(self, code, sentence):
        assert code in REASONS, code
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


@dataclass(frozen=True)
class Fold:
    """One fold. error and bound are those of the worst element of its site; None where the site was not run (note says why)."""

    bn: str
    ops: tuple
    into: str
    op: str
    channels: int
    error: float | None = None
    bound: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Kept:
    """One BatchNormalization, or one that was decomposed into Mul and Add, that stays."""

    bn: str
    ops: tuple
    code: str
    reason: str


@dataclass(frozen=True)
class Parity:
    """Two models compared on the same inputs, onnxruntime's optimiser off on both sides.

    status is "ok", "failed", "inconclusive" (what rounding may change is so large that nothing is proven) or "not-run". The worst element
    is the one whose error is the largest part of what is allowed; index is its place in output, values are (original, folded). compared
    holds the names of the outputs, and of values on the way, that were compared within a bound that proves something.
    """

    status: str
    inputs: int = 0
    output: str | None = None
    index: tuple = ()
    values: tuple = ()
    error: float | None = None
    allowed: float | None = None
    reason: str | None = None
    notes: tuple[str, ...] = field(default=())
    compared: tuple[str, ...] = field(default=())
    missed: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Say whether the models agree, and that was proven."""
        return self.status == "ok"

    def __str__(self):
        if self.status == "not-run":
            return f"not run: {self.reason}"
        if self.error is None:
            return f"failed: {self.reason}" if self.reason else self.status
        place = ",".join(map(str, self.index))
        before, after = (f"{value:.5g}" for value in self.values)
        text = (
            f"{self.inputs} inputs, optimiser off on both sides: worst {self.error:.2g} at {self.output}[{place}]"
            f" ({before} / {after}), allowed {self.allowed:.2g}   {self.status}"
        )
        return text + (f": {self.reason}" if self.reason else "")

    def to_dict(self):
        """Return the fields as JSON holds them."""
        fields = asdict(self)
        fields["values"] = [json_number(value) for value in self.values]
        fields["error"], fields["allowed"] = json_number(self.error), json_number(self.allowed)
        return fields


def fold_dict(fold):
    """Return a Fold as JSON holds it."""
    return {**asdict(fold), "error": json_number(fold.error), "bound": json_number(fold.bound)}


def kept_dict(kept):
    """Return a Kept as JSON holds it."""
    return asdict(kept)


def result_rows(folded, kept):
    """Return the lines of a report, a node each: what was folded where, what stayed and why."""
    rows, below = [], []
    for fold in folded:
        bn, bn_names = _counted(fold.bn, len(fold.ops))
        into, into_names = _counted(fold.into, fold.op.count("+") + 1)
        measured = f"error {fold.error:.1e} of {fold.bound:.1e} allowed" if fold.error is not None else ""
        channels = f"{fold.channels} channel{'s' if fold.channels > 1 else ''}"
        note = f"[{'; '.join(dict.fromkeys(fold.note.split('; ')))}]" if fold.note else ""  # one weight may be duplicated many times
        rows.append(["  folded", bn, f"into {into}", channels, "  ".join(filter(None, [measured, note]))])
        below.append([f"          {bn_names}"] * bool(bn_names) + [f"          into {into_names}"] * bool(into_names))
    lines = [line for row, names in zip(table(rows), below, strict=True) for line in (row, *names)]
    labels = [_counted(entry.bn, len(entry.ops)) for entry in kept]
    width = max((len(label) for label, _ in labels), default=0)
    for entry, (label, names) in zip(kept, labels, strict=True):
        first, *rest = entry.reason.split(FORWARDS)
        lines.append(f"  kept    {label:<{width}}  {first}   [{entry.code}]")
        lines.extend(f"          {'':<{width}}  {FORWARDS[2:]}{sentence}" for sentence in rest)
        lines.extend([f"          {names}"] * bool(names))
    return lines


def _counted(names, count):
    """Return joined names as a row shows them, and as they are listed below it: where they are long, the row has their number."""
    if len(names) <= LONGEST_NAMES:
        return names, ""
    if count == 1:
        return f"{names[: LONGEST_NAMES - 3]}...", names
    each = names.split("+")
    return f"{count} nodes", ", ".join(each) if len(each) == count else names


def wrapped(lines, width=None):
    """Return lines folded at a width, 160 columns by default, what goes on below what the line is about."""
    folded = []
    for line in lines:
        hanging = HANGING.match(line)
        indent = min(len(hanging[0]) if hanging else 4, (width or WIDTH) // 2)
        folded += textwrap.wrap(line, width or WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False) or [""]
    return folded


def json_number(value):
    """Return a float that JSON can hold: Inf and NaN become their names."""
    if value is None:
        return None
    value = float(value)
    return value if value - value == 0 else repr(value)


def first_few(entries):
    """Return a list as a sentence shows it: the first four, and whether there are more."""
    return ", ".join(map(str, entries[:4])) + (", ..." if len(entries) > 4 else "")


def size_text(size):
    """Return a number of bytes as people read it."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def table(rows):
    """Return rows of cells as lines whose columns line up; the last cell of a row is as long as it is."""
    widths = {}
    for row in rows:
        for column, cell in enumerate(row[:-1]):
            widths[column] = max(widths.get(column, 0), len(cell))
    return ["  ".join([*(cell.ljust(widths[i]) for i, cell in enumerate(row[:-1])), row[-1]]).rstrip() for row in rows]
