"""The rounding noise of a model: the original with the parameters of every affine as graph inputs, so that they can be perturbed by a few
units of roundoff. What is perturbed, and by how much: docs/numerics.md, "The noise of a model".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto, helper

from fastbn.dtypes import UNIT
from fastbn.errors import FastbnError
from fastbn.graph.model.constant import float64_of
from fastbn.graph.model.element_types import dtype_of
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import is_standard, scopes_of
from fastbn.graph.model.node import Node
from fastbn.graph.ops.normalization import EPSILON, is_batch_norm
from fastbn.graph.ops.placing import constant_slot
from fastbn.graph.ops.registry import can_be_affine, operator_row, row_of
from fastbn.graph.parity.feeds import Feed
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal

if TYPE_CHECKING:
    from fastbn._types import FloatArray
    from fastbn.graph.model.constant import Constant, DType, Tensor

__all__ = ["NOISE", "Noise", "OwnNoise"]

# Noise of a parameter in units of roundoff: with 2, every parameter moves to a neighbor in its type.
NOISE = 2

# The signs of the noise of an input repeat after this many elements: a prime, so that no axis has it as its length in practice.
PATTERN = 8191

# Elements of a constant of an elementwise operator that is perturbed.
LARGEST_PERTURBED = 1 << 16

# The size of the one element of a channel that an InstanceNormalization is taken to have: what wide inputs are.
LARGEST_SINGLE = 2.0**6

# Nodes on either side of an affine whose sums are considered.
MOST_NEIGHBORS = 16


class Noise:
    """What is perturbed in a model, and by how much.

    Parameters
    ----------
    index : model.Index
        Of the original. The scale and bias of every batch normalization, in bodies too, and the constant of every Add, Sub, Mul and Div
        become graph inputs of `proto`.
    proto : onnx.ModelProto
        The original, or a copy of it with the same nodes; it is not changed.
    inputs_only : bool
        Leave the parameters alone: the noise enters by the graph inputs.

    Attributes
    ----------
    proto : onnx.ModelProto
        The copy whose parameters are graph inputs.
    unit : float
        The largest unit of roundoff of the parameters.
    """

    def __init__(self, index: Index, proto: ModelProto, inputs_only: bool = False) -> None:
        self.index = index
        self.proto = ModelProto()
        self.proto.CopyFrom(proto)
        self.proto.ir_version = max(proto.ir_version, 4)  # before that, an initializer that nothing reads must be an input
        self._graphs = scopes_of(self.proto.graph)
        self._parameters: dict[str, _Parameter] = {}
        self._view = GraphView(index)
        self._units: dict[Node, float] = {}
        units: list[float] = []
        for node in () if inputs_only else index.order:
            if is_batch_norm(node) and len(node.inputs) == 5:
                units += self._perturb_batch_norm(node)
            elif node.is_op("InstanceNormalization"):
                units += self._perturb_single_elements(node)
            elif is_standard(node.domain) and can_be_affine(node.op):
                units += self._perturb_elementwise(node)
        self.unit = max(units, default=UNIT["float32"])

    def _perturb_batch_norm(self, node: Node) -> list[float]:
        parameters = [self.index.constant(value) for value in node.inputs[1:5]]
        constants = [each for each in parameters if each is not None and each.dtype.name in UNIT]
        if len(constants) < 4:
            return []
        scale, bias, mean, var = map(float64_of, constants)
        # Parameters may be float32 beside float16 data: the type of the data decides the unit of roundoff.
        kind = self.index.kind(node.required_output()) or self.index.kind(node.required_input(0))
        name = dtype_of(kind).name if kind else ""
        unit = UNIT.get(name, UNIT[constants[0].dtype.name])
        with np.errstate(all="ignore"):
            abs_terms = np.abs(bias) + np.abs(scale) * (1 + np.abs(mean) / np.sqrt(var + node.attribute("epsilon", EPSILON)))
        self._perturb(node, 1, scale, np.abs(scale), unit, constants[0].dtype)
        self._perturb(node, 2, bias, abs_terms, unit, constants[1].dtype)
        return [unit]

    def _perturb_single_elements(self, node: Node) -> list[float]:
        """Perturb the bias of an InstanceNormalization of one element x per channel; it is rounded to the steps of x / sqrt(eps)."""
        shape = self.index.shape(node.required_input(0))
        scale, bias = (self.index.constant(node.input(slot)) for slot in (1, 2))
        if shape is None or set(shape[2:]) != {1} or scale is None or bias is None or bias.dtype.name not in UNIT:
            return []
        unit, values = UNIT[bias.dtype.name], float64_of(bias)
        size = np.abs(float64_of(scale)) * LARGEST_SINGLE / np.sqrt(node.attribute("epsilon", EPSILON))
        self._perturb(node, 2, values, np.abs(values) + size, unit, bias.dtype)
        return [unit]

    def _perturb_elementwise(self, node: Node) -> list[float]:
        slot = constant_slot(node, self._view)
        constant: Constant | None = None if slot is None else self.index.constant(node.inputs[slot])
        if slot is None or constant is None or math.prod(constant.shape) > LARGEST_PERTURBED:
            return []
        values, unit = float64_of(constant), UNIT[constant.dtype.name]
        self._perturb(node, slot, values, np.abs(values), unit, constant.dtype)
        return [unit]

    def _perturb(self, node: Node, slot: int, values: FloatArray, abs_terms: FloatArray, unit: float, dtype: DType) -> None:
        name = f"fastbn/noise/{node.scope.number}/{node.position}/{slot}"
        self._graphs[node.scope.number].node[node.position].input[slot] = name
        self.proto.graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), values.shape))
        self._parameters[name] = _Parameter(node, values, abs_terms, unit, dtype)

    def unperturbed(self, feed: Feed) -> Feed:
        """Return the inputs of `proto` with which it must give what the original gives, bit for bit."""
        return {**feed, **{name: each.values.astype(each.dtype) for name, each in self._parameters.items()}}

    def perturbed(self, feed: Feed, rng: np.random.Generator, sums: bool = False) -> Feed:
        """Return the inputs of `proto` with noise of random sign.

        Every element of a graph input moves to a neighbor in its type, every parameter by NOISE units of roundoff; with `sums`, also by
        the rounding error of the sums before and after its affine.
        """
        noisy: Feed = {}
        for name, each in self._parameters.items():
            change = NOISE * each.unit * each.abs_terms
            if sums:
                change = change + self._sum_units(each.node) * min(each.unit, UNIT["float32"]) * each.abs_terms
            with np.errstate(over="ignore"):
                noisy[name] = np.asarray(each.values + change * rng.choice([-1.0, 1.0], each.values.shape)).astype(each.dtype)
        for name, values in feed.items():
            noisy[name] = values
            if values.dtype.kind == "f":
                towards = np.resize(rng.choice([-np.inf, np.inf], PATTERN).astype(values.dtype), values.shape)
                with np.errstate(over="ignore"):
                    noisy[name] = np.asarray(np.nextafter(values, towards))
        return noisy

    def _sum_units(self, node: Node) -> float:
        """Return how many units of roundoff the sums may err from which or into which the affine of a node may go."""
        if node not in self._units:
            self._units[node] = max((_units(each, self._view) for each in self._around(node)), default=0.0)
        return self._units[node]

    def _around(self, node: Node) -> list[Node]:
        return [*_neighbors(node, forward=False), *_neighbors(node, forward=True)]


class OwnNoise(Noise):
    """What a folded model rounds itself: a shift that one constant adds and others take away again, of which the original knows nothing.

    Every constant that the original does not hold is perturbed, and by the rounding error of the sums that it enters; the inputs are not.

    Parameters
    ----------
    original, folded : model.Index
    """

    def __init__(self, original: Index, folded: Index) -> None:
        super().__init__(folded, folded.proto, inputs_only=True)
        held = {_key(constant) for _, _, constant in _small_constants(original)}
        for node, slot, constant in _small_constants(folded):
            if _key(constant) not in held:
                values = float64_of(constant)
                self._perturb(node, slot, values, np.abs(values), UNIT[constant.dtype.name], constant.dtype)

    def perturbed(self, feed: Feed, rng: np.random.Generator, sums: bool = True) -> Feed:
        """Return the inputs of `proto` with noise of random sign in the constants alone."""
        return {**super().perturbed({}, rng, sums), **feed}

    def _around(self, node: Node) -> list[Node]:
        return [node, *super()._around(node)]


def _small_constants(index: Index) -> Iterator[tuple[Node, int, Tensor]]:
    """Yield (node, slot, constant) of every constant of real numbers that may be perturbed."""
    for node in index.order:
        sizes = operator_row(node).size_slots
        for slot, constant in enumerate(map(index.constant, node.inputs)):
            if constant is not None and constant.dtype.name in UNIT and constant.size <= LARGEST_PERTURBED and slot not in sizes:
                yield node, slot, constant


def _key(constant: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return constant.dtype.name, constant.shape, constant.array().tobytes()


@dataclass(frozen=True, eq=False)
class _Parameter:
    """A parameter that is perturbed: the node that reads it, its values, the absolute size of its terms, and the unit of roundoff."""

    node: Node
    values: FloatArray
    abs_terms: FloatArray
    unit: float
    dtype: DType


def _neighbors(node: Node, forward: bool) -> list[Node]:
    """Return the nodes that take an affine or let it pass after a node (or before it), on every path up to the first with a weight."""
    neighbors: dict[Node, None] = {}
    pending = [node]
    while pending and len(neighbors) < MOST_NEIGHBORS:
        current = pending.pop(0)
        if forward:
            near = [reader for value in current.outputs if value is not None for reader, _ in value.readers]
        else:
            near = [value.producer for value in current.inputs if value is not None and value.producer is not None]
        for each in near:
            row = operator_row(each)
            if each not in neighbors and row.transfers:
                neighbors[each] = None
                pending.extend([] if row.weight_matrix is not None else [each])
    return list(neighbors)


def _units(node: Node, view: GraphView) -> float:
    """Return how many units of roundoff the sum of a node may err, divided by MARGIN: docs/numerics.md, "The noise of a model"."""
    row = row_of(node, view)
    try:
        terms = row.terms(node, view)
    except (FastbnError, Refusal):  # its weight is no constant: no affine goes into it
        return 0.0
    return terms / 8 if row.equal_terms else math.sqrt(terms) / 2
