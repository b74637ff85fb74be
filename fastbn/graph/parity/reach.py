"""Which folds a comparison of outputs reaches: values on whose elements an output depends."""

from collections.abc import Iterable, Sequence

from onnx import NodeProto

from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import bodies
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.registry import ignores_elements
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.planning import Planning

__all__ = ["unreached"]


def unreached(index: Index, planning: Planning, outputs: Iterable[str], missed: Sequence[str] = ()) -> list[Plan]:
    """Return the plans on which an output of the model depends, but none of these values of the main graph.

    `missed` are the ways through the branches in which nothing was compared (comparable.with_branches).
    """
    names, owners = set(outputs), _owners(index)
    ends = {info.name for info in index.proto.graph.output}
    return [
        plan
        for plan in planning.plans
        if _reaches(plan, index, owners, ends) and (_is_missed(plan, owners, missed) or not _reaches(plan, index, owners, names))
    ]


def _owners(index: Index) -> dict[int, tuple[Node, str]]:
    """Return the node that each inner scope belongs to and the attribute that holds it, by number: scopes are numbered outermost first."""
    holders = [
        (node, attribute.name)
        for scope in index.scopes
        for node in scope.nodes
        for attribute in node.proto.attribute
        for _ in bodies(NodeProto(attribute=[attribute]))
    ]
    return dict(enumerate(holders, start=1))


def _is_missed(plan: Plan, owners: dict[int, tuple[Node, str]], missed: Sequence[str]) -> bool:
    """Say whether every way that takes the branches around a plan is one in which nothing was compared."""
    path: list[str] = []
    scope, may_not_run = plan.lifted[0].scope, False
    while scope.number in owners:
        owner, attribute = owners[scope.number]
        may_not_run = may_not_run or owner.is_op("If", "Loop")
        if owner.is_op("If"):
            path.insert(0, attribute.removesuffix("_branch"))
        scope = owner.scope
    ways = [way.split(" ")[0].split("/") if way.endswith(" branches") else [] for way in missed]
    along = [way for way in ways if way[: len(path)] == path[: len(way)]]
    return may_not_run and bool(along) and len(along) == 2 ** max(len(along[0]) - len(path), 0)


def _reaches(plan: Plan, index: Index, owners: dict[int, tuple[Node, str]], names: set[str]) -> bool:
    pending: list[Value] = [value for node in plan.lifted for value in node.outputs if value is not None]
    seen = set(pending)
    while pending:
        value = pending.pop()
        if value.scope is index.main and value.name in names:
            return True
        following = [node for node, slot in value.readers if not ignores_elements(node, slot)]
        if value.is_output and value.scope.number in owners:
            following.append(owners[value.scope.number][0])
        fresh = {output for node in following for output in node.outputs if output is not None} - seen
        seen |= fresh
        pending.extend(fresh)
    return False
