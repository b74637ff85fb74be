"""The forward side of the table of absorbers: the affine comes first, and the constants of everything that reads it make up for it."""

import numpy as np
import pytest
from onnx import helper
from sketch import assert_same, codes, folds, initializers, model, norm, normal, ops, refuses

import fastbn

NORM = "n = BatchNormalization(r, s, t, m, v)"


def after_norm(node, x, channels=4, *, shift=True, opset=17, out="y", **constants):
    """Return a BatchNormalization of tanh(x), which gives n, and `node`, which reads it."""
    parameters = norm(channels)
    if not shift:
        parameters["t"] = parameters["m"] = np.zeros(channels, np.float32)
    text = f"(float[{x}] x) => (float {out}) {{ r = Tanh(x) {NORM} {node} }}"
    return model(text, opset=opset, **constants, **parameters)


B6 = normal(6, seed=8)
GROUPED, DEPTHWISE = normal(6, 2, 3, 3), normal(8, 1, 3, 3)

# name -> (nodes after n, shape of x, constants). The shift of the norm is not zero.
TAKES_ALL = {
    "Conv 1-D": ("y = Conv(n, w, b)", "N,4,9", {"w": normal(6, 4, 3), "b": B6}),
    "Conv 2-D": ("y = Conv <strides = [2,2]> (n, w, b)", "N,4,8,8", {"w": normal(6, 4, 3, 3), "b": B6}),
    "Conv 3-D": ("y = Conv <dilations = [1,2,1]> (n, w)", "N,4,5,6,5", {"w": normal(6, 4, 2, 2, 2)}),
    "Conv groups": ("y = Conv <group = 2> (n, w, b)", "N,4,6,6", {"w": GROUPED, "b": B6}),
    "Conv depthwise": ("y = Conv <group = 4> (n, w)", "N,4,6,6", {"w": DEPTHWISE}),
    "Conv pads 0": ("y = Conv <pads = [0,0,0,0]> (n, w)", "N,4,6,6", {"w": normal(6, 4, 3, 3)}),
    "Conv VALID": ('y = Conv <auto_pad = "VALID"> (n, w)', "N,4,6,6", {"w": normal(6, 4, 3, 3)}),
    "Conv SAME, kernel 1": ('y = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (n, w)', "N,4,6,6", {"w": normal(6, 4, 1, 1)}),
    "ConvTranspose, inner part": ("y = ConvTranspose <pads = [2,2,2,2]> (n, w, b)", "N,4,6,6", {"w": normal(4, 6, 3, 3), "b": B6}),
    "ConvTranspose, kernel 1": ("y = ConvTranspose <group = 2> (n, w)", "N,4,6,6", {"w": normal(4, 3, 1, 1)}),
    "Gemm": ("y = Gemm(n, w, b)", "N,4", {"w": normal(4, 6), "b": B6}),
    "Gemm transB": ("y = Gemm <transB = 1> (n, w)", "N,4", {"w": normal(6, 4)}),
    "Gemm alpha, beta": ("y = Gemm <alpha = -0.5, beta = 3.0> (n, w, b)", "N,4", {"w": normal(4, 6), "b": B6}),
    "Gemm beta 0": ("y = Gemm <alpha = 2.0, beta = 0.0> (n, w, b)", "N,4", {"w": normal(4, 6), "b": B6}),
    "Gemm scalar C": ("y = Gemm(n, w, b)", "N,4", {"w": normal(4, 6), "b": np.float32(2)}),
    "Gemm C of shape (M, 1)": ("y = Gemm <beta = 2.0> (n, w, b)", "3,4", {"w": normal(4, 6), "b": normal(3, 1)}),
    "Gemm transA": ("q = Transpose <perm = [1,0]> (n) y = Gemm <transA = 1> (q, w, b)", "3,4", {"w": normal(4, 6), "b": B6}),
    "MatMul, Add": ("c = MatMul(n, w) y = Add(c, b)", "N,4", {"w": normal(4, 6), "b": B6}),
    "MatMul 3-D, Add first": ("q = Transpose <perm = [0,2,1]> (n) c = MatMul(q, w) y = Add(b, c)", "N,4,3", {"w": normal(4, 6), "b": B6}),
    "MatMul, Sub": ("c = MatMul(n, w) y = Sub(c, b)", "N,4", {"w": normal(4, 6), "b": B6}),
    "MatMul, Sub from": ("c = MatMul(n, w) y = Sub(b, c)", "N,4", {"w": normal(4, 6), "b": B6}),
    "MatMul left": ("c = MatMul(w, n) y = Add(c, b)", "N,4,5", {"w": normal(6, 4), "b": normal(6, 1)}),
    "two Convs": (
        "c = Conv(n, w) d = Conv(n, w2) y = Concat <axis = 1> (c, d)",
        "N,4,5,5",
        {"w": normal(6, 4, 3, 3), "w2": normal(2, 4, 3, 3)},
    ),
    "LSTM": (
        "q = Transpose <perm = [0,2,1]> (n) y, h, c = LSTM <hidden_size = 3> (q, w, u, b)",
        "5,4,2",
        {"w": normal(1, 12, 4), "u": normal(1, 12, 3), "b": normal(1, 24)},
    ),
    "LSTM without bias": (
        "q = Transpose <perm = [0,2,1]> (n) y = LSTM <hidden_size = 3> (q, w, u)",
        "5,4,2",
        {"w": normal(1, 12, 4), "u": normal(1, 12, 3)},
    ),
    "GRU both ways": (
        'q = Transpose <perm = [0,2,1]> (n) y = GRU <hidden_size = 3, direction = "bidirectional"> (q, w, u, b)',
        "5,4,2",
        {"w": normal(2, 9, 4), "u": normal(2, 9, 3), "b": normal(2, 18)},
    ),
    "GRU linear before reset": (
        "q = Transpose <perm = [0,2,1]> (n) y = GRU <hidden_size = 3, linear_before_reset = 1> (q, w, u, b)",
        "5,4,2",
        {"w": normal(1, 9, 4), "u": normal(1, 9, 3), "b": normal(1, 18)},
    ),
    "RNN": (
        "q = Transpose <perm = [0,2,1]> (n) y = RNN <hidden_size = 3> (q, w, u)",
        "5,4,2",
        {"w": normal(1, 3, 4), "u": normal(1, 3, 3)},
    ),
}


