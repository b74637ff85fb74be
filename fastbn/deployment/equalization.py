"""Cross-layer equalization: positive scales move from a layer into those that read it, through whatever lets them pass.

int8 has one scale for all channels of an activation, so a channel that is small beside others keeps few of its bits. A layer whose channel
is divided by s, with layers behind it whose weights for that channel are multiplied by s, computes the same (M. Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", 2019). Here s is an affine that travels, as in a fold: backward into the
layer, and forward into all that read it, through every operator that lets a positive scale pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.row import Origin
from fastbn.graph.planner.search import Search
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal
from fastbn.graph.runtime import Runnable, runtime_errors, session

if TYPE_CHECKING:
    from fastbn.graph.model.constant import Constant
    from fastbn.graph.model.node import Node, Value
    from fastbn.graph.ops.affine import FloatArray
    from fastbn.graph.parity.feeds import Feed
    from fastbn.graph.planner.plan import Plan

__all__ = ["Scales", "equalized", "rescaled"]

# Label of a layer -> by what its channels are divided.
Scales = dict[str, "FloatArray"]

# Operators with a weight, and its slot.
LAYERS, WEIGHT = ("Conv", "ConvTranspose", "Gemm", "MatMul"), 1

# What stands between a layer and the activation that is quantized.
ACTIVATIONS = ("Relu", "LeakyRelu", "PRelu")

# How much of the range of an activation a scale evens out, the rest is that of weights: measured on digit classifiers, docs/deploy.md.
SHARE = 0.3

# The largest and smallest scale, and how often all layers are gone through: a layer between two others has a part in both scales.
LARGEST, SWEEPS = 64.0, 2


def equalized(path: Path, target: Path, feeds: Sequence[Feed], per_channel: bool) -> Scales:
    """Write a model whose channels are more alike, and computes the same; return the scales, none where nothing was written.

    Parameters
    ----------
    path, target : Path
        The model, and where the other goes: into the same folder, whose data files both read.
    feeds : list of dict of name -> array
        Inputs that tell the ranges of activations.
    per_channel : bool
        Whether weights will have a scale for each output channel, so that a small one costs nothing there.
    """
    layers = _Layers(path)
    try:
        largest = _largest(layers, feeds)
    except runtime_errors():
        return {}
    scales: Scales = {}
    for _ in range(SWEEPS):
        for node in layers.nodes:
            scale = layers.scale(node, largest.get(node), per_channel)
            if scale is None or not layers.move(node, scale):
                continue
            largest[node] = largest[node] / scale
            scales[node.label] = scales.get(node.label, 1) * scale
    if scales:
        target.write_bytes(storage.serialize(layers.proto(), str(path)))
    return scales


def rescaled(path: Path, target: Path, scales: Mapping[str, FloatArray]) -> bool:
    """Write a model with the same layers and other weights, divided by these scales; say whether all of them found their way."""
    layers = _Layers(path)
    nodes = {node.label: node for node in layers.nodes}
    if not all(label in nodes and layers.move(nodes[label], scale) for label, scale in scales.items()):
        return False
    target.write_bytes(storage.serialize(layers.proto(), str(path)))
    return True


class _Layers:
    """The layers of a model, and the constants that scales have changed."""

    def __init__(self, path: Path) -> None:
        self.index = Index(storage.load(path))
        self.view = GraphView(self.index)
        known = [node for node in self.index.main.ordered if node.is_op(*LAYERS) and self.index.constant(node.input(WEIGHT)) is not None]
        labels = [node.label for node in known]
        self.nodes = [node for node in known if labels.count(node.label) == 1]

    def move(self, node: Node, scale: FloatArray) -> bool:
        """Divide what a layer gives by a scale, and let its readers make up for it; say whether that was possible."""
        plan = self._plan(node, scale)
        if plan is None:
            return False
        self.view.apply(plan)
        return True

    def _plan(self, node: Node, scale: FloatArray) -> Plan | None:
        given = node.outputs[0]
        if given is None:
            return None
        nobody = copy.copy(node)  # asks for the layer's output and is none of its readers, so that all of these undo the change
        affine = Affine(1 / scale, np.zeros_like(scale), axis_of(node))
        try:
            plan = Search(self.view, Origin(nobody, given), "rearrange").backward(given, affine, nobody, -1)
        except Refusal:
            return None
        is_plain = not (plan.attributes or plan.bypassed or plan.replaced or plan.widened or plan.alike)
        return plan if is_plain and all(self.view.tensor(*place) is not None for place in plan.constants) else None

    def scale(self, node: Node, largest: FloatArray | None, per_channel: bool) -> FloatArray | None:
        """Return the scale that evens out the ranges of a layer's channels and of the weights that read them, None where none can pass.

        A scale that is another one for every channel goes the way first: by what a weight has changed it tells of which channel it is.
        """
        if largest is None:
            return None
        channels = largest.size
        plan = self._plan(node, _marks(channels))
        if plan is None:
            return None
        own, read = np.zeros(channels), np.zeros(channels)
        for (layer, slot), constant in plan.constants.items():
            if layer.is_op(*LAYERS) and slot == WEIGHT:
                before = self.view.tensor(layer, slot)
                assert before is not None, "_plan has looked"
                _note(own if layer is node else read, layer, before, constant, per_channel and layer is not node)
        size = largest if per_channel else own
        told = (size > 0) & (read > 0)
        if not told.any():
            return None
        share = SHARE if per_channel else 0.5
        scale = np.ones(channels)
        scale[told] = size[told] ** share / read[told] ** (1 - share)
        scale[told] /= np.exp(np.log(scale[told]).mean())
        return np.clip(scale, 1 / LARGEST, LARGEST)

    def proto(self) -> onnx.ModelProto:
        """Return the model with the constants that have changed."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.index.proto)
        taken = {name for scope in self.index.scopes for name in scope.values}
        for (node, slot), constant in self.view.constants.items():
            name = f"{node.label}.equalized.{slot}"
            while name in taken:
                name += "_"
            taken.add(name)
            proto.graph.initializer.append(numpy_helper.from_array(constant.array(), name))
            proto.graph.node[node.position].input[slot] = name
        read = {name for graph in scopes_of(proto.graph) for node in graph.node for name in node.input}
        read |= {info.name for graph in scopes_of(proto.graph) for info in graph.output}
        kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        proto.ir_version = max(proto.ir_version, 4)  # from which on constants need not be inputs
        return proto


