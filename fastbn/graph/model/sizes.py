"""Sizes that onnx's shape inference leaves open: the integers that a graph computes from shapes, and what a Reshape makes of them.

Each size is a number, a Dim, a Product of such, or None where nothing is known. Two Dims are equal only where they are the same axis of
the same value, followed through operators that keep it. The names that onnx's inference gives unknown sizes prove nothing of the kind: a
file may give two inputs of different sizes the same name, and onnxruntime runs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastbn.graph.model.expressions import Constants
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.model.node import Node, Shape, Value, is_complete
from fastbn.graph.ops.registry import operator_row
from fastbn.graph.ops.shape_rules import Dim, Size, Sizes, dims_of, quotient

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["LARGEST_LIST", "SizeInference"]

# Integer constants up to this many elements are read for their values.
LARGEST_LIST = 1 << 10

# Values behind a Reshape that are followed for what the weights behind them demand of its sizes.
MOST_FOLLOWED = 16


class SizeInference:
    """One pass over the nodes of a graph, in the order of the data flow.

    Parameters
    ----------
    nodes : list of model.Node
    known : dict of (scope number, name) -> tuple of int or None
        The shapes that are known already.
    constants : expressions.Constants
    """

    def __init__(self, nodes: Sequence[Node], known: Mapping[tuple[int, str], Shape], constants: Constants) -> None:
        self.nodes = nodes
        self.constants = constants
        self._shapes = known
        self._sizes: dict[Value, tuple[Size, ...] | None] = {}
        self._lists: dict[Value, Array | None] = {}

    def infer(self) -> tuple[dict[Value, Shape], dict[Value, Array]]:
        """Return the shapes and lists that say more than is known already, for the input sizes that the model or the caller gives.

        Returns
        -------
        shapes : dict of value -> tuple of int or None
            What a Reshape or Flatten gives, and the shapes of values of which not even the rank was known.
        lists : dict of value -> numpy.ndarray
            Computed lists, all of them numbers, that an operator reads whose result has unknown sizes.
        """
        nodes = [(node, node.outputs[0]) for node in self.nodes if node.outputs]
        open_nodes = {node: None for node, _ in nodes if self.is_open(node)}
        shapes: dict[Value, Shape] = {}
        targets = [value for node in open_nodes for slot in operator_row(node).size_slots if (value := node.input(slot)) is not None]
        lists = self._computed(targets)
        for node, output in nodes if open_nodes else ():
            if output is None:
                continue
            for value in node.outputs:
                if value is not None and value in lists:
                    self._lists[value] = self._list(node, value.slot)
            sizes = self._combine(node, output)
            known = self.known(output)
            is_reshaped = node in open_nodes and operator_row(node).reshape_target is not None
            if sizes is not None and (known is None or is_reshaped or self._lists.get(output) is not None):
                numbers = _shape_of(sizes)
                if numbers is not None and numbers != known:
                    shapes[output] = numbers
        numeric = {value: _numbers(self._lists.get(value)) for value in targets if value in lists}
        return shapes, {value: array for value, array in numeric.items() if array is not None}

    def known(self, value: Value) -> Shape | None:
        """Return the shape of a value that is known already."""
        return self._shapes.get((value.scope.number, value.name))

    def has_told(self, found: Mapping[tuple[int, str], Shape], before: Mapping[tuple[int, str], Shape]) -> bool:
        """Say whether all that has been found since `before` is what this pass gave, so that another one would give no more."""
        told = {(value.scope.number, value.name): sizes for value, sizes in self._sizes.items()}
        return all(shape == before.get(key) or shape == _shape_of(told.get(key)) for key, shape in found.items())

    def sizes(self, value: Value) -> tuple[Size, ...] | None:
        """Return the sizes of a value, a Dim for each one that only a run tells; None where not even the rank is known."""
        return self._of(value)

    def elements(self, value: Value) -> list[Size] | None:
        """Return the elements of a list of integers as far as they are known, None where not even their number is."""
        return self._integers(value)

    def is_open(self, node: Node) -> bool:
        """Say whether a node gives unknown sizes, and reads sizes by value or has a weight that tells the rank."""
        value, row = node.outputs[0] if node.outputs else None, operator_row(node)
        if value is not None and row.channel_axis is not None and row.sizes is not None and self.known(value) is None:
            return True
        if value is None or not row.size_slots:
            return False
        # Inference keeps what a graph output declares, so another pass would find nothing new for it.
        shape = self.known(value)
        return shape is None or (None in shape and not value.is_output)

    # ---- sizes of values ----

    def _of(self, value: Value | None) -> tuple[Size, ...] | None:
        """Return the sizes of a value, None where not even its rank is known."""
        if value is None:
            return None
        if value not in self._sizes:
            shape = self.known(value) if value.initializer is None else value.dims
            self._sizes[value] = _named(shape, value)
        return self._sizes[value]

    def _combine(self, node: Node, value: Value) -> tuple[Size, ...] | None:
        """Return the sizes of a node's first output: those that inference knows, completed by those that follow from its inputs."""
        computed, known = self._from_inputs(node), self.known(value)
        listed = self._lists.get(value)
        known = known if listed is None else listed.shape
        sizes: Sequence[Size] | None = computed if known is None else known
        if known is not None and computed is not None and len(computed) == len(known):
            sizes = [other if size is None else size for size, other in zip(known, computed, strict=True)]
        self._sizes[value] = _named(sizes, value)
        return self._sizes[value]

    def _from_inputs(self, node: Node) -> Sizes | None:
        """Return the sizes of a node's first output as far as its row tells them."""
        row = operator_row(node)
        if row.reshape_target is not None:
            first = self._of(node.input(0))
            return self._reshaped(node, first, row.reshape_target(node, first, self._integers))
        return row.sizes(node, [self._of(value) for value in node.inputs]) if row.sizes is not None and node.inputs else None

    def _reshaped(self, node: Node, first: Sizes | None, target: list[Size] | None) -> Sizes | None:
        """Return the sizes that a list of sizes makes of a value by Reshape's rules; first are those of the value."""
        if target is None:
            return None
        keeps_zero = node.attribute("allowzero", 0)
        sizes: list[Size] = []
        for axis, size in enumerate(target):
            if size == 0:
                size = None if keeps_zero or first is None or axis >= len(first) else first[axis]
            elif not isinstance(size, int) and (first is None or not {*dims_of([size])} <= {*dims_of(first)}):
                # In a run it may be 0, which means the size that the data has on this axis: so it is not known. A size of the data itself
                # is 0 only where the data is empty, and so is what is made of it.
                size = None
            sizes.append(size)
        for axis in [axis for axis, size in enumerate(sizes) if size == -1]:
            others = sizes[:axis] + sizes[axis + 1 :]
            sizes[axis] = quotient(first, others) if first is not None else None
        if not all(isinstance(size, int) for size in sizes):
            for axis, size in self._demanded(node.required_output(), len(sizes)):
                sizes[axis] = sizes[axis] if isinstance(sizes[axis], int) else size
        return sizes

    def _integers(self, value: Value | None) -> list[Size] | None:
        """Return the elements of a list of integers."""
        elements = self._elements(value)
        return None if elements is None or elements.ndim != 1 or elements.dtype != object else list(elements.tolist())

    def _demanded(self, value: Value, rank: int) -> Iterator[tuple[int, int]]:
        """Yield (axis, size) that the weights of the next nodes demand of a value, through operators that keep its sizes."""
        own: Sizes = tuple(Dim(value, axis) for axis in range(rank))
        pending: list[tuple[Value, Sizes]] = [(value, own)]
        for current, sizes in pending:
            for node, slot in current.readers:
                row, output = operator_row(node), node.outputs[0] if node.outputs else None
                if slot or node.scope is not value.scope or output is None:
                    continue
                weight = self._of(node.input(1)) if row.demanded_size is not None else None
                if row.demanded_size is not None and weight is not None:
                    axis, size = row.demanded_size(node, weight)
                    dim = sizes[axis] if -len(sizes) <= axis < len(sizes) else None
                    if isinstance(size, int) and isinstance(dim, Dim) and dim.value is value:
                        yield dim.axis, size
                if row.sizes is not None and len(pending) < MOST_FOLLOWED:
                    kept = row.sizes(node, [sizes, *map(self._of, node.inputs[1:])])
                    pending.extend([] if kept is None else [(output, kept)])

    # ---- lists of integers ----

    def _computed(self, targets: Iterable[Value]) -> set[Value]:
        """Return the values that operators on lists give and that these targets are computed from, the targets themselves included."""
        computed: set[Value] = set()
        pending = list(targets)
        for value in pending:
            node = value.producer
            if node is None or value in computed or not is_standard(node.domain):
                continue
            row = operator_row(node)
            if row.list_elements is not None or row.result_size is not None:
                computed.add(value)
                by_shape = row.list_elements is not None and row.reads.get(0) == "shape"
                pending.extend(read for read in node.inputs if read is not None and not by_shape)
        return computed

    def _elements(self, value: Value | None) -> Array | None:
        """Return the elements of a list: an array of objects where they are integers, of numbers where they are floats or truth values.

        None where not even its shape is known.
        """
        if value is None:
            return None
        computed = self._lists.get(value)
        if computed is not None:
            return computed
        constant = self.constants.find(value, LARGEST_LIST)
        if constant is not None and (constant.dtype.kind not in "biuf" or constant.size > LARGEST_LIST):
            return None
        if constant is not None:
            return _listed(constant.array())
        shape = self.known(value)
        return np.full(shape, None) if is_complete(shape) and math.prod(shape) <= LARGEST_LIST else None

    def _list(self, node: Node, slot: int) -> Array | None:
        """Return the elements that an operator on lists gives, None where they are not known."""
        row = operator_row(node)
        if row.list_elements is not None and row.reads.get(0) == "shape":
            return row.list_elements(node, self._of(node.input(0)), ())
        inputs = [self._elements(value) for value in node.inputs]
        if not inputs or any(each is None and value is not None for each, value in zip(inputs, node.inputs, strict=True)):
            return None
        elements = None if row.list_elements is None else row.list_elements(node, None, inputs)
        if elements is not None:
            return elements
        first = inputs[0]
        if row.moved_inputs is not None and first is not None and first.dtype == object:
            return self._moved(node, slot, inputs)
        arrays = [None if each is None else _numbers(each) for each in inputs]
        if any(array is None and each is not None for array, each in zip(arrays, inputs, strict=True)):
            return None
        result = self.constants.evaluate(node, arrays, LARGEST_LIST)
        return None if result is None or slot not in result else _listed(result[slot])

    def _moved(self, node: Node, slot: int, inputs: Sequence[Array | None]) -> Array | None:
        """Return the elements that an operator which only moves them gives: it is run on their positions in a list of all elements."""
        moves_all = operator_row(node).moved_inputs == "all"
        elements: list[Size] = []
        arrays: list[Array | None] = []
        for at, each in enumerate(inputs):
            if each is None:
                arrays.append(None)
            elif at == 0 or moves_all:
                arrays.append(np.arange(len(elements), len(elements) + each.size).reshape(each.shape))
                elements.extend(each.flat)
            elif all(isinstance(size, int) for size in each.flat):
                arrays.append(each.astype(np.int64))
            else:
                return None
        result = self.constants.evaluate(node, arrays, LARGEST_LIST)
        if result is None or slot not in result:
            return None
        moved: Array = _objects(elements)[result[slot].reshape(-1)].reshape(result[slot].shape)
        return moved


def _shape_of(sizes: Sequence[Size] | None) -> Shape | None:
    return None if sizes is None else tuple(size if isinstance(size, int) and 0 < size < 1 << 63 else None for size in sizes)


def _listed(array: Array) -> Array:
    """Return an array as _elements does: of objects where it holds integers."""
    return array.astype(object) if array.dtype.kind in "iu" else array


def _numbers(elements: Array | None) -> Array | None:
    """Return the elements of a list as an array of numbers, None where one of them is not known."""
    if elements is None or elements.dtype != object:
        return elements
    return elements.astype(np.int64) if all(_fits(size) for size in elements.flat) else None


def _fits(size: Size) -> bool:
    return isinstance(size, int) and abs(size) < 1 << 63


def _objects(elements: Sequence[Size]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def _named(sizes: Sequence[Size] | None, value: Value) -> tuple[Size, ...] | None:
    """Return the sizes of a value with its Dim for each one that is not known."""
    return None if sizes is None else tuple(Dim(value, at) if size is None else size for at, size in enumerate(sizes))
