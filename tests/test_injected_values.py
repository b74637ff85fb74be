"""A wrong value of every operator that is evaluated on constants: the proof of the fold must catch it, and where that proof is switched off
the comparison of the whole model must."""

import numpy as np
import pytest
from onnx import NodeProto
from sketch import model, normal
from test_injected_faults import assert_left_out

import fastbn
from fastbn.graph.model import expressions
from fastbn.graph.ops.registry import OPERATORS

CONSTANTS = {
    "p": 1 + np.abs(normal(4, 1, 1)),
    "q": 1 + np.abs(normal(4, 1, 1, seed=1)),
    "f": np.float32([0.2, 0.4, -0.6, 0.8]).reshape(4, 1, 1),  # fractions
    "m": np.array([True, False, True, True]).reshape(4, 1, 1),
    "o": np.array([True, True, False, False]).reshape(4, 1, 1),
    "i": np.array([3, 5, 7, 8]).reshape(4, 1, 1),
    "n": np.array([4, 3, 2, 9]).reshape(4, 1, 1),
    "long": 1 + np.abs(normal(8, 1, 1)),
    "wide": 1 + np.abs(normal(4, 2, 3)),
    "flat": 1 + np.abs(normal(4)),
    "two": np.float32(2),
    "zero": np.zeros(4, np.float32),
    "one": np.ones(4, np.float32),
    "s1": np.array([4, 1, 1]),
    "s4": np.array([4]),
    "a12": np.array([1, 2]),
    "perm": np.array([2, 0, 3, 1]),
    "i0": np.array([0]),
    "i1": np.array([1]),
    "start": np.int64(2),
    "stop": np.int64(6),
    "step": np.int64(1),
    "repeats": np.array([2, 1, 1]),
    "half": 1 + np.abs(normal(2, 1, 1)),
    "five": np.array([5]),
    "i2": np.array([2]),
    "axis0": np.int64(0),
    "alternate": np.array([True, False] * 4),
    "square": 1 + np.abs(normal(4, 4)),
    "small": np.array([3, 5, 7, 8], np.int8).reshape(4, 1, 1),
    "batch": normal(2, 4, 5),
    "p0": 1 + np.abs(normal(4)),
    "q0": 20 + normal(4, seed=1),
    "label": np.array([2]),
    "four": np.int64(4),
    "off_on": np.float32([1, 2]),
    "row": np.array([1, 1, 4]),
}

ONE = ("Abs", "Asin", "Atan", "Acos", "Ceil", "Cos", "Erf", "Exp", "Floor", "Neg", "Round", "Sigmoid", "Sign", "Sin", "Tan", "Tanh")
TWO = ("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum")
BOTH = ("And", "Or", "Xor")
ORDER = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
REDUCE = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare")

