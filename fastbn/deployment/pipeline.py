"""The pipeline: fold and verify, quantise, compare the outputs, measure, decide."""

import os
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from fastbn.deployment.compare import METRICS, compare, drop_of
from fastbn.deployment.measure import kernels_of, load_times, resident_mb, size_of
from fastbn.deployment.options import FEWEST_ROWS, MOST_FEEDS, QUANTIZE_SECONDS, Options
from fastbn.deployment.quantize import QuantizerRefused, Recipe, quantized_already
from fastbn.deployment.quantizer import Quantizer
from fastbn.deployment.report import UNVERIFIED, template
from fastbn.deployment.result import Deployment, Quantization, Stage
from fastbn.deployment.samples import random_samples, read_samples
from fastbn.deployment.scores import row_outputs, score_outputs
from fastbn.errors import ArgumentError, StorageError, expected
from fastbn.graph.bench import side_by_side
from fastbn.graph.fold_result import planning_of
from fastbn.graph.job import checked_shapes, fold
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.parity.feeds import ModelNotRun
from fastbn.graph.reasons import first_few
from fastbn.graph.rewrite.destination import is_stream
from fastbn.graph.rewrite.workdir import runtime_workdir
from fastbn.graph.runtime import Runnable, runtime_errors, said, session

__all__ = ["WRITING", "Options", "check_paths", "deploy", "deploy_watched"]

# Rows of random input where there is no data: to compare on, and to calibrate on.
RANDOM_ROWS, RANDOM_ROWS_TO_CALIBRATE = 4, 32

# Seconds of timed runs for each number of threads.
LATENCY_SECONDS = 1.0

# The unfolded model is quantised only to count its kernels: that may take these seconds, and so many times as long as the folded one did.
COUNTING_SECONDS, COUNTING = 30, 5

# A ratio of medians below this is noise.
SLOWER = 1.05

STEPS = ("reading", "folding and verifying", "quantising", "comparing outputs", "measuring latency", "measuring loading", "writing")

# What the caller tells its progress when it writes.
WRITING = (len(STEPS), len(STEPS), STEPS[-1])


def deploy(
    model,
    output=None,
    *,
    data=None,
    quantize=False,
    report=None,
    force=False,
    max_drop=None,
    metric="auto",
    only=None,
    skip=None,
    input_shapes=None,
    freeze_inputs=False,
    seed=0,
    runs=50,
    most_samples=MOST_FEEDS,
    min_samples=FEWEST_ROWS,
    quantize_timeout=QUANTIZE_SECONDS,
):
    """Fold a model, verify it, quantise it on request, compare and measure every stage in onnxruntime, write the best that is good enough.

    Parameters
    ----------
    model : str, os.PathLike, bytes or onnx.ModelProto
        The model; it is not changed.
    output : path, optional
        Where the shipped model goes; without it, `save` of the result writes it.
    data : path, array, dict of name -> array, or list of such dicts, optional
        Samples to compare and to calibrate on, as in `deployment.samples.read_samples`. Without them, seeded normal random numbers.
    quantize : bool
        Try static int8 quantisation (QDQ, per channel) of the folded model.
    report : path, optional
        Where the HTML report goes (needs jinja2).
    force : bool
        Replace a report that exists.
    max_drop : float, optional
        How much a stage may lose. For metric "top-1": the part of rows whose largest score moves to another place (0.01 by default). For
        "error": ||y' - y|| / ||y|| of the worst output over all samples (0.1 by default). From 0 to 1. y is the original's with
        onnxruntime's optimiser off; what the optimiser changes in the original itself does not count.
    metric : str
        "top-1", "error", or "auto": top-1 where an output looks like the scores of a classifier (it ends in Softmax, or its width and
        name allow it).
    only, skip, input_shapes, freeze_inputs, seed
        As in `fold`.
    runs : int
        Timed runs of each stage, fewer where those of all stages would take longer than a second.
    most_samples, min_samples : int
        Feeds of the data that are used at most, evenly spaced (256); rows that calibrate at least (8).
    quantize_timeout : float
        Seconds that onnxruntime's quantiser may take for the model (300); it runs in a process of its own, which then is ended.

    Returns
    -------
    Deployment

    Raises
    ------
    StorageError, ModelError
        As in `fold`.
    ArgumentError, ArgumentTypeError
        An option or the data cannot be used.

    Examples
    --------
    >>> import fastbn  # doctest: +SKIP
    >>> deployment = fastbn.deploy("in.onnx", "out.onnx", data="samples.npz", quantize=True, report="report.html")  # doctest: +SKIP
    >>> deployment.shipped  # doctest: +SKIP
    'quantized'
    """
    options = Options(
        data, quantize, max_drop, metric, only, skip, input_shapes, freeze_inputs, seed, runs, most_samples, min_samples, quantize_timeout
    )
    check_paths(model, output, report, force)
    folder = Path(output).parent if output is not None else None
    deployment = deploy_watched(model, options, command=_call(model, output, report, options), stage=folder)
    if output is not None and deployment.shipped:
        deployment.save(output)
    if report is not None:
        deployment.save_report(report)
    return deployment


