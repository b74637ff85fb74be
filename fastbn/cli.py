"""The command: fastbn fold, deploy, verify, bench, show-config.

Exit codes: 0 done and verified, or nothing to do; 1 parity failed or nothing good enough, no model written; 2 usage, unreadable or invalid
model, models that cannot be compared: nothing written; 3 --strict and a batch normalization left; 4 the folded model written, but not the
quantised one, or nothing could be measured; 5 done, not verified: the parity of the whole model could not be tried, or is inconclusive;
70 an unexpected fault; 130 interrupted.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import traceback
from pathlib import Path

from fastbn.arguments import input_shapes, names, parser
from fastbn.errors import ArgumentError, FastbnError, StorageError, expected
from fastbn.terminal import Progress, Steps, complain, emit, flush, give_up, open_streams, width_of

__all__ = ["main"]

DONE, FAILED, UNUSABLE, LEFT, PARTIAL, UNVERIFIED, FAULT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 70, 130

# What stdin and stdout are called as IN and OUT.
STREAM = "-"


class _Run:
    """What one run of the command knows beside its arguments: which standard streams were closed, and the model on its way to its place."""

    def __init__(self):
        self.closed = open_streams()
        self.prepared = None

    @property
    def written(self):
        """A sentence for the end of a complaint."""
        return f"{self.prepared.path} is written" if self.prepared is not None and self.prepared.committed else "nothing written"


def main(argv=None):
    """Run the command with these arguments, sys.argv's by default, and return its exit code."""
    run = _Run()
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    try:
        arguments = _parsed(argv)
        arguments.command = shlex.join(["fastbn", *argv])
        code = arguments.run(arguments, run)
        flush(sys.stdout)
        return code
    except FastbnError as error:
        return _stop(error, UNUSABLE)
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else "fastbn"
        return _stop(expected("a file that can be used", (error.strerror or str(error)).lower(), where), UNUSABLE)
    except MemoryError:
        return _stop(expected("enough memory", "too little", "fastbn"), UNUSABLE)
    except KeyboardInterrupt:
        return _stop(f"interrupted, {run.written}", INTERRUPTED)
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        hint = "a fault of fastbn: --debug shows where"
        return _stop(f"Cannot go on, {run.written}: {type(error).__name__}{': ' if reason else ''}{reason} ({hint})", FAULT)


def _parsed(argv):
    try:
        return parser(COMMANDS).parse_args(argv)
    except SystemExit:  # the help is printed
        flush(sys.stdout)
        raise


def _stop(reason, code):
    complain(f"fastbn: {reason}")
    return code


def _fold(arguments, run):
    """Fold every inference BatchNormalization that can be folded exactly into its neighbours' weights; verify each fold and the whole model
    in onnxruntime, its optimiser off; say why each other one stays."""
    from fastbn.graph.job import fold

    name = _input(arguments.input)
    target = None if arguments.dry_run else _target(arguments, name)
    where = _report_path(arguments.json, [name], [target], run)
    source = _source(name)
    _check_version(source, target, arguments.force or arguments.in_place)
    _check_data_files([source], [where])
    bar = Progress(arguments.quiet)
    with bar:
        result = fold(
            source,
            only=names(arguments.only),
            skip=names(arguments.skip),
            verify=not (arguments.no_verify or arguments.dry_run),
            input_shapes=input_shapes(arguments),
            freeze_inputs=arguments.freeze_inputs,
            progress=bar,
            workdir=_stage(target),
        )
    status = None if result.parity is None else result.parity.status
    lines = result.lines()
    if target is None:
        lines.append("dry run: nothing verified, nothing written")
    if status == "failed":
        target = None
    _deliver(arguments, run, result, target, where, lines)
    if arguments.in_place and run.prepared is not None and _has_left_data(source, run.prepared):
        _mention(arguments, target, "note    the data files that the model had before are still there; it reads them no more")
    if status == "failed":
        complain(f"fastbn: {expected('parity with the original', str(result.parity), arguments.input)}; nothing written")
        return FAILED
    if _is_unverified(result.parity):
        return UNVERIFIED
    return LEFT if arguments.strict and result.kept else DONE


