"""Parity piece by piece: the folded model runs with values of the original in the place of its own.

A value that both models name is a cut: its readers in the folded model get the values of the original. Where every cut and every output
equals that of the original, up to the rounding within one piece, the two models are equal on this input, however much the whole model
amplifies rounding. That holds for any choice of cuts; cuts through which an affine passes differ, and are dropped.
Derivation: docs/numerics.md, "Piece by piece".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from fastbn.dtypes import UNIT
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import bodies, scopes_of
from fastbn.graph.model.node import Value
from fastbn.graph.parity.difference import is_numeric, max_abs, max_change
from fastbn.graph.parity.feeds import Feed
from fastbn.graph.parity.noise import Noise
from fastbn.graph.parity.reference import copied
from fastbn.graph.parity.verdict import Verdict, judged
from fastbn.graph.runtime import Runnable, Runner

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["CutParity", "check_cuts"]

# Elements of all cuts together.
LARGEST_CUTS = 1 << 23

# Rounds in which cuts that differ are dropped.
ROUNDS = 8

# Random values that are tried at the cuts where an output is zero, Inf or NaN on those of the original.
RANDOM_TURNS = 3

# What the name of the graph input for a cut begins with.
PREFIX = "fastbn/cut/"

# What gives a value of a main graph.
Origin: TypeAlias = NodeProto | TensorProto


@dataclass(frozen=True)
class CutParity:
    """Parity piece by piece: its status, the number of cuts, the worst array, and the names of the values proven equal."""

    status: Literal["ok", "failed", "inconclusive"]
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
    cuts: Feed = {name: array for name, array in zip(names, captured[len(outputs) :], strict=True) if _is_cut(array)}
    pieces = _Pieces(other)
    pair = _Pair(original, noise, folded, other, feed, seed)
    for _ in range(ROUNDS):
        verdicts = pair.verdicts(cuts, {**before, **cuts})
        different = [name for name in cuts if name not in verdicts or not verdicts[name].holds]
        dropped = pieces.first(different, cuts)
        if not dropped:
            break
        for name in dropped:
            del cuts[name]
    else:
        return CutParity("inconclusive", len(cuts))
    worst = max(verdicts.values(), key=lambda each: each.part, default=None)
    ends = [verdicts[name] for name in outputs if name in verdicts]
    if any(end.is_wrong for end in ends):
        return CutParity("failed", len(cuts), worst)
    proven = {name for name, verdict in verdicts.items() if verdict.proves}
    if cuts and not proven.issuperset(end.name for end in ends):
        proven |= pair.proven_on_random_cuts(proto, outputs, cuts)
    # Behind equal cuts, an output that is zero everywhere is equal too if all nodes and constants between are the same in both models.
    unproven = [end for end in ends if end.name not in proven]
    holds = all(end.holds and cuts and pieces.is_unchanged(end.name, cuts, proto) for end in unproven)
    return CutParity("ok" if ends and holds else "inconclusive", len(cuts), worst, tuple(sorted(proven)))


def _is_cut(array: object) -> TypeGuard[Array]:
    """Say whether a value can be a cut: finite floating-point numbers."""
    return isinstance(array, np.ndarray) and array.dtype.name in UNIT and array.size > 0 and bool(np.isfinite(array).all())


def _candidates(index: Index, other: ModelProto) -> list[str]:
    """Return names of values that nodes of both main graphs give; only every n-th where all together would be too large."""
    given = {name for node in other.graph.node for name in node.output}
    ends = {info.name for info in (*index.proto.graph.output, *other.graph.output)}
    values = [value for value in index.main.values.values() if value.producer and value.name in given - ends]
    varying = [value for value in values if index.constant(value) is None]
    total = sum(_size(value, index) for value in varying)
    return [value.name for value in varying[:: -(-total // LARGEST_CUTS) or 1]]


def _size(value: Value, index: Index) -> int:
    shape = index.shape(value)
    return LARGEST_CUTS >> 6 if shape is None else math.prod(2 if size is None else size for size in shape)


def _copy(proto: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    return copy


def _with_outputs(proto: ModelProto, names: Iterable[str]) -> ModelProto:
    """Return a copy with these values as outputs after its own."""
    copy = _copy(proto)
    copy.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return copy


def _run(model: Runnable, proto: ModelProto, feed: Feed) -> list[object]:
    with Runner(model.with_proto(proto)) as runner:
        inputs = {entry.name for entry in runner.get_inputs()}
        return [copied(output) for output in runner.run(None, {name: values for name, values in feed.items() if name in inputs})]


class _Pair:
    """The original, with and without noise, and the folded model, run on one input with given values at the cuts."""

    def __init__(self, original: Runnable, noise: Noise, folded: Runnable, other: ModelProto, feed: Feed, seed: int) -> None:
        self.original, self.noise, self.folded, self.other = original, noise, folded, other
        self.feed, self.seed = feed, seed

    def verdicts(self, cuts: Feed, expected: dict[str, object]) -> dict[str, Verdict]:
        """Return the Verdict of every output and every cut by name; `expected` has the values of the original, in that order."""
        given = self._given(cuts)
        after = _run(self.folded, _forced(self.other, cuts), given)
        rng = np.random.default_rng([self.seed, len(cuts)])
        noisy = _run(self.original, _forced(self.noise.proto, cuts), self.noise.perturbed(given, rng, sums=True))
        verdicts = {}
        for (name, reference), result, moved in zip(expected.items(), after, noisy, strict=True):
            if not (is_numeric(reference) and is_numeric(result) and is_numeric(moved)) or reference.size == 0:
                continue
            if result.shape != reference.shape or moved.shape != reference.shape:
                continue
            unit = max(self.noise.unit, UNIT.get(reference.dtype.name, 0.0))
            verdicts[name] = judged(name, reference, result, max_change(reference, moved), unit, moved)
        return verdicts

    def proven_on_random_cuts(self, proto: ModelProto, outputs: list[str], cuts: Feed) -> set[str]:
        """Return the names of the values that random values at the cuts prove equal: the pieces of both models must be so on any values."""
        proven: set[str] = set()
        for turn in range(RANDOM_TURNS):
            rng = np.random.default_rng([self.seed, turn, len(cuts)])
            other = {name: _random_like(values, rng) for name, values in cuts.items()}
            before = _run(self.original, _forced(proto, other), self._given(other))
            verdicts = self.verdicts(other, dict(zip([*outputs, *cuts], before, strict=True)))
            proven |= {name for name, verdict in verdicts.items() if verdict.proves}
            if proven.issuperset(outputs):
                break
        return proven

    def _given(self, cuts: Feed) -> Feed:
        return {**self.feed, **{PREFIX + name: values for name, values in cuts.items()}}


def _random_like(values: Array, rng: np.random.Generator) -> Array:
    """Return normal values of the same shape and type; the largest given value is four standard deviations."""
    return np.asarray((max_abs(values) or 1.0) / 4 * rng.standard_normal(values.shape, np.float32)).astype(values.dtype)


def _forced(proto: ModelProto, cuts: Feed) -> ModelProto:
    """Return a copy in which the readers of every cut read a graph input instead, and the cuts are outputs."""
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


class _Pieces:
    """The pieces of a main graph between the cuts."""

    def __init__(self, proto: ModelProto) -> None:
        self.origins = _origins(proto)
        self.reads: dict[str, set[str]] = {}
        for node in proto.graph.node:
            inner = [each for body in bodies(node) for graph in scopes_of(body) for each in graph.node]
            reads = {name for each in (node, *inner) for name in each.input if name}
            for name in node.output:
                self.reads[name] = reads

    def first(self, different: list[str], cuts: Feed) -> list[str]:
        """Return those of these cuts whose piece begins at none of them."""
        return [name for name in different if not self._begins(name, cuts) & set(different)]

    def is_unchanged(self, name: str, cuts: Feed, original: ModelProto) -> bool:
        """Say whether the original computes a value from the same cuts by the same nodes and constants."""
        origins = _origins(original)
        return all(origins.get(value) == self.origins.get(value) for value in self._piece(name, cuts) if value not in cuts)

    def _begins(self, name: str, cuts: Feed) -> set[str]:
        return {value for value in self._piece(name, cuts) if value in cuts and value != name}

    def _piece(self, name: str, cuts: Feed) -> set[str]:
        """Return a value and all that it is computed from, back to the cuts."""
        piece, pending = {name}, [name]
        while pending:
            fresh = self.reads.get(pending.pop(), set()) - piece
            piece |= fresh
            pending.extend(value for value in fresh if value not in cuts)
        return piece


def _origins(proto: ModelProto) -> dict[str, Origin]:
    """Return the node or initializer that gives each value of the main graph."""
    origins: dict[str, Origin] = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        origins.update(dict.fromkeys(node.output, node))
    return origins
