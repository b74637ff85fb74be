"""The search: one affine on its way through the present graph, until every branch of it has found a home."""

from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Requantized
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.ops.absorb import ABSORBERS
from fastbn.graph.ops.carry import CARRIERS
from fastbn.graph.ops.lift import constant_slot, is_batch_norm
from fastbn.graph.ops.row import Taken
from fastbn.graph.planner.view import Plan
from fastbn.graph.reasons import Refusal

__all__ = ["Search", "row_of"]


# Nodes that one search asks once other readers may be asked too: a long residual stream is not walked whole for each of its nodes.
MOST_STEPS = 30


# Nodes that one affine is followed through in a row.
LONGEST_WAY = 100


def row_of(node, index):
    """Return the row of either table that stands for a node, or None."""
    if not is_standard(node.domain):
        return None
    absorber, carrier = ABSORBERS.get(node.op), CARRIERS.get(node.op)
    if absorber and carrier:
        return carrier if constant_slot(node, index) is None else absorber
    return absorber or carrier


class Search:
    """One affine on its way: every branch must end in an absorber, and no node may be met twice."""

    def __init__(self, view):
        self.view = view
        self.refused = {}
        self.open = set()
        self.steps = 0

    def backward(self, value, affine, asker, slot, depth=0):
        """Return a Plan that makes the producer of `value` yield the affine of it; this slot of `asker` is the one reader that may be."""
        key = value, affine.scales, affine.shifts
        if key in self.refused:
            raise Refusal(*self.refused[key])
        try:
            return self._ask(value, affine, asker, slot, depth)
        except Refusal as refusal:
            if refusal.code != "reads-twice":  # that one depends on the way taken
                self.refused[key] = refusal.code, refusal.sentence
            raise

    def _ask(self, value, affine, asker, slot, depth):
        if depth and self.view.index.constant(value) is not None:
            return self._into_constant(asker, slot, affine)
        through = {value.producer: None} if value.producer in self.view.removed else {}
        value = self.view.source(value)
        if value in self.open:
            raise Refusal("reads-twice", f"two ways meet in the value '{value.name}'")
        others = self._other_readers(value, affine, asker, slot)
        node = self.view.producer(value)
        if node is None:
            raise _refuse_source(value)
        if node.scope is not asker.scope:
            raise Refusal("crosses-scope", f"it reads '{value.name}' of {node.op} '{node.label}' in an outer graph")
        row = self._row(node, depth)
        if row is None or row.backward is None or (value.slot and not row.parts):
            raise Refusal("no-absorber", f"it reads {node.op} '{node.label}', which cannot take or pass it")
        if not row.parts and any(other is not None and (other.readers or other.is_output) for other in node.outputs if other is not value):
            raise Refusal("other-outputs", f"{node.op} '{node.label}' hands out more than one value")
        self.view.asked = value
        try:
            choices = row.backward(node, affine, self.view)
        except Refusal as refusal:
            if refusal.code == "axis" and is_batch_norm(asker) and node.op in ("Conv", "ConvTranspose", "Gemm") and affine.channels > 1:
                raise ModelError(expected("as many channels as the node before it gives", str(refusal), asker.label)) from refusal
            raise
        self.open.add(value)
        try:
            found = self._first(choices, node, lambda at, onward: self.backward(node.inputs[at], onward, node, at, depth + 1), depth)
            for reader, at in others:
                add_branch(found, self._undone(reader, at, value, affine.inverse(), depth))
        finally:
            self.open.remove(value)
        found.through.update(through)
        return found

    def _other_readers(self, value, affine, asker, slot):
        """Return the other readers of a value, where they may be asked to undo the affine; Refusal otherwise."""
        others = self.view.other_readers(value, asker, slot, MOST_STEPS + 1)
        if others:
            node = others[0][0]
            # What a constant becomes here, other readers would not see: they read it as the constant that it was.
            fixed = not self.view.may_rearrange() or self.view.index.constant(value) is not None or (affine.scale == 0).any()
            if fixed or len(others) > MOST_STEPS:
                raise Refusal("other-readers", f"{node.op} '{node.label}' reads the value '{value.name}' before it too")
        return others

    def _undone(self, node, slot, value, affine, depth):
        """Return a Plan in which another reader of a value that changes undoes the change in its own constants."""
        try:
            return self._read(node, slot, value, affine, depth)
        except Refusal:
            pass  # what the caller hears is that somebody else reads it
        raise Refusal("other-readers", f"{node.op} '{node.label}' reads the value '{value.name}' before it too")

    def _into_constant(self, node, slot, affine):
        constant = self.view.dense(node, slot)
        rank = len(constant.shape)
        if affine.rank > rank:
            raise Refusal(
                "axis", f"a constant of rank {affine.rank} widens the constant at {node.op} '{node.label}', which has rank {rank}"
            )
        if affine.axis is not None and (not -rank <= affine.axis < rank or constant.shape[affine.axis] != affine.channels):
            raise Refusal("axis", f"the constant at {node.op} '{node.label}' has no axis of {affine.channels} channels")
        return Plan(constants={(node, slot): constant.affine(*affine.shaped(rank))})

    def forward(self, value, affine, depth=0):
        """Return a Plan that makes every reader of `value` work on what lacks the affine."""
        if value is None:
            raise Refusal("unused", "nothing reads it")
        readers = self.view.readers(value)
        if not readers:
            raise Refusal("unused", f"nothing reads '{value.name}'")
        root = self.view.source(value)
        if root in self.open:
            raise Refusal("reads-twice", f"two ways meet in the value '{value.name}'")
        found = Plan()
        self.open.add(root)
        try:
            for node, slot in readers:
                add_branch(found, self._read(node, slot, value, affine, depth))
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
        choices = row.forward(node, slot, affine, self.view)
        found = self._first(choices, node, lambda at, onward: self.forward(node.outputs[at], onward, depth + 1), depth)
        if node.inputs[slot] is not value:
            found.through[node.inputs[slot].producer] = None
        return found

    def _row(self, node, depth):
        self.steps += 1
        if self._is_exhausted():
            raise Refusal("too-far", f"more than {MOST_STEPS} nodes would have to change by {node.op} '{node.label}'")
        if node is self.view.lifting[0]:
            raise Refusal("reads-twice", f"the way comes back to {node.op} '{node.label}' itself")
        if depth > LONGEST_WAY:
            raise Refusal("too-far", f"the way is longer than {LONGEST_WAY} nodes at {node.op} '{node.label}'")
        row = row_of(node, self.view.index)
        if row is not None:
            self.view.check(node)
        return row

    def _first(self, choices, node, follow, depth):
        """Return what the first choice that works out changes; the refusal of the last one otherwise."""
        refused = "no-absorber", f"{node.op} '{node.label}' of nothing takes nothing"
        for taken in [choices] if isinstance(choices, Taken) else choices:
            try:
                return self._taken(taken, node, follow, depth)
            except Refusal as refusal:
                refused = refusal.code, refusal.sentence
                if self._is_exhausted():
                    break
        raise Refusal(*refused)

    def _is_exhausted(self):
        return self.steps > MOST_STEPS and self.view.may_rearrange()

    def _taken(self, taken, node, follow, depth):
        absorbs = bool(taken.constants)
        found = Plan(
            path={node: None}, homes={node: None} if absorbs else {}, attributes={node: taken.attributes} if taken.attributes else {}
        )
        for slot, constant in taken.constants.items():
            if isinstance(constant, Requantized):
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
            add_branch(found, follow(at, onward))
        for at, asked in taken.back:
            add_branch(found, self.backward(node.inputs[at], asked, node, at, depth + 1))
        return found


def add_branch(found, more):
    """Add what another branch changes; two branches may not meet in one node."""
    met = next((node for node in more.path if node in found.path), None)
    if met is not None:
        raise Refusal("reads-twice", f"two ways meet in {met.op} '{met.label}'")
    found.join(more)


def _refuse_source(value):
    if value.is_input and value.initializer is None:
        return Refusal("reads-input", f"it reads the graph input '{value.name}', and nothing before it could take it")
    return Refusal("reads-constant", f"it reads the constant '{value.name}'")
