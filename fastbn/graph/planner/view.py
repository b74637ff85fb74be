"""The present graph: the planner's view of a model in which its plans so far have already happened, and what a plan is."""

import math
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from fastbn.dtypes import DTYPES, dtype_name
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Dense, Dequantised
from fastbn.graph.model.schemas import check_version
from fastbn.graph.ops.lift import ELEMENTWISE, constant_slot, is_batch_norm, lift
from fastbn.graph.ops.row import Taken
from fastbn.graph.ops.weights import conv_weight
from fastbn.graph.reasons import Refusal

__all__ = ["EFFORTS", "SHAPE_READERS", "GraphView", "Plan"]


# Operators that read the shape of a value and nothing else: an affine before them changes nothing.
SHAPE_READERS = ("Shape", "Size")

# No operator of the tables has a constant behind this many inputs: BatchNormalization has five.
MOST_SLOTS = 5

# A value is given at most this many elements in a fold's verification where the model says its shape.
LARGEST_SAMPLE = 1 << 16

# Conv, ConvTranspose and Gemm read their weight here; DequantizeLinear has a scale per step of an axis from this opset on.
WEIGHT_SLOT, FIRST_PER_AXIS_OPSET = 1, 13

# How far the planner goes, each only where the one before leaves nothing to do, the later ones for a batch normalization alone: move it;
# change a value that others read too, they undoing it; leave the shift behind in an Add.
EFFORTS = ("plain", "rearrange", "split")


@dataclass(eq=False)
class Plan:
    """One home and everything that moves into it.

    constants: (node, slot) -> Scaled or Dense; attributes: node -> dict of attributes to set; lifted: the nodes whose affines were taken,
    in order; dissolved: node that leaves with them -> the operand that takes its place; replaced: lifted node -> the Add that stays in
    its place; path: the nodes that absorb or carry, in the order of travel; homes: those that absorb; through: removed
    nodes in whose place an affine passed (these are dicts without values, so that a long plan is asked and joined quickly); number: its
    age; joined: the plan that has taken it over.
    """

    constants: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    lifted: list = field(default_factory=list)
    dissolved: dict = field(default_factory=dict)
    replaced: dict = field(default_factory=dict)
    path: dict = field(default_factory=dict)
    homes: dict = field(default_factory=dict)
    through: dict = field(default_factory=dict)
    channels: int = 0
    number: int = 0
    joined: "Plan" = None

    def join(self, other):
        """Take over what another plan holds."""
        for name in ("constants", "attributes", "dissolved", "replaced", "path", "homes", "through"):
            getattr(self, name).update(getattr(other, name))
        self.lifted.extend(other.lifted)
        self.channels = max(self.channels, other.channels)

    def forget(self, node):
        """Leave out what was to change of a node that is removed now."""
        for slot in range(MOST_SLOTS):
            self.constants.pop((node, slot), None)
        for entries in (self.attributes, self.path, self.homes):
            entries.pop(node, None)


