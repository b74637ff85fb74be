"""One node in a model, and what its row makes of an affine there, without the planner around it."""

import re
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from sketch import model, normal, run

from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.registry import row_of
from fastbn.graph.ops.row import Origin, Skip, Transfer, Traveler
from fastbn.graph.planner.view import GraphView
from fastbn.graph.reasons import Refusal


def ints(*values):
    return np.array(values, np.int64)


def affine(channels, axis, *, scale=True, shift=True, positive=False, rank=0):
    """Return an affine with random numbers; axis None: one number for every element."""
    rng = np.random.default_rng([7, channels])
    signs = 1 if positive else np.resize([1, -1], channels)
    scales = rng.uniform(0.5, 2, channels) * signs if scale else np.ones(channels)
    return Affine(scales, rng.normal(size=channels) if shift else np.zeros(channels), axis, rank)


def applied(given, array):
    """Return S * array + T."""
    scale, shift, _ = given.shaped(array.ndim)
    return scale * array.astype(np.float64) + shift


class Setting:
    """One node, named y, in a model; x is its data, z another input."""

    def __init__(
        self,
        node,
        given,
        *,
        x=(2, 4, 6, 6),
        z=None,
        slot=0,
        opset=17,
        unknown=False,
        strategy="plain",
        outputs="y",
        before="",
        skip=None,
        **constants,
    ):
        self.given, self.slot, self.strategy, self.skip = given, slot, strategy, skip
        # Negative sizes stand for unknown ones: of the shape, its size is used.
        self.feeds = {"x": normal(*map(abs, x)) + np.float32(0.3)}
        shapes = {"x": x}
        if z is not None:
            self.feeds["z"], shapes["z"] = normal(*map(abs, z), seed=4), z
        texts = {name: ",".join("N" if size < 0 else str(size) for size in shape) for name, shape in shapes.items()}
        inputs = ", ".join(f"float[{text}] {name}" for name, text in texts.items())
        nodes = f"{before} {outputs} = {node}"
        if unknown:  # a Reshape to a list that the caller gives hides the rank
            hidden = re.sub(r"\bx\b", "h", node)
            inputs, nodes = f"{inputs}, int64[?] list", f"{before} h = Reshape(x, list) {outputs} = {hidden}"
            self.feeds["list"] = ints(*map(abs, x))
        self.proto = model(f"({inputs}) => ({outputs}) {{ {nodes} }}", opset=opset, **constants)
        self.view = GraphView(Index(storage.load(self.proto)))
        self.node = next(node for node in self.view.index.order if node.label == "y")
        self.row = row_of(self.node, self.view)

    def answers(self, direction):
        """Return the transfers of a row as a list."""
        values = self.node.outputs if direction == "backward" else self.node.inputs
        value = values[self.slot]
        traveler = Traveler(self.given, value, self.slot, self.strategy, Origin(self.node, value), self.added())
        found = getattr(self.row, direction)(self.node, traveler, self.view)
        return [found] if isinstance(found, Transfer) else [*found]

    def added(self):
        """Return what is asked for besides the affine: the data, scaled, in the sum."""
        return None if self.skip is None else Skip(next(value for value in self.node.inputs if value.name == "x"), self.skip)

    def outputs(self, changes, inputs, attributes):
        """Return the outputs of the node with other constants, inputs and attributes."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        node = next(each for each in proto.graph.node if each.name == "y")
        for slot, array in [*changes.items(), *inputs.items()]:
            while len(node.input) <= slot:
                node.input.append("")
            node.input[slot] = f"new{slot}"
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array, np.float32), f"new{slot}"))
        for name, value in attributes.items():
            kept = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
        return run(proto, self.feeds)

    def read(self, slot):
        """Return what the node reads at a slot."""
        name = self.node.inputs[slot].name
        constant = self.view.constant(self.node.inputs[slot])
        return self.feeds["x" if name == "h" else name] if constant is None else constant.array()


def assert_refused(make, direction, code, part):
    """Demand that a row refuses with this code, and this part of a sentence."""
    with pytest.raises(Refusal) as caught:
        make().answers(direction)
    assert caught.value.code == code, caught.value.sentence
    assert part in caught.value.sentence, caught.value.sentence


def case(*arguments, **options):
    """Return what makes a Setting: a test makes its own."""
    return partial(Setting, *arguments, **options)


A4, A4P = affine(4, 1), affine(4, 1, positive=True)
A4S, A4T = affine(4, 1, shift=False), affine(4, 1, scale=False)
PER_ELEMENT = affine(1, None)
W = normal(4, 4, 3, 3)
TRANSPOSED = normal(4, 3, 2, 2)
GROUPED = "ConvTranspose <group = 2> (x, w, b)"
K, LEFT = normal(4, 1, 1, seed=2), normal(2, 6, seed=2)
BN = "BatchNormalization(x, s, t, m, v)"
HALVES = np.float32([2, 2])
