"""Table two: the operators that let a per-channel affine pass, perhaps along another axis, one row per operator.

Rows have the form of absorb.Row and change no constants. Most of them are symmetric: what may pass from the output to the input may pass
from the input to the output, along the axis that corresponds.
"""

import math

import numpy as np

from fastbn.graph.absorb import Row, Taken, axis_of
from fastbn.graph.constant import Affine
from fastbn.graph.report import Refusal, first_few

__all__ = ["CARRIERS"]

# Along an axis of more elements no affine is spread out: a few bytes of a model may ask for any number.
LARGEST_AXIS = 1 << 24


def _only_data(node, slot):
    if slot != 0:
        raise Refusal("no-absorber", f"it is input {slot} of {node.op} '{node.label}', not the data")


def _symmetric(transfer, terms=None):
    """Return a Row of one function: transfer(node, affine, came from value, goes to value, site) -> affine."""

    def backward(node, affine, site):
        return Taken(onward=[(0, transfer(node, affine, node.outputs[0], node.inputs[0], site))])

    def forward(node, slot, affine, site):
        _only_data(node, slot)
        return Taken(onward=[(0, transfer(node, affine, node.inputs[0], node.outputs[0], site))])

    return Row(backward, forward, terms or _no_terms, _data_sample)


def _no_terms(node, site):
    return 0


def _data_sample(node, site):
    return {slot: site.small_shape(value) for slot, value in enumerate(node.inputs) if value is not None}


# Identity:  f(S x + T) = S f(x) + T.
def _identity(node, affine, came, goes, site):
    return affine


# Dropout in inference is Identity; the ways to say "inference" changed with the opset.
def _dropout(node, affine, came, goes, site):
    opset, mode = site.index.opset, node.input(2)
    training = None if mode is None else site.index.constant(mode)
    if opset < 7 and not node.attribute("is_test", 0):
        raise Refusal("training-dropout", f"Dropout '{node.label}' drops at random (opset {opset} without is_test=1)")
    if mode is not None and (training is None or training.array().any()):
        raise Refusal("training-dropout", f"Dropout '{node.label}' may drop at random: its training_mode is not a constant false")
    return affine


# Cast to the type that a value already has is Identity, as some exporters write it; any other rounds or converts.
def _cast(node, affine, came, goes, site):
    kind = site.index.kind(node.inputs[0])
    if kind == 0 or kind != node.attribute("to"):
        raise Refusal("no-absorber", f"Cast '{node.label}' may change the type of '{node.inputs[0].name}'")
    return affine


# Neg:  -(S x + T) = S (-x) - T.
def _neg(node, affine, came, goes, site):
    return Affine(affine.scale, -affine.shift, affine.axis, affine.rank, affine.spread)


# Transpose moves the axis: axis j of the output is axis perm[j] of the input.
def _transpose(node, affine, came, goes, site):
    axis = axis_of(node, affine, came, site)
    if axis is None:
        return affine
    perm = node.attribute("perm")
    if perm is None:
        rank = site.rank(came)
        if rank is None:
            raise Refusal("axis-unknown", f"the rank of '{came.name}' at Transpose '{node.label}' is not known")
        perm = list(range(rank))[::-1]
    if sorted(perm) != list(range(len(perm))) or axis >= len(perm):
        raise Refusal("axis", f"the perm of Transpose '{node.label}' is no order of the axes")
    return affine.at(perm[axis] if came is node.outputs[0] else perm.index(axis))


