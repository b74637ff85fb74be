"""Static int8 quantisation by onnxruntime.quantization: QDQ, weights per channel, calibrated on samples; and the process it runs in.

The quantiser is foreign code that may never return, in Python or in C++. It runs where it can be killed: `quantizer.Quantizer` starts a
Python whose only work is `serve`.
"""

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

import onnx

from fastbn.errors import FastbnError
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.storage import serialize
from fastbn.graph.reasons import first_few
from fastbn.graph.runtime import said

__all__ = ["MARK", "QuantizerRefused", "Recipe", "feed_path", "quantize_file", "quantized_already", "serve"]

# DequantizeLinear takes one scale per channel from this opset on.
PER_CHANNEL_OPSET = 13

# Initializers need not be graph inputs from this IR version on.
FREE_INITIALIZERS_IR = 4

# The level of onnxruntime's logger at which it says least.
FATAL = 4

# What a line of an answer begins with: what else the process prints does not.
MARK = b"\x1e"

# Seconds after its limit at which a job ends its process by itself: whoever waits for it has ended it by then, unless he was killed.
GRACE = 5

# Operators of models that are quantized, those of onnxruntime's own domain included.
QUANTIZED = re.compile(r"(Dynamic)?(Quantize|Dequantize)[A-Z]\w+|Q[A-Z]\w+|\w+Integer\w*|MatMulNBits|\w*Quant")


class QuantizerRefused(Exception):
    """Why onnxruntime's quantiser made nothing of a model, as a sentence."""


@dataclass(frozen=True)
class Recipe:
    """What the quantiser is asked for on this machine, after onnxruntime's own advice for CPUs: 7-bit weights on x86 without VNNI, whose
    16-bit sums would saturate; symmetric activations on ARM."""

    activations: str
    weights: str
    reduce_range: bool

    @classmethod
    def here(cls):
        """Return the recipe for this machine."""
        if platform.machine().lower() in ("aarch64", "arm64"):
            return cls("QInt8", "QInt8", False)
        return cls("QUInt8", "QInt8", not _has_vnni())

    def __str__(self):
        bits = ", weights in 7 bits: this CPU has no VNNI" if self.reduce_range else ""
        return f"QDQ, per channel, {self.activations[1:]} activations, {self.weights[1:]} weights, MinMax{bits}"


def _has_vnni():
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def quantized_already(proto: onnx.ModelProto) -> str | None:
    """Return which nodes say that a model is quantized, subgraphs and functions included, or None."""
    graphs = (proto.graph, *proto.functions)
    found = Counter(node.op_type for graph in graphs for scope in scopes_of(graph) for node in scope.node if _is_quantized(node.op_type))
    return first_few([f"{count} {op}" for op, count in found.most_common()]) or None


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
    optimise: bool = True,
    progress: Callable[[str], None] | None = None,
) -> tuple[str, ...]:
    """Quantise a model file.

    Parameters
    ----------
    path, target : Path
    folder : Path
        With the feeds to calibrate on, as `feed_path` names them; for what lies between.
    feeds : int
        How many of them there are to use.
    recipe : Recipe
    optimise : bool
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
        _quantize(_prepared(path, folder, notes), target, _Reader(folder, feeds, progress), folder, recipe, optimise)
        made = onnx.load(target, load_external_data=False)
    except Exception as error:  # the quantiser raises whatever its parts do, AttributeError and KeyError among them
        kind = "" if isinstance(error, (FastbnError, ValueError)) else f"{type(error).__name__}: "
        first = said(error) if str(error).strip() else "; ".join(listener.lines[-1:])
        raise QuantizerRefused(f"onnxruntime's quantiser refuses the model: {kind}{first}") from error
    if not any(node.op_type == "QuantizeLinear" for node in made.graph.node):
        raise QuantizerRefused("onnxruntime's quantiser refuses the model: none of its operators has an integer form")
    return tuple(notes)


def _prepared(path, folder, notes):
    """Write the model as the quantiser takes it, and return its path: weights that are no inputs, scales per channel, one file."""
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


def _quantize(prepared: Path, target: Path, reader: "_Reader", folder: Path, recipe: Recipe, optimise: bool) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    fused = folder / "preprocessed.onnx"
    quant_pre_process(str(prepared), str(fused), skip_optimization=not optimise, skip_symbolic_shape=True)
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

    def get_next(self) -> dict | None:
        if self.place == self.feeds:
            return None
        self.place += 1
        self.progress(f"calibrating on feed {self.place} of {self.feeds}")
        with open(feed_path(self.folder, self.place - 1), "rb") as file:
            return pickle.load(file)


class _Listener(logging.Handler):
    """Keeps the last line of what the quantiser logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines()
        self.lines[:] = lines[-1:]


def serve() -> None:
    """Quantise what stdin asks for, a job in JSON a line, and answer on stdout, until stdin ends: then nobody waits any more.

    A job has the arguments of `quantize_file`, and "seconds" after which nobody waits for it. Answers are lines of MARK and a dict:
    "progress" while it works, at last "notes" or "refused".
    """
    import onnxruntime

    channel, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what the quantiser prints, from Python or from C++
        os.dup2(nowhere, stream)
    onnxruntime.set_default_logger_severity(FATAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who waits is interrupted, and ends this process
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()

    def say(**answer: object) -> None:
        os.write(channel, MARK + json.dumps(answer).encode() + b"\n")

    while True:
        job = json.loads(jobs.get())
        # A loop in C++ may hold the lock of Python, and then no thread sees that stdin has ended.
        faulthandler.dump_traceback_later(job.pop("seconds") + GRACE, exit=True, file=nowhere)
        paths = {name: Path(job.pop(name)) for name in ("path", "target", "folder")}
        try:
            say(notes=quantize_file(**paths, **job | {"recipe": Recipe(*job["recipe"])}, progress=lambda text: say(progress=text)))
        except QuantizerRefused as reason:
            say(refused=str(reason))
        faulthandler.cancel_dump_traceback_later()


def _listen(jobs: queue.SimpleQueue) -> None:
    for line in sys.stdin.buffer:
        jobs.put(line)
    os._exit(0)
