"""The options of the command, and what its arguments mean."""

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from fastbn.command_line import Parser, read
from fastbn.errors import ArgumentError, expected

__all__ = ["Arguments", "input_shapes", "names", "parsed", "parsers", "sizes_in", "with_options"]

# Digits of the largest size that a file can hold; int() refuses thousands of them.
MOST_DIGITS = 19

# Characters of an argument that an error shows.
MOST_SHOWN = 200

# What --rewrite-left makes of a batch normalization that stays, as planner/substitute.py has it; importing that would load onnx.
REWRITE_FORMS = ("conv", "affine")

# How activations are calibrated, and types of weights, as deployment/recipe.py has them.
CALIBRATIONS = ("minmax", "entropy", "percentile")
WEIGHT_TYPES = ("auto", "int8", "uint8", "int7")

# Types of arrays, as dtypes.py has them.
DTYPES = ("float32", "float64", "float16", "bfloat16")

JSON = "write the report as JSON; - writes it to stdout instead of the table"

# A shape as people write it.
BRACKETS = ("()", "[]")
BETWEEN_SIZES = re.compile(r"\s*[,x]\s*|\s+")

# The end of an error: the argument of Python's function that it is about.
ABOUT = re.compile(r" - at `(\w+)(?:\[.*\])?`$")


class Arguments(argparse.Namespace):
    """What the command line says: its words, the name of the command, and the attributes that its function `_add_...` adds, no others."""

    line: str
    command: str = ""
    debug: bool = False
    limits: str | None = None
    quiet: bool = False

    # Models and options of verification.
    input: str
    original: str
    folded: str
    other: str | None
    input_shapes: list[str]
    freeze_inputs: bool
    as_inference: bool
    rewrite_left: Literal["conv", "affine"] | None
    only: list[str] | None
    skip: list[str] | None

    # What is written.
    output: str | None
    named_output: str | None
    json: str | None
    report: str | None
    force: bool
    in_place: bool
    dry_run: bool
    no_verify: bool
    strict: bool

    # Options of a deployment.
    data: str | None
    quantize: bool
    max_drop: float | None
    metric: Literal["auto", "top-1", "error", "accuracy"]
    goal: Literal["latency", "size", "memory"]
    max_slowdown: float | None
    labels: str | None
    ignore_unknown: bool
    quantize_timeout: float
    runs: int | None
    most_samples: int
    min_samples: int
    seed: int
    calibration: Literal["minmax", "entropy", "percentile"]
    exclude_nodes: list[str] | None
    weight_type: Literal["auto", "int8", "uint8", "int7"]
    per_tensor: bool
    data_free: bool
    float_nodes: int
    reestimate: bool

    # Options of many folds.
    sources: list[str]
    out: str
    jobs: int | None
    timeout: float
    again: bool

    # Options of a re-estimation.
    paths: list[str]
    mode: Literal["population", "one-pass"]
    batch: int
    samples: int | None
    scheduler: str | None
    workers: int | None
    momentum: float | None
    unbiased: bool
    memory: str
    threads: int

    # Options of a bench of kernels.
    shape: list[str]
    axis: int
    dtype: str
    seconds: float


