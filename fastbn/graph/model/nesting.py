"""Graphs within a model: the bodies of nodes, and model-local functions, none of which may call itself."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias, overload

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from fastbn.errors import ModelError

__all__ = ["DEEPEST", "LARGEST_INLINED", "bodies", "bodies_in", "expanded_size", "is_standard", "scopes_of"]

# The domain, name and overload by which a node calls an operator or a function.
Callee: TypeAlias = tuple[str, str, str]

# The most bodies within bodies; protobuf reads and copies about 30.
DEEPEST = 24

# The most nodes that a model may have with its functions inlined; where it has more, they stay functions.
LARGEST_INLINED = 20_000


# Types of attributes; protobuf looks such a number up by its name each time.
GRAPH, GRAPHS = AttributeProto.GRAPH, AttributeProto.GRAPHS


def is_standard(domain: str) -> bool:
    """Say whether a domain is ONNX's own."""
    return domain in ("", "ai.onnx")


def bodies(node: NodeProto) -> list[GraphProto]:
    """Return the subgraphs of a NodeProto, in order."""
    return bodies_in(node.attribute)


def bodies_in(attributes: Iterable[AttributeProto]) -> list[GraphProto]:
    """Return the subgraphs in the attributes of a node, in order."""
    graphs: list[GraphProto] = []
    for attribute in attributes:
        kind = attribute.type
        if kind == GRAPH:
            graphs.append(attribute.g)
        elif kind == GRAPHS:
            graphs.extend(attribute.graphs)
    return graphs


@overload
def scopes_of(graph: GraphProto) -> list[GraphProto]: ...
@overload
def scopes_of(graph: FunctionProto) -> list[GraphProto | FunctionProto]: ...
def scopes_of(graph: GraphProto | FunctionProto) -> Sequence[GraphProto | FunctionProto]:
    """Return a graph, or a function, and all subgraphs below it, outermost first: the same order for a model and for its copy."""
    scopes = [graph]
    for scope in scopes:
        for node in scope.node:
            scopes.extend(bodies(node))
    return scopes


def expanded_size(proto: ModelProto) -> int:
    """Return how many nodes a model has once its functions stand in the place of their calls.

    Raises
    ------
    ModelError
        A function calls itself, perhaps by way of others.
    """
    functions = {(each.domain, each.name, each.overload): each for each in proto.functions}
    calls = {key: _calls(function) for key, function in functions.items()}
    sizes: dict[Callee, int] = {}
    # A function is counted once all those that it calls have been; `opened` holds those that wait for others.
    for start in calls:
        pending, opened = [start], set()
        while pending:
            key = pending[-1]
            waiting = [] if key in sizes else [called for called in calls[key] if called in calls and called not in sizes]
            if waiting and key in opened:
                raise ModelError(f"Cannot expand the function '{key[1]}': it calls itself, perhaps by way of others")
            if waiting:
                opened.add(key)
                pending.extend(waiting)
                continue
            pending.pop()
            sizes[key] = _size(calls[key], sizes)
    return _size(_calls(proto.graph), sizes)


def _size(calls: Counter[Callee], sizes: dict[Callee, int]) -> int:
    return sum(count * sizes.get(key, 1) for key, count in calls.items())


def _calls(graph: GraphProto | FunctionProto) -> Counter[Callee]:
    """Return how often each operator or function is called, in bodies too."""
    return Counter((node.domain, node.op_type, node.overload) for each in scopes_of(graph) for node in each.node)
