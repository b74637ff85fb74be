"""Random graphs of the operators that the tables know, folded and compared with the original."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from sketch import assert_same

import fastbn


class Graph:
    """A random graph of float32 values of shape (2, C, 5, 5)."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.nodes, self.constants = [], []
        self.values = [("x", 4)]

    def constant(self, values):
        name = f"k{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
        return name

    def normal(self, *shape):
        return self.constant(self.rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:]))))

    def add(self, op, inputs, channels, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        self.values.append((name, channels))

    def step(self):
        # Mostly the newest value, so that chains grow; sometimes an older one, which then has several readers.
        at = -1 if self.rng.random() < 0.75 else int(self.rng.integers(len(self.values)))
        getattr(self, self.rng.choice(["conv", "conv_transpose", "norm", "norm", "norm", "elementwise", "passing", "other", "join"]))(
            *self.values[at]
        )

    def conv(self, x, channels):
        groups = int(self.rng.choice([1, 2, channels]))
        out = int(groups * self.rng.integers(1, 4)) if groups > 1 else int(self.rng.integers(2, 7))
        inputs = [x, self.normal(out, channels // groups, 3, 3), *([self.normal(out)] if self.rng.random() < 0.5 else [])]
        if out % 2:
            return
        self.add("Conv", inputs, out, group=groups, pads=[1, 1, 1, 1])

    def conv_transpose(self, x, channels):
        groups = int(self.rng.choice([1, 2]))
        self.add("ConvTranspose", [x, self.normal(channels, 2, 3, 3)], 2 * groups, group=groups, pads=[1, 1, 1, 1])

    def norm(self, x, channels):
        scale = self.rng.uniform(0.5, 1.5, channels) * self.rng.choice([-1, 1, 1], channels)
        parts = [scale, self.rng.normal(size=channels), self.rng.normal(size=channels), self.rng.uniform(0.5, 2, channels)]
        self.add("BatchNormalization", [x, *map(self.constant, parts)], channels)

    def elementwise(self, x, channels):
        shape = [(channels, 1, 1), (1, channels, 1, 1), (1,), (), (channels, 5, 5), (5,)][self.rng.integers(6)]
        inputs = [x, self.constant(self.rng.uniform(0.5, 2, shape))]
        op = str(self.rng.choice(["Add", "Sub", "Mul", "Div"]))
        self.add(op, inputs[::-1] if self.rng.random() < 0.4 and op != "Div" else inputs, channels)

    def passing(self, x, channels):
        self.add(str(self.rng.choice(["Identity", "Dropout"])), [x], channels)

    def other(self, x, channels):
        self.add(str(self.rng.choice(["Relu", "Tanh", "Sigmoid", "LeakyRelu"])), [x], channels)

    def join(self, x, channels):
        others = [name for name, count in self.values if count == channels]
        self.add(str(self.rng.choice(["Add", "Sub"])), [x, str(self.rng.choice(others))], channels)

    def model(self, steps):
        for _ in range(steps):
            self.step()
        read = {name for node in self.nodes for name in node.input}
        ends = [(name, channels) for name, channels in self.values[1:] if name not in read]
        if len(self.nodes) > 2 and self.rng.random() < 0.3:
            ends.append(self.values[len(self.values) // 2])
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, channels, 5, 5]) for name, channels in dict(ends).items()]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 5, 5])]
        graph = helper.make_graph(self.nodes, "random", inputs, outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_ten_random_graphs(seed):
    for number in range(seed, seed + 10):
        proto = Graph(number).model(12)
        result = fastbn.fold(proto)
        assert result.parity is None or result.parity.status == "ok", (number, result.parity)
        assert not [kept for kept in result.kept if kept.code == "parity"], (number, result.kept)
        assert_same(proto, result.model, units=2000)
        twice = fastbn.fold(result.model, verify=False)
        again = [fold.bn for fold in twice.folded]
        assert not again, (number, "a second run must find nothing that the first one left")


def test_random_graphs_fold_at_all():
    folded = [len(fastbn.fold(Graph(number).model(12), verify=False).folded) for number in range(40)]
    assert sum(folded) > 40
