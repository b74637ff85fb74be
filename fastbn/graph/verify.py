"""Parity: each fold on its own site, then the whole model, in onnxruntime with its optimiser off on both sides.

**Site.** The nodes of one plan, before and after, run on the same random input. What is allowed follows from rounding theory: the folded
segment evaluated with absolute values, |W'| |x| + |b'|, bounds element by element the size of what was rounded, so the difference may be
(8 + 2 sqrt(terms)) u times that, u the unit round-off and terms the length of the sums (sums of n terms err by sqrt(n) u with
overwhelming probability, Higham & Mary 2019; the 8 counts the operations outside the sum). Sums of 16-bit types run in float32 or better.

**Model.** Rounding grows or shrinks on its way to the outputs, by the model's own conditioning, which no formula knows. It is measured: the
original runs again with every batch normalization disturbed by a few units of rounding, and the outputs may differ by a small multiple of
what that changes.
"""

import re
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from fastbn.errors import FastbnError, ModelError, expected
from fastbn.graph.constant import float64_of
from fastbn.graph.lift import ELEMENTWISE, EPSILON, constant_slot, is_batch_norm
from fastbn.graph.model import is_standard
from fastbn.graph.plan import SHAPE_READERS, row_of
from fastbn.graph.report import Parity
from fastbn.graph.rewrite import edited
from fastbn.graph.storage import serialize

__all__ = ["Runnable", "SiteParity", "check_model", "check_site", "feeds_for", "session"]

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}

# Rounding noise put into every batch normalization of the original, in units of round-off, and how much more than its effect is allowed.
NOISE, NOISE_RUNS, NOISE_MARGIN = 4, 3, 8

# Sizes tried for unknown dimensions: (first axis, other axes).
SIZES = ((2, 16), (1, 16), (2, 64), (1, 64), (1, 1), (2, 224), (16, 16), (1, 3), (1, 2))

KINDS = ("normal", "wide", "zero")

# Constants of elementwise operators up to this size are disturbed.
LARGEST_DISTURBED = 1 << 16


def _runtime():
    try:
        import onnxruntime
    except ImportError as error:
        raise FastbnError(expected("onnxruntime (pip install 'fastbn[onnx]'), or verify=False", "none installed", "verify")) from error
    return onnxruntime


def _said(error):
    """Return the first line of what onnxruntime said, without its prefix."""
    line = str(error).strip().splitlines()[0]
    if line.startswith("[ONNXRuntimeError]"):
        line = line.split(" : ", 3)[-1]
    return re.sub(r"^/\S+:\d+ .*?\) (?=[A-Z])", "", line)[:300]  # the place in onnxruntime's own sources


def session(model, folder=None, threads=0, optimise=False):
    """Return an onnxruntime session of a model given as bytes or path; folder is where external data of bytes lies."""
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class SiteParity:
    """What running one site said: worst error and what is allowed there; both None where it was not run, for the reason in note."""

    ok: bool
    error: float | None = None
    bound: float | None = None
    note: str | None = None


def check_site(plan, site, seed=0):
    """Run the nodes of one plan before and after folding.

    Parameters
    ----------
    plan : plan.Plan
    site : plan.Site
        The planner's view with the plan in it.
    seed : int
        Of the random input.

    Returns
    -------
    SiteParity
    """
    segment = _Segment(plan, site)
    note = None
    try:
        for amplitude in (1.0, 1 / 64, 1 / 4096):
            before, after, size = segment.run(np.random.default_rng(seed), amplitude)
            if np.isfinite(before).all():
                break
        else:
            return SiteParity(True, note="not run: the original overflows on every input tried")
    except _NotRun as reason:
        return SiteParity(True, note=f"not run: {reason}")
    if segment.promoted:
        note = "run in float32: onnxruntime has no bfloat16 kernels"
    allowed = segment.units() * size
    error = np.abs(after - before)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(error == 0, 0.0, error / allowed)
    part = np.where(np.isfinite(after), part, np.inf)
    worst = int(np.argmax(part))
    return SiteParity(bool(part.flat[worst] <= 1), float(error.flat[worst]), float(allowed.flat[worst]), note)


class _NotRun(Exception):
    """A site that onnxruntime cannot run, in its words."""


