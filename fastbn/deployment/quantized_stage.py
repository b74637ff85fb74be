"""The quantized stage: made within its time, with as few nodes in float as it takes, and how many kernels the fold takes out of float."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastbn.deployment.data_free import DataFree, calibrated_models
from fastbn.deployment.float_search import FloatSearch
from fastbn.deployment.measure import kernels_of, quick_ms, size_of
from fastbn.deployment.options import Options
from fastbn.deployment.quantize import Made, QuantizerRefused, quantized_already
from fastbn.deployment.quantizer import Quantizer
from fastbn.deployment.result import Quantization, Stage, StageName
from fastbn.deployment.samples import Samples
from fastbn.deployment.trade_off import TradeOff
from fastbn.graph.fold_result import FoldResult
from fastbn.graph.model.index import Index
from fastbn.graph.runtime import runtime_errors, said, session

if TYPE_CHECKING:
    from fastbn.deployment.stages import Tell
    from fastbn.graph.model.storage import ModelLike

__all__ = ["QuantizedStage"]

# The unfolded model is quantized only to count its kernels: that may take these seconds, and so many times as long as the folded one did.
COUNTING_SECONDS, COUNTING = 30, 5


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
    tell : callable of str
        Is told what is being done.
    """

    options: Options
    workdir: Path
    fold: Callable[[ModelLike, bool], FoldResult]
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
        target = self.workdir / "quantized.onnx"
        notes: tuple[str, ...] = () if free is None else free.notes
        feeds = samples.feeds if free is None else free.feeds
        with Quantizer(self.workdir, feeds, self.options.quantize_timeout) as quantizer:
            try:
                began = time.monotonic()
                path, restated = files["folded"], list[tuple[Path, list[int]]]()
                if free is not None:
                    per_channel = not self.options.per_tensor
                    path, restated, more = calibrated_models(path, free, index.source, self.fold, per_channel, self.tell)
                    notes += more
                make = partial(quantizer.quantize, path, recipe=recipe, restated=restated)
                made = make(target, progress=self.tell)
                notes += made.notes
                spent = time.monotonic() - began
                session(str(target), optimize=True)
                kernels = kernels_of(target, samples.feeds[0], self.workdir)
                if kernels is not None and not kernels.other:
                    raise QuantizerRefused("onnxruntime's quantizer refuses the model: none of what it made runs in integers")
                files["quantized"], curve = self._searched(make, target, made.nodes, samples, allowed, spent)
            except QuantizerRefused as reason:
                return Quantization(str(recipe), notes, str(reason))
            except runtime_errors() as error:
                return Quantization(str(recipe), notes, f"onnxruntime cannot load what its quantizer made: {said(error)}")
            if len(curve) > 1:
                kernels = kernels_of(files["quantized"], samples.feeds[0], self.workdir)
            limit = min(self.options.quantize_timeout, COUNTING_SECONDS + COUNTING * spent)
            counts = {
                "folded": None if kernels is None else kernels.float,
                **self._count_unfolded(quantizer, files["original"], samples, limit),
            }
        return Quantization(str(recipe), notes, float_kernels=counts, trade_off=curve)

    def _searched(
        self,
        make: Callable[..., Made],
        target: Path,
        nodes: Sequence[str],
        samples: Samples,
        allowed: tuple[Callable[[Path], Stage], float],
        spent: float,
    ) -> tuple[Path, tuple[TradeOff, ...]]:
        """Return the quantized model with as few nodes in float as it takes to lose no more than it may, and the curve on the way;
        `target`, and no curve, where that loses no more, or no search is wanted."""
        compared, max_drop = allowed
        drop = compared(target).drop if self.options.float_nodes else None
        if drop is None or drop <= max_drop:
            return target, ()
        limit = self.options.quantize_timeout - spent

        def quantize(path: Path, only: Sequence[str], left: Sequence[str]) -> Made:
            return make(path, only=only, left=left, seconds=max(limit, 1.0))

        def cost(path: Path) -> tuple[int, float | None]:
            return size_of(path), quick_ms(path, samples.feeds[0])

        return FloatSearch(quantize, compared, cost, self.workdir, limit, self.tell).run(target, nodes, self.options.float_nodes, max_drop)

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
