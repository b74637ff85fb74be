"""The present graph: the planner's view of a model in which its plans so far have already happened."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from fastbn.dtypes import DTYPES, dtype_name
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Constant, Dense, Tensor
from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Node, Shape, Value, is_complete
from fastbn.graph.model.quantized import Dequantized
from fastbn.graph.model.schemas import check_version
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.normalization import is_batch_norm
from fastbn.graph.ops.quantization import dequantized, is_quantized
from fastbn.graph.ops.registry import operator_row, row_of, sees_elements
from fastbn.graph.ops.row import Attribute, Strategy
from fastbn.graph.ops.shape_rules import Size, Sizes
from fastbn.graph.planner.guard import Guard
from fastbn.graph.planner.plan import Plan
from fastbn.graph.reasons import Refusal

__all__ = ["GraphView", "refused_reader"]

# A quantized constant of more elements is not stored as floats.
LARGEST_WIDENED = 1 << 10

# The most elements of a shape of the model that is taken as a probe shape as it is.
LARGEST_PROBE_SHAPE = 1 << 16


@dataclass
class _Uses:
    """Who sees the elements of a value: the name of the graph output that it is, or None, and its readers."""

    output: str | None
    readers: dict[tuple[Node, int], None] = field(default_factory=dict)


class GraphView:
    """The graph in which earlier plans have already happened; a row.PresentGraph.

    Attributes
    ----------
    index : model.index.Index
        The model as it was read.
    constants : dict of (node, input slot) -> constant
        What plans have made of constants.
    removed : dict of node -> value
        Nodes that are gone, and the value that stands where their output stood.
    forwarded : set of node
        Removed nodes whose affine went along the data flow.
    replaced : dict of node -> tuple of node
        Nodes in whose place others stand: the Add that keeps a shift, or what a batch normalization is rewritten as.
    owner : dict of node -> Plan
        The plan that first changed a node or let an affine pass it; `owned` follows it to the present one.
    guard : Guard or None
        What plans must not do beside what is wrong.
    """

    def __init__(self, index: Index, guard: Guard | None = None) -> None:
        self.index = index
        self.guard = guard
        self.constants: dict[tuple[Node, int], Constant] = {}
        self.removed: dict[Node, Value] = {}
        self.forwarded: set[Node] = set()
        self.replaced: dict[Node, tuple[Node, ...]] = {}
        self.owner: dict[Node, Plan] = {}
        self._affines: dict[Node, Affine | Refusal | None] = {}
        self._checked: set[Node] = set()
        self._data_slots: dict[Node, int] = {}
        self._refused: dict[Node, tuple[tuple[int, int, bool], Refusal, Refusal]] = {}
        self._shapes: dict[Value, Shape] = {}
        self._sizes: dict[Value, Sizes] = {}
        self._uses: dict[Value, _Uses] = {}
        self._keeps_shifts: bool | None = None
        self._is_open: bool | None = None

    # ---- the model as it was read ----

    @property
    def opset(self) -> int:
        """The version of ONNX's operators."""
        return self.index.opset

    def constant(self, value: Value | None) -> Tensor | None:
        """Return the constant that a value of the original always is, or None."""
        return None if value is None else self.index.constant(value, infer=True)

    def is_overridable(self, value: Value) -> bool:
        """Say whether a caller of the model may override an initializer."""
        return self.index.is_overridable(value)

    def why_no_constant(self, value: Value) -> str:
        """Return why a value is no constant, as the end of a sentence about it."""
        return self.index.why_no_constant(value)

    def kind(self, value: Value) -> int:
        """Return the type of a value as a number of TensorProto, 0 where it is not known."""
        return self.index.kind(value)

    def declared_shape(self, value: Value) -> Shape | None:
        """Return what the file itself says of a shape."""
        return self.index.declared_shape(value)

    def shape(self, value: Value | None) -> Shape | None:
        """Return the shape of a value, None where not even the rank is known."""
        if value is None:
            return None
        if value not in self._shapes:
            shape = self.index.shape(value)
            if shape is None:
                return None
            self._shapes[value] = shape
        return self._shapes[value]

    def sizes(self, value: Value | None) -> Sizes | None:
        """Return the shape of a value with a Dim for each size that only a run tells: two that are equal are the same in every run."""
        if value is None:
            return None
        if value not in self._sizes:
            sizes = self.index.sizes(value)
            if sizes is None:
                return None
            self._sizes[value] = sizes
        return self._sizes[value]

    def elements(self, value: Value | None) -> list[Size] | None:
        """Return the elements of a list of integers as far as they are known, None where not even their number is."""
        return None if value is None else self.index.elements(value)

    def rank(self, value: Value | None) -> int | None:
        """Return the rank of a value, or None."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def probe_shape(self, value: Value) -> tuple[int, ...] | None:
        """Return a shape to verify with: the model's own where it is known and small, otherwise one of the same rank."""
        known = self.index.shape(value)
        if known is None:
            return None
        shape = tuple(size or 2 for size in known)  # none or 0
        if math.prod(shape) > LARGEST_PROBE_SHAPE:
            shape = (*(min(size, 2) for size in shape[:1]), *shape[1:2], *(min(size, 8) for size in shape[2:]))
        return shape

    def is_open(self) -> bool:
        """Say whether a graph input leaves a size open that the caller could give."""
        if self._is_open is None:
            inputs = [value for value in self.index.main.values.values() if value.is_input and value.initializer is None]
            known = self.index.input_shapes
            self._is_open = any(value.name not in known and not is_complete(self.declared_shape(value)) for value in inputs)
        return self._is_open

    def check(self, node: Node) -> None:
        """Raise ModelError where a node that a row reads is not what ONNX demands."""
        if node not in self._checked:
            check_version(node.op, len(node.inputs), len(node.outputs), node.attributes, node.label, self.index.opset)
            self._checked.add(node)

    # ---- affines ----

    def affine(self, node: Node) -> Affine | None:
        """Return the affine that a node is, None where it is none; a batch normalization that must stay gives None too."""
        try:
            return self.lifted(node)
        except Refusal:
            return None

    def lifted(self, node: Node) -> Affine | None:
        """Return the affine that a node is, or None; raises Refusal for a batch normalization that must stay."""
        if node not in self._affines:
            self._affines[node] = self._lift(node)
        affine = self._affines[node]
        if isinstance(affine, Refusal):
            raise affine
        return affine

    def _lift(self, node: Node) -> Affine | Refusal | None:
        row = row_of(node, self)
        if row.lift is None:
            return None
        if not is_batch_norm(node):
            try:
                self.check(node)
            except Refusal:
                return None  # an operator that this opset does not have is no affine
        try:
            return row.lift(node, self)
        except Refusal as refusal:
            return refusal.with_traceback(None)

    def data_slot(self, node: Node) -> int:
        """Return the slot of the data input of a lifted node."""
        slot = self._data_slots.get(node)
        if slot is None:
            slot = self._data_slots[node] = row_of(node, self).data_slot(node, self)
        return slot

    def data(self, node: Node) -> Value:
        """Return the data input of a lifted node."""
        value = node.inputs[self.data_slot(node)]
        assert value is not None, "a lifted node reads its data"
        return value

    # ---- who gives and who reads a value now ----

    def source(self, value: Value) -> Value:
        """Return the value of the present graph that stands where `value` stood: removed nodes are followed to their input."""
        root = value
        while root.producer in self.removed:
            root = self.removed[root.producer]
        while value is not root and value.producer is not None:  # path compression: later calls reach the root in one step
            following = self.removed[value.producer]
            self.removed[value.producer] = root
            value = following
        return root

    def producer(self, value: Value) -> Node | None:
        """Return the node that gives a value in the present graph."""
        return None if value.producer is None else self.present(value.producer)[-1]

    def present(self, node: Node) -> tuple[Node, ...]:
        """Return the nodes that stand in the place of a node now: itself, where nothing has replaced it."""
        return self.replaced.get(node, (node,))

    def readers(self, value: Value) -> list[tuple[Node, int]]:
        """Return (node, slot) of everything in the present graph that sees the elements of a value; Refusal where the caller does."""
        return [(self.present(node)[0], slot) for node, slot in self._readers(value)]

    def other_readers(self, value: Value, askers: Collection[tuple[Node, int]], most: int) -> list[tuple[Node, int]]:
        """Return the first `most` readers of a value besides these (node, slot); Refusal where the caller of the model sees it."""
        present = ((self.present(node)[0], at) for node, at in self._readers(value))
        return list(islice((use for use in present if use not in askers), most))

    def _readers(self, value: Value) -> dict[tuple[Node, int], None]:
        uses = self._uses_of(self.source(value))
        if uses.output is not None:
            raise Refusal("graph-output", f"the value '{uses.output}' on the way is a graph output")
        return uses.readers

    def _uses_of(self, root: Value) -> _Uses:
        """Return who sees a value of the present graph; removal keeps that up to date."""
        if root not in self._uses:
            readers = {(node, slot): None for node, slot in root.readers if sees_elements(node, slot)}
            self._uses[root] = _Uses(root.name if root.is_output else None, readers)
        return self._uses[root]

    def remove(self, node: Node, value: Value) -> None:
        """Take a node out of the present graph: `value` stands where its output stood."""
        root, output = self.source(value), node.outputs[0]
        assert output is not None, "a lifted node gives its output"
        for slot, read in enumerate(node.inputs):
            if read is not None and read.initializer is None:
                self._uses_of(self.source(read)).readers.pop((node, slot), None)
        uses, behind = self._uses_of(root), self._uses_of(output)
        uses.output = uses.output or behind.output
        uses.readers.update(behind.readers)
        self.removed[node] = root

    def refuse_readers(self, value: Value, asker: Node, slot: int) -> None:
        """Refuse when anything but this slot of `asker` sees a value of the present graph."""
        for node, _ in self.other_readers(value, [(asker, slot)], 1):
            raise refused_reader(node, value)

    # ---- plans ----

    def note_refused(self, node: Node, strategy: Strategy, behind: Refusal, ahead: Refusal) -> None:
        """Remember why no absorber takes a node's affine in the present graph as it is now, with this strategy, in both directions."""
        self._refused[node] = (len(self.owner), len(self.removed), strategy != "plain"), behind, ahead

    def refused(self, node: Node) -> tuple[Refusal, Refusal]:
        """Return what note_refused has noted of a node last."""
        return self._refused[node][1:]

    def is_refused(self, node: Node, strategy: Strategy) -> bool:
        """Say whether this search has been refused already and nothing has changed since."""
        return node in self._refused and self._refused[node][0] == (len(self.owner), len(self.removed), strategy != "plain")

    def apply(self, plan: Plan) -> None:
        """Make what a plan changes part of the present graph."""
        self.constants.update(plan.constants)
        self._shapes.update(plan.widened)
        for node, _ in plan.constants:
            self._affines.pop(node, None)

    def owned(self, node: Node) -> Plan | None:
        """Return the plan that changes a node or lets an affine through it, or None."""
        plan = self.owner.get(node)
        while plan is not None and plan.joined is not None:
            plan = plan.joined
        return plan

    def planned_attributes(self, node: Node) -> Mapping[str, Attribute]:
        """Return the attributes of a node that plans set."""
        return self.owner[node].attributes.get(node, {}) if node in self.owner else {}

    # ---- constants as plans have left them ----

    def has(self, node: Node, slot: int) -> bool:
        """Say whether a node has an input at a slot, or a plan has given it one."""
        return node.input(slot) is not None or (node, slot) in self.constants

    def is_changed(self, node: Node, slot: int) -> bool:
        """Say whether a plan has changed or made the constant at a slot."""
        return (node, slot) in self.constants

    def tensor(self, node: Node, slot: int) -> Constant | None:
        """Return the constant at a slot: what a plan has made of it, or the model's, or None."""
        return self.constants.get((node, slot)) or self.constant(node.input(slot))

    def weight(self, node: Node, slot: int) -> Constant:
        """Return the constant weight at a slot; raises Refusal where it is none."""
        value = node.input(slot)
        name = "" if value is None else value.name
        constant = self.constants.get((node, slot)) or dequantized(node, slot, self)
        if constant is None:
            constant = self.constant(value)
            if constant is not None and is_quantized(value):
                raise Refusal("quantised", f"the quantized weight '{name}' of {node.op} '{node.label}' has no step that takes a scale")
        if constant is not None:
            if dtype_name(constant.dtype) not in DTYPES:
                raise Refusal("unsupported-type", f"the weight '{name}' of {node.op} '{node.label}' is {constant.dtype}")
            return constant
        if value is None:
            raise ModelError(expected("a weight", "none", node.label))
        if self.index.is_overridable(value):
            sentence = (
                f"the weight '{name}' of {node.op} '{node.label}' is also a graph input, which a caller may override: "
                "--freeze-inputs makes it a constant"
            )
            raise Refusal("overridable-weight", sentence)
        raise Refusal("dynamic-weight", f"the weight '{name}' of {node.op} '{node.label}' {self.why_no_constant(value)}")

    def dense(self, node: Node, slot: int) -> Dense:
        """Return the constant at a slot in float64."""
        constant = self.tensor(node, slot)
        if constant is None or dtype_name(constant.dtype) not in DTYPES:
            return Dense.of(self.weight(node, slot))  # which refuses it
        self.refuse_widening(node, slot, constant)
        return Dense.of(constant)

    def refuse_widening(self, node: Node, slot: int, constant: Constant) -> None:
        """Refuse to store the constant at a slot as floats where it is quantized and large."""
        value = node.input(slot)
        if value is not None and math.prod(constant.shape) > LARGEST_WIDENED and not self.is_changed(node, slot) and is_quantized(value):
            raise Refusal("quantised", f"the quantized constant '{value.name}' of {node.op} '{node.label}' would be stored as floats")

    def bias(self, node: Node, slot: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Dense | Dequantized:
        """Return the bias at a slot, which must have this shape, in float64; zeros where it is absent.

        Where a DequantizeLinear gives it, it comes as it is: it must stay quantized.
        """
        if not self.has(node, slot):
            return Dense.zeros(shape, dtype)
        value = node.input(slot)
        quantized = None if self.is_changed(node, slot) else dequantized(node, slot, self)
        if quantized is None and value is not None and not self.is_changed(node, slot) and is_quantized(value):
            raise Refusal("quantised", f"the quantized bias '{value.name}' of {node.op} '{node.label}' has no step that takes a scale")
        bias = quantized or self.dense(node, slot)
        if bias.shape != shape:
            raise ModelError(expected(f"a bias of shape {shape}", f"shape {bias.shape}", node.label))
        return bias

    def keeps_shifts(self) -> bool:
        """Say whether a node of the model takes a scale and has no place for a shift, which may then stay behind in an Add."""
        if self._keeps_shifts is None:
            self._keeps_shifts = (self.guard is None or self.guard.may_keep_shifts) and any(
                operator_row(node).has_no_place_for_shift or self._is_product_with_one(node) for node in self.index.order
            )
        return self._keeps_shifts

    def _is_product_with_one(self, node: Node) -> bool:
        """Say whether a node multiplies by one number that is no constant."""
        if not node.is_op("Mul") and not node.is_op("Div"):
            return False
        operands = [value for value in node.inputs if value is not None and self.constant(value) is None]
        return len(operands) == 2 and any((shape := self.shape(value)) is not None and set(shape) <= {1} for value in operands)


def refused_reader(node: Node, value: Value) -> Refusal:
    """Return the Refusal of a value that this node sees too."""
    return Refusal("other-readers", f"{node.op} '{node.label}' reads the value '{value.name}' before it too")
