"""The quantized stage: made within its time, with as few nodes in float as it takes, and how many kernels the fold takes out of float."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastbn.deployment.compare import Original, compare, drop_of
from fastbn.deployment.data_free import Calibrated, DataFree, calibrated_models, feeds_wanted, trial_feeds, trial_seed
from fastbn.deployment.equalization_trial import EqualizationTrial
from fastbn.deployment.float_search import FloatSearch
from fastbn.deployment.measure import kernels_of, quick_ms, size_of
from fastbn.deployment.options import Options
from fastbn.deployment.quantize import Made, QuantizerRefused, quantized_already
from fastbn.deployment.quantizer import Quantizer
from fastbn.deployment.result import Quantization, Stage, StageName
from fastbn.deployment.samples import Samples, random_samples
from fastbn.deployment.trade_off import TradeOff
from fastbn.errors import ArgumentError
from fastbn.graph.fold_result import FoldResult
from fastbn.graph.model.index import Index
from fastbn.graph.parity.feeds import ModelNotRun
from fastbn.graph.runtime import Runner, runtime_errors, said, session

if TYPE_CHECKING:
    from fastbn.deployment.stages import Tell
    from fastbn.graph.model.storage import ModelLike

__all__ = ["QuantizedStage"]

# The unfolded model is quantized only to count its kernels: that may take these seconds, and so many times as long as the folded one did.
COUNTING_SECONDS, COUNTING = 30, 5


@dataclass(frozen=True)
class _Int8:
    """A quantized model at a path, and what makes it again with other nodes in float."""

    path: Path
    made: Made
    make: Callable[..., Made]


@dataclass(frozen=True)
class QuantizedStage:
    """How the quantized stage of a deployment is made.

    Attributes
    ----------
    options : Options
    workdir : Path
        Where its files lie.
    fold : callable
        (another form of the model, whether it is verified) -> FoldResult, as the model was folded.
    reference : Runner
        The original with onnxruntime's optimizer off.
    tell : callable of str
        Is told what is being done.
    """

    options: Options
    workdir: Path
    fold: Callable[[ModelLike, bool], FoldResult]
    reference: Runner
    tell: Tell

    def run(
        self,
        files: dict[StageName, Path],
        samples: Samples,
        index: Index,
        free: DataFree | None,
        allowed: tuple[Callable[[Path], Stage], float],
    ) -> Quantization:
        """Return what came of the quantization; a quantized model joins `files`. allowed is what compares one, and how much it may lose."""
        recipe = self.options.recipe()
        nodes = quantized_already(index.source.proto)
        if nodes:
            return Quantization(str(recipe), refused=f"the model is quantized already: it has {nodes}")
        notes: tuple[str, ...] = () if free is None else free.notes
        trial: EqualizationTrial | None = None
        feeds = samples.feeds if free is None else free.feeds
        with Quantizer(self.workdir, feeds, self.options.quantize_timeout) as quantizer:
            try:
                began = time.monotonic()
                int8, trial = self._int8(quantizer, files["folded"], index, free, began)
                notes += int8.made.notes
                spent = time.monotonic() - began
                session(str(int8.path), optimize=True)
                kernels = kernels_of(int8.path, samples.feeds[0], self.workdir)
                if kernels is not None and not kernels.other:
                    raise QuantizerRefused("onnxruntime's quantizer refuses the model: none of what it made runs in integers")
                files["quantized"], curve = self._searched(int8, samples, allowed, spent)
            except QuantizerRefused as reason:
                return Quantization(str(recipe), notes, str(reason), equalization=trial)
            except runtime_errors() as error:
                words = f"onnxruntime cannot load what its quantizer made: {said(error)}"
                return Quantization(str(recipe), notes, words, equalization=trial)
            if len(curve) > 1:
                kernels = kernels_of(files["quantized"], samples.feeds[0], self.workdir)
            limit = min(self.options.quantize_timeout, COUNTING_SECONDS + COUNTING * spent)
            counts = {
                "folded": None if kernels is None else kernels.float,
                **self._count_unfolded(quantizer, files["original"], samples, limit),
            }
        return Quantization(str(recipe), notes, None, counts, curve, trial)

    def _int8(
        self, quantizer: Quantizer, folded: Path, index: Index, free: DataFree | None, began: float
    ) -> tuple[_Int8, EqualizationTrial | None]:
        """Return the folded model in int8, and, where layers can be equalized, what says whether they are in it."""
        if free is None:
            return self._quantized(quantizer, Calibrated(folded, []), self.options.quantize_timeout), None
        plain, *others = calibrated_models(folded, free, index.source, self.fold, not self.options.per_tensor, self.tell)
        int8 = self._quantized(quantizer, plain, self.options.quantize_timeout)
        if not others:
            return int8, None
        trial = EqualizationTrial(others[0].layers, f"{free.kind} of another seed")
        rest = int(self.options.quantize_timeout - (time.monotonic() - began))
        if rest < 1:
            return int8, replace(trial, refused="no time is left to try; --quantize-timeout may give more")
        try:
            equalized = self._quantized(quantizer, others[0], rest)
        except QuantizerRefused as reason:
            return int8, replace(trial, refused=str(reason))
        trial = self._tried(trial, equalized.path, int8.path, index, free)
        return (equalized if trial.kept else int8), trial

    def _quantized(self, quantizer: Quantizer, model: Calibrated, seconds: float) -> _Int8:
        """Return a model in int8; raises QuantizerRefused."""
        target = self.workdir / ("quantized-equalized.onnx" if model.layers else "quantized.onnx")
        make = partial(quantizer.quantize, model.path, recipe=self.options.recipe(), restated=model.restated)
        return _Int8(target, make(target, seconds=seconds, progress=self.tell), make)

    def _tried(self, trial: EqualizationTrial, equalized: Path, plain: Path, index: Index, free: DataFree) -> EqualizationTrial:
        """Return what two models lose on inputs that have calibrated neither."""
        self.tell("int8 with layers equalized and without, on inputs of another seed")
        seed = trial_seed(self.options.seed)
        losses = list[float | None]()
        try:
            like = random_samples(self.reference, index, index.input_shapes, seed, feeds_wanted(free.feeds[0]))
            feeds = trial_feeds(index, like.feeds, free, seed)
            original = Original(self.reference)
            for path in (equalized, plain):
                found = compare(original, {"int8": session(str(path), optimize=True)}, feeds, ())["int8"]
                if isinstance(found, str):
                    return replace(trial, refused=found)
                losses.append(drop_of(found, "error"))
        except (ArgumentError, ModelNotRun) as error:
            return replace(trial, refused=str(error))
        except runtime_errors() as error:
            return replace(trial, refused=f"onnxruntime cannot run it: {said(error)}")
        finally:
            self.reference.close()
        inputs = f"{len(feeds)} {trial.inputs}"
        if None in losses:
            return replace(trial, inputs=inputs, refused="no output can be compared")
        return replace(trial, inputs=inputs, loss=losses[0], loss_without=losses[1])

    def _searched(
        self,
        int8: _Int8,
        samples: Samples,
        allowed: tuple[Callable[[Path], Stage], float],
        spent: float,
    ) -> tuple[Path, tuple[TradeOff, ...]]:
        """Return the quantized model with as few nodes in float as it takes to lose no more than it may, and the curve on the way;
        the model itself, and no curve, where that loses no more, or no search is wanted."""
        compared, max_drop = allowed
        drop = compared(int8.path).drop if self.options.float_nodes else None
        if drop is None or drop <= max_drop:
            return int8.path, ()
        limit = self.options.quantize_timeout - spent

        def quantize(path: Path, only: Sequence[str], left: Sequence[str]) -> Made:
            return int8.make(path, only=only, left=left, seconds=max(limit, 1.0))

        def cost(path: Path) -> tuple[int, float | None]:
            return size_of(path), quick_ms(path, samples.feeds[0])

        return FloatSearch(quantize, compared, cost, self.workdir, limit, self.tell).run(
            int8.path, int8.made.nodes, self.options.float_nodes, max_drop
        )

    def _count_unfolded(self, quantizer: Quantizer, original: Path, samples: Samples, limit: float) -> dict[str, int | None]:
        """Return how many kernels are left in float without the fold, with onnxruntime's own pre-processing and without it."""
        counts: dict[str, int | None] = {}
        for key, optimize in (("unfolded", True), ("unfolded_raw", False)):
            self.tell("the unfolded model, for comparison")
            target = self.workdir / f"{key}.onnx"
            try:
                # What is quantized does not depend on the ranges, so one feed will do.
                quantizer.quantize(original, target, recipe=self.options.recipe(), most_feeds=1, optimize=optimize, seconds=limit)
                kernels = kernels_of(target, samples.feeds[0], self.workdir)
            except QuantizerRefused:
                kernels = None
            counts[key] = None if kernels is None else kernels.float
        return counts
