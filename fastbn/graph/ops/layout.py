"""The operators that move elements and let a per-channel affine pass, perhaps along another axis."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ModelError, expected
from fastbn.graph.model.node import Node, Shape, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.placing import axis_in, axis_of, both_ways, countable, only_data, own_axis, own_list
from fastbn.graph.ops.row import PresentGraph, Row, Transfer, Traveler
from fastbn.graph.ops.shape_rules import Size, Sizes, first_size, list_of_sizes, same_batch, same_sizes
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
    first = inputs[0]
    if first is None:
        return None
    perm = node.find_attribute("perm", list[int]) or list(range(len(first)))[::-1]
    return tuple(first[at] for at in perm) if sorted(perm) == list(range(len(first))) else None


# Reshape, Flatten, Squeeze, Unsqueeze renumber the elements: the channel of element e is (e / inner) % channels; the new axis must tell it.
def _reshape(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is None:
        return affine
    before, after = graph.shape(source), graph.shape(target)
    known = None if before is None else [size for size in before[axis:] if size is not None]
    if before is None or after is None or known is None or len(known) < len(before) - axis or 0 in (*before, *after):
        raise Refusal("axis-unknown", f"the shapes at {node.op} '{node.label}' are not known well enough to place axis {axis}")
    channels, inner = known[0], math.prod(known[1:])
    if channels != affine.channels:
        raise Refusal("axis", f"{affine.channels} channels meet axis {axis} of {node.op} '{node.label}', which has {channels}")
    if channels == 1:
        return affine.picked(np.zeros(1, np.int64), None)
    behind = 1
    for at in range(len(after) - 1, -1, -1):
        size = after[at]
        if size is None:
            break
        # Behind this axis lie `behind` elements: it tells the channel when it steps through whole inner runs and whole channel cycles.
        if inner % behind == 0 and size > 1 and size % (inner // behind * channels) == 0:
            return affine.picked(np.arange(countable(size)) // (inner // behind) % channels, at)
        behind *= size
    raise Refusal("axis", f"{node.op} '{node.label}' splits or mixes the channels of axis {axis}: {_text(before)} becomes {_text(after)}")


def _text(shape: Shape) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


def _reshape_target(node: Node, first: Sizes | None, elements: Callable[[Value | None], list[Size] | None]) -> list[Size] | None:
    return elements(node.input(1))


def _flatten_target(node: Node, first: Sizes | None, elements: Callable[[Value | None], list[Size] | None]) -> list[Size] | None:
    return [0, -1] if node.attribute("axis", 1) == 1 and first else None


# Concat:  along another axis every input carries the whole affine, along its own each input carries its part.
def _concat_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    axis, sizes = _concat_axis(node, traveler, graph)
    if axis is None:
        return Transfer(passed_on=[(slot, traveler.affine) for slot in range(len(node.inputs))])
    return Transfer(passed_on=_parts(node, traveler.affine, sizes, axis))


def _concat_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    axis, sizes = _concat_axis(node, traveler, graph)
    if axis is None:
        others = [(slot, value) for slot, value in enumerate(node.inputs) if slot != traveler.slot and value is not None]
        alike = [_giver(node, slot, value, traveler.affine, graph) for slot, value in others]
        lifted = [other for other in alike if other is not None]
        if len(lifted) < len(node.inputs) - 1:
            raise Refusal("other-branch", f"Concat '{node.label}' joins it with values that do not have the affine, along another axis")
        return Transfer(passed_on=[(0, traveler.affine)], lifted=lifted)
    return Transfer(passed_on=[(0, _extended(traveler.affine, sizes, traveler.slot, axis))])


def _parts(node: Node, affine: Affine, sizes: list[int], axis: int) -> list[tuple[int, Affine]]:
    """Return (number, affine) of each of several parts that lie side by side along the affine's axis."""
    if sum(sizes) != affine.channels:
        raise Refusal("axis", f"{affine.channels} channels meet the {sum(sizes)} of {node.op} '{node.label}'")
    ends = np.cumsum(sizes)
    return [(at, affine.picked(slice(end - sizes[at], end), axis)) for at, end in enumerate(ends)]