def _call(model, output, report, options):
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


def check_paths(model, output, report, force):
    """Refuse, before any work is done, an output or a report that could not be made or would replace what it must not."""
    given = os.path.realpath(model) if isinstance(model, (str, os.PathLike)) else None
    if output is not None and os.path.realpath(output) == given:
        raise ArgumentError(expected("an OUT that is not IN", "the same file", str(output)))
    if report is None:
        return
    template()
    if is_stream(report):
        return
    if os.path.realpath(report) in (given, output is not None and os.path.realpath(output)):
        raise ArgumentError(expected("a report that is no model", "the same file", str(report)))
    if os.path.isdir(report):
        raise StorageError(expected("a report file", "a folder", str(report)))
    if os.path.lexists(report) and not force:
        raise StorageError(expected("a report that does not exist yet, or --force (force=True)", "an existing file", str(report)))
    if not os.access(Path(report).parent, os.W_OK):
        raise StorageError(expected("a writable folder for the report", "one that is not", str(Path(report).parent)))


def deploy_watched(model, options, *, command, stage=None, progress=None):
    """Do what `deploy` does but for the writing; tell `progress`, a callable of (number, total, step, detail), what is being done, and put
    what lies between into a hidden folder in `stage`, a temporary one without it."""
    with runtime_workdir(stage) as workdir:
        return _Pipeline(model, options, command, workdir.path, progress or (lambda *_: None)).run()


