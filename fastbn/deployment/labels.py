"""Labels of samples, and how many of them each stage of a deployment gets right."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ArgumentError, expected
from fastbn.masks import unmasked

if TYPE_CHECKING:
    from fastbn.graph.model.index import Index

__all__ = ["IMPLIED", "Accuracy", "AccuracyFields", "Marks", "Rule", "as_labels", "interval_of_loss"]

# An array of any type.
Array: TypeAlias = NDArray[Any]

# What labels are called where nobody says it.
IMPLIED = ("labels", "y", "targets")

# How sure the interval of a loss is.
CONFIDENCE = 0.95

# How an output decides: the largest score of an axis, one score against 0 or a probability against 1/2, or the label itself.
Kind: TypeAlias = Literal["classes", "score", "probability", "label"]

# Operators between a Sigmoid or Softmax and an output.
PASSING = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")


class AccuracyFields(TypedDict):
    """An Accuracy as JSON holds it; low and high are the interval of `lost`."""

    output: str
    right: float
    labels: int
    accuracy: float
    lost: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Accuracy:
    """How many labels a stage gets right.

    Attributes
    ----------
    output : str
        The output that decides.
    right, labels : float, int
        Labels that it gets right, of how many.
    lost, low, high : float or None
        Accuracy of the original less this one's, and the ends of the 95 % interval of that; None for the original.
    """

    output: str
    right: float
    labels: int
    lost: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def part(self) -> float:
        """The accuracy, from 0 to 1."""
        return self.right / self.labels

    def to_dict(self) -> AccuracyFields:
        """Return the fields as JSON holds them."""
        return {
            "output": self.output,
            "right": self.right,
            "labels": self.labels,
            "accuracy": self.part,
            "lost": self.lost,
            "low": self.low,
            "high": self.high,
        }

    def __str__(self) -> str:
        """Return the accuracy, and what is lost beside the original, in words."""
        text = f"accuracy {self.part:.1%} ({self.right:g} of {self.labels})"
        if self.lost is None or self.low is None or self.high is None:
            return text
        what = "gained" if self.lost < 0 else "lost"
        low, high = (-self.high, -self.low) if self.lost < 0 else (self.low, self.high)
        return f"{text}, {100 * abs(self.lost):.1f} points {what} ({100 * low:.1f} to {100 * high:.1f})"


def as_labels(values: object, where: str) -> NDArray[np.int64]:
    """Return labels as whole numbers: such an array, of floats too, with one axis of size 1 at the end or none; or rows with one 1 and
    else 0 as places.

    Raises
    ------
    ArgumentError
        They are of another type.
    """
    array = np.asarray(unmasked(values, where))
    if array.ndim >= 2 and array.shape[-1] > 1 and _is_one_hot(array):
        return np.asarray(array.argmax(axis=-1), dtype=np.int64)
    if array.ndim > 1 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype.kind == "f" and _are_whole(array):
        return np.asarray(array, dtype=np.int64)
    if array.dtype.kind not in "iub":
        raise ArgumentError(expected("labels that are whole numbers, or rows with one 1 and else 0", str(array.dtype), where))
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ArgumentError(expected("labels below 2**63", str(array.max()), where))
    return np.asarray(array, dtype=np.int64)


def _are_whole(array: Array) -> bool:
    wide = array.astype(np.float64)
    return bool(((np.abs(wide) < 2.0**63) & (wide == np.rint(wide))).all())


def _is_one_hot(array: Array) -> bool:
    if array.dtype.kind not in "iubf" or not array.size:
        return False
    return bool(((array == 0) | (array == 1)).all() and (np.count_nonzero(array, axis=-1) == 1).all())


@dataclass(frozen=True)
class Rule:
    """How one output of a model decides, and where labels are beside it.

    Attributes
    ----------
    output, place : str, int
        The output, and its place among all of them.
    kind : str
    axis : int
        That of the classes.
    classes : int
        How many there are; 0 where a label is compared as it is.
    """

    output: str
    place: int
    kind: Kind
    axis: int = 0
    classes: int = 0

    @classmethod
    def of(cls, index: Index, names: Sequence[str], outputs: Sequence[object], labels: Array, scores: Collection[str]) -> Rule:
        """Return the rule for a model, from its outputs for one feed, and the labels of it.

        An output has classes where it has the shape of the labels and one axis more, the second or the last; one score where it has the
        same shape and is of floats; labels where it is of whole numbers. Outputs that look like the scores of a classifier come first.

        Raises
        ------
        ArgumentError
            No output has classes for such labels.
        """
        places = sorted(range(len(names)), key=lambda place: names[place] not in scores)
        for single in (False, True):
            for place in places:
                array = np.asarray(outputs[place]) if isinstance(outputs[place], np.ndarray) else None
                found = None if array is None else _kind(array, labels.shape, single)
                if found is None:
                    continue
                kind, axis, classes = found
                if kind == "score" and _is_probability(index, names[place]):
                    kind = "probability"
                return cls(names[place], place, kind, axis, classes)
        shapes = ", ".join(f"'{name}' {_shown(getattr(output, 'shape', ()))}" for name, output in zip(names, outputs, strict=True))
        raise ArgumentError(expected(f"an output with classes for labels of shape {_shown(labels.shape)}", shapes, "data"))

    def check(self, labels: Sequence[Array], where: str) -> None:
        """Refuse labels that this output has no class for; raises ArgumentError."""
        if not self.classes:
            return
        largest = max((int(each.max()) for each in labels if each.size), default=0)
        if largest >= self.classes:
            what = f"labels from 0 to {self.classes - 1}, as output '{self.output}' has classes"
            raise ArgumentError(expected(what, str(largest), where))

    def right(self, outputs: Sequence[object], labels: Array) -> NDArray[np.float64]:
        """Return, for each sample, the part of its labels that is right; a sample without any (all are negative) is NaN."""
        output = np.asarray(outputs[self.place])
        if self.kind == "classes":
            shape = (*output.shape[: labels.ndim + 1],)
            decided = np.nan_to_num(output.reshape(shape), nan=-np.inf).argmax(axis=self.axis)
        else:
            value = output.reshape(labels.shape)
            decided = value if self.kind == "label" else value > (0.5 if self.kind == "probability" else 0)
        known = (labels >= 0).reshape(len(labels), -1)
        hits = (decided == labels).reshape(len(labels), -1) & known
        count = known.sum(axis=1)
        return np.where(count > 0, hits.sum(axis=1) / np.maximum(count, 1), np.nan)


def _kind(output: Array, shape: tuple[int, ...], single: bool) -> tuple[Kind, int, int] | None:
    """Return (kind, axis, classes) of an output beside labels of this shape; `single` looks for one without an axis of classes."""
    sizes = output.shape
    while len(sizes) > len(shape) + 1 and sizes[-1] == 1:
        sizes = sizes[:-1]
    if single:
        if math.prod(sizes) != math.prod(shape) or sizes[: len(shape)] != shape:
            return None
        return ("score", 0, 2) if output.dtype.kind == "f" else ("label", 0, 0) if output.dtype.kind in "iu" else None
    if output.dtype.kind != "f" or len(sizes) != len(shape) + 1:
        return None
    for axis in (1, len(sizes) - 1):
        if sizes[axis] > 1 and sizes[:axis] + sizes[axis + 1 :] == shape:
            return "classes", axis, sizes[axis]
    return None


def _is_probability(index: Index, name: str) -> bool:
    """Say whether an output comes from a Sigmoid or a Softmax, none of whose results is below 0."""
    node = index.main.values[name].producer
    while node is not None and node.is_op(*PASSING) and node.inputs and node.inputs[0] is not None:
        node = node.inputs[0].producer
    return node is not None and node.is_op("Sigmoid", "Softmax")


def _shown(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


class Marks:
    """What each stage gets right, sample by sample.

    Parameters
    ----------
    rule : Rule
    labels : list of array
        One for each feed.
    """

    def __init__(self, rule: Rule, labels: Sequence[Array]) -> None:
        self.rule = rule
        self.labels = labels
        self._right: dict[str, list[NDArray[np.float64]]] = {}

    def note(self, stage: str, number: int, outputs: Sequence[object]) -> None:
        """Note what a stage gives for the feed of a number."""
        self._right.setdefault(stage, []).append(self.rule.right(outputs, self.labels[number]))

    def accuracy(self, stage: str, base: str) -> Accuracy | None:
        """Return the Accuracy of a stage, and what it loses beside another; None where it did not run."""
        if stage not in self._right:
            return None
        right = np.concatenate(self._right[stage])
        known = ~np.isnan(right)
        if not known.any():
            return None
        weights = np.concatenate([(each >= 0).reshape(len(each), -1).sum(axis=1) for each in self.labels])[known]
        total = int(weights.sum())
        score = float(np.sum(right[known] * weights))
        score = round(score) if abs(score - round(score)) < 1e-6 else score
        if stage == base or base not in self._right:
            return Accuracy(self.rule.output, score, total)
        before = np.concatenate(self._right[base])[known]
        lost = (before - right[known]) * weights * len(weights) / total
        return Accuracy(self.rule.output, score, total, float(lost.mean()), *interval_of_loss(lost))

    def loss(self, stage: str, base: str) -> float | None:
        """Return the accuracy of one less that of another, None where one of them did not run."""
        found = self.accuracy(stage, base)
        return None if found is None or found.lost is None else found.lost


def interval_of_loss(lost: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a mean of paired differences: 1 where only the first is right, -1 where only the second is.

    Wald's interval after one sample more of each kind (D. Bonett and R. Price, Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data, 2012): it is wide enough, also where no pair differs. Parts of samples count as such.
    """
    count = len(lost) + 2
    mean = float(lost.sum()) / count
    spread = (float(np.sum(lost * lost)) + 2) / count - mean * mean
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(max(0.0, spread) / count)
    return max(-1.0, mean - half), min(1.0, mean + half)


def names_of_labels(wanted: str | None, names: Mapping[str, object], inputs: Collection[str]) -> str | None:
    """Return which of some arrays holds labels: the wanted one, else the first implied name that no input has."""
    if wanted is not None:
        return wanted if wanted in names else None
    return next((name for name in IMPLIED if name in names and name not in inputs), None)