# Operator -> nodes that compute k.
NODES = {
    **{op: f"k = {op}(f)" if op.startswith("A") and op != "Abs" else f"k = {op}(p)" for op in ONE},
    **{op: f"k = {op}(p, q)" for op in TWO},
    **{op: f"b = {op}(m, o) k = Where(b, p, q)" for op in BOTH},
    **{op: f"b = {op}(i, n) k = Where(b, p, q)" for op in ORDER},
    **{op: f"k = {op} <axes = [1,2]> (wide)" for op in REDUCE},
    "Cast": "k = Cast <to = 1> (i)",
    "CastLike": "k = CastLike(i, p)",
    "Clip": "k = Clip(p, , two)",
    "Log": "e = Exp(p) k = Log(e)",
    "Mod": "b = Mod(i, n) k = Cast <to = 1> (b)",
    "Not": "b = Not(m) k = Where(b, p, q)",
    "Reciprocal": "k = Reciprocal(p)",
    "Relu": "k = Relu(p)",
    "Softplus": "k = Softplus(p)",
    "Sqrt": "k = Sqrt(p)",
    "Where": "k = Where(m, p, q)",
    "ReduceSum": "k = ReduceSum(wide, a12)",
    "Flatten": "e = Flatten <axis = 1> (p) k = Reshape(e, s1)",
    "Reshape": "k = Reshape(flat, s1)",
    "Compress": "e = Compress <axis = 0> (long, alternate) k = Reshape(e, s1)",
    "Dropout": "k = Dropout(p)",
    "EyeLike": "e = EyeLike(square) g = Add(e, square) j = ReduceMax <axes = [1], keepdims = 1> (g) k = Unsqueeze(j, i2)",
    "NonZero": "e = NonZero(m) g = Cast <to = 1> (e) j = ReduceSum(g) k = Add(j, p)",
    "Slice": "k = Slice(long, i1, five, i0)",
    "Split": "k, e = Split(long)",
    "Squeeze": "e = Unsqueeze(p, i0) k = Squeeze(e, i0)",
    "Transpose": "e = Reshape(flat, row) k = Transpose <perm = [2,1,0]> (e)",
    "Unsqueeze": "k = Unsqueeze(flat, a12)",
    "Concat": "k = Concat <axis = 0> (half, half)",
    "ConstantOfShape": "e = ConstantOfShape(s1) k = Add(e, p)",
    "Expand": "k = Expand(two, s1)",
    "Gather": "k = Gather(p, perm)",
    "Range": "e = Range(start, stop, step) g = Cast <to = 1> (e) k = Reshape(g, s1)",
    "Tile": "k = Tile(half, repeats)",
}
# Some of the others: they have no rule for the size of what they give.
OTHERS = {
    "BatchNormalization": "e = BatchNormalization(batch, p0, q0, zero, one) g = ReduceL1 <axes = [0,2]> (e) k = Reshape(g, s1)",
    "CumSum": "k = CumSum(p, axis0)",
    "DequantizeLinear": "k = DequantizeLinear(small, two)",
    "Einsum": 'k = Einsum <equation = "abc,dbc->dbc"> (p, q)',
    "Gemm": "e = Gemm(square, square) g = ReduceMax <axes = [1], keepdims = 1> (e) k = Reshape(g, s1)",
    "InstanceNormalization": "e = InstanceNormalization(batch, flat, flat) g = ReduceL1 <axes = [0,2]> (e) k = Reshape(g, s1)",
    "MatMul": "e = MatMul(square, flat) k = Reshape(e, s1)",
    "OneHot": "e = OneHot(label, four, off_on) k = Reshape(e, s1)",
    "QuantizeLinear": "e = QuantizeLinear(p, two) k = DequantizeLinear(e, two)",
    "Softmax": "k = Softmax <axis = 0> (p)",
    "Trilu": "e = Trilu(square) g = ReduceMax <axes = [1], keepdims = 1> (e) k = Reshape(g, s1)",
}
NODES |= OTHERS
EVALUATED = {op for op, row in OPERATORS.items() if row.result_size is not None}


def test_every_evaluated_operator_is_here():
    assert set(NODES) == EVALUATED | set(OTHERS)


def wrong_values(values):
    """Return other values: the negation, one more, or 5 % more."""
    if values.dtype.kind == "b":
        return ~values
    return values + 1 if values.dtype.kind in "iu" else (values * 1.05 + 0.01).astype(values.dtype)


def last_wrong(values):
    """Return the values with another last one."""
    wrong = values.copy()
    wrong.reshape(-1)[-1:] = wrong_values(values.reshape(-1)[-1:])
    return wrong


PLACES = {"factor": "y = Mul(c, k)", "norm": "h = Reshape(k, s4) y = BatchNormalization(c, h, zero, zero, one)"}


def computed(nodes, place):
    """Return a convolution whose channels are multiplied by k, which the nodes compute."""
    text = f"(float[2,3,5,5] x) => (float y) {{ {nodes} c = Conv(x, w, v) {PLACES[place]} }}"
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return model(text, w=normal(4, 3, 2, 2), v=normal(4), **{name: values for name, values in CONSTANTS.items() if name in words})


@pytest.mark.parametrize(("change", "place"), [(wrong_values, "factor"), (last_wrong, "norm")])
@pytest.mark.parametrize("op", sorted(NODES))
def test_a_wrong_value_is_caught(op, change, place, monkeypatch):
    data = computed(NODES[op], place).SerializeToString()
    right = fastbn.fold(data)
    assert right.folded
    assert right.parity.ok
    run = expressions.evaluated

    def wrong(key, *given):
        results = run(key, *given)
        return {slot: change(each) for slot, each in results.items()} if NodeProto.FromString(key[0]).op_type == op else results

    monkeypatch.setattr(expressions, "evaluated", wrong)
    folded = fastbn.fold(data, verify=False)
    assert folded.folded
    assert folded.to_bytes() != right.to_bytes()
    assert_left_out(data, folded, monkeypatch, by_model=False)
    assert_left_out(data, folded, monkeypatch, by_model=True)
