"""Constant expressions: standard operators on constants, evaluated by the runtime that runs the model, within limits."""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial

import numpy as np
import onnx
from onnx import TensorProto, helper

from fastbn.errors import FastbnError, ModelError, expected
from fastbn.graph.model.constant import Tensor
from fastbn.graph.model.storage import Source, tensor_dtype
from fastbn.graph.runtime import session

__all__ = ["LARGEST_RESULT", "LARGEST_TOTAL", "Constants", "is_expression"]

# Elements of what a constant expression may read and give; anything larger is left to the runtime.
LARGEST_RESULT = 1 << 24

# Elements of all results of a model's constant expressions together.
LARGEST_TOTAL = 1 << 26

# Up to this many bytes of inputs, the session of an operator is kept for the next node like it.
KEPT_SESSION = 1 << 20

# Standard operators whose result on constants is a constant: deterministic, without bodies. Each kind tells how large the result is.
# fmt: off
ELEMENTWISE = frozenset([
    "Abs", "Acos", "Add", "And", "Asin", "Atan", "Cast", "CastLike", "Ceil", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Floor",
    "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow",
    "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "Where", "Xor",
])
NO_LARGER = frozenset([
    "Flatten", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Reshape",
    "Size", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
])
# fmt: on
LARGER = frozenset(["Concat", "ConstantOfShape", "Expand", "Gather", "Range", "Tile"])

# Attribute of a Constant node -> a value of its type, the dtype of the constant.
LITERALS = {"value_float": (0.0, np.float32), "value_floats": ((), np.float32), "value_int": (0, np.int64), "value_ints": ([], np.int64)}

# Old enough for every opset, and new enough for every operator.
OLDEST_IR = 8


def is_expression(op: str) -> bool:
    """Say whether the result of a standard operator on constants is a constant."""
    return op in ELEMENTWISE or op in NO_LARGER or op in LARGER


class Constants:
    """The constants of a model: initializers, Constant nodes, and standard operators on constants.

    Parameters
    ----------
    nodes : list of model.Node
        All nodes, in the order of the data flow.
    opset : int
    source : storage.Source
    is_overridable : callable
        Value -> whether a caller may override its initializer.
    declared : callable
        Value -> the shape that the file itself declares, or None.
    """

    def __init__(
        self, nodes: Iterable, opset: int, source: Source, is_overridable: Callable[..., bool], declared: Callable[..., tuple | None]
    ) -> None:
        self._opset = opset
        self._source = source
        self._is_overridable = is_overridable
        self._declared = declared
        self._found: dict = {}
        self._too_large: set = set()
        self._refused: dict[int, set] = {}
        self._left = LARGEST_TOTAL
        self._written: dict = {}
        self._candidates = _candidates(nodes)

    def find(self, value: object, largest: int | None = None) -> Tensor | None:
        """Return the Tensor that a value always is, or None; with `largest`, expressions of more elements on the way are not evaluated."""
        limit = LARGEST_RESULT if largest is None else min(largest, LARGEST_RESULT)
        refused = self._refused.setdefault(limit, set())
        pending = [value]
        while pending:
            current = pending[-1]
            if self._is_settled(current, refused):
                pending.pop()
                continue
            waiting = [read for read in _reads(current) if not self._is_settled(read, refused)]
            if waiting:
                pending.extend(waiting)
            else:
                self._settle(current, limit, refused)
        return self._found.get(value)

    def known(self, value: object) -> Tensor | None:
        """Return the Tensor of a value where it has been found already."""
        return self._found.get(value)

    def is_too_large(self, value: object) -> bool:
        """Say whether a value is a constant but for the limits on its size."""
        return self.find(value) is None and value in self._too_large

    def evaluate(self, node: object, arrays: list, largest: int) -> list | None:
        """Return what a node gives for these arrays, None where they are more than `largest` elements or it cannot be run."""
        size = _result_size(node, arrays)
        return None if size is None or size > largest else _run(node, arrays, self._opset, self._written)

    def _is_settled(self, value: object, refused: set) -> bool:
        return value is None or value in self._found or value in refused or (value.initializer is None and value not in self._candidates)

    def _settle(self, value: object, limit: int, refused: set) -> None:
        if value.initializer is not None:
            self._found[value] = None if self._is_overridable(value) else self._tensor(value.initializer, value.name)
            return
        node = value.producer
        if node.op in ("Identity", "Shape") and node.input(0) in refused:
            refused.add(value)
        elif node.op == "Identity":
            self._found[value] = self._found.get(node.input(0))
            self._too_large.update([value] if node.input(0) in self._too_large else ())
        elif node.op == "Constant":
            self._found[value] = self._constant_node(node)
        elif node.op == "Shape":
            self._found[value] = self._shape(node)
        else:
            self._expression(node, limit, refused)

    def _tensor(self, tensor: TensorProto, where: str) -> Tensor:
        return Tensor(tensor_dtype(tensor, where), tuple(tensor.dims), lambda: self._source.array(tensor))

    def _constant_node(self, node: object) -> Tensor | None:
        if len(node.proto.attribute) != 1:
            return None
        name = node.proto.attribute[0].name
        if name == "value":
            return self._tensor(node.attribute(name, TensorProto()), node.label)
        if name not in LITERALS:
            return None
        default, dtype = LITERALS[name]
        return _literal(np.asarray(node.attribute(name, default), dtype))

    def _shape(self, node: object) -> Tensor | None:
        read = node.input(0)
        known = self._found.get(read)
        shape = self._declared(read) if known is None and read is not None else known and known.shape
        if shape is None or None in shape:
            return None
        return _literal(np.asarray(shape[node.attribute("start", 0) : node.attribute("end", len(shape))], np.int64))

    def _expression(self, node: object, limit: int, refused: set) -> None:
        """Evaluate a node for all its outputs, or note that it is beyond the limits."""
        outputs = [value for value in node.outputs if value is not None]
        if any(value in refused for value in node.inputs):
            refused.update(outputs)
            return
        inputs = [self._found.get(value) for value in node.inputs]
        if any(found is None and value is not None for value, found in zip(node.inputs, inputs, strict=True)):
            self._found.update(dict.fromkeys(outputs))
            self._too_large.update(outputs if any(value in self._too_large for value in node.inputs) else ())
            return
        size, arrays = math.inf, []
        if sum(found.size for found in inputs if found is not None) <= limit:
            arrays = [None if found is None else found.array() for found in inputs]
            size = _result_size(node, arrays)
        if size is not None and size > min(limit, self._left):
            (refused if limit < LARGEST_RESULT else self._too_large).update(outputs)
            self._found.update(dict.fromkeys(outputs) if limit >= LARGEST_RESULT else {})
            return
        results = None if size is None else _run(node, arrays, self._opset, self._written)
        self._found.update(dict.fromkeys(outputs))
        for value in outputs if results is not None else ():
            self._found[value] = _literal(results[value.slot])
            self._left -= self._found[value].size