# Reshape, Flatten, Squeeze, Unsqueeze renumber the elements: the channel of element e is (e / inner) % channels; the new axis must tell it.
def _reshape(node, affine, came, goes, site):
    axis = axis_of(node, affine, came, site)
    if axis is None:
        return affine
    before, after = site.shape(came), site.shape(goes)
    if before is None or after is None or None in before[axis:]:
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
            return affine.picked(np.arange(_countable(size)) // (inner // behind) % channels, at)
        behind *= size
    raise Refusal("axis", f"{node.op} '{node.label}' splits or mixes the channels of axis {axis}: {_sizes(before)} becomes {_sizes(after)}")


def _sizes(shape):
    return "x".join("?" if size is None else str(size) for size in shape)


# Concat:  along another axis every input carries the whole affine, along its own each input carries its part.
def _concat_backward(node, affine, site):
    axis, sizes = _concat_axis(node, affine, node.outputs[0], site)
    if axis is None:
        return Taken(onward=[(slot, affine) for slot in range(len(node.inputs))])
    ends = np.cumsum(sizes)
    return Taken(onward=[(slot, affine.picked(slice(end - sizes[slot], end), axis)) for slot, end in enumerate(ends)])


def _concat_forward(node, slot, affine, site):
    axis, sizes = _concat_axis(node, affine, node.inputs[slot], site)
    if axis is None:
        raise Refusal("other-branch", f"Concat '{node.label}' joins it with values that do not have the affine, along another axis")
    return Taken(onward=[(0, _extended(affine, sizes, slot, axis))])


def _countable(size):
    if size > LARGEST_AXIS:
        raise Refusal("axis", f"an axis of {size} elements is too long for one scale each")
    return size


def _extended(affine, sizes, part, axis):
    """Return the affine on one of several parts that lie side by side along an axis, the others left as they are."""
    start, total = sum(sizes[:part]), _countable(sum(sizes))
    scale, shift, spread = np.ones(total), np.zeros(total), np.zeros(total)
    here = slice(start, start + sizes[part])
    scale[here], shift[here], spread[here] = affine.along(sizes[part])
    return Affine(scale, shift, axis, 0, spread)


def _concat_axis(node, affine, value, site):
    """Return (axis, sizes of the inputs along it) where the affine runs along the axis of joining, else (None, None)."""
    axis = axis_of(node, affine, value, site)
    rank = site.rank(value)
    joined = node.attribute("axis", 1)
    if joined < 0 and rank is None:
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at Concat '{node.label}' is not known")
    joined = joined % rank if rank else joined
    forward_scalar = axis is None and value is not node.outputs[0]
    if axis != joined and not forward_scalar:
        return None, None
    shapes = [site.shape(value) for value in node.inputs]
    sizes = [None if shape is None or len(shape) <= joined else shape[joined] for shape in shapes]
    if None in sizes:
        raise Refusal("axis-unknown", f"the sizes that Concat '{node.label}' joins are not all known")
    return joined, sizes


# Split:  along another axis every output carries the whole affine, along its own each output carries its part; there one part may be asked
# for alone, and the others stay as they are.
def _split_forward(node, slot, affine, site):
    _only_data(node, slot)
    axis, sizes = _split_axis(node, affine, node.inputs[0], site)
    outputs = [at for at, value in enumerate(node.outputs) if value is not None]
    if axis is None:
        return Taken(onward=[(at, affine) for at in outputs])
    ends = np.cumsum(sizes)
    return Taken(onward=[(at, affine.picked(slice(ends[at] - sizes[at], ends[at]), axis)) for at in outputs])


def _split_backward(node, affine, site):
    axis, sizes = _split_axis(node, affine, site.asked, site)
    if axis is None:
        raise Refusal("other-outputs", f"Split '{node.label}' hands out more than the one value")
    return Taken(onward=[(0, _extended(affine, sizes, site.asked.slot, axis))])


def _split_axis(node, affine, value, site):
    axis = axis_of(node, affine, value, site)
    rank = site.rank(value)
    split = node.attribute("axis", 0)
    if axis is None or (rank is not None and axis != split % rank):
        return None, None
    shapes = [site.shape(output) for output in node.outputs]
    sizes = [None if shape is None else shape[axis] for shape in shapes]
    if rank is None or None in sizes:
        raise Refusal("axis-unknown", f"the sizes of the outputs of Split '{node.label}' are not known")
    return axis, sizes


# Slice, Gather by constants choose channels: forward those that were chosen; backward the others are of no account. Gather puts the axes
# of its indices in the place of its own axis: what lies behind moves on, whatever the indices are.
def _gather(node, affine, came, goes, site):
    axis = axis_of(node, affine, came, site)
    if axis is None:
        return affine
    rank, many = site.rank(node.inputs[0]), site.rank(node.inputs[1])
    if not rank or many is None:
        raise Refusal("axis-unknown", f"the ranks of what Gather '{node.label}' reads are not known")
    at = node.attribute("axis", 0) % rank
    behind = at + (1 if came is node.inputs[0] else many)
    if axis < at:
        return affine
    if axis >= behind:
        return affine.at(axis + (many - 1 if came is node.inputs[0] else 1 - many))
    if many == 1:
        return _choose(node, affine, came, goes, site)
    if many == 0:
        index = site.index.constant(node.inputs[1])
        if index is None:
            raise Refusal("dynamic-index", f"the index of Gather '{node.label}' is no constant")
        return affine.picked(index.array().astype(np.int64).reshape(1) % affine.channels, None)
    raise Refusal("axis", f"Gather '{node.label}' spreads its channels over {many} axes")


def _choose(node, affine, came, goes, site):
    axis = axis_of(node, affine, node.inputs[0] if came is node.inputs[0] else node.outputs[0], site)
    if axis is None:
        return affine
    shape = site.shape(node.inputs[0])
    if shape is None or shape[axis] is None:
        raise Refusal("axis-unknown", f"the shape before {node.op} '{node.label}' is not known")
    chosen = _chosen(node, len(shape), axis, _countable(shape[axis]), site)
    if came is node.inputs[0]:
        return affine if chosen is None else affine.picked(chosen, axis)
    if chosen is None:
        return affine
    if len(set(chosen.tolist())) != chosen.size or chosen.size != affine.channels:
        raise Refusal("axis", f"{node.op} '{node.label}' gives one channel out twice")
    parts = [np.full(shape[axis], fill) for fill in (1.0, 0.0, 0.0)]
    for part, values in zip(parts, (affine.scale, affine.shift, affine.spread), strict=True):
        part[chosen] = values
    return Affine(parts[0], parts[1], axis, 0, parts[2])


def _chosen(node, rank, axis, size, site):
    """Return the indices that a Slice or Gather takes along an axis, None where it leaves the axis alone."""
    if node.op == "Gather":
        indices = site.index.constant(node.input(1))
        at = node.attribute("axis", 0) % rank
        if indices is None or len(indices.shape) != 1:
            raise Refusal("dynamic-index", f"the indices of Gather '{node.label}' are no constant list")
        return _integers(node, indices) % size if at == axis else None
    if site.index.opset < 10:
        starts, ends = node.attribute("starts"), node.attribute("ends")
        axes, steps = node.attribute("axes") or list(range(len(starts))), [1] * len(starts)
    else:
        found = [site.index.constant(node.input(at)) for at in range(1, 5)]
        if any(constant is None and node.input(at + 1) is not None for at, constant in enumerate(found)):
            raise Refusal("dynamic-index", f"the bounds of Slice '{node.label}' are no constants")
        starts, ends = (_integers(node, constant).tolist() for constant in found[:2])
        axes = _integers(node, found[2]).tolist() if found[2] else list(range(len(starts)))
        steps = _integers(node, found[3]).tolist() if found[3] else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise Refusal("dynamic-index", f"the bounds of Slice '{node.label}' do not belong together")
    for start, end, at, step in zip(starts, ends, axes, steps, strict=True):
        if at % rank == axis:
            end = None if step < 0 and end < -size else end
            return np.arange(size)[slice(start, end, step)]
    return None


def _integers(node, constant):
    if constant.dtype.kind not in "iu" or len(constant.shape) != 1:
        raise Refusal("dynamic-index", f"{node.op} '{node.label}' reads bounds or indices that are no list of integers")
    return constant.array()


def _spatial(node, affine, value, site):
    """Refuse unless the affine runs along the batch or the channels, not along an axis that the operator pools."""
    axis = axis_of(node, affine, value, site)
    if axis not in (None, 0, 1):
        raise Refusal("axis", f"{node.op} '{node.label}' mixes the elements of axis {axis}")


# AveragePool:  an average of S x + T is S average + T, unless zeros of padding are counted, which T does not reach. With ceil_mode a
# window may hang over the border, and runtimes disagree on what they count there.
def _average_pool(node, affine, came, goes, site):
    _spatial(node, affine, came, site)
    padded = any(node.attribute("pads", [])) or node.attribute("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")
    padded = padded or node.attribute("ceil_mode", 0)
    if affine.shifts and padded and node.attribute("count_include_pad", 0):
        raise Refusal("padding", f"AveragePool '{node.label}' counts zeros of padding, which a shift would have to change")
    return affine


def _global_average_pool(node, affine, came, goes, site):
    _spatial(node, affine, came, site)
    return affine


# MaxPool, GlobalMaxPool:  the largest of S x + T is S largest + T where S >= 0.
def _max_pool(node, affine, came, goes, site):
    _spatial(node, affine, came, site)
    _require_sign(node, affine, 0)
    if came is node.inputs[0] and any(other is not None and (other.readers or other.is_output) for other in node.outputs[1:]):
        raise Refusal("other-outputs", f"{node.op} '{node.label}' gives the indices too, which rounding may change")
    return affine


def _require_sign(node, affine, least):
    wrong = affine.scale < 0 if least == 0 else affine.scale <= 0
    if wrong.any():
        some = first_few(np.flatnonzero(wrong))
        code, wanted, kind = SIGNS[least]
        raise Refusal(code, f"{node.op} '{node.label}' lets only a {wanted} scale pass; it is {kind} in channels {some}")


# Least sign that passes -> code, what is wanted, what is wrong.
SIGNS = {
    0: ("mixed-sign-through-maxpool", "non-negative", "negative"),
    1: ("mixed-sign-through-relu", "positive", "not positive"),
}


# ReduceMean over other axes:  as an average. ReduceSum: the scale only. ReduceMax: as MaxPool; ReduceMin too.
def _reduce(node, affine, came, goes, site):
    axis = axis_of(node, affine, came, site)
    if node.op in ("ReduceMax", "ReduceMin"):
        _require_sign(node, affine, 0)
    if node.op in ("ReduceSum", "ReduceL1", "ReduceL2") and affine.shifts:
        raise Refusal("shift-cannot-pass", f"{node.op} '{node.label}' would count the shift once for each element")
    if node.op in ("ReduceL1", "ReduceL2"):
        _require_sign(node, affine, 0)
    if axis is None:
        return affine
    rank = site.rank(node.inputs[0])
    axes = node.attribute("axes")
    if axes is None and node.input(1) is not None:
        constant = site.index.constant(node.input(1))
        axes = None if constant is None else _integers(node, constant).tolist()
    if rank is None or axes is None:
        raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}, or axes that are not known")
    reduced = sorted({at % rank for at in axes})
    kept = [at for at in range(rank) if at not in reduced]
    if node.attribute("keepdims", 1):
        if axis in reduced:
            raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}")
        return affine.at(axis)
    if came is node.outputs[0]:
        return affine.at(kept[axis])
    if axis in reduced:
        raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}")
    return affine.at(kept.index(axis))


