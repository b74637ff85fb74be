"""Activations: a positive scale passes those that are linear on either side of zero; of the others the sizes are known."""

from dataclasses import replace

from onnx import NodeProto, helper

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


def _slope_bound(proto: NodeProto) -> list[NodeProto]:
    """A slope may be larger than 1, and data without signs does not show it: the larger of |x| and |f(-|x|)|."""
    data, output = proto.input[0], proto.output[0]
    negative, sloped, size = (f"{output}/{step}" for step in ("negative", "sloped", "size"))
    activation = NodeProto()
    activation.CopyFrom(proto)
    activation.input[0], activation.output[0] = negative, sloped
    proto.CopyFrom(helper.make_node("Neg", [data], [negative]))
    return [activation, helper.make_node("Abs", [sloped], [size]), helper.make_node("Max", [data, size], [output])]


_PIECEWISE_LINEAR = Row(*both_ways(_piecewise_linear), sizes=same_sizes, work=each_once)

ACTIVATION = {
    "Relu": replace(_PIECEWISE_LINEAR, result_size=broadcast_size),
    "Abs": replace(_PIECEWISE_LINEAR, result_size=broadcast_size),
    "LeakyRelu": replace(_PIECEWISE_LINEAR, bound=_slope_bound),
    "PRelu": replace(_PIECEWISE_LINEAR, bound=_slope_bound),
    **dict.fromkeys(("Sigmoid", "Softplus", "Tanh"), Row(sizes=same_sizes, result_size=broadcast_size)),
    **dict.fromkeys(
        ("Elu", "Gelu", "HardSigmoid", "HardSwish", "LogSoftmax", "Mish", "Selu", "Softmax", "Softsign"),
        Row(sizes=same_sizes, work=each_once),
    ),
    **dict.fromkeys(("Celu", "Hardmax", "Shrink", "Swish", "ThresholdedRelu"), Row(work=each_once)),
}