def _extended(affine: Affine, sizes: list[int], part: int, axis: int) -> Affine:
    """Return the affine on one of several parts that lie side by side along an axis, the others left as they are."""
    start, total = sum(sizes[:part]), countable(sum(sizes))
    if affine.channels not in (1, sizes[part]):
        raise Refusal("axis", f"{affine.channels} channels meet a part of {sizes[part]}")
    scale, shift, abs_terms = np.ones(total), np.zeros(total), np.zeros(total)
    here = slice(start, start + sizes[part])
    scale[here], shift[here], abs_terms[here] = affine.along(sizes[part])
    return Affine(scale, shift, axis, 0, abs_terms)


def _concat_axis(node: Node, traveler: Traveler, graph: PresentGraph) -> tuple[int | None, list[int]]:
    """Return (axis, sizes of the inputs along it) where the affine runs along the axis of joining, else (None, [])."""
    value = traveler.value
    axis = axis_of(node, traveler.affine, value, graph)
    rank = graph.rank(value)
    joined = node.attribute("axis", 1)
    if joined < 0 and rank is None:
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at Concat '{node.label}' is not known")
    joined = joined if rank is None else own_axis(node, joined, rank)
    is_number_of_one_part = axis is None and value is not node.outputs[0]
    if axis != joined and not is_number_of_one_part:
        return None, []
    shapes = [graph.shape(each) for each in node.inputs]
    sizes = [shape[joined] for shape in shapes if shape is not None and len(shape) > joined]
    known = [size for size in sizes if size is not None]
    if len(known) < len(shapes):
        raise Refusal("axis-unknown", f"the sizes that Concat '{node.label}' joins are not all known")
    return joined, known


