"""A row of the two tables: what one operator does with an affine, backward and forward.

A row answers two questions about a node and an affine S, T:

* backward: the value that the node gives must become S * value + T; which of its constants change, and what is asked of its inputs?
* forward: an input of the node is S * input + T no more but plain `input`; which of its constants make up for it, and what remains to be
  made up for behind its outputs?

Both return Taken, or raise Refusal. Rows only read; `view` is the planner's view of the graph (view.GraphView), in which earlier folds have
already happened.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Tensor
from fastbn.graph.model.node import Node
from fastbn.graph.reasons import Refusal

__all__ = [
    "Row",
    "Taken",
    "axis_in",
    "axis_of",
    "countable",
    "data_sample",
    "no_terms",
    "only_data",
    "own_axis",
    "own_list",
    "require_axis",
    "require_channels",
    "symmetric",
]


# Along an axis of more elements no affine is spread out: a few bytes of a model may ask for any number.
LARGEST_AXIS = 1 << 24


@dataclass
class Taken:
    """What a node does with an affine.

    constants and attributes are those of the node that change, by slot and by name. onward holds what is asked further: (input slot,
    affine) backward, (output slot, affine) forward; back yields what a forward row asks of its other inputs, (input slot, affine).
    elsewhere holds constants of another node, by (node, slot), and via the nodes between; a node that dissolves leaves, and the value at
    that input slot takes the place of its output.
    """

    constants: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    onward: list = field(default_factory=list)
    back: Iterable = ()
    elsewhere: dict = field(default_factory=dict)
    via: list = field(default_factory=list)
    dissolves: int | None = None


@dataclass(frozen=True)
class Row:
    """One operator.

    backward(node, affine, view) and forward(node, slot, affine, view) return Taken, or an iterable of Taken to try in order; None where
    the operator has no such fold. With parts, the operator hands out parts of its input, and one of them (view.asked) may change alone.
    For terms, sample and outputs see weights.py.
    """

    backward: object = None
    forward: object = None
    terms: object = None
    sample: object = None
    outputs: object = None
    parts: bool = False


def axis_of(node, affine, value, view):
    """Return the affine's axis in a value counted from the front, None for one number for every element; Refusal where it is unknown."""
    rank = view.rank(value)
    if rank is None:
        if affine.axis is not None and affine.axis >= 0 and affine.rank == 0:
            return affine.axis
        if affine.axis is None and affine.rank <= 1:
            return None
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at {node.op} '{node.label}' is not known, so the axis cannot be placed")
    return axis_in(node, affine, rank)


def axis_in(node, affine, rank):
    """Return the affine's axis in a value of this rank at a node; Refusal where the affine would widen it."""
    if affine.rank > rank or (affine.axis is not None and not -rank <= affine.axis < rank):
        raise Refusal("axis", f"a constant of rank {affine.rank} widens the value at {node.op} '{node.label}', which has rank {rank}")
    return None if affine.axis is None else affine.axis % rank


def own_axis(node: Node, axis: int, rank: int) -> int:
    """Return an axis that a node names, counted from the front; raises ModelError where a value of this rank has no such axis."""
    if not -rank <= axis < rank:
        raise ModelError(expected(f"an axis of a value of rank {rank}", str(axis), node.label))
    return axis % rank


def countable(size: int) -> int:
    """Return the size of an axis; Refusal where one scale for each of its elements would be too many."""
    if size > LARGEST_AXIS:
        raise Refusal("axis", f"an axis of {size} elements is too long for one scale each")
    return size


def own_list(node: Node, constant: Tensor) -> list[int]:
    """Return the integers of a constant list that a node reads; raises ModelError where it is none."""
    if constant.dtype.kind not in "iu" or len(constant.shape) != 1:
        raise ModelError(expected("a list of integers", f"{constant.dtype} of shape {constant.shape}", node.label))
    return constant.array().tolist()


def require_axis(node, affine, axis, wanted, what):
    if axis is not None and axis != wanted:
        raise Refusal("axis", f"its channels are axis {axis}, the {what} channels of {node.op} '{node.label}' axis {wanted}")


def require_channels(node, affine, channels, what):
    if affine.channels not in (1, channels) or (affine.axis is not None and affine.channels != channels):
        raise Refusal("axis", f"{affine.channels} channels meet the {channels} {what} channels of {node.op} '{node.label}'")


def only_data(node, slot):
    if slot != 0:
        raise Refusal("no-absorber", f"it is input {slot} of {node.op} '{node.label}', not the data")


def symmetric(transfer, terms=None):
    """Return a Row of one function: transfer(node, affine, came from value, goes to value, view) -> affine."""

    def backward(node, affine, view):
        return Taken(onward=[(0, transfer(node, affine, node.outputs[0], node.inputs[0], view))])

    def forward(node, slot, affine, view):
        only_data(node, slot)
        return Taken(onward=[(0, transfer(node, affine, node.inputs[0], node.outputs[0], view))])

    return Row(backward, forward, terms or no_terms, data_sample)


def no_terms(node, view):
    return 0


def data_sample(node, view):
    return {slot: view.small_shape(value) for slot, value in enumerate(node.inputs) if value is not None}