# Relu, LeakyRelu, PRelu:  f(S x) = S f(x) where S > 0; a shift moves the bend.
def _relu(node, affine, came, goes, site):
    _require_sign(node, affine, 1)
    if affine.shifts:
        raise Refusal("shift-through-relu", f"a shift cannot pass {node.op} '{node.label}'")
    return affine


# Resize, Upsample:  interpolation weights sum to 1; a constant beyond the border would not carry the affine.
def _resize(node, affine, came, goes, site):
    axis = axis_of(node, affine, came, site)
    mode = node.attribute("mode", b"nearest")
    if mode not in (b"nearest", b"linear", b"bilinear") or node.attribute("coordinate_transformation_mode") == b"tf_crop_and_resize":
        raise Refusal("interpolation", f"{node.op} '{node.label}' interpolates in a way that need not keep a shift")
    shapes = site.shape(node.inputs[0]), site.shape(node.outputs[0])
    if axis is not None and not _keeps_axis(node, axis, shapes, site):
        raise Refusal("axis", f"{node.op} '{node.label}' resizes axis {axis}, or may do so")
    return affine


def _keeps_axis(node, axis, shapes, site):
    listed = node.attribute("axes")
    if listed is not None:  # from opset 18 on, the axes that the factors are of
        rank = None if shapes[0] is None else len(shapes[0])
        if rank is not None or min(listed) >= 0:
            return axis not in [at % rank if rank else at for at in listed]
        return False
    for slot in (1, 2):
        factors = site.index.constant(node.input(slot))
        if slot == 1 and node.op == "Resize" and site.index.opset >= 11:
            continue  # the region of interest, which only tf_crop_and_resize reads
        if factors is not None and factors.dtype.kind == "f" and len(factors.shape) == 1 and factors.shape[0] > axis:
            return float(factors.array()[axis]) == 1.0
    factors = node.attribute("scales")
    if factors is not None:
        return factors[axis] == 1.0
    return None not in shapes and shapes[0][axis] is not None and shapes[0][axis] == shapes[1][axis]


