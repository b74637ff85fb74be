"""The search: one affine on its way through the present graph, until every branch of it has found an absorber."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from fastbn.errors import ModelError, expected
from fastbn.graph.model.node import Node, Shape, Value
from fastbn.graph.model.quantized import Requantized
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.normalization import is_batch_norm
from fastbn.graph.ops.placing import is_wide
from fastbn.graph.ops.registry import row_of
from fastbn.graph.ops.row import Origin, Row, Rule, Skip, Strategy, Transfer, Traveler
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.record import Record
from fastbn.graph.planner.view import GraphView, refused_reader
from fastbn.graph.reasons import ReasonCode, Refusal

__all__ = ["FORKED", "Search", "add_branch", "plan_of", "refused_source"]

# The most nodes that one search visits with a strategy other than "plain". Without a limit it could walk all of a long residual
# stream, and that for each of its batch normalizations. Nodes of some kinds do not count: exporters write them between any others.
MOST_STEPS = 30
UNCOUNTED = ("Identity", "Cast", "Transpose")

# Nodes that one affine is followed through in a row.
LONGEST_WAY = 100

# Refusals at a value, or a node, that several ways may have come from.
FORKED: tuple[ReasonCode, ...] = ("other-readers", "other-outputs", "reads-twice")


@dataclass
class _Arrivals:
    """What has come to a node by inputs of it, in a search forward: slot -> affine, slot -> the value that the search followed there."""

    depth: int
    affines: dict[int, Affine] = field(default_factory=dict)
    values: dict[int, Value] = field(default_factory=dict)


# How a search goes on from a node: (slot, affine, skip) -> Plan. The slot is that of an output forward, of an input backward.
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
    record : Record, optional
        Where to write down what is asked and answered.
    """

    def __init__(self, view: GraphView, origin: Origin, strategy: Strategy, record: Record | None = None) -> None:
        self.view = view
        self.origin = origin
        self.strategy: Strategy = strategy
        self._refused: dict[tuple[Value, bool, bool, Value | None], tuple[ReasonCode, str]] = {}
        self._open: set[Value] = set()
        # Nodes that may join several branches of the search at hand: they are asked once all branches have come as far as them.
        self._waiting: dict[Node, _Arrivals] = {}
        self._steps = 0
        self._record = record
        # Whether the affine was refused at a value that others read, or a node that others ask: ways may have come from there together.
        self.has_forked = False

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
        source = self.view.source(value)
        try:
            with self._question("backward", self.view.producer(source) or source, affine, depth):
                return self._ask_producer(value, affine, asker, slot, depth, skip)
        except Refusal as refusal:
            self.has_forked |= refusal.code in FORKED
            if refusal.code != "reads-twice":  # this refusal depends on the path of the search, so it is not remembered
                self._refused[key] = refusal.code, refusal.sentence
            raise

    def _ask_producer(self, value: Value, affine: Affine, asker: Node, slot: int, depth: int, skip: Skip | None) -> Plan:
        if depth and self.view.constant(value) is not None:
            if skip is not None:
                raise refused_source(value)
            return self._into_constant(asker, slot, affine)
        crossed = {value.producer: None} if value.producer is not None and value.producer in self.view.removed else {}
        value = self.view.source(value)
        if value in self._open:
            raise Refusal("reads-twice", f"two ways meet in the value '{value.name}'")
        others = self._other_readers(value, affine, [(asker, slot)])
        if others and skip is not None:  # which no constant of theirs undoes
            raise refused_reader(others[0][0], value)
        node, transfers, wide = self._offered(value, affine, asker, depth, skip)

        def follow(at: int, asked: Affine, added: Skip | None) -> Plan:
            return self._ask_input(node, at, asked, depth, added)

        self._open.add(value)
        try:
            plan = self._first(transfers, node, follow, depth)
            if others:
                add_branch(plan, self._undone(others, value, affine.inverse(), depth))
        finally:
            self._open.remove(value)
        plan.crossed.update(crossed)
        if wide is not None:
            plan.widened[value] = wide
        return plan

    def _offered(
        self, value: Value, affine: Affine, asker: Node, depth: int, skip: Skip | None
    ) -> tuple[Node, Transfer | Iterable[Transfer], Shape | None]:
        """Return (the producer of a value, what it can do, the shape of a value that becomes wider); Refusal where there is nothing."""
        node, row = self._producer(value, asker, depth)
        wide = self._wide_shape(value, affine) if depth else None
        if wide is not None and not row.takes_wide:
            raise Refusal("axis", f"{node.op} '{node.label}' gives one number, and {affine.channels} channels need one each")
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
        return node, transfers, wide

    def _wide_shape(self, value: Value, affine: Affine) -> Shape | None:
        """Return the shape of a value of one element for which an affine has several channels; None of any other."""
        shape = self.view.shape(value) if affine.channels > 1 else None
        if shape is None or not is_wide(affine, shape):
            return None
        return np.broadcast_shapes((1,) * len(shape), affine.shaped(len(shape))[0].shape)

    def _producer(self, value: Value, asker: Node, depth: int) -> tuple[Node, Row]:
        """Return the node that gives a value and its row; Refusal where it cannot be asked."""
        node = self.view.producer(value)
        if node is None:
            raise refused_source(value)
        if node.scope is not asker.scope:
            raise Refusal("crosses-scope", f"it reads '{value.name}' of {node.op} '{node.label}' in an outer graph")
        row = self._row(node, depth)
        if row.backward is None or (value.slot and not row.parts):
            raise Refusal("no-absorber", f"it reads {node.op} '{node.label}', which cannot take or pass it")
        others = [other for slot, other in enumerate(node.outputs) if other is not None and other is not value and slot not in row.apart]
        if not row.parts and any(other.readers or other.is_output for other in others):
            raise Refusal("other-outputs", f"{node.op} '{node.label}' hands out more than one value")
        return node, row

    def _ask_input(self, node: Node, slot: int, affine: Affine, depth: int, skip: Skip | None = None) -> Plan:
        value = node.inputs[slot]
        assert value is not None, "a row asks the inputs that there are"
        return self.backward(value, affine, node, slot, depth + 1, skip)

    def _other_readers(self, value: Value, affine: Affine, askers: Collection[tuple[Node, int]]) -> list[tuple[Node, int]]:
        """Return the other readers of a value, where they may be asked to undo the affine; Refusal otherwise."""
        others = self.view.other_readers(value, askers, MOST_STEPS + 1)
        if others:
            # A changed constant belongs to one input slot: other readers would still read the constant as it was.
            is_fixed = self.strategy == "plain" or self.view.constant(value) is not None or (affine.scale == 0).any()
            if is_fixed or len(others) > MOST_STEPS:
                raise refused_reader(others[0][0], value)
        return others

    def _undone(self, readers: Sequence[tuple[Node, int]], value: Value, affine: Affine, depth: int) -> Plan:
        """Return a Plan in which the other readers of a value that changes undo the change in their own constants."""
        refused = readers[0][0]

        def ask() -> Plan:
            nonlocal refused
            plan = Plan()
            for node, slot in readers:
                refused = node
                add_branch(plan, self._ask_reader(node, slot, value, affine, depth))
            return plan

        try:
            return self._settled(ask)
        except Refusal:
            pass  # the reason that is reported is the other reader
        raise refused_reader(refused, value)

    def _into_constant(self, node: Node, slot: int, affine: Affine) -> Plan:
        constant = self.view.dense(node, slot)
        rank = len(constant.shape)
        if affine.rank > rank:
            raise Refusal(
                "axis", f"a constant of rank {affine.rank} widens the constant at {node.op} '{node.label}', which has rank {rank}"
            )
        if affine.axis is not None and (not -rank <= affine.axis < rank or constant.shape[affine.axis] != affine.channels):
            raise Refusal("axis", f"the constant at {node.op} '{node.label}' has no axis of {affine.channels} channels")
        plan = Plan(constants={(node, slot): constant.affine(*affine.shaped(rank))})
        if self.view.guard is not None:
            self.view.guard.refuse_changes(plan, self.view.index)
        return plan

    # ---- along the data flow ----

    def forward(self, value: Value | None, affine: Affine) -> Plan:
        """Return a Plan that makes every reader of `value` work on what lacks the affine; raises Refusal where there is none."""
        return self._settled(lambda: self._ask_readers(value, affine, 0))

    def _ask_readers(self, value: Value | None, affine: Affine, depth: int) -> Plan:
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
                add_branch(plan, self._ask_reader(node, slot, value, affine, depth))
        finally:
            self._open.remove(root)
        return plan

    def _ask_reader(self, node: Node, slot: int, value: Value, affine: Affine, depth: int) -> Plan:
        """Return a Plan in which one reader of `value` makes up for the affine; an empty one where it waits for other branches."""
        if node.scope is not value.scope:
            raise Refusal("crosses-scope", f"{node.op} '{node.label}' in an inner graph reads it")
        if row_of(node, self.view).join is None:
            with self._question("forward", node, affine, depth):
                row = self._row(node, depth)
                if row.forward is None:
                    raise Refusal("no-absorber", f"{node.op} '{node.label}' reads it, {row.forward_refusal}")
                return self._answered(node, slot, value, affine, row.forward, depth)
        self._row(node, depth)
        arrivals = self._waiting.setdefault(node, _Arrivals(depth))
        if slot in arrivals.affines:
            raise Refusal("reads-twice", f"two ways meet in {node.op} '{node.label}'")
        arrivals.affines[slot], arrivals.values[slot] = affine, value
        return Plan()

    def _answered(self, node: Node, slot: int, value: Value, affine: Affine, rule: Rule, depth: int) -> Plan:
        """Return the Plan of one reader that is asked alone."""
        transfers = rule(node, Traveler(affine, node.required_input(slot), slot, self.strategy, self.origin), self.view)
        plan = self._first(transfers, node, lambda at, behind, _: self._ask_readers(node.outputs[at], behind, depth + 1), depth)
        plan.crossed.update(_crossed(node, slot, value))
        return plan

    def _settled(self, ask: Callable[[], Plan]) -> Plan:
        """Return what `ask` returns, joined with the plans of the nodes that have waited for it to reach them by several inputs."""
        outer, self._waiting = self._waiting, {}
        try:
            plan = ask()
            while self._waiting:
                # No branch can reach the first of them any more: all that still move are behind it.
                node = min(self._waiting, key=lambda each: each.order)
                add_branch(plan, self._joined(node, self._waiting.pop(node)))
            return plan
        finally:
            self._waiting = outer

    def _joined(self, node: Node, arrivals: _Arrivals) -> Plan:
        """Return the Plan of a node to which affines have come by one input or by several."""
        row, depth = row_of(node, self.view), arrivals.depth
        assert row.forward is not None, "only nodes with a rule wait"
        assert row.join is not None, "only nodes that can join wait"
        slot, affine = next(iter(arrivals.affines.items()))
        with self._question("forward", node, affine, depth):
            if len(arrivals.affines) == 1:
                return self._answered(node, slot, arrivals.values[slot], affine, row.forward, depth)
            transfer = row.join(node, arrivals.affines, self.view)
            plan = self._first(transfer, node, lambda at, behind, _: self._ask_readers(node.outputs[at], behind, depth + 1), depth)
        for slot, value in arrivals.values.items():
            plan.crossed.update(_crossed(node, slot, value))
        return plan

    # ---- in either direction ----

    def _question(
        self, direction: Literal["backward", "forward"], asked: Node | Value, affine: Affine, depth: int
    ) -> AbstractContextManager[None]:
        """Return a context that writes down a question and its answer, where that is wanted."""
        return nullcontext() if self._record is None else self._record.question(self.strategy, direction, asked, affine, depth)

    def _row(self, node: Node, depth: int) -> Row:
        self._steps += not node.is_op(*UNCOUNTED)
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
        waiting = _copied(self._waiting)
        for transfer in [transfers] if isinstance(transfers, Transfer) else transfers:
            try:
                return self._followed(transfer, node, follow, depth)
            except Refusal as refusal:
                self._waiting = _copied(waiting)  # without what a way has left there that came to nothing
                # Why an operand cannot take the scale says more than why its detour, a transfer with a skip, was refused.
                if refused is None or transfer.skip is None:
                    refused = refusal.code, refusal.sentence
                if self._is_exhausted():
                    break
        raise Refusal(*(refused or ("no-absorber", f"{node.op} '{node.label}' of nothing takes nothing")))

    def _is_exhausted(self) -> bool:
        return self._steps > MOST_STEPS and self.strategy != "plain"

    def _followed(self, transfer: Transfer, node: Node, follow: _Follow, depth: int) -> Plan:
        """Return the plan of a transfer and of everything that it asks further."""
        plan = plan_of(transfer, node)
        if self.view.guard is not None:
            self.view.guard.refuse_changes(plan, self.view.index)
        for at, affine in transfer.passed_on:
            skip = transfer.skip[1] if transfer.skip is not None and transfer.skip[0] == at else None
            add_branch(plan, follow(at, affine, skip))
        for at, affine in transfer.required:
            add_branch(plan, self._ask_input(node, at, affine, depth))
        if transfer.objection is not None:
            raise transfer.objection
        return plan


