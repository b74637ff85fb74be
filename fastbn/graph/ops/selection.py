"""The operators that choose elements, or add some at the border: Slice, Gather, Pad."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ModelError, expected
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.placing import LARGEST_AXIS, axis_of, both_ways, countable, known_list, named_axes, own_axis, own_list
from fastbn.graph.ops.row import PresentGraph, Row
from fastbn.graph.ops.shape_rules import Size, each_once, first_size
from fastbn.graph.reasons import Refusal

__all__ = ["SELECTION"]


# Slice chooses channels where its bounds along their axis are constants: forward those that were chosen; backward the others are of no
# account. Along other axes any bounds will do, once it is known that they are of other axes.
def _slice(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    bounds = _bounds_along(node, axis, graph)
    if bounds is None:
        return affine
    start, end, step = bounds
    if start == 0 and step == 1 and end >= LARGEST_AXIS:
        return affine
    forward = source is node.inputs[0]
    size = affine.channels if forward else _size_of_axis(node, axis, graph)
    chosen = np.arange(countable(size))[slice(start, None if step < 0 and end < -size else end, step)]
    return _chosen_channels(node, affine, axis, size, chosen, forward, axis)


# Gather by constants chooses channels too. Along another axis it moves whole rows, whatever the indices, and the axis that it gathers along
# is replaced by the axes of the indices.
def _gather(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    forward = source is node.inputs[0]
    moved, chosen_axis = _gathered_axis(node, axis, forward, graph)
    if moved is not None:
        return affine.at(moved)
    size = affine.channels if forward else _size_of_axis(node, chosen_axis, graph)
    chosen = _indices(node, countable(size), graph)
    # A scalar index removes the axis.
    remaining = None if graph.rank(node.input(1)) == 0 else chosen_axis
    return _chosen_channels(node, affine, chosen_axis, size, chosen, forward, remaining)


def _size_of_axis(node: Node, axis: int, graph: PresentGraph) -> int:
    sizes = graph.sizes(node.inputs[0])
    size = None if sizes is None else sizes[own_axis(node, axis, len(sizes))]
    if not isinstance(size, int):
        raise Refusal("axis-unknown", f"the size of axis {axis} before {node.op} '{node.label}' is not known")
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
    free = np.ones(size, bool)
    free[chosen] = False if affine.free is None else affine.free
    return Affine(scale, shift, axis, 0, abs_terms, free)


def _gathered_axis(node: Node, axis: int, forward: bool, graph: PresentGraph) -> tuple[int | None, int]:
    """Return (the axis on the other side of a Gather, None where it is the one that is chosen from, that axis)."""
    chosen, data_rank, rank = node.attribute("axis", 0), graph.rank(node.inputs[0]), graph.rank(node.input(1))
    if data_rank is not None:
        chosen = own_axis(node, chosen, data_rank)
    elif chosen < 0:
        raise Refusal("axis-unknown", f"the rank before Gather '{node.label}' is not known")
    if axis < chosen:
        return axis, chosen
    if rank is None:
        raise Refusal("axis-unknown", f"the rank of the indices of Gather '{node.label}' is not known")
    grown = rank - 1
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


def _bounds_along(node: Node, axis: int, graph: PresentGraph) -> tuple[int, int, int] | None:
    """Return (start, end, step) of a Slice along an axis, None where it leaves the axis alone."""
    starts, ends, axes, steps = _bounds(node, graph)
    rank = graph.rank(node.inputs[0])
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise ModelError(expected("a start, an end and a step for each axis", f"{starts}, {ends}, {axes}, {steps}", node.label))
    for start, end, at, step in zip(starts, ends, axes, steps, strict=True):
        if not isinstance(at, int):
            raise Refusal("dynamic-index", f"the axes of Slice '{node.label}' are no constants")
        if at < 0 and rank is None:
            raise Refusal("axis-unknown", f"the rank before Slice '{node.label}' is not known")
        if (at if rank is None else own_axis(node, at, rank)) != axis:
            continue
        if not (isinstance(start, int) and isinstance(end, int) and isinstance(step, int)):
            raise Refusal("dynamic-index", f"the bounds of Slice '{node.label}' along axis {axis} are no constants")
        return start, end, step
    return None


def _bounds(node: Node, graph: PresentGraph) -> list[list[Size]]:
    """Return the lists starts, ends, axes and steps of a Slice, None in the place of each element that is not known."""
    lists: list[list[Size] | None]
    if graph.opset < 10:
        attributes = [node.find_attribute(name, list[int]) for name in ("starts", "ends", "axes")]
        lists = [None, None, None, None]
        lists[:3] = [[*each] if each else None for each in attributes]
        written = [bool(each) for each in lists]
    else:
        lists = [known_list(node, slot, graph) for slot in range(1, 5)]
        written = [node.input(slot) is not None for slot in range(1, 5)]
    count = next((len(each) for each in lists if each is not None), None)
    if count is None:
        raise Refusal("dynamic-index", f"the bounds of Slice '{node.label}' are no constants")
    unknown: list[Size] = [None] * count
    absent: list[list[Size]] = [unknown, unknown, [*range(count)], [1] * count]
    given = zip(lists, written, absent, strict=True)
    return [unknown if each is None and is_written else default if each is None else each for each, is_written, default in given]


# Pad: copies of elements carry the affine; a constant does so only where it is 0 and nothing is shifted. Along the affine's axis nothing
# may be added; how much is added along others need not be known.
def _pad(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis, rank = axis_of(node, affine, source, graph), graph.rank(source)
    axes, pads = _pads(node, graph)
    if len(pads) != 2 * len(axes) or (node.input(3) is None and rank not in (None, len(axes))):
        raise ModelError(expected("two sizes of padding for each axis", f"{len(pads)}", node.label))
    if axis is not None and rank is None and min(axes, default=0) < 0:
        raise Refusal("axis-unknown", f"the rank of '{source.name}' at Pad '{node.label}' is not known")
    for at, *around in zip(axes, pads, pads[len(axes) :], strict=False):
        if axis == (at if rank is None else own_axis(node, at, rank)) and around != [0, 0]:
            if None in around:
                raise Refusal("dynamic-index", f"how much Pad '{node.label}' pads axis {axis} is no constant")
            raise Refusal("axis", f"Pad '{node.label}' pads axis {axis}")
    is_filled = node.attribute("mode", b"constant") == b"constant" and set(pads) != {0}
    if is_filled and (_pad_value(node, graph) != 0 or affine.shifts):
        raise Refusal("padding", f"Pad '{node.label}' adds a constant that would have to change with the affine")
    return affine


def _pads(node: Node, graph: PresentGraph) -> tuple[list[int], list[Size]]:
    """Return (axes, sizes of padding before them and behind them, None for each that is not known) of a Pad."""
    written = node.find_attribute("pads", list[int]) or node.find_attribute("paddings", list[int])
    listed = known_list(node, 1, graph) if graph.opset >= 11 else None
    axes = named_axes(node, 3, graph)
    rank = graph.rank(node.inputs[0])
    if node.input(3) is not None and axes is None:
        raise Refusal("dynamic-index", f"which axes Pad '{node.label}' pads is no constant")
    if not written and listed is None and axes is None and rank is None:
        raise Refusal("dynamic-index", f"how much Pad '{node.label}' pads is no constant")
    pads: list[Size] = []
    if written or listed is not None:
        pads.extend(size if isinstance(size, int) else None for size in written or listed or [])
    else:
        pads.extend(None for _ in range(2 * len(axes or range(rank or 0))))
    return list(range(len(pads) // 2)) if axes is None else axes, pads


def _pad_value(node: Node, graph: PresentGraph) -> float | None:
    """Return the number that a Pad fills in, None where it is not known."""
    if node.input(2) is None:
        return node.attribute("value", 0.0)
    constant = graph.constant(node.input(2))
    if constant is not None and constant.size != 1:
        raise ModelError(expected("one number to pad with", f"{constant.size}", node.label))
    return None if constant is None else float(constant.array().reshape(-1)[0])


# GatherElements takes each element from another place along one axis: along any other one an element keeps its place, and there are as
# many as the indices have.
def _gather_elements(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    data, indices = graph.sizes(node.inputs[0]), graph.sizes(node.input(1))
    if data is None or indices is None or len(data) != len(indices):
        raise Refusal("axis-unknown", f"the ranks at GatherElements '{node.label}' are not known")
    if axis == own_axis(node, node.attribute("axis", 0), len(data)):
        raise Refusal("axis", f"GatherElements '{node.label}' mixes the elements of axis {axis}")
    size, count = data[axis], indices[axis]
    if size == count:
        return affine.at(axis)
    if not isinstance(size, int) or not isinstance(count, int):
        raise Refusal("axis-unknown", f"the sizes at GatherElements '{node.label}' do not tell how many of axis {axis} it takes")
    if count > size:  # sizes that a caller has given, or that were supposed
        raise ModelError(expected(f"no more than {size} indices along axis {axis}", str(count), node.label))
    return _chosen_channels(node, affine, axis, size, np.arange(count), source is node.inputs[0], axis)


# GatherND takes whole blocks of the axes behind those that its indices name; the first batch_dims axes stay where they are.
def _gather_blocks(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    indices, batch = graph.sizes(node.input(1)), node.attribute("batch_dims", 0)
    count = indices[-1] if indices else None
    if indices is None or not isinstance(count, int):
        raise Refusal("axis-unknown", f"the shape of the indices of GatherND '{node.label}' is not known")
    if axis < batch:
        return affine.at(axis)
    first, moved = (batch + count, len(indices) - 1) if source is node.inputs[0] else (len(indices) - 1, batch + count)
    if axis < first:
        raise Refusal("axis", f"GatherND '{node.label}' chooses along axis {axis}")
    return affine.at(axis - first + moved)


def _gathered_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    data, indices = arrays
    axis = node.attribute("axis", 0)
    return float(data.size // max(data.shape[axis], 1) * indices.size)


def _places_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    return arrays[0].size * max(arrays[0].ndim, 1)


SELECTION = {
    "Slice": Row(*both_ways(_slice), sized=True, size_slots=(1, 2, 3, 4), result_size=first_size, moved_inputs="first"),
    "Gather": Row(*both_ways(_gather), sized=True, result_size=_gathered_size, moved_inputs="first", input_names={0: "table"}),
    "GatherElements": Row(*both_ways(_gather_elements), sized=True, work=each_once),
    "GatherND": Row(*both_ways(_gather_blocks), sized=True, work=each_once),
    "Pad": Row(*both_ways(_pad), size_slots=(1, 3), work=each_once),
    "Compress": Row(result_size=first_size),
    "NonZero": Row(result_size=_places_size),
    **dict.fromkeys(("Scatter", "ScatterElements", "ScatterND", "TensorScatter", "Trilu"), Row(work=each_once)),
}
