"""The operators that choose elements, or add some at the border: Slice, Gather, Pad."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ModelError, expected
from fastbn.graph.model.node import Node, Shape, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.placing import axis_of, both_ways, countable, own_axis, own_list
from fastbn.graph.ops.row import PresentGraph, Row
from fastbn.graph.ops.shape_rules import first_size
from fastbn.graph.reasons import Refusal

__all__ = ["SELECTION"]


# Slice by constants chooses channels: forward the affine is that of the chosen ones; backward the others, which it drops, stay as they are.
def _slice(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    shape = _data_shape(node, graph)
    size = _size_of_axis(node, shape, axis)
    chosen = _sliced(node, len(shape), axis, size, graph)
    return affine if chosen is None else _chosen_channels(node, affine, axis, size, chosen, source is node.inputs[0], axis)


# Gather by constants chooses channels too. Along another axis it moves whole rows, whatever the indices, and the axis that it gathers along
# is replaced by the axes of the indices.
def _gather(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    shape = _data_shape(node, graph)
    forward = source is node.inputs[0]
    moved, axis = _gathered_axis(node, axis, shape, forward, graph)
    if moved is not None:
        return affine.at(moved)
    size = _size_of_axis(node, shape, axis)
    chosen = _indices(node, size, graph)
    # A scalar index removes the axis.
    remaining = None if graph.rank(node.input(1)) == 0 else axis
    return _chosen_channels(node, affine, axis, size, chosen, forward, remaining)


def _data_shape(node: Node, graph: PresentGraph) -> Shape:
    shape = graph.shape(node.inputs[0])
    if shape is None:
        raise Refusal("axis-unknown", f"the shape before {node.op} '{node.label}' is not known")
    return shape


def _size_of_axis(node: Node, shape: Shape, axis: int) -> int:
    size = shape[axis]
    if size is None:
        raise Refusal("axis-unknown", f"the shape before {node.op} '{node.label}' is not known")
    return countable(size)


def _chosen_channels(
    node: Node, affine: Affine, axis: int, size: int, chosen: NDArray[np.int64], forward: bool, remaining: int | None
) -> Affine:
    """Return the affine on the other side of a choice of channels along an axis, which is `remaining` behind it."""
    if affine.channels != (size if forward else chosen.size):
        raise Refusal("axis", f"{affine.channels} channels meet axis {axis} of {node.op} '{node.label}'")
    if forward:
        return affine.picked(chosen, remaining)
    if len(set(chosen.tolist())) != chosen.size:
        raise Refusal("axis", f"{node.op} '{node.label}' gives one channel out twice")
    scale, shift, abs_terms = np.ones(size), np.zeros(size), np.zeros(size)
    scale[chosen], shift[chosen], abs_terms[chosen] = affine.scale, affine.shift, affine.abs_terms
    return Affine(scale, shift, axis, 0, abs_terms)


def _gathered_axis(node: Node, axis: int, shape: Shape, forward: bool, graph: PresentGraph) -> tuple[int | None, int]:
    """Return (the axis on the other side of a Gather, None where it is the one that is chosen from, that axis)."""
    chosen = own_axis(node, node.attribute("axis", 0), len(shape))
    rank = graph.rank(node.input(1))
    if rank is None:
        raise Refusal("axis-unknown", f"the rank of the indices of Gather '{node.label}' is not known")
    grown = rank - 1
    if axis < chosen:
        return axis, chosen
    if forward:
        return (None if axis == chosen else axis + grown), chosen
    return (None if axis <= chosen + grown else axis - grown), chosen


def _indices(node: Node, size: int, graph: PresentGraph) -> NDArray[np.int64]:
    """Return the indices that a Gather takes along its axis."""
    rank = graph.rank(node.input(1))
    if rank is not None and rank > 1:
        raise Refusal("axis", f"Gather '{node.label}' spreads its channels over {rank} axes")
    indices = graph.constant(node.input(1))
    if indices is None or len(indices.shape) > 1:
        raise Refusal("dynamic-index", f"the indices of Gather '{node.label}' are no constant list")
    listed = own_list(node, indices) if indices.shape else [int(indices.array())]
    return np.array([own_axis(node, index, size) for index in listed], np.int64)


def _sliced(node: Node, rank: int, axis: int, size: int, graph: PresentGraph) -> NDArray[np.int64] | None:
    """Return the indices that a Slice takes along an axis, None where it leaves the axis alone."""
    starts, ends, axes, steps = _bounds(node, graph)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise ModelError(expected("a start, an end and a step for each axis", f"{starts}, {ends}, {axes}, {steps}", node.label))
    for start, end, at, step in zip(starts, ends, axes, steps, strict=True):
        if own_axis(node, at, rank) == axis:
            stop = None if step < 0 and end < -size else end
            return np.arange(size)[slice(start, stop, step)]
    return None


def _listed(node: Node, name: str) -> list[int]:
    return node.attribute(name, [])


def _bounds(node: Node, graph: PresentGraph) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return the lists (starts, ends, axes, steps) of a Slice."""
    if graph.opset < 10:
        starts, ends = _listed(node, "starts"), _listed(node, "ends")
        return starts, ends, _listed(node, "axes") or list(range(len(starts))), [1] * len(starts)
    constants = [graph.constant(node.input(at)) for at in range(1, 5)]
    if any(constant is None and node.input(at) is not None for at, constant in enumerate(constants, start=1)):
        raise Refusal("dynamic-index", f"the bounds of Slice '{node.label}' are no constants")
    lists = [None if constant is None else own_list(node, constant) for constant in constants]
    starts, ends = lists[0] or [], lists[1] or []
    axes, steps = lists[2], lists[3]
    return starts, ends, list(range(len(starts))) if axes is None else axes, [1] * len(starts) if steps is None else steps