def parsers(commands: Mapping[str, Callable[..., int]]) -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the command line, and name -> that of each command.

    commands is name -> the function that runs the command, whose docstring describes it.
    """
    from fastbn import __version__

    top = Parser(prog="fastbn", description="Batch normalization on CPUs: fold it out of ONNX models, verify, measure.")
    top.add_argument("--version", action="version", version=f"fastbn {__version__}")
    _add_debug(top)
    below = top.add_subparsers(metavar="COMMAND", parser_class=Parser)
    made = {}
    for name, (add, summary) in COMMANDS.items():
        made[name] = each = below.add_parser(name, help=summary, description=commands[name].__doc__)
        add(each)
        _add_debug(each)
        each.set_defaults(command=name)
    return top, made


def parsed(commands: Mapping[str, Callable[..., int]], words: Sequence[str]) -> Arguments:
    """Return what a command line says; its command is "" where it names none.

    Raises
    ------
    ArgumentError
        A word is wrong, or one is missing.
    SystemExit
        The help or the version is printed.
    """
    top, below = parsers(commands)
    arguments = Arguments()
    parser = read(top, below, words, arguments)
    named = getattr(arguments, "named_output", None)
    if named is not None:
        if arguments.output is not None:
            parser.error(f"OUT is given twice, as {arguments.output} and with --output")
        arguments.output = named
    if arguments.command == "deploy" and arguments.output is None:
        parser.error("the following arguments are required: OUT")
    return arguments


def with_options(message: str, command: str, commands: Mapping[str, Callable[..., int]]) -> str:
    """Return an error about an argument of a Python function as one about the option of a command that gives it."""
    about = ABOUT.search(message)
    each = parsers(commands)[1].get(command) if about else None
    for action in each._actions if each and about else ():
        option = action.option_strings[-1] if action.option_strings else str(action.metavar)
        if about and about[1] in (action.dest, option.lstrip("-").replace("-", "_")):
            return f"{message[: about.start()]} - at `{option}`"
    return message


def _add_debug(each: argparse.ArgumentParser) -> None:
    each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an unexpected fault")


def _add_limits(each: argparse.ArgumentParser) -> None:
    each.add_argument(
        "--limits", metavar="memory=SIZE,time=SECONDS", help="work in a process that may take no more, as memory=2G,time=60 (Linux)"
    )


def _add_output(each: argparse.ArgumentParser, what: str) -> None:
    each.add_argument("output", metavar="OUT", nargs="?", help=f"{what}; - writes it to stdout")
    each.add_argument("-o", "--output", dest="named_output", metavar="OUT", help="OUT, wherever it stands")


def _add_json(each: argparse.ArgumentParser) -> None:
    each.add_argument("--json", metavar="FILE", help=JSON)


def _add_quiet(each: argparse.ArgumentParser) -> None:
    each.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def _add_fold(fold: argparse.ArgumentParser) -> None:
    fold.add_argument("input", metavar="IN", help="the model; - reads it from stdin")
    _add_output(fold, "the folded model (IN with .folded.onnx)")
    fold.add_argument("--dry-run", action="store_true", help="plan and report, verify and write nothing")
    _add_json(fold)
    _add_selection(fold)
    fold.add_argument("--explain", metavar="GLOB", action="append", help="tell the whole search for nodes of these names (repeatable)")
    fold.add_argument("--no-verify", action="store_true", help="do not run the fold and the model in onnxruntime")
    fold.add_argument("--strict", action="store_true", help="exit with 3 when a batch normalization is left, neither folded nor rewritten")
    fold.add_argument("--in-place", action="store_true", help="replace IN")
    fold.add_argument("--force", action="store_true", help="replace an OUT that is no version of IN")
    _add_quiet(fold)
    _add_input_shape(fold)
    _add_limits(fold)


def _add_deploy(deploy: argparse.ArgumentParser) -> None:
    deploy.add_argument("input", metavar="IN", help="the model; - reads it from stdin")
    _add_output(deploy, "where the best stage that is good enough goes")
    deploy.add_argument("--data", metavar="PATH", help="samples: .npz, .npy, .pb, or a folder of them; without it, random numbers")
    deploy.add_argument("--quantize", action="store_true", help="try static int8 quantization, calibrated on the data")
    deploy.add_argument("--report", metavar="FILE", help="write the report as one HTML file (needs jinja2)")
    _add_json(deploy)
    deploy.add_argument("--force", action="store_true", help="replace an existing --report, and an OUT that is no version of IN")
    deploy.add_argument(
        "--max-drop", type=float, metavar="X", help="the most a stage may lose: 0.01 is 1 %% of the decisions, or of the outputs' size"
    )
    deploy.add_argument(
        "--quantize-timeout", type=float, default=300.0, metavar="SECONDS", help="what quantizing the model may take at most (300)"
    )
    deploy.add_argument(
        "--reestimate", action="store_true", help="estimate the statistics again first, on half of the data; the labels of the rest judge"
    )
    _add_recipe(deploy)
    deploy.add_argument("--metric", default="auto", choices=["auto", "top-1", "error", "accuracy"], help="what a stage is judged by (auto)")
    _add_verdict(deploy)
    deploy.add_argument(
        "--runs",
        type=int,
        metavar="N",
        help="timed runs of each stage (until their ratios are precise, for at most 3 s)",
    )
    deploy.add_argument(
        "--samples", dest="most_samples", type=int, default=256, metavar="N", help="feeds of the data that are used at most (256)"
    )
    deploy.add_argument("--min-samples", type=int, default=8, metavar="N", help="samples that --quantize asks for at least (8)")
    deploy.add_argument("--seed", type=int, default=0, metavar="N", help="of the random inputs (0)")
    _add_quiet(deploy)
    _add_selection(deploy)
    _add_input_shape(deploy)
    _add_limits(deploy)


def _add_recipe(deploy: argparse.ArgumentParser) -> None:
    deploy.add_argument(
        "--calibration", default="minmax", choices=CALIBRATIONS, help="how the range of an activation follows from the samples (minmax)"
    )
    deploy.add_argument("--exclude-nodes", metavar="GLOB", action="append", help="leave nodes of these names in float (repeatable)")
    deploy.add_argument(
        "--weight-type", default="auto", choices=WEIGHT_TYPES, help="of quantized weights; auto: int8, int7 on x86 CPUs without VNNI"
    )
    deploy.add_argument(
        "--data-free", action="store_true", help="calibrate on what the model's own batch normalizations say of real inputs"
    )
    deploy.add_argument(
        "--float-nodes", type=int, default=8, metavar="N", help="nodes that may stay in float where int8 loses too much, worst first (8)"
    )
    deploy.add_argument("--per-tensor", action="store_true", help="one scale for a weight, not one for each of its output channels")


def _add_reestimate(each: argparse.ArgumentParser) -> None:
    each.add_argument("input", metavar="IN", help="the model; - reads it from stdin")
    _add_output(each, "the model with new statistics (IN with .reestimated.onnx)")
    each.add_argument(
        "--data",
        dest="paths",
        metavar="PATH",
        action="append",
        nargs="+",
        required=True,
        help="samples: .npz, .npy, .pb, folders, globs, fsspec URLs",
    )
    each.add_argument("--batch", type=int, default=32, metavar="N", help="samples that are run together (32)")
    each.add_argument("--samples", type=int, metavar="N", help="samples that are used at most, evenly spaced (all)")
    each.add_argument("--mode", default="population", choices=["population", "one-pass"], help="what is estimated (population)")
    where = each.add_mutually_exclusive_group()
    where.add_argument("--scheduler", metavar="ADDRESS", help="a dask scheduler, whose workers do it: tcp://host:8786")
    where.add_argument("--workers", type=int, metavar="N", help="processes on this machine (as many as it has cores); 0: this one alone")
    each.add_argument("--only", metavar="GLOB", action="append", help="replace the statistics of nodes of these names only (repeatable)")
    each.add_argument("--skip", metavar="GLOB", action="append", help="never replace those of nodes of these names (repeatable)")
    each.add_argument("--momentum", type=float, metavar="M", help="the weight of the new statistics; without it they replace the old ones")
    each.add_argument("--unbiased", action="store_true", help="divide by n - 1 instead of n for the variance")
    each.add_argument("--memory", default="1GiB", metavar="SIZE", help="activations that each worker keeps between levels (1GiB)")
    each.add_argument("--threads", type=int, default=1, metavar="N", help="threads of one operator in onnxruntime (1)")
    each.add_argument("--dry-run", action="store_true", help="estimate and report, write no model")
    each.add_argument("--report", metavar="FILE", help="write the report as one HTML file (needs jinja2)")
    _add_json(each)
    each.add_argument("--force", action="store_true", help="replace an existing --report, and an OUT that is no version of IN")
    _add_quiet(each)
    _add_limits(each)


def _add_fold_all(each: argparse.ArgumentParser) -> None:
    each.add_argument("sources", metavar="SOURCE", nargs="+", help="models: folders (and what lies below), globs, files, fsspec URLs")
    each.add_argument(
        *("-o", "--output", "--out"), dest="out", metavar="DIR", required=True, help="the folder of the folded models, or its fsspec URL"
    )
    where = each.add_mutually_exclusive_group()
    where.add_argument("--scheduler", metavar="ADDRESS", help="a dask scheduler, whose workers do it: tcp://host:8786")
    where.add_argument("--workers", type=int, metavar="N", help="models at once on this machine (as many as it has cores); 0: one")
    each.add_argument("--jobs", type=int, metavar="N", help="models at once on a cluster (as many as its workers have threads)")
    each.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="what one model may take (600)")
    each.add_argument("--memory", default="8GiB", metavar="SIZE", help="what one model may take; 0: all there is (8GiB)")
    each.add_argument("--freeze-inputs", action="store_true", help="make constants of initializers that are also graph inputs")
    each.add_argument("--as-inference", action="store_true", help="make inference nodes of what is in training mode")
    each.add_argument("--rewrite-left", choices=REWRITE_FORMS, help="what to make of each BN that stays")
    each.add_argument("--no-verify", action="store_true", help="do not run the folds and the models in onnxruntime")
    each.add_argument("--force", action="store_true", help="replace what stands in DIR and is no version of a model")
    each.add_argument("--again", action="store_true", help="fold what an earlier run has folded, too")
    each.add_argument("--json", metavar="LINES", help="write JSON Lines, one for each model; - writes them to stdout instead of the table")
    _add_quiet(each)


def _add_verdict(deploy: argparse.ArgumentParser) -> None:
    deploy.add_argument(
        "--for",
        dest="goal",
        default="latency",
        choices=["latency", "size", "memory"],
        help="what a quantized model must be better in than the others, and a folded one not worse (latency on one thread)",
    )
    deploy.add_argument(
        "--max-slowdown",
        type=float,
        metavar="X",
        help="how much slower than the original a stage may be: 0.1 is a tenth",
    )
    deploy.add_argument("--labels", metavar="NAME", help="the array of the data with labels (labels, y or targets)")
    deploy.add_argument("--ignore-unknown", action="store_true", help="leave out arrays of the data that are no inputs")


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("original", metavar="A", help="a model; - reads it from stdin")
    verify.add_argument("folded", metavar="B", help="the model that is to be the same; - reads it from stdin")
    _add_json(verify)
    _add_quiet(verify)
    _add_input_shape(verify)
    _add_limits(verify)


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("original", metavar="A", help="a model; - reads it from stdin")
    bench.add_argument("other", metavar="B", nargs="?", help="another; without it, A folded in memory")
    bench.add_argument("--runs", type=int, default=50, metavar="N", help="timed runs of each model (50)")
    _add_json(bench)
    _add_quiet(bench)
    _add_input_shape(bench)
    _add_limits(bench)


def _add_bench_kernels(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("shape", nargs="+", metavar="SHAPE", help="sizes of the array, as 32,64,56,56 or '(32, 64, 56, 56)'")
    bench.add_argument("--axis", type=int, default=1, metavar="N", help="the axis of the channels (1; -1 is the last)")
    bench.add_argument("--dtype", default="float32", choices=DTYPES, help="of the array (float32)")
    bench.add_argument("--seconds", type=float, default=0.2, metavar="SECONDS", help="for each figure (0.2)")
    _add_json(bench)
    _add_quiet(bench)


def _add_show_config(config: argparse.ArgumentParser) -> None:
    _add_json(config)


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "fold": (_add_fold, "fold every batch normalization that can be folded exactly"),
    "deploy": (_add_deploy, "fold, verify, quantize on request, compare and measure"),
    "reestimate": (_add_reestimate, "estimate the running statistics again, from data"),
    "fold-all": (_add_fold_all, "fold and verify many models, each in a process of its own"),
    "verify": (_add_verify, "compare two models on the same inputs"),
    "bench": (_add_bench, "latency of two models in onnxruntime, side by side"),
    "bench-kernels": (_add_bench_kernels, "latency of batch normalization on arrays of a shape, and why"),
    "show-config": (_add_show_config, "versions and kernels in use"),
}


def _add_selection(each: argparse.ArgumentParser) -> None:
    each.add_argument("--only", metavar="GLOB", action="append", help="fold only nodes of these names (repeatable)")
    each.add_argument("--skip", metavar="GLOB", action="append", help="never fold nodes of these names (repeatable)")
    each.add_argument("--freeze-inputs", action="store_true", help="make constants of initializers that are also graph inputs")
    each.add_argument(
        "--as-inference", action="store_true", help="make inference nodes of batch normalizations and Dropout in training mode"
    )
    each.add_argument(
        "--rewrite-left", choices=REWRITE_FORMS, help="make of each BN that stays a depthwise 1x1 Conv, or a Mul and an Add (affine)"
    )


def _add_input_shape(each: argparse.ArgumentParser) -> None:
    each.add_argument(
        "--input-shape",
        dest="input_shapes",
        metavar="NAME=D,D,...",
        action="append",
        default=[],
        help="sizes of a graph input (repeatable)",
    )


def names(texts: list[str] | None) -> list[str] | None:
    """Return arguments that are names inside a model, which are UTF-8 whatever the locale is."""
    return None if texts is None else [_utf8(text) for text in texts]


def _utf8(text: str) -> str:
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def _is_size(text: str) -> bool:
    return text.isdecimal() and len(text) <= MOST_DIGITS and int(text) > 0


def sizes_in(text: str, where: str) -> tuple[int, ...]:
    """Return sizes as numbers, written as 1,64,56,56 or 1x64x56x56 or as a shape is printed; raises ArgumentError where they are none."""
    stripped = text.strip()
    if stripped[:1] + stripped[-1:] in BRACKETS:
        stripped = stripped[1:-1].strip().removesuffix(",")
    numbers = BETWEEN_SIZES.split(stripped)
    if not all(map(_is_size, numbers)):
        raise ArgumentError(expected("positive sizes, as 32,64,56,56", repr(text[:MOST_SHOWN]), where))
    return tuple(map(int, numbers))


def input_shapes(arguments: Arguments) -> dict[str, tuple[int, ...]]:
    """Return --input-shape as name -> sizes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in map(_utf8, arguments.input_shapes):
        name, equals, sizes = text.rpartition("=")
        numbers = sizes.split(",") if sizes else []
        if not (name and equals) or not all(map(_is_size, numbers)):
            raise ArgumentError(expected("NAME=D,D,... with positive sizes, as x=1,3,224,224", repr(text[:MOST_SHOWN]), "--input-shape"))
        shapes[name] = tuple(map(int, numbers))
    return shapes
