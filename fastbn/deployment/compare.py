"""The outputs of a deployed model beside those of the original: errors, and whether a classifier still decides the same.

The reference is the original with onnxruntime's optimizer off; a stage runs as it is deployed, with the optimizer at its default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ArgumentError
from fastbn.graph.results import json_number
from fastbn.graph.runtime import runtime_errors, said

if TYPE_CHECKING:
    from fastbn.graph.parity.feeds import Feed
    from fastbn.graph.runtime import Session

__all__ = ["METRICS", "REFERENCE", "Agreement", "AgreementFields", "Metric", "Original", "compare", "drop_of"]

NameT = TypeVar("NameT", bound=str)

Metric: TypeAlias = Literal["top-1", "error", "accuracy"]

# What a stage is judged by, and how much of it may be lost where the caller does not say.
METRICS: dict[Metric, float] = {"top-1": 0.01, "error": 0.1, "accuracy": 0.01}

# What the original with the optimizer off is called.
REFERENCE = "reference"

# Bytes of outputs of the original that are kept to be compared with the next stage.
KEPT = 1 << 26

RANDOM = "random: it differs between two runs of the original"


class AgreementFields(TypedDict):
    """An Agreement as JSON holds it: numbers that are not finite are text."""

    output: str
    elements: int
    max_error: float | str | None
    relative: float | str | None
    sqnr_db: float | str | None
    cosine: float | str | None
    top1: float | None
    rows: int
    note: str | None


@dataclass(frozen=True)
class Agreement:
    """One output of a stage beside the original's, over all samples.

    max_error is the largest absolute difference; relative is ||y' - y|| / ||y|| (Euclidean, all samples together), sqnr_db the same as
    -20 log10; cosine the angle's; top1 the part of rows whose largest entry is in the same place, None where the output has no scores.
    For an output of integers or text relative is the part of elements that differ. Where there is nothing to compare, max_error and
    relative are None, and note says why.
    """

    output: str
    elements: int
    max_error: float | None
    relative: float | None
    cosine: float | None
    top1: float | None
    rows: int
    note: str | None = None

    @property
    def sqnr_db(self) -> float | None:
        """-20 log10 of `relative`, Inf where that is 0, None where it is None."""
        if self.relative is None:
            return None
        return math.inf if self.relative == 0 else -20 * math.log10(self.relative)

    def to_dict(self) -> AgreementFields:
        """Return the fields as JSON holds them."""
        return {
            "output": self.output,
            "elements": self.elements,
            "max_error": json_number(self.max_error),
            "relative": json_number(self.relative),
            "sqnr_db": json_number(self.sqnr_db),
            "cosine": json_number(self.cosine),
            "top1": self.top1,
            "rows": self.rows,
            "note": self.note,
        }


class Original:
    """The original, which several calls of `compare` share: so its outputs are computed once, as far as they take little memory.

    Parameters
    ----------
    session : onnxruntime session
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.names = [entry.name for entry in session.get_outputs()]
        # Outputs that differ between two runs, once that is known.
        self.random: list[bool] | None = None
        # Numbers of feeds that `seen` has been told of.
        self.told: set[int] = set()
        self._kept: dict[int, list[object]] = {}
        self._bytes = 0

    def outputs(self, number: int, feed: Feed) -> list[object]:
        """Return the outputs for the feed of a number; raises ArgumentError where the original does not take it."""
        if number in self._kept:
            return self._kept[number]
        outputs = self.run(feed)
        if self.random is None:
            self.random = [not _same(one, other) for one, other in zip(outputs, self.run(feed), strict=True)]
        size = sum(output.nbytes if isinstance(output, np.ndarray) else KEPT for output in outputs)
        if self._bytes + size <= KEPT:
            self._bytes += size
            self._kept[number] = outputs
        return outputs

    def keep(self, feeds: Sequence[Feed], progress: Callable[[str], None]) -> None:
        """Run it on as many feeds as it takes to fill the memory for its outputs, or on all."""
        for number, feed in enumerate(feeds):
            progress(f"the original on feed {number + 1} of {len(feeds)}")
            self.outputs(number, feed)
            if number not in self._kept:
                return

    def run(self, feed: Feed) -> list[object]:
        """Run it once more."""
        try:
            return self.session.run(None, feed)
        except runtime_errors() as error:
            raise ArgumentError(f"Cannot run the model on the data: {said(error)}") from error


