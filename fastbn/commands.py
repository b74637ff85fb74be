"""The commands: what each one does with its arguments, and with which exit code it ends.

0 done and verified, or nothing to do; 1 parity failed or nothing good enough, no model written; 2 usage, unreadable or invalid model,
models that cannot be compared: nothing written; 3 --strict and a batch normalization left; 4 the folded model written, but not the
quantized one, or nothing could be measured; 5 done, not verified: the parity of the whole model could not be tried, or is inconclusive.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from fastbn.arguments import Arguments, input_shapes, names, sizes_in
from fastbn.delivery import (
    STREAM,
    Delivery,
    check_data_files,
    check_version,
    in_place,
    input_name,
    model_place,
    place_beside,
    print_json,
    source_of,
    workdir_of,
)
from fastbn.errors import ArgumentError
from fastbn.terminal import Progress, Steps, Tally, complain, emit

if TYPE_CHECKING:
    from fastbn.deployment.options import Options
    from fastbn.graph.digests import Digest

__all__ = ["COMMANDS", "UNUSABLE", "stop"]

DONE, FAILED, UNUSABLE, LEFT, PARTIAL, UNVERIFIED = 0, 1, 2, 3, 4, 5

Command: TypeAlias = Callable[[Arguments, Delivery], int]


def stop(reason: str, code: int) -> int:
    """Complain, and return the exit code."""
    complain(f"fastbn: {reason}")
    return code


def _end(delivery: Delivery, what: str, reason: object, code: int) -> int:
    """Say, for another exit code than 0, how it ended; and why, unless the report that is printed says so."""
    if code == DONE:
        return code
    return stop(f"{what} (exit code {code})" if delivery.is_shown else f"{what}: {reason}", code)


def _fold(arguments: Arguments, delivery: Delivery) -> int:
    """Fold every inference BatchNormalization that can be folded exactly into its neighbors' weights; verify each fold and the whole model
    in onnxruntime, its optimizer off; say why each other one stays."""
    from fastbn.graph.job import fold

    name = input_name(arguments.input)
    target = None
    if not arguments.dry_run:
        target = in_place(name, arguments.output) if arguments.in_place else place_beside(name, arguments.output, "folded")
    delivery.choose([name], target=target, json=arguments.json, quiet=arguments.quiet)
    source = source_of(name)
    check_version(source, target, arguments.force or arguments.in_place)
    check_data_files([source], [delivery.json])
    progress = Progress(arguments.quiet)
    with progress:
        result = fold(
            source,
            only=names(arguments.only),
            skip=names(arguments.skip),
            verify=not (arguments.no_verify or arguments.dry_run),
            input_shapes=input_shapes(arguments),
            freeze_inputs=arguments.freeze_inputs,
            as_inference=arguments.as_inference,
            rewrite_left=arguments.rewrite_left,
            progress=progress,
            workdir=workdir_of(target),
            explain=names(arguments.explain),
        )
    failed = result.parity is not None and result.parity.status == "failed"
    lines = result.lines()
    if target is None:
        lines.append("dry run: nothing verified, nothing written")
    if failed:
        delivery.target = None
    delivery.deliver(result.to_dict(), lines, result)
    if arguments.in_place and delivery.has_left_data(source):
        delivery.mention("note    the data files that the model had before are still there; it reads them no more")
    if failed:
        return _end(delivery, "Cannot write the folded model: it differs from the original", result.parity, FAILED)
    if result.parity is not None and result.parity.is_unverified:
        return _end(delivery, "done, not verified", result.parity.reason or result.parity, UNVERIFIED)
    return LEFT if arguments.strict and result.kept else DONE


def _options(arguments: Arguments) -> Options:
    """Return what is asked of a deployment."""
    from fastbn.deployment.options import Options

    return Options(
        data=arguments.data,
        quantize=arguments.quantize,
        max_drop=arguments.max_drop,
        metric=arguments.metric,
        labels=arguments.labels,
        ignore_unknown=arguments.ignore_unknown,
        goal=arguments.goal,
        max_slowdown=arguments.max_slowdown,
        only=names(arguments.only),
        skip=names(arguments.skip),
        input_shapes=input_shapes(arguments),
        freeze_inputs=arguments.freeze_inputs,
        as_inference=arguments.as_inference,
        rewrite_left=arguments.rewrite_left,
        seed=arguments.seed,
        runs=arguments.runs,
        most_samples=arguments.most_samples,
        min_samples=arguments.min_samples,
        quantize_timeout=arguments.quantize_timeout,
        calibration=arguments.calibration,
        exclude_nodes=names(arguments.exclude_nodes),
        weight_type=arguments.weight_type,
        per_tensor=arguments.per_tensor,
        data_free=arguments.data_free,
        float_nodes=arguments.float_nodes,
        reestimate=arguments.reestimate,
    )


def _deploy(arguments: Arguments, delivery: Delivery) -> int:
    """Fold the model and verify it, try int8 quantization on request, compare the outputs of every stage with the original's, measure
    latency, size and loading in onnxruntime's default options, and write the best stage that loses no more than --max-drop."""
    from fastbn.deployment.measure import give_back_large_blocks
    from fastbn.deployment.pipeline import WRITING, deploy
    from fastbn.deployment.places import check_paths
    from fastbn.deployment.report import render

    give_back_large_blocks()
    options = _options(arguments)
    name = input_name(arguments.input)
    output = arguments.output or ""  # the parser demands it
    check_paths(name, output, arguments.report, arguments.force, "--force")
    target = model_place(output, name)
    delivery.choose([name, arguments.data], target=target, json=arguments.json, page=arguments.report, quiet=arguments.quiet)
    source = source_of(name)
    check_version(source, target, arguments.force)
    check_data_files([source], [delivery.json, arguments.report])
    steps = Steps(arguments.quiet)
    with steps:
        deployment = deploy(source, **vars(options), progress=steps, workdir=workdir_of(target))
        deployment = dataclasses.replace(deployment, command=arguments.line)
        steps(*WRITING)
    if deployment.shipped is None:
        delivery.target = None

    def report(output: Sequence[Digest]) -> dict[str, object]:
        return {**deployment.written_as(output).to_dict(), "written": [], "report": arguments.report}

    def page(output: Sequence[Digest]) -> str:
        return render(deployment.written_as(output))

    delivery.deliver(report, deployment.lines(), deployment, page if arguments.report else None)
    if arguments.report:
        delivery.mention(f"report  {arguments.report}")
    code = {"done": DONE, "partial": PARTIAL, "refused": FAILED, "unverified": UNVERIFIED}[deployment.status]
    return _end(delivery, f"{deployment.shipped or 'nothing'} shipped", deployment.decision, code)