class _Pipeline:
    """One model on its way through the stages."""

    def __init__(self, model, options, command, folder, progress):
        self.model = model
        self.options = options
        self.command = command
        self.folder = folder
        self.progress = progress
        self.step = None
        self.shapes = {}

    def _start(self, step):
        self.step = step
        self._tell("")

    def _tell(self, detail):
        self.progress(STEPS.index(self.step) + 1, len(STEPS), self.step, detail)

    def run(self):
        """Return the Deployment."""
        began = time.perf_counter()
        self._start("reading")
        source = storage.load(self.model)
        self.shapes = checked_shapes(self.options.input_shapes)
        index = Index(source, self.options.freeze_inputs, self.shapes)
        samples = None
        if self.options.data is not None:
            samples = read_samples(self.options.data, index, self.options.most_samples)
            self._check_enough(samples)
        metric, scores = self._metric(index)
        max_drop = METRICS[metric] if self.options.max_drop is None else self.options.max_drop
        folded = self._fold()
        quantization = Quantization(str(Recipe.here())) if self.options.quantize else None
        made = Deployment(folded, samples, metric, max_drop, quantization, self.command)
        reference, reason = self._reference(made, index)
        if folded.parity is not None and folded.parity.status == "failed":
            made.status = "refused"
            made.decision = f"the folded model differs from the original by more than rounding explains: {folded.parity}"
        elif reference is None:
            made.shipped, made.status = "folded", "partial"
            made.decision = f"not compared, timed or quantised, for {reason}"
            made.warnings.append(f"nothing was measured: {reason}")
            if quantization:
                quantization.refused = reason
        else:
            self._stages(made, source)
            if quantization:
                self._quantise(made, index)
            self._compare(made, reference, scores)
            self._measure(made)
            self._decide(made)
            made.warnings.extend(_warnings(made))
        if made.shipped:
            _not_verified(made)
        for stage in made.stages:
            stage.path = None  # its folder goes now
        made.seconds = time.perf_counter() - began
        return made

    def _check_enough(self, samples):
        if self.options.quantize and samples.rows < self.options.min_samples:
            where = "data" if not isinstance(self.options.data, (str, os.PathLike)) else str(self.options.data)
            raise ArgumentError(expected(f"at least {self.options.min_samples} samples to calibrate on", str(samples.rows), where))

    def _metric(self, index: Index) -> tuple[str, list[str]]:
        """Return (metric, names of the outputs whose decisions count)."""
        scores = score_outputs(index)
        if self.options.metric != "top-1":
            return self.options.metric if self.options.metric != "auto" else "top-1" if scores else "error", scores
        scores = scores or row_outputs(index)
        if not scores:
            raise ArgumentError(expected("an output of scores [N, C] for --metric top-1", "none that looks like one", "metric"))
        return "top-1", scores

    def _fold(self):
        self._start("folding and verifying")
        options = self.options
        return fold(
            self.model,
            only=options.only,
            skip=options.skip,
            input_shapes=options.input_shapes,
            freeze_inputs=options.freeze_inputs,
            seed=options.seed,
            progress=self._tell,
            workdir=self.folder,
        )

    def _reference(self, made, index):
        """Return (session of the original with the optimiser off, None), or (None, why there is none); make random samples where none are
        given."""
        try:
            reference = Runnable.of(index.source).session()
            if made.samples is None:
                rows = RANDOM_ROWS_TO_CALIBRATE if self.options.quantize else RANDOM_ROWS
                made.samples = random_samples(reference, index, self.shapes, self.options.seed, rows)
                what = "compared and calibrated" if self.options.quantize else "compared"
                made.warnings.append(f"no --data: {what} on random numbers; what they say of real inputs is little")
        except ModelNotRun as reason:
            return None, str(reason)
        except runtime_errors() as error:
            return None, f"onnxruntime cannot load the original: {said(error)}"
        return reference, None

    def _stages(self, made, source):
        """Write the files of the stages that there are so far."""
        original = source.path
        if original is None or (storage.utf8_path(original) is None and not source.data_files()):
            original = self.folder / "original.onnx"
            original.write_bytes(source.to_bytes())
        folded = self.folder / "folded.onnx"
        made.fold.save(folded)
        made.stages = [Stage("original", original), Stage("folded", folded)]

    def _quantise(self, made: Deployment, index: Index) -> None:
        self._start("quantising")
        nodes = quantized_already(index.source.proto)
        if nodes:
            made.quantization.refused = f"the model is quantized already: it has {nodes}"
            return
        with Quantizer(self.folder, made.samples.feeds, self.options.quantize_timeout) as quantizer:
            try:
                self._quantise_folded(made, quantizer)
            except QuantizerRefused as reason:
                made.quantization.refused = str(reason)
            except runtime_errors() as error:
                made.quantization.refused = f"onnxruntime cannot load what its quantiser made: {said(error)}"

    def _quantise_folded(self, made: Deployment, quantizer: Quantizer) -> None:
        """Make the stage "quantized", and count what is left in float with and without the fold."""
        recipe, feed = Recipe.here(), made.samples.feeds[0]
        target = self.folder / "quantized.onnx"
        began = time.monotonic()
        made.quantization.notes = quantizer.quantize(made.stage("folded").path, target, recipe=recipe, progress=self._tell)
        limit = min(self.options.quantize_timeout, COUNTING_SECONDS + COUNTING * (time.monotonic() - began))
        session(str(target), optimize=True)
        kernels = kernels_of(target, feed, self.folder)
        if kernels is not None and not kernels.other:
            raise QuantizerRefused("onnxruntime's quantiser refuses the model: none of what it made runs in integers")
        made.stages.append(Stage("quantized", target))
        made.quantized = target.read_bytes()
        counts = made.quantization.float_kernels
        counts["folded"] = kernels and kernels.float
        # What is quantised does not depend on the ranges, so one feed will do.
        for key, optimise in (("unfolded", True), ("unfolded_raw", False)):
            self._tell("the unfolded model, for comparison")
            other = self.folder / f"{key}.onnx"
            try:
                quantizer.quantize(made.stage("original").path, other, recipe=recipe, most_feeds=1, optimise=optimise, seconds=limit)
                found = kernels_of(other, feed, self.folder)
            except QuantizerRefused:
                found = None
            counts[key] = found and found.float

    def _compare(self, made, reference, scores):
        self._start("comparing outputs")
        sessions = {}
        for stage in made.stages:
            try:
                sessions[stage.name] = session(str(stage.path), optimize=True)
            except runtime_errors() as error:  # its optimiser may fail where the plain model loads
                stage.refused = f"onnxruntime cannot load it: {said(error)}"
        found = compare(reference, sessions, made.samples.feeds, scores, self._tell)
        # What onnxruntime's own optimiser changes in the original, or a random operator does, is no loss of a stage.
        usual = None
        for stage in [stage for stage in made.stages if stage.name in sessions]:
            if isinstance(found[stage.name], str):
                stage.refused = found[stage.name]
                continue
            stage.agreements = found[stage.name]
            loss = drop_of(stage.agreements, made.metric)
            usual = loss if usual is None else usual
            stage.drop = None if loss is None else 0.0 if loss <= usual else loss - usual

    def _measure(self, made):
        running = {stage.name: stage for stage in made.stages if stage.refused is None}
        if not running:
            return
        paths = {name: str(stage.path) for name, stage in running.items()}
        feed = made.samples.feeds[0]
        self._start("measuring latency")
        made.latency = side_by_side(paths, feed, self.options.runs, LATENCY_SECONDS, self._tell)
        self._start("measuring loading")
        loads = load_times(paths, self._tell)
        for name, stage in running.items():
            stage.size = size_of(stage.path)
            stage.load_ms = loads[name]
            stage.resident_mb = resident_mb(stage.path)
            stage.kernels = kernels_of(stage.path, feed, self.folder)

    def _decide(self, made):
        for stage in made.stages:
            if stage.refused is None and stage.drop is None and stage.name == "quantized":
                stage.refused = _loss(stage, made)
            elif stage.refused is None and stage.drop is not None and stage.drop > made.max_drop:
                stage.refused = self._too_much(stage, made)
        wanted = "quantized" if self.options.quantize else "folded"
        for name in dict.fromkeys((wanted, "folded")):
            stage = made.stage(name)
            if stage is not None and stage.refused is None:
                made.shipped = name
                break
        reasons = [made.quantization.refused] if made.quantization and made.quantization.refused else []
        reasons += [f"{stage.name}: {stage.refused}" for stage in made.stages[:0:-1] if stage.refused]
        made.status = "refused" if made.shipped is None else "done" if made.shipped == wanted else "partial"
        made.decision = "; ".join(reasons) or _loss(made.stage(made.shipped), made)

    def _too_much(self, stage: Stage, made: Deployment) -> str:
        """Return why a stage is refused, and, where nobody chose the metric and there is another, how to choose it."""
        spoilt = next((found for found in stage.agreements if found.relative == float("inf") and found.note), None)
        if spoilt:
            return f"{spoilt.note} in output '{spoilt.output}'"
        if self.options.metric != "auto" or not row_outputs(planning_of(made.fold).view.index):
            return _loss(stage, made)
        other = "error judges it by the error of the outputs" if made.metric == "top-1" else "top-1 judges a classifier by its decisions"
        return f"{_loss(stage, made)} (--metric {other})"


