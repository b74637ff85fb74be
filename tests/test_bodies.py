"""Random graphs with bodies: If, Loop and Scan, nested, with folds in several scopes at once; every branch must give what it gave.

The pieces are those of test_random_graphs.py, verification is off as there. FASTBN_GRAPHS and FASTBN_SEED work as there.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from random_graphs import CHUNK, FIRST, GRAPHS, Graph, worst_difference
from sketch import conv_bn, normal, ops, run
from test_random_graphs import ALLOWED

import fastbn
from fastbn.graph.fold_result import planning_of
from fastbn.graph.model.nesting import scopes_of

DEPTH = 2


class Body(Graph):
    """A random graph of one input, all its names under a prefix, whose one output is a list of numbers; it may hold bodies itself."""

    # onnxruntime takes both away and forgets the bodies that read what stood behind them: "Missing Input".
    bare_casts = False

    def __init__(self, rng, opset, shape, prefix, source, depth=0):
        self.rng, self.opset = rng, opset
        self.expressions = np.random.default_rng(rng.integers(1 << 30))
        self.nodes, self.constants, self.shapes, self.singles = [], [], {"x": shape}, set()
        self.latest = "x"
        for _ in range(self.rng.integers(1, 3)):
            self.motif()
        self.inner, results = [], []
        if depth < DEPTH and (depth == 0 or self.chance(0.4)):
            for number in range(self.one([1, 1, 2])):
                results.append(self.holder(f"{prefix}b{number}_", depth + 1))
        self.flat(self.latest if self.latest != "x" or not results else results[0])
        names = {name for node in self.nodes for name in node.output} | {tensor.name for tensor in self.constants}
        self.name = lambda name: prefix + name if name in names else source if name == "x" else name
        self.outputs = [self.name(name) for name in [*results, f"v{len(self.nodes) - 1}"]]
        for node in self.nodes:
            node.input[:] = map(self.name, node.input)
            node.output[:] = map(self.name, node.output)
            node.name = prefix + node.name
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    self.rename_captures(attribute.g)
        for tensor in self.constants:
            tensor.name = prefix + tensor.name

    def rename_captures(self, graph):
        """Let a body read this graph's values by the names that they have now."""
        for each in scopes_of(graph):
            for node in each.node:
                node.input[:] = [self.name(name[1:]) if name.startswith("^") else name for name in node.input]

    def flat(self, value):
        self.node("Reshape", [value, self.ints(-1)], None)

    def holder(self, prefix, depth):
        """Add an If, Loop or Scan of what there is; return the name of its list of numbers."""
        source = self.one([name for name in self.shapes if name.startswith("v")] or ["x"])
        shape = self.shapes[source]
        kind = self.one(["If", "If", "Loop", "Scan"])
        if kind == "Scan" and len(shape) > 1:
            element = helper.make_tensor_value_info(f"{prefix}e", TensorProto.FLOAT, shape[1:])
            body = Body(self.rng, self.opset, shape[1:], prefix, element.name, depth)
            self.nodes.append(
                helper.make_node("Scan", [source], [f"v{len(self.nodes)}"], body=body.graph([element]), num_scan_inputs=1, name=prefix)
            )
        elif kind == "Loop":
            inputs = [
                helper.make_tensor_value_info(f"{prefix}i", TensorProto.INT64, []),
                helper.make_tensor_value_info(f"{prefix}c", TensorProto.BOOL, []),
            ]
            body = Body(self.rng, self.opset, shape, prefix, f"^{source}", depth)
            kept = helper.make_node("Identity", [f"{prefix}c"], [f"{prefix}kept"])
            graph = body.graph(inputs, kept)
            count, go = self.constant(np.int64(2)), self.constant(np.bool_(True))
            self.nodes.append(helper.make_node("Loop", [count, go], [f"v{len(self.nodes)}"], body=graph, name=prefix))
        else:
            branches = [Body(self.rng, self.opset, shape, f"{prefix}{name}_", f"^{source}", depth) for name in ("then", "else")]
            then, other = (branch.graph([]) for branch in branches)
            cond = self.one(["cond", "other"])
            self.nodes.append(helper.make_node("If", [cond], [f"v{len(self.nodes)}"], then_branch=then, else_branch=other, name=prefix))
        return self.nodes[-1].output[0]

    def graph(self, inputs, *nodes):
        outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.BOOL, []) for node in nodes]
        outputs.append(helper.make_tensor_value_info(self.outputs[-1], TensorProto.FLOAT, [None]))
        return helper.make_graph([*nodes, *self.nodes], "body", inputs, outputs, self.constants)


