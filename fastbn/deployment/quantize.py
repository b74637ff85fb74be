"""Static int8 quantization by onnxruntime.quantization in QDQ form, calibrated on samples; and the process it runs in.

onnxruntime's quantizer may never return, from Python or from C++, so it runs in a process that can be killed: `quantizer.Quantizer` starts
a Python that does nothing but `serve`.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import pickle
import queue
import re
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import onnx

from fastbn.deployment.recipe import CALIBRATIONS, Calibration, Recipe, RecipeFields
from fastbn.errors import FastbnError
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.storage import serialize
from fastbn.graph.reasons import first_few
from fastbn.graph.runtime import FATAL, said, system_error

if TYPE_CHECKING:
    from fastbn.graph.parity.feeds import Feed

__all__ = ["MARK", "Job", "Made", "QuantizerRefused", "feed_path", "quantize_file", "quantized_already", "serve"]

# Options of calibrations by histograms: onnxruntime's own for entropy, as many bins as steps, never cut anything off. With these it takes
# about 0.1 s for each activation, with TensorRT's 2048 bins 0.5 s.
HISTOGRAMS: dict[Calibration, dict[str, int]] = {"entropy": {"num_bins": 512, "num_quantized_bins": 128}}

# A trained network is surer of real inputs than of synthetic ones: where ranges come from these, those of the outputs are stretched.
STRETCH = 1.5

# DequantizeLinear takes one scale per channel from this opset on.
PER_CHANNEL_OPSET = 13

# Initializers need not be graph inputs from this IR version on.
FREE_INITIALIZERS_IR = 4

# The first byte of an answer's line, which tells answers from whatever else the process prints.
MARK = b"\x1e"

# Seconds after its limit at which a job ends its own process, in case the parent, which ends it at the limit, is gone.
GRACE = 5

# Operators of models that are quantized, those of onnxruntime's own domain included.
QUANTIZED = re.compile(r"(Dynamic)?(Quantize|Dequantize)[A-Z]\w+|Q[A-Z]\w+|\w+Integer\w*|MatMulNBits|\w*Quant")


class QuantizerRefused(Exception):
    """Why onnxruntime's quantizer made nothing of a model, as a sentence."""


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


class Made(NamedTuple):
    """What came of a quantization: what else was done to the model, and the names of the nodes that are quantized, in order."""

    notes: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Calibrated:
    """A model file as the quantizer takes it, its nodes named; range of each activation; name -> outputs of each node before fusion."""

    path: Path
    ranges: Any  # onnxruntime's TensorsData, a class without types
    nodes: dict[str, list[str]]
    notes: tuple[str, ...]


