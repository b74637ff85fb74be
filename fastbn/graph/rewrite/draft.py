"""What a written model leaves out, where its new constants go and what grows: decided before anything is written."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import NamedTuple

from fastbn.graph.model.constant import Constant, Scaled
from fastbn.graph.model.cropping import scopes_within
from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Node, Use, Value
from fastbn.graph.ops.normalization import is_batch_norm, node_counts
from fastbn.graph.ops.registry import ignores_elements, operator_row
from fastbn.graph.planner.planning import Planning
from fastbn.graph.reasons import first_few
from fastbn.graph.report import size_text

__all__ = ["Draft", "Home"]

# A constant that takes this many bytes more than what it was computed from is reported.
LARGEST_UNSAID = 1 << 10


class Home(NamedTuple):
    """Where a folded constant goes: over the constant of the original whose place it takes, or beside it under a new name for its role."""

    old: Value | None
    is_over: bool
    role: str


class Draft:
    """What becomes of one model.

    Parameters
    ----------
    index : model.Index
    planning : Planning

    Attributes
    ----------
    unwritten : set of Node
        The nodes that are not written.
    added : dict of Node -> None
        Those that stand in the place of others.
    homes : dict of (node, input slot) -> Home
        Of each planned constant that a written node reads.
    left_out : dict of int -> frozenset of str
        By scope number, the initializers that no node reads any more; some of them are written over.
    unused_values : dict of int -> set of str
        By scope number, the values that no node gives any more.
    growth : dict of Node -> list of str
        What a node has for itself now and shared with others, or computed from less: the report says so.
    counts : (int, int)
        Nodes, and batch normalizations among them, of the written model, those in bodies and functions included.
    """

    def __init__(self, index: Index, planning: Planning) -> None:
        self.index = index
        self.view = planning.view
        self.added = {node: None for plan in planning.plans for node in plan.added}
        self.unwritten = {*self.view.removed, *self.view.replaced}
        self.homes: dict[Use, Home] = {}
        self.unused_values: defaultdict[int, set[str]] = defaultdict(set)
        self.growth: defaultdict[Node, list[str]] = defaultdict(list)
        self._before = {new: node for plan in planning.plans for node, news in plan.replaced.items() for new in news}
        self._freed = {use for plan in planning.plans for use in plan.constants}
        self._free: defaultdict[int, set[str]] = defaultdict(set)
        self._find_unused()
        self.left_out = {number: frozenset(names) for number, names in self._free.items()}
        # Those that the note of a larger constant has counted.
        self._counted: set[Value] = set()
        for plan in planning.plans:
            read = {value for node in plan.lifted for value in node.inputs if value is not None and self._is_left_out(value)}
            # The bytes of the parameters of this plan that no new constant has taken up.
            spare = sum(_stored_bytes(index, value) for value in read)
            for (node, slot), constant in plan.constants.items():
                if node not in self.unwritten:  # where it is, another fold replaces all that it computed
                    spare = self._place(node, slot, constant, spare)
        nodes = [*(node for node in index.order if node not in self.unwritten), *self.added]
        self.counts = node_counts(((node.domain, node.op) for node in nodes), index.proto.functions)

    def _find_unused(self) -> None:
        """Note the constants that only removed nodes and changed slots read, and the nodes that compute them, bodies included."""
        reads = self._reads()
        pending = [value for node in self.unwritten for value in node.inputs if value is not None]
        freed = [node.input(slot) for node, slot in self._freed if node not in self.added]
        pending += [value for value in freed if value is not None]
        while pending:
            value = pending.pop()
            if value.producer in self.unwritten or reads[value]:
                continue
            node = value.producer
            if value.initializer is not None:
                self._free[value.scope.number].add(value.name)
            elif node is not None and self.index.is_constant(value):
                outputs = [output for output in node.outputs if output is not None]
                inner = [each for body in node.scopes for scope in scopes_within(body) for each in scope.ordered]
                if any(reads[output] for output in outputs) or any(is_batch_norm(each) or self.view.owned(each) for each in inner):
                    continue
                self.unwritten.update([node, *inner])
                self.unused_values[node.scope.number].update(output.name for output in outputs)
                inputs = [(each, slot, value) for each in (node, *inner) for slot, value in enumerate(each.inputs) if value is not None]
                reads.subtract(self.view.source(value) for each, slot, value in inputs if (each, slot) not in self._freed)
                pending.extend(value for _, _, value in inputs if value.scope.depth <= node.scope.depth)

    def _reads(self) -> Counter[Value]:
        """Return value -> how often the written graph reads it; a removed node's output counts as its input."""
        freed, unwritten = self._freed, self.unwritten
        read: list[Value] = []
        for node in self.index.order:
            if node not in unwritten:
                read += [value for slot, value in enumerate(node.inputs) if value is not None and (node, slot) not in freed]
            elif node in self.view.replaced:  # what replaces a node reads its data input
                read.append(self.view.data(node))
        for scope in self.index.scopes:
            read += [value for value in scope.values.values() if value.is_output]
        return Counter(map(self.view.source, read))

    def _place(self, node: Node, slot: int, constant: Constant, spare: int) -> int:
        """Put a folded constant in the place of the old one if no other node reads that, else beside it; return what is left to spare."""
        old = self._old_constant(node, slot)
        if old is not None and old.name in self._free[old.scope.number]:
            self._free[old.scope.number].remove(old.name)
            self.homes[node, slot] = Home(old, True, "")
            return spare
        is_weight = isinstance(constant, Scaled) or (node in self._before and node.op != "Add" and slot == 1)
        role = operator_row(node).input_names.get(slot) or ("weight" if is_weight else "bias")
        self.homes[node, slot] = Home(old, False, role)
        return self._note_growth(node, old, constant, role, spare)

    def _old_constant(self, node: Node, slot: int) -> Value | None:
        """Return the value of the original whose place a constant takes: for a node that is added, the one that its own constant is named
        after."""
        own = node.input(slot)
        if node not in self._before or own is None:
            return own
        return next(value for value in self._before[node].inputs if value is not None and value.name == own.name)

    def _note_growth(self, node: Node, old: Value | None, constant: Constant, role: str, spare: int) -> int:
        """Note that a constant is new, written beside the one that it comes from, or in the place of less that it was computed from."""
        size = math.prod(constant.shape) * constant.dtype.itemsize
        if old is None:
            if size > LARGEST_UNSAID + spare:
                self.growth[node].append(f"a new {role} of {size_text(size)}")
            return max(0, spare - size)
        sources = self._sources(old)
        if sources == [old]:
            self.growth[node].append(
                f"weight '{old.name}' is shared: duplicated" + (f", {size_text(size)}" if size > LARGEST_UNSAID else "")
            )
            return spare
        spared = [value for value in sources if value not in self._counted and self._is_left_out(value)]
        self._counted.update(spared)
        if size > LARGEST_UNSAID + sum(_stored_bytes(self.index, value) for value in spared):
            names = first_few([f"'{value.name}'" for value in sources])
            self.growth[node].append(f"weight '{old.name}' was computed from {names}: stored as it is, {size_text(size)}")
        return spare

    def _sources(self, value: Value) -> list[Value]:
        """Return the stored constants that a constant is computed from: initializers, and outputs of Constant nodes."""
        pending: dict[Value, None] = {value: None}
        for at in (found := [value]):
            node = None if at.initializer is not None else at.producer
            inputs = () if node is None else [read for slot, read in enumerate(node.inputs) if not ignores_elements(node, slot)]
            reads = [read for read in inputs if read is not None and read not in pending]
            pending.update(dict.fromkeys(reads))
            found.extend(reads)
        return [at for at in pending if at.initializer is not None or (at.producer is not None and at.producer.is_op("Constant"))]

    def _is_left_out(self, value: Value) -> bool:
        """Say whether a stored constant is not written any more."""
        if value.initializer is not None:
            return value.name in self.left_out.get(value.scope.number, ())
        return value.producer in self.unwritten


def _stored_bytes(index: Index, value: Value) -> int:
    constant = index.constant(value)
    return 0 if constant is None else constant.size * constant.dtype.itemsize
