"""The search: one affine on its way through the present graph, until every branch of it has found an absorber."""

from collections.abc import Callable, Iterable
from typing import TypeAlias

from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Requantized
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.normalization import is_batch_norm
from fastbn.graph.ops.registry import row_of
from fastbn.graph.ops.row import Origin, Row, Skip, Strategy, Transfer, Traveler
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import ReasonCode, Refusal

__all__ = ["Search"]

# Nodes that one search asks once other readers may be asked too: a long residual stream is not walked whole for each of its nodes.
MOST_STEPS = 30

# Nodes that one affine is followed through in a row.
LONGEST_WAY = 100

# What asks further, behind a node forward and before it backward: (slot, affine, skip) -> Plan.
_Follow: TypeAlias = Callable[[int, Affine, Skip | None], Plan]


class Search:
    """One affine on its way: every branch must end in an absorber, and no node may be met twice.

    Parameters
    ----------
    view : GraphView
    origin : Origin
        Where the affine comes from.
    strategy : Strategy
        How far to go.
    """

    def __init__(self, view: GraphView, origin: Origin, strategy: Strategy) -> None:
        self.view = view
        self.origin = origin
        self.strategy: Strategy = strategy
        self._refused: dict[tuple[Value, bool, bool, Value | None], tuple[ReasonCode, str]] = {}
        self._open: set[Value] = set()
        self._steps = 0

    # ---- against the data flow ----

    def backward(self, value: Value, affine: Affine, asker: Node, slot: int, depth: int = 0, skip: Skip | None = None) -> Plan:
        """Return a Plan that makes the producer of `value` give the affine of it; this slot of `asker` is the one reader that may be.

        Raises
        ------
        Refusal
            There is no such plan.
        """
        key = value, affine.scales, affine.shifts, None if skip is None else skip.source
        if key in self._refused:
            raise Refusal(*self._refused[key])
        try:
            return self._ask_producer(value, affine, asker, slot, depth, skip)
        except Refusal as refusal:
            if refusal.code != "reads-twice":  # that one depends on the way taken
                self._refused[key] = refusal.code, refusal.sentence
            raise

    def _ask_producer(self, value: Value, affine: Affine, asker: Node, slot: int, depth: int, skip: Skip | None) -> Plan:
        if depth and self.view.constant(value) is not None:
            if skip is not None:
                raise _refused_source(value)
            return self._into_constant(asker, slot, affine)
        crossed = {value.producer: None} if value.producer is not None and value.producer in self.view.removed else {}
        value = self.view.source(value)
        if value in self._open:
            raise Refusal("reads-twice", f"two ways meet in the value '{value.name}'")
        others = self._other_readers(value, affine, asker, slot)
        if others and skip is not None:  # which no constant of theirs undoes
            raise _refused_reader(others[0][0], value)
        node, row = self._producer(value, asker, depth)
        if skip is not None and not row.takes_skip:
            raise Refusal("other-branch", f"{node.op} '{node.label}' is no convolution that could add '{skip.source.name}'")
        try:
            traveler = Traveler(affine, value, value.slot, self.strategy, self.origin, skip)
            transfers = row.backward and row.backward(node, traveler, self.view)
        except Refusal as refusal:
            if refusal.code == "axis" and is_batch_norm(asker) and row.channel_axis is not None and affine.channels > 1:
                raise ModelError(expected("as many channels as the node before it gives", str(refusal), asker.label)) from refusal
            raise
        assert transfers is not None, "_producer has refused a row without it"

        def follow(at: int, asked: Affine, added: Skip | None) -> Plan:
            return self._ask_input(node, at, asked, depth, added)

        self._open.add(value)
        try:
            plan = self._first(transfers, node, follow, depth)
            for reader, at in others:
                _add_branch(plan, self._undone(reader, at, value, affine.inverse(), depth))
        finally:
            self._open.remove(value)
        plan.crossed.update(crossed)
        return plan

    def _producer(self, value: Value, asker: Node, depth: int) -> tuple[Node, Row]:
        """Return the node that gives a value and its row; Refusal where it cannot be asked."""
        node = self.view.producer(value)
        if node is None:
            raise _refused_source(value)
        if node.scope is not asker.scope:
            raise Refusal("crosses-scope", f"it reads '{value.name}' of {node.op} '{node.label}' in an outer graph")
        row = self._row(node, depth)
        if row.backward is None or (value.slot and not row.parts):
            raise Refusal("no-absorber", f"it reads {node.op} '{node.label}', which cannot take or pass it")
        if not row.parts and any(other is not None and (other.readers or other.is_output) for other in node.outputs if other is not value):
            raise Refusal("other-outputs", f"{node.op} '{node.label}' hands out more than one value")
        return node, row

    def _ask_input(self, node: Node, slot: int, affine: Affine, depth: int, skip: Skip | None = None) -> Plan:
        value = node.inputs[slot]
        assert value is not None, "a row asks the inputs that there are"
        return self.backward(value, affine, node, slot, depth + 1, skip)

    def _other_readers(self, value: Value, affine: Affine, asker: Node, slot: int) -> list[tuple[Node, int]]:
        """Return the other readers of a value, where they may be asked to undo the affine; Refusal otherwise."""
        others = self.view.other_readers(value, asker, slot, MOST_STEPS + 1)
        if others:
            # What a constant becomes here, other readers would not see: they read it as the constant that it was.
            is_fixed = self.strategy == "plain" or self.view.constant(value) is not None or (affine.scale == 0).any()
            if is_fixed or len(others) > MOST_STEPS:
                raise _refused_reader(others[0][0], value)
        return others

    def _undone(self, node: Node, slot: int, value: Value, affine: Affine, depth: int) -> Plan:
        """Return a Plan in which another reader of a value that changes undoes the change in its own constants."""
        try:
            return self._ask_reader(node, slot, value, affine, depth)
        except Refusal:
            pass  # what the caller hears is that somebody else reads it
        raise _refused_reader(node, value)

    def _into_constant(self, node: Node, slot: int, affine: Affine) -> Plan:
        constant = self.view.dense(node, slot)
        rank = len(constant.shape)
        if affine.rank > rank:
            raise Refusal(
                "axis", f"a constant of rank {affine.rank} widens the constant at {node.op} '{node.label}', which has rank {rank}"
            )
        if affine.axis is not None and (not -rank <= affine.axis < rank or constant.shape[affine.axis] != affine.channels):
            raise Refusal("axis", f"the constant at {node.op} '{node.label}' has no axis of {affine.channels} channels")
        return Plan(constants={(node, slot): constant.affine(*affine.shaped(rank))})

    # ---- along the data flow ----

    def forward(self, value: Value | None, affine: Affine, depth: int = 0) -> Plan:
        """Return a Plan that makes every reader of `value` work on what lacks the affine; raises Refusal where there is none."""
        if value is None:
            raise Refusal("unused", "nothing reads it")
        readers = self.view.readers(value)
        if not readers:
            raise Refusal("unused", f"nothing reads '{value.name}'")
        root = self.view.source(value)
        if root in self._open:
            raise Refusal("reads-twice", f"two ways meet in the value '{value.name}'")
        plan = Plan()
        self._open.add(root)
        try:
            for node, slot in readers:
                _add_branch(plan, self._ask_reader(node, slot, value, affine, depth))
        finally:
            self._open.remove(root)
        return plan

    def _ask_reader(self, node: Node, slot: int, value: Value, affine: Affine, depth: int) -> Plan:
        """Return a Plan in which one reader of `value` makes up for the affine."""
        if node.scope is not value.scope:
            raise Refusal("crosses-scope", f"{node.op} '{node.label}' in an inner graph reads it")
        row = self._row(node, depth)
        if row.forward is None:
            raise Refusal("no-absorber", f"{node.op} '{node.label}' reads it, {row.forward_refusal}")
        read = node.inputs[slot]
        assert read is not None, "a reader reads"
        transfers = row.forward(node, Traveler(affine, read, slot, self.strategy, self.origin), self.view)
        plan = self._first(transfers, node, lambda at, behind, _: self.forward(node.outputs[at], behind, depth + 1), depth)
        if read is not value and read.producer is not None:
            plan.crossed[read.producer] = None
        return plan

    # ---- in either direction ----

    def _row(self, node: Node, depth: int) -> Row:
        self._steps += 1
        if self._is_exhausted():
            raise Refusal("too-far", f"more than {MOST_STEPS} nodes would have to change by {node.op} '{node.label}'")
        if node is self.origin.node:
            raise Refusal("reads-twice", f"the way comes back to {node.op} '{node.label}' itself")
        if depth > LONGEST_WAY:
            raise Refusal("too-far", f"the way is longer than {LONGEST_WAY} nodes at {node.op} '{node.label}'")
        row = row_of(node, self.view)
        if row.transfers:
            self.view.check(node)
        return row

    def _first(self, transfers: Transfer | Iterable[Transfer], node: Node, follow: _Follow, depth: int) -> Plan:
        """Return the plan of the first transfer that works out; Refusal where none does."""
        refused: tuple[ReasonCode, str] | None = None
        for transfer in [transfers] if isinstance(transfers, Transfer) else transfers:
            try:
                return self._followed(transfer, node, follow, depth)
            except Refusal as refusal:
                # Why a way around an operand failed says less than why the operand cannot take the scale.
                if refused is None or transfer.skip is None:
                    refused = refusal.code, refusal.sentence
                if self._is_exhausted():
                    break
        raise Refusal(*(refused or ("no-absorber", f"{node.op} '{node.label}' of nothing takes nothing")))

    def _is_exhausted(self) -> bool:
        return self._steps > MOST_STEPS and self.strategy != "plain"

    def _followed(self, transfer: Transfer, node: Node, follow: _Follow, depth: int) -> Plan:
        """Return the plan of a transfer and of everything that it asks further."""
        plan = _plan_of(transfer, node)
        for at, affine in transfer.passed_on:
            skip = transfer.skip[1] if transfer.skip is not None and transfer.skip[0] == at else None
            _add_branch(plan, follow(at, affine, skip))
        for at, affine in transfer.required:
            _add_branch(plan, self._ask_input(node, at, affine, depth))
        return plan


