"""Activations: a positive scale passes those that are linear on either side of zero; of the others the sizes are known."""

from dataclasses import replace

from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.placing import both_ways, require_sign
from fastbn.graph.ops.row import PresentGraph, Row
from fastbn.graph.ops.shape_rules import broadcast_size, each_once, same_sizes
from fastbn.graph.reasons import Refusal

__all__ = ["ACTIVATION"]


# Relu, LeakyRelu, PRelu, Abs:  f(S x) = S f(x) where S > 0; a shift moves the bend.
def _piecewise_linear(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    require_sign(node, affine, 1)
    if affine.shifts:
        raise Refusal("shift-through-relu", f"a shift cannot pass {node.op} '{node.label}'")
    return affine


_PIECEWISE_LINEAR = Row(*both_ways(_piecewise_linear), sizes=same_sizes, work=each_once)

ACTIVATION = {
    "Relu": replace(_PIECEWISE_LINEAR, result_size=broadcast_size),
    "Abs": replace(_PIECEWISE_LINEAR, result_size=broadcast_size),
    "LeakyRelu": _PIECEWISE_LINEAR,
    "PRelu": _PIECEWISE_LINEAR,
    **dict.fromkeys(("Sigmoid", "Softplus", "Tanh"), Row(sizes=same_sizes, result_size=broadcast_size)),
    **dict.fromkeys(
        ("Elu", "Gelu", "HardSigmoid", "HardSwish", "LogSoftmax", "Mish", "Selu", "Softmax", "Softsign"),
        Row(sizes=same_sizes, work=each_once),
    ),
    **dict.fromkeys(("Celu", "Hardmax", "Shrink", "Swish", "ThresholdedRelu"), Row(work=each_once)),
}
