"""The operators that make one element of several and let a per-channel affine pass, one row per operator."""

import math

import numpy as np

from fastbn.graph.ops.row import axis_of, own_axis, own_list, symmetric
from fastbn.graph.reasons import Refusal, first_few

__all__ = ["POOLING", "require_sign"]


def _spatial(node, affine, value, view):
    """Refuse unless the affine runs along the batch or the channels, not along an axis that the operator pools."""
    axis = axis_of(node, affine, value, view)
    if axis not in (None, 0, 1):
        raise Refusal("axis", f"{node.op} '{node.label}' mixes the elements of axis {axis}")


# AveragePool:  an average of S x + T is S average + T, unless zeros of padding are counted, which T does not reach. With ceil_mode a
# window may hang over the border, and runtimes disagree on what they count there.
def _average_pool(node, affine, came, goes, view):
    _spatial(node, affine, came, view)
    padded = _is_padded(node) or node.attribute("ceil_mode", 0)
    if affine.shifts:
        _refuse_empty_windows(node, view)
    if affine.shifts and padded and node.attribute("count_include_pad", 0):
        raise Refusal("padding", f"AveragePool '{node.label}' counts zeros of padding, which a shift would have to change")
    return affine


def _is_padded(node):
    return any(node.attribute("pads", [])) or node.attribute("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")


def _refuse_empty_windows(node, view):
    """Refuse where a window may lie in the padding alone: its elements are further apart than the data is long, and it gives 0 or -Inf."""
    shape = view.shape(node.inputs[0])
    for at, step in enumerate(node.attribute("dilations", []) if _is_padded(node) else [], start=2):
        if step > 1 and (shape is None or len(shape) <= at or shape[at] is None or shape[at] < step):
            raise Refusal("padding", f"a window of {node.op} '{node.label}' may hold no element but padding")


def _global_average_pool(node, affine, came, goes, view):
    _spatial(node, affine, came, view)
    return affine


# MaxPool, GlobalMaxPool:  the largest of S x + T is S largest + T where S >= 0.
def _max_pool(node, affine, came, goes, view):
    _spatial(node, affine, came, view)
    require_sign(node, affine, 0)
    _refuse_empty_windows(node, view)
    if came is node.inputs[0] and any(other is not None and (other.readers or other.is_output) for other in node.outputs[1:]):
        raise Refusal("other-outputs", f"{node.op} '{node.label}' gives the indices too, which rounding may change")
    return affine


def require_sign(node, affine, least):
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
def _reduce(node, affine, came, goes, view):
    axis = axis_of(node, affine, came, view)
    if node.op in ("ReduceMax", "ReduceMin"):
        require_sign(node, affine, 0)
    if node.op in ("ReduceSum", "ReduceL1", "ReduceL2") and affine.shifts:
        raise Refusal("shift-cannot-pass", f"{node.op} '{node.label}' would count the shift once for each element")
    if node.op in ("ReduceL1", "ReduceL2"):
        require_sign(node, affine, 0)
    if axis is None:
        return affine
    rank = view.rank(node.inputs[0])
    axes = node.attribute("axes")
    if axes is None and node.input(1) is not None:
        constant = view.index.constant(node.input(1))
        axes = None if constant is None else own_list(node, constant)
    if rank is None or not axes:  # an empty list means all
        raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}, or axes that are not known")
    reduced = sorted({own_axis(node, at, rank) for at in axes})
    kept = [at for at in range(rank) if at not in reduced]
    if node.attribute("keepdims", 1):
        if axis in reduced:
            raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}")
        return affine.at(axis)
    if came is node.outputs[0]:
        if axis >= len(kept):
            raise Refusal("axis", f"{node.op} '{node.label}' gives no axis {axis}")
        return affine.at(kept[axis])
    if axis in reduced:
        raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}")
    return affine.at(kept.index(axis))


# Resize, Upsample:  interpolation weights sum to 1; a constant beyond the border would not carry the affine.
def _resize(node, affine, came, goes, view):
    axis = axis_of(node, affine, came, view)
    mode = node.attribute("mode", b"nearest")
    if mode not in (b"nearest", b"linear", b"bilinear") or node.attribute("coordinate_transformation_mode") == b"tf_crop_and_resize":
        raise Refusal("interpolation", f"{node.op} '{node.label}' interpolates in a way that need not keep a shift")
    shapes = view.shape(node.inputs[0]), view.shape(node.outputs[0])
    if axis is not None and not _keeps_axis(node, axis, shapes, view):
        raise Refusal("axis", f"{node.op} '{node.label}' resizes axis {axis}, or may do so")
    return affine


def _keeps_axis(node, axis, shapes, view):
    listed = node.attribute("axes")
    if listed:  # from opset 18 on, the axes that the factors are of
        rank = None if shapes[0] is None else len(shapes[0])
        if rank is not None or min(listed) >= 0:
            return axis not in [at % rank if rank else at for at in listed]
        return False
    for slot in (1, 2):
        factors = view.index.constant(node.input(slot))
        if slot == 1 and node.op == "Resize" and view.index.opset >= 11:
            continue  # the region of interest, which only tf_crop_and_resize reads
        if factors is not None and factors.dtype.kind == "f" and len(factors.shape) == 1 and factors.shape[0] > axis:
            return float(factors.array()[axis]) == 1.0
    factors = node.attribute("scales")
    if factors is not None:
        return len(factors) > axis and factors[axis] == 1.0
    return None not in shapes and shapes[0][axis] is not None and shapes[0][axis] == shapes[1][axis]


def _pool_terms(node, view):
    return math.prod(node.attribute("kernel_shape", [1]))


def _reduce_terms(node, view):
    before, after = view.shape(node.inputs[0]), view.shape(node.outputs[0])
    known = before is not None and after is not None and None not in (*before, *after)
    return math.prod(before) // max(math.prod(after), 1) if known else 64


POOLING = {
    "AveragePool": symmetric(_average_pool, _pool_terms),
    "GlobalAveragePool": symmetric(_global_average_pool, _reduce_terms),
    "MaxPool": symmetric(_max_pool),
    "GlobalMaxPool": symmetric(_max_pool),
    "ReduceMean": symmetric(_reduce, _reduce_terms),
    "ReduceSum": symmetric(_reduce, _reduce_terms),
    "ReduceMax": symmetric(_reduce),
    "ReduceMin": symmetric(_reduce),
    "ReduceL1": symmetric(_reduce, _reduce_terms),
    "ReduceL2": symmetric(_reduce, _reduce_terms),
    "Resize": symmetric(_resize, lambda node, view: 8),
    "Upsample": symmetric(_resize, lambda node, view: 8),
}
