"""Calibration without data: inputs that fit what the first batch normalizations remember, and the model that makes activations fit too.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), set the range of an activation to some
standard deviations around the mean that the batch normalization before it has. Here the model is run instead, on synthetic inputs, once as
it is and once with every batch normalization normalizing what it reads: so the ranges of all activations are found, behind any operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastbn.deployment.bn_statistics import Moments, Remembered
from fastbn.deployment.equalization import equalized, rescaled
from fastbn.deployment.synthetic import KINDS, synthetic
from fastbn.graph.runtime import runtime_errors, said

if TYPE_CHECKING:
    import onnx

    from fastbn.graph import FoldResult
    from fastbn.graph.model.index import Index
    from fastbn.graph.model.storage import ModelLike, Source
    from fastbn.graph.ops.affine import FloatArray
    from fastbn.graph.parity.feeds import Feed

__all__ = ["Calibrated", "DataFree", "calibrated_models", "data_free", "feeds_wanted", "trial_feeds", "trial_seed"]

# Feeds to calibrate on: as many as hold these elements together, within limits.
ELEMENTS, FEWEST_FEEDS, MOST_FEEDS = 1 << 21, 12, 96

# Standard deviations and means (in standard deviations) of inputs that are tried first: from e^-4 to e^6, which holds pixels from 0 to 255.
DEVIATIONS, MEANS = np.exp(np.arange(-4, 6.1, 1.25)), (-1.0, 0.0, 1.0)

# Steps of the search from the best of these, as exponents of the deviation and in deviations: first and last.
STEP, LAST_STEP = (0.6, 0.5), 0.06

# Kinds of inputs that the search is run on: noise without neighbors would look too loud to filters of edges. So many feeds of each at most,
# fewer where they have more elements than this together.
PROBE_KINDS, PROBES, PROBE_ELEMENTS = (1, 2), 8, 1 << 18

# What a measure of the first batch normalizations is: see Remembered.first.
Measure: TypeAlias = Callable[[Sequence["Feed"]], list[tuple[Moments, Moments]]]


@dataclass(frozen=True)
class DataFree:
    """Inputs to calibrate on without data.

    Attributes
    ----------
    feeds : list of dict of name -> array
    restated : list of (onnx.ModelProto, list of int)
        For each kind of inputs the model whose batch normalizations remember the feeds of this kind, and their numbers; empty where the
        model has no batch normalization.
    notes : tuple of str
        What the inputs are.
    """

    feeds: list[Feed]
    restated: list[tuple[onnx.ModelProto, list[int]]]
    notes: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What the inputs are, in two words."""
        return "synthetic inputs" if self.restated else "random numbers"


class Calibrated(NamedTuple):
    """A model to quantize, the same of the models whose batch normalizations remember the feeds of some numbers, and how many of its layers
    are equalized."""

    path: Path
    restated: list[tuple[Path, list[int]]]
    layers: int = 0


