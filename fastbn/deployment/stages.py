"""Stages of a deployment: their outputs compared with the original's, their latency, size, loading and memory measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastbn.deployment.compare import REFERENCE, Agreement, Original, compare, drop_of
from fastbn.deployment.labels import Marks, Rule
from fastbn.deployment.measure import kernels_of, load_times, resident_mb, size_of, trim
from fastbn.deployment.result import Stage, StageName
from fastbn.errors import ArgumentError
from fastbn.graph.runtime import runtime_errors, said, session
from fastbn.graph.timing import Timings, time_models, time_runs

if TYPE_CHECKING:
    from fastbn.deployment.samples import Samples
    from fastbn.deployment.verdict import Judge
    from fastbn.graph.model.index import Index
    from fastbn.graph.parity.feeds import Feed
    from fastbn.graph.runtime import Runner, Session

__all__ = ["compared_stages", "marks_for", "measured_stages", "timed"]

# Seconds that timed runs may take for each number of threads, where the caller says how many.
LATENCY_SECONDS = 1.0

# Is told what is being done.
Tell: TypeAlias = Callable[[str], None]


def marks_for(reference: Session, index: Index, samples: Samples, judge: Judge) -> Marks | None:
    """Return where the marks of each stage go, None without labels; raises ArgumentError where no output has classes for the labels."""
    if samples.labels is None:
        return None
    names = [entry.name for entry in reference.get_outputs()]
    try:
        outputs = reference.run(None, samples.feeds[0])
    except runtime_errors() as error:
        raise ArgumentError(f"Cannot run the model on the data: {said(error)}") from error
    rule = Rule.of(index, names, outputs, samples.labels[0], judge.scores)
    rule.check(samples.labels, f"'{samples.labels_name}'")
    return Marks(rule, samples.labels)


def compared_stages(
    files: Mapping[StageName, Path], reference: Runner, samples: Samples, judge: Judge, marks: Marks | None, tell: Tell
) -> list[Stage]:
    """Return the stages, their outputs compared with the original's."""
    original = Original(reference)
    original.keep(samples.feeds, tell)
    reference.close()  # it is opened again where it is needed again
    compared: dict[StageName, list[Agreement] | str] = {}
    for name, path in files.items():  # one after the other: all in memory at once would be most of what a deployment takes
        try:
            stage = {name: session(str(path), optimize=True)}
        except runtime_errors() as error:  # its optimizer may fail where the plain model loads
            compared[name] = f"onnxruntime cannot load it: {said(error)}"
            continue
        found = compare(original, stage, samples.feeds, judge.scores, tell, None if marks is None else marks.note)
        compared[name] = found[name]
        stage.clear()
        trim()
    # What onnxruntime's own optimizer changes in the original, or a random operator does, is no loss of a stage.
    usual: float | None = None
    stages = []
    for name in files:
        agreements = compared[name]
        if isinstance(agreements, str):
            stages.append(Stage(name, refused=agreements))
            continue
        loss = drop_of(agreements, judge.metric)
        if judge.metric == "accuracy" and marks is not None and loss != math.inf:
            loss = marks.loss(name, REFERENCE)
        usual = loss if usual is None else usual
        drop = None if loss is None else 0.0 if usual is None or loss <= usual else loss - usual
        accuracy = None if marks is None else marks.accuracy(name, "original")
        stages.append(Stage(name, agreements=tuple(agreements), accuracy=accuracy, drop=drop))
    return stages


def measured_stages(
    stages: Sequence[Stage], paths: Mapping[StageName, Path], feed: Feed, folder: Path, tell: Tell
) -> tuple[list[Stage], dict[str, list[float]]]:
    """Return the stages, those with paths measured, and what memory they take, as from `resident_mb`."""
    loads = load_times(paths, tell)
    memory = resident_mb({str(name): path for name, path in paths.items()})
    measured = []
    for stage in stages:
        if stage.name in paths:
            path = paths[stage.name]
            size, kernels = size_of(path), kernels_of(path, feed, folder)
            resident = float(np.median(memory[stage.name])) if memory.get(stage.name) else None
            stage = replace(stage, size=size, load_ms=loads[stage.name], resident_mb=resident, kernels=kernels)
        measured.append(stage)
    return measured, memory


def timed(models: Mapping[str, bytes | str], feed: Feed, runs: int | None, seed: int, tell: Tell) -> list[Timings]:
    """Return the Timings of models: of a number of runs, or of as many as it takes until the ratios are precise."""
    if runs is None:
        return time_models(models, feed, seed=seed, progress=tell)
    return time_runs(models, feed, runs, limit=LATENCY_SECONDS, seed=seed, progress=tell)
