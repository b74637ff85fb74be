"""Static int8 quantization by onnxruntime.quantization: QDQ, weights per channel, calibrated on samples; and the process it runs in.

onnxruntime's quantizer may never return, from Python or from C++, so it runs in a process that can be killed: `quantizer.Quantizer` starts
a Python that does nothing but `serve`.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import pickle
import platform
import queue
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypedDict

import onnx

from fastbn.errors import FastbnError
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.storage import serialize
from fastbn.graph.reasons import first_few
from fastbn.graph.runtime import said

if TYPE_CHECKING:
    from fastbn.graph.parity.feeds import Feed

__all__ = ["MARK", "Job", "QuantizerRefused", "Recipe", "feed_path", "quantize_file", "quantized_already", "serve"]

# DequantizeLinear takes one scale per channel from this opset on.
PER_CHANNEL_OPSET = 13

# Initializers need not be graph inputs from this IR version on.
FREE_INITIALIZERS_IR = 4

# The level of onnxruntime's logger at which it says least.
FATAL = 4

# The first byte of an answer's line, which tells answers from whatever else the process prints.
MARK = b"\x1e"

# Seconds after its limit at which a job ends its own process, in case the parent, which ends it at the limit, is gone.
GRACE = 5

# Operators of models that are quantized, those of onnxruntime's own domain included.
QUANTIZED = re.compile(r"(Dynamic)?(Quantize|Dequantize)[A-Z]\w+|Q[A-Z]\w+|\w+Integer\w*|MatMulNBits|\w*Quant")


class QuantizerRefused(Exception):
    """Why onnxruntime's quantizer made nothing of a model, as a sentence."""


@dataclass(frozen=True)
class Recipe:
    """What the quantizer is asked for on this machine, after onnxruntime's own advice for CPUs: 7-bit weights on x86 without VNNI, whose
    16-bit sums would saturate; symmetric activations on ARM."""

    activations: str
    weights: str
    reduce_range: bool

    @classmethod
    def here(cls) -> Self:
        """Return the recipe for this machine."""
        if platform.machine().lower() in ("aarch64", "arm64"):
            return cls("QInt8", "QInt8", False)
        return cls("QUInt8", "QInt8", not _has_vnni())

    def __str__(self) -> str:
        bits = ", weights in 7 bits: this CPU has no VNNI" if self.reduce_range else ""
        return f"QDQ, per channel, {self.activations[1:]} activations, {self.weights[1:]} weights, MinMax{bits}"


def _has_vnni() -> bool:
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def quantized_already(proto: onnx.ModelProto) -> str | None:
    """Return which nodes say that a model is quantized, subgraphs and functions included, or None."""
    graphs = (proto.graph, *proto.functions)
    counts = Counter(node.op_type for graph in graphs for scope in scopes_of(graph) for node in scope.node if _is_quantized(node.op_type))
    return first_few([f"{count} {op}" for op, count in counts.most_common()]) or None


def _is_quantized(op: str) -> bool:
    return QUANTIZED.fullmatch(op) is not None


def feed_path(folder: Path, number: int) -> Path:
    """Return where the feed of a number lies: a pickled dict of name -> array."""
    return folder / f"feed-{number}.pickle"


def quantize_file(
    path: Path,
    target: Path,
    folder: Path,
    feeds: int,
    *,
    recipe: Recipe,
    optimize: bool = True,
    progress: Callable[[str], None] | None = None,
) -> tuple[str, ...]:
    """Quantize a model file.

    Parameters
    ----------
    path, target : Path
    folder : Path
        Holds the feeds to calibrate on, as `feed_path` names them, and takes intermediate files.
    feeds : int
        How many of them there are to use.
    recipe : Recipe
    optimize : bool
        Let onnxruntime's own pre-processing fuse nodes first.
    progress : callable of str, optional

    Returns
    -------
    tuple of str
        What else was done to the model.

    Raises
    ------
    QuantizerRefused
    """
    notes: list[str] = []
    listener = _Listener()
    logging.getLogger().handlers = [listener]
    try:
        _quantize(_prepared(path, folder, notes), target, _Reader(folder, feeds, progress), folder, recipe, optimize)
        made = onnx.load(target, load_external_data=False)
    except Exception as error:  # the quantizer raises whatever its parts do, AttributeError and KeyError among them
        kind = "" if isinstance(error, (FastbnError, ValueError)) else f"{type(error).__name__}: "
        first = said(error) if str(error).strip() else "; ".join(listener.lines[-1:])
        raise QuantizerRefused(f"onnxruntime's quantizer refuses the model: {kind}{first}") from error
    if not any(node.op_type == "QuantizeLinear" for node in made.graph.node):
        raise QuantizerRefused("onnxruntime's quantizer refuses the model: none of its operators has an integer form")
    return tuple(notes)


