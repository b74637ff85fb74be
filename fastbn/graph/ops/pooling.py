"""The operators that make one element of several and let a per-channel affine pass, one row per operator."""

import math
from dataclasses import replace

from onnx import NodeProto

from fastbn.graph.model.node import Node, Shape, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.placing import axis_of, both_ways, own_axis, own_list, require_sign
from fastbn.graph.ops.row import PresentGraph, Row
from fastbn.graph.ops.shape_rules import first_size, same_batch
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


# ReduceMean over other axes:  as an average. ReduceSum: the scale only. ReduceMax: as MaxPool; ReduceMin too.
def _reduce(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    if node.op in ("ReduceMax", "ReduceMin"):
        require_sign(node, affine, 0)
    if node.op in ("ReduceSum", "ReduceL1", "ReduceL2") and affine.shifts:
        raise Refusal("shift-cannot-pass", f"{node.op} '{node.label}' would count the shift once for each element")
    if node.op in ("ReduceL1", "ReduceL2"):
        require_sign(node, affine, 0)
    if axis is None:
        return affine
    rank = graph.rank(node.inputs[0])
    axes = node.find_attribute("axes", list[int])
    if axes is None and node.input(1) is not None:
        constant = graph.constant(node.input(1))
        axes = None if constant is None else own_list(node, constant)
    if rank is None or not axes:  # an empty list means all
        raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}, or axes that are not known")
    reduced = sorted({own_axis(node, at, rank) for at in axes})
    kept = [at for at in range(rank) if at not in reduced]
    if node.attribute("keepdims", 1):
        if axis in reduced:
            raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}")
        return affine.at(axis)
    if source is node.outputs[0]:
        if axis >= len(kept):
            raise Refusal("axis", f"{node.op} '{node.label}' gives no axis {axis}")
        return affine.at(kept[axis])
    if axis in reduced:
        raise Refusal("axis", f"{node.op} '{node.label}' reduces axis {axis}")
    return affine.at(kept.index(axis))


# Resize, Upsample:  interpolation weights sum to 1; a constant beyond the border would not carry the affine.
def _resize(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    axis = axis_of(node, affine, source, graph)
    mode = node.attribute("mode", b"nearest")
    if mode not in (b"nearest", b"linear", b"bilinear") or node.attribute("coordinate_transformation_mode") == b"tf_crop_and_resize":
        raise Refusal("interpolation", f"{node.op} '{node.label}' interpolates in a way that need not keep a shift")
    shapes = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    if axis is not None and not _keeps_axis(node, axis, shapes, graph):
        raise Refusal("axis", f"{node.op} '{node.label}' resizes axis {axis}, or may do so")
    return affine


def _keeps_axis(node: Node, axis: int, shapes: tuple[Shape | None, Shape | None], graph: PresentGraph) -> bool:
    listed = node.find_attribute("axes", list[int])
    if listed:  # from opset 18 on, the axes that the factors are of
        rank = None if shapes[0] is None else len(shapes[0])
        if rank is not None or min(listed) >= 0:
            return axis not in [at % rank if rank else at for at in listed]
        return False
    for slot in (1, 2):
        factors = graph.constant(node.input(slot))
        if slot == 1 and node.op == "Resize" and graph.opset >= 11:
            continue  # the region of interest, which only tf_crop_and_resize reads
        if factors is not None and factors.dtype.kind == "f" and len(factors.shape) == 1 and factors.shape[0] > axis:
            return float(factors.array()[axis]) == 1.0
    scales = node.find_attribute("scales", tuple[float, ...])
    if scales is not None:
        return len(scales) > axis and scales[axis] == 1.0
    before, after = shapes
    return before is not None and after is not None and before[axis] is not None and before[axis] == after[axis]


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


def _reduce_min_bound(proto: NodeProto) -> list[NodeProto]:
    proto.op_type = "ReduceMax"
    return []


_AVERAGE = Row(*both_ways(_average_pool), terms=_window_terms, sizes=same_batch)
_GLOBAL_AVERAGE = Row(*both_ways(_global_average_pool), terms=_reduced_terms, sizes=same_batch)
_MAXIMUM = Row(*both_ways(_max_pool), sizes=same_batch)
_REDUCTION = Row(*both_ways(_reduce), size_slots=(1,), result_size=first_size)
_SUM = replace(_REDUCTION, terms=_reduced_terms)
_RESIZE = Row(*both_ways(_resize), terms=_interpolation_terms, sized=True)

POOLING = {
    name: replace(row, equal_terms=True)
    for name, row in {
        "AveragePool": _AVERAGE,
        "GlobalAveragePool": _GLOBAL_AVERAGE,
        "MaxPool": _MAXIMUM,
        "GlobalMaxPool": _MAXIMUM,
        "LpPool": Row(*both_ways(_lp_pool), terms=_window_terms),
        "GlobalLpPool": Row(*both_ways(_lp_pool), terms=_reduced_terms),
        "ReduceMean": _SUM,
        "ReduceSum": _SUM,
        "ReduceMax": _REDUCTION,
        "ReduceMin": replace(_REDUCTION, bound=_reduce_min_bound),
        "ReduceL1": _SUM,
        "ReduceL2": _SUM,
        **dict.fromkeys(("ReduceProd", "ReduceSumSquare"), Row(size_slots=(1,), result_size=first_size)),
        **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp"), Row(size_slots=(1,))),
        "Resize": replace(_RESIZE, size_slots=(1, 2, 3)),
        "Upsample": replace(_RESIZE, size_slots=(1,)),
    }.items()
}
