"""Sizes that shape inference gives up on: the integers that a graph computes from shapes, and what a Reshape makes of them.

Each is a number, a Dim, or None where nothing is known. A Dim is never taken for another one: only the same axis of the same value counts,
followed through operators that keep it.
"""

import math
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from fastbn.graph.model.expressions import Constants, is_expression
from fastbn.graph.model.nesting import is_standard

__all__ = ["LARGEST_LIST", "Sizes"]

# Integer constants up to this many elements are read for their values.
LARGEST_LIST = 1 << 10

# The output has the shape of the first input.
# fmt: off
SAME_SHAPE = frozenset([
    "Abs", "BatchNormalization", "Cast", "Ceil", "Clip", "DequantizeLinear", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "InstanceNormalization", "LRN", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg", "PRelu",
    "QuantizeLinear", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softmax", "Softplus", "Softsign", "Sqrt", "Tanh",
])
# fmt: on

# Axis 0 of the output is that of the first input, whatever becomes of the others.
SAME_BATCH = ("AveragePool", "Conv", "ConvTranspose", "DepthToSpace", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "SpaceToDepth")

# Each dimension is the one of its operands that is not 1.
BROADCASTING = ("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Sum")

# Operators that move the elements of a list.
MOVING = ("Concat", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze")

# Operator -> the slots in which it reads sizes, factors or axes by value; a Flatten is a Reshape to sizes that it does not read.
# fmt: off
VALUE_SLOTS = {
    "CenterCropPad": (1,), "ConstantOfShape": (0,), "Expand": (1,), "Flatten": (1,), "OneHot": (1,), "Pad": (1, 3), "Range": (0, 1, 2),
    "Reshape": (1,), "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Tile": (1, 2), "TopK": (1,),
    "Unsqueeze": (1,), "Upsample": (1,),
}
# fmt: on

# A Cast to one of these types leaves a size as it is.
INTEGERS = (TensorProto.INT32, TensorProto.INT64)


@dataclass(frozen=True)
class Dim:
    """The size of one axis of one value, which only a run tells."""

    value: object
    axis: int


class Sizes:
    """One pass over the nodes of a graph, in the order of the data flow.

    Parameters
    ----------
    nodes : list of model.Node
    known : dict of (scope number, name) -> tuple of int or None
        The shapes that are known already.
    constants : expressions.Constants
    """

    def __init__(self, nodes: list, known: dict, constants: Constants) -> None:
        self.nodes = nodes
        self.constants = constants
        self._shapes = known
        self._sizes: dict = {}
        self._lists: dict = {}

    def found(self) -> tuple[dict, dict]:
        """Return what says more than is known already, both for the sizes of the inputs that the model or the caller gives.

        Returns
        -------
        shapes : dict of value -> tuple of int or None
            What a Reshape or Flatten gives.
        lists : dict of value -> numpy.ndarray
            Computed lists, all of them numbers, that an operator reads whose result has unknown sizes.
        """
        giving = [node for node in self.nodes if any(node.outputs[:1])]
        open_ends = {node: None for node in giving if self.is_open(node)}
        shapes, targets = {}, [node.input(slot) for node in open_ends for slot in _value_slots(node)]
        lists = self._computed(targets)
        for node in giving if open_ends else ():
            for value in node.outputs:
                if value in lists:
                    self._lists[value] = self._list(node, value.slot)
            sizes = self._settle(node)
            if node in open_ends and sizes is not None and node.is_op("Reshape", "Flatten"):
                numbers = tuple(size if isinstance(size, int) else None for size in sizes)
                if numbers != self.known(node.outputs[0]):
                    shapes[node.outputs[0]] = numbers
        numeric = {value: _numbers(self._lists.get(value)) for value in targets if value in lists}
        return shapes, {value: array for value, array in numeric.items() if array is not None}

    def known(self, value: object) -> tuple | None:
        """Return the shape of a value that is known already."""
        return self._shapes.get((value.scope.number, value.name))

    def is_open(self, node: object) -> bool:
        """Say whether a node reads sizes by value and gives unknown ones."""
        value = node.outputs[0] if node.outputs else None
        if value is None or not _value_slots(node):
            return False
        # What a graph output declares stands: asking again in every pass would find nothing new.
        shape = self.known(value)
        return shape is None or (None in shape and not value.is_output)

    # ---- sizes of values ----

    def _of(self, value):
        """Return the sizes of a value, None where not even its rank is known."""
        if value is None:
            return None
        if value not in self._sizes:
            shape = self.known(value) if value.initializer is None else tuple(value.initializer.dims)
            self._sizes[value] = _named(shape, value)
        return self._sizes[value]

    def _settle(self, node):
        """Return the sizes of a node's first output, which those of its inputs may tell better than inference did."""
        value = node.outputs[0]
        told, shape = self._told(node), self.known(value)
        if shape is None:
            shape = told
        elif told is not None and len(told) == len(shape):
            shape = [size if known is None else known for size, known in zip(told, shape, strict=True)]
        self._sizes[value] = _named(shape, value)
        return self._sizes[value]

    def _told(self, node):
        first = self._of(node.input(0))
        if node.is_op("Reshape", "Flatten"):
            return self._reshaped(node, first)
        if first is None:
            return None
        if node.is_op(*SAME_SHAPE):
            return first
        if node.is_op(*SAME_BATCH):
            return (*first[:1], *[None] * (len(first) - 1))
        if node.is_op("Transpose"):
            perm = node.attribute("perm") or list(range(len(first)))[::-1]
            return tuple(first[at] for at in perm) if sorted(perm) == list(range(len(first))) else None
        if node.is_op("Concat"):
            joined = node.attribute("axis", 1) % max(len(first), 1)
            return tuple(None if at == joined else size for at, size in enumerate(first))
        if node.is_op("Gemm"):
            return (None if node.attribute("transA", 0) else first[0], None) if len(first) == 2 else None
        if node.is_op("MatMul"):
            second = self._of(node.input(1))
            return (*first[:-1], None) if second is not None and len(second) == 2 else None
        if node.is_op(*BROADCASTING):
            return _broadcast([self._of(value) for value in node.inputs])
        return None

    def _reshaped(self, node, first):
        target = self._target(node, first)
        if target is None:
            return None
        keeps_zero, sizes = node.attribute("allowzero", 0), []
        for at, size in enumerate(target):
            if size == 0:
                size = None if keeps_zero or first is None or at >= len(first) else first[at]
            elif isinstance(size, Dim) and (first is None or size not in first):
                # Where it is 0, and the value is not empty, it stands for whatever the value has there.
                size = None
            sizes.append(size)
        rest = [at for at, size in enumerate(sizes) if size == -1]
        for at in rest:
            given = sizes[:at] + sizes[at + 1 :]
            sizes[at] = _quotient(first, given) if first is not None else None
        if sizes and not isinstance(sizes[-1], int):
            sizes[-1] = self._rows_behind(node.outputs[0], sizes[-1])
        return sizes

    def _target(self, node, first):
        """Return what a Reshape, or a Flatten written as one, is to give."""
        if node.is_op("Flatten"):
            return [0, -1] if node.attribute("axis", 1) == 1 and first else None
        found = self._elements(node.input(1))
        return None if found is None or found.ndim != 1 or found.dtype != object else found.tolist()

    def _rows_behind(self, value, size):
        """Return the size of the last axis that a matrix product of this value demands, or what is known without one."""
        for node, slot in value.readers:
            weight = self._of(node.input(1)) if slot == 0 and node.is_op("MatMul", "Gemm") and node.scope is value.scope else None
            if weight is not None and len(weight) == 2 and not node.attribute("transA", 0):
                rows = weight[1 if node.attribute("transB", 0) else 0]
                size = rows if isinstance(rows, int) else size
        return size

    # ---- lists of integers ----

    def _computed(self, targets):
        """Return the values that operators on lists give on the way to these targets."""
        found, pending = set(), [value for value in targets if value is not None]
        for value in pending:
            node = value.producer
            if node is None or value in found or not is_standard(node.domain):
                continue
            if node.op in ("Identity", "Shape") or is_expression(node.op):
                found.add(value)
                pending.extend(read for read in node.inputs if read is not None and not node.is_op("Shape"))
        return found

    def _elements(self, value):
        """Return the elements of a list: an array of objects where they are integers, of numbers where they are floats or truth values.

        None where not even its shape is known.
        """
        if value is None:
            return None
        if self._lists.get(value) is not None:
            return self._lists[value]
        constant = self.constants.find(value, LARGEST_LIST)
        if constant is not None and (constant.dtype.kind not in "biuf" or constant.size > LARGEST_LIST):
            return None
        if constant is not None:
            return _listed(constant.array())
        shape = self.known(value)
        return np.full(shape, None) if shape is not None and None not in shape and math.prod(shape) <= LARGEST_LIST else None

    def _list(self, node, slot):
        """Return the elements that an operator on lists gives, None where it does not tell."""
        if node.is_op("Shape"):
            sizes = self._of(node.input(0))
            return None if sizes is None else _objects(sizes[node.attribute("start", 0) : node.attribute("end", len(sizes))])
        inputs = [self._elements(value) for value in node.inputs]
        if not inputs or any(found is None and value is not None for found, value in zip(inputs, node.inputs, strict=True)):
            return None
        if node.is_op("Identity"):
            return inputs[0]
        if node.is_op("Cast") and node.attribute("to", 0) in INTEGERS and inputs[0].dtype == object:
            return inputs[0]
        if node.is_op(*MOVING) and any(found is not None and found.dtype == object for found in inputs[:1]):
            return self._moved(node, slot, inputs)
        arrays = [None if found is None else _numbers(found) for found in inputs]
        if any(array is None and found is not None for array, found in zip(arrays, inputs, strict=True)):
            return None
        result = self.constants.evaluate(node, arrays, LARGEST_LIST)
        return None if result is None or slot >= len(result) else _listed(result[slot])

    def _moved(self, node, slot, inputs):
        """Return where the elements come to lie: the operator is run on their numbers in a list of them all."""
        elements, arrays = [], []
        for at, found in enumerate(inputs):
            if found is None:
                arrays.append(None)
            elif at == 0 or node.is_op("Concat"):
                arrays.append(np.arange(len(elements), len(elements) + found.size).reshape(found.shape))
                elements.extend(found.flat)
            elif all(isinstance(size, int) for size in found.flat):
                arrays.append(found.astype(np.int64))
            else:
                return None
        result = self.constants.evaluate(node, arrays, LARGEST_LIST)
        return None if result is None or slot >= len(result) else _objects(elements)[result[slot].reshape(-1)].reshape(result[slot].shape)


def _listed(array):
    return array.astype(object) if array.dtype.kind in "iu" else array


def _numbers(elements):
    """Return the elements of a list as an array of numbers, None where one of them is none."""
    if elements is None or elements.dtype != object:
        return elements
    return elements.astype(np.int64) if all(_fits(size) for size in elements.flat) else None


def _fits(size):
    return isinstance(size, int) and abs(size) < 1 << 63


def _value_slots(node):
    """Return the slots in which an operator reads sizes by value."""
    if not is_standard(node.domain):
        return ()
    return (1,) if node.op.startswith("Reduce") else VALUE_SLOTS.get(node.op, ())


def _objects(elements):
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def _named(sizes, value):
    """Return sizes in which an unknown one is the Dim that it is."""
    return None if sizes is None else tuple(Dim(value, at) if size is None else size for at, size in enumerate(sizes))


def _broadcast(operands):
    if None in operands:
        return None
    rank = max(map(len, operands))
    columns = zip(*([1] * (rank - len(sizes)) + list(sizes) for sizes in operands), strict=True)
    choices = [{size for size in column if size != 1} for column in columns]
    return tuple((choice or {1}).pop() if len(choice) < 2 else None for choice in choices)


def _quotient(sizes, given):
    """Return what is left of the elements of a value for one axis more than the given ones, None where they do not cancel."""
    left = list(sizes)
    for size in given:
        if isinstance(size, Dim) and size in left:
            left.remove(size)
        elif not isinstance(size, int):
            return None
    number = math.prod(size for size in left if isinstance(size, int))
    divisor = math.prod(size for size in given if isinstance(size, int))
    dims = [size for size in left if isinstance(size, Dim)]
    if len(dims) == 1 and number == divisor:
        return dims[0]
    return number // divisor if not dims and divisor > 0 and number % divisor == 0 else None
