"""Where an affine lies at a node, and what nearly every row demands of it."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from fastbn.dtypes import DTYPES, dtype_name
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Tensor
from fastbn.graph.model.node import Node, Shape, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.row import PresentGraph, Transfer, Traveler
from fastbn.graph.ops.shape_rules import Size
from fastbn.graph.reasons import ReasonCode, Refusal, first_few

__all__ = [
    "FIRST_BROADCASTING_OPSET",
    "LARGEST_AXIS",
    "Move",
    "axis_beside",
    "axis_in",
    "axis_of",
    "both_ways",
    "constant_slot",
    "countable",
    "is_wide",
    "known_list",
    "known_number",
    "named_axes",
    "only_data",
    "own_axis",
    "own_list",
    "require_axis",
    "require_channels",
    "require_sign",
]

# The longest axis along which an affine gets a scale for each element: a few bytes of a model may state any size.
LARGEST_AXIS = 1 << 24

# Before this opset the operators of two operands broadcast by attributes, not by shape: they are left alone.
FIRST_BROADCASTING_OPSET = 7

# Least sign that passes -> code, what is wanted, what is wrong.
SIGNS: dict[int, tuple[ReasonCode, str, str]] = {
    0: ("mixed-sign-through-maxpool", "non-negative", "negative"),
    1: ("mixed-sign-through-relu", "positive", "not positive"),
}

# What a symmetric operator does: (node, affine, the value that has the affine, the value that is to have it, graph) -> the affine there.
Move: TypeAlias = Callable[[Node, Affine, Value, Value, PresentGraph], Affine]


def both_ways(move: Move) -> tuple[Callable[[Node, Traveler, PresentGraph], Transfer], Callable[[Node, Traveler, PresentGraph], Transfer]]:
    """Return the (backward, forward) of an operator that lets an affine of its data pass in both directions by the same rule."""

    def backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
        return Transfer(passed_on=[(0, move(node, traveler.affine, node.required_output(), node.required_input(0), graph))])

    def forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
        only_data(node, traveler)
        return Transfer(passed_on=[(0, move(node, traveler.affine, node.required_input(0), node.required_output(), graph))])

    return backward, forward


def constant_slot(node: Node, graph: PresentGraph) -> int | None:
    """Return the slot of the one constant floating operand of a node of two operands, None where there is none."""
    if graph.opset < FIRST_BROADCASTING_OPSET or len(node.inputs) != 2:
        return None
    constants = [graph.constant(value) for value in node.inputs]
    for slot, constant in enumerate(constants):
        if constant is not None and constants[1 - slot] is None:
            return slot if dtype_name(constant.dtype) in DTYPES else None
    return None


def axis_of(node: Node, affine: Affine, value: Value, graph: PresentGraph) -> int | None:
    """Return the affine's axis in a value counted from the front, None for one number for every element; Refusal where it is unknown."""
    rank = graph.rank(value)
    if rank is None:
        if affine.axis is not None and affine.axis >= 0 and affine.rank == 0:
            return affine.axis
        if affine.axis is None and affine.rank <= 1:
            return None
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at {node.op} '{node.label}' is not known, so the axis cannot be placed")
    return axis_in(node, affine, rank)


def axis_in(node: Node, affine: Affine, rank: int) -> int | None:
    """Return the affine's axis in a value of this rank at a node; Refusal where the affine would widen it."""
    if affine.rank > rank or (affine.axis is not None and not -rank <= affine.axis < rank):
        raise Refusal("axis", f"a constant of rank {affine.rank} widens the value at {node.op} '{node.label}', which has rank {rank}")
    return None if affine.axis is None else affine.axis % rank


def own_axis(node: Node, axis: int, rank: int) -> int:
    """Return an axis that a node names, counted from the front; raises ModelError where a value of this rank has no such axis."""
    if not -rank <= axis < rank:
        raise ModelError(expected(f"an axis of a value of rank {rank}", str(axis), node.label))
    return axis % rank


def is_wide(affine: Affine, shape: Shape | None) -> bool:
    """Say whether an affine would make a value of this shape wider: the value has one element, the affine several channels.

    One whose axis counts from the front does not broadcast: its channels are there, or the model is wrong.
    """
    is_broadcast = affine.axis is not None and affine.axis < 0 and affine.channels > 1
    return is_broadcast and shape is not None and all(size == 1 for size in shape)