def _plan_of(transfer: Transfer, node: Node) -> Plan:
    """Return what a transfer changes itself."""
    plan = Plan(path={node: None}, alike=dict.fromkeys(transfer.lifted))
    if transfer.constants:
        plan.absorbers[node] = None
    if transfer.attributes:
        plan.attributes[node] = transfer.attributes
    for slot, constant in transfer.constants.items():
        if isinstance(constant, Requantized):
            plan.path[constant.node] = None
            plan.constants.update(constant.constants())
            plan.attributes[constant.node] = {"axis": constant.axis}
        else:
            plan.constants[node, slot] = constant
    if transfer.merge is not None:
        sibling, stays = transfer.merge.sibling, node.inputs[transfer.merge.stays]
        assert stays is not None, "the sum has two operands"
        plan.constants.update({(sibling, slot): constant for slot, constant in transfer.merge.constants.items()})
        plan.path, plan.absorbers = dict.fromkeys([sibling, *transfer.merge.via]), {sibling: None}
        plan.bypassed = {node: stays}
    return plan


def _add_branch(plan: Plan, branch: Plan) -> None:
    """Add what another branch changes; two branches may not meet in one node, nor change one that leaves."""
    met = next((node for node in (*branch.path, *branch.alike) if node in plan.path or node in plan.alike), None)
    if met is not None:
        raise Refusal("reads-twice", f"two ways meet in {met.op} '{met.label}'")
    plan.join(branch)


def _refused_reader(node: Node, value: Value) -> Refusal:
    return Refusal("other-readers", f"{node.op} '{node.label}' reads the value '{value.name}' before it too")


def _refused_source(value: Value) -> Refusal:
    if value.is_input and value.initializer is None:
        return Refusal("reads-input", f"it reads the graph input '{value.name}', and nothing before it could take it")
    return Refusal("reads-constant", f"it reads the constant '{value.name}'")
