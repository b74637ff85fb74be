"""Slices and what may hand them negative sizes: inference ends the process there, so it is shown them one level after the other.

A window that is larger than its image makes a negative size (a convolution of an image that is too small), and a Slice of that is fatal.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from onnx import FunctionProto

from fastbn.graph.model.expressions import ELEMENTWISE, NO_LARGER
from fastbn.graph.model.nesting import is_standard, scopes_of
from fastbn.graph.model.sizes import SAME_SHAPE

__all__ = ["crop_levels", "scopes_within"]

# What these give has a negative size only where an input has one.
# fmt: off
HARMLESS = SAME_SHAPE | ELEMENTWISE | (NO_LARGER - {"Split"}) | {
    "ArgMax", "ArgMin", "Concat", "Constant", "CumSum", "DepthToSpace", "GRU", "Gather", "GatherElements", "Gemm", "GlobalAveragePool",
    "GlobalMaxPool", "LSTM", "MatMul", "NonZero", "RNN", "ScatterElements", "ScatterND", "Shape", "Slice", "SpaceToDepth", "Tile", "Trilu",
}
# fmt: on

# What the lists in these slots say is harmless where no element is negative.
LISTS = {"Expand": (1,), "Pad": (1,), "Resize": (2, 3), "Split": (1,), "TopK": (1,), "Upsample": (1,)}

WINDOWS = frozenset(["AveragePool", "Conv", "LpPool", "MaxPool"])

# Behind a node with bodies nothing is known.
UNKNOWN = 1 << 30


def scopes_within(scope: object) -> Iterator:
    """Yield a model.Scope and those of the bodies below it, outermost first."""
    pending = [scope]
    for each in pending:
        yield each
        pending.extend(inner for node in each.ordered for inner in node.scopes)


def crop_levels(
    main: object, functions: Iterable[FunctionProto], number: Callable[..., np.ndarray | None], is_known: Callable[..., bool]
) -> dict:
    """Return how many others stand before each node that crops, with something between them that may make a negative size.

    Parameters
    ----------
    main : model.Scope
    functions : iterable of onnx.FunctionProto
        A call of one with a Slice in it is a cropping node too.
    number : callable
        Value -> the array that it is, if it is a small constant, or None.
    is_known : callable
        Value -> whether all of its sizes are known already: they will not change.

    Returns
    -------
    dict of model.Node -> int
        Without those that no such thing stands before; behind a node with bodies the number is larger than any.
    """
    croppers = {
        (each.domain, each.name) for each in functions if any(node.op_type == "Slice" for graph in scopes_of(each) for node in graph.node)
    }
    levels: dict = {}
    reached: dict = {}
    for scope in scopes_within(main):
        if scope.parent is not None:
            reached.update({value: (UNKNOWN, True) for value in scope.values.values() if value.is_input})
        for node in scope.ordered:
            before = [reached[value] for value in node.inputs if value in reached]
            level, is_open = max((each[0] for each in before), default=0), any(each[1] for each in before)
            if node.is_op("Slice") or (node.domain, node.op) in croppers:
                if is_open:
                    level, is_open = level + 1, False
                    levels[node] = level
            elif node.scopes:
                level, is_open = UNKNOWN, True
            is_open = is_open or _may_be_negative(node, number)
            if level or is_open:
                reached.update(
                    dict.fromkeys((value for value in node.outputs if value is not None and not is_known(value)), (level, is_open))
                )
    return levels


def _may_be_negative(node: object, number: Callable[..., np.ndarray | None]) -> bool:
    """Say whether a node may give a negative size where no input has one."""
    if not is_standard(node.domain):
        return True
    if node.op in LISTS:
        attributes = (node.attribute(name) for name in ("pads", "paddings", "scales", "split"))
        written = [each for each in attributes if isinstance(each, list)]  # the operator may not have it, nor any type for it
        lists = [number(node.input(slot)) for slot in LISTS[node.op] if node.input(slot) is not None]
        return any(array is None or (array < 0).any() for array in lists) or any(min(each, default=0) < 0 for each in written)
    if node.op in WINDOWS:
        return not _fits_any_image(node)
    return node.op not in HARMLESS


def _fits_any_image(node: object) -> bool:
    """Say whether a window over an image without elements makes no negative size: (0 + padding - window) / stride + 1 >= 0, to zero."""
    weight = node.input(1) if node.op == "Conv" else None
    shape = weight.initializer.dims[2:] if weight is not None and weight.initializer is not None else []
    kernel = node.attribute("kernel_shape", list(shape))
    ones = [1] * len(kernel)
    strides, dilations = node.attribute("strides", ones), node.attribute("dilations", ones)
    pads = node.attribute("pads", [0] * 2 * len(kernel))
    if not kernel or not len(kernel) == len(strides) == len(dilations) == len(pads) / 2:
        return False
    around = [before + behind for before, behind in zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)]
    windows = [step * (size - 1) + 1 - pad for size, step, pad in zip(kernel, dilations, around, strict=True)]
    return all(window < 2 * stride for window, stride in zip(windows, strides, strict=True))
