"""Concat, Split and SplitToSequence: parts of a value side by side; and ghost batch normalization, one affine on every part of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ModelError, expected
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine, agreed
from fastbn.graph.ops.placing import axis_of, countable, known_list, known_number, only_data, own_axis
from fastbn.graph.ops.row import PresentGraph, Row, Transfer, Traveler
from fastbn.graph.ops.shape_rules import Size, Sizes, first_size
from fastbn.graph.reasons import Refusal

__all__ = ["PARTS"]


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
    axis, sizes = _split_axis(node, traveler.value, traveler.affine, graph)
    outputs = [at for at, value in enumerate(node.outputs) if value is not None]
    if axis is None:
        return Transfer(passed_on=[(at, traveler.affine) for at in outputs])
    return Transfer(passed_on=[part for part in _parts(node, traveler.affine, sizes, axis) if part[0] in outputs])


def _split_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    axis, sizes = _split_axis(node, traveler.value, traveler.affine, graph)
    if axis is None:
        others = [value for value in node.outputs if value is not None and value is not traveler.value]
        readers = [_only_reader(node, value, traveler.affine, graph) for value in others]
        alike = [reader for reader in readers if reader is not None]
        if len(alike) < len(others):
            raise Refusal("other-outputs", f"Split '{node.label}' hands out more than the one value")
        return Transfer(passed_on=[(0, traveler.affine)], alike=alike)
    return Transfer(passed_on=[(0, _extended(traveler.affine, sizes, traveler.slot, axis))])


# Several parts may be asked for at once: along another axis all of them for the same affine.
def _split_meet(node: Node, affines: Mapping[int, Affine], graph: PresentGraph) -> Transfer:
    asked = {slot: _split_axis(node, node.required_output(slot), affine, graph) for slot, affine in affines.items()}
    axis, sizes = next((each for each in asked.values() if each[0] is not None), (None, []))
    parts = list(affines.values())
    if axis is not None:
        if any(own is None and affines[slot].channels > 1 for slot, (own, _) in asked.items()):
            raise Refusal("other-branch", f"Split '{node.label}' hands out parts that would need affines along different axes")
        free = np.repeat([slot in affines for slot in range(len(node.outputs))], sizes)
        parts = [_part_alone(affine, sizes, slot, axis) for slot, affine in affines.items()]
        parts.append(Affine(np.ones(free.size), np.zeros(free.size), axis, free=free))  # the others stay as they are
    elif any(value is not None and slot not in affines and (value.readers or value.is_output) for slot, value in enumerate(node.outputs)):
        raise Refusal("other-outputs", f"Split '{node.label}' hands out a part that nobody asks for the same")
    whole = agreed(parts)
    if whole is None:
        raise Refusal("other-branch", f"Split '{node.label}' hands out parts that would need different affines")
    return Transfer(passed_on=[(0, whole)])


def _part_alone(affine: Affine, sizes: list[int], slot: int, axis: int) -> Affine:
    """Return what a part of a value asks of the whole, whose other parts it does not read."""
    whole = _extended(affine, sizes, slot, axis)
    free = np.ones(whole.channels, bool)
    start = sum(sizes[:slot])
    free[start : start + sizes[slot]] = False if affine.free is None else affine.free
    return replace(whole, free=free)


def _split_axis(node: Node, value: Value, affine: Affine, graph: PresentGraph) -> tuple[int | None, list[int]]:
    """Return (axis, sizes of the outputs along it) where the affine runs along the axis of splitting, else (None, [])."""
    axis = axis_of(node, affine, value, graph)
    rank = graph.rank(value)
    split = node.attribute("axis", 0)
    if axis is None or (rank is not None and axis != own_axis(node, split, rank)) or (rank is None and split >= 0 and axis != split):
        return None, []
    if rank is None:
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at Split '{node.label}' is not known")
    written = node.find_attribute("split", list[int]) or known_list(node, 1, graph)
    sizes = [_size_at(output, axis, graph) for output in node.outputs] if written is None else written
    total = affine.channels if value is node.inputs[0] else _size_at(node.inputs[0], axis, graph)
    if len(sizes) != len(node.outputs):
        raise ModelError(expected(f"{len(node.outputs)} sizes of parts", f"{len(sizes)}", node.label))
    return axis, _parts_of(node, sizes, total)


# SplitToSequence:  an affine on the sequence is one on the value that is cut.
def _cut_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    return Transfer(passed_on=[(0, traveler.affine)])


# SequenceAt:  one part of such a value, as an output of Split is; whoever takes another part of the sequence has to agree.
def _at_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    cut = graph.producer(graph.source(node.required_input(0)))
    if cut is None or not cut.is_op("SplitToSequence"):
        raise Refusal("no-absorber", f"SequenceAt '{node.label}' reads a sequence that is not one value in parts")
    axis = axis_of(node, traveler.affine, traveler.value, graph)
    if axis is None:
        return Transfer(passed_on=[(0, traveler.affine)])
    rank = graph.rank(cut.required_input(0))
    position = known_number(node, 1, graph)
    if rank is None or position is None or cut.input(1) is None:
        raise Refusal("axis-unknown", f"which part SequenceAt '{node.label}' takes, and of what, is not known")
    joined = own_axis(cut, cut.attribute("axis", 0), rank)
    if axis != joined:
        return Transfer(passed_on=[(0, traveler.affine.at(axis))])
    sizes = _cut_sizes(cut, joined, graph)
    if not -len(sizes) <= position < len(sizes):
        raise ModelError(expected(f"the position of one of {len(sizes)} parts", str(position), node.label))
    return Transfer(passed_on=[(0, _part_alone(traveler.affine, sizes, position % len(sizes), joined))])


def _cut_sizes(node: Node, axis: int, graph: PresentGraph) -> list[int]:
    """Return the sizes of the parts of a SplitToSequence along its axis: as listed, or equal ones but for the last."""
    total, each = _size_at(node.inputs[0], axis, graph), known_number(node, 1, graph)
    listed = None if each is not None else known_list(node, 1, graph)
    if isinstance(total, int) and each is not None and each > 0:
        return [min(each, total - at) for at in range(0, countable(total), each)]
    if listed is None or None in listed:
        raise Refusal("axis-unknown", f"the sizes of the parts at SplitToSequence '{node.label}' are not known")
    return _parts_of(node, listed, total)


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
    return own is not None and own.equals(affine)


PARTS = {
    "Concat": Row(
        _concat_backward, _concat_forward, join=_concat_join, sizes=_concat_sizes, result_size=_concat_result_size, moved_inputs="all"
    ),
    "Split": Row(
        _split_backward,
        _split_forward,
        meet=_split_meet,
        parts=True,
        sized=True,
        size_slots=(1,),
        result_size=first_size,
        moved_inputs="first",
    ),
    "SplitToSequence": Row(_cut_backward, None, sized=True, size_slots=(1,)),
    "SequenceAt": Row(_at_backward, None, sized=True),
}