@pytest.mark.parametrize("case", TAKES_ALL)
def test_takes_scale_and_shift(case):
    nodes, shape, constants = TAKES_ALL[case]
    proto = after_norm(nodes, shape, **constants)
    folds(proto, ops(proto).replace("BatchNormalization ", ""))


# Only the scale may pass: with a shift the norm stays, or its shift would be lost at the borders.
PADDED = {
    "Conv pads": ("y = Conv <pads = [1,1,1,1]> (n, w)", normal(6, 4, 3, 3)),
    "Conv pads at one end": ("y = Conv <pads = [0,0,0,1]> (n, w)", normal(6, 4, 3, 3)),
    "Conv SAME_UPPER": ('y = Conv <auto_pad = "SAME_UPPER"> (n, w)', normal(6, 4, 3, 3)),
    "Conv SAME_LOWER": ('y = Conv <auto_pad = "SAME_LOWER"> (n, w)', normal(6, 4, 3, 1)),
    "ConvTranspose": ("y = ConvTranspose(n, w)", normal(4, 6, 3, 3)),
    "ConvTranspose, too little cut": ("y = ConvTranspose <pads = [1,1,1,1]> (n, w)", normal(4, 6, 3, 3)),
    "ConvTranspose, one side cut": ("y = ConvTranspose <pads = [2,2,2,0]> (n, w)", normal(4, 6, 3, 3)),
    "ConvTranspose, stride": ("y = ConvTranspose <strides = [2,2], pads = [1,1,1,1]> (n, w)", normal(4, 6, 2, 2)),
    "ConvTranspose, output_padding": ("y = ConvTranspose <strides = [2,2], output_padding = [1,1]> (n, w)", normal(4, 6, 1, 1)),
    "ConvTranspose, dilation": ("y = ConvTranspose <dilations = [2,2], pads = [2,2,2,2]> (n, w)", normal(4, 6, 3, 3)),
    "ConvTranspose, auto_pad": ('y = ConvTranspose <auto_pad = "SAME_UPPER"> (n, w)', normal(4, 6, 3, 3)),
}


@pytest.mark.parametrize("case", PADDED)
def test_padding_lets_only_the_scale_pass(case):
    node, weight = PADDED[case]
    refuses(after_norm(node, "N,4,6,6", w=weight), "padding")
    folds(after_norm(node, "N,4,6,6", w=weight, shift=False), "Tanh Conv" + ("Transpose" if "Transpose" in case else ""))


def test_a_pad_node_before_the_convolution_is_padding_too():
    node = "p = Pad(n, pads) y = Conv(p, w)"
    constants = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "w": normal(6, 4, 3, 3)}
    refuses(after_norm(node, "N,4,6,6", **constants), "padding")
    folds(after_norm(node, "N,4,6,6", shift=False, **constants), "Tanh Pad Conv")


