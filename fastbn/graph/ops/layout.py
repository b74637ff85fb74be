"""The operators that move elements and let a per-channel affine pass, perhaps along another axis."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ModelError, expected
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.placing import (
    axis_beside,
    axis_in,
    axis_of,
    both_ways,
    countable,
    known_list,
    named_axes,
    only_data,
    own_axis,
    own_list,
)
from fastbn.graph.ops.row import PresentGraph, Row, Transfer, Traveler
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
        givers = [_giver(node, slot, value, traveler.affine, graph) for slot, value in others]
        alike = [giver for giver in givers if giver is not None]
        if len(alike) < len(node.inputs) - 1:
            raise Refusal("other-branch", f"Concat '{node.label}' joins it with values that do not have the affine, along another axis")
        return Transfer(passed_on=[(0, traveler.affine)], alike=alike)
    return Transfer(passed_on=[(0, _extended(traveler.affine, sizes, traveler.slot, axis))])


# Along another axis every input must have the affine; along its own the result has that of each part.
def _concat_join(node: Node, affines: Mapping[int, Affine], graph: PresentGraph) -> Transfer:
    values = {slot: node.required_input(slot) for slot in affines}
    axes = {slot: axis_of(node, affine, values[slot], graph) for slot, affine in affines.items()}
    joined = _joined_axis(node, next(iter(values.values())), graph)
    first = next(iter(affines.values()))
    if len(affines) == len(node.inputs) and len(set(axes.values())) == 1 and joined not in axes.values():
        if not all(each.equals(first) for each in affines.values()):
            raise Refusal("other-branch", f"Concat '{node.label}' joins values of different affines along another axis")
        return Transfer(passed_on=[(0, first)])
    if set(axes.values()) - {joined, None}:
        raise Refusal("other-branch", f"Concat '{node.label}' joins it with values that do not have the affine, along another axis")
    sizes = [_size_at(value, joined, graph) for value in node.inputs]
    for slot, affine in affines.items():
        sizes[slot] = sizes[slot] if axes[slot] is None else affine.channels
    known = _parts_of(node, sizes, _size_at(node.outputs[0], joined, graph))
    whole = [_extended(affine, known, slot, joined) for slot, affine in affines.items()]
    scale, shift, abs_terms = whole[0].scale, whole[0].shift, whole[0].abs_terms
    for each in whole[1:]:  # outside their parts they are 1 and 0
        scale, shift, abs_terms = scale * each.scale, shift + each.shift, abs_terms + each.abs_terms
    return Transfer(passed_on=[(0, Affine(scale, shift, joined, 0, abs_terms))])


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
    joined = _joined_axis(node, value, graph)
    is_number_of_one_part = axis is None and value is not node.outputs[0]
    if axis != joined and not is_number_of_one_part:
        return None, []
    sizes = [_size_at(each, joined, graph) for each in node.inputs]
    if value is node.outputs[0]:
        return joined, _parts_of(node, sizes, traveler.affine.channels)
    if axis is not None:
        sizes[traveler.slot] = traveler.affine.channels
    return joined, _parts_of(node, sizes, _size_at(node.outputs[0], joined, graph))


def _joined_axis(node: Node, value: Value, graph: PresentGraph) -> int:
    """Return the axis along which a Concat joins, from the front; all its values have the same rank."""
    rank, joined = graph.rank(value), node.attribute("axis", 1)
    if rank is not None:
        return own_axis(node, joined, rank)
    if joined < 0:
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at Concat '{node.label}' is not known")
    return joined


def _size_at(value: Value | None, axis: int, graph: PresentGraph) -> Size:
    """Return the size of one axis of a value."""
    sizes = graph.sizes(value)
    return sizes[axis] if sizes is not None and len(sizes) > axis else None


def _parts_of(node: Node, sizes: Sequence[Size], total: Size) -> list[int]:
    """Return the sizes of parts that make up a total; Refusal where more than one of them is not known."""
    known = [size for size in sizes if isinstance(size, int)]
    rest = total - sum(known) if isinstance(total, int) else -1
    if len(known) < len(sizes) and (len(known) < len(sizes) - 1 or rest < 0):
        raise Refusal("axis-unknown", f"the sizes of the parts at {node.op} '{node.label}' are not known")
    return [size if isinstance(size, int) else rest for size in sizes]


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
        readers = [_only_reader(node, value, traveler.affine, graph) for value in others]
        alike = [reader for reader in readers if reader is not None]
        if len(alike) < len(others):
            raise Refusal("other-outputs", f"Split '{node.label}' hands out more than the one value")
        return Transfer(passed_on=[(0, traveler.affine)], alike=alike)
    return Transfer(passed_on=[(0, _extended(traveler.affine, sizes, traveler.slot, axis))])


def _split_axis(node: Node, traveler: Traveler, graph: PresentGraph) -> tuple[int | None, list[int]]:
    """Return (axis, sizes of the outputs along it) where the affine runs along the axis of splitting, else (None, [])."""
    axis = axis_of(node, traveler.affine, traveler.value, graph)
    rank = graph.rank(traveler.value)
    split = node.attribute("axis", 0)
    if axis is None or (rank is not None and axis != own_axis(node, split, rank)) or (rank is None and split >= 0 and axis != split):
        return None, []
    if rank is None:
        raise Refusal("axis-unknown", f"the rank of '{traveler.value.name}' at Split '{node.label}' is not known")
    written = node.find_attribute("split", list[int]) or known_list(node, 1, graph)
    sizes = [_size_at(output, axis, graph) for output in node.outputs] if written is None else written
    total = traveler.affine.channels if traveler.value is node.inputs[0] else _size_at(node.inputs[0], axis, graph)
    if len(sizes) != len(node.outputs):
        raise ModelError(expected(f"{len(node.outputs)} sizes of parts", f"{len(sizes)}", node.label))
    return axis, _parts_of(node, sizes, total)


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
    "Concat": Row(
        _concat_backward, _concat_forward, join=_concat_join, sizes=_concat_sizes, result_size=_concat_result_size, moved_inputs="all"
    ),
    "Split": Row(_split_backward, _split_forward, parts=True, sized=True, size_slots=(1,), result_size=first_size, moved_inputs="first"),
    "DepthToSpace": Row(*both_ways(_depth_to_space), sized=True, sizes=same_batch, work=each_once),
    "SpaceToDepth": Row(*both_ways(_space_to_depth), sized=True, sizes=same_batch, work=each_once),
    "Expand": Row(*both_ways(_expand), sized=True, size_slots=(1,), result_size=_expanded_size),
    "Tile": Row(*both_ways(_tile), sized=True, size_slots=(1, 2), result_size=_tiled_size),
    "ReverseSequence": Row(*both_ways(_reverse_sequence), sized=True, sizes=same_sizes, work=each_once),
    "CenterCropPad": Row(size_slots=(1,), work=each_once),
}