# Pad: copies of elements carry the affine; a constant does so only where it is 0 and nothing is shifted.
def _pad(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    listed, pads = _pads(node, graph)
    rank = graph.rank(source)
    axes_constant = node.input(3)
    if len(pads) != 2 * len(listed) or (axes_constant is None and rank not in (None, len(listed))):
        raise ModelError(expected("two sizes of padding for each axis", f"{len(pads)}", node.label))
    if axis is not None and rank is None and min(listed, default=0) < 0:
        raise Refusal("axis-unknown", f"the rank of '{source.name}' at Pad '{node.label}' is not known")
    sizes = zip(listed, pads, pads[len(listed) :], strict=False)
    padded = {at if rank is None else own_axis(node, at, rank) for at, *both in sizes if any(both)}
    if axis in padded:
        raise Refusal("axis", f"Pad '{node.label}' pads axis {axis}")
    if node.attribute("mode", b"constant") == b"constant":
        value = _pad_value(node, graph)
        if any(pads) and (value != 0 or affine.shifts):
            raise Refusal("padding", f"Pad '{node.label}' adds a constant that would have to change with the affine")
    return affine


def _pads(node: Node, graph: PresentGraph) -> tuple[list[int], list[int]]:
    """Return (axes, sizes of padding before them and behind them) of a Pad; Refusal where they are no constants."""
    constant = graph.constant(node.input(1)) if graph.opset >= 11 else None
    written = node.find_attribute("pads", list[int]) or node.find_attribute("paddings", list[int])
    pads = written or (None if constant is None else own_list(node, constant))
    axes = None if node.input(3) is None else graph.constant(node.input(3))
    if pads is None or (node.input(3) is not None and axes is None):
        raise Refusal("dynamic-index", f"how much Pad '{node.label}' pads is no constant")
    return list(range(len(pads) // 2)) if axes is None else own_list(node, axes), pads


def _pad_value(node: Node, graph: PresentGraph) -> float | None:
    """Return the number that a Pad fills in, None where it is not known."""
    if node.input(2) is None:
        return node.attribute("value", 0.0)
    constant = graph.constant(node.input(2))
    if constant is not None and constant.size != 1:
        raise ModelError(expected("one number to pad with", f"{constant.size}", node.label))
    return None if constant is None else float(constant.array().reshape(-1)[0])


def _gathered_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    data, indices = arrays
    axis = node.attribute("axis", 0)
    return float(data.size // max(data.shape[axis], 1) * indices.size)


SELECTION = {
    "Slice": Row(*both_ways(_slice), sized=True, size_slots=(1, 2, 3, 4), result_size=first_size, moved_inputs="first"),
    "Gather": Row(*both_ways(_gather), sized=True, result_size=_gathered_size, moved_inputs="first"),
    "Pad": Row(*both_ways(_pad), size_slots=(1, 3)),
}
