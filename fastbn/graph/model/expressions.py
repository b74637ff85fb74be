"""Constant expressions: standard operators on constants, evaluated by the runtime that runs the model, within limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from onnx import TensorProto, helper

from fastbn.graph.model.constant import Tensor, held
from fastbn.graph.model.element_types import dtype_of
from fastbn.graph.model.evaluation import Inputs, Key, evaluated, is_numeric, key_of
from fastbn.graph.model.extent import LARGEST_WORK, result_size, steps_of
from fastbn.graph.model.loops import LOOPS, Bodies, Given, LimitError, captured, chosen_branch
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.model.node import Node, Shape, Value, is_complete
from fastbn.graph.model.schemas import RANDOM
from fastbn.graph.model.sequences import COPYING, SEQUENCES, Items, given_by
from fastbn.graph.model.storage import Source, tensor_dtype
from fastbn.graph.ops.registry import operator_row

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["LARGEST_RESULT", "LARGEST_TOTAL", "Constants", "is_expression"]

# The most elements that a constant expression may read, and that it may give; what is larger is no constant.
LARGEST_RESULT = 1 << 24

# The most elements of all results of a model's constant expressions together.
LARGEST_TOTAL = 1 << 26

# What a node gives for inputs of no more bytes than this is kept for the next one like it.
LARGEST_KEPT = 1 << 10

# Operators whose kernels in onnxruntime 1.32 end the process for some constants, or do not end: DFT for an axis that is none,
# TfIdfVectorizer for many skips.
UNSAFE = ("DFT", "TfIdfVectorizer")

# Attribute of a Constant node -> the type of the attribute, the dtype of the constant.
LITERALS: dict[str, tuple[type, type[np.generic]]] = {
    "value_float": (float, np.float32),
    "value_floats": (tuple, np.float32),
    "value_int": (int, np.int64),
    "value_ints": (list, np.int64),
}


def is_expression(node: Node) -> bool:
    """Say whether what a node gives for constants is constant: an operator of ONNX's own without bodies that draws no random numbers."""
    return is_standard(node.domain) and not node.scopes and node.op not in (*RANDOM, *UNSAFE)


class _Call(NamedTuple):
    """A node with its inputs, and what two small calls have in common that give the same; None for a large one."""

    key: Key
    arrays: Inputs
    same: Hashable | None


