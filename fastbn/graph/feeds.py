"""Inputs for a whole model: of several kinds, in sizes that it accepts."""

import numpy as np
from onnx import TensorProto, helper

from fastbn.graph.runtime import UNIT, runtime_errors, said

__all__ = ["KINDS", "ModelNotRun", "feeds_of", "random_feeds"]


# Sizes tried for unknown dimensions: (first axis, other axes).
SIZES = ((2, 16), (1, 16), (2, 64), (1, 64), (1, 1), (2, 224), (16, 16), (1, 3), (1, 2))

KINDS = ("normal", "wide", "zero")


class ModelNotRun(Exception):
    """A model that onnxruntime cannot run, in its words."""


def feeds_of(reference, index, input_shapes, seed):
    """Return one dict of inputs per kind, in sizes that the model accepts."""
    inputs = [info for info in index.proto.graph.input if info.name in {entry.name for entry in reference.get_inputs()}]
    complaint = None
    tried = set()
    for first, other in SIZES:
        shapes = {info.name: input_shapes.get(info.name) or _sized(info, first, other) for info in inputs}
        key = tuple(shapes.values())
        if key in tried:
            continue
        tried.add(key)
        try:
            feeds = [_feed(inputs, shapes, kind, np.random.default_rng([seed, number])) for number, kind in enumerate(KINDS)]
            reference.run(None, feeds[-1])
            return feeds
        except runtime_errors() as error:
            complaint = complaint or error
    raise ModelNotRun(f"onnxruntime cannot run the original: {said(complaint)}")


def random_feeds(reference, index, input_shapes, seed, count):
    """Return that many dicts of seeded normal inputs, in sizes that the model accepts; input_shapes as in feeds_of."""
    shapes = {name: values.shape for name, values in feeds_of(reference, index, input_shapes, seed)[0].items()}
    inputs = [info for info in index.proto.graph.input if info.name in shapes]
    return [_feed(inputs, shapes, KINDS[0], np.random.default_rng([seed, number])) for number in range(count)]


def _sized(info, first, other):
    if not info.type.HasField("tensor_type"):
        raise ModelNotRun(f"the input '{info.name}' is no tensor")
    shape = info.type.tensor_type.shape
    return tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else (first if axis == 0 else other)
        for axis, dim in enumerate(shape.dim)
    )


def _feed(inputs, shapes, kind, rng):
    feed = {}
    for info in inputs:
        shape = shapes[info.name]
        code = info.type.tensor_type.elem_type
        if code == TensorProto.STRING:
            feed[info.name] = np.full(shape, "a", dtype=object)
            continue
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(code))
        if dtype.name not in UNIT and dtype.kind not in "iub":
            raise ModelNotRun(f"the input '{info.name}' has type {dtype}")
        if kind == "zero":
            values = np.zeros(shape)
        elif dtype.kind == "b" and kind == "normal":
            values = np.ones(shape)  # with the zeros, every condition is met once and missed once
        elif dtype.kind in "iub":
            values = rng.integers(0, 256 if dtype == np.uint8 else 2, shape)
        elif kind == "wide":
            values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, shape)
        else:
            values = rng.standard_normal(shape)
        feed[info.name] = values.astype(dtype)
    return feed