def _is_unverified(parity):
    """Say whether a parity that was asked for proves nothing, on stderr too."""
    if parity is None or parity.status not in ("not-run", "inconclusive"):
        return False
    complain(f"fastbn: done, not verified: {parity.reason or parity}")
    return True


def _input(name):
    """Return what IN means: a name, or "-"."""
    from fastbn.graph.rewrite.destination import descriptor_of

    if not name:
        raise ArgumentError(expected("a model", "an empty name", "IN"))
    return STREAM if name == STREAM or descriptor_of(name) == 0 else name


def _source(name):
    from fastbn.graph.model import storage

    return storage.load(storage.read_pipe(sys.stdin.buffer) if name == STREAM else name)


def _target(arguments, name):
    """Return where the result goes: a Path, or "-"."""
    output = arguments.output
    if arguments.in_place:
        if output is not None or not os.path.isfile(name):
            raise ArgumentError(expected("a file and no OUT", "another OUT" if output else "no file", "--in-place"))
        return _checked_target(name, None)
    if output is None:
        if name == STREAM:
            return STREAM
        if os.path.isdir(name):
            raise StorageError(expected("a model file", "a folder", name))
        path = Path(name)
        output = path.with_name(f"{path.stem}.folded.onnx")
    return _checked_target(output, name)


def _checked_target(output, name):
    """Return OUT as a Path or "-", checked as far as that is possible without the model."""
    from fastbn.graph.rewrite.destination import check_destination, descriptor_of

    if output == STREAM or descriptor_of(output) == 1:
        return STREAM
    if name not in (None, STREAM) and _is_same(output, name):
        raise ArgumentError(expected("an OUT that is not IN, or --in-place", "the same file", str(output)))
    check_destination(output)
    return Path(output)


def _is_same(path, other):
    with contextlib.suppress(ValueError):  # a NUL in a name
        return os.path.realpath(path) == os.path.realpath(other)
    return False


def _stage(target):
    """Return the folder in which the files of a verification may lie, or None."""
    from fastbn.graph.rewrite.destination import is_stream

    return None if target in (None, STREAM) or is_stream(target) else target.parent


def _check_version(source, target, force):
    """Refuse to replace what is no version of the model, and a data file that it reads."""
    from fastbn.graph.model.storage import model_in
    from fastbn.graph.rewrite.version import difference

    folder = _stage(target)
    if folder is None:
        return
    _check_data_files([source], [target])
    if force or not os.path.exists(target) or not os.path.getsize(target):
        return
    other = model_in(target)
    what = "a file that is no model" if other is None else difference(source.proto, other)
    if what is not None:
        what = what if other is None else f"a model with {what}"
        raise StorageError(expected("an OUT that is new or a version of IN, or --force", what, str(target)))


def _check_data_files(sources, paths):
    """Refuse to write over a data file that a model reads."""
    read = {path for source in sources for path in source.data_files()}
    for path in paths:
        if path not in (None, STREAM) and os.path.realpath(path) in read:
            raise StorageError(f"Cannot write '{path}': it is a data file of the input")


def _report_path(where, inputs, outputs, run):
    """Return where the JSON report goes, None, "-" or a name; refuse, before any work is done, one that could not be written or would
    replace a model."""
    from fastbn.graph.model.storage import model_in
    from fastbn.graph.rewrite.destination import check_destination, descriptor_of, is_stream

    if where is not None and (where == STREAM or descriptor_of(where) == 1):
        where = STREAM
    if STREAM in (where, *outputs) and "stdout" in run.closed:
        raise StorageError(expected("an open stdout", "a closed one", STREAM))
    if where in (None, STREAM):
        if where == STREAM and STREAM in outputs:
            raise ArgumentError(expected("one of model and report on stdout", "both", "--json"))
        return where
    check_destination(where)
    device = is_stream(where) and not os.path.isfile(where) and not Path(where).is_fifo()
    same = any(_is_same(where, other) for other in (*inputs, *outputs) if other not in (None, STREAM))
    if not device and (same or (os.path.isfile(where) and model_in(where) is not None)):
        raise ArgumentError(expected("a report that is no model", "the same file" if same else "a model", f"--json {where}"))
    return where