class Constants:
    """The constants of a model: initializers, Constant nodes, and standard operators on constants.

    Parameters
    ----------
    nodes : iterable of model.Node
        All nodes, in the order of the data flow.
    opset : int
    source : storage.Source
    is_overridable : callable
        Value -> whether a caller may override its initializer.
    kind : callable
        (value, whether shape inference may be asked) -> the type of a value as a number of TensorProto, 0 where it is not known.
    shape : callable
        (value, whether shape inference may be asked) -> the shape that a value always has, as far as it is known.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        opset: int,
        source: Source,
        is_overridable: Callable[[Value], bool],
        kind: Callable[[Value, bool], int],
        shape: Callable[[Value, bool], Shape | None],
    ) -> None:
        self._opset = opset
        self._source = source
        self._is_overridable = is_overridable
        self._kind = kind
        self._shape = shape
        self._tensors: dict[Value | None, Tensor | None] = {}
        self._items: dict[Value | None, Items] = {}
        self._too_large: set[Value | None] = set()
        # (limit, whether shape inference may be asked) -> what is not decided so.
        self._refused: dict[tuple[int, bool], set[Value | None]] = {}
        self._elements_left = LARGEST_TOTAL
        self._keys: dict[tuple[object, ...], Key] = {}
        # What small calls give: a network has the same blocks many times.
        self._result_sizes: dict[Hashable, float | None] = {}
        self._results: dict[Hashable, dict[int, Array] | None] = {}
        self._candidates = _candidates(nodes)
        self._bodies = Bodies(opset, self._given, self._run_in_body)

    def find(self, value: Value | None, largest: int | None = None, infer: bool = False) -> Tensor | None:
        """Return the Tensor that a value always is, or None.

        With `largest`, no expression of more elements is evaluated, neither for the value nor for what it is computed from. With `infer`,
        shape inference is asked for types and shapes that the file does not declare and an expression reads.
        """
        if value in self._tensors:
            return self._tensors[value]
        if value is None or (value.initializer is None and value not in self._candidates):
            return None
        if value.initializer is not None:
            return self._initializer(value)
        effort = LARGEST_RESULT if largest is None else min(largest, LARGEST_RESULT), infer
        refused = self._refused.setdefault(effort, set())
        pending = [value]
        while pending:
            current = pending[-1]
            if self._is_decided(current, refused):
                pending.pop()
                continue
            waiting = [read for read in self._reads(current) if not self._is_decided(read, refused)]
            if waiting:
                pending.extend(waiting)
            else:
                self._decide(current, effort, refused)
        return self._tensors.get(value)

    def _initializer(self, value: Value) -> Tensor | None:
        """Note what a value with an initializer is, and return it."""
        tensor = value.initializer
        assert tensor is not None, "asked before"
        known = None if self._is_overridable(value) else self._tensor(tensor, value.dims, value.name)
        self._tensors[value] = known
        return known

    def known(self, value: Value) -> Tensor | None:
        """Return the Tensor of a value where it has been found already."""
        return self._tensors.get(value)

    def _reads_constants(self, node: Node) -> bool:
        return all(read is None or self.find(read, infer=True) is not None for read in (*node.inputs, *captured(node)))

    def is_sequence(self, value: Value) -> bool:
        """Say whether a value has been found to be a sequence of constants."""
        return value in self._items

    def why_none(self, value: Value) -> str:
        """Return why a value without a Tensor is no constant, as the end of a sentence about it."""
        if self.find(value, infer=True) is None and value in self._too_large:
            return "is too large to be evaluated here"
        seen: set[Value] = set()
        while value in self._candidates and value not in seen and value.initializer is None and value.producer is not None:
            seen.add(value)
            node = value.producer
            missing = [read for read in self._reads(value) if self.find(read, infer=True) is None]
            if not missing and node.op == "Dropout":
                return f"is what Dropout '{node.label}' drops at random"
            if not missing and node.op in LOOPS:
                return f"comes from {node.op} '{node.label}', whose graphs cannot be evaluated here"
            if not missing:
                return f"is constant, but {node.op} '{node.label}' cannot be evaluated here"
            value = missing[0]
        value = self._foreign(value)
        producer = None if value.initializer is not None else value.producer
        if producer is not None and not is_expression(producer) and producer.op not in RANDOM and self._reads_constants(producer):
            what = "which is" if is_standard(producer.domain) else f"an operator of '{producer.domain}', which is"
            return f"comes from {producer.op} '{producer.label}', {what} not evaluated here"
        if self._is_overridable(value):
            return f"is computed from '{value.name}', a graph input too, which a caller may override: --freeze-inputs makes it a constant"
        if value.producer is None and value.initializer is None and not value.is_input:
            return "is a sparse tensor, which is not read here: store it as a dense one"
        return "is a graph input" if value.is_input and value.scope.parent is None else "is computed when the model runs"

    def _foreign(self, value: Value) -> Value:
        """Return what an operator that is not evaluated here gives, where a value is computed from that and from constants alone."""
        at, seen = value, {value}
        while at.initializer is None and at.producer is not None and is_expression(at.producer):
            missing = [read for read in self._reads(at) if self.find(read, infer=True) is None and read not in seen]
            if len(set(missing)) != 1:
                return value
            at = missing[0]
            seen.add(at)
        return at if at.initializer is None and at.producer is not None else value

    def evaluate(self, node: Node, arrays: Inputs, largest: int) -> dict[int, Array] | None:
        """Return slot -> output of a node for these inputs, None where they have more than `largest` elements or it cannot be run."""
        call = self._call(node, arrays)
        size = None if call is None else self._result_size(node, call)
        if call is None or size is None or size > largest or steps_of(node, arrays, size) > LARGEST_WORK:
            return None
        return self._results_of(call)

    def _run_in_body(
        self, node: Node, arrays: Inputs, most_elements: float, most_steps: float
    ) -> tuple[dict[int, Array] | None, float, float]:
        """Return (outputs of a node by slot or None, elements, steps); raises LimitError where these are more than may be."""
        call = self._call(node, arrays) if is_expression(node) else None
        size = None if call is None else self._result_size(node, call)
        if call is None or size is None:
            return None, 0, 0
        steps = steps_of(node, arrays, size)
        if size > most_elements or steps > most_steps:
            raise LimitError
        return self._results_of(call), size, steps

    def _given(self, value: Value) -> Given | None:
        return self.find(value, infer=True) or self._items.get(value)

    def _is_decided(self, value: Value | None, refused: set[Value | None]) -> bool:
        return value is None or value in self._tensors or value in refused or (value.initializer is None and value not in self._candidates)

    def _reads(self, value: Value | None) -> list[Value]:
        """Return the values that have to be decided before a candidate can be."""
        node = None if value is None or value.initializer is not None else value.producer
        if node is None or value is None:
            return []
        if node.is_op("If"):
            return [read for read in (node.input(0), self._chosen(node, value)) if read is not None]
        if node.op in LOOPS:
            return [read for read in (*node.inputs, *captured(node)) if read is not None]
        aspects = operator_row(node).reads
        return [read for slot, read in enumerate(node.inputs) if read is not None and not self._tells(read, aspects.get(slot))]

    def _chosen(self, node: Node, value: Value) -> Value | None:
        """Return what an If hands out as one of its outputs, None while its condition is not known to be constant."""
        scope = chosen_branch(node, self._tensors.get(node.input(0)))
        outputs = () if scope is None else scope.graph.output
        return scope.find(outputs[value.slot].name) if scope is not None and value.slot < len(outputs) else None

    def _tells(self, value: Value, aspect: str | None) -> bool:
        """Say whether what is read of a value, its type or its shape, is known or can be known without its elements."""
        if aspect is None:
            return False
        if value.initializer is None and value not in self._candidates:
            return True
        return bool(self._kind(value, False)) if aspect == "type" else is_complete(self._shape(value, False))

    def _decide(self, value: Value, effort: tuple[int, bool], refused: set[Value | None]) -> None:
        """Note what a value is, once everything is decided that it is computed from."""
        node = value.producer
        if value.initializer is not None:
            self._initializer(value)
        elif node is None:
            self._tensors[value] = None
        elif node.op == "Constant":
            self._tensors[value] = self._constant_node(node)
        elif node.op == "Identity" and node.input(0) not in refused:
            self._tensors[value] = self._tensors.get(node.input(0))
            self._too_large.update([value] if node.input(0) in self._too_large else ())
        elif any(read in refused for read in self._reads(value)):
            refused.update(node.outputs)
        elif node.op == "If":
            self._tensors[value] = self._tensors.get(self._chosen(node, value))
        elif node.op in LOOPS:
            self._loop(node, effort[0], refused)
        elif node.op in SEQUENCES:
            self._sequence(node, value, effort[0], refused)
        elif node.op in ("Shape", "Size"):
            self._read_shape(node, value, effort[1], refused)
        else:
            self._expression(node, *effort, refused)

    def _tensor(self, tensor: TensorProto, dims: tuple[int, ...], where: str) -> Tensor:
        return Tensor(tensor_dtype(tensor, where), dims, partial(self._source.array, tensor))

    def _constant_node(self, node: Node) -> Tensor | None:
        if len(node.proto.attribute) != 1:
            return None
        name = node.proto.attribute[0].name
        if name == "value":
            tensor = node.attribute(name, TensorProto())
            return self._tensor(tensor, tuple(tensor.dims), node.label)
        if name not in LITERALS:
            return None
        kind, dtype = LITERALS[name]
        return held(np.asarray(node.find_attribute(name, kind), dtype))

    def _read_shape(self, node: Node, value: Value, infer: bool, refused: set[Value | None]) -> None:
        data = node.required_input(0)
        known = self._tensors.get(data)
        shape = self._shape(data, infer) if known is None else known.shape
        if not is_complete(shape):
            self._leave(node, infer, refused)
        elif node.op == "Size":
            self._tensors[value] = held(np.asarray(math.prod(shape), np.int64))
        else:
            chosen = shape[node.attribute("start", 0) : node.attribute("end", len(shape))]
            self._tensors[value] = held(np.asarray(chosen, np.int64))

    def _leave(self, node: Node, infer: bool, refused: set[Value | None]) -> None:
        """Note that a node reads a type or a shape that is not known, or not without shape inference."""
        outputs = [value for value in node.outputs if value is not None]
        if infer:
            self._tensors.update(dict.fromkeys(outputs))
        else:
            refused.update(outputs)

    def _expression(self, node: Node, limit: int, infer: bool, refused: set[Value | None]) -> None:
        """Evaluate a node for all its outputs, or note that it is beyond the limits."""
        outputs = [value for value in node.outputs if value is not None]
        aspects = operator_row(node).reads
        inputs = [None if value is None or slot in aspects else self._tensors.get(value) for slot, value in enumerate(node.inputs)]
        read = [value for slot, value in enumerate(node.inputs) if slot not in aspects]
        if any(value is not None and self._tensors.get(value) is None for value in read):
            self._tensors.update(dict.fromkeys(outputs))
            self._too_large.update(outputs if any(value in self._too_large for value in read) else ())
            return
        given = [tensor for tensor in inputs if tensor is not None]
        if sum(tensor.size for tensor in given) > limit:
            self._refuse(outputs, limit, refused)
            return
        if not all(is_numeric(tensor.dtype) for tensor in given):
            self._tensors.update(dict.fromkeys(outputs))
            return
        arrays: list[Array | None] = [None if tensor is None else tensor.array() for tensor in inputs]
        for slot, aspect in aspects.items():
            if (described := node.input(slot)) is not None:
                arrays[slot] = self._stand_in(described, aspect, limit, infer)
                if arrays[slot] is None:
                    self._leave(node, infer, refused)
                    return
        call = self._call(node, arrays)
        size = None if call is None else self._result_size(node, call)
        if size is not None and (size > min(limit, self._elements_left) or steps_of(node, arrays, size) > LARGEST_WORK):
            self._refuse(outputs, limit, refused)
            return
        results = None if call is None or size is None else self._results_of(call)
        for value in outputs:
            tensor = self._tensors[value] = None if results is None else held(results[value.slot])
            self._elements_left -= 0 if tensor is None else tensor.size

    def _sequence(self, node: Node, value: Value, limit: int, refused: set[Value | None]) -> None:
        """Note what an operator on sequences gives."""
        inputs = [self._items.get(read, self._tensors.get(read)) for read in node.inputs]
        is_known = not any(read is not None and given is None for read, given in zip(node.inputs, inputs, strict=True))
        tensors = (tensor for given in inputs if given is not None for tensor in (given if isinstance(given, tuple) else (given,)))
        size = sum(tensor.size for tensor in tensors) if node.op in COPYING else 0
        if size > min(limit, self._elements_left):
            self._refuse([value], limit, refused)
            return
        found = given_by(node, inputs) if is_known else None
        self._tensors[value] = None if isinstance(found, tuple) else found
        if isinstance(found, tuple):
            self._items[value] = found
        self._elements_left -= size
        self._too_large.update([value] if any(read in self._too_large for read in node.inputs) else ())

    def _loop(self, node: Node, limit: int, refused: set[Value | None]) -> None:
        """Note what a node with a body gives that is run more than once."""
        outputs = [value for value in node.outputs if value is not None]
        if limit < LARGEST_RESULT:  # its cost is not known before
            refused.update(outputs)
            return
        inputs = [None if value is None else self._items.get(value, self._tensors.get(value)) for value in node.inputs]
        is_known = not any(value is not None and given is None for value, given in zip(node.inputs, inputs, strict=True))
        self._tensors.update(dict.fromkeys(outputs))
        try:
            results = self._bodies.outputs(node, inputs) if is_known else None
        except LimitError:
            self._too_large.update(outputs)
            return
        for value, given in zip(node.outputs, results or (), strict=False):
            if value is not None and isinstance(given, tuple):
                self._items[value] = given
            elif value is not None and not isinstance(given, tuple):
                self._tensors[value] = given

    def _refuse(self, outputs: list[Value], limit: int, refused: set[Value | None]) -> None:
        if limit < LARGEST_RESULT:
            refused.update(outputs)
        else:
            self._too_large.update(outputs)
            self._tensors.update(dict.fromkeys(outputs))

    def _stand_in(self, value: Value, aspect: str, largest: int, infer: bool) -> Array | None:
        """Return an array of zeros with the type of a value, and with its shape where that is read; None where they are not known."""
        known = self._tensors.get(value)
        kind = self._kind(value, infer) if known is None else helper.np_dtype_to_tensor_dtype(known.dtype)
        shape = (1,) if aspect == "type" else self._shape(value, infer) if known is None else known.shape
        if not kind or not is_complete(shape) or math.prod(shape) > largest:
            return None
        try:
            return np.zeros(shape, dtype_of(kind))
        except KeyError:  # a number that is no type
            return None

    def _call(self, node: Node, arrays: Inputs) -> _Call | None:
        """Return a node with its inputs, None where the runtime does not know the type of one."""
        types = node, *(None if array is None else array.dtype for array in arrays)
        if types not in self._keys:
            try:
                self._keys[types] = key_of(node, arrays)
            except (KeyError, ValueError):
                return None
        key = self._keys[types]
        if sum(array.nbytes for array in arrays if array is not None) > LARGEST_KEPT:
            return _Call(key, arrays, None)
        return _Call(key, arrays, (key, *(None if array is None else (array.shape, array.tobytes()) for array in arrays)))

    def _result_size(self, node: Node, call: _Call) -> float | None:
        """Return how many elements a call gives, None where it cannot run or only a run would tell."""
        if call.same is None:
            return result_size(node, call.arrays, call.key, self._opset)
        if call.same not in self._result_sizes:
            self._result_sizes[call.same] = result_size(node, call.arrays, call.key, self._opset)
        return self._result_sizes[call.same]

    def _results_of(self, call: _Call) -> dict[int, Array] | None:
        """Return slot -> output of a call, None where the runtime cannot run it."""
        if call.same is None:
            return evaluated(call.key, call.arrays, self._opset)
        if call.same not in self._results:
            results = self._results[call.same] = evaluated(call.key, call.arrays, self._opset)
            for array in (results or {}).values():
                array.flags.writeable = False  # other nodes get the same one
        return self._results[call.same]


def _candidates(nodes: Iterable[Node]) -> set[Value]:
    """Return the values that constant nodes and expressions over constants give: one pass in the order of the data flow."""
    candidates: set[Value] = set()
    for node in nodes:
        if not is_expression(node) and not node.is_op("If", *LOOPS):
            continue
        aspects = operator_row(node).reads
        read = [value for slot, value in enumerate(node.inputs) if value is not None and slot not in aspects]
        read += captured(node) if node.op in LOOPS else []
        if node.op in ("Constant", "SequenceEmpty") or (
            any(node.inputs) and all(value in candidates or value.initializer is not None for value in read)
        ):
            candidates.update(value for value in node.outputs if value is not None)
    return candidates