def feeds_wanted(feed: Feed) -> int:
    """Return how many feeds like this one to calibrate on."""
    return max(FEWEST_FEEDS, min(MOST_FEEDS, ELEMENTS // max(1, sum(values.size for values in feed.values()))))


def data_free(index: Index, like: Sequence[Feed], seed: int) -> DataFree:
    """Return synthetic inputs, as many as the feeds `like`, and of their sizes and types, that fit the batch normalizations of a model."""
    remembered = Remembered(index)
    if not len(remembered):
        return DataFree([*like], [], ("no batch normalization says what real inputs are like: calibrated on random numbers",))
    try:
        fitted, notes = _made(remembered, like, seed)
        kinds = [list(range(kind, len(fitted), len(KINDS))) for kind in range(len(KINDS))]
        restated = [(remembered.restated([fitted[number] for number in numbers]), numbers) for numbers in kinds if numbers]
        return DataFree(fitted, restated, notes)
    except runtime_errors() as error:
        return DataFree([*like], [], (f"its batch normalizations cannot be asked, so calibrated on random numbers: {said(error)}",))


def trial_seed(seed: int) -> int:
    """Return the seed of inputs on which models are tried that were calibrated on those of another one."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])


def trial_feeds(index: Index, like: Sequence[Feed], free: DataFree, seed: int) -> list[Feed]:
    """Return inputs like those of `free`, drawn and fitted anew from another seed; `like` are random numbers of that seed."""
    return _made(Remembered(index), like, seed)[0] if free.restated else [*like]


def _made(remembered: Remembered, like: Sequence[Feed], seed: int) -> tuple[list[Feed], tuple[str, ...]]:
    """Return synthetic inputs of a seed that fit the first batch normalizations, and a sentence about that."""
    return _fitted(remembered.first(), synthetic(like, np.random.default_rng([seed, len(like)])))


def calibrated_models(
    folded: Path,
    free: DataFree,
    source: Source,
    fold: Callable[[ModelLike, bool], FoldResult],
    per_channel: bool,
    tell: Callable[[str], None],
) -> list[Calibrated]:
    """Write the models that may be quantized and calibrated without data, beside the folded one.

    Parameters
    ----------
    folded : Path
        The folded model.
    free : DataFree
    source : storage.Source
        The model that was folded.
    fold : callable
        (model, whether it is verified) -> FoldResult, as that model was folded.
    per_channel : bool
        Whether weights will have a scale for each output channel.
    tell : callable of str

    Returns
    -------
    list of Calibrated
        The folded model, and, where that is possible, one with equalized layers.
    """
    restated = []
    for number, (proto, numbers) in enumerate(free.restated):
        tell(f"batch normalizations on synthetic inputs, {number + 1} of {len(free.restated)}")
        path = folded.with_name(f"restated-{number}.onnx")
        fold(source.derived(proto, edited=True), False).save(path)
        restated.append((path, numbers))
    tell("equalizing layers")
    target = folded.with_name("equalized.onnx")
    scales = equalized(folded, target, free.feeds, per_channel)
    others = [(path.with_name(f"equalized-{path.name}"), numbers) for path, numbers in restated]
    if not scales or not all(rescaled(path, other, scales) for (path, _), (other, _) in zip(restated, others, strict=True)):
        return [Calibrated(folded, restated)]
    return [Calibrated(folded, restated), Calibrated(target, others, len(scales))]


@dataclass(frozen=True)
class _Scales:
    """For each float input, the logarithm of the standard deviation, and the mean in standard deviations."""

    names: tuple[str, ...]
    values: tuple[tuple[float, float], ...]

    def apply(self, feed: Feed) -> Feed:
        """Return a feed of mean 0 and deviation 1 with these instead."""
        changed = {name: np.exp(log) * (feed[name] + mean) for name, (log, mean) in zip(self.names, self.values, strict=True)}
        return {name: changed[name].astype(values.dtype) if name in changed else values for name, values in feed.items()}

    def moved(self, number: int, log: float, mean: float) -> _Scales:
        """Return those in which one input is moved; where its deviation changes, its mean stays where it is."""
        values = list(self.values)
        values[number] = values[number][0] + log, values[number][1] * math.exp(-log) + mean
        return _Scales(self.names, tuple(values))


def _fitted(measure: Measure, feeds: list[Feed]) -> tuple[list[Feed], tuple[str, ...]]:
    """Return the feeds scaled to what the first batch normalizations remember, and a sentence about that."""
    names = tuple(name for name, values in feeds[0].items() if values.dtype.kind == "f")
    elements = sum(values.size for values in feeds[0].values())
    count = max(1, min(PROBES, PROBE_ELEMENTS // max(1, elements)))
    probes = [feed for kind in PROBE_KINDS for feed in feeds[kind :: len(KINDS)][:count]] or feeds

    def distance(scales: _Scales) -> float:
        return _distance(measure([scales.apply(feed) for feed in probes]))

    starts = [_Scales(names, ((math.log(deviation), mean),) * len(names)) for deviation in DEVIATIONS for mean in MEANS]
    best, scales = min(((distance(each), number) for number, each in enumerate(starts)), default=(math.inf, 0))
    found = _descended(distance, starts[scales], best)
    fitted = [found.apply(feed) for feed in feeds]
    told = "; ".join(
        f"'{name}' of mean {mean * math.exp(log):.2g} and standard deviation {math.exp(log):.2g}"
        for name, (log, mean) in zip(names, found.values, strict=True)
    )
    note = f"synthetic inputs that fit the first batch normalizations: {told}"
    return _per_channel(measure, fitted), (note,)


def _descended(distance: Callable[[_Scales], float], scales: _Scales, best: float) -> _Scales:
    """Return the scales to which a search with ever smaller steps along each number leads."""
    step = 1.0
    while step * max(STEP) > LAST_STEP:
        is_better = False
        for number in range(len(scales.names)):
            for log, mean in ((STEP[0], 0.0), (-STEP[0], 0.0), (0.0, STEP[1]), (0.0, -STEP[1])):
                other = scales.moved(number, log * step, mean * step)
                reached = distance(other)
                if reached < best:
                    best, scales, is_better = reached, other, True
                    break
        step = step if is_better else step / 2
    return scales


def _per_channel(measure: Measure, feeds: list[Feed]) -> list[Feed]:
    """Return the feeds with a scale and a mean for each channel where the first batch normalizations then remember them better: one that
    reads the input itself, or a layout of it, tells those of each of its channels."""
    best = _distance(measure(feeds))
    for name in [name for name, values in feeds[0].items() if values.dtype.kind == "f"]:
        for moments, found in measure(feeds):
            for axis in range(1, feeds[0][name].ndim):
                if feeds[0][name].shape[axis] != found.mean.size:
                    continue
                scale = np.sqrt(moments.var / np.where(found.var > 0, found.var, 1))
                other = [{**feed, name: _affine(feed[name], axis, scale, moments.mean - found.mean * scale)} for feed in feeds]
                reached = _distance(measure(other))
                if reached < best:
                    best, feeds = reached, other
    return feeds


def _affine(values: NDArray[Any], axis: int, scale: FloatArray, shift: FloatArray) -> NDArray[Any]:
    shape = [-1 if each == axis else 1 for each in range(values.ndim)]
    return np.asarray(values * scale.reshape(shape) + shift.reshape(shape)).astype(values.dtype)


def _distance(measured: Sequence[tuple[Moments, Moments]]) -> float:
    return float(np.mean([moments.distance(found) for moments, found in measured]))
