"""What stands in the place of a batch normalization that leaves: an Add with its shift, a depthwise Conv, or a Mul and an Add."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from fastbn.dtypes import DTYPES, dtype_name
from fastbn.graph.model.constant import Dense, DType
from fastbn.graph.model.element_types import dtype_of
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.normalization import BIAS, SCALE
from fastbn.graph.ops.placing import FIRST_BROADCASTING_OPSET
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.representable import refuse_unrepresentable
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal

__all__ = ["REWRITE_FORMS", "RewriteForm", "Rewriter", "kept_shift"]

# What a batch normalization that no constant takes in may become.
RewriteForm: TypeAlias = Literal["conv", "affine"]
REWRITE_FORMS: tuple[RewriteForm, ...] = ("conv", "affine")

# From this opset on, the parameters of a BatchNormalization may have another type than its data.
FIRST_MIXED_OPSET = 14

# Ranks of the data of a Conv that runtimes have kernels for: batch, channels and one to three axes more.
CONV_RANKS = (3, 4, 5)


def kept_shift(node: Node, affine: Affine, view: GraphView, weight_type: DType) -> tuple[Node, Dense]:
    """Return (Add, its constant): what stays of a batch normalization whose scale went away."""
    _, shift, abs_terms = affine.shaped(_rank(node, view, "the shift that would stay"))
    # The parameters may be float32 beside float16 data; what stays has the type of the data, as the weights have but for a Cast between.
    kind = view.kind(node.required_input(0))
    dtype = dtype_of(kind) if kind else weight_type
    if dtype_name(dtype) not in DTYPES:
        raise Refusal("unsupported-type", f"its data is {dtype}")
    constant = Dense(dtype, shift, abs_terms)
    add = _substitute(node, "Add", node.required_input(0), node.required_output(), [(BIAS, constant)])
    return add, constant


class Rewriter:
    """Makes other operators of the batch normalizations that stay.

    Parameters
    ----------
    view : GraphView
        After all plans.
    form : str
        "conv", a depthwise Conv with a kernel of 1, or "affine", a Mul and an Add.
    """

    def __init__(self, view: GraphView, form: RewriteForm) -> None:
        self.view = view
        self.form = form
        scopes = view.index.scopes
        self._names = {name for scope in scopes for name in scope.values} | {node.label for scope in scopes for node in scope.nodes}

    def plan(self, node: Node, affine: Affine) -> Plan:
        """Return the plan that rewrites a batch normalization; raises Refusal where that is not possible."""
        shape = self.view.shape(node.required_input(0))
        if shape is not None and len(shape) > 1 and shape[1] not in (None, affine.channels):
            raise Refusal("axis", f"its data has {shape[1]} channels, and it has {affine.channels}")
        plan = Plan(rewritten=[node], channels=affine.channels)
        (self._conv if self.form == "conv" else self._mul_add)(node, affine, plan)
        refuse_unrepresentable(plan, self.view)
        return plan

    # y = scale * x + shift per channel is a convolution of each channel with the one number `scale`.
    def _conv(self, node: Node, affine: Affine, plan: Plan) -> None:
        rank, dtype = _rank(node, self.view, "the weight of a Conv"), self._dtype(node)
        if rank not in CONV_RANKS:
            raise Refusal("axis", f"its data has rank {rank}, that of a Conv has rank 3, 4 or 5; --rewrite-left affine takes any rank")
        if dtype == np.float64:
            raise Refusal("unsupported-type", "onnxruntime has no Conv of float64; --rewrite-left affine takes it")
        weight = Dense(dtype, affine.scale.reshape(-1, *[1] * (rank - 1)), np.abs(affine.scale).reshape(-1, *[1] * (rank - 1)))
        bias = Dense(dtype, affine.shift, affine.abs_terms)
        conv = _substitute(node, "Conv", node.required_input(0), node.required_output(), [(SCALE, weight), (BIAS, bias)])
        for name, value in (("group", affine.channels), ("kernel_shape", [1] * (rank - 2))):
            conv.proto.attribute.append(helper.make_attribute(name, value))
        conv.attributes.update({attribute.name: attribute for attribute in conv.proto.attribute})
        plan.replaced[node] = (conv,)
        plan.constants.update({(conv, 1): weight, (conv, 2): bias})

    def _mul_add(self, node: Node, affine: Affine, plan: Plan) -> None:
        rank, dtype = _rank(node, self.view, "the constants of Mul and Add"), self._dtype(node)
        if self.view.opset < FIRST_BROADCASTING_OPSET:
            raise Refusal("no-absorber", f"Mul and Add of opset {self.view.opset} do not broadcast by shape")
        if rank < 2:
            raise Refusal("axis", f"its data has rank {rank} and no axis of channels")
        scale, shift, abs_terms = affine.shaped(rank)
        factor, term = Dense(dtype, scale, np.abs(scale)), Dense(dtype, shift, abs_terms)
        between = Value(self._new_name(f"{node.required_output().name}/scaled"), node.scope)
        mul = _substitute(node, "Mul", node.required_input(0), between, [(SCALE, factor)], self._new_name(f"{node.label}/scale"))
        between.producer = mul
        add = _substitute(node, "Add", between, node.required_output(), [(BIAS, term)])
        plan.replaced[node] = (mul, add)
        plan.constants.update({(mul, 1): factor, (add, 1): term})

    def _dtype(self, node: Node) -> DType:
        """Return the type of the data; the parameters may have another one."""
        data, kind = node.required_input(0), self.view.kind(node.required_input(0))
        if not kind and self.view.opset >= FIRST_MIXED_OPSET:
            raise Refusal("unsupported-type", f"the type of '{data.name}' is not known")
        dtype = dtype_of(kind) if kind else self.view.weight(node, SCALE).dtype
        if dtype_name(dtype) not in DTYPES:
            raise Refusal("unsupported-type", f"its data is {dtype}")
        return dtype

    def _new_name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._names:
            number += 1
            name = f"{wanted}_{number}"
        self._names.add(name)
        return name


def _rank(node: Node, view: GraphView, what: str) -> int:
    data = node.required_input(0)
    rank = view.rank(data)
    if rank is None:
        raise Refusal("axis-unknown", f"the rank of '{data.name}' is not known, so {what} cannot be placed")
    return rank


def _substitute(node: Node, op: str, data: Value, output: Value, constants: Sequence[tuple[int, Dense]], name: str | None = None) -> Node:
    """Return a node with the name of a batch normalization, or another one; each constant is named after the parameter at a slot of it."""
    proto = NodeProto(op_type=op)
    for text in ("name", "doc_string"):
        if node.proto.HasField(text):
            setattr(proto, text, getattr(node.proto, text))
    if name is not None:
        proto.name = name
    inputs = [data]
    for slot, constant in constants:
        value = Value(node.required_input(slot).name, node.scope)
        value.initializer = numpy_helper.from_array(constant.array(), value.name)
        inputs.append(value)
    proto.input.extend(value.name for value in inputs)
    proto.output.append(output.name)
    made = Node(proto, node.scope, node.position)
    made.order = node.order
    made.inputs.extend(inputs)
    made.outputs.append(output)
    return made
