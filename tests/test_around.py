"""Sums in which an operand stays as it is because a convolution of it makes up for it (RepViT), and parts of a batch (ghost BN)."""

import numpy as np
import pytest
from sketch import codes, folds, model, norm, normal, ops, refuses

import fastbn

X = normal(1, 4, 1, 1, seed=9)
WEIGHTS = {
    "dw": normal(4, 1, 3, 3),
    "dw1": normal(4, 1, 1, 1, seed=1),
    "dw4": normal(4, 1, 4, 4, seed=6),
    "full": normal(4, 4, 3, 3, seed=2),
    "half": normal(4, 2, 3, 3, seed=3),
    "b": normal(4, seed=4),
    "k": X,
    "two": np.array(2, np.float32),
    **norm(4),
}
DW = "Conv <group = 4, pads = [1,1,1,1]> (x, dw)"
DW1 = "Conv <group = 4> (x, dw1, b)"
FULL = "Conv <pads = [1,1,1,1]> (x, full, b)"
HALF = "Conv <group = 2, pads = [1,1,1,1]> (x, half)"
NORM = "y = BatchNormalization(d, s, t, m, v)"

# x is Tanh of the input, and more than the convolutions read it.
AROUND = {
    "3x3 and 1x1": f"c = {DW} e = {DW1} f = Add(c, e) d = Add(f, x)",
    "the value first": f"c = {DW} e = {DW1} f = Add(c, e) d = Add(x, f)",
    "one depthwise convolution": f"c = {DW} d = Add(c, x)",
    "a 1x1 alone": f"c = {DW1} d = Add(c, x)",
    "a full convolution": f"c = {FULL} d = Add(x, c)",
    "groups": f"c = {HALF} d = Add(c, x)",
    "the value within the sum": f"c = {DW} e = Add(c, x) f = {FULL} d = Add(e, f)",
    "three operands": f"c = {DW} e = {FULL} d = Sum(c, x, e)",
    "a subtraction": f"c = {DW} d = Sub(c, x)",
    "from the value": f"c = {FULL} d = Sub(x, c)",
    "auto_pad, even": 'c = Conv <group = 4, auto_pad = "SAME_UPPER"> (x, dw4) d = Add(c, x)',
    "auto_pad, before": 'c = Conv <group = 4, auto_pad = "SAME_LOWER"> (x, dw4) d = Add(c, x)',
    "auto_pad, none": 'c = Conv <group = 4, auto_pad = "VALID"> (x, dw1) d = Add(c, x)',
    "the same value by another name": f"c = {DW} i = Identity(x) e = Dropout(i) d = Add(c, e)",
    "its negative": f"c = {FULL} n = Neg(x) d = Add(n, c)",
    "its negative taken away": f"c = {FULL} n = Neg(x) d = Sub(c, n)",
    "from its negative": f"c = {FULL} n = Neg(x) d = Sub(n, c)",
    "twice": f"c = {DW} e = Add(c, x) d = Add(e, x)",
    "twice, once by another name": f"c = {DW} i = Identity(x) d = Sum(i, c, x)",
    "more than once by the same other name": f"c = {DW} i = Identity(x) e = Add(c, i) d = Add(e, i)",
    "its double": f"c = {DW} e = Add(x, x) d = Add(c, e)",
    "half of it, which something else reads": f"c = {DW} e = Div(x, two) d = Add(c, e) h = Relu(e)",
    "nothing of it": f"c = {DW} e = Sub(c, x) d = Add(e, x)",
    "taken away on the way": f"c = {DW} e = {FULL} f = Sub(e, c) g = Add(f, x) d = Sub(g, x)",
    "a convolution of the same by another name": "i = Identity(x) n = Neg(i) c = Conv <group = 4, pads = [1,1,1,1]> (n, dw) d = Add(c, x)",
}


def around(nodes, **changes):
    used = {name: value for name, value in {**WEIGHTS, **changes}.items() if f"{name})" in nodes or f"{name}," in nodes}
    return model(f"(float[2,4,6,6] u) => (float y, float z) {{ x = Tanh(u) {nodes} z = Relu(x) }}", **used)


@pytest.mark.parametrize("case", AROUND)
def test_an_operand_may_stay(case):
    proto = around(f"{AROUND[case]} {NORM}")
    expected = " ".join(node.op_type for node in proto.graph.node if node.op_type != "BatchNormalization")
    result = folds(proto, expected)
    assert all(fold.error is not None for fold in result.folded)


def test_a_scale_on_the_value_goes_into_the_convolution_first():
    folds(around(f"c = {DW} g = Mul(x, k) d = Add(c, g) {NORM}"), "Tanh Conv Relu")


def test_behind_a_concat():
    nodes = f"c = {DW} e = Add(c, x) f = {FULL} d = Concat <axis = 1> (e, f) y = BatchNormalization(d, s, t, m, v)"
    folds(around(nodes, **norm(8)), "Tanh Conv Add Conv Concat Relu")


