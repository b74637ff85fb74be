"""Parity of the whole model, in onnxruntime with its optimiser off on both sides.

Rounding grows or shrinks on its way to the outputs, by the model's own conditioning, which no formula knows. It is measured: the
original runs again with every batch normalization disturbed by a few units of rounding, and the outputs may differ by a small multiple of
what that changes.
"""

import numpy as np
import onnx
from onnx import helper

from fastbn.errors import ModelError, expected
from fastbn.graph.constant import float64_of
from fastbn.graph.feeds import KINDS, ModelNotRun, feeds_of
from fastbn.graph.lift import ELEMENTWISE, EPSILON, constant_slot, is_batch_norm
from fastbn.graph.nesting import is_standard
from fastbn.graph.report import Parity
from fastbn.graph.runtime import UNIT, runtime_errors, said, session
from fastbn.graph.storage import serialize

__all__ = ["check_model", "feeds_for"]


# Rounding noise put into every batch normalization of the original, in units of round-off, and how much more than its effect is allowed.
NOISE, NOISE_RUNS, NOISE_MARGIN = 4, 3, 8


# Constants of elementwise operators up to this size are disturbed.
LARGEST_DISTURBED = 1 << 16


def check_model(original, folded, index, *, input_shapes=None, seed=0, progress=None):
    """Compare two models on the same inputs: all outputs, several inputs, onnxruntime's optimiser off on both sides.

    Parameters
    ----------
    original, folded : Runnable
    index : model.Index
        Of the original.
    input_shapes : dict of name -> tuple of int, optional
        Sizes of graph inputs; without them unknown sizes are tried.
    seed : int
        Of the random inputs and the noise.
    progress : callable of str, optional

    Returns
    -------
    Parity

    Raises
    ------
    ModelError
        The original is made of standard operators and onnxruntime says that it is no valid model.
    """
    progress = progress or (lambda text: None)
    try:
        progress("loading the original")
        reference = _load(original, index)
        feeds = feeds_of(reference, index, input_shapes or {}, seed)
        progress("loading the folded model")
        try:
            candidate = folded.session()
        except runtime_errors() as error:
            return Parity("failed", reason=f"onnxruntime cannot load the folded model: {said(error)}")
        noisy = _Noisy(original, index)
        return _compare(reference, candidate, noisy, feeds, seed, progress)
    except ModelNotRun as reason:
        return Parity("not-run", reason=str(reason))


def _load(model, index):
    """Return a session of the original; where onnxruntime has none, say whether the model or the runtime is to blame."""
    try:
        return model.session()
    except runtime_errors() as error:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        invalid = isinstance(error, (state.InvalidGraph, state.Fail, state.InvalidProtobuf)) and "opset" not in str(error).lower()
        if invalid and _all_standard(index):
            raise ModelError(expected("a valid model", f"one of which onnxruntime says: {said(error)}", index.source.name)) from error
        raise ModelNotRun(f"onnxruntime cannot load the original: {said(error)}") from error


def _all_standard(index):
    return not index.proto.functions and all(is_standard(node.domain) for node in index.order)


def feeds_for(model, index, input_shapes=None, seed=0):
    """Return one dict of inputs per kind for a Runnable; raises ModelError where onnxruntime cannot run it."""
    try:
        return feeds_of(_load(model, index), index, input_shapes or {}, seed)
    except ModelNotRun as reason:
        raise ModelError(expected("a model that onnxruntime runs", str(reason), index.source.name)) from reason


class _Noisy:
    """The original with the parameters of every affine as inputs, so that they can be disturbed by rounding: the scale and bias of a batch
    normalization, the constant of an Add, Sub, Mul or Div."""

    def __init__(self, original, index):
        self.parameters = {}
        self.units = []
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(index.proto)
        self.proto.ir_version = max(self.proto.ir_version, 4)  # before that, an initializer that nothing reads must be an input
        types = {info.name: info.type.tensor_type.elem_type for info in (*index.proto.graph.value_info, *index.proto.graph.input)}
        types |= {info.name: info.type.tensor_type.elem_type for info in index.proto.graph.output}
        for node in index.main.nodes:
            if is_batch_norm(node) and len(node.inputs) == 5:
                self._disturb_batch_norm(node, index, types)
            elif node.is_op(*ELEMENTWISE):
                slot = constant_slot(node, index)
                found = None if slot is None else index.constant(node.inputs[slot])
                if found is not None and found.size <= LARGEST_DISTURBED:
                    values = float64_of(found)
                    self._disturb(node, slot, values, np.abs(values), found.dtype, UNIT[found.dtype.name])
        self.unit = max(self.units, default=UNIT["float32"])
        self.session = self._open(original)

    def _disturb_batch_norm(self, node, index, types):
        found = [index.constant(value) for value in node.inputs[1:5]]
        if any(constant is None or constant.dtype.name not in UNIT for constant in found):
            return
        scale, bias, mean, var = map(float64_of, found)
        # Parameters may be float32 beside float16 data: the data says what rounding does.
        kind = next(filter(None, (types.get(value.name) for value in (node.outputs[0], node.inputs[0]))), None)
        unit = UNIT.get(helper.tensor_dtype_to_np_dtype(kind).name if kind else "", UNIT[found[0].dtype.name])
        with np.errstate(all="ignore"):
            moved = np.abs(bias) + np.abs(scale) * (1 + np.abs(mean) / np.sqrt(var + node.attribute("epsilon", EPSILON)))
        self._disturb(node, 1, scale, np.abs(scale), found[0].dtype, unit)
        self._disturb(node, 2, bias, moved, found[1].dtype, unit)

    def _disturb(self, node, slot, values, size, dtype, unit):
        name = f"fastbn/noise/{node.position}/{slot}"
        self.proto.graph.node[node.position].input[slot] = name
        self.proto.graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), values.shape))
        self.parameters[name] = (values, NOISE * unit * size, dtype)
        self.units.append(unit)

    def _open(self, original):
        try:
            return session(serialize(self.proto, "the original"), original.folder)
        except runtime_errors():  # then the noise enters by the graph inputs alone
            self.parameters = {}
            return original.session()

    def run(self, feed, rng):
        """Return the outputs with disturbed parameters and inputs."""
        noisy = dict(feed)
        for name, (values, size, dtype) in self.parameters.items():
            noisy[name] = np.asarray(values + size * rng.choice([-1.0, 1.0], values.shape)).astype(dtype)
        for name, values in feed.items():
            if values.dtype.name in UNIT:
                disturbed = values.astype(np.float64) * (1 + NOISE * UNIT[values.dtype.name] * rng.choice([-1.0, 1.0], values.shape))
                noisy[name] = np.asarray(disturbed).astype(values.dtype)
        return self.session.run(None, noisy)


