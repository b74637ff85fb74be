"""The planner: every BatchNormalization becomes part of a Plan or a Kept. It reads the model and writes nothing.

The affine of a node is lifted out and travels against the data flow or along it: each node on the way takes it into its constants
(absorb.ABSORBERS) or lets it pass (carry.CARRIERS), and nobody else may see a changed value who cannot undo the change (search.py). A plan
is all or nothing. Nodes are taken in the order of the data flow, and a node whose affine went into a plan is from then on as good as
removed, so that a chain (Conv, BN, Mul, Add) folds link by link while its constants stay exact: they are rounded once, when they are
written.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx

from fastbn.graph.model.constant import Dense, Scaled, float64_of
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.lift import BATCH_NORM, ELEMENTWISE, is_batch_norm
from fastbn.graph.planner.search import Search, row_of
from fastbn.graph.planner.underflow import lost_channels
from fastbn.graph.planner.view import EFFORTS, GraphView, Plan
from fastbn.graph.reasons import FORWARDS, Refusal, first_few
from fastbn.graph.results import Kept

__all__ = ["Planning", "plan"]

# The operators whose sums end with a bias, and where they read it.
BIASED, BIAS_SLOT = ("Conv", "ConvTranspose", "Gemm"), 2


@dataclass
class Planning:
    """What the planner decided: plans, kept nodes, and the view of the graph after all plans."""

    plans: list
    kept: list
    view: GraphView


def plan(index, only=None, skip=None, excluded=None):
    """Plan every fold of a model.

    Parameters
    ----------
    index : model.Index
    only, skip : sequence of str, optional
        Globs over node names: fold only these, never those.
    excluded : dict of (scope number, position) -> str
        Nodes whose folds verification has found wrong, and the sentence to report.

    Returns
    -------
    Planning
    """
    view = GraphView(index)
    plans, reasons, effort = {}, {}, 0
    candidates = waiting = _by_level(index)
    while effort < len(EFFORTS):
        view.effort = EFFORTS[effort]
        refused, placed = {}, set()
        for node in waiting if effort == 0 else [node for node in candidates if node in reasons and is_batch_norm(node)]:
            try:
                affine = view.lifted(node)
                if affine is None:
                    continue
                _refuse_unselected(node, only, skip, excluded or {})
                _place(node, affine, view, plans)
                placed.add(node)
            except Refusal as refusal:
                refused[node] = refusal.with_traceback(None)  # which would keep everything that the search looked at
        if effort == 0:
            reasons = refused
        # What stood in the way of one affine may have gone with another; against the order, what frees a whole chain does so at once.
        waiting = [node for node in reasons if node not in placed][::-1]
        effort = 0 if placed else effort + 1
    view.removed = {node: view.source(node.outputs[0]) for node in index.order if node in view.removed}
    place = {node: number for number, node in enumerate(index.order)}
    found = sorted(plans, key=lambda each: min(place[node] for node in each.lifted))
    return Planning(found, _kept(index, view, reasons), view)


def _by_level(index):
    """Return the nodes that may be lifted by their distance from the inputs, then by name: the order of the file must not matter."""
    level, candidates = {}, []
    for node in index.order:
        producers = (value.producer for value in node.inputs if value is not None and value.producer is not None)
        level[node] = 1 + max((level.get(producer, 0) for producer in producers), default=0)
        if is_batch_norm(node) or node.is_op(*ELEMENTWISE):
            candidates.append(node)
    return sorted(candidates, key=lambda node: (node.scope.number, level[node], node.label))


def _refuse_unselected(node, only, skip, excluded):
    if (node.scope.number, node.position) in excluded:
        raise Refusal("parity", excluded[node.scope.number, node.position])
    if only and not any(fnmatchcase(node.label, glob) for glob in only):
        raise Refusal("not-selected", "--only does not name it")
    if skip and any(fnmatchcase(node.label, glob) for glob in skip):
        raise Refusal("not-selected", "--skip names it")


def _place(node, affine, view, plans):
    """Find a home for a node's affine and record the plan in `view` and `plans`; raises Refusal where there is none."""
    _refuse_widening(node, affine, view)
    value = view.source(node.inputs[view.data_slot(node)])
    view.lifting = node, value
    found, forward, stays = _find_home(node, value, affine, view)
    _refuse_bad_constants(found, view)
    if not found.homes:  # constants that a carrier on the way moves
        found.homes = dict.fromkeys(reader for reader, _ in found.constants)
    leaving = [node, *found.dissolved]
    before = node.inputs[view.data_slot(node)].producer
    owners = dict.fromkeys(filter(None, map(view.owned, (*found.path, *found.through, *leaving, *({before} & view.removed.keys())))))
    target = min(owners, key=lambda plan: plan.number, default=None) or Plan(number=len(view.owner))
    plans[target] = None
    for other in owners:
        if other is not target:
            del plans[other]
            target.join(other)
            other.joined = target
    for gone in leaving:
        target.forget(gone)
    found.lifted.append(node)
    found.channels = affine.channels
    if stays is None:
        view.remove(node, value)
        if forward:
            view.forwarded.add(node)
    else:
        add, constant = stays
        found.replaced[node] = add
        found.constants[add, 1] = constant
        view.replaced[node] = add
    for gone, kept in found.dissolved.items():
        view.remove(gone, kept)
    target.join(found)
    view.apply(found)
    view.owner.update(dict.fromkeys([*found.path, *found.replaced.values(), *leaving], target))