# DepthToSpace sends channel c to c % C' (DCR) or c / block^2 (CRD), C' = C / block^2. Backward each of the C takes its own; forward the
# channels that meet in one must agree.
def _depth_to_space(node, affine, came, goes, site):
    axis = axis_of(node, affine, came, site)
    if axis is None:
        return affine
    area = node.attribute("blocksize") ** 2
    if axis != 1:
        raise Refusal("axis", f"DepthToSpace '{node.label}' mixes the elements of axis {axis}")
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
def _expand(node, affine, came, goes, site):
    before, after = site.shape(node.inputs[0]), site.shape(node.outputs[0])
    if affine.axis is None:
        return affine
    if before is None or after is None:
        raise Refusal("axis-unknown", f"the shapes at Expand '{node.label}' are not known")
    axis = axis_of(node, affine, came, site) - len(site.shape(came))
    if -axis > min(len(before), len(after)) or before[axis] is None or before[axis] != after[axis]:
        raise Refusal("axis", f"Expand '{node.label}' makes the channels by repeating")
    return affine.at(axis + len(site.shape(goes)))


# Pad: copies of elements carry the affine; a constant does so only where it is 0 and nothing is shifted.
def _pad(node, affine, came, goes, site):
    axis = axis_of(node, affine, came, site)
    mode = node.attribute("mode", b"constant")
    constant = site.index.constant(node.input(1)) if site.index.opset >= 11 else None
    pads = node.attribute("pads") or node.attribute("paddings") or (None if constant is None else _integers(node, constant).tolist())
    axes = None if node.input(3) is None else site.index.constant(node.input(3))
    if pads is None or (node.input(3) is not None and axes is None):
        raise Refusal("dynamic-index", f"how much Pad '{node.label}' pads is no constant")
    listed = range(len(pads) // 2) if axes is None else _integers(node, axes).tolist()
    rank = site.rank(came)
    if axis is not None and rank is None and min(listed, default=0) < 0:
        raise Refusal("axis-unknown", f"the rank of '{came.name}' at Pad '{node.label}' is not known")
    padded = {at % rank if rank else at for at, *sizes in zip(listed, pads, pads[len(listed) :], strict=False) if any(sizes)}
    if axis in padded:
        raise Refusal("axis", f"Pad '{node.label}' pads axis {axis}")
    if mode == b"constant":
        value = node.attribute("value", 0.0)
        if node.input(2) is not None:
            found = site.index.constant(node.input(2))
            value = None if found is None else float(found.array().reshape(-1)[0])
        if any(pads) and (value != 0 or affine.shifts):
            raise Refusal("padding", f"Pad '{node.label}' adds a constant that would have to change with the affine")
    return affine


# Add, Sub, Sum of values that are no constants:  S (a + b) + T = (S a + T) + S b: the scale goes to each, the shift to one of them.
# Forward a scale needs every operand to have it, a shift passes.  Where the other operand is a convolution of the same value, the affine
# becomes the centre of its kernel (RepVGG); otherwise the producers of the other operands are asked to make up for it.
def _sum_backward(node, affine, site):
    slots = range(len(node.inputs))
    choices = []
    for taker in slots:
        onward = []
        for slot in slots:
            part = affine if slot == taker else affine.scale_only()
            if node.op == "Sub" and slot == taker == 1:
                part = Affine(affine.scale, -affine.shift, affine.axis, affine.rank, affine.spread)
            if part.scales or part.shifts:
                onward.append((slot, _narrowed(node, part, node.outputs[0], node.inputs[slot], site)))
        choices.append(Taken(onward=onward))
        if not affine.shifts:
            break
    return choices


def _sum_forward(node, slot, affine, site):
    if affine.scales:
        sibling = site.into_sibling(node, slot, affine)
        return sibling or _joined(node, slot, affine, site)
    onward = _narrowed(node, affine, node.inputs[slot], node.outputs[0], site)
    if node.op == "Sub" and slot == 1:
        onward = Affine(onward.scale, -onward.shift, onward.axis, onward.rank, onward.spread)
    return Taken(onward=[(0, onward)])


def _joined(node, slot, affine, site):
    """(S x + T) + b = S (x + b/S) + T: the other operands are asked for what makes up for the scale."""
    if not site.may_rearrange() or (affine.scale == 0).any():
        raise Refusal("other-branch", f"{node.op} '{node.label}' adds it to a value that does not have its scale")
    onward = _narrowed(node, affine, node.inputs[slot], node.outputs[0], site)
    undone = onward.inverse().scale_only()
    others = [at for at in range(len(node.inputs)) if at != slot]
    back = [(at, _narrowed(node, undone, node.outputs[0], node.inputs[at], site)) for at in others]
    if node.op == "Sub" and slot == 1:
        onward = Affine(onward.scale, -onward.shift, onward.axis, onward.rank, onward.spread)
    return Taken(onward=[(0, onward)], back=back)


def _narrowed(node, affine, came, goes, site):
    """Return the affine along the axis of another value that broadcasts with this one; Refusal where it does not fit."""
    before, after = site.shape(came), site.shape(goes)
    if before is None or after is None:
        raise Refusal("axis-unknown", f"the shapes at {node.op} '{node.label}' are not known")
    if affine.axis is None:
        return affine
    axis = axis_of(node, affine, came, site) - len(before)
    if -axis > len(after) or after[axis] is None or after[axis] != affine.channels:
        raise Refusal("axis", f"{node.op} '{node.label}' makes the {affine.channels} channels by broadcasting")
    return affine.at(axis + len(after))


# Mul, Div of values that are no constants:  S (a * b) = (S a) * b: either factor takes the scale, no shift passes.
def _product_backward(node, affine, site):
    _refuse_shift(node, affine)
    slots = (0,) if node.op == "Div" else (0, 1)
    choices = []
    for slot in slots:
        try:
            choices.append(Taken(onward=[(slot, _narrowed(node, affine, node.outputs[0], node.inputs[slot], site))]))
        except Refusal as refusal:
            refused = refusal
    if not choices:
        raise refused
    return choices


def _product_forward(node, slot, affine, site):
    _refuse_shift(node, affine)
    if node.op == "Div" and slot == 1:
        raise Refusal("no-absorber", f"it is the divisor of Div '{node.label}'")
    return Taken(onward=[(0, _narrowed(node, affine, node.inputs[slot], node.outputs[0], site))])


def _refuse_shift(node, affine):
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"a shift cannot pass {node.op} '{node.label}' of two values")


