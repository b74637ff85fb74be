"""Every row of the table of absorbers: folds when it may, refuses when it may not, equal to the original in onnxruntime."""

import ml_dtypes
import numpy as np
import pytest
from onnx import helper
from sketch import CONV_BN, conv_bn, folds, initializers, model, norm, normal, refuses

import fastbn

B4, B6 = normal(4, seed=8), normal(6, seed=8)


def before_norm(node, x, *, channels=4, dtype="float", opset=17, **constants):
    """Return `node`, which gives c from x, and a BatchNormalization of c."""
    kind = {"float": np.float32, "double": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    text = f"({dtype}[{x}] x) => ({dtype} y) {{ c = {node} y = BatchNormalization(c, s, t, m, v) }}"
    constants = {name: np.asarray(values).astype(kind) for name, values in constants.items()}
    return model(text, opset=opset, **constants, **norm(channels, dtype=kind))


FOLDS = {
    "Conv 1-D": before_norm("Conv(x, w, b)", "N,3,9", w=normal(4, 3, 3), b=B4),
    "Conv 2-D": before_norm("Conv <pads = [1,1,1,1], strides = [2,2]> (x, w, b)", "N,3,8,8", w=normal(4, 3, 3, 3), b=B4),
    "Conv 3-D": before_norm("Conv <dilations = [1,2,1]> (x, w, b)", "N,3,4,6,4", w=normal(4, 3, 2, 2, 2), b=B4),
    "Conv without bias": before_norm("Conv(x, w)", "N,3,8,8", w=normal(4, 3, 3, 3)),
    "Conv groups": before_norm("Conv <group = 2> (x, w, b)", "N,6,8,8", w=normal(4, 3, 3, 3), b=B4),
    "Conv depthwise": before_norm("Conv <group = 4> (x, w, b)", "N,4,8,8", w=normal(4, 1, 3, 3), b=B4),
    "Conv depthwise multiplier": before_norm("Conv <group = 2> (x, w)", "N,2,8,8", w=normal(4, 1, 3, 3)),
    "Conv one channel": before_norm("Conv(x, w)", "N,3,8,8", w=normal(1, 3, 3, 3), channels=1),
    "Conv auto_pad": before_norm('Conv <auto_pad = "SAME_UPPER"> (x, w, b)', "N,3,8,8", w=normal(4, 3, 3, 3), b=B4),
    "ConvTranspose": before_norm("ConvTranspose <strides = [2,2]> (x, w, b)", "N,3,5,5", w=normal(3, 4, 2, 2), b=B4),
    "ConvTranspose 1-D": before_norm("ConvTranspose(x, w)", "N,3,5", w=normal(3, 4, 3)),
    "ConvTranspose groups": before_norm("ConvTranspose <group = 2> (x, w, b)", "N,6,5,5", w=normal(6, 2, 3, 3), b=B4),
    "ConvTranspose padded": before_norm(
        "ConvTranspose <group = 2, pads = [1,1,1,1], strides = [2,2], output_padding = [1,1]> (x, w)", "N,4,5,5", w=normal(4, 2, 3, 3)
    ),
    "ConvTranspose depthwise": before_norm("ConvTranspose <group = 4> (x, w)", "N,4,5,5", w=normal(4, 1, 3, 3)),
    "Gemm": before_norm("Gemm(x, w, b)", "N,5", w=normal(5, 4), b=B4),
    "Gemm transB": before_norm("Gemm <transB = 1> (x, w, b)", "N,5", w=normal(4, 5), b=B4),
    "Gemm transA": before_norm("Gemm <transA = 1> (x, w, b)", "5,3", w=normal(5, 4), b=B4),
    "Gemm alpha": before_norm("Gemm <alpha = -0.5> (x, w, b)", "N,5", w=normal(5, 4), b=B4),
    "Gemm beta": before_norm("Gemm <beta = 0.25> (x, w, b)", "N,5", w=normal(5, 4), b=B4),
    "Gemm alpha, beta, transB": before_norm("Gemm <alpha = 2.0, beta = -3.0, transB = 1> (x, w, b)", "N,5", w=normal(4, 5), b=B4),
    "Gemm beta 0": before_norm("Gemm <beta = 0.0> (x, w, b)", "N,5", w=normal(5, 4), b=B4),
    "Gemm without C": before_norm("Gemm <alpha = 0.5> (x, w)", "N,5", w=normal(5, 4)),
    "Gemm without C, beta": before_norm("Gemm <beta = 0.5> (x, w)", "N,5", w=normal(5, 4)),
    "Gemm scalar C": before_norm("Gemm(x, w, b)", "N,5", w=normal(5, 4), b=1.5),
    "Gemm C of shape (1,)": before_norm("Gemm(x, w, b)", "N,5", w=normal(5, 4), b=[1.5]),
    "Gemm C of shape (1, N)": before_norm("Gemm(x, w, b)", "N,5", w=normal(5, 4), b=normal(1, 4)),
    "Gemm C of shape (M, 1)": before_norm("Gemm(x, w, b)", "3,5", w=normal(5, 4), b=normal(3, 1)),
    "Gemm C of shape (M, N)": before_norm("Gemm <beta = 2.0> (x, w, b)", "3,5", w=normal(5, 4), b=normal(3, 4)),
}


@pytest.mark.parametrize("case", FOLDS)
def test_folds(case):
    folds(FOLDS[case], FOLDS[case].graph.node[0].op_type)


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_gemm_beta_goes_into_the_constant(beta):
    result = folds(before_norm(f"Gemm <beta = {beta}> (x, w, b)", "N,5", w=normal(5, 4), b=B4), "Gemm")
    attributes = {attribute.name: attribute.f for attribute in result.model.graph.node[0].attribute}
    assert attributes["beta"] == 1.0


@pytest.mark.parametrize("dtype", ["double", "float16", "bfloat16"])
@pytest.mark.parametrize("node", ["Conv(x, w, b)", "ConvTranspose(x, w, b)", "Gemm(x, w, b)"])
def test_folds_in_every_type(node, dtype):
    shape, weight = ("N,5", normal(5, 4)) if "Gemm" in node else ("N,4,6,6", normal(4, 4, 3, 3))
    proto = before_norm(node, shape, dtype=dtype, opset=22 if dtype == "bfloat16" else 17, w=weight, b=B4)
    result = fastbn.fold(proto)
    assert [n.op_type for n in result.model.graph.node] == [proto.graph.node[0].op_type]
    assert {array.dtype.name for array in initializers(result.model).values()} == {"float64" if dtype == "double" else dtype}
    (fold,) = result.folded
    if dtype != "double":  # onnxruntime has no float64 convolution
        assert fold.error <= fold.bound
        assert ("bfloat16" in (fold.note or "")) == (dtype == "bfloat16")
    elif "Gemm" in node:
        folds(proto, "Gemm")


def chain(nodes, **constants):
    return model(f"(float[2,3,6,6] x) => (float[2,4,4,4] y) {{ c = Conv(x, w, b) {nodes} }}", w=normal(4, 3, 3, 3), b=B4, **constants)


K, L = normal(4, 1, 1, seed=1), normal(4, 1, 1, seed=2)
DECOMPOSED = {
    "Mul, Add": "d = Mul(c, k) y = Add(d, l)",
    "Mul, Add, constants first": "d = Mul(k, c) y = Add(l, d)",
    "Sub, Div": "d = Sub(c, k) y = Div(d, l)",
    "Sub from a constant, Mul": "d = Sub(k, c) y = Mul(d, l)",
    "Sub, Mul, Mul, Add": "d = Sub(c, k) e = Mul(d, l) f = Mul(k, e) y = Add(f, l)",
    "Add, Sub": "d = Add(c, k) y = Sub(l, d)",
    "scalars": "d = Mul(c, two) e = Add(half, d) y = Sub(e, two)",
    "BN after BN": "d = BatchNormalization(c, s, t, m, v) y = BatchNormalization(d, s2, t2, m2, v2)",
    "Mul, BN, Add": "d = Mul(c, k) e = BatchNormalization(d, s, t, m, v) y = Add(e, l)",
    "Identity": "d = Identity(c) e = BatchNormalization(d, s, t, m, v) y = Identity(e)",
}


@pytest.mark.parametrize("case", DECOMPOSED)
def test_chains_into_a_convolution(case):
    everything = {"k": K, "l": L, "two": np.float32(2), "half": np.float32([0.5]), **norm(4), **norm(4, "2", seed=5)}
    used = {name: value for name, value in everything.items() if f"{name}," in DECOMPOSED[case] or f"{name})" in DECOMPOSED[case]}
    proto = chain(DECOMPOSED[case], **used)
    left = "Conv Identity Identity" if case == "Identity" else "Conv"
    result = folds(proto, left)
    assert len(result.folded) == 1, "one home, one fold"


HOMES = {
    "Conv": ("2,3,6,6", "Conv(x, w)", normal(4, 3, 3, 3)),
    "ConvTranspose": ("2,3,6,6", "ConvTranspose(x, w)", normal(3, 4, 3, 3)),
    "Gemm": ("3,5", "Gemm(x, w)", normal(5, 4)),
    "Gemm, beta without C": ("3,5", "Gemm <beta = 0.5> (x, w)", normal(5, 4)),
    "Gemm, beta": ("3,5", "Gemm <beta = 0.5> (x, w, b)", normal(5, 4)),
    "Gemm, beta 0": ("3,5", "Gemm <beta = 0.0> (x, w, b)", normal(5, 4)),
}
LINKS = {
    "BN, Mul": "d = BatchNormalization(c, s, t, m, v) y = Mul(d, k)",
    "BN, BN": "d = BatchNormalization(c, s, t, m, v) y = BatchNormalization(d, s2, t2, m2, v2)",
    "Add, Mul, Mul": "d = Add(c, k) e = Mul(d, k) y = Mul(e, k)",
    "BN, Div, Sub": "d = BatchNormalization(c, s, t, m, v) e = Div(d, k) y = Sub(k, e)",
}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("links", LINKS)
def test_every_link_of_a_chain_sees_the_bias_that_the_last_one_made(home, links):
    shape, node, weight = HOMES[home]
    per_channel = normal(4, 1, 1, seed=3) if "Conv" in home else normal(4, seed=3)
    everything = {"w": weight, "b": B4, "k": per_channel, **norm(4), **norm(4, "2", seed=5)}
    text = f"(float[{shape}] x) => (float y) {{ c = {node} {LINKS[links]} }}"
    used = {name: value for name, value in everything.items() if f" {name}," in text or f" {name})" in text or f"({name}," in text}
    folds(model(text, **used), home.partition(",")[0])


@pytest.mark.parametrize("home", ["Add(r, k)", "Sub(r, k)", "Sub(k, r)", "Mul(r, k)", "Mul(k, r)", "Div(r, k)", "Div(k, r)"])
def test_elementwise_constants_take_what_comes_after(home):
    after = "Add(d, l)" if home[0] in "AS" else "Mul(d, l)"
    text = f"(float[2,4,3,3] x) => (float[2,4,3,3] y) {{ r = Tanh(x) d = {home} n = {after} y = Tanh(n) }}"
    constants = {"k": np.abs(K) + 1, "l": L}
    folds(model(text, **constants), f"Tanh {home[:3]} Tanh", only="n")


def test_batch_norms_without_a_producer_become_one():
    proto = model(
        "(float[N,4,5] x) => (float y) { a = BatchNormalization(x, s, t, m, v) y = BatchNormalization(a, s2, t2, m2, v2) }",
        **norm(4),
        **norm(4, "2", seed=3),
    )
    result = fastbn.fold(proto)
    assert [node.op_type for node in result.model.graph.node] == ["BatchNormalization"]
    assert result.parity.status == "ok"


def test_a_training_batch_norm_takes_nothing():
    proto = chain(
        "d = BatchNormalization <training_mode = 1> (c, s, t, m, v) y = BatchNormalization(d, s2, t2, m2, v2)", **norm(4), **norm(4, "2")
    )
    result = fastbn.fold(proto, verify=False)
    assert [node.op_type for node in result.model.graph.node].count("BatchNormalization") == 2


DROPOUT = "c = Conv(x, w, b) d = Dropout{} y = BatchNormalization(d, s, t, m, v)"


@pytest.mark.parametrize(
    ("dropout", "opset"),
    [
        ("(c)", 17),
        ("(c, ratio)", 12),
        ("(c, ratio, false)", 13),
        ("<ratio = 0.5> (c)", 7),
        ("<ratio = 0.5> (c)", 10),
        ("<ratio = 0.5, is_test = 1> (c)", 6),
    ],
)
def test_inference_dropout_lets_it_pass(dropout, opset):
    constants = {"ratio": np.float32(0.5), "false": np.array(False)}
    used = {name: value for name, value in constants.items() if name in dropout.partition("(")[2]}
    attributes = "" if opset >= 7 else " <is_test = 1>"
    nodes = DROPOUT.format(dropout).replace("BatchNormalization", f"BatchNormalization{attributes}")
    proto = conv_bn(f"(float[N,3,8,8] x) => (float[N,4,6,6] y) {{ {nodes} }}", opset=opset, ir_version=7, **used)
    result = fastbn.fold(proto)
    assert [node.op_type for node in result.model.graph.node] == ["Conv", "Dropout"]
    assert opset < 7 or result.parity.status == "ok"


@pytest.mark.parametrize(
    ("dropout", "opset"),
    [("(c, ratio, true)", 13), ("(c, ratio, flag)", 17), ("<ratio = 0.5> (c)", 6), ("<ratio = 0.5, is_test = 0> (c)", 1)],
)
def test_training_dropout_lets_nothing_pass(dropout, opset):
    constants = {"ratio": np.float32(0.5), "true": np.array(True)}
    used = {name: value for name, value in constants.items() if name in dropout.partition("(")[2]}
    attributes = "" if opset >= 7 else " <is_test = 1>"
    nodes = DROPOUT.format(dropout).replace("BatchNormalization", f"BatchNormalization{attributes}")
    proto = conv_bn(f"(float[N,3,8,8] x, bool flag) => (float[N,4,6,6] y) {{ {nodes} }}", opset=opset, ir_version=7, **used)
    refuses(proto, "training-dropout", verify=False)


def test_dropout_with_its_mask_in_use():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y, bool mask) {
        c = Conv(x, w, b)
        d, mask = Dropout(c)
        y = BatchNormalization(d, s, t, m, v)
    }"""
    folds(conv_bn(text), "Conv Dropout")


# Values before the norm that somebody else sees too: Tanh, so that no rule can undo it there.
SEEN = {
    "other-readers": CONV_BN.replace(" y) {", " y, float z) { z = Tanh(c)"),
    "graph-output": CONV_BN.replace(" y) {", " y, float[N,4,6,6] c) {"),
}


@pytest.mark.parametrize("code", SEEN)
def test_a_value_that_others_see_is_not_changed(code):
    sentence = refuses(conv_bn(SEEN[code]), code)
    assert "'c'" in sentence


def test_a_reader_of_the_shape_sees_nothing():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y, int64[4] n) {
        c = Conv(x, w, b)
        n = Shape(c)
        y = BatchNormalization(c, s, t, m, v)
    }"""
    folds(conv_bn(text), "Conv Shape")


