"""Which folds a comparison of outputs reaches: those on whose elements an output depends."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from onnx import NodeProto

from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import bodies
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.registry import ignores_elements
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.planning import Planning

__all__ = ["unreached"]

# Number of an inner scope -> the node that it belongs to, and the attribute that holds it.
Owners: TypeAlias = dict[int, tuple[Node, str]]


def unreached(index: Index, planning: Planning, outputs: Iterable[str], missed: Sequence[str] = ()) -> list[Plan]:
    """Return the plans on which an output of the model depends, but none of some values that were compared.

    Parameters
    ----------
    index : model.Index
    planning : planning.Planning
    outputs : iterable of str
        Names of the values of the main graph that were compared.
    missed : sequence of str
        The choices of branches in which nothing was compared (comparable.with_branches).
    """
    owners = _owners(index)
    reads = _reads(index, owners)
    of_outputs = _sources(index, reads, {info.name for info in index.proto.graph.output})
    of_compared = _sources(index, reads, set(outputs))

    def changes(plan: Plan, sources: set[Value]) -> bool:
        return any(value in sources for node in plan.leaving for value in node.outputs if value is not None)

    return [
        plan
        for plan in planning.plans
        if changes(plan, of_outputs) and (_is_missed(plan, owners, missed) or not changes(plan, of_compared))
    ]


def _owners(index: Index) -> Owners:
    # Scopes are numbered outermost first, in the order of their nodes.
    holders = [
        (node, attribute.name)
        for scope in index.scopes
        for node in scope.nodes
        for attribute in node.proto.attribute
        for _ in bodies(NodeProto(attribute=[attribute]))
    ]
    return dict(enumerate(holders, start=1))


def _is_missed(plan: Plan, owners: Owners, missed: Sequence[str]) -> bool:
    """Say whether nothing was compared in any choice that takes the branches around a plan."""
    path: list[str] = []
    scope, may_not_run = plan.leaving[0].scope, False
    while scope.number in owners:
        owner, attribute = owners[scope.number]
        may_not_run = may_not_run or owner.is_op("If", "Loop")
        if owner.is_op("If"):
            path.insert(0, attribute.removesuffix("_branch"))
        scope = owner.scope
    choices = [name.split(" ")[0].split("/") if name.endswith(" branches") else [] for name in missed]
    taken = [choice for choice in choices if choice[: len(path)] == path[: len(choice)]]
    return may_not_run and bool(taken) and len(taken) == 2 ** max(len(taken[0]) - len(path), 0)


def _reads(index: Index, owners: Owners) -> dict[Node, list[Value]]:
    """Return node -> the values on whose elements it depends: those that it reads, and the outputs of its bodies."""
    found: dict[Node, list[Value]] = {}
    for value in (value for scope in index.scopes for value in scope.values.values()):
        following = [node for node, slot in value.readers if not ignores_elements(node, slot)]
        if value.is_output and value.scope.number in owners:
            following.append(owners[value.scope.number][0])
        for node in following:
            found.setdefault(node, []).append(value)
    return found


def _sources(index: Index, reads: dict[Node, list[Value]], names: set[str]) -> set[Value]:
    """Return the values on whose elements one of these values of the main graph depends."""
    pending = [value for name, value in index.main.values.items() if name in names]
    seen = set(pending)
    while pending:
        producer = pending.pop().producer
        fresh = set() if producer is None else set(reads.get(producer, ())) - seen
        seen |= fresh
        pending.extend(fresh)
    return seen
