"""MatMul on either side and at any rank, and Gemm of a constant A: folds when it may, refuses when it may not."""

import numpy as np
import pytest
from sketch import assert_same, conv_bn, folds, initializers, model, norm, normal, refuses
from test_absorb import before_norm

import fastbn

B4, B6 = normal(4, seed=8), normal(6, seed=8)

CNORM = "y = BatchNormalization(c, s, t, m, v)"

# A is constant (3x5, or 5x3 transposed) and B the data (5x4, or 4x5): name -> (nodes from x (5x6), operators that stay).
CONSTANT_A = {
    "columns pass to B": (f"e = Gemm(x, w) c = Gemm(a, e, b) {CNORM}", "Gemm Gemm"),
    "transposed, no C": (
        f"e = Gemm <transA = 1, transB = 1> (w, x) c = Gemm <transA = 1, transB = 1, alpha = 0.5> (at, e) {CNORM}",
        "Gemm Gemm",
    ),
    "beta": (f"e = Gemm(x, w) c = Gemm <beta = -2.0> (a, e, b) {CNORM}", "Gemm Gemm"),
    "rows": ("e = Tanh(x) c = Gemm(a, e) y = Mul(c, kc)", "Tanh Gemm"),
    "rows of a transposed A": ("e = Tanh(x) c = Gemm <transA = 1> (at, e) y = Mul(c, kc)", "Tanh Gemm"),
    "a shift of the rows": ("e = Tanh(x) c = Gemm(a, e) y = Add(c, kc)", "Tanh Gemm"),
    "forward along the rows of B": ("e = Tanh(x) f = Mul(e, r) y = Gemm <alpha = 2.0> (a, f)", "Tanh Gemm"),
    "forward, a shift": ("e = Tanh(x) f = Add(e, r) y = Gemm(a, f)", "Tanh Gemm"),
    "forward, transposed": ("e = Tanh(x) g = Transpose(e) f = Mul(g, rt) y = Gemm <transA = 1, transB = 1> (at, f)", "Tanh Transpose Gemm"),
    "forward along the columns": ("e = Tanh(x) f = Mul(e, q) d = Gemm(a, f, b6) y = MatMul(d, w)", "Tanh Gemm MatMul"),
}


@pytest.mark.parametrize("case", CONSTANT_A)
def test_gemm_of_a_constant_a(case):
    nodes, expected = CONSTANT_A[case]
    constants = {"a": normal(3, 5), "at": normal(5, 3), "w": normal(6, 4), "b": B4, "b6": B6, "kc": normal(3, 1), **norm(4)}
    constants |= {"r": normal(5, 1, seed=2), "rt": normal(5, seed=2), "q": normal(6, seed=3)}
    used = {name: value for name, value in constants.items() if f"({name}," in nodes or f" {name})" in nodes or f" {name}," in nodes}
    folds(model(f"(float[5,6] x) => (float y) {{ {nodes} }}", **used), expected)


# name -> (shape of x, nodes, operators that stay). w is on the right of x (5 x 4) or wl on its left (4 x 5); k and b run along the last
# axis, kc and bc along the one before it.
NORM_D = "y = BatchNormalization(d, s, t, m, v)"
MATMULS = {
    "right 2-D": ("N,5", "c = MatMul(x, w) y = Mul(c, k)", "MatMul"),
    "right 3-D": ("2,3,5", "c = MatMul(x, w) y = Mul(k, c)", "MatMul"),
    "right, batched weight": ("2,3,5", "c = MatMul(x, w3) y = Div(c, k)", "MatMul"),
    "right, Add and Mul": ("2,3,5", "c = MatMul(x, w) d = Add(c, b) y = Mul(d, k)", "MatMul Add"),
    "right, Add, constant first": ("N,5", "c = MatMul(x, w) d = Add(b, c) y = Mul(d, k)", "MatMul Add"),
    "right, Sub": ("N,5", "c = MatMul(x, w) d = Sub(c, b) y = Mul(d, k)", "MatMul Sub"),
    "right, Sub from a constant": ("N,5", "c = MatMul(x, w) d = Sub(b, c) y = Mul(d, k)", "MatMul Sub"),
    "right, scalar": ("N,5", "c = MatMul(x, w) y = Mul(c, one)", "MatMul"),
    "right, BN": ("N,5", f"c = MatMul(x, w) d = Add(c, b) {NORM_D}", "MatMul Add"),
    "right, Mul, Add, BN": ("N,5", f"c = MatMul(x, w) e = Mul(c, k) d = Add(e, b) {NORM_D}", "MatMul Add"),
    "left 2-D": ("5,3", "c = MatMul(wl, x) y = Mul(c, kc)", "MatMul"),
    "left 3-D": ("2,5,3", "c = MatMul(wl, x) d = Add(c, bc) y = Mul(d, kc)", "MatMul Add"),
    "left, BN on axis 1": ("2,5,3", f"c = MatMul(wl, x) d = Add(c, bc) {NORM_D}", "MatMul Add"),
}
MATMUL_CONSTANTS = {
    **{"w": normal(5, 4), "w3": normal(2, 5, 4), "wl": normal(4, 5), "one": np.float32(3)},
    **{"k": B6[:4], "b": B4, "kc": normal(4, 1, seed=5), "bc": normal(4, 1, seed=6)},
    **norm(4),
}


