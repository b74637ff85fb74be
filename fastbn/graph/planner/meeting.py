"""One affine against the data flow where ways meet again: a value that forks is asked once, for what all its readers want of it."""

from dataclasses import replace
from typing import NamedTuple, TypeAlias

from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine, agreed
from fastbn.graph.ops.placing import axis_of
from fastbn.graph.ops.row import Skip, Transfer
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.search import Search, add_branch, plan_of, refused_source
from fastbn.graph.planner.view import refused_reader
from fastbn.graph.reasons import Refusal

__all__ = ["Meeting"]


class _Wish(NamedTuple):
    """What one input slot of a node asks of the value that it reads."""

    affine: Affine
    skip: Skip | None
    depth: int


# Readers of a value, by node and input slot, and what they ask.
_Wishes: TypeAlias = dict[tuple[Node, int], _Wish]

# Producers that have yet to be asked, by value.
_Pending: TypeAlias = dict[Node, dict[Value, _Wishes]]


class Meeting(Search):
    """A search that asks the producer of a value once everything behind it has been asked, so that all wishes are known.

    What an alternative of a node comes to is only known where the last value was asked: each is followed to the end, one after another.
    """

    def meet(self, value: Value, affine: Affine, asker: Node, slot: int) -> Plan:
        """Return a Plan as `backward` does, by ways that may fork and meet again.

        Raises
        ------
        Refusal
            There is no such plan.
        """
        pending: _Pending = {}
        crossed = self._wished(pending, value, asker, slot, _Wish(affine, None, 0))
        crossed.join(self._settled_from(pending))
        return crossed

    def _wished(self, pending: _Pending, value: Value, asker: Node, slot: int, wish: _Wish) -> Plan:
        """Note a wish; return a Plan of what it changes at once."""
        if wish.depth and self.view.constant(value) is not None:
            if wish.skip is not None:
                raise refused_source(value)
            return self._into_constant(asker, slot, wish.affine)
        removed = value.producer if value.producer in self.view.removed else None
        value = self.view.source(value)
        producer = self.view.producer(value)
        if producer is None:
            raise refused_source(value)
        pending.setdefault(producer, {}).setdefault(value, {})[asker, slot] = wish
        return Plan() if removed is None else Plan(crossed={removed: None})

    def _settled_from(self, pending: _Pending) -> Plan:
        """Return a Plan for everything that is pending; Refusal where there is none."""
        if not pending:
            return Plan()
        # Nothing that is pending is behind the last of them, so that nobody else can ask it any more.
        node = max(pending, key=lambda each: each.order)
        wishes = [wish for uses in pending[node].values() for wish in uses.values()]
        depth = max(wish.depth for wish in wishes)
        with self._question("backward", node, wishes[0].affine, depth):
            plan, transfers = self._asked_at_once(node, pending[node], depth)
            refused: Refusal | None = None
            for transfer in transfers:
                try:
                    left = {
                        other: {value: {**uses} for value, uses in asked.items()} for other, asked in pending.items() if other is not node
                    }
                    branch = self._passed_on(node, transfer, left, depth)
                    add_branch(branch, self._settled_from(left))
                    add_branch(branch, plan)
                except Refusal as refusal:
                    if refused is None or transfer.skip is None:  # as in Search._first: it says more than why a detour was refused
                        refused = refusal.with_traceback(None)
                    if self._is_exhausted():
                        break
                else:
                    return branch
            raise refused or Refusal("no-absorber", f"{node.op} '{node.label}' of nothing takes nothing")

    def _asked_at_once(self, node: Node, asked: dict[Value, _Wishes], depth: int) -> tuple[Plan, list[Transfer]]:
        """Return (a Plan of what readers undo who ask for nothing, what the node can do); Refusal where its readers do not agree."""
        plan, whole = Plan(), dict[Value, _Wish]()
        for value, uses in asked.items():
            wish = whole[value] = self._agreed(node, value, uses)
            others = self._other_readers(value, wish.affine, uses.keys())
            if others and wish.skip is not None:
                raise refused_reader(others[0][0], value)
            if others:
                add_branch(plan, self._undone(others, value, wish.affine.inverse(), depth))
        value, wish = next(iter(whole.items()))
        asker = next(iter(asked[value]))[0]
        if len(whole) == 1:
            _, transfers, wide = self._offered(value, wish.affine, asker, depth, wish.skip)
            if wide is not None:
                plan.widened[value] = wide
            return plan, [transfers] if isinstance(transfers, Transfer) else [*transfers]
        _, row = self._producer(value, asker, depth)
        if row.meet is None or any(each.skip is not None for each in whole.values()):
            raise Refusal("reads-twice", f"two ways meet in {node.op} '{node.label}'")
        return plan, [row.meet(node, {each.slot: one.affine for each, one in whole.items()}, self.view)]

    def _agreed(self, node: Node, value: Value, uses: _Wishes) -> _Wish:
        """Return the one wish that all readers of a value have; Refusal where they have several."""
        wishes = list(uses.values())
        if len(wishes) == 1:
            return wishes[0]
        affines = [replace(each.affine, axis=axis_of(node, each.affine, value, self.view), rank=0) for each in wishes]
        affine = agreed(affines)
        if affine is None or any(each.skip is not None for each in wishes):
            readers = " and ".join(f"{reader.op} '{reader.label}'" for reader, _ in [*uses][:2])
            raise Refusal("other-readers", f"{readers} read the value '{value.name}', and would need it changed in different ways")
        return _Wish(affine, None, max(each.depth for each in wishes))

    def _passed_on(self, node: Node, transfer: Transfer, pending: _Pending, depth: int) -> Plan:
        """Return what a transfer changes itself, with what it asks further noted in `pending`."""
        plan = plan_of(transfer, node)
        if self.view.guard is not None:
            self.view.guard.refuse_changes(plan, self.view.index)
        if transfer.objection is not None:
            raise transfer.objection
        for slot, affine in transfer.passed_on:
            skip = transfer.skip[1] if transfer.skip is not None and transfer.skip[0] == slot else None
            plan.join(self._wished(pending, node.required_input(slot), node, slot, _Wish(affine, skip, depth + 1)))
        return plan
