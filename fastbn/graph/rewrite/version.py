"""Whether a model that stands where another is to go may be replaced by it without a question: whether it is a version of it."""

from collections import Counter
from collections.abc import Iterator

from fastbn.graph.model.nesting import bodies, is_standard, scopes_of
from fastbn.graph.ops.registry import can_be_affine

__all__ = ["difference"]

# What quantisation adds.
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")

# What it keeps; a MatMul and an Add may become a Gemm.
MULTIPLYING = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def difference(proto, other) -> str | None:
    """Say in what another model cannot be a version of this one, as its fold, its quantised form and itself are; None where it can.

    A fold leaves inputs and outputs as they are, and all nodes but affine ones and those that compute constants. What stands in functions
    may have been inlined, and a quantiser fuses and renames nodes around those that multiply.
    """
    if not _same_inputs(_inputs(proto), _inputs(other)):
        return "other inputs"
    if [info.name for info in proto.graph.output] != [info.name for info in other.graph.output]:
        return "other outputs"
    mine, its = Counter(_lasting(proto)), Counter(_lasting(other))
    if mine == its and _unnamed_values(other) <= _values(proto):
        return "weights of other sizes" if _shapes_differ(proto, other) else None
    if proto.functions and not other.functions:
        calls = {function.name for function in proto.functions}
        main = Counter(each for each in _lasting(proto, functions=False) if each[0] not in calls)
        if main <= its and {op for op, _ in its} <= {op for op, _ in mine}:
            return None
    if any(op in QUANTIZERS for op, _ in its - mine) and _multiplying(mine) == _multiplying(its):
        return None
    return "other nodes"


def _inputs(proto):
    constants = {tensor.name for tensor in proto.graph.initializer}
    return {info.name: info.type.tensor_type for info in proto.graph.input if info.name not in constants}


def _same_inputs(mine, its):
    if list(mine) != list(its):
        return False
    for one, other in zip(mine.values(), its.values(), strict=True):
        sizes, others = ([dim.dim_value for dim in each.shape.dim] for each in (one, other))
        if one.elem_type != other.elem_type or len(sizes) != len(others):
            return False
        if any(size > 0 and found > 0 and size != found for size, found in zip(sizes, others, strict=True)):
            return False
    return True


def _values(proto):
    """Return the names of all values that nodes give."""
    nodes = [node for graph in scopes_of(proto.graph) for node in graph.node]
    return {name for node in (*nodes, *(node for function in proto.functions for node in function.node)) for name in node.output}


def _unnamed_values(proto):
    return {node.output[0] for node in proto.graph.node if not node.name and node.output and _is_lasting(node)}


def _shapes_differ(proto, other):
    """Say whether a weight of the same name has another shape."""
    read = {node.input[1] for node in proto.graph.node if node.op_type in MULTIPLYING and len(node.input) > 1}
    mine, its = ({tensor.name: tensor.dims for tensor in each.graph.initializer if tensor.name in read} for each in (proto, other))
    return any(list(dims) != list(its.get(name, dims)) for name, dims in mine.items())


def _multiplying(nodes):
    return sum(count for (op, _), count in nodes.items() if op in MULTIPLYING)


def _lasting(proto, functions=True) -> Iterator[tuple[str, str]]:
    """Yield (operator, name) of every node that a fold leaves alone: not those of an affine, and not those that compute a constant."""
    graph = proto.graph
    constants = {"", *(tensor.name for tensor in graph.initializer), *(tensor.values.name for tensor in graph.sparse_initializer)}
    nodes = [*graph.node, *(node for function in proto.functions if functions for node in function.node)]
    yield from _of_nodes(nodes, constants)


def _of_nodes(nodes, constants):
    for node in nodes:
        for body in bodies(node):
            constants |= {tensor.name for tensor in body.initializer}
            yield from _of_nodes(body.node, constants)
        if all(name in constants for name in node.input) and not bodies(node):
            constants.update(node.output)
        elif _is_lasting(node):
            yield node.op_type, node.name


def _is_lasting(node):
    return not (is_standard(node.domain) and can_be_affine(node.op_type))