def _candidates(nodes: Iterable) -> set:
    """Return the values that constant nodes and expressions over constants give: one pass in the order of the data flow."""
    found: set = set()
    for node in nodes:
        if node.domain not in ("", "ai.onnx"):
            continue
        reads = all(value is None or value in found or value.initializer is not None for value in node.inputs)
        if node.op in ("Constant", "Shape") or (reads and any(node.inputs) and (is_expression(node.op) or node.is_op("Identity"))):
            found.update(value for value in node.outputs if value is not None)
    return found


def _reads(value: object) -> list:
    """Return the values that have to be known before a candidate can be."""
    if value.producer is None or value.initializer is not None:
        return []
    return [read for read in value.producer.inputs if read is not None]


def _literal(array: np.ndarray) -> Tensor:
    array = np.asarray(array, order="C")  # ascontiguousarray would make a vector of a scalar
    return Tensor(array.dtype, array.shape, lambda: array)


def _result_size(node: object, arrays: list) -> float | None:
    """Return how many elements a node gives in all, math.inf where it is sure to be too many, None where it cannot run."""
    given = [array for array in arrays if array is not None]
    if not given or not all(map(_is_numeric, given)):
        return None
    try:
        if node.op in ("Cast", "CastLike", "Clip") or node.op in NO_LARGER:
            return given[0].size
        if node.op in ELEMENTWISE:
            return None if _traps(node, given) else math.prod(np.broadcast_shapes(*(array.shape for array in given)))
        return _LARGER[node.op](node, *given)
    except (ValueError, IndexError, TypeError, OverflowError):
        return None


def _traps(node: object, arrays: list) -> bool:
    """Say whether an integer division has no result: some processors stop the process there."""
    divides = node.op in ("Div", "Mod") and len(arrays) == 2 and arrays[1].dtype.kind in "iu"
    return divides and bool((arrays[1] == 0).any() or ((arrays[1] == -1).any() and (arrays[0] == np.iinfo(arrays[0].dtype).min).any()))


def _gathered(node: object, data: np.ndarray, indices: np.ndarray) -> int:
    axis = node.attribute("axis", 0)
    return data.size // max(data.shape[axis], 1) * indices.size


