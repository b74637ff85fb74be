"""Inputs for a whole model: sizes that it accepts, and seeded values of several kinds. The kinds: docs/numerics.md, "Inputs"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from fastbn.dtypes import UNIT
from fastbn.graph.model.element_types import dtype_of
from fastbn.graph.model.index import Index
from fastbn.graph.parity.survival import Feed, Shapes, reader_of_nothing
from fastbn.graph.runtime import ValueInfo, runtime_errors, said

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["ALL_KINDS", "KINDS", "MORE_KINDS", "Feed", "Feeds", "InputKind", "ModelNotRun", "Shapes", "feeds_of", "random_feeds"]

InputKind: TypeAlias = Literal["normal", "wide", "zero", "small", "positive", "first"]

# Sizes tried for unknown dimensions: (first axis, other axes).
SIZES = ((2, 16), (1, 16), (2, 64), (1, 64), (1, 1), (2, 224), (16, 16), (1, 3), (1, 2), (4, 16), (8, 16), (3, 16), (32, 16), (64, 16))

# Elements of one input: where its sizes are guessed, and where the model or the caller says them.
LARGEST_GUESSED, LARGEST_STATED = 1 << 23, 1 << 28

# Every model is run on KINDS, and on MORE_KINDS where these prove nothing: a network may saturate on large values, take a square root of
# its input, or have states that must begin at zero (then only the first input is random).
KINDS: tuple[InputKind, ...] = ("normal", "wide", "zero")
MORE_KINDS: tuple[InputKind, ...] = ("small", "positive", "first")
ALL_KINDS = (*KINDS, *MORE_KINDS)

# The standard deviation of inputs of kind "small".
AMPLITUDE = 1 / 64


class ModelNotRun(Exception):
    """A model that onnxruntime cannot run, in its words."""


class InputSession(Protocol):
    """A session of a model, or what stands for one."""

    def get_inputs(self) -> Sequence[ValueInfo]:
        """Return what onnxruntime says of the graph inputs."""
        ...

    def run(self, outputs: None, feed: Feed, /) -> Sequence[object]:
        """Return all outputs."""
        ...


class Feeds:
    """Inputs of a model, made when they are asked for: the same values each time, and nothing is kept.

    Parameters
    ----------
    inputs : list of onnx.ValueInfoProto
        The graph inputs that are fed.
    shapes : dict of name -> tuple of int
    seed : int
    """

    def __init__(self, inputs: list[onnx.ValueInfoProto], shapes: Shapes, seed: int) -> None:
        self.inputs = inputs
        self.shapes = shapes
        self.seed = seed

    def __len__(self) -> int:
        return len(KINDS)

    def __getitem__(self, number: int) -> Feed:
        return self.make(KINDS[number])

    def __iter__(self) -> Iterator[Feed]:
        return (self.make(kind) for kind in KINDS)

    def make(self, kind: InputKind) -> Feed:
        """Return the inputs of one kind."""
        return _feed(self.inputs, self.shapes, kind, np.random.default_rng([self.seed, ALL_KINDS.index(kind)]))


def feeds_of(session: InputSession, index: Index, input_shapes: Shapes, seed: int) -> Feeds:
    """Return the inputs of a model, in sizes with which onnxruntime runs it.

    Parameters
    ----------
    session : object with get_inputs() and run(None, feed)
        A session of the model; it is run on zeros, once for each guess of the sizes that the model leaves open.
    index : model.Index
        Of the model.
    input_shapes : dict of name -> tuple of int
        Sizes of graph inputs that the caller knows.
    seed : int

    Raises
    ------
    ModelNotRun
        No sizes are found with which it runs, or they would be too large.
    """
    names = {entry.name for entry in session.get_inputs()}
    inputs = [info for info in index.proto.graph.input if info.name in names]
    complaint: str | None = None
    fallback: Feeds | None = None
    tried: set[tuple[tuple[int, ...], ...]] = set()
    for first, other in SIZES:
        shapes = {info.name: input_shapes.get(info.name) or _sized(info, first, other) for info in inputs}
        key = tuple(shapes.values())
        if key in tried:
            continue
        tried.add(key)
        too_large = next(filter(None, (_too_large(info, shapes[info.name], input_shapes) for info in inputs)), None)
        if too_large:
            complaint = complaint or too_large
            continue
        feeds = Feeds(inputs, shapes, seed)
        reader = reader_of_nothing(index, shapes, feeds.make("zero"))
        if reader is not None:
            complaint = complaint or f"with the sizes tried, {reader.op} '{reader.label}' reads nothing, which onnxruntime does not survive"
            continue
        try:
            outputs = session.run(None, feeds.make("zero"))
        except runtime_errors() as error:
            complaint = complaint or f"onnxruntime cannot run the original: {said(error)}"
            continue
        if any(np.size(output) for output in outputs if isinstance(output, np.ndarray)) or not outputs:
            return feeds
        fallback = fallback or feeds
    if fallback is not None:
        return fallback
    raise ModelNotRun(complaint or "no sizes of its inputs can be tried")


def _too_large(info: onnx.ValueInfoProto, shape: tuple[int, ...], input_shapes: Shapes) -> str | None:
    guessed = info.name not in input_shapes and any(dim.dim_value <= 0 for dim in info.type.tensor_type.shape.dim)
    limit = LARGEST_GUESSED if guessed else LARGEST_STATED
    if math.prod(shape) <= limit:
        return None
    return f"the input '{info.name}' of shape {','.join(map(str, shape))} would hold more than {limit} elements"


def random_feeds(session: InputSession, index: Index, input_shapes: Shapes, seed: int, count: int) -> list[Feed]:
    """Return that many dicts of seeded normal inputs, in sizes that the model accepts; input_shapes as in feeds_of."""
    feeds = feeds_of(session, index, input_shapes, seed)
    return [_feed(feeds.inputs, feeds.shapes, KINDS[0], np.random.default_rng([seed, number])) for number in range(count)]


def _sized(info: onnx.ValueInfoProto, first: int, other: int) -> tuple[int, ...]:
    if not info.type.HasField("tensor_type"):
        raise ModelNotRun(f"the input '{info.name}' is no tensor")
    shape = info.type.tensor_type.shape
    return tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else (first if axis == 0 else other)
        for axis, dim in enumerate(shape.dim)
    )


def _feed(inputs: list[onnx.ValueInfoProto], shapes: Shapes, kind: InputKind, rng: np.random.Generator) -> Feed:
    kinds: list[InputKind] = [kind] * len(inputs)
    if kind == "first":
        kinds = ["zero" if number else "normal" for number in range(len(inputs))]
    return {info.name: _values(info, shapes[info.name], each, rng) for info, each in zip(inputs, kinds, strict=False)}


def _values(info: onnx.ValueInfoProto, shape: tuple[int, ...], kind: InputKind, rng: np.random.Generator) -> Array:
    code = info.type.tensor_type.elem_type
    if code == TensorProto.STRING:
        return np.full(shape, "a", dtype=object)
    dtype = dtype_of(code)
    if dtype.name not in UNIT and dtype.kind not in "iub":
        raise ModelNotRun(f"the input '{info.name}' has type {dtype}")
    if kind == "zero":
        return np.zeros(shape, dtype)
    if dtype.kind == "b" and kind == "normal":
        return np.ones(shape, dtype)  # with the kind "zero", every condition is true once and false once
    if dtype.kind in "iub":
        return rng.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
    values: Array = rng.standard_normal(shape, np.float64 if dtype == np.float64 else np.float32)
    if kind == "wide":
        values *= np.power(values.dtype.type(10), 4 * rng.random(shape, values.dtype) - 2)
    elif kind == "small":
        values *= AMPLITUDE
    elif kind == "positive":
        np.abs(values, out=values)
    return values.astype(dtype, copy=False)
