"""The main job: find the levels, cut the model, take the statistics of each level in turn, write them into a copy of the model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastbn.errors import ArgumentError, ModelError, expected
from fastbn.graph.job import inlined_functions
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.storage import ModelLike, Source
from fastbn.graph.ops.normalization import BATCH_NORM, is_batch_norm
from fastbn.graph.options import Globs, check_named
from fastbn.graph.parity.comparable import is_random
from fastbn.graph.ranges import optional_callable, whole_number
from fastbn.graph.rewrite.output import Output
from fastbn.graph.runtime import Runnable, runtime_errors, said
from fastbn.reestimation.collections import deferred_partitions, is_collection
from fastbn.reestimation.engines import Engine, InProcess, Partition, Task
from fastbn.reestimation.inputs import Batches
from fastbn.reestimation.levels import LEFT, Left, Site, find_levels
from fastbn.reestimation.merging import Moments
from fastbn.reestimation.options import BATCH, MEMORY, Mode, Options
from fastbn.reestimation.partitions import Data, fixed_partitions
from fastbn.reestimation.pieces import cut, widened
from fastbn.reestimation.result import Reestimation, head_of, moved
from fastbn.reestimation.work import Parameters, Setting, as_parameters
from fastbn.reestimation.writing import written
from fastbn.stats import BatchStats
from fastbn.sync import update_running

if TYPE_CHECKING:
    from fastbn._types import Array, FloatArray

__all__ = ["Progress", "reestimate"]

# Is told (number of the step, number of steps, step, detail).
Progress: TypeAlias = Callable[[int, int, str, str], None]

# The mean and the variance of a site, in float64, as they are written.
Estimate: TypeAlias = "tuple[FloatArray, FloatArray]"


def reestimate(
    model: ModelLike,
    data: Data | Any,  # a collection of dask: dask has no types
    *,
    workers: int = 0,
    scheduler: str | None = None,
    client: Any = None,  # a distributed.Client
    mode: Mode = "population",
    batch: int = BATCH,
    samples: int | None = None,
    only: Globs | None = None,
    skip: Globs | None = None,
    momentum: float | None = None,
    unbiased: bool = False,
    memory: int | str = MEMORY,
    threads: int = 1,
    progress: Progress | None = None,
) -> Reestimation:
    """Estimate the running statistics of every inference batch normalization of a model again, from data.

    Means and variances become those of what really flows into each of them. Moments are merged in float64 (Chan, Golub & LeVeque 1979), in
    an order that depends on the data and `batch` alone, so the result has the same bits for any number of workers.

    Parameters
    ----------
    model : str, os.PathLike, bytes, onnx.ModelProto, onnx_ir.Model or torch.onnx.ONNXProgram
        The model; it is not changed.
    data : path, URL, array or tensor, dict of name -> array, iterable, dask.array or dict of them, dask.bag of dicts
        .npz, .npy and .pb files, folders and globs of them, also behind fsspec URLs (s3://, gs://, memory://), or a list of such. Axis 0 of
        an array counts samples; a .pb file and a dict in a list is one input as it is. Batches of another iterable (a DataLoader, a
        generator) are as `deploy` reads them: dicts, tensors, tuples with labels behind or not; all are read before the work begins.
    workers : int
        Processes on this machine that share the work (extra [cluster]); 0: this one alone, without dask.
    scheduler, client : str, distributed.Client, optional
        The address of a dask scheduler (tcp://host:8786), or a connection to one, whose workers do it.
    mode, batch, samples, only, skip, momentum, unbiased, memory, threads, progress
        What is estimated, and how: `fastbn.reestimation.Options` describes each; progress is told (number, total, step, detail).

    Returns
    -------
    Reestimation

    Raises
    ------
    StorageError, ModelError, ArgumentError, ArgumentTypeError, FastbnError
        A file cannot be read; the model is malformed or does not run on the data; the data do not fit it, are not finite, or have less than
        two values per channel; an option cannot be used; the cluster cannot be used, or its memory does not suffice.

    Examples
    --------
    >>> import fastbn, numpy, onnx
    >>> text = '<ir_version: 8, opset_import: ["" : 17]> tiny (float[N, 2] x) => (float[N, 2] y)'
    >>> tiny = f"{text} <float[2] s = {{1, 1}}, float[2] b = {{0, 0}}> {{ y = BatchNormalization (x, s, b, b, s) }}"
    >>> result = fastbn.reestimate(onnx.parser.parse_model(tiny), numpy.array([[1, 0], [3, 8]], numpy.float32))
    >>> result.statistics["y"].mean.tolist(), result.statistics["y"].var.tolist(), result.moved[0].channel
    ([2.0, 4.0], [1.0, 16.0], 1)
    """
    options = Options(mode, batch, samples, only, skip, momentum, unbiased, memory, threads)
    return _Job(model, options, progress).run(data, workers, scheduler, client)


class _Job:
    """One call of `reestimate`."""

    def __init__(self, model: ModelLike, options: Options, progress: Progress | None) -> None:
        self.began = time.perf_counter()
        self.options, self.progress = options, optional_callable(progress, "progress") or (lambda *_: None)
        given = storage.load(model)
        self.source = inlined_functions(given, (BATCH_NORM,)) or given
        self.index = Index(self.source)
        for where, globs in (("only", options.only), ("skip", options.skip)):
            check_named(self.index, globs or (), where)
        self.levels = find_levels(self.index, self.options.only, self.options.skip)  # type: ignore[arg-type]
        self.notes = list(self.source.notes)
        self.running = widened(self.source)
        self.run_index, self.run_levels = self.index, self.levels
        if self.running is not None:
            self.notes.extend(self.running.notes[len(self.source.notes) :])
            self.run_index = Index(self.running)
            self.run_levels = find_levels(self.run_index, self.options.only, self.options.skip)  # type: ignore[arg-type]
        if is_random(self.source.proto):
            self.notes.append("the model draws random numbers: another run gives other statistics")

    def run(self, data: Data, workers: int, scheduler: str | None, client: object) -> Reestimation:
        """Return the Reestimation."""
        if not self.levels.sites:
            return self._result({}, {}, None, 0)
        from fastbn import __version__

        cuts = cut(self.run_index, self.run_levels)
        inputs = Batches(self.run_index)
        self._tell(0, "reading the data")
        find = deferred_partitions if is_collection(data) else fixed_partitions
        partitions: Sequence[Partition] = find(data, inputs, self.options.batch, self.options.samples)
        self.notes.extend(dict.fromkeys(inputs.notes))
        dtypes = {site.number: site.dtypes for site in self.run_levels.sites}
        setting = Setting(self.options.threads, __version__)
        pieces, models = [piece for piece, _ in cuts], [model for _, model in cuts]
        assert isinstance(self.options.memory, int), "Options made it one"
        task = Task(partitions, pieces, models, inputs, setting, self.options.memory, dtypes)
        with self._engine(task, workers, scheduler, client) as engine:
            stats, estimates = self._estimated(engine)
        return self._result(stats, estimates, engine, len(partitions))

    @contextlib.contextmanager
    def _engine(self, task: Task, workers: int, scheduler: str | None, client: object) -> Iterator[Engine]:
        """Yield who does the work, and end it when the block ends."""
        if not whole_number(workers, "workers") and scheduler is None and client is None:
            engine: Engine = InProcess(task)
            with contextlib.closing(engine):
                yield engine
            return
        from fastbn.cluster.connection import connected
        from fastbn.reestimation.cluster import OnCluster

        self._tell(0, "starting workers" if scheduler is None and client is None else "reaching the cluster")
        present = {site.number: as_parameters(site.mean, site.var, site.dtypes) for site in self.run_levels.sites}
        with connected(workers, scheduler, client, task.memory) as connection:
            engine = OnCluster(task, connection, present)
            with contextlib.closing(engine):
                yield engine

    def _tell(self, level: int, step: str, detail: str = "") -> None:
        self.progress(level + 1, self._steps() + 2, step, detail)

    def _count(self, level: int, step: str, done: int, count: int) -> None:
        self._tell(level, step, f"{done} of {count} partitions")

    def _steps(self) -> int:
        return self.levels.depth if self.options.mode == "population" else 1

    def _estimated(self, engine: Engine) -> tuple[dict[Site, BatchStats], dict[Site, Estimate]]:
        """Return what each site has seen, and its new mean and variance."""
        stats: dict[Site, BatchStats] = {}
        estimates: dict[Site, Estimate] = {}
        if self.options.mode == "one-pass":
            levels = engine.normalize(partial(self._count, 1, "all levels"))
            for level, moments in enumerate(levels, 1):
                self._note(level, moments, stats, estimates)
            return stats, estimates
        for level in range(1, self.levels.depth + 1):
            name = f"level {level} of {self.levels.depth}"
            self._tell(level, name)
            moments = engine.measure(level, self._parameters(estimates), partial(self._count, level, name))
            self._note(level, moments, stats, estimates)
        return stats, estimates

    def _note(self, level: int, moments: Moments, stats: dict[Site, BatchStats], estimates: dict[Site, Estimate]) -> None:
        for site, own in zip(self.levels.of(level), moments, strict=True):
            if own.count < 2:
                raise ArgumentError(expected("at least two values per channel", str(own.count), f"data, at '{site.node.label}'"))
            stats[site] = own
            estimates[site] = self._estimate(site, own)

    def _estimate(self, site: Site, stats: BatchStats) -> Estimate:
        """Return the new mean and variance of a site as its type holds them, the old ones where it cannot."""
        mean, var = site.mean.copy(), site.var.copy()
        momentum = 1.0 if self.options.momentum is None else self.options.momentum
        if momentum == 1.0:  # an old value that is NaN must not stay
            mean, var = np.zeros_like(mean), np.zeros_like(var)
        update_running(mean, var, stats, momentum, self.options.unbiased)
        first, second = as_parameters(mean, var, site.dtypes)
        return first.astype(np.float64), second.astype(np.float64)

    def _parameters(self, estimates: Mapping[Site, Estimate]) -> Parameters:
        """Return the statistics of the levels so far, in the types that are run."""
        kinds = {site.number: site.dtypes for site in self.run_levels.sites}
        return {site.number: as_parameters(*estimate, kinds[site.number]) for site, estimate in estimates.items()}

    def _result(
        self, stats: Mapping[Site, BatchStats], estimates: Mapping[Site, Estimate], engine: Engine | None, partitions: int
    ) -> Reestimation:
        self._tell(self._steps() + 1, "verifying")
        good = {site: estimate for site, estimate in estimates.items() if all(np.isfinite(each).all() for each in estimate)}
        left = [
            *self.levels.left,
            *(Left(site.node.label, "not-representable", LEFT["not-representable"]) for site in estimates if site not in good),
        ]
        arrays = {site: as_parameters(*estimate, site.dtypes) for site, estimate in good.items()}
        output, notes = written(self.index, arrays)
        options = self.options
        return Reestimation(
            name=self.source.name,
            head=_head(self.source, self.index),
            output=output,
            mode=options.mode,
            moved=sorted((moved(site, *good[site], stats[site]) for site in good), key=lambda each: -each.distance),
            left=left,
            statistics={site.node.label: each for site, each in stats.items()},
            samples=engine.samples if engine else 0,
            partitions=partitions,
            depth=self.levels.depth,
            workers=engine.workers if engine else 0,
            unbiased=options.unbiased,
            momentum=options.momentum,
            verified=_verified(output, arrays) if good else None,
            notes=(*self.notes, *notes),
            seconds=time.perf_counter() - self.began,
        )


def _head(source: Source, index: Index) -> str:
    nodes = sum(len(graph.node) for graph in scopes_of(source.proto.graph)) + sum(len(each.node) for each in source.proto.functions)
    norms = sum(map(is_batch_norm, index.order))
    return head_of(source.name, index.opset, nodes, norms, source.size())


def _verified(output: Output, arrays: Mapping[Site, tuple[Array, Array]]) -> str:
    """Read the written model again and load it in onnxruntime; return what holds of it.

    Raises
    ------
    ModelError
        A site has other statistics than were written, or onnxruntime does not load the model.
    """
    source = output.source.derived(output.proto, edited=True)
    index = Index(source)
    nodes = {node.position: node for node in index.order if node.scope is index.main}
    for site, pair in arrays.items():
        for slot, array in zip((3, 4), pair, strict=True):
            value = nodes[site.node.position].required_input(slot)
            found = None if value.initializer is None else source.array(value.initializer)
            if found is None or found.dtype != array.dtype or found.tobytes() != array.tobytes():
                raise ModelError(f"Cannot write the model: '{site.node.label}' does not have its new statistics: a fault of fastbn")
    wide = widened(source)
    try:
        if wide is not None:
            Runnable.of(wide).session()
        elif output.is_external:
            Runnable.of(source).with_proto(output.proto).session()
        else:
            Runnable(output.to_bytes()).session()
    except runtime_errors() as error:
        raise ModelError(f"Cannot load the new model in onnxruntime: {said(error)}") from error
    return f"all {2 * len(arrays)} statistics are finite and stand in the new model, which onnxruntime loads"