def _refuse_widening(node, affine, view):
    """Refuse a node whose constant widens its data: without it, what stands before and behind would meet another shape."""
    data, out = view.shape(node.inputs[view.data_slot(node)]), view.shape(node.outputs[0])
    if is_batch_norm(node) or data is None or out is None:
        return
    if len(data) != len(out) or any(None not in sizes and sizes[0] != sizes[1] for sizes in zip(data, out, strict=True)):
        raise Refusal("axis", f"its constant widens the value '{node.inputs[view.data_slot(node)].name}'")


def _refuse_unknown_width(node, affine, view, found):
    """Refuse to take a node out before its readers where its data may be narrower than what they read, unless they widen it themselves."""
    value = node.inputs[view.data_slot(node)]
    data = view.shape(value)
    narrow = data is None or len(data) < affine.rank or (affine.axis is not None and data[affine.axis] != affine.channels)
    if is_batch_norm(node) or affine.rank == 0 or not narrow:
        return
    for reader, slot in view.readers(node.outputs[0]):
        constant = (found.constants.get((reader, 1 - slot)) or view.tensor(reader, 1 - slot)) if reader.is_op(*ELEMENTWISE) else None
        shape = () if constant is None else constant.shape
        if len(shape) < affine.rank or (affine.axis is not None and shape[affine.axis] != affine.channels):
            raise Refusal("axis-unknown", f"the shape of '{value.name}' is not known, which its constant may widen")


def _find_home(node, value, affine, view):
    """Return (what changes, whether forward, what stays): backward first, then forward, last with the shift left in an Add."""
    if view.effort == "split" and view.is_refused(node):
        return _find_split(node, value, affine, view, Refusal("no-absorber", "nothing has changed since it was refused"))
    try:
        return Search(view).backward(value, affine, node, view.data_slot(node)), False, None
    except Refusal as refusal:
        behind = refusal.with_traceback(None)
    try:
        found = Search(view).forward(node.outputs[0], affine)
        _refuse_unknown_width(node, affine, view, found)
        return found, True, None
    except Refusal as refusal:
        ahead = refusal.with_traceback(None)
    view.note_refused(node)
    # A reason that only says "nothing there" gives way to one that names a condition.
    vague = ("reads-input", "reads-constant", "no-absorber", "unused")
    code = ahead.code if behind.code in vague and ahead.code not in vague else behind.code
    refusal = Refusal(code, f"backwards: {behind.sentence}{FORWARDS}{ahead.sentence}")
    if view.effort == "split":
        return _find_split(node, value, affine, view, refusal)
    raise refusal


def _find_split(node, value, affine, view, refusal):
    """Return what _find_home does, with the shift left in an Add; raises `refusal` where there is no such way."""
    for way in (_keep_shift_backward, _keep_shift_forward) if view.has_matmul else ():
        try:
            return way(node, value, affine, view)
        except Refusal:
            pass  # what was said about both ways is the better reason
    raise refusal


def _keep_shift_backward(node, value, affine, view):
    """S x + T where x = MatMul(a, W): the scale goes into W, an Add of T stays in the place of the BatchNormalization."""
    found = Search(view).backward(value, affine.scale_only(), node, view.data_slot(node))
    if not any(step.op == "MatMul" for step in found.path):
        raise Refusal("shift-cannot-pass", "no MatMul asks for it")
    return found, False, _shift_node(node, affine, view, found)


def _keep_shift_forward(node, value, affine, view):
    """MatMul(S x + T, W) = MatMul(x + T/S, S W): the scale goes into W, an Add of T/S stays."""
    if (affine.scale == 0).any():
        raise Refusal("shift-cannot-pass", "a scale of zero loses the shift")
    found = Search(view).forward(node.outputs[0], affine.scale_only())
    before_scale = Affine(affine.scale, affine.shift / affine.scale, affine.axis, affine.rank, affine.abs_terms / np.abs(affine.scale))
    if any(home.op != "MatMul" for home in found.homes):
        raise Refusal("shift-cannot-pass", "more than the missing bias of a MatMul asks for it")
    return found, True, _shift_node(node, before_scale, view, found)