def _steps(node: object, start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> float:
    return max(0, math.ceil((limit.item() - start.item()) / delta.item())) if delta.item() else math.inf


def _sizes(array: np.ndarray) -> list:
    """Return the elements of a list of sizes; more of them than an array has axes are none."""
    sizes = array.reshape(-1).tolist()
    if len(sizes) > 64 or any(size < 0 for size in sizes):
        raise ValueError
    return sizes


def _expanded(node: object, data: np.ndarray, sizes: np.ndarray) -> int:
    # Not by np.broadcast_shapes, which takes no sizes beyond the address space.
    wanted, shape = _sizes(sizes), list(data.shape)
    rank = max(len(wanted), len(shape))
    columns = zip([1] * (rank - len(wanted)) + wanted, [1] * (rank - len(shape)) + shape, strict=True)
    return math.prod(wide if narrow == 1 else narrow for wide, narrow in columns)


# Operator -> how many elements it gives.
_LARGER: dict[str, Callable[..., float]] = {
    "Concat": lambda node, *arrays: sum(array.size for array in arrays),
    "ConstantOfShape": lambda node, sizes: math.prod(_sizes(sizes)),
    "Expand": _expanded,
    "Gather": _gathered,
    "Range": _steps,
    "Tile": lambda node, data, *repeats: data.size * math.prod(_sizes(repeats[0])),
}


def _run(node: object, arrays: list, opset: int, written: dict) -> list | None:
    """Return the arrays that a standard operator gives for these inputs, None for an absent one; None where the runtime cannot run it.

    written remembers how the node is written for inputs of these types.
    """
    try:
        key = node, *(None if array is None else array.dtype for array in arrays)
        if key not in written:
            written[key] = _written(node, arrays)
        feeds = {f"i{slot}": _widened(array) for slot, array in enumerate(arrays) if array is not None}
        large = sum(array.nbytes for array in feeds.values()) > KEPT_SESSION
        run, narrow = (_operator.__wrapped__ if large else _operator)(*written[key], opset)
        results = [np.asarray(result) for result in run(feeds)]
    except Exception:  # the runtime raises many kinds; a node that it cannot run is simply no constant
        return None
    results = [result if dtype is None else result.astype(dtype) for result, dtype in zip(results, narrow, strict=True)]
    return results if all(_is_numeric(result) for result in results) else None


def _written(node: object, arrays: list) -> tuple[bytes, tuple]:
    """Return (node with inputs i0, i1, ... and outputs o0, o1, ..., types of the inputs): nodes that do the same are written alike."""
    kinds = tuple(None if array is None else helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays)
    proto = onnx.NodeProto(op_type=node.op, attribute=node.proto.attribute)
    proto.input.extend("" if kind is None else f"i{slot}" for slot, kind in enumerate(kinds))
    proto.output.extend(f"o{slot}" for slot in range(len(node.outputs)))
    return proto.SerializeToString(deterministic=True), kinds


def _is_numeric(array: np.ndarray) -> bool:
    return array.dtype.kind in "biuf" or _is_bfloat16(array)


def _is_bfloat16(array: np.ndarray) -> bool:
    return array.dtype.kind == "V" and array.dtype.name == "bfloat16"


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if _is_bfloat16(array) else array


@lru_cache(maxsize=256)
def _operator(node: bytes, kinds: tuple, opset: int) -> tuple[Callable[[dict], list], list]:
    """Return (feeds -> outputs, for each output the dtype to narrow it to or None): a session takes longer to make than to run."""
    proto = onnx.NodeProto.FromString(node)
    nodes, inputs, outputs = [], [], list(proto.output)
    for slot, kind in enumerate(kinds):
        if kind is not None:
            inputs.append(helper.make_tensor_value_info(f"i{slot}", TensorProto.FLOAT if kind == TensorProto.BFLOAT16 else kind, None))
        if kind == TensorProto.BFLOAT16:
            nodes.append(helper.make_node("Cast", [f"i{slot}"], [f"n{slot}"], to=kind))
            proto.input[slot] = f"n{slot}"
    nodes.append(proto)
    model = _model(nodes, inputs, outputs, opset)
    try:
        made = session(model.SerializeToString(), threads=1)
    except FastbnError:  # onnxruntime is not installed
        return _reference(proto, model), [None] * len(outputs)
    # NumPy has no bfloat16 of its own: it travels as float32, which holds every value of it.
    short = [info.type == "tensor(bfloat16)" for info in made.get_outputs()]
    if any(short):
        for at in np.flatnonzero(short):
            nodes.append(helper.make_node("Cast", [outputs[at]], [f"w{at}"], to=TensorProto.FLOAT))
            outputs[at] = f"w{at}"
        made = session(_model(nodes, inputs, outputs, opset).SerializeToString(), threads=1)
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    return partial(made.run, None), [dtype if is_short else None for is_short in short]


def _model(nodes: list, inputs: list, outputs: list, opset: int) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "constant", inputs, [onnx.ValueInfoProto(name=name) for name in outputs])
    return helper.make_model(graph, ir_version=OLDEST_IR, opset_imports=[helper.make_opsetid("", opset)])


def _reference(proto: onnx.NodeProto, model: onnx.ModelProto) -> Callable[[dict], list]:
    """Return what onnx's own evaluator makes of a node; where it is known to be wrong there is none."""
    from onnx.reference import ReferenceEvaluator

    axes = next((list(attribute.ints) for attribute in proto.attribute if attribute.name == "axes"), [])
    if proto.op_type in ("Squeeze", "Unsqueeze") and len(axes) > 1 and (min(axes) < 0 or axes != sorted(axes)):
        raise ModelError(expected("axes in order, from the front", str(axes), proto.op_type))
    evaluator = ReferenceEvaluator(model)

    def run(feeds: dict) -> list:
        with np.errstate(all="ignore"):
            return evaluator.run(None, feeds)

    return run
