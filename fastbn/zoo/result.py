"""What became of each model of a zoo, as data and text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fastbn.graph.report import size_text, table

__all__ = ["STATUS", "Outcome", "Status", "Zoo"]

# What may become of a model.
Status: TypeAlias = Literal["ok", "unverified", "parity", "failed", "crashed", "time", "there"]
STATUS: dict[Status, str] = {
    "ok": "folded and verified, or nothing to fold",
    "unverified": "folded; the parity of the whole model could not be tried, or is inconclusive",
    "parity": "the folded model differs from the original: nothing was written",
    "failed": "it cannot be read, is no valid model, takes more memory than it may, or cannot be written",
    "crashed": "its process ended without an answer",
    "time": "it took longer than it may",
    "there": "an earlier run has folded the same file with the same options",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one model.

    Attributes
    ----------
    source, output : str
        Where it was read from, and where its folded form goes.
    status : str
        A key of `STATUS`; for "there", the other fields are those of the earlier run.
    before, after : int or None
        Its batch normalizations.
    size_before, size_after : int or None
        Bytes of its files.
    error, allowed : float or None
        The largest difference of an output, and what is allowed there.
    seconds : float
    reason : str
        What failed and why, "" where nothing did.
    sha256, options : str
        Of the files that were read, and of the options: a run with the same two skips the model.
    """

    source: str
    output: str
    status: Status
    before: int | None = None
    after: int | None = None
    size_before: int | None = None
    size_after: int | None = None
    error: float | None = None
    allowed: float | None = None
    seconds: float = 0.0
    reason: str = ""
    sha256: str = ""
    options: str = ""

    @property
    def is_written(self) -> bool:
        """Whether its folded form stands at `output`."""
        return self.status in ("ok", "unverified", "there")

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON holds it."""
        return dataclasses.asdict(self)

    def cells(self) -> list[str]:
        """Return its row of the table."""
        norms = f"BN {self.before} -> {self.after}" if self.before is not None else ""
        sizes = ""
        if self.size_before is not None and self.size_after is not None:
            sizes = f"{size_text(self.size_before)} -> {size_text(self.size_after)}"
        measured = f"error {self.error:.1e} of {self.allowed:.1e} allowed" if self.error is not None and self.allowed is not None else ""
        return [f"  {self.status}", self.source, norms, sizes, measured, f"{self.seconds:.1f} s", self.reason]


@dataclass(frozen=True)
class Zoo:
    """What `fold_all` returns.

    Attributes
    ----------
    outcomes : list of Outcome
        One for each model, in the order of their sources.
    seconds : float
    """

    outcomes: list[Outcome]
    seconds: float

    def count(self, *status: Status) -> int:
        """Return how many models have one of some statuses."""
        return sum(each.status in status for each in self.outcomes)

    def lines(self) -> list[str]:
        """Return the table as lines of text, with a sum at its end."""
        before = sum(each.before or 0 for each in self.outcomes if each.is_written)
        after = sum(each.after or 0 for each in self.outcomes if each.is_written)
        counts = ", ".join(f"{self.count(status)} {status}" for status in STATUS if self.count(status))
        models = "1 model" if len(self.outcomes) == 1 else f"{len(self.outcomes)} models"
        total = f"{models}: {counts or 'none'}; BatchNormalization {before} -> {after}, {self.seconds:.1f} s"
        return [*table(each.cells() for each in self.outcomes), total]

    def __str__(self) -> str:
        return "\n".join(self.lines())