def quantize_file(
    path: Path,
    target: Path,
    folder: Path,
    feeds: int,
    *,
    recipe: Recipe,
    optimize: bool = True,
    only: Collection[str] = (),
    left: Collection[str] = (),
    restated: Sequence[tuple[Path, Sequence[int]]] = (),
    calibrations: dict[object, Calibrated] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Made:
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
    only, left : collection of str
        Names, as Made has them, of the nodes that are quantized (all for none), and of those that stay in float.
    restated : sequence of (path, numbers of feeds), optional
        Models with the same nodes and other weights, whose ranges on these feeds count too.
    calibrations : dict, optional
        Calibrations of earlier calls, which are not run again.
    progress : callable of str, optional

    Returns Made, or raises QuantizerRefused.
    """
    calibrations = {} if calibrations is None else calibrations
    listener = _Listener()
    logging.getLogger().handlers = [listener]
    try:
        key = path, feeds, recipe.calibration, optimize
        if key not in calibrations:
            sources = [(path, range(feeds)), *restated]
            readers = [(source, _Reader(folder, numbers, progress)) for source, numbers in sources]
            calibrations[key] = _calibrated(readers, folder, recipe, optimize)
        calibrated = calibrations[key]
        excluded, notes = _excluded(calibrated, recipe.exclude)
        nodes = _quantize(calibrated, target, recipe, [*only], [*excluded, *left])
    except QuantizerRefused:
        raise
    except Exception as error:  # the quantizer raises whatever its parts do, AttributeError and KeyError among them
        raise _refusal(error, listener) from error
    if not nodes:
        reason = "every node that has an integer form stays in float" if excluded else "none of its operators has an integer form"
        raise QuantizerRefused(f"onnxruntime's quantizer refuses the model: {reason}")
    return Made((*calibrated.notes, *notes), nodes)


def _refusal(error: Exception, listener: _Listener) -> QuantizerRefused:
    """Return what an error of the quantizer comes to."""
    reason = system_error(error)
    if reason is not None:
        return QuantizerRefused(f"onnxruntime's quantizer cannot use a file: {reason}")
    kind = "" if isinstance(error, (FastbnError, ValueError)) else f"{type(error).__name__}: "
    first = said(error) if str(error).strip() else "; ".join(listener.lines[-1:])
    return QuantizerRefused(f"onnxruntime's quantizer refuses the model: {kind}{first}")


def _prepared(path: Path, target: Path, notes: list[str]) -> onnx.ModelProto:
    """Write the model as the quantizer takes it, and return it: weights that are no inputs, scales per channel, one file."""
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
    target.write_bytes(serialize(proto, str(path)))
    return proto


def _calibrated(readers: Sequence[tuple[Path, _Reader]], folder: Path, recipe: Recipe, optimize: bool) -> Calibrated:
    """Prepare the first model for the quantizer, and find the range of each activation in all of them."""
    notes: list[str] = []
    (path, reader), *others = readers
    fused, nodes = _preprocessed(path, folder, optimize, notes)
    ranges = _ranges(fused, reader, recipe.calibration)
    for other, other_reader in others:
        _widen(ranges, _ranges(_preprocessed(other, folder, optimize, [])[0], other_reader, recipe.calibration))
    outputs = {each.name for each in onnx.load(fused, load_external_data=False).graph.output}
    if others:
        _stretch(ranges, outputs)
    dead = sorted(name for name in ranges if name not in reader.names and not any(map(np.any, ranges[name].range_value)))
    if outputs.issubset(dead):
        raise QuantizerRefused("calibration collapses: every output is 0 on all samples")
    if dead:
        notes.append(f"activations that are 0 on all samples, so that nothing says their range: {first_few(dead)}")
    return Calibrated(fused, ranges, nodes, tuple(notes))


def _preprocessed(path: Path, folder: Path, optimize: bool, notes: list[str]) -> tuple[Path, dict[str, list[str]]]:
    """Return (path of a model as the quantizer takes it, its nodes named; name -> outputs of each node before fusion)."""
    from onnxruntime.quantization import shape_inference

    room = Path(tempfile.mkdtemp(prefix="calibration-", dir=folder))
    prepared, fused = room / "prepared.onnx", room / "preprocessed.onnx"
    nodes = {_label(node): list(node.output) for node in _prepared(path, prepared, notes).graph.node}
    shape_inference.quant_pre_process(str(prepared), str(fused), skip_optimization=not optimize, skip_symbolic_shape=True)
    proto = onnx.load(fused)
    names = Counter(node.name for node in proto.graph.node)
    for node in proto.graph.node:
        if not node.name or names[node.name] > 1:
            node.name = _label(node) if not node.name else f"{node.name} ({node.output[0]})"
    fused.write_bytes(serialize(proto, str(path)))
    return fused, nodes


def _stretch(ranges: Any, names: Collection[str]) -> None:  # onnxruntime's TensorsData
    from onnxruntime.quantization import calibrate

    for name in [name for name in ranges if name in names]:
        low, high = (end * end.dtype.type(STRETCH) for end in ranges[name].range_value)
        ranges[name] = calibrate.TensorData(lowest=low, highest=high)


def _widen(ranges: Any, others: Any) -> None:  # onnxruntime's TensorsData
    """Let ranges reach as far as others of the same names."""
    from onnxruntime.quantization import calibrate

    for name in [name for name in ranges if name in others]:
        (low, high), (other_low, other_high) = ranges[name].range_value, others[name].range_value
        ranges[name] = calibrate.TensorData(lowest=np.minimum(low, other_low), highest=np.maximum(high, other_high))


def _ranges(path: Path, reader: _Reader, calibration: Calibration) -> Any:  # onnxruntime's TensorsData
    from onnxruntime import quantization
    from onnxruntime.quantization import calibrate

    method = getattr(quantization.CalibrationMethod, CALIBRATIONS[calibration])
    calibrator = calibrate.create_calibrator(
        path,
        None,
        augmented_model_path=str(path.with_name("augmented.onnx")),
        calibrate_method=method,
        extra_options=HISTOGRAMS.get(calibration, {}),
    )
    while reader.start():  # feed by feed: onnxruntime keeps all activations of those that it is given at once
        calibrator.collect_data(reader)
    ranges = calibrator.compute_data()
    for name in ranges:
        if not all(np.isfinite(end).all() for end in ranges[name].range_value):
            raise QuantizerRefused(f"calibration gives no range: activation '{name}' is Inf or NaN")
    return ranges


def _label(node: onnx.NodeProto) -> str:
    return node.name or next((name for name in node.output if name), node.op_type)


def _excluded(calibrated: Calibrated, globs: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the names of the nodes that globs leave in float, and notes about those that there are no more."""
    excluded: dict[str, None] = {}
    notes = []
    nodes = onnx.load(calibrated.path, load_external_data=False).graph.node if globs else ()
    names = {node.name for node in nodes}
    for glob in globs:
        meant = {name: outputs for name, outputs in calibrated.nodes.items() if fnmatchcase(name, glob)}
        outputs = {output for outputs in meant.values() for output in outputs}
        # onnxruntime names a node that it has fused after the first: name/MatMulAddFusion.
        gone = tuple(f"{name}/" for name in meant if name not in names)
        hit = [each.name for each in nodes if each.name in meant or outputs.intersection(each.output) or each.name.startswith(gone)]
        if not hit:
            notes.append(f"the folded model has no node {glob!r} to leave in float")
        excluded.update(dict.fromkeys(hit))
    return [*excluded], notes


def _quantize(calibrated: Calibrated, target: Path, recipe: Recipe, only: list[str], left: list[str]) -> tuple[str, ...]:
    """Write the quantized model, and return the names of the nodes that are quantized in it."""
    from onnxruntime import quantization
    from onnxruntime.quantization import qdq_quantizer, quant_utils, registry

    quantizer = qdq_quantizer.QDQQuantizer(
        quant_utils.load_model_with_shape_infer(calibrated.path),
        recipe.per_channel,
        recipe.reduce_range,
        getattr(quantization.QuantType, recipe.weights),
        getattr(quantization.QuantType, recipe.activations),
        calibrated.ranges,
        only,
        left,
        sorted({*registry.QLinearOpsRegistry, *registry.QDQRegistry}),
        {},
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(target), False)
    made = onnx.load(target, load_external_data=False).graph
    floats = {output for node in made.node if node.op_type == "DequantizeLinear" for output in node.output}
    chosen = [node for node in made.node if node.name not in left and (not only or node.name in only)]
    return tuple(node.name for node in chosen if node.op_type != "QuantizeLinear" and floats.intersection(node.input))


class _Reader:
    """A calibration data reader as onnxruntime asks it: one feed from its file after each `start`."""

    def __init__(self, folder: Path, feeds: Sequence[int], progress: Callable[[str], None] | None) -> None:
        self.folder = folder
        self.feeds = feeds
        self.progress = progress or (lambda text: None)
        self.place = 0
        self.names: set[str] = set()
        self._is_open = False

    def start(self) -> bool:
        """Let the next feed be read; False where there is none."""
        self._is_open = self.place < len(self.feeds)
        return self._is_open

    def get_next(self) -> Feed | None:
        """Return the feed, or None where it has been read."""
        if not self._is_open:
            return None
        self._is_open = False
        self.place += 1
        self.progress(f"calibrating on feed {self.place} of {len(self.feeds)}")
        with open(feed_path(self.folder, self.feeds[self.place - 1]), "rb") as file:
            feed: Feed = pickle.load(file)
        self.names.update(feed)
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
    recipe: RecipeFields
    optimize: bool
    only: list[str]
    left: list[str]
    restated: list[tuple[str, list[int]]]
    seconds: float


def serve() -> None:
    """Quantize what stdin asks for, a job in JSON a line, and answer on stdout, until stdin ends.

    A line of stdin is a Job. Answers are lines of MARK and a dict: "progress" while it works, at last "notes" and "nodes", or "refused".
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

    calibrations: dict[object, Calibrated] = {}
    while True:
        job: Job = json.loads(jobs.get())
        # The quantizer writes copies of the model there: what it leaves when it is killed goes with the rest.
        tempfile.tempdir = job["folder"]
        # A loop in C++ may hold the interpreter lock, and then no thread sees that stdin has ended.
        faulthandler.dump_traceback_later(job["seconds"] + GRACE, exit=True, file=nowhere)
        try:
            made = quantize_file(
                *(Path(job["path"]), Path(job["target"]), Path(job["folder"]), job["feeds"]),
                recipe=Recipe.of(job["recipe"]),
                optimize=job["optimize"],
                only=job["only"],
                left=job["left"],
                restated=[(Path(place), numbers) for place, numbers in job["restated"]],
                calibrations=calibrations,
                progress=lambda text: say(progress=text),
            )
            say(notes=made.notes, nodes=made.nodes)
        except QuantizerRefused as reason:
            say(refused=str(reason))
        faulthandler.cancel_dump_traceback_later()


def _listen(jobs: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        jobs.put(line)
    os._exit(0)
