"""The rounding noise of a model: the original with the parameters of every affine as inputs, so that they can be disturbed."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from fastbn.errors import FastbnError
from fastbn.graph.model.constant import float64_of
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import is_standard, scopes_of
from fastbn.graph.model.node import Node
from fastbn.graph.ops.normalization import EPSILON, is_batch_norm
from fastbn.graph.ops.placing import constant_slot
from fastbn.graph.ops.registry import can_be_affine, operator_row, row_of
from fastbn.graph.parity.feeds import Feed
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal
from fastbn.graph.runtime import UNIT

__all__ = ["NOISE", "Noise"]

# Rounding noise put into every batch normalization of the original, in units of round-off: with 2, every parameter moves to a neighbor.
NOISE = 2

# The signs of the noise of an input repeat after this many elements, a prime number that no axis has as its length.
PATTERN = 8191

# Constants of elementwise operators up to this size are disturbed.
LARGEST_DISTURBED = 1 << 16

# Nodes around an affine whose sums are looked at, on either side.
MOST_NEIGHBORS = 16


class Noise:
    """What is disturbed in a model, and by how much.

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
        The largest unit of round-off of the parameters.
    """

    def __init__(self, index: Index, proto: ModelProto, inputs_only: bool = False) -> None:
        self.index = index
        self.proto = ModelProto()
        self.proto.CopyFrom(proto)
        self.proto.ir_version = max(proto.ir_version, 4)  # before that, an initializer that nothing reads must be an input
        self._graphs = scopes_of(self.proto.graph)
        self._parameters: dict[str, _Parameter] = {}
        self._site = GraphView(index)
        self._units: dict[Node, float] = {}
        units = []
        for node in () if inputs_only else index.order:
            if is_batch_norm(node) and len(node.inputs) == 5:
                units += self._disturb_batch_norm(node)
            elif is_standard(node.domain) and can_be_affine(node.op):
                units += self._disturb_elementwise(node)
        self.unit = max(units, default=UNIT["float32"])

    def _disturb_batch_norm(self, node: Node) -> list[float]:
        found = [self.index.constant(value) for value in node.inputs[1:5]]
        if any(constant is None or constant.dtype.name not in UNIT for constant in found):
            return []
        scale, bias, mean, var = map(float64_of, found)
        # Parameters may be float32 beside float16 data: the data says what rounding does.
        kind = self.index.kind(node.outputs[0]) or self.index.kind(node.inputs[0])
        name = helper.tensor_dtype_to_np_dtype(kind).name if kind else ""
        unit = UNIT.get(name, UNIT[found[0].dtype.name])
        with np.errstate(all="ignore"):
            size = np.abs(bias) + np.abs(scale) * (1 + np.abs(mean) / np.sqrt(var + node.attribute("epsilon", EPSILON)))
        self._disturb(node, 1, scale, np.abs(scale), unit, found[0].dtype)
        self._disturb(node, 2, bias, size, unit, found[1].dtype)
        return [unit]

    def _disturb_elementwise(self, node: Node) -> list[float]:
        slot = constant_slot(node, self._site)
        found = None if slot is None else self.index.constant(node.inputs[slot])
        if slot is None or found is None or found.size > LARGEST_DISTURBED:
            return []
        values, unit = float64_of(found), UNIT[found.dtype.name]
        self._disturb(node, slot, values, np.abs(values), unit, found.dtype)
        return [unit]

    def _disturb(self, node: Node, slot: int, values: NDArray, size: NDArray, unit: float, dtype: np.dtype) -> None:
        name = f"fastbn/noise/{node.scope.number}/{node.position}/{slot}"
        self._graphs[node.scope.number].node[node.position].input[slot] = name
        self.proto.graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), values.shape))
        self._parameters[name] = _Parameter(node, values, size, unit, dtype)

    def still(self, feed: Feed) -> Feed:
        """Return the inputs of `proto` at which it must give what the original gives, bit for bit."""
        return {**feed, **{name: each.values.astype(each.dtype) for name, each in self._parameters.items()}}

    def disturbed(self, feed: Feed, rng: np.random.Generator, sums: bool = False) -> Feed:
        """Return the inputs of `proto` with every parameter moved by NOISE units of round-off and every input to a neighbor, up or down at
        random; with `sums`, a parameter moves by what the sums before and behind it may err as well."""
        noisy = {}
        for name, each in self._parameters.items():
            size = NOISE * each.unit * each.size
            if sums:
                size = size + self._sum_units(each.node) * min(each.unit, UNIT["float32"]) * each.size
            with np.errstate(over="ignore"):
                noisy[name] = np.asarray(each.values + size * rng.choice([-1.0, 1.0], each.values.shape)).astype(each.dtype)
        for name, values in feed.items():
            noisy[name] = values
            if values.dtype.kind == "f":
                towards = np.resize(rng.choice([-np.inf, np.inf], PATTERN).astype(values.dtype), values.shape)
                with np.errstate(over="ignore"):
                    noisy[name] = np.asarray(np.nextafter(values, towards))
        return noisy

    def _sum_units(self, node: Node) -> float:
        """Return by how many units of round-off the sums may err that the affine of a node may pass or go into."""
        if node not in self._units:
            found = [_units(each, self._site) for ahead in (False, True) for each in _neighbors(node, ahead)]
            self._units[node] = max(found, default=0.0)
        return self._units[node]


@dataclass(frozen=True, eq=False)
class _Parameter:
    """One parameter that is disturbed: its values, the size of what they are added to or multiplied with, and the unit of round-off."""

    node: Node
    values: NDArray
    size: NDArray
    unit: float
    dtype: np.dtype


def _neighbors(node: Node, ahead: bool) -> list[Node]:
    """Return the nodes of the tables behind or before a node, on every way up to the first that multiplies by a weight."""
    found, pending = {}, [node]
    while pending and len(found) < MOST_NEIGHBORS:
        current = pending.pop(0)
        if ahead:
            near = [reader for value in current.outputs if value is not None for reader, _ in value.readers]
        else:
            near = [value.producer for value in current.inputs if value is not None and value.producer is not None]
        for each in near:
            row = operator_row(each)
            if each not in found and row.transfers:
                found[each] = None
                pending.extend([] if row.weight_matrix is not None else [each])
    return list(found)


def _units(node: Node, view: GraphView) -> float:
    """Return by how many units a sum may err, a MARGIN-th of it: 2 sqrt(n) where its terms are like random ones (Higham & Mary 2019), n / 2
    where they are equal, as in a pool over an image that is the same everywhere."""
    row = row_of(node, view)
    try:
        terms = row.terms(node, view)
    except (FastbnError, Refusal):  # its weight is no constant: nothing goes into it
        return 0.0
    return terms / 8 if row.equal_terms else math.sqrt(terms) / 2