def _deliver(arguments, run, made, target, where, lines, page=None):
    """Write the model and the reports, and say so.

    All files are written under other names first, then comes the table, and only then does everything take its place: what fails before
    leaves nothing behind.
    """
    from fastbn.graph.report import size_text
    from fastbn.graph.rewrite.destination import is_stream
    from fastbn.graph.rewrite.replacement import atomic

    stream = _stream(arguments, target)
    # Places are taken in order, but what goes through a device or a pipe goes first: it may be full, and the model is to stand last.
    with contextlib.ExitStack() as after, contextlib.ExitStack() as files, contextlib.ExitStack() as before:
        data = made.to_bytes() if target == STREAM else None
        if isinstance(target, Path):
            run.prepared = files.enter_context(made.prepared(target))
        if page is not None:
            files_of = before if is_stream(arguments.report) else after
            files_of.enter_context(atomic(arguments.report)).write_text(page, encoding="utf-8")
        if where is not None:
            written = run.prepared.paths if run.prepared is not None else []
            paths = {"written": [str(path) for path in written]} | ({"report": arguments.report} if "report" in arguments else {})
            files_of = before if where != STREAM and is_stream(where) else after
            report = files_of.enter_context(atomic(where)) if where != STREAM else None
            _write_json(report, {**made.to_dict(), **paths})
        if data is not None:
            _write_stdout(data)
        if not arguments.quiet and where != STREAM:
            _say_all(lines, stream)
        flush(stream)
    if run.prepared is not None:
        _mention(arguments, target, f"wrote   {run.prepared.path}   {size_text(run.prepared.size)}")


def _stream(arguments, target):
    """Return where the table goes: when the model or the page goes to stdout, to stderr."""
    from fastbn.graph.rewrite.destination import descriptor_of

    page = getattr(arguments, "report", None)
    return sys.stderr if target == STREAM or (page is not None and descriptor_of(page) == 1) else sys.stdout


def _mention(arguments, target, line):
    """Print a line about what has been done: where that is not possible, it has been done all the same."""
    if arguments.quiet or arguments.json == STREAM:
        return
    try:
        _say_all([line], _stream(arguments, target))
        flush(_stream(arguments, target))
    except StorageError as error:
        complain(f"fastbn: {error}")


def _has_left_data(source, prepared):
    """Say whether a model that was replaced has left data files that the new one does not read."""
    written = {os.path.realpath(path) for path in prepared.paths}
    return any(os.path.exists(path) and path not in written for path in source.data_files())


def _write_stdout(data):
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        give_up(sys.stdout)
        raise StorageError(expected("a stream that takes the model", (error.strerror or str(error)).lower(), "stdout")) from error


def _say_all(lines, stream):
    from fastbn.graph.report import wrapped

    for line in wrapped(lines, width_of(stream)):
        emit(line, stream)


def _write_json(path, data):
    """Write a report, to stdout without a path."""
    text = json.dumps(data, indent=2)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
        return
    for line in text.splitlines():
        emit(line, sys.stdout)


def _write_report(where, data):
    """Write the report of a command that makes no model."""
    from fastbn.graph.rewrite.replacement import atomic

    if where == STREAM:
        _write_json(None, data)
    elif where is not None:
        with atomic(where) as temporary:
            _write_json(temporary, data)


