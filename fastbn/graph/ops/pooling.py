"""The operators that make one element of several and let a per-channel affine pass, one row per operator."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray
from onnx import NodeProto

from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.placing import axis_beside, axis_of, both_ways, known_list, named_axes, own_axis, require_sign
from fastbn.graph.ops.row import PresentGraph, Row
from fastbn.graph.ops.shape_rules import each_once, first_size, product_of_elements, same_batch
from fastbn.graph.reasons import Refusal

__all__ = ["POOLING"]

# How many elements a reduction is taken to sum where the sizes are not known.
UNKNOWN_TERMS = 64


def _require_no_pooled_axis(node: Node, affine: Affine, value: Value, graph: PresentGraph) -> None:
    """Refuse unless the affine runs along the batch or the channels, not along an axis that the operator pools."""
    axis = axis_of(node, affine, value, graph)
    if axis not in (None, 0, 1):
        raise Refusal("axis", f"{node.op} '{node.label}' mixes the elements of axis {axis}")


# AveragePool:  an average of S x + T is S average + T, unless zeros of padding are counted, which T does not reach. With ceil_mode a
# window may hang over the border, and runtimes disagree on what they count there.
def _average_pool(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    _require_no_pooled_axis(node, affine, source, graph)
    padded = _is_padded(node) or node.attribute("ceil_mode", 0)
    if affine.shifts:
        _refuse_empty_windows(node, graph)
    if affine.shifts and padded and node.attribute("count_include_pad", 0):
        raise Refusal("padding", f"AveragePool '{node.label}' counts zeros of padding, which a shift would have to change")
    return affine


def _is_padded(node: Node) -> bool:
    return any(node.attribute("pads", [])) or node.attribute("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")


def _refuse_empty_windows(node: Node, graph: PresentGraph) -> None:
    """Refuse where a window may lie in the padding alone: its elements are further apart than the data is long, and it gives 0 or -Inf."""
    shape = graph.shape(node.inputs[0])
    for at, step in enumerate(node.attribute("dilations", []) if _is_padded(node) else [], start=2):
        size = None if shape is None or len(shape) <= at else shape[at]
        if step > 1 and (size is None or size < step):
            raise Refusal("padding", f"a window of {node.op} '{node.label}' may hold no element but padding")


def _global_average_pool(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    _require_no_pooled_axis(node, affine, source, graph)
    return affine


# MaxPool, GlobalMaxPool:  the largest of S x + T is S largest + T where S >= 0.
def _max_pool(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    _require_no_pooled_axis(node, affine, source, graph)
    require_sign(node, affine, 0)
    _refuse_empty_windows(node, graph)
    if source is node.inputs[0] and any(other is not None and (other.readers or other.is_output) for other in node.outputs[1:]):
        raise Refusal("other-outputs", f"{node.op} '{node.label}' gives the indices too, which rounding may change")
    return affine


# LpPool, GlobalLpPool:  the p-norm of S x is S times that of x where S >= 0; zeros of padding add nothing to it.
def _lp_pool(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    _require_no_pooled_axis(node, affine, source, graph)
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"a shift cannot pass {node.op} '{node.label}'")
    require_sign(node, affine, 0)
    return affine


# ReduceMean over other axes:  as an average. ReduceSum: the sum of n elements S x + T is S times their sum, and n T. ReduceMax: as MaxPool;
# ReduceMin too.
def _reduce(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    is_backward = source is node.outputs[0]
    if node.op in ("ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"):
        require_sign(node, affine, 0)
    if node.op in ("ReduceL1", "ReduceL2") and affine.shifts:
        raise Refusal("shift-cannot-pass", f"a shift cannot pass {node.op} '{node.label}'")
    axes = named_axes(node, 1, graph)
    rank = graph.rank(node.inputs[0])
    if node.op == "ReduceSum" and affine.shifts:
        count = _reduced_count(node, axes, graph)
        factor = 1 / count if is_backward else count
        affine = Affine(affine.scale, affine.shift * factor, affine.axis, affine.rank, affine.abs_terms * factor)
    if axis is None:
        return affine
    if not axes:  # an empty list means all
        raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}, or axes that are not known")
    keeps = node.attribute("keepdims", 1)
    beside = axis_beside(node, axis, axes, rank, is_backward and not keeps)
    if beside is None:
        raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}")
    return affine.at(axis if keeps else beside)


def _reduced_count(node: Node, axes: list[int] | None, graph: PresentGraph) -> int:
    """Return how many elements one sum has; Refusal where that is not known."""
    sizes = graph.sizes(node.inputs[0])
    named = None if sizes is None or axes is None else [own_axis(node, axis, len(sizes)) for axis in axes]
    summed = [] if sizes is None or not named else [sizes[axis] for axis in named]
    known = [size for size in summed if isinstance(size, int) and size]
    if not named or len(known) < len(named):
        raise Refusal("axis-unknown", f"how many elements {node.op} '{node.label}' sums is not known: it counts a shift for each")
    return math.prod(known)


# Resize, Upsample:  interpolation weights sum to 1; a constant beyond the border would not carry the affine.
def _resize(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    mode = node.attribute("mode", b"nearest")
    if mode not in (b"nearest", b"linear", b"bilinear") or node.attribute("coordinate_transformation_mode") == b"tf_crop_and_resize":
        raise Refusal("interpolation", f"{node.op} '{node.label}' interpolates in a way that need not keep a shift")
    if axis is not None and not _keeps_axis(node, axis, graph):
        raise Refusal("axis", f"{node.op} '{node.label}' resizes axis {axis}")
    return affine


def _keeps_axis(node: Node, axis: int, graph: PresentGraph) -> bool:
    """Say whether a Resize or Upsample leaves the size of an axis as it is; Refusal where that is not known."""
    before, after = graph.sizes(node.inputs[0]), graph.sizes(node.outputs[0])
    at = axis
    axes = node.find_attribute("axes", list[int])  # from opset 18 on, those that scales and sizes are of
    if axes:
        if before is None and min(axes) < 0:
            raise Refusal("axis-unknown", f"the rank of the value before {node.op} '{node.label}' is not known")
        own_axes = [each if before is None else own_axis(node, each, len(before)) for each in axes]
        if axis not in own_axes:
            return True
        at = own_axes.index(axis)
    scales = _scales(node, graph)
    if scales is not None:  # sizes may be equal where a factor is not 1
        return len(scales) > at and scales[at] == 1.0
    # Sizes of an aspect ratio that is kept are bounds only.
    if node.input(3) is not None and node.attribute("keep_aspect_ratio_policy", b"stretch") == b"stretch":
        listed = known_list(node, 3, graph) or []
        own = None if before is None else before[own_axis(node, axis, len(before))]
        for wanted in (listed[at] if len(listed) > at else None, None if after is None else after[own_axis(node, axis, len(after))]):
            if wanted is not None and (wanted == own or (isinstance(wanted, int) and isinstance(own, int))):
                return wanted == own
    raise Refusal("axis-unknown", f"the sizes at {node.op} '{node.label}' do not tell whether it resizes axis {axis}")


def _scales(node: Node, graph: PresentGraph) -> list[float] | None:
    """Return the factors of a Resize or Upsample where they are constants."""
    # From opset 11 on, slot 1 holds the region of interest, which only tf_crop_and_resize reads.
    constant = graph.constant(node.input(2 if node.op == "Resize" and graph.opset >= 11 else 1))
    if constant is not None and constant.dtype.kind == "f" and len(constant.shape) == 1 and constant.size:
        factors: list[float] = constant.array().tolist()
        return factors
    written = node.find_attribute("scales", tuple[float, ...])
    return None if written is None else [*written]


def _window_terms(node: Node, graph: PresentGraph) -> int:
    return math.prod(node.attribute("kernel_shape", [1]))


def _reduced_terms(node: Node, graph: PresentGraph) -> int:
    before, after = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    if before is None or after is None:
        return UNKNOWN_TERMS
    sizes, remaining = [size for size in before if size is not None], [size for size in after if size is not None]
    is_known = len(sizes) == len(before) and len(remaining) == len(after)
    return math.prod(sizes) // max(math.prod(remaining), 1) if is_known else UNKNOWN_TERMS


def _interpolation_terms(node: Node, graph: PresentGraph) -> int:
    return 8


def _window_work(node: Node, arrays: Sequence[NDArray[Any] | None], size: float) -> float:
    return size * math.prod(node.attribute("kernel_shape", [1]))


def _reduce_min_bound(proto: NodeProto) -> list[NodeProto]:
    proto.op_type = "ReduceMax"
    return []


_AVERAGE = Row(*both_ways(_average_pool), terms=_window_terms, sizes=same_batch, work=_window_work)
_GLOBAL_AVERAGE = Row(*both_ways(_global_average_pool), terms=_reduced_terms, sizes=same_batch, work=each_once)
_MAXIMUM = Row(*both_ways(_max_pool), sizes=same_batch, work=_window_work)
_REDUCTION = Row(*both_ways(_reduce), size_slots=(1,), result_size=first_size)
_SUM = replace(_REDUCTION, terms=_reduced_terms)
_RESIZE = Row(*both_ways(_resize), terms=_interpolation_terms, sized=True, work=each_once)

POOLING = {
    name: replace(row, equal_terms=True)
    for name, row in {
        "AveragePool": _AVERAGE,
        "GlobalAveragePool": _GLOBAL_AVERAGE,
        "MaxPool": _MAXIMUM,
        "GlobalMaxPool": replace(_MAXIMUM, work=each_once),
        "LpPool": Row(*both_ways(_lp_pool), terms=_window_terms, work=_window_work),
        "GlobalLpPool": Row(*both_ways(_lp_pool), terms=_reduced_terms, work=each_once),
        "ReduceMean": _SUM,
        "ReduceSum": _SUM,
        "ReduceMax": _REDUCTION,
        "ReduceMin": replace(_REDUCTION, bound=_reduce_min_bound),
        "ReduceL1": _SUM,
        "ReduceL2": _SUM,
        "ReduceProd": Row(size_slots=(1,), result_size=first_size, list_elements=product_of_elements),
        "ReduceSumSquare": Row(size_slots=(1,), result_size=first_size),
        **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp"), Row(size_slots=(1,), work=each_once)),
        **dict.fromkeys(("ArgMax", "ArgMin"), Row(work=each_once)),
        "Resize": replace(_RESIZE, size_slots=(1, 2, 3)),
        "Upsample": replace(_RESIZE, size_slots=(1,)),
    }.items()
}
