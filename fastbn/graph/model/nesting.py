"""Graphs within a model: the bodies of nodes, and model-local functions, none of which may call itself."""

from collections import Counter

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from fastbn.errors import ModelError

__all__ = ["DEEPEST", "LARGEST_INLINED", "bodies", "expanded_size", "is_standard", "scopes_of"]

# Bodies within bodies go no deeper; protobuf reads and copies about 30.
DEEPEST = 24

# A model that has more nodes than this once its functions stand in the place of their calls is read with its functions as they are.
LARGEST_INLINED = 20_000


def is_standard(domain: str) -> bool:
    """Say whether a domain is ONNX's own."""
    return domain in ("", "ai.onnx")


def bodies(node: NodeProto) -> list[GraphProto]:
    """Return the subgraphs of a NodeProto, in order."""
    found = []
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            found.append(attribute.g)
        elif attribute.type == AttributeProto.GRAPHS:
            found.extend(attribute.graphs)
    return found


def scopes_of(graph: GraphProto | FunctionProto) -> list[GraphProto | FunctionProto]:
    """Return a graph, or a function, and all subgraphs below it, outermost first: the same order for a model and for its copy."""
    found = [graph]
    for current in found:
        for node in current.node:
            found.extend(bodies(node))
    return found


def expanded_size(proto: ModelProto) -> int:
    """Return how many nodes a model has once its functions stand in the place of their calls.

    Raises
    ------
    ModelError
        A function calls itself, perhaps by way of others.
    """
    functions = {(each.domain, each.name, each.overload): each for each in proto.functions}
    calls = {key: _calls(function) for key, function in functions.items()}
    sizes: dict[tuple, int] = {}
    # A function on the way is counted when the ones that it calls have been.
    for start in calls:
        pending, open_ones = [start], set()
        while pending:
            key = pending[-1]
            waiting = [] if key in sizes else [called for called in calls[key] if called in calls and called not in sizes]
            if waiting and key in open_ones:
                raise ModelError(f"Cannot expand the function '{key[1]}': it calls itself, perhaps by way of others")
            if waiting:
                open_ones.add(key)
                pending.extend(waiting)
                continue
            pending.pop()
            sizes[key] = _size(calls[key], sizes)
    return _size(_calls(proto.graph), sizes)


def _size(calls: Counter, sizes: dict[tuple, int]) -> int:
    return sum(count * sizes.get(key, 1) for key, count in calls.items())


def _calls(graph: GraphProto | FunctionProto) -> Counter:
    """Return how often each operator or function is called, in bodies too."""
    return Counter((node.domain, node.op_type, node.overload) for each in scopes_of(graph) for node in each.node)