def test_a_value_read_twice_by_the_same_node_is_not_changed():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        c = Conv(x, w, b)
        d = Mul(c, c)
        y = BatchNormalization(d, s, t, m, v)
    }"""
    assert "'d'" in refuses(conv_bn(text))


SHARED = """(float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,4,6,6] z) {
    c = Conv(x, w, b)
    y = BatchNormalization(c, s, t, m, v)
    d = Conv(x, w, b)
    %s
}"""


def test_a_shared_weight_is_duplicated_under_a_new_name():
    proto = conv_bn(SHARED % "z = Tanh(d)")
    result = folds(proto, "Conv Conv Tanh")
    first, second = result.model.graph.node[:2]
    assert list(second.input) == ["x", "w", "b"]
    assert list(first.input) == ["x", "c.weight", "c.bias"]
    after = initializers(result.model)
    assert after["w"].tobytes() == initializers(proto)["w"].tobytes()
    assert after["b"].tobytes() == initializers(proto)["b"].tobytes()


def test_two_folds_of_one_weight_make_two_weights():
    proto = conv_bn(SHARED % "z = BatchNormalization(d, s2, t2, m2, v2)", **norm(4, "2", seed=7))
    result = folds(proto, "Conv Conv")
    names = [list(node.input[1:]) for node in result.model.graph.node]
    assert not set(names[0]) & set(names[1])


def test_one_initializer_as_two_parameters():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        c = Conv(x, w, p)
        y = BatchNormalization(c, p, p, p, v)
    }"""
    folds(conv_bn(text, b=None, s=None, t=None, m=None, p=normal(4)), "Conv")