def test_a_sibling_may_read_the_same_value_by_another_name():
    nodes = (
        f"i = Identity(x) n = Neg(i) c = Conv <pads = [1,1,1,1]> (n, full, b) e = {NORM[4:].replace('(d', '(i')} d = Add(c, e) y = Tanh(d)"
    )
    folds(around(nodes), "Tanh Identity Neg Conv Tanh Relu")


HALVED = "e = AveragePool <kernel_shape = [2,2], strides = [2,2]> (x)"

# A convolution that does not see each element at its center cannot make up for it.
NOT_AROUND = {
    "another value": "c = Conv <pads = [1,1,1,1]> (u, full, b) d = Add(c, x)",
    "a stride": f"c = Conv <group = 4, pads = [1,1,1,1], strides = [2,2]> (x, dw) {HALVED} d = Add(c, e)",
    "uneven padding": "c = Conv <group = 4, pads = [2,2,0,0], dilations = [2,2]> (x, dw) e = Slice(x, o, l, a) d = Add(c, e)",
}
LISTS = {"o": np.array([0, 0]), "l": np.array([4, 4]), "a": np.array([2, 3])}


@pytest.mark.parametrize("case", NOT_AROUND)
def test_an_operand_may_not_stay(case):
    result = fastbn.fold(around(f"{NOT_AROUND[case]} {NORM}", **LISTS))
    assert not result.folded
    assert codes(result) == {"other-readers": 1} or codes(result) == {"graph-output": 1}


# ---- parts of a batch ----

PART = "BatchNormalization({}, s, t, m, v)"


def ghost(parts, nodes="", behind="y = Tanh(d)", **changes):
    """Return a Gemm whose result is split along the batch, with one norm of the same parameters for each part, joined in d."""
    names = [f"p{number}" for number in range(parts)]
    split = f"{', '.join(names)} = Split <axis = 0> (c, k)"
    norms = " ".join(f"n{number} = {PART.format(name)}" for number, name in enumerate(names))
    joined = f"d = Concat <axis = 0> ({', '.join(f'n{number}' for number in range(parts))})"
    constants = {"w": normal(5, 4), "b": normal(4, seed=5), "k": np.full(parts, 2, np.int64), **norm(4), **changes}
    return model(f"(float[{2 * parts},5] x) => (float y) {{ c = Gemm(x, w, b) {split} {norms} {nodes} {joined} {behind} }}", **constants)


def test_the_norms_of_all_parts_leave_together():
    result = folds(ghost(3), "Gemm Split Concat Tanh")
    (fold,) = result.folded
    assert fold.bn == "n0+n1+n2"
    assert fold.ops == ("BatchNormalization",) * 3


def sliced(parts, **changes):
    """Return the same, its parts taken by Slices; the norm of the last one has the parameter s2."""
    norms = " ".join(
        f"p{at} = Slice(c, k{at}, k{at + 1}, k0) n{at} = BatchNormalization(p{at}, {'s2' if at == parts - 1 else 's'}, t, m, v)"
        for at in range(parts)
    )
    text = f"c = Gemm(x, w, b) {norms} d = Concat <axis = 0> ({', '.join(f'n{at}' for at in range(parts))}) y = Tanh(d)"
    ends = {f"k{at}": np.array([2 * at]) for at in range(parts + 1)}
    constants = {"w": normal(5, 4), "b": normal(4, seed=5), **norm(4), "s2": norm(4)["s"], **ends, **changes}
    return model(f"(float[{2 * parts},5] x) => (float y) {{ {text} }}", **constants)


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_parts_that_are_sliced_leave_together_too(parts):
    (fold,) = folds(sliced(parts), f"Gemm {'Slice ' * parts}Concat Tanh").folded
    assert fold.bn == "+".join(f"n{at}" for at in range(parts))
    assert fold.into == "c"


def test_a_norm_that_does_not_quite_undo_stays():
    result = fastbn.fold(sliced(3, s2=norm(4)["s"] * np.float32(1 + 2**-23)))
    assert [fold.bn for fold in result.folded] == ["n0+n1"]
    assert codes(result) == {"other-readers": 1}


def test_along_the_data_flow_too():
    text = """(float[6,4] x) => (float y) {
        r = Tanh(x)
        p0, p1, p2 = Split <axis = 0> (r, k)
        n0 = BatchNormalization(p0, s, t, m, v)
        n1 = BatchNormalization(p1, s, t, m, v)
        n2 = BatchNormalization(p2, s, t, m, v)
        d = Concat <axis = 0> (n0, n1, n2)
        y = Gemm(d, w, b)
    }"""
    folds(model(text, w=normal(4, 5), b=normal(5), k=np.full(3, 2, np.int64), **norm(4)), "Tanh Split Concat Gemm")


def test_parts_of_other_parameters_stay():
    proto = ghost(3)
    proto.graph.initializer.add().CopyFrom(next(tensor for tensor in proto.graph.initializer if tensor.name == "s"))
    proto.graph.initializer[-1].name = "other"
    proto.graph.initializer[-1].raw_data = normal(4, seed=7).tobytes()
    next(node for node in proto.graph.node if node.name == "n1").input[1] = "other"
    result = fastbn.fold(proto, verify=False)
    assert codes(result) == {"other-outputs": 3}


