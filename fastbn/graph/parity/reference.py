"""The original as the whole-model comparison needs it: inputs, outputs, and how far rounding moves them."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from fastbn.errors import ModelError, expected
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.parity.comparable import comparable, is_random
from fastbn.graph.parity.difference import largest, moved, same_bits
from fastbn.graph.parity.feeds import KINDS, MORE_KINDS, Feed, Feeds, ModelNotRun, feeds_of
from fastbn.graph.parity.noise import Noise
from fastbn.graph.runtime import Runnable, Runner, runtime_errors, said, says_invalid

__all__ = ["Progress", "Reference", "feeds_for", "kept", "reference_of", "silent"]

# Draws of the noise where the first one does not explain what is found.
MORE_DRAWS = 5

# An output of more bytes is kept in a temporary file.
LARGEST_KEPT = 1 << 24

Progress: TypeAlias = Callable[[str], None]


def silent(_: str) -> None:
    """Tell nobody: the Progress where the caller gives none."""


def reference_of(
    original: Runnable, index: Index, input_shapes: Mapping[str, tuple[int, ...]], seed: int, progress: Progress
) -> "Reference":
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
            reference.outputs["zero"] = [kept(output) for output in latest.outputs]
        latest.outputs = []
        reference.run(KINDS, runner)
    reference.measure()
    return reference


def feeds_for(model: Runnable, index: Index, input_shapes: Mapping[str, tuple[int, ...]] | None = None, seed: int = 0) -> Feeds:
    """Return the inputs of a Runnable; raises ModelError where onnxruntime cannot run it."""
    with Runner(model) as runner:
        try:
            _load(runner, index)
            return feeds_of(runner, index, input_shapes or {}, seed)
        except ModelNotRun as reason:
            raise ModelError(expected("a model that onnxruntime runs", str(reason), index.source.name)) from reason


def _load(runner: Runner, index: Index) -> None:
    """Open the session of the original; where onnxruntime has none, say whether the model or the runtime is to blame."""
    try:
        runner.session()
    except runtime_errors() as error:
        if says_invalid(error) and not index.proto.functions and all(is_standard(node.domain) for node in index.order):
            raise ModelError(expected("a valid model", f"one of which onnxruntime says: {said(error)}", index.source.name)) from error
        raise ModelNotRun(f"onnxruntime cannot load the original: {said(error)}") from error


class _Latest:
    """A Runner that remembers what its latest run gave."""

    def __init__(self, runner: Runner) -> None:
        self.get_inputs = runner.get_inputs
        self.runner = runner
        self.outputs: list = []

    def run(self, outputs: None, feed: Feed) -> list:
        self.outputs = self.runner.run(outputs, feed)
        return self.outputs


class Reference:
    """The original, and what it gives.

    Attributes
    ----------
    model, proto : Runnable, onnx.ModelProto
        The original; a copy that can be compared where `prepared` says so.
    index : model.Index
        Of the original.
    feeds : feeds.Feeds
    fresh : bool
        Every run needs a session of its own: the model draws random numbers.
    names : list of str
        Of the outputs.
    outputs : dict of kind -> list
        What it gives for each kind of input with which it runs.
    unrepeatable : set of int
        Outputs that differ between two runs, by number.
    notes : list of str
        What could not be run or measured, and why.
    noise : noise.Noise
    """

    def __init__(
        self, model: Runnable, proto: ModelProto, index: Index, feeds: Feeds, prepared: bool, fresh: bool, progress: Progress
    ) -> None:
        self.model, self.proto, self.index, self.feeds = model, proto, index, feeds
        self.prepared, self.fresh, self.progress = prepared, fresh, progress
        self.names = [info.name for info in proto.graph.output]
        self.outputs: dict[str, list] = {}
        self.unrepeatable: set[int] = set()
        self.notes: list[str] = []
        self.noise = Noise(index, proto)
        self._noisy = model.with_proto(self.noise.proto)
        self._relative: list[float] = []
        self._drawn: dict[str, list[float]] = {}

    def run(self, kinds: tuple[str, ...], runner: Runner | None = None) -> None:
        """Run the original on these kinds of input, where that has not been done."""
        with runner or Runner(self.model, self.fresh) as open_runner:
            for kind in kinds:
                if kind in self.outputs:
                    continue
                self.progress(f"running the original on input '{kind}'")
                try:
                    self.outputs[kind] = [kept(output) for output in open_runner.run(None, self.feeds.make(kind))]
                except runtime_errors() as error:
                    self.notes.append(f"input '{kind}': onnxruntime cannot run the original: {said(error)}")

    def moves(self, kind: str, number: int) -> float:
        """Return how far rounding moves an output: as measured for this kind of input, else in proportion to the first kind."""
        if kind in self._drawn:
            return self._drawn[kind][number]
        return self._relative[number] * largest(_numbers(self.outputs[kind][number]))

    def draw(self, kind: str) -> None:
        """Measure the noise for one kind of input, by several draws."""
        self._drawn[kind] = [0.0] * len(self.names)
        with Runner(self._noisy, self.fresh) as runner:
            for turn in range(1, MORE_DRAWS + 1):
                self.progress(f"measuring the rounding noise on input '{kind}', draw {turn} of {MORE_DRAWS}")
                found = self._moved_by(runner, kind, turn, sums=True)
                self._drawn[kind] = [max(pair) for pair in zip(self._drawn[kind], found, strict=True)]

    def shaken(self, kind: str, draws: int = 1) -> Iterator[list]:
        """Yield what the original gives for one kind of input, draw by draw of the noise."""
        with Runner(self._noisy, self.fresh) as runner:
            for turn in range(draws):
                with contextlib.suppress(*runtime_errors()):
                    yield runner.run(None, self._disturbed(kind, turn, sums=draws > 1))

    def _disturbed(self, kind: str, turn: int, sums: bool = False) -> Feed:
        number = (*KINDS, *MORE_KINDS).index(kind)
        return self.noise.disturbed(self.feeds.make(kind), np.random.default_rng([self.feeds.seed, number, turn]), sums)

    def measure(self) -> None:
        """Measure how far the noise moves each output, as a part of its largest value: one draw, on the first kind of input."""
        kind = next((kind for kind in KINDS if kind in self.outputs), None)
        if kind is None or self._relative:
            return
        self.progress("measuring the rounding noise")
        with Runner(self._noisy, self.fresh) as runner:
            moves = self._moved_by(runner, kind, 0) if self._stands_still(runner, kind) else None
        if moves is None:
            self.noise = Noise(self.index, self.proto, inputs_only=True)
            self._noisy = self.model
            with Runner(self._noisy, self.fresh) as runner:
                moves = self._moved_by(runner, kind, 0)
        self._relative = [move / (largest(output) or 1.0) for move, output in zip(moves, map(_numbers, self.outputs[kind]), strict=True)]

    def _stands_still(self, runner: Runner, kind: str) -> bool:
        """Say whether the model with noise gives what the original gives, bit for bit, where the noise is zero."""
        try:
            still = runner.run(None, self.noise.still(self.feeds.make(kind)))
        except runtime_errors():  # an operator that wants this constant to be one
            return False
        different = {number for number, output in enumerate(still) if not same_bits(self.outputs[kind][number], output)}
        if not different:
            return True
        runner.close()
        with Runner(self.model, self.fresh) as again:
            repeated = again.run(None, self.feeds.make(kind))
        self.unrepeatable = {number for number, output in enumerate(repeated) if not same_bits(self.outputs[kind][number], output)}
        if different <= self.unrepeatable:
            return True
        self.notes.append("the rounding noise enters by the inputs alone: with its constants as inputs the original gives other values")
        return False

    def _moved_by(self, runner: Runner, kind: str, turn: int, sums: bool = False) -> list[float]:
        """Return how far one draw of the noise moves each output; nothing where the model does not run with it (an index out of range)."""
        try:
            noisy = runner.run(None, self._disturbed(kind, turn, sums))
        except runtime_errors():
            return [0.0] * len(self.names)
        pairs = zip(map(_numbers, self.outputs[kind]), map(_numbers, noisy), strict=True)
        return [moved(before, other) if before.shape == other.shape else 0.0 for before, other in pairs]


def _numbers(output: object) -> NDArray:
    """Return an output that holds numbers, an empty array for any other."""
    return output if isinstance(output, np.ndarray) and output.dtype.kind in "fiub" else np.empty(0)


def kept(output: object) -> object:
    """Return a copy of an output, a large one mapped from a temporary file.

    What onnxruntime gives lies in the memory of its session, all of which lives as long as one output does.
    """
    if not isinstance(output, np.ndarray) or output.dtype.kind == "O":
        return output
    if output.nbytes <= LARGEST_KEPT:
        return output.copy()
    with tempfile.TemporaryFile() as file:
        output.tofile(file)
        file.flush()
        return np.memmap(file, output.dtype, "r", shape=output.shape)
