"""Parity piece by piece: the folded model runs with values of the original in the place of its own.

A value that both models name is a cut: its readers in the folded model get what the original has there. Where every cut and every output
comes out as in the original, up to what rounding does within one piece, the two models are equal on this input, however much the
whole model makes of rounding. That holds for any choice of cuts; those that an affine passes on its way differ, and are given up.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, helper

from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import bodies, scopes_of
from fastbn.graph.model.node import Value
from fastbn.graph.parity.difference import Worst, bulk, compare, largest, moved
from fastbn.graph.parity.feeds import Feed
from fastbn.graph.parity.noise import Noise
from fastbn.graph.parity.reference import kept
from fastbn.graph.runtime import UNIT, Runnable, Runner

__all__ = ["CutParity", "Verdict", "check_cuts", "judged"]

# How much more than the measured effect of the noise is allowed, and how many units of round-off of the largest value in any case: the
# operators behind the last affine, which no noise reaches, round too.
MARGIN, FLOOR = 4, 16

# A bound above this part of the largest value proves nothing.
CONCLUSIVE = 0.01

# Elements of all cuts together.
LARGEST_CUTS = 1 << 23

# How often cuts that do not agree are given up.
ROUNDS = 8

# How often other values take the place of the cuts where an output is zero, Inf or NaN on those of the original.
MORE_TURNS = 3

PREFIX = "fastbn/cut/"


@dataclass(frozen=True)
class Verdict:
    """One array compared: the worst element, the bound that the noise explains, what is allowed (that bound, or less where it is too large
    to prove anything), and how far the noise moves it; what counts or chooses moves by steps, and its noise is taken as Inf."""

    name: str
    worst: Worst
    bound: float
    allowed: float
    noise: float

    @property
    def part(self) -> float:
        """Return the error as a part of what is allowed."""
        if self.worst.error == 0:
            return 0.0
        return self.worst.error / self.allowed if self.allowed else math.inf

    @property
    def holds(self) -> bool:
        """Say whether the arrays are equal up to what is allowed."""
        return self.worst.error <= self.allowed

    @property
    def is_wrong(self) -> bool:
        """Say whether the noise does not explain the difference. Neither this nor holds: it is too large to prove anything."""
        return self.worst.error > self.bound

    @property
    def doubt(self) -> str:
        """Say why a difference that is neither held nor wrong proves nothing."""
        part = f"{self.bound / self.worst.size:.1%} of the largest value" if self.worst.size else "values that are all zero"
        return f"rounding alone may change {part}, which proves nothing"

    @property
    def proves(self) -> bool:
        """Say whether the arrays are equal, and would show a difference: they are not zero, Inf or NaN everywhere, and do not stand still
        under any noise, as what comes from a saturated Softmax does."""
        return self.holds and self.worst.size > 0 and (self.noise > 0 or self.worst.error > 0)


def judged(name: str, before: NDArray, after: NDArray, noise: float, unit: float, shaken: NDArray | None = None) -> Verdict:
    """Compare two arrays of one shape, which must not be empty.

    Parameters
    ----------
    name : str
    before, after : numpy.ndarray
        What the original and the folded model give.
    noise : float
        How far rounding moves `before`.
    unit : float
        The unit of round-off.
    shaken : numpy.ndarray, optional
        `before` with noise. Where a few elements move a whole step (a rounding to integers), most elements of every channel must stay below
        what they do there.
    """
    worst = compare(before, after)
    floor = FLOOR * unit * worst.size
    bound = MARGIN * noise + floor
    allowed = min(bound, CONCLUSIVE * worst.size)
    if shaken is not None and shaken.shape == before.shape and allowed < worst.error <= bound:
        most = MARGIN * bulk(before, shaken) + floor
        if bulk(before, after) <= most <= CONCLUSIVE * worst.size:
            allowed = bound
    return Verdict(name, worst, bound, allowed, noise if before.dtype.kind == "f" else math.inf)


@dataclass(frozen=True)
class CutParity:
    """Parity piece by piece: "ok", "failed" or "inconclusive", at how many cuts, the worst array, and the names of those proven equal."""

    status: str
    cuts: int
    worst: Verdict | None = None
    proven: tuple[str, ...] = ()


def check_cuts(original: Runnable, proto: ModelProto, folded: Runnable, index: Index, noise: Noise, feed: Feed, seed: int) -> CutParity:
    """Compare two models piece by piece on one input; raises what onnxruntime raises.

    Parameters
    ----------
    original, folded : Runnable
    proto : onnx.ModelProto
        The original.
    index : model.Index
        Of the original.
    noise : noise.Noise
    feed : dict of name -> array
    seed : int
        Of the noise.
    """
    other = folded.proto()
    outputs = [info.name for info in proto.graph.output]
    names = _candidates(index, other)
    captured = _run(original, _with_outputs(proto, names), feed)
    before = dict(zip(outputs, captured, strict=False))
    cuts = {name: array for name, array in zip(names, captured[len(outputs) :], strict=True) if _is_numbers(array)}
    sections = _Sections(other)
    pair = _Pair(original, noise, folded, other, feed, seed)
    for _ in range(ROUNDS):
        verdicts = pair.verdicts(cuts, {**before, **cuts})
        different = [name for name in cuts if name not in verdicts or not verdicts[name].holds]
        given_up = sections.first(different, cuts)
        if not given_up:
            break
        for name in given_up:
            del cuts[name]
    else:
        return CutParity("inconclusive", len(cuts))
    worst = max(verdicts.values(), key=lambda each: each.part, default=None)
    ends = [verdicts[name] for name in outputs if name in verdicts]
    if any(end.is_wrong for end in ends):
        return CutParity("failed", len(cuts), worst)
    proven = {name for name, verdict in verdicts.items() if verdict.proves}
    if cuts and not proven.issuperset(end.name for end in ends):
        proven |= pair.proven_elsewhere(proto, outputs, cuts)
    # Behind cuts that agree, an output that is zero everywhere is as good as any other where nothing between them differs.
    vague = [end for end in ends if end.name not in proven]
    holds = all(end.holds and cuts and sections.is_unchanged(end.name, cuts, proto) for end in vague)
    return CutParity("ok" if ends and holds else "inconclusive", len(cuts), worst, tuple(sorted(proven)))


def _is_numbers(array: object) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.name in UNIT and array.size > 0 and bool(np.isfinite(array).all())


def _candidates(index: Index, other: ModelProto) -> list[str]:
    """Return names of values that nodes of both main graphs give, evenly thinned out where all would be too large."""
    given = {name for node in other.graph.node for name in node.output}
    ends = {info.name for info in (*index.proto.graph.output, *other.graph.output)}
    values = [value for value in index.main.values.values() if value.producer and value.name in given - ends]
    found = [value for value in values if index.constant(value) is None]
    total = sum(_size(value, index) for value in found)
    return [value.name for value in found[:: -(-total // LARGEST_CUTS) or 1]]


def _size(value: Value, index: Index) -> int:
    shape = index.shape(value)
    return LARGEST_CUTS >> 6 if shape is None else math.prod(2 if size is None else size for size in shape)


def _copy(proto: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    return copy


def _with_outputs(proto: ModelProto, names: Iterable[str]) -> ModelProto:
    """Return a copy that hands out more values, behind its own outputs."""
    copy = _copy(proto)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def _run(model: Runnable, proto: ModelProto, feed: Feed) -> list[NDArray]:
    with Runner(model.with_proto(proto)) as runner:
        wanted = {entry.name for entry in runner.get_inputs()}
        return [kept(output) for output in runner.run(None, {name: values for name, values in feed.items() if name in wanted})]


class _Pair:
    """The original, with and without noise, and the folded model, as often as they are run on one input with other values at the cuts."""

    def __init__(self, original: Runnable, noise: Noise, folded: Runnable, other: ModelProto, feed: Feed, seed: int) -> None:
        self.original, self.noise, self.folded, self.other = original, noise, folded, other
        self.feed, self.seed = feed, seed

    def verdicts(self, cuts: Feed, expected: Feed) -> dict[str, Verdict]:
        """Return how every output and every cut comes out, where these are expected, in that order."""
        given = self._given(cuts)
        after = _run(self.folded, _forced(self.other, cuts), given)
        rng = np.random.default_rng([self.seed, len(cuts)])
        shaken = _run(self.original, _forced(self.noise.proto, cuts), self.noise.disturbed(given, rng, sums=True))
        verdicts = {}
        for (name, reference), result, moving in zip(expected.items(), after, shaken, strict=True):
            if not isinstance(reference, np.ndarray) or reference.dtype.kind not in "fiub" or reference.size == 0:
                continue
            if result.shape != reference.shape or moving.shape != reference.shape:
                continue
            unit = max(self.noise.unit, UNIT.get(reference.dtype.name, 0.0))
            verdicts[name] = judged(name, reference, result, moved(reference, moving), unit, moving)
        return verdicts

    def proven_elsewhere(self, proto: ModelProto, outputs: list[str], cuts: Feed) -> set[str]:
        """Return the names of what other values at the cuts prove equal: the pieces must be so on any values."""
        found: set[str] = set()
        for turn in range(MORE_TURNS):
            rng = np.random.default_rng([self.seed, turn, len(cuts)])
            other = {name: _like(values, rng) for name, values in cuts.items()}
            before = _run(self.original, _forced(proto, other), self._given(other))
            verdicts = self.verdicts(other, dict(zip([*outputs, *cuts], before, strict=True)))
            found |= {name for name, verdict in verdicts.items() if verdict.proves}
            if found.issuperset(outputs):
                break
        return found

    def _given(self, cuts: Feed) -> Feed:
        return {**self.feed, **{PREFIX + name: values for name, values in cuts.items()}}


def _like(values: NDArray, rng: np.random.Generator) -> NDArray:
    """Return normal values of the same shape, type and size."""
    return np.asarray((largest(values) or 1.0) / 4 * rng.standard_normal(values.shape, np.float32)).astype(values.dtype)


def _forced(proto: ModelProto, cuts: Feed) -> ModelProto:
    """Return a copy in which the readers of every cut read a graph input instead, and which hands the cuts out."""
    copy = _with_outputs(proto, cuts)
    pending: list[tuple[GraphProto, set[str]]] = [(copy.graph, set(cuts))]
    for graph, names in pending:
        for node in graph.node:
            for slot, name in enumerate(node.input):
                if name in names:
                    node.input[slot] = PREFIX + name
            for body in bodies(node):
                own = {entry.name for entry in (*body.input, *body.initializer)} | {name for inner in body.node for name in inner.output}
                pending.append((body, names - own))
    for name, values in cuts.items():
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        copy.graph.input.append(helper.make_tensor_value_info(PREFIX + name, kind, [None] * values.ndim))
    return copy


class _Sections:
    """Which cuts lie right before which: the pieces of the folded model's main graph."""

    def __init__(self, proto: ModelProto) -> None:
        self.sources = _sources(proto)
        self.reads: dict[str, set[str]] = {}
        for node in proto.graph.node:
            inner = [each for body in bodies(node) for graph in scopes_of(body) for each in graph.node]
            reads = {name for each in (node, *inner) for name in each.input if name}
            for name in node.output:
                self.reads[name] = reads

    def first(self, wrong: list[str], cuts: Feed) -> list[str]:
        """Return those of these cuts whose piece begins at none of them."""
        marked = set(wrong)
        return [name for name in wrong if not self._begins(name, cuts) & marked]

    def is_unchanged(self, name: str, cuts: Feed, original: ModelProto) -> bool:
        """Say whether the original computes a value from the same cuts by the same nodes and constants."""
        sources = _sources(original)
        return all(sources.get(value) == self.sources.get(value) for value in self._piece(name, cuts) if value not in cuts)

    def _begins(self, name: str, cuts: Feed) -> set[str]:
        return {value for value in self._piece(name, cuts) if value in cuts and value != name}

    def _piece(self, name: str, cuts: Feed) -> set[str]:
        """Return a value and all that it is computed from, back to the cuts."""
        found, pending = {name}, [name]
        while pending:
            fresh = self.reads.get(pending.pop(), set()) - found
            found |= fresh
            pending.extend(value for value in fresh if value not in cuts)
        return found


def _sources(proto: ModelProto) -> dict[str, onnx.NodeProto | onnx.TensorProto]:
    """Return what every value of the main graph comes from: a node or an initializer."""
    found: dict[str, onnx.NodeProto | onnx.TensorProto] = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        found.update(dict.fromkeys(node.output, node))
    return found
