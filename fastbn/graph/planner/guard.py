"""What a plan must not do: the rules of a caller who can write some changes only."""

from typing import Protocol

from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Node
from fastbn.graph.planner.plan import Plan

__all__ = ["Guard"]


class Guard(Protocol):
    """Which changes of a model somebody can make: asked at every step of a search, so that the search looks for another way."""

    @property
    def may_keep_shifts(self) -> bool:
        """Whether an Add may stay in the place of a batch normalization."""
        ...

    def refuse_leaving(self, node: Node) -> None:
        """Raise Refusal where a node may not be taken out."""
        ...

    def refuse_changes(self, plan: Plan, index: Index) -> None:
        """Raise Refusal where a plan, or a part of one, changes what may not change or bypasses what may not leave."""
        ...
