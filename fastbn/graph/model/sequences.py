"""Sequences and optional values of constants: the operators on them hand tensors on, join them or cut them, and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

import numpy as np

from fastbn.graph.model.constant import Tensor, held
from fastbn.graph.model.node import Node

__all__ = ["COPYING", "SEQUENCES", "Items", "given_by"]

# The tensors of a sequence.
Items: TypeAlias = tuple[Tensor, ...]


def given_by(node: Node, inputs: Sequence[Tensor | Items | None]) -> Tensor | Items | None:
    """Return what an operator on sequences of constants gives; None where it does not run, or the inputs are no constants.

    Parameters
    ----------
    node : Node
        One of SEQUENCES.
    inputs : list of Tensor, tuple of Tensor or None
        Constants, and sequences of them; None for an absent input.
    """
    try:
        return SEQUENCES[node.op](node, *inputs)
    except (ValueError, IndexError, TypeError, AttributeError):  # inputs that the operator does not take
        return None


def _construct(node: Node, *items: Tensor) -> Items:
    return items


def _insert(node: Node, items: Items, item: Tensor, position: Tensor | None = None) -> Items:
    at = len(items) if position is None else _place(position, len(items) + 1, len(items))
    return (*items[:at], item, *items[at:])


def _erase(node: Node, items: Items, position: Tensor | None = None) -> Items:
    at = _place(position, len(items), len(items)) if position is not None else len(items) - 1
    return (*items[:at], *items[at + 1 :])


def _at(node: Node, items: Items, position: Tensor) -> Tensor:
    return items[_place(position, len(items), len(items))]


def _length(node: Node, items: Items) -> Tensor:
    return held(np.asarray(len(tuple(items)), np.int64))


def _concat(node: Node, items: Items) -> Tensor:
    axis = node.attribute("axis", 0)
    if len({item.dtype for item in items}) != 1:
        _fail()
    join = np.stack if node.attribute("new_axis", 0) else np.concatenate
    return held(join([item.array() for item in items], axis))


def _split(node: Node, data: Tensor, split: Tensor | None = None) -> Items:
    axis, array = node.attribute("axis", 0), data.array()
    size = array.shape[axis]
    if not size:
        _fail()
    if split is None:
        parts = np.split(array, size, axis)
        return tuple(held(part if node.attribute("keepdims", 1) else part.squeeze(axis)) for part in parts)
    given: list[int] = np.atleast_1d(split.array()).tolist()
    sizes = given if split.shape else [min(given[0], size - at) for at in range(0, size, given[0])]
    if sum(sizes) != size or min(sizes, default=0) < 0:
        _fail()
    return tuple(map(held, np.split(array, np.cumsum(sizes)[:-1], axis)))


def _same(node: Node, value: Tensor | Items) -> Tensor | Items:
    return value


def _has(node: Node, value: Tensor | Items | None = None) -> Tensor:
    return held(np.asarray(value is not None))


def _place(position: Tensor, size: int, length: int) -> int:
    """Return the place that an index means, one from the end where it is negative."""
    at = int(position.array().reshape(()))
    at += length if at < 0 else 0
    if not 0 <= at < size:
        _fail()
    return at


def _fail() -> NoReturn:
    raise ValueError("it does not run")


# Operators that make new tensors.
COPYING = ("ConcatFromSequence", "SplitToSequence")

SEQUENCES: dict[str, Callable[..., Tensor | Items]] = {
    "SequenceEmpty": _construct,
    "SequenceConstruct": _construct,
    "SequenceInsert": _insert,
    "SequenceErase": _erase,
    "SequenceAt": _at,
    "SequenceLength": _length,
    "ConcatFromSequence": _concat,
    "SplitToSequence": _split,
    "Optional": _same,
    "OptionalGetElement": _same,
    "OptionalHasElement": _has,
}