class _Segment:
    """The nodes of one plan as two tiny models whose constants are inputs: nothing is copied, and nothing can be optimised away."""

    def __init__(self, plan, site):
        self.plan = plan
        self.site = site
        self.index = site.index
        rank = {node: position for position, node in enumerate(self.index.order)}
        self.lifted = set(plan.lifted)
        self.before = sorted({*plan.path, *plan.lifted, *plan.dissolved} - set(plan.replaced.values()), key=rank.get)
        self.inside = {value for node in self.before for value in node.outputs if value is not None}
        self.results = [value for node in self.before for value in node.outputs if value is not None and self._leaves(value)]
        self.dtype = self._data_type()
        self.promoted = self.dtype.name == "bfloat16"

    def _data_type(self):
        """Return the type of the data: that of any constant, but the parameters of a BatchNormalization may have another."""
        constants = [
            (is_batch_norm(node), found.dtype)
            for node in self.before
            for found in map(self.index.constant, node.inputs)
            if found is not None and found.dtype.name in UNIT
        ]
        return min(constants, key=lambda entry: entry[0])[1]

    def _leaves(self, value):
        """Say whether anything outside reads a value of the site that both sides have."""
        if value.is_output:
            return True
        return any(
            node not in self.before and node not in self.site.removed and not node.is_op(*SHAPE_READERS) for node, _ in value.readers
        )

    def units(self):
        """Return how many times the size of the terms the difference may be."""
        unit = UNIT[self.dtype.name]
        terms = sum(row_of(node, self.index).terms(node, self.site) for node in self.before if node not in self.lifted)
        return 8 * unit + 2 * np.sqrt(terms) * min(unit, UNIT["float32"])

    def run(self, rng, amplitude):
        """Return (before, after, size of the terms) as float64 arrays."""
        complaint = None
        for inputs in self._inputs(rng, amplitude):
            feeds = {name: self._typed(values) if values.dtype.kind == "f" else values for name, values in inputs.items()}
            try:
                before = _run_nodes(*self._original(feeds), self.index.opset)
                after = _run_nodes(*self._folded(feeds, magnitudes=False), self.index.opset)
                size = _run_nodes(*self._folded(feeds, magnitudes=True), self.index.opset)
            except _runtime_errors() as error:
                complaint = complaint or _said(error)
                continue
            sides = [np.concatenate([part.astype(np.float64).reshape(-1) for part in side]) for side in (before, after, size)]
            if not sides[0].size:
                complaint = complaint or "what comes out of the site is empty on every input tried"
                continue
            if any(node.is_op("GRU") for node in self.before):
                # Absolute values close its update gate, and 1 - z is next to nothing; its states are averages of numbers up to 1.
                sides[2] = np.maximum(sides[2], 1.0)
            return sides
        raise _NotRun(complaint or "an input of the site has no known type")

    def _typed(self, values):
        return values.astype(np.float32 if self.promoted else self.dtype)

    def _array(self, array):
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else array

    def _inputs(self, rng, amplitude):
        """Yield inputs of the site by name: random ones in the shapes that its operators propose, in those that the model says, the values
        that the model itself has there, and random ones of any rank."""
        proposed, stated, needed = {}, {}, set()
        for node in self.before:
            for slot, value in enumerate(node.inputs):
                if value is None or value in self.inside or self.index.constant(value) is not None:
                    continue
                needed.add(value)
                shape = row_of(node, self.index).sample(node, self.site).get(slot)
                if shape is not None:
                    proposed[value.name] = shape
                    stated[value.name] = self.site.small_shape(value) or shape
        shapes = [] if len(proposed) < len(needed) else [proposed] if stated == proposed else [proposed, stated]
        for chosen in shapes:
            yield {name: amplitude * rng.standard_normal(shape) for name, shape in chosen.items()}
        captured = _captured(self.index, needed)
        if captured:
            yield captured
        for rank in (2, 3, 4, 5) if shapes else ():
            yield {name: amplitude * rng.standard_normal((*shape, 3, 3, 3)[:rank]) for name, shape in proposed.items()}

    def _original(self, feeds):
        feeds = dict(feeds)
        for node in self.before:
            for value in node.inputs:
                found = self.index.constant(value)
                if found is not None:
                    feeds[value.name] = self._array(found.array())
        return [_modern(node.proto, self.index.opset) for node in self.before], feeds, [value.name for value in self.results]

    def _folded(self, feeds, magnitudes):
        """Return the folded segment; with magnitudes, every input and constant is its absolute value and every difference is a sum."""
        feeds = {name: np.abs(values) if magnitudes and values.dtype.kind == "f" else values for name, values in feeds.items()}
        protos = []
        for node in self.before:
            if node in self.site.removed:
                continue
            node = self.plan.replaced.get(node, node)
            proto = _modern(node.proto, self.index.opset)
            for slot, value in enumerate(node.inputs):
                constant = self.plan.constants.get((node, slot))
                found = self.index.constant(value)
                if constant is not None:
                    proto.input[slot] = f"{node.label}/{slot}"
                    feeds[proto.input[slot]] = self._array(constant.magnitude() if magnitudes else constant.array())
                elif found is not None:
                    array = self._array(found.array())
                    feeds[value.name] = _magnitude(node, slot, array) if magnitudes else array
                elif value is not None:
                    proto.input[slot] = self._name(value)
            for slot in (slot for step, slot in self.plan.constants if step is node and slot >= len(node.inputs)):
                name = f"{node.label}/{slot}"
                constant = self.plan.constants[node, slot]
                edited(proto, {slot: name}, {})
                feeds[name] = self._array(constant.magnitude() if magnitudes else constant.array())
            edited(proto, {}, self.plan.attributes.get(node, {}))
            protos.append(proto)
            if magnitudes:
                protos.extend(_bounding(proto))
        return protos, feeds, [self._name(value) for value in self.results]

    def _name(self, value):
        while value.producer in self.site.removed and value.producer in self.before:
            node = value.producer
            value = self.plan.dissolved.get(node) or node.inputs[self.site.data_slot(node)]
        return value.name


