"""The pipeline: fold and verify, quantize, compare the outputs, measure, decide."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from fastbn.deployment.compare import Metric
from fastbn.deployment.data_free import DataFree, data_free, feeds_wanted
from fastbn.deployment.evidence import Comparison, Goal, comparisons
from fastbn.deployment.groups import Data
from fastbn.deployment.options import FEWEST_ROWS, FLOAT_NODES, MOST_FEEDS, QUANTIZE_SECONDS, Options
from fastbn.deployment.places import Location, call_text, check_paths
from fastbn.deployment.provenance import now_and_here
from fastbn.deployment.quantized_stage import QuantizedStage
from fastbn.deployment.recipe import Calibration, WeightType
from fastbn.deployment.reestimated import NewStatistics, halves, reestimated
from fastbn.deployment.result import Deployment, Quantization, Stage, StageName
from fastbn.deployment.samples import Samples, random_samples, read_samples
from fastbn.deployment.stages import compared_stages, marks_for, measured_stages, timed
from fastbn.deployment.verdict import Judge, Verdict, unverified_warning, warnings_about
from fastbn.errors import ArgumentError, expected
from fastbn.graph import job
from fastbn.graph.digests import Digest
from fastbn.graph.fold_result import FoldResult, planning_of
from fastbn.graph.model import storage
from fastbn.graph.model.files import utf8_path
from fastbn.graph.model.index import Index
from fastbn.graph.options import Globs, InputShapes, check_named, checked_globs, checked_shapes
from fastbn.graph.parity.feeds import ModelNotRun
from fastbn.graph.planner.substitute import RewriteForm
from fastbn.graph.ranges import optional_callable
from fastbn.graph.rewrite.output import Output, Written
from fastbn.graph.rewrite.workdir import runtime_workdir
from fastbn.graph.runtime import Runnable, Runner, runtime_errors, said

if TYPE_CHECKING:
    from fastbn.graph.model.storage import ModelLike
    from fastbn.graph.timing import Timings

__all__ = ["STEPS", "WRITING", "Progress", "check_paths", "deploy"]

# Is told (number of the step, number of steps, step, detail).
Progress: TypeAlias = Callable[[int, int, str, str], None]

# Rows of random input where there is no data: to compare on, and to calibrate on.
RANDOM_ROWS, RANDOM_ROWS_TO_CALIBRATE = 4, 32

STEPS = ("reading", "folding and verifying", "quantizing", "comparing outputs", "measuring latency", "measuring loading", "writing")

# What progress is told of the last step, by whoever writes.
WRITING = (len(STEPS), len(STEPS), STEPS[-1], "")


def deploy(
    model: ModelLike,
    output: Location | None = None,
    *,
    data: Data | None = None,
    quantize: bool = False,
    report: Location | None = None,
    force: bool = False,
    max_drop: float | None = None,
    metric: Metric | Literal["auto"] = "auto",
    labels: str | None = None,
    ignore_unknown: bool = False,
    goal: Goal = "latency",
    max_slowdown: float | None = None,
    only: Globs | None = None,
    skip: Globs | None = None,
    input_shapes: InputShapes | None = None,
    freeze_inputs: bool = False,
    as_inference: bool = False,
    rewrite_left: RewriteForm | None = None,
    seed: int = 0,
    runs: int | None = None,
    most_samples: int = MOST_FEEDS,
    min_samples: int = FEWEST_ROWS,
    quantize_timeout: float = QUANTIZE_SECONDS,
    calibration: Calibration = "minmax",
    exclude_nodes: Globs | None = None,
    weight_type: WeightType = "auto",
    per_tensor: bool = False,
    data_free: bool = False,
    float_nodes: int = FLOAT_NODES,
    reestimate: bool = False,
    progress: Progress | None = None,
    workdir: Location | None = None,
) -> Deployment:
    """Fold a model, verify it, quantize it on request, compare and measure every stage in onnxruntime, write the best that is good enough.

    Parameters
    ----------
    model, output, report, force
        The model, as in `fold`; where the shipped one and the HTML report (needs jinja2) go; whether a report that exists is replaced.
    data, quantize, max_drop, metric, labels, ignore_unknown, goal, max_slowdown, only, skip, input_shapes, freeze_inputs, ...
        What is folded and tried, and how it is judged: `fastbn.deployment.Options` describes each.
    progress, workdir : optional
        A callable that is told (number, total, step, detail); the folder of intermediate files, by default that of `output`.

    Raises FastbnError as `fold` does, and where the data cannot be used, or a place cannot be written to.
    """
    options = Options(
        *(data, quantize, max_drop, metric, labels, ignore_unknown, goal, max_slowdown),
        *(only, skip, input_shapes, freeze_inputs, as_inference, rewrite_left, seed),
        *(runs, most_samples, min_samples, quantize_timeout),
        *(calibration, exclude_nodes, weight_type, per_tensor),
        *(data_free, float_nodes, reestimate),
    )
    check_paths(model, output, report, force)
    pipeline = _Pipeline(model, options, call_text(model, output, report, options), progress)
    with runtime_workdir(workdir if output is None or workdir is not None else Path(output).parent) as room:
        made = pipeline.run(room.path)
    return _written(made, output, report, pipeline.progress)


def _written(deployment: Deployment, output: Location | None, report: Location | None, progress: Progress) -> Deployment:
    """Write what is asked for, and return the deployment, which says what its output is."""
    if output is not None or report is not None:
        progress(*WRITING)
    if output is not None and deployment.shipped:
        with deployment.prepared(output) as prepared:
            digests = prepared.digests()
        deployment = deployment.written_as(digests) if digests else deployment
    if report is not None:
        deployment.save_report(report)
    return deployment


@dataclass(frozen=True)
class _Trial:
    """What a deployment tried and measured; no stages where nothing could be measured."""

    samples: Samples | None
    quantization: Quantization | None
    stages: tuple[Stage, ...] = ()
    timings: Sequence[Timings] = ()
    comparisons: tuple[Comparison, ...] = ()
    quantized: bytes | None = None
    warnings: tuple[str, ...] = ()


class _Pipeline:
    """One model on its way through the steps; each returns what it found, and `run` makes a Deployment of that."""

    def __init__(self, model: ModelLike, options: Options, command: str, progress: Progress | None) -> None:
        self.model = model
        self.options = options
        self.command = command
        self.workdir = Path()
        self.progress = optional_callable(progress, "progress") or (lambda *_: None)
        self.step = STEPS[0]

    def _start(self, step: str) -> None:
        self.step = step
        self._tell("")

    def _tell(self, detail: str) -> None:
        self.progress(STEPS.index(self.step) + 1, len(STEPS), self.step, detail)

    def run(self, workdir: Path) -> Deployment:
        """Return the Deployment; intermediate files lie in the workdir."""
        began = time.perf_counter()
        self.workdir = workdir
        self._start("reading")
        given = storage.load(self.model)
        provenance = now_and_here(given)
        self.model = source = self._source(given)
        index = Index(source, self.options.freeze_inputs, checked_shapes(self.options.input_shapes))
        for where in ("exclude_nodes", *(() if source.proto.functions else ("only", "skip"))):  # a function's nodes are found by the fold
            check_named(index, checked_globs(getattr(self.options, where), where) or (), where)
        samples = self._read(index)
        judge = Judge.of(self.options, index, samples is not None and samples.labels is not None)
        index, samples, tried = self._new_statistics(index, samples, judge)
        source, fold = index.source, self._fold()
        trial, verdict = self._try(fold, index, samples, judge)
        verdict = verdict.after(fold.parity).with_statistics(tried)
        unverified = tuple(unverified_warning(fold.parity)) if verdict.shipped else ()
        made = Deployment(
            fold=fold,
            shipped=verdict.shipped,
            status=verdict.status,
            decision=verdict.decision,
            metric=judge.metric,
            max_drop=judge.max_drop,
            goal=judge.goal,
            max_slowdown=judge.max_slowdown,
            samples=trial.samples,
            stages=trial.stages,
            latency=[row for each in trial.timings for row in each.rows()],
            comparisons=trial.comparisons,
            quantization=trial.quantization,
            quantized=trial.quantized,
            new_statistics=tried,
            warnings=(*unverified, *trial.warnings),
            command=self.command,
            seconds=time.perf_counter() - began,
            provenance=replace(provenance, data=None if trial.samples is None else trial.samples.digest),
        )
        if made.shipped is None or source.data_files():  # whose names in the model are known when it is written
            return made
        return made.written_as([Digest.of_bytes("not written yet", made.to_bytes())])

    def _source(self, source: storage.Source) -> storage.Source:
        """Return the model that is folded, compared and measured: the one that was given, or its inference form."""
        options = self.options
        shapes = checked_shapes(options.input_shapes)
        return job.inference_form(source, options.freeze_inputs, shapes) if options.as_inference else source

    def _read(self, index: Index) -> Samples | None:
        """Return the samples that were given, if any were."""
        data = self.options.data
        if data is None:
            return None
        samples = read_samples(data, index, self.options.most_samples, self.options.labels, self.options.ignore_unknown)
        if self.options.quantize and samples.rows < self.options.min_samples:
            where = str(data) if isinstance(data, (str, os.PathLike)) else "data"
            raise ArgumentError(expected(f"at least {self.options.min_samples} samples to calibrate on", str(samples.rows), where))
        return samples

    def _new_statistics(self, index: Index, samples: Samples | None, judge: Judge) -> tuple[Index, Samples | None, NewStatistics | None]:
        """Return the model with new running statistics where accuracy does not fall with them, the samples that say so, and what came."""
        if not self.options.reestimate or samples is None:
            return index, samples, None
        estimated, held = halves(samples, self.options.seed)
        source, tried = reestimated(index, estimated, held, judge, lambda text: self._tell(f"estimating statistics: {text}"))
        if source is not None:
            self.model = source
            index = Index(source, self.options.freeze_inputs, checked_shapes(self.options.input_shapes))
        return index, held, tried

    def _fold(self) -> FoldResult:
        self._start("folding and verifying")
        return self._folded(self.model, True)

    def _folded(self, model: ModelLike, verify: bool) -> FoldResult:
        return job.fold(
            model,
            verify=verify,
            only=self.options.only,
            skip=self.options.skip,
            input_shapes=self.options.input_shapes,
            freeze_inputs=self.options.freeze_inputs,
            rewrite_left=self.options.rewrite_left,
            seed=self.options.seed,
            progress=self._tell,
            workdir=self.workdir,
        )

    def _try(self, fold: FoldResult, index: Index, given: Samples | None, judge: Judge) -> tuple[_Trial, Verdict]:
        """Try and judge the stages, as far as onnxruntime runs the model and its folded form is right."""
        asked = Quantization(str(self.options.recipe())) if self.options.quantize else None
        samples, reference, free, reason = given, None, None, ""
        try:
            reference, samples, free = self._reference(index, given)
        except ModelNotRun as error:
            reason = str(error)
        warnings = []
        if given is None and samples is not None:
            what = "compared and calibrated" if self.options.quantize else "compared"
            inputs = "random numbers" if free is None else free.kind
            warnings.append(f"no --data: {what} on {inputs}; what they say of real inputs is little")
        if fold.parity is not None and fold.parity.status == "failed":
            decision = f"the folded model differs from the original by more than rounding explains: {fold.parity}"
            return _Trial(samples, asked, warnings=tuple(warnings)), Verdict(None, "refused", decision)
        if reference is None or samples is None:
            refused = None if asked is None else replace(asked, refused=reason)
            trial = _Trial(samples, refused, warnings=(*warnings, f"nothing was measured: {reason}"))
            return trial, Verdict("folded", "partial", f"not compared, timed or quantized, for {reason}")
        return self._measured(fold, reference, index, (samples, free), judge, warnings)

    def _reference(self, index: Index, given: Samples | None) -> tuple[Runner, Samples, DataFree | None]:
        """Return a session of the original with the optimizer off, the samples, random ones where none are given, and what is calibrated
        on instead of them; raises ModelNotRun where onnxruntime does not load the original or does not run it on random numbers."""
        options = self.options
        is_free = options.quantize and options.data_free
        try:
            reference = Runner(Runnable.of(index.source))
            reference.session()
            if given is not None and not is_free:
                return reference, given, None
            rows = RANDOM_ROWS_TO_CALIBRATE if options.quantize else RANDOM_ROWS
            samples = random_samples(reference, index, index.input_shapes, options.seed, 1 if is_free else rows)
            if not is_free:
                return reference, samples, None
            samples = random_samples(reference, index, index.input_shapes, options.seed, feeds_wanted(samples.feeds[0]))
        except runtime_errors() as error:
            raise ModelNotRun(f"onnxruntime cannot load the original: {said(error)}") from error
        free = data_free(index, samples.feeds, options.seed)
        if free.restated:
            samples = replace(samples, feeds=free.feeds, origin=f"synthetic inputs, seed {options.seed}")
        return reference, samples if given is None else given, free

    def _measured(
        self,
        fold: FoldResult,
        reference: Runner,
        index: Index,
        inputs: tuple[Samples, DataFree | None],
        judge: Judge,
        warnings: list[str],
    ) -> tuple[_Trial, Verdict]:
        """Make, compare, measure and judge the stages; inputs are what is compared on, and what is calibrated on instead, if anything."""
        samples, free = inputs
        marks = marks_for(reference, index, samples, judge)
        files = self._files(fold, index.source)

        def compared_alone(path: Path) -> Stage:
            both: dict[StageName, Path] = {"original": files["original"], "quantized": path}
            return compared_stages(both, reference, samples, judge, marks_for(reference, index, samples, judge), lambda text: None)[-1]

        allowed = (compared_alone, judge.max_drop)
        quantization = None
        if self.options.quantize:
            self._start("quantizing")
            maker = QuantizedStage(self.options, self.workdir, self._folded, reference, self._tell)
            quantization = maker.run(files, samples, index, free, allowed)
        self._start("comparing outputs")
        index.source.give_pages_back()
        compared = compared_stages(files, reference, samples, judge, marks, self._tell)
        reference.close()
        stages, timings, memory = self._measure(compared, files, samples)
        sizes: dict[str, int] = {stage.name: stage.size for stage in stages if stage.size}
        found = comparisons(timings, sizes, memory)
        judged = tuple(judge.judged(stage, planning_of(fold).view.index) for stage in stages)
        verdict, judged = judge.verdict(judged, quantization, found, bool(fold.folded or fold.rewritten))
        quantized = files["quantized"].read_bytes() if "quantized" in files else None
        warnings += warnings_about(judged, judge.metric, judge.max_drop, verdict.shipped)
        return _Trial(samples, quantization, judged, timings, found, quantized, tuple(warnings)), verdict

    def _files(self, fold: FoldResult, source: storage.Source) -> dict[StageName, Path]:
        """Return the files of the stages that there are so far; they may lie in the workdir."""
        original = source.path
        if original is None or source.is_edited or (utf8_path(original) is None and not source.data_files()):
            original = self.workdir / "original.onnx"
            Output(source, source.is_edited, lambda: Written(source.proto, [])).save(original)
        folded = self.workdir / "folded.onnx"
        fold.save(folded)
        return {"original": original, "folded": folded}

    def _measure(
        self, stages: list[Stage], files: Mapping[StageName, Path], samples: Samples
    ) -> tuple[list[Stage], list[Timings], dict[str, list[float]]]:
        """Return the stages, those that run measured, their latency and their memory."""
        paths: dict[StageName, Path] = {stage.name: files[stage.name] for stage in stages if stage.refused is None}
        if not paths:
            return stages, [], {}
        self._start("measuring latency")
        models: dict[str, bytes | str] = {name: str(path) for name, path in paths.items()}
        timings = timed(models, samples.feeds[0], self.options.runs, self.options.seed, self._tell)
        self._start("measuring loading")
        measured, memory = measured_stages(stages, paths, samples.feeds[0], self.workdir, self._tell)
        return measured, timings, memory