def _reestimate(arguments: Arguments, delivery: Delivery) -> int:
    """Estimate the mean and variance of every inference BatchNormalization again, from what flows into it over a data set: after weights
    were averaged, pruned or quantized, or for data from another source. Say how far each one moved."""
    from fastbn.cluster.connection import default_workers
    from fastbn.deployment.places import check_paths
    from fastbn.reestimation.job import reestimate

    name = input_name(arguments.input)
    target = None if arguments.dry_run else place_beside(name, arguments.output, "reestimated")
    paths = [path for group in arguments.paths for path in group]
    check_paths(name, target, arguments.report, arguments.force, "--force")
    delivery.choose([name, *paths], target=target, json=arguments.json, page=arguments.report, quiet=arguments.quiet)
    source = source_of(name)
    check_version(source, target, arguments.force)
    check_data_files([source], [delivery.json, arguments.report])
    steps = Steps(arguments.quiet)
    with steps:
        result = reestimate(
            source,
            paths,
            workers=default_workers() if arguments.workers is None and arguments.scheduler is None else arguments.workers or 0,
            scheduler=arguments.scheduler,
            mode=arguments.mode,
            batch=arguments.batch,
            samples=arguments.samples,
            only=names(arguments.only),
            skip=names(arguments.skip),
            momentum=arguments.momentum,
            unbiased=arguments.unbiased,
            memory=arguments.memory,
            threads=arguments.threads,
            progress=steps,
        )
    lines = result.lines()
    if target is None:
        lines.append("dry run: no model written")
    delivery.deliver(result.to_dict(), lines, result, (lambda _: result.page(arguments.line)) if arguments.report else None)
    if arguments.report:
        delivery.mention(f"report  {arguments.report}")
    return DONE


def _fold_all(arguments: Arguments, delivery: Delivery) -> int:
    """Fold and verify many models, each in a process of its own with limits of time and memory; skip what an earlier run has done. Exit
    code 1 when a model failed its parity, else 4 when one could not be folded, else 5 when one is not verified."""
    from fastbn.graph.rewrite.replacement import atomic
    from fastbn.zoo.job import fold_all

    flags = ("freeze_inputs", "as_inference", "no_verify", "force")
    options = [f"--{name.replace('_', '-')}" for name in flags if getattr(arguments, name)]
    options += [f"--rewrite-left={arguments.rewrite_left}"] if arguments.rewrite_left else []
    delivery.choose([], json=arguments.json, quiet=arguments.quiet)
    tally = Tally(arguments.quiet)
    with tally:
        zoo = fold_all(
            arguments.sources,
            arguments.out,
            workers=arguments.workers,
            scheduler=arguments.scheduler,
            jobs=arguments.jobs,
            timeout=arguments.timeout,
            memory=arguments.memory,
            options=options,
            again=arguments.again,
            progress=lambda done, count, last: tally(done, count, f"{last.source}: {last.status}" if last else "folding"),
        )
    rows = [json.dumps(each.to_dict()) for each in zoo.outcomes]
    if delivery.json == STREAM:
        for row in rows:
            emit(row, sys.stdout)
    elif delivery.json is not None:
        with atomic(delivery.json, "".join(f"{row}\n" for row in rows)):
            pass
    for line in zoo.lines() if delivery.json != STREAM else ():
        delivery.mention(line)
    code = (
        FAILED
        if zoo.count("parity")
        else PARTIAL
        if zoo.count("failed", "crashed", "time")
        else UNVERIFIED
        if zoo.count("unverified")
        else DONE
    )
    return _end(delivery, "not every model is folded and verified", zoo.lines()[-1], code)


