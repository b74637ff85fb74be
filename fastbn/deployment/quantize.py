"""Static int8 quantisation by onnxruntime.quantization: QDQ, weights per channel, calibrated on samples."""

import contextlib
import io
import logging
import platform
from dataclasses import dataclass
from pathlib import Path

import onnx

from fastbn.errors import FastbnError
from fastbn.graph.runtime import said
from fastbn.graph.storage import serialize

__all__ = ["QuantizerRefused", "Recipe", "quantize_file"]

# DequantizeLinear takes one scale per channel from this opset on.
PER_CHANNEL_OPSET = 13

# Initializers need not be graph inputs from this IR version on.
FREE_INITIALIZERS_IR = 4

# Levels of onnxruntime's logger, the second its default.
FATAL, WARNING = 4, 2


class QuantizerRefused(Exception):
    """Why onnxruntime's quantiser made nothing of a model, in its words."""


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


def quantize_file(path, target, feeds, folder, *, recipe, optimise=True, progress=None):
    """Quantise a model file.

    Parameters
    ----------
    path, target : Path
    feeds : list of dict of name -> array
        To calibrate on.
    folder : Path
        For what lies between.
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
    notes = []
    with _quiet() as complaints:
        try:
            prepared = _prepared(path, folder, notes)
            _quantize(prepared, target, feeds, folder, recipe, optimise, progress)
        except MemoryError:
            raise
        except Exception as error:  # the quantiser raises whatever its parts do, AttributeError and KeyError among them
            kind = "" if isinstance(error, (FastbnError, ValueError)) else f"{type(error).__name__}: "
            first = said(error) if str(error).strip() else "; ".join(complaints[-1:])
            raise QuantizerRefused(f"{kind}{first}") from error
    made = onnx.load(target, load_external_data=False)
    if not any(node.op_type == "QuantizeLinear" for node in made.graph.node):
        raise QuantizerRefused("none of its operators has an integer form")
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


def _quantize(prepared, target, feeds, folder, recipe, optimise, progress):
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    fused = folder / "preprocessed.onnx"
    quant_pre_process(str(prepared), str(fused), skip_optimization=not optimise, skip_symbolic_shape=True)
    quantization.quantize_static(
        str(fused),
        str(target),
        _Reader(feeds, progress),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=recipe.reduce_range,
        activation_type=getattr(quantization.QuantType, recipe.activations),
        weight_type=getattr(quantization.QuantType, recipe.weights),
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )


class _Reader:
    """A calibration data reader as quantize_static asks it."""

    def __init__(self, feeds, progress):
        self.feeds = feeds
        self.progress = progress or (lambda text: None)
        self.place = 0

    def get_next(self):
        if self.place == len(self.feeds):
            return None
        self.place += 1
        self.progress(f"calibrating on feed {self.place} of {len(self.feeds)}")
        return self.feeds[self.place - 1]


class _Listener(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage().strip().splitlines()[-1] if record.getMessage().strip() else "")


@contextlib.contextmanager
def _quiet():
    """Keep what the quantiser logs and prints out of the process's streams, and its logging as it was: without a handler on the root, the
    quantiser's first warning would install one. Yields the lines."""
    import onnxruntime

    root, listener = logging.getLogger(), _Listener()
    handlers, root.handlers = root.handlers, [listener]
    onnxruntime.set_default_logger_severity(FATAL)  # its sessions would warn on stderr, from C++
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield listener.lines
    finally:
        root.handlers = handlers
        onnxruntime.set_default_logger_severity(WARNING)