# scale = 8: 65504 is float16's largest number, 6e-8 its smallest.
BIG = np.where(np.arange(4) == 2, 30000, 1).astype(np.float16)
HALF = {"s": np.full(4, 8, np.float16), "t": np.zeros(4, np.float16), "m": np.zeros(4, np.float16), "v": np.ones(4, np.float16)}


def test_overflow_is_refused_and_the_channel_named():
    weight = np.ones((4, 3, 1, 1), np.float16) * BIG.reshape(4, 1, 1, 1)
    text = "(float16[N,3,2,2] x) => (float16[N,4,2,2] y) { c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }"
    sentence = refuses(conv_bn(text, w=weight, b=None, **HALF), "overflow")
    assert "3 values of input 1 of Conv 'c' would become Inf or NaN in float16, channels 2" in sentence


def test_overflow_of_the_bias_is_refused():
    text = "(float16[N,3,2,2] x) => (float16[N,4,2,2] y) { c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) }"
    weight = np.ones((4, 3, 1, 1), np.float16)
    assert "input 2" in refuses(conv_bn(text, w=weight, b=BIG, **HALF), "overflow")


def test_flush_to_zero_is_refused():
    weight = np.full((4, 3, 1, 1), 6e-8, np.float16)
    text = "(float16[N,3,2,2] x) => (float16[N,4,2,2] y) { c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) }"
    small = {**HALF, "s": np.full(4, 0.125, np.float16)}
    assert "would become zero" in refuses(conv_bn(text, w=weight, b=None, **small), "flush-to-zero")


