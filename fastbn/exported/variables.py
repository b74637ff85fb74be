"""Constants of an exported graph as variables of the model that it was made of: which may change, and what they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.normalization import is_batch_norm
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.planning import Planning
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["Changes", "Norm", "Variables"]

# Operators that only move the elements of a variable on its way to its reader.
MOVES = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")

# Those beside them whose results may share the memory of what they read.
PARTS = ("Slice", "Split", "Expand")

# The input slot of the running mean of a BatchNormalization, by which its layer is known.
MEAN = 3


class Norm(NamedTuple):
    """A batch normalization of the model: its name, and why it cannot be taken out of the model, if so."""

    name: str
    objection: str | None = None


@dataclass
class Changes:
    """What folding makes of a model.

    Attributes
    ----------
    values : dict of str -> array
        New values of variables.
    shifts : dict of str -> array
        Batch normalizations of which an addition stays, and what is added, in a shape that broadcasts over their data.
    zeros : set of str
        Those that went into what is added to them: zeros stay in their place.
    gone : set of str
        All that leave, those above included.
    aliases : set of str
        Those of them whose input others see too: with nothing in their place, what writes over their output writes over that.
    """

    values: dict[str, Array] = field(default_factory=dict)
    shifts: dict[str, Array] = field(default_factory=dict)
    zeros: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    aliases: set[str] = field(default_factory=set)


class Variables:
    """The variables and the batch normalizations of a model, by the names that the graph has for them: a planner.guard.Guard.

    Parameters
    ----------
    objections : mapping of str -> str or None
        Variable -> why it may not change, None where it may.
    norms : mapping of str -> Norm
        Name of a running mean -> its batch normalization.
    may_insert : bool
        Whether an addition or zeros may stand in the place of a batch normalization.
    """

    def __init__(self, objections: Mapping[str, str | None], norms: Mapping[str, Norm], may_insert: bool) -> None:
        self.objections = objections
        self.norms = norms
        self.may_keep_shifts = may_insert

    def norm_of(self, node: Node) -> Norm | None:
        """Return the batch normalization of the model that a node is, None where it is none."""
        value = node.input(MEAN) if is_batch_norm(node) else None
        return None if value is None else self.norms.get(value.name)

    def refuse_leaving(self, node: Node) -> None:
        """Refuse all nodes but those that are one call of a batch normalization of the model, which may be taken out."""
        norm = self.norm_of(node)
        if norm is None:
            raise Refusal("no-module", f"{node.op} '{node.label}' is in the code of the model, and no layer of its own")
        if norm.objection is not None:
            raise Refusal("no-module", norm.objection)
        calls = len(node.required_input(MEAN).readers)
        if calls > 1:
            raise Refusal("no-module", f"it is called {calls} times")

    def refuse_changes(self, plan: Plan, index: Index) -> None:
        """Refuse constants that are no variables, or that have another shape in the model, and nodes that leave with no layer."""
        for (node, slot), constant in plan.constants.items():
            if _is_substitute(node, index):  # the addition that stays of a batch normalization
                continue
            self._variable(node, slot)
            old = index.constant(node.input(slot))
            if old is None or old.shape != constant.shape:
                raise Refusal("no-module", f"the constant of {node.op} '{node.label}' would have shape {constant.shape}")
        for node in plan.attributes:
            raise Refusal("no-module", f"attributes of {node.op} '{node.label}' would change")
        for node, stays in plan.bypassed.items():
            if not self.may_keep_shifts or not node.is_op("Add") or _other(node, stays) is None:
                raise Refusal("no-module", f"{node.op} '{node.label}' is in the code of the model, which stays")

    def _variable(self, node: Node, slot: int) -> tuple[str, list[Node]]:
        """Return (the variable at a slot, the nodes that move its elements there, the last first); Refusal where it may not change."""
        value = node.input(slot)
        if value is None:
            raise Refusal("no-module", f"{node.op} '{node.label}' has no bias, and its layer takes none")
        steps: list[Node] = []
        shared: Value | None = None
        while True:
            shared = value if len(value.readers) > 1 or value.is_output else shared
            producer = value.producer
            if producer is None:
                break
            if not producer.is_op(*MOVES):
                what = "is a number in the code of the model" if producer.is_op("Constant") else "is computed from its variables"
                raise Refusal("no-module", f"what {node.op} '{node.label}' reads {what}")
            steps.append(producer)
            value = producer.required_input(0)
        if value.name not in self.objections:
            raise Refusal("no-module", f"'{value.name}', which {node.op} '{node.label}' reads, is no variable of the model")
        objection = self.objections[value.name]
        if objection is not None:
            raise Refusal("no-module", objection)
        if shared is not None:
            raise Refusal("no-module", f"'{shared.name}' is read in {len(shared.readers) + shared.is_output} places")
        return value.name, steps

    def changes(self, planning: Planning, index: Index) -> Changes:
        """Return what the plans make of the model."""
        changes, view = Changes(), planning.view
        for plan in planning.plans:
            adds = {node: norm for norm, nodes in plan.replaced.items() for node in nodes}
            for (node, slot), constant in plan.constants.items():
                if node in adds:
                    changes.shifts[self._name(adds[node])] = constant.array()
                elif node not in view.removed and node not in view.replaced:
                    name, steps = self._variable(node, slot)
                    changes.values[name] = _moved_back(constant.array(), steps, index)
            others = (_other(node, stays) for node, stays in plan.bypassed.items())
            changes.zeros.update(self._name(other) for other in others if other is not None)
            changes.gone.update(self._name(node) for node in plan.lifted)
            changes.aliases.update(self._name(node) for node in plan.lifted if _is_seen(node.required_input(0), planning.view))
        return changes

    def _name(self, node: Node) -> str:
        norm = self.norm_of(node)
        assert norm is not None, "refuse_leaving lets no other node leave"
        return norm.name


def _is_substitute(node: Node, index: Index) -> bool:
    """Say whether a node is none of the model, but stands in the place of one."""
    return index.scopes[node.scope.number].nodes[node.position] is not node


def _is_seen(value: Value, view: GraphView) -> bool:
    """Say whether more than one node, or the caller, may see the memory of a value."""
    while True:
        node = value.producer
        if node is None or len(value.readers) > 1 or value.is_output:
            return True
        if node not in view.removed and not node.is_op(*MOVES, *PARTS):
            return False
        value = node.required_input(0)


def _other(node: Node, stays: Value) -> Node | None:
    """Return the batch normalization that gives the operand of a sum which does not stay, or None."""
    others = [value.producer for value in node.inputs if value is not None and value is not stays]
    return others[0] if len(others) == 1 and others[0] is not None and is_batch_norm(others[0]) else None


def _moved_back(array: Array, steps: list[Node], index: Index) -> Array:
    """Return the elements of a constant in the places where the variable has them that these nodes have moved."""
    for node in steps:
        if node.is_op("Transpose"):
            axes = node.attribute("perm", [*range(array.ndim)][::-1])
            array = array.transpose(np.argsort(axes))
        else:
            before = index.constant(node.inputs[0])
            assert before is not None, "what a constant is made of is constant"
            array = array.reshape(before.shape)
    return array
