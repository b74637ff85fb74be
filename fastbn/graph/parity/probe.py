"""Inputs for the parity of one fold: small where sizes do not matter, in the sizes of the model where they may."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from fastbn.errors import ModelError
from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Node, Value
from fastbn.graph.model.storage import serialize
from fastbn.graph.ops.registry import operator_row, row_of
from fastbn.graph.parity.feeds import Feed, ModelNotRun, feeds_of
from fastbn.graph.planner.view import GraphView
from fastbn.graph.runtime import runtime_errors, session

__all__ = ["Probe", "probes"]

# Elements of one input that has the sizes of the model, unless nothing smaller can be run: docs/numerics.md, "Inputs".
LARGEST_PROBE = 1 << 23

# Elements of one input that is not tried at all: with its results, and in float64, it takes more than a gigabyte.
TOO_LARGE = 1 << 25

# Types of values that random numbers may stand for; 0 is a type that is not known.
FREE_KINDS = (0, TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)

# The shape of each input of a segment.
ProbeShapes: TypeAlias = dict[Value, tuple[int, ...]]


@dataclass(frozen=True)
class Probe:
    """Inputs of a segment.

    Attributes
    ----------
    make : callable of (numpy.random.Generator, float) -> dict of name -> array
        Makes random values of this standard deviation.
    has_sizes_of_model : bool
        Where the sizes are not those of the model, a difference does not prove that the fold is wrong.
    """

    make: Callable[[np.random.Generator, float], Feed]
    has_sizes_of_model: bool


def probes(nodes: list[Node], view: GraphView, inside: set[Value]) -> Iterator[Probe]:
    """Yield the probes of a segment, in the order in which to try them.

    Parameters
    ----------
    nodes : list of model.Node
        The segment.
    view : view.GraphView
    inside : set of node.Value
        The values that the segment computes.
    """
    index = view.index
    proposed: ProbeShapes = {}
    needed: dict[Value, bool] = {}  # value -> whether it is free, so that any numbers will do
    for node in nodes:
        for slot, value in enumerate(node.inputs):
            if value is None or value in inside or index.constant(value) is not None:
                continue
            is_free = index.kind(value) in FREE_KINDS and slot not in operator_row(node).size_slots
            needed[value] = needed.get(value, True) and is_free
            shape = row_of(node, view).probe_shapes(node, view).get(slot)
            if shape is not None:
                proposed[value] = shape
    complete = set(proposed) == set(needed) and all(needed.values()) and all(math.prod(shape) <= TOO_LARGE for shape in proposed.values())
    if complete:
        stated = {value: _stated(value, shape, index) for value, shape in proposed.items()}
        is_small = all(math.prod(shape) <= LARGEST_PROBE for shape in stated.values())
        small, full = Probe(_normal(proposed), stated == proposed), Probe(_normal(stated), True)
        sized = any(operator_row(node).sized for node in nodes)
        if any(math.prod(shape) > TOO_LARGE for shape in stated.values()):
            yield small
        elif stated == proposed:
            yield full
        else:
            yield from (full, small) if sized and is_small else (small, full)
    yield from _captured_probes(index, needed)
    for rank in (2, 3, 4, 5) if complete else ():
        yield Probe(_normal({value: (*shape, 3, 3, 3)[:rank] for value, shape in proposed.items()}), False)


def _captured_probes(index: Index, needed: Mapping[Value, bool]) -> Iterator[Probe]:
    """Yield what the values are in a run of the original: first with random numbers in the place of what is free, then as it was."""
    captured = _captured(index, list(needed))
    if captured is None:
        return
    free = {value: captured[value.name].shape for value, is_free in needed.items() if is_free}
    if len(free) < len(needed):
        make = _normal(free)
        yield Probe(lambda rng, amplitude: {**captured, **make(rng, amplitude)}, True)
    yield Probe(lambda rng, amplitude: captured, True)


def _normal(shapes: ProbeShapes) -> Callable[[np.random.Generator, float], Feed]:
    return lambda rng, amplitude: {value.name: np.asarray(amplitude * rng.standard_normal(shape)) for value, shape in shapes.items()}


def _stated(value: Value, proposed: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """Return the sizes that the model states; those that it leaves open are as proposed."""
    shape = index.shape(value)
    if shape is None:
        return proposed
    if len(shape) != len(proposed):
        return tuple(2 if size is None else size for size in shape)
    return tuple(other if size is None else size for size, other in zip(shape, proposed, strict=True))


def _captured(index: Index, values: list[Value]) -> Feed | None:
    """Return what values of the main graph are when the original runs, by name; None where it does not run."""
    if any(value.scope is not index.main for value in values):
        return None
    proto = onnx.ModelProto()
    proto.CopyFrom(index.proto)
    names = list(dict.fromkeys(value.name for value in values))
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    folder = index.source.path.parent if index.source.path else None
    failures: tuple[type[Exception], ...] = (*runtime_errors(), ModelNotRun, ModelError)
    try:
        run = session(serialize(proto, index.source.name), folder)
        outputs = run.run(names, feeds_of(run, index, index.input_shapes, seed=0)[0])
        return {name: np.array(output) for name, output in zip(names, outputs, strict=True)}
    except failures:
        return None
