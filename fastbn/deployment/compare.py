"""The outputs of a deployed model beside those of the original: errors, and whether a classifier still decides the same.

The reference is the original with onnxruntime's optimiser off; a stage runs as it is deployed, with the optimiser at its default.
"""

import math
from dataclasses import dataclass

import numpy as np

from fastbn.errors import ArgumentError, expected
from fastbn.graph.report import json_number
from fastbn.graph.runtime import runtime_errors, said

__all__ = ["METRICS", "Agreement", "compare", "drop_of", "score_outputs"]

# What a stage is judged by, and how much of it may be lost where the caller does not say.
METRICS = {"top-1": 0.01, "error": 0.1}

# Operators between the scores of a classifier and its output.
PASSING = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Dropout")
PROBABILITIES = ("Softmax", "LogSoftmax")
SCORES = ("Gemm", "MatMul", "GlobalAveragePool", "ReduceMean")


@dataclass(frozen=True)
class Agreement:
    """One output of a stage beside the original's, over all samples.

    max_error is the largest absolute difference; relative is ||y' - y|| / ||y|| (Euclidean, all samples together), sqnr_db the same as
    -20 log10; cosine the angle's; top1 the part of rows whose largest entry is in the same place, None where the output has no scores.
    For an output of integers relative is the part of elements that differ.
    """

    output: str
    elements: int
    max_error: float
    relative: float
    cosine: float | None
    top1: float | None
    rows: int
    note: str | None = None

    @property
    def sqnr_db(self):
        return math.inf if self.relative == 0 else -20 * math.log10(self.relative)

    def to_dict(self):
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


def score_outputs(index):
    """Return the names of the outputs that look like the scores of a classifier: [N, C] or [N, C, 1, 1] with C > 1, from a Softmax, or from
    the last linear layer of a model with one output."""
    outputs = [index.main.values[info.name] for info in index.proto.graph.output]
    found = []
    for value in outputs:
        shape = index.shape(value)
        if shape is None or len(shape) < 2 or shape[1] == 1 or any(size != 1 for size in shape[2:]):
            continue
        node = value.producer
        while node is not None and node.inputs and (node.is_op(*PASSING) or _adds_bias(node, index)):
            node = next((read.producer for read in node.inputs if index.constant(read) is None), None)
        if node is not None and (node.is_op(*PROBABILITIES) or (len(outputs) == 1 and node.is_op(*SCORES))):
            found.append(value.name)
    return found


def _adds_bias(node, index):
    return node.is_op("Add") and any(index.constant(read) is not None for read in node.inputs)


def compare(reference, stages, feeds, scores, progress=None):
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
        A stage that onnxruntime cannot run has the sentence that says so in place of the list.

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
        try:
            before = reference.run(None, feed)
        except runtime_errors() as error:
            raise ArgumentError(expected("samples that the model takes", f"the answer: {said(error)}", "data")) from error
        for stage, session in stages.items():
            if stage in failed:
                continue
            try:
                after = session.run(names, feed)
            except runtime_errors() as error:
                failed[stage] = f"onnxruntime cannot run it: {said(error)}"
                continue
            for total, one, other in zip(totals[stage], before, after, strict=True):
                total.add(one, other)
    return {stage: failed.get(stage) or [total.agreement() for total in totals[stage] if total.compared] for stage in stages}


class _Total:
    """Sums over the samples of one output of one stage."""

    def __init__(self, output, scores):
        self.output = output
        self.scores = scores
        self.compared = True
        self.integer = False
        self.elements = self.rows = self.same = self.unequal = 0
        self.max_error = self.difference = self.before = self.after = self.product = 0.0
        self.note = None

    def add(self, before, after):
        if not isinstance(before, np.ndarray) or before.dtype.kind not in "fiubV":
            self.compared = False
            return
        self.elements += before.size
        if before.shape != after.shape:
            self._lose(f"shape {list(after.shape)} instead of {list(before.shape)}")
            return
        self.integer = before.dtype.kind in "iub"
        before, after = before.astype(np.float64), after.astype(np.float64)
        finite = np.isfinite(before)
        if not np.array_equal(before[~finite], after[~finite], equal_nan=True) or not np.isfinite(after[finite]).all():
            self._lose("Inf or NaN on one side only")
            return
        if self.scores and before.ndim >= 2 and finite.all():
            self._decide(before.reshape(before.shape[0], -1), after.reshape(after.shape[0], -1))
        before, after = before[finite], after[finite]
        change = np.abs(after - before)
        self.unequal += int(np.count_nonzero(change))
        self.max_error = max(self.max_error, float(change.max(initial=0)))
        self.difference += float(np.sum(change * change))
        self.before += float(np.sum(before * before))
        self.after += float(np.sum(after * after))
        self.product += float(np.sum(before * after))

    def _lose(self, note):
        self.note = note
        self.max_error = self.difference = np.inf

    def _decide(self, before, after):
        # Where the original has the largest score twice, either place is its decision.
        chosen = np.take_along_axis(before, after.argmax(axis=1)[:, None], axis=1)[:, 0]
        self.rows += len(before)
        self.same += int(np.count_nonzero(chosen == before.max(axis=1)))

    def agreement(self):
        if self.integer and self.difference < np.inf:
            relative = self.unequal / self.elements if self.elements else 0.0
        elif self.difference == 0:
            relative = 0.0
        else:
            relative = math.sqrt(self.difference / self.before) if self.before else np.inf
        size = math.sqrt(self.before * self.after)
        cosine = None if not size or self.difference == np.inf else min(1.0, self.product / size)
        top1 = self.same / self.rows if self.rows else None
        return Agreement(self.output, self.elements, self.max_error, relative, cosine, top1, self.rows, self.note)


def drop_of(agreements, metric):
    """Return what a stage loses: for "top-1" the part of decisions that changed, for "error" the relative error, of the worst output."""
    if any(agreement.relative == np.inf for agreement in agreements):
        return np.inf
    if metric == "top-1":
        return max((1 - agreement.top1 for agreement in agreements if agreement.top1 is not None), default=0.0)
    return max((agreement.relative for agreement in agreements), default=0.0)