def countable(size: int) -> int:
    """Return the size of an axis; Refusal where one scale for each of its elements would be too many."""
    if size > LARGEST_AXIS:
        raise Refusal("axis", f"an axis of {size} elements is too long for one scale each")
    return size


def known_list(node: Node, slot: int, graph: PresentGraph) -> list[Size] | None:
    """Return the integers of a list that a node reads as far as they are known; raises ModelError where a constant is none."""
    value = node.input(slot)
    constant = None if value is None else graph.constant(value)
    return graph.elements(value) if constant is None else [*own_list(node, constant)]


def known_number(node: Node, slot: int, graph: PresentGraph) -> int | None:
    """Return the integer that a node reads at a slot, None where it is a list or not known."""
    constant = graph.constant(node.input(slot))
    return int(constant.array()) if constant is not None and not constant.shape and constant.dtype.kind in "iu" else None


def named_axes(node: Node, slot: int, graph: PresentGraph) -> list[int] | None:
    """Return the axes that a node names, in an attribute or in a list at a slot; None where it names none, or they are not known."""
    axes = node.find_attribute("axes", list[int])
    if axes is not None or node.input(slot) is None:
        return axes
    listed = known_list(node, slot, graph)
    known = [axis for axis in listed or [] if isinstance(axis, int)]
    return known if listed is not None and len(known) == len(listed) else None


def axis_beside(node: Node, axis: int, absent: Sequence[int], rank: int | None, is_narrow: bool) -> int | None:
    """Return the axis on the other side of a node that inserts some axes into a value or takes them away, None for one of these.

    Parameters
    ----------
    axis : int
        From the front: of the value without them where is_narrow says so, else of the one with them.
    absent : sequence of int
        The axes, as the node names them.
    rank : int or None
        Of the value with them; needed where one of them counts from the end.
    """
    if rank is None and min(absent, default=0) < 0:
        raise Refusal("axis-unknown", f"the rank of the value at {node.op} '{node.label}' is not known")
    gone = {at if rank is None else own_axis(node, at, rank) for at in absent}
    if not is_narrow:
        return None if axis in gone else axis - sum(at < axis for at in gone)
    for at in sorted(gone):
        axis += at <= axis
    if rank is not None and axis >= rank:
        raise ModelError(expected(f"axes of a value of rank {rank}", str(list(absent)), node.label))
    return axis


def own_list(node: Node, constant: Tensor) -> list[int]:
    """Return the integers of a constant list that a node reads; raises ModelError where it is none."""
    if constant.dtype.kind not in "iu" or len(constant.shape) != 1:
        raise ModelError(expected("a list of integers", f"{constant.dtype} of shape {constant.shape}", node.label))
    numbers: list[int] = constant.array().tolist()
    return numbers


def require_axis(node: Node, affine: Affine, axis: int | None, wanted: int, what: str) -> None:
    """Refuse an affine along another axis than the one of the node's `what` ("input" or "output") channels."""
    if axis is not None and axis != wanted:
        raise Refusal("axis", f"its channels are axis {axis}, the {what} channels of {node.op} '{node.label}' axis {wanted}")


def require_channels(node: Node, affine: Affine, channels: int, what: str) -> None:
    """Refuse an affine of another number of channels than the node's `what` ("input" or "output") channels."""
    if affine.channels not in (1, channels) or (affine.axis is not None and affine.channels != channels):
        raise Refusal("axis", f"{affine.channels} channels meet the {channels} {what} channels of {node.op} '{node.label}'")


def require_sign(node: Node, affine: Affine, least: int) -> None:
    """Refuse a scale that is negative in a channel (least 0), or not positive (least 1)."""
    wrong = affine.scale < 0 if least == 0 else affine.scale <= 0
    if wrong.any():
        some = first_few(np.flatnonzero(wrong).tolist())
        code, wanted, kind = SIGNS[least]
        raise Refusal(code, f"{node.op} '{node.label}' lets only a {wanted} scale pass; it is {kind} in channels {some}")


def only_data(node: Node, traveler: Traveler) -> None:
    """Refuse an affine of another input than the first."""
    if traveler.slot != 0:
        raise Refusal("no-absorber", f"it is input {traveler.slot} of {node.op} '{node.label}', not the data")