def compare(
    original: Original,
    stages: Mapping[NameT, Session],
    feeds: Sequence[Feed],
    scores: Collection[str],
    progress: Callable[[str], None] | None = None,
    seen: Callable[[str, int, list[object]], None] | None = None,
) -> dict[NameT, list[Agreement] | str]:
    """Run the original and every stage on all feeds.

    Parameters
    ----------
    original : Original
    stages : dict of name -> onnxruntime session
    feeds : list of dict of name -> array
    scores : collection of str
        Outputs whose largest entry of a row is a decision.
    progress : callable of str, optional
        Is told which feed is being run.
    seen : callable of (str, int, list), optional
        Is given what each stage gives for each feed, and first what the original does, called REFERENCE.

    Returns
    -------
    dict of name -> list of Agreement
        One for each output. A stage that onnxruntime cannot run has the sentence that says so in place of the list.

    Raises
    ------
    ArgumentError
        The original does not take a feed.
    """
    names = original.names
    totals = {stage: [_Total(name, name in scores) for name in names] for stage in stages}
    failed: dict[NameT, str] = {}
    for number, feed in enumerate(feeds):
        if progress:
            progress(f"feed {number + 1} of {len(feeds)}")
        before = original.outputs(number, feed)
        if seen and number not in original.told:
            original.told.add(number)
            seen(REFERENCE, number, before)
        for stage, session in stages.items():
            if stage in failed:
                continue
            try:
                after = session.run(names, feed)
            except runtime_errors() as error:
                failed[stage] = f"onnxruntime cannot run it: {said(error)}"
                continue
            if seen:
                seen(stage, number, after)
            for total, is_random, one, other in zip(totals[stage], original.random or (), before, after, strict=True):
                if is_random:
                    total.skip(RANDOM)
                else:
                    total.add(one, other)
    return {stage: failed.get(stage) or [total.agreement() for total in totals[stage]] for stage in stages}


@dataclass(frozen=True)
class _Output:
    """An output as an array; a sequence of maps of numbers, as ZipMap gives it, is an array with a row each, and keys are those of its
    maps (None for a tensor)."""

    values: NDArray[Any]  # of the dtype that the model gives
    keys: list[object] | None = None

    @classmethod
    def of(cls, value: object) -> _Output | None:
        """Return an output as onnxruntime gives it, or None for what is neither a tensor nor a sequence of such maps."""
        if isinstance(value, np.ndarray):
            return cls(value)
        if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
            return None
        keys = sorted(value[0], key=str)
        if any(set(row) != set(keys) or not all(isinstance(entry, (int, float)) for entry in row.values()) for row in value):
            return None
        return cls(np.array([[row[key] for key in keys] for row in value], dtype=np.float64), keys)

    def is_like(self, other: _Output | None) -> bool:
        """Say whether both are tensors, or both are not."""
        return other is not None and (self.keys is None) == (other.keys is None)


def _same(one: object, other: object) -> bool:
    """Say whether two runs gave the same; an output that is no array counts as the same."""
    before, after = _Output.of(one), _Output.of(other)
    if before is None:
        return True
    return (
        after is not None
        and before.is_like(after)
        and np.array_equal(before.values, after.values, equal_nan=before.values.dtype.kind == "f")
    )


