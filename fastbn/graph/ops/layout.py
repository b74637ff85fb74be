"""The operators that move elements and let a per-channel affine pass, perhaps along another axis."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ModelError, expected
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.placing import axis_beside, axis_in, axis_of, both_ways, countable, named_axes, own_axis, own_list
from fastbn.graph.ops.row import PresentGraph, Row
from fastbn.graph.ops.shape_rules import (
    Product,
    Size,
    Sizes,
    dims_of,
    each_once,
    first_size,
    list_of_sizes,
    quotient,
    same_batch,
    same_sizes,
)
from fastbn.graph.reasons import Refusal

__all__ = ["LAYOUT"]

# Before this opset Tile repeats one axis, which an input names.
FIRST_TILE_OF_A_LIST = 6


# Transpose moves the axis: axis j of the output is axis perm[j] of the input.
def _transpose(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    perm = node.find_attribute("perm", list[int])
    if perm is None:
        rank = graph.rank(source)
        if rank is None:
            raise Refusal("axis-unknown", f"the rank of '{source.name}' at Transpose '{node.label}' is not known")
        perm = list(range(rank))[::-1]
    if sorted(perm) != list(range(graph.rank(node.inputs[0]) or len(perm))) or axis >= len(perm):
        raise ModelError(expected("a permutation of all axes", str(perm), node.label))
    return affine.at(perm[axis] if source is node.outputs[0] else perm.index(axis))


def _transposed_sizes(node: Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    first, perm = inputs[0], node.find_attribute("perm", list[int])
    if first is None:
        return None if perm is None else (None,) * len(perm)
    perm = perm or list(range(len(first)))[::-1]
    return tuple(first[at] for at in perm) if sorted(perm) == list(range(len(first))) else None


# Reshape, Flatten renumber the elements: the channel of element e is (e / inner) % channels, inner the number of elements behind the axis.
# An axis of the result tells it where it steps through `merged` whole cycles of the channels, each channel `repeats` times in a row:
# its size is merged * channels * repeats. What lies before the axis on both sides tells merged, what lies behind it repeats, and one of
# them is enough where the size is known.
def _reshape(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    before, after = graph.sizes(source), graph.sizes(target)
    if before is None or after is None or 0 in (*before, *after):
        raise Refusal("axis-unknown", f"the shapes at {node.op} '{node.label}' are not known well enough to place axis {axis}")
    channels = affine.channels
    if before[axis] != channels and isinstance(before[axis], int):
        raise Refusal("axis", f"{channels} channels meet axis {axis} of {node.op} '{node.label}', which has {before[axis]}")
    if channels == 1:
        return affine.picked(np.zeros(1, np.int64), None)
    is_open = False
    for at in range(len(after) - 1, -1, -1):
        size = after[at]
        merged, repeats = quotient(before[:axis], after[:at]), quotient(before[axis + 1 :], after[at + 1 :])
        if isinstance(merged, int) and isinstance(repeats, int):
            size = merged * channels * repeats
        elif isinstance(size, int) and isinstance(merged, int) and size % (merged * channels) == 0:
            repeats = size // (merged * channels)
        if isinstance(size, int) and isinstance(repeats, int) and size % (repeats * channels) == 0:
            return affine.picked(np.arange(countable(size)) // repeats % channels, at)
        is_copy = not isinstance(size, int) and (size in before[:axis] or size in before[axis + 1 :])
        is_told = isinstance(merged, int) or isinstance(repeats, int) or _are_numbers((*before, *after))
        is_open = is_open or not (is_copy or (isinstance(size, int) and is_told))
    if is_open:
        raise Refusal("axis-unknown", f"the sizes at {node.op} '{node.label}' do not tell where axis {axis} goes: {_text(before, after)}")
    raise Refusal("axis", f"{node.op} '{node.label}' splits or mixes the channels of axis {axis}: {_text(before, after)}")


def _are_numbers(sizes: Sizes) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _text(before: Sizes, after: Sizes) -> str:
    """Return two shapes as text, with a letter for each size that only a run tells, the same one where they are equal."""
    letters = dict(zip(dict.fromkeys(dims_of((*before, *after))), "nabcdefghijklm", strict=False))

    def shown(size: Size) -> str:
        number = size if isinstance(size, int) else size.number if isinstance(size, Product) else 1
        names = "".join(letters.get(dim, "?") for dim in dims_of([size]))
        return f"{number if number != 1 or not names else ''}{names}"

    return " becomes ".join("x".join(map(shown, sizes)) for sizes in (before, after))


# Squeeze takes away axes of size 1 and Unsqueeze inserts some: only their place counts.
def _squeeze(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axes = named_axes(node, 1, graph)
    if axes is None:  # a Squeeze of all axes of size 1
        return _reshape(node, affine, source, target, graph)
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    wide, narrow = (node.inputs[0], node.outputs[0]) if node.op == "Squeeze" else (node.outputs[0], node.inputs[0])
    rank, narrow_rank = graph.rank(wide), graph.rank(narrow)
    if rank is None and narrow_rank is not None:
        rank = narrow_rank + len(axes)
    beside = axis_beside(node, axis, axes, rank, source is narrow)
    if beside is not None:
        return affine.at(beside)
    if affine.channels > 1:
        raise ModelError(expected(f"an axis {axis} of size 1", str(affine.channels), node.label))
    return affine.picked(np.zeros(1, np.int64), None)


def _reshape_target(node: Node, first: Sizes | None, elements: Callable[[Value | None], list[Size] | None]) -> list[Size] | None:
    return elements(node.input(1))


def _flatten_target(node: Node, first: Sizes | None, elements: Callable[[Value | None], list[Size] | None]) -> list[Size] | None:
    return [0, -1] if node.attribute("axis", 1) == 1 and first else None


# DepthToSpace sends channel c to c % C' (DCR) or c / block^2 (CRD), C' = C / block^2. Backward each of the C
# channels has the affine of the channel that it goes to; forward channels that go to one must have the same affine.
def _depth_to_space(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    if axis != 1:
        raise Refusal("axis", f"DepthToSpace '{node.label}' mixes the elements of axis {axis}")
    is_backward = source is node.outputs[0]
    area = node.attribute("blocksize", 1) ** 2
    if area < 1 or (not is_backward and affine.channels % area):
        raise ModelError(expected(f"channels that blocks of {area} divide", f"{affine.channels}", node.label))
    outputs = affine.channels if is_backward else affine.channels // area
    countable(outputs * area)
    repeats = node.attribute("mode", b"DCR") == b"CRD"
    spread = np.arange(outputs * area) // area if repeats else np.arange(outputs * area) % outputs
    if is_backward:
        return affine.picked(spread, 1)
    return _merged(affine, spread, 1, f"DepthToSpace '{node.label}' puts channels of different affines into one")


def _merged(affine: Affine, sources: NDArray[np.int64], axis: int, otherwise: str) -> Affine:
    """Return the affine of which channel sources[c] is channel c of this one; Refusal where channels of one source are not alike."""
    merged = affine.picked(np.unique(sources, return_index=True)[1], axis)
    if (merged.scale[sources] != affine.scale).any() or (merged.shift[sources] != affine.shift).any():
        raise Refusal("axis", otherwise)
    return merged


# SpaceToDepth sends channel c to c, C + c, 2C + c, ... of C * block^2, one for each place in a block. Forward each of these takes
# the affine of c; backward those of one c must agree.
def _space_to_depth(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    if axis != 1:
        raise Refusal("axis", f"SpaceToDepth '{node.label}' mixes the elements of axis {axis}")
    is_backward = source is node.outputs[0]
    area = node.attribute("blocksize", 1) ** 2
    if area < 1 or (is_backward and affine.channels % area):
        raise ModelError(expected(f"channels that are a multiple of {area}", f"{affine.channels}", node.label))
    inputs = affine.channels // area if is_backward else affine.channels
    spread = np.arange(countable(inputs * area)) % inputs
    if not is_backward:
        return affine.picked(spread, 1)
    return _merged(affine, spread, 1, f"SpaceToDepth '{node.label}' makes channels of different affines of one")


# Expand repeats elements along axes of size 1, which the affine's must not be: it keeps its size, counted from the end.
def _expand(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    if affine.axis is None:
        return affine
    ranks = graph.rank(source), graph.rank(target)
    if ranks[0] is None or ranks[1] is None:
        raise Refusal("axis-unknown", f"the ranks at Expand '{node.label}' are not known")
    axis = axis_in(node, affine, ranks[0])
    assert axis is not None, "it has one"
    behind = axis - ranks[0]
    data = graph.sizes(node.inputs[0])
    size = None if data is None or len(data) < -behind else data[behind]
    if size == 1 or data is None or len(data) < -behind:
        raise Refusal("axis", f"Expand '{node.label}' makes the channels by repeating")
    if not isinstance(size, int) and (source is node.outputs[0] or affine.channels == 1):
        raise Refusal("axis-unknown", f"the sizes at Expand '{node.label}' do not tell whether it repeats axis {axis}")
    return affine.at(behind + ranks[1])


# Tile repeats an axis as a whole: channel c of the output is channel c % C of the input.
def _tile(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    repeats = graph.constant(node.input(1))
    if graph.opset < FIRST_TILE_OF_A_LIST or repeats is None:
        raise Refusal("dynamic-index", f"how often Tile '{node.label}' repeats is no constant list")
    listed = own_list(node, repeats)
    count = listed[own_axis(node, axis, len(listed))]
    if count == 1:
        return affine.at(axis)
    if source is node.inputs[0]:
        return affine.picked(np.arange(countable(affine.channels * count)) % affine.channels, axis)
    if count < 1 or affine.channels % count:
        raise Refusal("axis", f"{affine.channels} channels meet axis {axis} of Tile '{node.label}', which repeats it {count} times")
    copies = np.arange(affine.channels) % (affine.channels // count)
    return _merged(affine, copies, axis, f"Tile '{node.label}' makes channels of different affines of one")


# ReverseSequence turns the order of some elements along two axes; along another one every element keeps its channel.
def _reverse_sequence(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is not None and axis in (node.attribute("time_axis", 0), node.attribute("batch_axis", 1)):
        raise Refusal("axis", f"ReverseSequence '{node.label}' changes the order of axis {axis}")
    return affine


def _expand_target(node: Node, first: Sizes | None, elements: Callable[[Value | None], list[Size] | None]) -> list[Size] | None:
    """The sizes of the data broadcast with the list: a size above 1 stands, whatever the other one is."""
    wanted = elements(node.input(1))
    if first is None or wanted is None or any(isinstance(size, int) and size < 1 for size in (*wanted, *first)):
        return None
    rank = max(len(first), len(wanted))
    columns = zip([*[1] * (rank - len(first)), *first], [*[1] * (rank - len(wanted)), *wanted], strict=True)
    return [_broadcast(*pair) for pair in columns]


def _broadcast(own: Size, other: Size) -> Size:
    large = [size for size in (own, other) if isinstance(size, int) and size > 1]
    return large[0] if large else other if own == 1 else own if other in (1, own) else None


def _expanded_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    # Not by np.broadcast_shapes, which takes no sizes beyond the address space.
    data, sizes = arrays
    wanted, shape = list_of_sizes(sizes), list(data.shape)
    rank = max(len(wanted), len(shape))
    columns = zip([1] * (rank - len(wanted)) + wanted, [1] * (rank - len(shape)) + shape, strict=True)
    return math.prod(size if own == 1 else own for size, own in columns)


def _tiled_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    data, repeats = arrays[0], arrays[1]
    return data.size * math.prod(list_of_sizes(repeats))


_SQUEEZE = both_ways(_squeeze)
_RENUMBERING = Row(*both_ways(_reshape), sized=True, result_size=first_size)
_MOVED_LIST = replace(_RENUMBERING, size_slots=(1,), moved_inputs="first")
_INSERTING = replace(_MOVED_LIST, backward=_SQUEEZE[0], forward=_SQUEEZE[1])

LAYOUT = {
    "Transpose": Row(*both_ways(_transpose), sizes=_transposed_sizes, result_size=first_size, moved_inputs="first"),
    "Reshape": replace(_MOVED_LIST, reshape_target=_reshape_target),
    "Flatten": replace(_RENUMBERING, size_slots=(1,), reshape_target=_flatten_target),
    "Squeeze": _INSERTING,
    "Unsqueeze": replace(_INSERTING, sized=False),
    "DepthToSpace": Row(*both_ways(_depth_to_space), sized=True, sizes=same_batch, work=each_once),
    "SpaceToDepth": Row(*both_ways(_space_to_depth), sized=True, sizes=same_batch, work=each_once),
    "Expand": Row(*both_ways(_expand), sized=True, size_slots=(1,), result_size=_expanded_size, reshape_target=_expand_target),
    "Tile": Row(*both_ways(_tile), sized=True, size_slots=(1, 2), result_size=_tiled_size),
    "ReverseSequence": Row(*both_ways(_reverse_sequence), sized=True, sizes=same_sizes, work=each_once),
    "CenterCropPad": Row(size_slots=(1,), work=each_once),
}
