"""Lifting: a node of the graph read as a per-channel affine, or the reason why it is none.

| node                       | affine                                                                   |
|----------------------------|--------------------------------------------------------------------------|
| BatchNormalization         | scale = weight / sqrt(var + eps), shift = bias - mean * scale, axis 1    |
| Add(x, c), Sub(x, c)       | scale = 1, shift = c or -c                                               |
| Sub(c, x)                  | scale = -1, shift = c                                                    |
| Mul(x, c), Div(x, c)       | scale = c or 1 / c, shift = 0                                            |

c is a constant that broadcasts along one axis, on either side of the operator.
"""

import numpy as np

from fastbn.affine import batch_norm_affine
from fastbn.dtypes import DTYPES, dtype_name
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Dense, float64_of
from fastbn.graph.ops.affine import Affine
from fastbn.graph.reasons import Refusal, first_few

__all__ = ["BATCH_NORM", "ELEMENTWISE", "PARAMETERS", "constant_slot", "is_batch_norm", "lift"]

BATCH_NORM = "BatchNormalization"
PARAMETERS = {1: "scale", 2: "bias", 3: "mean", 4: "var"}
ELEMENTWISE = ("Add", "Sub", "Mul", "Div")

# ONNX's default: an attribute is a float32, which a float64 model feels.
EPSILON = float(np.float32(1e-5))

# Before opset 7 these operators broadcast by attributes, not by shape: they are left alone.
FIRST_BROADCASTING_OPSET = 7


def is_batch_norm(node):
    """Say whether a node is ONNX's own BatchNormalization."""
    return node.is_op(BATCH_NORM)


def lift(node, view):
    """Return the Affine of a node, or None for one that is no affine; a BatchNormalization that must stay raises Refusal.

    `view` is the planner's view (view.GraphView): a constant that an earlier plan has changed counts as changed.
    """
    if is_batch_norm(node):
        return _batch_norm(node, view)
    if node.is_op(*ELEMENTWISE):
        return _elementwise(node, view)
    return None


def constant_slot(node, index):
    """Return the slot of the one constant floating operand of an elementwise operator, or None."""
    if index.opset < FIRST_BROADCASTING_OPSET or len(node.inputs) != 2:
        return None
    found = [index.constant(value) for value in node.inputs]
    if (found[0] is None) == (found[1] is None):
        return None
    slot = 0 if found[1] is None else 1
    return slot if dtype_name(found[slot].dtype) in DTYPES else None


def _batch_norm(node, view):
    index = view.index
    _refuse_training(node, index)
    if node.attribute("spatial", 1) == 0:
        raise Refusal("per-element", "spatial=0: its parameters are per element, not per channel")
    if len(node.inputs) != 5 or any(value is None for value in node.inputs):
        raise ModelError(expected("5 inputs", f"{sum(value is not None for value in node.inputs)}", node.label))
    arrays = {}
    for slot, name in PARAMETERS.items():
        value = node.inputs[slot]
        found = view.tensor(node, slot)
        if found is None:
            if index.is_overridable(value):
                sentence = (
                    f"its {name} '{value.name}' is also a graph input, which a caller may override: --freeze-inputs makes it a constant"
                )
                raise Refusal("overridable-parameters", sentence)
            raise Refusal("dynamic-parameters", f"its {name} '{value.name}' is computed when the model runs")
        if dtype_name(found.dtype) not in DTYPES:
            raise Refusal("unsupported-type", f"its {name} is {found.dtype}")
        arrays[name] = float64_of(found)
    channels = arrays["var"].size
    if not channels:
        raise Refusal("bad-parameters", "it has no channels")
    for slot, name in PARAMETERS.items():
        if arrays[name].shape != (channels,):
            raise ModelError(expected(f"shape ({channels},)", f"shape {arrays[name].shape}", f"{node.label}.{node.inputs[slot].name}"))
    eps = node.attribute("epsilon", EPSILON)
    good = np.isfinite(np.stack([*arrays.values()])).all(axis=0) & (arrays["var"] + eps > 0)
    if not good.all():
        bad = np.flatnonzero(~good)
        raise Refusal("bad-parameters", f"a parameter is Inf or NaN, or var + eps is not positive, in {_channels(bad)}")
    scale, shift = batch_norm_affine(arrays["scale"], arrays["bias"], arrays["mean"], arrays["var"], eps)
    spread = np.abs(arrays["mean"] * scale) + Dense.of(view.tensor(node, 2)).spread
    return Affine(scale, shift, 1, 2, spread)


def _refuse_training(node, index):
    """Training means: training_mode=1; opset 7 to 13 with a second output; opset 1 and 6 without is_test; opset 14 with outputs in use."""
    if index.opset >= 14:
        if node.attribute("training_mode", 0):
            raise Refusal("training", "training_mode=1: it normalises with the statistics of the batch")
        if any(value is not None for value in node.outputs[1:]):
            raise Refusal("training", "it hands out running statistics")
    elif len(node.outputs) > 1:
        raise Refusal("training", f"it has {len(node.outputs)} outputs, which before opset 14 means training")
    elif index.opset < 7 and not node.attribute("is_test", 0):
        raise Refusal("training", f"opset {index.opset} without is_test=1 means training")


def _elementwise(node, view):
    slot = constant_slot(node, view.index)
    if slot is None:
        return None
    constant = view.tensor(node, slot)
    wide = [axis - len(constant.shape) for axis, size in enumerate(constant.shape) if size != 1]
    if len(wide) > 1 or 0 in constant.shape:
        return None
    dense = Dense.of(constant)
    values = dense.values.reshape(-1)
    ones, zeros = np.ones_like(values), np.zeros_like(values)
    with np.errstate(divide="ignore", over="ignore"):
        scale, shift = {
            "Add": (ones, values),
            "Sub": (ones, -values) if slot == 1 else (-ones, values),
            "Mul": (values, zeros),
            "Div": (1 / values, zeros) if slot == 1 else (None, None),
        }[node.op]
    if scale is None or not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return None
    spread = dense.spread.reshape(-1) if node.op in ("Add", "Sub") else zeros
    return Affine(scale, shift, wide[0] if wide else None, len(constant.shape), spread)


def _channels(indices):
    return f"channel{'s' if len(indices) > 1 else ''} {first_few(indices)}"
