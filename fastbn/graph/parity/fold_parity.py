"""Parity of one fold: the segment of its plan, before and after, run on the same random input.

The segment is the nodes that the plan names. What is allowed follows from rounding theory: the folded segment evaluated with absolute
values, |W'| |x| + |b'|, bounds element by element the size of what was rounded, so the difference may be (8 + 2 sqrt(terms)) u times that,
u the unit roundoff and terms the length of the sums. Derivation: docs/numerics.md, "The bound of a fold".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from fastbn.dtypes import UNIT
from fastbn.graph.model.element_types import dtype_of
from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.normalization import BATCH_NORM, is_batch_norm
from fastbn.graph.ops.registry import OPERATORS, operator_row, row_of, sees_elements
from fastbn.graph.parity.feeds import Feed
from fastbn.graph.parity.probe import Probe, probes
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.view import GraphView
from fastbn.graph.rewrite.writer import edited
from fastbn.graph.runtime import CARRIERS, carried, runtime_errors, said, session

if TYPE_CHECKING:
    from fastbn._types import Array, FloatArray
    from fastbn.graph.model.constant import DType

__all__ = ["FoldParity", "check_fold"]

# Standard deviations of the random inputs: the next one is used where the original overflows. docs/numerics.md, "Inputs".
AMPLITUDES = (1.0, 1 / 64, 1 / 4096)

# Operators whose kernels end the process on data without elements.
FRAGILE = frozenset(op for op, row in OPERATORS.items() if row.ends_on_nothing)

NOTHING = "what comes out of the folded nodes is empty on every input tried"


@dataclass(frozen=True)
class FoldParity:
    """What running one segment gave.

    Attributes
    ----------
    ok : bool
    error, bound : float or None
        Of the element with the largest error as a part of its bound; None where the segment was not run, note says why.
    note : str or None
    """

    ok: bool
    error: float | None = None
    bound: float | None = None
    note: str | None = None


def check_fold(plan: Plan, view: GraphView, seed: int = 0) -> FoldParity:
    """Run the nodes of one plan before and after folding.

    Parameters
    ----------
    plan : plan.Plan
    view : view.GraphView
        The planner's view with the plan in it.
    seed : int
        Of the random input.

    Returns
    -------
    FoldParity
    """
    segment = _Segment(plan, view)
    if not segment.results:
        return FoldParity(True, note="not run: nothing reads what comes out of it")
    first: FoldParity | None = None
    complaint: str | None = None
    for probe in probes(segment.before, view, segment.inside):
        try:
            result = _check(segment, probe, seed)
        except MemoryError:
            complaint = complaint or "the memory does not suffice"
            continue
        except _NotRun as reason:
            complaint = complaint or str(reason)
            continue
        if result.ok or probe.has_sizes_of_model:
            return result
        # The sizes are not those of the model: a Reshape, say, may mean something else with them, so the next probe decides.
        first = first or result
    return first or FoldParity(
        True, note=f"not run: {complaint or 'its inputs are not known without a run of the model, and onnxruntime cannot run that'}"
    )


def _check(segment: _Segment, probe: Probe, seed: int) -> FoldParity:
    for amplitude in AMPLITUDES:
        before, after, abs_terms = segment.run(probe.make(np.random.default_rng(seed), amplitude))
        if np.isfinite(before).all():
            break
    else:
        return FoldParity(True, note="not run: the original overflows on every input tried")
    note = "run in float32: onnxruntime has no bfloat16 kernels" if segment.promoted else None
    allowed = segment.units() * abs_terms
    error = np.abs(after - before)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(error == 0, 0.0, error / allowed)
    part = np.where(np.isfinite(after), part, np.inf)
    worst = int(np.argmax(part))
    return FoldParity(bool(part.flat[worst] <= 1), float(error.flat[worst]), float(allowed.flat[worst]), note)


class _NotRun(Exception):
    """A segment that onnxruntime cannot run, in its words."""


@dataclass(frozen=True)
class _Model:
    """A tiny model whose constants are inputs: its nodes, its feed and its outputs."""

    nodes: list[NodeProto]
    feed: Feed
    results: list[str]


class _Segment:
    """The nodes of one plan as two tiny models whose constants are inputs: nothing is copied, and nothing can be optimized away."""

    def __init__(self, plan: Plan, view: GraphView) -> None:
        self.plan = plan
        self.view = view
        self.index: Index = view.index
        self.lifted = set(plan.lifted)
        self.before = self._sorted({*plan.path, *plan.beside, *plan.leaving, *plan.bypassed} - set(plan.added))
        self.inside = {value for node in self.before for value in node.outputs if value is not None}
        self.results = [value for node in self.before for value in node.outputs if value is not None and self._leaves(value)]
        self.dtype = self._data_type()
        self.promoted = self.dtype.name == "bfloat16"

    def _sorted(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=lambda node: node.order)

    def _data_type(self) -> DType:
        """Return the coarsest type of a constant or beside a Cast; that of a batch normalization's parameters where there is no other."""
        constants = [
            (not is_batch_norm(node), UNIT[constant.dtype.name], constant.dtype)
            for node in self.before
            for slot, constant in enumerate(map(self.index.constant, node.inputs))
            if constant is not None and constant.dtype.name in UNIT and slot not in operator_row(node).size_slots
        ]
        constants += [(True, UNIT[self.plan.constants[node, 1].dtype.name], self.plan.constants[node, 1].dtype) for node in self.plan.added]
        beside = [self.index.kind(value) for node in self.before if node.is_op("Cast") for value in (*node.inputs, *node.outputs) if value]
        casts = [dtype_of(kind) for kind in beside if kind]
        constants += [(True, UNIT[dtype.name], dtype) for dtype in casts if dtype.name in UNIT]
        return max(constants, key=lambda entry: entry[:2])[2]

    def _type_of(self, value: Value) -> DType:
        """Return the type of a value, that of the constants where it is not known."""
        kind = self.index.kind(value)
        dtype = dtype_of(kind) if kind else self.dtype
        return dtype if dtype.name in UNIT else self.dtype

    def _leaves(self, value: Value) -> bool:
        """Say whether something outside the segment reads a value of it."""
        if value.is_output:
            return True
        return any(node not in self.before and sees_elements(node, slot) for node, slot in value.readers)

    def units(self) -> float:
        """Return the bound of an error as a multiple of the absolute size of the terms."""
        unit = UNIT[self.dtype.name]
        terms = sum(row_of(node, self.view).terms(node, self.view) for node in self.before if node not in self.lifted)
        return float(8 * unit + 2 * math.sqrt(terms) * min(unit, UNIT["float32"]))

    def run(self, inputs: Mapping[str, Array]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return (before, after, absolute size of the terms), each with all results of the segment as one vector; raises _NotRun."""
        values = {value.name: value for node in self.before for value in node.inputs if value is not None}
        feed = {name: self._typed(np.asarray(array), values[name]) for name, array in inputs.items()}
        try:
            before = _joined(self._run_original(feed))
            after = _joined(self._run(self._folded(feed, magnitudes=False)))
            abs_terms = _joined(self._run(self._folded(feed, magnitudes=True)))
        except runtime_errors() as error:
            raise _NotRun(said(error)) from error
        if not before.size:
            raise _NotRun(NOTHING)
        least = max(operator_row(node).least_magnitude for node in self.before)
        return before, after, np.maximum(abs_terms, least)

    def _run_original(self, feed: Feed) -> list[Array]:
        """Run the original nodes, with the nodes that compute their constants where onnxruntime has kernels for them."""
        try:
            return self._run(self._original(feed, evaluated=self.promoted))
        except runtime_errors():
            return self._run(self._original(feed, evaluated=True))

    def _run(self, model: _Model) -> list[Array]:
        return _run_nodes(model.nodes, model.feed, model.results, self.index.opset)

    def _runnable(self, node: Node) -> NodeProto:
        """Return a copy of a node that onnxruntime has a kernel for."""
        proto = _modern(node.proto, self.index.opset)
        for attribute in proto.attribute:
            if self.promoted and proto.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
        return proto

    def _typed(self, array: Array, value: Value) -> Array:
        if array.dtype.kind != "f":
            return array
        dtype = self._type_of(value)
        return array.astype(np.float32 if dtype.name == "bfloat16" else dtype)

    def _original(self, feed: Feed, evaluated: bool) -> _Model:
        """Return the original segment; with `evaluated` the values of its constants are inputs, without it their own nodes compute them."""
        feed = dict(feed)
        computing: dict[Node, None] = {}
        read = (value for node in self.before for value in node.inputs if value is not None and value not in self.inside)
        pending = [value for value in read if self.index.constant(value) is not None]
        for value in pending:
            node, constant = value.producer, self.index.constant(value)
            if constant is not None and (evaluated or node is None or value.initializer is not None or not _is_computed(node, self.index)):
                feed[value.name] = _fed(constant.array())
            elif node is not None and node not in computing:
                computing[node] = None
                pending.extend(read for read in node.inputs if read is not None)
        nodes = [self._runnable(node) for node in self._sorted({*computing, *self.before})]
        return _Model(nodes, feed, [value.name for value in self.results])

    def _folded(self, feed: Feed, magnitudes: bool) -> _Model:
        """Return the folded segment; with magnitudes, every input and constant is its absolute value and every difference is a sum."""
        signed = {node.inputs[slot] for node in self.before for slot in operator_row(node).signed_slots if node.input(slot) is not None}
        names = {value.name for value in signed if value is not None}
        feed = {
            name: np.asarray(np.abs(values)) if magnitudes and values.dtype.kind == "f" and name not in names else values
            for name, values in feed.items()
        }
        nodes: list[NodeProto] = []
        for node in self.before:
            if node in self.view.removed:
                continue
            for present in self.plan.replaced.get(node, (node,)):
                proto = self._runnable(present)
                self._connect(present, proto, feed, magnitudes)
                edited(proto, {}, self.plan.attributes.get(present, {}))
                nodes.append(proto)
                if magnitudes:
                    nodes.extend(operator_row(present).bound(proto))
        return _Model(nodes, feed, [self._name(value) for value in self.results])

    def _connect(self, node: Node, proto: NodeProto, feed: Feed, magnitudes: bool) -> None:
        """Let the copy of a node read the constants that the plan gives it, other constants and the values before it."""
        for slot, value in enumerate(node.inputs):
            original = None if value in self.inside else self.index.constant(value)
            if (node, slot) in self.plan.constants:
                pass
            elif original is not None and value is not None:
                array = _fed(original.array())
                is_size = magnitudes and array.dtype.name in UNIT and slot not in operator_row(node).signed_slots
                feed[value.name] = operator_row(node).magnitude(slot, array) if is_size else array
            elif value is not None:
                proto.input[slot] = self._name(value)
        for (step, slot), constant in self.plan.constants.items():
            if step is node:
                name = f"{node.label}/{slot}"
                edited(proto, {slot: name}, {})
                feed[name] = _fed(constant.magnitude() if magnitudes else constant.array())

    def _name(self, value: Value) -> str:
        """Return the name of a value in the folded segment: that of the value before the nodes that are removed."""
        node = value.producer
        while node is not None and node in self.view.removed and node in self.before:
            value = self.plan.bypassed.get(node) or node.required_input(self.view.data_slot(node))
            node = value.producer
        return value.name


def _joined(results: list[Array]) -> FloatArray:
    return np.concatenate([result.astype(np.float64).reshape(-1) for result in results])


def _fed(array: Array) -> Array:
    """Return a constant as an input: bfloat16 as float32, as onnxruntime has no bfloat16 kernels."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _is_computed(node: Node, index: Index) -> bool:
    """Say whether onnxruntime can compute a constant from constants: a Shape reads what need not be one."""
    return all(value is None or index.constant(value) is not None for value in node.inputs)


def _modern(proto: NodeProto, opset: int) -> NodeProto:
    """Return a copy of a NodeProto that onnxruntime has a kernel for: before opset 7 inference was an attribute, now it is the default."""
    copy = NodeProto()
    copy.CopyFrom(proto)
    if opset < 7:
        obsolete = ("is_test", "consumed_inputs", "spatial", "broadcast", "axis")
        attributes = [attribute for attribute in copy.attribute if attribute.name not in obsolete]
        del copy.attribute[:]
        copy.attribute.extend(attributes)
    if copy.op_type == BATCH_NORM:
        del copy.output[1:]  # running statistics that nothing reads, with which onnxruntime does not run it
    return copy


def _run_nodes(nodes: list[NodeProto], feed: Feed, results: list[str], opset: int) -> list[Array]:
    """Run nodes in onnxruntime, every constant an input; raises _NotRun where that would end the process."""
    for number, proto in enumerate(nodes):
        if proto.op_type in FRAGILE and proto.input[0] not in feed:
            (data,) = _run_nodes(nodes[:number], feed, [proto.input[0]], opset)
            if not data.size:
                raise _NotRun(NOTHING)
    read = {name for proto in nodes for name in proto.input}
    inputs = []
    feeds: dict[str, Array] = {}
    for name, array in feed.items():
        if name in read:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            if kind in CARRIERS:
                nodes = [helper.make_node("Cast", [f"{name}/carried"], [name], to=kind), *nodes]
            given = f"{name}/carried" if kind in CARRIERS else name
            inputs.append(helper.make_tensor_value_info(given, CARRIERS.get(kind, kind), np.shape(array)))
            feeds[given] = carried(np.asarray(array))
    graph = helper.make_graph(nodes, "segment", inputs, [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(results)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset if opset >= 7 else 9)], ir_version=8)
    run = session(model.SerializeToString(), threads=1)
    return run.run(results, feeds)
