"""Values that are a number times another one: the same value, its negative, a product with a number, a sum of it with itself."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.identity import DROPOUT, dropout_training
from fastbn.graph.ops.placing import constant_slot
from fastbn.graph.ops.row import PresentGraph, Skip, Transfer

__all__ = ["around_multiples", "multiple_of"]

# Of the scales with which an operand of a sum stays as it is.
LEAST_SCALE_AROUND = 2.0**-10

# The most steps from a value to the one that it is a multiple of.
MOST_STEPS = 8


class Multiple(NamedTuple):
    """A value as the product of another one and a number, and the nodes that make it of that."""

    root: Value
    number: float
    via: tuple[Node, ...]


def multiple_of(value: Value, graph: PresentGraph, steps: int = MOST_STEPS) -> Multiple:
    """Return what a value is a multiple of: of itself, where it is of no other value of the present graph."""
    value = graph.source(value)
    itself = Multiple(value, 1.0, ())
    node = graph.producer(value)
    if node is None or not steps or value is not node.outputs[0]:
        return itself
    found = [(multiple_of(term, graph, steps - 1), factor) for term, factor in _terms(node, graph)]
    number = sum(term.number * factor for term, factor in found)
    return Multiple(found[0][0].root, number, (node, *found[0][0].via)) if number else itself


def _terms(node: Node, graph: PresentGraph) -> list[tuple[Value, float]]:
    """Return one value, as often as the first output of a node is the sum of it, with its factors; none where it is no such sum."""
    inputs = [value for value in node.inputs if value is not None]
    if node.is_op("Identity") or (node.is_op(DROPOUT) and dropout_training(node, graph) is None):
        return [(inputs[0], 1.0)]
    if node.is_op("Neg"):
        return [(inputs[0], -1.0)]
    if node.is_op("Mul", "Div") and (slot := constant_slot(node, graph)) is not None:
        affine, data = graph.affine(node), inputs[1 - slot]
        rank = graph.rank(data)
        is_number = affine is not None and affine.channels == 1 and rank is not None and affine.rank <= rank
        return [(data, float(affine.scale[0]))] if affine is not None and is_number else []
    if node.is_op("Add", "Sub", "Sum") and len(set(map(graph.source, inputs))) == 1:
        return [(value, -1.0 if slot and node.op == "Sub" else 1.0) for slot, value in enumerate(inputs)]
    return []


def around_multiples(
    node: Node, parts: Sequence[Affine], signs: Sequence[float], skip: Skip | None, asked: Sequence[Affine | None], graph: PresentGraph
) -> Iterable[Transfer]:
    """Yield the transfers with which operands of a sum stay as they are: S (a + f x) + T = (S a + T + (S - 1) f x) + f x.

    A convolution of x among the others makes up for the operands that are multiples of x, and for what else of x is asked for. With a small
    S what they add nearly cancels, and what is left is their rounding errors, which are 1 / S as large beside it.

    Parameters
    ----------
    node : Node
        Add, Sub or Sum of values that are no constants.
    parts : sequence of Affine
        What each operand would have to become.
    signs : sequence of float
        Those of the operands in the sum.
    skip : Skip or None
        What else is asked for beside the affine.
    asked : sequence of Affine or None
        Its scale as it lies at each operand.
    graph : PresentGraph
    """
    if any((np.abs(part.scale) < LEAST_SCALE_AROUND).any() for part in parts):
        return
    multiples = [multiple_of(node.required_input(slot), graph) for slot in range(len(parts))]
    for root in dict.fromkeys(each.root for each in multiples):
        if skip is not None and skip.source is not root:
            continue
        staying = [slot for slot in range(len(parts)) if multiples[slot].root is root]
        others = [slot for slot in range(len(parts)) if slot not in staying]
        number = sum(signs[slot] * multiples[slot].number for slot in staying)
        via = [step for slot in staying for step in multiples[slot].via]
        added = _added(parts[staying[0]], number, asked[staying[0]])
        for taker in others:
            passed_on = [(slot, parts[slot] if slot == taker else parts[slot].scale_only()) for slot in others]
            yield Transfer(passed_on=passed_on, skip=(taker, Skip(root, added.times(signs[taker]))), beside=via)


def _added(part: Affine, number: float, asked: Affine | None) -> Affine:
    """Return number * (S - 1), and what else is asked for."""
    longer = part if asked is None or part.channels >= asked.channels else asked
    scale = number * (part.along(longer.channels)[0] - 1)
    scale = scale if asked is None else scale + asked.along(longer.channels)[0]
    return Affine(scale, np.zeros_like(scale), longer.axis, longer.rank)