def _shift_node(node, affine, view, found):
    """Return (Add, its constant): what stays of a BatchNormalization whose scale went away."""
    rank = view.rank(node.inputs[0])
    if rank is None:
        raise Refusal("axis-unknown", f"the rank of '{node.inputs[0].name}' is not known, so the shift that would stay cannot be placed")
    _, shift, spread = affine.shaped(rank)
    # The parameters may be float32 beside float16 data; what stays has the type of the data, which is that of the weights.
    vector = Dense(next(iter(found.constants.values())).dtype, shift, spread)
    proto = onnx.NodeProto(op_type="Add")
    for text in ("name", "doc_string"):
        if node.proto.HasField(text):
            setattr(proto, text, getattr(node.proto, text))
    proto.input.extend([node.proto.input[0], node.proto.input[2]])
    proto.output.append(node.proto.output[0])
    add = Node(proto, node.scope, node.position)
    constant = Value(node.inputs[2].name, node.scope)
    constant.initializer = onnx.numpy_helper.from_array(vector.array(), constant.name)
    add.inputs = [node.inputs[0], constant]
    add.outputs = node.outputs[:1]
    return add, vector


def _refuse_bad_constants(found, view):
    for (node, slot), constant in found.constants.items():
        count, flushed = constant.check()
        fate = "Inf or NaN"
        if count:
            if isinstance(constant, Scaled) and not np.isfinite(constant.base.array()).all():
                raise Refusal("bad-parameters", f"input {slot} of {node.op} '{node.label}' holds Inf or NaN already")
            channels = constant.bad_channels()
        elif flushed or (isinstance(constant, Dense) and len(constant.shape) > 1):
            fate = "zero"
            count, channels = _lost(node, slot, constant, found, view)
        if count:
            what = f"{count} values of input {slot} of {node.op} '{node.label}' would become {fate} in {constant.dtype}"
            raise Refusal("overflow" if fate != "zero" else "flush-to-zero", f"{what}, channels {first_few(channels)}")


def _lost(node, slot, constant, found, view):
    """Return (how many weights matter that become zero, the output channels of the node that hold them)."""
    outputs = row_of(node, view.index).outputs
    if outputs is None or outputs(node, slot, constant.array()) is None:
        return 0, []
    bias = found.constants.get((node, BIAS_SLOT)) or view.tensor(node, BIAS_SLOT) if node.is_op(*BIASED) else None
    size = 0.0
    if bias is not None:
        folded = (node, BIAS_SLOT) in found.constants or (node, BIAS_SLOT) in view.constants
        size = np.abs(float64_of(bias) * (1.0 if folded else node.attribute("beta", 1.0)))
        size = size.min(axis=0) if size.ndim == 2 else size
    return lost_channels(constant, lambda values: outputs(node, slot, values), size)


def _kept(index, view, refusals):
    kept = []
    for node in index.order:
        if node in view.removed or node in view.replaced:
            continue
        if is_batch_norm(node):
            refusal = refusals[node]
            kept.append(Kept(node.label, (node.op,), refusal.code, refusal.sentence))
        elif node in refusals and _previous(node, view) is None:
            chain = _chain(node, view, refusals)
            if _is_decomposed(chain, view):
                ops = tuple(link.op for link in chain)
                kept.append(Kept("+".join(link.label for link in chain), ops, refusals[node].code, refusals[node].sentence))
    for function in index.proto.functions:
        for node in function.node:
            if node.op_type == BATCH_NORM and is_standard(node.domain):
                sentence = f"it stands in the model-local function '{function.name}', which several calls may share"
                kept.append(Kept(node.name or ", ".join(node.output), (BATCH_NORM,), "in-function", sentence))
    return kept


def _previous(node, view):
    """Return the elementwise affine right before a node, if the node is its only reader."""
    value = view.source(node.inputs[view.data_slot(node)])
    before = value.producer
    if before is None or is_batch_norm(before) or view.affine(before) is None or len(value.readers) != 1 or value.is_output:
        return None
    return before


def _chain(node, view, refusals):
    chain = [node]
    while True:
        readers = chain[-1].outputs[0].readers
        if len(readers) != 1 or chain[-1].outputs[0].is_output or readers[0][0] not in refusals or is_batch_norm(readers[0][0]):
            return chain
        chain.append(readers[0][0])


def _is_decomposed(chain, view):
    """Say whether a run of elementwise affines is a batch normalization: it scales, it shifts, and it does so per channel."""
    affines = [view.affine(node) for node in chain]
    return any(a.scales for a in affines) and any(a.shifts for a in affines) and any(a.channels > 1 for a in affines)