def _copied(waiting: dict[Node, _Arrivals]) -> dict[Node, _Arrivals]:
    return {node: _Arrivals(each.depth, {**each.affines}, {**each.values}) for node, each in waiting.items()}


def plan_of(transfer: Transfer, node: Node) -> Plan:
    """Return what a transfer changes itself."""
    plan = Plan(path={node: None}, alike=dict.fromkeys(transfer.alike), beside=dict.fromkeys(transfer.beside))
    if transfer.constants:
        plan.absorbers[node] = None
    if transfer.attributes:
        plan.attributes[node] = transfer.attributes
    for slot, constant in transfer.constants.items():
        if isinstance(constant, Requantized):
            plan.path.update(dict.fromkeys((*(step for step, _ in constant.constants), *constant.via)))
            plan.constants.update(constant.constants)
            plan.attributes.update({step: {"axis": axis} for step, axis in constant.axes.items()})
        else:
            plan.constants[node, slot] = constant
    if transfer.merge is not None:
        sibling, stays = transfer.merge.sibling, node.inputs[transfer.merge.stays]
        assert stays is not None, "the sum has two operands"
        plan.constants.update({(sibling, slot): constant for slot, constant in transfer.merge.constants.items()})
        plan.path, plan.absorbers = dict.fromkeys([sibling, *transfer.merge.via]), {sibling: None}
        plan.bypassed = {node: stays}
    return plan


def _crossed(node: Node, slot: int, value: Value) -> dict[Node, None]:
    """Return the removed node behind which a reader of `value` stood, if any."""
    read = node.required_input(slot)
    return {read.producer: None} if read is not value and read.producer is not None else {}


def add_branch(plan: Plan, branch: Plan) -> None:
    """Add what another branch changes; two branches may not meet in one node, nor change one that leaves."""
    met = next((node for node in (*branch.path, *branch.alike) if node in plan.path or node in plan.alike), None)
    if met is not None:
        raise Refusal("reads-twice", f"two ways meet in {met.op} '{met.label}'")
    plan.join(branch)


def refused_source(value: Value) -> Refusal:
    if value.is_input and value.initializer is None:
        return Refusal("reads-input", f"it reads the graph input '{value.name}', and nothing before it could take it")
    return Refusal("reads-constant", f"it reads the constant '{value.name}'")
