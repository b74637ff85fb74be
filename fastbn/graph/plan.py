"""The planner: every BatchNormalization becomes part of a Plan or a Kept. It reads the model and writes nothing.

The affine of a node is lifted out and travels against the data flow: each node on the way takes it into its constants (absorb.ABSORBERS) or
lets it pass (carry.CARRIERS), and a value on the way may have no other reader, or the other reader would see it changed. A plan is all or
nothing. Nodes are taken in the order of the data flow, and a node whose affine went into a plan is from then on as good as removed, so that
a chain (Conv, BN, Mul, Add) folds link by link while its constants stay exact: they are rounded once, when they are written.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import onnx

from fastbn.errors import ModelError, expected
from fastbn.graph.absorb import ABSORBERS
from fastbn.graph.carry import CARRIERS
from fastbn.graph.constant import Vector
from fastbn.graph.lift import BATCH_NORM, is_batch_norm, lift
from fastbn.graph.model import Node, Value, is_standard
from fastbn.graph.report import Kept, Refusal

__all__ = ["Plan", "Planning", "Site", "plan"]

# Operators that read the shape of a value and nothing else: an affine before them changes nothing.
SHAPE_READERS = ("Shape", "Size")

# A value is given at most this many elements in a site's verification, where the model says its shape.
LARGEST_SAMPLE = 1 << 20


@dataclass(eq=False)
class Plan:
    """One home and everything that moves into it.

    constants: (node, slot) -> Scaled or Vector; attributes: node -> dict of attributes to set; removed: the nodes whose affines were
    taken, in order; replaced: node -> the Add that stays in its place; path: the nodes that absorb or carry, in the order of travel.
    """

    constants: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    removed: list = field(default_factory=list)
    replaced: dict = field(default_factory=dict)
    path: list = field(default_factory=list)
    channels: int = 0

    @property
    def nodes(self):
        """The lifted nodes, removed or replaced, in the order of the data flow."""
        return [*self.removed, *self.replaced]

    @property
    def home(self):
        """The node that took the most: the first absorber that the affine met last."""
        return self.path[-1]


@dataclass
class Planning:
    """What the planner decided: plans, kept nodes, and the view of the graph after all plans."""

    plans: list
    kept: list
    site: "Site"


class Site:
    """The planner's view of the graph, in which earlier plans have already happened. Rows of both tables ask it."""

    def __init__(self, index):
        self.index = index
        self.constants = {}
        self.removed = {}
        self.replaced = {}
        self.owner = {}
        self._affines = {}

    def affine(self, node):
        """Return the Affine of a node or None; a BatchNormalization that must stay gives None too."""
        try:
            return self.lifted(node)
        except Refusal:
            return None

    def lifted(self, node):
        """Return lift(node), remembered; raises Refusal as it does."""
        if node not in self._affines:
            try:
                self._affines[node] = lift(node, self.index)
            except Refusal as refusal:
                self._affines[node] = refusal
        found = self._affines[node]
        if isinstance(found, Refusal):
            raise found
        return found

    def data_slot(self, node):
        """Return the slot of the data input of a lifted node."""
        return 0 if is_batch_norm(node) else next(slot for slot, value in enumerate(node.inputs) if self.index.constant(value) is None)

    def source(self, value):
        """Return the value of the present graph that stands where `value` stood: removed nodes are followed to their input."""
        while value.producer in self.removed:
            value = self.removed[value.producer]
        return value

    def producer(self, value):
        """Return the node that gives a value in the present graph."""
        return self.replaced.get(value.producer, value.producer)

    def tensor(self, node, slot):
        """Return the constant at a slot: what a plan has made of it, or the model's, or None."""
        return self.constants.get((node, slot)) or self.index.constant(node.input(slot))

    def weight(self, node, slot):
        """Return the constant weight at a slot; raises Refusal where it is none."""
        found = self.tensor(node, slot)
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
            raise Refusal("dynamic-weight", f"the weight '{value.name}' of {node.op} '{node.label}' is computed when the model runs")
        return found

    def constant_vector(self, node, slot):
        """Return the constant at a slot in float64."""
        found = self.weight(node, slot)
        return found if isinstance(found, Vector) else Vector.of(found)

    def vector(self, node, slot, shape, dtype):
        """Return the bias at a slot in float64, which must have this shape; zeros where it is absent."""
        if node.input(slot) is None and (node, slot) not in self.constants:
            return Vector.zeros(shape, dtype)
        found = self.constant_vector(node, slot)
        if found.shape != shape:
            raise ModelError(expected(f"a bias of shape {shape}", f"shape {found.shape}", node.label))
        return found

    def shape(self, value):
        """Return the shape of a value, None where unknown."""
        return self.index.shape(value)

    def rank(self, value):
        """Return the rank of a value, or None."""
        shape = self.index.shape(value)
        return None if shape is None else len(shape)

    def small_shape(self, value):
        """Return a shape to verify with: the model's own where it is known and small, otherwise one of the same rank."""
        shape = self.index.shape(value)
        if shape is None:
            return None
        shape = tuple(2 if size is None else size for size in shape)
        if np.prod(shape, dtype=np.float64) > LARGEST_SAMPLE:
            shape = (*shape[:2], *(min(size, 8) for size in shape[2:]))
        return shape

    def refuse_readers(self, value, asker):
        """Refuse when anything but `asker` and shape readers sees a value of the present graph."""
        link = value
        while True:
            if link.is_output:
                raise Refusal("graph-output", f"the value '{link.name}' before it is a graph output")
            present = (self.replaced.get(node, node) for node, _ in link.readers)
            readers = [node for node in present if node is not asker and not node.is_op(*SHAPE_READERS)]
            removed = next((node for node in readers if node in self.removed), None)
            others = [node for node in readers if node is not removed]
            if others:
                raise Refusal("other-readers", f"{others[0].op} '{others[0].label}' reads the value '{link.name}' before it too")
            if removed is None:
                return
            link = removed.outputs[0]


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
    site = Site(index)
    plans, refusals = [], {}
    for node in index.order:
        if not (is_batch_norm(node) or node.op in ABSORBERS):
            continue
        try:
            affine = site.lifted(node)
            if affine is None:
                continue
            _refuse_unselected(node, only, skip, excluded or {})
            _place(node, affine, site, plans)
        except Refusal as refusal:
            refusals[node] = refusal
    return Planning(plans, _kept(index, site, refusals), site)


