"""LSTM, GRU and RNN."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.affine import WeightLayout
from fastbn.errors import ModelError, expected
from fastbn.graph.model.node import Node
from fastbn.graph.ops.placing import axis_in, require_axis, require_channels
from fastbn.graph.ops.row import PresentGraph, Row, Transfer, Traveler
from fastbn.graph.ops.shape_rules import Size, Sizes
from fastbn.graph.ops.weighted import scaled, summed
from fastbn.graph.reasons import Refusal

__all__ = ["RECURRENT"]

WEIGHT, BIAS = 1, 3


# Forward, on the input x: gates W (S x + T) + b = (W*S) x + (b + W T), for each direction.
def _forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine = traveler.affine
    if traveler.slot != 0:
        raise Refusal("no-absorber", f"it is not the input sequence of {node.op} '{node.label}'")
    weight = graph.weight(node, WEIGHT)
    if len(weight.shape) != 3:
        raise ModelError(expected("weights of rank 3", f"shape {weight.shape}", node.label))
    directions, gates, inputs = weight.shape
    require_axis(node, affine, axis_in(node, affine, 3), 2, "input")
    require_channels(node, affine, inputs, "input")
    layout = WeightLayout(1, directions * gates, inputs, 1)
    transfer = Transfer()
    if affine.scales:
        transfer.constants[WEIGHT] = scaled(weight, layout, affine.along(inputs)[0])
    if affine.shifts:
        added, size = (part.reshape(directions, gates) for part in summed(weight, layout, affine))
        zeros = np.zeros((directions, gates))  # the other half of the bias belongs to the state
        bias = graph.bias(node, BIAS, (directions, 2 * gates), weight.dtype)
        transfer.constants[BIAS] = bias.affine(1.0, np.hstack([added, zeros]), np.hstack([size, zeros]))
    return transfer


def _terms(node: Node, graph: PresentGraph) -> int:
    return 8 * sum(graph.weight(node, WEIGHT).shape[1:])


def _probe_shapes(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    return {0: (3, 2, graph.weight(node, WEIGHT).shape[2])}


def _weight_matrix(node: Node, slot: int, values: NDArray[Any]) -> NDArray[Any] | None:
    return values.reshape(-1, values.shape[-1]) if slot == WEIGHT else None


def _demanded_size(node: Node, weight: Sizes) -> tuple[int, Size]:
    return -1, weight[-1] if len(weight) == 3 else None


_RECURRENT = Row(forward=_forward, terms=_terms, probe_shapes=_probe_shapes, weight_matrix=_weight_matrix, demanded_size=_demanded_size)

RECURRENT = {
    "LSTM": _RECURRENT,
    # On absolute values the update gate z of a GRU is nearly 1, so 1 - z vanishes. Its states are averages of numbers of at most 1.
    "GRU": replace(_RECURRENT, least_magnitude=1.0, ends_on_nothing=True),
    "RNN": _RECURRENT,
}