def _captured(index, values):
    """Return what values of the main graph are when the original runs, by name; None where it does not."""
    if any(value.scope is not index.main for value in values):
        return None
    proto = onnx.ModelProto()
    proto.CopyFrom(index.proto)
    names = [value.name for value in values]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    folder = index.source.path.parent if index.source.path else None
    try:
        run = session(serialize(proto, index.source.name), folder)
        return dict(zip(names, run.run(names, _feeds(run, index, index.input_shapes, seed=0)[0]), strict=True))
    except (*_runtime_errors(), _ModelNotRun, ModelError):
        return None


def _magnitude(node, slot, array):
    """Return a constant for the run that bounds: |x| - mean must not cancel, so the mean is taken as -|mean|; a variance is one already."""
    if array.dtype.kind not in "fV" or (is_batch_norm(node) and slot == 4):
        return array
    return -np.abs(array) if is_batch_norm(node) and slot == 3 else np.abs(array)


# What bounds the size of a result whose operator takes signs into account.
UNSIGNED = {"Sub": "Add", "Neg": "Identity", "ReduceMin": "ReduceMax"}


def _bounding(proto):
    """Make a node bound the size of its terms; return what must follow it."""
    if proto.op_type == "DequantizeLinear":
        absolute = helper.make_node("Abs", [f"{proto.output[0]}/signed"], [proto.output[0]])
        proto.output[0] = absolute.input[0]
        return [absolute]
    proto.op_type = UNSIGNED.get(proto.op_type, proto.op_type)
    for attribute in proto.attribute:
        if proto.op_type == "Gemm" and attribute.name == "alpha":
            attribute.f = abs(attribute.f)
    return []


def _modern(proto, opset):
    """Return a copy of a NodeProto that onnxruntime has a kernel for: before opset 7 inference was an attribute, now it is the default."""
    copy = onnx.NodeProto()
    copy.CopyFrom(proto)
    if opset < 7:
        kept = [
            attribute
            for attribute in copy.attribute
            if attribute.name not in ("is_test", "consumed_inputs", "spatial", "broadcast", "axis")
        ]
        del copy.attribute[:]
        copy.attribute.extend(kept)
    return copy


def _runtime_errors():
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException", "EPFail", "NoSuchFile")
    return (*(getattr(state, name) for name in names), RuntimeError, ValueError)


def _run_nodes(protos, feeds, results, opset):
    """Run a list of NodeProto in onnxruntime, every constant an input."""
    read = {name for proto in protos for name in proto.input}
    inputs = []
    for name, array in feeds.items():
        if name in read:
            inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim))
    graph = helper.make_graph(protos, "site", inputs, [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(results)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset if opset >= 7 else 9)], ir_version=8)
    run = session(model.SerializeToString(), threads=1)
    return run.run(results, {name: array for name, array in feeds.items() if name in read})


@dataclass
class Runnable:
    """A model as onnxruntime takes it: bytes or a path, the folder of its external data, and its ModelProto for questions."""

    model: object
    proto: onnx.ModelProto
    folder: object = None

    @classmethod
    def of(cls, source):
        """Return the Runnable of a storage.Source."""
        if source.path is not None:
            return cls(str(source.path), source.proto, source.path.parent)
        return cls(serialize(source.proto, source.name), source.proto)


