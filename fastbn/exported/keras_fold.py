"""Fold a Keras model: its graph is planned, the changes go into a copy of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from fastbn.dtypes import UNIT
from fastbn.errors import ArgumentError, ArgumentTypeError, ParityError, expected
from fastbn.exported.keras_graph import KerasGraph
from fastbn.exported.result import ModelFold, named
from fastbn.exported.variables import Changes, Variables
from fastbn.graph.job import Job, Options, fold_of
from fastbn.graph.model import storage
from fastbn.graph.ops.normalization import BATCH_NORM
from fastbn.graph.parity.difference import max_change
from fastbn.graph.parity.noise import NOISE
from fastbn.graph.parity.reference import Progress, silent
from fastbn.graph.parity.verdict import judged
from fastbn.graph.planner.planning import Planning
from fastbn.graph.results import Kept, Parity
from fastbn.graph.rewrite.draft import Draft
from fastbn.graph.rewrite.output import Output
from fastbn.graph.rewrite.writer import rewrite
from fastbn.keras.layer import BatchNormalization

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["fold"]

# Sizes of inputs that the model leaves open, but for the batch; runs with other signs of the noise.
OPEN_SIZE, BATCH, NOISY_RUNS = 16, 2, 2

NORMS = (keras.layers.BatchNormalization, BatchNormalization)


def fold(model: keras.Model, example_inputs: Any, verify: bool, seed: int, progress: Progress | None) -> ModelFold[keras.Model]:
    """Do what `fastbn.keras.fold` says."""
    if not isinstance(model, keras.Model):
        raise ArgumentTypeError(expected("a keras.Model", type(model).__name__, "model"))
    if not _is_functional(model) or not model.built:
        what = "whose layers are not built" if _is_functional(model) else "that is a class of its own: its graph is not known"
        raise ArgumentError(f"Cannot fold a model {what}")
    return _Job(model, KerasGraph(model), example_inputs, verify, seed, progress or silent).model_fold()


def _is_functional(layer: keras.layers.Layer) -> bool:
    """Say whether a layer is a model of layers, whose graph is known."""
    return isinstance(layer, (keras.Sequential, keras.src.models.functional.Functional))


class _Job(Job):
    """The main job on the graph of a Keras model, whose whole is compared in Keras."""

    def __init__(self, model: keras.Model, graph: KerasGraph, example: Any, verify: bool, seed: int, progress: Progress) -> None:
        objections = {name: None for name in graph.owners}
        self.variables = Variables(objections, graph.norms, may_insert=False)
        source = storage.load(graph.proto)
        source.is_shared = False
        super().__init__(source, source, Options(None, None, None, verify, {}, False, None, seed, progress, None, self.variables))
        self.model, self.graph = model, graph
        self.beside = _Comparison(model, example, seed) if verify else None

    def _whole(self, planning: Planning) -> tuple[Draft, Output, Parity | None]:
        draft = Draft(self.index, planning)
        output = rewrite(self.index, planning, draft)  # which is written for nobody
        if self.beside is None or not planning.plans:
            return draft, output, None
        self.options.progress("comparing the folded model with the original")
        return draft, output, self.beside.check(self._folded(planning))

    def _folded(self, planning: Planning) -> keras.Model:
        changes = self.variables.changes(planning, self.index)
        values = {self.graph.owners[name]: array for name, array in changes.values.items()}
        return _copied(self.model, self._gone(changes), values)

    def _gone(self, changes: Changes) -> set[keras.layers.Layer]:
        return {self.graph.layers[name] for name in changes.gone}

    def model_fold(self) -> ModelFold[keras.Model]:
        """Plan, compare, and return the result."""
        planning, draft, _, parity = self._finish(self.plan())
        if parity is not None and parity.status == "failed":
            raise ParityError(f"Cannot fold the model: it differs from the original whatever is left out: {parity}")

        def class_of(name: str) -> str:
            return type(self.graph.layers[name]).__name__ if name in self.graph.layers else name

        folded = [named(fold_of(plan, self.check_of(plan), draft, False), class_of, []) for plan in planning.folds]
        kept = [each for each in planning.kept if each.ops == (BATCH_NORM,)]
        seen = {layer for layer in self.graph.layers.values() if isinstance(layer, NORMS)}
        hidden = [layer for layer in self.model._flatten_layers() if isinstance(layer, NORMS) and layer not in seen]
        reason = "another layer, a call in training or an axis in the middle hides it from the graph"
        kept += [Kept(layer.name, (BATCH_NORM,), "no-module", reason) for layer in hidden]
        return ModelFold(self._folded(planning), folded, kept, parity, "keras")


def _copied(model: keras.Model, gone: set[keras.layers.Layer], values: dict[tuple[keras.layers.Layer, str], Array]) -> keras.Model:
    """Return a copy of a model in which layers are Identity and variables have new values; biases that are not there are made."""
    made: dict[keras.layers.Layer, keras.layers.Layer] = {}
    identities: set[keras.layers.Layer] = set()

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        if layer not in made:
            made[layer] = _clone_of(layer)
        return made[layer]

    def _clone_of(layer: keras.layers.Layer) -> keras.layers.Layer:
        if _is_functional(layer):
            return cloned(layer)
        config = layer.get_config()
        if layer in gone:
            identity = keras.layers.Identity(name=layer.name, dtype=config["dtype"])
            identities.add(identity)
            return identity
        if (layer, "bias") in values:
            config["use_bias"] = True
        return type(layer).from_config(config)

    def call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:  # Any: the arguments and the result of a layer
        return layer(args[0]) if layer in identities else layer(*args, **kwargs)  # without the mask that the layer took

    def cloned(whole: keras.Model) -> keras.Model:
        options = {} if isinstance(whole, keras.Sequential) else {"call_function": call}
        return keras.models.clone_model(whole, clone_function=clone, **options)

    copy = cloned(model)
    for old, new in made.items():
        if _is_functional(old):  # whose layers are here too
            continue
        changed = {attribute: array for (layer, attribute), array in values.items() if layer is old}
        if changed:
            for attribute in ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"):
                variable = getattr(new, attribute, None)
                if variable is not None:
                    value = changed.get(attribute, getattr(old, attribute, None))
                    variable.assign(keras.ops.zeros_like(variable) if value is None else value)
        elif old not in gone and isinstance(old, keras.layers.Layer):
            new.set_weights(old.get_weights())
    return copy


class _Comparison:
    """The outputs of an original, and how far noise in its weights moves them."""

    def __init__(self, model: keras.Model, example: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        drawn = [_drawn(tensor, rng) for tensor in model.inputs]
        self._inputs = [drawn] if example is None else [keras.tree.flatten(example), drawn]
        self._before = [_outputs(model, inputs) for inputs in self._inputs]
        self._noise = [[0.0] * len(before) for before in self._before]
        self._unit = max((UNIT[name] for weight in model.weights if (name := str(weight.dtype)) in UNIT), default=UNIT["float32"])
        for _ in range(NOISY_RUNS):
            noisy = _copied(model, set(), {})
            for weight in noisy.weights:
                values = keras.ops.convert_to_numpy(weight)
                if values.dtype.kind == "f":
                    weight.assign(values * (1 + NOISE * self._unit * rng.choice([-1, 1], values.shape)))
            for run, inputs in enumerate(self._inputs):
                moved = _outputs(noisy, inputs)
                self._noise[run] = [max(n, max_change(a, b)) for n, a, b in zip(self._noise[run], self._before[run], moved, strict=True)]

    def check(self, folded: keras.Model) -> Parity:
        """Return the parity of a folded model."""
        verdicts = []
        for inputs, before, noise in zip(self._inputs, self._before, self._noise, strict=True):
            after = _outputs(folded, inputs)
            for number, arrays in enumerate(zip(before, after, strict=True)):
                verdicts.append(judged(f"output[{number}]", *arrays, noise[number], self._unit))
        worst = max(verdicts, key=lambda each: (not each.holds, each.part))
        wrong = any(each.is_wrong for each in verdicts)
        proven = all(each.holds for each in verdicts) and any(each.proves for each in verdicts)
        return Parity(
            "failed" if wrong else "ok" if proven else "inconclusive",
            len(self._inputs),
            worst.name,
            worst.worst.index,
            worst.worst.values,
            error=worst.worst.error,
            allowed=worst.allowed,
            reason=None if wrong or proven else worst.why_inconclusive,
            where=f"in Keras on {keras.config.backend()}",
        )


def _drawn(tensor: Any, rng: np.random.Generator) -> Array:  # Any: a KerasTensor
    shape = [size if size is not None else OPEN_SIZE if axis else BATCH for axis, size in enumerate(tensor.shape)]
    if np.dtype(tensor.dtype).kind in "iub":
        return rng.integers(0, 2, shape).astype(tensor.dtype)
    return rng.standard_normal(shape).astype(tensor.dtype)


def _outputs(model: keras.Model, inputs: list[Array]) -> list[Array]:
    """Return what a model gives in inference, in float64."""
    tensors = [keras.ops.convert_to_tensor(each) for each in inputs]
    results = keras.tree.flatten(model(tensors if len(tensors) > 1 else tensors[0], training=False))
    return [np.asarray(keras.ops.convert_to_numpy(each), np.float64) for each in results]