def _concat_sizes(node: Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    first = inputs[0]
    if first is None:
        return None
    joined = node.attribute("axis", 1) % max(len(first), 1)
    return tuple(None if at == joined else size for at, size in enumerate(first))


def _concat_result_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    return sum(array.size for array in arrays)


# Split:  along another axis every output carries the whole affine, along its own each output carries its part; there one part may be asked
# for alone, and the others stay as they are.
def _split_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    only_data(node, traveler)
    axis, sizes = _split_axis(node, traveler, graph)
    outputs = [at for at, value in enumerate(node.outputs) if value is not None]
    if axis is None:
        return Transfer(passed_on=[(at, traveler.affine) for at in outputs])
    return Transfer(passed_on=[part for part in _parts(node, traveler.affine, sizes, axis) if part[0] in outputs])


def _split_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    axis, sizes = _split_axis(node, traveler, graph)
    if axis is None:
        others = [value for value in node.outputs if value is not None and value is not traveler.value]
        alike = [_only_reader(node, value, traveler.affine, graph) for value in others]
        lifted = [other for other in alike if other is not None]
        if len(lifted) < len(others):
            raise Refusal("other-outputs", f"Split '{node.label}' hands out more than the one value")
        return Transfer(passed_on=[(0, traveler.affine)], lifted=lifted)
    return Transfer(passed_on=[(0, _extended(traveler.affine, sizes, traveler.slot, axis))])


def _split_axis(node: Node, traveler: Traveler, graph: PresentGraph) -> tuple[int | None, list[int]]:
    """Return (axis, sizes of the outputs along it) where the affine runs along the axis of splitting, else (None, [])."""
    axis = axis_of(node, traveler.affine, traveler.value, graph)
    rank = graph.rank(traveler.value)
    split = node.attribute("axis", 0)
    if axis is None or (rank is not None and axis != own_axis(node, split, rank)):
        return None, []
    shapes = [graph.shape(output) for output in node.outputs]
    sizes = [shape[axis] for shape in shapes if shape is not None and len(shape) == rank]
    known = [size for size in sizes if size is not None]
    if rank is None or len(known) < len(shapes):
        raise Refusal("axis-unknown", f"the sizes of the outputs of Split '{node.label}' are not known")
    return axis, known


# Ghost batch normalization: the batch is split, every part has the same affine, and they are joined. All of them leave together.
def _only_reader(node: Node, value: Value, affine: Affine, graph: PresentGraph) -> Node | None:
    """Return the node that is the one reader of an output, in the same graph, where it is the same affine."""
    readers = graph.readers(value)
    if len(readers) != 1 or readers[0][0].scope is not node.scope:
        return None
    return readers[0][0] if _is_same(readers[0][0], affine, graph) else None


def _giver(node: Node, slot: int, value: Value, affine: Affine, graph: PresentGraph) -> Node | None:
    """Return the node that gives an input, where it is the same affine and nothing else reads what it gives."""
    giver = graph.producer(graph.source(value))
    if giver is None or giver.scope is not node.scope or not _is_same(giver, affine, graph):
        return None
    graph.refuse_readers(value, node, slot)
    return giver


def _is_same(node: Node, affine: Affine, graph: PresentGraph) -> bool:
    own = graph.affine(node)
    return (
        own is not None
        and own.axis == affine.axis
        and own.channels == affine.channels
        and bool((own.scale == affine.scale).all() and (own.shift == affine.shift).all())
    )


# DepthToSpace sends channel c to c % C' (DCR) or c / block^2 (CRD), C' = C / block^2. Backward each of the C takes its own; forward the
# channels that meet in one must agree.
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
    repeats = node.attribute("mode", b"DCR") == b"CRD"
    spread = np.arange(outputs * area) // area if repeats else np.arange(outputs * area) % outputs
    if is_backward:
        return affine.picked(spread, 1)
    first = np.arange(outputs) * area if repeats else np.arange(outputs)
    merged = affine.picked(first, 1)
    if (merged.scale[spread] != affine.scale).any() or (merged.shift[spread] != affine.shift).any():
        raise Refusal("axis", f"DepthToSpace '{node.label}' puts channels of different affines into one")
    return merged


# Expand repeats elements; along the affine's axis it must not.
def _expand(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    before, after = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    if affine.axis is None:
        return affine
    if before is None or after is None:
        raise Refusal("axis-unknown", f"the shapes at Expand '{node.label}' are not known")
    have, want = (before, after) if source is node.inputs[0] else (after, before)
    axis = axis_in(node, affine, len(have))
    assert axis is not None, "it has one"
    behind = axis - len(have)
    if -behind > min(len(before), len(after)) or before[behind] is None or before[behind] != after[behind]:
        raise Refusal("axis", f"Expand '{node.label}' makes the channels by repeating")
    return affine.at(behind + len(want))


# Tile repeats the whole of an axis: channel c of the output is channel c % C of the input; forward the repeats have the channels of it.
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
    first = affine.picked(np.arange(affine.channels // count), axis)
    copies = np.arange(affine.channels) % first.channels
    if (first.scale[copies] != affine.scale).any() or (first.shift[copies] != affine.shift).any():
        raise Refusal("axis", f"Tile '{node.label}' makes channels of different affines of one")
    return first


# ReverseSequence turns the order of some elements along two axes; along another one every element keeps its channel.
def _reverse_sequence(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if axis is not None and axis in (node.attribute("time_axis", 0), node.attribute("batch_axis", 1)):
        raise Refusal("axis", f"ReverseSequence '{node.label}' changes the order of axis {axis}")
    return affine


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


_RENUMBERING = Row(*both_ways(_reshape), sized=True, result_size=first_size)
_MOVED_LIST = replace(_RENUMBERING, size_slots=(1,), moved_inputs="first")

LAYOUT = {
    "Transpose": Row(*both_ways(_transpose), sizes=_transposed_sizes, result_size=first_size),
    "Reshape": replace(_MOVED_LIST, reshape_target=_reshape_target),
    "Flatten": replace(_RENUMBERING, size_slots=(1,), reshape_target=_flatten_target),
    "Squeeze": _MOVED_LIST,
    "Unsqueeze": replace(_MOVED_LIST, sized=False),
    "Concat": Row(_concat_backward, _concat_forward, sizes=_concat_sizes, result_size=_concat_result_size, moved_inputs="all"),
    "Split": Row(_split_backward, _split_forward, parts=True, sized=True, size_slots=(1,), result_size=first_size, moved_inputs="first"),
    "DepthToSpace": Row(*both_ways(_depth_to_space), sized=True, sizes=same_batch),
    "SpaceToDepth": Row(sizes=same_batch),
    "Expand": Row(*both_ways(_expand), sized=True, size_slots=(1,), result_size=_expanded_size),
    "Tile": Row(*both_ways(_tile), sized=True, size_slots=(1, 2), result_size=_tiled_size),
    "ReverseSequence": Row(*both_ways(_reverse_sequence), sized=True, sizes=same_sizes),
    "CenterCropPad": Row(size_slots=(1,)),
}