class _Total:
    """Sums over the samples of one output of one stage."""

    def __init__(self, output: str, scores: bool) -> None:
        self.output = output
        self.scores = scores
        self.discrete = False
        self.elements = self.compared = self.rows = self.agreeing = self.unequal = 0
        self.max_error = self.difference = self.before = self.after = self.product = 0.0
        self.skipped: str | None = None
        self.mismatch: str | None = None

    def skip(self, note: str) -> None:
        """Say why the output cannot be compared."""
        self.skipped = note

    def add(self, before: object, after: object) -> None:
        """Compare one output of one sample."""
        one, other = _Output.of(before), _Output.of(after)
        if one is None or one.values.dtype.kind not in "fiubVOUS":
            self.skip("neither numbers nor text")
            return
        values = one.values
        self.elements += values.size
        if other is None or not one.is_like(other):
            self._reject(f"another kind of value instead of {list(values.shape)}")
            return
        if values.shape != other.values.shape or one.keys != other.keys:
            self._reject(f"shape {list(other.values.shape)} instead of {list(values.shape)}")
            return
        self.discrete = values.dtype.kind in "iubOUS"
        if values.dtype.kind in "OUS":
            self.compared += values.size
            self.unequal += int(np.count_nonzero(values != other.values))
            return
        self._add_numbers(values.astype(np.float64), other.values.astype(np.float64))

    def _add_numbers(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> None:
        finite = np.isfinite(before)
        if not np.array_equal(before[~finite], after[~finite], equal_nan=True) or not np.isfinite(after[finite]).all():
            self._reject("Inf or NaN on one side only")
            return
        if self.scores and before.ndim >= 2 and before.size:
            self._decide(before.reshape(before.shape[0], -1), after.reshape(after.shape[0], -1))
        before, after = before[finite], after[finite]
        change = np.abs(after - before)
        self.compared += before.size
        self.unequal += int(np.count_nonzero(change))
        self.max_error = max(self.max_error, float(change.max(initial=0)))
        self.difference += float(np.sum(change * change))
        self.before += float(np.sum(before * before))
        self.after += float(np.sum(after * after))
        self.product += float(np.sum(before * after))

    def _reject(self, note: str) -> None:
        """Say why the whole output differs."""
        self.mismatch = note
        self.max_error = self.difference = math.inf

    def _decide(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> None:
        """Count decisions; a row with NaN, or whose largest score is Inf, has none. An entry of -Inf is a class that is ruled out."""
        decided = np.isfinite(before.max(axis=1))
        before, after = before[decided], after[decided]
        # Where the original has the largest score twice, either place is its decision.
        chosen = np.take_along_axis(before, after.argmax(axis=1)[:, None], axis=1)[:, 0]
        self.rows += len(before)
        self.agreeing += int(np.count_nonzero(chosen == before.max(axis=1)))

    def agreement(self) -> Agreement:
        """Return what the samples say together."""
        if self.mismatch is None and (self.skipped or not self.compared):
            empty = "empty on every sample" if not self.elements else "no finite values to compare"
            return Agreement(self.output, self.elements, None, None, None, None, 0, self.skipped or empty)
        if self.discrete and self.mismatch is None:
            relative = self.unequal / self.elements
        elif self.difference == 0:
            relative = 0.0
        else:
            relative = math.sqrt(self.difference / self.before) if self.before else math.inf
        size = math.sqrt(self.before * self.after)
        cosine = None if not size or self.difference == math.inf else min(1.0, self.product / size)
        top1 = self.agreeing / self.rows if self.rows else None
        left = self.elements - self.compared
        note = self.mismatch or (f"{left} of {self.elements} values are Inf or NaN on both sides" if left else None)
        return Agreement(self.output, self.elements, self.max_error, relative, cosine, top1, self.rows, note)


def drop_of(agreements: Collection[Agreement], metric: Metric) -> float | None:
    """Return what a stage loses without labels: for "top-1" the part of decisions that changed, else the relative error, of the worst
    output; None where there is nothing to judge it by."""
    if any(agreement.relative == math.inf for agreement in agreements):
        return math.inf
    if metric == "top-1":
        return max((1 - agreement.top1 for agreement in agreements if agreement.top1 is not None), default=None)
    return max((agreement.relative for agreement in agreements if agreement.relative is not None), default=None)