def _compare(reference, candidate, noisy, feeds, seed, progress):
    names = [entry.name for entry in reference.get_outputs()]
    if names != [entry.name for entry in candidate.get_outputs()]:
        return Parity("failed", reason=f"the outputs are {names} and {[entry.name for entry in candidate.get_outputs()]}")
    worst, notes = None, []
    for number, feed in enumerate(feeds):
        progress(f"comparing the models on input {number + 1} of {len(feeds)} ({KINDS[number]})")
        try:
            before = reference.run(None, feed)
            again = reference.run(None, feed)
            shaken = [noisy.run(feed, np.random.default_rng([seed, number, turn])) for turn in range(NOISE_RUNS)]
        except runtime_errors() as error:
            notes.append(f"input '{KINDS[number]}': onnxruntime cannot run the original: {said(error)}")
            continue
        try:
            after = candidate.run(None, feed)
        except runtime_errors() as error:
            return Parity("failed", reason=f"onnxruntime cannot run the folded model: {said(error)}")
        for output, name in enumerate(names):
            found = _compare_output(name, before[output], after[output], again[output], [run[output] for run in shaken], noisy.unit)
            if isinstance(found, str):
                if found not in notes:
                    notes.append(found)
                continue
            if worst is None or found[0] > worst[0]:
                worst = found
    if worst is None:
        return Parity("not-run", reason="; ".join(notes) or "the model has no outputs to compare")
    part, name, index, values, error, allowed, reason = worst
    status = "ok" if part <= 1 else "failed"
    return Parity(status, len(feeds), name, index, values, error, allowed, reason, tuple(notes))


def _compare_output(name, before, after, again, shaken, unit):
    """Return (part of what is allowed, name, index, values, error, allowed, reason), or a note where there is nothing to compare."""
    if not isinstance(before, np.ndarray) or before.dtype.kind not in "fiub":
        return f"output '{name}' is no tensor of numbers: not compared"
    if not _same(before, again):
        return f"output '{name}' is random: it differs between two runs of the original"
    if before.shape != after.shape:
        if any(run.shape != before.shape for run in shaken):
            return f"output '{name}' changes its shape with rounding: not compared"
        return np.inf, name, (), (float("nan"), float("nan")), np.inf, 0.0, f"shapes {before.shape} and {after.shape} differ"
    if before.size == 0:
        return 0.0, name, (), (0.0, 0.0), 0.0, 0.0, None
    before, after = before.astype(np.float64), after.astype(np.float64)
    finite = np.isfinite(before)
    same = (np.isnan(before) & np.isnan(after)) | (before == after)
    moved = [np.abs(run.astype(np.float64) - before)[finite & np.isfinite(run)] for run in shaken if run.shape == before.shape]
    noise = max((float(change.max()) for change in moved if change.size), default=0.0)
    size = float(np.abs(before[finite]).max()) if finite.any() else 0.0
    allowed = NOISE_MARGIN * noise + 2 * NOISE * unit * size
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(same, 0.0, np.abs(after - before))
    error = np.where(np.isnan(error), np.inf, error)
    index = np.unravel_index(int(np.argmax(error)), error.shape)
    worst = float(error[index])
    reason = None if np.isfinite(worst) else "Inf or NaN on one side only"
    part = 0.0 if worst == 0 else worst / allowed if allowed else np.inf
    return part, name, tuple(int(i) for i in index), (float(before[index]), float(after[index])), worst, allowed, reason


def _same(one, other):
    return one.shape == other.shape and bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))
