"""Parity of one fold: the nodes of its plan, before and after, run on the same random input.

What is allowed follows from rounding theory: the folded segment evaluated with absolute values, |W'| |x| + |b'|, bounds element by element
the size of what was rounded, so the difference may be (8 + 2 sqrt(terms)) u times that, u the unit round-off and terms the length of the
sums (sums of n terms err by sqrt(n) u with overwhelming probability, Higham & Mary 2019; the 8 counts the operations outside the sum). Sums
of 16-bit types run in float32 or better.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from fastbn.graph.ops.normalization import is_batch_norm
from fastbn.graph.ops.registry import ignores_elements, operator_row, row_of
from fastbn.graph.parity.probe import probes
from fastbn.graph.rewrite.writer import edited
from fastbn.graph.runtime import UNIT, runtime_errors, said, session

__all__ = ["FoldParity", "check_fold"]


@dataclass(frozen=True)
class FoldParity:
    """What running one site said: worst error and what is allowed there; both None where it was not run, for the reason in note."""

    ok: bool
    error: float | None = None
    bound: float | None = None
    note: str | None = None


def check_fold(plan, view, seed=0):
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
    found, complaint = None, None
    for probe in probes(segment.before, view, segment.inside):
        try:
            result = _check(segment, probe, seed)
        except _NotRun as reason:
            complaint = complaint or str(reason)
            continue
        if result.ok or probe.has_sizes_of_model:
            return result
        # The sizes are not those of the model: what a Reshape makes of them may be something else.
        found = found or result
    return found or FoldParity(True, note=f"not run: {complaint or 'an input of the site has no known type'}")


def _check(segment, probe, seed):
    for amplitude in (1.0, 1 / 64, 1 / 4096):
        before, after, size = segment.run(probe.make(np.random.default_rng(seed), amplitude))
        if np.isfinite(before).all():
            break
    else:
        return FoldParity(True, note="not run: the original overflows on every input tried")
    note = "run in float32: onnxruntime has no bfloat16 kernels" if segment.promoted else None
    allowed = segment.units() * size
    error = np.abs(after - before)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(error == 0, 0.0, error / allowed)
    part = np.where(np.isfinite(after), part, np.inf)
    worst = int(np.argmax(part))
    return FoldParity(bool(part.flat[worst] <= 1), float(error.flat[worst]), float(allowed.flat[worst]), note)


class _NotRun(Exception):
    """A site that onnxruntime cannot run, in its words."""


class _Segment:
    """The nodes of one plan as two tiny models whose constants are inputs: nothing is copied, and nothing can be optimised away."""

    def __init__(self, plan, view):
        self.plan = plan
        self.view = view
        self.index = view.index
        self.rank = {node: position for position, node in enumerate(self.index.order)}
        self.lifted = set(plan.lifted)
        self.before = sorted({*plan.path, *plan.lifted, *plan.bypassed} - set(plan.replaced.values()), key=self.rank.get)
        self.inside = {value for node in self.before for value in node.outputs if value is not None}
        self.results = [value for node in self.before for value in node.outputs if value is not None and self._leaves(value)]
        self.dtype = self._data_type()
        self.promoted = self.dtype.name == "bfloat16"

    def _data_type(self):
        """Return the type of the data: that of any constant, but the parameters of a BatchNormalization may have another."""
        constants = [
            (is_batch_norm(node), found.dtype)
            for node in self.before
            for found in map(self.index.constant, node.inputs)
            if found is not None and found.dtype.name in UNIT
        ]
        return min(constants, key=lambda entry: entry[0])[1]

    def _leaves(self, value):
        """Say whether anything outside reads a value of the site that both sides have."""
        if value.is_output:
            return True
        return any(node not in self.before and not ignores_elements(node, slot) for node, slot in value.readers)

    def units(self):
        """Return how many times the size of the terms the difference may be."""
        unit = UNIT[self.dtype.name]
        terms = sum(row_of(node, self.view).terms(node, self.view) for node in self.before if node not in self.lifted)
        return 8 * unit + 2 * np.sqrt(terms) * min(unit, UNIT["float32"])

    def run(self, inputs):
        """Return (before, after, size of the terms) as float64 arrays."""
        feeds = {name: self._typed(np.asarray(values)) for name, values in inputs.items()}
        try:
            before = self._run_original(feeds)
            after = _run_nodes(*self._folded(feeds, magnitudes=False), self.index.opset)
            size = _run_nodes(*self._folded(feeds, magnitudes=True), self.index.opset)
        except runtime_errors() as error:
            raise _NotRun(said(error)) from error
        sides = [np.concatenate([part.astype(np.float64).reshape(-1) for part in side]) for side in (before, after, size)]
        if not sides[0].size:
            raise _NotRun("what comes out of the site is empty on every input tried")
        least = max(operator_row(node).least_magnitude for node in self.before)
        sides[2] = np.maximum(sides[2], least)
        return sides

    def _run_original(self, feeds):
        """Run the original nodes, with the nodes that compute their constants where onnxruntime has kernels for them."""
        try:
            return _run_nodes(*self._original(feeds, evaluated=self.promoted), self.index.opset)
        except runtime_errors():
            return _run_nodes(*self._original(feeds, evaluated=True), self.index.opset)

    def _typed(self, values):
        return values.astype(np.float32 if self.promoted else self.dtype) if values.dtype.kind == "f" else values

    def _array(self, array):
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else array

    def _original(self, feeds, evaluated):
        """Return (nodes, feeds, results); constants are fed, and where they are not to be evaluated here, computed by their own nodes."""
        feeds, computing = dict(feeds), {}
        pending = [value for node in self.before for value in node.inputs if self.index.constant(value) is not None]
        for value in pending:
            node = value.producer
            if evaluated or value.initializer is not None or not _is_computed(node, self.index):
                feeds[value.name] = self._array(self.index.constant(value).array())
            elif node not in computing:
                computing[node] = None
                pending.extend(read for read in node.inputs if read is not None)
        nodes = sorted({*computing, *self.before}, key=self.rank.get)
        return [_modern(node.proto, self.index.opset) for node in nodes], feeds, [value.name for value in self.results]

    def _folded(self, feeds, magnitudes):
        """Return the folded segment; with magnitudes, every input and constant is its absolute value and every difference is a sum."""
        feeds = {name: np.asarray(np.abs(values)) if magnitudes and values.dtype.kind == "f" else values for name, values in feeds.items()}
        protos = []
        for node in self.before:
            if node in self.view.removed:
                continue
            node = self.plan.replaced.get(node, node)
            proto = _modern(node.proto, self.index.opset)
            for slot, value in enumerate(node.inputs):
                constant = self.plan.constants.get((node, slot))
                found = self.index.constant(value)
                if constant is not None:
                    proto.input[slot] = f"{node.label}/{slot}"
                    feeds[proto.input[slot]] = self._array(constant.magnitude() if magnitudes else constant.array())
                elif found is not None:
                    array = self._array(found.array())
                    feeds[value.name] = _magnitude(node, slot, array) if magnitudes else array
                elif value is not None:
                    proto.input[slot] = self._name(value)
            for slot in (slot for step, slot in self.plan.constants if step is node and slot >= len(node.inputs)):
                name = f"{node.label}/{slot}"
                constant = self.plan.constants[node, slot]
                edited(proto, {slot: name}, {})
                feeds[name] = self._array(constant.magnitude() if magnitudes else constant.array())
            edited(proto, {}, self.plan.attributes.get(node, {}))
            protos.append(proto)
            if magnitudes:
                protos.extend(operator_row(node).bound(proto))
        return protos, feeds, [self._name(value) for value in self.results]

    def _name(self, value):
        while value.producer in self.view.removed and value.producer in self.before:
            node = value.producer
            value = self.plan.bypassed.get(node) or node.inputs[self.view.data_slot(node)]
        return value.name


def _is_computed(node, index):
    """Say whether onnxruntime can compute a constant from constants: a Shape reads what need not be one."""
    return all(value is None or index.constant(value) is not None for value in node.inputs)


def _magnitude(node, slot, array):
    """Return a constant for the run that bounds."""
    return operator_row(node).magnitude(slot, array) if array.dtype.kind in "fV" else array


def _modern(proto, opset):
    """Return a copy of a NodeProto that onnxruntime has a kernel for: before opset 7 inference was an attribute, now it is the default."""
    copy = onnx.NodeProto()
    copy.CopyFrom(proto)
    if opset < 7:
        kept = [
            attribute
            for attribute in copy.attribute
            if attribute.name not in ("is_test", "consumed_inputs", "spatial", "broadcast", "axis")
        ]
        del copy.attribute[:]
        copy.attribute.extend(kept)
    return copy


def _run_nodes(protos, feeds, results, opset):
    """Run a list of NodeProto in onnxruntime, every constant an input."""
    read = {name for proto in protos for name in proto.input}
    inputs = []
    for name, array in feeds.items():
        if name in read:
            inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), np.shape(array)))
    graph = helper.make_graph(protos, "site", inputs, [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(results)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset if opset >= 7 else 9)], ir_version=8)
    run = session(model.SerializeToString(), threads=1)
    return run.run(results, {name: np.asarray(array) for name, array in feeds.items() if name in read})