_SUM = Row(_sum_backward, _sum_forward, lambda node, site: 1, _data_sample)
_PRODUCT = Row(_product_backward, _product_forward, lambda node, site: 1, _data_sample)


def _pool_terms(node, site):
    return math.prod(node.attribute("kernel_shape", [1]))


def _reduce_terms(node, site):
    before, after = site.shape(node.inputs[0]), site.shape(node.outputs[0])
    known = before is not None and after is not None and None not in (*before, *after)
    return math.prod(before) // max(math.prod(after), 1) if known else 64


CARRIERS = {
    "Identity": _symmetric(_identity),
    "Dropout": _symmetric(_dropout),
    "Cast": _symmetric(_cast),
    "Neg": _symmetric(_neg),
    "Transpose": _symmetric(_transpose),
    "Reshape": _symmetric(_reshape),
    "Flatten": _symmetric(_reshape),
    "Squeeze": _symmetric(_reshape),
    "Unsqueeze": _symmetric(_reshape),
    "Concat": Row(_concat_backward, _concat_forward, _no_terms, _data_sample),
    "Split": Row(_split_backward, _split_forward, _no_terms, _data_sample, parts=True),
    "Slice": _symmetric(_choose),
    "Gather": _symmetric(_gather),
    "AveragePool": _symmetric(_average_pool, _pool_terms),
    "GlobalAveragePool": _symmetric(_global_average_pool, _reduce_terms),
    "MaxPool": _symmetric(_max_pool),
    "GlobalMaxPool": _symmetric(_max_pool),
    "ReduceMean": _symmetric(_reduce, _reduce_terms),
    "ReduceSum": _symmetric(_reduce, _reduce_terms),
    "ReduceMax": _symmetric(_reduce),
    "ReduceMin": _symmetric(_reduce),
    "ReduceL1": _symmetric(_reduce, _reduce_terms),
    "ReduceL2": _symmetric(_reduce, _reduce_terms),
    "Relu": _symmetric(_relu),
    "LeakyRelu": _symmetric(_relu),
    "PRelu": _symmetric(_relu),
    "Resize": _symmetric(_resize, lambda node, site: 8),
    "Upsample": _symmetric(_resize, lambda node, site: 8),
    "DepthToSpace": _symmetric(_depth_to_space),
    "Expand": _symmetric(_expand),
    "Pad": _symmetric(_pad),
    "Add": _SUM,
    "Sub": _SUM,
    "Sum": _SUM,
    "Mul": _PRODUCT,
    "Div": _PRODUCT,
}
