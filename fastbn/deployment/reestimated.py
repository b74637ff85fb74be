"""New running statistics before the fold, from one half of the samples; the other half says whether accuracy falls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from fastbn.deployment.compare import REFERENCE, Original, compare
from fastbn.deployment.labels import Accuracy, AccuracyFields
from fastbn.deployment.stages import marks_for
from fastbn.errors import ArgumentError, expected
from fastbn.graph.parity.feeds import ModelNotRun
from fastbn.graph.runtime import Runnable, runtime_errors, said

if TYPE_CHECKING:
    from fastbn.deployment.samples import Samples
    from fastbn.deployment.verdict import Judge
    from fastbn.graph.model.index import Index
    from fastbn.graph.model.storage import Source

__all__ = ["NewStatistics", "NewStatisticsFields", "halves", "reestimated"]

# What the model with new statistics is called where it is compared.
NEW = "reestimated"


class NewStatisticsFields(TypedDict):
    """NewStatistics as JSON holds them."""

    used: bool
    batch_normalizations: int
    samples: int
    worst: str | None
    distance: float
    before: AccuracyFields | None
    after: AccuracyFields | None


@dataclass(frozen=True)
class NewStatistics:
    """What came of new running statistics.

    Attributes
    ----------
    used : bool
        Whether they are in the model that was folded: where accuracy did not fall.
    batch_normalizations : int
        How many got some.
    samples : int
        How many they come from.
    worst, distance : str or None, float
        The one that moved farthest, and how far, in standard deviations, as `fastbn.reestimation.Moved` says.
    before, after : Accuracy or None
        On the other samples, with the old statistics and the new ones; None where there was nothing to estimate.
    """

    used: bool
    batch_normalizations: int
    samples: int
    worst: str | None = None
    distance: float = 0.0
    before: Accuracy | None = None
    after: Accuracy | None = None

    def to_dict(self) -> NewStatisticsFields:
        """Return the fields as JSON holds them."""
        return {
            "used": self.used,
            "batch_normalizations": self.batch_normalizations,
            "samples": self.samples,
            "worst": self.worst,
            "distance": self.distance,
            "before": None if self.before is None else self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
        }

    @property
    def is_refused(self) -> bool:
        """Whether there were some, and accuracy would have fallen."""
        return self.after is not None and not self.used

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return "no batch normalization has statistics that can be estimated again"
        what = f"{self.batch_normalizations} batch normalization{'s' if self.batch_normalizations > 1 else ''}"
        used = "used" if self.used else "not used, for accuracy would fall"
        moved = f"'{self.worst}' moved farthest, by {self.distance:.2g} std"
        held = f"{self.after.labels} held-out labels: {self.before.part:.1%} right before, now {self.after}"
        return f"statistics of {what} from {self.samples} samples, {used}; {moved}; {held}"


def halves(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Return samples to estimate on, and samples to compare on: a random half each.

    Raises
    ------
    ArgumentError
        There are no labels, without which nothing says whether new statistics are better, or less than two feeds.
    """
    if samples.labels is None:
        raise ArgumentError(expected("labels in the data, which tell whether new statistics are better", "none", "reestimate"))
    if len(samples.feeds) < 2:
        raise ArgumentError(expected("at least two feeds, one to estimate on and one to compare on", "1", "reestimate"))
    order = np.random.default_rng(seed).permutation(len(samples.feeds))
    parts = sorted(order[::2].tolist()), sorted(order[1::2].tolist())
    first, second = (_some(samples, numbers) for numbers in parts)
    return first, second


def _some(samples: Samples, numbers: list[int]) -> Samples:
    feeds = [samples.feeds[number] for number in numbers]
    labels = None if samples.labels is None else [samples.labels[number] for number in numbers]
    rows = sum(max((values.shape[0] for values in feed.values() if values.ndim), default=1) for feed in feeds)
    note = f"half of {len(samples.feeds)} feeds; new statistics come from the other half"
    return replace(samples, feeds=feeds, rows=rows, labels=labels, available=None, notes=(*samples.notes, note))


def reestimated(
    index: Index, estimated: Samples, held: Samples, judge: Judge, tell: Callable[[str], None]
) -> tuple[Source | None, NewStatistics]:
    """Estimate the running statistics of a model again, and compare both on samples held out.

    Parameters
    ----------
    index : model.Index
        The model.
    estimated, held : Samples
        As from `halves`.
    judge : Judge
    tell : callable of str

    Returns
    -------
    source : storage.Source or None
        The model with new statistics; None where there are none, or accuracy falls on the samples held out.
    NewStatistics

    Raises
    ------
    ModelNotRun
        onnxruntime does not load the model.
    FastbnError
        The statistics cannot be estimated, as `reestimate` says.
    """
    from fastbn.reestimation.job import reestimate  # it reads samples as this folder does

    made = reestimate(index.source, estimated.feeds, progress=lambda number, total, step, detail: tell(f"{step} {detail}".strip()))
    if not made.moved:
        return None, NewStatistics(False, 0, estimated.rows)
    source = index.source.derived(made.output.proto, edited=True)
    try:
        before, after = (Runnable.of(each).session() for each in (index.source, source))
    except runtime_errors() as error:
        raise ModelNotRun(f"onnxruntime cannot load the original: {said(error)}") from error
    marks = marks_for(before, index, held, judge)
    assert marks is not None, "halves demands labels"
    compare(Original(before), {NEW: after}, held.feeds, judge.scores, tell, marks.note)
    old, new = marks.accuracy(REFERENCE, REFERENCE), marks.accuracy(NEW, REFERENCE)
    is_better = old is not None and new is not None and new.right >= old.right
    worst = made.moved[0]
    found = NewStatistics(is_better, len(made.moved), made.samples, worst.bn, worst.distance, old, new)
    return source if is_better else None, found