def _prepared(path: Path, folder: Path, notes: list[str]) -> Path:
    """Write the model as the quantizer takes it, and return its path: weights that are no inputs, scales per channel, one file."""
    proto = onnx.load(path)
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [info for info in proto.graph.input if info.name not in constants]
    if len(inputs) < len(proto.graph.input):
        if proto.ir_version >= FREE_INITIALIZERS_IR:
            notes.append("initializers that were also graph inputs are constants now")
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1)
    if opset < PER_CHANNEL_OPSET:
        proto.ir_version = max(proto.ir_version, FREE_INITIALIZERS_IR)
        proto = onnx.version_converter.convert_version(proto, PER_CHANNEL_OPSET)
        notes.append(f"opset {opset} converted to {PER_CHANNEL_OPSET}, which has scales per channel")
    proto.ir_version = max(proto.ir_version, FREE_INITIALIZERS_IR)
    prepared = folder / "prepared.onnx"
    prepared.write_bytes(serialize(proto, str(path)))
    return prepared


def _quantize(prepared: Path, target: Path, reader: _Reader, folder: Path, recipe: Recipe, optimize: bool) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    fused = folder / "preprocessed.onnx"
    quant_pre_process(str(prepared), str(fused), skip_optimization=not optimize, skip_symbolic_shape=True)
    quantization.quantize_static(
        str(fused),
        str(target),
        reader,
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=recipe.reduce_range,
        activation_type=getattr(quantization.QuantType, recipe.activations),
        weight_type=getattr(quantization.QuantType, recipe.weights),
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )


class _Reader:
    """A calibration data reader as quantize_static asks it: one feed after the other from its file."""

    def __init__(self, folder: Path, feeds: int, progress: Callable[[str], None] | None) -> None:
        self.folder = folder
        self.feeds = feeds
        self.progress = progress or (lambda text: None)
        self.place = 0

    def get_next(self) -> Feed | None:
        """Return the next feed, or None after the last."""
        if self.place == self.feeds:
            return None
        self.place += 1
        self.progress(f"calibrating on feed {self.place} of {self.feeds}")
        with open(feed_path(self.folder, self.place - 1), "rb") as file:
            feed: Feed = pickle.load(file)
            return feed


class _Listener(logging.Handler):
    """Keep the last line of what the quantizer logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the last line of a record."""
        lines = record.getMessage().strip().splitlines()
        self.lines[:] = lines[-1:]


class Job(TypedDict):
    """What the process is asked for: the arguments of `quantize_file`, and its time limit in seconds."""

    path: str
    target: str
    folder: str
    feeds: int
    recipe: tuple[str, str, bool]
    optimize: bool
    seconds: float


def serve() -> None:
    """Quantize what stdin asks for, a job in JSON a line, and answer on stdout, until stdin ends.

    A line of stdin is a Job. Answers are lines of MARK and a dict: "progress" while it works, at last "notes" or "refused".
    """
    import onnxruntime

    channel, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what the quantizer prints, from Python or from C++
        os.dup2(nowhere, stream)
    onnxruntime.set_default_logger_severity(FATAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()

    def say(**answer: object) -> None:
        os.write(channel, MARK + json.dumps(answer).encode() + b"\n")

    while True:
        job: Job = json.loads(jobs.get())
        # A loop in C++ may hold the interpreter lock, and then no thread sees that stdin has ended.
        faulthandler.dump_traceback_later(job["seconds"] + GRACE, exit=True, file=nowhere)
        path, target, folder = (Path(place) for place in (job["path"], job["target"], job["folder"]))
        recipe, optimize = Recipe(*job["recipe"]), job["optimize"]
        try:
            notes = quantize_file(
                path, target, folder, job["feeds"], recipe=recipe, optimize=optimize, progress=lambda text: say(progress=text)
            )
            say(notes=notes)
        except QuantizerRefused as reason:
            say(refused=str(reason))
        faulthandler.cancel_dump_traceback_later()


def _listen(jobs: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        jobs.put(line)
    os._exit(0)