def _refuse_unselected(node, only, skip, excluded):
    if (node.scope.number, node.position) in excluded:
        raise Refusal("parity", excluded[node.scope.number, node.position])
    if only and not any(fnmatchcase(node.label, glob) for glob in only):
        raise Refusal("not-selected", "--only does not name it")
    if skip and any(fnmatchcase(node.label, glob) for glob in skip):
        raise Refusal("not-selected", "--skip names it")


def _place(node, affine, site, plans):
    """Find a home for a node's affine and record the plan in `site` and `plans`; raises Refusal where there is none."""
    value = site.source(node.inputs[site.data_slot(node)])
    try:
        found = _travel(value, affine, node, site)
        stays = None
    except Refusal as refusal:
        # What cannot take the shift may still take the scale: then an Add stays in the place of the BatchNormalization.
        if refusal.code != "shift-cannot-pass" or not is_batch_norm(node):
            raise
        found = _travel(value, affine.scale_only(), node, site)
        # The parameters may be float32 beside float16 data; what stays has the type of the data, which is that of the weights.
        stays = _shift_node(node, affine, site, next(iter(found.constants.values())).dtype)
    _refuse_bad_constants(found)
    target = _merged([site.owner[step] for step in found.path if step in site.owner], site, plans)
    target.channels = max(target.channels, affine.channels)
    target.constants.update(found.constants)
    for step, attributes in found.attributes.items():
        target.attributes.setdefault(step, {}).update(attributes)
    target.path.extend(step for step in found.path if step not in target.path)
    if stays is None:
        target.removed.append(node)
        site.removed[node] = value
    else:
        add, vector = stays
        target.replaced[node] = add
        target.constants[add, 1] = vector
        site.replaced[node] = add
    site.constants.update(target.constants)
    for step in (*found.path, *([stays[0]] if stays else [])):
        site.owner[step] = target


def _merged(owners, site, plans):
    """Return the one plan that owns all of these, or a new one: plans that meet on the way become one."""
    if not owners:
        plans.append(Plan())
        return plans[-1]
    target = min(owners, key=plans.index)
    for other in owners:
        if other is target or other not in plans:
            continue
        plans.remove(other)
        target.constants.update(other.constants)
        target.attributes.update(other.attributes)
        target.removed.extend(other.removed)
        target.replaced.update(other.replaced)
        target.path.extend(step for step in other.path if step not in target.path)
        target.channels = max(target.channels, other.channels)
        site.owner.update(dict.fromkeys([*other.path, *other.replaced.values()], target))
    return target