def test_a_scale_of_zero_folds():
    proto = conv_bn(s=np.array([0, 1, 0, 2], np.float32))
    result = folds(proto, "Conv")
    assert not initializers(result.model)["w"][[0, 2]].any()


BROKEN = {
    "norm of another length": (dict(norm(5)), r"at `y`"),
    "parameter of another length": ({"m": normal(3)}, r"Expected shape \(4,\), got shape \(3,\) - at `y.m`"),
    "parameter with two axes": ({"v": np.ones((2, 2), np.float32)}, r"at `y.v`"),
    "bias of another length": ({"b": normal(3)}, r"Expected a bias of shape \(4,\), got shape \(3,\) - at `c`"),
    "weights for other channels": ({"w": normal(4, 5, 3, 3)}, r"got shape \(4, 5, 3, 3\) - at `c`"),
    "weights of rank 2": ({"w": normal(4, 3)}, r"at `c`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_shapes_are_said_in_one_line(case):
    changes, message = BROKEN[case]
    with pytest.raises(fastbn.ModelError, match=message):
        fastbn.fold(conv_bn(**changes), verify=False)


def test_gemm_weight_must_be_a_matrix():
    with pytest.raises(fastbn.ModelError, match=r"Expected a matrix, got shape \(5,\) - at `c`"):
        fastbn.fold(before_norm("Gemm(x, w)", "N,5", w=normal(5)), verify=False)


def test_gemm_c_must_broadcast():
    with pytest.raises(fastbn.ModelError, match="Expected a C that broadcasts to 4 columns"):
        fastbn.fold(before_norm("Gemm(x, w, b)", "N,5", w=normal(5, 4), b=normal(3)), verify=False)


def test_a_bias_that_the_model_computes_is_refused():
    text = "(float[N,3,8,8] x, float[4] b) => (float[N,4,6,6] y) { c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) }"
    refuses(conv_bn(text, b=None), "dynamic-weight")


def test_a_mul_along_the_batch_does_not_go_into_a_convolution():
    proto = chain("y = Mul(c, k)", k=normal(2, 1, 1, 1))
    result = fastbn.fold(proto)
    assert [node.op_type for node in result.model.graph.node] == ["Conv", "Mul"]


def test_a_constant_that_widens_the_output_is_not_folded():
    proto = model(
        "(float[1,3,6,6] x) => (float y) { c = Conv(x, w, b) y = Mul(c, k) }", w=normal(4, 3, 3, 3), b=B4, k=normal(1, 1, 4, 1, 1)
    )
    assert [node.op_type for node in fastbn.fold(proto).model.graph.node] == ["Conv", "Mul"]


def test_a_broadcast_of_one_channel_to_four_is_not_folded():
    proto = model("(float[1,3,6,6] x) => (float y) { c = Conv(x, w) y = Mul(c, k) }", w=normal(1, 3, 3, 3), k=normal(4, 1, 1))
    assert [node.op_type for node in fastbn.fold(proto).model.graph.node] == ["Conv", "Mul"]


def test_a_quantized_weight_is_left_alone():
    text = """(float[N,3,8,8] x) => (float[N,4,6,6] y) {
        c = ConvInteger(x8, w8)
        d = Cast <to = 1> (c)
        x8 = Cast <to = 2> (x)
        y = BatchNormalization(d, s, t, m, v)
    }"""
    proto = conv_bn(text, w=None, b=None, w8=normal(4, 3, 3, 3).astype(np.uint8))
    refuses(proto, verify=False)


def test_attribute_of_the_new_gemm_is_kept_beside_unknown_ones():
    proto = before_norm("Gemm(x, w, b)", "N,5", w=normal(5, 4), b=B4)
    proto.graph.node[0].attribute.append(helper.make_attribute("alpha", 0.5))
    result = folds(proto, "Gemm")
    assert [attribute.name for attribute in result.model.graph.node[0].attribute] == ["alpha"]
