"""The operators that move elements and let a per-channel affine pass, perhaps along another axis, one row per operator."""

import math

import numpy as np

from fastbn.errors import ModelError, expected
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.row import Row, Taken, axis_of, countable, data_sample, no_terms, only_data, own_axis, own_list, symmetric
from fastbn.graph.reasons import Refusal

__all__ = ["LAYOUT"]


# Transpose moves the axis: axis j of the output is axis perm[j] of the input.
def _transpose(node, affine, came, goes, view):
    axis = axis_of(node, affine, came, view)
    if axis is None:
        return affine
    perm = node.attribute("perm")
    if perm is None:
        rank = view.rank(came)
        if rank is None:
            raise Refusal("axis-unknown", f"the rank of '{came.name}' at Transpose '{node.label}' is not known")
        perm = list(range(rank))[::-1]
    if sorted(perm) != list(range(view.rank(node.inputs[0]) or len(perm))) or axis >= len(perm):
        raise ModelError(expected("a permutation of all axes", str(perm), node.label))
    return affine.at(perm[axis] if came is node.outputs[0] else perm.index(axis))


# Reshape, Flatten, Squeeze, Unsqueeze renumber the elements: the channel of element e is (e / inner) % channels; the new axis must tell it.
def _reshape(node, affine, came, goes, view):
    axis = axis_of(node, affine, came, view)
    if axis is None:
        return affine
    before, after = view.shape(came), view.shape(goes)
    if before is None or after is None or None in before[axis:] or 0 in (*before, *after):
        raise Refusal("axis-unknown", f"the shapes at {node.op} '{node.label}' are not known well enough to place axis {axis}")
    inner, channels = math.prod(before[axis + 1 :]), before[axis]
    if channels != affine.channels:
        raise Refusal("axis", f"{affine.channels} channels meet axis {axis} of {node.op} '{node.label}', which has {channels}")
    if channels == 1:
        return affine.picked(np.zeros(1, int), None)
    behind = 1
    for at in range(len(after) - 1, -1, -1):
        size = after[at]
        if size is None:
            break
        # Behind this axis lie `behind` elements: it tells the channel when it steps through whole inner runs and whole channel cycles.
        if inner % behind == 0 and size > 1 and size % (inner // behind * channels) == 0:
            return affine.picked(np.arange(countable(size)) // (inner // behind) % channels, at)
        behind *= size
    raise Refusal("axis", f"{node.op} '{node.label}' splits or mixes the channels of axis {axis}: {_sizes(before)} becomes {_sizes(after)}")


def _sizes(shape):
    return "x".join("?" if size is None else str(size) for size in shape)


# Concat:  along another axis every input carries the whole affine, along its own each input carries its part.
def _concat_backward(node, affine, view):
    axis, sizes = _concat_axis(node, affine, node.outputs[0], view)
    if axis is None:
        return Taken(onward=[(slot, affine) for slot in range(len(node.inputs))])
    return Taken(onward=_parts(node, affine, sizes, axis))


def _concat_forward(node, slot, affine, view):
    axis, sizes = _concat_axis(node, affine, node.inputs[slot], view)
    if axis is None:
        raise Refusal("other-branch", f"Concat '{node.label}' joins it with values that do not have the affine, along another axis")
    return Taken(onward=[(0, _extended(affine, sizes, slot, axis))])


def _parts(node, affine, sizes, axis):
    """Return (number, affine) of each of several parts that lie side by side along the affine's axis."""
    if sum(sizes) != affine.channels:
        raise Refusal("axis", f"{affine.channels} channels meet the {sum(sizes)} of {node.op} '{node.label}'")
    ends = np.cumsum(sizes)
    return [(at, affine.picked(slice(end - sizes[at], end), axis)) for at, end in enumerate(ends)]


def _extended(affine, sizes, part, axis):
    """Return the affine on one of several parts that lie side by side along an axis, the others left as they are."""
    start, total = sum(sizes[:part]), countable(sum(sizes))
    if affine.channels not in (1, sizes[part]):
        raise Refusal("axis", f"{affine.channels} channels meet a part of {sizes[part]}")
    scale, shift, spread = np.ones(total), np.zeros(total), np.zeros(total)
    here = slice(start, start + sizes[part])
    scale[here], shift[here], spread[here] = affine.along(sizes[part])
    return Affine(scale, shift, axis, 0, spread)


def _concat_axis(node, affine, value, view):
    """Return (axis, sizes of the inputs along it) where the affine runs along the axis of joining, else (None, None)."""
    axis = axis_of(node, affine, value, view)
    rank = view.rank(value)
    joined = node.attribute("axis", 1)
    if joined < 0 and rank is None:
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at Concat '{node.label}' is not known")
    joined = joined if rank is None else own_axis(node, joined, rank)
    forward_scalar = axis is None and value is not node.outputs[0]
    if axis != joined and not forward_scalar:
        return None, None
    shapes = [view.shape(value) for value in node.inputs]
    sizes = [None if shape is None or len(shape) <= joined else shape[joined] for shape in shapes]
    if None in sizes:
        raise Refusal("axis-unknown", f"the sizes that Concat '{node.label}' joins are not all known")
    return joined, sizes


# Split:  along another axis every output carries the whole affine, along its own each output carries its part; there one part may be asked
# for alone, and the others stay as they are.
def _split_forward(node, slot, affine, view):
    only_data(node, slot)
    axis, sizes = _split_axis(node, affine, node.inputs[0], view)
    outputs = [at for at, value in enumerate(node.outputs) if value is not None]
    if axis is None:
        return Taken(onward=[(at, affine) for at in outputs])
    return Taken(onward=[part for part in _parts(node, affine, sizes, axis) if part[0] in outputs])


def _split_backward(node, affine, view):
    axis, sizes = _split_axis(node, affine, view.asked, view)
    if axis is None:
        raise Refusal("other-outputs", f"Split '{node.label}' hands out more than the one value")
    return Taken(onward=[(0, _extended(affine, sizes, view.asked.slot, axis))])


def _split_axis(node, affine, value, view):
    axis = axis_of(node, affine, value, view)
    rank = view.rank(value)
    split = node.attribute("axis", 0)
    if axis is None or (rank is not None and axis != own_axis(node, split, rank)):
        return None, None
    shapes = [view.shape(output) for output in node.outputs]
    sizes = [None if shape is None or len(shape) != rank else shape[axis] for shape in shapes]
    if rank is None or None in sizes:
        raise Refusal("axis-unknown", f"the sizes of the outputs of Split '{node.label}' are not known")
    return axis, sizes


# Slice, Gather by constants choose channels: forward those that were chosen; backward the others are of no account. A Gather along another
# axis moves whole rows, whatever the indices: its one axis becomes as many as the indices have.
def _choose(node, affine, came, goes, view):
    data = node.inputs[0]
    forward = came is data
    axis = axis_of(node, affine, data if forward else node.outputs[0], view)
    if axis is None:
        return affine
    shape = view.shape(data)
    if shape is None:
        raise Refusal("axis-unknown", f"the shape before {node.op} '{node.label}' is not known")
    if node.op == "Gather":
        moved, axis = _gathered(node, axis, shape, forward, view)
        if moved is not None:
            return affine.at(moved)
    if shape[axis] is None:
        raise Refusal("axis-unknown", f"the shape before {node.op} '{node.label}' is not known")
    chosen = _chosen(node, len(shape), axis, countable(shape[axis]), view)
    if chosen is None:
        return affine
    if affine.channels != (shape[axis] if forward else chosen.size):
        raise Refusal("axis", f"{affine.channels} channels meet axis {axis} of {node.op} '{node.label}'")
    if forward:
        # A Gather by one index that is no list takes the axis away.
        is_taken_away = node.op == "Gather" and view.rank(node.input(1)) == 0
        return affine.picked(chosen, None if is_taken_away else axis)
    if len(set(chosen.tolist())) != chosen.size:
        raise Refusal("axis", f"{node.op} '{node.label}' gives one channel out twice")
    parts = [np.full(shape[axis], fill) for fill in (1.0, 0.0, 0.0)]
    for part, values in zip(parts, (affine.scale, affine.shift, affine.abs_terms), strict=True):
        part[chosen] = values
    return Affine(parts[0], parts[1], axis, 0, parts[2])


def _gathered(node, axis, shape, forward, view):
    """Return (the axis on the other side of a Gather, None where it is the one that is chosen from, that axis)."""
    chosen = own_axis(node, node.attribute("axis", 0), len(shape))
    rank = view.rank(node.input(1))
    if rank is None:
        raise Refusal("axis-unknown", f"the rank of the indices of Gather '{node.label}' is not known")
    grown = rank - 1
    if axis < chosen:
        return axis, chosen
    if forward:
        return (None if axis == chosen else axis + grown), chosen
    return (None if axis <= chosen + grown else axis - grown), chosen


def _chosen(node, rank, axis, size, view):
    """Return the indices that a Slice or Gather takes along an axis, None where it leaves the axis alone."""
    if node.op == "Gather":
        many = view.rank(node.input(1))
        if many is not None and many > 1:
            raise Refusal("axis", f"Gather '{node.label}' spreads its channels over {many} axes")
        indices = view.index.constant(node.input(1))
        if indices is None or len(indices.shape) > 1:
            raise Refusal("dynamic-index", f"the indices of Gather '{node.label}' are no constant list")
        if not indices.shape:
            return np.array([own_axis(node, int(indices.array()), size)])
        return np.array([own_axis(node, index, size) for index in own_list(node, indices)], int)
    starts, ends, axes, steps = _bounds(node, view)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise ModelError(expected("a start, an end and a step for each axis", f"{starts}, {ends}, {axes}, {steps}", node.label))
    for start, end, at, step in zip(starts, ends, axes, steps, strict=True):
        if own_axis(node, at, rank) == axis:
            end = None if step < 0 and end < -size else end
            return np.arange(size)[slice(start, end, step)]
    return None


def _bounds(node, view):
    """Return the lists (starts, ends, axes, steps) of a Slice."""
    if view.index.opset < 10:
        starts, ends = node.attribute("starts", []), node.attribute("ends", [])
        return starts, ends, node.attribute("axes", []) or list(range(len(starts))), [1] * len(starts)
    found = [view.index.constant(node.input(at)) for at in range(1, 5)]
    if any(constant is None and node.input(at + 1) is not None for at, constant in enumerate(found)):
        raise Refusal("dynamic-index", f"the bounds of Slice '{node.label}' are no constants")
    starts, ends, axes, steps = (None if constant is None else own_list(node, constant) for constant in found)
    return starts, ends, list(range(len(starts))) if axes is None else axes, [1] * len(starts) if steps is None else steps


# DepthToSpace sends channel c to c % C' (DCR) or c / block^2 (CRD), C' = C / block^2. Backward each of the C takes its own; forward the
# channels that meet in one must agree.
def _depth_to_space(node, affine, came, goes, view):
    axis = axis_of(node, affine, came, view)
    if axis is None:
        return affine
    if axis != 1:
        raise Refusal("axis", f"DepthToSpace '{node.label}' mixes the elements of axis {axis}")
    area = node.attribute("blocksize") ** 2
    if area < 1 or (came is node.inputs[0] and affine.channels % area):
        raise ModelError(expected(f"channels that blocks of {area} divide", f"{affine.channels}", node.label))
    outputs = affine.channels if came is node.outputs[0] else affine.channels // area
    repeats = node.attribute("mode", b"DCR") == b"CRD"
    target = np.arange(outputs * area) // area if repeats else np.arange(outputs * area) % outputs
    if came is node.outputs[0]:
        return affine.picked(target, 1)
    first = np.arange(outputs) * area if repeats else np.arange(outputs)
    merged = affine.picked(first, 1)
    if any((part[target] != whole).any() for part, whole in ((merged.scale, affine.scale), (merged.shift, affine.shift))):
        raise Refusal("axis", f"DepthToSpace '{node.label}' puts channels of different affines into one")
    return merged


# Expand repeats elements; along the affine's axis it must not.
def _expand(node, affine, came, goes, view):
    before, after = view.shape(node.inputs[0]), view.shape(node.outputs[0])
    if affine.axis is None:
        return affine
    if before is None or after is None:
        raise Refusal("axis-unknown", f"the shapes at Expand '{node.label}' are not known")
    axis = axis_of(node, affine, came, view) - len(view.shape(came))
    if -axis > min(len(before), len(after)) or before[axis] is None or before[axis] != after[axis]:
        raise Refusal("axis", f"Expand '{node.label}' makes the channels by repeating")
    return affine.at(axis + len(view.shape(goes)))


# Pad: copies of elements carry the affine; a constant does so only where it is 0 and nothing is shifted.
def _pad(node, affine, came, goes, view):
    axis = axis_of(node, affine, came, view)
    mode = node.attribute("mode", b"constant")
    constant = view.index.constant(node.input(1)) if view.index.opset >= 11 else None
    pads = node.attribute("pads") or node.attribute("paddings") or (None if constant is None else own_list(node, constant))
    axes = None if node.input(3) is None else view.index.constant(node.input(3))
    if pads is None or (node.input(3) is not None and axes is None):
        raise Refusal("dynamic-index", f"how much Pad '{node.label}' pads is no constant")
    listed = range(len(pads) // 2) if axes is None else own_list(node, axes)
    rank = view.rank(came)
    if len(pads) != 2 * len(listed) or (axes is None and rank not in (None, len(listed))):
        raise ModelError(expected("two sizes of padding for each axis", f"{len(pads)}", node.label))
    if axis is not None and rank is None and min(listed, default=0) < 0:
        raise Refusal("axis-unknown", f"the rank of '{came.name}' at Pad '{node.label}' is not known")
    sizes = zip(listed, pads, pads[len(listed) :], strict=False)
    padded = {at if rank is None else own_axis(node, at, rank) for at, *both in sizes if any(both)}
    if axis in padded:
        raise Refusal("axis", f"Pad '{node.label}' pads axis {axis}")
    if mode == b"constant":
        value = node.attribute("value", 0.0)
        if node.input(2) is not None:
            found = view.index.constant(node.input(2))
            if found is not None and found.size != 1:
                raise ModelError(expected("one number to pad with", f"{found.size}", node.label))
            value = None if found is None else found.array().reshape(-1)[0]
        if any(pads) and (value != 0 or affine.shifts):
            raise Refusal("padding", f"Pad '{node.label}' adds a constant that would have to change with the affine")
    return affine


LAYOUT = {
    "Transpose": symmetric(_transpose),
    "Reshape": symmetric(_reshape),
    "Flatten": symmetric(_reshape),
    "Squeeze": symmetric(_reshape),
    "Unsqueeze": symmetric(_reshape),
    "Concat": Row(_concat_backward, _concat_forward, no_terms, data_sample),
    "Split": Row(_split_backward, _split_forward, no_terms, data_sample, parts=True),
    "Slice": symmetric(_choose),
    "Gather": symmetric(_choose),
    "DepthToSpace": symmetric(_depth_to_space),
    "Expand": symmetric(_expand),
    "Pad": symmetric(_pad),
}
