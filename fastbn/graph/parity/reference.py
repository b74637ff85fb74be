"""The original as the whole-model comparison needs it: inputs, outputs, and how far rounding moves them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from onnx import ModelProto

from fastbn.errors import ModelError
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.parity.comparable import comparable, is_random
from fastbn.graph.parity.difference import equal, is_numeric, max_abs, max_change
from fastbn.graph.parity.feeds import ALL_KINDS, KINDS, Feed, Feeds, InputKind, ModelNotRun, Shapes, feeds_of
from fastbn.graph.parity.noise import Noise
from fastbn.graph.runtime import Runnable, Runner, runtime_errors, said, says_invalid

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["MORE_DRAWS", "Progress", "Reference", "copied", "feeds_for", "reference_of", "silent"]

# Draws of the noise where the first one does not explain a difference: docs/numerics.md, "The bound of an output".
MORE_DRAWS = 5

# The copy of an output of more bytes is a temporary file: docs/numerics.md, "Limits of effort".
LARGEST_IN_MEMORY = 1 << 24

Progress: TypeAlias = Callable[[str], None]


def silent(_: str) -> None:
    """Tell nobody: the Progress where the caller gives none."""


def reference_of(original: Runnable, index: Index, input_shapes: Shapes, seed: int, progress: Progress) -> Reference:
    """Run the original on every kind of input.

    Raises
    ------
    ModelError
        The original is made of standard operators and onnxruntime says that it is no valid model.
    ModelNotRun
        onnxruntime cannot run it.
    """
    progress("loading the original")
    copy = comparable(index.proto)
    model = original if copy is None else original.with_proto(copy)
    proto = index.proto if copy is None else copy
    fresh = is_random(proto)
    with Runner(model, fresh) as runner:
        _load(runner, index)
        latest = _Latest(runner)
        feeds = feeds_of(latest, index, input_shapes, seed)
        reference = Reference(model, proto, index, feeds, copy is not None, fresh, progress)
        if not fresh:
            reference.outputs["zero"] = [copied(output) for output in latest.outputs]
        latest.outputs = []
        reference.run(KINDS, runner)
    reference.measure()
    return reference


def feeds_for(model: Runnable, index: Index, input_shapes: Shapes | None = None, seed: int = 0) -> Feeds:
    """Return the inputs of a Runnable; raises ModelError where onnxruntime cannot run it."""
    with Runner(model) as runner:
        try:
            _load(runner, index)
            return feeds_of(runner, index, input_shapes or {}, seed)
        except ModelNotRun as reason:
            raise ModelError(f"Cannot run '{index.source.name}': {reason}") from reason


def _load(runner: Runner, index: Index) -> None:
    """Open the session of the original: raise ModelError for an invalid model, ModelNotRun for one that onnxruntime does not support."""
    try:
        runner.session()
    except runtime_errors() as error:
        if says_invalid(error) and not index.proto.functions and all(is_standard(node.domain) for node in index.order):
            raise ModelError(f"Cannot load '{index.source.name}', which onnxruntime finds invalid: {said(error)}") from error
        raise ModelNotRun(f"onnxruntime cannot load the original: {said(error)}") from error


class _Latest:
    """A Runner that remembers the outputs of its latest run."""

    def __init__(self, runner: Runner) -> None:
        self.get_inputs = runner.get_inputs
        self.runner = runner
        self.outputs: list[object] = []

    def run(self, outputs: None, feed: Feed, /) -> Sequence[object]:
        self.outputs = self.runner.run(outputs, feed)
        return self.outputs


class Reference:
    """The original, and what it gives.

    Attributes
    ----------
    model, proto : Runnable, onnx.ModelProto
        The original, or with `prepared` the copy of it that `comparable` returns.
    index : model.Index
        Of the original.
    feeds : feeds.Feeds
    fresh : bool
        Every run needs a session of its own: the model draws random numbers.
    names : list of str
        Of the outputs.
    outputs : dict of kind -> list
        The outputs for each kind of input with which it runs.
    unrepeatable : set of int
        Outputs that differ between two runs, by number.
    notes : list of str
        Which kinds of input do not run, and what is special about the noise.
    noise : noise.Noise
    """

    def __init__(
        self, model: Runnable, proto: ModelProto, index: Index, feeds: Feeds, prepared: bool, fresh: bool, progress: Progress
    ) -> None:
        self.model, self.proto, self.index, self.feeds = model, proto, index, feeds
        self.prepared, self.fresh, self.progress = prepared, fresh, progress
        self.names = [info.name for info in proto.graph.output]
        self.outputs: dict[InputKind, list[object]] = {}
        self.unrepeatable: set[int] = set()
        self.notes: list[str] = []
        self.noise = Noise(index, proto)
        self._noisy = model.with_proto(self.noise.proto)
        self._relative: list[float] = []
        self._effects: dict[InputKind, list[float]] = {}

    def run(self, kinds: tuple[InputKind, ...], runner: Runner | None = None) -> None:
        """Run the original on these kinds of input, where that has not been done."""
        with runner or Runner(self.model, self.fresh) as open_runner:
            for kind in kinds:
                if kind in self.outputs:
                    continue
                self.progress(f"running the original on input '{kind}'")
                try:
                    self.outputs[kind] = [copied(output) for output in open_runner.run(None, self.feeds.make(kind))]
                except runtime_errors() as error:
                    self.notes.append(f"input '{kind}': onnxruntime cannot run the original: {said(error)}")

    def effect(self, kind: InputKind, number: int) -> float:
        """Return how far the noise moves an output: as measured for this kind of input, else in proportion to the first kind."""
        if kind in self._effects:
            return self._effects[kind][number]
        return self._relative[number] * max_abs(_numbers(self.outputs[kind][number]))

    def draw(self, kind: InputKind) -> None:
        """Measure the effect of the noise for one kind of input, by several draws."""
        effects = [0.0] * len(self.names)
        with Runner(self._noisy, self.fresh) as runner:
            for turn in range(1, MORE_DRAWS + 1):
                self.progress(f"measuring the rounding noise on input '{kind}', draw {turn} of {MORE_DRAWS}")
                effects = [max(pair) for pair in zip(effects, self._effects_of(runner, kind, turn, sums=True), strict=True)]
        self._effects[kind] = effects

    def noisy(self, kind: InputKind, draws: int = 1) -> Iterator[list[object]]:
        """Yield the outputs of the original for one kind of input, draw by draw of the noise."""
        with Runner(self._noisy, self.fresh) as runner:
            for turn in range(draws):
                with contextlib.suppress(*runtime_errors()):
                    yield runner.run(None, self._perturbed(kind, turn, sums=draws > 1))

    def _perturbed(self, kind: InputKind, turn: int, sums: bool = False) -> Feed:
        rng = np.random.default_rng([self.feeds.seed, ALL_KINDS.index(kind), turn])
        return self.noise.perturbed(self.feeds.make(kind), rng, sums)

    def measure(self) -> None:
        """Measure how far the noise moves each output, as a part of its largest value: one draw, on the first kind of input."""
        kind: InputKind | None = next((kind for kind in KINDS if kind in self.outputs), None)
        if kind is None or self._relative:
            return
        self.progress("measuring the rounding noise")
        effects: list[float] | None = None
        with Runner(self._noisy, self.fresh) as runner:
            if self._is_original(runner, kind):
                effects = self._effects_of(runner, kind, 0)
        if effects is None:
            self.noise = Noise(self.index, self.proto, inputs_only=True)
            self._noisy = self.model
            with Runner(self._noisy, self.fresh) as runner:
                effects = self._effects_of(runner, kind, 0)
        outputs = map(_numbers, self.outputs[kind])
        self._relative = [effect / (max_abs(output) or 1.0) for effect, output in zip(effects, outputs, strict=True)]

    def _is_original(self, runner: Runner, kind: InputKind) -> bool:
        """Say whether the model with noise gives what the original gives, bit for bit, where the noise is zero."""
        try:
            outputs = runner.run(None, self.noise.unperturbed(self.feeds.make(kind)))
        except runtime_errors():  # an operator that requires this input to be a constant
            return False
        different = self._different(kind, outputs)
        if not different:
            return True
        runner.close()
        with Runner(self.model, self.fresh) as again:
            self.unrepeatable = self._different(kind, again.run(None, self.feeds.make(kind)))
        if different <= self.unrepeatable:
            return True
        self.notes.append("the rounding noise enters by the inputs alone: with its constants as inputs the original gives other values")
        return False

    def _different(self, kind: InputKind, outputs: list[object]) -> set[int]:
        return {number for number, output in enumerate(outputs) if not equal(self.outputs[kind][number], output)}

    def _effects_of(self, runner: Runner, kind: InputKind, turn: int, sums: bool = False) -> list[float]:
        """Return how far one draw of the noise moves each output; zeros where the model does not run with it (an index out of range)."""
        try:
            outputs = runner.run(None, self._perturbed(kind, turn, sums))
        except runtime_errors():
            return [0.0] * len(self.names)
        pairs = zip(map(_numbers, self.outputs[kind]), map(_numbers, outputs), strict=True)
        return [max_change(before, noisy) if before.shape == noisy.shape else 0.0 for before, noisy in pairs]


def _numbers(output: object) -> Array:
    """Return an output that holds numbers, an empty array for any other."""
    return output if is_numeric(output) else np.empty(0)


def copied(output: object) -> object:
    """Return a copy of an output, a large one mapped from a temporary file.

    An output of onnxruntime is memory of its session, all of which is held as long as one output is.
    """
    if not isinstance(output, np.ndarray) or output.dtype.kind == "O":
        return output
    if output.nbytes <= LARGEST_IN_MEMORY:
        return output.copy()
    with tempfile.TemporaryFile() as file:
        output.tofile(file)
        file.flush()
        return np.memmap(file, output.dtype, "r", shape=output.shape)