class _ModelNotRun(Exception):
    """A model that onnxruntime cannot run, in its words."""


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
        feeds = _feeds(reference, index, input_shapes or {}, seed)
        progress("loading the folded model")
        try:
            candidate = _open(folded)
        except _runtime_errors() as error:
            return Parity("failed", reason=f"onnxruntime cannot load the folded model: {_said(error)}")
        noisy = _Noisy(original, index)
        return _compare(reference, candidate, noisy, feeds, seed, progress)
    except _ModelNotRun as reason:
        return Parity("not-run", reason=str(reason))


def _open(model):
    return session(model.model, model.folder if isinstance(model.model, bytes) else None)


def _load(model, index):
    """Return a session of the original; where onnxruntime has none, say whether the model or the runtime is to blame."""
    try:
        return _open(model)
    except _runtime_errors() as error:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        invalid = isinstance(error, (state.InvalidGraph, state.Fail, state.InvalidProtobuf)) and "opset" not in str(error).lower()
        if invalid and _all_standard(index):
            raise ModelError(expected("a valid model", f"one of which onnxruntime says: {_said(error)}", index.source.name)) from error
        raise _ModelNotRun(f"onnxruntime cannot load the original: {_said(error)}") from error


def _all_standard(index):
    return not index.proto.functions and all(is_standard(node.domain) for node in index.order)


def feeds_for(model, index, input_shapes=None, seed=0):
    """Return one dict of inputs per kind for a Runnable; raises ModelError where onnxruntime cannot run it."""
    try:
        return _feeds(_load(model, index), index, input_shapes or {}, seed)
    except _ModelNotRun as reason:
        raise ModelError(expected("a model that onnxruntime runs", str(reason), index.source.name)) from reason


def _feeds(reference, index, input_shapes, seed):
    """Return one dict of inputs per kind, in sizes that the model accepts."""
    inputs = [info for info in index.proto.graph.input if info.name in {entry.name for entry in reference.get_inputs()}]
    complaint = None
    tried = set()
    for first, other in SIZES:
        shapes = {info.name: input_shapes.get(info.name) or _sized(info, first, other) for info in inputs}
        key = tuple(shapes.values())
        if key in tried:
            continue
        tried.add(key)
        try:
            feeds = [_feed(inputs, shapes, kind, np.random.default_rng([seed, number])) for number, kind in enumerate(KINDS)]
            reference.run(None, feeds[-1])
            return feeds
        except _runtime_errors() as error:
            complaint = complaint or error
    raise _ModelNotRun(f"onnxruntime cannot run the original: {_said(complaint)}")


def _sized(info, first, other):
    if not info.type.HasField("tensor_type"):
        raise _ModelNotRun(f"the input '{info.name}' is no tensor")
    shape = info.type.tensor_type.shape
    return tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else (first if axis == 0 else other)
        for axis, dim in enumerate(shape.dim)
    )


def _feed(inputs, shapes, kind, rng):
    feed = {}
    for info in inputs:
        shape = shapes[info.name]
        code = info.type.tensor_type.elem_type
        if code == TensorProto.STRING:
            feed[info.name] = np.full(shape, "a", dtype=object)
            continue
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(code))
        if dtype.name not in UNIT and dtype.kind not in "iub":
            raise _ModelNotRun(f"the input '{info.name}' has type {dtype}")
        if kind == "zero":
            values = np.zeros(shape)
        elif dtype.kind == "b" and kind == "normal":
            values = np.ones(shape)  # with the zeros, every condition is met once and missed once
        elif dtype.kind in "iub":
            values = rng.integers(0, 256 if dtype == np.uint8 else 2, shape)
        elif kind == "wide":
            values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, shape)
        else:
            values = rng.standard_normal(shape)
        feed[info.name] = values.astype(dtype)
    return feed


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
        except _runtime_errors():  # then the noise enters by the graph inputs alone
            self.parameters = {}
            return _open(original)

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
        except _runtime_errors() as error:
            notes.append(f"input '{KINDS[number]}': onnxruntime cannot run the original: {_said(error)}")
            continue
        try:
            after = candidate.run(None, feed)
        except _runtime_errors() as error:
            return Parity("failed", reason=f"onnxruntime cannot run the folded model: {_said(error)}")
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