def test_matmul_alone_leaves_an_add_for_the_shift():
    weight = normal(4, 6)
    folds(after_norm("c = MatMul(n, w) y = Tanh(c)", "N,4", w=weight), "Tanh Add MatMul Tanh")
    folds(after_norm("c = MatMul(n, w) y = Tanh(c)", "N,4", w=weight, shift=False), "Tanh MatMul Tanh")


# name -> (shape of x, nodes): k4 and k5 run along an axis that the MatMul does not sum over.
BESIDE = {
    "rows, from the right": ("2,4,5", "a = Tanh(x) n = Mul(a, k41) c = MatMul(n, w56) y = Mul(c, k41)"),
    "rows, a vector": ("2,4,5", "a = Tanh(x) n = Mul(a, k41) c = MatMul(n, v5) y = Mul(c, k4)"),
    "rows, a vector as long": ("4,4,5", "a = Tanh(x) n = Mul(a, k41) c = MatMul(n, v5) y = Mul(c, k4)"),
    "columns, a vector from the left": ("5,4,5", "a = Tanh(x) n = Mul(a, k5) c = MatMul(v4, n) y = Mul(c, k5)"),
    "batch, a vector from the left": ("5,4,5", "a = Tanh(x) n = Mul(a, k511) c = MatMul(v4, n) y = Mul(c, k51)"),
}
BESIDE_CONSTANTS = {"k4": normal(4), "k41": normal(4, 1), "k5": normal(5), "k51": normal(5, 1), "k511": normal(5, 1, 1)}
BESIDE_CONSTANTS |= {"w56": normal(5, 6), "v5": normal(5, seed=1), "v4": normal(4, seed=1)}


@pytest.mark.parametrize("case", BESIDE)
def test_a_scale_beside_the_sum_of_a_matmul(case):
    shape, nodes = BESIDE[case]
    used = {name: value for name, value in BESIDE_CONSTANTS.items() if f"{name})" in nodes or f"({name}," in nodes}
    proto = model(f"(float[{shape}] x) => (float y) {{ {nodes} }}", **used)
    result = fastbn.fold(proto)
    assert ops(result.model) == "Tanh MatMul Mul"
    assert_same(proto, result.model)


@pytest.mark.parametrize("weight", [normal(4, 4), normal(2, 4, 4)], ids=["matrix", "batch"])
def test_a_vector_from_the_right_of_a_constant(weight):
    """The output channels of W @ vector are its last axis, not the last but one; both have 4."""
    proto = model("(float[4] x) => (float y) { a = Tanh(x) c = MatMul(w, a) y = Mul(c, k) }", w=weight, k=normal(4, seed=5))
    result = fastbn.fold(proto)
    assert ops(result.model) == "Tanh MatMul"
    assert_same(proto, result.model)
    shifted = model("(float[4] x) => (float y) { a = Tanh(x) n = Add(a, k) c = MatMul(w, n) y = Add(c, k) }", w=normal(4, 4), k=normal(4))
    result = fastbn.fold(shifted)
    assert ops(result.model) == "Tanh MatMul Add"
    assert_same(shifted, result.model)


def test_a_matmul_that_mixes_the_axis_is_refused():
    proto = model(
        "(float[4,3,5] x) => (float y) { a = Tanh(x) n = Mul(a, k) c = MatMul(n, w) y = Tanh(c) }", k=normal(4, 1, 1), w=normal(4, 5, 6)
    )
    assert ops(fastbn.fold(proto).model) == "Tanh Mul MatMul Tanh"


def test_pre_norm_attention():
    """Three MatMuls read one norm: it goes when all three take it, and stays when one does not."""
    text = """(float[N,4] x) => (float y) {
        r = Tanh(x)
        n = BatchNormalization(r, s, t, m, v)
        a = MatMul(n, wq)  q = Add(a, bq)
        b = MatMul(n, wk)  k = Add(b, bk)
        c = MatMul(n, wv)  u = Add(c, bv)
        kt = Transpose <perm = [1,0]> (k)
        e = MatMul(q, kt)
        p = Softmax(e)
        %s
    }"""
    constants = {name: normal(4, 4, seed=at) for at, name in enumerate(("wq", "wk", "wv"))}
    constants |= {name: normal(4, seed=at) for at, name in enumerate(("bq", "bk", "bv"))}
    proto = model(text % "y = MatMul(p, u)", **constants, **norm(4))
    result = folds(proto, ops(proto).replace("BatchNormalization ", ""))
    assert len(result.folded) == 1
    assert result.folded[0].into.count("+") == 5
    residual = model(text % "o = MatMul(p, u) y = Mul(o, n)", **constants, **norm(4))
    assert len(fastbn.fold(residual).kept) == 1