class GraphView:
    """The planner's view of the graph, in which earlier plans have already happened. Rows of both tables ask it."""

    def __init__(self, index):
        self.index = index
        self.constants = {}
        self.removed = {}
        self.forwarded = set()
        self.replaced = {}
        self.owner = {}
        self.lifting = None
        self.asked = None
        self.has_matmul = any(node.is_op("MatMul") for node in index.order)
        self.effort = EFFORTS[0]
        self._affines = {}
        self._checked = set()
        self._refused = {}
        self._shapes = {}
        self._views = {}

    def check(self, node):
        """Raise ModelError where a node that a row reads is not what ONNX demands."""
        if node not in self._checked:
            check_version(node.proto, node.label, self.index.opset)
            self._checked.add(node)

    def affine(self, node):
        """Return the Affine of a node or None; a BatchNormalization that must stay gives None too."""
        try:
            return self.lifted(node)
        except Refusal:
            return None

    def lifted(self, node):
        """Return lift(node), remembered; raises Refusal as it does."""
        if node not in self._affines:
            self._affines[node] = self._lift(node)
        found = self._affines[node]
        if isinstance(found, Refusal):
            raise found
        return found

    def _lift(self, node):
        if node.is_op(*ELEMENTWISE):
            try:
                self.check(node)
            except Refusal:
                return None  # what this opset does not know is no affine
        try:
            return lift(node, self)
        except Refusal as refusal:
            return refusal.with_traceback(None)

    def data_slot(self, node):
        """Return the slot of the data input of a lifted node."""
        return 0 if is_batch_norm(node) else 1 - constant_slot(node, self.index)

    def source(self, value):
        """Return the value of the present graph that stands where `value` stood: removed nodes are followed to their input."""
        root = value
        while root.producer in self.removed:
            root = self.removed[root.producer]
        while value is not root:  # the next one who asks goes there in one step
            following = self.removed[value.producer]
            self.removed[value.producer] = root
            value = following
        return root

    def producer(self, value):
        """Return the node that gives a value in the present graph."""
        return self.replaced.get(value.producer, value.producer)

    def readers(self, value):
        """Return (node, slot) of everything in the present graph that sees the elements of a value; Refusal where the caller does."""
        output, uses = self._view(self.source(value))
        if output is not None:
            raise Refusal("graph-output", f"the value '{output}' on the way is a graph output")
        return [(self.replaced.get(node, node), slot) for node, slot in uses]

    def other_readers(self, value, asker, slot, most):
        """Return the first `most` readers of a value besides this slot of `asker`; Refusal where the caller of the model sees it."""
        output, uses = self._view(self.source(value))
        if output is not None:
            raise Refusal("graph-output", f"the value '{output}' on the way is a graph output")
        present = ((self.replaced.get(node, node), at) for node, at in uses)
        return list(islice((use for use in present if use != (asker, slot)), most))

    def _view(self, root):
        """Return [name of the graph output that a value is, or None; its readers as the keys of a dict]; removal keeps it up to date."""
        if root not in self._views:
            uses = {(node, slot): None for node, slot in root.readers if not node.is_op(*SHAPE_READERS)}
            self._views[root] = [root.name if root.is_output else None, uses]
        return self._views[root]

    def remove(self, node, value):
        """Take a node out of the present graph: `value` stands where its output stood."""
        root = self.source(value)
        for slot, read in enumerate(node.inputs):
            if read is not None and read.initializer is None:
                self._view(self.source(read))[1].pop((node, slot), None)
        output, uses = self._view(node.outputs[0])
        view = self._view(root)
        view[0] = view[0] or output
        view[1].update(uses)
        self.removed[node] = root

    def refuse_readers(self, value, asker, slot):
        """Refuse when anything but this slot of `asker` sees a value of the present graph."""
        for node, _ in self.other_readers(value, asker, slot, 1):
            raise Refusal("other-readers", f"{node.op} '{node.label}' reads the value '{value.name}' before it too")

    def may_rearrange(self):
        """Say whether other readers may be asked to undo a change in their constants."""
        return self.effort != "plain"

    def note_refused(self, node):
        """Remember that there is no home for a node's affine in the present graph as it is now, at the present effort."""
        self._refused[node] = len(self.owner), len(self.removed), self.may_rearrange()

    def is_refused(self, node):
        """Say whether a search for the whole affine would find what it found before: nothing has changed since."""
        return self._refused.get(node) == (len(self.owner), len(self.removed), self.may_rearrange())

    def apply(self, plan):
        """Make what a plan changes part of the present graph."""
        self.constants.update(plan.constants)
        for node, _ in plan.constants:
            self._affines.pop(node, None)

    def owned(self, node):
        """Return the plan that changes a node or lets an affine through it, or None."""
        plan = self.owner.get(node)
        while plan is not None and plan.joined is not None:
            plan = plan.joined
        return plan

    def tensor(self, node, slot):
        """Return the constant at a slot: what a plan has made of it, or the model's, or None."""
        return self.constants.get((node, slot)) or self.index.constant(node.input(slot))

    def has(self, node, slot):
        """Say whether a node has an input at a slot, or a plan has given it one."""
        return node.input(slot) is not None or (node, slot) in self.constants

    def weight(self, node, slot):
        """Return the constant weight at a slot; raises Refusal where it is none."""
        found = self.tensor(node, slot) or self._dequantised(node, slot)
        if found is None:
            value = node.input(slot)
            if value is None:
                raise ModelError(expected("a weight", "none", node.label))
            if self.index.is_overridable(value):
                sentence = (
                    f"the weight '{value.name}' of {node.op} '{node.label}' is also a graph input, which a caller may override: "
                    "--freeze-inputs makes it a constant"
                )
                raise Refusal("overridable-weight", sentence)
            fate = "is too large to be evaluated here" if self.index.is_too_large(value) else "is computed when the model runs"
            raise Refusal("dynamic-weight", f"the weight '{value.name}' of {node.op} '{node.label}' {fate}")
        if dtype_name(found.dtype) not in DTYPES:
            raise Refusal("unsupported-type", f"the weight '{node.input(slot).name}' of {node.op} '{node.label}' is {found.dtype}")
        return found

    def _dequantised(self, node, slot):
        """Return the Dequantised weight at a slot, None where there is no DequantizeLinear of constants behind it."""
        value = node.input(slot)
        source = None if value is None else value.producer
        if source is None or not source.is_op("DequantizeLinear") or slot != WEIGHT_SLOT or self.index.opset < FIRST_PER_AXIS_OPSET:
            return None
        self.check(source)
        quantised, scale = self.tensor(source, 0), self.tensor(source, 1)
        zero_point = self.tensor(source, 2)
        known = quantised is not None and scale is not None and (zero_point is not None or source.input(2) is None)
        plain = known and quantised.shape and not source.attribute("block_size", 0) and dtype_name(scale.dtype) in DTYPES
        if not plain or source.scope is not node.scope:
            return None
        self.refuse_readers(value, node, slot)
        changed = self.owner[source].attributes.get(source, {}) if source in self.owner else {}
        axis = changed.get("axis", source.attribute("axis", 1)) % len(quantised.shape)
        per_axis = math.prod(scale.shape) > 1
        steps = (quantised.shape[axis],) if per_axis else scale.shape
        if scale.shape != steps or (zero_point is not None and zero_point.shape != steps):
            raise ModelError(expected(f"scales and zero points of shape {steps}", f"shape {scale.shape}", source.label))
        step = Dense.of(scale)
        flat = Dense(step.dtype, step.values.reshape(-1), step.spread.reshape(-1))

        def read():
            along = [-1 if at == axis and per_axis else 1 for at in range(len(quantised.shape))]
            zero = 0 if zero_point is None else zero_point.array().reshape(along if zero_point.size > 1 else -1).astype(np.float64)
            return ((quantised.array().astype(np.float64) - zero) * flat.values.reshape(along)).astype(scale.dtype)

        return Dequantised(scale.dtype, quantised.shape, read, source, axis if per_axis else None, flat, zero_point)

    def dense(self, node, slot):
        """Return the constant at a slot in float64."""
        return Dense.of(self.weight(node, slot))

    def bias(self, node, slot, shape, dtype):
        """Return the bias at a slot in float64, which must have this shape; zeros where it is absent."""
        if not self.has(node, slot):
            return Dense.zeros(shape, dtype)
        value = node.input(slot)
        if self.tensor(node, slot) is None and value.producer is not None and value.producer.is_op("DequantizeLinear"):
            raise Refusal("quantised", f"the bias '{value.name}' of {node.op} '{node.label}' is quantised: no scale of it holds the shift")
        found = self.dense(node, slot)
        if found.shape != shape:
            raise ModelError(expected(f"a bias of shape {shape}", f"shape {found.shape}", node.label))
        return found

    def shape(self, value):
        """Return the shape of a value, None where unknown."""
        if value not in self._shapes:
            found = self.index.shape(value)
            if found is None:
                return None
            self._shapes[value] = found
        return self._shapes[value]

    def rank(self, value):
        """Return the rank of a value, or None."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def small_shape(self, value):
        """Return a shape to verify with: the model's own where it is known and small, otherwise one of the same rank."""
        shape = self.index.shape(value)
        if shape is None:
            return None
        shape = tuple(2 if size is None else size for size in shape)
        if math.prod(shape) > LARGEST_SAMPLE:
            shape = (*(min(size, 2) for size in shape[:1]), *shape[1:2], *(min(size, 8) for size in shape[2:]))
        return shape

    def into_sibling(self, node, slot, affine):
        """Return what makes an affine part of a convolution of the same value that it is added to, or None where there is none.

        S x + T is a 1x1 depthwise convolution: its kernel is added to the tap of the sibling that sees the element itself.
        """
        before, value = self.lifting
        if node.op == "Sub" or len(node.inputs) != 2 or node.inputs[slot].producer is not before:
            return None
        others = [(node.inputs[1 - slot], node, 1 - slot, [])]
        while others:
            other, reader, at, via = others.pop()
            sibling = self.producer(self.source(other))
            if sibling is None or sibling.scope is not node.scope:
                continue
            if sibling.is_op("Add", "Conv"):
                self.check(sibling)
            self.refuse_readers(other, reader, at)
            if sibling.is_op("Add") and constant_slot(sibling, self.index) is None:
                others.extend((operand, sibling, at, [*via, sibling]) for at, operand in enumerate(sibling.inputs))
            elif sibling.is_op("Conv") and self.source(sibling.inputs[0]) is value:
                found = self._centred(sibling, affine)
                if found is not None:
                    return Taken(elsewhere=found, via=via, dissolves=1 - slot)
        return None

    def _centred(self, conv, affine):
        weight, groups = conv_weight(conv, self)
        channels = weight.shape[0]
        count = len(weight.shape) - 2
        pads, dilations = conv.attribute("pads", [0] * 2 * count), conv.attribute("dilations", [1] * count)
        plain = conv.attribute("auto_pad", b"NOTSET") == b"NOTSET" and all(step == 1 for step in conv.attribute("strides", []))
        same = all(pads[i] + pads[i + count] == dilations[i] * (size - 1) for i, size in enumerate(weight.shape[2:]))
        if not plain or not same or any(pads[i] % dilations[i] for i in range(count)) or weight.shape[1] * groups != channels:
            return None
        if affine.axis is not None and (affine.axis % len(weight.shape) != 1 or affine.channels != channels):
            return None
        scale, shift, spread = affine.along(channels)
        tap = tuple(pads[i] // dilations[i] for i in range(count))
        dense = Dense.of(weight)
        values, sizes = dense.values.copy(), dense.spread.copy()
        at = (np.arange(channels), np.arange(channels) % weight.shape[1], *tap)
        values[at] += scale
        sizes[at] += np.abs(scale)
        bias = self.bias(conv, 2, (channels,), weight.dtype).affine(1.0, shift, spread)
        return {(conv, 1): Dense(weight.dtype, values, sizes), (conv, 2): bias}
