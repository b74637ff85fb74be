"""Loop, Scan and SequenceMap on constants: their bodies run node by node, as often as they say and within a limit for the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastbn.graph.model.constant import Tensor, held
from fastbn.graph.model.nesting import bodies_in, is_standard
from fastbn.graph.model.node import Node, Scope, Value
from fastbn.graph.model.schemas import RANDOM
from fastbn.graph.model.sequences import COPYING, SEQUENCES, Items, given_by

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["LOOPS", "MOST_NODES", "Bodies", "Given", "LimitError", "captured", "chosen_branch"]

# The most nodes that are run in all bodies of a model, each as often as it is run.
MOST_NODES = 1 << 13

# The most elements that bodies give in all, and the most steps that they take (extent.py): those of one operator alone.
MOST_ELEMENTS, MOST_STEPS = 1 << 24, 1 << 31

# From this opset on, a Scan has no batches.
FIRST_PLAIN_SCAN = 9

# What a value is: a constant, or a sequence of constants.
Given: TypeAlias = "Tensor | Items"

# (node, its inputs, the most elements, the most steps) -> (its outputs by slot, or None for no constant, elements, steps); LimitError.
Evaluate: TypeAlias = "Callable[[Node, Sequence[Array | None], float, float], tuple[dict[int, Array] | None, float, float]]"


class LimitError(Exception):
    """A body would take more than it may."""


class _NoConstantError(Exception):
    """What a body gives is no constant."""


def captured(node: Node) -> list[Value]:
    """Return what the bodies of a node read of the graphs around it."""
    inside: set[Scope] = set()
    pending, found = list(node.scopes), dict[Value, None]()
    for scope in pending:
        inside.add(scope)
        pending.extend(inner for each in scope.nodes for inner in each.scopes)
    for scope in pending:
        results = [scope.find(info.name) for info in scope.graph.output]
        read = [value for each in scope.nodes for value in each.inputs]
        found.update((value, None) for value in (*read, *results) if value is not None and value.scope not in inside)
    return [*found]


def chosen_branch(node: Node, condition: Tensor | None) -> Scope | None:
    """Return the branch that an If takes, None while its condition is not known."""
    if condition is None or condition.size != 1:
        return None
    scopes = dict(zip((each.name for each in node.proto.attribute for _ in bodies_in([each])), node.scopes, strict=True))
    return scopes.get("then_branch" if condition.array().any() else "else_branch")


@dataclass
class Bodies:
    """Runs the bodies of nodes whose inputs are constants.

    Parameters
    ----------
    opset : int
    find : callable
        Value -> what it always is, None for no constant.
    evaluate : callable
        Runs one node of a body.
    nodes_left, elements_left, steps_left : float
        What may yet be run.
    """

    opset: int
    find: Callable[[Value], Given | None]
    evaluate: Evaluate
    nodes_left: int = MOST_NODES
    elements_left: float = MOST_ELEMENTS
    steps_left: float = MOST_STEPS

    def outputs(self, node: Node, inputs: Sequence[Given | None]) -> list[Given] | None:
        """Return what a node of LOOPS gives, None where that is no constant.

        Raises
        ------
        LimitError
            It would take too much.
        """
        try:
            return self._given(node, inputs, {})
        except (_NoConstantError, ValueError, IndexError, TypeError, AttributeError, KeyError):  # inputs that the operator does not take
            return None

    def _given(self, node: Node, inputs: Sequence[Given | None], known: dict[Value, Given]) -> list[Given]:
        """Return the outputs of a node with bodies."""
        if node.op == "If":
            condition = inputs[0]
            scope = chosen_branch(node, condition if isinstance(condition, Tensor) else None)
            if scope is None:
                raise _NoConstantError
            return self._run(scope, [], known)
        return LOOPS[node.op](self, node, inputs, known)

    def _run(self, scope: Scope, inputs: Sequence[Given], known: dict[Value, Given]) -> list[Given]:
        """Return what a body gives for its inputs; `known` is what the values of it, and of bodies around it, are now."""
        known.update((scope.values[info.name], given) for info, given in zip(scope.graph.input, inputs, strict=True))
        for node in scope.ordered:
            self._node(node, known)
        return [self._of(scope.find(info.name), known) for info in scope.graph.output]

    def _of(self, value: Value | None, known: dict[Value, Given]) -> Given:
        given = None if value is None else known[value] if value in known else self.find(value)
        if given is None:
            raise _NoConstantError
        return given

    def _node(self, node: Node, known: dict[Value, Given]) -> None:
        """Note what a node of a body gives."""
        outputs = [value for value in node.outputs if value is not None]
        if not any(value in known for value in (*node.inputs, *captured(node))) and all(self.find(value) is not None for value in outputs):
            return  # the same in each turn
        self.nodes_left -= 1
        if self.nodes_left < 0:
            raise LimitError
        if not is_standard(node.domain) or node.op in RANDOM:
            raise _NoConstantError
        inputs = [None if value is None else self._of(value, known) for value in node.inputs]
        if node.scopes:
            results: dict[int, Given] = dict(enumerate(self._given(node, inputs, known)))
        elif node.op in SEQUENCES:
            results = {0: self._of_sequences(node, inputs)}
        else:
            results = self._of_tensors(node, inputs)
        known.update((value, results[value.slot]) for value in outputs)

    def _of_sequences(self, node: Node, inputs: Sequence[Given | None]) -> Given:
        tensors = [tensor for given in inputs if given is not None for tensor in (given if isinstance(given, tuple) else (given,))]
        if node.op in COPYING:
            self._spend(sum(tensor.size for tensor in tensors), 0)
        found = given_by(node, inputs)
        if found is None:
            raise _NoConstantError
        return found

    def _of_tensors(self, node: Node, inputs: Sequence[Given | None]) -> dict[int, Given]:
        arrays = [None if given is None else _array(given) for given in inputs]
        results, elements, steps = self.evaluate(node, arrays, self.elements_left, self.steps_left)
        if results is None:
            raise _NoConstantError
        self._spend(elements, steps)
        return {slot: held(array) for slot, array in results.items()}

    def _spend(self, elements: float, steps: float) -> None:
        self.elements_left -= elements
        self.steps_left -= steps
        if min(self.elements_left, self.steps_left) < 0:
            raise LimitError

    # Loop:  (turns, goes on, carried...) -> (carried..., what each turn gives, stacked)
    def _loop(self, node: Node, inputs: Sequence[Given | None], known: dict[Value, Given]) -> list[Given]:
        (scope,) = node.scopes
        turns = None if inputs[0] is None else int(_array(inputs[0]).reshape(()))
        goes_on = inputs[1] is None or bool(_array(inputs[1]).reshape(()))
        carried = [_there(given) for given in inputs[2:]]
        stacked: list[list[Array]] = [[] for _ in range(len(scope.graph.output) - 1 - len(carried))]
        turn = 0
        while goes_on and (turns is None or turn < turns):
            own = [_scalar(scope, 0, np.int64(turn)), _scalar(scope, 1, np.bool_(True)), *carried]
            condition, *given = self._run(scope, own, known)
            goes_on = bool(_array(condition).reshape(()))
            carried = given[: len(carried)]
            for listed, each in zip(stacked, given[len(carried) :], strict=True):
                listed.append(_array(each))
            turn += 1
        return [*carried, *(self._stacked(listed, 0) for listed in stacked)]

    # Scan:  (state..., sequences...) -> (state..., what each turn gives, stacked): a turn for each place along an axis of the sequences
    def _scan(self, node: Node, inputs: Sequence[Given | None], known: dict[Value, Given]) -> list[Given]:
        if self.opset < FIRST_PLAIN_SCAN:
            raise _NoConstantError
        (scope,) = node.scopes
        count = node.attribute("num_scan_inputs", 0)
        state, scanned = [_there(given) for given in inputs[:-count]], [_array(_there(given)) for given in inputs[-count:]]
        results = len(scope.graph.output) - len(state)
        axes, directions, out_axes, out_directions = (
            node.attribute(name, list[int]()) or [0] * length
            for name, length in (
                ("scan_input_axes", count),
                ("scan_input_directions", count),
                ("scan_output_axes", results),
                ("scan_output_directions", results),
            )
        )
        moved = [np.moveaxis(array, axis, 0) for array, axis in zip(scanned, axes, strict=True)]
        moved = [array[::-1] if backward else array for array, backward in zip(moved, directions, strict=True)]
        (turns,) = {len(array) for array in moved}
        stacked: list[list[Array]] = [[] for _ in range(results)]
        for turn in range(turns):
            given = self._run(scope, [*state, *(held(array[turn]) for array in moved)], known)
            state = given[: len(state)]
            for listed, each in zip(stacked, given[len(state) :], strict=True):
                listed.append(_array(each))
        ordered = [listed[::-1] if backward else listed for listed, backward in zip(stacked, out_directions, strict=True)]
        return [*state, *(self._stacked(listed, axis) for listed, axis in zip(ordered, out_axes, strict=True))]

    # SequenceMap:  (sequence, others...) -> sequences: a turn for each element of the first, with those of other sequences beside it
    def _map(self, node: Node, inputs: Sequence[Given | None], known: dict[Value, Given]) -> list[Given]:
        (scope,) = node.scopes
        first, *others = (_there(given) for given in inputs)
        if isinstance(first, Tensor):
            raise _NoConstantError
        turns = [
            self._run(scope, [each, *(other[at] if isinstance(other, tuple) else other for other in others)], known)
            for at, each in enumerate(first)
        ]
        return [tuple(map(_tensor, column)) for column in zip(*turns, strict=True)] if turns else [()] * len(scope.graph.output)

    def _stacked(self, arrays: Sequence[Array], axis: int) -> Tensor:
        """Return arrays as one along a new axis; of none, only the body's types would tell what that is."""
        if len({(array.dtype, array.shape) for array in arrays}) != 1:
            raise _NoConstantError
        self._spend(sum(array.size for array in arrays), 0)
        return held(np.stack(arrays, axis))


LOOPS: dict[str, Callable[[Bodies, Node, Sequence[Given | None], dict[Value, Given]], list[Given]]] = {
    "Loop": Bodies._loop,
    "Scan": Bodies._scan,
    "SequenceMap": Bodies._map,
}


def _there(given: Given | None) -> Given:
    if given is None:
        raise _NoConstantError
    return given


def _tensor(given: Given) -> Tensor:
    if not isinstance(given, Tensor):
        raise _NoConstantError
    return given


def _array(given: Given) -> Array:
    return _tensor(given).array()


def _scalar(scope: Scope, slot: int, number: np.generic) -> Tensor:
    """Return a number as the input of a body at a slot: of the rank that the body declares."""
    rank = len(scope.graph.input[slot].type.tensor_type.shape.dim)
    return held(np.asarray(number).reshape((1,) * rank))