def test_one_reader_that_cannot_take_it_keeps_it():
    proto = after_norm("c = Conv(n, w) z = Tanh(n)", "N,4,6,6", out="c, float z", w=normal(6, 4, 3, 3))
    assert "Tanh" in refuses(proto)


def test_a_graph_output_keeps_it():
    proto = after_norm("c = Conv(n, w)", "N,4,6,6", out="c, float n", w=normal(6, 4, 3, 3))
    assert "'n' on the way is a graph output" in refuses(proto)


def test_a_reader_in_a_subgraph_keeps_it():
    text = """(float[N,4,6,6] x, bool flag) => (float y) {
        r = Tanh(x)
        n = BatchNormalization(r, s, t, m, v)
        y = If (flag) <then_branch = yes () => (a) { a = Conv(n, w) }, else_branch = no () => (d) { d = Conv(r, w) }>
    }"""
    sentence = refuses(model(text, w=normal(6, 4, 3, 3), **norm(4)), verify=False)
    assert "inner graph" in sentence


WEIGHTS = {
    "dynamic-weight": "(float[N,4,6,6] x, float[6,4,3,3] w) => (float y)",
    "overridable-weight": "(float[N,4,6,6] x, float[6,4,3,3] w) => (float y)",
}


@pytest.mark.parametrize("code", WEIGHTS)
def test_a_weight_that_is_not_constant(code):
    constants = {"w": normal(6, 4, 3, 3)} if code == "overridable-weight" else {}
    proto = model(f"{WEIGHTS[code]} {{ r = Tanh(x) {NORM} y = Conv(n, w) }}", **constants, **norm(4))
    assert f"'{'w'}' of Conv 'y'" in refuses(proto)
    if constants:
        result = fastbn.fold(proto, freeze_inputs=True)
        assert ops(result.model) == "Tanh Conv"


NOT_DATA = {
    "dynamic-weight": ("y = Conv(x, n)", "4,3,3,3"),
    "no-absorber": ("y = Gemm(x, n)", "4,4"),
}


@pytest.mark.parametrize("code", NOT_DATA)
def test_only_the_data_is_an_input(code):
    node, shape = NOT_DATA[code]
    text = f"(float[{shape}] z, float[{shape}] x) => (float y) {{ r = Tanh(z) {NORM} {node} }}"
    refuses(model(text, **norm(int(shape.split(",")[1]))), code)


def test_the_initial_state_of_a_gru_is_not_its_data():
    node = "y = GRU <hidden_size = 4, layout = 0> (x, w, u, , , q)"
    text = f"(float[2,4,1] z, float[5,2,4] x) => (float y) {{ r = Tanh(z) {NORM} q = Transpose <perm = [2,0,1]> (n) {node} }}"
    proto = model(text, w=normal(1, 12, 4), u=normal(1, 12, 4), **norm(4))
    assert "not the input sequence" in refuses(proto)


def test_an_affine_behind_takes_the_shift_and_the_convolution_the_scale():
    """(S x + T) * k goes on as S k x + T k: everything arrives in the Conv, which is not padded."""
    constants = {"k": normal(4, 1, 1), "l": normal(4, 1, 1, seed=2), "w": normal(6, 4, 3, 3), "b": B6}
    proto = after_norm("c = Mul(n, k) d = Add(l, c) y = Conv(d, w, b)", "N,4,6,6", **constants)
    folds(proto, "Tanh Conv")


def test_a_shared_weight_is_duplicated():
    proto = after_norm("c = Conv(n, w) d = Conv(r, w) y = Add(c, d)", "N,4,6,6", w=normal(6, 4, 3, 3))
    result = folds(proto, "Tanh Conv Conv Add")
    after = initializers(result.model)
    assert after["w"].tobytes() == initializers(proto)["w"].tobytes()


def test_two_norms_forward_through_one_concat():
    text = """(float[N,2,6,6] x, float[N,3,6,6] z) => (float y) {
        a = Tanh(x)  b = Tanh(z)
        p = BatchNormalization(a, s, t, m, v)
        q = BatchNormalization(b, s2, t2, m2, v2)
        c = Concat <axis = 1> (p, q)
        y = Conv(c, w)
    }"""
    proto = model(text, w=normal(4, 5, 3, 3), **norm(2), **norm(3, "2"))
    folds(proto, "Tanh Tanh Concat Conv")


def test_opset_6_gemm_gets_its_broadcast():
    proto = after_norm("y = Gemm <broadcast = 1> (n, w, b)", "2,4", opset=6, w=normal(4, 6), b=B6)
    for node in proto.graph.node:
        if node.op_type == "BatchNormalization":
            node.attribute.append(helper.make_attribute("is_test", 1))
    result = fastbn.fold(proto)
    assert codes(result) == {}
    assert ops(result.model) == "Tanh Gemm"