def _travel(value, affine, asker, site):
    """Send an affine against the data flow from a value: return what changes, or raise the Refusal of the first node that cannot."""
    found = Plan()
    pending = [(value, affine, asker)]
    while pending:
        value, affine, asker = pending.pop()
        site.refuse_readers(value, asker)
        node = site.producer(value)
        if node is None:
            raise _refuse_source(value)
        if node.scope is not asker.scope:
            raise Refusal("crosses-scope", f"it reads '{value.name}' of {node.op} '{node.label}' in an outer graph")
        row = (ABSORBERS.get(node.op) or CARRIERS.get(node.op)) if node.is_op(node.op) else None
        if row is None:
            raise Refusal("no-absorber", f"it reads {node.op} '{node.label}', which has no constants that could take its scale and shift")
        if any(other is not None and (other.readers or other.is_output) for other in node.outputs if other is not value):
            raise Refusal("other-outputs", f"{node.op} '{node.label}' hands out more than one value")
        try:
            taken = row.backward(node, affine, site)
        except Refusal as refusal:
            if refusal.code == "axis" and is_batch_norm(asker) and node.op in ("Conv", "ConvTranspose", "Gemm") and affine.channels > 1:
                raise ModelError(expected("as many channels as the node before it gives", str(refusal), asker.label)) from refusal
            raise
        found.path.append(node)
        found.constants.update({(node, slot): constant for slot, constant in taken.constants.items()})
        if taken.attributes:
            found.attributes[node] = taken.attributes
        pending.extend((site.source(node.inputs[slot]), onward, node) for slot, onward in taken.onward)
    return found


def _refuse_source(value):
    if value.is_input and value.initializer is None:
        return Refusal("reads-input", f"it reads the graph input '{value.name}'; nothing before it could take it")
    return Refusal("reads-constant", f"it reads the constant '{value.name}'")


def _shift_node(node, affine, site, dtype):
    """Return (Add, its constant): what stays of a BatchNormalization whose scale went away."""
    rank = site.rank(node.inputs[0])
    if rank is None:
        raise Refusal("axis-unknown", f"the rank of '{node.inputs[0].name}' is not known, so the shift that would stay cannot be placed")
    _, shift, spread = affine.shaped(rank)
    vector = Vector(dtype, shift, spread)
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


def _refuse_bad_constants(found):
    for (node, slot), constant in found.constants.items():
        nonfinite, flushed = constant.check()
        if nonfinite or flushed:
            code = "overflow" if nonfinite else "flush-to-zero"
            fate = "Inf or NaN" if nonfinite else "zero"
            channels = constant.bad_channels()
            some = ", ".join(map(str, channels[:4])) + (", ..." if len(channels) > 4 else "")
            what = f"{nonfinite or flushed} values of input {slot} of {node.op} '{node.label}' would become {fate} in {constant.dtype}"
            raise Refusal(code, f"{what}, channels {some}")


def _kept(index, site, refusals):
    kept = []
    for node in index.order:
        if node in site.removed or node in site.replaced:
            continue
        if is_batch_norm(node):
            refusal = refusals[node]
            kept.append(Kept(node.label, (node.op,), refusal.code, refusal.sentence))
        elif node in refusals and _previous(node, site) is None:
            chain = _chain(node, site, refusals)
            if _is_decomposed(chain, site):
                ops = tuple(link.op for link in chain)
                kept.append(Kept("+".join(link.label for link in chain), ops, refusals[node].code, refusals[node].sentence))
    for function in index.proto.functions:
        for node in function.node:
            if node.op_type == BATCH_NORM and is_standard(node.domain):
                sentence = f"it stands in the model-local function '{function.name}', which several calls may share"
                kept.append(Kept(node.name or ", ".join(node.output), (BATCH_NORM,), "in-function", sentence))
    return kept


def _previous(node, site):
    """Return the elementwise affine right before a node, if the node is its only reader."""
    value = site.source(node.inputs[site.data_slot(node)])
    before = value.producer
    if before is None or is_batch_norm(before) or site.affine(before) is None or len(value.readers) != 1 or value.is_output:
        return None
    return before


def _chain(node, site, refusals):
    chain = [node]
    while True:
        readers = chain[-1].outputs[0].readers
        if len(readers) != 1 or chain[-1].outputs[0].is_output or readers[0][0] not in refusals or is_batch_norm(readers[0][0]):
            return chain
        chain.append(readers[0][0])


def _is_decomposed(chain, site):
    """Say whether a run of elementwise affines is a batch normalization: it scales, it shifts, and it does so per channel."""
    affines = [site.affine(node) for node in chain]
    return any(a.scales for a in affines) and any(a.shifts for a in affines) and any(a.channels > 1 for a in affines)