def axis_of(node: Node) -> int:
    """Return the axis of the channels that a layer gives."""
    return 1 if node.is_op("Conv", "ConvTranspose") else -1


def _marks(channels: int) -> FloatArray:
    """Return numbers between 1 and 2, another one for every channel."""
    return 1 + (1 + np.arange(channels)) / (channels + 1)


def _note(ranges: FloatArray, layer: Node, before: Constant, after: Constant, per_channel: bool) -> None:
    """Note the largest weights of every channel, told by the marks by which they were multiplied or divided; per_channel measures a weight
    by the largest one of its output channel."""
    weight, changed = before.array().astype(np.float64), np.abs(after.array().astype(np.float64))
    size = np.abs(weight)
    ratio = np.divide(changed, size, out=np.ones_like(size), where=size > 0)
    ratio = np.maximum(ratio, np.divide(1, ratio, out=np.ones_like(size), where=ratio > 0))
    if per_channel:
        rest = tuple(axis for axis in range(size.ndim) if axis != _output_axis(layer) % size.ndim)
        most = size.max(axis=rest, keepdims=True, initial=0)
        size = size / np.where(most > 0, most, 1)
    channels = np.rint((ratio - 1) * (ranges.size + 1) - 1).astype(int)
    marked = (channels >= 0) & (channels < ranges.size) & (size > 0)
    np.maximum.at(ranges, channels[marked], size[marked])


def _output_axis(layer: Node) -> int:
    """Return the axis of a weight that counts the channels which its layer gives."""
    if layer.is_op("Gemm"):
        return 0 if layer.attribute("transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1}.get(layer.op, -1)


def _largest(layers: _Layers, feeds: Sequence[Feed]) -> dict[Node, FloatArray]:
    """Return the largest absolute value of each channel of the activation behind each layer."""
    behind = {node: _behind(node) for node in layers.nodes}
    watched = onnx.ModelProto()
    watched.CopyFrom(layers.index.proto)
    given = {info.name for info in watched.graph.output}
    names = [name for name in dict.fromkeys(value.name for value in behind.values() if value is not None) if name not in given]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    runnable = Runnable.of(layers.index.source).with_proto(watched)
    assert isinstance(runnable.model, bytes), "with_proto serializes"
    opened = session(runnable.model, runnable.folder, optimize=True)
    wanted = [value.name for value in behind.values() if value is not None]
    found: dict[Node, FloatArray] = {}
    for feed in feeds:
        values = dict(zip(wanted, opened.run(wanted, feed), strict=True))
        for node, value in behind.items():
            array = None if value is None else values[value.name]
            if array is None or array.dtype != np.float32 or array.ndim < 2 or not array.size:
                continue
            channels = np.moveaxis(np.abs(array), axis_of(node), 0)
            most = channels.reshape(len(channels), -1).max(axis=1).astype(np.float64)
            found[node] = np.maximum(found[node], most) if node in found and found[node].shape == most.shape else most
    return found


def _behind(node: Node) -> Value | None:
    """Return the value behind a layer and its activation."""
    value = node.outputs[0]
    while value is not None and len(value.readers) == 1 and value.readers[0][0].is_op(*ACTIVATIONS) and not value.is_output:
        value = value.readers[0][0].outputs[0]
    return value
