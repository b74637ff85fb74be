"""The order in which shape inference may see nodes that crop: on a Slice of a negative size it ends the process.

A window that is larger than its image makes a negative size (a convolution of an image that is too small). So cropping nodes are shown to
inference level by level, the next level only where the one before has no negative sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from onnx import FunctionProto

from fastbn.graph.model.nesting import is_standard, scopes_of
from fastbn.graph.model.node import Node, Scope, Value

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["crop_levels", "scopes_within"]

# Operators whose outputs have a negative size only where an input has one.
# fmt: off
HARMLESS = frozenset([
    "Abs", "Acos", "Add", "And", "ArgMax", "ArgMin", "Asin", "Atan", "BatchNormalization", "Cast", "CastLike", "Ceil", "Clip", "Concat",
    "Constant", "Cos", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Flatten", "Floor",
    "GRU", "Gather", "GatherElements", "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "HardSigmoid",
    "HardSwish", "Identity", "InstanceNormalization", "LRN", "LSTM", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log",
    "LogSoftmax", "MatMul", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "NonZero", "Not", "Or", "PRelu", "Pow", "QuantizeLinear",
    "RNN", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
    "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Selu", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax",
    "Softplus", "Softsign", "SpaceToDepth", "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh", "Tile", "Transpose", "Trilu", "Unsqueeze",
    "Where", "Xor",
])
# fmt: on

# Operator -> the slots of lists: its outputs have a negative size only where an input has one or an element of such a list is negative.
LISTS = {"Expand": (1,), "Pad": (1,), "Resize": (2, 3), "Split": (1,), "TopK": (1,), "Upsample": (1,)}

WINDOWS = frozenset(["AveragePool", "Conv", "LpPool", "MaxPool"])

# The level behind a node with bodies, larger than any other: what its bodies do is not followed.
UNKNOWN = 1 << 30

# Returns the array that a value is, if it is a small constant, or None.
SmallConstant: TypeAlias = "Callable[[Value], Array | None]"


def scopes_within(scope: Scope) -> Iterator[Scope]:
    """Yield a model.Scope and those of the bodies below it, outermost first."""
    pending = [scope]
    for current in pending:
        yield current
        pending.extend(body for node in current.ordered for body in node.scopes)


def crop_levels(
    main: Scope, functions: Iterable[FunctionProto], number: SmallConstant, is_known: Callable[[Value], bool]
) -> dict[Node, int]:
    """Return the level of each node that crops: on a path to it, the number of cropping nodes, it included, that follow a possibly
    negative size.

    Parameters
    ----------
    main : model.Scope
    functions : iterable of onnx.FunctionProto
        A call of one with a Slice in it is a cropping node too.
    number : callable
        A SmallConstant.
    is_known : callable
        Value -> whether all of its sizes are known already, and so will not change.

    Returns
    -------
    dict of model.Node -> int
        Without the nodes that no possibly negative size reaches; larger than any other behind a node with bodies.
    """
    croppers = {
        (each.domain, each.name) for each in functions if any(node.op_type == "Slice" for graph in scopes_of(each) for node in graph.node)
    }
    levels: dict[Node, int] = {}
    if not any(node.is_op("Slice") or (node.domain, node.op) in croppers for scope in scopes_within(main) for node in scope.ordered):
        return levels
    # Value -> (level, whether its size may be negative since the last cropping node).
    reached: dict[Value, tuple[int, bool]] = {}
    for scope in scopes_within(main):
        if scope.parent is not None:
            reached.update({value: (UNKNOWN, True) for value in scope.values.values() if value.is_input})
        for node in scope.ordered:
            before = [reached[value] for value in node.inputs if value is not None and value in reached]
            level, may_be_negative = max((each[0] for each in before), default=0), any(each[1] for each in before)
            if node.is_op("Slice") or (node.domain, node.op) in croppers:
                if may_be_negative:
                    level, may_be_negative = level + 1, False
                    levels[node] = level
            elif node.scopes:
                level, may_be_negative = UNKNOWN, True
            may_be_negative = may_be_negative or _may_be_negative(node, number)
            if level or may_be_negative:
                changing = [value for value in node.outputs if value is not None and not is_known(value)]
                reached.update(dict.fromkeys(changing, (level, may_be_negative)))
    return levels


def _may_be_negative(node: Node, number: SmallConstant) -> bool:
    """Say whether a node may give a negative size where no input has one."""
    if not is_standard(node.domain):
        return True
    if node.op in LISTS:
        attributes = (node.attribute(name) for name in ("pads", "paddings", "scales", "split"))
        written = [each for each in attributes if isinstance(each, list)]  # one that the operator does not have may have any type
        lists = [number(value) for slot in LISTS[node.op] if (value := node.input(slot)) is not None]
        return any(array is None or (array < 0).any() for array in lists) or any(min(each, default=0) < 0 for each in written)
    if node.op in WINDOWS:
        return not _fits_any_image(node)
    return node.op not in HARMLESS


def _fits_any_image(node: Node) -> bool:
    """Say whether a window over an image of size 0 makes no negative size: (0 + padding - window) / stride + 1 >= 0, rounded toward 0."""
    weight = node.input(1) if node.op == "Conv" else None
    kernel = node.attribute("kernel_shape", [] if weight is None else [*weight.dims[2:]])
    ones = [1] * len(kernel)
    strides, dilations = node.attribute("strides", ones), node.attribute("dilations", ones)
    pads = node.attribute("pads", [0] * 2 * len(kernel))
    if not kernel or not len(kernel) == len(strides) == len(dilations) == len(pads) / 2:
        return False
    around = [before + behind for before, behind in zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)]
    windows = [step * (size - 1) + 1 - pad for size, step, pad in zip(kernel, dilations, around, strict=True)]
    return all(window < 2 * stride for window, stride in zip(windows, strides, strict=True))