def _verify(arguments: Arguments, delivery: Delivery) -> int:
    """Compare two models on the same inputs, onnxruntime's optimizer off on both sides: exit code 0 when they agree up to
    rounding, 1 when they do not, 2 when they cannot be compared, 5 when what was compared proves nothing."""
    from fastbn.graph.job import verify
    from fastbn.graph.report import parity_rows
    from fastbn.graph.results import SCHEMA, VerifyReport

    sources = [source_of(input_name(name)) for name in (arguments.original, arguments.folded)]
    delivery.choose([arguments.original, arguments.folded], json=arguments.json, quiet=arguments.quiet)
    check_data_files(sources, [delivery.json])
    progress = Progress(arguments.quiet)
    with progress:
        parity = verify(*sources, input_shapes=input_shapes(arguments), progress=progress)
    if parity.status == "failed" and parity.error is None:
        # No element differs: the second model cannot be run, or has other outputs.
        parity = dataclasses.replace(parity, status="not-run")
    lines = parity_rows(parity)
    report: VerifyReport = {"schema": SCHEMA, "parity": parity.to_dict()}
    delivery.deliver(report, [] if parity.status == "not-run" else lines)
    if parity.status == "not-run":
        return stop(f"Cannot compare the models: {parity.reason or parity}", UNUSABLE)
    if parity.status == "inconclusive":
        return _end(delivery, "not verified", parity.reason or parity, UNVERIFIED)
    return DONE if parity.ok else FAILED


def _bench(arguments: Arguments, delivery: Delivery) -> int:
    """Time two models in onnxruntime with its default options, run by run in turn, on one thread and on all: median and 90th percentile."""
    from fastbn.graph.bench import BenchReport, bench, latency_table
    from fastbn.graph.results import SCHEMA

    sources = [source_of(input_name(name)) for name in (arguments.original, arguments.other) if name is not None]
    delivery.choose([arguments.original, arguments.other], json=arguments.json, quiet=arguments.quiet)
    check_data_files(sources, [delivery.json])
    rows = bench(*sources, runs=arguments.runs or 0, input_shapes=input_shapes(arguments))
    report: BenchReport = {"schema": SCHEMA, "bench": rows}
    delivery.deliver(report, latency_table(rows))
    return DONE


def _bench_kernels(arguments: Arguments, delivery: Delivery) -> int:
    """Time inference, training and the backward pass of batch normalization on arrays of a shape, on one thread and on all, beside a copy
    of the same array; say which way the kernels take on this machine, and why."""
    from fastbn.kernel_bench import KernelBenchReport, bench_kernels, kernel_lines

    if arguments.dtype == "bfloat16":
        try:
            importlib.import_module("ml_dtypes")  # which gives NumPy this type
        except ImportError:
            raise ArgumentError("Cannot make arrays of bfloat16: ml_dtypes is not installed") from None
    shape = sizes_in(" ".join(arguments.shape), "SHAPE")
    bench = bench_kernels(shape, axis=arguments.axis, dtype=arguments.dtype, seconds=arguments.seconds)
    report: KernelBenchReport = {"schema": 1, **bench}
    return _print_report(report, kernel_lines(bench), arguments, delivery)


def _show_config(arguments: Arguments, delivery: Delivery) -> int:
    """Print versions and kernels in use: what a bug report needs."""
    from fastbn.config import show_config

    config = show_config()
    width = max(map(len, config))
    lines = [f"{key:<{width}}  {', '.join(value) if isinstance(value, list) else value}" for key, value in config.items()]
    return _print_report(config, lines, arguments, delivery)


def _print_report(report: Mapping[str, object], lines: list[str], arguments: Arguments, delivery: Delivery) -> int:
    """Deliver what is about arrays: without the ONNX wing, which may not be installed, where no file is written."""
    if arguments.json == STREAM:
        print_json(report)
    elif arguments.json is not None:
        delivery.choose([], json=arguments.json, quiet=arguments.quiet)
        delivery.deliver(report, lines)
    elif not arguments.quiet:
        for line in lines:
            emit(line, sys.stdout)
    return DONE


COMMANDS: dict[str, Command] = {
    "fold": _fold,
    "deploy": _deploy,
    "reestimate": _reestimate,
    "fold-all": _fold_all,
    "verify": _verify,
    "bench": _bench,
    "bench-kernels": _bench_kernels,
    "show-config": _show_config,
}
