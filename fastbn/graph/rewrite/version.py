"""Whether a model may replace the file of another without a question: whether both are versions of one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from onnx import ModelProto, NodeProto

from fastbn.graph.model.nesting import bodies, is_standard, scopes_of
from fastbn.graph.ops.registry import can_be_affine

if TYPE_CHECKING:
    from onnx.onnx_ml_pb2 import TypeProto

__all__ = ["difference"]

# Operators that quantization adds.
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")

# Operators whose number quantization keeps, though a MatMul and an Add may become a Gemm.
MULTIPLYING = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def difference(proto: ModelProto, other: ModelProto) -> str | None:
    """Say why another model cannot be a version of this one; None where it can: it is the same, or its fold, or its quantized form.

    A fold keeps inputs and outputs, and all nodes but affine ones and those that compute constants. Functions may have been inlined, and
    quantization fuses and renames nodes around those that multiply.
    """
    if not _same_inputs(_inputs(proto), _inputs(other)):
        return "other inputs"
    if [info.name for info in proto.graph.output] != [info.name for info in other.graph.output]:
        return "other outputs"
    mine, its = Counter(_lasting(proto)), Counter(_lasting(other))
    if mine == its and _outputs_of_unnamed(other) <= _outputs(proto):
        return "weights of other sizes" if _shapes_differ(proto, other) else None
    if proto.functions and not other.functions:
        calls = {function.name for function in proto.functions}
        main = Counter(node for node in _lasting(proto, functions=False) if node[0] not in calls)
        if main <= its and {op for op, _ in its} <= {op for op, _ in mine}:
            return None
    if any(op in QUANTIZERS for op, _ in its - mine) and _multiplying(mine) == _multiplying(its):
        return None
    return "other nodes"


def _inputs(proto: ModelProto) -> dict[str, TypeProto.Tensor]:
    """Return the names and types of the graph inputs that are no initializers."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    return {info.name: info.type.tensor_type for info in proto.graph.input if info.name not in constants}


def _same_inputs(mine: Mapping[str, TypeProto.Tensor], its: Mapping[str, TypeProto.Tensor]) -> bool:
    """Say whether two models have the same inputs, as far as their sizes are known."""
    if list(mine) != list(its):
        return False
    for one, other in zip(mine.values(), its.values(), strict=True):
        sizes, others = ([dim.dim_value for dim in each.shape.dim] for each in (one, other))
        if one.elem_type != other.elem_type or len(sizes) != len(others):
            return False
        if any(size > 0 and other_size > 0 and size != other_size for size, other_size in zip(sizes, others, strict=True)):
            return False
    return True


def _outputs(proto: ModelProto) -> set[str]:
    """Return the names of the outputs of all nodes."""
    nodes = [node for graph in scopes_of(proto.graph) for node in graph.node]
    return {name for node in (*nodes, *(node for function in proto.functions for node in function.node)) for name in node.output}


def _outputs_of_unnamed(proto: ModelProto) -> set[str]:
    """Return the names of the first outputs of the lasting nodes without a name."""
    return {node.output[0] for node in proto.graph.node if not node.name and node.output and _is_lasting(node)}


def _shapes_differ(proto: ModelProto, other: ModelProto) -> bool:
    """Say whether a weight of the same name has another shape."""
    read = {node.input[1] for node in proto.graph.node if node.op_type in MULTIPLYING and len(node.input) > 1}
    mine, its = ({tensor.name: tensor.dims for tensor in each.graph.initializer if tensor.name in read} for each in (proto, other))
    return any(list(dims) != list(its.get(name, dims)) for name, dims in mine.items())


def _multiplying(nodes: Mapping[tuple[str, str], int]) -> int:
    return sum(count for (op, _), count in nodes.items() if op in MULTIPLYING)


def _lasting(proto: ModelProto, functions: bool = True) -> Iterator[tuple[str, str]]:
    """Yield (operator, name) of every node that a fold keeps: those of no affine, that compute no constant."""
    graph = proto.graph
    constants = {"", *(tensor.name for tensor in graph.initializer), *(tensor.values.name for tensor in graph.sparse_initializer)}
    nodes = [*graph.node, *(node for function in proto.functions if functions for node in function.node)]
    yield from _of_nodes(nodes, constants)


def _of_nodes(nodes: Iterable[NodeProto], constants: set[str]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        for body in bodies(node):
            constants |= {tensor.name for tensor in body.initializer}
            yield from _of_nodes(body.node, constants)
        if all(name in constants for name in node.input) and not bodies(node):
            constants.update(node.output)
        elif _is_lasting(node):
            yield node.op_type, node.name


def _is_lasting(node: NodeProto) -> bool:
    return not (is_standard(node.domain) and can_be_affine(node.op_type))
