"""Odd and invalid nodes beside a BatchNormalization: every operator of both tables with attributes, shapes and inputs that are not right.

Whatever such a node does to its row of a table, folding says so with an error of this package or folds something else; and where
onnxruntime runs the original, the folded model gives the same. FASTBN_NODES sets how many nodes are tried, FASTBN_SEED where they begin.
"""

import os
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sketch import model, norm, normal, run

import fastbn
from fastbn.errors import FastbnError
from fastbn.graph.ops.registry import OPERATORS

NODES = int(os.environ.get("FASTBN_NODES", "1200"))
FIRST = int(os.environ.get("FASTBN_SEED", "0"))
CHUNK = 200

OPS = sorted(op for op, row in OPERATORS.items() if row.transfers)
OPSETS = (1, 6, 7, 9, 10, 11, 12, 13, 17, 18, 21)
SHAPES = [(2, 4, 6, 6), (2, 4, 8), (3, 4), (2, 4, 4, 4), (4,), (), (2, 4, 3, 3, 3), (1, 4, 1, 1), (0, 4, 2, 2), (2, 1, 4, 4)]

# Attributes of each operator, as they may be right.
# fmt: off
ATTRIBUTES = {
    "Conv": {"group": 1, "kernel_shape": [3, 3], "pads": [0] * 4, "strides": [1, 1], "dilations": [1, 1], "auto_pad": "NOTSET"},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, "broadcast": 1},
    "LSTM": {"hidden_size": 3, "direction": "forward", "layout": 0, "input_forget": 0},
    "Transpose": {"perm": [0, 2, 3, 1]}, "Concat": {"axis": 1}, "Split": {"axis": 1, "split": [2, 2]},
    "Reshape": {"shape": [2, -1], "allowzero": 0}, "Flatten": {"axis": 1}, "Squeeze": {"axes": [2, 3]}, "Unsqueeze": {"axes": [2]},
    "Slice": {"starts": [1], "ends": [3], "axes": [1]}, "Gather": {"axis": 1}, "DepthToSpace": {"blocksize": 2, "mode": "DCR"},
    "SpaceToDepth": {"blocksize": 2}, "Einsum": {"equation": "nc...,oc->no..."},
    "Pad": {"pads": [0, 0, 1, 1] * 2, "paddings": [0, 0, 1, 1] * 2, "mode": "constant", "value": 0.0},
    "Dropout": {"ratio": 0.5, "is_test": 1}, "Cast": {"to": 1}, "LeakyRelu": {"alpha": 0.1}, "Resize": {"mode": "nearest", "axes": [2, 3]},
    "Upsample": {"mode": "nearest", "scales": [1.0, 1.0, 2.0, 2.0]}, "ReduceMean": {"axes": [2, 3], "keepdims": 1},
    "AveragePool": {"kernel_shape": [2, 2], "pads": [0] * 4, "strides": [1, 1], "ceil_mode": 0, "count_include_pad": 0},
    "BatchNormalization": {"epsilon": 1e-5, "momentum": 0.9, "spatial": 1, "is_test": 1, "training_mode": 0},
    "Add": {"axis": 1, "broadcast": 1},
}
# fmt: on
LIKE = {
    **dict.fromkeys(("ConvTranspose",), "Conv"),
    **dict.fromkeys(("GRU", "RNN"), "LSTM"),
    **dict.fromkeys(("MaxPool",), "AveragePool"),
    **dict.fromkeys(("ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"), "ReduceMean"),
    **dict.fromkeys(("Sub", "Mul", "Div", "Sum"), "Add"),
}


