"""The outputs of a deployed model beside those of the original: errors, and whether a classifier still decides the same.

The reference is the original with onnxruntime's optimiser off; a stage runs as it is deployed, with the optimiser at its default.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from fastbn.errors import ArgumentError, expected
from fastbn.graph.results import json_number
from fastbn.graph.runtime import runtime_errors, said

__all__ = ["METRICS", "Agreement", "compare", "drop_of"]

# What a stage is judged by, and how much of it may be lost where the caller does not say.
METRICS = {"top-1": 0.01, "error": 0.1}

RANDOM = "random: it differs between two runs of the original"


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
        if self.relative is None:
            return None
        return math.inf if self.relative == 0 else -20 * math.log10(self.relative)

    def to_dict(self) -> dict:
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


def compare(
    reference: object, stages: dict, feeds: list[dict], scores: Collection[str], progress: Callable[[str], None] | None = None
) -> dict:
    """Run the original and every stage on all feeds.

    Parameters
    ----------
    reference : onnxruntime session
    stages : dict of name -> onnxruntime session
    feeds : list of dict of name -> array
    scores : collection of str
        Outputs whose largest entry of a row is a decision.
    progress : callable of str, optional

    Returns
    -------
    dict of name -> list of Agreement
        One for each output. A stage that onnxruntime cannot run has the sentence that says so in place of the list.

    Raises
    ------
    ArgumentError
        The original does not take a feed.
    """
    names = [entry.name for entry in reference.get_outputs()]
    totals = {stage: [_Total(name, name in scores) for name in names] for stage in stages}
    failed = {}
    for number, feed in enumerate(feeds):
        if progress:
            progress(f"feed {number + 1} of {len(feeds)}")
        before = _run(reference, feed)
        if number == 0:
            random = [not _same(one, other) for one, other in zip(before, _run(reference, feed), strict=True)]
        for stage, session in stages.items():
            if stage in failed:
                continue
            try:
                after = session.run(names, feed)
            except runtime_errors() as error:
                failed[stage] = f"onnxruntime cannot run it: {said(error)}"
                continue
            for total, skipped, one, other in zip(totals[stage], random, before, after, strict=True):
                if skipped:
                    total.skip(RANDOM)
                else:
                    total.add(one, other)
    return {stage: failed.get(stage) or [total.agreement() for total in totals[stage]] for stage in stages}


def _run(reference: object, feed: dict) -> list:
    try:
        return reference.run(None, feed)
    except runtime_errors() as error:
        raise ArgumentError(expected("samples that the model takes", f"the answer: {said(error)}", "data")) from error


def _same(one: object, other: object) -> bool:
    """Say whether two runs gave the same; of what is no array, nobody knows."""
    one, other, _ = _arrays(one, other)
    return one is None or (other is not None and np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))


def _arrays(before: object, after: object) -> tuple:
    """Return two outputs as arrays and whether they have the same keys; a sequence of maps of numbers, as ZipMap gives it, is an array with
    a row each; before is None for anything else, after where it is of another kind."""
    if isinstance(before, np.ndarray):
        return before, after if isinstance(after, np.ndarray) else None, True
    one, other = _rows_of_maps(before), _rows_of_maps(after)
    return one and one[1], other and other[1], not (one and other) or one[0] == other[0]


def _rows_of_maps(value: object) -> tuple | None:
    """Return (keys, array [N, number of keys]) of a list of dicts with the same keys and numbers as values, or None."""
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return None
    keys = sorted(value[0], key=str)
    if any(set(row) != set(keys) or not all(isinstance(entry, (int, float)) for entry in row.values()) for row in value):
        return None
    return keys, np.array([[row[key] for key in keys] for row in value], dtype=np.float64)


class _Total:
    """Sums over the samples of one output of one stage."""

    def __init__(self, output: str, scores: bool) -> None:
        self.output = output
        self.scores = scores
        self.discrete = False
        self.elements = self.compared = self.rows = self.same = self.unequal = 0
        self.max_error = self.difference = self.before = self.after = self.product = 0.0
        self.skipped: str | None = None
        self.lost: str | None = None

    def skip(self, note: str) -> None:
        """Say why the output cannot be compared."""
        self.skipped = note

    def add(self, before: object, after: object) -> None:
        """Compare one output of one sample."""
        before, after, same_keys = _arrays(before, after)
        if before is None or before.dtype.kind not in "fiubVOUS":
            self.skip("neither numbers nor text")
            return
        self.elements += before.size
        if after is None or before.shape != after.shape or not same_keys:
            self._lose(f"{'another kind of value' if after is None else f'shape {list(after.shape)}'} instead of {list(before.shape)}")
            return
        self.discrete = before.dtype.kind in "iubOUS"
        if before.dtype.kind in "OUS":
            self.compared += before.size
            self.unequal += int(np.count_nonzero(before != after))
            return
        self._add_numbers(before.astype(np.float64), after.astype(np.float64))

    def _add_numbers(self, before: np.ndarray, after: np.ndarray) -> None:
        finite = np.isfinite(before)
        if not np.array_equal(before[~finite], after[~finite], equal_nan=True) or not np.isfinite(after[finite]).all():
            self._lose("Inf or NaN on one side only")
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

    def _lose(self, note: str) -> None:
        self.lost = note
        self.max_error = self.difference = np.inf

    def _decide(self, before: np.ndarray, after: np.ndarray) -> None:
        """Count decisions; a row with NaN, or whose largest score is Inf, has none. An entry of -Inf is a class that is ruled out."""
        decided = np.isfinite(before.max(axis=1))
        before, after = before[decided], after[decided]
        # Where the original has the largest score twice, either place is its decision.
        chosen = np.take_along_axis(before, after.argmax(axis=1)[:, None], axis=1)[:, 0]
        self.rows += len(before)
        self.same += int(np.count_nonzero(chosen == before.max(axis=1)))

    def agreement(self) -> Agreement:
        """Return what the samples say together."""
        if self.lost is None and (self.skipped or not self.compared):
            empty = "empty on every sample" if not self.elements else "no finite values to compare"
            return Agreement(self.output, self.elements, None, None, None, None, 0, self.skipped or empty)
        if self.discrete and self.lost is None:
            relative = self.unequal / self.elements
        elif self.difference == 0:
            relative = 0.0
        else:
            relative = math.sqrt(self.difference / self.before) if self.before else np.inf
        size = math.sqrt(self.before * self.after)
        cosine = None if not size or self.difference == np.inf else min(1.0, self.product / size)
        top1 = self.same / self.rows if self.rows else None
        left = self.elements - self.compared
        note = self.lost or (f"{left} of {self.elements} values are Inf or NaN on both sides" if left else None)
        return Agreement(self.output, self.elements, self.max_error, relative, cosine, top1, self.rows, note)


def drop_of(agreements: Collection[Agreement], metric: str) -> float | None:
    """Return what a stage loses: for "top-1" the part of decisions that changed, for "error" the relative error, of the worst output; None
    where there is nothing to judge it by."""
    if any(agreement.relative == np.inf for agreement in agreements):
        return np.inf
    if metric == "top-1":
        return max((1 - agreement.top1 for agreement in agreements if agreement.top1 is not None), default=None)
    return max((agreement.relative for agreement in agreements if agreement.relative is not None), default=None)
