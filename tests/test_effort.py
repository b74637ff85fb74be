"""How much the planner asks: the number of nodes that it looks at grows as the model does, whatever the model looks like.

Counts, not seconds: they are the same on every machine.
"""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.parity import reach
from fastbn.graph.planner.planning import plan
from fastbn.graph.planner.search import Search
from fastbn.graph.planner.view import GraphView

CHANNELS = 4


class Model:
    """A model under construction, one method per kind of it."""

    def __init__(self, kind, count):
        self.rng = np.random.default_rng(0)
        self.nodes, self.constants = [], []
        last = getattr(self, kind)(count)
        self.nodes.append(helper.make_node("Tanh", [last], ["y"]))
        x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", CHANNELS, 4, 4])
        y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, kind, [x], [y], self.constants)
        self.proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def constant(self, values):
        self.constants.append(numpy_helper.from_array(np.asarray(values, np.float32), f"k{len(self.constants)}"))
        return self.constants[-1].name

    def node(self, op, *inputs, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [f"v{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def conv(self, x, channels=CHANNELS):
        return self.node("Conv", x, self.constant(self.rng.standard_normal((CHANNELS, channels, 1, 1))))

    def norm(self, x, channels=CHANNELS):
        scale = self.rng.uniform(0.5, 2, channels) * self.rng.choice([-1, 1], channels)
        rest = [self.rng.normal(size=channels), self.rng.normal(size=channels), self.rng.uniform(0.5, 2, channels)]
        return self.node("BatchNormalization", x, *map(self.constant, (scale, *rest)))

    def chain(self, count):
        x = "x"
        for _ in range(count):
            x = self.node("Relu", self.norm(self.conv(x)))
        return x

    def many_on_one(self, count):
        x = self.conv("x")
        for _ in range(count):
            x = self.norm(x)
        return x

    def fan(self, count):
        x = self.conv("x")
        return self.node("Sum", *(self.node("Relu", self.norm(x)) for _ in range(count)))

    def residual(self, count):
        x = self.conv("x")
        for _ in range(count):
            x = self.node("Add", x, self.conv(self.node("Relu", self.norm(x))))
        return x

    def dense(self, count):
        parts = [self.conv("x")]
        for _ in range(count):
            parts = [self.node("Relu", self.conv(self.node("Concat", *parts, axis=1), CHANNELS * 8))] if len(parts) == 8 else parts
            joined = self.node("Concat", *parts, axis=1)
            parts.append(self.conv(self.node("Relu", self.norm(joined, CHANNELS * len(parts))), CHANNELS * len(parts)))
        return self.node("Concat", *parts, axis=1)

    def branches(self, count):
        return self.node("Concat", *(self.norm(self.conv("x")) for _ in range(count)), axis=1)

    def tail(self, count):
        """Norms that nothing takes, each before a Tanh."""
        x = "x"
        for _ in range(count):
            x = self.node("Tanh", self.norm(x))
        return x


def effort(kind, count, monkeypatch):
    """Return how many nodes and readers the planner looks at."""
    seen = []
    with monkeypatch.context() as patch:
        row, others = Search._row, GraphView.other_readers
        patch.setattr(Search, "_row", lambda self, node, depth: seen.append(1) or row(self, node, depth))

        def counted(self, value, askers, most):
            found = others(self, value, askers, most)
            seen.extend(found)
            return found

        patch.setattr(GraphView, "other_readers", counted)
        plan(Index(storage.load(Model(kind, count).proto)))
    return len(seen)


@pytest.mark.parametrize("kind", ["chain", "many_on_one", "fan", "residual", "dense", "branches", "tail"])
def test_the_effort_grows_as_the_model(kind, monkeypatch):
    small, large = effort(kind, 64, monkeypatch), effort(kind, 256, monkeypatch)
    assert small > 60
    assert large < 5 * small
    assert large < 256 * 160


def test_the_effort_of_asking_which_folds_the_comparison_reaches(monkeypatch):
    def asked(count):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(reach, "ignores_elements", lambda node, slot: seen.append(1) or False)
            index = Index(storage.load(Model("chain", count).proto))
            planning = plan(index)
            assert (len(planning.plans), reach.unreached(index, planning, ["y"])) == (count, [])
        return len(seen)

    small, large = asked(16), asked(64)
    assert small > 16
    assert large < 5 * small
