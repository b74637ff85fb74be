"""The planner: every BatchNormalization becomes part of a Plan or a Kept. It reads the model and writes nothing.

The affine of a node is lifted out and travels against the data flow: each node on the way takes it into its constants (absorb.ABSORBERS) or
lets it pass (carry.CARRIERS), and a value on the way may have no other reader, or the other reader would see it changed. A plan is all or
nothing. Nodes are taken in the order of the data flow, and a node whose affine went into a plan is from then on as good as removed, so that
a chain (Conv, BN, Mul, Add) folds link by link while its constants stay exact: they are rounded once, when they are written.
"""

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import onnx

from fastbn.affine import DTYPES, dtype_name
from fastbn.errors import ModelError, expected
from fastbn.graph.absorb import ABSORBERS, Taken
from fastbn.graph.carry import CARRIERS
from fastbn.graph.constant import Affine, Dense, Dequantised, Requantised, Scaled
from fastbn.graph.lift import BATCH_NORM, ELEMENTWISE, constant_slot, is_batch_norm, lift
from fastbn.graph.model import Node, Value, is_standard
from fastbn.graph.report import FORWARDS, Kept, Refusal

__all__ = ["SHAPE_READERS", "Plan", "Planning", "Site", "plan", "row_of"]

# Operators that read the shape of a value and nothing else: an affine before them changes nothing.
SHAPE_READERS = ("Shape", "Size")

# A value is given at most this many elements in a site's verification, where the model says its shape.
LARGEST_SAMPLE = 1 << 20


# Conv, ConvTranspose and Gemm read their weight here; DequantizeLinear has a scale per step of an axis from this opset on.
WEIGHT_SLOT, FIRST_PER_AXIS_OPSET = 1, 13

# How far the planner goes, each only where the one before leaves nothing to do, the later ones for a batch normalization alone: move it;
# change a value that others read too, they undoing it; leave the shift behind in an Add.
EFFORTS = ("plain", "rearrange", "split")

# Other readers that one search may ask to undo what it changes: a long residual stream is not walked again for each of its nodes.
MOST_REARRANGED = 40

# Nodes that one affine is followed through in a row.
LONGEST_WAY = 100

# No operator of the tables has a constant behind this many inputs: BatchNormalization has five.
MOST_SLOTS = 5


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

    @property
    def removed(self):
        """The nodes that the folded graph lacks."""
        return [node for node in (*self.lifted, *self.dissolved) if node not in self.replaced]

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
        self.forwarded = set()
        self.replaced = {}
        self.owner = {}
        self.lifting = None
        self.effort = EFFORTS[0]
        self._affines = {}
        self._views = {}

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
                self._affines[node] = lift(node, self)
            except Refusal as refusal:
                self._affines[node] = refusal
        found = self._affines[node]
        if isinstance(found, Refusal):
            raise found
        return found

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
        others = [node for node, at in self.readers(value) if (node, at) != (asker, slot)]
        if others:
            raise Refusal("other-readers", f"{others[0].op} '{others[0].label}' reads the value '{value.name}' before it too")

    def may_rearrange(self):
        """Say whether other readers may be asked to undo a change in their constants."""
        return self.effort != "plain"

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
            raise Refusal("dynamic-weight", f"the weight '{value.name}' of {node.op} '{node.label}' is computed when the model runs")
        if dtype_name(found.dtype) not in DTYPES:
            raise Refusal("unsupported-type", f"the weight '{node.input(slot).name}' of {node.op} '{node.label}' is {found.dtype}")
        return found

    def _dequantised(self, node, slot):
        """Return the Dequantised weight at a slot, None where there is no DequantizeLinear of constants behind it."""
        value = node.input(slot)
        source = None if value is None else value.producer
        if source is None or not source.is_op("DequantizeLinear") or slot != WEIGHT_SLOT or self.index.opset < FIRST_PER_AXIS_OPSET:
            return None
        quantised, scale = self.tensor(source, 0), self.tensor(source, 1)
        zero_point = self.tensor(source, 2)
        known = quantised is not None and scale is not None and (zero_point is not None or source.input(2) is None)
        if not known or source.attribute("block_size", 0) or dtype_name(scale.dtype) not in DTYPES or source.scope is not node.scope:
            return None
        self.refuse_readers(value, node, slot)
        changed = self.owner[source].attributes.get(source, {}) if source in self.owner else {}
        axis = changed.get("axis", source.attribute("axis", 1)) % len(quantised.shape)
        per_axis = math.prod(scale.shape) > 1
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
        if math.prod(shape) > LARGEST_SAMPLE:
            shape = (*shape[:2], *(min(size, 8) for size in shape[2:]))
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
            self.refuse_readers(other, reader, at)
            if sibling.is_op("Add") and constant_slot(sibling, self.index) is None:
                others.extend((operand, sibling, at, [*via, sibling]) for at, operand in enumerate(sibling.inputs))
            elif sibling.is_op("Conv") and self.source(sibling.inputs[0]) is value:
                found = self._centred(sibling, affine)
                if found is not None:
                    return Taken(elsewhere=found, via=via, dissolves=1 - slot)
        return None

    def _centred(self, conv, affine):
        weight = self.weight(conv, 1)
        channels, groups = weight.shape[0], conv.attribute("group", 1)
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
    plans, reasons, effort = {}, {}, 0
    candidates = waiting = _by_level(index)
    while effort < len(EFFORTS):
        site.effort = EFFORTS[effort]
        refused, placed = {}, set()
        for node in waiting if effort == 0 else [node for node in candidates if node in reasons and is_batch_norm(node)]:
            try:
                affine = site.lifted(node)
                if affine is None:
                    continue
                _refuse_unselected(node, only, skip, excluded or {})
                _place(node, affine, site, plans)
                placed.add(node)
            except Refusal as refusal:
                refused[node] = refusal
        if effort == 0:
            reasons = refused
        # What stood in the way of one affine may have gone with another; against the order, what frees a whole chain does so at once.
        waiting = [node for node in reasons if node not in placed][::-1]
        effort = 0 if placed else effort + 1
    site.removed = {node: site.source(node.outputs[0]) for node in index.order if node in site.removed}
    place = {node: number for number, node in enumerate(index.order)}
    found = sorted(plans, key=lambda each: min(place[node] for node in each.lifted))
    return Planning(found, _kept(index, site, reasons), site)


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


