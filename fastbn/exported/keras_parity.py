"""A folded Keras model beside its original, both in Keras, on the same inputs; how far rounding may move it: docs/numerics.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from fastbn.dtypes import UNIT
from fastbn.errors import ArgumentError, first_line
from fastbn.exported.job import parity_of
from fastbn.exported.keras_copy import copied
from fastbn.graph.parity.difference import max_change
from fastbn.graph.parity.noise import NOISE
from fastbn.graph.parity.verdict import Verdict, judged
from fastbn.graph.results import Parity

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["Comparison"]

# Sizes of inputs that the model leaves open, but for the batch; runs with other signs of the noise.
OPEN_SIZE, BATCH, NOISY_RUNS = 16, 2, 2


class Comparison:
    """The outputs of an original, and how far noise in its weights moves them.

    Parameters
    ----------
    model : keras.Model
        The original.
    example : array or structure of arrays, or None
        Inputs beside random ones.
    seed : int
    """

    def __init__(self, model: keras.Model, example: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        drawn = [_drawn(tensor, rng) for tensor in model.inputs]
        self._inputs = [drawn] if example is None else [keras.tree.flatten(example), drawn]
        try:
            self._before = [_outputs(model, inputs) for inputs in self._inputs]
        except Exception as error:  # whatever the model raises
            which = "random inputs" if example is None else "its example inputs, or on random ones"
            raise ArgumentError(f"Cannot run the model on {which}: {first_line(error)}") from error
        types = [str(weight.dtype) for weight in model.weights] + [str(layer.compute_dtype) for layer in model._flatten_layers()]
        self._unit = max((UNIT[name] for name in types if name in UNIT), default=UNIT["float32"])
        self._noise = [[0.0] * len(before) for before in self._before]
        noisy = copied(model, set(), {})
        self._demand_same(noisy)
        exact = [weight for weight in noisy.weights if str(weight.dtype) in UNIT]
        values = [keras.ops.convert_to_numpy(weight) for weight in exact]
        for _ in range(NOISY_RUNS):
            for weight, value in zip(exact, values, strict=True):
                weight.assign(value * (1 + NOISE * self._unit * rng.choice([-1, 1], value.shape)))
            for run, inputs in enumerate(self._inputs):
                moved = _outputs(noisy, inputs)
                self._noise[run] = [max(n, max_change(a, b)) for n, a, b in zip(self._noise[run], self._before[run], moved, strict=True)]

    def _demand_same(self, copy: keras.Model) -> None:
        """Refuse a model whose copy computes something else: a class whose configuration does not hold all of it."""
        for inputs, before in zip(self._inputs, self._before, strict=True):
            wrong = next((each for each in self._verdicts(copy, inputs, before, [0.0] * len(before)) if each.is_wrong), None)
            if wrong is not None:
                why = "the configuration of a layer (get_config) does not hold all of it, or its results are random"
                raise ArgumentError(f"Cannot copy the model: {wrong.name} of an unchanged copy is another one, because {why}")

    def _verdicts(self, model: keras.Model, inputs: list[Array], before: list[Array], noise: list[float]) -> list[Verdict]:
        after = _outputs(model, inputs)
        rows = zip(before, after, noise, strict=True)
        return [judged(f"output[{number}]", a, b, moved, self._unit) for number, (a, b, moved) in enumerate(rows) if a.size]

    def check(self, folded: keras.Model) -> Parity:
        """Return the parity of a folded model."""
        runs = zip(self._inputs, self._before, self._noise, strict=True)
        verdicts = [verdict for run in runs for verdict in self._verdicts(folded, *run)]
        return parity_of(verdicts, len(self._inputs), f"in Keras on {keras.config.backend()}")


def _drawn(tensor: Any, rng: np.random.Generator) -> Array:  # Any: a KerasTensor
    shape = [size if size is not None else OPEN_SIZE if axis else BATCH for axis, size in enumerate(tensor.shape)]
    if tensor.dtype != "bfloat16" and np.dtype(tensor.dtype).kind in "iub":
        return rng.integers(0, 2, shape).astype(tensor.dtype)
    return rng.standard_normal(shape).astype("float32" if tensor.dtype == "bfloat16" else tensor.dtype)


def _outputs(model: keras.Model, inputs: list[Array]) -> list[Array]:
    """Return what a model gives in inference, in float64."""
    tensors = [keras.ops.convert_to_tensor(each) for each in inputs]
    given = keras.tree.pack_sequence_as(model._inputs_struct, tensors) if hasattr(model, "_inputs_struct") else tensors[0]
    results = keras.tree.flatten(model(given, training=False))
    return [np.asarray(keras.ops.convert_to_numpy(each), np.float64) for each in results]
