"""The command: fastbn fold, deploy, verify, bench, show-config.

Exit codes: 0 done and verified, or nothing to do; 1 parity failed or nothing good enough, no model written; 2 usage, unreadable or invalid
model; 3 --strict and a batch normalization left; 4 the folded model written, but not the quantised one, or nothing could be measured;
130 interrupted.
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

from fastbn.errors import ArgumentError, FastbnError, StorageError, expected

__all__ = ["main"]

# Characters of a progress bar.
BAR = 20

DONE, FAILED, UNUSABLE, LEFT, PARTIAL, UNVERIFIED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


class _Parser(argparse.ArgumentParser):
    """argparse with errors in one line."""

    def error(self, message):
        raise ArgumentError(expected("arguments as in --help", message, self.prog))


def main(argv=None):
    """Run the command with these arguments, sys.argv's by default, and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.command = shlex.join(["fastbn", *map(str, sys.argv[1:] if argv is None else argv)])
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except FastbnError as error:
        _say(f"fastbn: {error}", sys.stderr)
        return UNUSABLE
    except BrokenPipeError:
        _close_stdout()
        return DONE
    except OSError as error:
        _close_stdout()
        _say(f"fastbn: {expected('a stream that takes the output', (error.strerror or str(error)).lower(), 'stdout')}", sys.stderr)
        return UNUSABLE
    except MemoryError:
        _say(f"fastbn: {expected('enough memory', 'too little', 'fastbn')}", sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        _say("fastbn: interrupted, nothing written", sys.stderr)
        return INTERRUPTED


def _close_stdout():
    # What is still in the buffer has nowhere to go, and Python would try once more when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text, stream):
    """Print one line, coloured on a terminal."""
    print(_coloured(_printable(text, stream), stream), file=stream)


def _printable(text, stream):
    """Return a text as a stream takes it: names may hold control characters, or some that it has no code for."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _parser():
    parser = _Parser(prog="fastbn", description="Batch normalization on CPUs: fold it out of ONNX models, verify, measure.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    fold = commands.add_parser("fold", help="fold every batch normalization that can be folded exactly", description=_fold.__doc__)
    fold.add_argument("input", metavar="IN", help="the model; - reads it from stdin")
    fold.add_argument("output", metavar="OUT", nargs="?", help="the folded model (IN with .folded.onnx); - writes it to stdout")
    fold.add_argument("--dry-run", action="store_true", help="plan and report, verify and write nothing")
    fold.add_argument("--json", metavar="FILE", help="write the report as JSON; - writes it to stdout instead of the table")
    _add_selection(fold)
    fold.add_argument("--no-verify", action="store_true", help="do not run the fold and the model in onnxruntime")
    fold.add_argument("--strict", action="store_true", help="exit with 3 when a batch normalization is left")
    fold.add_argument("--in-place", action="store_true", help="replace IN")
    fold.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    _add_input_shape(fold)
    fold.set_defaults(run=_fold)

    deploy = commands.add_parser("deploy", help="fold, verify, quantise on request, compare and measure", description=_deploy.__doc__)
    deploy.add_argument("input", metavar="IN", help="the model")
    deploy.add_argument("output", metavar="OUT", help="where the best stage that is good enough goes")
    deploy.add_argument("--data", metavar="PATH", help="samples: .npz, .npy, .pb, or a folder of them; without it, random numbers")
    deploy.add_argument("--quantize", action="store_true", help="try static int8 quantisation, calibrated on the data")
    deploy.add_argument("--report", metavar="FILE", help="write the report as one HTML file (needs jinja2)")
    deploy.add_argument("--json", metavar="FILE", help="write the report as JSON; - writes it to stdout instead of the table")
    deploy.add_argument("--force", action="store_true", help="replace an existing --report")
    deploy.add_argument(
        "--max-drop", type=float, metavar="X", help="the most a stage may lose (0.01 of the decisions, or a relative error of 0.1)"
    )
    deploy.add_argument(
        "--quantize-timeout", type=float, default=300.0, metavar="SECONDS", help="what quantising the model may take at most (300)"
    )
    deploy.add_argument("--metric", default="auto", choices=["auto", "top-1", "error"], help="what a stage is judged by (auto)")
    deploy.add_argument("--runs", type=int, default=50, metavar="N", help="timed runs of each stage, fewer where all take over 1 s (50)")
    deploy.add_argument("--samples", type=int, default=256, metavar="N", help="feeds of the data that are used at most (256)")
    deploy.add_argument("--min-samples", type=int, default=8, metavar="N", help="samples that --quantize asks for at least (8)")
    deploy.add_argument("--seed", type=int, default=0, metavar="N", help="of the random inputs (0)")
    deploy.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    _add_selection(deploy)
    _add_input_shape(deploy)
    deploy.set_defaults(run=_deploy)

    verify = commands.add_parser("verify", help="compare two models on the same inputs", description=_verify.__doc__)
    verify.add_argument("original", metavar="A")
    verify.add_argument("folded", metavar="B")
    verify.add_argument("--json", metavar="FILE", help="write the result as JSON; - writes it to stdout instead of the line")
    verify.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    _add_input_shape(verify)
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="latency of two models in onnxruntime, side by side", description=_bench.__doc__)
    bench.add_argument("original", metavar="A")
    bench.add_argument("folded", metavar="B", nargs="?", help="without it, A folded in memory")
    bench.add_argument("--runs", type=int, default=50, metavar="N", help="timed runs of each model (50)")
    bench.add_argument("--json", metavar="FILE", help="write the result as JSON; - writes it to stdout instead of the table")
    _add_input_shape(bench)
    bench.set_defaults(run=_bench)

    config = commands.add_parser("show-config", help="versions and kernels in use", description=_show_config.__doc__)
    config.add_argument("--json", action="store_true", help="as JSON")
    config.set_defaults(run=_show_config)
    return parser


def _add_selection(parser):
    parser.add_argument("--only", metavar="GLOB", action="append", help="fold only nodes of these names (repeatable)")
    parser.add_argument("--skip", metavar="GLOB", action="append", help="never fold nodes of these names (repeatable)")
    parser.add_argument("--freeze-inputs", action="store_true", help="make constants of initializers that are also graph inputs")


def _add_input_shape(parser):
    parser.add_argument("--input-shape", metavar="NAME=D,D,...", action="append", default=[], help="sizes of a graph input (repeatable)")


def _input_shapes(arguments):
    shapes = {}
    for text in arguments.input_shape:
        name, equals, sizes = text.rpartition("=")
        numbers = sizes.split(",") if sizes else []
        if not (name and equals) or not all(size.isdecimal() and int(size) for size in numbers):
            raise ArgumentError(expected("NAME=D,D,... with positive sizes, as x=1,3,224,224", repr(text), "--input-shape"))
        shapes[name] = tuple(map(int, numbers))
    return shapes


def _fold(arguments):
    """Fold every inference BatchNormalization that can be folded exactly into its neighbours' weights; verify each fold and the whole model
    in onnxruntime, its optimiser off; say why each other one stays."""
    from fastbn.graph.folding import fold_watched

    target = None if arguments.dry_run else _target(arguments)
    _check_json(arguments.json, [arguments.input, target])
    bar = _Progress(arguments.quiet)
    with bar:
        result = fold_watched(
            _source(arguments.input),
            only=arguments.only,
            skip=arguments.skip,
            verify=not (arguments.no_verify or arguments.dry_run),
            input_shapes=_input_shapes(arguments),
            freeze_inputs=arguments.freeze_inputs,
            progress=bar,
            stage=target.parent if isinstance(target, Path) else None,
        )
    failed = result.parity is not None and result.parity.status == "failed"
    written = []
    if target is not None and not failed:
        if target == "-":
            _write_stdout(result.to_bytes())
        else:
            written = result.save(target)
    _report(arguments, result, target, written)
    if failed:
        _say(f"fastbn: {expected('parity with the original', str(result.parity), arguments.input)}; nothing written", sys.stderr)
        return FAILED
    return LEFT if arguments.strict and result.kept else DONE


def _target(arguments):
    """Return where the result goes: a Path, or "-"."""
    name, output = arguments.input, arguments.output
    if arguments.in_place:
        if output is not None or name == "-":
            raise ArgumentError(expected("a file and no OUT", "another OUT" if output else "stdin", "--in-place"))
        return Path(name)
    if output is None:
        if name == "-":
            return "-"
        path = Path(name)
        output = path.with_name(f"{path.stem}.folded.onnx")
    if output == "-":
        return output
    path = Path(output)
    if name != "-" and os.path.realpath(path) == os.path.realpath(name):
        raise ArgumentError(expected("an OUT that is not IN, or --in-place", "the same file", str(path)))
    _check_folder(path)
    return path


def _source(name):
    return sys.stdin.buffer.read() if name == "-" else name


def _write_stdout(data):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _report(arguments, result, target, written):
    if arguments.json:
        _write_json(arguments.json, {**result.to_dict(), "written": [str(path) for path in written]})
    if arguments.quiet or arguments.json == "-":
        return
    # When the model goes to stdout, the table goes to stderr.
    stream = sys.stderr if target == "-" else sys.stdout
    for line in result.lines():
        _say(line, stream)
    if target is None:
        _say("dry run: nothing verified, nothing written", stream)
    if arguments.in_place and len(written) > 1:
        _say("note    the data files that the model had before are still there; it reads them no more", stream)
    if written:
        from fastbn.graph.report import size_text

        _say(f"wrote   {written[0]}   {size_text(sum(path.stat().st_size for path in written))}", stream)


def _check_json(where, others):
    """Refuse, before any work is done, a report that could not be written or would replace a model."""
    if where is None:
        return
    if where == "-":
        if "-" in others[1:]:
            raise ArgumentError(expected("one of model and report on stdout", "both", "--json"))
        return
    path = Path(where)
    if any(other is not None and os.path.realpath(path) == os.path.realpath(other) for other in others):
        raise ArgumentError(expected("a report that is no model", "the same file", f"--json {where}"))
    _check_folder(path)


def _check_folder(path):
    if path.is_dir():
        raise StorageError(expected("an output file", "a folder", str(path)))
    if not path.parent.is_dir():
        raise StorageError(expected("an existing output folder", "none", str(path.parent)))
    if not os.access(path.parent, os.W_OK):
        raise StorageError(expected("a writable output folder", "one that is not", str(path.parent)))


def _write_json(where, data):
    text = json.dumps(data, indent=2)
    if where == "-":
        print(text)
        return
    from fastbn.graph.storage import atomic

    with atomic(where) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _coloured(line, stream):
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return line
    for word, colour in (("  folded", 32), ("  kept", 33), ("parity", 36), ("WARNING", 33), ("shipped", 36)):
        if line.startswith(word):
            return f"\x1b[{colour}m{word}\x1b[0m{line[len(word) :]}"
    return line


class _Progress:
    """One line on stderr that says what is being verified, when stderr is a terminal; gone when the work is done."""

    def __init__(self, quiet):
        self.shown = not quiet and sys.stderr.isatty()
        self.width = 0

    def __call__(self, text):
        if self.shown:
            text = _printable(text, sys.stderr)[:100]
            print(f"\r{text:<{self.width}}", end="", file=sys.stderr, flush=True)
            self.width = len(text)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.shown and self.width:
            print(f"\r{'':<{self.width}}\r", end="", file=sys.stderr, flush=True)


class _Steps(_Progress):
    """A bar with what is being done behind it, on a terminal; one line a step in a log."""

    def __init__(self, quiet):
        super().__init__(quiet)
        self.logged = not quiet and not self.shown
        self.number = 0

    def __call__(self, number, total, step, detail=""):
        if self.logged and number != self.number:
            _say(f"fastbn: {number}/{total} {step}", sys.stderr)
        self.number = number
        bar = "#" * round(BAR * (number - 1) / total)
        super().__call__(f"[{bar:-<{BAR}}] {number}/{total} {step}{': ' if detail else ''}{detail}")


def _deploy(arguments):
    """Fold the model and verify it, try int8 quantisation on request, compare the outputs of every stage with the original's, measure
    latency, size and loading in onnxruntime's default options, and write the best stage that loses no more than --max-drop."""
    from fastbn.deployment.pipeline import WRITING, Options, check_paths, deploy_watched
    from fastbn.deployment.report import render
    from fastbn.graph.storage import atomic

    options = Options(
        data=arguments.data,
        quantize=arguments.quantize,
        max_drop=arguments.max_drop,
        metric=arguments.metric,
        only=arguments.only,
        skip=arguments.skip,
        input_shapes=_input_shapes(arguments),
        freeze_inputs=arguments.freeze_inputs,
        seed=arguments.seed,
        runs=arguments.runs,
        most_samples=arguments.samples,
        min_samples=arguments.min_samples,
        quantize_timeout=arguments.quantize_timeout,
    )
    target = Path(arguments.output)
    check_paths(arguments.input, target, arguments.report, arguments.force)
    _check_folder(target)
    _check_json(arguments.json, [arguments.input, arguments.output, arguments.report, arguments.data])
    steps = _Steps(arguments.quiet)
    with contextlib.ExitStack() as ready:
        ready.enter_context(steps)
        made = deploy_watched(arguments.input, options, command=arguments.command, stage=target.parent, progress=steps)
        steps(*WRITING)
        if arguments.report:
            page = render(made)
            ready.enter_context(atomic(arguments.report)).write_text(page, encoding="utf-8")
        written = made.save(target) if made.shipped else []
    _report_deployment(arguments, made, written)
    return {"done": DONE, "partial": PARTIAL, "refused": FAILED, "unverified": UNVERIFIED}[made.status]


def _report_deployment(arguments, made, written):
    if arguments.json:
        _write_json(arguments.json, {**made.to_dict(), "written": [str(path) for path in written], "report": arguments.report})
    if made.status != "done":
        _say(f"fastbn: {made.shipped or 'nothing'} shipped: {made.decision}", sys.stderr)
    if arguments.quiet or arguments.json == "-":
        return
    for line in made.lines():
        _say(line, sys.stdout)
    if written:
        from fastbn.graph.report import size_text

        _say(f"wrote   {written[0]}   {size_text(sum(path.stat().st_size for path in written))}", sys.stdout)
    if arguments.report:
        _say(f"report  {arguments.report}", sys.stdout)


def _verify(arguments):
    """Compare two models on the same inputs, onnxruntime's optimiser off on both sides: exit code 0 when they agree up to
    rounding, 1 when they do not, 2 when they cannot be compared."""
    from fastbn.graph.folding import verify_watched

    _check_json(arguments.json, [arguments.original, arguments.folded])
    bar = _Progress(arguments.quiet)
    with bar:
        parity = verify_watched(arguments.original, arguments.folded, _input_shapes(arguments), progress=bar)
    if arguments.json:
        _write_json(arguments.json, {"schema": _schema(), "parity": parity.to_dict()})
    if not arguments.quiet and arguments.json != "-":
        for line in (f"parity  {parity}", *(f"        {note}" for note in parity.notes)):
            _say(line, sys.stdout)
    return {"ok": DONE, "failed": FAILED, "not-run": UNUSABLE}[parity.status]


def _schema():
    from fastbn.graph.report import SCHEMA

    return SCHEMA


def _bench(arguments):
    """Time two models in onnxruntime with its default options, run by run in turn, on one thread and on all: median and 90th percentile."""
    if arguments.runs < 1:
        raise ArgumentError(expected("at least 1 run", str(arguments.runs), "--runs"))
    from fastbn.graph.bench import bench

    _check_json(arguments.json, [arguments.original, arguments.folded])
    rows = bench(arguments.original, arguments.folded, runs=arguments.runs, input_shapes=_input_shapes(arguments))
    if arguments.json:
        _write_json(arguments.json, {"schema": _schema(), "bench": rows})
    if arguments.json != "-":
        from fastbn.graph.report import table

        cells = [["threads", "model", "median ms", "p90 ms", "of the original"]]
        for row in rows:
            cells.append([str(row["threads"]), row["model"], f"{row['median_ms']:.3f}", f"{row['p90_ms']:.3f}", f"{row['ratio']:.3f}"])
        print("\n".join(table(cells)))
    return DONE


def _show_config(arguments):
    """Print versions and kernels in use: what a bug report needs."""
    from fastbn.config import show_config

    config = show_config()
    if arguments.json:
        print(json.dumps(config, indent=2))
    else:
        width = max(map(len, config))
        for key, value in config.items():
            print(f"{key:<{width}}  {', '.join(value) if isinstance(value, list) else value}")
    return DONE
