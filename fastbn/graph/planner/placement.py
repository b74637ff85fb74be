"""Where the affine of one node goes: backward first, then forward, last with the shift left in an Add."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastbn.dtypes import DTYPES, dtype_name
from fastbn.graph.model.constant import Dense, DType, Tensor
from fastbn.graph.model.node import Node
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.normalization import is_batch_norm
from fastbn.graph.ops.placing import axis_in
from fastbn.graph.ops.registry import row_of
from fastbn.graph.ops.row import Origin, Strategy
from fastbn.graph.planner.meeting import Meeting
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.record import Record
from fastbn.graph.planner.search import FORKED, Search
from fastbn.graph.planner.substitute import kept_shift
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import CURABLE, FORWARDS, ReasonCode, Refusal

__all__ = ["Placement", "changes_sizes", "composed", "place", "place_constant"]

# Reasons that only say "nothing there": they give way to one that names a condition.
VAGUE: tuple[ReasonCode, ...] = ("reads-input", "reads-constant", "no-absorber", "unused")


@dataclass(frozen=True)
class Placement:
    """What changes for one affine, whether it went along the data flow, and the Add that keeps its shift with its constant, if any."""

    plan: Plan
    forward: bool = False
    kept_shift: tuple[Node, Dense] | None = None


def composed(chain: Sequence[Node], view: GraphView) -> Affine | None:
    """Return the one affine that nodes are, each of which reads the one before; None where they are none along one axis."""
    affines = [view.affine(node) for node in chain]
    rank = view.rank(view.data(chain[0]))
    if rank is None or any(node in view.removed or affine is None for node, affine in zip(chain, affines, strict=True)):
        return None
    parts = [affine for affine in affines if affine is not None]
    axes = {axis_in(chain[0], part, rank) for part in parts if part.channels > 1}
    channels = {part.channels for part in parts if part.channels > 1}
    if len(axes) > 1 or len(channels) > 1:
        return None
    count = max(channels, default=1)
    scale, shift, abs_terms = np.ones(count), np.zeros(count), np.zeros(count)
    for part in parts:
        factor, added, size = part.along(count)
        scale, shift, abs_terms = scale * factor, shift * factor + added, abs_terms * np.abs(factor) + size
    return Affine(scale, shift, next(iter(axes), None), 0, abs_terms)


def place(
    node: Node, affine: Affine, view: GraphView, strategy: Strategy, record: Record | None = None, last: Node | None = None
) -> Placement:
    """Return where the affine of a lifted node, or of those from it to `last`, goes; raises Refusal where there is no place."""
    origin = Origin(node, view.source(view.data(node)))
    if strategy == "split" and view.is_refused(node, strategy):
        return _split(origin, affine, view, record, *view.refused(node))
    try:
        return Placement(_backward(origin, affine, view, strategy, record))
    except Refusal as refusal:
        behind = refusal.with_traceback(None)
    try:
        plan = Search(view, origin, strategy, record).forward((last or node).outputs[0], affine)
        _refuse_unknown_width(node, affine, view, plan)
        _refuse_other_sizes(node, view)
        return Placement(plan, forward=True)
    except Refusal as refusal:
        ahead = refusal.with_traceback(None)
    view.note_refused(node, strategy, behind, ahead)
    if strategy == "split":
        return _split(origin, affine, view, record, behind, ahead)
    raise _both(behind, ahead, view)


def _backward(origin: Origin, affine: Affine, view: GraphView, strategy: Strategy, record: Record | None) -> Plan:
    """Return a plan against the data flow, by ways that meet again where no other is left; Refusal where there is none."""
    asked = origin.value, affine, origin.node, view.data_slot(origin.node)
    search = Search(view, origin, strategy, record)
    try:
        return search.backward(*asked)
    except Refusal as refusal:
        if strategy == "plain" or not search.has_forked:
            raise
        refused = refusal.with_traceback(None)
    try:
        return Meeting(view, origin, strategy, record).meet(*asked)
    except Refusal as refusal:
        if refusal.code == "too-far" or refused.code not in FORKED:
            raise refused from None
        raise


def _both(behind: Refusal, ahead: Refusal, view: GraphView) -> Refusal:
    """Return the refusal that has the reasons of both directions, and the code of the one that says more."""
    code = behind.code if _weight(behind.code, view) <= _weight(ahead.code, view) else ahead.code
    return Refusal(code, f"backwards: {behind.sentence}{FORWARDS}{ahead.sentence}")


def place_constant(node: Node, constant: Tensor, view: GraphView) -> Placement:
    """Return a placement that puts what a batch normalization of a constant gives in its place; Refusal where that is not possible.

    A weight that is standardized in the graph is one: it is the batch normalization in training, but of the same batch in each run.
    """
    if any(value is not None and (value.readers or value.is_output) for value in node.outputs[1:]):
        raise Refusal("training", "it hands out statistics of a constant")
    readers = view.readers(node.required_output())
    if any(reader.scopes for reader, _ in readers) or not readers:
        raise Refusal("reads-constant", "it reads a constant, and nothing that takes the result")
    return Placement(Plan(constants=dict.fromkeys(readers, constant), path={reader: None for reader, _ in readers}))


def _weight(code: ReasonCode, view: GraphView) -> int:
    """Return how little a code says: 0 where an option of the user may change it, 3 where there only is nothing."""
    if code == "axis-unknown" and not view.is_open():  # a size that no option tells
        return 2
    return 0 if code in CURABLE else 3 if code in VAGUE else 1


def _refuse_unknown_width(node: Node, affine: Affine, view: GraphView, plan: Plan) -> None:
    """Refuse to take a node out before its readers where its data may be narrower than what they read, unless they widen it themselves."""
    value = view.data(node)
    data = view.shape(view.source(value))  # a node before it that is removed now may have widened it
    is_narrow = data is None or len(data) < affine.rank or (affine.axis is not None and data[affine.axis] != affine.channels)
    if is_batch_norm(node) or affine.rank == 0 or not is_narrow or node.outputs[0] is None:
        return
    for reader, slot in view.readers(node.outputs[0]):
        row = row_of(reader, view)
        constant = (plan.constants.get((reader, 1 - slot)) or view.tensor(reader, 1 - slot)) if row.lift and row.broadcasts else None
        shape = () if constant is None else constant.shape
        if len(shape) < affine.rank or (affine.axis is not None and shape[affine.axis] != affine.channels):
            raise Refusal("axis-unknown", f"the shape of '{value.name}' is not known, which its constant may widen")


def changes_sizes(node: Node, view: GraphView) -> bool:
    """Say whether a node is known to give another shape than its data has."""
    data, out = view.shape(view.data(node)), view.shape(node.outputs[0])
    if data is None or out is None:
        return False
    return len(data) != len(out) or any(None not in sizes and sizes[0] != sizes[1] for sizes in zip(data, out, strict=True))


def _refuse_other_sizes(node: Node, view: GraphView) -> None:
    """Refuse to take a batch normalization out before its readers where the model declares that it gives another shape than its data has:
    onnxruntime goes on with what is declared, and without the node the readers would meet the shape of the data."""
    if is_batch_norm(node) and changes_sizes(node, view):
        raise Refusal("axis", f"it is declared to give another shape than that of '{view.data(node).name}'")


def _split(origin: Origin, affine: Affine, view: GraphView, record: Record | None, behind: Refusal, ahead: Refusal) -> Placement:
    """Return a placement that leaves the shift in an Add; Refusal where there is none.

    Where only the shift was in the way, of what is behind or ahead, the refusal names what is in the way of the scale.
    """
    refused = [behind, ahead]
    for at, way in enumerate((_keep_shift_backward, _keep_shift_forward) if view.keeps_shifts() else ()):
        try:
            return way(origin, affine, view, record)
        except Refusal as refusal:
            if refused[at].code == "shift-cannot-pass" and refusal.code not in (*VAGUE, "shift-cannot-pass"):
                refused[at] = refusal.with_traceback(None)
    raise _both(refused[0], refused[1], view)


def _keep_shift_backward(origin: Origin, affine: Affine, view: GraphView, record: Record | None) -> Placement:
    """S x + T where x = MatMul(a, W) or x = a (b c), b one number: the scale goes into W or c, an Add of T stays in the place of the BN."""
    node = origin.node
    plan = _backward(origin, affine.scale_only(), view, "split", record)
    if not plan.widened and not any(row_of(step, view).has_no_place_for_shift for step in plan.path):
        raise Refusal("shift-cannot-pass", "no MatMul asks for it")
    return Placement(plan, False, kept_shift(node, affine, view, _weight_type(plan)))


def _keep_shift_forward(origin: Origin, affine: Affine, view: GraphView, record: Record | None) -> Placement:
    """MatMul(S x + T, W) = MatMul(x + T/S, S W): the scale goes into W, an Add of T/S stays."""
    if (affine.scale == 0).any():
        raise Refusal("shift-cannot-pass", "a scale of zero loses the shift")
    plan = Search(view, origin, "split", record).forward(origin.node.outputs[0], affine.scale_only())
    before_scale = Affine(affine.scale, affine.shift / affine.scale, affine.axis, affine.rank, affine.abs_terms / np.abs(affine.scale))
    if not all(row_of(absorber, view).has_no_place_for_shift for absorber in plan.absorbers):
        raise Refusal("shift-cannot-pass", "more than the missing bias of a MatMul asks for it")
    return Placement(plan, True, kept_shift(origin.node, before_scale, view, _weight_type(plan)))


def _weight_type(plan: Plan) -> DType:
    """Return the type of the weights that a plan changes."""
    return next(constant.dtype for constant in plan.constants.values() if dtype_name(constant.dtype) in DTYPES)