@pytest.mark.parametrize("case", MATMULS)
def test_matmul(case):
    shape, nodes, expected = MATMULS[case]
    used = {name: value for name, value in MATMUL_CONSTANTS.items() if f"{name}," in nodes or f"{name})" in nodes}
    folds(model(f"(float[{shape}] x) => (float y) {{ {nodes} }}", **used), expected)


def test_matmul_without_add_keeps_the_shift_of_a_batch_norm_as_an_add():
    result = folds(before_norm("MatMul(x, w)", "N,5", w=normal(5, 4)), "MatMul Add")
    matmul, add = result.model.graph.node
    assert (matmul.output[0], add.output[0], add.name) == ("c", "y", "y")


def test_the_shift_that_stays_has_the_type_of_the_data():
    text = "(float16[N,5] x) => (float16 y) { c = MatMul(x, w) y = BatchNormalization(c, s, t, m, v) }"
    result = folds(model(text, w=normal(5, 4, dtype=np.float16), **norm(4)), "MatMul Add")
    assert {array.dtype.name for array in initializers(result.model).values()} == {"float16"}


def test_float32_parameters_beside_float16_data_do_not_mix_types():
    text = "(float16[N,3,8,8] x) => (float16[N,4,6,6] y) { c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }"
    result = folds(conv_bn(text, w=normal(4, 3, 3, 3, dtype=np.float16), b=None), "Conv")
    assert {array.dtype.name for array in initializers(result.model).values()} == {"float16"}


def test_matmul_along_another_axis_is_refused():
    proto = model("(float[2,4,5] x) => (float y) { c = MatMul(x, w) y = BatchNormalization(c, s, t, m, v) }", w=normal(5, 4), **norm(4))
    assert "axis 1" in refuses(proto, "shift-cannot-pass")


def test_matmul_of_a_square_weight_and_axis_is_not_fooled():
    """onnxruntime 1.17 to 1.31 folds this into the wrong axis: both have 4 channels."""
    proto = model(
        """(float[2,4,4] x) => (float y) {
            c = MatMul(x, w)
            d = Transpose <perm = [0, 2, 1]> (c)
            e = Transpose <perm = [0, 2, 1]> (d)
            y = Mul(e, k)
        }""",
        w=normal(4, 4),
        k=normal(4, 1),
    )
    result = fastbn.fold(proto)
    assert_same(proto, result.model)


def test_matmul_of_unknown_rank():
    body = "c = MatMul(x, w) d = Add(c, b) y = BatchNormalization(d, s, t, m, v)"
    proto = model(f"(float[N] shape, float x) => (float y) {{ {body} }}", w=normal(5, 4), b=B4, **norm(4))
    for info in proto.graph.input:
        info.type.tensor_type.ClearField("shape")
    sentence = refuses(proto, "axis-unknown", verify=False)
    assert "rank" in sentence
    sized = fastbn.fold(proto, verify=False, input_shapes={"x": (3, 5)})
    assert [node.op_type for node in sized.model.graph.node] == ["MatMul", "Add"]


def test_matmul_of_two_inputs_is_no_absorber():
    proto = model(
        "(float[3,5] x, float[5,4] w) => (float y) { c = MatMul(x, w) y = BatchNormalization(c, s, t, m, v) }",
        **norm(4),
    )
    refuses(proto, "dynamic-weight")