def random_model(seed):
    """Return (model with bodies, its input)."""
    rng = np.random.default_rng([seed, 7])
    opset = (13, 17, 18, 21)[seed % 4]
    shape = [(2, 4, 6, 6), (2, 4, 8), (2, 6, 5, 5), (3, 8), (4, 4, 4)][seed % 5]
    main = Body(rng, opset, shape, "", "x")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    inputs += [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("cond", "other")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in main.outputs]
    graph = helper.make_graph(main.nodes, "random", inputs, outputs, main.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return model, rng.standard_normal(shape).astype(np.float32)


def check(seed):
    """Fold one model and compare all its branches; return the numbers of the scopes that held folds."""
    model, x = random_model(seed)
    result = fastbn.fold(model, verify=False)
    where = f"seed {seed}\n{result}\n{onnx.printer.to_text(model.graph)}"
    for cond in (True, False):
        for other in (True, False):
            feeds = {"x": x, "cond": np.array(cond), "other": np.array(other)}
            try:
                difference = worst_difference(run(model, feeds), run(result.model, feeds))
            except Exception as error:
                raise AssertionError(f"{error}\n{where}") from error
            assert difference <= ALLOWED, f"{difference}\n{where}"
    return {node.scope.number for each in planning_of(result).plans for node in each.lifted}


@pytest.mark.parametrize("first", range(FIRST, FIRST + GRAPHS // 2, CHUNK))
def test_random_bodies(first):
    scopes = [check(seed) for seed in range(first, first + CHUNK)]
    assert sum(len(found) > 1 for found in scopes) > CHUNK / 10, "folds in several scopes at once"
    assert sum(0 in found for found in scopes) > CHUNK / 10


def branches(inner, constants):
    """Return a model with a convolution, its norm, and an If over what they give."""
    text = f"""(float[N,3,8,8] x, bool cond) => (float[N,4,6,6] y) {{
        c = Conv(x, w, b)
        h = BatchNormalization(c, s, t, m, v)
        y = If (cond) <
            then_branch = g1 () => (float[N,4,6,6] p) {{ {inner.format("p")} }},
            else_branch = g2 () => (float[N,4,6,6] q) {{ q = Identity(h) }}
        >
    }}"""
    return conv_bn(text, **constants)


NORM2 = {"s2": np.float32([2, -1, 0.5, 3]), "t2": normal(4), "m2": normal(4, seed=1), "v2": np.float32([1, 2, 3, 4])}


@pytest.mark.parametrize(
    ("inner", "constants"),
    [
        ("z = Conv(h, w2) {0} = BatchNormalization(z, s2, t2, m2, v2)", {"w2": normal(4, 4, 1, 1)}),
        ("z = MatMul(h, w2) z2 = Add(z, k) {0} = Mul(z2, k)", {"w2": normal(6, 6), "k": normal(6)}),
    ],
)
def test_folds_in_a_graph_and_in_its_body_at_once(inner, constants):
    model = branches(inner, {**constants, **(NORM2 if "s2" in inner else {})})
    result = fastbn.fold(model, verify=False)
    assert len(result.folded) == 2
    assert ops(result.model) == "Conv If"
    (then,) = (attribute.g for attribute in result.model.graph.node[1].attribute if attribute.name == "then_branch")
    assert [node.op_type for node in then.node] in (["Conv"], ["MatMul", "Add"])
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    for cond in (True, False):
        feeds = {"x": x, "cond": np.array(cond)}
        (before,), (after,) = run(model, feeds), run(result.model, feeds)
        assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


def test_a_new_constant_of_a_body_is_an_input_of_the_main_graph_before_ir_4():
    model = branches("z = Conv(h, w2) {0} = BatchNormalization(z, s2, t2, m2, v2)", {"w2": normal(4, 4, 1, 1), **NORM2})
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    result = fastbn.fold(model, verify=False)
    assert len(result.folded) == 2
    onnx.checker.check_model(result.model)
    listed = {info.name for info in result.model.graph.input}
    assert listed >= {tensor.name for tensor in result.model.graph.initializer}
    assert not any(graph.initializer for graph in scopes_of(result.model.graph)[1:])
    feeds = {"x": normal(2, 3, 8, 8), "cond": np.array(True)}
    (before,), (after,) = run(model, feeds), run(result.model, feeds)
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()