class Case:
    """One operator between two batch normalizations, with what is wrong about it."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.op = OPS[seed % len(OPS)]
        self.opset = self.one(OPSETS) if self.chance(0.5) else self.one((11, 13, 18))
        self.shape = self.one(SHAPES[:4]) if self.chance(0.85) else self.one(SHAPES)
        self.constants = []
        inputs = self.mutated_inputs(["h", *self.inputs()])
        outputs = [f"o{number}" for number in range(self.one([1, 2, 3]) if self.op == "Split" or self.chance(0.05) else 1)]
        attributes = {
            name: self.mutated(value) for name, value in ATTRIBUTES.get(LIKE.get(self.op, self.op), {}).items() if self.chance(0.6)
        }
        before = self.chance(0.6)
        nodes = [self.norm("x" if self.chance(0.5) else "u", "h")] if before else [helper.make_node("Tanh", ["x"], ["h"], name="tanh")]
        if before and nodes[0].input[0] == "u":
            nodes.insert(0, helper.make_node("Conv", ["x", self.weight(4, 4, *[1] * max(len(self.shape) - 2, 1))], ["u"], name="conv"))
        node = helper.make_node(self.op, inputs, outputs, name="odd")
        if self.op == "Split" and self.chance(0.5):
            attributes["num_outputs"] = len(outputs)  # onnx ends the process where these two differ
        for name, value in attributes.items():
            self.add_attribute(node, name, value)
        nodes.append(node)
        nodes.append(self.norm(outputs[0], "y") if self.chance(0.6) else helper.make_node("Tanh", outputs[:1], ["y"], name="end"))
        sizes = [None if self.chance(0.1) else size for size in self.shape] if self.chance(0.95) else None
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph(nodes, "odd", [x], [y], self.constants)
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def one(self, options):
        return options[int(self.rng.integers(len(options)))]

    def chance(self, part):
        return self.rng.random() < part

    def constant(self, values):
        self.constants.append(numpy_helper.from_array(np.asarray(values), f"k{len(self.constants)}"))
        return self.constants[-1].name

    def weight(self, *shape):
        return self.constant(self.rng.standard_normal(shape).astype(np.float32))

    def norm(self, before, after):
        c = 4 if self.chance(0.95) else self.one([1, 2, 3, 8, 0])
        parameters = [self.constant(self.rng.uniform(0.5, 2, c).astype(np.float32)) for _ in range(4)]
        attributes = {"is_test": 1} if self.opset < 7 else {}
        return helper.make_node("BatchNormalization", [before, *parameters], [after], name=f"norm_{after}", **attributes)

    def inputs(self):
        """Return the inputs behind the first, as they may be right."""
        count = max(len(self.shape) - 2, 1)
        ints = lambda *values: self.constant(np.array(values, np.int64))  # noqa: E731
        if self.op in ("Conv", "ConvTranspose"):
            return [self.weight(4, 4, *[self.one([1, 2, 3])] * count), *([self.weight(4)] if self.chance(0.5) else [])]
        if self.op == "Gemm":
            return [self.weight(4, 4), *([self.weight(*self.one([(4,), (1, 4), (3, 4), ()]))] if self.chance(0.6) else [])]
        if self.op in ("LSTM", "GRU", "RNN"):
            gates, inner = {"LSTM": 12, "GRU": 9, "RNN": 3}[self.op], (self.shape or (1,))[-1]
            return [self.weight(1, gates, inner), self.weight(1, gates, 3), *([self.weight(1, 2 * gates)] if self.chance(0.5) else [])]
        if self.op == "BatchNormalization":
            return [self.weight(4), self.weight(4), self.weight(4), self.constant(self.rng.uniform(0.5, 2, 4).astype(np.float32))]
        choices = {
            "Reshape": lambda: [ints(*self.one([(2, -1), (0, 4, -1), (0, 0, -1), (-1, 4)]))],
            "Slice": lambda: [ints(1), ints(3), ints(1)],
            "Gather": lambda: [self.constant(np.array(self.one([[0, 2], 1, [[0, 1]], [-1, 3]]), np.int64))],
            "Pad": lambda: [ints(*[0, 0, 1, 1] * 2), self.constant(np.float32(0))],
            "Expand": lambda: [ints(2, 4, 6, 6)],
            "Resize": lambda: [self.constant(np.zeros(0, np.float32)), self.constant(np.array([1, 1, 2, 2], np.float32))],
            "Upsample": lambda: [self.constant(np.array([1, 1, 2, 2], np.float32))],
            "Split": lambda: [ints(2, 2)],
            "Squeeze": lambda: [ints(2)],
            "Unsqueeze": lambda: [ints(2)],
            "PRelu": lambda: [self.weight(4, 1, 1)],
            "Dropout": lambda: [self.constant(np.float32(0.5)), self.constant(np.bool_(False))],
            "Einsum": lambda: [self.weight(*self.one([(4, 4), (4,), (6, 4)]))],
            "MatMul": lambda: [self.weight(*self.one([(6, 4), (4, 4), (4,), (2, 4, 4), ()]))],
            "Concat": lambda: [self.one(["h", "x", self.weight(2, 4, 6, 6)])],
            "Div": lambda: [self.one(["x", self.weight(*self.one([(4, 1, 1), (), (1, 4), (4,), (1, 4, 1, 1)]))])],
        }
        if self.op in ("Add", "Sub", "Mul", "Sum"):
            return choices["Div"]()
        if self.op.startswith("Reduce"):
            return [ints(*self.one([(2, 3), (-1,), (1,)]))] if self.chance(0.5) else []
        return choices[self.op]() if self.op in choices and self.chance(0.8) else []

    def mutated_inputs(self, inputs):
        kind = self.one(["right"] * 16 + ["missing", "empty", "more", "twice", "turned", "odd", "odd", "odd"])
        at = int(self.rng.integers(len(inputs)))
        if kind == "missing":
            return inputs[:at]
        if kind == "empty":
            inputs[at] = ""
        elif kind == "more":
            inputs += [self.weight(4), "h"]
        elif kind == "twice":
            inputs[at] = "h"
        elif kind == "turned":
            inputs.reverse()
        elif kind == "odd":
            dtype = self.one([np.float32, np.float32, np.float64, np.int64, np.int64, np.float16, np.bool_])
            shape = self.one([(), (0,), (1,), (4,), (2, 2), (4, 1), (4, 4), (1, 4, 1, 1), (4, 4, 1), (0, 4, 1, 1), (4, 0), (4, 4, 1, 1, 1)])
            inputs[at] = self.constant(self.rng.integers(-3, 5, shape).astype(dtype))
        return inputs

    def mutated(self, value):
        """Return a value of an attribute as it is, or another that is not right."""
        if self.chance(0.8):
            return value
        if self.chance(0.15):
            return self.one([0, 1, -1, 0.5, "x", b"\xff", [], [1], [1.5], ["a"], 2**40, numpy_helper.from_array(np.zeros(2, np.float32))])
        if isinstance(value, list):
            whole = [type(value[0])(number) for number in self.rng.integers(-6, 7, self.rng.integers(0, 7))]
            return self.one([whole, value[:1], value[::-1], [*value, value[0]], [0 * size for size in value], [-size for size in value]])
        if "->" in str(value):
            return self.one(
                ["...c,oc->...o", "nchw,c->nchw", "nchw,wo", "nchw->nc", "ij,jk->z", "nc..,c->n", "nn...,n->n...", "a...,...b", ","]
            )
        if isinstance(value, str):
            return self.one(["", "linear", "SAME_UPPER", "VALID", "edge", "CRD", "bidirectional", "cubic", "reflect"])
        return type(value)(self.one([0, 1, -1, 2, 3, 4, -5, 100]))

    @staticmethod
    def add_attribute(node, name, value):
        if isinstance(value, list) and not value:
            node.attribute.add(name=name, type=onnx.AttributeProto.INTS)
        else:
            node.attribute.append(helper.make_attribute(name, value))


def check(seed):
    """Fold one case; return whether onnxruntime could compare."""
    case = Case(seed)
    where = f"seed {seed}\n{case.model.graph}"
    try:
        result = fastbn.fold(case.model, verify=False)
    except FastbnError as error:
        if "Cannot write" not in str(error):
            return False
        raise AssertionError(where) from error
    except Exception as error:
        raise AssertionError(f"{error!r}: {where}") from error
    if not result.folded:
        return False
    feeds = {"x": case.rng.standard_normal(case.shape).astype(np.float32)}
    try:
        before = run(case.model, feeds)
    except Exception:  # onnxruntime raises many kinds on what is invalid
        return False
    try:
        after = run(result.model, feeds)
    except Exception as error:
        raise AssertionError(f"{error!r}: {result}\n{where}") from error
    for one, other in zip(before, after, strict=True):
        assert one.shape == other.shape, where
        size = np.abs(one[np.isfinite(one)]).max(initial=0.05)
        assert np.array_equal(np.isfinite(one), np.isfinite(other)), f"{result}\n{where}"
        assert np.allclose(one, other, rtol=0, atol=3e-5 * size, equal_nan=True), f"{result}\n{where}"
    return True


@pytest.mark.parametrize("first", range(FIRST, FIRST + NODES, CHUNK))
def test_odd_nodes_are_folded_right_or_said(first):
    assert sum(map(check, range(first, first + CHUNK))) > CHUNK // 100


IMAGE = "(float[2,4,6,6] x) => (float[?,?,?,?] y) { h = Tanh(x) c = BatchNormalization(h, s, t, m, v) "
MALFORMED = {
    "n = Transpose<perm = [0, 1, 1, 3]>(c)": "Expected a permutation of all axes",
    "n = Transpose<perm = [0, 1, 2]>(c)": "Expected a permutation of all axes",
    "n = Transpose<perm = 1>(c)": "Expected an attribute 'perm' of type INTS, got INT",
    "n = Concat<axis = 7>(c, c)": "Expected an axis of a value of rank 4, got 7",
    "n = Concat(c, c)": "Expected an attribute 'axis' of Concat, got none",
    "n = Slice(c, one, three, seven)": "Expected an axis of a value of rank 4, got 7",
    "n = GatherElements<axis = 2>(c, many)": "Expected no more than 4 indices along axis 1, got 5",
    "n = Slice(c, one, three, one, zero)": "Expected a start, an end and a step for each axis",
    "n = Slice(c, one, three, scalar)": r"Expected a list of integers, got int64 of shape \(\)",
    "n = Pad(c, one)": "Expected two sizes of padding for each axis, got 1",
    "n = Pad(c, pads, nothing)": "Expected one number to pad with, got 0",
    "n = ReduceMean<axes = [9]>(c)": "Expected an axis of a value of rank 4, got 9",
    "n = ReduceSum(c, scalar)": "Expected a list of integers",
    "n = Gather<axis = 1>(c, seven)": "Expected an axis of a value of rank 4, got 7",
    "n = DepthToSpace<blocksize = 0>(c)": "Expected channels that blocks of 0 divide",
    "n = DepthToSpace(c)": "Expected an attribute 'blocksize' of DepthToSpace, got none",
    "n = SpaceToDepth<blocksize = 0>(c)": "Expected channels that are a multiple of 0",
    "n = Sub(c)": r"Expected an input 1 \('B'\) of Sub, got none",
    "n = Sub(c, c, c)": "Expected at most 2 inputs of Sub, got 3",
    "n = Sum(c, , c)": "Expected names for all inputs of Sum, got an empty one",
    "n = LeakyRelu<beta = 1.0>(c)": "Expected a valid model: attributes that LeakyRelu has at opset 17, got 'beta'",
    "n = LeakyRelu<alpha = 1>(c)": "Expected an attribute 'alpha' of type FLOAT, got INT",
}
CONSTANTS = {
    "one": np.array([1], np.int64),
    "three": np.array([3], np.int64),
    "seven": np.array([7], np.int64),
    "zero": np.array([0], np.int64),
    "scalar": np.array(1, np.int64),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
    "nothing": np.zeros(0, np.float32),
    "many": np.zeros((2, 5, 6, 6), np.int64),
}


@pytest.mark.parametrize("node", MALFORMED)
def test_what_is_wrong_with_a_node_is_said(node):
    """A scale alone passes all of them, so each one is tested."""
    scale = {**norm(4, positive=True), "t": np.zeros(4, np.float32), "m": np.zeros(4, np.float32)}
    used = {name: values for name, values in CONSTANTS.items() if re.search(rf"[ (]{name}[,)]", node)}
    proto = model(f"{IMAGE} {node} y = Tanh(n) }}", **used, **scale)
    with pytest.raises(fastbn.ModelError, match=MALFORMED[node]) as error:
        fastbn.fold(proto, verify=False)
    assert str(error.value).endswith("- at `n`")


def test_an_empty_list_of_axes_reduces_all():
    text = "(float[2,4,6,6] x) => (float y) { c = Conv(x, w) r = ReduceMean(c) n = Mul(r, k) y = Tanh(n) }"
    proto = model(text, w=normal(4, 4, 1, 1), k=normal(4, 1, 1))
    proto.graph.node[1].attribute.add(name="axes", type=onnx.AttributeProto.INTS)
    assert fastbn.fold(proto, verify=False).folded == []


def test_operators_that_name_the_axis_of_broadcasting_are_left_alone():
    """Before opset 7 the attribute axis aligns the second operand with the channels; aligned from the right it would not be."""
    text = """(float[2,4,6,4] x) => (float[2,4,6,4] y) {
        c = Conv(x, w)
        g = Tanh(k)
        n = Add<axis = 1, broadcast = 1>(c, g)
        q = Transpose<perm = [0, 3, 2, 1]>(n)
        p = BatchNormalization<is_test = 1>(q, s, t, m, v)
        y = Tanh(p)
    }"""
    result = fastbn.fold(model(text, w=normal(4, 4, 1, 1), k=normal(4), opset=6, **norm(4)), verify=False)
    assert result.folded == []
    assert "broadcasts along an axis that it names" in result.kept[0].reason


def test_an_attribute_of_a_function_is_said_outside_of_one():
    proto = model(f"{IMAGE} n = Transpose<perm = [0, 1, 2, 3]>(c) y = Tanh(n) }}", **norm(4))
    proto.graph.node[2].attribute[0].ref_attr_name = "order"
    with pytest.raises(fastbn.ModelError, match="Expected a value of the attribute 'perm', got a reference outside a function"):
        fastbn.fold(proto, verify=False)


def test_the_indices_of_a_pooling_are_no_data():
    """The indices are an output too, which no affine can pass."""
    text = """(float[2,4,6,6] x) => (float[2,4,5,5] y) {
        c = Conv(x, w)
        p, i = MaxPool<kernel_shape = [2, 2]>(c)
        f = Cast<to = 1>(i)
        y = BatchNormalization(f, s, t, m, v)
    }"""
    assert fastbn.fold(model(text, w=normal(4, 4, 1, 1), **norm(4)), verify=False).folded == []
