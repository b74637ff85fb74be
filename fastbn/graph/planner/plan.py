"""A plan: what one fold, or several that meet, changes in a model."""

from dataclasses import dataclass, field
from typing import Optional

from fastbn.graph.model.constant import Constant
from fastbn.graph.model.node import Node, Shape, Value
from fastbn.graph.ops.row import Attribute

__all__ = ["Plan"]

# No operator of the registry has a constant behind this many inputs: BatchNormalization has five.
MOST_SLOTS = 5


@dataclass(eq=False)
class Plan:
    """Absorbers that change together, and every affine that moves into them.

    Sets of nodes are dicts without values, which keep their order: a long plan is asked and joined quickly.

    Attributes
    ----------
    constants : dict of (node, input slot) -> constant
        What the nodes read instead.
    attributes : dict of node -> dict of str -> value
        Attributes to set.
    lifted : list of Node
        The nodes whose affines were taken, in order.
    bypassed : dict of node -> value
        Nodes that leave with them, and the operand that takes the place of what they gave.
    rewritten : list of Node
        Batch normalizations that no constant takes in, which leave as other operators; no member of `lifted`.
    replaced : dict of node -> tuple of node
        Lifted nodes with the Add that stays in their place, and rewritten ones with what they become, in the order of the data flow: the
        first reads the data, each other one what the one before gives, and the last gives the output.
    path : dict of node -> None
        The nodes that absorb an affine or let it pass, in the order of travel.
    absorbers : dict of node -> None
        Those that absorb.
    crossed : dict of node -> None
        Removed nodes in whose place an affine passed.
    beside : dict of node -> None
        Nodes that stay as they are, by which one value is a multiple of another: the proof has to run them too.
    alike : dict of node -> None
        Nodes with the same affine that are lifted too.
    widened : dict of value -> shape
        Values of one element that have one per channel afterwards.
    channels : int
    number : int
        Its age: the number of owned nodes when it was made.
    joined : Plan or None
        The plan that has taken it over.
    """

    constants: dict[tuple[Node, int], Constant] = field(default_factory=dict)
    attributes: dict[Node, dict[str, Attribute]] = field(default_factory=dict)
    lifted: list[Node] = field(default_factory=list)
    bypassed: dict[Node, Value] = field(default_factory=dict)
    rewritten: list[Node] = field(default_factory=list)
    replaced: dict[Node, tuple[Node, ...]] = field(default_factory=dict)
    path: dict[Node, None] = field(default_factory=dict)
    absorbers: dict[Node, None] = field(default_factory=dict)
    crossed: dict[Node, None] = field(default_factory=dict)
    beside: dict[Node, None] = field(default_factory=dict)
    alike: dict[Node, None] = field(default_factory=dict)
    widened: dict[Value, Shape] = field(default_factory=dict)
    channels: int = 0
    number: int = 0
    joined: Optional["Plan"] = None

    def join(self, other: "Plan") -> None:
        """Take over what another plan holds."""
        self.constants.update(other.constants)
        self.attributes.update(other.attributes)
        self.bypassed.update(other.bypassed)
        self.replaced.update(other.replaced)
        self.path.update(other.path)
        self.absorbers.update(other.absorbers)
        self.crossed.update(other.crossed)
        self.beside.update(other.beside)
        self.alike.update(other.alike)
        self.widened.update(other.widened)
        self.lifted.extend(other.lifted)
        self.rewritten.extend(other.rewritten)
        self.channels = max(self.channels, other.channels)

    @property
    def leaving(self) -> list[Node]:
        """The nodes whose affines it moves or writes in another way."""
        return [*self.lifted, *self.rewritten]

    @property
    def added(self) -> list[Node]:
        """The nodes that stand in the place of others."""
        return [node for nodes in self.replaced.values() for node in nodes]

    def forget(self, node: Node) -> None:
        """Leave out what was to change of a node that is removed now."""
        for slot in range(MOST_SLOTS):
            self.constants.pop((node, slot), None)
        self.attributes.pop(node, None)
        self.path.pop(node, None)
        self.beside.pop(node, None)
        self.absorbers.pop(node, None)
