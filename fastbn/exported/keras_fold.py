"""Fold a Keras model: its graph is planned, the changes go into a copy of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.exported.job import ModelJob
from fastbn.exported.keras_copy import copied, is_functional
from fastbn.exported.keras_graph import NORMS, KerasGraph
from fastbn.exported.keras_layers import BETWEEN
from fastbn.exported.keras_parity import Comparison
from fastbn.exported.result import ModelFold
from fastbn.exported.variables import Changes, Variables
from fastbn.graph.model import storage
from fastbn.graph.ops.normalization import BATCH_NORM
from fastbn.graph.parity.reference import Progress
from fastbn.graph.results import Kept

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["fold"]


def fold(model: keras.Model, example_inputs: Any, verify: bool, seed: int, progress: Progress | None) -> ModelFold[keras.Model]:
    """Do what `fastbn.keras.fold` says."""
    if not isinstance(model, keras.Model):
        raise ArgumentTypeError(expected("a keras.Model", type(model).__name__, "model"))
    if not is_functional(model) or not model.built:
        what = "whose layers are not built" if is_functional(model) else "that is a class of its own: its graph is not known"
        raise ArgumentError(f"Cannot fold a model {what}")
    comparison = Comparison(model, example_inputs, seed) if verify else None
    return _Job(model, KerasGraph(model), comparison, seed, progress).model_fold()


class _Job(ModelJob[keras.Model]):
    """The job on the graph of a Keras model."""

    framework = "keras"

    def __init__(self, model: keras.Model, graph: KerasGraph, comparison: Comparison | None, seed: int, progress: Progress | None) -> None:
        source = storage.load(graph.proto)
        source.is_shared = False
        variables = Variables(dict.fromkeys(graph.owners), graph.norms, may_insert=False)
        super().__init__(source, variables, comparison, seed, progress)
        self.model, self.graph = model, graph

    def model_of(self, changes: Changes) -> keras.Model:
        values = _storable({self.graph.owners[name]: array for name, array in changes.values.items()})
        return copied(self.model, {self.graph.layers[name] for name in changes.gone}, values)

    def class_of(self, name: str) -> str:
        return type(self.graph.layers[name]).__name__ if name in self.graph.layers else name

    def unseen(self) -> list[Kept]:
        seen = {layer for layer in self.graph.layers.values() if isinstance(layer, NORMS)}
        hidden = [layer for layer in self.model._flatten_layers() if isinstance(layer, NORMS) and layer not in seen]
        reason = "another layer or a call in training hides it from the graph"
        return [Kept(layer.name, (BATCH_NORM,), "no-module", reason) for layer in hidden]


def _storable(values: dict[tuple[keras.layers.Layer, str], Array]) -> dict[tuple[keras.layers.Layer, str], Array]:
    """Return values of variables that layers have: what separable convolutions add between their kernels, as part of their biases."""
    found = {key: array for key, array in values.items() if key[1] != BETWEEN}
    for layer in {layer for layer, attribute in values if attribute == BETWEEN}:

        def value(attribute: str, layer: keras.layers.Layer = layer) -> Array | None:
            variable = getattr(layer, attribute)
            return found.get((layer, attribute), None if variable is None else keras.ops.convert_to_numpy(variable))

        kernel, bias = value("pointwise_kernel"), value("bias")
        assert kernel is not None, "every separable convolution has one"
        added = values[layer, BETWEEN].astype(np.float64) @ kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)
        found[layer, "bias"] = (added if bias is None else bias + added).astype(kernel.dtype)
    return found
