"""What inference batch normalizations remember of the data that a model was trained on: mean and variance of each channel they read.

`Remembered` finds those of a model, measures the same on other inputs, and makes the model whose batch normalizations remember these inputs
instead: in it every batch normalization gives each channel the mean and the variance that it has on real data (its bias, its weight
squared), whatever the inputs are. Its activations are then as large as those of the model on real data, and so are the ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fastbn.graph.model.nesting import bodies
from fastbn.graph.ops.normalization import EPSILON, batch_norm_training, is_batch_norm
from fastbn.graph.runtime import Runnable

if TYPE_CHECKING:
    from fastbn.graph.model.index import Index
    from fastbn.graph.model.node import Node
    from fastbn.graph.ops.affine import FloatArray
    from fastbn.graph.parity.feeds import Feed
    from fastbn.graph.runtime import Session

__all__ = ["Moments", "Remembered"]

# A channel whose variance on some inputs is below this part of the remembered one, or that has fewer elements, has no scale there.
DEAD, FEWEST = 1e-6, 8


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each channel."""

    mean: FloatArray
    var: FloatArray
    count: int

    @classmethod
    def of(cls, arrays: Iterable[NDArray[Any]]) -> Moments:
        """Return those of axis 1 of arrays, all together."""
        count, total, squares = 0, np.zeros(()), np.zeros(())
        for array in arrays:
            rows = np.moveaxis(array.astype(np.float64), 1, 0).reshape(array.shape[1], -1)
            count, total, squares = count + rows.shape[1], total + rows.sum(1), squares + (rows * rows).sum(1)
        mean = total / count
        return cls(mean, np.maximum(squares / count - mean * mean, 0), count)

    def distance(self, other: Moments) -> float:
        """Return how far normal distributions of the other moments are from those of these: the mean over the channels of log(1 + d), d the
        Kullback-Leibler divergence, so that one channel alone decides nothing."""
        var = np.maximum(other.var, DEAD * self.var)
        told = self.var > 0
        ratio = self.var[told] / var[told]
        divergence = (ratio - 1 - np.log(ratio) + (self.mean - other.mean)[told] ** 2 / var[told]) / 2
        return float(np.mean(np.log1p(divergence))) if divergence.size else 0.0


@dataclass(frozen=True)
class _BatchNorm:
    """A batch normalization, its weight and bias, and what it remembers."""

    node: Node
    weight: FloatArray
    bias: FloatArray
    moments: Moments
    epsilon: float
    dtype: np.dtype[Any]

    def ratio(self, found: Moments) -> FloatArray:
        """Return by what the standard deviation of each channel that was found is larger than the remembered one."""
        told = (found.var > DEAD * self.moments.var) & (self.moments.var > 0) & (found.count >= FEWEST)
        return np.asarray(np.sqrt(np.where(told, found.var, self.moments.var) / np.where(self.moments.var > 0, self.moments.var, 1)))

    def apply(self, array: NDArray[Any], found: Moments) -> NDArray[Any]:
        """Return what it gives for an array, had it remembered what was found."""
        shape = (1, -1, *[1] * (array.ndim - 2))
        scale = self.weight / np.where(self._deviation(found) > 0, self._deviation(found), 1)
        return ((array - found.mean.reshape(shape)) * scale.reshape(shape) + self.bias.reshape(shape)).astype(array.dtype)

    def _deviation(self, found: Moments) -> FloatArray:
        return np.asarray(self.ratio(found) * np.sqrt(self.moments.var + self.epsilon))

    def restated(self, found: Moments) -> Moments:
        """Return the mean and variance to remember, so that each channel gets the deviation that it has on real data."""
        return Moments(found.mean, np.maximum(self._deviation(found) ** 2 - self.epsilon, 0), found.count)