def test_a_part_that_something_else_reads_stays():
    result = fastbn.fold(ghost(2, nodes="z = Relu(p1)", behind="e = Add(d, d) y = Tanh(e)"), verify=False)
    assert ops(result.model).count("BatchNormalization") == 2


def test_a_part_that_is_not_selected_keeps_all():
    result = fastbn.fold(ghost(3), skip="n1")
    assert not result.folded
    assert codes(result)["not-selected"] >= 1


def test_a_chain_before_the_norms_does_not_pass():
    assert refuses(
        model(
            "(float[4,4] x) => (float y) { r = Tanh(x) p, q = Split <axis = 0> (r, k) y = BatchNormalization(p, s, t, m, v) }",
            k=np.full(2, 2, np.int64),
            **norm(4),
        )
    )


def test_another_reader_of_what_takes_the_operand_keeps_it():
    # It could undo a scale and a shift, but not what the center adds.
    nodes = f"x = Tanh(u) c = {FULL} d = Add(c, x) {NORM} n = BatchNormalization(c, s2, t2, m2, v2) z = Sigmoid(n) w = Sigmoid(x)"
    text = f"(float[2,4,6,6] u) => (float y, float z, float w) {{ {nodes} }}"
    refused = fastbn.fold(model(text, full=WEIGHTS["full"], b=WEIGHTS["b"], **norm(4), **norm(4, "2", seed=7)), verify=False)
    assert codes(refused) == {"graph-output": 1, "other-readers": 1}
    assert "it reads Tanh 'x'" in refused.kept[0].reason


def test_a_quantized_convolution_takes_no_operand():
    nodes = f"w = DequantizeLinear <axis = 0> (q, k) c = Conv <pads = [1,1,1,1]> (x, w) d = Add(c, x) {NORM}"
    quantized = np.random.default_rng(0).integers(-100, 100, (4, 4, 3, 3)).astype(np.int8)
    result = fastbn.fold(around(nodes, q=quantized, k=np.full(4, 0.01, np.float32), **norm(4, positive=True)))
    assert not result.folded


def test_a_part_that_a_body_normalizes_stays():
    body = "then_branch = a () => (float o) { o = BatchNormalization(p1, s, t, m, v) }, else_branch = e () => (float i) { i = Neg(x) }"
    nodes = f"c = Gemm(x, w) p0, p1 = Split(c, k) y = {PART.format('p0')} z = If <{body}> (f)"
    text = f"(float[4,4] x, bool f) => (float y, float z) {{ {nodes} }}"
    result = fastbn.fold(model(text, w=normal(4, 4), k=np.full(2, 2, np.int64), **norm(4)), verify=False)
    assert codes(result) == {"other-outputs": 1, "crosses-scope": 1}


def test_a_part_that_takes_the_affine_does_not_leave_with_it():
    text = f"""(float[4,5] x) => (float y) {{
        c = MatMul(x, w)
        n = {PART.format("c")}
        p0, p1 = Split <axis = 0> (n, k)
        n1 = {PART.format("p1")}
        d = Concat <axis = 0> (p0, n1)
        y = Gemm(d, w2)
    }}"""
    proto = model(text, w=normal(5, 4), w2=normal(4, 3), k=np.full(2, 2, np.int64), **norm(4))
    assert codes(fastbn.fold(proto, verify=False)) == codes(fastbn.fold(proto)) == {"other-outputs": 1}


def test_the_bound_of_a_minimum():
    """What Min rounds is as large as the larger of what it compares."""
    least = np.full((4, 1, 1), 1e-6, np.float32)
    text = f"(float[2,4,6,6] u) => (float y) {{ x = Conv <pads = [1,1,1,1]> (u, full, b) d = Min(x, k) {NORM} }}"
    folds(model(text, full=WEIGHTS["full"], b=WEIGHTS["b"], k=least, **norm(4, positive=True)), "Conv Min")


def test_a_deformed_convolution_of_constant_offsets():
    text = "(float[1,4,5,5] u) => (float y) { x = Relu(u) n = Mul(x, k) y = DeformConv <pads = [1,1,1,1]> (n, full, o) }"
    changes = {"k": np.full((4, 1, 1), 3, np.float32), "o": 3 * normal(1, 18, 5, 5), "full": WEIGHTS["full"]}
    folds(model(text, opset=19, **changes), "Relu DeformConv")


@pytest.mark.parametrize(("least", "code"), [(0.0, "other-readers"), (1e-6, "graph-output")])
def test_an_operand_does_not_stay_where_it_would_nearly_cancel(least, code):
    """With a scale of 0 its other reader could not undo the change; otherwise what gives it is in the way."""
    small = {**norm(4), "s": np.array([1, least, 1, 1], np.float32)}
    assert codes(fastbn.fold(around(f"c = {DW} d = Add(c, x) {NORM}", **small), verify=False)) == {code: 1}
