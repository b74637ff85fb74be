"""Folded constants that the model's type cannot hold: Inf, NaN, and weights and factors that round to zero where that matters.

An output channel sums W[k] x[k] and b. Let X be the largest input, d the sum of the sizes of the weights that become zero and, in float16,
of what others lose below its least normal number v, A the largest weight and u the unit roundoff. Nothing that a run could tell from
rounding is lost where

    d X <= u max(A X, |b|, v)

What multiplies each element alone (in a Mul, in a normalization) is a sum of one weight. Derivation: docs/numerics.md, "Weights that become
zero".
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastbn.dtypes import LEAST_NORMAL, UNIT
from fastbn.graph.model.constant import Constant, Dense, Scaled, float64_of
from fastbn.graph.model.node import Node
from fastbn.graph.ops.affine import FloatArray
from fastbn.graph.ops.registry import row_of
from fastbn.graph.ops.row import Row
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal, first_few

__all__ = ["flushed_channels", "flushed_factors", "refuse_unrepresentable"]

# X: float16 ends there.
LARGEST_INPUT = 2.0**16


def refuse_unrepresentable(plan: Plan, view: GraphView) -> None:
    """Refuse a plan with a constant that would hold Inf or NaN, or a weight or factor that becomes zero where that matters."""
    for (node, slot), constant in plan.constants.items():
        nonfinite, flushed = constant.check()
        where = f"input {slot} of {node.op} '{node.label}'"
        if nonfinite:
            if isinstance(constant, Scaled) and not np.isfinite(constant.base.array()).all():
                raise Refusal("bad-parameters", f"{where} holds Inf or NaN already")
            channels = first_few(constant.bad_channels())
            raise Refusal("overflow", f"{nonfinite} values of {where} would become Inf or NaN in {constant.dtype}, channels {channels}")
        if flushed or isinstance(constant, Dense) or constant.dtype == np.float16:
            count, channels_of_zeros = _flushed(node, slot, constant, plan, view)
            if count:
                some = first_few(channels_of_zeros)
                lost = "become zero or lose digits" if constant.dtype == np.float16 else "become zero"
                raise Refusal("flush-to-zero", f"{count} values of {where} would {lost} in {constant.dtype}, channels {some}")


def _flushed(node: Node, slot: int, constant: Constant, plan: Plan, view: GraphView) -> tuple[int, list[int]]:
    """Return (how many weights or factors matter that become zero, the output channels or flat indices that hold them)."""
    row = row_of(node, view)
    reach = None if row.factor_reach is None else row.factor_reach(node, slot, view)
    if reach is not None:
        return flushed_factors(constant, reach, _hiding(node, row, plan, view))
    weight_matrix = row.weight_matrix
    if weight_matrix is None or weight_matrix(node, slot, constant.array()) is None:
        return 0, []

    def matrix(values: NDArray[np.generic]) -> NDArray[np.generic]:
        rows = weight_matrix(node, slot, values)
        assert rows is not None, "asked before"
        return rows

    size = np.asarray(_hiding(node, row, plan, view))
    return flushed_channels(constant, matrix, size.min(axis=0) if size.ndim == 2 else size)


def _hiding(node: Node, row: Row, plan: Plan, view: GraphView) -> FloatArray | float:
    """Return |b|, the size of what a node adds to its products; 0.0 where it adds no constant."""
    behind = next((nodes[1] for nodes in plan.replaced.values() if nodes[0] is node and len(nodes) > 1), None)
    if behind is not None:  # the Add behind the Mul that it came with
        return np.abs(float64_of(plan.constants[behind, 1]))
    at = row.bias_slot
    bias = None if at is None else plan.constants.get((node, at)) or view.tensor(node, at)
    if at is None or bias is None:
        return 0.0
    is_folded = (node, at) in plan.constants or view.is_changed(node, at)
    return np.abs(float64_of(bias) * (1.0 if is_folded else row.bias_factor(node)))


def flushed_channels(
    constant: Constant, matrix: Callable[[NDArray[np.generic]], NDArray[np.generic]], bias: FloatArray | float
) -> tuple[int, list[int]]:
    """Return (how many weights matter that become zero or lose digits, the output channels that hold them).

    Parameters
    ----------
    constant : Constant
        The folded weight.
    matrix : callable
        What makes a matrix of shape (output channels, terms) of the weight.
    bias : array of shape (output channels,), or 0.0
        |b|, the least one where a channel has several.
    """
    unit, least_normal = UNIT[constant.dtype.name], LEAST_NORMAL[constant.dtype.name]
    kept = matrix(constant.array())
    if kept.dtype == np.float16 and not _may_lose(kept, bias):
        return 0, []
    exact = matrix(float64_of(constant))
    lost, largest = _lost(exact, kept), np.abs(exact).max(axis=1, initial=0)
    matters = lost.sum(axis=1) * LARGEST_INPUT > unit * np.maximum(np.maximum(largest * LARGEST_INPUT, bias), least_normal)
    return int(np.count_nonzero(lost[matters])), np.flatnonzero(matters).tolist()


def _may_lose(kept: NDArray[np.generic], bias: FloatArray | float) -> bool:
    """Say whether a row of float16 has so many values below the least normal number that what they have lost, at most half a step each,
    could matter: from their bits, which are in the order of their sizes, before the true values are computed in float64."""
    unit, least_normal = UNIT["float16"], LEAST_NORMAL["float16"]
    bits = kept.view(np.uint16) & np.uint16(0x7FFF)
    small = np.count_nonzero(bits < np.float16(least_normal).view(np.uint16), axis=1)
    largest = bits.max(axis=1, initial=0).view(np.float16).astype(np.float64) * (1 - 2 * unit)
    allowed = unit * np.maximum(np.maximum(largest * LARGEST_INPUT, bias), least_normal)
    return bool((small * (unit * least_normal) * LARGEST_INPUT > allowed).any())


def _lost(exact: NDArray[np.generic], kept: NDArray[np.generic]) -> FloatArray:
    """Return how much of each value is lost that has become zero, or, in float16, is below the least normal number and has lost more than
    a normal one would."""
    unit, least_normal = UNIT[kept.dtype.name], LEAST_NORMAL[kept.dtype.name]
    small = np.abs(kept) < least_normal if kept.dtype == np.float16 else kept == 0
    true = exact.astype(np.float64)
    loss = np.abs(true - kept.astype(np.float64))
    return np.where(small & (loss > unit * np.abs(true)), loss, 0.0)


def flushed_factors(constant: Constant, reach: FloatArray | float, bias: FloatArray | float) -> tuple[int, list[int]]:
    """Return (how many factors matter that become zero or lose digits, their flat indices).

    Parameters
    ----------
    constant : Constant
        The folded factors, each of which multiplies elements alone.
    reach : array of the constant's shape, or float
        How many times as large as X what they multiply may be; Inf: none of them may become zero.
    bias : array, or 0.0
        |b|; where it has another shape than the constant, the least one counts for each factor.
    """
    unit, least_normal = UNIT[constant.dtype.name], LEAST_NORMAL[constant.dtype.name]
    lost = _lost(float64_of(constant), constant.array())
    hiding = bias if np.shape(bias) == lost.shape else np.min(bias, initial=np.inf)
    with np.errstate(invalid="ignore"):  # zero times Inf, where nothing is lost
        matters = lost * (reach * LARGEST_INPUT) > unit * np.maximum(hiding, least_normal)
    return int(matters.sum()), np.flatnonzero(matters).tolist()
