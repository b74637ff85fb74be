"""The pipeline: fold and verify, quantize, compare the outputs, measure, decide."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from fastbn.deployment.compare import METRICS, Metric, compare, drop_of
from fastbn.deployment.measure import kernels_of, load_times, resident_mb, size_of
from fastbn.deployment.options import FEWEST_ROWS, MOST_FEEDS, QUANTIZE_SECONDS, Options
from fastbn.deployment.quantize import QuantizerRefused, quantized_already
from fastbn.deployment.quantizer import Quantizer
from fastbn.deployment.recipe import Calibration, WeightType
from fastbn.deployment.report import template
from fastbn.deployment.result import Deployment, Quantization, Stage, StageName
from fastbn.deployment.samples import Data, Samples, random_samples, read_samples
from fastbn.deployment.scores import row_outputs, score_outputs
from fastbn.deployment.verdict import Judge, Verdict, unverified_warning, warnings_about
from fastbn.errors import ArgumentError, StorageError, expected
from fastbn.graph import job
from fastbn.graph.fold_result import FoldResult, planning_of
from fastbn.graph.job import Globs, InputShapes
from fastbn.graph.model import storage
from fastbn.graph.model.files import utf8_path
from fastbn.graph.model.index import Index
from fastbn.graph.parity.feeds import ModelNotRun
from fastbn.graph.planner.substitute import RewriteForm
from fastbn.graph.rewrite.destination import check_destination, is_stream, storage_errors
from fastbn.graph.rewrite.output import Output, Written
from fastbn.graph.rewrite.workdir import runtime_workdir
from fastbn.graph.runtime import Runnable, runtime_errors, said, session
from fastbn.graph.timing import Latency, Timings, time_models, time_runs

if TYPE_CHECKING:
    from fastbn.graph.model.storage import ModelLike
    from fastbn.graph.parity.feeds import Feed
    from fastbn.graph.runtime import Session

__all__ = ["STEPS", "WRITING", "Progress", "check_paths", "deploy"]

Location: TypeAlias = str | os.PathLike[str]

# Is told (number of the step, number of steps, step, detail).
Progress: TypeAlias = Callable[[int, int, str, str], None]

# Rows of random input where there is no data: to compare on, and to calibrate on.
RANDOM_ROWS, RANDOM_ROWS_TO_CALIBRATE = 4, 32

# Seconds that timed runs may take for each number of threads, where the caller says how many.
LATENCY_SECONDS = 1.0

# The unfolded model is quantized only to count its kernels: that may take these seconds, and so many times as long as the folded one did.
COUNTING_SECONDS, COUNTING = 30, 5

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
    progress: Progress | None = None,
    workdir: Location | None = None,
) -> Deployment:
    """Fold a model, verify it, quantize it on request, compare and measure every stage in onnxruntime, write the best that is good enough.

    Parameters
    ----------
    model : str, os.PathLike, bytes or onnx.ModelProto
        The model; it is not changed.
    output, report : path, optional
        Where the shipped model and the HTML report (needs jinja2) go; `save` and `save_report` of the result write them later.
    force : bool
        Replace a report that exists.
    data, quantize, max_drop, metric, only, skip, input_shapes, freeze_inputs, as_inference, rewrite_left, seed, runs, ...
        What is folded and tried, and how it is judged: `fastbn.deployment.Options` describes each.
    progress : callable of (number, total, step, detail), optional
        Is told what is being done.
    workdir : path, optional
        Folder for intermediate files; that of `output` by default, the system's temporary one without it.

    Raises
    ------
    StorageError, ModelError, ArgumentError, ArgumentTypeError
        As in `fold`; the data cannot be used, or a place cannot be written to.
    """
    options = Options(
        *(data, quantize, max_drop, metric, only, skip, input_shapes, freeze_inputs, as_inference, rewrite_left),
        *(seed, runs, most_samples, min_samples, quantize_timeout, calibration, exclude_nodes, weight_type, per_tensor),
    )
    check_paths(model, output, report, force)
    tell = progress or (lambda *_: None)
    with runtime_workdir(workdir if output is None or workdir is not None else Path(output).parent) as room:
        deployment = _Pipeline(model, options, _call(model, output, report, options), room.path, tell).run()
    _write(deployment, output, report, tell)
    return deployment


def _write(deployment: Deployment, output: Location | None, report: Location | None, progress: Progress) -> None:
    if output is not None or report is not None:
        progress(*WRITING)
    if output is not None and deployment.shipped:
        deployment.save(output)
    if report is not None:
        deployment.save_report(report)


def _call(model: ModelLike, output: Location | None, report: Location | None, options: Options) -> str:
    """Return the call as a report shows it: what is no number, text or path is three dots."""
    plain = (str, int, float)
    given = {"report": report} | {each.name: getattr(options, each.name) for each in fields(options)}
    usual = {"report": None} | {each.name: each.default for each in fields(options)}
    words = [repr(str(each)) if isinstance(each, (str, os.PathLike)) else "..." for each in (model, output) if each is not None]
    changed = {
        name: value for name, value in given.items() if not (value is usual[name] or (isinstance(value, plain) and value == usual[name]))
    }
    for name, value in changed.items():
        value = str(value) if isinstance(value, os.PathLike) else value
        words.append(f"{name}={value!r}" if isinstance(value, plain) else f"{name}=...")
    return f"fastbn.deploy({', '.join(words)})"


def check_paths(model: ModelLike, output: Location | None, report: Location | None, force: bool) -> None:
    """Refuse, before any work is done, an output or a report that could not be made or would replace what it must not."""
    given, written = (_real_path(place) for place in (model, output))
    if written is not None and written == given:
        raise ArgumentError(f"Cannot write '{output}': it is the input")
    if report is None:
        return
    template()
    if is_stream(report):
        return
    if _real_path(report) in (given, written):
        raise ArgumentError(f"Cannot write the report to '{report}': that is the input or the output")
    check_destination(report)
    if os.path.lexists(report) and not force:
        raise StorageError(f"Cannot write the report to '{report}': it exists; --force (force=True) replaces it")


def _real_path(place: object) -> str | None:
    """Return the path of a file with all links followed, None for what is no path."""
    if not isinstance(place, (str, os.PathLike)):
        return None
    with storage_errors(place):
        return os.path.realpath(place)


@dataclass(frozen=True)
class _Trial:
    """What a deployment tried and measured; no stages where nothing could be measured."""

    samples: Samples | None
    quantization: Quantization | None
    stages: tuple[Stage, ...] = ()
    latency: Sequence[Latency] = ()
    quantized: bytes | None = None
    warnings: tuple[str, ...] = ()


class _Pipeline:
    """One model on its way through the steps; each returns what it found, and `run` makes a Deployment of that."""

    def __init__(self, model: ModelLike, options: Options, command: str, workdir: Path, progress: Progress) -> None:
        self.model = model
        self.options = options
        self.command = command
        self.workdir = workdir
        self.progress = progress
        self.step = STEPS[0]

    def _start(self, step: str) -> None:
        self.step = step
        self._tell("")

    def _tell(self, detail: str) -> None:
        self.progress(STEPS.index(self.step) + 1, len(STEPS), self.step, detail)

    def run(self) -> Deployment:
        """Return the Deployment."""
        began = time.perf_counter()
        self._start("reading")
        self.model = source = self._source()
        index = Index(source, self.options.freeze_inputs, job.checked_shapes(self.options.input_shapes))
        job.check_named(index, self.options.exclude_nodes or (), "exclude_nodes")
        samples = self._read(index)
        judge = self._judge(index)
        fold = self._fold()
        trial, verdict = self._try(fold, index, samples, judge)
        verdict = verdict.after(fold.parity)
        unverified = tuple(unverified_warning(fold.parity)) if verdict.shipped else ()
        return Deployment(
            fold=fold,
            shipped=verdict.shipped,
            status=verdict.status,
            decision=verdict.decision,
            metric=judge.metric,
            max_drop=judge.max_drop,
            samples=trial.samples,
            stages=trial.stages,
            latency=trial.latency,
            quantization=trial.quantization,
            quantized=trial.quantized,
            warnings=(*unverified, *trial.warnings),
            command=self.command,
            seconds=time.perf_counter() - began,
        )

    def _source(self) -> storage.Source:
        """Return the model that is folded, compared and measured: the one that was given, or its inference form."""
        source, options = storage.load(self.model), self.options
        shapes = job.checked_shapes(options.input_shapes)
        return job.inference_form(source, options.freeze_inputs, shapes) if options.as_inference else source

    def _read(self, index: Index) -> Samples | None:
        """Return the samples that were given, if any were."""
        data = self.options.data
        if data is None:
            return None
        samples = read_samples(data, index, self.options.most_samples)
        if self.options.quantize and samples.rows < self.options.min_samples:
            where = str(data) if isinstance(data, (str, os.PathLike)) else "data"
            raise ArgumentError(expected(f"at least {self.options.min_samples} samples to calibrate on", str(samples.rows), where))
        return samples

    def _judge(self, index: Index) -> Judge:
        scores = score_outputs(index)
        metric = self.options.metric
        if metric == "top-1":
            scores = scores or row_outputs(index)
            if not scores:
                raise ArgumentError(expected("an output of scores [N, C] for --metric top-1", "none that looks like one", "metric"))
        chosen: Metric = metric if metric != "auto" else "top-1" if scores else "error"
        max_drop = METRICS[chosen] if self.options.max_drop is None else self.options.max_drop
        return Judge(chosen, max_drop, scores, metric != "auto")

    def _fold(self) -> FoldResult:
        self._start("folding and verifying")
        return job.fold(
            self.model,
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
        samples, reference, reason = given, None, ""
        try:
            reference, samples = self._reference(index, given)
        except ModelNotRun as error:
            reason = str(error)
        warnings = []
        if given is None and samples is not None:
            what = "compared and calibrated" if self.options.quantize else "compared"
            warnings.append(f"no --data: {what} on random numbers; what they say of real inputs is little")
        if fold.parity is not None and fold.parity.status == "failed":
            decision = f"the folded model differs from the original by more than rounding explains: {fold.parity}"
            return _Trial(samples, asked, warnings=tuple(warnings)), Verdict(None, "refused", decision)
        if reference is None or samples is None:
            refused = None if asked is None else replace(asked, refused=reason)
            trial = _Trial(samples, refused, warnings=(*warnings, f"nothing was measured: {reason}"))
            return trial, Verdict("folded", "partial", f"not compared, timed or quantized, for {reason}")
        return self._measured(fold, reference, index, samples, judge, warnings)

    def _reference(self, index: Index, given: Samples | None) -> tuple[Session, Samples]:
        """Return a session of the original with the optimizer off, and the samples, random ones where none are given; raises ModelNotRun
        where onnxruntime does not load the original or does not run it on random numbers."""
        try:
            reference = Runnable.of(index.source).session()
            if given is not None:
                return reference, given
            rows = RANDOM_ROWS_TO_CALIBRATE if self.options.quantize else RANDOM_ROWS
            return reference, random_samples(reference, index, index.input_shapes, self.options.seed, rows)
        except runtime_errors() as error:
            raise ModelNotRun(f"onnxruntime cannot load the original: {said(error)}") from error

    def _measured(
        self, fold: FoldResult, reference: Session, index: Index, samples: Samples, judge: Judge, warnings: list[str]
    ) -> tuple[_Trial, Verdict]:
        """Make, compare, measure and judge the stages."""
        files = self._files(fold, index.source)
        quantization = self._quantize(files, samples, index) if self.options.quantize else None
        compared = self._compare(files, reference, samples, judge)
        stages, latency = self._measure(compared, files, samples)
        judged = tuple(judge.judged(stage, planning_of(fold).view.index) for stage in stages)
        verdict = judge.verdict(judged, quantization)
        quantized = files["quantized"].read_bytes() if "quantized" in files else None
        warnings += warnings_about(judged, latency, judge.metric, verdict.shipped)
        return _Trial(samples, quantization, judged, latency, quantized, tuple(warnings)), verdict

    def _files(self, fold: FoldResult, source: storage.Source) -> dict[StageName, Path]:
        """Return the files of the stages that there are so far; they may lie in the workdir."""
        original = source.path
        if original is None or source.is_edited or (utf8_path(original) is None and not source.data_files()):
            original = self.workdir / "original.onnx"
            Output(source, source.is_edited, lambda: Written(source.proto, [])).save(original)
        folded = self.workdir / "folded.onnx"
        fold.save(folded)
        return {"original": original, "folded": folded}

    def _quantize(self, files: dict[StageName, Path], samples: Samples, index: Index) -> Quantization:
        """Return what came of the quantization; a quantized model joins `files`."""
        self._start("quantizing")
        recipe = self.options.recipe()
        nodes = quantized_already(index.source.proto)
        if nodes:
            return Quantization(str(recipe), refused=f"the model is quantized already: it has {nodes}")
        target = self.workdir / "quantized.onnx"
        notes: tuple[str, ...] = ()
        with Quantizer(self.workdir, samples.feeds, self.options.quantize_timeout) as quantizer:
            try:
                began = time.monotonic()
                notes = quantizer.quantize(files["folded"], target, recipe=recipe, progress=self._tell).notes
                limit = min(self.options.quantize_timeout, COUNTING_SECONDS + COUNTING * (time.monotonic() - began))
                session(str(target), optimize=True)
                kernels = kernels_of(target, samples.feeds[0], self.workdir)
                if kernels is not None and not kernels.other:
                    raise QuantizerRefused("onnxruntime's quantizer refuses the model: none of what it made runs in integers")
            except QuantizerRefused as reason:
                return Quantization(str(recipe), notes, str(reason))
            except runtime_errors() as error:
                return Quantization(str(recipe), notes, f"onnxruntime cannot load what its quantizer made: {said(error)}")
            counts = {
                "folded": None if kernels is None else kernels.float,
                **self._count_unfolded(quantizer, files["original"], samples, limit),
            }
        files["quantized"] = target
        return Quantization(str(recipe), notes, float_kernels=counts)

    def _count_unfolded(self, quantizer: Quantizer, original: Path, samples: Samples, limit: float) -> dict[str, int | None]:
        """Return how many kernels are left in float without the fold, with onnxruntime's own pre-processing and without it."""
        counts: dict[str, int | None] = {}
        for key, optimize in (("unfolded", True), ("unfolded_raw", False)):
            self._tell("the unfolded model, for comparison")
            target = self.workdir / f"{key}.onnx"
            try:
                # What is quantized does not depend on the ranges, so one feed will do.
                quantizer.quantize(original, target, recipe=self.options.recipe(), most_feeds=1, optimize=optimize, seconds=limit)
                kernels = kernels_of(target, samples.feeds[0], self.workdir)
            except QuantizerRefused:
                kernels = None
            counts[key] = None if kernels is None else kernels.float
        return counts

    def _compare(self, files: Mapping[StageName, Path], reference: Session, samples: Samples, judge: Judge) -> list[Stage]:
        """Return the stages, their outputs compared with the original's."""
        self._start("comparing outputs")
        sessions: dict[StageName, Session] = {}
        refused: dict[StageName, str] = {}
        for name, path in files.items():
            try:
                sessions[name] = session(str(path), optimize=True)
            except runtime_errors() as error:  # its optimizer may fail where the plain model loads
                refused[name] = f"onnxruntime cannot load it: {said(error)}"
        compared = compare(reference, sessions, samples.feeds, judge.scores, self._tell)
        # What onnxruntime's own optimizer changes in the original, or a random operator does, is no loss of a stage.
        usual: float | None = None
        stages = []
        for name in files:
            agreements = refused.get(name) or compared[name]
            if isinstance(agreements, str):
                stages.append(Stage(name, refused=agreements))
                continue
            loss = drop_of(agreements, judge.metric)
            usual = loss if usual is None else usual
            drop = None if loss is None else 0.0 if usual is None or loss <= usual else loss - usual
            stages.append(Stage(name, agreements=tuple(agreements), drop=drop))
        return stages

    def _measure(self, stages: list[Stage], files: Mapping[StageName, Path], samples: Samples) -> tuple[list[Stage], list[Latency]]:
        """Return the stages, those that run measured, and their latency."""
        paths = {stage.name: files[stage.name] for stage in stages if stage.refused is None}
        if not paths:
            return stages, []
        feed = samples.feeds[0]
        self._start("measuring latency")
        latency = [row for timings in self._time(paths, feed) for row in timings.rows()]
        self._start("measuring loading")
        loads = load_times(paths, self._tell)
        measured = []
        for stage in stages:
            if stage.name in paths:
                path = paths[stage.name]
                size, memory, kernels = size_of(path), resident_mb(path), kernels_of(path, feed, self.workdir)
                stage = replace(stage, size=size, load_ms=loads[stage.name], resident_mb=memory, kernels=kernels)
            measured.append(stage)
        return measured, latency

    def _time(self, paths: Mapping[StageName, Path], feed: Feed) -> list[Timings]:
        models: dict[str, bytes | str] = {name: str(path) for name, path in paths.items()}
        runs, seed = self.options.runs, self.options.seed
        if runs is None:
            return time_models(models, feed, seed=seed, progress=self._tell)
        return time_runs(models, feed, runs, limit=LATENCY_SECONDS, seed=seed, progress=self._tell)