def _not_verified(made: Deployment) -> None:
    """Say, wherever it ends, that the whole model was not verified: its parity was not run, or proves nothing."""
    parity = made.fold.parity
    if parity is None or parity.status not in UNVERIFIED:
        return
    hint = " (--input-shape may help)" if parity.status == "not-run" else ""
    made.warnings.insert(0, f"the whole model was not verified{hint}: {parity.reason or parity}")
    if made.status == "done":
        made.status = "unverified"
    made.decision += f"; not verified: parity is {parity.status}"


def _warnings(made: Deployment) -> Iterator[str]:
    """Yield what the figures do not say by themselves."""
    skipped: dict[str, list[str]] = {}
    for found in made.stages[0].agreements:
        if found.relative is None:
            skipped.setdefault(found.note, []).append(f"'{found.output}'")
    for note, names in skipped.items():
        if len(names) == 1:
            yield f"output {names[0]} is not compared ({note})"
        else:
            yield f"{len(names)} outputs are not compared ({note}): {first_few(names)}"
    for stage in made.stages:
        for found in stage.agreements if made.metric == "top-1" else ():
            if found.top1 is None and found.relative is not None and found.relative > METRICS["error"]:
                yield f"output '{found.output}' of {stage.name} has a relative error of {found.relative:.2g}, which top-1 does not judge"
    for threads in sorted({row["threads"] for row in made.latency}):
        times = {row["model"]: row["median_ms"] for row in made.latency if row["threads"] == threads}
        ratio = times["quantized"] / times["folded"] if made.shipped == "quantized" and "folded" in times else 0
        if ratio > SLOWER:
            yield f"quantized takes {ratio:.2f} times as long as folded here, {threads} thread{'s' * (threads > 1)}"


def _loss(stage, made):
    """Return what a stage loses and what it may, as a sentence goes on."""
    if stage.drop is None:
        return f"no output can be compared by {made.metric}, so nothing says what it loses"
    if made.metric == "top-1" and stage.top1 is not None:
        rows = max(found.rows for found in stage.agreements)
        return f"{round(stage.drop * rows)} of {rows} decisions differ from the original's ({stage.drop:.1%}), {made.max_drop:.1%} may"
    return f"a relative error of {stage.drop:.2g} in the outputs, {made.max_drop:.2g} is allowed"
