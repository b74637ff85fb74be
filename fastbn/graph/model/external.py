"""Tensors whose values lie in data files, wherever in a model they stand."""

from collections.abc import Iterator
from itertools import chain

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

__all__ = ["external_tensors", "is_external", "location_of"]

# Protobuf looks such a number up by its name each time.
EXTERNAL = TensorProto.EXTERNAL


def is_external(tensor: TensorProto) -> bool:
    """Say whether a TensorProto keeps its values in another file."""
    return bool(tensor.data_location == EXTERNAL)


def location_of(tensor: TensorProto) -> str:
    """Return the name of the data file of an external tensor, as the model gives it."""
    return str(next(entry.value for entry in tensor.external_data if entry.key == "location"))


def external_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Yield every external TensorProto of a model, wherever it may stand: initializers and attributes of the graph, its bodies and its
    functions, sparse ones, training graphs."""
    graphs: list[GraphProto] = [proto.graph]
    for training in proto.training_info:
        graphs += [training.initialization, training.algorithm]
    nodes: list[NodeProto] = [node for function in proto.functions for node in function.node]
    defaults: list[AttributeProto] = [attribute for function in proto.functions for attribute in function.attribute_proto]
    while graphs or nodes or defaults:
        tensors: list[TensorProto] = []
        sparse: list[SparseTensorProto] = []
        # Whatever the type of an attribute says: other programs read what it holds. Most hold none of these.
        for attribute in chain(defaults, chain.from_iterable(node.attribute for node in nodes)):
            if attribute.HasField("t"):
                tensors.append(attribute.t)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            if attribute.HasField("sparse_tensor"):
                sparse.append(attribute.sparse_tensor)
            if attribute.tensors or attribute.graphs or attribute.sparse_tensors:
                tensors += attribute.tensors
                graphs += attribute.graphs
                sparse += attribute.sparse_tensors
        nodes, defaults = [], []
        for graph in graphs:
            nodes += graph.node
            tensors += graph.initializer
            sparse += graph.sparse_initializer
        graphs = []
        tensors += [part for each in sparse for part in (each.values, each.indices)]
        yield from filter(is_external, tensors)