def _deploy(arguments, run):
    """Fold the model and verify it, try int8 quantisation on request, compare the outputs of every stage with the original's, measure
    latency, size and loading in onnxruntime's default options, and write the best stage that loses no more than --max-drop."""
    from fastbn.deployment.pipeline import WRITING, Options, check_paths, deploy_watched
    from fastbn.deployment.report import render
    from fastbn.graph.rewrite.destination import check_destination, descriptor_of

    options = Options(
        data=arguments.data,
        quantize=arguments.quantize,
        max_drop=arguments.max_drop,
        metric=arguments.metric,
        only=names(arguments.only),
        skip=names(arguments.skip),
        input_shapes=input_shapes(arguments),
        freeze_inputs=arguments.freeze_inputs,
        seed=arguments.seed,
        runs=arguments.runs,
        most_samples=arguments.samples,
        min_samples=arguments.min_samples,
        quantize_timeout=arguments.quantize_timeout,
    )
    name = _input(arguments.input)
    check_paths(name, arguments.output, arguments.report, arguments.force)
    target = _checked_target(arguments.output, name)
    where = _report_path(arguments.json, [name, arguments.data], [target, arguments.report], run)
    if arguments.report is not None:
        check_destination(arguments.report)
        if descriptor_of(arguments.report) == 1 and STREAM in (target, where):
            raise ArgumentError(expected("one of model and reports on stdout", "several", "--report"))
    source = _source(name)
    _check_version(source, target, arguments.force)
    _check_data_files([source], [where, arguments.report])
    steps = Steps(arguments.quiet)
    with steps:
        made = deploy_watched(source, options, command=arguments.command, stage=_stage(target), progress=steps)
        steps(*WRITING)
        page = render(made) if arguments.report else None
    _deliver(arguments, run, made, target if made.shipped else None, where, made.lines(), page)
    if arguments.report:
        _mention(arguments, target, f"report  {arguments.report}")
    if made.status != "done":
        complain(f"fastbn: {made.shipped or 'nothing'} shipped: {made.decision}")
        return {"partial": PARTIAL, "refused": FAILED, "unverified": UNVERIFIED}[made.status]
    return DONE


def _verify(arguments, run):
    """Compare two models on the same inputs, onnxruntime's optimiser off on both sides: exit code 0 when they agree up to
    rounding, 1 when they do not, 2 when they cannot be compared, 5 when what was compared proves nothing."""
    from fastbn.graph.job import verify

    sources = [_source(_input(name)) for name in (arguments.original, arguments.folded)]
    where = _report_path(arguments.json, [arguments.original, arguments.folded], [], run)
    _check_data_files(sources, [where])
    bar = Progress(arguments.quiet)
    with bar:
        parity = verify(*sources, input_shapes=input_shapes(arguments), progress=bar)
    if parity.status == "failed" and parity.error is None:
        # No element differs: the second model cannot be run, or has other outputs.
        parity = dataclasses.replace(parity, status="not-run")
    _write_report(where, {"schema": _schema(), "parity": parity.to_dict()})
    if not arguments.quiet and where != STREAM:
        _say_all([f"parity  {parity}", *(f"        {note}" for note in parity.notes)], sys.stdout)
    if parity.status == "not-run":
        complain(f"fastbn: {expected('two models that can be compared', parity.reason, arguments.folded)}")
    elif parity.status == "inconclusive":
        complain(f"fastbn: not verified: {parity.reason or parity}")
    return {"ok": DONE, "failed": FAILED, "not-run": UNUSABLE, "inconclusive": UNVERIFIED}[parity.status]


def _schema():
    from fastbn.graph.results import SCHEMA

    return SCHEMA


def _bench(arguments, run):
    """Time two models in onnxruntime with its default options, run by run in turn, on one thread and on all: median and 90th percentile."""
    if arguments.runs < 1:
        raise ArgumentError(expected("at least 1 run", str(arguments.runs), "--runs"))
    from fastbn.graph.bench import bench

    sources = [_source(_input(name)) for name in (arguments.original, arguments.folded) if name is not None]
    where = _report_path(arguments.json, [arguments.original, arguments.folded], [], run)
    _check_data_files(sources, [where])
    rows = bench(*sources, runs=arguments.runs, input_shapes=input_shapes(arguments))
    _write_report(where, {"schema": _schema(), "bench": rows})
    if where != STREAM:
        from fastbn.graph.report import table

        cells = [["threads", "model", "median ms", "p90 ms", "of the original"]]
        for row in rows:
            cells.append([str(row["threads"]), row["model"], f"{row['median_ms']:.3f}", f"{row['p90_ms']:.3f}", f"{row['ratio']:.3f}"])
        _say_all(table(cells), sys.stdout)
    return DONE


def _show_config(arguments, run):
    """Print versions and kernels in use: what a bug report needs."""
    from fastbn.config import show_config

    config = show_config()
    if arguments.json:
        _write_json(None, config)
    else:
        width = max(map(len, config))
        for key, value in config.items():
            emit(f"{key:<{width}}  {', '.join(value) if isinstance(value, list) else value}", sys.stdout)
    return DONE


COMMANDS = {"fold": _fold, "deploy": _deploy, "verify": _verify, "bench": _bench, "show-config": _show_config}