class Remembered:
    """The batch normalizations of the main graph of a model whose mean and variance are constants, and pieces of the model to run.

    Parameters
    ----------
    index : model.Index
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._runnable = Runnable.of(index.source)
        self._initializers = {tensor.name: tensor for tensor in index.proto.graph.initializer}
        self._norms = {node: norm for node in index.main.ordered if (norm := self._norm(node)) is not None}

    def __len__(self) -> int:
        return len(self._norms)

    def _norm(self, node: Node) -> _BatchNorm | None:
        if not is_batch_norm(node) or batch_norm_training(node, self.index.opset) is not None or node.outputs[0] is None:
            return None
        constants = [self.index.constant(value) for value in node.inputs[1:5]]
        if len(constants) != 4 or not all(constant is not None and constant.size for constant in constants):
            return None
        weight, bias, mean, var = (constant.array() for constant in constants if constant is not None)
        if not mean.any() and (var == 1).all():  # as frameworks initialize them: it has seen no data
            return None
        moments = Moments(mean.astype(np.float64), var.astype(np.float64), 0)
        epsilon = node.attribute("epsilon", EPSILON)
        return _BatchNorm(node, weight.astype(np.float64), bias.astype(np.float64), moments, epsilon, mean.dtype)

    def first(self) -> Callable[[Sequence[Feed]], list[tuple[Moments, Moments]]]:
        """Return a function that tells, for each batch normalization behind no other, what it remembers and what it reads on feeds."""
        behind: set[str] = set()
        norms, nodes = [], []
        for node in self.index.main.ordered:
            if behind.intersection(_reads(node.proto)):
                behind.update(node.proto.output)
            elif node in self._norms:
                norms.append(self._norms[node])
                behind.update(node.proto.output)
            else:
                nodes.append(node)
        wanted = list(dict.fromkeys(norm.node.required_input(0).name for norm in norms))
        piece = self._piece(_needed(nodes, wanted), wanted)

        def measure(feeds: Sequence[Feed]) -> list[tuple[Moments, Moments]]:
            given = [{**feed, **piece(feed)} for feed in feeds]
            return [(norm.moments, Moments.of(feed[norm.node.required_input(0).name] for feed in given)) for norm in norms]

        return measure

    def restated(self, feeds: Sequence[Feed]) -> onnx.ModelProto:
        """Return the model whose batch normalizations remember these inputs.

        The model is run once, piece by piece from one batch normalization to the next, all feeds through each piece.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.index.proto)
        ordered = self.index.main.ordered
        last = {name: number for number, node in enumerate(ordered) for name in _reads(node.proto)}
        live: list[dict[str, NDArray[Any]]] = [dict(feed) for feed in feeds]
        start = 0
        for number, node in enumerate(ordered):
            norm = self._norms.get(node)
            if norm is None:
                continue
            piece = ordered[start:number]
            outputs = [name for each in piece for name in each.proto.output if last.get(name, -1) >= number]
            run = self._piece(_needed(piece, outputs), outputs)
            for values in live:
                values.update(run(values))
            data, result = norm.node.required_input(0).name, norm.node.required_output().name
            found = Moments.of(values[data] for values in live)
            for values in live:
                values[result] = norm.apply(values[data], found)
                for name in [name for name in values if last.get(name, -1) <= number]:
                    del values[name]
            _remember(proto, node.position, norm.restated(found), norm.dtype)
            start = number + 1
        return proto

    def _piece(self, nodes: Sequence[Node], outputs: list[str]) -> Callable[[Feed], Feed]:
        """Return a function that runs some nodes: name -> array of all they read, name -> array of their outputs."""
        if not nodes:
            return lambda values: {}
        made = {name for node in nodes for name in node.proto.output}
        outer = [name for name in dict.fromkeys(name for node in nodes for name in _reads(node.proto)) if name not in made]
        constants = [self._initializers[name] for name in outer if name in self._initializers]
        inputs = [name for name in outer if name not in self._initializers]
        session: Session | None = None

        def run(values: Feed) -> Feed:
            nonlocal session
            if session is None:
                infos = [helper.make_tensor_value_info(name, _kind(values[name]), [None] * values[name].ndim) for name in inputs]
                graph = helper.make_graph([node.proto for node in nodes], "piece", infos, _untyped(outputs), constants)
                proto = helper.make_model(graph, opset_imports=self.index.proto.opset_import, functions=self.index.proto.functions)
                proto.ir_version = max(self.index.proto.ir_version, 4)  # from which on constants need not be inputs
                session = self._runnable.with_proto(proto).session()
            return dict(zip(outputs, session.run(outputs, {name: values[name] for name in inputs}), strict=True))

        return run


def _kind(values: NDArray[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(values.dtype))


def _untyped(names: Iterable[str]) -> list[onnx.ValueInfoProto]:
    """Return outputs whose types the runtime finds itself."""
    return [onnx.ValueInfoProto(name=name) for name in names]


def _reads(node: onnx.NodeProto) -> list[str]:
    """Return the names that a node reads, those that its bodies capture included."""
    names = [name for name in node.input if name]
    for graph in bodies(node):
        inside = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
        for inner in graph.node:
            names.extend(name for name in _reads(inner) if name not in inside)
            inside.update(inner.output)
        names.extend(info.name for info in graph.output if info.name not in inside)
    return names


def _needed(nodes: Sequence[Node], outputs: Iterable[str]) -> list[Node]:
    """Return the nodes on which some outputs depend."""
    needed, wanted = [], set(outputs)
    for node in reversed(nodes):
        if wanted.intersection(node.proto.output):
            needed.append(node)
            wanted.update(_reads(node.proto))
    return needed[::-1]


def _remember(proto: onnx.ModelProto, position: int, moments: Moments, dtype: np.dtype[Any]) -> None:
    """Let the batch normalization at a position remember other moments."""
    taken = {tensor.name for tensor in proto.graph.initializer} | {name for node in proto.graph.node for name in node.output}
    for slot, values in ((3, moments.mean), (4, moments.var)):
        name = f"{proto.graph.node[position].output[0]}_restated_{slot}"
        while name in taken:
            name += "_"
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), name))
        proto.graph.node[position].input[slot] = name
    proto.ir_version = max(proto.ir_version, 4)