def _place(node, affine, site, plans):
    """Find a home for a node's affine and record the plan in `site` and `plans`; raises Refusal where there is none."""
    value = site.source(node.inputs[site.data_slot(node)])
    site.lifting = node, value
    found, forward, stays = _find_home(node, value, affine, site)
    _refuse_bad_constants(found)
    leaving = [node, *found.dissolved]
    before = node.inputs[site.data_slot(node)].producer
    owners = dict.fromkeys(filter(None, map(site.owned, (*found.path, *found.through, *leaving, *({before} & site.removed.keys())))))
    target = min(owners, key=lambda plan: plan.number, default=None) or Plan(number=len(site.owner))
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
        site.remove(node, value)
        if forward:
            site.forwarded.add(node)
    else:
        add, constant = stays
        found.replaced[node] = add
        found.constants[add, 1] = constant
        site.replaced[node] = add
    for gone, kept in found.dissolved.items():
        site.remove(gone, kept)
    target.join(found)
    site.apply(found)
    site.owner.update(dict.fromkeys([*found.path, *found.replaced.values(), *leaving], target))


def _find_home(node, value, affine, site):
    """Return (what changes, whether forward, what stays): backward first, then forward, then backward with the shift left in an Add."""
    slot = site.data_slot(node)
    try:
        return _Search(site).backward(value, affine, node, slot), False, None
    except Refusal as refusal:
        behind = refusal
    try:
        return _Search(site).forward(node.outputs[0], affine), True, None
    except Refusal as refusal:
        ahead = refusal
    if site.effort == "split":
        for way in (_keep_shift_backward, _keep_shift_forward):
            try:
                return way(node, value, affine, site)
            except Refusal:
                pass  # what both ways said is the better reason
    # A reason that only says "nothing there" gives way to one that names a condition.
    vague = ("reads-input", "reads-constant", "no-absorber", "unused")
    code = ahead.code if behind.code in vague and ahead.code not in vague else behind.code
    raise Refusal(code, f"backwards: {behind.sentence}{FORWARDS}{ahead.sentence}")


def _keep_shift_backward(node, value, affine, site):
    """S x + T where x = MatMul(a, W): the scale goes into W, an Add of T stays in the place of the BatchNormalization."""
    found = _Search(site).backward(value, affine.scale_only(), node, site.data_slot(node))
    if not any(step.op == "MatMul" for step in found.path):
        raise Refusal("shift-cannot-pass", "no MatMul asks for it")
    return found, False, _shift_node(node, affine, site, found)


