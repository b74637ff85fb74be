"""Which folds a comparison of outputs reaches: values on whose elements an output depends."""

from collections.abc import Iterable

from fastbn.graph.model import Index, Node, Value
from fastbn.graph.nesting import bodies
from fastbn.graph.plan import Planning
from fastbn.graph.site import SHAPE_READERS, Plan

__all__ = ["unreached"]


def unreached(index: Index, planning: Planning, outputs: Iterable[str]) -> list[Plan]:
    """Return the plans on which an output of the model depends, but none of these values of the main graph."""
    names, owners = set(outputs), _owners(index)
    ends = {info.name for info in index.proto.graph.output}
    return [plan for plan in planning.plans if not _reaches(plan, index, owners, names) and _reaches(plan, index, owners, ends)]


def _owners(index: Index) -> dict[int, Node]:
    """Return the node that each inner scope belongs to, by the scope's number: scopes are numbered outermost first."""
    holders = [node for scope in index.scopes for node in scope.nodes for _ in bodies(node.proto)]
    return dict(enumerate(holders, start=1))


def _reaches(plan: Plan, index: Index, owners: dict[int, Node], names: set[str]) -> bool:
    pending: list[Value] = [value for node in plan.lifted for value in node.outputs if value is not None]
    seen = set(pending)
    while pending:
        value = pending.pop()
        if value.scope is index.main and value.name in names:
            return True
        following = [node for node, slot in value.readers if not _ignores_elements(node, slot)]
        if value.is_output and value.scope.number in owners:
            following.append(owners[value.scope.number])
        fresh = {output for node in following for output in node.outputs if output is not None} - seen
        seen |= fresh
        pending.extend(fresh)
    return False


def _ignores_elements(node: Node, slot: int) -> bool:
    return node.is_op(*SHAPE_READERS, "RandomNormalLike", "RandomUniformLike") or (node.is_op("CastLike") and slot == 1)