def _keep_shift_forward(node, value, affine, site):
    """MatMul(S x + T, W) = MatMul(x + T/S, S W): the scale goes into W, an Add of T/S stays."""
    if (affine.scale == 0).any():
        raise Refusal("shift-cannot-pass", "a scale of zero loses the shift")
    found = _Search(site).forward(node.outputs[0], affine.scale_only())
    inverse = Affine(affine.scale, affine.shift / affine.scale, affine.axis, affine.rank, affine.spread / np.abs(affine.scale))
    if any(home.op != "MatMul" for home in found.homes):
        raise Refusal("shift-cannot-pass", "more than the missing bias of a MatMul asks for it")
    return found, True, _shift_node(node, inverse, site, found)


def row_of(node, index):
    """Return the row of either table that stands for a node, or None."""
    if not is_standard(node.domain):
        return None
    absorber, carrier = ABSORBERS.get(node.op), CARRIERS.get(node.op)
    if absorber and carrier:
        return carrier if constant_slot(node, index) is None else absorber
    return absorber or carrier


class _Search:
    """One affine on its way: every branch must end in an absorber, and no node may be met twice."""

    def __init__(self, site):
        self.site = site
        self.refused = {}
        self.open = set()
        self.rearranged = 0

    def backward(self, value, affine, asker, slot, depth=0):
        """Return a Plan that makes the producer of `value` yield the affine of it; this slot of `asker` is the one reader that may be."""
        key = value, affine.scales, affine.shifts
        if key in self.refused:
            raise self.refused[key]
        try:
            return self._ask(value, affine, asker, slot, depth)
        except Refusal as refusal:
            if refusal.code != "reads-twice":  # that one depends on the way taken
                self.refused[key] = refusal
            raise

    def _ask(self, value, affine, asker, slot, depth):
        if depth and self.site.index.constant(value) is not None:
            return self._into_constant(asker, slot, affine)
        through = {value.producer: None} if value.producer in self.site.removed else {}
        value = self.site.source(value)
        if value in self.open:
            raise Refusal("reads-twice", f"two ways meet in the value '{value.name}'")
        others = self._other_readers(value, affine, asker, slot)
        node = self.site.producer(value)
        if node is None:
            raise _refuse_source(value)
        if node.scope is not asker.scope:
            raise Refusal("crosses-scope", f"it reads '{value.name}' of {node.op} '{node.label}' in an outer graph")
        row = self._row(node, depth)
        if row is None or row.backward is None:
            raise Refusal("no-absorber", f"it reads {node.op} '{node.label}', which cannot take or pass it")
        if any(other is not None and (other.readers or other.is_output) for other in node.outputs if other is not value):
            raise Refusal("other-outputs", f"{node.op} '{node.label}' hands out more than one value")
        try:
            choices = row.backward(node, affine, self.site)
        except Refusal as refusal:
            if refusal.code == "axis" and is_batch_norm(asker) and node.op in ("Conv", "ConvTranspose", "Gemm") and affine.channels > 1:
                raise ModelError(expected("as many channels as the node before it gives", str(refusal), asker.label)) from refusal
            raise
        self.open.add(value)
        try:
            found = self._first(choices, node, lambda at, onward: self.backward(node.inputs[at], onward, node, at, depth + 1), depth)
            for reader, at in others:
                _add(found, self._undone(reader, at, value, affine.inverse(), depth))
        finally:
            self.open.remove(value)
        found.through.update(through)
        return found

    def _other_readers(self, value, affine, asker, slot):
        """Return the other readers of a value, where they may be asked to undo the affine; Refusal otherwise."""
        others = [use for use in self.site.readers(value) if use != (asker, slot)]
        if others:
            self.rearranged += len(others)
            node = others[0][0]
            if not self.site.may_rearrange() or (affine.scale == 0).any() or self.rearranged > MOST_REARRANGED:
                raise Refusal("other-readers", f"{node.op} '{node.label}' reads the value '{value.name}' before it too")
        return others

    def _undone(self, node, slot, value, affine, depth):
        """Return a Plan in which another reader of a value that changes undoes the change in its own constants."""
        try:
            return self._read(node, slot, value, affine, depth)
        except Refusal as refusal:
            sentence = f"{node.op} '{node.label}' reads the value '{value.name}' before it too"
            raise Refusal("other-readers", sentence) from refusal

    def _into_constant(self, node, slot, affine):
        constant = self.site.dense(node, slot)
        rank = len(constant.shape)
        if affine.axis is not None and (not -rank <= affine.axis < rank or constant.shape[affine.axis] != affine.channels):
            raise Refusal("axis", f"the constant at {node.op} '{node.label}' has no axis of {affine.channels} channels")
        return Plan(constants={(node, slot): constant.affine(*affine.shaped(rank))})

    def forward(self, value, affine, depth=0):
        """Return a Plan that makes every reader of `value` work on what lacks the affine."""
        readers = self.site.readers(value)
        if not readers:
            raise Refusal("unused", f"nothing reads '{value.name}'")
        root = self.site.source(value)
        if root in self.open:
            raise Refusal("reads-twice", f"two ways meet in the value '{value.name}'")
        found = Plan()
        self.open.add(root)
        try:
            for node, slot in readers:
                _add(found, self._read(node, slot, value, affine, depth))
        finally:
            self.open.remove(root)
        return found

    def _read(self, node, slot, value, affine, depth):
        """Return a Plan in which one reader of `value` makes up for the affine."""
        if node.scope is not value.scope:
            raise Refusal("crosses-scope", f"{node.op} '{node.label}' in an inner graph reads it")
        row = self._row(node, depth)
        if row is None or row.forward is None:
            raise Refusal("no-absorber", f"{node.op} '{node.label}' reads it, which cannot take or pass it")
        choices = row.forward(node, slot, affine, self.site)
        found = self._first(choices, node, lambda at, onward: self.forward(node.outputs[at], onward, depth + 1), depth)
        if node.inputs[slot] is not value:
            found.through[node.inputs[slot].producer] = None
        return found

    def _row(self, node, depth):
        if node is self.site.lifting[0]:
            raise Refusal("reads-twice", f"the way comes back to {node.op} '{node.label}' itself")
        if depth > LONGEST_WAY:
            raise Refusal("too-far", f"the way is longer than {LONGEST_WAY} nodes at {node.op} '{node.label}'")
        return row_of(node, self.site.index)

    def _first(self, choices, node, follow, depth):
        """Return what the first choice that works out changes; the refusal of the last one otherwise."""
        choices = choices if isinstance(choices, list) else [choices]
        for number, taken in enumerate(choices):
            try:
                return self._taken(taken, node, follow, depth)
            except Refusal:
                if number == len(choices) - 1:
                    raise
        raise AssertionError("a row without choices")

    def _taken(self, taken, node, follow, depth):
        absorbs = bool(taken.constants)
        found = Plan(
            path={node: None}, homes={node: None} if absorbs else {}, attributes={node: taken.attributes} if taken.attributes else {}
        )
        for slot, constant in taken.constants.items():
            if isinstance(constant, Requantised):
                found.path[constant.node] = None
                found.constants.update(constant.constants())
                found.attributes[constant.node] = {"axis": constant.axis}
            else:
                found.constants[node, slot] = constant
        if taken.dissolves is not None:
            sibling = next(iter(taken.elsewhere))[0]
            found.constants.update(taken.elsewhere)
            found.path, found.homes = dict.fromkeys([sibling, *taken.via]), {sibling: None}
            found.dissolved = {node: node.inputs[taken.dissolves]}
        for at, onward in taken.onward:
            _add(found, follow(at, onward))
        for at, asked in taken.back:
            _add(found, self.backward(node.inputs[at], asked, node, at, depth + 1))
        return found


def _add(found, more):
    """Add what another branch changes; two branches may not meet in one node."""
    met = next((node for node in more.path if node in found.path), None)
    if met is not None:
        raise Refusal("reads-twice", f"two ways meet in {met.op} '{met.label}'")
    found.join(more)


def _refuse_source(value):
    if value.is_input and value.initializer is None:
        return Refusal("reads-input", f"it reads the graph input '{value.name}', and nothing before it could take it")
    return Refusal("reads-constant", f"it reads the constant '{value.name}'")


def _shift_node(node, affine, site, found):
    """Return (Add, its constant): what stays of a BatchNormalization whose scale went away."""
    rank = site.rank(node.inputs[0])
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


def _refuse_bad_constants(found):
    for (node, slot), constant in found.constants.items():
        nonfinite, flushed = constant.check()
        if nonfinite or flushed:
            code = "overflow" if nonfinite else "flush-to-zero"
            fate = "Inf or NaN" if nonfinite else "zero"
            if nonfinite and isinstance(constant, Scaled) and not np.isfinite(constant.base.array()).all():
                raise Refusal("bad-parameters", f"input {slot} of {node.op} '{node.label}' holds Inf or NaN already")
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
